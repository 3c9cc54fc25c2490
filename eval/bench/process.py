"""Measurements in a process of their own, so that a peak of memory belongs to what is measured."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def in_own_process(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `work` (a module's function) returns, called in a fresh Python process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args, **kwargs).result()


def resident(peak: bool = False) -> float:
    """This process's resident memory now, or at its peak, in MB (Linux)."""
    field = "VmHWM:" if peak else "VmRSS:"
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) / 1e3 for line in status if line.startswith(field))
