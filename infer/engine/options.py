"""Command-line options shared by programs that load a model. `WeightOptions`: which model and dtype; `ModelOptions`
adds those of generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    weights: str
    """A model's folder or GGUF file."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """LoRA adapters (PEFT folders), one --adapter each, merged in this order. In bf16 and quantized formats the last
    one stays unmerged."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Put the begin token before the prompt; auto: as the tokenizer's files say. Chat templates set their own."""
    max_length: int = 0
    """Maximum number of tokens of a prompt and its answer together; 0: the config's, times its rotary scaling. A larger
    number gives a warning."""
    dtype: Literal["default", "auto", "float32", "bfloat16", "float64"] = "default"
    """Dtype of the computation; auto: the fastest on this machine, measured; default: auto on a GPU, else float32."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(WeightOptions):
    format: Literal["auto", "wide", "int8", "int4", "int4-32", "int4-64", "int4-128", "nf4", "w8a8"] = "auto"
    """Format of the linear layers' weights: dtype (wide), 8 or 4 bits (int4-N: N columns share a scale); w8a8: inputs
    in 8 bits too, for processors and GPUs with fast int8 GEMMs; auto: wide, or what fits --memory. nf4, and on a GPU
    int8 and (without --fuse) int4, only save memory: weights are dequantized for each GEMM."""
    memory: str = ""
    """A memory budget, for example 6GB: format, batch, cache and chunk are chosen to fit it, and a model that cannot
    fit is refused before it is loaded. A retriever's encoder and index are not counted."""
    fuse: bool = False
    """Use the Triton kernels on a CUDA device (infer/engine/fuse.py); on a CPU, their PyTorch definitions, slowly."""
