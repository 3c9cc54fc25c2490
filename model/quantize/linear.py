"""Weight quantization to 8 or 4 bits. Decoding reads every weight once per token, so its time is proportional to bytes.

    int8     W[o, d] = q · scale[o]                          q in −127 … 127, one scale per row      8 bits per weight
    int4-32  W[o, d] = (q − 8) · scale[o, g] + zero[o, g]    q in 0 … 15, g a group of 32 columns    5
    int4-64, int4-128 (int4 is int4-64)                      the same with larger groups             4.5, 4.25
    nf4      W[o, d] = NF4[q] · absmax[o, g]                 g of 64 columns, absmax in 8 bits       4.13
    w8a8     W[o, d] = q · scale[o]                          like int8, scales in fp32; int8 inputs  8

Scales and zeros of int8 and int4 are rounded to bf16 before the codes are chosen, so all implementations dequantize to
the same weight. If a format's groups do not divide the width, smaller groups that do are used, or int8. nf4 is
bit-identical to the base of `lora/quantized.py` (QLoRA), so a model is served with the weights it was tuned on.

GEMM. The specification is x · Wᵀ with W dequantized to x's dtype. For int8 and int4, torch's packed kernels dequantize
in registers instead; they take bf16 inputs and sum in fp32. `pack` prepares a weight for them. On a CPU every weight is
packed, because the specification would write the whole dequantized matrix for each GEMM. A packed weight rounds its
inputs to bf16 for any number of rows, except in fp64. The packed kernels dequantize again for every four rows, so above
PACKED_ROWS rows W is dequantized tile by tile, each tile once, for an ordinary GEMM.

w8a8 is an int8 GEMM (model/quantize/integer.py), except for fp64 inputs. The model is rotated first, so that fewer
inputs are outliers, and down_proj's inputs are mixed at run time (`mixed`): model/quantize/rotation.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.quantize.blockwise import NF4, dequantize_scales, nf4_codes, quantize_scales
from model.quantize.integer import integer_linear
from model.quantize.rotation import mix, mixes_inputs, rotate, unmix
from model.support.hardware import compute_dtype, product

# columns per group; 0: one scale per row
FORMATS = {"int8": 0, "int4": 64, "int4-32": 32, "int4-64": 64, "int4-128": 128, "nf4": 64, "w8a8": 0}
PACKED_ROWS = {"int8": 24, "int4": 96}  # measured crossovers, constant because both sides scale with the machine
PIECE = 2**20  # weights that are quantized or dequantized at a time, few enough for the caches
BLOCK = 64  # rows per block of torch's packed int4 layout


def format_of(form: str, width: int) -> tuple[str, int]:
    """("int8" | "int4" | "nf4" | "w8a8", columns per group) that the format `form` uses for a matrix of this width."""
    kind, max_group = form.partition("-")[0], FORMATS[form]
    if kind == "w8a8" or (kind == "nf4" and width % max_group == 0):
        return kind, max_group
    if kind == "int4":
        for group in (128, 64, 32):
            if group <= max_group and width % group == 0:
                return kind, group
    return "int8", 0


def bytes_of(form: str, rows: int, width: int) -> int:
    """Bytes of a rows × width matrix in the format `form`."""
    kind, group = format_of(form, width)
    if kind in ("int8", "w8a8"):
        return rows * width + rows * (2 if kind == "int8" else 4)
    groups = rows * (width // group)
    return rows * width // 2 + (groups * 4 if kind == "int4" else groups + groups // 64 + 8)


class QuantizedWeight(nn.Module):
    """A frozen matrix as codes and scales. `dequantize(dtype)` returns W, `product(x)` returns x · Wᵀ.

    codes       int8, w8a8: (O, D) int8;  int4, nf4: (O, D / 2) uint8, two neighbors of a row per byte (int4: the even
                column in the low half, or, if packed, torch's order; nf4: the even column in the high half)
    scales      int8: (O,) bf16;  w8a8: (O,) fp32;  int4: (D / group, O, 2) bf16, scale and zero;  nf4: (O · D / group,)
                uint8, whose own scales and mean (model/quantize/blockwise.py) are `scales_absmax` and `scales_mean`
    mixed       w8a8: the codes are those of `mix(W)`, and inputs are mixed before the GEMM
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
        self.kind, self.group = format_of(form, shape[1])
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("scales_absmax", second[0] if second else None, persistent=False)
        self.register_buffer("scales_mean", second[1] if second else None, persistent=False)

    @classmethod
    def quantize(
        cls, pieces: Iterable[Tensor], shape: Sequence[int], form: str, mixed: bool = False
    ) -> QuantizedWeight:
        """Quantize a matrix whose rows come in pieces of any float dtype; only one piece is in memory at a time."""
        kind, group = format_of(form, shape[1])
        parts = []
        for piece_MD in pieces:
            for rows_MD in piece_MD.detach().split(max(1, PIECE // shape[1])):
                parts.append(quantize_rows(rows_MD, kind, group, mixed))
        codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        if kind == "nf4":
            scales, *second = quantize_scales(scales)
            return cls(form, shape, codes.view(shape[0], -1), scales, (second[0], second[1]))
        return cls(form, shape, codes, scales.transpose(0, 1).contiguous() if kind == "int4" else scales, mixed=mixed)

    def codes_of(self, rows_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize some rows only, for one rank: (codes, scales); nf4's scales are not yet quantized."""
        return quantize_rows(rows_MD, self.kind, self.group)

    @classmethod
    def join(cls, weights: list[QuantizedWeight]) -> QuantizedWeight:
        """Stack weights of one format and width (not nf4) along the rows. The originals become views of the result."""
        first, O = weights[0], sum(weight.shape[0] for weight in weights)
        dim = 1 if first.kind == "int4" else 0
        codes, scales = torch.cat([w.codes for w in weights]), torch.cat([w.scales for w in weights], dim=dim)
        sizes = [weight.shape[0] for weight in weights]
        for weight, own_codes, own_scales in zip(weights, codes.split(sizes), scales.split(sizes, dim), strict=True):
            weight.codes.data, weight.scales.data = own_codes, own_scales
        joint = cls(first.form, (O, first.shape[1]), codes, scales, mixed=first.mixed)
        joint.packed = first.packed
        return joint

    def dequantize(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """The weight (`mix(W)` if mixed), computed in at least fp32. `rows`: these only, in whole blocks if packed."""
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
        """x · Wᵀ in x's dtype. For few rows W is dequantized in registers, for many rows tile by tile."""
        if self.mixed:
            x_ND = mix(x_ND)
        if self.kind == "w8a8" and x_ND.dtype != torch.float64:
            return integer_linear(x_ND, self.codes, self.scales)
        if not self.packed or x_ND.dtype == torch.float64:
            return F.linear(x_ND, self.dequantize(x_ND.dtype))
        bf16_ND = x_ND.to(torch.bfloat16)
        if x_ND.shape[0] > PACKED_ROWS[self.kind]:
            return self.tiled(bf16_ND.to(compute_dtype()), x_ND.dtype)
        if self.kind == "int8":
            y_NO = torch._weight_int8pack_mm(bf16_ND, self.codes, self.scales)
        else:
            y_NO = torch._weight_int4pack_mm_for_cpu(bf16_ND, self.codes, self.group, self.scales.contiguous())
        return y_NO.to(x_ND.dtype)

    def product_backward(self, g_NO: Tensor) -> Tensor:
        """g · W in g's dtype, the gradient of `product`'s input."""
        dx_ND = g_NO @ self.dequantize(g_NO.dtype)
        return unmix(dx_ND) if self.mixed else dx_ND

    def tiled(self, x_ND: Tensor, dtype: torch.dtype) -> Tensor:
        """x · Wᵀ in `dtype`, dequantizing W in tiles of rows to x's dtype.

        int8's codes are exact in every dtype, so its scales are applied to the result.
        """
        O, D = self.shape
        y_NO = x_ND.new_empty(x_ND.shape[0], O, dtype=dtype)
        step = max(BLOCK, PIECE // D // BLOCK * BLOCK)
        for start in range(0, O, step):
            rows = slice(start, min(start + step, O))
            tile_MD = self.codes[rows].to(x_ND.dtype) if self.kind == "int8" else self.dequantize(x_ND.dtype, rows)
            y_NO[:, rows] = product(x_ND, tile_MD)
        return y_NO.mul_(self.scales) if self.kind == "int8" else y_NO

    def pack(self) -> QuantizedWeight:
        """Prepare for torch's packed kernel, if there is one for this matrix and device; returns self."""
        supported = self.kind == "int8" or (self.kind == "int4" and self.shape[0] % BLOCK == 0)
        if self.packed or not supported or self.codes.device.type != "cpu":
            return self
        if self.kind == "int4":
            step = max(1, PIECE // self.shape[1] // BLOCK) * BLOCK
            for rows in self.codes.split(step):  # in place, because a block's bytes stay within the block
                rows.copy_(torch._convert_weight_to_int4pack_for_cpu(unpack(rows).int(), 1))
        self.packed = True
        return self


class QuantizedLinear(nn.Linear):
    """nn.Linear with a quantized weight, in `quantized`; `weight` is None. Forward only."""

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
    """nn.Embedding whose weight stays in its own dtype (bf16) and whose output is cast to `dtype`."""

    def __init__(self, rows_VD: Tensor, dtype: torch.dtype) -> None:
        super().__init__(rows_VD.shape[0], rows_VD.shape[1], _weight=rows_VD)
        self.weight.requires_grad_(False)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).to(self.dtype)


def quantize_rows(rows_MD: Tensor, kind: str, group: int, mixed: bool = False) -> tuple[Tensor, Tensor]:
    """(codes, scales) of these rows; nf4's scales are still fp32."""
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
    """(q_OD int8, scale_O in bf16 or fp32). The error of a weight is at most half a scale."""
    wide_OD = weight_OD.float()
    scale_O = (wide_OD.abs().amax(dim=1) / 127).clamp_min(1e-30)
    if dtype == torch.bfloat16:
        scale_O = up_to_bf16(scale_O)
    return (wide_OD / scale_O.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale_O


def to_int4(weight_OD: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(codes (O, D / 2) uint8, the even column in the low half; scale_zero_OG2 bf16).

    The error of a weight is at most half a scale, or, at the ends of a group, what rounding its zero to bf16 adds.
    """
    wide_OGg = weight_OD.float().unflatten(1, (-1, group))
    low_OG, high_OG = wide_OGg.aminmax(dim=2)
    scale_OG = up_to_bf16(((high_OG - low_OG) / 15).clamp_min(1e-30))
    zero_OG = (low_OG + 8 * scale_OG.float()).to(torch.bfloat16)
    q_OGg = (wide_OGg - zero_OG.float()[..., None]).div_(scale_OG.float()[..., None]).round_().add_(8).clamp_(0, 15)
    q_OD = q_OGg.flatten(1).to(torch.uint8)
    return q_OD[:, ::2] | (q_OD[:, 1::2] << 4), torch.stack((scale_OG, zero_OG), dim=-1)


def unpack(codes: Tensor) -> Tensor:
    """(O, D / 2) bytes to (O, D) codes, the low half first."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)


@cache
def torch_order() -> Tensor:
    """Where torch's packed int4 order keeps each row of a block, found by packing row numbers: in the low halves of a
    column's bytes (0 to 31) or in the high halves (32 to 63)."""
    row_O8 = torch.arange(BLOCK, dtype=torch.int32)[:, None].repeat(1, 8)
    below = torch._convert_weight_to_int4pack_for_cpu(row_O8 % 16, 1).view(8, -1)[0].int()
    above = torch._convert_weight_to_int4pack_for_cpu(row_O8 // 16, 1).view(8, -1)[0].int()
    return (torch.cat((below & 15, below >> 4)) + 16 * torch.cat((above & 15, above >> 4))).argsort()


def from_torch_order(codes: Tensor) -> Tensor:
    """torch's packed int4 codes (whole blocks) to (O, D) codes."""
    O, D = codes.shape[0], codes.shape[1] * 2
    bytes_nJD = codes.view(O // BLOCK, D, BLOCK // 2).transpose(1, 2).contiguous()
    q_nBD = torch.cat((bytes_nJD & 15, bytes_nJD >> 4), dim=1)
    return q_nBD.index_select(1, torch_order()).view(O, D)


@cache
def nf4_pairs(device: torch.device) -> Tensor:
    """Table (256, 2) of the two NF4 levels in each byte."""
    levels, byte = torch.tensor(NF4), torch.arange(256)
    return torch.stack((levels[byte >> 4], levels[byte & 15]), dim=1).to(device)


Model = TypeVar("Model", bound=nn.Module)


def quantize_model(model: Model, form: str = "int8") -> Model:
    """Replace every linear layer, including the LM head, by a QuantizedLinear, in place; returns the model.

    Embedding, norms and MoE routers stay as they are. w8a8 rotates the model first. Raises ValueError if a layer has an
    adapter: quantize first, then load the adapter.
    """
    adapted = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and type(m) is not nn.Linear]
    if adapted := [path for path in adapted if is_quantizable(path)]:
        raise ValueError(f"{adapted[0]} has an adapter; load it on the quantized model, or merge it first")
    if form == "w8a8":
        rotate(model)  # type: ignore[arg-type]
    return quantize_layers(model, form, mixed=form == "w8a8")


def quantize_layers(model: Model, form: str, mixed: bool = False) -> Model:
    """`quantize_model` without rotation. `mixed`: down projections mix their inputs (model/quantize/rotation.py)."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantizable(path):
            weight = module.weight.detach()
            quantized = QuantizedWeight.quantize([weight], tuple(weight.shape), form, mixed and mixes_inputs(path))
            model.set_submodule(path, QuantizedLinear(quantized.pack(), module.bias))
    return quantize_head(model, form)


def quantize_head(model: Model, form: str) -> Model:
    """If the LM head is tied to the embedding, make it a quantized copy, in place; returns the model."""
    if getattr(model, "lm_head", model) is None:
        rows_VD = model.model.embed_tokens.weight.detach()  # type: ignore[union-attr, operator]
        quantized = QuantizedWeight.quantize([rows_VD], (rows_VD.shape[0], rows_VD.shape[1]), form)
        model.lm_head = QuantizedLinear(quantized.pack())
    return model


def is_quantizable(path: str) -> bool:
    """True unless this linear layer is a MoE router."""
    return not path.endswith("block_sparse_moe.gate")
