"""The tests would notice: each mistake, put into a copy of a kernel's file, breaks the property that guards it.

A mistake is a replacement of one piece of text. The mutated file is imported under another name and held against fp64
by the same rule as the real one; the test fails if the mistake passes, or if the text to replace is gone.
"""

# ruff: noqa: E501 - the list of mistakes is a table

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import kernels.launch
from kernels.norm import rms_norm_definition

ROOM = Path(kernels.launch.__file__).parent


def normal(*shape, std=1.0, seed=0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * std).to(dtype)


def wide(value):
    if isinstance(value, (tuple, list)):
        return type(value)(wide(v) for v in value)
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


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


def linear(module, check):
    with pytest.MonkeyPatch.context() as patch:  # 40 rows: a group of two row tiles and one of one
        patch.setitem(kernels.launch.CONFIGS["linear"]["prefill/32"], "BN", 16)
        patch.setitem(kernels.launch.CONFIGS["linear"]["prefill/32"], "GROUP", 2)
        products(module, check)


def products(module, check):
    for rows, rank in ((3, 8), (40, 8), (3, 60)):
        x, gain = normal(rows, 200), normal(200, std=0.3) + 1
        weights = [normal(n, 200, std=0.07, seed=n) for n in (40, 24, 33)]
        a = [normal(200, rank, std=0.07, seed=1).t(), None, normal(200, rank, std=0.07, seed=2).t()]
        b = [normal(40, rank, seed=3), None, normal(33, rank, seed=4)]
        c = [normal(n, seed=n) for n in (40, 24, 33)]

        def ours(x, *ab, gain=gain, weights=weights, c=c):
            ab = [ab[0], None, ab[1], ab[2], None, ab[3]]
            return module.rms_norm_lora_linear(x, gain, weights, ab[:3], ab[3:], 1.5, 1e-2, c)

        def plain(x, *ab, gain=gain, weights=weights, c=c):
            ab = [ab[0], None, ab[1], ab[2], None, ab[3]]
            gain, weights, c = (wide(v) if x.dtype == torch.float64 else v for v in (gain, weights, c))
            parts = zip(weights, ab[:3], ab[3:], c, strict=True)
            return tuple(module.rms_norm_lora_linear_definition(x, gain, w, a, b, 1.5, 1e-2, c) for w, a, b, c in parts)

        inputs = [x, a[0], a[2], b[0], b[2]]
        with torch.no_grad():
            for mine, theirs, truth in zip(ours(*inputs), plain(*inputs), plain(*wide(inputs)), strict=True):
                check(mine, theirs, truth)
        check_all(check, ours, plain, inputs, (0, 1, 2, 3, 4))


def low_rank(module, check):
    """u = s · n Aᵀ of three outputs (one has no adapter), and tᵀ n; 4,100 rows have more tiles than splits."""
    gain, eps = normal(200, std=0.3) + 1, 1e-2

    def first(x, a, c):
        n = rms_norm_definition(x, gain.to(x.dtype), eps)
        return torch.stack([1.5 * n @ a.t(), torch.zeros(len(x), len(a)).to(x), 2.0 * n @ c.t()], dim=1)

    for rows in (3, 40):
        inputs = [normal(rows, 200), normal(8, 200, std=0.07), normal(8, 200, std=0.07, seed=2)]
        ours = lambda x, a, c: module.run_shrink(x, gain, [a, None, c], [1.5, 1.0, 2.0], eps)[1]  # noqa: E731
        check_all(check, ours, first, inputs)
    x, t = normal(4100, 40), normal(4100, 8)
    gain = normal(40, std=0.3) + 1
    rstd = (x.square().mean(1) + eps).rsqrt()
    check_all(check, lambda t, x: module.run_outer(t, x), lambda t, x: t.t() @ x, [t, x])
    plain = lambda t, x: t.t() @ rms_norm_definition(x, gain.to(x.dtype), eps)  # noqa: E731
    check_all(check, lambda t, x: module.run_outer(t, x, gain, rstd), plain, [t, x])


