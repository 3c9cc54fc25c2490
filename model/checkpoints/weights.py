"""Open checkpoints of any supported format, stream them into a model, and save them as transformers does.

    open_checkpoint(path) → Checkpoint      tensors under transformers' names, not read yet
    config_dict(path)                       the config under config.json's keys
    load_weights(model, path, …)            reads and casts one tensor at a time
    save_weights(state, config, path, …)    model.safetensors, or shards and their index

A path is a folder (Hugging Face safetensors, Mistral's native files, or one GGUF model, whole or split) or a .gguf
file. Pickles are not opened: `python -m model.checkpoints.convert` turns .bin and .pth files into safetensors.
"""

from __future__ import annotations

import contextlib
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

STREAM_NUMEL = 8 * 2**20  # numbers that are read and cast at a time
MAX_LISTED = 100  # tensor names in one error message; another model's config would list thousands
Replace = Callable[[str, Iterator[tuple[slice, Tensor]]], "nn.Module | None"]
MERGED = "merged.json"  # lists the adapters that are merged into the weights (lora/origin.py)
# Files of an older checkpoint that a new one in the same folder replaces.
WEIGHTS = re.compile(
    r"(model|consolidated)([-.]\d+(-of-\d+)?)?\.safetensors(\.index\.json)?|(config|params|merged)\.json"
)
# Rotary buffers that older files store; they are computed from the config.
COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint under transformers' names; each is read from disk on request.

    `tensors[name].shape` and `.dtype` are the file's. `read(name)` returns the tensor in the file's dtype (fp32 if it
    is quantized), `read(name, rows=slice(a, b))` only those rows, for a rank's shard.
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
        """Yields (rows, values) in order, a few megabytes at a time."""
        shape = self.tensors[name].shape
        if not shape:
            yield slice(0, 1), self.read(name).reshape(1)
            return
        step = max(1, STREAM_NUMEL // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            yield rows, self.read(name, rows)


def find_format(path: str | os.PathLike[str]) -> tuple[str, Path]:
    """("safetensors" | "native" | "gguf", the folder or .gguf file). Raises UserError if the path holds no weights."""
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
    """The first part of a split GGUF model (NAME-00002-of-00003.gguf → NAME-00001-of-…), or the file itself."""
    found = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", file.name)
    return file.with_name(f"{found[1]}-00001-of-{found[2]}.gguf") if found else file


def config_dict(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The config under config.json's keys. `path` may also be a config.json, or a folder with one and no weights."""
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
    """Open a checkpoint of any supported format. Raises UserError for missing, corrupt or contradictory files."""
    kind, where = find_format(path)
    if kind == "gguf":
        from model.checkpoints.gguf import from_gguf, gguf_config, open_gguf

        file = open_gguf(where)
        return Checkpoint(where, kind, from_gguf(file, gguf_config(file)))
    if kind == "native":
        tensors = _open_files(where, "consolidated", sorted(where.glob("consolidated*.safetensors")))
        return Checkpoint(where, kind, from_native(tensors, config_dict(where / "params.json")))
    return Checkpoint(where, kind, _open_files(where, "model", [where / "model.safetensors"]))


def _open_files(folder: Path, stem: str, files: list[Path]) -> dict[str, Stored]:
    """The tensors of the shards that the index lists, or of `files` if there is no index."""
    index = folder / f"{stem}.safetensors.index.json"
    listed = _read_index(index) if index.exists() else None
    if listed is not None:
        single, files = folder / f"{stem}.safetensors", [folder / file for file in sorted(set(listed.values()))]
        if single not in files and single.exists():
            raise UserError(
                f"{folder}: two models: {single.name}, and {files[0].name} … of {index.name}; programs differ in "
                "which they load, so remove one"
            )
    tensors = merge_disjoint((file, open_safetensors(file)) for file in files)
    if listed is not None:  # some writers list tied heads and rotary buffers that they do not write, or the reverse
        for name, file in listed.items():
            found = tensors.get(name)
            if found is None and _is_optional(name):
                continue
            if found is None or found.where != file:
                raise UserError(f"{index}: {name!r} is not in {file}")
        for name in tensors.keys() - listed.keys():
            if not _is_optional(name):
                raise UserError(f"{index}: lacks {name!r} of {tensors[name].where}")
    return tensors


def _is_optional(name: str) -> bool:
    """True for a tensor that a checkpoint may lack: a tied head or a rotary buffer."""
    return name == "lm_head.weight" or COMPUTED.fullmatch(name) is not None


def _read_index(index: Path) -> dict[str, str]:
    """The index's {tensor name: file name}; raises UserError for a file outside the folder."""
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
    replace_layer: Replace | None = None,
) -> None:
    """Load a checkpoint into a model (on meta or not), one tensor at a time, cast to `dtype`.

    `replace_layer(name, pieces)` may quantize a matrix while it is read: it gets the layer's name and an iterator of
    (rows, values) in order, and returns the module that replaces the layer, or None, without reading, to load the layer
    as it is.

    Peak memory is the model in `dtype` plus the largest tensor. Raises UserError listing every missing and unexpected
    name and every wrong shape; warns of NaN and infinite values, in the file or after the cast.
    """
    wanted = dict(model.named_parameters())
    opened = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    checkpoint = select(opened, {name: tuple(p.shape) for name, p in wanted.items()})
    from tqdm import tqdm

    for name in tqdm(checkpoint.tensors, desc="loading", unit="tensor", disable=None, leave=False):
        layer_name, _, leaf = name.rpartition(".")
        layer, module = model.get_submodule(layer_name), None
        if replace_layer is not None and leaf == "weight" and wanted[name].dim() == 2:
            module = replace_layer(layer_name, _pieces(checkpoint, name))
        if module is None:
            tensor = _read_into(checkpoint, name, dtype, torch.device(device))
            setattr(layer, leaf, nn.Parameter(tensor, requires_grad=wanted[name].requires_grad))
            continue
        if isinstance(module, nn.Linear):
            module.bias = layer.bias  # type: ignore[assignment]
        model.set_submodule(layer_name, module)


def _pieces(checkpoint: Checkpoint, name: str) -> Iterator[tuple[slice, Tensor]]:
    """Checkpoint.stream, with a warning at the end if the tensor holds NaN or infinite values."""
    finite = True
    for rows, piece in checkpoint.stream(name):
        finite = finite and _is_finite(piece)
        yield rows, piece
    if not finite:
        warnings.warn(f"{checkpoint.path}: {name} holds NaN or infinite numbers", stacklevel=4)


def _read_into(checkpoint: Checkpoint, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The whole tensor, read and cast to `dtype` piece by piece."""
    stored = checkpoint.tensors[name]
    tensor, overflow = torch.empty(stored.shape, dtype=dtype, device=device), 0
    for rows, piece in _pieces(checkpoint, name):
        part, lost = cast(piece, dtype)
        overflow += lost
        (tensor if stored.shape else tensor.view(1))[rows].copy_(part)
    if overflow:
        warnings.warn(f"{checkpoint.path}: {name} {overflow_message(overflow, dtype)}", stacklevel=4)
    return tensor


def cast(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """(x in `dtype`, number of its finite values that overflow)."""
    y = x.to(dtype)
    if y.dtype == x.dtype or _is_finite(y):
        return y, 0
    return y, int((x.isfinite() & ~y.isfinite()).sum())


def overflow_message(count: int, dtype: torch.dtype) -> str:
    return f"has {count} numbers beyond {str(dtype).removeprefix('torch.')}'s largest, {torch.finfo(dtype).max:g}"


def _is_finite(tensor: Tensor) -> bool:
    """True if all values are finite. aminmax takes one pass and no copy, and propagates NaN."""
    if not tensor.numel():
        return True
    smallest, largest = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    return bool(smallest.isfinite() & largest.isfinite())


def select(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]], rows: slice | None = None) -> Checkpoint:
    """The checkpoint with exactly the tensors `wanted` (a model's parameters: name → shape).

    A tied model's file may hold the matrix as the embedding, as the head, or as both if they are equal (`rows`: compare
    these rows only). Raises UserError listing every missing, unexpected or misshapen tensor.
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
    """True if lm_head.weight equals the embedding."""
    head, embedding = checkpoint.tensors["lm_head.weight"], checkpoint.tensors["model.embed_tokens.weight"]
    if head.shape != embedding.shape:
        return False
    pieces = checkpoint.stream("lm_head.weight") if rows is None else [(rows, checkpoint.read("lm_head.weight", rows))]
    return all(
        torch.equal(piece, checkpoint.read("model.embed_tokens.weight", part).to(piece.dtype)) for part, piece in pieces
    )


def check_names(checkpoint: Checkpoint, tensors: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises one UserError that lists every missing, unexpected, misshapen or quantized tensor."""
    wrong = []
    for name in sorted(wanted.keys() - tensors.keys()):
        tied = " (tie_word_embeddings = true, if the model has no output matrix)" if name == "lm_head.weight" else ""
        wrong.append(f"missing {name}{tied}")
    for number, name in enumerate(sorted(tensors.keys() - wanted.keys())):
        wrong.append(f"unexpected {name}{nearest(name, list(wanted)) if number < MAX_LISTED else ''}")
    for name in sorted(wanted.keys() & tensors.keys()):
        stored = tensors[name]
        if stored.shape != wanted[name]:
            wrong.append(f"{name} has shape {list(stored.shape)}, but the config asks for {list(wanted[name])}")
        elif checkpoint.format != "gguf" and not DTYPES[stored.dtype].is_floating_point:
            wrong.append(f"{name} is {stored.dtype}, not floating point: quantized files are not supported")
    if len(wrong) > MAX_LISTED:
        wrong[MAX_LISTED:] = [f"and {len(wrong) - MAX_LISTED} more"]
    if wrong:
        raise UserError(f"{checkpoint.path}: the weights are not those of the config: " + "; ".join(wrong))


def save_weights(
    state: Mapping[str, Tensor], config: Mapping[str, Any], path: str | os.PathLike[str], max_shard_bytes: int
) -> None:
    """Write tensors and config.json for transformers: model.safetensors, or shards and their index.

    The folder is replaced atomically; an existing one keeps its other files (the tokenizer's) and loses its old
    weights. A tensor larger than `max_shard_bytes` gets a shard of its own.
    """
    checkpoint = Checkpoint(Path(path), "memory", {name: in_memory(tensor) for name, tensor in state.items()})
    with new_checkpoint(path) as folder:
        write_checkpoint(checkpoint, config, folder, max_shard_bytes, None)


def new_checkpoint(path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[Path]:
    """Context with a temporary folder to write a checkpoint into, which then replaces `path`. An existing folder's
    weights and config are removed, its other files stay."""
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
    """Stream a checkpoint into a folder in `dtype` (None: the file's; quantized tensors become fp32).

    Raises UserError if finite values overflow in `dtype`.
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
            message = overflow_message(overflow, kind)
            raise UserError(f"{checkpoint.path}: {name} {message}; write it in bfloat16 or float32")

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
    """Names in order, split into shards of at most `most` bytes; a larger tensor gets a shard of its own."""
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
