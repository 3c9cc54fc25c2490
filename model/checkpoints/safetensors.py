"""The safetensors format: the header is validated before any tensor is read; files are written tensor by tensor.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes. The
public reader accepts duplicate names and names such as `../../x`; here they are errors, and every offset is checked
against the file's size. Tensors are read into memory rather than mapped, so that peak memory is predictable.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from model.support.checks import one_of
from model.support.cli import UserError
from model.support.files import check_regular, parse_json

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the public reader's limit
PLAIN_NAME = re.compile(r"[A-Za-z0-9_\-|:]+(\.[A-Za-z0-9_\-|:]+)*")

assert sys.byteorder == "little", "the format is little-endian, and bytes are read into tensors unconverted"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: shape, the format's name for its dtype, the file's name, and a function that reads it.

    `read(None)` returns the whole tensor, `read(slice(a, b))` rows a to b of its first dimension.
    """

    shape: tuple[int, ...]
    dtype: str
    where: str
    read: Callable[[slice | None], Tensor]


def in_memory(tensor: Tensor) -> Stored:
    """A tensor in memory as a Stored."""

    def read(rows: slice | None) -> Tensor:
        return tensor if rows is None else tensor[rows]

    return Stored(tuple(tensor.shape), DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), "memory", read)


def merge_disjoint(parts: Iterable[tuple[Path, Mapping[str, Stored]]]) -> dict[str, Stored]:
    """The tensors of several files. Raises UserError for a name that is in two of them."""
    tensors: dict[str, Stored] = {}
    for file, found in parts:
        for name in found.keys() & tensors.keys():
            raise UserError(f"{file}: {name!r} is in {tensors[name].where} too; the checkpoint is corrupt")
        tensors |= found
    return tensors


def open_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of one file by name, not read yet. Raises UserError for a corrupt header."""
    check_regular(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > min(size, MAX_HEADER_BYTES):
            raise UserError(f"{path}: not a safetensors file, or truncated; download it again")
        raw = file.read(start - 8)
    header = parse_json(path, raw.decode("utf-8", errors="replace"), unique=True)
    if not isinstance(header, dict):
        raise UserError(f"{path}: the header is not a JSON object; the file is corrupt")
    header.pop("__metadata__", None)
    stored, offsets = {}, []
    for name, entry in header.items():
        shape, dtype, (begin, end) = _check_entry(f"{path}: {name!r}", name, entry)
        offsets.append((begin, end, name))
        stored[name] = Stored(shape, dtype, path.name, reader(path, DTYPES[dtype], shape, start + begin))
    previous_end = 0
    for begin, end, name in sorted(offsets):
        if begin != previous_end:
            raise UserError(f"{path}: {name!r} does not begin where the tensor before it ends; the header is corrupt")
        if start + end > size:
            raise UserError(f"{path}: {name!r} reaches past the end of the file; it is truncated")
        previous_end = end
    if start + previous_end != size:
        raise UserError(f"{path}: {size - start - previous_end} bytes after the last tensor; the file is corrupt")
    return stored


def _check_entry(where: str, name: str, entry: Any) -> tuple[tuple[int, ...], str, tuple[int, int]]:
    """A header entry as (shape, dtype, (begin, end)). Raises UserError if it is inconsistent."""
    if not PLAIN_NAME.fullmatch(name):
        raise UserError(f"{where} is not a tensor's name (letters, digits, _ and - between dots)")
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{where} lacks dtype, shape or data_offsets; the header is corrupt") from error
    one_of(f"{where}: dtype", dtype, list(DTYPES))
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise UserError(f"{where} has impossible shape or data_offsets; the header is corrupt")
    if math.prod(n or 1 for n in shape) >= 2**48:  # zeros count as 1: a tensor of no bytes may have huge dimensions
        raise UserError(f"{where} has the impossible shape {shape}; the header is corrupt")
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise UserError(f"{where} has {end - begin} bytes, which do not match shape {shape} in {dtype}")
    return tuple(shape), dtype, (begin, end)


def reader(path: Path, dtype: torch.dtype, shape: tuple[int, ...], begin: int) -> Callable[[slice | None], Tensor]:
    """A function that reads the tensor whose bytes begin at offset `begin`: all of it, or rows of dimension 0."""

    def read(rows: slice | None) -> Tensor:
        first, wanted = (0, shape) if rows is None else (rows.start, (rows.stop - rows.start, *shape[1:]))
        tensor = torch.empty(wanted, dtype=dtype)
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        with open(path, "rb", buffering=0) as file:
            file.seek(begin + first * row_bytes)
            fill(path, file, tensor)
        return tensor

    return read


def fill(path: Path, file: BinaryIO, tensor: Tensor) -> None:
    """Read the next bytes of a file into a contiguous tensor."""
    if not tensor.numel():
        return
    view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(view):  # one read returns at most 2 GiB
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{path}: ended while being read; it is truncated")
        done += count


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], produce: Callable[[str], Iterator[Tensor]]
) -> None:
    """Write a file. `tensors`: name → (shape, dtype).

    `produce(name)` yields the tensor's rows in order, in one piece or several, so that a checkpoint larger than memory
    can be converted.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (shape, dtype) in tensors.items():
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, (_, dtype) in tensors.items():
            for piece in produce(name):
                flat = piece.detach().to("cpu", dtype).contiguous().reshape(-1)
                if flat.numel():
                    file.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
            if file.tell() != 8 + len(raw) + header[name]["data_offsets"][1]:
                raise AssertionError(f"{name}: the pieces do not add up to its shape")
        file.flush()
        os.fsync(file.fileno())


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in memory to a file, larger dtypes first, so that each is aligned to its element size."""
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    plan = {name: (tuple(tensors[name].shape), tensors[name].dtype) for name in order}
    write_safetensors(path, plan, lambda name: iter([tensors[name]]))
