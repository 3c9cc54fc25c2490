"""A block for training adapters with a hand-written backward pass: the plain block's numbers in less time and memory.

`fast_blocks(model)` puts one in every block's place; weights, adapters and their names stay. What it saves:

- kept for the backward pass are a half-block's input, q, k, v, the attention's result, gate and up, and each adapter's
  (N, R) product. The norm's result and silu(gate) · up are made again (a few passes over memory, no product);
- gradients of layers that read the same input are added up in the products themselves (addmm into one tensor);
- attention computes little more than the pairs that see each other (attend.py).

Products and their number are the plain block's: 2 FLOP a weight and token forward, 2 backward, none for frozen weights'
gradients, none below the first adapter. With y = n Wᵀ + s (n Aᵀ) Bᵀ, l = s n Aᵀ and gradient g of y:

    dn = g W + s (g B) A        dB = gᵀ l        dA = s (g B)ᵀ n

Experts, weights in training and dropout in training keep the plain block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infer.engine.fuse import fuse as kernel_blocks
from lora.layer import LoRALinear
from model.attention import Attention, split_heads
from model.cache import KVCache
from model.mask import Visible
from model.support.hardware import product, suits_onednn
from model.transformer import Block, RMSNorm, Transformer
from train.fast.attention import SegmentAttend


def matrix(linear: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The frozen weight, widened for one product where it is quantized."""
    quantized = getattr(linear, "quantized", None)
    return linear.weight if quantized is None else quantized.dequantize(dtype)


def adapters(linears: Sequence[nn.Linear]) -> list[Tensor | None]:
    """[A, B, A, B, …] of the active adapters; None for a layer without one."""
    made: list[Tensor | None] = []
    for linear in linears:
        if isinstance(linear, LoRALinear) and linear.active is not None and linear.original is None:
            made += [linear.lora_A[linear.active], linear.lora_B[linear.active]]
        else:
            made += [None, None]
    return made


