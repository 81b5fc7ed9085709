"""From a public input to the inputs of a graph's nodes.

One public input may drive any number of node inputs. Two kinds of bindings say which:

- by name: an input called ``57_steps`` sets ``steps`` of node 57, and the resolution ``71_widthx71_height`` sets
  both. :func:`public_name` is the rule. Where the graph has no such node input, the name binds nothing.
- by the manifest: ``"58.steps" = "steps"``, an expression over roles and inputs. It wins over a name.

A binding that needs a value that the request does not have is skipped, and the graph keeps its own. No IO; the
one value that is not the request's is ``random_seed``, for workflows whose seed is no input.
"""

import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import orjson

from rushes.catalog.expressions import BadExpression, Evaluator, Expression, compile_expression
from rushes.catalog.model import FILE_ROLES, Input, Model
from rushes.catalog.nearest import did_you_mean
from rushes.catalog.roles import roles_of
from rushes.catalog.schema import SEED_DRAWN_LARGEST
from rushes.catalog.workflow import (
    TABLE,
    Graph,
    Workflow,
    has_workflow,
    manifest_error,
    read_graph,
    variant_names,
    workflow_of,
)
from rushes.errors import EngineError, ManifestError

Target = tuple[str, str]
"""A node's id and the name of one of its inputs."""

LONGEST_NAME: Final = 128
NUMBER_ROLES: Final = ("seed", "steps", "guidance", "shift", "fps", "frames")
TEXT_ROLES: Final = ("prompt", "negative_prompt")
SIZE: Final = ("width", "height")
_MOST_NAMED: Final = 10
"""Nodes that a message names."""
RANDOM_SEED: Final = "random_seed"
"""The name of a number that is drawn anew for every graph."""
_MOST_TRIALS: Final = 64
_LARGEST: Final = 2**63
"""Whole numbers from here on stay what they are: JSON writers take no larger integers."""
"""Allowed values of one field that the bindings are tried on."""
_system = random.SystemRandom()
_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9_.-]")


def public_name(node_id: str, input: str) -> str:  # noqa: A002
    """The name of a public input that sets ``input`` of node ``node_id`` by itself.

    ``("57", "steps")`` is ``57_steps``. What a public name cannot hold is written as a dot, so that node "12:3",
    out of a subgraph, has names such as ``12.3_text``.
    """
    name = _NOT_IN_NAMES.sub(".", f"{node_id}_{input}")[:LONGEST_NAME]
    return "_" + name[1:] if name[0] in ".-" else name


def resolution_name(width: Target, height: Target) -> str:
    """The name of a resolution that sets these two node inputs by itself, such as ``71_widthx71_height``."""
    return f"{public_name(*width)}x{public_name(*height)}"


def expression_names(model: Model) -> tuple[str, ...]:
    """The names that expressions of ``model`` can use: its roles, its resolution's sides, and a random seed."""
    roles = [field.role for field in model.inputs]
    named = [role for role in (*TEXT_ROLES, *NUMBER_ROLES, *FILE_ROLES) if role in roles]
    return (*named, *(SIZE if "resolution" in roles else ()), RANDOM_SEED)


