"""Levels of the prefix tree: keys and values of adjacent prefixes padded to one length, so that attention to all of
them takes one batched matrix product for the scores and one for the values.

r branches, P prefixes of a level, n maximum number of branches below a prefix, S keys, G key/value heads, K head size,
M query rows per key/value head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from infer.engine.tree import Prefix


@dataclass(eq=False)
class Level:
    """Adjacent prefixes of one depth, with keys and values padded to the longest.

    Example: prefixes above the branches 3, 4, 5 and 6, 7 (P = 2, n = 3) have rows = slice(3, 8), branch_Pn =
    [[0, 1, 2], [3, 4, 4]] (relative to rows.start; the last branch fills up a row) and place_r = [0, 1, 2, 3, 4], the
    index of each branch in branch_Pn.flatten(). A branch in `rows` may be below none of the prefixes; it is masked.
    """

    prefixes: list[Prefix]
    keys: list[Tensor]  # k_PGSK of each layer
    values: list[Tensor]  # v_PGSK
    first_P: Tensor  # position of each prefix's first key; on the host, as reading from a device synchronizes
    length_P: Tensor  # number of keys of each prefix; on the host
    rows: slice = field(default_factory=lambda: slice(0))
    branch_Pn: Tensor = field(init=False)
    place_r: Tensor = field(init=False)
    prefix_r: Tensor = field(init=False)  # index of the prefix above each branch, −1 for none; on the host
    outside_r: Tensor | None = field(init=False)  # True for branches below none of the prefixes; None if all are
    start_P: Tensor = field(init=False)  # first branch below each prefix; int32 on the device, for the kernels
    count_P: Tensor = field(init=False)  # number of branches below each prefix; likewise
    even: bool = False  # branch_Pn is 0, 1, 2, …: no gather needed

    def index(self) -> None:
        """Computes `rows` and the index tensors from the prefixes' branches."""
        ranges = [prefix.branches for prefix in self.prefixes]
        start, stop = ranges[0].start, ranges[-1].stop
        n = max(map(len, ranges))
        self.rows = slice(start, stop)
        places = {branch: m * n + i for m, below in enumerate(ranges) for i, branch in enumerate(below)}
        all_below = len(places) == stop - start
        device = self.keys[0].device
        branches = [[below[min(i, len(below) - 1)] - start for i in range(n)] for below in ranges]
        self.branch_Pn = torch.tensor(branches, device=device)
        self.prefix_r = torch.tensor([places.get(branch, -1) // n for branch in range(start, stop)])
        self.place_r = torch.tensor([places.get(branch, 0) for branch in range(start, stop)], device=device)
        self.outside_r = None if all_below else (self.prefix_r < 0).to(device)
        self.start_P, self.count_P = torch.tensor(
            [[below.start for below in ranges], [len(below) for below in ranges]], dtype=torch.int32, device=device
        )
        self.even = all_below and len(places) == self.branch_Pn.numel()

    def positions(self, begin: int) -> Tensor:
        """position_PS of the keys from index `begin` on; −1 for padding."""
        index_S = torch.arange(begin, self.keys[0].shape[2])
        return torch.where(index_S < self.length_P[:, None], self.first_P[:, None] + index_S, -1)

    def retain(self) -> None:
        """Drops prefixes without branches, frees their keys and values, and indexes the others again."""
        kept = [m for m, prefix in enumerate(self.prefixes) if len(prefix.branches)]
        if len(kept) < len(self.prefixes):
            self.prefixes = [self.prefixes[m] for m in kept]
            longest = int(self.length_P[kept].max()) if kept else 0
            for store in (self.keys, self.values):
                for layer, held_PGSK in enumerate(store):
                    store[layer] = held_PGSK[kept, :, :longest]
            self.first_P, self.length_P = self.first_P[kept], self.length_P[kept]
        if kept:
            self.index()

    def join(self, other: Level) -> None:
        """Appends another level's prefixes, whose branches come after this level's."""
        for store, added in ((self.keys, other.keys), (self.values, other.values)):
            for layer, held_PGSK in enumerate(store):
                store[layer] = cat_padded(held_PGSK, added[layer], dim=-2)
        self.prefixes = [*self.prefixes, *other.prefixes]
        self.first_P = torch.cat([self.first_P, other.first_P])
        self.length_P = torch.cat([self.length_P, other.length_P])
        self.index()

    def product(self, x_rGMA: Tensor, y_PGAC: Tensor) -> Tensor:
        """Each branch's rows times its prefix's matrix: (r, G, M, A) × (P, G, A, C) → (r, G, M, C). The branches of a
        prefix are gathered into one product; rows of branches below no prefix are 0."""
        prefixes, n = self.branch_Pn.shape
        r, G, M, A = x_rGMA.shape
        x_PnGMA = (x_rGMA if self.even else x_rGMA[self.branch_Pn.flatten()]).view(prefixes, n, G, M, A)
        out_PGnMC = torch.matmul(x_PnGMA.transpose(1, 2).reshape(prefixes, G, n * M, A), y_PGAC)
        out_PnGMC = out_PGnMC.view(prefixes, G, n, M, -1).transpose(1, 2)
        if self.even:
            return out_PnGMC.flatten(0, 1)
        out_rGMC = out_PnGMC.flatten(0, 1)[self.place_r]
        return out_rGMC if self.outside_r is None else out_rGMC.masked_fill_(self.outside_r[:, None, None, None], 0)


def similar(lengths: Sequence[int]) -> bool:
    """True if padding to the longest at most doubles the total length."""
    return max(lengths) * len(lengths) <= 2 * sum(lengths)


def levels_of(prefixes: list[Prefix]) -> Iterator[list[Prefix]]:
    """Groups prefixes into levels: those of one depth that are adjacent and of similar lengths."""
    depth = [prefix for prefix in prefixes if prefix.parent is None]
    while depth:
        group: list[Prefix] = []
        for prefix in (prefix for prefix in depth if len(prefix.branches)):
            lengths = [len(each.keys[0][0]) for each in (*group, prefix)]
            if not similar(lengths):
                yield group
                group = []
            group.append(prefix)
        if group:
            yield group
        above = {id(prefix) for prefix in depth}
        depth = [prefix for prefix in prefixes if id(prefix.parent) in above]


def padded(prefixes: list[Prefix]) -> Level:
    """Builds a Level: moves the prefixes' keys and values into one tensor per layer, layer by layer to save memory."""
    lengths = [prefix.keys[0].shape[1] for prefix in prefixes]
    level = Level(prefixes, [], [], torch.tensor([prefix.first for prefix in prefixes]), torch.tensor(lengths))
    for layer in range(len(prefixes[0].keys)):
        for store, name in ((level.keys, "keys"), (level.values, "values")):
            held = [getattr(prefix, name)[layer] for prefix in prefixes]
            padded_PGSK = held[0].new_zeros(len(prefixes), held[0].shape[0], max(lengths), held[0].shape[2])
            for m, (prefix, kept_GSK) in enumerate(zip(prefixes, held, strict=True)):
                padded_PGSK[m, :, : lengths[m]] = kept_GSK
                getattr(prefix, name)[layer] = kept_GSK.new_empty(0)  # an empty view would keep the storage alive
            store.append(padded_PGSK)
    level.index()
    return level


def cat_padded(one: Tensor, other: Tensor, dim: int) -> Tensor:
    """Concatenates two tensors along dimension 0 after zero-padding both to the same size in `dim` (-1 or -2)."""
    longest = max(one.shape[dim], other.shape[dim])
    return torch.cat([F.pad(x, (*(0, 0) * (-1 - dim), 0, longest - x.shape[dim])) for x in (one, other)])
