"""A token store cut into the rows of a recipe; a row is built when it is asked for."""

from __future__ import annotations

import numpy as np

from model.support.cli import UserError
from train.data.rows import ANSWER, IGNORE, Row, Unit, note_unit, pack, question_units, text_units
from train.data.store import TokenStore
from train.recipe import Recipe


class Rows:
    """`rows[i]` is row i; `len(rows)` their number. What is in a row is a function of the store and the recipe.

    `places` names each unit by (record, which unit of the record); `held` says which units share a row.
    """

    def __init__(self, store: TokenStore, recipe: Recipe, stage: str) -> None:
        self.store, self.recipe, self.stage = store, recipe, stage
        sizes = store.piece_lengths()
        if stage == "pretrain" and recipe.packing == "concatenate":
            self.ends = np.cumsum([0, *(size[0] for size in sizes)])
            self.held: list[list[int]] = [[row] for row in range(int(self.ends[-1]) // recipe.block)]  # no tail
        else:
            self.places, lengths = self.cut(sizes)
            alone = [[unit] for unit in range(len(lengths))]
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
        return Row(tuple(self.unit(*self.places[unit]) for unit in self.held[index]))

    def cut(self, sizes: list[list[int]]) -> tuple[list[tuple[int, int]], np.ndarray]:
        """Every unit's place and length."""
        block, places, lengths = self.recipe.block, [], []
        for record, size in enumerate(sizes):
            if self.stage == "pretrain":
                units = [min(block, size[0] - 1 - start) for start in range(0, size[0] - 1, block)]
            else:
                branches = [prompt + answer - 1 for prompt, answer in zip(size[1::2], size[2::2], strict=True)]
                units = [size[0] + sum(branches)] if self.recipe.share_prefix else [size[0] + b for b in branches]
                if max(units) > block:
                    raise UserError(
                        f"record {self.store[record][0]!r} takes {max(units)} tokens, more than block = {block}; "
                        "raise block, or leave the record out"
                    )
            places += [(record, unit) for unit in range(len(units))]
            lengths += units
        return places, np.asarray(lengths, np.int64)

    def unit(self, record: int, number: int) -> Unit:
        name, pieces = self.store[record]
        if self.stage == "pretrain":
            return text_units(name, pieces[0], self.recipe.block)[number]
        note_loss = self.recipe.note_loss > 0
        if self.recipe.share_prefix:
            return note_unit(name, pieces, self.recipe.loss_on, note_loss)
        return question_units(name, pieces, self.recipe.loss_on, note_loss)[number]

    def running(self, row: int) -> Unit:
        """The faithful row: texts run together and cut at `block`, one document, positions run on."""
        start, stop = row * self.recipe.block, (row + 1) * self.recipe.block
        parts, stretches = [], []
        record = int(np.searchsorted(self.ends, start, side="right")) - 1
        while record < len(self.ends) - 1 and self.ends[record] < stop:
            name, pieces = self.store[record]
            first = int(self.ends[record])
            part = pieces[0][max(start - first, 0) : stop - first]
            if len(part):
                parts.append(part)
                stretches.append((name, 0, len(part)))
            record += 1
        tokens = np.concatenate(parts)
        n = len(tokens)
        target, kind = np.append(tokens[1:], IGNORE), np.append(np.full(n - 1, ANSWER), 0)
        return Unit(stretches[0][0], tokens, np.arange(n), np.zeros(n, np.int64), target, kind, tuple(stretches))
