"""Predicts the time of an extraction job of 100,000 notes on a 7B model, by simulating its schedule with measured step
times.

    python -m eval.bench job --plan            synthetic notes, Mistral-7B's shape, this machine's device
    python -m eval.bench job --weights DIR     a model's own shape; also runs the same notes, to compare

The times to prefill N tokens and to decode a step of N rows are measured on one and two layers of the shape with random
weights, which fit in any memory, and extrapolated to all layers. Then the real job (infer/extract: prompts, grammars,
offsets, refilling of the batch) runs without the model: the answers are the annotated ones, and a clock advances by the
measured times. Host time is the CPU time of this simulation, without the encoding thread, which overlaps the device.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from eval.bench.row import Row
from eval.bench.seven_b import SHAPE, write_tokenizer
from infer import tasks
from infer.engine.cache import Cache
from infer.engine.forward import Engine
from infer.engine.generate import Generator, RequestBatch, State
from infer.engine.load import device_here, load
from infer.engine.tree import build_tree
from infer.extract.ask import Asker, Limits, Part, Request
from infer.extract.notes import Note
from infer.extract.schedule import Schedule, Work
from model import ModelConfig, Tokenizer, Transformer
from model.support.cli import UserError
from model.support.files import read_json
from model.support.hardware import compute_dtype, timed
from train.clinic.program import patient_notes

ROWS = (1, 9, 36, 72, 144, 288, 576)  # batch sizes of measured steps, up to that of the job
READ = (64, 512)  # numbers of tokens of measured prefills
NOTE = 256  # tokens of context in measured steps


class ForcedAnswer:
    """A constraint that allows only a known answer. It also computes the grammar's mask, for its time."""

    def __init__(self, grounded: Any, tokens: Sequence[int]) -> None:
        self.grounded, self.tokens = grounded, tokens

    def allowed(self, tokens: Sequence[int]) -> list[int]:
        self.grounded.allowed(tokens)
        return [self.tokens[len(tokens)]]


class ForcedAsker(Asker):
    """An Asker whose answers are the annotated ones. `request_batch` is a RequestBatch, or the simulated one."""

    def __init__(self, generator: Generator, gold: dict[str, dict[str, Any]], batch: int, request_batch: Any) -> None:
        super().__init__(generator, "both", "template", Limits(), "windows", grounded=True, batch=batch)
        self.gold, self.request_batch = gold, request_batch

    def requests(self, part: Part, record: dict[str, Any]) -> list[Request]:
        made, gold = [], self.gold[part.note.id]
        for (name, _), request in zip(self.questions(part.note), super().requests(part, record), strict=True):
            text = f" {gold['diagnosis']['text']} ({gold['diagnosis']['code']})"
            if name != "diagnosis":
                text = tasks.answer([value["text"] for value in gold["phenotypes"].get(name) or ()])
            tokens = [*self.tokenizer.encode(text), min(self.generator.stop_ids)]
            constraint = ForcedAnswer(request.settings.constraint, tokens)
            made.append(Request(request.prompt, replace(request.settings, constraint=constraint)))
        return made

    def results(self, works: Iterable[Work], ended: Any = lambda: None) -> list[Any]:
        return Schedule(self.request_batch, self.batch, self.max_questions, ended).results(iter(works))


class SimulatedBatch:
    """Replaces a RequestBatch: returns the forced answers and adds up the measured times that a device would take."""

    def __init__(self, generator: Generator, costs: dict[str, dict[int, float]]) -> None:
        self.generator, self.costs = generator, costs
        self.active: list[State] = []
        self.taken = {"products": 0.0, "the rest of a step": 0.0}
        self.steps = self.row_steps = 0

    def add(self, states: list[State]) -> None:
        prefixes, branches = build_tree([state.prompt for state in states])
        self._pass("read", sum(len(prefix.tokens) for prefix in prefixes))
        self._pass("read", sum(len(branch.tokens) for branch in branches))
        self._enter(states)
        self.active = [state for state in [*self.active, *states] if state.finish is None]

    def step(self) -> None:
        self._pass("step", len(self.active))
        self.steps, self.row_steps = self.steps + 1, self.row_steps + len(self.active)
        self._enter(self.active)
        self.active = [state for state in self.active if state.finish is None]

    def _pass(self, kind: str, size: int) -> None:
        products = between(self.costs[f"{kind} products"], size)
        self.taken["products"] += products
        self.taken["the rest of a step"] += max(0.0, between(self.costs[kind], size) - products)

    def _enter(self, states: list[State]) -> None:
        for state in states:
            (token,) = state.settings.constraint.allowed(state.tokens)
            self.generator.enter(state, int(token), 0.0)


