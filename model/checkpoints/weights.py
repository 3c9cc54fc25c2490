"""Checkpoints on disk: what a path holds, streamed into a model, and written back as transformers reads it.

    open_checkpoint(path) → Checkpoint      names, shapes and reads under transformers' names, whatever the format
    config_dict(path)                       its config under config.json's keys
    load_weights(model, path, …)            one tensor in flight, cast on the way
    save_weights(state, config, path, …)    model.safetensors, or shards and their index

A path is a folder (Hugging Face safetensors, Mistral's native files, or one GGUF model, in parts or whole), a .gguf
file or a config.json. No pickle is opened: `python -m model.checkpoints.convert` turns .bin and .pth files into
safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.checkpoints.mistral import from_native, native_config
from model.checkpoints.safetensors import (
    DTYPES,
    Stored,
    in_memory,
    merge_disjoint,
    open_safetensors,
    write_safetensors,
)
from model.support.cli import UserError, nearest
from model.support.files import atomic_folder, read_json

PIECE = 8 * 2**20  # numbers that are read and cast at a time
LISTED = 100  # names in one message: a config of another model makes thousands
Keep = Callable[[str, Iterator[tuple[slice, Tensor]]], "nn.Module | None"]
MERGED = "merged.json"  # beside weights with adapters merged in: which ones (lora/origin.py)
# What a new checkpoint removes from an older folder: its weights and config, in any number of shards.
WEIGHTS = re.compile(
    r"(model|consolidated)([-.]\d+(-of-\d+)?)?\.safetensors(\.index\.json)?|(config|params|merged)\.json"
)
# Buffers that older files carry and that are computed, not learnt.
COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors that a path holds, under transformers' names, none of them read yet.

    `tensors[name].shape` and `.dtype` are the file's; `read(name)` gives the tensor in the file's own float dtype
    (fp32 out of quantized blocks), `read(name, rows=slice(a, b))` only those rows, for a rank's shard.
    """

    path: Path
    format: str
    tensors: dict[str, Stored]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        stored = self.tensors[name]
        if rows is not None:
            start, stop, step = rows.indices(stored.shape[0])
            if step != 1:
                raise ValueError("rows are a slice with step 1")
            rows = slice(start, max(start, stop))
        return stored.read(rows)

    def stream(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their values), a few megabytes at a time, in order."""
        shape = self.tensors[name].shape
        if not shape:
            yield slice(0, 1), self.read(name).reshape(1)
            return
        step = max(1, PIECE // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            yield rows, self.read(name, rows)


def find_format(path: str | os.PathLike[str]) -> tuple[str, Path]:
    """("safetensors" | "native" | "gguf", the folder or file), or a UserError that says what the path lacks."""
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        return "gguf", first_part(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a folder with a model's files")
    if not path.is_dir():
        raise UserError(f"{path}: not a model; give a folder with config.json and safetensors, or a .gguf file")
    if (path / "model.safetensors.index.json").exists() or (path / "model.safetensors").exists():
        return "safetensors", path
    if (path / "params.json").exists() and any(path.glob("consolidated*.safetensors")):
        return "native", path
    found = sorted({first_part(file) for file in path.glob("*.gguf")})
    if len(found) == 1:
        return "gguf", found[0]
    if found:
        raise UserError(f"{path}: holds {len(found)} GGUF models ({', '.join(f.name for f in found)}); name one")
    if (path / "adapter_config.json").exists() or (path / "lora.safetensors").exists():
        raise UserError(f"{path}: an adapter, not a model; give its base as the weights and this as the adapter")
    if any(path.glob("*.bin")) or any(path.glob("*.pth")):
        raise UserError(f"{path}: holds pickled weights; convert them: python -m model.checkpoints.convert {path} NEW")
    raise UserError(f"{path}: holds no weights (model.safetensors, consolidated.safetensors or a .gguf file)")


def first_part(file: Path) -> Path:
    """The first file of a GGUF model that is split (NAME-00002-of-00003.gguf), or the file itself."""
    found = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", file.name)
    return file.with_name(f"{found[1]}-00001-of-{found[2]}.gguf") if found else file


def config_dict(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The config under config.json's keys. A folder with a config.json and no weights, or the file itself, will do."""
    path = Path(path)
    if path.suffix == ".json" and not path.is_dir():
        raw = read_json(path)
        if not isinstance(raw, dict):
            raise UserError(f"{path}: not a JSON object")
        return native_config(raw) if path.name == "params.json" else raw
    try:
        kind, where = find_format(path)
    except UserError:
        if (path / "config.json").is_file():
            return config_dict(path / "config.json")
        raise
    if kind == "gguf":
        from model.checkpoints.gguf import gguf_config, open_gguf

        return gguf_config(open_gguf(where))
    return config_dict(where / ("params.json" if kind == "native" else "config.json"))


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open whatever format `path` holds. Raises UserError for files that are missing, corrupt or contradictory."""
    kind, where = find_format(path)
    if kind == "gguf":
        from model.checkpoints.gguf import from_gguf, gguf_config, open_gguf

        file = open_gguf(where)
        return Checkpoint(where, kind, from_gguf(file, gguf_config(file)))
    if kind == "native":
        tensors = _open_files(where, "consolidated", sorted(where.glob("consolidated*.safetensors")))
        return Checkpoint(where, kind, from_native(tensors, config_dict(where / "params.json")))
    return Checkpoint(where, kind, _open_files(where, "model", [where / "model.safetensors"]))


def fingerprint(path: str | os.PathLike[str]) -> str:
    """A name for the weights at `path`, whatever their format: a hash of every tensor's name, shape and first row in
    fp32. Cheap (no tensor is read whole), and another as soon as training has moved any first row."""
    checkpoint, digest = open_checkpoint(path), hashlib.sha256()
    for name, stored in sorted(checkpoint.tensors.items()):
        if not COMPUTED.fullmatch(name):
            first = checkpoint.read(name, slice(0, 1)) if stored.shape else checkpoint.read(name)
            digest.update(f"{name}{tuple(stored.shape)}".encode() + first.float().numpy().tobytes())
    return digest.hexdigest()


def _open_files(folder: Path, stem: str, files: list[Path]) -> dict[str, Stored]:
    """The tensors of these files, or of the shards that an index names; each name in exactly one place."""
    index = folder / f"{stem}.safetensors.index.json"
    listed = _read_index(index) if index.exists() else None
    if listed is not None:
        single, files = folder / f"{stem}.safetensors", [folder / file for file in sorted(set(listed.values()))]
        if single not in files and single.exists():
            raise UserError(
                f"{folder}: two models: {single.name}, and {files[0].name} … that {index.name} names; public readers "
                "take the one or the other, so remove the one that is not meant"
            )
    tensors = merge_disjoint((file, open_safetensors(file)) for file in files)
    if listed is not None:  # writers have listed tied heads and rotary buffers without writing them, and the other way
        for name, file in listed.items():
            if (name in tensors or not _is_optional(name)) and (name not in tensors or tensors[name].where != file):
                raise UserError(f"{index}: {name!r} is not in {file}")
        for name in tensors.keys() - listed.keys():
            if not _is_optional(name):
                raise UserError(f"{index}: lacks {name!r} of {tensors[name].where}")
    return tensors


def _is_optional(name: str) -> bool:
    """Whether a model may lack it: a tied head, or a buffer that is computed."""
    return name == "lm_head.weight" or COMPUTED.fullmatch(name) is not None


def _read_index(index: Path) -> dict[str, str]:
    """{tensor: file}, every file a plain name."""
    found = read_json(index, unique=True)
    listed = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index}: lacks weight_map, or it is empty; the index is corrupt")
    for name, file in listed.items():
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*\.safetensors", file):
            raise UserError(f"{index}: {name!r} points to {file!r}, which is not a safetensors file of this folder")
    return listed


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str] | Checkpoint,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    keep: Keep | None = None,
) -> None:
    """Give a model (built on meta or not) the checkpoint's weights, one tensor in flight, cast to `dtype` on the way.

    `keep(name, pieces)` may quantize a matrix as it is read: it gets the layer's name and its rows in order, a few
    megabytes at a time, and returns the module that replaces the layer, or None without reading.

    Resident memory grows by the model in `dtype` and at most the largest tensor besides. Raises UserError listing every
    missing and unexpected name and every shape that disagrees; warns of tensors that hold NaN or infinity, in the file
    or once they are in `dtype`.
    """
    wanted = dict(model.named_parameters())
    opened = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    checkpoint = select(opened, {name: tuple(p.shape) for name, p in wanted.items()})
    from tqdm import tqdm

    for name in tqdm(checkpoint.tensors, desc="loading", unit="tensor", disable=None, leave=False):
        path_of_layer, _, leaf = name.rpartition(".")
        layer, module = model.get_submodule(path_of_layer), None
        if keep is not None and leaf == "weight" and wanted[name].dim() == 2:
            module = keep(path_of_layer, _pieces(checkpoint, name))
        if module is None:
            tensor = _read_into(checkpoint, name, dtype, torch.device(device))
            setattr(layer, leaf, nn.Parameter(tensor, requires_grad=wanted[name].requires_grad))
            continue
        if isinstance(module, nn.Linear):
            module.bias = layer.bias  # type: ignore[assignment]
        model.set_submodule(path_of_layer, module)


def _pieces(checkpoint: Checkpoint, name: str) -> Iterator[tuple[slice, Tensor]]:
    """A tensor's rows in order, a few megabytes at a time; warns once of a tensor that is not finite."""
    finite = True
    for rows, piece in checkpoint.stream(name):
        finite = finite and _is_finite(piece)
        yield rows, piece
    if not finite:
        warnings.warn(f"{checkpoint.path}: {name} holds NaN or infinite numbers", stacklevel=4)


