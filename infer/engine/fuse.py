"""A model's blocks on the Triton kernels; weights and their names stay.

    fuse(model)                  norm with q, k, v, and norm with gate, up and SwiGLU, in two launches each
    fuse(model, four_bit=True)   the same with int4 weights (model/quantize's int4-64), inference only

A fused block computes what `model.transformer.Block` computes. Where a kernel does not run (CPU, fp64), its PyTorch
definition does. Not fused: experts (Mixtral), int8 and nf4 layers, adapters with dropout in training. Attention with
many queries, packed documents or autograd is torch's SDPA.

`infer.Generator` runs a fused model by the blocks' `project`, `add_attention` and `add_feed_forward` (forward.py) and
by `read_attention` and `tree_attention` (cache.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels.attention import mask_from_positions
from lora.layer import LoRALinear
from model.attention import repeat_kv, split_heads
from model.cache import KVCache
from model.fast_attention import FastAttend
from model.mask import Visible
from model.quantize.linear import QuantizedWeight
from model.transformer import Block, RMSNorm, Transformer

SPLIT = 64  # maximum number of queries per row for split-KV attention (kernels/attention.py)
INT4 = "int4-64"
INT4_WIDTH = 64  # columns per group of the kernel's layout


class Int4Linear(nn.Module):
    """A linear layer with int4 weights in the kernel's layout, and its active adapter."""

    words: Tensor
    scales_GO: Tensor
    zeros_GO: Tensor

    def __init__(self, linear: nn.Linear, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        quantized = getattr(linear, "quantized", None)
        if quantized is None:
            wide = linear.weight.detach()
            quantized = QuantizedWeight.quantize([wide], tuple(wide.shape), INT4)
        weight = kernels.repack_int4(quantized.codes, quantized.scales)
        self.register_buffer("words", weight.words, persistent=False)
        self.register_buffer("scales_GO", weight.scales_GO, persistent=False)
        self.register_buffer("zeros_GO", weight.zeros_GO, persistent=False)
        self.bias = linear.bias
        self.adapter = adapter(linear, dtype or linear.weight.dtype)

    @property
    def weight(self) -> kernels.Int4Weight:
        return kernels.Int4Weight(self.words, self.scales_GO, self.zeros_GO)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x (…, D) → (…, O)."""
        return kernels.int4_linear(x, self.weight, *self.adapter, self.bias, residual=residual)


def adapter(linear: nn.Module, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, float]:
    """(A, B, scale) of the active, unmerged adapter in `dtype`; (None, None, 1) if there is none."""
    if not isinstance(linear, LoRALinear) or linear.active is None or linear.original is not None:
        return None, None, 1.0
    name = linear.active
    return linear.lora_A[name].to(dtype), linear.lora_B[name].to(dtype), linear.scale[name]


def fusible(linear: nn.Module) -> bool:
    """True if kernels.lora_linear can compute this module: unquantized, and without active dropout."""
    if type(linear) not in (nn.Linear, LoRALinear):
        return False
    if isinstance(linear, LoRALinear):
        dropped = linear.training and linear.active is not None and linear.dropout[linear.active] > 0
        return linear.quantized is None and not dropped
    return True


def add_product(residual: Tensor, x: Tensor, linear: nn.Module) -> Tensor:
    """residual + linear(x), fused if possible."""
    if isinstance(linear, Int4Linear):
        return linear(x, residual)
    if not fusible(linear):
        return residual + linear(x)
    return kernels.lora_linear(x, linear.weight, *adapter(linear, x.dtype), linear.bias, residual)


def normed_products(x: Tensor, norm: RMSNorm, linears: Sequence[nn.Module], gated: bool = False) -> Sequence[Tensor]:
    """linear(norm(x)) of up to three layers, in one kernel if all are fusible; `gated`: [silu(first) · second]."""
    biases = [linear.bias for linear in linears]
    if all(isinstance(linear, Int4Linear) for linear in linears):
        a, b, scales = (list(part) for part in zip(*(linear.adapter for linear in linears), strict=True))
        normed = (norm.weight, norm.eps)
        weights = [linear.weight for linear in linears]
        outs = kernels.int4_linear(x, weights, a, b, scales, biases, normed, gated=gated)
    elif all(fusible(linear) for linear in linears):
        a, b, scales = (list(part) for part in zip(*(adapter(linear, x.dtype) for linear in linears), strict=True))
        weights = [linear.weight for linear in linears]
        outs = kernels.rms_norm_lora_linear(x, norm.weight, weights, a, b, scales, norm.eps, biases, gated)
    else:
        n = kernels.rms_norm(x, norm.weight, norm.eps)
        outs = [linear(n) for linear in linears]
        return [kernels.swiglu(*outs)] if gated else outs
    return [outs] if gated else outs


class KernelAttend(FastAttend):
    """Split-KV kernel for few queries; FastAttend for many queries, packed documents and training."""

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, visible: Visible, window: int | None) -> Tensor:
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q_BHTK, k_BGSK, v_BGSK))
        packed = visible.layout is not None and visible.key_layout is not None
        if needs_grad or packed or q_BHTK.shape[2] > SPLIT:
            return super().forward(q_BHTK, k_BGSK, v_BGSK, visible, window)
        k_BGSK, v_BGSK = k_BGSK.to(q_BHTK.dtype), v_BGSK.to(q_BHTK.dtype)
        return kernels.tree_attention(q_BHTK, k_BGSK, v_BGSK, visible.position_BT, visible.key_position_BS, window)


class FusedBlock(Block):
    """A block computed by kernels, with the same modules under the same names."""

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
        """q, k and v of x (…, D), with the input norm."""
        own = self.self_attn
        return normed_products(x, self.input_layernorm, [own.q_proj, own.k_proj, own.v_proj])

    def project(self, x_ND: Tensor) -> Tensor:
        """q, k and v of x_ND, concatenated."""
        return torch.cat(tuple(self.products(x_ND)), dim=-1)

    def add_attention(self, x: Tensor, out: Tensor) -> Tensor:
        return add_product(x, out, self.self_attn.o_proj)

    def add_feed_forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "block_sparse_moe"):
            n_BTD = self.post_attention_layernorm(x if x.dim() == 3 else x[None])
            return x + self.block_sparse_moe(n_BTD).view(x.shape)
        gate_up = [self.mlp.gate_proj, self.mlp.up_proj]
        (hidden,) = normed_products(x, self.post_attention_layernorm, gate_up, gated=True)
        return add_product(x, hidden, self.mlp.down_proj)

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


def masked_attention(
    q_NHTK: Tensor, k_NGSK: Tensor, v_NGSK: Tensor, position_NT: Tensor, key_position_NS: Tensor, window: int | None
) -> Tensor:
    """torch's SDPA with a mask from absolute positions; key positions of −1 are padding."""
    seen_NTS = mask_from_positions(position_NT, key_position_NS, window)
    k_NHSK, v_NHSK = (repeat_kv(kept.to(q_NHTK.dtype), q_NHTK.shape[1]) for kept in (k_NGSK, v_NGSK))
    return F.scaled_dot_product_attention(q_NHTK, k_NHSK, v_NHSK, attn_mask=seen_NTS[:, None])


def read_attention(
    q_THK: Tensor, k_GSK: Tensor, v_GSK: Tensor, position: int, key_position_S: Tensor, window: int | None
) -> Tensor:
    """Attention of T tokens of one prompt at positions position, position + 1, … → out_THK."""
    q_1HTK = q_THK.transpose(0, 1)[None]
    position_1T = torch.arange(position, position + len(q_THK), device=q_THK.device)[None]
    out_1HTK = masked_attention(q_1HTK, k_GSK[None], v_GSK[None], position_1T, key_position_S[None], window)
    return out_1HTK[0].transpose(0, 1)


def tree_attention(
    q_NHTK: Tensor,
    k_NGSK: Tensor,
    v_NGSK: Tensor,
    position_NT: Tensor,
    key_position_NS: Tensor,
    window: int | None,
    levels: Sequence[kernels.Level],
) -> Tensor:
    """Attention of N branches over their own keys and the levels of prefixes above them, one launch per level."""
    dtype = q_NHTK.dtype
    if q_NHTK.shape[2] > SPLIT and not levels:  # prefill of prompts without a common prefix
        return masked_attention(q_NHTK, k_NGSK, v_NGSK, position_NT, key_position_NS, window)
    levels = [replace(level, k_MGPK=level.k_MGPK.to(dtype), v_MGPK=level.v_MGPK.to(dtype)) for level in levels]
    k_NGSK, v_NGSK = k_NGSK.to(dtype), v_NGSK.to(dtype)
    return kernels.tree_attention(q_NHTK, k_NGSK, v_NGSK, position_NT, key_position_NS, window, levels)


def fuse(model: Transformer, four_bit: bool = False) -> Transformer:
    """Replaces every block by a fused one, in place; returns the model.

    int4 layers (model/quantize/linear.py) are repacked for the kernel; int8 and nf4 layers are called as they are.
    `four_bit` also quantizes the blocks' other linear layers to int4, if their width is a multiple of 64. Adapters stay
    unmerged. A model with int4 layers can neither train nor be saved.
    """
    layers = model.model.layers
    for number, block in enumerate(layers):
        fused = block if isinstance(block, FusedBlock) else FusedBlock(block)
        for part in [fused.self_attn] + ([fused.mlp] if hasattr(fused, "mlp") else []):
            for name, linear in list(part.named_children()):
                if not isinstance(linear, nn.Linear):
                    continue
                quantized = getattr(linear, "quantized", None)
                is_int4 = quantized is not None and quantized.kind == "int4" and not quantized.packed
                wide = type(linear) in (nn.Linear, LoRALinear) and quantized is None and linear.weight is not None
                if (is_int4 or (four_bit and wide)) and linear.in_features % INT4_WIDTH == 0:
                    setattr(part, name, Int4Linear(linear, dtype=model.dtype if is_int4 else None))
        layers[number] = fused
    return model
