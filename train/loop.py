"""The training loop: both stages, LoRA or full, on one process or under torchrun.

One optimizer step:

1. The step's rows are a function of (seed, step), so nothing about the data has to be saved for a resume.
2. Rows are sorted by length and cut into micro-batches; of R ranks each takes every R-th one.
3. Gradients accumulate over micro-batches and are summed over ranks.
4. Gradient norm, clipping, optimizer step.

loss.py derives why the loss does not depend on the split; distributed/checkpoint.py makes a resume exact to the bit;
distributed/sharding.py shards the model.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lora import DropoutPlan
from lora.adapter import adapted
from lora.peft import adapter_state
from model.support.cli import UserError, on_sigterm
from model.support.files import write_text
from model.transformer import Transformer
from train.data.dataset import Rows, read_ahead
from train.data.rows import ANSWER, Batch, Row, collate, count, order
from train.distributed.checkpoint import (
    Progress,
    newest_intact,
    prune,
    restore,
    save_checkpoint,
    snapshot,
    step_of,
    steps_saved,
)
from train.distributed.sharding import Ranks, add_gradients, sum_over_ranks
from train.loss import batch_loss
from train.optim.optimizer import make_optimizers, named_trainable, rate
from train.recipe import Recipe


@dataclass
class Trainer:
    """One training run. `run()` is the loop; `gradients(step)` and `update(step, norm)` make one step of it."""

    recipe: Recipe
    model: Transformer
    rows: Rows
    valid: Rows | None
    ranks: Ranks
    identity: dict[str, Any]  # what the run's numbers depend on (session.identity); a resume compares it
    base: str = ""  # path of the base weights, for adapter_config.json
    progress: Progress = field(default_factory=Progress)
    done: Counter[str] = field(default_factory=Counter)  # by this process: steps, tokens, targets, attention pairs
    seconds: float = 0.0  # spent in the loop by this process
    log_seconds: float = 60.0  # between two progress lines where stderr is not a terminal

    def __post_init__(self) -> None:
        self.out = Path(self.recipe.out)
        self.device = self.ranks.device
        self.steps = self.recipe.steps_of(len(self.rows))
        self.optimizers = make_optimizers(self.model, self.recipe)
        self.prepared = read_ahead(self.prepare)
        self.plan = DropoutPlan(seed=self.recipe.seed)
        for layer in adapted(self.model).values():
            layer.plan = self.plan
        if self.recipe.compile:
            for block in self.model.model.layers:  # not the loss: its number of targets differs from step to step
                block.compile()
        self.stopping = False  # set by SIGTERM
        self.saved: int | None = None  # step of the checkpoint last written or resumed from
        self.stale: list[Path] = []  # checkpoints of an abandoned run, to be deleted after the next save

    # the loop

    def run(self) -> None:
        """Train to the last step, from the newest intact checkpoint if there is one."""
        with on_sigterm(self.stop):
            self.resume()
            self.truncate_metrics()
            display = ProgressDisplay(self)
            started = time.monotonic()
            while self.progress.step < self.steps:
                step = self.progress.step
                loss, norm, tokens = self.gradients(step)
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise UserError(self.bad_step(step, loss, norm))
                learning_rate = self.update(step, norm)
                self.progress.step += 1
                self.progress.tokens += tokens
                self.seconds = time.monotonic() - started
                self.record(loss, norm, learning_rate)
                display.update(self.progress.step, loss, self.done["tokens"] / self.seconds)
                if self.ranks.any(self.stopping):
                    self.save()
                    display.stopped(self.progress.step)
                    raise SystemExit(0)
                is_best = self.recipe.save_every > 0 and self.progress.best_step == self.progress.step
                if is_best or self.due(self.recipe.save_every):
                    self.save()
            display.close()
            self.save()

    def due(self, every: int) -> bool:
        """True every `every` steps, but not at the last one (0: never)."""
        return every > 0 and self.progress.step % every == 0 and self.progress.step < self.steps

    def stop(self, *_: object) -> None:
        """Handles SIGTERM: the run finishes its step, saves and exits."""
        self.stopping = True

    # one step

    def micro_batches(self, rows: list[Row]) -> tuple[list[list[Row]], list[list[Row]]]:
        """(all micro-batches of these rows, this rank's). The split into micro-batches does not depend on the ranks.

        Every rank gets the same number, padded with empty rows: FSDP's collectives must be called equally often.
        """
        size = self.recipe.micro_rows
        by_length = sorted(rows, key=len, reverse=True)
        parts = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        rounds = math.ceil(len(parts) / self.ranks.world)
        mine = [
            parts[i] if i < len(parts) else [Row(())]
            for i in range(self.ranks.rank, rounds * self.ranks.world, self.ranks.world)
        ]
        return parts, mine

    def prepare(self, step: int) -> tuple[list[Row], list[Batch]]:
        """(the step's rows on all ranks, this rank's micro-batches)."""
        rows = [self.rows[i] for i in order(self.recipe.seed, step, len(self.rows), self.recipe.batch_rows)]
        return rows, [collate(part) for part in self.micro_batches(rows)[1]]

    def gradients(self, step: int) -> tuple[float, float, int]:
        """Forward and backward pass of a step. Returns (loss, gradient norm before clipping, tokens), over all ranks.

        Afterwards every `param.grad` holds the gradient of the whole step (its shard, where sharded).
        """
        self.model.train()
        rows, batches = self.prepared(step)
        counts = count(rows)
        total = torch.zeros((), dtype=torch.float64, device=self.device)  # −log p, summed over answer tokens
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            batch = batch.to(self.device)
            self.plan.begin(step, batch.branches)
            loss, summed = batch_loss(self.model, batch, counts, self.recipe.note_loss)
            loss.backward()
            total += summed
        add_gradients(named_trainable(self.model).values(), self.ranks)
        loss_value = float(sum_over_ranks(total)) / max(counts[ANSWER], 1)
        tokens = sum(len(row) for row in rows)
        self.done.update(steps=1, tokens=tokens, targets=sum(counts.values()), pairs=sum(row.pairs() for row in rows))
        return loss_value, self.gradient_norm(), tokens

    def gradient_norm(self) -> float:
        grads = [p.grad for p in named_trainable(self.model).values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def update(self, step: int, norm: float) -> float:
        """Clip gradients of norm `norm`, set the learning rate, step the optimizers. Returns the learning rate."""
        factor = rate(self.recipe, step, self.steps)
        if self.recipe.clip and norm > self.recipe.clip:
            for param in named_trainable(self.model).values():
                if param.grad is not None:
                    param.grad.mul_(self.recipe.clip / norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
        return self.recipe.learning_rate * factor

    def bad_step(self, step: int, loss: float, norm: float) -> str:
        """The message for a loss or gradient that is not finite, with the step's records."""
        rows, _ = self.prepared(step)
        names = dict.fromkeys(name for row in rows for document in row.documents for name, _, _ in document.branches)
        return (
            f"step {step + 1}: loss {loss}, gradient norm {norm}: not finite; its records are {', '.join(names)}; "
            "nothing was updated. Look at them, or train with a lower learning rate"
        )

    # validation and metrics

    @torch.no_grad()
    def valid_loss(self) -> float:
        """Held-out loss: the mean of −log p over the answer tokens of at most `valid_rows` rows."""
        assert self.valid is not None
        self.model.eval()
        rows = [self.valid[i] for i in range(min(len(self.valid), self.recipe.valid_rows))]
        counts = count(rows)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in self.micro_batches(rows)[1]:
            _, summed = batch_loss(self.model, collate(part).to(self.device), counts)
            total += summed
        return float(sum_over_ranks(total)) / max(counts[ANSWER], 1)

    def record(self, loss: float, norm: float, learning_rate: float) -> None:
        """Append a line to metrics.jsonl, with the held-out loss when it is due.

        Lines hold no times, so that a resumed run writes the same bytes as an uninterrupted one.
        """
        line = {
            "step": self.progress.step,
            "loss": loss,
            "tokens": self.progress.tokens,
            "lr": learning_rate,
            "grad_norm": norm,
        }
        if self.valid is not None and (self.due(self.recipe.valid_every) or self.progress.step == self.steps):
            line["valid_loss"] = self.valid_loss()
            best = math.inf if self.progress.best is None else self.progress.best
            if line["valid_loss"] < best:
                self.progress.best, self.progress.best_step = line["valid_loss"], self.progress.step
        if self.ranks.first:
            numbers = {key: value if math.isfinite(value) else None for key, value in line.items()}  # JSON has no NaN
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as out:
                out.write(json.dumps(numbers) + "\n")

    def truncate_metrics(self) -> None:
        """Drop the lines of metrics.jsonl after the resumed step: a killed run may have written more than it saved."""
        if self.ranks.first:
            self.out.mkdir(parents=True, exist_ok=True)
            path = self.out / "metrics.jsonl"
            old = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            kept = [line for line in old if line.endswith("}") and json.loads(line)["step"] <= self.progress.step]
            write_text(path, "".join(line + "\n" for line in kept))

    # checkpoints

    def save(self) -> None:
        """Write this step's checkpoint unless it exists, then delete those that are no longer kept.

        Deletion runs either way: an earlier process may have been killed between the two.
        """
        if self.saved != self.progress.step:
            params, state = snapshot(self.model, self.optimizers, keep=self.ranks.first)
            self.ranks.run_on_first(lambda: self.write(params, state))
        self.saved = self.progress.step
        self.ranks.run_on_first(self.delete_old)
        self.stale = []

    def write(self, params: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        folder = self.out / "checkpoints"
        try:
            save_checkpoint(folder, self.progress, params, state, self.adapter(params), self.identity)
        except OSError as error:
            raise UserError(
                f"{folder}: step {self.progress.step} could not be saved ({error}); the checkpoints before "
                "it are intact. Free space; the same command continues from there"
            ) from error

    def delete_old(self) -> None:
        stale = [old for old in self.stale if step_of(old) != self.saved]
        prune(self.out / "checkpoints", self.recipe.keep_last, self.progress.best_step, stale)

    def adapter(self, params: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor], str] | None:
        """(config, tensors, base path) for write_adapter; None in full training."""
        if self.recipe.full:
            return None
        configs = self.model.__dict__["lora_configs"]  # set by lora.add_lora
        return configs["default"], adapter_state(self.model, params=params), self.base

    def resume(self) -> None:
        """Restore the newest intact checkpoint. The first rank picks it, so that all ranks restore the same one."""
        folder, found = self.out / "checkpoints", None
        if self.recipe.resume:
            found = self.ranks.of_first(lambda: newest_intact(folder))
        if found is not None:
            allowed = self.recipe.allow_changed
            read = lambda: restore(found, self.model, self.optimizers, self.identity, allowed)  # noqa: E731
            self.progress = self.ranks.run_on_all(read)
            self.saved = self.progress.step
            if self.ranks.first:
                tqdm.write(f"resuming from {found}, step {self.progress.step}", file=sys.stderr)
        elif self.recipe.resume and self.ranks.first and steps_saved(folder):
            tqdm.write(f"no checkpoint in {folder} is intact: the run begins again at step 0", file=sys.stderr)
        # Later checkpoints are corrupt or belong to an abandoned run; they are kept until this run has one of its own.
        self.stale = [path for path in steps_saved(folder) if found is None or step_of(path) > step_of(found)]


class ProgressDisplay:
    """The first rank's progress: a bar on a terminal, in a log a line every `log_seconds`."""

    def __init__(self, trainer: Trainer) -> None:
        self.first, self.steps, self.log_seconds = trainer.ranks.first, trainer.steps, trainer.log_seconds
        self.printed = time.monotonic()
        self.bar = tqdm(
            total=self.steps,
            initial=trainer.progress.step,
            desc=trainer.out.name,
            unit=" steps",
            disable=None if self.first else True,  # None: disabled unless stderr is a terminal
        )

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        text = f"loss {loss:.4f}, {tokens_per_second:.0f} tok/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.first and self.bar.disable and time.monotonic() - self.printed >= self.log_seconds:
            self.printed = time.monotonic()
            print(f"step {step} of {self.steps}: {text}", file=sys.stderr, flush=True)

    def stopped(self, step: int) -> None:
        self.bar.close()
        if self.first:
            print(f"stopped at step {step} of {self.steps}; the same command continues from there")

    def close(self) -> None:
        self.bar.close()
