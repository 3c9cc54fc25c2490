"""A model ready for inference: weights, adapters, tokenizer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infer.engine.fuse import fuse
from infer.engine.memory import Plan, fit, read_size
from lora import load_adapter, merge_lora
from lora.memory import Requests
from lora.origin import check_origin
from lora.peft import AdapterFile, check_tensors, read_config
from model import ModelConfig, Tokenizer, Transformer
from model.checkpoints.safetensors import Stored
from model.checkpoints.weights import Checkpoint, load_weights, open_checkpoint
from model.quantize.linear import FORMATS, CastEmbedding, QuantizedLinear, QuantizedWeight, is_quantizable
from model.quantize.rotation import Rotation, mixes_inputs, mixes_rows
from model.support.cli import UserError, nearest
from model.support.hardware import NO_INT8_PRODUCTS, fastest_dtype, int8_products

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def device_here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(
    weights: str | Path,
    adapters: Sequence[str | Path] = (),
    dtype: str = "float32",
    device: str | None = None,
    form: str = "wide",
    fused: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """The model with its adapters merged in the order given (each may have been trained on the merged ones before it),
    and its tokenizer. The last adapter stays beside the weights, exact, where they are narrower than fp32.

    `form` ("wide", or a name of FORMATS) keeps the linear layers' weights in 8 or 4 bits, the head's too,
    quantized as it is read; the rest is in `dtype`. `fused`: the GPU's kernels in the blocks' place
    (infer/engine/fuse.py), for int4's codes as they are. Raises UserError for files that are missing or
    belong to another model, for an unknown dtype or format, and for w8a8 where integers are not multiplied fast.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not covered; covered are {', '.join(DTYPES)}")
    device = device or device_here()
    check_format(form, device)
    check_adapters(weights, adapters)
    tokenizer = Tokenizer.from_pretrained(weights)
    if form == "wide":
        model = Transformer.from_pretrained(weights, dtype=DTYPES[dtype], device=device)
    else:
        model = load_quantized(weights, adapters[:-1], form, DTYPES[dtype], device)
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
    if fused:
        for name, parameter in model.named_parameters():
            if ".lora_" in name:  # else each product casts it anew
                parameter.data = parameter.data.to(DTYPES[dtype])
        fuse(model)
    return model.requires_grad_(False).eval(), tokenizer


def check_adapters(weights: str | Path, adapters: Sequence[str | Path]) -> None:
    """What can be seen of adapters before the weights are read. Raises UserError where one is missing or another's."""
    for adapter in adapters:
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise UserError(f"{adapter}: no adapter_config.json there; give the folder of a LoRA adapter")
    check_origin(weights, adapters)


def check_format(form: str, device: str, processor: str | None = None) -> None:
    """Raises UserError for a format that is unknown, or that this machine (or the `processor` described) has no
    products for."""
    if form not in ("wide", *FORMATS):
        known = ("wide", *FORMATS)
        raise UserError(f"format {form!r} is not covered{nearest(form, known)}; there are {', '.join(known)}")
    if form == "w8a8" and not int8_products(device, processor):
        raise UserError(f"format w8a8: {NO_INT8_PRODUCTS}; take int8 or int4")


def load_quantized(
    weights: str | Path, merged: Sequence[str | Path], form: str, dtype: torch.dtype, device: str
) -> Transformer:
    """A checkpoint read into quantized weights, a few megabytes of wide ones at a time; `merged` adapters are added in
    fp32 to what is read. Memory grows by the quantized model and about one quantized matrix besides.
    w8a8: the model is rotated as it is read, for which a matrix is held twice in fp32; adapters loaded on it turn.
    """
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_pretrained(weights))
    checkpoint = merged_checkpoint(model, weights, merged)
    rotation = Rotation(model.config, cache(checkpoint.read)) if form == "w8a8" else None

    def keep(path: str, pieces: Iterator[tuple[slice, Tensor]]) -> nn.Module | None:
        module = model.get_submodule(path)
        in_order = (piece for _, piece in pieces)
        if isinstance(module, nn.Embedding):
            return embedding(path, module, in_order)
        if not (isinstance(module, nn.Linear) and is_quantizable(path)):
            return None
        return quantized(path, in_order, (module.out_features, module.in_features))

    def quantized(path: str, pieces: Iterable[Tensor], shape: tuple[int, int]) -> QuantizedLinear:
        mixed = rotation is not None and mixes_inputs(path)
        turned = pieces if rotation is None else rotated(rotation, path, pieces, shape)
        return QuantizedLinear(QuantizedWeight.quantize(turned, shape, form, mixed).to(device).pack())

    def embedding(path: str, module: nn.Embedding, pieces: Iterator[Tensor]) -> nn.Module:
        """Its rows are looked up one by one, so bf16 costs no time; a tied model's head is quantized on the way."""
        rows: list[Tensor] = []

        def kept() -> Iterator[Tensor]:
            for piece in pieces:
                turned = piece if rotation is None else rotation.columns(path, piece)
                rows.append(turned.to(dtype if dtype == torch.float64 else torch.bfloat16))
                yield piece

        if model.lm_head is None:
            model.lm_head = quantized("lm_head", kept(), (module.num_embeddings, module.embedding_dim))
        else:
            for _ in kept():
                pass
        return CastEmbedding(torch.cat(rows).to(device), dtype)

    load_weights(model, checkpoint, dtype, device, keep)
    if rotation is not None:
        rotation.finish(model)
    return model


