"""Weights in 8 or 4 bits, for reading: a decoded token reads every weight once, so its time is their bytes.

    int8     W[o, d] = q · scale[o]                          q in −127 … 127, one scale a row        8 bits a weight
    int4-32  W[o, d] = (q − 8) · scale[o, g] + zero[o, g]    q in 0 … 15, g a group of 32 columns    5
    int4-64, int4-128 (int4 is int4-64)                      the same with larger groups             4.5, 4.25
    nf4      W[o, d] = NF4[q] · absmax[o, g]                 g of 64 columns, absmax in 8 bits       4.13
    w8a8     W[o, d] = q · scale[o]                          as int8, scales in fp32; inputs too     8

Scales and zeros of int8 and int4 are chosen among bf16's numbers before the codes are, so the weight that the codes
stand for is the same one whatever computes with it. A width that a format's groups do not divide takes the smaller
groups that do, or int8. nf4 is the base of `lora/quantized.py` (QLoRA) to the bit: what was tuned is what is served.

Products. The plain one, and the specification, is x · Wᵀ with W dequantized into x's dtype. torch's packed products for
int8 and int4 dequantize in registers instead: they take bf16 inputs (with fp32 ones they are scalar code) and sum in
fp32. `pack` makes a weight ready for them, on a CPU always: what it would do otherwise is write the whole dequantized
matrix for each product. From then on its inputs are rounded to bf16, whatever the number of rows (fp64 inputs never).
Packed products dequantize anew every four rows, so from PACKED_ROWS on a tile of W is dequantized once and multiplied
as a matrix.

w8a8 multiplies integers (model/quantize/integer.py); fp64 inputs take the plain product. Such a model is rotated first,
so that few inputs are far larger than the rest, and down_proj's inputs are mixed as they come (`mixed`), for the same
reason: model/quantize/rotation.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.quantize.blockwise import NF4, dequantize_scales, nf4_codes, quantize_scales
from model.quantize.integer import integer_backward, integer_linear
from model.quantize.rotation import mix, mixes_inputs, rotate, unmix
from model.support.hardware import compute_dtype, product

# name → columns a group
FORMATS = {"int8": 0, "int4": 64, "int4-32": 32, "int4-64": 64, "int4-128": 128, "nf4": 64, "w8a8": 0}
PACKED_ROWS = {"int8": 24, "int4": 96}  # measured crossovers; both sides scale with the machine, so they are constants
PIECE = 2**20  # weights that are quantized or dequantized at a time: the pieces in flight stay in the caches
BLOCK = 64  # rows that torch's packed layout keeps together


def format_of(form: str, width: int) -> tuple[str, int]:
    """("int8" | "int4" | "nf4" | "w8a8", columns a group) in which rows of `width` are kept under the format `form`."""
    kind, most = form.partition("-")[0], FORMATS[form]
    if kind == "w8a8" or (kind == "nf4" and width % most == 0):
        return kind, most
    if kind == "int4":
        for group in (128, 64, 32):
            if group <= most and width % group == 0:
                return kind, group
    return "int8", 0


def bytes_of(form: str, rows: int, width: int) -> int:
    """Bytes that a matrix takes in a format."""
    kind, group = format_of(form, width)
    if kind in ("int8", "w8a8"):
        return rows * width + rows * (2 if kind == "int8" else 4)
    groups = rows * (width // group)
    return rows * width // 2 + (groups * 4 if kind == "int4" else groups + groups // 64 + 8)


class QuantizedWeight(nn.Module):
    """A frozen matrix as codes and scales. `dequantize(dtype)` is the weight, `product(x)` is x · Wᵀ.

    codes   int8, w8a8: (O, D) int8;  int4, nf4: (O, D / 2) uint8, two neighbours of a row a byte (the layouts of
            kernels/four_bit.py), or, packed, torch's order of int4's
    scales  int8: (O,) bf16;  w8a8: (O,) fp32;  int4: (D / group, O, 2) bf16, scale and zero;  nf4: (O · D / group,)
            uint8, with the two tensors of the second quantization (model/quantize/blockwise.py) in `scales_absmax` and
            `scales_mean`
    mixed   w8a8: the codes are those of `mix(W)`, and inputs are mixed before they are multiplied
    transposed  w8a8 in training: the codes the other way round (D, O), where `transpose` has put them
    """

    codes: Tensor
    scales: Tensor
    scales_absmax: Tensor
    scales_mean: Tensor

    def __init__(
        self,
        form: str,
        shape: Sequence[int],
        codes: Tensor,
        scales: Tensor,
        second: tuple[Tensor, Tensor] | None = None,
        mixed: bool = False,
    ) -> None:
        super().__init__()
        self.form, self.shape, self.packed, self.mixed = form, (shape[0], shape[1]), False, mixed
        self.transposed: Tensor | None = None
        self.kind, self.group = format_of(form, shape[1])
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("scales_absmax", second[0] if second else None, persistent=False)
        self.register_buffer("scales_mean", second[1] if second else None, persistent=False)

    @classmethod
    def quantize(
        cls, pieces: Iterable[Tensor], shape: Sequence[int], form: str, mixed: bool = False
    ) -> QuantizedWeight:
        """From rows in order, in pieces of any float dtype, each forgotten before the next is asked for."""
        kind, group = format_of(form, shape[1])
        parts = []
        for piece_MD in pieces:
            for rows_MD in piece_MD.detach().split(max(1, PIECE // shape[1])):
                parts.append(rows_codes(rows_MD, kind, group, mixed))
        codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        if kind == "nf4":
            scales, *second = quantize_scales(scales)
            return cls(form, shape, codes.view(shape[0], -1), scales, (second[0], second[1]))
        return cls(form, shape, codes, scales.transpose(0, 1).contiguous() if kind == "int4" else scales, mixed=mixed)

    def codes_of(self, rows_MD: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, first scales) of some rows of the wide weight, for a rank that reads no others."""
        return rows_codes(rows_MD, self.kind, self.group, self.mixed)

    @classmethod
    def join(cls, weights: list[QuantizedWeight]) -> QuantizedWeight:
        """Weights of one format and width (not nf4), one below the other; theirs become views of the joint one."""
        first, O = weights[0], sum(weight.shape[0] for weight in weights)
        dim = 1 if first.kind == "int4" else 0
        codes, scales = torch.cat([w.codes for w in weights]), torch.cat([w.scales for w in weights], dim=dim)
        sizes = [weight.shape[0] for weight in weights]
        for weight, own, steps in zip(weights, codes.split(sizes), scales.split(sizes, dim), strict=True):
            weight.codes.data, weight.scales.data = own, steps
        joint = cls(first.form, (O, first.shape[1]), codes, scales, mixed=first.mixed)
        joint.packed = first.packed
        return joint

    def dequantize(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """The weight (some rows of it, in whole blocks of 64 where packed; of `mix(W)` where mixed), computed in fp32
        (fp64 for fp64)."""
        accurate = torch.promote_types(dtype, torch.float32)
        codes = self.codes[rows]
        if self.kind in ("int8", "w8a8"):
            return (codes.to(accurate) * self.scales[rows, None].to(accurate)).to(dtype)
        if self.kind == "nf4":
            scale_OG = self.absmax()[rows]
            pairs_OD = F.embedding(codes.int(), nf4_pairs(codes.device).to(accurate)).flatten(1)
            return pairs_OD.unflatten(1, (-1, self.group)).mul_(scale_OG[:, :, None].to(accurate)).flatten(1).to(dtype)
        scale_OG, zero_OG = self.scales[:, rows].to(accurate).transpose(0, 1).unbind(-1)
        q_OD = (from_torch_order(codes) if self.packed else unpack(codes)).to(accurate).sub_(8)
        wide_OGg = q_OD.unflatten(1, (-1, self.group)).mul_(scale_OG[:, :, None]).add_(zero_OG[:, :, None])
        return wide_OGg.flatten(1).to(dtype)

    def absmax(self) -> Tensor:
        """nf4's scales, (O, D / group) fp32."""
        return dequantize_scales(self.scales, self.scales_absmax, self.scales_mean).view(self.shape[0], -1)

    def product(self, x_ND: Tensor) -> Tensor:
        """x · Wᵀ in x's dtype."""
        if self.mixed:
            x_ND = mix(x_ND)
        if self.kind == "w8a8" and x_ND.dtype != torch.float64:
            return integer_linear(x_ND, self.codes, self.scales)
        if not self.packed or x_ND.dtype == torch.float64:
            return F.linear(x_ND, self.dequantize(x_ND.dtype))
        half_ND = x_ND.to(torch.bfloat16)
        if x_ND.shape[0] > PACKED_ROWS[self.kind]:
            return self.tiled(half_ND.to(compute_dtype()), x_ND.dtype)
        if self.kind == "int8":
            y_NO = torch._weight_int8pack_mm(half_ND, self.codes, self.scales)
        else:
            y_NO = torch._weight_int4pack_mm_for_cpu(half_ND, self.codes, self.group, self.scales.contiguous())
        return y_NO.to(x_ND.dtype)

    def product_backward(self, g_NO: Tensor) -> Tensor:
        """g · W in g's dtype: the gradient of `product`'s input. w8a8 multiplies integers, but for fp64 gradients."""
        if self.kind == "w8a8" and g_NO.dtype != torch.float64:
            codes_DO = self.codes.t().contiguous() if self.transposed is None else self.transposed
            dx_ND = integer_backward(g_NO, codes_DO, self.scales)
        else:
            dx_ND = g_NO @ self.dequantize(g_NO.dtype)
        return unmix(dx_ND) if self.mixed else dx_ND

    def transpose(self) -> QuantizedWeight:
        """Keep w8a8's codes the other way round too, as the backward product reads them; returns itself."""
        self.transposed = self.codes.t().contiguous()
        return self

    def tiled(self, x_ND: Tensor, dtype: torch.dtype) -> Tensor:
        """x · Wᵀ in `dtype` by tiles of W's rows, dequantized into x's dtype one at a time; int8's codes are exact in
        every dtype, so that its scales follow the product."""
        O, D = self.shape
        y_NO = x_ND.new_empty(x_ND.shape[0], O, dtype=dtype)
        step = max(BLOCK, PIECE // D // BLOCK * BLOCK)
        for start in range(0, O, step):
            rows = slice(start, min(start + step, O))
            tile_MD = self.codes[rows].to(x_ND.dtype) if self.kind == "int8" else self.dequantize(x_ND.dtype, rows)
            y_NO[:, rows] = product(x_ND, tile_MD)
        return y_NO.mul_(self.scales) if self.kind == "int8" else y_NO

    def pack(self) -> QuantizedWeight:
        """Make ready for torch's packed product, where there is one for this matrix; returns itself."""
        suits = self.kind == "int8" or (self.kind == "int4" and self.shape[0] % BLOCK == 0)
        if self.packed or not suits or self.codes.device.type != "cpu":
            return self
        if self.kind == "int4":
            step = max(1, PIECE // self.shape[1] // BLOCK) * BLOCK
            for rows in self.codes.split(step):  # in place: a block's bytes stay within the block
                rows.copy_(torch._convert_weight_to_int4pack_for_cpu(unpack(rows).int(), 1))
        self.packed = True
        return self


class QuantizedLinear(nn.Linear):
    """nn.Linear over a quantized weight. Forward only; `weight` is None, `quantized` holds it."""

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None = None) -> None:
        with torch.device("meta"):
            super().__init__(quantized.shape[1], quantized.shape[0], bias=False)
        self.weight = None  # type: ignore[assignment]
        self.quantized = quantized
        self.bias: nn.Parameter | None  # type: ignore[assignment]
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTO = self.quantized.product(x_BTD.flatten(0, -2)).unflatten(0, x_BTD.shape[:-1])
        return y_BTO if self.bias is None else y_BTO + self.bias


class CastEmbedding(nn.Embedding):
    """nn.Embedding whose rows are kept in bf16 and given out in `dtype`."""

    def __init__(self, rows_VD: Tensor, dtype: torch.dtype) -> None:
        super().__init__(rows_VD.shape[0], rows_VD.shape[1], _weight=rows_VD)
        self.weight.requires_grad_(False)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).to(self.dtype)


def rows_codes(rows_MD: Tensor, kind: str, group: int, mixed: bool = False) -> tuple[Tensor, Tensor]:
    rows_MD = mix(rows_MD.float()) if mixed else rows_MD
    if kind == "nf4":
        return nf4_codes(rows_MD, group)
    if kind == "int4":
        return to_int4(rows_MD, group)
    return to_int8(rows_MD, torch.bfloat16 if kind == "int8" else torch.float32)


def up_to_bf16(x: Tensor) -> Tensor:
    """Positive fp32 numbers as bf16, rounded up."""
    near = x.to(torch.bfloat16)
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(near.float() < x, above, near)


def to_int8(weight_OD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(q_OD int8, scale_O in bf16 or fp32); a weight is off by at most half a step. A row of zeros has the least
    scale."""
    wide_OD = weight_OD.float()
    scale_O = (wide_OD.abs().amax(dim=1) / 127).clamp_min(1e-30)
    if dtype == torch.bfloat16:
        scale_O = up_to_bf16(scale_O)
    return (wide_OD / scale_O.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale_O


def to_int4(weight_OD: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(codes (O, D / 2) uint8, the even column in the low half; steps_OG2 bf16, scale and zero).

    A weight is off by at most half a step, or by what rounding its zero to bf16 moved its group's end.
    """
    wide_OGg = weight_OD.float().unflatten(1, (-1, group))
    low_OG, high_OG = wide_OGg.aminmax(dim=2)
    scale_OG = up_to_bf16(((high_OG - low_OG) / 15).clamp_min(1e-30))
    zero_OG = (low_OG + 8 * scale_OG.float()).to(torch.bfloat16)
    q_OGg = (wide_OGg - zero_OG.float()[..., None]).div_(scale_OG.float()[..., None]).round_().add_(8).clamp_(0, 15)
    q_OD = q_OGg.flatten(1).to(torch.uint8)
    return q_OD[:, ::2] | (q_OD[:, 1::2] << 4), torch.stack((scale_OG, zero_OG), dim=-1)


def unpack(codes: Tensor) -> Tensor:
    """(O, D / 2) bytes as (O, D) codes, the low half first."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)


@cache
def torch_order() -> tuple[Tensor, Tensor]:
    """Which row of a block the low and the high half of byte j hold in torch's order, for each j: found by packing."""
    row_O8 = torch.arange(BLOCK, dtype=torch.int32)[:, None].repeat(1, 8)
    below = torch._convert_weight_to_int4pack_for_cpu(row_O8 % 16, 1).view(8, -1)[0].int()
    above = torch._convert_weight_to_int4pack_for_cpu(row_O8 // 16, 1).view(8, -1)[0].int()
    return (below & 15) + 16 * (above & 15), (below >> 4) + 16 * (above >> 4)


def from_torch_order(codes: Tensor) -> Tensor:
    """torch's packed int4 (whole blocks) as (O, D) codes."""
    O, D = codes.shape[0], codes.shape[1] * 2
    bytes_nJD = codes.view(O // BLOCK, D, BLOCK // 2).transpose(1, 2)
    q_nBD = codes.new_empty(O // BLOCK, BLOCK, D)
    low, high = torch_order()
    q_nBD[:, low], q_nBD[:, high] = bytes_nJD & 15, bytes_nJD >> 4
    return q_nBD.view(O, D)


@cache
def nf4_pairs(device: torch.device) -> Tensor:
    """The two levels that each of the 256 bytes stands for, (256, 2)."""
    levels, byte = torch.tensor(NF4), torch.arange(256)
    return torch.stack((levels[byte >> 4], levels[byte & 15]), dim=1).to(device)


Model = TypeVar("Model", bound=nn.Module)


def quantize_model(model: Model, form: str = "int8") -> Model:
    """Replace every linear layer of a model, the head among them, by a quantized one, in place; returns the model.

    Embedding, norms and routers (which choose) stay; w8a8 rotates the model first. An adapted layer is refused with a
    ValueError: put the adapter on the quantized model.
    """
    adapted = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and type(m) is not nn.Linear]
    if adapted := [path for path in adapted if is_quantizable(path)]:
        raise ValueError(f"{adapted[0]} carries an adapter; put it on the quantized model, or merge it before")
    if form == "w8a8":
        rotate(model)  # type: ignore[arg-type]
    return quantize_layers(model, form, mixed=form == "w8a8")


def quantize_layers(model: Model, form: str, mixed: bool = False) -> Model:
    """`quantize_model` of the layers as they are. `mixed`: those whose inputs no rotation reaches mix them."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantizable(path):
            weight, own = module.weight.detach(), mixed and mixes_inputs(path)
            held = QuantizedWeight.quantize([weight], tuple(weight.shape), form, own).pack()
            model.set_submodule(path, QuantizedLinear(held, module.bias))
    return quantize_head(model, form)


def quantize_head(model: Model, form: str) -> Model:
    """Give a model whose output matrix is its embedding a quantized copy of it as head, in place; returns the model."""
    if getattr(model, "lm_head", model) is None:
        rows_VD = model.model.embed_tokens.weight.detach()  # type: ignore[union-attr, operator]
        held = QuantizedWeight.quantize([rows_VD], (rows_VD.shape[0], rows_VD.shape[1]), form)
        model.lm_head = QuantizedLinear(held.pack())
    return model


def is_quantizable(path: str) -> bool:
    """Whether the linear layer of this name is quantized."""
    return not path.endswith("block_sparse_moe.gate")
