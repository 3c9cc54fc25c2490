"""An index of notes on disk: build it, or search it.

    python -m infer.retrieval.index --encoder contriever --weights DIR --notes train.jsonl --out DIR
    python -m infer.retrieval.index --encoder bm25 --notes train.jsonl --out DIR
    python -m infer.retrieval.index --out DIR --ask "left breast mass, HER2 positive" [--weights DIR]

DIR holds vectors.npy (memory-mapped; not for BM25), notes.jsonl (a copy of the records, mode 0600) and manifest.json
with the encoder's name and hashes of its files and of the notes, so that another encoder is refused. Vectors are
written batch by batch, and an interrupted build continues. The notes' texts are held in memory, vectors are not.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from infer.retrieval.bm25 import BM25, words
from infer.retrieval.encoder import Encoder, files
from infer.retrieval.search import allowed, top_k
from model.support.cli import UserError, run
from model.support.files import atomic_folder, read_json, read_jsonl, sha256_file, write_json
from model.support.lock import output

BATCH = 64


@dataclass(frozen=True)
class Options:
    """Build an index of notes, or search one."""

    out: Path
    """The index's folder."""
    encoder: Literal["bm25", "contriever", "medcpt", "specter2", "sgpt", "sentence-transformers"] = "bm25"
    """The retriever."""
    weights: Path | None = None
    """The encoder's folder (none for bm25)."""
    notes: Path | None = None
    """JSON lines with `id` and `text` (and optionally `title`, `patient`, `diagnosis`)."""
    ask: str | None = None
    """Instead of building, print the notes nearest to this text."""
    k: int = 5
    """Number of notes to print."""
    overwrite: bool = False
    """Replace an existing index, once the new one is complete."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"--k {self.k}: at least 1")


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The notes to index, each with `id` and `text`. Raises UserError for a duplicate id."""
    seen: dict[str, int] = {}
    for where, record in read_jsonl(path, ("id", "text")):
        if (first := seen.setdefault(record["id"], where)) != where:
            raise UserError(f"{path}:{where}: its id is that of line {first} too; give each note its own")
        yield record


