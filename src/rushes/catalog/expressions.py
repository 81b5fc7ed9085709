"""Expressions of bindings: small, pure, and bounded in what they cost.

``simpleeval`` evaluates them; nothing is ever given to Python's own `eval`. Of its language only arithmetic,
comparison, ``and``/``or``/``not``, ``a if c else b``, the functions of :data:`FUNCTIONS` and
``input['name']`` are let through: no attributes, loops, lambdas, f-strings, lists. What is wrong with an
expression is found when it is compiled, and so are the values that it needs.
"""

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NamedTuple

import simpleeval  # type: ignore[import-untyped]

from rushes.catalog.nearest import did_you_mean

LONGEST: Final = 1000
"""Characters of an expression."""
DEEPEST: Final = 40
"""Levels of brackets and operators in it."""
_INPUT: Final = "input"
_POWER_BITS: Final = 1024
_ROUND_DIGITS: Final = 20


class BadExpression(ValueError):
    """An expression that is none, uses what there is not, or has no value."""


def _number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise TypeError(f"{type(value).__name__} is no number")
    return value


def _floor(number: Any) -> Any:
    return math.floor(_number(number))


def _ceil(number: Any) -> Any:
    return math.ceil(_number(number))


def _round(number: Any, digits: Any = None) -> Any:
    if digits is not None and abs(_number(digits)) > _ROUND_DIGITS:
        raise ValueError(f"round keeps {_ROUND_DIGITS} digits at most")
    return round(_number(number), digits)


def _round_up(number: Any, step: Any) -> Any:
    """The smallest multiple of ``step`` that is not below ``number``."""
    return -_round_down(-_number(number), step)


def _round_down(number: Any, step: Any) -> Any:
    """The largest multiple of ``step`` that is not above ``number``."""
    if _number(step) <= 0:
        raise ValueError(f"a multiple of {step} was asked for; it must be above 0")
    number = _number(number)
    if isinstance(number, int) and isinstance(step, int):
        return number // step * step
    # 0.6 is three times 0.2, though not in binary.
    times = number / step
    whole = round(times) if math.isclose(times, round(times), rel_tol=1e-12) else math.floor(times)
    return float(f"{whole * step:.15g}")


def _int(value: Any) -> int:
    return int(value)


def _float(value: Any) -> float:
    return float(value)


def _str(value: Any) -> str:
    return str(value)


class _Function(NamedTuple):
    call: Callable[..., Any]
    fewest: int
    most: int


FUNCTIONS: Final[Mapping[str, _Function]] = {
    "round_up": _Function(_round_up, 2, 2),
    "round_down": _Function(_round_down, 2, 2),
    "ceil": _Function(_ceil, 1, 1),
    "floor": _Function(_floor, 1, 1),
    "round": _Function(_round, 1, 2),
    "int": _Function(_int, 1, 1),
    "float": _Function(_float, 1, 1),
    "str": _Function(_str, 1, 1),
    "min": _Function(min, 2, 16),
    "max": _Function(max, 2, 16),
    "abs": _Function(abs, 1, 1),
}
"""What an expression may call, with the number of arguments."""


def _numbers(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """``operation``, but not for texts: repeating and formatting them can fill any memory."""
    return lambda left, right: operation(_number(left), _number(right))


def _power(base: Any, exponent: Any) -> Any:
    _number(base), _number(exponent)
    if abs(exponent) > _POWER_BITS or abs(exponent) * max(1, int(abs(base))).bit_length() > _POWER_BITS:
        raise ValueError("the power is too large")
    return base**exponent


_OPERATORS: Final[dict[type[ast.AST], Callable[..., Any]]] = {
    ast.Add: simpleeval.safe_add,
    ast.Sub: operator.sub,
    ast.Mult: _numbers(operator.mul),
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: _numbers(operator.mod),
    ast.Pow: _power,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, container: item in container,
    ast.NotIn: lambda item, container: item not in container,  # codespell:ignore notin
}
_CALLS: Final = {name: function.call for name, function in FUNCTIONS.items()}
_STRUCTURE: Final = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp)
_QUIET: Final = (ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context)
"""Parts of the tree that are operators, which have no parts of their own."""


class Expression(NamedTuple):
    """A compiled expression. Safe to share between threads."""

    text: str
    tree: ast.expr
    names: frozenset[str]
    """The names in it, other than of functions."""
    fields: frozenset[str]
    """The names of public inputs in it, as ``input['name']``."""


