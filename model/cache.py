"""The KV cache: keys and values of past tokens in every layer, bounded by the sliding window.

A slot holds one token of each row. Its position, document and branch are stored beside it, and masks are made from
these. New tokens go into the next slots. When the buffer is full, slots outside the window of every later query
(position ≤ next − W) are evicted and the rest moves to the front, so W + slack slots suffice for text of any length.

Example, W = 4 and 6 slots, one token at a time. After position 5 the slots hold 0 1 2 3 4 5. Position 6 sees 3 4 5 6,
so 0 1 2 are evicted, 3 4 5 move to the front and 6 is appended: 3 4 5 6 · ·
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.mask import Layout, Visible


class KVCache:
    """Keys and values of past tokens, for every layer.

    `slack`: slots beyond the window, so that evictions are rare. `length`: filled slots. `dropped`: tokens evicted.
    """

    def __init__(self, config: ModelConfig, slack: int = 256) -> None:
        self.window, self.slack = config.window, slack
        self.keys: list[Tensor | None] = [None] * config.num_hidden_layers
        self.values: list[Tensor | None] = [None] * config.num_hidden_layers
        self.position_BS: Tensor | None = None
        self.document_BS: Tensor | None = None
        self.branch_BS: Tensor | None = None
        self.has_layout = False  # True once a token was appended with a layout
        self.length, self.dropped = 0, 0
        self._first_kept = 0  # slots before this one were evicted by the last `extend`

    @property
    def next_position_B1(self) -> Tensor:
        """One past each row's largest position, ignoring padding: the default position of the next token."""
        assert self.position_BS is not None and self.document_BS is not None
        is_padding_BS = self.document_BS[:, : self.length] < 0
        position_BS = self.position_BS[:, : self.length].masked_fill(is_padding_BS, -1)
        return position_BS.max(dim=1, keepdim=True).values + 1

    def extend(self, position_BT: Tensor, layout: Layout | None) -> Visible:
        """Reserve slots for T new tokens and return which keys they see. Each layer then calls `append` once."""
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
        filled, new = slice(0, self.length), slice(self.length - T, self.length)
        keys = Layout(self.document_BS[:, filled], self.branch_BS[:, filled])
        queries = Layout(self.document_BS[:, new], self.branch_BS[:, new]) if self.has_layout else None
        return Visible((position_BT, queries), (self.position_BS[:, filled], keys), self.length - T)

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values of the new tokens. Returns those of all tokens: (k_BGSK, v_BGSK)."""
        keys = self._append(self.keys[layer], k_BGTK, dim=2)
        values = self._append(self.values[layer], v_BGTK, dim=2)
        self.keys[layer], self.values[layer] = keys, values
        return keys[:, :, : self.length], values[:, :, : self.length]

    def bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values) if t is not None)

    def _first_needed(self, position_BT: Tensor, layout: Layout) -> int:
        """If the buffer is full, the first slot still inside some new token's window; else 0."""
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
        """Move the kept slots to the front of `buffer`, growing it if needed, and write `new` behind them."""
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
