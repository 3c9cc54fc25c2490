"""The options of every program that loads one model to generate with: which model, and how it is computed.
`WeightOptions` are those of a program that looks into the model, as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    weights: str
    """A model's folder or GGUF file."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """LoRA adapters (PEFT folders), merged in this order, one --adapter each; the last stays beside weights that are
    narrower than fp32."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Put the begin token before the prompt; auto: as the tokenizer's files say. (A chat's form has its own.)"""
    max_length: int = 0
    """Tokens of a prompt and its answer together; 0: what the model's config says, times its rotary scaling. A larger
    number is taken with a warning."""
    dtype: Literal["default", "auto", "float32", "bfloat16", "float64"] = "default"
    """What the model computes in; auto: the fastest for decoding on this machine, measured; default: auto where there
    is a GPU, else float32."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(WeightOptions):
    format: Literal["auto", "wide", "int8", "int4", "int4-32", "int4-64", "int4-128", "nf4", "w8a8"] = "auto"
    """How linear layers' weights are kept: in dtype (wide), in 8 or 4 bits (the number: columns that share a scale);
    w8a8: inputs in 8 bits too, for processors and GPUs that multiply integers; auto: wide, or what fits --memory."""
    memory: str = ""
    """A memory budget, for example 6GB: choose format, batch, cache and chunk, print them, and refuse before loading
    what cannot fit. A retriever's encoder and index are not counted."""
    fuse: bool = False
    """On a CUDA device: compute by the Triton kernels (infer/engine/fuse.py). On a CPU by their definitions, slowly."""
