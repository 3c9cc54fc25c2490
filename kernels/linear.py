"""Linear layers for 1 to 16 rows, the RMSNorm before them and their LoRA adapters inside: what decoding is made of.

    n = x · r · g,   r = 1/√(mean(x²) + eps)          (or n = x)
    y = n Wᵀ + s · (n Aᵀ) Bᵀ + c (+ residual)         A is (R, D), B is (O, R), arXiv 2106.09685

A decoded token reads every weight once and does two operations with it, so the time is the time of reading W. Four
decisions follow.

* r leaves the sum: Σ x·r·g·W = r · Σ (x·g)·W. So no program waits for the statistic before it asks for weights;
  extra programs of the same grid sum x² meanwhile. x·g is rounded once, where the plain path rounds x·r and then g's
  product, so the result is nearer to fp64, not equal to the plain path's bits.
* A is more rows of W. n Aᵀ wants the same walk over x as n Wᵀ, so [W; A] is one list of column tiles: A is read once,
  by programs of its own, and there is no second product inside anybody's loop. (A loop that feeds a second `dot`
  makes Triton put all warps along the 16 rows, each repeating the whole product: kernels/README.md.)
* q, k and v are one list too, as are gate and up.
* Split-K. 96 column tiles cannot keep 108 or 132 SMs reading, so the sum over D is split among programs, each
  writing an fp32 part. A second, small launch adds the parts in a fixed order (no atomics: the same bits each run) and
  does what needs complete sums: r, s·u Bᵀ, bias, residual, SwiGLU.

Bytes beyond W's: parts of 4 · N · O · splits, written and read once, from L2: 0.2 MB of 50 for q, k, v at one row.

More rows are no longer a matter of reading: `torch.mm` (cuBLAS) computes them, with `rms_norm` and `swiglu` around it,
and autograd goes through. That path is also what computes on a CPU, in fp64 and under autograd.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
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

FEW_ROWS = 16  # rows of one mma tile; up to so many, a product takes as long as its weights take to arrive
MOST_OUTPUTS = 3
MOST_RANK = 256
DTYPES = (torch.float32, torch.bfloat16)  # not fp16: x · g, before r makes it small, may pass 65,504


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
    """Σ x² of columns start … stop, into squares[split]; with GROUP also Σ x·g of each group of columns (int4.py)."""
    n = tl.arange(0, BN)
    live = n < N
    square = tl.zeros([BN, BS], tl.float32)
    for first in range(start, stop, BS):
        d = first + tl.arange(0, BS)
        in_d = d < stop
        tile = tl.load(x + n[:, None] * x_row + d[None, :], mask=live[:, None] & in_d[None, :], other=0.0)
        square += tile.to(tl.float32) * tile.to(tl.float32)
        if GROUP:
            if gain is not None:
                g = tl.load(gain + d, mask=in_d, other=0.0)
                tile = (tile.to(tl.float32) * g.to(tl.float32)[None, :]).to(tile.dtype)
            total = tl.sum(tl.reshape(tile.to(tl.float32), (BN, BS // GROUP, GROUP)), axis=2)
            group = first // GROUP + tl.arange(0, BS // GROUP)
            at = sums + n[:, None] * (D // GROUP) + group[None, :]
            tl.store(at, total, mask=live[:, None] & (group * GROUP < stop)[None, :])
    if squares is not None:
        tl.store(squares + split * N + n, tl.sum(square, axis=1), mask=live)


@jit()
def find(tile, sizes, first, BO):
    """(i, the first tile of matrix i, the first tile after all): where a tile lies among matrices of these numbers of
    rows, whose tiles follow one another from tile `first` on."""
    i, own = 0, first
    edge = first + tl.cdiv(sizes[0], BO)
    for later in tl.static_range(1, len(sizes)):
        if tile >= edge:
            i, own = later, edge
        edge += tl.cdiv(sizes[later], BO)
    return i, own, edge


@jit()
def choose(i, values):
    """values[i]; None where there are none."""
    value = None
    if values is not None:
        value = values[0]
        for later in tl.static_range(1, len(values)):
            if i == later:
                value = values[later]
    return value


@jit()
def before(i, sizes, unit):
    """How many units the matrices before matrix i take."""
    total = 0
    for earlier in tl.static_range(len(sizes) - 1):
        if i > earlier:
            total += tl.cdiv(sizes[earlier], unit)
    return total


@jit()
def walk(x, gain, w, O, o, start, stop, N, D, x_row, BN, BO, BD):
    """Σ_d (x·g)[n, d] w[o, d] over columns start … stop, fp32 (BN, BO).

    A thread's part of a gain is 2 bytes, too few for an asynchronous copy: it is loaded one step ahead by hand.
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
    SHARE,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
):
    """part[split, n, tile · BO + …] = this split's share of x·g times [W; A]ᵀ; tile −1 (with a norm): Σ x²."""
    split = tl.program_id(0)
    tile = tl.program_id(1)
    if gain is not None:
        tile -= 1
    start = split * SHARE
    stop = min(start + SHARE, D)
    if tile < 0:
        statistics(x, gain, squares, None, split, start, stop, N, D, x_row, 0, BN, BS)
    else:
        i, first, edge = find(tile, O, 0, BO)
        w, size = choose(i, weights), choose(i, O)
        if a is not None:
            if tile >= edge:
                i, first, edge = find(tile, R, edge, BO)
                w, size = choose(i, a), choose(i, R)
        o = (tile - first) * BO + tl.arange(0, BO)
        total = walk(x, gain, w, size, o, start, stop, N, D, x_row, BN, BO, BD)
        n = tl.arange(0, BN)
        column = tile * BO + tl.arange(0, BO)
        tl.store(part + (split * N + n)[:, None] * C + column[None, :], total, mask=(n < N)[:, None])


