"""A model ready for inference: weights, adapters, tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lora import load_adapter, merge_lora
from model import Tokenizer, Transformer
from model.command import UserError
from model.narrow import narrow

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def load(
    weights: str | Path,
    adapters: Sequence[str | Path] = (),
    dtype: str = "float32",
    device: str | None = None,
    int8: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """The model with its adapters merged in the order given (each may have been trained on the merged ones before it),
    and its tokenizer. The last adapter stays beside the weights, exact, where the dtype is narrower than fp32. `int8`
    quantises the merged fp32 weights of the blocks (model/narrow.py); the rest is in `dtype`.

    Raises UserError for files that are missing or belong to another model, and for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not covered; covered are {', '.join(DTYPES)}")
    for adapter in adapters:  # cheap checks before the weights are read
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise UserError(f"{adapter}: no adapter_config.json there; give the folder of a LoRA adapter")
    tokenizer = Tokenizer.from_pretrained(weights)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    held = torch.float32 if int8 else DTYPES[dtype]
    model = Transformer.from_pretrained(weights, dtype=held, device=device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{weights}: the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}; "
            "they do not belong together"
        )
    for number, adapter in enumerate(adapters, start=1):
        load_adapter(model, adapter)
        if number < len(adapters) or held.itemsize >= 4:
            merge_lora(model, keep=False)
    if int8:
        narrow(model)
        for parameter in model.parameters():  # the scales are buffers and stay fp32
            parameter.data = parameter.data.to(DTYPES[dtype])
    return model.requires_grad_(False).eval(), tokenizer
