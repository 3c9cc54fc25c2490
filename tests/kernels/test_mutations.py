"""Mutation tests: each mistake, put into a copy of a kernel's file, breaks the property that guards it.

A mistake replaces one piece of text. The mutated file is imported under another name and compared with fp64 by the same
rule as the real one. The test fails if the mistake passes, or if the text to replace no longer exists.
"""

# ruff: noqa: E501 - the list of mistakes is a table

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import kernels.launch
from kernels.attention import Level
from kernels.launch import assume_card
from kernels.linear import rms_norm_lora_linear_definition
from kernels.proof.cases import wide

FOLDER = Path(kernels.launch.__file__).parent


def normal(*shape, std=1.0, seed=0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * std).to(dtype)


def with_gradients(function, arguments, trained):
    leaves = [t.clone().requires_grad_() if i in trained else t for i, t in enumerate(arguments)]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    ways = [torch.linspace(-1, 2, o.numel()).view(o.shape).to(o.dtype) for o in out]
    return [*(o.detach() for o in out), *torch.autograd.grad(out, [leaves[i] for i in trained], ways)]


def check_all(check, ours, plain, arguments, trained=()):
    for mine, theirs, truth in zip(
        with_gradients(ours, arguments, trained) if trained else [ours(*arguments)],
        with_gradients(plain, arguments, trained) if trained else [plain(*arguments)],
        with_gradients(plain, wide(arguments), trained) if trained else [plain(*wide(arguments))],
        strict=True,
    ):
        check(mine, theirs, truth)


def norm(module, check):
    x, r, g = normal(5, 100), normal(5, 100, seed=1), normal(100, std=0.3) + 1
    check_all(
        check, lambda *a: module.rms_norm(*a, 1e-2), lambda *a: module.rms_norm_definition(*a, 1e-2), [x, g], (0, 1)
    )
    ours, plain = module.add_rms_norm, module.add_rms_norm_definition
    check_all(check, lambda *a: ours(*a, 1e-2), lambda *a: plain(*a, 1e-2), [x, r, g], (0, 1, 2))
    narrow = [t.bfloat16() for t in (x, g)]
    assert torch.equal(module.rms_norm(*narrow, 1e-2), module.rms_norm_definition(*narrow, 1e-2))


def activation(module, check):
    check_all(check, module.swiglu, module.swiglu_definition, [normal(3, 70) * 3, normal(3, 70, seed=1)], (0, 1))


def layers(module, check, function, plain, dtype):
    """Three outputs, one without an adapter; the sum over 1,300 columns is split."""
    x, gain = normal(3, 1300).to(dtype), (normal(1300, std=0.3) + 1).to(dtype)
    sizes, rank = (40, 24, 33), 8
    a = [normal(rank, 1300, std=0.03, seed=n).to(dtype) for n in range(3)]
    b = [normal(size, rank, seed=n).to(dtype) for n, size in enumerate(sizes)]
    a[1] = b[1] = None
    c = [normal(size, seed=n).to(dtype) for n, size in enumerate(sizes)]
    inputs = [x, gain, a, b, c]
    for mine, theirs, truth in zip(function(*inputs), plain(*inputs), plain(*wide(inputs)), strict=True):
        check(mine, theirs, truth)


def linear(module, check):
    weights = [normal(size, 1300, std=0.03, seed=size) for size in (40, 24, 33)]

    def ours(x, gain, a, b, c):
        assert torch.equal(module.lora_linear(x[:0], weights[0]), x.new_zeros(0, 40))
        return module.rms_norm_lora_linear(x, gain, weights, a, b, 1.5, 1e-2, c)

    def plain(x, gain, a, b, c):
        outs = zip(weights, a, b, c, strict=True)
        return [module.rms_norm_lora_linear_definition(x, gain, w.to(x), a, b, 1.5, 1e-2, c) for w, a, b, c in outs]

    layers(module, check, ours, plain, torch.float32)
    x, residual, gain = normal(3, 1300), normal(3, 24, seed=5) * 4, normal(1300, std=0.3) + 1
    pair = [normal(50, 1300, std=0.03, seed=n) for n in range(2)]
    a, b = [normal(8, 1300, std=0.03, seed=n) for n in range(2)], [normal(50, 8, seed=n) for n in range(2)]

    def gated(x, gain, a, b):
        outs = [
            module.rms_norm_lora_linear_definition(x, gain, w.to(x), own_a, own_b, 1.5, 1e-2)
            for w, own_a, own_b in zip(pair, a, b, strict=True)
        ]
        return torch.nn.functional.silu(outs[0]) * outs[1]

    mine = module.rms_norm_lora_linear(x, gain, pair, a, b, 1.5, 1e-2, gated=True)
    check(mine, gated(x, gain, a, b), gated(*wide([x, gain, a, b])))
    plainly = lambda x, w, r: r + x @ w.t()  # noqa: E731
    check_all(check, lambda x, w, r: module.lora_linear(x, w, residual=r), plainly, [x, weights[1], residual])


