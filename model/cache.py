"""The key/value cache: every layer's keys and values of past tokens, bounded by the window.

Each slot holds one token of each row, with its position, document and branch, so that masks need no index arithmetic.
New tokens go into the next slots. When the buffer is full, slots that no later query can see (position ≤ next − W)
are dropped and the rest moves to the front, so a window of W needs W + slack slots however long the text grows.

Worked example, W = 4, 6 slots, tokens one at a time: after position 5 the slots hold 0 1 2 3 4 5. Position 6 sees
3 4 5 6, so 0 1 2 go, 3 4 5 move to the front and 6 follows: 3 4 5 6 · ·
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.mask import Layout


class KVCache:
    """Keys and values of past tokens, for every layer.

    `slack`: slots beyond the window, so that old ones are dropped many at a time. `length`: filled slots. `dropped`:
    tokens whose slots were freed.
    """

    def __init__(self, config: ModelConfig, slack: int = 256) -> None:
        self.window, self.slack = config.window, slack
        self.keys: list[Tensor | None] = [None] * config.num_hidden_layers
        self.values: list[Tensor | None] = [None] * config.num_hidden_layers
        self.position_BS: Tensor | None = None
        self.document_BS: Tensor | None = None
        self.branch_BS: Tensor | None = None
        self.has_layout = False  # whether any token was appended with a layout
        self.length, self.dropped = 0, 0
        self._first_kept = 0  # the slot that moved to the front with the newest tokens

    @property
    def next_position_B1(self) -> Tensor:
        """The position after each row's last, padding aside: where a plain continuation starts."""
        assert self.position_BS is not None and self.document_BS is not None
        is_padding_BS = self.document_BS[:, : self.length] < 0
        position_BS = self.position_BS[:, : self.length].masked_fill(is_padding_BS, -1)
        return position_BS.max(dim=1, keepdim=True).values + 1

    def extend(self, position_BT: Tensor, layout: Layout | None) -> None:
        """Reserve slots for T new tokens. Every layer then calls `append` once with their keys and values."""
        B, T = position_BT.shape
        if self.position_BS is not None and self.position_BS.shape[0] != B:
            raise ValueError(f"the cache holds {self.position_BS.shape[0]} rows, not {B}")
        if layout is None:
            layout = Layout(torch.zeros_like(position_BT), torch.zeros_like(position_BT))
        else:
            self.has_layout = True
        self._first_kept = self._first_needed(position_BT, layout)
        self.length += T - self._first_kept
        self.dropped += self._first_kept
        self.position_BS = self._append(self.position_BS, position_BT, dim=1)
        self.document_BS = self._append(self.document_BS, layout.document_BT, dim=1)
        self.branch_BS = self._append(self.branch_BS, layout.branch_BT, dim=1)

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values. Returns all stored ones, (k_BGSK, v_BGSK)."""
        keys = self._append(self.keys[layer], k_BGTK, dim=2)
        values = self._append(self.values[layer], v_BGTK, dim=2)
        self.keys[layer], self.values[layer] = keys, values
        return keys[:, :, : self.length], values[:, :, : self.length]

    def bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values) if t is not None)

    def _first_needed(self, position_BT: Tensor, layout: Layout) -> int:
        """The first slot that a new token can still see through the window, if the buffer is full; else 0."""
        if self.window is None or self.position_BS is None or self.document_BS is None:
            return 0
        if self.length + position_BT.shape[1] <= self.position_BS.shape[1]:
            return 0
        padding_last_BT = position_BT.masked_fill(layout.document_BT < 0, torch.iinfo(torch.int64).max)
        next_B1 = padding_last_BT.min(dim=1, keepdim=True).values
        filled = slice(0, self.length)
        needed_BS = (self.position_BS[:, filled] > next_B1 - self.window) & (self.document_BS[:, filled] >= 0)
        needed_S = needed_BS.any(dim=0)
        return int(needed_S.int().argmax()) if bool(needed_S.any()) else self.length

    def _append(self, buffer: Tensor | None, new: Tensor, dim: int) -> Tensor:
        """`buffer` with the slots that are kept at its front and `new` after them; one that is too small grows."""
        kept = self.length - new.shape[dim]
        if buffer is not None and self._first_kept:
            buffer.narrow(dim, 0, kept).copy_(buffer.narrow(dim, self._first_kept, kept).clone())
        if buffer is None or self.length > buffer.shape[dim]:
            spare = max(self.length // 2, 64)
            slots = self.length + spare if self.window is None else max(self.length, self.window + self.slack)
            grown = new.new_zeros(*new.shape[:dim], slots, *new.shape[dim + 1 :])
            if buffer is not None:
                grown.narrow(dim, 0, kept).copy_(buffer.narrow(dim, 0, kept))
            buffer = grown
        buffer.narrow(dim, kept, new.shape[dim]).copy_(new)
        return buffer
