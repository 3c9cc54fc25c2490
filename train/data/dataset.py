"""A token store cut into the rows of a recipe; a row is built when it is asked for."""

from __future__ import annotations

import numpy as np

from model.support.cli import UserError
from train.data.rows import ANSWER, IGNORE, Document, Row, note_document, pack, question_documents, text_documents
from train.data.store import TokenStore
from train.recipe import Recipe


class Rows:
    """`rows[i]` is row i; `len(rows)` their number. What is in a row is a function of the store and the recipe.

    `places` names each document by (record, its number in the record); `held` lists the documents of each row.
    """

    def __init__(self, store: TokenStore, recipe: Recipe, stage: str) -> None:
        self.store, self.recipe, self.stage = store, recipe, stage
        sizes = store.text_lengths()
        if stage == "pretrain" and recipe.packing == "concatenate":
            self.ends = np.cumsum([0, *(size[0] for size in sizes)])
            self.held: list[list[int]] = [[row] for row in range(int(self.ends[-1]) // recipe.block)]  # no tail
        else:
            self.places, lengths = self.cut(sizes)
            alone = [[document] for document in range(len(lengths))]
            self.held = alone if recipe.packing == "none" else pack(lengths, recipe.block)
        if not self.held:
            files = ", ".join(store.manifest["identity"]["sources"])
            raise UserError(
                f"{files}: not one whole row of block = {recipe.block} tokens in it; give more text or a smaller block"
            )

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: int) -> Row:
        if self.recipe.packing == "concatenate" and self.stage == "pretrain":
            return Row((self.running(index),))
        return Row(tuple(self.document(*self.places[document]) for document in self.held[index]))

    def cut(self, sizes: list[list[int]]) -> tuple[list[tuple[int, int]], np.ndarray]:
        """Every document's place and length."""
        block, places, lengths = self.recipe.block, [], []
        for record, size in enumerate(sizes):
            if self.stage == "pretrain":
                found = [min(block, size[0] - 1 - start) for start in range(0, size[0] - 1, block)]
            else:
                branches = [prompt + answer - 1 for prompt, answer in zip(size[1::2], size[2::2], strict=True)]
                found = [size[0] + sum(branches)] if self.recipe.share_prefix else [size[0] + b for b in branches]
                if max(found) > block:
                    raise UserError(
                        f"record {self.store[record][0]!r} takes {max(found)} tokens, more than block = {block}; "
                        "raise block, or leave the record out"
                    )
            places += [(record, number) for number in range(len(found))]
            lengths += found
        return places, np.asarray(lengths, np.int64)

    def document(self, record: int, number: int) -> Document:
        name, texts = self.store[record]
        if self.stage == "pretrain":
            return text_documents(name, texts[0], self.recipe.block)[number]
        note_loss = self.recipe.note_loss > 0
        if self.recipe.share_prefix:
            return note_document(name, texts, self.recipe.loss_on, note_loss)
        return question_documents(name, texts, self.recipe.loss_on, note_loss)[number]

    def running(self, row: int) -> Document:
        """The faithful row: texts run together and cut at `block`, one document, positions run on."""
        start, stop = row * self.recipe.block, (row + 1) * self.recipe.block
        parts, branches = [], []
        record = int(np.searchsorted(self.ends, start, side="right")) - 1
        while record < len(self.ends) - 1 and self.ends[record] < stop:
            name, texts = self.store[record]
            first = int(self.ends[record])
            part = texts[0][max(start - first, 0) : stop - first]
            if len(part):
                parts.append(part)
                branches.append((name, 0, len(part)))
            record += 1
        tokens = np.concatenate(parts)
        n = len(tokens)
        target, kind = np.append(tokens[1:], IGNORE), np.append(np.full(n - 1, ANSWER), 0)
        return Document(branches[0][0], tokens, np.arange(n), np.zeros(n, np.int64), target, kind, tuple(branches))