def int4(module, check):
    for group in (32, 64, 128):
        weights = []
        for size in (40, 24, 33):
            generator = torch.Generator().manual_seed(size)
            codes = torch.randint(0, 256, (size, 640), generator=generator, dtype=torch.uint8)
            steps = torch.stack((normal(1280 // group, size).abs() + 0.1, normal(1280 // group, size, seed=1)), dim=-1)
            weights.append(module.repack_int4(codes, steps.bfloat16()))
            codes_OGg = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).unflatten(1, (-1, group))
            scale_OG1, zero_OG1 = steps.bfloat16().double().transpose(0, 1)[..., None].unbind(2)
            wide_OD = ((codes_OGg.double() - 8) * scale_OG1 + zero_OG1).flatten(1)
            assert torch.equal(weights[-1].dequantize(torch.float64), wide_OD), "not equal"

        def ours(x, gain, a, b, c, weights=weights):
            a = [None if own is None else own[:, :1280].contiguous() for own in a]
            return module.int4_linear(x[:, :1280], weights, a, b, 1.5, c, (gain[:1280], 1e-2))

        def plain(x, gain, a, b, c, weights=weights):
            outs = zip(weights, a, b, c, strict=True)
            return [
                rms_norm_lora_linear_definition(
                    x[:, :1280], gain[:1280], w.dequantize(x.dtype), None if a is None else a[:, :1280], b, 1.5, 1e-2, c
                )
                for w, a, b, c in outs
            ]

        layers(module, check, ours, plain, torch.bfloat16)


def cross_entropy(module, check):
    x, w, targets = normal(9, 40), normal(9000, 40, std=0.5), torch.arange(9) * 990
    targets[4] = -100
    w = w * torch.linspace(0.1, 2, 9000)[:, None]
    ours = lambda x, w: module.linear_cross_entropy(x, w, targets, max_logits=4 * 9000)  # noqa: E731
    plain = lambda x, w: module.linear_cross_entropy_definition(x, w, targets)  # noqa: E731
    check_all(check, ours, plain, [x, w], (0, 1))


def attention(module, check):
    q, k, v = normal(2, 4, 2, 64), normal(2, 2, 90, 64, seed=1), normal(2, 2, 90, 64, seed=2)
    slots = torch.stack([torch.randperm(90, generator=torch.Generator().manual_seed(n)) for n in range(2)]) + 20
    slots[:, 5] = -1
    int32 = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    levels = (
        Level(normal(1, 2, 9, 64, seed=3), normal(1, 2, 9, 64, seed=4), int32([*range(9)]), int32(0), int32(2), 2),
        Level(
            normal(1, 2, 11, 64, seed=3), normal(1, 2, 11, 64, seed=4), int32([*range(9, 20)]), int32(1), int32(1), 1
        ),
    )
    for window, i in ((None, 109), (30, 109), (30, 40), (None, 40)):
        arguments = [q, k, v, torch.tensor([[i - 1, i]] * 2), slots, window, levels]
        for sms in (0, 2):  # without and with a split of the keys
            with assume_card(80, sms):
                check_all(check, module.tree_attention, module.tree_attention_definition, arguments)


MISTAKES = [
    (norm, "mask reaches one past the row", "inside = d < D", "inside = d <= D"),
    (norm, "mask stops one short", "inside = d < D", "inside = d < D - 1"),
    (norm, "eps left out", "/ D + eps)", "/ D)"),
    (norm, "mean over the tile instead of the row", "axis=0) / D + eps", "axis=0) / BLOCK + eps"),
    (norm, "the residual is not added", "value.to(tl.float32) + other.to(tl.float32)", "value.to(tl.float32)"),
    (
        norm,
        "the residual's gradient is lost",
        "            grad += tl.load(dtotal",
        "            grad += 0 * tl.load(dtotal",
    ),
    (norm, "no cast before the gain", "n = (wide * r).to(y.dtype.element_ty)", "n = wide * r"),
    (norm, "the statistic's gradient is lost", "(w - n * (tl.sum", "(w - 0 * n * (tl.sum"),
    (norm, "a program skips a row", "tl.cdiv(N - p, P)", "tl.cdiv(N - p, P) - (p == 1)"),
    (activation, "gate and up swapped", "silu = (a / (1.0 + tl.exp(-a)))", "silu = (a / (1.0 + tl.exp(-b)))"),
    (activation, "half of silu's gradient", "sigmoid * (1.0 + a * (1.0 - sigmoid))", "sigmoid"),
    (linear, "the scale is left out of the adapter", "u * (r * select(i, s))[:, None]", "u * r[:, None]"),
    (linear, "the adapter's u is not normed", "u * (r * select(i, s))[:, None]", "u * select(i, s)"),
    (
        linear,
        "the statistic is of one part of the columns",
        "square += tl.load(squares + split * N + n, mask=n < N, other=0.0)",
        "square += 0.0",
    ),
    (linear, "eps is left out", "square / D + eps", "square / D"),
    (
        linear,
        "the gain is left out",
        "tile = (tile.to(tl.float32) * g.to(tl.float32)[None, :]).to(tile.dtype)\n        w_DO",
        "w_DO",
    ),
    (
        linear,
        "the gain is one step late",
        "next_g = tl.load(gain + d + BD, mask=d + BD < D, other=0.0)",
        "next_g = tl.load(gain + d, mask=d < D, other=0.0)",
    ),
    (
        linear,
        "the last part is not added",
        "for split in tl.static_range(1, SPLITS):\n        at =",
        "for split in tl.static_range(1, SPLITS - 1):\n        at =",
    ),
    (
        linear,
        "a part's last columns are left out",
        "for first in range(start, stop, BD):",
        "for first in range(start, stop - BD, BD):",
    ),
    (
        linear,
        "the third output takes the second's weight",
        "w, size = select(i, weights), select(i, O)",
        "w, size = select(i - i // 2, weights), select(i, O)",
    ),
    (
        linear,
        "the third output takes the first's adapter",
        "(edge + offset_of(i, R, BO)) * BO + k",
        "(edge + offset_of(i, R, BO) - i // 2) * BO + k",
    ),
    (linear, "outputs are written over each other", "(offset_of(i, O, 1) + o)[None, :]", "o[None, :]"),
    (
        linear,
        "the bias is forgotten",
        "total += tl.load(select(i, bias) + o",
        "total += 0 * tl.load(select(i, bias) + o",
    ),
    (linear, "the residual is forgotten", "out += tl.load(residual", "out += 0 * tl.load(residual"),
    (linear, "the gate gates itself", "(1.0 + tl.exp(-out)) * up", "(1.0 + tl.exp(-out)) * out"),
    (linear, "up takes gate's adapter", "edge + offset_of(i, R, BO)", "edge"),
    (
        int4,
        "the next group's scale is this one's",
        "group = (first + i * (BD // 4)) // GROUP + 1",
        "group = (first + i * (BD // 4)) // GROUP",
    ),
    (
        int4,
        "planes in another order",
        "planes[:, :, 0] | planes[:, :, 1] << 4",
        "planes[:, :, 1] | planes[:, :, 0] << 4",
    ),
    (int4, "the exponent of 2", "0x3F80).to", "0x4000).to"),
    (int4, "a plane is shifted by one bit too few", "words >> (4 * i - 3)", "words >> (4 * i - 4)"),
    (int4, "groups end at the step only", "(i + 1) * (BD // 4) % GROUP == 0 or i == 3", "i == 3"),
    (int4, "the adapters' tiles are not computed", "elif a is not None:", "elif tile < 0:"),
    (
        int4,
        "scale and zero swapped",
        "steps.contiguous() for steps in steps_GO2.unbind(-1)",
        "steps.contiguous() for steps in steps_GO2.flip(-1).unbind(-1)",
    ),
    (cross_entropy, "the running sum is not rescaled", "s = s * tl.exp(m - base) +", "s = s +"),
    (cross_entropy, "the lanes' sums have one maximum", "tl.sum(s * tl.exp(m - m_row), axis=0)", "tl.sum(s, axis=0)"),
    (cross_entropy, "the target is not subtracted", "tl.where(v == target, 1.0, 0.0)", "0.0"),
    (cross_entropy, "ignored rows push", "grad * w, mask", "grad / 8, mask"),
    (cross_entropy, "only the last rows' dW", "dw_VD += torch.mm", "dw_VD[:] = torch.mm"),
    (attention, "a window of W + 1", "j[None, :] > i[:, None] - W", "j[None, :] >= i[:, None] - W"),
    (attention, "a window of W - 1", "j[None, :] > i[:, None] - W", "j[None, :] > i[:, None] - W + 1"),
    (attention, "a query does not attend to itself", "j[None, :] <= i[:, None]", "j[None, :] < i[:, None]"),
    (attention, "empty slots are attended to", "mask = (j >= 0)[None, :] &", "mask = (j >= -1)[None, :] &"),
    (attention, "the scores are not scaled", 'input_precision="ieee") * scale', 'input_precision="ieee")'),
    (attention, "e in the place of 2", "K**-0.5 * LOG2_E", "K**-0.5"),
    (attention, "the sum of values is not rescaled", "sum_MK * alpha[:, None]", "sum_MK"),
    (
        attention,
        "the parts are averaged",
        'weight = tl.exp2(L - tl.where(L_max == float("-inf"), 0.0, L_max))',
        'weight = tl.where(L > float("-inf"), 1.0, 0.0)',
    ),
    (attention, "the last part is left out", "mask=i < PARTS, other", "mask=i < PARTS - 1, other"),
    (
        attention,
        "all rows share a node",
        "b_first, b_count = tl.load(first + m), tl.load(count + m)",
        "b_first, b_count = 0, 2",
    ),
    (attention, "a head of another group", "h = g * HEADS + r // T % HEADS", "h = r // T % HEADS * G + g"),
    (attention, "levels write over each other", "first_part += splits", "first_part += 0"),
]


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("guard", [norm, activation, linear, int4, cross_entropy, attention])
def test_the_guards_pass_on_the_real_kernels(guard, as_good_as):
    guard(importlib.import_module(f"kernels.{guard.__name__}"), as_good_as)


@pytest.mark.skipif(torch.cuda.is_available(), reason="mutants read out of bounds: only in the interpreter")
@pytest.mark.parametrize(
    ("guard", "mistake", "right", "wrong"), MISTAKES, ids=[f"{g.__name__}: {m}" for g, m, *_ in MISTAKES]
)
def test_a_mistake_is_noticed(guard, mistake, right, wrong, as_good_as, tmp_path, monkeypatch):
    text = (FOLDER / f"{guard.__name__}.py").read_text()
    mutant, found = re.subn(r"\s+".join(map(re.escape, right.split())), lambda _: wrong, text)  # lines may be broken
    assert found, f"kernels/{guard.__name__}.py no longer says {right!r}: bring the list of mistakes up to date"
    path = tmp_path / "mutant.py"
    path.write_text(mutant)
    name = f"mutant_{abs(hash((guard.__name__, mistake)))}"
    module = load_interpreted(path, name, monkeypatch)
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory holds NaN, not what a right run left there
    try:
        with pytest.raises(AssertionError, match="error|isfinite|equal"):
            guard(module, as_good_as)
    finally:
        torch.use_deterministic_algorithms(False)


def load_interpreted(path, name, monkeypatch):
    """Import with the variable set that decides whether new kernels are interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    try:
        return load(path, name)
    finally:
        sys.modules.pop(name, None)
