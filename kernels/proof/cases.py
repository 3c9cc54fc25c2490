"""One case per kernel and configuration at Mistral-7B's shapes: what is compiled ahead of time and benchmarked.

A case builds its tensors on a device and returns three functions over them: ours, the PyTorch definition, and the
definition in fp64. On the meta device the tensors have shapes but no memory, which is all that the compiler needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels.activation import swiglu_definition
from kernels.attention import Level, tree_attention_definition
from kernels.cross_entropy import linear_cross_entropy_definition
from kernels.int4 import Int4Weight
from kernels.linear import make_layer, torch_outputs
from kernels.norm import add_rms_norm_definition, rms_norm_definition

WIDTH, FFN, VOCAB, HEADS, GROUPS, HEAD = 4096, 14336, 32000, 32, 8, 128
QKV = (4096, 1024, 1024)
EPS = 1e-5

Trio = tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]


@dataclass(frozen=True)
class Make:
    """Factory of random tensors of one dtype on one device."""

    device: str
    dtype: torch.dtype

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype) * std

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, device=self.device, dtype=dtype)

    def steps(self, start: int, stop: int, rows: int) -> Tensor:
        return torch.arange(start, stop, device=self.device, dtype=torch.int32).expand(rows, stop - start).contiguous()


@dataclass(frozen=True)
class Case:
    """`kernel` is the public function's name; `build` returns (ours, the definition, the definition in fp64)."""

    name: str
    kernel: str
    dtype: torch.dtype
    build: Callable[[Make], Trio] = field(repr=False)


def wide(value: Any) -> Any:
    """Floating-point tensors as fp64, also inside lists, tuples and attention Levels."""
    if isinstance(value, (list, tuple)):
        return type(value)(wide(v) for v in value)
    if isinstance(value, Level):
        return Level(value.k_MGPK.double(), value.v_MGPK.double(), *list(vars(value).values())[2:])
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def trio(ours: Callable, plain: Callable, inputs: tuple, trained: tuple[int, ...] = ()) -> Trio:
    """The three functions on `inputs`. With `trained` (indices of inputs) they also return the gradients of the sum of
    the results with respect to these inputs."""

    def run(function: Callable, cast: Callable = lambda t: t) -> Callable[[], Any]:
        if not trained:
            return torch.no_grad()(lambda: function(*cast(inputs)))

        def forward_backward() -> Any:
            leaves = [t.detach().requires_grad_() if i in trained else t for i, t in enumerate(cast(inputs))]
            out = function(*leaves)
            out = out if isinstance(out, tuple) else (out,)
            return (*out, *torch.autograd.grad(out, [leaves[i] for i in trained], [torch.ones_like(o) for o in out]))

        return forward_backward

    return run(ours), run(plain), run(plain, wide)


def norm(make: Make, rows: int, width: int, add: bool, back: bool) -> Trio:
    x, r, g = make.normal(rows, width), make.normal(rows, width), make.normal(width)
    if add:
        ours, plain = (partial(f, eps=EPS) for f in (kernels.add_rms_norm, add_rms_norm_definition))
        return trio(ours, plain, (x, r, g), (0, 1, 2) * back)
    return trio(partial(kernels.rms_norm, eps=EPS), partial(rms_norm_definition, eps=EPS), (x, g), (0, 1) * back)


def swiglu(make: Make, rows: int, back: bool, width: int = FFN) -> Trio:
    return trio(kernels.swiglu, swiglu_definition, (make.normal(rows, width), make.normal(rows, width)), (0, 1) * back)


def layer(make: Make, rows: int, width: int, sizes: tuple[int, ...], rank: int, normed: bool) -> tuple:
    """Inputs of a linear layer: (x, norm weight or None, residual or None, A's, B's)."""
    a = [make.normal(rank, width, std=width**-0.5) if rank else None for _ in sizes]
    b = [make.normal(o, rank) if rank else None for o in sizes]
    gain = make.normal(width) if normed else None
    return make.normal(rows, width), gain, None if normed else make.normal(rows, sizes[0]), a, b


def linear_definition(weights: Callable, sizes: tuple[int, ...], gated: bool) -> Callable:
    """The layer in PyTorch; `weights(dtype)` returns its dequantized weights."""

    def plain(x: Tensor, gain: Tensor | None, residual: Tensor | None, a: list, b: list) -> Any:
        n = x if gain is None else rms_norm_definition(x, gain, EPS)
        outs = torch_outputs(n, weights(x.dtype), make_layer(n, list(sizes), None, a, b, 2.0, None, gated))
        if gated:
            return swiglu_definition(*outs)
        return tuple(outs) if residual is None else residual + outs[0]

    return plain


def linear(
    make: Make,
    rows: int,
    sizes: tuple[int, ...],
    rank: int,
    normed: bool = True,
    gated: bool = False,
    width: int = WIDTH,
) -> Trio:
    weights = [make.normal(o, width, std=width**-0.5) for o in sizes]

    def ours(x: Tensor, gain: Tensor | None, residual: Tensor | None, a: list, b: list) -> Any:
        if gain is not None:
            return kernels.rms_norm_lora_linear(x, gain, weights, a, b, 2.0, EPS, gated=gated)
        return kernels.lora_linear(x, weights[0], a[0], b[0], 2.0, residual=residual)

    plain = linear_definition(lambda dtype: [w.to(dtype) for w in weights], sizes, gated)
    return trio(ours, plain, layer(make, rows, width, sizes, rank, normed))


