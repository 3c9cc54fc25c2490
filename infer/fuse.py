"""The model with its kernels switched on: blocks are replaced, weights and their names stay.

    fuse(model)                     norm + q, k, v in one launch, norm + gate and up in one, attention from the cache
    fuse(model, four_bit=True)      the same over int4 weights (groups of 128, rounded to the nearest), inference only

A fused block computes what `model.transformer.Block` computes. On a CPU, in fp64, and wherever else a kernel does not
run, the kernels' PyTorch definitions are computed, so a fused model is right everywhere and sooner on CUDA. Nothing is
fused unless somebody calls `fuse`. What stays as it is: experts (Mixtral's), weights that are being trained, adapters
with dropout while training, and attention under autograd, which has no backward kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import kernels
from lora.layer import LoRALinear
from model.attention import Attention, Visible, split_heads
from model.cache import KVCache
from model.fast_attention import FastAttend
from model.transformer import Block, RMSNorm, Transformer

FEW = 64  # queries a row up to which attention is split over the cache (kernels/decode.py)
INT4_GROUP = 128


class Int4Linear(nn.Module):
    """A linear layer kept in 4 bits (layout: kernels/four_bit.py), with the adapter that was active on it.

    A layer that is int4 or nf4 already (model/narrow.py) keeps its codes.
    """

    def __init__(self, linear: nn.Linear, group: int = INT4_GROUP, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        narrow, zeros_OG = getattr(linear, "narrow", None), None
        self.nf4 = narrow is not None and narrow.kind == "nf4"
        if narrow is None:
            packed, scales_OG = to_int4(linear.weight.detach(), group)
        elif self.nf4:
            packed, scales_OG = narrow.codes, narrow.absmax()
        else:
            packed = narrow.codes
            scales_OG, zeros_OG = (steps_GO.t().contiguous() for steps_GO in narrow.scales.unbind(-1))
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales_OG", scales_OG, persistent=False)
        self.register_buffer("zeros_OG", zeros_OG, persistent=False)
        self.bias = linear.bias
        self.lora_a, self.lora_b, self.lora_scale = adapter(linear, dtype or linear.weight.dtype)

    def forward(self, x: Tensor, norm: tuple[Tensor, float] | None = None) -> Tensor:
        """x (…, D) → (…, O); with `norm` = (weight_D, eps), of x's RMSNorm."""
        held = (x, self.packed, self.scales_OG, self.lora_a, self.lora_b, self.lora_scale, self.bias)
        if self.nf4:
            return kernels.nf4_lora_linear(*held, norm=norm)
        return kernels.int4_lora_linear(*held, self.zeros_OG, norm)


def to_int4(weight_OD: Tensor, group: int = INT4_GROUP) -> tuple[Tensor, Tensor]:
    """(packed (O, D / 2) uint8, scales_OG fp32): each group's largest magnitude becomes ±7, the rest is rounded."""
    O, D = weight_OD.shape  # noqa: E741 - O is the output width
    groups_OGg = weight_OD.to(torch.float32).view(O, D // group, group)
    scales_OG = groups_OGg.abs().amax(dim=2).clamp_min(1e-30) / 7
    codes_OD = ((groups_OGg / scales_OG[:, :, None]).round() + 8).clamp(0, 15).to(torch.uint8).view(O, D)
    return codes_OD[:, ::2] | (codes_OD[:, 1::2] << 4), scales_OG


def adapter(linear: nn.Module, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, float]:
    """(A, B, scale) of the adapter that is active and not merged, in `dtype`; (None, None, 1) without one."""
    if not isinstance(linear, LoRALinear) or linear.active is None or linear.original is not None:
        return None, None, 1.0
    name = linear.active
    return linear.lora_A[name].to(dtype), linear.lora_B[name].to(dtype), linear.scale[name]


def fusible(linear: nn.Module) -> bool:
    """Whether lora_linear computes this module: a plain or adapted layer, its weight frozen, without dropout now."""
    if type(linear) not in (nn.Linear, LoRALinear):
        return False
    if isinstance(linear, LoRALinear):
        dropped = linear.training and linear.active is not None and linear.dropout[linear.active] > 0
        if linear.narrow is not None or dropped:
            return False
    return not (torch.is_grad_enabled() and linear.weight.requires_grad)


def product(x: Tensor, linear: nn.Module) -> Tensor:
    """linear(x), by the kernel where it can."""
    if not fusible(linear):
        return linear(x)
    return kernels.lora_linear(x, linear.weight, *adapter(linear, x.dtype), linear.bias)


def normed_products(x: Tensor, norm: RMSNorm, linears: Sequence[nn.Module]) -> Sequence[Tensor]:
    """linear(norm(x)) of up to three layers; one launch where all of them allow it."""
    if all(isinstance(linear, Int4Linear) for linear in linears):
        return [linear(x, (norm.weight, norm.eps)) for linear in linears]
    if not all(fusible(linear) for linear in linears):
        n = kernels.rms_norm(x, norm.weight, norm.eps)
        return [product(n, linear) for linear in linears]
    a, b, scales = zip(*(adapter(linear, x.dtype) for linear in linears), strict=True)
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    return kernels.rms_norm_lora_linear(
        x, norm.weight, weights, list(a), list(b), list(scales), norm.eps, biases
    )


class KernelAttend(FastAttend):
    """Attention by the kernels: split over the cache for few queries, by blocks in reach for many."""

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, visible: Visible, window: int | None) -> Tensor:
        k_BGSK, v_BGSK = k_BGSK.to(q_BHTK.dtype), v_BGSK.to(q_BHTK.dtype)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q_BHTK, k_BGSK, v_BGSK)):
            return super().forward(q_BHTK, k_BGSK, v_BGSK, visible, window)
        i, j = visible.position_BT, visible.key_position_BS
        if visible.layout is None or visible.key_layout is None:
            attend = kernels.decode_attention if q_BHTK.shape[2] <= FEW else kernels.prefill_attention
            return attend(q_BHTK, k_BGSK, v_BGSK, i, j, window)
        own, keys = ((layout.document_BT, layout.branch_BT) for layout in (visible.layout, visible.key_layout))
        return kernels.prefill_attention(q_BHTK, k_BGSK, v_BGSK, i, j, window, own, keys)


