"""A block for training adapters with a hand-written backward pass: the plain block's numbers in less time and memory.

`fast_blocks(model)` puts one in every block's place; weights, adapters and their names stay. What it saves:

- kept for the backward pass are a half-block's input, q, k, v, the attention's result, gate and up, and each adapter's
  (N, R) product. The norm's result and silu(gate) · up are made again (a few passes over memory, no product);
- layers that read the same input are one layer: q, k and v; gate and up. Their frozen weights are one matrix, their
  adapters another, so a block's 7 products each way are 4, and 28 small ones of the adapters are 16;
- attention computes little more than the pairs that see each other (attention.py);
- the last block's o_proj and feed-forward are computed for the tokens with a target alone.

Products and their number are the plain block's: 2 FLOP a weight and token forward, 2 backward, none for frozen weights'
gradients, none below the first adapter. With y = n Wᵀ + s (n Aᵀ) Bᵀ, l = s n Aᵀ and gradient g of y:

    dn = g W + s (g B) A        dB = gᵀ l        dA = s (g B)ᵀ n

Dropout's masks are made again in the backward pass from the tokens' keys (lora/layer.py). Experts and weights in
training keep the plain block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infer.engine.fuse import fuse as kernel_blocks
from lora.layer import LoRALinear, keep_bits, with_zeros
from model.cache import KVCache
from model.mask import Visible
from model.quantize.linear import QuantizedWeight
from model.support.hardware import product, suits_onednn
from model.transformer import Block, RMSNorm, Transformer
from train.fast.attention import DocumentAttend

Matrix = Tensor | QuantizedWeight


def matrices(linears: Sequence[nn.Linear], dtype: torch.dtype) -> list[Matrix]:
    """The frozen weights of layers that read one input; one matrix where `pack_weights` has joined them. Quantized ones
    are widened for one product each, but w8a8's, which multiply themselves."""
    packed: list[Any] = [getattr(linear, "quantized", None) for linear in linears]
    if packed[0] is not None:
        if packed[0].kind == "w8a8":
            return getattr(linears[0], "joined_codes", packed)  # type: ignore[return-value]
        return [one.dequantize(dtype) for one in packed]
    weights: list[Matrix] = [linear.weight for linear in linears]
    joined_OD, parts = getattr(linears[0], "joined", (None, ()))
    if joined_OD is None or any(weight is not part for weight, part in zip(weights, parts, strict=True)):
        return weights  # also after a merge, which puts new weights in their place
    return [joined_OD]


def forward(n_ND: Tensor, weight: Matrix, bias_O: Tensor | None) -> Tensor:
    """n Wᵀ + b."""
    if isinstance(weight, QuantizedWeight):
        y_NO = weight.product(n_ND)
        return y_NO if bias_O is None else y_NO.add_(bias_O)
    return product(n_ND, weight, bias_O)


def add_backward(g_NO: Tensor, weight: Matrix, dn_ND: Tensor | None) -> Tensor:
    """dn + g W, in place of dn where there is one."""
    if dn_ND is not None and isinstance(weight, Tensor) and not suits_onednn(g_NO, weight):
        return dn_ND.addmm_(g_NO, weight)
    part_ND = weight.product_backward(g_NO) if isinstance(weight, QuantizedWeight) else product(g_NO, weight.t())
    return part_ND if dn_ND is None else dn_ND.add_(part_ND)


def pack_weights(model: Transformer) -> None:
    """Let q, k and v, and gate and up, stand below each other in memory: their products are then one. The parameters
    stay, as views. For weights that are whole and stay where they are, so not for sharded ones."""
    for block in model.model.layers:
        if isinstance(block, FastBlock):
            for linears in block.groups():
                weights = [linear.weight for linear in linears]
                packed: list[Any] = [getattr(linear, "quantized", None) for linear in linears]
                if packed[0] is not None and packed[0].kind == "w8a8":
                    linears[0].joined_codes = [QuantizedWeight.join(packed).transpose()]  # type: ignore[assignment]
                elif len(weights) > 1 and all(weight is not None for weight in weights):
                    whole_OD = torch.cat([weight.detach() for weight in weights])
                    for weight, part_OD in zip(weights, whole_OD.split([len(w) for w in weights]), strict=True):
                        weight.data = part_OD
                    linears[0].joined = whole_OD, weights  # type: ignore[assignment]


def adapters(linears: Sequence[nn.Linear]) -> list[Tensor | None]:
    """[A, B, A, B, …] of the active adapters; None for a layer without one."""
    made: list[Tensor | None] = []
    for linear in linears:
        if isinstance(linear, LoRALinear) and linear.active is not None and linear.original is None:
            made += [linear.lora_A[linear.active], linear.lora_B[linear.active]]
        else:
            made += [None, None]
    return made


