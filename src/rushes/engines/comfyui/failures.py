"""What ComfyUI says of a failure, in words for the person who sent the request. Pure.

ComfyUI's answers name files of the server, whole tracebacks and all inputs of a node; none of that is the
sender's business. The caller writes the full answer to the operator's log. Shapes: ``validate_prompt`` and
``PromptExecutor.handle_execution_error`` of ComfyUI's execution.py.

Codes: ``workflow_refused``, ``value_refused``, ``weights_missing``, ``node_missing``, ``node_failed``,
``out_of_memory``, ``comfyui_lost``. They are stable: clients branch on them.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

from rushes.catalog.workflow import Graph
from rushes.engines.comfyui.patch import is_added_lora
from rushes.errors import EngineError

Targets = Mapping[str, tuple[tuple[str, str], ...]]
"""Public fields, each with the (node id, input name) that it drives."""
_Problem = tuple[str, str, str | None, str | None]
"""Its code, its sentence, the label of its node, the public field at fault."""
Outcome = Literal["success", "error", "interrupted", "unknown"]

_LONGEST: Final = 400
"""Characters of ComfyUI's own words in one message."""
_READ: Final = 3000
"""Characters of them that are read from either end."""
_SHOWN: Final = 3
"""Problems that one message lists."""
_CODES: Final = ("node_missing", "weights_missing", "value_refused", "workflow_refused")
"""The first of these that occurs is the failure: what only the operator can mend stands before what the sender
can, as it fails whatever is sent."""
"""What a proxy answers while the ComfyUI behind it is away."""
_WEIGHTS: Final = re.compile(r"\.(safetensors|sft|ckpt|pth?|bin|gguf|onnx|engine|pkl|msgpack)$", re.IGNORECASE)
_MISSING_CLASS: Final = re.compile(r"node '?([^']+?)'? (?:does not exist|not found)", re.IGNORECASE)
_OUT_OF_MEMORY: Final = re.compile(
    r"(cuda|hip|mps|xpu|npu|rocm|gpu)\b[^\n]{0,40}\bout of memory|allocation on device"
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
    r"|you ran out of memory on your GPU",
    re.IGNORECASE,
)
_TIPS: Final = re.compile(r"This error means you ran out of memory on your GPU\..*", re.DOTALL)

# -- scrubbing ------------------------------------------------------------------------------------------
_TRACEBACK: Final = re.compile(
    r"Traceback \(most recent call last\):[^\n]*\n(?:[ \t][^\n]*\n|[ \t]*\n)*", re.MULTILINE
)
_FRAME: Final = re.compile(r'^[ \t]*File "[^"\n]*", line \d+[^\n]*\n?(?:[ \t]+[^\n]*\n?)*', re.MULTILINE)
_QUOTED_PATH: Final = re.compile(
    r"""(?P<quote>['"`])(?P<path>(?:file://)?(?:/|~/|[A-Za-z]:[\\/]|\\\\)[^'"`\n]*)(?P=quote)"""
)
# Relative paths and the paths of addresses stay: what stands in front of their first slash tells them.
_BARE_PATH: Final = re.compile(
    r"""(?<![\w.:/\\~])(?:file://)?(?:~?(?:/[^\s/\\'"`:;,<>|()\[\]]+)+/"""
    r"""|[A-Za-z]:[\\/]+(?:[^\n'"`:;,<>|/\\]+[\\/]+)*|\\\\[^\s'"`:;,<>|]*\\)"""
    r"""(?P<name>[^\s/\\'"`:;,<>|()\[\]]*)"""
)


def scrubbed(text: str, longest: int = _LONGEST) -> str:
    """One readable line of at most ``longest`` characters: no traceback, no absolute path (its last part stays)."""
    if len(text) > 2 * _READ:  # the reason stands at the beginning, or behind a traceback at the end
        text = f"{text[:_READ]}\n{text[-_READ:]}"
    text = _FRAME.sub("", _TRACEBACK.sub("", text))
    text = _QUOTED_PATH.sub(_last_part_in_quotes, text)
    text = _BARE_PATH.sub(lambda found: found["name"], text)
    text = " ".join(text.encode("utf-8", "replace").decode().split())  # half surrogate pairs cannot be written
    if len(text) > longest:
        text = text[: longest - 1].rsplit(" ", 1)[0].rstrip(" ,;:") + "…"
    return text