def compile_expression(text: str, names: Collection[str], fields: Collection[str]) -> Expression:
    """Parse and check ``text``, which may use these ``names``, and these ``fields`` as ``input['field']``.

    Raises BadExpression with what is wrong and, for a name that is not known, the nearest one that is.
    """
    if len(text) > LONGEST:
        raise BadExpression(f"an expression has {LONGEST} characters at most")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        where = f" at character {error.offset}" if error.offset else ""
        raise BadExpression(f"{text[:60]!r} is no expression: {error.msg}{where}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise BadExpression(f"{text[:60]!r} is no expression: {error or type(error).__name__}") from None
    checker = _Checker(names, fields)
    checker.check(tree, 0)
    return Expression(text, tree, frozenset(checker.used), frozenset(checker.used_fields))


class _Checker:
    """Walks a tree; lets pass what :data:`_OPERATORS` and :data:`FUNCTIONS` know."""

    def __init__(self, names: Collection[str], fields: Collection[str]) -> None:
        self._names, self._fields = names, fields
        self.used: set[str] = set()
        self.used_fields: set[str] = set()

    def check(self, node: ast.AST, depth: int) -> None:
        if depth > DEEPEST:
            raise BadExpression(f"an expression nests {DEEPEST} levels deep at most")
        if isinstance(node, ast.Constant):
            if type(node.value) not in (int, float, str, bool):
                raise BadExpression(f"{node.value!r} is no number, text, True or False")
        elif isinstance(node, ast.Name):
            self._name(node.id)
        elif isinstance(node, ast.Subscript):
            self._field(node)
        elif isinstance(node, ast.Call):
            self._call(node, depth)
        elif isinstance(node, _STRUCTURE):
            for part in ast.iter_child_nodes(node):
                self.check(part, depth + 1)
        elif not isinstance(node, _QUIET):
            raise BadExpression(f"{_named(node)} is not allowed in an expression")
        elif not isinstance(node, ast.boolop | ast.expr_context) and type(node) not in _OPERATORS:
            raise BadExpression(f"the operator {type(node).__name__} is not allowed in an expression")

    def _name(self, name: str) -> None:
        if name in self._names:
            self.used.add(name)
            return
        if name == _INPUT:
            raise BadExpression("input stands alone: write input['the name of a public input']")
        if name in FUNCTIONS:
            raise BadExpression(f"{name} is a function: write {name}(…)")
        if name in self._fields:
            raise BadExpression(f"there is no name {name} here; write input[{name!r}] for the public input")
        raise BadExpression(f"there is no name {name} here; {did_you_mean(name, self._names)}")

    def _field(self, node: ast.Subscript) -> None:
        whole = isinstance(node.value, ast.Name) and node.value.id == _INPUT
        if not whole or not isinstance(node.slice, ast.Constant) or not isinstance(node.slice.value, str):
            raise BadExpression("brackets only stand behind input, with a public input's name in quotes")
        field = node.slice.value
        if field not in self._fields:
            raise BadExpression(f"there is no public input {field!r}; {did_you_mean(field, self._fields)}")
        self.used_fields.add(field)

    def _call(self, node: ast.Call, depth: int) -> None:
        if not isinstance(node.func, ast.Name):
            raise BadExpression(f"{_named(node.func)} cannot be called in an expression")
        name = node.func.id
        if name not in FUNCTIONS:
            raise BadExpression(f"there is no function {name}; {did_you_mean(name, FUNCTIONS)}")
        function, count = FUNCTIONS[name], len(node.args)
        if node.keywords or any(isinstance(argument, ast.Starred) for argument in node.args):
            raise BadExpression(f"{name} takes its values in their order, without names and stars")
        if not function.fewest <= count <= function.most:
            takes = " to ".join(map(str, sorted({function.fewest, function.most})))
            raise BadExpression(f"{name} takes {takes} value(s), not {count}")
        for argument in node.args:
            self.check(argument, depth + 1)


_KINDS: Final[dict[type[ast.AST], str]] = {
    ast.Attribute: "an attribute (a.b)",
    ast.Lambda: "a lambda",
    ast.ListComp: "a loop",
    ast.SetComp: "a loop",
    ast.DictComp: "a loop",
    ast.GeneratorExp: "a loop",
    ast.JoinedStr: "an f-string (join texts with +)",
    ast.List: "a list",
    ast.Tuple: "a list",
    ast.Set: "a set",
    ast.Dict: "a table",
    ast.NamedExpr: "an assignment",
    ast.Await: "await",
}


def _named(node: ast.AST) -> str:
    return _KINDS.get(type(node), type(node).__name__)


class Evaluator:
    """Evaluates compiled expressions over one set of values. For one thread."""

    def __init__(self, names: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
        self._engine = simpleeval.SimpleEval(
            operators=_OPERATORS, functions=_CALLS, names={**names, _INPUT: fields}
        )

    def value(self, expression: Expression) -> str | int | float | bool:
        """Raises BadExpression where there is no such value: a division by zero, a number out of bounds."""
        try:
            value = self._engine.eval(expression.text, expression.tree)
        except (ArithmeticError, ValueError, TypeError, simpleeval.InvalidExpression) as error:
            raise BadExpression(str(error) or type(error).__name__) from None
        if isinstance(value, float) and not math.isfinite(value):
            raise BadExpression(f"the value is {value}")
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise BadExpression("the value is a number of more than 64 bits")
        if not isinstance(value, str | int | float):
            raise BadExpression(f"the value is no number, text, True or False but {type(value).__name__}")
        return value
