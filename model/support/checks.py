"""Checks of single values that untrusted files hold, for tables of fields, types and ranges."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from model.support.cli import UserError, nearest


def one_of(name: str, value: Any, known: Sequence[Any]) -> Any:
    """`value`, or a UserError where it is none of `known`. Types count: JSON's 0 and 1 are neither true nor false."""
    if not any(type(value) is type(one) and value == one for one in known):
        names = [one for one in known if isinstance(one, str)]
        hint = nearest(value, names) if isinstance(value, str) else ""
        choices = ", ".join(one if isinstance(one, str) else json.dumps(one) for one in known)
        raise UserError(f"{name} is {value!r}, which is not covered{hint}; covered: {choices}")
    return value


def whole(name: str, value: Any, least: int, most: int) -> int:
    """`value`, or a UserError where it is no whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{name} is {value!r}; it must be a whole number from {least} to {most}")
    return value


def positive(name: str, value: Any) -> float:
    """`value` as a float, or a UserError where it is no finite number above 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{name} is {value!r}; it must be a number above 0")
    return float(value)


def inside(name: str, value: float, interval: str) -> None:
    """A UserError where `value` does not lie in an interval, "[0, 1)": a round bracket leaves its end out."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    if not (above and below):
        raise UserError(f"{name} is {value}; it must lie in {interval}")
