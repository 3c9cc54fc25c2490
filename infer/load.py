"""A model ready for inference: weights, adapters, tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lora import load_adapter, merge_lora
from model import Tokenizer, Transformer
from model.command import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def load(
    weights: str | Path, adapters: Sequence[str | Path] = (), dtype: str = "float32", device: str | None = None
) -> tuple[Transformer, Tokenizer]:
    """The model with its adapters merged in the order given (each may have been trained on the merged ones before it),
    and its tokenizer. The last adapter stays beside the weights, exact, where the dtype is narrower than fp32.

    Raises UserError for files that are missing or belong to another model, and for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not covered; covered are {', '.join(DTYPES)}")
    for adapter in adapters:  # cheap checks before the weights are read
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise UserError(f"{adapter}: no adapter_config.json there; give the folder of a LoRA adapter")
    tokenizer = Tokenizer.from_pretrained(weights)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = Transformer.from_pretrained(weights, dtype=DTYPES[dtype], device=device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{weights}: the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}; "
            "they do not belong together"
        )
    for number, adapter in enumerate(adapters, start=1):
        load_adapter(model, adapter)
        if number < len(adapters) or DTYPES[dtype].itemsize >= 4:
            merge_lora(model, keep=False)
    return model.requires_grad_(False).eval(), tokenizer
