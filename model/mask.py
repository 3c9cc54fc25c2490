"""The attention mask, from absolute positions and never from indices. A query at position i sees a key at j if

    they are in one document,  and  the key's branch is 0 (the shared prefix) or the query's,  and  i − W < j ≤ i

so a window of W includes the query itself. Documents share a row when short texts are packed for training. Branches are
continuations of one prefix (a note and its questions) that do not see each other. Padding is document −1.

Worked example: a note "a b c" with two questions "p q" and "r" in one row:

    token     a  b  c  p  q  r
    branch    0  0  0  1  1  2        q sees a b c p q;  r sees a b c r
    position  0  1  2  3  4  3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Document and branch of each token: int64 tensors of shape (B, T). Document −1 is padding.

    `wanted_N`: indices (of B · T) of the tokens whose final hidden state is used; the last layer may skip the others.
    None: all.
    """

    document_BT: Tensor
    branch_BT: Tensor
    wanted_N: Tensor | None = None


class Visible:
    """Which keys each query sees in one forward pass. Masks are built on demand, one per window."""

    def __init__(self, query: tuple[Tensor, Layout | None], key: tuple[Tensor, Layout | None], offset: int) -> None:
        (self.position_BT, self.layout), (self.key_position_BS, self.key_layout) = query, key
        self.offset = offset  # index of the first query among the keys
        self.memo: dict[Any, Any] = {}  # results shared by all layers: masks by window, the fast path's block masks

    def mask(self, window: int | None) -> Tensor:
        """mask_BTS (bool, True: seen), cached for the layers that share the window."""
        if window not in self.memo:
            T, S = self.position_BT.shape[1], self.key_position_BS.shape[1]
            self.memo[window] = self.block(window, slice(0, T), slice(0, S))
        return self.memo[window]

    def block(self, window: int | None, rows: slice, columns: slice) -> Tensor:
        """The mask of these queries (rows) and keys (columns) only."""
        distance_BTS = self.position_BT[:, rows, None] - self.key_position_BS[:, None, columns]
        seen_BTS = distance_BTS >= 0
        if window is not None:
            seen_BTS &= distance_BTS < window
        if self.layout is not None and self.key_layout is not None:
            document_B1S = self.key_layout.document_BT[:, None, columns]
            branch_B1S = self.key_layout.branch_BT[:, None, columns]
            seen_BTS &= self.layout.document_BT[:, rows, None] == document_B1S
            seen_BTS &= (branch_B1S == 0) | (branch_B1S == self.layout.branch_BT[:, rows, None])
        return seen_BTS
