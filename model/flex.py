"""Block-sparse attention on a GPU (FlexAttention, arXiv 2412.05496) for documents, branches and windows.

`mask_mod` is model/mask.py's rule for one pair. It sorts the 128 × 128 blocks of a forward pass once: blocks that are
masked entirely are skipped, and blocks that are visible entirely need no mask. The cost is therefore the number of
visible pairs, up to block edges, in training and in prefill.

FlexAttention is compiled once per shape, so rows are padded to a few lengths (`bucket`). Padding is masked on both
sides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.mask import Layout, Visible

BLOCK = 128  # FlexAttention's default
SHAPES = 256  # that are compiled: up to 64 lengths, times batch sizes


def bucket(length: int) -> int:
    """Padded length of a row: a multiple of BLOCK, at most eight per power of two, at most 1/8 (or a block) longer."""
    step = max(BLOCK, 1 << max((length - 1).bit_length() - 4, 0))
    return -(-length // step) * step


def labels(positions_BT: Tensor, layout: Layout | None, padding: int) -> Tensor:
    """(position, document, branch) of each token, (3, B, bucket(T)), with `padding` after the last token."""
    if layout is None:
        zero_BT = torch.zeros_like(positions_BT)
        layout = Layout(zero_BT, zero_BT)
    label_3BT = torch.stack((positions_BT, layout.document_BT, layout.branch_BT)).int()
    T = positions_BT.shape[1]
    return F.pad(label_3BT, (0, bucket(T) - T), value=padding)


def mask_mod(query_3BT: Tensor, key_3BS: Tensor, window: int | None) -> Callable[..., Tensor]:
    """FlexAttention's mask function (row b, head h, query i, key j) → bool for these labels."""

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = query_3BT[0, b, i] - key_3BS[0, b, j]
        branch = key_3BS[2, b, j]
        seen = (distance >= 0) & (query_3BT[1, b, i] == key_3BS[1, b, j])
        seen = seen & ((branch == 0) | (branch == query_3BT[2, b, i]))
        return seen if window is None else seen & (distance < window)

    return mask


def block_mask(visible: Visible, window: int | None) -> BlockMask:
    """The blocks with visible pairs, made once per forward pass for the layers that share the window."""
    key = ("blocks", window)
    if key not in visible.memo:
        both = visible.layout is not None and visible.key_layout is not None
        query_3BT = labels(visible.position_BT, visible.layout if both else None, -2)  # differs from the keys' padding,
        key_3BS = labels(visible.key_position_BS, visible.key_layout if both else None, -3)  # so that none is visible
        (_, B, T), S = query_3BT.shape, key_3BS.shape[2]
        mask = mask_mod(query_3BT, key_3BS, window)
        visible.memo[key] = create_block_mask(mask, B, None, T, S, device=query_3BT.device, BLOCK_SIZE=BLOCK)
    return visible.memo[key]


@cache
def compiled(backend: Any = "inductor") -> Any:
    """flex_attention, compiled once per shape. Past dynamo's limit of 8 it runs uncompiled, with T × S scores."""
    flex = torch.compile(flex_attention, dynamic=False, backend=backend)
    return torch._dynamo.config.patch(recompile_limit=SHAPES)(flex)


def attend(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    visible: Visible,
    window: int | None,
    flex: Callable[..., Tensor] | None = None,
) -> Tensor:
    """softmax(q kᵀ / √K) v over the visible keys, (B, H, T, K). `flex`: flex_attention (None: compiled)."""
    T, S = q_BHTK.shape[2], k_BGSK.shape[2]
    q_BHTK = F.pad(q_BHTK, (0, 0, 0, bucket(T) - T))
    k_BGSK, v_BGSK = (F.pad(x_BGSK, (0, 0, 0, bucket(S) - S)) for x_BGSK in (k_BGSK, v_BGSK))
    if flex is None:  # already part of a graph under torch.compile
        flex = flex_attention if torch.compiler.is_compiling() else compiled()
    out_BHTK = flex(
        q_BHTK, k_BGSK, v_BGSK, block_mask=block_mask(visible, window), enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1]
    )
    return out_BHTK[:, :, :T]
