"""The cases of `eval.bench gpu`: whole models, each kernel, extraction, training, correctness.

Unless a row says otherwise, launches are timed inside CUDA graphs over inputs that together exceed L2. Limits are what
this device reaches in the same run: a read of 4 GiB, a GEMM of 8192³.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from eval.bench.row import Row
from kernels.proof.cases import EPS, FFN, GROUPS, HEAD, HEADS, QKV, VOCAB, WIDTH, Case, Make, cases, int4, linear

DEVICE = "cuda"
INPUTS = Path("runs/gpu-inputs")  # written by --prepare: a base as safetensors, and token ids of notes
BF16 = torch.bfloat16
DEPTH = 32
BATCHES = (1, 8, 64)
REPEATS = 5  # least number of repeats of a measurement
HELD = 512  # tokens of context in the whole-model cases
SLOTS = 1024
# extraction from random notes
NOTES, NOTE_TOKENS, QUESTIONS, QUESTION_TOKENS, NEW_TOKENS = 32, 400, 9, 20, 12
ROW_TOKENS = 2048  # tokens of a training step
LAYERS = {"q, k, v": (QKV, WIDTH), "o": ((WIDTH,), WIDTH), "gate, up": ((FFN, FFN), WIDTH), "down": ((WIDTH,), FFN)}


def captured(functions: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of these calls in sequence, after a warm-up on a side stream that compiles them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for function in functions[:2] * 2:
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    return graph


def seconds(call: Callable[[], Any], budget: float = 0.3) -> float:
    """Median time of a call on the device."""
    times: list[float] = []
    call()
    while sum(times) < budget or len(times) < REPEATS:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[len(times) // 2]


def us(build: Callable[[], Callable[[], Any]], bytes_: int) -> float:
    """Microseconds of a call in a CUDA graph that cycles through enough copies of its inputs (of `bytes_` each) to
    exceed L2."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    functions = [build() for _ in range(min(max(2, -(-3 * cache // bytes_)), 64))]
    return seconds(captured(functions).replay) / len(functions) * 1e6


def reached() -> dict[str, float]:
    """The rates that this device reaches: bytes/s of a read, operations/s of a bf16 GEMM."""
    big = torch.ones(2**30, dtype=torch.float32, device=DEVICE)
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=BF16) for _ in range(2))
    return {
        "bytes/s": big.nbytes / seconds(big.sum),
        "operations/s": 2 * 8192**3 / seconds(lambda: a @ b),
    }


def flat(out: Any) -> list[torch.Tensor]:
    return [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if t is not None]


def rms_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.detach().double() - truth.detach()).pow(2).mean().sqrt())


def verify(case: Case) -> dict[str, Any]:
    """RMS error of ours and of PyTorch against fp64, of the worst output; right if ours ≤ 2 × PyTorch's for each.

    The device's sqrt, division and exp2 are approximate (2 ulp in PTX's documentation), which matters in fp32: if
    PyTorch happens to be closer, an error of four such operations (8 ulp of the largest value) is accepted.
    """
    torch.manual_seed(0)
    ours, plain, truth = case.build(Make(DEVICE, case.dtype))
    worst, right = (0.0, 0.0), True
    for mine, theirs, exact in zip(flat(ours()), flat(plain()), flat(truth()), strict=True):
        a, b = rms_error(mine, exact), rms_error(theirs, exact)
        largest = float(exact.detach().abs().max())
        floor = (4 * 2 * 2**-23 if case.dtype == torch.float32 else torch.finfo(case.dtype).eps / 2**11) * largest
        right &= bool(torch.isfinite(mine).all()) and a <= max(2 * b, floor)
        worst = max(worst, (a, b))
    return {"case": f"{case.name}, {case.dtype}", "error": worst[0], "pytorch's error": worst[1], "right": right}