def _read_into(checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The whole tensor in `dtype`, cast piece by piece."""
    stored = checkpoint.tensors[name]
    tensor, overflow = torch.empty(stored.shape, dtype=dtype, device=device), 0
    for rows, piece in _pieces(checkpoint, name):
        part, lost = cast(piece, dtype)
        overflow += lost
        (tensor if stored.shape else tensor.view(1))[rows].copy_(part)
    if overflow:
        warnings.warn(f"{checkpoint.path}: {name} {overflow_of(overflow, dtype)}", stacklevel=4)
    return tensor


def cast(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """(x in `dtype`, how many of its finite numbers are not finite there)."""
    y = x.to(dtype)
    if y.dtype == x.dtype or _is_finite(y):
        return y, 0
    return y, int((x.isfinite() & ~y.isfinite()).sum())


def overflow_of(count: int, dtype: torch.dtype) -> str:
    return f"has {count} numbers beyond {str(dtype).removeprefix('torch.')}'s largest, {torch.finfo(dtype).max:g}"


def _is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite: the extremes suffice (NaN is both), in one pass without a copy."""
    if not tensor.numel():
        return True
    least, largest = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    return bool(least.isfinite() & largest.isfinite())


def select(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]], rows: slice | None = None) -> Checkpoint:
    """The checkpoint with exactly the tensors of a model whose parameters have these names and shapes.

    A tied one may hold its one matrix as the embedding, as the head, or as both if they are equal (`rows`: only these
    rows are compared, for a rank). Raises UserError listing every disagreement.
    """
    tensors = {name: stored for name, stored in checkpoint.tensors.items() if not COMPUTED.fullmatch(name)}
    head = tensors.pop("lm_head.weight", None) if "lm_head.weight" not in wanted else None
    both = head is not None and tensors.setdefault("model.embed_tokens.weight", head) is not head
    check_names(checkpoint, tensors, wanted)
    if both and not _is_tied(checkpoint, rows):
        raise UserError(
            f"{checkpoint.path}: config says tie_word_embeddings, but lm_head.weight is not the embedding; "
            "set tie_word_embeddings to false"
        )
    return replace(checkpoint, tensors=tensors)


