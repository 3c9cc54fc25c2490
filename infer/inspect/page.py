"""The data and HTML of the trace page.

Attention weights are quantized to 16 levels, evenly spaced in √weight (the smallest above 0 is 0.004), one byte per
(head, row, key ≤ row), and deflated per layer. The page inflates a layer when it is shown.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from infer.extract.grounded import token_bytes
from infer.inspect import values
from infer.inspect.html import build
from infer.inspect.recording import Tape
from lora.layer import LoRALinear
from model import Tokenizer, Transformer, attention, transformer
from model.support.source import place

SCRIPTS = ("elements.js", "tokens.js", "figures.js", "trace.js")
SHADES = 15


def pack_attention(patterns: Tape, rows: Sequence[int]) -> list[str]:
    """For each layer, the levels round(15 · √weight) of every head and row of `rows` over keys 0 … row, deflated, in
    base64."""
    packed = []
    for name in patterns:
        pattern_HRT = patterns[name][0].float().cpu()
        shade_HRT = (pattern_HRT.sqrt() * SHADES).round().to(torch.uint8).numpy()
        seen_RT = np.arange(pattern_HRT.shape[2])[None] <= np.asarray(rows)[:, None]
        packed.append(base64.b64encode(zlib.compress(shade_HRT[:, seen_RT].tobytes(), 6)).decode())
    return packed


def vocabulary(tokenizer: Tokenizer, ids: set[int]) -> dict[str, list[Any]]:
    """For each id, [bytes in hexadecimal], or [None, name] for a special token."""
    found: dict[str, list[Any]] = {}
    for i in sorted(ids):
        known = i < tokenizer.vocab_size
        spelling, name = (token_bytes(tokenizer, i), tokenizer.piece(i)) if known else (None, None)
        found[str(i)] = [None, name or f"id {i}"] if spelling is None else [spelling.hex()]
    return found


def used_ids(run: dict[str, Any]) -> set[int]:
    """All token ids that occur in a run's data."""
    ids = {*run["ids"], *run["targets"], *run["attribution"]["rival"], *run["own"]}
    ids |= {level[0] for step in run["lens"] for level in step}
    return ids | {best[0] for prediction in run["predictions"] if prediction for best in prediction["best"]}


def code() -> dict[str, dict[str, Any]]:
    """The file, line and code that compute each figure of the page."""
    return {
        "attention": place(attention.Pattern.forward, "F.softmax"),
        "z": place(attention.PlainAttend.forward, "return torch.matmul(pattern_BHTS"),
        "window": place(attention.Visible.block, "distance_BTS < window"),
        "lens": place(transformer.Transformer.head, "self.lm_head"),
        "experts": place(transformer.Experts.forward, "torch.topk"),
        "lora": place(LoRALinear.forward, "addmm_"),
        "attribution": place(values.components, "into_NHK = "),
    }


def run_values(
    name: str, model: Transformer, tokenizer: Tokenizer, ids: list[int], start: int, own: list[int], rows: list[int]
) -> dict[str, Any]:
    """The data of one model. `ids` are the tokens of prompt and answer, `start` is the index of the answer's first
    token, `own` the model's own answer (not in `ids` if another model's text is compared), `rows` the positions whose
    attention is kept."""
    measured, patterns = values.measure(model, ids, start, rows)
    layers = model.config.num_hidden_layers
    run = {
        "name": name,
        "family": model.config.model_type,
        "layers": layers,
        "heads": model.config.num_attention_heads,
        "groups": model.config.num_key_value_heads,
        "windows": list(model.config.windows),
        "ids": ids,
        "start": start,
        "own": own,
        "rows": rows,
        "attention": pack_attention(patterns, rows),
        **measured,
    }
    return {**run, "vocabulary": vocabulary(tokenizer, used_ids(run))}


def page(data: dict[str, Any]) -> str:
    """The HTML of the trace page."""
    return build("trace.html", ("page.css", "trace.css"), SCRIPTS, data["title"], data)