def hash_files(path: Path) -> str:
    """One hash of all model and tokenizer files of an encoder."""
    lines = [f"{file.relative_to(path)} {sha256_file(file)}" for file in files(path)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def build(options: Options) -> dict[str, Any]:
    """Builds the index and returns its manifest. An existing index at `out` stays until the new one is complete."""
    if options.notes is None:
        raise UserError("--notes is missing: give the notes to index, or --ask TEXT to search an existing index")
    out = options.out
    if out.exists() and not (out / "manifest.json").exists():
        raise UserError(f"{out}: exists and is not an index; choose another --out")
    dense = options.encoder != "bm25"
    if dense and options.weights is None:
        raise UserError(f"--encoder {options.encoder}: weights not given; give its folder with --weights")
    if not dense and options.weights is not None:
        raise UserError("--encoder bm25 has no weights; leave --weights out, or give their --encoder")
    with output(out, options.overwrite):
        return write_index(options, list(records(options.notes)))


def write_index(options: Options, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Encodes the records and moves the complete index to `out`."""
    dense = options.encoder != "bm25"
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found).encode()
    manifest: dict[str, Any] = {
        "version": 1,
        "encoder": options.encoder,
        "count": len(found),
        "notes_sha256": hashlib.sha256(lines).hexdigest(),
        "encoder_sha256": hash_files(options.weights) if dense and options.weights else None,
    }
    build_id = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:16]
    raw = options.out.with_name(f".{options.out.name}.{build_id}.vectors")  # finished vectors of this build
    for path in options.out.parent.iterdir():
        if path != raw and re.fullmatch(rf"\.{re.escape(options.out.name)}\.[0-9a-f]{{16}}\.vectors", path.name):
            path.unlink()  # of an interrupted build with other inputs
    if dense:
        vectors_ND, properties = embed(options, found, raw)
    else:
        BM25([record["text"] for record in found])  # raises if there is nothing to index
    with atomic_folder(options.out) as folder:
        with open(folder / "notes.jsonl", "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(lines)
        if dense:
            np.save(folder / "vectors.npy", vectors_ND)
            manifest |= properties | {"vectors_sha256": sha256_file(folder / "vectors.npy")}
        write_json(folder / "manifest.json", manifest)
    raw.unlink(missing_ok=True)
    return manifest


def embed(options: Options, found: list[dict[str, Any]], raw: Path) -> tuple[np.memmap, dict[str, Any]]:
    """Appends the missing vectors to `raw`, batch by batch. Returns all vectors and their manifest entries."""
    assert options.weights is not None
    encoder = Encoder.from_pretrained(options.weights, options.encoder)
    width = len(encoder.encode(["width"])[0])
    encoder.cut = 0
    row_bytes = width * 4
    done = raw.stat().st_size // row_bytes // BATCH * BATCH if raw.exists() else 0
    texts = [(record["title"], record["text"]) if record.get("title") else record["text"] for record in found]
    for text in texts[:done]:
        encoder.tokens(text, query=False)  # for encoder.cut
    with (
        open(raw, "ab") as data,
        tqdm(total=len(found), initial=done, unit="note", desc="indexing", disable=None) as bar,
    ):
        data.truncate(done * row_bytes)
        for start in range(done, len(found), BATCH):
            vectors_ND = encoder.encode(texts[start : start + BATCH])
            data.write(vectors_ND.tobytes())
            data.flush()
            bar.update(len(vectors_ND))
        os.fsync(data.fileno())
    if encoder.cut:
        print(f"{encoder.cut} notes were truncated to the limit of {options.encoder}", file=sys.stderr)
    vectors_ND = np.memmap(raw, dtype=np.float32, mode="r", shape=(len(found), width))
    return vectors_ND, {"width": width, "similarity": encoder.similarity, "cut": encoder.cut}


class Index:
    """An existing index: `search(text, k)` and `neighbours(note, k)`.

    Raises UserError if the folder is not an index, is corrupt, or was built by another encoder.
    """

    def __init__(self, path: Path, encoder: str | None = None, weights: Path | None = None) -> None:
        if not (path / "manifest.json").exists():
            raise UserError(f"{path}: no such index; build it with python -m infer.retrieval.index")
        manifest = read_json(path / "manifest.json")
        if not isinstance(manifest, dict) or manifest.get("version") != 1:
            raise UserError(
                f"{path}: not an index of this version; build it again with python -m infer.retrieval.index"
            )
        if encoder is not None and encoder != manifest["encoder"]:
            raise UserError(
                f"{path}: was built by {manifest['encoder']}, not {encoder}; give that encoder, or build another index"
            )
        if sha256_file(path / "notes.jsonl") != manifest["notes_sha256"]:
            raise UserError(f"{path}: its notes.jsonl was changed since; build the index again")
        self.manifest = manifest
        self.records = [record for _, record in read_jsonl(path / "notes.jsonl")]
        if manifest["encoder"] == "bm25":
            self.words = BM25([record["text"] for record in self.records])
            return
        if weights is None:
            raise UserError(f"{path}: was built by {manifest['encoder']}; weights not given: give --weights DIR")
        if hash_files(weights) != manifest["encoder_sha256"]:
            raise UserError(f"{path}: was built by another encoder or tokenizer than {weights}; build the index again")
        if sha256_file(path / "vectors.npy") != manifest["vectors_sha256"]:
            raise UserError(f"{path}: its vectors.npy is corrupt; build the index again")
        self.encoder = Encoder.from_pretrained(weights, manifest["encoder"])
        self.vectors_ND = np.load(path / "vectors.npy", mmap_mode="r", allow_pickle=False)

    @property
    def cut(self) -> int:
        """Number of queries so far that were truncated to the encoder's limit."""
        return 0 if self.manifest["encoder"] == "bm25" else self.encoder.cut

    def search(self, text: str, k: int) -> list[tuple[dict[str, Any], float]]:
        """The k nearest records with their scores, best first. Raises UserError for an empty query."""
        if self.manifest["encoder"] == "bm25":
            return [(self.records[row], score) for row, score in self.words.search(text, k)]
        query_1D = self.encoder.encode([text], query=True)
        rows, scores = top_k(query_1D, self.vectors_ND, k, self.manifest["similarity"])
        return [(self.records[row], float(score)) for row, score in zip(rows[0], scores[0], strict=True)]

    def neighbours(
        self, note: Mapping[str, Any], k: int, wanted: Callable[[dict[str, Any]], bool] = lambda record: True
    ) -> list[dict[str, Any]]:
        """The k nearest `wanted` records that may be shown with `note` (search.allowed), nearest first; [] for a note
        without words."""
        if not words(note["text"]):
            return []
        depth = 4 * k + 16
        while True:
            found = [record for record, _ in self.search(note["text"], depth) if wanted(record)]
            kept = [record for record in found if allowed(note, record)]
            if len(kept) >= k or depth >= len(self.records):
                return kept[:k]
            depth *= 4


def diagnosis_text(diagnosis: Any) -> str:
    """The text of a record's diagnosis, given as a text or {"text", "code"}; "" for anything else."""
    text = diagnosis.get("text") if isinstance(diagnosis, Mapping) else diagnosis
    return text if isinstance(text, str) else ""


def main(options: Options) -> None:
    if options.ask is None:
        manifest = build(options)
        print(f"{options.out}: {manifest['count']} notes, {options.encoder}")
        return
    found = Index(options.out, weights=options.weights).search(options.ask, options.k)
    for record, score in found:
        print(f"{score:9.4f}  {record['id']}  {diagnosis_text(record.get('diagnosis'))}")


if __name__ == "__main__":
    run(main, Options)