def _is_tied(checkpoint: Checkpoint, rows: slice | None) -> bool:
    """Whether the output matrix is the embedding."""
    head, embedding = checkpoint.tensors["lm_head.weight"], checkpoint.tensors["model.embed_tokens.weight"]
    if head.shape != embedding.shape:
        return False
    pieces = checkpoint.stream("lm_head.weight") if rows is None else [(rows, checkpoint.read("lm_head.weight", rows))]
    return all(
        torch.equal(piece, checkpoint.read("model.embed_tokens.weight", part).to(piece.dtype)) for part, piece in pieces
    )


def check_names(checkpoint: Checkpoint, tensors: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what is there with what the config asks for; every disagreement goes into one UserError."""
    wrong = []
    for name in sorted(wanted.keys() - tensors.keys()):
        tied = " (tie_word_embeddings = true, if the model has no output matrix)" if name == "lm_head.weight" else ""
        wrong.append(f"missing {name}{tied}")
    for number, name in enumerate(sorted(tensors.keys() - wanted.keys())):
        wrong.append(f"unexpected {name}{nearest(name, list(wanted)) if number < LISTED else ''}")
    for name in sorted(wanted.keys() & tensors.keys()):
        stored = tensors[name]
        if stored.shape != wanted[name]:
            wrong.append(f"{name} has shape {list(stored.shape)}, but the config asks for {list(wanted[name])}")
        elif checkpoint.format != "gguf" and not DTYPES[stored.dtype].is_floating_point:
            wrong.append(f"{name} is {stored.dtype}, not floating point: quantized files are not covered")
    if len(wrong) > LISTED:
        wrong[LISTED:] = [f"and {len(wrong) - LISTED} more"]
    if wrong:
        raise UserError(f"{checkpoint.path}: the weights are not those of the config: " + "; ".join(wrong))


def save_weights(
    state: Mapping[str, Tensor], config: Mapping[str, Any], path: str | os.PathLike[str], max_shard_bytes: int
) -> None:
    """Write tensors and config.json as transformers loads them: model.safetensors, or shards and their index.

    The folder takes its name only when it is whole; a folder that was there keeps its other files (the tokenizer's)
    and loses its old weights. A shard holds at least one tensor, so one may be larger than `max_shard_bytes`.
    """
    checkpoint = Checkpoint(Path(path), "memory", {name: in_memory(tensor) for name, tensor in state.items()})
    with new_checkpoint(path) as folder:
        write_checkpoint(checkpoint, config, folder, max_shard_bytes, None)


def new_checkpoint(path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[Path]:
    """A folder to write a checkpoint and its tokenizer into, which then takes `path`'s place. An older one keeps its
    other files and loses its weights and config."""
    return atomic_folder(path, keep_others=True, drop=WEIGHTS)


def write_checkpoint(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    folder: Path,
    max_shard_bytes: int,
    dtype: torch.dtype | None,
    stem: str = "model",
    config_name: str = "config.json",
) -> None:
    """Stream a checkpoint into a folder, in `dtype` (None: as it is; quantized blocks become fp32).

    Raises UserError where finite numbers would become infinite in their new dtype.
    """
    plan = {
        name: (stored.shape, dtype or DTYPES.get(stored.dtype, torch.float32))
        for name, stored in checkpoint.tensors.items()
    }
    sizes = {name: math.prod(shape) * kind.itemsize for name, (shape, kind) in plan.items()}
    shards = split_shards(sizes, max_shard_bytes)

    def produce(name: str) -> Iterator[Tensor]:
        overflow, kind = 0, plan[name][1]
        for _, piece in checkpoint.stream(name):
            part, lost = cast(piece, kind)
            overflow += lost
            yield part
        if overflow:
            raise UserError(f"{checkpoint.path}: {name} {overflow_of(overflow, kind)}; write it in bfloat16 or float32")

    from tqdm import tqdm

    for number, names in enumerate(tqdm(shards, desc="writing", unit="shard", disable=None, leave=False), start=1):
        file = folder / _shard_name(stem, number, len(shards))
        write_safetensors(file, {name: plan[name] for name in names}, produce)
    if len(shards) > 1:
        places = {name: _shard_name(stem, n, len(shards)) for n, names in enumerate(shards, 1) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    named = dict(config)
    if config_name == "config.json":
        named["dtype"] = str(next(iter(plan.values()))[1]).removeprefix("torch.")
    (folder / config_name).write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")


def split_shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, in shards of at most `most` bytes (a larger tensor gets a shard of its own)."""
    if most < 1:
        raise UserError(f"max_shard_bytes is {most}; it must be at least 1")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _shard_name(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"
