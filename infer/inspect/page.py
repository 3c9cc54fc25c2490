"""The trace page: values and attention packed into one HTML file that needs nothing else.

Attention is kept in 16 shades, evenly spaced in √weight (the finest is 0.004; the page says so), a byte each, over the
keys that a position can see, deflated a layer at a time; the page inflates a layer when it is shown.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from infer.extract.grounded import token_bytes
from infer.inspect import values as run_measures
from infer.inspect.html import build
from infer.inspect.recording import Tape
from lora.layer import LoRALinear
from model import Tokenizer, Transformer, attention, transformer
from model.support.source import place

SCRIPTS = ("elements.js", "tokens.js", "figures.js", "trace.js")
SHADES = 15


def pack_attention(patterns: Tape, rows: Sequence[int]) -> list[str]:
    """For each layer: of every head and kept row, its weights over the keys 0 … row; √weight in 1/15, deflated."""
    packed = []
    for name in patterns:
        pattern_HRT = patterns[name][0].float().cpu()
        shade_HRT = (pattern_HRT.sqrt() * SHADES).round().to(torch.uint8).numpy()
        seen_RT = np.arange(pattern_HRT.shape[2])[None] <= np.asarray(rows)[:, None]
        packed.append(base64.b64encode(zlib.compress(shade_HRT[:, seen_RT].tobytes(), 6)).decode())
    return packed


def vocabulary(tokenizer: Tokenizer, ids: set[int]) -> dict[str, list[Any]]:
    """Of each id: its bytes in hexadecimal, or (null, the special token's name)."""
    found: dict[str, list[Any]] = {}
    for i in sorted(ids):
        inside = i < tokenizer.vocab_size
        spelling, name = (token_bytes(tokenizer, i), tokenizer.piece(i)) if inside else (None, None)
        found[str(i)] = [None, name or f"id {i}"] if spelling is None else [spelling.hex()]
    return found


def used_ids(run: dict[str, Any]) -> set[int]:
    """Every token id that a run's values name."""
    ids = {*run["ids"], *run["targets"], *run["attribution"]["rival"], *run["own"]}
    ids |= {level[0] for step in run["lens"] for level in step}
    return ids | {best[0] for one in run["predictions"] if one for best in one["best"]}


def code() -> dict[str, dict[str, Any]]:
    """Where each thing on the page is computed: file, line and the line itself."""
    return {
        "attention": place(attention.Pattern.forward, "F.softmax"),
        "z": place(attention.PlainAttend.forward, "return torch.matmul(pattern_BHTS"),
        "window": place(attention.Visible.block, "distance_BTS < window"),
        "lens": place(transformer.Transformer.head, "self.lm_head"),
        "experts": place(transformer.Experts.forward, "torch.topk"),
        "lora": place(LoRALinear.forward, "addmm_"),
        "attribution": place(run_measures.components, "into_NHK = "),
    }


def run_values(
    name: str, model: Transformer, tokenizer: Tokenizer, ids: list[int], start: int, own: list[int], rows: list[int]
) -> dict[str, Any]:
    """One model's part of the page. `own` is its own answer; `ids` may be another run's text."""
    values, patterns = run_measures.measure(model, ids, start, rows)
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
        **values,
    }
    return {**run, "vocabulary": vocabulary(tokenizer, used_ids(run))}


def page(data: dict[str, Any]) -> str:
    """The HTML of a trace."""
    return build("trace.html", ("page.css", "trace.css"), SCRIPTS, data["title"], data)
