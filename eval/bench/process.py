"""Measurements in a fresh process, so that peak memory is that of the measured work."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def own_process() -> ProcessPoolExecutor:
    """A fresh Python process that calls module-level functions, one after the other."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def in_own_process(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `work` (a module-level function) in a fresh Python process and return its result."""
    with own_process() as pool:
        return pool.submit(work, *args, **kwargs).result()


def resident(peak: bool = False) -> float:
    """Current or peak resident memory of this process in MB (Linux)."""
    field = "VmHWM:" if peak else "VmRSS:"
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) / 1e3 for line in status if line.startswith(field))
