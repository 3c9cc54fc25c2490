"""Dropout's masks: a function of (seed, step, record, branch, token, module, column).

A mask does not depend on the batch that a record sits in, on packing, on the number of ranks, or on the device: it is
read from one table of random draws, each branch of a record from a place of its own for each module. So a mask is a
view: nothing is computed or kept for it, and the backward pass reads the same place again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

MASKS = 3  # the form of the masks: a run goes on only with the form that it began with
DRAWS = 1 << 22
ALIGNMENT = 32  # places are multiples of it: 64 bytes in bf16, a line of the cache
PLACES = DRAWS // 2 // ALIGNMENT  # in the table's first half; the second is left for the tokens that follow
GOLDEN = -7046029254386353131  # 2^64 / the golden ratio, as Weyl sequences step (a signed 64-bit number)
ROUNDS = ((32, -2960836687157067323), (29, -4658895280553007687), (32, 1))  # (shift, odd factor), as in splitmix64
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def mixed(x: Tensor) -> Tensor:
    """A hash of 64-bit integers, in place: flipping one bit flips about half of the result's."""
    for shift, factor in ROUNDS:
        high = (x >> shift).bitwise_and_(2 ** (64 - shift) - 1)  # torch shifts the sign in
        x.bitwise_xor_(high).mul_(factor)
    return x


@lru_cache(maxsize=8)
def keep_table(seed: int, p: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """`DRAWS` draws, 0 with probability p: as integers of the dtype's width with all other bits set, and as ones."""
    kept = torch.empty(DRAWS, dtype=torch.bool)
    for first in range(0, DRAWS, 1 << 18):  # in parts, so that its 64-bit numbers take little memory
        draws = mixed(torch.arange(first, first + (1 << 18)) * GOLDEN + seed_of(seed)).bitwise_and_(2**32 - 1)
        kept[first : first + (1 << 18)] = draws >= round(p * 2**32)
    kept = kept.to(device)
    return kept.to(INTEGERS[dtype.itemsize]).neg_(), kept.to(dtype)


@lru_cache(maxsize=4096)
def module_key(module: str) -> int:
    return seed_of(module)


@dataclass
class TokenMasks:
    """The masks of N tokens: `branches` holds (first token, tokens, key) of each branch, in order and without gaps."""

    seed: int
    branches: list[tuple[int, int, int]]
    chosen_M: Tensor | None = None  # the tokens that are computed (None: all)

    def choose(self, chosen_M: Tensor) -> TokenMasks:
        """The masks of some of the tokens."""
        return replace(self, chosen_M=chosen_M)

    def views(self, table: Tensor, module: str, width: int) -> Iterator[tuple[slice, Tensor]]:
        """(tokens, their mask (tokens, width)) of each branch, from `keep_table`'s draws."""
        if self.chosen_M is not None:
            whole_ND = torch.cat([mask_TD for _, mask_TD in replace(self, chosen_M=None).views(table, module, width)])
            yield slice(None), whole_ND[self.chosen_M]
            return
        most = DRAWS // 2 // width  # tokens read from one place
        for first, length, key in self.branches:
            for start in range(0, length, most):
                count = min(most, length - start)
                place = ALIGNMENT * ((((key + start) ^ module_key(module)) * GOLDEN & 2**64 - 1) * PLACES >> 64)
                tokens = slice(first + start, first + start + count)
                yield tokens, table[place : place + count * width].view(count, width)

    def zero(self, x_ND: Tensor, p: float, module: str) -> Tensor:
        """x with zeros where the module's dropout drops its input; what is kept is not scaled by 1 / (1 − p)."""
        bits, _ = keep_table(self.seed, p, x_ND.dtype, x_ND.device)
        out_ND = torch.empty_like(x_ND)
        for tokens, mask_TD in self.views(bits, module, x_ND.shape[1]):
            torch.bitwise_and(x_ND[tokens].view(bits.dtype), mask_TD, out=out_ND[tokens].view(bits.dtype))
        return out_ND

    def add(self, sum_ND: Tensor, g_ND: Tensor, p: float, module: str) -> None:
        """sum += g where the module's input was kept: the backward pass of `zero`."""
        _, ones = keep_table(self.seed, p, g_ND.dtype, g_ND.device)
        for tokens, mask_TD in self.views(ones, module, g_ND.shape[1]):
            sum_ND[tokens].addcmul_(g_ND[tokens], mask_TD)


@dataclass
class DropoutPlan:
    """Which record and branch each token of a row belongs to; set by `begin`, kept until the next forward pass."""

    seed: int = 0
    step: int = 0
    rows: Sequence[Sequence[tuple[str, int, int]]] = field(default_factory=tuple)
    held: dict[tuple[int, int], TokenMasks] = field(default_factory=dict)

    def begin(self, step: int, rows: Sequence[Sequence[tuple[str, int, int]]]) -> None:
        """`rows` holds, for each row, (record, branch, tokens) in order; what is left of a row is padding."""
        self.step, self.rows, self.held = step, rows, {}

    def masks(self, B: int, T: int) -> TokenMasks:
        """The masks of a batch's B · T tokens."""
        if (B, T) not in self.held:
            branches: list[tuple[int, int, int]] = []
            for row in range(B):
                first = row * T
                for record, branch, length in self.rows[row] if row < len(self.rows) else ():
                    branches.append((first, length, seed_of(self.seed, self.step, record, branch)))
                    first += length
                if first < (row + 1) * T:
                    branches.append((first, (row + 1) * T - first, 0))
            self.held[B, T] = TokenMasks(self.seed, branches)
        return self.held[B, T]

    def mask(self, x_BTD: Tensor, p: float, module: str) -> Tensor:
        """1/(1−p) where a value is kept and 0 where it is dropped, in x's shape."""
        B, T, D = x_BTD.shape
        _, ones = keep_table(self.seed, p, x_BTD.dtype, x_BTD.device)
        return torch.cat([mask_TD for _, mask_TD in self.masks(B, T).views(ones, module, D)]).view(B, T, D) / (1 - p)
