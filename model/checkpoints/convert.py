"""Between checkpoint formats, and out of pickles, one tensor at a time.

    python -m model.checkpoints.convert SRC DST [--to safetensors|native] [--dtype …]

SRC may be what `Transformer.from_pretrained` loads (safetensors, Mistral's native files, GGUF), a folder of
`pytorch_model*.bin` (BioMistral and ClinicalCamel are published so), `consolidated.00.pth` with params.json (Mistral's
first files), an adapter's `adapter_model.bin`, or Qwen-7B's first version (`c_attn`, `w1`, `w2`, `qwen.tiktoken`).
A .bin or .pth file is opened with `torch.load(weights_only=True, mmap=True)`: no code in it runs, and only the tensor
in hand is in memory. DST gets its name once all of it is written, the tokenizer too.
"""

from __future__ import annotations

import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from model.checkpoints.mistral import from_native, native_params, to_native
from model.checkpoints.qwen1 import from_qwen, qwen2_config
from model.checkpoints.safetensors import NAMES, PLAIN_NAME, Stored, in_memory, merge_disjoint, save_tensors
from model.checkpoints.weights import (
    MERGED,
    Checkpoint,
    config_dict,
    find_format,
    new_checkpoint,
    open_checkpoint,
    select,
    write_checkpoint,
)
from model.config import ModelConfig
from model.support.cli import UserError, run
from model.support.files import atomic_folder, check_regular, read_json
from model.support.lock import output
from model.text.tiktoken import open_qwen
from model.text.tokenizer import Tokenizer, copy_tokenizer
from model.transformer import Transformer

BINS = r"(pytorch_)?model.*\.bin"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    source: Annotated[str, tyro.conf.Positional]
    """The checkpoint: a folder, or a .gguf file."""
    target: Annotated[str, tyro.conf.Positional]
    """The folder to write."""
    to: Literal["safetensors", "native"] = "safetensors"
    """Hugging Face's files, or Mistral's own consolidated.safetensors and params.json."""
    dtype: Literal["as-is", "float32", "bfloat16", "float16"] = "as-is"
    """What to keep the weights in. Quantized blocks become float32 where nothing is asked for."""
    max_shard_gb: float = 5.0
    """The most a file of weights may hold, in gigabytes (2**30 bytes)."""
    overwrite: bool = False
    """Replace a model that is there; the folder's other files stay."""


def main(options: Options) -> None:
    source, target = Path(options.source), Path(options.target)
    if target.exists() and source.exists() and target.resolve() == source.resolve():
        raise UserError(f"{target}: source and target are the same; write the new files somewhere else")
    with output(target, options.overwrite):
        if (source / "adapter_model.bin").is_file():
            convert_adapter(source, target)
        else:
            convert(options, source, target)


def convert(options: Options, source: Path, target: Path) -> None:
    checkpoint, config = open_any(source)
    raw = config.to_dict()
    dtype, most = DTYPES.get(options.dtype), int(options.max_shard_gb * 2**30)
    with new_checkpoint(target) as folder:
        if options.to == "native":
            tensors = to_native(checkpoint.tensors, config.head_dim)
            written = replace(checkpoint, tensors=tensors)
            write_checkpoint(written, native_params(raw), folder, most, dtype, "consolidated", "params.json")
        else:
            write_checkpoint(checkpoint, raw, folder, most, dtype)
        if (source / MERGED).is_file():
            shutil.copyfile(source / MERGED, folder / MERGED)
        add_tokenizer(source, folder, target)
    print(f"{target}: {len(checkpoint.tensors)} tensors, {config.model_type}, from {checkpoint.format}")


def add_tokenizer(source: str | Path, folder: Path, target: str | Path) -> None:
    """Put `source`'s tokenizer beside the weights in `folder`, which will be called `target`. One that is missing or
    cannot be read is a line on stderr: the weights are whole without it."""
    try:
        if (Path(source) / "qwen.tiktoken").is_file():
            open_qwen(Path(source)).save(folder)
        else:
            copy_tokenizer(source, folder)
        Tokenizer.from_pretrained(folder)  # files are copied unread
    except UserError as error:
        message = str(error).replace(str(folder), str(target))
        print(f"without a tokenizer that can be read: {message}", file=sys.stderr)


