"""Quote the line of code that computes a value: for the tours (docs/tours/) and the trace page."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


def place(function: Callable[..., Any], fragment: str) -> dict[str, Any]:
    """The line of a function that contains `fragment`: {"file" (relative to ROOT), "line", "code"}.

    Raises LookupError unless exactly one line contains it, so that references cannot go stale.
    """
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    found = [number for number, line in enumerate(lines) if fragment in line]
    if len(found) != 1:
        raise LookupError(f"{function.__qualname__}: {len(found)} lines contain {fragment!r}; name exactly one")
    file = Path(inspect.getfile(function)).resolve().relative_to(ROOT)
    return {"file": file.as_posix(), "line": first + found[0], "code": lines[found[0]].strip()}


def show(function: Callable[..., Any], fragment: str, **values: Any) -> None:
    """Print a line of code with its file and line number, and `values` (of a tensor: shape and first numbers)."""
    at = place(function, fragment)
    print(f"\n{at['file']}:{at['line']}   {at['code']}")
    for name, value in values.items():
        print(f"    {name} = {summary(value) if isinstance(value, Tensor) else value}")


def summary(x: Tensor) -> str:
    """A tensor's shape and its first four numbers: "2 × 3: +0.1000 +0.2000 +0.3000 +0.4000 …"."""
    first = " ".join(f"{float(number):+.4f}" for number in x.detach().flatten()[:4])
    return f"{' × '.join(map(str, x.shape))}: {first}{' …' if x.numel() > 4 else ''}"


def check(what: str, by_hand: float, computed: float | Tensor, tolerance: float = 1e-12) -> None:
    """Print a number computed by hand beside the model's. Raises AssertionError if they differ by more than `tolerance`
    relative to the larger one (and by more than 1e-15)."""
    print(f"    by hand: {what} = {by_hand:.9g}; computed: {float(computed):.9g}")
    if not math.isclose(by_hand, float(computed), rel_tol=tolerance, abs_tol=1e-15):
        raise AssertionError(f"{what}: {by_hand!r} by hand, but {float(computed)!r} was computed")
