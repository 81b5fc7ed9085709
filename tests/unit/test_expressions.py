"""Expressions of bindings: what they compute, what they refuse, and that nothing in them can cost much."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushes.catalog.expressions import FUNCTIONS, BadExpression, Evaluator, compile_expression

NAMES = ("prompt", "steps", "width", "shift")
FIELDS = ("57_steps", "mode", "a.b-c")
VALUES = {"prompt": "a fox", "steps": 7, "width": 540, "shift": 2.5}
INPUT = {"57_steps": 7, "mode": "fast", "a.b-c": True}


def value(text: str, **more: Any) -> Any:
    return Evaluator(VALUES | more, INPUT).value(compile_expression(text, (*NAMES, *more), FIELDS))


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        (7, "steps"),
        (3, "steps // 2"),
        (3.5, "steps / 2"),
        (1, "steps % 2"),
        (49, "steps ** 2"),
        (-7, "-steps"),
        (14, "steps + input['57_steps']"),
        (544, "round_up(width, 16)"),
        (528, "round_down(width, 16)"),
        (540, "round_up(540, 4)"),
        (2.5, "round_up(2.1, 0.5)"),
        (0.6, "round_down(0.6, 0.2)"),
        (0.3, "round_up(0.3, 0.1)"),
        (544.0, "round_up(540.0, 16)"),
        (5, "round_down(steps - 1, 4) + 1"),
        ((544 - 540) // 2, "(round_up(width, 16) - width) // 2"),
        (3, "ceil(shift)"),
        (2, "floor(shift)"),
        (2, "round(shift)"),
        (2.35, "round(2.346, 2)"),
        (2, "int(shift)"),
        (7.0, "float(steps)"),
        ("7", "str(steps)"),
        (2.5, "min(steps, shift, 9)"),
        (9, "max(steps, shift, 9)"),
        (7, "abs(-steps)"),
        ("a fox, at night", "prompt + ', at night'"),
        (4, "4 if input['mode'] == 'fast' else 20"),
        (20, "4 if steps > 8 or not input['a.b-c'] else 20"),
        (True, "1 < steps <= 7 and 'fox' in prompt"),
        (False, "'fox' not in prompt"),
        (20, "  20  "),
        ("x", "'x'"),
        (True, "True"),
    ],
)
def test_values(expected: Any, text: str) -> None:
    ours = value(text)

    assert (expected, type(expected)) == (ours, type(ours))


@given(st.integers(-10_000, 10_000), st.integers(1, 300))
def test_multiples(number: int, step: int) -> None:
    up, down = value("round_up(n, m)", n=number, m=step), value("round_down(n, m)", n=number, m=step)

    assert (0, 0) == (up % step, down % step)
    assert up - step < number <= up
    assert down <= number < down + step


def test_what_an_expression_uses_is_known() -> None:
    ours = compile_expression("max(steps, input['57_steps']) if input['mode'] == 'x' else width", NAMES, FIELDS)

    assert ({"steps", "width"}, {"57_steps", "mode"}) == (ours.names, ours.fields)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is no expression: "),
        ("steps +", "'steps +' is no expression: invalid syntax"),
        ("steps; width", "is no expression: "),
        ("a = 1", "is no expression: "),
        ("import os", "is no expression: "),
        ("\0", "is no expression: "),
        ("step", "there is no name step here; did you mean steps?"),
        ("zzz", "there is no name zzz here; known are prompt, steps, width, shift"),
        ("mode", "there is no name mode here; write input['mode'] for the public input"),
        ("input", "write input['the name of a public input']"),
        ("input['57_step']", "there is no public input '57_step'; did you mean 57_steps?"),
        ("input[prompt]", "brackets only stand behind input"),
        ("input[0]", "brackets only stand behind input"),
        ("input['mode':'x']", "brackets only stand behind input"),
        ("prompt[0]", "brackets only stand behind input"),
        ("round_up", "round_up is a function: write round_up(…)"),
        ("roundup(1, 2)", "there is no function roundup; did you mean round_up?"),
        ("eval('1')", "there is no function eval"),
        ("open('/etc/passwd')", "there is no function open"),
        ("__import__('os')", "there is no function __import__"),
        ("steps(1)", "there is no function steps"),
        ("int()", "int takes 1 value(s), not 0"),
        ("round(1, 2, 3)", "round takes 1 to 2 value(s), not 3"),
        ("min(1)", "min takes 2 to 16 value(s), not 1"),
        ("int(x=1)", "in their order"),
        ("max(*prompt)", "in their order"),
        ("prompt.upper()", "an attribute (a.b) cannot be called"),
        ("prompt.__class__", "an attribute (a.b) is not allowed"),
        ("(lambda: 1)()", "a lambda cannot be called"),
        ("lambda: 1", "a lambda is not allowed"),
        ("max(x for x in prompt)", "max takes 2 to 16"),
        ("[x for x in prompt]", "a loop is not allowed"),
        ("max(1, (x for x in prompt))", "a loop is not allowed"),
        ("f'{prompt:999999999}'", "an f-string (join texts with +) is not allowed"),
        ("[1, 2]", "a list is not allowed"),
        ("(1, 2)", "a list is not allowed"),
        ("{1: 2}", "a table is not allowed"),
        ("(y := 1)", "an assignment is not allowed"),
        ("1 << 9", "the operator LShift is not allowed"),
        ("~1", "the operator Invert is not allowed"),
        ("1 is 1", "the operator Is is not allowed"),
        ("None", "None is no number, text, True or False"),
        ("1j", "1j is no number"),
        ("b'x'", "b'x' is no number"),
        ("...", "Ellipsis is no number"),
        ("1" + "+1" * 600, "an expression has 1000 characters at most"),
        ("-" * 500 + "1", "nests 40 levels deep at most"),
        ("(" * 400 + "1" + ")" * 400, "is no expression: "),
    ],
)
def test_what_is_no_expression_is_named(text: str, problem: str) -> None:
    with pytest.raises(BadExpression) as caught:
        compile_expression(text, NAMES, FIELDS)

    assert problem in str(caught.value)
    assert 400 > len(str(caught.value))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("steps // 0", "division"),
        ("steps % 0", "modulo"),
        ("steps / (steps - 7)", "division by zero"),
        ("prompt - 1", "unsupported operand"),
        ("prompt + 1", ""),
        ("int(prompt)", "invalid literal"),
        ("round_up(steps, 0)", "it must be above 0"),
        ("round_up(prompt, 16)", "str is no number"),
        ("ceil(prompt)", "str is no number"),
        ("steps in steps", "not iterable"),
        ("1e308 * 10", "the value is inf"),
        ("2 ** 70", "more than 64 bits"),
        ("0 - 2 ** 63 - 1", "more than 64 bits"),
        ("(0 - 8) ** 0.5", "but complex"),
        # what would fill the memory or take for ever
        ("2 ** 10 ** 9", "the power is too large"),
        ("(10 ** 100) ** 100", "the power is too large"),
        ("(0 - 10 ** 100) ** 100", "the power is too large"),
        ("1e300 ** 1e300", "the power is too large"),
        ("prompt * 999999999", "str is no number"),
        ("999999999 * prompt", "str is no number"),
        ("'%999999999d' % 1", "str is no number"),
        ("round(10 ** 20, 0 - 10 ** 9)", "round keeps 20 digits at most"),
    ],
)
def test_what_has_no_value_is_named(text: str, problem: str) -> None:
    with pytest.raises(BadExpression) as caught:
        value(text)

    assert problem in str(caught.value)


def test_texts_stay_bounded() -> None:
    assert "a" * 60_000 == value("long", long="a" * 60_000)
    with pytest.raises(BadExpression, match="too long"):
        value("long + long", long="a" * 60_000)


ANY_TEXT = st.text(max_size=60) | st.lists(
    st.sampled_from(
        [*NAMES, *FUNCTIONS, "input['mode']", *"()+-*/%<>=.,[]1709 '", "**", "//", " if ", " else ", " not "]
    ),
    max_size=14,
).map("".join)


@given(ANY_TEXT)
def test_any_text_has_a_plain_value_or_a_clear_error(text: str) -> None:
    problem, found = "", None
    try:
        found = value(text)
    except BadExpression as error:
        problem = str(error)

    if problem:
        assert found is None
    else:
        assert isinstance(found, str | int | float)
        assert isinstance(found, str) or math.isfinite(found)
