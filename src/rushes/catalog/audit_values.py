"""Tries the values that a request may have on the graph: does ComfyUI take what a manifest allows.

Each public input is set to its default, its choices and its bounds in turn, the rest to the sample; the graph
that comes of it is held against what the nodes say of their inputs.
"""

from collections.abc import Iterator
from typing import Any, Final, Literal, NamedTuple

from rushes.catalog.audit_nodes import (
    Misfit,
    Nodes,
    is_weight,
    label,
    links,
    loads_file,
    misfit,
    plain_inputs,
    primitive,
    specs_of,
)
from rushes.catalog.bindings import Binder
from rushes.catalog.model import FILE_ROLES, Input, Model
from rushes.catalog.roles import roles_of
from rushes.catalog.schema import SEED_LARGEST
from rushes.catalog.workflow import Graph
from rushes.errors import RushesError

_ODD_SIZE: Final = "602x362"
"""A resolution off every step, for models that take any."""
_FAR: Final = 2**31 - 1
"""Stands for any number where the manifest gives no bound."""


class Value(NamedTuple):
    """A value that does not do what the manifest says it does."""

    severity: Literal["error", "warning", "note"]
    where: str
    kind: str
    text: str
    fix: str
    weight: str | None = None
    """The name of the weights, where it is that which no loader has."""


class _Probe(NamedTuple):
    """One request: a field, the value it is given, and how it came to that."""

    field: Input | None
    value: Any
    declared: bool
    """False where the manifest sets no bound: the value only stands for a far one."""


class _Problem(NamedTuple):
    node: str
    name: str
    misfit: Misfit
    weight: str | None


def check_values(model: Model, graph: Graph, binder: Binder, nodes: Nodes | None) -> Iterator[Value]:
    """The values that ComfyUI refuses or changes; without ``nodes`` only what is known of Wan's own nodes."""
    usual = _usual(model)
    known: set[tuple[str, str, str]] = set()
    base = _try(model, binder, usual, nodes)
    if isinstance(base, str):
        yield Value("error", "bindings", "bindings", f"cannot be evaluated for the sample: {base}", "mend it")
        return
    for problem in base:
        known.add((problem.node, problem.name, problem.misfit.kind))
        yield _own(graph, problem)
    for field in model.inputs:
        told: dict[tuple[str, str, str], tuple[Value, list[str]]] = {}
        for probe in _probes(field):
            found = _try(model, binder, {**usual, field.name: probe.value}, nodes)
            if isinstance(found, str):
                if probe.declared:
                    text = f"{field.name} = {probe.value!r}: a binding fails: {found}"
                    yield Value("error", field.name, "bindings", text, "mend the binding, or forbid the value")
                continue
            for problem in found:
                key = (problem.node, problem.name, problem.misfit.kind)
                if key not in known:
                    value = _of_field(graph, field, probe, problem)
                    told.setdefault((*key[:2], f"{key[2]}{value.severity}"), (value, []))[1].append(
                        str(probe.value)
                    )
        yield from _summed(told)


def _summed(told: dict[tuple[str, str, str], tuple[Value, list[str]]]) -> Iterator[Value]:
    """One finding for each node input and kind, with all the values that it is about."""
    for value, texts in told.values():
        others = list(dict.fromkeys(texts))[1:]
        more = f"; also {', '.join(others)}" if others else ""
        yield value._replace(text=value.text + more)


def _usual(model: Model) -> dict[str, Any]:
    """A request like the sample, with every default."""
    defaults = {field.name: field.default for field in model.inputs if field.default is not None}
    return {**defaults, **model.sample}


def _probes(field: Input) -> Iterator[_Probe]:
    if field.role in FILE_ROLES:
        return
    if field.enum is not None:
        yield from (_Probe(field, value, True) for value in field.enum)
        return
    if field.default is not None:
        yield _Probe(field, field.default, True)
    if field.role == "resolution":
        yield _Probe(field, _ODD_SIZE, True)
    if field.type not in ("integer", "float"):
        return
    low, high = (0, SEED_LARGEST) if field.role == "seed" else (-_FAR, _FAR)
    smallest = field.minimum if field.minimum is not None else low
    if field.role == "seed":
        smallest = max(0, smallest)  # -1 asks for a random one; no engine sees it
    largest = field.maximum if field.maximum is not None else high
    yield _Probe(field, smallest, field.minimum is not None or field.role == "seed")
    yield _Probe(field, largest, field.maximum is not None or field.role == "seed")
    if field.type == "integer" and field.role != "seed" and largest > smallest:
        yield _Probe(field, int(field.minimum or 0) + 1, True)  # off every step that the smallest is on


def _try(model: Model, binder: Binder, request: dict[str, Any], nodes: Nodes | None) -> list[_Problem] | str:
    """What is wrong with the graph of this request, or why there is none."""
    files = {name: f"rushes/check/{name}.png" for name in model.files() if name in request}
    try:
        graph = binder.bind(request, roles_of(model, request), files)
    except (RushesError, ValueError) as error:
        return str(error)
    return list(_problems(graph, nodes))


def _problems(graph: Graph, nodes: Nodes | None) -> Iterator[_Problem]:
    for id_, class_type, name, value in plain_inputs(graph):
        spec = specs_of(nodes, class_type).get(name)
        if spec is None or loads_file(spec, class_type, name):
            continue
        if wrong := misfit(spec, name, value):
            weight = str(value) if wrong.kind == "choice" and is_weight(value) else None
            yield _Problem(id_, name, wrong, weight)
    for id_, class_type, name, link in links(graph):
        number = primitive(graph, link)
        spec = specs_of(nodes, class_type).get(name)
        if number is None or spec is None or spec.type not in ("INT", "FLOAT"):
            continue
        if wrong := misfit(spec, name, number):
            yield _Problem(id_, name, wrong, None)


def _own(graph: Graph, problem: _Problem) -> Value:
    """A problem of the graph itself, whatever a request says."""
    where = label(graph, problem.node, problem.name)
    if problem.misfit.kind == "step":
        return Value("warning", where, "step", _changed(problem.misfit), _STEP_FIX)
    kind = "missing_weights" if problem.weight else problem.misfit.kind
    fix = "mend the value in the graph, or the binding that sets it"
    return Value("error", where, kind, problem.misfit.text, fix, problem.weight)


def _of_field(graph: Graph, field: Input, probe: _Probe, problem: _Problem) -> Value:
    target = label(graph, problem.node, problem.name)
    text = f"{field.name} = {probe.value}: {target}: {problem.misfit.text}"
    if problem.misfit.kind == "step":
        text = f"{field.name} = {probe.value}: {target}: {_changed(problem.misfit)}"
        return Value("warning" if probe.declared else "note", field.name, "step", text, _STEP_FIX)
    if not probe.declared:
        fix = "set minimum and maximum, so that a request is refused with a message about the input"
        return Value("note", field.name, problem.misfit.kind, text, fix)
    fix = "change the input's bounds, enum or default, or the binding"
    kind = "missing_weights" if problem.weight else problem.misfit.kind
    return Value("error", field.name, kind, text, fix, problem.weight)


def _changed(wrong: Misfit) -> str:
    return f"{wrong.text}: the node changes it without a word, or fails"


_STEP_FIX: Final = "bind the next multiple with round_up(…) and crop back, or allow only values that fit"