def between(costs: dict[int, float], size: int) -> float:
    """The cost of a size, interpolated between the two nearest measured sizes; below the smallest it is that of the
    smallest, which is the time to read the weights. A size of 0 costs 0."""
    sizes = sorted(costs)
    if size <= sizes[0]:
        return costs[sizes[0]] if size else 0.0
    above = next((n for n in range(1, len(sizes)) if sizes[n] >= size), len(sizes) - 1)
    one, other = sizes[above - 1], sizes[above]
    return max(0.0, costs[one] + (costs[other] - costs[one]) / (other - one) * (size - one))


def rows(plan: bool = False, weights: str = "", notes: int = 512, batch: int = 0, seconds: float = 0.3) -> list[Row]:
    """Simulated notes per hour with and without refilling; with `weights` also those of a real run.

    `plan`: simulate only. `notes` is the number of synthetic notes to simulate, `batch` that of notes at once (0: 8 on
    a CPU, 64 on a GPU). Each prefill and step is measured for `seconds`.
    """
    if plan == bool(weights):
        raise UserError("give --plan (Mistral-7B's shape), or --weights DIR to run the notes too")
    device = device_here()
    batch = batch or (8 if device == "cpu" else 64)
    dtype = compute_dtype(device)
    with tempfile.TemporaryDirectory() as folder:
        if plan:
            write_tokenizer(Path(folder))
        tokenizer = Tokenizer.from_pretrained(weights or folder)
    config = ModelConfig.from_pretrained(weights) if weights else ModelConfig.from_dict(read_json(SHAPE))
    gold = {note["id"]: note for note in clinic(notes)}
    asked = [Note(name, note["text"]) for name, note in gold.items()]
    costs = measured(config, dtype, device, batch, seconds)
    small = ModelConfig.from_dict({**read_json(SHAPE), "hidden_size": 64, "num_hidden_layers": 1, "head_dim": 2})
    small = replace(small, vocab_size=max(config.vocab_size, tokenizer.vocab_size), intermediate_size=64)
    generator = Generator(Transformer(small), tokenizer)
    found = {}
    for refilled in (True, False):
        clock = SimulatedBatch(generator, costs)
        found[refilled] = clock, simulated(ForcedAsker(generator, gold, batch, clock), asked, batch, refilled)
    (clock, host), (drained, drained_host) = found[True], found[False]
    taken = {**clock.taken, "host": host["main"]}
    total = sum(taken.values())
    shares = ", ".join(f"{name} {100 * part / total:.0f} %" for name, part in taken.items())
    name = Path(weights).name if weights else "a 7B's shape"
    setting = (
        f"{notes} notes, {batch} at once, {str(dtype).removeprefix('torch.')} on {device}: {shares}; encoding ahead "
        f"{1e3 * host['ahead'] / notes:.1f} ms a note; rows a step {clock.row_steps / clock.steps:.1f}, without "
        f"refilling {drained.row_steps / drained.steps:.1f}"
    )
    rate = 3600 * notes / total
    drained_rate = 3600 * notes / (sum(drained.taken.values()) + drained_host["main"])
    made = [Row(f"job: {name}", rate, drained_rate, "without refilling", "notes/h (simulated)", setting)]
    made.append(Row(f"job: 100,000 notes on {name}", 100_000 / rate, None, None, "hours (simulated)", setting))
    if weights:
        real = 3600 * notes / run(weights, dtype, gold, asked, batch)
        made.append(Row(f"job: {name}, run", real, rate, "simulated", "notes/h", setting))
    return made