class Adapted:
    """One linear layer's arithmetic inside a hand-written pass."""

    def __init__(self, linear: nn.Linear, a_RD: Tensor | None, b_OR: Tensor | None) -> None:
        self.linear, self.a_RD, self.b_OR = linear, a_RD, b_OR
        self.scale = linear.scale[linear.active] if a_RD is not None else 0.0  # type: ignore[index]

    def forward(self, n_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """(y_NO, the adapter's scaled product low_NR)."""
        y_NO = product(n_ND, matrix(self.linear, n_ND.dtype), self.linear.bias)
        if self.a_RD is None or self.b_OR is None:
            return y_NO, None
        low_NR = F.linear(n_ND, self.a_RD.to(n_ND.dtype)).mul_(self.scale)
        return y_NO.addmm_(low_NR, self.b_OR.to(n_ND.dtype).t()), low_NR

    def backward(
        self, g_NO: Tensor, n_ND: Tensor, low_NR: Tensor | None, dn_ND: Tensor | None, wants: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dn with this layer's part added where it is wanted, dA, dB)."""
        da_RD = db_OR = None
        if wants:
            weight_OD = matrix(self.linear, g_NO.dtype)
            if dn_ND is None or suits_onednn(g_NO, weight_OD):
                part_ND = product(g_NO, weight_OD.t())
                dn_ND = part_ND if dn_ND is None else dn_ND.add_(part_ND)
            else:
                dn_ND.addmm_(g_NO, weight_OD)
        if self.a_RD is not None and self.b_OR is not None and low_NR is not None:
            dlow_NR = (g_NO @ self.b_OR.to(g_NO.dtype)).mul_(self.scale)
            db_OR, da_RD = (g_NO.t() @ low_NR).to(self.b_OR.dtype), (dlow_NR.t() @ n_ND).to(self.a_RD.dtype)
            if dn_ND is not None:
                dn_ND.addmm_(dlow_NR, self.a_RD.to(g_NO.dtype))
        return dn_ND, da_RD, db_OR


def normed(x_ND: Tensor, norm: RMSNorm | None) -> tuple[Tensor, Any]:
    """(RMSNorm of x, 1/root mean square of each row); x itself without a norm."""
    if norm is None:
        return x_ND, None
    wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    inverse_N1 = torch.rsqrt(wide_ND.pow(2).mean(-1, keepdim=True) + norm.eps)
    return norm.weight * (wide_ND * inverse_N1).to(x_ND.dtype), inverse_N1


def norm_backward(dn_ND: Tensor, x_ND: Tensor, norm: RMSNorm, inverse_N1: Tensor) -> Tensor:
    """dx = (h − x̂ · mean(h · x̂)) / rms, with h = dn · weight and x̂ = x / rms."""
    wide = inverse_N1.dtype
    unit_ND, h_ND = x_ND.to(wide) * inverse_N1, (dn_ND * norm.weight).to(wide)
    mean_N1 = (h_ND * unit_ND).mean(-1, keepdim=True)
    return h_ND.sub_(unit_ND.mul_(mean_N1)).mul_(inverse_N1).to(x_ND.dtype)


class Products(torch.autograd.Function):
    """linear(norm(x)) of several layers that read one input; with `residual`, one layer's result plus that."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        residual_ND: Tensor | None,
        norm: RMSNorm | None,
        linears: Sequence[nn.Linear],
        *held: Tensor | None,
    ) -> tuple[Tensor, ...]:
        n_ND, inverse_N1 = normed(x_ND, norm)
        layers = [Adapted(*part) for part in zip(linears, held[::2], held[1::2], strict=True)]
        results, lows = zip(*(layer.forward(n_ND) for layer in layers), strict=True)
        if residual_ND is not None:
            results[0].add_(residual_ND)
        ctx.norm, ctx.linears, ctx.held = norm, linears, held
        ctx.save_for_backward(x_ND, inverse_N1, *lows)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        x_ND, _, *lows = ctx.saved_tensors
        n_ND, inverse_N1 = normed(x_ND, ctx.norm)
        layers = [Adapted(*part) for part in zip(ctx.linears, ctx.held[::2], ctx.held[1::2], strict=True)]
        dn_ND, wants, made = None, ctx.needs_input_grad[0], []
        for layer, g_NO, low_NR in zip(layers, grads, lows, strict=True):
            dn_ND, da_RD, db_OR = layer.backward(g_NO, n_ND, low_NR, dn_ND, wants)
            made += [da_RD, db_OR]
        dx_ND = dn_ND
        if dn_ND is not None and inverse_N1 is not None:
            dx_ND = norm_backward(dn_ND, x_ND, ctx.norm, inverse_N1)
        return dx_ND, grads[0] if ctx.needs_input_grad[1] else None, None, None, *made


class FeedForward(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) · up(norm(x)))."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, norm: RMSNorm, linears: Sequence[nn.Linear], *held: Tensor | None) -> Tensor:
        n_ND, _ = normed(x_ND, norm)
        gate, up, down = (Adapted(*part) for part in zip(linears, held[::2], held[1::2], strict=True))
        (gate_NF, low_gate), (up_NF, low_up) = gate.forward(n_ND), up.forward(n_ND)
        y_ND, low_down = down.forward(F.silu(gate_NF).mul_(up_NF))
        ctx.norm, ctx.linears, ctx.held = norm, linears, held
        ctx.save_for_backward(x_ND, gate_NF, up_NF, low_gate, low_up, low_down)
        return y_ND.add_(x_ND)

    @staticmethod
    def backward(ctx: Any, g_ND: Tensor) -> Any:  # type: ignore[override]
        x_ND, gate_NF, up_NF, low_gate, low_up, low_down = ctx.saved_tensors
        gate, up, down = (Adapted(*part) for part in zip(ctx.linears, ctx.held[::2], ctx.held[1::2], strict=True))
        on_NF = F.silu(gate_NF)
        dh_NF, da_down, db_down = down.backward(g_ND, on_NF * up_NF, low_down, None, True)
        assert dh_NF is not None
        d_up_NF = on_NF.mul_(dh_NF)
        d_gate_NF = torch.ops.aten.silu_backward(dh_NF.mul_(up_NF), gate_NF)
        n_ND, inverse_N1 = normed(x_ND, ctx.norm)
        wants = ctx.needs_input_grad[0]
        dn_ND, da_gate, db_gate = gate.backward(d_gate_NF, n_ND, low_gate, None, wants)
        dn_ND, da_up, db_up = up.backward(d_up_NF, n_ND, low_up, dn_ND, wants)
        dx_ND = norm_backward(dn_ND, x_ND, ctx.norm, inverse_N1).add_(g_ND) if dn_ND is not None else None
        return dx_ND, None, None, da_gate, db_gate, da_up, db_up, da_down, db_down


class Turn(torch.autograd.Function):
    """Rotary positions on (B, H, T, K); backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x_BHTK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTK, sin_BTK)
        return turned(x_BHTK, cos_BTK, sin_BTK, 1)

    @staticmethod
    def backward(ctx: Any, grad_BHTK: Tensor) -> Any:  # type: ignore[override]
        cos_BTK, sin_BTK = ctx.saved_tensors
        return turned(grad_BHTK, cos_BTK, sin_BTK, -1), None, None


def turned(x_BHTK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor, sign: int) -> Tensor:
    half = x_BHTK.shape[-1] // 2
    out_BHTK, sin_B1TK = x_BHTK * cos_BTK[:, None], sin_BTK[:, None]
    out_BHTK[..., :half].addcmul_(x_BHTK[..., half:], sin_B1TK[..., :half], value=-sign)
    out_BHTK[..., half:].addcmul_(x_BHTK[..., :half], sin_B1TK[..., half:], value=sign)
    return out_BHTK


class FastBlock(Block):
    """A block's own modules under their own names, computed by the functions above."""

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        for name, child in block.named_children():
            self.add_module(name, child)
        self.self_attn.attend = SegmentAttend()
        self.training = block.training

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], visible: Visible, cache: KVCache | None = None
    ) -> Tensor:
        own, mlp = self.self_attn, self.mlp
        linears = [own.q_proj, own.k_proj, own.v_proj, own.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        if cache is not None or any(drops(linear) for linear in linears):
            return super().forward(x_BTD, rotary, visible, cache)
        x_ND = x_BTD.flatten(0, 1)
        x_ND = self.attention(x_ND, x_BTD.shape, own, rotary, visible)
        x_ND = FeedForward.apply(x_ND, self.post_attention_layernorm, linears[4:], *adapters(linears[4:]))
        # as torch's own matmul gives its result another shape: FSDP2 warns of a block whose result is a view
        return torch.ops.aten._unsafe_view(x_ND, x_BTD.shape)

    def attention(
        self, x_ND: Tensor, shape: torch.Size, own: Attention, rotary: tuple[Tensor, Tensor], visible: Visible
    ) -> Tensor:
        """x + Attention(norm(x))."""
        three = [own.q_proj, own.k_proj, own.v_proj]
        made = Products.apply(x_ND, None, self.input_layernorm, three, *adapters(three))
        q_BHTK, k_BGTK, v_BGTK = (split_heads(y_NO.view(*shape[:2], -1), own.head_dim) for y_NO in made)
        q_BHTK, k_BGTK = Turn.apply(q_BHTK, *rotary), Turn.apply(k_BGTK, *rotary)
        out_BHTK = own.attend(q_BHTK, k_BGTK, v_BGTK, visible, own.window)
        out_ND = out_BHTK.transpose(1, 2).flatten(2).flatten(0, 1)
        return Products.apply(out_ND, x_ND, None, [own.o_proj], *adapters([own.o_proj]))[0]


def drops(linear: nn.Module) -> bool:
    """Whether this layer's adapter drops some of its inputs now."""
    if not isinstance(linear, LoRALinear) or not linear.training or linear.active is None:
        return False
    return linear.original is None and linear.dropout[linear.active] > 0


def fast_blocks(model: Transformer) -> Transformer:
    """Replace the blocks of a model whose adapters train by fast ones, in place; returns the model."""
    for number, block in enumerate(model.model.layers):
        frozen = all(not p.requires_grad for name, p in block.named_parameters() if "lora_" not in name)
        if type(block) is Block and frozen and hasattr(block, "mlp"):
            model.model.layers[number] = FastBlock(block)
    return model


def training_blocks(model: Transformer, fuse: bool = False) -> Transformer:
    """The blocks that train, in the plain ones' place: the GPU's kernels (infer/engine/fuse.py), or the ones of this
    file."""
    return kernel_blocks(model) if fuse else fast_blocks(model)
