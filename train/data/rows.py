"""Rows of a training batch: texts → documents (one text, or a note with its questions) → packed rows → padded batch.

A document with a shared prefix holds the note once (branch 0) and each question as a branch whose positions continue
the note's; model/mask.py lets a branch see the note and itself. A worked example, note "a b c", questions "p q"
answered "x" and "r" answered "y z", end token e:

    token     a  b  c  p  q  x  r  y  z
    branch    0  0  0  1  1  1  2  2  2
    position  0  1  2  3  4  5  3  4  5
    target    ·  ·  ·  ·  x  e  y  z  e

The last token of a branch is only ever a target, so it is not in the row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from model.mask import Layout

IGNORE = -100  # position without a target
ANSWER, NOTE = 1, 2  # kinds of target; the loss is averaged over each kind separately


@dataclass(frozen=True)
class Document:
    """int64 arrays (T,): tokens, positions, branch, target (IGNORE: none) and the target's kind."""

    record: str
    tokens: np.ndarray
    positions: np.ndarray
    branch: np.ndarray
    target: np.ndarray
    kind: np.ndarray
    branches: tuple[tuple[str, int, int], ...]  # (record, branch, tokens) in order


@dataclass(frozen=True)
class Row:
    """One or more documents, concatenated."""

    documents: tuple[Document, ...]

    def __len__(self) -> int:
        return sum(len(document.tokens) for document in self.documents)

    def targets(self, kind: int) -> int:
        return int(sum((document.kind == kind).sum() for document in self.documents))

    def pairs(self) -> int:
        """Number of (query, key) pairs in attention without a window: a token at position p sees p + 1 tokens."""
        return int(sum((document.positions + 1).sum() for document in self.documents))


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length: int64 tensors (B, T). Padding has document number −1 and no target."""

    tokens: Tensor
    positions: Tensor
    layout: Layout
    target: Tensor
    kind: Tensor
    branches: tuple[tuple[tuple[str, int, int], ...], ...]

    def to(self, device: torch.device) -> Batch:
        layout = Layout(self.layout.document_BT.to(device), self.layout.branch_BT.to(device))
        moved = (self.tokens.to(device), self.positions.to(device), layout, self.target.to(device))
        return Batch(*moved, self.kind.to(device), self.branches)


def text_documents(record: str, ids: np.ndarray, block: int) -> list[Document]:
    """Splits a text into documents of at most `block` tokens. Every token but the first is a target exactly once."""
    documents = []
    for start in range(0, len(ids) - 1, block):
        part = ids[start : start + block + 1]
        n = len(part) - 1
        zeros, ones = np.zeros(n, np.int64), np.full(n, ANSWER)
        branches = ((record, start, n),)
        documents.append(Document(record, part[:-1], np.arange(n), zeros, part[1:], ones, branches))
    return documents


def note_document(
    record: str, texts: Sequence[np.ndarray], loss_on: str = "answer", note_loss: bool = False
) -> Document:
    """The note once, with all of its questions as branches. `texts`: [note, prompt 1, answer 1, prompt 2, …]."""
    prefix, n = texts[0], len(texts[0])
    target, kind = np.full(n, IGNORE), np.zeros(n, np.int64)
    if n > 1 and (note_loss or loss_on == "all"):
        target[:-1], kind[:-1] = prefix[1:], NOTE if note_loss else ANSWER
    columns = [(prefix, np.arange(n), np.zeros(n, np.int64), target, kind)]
    branches = [(record, 0, n)] if n else []
    for number, (prompt, answer) in enumerate(zip(texts[1::2], texts[2::2], strict=True), start=1):
        columns.append(branch_columns(prompt, answer, n, number, loss_on))
        branches.append((record, number, len(columns[-1][0])))
    tokens, positions, branch, target, kind = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Document(record, tokens, positions, branch, target, kind, tuple(branches))


def branch_columns(prompt: np.ndarray, answer: np.ndarray, start: int, number: int, loss_on: str) -> tuple:
    """(tokens, positions, branch, target, kind) of one question; positions continue at `start`."""
    whole = np.concatenate([prompt, answer])
    m = len(whole) - 1
    target = whole[1:].copy()
    if loss_on == "answer":
        target[: len(prompt) - 1] = IGNORE
    kind = np.where(target == IGNORE, 0, ANSWER)
    return whole[:-1], np.arange(start, start + m), np.full(m, number), target, kind


def question_documents(
    record: str, texts: Sequence[np.ndarray], loss_on: str = "answer", note_loss: bool = False
) -> list[Document]:
    """One document per question, each with the note repeated (with `note_loss` the note is trained on in each)."""
    documents = []
    for number in range(1, len(texts) // 2 + 1):
        single = note_document(record, [texts[0], *texts[2 * number - 1 : 2 * number + 1]], loss_on, note_loss)
        branches = tuple((record, number if branch else 0, length) for _, branch, length in single.branches)
        documents.append(replace(single, branches=branches))
    return documents


def pack(lengths: np.ndarray, block: int, window: int = 1024) -> Iterator[list[int]]:
    """Packs documents into rows of at most `block` tokens (best-fit decreasing). Yields each row's document indices.

    Nothing is cut or dropped. Each `window` consecutive documents are packed on their own: the cost stays linear, and
    the documents of a row are close together in the store.
    """
    for start in range(0, len(lengths), window):
        part = np.arange(start, min(start + window, len(lengths)))
        free: list[tuple[int, int]] = []  # (free tokens, row), sorted
        rows: list[list[int]] = []
        for document in part[np.argsort(-lengths[part], kind="stable")]:
            size = int(lengths[document])
            fit = bisect_left(free, (size, 0))
            if fit < len(free):
                left, row = free.pop(fit)
            else:
                left, row = block, len(rows)
                rows.append([])
            rows[row].append(int(document))
            insort(free, (left - size, row))
        yield from rows


def collate(rows: Sequence[Row]) -> Batch:
    """Stacks rows into a batch, padded to the longest."""
    longest = max(max((len(row) for row in rows), default=0), 1)
    shape = (len(rows), longest)
    names = ("tokens", "positions", "branch", "target", "kind")
    columns = {name: torch.zeros(shape, dtype=torch.int64) for name in names}
    columns["target"].fill_(IGNORE)
    document_BT = torch.full(shape, -1)
    for r, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row.documents):
            part = slice(start, start + len(document.tokens))
            for name in names:
                values = np.ascontiguousarray(getattr(document, name), dtype=np.int64)
                columns[name][r, part] = torch.from_numpy(values)
            document_BT[r, part] = number
            start = part.stop
    layout = Layout(document_BT, columns["branch"])
    branches = tuple(tuple(each for document in row.documents for each in document.branches) for row in rows)
    return Batch(columns["tokens"], columns["positions"], layout, columns["target"], columns["kind"], branches)


def order(seed: int, step: int, rows: int, batch: int) -> list[int]:
    """Indices of the rows of one optimizer step: a function of (seed, step) only, so a resumed run needs no state.

    Every epoch is a permutation drawn from (seed, epoch); a step may span two epochs.
    """
    return [permutation(seed, i // rows, rows)[i % rows] for i in range(step * batch, (step + 1) * batch)]


@lru_cache(maxsize=1)
def permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    """Order of the rows in one epoch (cached for the last epoch asked for)."""
    return np.random.default_rng([seed, epoch]).permutation(rows).astype(np.int32)


def count(rows: Iterable[Row]) -> dict[int, int]:
    """Number of targets of each kind."""
    rows = list(rows)
    return {kind: sum(row.targets(kind) for row in rows) for kind in (ANSWER, NOTE)}