def int4(
    make: Make,
    rows: int,
    sizes: tuple[int, ...],
    group: int,
    rank: int,
    normed: bool = True,
    gated: bool = False,
    width: int = WIDTH,
) -> Trio:
    weights, step = [], 64 if width % 128 else 128
    for size in sizes:
        words = make.integers(-(2**15), 2**15, width // step, size, step // 4, dtype=torch.int16)
        scales, zeros = (make.normal(width // group, size) * 0.01 for _ in range(2))
        weights.append(Int4Weight(words, scales.abs().bfloat16(), zeros.bfloat16()))

    def ours(x: Tensor, gain: Tensor | None, residual: Tensor | None, a: list, b: list) -> Any:
        norm = None if gain is None else (gain, EPS)
        weight, *lora = (weights, a, b) if residual is None else (weights[0], a[0], b[0])
        return kernels.int4_linear(x, weight, *lora, 2.0, norm=norm, residual=residual, gated=gated)

    plain = linear_definition(lambda dtype: [w.dequantize(dtype) for w in weights], sizes, gated)
    return trio(ours, plain, layer(make, rows, width, sizes, rank, normed))


def loss(make: Make, rows: int, width: int = WIDTH, vocab: int = VOCAB) -> Trio:
    x, w = make.normal(rows, width), make.normal(vocab, width, std=width**-0.5)
    inputs = (x, w, make.integers(0, vocab, rows))
    return trio(kernels.linear_cross_entropy, linear_cross_entropy_definition, inputs, (0, 1))


def attention(
    make: Make,
    rows: int,
    own: int,
    prefix: int = 0,
    window: int | None = 4096,
    queries: int = 1,
    heads: int = HEADS,
    groups: int = GROUPS,
    head: int = HEAD,
) -> Trio:
    """Rows with `own` cache slots each, and two prefixes of `prefix` tokens, each shared by half of the rows."""
    q = make.normal(rows, heads, queries, head)
    k, v = make.normal(rows, groups, own, head), make.normal(rows, groups, own, head)
    levels: tuple[Level, ...] = ()
    if prefix:
        k_MGPK, v_MGPK = make.normal(2, groups, prefix, head), make.normal(2, groups, prefix, head)
        half = make.steps(rows // 2, rows // 2 + 1, 2)[:, 0].contiguous()
        first = (make.steps(0, 2, 1)[0] * (rows // 2)).int()
        levels = (Level(k_MGPK, v_MGPK, make.steps(0, prefix, 2), first, half, rows // 2),)
    end = prefix + own
    inputs = (q, k, v, make.steps(end - queries, end, rows), make.steps(prefix, end, rows), window, levels)
    return trio(kernels.tree_attention, tree_attention_definition, inputs)


def cases(dtype: torch.dtype) -> list[Case]:
    """Every kernel in every configuration, decoding and training, at Mistral-7B's shapes unless the name has others."""
    rows = [
        ("rms_norm, 16384 rows", "rms_norm", partial(norm, rows=16384, width=WIDTH, add=False, back=False)),
        ("rms_norm with gradients, 2048 rows", "rms_norm", partial(norm, rows=2048, width=WIDTH, add=False, back=True)),
        ("rms_norm, width 1024", "rms_norm", partial(norm, rows=2048, width=1024, add=False, back=True)),
        ("rms_norm, width 16384", "rms_norm", partial(norm, rows=512, width=16384, add=False, back=False)),
        ("add_rms_norm with gradients", "add_rms_norm", partial(norm, rows=2048, width=WIDTH, add=True, back=True)),
        ("swiglu with gradients, 2048 rows", "swiglu", partial(swiglu, rows=2048, back=True)),
        ("loss over 32000 words, 2048 rows", "linear_cross_entropy", partial(loss, rows=2048)),
        ("attention, 1 row, 4096 keys", "tree_attention", partial(attention, rows=1, own=4096)),
        ("attention, 8 rows, 512 keys", "tree_attention", partial(attention, rows=8, own=512, window=None)),
        ("attention, 16 rows, prefixes 1500", "tree_attention", partial(attention, rows=16, own=256, prefix=1500)),
    ]
    kinds: list[tuple[str, Callable[..., Trio], str]] = [
        ("linear", linear, "lora_linear"),
        ("int4", partial(int4, group=64), "int4_linear"),
    ]
    if dtype == torch.bfloat16:  # the demo's base: BD = 64
        narrow = partial(int4, rows=1, sizes=(576, 192, 192), group=64, rank=16, width=576)
        rows.append(("int4: norm + q, k, v, width 576, rank 16", "int4_linear", narrow))
    for rank, count in ((0, 1), (16, 1), (64, 1), (16, 8)) if dtype == torch.bfloat16 else ((16, 1),):
        for kind, function, public in kinds[: 2 if dtype == torch.bfloat16 else 1]:
            given: dict[str, Any] = {"rows": count, "rank": rank}
            suffix = f"rank {rank}, {count} row{'s' * (count > 1)}"
            residual: dict[str, Any] = {"sizes": (WIDTH,), "normed": False, **given}
            gated = partial(function, sizes=(FFN, FFN), gated=True, **given)
            rows += [
                (f"{kind}: norm + q, k, v, {suffix}", public, partial(function, sizes=QKV, **given)),
                (f"{kind}: o + residual, {suffix}", public, partial(function, **residual)),
                (f"{kind}: norm + gate, up, {suffix}", public, gated),
                (f"{kind}: down + residual, {suffix}", public, partial(function, width=FFN, **residual)),
            ]
    return [Case(name, kernel, dtype, build) for name, kernel, build in rows]
