"""Causal attention of one prompt's prefill, over earlier keys and its own, with an optional sliding window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.support.hardware import has_amx

BLOCK = 512  # queries per SDPA call
PRODUCT_BLOCK = 128  # queries per explicit product, which materializes the scores


def causal(
    q_HTK: Tensor,
    k_GSK: Tensor,
    v_GSK: Tensor,
    position: int,
    key_position_S: Tensor,
    window: int | None,
    block_size: int = BLOCK,
) -> Tensor:
    """Attention of T queries at positions position, position + 1, … → out_THK, in blocks of queries.

    `key_position_S` is ascending and on the host; the last T keys are the queries' own. bf16 on a CPU without AMX uses
    explicit matrix products: they use the CPU's bf16 instructions and take half the time of SDPA, which multiplies in
    fp32 there. With AMX SDPA takes a third of the products' time.
    """
    T, S = q_HTK.shape[1], len(key_position_S)
    if S == T and (window is None or window >= T) and not uses_products(q_HTK):
        k_1GSK, v_1GSK = (kept_GSK[None].to(q_HTK.dtype) for kept_GSK in (k_GSK, v_GSK))
        q_1HTK = q_HTK[None].contiguous()
        out_1HTK = F.scaled_dot_product_attention(q_1HTK, k_1GSK, v_1GSK, is_causal=True, enable_gqa=True)
        return out_1HTK[0].transpose(0, 1)
    outs = []
    size = PRODUCT_BLOCK if uses_products(q_HTK) else block_size
    for start in range(0, T, size):
        stop = min(start + size, T)
        query_T1 = torch.arange(position + start, position + stop, device=q_HTK.device)[:, None]
        begin = 0 if window is None else int((key_position_S <= position + start - window).sum())
        held = slice(begin, S - T + stop)
        held_S = key_position_S[held].to(q_HTK.device)
        seen_TS = held_S <= query_T1
        if window is not None:
            seen_TS &= held_S > query_T1 - window
        outs.append(block(q_HTK[:, start:stop], k_GSK[:, held], v_GSK[:, held], seen_TS))
    return torch.cat(outs, dim=1).transpose(0, 1)


def uses_products(q_HTK: Tensor) -> bool:
    """True if explicit matrix products are used instead of SDPA: bf16 on a CPU without AMX."""
    return q_HTK.dtype == torch.bfloat16 and q_HTK.device.type == "cpu" and not has_amx()


def block(q_HTK: Tensor, k_GSK: Tensor, v_GSK: Tensor, seen_TS: Tensor) -> Tensor:
    """Attention of one block of queries → out_HTK."""
    (H, T, K), (G, S, _) = q_HTK.shape, k_GSK.shape
    k_GSK, v_GSK = k_GSK.to(q_HTK.dtype), v_GSK.to(q_HTK.dtype)  # the cache may have a narrower dtype
    if not uses_products(q_HTK):
        q_1HTK, k_1GSK, v_1GSK = q_HTK[None].contiguous(), k_GSK[None], v_GSK[None]
        return F.scaled_dot_product_attention(q_1HTK, k_1GSK, v_1GSK, attn_mask=seen_TS, enable_gqa=True)[0]
    q_GMK = (q_HTK * K**-0.5).reshape(G, H // G * T, K)
    score_HTS = torch.matmul(q_GMK, k_GSK.transpose(1, 2)).view(H, T, S)
    # if the window does not hide the first key from the last query, only the block's own keys need the mask
    first = S - T if bool(seen_TS[-1, 0]) else 0
    score_HTS[..., first:].masked_fill_(~seen_TS[:, first:], float("-inf"))
    weight_HTS = score_HTS.softmax(-1)  # computed in fp32, rounded once
    return torch.matmul(weight_HTS.view(G, H // G * T, S), v_GSK).view(H, T, K)