def _last_part_in_quotes(found: re.Match[str]) -> str:
    name = _last_part(found["path"].rstrip("/\\"))
    return f"{found['quote']}{name}{found['quote']}" if name else found[0]


# -- refused before it began ----------------------------------------------------------------------------
def refused(status: int, body: Any, graph: Graph, targets: Targets) -> EngineError:
    """Why ComfyUI did not take a prompt: from its answer to POST /prompt, or to one that it took in part (200
    with node errors). ``body`` is the parsed JSON, or the text where it is none.
    """
    body = body if isinstance(body, Mapping) else {}
    error = body.get("error")
    error = error if isinstance(error, Mapping) else {"message": error} if isinstance(error, str) else {}
    problems = list(_problems(body.get("node_errors"), graph, targets))
    if not problems:
        problems = [_whole(status, error, graph)]
    code, _, node, field = min(problems, key=lambda one: _CODES.index(one[0]))
    texts = list(dict.fromkeys(text for of_code, text, *_ in problems if of_code == code))
    message = " ".join(texts[:_SHOWN]) + (f" … and {len(texts) - _SHOWN} more." if len(texts) > _SHOWN else "")
    return EngineError(code, message, node=node, field=field, began=False)


def _problems(node_errors: Any, graph: Graph, targets: Targets) -> Iterator[_Problem]:
    """Each problem."""
    if not isinstance(node_errors, Mapping):
        return
    for node_id, found in node_errors.items():
        if not isinstance(found, Mapping):
            continue
        for problem in found.get("errors") or ():
            if isinstance(problem, Mapping):
                class_type = found.get("class_type")
                code, text, field = _problem(problem, str(node_id), class_type, graph, targets)
                yield code, text, label(graph, str(node_id), class_type), field


def _problem(
    problem: Mapping[str, Any], node_id: str, class_type: Any, graph: Graph, targets: Targets
) -> tuple[str, str, str | None]:
    """Its code, its sentence, and the public field at fault."""
    extra = problem.get("extra_info")
    extra = extra if isinstance(extra, Mapping) else {}
    name = str(extra.get("input_name") or "")
    value = extra.get("received_value", graph.get(node_id, {}).get("inputs", {}).get(name))
    what = _words(problem, extra, name)
    title = _title(graph, node_id, class_type)
    if is_added_lora(graph.get(node_id)):
        if name == "lora_name":
            return "value_refused", f"loras: this server has no LoRA {scrubbed(str(value), 120)!r}.", "loras"
        return "value_refused", f"loras: {what}", "loras"
    fields = [field for field, driven in targets.items() if (node_id, name) in driven]
    if fields:
        return "value_refused", f"{', '.join(fields)}: {what}", fields[0]
    if _is_weights(problem, value):
        text = f"The file {_last_part(str(value))!r} is missing on the ComfyUI server"
        advice = "The operator finds where to get it with `rushes models check`."
        return "weights_missing", f"{text} (node {title!r}, input {name}). {advice}", None
    place = f"node {title!r}, input {name}" if name else f"node {title!r}"
    return "workflow_refused", f"ComfyUI refuses the model's workflow at {place}: {what}", None


def _is_weights(problem: Mapping[str, Any], value: Any) -> bool:
    """Whether a node cannot find a file of weights: what a loader lists are the files that are there."""
    listed = problem.get("type") in ("value_not_in_list", "custom_validation_failed")
    return listed and isinstance(value, str) and _WEIGHTS.search(value) is not None