def convert_adapter(source: Path, target: Path) -> None:
    """adapter_model.bin as adapter_model.safetensors, with the folder's other files as they are."""
    tensors = {name: stored.read(None) for name, stored in open_bins(source, [source / "adapter_model.bin"]).items()}
    if not (source / "adapter_config.json").is_file():
        raise UserError(f"{source}: lacks adapter_config.json, which belongs to adapter_model.bin")
    with atomic_folder(target, keep_others=True) as folder:
        save_tensors(folder / "adapter_model.safetensors", tensors)
        shutil.copyfile(source / "adapter_config.json", folder / "adapter_config.json")
    print(f"{target}: {len(tensors)} tensors of an adapter")


def open_any(source: Path) -> tuple[Checkpoint, ModelConfig]:
    """Any checkpoint's tensors under transformers' names, checked against its config as loading would."""
    if (source / "config.json").is_file() and config_dict(source).get("model_type") == "qwen":
        raw = config_dict(source)
        checkpoint, config = from_qwen(open_source(source), raw), ModelConfig.from_dict(qwen2_config(raw))
    else:
        checkpoint = open_source(source)
        config = ModelConfig.from_pretrained(source / "params.json" if checkpoint.format == "pth" else source)
    with torch.device("meta"):
        wanted = Transformer(config)
    return select(checkpoint, {name: tuple(p.shape) for name, p in wanted.named_parameters()}), config


def open_source(source: Path) -> Checkpoint:
    """What can be loaded, or else the tensors of pickled files."""
    try:
        find_format(source)
    except UserError:
        bins = sorted(file for file in source.glob("*.bin") if re.fullmatch(BINS, file.name))
        native = sorted(source.glob("consolidated*.pth"))
        if len(native) > 1:
            raise UserError(
                f"{source}: {len(native)} parts of matrices that were split over as many devices "
                "(consolidated.*.pth); give the model in Hugging Face's files"
            ) from None
        if bins:
            return Checkpoint(source, "bin", open_bins(source, bins))
        if native:
            tensors = from_native(open_bins(source, native), config_dict(source / "params.json"))
            return Checkpoint(source, "pth", tensors)
        raise
    return open_checkpoint(source)


def open_bins(folder: Path, files: list[Path]) -> dict[str, Stored]:
    """The tensors of .bin files, mapped and not read. Raises UserError where a file is corrupt or holds more than
    tensors (then reading it would run code)."""
    index = folder / "pytorch_model.bin.index.json"
    listed = read_json(index) if index.is_file() else {}
    places = listed.get("weight_map") if isinstance(listed, dict) else None
    names = {str(name) for name in places.values()} if isinstance(places, dict) else set()
    if missing := sorted(names - {file.name for file in files}):
        raise UserError(f"{folder}: lacks {', '.join(missing)}, which its index names")
    return merge_disjoint((file, _stored(file)) for file in files)


def _stored(file: Path) -> dict[str, Stored]:
    """The tensors of one .bin file, each checked."""
    tensors: dict[str, Stored] = {}
    for name, tensor in _load_bin(file).items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{file}: holds {type(tensor).__name__} {name!r} where a weight should be")
        if not PLAIN_NAME.fullmatch(name):
            raise UserError(f"{file}: {name!r} is not a tensor's name (letters, digits, _ and - between dots)")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in NAMES:
            raise UserError(f"{file}: {name!r} is of {tensor.dtype}, {tensor.layout}, {tensor.device}: no dense weight")
        tensors[name] = replace(in_memory(tensor), where=file.name)
    return tensors


def _load_bin(file: Path) -> Mapping[str, Any]:
    check_regular(file)
    _check_archive(file)
    try:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file}: holds more than tensors, so reading it could run code; it is refused") from error
    except PermissionError:
        raise
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(f"{file}: not a file of weights, or corrupt; download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds a {type(found).__name__}, not a dictionary of weights")
    return found


def _check_archive(file: Path) -> None:
    """A .bin is a zip archive of uncompressed members, so that a tensor can be mapped. A compressed one would be mapped
    as noise, or unpacked to any size; public readers do not check."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError):  # of torch before 1.6, or corrupt
        return
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
        raise UserError(f"{file}: its members are packed (compressed or encrypted); it is refused")
    if len({member.filename for member in members}) != len(members):
        raise UserError(f"{file}: holds two members of one name; the file is corrupt")


if __name__ == "__main__":
    run(main, Options)
