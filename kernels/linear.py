"""Linear layers for 1 to 16 rows (decoding), fused with the RMSNorm before them and with their LoRA adapters.

    n = x · r · g,   r = 1/√(mean(x²) + eps)          (or n = x, without a norm)
    y = n Wᵀ + s · (n Aᵀ) Bᵀ + c (+ residual)         A is (R, D), B is (O, R), arXiv 2106.09685

A decode step reads every weight once and does two operations with it, so its time is that of reading W. Hence:

* r is factored out: Σ x·r·g·W = r · Σ (x·g)·W. No program waits for the row statistic before it loads weights; extra
  programs of the same grid compute Σ x² meanwhile. x·g is rounded once, where the plain path rounds x·r and then the
  product with g, so the result is closer to fp64 but not bit-equal to the plain path.
* A's rows are appended to W's. n Aᵀ is the same GEMM over x as n Wᵀ, so [W; A] is one list of column tiles: A is read
  once, by its own programs, and no loop has a second product. (With a second, dependent `dot` in the loop Triton puts
  all warps along the 16 rows, and each repeats the whole product: kernels/README.md.)
* q, k and v are one list of column tiles too; so are gate and up.
* Split-K: 96 column tiles cannot saturate the memory of 108 or 132 SMs, so the sum over D is split among programs, each
  of which writes an fp32 partial sum. A second, small launch (`_epilogue`) adds the partial sums in a fixed order (no
  atomics: the same bits each run) and applies what needs complete sums: r, s·(n Aᵀ) Bᵀ, bias, residual, SwiGLU.

The partial sums add 4 · N · O · splits bytes, written and read once, in L2: 0.05 MB beside 50 for q, k, v at one row.

With more rows the layer is compute-bound: `torch.mm` (cuBLAS) with `rms_norm` and `swiglu` around it. The same path
serves CPUs, fp64 and autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activation import swiglu
from kernels.launch import (
    INTERPRETED,
    card,
    config,
    divide_up,
    jit,
    launch,
    power_of_2,
    rows,
    runs_here,
    splits_that_fill,
    tl,
    width,
)
from kernels.norm import rms_norm, rms_norm_definition

FEW_ROWS = 16  # rows of one mma tile; with up to 16 rows the time is that of loading the weights
MAX_OUTPUTS = 3
MAX_RANK = 256
DTYPES = (torch.float32, torch.bfloat16)  # not fp16: x · g, before it is multiplied by r, may exceed 65,504


def lora_linear_definition(
    x: Tensor,
    weight_OD: Tensor,
    lora_a_RD: Tensor | None,
    lora_b_OR: Tensor | None,
    scale: float,
    bias_O: Tensor | None = None,
) -> Tensor:
    y = F.linear(x, weight_OD, bias_O)
    if lora_a_RD is None or lora_b_OR is None:
        return y
    return y + scale * F.linear(F.linear(x, lora_a_RD), lora_b_OR)


def rms_norm_lora_linear_definition(
    x: Tensor,
    norm_weight_D: Tensor,
    weight_OD: Tensor,
    lora_a_RD: Tensor | None,
    lora_b_OR: Tensor | None,
    scale: float,
    eps: float,
    bias_O: Tensor | None = None,
) -> Tensor:
    n = rms_norm_definition(x, norm_weight_D, eps)
    return lora_linear_definition(n, weight_OD, lora_a_RD, lora_b_OR, scale, bias_O)


@jit()
def statistics(x, gain, squares, sums, split, start, stop, N, D, x_row, GROUP, BN, BS):
    """squares[split] = Σ x² over columns start … stop; with GROUP (int4.py) also Σ x·g of each group of columns."""
    n = tl.arange(0, BN)
    valid = n < N
    square = tl.zeros([BN, BS], tl.float32)
    for first in range(start, stop, BS):
        d = first + tl.arange(0, BS)
        in_d = d < stop
        tile = tl.load(x + n[:, None] * x_row + d[None, :], mask=valid[:, None] & in_d[None, :], other=0.0)
        square += tile.to(tl.float32) * tile.to(tl.float32)
        if GROUP:
            if gain is not None:
                g = tl.load(gain + d, mask=in_d, other=0.0)
                tile = (tile.to(tl.float32) * g.to(tl.float32)[None, :]).to(tile.dtype)
            total = tl.sum(tl.reshape(tile.to(tl.float32), (BN, BS // GROUP, GROUP)), axis=2)
            group = first // GROUP + tl.arange(0, BS // GROUP)
            at = sums + n[:, None] * (D // GROUP) + group[None, :]
            tl.store(at, total, mask=valid[:, None] & (group * GROUP < stop)[None, :])
    if squares is not None:
        tl.store(squares + split * N + n, tl.sum(square, axis=1), mask=valid)


@jit()
def locate_tile(tile, sizes, first, BO):
    """Which matrix a column tile belongs to, when the tiles of matrices with these numbers of rows follow one another
    from tile `first` on: (i, first tile of matrix i, first tile after the last matrix)."""
    i, own = 0, first
    edge = first + tl.cdiv(sizes[0], BO)
    for later in tl.static_range(1, len(sizes)):
        if tile >= edge:
            i, own = later, edge
        edge += tl.cdiv(sizes[later], BO)
    return i, own, edge


@jit()
def select(i, values):
    """values[i] for an i known only at run time; None if values is None."""
    value = None
    if values is not None:
        value = values[0]
        for later in tl.static_range(1, len(values)):
            if i == later:
                value = values[later]
    return value


@jit()
def offset_of(i, sizes, unit):
    """Number of units (tiles of `unit` rows) that the matrices before matrix i take."""
    total = 0
    for earlier in tl.static_range(len(sizes) - 1):
        if i > earlier:
            total += tl.cdiv(sizes[earlier], unit)
    return total


@jit()
def tile_product(x, gain, w, O, o, start, stop, N, D, x_row, BN, BO, BD):
    """Σ_d (x·g)[n, d] w[o, d] over columns start … stop, fp32 (BN, BO).

    A thread's part of g is 2 bytes, too few for an asynchronous copy, so it is loaded one step ahead explicitly.
    """
    n = tl.arange(0, BN)
    total = tl.zeros([BN, BO], tl.float32)
    next_g = tl.zeros([BD], x.dtype.element_ty)
    if gain is not None:
        next_g = tl.load(gain + start + tl.arange(0, BD), mask=start + tl.arange(0, BD) < D, other=0.0)
    for first in range(start, stop, BD):
        d = first + tl.arange(0, BD)
        in_d = d < D
        tile = tl.load(x + n[:, None] * x_row + d[None, :], mask=(n < N)[:, None] & in_d[None, :], other=0.0)
        if gain is not None:
            g = next_g
            next_g = tl.load(gain + d + BD, mask=d + BD < D, other=0.0)
            tile = (tile.to(tl.float32) * g.to(tl.float32)[None, :]).to(tile.dtype)
        w_DO = tl.load(w + o[None, :] * D + d[:, None], mask=(o < O)[None, :] & in_d[:, None], other=0.0)
        total = tl.dot(tile, w_DO, total, input_precision="ieee")
    return total


@jit("N")
def _products(
    x,
    gain,
    part,
    squares,
    weights,
    a,
    N,
    D,
    C,
    O,
    R,
    x_row,
    SPLIT_COLUMNS,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
):
    """part[split, n, tile · BO + …] = this split's part of (x·g) [W; A]ᵀ. Tile −1 (only with a norm): Σ x²."""
    split = tl.program_id(0)
    tile = tl.program_id(1)
    if gain is not None:
        tile -= 1
    start = split * SPLIT_COLUMNS
    stop = min(start + SPLIT_COLUMNS, D)
    if tile < 0:
        statistics(x, gain, squares, None, split, start, stop, N, D, x_row, 0, BN, BS)
    else:
        i, first, edge = locate_tile(tile, O, 0, BO)
        w, size = select(i, weights), select(i, O)
        if a is not None:
            if tile >= edge:
                i, first, edge = locate_tile(tile, R, edge, BO)
                w, size = select(i, a), select(i, R)
        o = (tile - first) * BO + tl.arange(0, BO)
        total = tile_product(x, gain, w, size, o, start, stop, N, D, x_row, BN, BO, BD)
        n = tl.arange(0, BN)
        column = tile * BO + tl.arange(0, BO)
        tl.store(part + (split * N + n)[:, None] * C + column[None, :], total, mask=(n < N)[:, None])


