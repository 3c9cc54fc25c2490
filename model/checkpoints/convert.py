"""Convert a checkpoint to safetensors or Mistral's native files, one tensor at a time.

    python -m model.checkpoints.convert SRC DST [--to safetensors|native] [--dtype …]

SRC may be anything that `Transformer.from_pretrained` loads (safetensors, Mistral's native files, GGUF), and also a
folder of `pytorch_model*.bin` (as BioMistral and ClinicalCamel are published), `consolidated.00.pth` with params.json
(Mistral's first files), an adapter's `adapter_model.bin`, or the first version of Qwen-7B (`c_attn`, `w1`, `w2`,
`qwen.tiktoken`). A .bin or .pth file is opened with `torch.load(weights_only=True, mmap=True)`, so no code in it runs
and only one tensor is in memory. DST appears once everything is written, including the tokenizer.
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
from model.checkpoints.safetensors import DTYPE_NAMES, PLAIN_NAME, Stored, in_memory, merge_disjoint, save_tensors
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
    """Dtype of the weights (as-is: the source's; float32 if the source is quantized)."""
    max_shard_gb: float = 5.0
    """Largest size of a file of weights, in GiB (2**30 bytes)."""
    overwrite: bool = False
    """Replace an existing model; the folder's other files stay."""


def main(options: Options) -> None:
    source, target = Path(options.source), Path(options.target)
    with output(target, options.overwrite, source):
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
    """Copy `source`'s tokenizer into `folder`, which will be renamed to `target`. A missing or unreadable tokenizer is
    reported on stderr and is not an error."""
    try:
        if (Path(source) / "qwen.tiktoken").is_file():
            open_qwen(Path(source)).save(folder)
        else:
            copy_tokenizer(source, folder)
        Tokenizer.from_pretrained(folder)  # check the copied files
    except UserError as error:
        message = str(error).replace(str(folder), str(target))
        print(f"without a tokenizer that can be read: {message}", file=sys.stderr)


def convert_adapter(source: Path, target: Path) -> None:
    """Convert adapter_model.bin to adapter_model.safetensors and copy adapter_config.json."""
    tensors = {name: stored.read(None) for name, stored in open_bins(source, [source / "adapter_model.bin"]).items()}
    if not (source / "adapter_config.json").is_file():
        raise UserError(f"{source}: lacks adapter_config.json, which belongs to adapter_model.bin")
    with atomic_folder(target, keep_others=True) as folder:
        save_tensors(folder / "adapter_model.safetensors", tensors)
        shutil.copyfile(source / "adapter_config.json", folder / "adapter_config.json")
    print(f"{target}: {len(tensors)} tensors of an adapter")


def open_any(source: Path) -> tuple[Checkpoint, ModelConfig]:
    """Open any source of main(); tensors are under transformers' names and checked against the config."""
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
    """Open a checkpoint that can be loaded, or else .bin or .pth files."""
    try:
        find_format(source)
    except UserError:
        bins = sorted(file for file in source.glob("*.bin") if re.fullmatch(BINS, file.name))
        native = sorted(source.glob("consolidated*.pth"))
        if len(native) > 1:
            raise UserError(
                f"{source}: tensor-parallel shards for {len(native)} devices (consolidated.*.pth) are not supported; "
                "give the model in Hugging Face's files"
            ) from None
        if bins:
            return Checkpoint(source, "bin", open_bins(source, bins))
        if native:
            tensors = from_native(open_bins(source, native), config_dict(source / "params.json"))
            return Checkpoint(source, "pth", tensors)
        raise
    return open_checkpoint(source)


def open_bins(folder: Path, files: list[Path]) -> dict[str, Stored]:
    """The tensors of .bin or .pth files, memory-mapped. Raises UserError for a corrupt file, or one with objects other
    than tensors (unpickling them could run code)."""
    index = folder / "pytorch_model.bin.index.json"
    listed = read_json(index) if index.is_file() else {}
    places = listed.get("weight_map") if isinstance(listed, dict) else None
    names = {str(name) for name in places.values()} if isinstance(places, dict) else set()
    if missing := sorted(names - {file.name for file in files}):
        raise UserError(f"{folder}: lacks {', '.join(missing)}, which its index names")
    return merge_disjoint((file, _open_bin(file)) for file in files)


def _open_bin(file: Path) -> dict[str, Stored]:
    """The tensors of one .bin file. Raises UserError for bad names and for anything but dense tensors."""
    tensors: dict[str, Stored] = {}
    for name, tensor in _load_bin(file).items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{file}: holds {type(tensor).__name__} {name!r} where a weight should be")
        if not PLAIN_NAME.fullmatch(name):
            raise UserError(f"{file}: {name!r} is not a tensor's name (letters, digits, _ and - between dots)")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
            raise UserError(f"{file}: {name!r} is not a dense weight ({kind})")
        tensors[name] = replace(in_memory(tensor), where=file.name)
    return tensors


def _load_bin(file: Path) -> Mapping[str, Any]:
    check_regular(file)
    _check_archive(file)
    try:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch before 1.6 cannot be mapped
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file}: holds objects other than tensors; reading them could run code") from error
    except PermissionError:
        raise
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(f"{file}: not a file of weights, or corrupt; download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds a {type(found).__name__}, not a dictionary of weights")
    return found


def _check_archive(file: Path) -> None:
    """Raises UserError unless the zip archive's members are stored uncompressed, as torch writes them.

    torch.load does not check: mapping a compressed member gives garbage, and unpacking one may fill the memory.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError):  # a file of torch before 1.6, or corrupt
        return
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
        raise UserError(f"{file}: archive members are compressed or encrypted; torch writes neither")
    if len({member.filename for member in members}) != len(members):
        raise UserError(f"{file}: two archive members have the same name; the file is corrupt")


if __name__ == "__main__":
    run(main, Options)
