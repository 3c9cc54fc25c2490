"""Token stores: records tokenised once, read from memory-mapped shards.

A store is a folder: `manifest.json` (what it was made from: hashes of sources and tokenizer, the encoding's options,
counts), `rejects.jsonl` (file, line and reason of each bad record), and for each shard `N.tokens.npy` (ids),
`N.texts.npy` (where each text of tokens ends), `N.records.npy` (where each record's texts end), `N.names.npy` (the
records' names in UTF-8, one behind the other) and `N.name_ends.npy`. All of them are memory-mapped.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from model.support.cli import UserError
from model.support.files import (
    atomic_folder,
    numbered_lines,
    parse_json_line,
    read_json,
    sha256_file,
    write_json,
    write_jsonl,
)
from train.data.records import Texts, document_texts, note_texts

SHARD = 20_000  # records a shard
REJECTS = 0.01  # more bad records than this share stop the run
ARRAYS = ("tokens", "texts", "records", "names", "name_ends")
OPEN = 180  # shards held open at once: each keeps five files open, and systems allow 1,024


@dataclass(frozen=True)
class Encoding:
    """How records become ids; part of a store's identity."""

    stage: str
    tokenizer: str
    template: str = "note-first"
    tasks: str = "both"
    append_eos: bool = True
    empty_kept: float = 1.0

    def encoder(self) -> Any:
        from model.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_pretrained(self.tokenizer)
        if self.stage == "pretrain":
            return document_texts(tokenizer)
        return note_texts(tokenizer, self.template, self.tasks, self.append_eos, self.empty_kept)


def build_store(
    files: Sequence[str],
    encoding: Encoding,
    out: str | Path,
    limit: int = 0,
    workers: int = 0,
    identity: dict[str, Any] | None = None,
) -> TokenStore:
    """Tokenise JSON-lines files into a store at `out`, unless a store of just these contents is there already.

    Records that cannot be used go to rejects.jsonl; more than 1 % of them raise a UserError that names the first, and
    so do more than half of those read so far: such a file is of the other stage, and need not be read to its end.
    `limit` takes the first so many records; `workers` processes share the work (0: as many as there are CPUs);
    `identity` is what identity_of gave (None: the files are hashed here).
    """
    out = Path(out)
    identity = identity or identity_of(files, encoding, limit)
    if (out / "manifest.json").is_file() and read_json(out / "manifest.json").get("identity") == identity:
        return TokenStore(out)
    with atomic_folder(out) as folder:
        shards, rejects = encode_shards(files, encoding, folder, limit, workers)
        records = sum(shard["records"] for shard in shards)
        check_rejects(rejects, records, out)
        write_jsonl(folder / "rejects.jsonl", rejects)
        counts = {
            "records": records,
            "tokens": sum(shard["tokens"] for shard in shards),
            "rejects": len(rejects),
        }
        write_json(folder / "manifest.json", {"identity": identity, "shards": shards, **counts})
    return TokenStore(out)


def identity_of(files: Sequence[str], encoding: Encoding, limit: int) -> dict[str, Any]:
    """What a store's contents are a function of. Raises UserError where a file is missing."""
    for file in files:
        if Path(file).is_dir():
            raise UserError(f"{file}: is a folder; give JSON lines")
        if not Path(file).is_file():
            raise UserError(f"{file}: no such file")
        if Path(file).suffix.lower() in (".csv", ".tsv"):
            raise UserError(f"{file}: is a table; make JSON lines of it: python -m train.importers.table")
    return {
        **asdict(encoding),
        "sources": {str(file): sha256_file(file) for file in files},
        "tokenizer": tokenizer_hash(encoding.tokenizer),
        "limit": limit,
    }


def tokenizer_hash(path: str) -> str:
    """The hash of a tokenizer's files (those of a model's folder that say how text becomes ids)."""
    folder = Path(path)
    names = sorted(file for file in folder.iterdir() if is_tokenizer_file(file)) if folder.is_dir() else [folder]
    if not names or not names[0].is_file():
        raise UserError(f"{path}: holds no tokenizer (tokenizer.json, tokenizer.model or a GGUF file)")
    return "-".join(sha256_file(file)[:16] for file in names)


def is_tokenizer_file(file: Path) -> bool:
    return file.name in ("tokenizer.json", "tokenizer_config.json") or ".model" in file.name or file.suffix == ".gguf"


