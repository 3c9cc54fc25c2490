"""Decoder block for training LoRA adapters, with a hand-written backward pass: less time and memory than autograd's.

`fast_blocks(model)` swaps it in for every block; parameters and their names stay the same. What it saves:

- Activations. Kept for the backward pass are the input of each half of the block, q, k, v, the attention output, gate
  and up, and each adapter's (N, R) product. The norm's output and silu(gate) · up are recomputed (elementwise passes
  only, no product).
- Dispatches. Layers that share an input are one layer: q, k and v; gate and up. Their frozen weights are one matrix and
  their adapters another, so a block's 7 products each way become 4, and the adapters' 28 small ones become 16.
- Attention over little more than the visible pairs (attention.py).
- In the last block o_proj and the feed-forward run on the tokens with a target only.

FLOPs are those of the plain block under autograd: 2 a weight and token forward, 2 backward, none for the gradients of
frozen weights, none below the first adapter. With y = n Wᵀ + s (n Aᵀ) Bᵀ, l = s n Aᵀ and g = dL/dy:

    dn = g W + s (g B) A        dB = gᵀ l        dA = s (g B)ᵀ n

Dropout masks are views of one table, read again in the backward pass (lora/dropout.py). Mixture-of-experts blocks and
blocks whose own weights train keep the plain block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infer.engine.fuse import fuse as kernel_blocks
from lora.dropout import TokenMasks
from lora.layer import LoRALinear
from model.cache import KVCache
from model.mask import Visible
from model.support.hardware import product, use_onednn
from model.transformer import Block, RMSNorm, Transformer
from train.fast.attention import DocumentAttend


def frozen_weights(linears: Sequence[Any], dtype: torch.dtype) -> list[Tensor]:
    """The frozen weights of layers that share an input: one matrix if `join_weights` has joined them, else one a layer.

    Quantized weights are dequantized for this one product.
    """
    joined, parts = getattr(linears[0], "joined", (None, ()))
    # after a merge the layers have new weights
    if joined is not None and all(linear.weight is part for linear, part in zip(linears, parts, strict=True)):
        return [joined]
    return [linear.weight if linear.weight is not None else linear.quantized.dequantize(dtype) for linear in linears]


def join_weights(model: Transformer) -> None:
    """Store q, k and v below each other in memory, and gate and up: one product each. Parameters become views.

    Call it when the weights are loaded and on their device, and not on a sharded model.
    """
    for block in model.model.layers:
        if isinstance(block, FastBlock):
            for linears in block.groups():
                join(linears)


def join(linears: Sequence[Any]) -> None:
    own = [linear.weight for linear in linears]
    if len(own) > 1 and all(weight is not None for weight in own):
        joined_OD = torch.cat([weight.detach() for weight in own])
        for weight, part_OD in zip(own, joined_OD.split([len(weight) for weight in own]), strict=True):
            weight.data = part_OD
        linears[0].joined = joined_OD, own


def add_input_gradient(g_NO: Tensor, weight_OD: Tensor, dn_ND: Tensor | None) -> Tensor:
    """dn + g W, accumulated into `dn_ND` if given."""
    if dn_ND is not None and not use_onednn(g_NO, weight_OD):
        return dn_ND.addmm_(g_NO, weight_OD)
    part_ND = product(g_NO, weight_OD.t())
    return part_ND if dn_ND is None else dn_ND.add_(part_ND)


def adapter_matrices(linears: Sequence[nn.Linear]) -> list[Tensor | None]:
    """[A, B, A, B, …] of the active adapters; None, None for a layer without one."""
    matrices: list[Tensor | None] = []
    for linear in linears:
        if isinstance(linear, LoRALinear) and linear.active is not None and linear.original is None:
            matrices += [linear.lora_A[linear.active], linear.lora_B[linear.active]]
        else:
            matrices += [None, None]
    return matrices


class JoinedLinears:
    """LoRA layers that share an input, as one layer whose output is theirs side by side; no autograd inside.

    Their A matrices are stacked, and s · B of each lies on the diagonal of a block matrix, so that all adapters
    together take two products. `adapters` is `adapter_matrices(linears)`; `masks` are dropout's (None: no dropout).
    """

    def __init__(
        self,
        linears: Sequence[nn.Linear],
        adapters: Sequence[Tensor | None],
        dtype: torch.dtype,
        masks: TokenMasks | None,
    ) -> None:
        self.linears, self.adapters, self.masks = linears, adapters, masks
        self.parts: list[tuple[int, slice, slice]] = []  # (layer, its outputs, its ranks) of each adapter
        output, rank = 0, 0
        for n, (linear, a_RD) in enumerate(zip(linears, adapters[::2], strict=True)):
            if a_RD is not None:
                self.parts.append((n, slice(output, output + linear.out_features), slice(rank, rank + len(a_RD))))
                rank += len(a_RD)
            output += linear.out_features
        self.a_RD = self.b_OR = None
        if self.parts:
            self.a_RD = torch.cat([a_RD for a_RD in adapters[::2] if a_RD is not None]).to(dtype)
            self.b_OR = self.a_RD.new_zeros(output, rank)
            for n, outputs, ranks in self.parts:
                self.b_OR[outputs, ranks] = adapters[2 * n + 1] * self.scale(n)  # type: ignore[operator]

    def scale(self, n: int) -> float:
        """s of layer n's adapter; s / (1 − p) with dropout."""
        linear: Any = self.linears[n]
        return linear.scale[linear.active] / (1.0 if self.masks is None else 1 - linear.dropout[linear.active])

    def dropped(self, n: int) -> tuple[float, str]:
        """(dropout's p, name) of layer n."""
        linear: Any = self.linears[n]
        return linear.dropout[linear.active], linear.path

    def forward(self, n_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """(y_NO, low_NR), where low is n Aᵀ of all adapters (None without one)."""
        weights = frozen_weights(self.linears, n_ND.dtype)
        biases: list[Tensor | None] = [linear.bias for linear in self.linears]
        if len(weights) == 1:
            present = [bias for bias in biases if bias is not None]  # q, k and v have a bias each, or none has
            y_NO = product(n_ND, weights[0], torch.cat(present) if present else None)
        else:
            y_NO = torch.cat([product(n_ND, *pair) for pair in zip(weights, biases, strict=True)], 1)
        if self.a_RD is None or self.b_OR is None:
            return y_NO, None
        if self.masks is None:
            low_NR = F.linear(n_ND, self.a_RD)
        else:  # each adapter drops other inputs, so each multiplies its own
            low = [F.linear(self.masks.drop(n_ND, *self.dropped(n)), self.a_RD[ranks]) for n, _, ranks in self.parts]
            low_NR = torch.cat(low, 1)
        return y_NO.addmm_(low_NR, self.b_OR.t()), low_NR

    def backward(
        self, g_NO: Tensor, n_ND: Tensor, low_NR: Tensor | None, needs_dn: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """(dn, None unless `needs_dn`; the gradients of `adapters`)."""
        dn_ND = None
        if needs_dn:
            weights = frozen_weights(self.linears, g_NO.dtype)
            for weight, part_NO in zip(weights, g_NO.split([weight.shape[0] for weight in weights], 1), strict=True):
                dn_ND = add_input_gradient(part_NO, weight, dn_ND)
        gradients: list[Tensor | None] = [None] * len(self.adapters)
        if low_NR is None or self.b_OR is None:
            return dn_ND, gradients
        db_OR = (low_NR.t() @ g_NO).t().contiguous()  # faster in MKL than gᵀ l
        da_RD = self.a_gradient(g_NO @ self.b_OR, n_ND, dn_ND)
        for n, outputs, ranks in self.parts:
            a_RD, b_OR = self.adapters[2 * n : 2 * n + 2]
            gradients[2 * n] = da_RD[ranks].to(a_RD.dtype)  # type: ignore[union-attr]
            gradients[2 * n + 1] = db_OR[outputs, ranks].to(b_OR.dtype) * self.scale(n)  # type: ignore[union-attr]
        return dn_ND, gradients

    def a_gradient(self, dlow_NR: Tensor, n_ND: Tensor, dn_ND: Tensor | None) -> Tensor:
        """dA of the stacked A matrices; adds the adapters' share of dn to `dn_ND` if given."""
        assert self.a_RD is not None
        if self.masks is None:
            da_RD = dlow_NR.t() @ n_ND
            if dn_ND is not None:
                dn_ND.addmm_(dlow_NR, self.a_RD)
            return da_RD
        da_RD = torch.empty_like(self.a_RD)
        for n, _, ranks in self.parts:
            torch.mm(dlow_NR[:, ranks].t(), self.masks.drop(n_ND, *self.dropped(n)), out=da_RD[ranks])
            if dn_ND is not None:
                self.masks.add_kept(dn_ND, dlow_NR[:, ranks] @ self.a_RD[ranks], *self.dropped(n))
        return da_RD


def rms_norm(x_ND: Tensor, norm: RMSNorm | None) -> tuple[Tensor, Tensor | None]:
    """(RMSNorm of x, 1 / rms of each row); (x, None) without a norm."""
    if norm is None:
        return x_ND, None
    wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    inverse_N1 = torch.rsqrt(wide_ND.pow(2).mean(-1, keepdim=True) + norm.eps)
    return norm.weight * (wide_ND * inverse_N1).to(x_ND.dtype), inverse_N1


def rms_norm_backward(dn_ND: Tensor, x_ND: Tensor, norm: RMSNorm, inverse_N1: Tensor) -> Tensor:
    """dx = (h − x̂ · mean(h · x̂)) / rms, with h = dn · weight and x̂ = x / rms."""
    wide = inverse_N1.dtype
    unit_ND, h_ND = x_ND.to(wide) * inverse_N1, (dn_ND * norm.weight).to(wide)
    mean_N1 = (h_ND * unit_ND).mean(-1, keepdim=True)
    return h_ND.sub_(unit_ND.mul_(mean_N1)).mul_(inverse_N1).to(x_ND.dtype)


class NormLinears(torch.autograd.Function):
    """linears(norm(x)) + residual, with the outputs of the linears side by side. norm and residual may be None."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        residual_NO: Tensor | None,
        norm: RMSNorm | None,
        linears: Sequence[nn.Linear],
        masks: TokenMasks | None,
        *adapters: Tensor | None,
    ) -> Tensor:
        n_ND, inverse_N1 = rms_norm(x_ND, norm)
        ctx.norm, ctx.joined = norm, (linears, adapters, x_ND.dtype, masks)  # rebuilt in backward, to keep less
        y_NO, low_NR = JoinedLinears(*ctx.joined).forward(n_ND)
        ctx.save_for_backward(x_ND, inverse_N1, low_NR)
        return y_NO if residual_NO is None else y_NO.add_(residual_NO)

    @staticmethod
    def backward(ctx: Any, g_NO: Tensor) -> Any:  # type: ignore[override]
        x_ND, _, low_NR = ctx.saved_tensors
        n_ND, inverse_N1 = rms_norm(x_ND, ctx.norm)
        dx_ND, d_adapters = JoinedLinears(*ctx.joined).backward(g_NO, n_ND, low_NR, ctx.needs_input_grad[0])
        if dx_ND is not None and inverse_N1 is not None:
            dx_ND = rms_norm_backward(dx_ND, x_ND, ctx.norm, inverse_N1)
        return dx_ND, g_NO if ctx.needs_input_grad[1] else None, None, None, None, *d_adapters


class FeedForward(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) · up(norm(x))). `linears` and `adapters` are those of gate, up and down."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        norm: RMSNorm,
        linears: Sequence[nn.Linear],
        masks: TokenMasks | None,
        *adapters: Tensor | None,
    ) -> Tensor:
        n_ND, _ = rms_norm(x_ND, norm)
        ctx.norm = norm
        ctx.joined = (linears[:2], adapters[:4], x_ND.dtype, masks), (linears[2:], adapters[4:], x_ND.dtype, masks)
        gate_up, down = (JoinedLinears(*layer) for layer in ctx.joined)
        y_N2F, low_NR = gate_up.forward(n_ND)
        gate_NF, up_NF = y_N2F.chunk(2, 1)
        y_ND, low_down_NR = down.forward(F.silu(gate_NF).mul_(up_NF))
        ctx.save_for_backward(x_ND, y_N2F, low_NR, low_down_NR)
        return y_ND.add_(x_ND)

    @staticmethod
    def backward(ctx: Any, g_ND: Tensor) -> Any:  # type: ignore[override]
        x_ND, y_N2F, low_NR, low_down_NR = ctx.saved_tensors
        gate_up, down = (JoinedLinears(*layer) for layer in ctx.joined)
        gate_NF, up_NF = y_N2F.chunk(2, 1)
        silu_NF = F.silu(gate_NF)
        dh_NF, d_down = down.backward(g_ND, silu_NF * up_NF, low_down_NR, True)
        assert dh_NF is not None
        g_N2F = torch.empty_like(y_N2F)
        d_gate_NF, d_up_NF = g_N2F.chunk(2, 1)
        torch.mul(silu_NF, dh_NF, out=d_up_NF)
        torch.ops.aten.silu_backward.grad_input(dh_NF.mul_(up_NF), gate_NF, grad_input=d_gate_NF)
        n_ND, inverse_N1 = rms_norm(x_ND, ctx.norm)
        dn_ND, d_gate_up = gate_up.backward(g_N2F, n_ND, low_NR, ctx.needs_input_grad[0])
        dx_ND = None
        if dn_ND is not None:
            dx_ND = rms_norm_backward(dn_ND, x_ND, ctx.norm, inverse_N1).add_(g_ND)  # type: ignore[arg-type]
        return dx_ND, None, None, None, *d_gate_up, *d_down


class RotaryQKV(torch.autograd.Function):
    """(B, T, H + 2G, K), q, k and v side by side → rotated q (B, H, T, K), rotated k (B, G, T, K), v (B, G, T, K)."""

    @staticmethod
    def forward(ctx: Any, y_BTCK: Tensor, heads: int, cos_BTK: Tensor, sin_BTK: Tensor) -> tuple[Tensor, ...]:
        groups = (y_BTCK.shape[2] - heads) // 2
        ctx.sizes = [heads + groups, groups]
        qk_BTCK, v_BTGK = y_BTCK.split(ctx.sizes, 2)
        out_qk_BTCK, out_v_BTGK = torch.empty_like(y_BTCK).split(ctx.sizes, 2)
        rotate(qk_BTCK, cos_BTK, sin_BTK, 1, out_qk_BTCK)
        out_v_BTGK.copy_(v_BTGK)
        ctx.save_for_backward(cos_BTK, sin_BTK)
        q_BTHK, k_BTGK = out_qk_BTCK.split([heads, groups], 2)
        return q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), out_v_BTGK.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, dq_BHTK: Tensor, dk_BGTK: Tensor, dv_BGTK: Tensor) -> Any:  # type: ignore[override]
        cos_BTK, sin_BTK = ctx.saved_tensors
        dy_BTCK = torch.cat([x.transpose(1, 2) for x in (dq_BHTK, dk_BGTK, dv_BGTK)], 2)
        d_qk_BTCK = dy_BTCK.split(ctx.sizes, 2)[0]
        rotate(d_qk_BTCK.clone(), cos_BTK, sin_BTK, -1, d_qk_BTCK)
        return dy_BTCK, None, None, None


def rotate(x_BTCK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor, sign: int, out_BTCK: Tensor) -> None:
    """Rotary embedding of x into `out_BTCK`; sign −1 rotates back."""
    half = x_BTCK.shape[-1] // 2
    sin_BT1K = sin_BTK[:, :, None]
    torch.mul(x_BTCK, cos_BTK[:, :, None], out=out_BTCK)
    out_BTCK[..., :half].addcmul_(x_BTCK[..., half:], sin_BT1K[..., :half], value=-sign)
    out_BTCK[..., half:].addcmul_(x_BTCK[..., :half], sin_BT1K[..., half:], value=sign)


class FastBlock(Block):
    """A plain block's modules under the same names, with the forward and backward pass of this file.

    `last`: it is the model's last block, of which only the tokens in `Layout.wanted_N` are read.
    """

    def __init__(self, block: Block, last: bool) -> None:
        nn.Module.__init__(self)
        self.last = last
        for name, child in block.named_children():
            self.add_module(name, child)
        self.self_attn.attend = DocumentAttend()
        self.training = block.training

    def groups(self) -> list[list[nn.Linear]]:
        """The linear layers, grouped by the input that they share."""
        attention, mlp = self.self_attn, self.mlp
        return [
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ]

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], visible: Visible, cache: KVCache | None = None
    ) -> Tensor:
        qkv, o, gate_up, down = self.groups()
        dropping: list[Any] = [linear for linear in [*qkv, *o, *gate_up, *down] if has_dropout(linear)]
        if cache is not None or any(linear.plan is None for linear in dropping):
            return super().forward(x_BTD, rotary, visible, cache)
        attention, (B, T, _), x_ND = self.self_attn, x_BTD.shape, x_BTD.flatten(0, 1)
        masks = dropping[0].plan.masks(B, T) if dropping else None
        y_NO = NormLinears.apply(x_ND, None, self.input_layernorm, qkv, masks, *adapter_matrices(qkv))
        q_BHTK, k_BGTK, v_BGTK = RotaryQKV.apply(
            y_NO.view(B, T, -1, attention.head_dim), attention.q_proj.out_features // attention.head_dim, *rotary
        )
        a_BHTK = attention.attend(q_BHTK, k_BGTK, v_BGTK, visible, attention.window)
        a_ND = a_BHTK.transpose(1, 2).flatten(2).flatten(0, 1)
        wanted_N = visible.layout.wanted_N if self.last and visible.layout is not None else None
        if wanted_N is not None:
            a_ND, x_ND = a_ND[wanted_N], x_ND[wanted_N]
            masks = None if masks is None else masks.choose(wanted_N)
        x_ND = NormLinears.apply(a_ND, x_ND, None, o, masks, *adapter_matrices(o))
        mlp = [*gate_up, *down]
        x_ND = FeedForward.apply(x_ND, self.post_attention_layernorm, mlp, masks, *adapter_matrices(mlp))
        if wanted_N is not None:
            x_ND = x_ND.new_zeros(B * T, x_ND.shape[1]).index_copy(0, wanted_N, x_ND)
        # not view(): FSDP2 warns of a block whose output is a view, and torch's matmul reshapes its output this way too
        return torch.ops.aten._unsafe_view(x_ND, x_BTD.shape)


def has_dropout(linear: nn.Module) -> bool:
    """True if the layer's adapter is active, in training mode and drops inputs."""
    if not isinstance(linear, LoRALinear) or not linear.training or linear.active is None:
        return False
    return linear.original is None and linear.dropout[linear.active] > 0


def fast_blocks(model: Transformer) -> Transformer:
    """Replace, in place, each dense block with frozen weights by a FastBlock; returns the model."""
    for number, block in enumerate(model.model.layers):
        frozen = all(not p.requires_grad for name, p in block.named_parameters() if "lora_" not in name)
        if type(block) is Block and frozen and hasattr(block, "mlp"):
            model.model.layers[number] = FastBlock(block, last=number == len(model.model.layers) - 1)
    return model


def training_blocks(model: Transformer, fuse: bool = False) -> Transformer:
    """`fast_blocks`, or with `fuse` the Triton blocks of infer/engine/fuse.py."""
    return kernel_blocks(model) if fuse else fast_blocks(model)
