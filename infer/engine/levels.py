"""Levels of the tree: adjacent prefixes padded to one length, so that a level is one product for the scores and one
for the values, however many notes there are.

r branches, P prefixes of a level, n branches below a prefix at most, S keys, G key/value heads, K head size, M query
rows of a key/value head.
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
    """Adjacent prefixes of one depth: their keys and values padded to one length, side by side.

    `branch_Pn` are the branches below each prefix (P prefixes, at most n branches each; places beyond a prefix's own
    repeat a branch). `place_r` is the place of each of the branches `rows` in it, flattened. The mask hides the level
    from a branch that is below none of the prefixes.
    """

    prefixes: list[Prefix]
    keys: list[Tensor]  # k_PGSK of each layer
    values: list[Tensor]  # v_PGSK
    # the position of each prefix's first kept token, and how many are kept; on the host: reading from a device waits
    first_P: Tensor
    length_P: Tensor
    rows: slice = field(default_factory=lambda: slice(0))
    branch_Pn: Tensor = field(init=False)
    place_r: Tensor = field(init=False)
    prefix_r: Tensor = field(init=False)  # the prefix above each of the branches, −1 for none; on the host
    outside_r: Tensor | None = field(init=False)  # the branches below none, on the device; None where there are none
    start_P: Tensor = field(init=False)  # the first branch below each prefix and their number, int32 on the device,
    count_P: Tensor = field(init=False)  # for the kernels
    even: bool = False  # every branch once, in order: nothing needs to be gathered

    def index(self) -> None:
        """Find `rows` and the index tensors from the prefixes' ranges of branches."""
        ranges = [prefix.branches for prefix in self.prefixes]
        start, stop = ranges[0].start, ranges[-1].stop
        n = max(map(len, ranges))
        self.rows = slice(start, stop)
        places = {branch: m * n + i for m, below in enumerate(ranges) for i, branch in enumerate(below)}
        whole = len(places) == stop - start
        device = self.keys[0].device
        branches = [[below[min(i, len(below) - 1)] - start for i in range(n)] for below in ranges]
        self.branch_Pn = torch.tensor(branches, device=device)
        self.prefix_r = torch.tensor([places.get(branch, -1) // n for branch in range(start, stop)])
        self.place_r = torch.tensor([places.get(branch, 0) for branch in range(start, stop)], device=device)
        self.outside_r = None if whole else (self.prefix_r < 0).to(device)
        self.start_P, self.count_P = torch.tensor(
            [[below.start for below in ranges], [len(below) for below in ranges]], dtype=torch.int32, device=device
        )
        self.even = whole and len(places) == self.branch_Pn.numel()

    def positions(self, begin: int) -> Tensor:
        """position_PS of the keys from `begin` on; −1 where a prefix has no key."""
        index_S = torch.arange(begin, self.keys[0].shape[2])
        return torch.where(index_S < self.length_P[:, None], self.first_P[:, None] + index_S, -1)

    def retain(self) -> None:
        """Free the prefixes that have no branch left, and index the others again."""
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
        """Take over another level's prefixes, whose branches come after this one's, one layer at a time."""
        for store, added in ((self.keys, other.keys), (self.values, other.values)):
            for layer, held_PGSK in enumerate(store):
                store[layer] = cat_padded(held_PGSK, added[layer], dim=-2)
        self.prefixes = [*self.prefixes, *other.prefixes]
        self.first_P = torch.cat([self.first_P, other.first_P])
        self.length_P = torch.cat([self.length_P, other.length_P])
        self.index()

    def product(self, x_rGMA: Tensor, y_PGAC: Tensor) -> Tensor:
        """Each branch's rows times its prefix's matrix: (r, G, M, A) × (P, G, A, C) → (r, G, M, C)."""
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
    """Whether padding to the longest at most doubles their sum."""
    return max(lengths) * len(lengths) <= 2 * sum(lengths)


def levels_of(prefixes: list[Prefix]) -> Iterator[list[Prefix]]:
    """Prefixes that become a Level: of one depth, adjacent, of similar lengths."""
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
    """The prefixes' keys and values in one tensor a layer, one layer at a time; the prefixes' own are freed."""
    lengths = [prefix.keys[0].shape[1] for prefix in prefixes]
    level = Level(prefixes, [], [], torch.tensor([prefix.first for prefix in prefixes]), torch.tensor(lengths))
    for layer in range(len(prefixes[0].keys)):
        for store, name in ((level.keys, "keys"), (level.values, "values")):
            held = [getattr(prefix, name)[layer] for prefix in prefixes]
            padded_PGSK = held[0].new_zeros(len(prefixes), held[0].shape[0], max(lengths), held[0].shape[2])
            for m, (prefix, kept_GSK) in enumerate(zip(prefixes, held, strict=True)):
                padded_PGSK[m, :, : lengths[m]] = kept_GSK
                getattr(prefix, name)[layer] = kept_GSK.new_empty(0)  # not a view, which would keep the storage
            store.append(padded_PGSK)
    level.index()
    return level


def cat_padded(one: Tensor, other: Tensor, dim: int) -> Tensor:
    """Two tensors concatenated along the first dimension, both padded to the longer one's slots (`dim` -1 or -2)."""
    longest = max(one.shape[dim], other.shape[dim])
    return torch.cat([F.pad(x, (*(0, 0) * (-1 - dim), 0, longest - x.shape[dim])) for x in (one, other)])