# ---- (a) the whole model ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_bf16() -> Iterator[None]:
    """Create tensors in bf16 on the device; creating a 7B in fp32 or on the host would take minutes."""
    torch.set_default_dtype(BF16)
    try:
        with torch.device(DEVICE):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def shape_7b() -> dict[str, Any]:
    """Mistral-7B's sizes, with the keys of config.json."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD,
        "vocab_size": VOCAB,
    }


def random_7b(rank: int = 0) -> Any:
    """A model of Mistral-7B's shape with random bf16 weights on the device, and adapters if `rank` > 0."""
    from lora import LoRAConfig, add_lora
    from model import ModelConfig, Transformer

    more = {"rms_norm_eps": EPS, "rope_theta": 10000.0, "sliding_window": 4096, "max_position_embeddings": 32768}
    config = ModelConfig.from_dict({"model_type": "mistral", **shape_7b(), **more})
    with in_bf16():
        model = Transformer(config).requires_grad_(False).eval()
    for weight in model.parameters():
        weight.normal_(0, 0.02) if weight.dim() > 1 else weight.fill_(1)
    if rank:
        add_lora(model, LoRAConfig(r=rank, alpha=2 * rank, dropout=0.0, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = (torch.randn_like(parameter.data, dtype=torch.float32) * 0.02).to(BF16)
    return model


def products_alone(model: Any, batch: int) -> float:
    """Tokens per second of the model's GEMMs alone, by `torch.mm`: the peer of the decode rows."""
    weights = [p for p in model.parameters() if p.dim() == 2 and min(p.shape) >= 1024]
    weights = [w for w in weights if w is not model.model.embed_tokens.weight]
    x = {w.shape[1]: torch.randn(batch, w.shape[1], device=DEVICE, dtype=BF16) for w in weights}
    return batch / seconds(captured([partial(torch.mm, x[w.shape[1]], w.t()) for w in weights]).replay)


@torch.inference_mode()
def decode_speeds(model: Any, batch: int) -> tuple[float, float]:
    """Tokens per second (in a CUDA graph, eager) of a fused model's decode step after HELD tokens."""
    from infer.engine.fuse import DecodeStep

    step = DecodeStep(model, batch, SLOTS)
    step.key_position_BS[:, :HELD] = torch.arange(HELD, device=DEVICE)
    tokens = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    call = partial(step, tokens, torch.full_like(tokens, HELD))
    return batch / seconds(captured([call]).replay), batch / seconds(call)


def transformers_7b() -> Any:
    """transformers' model of the same shape with random bf16 weights on the device. Raises ImportError without it."""
    from transformers import MistralConfig, MistralForCausalLM

    with in_bf16():
        return MistralForCausalLM(MistralConfig(**shape_7b(), sliding_window=None))


@torch.inference_mode()
def transformers_speed(batch: int) -> float:
    """Tokens per second of transformers' Mistral with a static cache, compiled."""
    from transformers import StaticCache

    model = transformers_7b().eval()
    cache = StaticCache(config=model.config, max_cache_len=SLOTS)
    model(torch.zeros(batch, HELD, dtype=torch.int64, device=DEVICE), past_key_values=cache)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=DEVICE)
    place = torch.tensor([HELD], device=DEVICE)
    return batch / seconds(lambda: step(token, past_key_values=cache, cache_position=place))


class Models:
    """Caches the 7B model on the device, one at a time, and the rates of its bare GEMMs, which are the peers of the
    int4 rows too."""

    def __init__(self) -> None:
        self.key: tuple[int, str] | None = None
        self.model: Any = None
        self.alone: dict[int, float] = {}

    def fused(self, rank: int, form: str) -> Any:
        from infer.engine.fuse import fuse

        if self.key != (rank, form):
            if self.key != (rank, "bf16"):
                self.model = None
                torch.cuda.empty_cache()
                self.model = fuse(random_7b(rank))
            if form == "int4":
                self.model = fuse(self.model, four_bit=True)
            self.key = rank, form
        return self.model


def decode_rows(models: Models, limits: dict[str, float], rank: int, form: str, batch: int) -> list[Row]:
    model = models.fused(rank, form)
    if form == "bf16" and batch not in models.alone:
        models.alone[batch] = products_alone(model, batch)
    graph, eager = decode_speeds(model, batch)
    read = sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) - model.model.embed_tokens.weight.nbytes
    name = f"Mistral-7B decode, {form}{', LoRA r 16 unmerged' * bool(rank)}, batch {batch}"
    setting, limit = f"{HELD} tokens of context, random weights", batch * limits["bytes/s"] / read
    return [
        Row(name, graph, models.alone.get(batch), "bare torch.mm of the bf16 weights", "tok/s", setting, limit),
        Row(name, graph, eager, "the same without a graph", "tok/s", setting, limit),
    ]


def transformers_rows(models: Models) -> list[Row]:
    graph, _ = decode_speeds(models.fused(0, "bf16"), 1)
    peer = transformers_speed(1)
    name = "Mistral-7B decode, bf16, batch 1"
    return [Row(name, graph, peer, "transformers, static cache, compiled", "tok/s", f"{HELD} tokens of context")]


