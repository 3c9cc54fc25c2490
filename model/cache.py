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

    `dtype`: stored dtype (default: that of the layers' keys and values). `slack`: slots beyond the window, so that old
    ones are dropped many at a time. `length`: filled slots. `seen`: tokens appended to a row so far.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype | None = None, slack: int = 256) -> None:
        self.window, self.dtype, self.slack = config.window, dtype, slack
        self.keys: list[Tensor | None] = [None] * config.num_hidden_layers
        self.values: list[Tensor | None] = [None] * config.num_hidden_layers
        self.position_BS: Tensor | None = None
        self.document_BS: Tensor | None = None
        self.branch_BS: Tensor | None = None
        self.has_layout = False  # whether any token was appended with a layout
        self.length, self.seen, self.dropped = 0, 0, 0
        self._moved_from, self._new, self._floor = 0, 0, 0

    @property
    def next_position_B1(self) -> Tensor:
        """The position after each row's last, padding aside: where a plain continuation starts."""
        assert self.position_BS is not None and self.document_BS is not None
        live = self.position_BS[:, : self.length].masked_fill(self.document_BS[:, : self.length] < 0, -1)
        return live.max(dim=1, keepdim=True).values + 1

    def extend(self, position_BT: Tensor, layout: Layout | None) -> None:
        """Reserve slots for T new tokens. Every layer then calls `append` once with their keys and values."""
        B, T = position_BT.shape
        if self.position_BS is not None and self.position_BS.shape[0] != B:
            raise ValueError(f"the cache holds {self.position_BS.shape[0]} rows, not {B}")
        self._moved_from = self._first_needed(position_BT, layout) if self._full(T) else 0
        self.has_layout |= layout is not None
        kept = self.length - self._moved_from
        if self._moved_from:
            self._floor = kept
        document_BT = torch.zeros_like(position_BT) if layout is None else layout.document_BT
        branch_BT = torch.zeros_like(position_BT) if layout is None else layout.branch_BT
        for name, new in (("position_BS", position_BT), ("document_BS", document_BT), ("branch_BS", branch_BT)):
            setattr(self, name, self._join(getattr(self, name), new, 1))
        self.length, self.seen, self.dropped = kept + T, self.seen + T, self.dropped + self._moved_from
        self._new = T

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values. Returns all stored ones, (k_BGSK, v_BGSK)."""
        out = []
        for store, new in ((self.keys, k_BGTK), (self.values, v_BGTK)):
            store[layer] = self._join(store[layer], new.to(self.dtype or new.dtype), 2, self.length - self._new)
            out.append(store[layer][:, :, : self.length])  # type: ignore[index]
        return out[0], out[1]

    def bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values) if t is not None)

    def rows(self, index: Tensor) -> None:
        """Select rows: row i becomes the old row index[i]. A row may be repeated or left out."""
        for store in (self.keys, self.values):
            for layer, held in enumerate(store):
                store[layer] = None if held is None else held[index]
        for name in ("position_BS", "document_BS", "branch_BS"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else held[index])

    def truncate(self, length: int) -> None:
        """Drop the slots from `length` on (rejected draft tokens).

        Raises ValueError below the length at which old slots were last dropped: the keys that a token before that
        point sees through the window are no longer stored.
        """
        if not self._floor <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} slots to {length}: the least is {self._floor}")
        self.seen -= self.length - length
        self.length = length

    def _full(self, new: int) -> bool:
        if self.window is None or self.position_BS is None:
            return False
        return self.length + new > self.position_BS.shape[1]

    def _first_needed(self, position_BT: Tensor, layout: Layout | None) -> int:
        """The first slot that some new token can still see through the window."""
        assert self.position_BS is not None and self.document_BS is not None and self.window is not None
        next_B1 = position_BT
        if layout is not None:  # padding sees no key
            next_B1 = position_BT.masked_fill(layout.document_BT < 0, torch.iinfo(torch.int64).max)
        next_B1 = next_B1.min(dim=1, keepdim=True).values
        held = slice(0, self.length)
        needed_BS = (self.position_BS[:, held] > next_B1 - self.window) & (self.document_BS[:, held] >= 0)
        needed_S = needed_BS.any(dim=0)
        return int(needed_S.int().argmax()) if bool(needed_S.any()) else self.length

    def _join(self, held: Tensor | None, new: Tensor, dim: int, kept: int | None = None) -> Tensor:
        """Write `new` after the slots that stay, in a buffer that grows with spare slots."""
        before = self.length if kept is None else kept
        if kept is None:
            before -= self._moved_from
        size = before + new.shape[dim]
        if held is not None and self._moved_from:
            moved = held.narrow(dim, self._moved_from, before).clone()
            held.narrow(dim, 0, before).copy_(moved)
        if held is None or size > held.shape[dim]:
            room = max(size, (self.window + self.slack) if self.window is not None else size + max(size // 2, 64))
            shape = list(new.shape)
            shape[dim] = room
            grown = new.new_zeros(shape)
            if held is not None:
                grown.narrow(dim, 0, before).copy_(held.narrow(dim, 0, before))
            held = grown
        held.narrow(dim, before, new.shape[dim]).copy_(new)
        return held
