"""The model with its kernels switched on: blocks are replaced, weights and their names stay.

    fuse(model)                     norm + q, k, v in one launch, norm + gate and up in one, attention from the cache
    fuse(model, four_bit=True)      the same over int4 weights (groups of 128, rounded to the nearest), inference only

A fused block computes what `model.transformer.Block` computes. On a CPU, in fp64, and wherever else a kernel does not
run, the kernels' PyTorch definitions are computed, so a fused model is right everywhere and sooner on CUDA. Nothing is
fused unless somebody calls `fuse`. What stays as it is: experts (Mixtral's), weights that are being trained, adapters
with dropout while training, and attention under autograd, which has no backward kernel.

`infer.Generator` takes a fused model as it is: engine.py computes its blocks by `project`, `add_attention` and
`add_feed_forward`, prefix.py attends over the tree of prompts by `read_attention` and `tree_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import kernels
from lora.layer import LoRALinear
from model.attention import split_heads
from model.cache import KVCache
from model.fast_attention import FastAttend
from model.mask import Visible
from model.transformer import Block, RMSNorm, Transformer

FEW = 64  # queries a row up to which attention is split over the cache (kernels/decode.py)
INT4_GROUP = 128


class Int4Linear(nn.Module):
    """A linear layer kept in 4 bits (layout: kernels/four_bit.py), with the adapter that was active on it.

    A layer that is int4 or nf4 already (model/quantize/linear.py) keeps its codes.
    """

    def __init__(self, linear: nn.Linear, group: int = INT4_GROUP, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        quantized, zeros_OG = getattr(linear, "quantized", None), None
        self.nf4 = quantized is not None and quantized.kind == "nf4"
        if quantized is None:
            packed, scales_OG = to_int4(linear.weight.detach(), group)
        elif self.nf4:
            packed, scales_OG = quantized.codes, quantized.absmax()
        else:
            packed = quantized.codes
            scales_OG, zeros_OG = (steps_GO.t().contiguous() for steps_GO in quantized.scales.unbind(-1))
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
        if linear.quantized is not None or dropped:
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

    @property
    def window(self) -> int | None:
        return self.self_attn.window

    def products(self, x: Tensor) -> Sequence[Tensor]:
        """q, k and v of x (…, D), the norm before them included."""
        own = self.self_attn
        return normed_products(x, self.input_layernorm, [own.q_proj, own.k_proj, own.v_proj])

    def project(self, x_ND: Tensor) -> Tensor:
        """q, k and v side by side."""
        return torch.cat(tuple(self.products(x_ND)), dim=-1)

    def add_attention(self, x: Tensor, out: Tensor) -> Tensor:
        return x + product(out, self.self_attn.o_proj)

    def add_feed_forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "block_sparse_moe"):
            n_BTD = self.post_attention_layernorm(x if x.dim() == 3 else x[None])
            return x + self.block_sparse_moe(n_BTD).view(x.shape)
        gate, up = normed_products(x, self.post_attention_layernorm, [self.mlp.gate_proj, self.mlp.up_proj])
        return x + product(kernels.swiglu(gate, up), self.mlp.down_proj)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], visible: Visible, cache: KVCache | None = None
    ) -> Tensor:
        own = self.self_attn
        q_BHTK, k_BGSK, v_BGSK = (split_heads(out_BTO, own.head_dim) for out_BTO in self.products(x_BTD))
        q_BHTK, k_BGSK = own.rotate_q(q_BHTK, rotary), own.rotate_k(k_BGSK, rotary)
        if cache is not None:
            k_BGSK, v_BGSK = cache.append(own.layer, k_BGSK, v_BGSK)
        out_BHTK = own.attend(q_BHTK, k_BGSK, v_BGSK, visible, own.window)
        x_BTD = self.add_attention(x_BTD, out_BHTK.transpose(1, 2).flatten(2))
        return self.add_feed_forward(x_BTD)


def read_attention(
    q_THK: Tensor, k_GSK: Tensor, v_GSK: Tensor, position: int, key_position_S: Tensor, window: int | None
) -> Tensor:
    """Attention of T tokens of one prompt at positions position, position + 1, … → out_THK."""
    q_1HTK = q_THK.transpose(0, 1)[None]
    k_1GSK, v_1GSK = k_GSK[None].to(q_THK.dtype), v_GSK[None].to(q_THK.dtype)  # a cache may keep them narrower
    place_1T = torch.arange(position, position + len(q_THK), device=q_THK.device)[None]
    return kernels.prefill_attention(q_1HTK, k_1GSK, v_1GSK, place_1T, key_position_S[None], window)[0].transpose(0, 1)


def tree_attention(
    q_NHTK: Tensor, k_NGSK: Tensor, v_NGSK: Tensor, position_NT: Tensor, key_position_NS: Tensor, window: int | None,
    prefixes: Sequence[tuple[slice, Tensor, Tensor, Tensor]],
) -> Tensor:  # fmt: skip
    """Attention of N leaves over their own keys and over their ancestors', each (leaves, k_GPK, v_GPK, position_P)."""
    dtype = q_NHTK.dtype
    k_NGSK, v_NGSK = k_NGSK.to(dtype), v_NGSK.to(dtype)
    if q_NHTK.shape[2] > FEW and not prefixes:  # a prompt that shares nothing is being read
        return kernels.prefill_attention(q_NHTK, k_NGSK, v_NGSK, position_NT, key_position_NS, window)
    held = tuple((rows, k_GPK.to(dtype), v_GPK.to(dtype), position_P) for rows, k_GPK, v_GPK, position_P in prefixes)
    return kernels.decode_attention(q_NHTK, k_NGSK, v_NGSK, position_NT, key_position_NS, window, held)


def fuse(model: Transformer, four_bit: bool = False) -> Transformer:
    """Replace every block by a fused one, in place; returns the model.

    `four_bit` also rounds each block's linear layers to int4 (widths that are no multiple of 128 stay as they are);
    layers that are int4 or nf4 already (model/quantize/linear.py) keep their codes and are computed by the kernels in
    any case. Adapters stay exact beside them, and such a model neither trains nor saves.
    """
    layers = model.model.layers
    for number, block in enumerate(layers):
        fused = block if isinstance(block, FusedBlock) else FusedBlock(block)
        for part in [fused.self_attn] + ([fused.mlp] if hasattr(fused, "mlp") else []):
            for name, linear in list(part.named_children()):
                quantized = getattr(linear, "quantized", None)
                held = quantized is not None and quantized.kind != "int8" and not quantized.packed
                wide = type(linear) in (nn.Linear, LoRALinear) and linear.weight is not None
                if held or (four_bit and wide and linear.in_features % INT4_GROUP == 0):
                    setattr(part, name, Int4Linear(linear, dtype=model.dtype if held else None))
        layers[number] = fused
    return model
