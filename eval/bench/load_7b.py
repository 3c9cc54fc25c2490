"""Loading a checkpoint of exactly Mistral-7B's shape: seconds against the disk's own read rate, and peak memory.

Writes 14.5 GB of random bf16 weights in shards of 5 GB, reads them once with nothing but the operating system, loads
them with `Transformer.from_pretrained`, each in a process of its own, and deletes them. The page cache is dropped
before each where the system lets us (then both are the disk's rate; else both are the cache's, and the row says so).
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from model.support.cli import UserError

SHAPE = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": 4096, "max_position_embeddings": 32768,
}  # fmt: skip


def rows(layers: int = 32, width: int = 4096, folder: str | None = None) -> list[dict[str, Any]]:
    """Load time as a share of the disk's read rate, and peak memory as a share of the weights' size.

    Fewer `layers` or a smaller `width` try the benchmark out; `folder` is where there is room (default: the system's
    temporary folder).
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="load-7b-") as scratch:
        path = Path(scratch) / "model"
        size = write(path, layers, width)
        dropped = drop_cache(path)
        disk = alone(read_all, path)
        drop_cache(path)
        seconds, peak = alone(load, path)
    source = "read from disk" if dropped else "read from the page cache"
    setting = f"{layers} layers of {width}, bf16, {size / 1e9:.1f} GB, {source}"
    return [
        {"name": "load", "ours": size / seconds / 1e9, "peer": size / disk / 1e9, "peer_name": "plain reads",
         "ratio": disk / seconds, "limit": size / disk / 1e9, "share_of_limit": disk / seconds, "unit": "GB/s",
         "setting": setting},
        {"name": "peak memory", "ours": peak / 1e9, "peer": size / 1e9, "peer_name": "the weights alone",
         "ratio": size / peak, "limit": size / 1e9, "share_of_limit": size / peak, "unit": "GB", "setting": setting},
    ]  # fmt: skip


def alone(work: Any, path: Path) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, path).result()


def write(path: Path, layers: int, width: int, shard: int = 5 * 10**9) -> int:
    """Write the checkpoint in shards of `shard` bytes, one tensor in memory at a time; returns its size in bytes."""
    import torch

    from model import ModelConfig, Transformer
    from model.checkpoints.safetensors import Stored
    from model.checkpoints.weights import Checkpoint, new_checkpoint, write_checkpoint

    heads = max(1, width // 128)
    smaller = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
               "num_key_value_heads": max(1, heads // 4), "intermediate_size": width * 7 // 2}  # fmt: skip
    config = ModelConfig.from_dict({**SHAPE, **smaller})
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}
    size = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    free = shutil.disk_usage(path.parent).free
    if free < size * 1.05:
        raise UserError(f"{path.parent}: {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB needed; name another --folder")
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)

    def stored(shape: tuple[int, ...]) -> Stored:
        def read(rows: slice | None) -> torch.Tensor:
            wanted = shape if rows is None else (rows.stop - rows.start, *shape[1:])
            count = torch.Size(wanted).numel()
            return noise.repeat(-(-count // noise.numel()))[:count].view(wanted)

        return Stored(shape, "BF16", "memory", read)

    checkpoint = Checkpoint(path, "memory", {name: stored(shape) for name, shape in shapes.items()})
    with new_checkpoint(path) as folder:
        write_checkpoint(checkpoint, config.to_dict(), folder, shard, None)
    return size


def drop_cache(path: Path) -> bool:
    """Ask the system to forget the files' pages. Returns whether it can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in path.glob("*.safetensors"):
        with open(file, "rb") as data:
            os.fsync(data.fileno())
            os.posix_fadvise(data.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def read_all(path: Path) -> float:
    """Seconds to read every byte into one buffer of 16 MB."""
    buffer = bytearray(2**24)
    start = time.perf_counter()
    for file in sorted(path.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as data:
            while data.readinto(buffer):
                pass
    return time.perf_counter() - start


def load(path: Path) -> tuple[float, float]:
    """(seconds, bytes that the peak rose) of loading the model in bf16."""
    import torch

    from model import Transformer

    with torch.device("meta"):  # what torch imports at its first meta module is not the loader's
        torch.nn.Linear(2, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    Transformer.from_pretrained(path, dtype=torch.bfloat16)
    seconds = time.perf_counter() - start
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024.0
