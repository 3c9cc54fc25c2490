"""Attention in O(T·W) time and O(T) memory. `PlainAttend` in attention.py is the specification.

* A few queries (decoding): all query heads of a key/value head are rows of one product, so nothing is copied.
* One document within the window: SDPA with `is_causal`, without a mask.
* Otherwise on a GPU: FlexAttention (flex.py).
* Otherwise blocks of queries against the range of keys that they can see. Where positions are contiguous, a block's
  mask depends on distances alone, so one mask serves every block of every layer. Elsewhere (packed documents,
  branches, padding) the range comes from the block's documents and positions: packed documents cost the sum of their
  squares.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import repeat_kv
from model.mask import Visible

BLOCK = 512  # queries at once: large enough for the matrix product, small enough for the mask
LEAST = 128  # queries at once with a narrow window
KEPT = 2**24  # largest B · T · S for which masks that differ between rows are kept for all layers


class FastAttend(nn.Module):
    """Same result as PlainAttend up to rounding, via SDPA in blocks."""

    few = 16  # up to so many queries a row, one grouped product beats the fused kernel on a CPU

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, visible: Visible, window: int | None) -> Tensor:
        (H, T), S = q_BHTK.shape[1:3], k_BGSK.shape[2]
        if T <= self.few:
            return self.grouped(q_BHTK, k_BGSK, v_BGSK, visible.mask(window))
        whole = T == S and (window is None or window >= S) and contiguous(visible)
        if q_BHTK.is_cuda and not whole:
            from model import flex  # its import loads torch's compiler

            return flex.attend(q_BHTK, k_BGSK, v_BGSK, visible, window)
        k_BHSK, v_BHSK = repeat_kv(k_BGSK, H), repeat_kv(v_BGSK, H)
        if whole:
            return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, is_causal=True)
        blocks = []
        step = BLOCK if window is None else min(BLOCK, max(LEAST, window // 2))  # keys in reach: W + step − 1
        for start in range(0, T, step):
            rows = slice(start, min(start + step, T))
            columns = reach(visible, window, rows)
            out_BHtK = F.scaled_dot_product_attention(
                q_BHTK[:, :, rows],
                k_BHSK[:, :, columns],
                v_BHSK[:, :, columns],
                attn_mask=bias(visible, window, rows, columns, q_BHTK.dtype),
            )
            blocks.append(out_BHtK.transpose(1, 2))  # the layout that SDPA writes and o_proj reads
        return (torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]).transpose(1, 2)

    def grouped(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_BTS: Tensor) -> Tensor:
        """All query heads of a key/value head as rows of one product: no copy of keys or values."""
        B, H, T, K = q_BHTK.shape
        G = k_BGSK.shape[1]
        q_BGMK = q_BHTK.reshape(B, G, H // G * T, K) * K**-0.5
        score_BGMS = torch.matmul(q_BGMK, k_BGSK.transpose(2, 3))
        score_BGRTS = score_BGMS.view(B, G, H // G, T, -1).masked_fill(~mask_BTS[:, None, None], float("-inf"))
        wide = torch.promote_types(q_BHTK.dtype, torch.float32)
        pattern_BGRTS = F.softmax(score_BGRTS, dim=-1, dtype=wide).to(q_BHTK.dtype)
        return torch.matmul(pattern_BGRTS.view(score_BGMS.shape), v_BGSK).view(B, H, T, K)


def contiguous(visible: Visible) -> bool:
    """Whether every row is one document whose positions rise by one with the index. Computed once a forward pass."""
    if visible.layout is not None or torch.compiler.is_compiling():
        return False
    if "contiguous" not in visible.memo:
        j_BS = visible.key_position_BS  # the queries are the last of the keys
        steps_S = torch.arange(j_BS.shape[1], device=j_BS.device)
        visible.memo["contiguous"] = bool((j_BS - j_BS[:, :1] == steps_S).all())
    return visible.memo["contiguous"]


def reach(visible: Visible, window: int | None, rows: slice) -> slice:
    """A range of keys that includes every key seen by these queries."""
    S = visible.key_position_BS.shape[1]
    if torch.compiler.is_compiling():  # a range computed from tensors would break the graph
        return slice(0, S)
    if contiguous(visible):
        first = 0 if window is None else max(0, visible.offset + rows.start - window + 1)
        return slice(first, visible.offset + rows.stop)
    key = ("reach", window, rows.start, rows.stop)
    if key not in visible.memo:
        i_BT, j_BS = visible.position_BT[:, rows], visible.key_position_BS
        near_BS = j_BS <= i_BT.amax(1, keepdim=True)
        if window is not None:
            near_BS &= j_BS > i_BT.amin(1, keepdim=True) - window
        if visible.layout is not None and visible.key_layout is not None:
            d_BT, d_BS = visible.layout.document_BT[:, rows], visible.key_layout.document_BT
            near_BS &= (d_BS >= d_BT.amin(1, keepdim=True)) & (d_BS <= d_BT.amax(1, keepdim=True))
        first, last = (f(near_BS.any(dim=0).nonzero()) for f in (torch.amin, torch.amax))  # a query sees itself
        visible.memo[key] = slice(int(first), int(last) + 1)
    return visible.memo[key]


def bias(visible: Visible, window: int | None, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a key and −∞ elsewhere: bias_B1TS, or bias_11TS where it depends on distances alone."""
    alike = contiguous(visible)
    # contiguous: the lengths alone determine the mask, as the last query sees the last key
    key = ("bias", window, rows.stop - rows.start, columns.stop - columns.start, None if alike else rows.start, dtype)
    if key in visible.memo:
        return visible.memo[key]
    seen_BTS = visible.block(window, rows, columns)[: 1 if alike else None]
    made = torch.zeros(seen_BTS.shape, dtype=dtype, device=seen_BTS.device).masked_fill_(~seen_BTS, float("-inf"))
    B, T = visible.position_BT.shape
    if alike or B * T * visible.key_position_BS.shape[1] <= KEPT:
        visible.memo[key] = made[:, None]
    return made[:, None]