@jit()
def _added(part, column, N, C, SPLITS, BN):
    """The parts of some columns, added in order; every load is issued before the first addition waits."""
    n = tl.arange(0, BN)
    total = tl.load(part + n[:, None] * C + column[None, :], mask=(n < N)[:, None], other=0.0)
    for split in tl.static_range(1, SPLITS):
        at = part + (split * N + n)[:, None] * C + column[None, :]
        total += tl.load(at, mask=(n < N)[:, None], other=0.0)
    return total


@jit()
def _in_two_terms(a, b, total):
    """total + a b for an fp32 a and a bf16 b: a as the sum of two bf16 numbers, which leaves 2^-17 of it."""
    high = a.to(tl.bfloat16)
    low = (a - high.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(low, b, tl.dot(high, b, total))


@jit()
def _finished(part, sums, r, scales, zeros, b, bias, i, o, edge, N, D, O, R, s, C, GROUP, SPLITS, RANK, BN, BO, BG):
    """Columns o of output i in fp32; `edge` is the first of A's tiles."""
    n = tl.arange(0, BN)
    size = choose(i, O)
    in_o = o < size
    total = _added(part, before(i, O, BO) * BO + o, N, C, SPLITS, BN)
    if GROUP:  # int4: what the codes' offset and the groups' zeros add (int4.py)
        G = D // GROUP
        scale, zero = choose(i, scales), choose(i, zeros)
        for first in range(0, G, BG):
            group = first + tl.arange(0, BG)
            at = sums + n[:, None] * G + group[None, :]
            sum_NG = tl.load(at, mask=(n < N)[:, None] & (group < G)[None, :], other=0.0)
            inside = (group < G)[:, None] & in_o[None, :]
            s_GO = tl.load(scale + group[:, None] * size + o[None, :], mask=inside, other=0.0)
            z_GO = tl.load(zero + group[:, None] * size + o[None, :], mask=inside, other=0.0)
            total = _in_two_terms(-24.0 * sum_NG, s_GO, total)
            total = _in_two_terms(sum_NG, z_GO, total)
    total *= r[:, None]
    if RANK:
        k = tl.arange(0, RANK)
        rank = choose(i, R)
        u_column = (edge + before(i, R, BO)) * BO + k
        u = _added(part, tl.where(k < rank, u_column, 0), N, C, SPLITS, BN)
        at = choose(i, b) + o[None, :] * rank + k[:, None]
        b_RO = tl.load(at, mask=in_o[None, :] & (k < rank)[:, None], other=0.0)
        u = tl.where((k < rank)[None, :], u * (r * choose(i, s))[:, None], 0.0).to(b_RO.dtype)
        total = tl.dot(u, b_RO, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(choose(i, bias) + o, mask=in_o, other=0.0).to(tl.float32)[None, :]
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
    """y = what complete sums allow; GATED: silu(first output) · second output."""
    n = tl.arange(0, BN)
    i, first, edge = find(tl.program_id(0), O, 0, BO)
    o = (tl.program_id(0) - first) * BO + tl.arange(0, BO)
    r = tl.full([BN], 1.0, tl.float32)
    if squares is not None:
        square = tl.load(squares + n, mask=n < N, other=0.0)
        for split in tl.static_range(1, SPLITS):
            square += tl.load(squares + split * N + n, mask=n < N, other=0.0)
        r = 1.0 / tl.sqrt(square / D + eps)
    out = _finished(
        part, sums, r, scales, zeros, b, bias, i, o, edge, N, D, O, R, s, C, GROUP, SPLITS, RANK, BN, BO, BG
    )
    if GATED:
        up = _finished(
            part, sums, r, scales, zeros, b, bias, 1, o, edge, N, D, O, R, s, C, GROUP, SPLITS, RANK, BN, BO, BG
        )
        out = out / (1.0 + tl.exp(-out)) * up
    inside = (n < N)[:, None] & (o < choose(i, O))[None, :]
    if residual is not None:
        out += tl.load(residual + n[:, None] * res_row + o[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y + n[:, None] * Y + (before(i, O, 1) + o)[None, :], out, mask=inside)


def few_rows(
    products: Any,
    name: tuple[str, str],
    x_ND: Tensor,
    sizes: Sequence[int],
    *,
    norm: tuple[Tensor, float] | None,
    lora_a: Sequence[Tensor | None],
    lora_b: Sequence[Tensor | None],
    scales: Sequence[float],
    biases: Sequence[Tensor | None],
    residual: Tensor | None,
    gated: bool,
    weights: Sequence[Tensor],
    steps: Sequence[tuple[Tensor, Tensor]] = (),
) -> Tensor:
    """Launch `products` (this file's or int4.py's kernel, configured as `name`) and the epilogue → y (N, sum of sizes;
    half where gated).

    `steps` are int4's scales and zeros (D / group, O) of each output.
    """
    (N, D), tiles = x_ND.shape, config(*name, x_ND.device)
    slots = tiles.pop("RESIDENT") * card(x_ND.device)[1]
    ranks = [0 if a is None else a.shape[0] for a in lora_a]
    BO, BD, group = tiles["BO"], tiles["BD"], D // steps[0][0].shape[0] if steps else 0
    column_tiles = sum(divide_up(n, BO) for n in (*sizes, *ranks))
    grid_tiles = column_tiles + int(norm is not None or bool(group))
    splits = splits_that_fill(grid_tiles, divide_up(D, BD), slots)
    share = divide_up(divide_up(D, BD), splits) * BD
    splits = divide_up(D, share)
    C = column_tiles * BO
    gain_D, eps = norm if norm is not None else (None, 0.0)
    shared: dict[str, Any] = dict(
        part=x_ND.new_empty(splits, N, C, dtype=torch.float32),
        squares=None if norm is None else x_ND.new_empty(splits, N, dtype=torch.float32),
        N=N,
        D=D,
        C=C,
        O=tuple(sizes),
        R=tuple(ranks),
    )
    a = filled(lora_a, x_ND)
    arguments: dict[str, Any] = dict(
        x=x_ND, gain=gain_D, weights=filled(weights, x_ND), a=a, x_row=x_ND.stride(0), SHARE=share
    )
    flags: dict[str, Any] = {}
    sums = step_scales = step_zeros = None
    if steps:
        sums = x_ND.new_empty(N, D // group, dtype=torch.float32)
        step_scales, step_zeros = (filled(of_all, x_ND) for of_all in zip(*steps, strict=True))
        arguments |= dict(sums=sums, scales=step_scales)
        flags = dict(GROUP=group, ASM=not INTERPRETED)
    launch(products, (splits, grid_tiles), arguments | shared, BN=FEW_ROWS, **tiles, **flags)
    y_NO = x_ND.new_empty(N, sizes[0] if gated else sum(sizes))
    if any(c is not None for c in biases):
        biases = [x_ND.new_zeros(n) if c is None else c for c, n in zip(biases, sizes, strict=True)]
    arguments = dict(
        sums=sums,
        y=y_NO,
        residual=residual,
        scales=step_scales,
        zeros=step_zeros,
        b=filled(lora_b, x_ND),
        bias=filled(biases, x_ND),
        s=tuple(scales),
        eps=float(eps),
        Y=y_NO.shape[1],
        res_row=0 if residual is None else residual.stride(0),
    )
    launch(
        _epilogue,
        (sum(divide_up(n, BO) for n in (sizes[:1] if gated else sizes)),),
        arguments | shared,
        GATED=gated,
        GROUP=group,
        SPLITS=splits,
        RANK=max(16, power_of_2(max(ranks))) if any(ranks) else 0,
        BN=FEW_ROWS,
        BO=BO,
        BG=32,
        num_stages=2,
        num_warps=8 if group or x_ND.dtype == torch.float32 else 4,
    )
    return y_NO


def filled(tensors: Sequence[Tensor | None], absent: Tensor) -> tuple[Tensor, ...] | None:
    """The tensors, contiguous, `absent` in the place of one that is not there; None where none is."""
    if all(t is None for t in tensors):
        return None
    return tuple(absent if t is None else t.contiguous() for t in tensors)


def by_torch(
    x: Tensor,
    norm: tuple[Tensor, float] | None,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor | None],
    lora_b: Sequence[Tensor | None],
    scales: Sequence[float],
    biases: Sequence[Tensor | None],
) -> list[Tensor]:
    """The layer by matrix products of torch's: many rows, fp64, CPUs, autograd. An adapter costs two products and no
    pass of its own: the second adds to y in place."""
    n_ND = (x if norm is None else rms_norm(x, *norm)).reshape(-1, x.shape[-1])
    outs = []
    for w, a, b, s, c in zip(weights, lora_a, lora_b, scales, biases, strict=True):
        y_NO = F.linear(n_ND, w, c)
        if a is not None and b is not None:
            y_NO.addmm_(F.linear(n_ND, a), b.t(), alpha=s)
        outs.append(y_NO.view(*x.shape[:-1], w.shape[0]))
    return outs


def compute(
    x: Tensor,
    norm: tuple[Tensor, float] | None,
    sizes: Sequence[int],
    lora_a: Any,
    lora_b: Any,
    scale: Any,
    bias: Any,
    residual: Tensor | None,
    gated: bool,
    most_rows: int,
    dense: Callable[[], Sequence[Tensor]],
    kernel: Callable[..., Tensor],
) -> list[Tensor]:
    """The outputs of a linear layer, by `kernel(x_ND, **what few_rows takes)` for up to `most_rows` rows, else by torch
    from the weights that `dense` gives."""
    count, D = len(sizes), x.shape[-1]
    lora_a, lora_b, biases = (as_list(v, count) for v in (lora_a, lora_b, bias))
    scales = [float(s) for s in as_list(scale, count)]
    for O, a, b in zip(sizes, lora_a, lora_b, strict=True):
        check_adapter((O, D), a, b)
    if gated and (count != 2 or sizes[0] != sizes[1]):
        raise ValueError("gated: the weights of gate and up, of one shape")
    if residual is not None and (count != 1 or residual.shape != (*x.shape[:-1], sizes[0])):
        raise ValueError("a residual is added to one output, whose shape it has")
    tensors = (x, *lora_a, *lora_b, *biases, residual, norm[0] if norm else None)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    few = 0 < x.numel() // D <= most_rows and all(a is None or a.shape[0] <= MOST_RANK for a in lora_a)
    if not (few and not wanted and count <= MOST_OUTPUTS and runs_here(*tensors, dtypes=DTYPES)):
        outs = by_torch(x, norm, dense(), lora_a, lora_b, scales, biases)
        if gated:
            return [swiglu(*outs)]
        return outs if residual is None else [residual + outs[0]]
    given = dict(sizes=sizes, norm=norm, lora_a=lora_a, lora_b=lora_b, scales=scales, biases=biases, gated=gated)
    residual_parts = itertools.repeat(None) if residual is None else rows(residual).split(FEW_ROWS)
    parts = [
        kernel(x_nD, residual=part, **given)
        for x_nD, part in zip(rows(x).split(FEW_ROWS), residual_parts, strict=False)
    ]
    y_NO = parts[0] if len(parts) == 1 else torch.cat(parts)
    y = y_NO.unflatten(0, x.shape[:-1]) if x.dim() != 2 else y_NO
    return [y] if gated else list(y.split(list(sizes), dim=-1))


def _linear(
    x: Tensor, norm: Any, weight: Any, lora: tuple[Any, Any, Any], bias: Any, residual: Any, gated: bool
) -> Any:
    several = not isinstance(weight, Tensor)
    weights = list(weight) if several else [weight]
    for w in weights:
        if x.shape[-1] != w.shape[1]:
            raise ValueError(f"x is {tuple(x.shape)} and the weight {tuple(w.shape)}: their last sizes must agree")
    trained = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
    kernel = partial(few_rows, _products, ("linear", width(x.dtype)), weights=weights)
    outs = compute(
        x,
        norm,
        [w.shape[0] for w in weights],
        *lora,
        bias,
        residual,
        gated,
        0 if trained or any(w.dtype != x.dtype for w in weights) else FEW_ROWS,
        lambda: weights,
        kernel,
    )
    return tuple(outs) if several and not gated else outs[0]


def as_list(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def check_adapter(shape: tuple[int, int], lora_a_RD: Tensor | None, lora_b_OR: Tensor | None) -> None:
    O, D = shape
    if (lora_a_RD is None) != (lora_b_OR is None):
        raise ValueError("an adapter has both lora_a and lora_b, or neither")
    if lora_a_RD is not None and lora_b_OR is not None:
        R = lora_a_RD.shape[0]
        if lora_a_RD.shape != (R, D) or lora_b_OR.shape != (O, R):
            raise ValueError(
                f"lora_a {tuple(lora_a_RD.shape)} and lora_b {tuple(lora_b_OR.shape)} do not fit a weight of "
                f"{(O, D)}: they must be (R, {D}) and ({O}, R)"
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

    With a list of up to three weights (and lists of the rest; None: no adapter) all outputs come from one launch, as a
    tuple. Differentiable. fp32 and bf16 run the kernel on CUDA for up to 16 rows. Source: arXiv 2106.09685.
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
    """lora_linear(rms_norm(x, norm_weight_D, eps), …); shapes and dtypes as in `lora_linear`. Differentiable.

    `gated`, for the two weights of gate and up: silu(first) · second as one tensor.
    """
    if norm_weight_D.shape != x.shape[-1:]:
        raise ValueError(f"x is {tuple(x.shape)}, so the norm's weight must be ({x.shape[-1]},)")
    return _linear(x, (norm_weight_D, eps), weight, (lora_a, lora_b, scale), bias, None, gated)
