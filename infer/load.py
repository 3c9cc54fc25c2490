"""A model ready for inference: weights, adapters, tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lora import load_adapter, merge_lora
from lora.adapter import PREFIX, LoRAConfig, check_tensors, read_adapter, read_config
from model import ModelConfig, Tokenizer, Transformer
from model.command import UserError, nearest
from model.narrow import FORMATS, NarrowLinear, NarrowWeight, narrow_head, narrows
from model.weights import load_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def load(
    weights: str | Path,
    adapters: Sequence[str | Path] = (),
    dtype: str = "float32",
    device: str | None = None,
    form: str = "wide",
) -> tuple[Transformer, Tokenizer]:
    """The model with its adapters merged in the order given (each may have been trained on the merged ones before it),
    and its tokenizer. The last adapter stays beside the weights, exact, where they are narrower than fp32.

    `form` (wide, or a name of model.narrow.FORMATS) keeps the linear layers' weights in 8 or 4 bits, the head's too,
    quantised as it is read; the rest is in `dtype`. Raises UserError for files that are missing or belong to another
    model, and for an unknown dtype or format.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not covered; covered are {', '.join(DTYPES)}")
    if form not in ("wide", *FORMATS):
        known = ("wide", *FORMATS)
        raise UserError(f"format {form!r} is not covered{nearest(form, known)}; there are {', '.join(known)}")
    for adapter in adapters:  # cheap checks before the weights are read
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise UserError(f"{adapter}: no adapter_config.json there; give the folder of a LoRA adapter")
    tokenizer = Tokenizer.from_pretrained(weights)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if form == "wide":
        model = Transformer.from_pretrained(weights, dtype=DTYPES[dtype], device=device)
    else:
        model = load_narrow(weights, adapters[:-1], form, DTYPES[dtype], device)
        adapters = adapters[-1:]
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{weights}: the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}; "
            "they do not belong together"
        )
    for number, adapter in enumerate(adapters, start=1):
        load_adapter(model, adapter)
        if form == "wide" and (number < len(adapters) or DTYPES[dtype].itemsize >= 4):
            merge_lora(model, keep=False)
    return model.requires_grad_(False).eval(), tokenizer


def load_narrow(
    weights: str | Path, merged: Sequence[str | Path], form: str, dtype: torch.dtype, device: str
) -> Transformer:
    """A checkpoint read into narrow weights, a few megabytes of wide ones at a time; `merged` adapters are added in
    fp32 to what is read. Memory grows by the narrow model and about one narrow matrix besides."""
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_pretrained(weights))
    updates = [Update(model, adapter) for adapter in merged]

    def keep(path: str, pieces: Iterator[tuple[slice, Tensor]]) -> nn.Module | None:
        if not narrows(path):
            return None
        linear = model.get_submodule(path)
        shape = (linear.out_features, linear.in_features)
        changed = (added(path, rows, piece) for rows, piece in pieces)
        return NarrowLinear(NarrowWeight.quantise(changed, shape, form).to(device).ready())

    def added(path: str, rows: slice, piece_MD: Tensor) -> Tensor:
        for update in updates:
            piece_MD = update.add(path, rows, piece_MD)
        return piece_MD

    load_weights(model, weights, dtype, device, keep)
    return narrow_head(model, form)


class Update:
    """An adapter that is added to weights while they are read."""

    def __init__(self, model: Transformer, path: str | Path) -> None:
        self.config: LoRAConfig = read_config(path)
        self.tensors = read_adapter(path)
        check_tensors(model, self.tensors, self.config, path)

    def add(self, path: str, rows: slice, piece_MD: Tensor) -> Tensor:
        a_RD = self.tensors.get(f"{PREFIX}{path}.lora_A.weight")
        if a_RD is None:
            return piece_MD
        b_MR = self.tensors[f"{PREFIX}{path}.lora_B.weight"][rows]
        return piece_MD.float() + (b_MR.float() @ a_RD.float()) * self.config.scale(path)
