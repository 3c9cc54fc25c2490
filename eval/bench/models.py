"""Shared by the benchmarks: transformers' model with our weights, generation of a fixed length on both sides, and the
bytes that a decoded token reads."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infer.engine.generate import Generator
from model import ModelConfig, Transformer
from model.quantize.linear import bytes_of


def transformers_of(model: Transformer, dtype: torch.dtype) -> Any:
    """transformers' model with the same weights."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "peer")
        return AutoModelForCausalLM.from_pretrained(Path(folder) / "peer", dtype=dtype).eval()


def transformers_tokens(peer: Any, ids_BT: Tensor, mask_BT: Tensor, new: int, **options: Any) -> list[list[int]]:
    """Exactly `new` greedy tokens after each prompt, by transformers' generate; `options` are passed to it."""
    out_BT = peer.generate(
        ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )
    return out_BT[:, ids_BT.shape[1] :].tolist()


def generator_of(model: Transformer, tokenizer: Any, **how: Any) -> Generator:
    """Our generator without stop ids, so that every request runs to its token limit, like the peers'."""
    generator = Generator(model, tokenizer, **how)
    generator.stop_ids = frozenset()
    return generator


def block_matrices(config: ModelConfig) -> list[tuple[int, ...]]:
    """The shapes of all blocks' weight matrices."""
    with torch.device("meta"):
        named = Transformer(config).named_parameters()
        return [tuple(p.shape) for name, p in named if ".layers." in name and p.dim() == 2]


def read_bytes(config: ModelConfig, form: str) -> int:
    """Bytes of weights that decoding a token reads (the blocks and the head) in a format, "fp32" or "bf16"."""
    matrices = [*block_matrices(config), (config.vocab_size, config.hidden_size)]
    width = {"fp32": 4, "bf16": 2}.get(form)
    return sum(width * a * b if width else bytes_of(form, a, b) for a, b in matrices)