def whole_model(limits: dict[str, float]) -> Iterator[tuple[str, Callable[[], Any]]]:
    models = Models()
    for rank in (0, 16):
        for form in ("bf16", "int4"):
            for batch in BATCHES:
                name = f"whole model, rank {rank}, {form}, batch {batch}"
                yield name, partial(decode_rows, models, limits, rank, form, batch)
    yield "whole model, transformers", partial(transformers_rows, models)


# ---- (b) each decode kernel ---------------------------------------------------------------------------------------


def layer_bytes(sizes: tuple[int, ...], width: int, bits: float) -> int:
    return int(sum(sizes) * width * bits / 8)


def kernel_rows(limits: dict[str, float], name: str, kind: str, rank: int, rows: int) -> list[Row]:
    """One linear layer of a block against F.linear, and torch.compile or torch's packed int4."""
    sizes, width = LAYERS[name]
    make, normed, gated = Make(DEVICE, BF16), name in ("q, k, v", "gate, up"), name == "gate, up"
    given: dict[str, Any] = dict(rows=rows, sizes=sizes, rank=rank, normed=normed, gated=gated, width=width)
    case = partial(linear, make, **given) if kind == "bf16" else partial(int4, make, group=64, **given)
    bits = 16.0 if kind == "bf16" else 4.5
    bytes_ = layer_bytes(sizes, width, bits) + 2 * rank * (width * len(sizes) + sum(sizes))
    limit = bytes_ / limits["bytes/s"] * 1e6
    ours = us(lambda: case()[0], bytes_)
    label, setting = f"{name}, {kind}, rank {rank}, {rows} rows", "bf16, Mistral-7B's shapes, graph"

    def plain() -> Callable[[], Any]:
        x = make.normal(rows, width)
        weights = [make.normal(size, width) for size in sizes]
        return lambda: [F.linear(x, w) for w in weights]

    peers = {"F.linear in bf16, no norm, no adapter": us(plain, layer_bytes(sizes, width, 16.0))}
    if kind == "bf16":
        torch._dynamo.reset()
        compiled = torch.compile(linear(make, **given)[1])
        peers["torch.compile (one set of inputs)"] = us(lambda: compiled, 2**40)
    else:
        packed = partial(torch_int4, make, rows, sizes, width)
        peers["torch's packed int4, no norm, no adapter"] = us(packed, bytes_)
    return [Row(label, ours, taken, peer, "us", setting, limit) for peer, taken in peers.items()]


