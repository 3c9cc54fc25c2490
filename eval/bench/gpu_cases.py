"""The cases of `eval.bench gpu`: whole models, each kernel, extraction, training, correctness.

Unless a row says otherwise, launches are timed inside CUDA graphs over inputs that together exceed L2. Limits are what
this device reaches in the same run: a read of 4 GiB, a GEMM of 8192³.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from eval.bench.row import Row
from kernels.launch import captured
from kernels.proof.cases import EPS, FFN, GROUPS, HEAD, HEADS, VOCAB, WIDTH, Case, Make, cases, int4, linear

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Setup:
    """Device and sizes of the benchmark: by default Mistral-7B's shape on a GPU. Tests pass small ones on a CPU."""

    device: str = "cuda"
    # the model
    width: int = WIDTH
    ffn: int = FFN
    vocab: int = VOCAB
    heads: int = HEADS
    groups: int = GROUPS
    head: int = HEAD
    depth: int = 32
    # whole-model decoding
    batches: tuple[int, ...] = (1, 8, 64)
    held: int = 512  # tokens of context
    slots: int = 1024
    # extraction; random notes unless `inputs` was written by --prepare: a base as safetensors, and token ids of notes
    inputs: Path = Path("runs/gpu-inputs")
    notes: int = 32
    note_tokens: int = 400
    questions: int = 9
    question_tokens: int = 20
    new_tokens: int = 12
    # training
    row_tokens: int = 2048
    # measuring
    repeats: int = 5  # at least
    read_numbers: int = 2**30  # of fp32, to measure the read rate
    gemm_size: int = 8192
    kernel_cases: Callable[[torch.dtype], list[Case]] = cases

    def layers(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """The linear layers of a block that share an input: (output widths, input width)."""
        q, kv = self.heads * self.head, self.groups * self.head
        return {
            "q, k, v": ((q, kv, kv), self.width),
            "o": ((self.width,), q),
            "gate, up": ((self.ffn, self.ffn), self.width),
            "down": ((self.width,), self.ffn),
        }


def seconds(setup: Setup, call: Callable[[], Any], budget: float = 0.3) -> float:
    """Median time of a call on the device."""
    times: list[float] = []
    call()
    while sum(times) < budget or len(times) < setup.repeats:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[len(times) // 2]


def us(setup: Setup, build: Callable[[], Callable[[], Any]], bytes_: int) -> float:
    """Microseconds of a call in a CUDA graph that cycles through enough copies of its inputs (of `bytes_` each) to
    exceed L2."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    functions = [build() for _ in range(min(max(2, -(-3 * cache // bytes_)), 64))]
    return seconds(setup, captured(functions).replay) / len(functions) * 1e6


def reached(setup: Setup) -> dict[str, float]:
    """The rates that this device reaches: bytes/s of a read, operations/s of a bf16 GEMM."""
    big = torch.ones(setup.read_numbers, dtype=torch.float32, device=setup.device)
    size = setup.gemm_size
    a, b = (torch.randn(size, size, device=setup.device, dtype=BF16) for _ in range(2))
    return {
        "bytes/s": big.nbytes / seconds(setup, big.sum),
        "operations/s": 2 * size**3 / seconds(setup, lambda: a @ b),
    }


def flat(out: Any) -> list[torch.Tensor]:
    return [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if t is not None]


def rms_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.detach().double() - truth.detach()).pow(2).mean().sqrt())


def verify(case: Case, device: str = "cuda") -> dict[str, Any]:
    """RMS error of ours and of PyTorch against fp64, of the worst output; right if ours ≤ 2 × PyTorch's for each.

    The device's sqrt, division and exp2 are approximate (2 ulp in PTX's documentation), which matters in fp32: if
    PyTorch happens to be closer, an error of four such operations (8 ulp of the largest value) is accepted.
    """
    torch.manual_seed(0)
    ours, plain, truth = case.build(Make(device, case.dtype))
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
def in_bf16(device: str) -> Iterator[None]:
    """Create tensors in bf16 on the device; creating a 7B in fp32 or on the host would take minutes."""
    torch.set_default_dtype(BF16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def model_shape(setup: Setup) -> dict[str, Any]:
    """The model's sizes, with the keys of config.json."""
    return {
        "hidden_size": setup.width,
        "intermediate_size": setup.ffn,
        "num_hidden_layers": setup.depth,
        "num_attention_heads": setup.heads,
        "num_key_value_heads": setup.groups,
        "head_dim": setup.head,
        "vocab_size": setup.vocab,
    }


def random_model(setup: Setup, rank: int = 0, dropout: float = 0.0) -> Any:
    """A Mistral of the setup's shape with random bf16 weights on the device, and adapters if `rank` > 0."""
    from lora import LoRAConfig, add_lora
    from model import ModelConfig, Transformer

    more = {"rms_norm_eps": EPS, "rope_theta": 10000.0, "sliding_window": 4096, "max_position_embeddings": 32768}
    config = ModelConfig.from_dict({"model_type": "mistral", **model_shape(setup), **more})
    with in_bf16(setup.device):
        model = Transformer(config).requires_grad_(False).eval()
    for weight in model.parameters():
        weight.normal_(0, 0.02) if weight.dim() > 1 else weight.fill_(1)
    if rank:
        add_lora(model, LoRAConfig(r=rank, alpha=2 * rank, dropout=dropout, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = (torch.randn_like(parameter.data, dtype=torch.float32) * 0.02).to(BF16)
    return model


def gemms_alone(setup: Setup, model: Any, batch: int) -> float:
    """Tokens per second of the model's GEMMs alone, by `torch.mm`: the peer of the decode rows."""
    weights = [p for p in model.parameters() if p.dim() == 2 and min(p.shape) >= 1024]
    weights = [w for w in weights if w is not model.model.embed_tokens.weight]
    x = {w.shape[1]: torch.randn(batch, w.shape[1], device=setup.device, dtype=BF16) for w in weights}
    return batch / seconds(setup, captured([partial(torch.mm, x[w.shape[1]], w.t()) for w in weights]).replay)


@torch.inference_mode()
def decode_speeds(setup: Setup, model: Any, batch: int) -> tuple[float, float]:
    """Tokens per second (in a CUDA graph, eager) of a fused model's decode step after `held` tokens."""
    from infer.engine.compiled import decode_step, slots
    from infer.engine.forward import Engine

    engine = Engine(model)
    step, (keys, values) = decode_step(engine, setup.slots), slots(engine, batch, setup.slots)
    tokens = torch.zeros(batch, dtype=torch.int64, device=setup.device)
    position = torch.full_like(tokens, setup.held)

    def call() -> torch.Tensor:
        return engine.logits(step(tokens, position, keys, values))

    return batch / seconds(setup, captured([call]).replay), batch / seconds(setup, call)


def transformers_model(setup: Setup) -> Any:
    """transformers' model of the same shape with random bf16 weights on the device. Raises ImportError without it."""
    from transformers import MistralConfig, MistralForCausalLM

    with in_bf16(setup.device):
        return MistralForCausalLM(MistralConfig(**model_shape(setup), sliding_window=None))


@torch.inference_mode()
def transformers_speed(setup: Setup, batch: int) -> float:
    """Tokens per second of transformers' Mistral with a static cache, compiled."""
    from transformers import StaticCache

    model = transformers_model(setup).eval()
    cache = StaticCache(config=model.config, max_cache_len=setup.slots)
    model(torch.zeros(batch, setup.held, dtype=torch.int64, device=setup.device), past_key_values=cache)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=setup.device)
    place = torch.tensor([setup.held], device=setup.device)
    return batch / seconds(setup, lambda: step(token, past_key_values=cache, cache_position=place))


class Models:
    """Caches the 7B model on the device, one at a time, and the rates of its bare GEMMs, which are the peers of the
    int4 rows too."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.key: tuple[int, str] | None = None
        self.model: Any = None
        self.alone: dict[int, float] = {}

    def fused(self, rank: int, form: str) -> Any:
        from infer.engine.fuse import fuse

        if self.key != (rank, form):
            if self.key != (rank, "bf16"):
                self.model = None
                torch.cuda.empty_cache()
                self.model = fuse(random_model(self.setup, rank))
            if form == "int4":
                self.model = fuse(self.model, four_bit=True)
            self.key = rank, form
        return self.model


def decode_rows(models: Models, limits: dict[str, float], rank: int, form: str, batch: int) -> list[Row]:
    setup, model = models.setup, models.fused(rank, form)
    if form == "bf16" and batch not in models.alone:
        models.alone[batch] = gemms_alone(setup, model, batch)
    graph, eager = decode_speeds(setup, model, batch)
    read = sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) - model.model.embed_tokens.weight.nbytes
    name = f"Mistral-7B decode, {form}{', LoRA r 16 unmerged' * bool(rank)}, batch {batch}"
    setting, limit = f"{setup.held} tokens of context, random weights", batch * limits["bytes/s"] / read
    return [
        Row(name, graph, models.alone.get(batch), "bare torch.mm of the bf16 weights", "tok/s", setting, limit),
        Row(name, graph, eager, "the same without a graph", "tok/s", setting, limit),
    ]


def transformers_rows(models: Models) -> list[Row]:
    setup = models.setup
    graph, _ = decode_speeds(setup, models.fused(0, "bf16"), 1)
    peer = transformers_speed(setup, 1)
    name = "Mistral-7B decode, bf16, batch 1"
    return [Row(name, graph, peer, "transformers, static cache, compiled", "tok/s", f"{setup.held} tokens of context")]


def whole_model(setup: Setup, limits: dict[str, float]) -> Iterator[tuple[str, Callable[[], Any]]]:
    models = Models(setup)
    for rank in (0, 16):
        for form in ("bf16", "int4"):
            for batch in setup.batches:
                name = f"whole model, rank {rank}, {form}, batch {batch}"
                yield name, partial(decode_rows, models, limits, rank, form, batch)
    yield "whole model, transformers", partial(transformers_rows, models)


# ---- (b) each decode kernel ---------------------------------------------------------------------------------------


def layer_bytes(sizes: tuple[int, ...], width: int, bits: float) -> int:
    return int(sum(sizes) * width * bits / 8)


def kernel_rows(setup: Setup, limits: dict[str, float], name: str, kind: str, rank: int, rows: int) -> list[Row]:
    """One linear layer of a block against F.linear, and torch.compile or torch's packed int4."""
    sizes, width = setup.layers()[name]
    make, normed, gated = Make(setup.device, BF16), name in ("q, k, v", "gate, up"), name == "gate, up"
    given: dict[str, Any] = dict(rows=rows, sizes=sizes, rank=rank, normed=normed, gated=gated, width=width)
    case = partial(linear, make, **given) if kind == "bf16" else partial(int4, make, group=64, **given)
    bits = 16.0 if kind == "bf16" else 4.5
    bytes_ = layer_bytes(sizes, width, bits) + 2 * rank * (width * len(sizes) + sum(sizes))
    limit = bytes_ / limits["bytes/s"] * 1e6
    ours = us(setup, lambda: case()[0], bytes_)
    label, setting = f"{name}, {kind}, rank {rank}, {rows} rows", "bf16, Mistral-7B's shapes, graph"

    def plain() -> Callable[[], Any]:
        x = make.normal(rows, width)
        weights = [make.normal(size, width) for size in sizes]
        return lambda: [F.linear(x, w) for w in weights]

    peers = {"F.linear in bf16, no norm, no adapter": us(setup, plain, layer_bytes(sizes, width, 16.0))}
    if kind == "bf16":
        torch._dynamo.reset()
        compiled = torch.compile(linear(make, **given)[1])
        peers["torch.compile (one set of inputs)"] = us(setup, lambda: compiled, 2**40)
    else:
        packed = partial(torch_int4, make, rows, sizes, width)
        peers["torch's packed int4, no norm, no adapter"] = us(setup, packed, bytes_)
    return [Row(label, ours, taken, peer, "us", setting, limit) for peer, taken in peers.items()]


def torch_int4(make: Make, rows: int, sizes: tuple[int, ...], width: int) -> Callable[[], Any]:
    x = make.normal(rows, width)
    weights = []
    for size in sizes:
        codes = make.integers(0, 256, size, width // 2).to(torch.uint8)
        weights.append((torch._convert_weight_to_int4pack(codes, 8), make.normal(width // 64, size, 2)))
    return lambda: [torch._weight_int4pack_mm(x, words, 64, steps) for words, steps in weights]


def attention_rows(setup: Setup, case: Case) -> list[Row]:
    ours, plain, _ = case.build(Make(setup.device, BF16))
    a, b = (us(setup, partial(lambda f: f, f), 2**40) for f in (ours, plain))
    return [Row(case.name, a, b, "eager PyTorch", "us", "bf16, inputs in L2")]


# ---- (c) extraction -----------------------------------------------------------------------------------------------


class Ids:
    """Replaces a tokenizer: prompts are token ids and the generated texts are not used."""

    stop_ids: frozenset[int] = frozenset()
    vocab_size = 0

    def decode(self, ids: list[int]) -> str:
        return ""


def extraction_rows(setup: Setup, prepared: bool) -> list[Row]:
    """Notes per hour with nine questions each and `new_tokens` tokens per answer: the base and notes of `inputs` if
    `prepared`, else a 7B and notes of random tokens."""
    from infer.engine.fuse import fuse
    from infer.engine.generate import Generator
    from model import Transformer

    if prepared:
        name, model = "the prepared base", Transformer.from_pretrained(setup.inputs, dtype=BF16, device=setup.device)
        inputs = json.loads((setup.inputs / "tokens.json").read_text())
    else:
        name, model = "Mistral-7B's shape", random_model(setup)
        drawn = torch.Generator().manual_seed(0)
        sizes = {
            "notes": (setup.notes, setup.note_tokens),
            "questions": (setup.questions, setup.question_tokens),
        }
        inputs = {key: torch.randint(3, setup.vocab, size, generator=drawn).tolist() for key, size in sizes.items()}
    generator = Generator(fuse(model.requires_grad_(False).eval()), Ids(), lookup=False)  # type: ignore[arg-type]
    generator.stop_ids = frozenset()  # every answer has `new_tokens` tokens
    prompts = [note + question for note in inputs["notes"] for question in inputs["questions"]]
    generator.generate(prompts[: 2 * len(inputs["questions"])], max_new_tokens=setup.new_tokens)  # compiles
    began = time.perf_counter()
    generator.generate(prompts, max_new_tokens=setup.new_tokens)  # returns Python lists, so it has synchronized
    speed = len(inputs["notes"]) / (time.perf_counter() - began) * 3600
    tokens = sum(map(len, inputs["notes"])) / len(inputs["notes"])
    setting = f"{len(inputs['notes'])} notes of {tokens:.0f} tokens, {setup.new_tokens} new a question, bf16, eager"
    return [Row(f"extraction, {name}", speed, None, None, "notes/h", setting)]


# ---- (d) training -------------------------------------------------------------------------------------------------


def training_speed(setup: Setup, model: Any, tokens: int, loss: Callable[[Any], torch.Tensor]) -> tuple[float, float]:
    """(tokens per second of forward and backward, peak memory in GB)."""
    torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        loss(model).backward()
        model.zero_grad(set_to_none=True)

    return tokens / seconds(setup, step, 2.0), torch.cuda.max_memory_allocated() / 1e9


def trainable(model: Any) -> Any:
    """The model with trainable adapters and frozen weights, in training mode."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model.train()


def training_limit(model: Any, limits: dict[str, float]) -> float:
    """Tokens per second at the GEMMs' rate, 4 FLOP per parameter and token: frozen weights need no gradient."""
    return limits["operations/s"] / (4 * sum(p.numel() for p in model.parameters()))


def recipe_rows(setup: Setup, limits: dict[str, float]) -> list[Row]:
    """The paper's recipe on the training blocks (train/fast): LoRA r 16 with dropout on a frozen 7B, three notes with
    their questions packed into a row, whose attention is FlexAttention."""
    import numpy as np

    from lora import DropoutPlan
    from lora.adapter import adapted
    from train.data import rows as data
    from train.fast.block import fast_blocks, join_weights
    from train.loss import batch_loss

    rng, asked = np.random.default_rng(0), [setup.question_tokens, setup.new_tokens] * setup.questions
    notes = [[rng.integers(0, setup.vocab, n) for n in (setup.note_tokens, *asked)] for _ in range(3)]
    row = data.Row(tuple(data.note_document(str(n), pieces) for n, pieces in enumerate(notes)))
    batch, counts = data.collate([row]).to(torch.device(setup.device)), data.count([row])
    model = fast_blocks(trainable(random_model(setup, 16, dropout=0.05)))
    join_weights(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    plan = DropoutPlan()
    plan.begin(0, batch.branches)
    for layer in adapted(model).values():
        layer.plan = plan
    speed, memory = training_speed(setup, model, len(row), lambda model: batch_loss(model, batch, counts)[0])
    limit = training_limit(model, limits)
    setting = f"three notes, {len(row)} tokens in a row, bf16, dropout 0.05, {memory:.1f} GB"
    name = "LoRA r 16 training of Mistral-7B's shape by train/fast"
    return [Row(name, speed, limit, "products alone at this device's rate", "tok/s", setting, limit)]


def training_rows(setup: Setup, limits: dict[str, float], recompute: bool) -> list[Row]:
    """LoRA r 16 on a frozen 7B with `--fuse`: tokens per second of forward and backward, and memory, against peft if
    installed."""
    from infer.engine.fuse import fuse
    from kernels import linear_cross_entropy

    tokens = torch.randint(0, setup.vocab, (1, setup.row_tokens), device=setup.device)
    model = fuse(trainable(random_model(setup, 16)))
    model.model.checkpoint_blocks = recompute

    def loss(model: Any) -> torch.Tensor:
        def readout(x_BTD: torch.Tensor, head: Any) -> torch.Tensor:
            return linear_cross_entropy(x_BTD[0, :-1], model.lm_head.weight, tokens[0, 1:])

        return model(tokens, readout=readout)

    speed, memory = training_speed(setup, model, setup.row_tokens, loss)
    limit = training_limit(model, limits)
    setting = (
        f"1 × {setup.row_tokens} tokens, bf16, {memory:.1f} GB, "
        "share of the limit = MFU at 4 FLOP a parameter and token"
    )
    name = f"LoRA r 16 training of Mistral-7B's shape{', blocks recomputed' * recompute}"
    del model
    torch.cuda.empty_cache()
    try:
        from peft import LoraConfig, get_peft_model

        theirs = transformers_model(setup)
    except ImportError:
        return [Row(name, speed, limit, "products alone at this device's rate", "tok/s", setting, limit)]
    theirs = get_peft_model(theirs, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    if recompute:
        theirs.gradient_checkpointing_enable()
        theirs.enable_input_require_grads()
    peers, more = training_speed(
        setup, theirs, setup.row_tokens, lambda model: model(input_ids=tokens, labels=tokens).loss
    )
    return [Row(name, speed, peers, f"peft ({more:.1f} GB)", "tok/s", setting, limit)]


# ---- the run ------------------------------------------------------------------------------------------------------


def sections(setup: Setup, limits: dict[str, float]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, function that returns rows or a proof of correctness), the most important first."""
    yield from whole_model(setup, limits)
    for name in setup.layers():
        for kind, rank, rows in (("bf16", 16, 1), ("int4", 16, 1), ("bf16", 0, 1), ("int4", 0, 1), ("bf16", 16, 8)):
            yield f"{name}, {kind}, rank {rank}", partial(kernel_rows, setup, limits, name, kind, rank, rows)
    for case in setup.kernel_cases(BF16):
        if case.kernel in ("tree_attention", "rms_norm", "swiglu"):
            yield case.name, partial(attention_rows, setup, case)
    for prepared in (True, False) if (setup.inputs / "tokens.json").is_file() else (False,):
        yield f"extraction, prepared {prepared}", partial(extraction_rows, setup, prepared)
    for recompute in (False, True):
        yield f"training, recompute {recompute}", partial(training_rows, setup, limits, recompute)
    yield "training by the recipe", partial(recipe_rows, setup, limits)
    for dtype in (BF16, torch.float16, torch.float32):
        for case in setup.kernel_cases(dtype):
            yield f"correct: {case.name}", partial(verify, case, setup.device)
