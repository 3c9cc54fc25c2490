"""The training rows of a token store under a recipe, each built on access."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from model.support.cli import UserError
from train.data.rows import ANSWER, IGNORE, Document, Row, note_document, pack, question_documents, text_documents
from train.data.store import TokenStore
from train.recipe import Recipe

Result = TypeVar("Result")


class Rows:
    """Sequence of rows; a row's content is a function of the store and the recipe.

    The index is three int32 arrays: `first[record]` is the record's first document, `documents` lists the documents row
    by row, and row i is documents[row_ends[i]:row_ends[i + 1]]. Concatenated texts need only `text_ends`.
    """

    def __init__(self, store: TokenStore, recipe: Recipe, stage: str) -> None:
        self.store, self.recipe, self.stage = store, recipe, stage
        self.concatenated = stage == "pretrain" and recipe.packing == "concatenate"
        if self.concatenated:
            self.text_ends = array("q", [0])
            for size in store.text_lengths():
                self.text_ends.append(self.text_ends[-1] + size[0])
            self.count = self.text_ends[-1] // recipe.block  # the tail is dropped
        else:
            self.first, lengths = self.document_lengths(store.text_lengths())
            one_each = ([document] for document in range(len(lengths)))
            self.documents, self.row_ends = array("i"), array("i", [0])
            for row in one_each if recipe.packing == "none" else pack(np.asarray(lengths), recipe.block):
                self.documents.extend(row)
                self.row_ends.append(len(self.documents))
            self.count = len(self.row_ends) - 1
        if not self.count:
            files = ", ".join(store.manifest["identity"]["sources"])
            raise UserError(
                f"{files}: not one whole row of block = {recipe.block} tokens in it; give more text or a smaller block"
            )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        if self.concatenated:
            return Row((self.concatenated_document(index),))
        numbers = self.documents[self.row_ends[index] : self.row_ends[index + 1]]
        return Row(tuple(self.document(number) for number in numbers))

    def document_lengths(self, sizes: Iterable[list[int]]) -> tuple[array[int], array[int]]:
        """(each record's first document, each document's number of tokens), from the lengths of each record's texts."""
        block, first, lengths = self.recipe.block, array("i", [0]), array("i")
        for record, size in enumerate(sizes):
            if self.stage == "pretrain":
                new = [min(block, size[0] - 1 - start) for start in range(0, size[0] - 1, block)]
            else:
                branches = [prompt + answer - 1 for prompt, answer in zip(size[1::2], size[2::2], strict=True)]
                new = [size[0] + sum(branches)] if self.recipe.share_prefix else [size[0] + b for b in branches]
                if max(new) > block:
                    raise UserError(
                        f"record {self.store[record][0]!r} takes {max(new)} tokens, more than block = {block}; "
                        "raise block, or leave the record out"
                    )
            lengths.extend(new)
            first.append(len(lengths))
        return first, lengths

    def document(self, number: int) -> Document:
        """Document `number` of the store, built from its record."""
        record = bisect_right(self.first, number) - 1
        part = number - self.first[record]
        name, texts = self.store[record]
        if self.stage == "pretrain":
            return text_documents(name, texts[0], self.recipe.block)[part]
        note_loss = self.recipe.note_loss > 0
        if self.recipe.share_prefix:
            return note_document(name, texts, self.recipe.loss_on, note_loss)
        return question_documents(name, texts, self.recipe.loss_on, note_loss)[part]

    def concatenated_document(self, row: int) -> Document:
        """Row of packing = "concatenate": `block` tokens of the joined texts as one document, with no mask between."""
        start, stop = row * self.recipe.block, (row + 1) * self.recipe.block
        parts, branches = [], []
        record = bisect_right(self.text_ends, start) - 1
        while record < len(self.text_ends) - 1 and self.text_ends[record] < stop:
            name, texts = self.store[record]
            first = self.text_ends[record]
            part = texts[0][max(start - first, 0) : stop - first]
            if len(part):
                parts.append(part)
                branches.append((name, 0, len(part)))
            record += 1
        tokens = np.concatenate(parts)
        n = len(tokens)
        target, kind = np.append(tokens[1:], IGNORE), np.append(np.full(n - 1, ANSWER), 0)
        return Document(branches[0][0], tokens, np.arange(n), np.zeros(n, np.int64), target, kind, tuple(branches))


def read_ahead(read: Callable[[int], Result]) -> Callable[[int], Result]:
    """Returns `read(step)` with prefetching: a thread reads step + 1 while the caller works on `step`."""
    thread = ThreadPoolExecutor(1)
    pending: dict[int, Future[Result]] = {}

    def prefetched(step: int) -> Result:
        for number in (step, step + 1):
            if number not in pending:
                pending[number] = thread.submit(read, number)
        return pending.pop(step).result()

    return prefetched