def merged_checkpoint(
    model: Transformer, weights: str | Path, adapters: Sequence[str | Path], dtype: torch.dtype | None = None
) -> Checkpoint:
    """The checkpoint of a model, with adapters merged in the order given as it is read: of the weights in `dtype`,
    rounded to it, or of the file's, unrounded (None). Raises UserError where an adapter is another model's."""
    from lora.merge import merge_checkpoint  # a program too, whose command line a bare CUDA image cannot read

    checkpoint = open_checkpoint(weights)
    if adapters and dtype is not None:
        checkpoint = replace(checkpoint, tensors={name: cast(t, dtype) for name, t in checkpoint.tensors.items()})
    for adapter in adapters:
        config, tensors = read_config(adapter), AdapterFile(adapter)
        check_tensors(model, tensors, config, adapter)
        checkpoint = merge_checkpoint(checkpoint, config, tensors, dtype)
    return checkpoint


def cast(stored: Stored, dtype: torch.dtype) -> Stored:
    return replace(stored, read=lambda rows: stored.read(rows).to(dtype))


def rotated(rotation: Rotation, path: str, pieces: Iterable[Tensor], shape: tuple[int, int]) -> Iterator[Tensor]:
    """A matrix's pieces, rotated: the whole at once where its rows are mixed."""
    turned = (rotation.columns(path, piece) for piece in pieces)
    if not mixes_rows(path):
        yield from turned
        return
    yield rotation.rows(path, gathered(turned, shape))


def gathered(pieces: Iterable[Tensor], shape: tuple[int, int]) -> Tensor:
    """Rows in order as one fp32 matrix."""
    whole_OD, start = torch.empty(shape), 0
    for piece_MD in pieces:
        whole_OD[start : start + len(piece_MD)] = piece_MD
        start += len(piece_MD)
    return whole_OD


def plan_for(options: Any, asked: Requests) -> Plan:
    """How to run with a program's options (weights, adapter, dtype, format, memory, batch), said on stderr where a
    memory is given. Raises UserError for a memory that cannot be read or is not enough."""
    dtype = DTYPES.get(options.dtype, torch.float32)
    if not options.memory:
        return Plan("wide" if options.format == "auto" else options.format, asked.batch, dtype, 2048, {})
    budget = read_size(options.memory)
    device = device_here()
    if options.fuse and device == "cpu":
        raise UserError(
            "--fuse computes the kernels' definitions on a CPU, in more memory than --memory plans; leave one out"
        )
    plan = fit(options.weights, options.adapter, budget, asked, options.format, dtype, device)
    if int(os.environ.get("RANK", 0)) == 0:
        print(plan.describe(budget), file=sys.stderr)
    return plan


def dtype_for(options: Any, calls: Sequence[tuple[int, int]], known: str | None = None) -> str:
    """A program's dtype; "auto" (and "default" where there is a GPU) is chosen here and said on stderr: fp32 beside
    int8, int4 and nf4 weights (whose products choose for themselves), else what the job's products are fastest in (w8a8
    too: attention's are most of its time): `calls` are (rows, how many products of so many rows). `known`: what a job
    that goes on had chosen."""
    device = device_here()
    if options.dtype == "default" and device == "cpu":
        return "float32"
    if options.dtype in DTYPES:
        return options.dtype
    if known in DTYPES:
        print(f"dtype auto: {known}, as this job began", file=sys.stderr)
        return known
    if options.format not in ("auto", "wide", "w8a8"):
        print(f"dtype auto: float32 beside {options.format} weights", file=sys.stderr)
        return "float32"
    chosen = str(fastest_dtype(tuple(calls), device)).removeprefix("torch.")
    print(
        f"dtype auto: {chosen}, the fastest for products of {', '.join(str(r) for r, _ in calls)} rows", file=sys.stderr
    )
    return chosen
