"""LoRA training on a CPU against transformers + peft: speed, memory and MFU with the same weights and rows in the same
order. For a GPU see `eval.bench gpu`.

Each side runs in its own process, in turns, a step at a time, and all must start with the same loss: 56M parameters (or
--size smollm2), eager, in fp32 or with --dtype bfloat16 (adapters and optimizer stay fp32), all rows of a step in one
pass (micro_rows).

"plain": rows of full length, every token a target; ours also a row at a time, and with dropout. "records": notes of 400
tokens with eight questions of 40; peft trains eight rows per note, ours one row with branches, or also eight rows;
compared in records per second. The limit of a speed is the measured GEMM rate, so its share is the MFU.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from eval.bench.process import own_process, resident
from eval.bench.row import Row
from lora import DropoutPlan
from lora.adapter import adapted
from model import ModelConfig, Transformer
from model.support.cli import UserError
from model.support.hardware import product_rate
from model.support.init import init_weights
from train.data import rows as data
from train.data.rows import collate, count
from train.distributed.sharding import Ranks
from train.loss import batch_loss
from train.optim.optimizer import make_optimizers
from train.recipe import Recipe
from train.report.plan import Load, arithmetic
from train.session import empty_model, load_model

SHAPES = {
    "tiny": (256, 64, 128, 2, 4, 2, 2, 64),
    "56m": (8192, 512, 1536, 14, 8, 4, 4, 512),
    "smollm2": (49152, 576, 1536, 30, 9, 3, 4, 512),
}  # vocabulary, width, feed-forward, layers, heads, key/value heads, rows, tokens per row
QUESTIONS = 8
DROPOUT = 0.05
ALONE, APART, DROPPED = "ours, a row at a time", "ours, eight separate rows", f"ours, dropout {DROPOUT}"
SIDES = {"plain": ("peft", "ours", ALONE, DROPPED), "records": ("peft", "ours", APART)}
Step = Callable[[], Any]  # one optimizer step; returns its loss


def rows(
    size: str = "56m",
    steps: int = 5,
    r: int = 16,
    base: Literal["", "nf4"] = "",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> list[Row]:
    """Speed, memory and MFU on plain rows and on records. `size`: tiny, 56m or smollm2; `base`: quantized or not."""
    if size not in SHAPES:
        raise UserError(f"--size {size}; it is one of {', '.join(SHAPES)}")
    made = []
    with tempfile.TemporaryDirectory() as folder:
        save_base(size, Path(folder))
        how = {"size": size, "r": r, "folder": folder, "base": base, "dtype": dtype, "threads": torch.get_num_threads()}
        for kind in SIDES:
            made += compared(in_turns(kind, steps, **how), {**how, "kind": kind, "steps": steps})
    return made


def compared(found: dict[str, dict[str, float]], asked: dict[str, Any]) -> list[Row]:
    """The rows of one kind: ours against each of the other sides. Raises RuntimeError if the first losses differ."""
    ours, peft, kind = found["ours"], found["peft"], asked["kind"]
    tolerance = 0.05 if asked["base"] else 1e-3 if asked["dtype"] == "float32" else 1e-2
    if abs(ours["loss"] - peft["loss"]) > tolerance * peft["loss"]:
        raise RuntimeError(
            f"{kind}: ours starts at a loss of {ours['loss']}, peft at {peft['loss']}: not the same work"
        )
    base = f", {asked['base']} base" if asked["base"] else ""
    setting = (
        f"{asked['size']}{base}, {asked['dtype']}, r {asked['r']}, "
        f"best of {asked['steps']} steps after 1, in turns, {asked['threads']} threads; "
        f"first loss {ours['loss']:.4f}, peft's {peft['loss']:.4f}"
    )
    unit = "tok/s" if kind == "plain" else "records/s"

    def row(name: str, unit: str, key: str, peer: str, limit: float | None = None) -> Row:
        title = "transformers + peft" if peer == "peft" else peer
        return Row(f"{kind}{base}: {name}", ours[key], found[peer][key], title, unit, setting, limit)

    made = [row("speed", unit, "speed", "peft", ours["limit"])]
    made += [row("speed", unit, "speed", who) for who in found if who not in ("ours", "peft")]
    made.append(row("memory", "MB over the process before the model", "memory", "peft"))
    if kind == "plain":
        made.append(row("MFU", f"share of {ours['peak'] / 1e9:,.0f} GFLOP/s", "mfu", "peft"))
    return made


def config_of(size: str) -> ModelConfig:
    V, D, F, L, H, G, _, _ = SHAPES[size]
    return ModelConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=D // H,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        windows=(None,) * L,
        max_position_embeddings=2048,
    )


def save_base(size: str, folder: Path) -> None:
    """Write a checkpoint of random weights."""
    init_weights(Transformer(config_of(size)), 0).save_pretrained(folder)


def units(kind: str, size: str, share: bool) -> list[Any]:
    """The training rows of one step, of seeded random tokens. `share`: a note's questions share one row."""
    V, *_, texts, length = SHAPES[size]
    rng = np.random.default_rng(0)
    if kind == "plain":
        drawn = [rng.integers(0, V, length + 1) for _ in range(texts)]
        return [data.Row((data.text_documents(str(i), one, length)[0],)) for i, one in enumerate(drawn)]
    note = 400 if length >= 400 else length
    pieces = [rng.integers(0, V, note), *(rng.integers(0, V, n) for _ in range(QUESTIONS) for n in (20, 20))]
    documents = [data.note_document("0", pieces)] if share else data.question_documents("0", pieces)
    return [data.Row((document,)) for document in documents]