def clinic(notes: int) -> list[dict[str, Any]]:
    """The first `notes` notes of train.clinic."""
    written = (note for number in count() for note in patient_notes("p", number, 0))
    return list(islice(written, notes))


def simulated(asker: ForcedAsker, asked: list[Note], batch: int, refilled: bool) -> dict[str, float]:
    """Run the simulation. Returns CPU seconds of the scheduling thread ("main") and of encoding ("ahead")."""
    began, all_began = time.thread_time(), time.process_time()
    for start in range(0, len(asked), len(asked) if refilled else batch):
        asker.records(asked[start : start + (len(asked) if refilled else batch)])
    main = time.thread_time() - began
    return {"main": main, "ahead": time.process_time() - all_began - main}


def run(weights: str, dtype: torch.dtype, gold: dict[str, Any], asked: list[Note], batch: int) -> float:
    """Seconds of the same job with the real model, whose answers are forced too."""
    generator = Generator(*load(weights, dtype=str(dtype).removeprefix("torch.")))
    asker = ForcedAsker(generator, gold, batch, RequestBatch(generator))
    began = time.perf_counter()
    asker.records(asked)
    return time.perf_counter() - began


@torch.inference_mode()
def measured(
    config: ModelConfig, dtype: torch.dtype, device: str, batch: int, seconds: float
) -> dict[str, dict[int, float]]:
    """Seconds by size for the full depth: "read" (prefill of N tokens), "step" (decode of N rows), and their GEMMs
    alone ("read products", "step products")."""
    sizes = [size for size in ROWS if size <= 9 * batch]
    one, two = (
        costs_of(replace(config, num_hidden_layers=n, windows=config.windows[:n]), dtype, device, sizes, seconds)
        for n in (1, 2)
    )
    layers = config.num_hidden_layers
    return {
        kind: {size: first + (layers - 1) * max(0.0, two[kind][size] - first) for size, first in sizes.items()}
        for kind, sizes in one.items()
    }


def costs_of(
    config: ModelConfig, dtype: torch.dtype, device: str, sizes: Sequence[int], seconds: float
) -> dict[str, dict[int, float]]:
    model = Transformer(config).to(dtype)
    for parameter in model.parameters():
        parameter.uniform_(-0.02, 0.02)
    engine = Engine(model.to(device).requires_grad_(False).eval())

    def best(call: Any) -> float:
        return min(timed(call, device, seconds))

    def products(tokens: int, heads: int) -> float:
        """The GEMMs of all linear layers on `tokens` rows, and of the head on `heads` rows."""
        names = [(name, p) for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
        inputs = {p.shape[1]: torch.ones(tokens, p.shape[1], dtype=dtype, device=device) for _, p in names}
        hidden_ND = torch.ones(max(1, heads), config.hidden_size, dtype=dtype, device=device)

        def call() -> None:
            for _, p in names:
                F.linear(inputs[p.shape[1]], p)
            if heads:
                engine.logits(hidden_ND)

        return best(call)

    def step(size: int) -> float:
        """A decode step with `size` rows, nine per note."""
        prompts = [[1 + n % 99, *range(100, 99 + NOTE), 700 + q] for n in range(-(-size // 9)) for q in range(9)]
        cache = Cache(engine, *build_tree(prompts[:size]))
        tokens_B1 = torch.ones(size, 1, dtype=torch.int64, device=device)
        one_B = torch.ones(size, dtype=torch.int64)
        return best(lambda: engine.logits(cache.step(tokens_B1, one_B)[:, 0]).argmax(-1).tolist())

    prompts = {size: [[*range(100, 100 + size), q] for q in range(2)] for size in READ}
    return {
        "read": {size: best(lambda size=size: Cache(engine, *build_tree(prompts[size]))) for size in READ},
        "read products": {size: products(size, 0) for size in READ},
        "step": {size: step(size) for size in sizes},
        "step products": {size: products(size, size) for size in sizes},
    }
