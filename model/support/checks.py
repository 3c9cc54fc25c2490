"""Validation of single values from untrusted files. Each function returns the value or raises UserError."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from model.support.cli import UserError, nearest


def one_of(name: str, value: Any, known: Sequence[Any]) -> Any:
    """Require one of `known`, of the same type too: JSON's 0 and 1 are not false and true."""
    if not any(type(value) is type(choice) and value == choice for choice in known):
        names = [choice for choice in known if isinstance(choice, str)]
        hint = nearest(value, names) if isinstance(value, str) else ""
        choices = ", ".join(choice if isinstance(choice, str) else json.dumps(choice) for choice in known)
        raise UserError(f"{name} is {value!r}, which is not supported{hint}; supported: {choices}")
    return value


def whole(name: str, value: Any, minimum: int, maximum: int) -> int:
    """Require an int (not a bool) from `minimum` to `maximum`."""
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise UserError(f"{name} is {value!r}; it must be a whole number from {minimum} to {maximum}")
    return value


def positive(name: str, value: Any) -> float:
    """Require a finite number above 0; returns it as a float."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise UserError(f"{name} is {value!r}; it must be a number above 0")
    return float(value)


def inside(name: str, value: float, interval: str) -> None:
    """Require a number in an interval such as "[0, 1)": "[" and "]" include the end, "(" and ")" exclude it."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    if not (above and below):
        raise UserError(f"{name} is {value}; it must lie in {interval}")
