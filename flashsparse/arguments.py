"""Checks of values that callers pass in: whole numbers and token ids, whatever integer type they come in.

True is no number here, and neither is 3.0: both are usually mistakes. Every refusal is a UsageError naming the value.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from flashsparse.errors import UsageError


def integer(value: Any) -> int | None:
    """`value` as an int when it is one (numpy's included), else None."""
    if type(value).__name__ in ("bool", "bool_"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int in least..most. Raises UsageError that states the range."""
    number = integer(value)
    if number is None or number < least or (most is not None and number > most):
        expected = f"{least} or more" if most is None else f"{least} to {most}"
        raise UsageError(f"{name} is {shown(value)}, expected a whole number, {expected}")
    return number


def token_ids(values: Sequence[Any], vocabulary: int) -> list[int]:
    """Token ids as ints. Raises UsageError for anything that is no id of the vocabulary."""
    if isinstance(values, str | bytes | bytearray | memoryview):
        raise UsageError(f"{type(values).__name__} where token ids are expected: give a list of integers")
    try:
        ids = list(values)
    except TypeError:
        raise UsageError(f"{shown(values)} is neither text nor a list of token ids") from None
    for position, value in enumerate(ids):
        number = integer(value)
        if number is None:
            raise UsageError(f"token {position} is {shown(value)}, expected an integer")
        if not 0 <= number < vocabulary:
            raise UsageError(f"token {shown(number)} lies outside the vocabulary of {vocabulary}")
        ids[position] = number
    return ids


def shown(value: Any) -> str:
    """The value on one short line."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = f"a number of type {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
