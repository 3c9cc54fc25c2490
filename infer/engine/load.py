"""Loads a model for inference: weights, adapters, tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
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
from model.checkpoints.weights import Checkpoint, load_weights, open_checkpoint
from model.quantize.linear import FORMATS, CastEmbedding, QuantizedLinear, QuantizedWeight, is_quantizable
from model.quantize.rotation import Rotation, mixes_inputs, mixes_rows
from model.support.cli import UserError, nearest
from model.support.hardware import NO_INT8_PRODUCTS, fastest_dtype, has_amx, int8_products, return_freed_memory
from model.support.torchrun import rank_and_world

MANY_ROWS = 24  # rows a step from which AMX makes int4 slower than fp32 (eval.bench decode)
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
    """The model with its adapters merged in the order given (each may have been trained on the ones before it), and its
    tokenizer. If the weights are narrower than fp32, the last adapter stays unmerged, to be exact.

    `form` is the format of the linear layers' weights, the head's included: "wide" (in `dtype`) or one of FORMATS,
    quantized while reading. `fused` uses the kernels (fuse.py). Raises UserError for missing files, files of another
    model, an unknown dtype or format, and w8a8 on a machine without fast int8 GEMMs.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
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
            if ".lora_" in name:  # cast once, not in every GEMM
                parameter.data = parameter.data.to(DTYPES[dtype])
        fuse(model)
    return_freed_memory()
    return model.requires_grad_(False).eval(), tokenizer


def check_adapters(weights: str | Path, adapters: Sequence[str | Path]) -> None:
    """Checks adapters before the weights are read. Raises UserError if one is missing or was made for another model."""
    for adapter in adapters:
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise UserError(f"{adapter}: no adapter_config.json there; give the folder of a LoRA adapter")
    check_origin(weights, adapters)


def check_format(form: str, device: str, processor: str | None = None) -> None:
    """Raises UserError for an unknown format, and for w8a8 if this machine has no fast int8 GEMM. `processor` may give
    another CPU's flags."""
    known = ("wide", *FORMATS)
    if form not in known:
        raise UserError(f"format {form!r} is not supported{nearest(form, known)}; supported are {', '.join(known)}")
    if form == "w8a8" and not int8_products(device, processor):
        raise UserError(f"format w8a8: {NO_INT8_PRODUCTS}; take int8 or int4")


def load_quantized(
    weights: str | Path, merged: Sequence[str | Path], form: str, dtype: torch.dtype, device: str
) -> Transformer:
    """Quantizes a checkpoint while reading it, a few megabytes at a time, with the `merged` adapters added in fp32.
    Peak memory is the quantized model plus about one quantized matrix.

    w8a8 also rotates the model (model/quantize/rotation.py), which holds one matrix twice in fp32; adapters loaded
    later are rotated too.
    """
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_pretrained(weights))
    checkpoint = merged_checkpoint(model, weights, merged)
    rotation = Rotation(model.config, cache(checkpoint.read)) if form == "w8a8" else None

    def replacement(path: str, chunks: Iterator[tuple[slice, Tensor]]) -> nn.Module | None:
        module = model.get_submodule(path)
        in_order = (chunk for _, chunk in chunks)
        if isinstance(module, nn.Embedding):
            return embedding(path, module, in_order)
        if not (isinstance(module, nn.Linear) and is_quantizable(path)):
            return None
        return quantized(path, in_order, (module.out_features, module.in_features))

    def quantized(path: str, chunks: Iterable[Tensor], shape: tuple[int, int]) -> QuantizedLinear:
        mixed = rotation is not None and mixes_inputs(path)
        if rotation is not None:
            chunks = rotated(rotation, path, chunks, shape)
        return QuantizedLinear(QuantizedWeight.quantize(chunks, shape, form, mixed).to(device).pack())

    def embedding(path: str, module: nn.Embedding, chunks: Iterator[Tensor]) -> nn.Module:
        """The embedding in bf16 (fp64 if `dtype` is); in a tied model, the same chunks are quantized as the head."""
        rows: list[Tensor] = []

        def collected() -> Iterator[Tensor]:
            for chunk in chunks:
                row_MD = chunk if rotation is None else rotation.columns(path, chunk)
                rows.append(row_MD.to(dtype if dtype == torch.float64 else torch.bfloat16))
                yield chunk

        if model.lm_head is None:
            model.lm_head = quantized("lm_head", collected(), (module.num_embeddings, module.embedding_dim))
        else:
            for _ in collected():
                pass
        return CastEmbedding(torch.cat(rows).to(device), dtype)

    load_weights(model, checkpoint, dtype, device, replacement)
    if rotation is not None:
        rotation.finish(model)
    return model