@dataclass
class Side:
    """What one side's process holds while it is measured."""

    advance: Step
    tokens: int
    flops: float
    dtype: torch.dtype
    before: float  # MB


HELD: list[Side] = []  # in a side's own process: the side


def start(who: str, kind: str, size: str, r: int, folder: str, base: str, dtype: str, threads: int) -> float:
    """Prepares one side in this process and takes its first step; returns the loss."""
    torch.set_num_threads(threads)
    recipe: dict[str, Any] = {"r": r, "alpha": 2.0 * r, "dtype": dtype, "base": base}
    batch = units(kind, size, share=who not in ("peft", APART))
    if who == "peft":
        import_module("peft")  # before `before`, so that the import does not count as training memory
    warm_up()
    flops, before = step_flops(batch, size, recipe), resident()
    if who == "peft":
        advance = peft_step(batch, config_of(size), folder, recipe)
    else:
        drop = {"dropout": DROPOUT} if who == DROPPED else {}
        advance = our_step(batch, config_of(size), folder, recipe | drop, 1 if who == ALONE else len(batch))
    HELD[:] = [Side(advance, sum(map(len, batch)), flops, getattr(torch, dtype), before)]
    return float(advance())


def timed_step() -> float:
    """Seconds of one step of this process's side."""
    began = time.perf_counter()
    HELD[0].advance()
    return time.perf_counter() - began


def figures(kind: str, seconds: float) -> dict[str, float]:
    """Speed, memory and MFU of this process's side, whose fastest step took `seconds`."""
    (side,) = HELD
    memory, peak = resident(peak=True) - side.before, product_rate(side.dtype) * 1e9  # which needs memory itself
    rate = side.flops / seconds
    speed = (side.tokens if kind == "plain" else 1) / seconds
    return {"speed": speed, "memory": memory, "peak": peak, "limit": speed * peak / rate, "mfu": rate / peak}


def in_turns(kind: str, steps: int, **how: Any) -> dict[str, dict[str, float]]:
    """The figures of each side, in a process of its own. The sides' steps take turns, so that other load affects all
    alike."""
    with ExitStack() as stack:
        own = {who: stack.enter_context(own_process()) for who in SIDES[kind]}
        losses = {who: one.submit(start, who, kind, **how).result() for who, one in own.items()}
        rounds = [{who: one.submit(timed_step).result() for who, one in own.items()} for _ in range(steps)]
        fastest = {who: min(taken[who] for taken in rounds) for who in own}
        return {
            who: {"loss": losses[who], **one.submit(figures, kind, fastest[who]).result()} for who, one in own.items()
        }


def step_flops(batch: list[Any], size: str, recipe: dict[str, Any]) -> float:
    """Floating-point operations of a step on these rows (train/report/plan.py)."""
    tokens = sum(map(len, batch))
    load = Load(
        tokens,
        sum(count(batch).values()),
        max(map(len, batch)),
        len(batch),
        sum(row.pairs() for row in batch) / tokens,
        "",
    )
    return arithmetic(config_of(size), Recipe(data=("-",), out="-", weights="-", **recipe), load)


def warm_up() -> None:
    """Run one optimizer step, whose lazy imports would otherwise count as training memory."""
    warm = torch.nn.Linear(2, 2)
    warm(torch.ones(1, 2)).sum().backward()
    torch.optim.AdamW(warm.parameters()).step()


def our_step(rows: list[Any], config: ModelConfig, folder: str, recipe: dict[str, Any], micro_rows: int) -> Step:
    options = Recipe(data=("-",), out="-", weights=folder, learning_rate=1e-4, **recipe)
    model, _ = load_model(options, config, Ranks(), empty_model(options, config))
    (optimizer,), counts = make_optimizers(model.train(), options), count(rows)
    plan = DropoutPlan()
    for layer in adapted(model).values():
        layer.plan = plan

    def advance() -> Any:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for start in range(0, len(rows), micro_rows):
            batch = collate(rows[start : start + micro_rows])
            plan.begin(0, batch.branches)
            loss, _ = batch_loss(model, batch, counts)
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        return total

    return advance


def peft_step(rows: list[Any], config: ModelConfig, folder: str, recipe: dict[str, Any]) -> Step:
    import peft
    import transformers

    quantized = {}
    if recipe["base"] == "nf4":
        quantized["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=recipe["dtype"], **quantized)
    adapter = peft.LoraConfig(
        r=recipe["r"], lora_alpha=recipe["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model.train(), adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = collate(rows)

    def advance() -> Any:
        optimizer.zero_grad(set_to_none=True)
        # targets are shifted already
        loss = model(input_ids=batch.tokens, labels=batch.target, shift_labels=batch.target).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return advance
