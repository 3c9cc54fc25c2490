"""Plans a job within a memory budget: chooses format, batch, cache dtype and chunk before the model is loaded.

    --memory 6GB      →  plan for 6.0 GB: int4-64, batch 8, cache float16, chunks of 512: weights 4.36 + cache 0.39 + …

lora/memory.py estimates the bytes. Plans are tried in order of preference: unquantized weights first, then with each
format a full batch before smaller ones. A plan depends on its arguments only, so a resumed job gets the same one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from lora.memory import Requests, adapter_bytes, inference, weight_bytes
from model import ModelConfig
from model.support.cli import UserError

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
FORMATS = ("wide", "int8", "int4-32", "int4-64", "int4-128")  # in order of preference, for --format auto
CHUNKS = (2048, 512, 256)  # tokens per step of a prefill


@dataclass(frozen=True)
class Plan:
    """Format, batch, cache dtype and chunk of a job, and the bytes of each part."""

    form: str
    batch: int
    cache: torch.dtype
    chunk: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def describe(self, budget: float) -> str:
        parts = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in self.parts.items())
        kind = str(self.cache).removeprefix("torch.")
        return (
            f"plan for {budget / 1e9:.1f} GB: {self.form}, batch {self.batch}, cache {kind}, chunks of {self.chunk}: "
            f"{parts} = {self.total / 1e9:.2f} GB"
        )


def read_size(text: str) -> float:
    """Bytes of "6GB", "5000 MB" or "4.5GiB". Raises UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found and UNITS.get(found.group(2).upper())
    if not found or not unit or float(found.group(1)) <= 0:
        raise UserError(f"--memory {text!r} is not a size; write a number and MB or GB, for example 6GB")
    return float(found.group(1)) * unit


def fit(
    weights: str | Path,
    adapters: Sequence[str | Path],
    budget: float,
    job: Requests,
    form: str,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Plan:
    """The preferred plan of at most `budget` bytes; `form` "auto" tries all formats. Raises UserError if none fits."""
    config = ModelConfig.from_pretrained(weights)
    tried = []
    for chosen in FORMATS if form == "auto" else (form,):
        fixed = {"weights": weight_bytes(config, chosen, dtype), "adapter": adapter_bytes(config, adapters, chosen)}
        caches = dict.fromkeys((dtype, torch.float16 if dtype.itemsize > 2 else dtype))
        for cache, batch, chunk in product(caches, halvings(job.batch), CHUNKS):
            parts = fixed | inference(config, job, batch, cache, chunk, dtype, device, chosen)
            plan = Plan(chosen, batch, cache, chunk, parts)
            if plan.total <= budget:
                return plan
            tried.append(plan)
    least = min(tried, key=lambda plan: plan.total)
    raise UserError(
        f"{weights}: --memory {budget / 1e9:.2f} GB is not enough: the least is {least.total / 1e9:.2f} GB "
        f"({least.form}, batch {least.batch}, {job.tokens} tokens a prompt); give more memory, a smaller model"
        f"{' or --format auto' if form != 'auto' else ''}"
    )


def halvings(batch: int) -> Iterator[int]:
    """batch, batch // 2, … 1."""
    while batch:
        yield batch
        batch //= 2


def notes_at_once(
    weights: str | Path,
    adapters: Sequence[str | Path],
    free: float,
    job: Requests,
    form: str,
    dtype: torch.dtype,
    device: str = "cpu",
) -> int:
    """Number of notes to answer at once: the largest of `job.batch`, half of it, … that fits into `free` bytes. Raises
    UserError if a GPU cannot hold one; on a CPU that gives 1, since other processes may free memory."""
    config = ModelConfig.from_pretrained(weights)
    fixed = weight_bytes(config, form, dtype) + adapter_bytes(config, adapters, form)
    need = 0.0
    for batch in halvings(job.batch):
        need = fixed + sum(inference(config, job, batch, dtype, CHUNKS[0], dtype, device, form).values())
        if need <= free:
            return batch
    if device == "cpu":
        return 1
    raise UserError(
        f"{weights}: one note needs {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB of the GPU are free; "
        "give --format int8 or int4, or --memory"
    )