def _words(problem: Mapping[str, Any], extra: Mapping[str, Any], name: str) -> str:
    """One sentence: what is wrong with the value, and what would not be."""
    kind, value = problem.get("type"), extra.get("received_value")
    config = extra.get("input_config")
    bounds = config[1] if isinstance(config, list | tuple) and len(config) > 1 else {}
    bounds = bounds if isinstance(bounds, Mapping) else {}
    if kind == "value_bigger_than_max" and "max" in bounds:
        return f"{value} is too much. The most is {bounds['max']}."
    if kind == "value_smaller_than_min" and "min" in bounds:
        return f"{value} is too little. The least is {bounds['min']}."
    if kind == "value_not_in_list":
        choices = _choices(config)
        known = f" Use one of: {', '.join(choices)}." if choices else ""
        return f"{scrubbed(repr(value), 120)} is none of what can be chosen here.{known}"
    if kind == "required_input_missing":
        return "A value is needed."
    if kind == "invalid_input_type":
        wanted = config[0] if isinstance(config, list | tuple) and config and isinstance(config[0], str) else ""
        return f"{scrubbed(repr(value), 120)} cannot be used as {wanted or 'this value'}."
    said = scrubbed(str(problem.get("message") or kind or "it does not fit"))
    detail = scrubbed(str(problem.get("details") or ""))
    detail = detail.removeprefix(name).lstrip(" -:,") if name else detail
    if kind == "custom_validation_failed" and detail:
        return _sentence(detail)  # the node's own words; its message is the same for all
    return _sentence(f"{said}: {detail}" if detail else said)


def _choices(config: Any) -> list[str]:
    """The values of a combo, in its old form (a list) and its new one (``options``); none of a long list, and
    none that are files.
    """
    options = config[0] if isinstance(config, list | tuple) and config else ()
    if isinstance(options, str):
        more = config[1] if len(config) > 1 else {}
        options = more.get("options", ()) if isinstance(more, Mapping) else ()
    choices = [str(option) for option in options] if isinstance(options, list | tuple) else []
    return choices if len(choices) <= 20 and not any("." in choice for choice in choices) else []


def _whole(status: int, error: Mapping[str, Any], graph: Graph) -> _Problem:
    """A refusal that names no input."""
    said = f"{error.get('message') or ''}"
    missing = _MISSING_CLASS.search(said)
    if error.get("type") == "missing_node_type" or (error.get("type") == "invalid_prompt" and missing):
        extra = error.get("extra_info")
        extra = extra if isinstance(extra, Mapping) else {}
        named = re.search(r"#([^'\s]+)", str(error.get("details") or ""))
        node_id = str(extra.get("node_id") or (named[1] if named else ""))
        class_type = extra.get("class_type") or graph.get(node_id, {}).get("class_type")
        class_type = class_type or (missing[1] if missing else "?")
        text = (
            f"The model's workflow uses the node class {scrubbed(str(class_type), 120)!r}, which this ComfyUI does "
            "not have. The operator finds the node pack with `rushes models check`."
        )
        return "node_missing", text, label(graph, node_id, class_type) if node_id else None, None
    if status == 413:
        said = "the request is larger than the server takes"
    elif error.get("details") and error.get("type") != "prompt_outputs_failed_validation":
        said = f"{said}: {error['details']}" if error["details"] != said else said
    said = _sentence(scrubbed(said) or f"the server answered {status}")
    return "workflow_refused", f"ComfyUI refuses the model's workflow: {said}", None, None


def without_values(body: Any) -> dict[str, Any]:
    """ComfyUI's answer to a prompt that it refused, as it may be logged: which nodes and inputs, and what kind of
    fault. The values, which ``details`` repeat, may be what a user wrote.
    """
    shown: dict[str, Any] = {}
    body = body if isinstance(body, Mapping) else {}
    if isinstance(error := body.get("error"), Mapping):
        keys = ("type", "message") if body.get("node_errors") else ("type", "message", "details")
        shown["error"] = {key: scrubbed(str(error[key])) for key in keys if key in error}
    node_errors = body.get("node_errors")
    for node_id, found in node_errors.items() if isinstance(node_errors, Mapping) else ():
        if isinstance(found, Mapping):
            errors = [one for one in found.get("errors") or () if isinstance(one, Mapping)]
            shown[str(node_id)] = {
                "class_type": scrubbed(str(found.get("class_type"))),
                "errors": [_without_value(one) for one in errors],
            }
    return shown


