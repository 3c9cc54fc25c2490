"""Dropout masks that are the same in any batch, packing, number of ranks and on any device.

All masks of a (seed, p) are windows of one table of random draws. A window starts at a hash of seed, step, record,
branch and module; the values of the branch's tokens take consecutive draws. `TokenMasks` reads windows as views of the
table, so the backward pass of train/fast/block.py reads them again and no mask is stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

MASK_VERSION = 3  # raise it when masks change: runs record it and resume only with the same
TABLE_SIZE = 1 << 22  # draws
ALIGNMENT = 32  # windows start at multiples of it: 64 bytes in bf16, one cache line
WINDOWS = TABLE_SIZE // 2 // ALIGNMENT  # possible starts, in the first half: at least TABLE_SIZE // 2 draws follow each
GOLDEN = -7046029254386353131  # 2^64 / golden ratio as int64: step of a Weyl sequence, factor of a Fibonacci hash
ROUNDS = ((32, -2960836687157067323), (29, -4658895280553007687), (32, 1))  # (shift, odd factor), as in splitmix64
INT_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def mix_bits_(x: Tensor) -> Tensor:
    """Hash int64 numbers in place, as splitmix64 does: flipping an input bit flips about half of the output bits."""
    for shift, factor in ROUNDS:
        high = (x >> shift).bitwise_and_(2 ** (64 - shift) - 1)  # torch's shift copies the sign bit in
        x.bitwise_xor_(high).mul_(factor)
    return x


@lru_cache(maxsize=8)
def keep_table(seed: int, p: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """`TABLE_SIZE` draws that are 0 with probability p, as (bits, ones).

    `bits`: integers of the dtype's width, all bits set where a value is kept. `ones`: 1 there, in `dtype`.
    """
    kept = torch.empty(TABLE_SIZE, dtype=torch.bool)
    for first in range(0, TABLE_SIZE, 1 << 18):  # in chunks, so that the int64 temporaries stay small
        draws = mix_bits_(torch.arange(first, first + (1 << 18)) * GOLDEN + seed_of(seed)).bitwise_and_(2**32 - 1)
        kept[first : first + (1 << 18)] = draws >= round(p * 2**32)
    kept = kept.to(device)
    return kept.to(INT_DTYPES[dtype.itemsize]).neg_(), kept.to(dtype)


@lru_cache(maxsize=4096)
def module_key(module: str) -> int:
    return seed_of(module)


def window_start(key: int, module: str) -> int:
    """Index of a window's first draw: a Fibonacci hash of both keys, scaled to the possible starts."""
    hashed = (key ^ module_key(module)) * GOLDEN & 2**64 - 1
    return ALIGNMENT * (hashed * WINDOWS >> 64)


@dataclass
class TokenMasks:
    """Masks of a batch's N tokens. `branches`: (first token, number of tokens, key) of each branch, without gaps."""

    seed: int
    branches: list[tuple[int, int, int]]
    chosen_M: Tensor | None = None  # indices of the tokens that x holds (None: all)

    def choose(self, chosen_M: Tensor) -> TokenMasks:
        """Masks of a subset of the tokens."""
        return replace(self, chosen_M=chosen_M)

    def windows(self, table: Tensor, module: str, width: int) -> Iterator[tuple[slice, Tensor]]:
        """Yields (slice of tokens, their mask (tokens, width)) for all tokens in order; masks are views of `table`.

        A branch longer than a window has several. The mask of a subset (`choose`) is one tensor, gathered.
        """
        if self.chosen_M is not None:
            masks = [mask_TD for _, mask_TD in replace(self, chosen_M=None).windows(table, module, width)]
            yield slice(None), torch.cat(masks)[self.chosen_M]
            return
        window_tokens = TABLE_SIZE // 2 // width
        for first, length, key in self.branches:
            for offset in range(0, length, window_tokens):
                count = min(window_tokens, length - offset)
                start = window_start(key + offset, module)
                tokens = slice(first + offset, first + offset + count)
                yield tokens, table[start : start + count * width].view(count, width)

    def drop(self, x_ND: Tensor, p: float, module: str) -> Tensor:
        """x with the module's dropped values set to 0; the others are not scaled by 1 / (1 − p)."""
        bits, _ = keep_table(self.seed, p, x_ND.dtype, x_ND.device)
        out_ND = torch.empty_like(x_ND)
        for tokens, mask_TD in self.windows(bits, module, x_ND.shape[1]):
            torch.bitwise_and(x_ND[tokens].view(bits.dtype), mask_TD, out=out_ND[tokens].view(bits.dtype))
        return out_ND

    def add_kept(self, sum_ND: Tensor, g_ND: Tensor, p: float, module: str) -> None:
        """sum += mask · g, in place: the backward pass of `drop`."""
        _, ones = keep_table(self.seed, p, g_ND.dtype, g_ND.device)
        for tokens, mask_TD in self.windows(ones, module, g_ND.shape[1]):
            sum_ND[tokens].addcmul_(g_ND[tokens], mask_TD)


@dataclass
class DropoutPlan:
    """Assigns each token of a batch to a record and branch. Set by `begin`, valid until the next call."""

    seed: int = 0
    step: int = 0
    rows: Sequence[Sequence[tuple[str, int, int]]] = field(default_factory=tuple)
    by_shape: dict[tuple[int, int], TokenMasks] = field(default_factory=dict)  # all modules share a batch's masks

    def begin(self, step: int, rows: Sequence[Sequence[tuple[str, int, int]]]) -> None:
        """Start a batch. `rows`: for each row (record, branch, number of tokens) in order; the rest is padding."""
        self.step, self.rows, self.by_shape = step, rows, {}

    def masks(self, B: int, T: int) -> TokenMasks:
        """Masks of a batch's B · T tokens."""
        if (B, T) not in self.by_shape:
            branches: list[tuple[int, int, int]] = []
            for row in range(B):
                first = row * T
                for record, branch, length in self.rows[row] if row < len(self.rows) else ():
                    branches.append((first, length, seed_of(self.seed, self.step, record, branch)))
                    first += length
                if first < (row + 1) * T:
                    branches.append((first, (row + 1) * T - first, 0))
            self.by_shape[B, T] = TokenMasks(self.seed, branches)
        return self.by_shape[B, T]

    def mask(self, x_BTD: Tensor, p: float, module: str) -> Tensor:
        """(B, T, D) mask of x: 1 / (1 − p) where a value is kept, 0 where it is dropped."""
        B, T, D = x_BTD.shape
        _, ones = keep_table(self.seed, p, x_BTD.dtype, x_BTD.device)
        return torch.cat([mask_TD for _, mask_TD in self.masks(B, T).windows(ones, module, D)]).view(B, T, D) / (1 - p)