class Group:
    """Linear layers that read one input, as one layer inside a hand-written pass: their results side by side.

    Their A matrices stand below each other, and s·B of each on the diagonal, so that all adapters are two products.
    """

    def __init__(
        self, linears: Sequence[nn.Linear], held: Sequence[Tensor | None], dtype: torch.dtype, key_N: Tensor | None
    ) -> None:
        self.linears, self.held, self.key_N = linears, held, key_N
        self.sizes = [linear.out_features for linear in linears]
        self.biases: list[Tensor | None] = [linear.bias for linear in linears]
        adapted = [(n, a, b) for n, (a, b) in enumerate(zip(held[::2], held[1::2], strict=True)) if a is not None]
        self.a_RD = self.b_OR = None
        if adapted:
            self.a_RD = torch.cat([a_RD for _, a_RD, _ in adapted]).to(dtype)
            self.b_OR = self.a_RD.new_zeros(sum(self.sizes), len(self.a_RD))
            for n, outputs, ranks in self.places():
                self.b_OR[outputs, ranks] = held[2 * n + 1] * self.scale(n)  # type: ignore[operator]

    def scale(self, n: int) -> float:
        """s, over 1 − p where inputs are dropped."""
        linear: Any = self.linears[n]
        return linear.scale[linear.active] / (1.0 if self.key_N is None else 1 - linear.dropout[linear.active])

    def kept_inputs(self) -> Tensor:
        """Which of its inputs each adapter of `places` is given, keep_NMD (lora/layer.py)."""
        assert self.key_N is not None
        adapted: list[Any] = [self.linears[n] for n, _, _ in self.places()]
        paths, p = tuple(one.path for one in adapted), adapted[0].dropout[adapted[0].active]
        return keep_bits(self.key_N, paths, adapted[0].in_features, p)

    def places(self) -> list[tuple[int, slice, slice]]:
        """(layer, its outputs, its adapter's ranks) of each layer that has an adapter."""
        made, output, rank = [], 0, 0
        for n, size in enumerate(self.sizes):
            a_RD = self.held[2 * n]
            if a_RD is not None:
                made.append((n, slice(output, output + size), slice(rank, rank + len(a_RD))))
                rank += len(a_RD)
            output += size
        return made

    def forward(self, n_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """(y_NO, the adapters' n Aᵀ, low_NR)."""
        weights = matrices(self.linears, n_ND.dtype)
        if len(weights) == 1:
            given = [bias for bias in self.biases if bias is not None]  # of q, k and v all or none has one
            y_NO = forward(n_ND, weights[0], torch.cat(given) if given else None)
        else:
            y_NO = torch.cat([forward(n_ND, *one) for one in zip(weights, self.biases, strict=True)], 1)
        if self.a_RD is None or self.b_OR is None:
            return y_NO, None
        if self.key_N is None:
            low_NR = F.linear(n_ND, self.a_RD)
        else:
            keep_NMD = self.kept_inputs()
            low = [
                F.linear(with_zeros(n_ND, keep_NMD[:, m]), self.a_RD[ranks])
                for m, (_, _, ranks) in enumerate(self.places())
            ]
            low_NR = torch.cat(low, 1)
        return y_NO.addmm_(low_NR, self.b_OR.t()), low_NR

    def backward(
        self, g_NO: Tensor, n_ND: Tensor, low_NR: Tensor | None, wants: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """(dn if it is wanted, the adapters' gradients as `held` has them)."""
        dn_ND = None
        if wants:
            weights = matrices(self.linears, g_NO.dtype)
            for one, part_NO in zip(weights, g_NO.split([weight.shape[0] for weight in weights], 1), strict=True):
                dn_ND = add_backward(part_NO, one, dn_ND)
        made: list[Tensor | None] = [None] * len(self.held)
        if self.a_RD is not None and self.b_OR is not None and low_NR is not None:
            dlow_NR = g_NO @ self.b_OR
            db_OR = (low_NR.t() @ g_NO).t().contiguous()  # MKL's faster order, then as the parameter lies
            if self.key_N is None:
                da_RD = dlow_NR.t() @ n_ND
                if dn_ND is not None:
                    dn_ND.addmm_(dlow_NR, self.a_RD)
            else:
                keep_NMD, da_RD = self.kept_inputs(), torch.empty_like(self.a_RD)
                for m, (_, _, ranks) in enumerate(self.places()):
                    torch.mm(dlow_NR[:, ranks].t(), with_zeros(n_ND, keep_NMD[:, m]), out=da_RD[ranks])
                    if dn_ND is not None:
                        dn_ND.add_(with_zeros(dlow_NR[:, ranks] @ self.a_RD[ranks], keep_NMD[:, m]))
            for n, outputs, ranks in self.places():
                a_RD, b_OR = self.held[2 * n : 2 * n + 2]
                made[2 * n] = da_RD[ranks].to(a_RD.dtype)  # type: ignore[union-attr]
                made[2 * n + 1] = db_OR[outputs, ranks].to(b_OR.dtype) * self.scale(n)  # type: ignore[union-attr]
        return dn_ND, made


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
    """linear(norm(x)) of several layers that read one input, side by side; with `residual`, plus that."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        residual_NO: Tensor | None,
        norm: RMSNorm | None,
        linears: Sequence[nn.Linear],
        key_N: Tensor | None,
        *held: Tensor | None,
    ) -> Tensor:
        n_ND, inverse_N1 = normed(x_ND, norm)
        group = Group(linears, held, x_ND.dtype, key_N)
        y_NO, low_NR = group.forward(n_ND)
        ctx.norm, ctx.group = norm, (linears, held, x_ND.dtype, key_N)  # made again: its tensors are not kept
        ctx.save_for_backward(x_ND, inverse_N1, low_NR)
        return y_NO if residual_NO is None else y_NO.add_(residual_NO)

    @staticmethod
    def backward(ctx: Any, g_NO: Tensor) -> Any:  # type: ignore[override]
        x_ND, _, low_NR = ctx.saved_tensors
        n_ND, inverse_N1 = normed(x_ND, ctx.norm)
        dx_ND, made = Group(*ctx.group).backward(g_NO, n_ND, low_NR, ctx.needs_input_grad[0])
        if dx_ND is not None and inverse_N1 is not None:
            dx_ND = norm_backward(dx_ND, x_ND, ctx.norm, inverse_N1)
        return dx_ND, g_NO if ctx.needs_input_grad[1] else None, None, None, None, *made


class FeedForward(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) · up(norm(x)))."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, norm: RMSNorm, linears: Sequence[nn.Linear], key_N: Tensor | None, *held: Tensor | None
    ) -> Tensor:
        n_ND, _ = normed(x_ND, norm)
        ctx.groups = (linears[:2], held[:4], x_ND.dtype, key_N), (linears[2:], held[4:], x_ND.dtype, key_N)
        gate_up, down = (Group(*group) for group in ctx.groups)
        y_N2F, low_NR = gate_up.forward(n_ND)
        gate_NF, up_NF = y_N2F.chunk(2, 1)
        y_ND, low_down_NR = down.forward(F.silu(gate_NF).mul_(up_NF))
        ctx.norm = norm
        ctx.save_for_backward(x_ND, y_N2F, low_NR, low_down_NR)
        return y_ND.add_(x_ND)

    @staticmethod
    def backward(ctx: Any, g_ND: Tensor) -> Any:  # type: ignore[override]
        x_ND, y_N2F, low_NR, low_down_NR = ctx.saved_tensors
        gate_up, down = (Group(*group) for group in ctx.groups)
        gate_NF, up_NF = y_N2F.chunk(2, 1)
        on_NF = F.silu(gate_NF)
        dh_NF, made_down = down.backward(g_ND, on_NF * up_NF, low_down_NR, True)
        assert dh_NF is not None
        g_N2F = torch.empty_like(y_N2F)
        d_gate_NF, d_up_NF = g_N2F.chunk(2, 1)
        torch.mul(on_NF, dh_NF, out=d_up_NF)
        torch.ops.aten.silu_backward.grad_input(dh_NF.mul_(up_NF), gate_NF, grad_input=d_gate_NF)
        n_ND, inverse_N1 = normed(x_ND, norm := ctx.norm)
        dn_ND, made = gate_up.backward(g_N2F, n_ND, low_NR, ctx.needs_input_grad[0])
        dx_ND = norm_backward(dn_ND, x_ND, norm, inverse_N1).add_(g_ND) if dn_ND is not None else None
        return dx_ND, None, None, None, *made, *made_down


class Turn(torch.autograd.Function):
    """The results of q, k and v, (B, T, H + 2G, K) → q (B, H, T, K) and k (B, G, T, K) at rotary positions, and v."""

    @staticmethod
    def forward(ctx: Any, y_BTCK: Tensor, heads: int, cos_BTK: Tensor, sin_BTK: Tensor) -> tuple[Tensor, ...]:
        groups = (y_BTCK.shape[2] - heads) // 2
        ctx.sizes = [heads + groups, groups]
        turned_BTCK, v_BTGK = torch.empty_like(y_BTCK).split(ctx.sizes, 2)
        given_BTCK, given_BTGK = y_BTCK.split(ctx.sizes, 2)
        turn(given_BTCK, cos_BTK, sin_BTK, 1, turned_BTCK)
        v_BTGK.copy_(given_BTGK)
        ctx.save_for_backward(cos_BTK, sin_BTK)
        q_BTHK, k_BTGK = turned_BTCK.split([heads, groups], 2)
        return q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, dq_BHTK: Tensor, dk_BGTK: Tensor, dv_BGTK: Tensor) -> Any:  # type: ignore[override]
        cos_BTK, sin_BTK = ctx.saved_tensors
        dy_BTCK = torch.cat([x.transpose(1, 2) for x in (dq_BHTK, dk_BGTK, dv_BGTK)], 2)
        turned_BTCK = dy_BTCK.split(ctx.sizes, 2)[0]
        turn(turned_BTCK.clone(), cos_BTK, sin_BTK, -1, turned_BTCK)
        return dy_BTCK, None, None, None


def turn(x_BTCK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor, sign: int, out_BTCK: Tensor) -> None:
    """Rotary positions on x; with sign −1 the other way round."""
    half = x_BTCK.shape[-1] // 2
    sin_BT1K = sin_BTK[:, :, None]
    torch.mul(x_BTCK, cos_BTK[:, :, None], out=out_BTCK)
    out_BTCK[..., :half].addcmul_(x_BTCK[..., half:], sin_BT1K[..., :half], value=-sign)
    out_BTCK[..., half:].addcmul_(x_BTCK[..., :half], sin_BT1K[..., half:], value=sign)


class FastBlock(Block):
    """A block's own modules under their own names, computed by the functions above."""

    def __init__(self, block: Block, last: bool) -> None:
        nn.Module.__init__(self)
        self.last = last
        for name, child in block.named_children():
            self.add_module(name, child)
        self.self_attn.attend = DocumentAttend()
        self.training = block.training

    def groups(self) -> list[list[nn.Linear]]:
        """The layers that read one input each."""
        own, mlp = self.self_attn, self.mlp
        return [[own.q_proj, own.k_proj, own.v_proj], [own.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], visible: Visible, cache: KVCache | None = None
    ) -> Tensor:
        three, output, gate_up, down = self.groups()
        dropping: list[Any] = [linear for linear in [*three, *output, *gate_up, *down] if drops(linear)]
        if cache is not None or any(linear.plan is None for linear in dropping):
            return super().forward(x_BTD, rotary, visible, cache)
        own, (B, T, _), x_ND = self.self_attn, x_BTD.shape, x_BTD.flatten(0, 1)
        key_N = dropping[0].plan.keys(B, T, x_ND.device).flatten() if dropping else None
        y_NO = Products.apply(x_ND, None, self.input_layernorm, three, key_N, *adapters(three))
        q_BHTK, k_BGTK, v_BGTK = Turn.apply(
            y_NO.view(B, T, -1, own.head_dim), own.q_proj.out_features // own.head_dim, *rotary
        )
        a_BHTK = own.attend(q_BHTK, k_BGTK, v_BGTK, visible, own.window)
        a_ND = a_BHTK.transpose(1, 2).flatten(2).flatten(0, 1)
        wanted_N = visible.layout.wanted_N if self.last and visible.layout is not None else None
        if wanted_N is not None:
            a_ND, x_ND = a_ND[wanted_N], x_ND[wanted_N]
            key_N = None if key_N is None else key_N[wanted_N]
        x_ND = Products.apply(a_ND, x_ND, None, output, key_N, *adapters(output))
        both = [*gate_up, *down]
        x_ND = FeedForward.apply(x_ND, self.post_attention_layernorm, both, key_N, *adapters(both))
        if wanted_N is not None:
            x_ND = x_ND.new_zeros(B * T, x_ND.shape[1]).index_copy(0, wanted_N, x_ND)
        # as torch's own matmul gives its result another shape: FSDP2 warns of a block whose result is a view
        return torch.ops.aten._unsafe_view(x_ND, x_BTD.shape)


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
            model.model.layers[number] = FastBlock(block, last=number == len(model.model.layers) - 1)
    return model


def training_blocks(model: Transformer, fuse: bool = False) -> Transformer:
    """The blocks that train, in the plain ones' place: the GPU's kernels (infer/engine/fuse.py), or the ones of this
    file."""
    return kernel_blocks(model) if fuse else fast_blocks(model)
