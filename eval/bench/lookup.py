"""Cost of a decoding step of several rows against one row: the figures behind infer.engine.lookup.row_cost.

A step is every matrix product of the blocks and the head, without attention. `products` are the blocks' fp32 products
as the engine computes them, against torch's default.
"""

from __future__ import annotations

from typing import Any

import torch

from eval.bench.row import Row
from infer.engine.generate import Generator
from infer.engine.load import load
from infer.engine.lookup import row_cost
from model.support.hardware import compute_dtype, onednn_suits, product, timed


def rows(weights: str, sizes: tuple[int, ...] = (2, 3, 4, 6, 8), seconds: float = 0.3) -> list[Row]:
    """Steps of `sizes` rows from wide and from quantized weights; the best of as many as `seconds` allow."""
    found: list[Row] = []
    kinds = [("float32", "wide"), ("float32", "int8"), ("float32", "int4")]
    if compute_dtype() == torch.bfloat16:
        kinds.insert(1, ("bfloat16", "wide"))
    for dtype, form in kinds:
        model, tokenizer = load(weights, dtype=dtype, form=form)
        engine = Generator(model, tokenizer).engine
        if not found:
            found += [products(engine, size, seconds) for size in (1, *sizes, 72, 400)]
        taken = {size: min(timed(lambda n=size, own=engine: step(own, n), "cpu", seconds)) for size in (1, *sizes)}
        for size in sizes:
            share = (taken[size] / taken[1] - 1) / (size - 1)
            setting = f"cost of a further row {share:.2f} of the first, the engine assumes {row_cost(engine):.2f}"
            found.append(
                Row(
                    f"a step of {size} rows: {dtype if form == 'wide' else form}",
                    taken[size] * 1e3,
                    size * taken[1] * 1e3,
                    "one row at a time",
                    "ms",
                    setting,
                )
            )
    return found


@torch.inference_mode()
def products(engine: Any, rows: int, seconds: float) -> Row:
    weights = [part.weight for own in engine.layers for part in (own.qkv, own.out, own.gate_up, own.down)]
    x_ND = {weight.shape[1]: torch.ones(rows, weight.shape[1]) for weight in weights}
    ours, default = (
        min(timed(lambda f=f: [f(x_ND[w.shape[1]], w) for w in weights], "cpu", seconds))
        for f in (product, torch.nn.functional.linear)
    )
    setting = f"by oneDNN: {onednn_suits()}; {torch.get_num_threads()} threads"
    return Row(f"products of {rows} rows: float32", ours * 1e3, default * 1e3, "torch's default", "ms", setting)


@torch.inference_mode()
def step(engine: Any, rows: int) -> torch.Tensor:
    tokens_N = torch.arange(rows) + 100
    return engine.logits(engine.forward(tokens_N, tokens_N, lambda layer, q_NHK, k_NGK, v_NGK: q_NHK))
