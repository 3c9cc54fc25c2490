"""The work of a 7B model (Mistral-7B's shapes), one kernel at a time: what is compiled ahead of time and what is timed.

A case builds its tensors on a device and returns three functions over them: ours, the PyTorch definition, and the
definition in fp64. On the meta device the tensors have shapes and no memory, which is all that the compiler needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels.activation import swiglu_definition
from kernels.cross_entropy import linear_cross_entropy_definition
from kernels.decode import decode_attention_definition
from kernels.four_bit import int4_lora_linear_definition, nf4_lora_linear_definition
from kernels.linear import lora_linear_definition, rms_norm_lora_linear_definition
from kernels.multi_lora import multi_lora_linear_definition
from kernels.norm import add_rms_norm_definition, rms_norm_definition
from kernels.prefill import prefill_attention_definition

WIDTH, FEED, WORDS, HEADS, GROUPS, HEAD = 4096, 14336, 32000, 32, 8, 128
QKV = (4096, 1024, 1024)
EPS = 1e-5

Trio = tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]


@dataclass(frozen=True)
class Make:
    """Random tensors of one dtype on one device."""

    device: str
    dtype: torch.dtype

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype) * std

    def whole(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, device=self.device)

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, device=self.device, dtype=torch.uint8)

    def scales(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device) * 0.01 + 0.001

    def steps(self, start: int, stop: int, rows: int) -> Tensor:
        return torch.arange(start, stop, device=self.device).expand(rows, stop - start).contiguous()


@dataclass(frozen=True)
class Case:
    """`kernel` is the public function; `build` gives (ours, the definition, its fp64 truth) over the same tensors."""

    name: str
    kernel: str
    dtype: torch.dtype
    build: Callable[[Make], Trio] = field(repr=False)


def wide(value: Any) -> Any:
    """Floating tensors as fp64, through lists and tuples."""
    if isinstance(value, (list, tuple)):
        return type(value)(wide(v) for v in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _trio(ours: Callable, plain: Callable, inputs: tuple, trained: tuple[int, ...] = ()) -> Trio:
    """Run on `inputs`; with `trained`, also backward from the sum of the results to the inputs of these numbers."""

    def run(function: Callable, cast: Callable = lambda t: t) -> Callable[[], Any]:
        if not trained:
            return torch.no_grad()(lambda: function(*cast(inputs)))

        def there_and_back() -> Any:
            leaves = [t.detach().requires_grad_() if i in trained else t for i, t in enumerate(cast(inputs))]
            out = function(*leaves)
            out = out if isinstance(out, tuple) else (out,)
            ways = [torch.ones_like(o) for o in out]
            return (*out, *torch.autograd.grad(out, [leaves[i] for i in trained], ways))

        return there_and_back

    return run(ours), run(plain), run(plain, wide)


def norm(rows: int, width: int, add: bool, back: bool) -> Callable[[Make], Trio]:
    def build(make: Make) -> Trio:
        x, r, g = make.normal(rows, width), make.normal(rows, width), make.normal(width)
        if add:
            ours, plain = kernels.add_rms_norm, add_rms_norm_definition
            return _trio(
                lambda x, r, g: ours(x, r, g, EPS), lambda x, r, g: plain(x, r, g, EPS), (x, r, g), (0, 1, 2) * back
            )
        return _trio(
            lambda x, g: kernels.rms_norm(x, g, EPS), lambda x, g: rms_norm_definition(x, g, EPS), (x, g), (0, 1) * back
        )

    return build


def swiglu(rows: int, back: bool) -> Callable[[Make], Trio]:
    def build(make: Make) -> Trio:
        return _trio(
            kernels.swiglu, swiglu_definition, (make.normal(rows, FEED), make.normal(rows, FEED)), (0, 1) * back
        )

    return build


def linear(
    rows: int, sizes: tuple[int, ...], rank: int, back: bool = False, normed: bool = True
) -> Callable[[Make], Trio]:
    def build(make: Make) -> Trio:
        x, gain = make.normal(rows, WIDTH), make.normal(WIDTH)
        weights = [make.normal(o, WIDTH, std=WIDTH**-0.5) for o in sizes]
        a = [make.normal(rank, WIDTH, std=WIDTH**-0.5) if rank else None for _ in sizes]
        b = [make.normal(o, rank) if rank else None for o in sizes]
        n = len(sizes)

        def ours(x: Tensor, *ab: Any) -> Any:
            if normed:
                return kernels.rms_norm_lora_linear(x, gain, weights, ab[:n], ab[n:], 2.0, EPS)
            return kernels.lora_linear(x, weights, ab[:n], ab[n:], 2.0)

        def plain(x: Tensor, *ab: Any) -> Any:
            parts = zip([w.to(x.dtype) for w in weights], ab[:n], ab[n:], strict=True)
            if normed:
                g = gain.to(x.dtype)
                return tuple(rms_norm_lora_linear_definition(x, g, w, a, b, 2.0, EPS) for w, a, b in parts)
            return tuple(lora_linear_definition(x, w, a, b, 2.0) for w, a, b in parts)

        return _trio(ours, plain, (x, *a, *b), tuple(range(1 + 2 * n)) * back)

    return build


def four_bit(rows: int, group: int, rank: int, nf4: bool, normed: bool = False) -> Callable[[Make], Trio]:
    def build(make: Make) -> Trio:
        packed, scales = make.bytes(WIDTH, WIDTH // 2), make.scales(WIDTH, WIDTH // group)
        a, b = make.normal(rank, WIDTH, std=WIDTH**-0.5), make.normal(WIDTH, rank)
        gain = make.normal(WIDTH)
        ours, plain = (
            (kernels.nf4_lora_linear, nf4_lora_linear_definition)
            if nf4
            else (kernels.int4_lora_linear, int4_lora_linear_definition)
        )
        x = make.normal(rows, WIDTH)

        def run(function: Callable) -> Callable:
            norm = lambda g: (g, EPS) if normed else None  # noqa: E731
            return lambda x, a, b, g: function(x, packed, scales, a, b, 2.0, None, norm=norm(g))

        return _trio(run(ours), run(plain), (x, a, b, gain))

    return build


def many_adapters(rows: int, adapters: int, rank: int) -> Callable[[Make], Trio]:
    def build(make: Make) -> Trio:
        a, b = make.normal(adapters, rank, WIDTH, std=WIDTH**-0.5), make.normal(adapters, WIDTH, rank)
        inputs = (
            make.normal(rows, WIDTH), make.normal(WIDTH, WIDTH, std=WIDTH**-0.5), a, b, make.whole(adapters, rows),
            make.scales(adapters),
        )  # fmt: skip
        return _trio(kernels.multi_lora_linear, multi_lora_linear_definition, inputs)

    return build


def loss(rows: int) -> Callable[[Make], Trio]:
    def build(make: Make) -> Trio:
        x, w, targets = make.normal(rows, WIDTH), make.normal(WORDS, WIDTH, std=WIDTH**-0.5), make.whole(WORDS, rows)
        return _trio(kernels.linear_cross_entropy, linear_cross_entropy_definition, (x, w, targets), (0, 1))

    return build


def decode(rows: int, held: int, prefix: int = 0, window: int | None = 4096, head: int = HEAD) -> Any:
    def build(make: Make) -> Trio:
        q = make.normal(rows, HEADS, 1, head)
        k, v = make.normal(rows, GROUPS, held, head), make.normal(rows, GROUPS, held, head)
        end = prefix + held
        shared = ()
        if prefix:
            held_once = (make.normal(GROUPS, prefix, head) for _ in range(2))
            shared = ((slice(None), *held_once, make.steps(0, prefix, 1)[0]),)
        i, j = make.steps(end - 1, end, rows), make.steps(prefix, end, rows)
        inputs = (q, k, v, i, j, window, shared)
        return _trio(kernels.decode_attention, decode_attention_definition, inputs)

    return build


def prefill(rows: int, window: int | None, documents: int = 0, head: int = HEAD) -> Callable[[Make], Trio]:
    def build(make: Make) -> Trio:
        q = make.normal(1, rows, HEADS, head).transpose(1, 2)
        k, v = (make.normal(1, rows, GROUPS, head).transpose(1, 2) for _ in range(2))
        place = make.steps(0, rows, 1)
        layout = None
        if documents:
            layout = (place // (rows // documents), place * 0)
            place = place % (rows // documents)
        inputs = (q, k, v, place, place, window, layout, layout)
        return _trio(kernels.prefill_attention, prefill_attention_definition, inputs)

    return build


def cases(dtype: torch.dtype) -> list[Case]:
    """Every kernel at Mistral-7B's shapes, in decoding, prefill and training."""
    rows = [
        ("rms_norm, 2048 rows", "rms_norm", norm(2048, WIDTH, False, False)),
        ("rms_norm with gradients, 2048 rows", "rms_norm", norm(2048, WIDTH, False, True)),
        ("rms_norm, width 1024", "rms_norm", norm(2048, 1024, False, True)),
        ("rms_norm, width 16384", "rms_norm", norm(512, 16384, False, True)),
        ("add_rms_norm with gradients, 2048 rows", "add_rms_norm", norm(2048, WIDTH, True, True)),
        ("swiglu with gradients, 2048 rows", "swiglu", swiglu(2048, True)),
        ("norm + q, k, v, no adapter, 1 row", "rms_norm_lora_linear", linear(1, QKV, 0)),
        ("norm + q, k, v, rank 16, 1 row", "rms_norm_lora_linear", linear(1, QKV, 16)),
        ("norm + q, k, v, rank 64, 1 row", "rms_norm_lora_linear", linear(1, QKV, 64)),
        ("norm + gate, up, rank 16, 16 rows", "rms_norm_lora_linear", linear(16, (FEED, FEED), 16)),
        ("norm + q, k, v, rank 16, 2048 rows", "rms_norm_lora_linear", linear(2048, QKV, 16)),
        ("norm + q, k, v, rank 64, 2048 rows", "rms_norm_lora_linear", linear(2048, QKV, 64)),
        ("norm + q, k, v, rank 16, 2048 rows, trained", "rms_norm_lora_linear", linear(2048, QKV, 16, back=True)),
        ("o, rank 16, 1 row", "lora_linear", linear(1, (WIDTH,), 16, normed=False)),
        ("o, rank 16, 2048 rows", "lora_linear", linear(2048, (WIDTH,), 16, normed=False)),
        ("8 adapters of rank 16, 16 rows", "multi_lora_linear", many_adapters(16, 8, 16)),
        ("8 adapters of rank 16, 2048 rows", "multi_lora_linear", many_adapters(2048, 8, 16)),
        ("int4 (128), rank 16, 1 row", "int4_lora_linear", four_bit(1, 128, 16, False)),
        ("norm + int4 (32), rank 64, 1 row", "int4_lora_linear", four_bit(1, 32, 64, False, True)),
        ("int4 (128), rank 16, 2048 rows", "int4_lora_linear", four_bit(2048, 128, 16, False)),
        ("nf4 (64), rank 16, 1 row", "nf4_lora_linear", four_bit(1, 64, 16, True)),
        ("nf4 (64), rank 16, 2048 rows", "nf4_lora_linear", four_bit(2048, 64, 16, True)),
        ("loss over 32000 words, trained, 2048 rows", "linear_cross_entropy", loss(2048)),
        ("decode, 1 row, 4096 keys", "decode_attention", decode(1, 4096)),
        ("decode, 16 rows, prefix 1500 + 256 keys", "decode_attention", decode(16, 256, 1500)),
        ("decode, heads of 256, 16 rows with a prefix", "decode_attention", decode(16, 256, 500, None, 256)),
        ("prefill, 2048 tokens, window 512", "prefill_attention", prefill(2048, 512)),
        ("prefill, 2048 tokens in 8 documents", "prefill_attention", prefill(2048, 4096, 8)),
        ("prefill, heads of 256", "prefill_attention", prefill(512, None, 0, 256)),
    ]
    return [Case(name, kernel, dtype, build) for name, kernel, build in rows]
