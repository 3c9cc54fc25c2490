"""The training loop of both stages and of full training, on one process or under torchrun.

A step: its rows are a function of (seed, step); they are sorted by length and cut into micro-batches; each rank takes
every n-th of them; gradients add up over micro-batches and ranks; norm, clip, update. What makes the loss exact is in
loss.py, bit-exact resume is in checkpoint.py, what shards the model is in sharding.py.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lora import DropoutPlan
from lora.adapter import adapted
from lora.peft import adapter_state
from model.support.cli import UserError
from model.support.files import write_text
from model.transformer import Transformer
from train.data.dataset import Rows, read_ahead
from train.data.rows import ANSWER, Batch, Row, collate, count, order
from train.distributed.checkpoint import (
    Progress,
    newest_whole,
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

EVERY = 60.0  # seconds between two lines of progress where there is no terminal


@dataclass
class Trainer:
    """One run. `gradients(step)` and `update(step)` are a step; `run()` is the loop around them."""

    recipe: Recipe
    model: Transformer
    rows: Rows
    valid: Rows | None
    ranks: Ranks
    identity: dict[str, Any]
    base: str = ""
    progress: Progress = field(default_factory=Progress)
    done: Counter[str] = field(default_factory=Counter)  # in this process: steps, tokens, targets, pairs of attention
    seconds: float = 0.0

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
            for block in self.model.model.layers:  # not the loss, whose chunks and targets differ from step to step
                block.compile()
        self.stopping = False
        self.saved: int | None = None  # the step whose checkpoint is on disk
        self.stale: list[Path] = []

    # one step

    def micro_batches(self, rows: list[Row]) -> tuple[list[list[Row]], list[list[Row]]]:
        """(every micro-batch of these rows, this rank's). The cut is the same for any number of ranks."""
        size = self.recipe.micro_rows
        by_length = sorted(rows, key=len, reverse=True)
        parts = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        turns = math.ceil(len(parts) / self.ranks.world)
        mine = [
            parts[i] if i < len(parts) else [Row(())]
            for i in range(self.ranks.rank, turns * self.ranks.world, self.ranks.world)
        ]
        return parts, mine

    def prepare(self, step: int) -> tuple[list[Row], list[Batch]]:
        """(the step's rows, this rank's micro-batches of them)."""
        rows = [self.rows[i] for i in order(self.recipe.seed, step, len(self.rows), self.recipe.batch_rows)]
        return rows, [collate(part) for part in self.micro_batches(rows)[1]]

    def gradients(self, step: int) -> tuple[float, float, int]:
        """Leave the step's whole gradient on the parameters. Returns (loss, gradient norm, tokens)."""
        self.model.train()
        rows, batches = self.prepared(step)
        counts = count(rows)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
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
        """Clip by the norm and take the optimizers' step. Returns the learning rate."""
        share = rate(self.recipe, step, self.steps)
        if self.recipe.clip and norm > self.recipe.clip:
            for param in named_trainable(self.model).values():
                if param.grad is not None:
                    param.grad.mul_(self.recipe.clip / norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            optimizer.step()
        return self.recipe.learning_rate * share

    def bad_step(self, step: int, loss: float, norm: float) -> None:
        rows, _ = self.prepared(step)
        names = dict.fromkeys(name for row in rows for document in row.documents for name, _, _ in document.branches)
        what = f"step {step + 1}: loss {loss}, gradient norm {norm}: not finite; its records are {', '.join(names)}"
        if self.recipe.on_bad_step == "stop":
            raise UserError(f"{what}; nothing was updated. Look at them, or continue with --on-bad-step skip")
        self.progress.skipped += 1
        if self.ranks.first:
            tqdm.write(f"{what}; skipped", file=sys.stderr)

    # held-out loss

    @torch.no_grad()
    def valid_loss(self) -> float:
        """The mean of −log p over the answers of the held-out rows."""
        assert self.valid is not None
        self.model.eval()
        rows = [self.valid[i] for i in range(min(len(self.valid), self.recipe.valid_rows))]
        counts = count(rows)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in self.micro_batches(rows)[1]:
            _, summed = batch_loss(self.model, collate(part).to(self.device), counts)
            total += summed
        return float(sum_over_ranks(total)) / max(counts[ANSWER], 1)

    # the loop

    @contextmanager
    def stopped_by_sigterm(self) -> Iterator[None]:
        """While this lasts, SIGTERM ends the run after its step, with a checkpoint."""
        before = signal.signal(signal.SIGTERM, self.on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def run(self) -> None:
        """Train to the recipe's end, from where the newest whole checkpoint left off."""
        with self.stopped_by_sigterm():
            self.resume()
            self.begin_metrics()
            began = said = time.monotonic()
            bar = tqdm(
                total=self.steps,
                initial=self.progress.step,
                desc=self.out.name,
                unit=" steps",
                disable=None if self.ranks.first else True,
            )
            while self.progress.step < self.steps:
                step = self.progress.step
                loss, norm, tokens = self.gradients(step)
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    self.bad_step(step, loss, norm)
                    learning_rate = 0.0
                else:
                    learning_rate = self.update(step, norm)
                self.progress.step += 1
                self.progress.tokens += tokens
                self.seconds = time.monotonic() - began
                self.record(loss, norm, learning_rate)
                bar.set_postfix_str(f"loss {loss:.4f}, {self.done['tokens'] / self.seconds:.0f} tok/s", refresh=False)
                bar.update()
                if bar.disable and self.ranks.first and time.monotonic() - said >= EVERY:  # a log, no terminal
                    said = time.monotonic()
                    print(f"step {self.progress.step} of {self.steps}: {bar.postfix}", file=sys.stderr, flush=True)
                if self.ranks.any(self.stopping):
                    self.save()
                    if self.ranks.first:
                        bar.close()
                        print(
                            f"stopped at step {self.progress.step} of {self.steps}; "
                            "the same command continues from there"
                        )
                    raise SystemExit(0)
                found_best = self.recipe.save_every > 0 and self.progress.best_step == self.progress.step
                if self.due(self.recipe.save_every) or found_best:  # the best is kept, so it has to be saved
                    self.save()
            bar.close()
            self.save()

    def due(self, every: int) -> bool:
        return every > 0 and self.progress.step % every == 0 and self.progress.step < self.steps

    def record(self, loss: float, norm: float, learning_rate: float) -> None:
        """One line of metrics.jsonl. It holds no times, so that a resumed run's file has the same bytes."""
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

    def on_signal(self, *_: object) -> None:
        self.stopping = True

    # checkpoints

    def save(self) -> None:
        """A checkpoint of this step, unless there is one already: a whole one is never written again. Then older ones
        are removed, which a run that was killed before that may have left."""
        if self.saved != self.progress.step:
            params, state = snapshot(self.model, self.optimizers, keep=self.ranks.first)
            self.ranks.run_on_first(lambda: self.write(params, state))
        self.saved = self.progress.step
        self.ranks.run_on_first(self.tidy)
        self.stale = []

    def write(self, params: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        folder = self.out / "checkpoints"
        try:
            save_checkpoint(folder, self.progress, params, state, self.adapter(params), self.identity)
        except OSError as error:
            raise UserError(
                f"{folder}: step {self.progress.step} could not be saved ({error}); the checkpoints before "
                "it are whole. Free space; the same command continues from there"
            ) from error

    def tidy(self) -> None:
        stale = [old for old in self.stale if step_of(old) != self.saved]
        prune(self.out / "checkpoints", self.recipe.keep_last, self.progress.best_step, stale)

    def adapter(self, params: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor], str] | None:
        """What write_adapter needs, or None in full training."""
        if self.recipe.full:
            return None
        return self.model.__dict__["lora_configs"]["default"], adapter_state(self.model, params=params), self.base

    def resume(self) -> None:
        """Resume from the newest whole checkpoint, which the first rank chooses for all."""
        folder, found = self.out / "checkpoints", None
        if self.recipe.resume:
            found = self.ranks.of_first(lambda: newest_whole(folder))
        if found is not None:
            allowed = self.recipe.allow_changed
            read = lambda: restore(found, self.model, self.optimizers, self.identity, allowed)  # noqa: E731
            self.progress = self.ranks.run_on_all(read)
            self.saved = self.progress.step
            if self.ranks.first:
                tqdm.write(f"resuming from {found}, step {self.progress.step}", file=sys.stderr)
        elif self.recipe.resume and self.ranks.first and steps_saved(folder):
            tqdm.write(f"no checkpoint in {folder} is whole: the run begins again at step 0", file=sys.stderr)
        # later ones are corrupt or of an abandoned run: they are removed once this run has a checkpoint of its own
        self.stale = [path for path in steps_saved(folder) if found is None or step_of(path) > step_of(found)]

    def begin_metrics(self) -> None:
        """Keep the lines of the steps that are in the checkpoint; a killed run may have written more."""
        if self.ranks.first:
            self.out.mkdir(parents=True, exist_ok=True)
            path = self.out / "metrics.jsonl"
            old = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            kept = [line for line in old if line.endswith("}") and json.loads(line)["step"] <= self.progress.step]
            write_text(path, "".join(line + "\n" for line in kept))