def multi_lora(module, check):
    arguments = [
        normal(6, 70), normal(40, 70, std=0.1), normal(3, 8, 70, std=0.1), normal(3, 40, 8),
        torch.tensor([0, 2, -1, 1, 2, 0]), torch.tensor([0.5, 1.0, 2.0]), normal(40),
    ]  # fmt: skip
    check_all(check, module.multi_lora_linear, module.multi_lora_linear_definition, arguments)


def four_bit(module, check):
    for group in (32, 64):
        for rank in (8, 60):
            packed = torch.randint(0, 256, (40, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
            scales, zeros = normal(40, 128 // group).abs() + 0.1, normal(40, 128 // group, seed=1)
            x, a, b, gain = normal(3, 128), normal(rank, 128, std=0.1), normal(40, rank), (normal(128) + 2, 1e-2)
            int4, nf4 = [x, packed, scales, a, b, 1.5, None, zeros, gain], [x, packed, scales, a, b, 1.5, None, gain]
            check_all(check, module.int4_lora_linear, module.int4_lora_linear_definition, int4)
            check_all(check, module.nf4_lora_linear, module.nf4_lora_linear_definition, nf4)


def cross_entropy(module, check):
    x, w, targets = normal(9, 40), normal(1300, 40, std=0.5), torch.arange(9) * 144
    targets[4] = -100
    w = w * torch.linspace(0.1, 2, 1300)[:, None]
    ours = lambda x, w: module.linear_cross_entropy(x, w, targets)  # noqa: E731
    plain = lambda x, w: module.linear_cross_entropy_definition(x, w, targets)  # noqa: E731
    check_all(check, ours, plain, [x, w], (0, 1))


def decode(module, check):
    q, k, v = normal(2, 4, 2, 64), normal(2, 2, 150, 64, seed=1), normal(2, 2, 150, 64, seed=2)
    slots = torch.stack([torch.randperm(150, generator=torch.Generator().manual_seed(n)) for n in range(2)]) + 20
    slots[:, 5] = -1
    shared = (
        (slice(None), normal(2, 9, 64, seed=3), normal(2, 9, 64, seed=4), torch.arange(9)),
        (slice(1, 2), normal(2, 11, 64, seed=3), normal(2, 11, 64, seed=4), torch.arange(9, 20)),
    )
    for window, i in ((None, 169), (30, 169), (30, 40), (None, 40)):
        arguments = [q, k, v, torch.tensor([[i - 1, i]] * 2), slots, window, shared]
        for programs in (1, 432):  # one program walks all keys, or each one block
            with pytest.MonkeyPatch.context() as patch:
                for tiles in kernels.launch.CONFIGS["decode_attention"].values():
                    patch.setitem(tiles, "PROGRAMS", programs)
                check_all(check, module.decode_attention, module.decode_attention_definition, arguments)


def prefill(module, check):
    q, k, v = normal(1, 4, 150, 64), normal(1, 2, 150, 64, seed=1), normal(1, 2, 150, 64, seed=2)
    i = torch.arange(150)[None]
    document, branch = i // 60, (i % 60 // 20)
    for window, layout, j in ((None, None, i), (17, None, i), (25, (document, branch), i % 60)):
        arguments = [q, k, v, j, j, window, layout, layout]
        check_all(check, module.prefill_attention, module.prefill_attention_definition, arguments)


MISTAKES = [
    (norm, "mask reaches one past the row", "inside = d < D", "inside = d <= D"),
    (norm, "mask stops one short", "inside = d < D", "inside = d < D - 1"),
    (norm, "eps left out", "/ D + eps)", "/ D)"),
    (norm, "mean over the tile instead of the row", "axis=0) / D + eps", "axis=0) / BLOCK + eps"),
    (norm, "the residual is not added", "value.to(tl.float32) + other.to(tl.float32)", "value.to(tl.float32)"),
    (norm, "the residual's gradient is lost", "            grad += tl.load(dtotal", "            grad += 0 * tl.load(dtotal"),
    (norm, "no cast before the gain", "n = (wide * r).to(y.dtype.element_ty)", "n = wide * r"),
    (norm, "the statistic's gradient is lost", "(w - n * (tl.sum", "(w - 0 * n * (tl.sum"),
    (norm, "a program skips a row", "tl.cdiv(N - p, P)", "tl.cdiv(N - p, P) - (p == 1)"),
    (activation, "gate and up swapped", "silu = (a / (1.0 + tl.exp(-a)))", "silu = (a / (1.0 + tl.exp(-b)))"),
    (activation, "half of silu's gradient", "share * (1.0 + a * (1.0 - share))", "share"),
    (linear, "the scale is left out of the tile's own adapter", "(sum_u * s).to(b_RO.dtype)", "sum_u.to(b_RO.dtype)"),
    (linear, "the third output takes the second's weight", "pick(which, w0, w1, w2)", "pick(which, w0, w1, w1)"),
    (linear, "the next group of rows begins one too early", "group * GROUP + place % size", "group * (GROUP - 1) + place % size"),
    (linear, "A's columns lie side by side", "a_row, a_col, R, D)", "a_row, 1, R, D)"),
    (linear, "outputs are written over each other", "(y_start + o)[None, :]", "o[None, :]"),
    (linear, "the last columns of x are left out", "for start in range(0, D, BD):", "for start in range(0, D - BD + 1, BD):"),
    (linear, "the bias is forgotten", "sum_y += tl.load(c + o", "sum_y += 0 * tl.load(c + o"),
    (linear, "the gradient forgets the adapter's way", "lora_b=[a_DR], u_NCR=t_N1R, add=True", "add=True"),
    (linear, "the gradient of one output replaces the others'", "if ADD:\n        sum_y += tl.load(y_at", "if ADD:\n        sum_y += 0 * tl.load(y_at"),
    (low_rank, "the scale is left out of the first launch", "tl.store(u_at, sum_u * s,", "tl.store(u_at, sum_u,"),
    (low_rank, "the third adapter is the second", "if which == 2:\n        chosen = third", "if which == 2:\n        chosen = second"),
    (low_rank, "only the first split of the rows counts", "return out_SRD.sum(0)", "return out_SRD[0]"),
    (low_rank, "the gradient is of rows that are not normed", "        n = tile_of_rows(x, gain, r, row, live, start, D, x_row, NORM, BD)\n        t_RN", "        n = tile_of_rows(x, gain, r, row, live, start, D, x_row, False, BD)\n        t_RN"),
    (multi_lora, "every row through the first adapter of its tile", "u_NR = tl.load(u + row[:, None] * R + rank[None, :], mask=mine[:, None]", "u_NR = tl.load(u + row[:, None] * R + rank[None, :], mask=live[:, None]"),
    (multi_lora, "the last adapter is left out", "tl.max(who, axis=0) + 1", "tl.max(who, axis=0)"),
    (multi_lora, "one scale for all", "tl.load(scale + e)", "tl.load(scale)"),
    (four_bit, "the neighbour group's scale", "o * s_row + start // GROUP", "o * s_row + tl.maximum(start // GROUP - 1, 0)"),
    (four_bit, "the halves of a byte swapped", "low, high = both & 15, both >> 4", "high, low = both & 15, both >> 4"),
    (four_bit, "codes centred at 7", "tl.int32) - 8)", "tl.int32) - 7)"),
    (four_bit, "the zero point is left out", "z_o[None, :]", "0 * z_o[None, :]"),
    (four_bit, "the adapter's scale is left out", "(sum_u * s).to", "sum_u.to"),
    (cross_entropy, "the running sum is not rescaled", "s = s * tl.exp(m - higher) +", "s = s +"),
    (cross_entropy, "padding columns count as words", 'tl.where(in_v[None, :], logits, float("-inf"))', "logits"),
    (cross_entropy, "the target is not subtracted", "tl.where(v[None, :] == target[:, None], 1.0, 0.0)", "0.0"),
    (cross_entropy, "ignored rows push", "share * up[:, None]", "share * tl.max(up)"),
    (decode, "a window of W + 1", "j[None, :] > i[:, None] - W", "j[None, :] >= i[:, None] - W"),
    (decode, "a window of W - 1", "j[None, :] > i[:, None] - W", "j[None, :] > i[:, None] - W + 1"),
    (decode, "a query does not see itself", "j[None, :] <= i[:, None]", "j[None, :] < i[:, None]"),
    (decode, "empty slots are seen", "seen = (j >= 0)[None, :] &", "seen = (j >= -1)[None, :] &"),
    (decode, "the scores are not scaled", 'input_precision="ieee") * scale', 'input_precision="ieee")'),
    (decode, "the sum of values is not rescaled", "sum_MK * fade[:, None]", "sum_MK"),
    (decode, "the parts are averaged", "sum_K += share * tl.load", "sum_K += total / (i + 1) * tl.load"),
    (decode, "the prefix is left out of the merge", "logsum + i * ROWS + row) - base)", 'logsum + i * ROWS + row) - base - AGAIN * 1e9)'),
    (decode, "what came before a prefix is forgotten", "before = tl.load(out_logsum + at)", "before = tl.load(out_logsum + at) - 1e9"),
    (decode, "a prefix of some rows is merged into the first ones", "b = FIRST + row", "b = row"),
    (decode, "rows that share a prefix are merged into one", "+ r // OWN\n", "\n"),
    (prefill, "a window of W + 1", "j[None, :] > i[:, None] - W", "j[None, :] >= i[:, None] - W"),
    (prefill, "a query sees the next token", "j[None, :] <= i[:, None]", "j[None, :] <= i[:, None] + 1"),
    (prefill, "documents leak", "(e[None, :] == d[:, None])", "(e[None, :] <= d[:, None])"),
    (prefill, "branches leak", "(other[None, :] == own[:, None])", "(other[None, :] <= own[:, None])"),
    (prefill, "one block too few", "return torch.where(some, first, 0).int(), torch.where(some, last, 0).int()", "return torch.where(some, first, 0).int(), torch.where(some, last - 1, 0).int()"),
    (prefill, "the neighbour's key/value head", "g = h // SHARE", "g = h % (H // SHARE)"),
]  # fmt: skip


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("guard", [norm, activation, linear, low_rank, multi_lora, four_bit, cross_entropy, decode, prefill])
def test_the_guards_pass_on_the_real_kernels(guard, as_good_as):
    guard(importlib.import_module(f"kernels.{guard.__name__}"), as_good_as)


@pytest.mark.skipif(torch.cuda.is_available(), reason="mutants read out of bounds: only in the interpreter")
@pytest.mark.parametrize(
    ("guard", "mistake", "right", "wrong"), MISTAKES, ids=[f"{g.__name__}: {m}" for g, m, *_ in MISTAKES]
)
def test_a_mistake_is_noticed(guard, mistake, right, wrong, as_good_as, tmp_path, monkeypatch):
    text = (ROOM / f"{guard.__name__}.py").read_text()
    assert right in text, f"kernels/{guard.__name__}.py no longer says {right!r}: bring the list of mistakes up to date"
    path = tmp_path / "mutant.py"
    path.write_text(text.replace(right, wrong))
    name = f"mutant_{abs(hash((guard.__name__, mistake)))}"
    module = load_interpreted(path, name, monkeypatch)
    with pytest.raises(AssertionError, match="error|isfinite|equal"):
        guard(module, as_good_as)


def load_interpreted(path, name, monkeypatch):
    """Import with the variable set that decides whether new kernels are interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    try:
        return load(path, name)
    finally:
        sys.modules.pop(name, None)