class FusedBlock(Block):
    """A block's own modules under their own names, computed by kernels."""

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        for name, child in block.named_children():
            self.add_module(name, child)
        self.self_attn.attend = KernelAttend()
        self.training = block.training

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], visible: Visible, cache: KVCache | None = None
    ) -> Tensor:
        x_BTD = x_BTD + self.attention(x_BTD, self.self_attn, rotary, visible, cache)
        if hasattr(self, "block_sparse_moe"):
            return x_BTD + self.block_sparse_moe(self.post_attention_layernorm(x_BTD))
        gate_BTF, up_BTF = normed_products(
            x_BTD, self.post_attention_layernorm, [self.mlp.gate_proj, self.mlp.up_proj]
        )  # fmt: skip
        return x_BTD + product(kernels.swiglu(gate_BTF, up_BTF), self.mlp.down_proj)

    def attention(
        self, x_BTD: Tensor, own: Attention, rotary: tuple[Tensor, Tensor], visible: Visible, cache: KVCache | None
    ) -> Tensor:
        """Attention.forward with the norm before it."""
        three = normed_products(x_BTD, self.input_layernorm, [own.q_proj, own.k_proj, own.v_proj])
        q_BHTK, k_BGSK, v_BGSK = (split_heads(out_BTO, own.head_dim) for out_BTO in three)
        q_BHTK, k_BGSK = own.rotate_q(q_BHTK, rotary), own.rotate_k(k_BGSK, rotary)
        if cache is not None:
            k_BGSK, v_BGSK = cache.append(own.layer, k_BGSK, v_BGSK)
        out_BHTK = own.attend(q_BHTK, k_BGSK, v_BGSK, visible, own.window)
        return product(out_BHTK.transpose(1, 2).flatten(2), own.o_proj)


def fuse(model: Transformer, four_bit: bool = False) -> Transformer:
    """Replace every block by a fused one, in place; returns the model.

    `four_bit` also rounds each block's linear layers to int4 (widths that are no multiple of 128 stay as they are);
    layers that are int4 or nf4 already (model/narrow.py) keep their codes and are computed by the kernels in any case.
    Adapters stay exact beside them, and such a model neither trains nor saves.
    """
    layers = model.model.layers
    for number, block in enumerate(layers):
        fused = block if isinstance(block, FusedBlock) else FusedBlock(block)
        for part in [fused.self_attn] + ([fused.mlp] if hasattr(fused, "mlp") else []):
            for name, linear in list(part.named_children()):
                narrow = getattr(linear, "narrow", None)
                held = narrow is not None and narrow.kind != "int8" and not narrow.packed
                wide = type(linear) in (nn.Linear, LoRALinear) and linear.weight is not None
                if held or (four_bit and wide and linear.in_features % INT4_GROUP == 0):
                    setattr(part, name, Int4Linear(linear, dtype=model.dtype if held else None))
        layers[number] = fused
    return model
