"""What ComfyUI 0.3.64 says of a prompt before it runs: execution.py's validate_prompt, retold for the stub."""

from typing import Any

from support.comfyui_stub_nodes import Nodes

Problem = dict[str, Any]
Verdict = tuple[bool, Problem | None, list[str], dict[str, Any]]


def _problem(type_: str, message: str, details: str, **extra: Any) -> Problem:
    return {"type": type_, "message": message, "details": details, "extra_info": extra}


def validate_prompt(nodes: Nodes, prompt: dict[str, Any]) -> Verdict:
    """(valid, error, outputs to run, node_errors). One good output makes a prompt valid."""
    outputs = set()
    for id_, node in prompt.items():
        if "class_type" not in node:
            what = "Cannot execute because a node is missing the class_type property."
            return False, _problem("invalid_prompt", what, f"Node ID '#{id_}'"), [], {}
        if node["class_type"] not in nodes:
            what = f"Cannot execute because node {node['class_type']} does not exist."
            return False, _problem("invalid_prompt", what, f"Node ID '#{id_}'"), [], {}
        if nodes[node["class_type"]].is_output:
            outputs.add(id_)
    if not outputs:
        return False, _problem("prompt_no_outputs", "Prompt has no outputs", ""), [], {}
    good: set[str] = set()
    reasons: list[Problem] = []
    errors: dict[str, Any] = {}
    validated: dict[str, tuple[bool, list[Problem]]] = {}
    for output in outputs:
        try:
            valid, why = _validate(nodes, prompt, output, validated)
        except Exception as error:
            extra = {"exception_type": type(error).__name__, "traceback": []}
            why = [
                _problem("exception_during_validation", "Exception when validating node", str(error), **extra)
            ]
            valid = False
            validated[output] = False, why
        if valid:
            good.add(output)
            continue
        reasons += why
        for id_, (node_valid, problems) in validated.items():
            if not node_valid and problems:
                entry = errors.setdefault(
                    id_,
                    {
                        "errors": problems,
                        "dependent_outputs": [],
                        "class_type": prompt[id_]["class_type"],
                    },
                )
                entry["dependent_outputs"].append(output)
    if not good:
        details = "\n".join(f"{reason['message']}: {reason['details']}" for reason in reasons)
        what = _problem("prompt_outputs_failed_validation", "Prompt outputs failed validation", details)
        return False, what, [], errors
    return True, None, list(good), errors


def _validate(
    nodes: Nodes, prompt: dict[str, Any], id_: str, validated: dict[str, tuple[bool, list[Problem]]]
) -> tuple[bool, list[Problem]]:
    if id_ in validated:
        return validated[id_]
    inputs = prompt[id_]["inputs"]
    node = nodes[prompt[id_]["class_type"]]
    problems: list[Problem] = []
    valid = True
    for name, (required, type_, extra) in node.inputs().items():
        if name not in inputs:
            if required:
                what = "Required input is missing"
                problems.append(_problem("required_input_missing", what, name, input_name=name))
            continue
        about = {"input_name": name, "input_config": [type_, extra]}
        if isinstance(inputs[name], list):
            problem, upstream = _check_link(nodes, prompt, inputs[name], name, type_, about, validated)
            valid = valid and upstream
        else:
            problem = _check_value(inputs, name, type_, extra, about, checked_later=name == node.checks)
        if problem is not None:
            problems.append(problem)
    if node.check is not None and isinstance(inputs.get(node.checks), str):
        objection = node.check(inputs[node.checks])
        if objection is not None:
            what = "Custom validation failed for node"
            details = f"{node.checks} - {objection}"
            problems.append(_problem("custom_validation_failed", what, details, input_name=node.checks))
    validated[id_] = valid and not problems, problems
    return validated[id_]


def _check_link(
    nodes: Nodes,
    prompt: dict[str, Any],
    link: list[Any],
    name: str,
    type_: Any,
    about: dict[str, Any],
    validated: dict[str, tuple[bool, list[Problem]]],
) -> tuple[Problem | None, bool]:
    """What is wrong with the link itself, and whether what it comes from is valid."""
    if len(link) != 2:
        what = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
        return _problem("bad_linked_input", what, name, **about, received_value=link), True
    from_, number = link
    received = nodes[prompt[from_]["class_type"]].info["output"][number]
    if received != type_ and not (isinstance(type_, str) and received in type_.split(",")):
        details = f"{name}, received_type({received}) mismatch input_type({type_})"
        what = "Return type mismatch between linked nodes"
        more = {"received_type": received, "linked_node": link}
        return _problem("return_type_mismatch", what, details, **about, **more), True
    try:
        return None, _validate(nodes, prompt, from_, validated)[0]
    except Exception as error:
        more = {
            "exception_message": str(error),
            "exception_type": type(error).__name__,
            "traceback": [],
            "linked_node": link,
        }
        what = "Exception when validating inner node"
        problem = _problem("exception_during_inner_validation", what, str(error), **about, **more)
        validated[from_] = False, [problem]
        return None, False


def _check_value(
    inputs: dict[str, Any],
    name: str,
    type_: Any,
    extra: dict[str, Any],
    about: dict[str, Any],
    *,
    checked_later: bool,
) -> Problem | None:
    """Convert the value in place, as ComfyUI does, then compare it with its bounds or its list."""
    value = inputs[name]
    try:
        if isinstance(value, dict) and "__value__" in value:
            value = value["__value__"]
        convert = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}.get(
            type_ if isinstance(type_, str) else ""
        )
        if convert is not None:
            value = convert(value)
        inputs[name] = value
    except (ValueError, TypeError) as error:
        what = f"Failed to convert an input value to a {type_} value"
        more = {"received_value": value, "exception_message": str(error)}
        return _problem("invalid_input_type", what, f"{name}, {value}, {error}", **about, **more)
    about = {**about, "received_value": value}
    if checked_later:
        return None
    if "min" in extra and value < extra["min"]:
        what = f"Value {value} smaller than min of {extra['min']}"
        return _problem("value_smaller_than_min", what, name, **about)
    if "max" in extra and value > extra["max"]:
        what = f"Value {value} bigger than max of {extra['max']}"
        return _problem("value_bigger_than_max", what, name, **about)
    if isinstance(type_, list) and value not in type_:
        options = str(type_)
        if len(type_) > 20:
            options = f"(list of length {len(type_)})"
            about["input_config"] = None
        details = f"{name}: '{value}' not in {options}"
        return _problem("value_not_in_list", "Value not in list", details, **about)
    return None
