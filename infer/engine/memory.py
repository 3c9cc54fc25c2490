"""The best way to run a job within a memory: format, batch, cache and chunk, chosen before loading.

    --memory 6GB      →  plan for 6.0 GB: int4-64, batch 8, cache float16, chunks of 512: weights 4.36 + cache 0.39 + …

The bytes are those of lora/memory.py. Ways are tried from the best answers to the least memory: wide weights before
quantized ones, and with each, a full batch before a smaller one. A plan is a function of its arguments alone, so that a
job that goes on after a kill goes on with the same one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora.memory import Requests, adapter_bytes, inference, weight_bytes
from model import ModelConfig
from model.support.cli import UserError

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
FORMATS = ("wide", "int8", "int4-32", "int4-64", "int4-128")  # from the best answers to the least memory


@dataclass(frozen=True)
class Plan:
    """How to run, and the bytes that it takes."""

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
    """The best plan within `budget` bytes; `form` "auto" tries every format. Raises UserError where none fits."""
    config = ModelConfig.from_pretrained(weights)
    least = None
    for chosen in FORMATS if form == "auto" else (form,):
        fixed = {"weights": weight_bytes(config, chosen, dtype), "adapter": adapter_bytes(config, adapters, chosen)}
        for cache in dict.fromkeys((dtype, torch.float16 if dtype.itemsize > 2 else dtype)):
            batch = job.batch
            while batch:
                for chunk in (2048, 512, 256):
                    parts = fixed | inference(config, job, batch, cache, chunk, dtype, device, chosen)
                    plan = Plan(chosen, batch, cache, chunk, parts)
                    if plan.total <= budget:
                        return plan
                    least = plan if least is None or plan.total < least.total else least
                batch //= 2
    assert least is not None
    raise UserError(
        f"{weights}: --memory {budget / 1e9:.2f} GB is not enough: the least is {least.total / 1e9:.2f} GB "
        f"({least.form}, batch {least.batch}, {job.tokens} tokens a prompt); give more memory, a smaller model"
        f"{' or --format auto' if form != 'auto' else ''}"
    )


def notes_at_once(
    weights: str | Path,
    adapters: Sequence[str | Path],
    free: float,
    job: Requests,
    form: str,
    dtype: torch.dtype,
    device: str = "cpu",
    ranks: int = 1,
) -> int:
    """The most requests at once, of `job.batch` or half as many, and so on, for which `free` bytes are enough, beside a
    model of which each of `ranks` processes holds a part. Raises UserError where a GPU has no room for one."""
    config = ModelConfig.from_pretrained(weights)
    fixed = weight_bytes(config, form, dtype) + adapter_bytes(config, adapters, form)
    batch = job.batch
    while True:
        need = (fixed + sum(inference(config, job, batch, dtype, 2048, dtype, device, form).values())) / ranks
        if need <= free or (batch == 1 and device == "cpu"):  # a CPU's memory can be given back by others
            return batch
        if batch == 1:
            raise UserError(
                f"{weights}: {need / 1e9:.1f} GB are needed for one note, {free / 1e9:.1f} GB of the GPU are free; "
                "give --format int8 or int4, or --memory"
            )
        batch //= 2
