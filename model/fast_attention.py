"""Attention in O(T·W) time and O(T) memory. `PlainAttend` in attention.py is the specification.

* Few queries (decoding): the query heads of a key/value head become rows of one GEMM, so keys are not repeated.
* One document that fits the window: SDPA with `is_causal` and no mask.
* Otherwise on a GPU: FlexAttention (flex.py).
* Otherwise blocks of queries, each against the range of keys that it can see. If positions are contiguous, a block's
  mask depends on distances alone, so one mask serves every block and layer. If not (packed documents, branches,
  padding), the range follows from the block's documents and positions, and packed documents cost the sum of their
  squared lengths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import repeat_kv
from model.mask import Visible


class FastAttend(nn.Module):
    """Same result as PlainAttend up to rounding, via SDPA in blocks."""

    max_grouped = 16  # queries per row up to which `grouped` beats SDPA on a CPU
    max_block = 512  # queries per block: large enough for the GEMM, small enough for the mask
    min_block = 128  # the same if the window is narrow
    max_cached_mask = 2**24  # largest B · T · S whose row-dependent masks are cached for all layers

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, visible: Visible, window: int | None) -> Tensor:
        (H, T), S = q_BHTK.shape[1:3], k_BGSK.shape[2]
        if T <= self.max_grouped:
            return self.grouped(q_BHTK, k_BGSK, v_BGSK, visible.mask(window))
        causal = T == S and (window is None or window >= S) and contiguous(visible)
        if q_BHTK.is_cuda and not causal:
            from model import flex  # imports torch's compiler

            return flex.attend(q_BHTK, k_BGSK, v_BGSK, visible, window)
        k_BHSK, v_BHSK = repeat_kv(k_BGSK, H), repeat_kv(v_BGSK, H)
        if causal:
            return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, is_causal=True)
        blocks = []
        step = self.max_block  # a block can see W + step − 1 keys
        if window is not None:
            step = min(step, max(self.min_block, window // 2))
        for start in range(0, T, step):
            rows = slice(start, min(start + step, T))
            columns = reach(visible, window, rows)
            out_BHtK = F.scaled_dot_product_attention(
                q_BHTK[:, :, rows],
                k_BHSK[:, :, columns],
                v_BHSK[:, :, columns],
                attn_mask=self.bias(visible, window, rows, columns, q_BHTK.dtype),
            )
            blocks.append(out_BHtK.transpose(1, 2))  # SDPA's memory layout, in which o_proj reads it
        return (torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]).transpose(1, 2)

    def bias(self, visible: Visible, window: int | None, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """Additive mask, 0 where a query sees a key and −∞ elsewhere: bias_B1TS, or bias_11TS if all rows share it."""
        shared = contiguous(visible)
        # if shared, the lengths alone determine the mask, because the last query sees the last key
        lengths = (rows.stop - rows.start, columns.stop - columns.start)
        key = ("bias", window, lengths, None if shared else rows.start, dtype)
        if key in visible.memo:
            return visible.memo[key]
        seen_BTS = visible.block(window, rows, columns)[: 1 if shared else None]
        bias_BTS = torch.zeros(seen_BTS.shape, dtype=dtype, device=seen_BTS.device)
        bias_B1TS = bias_BTS.masked_fill_(~seen_BTS, float("-inf"))[:, None]
        B, T = visible.position_BT.shape
        if shared or B * T * visible.key_position_BS.shape[1] <= self.max_cached_mask:
            visible.memo[key] = bias_B1TS
        return bias_B1TS

    def grouped(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_BTS: Tensor) -> Tensor:
        """The query heads of a key/value head as rows of one GEMM, so that keys and values are not repeated."""
        B, H, T, K = q_BHTK.shape
        G = k_BGSK.shape[1]
        q_BGMK = q_BHTK.reshape(B, G, H // G * T, K) * K**-0.5
        score_BGMS = torch.matmul(q_BGMK, k_BGSK.transpose(2, 3))
        score_BGRTS = score_BGMS.view(B, G, H // G, T, -1).masked_fill(~mask_BTS[:, None, None], float("-inf"))
        wide = torch.promote_types(q_BHTK.dtype, torch.float32)
        pattern_BGRTS = F.softmax(score_BGRTS, dim=-1, dtype=wide).to(q_BHTK.dtype)
        return torch.matmul(pattern_BGRTS.view(score_BGMS.shape), v_BGSK).view(B, H, T, K)


def contiguous(visible: Visible) -> bool:
    """True if every row is one document with positions p, p + 1, p + 2, … Computed once per forward pass."""
    if visible.layout is not None or torch.compiler.is_compiling():
        return False
    if "contiguous" not in visible.memo:
        j_BS = visible.key_position_BS  # includes the queries' positions
        steps_S = torch.arange(j_BS.shape[1], device=j_BS.device)
        visible.memo["contiguous"] = bool((j_BS - j_BS[:, :1] == steps_S).all())
    return visible.memo["contiguous"]


def reach(visible: Visible, window: int | None, rows: slice) -> slice:
    """Smallest range of keys that includes every key seen by these queries (all keys under torch.compile)."""
    S = visible.key_position_BS.shape[1]
    if torch.compiler.is_compiling():  # a range that depends on tensor values would break the graph
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
        first, last = (f(near_BS.any(dim=0).nonzero()) for f in (torch.amin, torch.amax))  # never empty: i sees itself
        visible.memo[key] = slice(int(first), int(last) + 1)
    return visible.memo[key]
