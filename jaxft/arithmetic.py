"""Arithmetic in a configuration: numbers, + - * / // % **, parentheses, and nothing else."""

import ast
import math
import operator
from collections.abc import Callable

Number = int | float

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: lambda base, exponent: _power(base, exponent),
}
_UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_MAX_LENGTH = 200
_MAX_BITS = 1024
"""Of the result of a power of whole numbers: as far as a float reaches."""


def evaluate(text: str) -> Number:
    """The value of an expression, with Python's meaning of each operator.

    Raises:
        ValueError: it holds anything else, or has no finite value.
    """
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"longer than {_MAX_LENGTH} characters")
    try:
        result = _value(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no arithmetic: {error.msg}") from None
    except (ArithmeticError, RecursionError) as error:
        raise ValueError(f"{text!r} has no value: {error}") from None
    if not math.isfinite(result):
        raise ValueError(f"{text!r} has no finite value")
    return result


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
    raise ValueError(
        f"{ast.unparse(node)!r} is not allowed: only numbers, + - * / // % ** and parentheses"
    )


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int):
        if abs(exponent) * math.log2(abs(base) or 1) > _MAX_BITS:
            raise ValueError(f"{base} ** {exponent} is too large")
    elif base < 0 and not float(exponent).is_integer():
        raise ValueError(f"{base} ** {exponent} is not a real number")
    return base**exponent