class Binder:
    """The bindings of one workflow, compiled once and used for every job. Safe to share between threads."""

    unbound: tuple[str, ...]
    """Public inputs that reach no node input, in the model's order."""
    targets: Mapping[str, tuple[Target, ...]]
    """The node inputs that each bound public input drives, those of its own name first; for messages."""

    def __init__(
        self,
        model: Model,
        workflow: Workflow,
        graph: Graph,
        *,
        draw_seed: Callable[[int, int], int] = _system.randint,
    ) -> None:
        """Compile. ``draw_seed`` gives a random integer between two bounds, both included.

        Raises ManifestError for a binding to what is not there, a wrong expression, or an unclear name.
        """
        self._model = model
        self._draw_seed = draw_seed
        self._source = orjson.dumps(graph)
        self._files = tuple((field.name, field.role) for field in model.inputs if field.role in FILE_ROLES)
        self._explicit = self._compile(workflow, graph)
        self._plain, self._sizes = self._by_name(graph)
        targets: dict[str, dict[Target, None]] = {}
        for target, name in (*self._plain.items(), *((one, name) for one, (name, _) in self._sizes.items())):
            targets.setdefault(name, {})[target] = None
        for target, expression in self._explicit.items():
            for name in self._driving(expression):
                targets.setdefault(name, {})[target] = None
        self.targets = {
            field.name: tuple(targets[field.name]) for field in model.inputs if field.name in targets
        }
        self.unbound = tuple(
            field.name
            for field in model.inputs
            if field.name not in targets and not (field.role == "loras" and workflow.loras)
        )

    def bind(
        self,
        input: Mapping[str, Any],  # noqa: A002
        roles: Mapping[str, Any],
        files: Mapping[str, str],
    ) -> Graph:
        """A new graph with the values of one request; the one that was given stays as it is.

        ``input`` is complete, with defaults; ``roles`` are those of :func:`rushes.catalog.roles.roles_of`;
        ``files`` are the input files' names as ComfyUI knows them, by field. Numbers keep the kind that the
        graph has, where nothing is lost by it. Raises EngineError ``binding_failed`` where an expression has no
        value.
        """
        fields = self._fields(input, files)
        names = self._names(roles, files) | {RANDOM_SEED: self._draw_seed(0, SEED_DRAWN_LARGEST)}
        graph: Graph = orjson.loads(self._source)
        for (node, name), field in self._plain.items():
            if field in fields:
                _set(graph, node, name, fields[field])
        for (node, name), (_, side) in self._sizes.items():
            if SIZE[side] in names:
                _set(graph, node, name, names[SIZE[side]])
        evaluator = Evaluator(names, fields)
        for (node, name), expression in self._explicit.items():
            if expression.names <= names.keys() and expression.fields <= fields.keys():
                try:
                    value = evaluator.value(expression)
                except BadExpression as error:
                    raise self._failed((node, name), expression, str(error)) from None
                _set(graph, node, name, value)
        return graph

    # -- compiling --------------------------------------------------------------------------------------
    def _compile(self, workflow: Workflow, graph: Graph) -> dict[Target, Expression]:
        names = expression_names(self._model)
        fields = [field.name for field in self._model.inputs if field.type != "loras"]
        explicit: dict[Target, Expression] = {}
        for key, text in workflow.bindings.items():
            target = self._target(key, graph)
            try:
                explicit[target] = compile_expression(text, names, fields)
            except BadExpression as error:
                raise self._wrong(key, str(error)) from None
        return explicit

    def _target(self, key: str, graph: Graph) -> Target:
        """The node input that ``"57.steps"`` names. Ids and inputs may hold dots themselves."""
        parts = key.split(".")
        splits = [(".".join(parts[:at]), ".".join(parts[at:])) for at in range(1, len(parts))]
        nodes = [(id_, name) for id_, name in splits if id_ in graph]
        if not splits:
            raise self._wrong(key, 'a binding\'s name is "NODE.INPUT", such as "57.steps"')
        if not nodes:
            id_, name = splits[0]
            have = [one for one, node in graph.items() if name in node["inputs"]][:_MOST_NAMED]
            hint = f"an input {name} is in {', '.join(have)}" if have else f"no node has an input {name}"
            raise self._wrong(key, f"there is no node {id_!r} in the graph; {hint}")
        found = [(id_, name) for id_, name in nodes if name in graph[id_]["inputs"]]
        if not found:
            id_, name = nodes[-1]
            inputs, class_type = graph[id_]["inputs"], graph[id_]["class_type"]
            hint = did_you_mean(name, inputs) if inputs else "it has none"
            raise self._wrong(key, f"node {id_} ({class_type}) has no input {name!r} in the graph; {hint}")
        if len(found) > 1:
            raise self._wrong(key, f"names an input of the nodes {found[0][0]} and {found[1][0]}; rename one")
        return found[0]

    def _by_name(self, graph: Graph) -> tuple[dict[Target, str], dict[Target, tuple[str, int]]]:
        """What names bind: the field of each target, and the field and side (0, 1) of each resolution's."""
        known: dict[str, list[Target]] = {}
        for id_, node in graph.items():
            for name in node["inputs"]:
                known.setdefault(public_name(id_, name), []).append((id_, name))
        plain: dict[Target, str] = {}
        sizes: dict[Target, tuple[str, int]] = {}
        taken: dict[Target, str] = {}
        for field in self._model.inputs:
            pair = field.role == "resolution" and self._pair(field, known)
            found = pair or self._one(field, known)
            for side, target in enumerate(found):
                if target in self._explicit:
                    continue
                if target in taken:
                    both = f"{taken[target]} and {field.name}"
                    raise self._unclear(field, f"{both} set the same node input, {_dotted(target)}")
                taken[target] = field.name
                if pair:
                    sizes[target] = (field.name, side)
                else:
                    plain[target] = field.name
        return plain, sizes

    def _one(self, field: Input, known: Mapping[str, list[Target]]) -> tuple[Target, ...]:
        if field.type == "loras":
            return ()
        found = known.get(field.name, [])
        if len(found) > 1 and not all(target in self._explicit for target in found):
            raise self._unclear(field, f"the name fits {' and '.join(map(_dotted, found))}")
        return tuple(found)

    def _pair(self, field: Input, known: Mapping[str, list[Target]]) -> tuple[Target, ...]:
        splits = [(field.name[:at], field.name[at + 1 :]) for at, one in enumerate(field.name) if one == "x"]
        found = [
            (width, height)
            for left, right in splits
            for width in known.get(left, ())
            for height in known.get(right, ())
        ]
        if len(found) > 1:
            fits = " and ".join("x".join(map(_dotted, pair)) for pair in found)
            raise self._unclear(field, f"the name fits {fits}")
        return found[0] if found else ()

    def _driving(self, expression: Expression) -> Iterable[str]:
        """The public inputs whose values an expression uses."""
        names = {"resolution" if name in SIZE else name for name in expression.names}
        for field in self._model.inputs:
            if field.name in expression.fields or field.role in names:
                yield field.name

    def _wrong(self, key: str, problem: str) -> ManifestError:
        return manifest_error(self._model, f'{TABLE}.bindings."{key}"', problem)

    def _unclear(self, field: Input, problem: str) -> ManifestError:
        fix = "rename it and say what it sets in [engines.comfyui.bindings]"
        return manifest_error(self._model, f"inputs.{field.name}", f"{problem}; {fix}")

    # -- one request ------------------------------------------------------------------------------------
    def _fields(self, input: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:  # noqa: A002
        fields = {name: value for name, value in input.items() if not isinstance(value, list | dict)}
        for name, _ in self._files:
            if name not in fields:
                continue
            if name not in files:
                raise EngineError("binding_failed", f"The input file {name} was not given to ComfyUI.")
            fields[name] = files[name]
        return fields

    def _names(self, roles: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
        names = {role: roles[role] for role in (*TEXT_ROLES, *NUMBER_ROLES) if role in roles}
        if "resolution" in roles:
            names |= zip(SIZE, roles["resolution"], strict=True)
        for field, role in self._files:
            if field in files:
                names.setdefault(role, files[field])
        return names

    def _failed(self, target: Target, expression: Expression, why: str) -> EngineError:
        fields = ", ".join(self._driving(expression)) or "constants"
        message = (
            f"{_dotted(target)} of the workflow cannot be computed from {fields}, as {expression.text}: {why}."
        )
        return EngineError("binding_failed", message, node=target[0])


def check_workflows(model: Model, complete: Mapping[str, Any]) -> None:
    """Compile every variant of the model's workflow, and try its bindings. Raises ManifestError.

    They are tried on ``complete``, an input with its defaults, and with each allowed value and bound of every
    field in its place. A model without a workflow is no error.
    """
    table = model.options.get("comfyui", {})
    if not has_workflow(model):
        if table:
            raise manifest_error(model, f"{TABLE}.graph", "name the file that these keys speak of")
        return
    variants = variant_names(model)
    for name in (None, *variants):
        if name is None and variants and not (model.graph or table.get("graph")):
            continue  # this model's workflows are its variants
        try:
            workflow = workflow_of(model, (name,) if name else ())
            binder = Binder(model, workflow, read_graph(model, workflow))
            for trial in trials(model, complete):
                _try(model, binder, trial)
        except ManifestError as error:
            raise _located(model, error, name) from None


def trials(model: Model, complete: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Inputs to try expressions on: ``complete``, and with each allowed value and bound of a field in its place."""
    yield dict(complete)
    for field in model.inputs:
        if field.name not in complete or field.role == "seed":
            continue  # a bound of a seed may be -1, which no graph ever gets
        for value in field.enum[:_MOST_TRIALS] if field.enum else _bounds(field):
            yield {**complete, field.name: value}


def _bounds(field: Input) -> Iterator[float]:
    whole = field.type == "integer"
    if field.minimum is not None:
        yield math.ceil(field.minimum) if whole else field.minimum
    if field.maximum is not None:
        yield math.floor(field.maximum) if whole else field.maximum


def _try(model: Model, binder: Binder, trial: dict[str, Any]) -> None:
    files = {name: str(trial[name]) for name in model.files() if name in trial}
    try:
        binder.bind(trial, roles_of(model, trial), files)
    except EngineError as error:
        raise manifest_error(model, f"{TABLE}.bindings", error.message) from None


def _located(model: Model, error: ManifestError, variant: str | None) -> ManifestError:
    """The error with the table of the variant in its key, where that is where the key stands."""
    key, inner = error.key, error.key.removeprefix(f"{TABLE}.")
    stem = inner.partition(".")[0]
    if variant is None or inner == key or stem not in model.options["comfyui"]["variants"][variant]:
        return error
    return ManifestError(error.file, f"{TABLE}.variants.{variant}.{inner}", error.problem)


def _dotted(target: Target) -> str:
    return f"{target[0]}.{target[1]}"


def _set(graph: Graph, node: str, name: str, value: Any) -> None:
    inputs = graph[node]["inputs"]
    inputs[name] = like(value, inputs[name])


def like(value: Any, before: Any) -> Any:
    """``value`` as the kind of number or text that ``before`` is, where nothing is lost by it.

    A graph's JSON writes the FLOAT 8.0 as 8, so that an integer in it does not mean that none but integers are
    taken: 7.5 stays 7.5. Of an INT input ComfyUI itself cuts off what stands behind the point.
    """
    if type(before) is bool or before is None or isinstance(before, list | dict):
        return value
    if isinstance(before, str):
        return value if isinstance(value, str | bool) else str(value)
    if isinstance(value, bool):
        return int(value)
    if isinstance(before, float) and isinstance(value, int):
        return float(value) if int(float(value)) == value else value
    if isinstance(before, int) and isinstance(value, float) and value.is_integer() and abs(value) < _LARGEST:
        return int(value)
    return value