def encode_shards(
    files: Sequence[str], encoding: Encoding, folder: Path, limit: int, workers: int
) -> tuple[list[dict[str, int]], list[dict[str, Any]]]:
    all_lines = ((str(file), number, line) for file in files for number, line in numbered_lines(file))
    lines = itertools.islice(all_lines, limit or None)
    chunks = enumerate(iter(lambda: list(itertools.islice(lines, SHARD)), []))
    first = list(itertools.islice(chunks, 2))
    encode, jobs = partial(encode_shard, encoding, folder), itertools.chain(first, chunks)
    if len(first) < 2 or workers == 1:  # one shard: another process would only cost its start
        return gathered(map(encode, jobs))
    with multiprocessing.get_context("spawn").Pool(workers or os.cpu_count()) as pool:
        return gathered(tqdm(pool.imap(encode, jobs), desc="tokenising", unit=" shards", disable=None))


def gathered(done: Iterable[tuple[dict[str, int], list[dict[str, Any]]]]) -> tuple[list[dict[str, int]], list[dict]]:
    """All shards and all rejects, or those up to where more than half of the records are rejects."""
    shards: list[dict[str, int]] = []
    rejects: list[dict[str, Any]] = []
    for shard, bad in done:
        shards.append(shard)
        rejects += bad
        if len(rejects) > sum(each["records"] for each in shards):
            break
    return shards, rejects


def encode_shard(
    encoding: Encoding, folder: Path, numbered: tuple[int, Sequence[tuple[str, int, bytes]]]
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Write a shard, given its number and lines (file, number, line): (its entry in the manifest, rejects)."""
    encode, (number, lines) = encoding.encoder(), numbered
    tokens: Texts = []
    text_ends, record_ends, names, rejects = [0], [0], [], []
    for file, line_number, line in lines:
        try:
            record = parse_json_line(file, line_number, line, ("id",))
            texts = encode(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # UserError is a ValueError
            reason = f"{type(error).__name__}: lacks {error}" if isinstance(error, KeyError) else str(error)
            rejects.append({"file": file, "line": line_number, "reason": reason})
            continue
        for text in texts:
            tokens.append(text)
            text_ends.append(text_ends[-1] + len(text))
        record_ends.append(record_ends[-1] + len(texts))
        names.append(str(record["id"]).encode("utf-8", "surrogatepass"))
    flat = np.concatenate(tokens) if tokens else np.zeros(0, np.int64)
    narrow = np.uint16 if len(flat) == 0 or flat.max() < 2**16 else np.uint32
    texts, records = np.asarray(text_ends), np.asarray(record_ends)
    joined, name_ends = np.asarray(bytearray(b"".join(names))), np.cumsum([0, *map(len, names)])
    arrays = (flat.astype(narrow), texts, records, joined, name_ends)
    for name, array in zip(ARRAYS, arrays, strict=True):
        np.save(folder / f"{number}.{name}.npy", array)
    return {"records": len(names), "tokens": len(flat), "largest": int(flat.max(initial=0))}, rejects


def check_rejects(rejects: list[dict[str, Any]], good: int, out: Path) -> None:
    if len(rejects) > REJECTS * (good + len(rejects)):
        listed = out.with_name(f"{out.name}-rejects.jsonl")
        write_jsonl(listed, rejects)
        worst = rejects[0]
        where = "" if worst["reason"].startswith(worst["file"]) else f"{worst['file']}:{worst['line']}: "
        raise UserError(
            f"{where}{worst['reason']}; {len(rejects)} of {good + len(rejects)} records read "
            f"cannot be used, more than 1 %: correct the file ({listed} lists them)"
        )


class TokenStore:
    """A store opened for reading. `store[i]` gives record i's (name, texts)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_json(self.path / "manifest.json")
        counts = [shard["records"] for shard in self.manifest["shards"]]
        self.first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.shard = lru_cache(OPEN)(self.open_shard)

    def __len__(self) -> int:
        return int(self.first[-1])

    def open_shard(self, number: int) -> tuple:
        try:
            return tuple(np.load(self.path / f"{number}.{name}.npy", mmap_mode="r") for name in ARRAYS)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{self.path}: shard {number} is corrupt; remove this folder and run again") from error

    def __getitem__(self, index: int) -> tuple[str, Texts]:
        number = int(np.searchsorted(self.first, index, side="right")) - 1
        tokens, texts, records, names, name_ends = self.shard(number)
        local = index - int(self.first[number])
        ends = texts[records[local] : records[local + 1] + 1]
        found = [np.asarray(tokens[a:b], dtype=np.int64) for a, b in itertools.pairwise(ends)]
        name = names[name_ends[local] : name_ends[local + 1]].tobytes()
        return name.decode("utf-8", "surrogatepass"), found

    def text_lengths(self) -> Iterator[list[int]]:
        """The lengths of each record's texts, one record after the other."""
        for number in range(len(self.manifest["shards"])):
            _, texts, records, _, _ = self.open_shard(number)
            sizes = np.diff(texts).tolist()
            for start, stop in itertools.pairwise(records.tolist()):
                yield sizes[start:stop]