@jit()
def _sum_splits(part, column, N, C, SPLITS, BN):
    """Some columns' partial sums, added in order; the loop is unrolled, so that all loads are issued at once."""
    n = tl.arange(0, BN)
    total = tl.load(part + n[:, None] * C + column[None, :], mask=(n < N)[:, None], other=0.0)
    for split in tl.static_range(1, SPLITS):
        at = part + (split * N + n)[:, None] * C + column[None, :]
        total += tl.load(at, mask=(n < N)[:, None], other=0.0)
    return total


@jit()
def _dot_two_terms(a, b, total):
    """total + a b for fp32 a and bf16 b: a is split into two bf16 terms, which leaves an error of 2^-17 of it."""
    high = a.to(tl.bfloat16)
    low = (a - high.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(low, b, tl.dot(high, b, total))


@jit()
def _output(part, sums, r, scales, zeros, b, bias, i, o, edge, N, D, O, R, s, C, GROUP, SPLITS, RANK, BN, BO, BG):
    """Columns o of output i in fp32, before SwiGLU and residual; `edge` is the first of A's tiles."""
    n = tl.arange(0, BN)
    size = select(i, O)
    in_o = o < size
    total = _sum_splits(part, offset_of(i, O, BO) * BO + o, N, C, SPLITS, BN)
    if GROUP:  # int4: Σ_g S_g · (zero − 24 · scale), see int4.py
        G = D // GROUP
        scale, zero = select(i, scales), select(i, zeros)
        for first in range(0, G, BG):
            group = first + tl.arange(0, BG)
            at = sums + n[:, None] * G + group[None, :]
            sum_NG = tl.load(at, mask=(n < N)[:, None] & (group < G)[None, :], other=0.0)
            inside = (group < G)[:, None] & in_o[None, :]
            s_GO = tl.load(scale + group[:, None] * size + o[None, :], mask=inside, other=0.0)
            z_GO = tl.load(zero + group[:, None] * size + o[None, :], mask=inside, other=0.0)
            total = _dot_two_terms(-24.0 * sum_NG, s_GO, total)
            total = _dot_two_terms(sum_NG, z_GO, total)
    total *= r[:, None]
    if RANK:
        k = tl.arange(0, RANK)
        rank = select(i, R)
        u_column = (edge + offset_of(i, R, BO)) * BO + k
        u = _sum_splits(part, tl.where(k < rank, u_column, 0), N, C, SPLITS, BN)
        at = select(i, b) + o[None, :] * rank + k[:, None]
        b_RO = tl.load(at, mask=in_o[None, :] & (k < rank)[:, None], other=0.0)
        u = tl.where((k < rank)[None, :], u * (r * select(i, s))[:, None], 0.0).to(b_RO.dtype)
        total = tl.dot(u, b_RO, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(select(i, bias) + o, mask=in_o, other=0.0).to(tl.float32)[None, :]
    return total


@jit("N")
def _epilogue(
    part,
    squares,
    sums,
    y,
    residual,
    scales,
    zeros,
    b,
    bias,
    N,
    D,
    C,
    O,
    R,
    s,
    eps,
    Y,
    res_row,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    RANK: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BG: tl.constexpr,
):
    """y from the partial sums: BO columns of one output. GATED: silu(first output) · second output."""
    n = tl.arange(0, BN)
    i, first, edge = locate_tile(tl.program_id(0), O, 0, BO)
    o = (tl.program_id(0) - first) * BO + tl.arange(0, BO)
    r = tl.full([BN], 1.0, tl.float32)
    if squares is not None:
        square = tl.load(squares + n, mask=n < N, other=0.0)
        for split in tl.static_range(1, SPLITS):
            square += tl.load(squares + split * N + n, mask=n < N, other=0.0)
        r = 1.0 / tl.sqrt(square / D + eps)
    out = _output(part, sums, r, scales, zeros, b, bias, i, o, edge, N, D, O, R, s, C, GROUP, SPLITS, RANK, BN, BO, BG)
    if GATED:
        up = _output(
            part, sums, r, scales, zeros, b, bias, 1, o, edge, N, D, O, R, s, C, GROUP, SPLITS, RANK, BN, BO, BG
        )
        out = out / (1.0 + tl.exp(-out)) * up
    inside = (n < N)[:, None] & (o < select(i, O))[None, :]
    if residual is not None:
        out += tl.load(residual + n[:, None] * res_row + o[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y + n[:, None] * Y + (offset_of(i, O, 1) + o)[None, :], out, mask=inside)


@dataclass(frozen=True)
class Layer:
    """A linear layer with one to three outputs, without its weights. Lists have one entry per output; None: absent."""

    sizes: list[int]
    norm: tuple[Tensor, float] | None  # (weight_D, eps) of the RMSNorm of x
    lora_a: list[Tensor | None]
    lora_b: list[Tensor | None]
    scales: list[float]
    biases: list[Tensor | None]
    gated: bool  # one result, silu(first) · second, instead of the outputs

    @property
    def ranks(self) -> list[int]:
        return [0 if a is None else a.shape[0] for a in self.lora_a]


@dataclass(frozen=True)
class Plan:
    """How a layer's product kernel is split into programs."""

    tiles: dict[str, int]  # tile sizes, warps and stages
    column_tiles: int  # of [W; A]
    statistics: bool  # one more tile for `statistics`
    splits: int  # of the sum over D
    split_columns: int  # columns of x that a split covers

    @property
    def grid(self) -> tuple[int, int]:
        return self.splits, self.column_tiles + self.statistics


def _plan(name: tuple[str, str], x_ND: Tensor, layer: Layer, statistics: bool) -> Plan:
    D, tiles = x_ND.shape[1], config(*name, x_ND.device)
    slots = tiles.pop("RESIDENT") * card(x_ND.device)[1]
    column_tiles = sum(divide_up(size, tiles["BO"]) for size in (*layer.sizes, *layer.ranks))
    steps = divide_up(D, tiles["BD"])
    split_steps = divide_up(steps, splits_that_fill(column_tiles + statistics, steps, slots))
    split_columns = split_steps * tiles["BD"]
    return Plan(tiles, column_tiles, statistics, divide_up(D, split_columns), split_columns)


def few_rows(
    products: Any,
    name: tuple[str, str],
    x_ND: Tensor,
    layer: Layer,
    residual: Tensor | None,
    *,
    weights: Sequence[Tensor],
    scales_zeros: Sequence[tuple[Tensor, Tensor]] = (),
) -> Tensor:
    """Launch `products` (`_products`, or int4.py's) and `_epilogue` on up to 16 rows.

    `name` is the (kernel, shape class) of the configuration; `scales_zeros` are int4's, (D / group, O) for each output.
    Returns y (N, sum of sizes), half of the columns if gated.
    """
    N, D = x_ND.shape
    group = D // scales_zeros[0][0].shape[0] if scales_zeros else 0
    plan = _plan(name, x_ND, layer, layer.norm is not None or bool(group))
    columns = plan.column_tiles * plan.tiles["BO"]
    shared: dict[str, Any] = dict(  # by both launches
        part=x_ND.new_empty(plan.splits, N, columns, dtype=torch.float32),
        squares=None if layer.norm is None else x_ND.new_empty(plan.splits, N, dtype=torch.float32),
        N=N,
        D=D,
        C=columns,
        O=tuple(layer.sizes),
        R=tuple(layer.ranks),
    )
    arguments: dict[str, Any] = dict(
        x=x_ND,
        gain=None if layer.norm is None else layer.norm[0],
        weights=contiguous(weights, x_ND),
        a=contiguous(layer.lora_a, x_ND),
        x_row=x_ND.stride(0),
        SPLIT_COLUMNS=plan.split_columns,
    )
    flags: dict[str, Any] = {}
    sums = scales = zeros = None
    if scales_zeros:
        sums = x_ND.new_empty(N, D // group, dtype=torch.float32)
        scales, zeros = (contiguous(of_all, x_ND) for of_all in zip(*scales_zeros, strict=True))
        arguments |= dict(sums=sums, scales=scales)
        flags = dict(GROUP=group, ASM=not INTERPRETED)
    launch(products, plan.grid, arguments | shared, BN=FEW_ROWS, **plan.tiles, **flags)
    return _launch_epilogue(x_ND, layer, residual, plan, group, shared | dict(sums=sums, scales=scales, zeros=zeros))


def _launch_epilogue(
    x_ND: Tensor, layer: Layer, residual: Tensor | None, plan: Plan, group: int, arguments: dict[str, Any]
) -> Tensor:
    outputs = layer.sizes[:1] if layer.gated else layer.sizes
    y_NO = x_ND.new_empty(x_ND.shape[0], sum(outputs))
    biases = layer.biases
    if any(c is not None for c in biases):
        biases = [x_ND.new_zeros(size) if c is None else c for c, size in zip(biases, layer.sizes, strict=True)]
    arguments |= dict(
        y=y_NO,
        residual=residual,
        b=contiguous(layer.lora_b, x_ND),
        bias=contiguous(biases, x_ND),
        s=tuple(layer.scales),
        eps=0.0 if layer.norm is None else float(layer.norm[1]),
        Y=y_NO.shape[1],
        res_row=0 if residual is None else residual.stride(0),
    )
    launch(
        _epilogue,
        (sum(divide_up(size, plan.tiles["BO"]) for size in outputs),),
        arguments,
        GATED=layer.gated,
        GROUP=group,
        SPLITS=plan.splits,
        RANK=max(16, power_of_2(max(layer.ranks))) if any(layer.ranks) else 0,
        BN=FEW_ROWS,
        BO=plan.tiles["BO"],
        BG=32,
        num_stages=2,
        num_warps=8 if group or x_ND.dtype == torch.float32 else 4,
    )
    return y_NO


def contiguous(tensors: Sequence[Tensor | None], placeholder: Tensor) -> tuple[Tensor, ...] | None:
    """The tensors, contiguous, with `placeholder` (never read) for None; None if all are None."""
    if all(t is None for t in tensors):
        return None
    return tuple(placeholder if t is None else t.contiguous() for t in tensors)


def torch_outputs(x: Tensor, weights: Sequence[Tensor], layer: Layer) -> list[Tensor]:
    """The outputs from torch's GEMMs, before SwiGLU: many rows, fp64, CPUs, autograd. An adapter costs two GEMMs; the
    second adds to y in place."""
    n_ND = (x if layer.norm is None else rms_norm(x, *layer.norm)).reshape(-1, x.shape[-1])
    outs = []
    for w, a, b, s, c in zip(weights, layer.lora_a, layer.lora_b, layer.scales, layer.biases, strict=True):
        y_NO = F.linear(n_ND, w, c)
        if a is not None and b is not None:
            y_NO.addmm_(F.linear(n_ND, a), b.t(), alpha=s)
        outs.append(y_NO.view(*x.shape[:-1], w.shape[0]))
    return outs


def make_layer(
    x: Tensor, sizes: list[int], norm: Any, lora_a: Any, lora_b: Any, scale: Any, bias: Any, gated: bool
) -> Layer:
    """A checked Layer; a value that is not a list is every output's. Raises ValueError for shapes that disagree."""
    count = len(sizes)
    scales = [float(s) for s in as_list(scale, count)]
    layer = Layer(sizes, norm, as_list(lora_a, count), as_list(lora_b, count), scales, as_list(bias, count), gated)
    for O, a, b in zip(sizes, layer.lora_a, layer.lora_b, strict=True):
        check_adapter((O, x.shape[-1]), a, b)
    if gated and (count != 2 or sizes[0] != sizes[1]):
        raise ValueError(f"gated takes two weights of one shape, gate and up; the outputs have sizes {sizes}")
    return layer


def compute(
    x: Tensor,
    layer: Layer,
    residual: Tensor | None,
    max_rows: int,
    dense: Callable[[], Sequence[Tensor]],
    kernel: Callable[[Tensor, Layer, Tensor | None], Tensor],
) -> list[Tensor]:
    """The layer's results. Up to `max_rows` rows go through `kernel` (few_rows with its weights) in passes of 16; more
    rows, and what the kernel does not cover, through torch with the weights that `dense()` returns."""
    sizes = layer.sizes
    if residual is not None and (len(sizes) != 1 or residual.shape != (*x.shape[:-1], sizes[0])):
        raise ValueError("a residual needs exactly one output, of the residual's shape")
    tensors = (x, *layer.lora_a, *layer.lora_b, *layer.biases, residual, layer.norm[0] if layer.norm else None)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    few = 0 < x.numel() // x.shape[-1] <= max_rows and max(layer.ranks) <= MAX_RANK and len(sizes) <= MAX_OUTPUTS
    if not few or needs_grad or not runs_here(*tensors, dtypes=DTYPES):
        outs = torch_outputs(x, dense(), layer)
        if layer.gated:
            return [swiglu(*outs)]
        return outs if residual is None else [residual + outs[0]]
    residuals = itertools.repeat(None) if residual is None else rows(residual).split(FEW_ROWS)
    passes = zip(rows(x).split(FEW_ROWS), residuals, strict=False)
    parts = [kernel(x_nD, layer, residual_nO) for x_nD, residual_nO in passes]
    y_NO = parts[0] if len(parts) == 1 else torch.cat(parts)
    y = y_NO.unflatten(0, x.shape[:-1]) if x.dim() != 2 else y_NO
    return [y] if layer.gated else list(y.split(sizes, dim=-1))


def _linear(
    x: Tensor, norm: Any, weight: Any, lora: tuple[Any, Any, Any], bias: Any, residual: Any, gated: bool
) -> Any:
    several = not isinstance(weight, Tensor)
    weights = list(weight) if several else [weight]
    for w in weights:
        if x.shape[-1] != w.shape[1]:
            raise ValueError(f"x is {tuple(x.shape)} and the weight {tuple(w.shape)}: their last sizes must agree")
    layer = make_layer(x, [w.shape[0] for w in weights], norm, *lora, bias, gated)
    trained = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
    max_rows = 0 if trained or any(w.dtype != x.dtype for w in weights) else FEW_ROWS
    kernel = partial(few_rows, _products, ("linear", width(x.dtype)), weights=weights)
    outs = compute(x, layer, residual, max_rows, lambda: weights, kernel)
    return tuple(outs) if several and not gated else outs[0]


def as_list(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def check_adapter(shape: tuple[int, int], lora_a_RD: Tensor | None, lora_b_OR: Tensor | None) -> None:
    O, D = shape
    if (lora_a_RD is None) != (lora_b_OR is None):
        raise ValueError("an adapter needs both lora_a and lora_b")
    if lora_a_RD is not None and lora_b_OR is not None:
        R = lora_a_RD.shape[0]
        if lora_a_RD.shape != (R, D) or lora_b_OR.shape != (O, R):
            raise ValueError(
                f"lora_a {tuple(lora_a_RD.shape)} and lora_b {tuple(lora_b_OR.shape)} of a weight {(O, D)} "
                f"must be (R, {D}) and ({O}, R)"
            )


def lora_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    lora_a: Any = None,
    lora_b: Any = None,
    scale: Any = 1.0,
    bias: Any = None,
    residual: Tensor | None = None,
) -> Any:
    """x Wᵀ + scale · (x Aᵀ) Bᵀ + bias + residual: x (…, D), weight (O, D), lora_a (R, D), lora_b (O, R) → (…, O).

    A list of up to three weights (q, k and v, say; the other arguments are lists too, or one value for all) returns a
    tuple of outputs from one launch. residual (…, O) needs one output. Differentiable. fp32 and bf16 run the kernel on
    CUDA for up to 16 rows. Raises ValueError for shapes that disagree. Source: arXiv 2106.09685.
    """
    return _linear(x, None, weight, (lora_a, lora_b, scale), bias, residual, False)


def rms_norm_lora_linear(
    x: Tensor,
    norm_weight_D: Tensor,
    weight: Tensor | Sequence[Tensor],
    lora_a: Any,
    lora_b: Any,
    scale: Any,
    eps: float,
    bias: Any = None,
    gated: bool = False,
) -> Any:
    """lora_linear(rms_norm(x, norm_weight_D, eps), …): shapes, dtypes and lists as in `lora_linear`. Differentiable.

    With `gated` the two weights are gate's and up's, and the result is silu(gate) · up, one tensor.
    """
    if norm_weight_D.shape != x.shape[-1:]:
        raise ValueError(f"x is {tuple(x.shape)}, so the norm's weight must be ({x.shape[-1]},)")
    return _linear(x, (norm_weight_D, eps), weight, (lora_a, lora_b, scale), bias, None, gated)
