"""Token stores: records tokenised once, read from memory-mapped shards.

A store is a folder:

    manifest.json     identity (hashes of sources and tokenizer, the encoding's options) and counts
    rejects.jsonl     file, line and reason of each bad record
    N.tokens.npy      shard N: token ids of all texts, concatenated
    N.texts.npy       offsets of each text in tokens
    N.records.npy     offsets of each record in texts
    N.names.npy       record ids in UTF-8, concatenated
    N.name_ends.npy   offsets of each id in names

Arrays of offsets begin with 0, so entry i spans offsets[i]:offsets[i + 1].
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
    check_regular,
    numbered_lines,
    parse_json_line,
    read_json,
    sha256_file,
    write_json,
    write_jsonl,
)
from train.data.records import Texts, document_texts, note_texts

SHARD_RECORDS = 20_000
OPEN_SHARDS = 180  # each keeps five files open; the usual limit is 1,024 per process
MAX_REJECTED = 0.01  # a larger share of bad records stops the run
ARRAYS = ("tokens", "texts", "records", "names", "name_ends")


@dataclass(frozen=True)
class Encoding:
    """How records are encoded as token ids; part of a store's identity."""

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
    shard_records: int = SHARD_RECORDS,
) -> TokenStore:
    """Tokenises JSON-lines files into a store at `out`, unless a store with this identity exists there.

    `limit`: use only the first so many records (0: all). `workers`: number of processes (0: one per CPU). `identity`:
    the result of identity_of, if already computed.

    Records that cannot be used are listed in rejects.jsonl. Raises UserError naming the first of them if they are more
    than 1 %, or more than half of those read after any shard: a file of the other stage is not read to its end.
    """
    out = Path(out)
    identity = identity or identity_of(files, encoding, limit)
    if (out / "manifest.json").is_file() and read_json(out / "manifest.json").get("identity") == identity:
        return TokenStore(out)
    with atomic_folder(out) as folder:
        shards, rejects = encode_shards(files, encoding, folder, limit, workers, shard_records)
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
    """Everything that a store's contents depend on. Raises UserError if a file is missing or not JSON lines."""
    for file in files:
        if Path(file).is_dir():
            raise UserError(f"{file}: is a folder; give JSON lines")
        check_regular(file)
        if Path(file).suffix.lower() in (".csv", ".tsv"):
            raise UserError(f"{file}: is a table; make JSON lines of it: python -m train.importers.table")
    return {
        **asdict(encoding),
        "sources": {str(file): sha256_file(file) for file in files},
        "tokenizer": tokenizer_hash(encoding.tokenizer),
        "limit": limit,
    }


def tokenizer_hash(path: str) -> str:
    """Hash of a tokenizer's files. `path`: a folder with a tokenizer (a model's folder), or a GGUF file."""
    folder = Path(path)
    names = sorted(file for file in folder.iterdir() if is_tokenizer_file(file)) if folder.is_dir() else [folder]
    if not names or not names[0].is_file():
        raise UserError(f"{path}: holds no tokenizer (tokenizer.json, tokenizer.model or a GGUF file)")
    return "-".join(sha256_file(file)[:16] for file in names)


def is_tokenizer_file(file: Path) -> bool:
    return file.name in ("tokenizer.json", "tokenizer_config.json") or ".model" in file.name or file.suffix == ".gguf"


def encode_shards(
    files: Sequence[str], encoding: Encoding, folder: Path, limit: int, workers: int, shard_records: int
) -> tuple[list[dict[str, int]], list[dict[str, Any]]]:
    """Writes all shards. Returns (their manifest entries, rejects)."""
    all_lines = ((str(file), number, line) for file in files for number, line in numbered_lines(file))
    lines = itertools.islice(all_lines, limit or None)
    chunks = enumerate(iter(lambda: list(itertools.islice(lines, shard_records)), []))
    first = list(itertools.islice(chunks, 2))
    encode, jobs = partial(encode_shard, encoding, folder), itertools.chain(first, chunks)
    if len(first) < 2 or workers == 1:  # for one shard a process pool costs more than it gains
        return collect(map(encode, jobs))
    with multiprocessing.get_context("spawn").Pool(workers or os.cpu_count()) as pool:
        return collect(tqdm(pool.imap(encode, jobs), desc="tokenising", unit=" shards", disable=None))