def _without_value(problem: Mapping[str, Any]) -> dict[str, Any]:
    extra = problem.get("extra_info")
    name = extra.get("input_name") if isinstance(extra, Mapping) else None
    return {"type": str(problem.get("type")), "message": scrubbed(str(problem.get("message"))), "input": name}


# -- failed on the way ----------------------------------------------------------------------------------
def failed(message: Mapping[str, Any], graph: Graph) -> EngineError:
    """The error for an ``execution_error`` message, with an empty one for a failure of which nothing is known."""
    node_id, class_type = str(message.get("node_id") or ""), message.get("node_type")
    node = label(graph, node_id, class_type) if node_id else None
    where = f"in node {_title(graph, node_id, class_type)!r}" if node_id else "in ComfyUI"
    if is_out_of_memory(message):
        return EngineError(
            "out_of_memory",
            f"The machine ran out of memory {where}. Use a smaller size, or fewer frames.",
            node=node,
        )
    kind = str(message.get("exception_type") or "").rpartition(".")[2]
    said = scrubbed(_TIPS.sub("", str(message.get("exception_message") or "")))
    reason = ": ".join(part for part in (kind, said) if part)
    if not reason:
        return EngineError("node_failed", f"The generation failed {where}. ComfyUI gives no reason.", node=node)
    return EngineError("node_failed", _sentence(f"The generation failed {where}: {reason}"), node=node)


def is_out_of_memory(message: Mapping[str, Any]) -> bool:
    """Whether an ``execution_error`` message says that memory, of the GPU or the machine, was too small."""
    kind = str(message.get("exception_type") or "").rpartition(".")[2]
    if kind.endswith(("OutOfMemoryError", "MemoryError")):
        return True
    return _OUT_OF_MEMORY.search(str(message.get("exception_message") or "")) is not None


def outcome(entry: Mapping[str, Any]) -> tuple[Outcome, Mapping[str, Any]]:
    """How a prompt ended, by its entry in the history, and the message that says so (empty where none does).

    An interrupted prompt has the status of a failed one; only its message tells. ``unknown`` is a status that
    says neither. Older servers have no status: there outputs are the only sign of success.
    """
    status = entry.get("status")
    if not isinstance(status, Mapping):
        return ("success" if entry.get("outputs") else "unknown"), {}
    last: dict[str, Mapping[str, Any]] = {}
    for message in status.get("messages") or ():
        if isinstance(message, list | tuple) and message:
            data = message[1] if len(message) > 1 else None
            last[str(message[0])] = data if isinstance(data, Mapping) else {}
    if "execution_interrupted" in last:
        return "interrupted", last["execution_interrupted"]
    if status.get("status_str") == "error" or "execution_error" in last:
        return "error", last.get("execution_error", {})
    if status.get("status_str") == "success" and status.get("completed", True):
        return "success", last.get("execution_success", {})
    return "unknown", {}


# -- names ----------------------------------------------------------------------------------------------
def label(graph: Graph, node_id: str, class_type: Any = None) -> str:
    """A node for :attr:`EngineError.node`: ``57 KSamplerAdvanced (High noise)``."""
    node = _node(graph, node_id)
    class_type = str(class_type or node.get("class_type") or "")
    title = _title(graph, node_id, class_type)
    named = f" ({title})" if title not in (class_type, node_id) else ""
    return f"{node_id} {class_type}".strip() + named


def _title(graph: Graph, node_id: str, class_type: Any = None) -> str:
    node = _node(graph, node_id)
    title = (node.get("_meta") or {}).get("title")
    return scrubbed(str(title or class_type or node.get("class_type") or node_id), 80)


def _node(graph: Graph, node_id: str) -> Mapping[str, Any]:
    """The node, or the one of the graph that made it at run time (``12.0.3`` comes from ``12``)."""
    return graph.get(node_id) or graph.get(node_id.partition(".")[0]) or {}


def _last_part(name: str) -> str:
    return re.split(r"[/\\]", name)[-1]


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."
