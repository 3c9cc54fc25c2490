"""Memory and time of `python -m lora.merge` on a checkpoint of Mistral-7B's exact shapes.

Writes random bf16 weights in shards of 1 GB and an adapter on every linear layer, with some layers and with twice as
many, and merges each in a process of its own. What is in memory is a few pieces of one layer: the peak must be the
same for both, so it is that of all 32 layers.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from eval.bench.load_7b import alone, write
from eval.bench.seven_b import write_adapter

LIMIT = 2000.0  # MB


def rows(layers: int = 2, width: int = 4096, r: int = 64, folder: str | None = None) -> list[dict[str, Any]]:
    """Peak memory over the imports and merged GB a second, for `layers` decoder layers and for twice as many.

    A smaller `width` tries it out; `folder` is where there is room (default: the system's temporary folder).
    """
    made = []
    for count in (layers, 2 * layers):
        with tempfile.TemporaryDirectory(dir=folder, prefix="merge-") as scratch:
            size = write(Path(scratch) / "model", count, width, 10**9)
            write_adapter(Path(scratch) / "model", Path(scratch) / "adapter", r)
            shards = len(list((Path(scratch) / "model").glob("*.safetensors")))
            seconds, peak = alone(merged, Path(scratch))
        setting = f"{count} layers of {width}, {size / 1e9:.1f} GB of bf16 in {shards} files, r {r} on all layers"
        common = {"peer": None, "peer_name": None, "ratio": None, "setting": setting}
        made.append({"name": "merge: peak over the imports", "ours": peak / 1e6, "limit": LIMIT,
                     "share_of_limit": peak / 1e6 / LIMIT, "unit": "MB", **common})  # fmt: skip
        made.append({"name": "merge: read, summed, written", "ours": size / seconds / 1e9, "limit": None,
                     "share_of_limit": None, "unit": "GB/s", **common})  # fmt: skip
    return made


def merged(scratch: Path) -> tuple[float, float]:
    """(seconds, bytes that the peak rose) of the merge."""
    import torch

    from lora.merge import merge_folders

    with torch.device("meta"):  # what torch imports at its first meta module is not the merge's
        torch.nn.Linear(2, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    merge_folders(*(str(scratch / name) for name in ("model", "adapter", "out")))
    return time.perf_counter() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024.0