def collect(results: Iterable[tuple[dict[str, int], list[dict[str, Any]]]]) -> tuple[list[dict[str, int]], list[dict]]:
    """(shards, rejects) of the results; stops early once more than half of the records are rejects."""
    shards: list[dict[str, int]] = []
    rejects: list[dict[str, Any]] = []
    for shard, bad in results:
        shards.append(shard)
        rejects += bad
        if len(rejects) > sum(each["records"] for each in shards):
            break
    return shards, rejects


def encode_shard(
    encoding: Encoding, folder: Path, numbered: tuple[int, Sequence[tuple[str, int, bytes]]]
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Writes one shard from (shard number, [(file, line number, line), …]). Returns (its manifest entry, rejects)."""
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
    token_dtype = np.uint16 if len(flat) == 0 or flat.max() < 2**16 else np.uint32
    name_bytes, name_ends = np.asarray(bytearray(b"".join(names))), np.cumsum([0, *map(len, names)])
    arrays = (flat.astype(token_dtype), np.asarray(text_ends), np.asarray(record_ends), name_bytes, name_ends)
    for name, array in zip(ARRAYS, arrays, strict=True):
        np.save(folder / f"{number}.{name}.npy", array)
    return {"records": len(names), "tokens": len(flat), "largest": int(flat.max(initial=0))}, rejects


def check_rejects(rejects: list[dict[str, Any]], good: int, out: Path) -> None:
    """Raises UserError if too many records are bad; their list is written beside `out`, which is then not made."""
    if len(rejects) > MAX_REJECTED * (good + len(rejects)):
        listed = out.with_name(f"{out.name}-rejects.jsonl")
        write_jsonl(listed, rejects)
        first = rejects[0]
        where = "" if first["reason"].startswith(first["file"]) else f"{first['file']}:{first['line']}: "
        raise UserError(
            f"{where}{first['reason']}; {len(rejects)} of {good + len(rejects)} records read "
            f"cannot be used, more than 1 %: correct the file ({listed} lists them)"
        )


class TokenStore:
    """A store opened for reading. `store[i]` is (id, texts) of record i. At most `open_shards` shards are open."""

    def __init__(self, path: str | Path, open_shards: int = OPEN_SHARDS) -> None:
        self.path = Path(path)
        self.manifest = read_json(self.path / "manifest.json")
        counts = [shard["records"] for shard in self.manifest["shards"]]
        self.first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # first record of each shard
        self.shard = lru_cache(open_shards)(self.open_shard)

    def __len__(self) -> int:
        return int(self.first[-1])

    def open_shard(self, number: int) -> tuple:
        """The shard's arrays, in the order of ARRAYS, memory-mapped."""
        try:
            return tuple(np.load(self.path / f"{number}.{name}.npy", mmap_mode="r") for name in ARRAYS)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{self.path}: shard {number} is corrupt; remove this folder and run again") from error

    def __getitem__(self, index: int) -> tuple[str, Texts]:
        number = int(np.searchsorted(self.first, index, side="right")) - 1
        tokens, texts, records, names, name_ends = self.shard(number)
        local = index - int(self.first[number])
        offsets = texts[records[local] : records[local + 1] + 1]
        ids = [np.asarray(tokens[a:b], dtype=np.int64) for a, b in itertools.pairwise(offsets)]
        name = names[name_ends[local] : name_ends[local + 1]].tobytes()
        return name.decode("utf-8", "surrogatepass"), ids

    def text_lengths(self) -> Iterator[list[int]]:
        """Yields, for each record, the number of tokens of each of its texts."""
        for number in range(len(self.manifest["shards"])):
            _, texts, records, _, _ = self.open_shard(number)
            sizes = np.diff(texts).tolist()
            for start, stop in itertools.pairwise(records.tolist()):
                yield sizes[start:stop]