def torch_int4(make: Make, rows: int, sizes: tuple[int, ...], width: int) -> Callable[[], Any]:
    x = make.normal(rows, width)
    weights = []
    for size in sizes:
        codes = make.integers(0, 256, size, width // 2).to(torch.uint8)
        weights.append((torch._convert_weight_to_int4pack(codes, 8), make.normal(width // 64, size, 2)))
    return lambda: [torch._weight_int4pack_mm(x, words, 64, steps) for words, steps in weights]


def attention_rows(case: Case) -> list[Row]:
    ours, plain, _ = case.build(Make(DEVICE, BF16))
    a, b = (us(partial(lambda f: f, f), 2**40) for f in (ours, plain))
    return [Row(case.name, a, b, "eager PyTorch", "us", "bf16, inputs in L2")]


# ---- (c) extraction -----------------------------------------------------------------------------------------------


class Ids:
    """Replaces a tokenizer: prompts are token ids and the generated texts are not used."""

    stop_ids: frozenset[int] = frozenset()
    vocab_size = 0

    def decode(self, ids: list[int]) -> str:
        return ""


def extraction_rows(prepared: bool) -> list[Row]:
    """Notes per hour with nine questions each and NEW_TOKENS tokens per answer: the base and notes of INPUTS if
    `prepared`, else a 7B and notes of random tokens."""
    from infer.engine.fuse import fuse
    from infer.engine.generate import Generator
    from model import Transformer

    if prepared:
        name, model = "the prepared base", Transformer.from_pretrained(INPUTS, dtype=BF16, device=DEVICE)
        inputs = json.loads((INPUTS / "tokens.json").read_text())
    else:
        name, model = "Mistral-7B's shape", random_7b()
        drawn = torch.Generator().manual_seed(0)
        of_length = {"notes": (NOTES, NOTE_TOKENS), "questions": (QUESTIONS, QUESTION_TOKENS)}
        inputs = {key: torch.randint(3, VOCAB, size, generator=drawn).tolist() for key, size in of_length.items()}
    generator = Generator(fuse(model.requires_grad_(False).eval()), Ids(), lookup=False)  # type: ignore[arg-type]
    generator.stop_ids = frozenset()  # every answer has NEW_TOKENS tokens
    prompts = [note + question for note in inputs["notes"] for question in inputs["questions"]]
    generator.generate(prompts[: 2 * len(inputs["questions"])], max_new_tokens=NEW_TOKENS)  # compiles
    began = time.perf_counter()
    generator.generate(prompts, max_new_tokens=NEW_TOKENS)  # returns Python lists, so it has synchronized
    speed = len(inputs["notes"]) / (time.perf_counter() - began) * 3600
    tokens = sum(map(len, inputs["notes"])) / len(inputs["notes"])
    setting = f"{len(inputs['notes'])} notes of {tokens:.0f} tokens, {NEW_TOKENS} new a question, bf16, eager"
    return [Row(f"extraction, {name}", speed, None, None, "notes/h", setting)]


# ---- (d) training -------------------------------------------------------------------------------------------------


def training_rows(limits: dict[str, float], recompute: bool) -> list[Row]:
    """LoRA r 16 on a frozen 7B: tokens per second of forward and backward, and memory, against peft if installed."""
    from infer.engine.fuse import fuse
    from kernels import linear_cross_entropy

    def measured(model: Any, loss: Callable[[Any], torch.Tensor]) -> tuple[float, float]:
        torch.cuda.reset_peak_memory_stats()

        def step() -> None:
            loss(model).backward()
            model.zero_grad(set_to_none=True)

        return ROW_TOKENS / seconds(step, 2.0), torch.cuda.max_memory_allocated() / 2**30

    tokens = torch.randint(0, VOCAB, (1, ROW_TOKENS), device=DEVICE)
    model = random_7b(16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model = fuse(model.train())
    model.model.checkpoint_blocks = recompute
    size = sum(p.numel() for p in model.parameters())

    def loss(model: Any) -> torch.Tensor:
        def readout(x_BTD: torch.Tensor, head: Any) -> torch.Tensor:
            return linear_cross_entropy(x_BTD[0, :-1], model.lm_head.weight, tokens[0, 1:])

        return model(tokens, readout=readout)

    speed, memory = measured(model, loss)
    limit = limits["operations/s"] / (4 * size)  # 4 FLOP per parameter and token: frozen weights need no gradient
    setting = (
        f"1 × {ROW_TOKENS} tokens, bf16, {memory:.1f} GB, share of the limit = MFU at 4 FLOP a parameter and token"
    )
    name = f"LoRA r 16 training of Mistral-7B's shape{', blocks recomputed' * recompute}"
    del model
    torch.cuda.empty_cache()
    try:
        from peft import LoraConfig, get_peft_model

        theirs = transformers_7b()
    except ImportError:
        return [Row(name, speed, limit, "products alone at this device's rate", "tok/s", setting, limit)]
    theirs = get_peft_model(theirs, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    if recompute:
        theirs.gradient_checkpointing_enable()
        theirs.enable_input_require_grads()
    peers, more = measured(theirs, lambda model: model(input_ids=tokens, labels=tokens).loss)
    return [Row(name, speed, peers, f"peft ({more:.1f} GB)", "tok/s", setting, limit)]


# ---- the run ------------------------------------------------------------------------------------------------------


def sections(limits: dict[str, float]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, function that returns rows or a proof of correctness), the most important first."""
    yield from whole_model(limits)
    for name in LAYERS:
        for kind, rank, rows in (("bf16", 16, 1), ("int4", 16, 1), ("bf16", 0, 1), ("int4", 0, 1), ("bf16", 16, 8)):
            yield f"{name}, {kind}, rank {rank}", partial(kernel_rows, limits, name, kind, rank, rows)
    for case in cases(BF16):
        if case.kernel in ("tree_attention", "rms_norm", "swiglu"):
            yield case.name, partial(attention_rows, case)
    for prepared in (True, False) if (INPUTS / "tokens.json").is_file() else (False,):
        yield f"extraction, prepared {prepared}", partial(extraction_rows, prepared)
    for recompute in (False, True):
        yield f"training, recompute {recompute}", partial(training_rows, limits, recompute)
    for dtype in (BF16, torch.float16, torch.float32):
        for case in cases(dtype):
            yield f"correct: {case.name}", partial(verify, case)