def merged_checkpoint(model: Transformer, weights: str | Path, adapters: Sequence[str | Path]) -> Checkpoint:
    """A checkpoint whose tensors have the adapters merged, in the order given and without rounding, when they are read.
    Raises UserError for an adapter of another model."""
    from lora.merge import merge_checkpoint  # imports tyro, which a bare CUDA image may lack

    checkpoint = open_checkpoint(weights)
    for adapter in adapters:
        config, tensors = read_config(adapter), AdapterFile(adapter)
        check_tensors(model, tensors, config, adapter)
        checkpoint = merge_checkpoint(checkpoint, config, tensors)
    return checkpoint


def rotated(rotation: Rotation, path: str, chunks: Iterable[Tensor], shape: tuple[int, int]) -> Iterator[Tensor]:
    """The chunks of a matrix, rotated; the whole matrix as one chunk if the rotation mixes its rows."""
    rotated_chunks = (rotation.columns(path, chunk) for chunk in chunks)
    if not mixes_rows(path):
        yield from rotated_chunks
        return
    yield rotation.rows(path, concatenated(rotated_chunks, shape))


def concatenated(chunks: Iterable[Tensor], shape: tuple[int, int]) -> Tensor:
    """Chunks of rows as one fp32 matrix, without holding all chunks beside it."""
    whole_OD, start = torch.empty(shape), 0
    for chunk_MD in chunks:
        whole_OD[start : start + len(chunk_MD)] = chunk_MD
        start += len(chunk_MD)
    return whole_OD


def plan_for(options: Any, asked: Requests) -> Plan:
    """The plan for a program's options (ModelOptions) and requests; within --memory if given, and then printed to
    stderr. A format that only saves memory is reported there too. Raises UserError for a --memory that cannot be parsed
    or is not enough."""
    dtype, device, lines = DTYPES.get(options.dtype, torch.float32), device_here(), []
    if options.memory:
        budget = read_size(options.memory)
        if options.fuse and device == "cpu":
            raise UserError(
                "on a CPU, --fuse runs the kernels' PyTorch definitions, which take more memory than --memory plans; "
                "leave one out"
            )
        plan = fit(options.weights, options.adapter, budget, asked, options.format, dtype, device)
        lines.append(plan.describe(budget))
    else:
        plan = Plan("wide" if options.format == "auto" else options.format, asked.batch, dtype, 2048, {})
    if reason := only_saves_memory(plan.form, device, options.fuse, plan.batch * asked.answers):
        lines.append(f"format {plan.form} only saves memory here: {reason}")
    if rank_and_world()[0] == 0:
        for line in lines:
            print(line, file=sys.stderr)
    return plan


def only_saves_memory(form: str, device: str, fused: bool, rows: int = 1) -> str:
    """Why a format is slower than unquantized weights here, "" if it is not: no kernel takes the codes of nf4, on a GPU
    those of int8 too, and those of int4 unless `fused`; on a processor with AMX w8a8, and int4 for many `rows` a
    step."""
    kind = form.partition("-")[0]
    if kind == "nf4" or (device != "cpu" and (kind == "int8" or (kind == "int4" and not fused))):
        return "its weights are dequantized for each GEMM"
    if kind == "w8a8" and device == "cpu" and has_amx():
        return "AMX multiplies bfloat16 (--dtype bfloat16) in less time than rounding the inputs to int8 takes"
    if kind == "int4" and device == "cpu" and has_amx() and rows > MANY_ROWS:
        return f"with AMX its weights take longer to dequantize for {rows} rows a step than the product takes"
    return ""


def dtype_for(options: Any, calls: Sequence[tuple[int, int]], known: str | None = None) -> str:
    """The dtype of a program's options. "auto" (and "default" on a GPU) is resolved and printed to stderr: fp32 for
    int8, int4 and nf4 weights (whose GEMMs choose their own dtype); else the dtype in which the job's GEMMs are
    fastest, for w8a8 too, whose time is mostly attention. `calls` are (rows, number of GEMMs with that many rows);
    `known` is the dtype that a resumed job began with."""
    device = device_here()
    if options.dtype == "default" and device == "cpu":
        return "float32"
    if options.dtype in DTYPES:
        return options.dtype
    if known in DTYPES:
        print(f"dtype auto: {known}, as this job began", file=sys.stderr)
        return known
    if options.format not in ("auto", "wide", "w8a8"):
        print(f"dtype auto: float32 for {options.format} weights", file=sys.stderr)
        return "float32"
    fastest, times = fastest_dtype(tuple(calls), device)
    chosen, sizes = str(fastest).removeprefix("torch."), ", ".join(str(rows) for rows, _ in calls)
    measured = ", ".join(f"{name} {milliseconds:.0f} ms" for name, milliseconds in times.items())
    line = f"dtype auto: {chosen}, the fastest for GEMMs of {sizes} rows"
    print(f"{line} (measured: {measured})" if measured else line, file=sys.stderr)
    return chosen
