"""One training step told step by step: `python -m train.tour`.

The step is the training loop's own (`Trainer.gradients`, `Trainer.update`) on a nano model and two short notes. Beside
it: the loss worked by hand, one gradient checked by finite differences in fp64, one weight's update by AdamW worked
by hand. Where a number worked by hand is not the program's, the exit code is 1.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.lesson import Hand, Step, amount, near, source, tell
from model.support.cli import run
from model.tour import NANO
from model.transformer import Transformer
from train.data.rows import ANSWER, IGNORE, Row, collate, count, note_unit
from train.distributed.sharding import Ranks
from train.loop import Trainer
from train.loss import ChunkedCrossEntropy, batch_loss
from train.optim.optimizer import adamw, named_trainable
from train.recipe import Recipe

END = 0  # the nano vocabulary's end token; every other id is a byte
NOTES = (
    ("note-1", "Left breast, grade 2.", (("Side? ", "left"), ("Grade? ", "2"))),
    ("note-2", "Right lung.", (("Side? ", "right"),)),
)
WATCHED = "model.layers.1.mlp.up_proj.weight"  # the matrix whose largest gradient is followed


@dataclass(frozen=True)
class Options:
    """Tell one optimizer step: from notes and questions to rows, loss, gradient, clipping and update."""

    html: str = ""
    """Write a page to this file in place of telling it in the terminal."""


@dataclass
class Seen:
    """The trainer of a nano model in fp64, its rows, and what the step has left behind so far."""

    trainer: Trainer
    rows: list[Row]
    counts: dict[int, int]
    loss: float = 0.0
    norm: float = 0.0
    place: tuple[int, int] = (0, 0)  # of the largest gradient in the watched matrix
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def weight(self) -> Tensor:
        return named_trainable(self.trainer.model)[WATCHED]


def prepare() -> Seen:
    def ids(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    rows = []
    for record, note, questions in NOTES:
        pieces = [ids(note)]
        for question, answer in questions:
            pieces += [ids(question), np.append(ids(answer), END)]
        rows.append(Row((note_unit(record, pieces),)))
    recipe = Recipe(data=("two notes",), out=str(tempfile.gettempdir()), init="nano", tokenizer="bytes", full=True,
                    steps=100, batch_rows=2, micro_rows=1, learning_rate=3e-3, warmup=0, clip=0.5)  # fmt: skip
    model = Transformer(ModelConfig.from_dict(NANO)).init_weights(0).double()
    held: Any = rows  # a list of rows is all that a step asks of the data
    return Seen(Trainer(recipe, model, held, None, Ranks(), {}), rows, count(rows))


def show(token: int) -> str:
    return "end" if token == END else repr(chr(token))


def to_rows(seen: Seen) -> Step:
    unit = seen.rows[0].units[0]
    start = int(unit.stretches[0][2]) - 3
    table = [["token", "branch", "position", "target"]]
    for i in range(start, len(unit.tokens)):
        target = "·" if unit.target[i] == IGNORE else show(int(unit.target[i]))
        table.append([show(int(unit.tokens[i])), str(unit.branch[i]), str(unit.positions[i]), target])
    says = ("A row holds a note once and its questions as branches that see the note and themselves. Only an answer's "
            f"tokens and its end are targets. From the first note's token {start} on (a byte is a token):")  # fmt: skip
    wanted = sum(len(answer) + 1 for _, _, questions in NOTES for _, answer in questions)
    facts = [("targets", f"{seen.counts[ANSWER]} in the whole step, N in what follows"),
             ("tokens", f"{sum(map(len, seen.rows))} in {len(seen.rows)} rows")]  # fmt: skip
    hand = near("letters of all answers and one end each", float(wanted), float(seen.counts[ANSWER]))
    return Step("Notes to rows", says, source(note_unit, "branch_columns("), facts, [hand], table=table)


def logprobs(seen: Seen, row: Row) -> tuple[list[int], Tensor]:
    """(targets, their −log p in fp64) of a row, from the model's logits and nothing of the loss's code."""
    batch = collate([row])
    with torch.no_grad():
        logits_TV = seen.trainer.model(batch.tokens, positions=batch.positions, layout=batch.layout)[0]
    place = [i for i, target in enumerate(batch.target[0].tolist()) if target != IGNORE]
    targets = [int(batch.target[0, i]) for i in place]
    nll = []
    for i, target in zip(place, targets, strict=True):
        exponentials = [math.exp(z) for z in logits_TV[i].tolist()]
        nll.append(math.log(math.fsum(exponentials)) - float(logits_TV[i, target]))
    return targets, torch.tensor(nll, dtype=torch.float64)


def the_loss(seen: Seen) -> Step:
    found = [logprobs(seen, row) for row in seen.rows]
    seen.loss, seen.norm, _ = seen.trainer.gradients(0)
    every = torch.cat([nll for _, nll in found])
    table = [["row", "target", "−log p"]]
    for number, (targets, nll) in enumerate(found):
        table += [[str(number), show(t), f"{float(value):.6f}"] for t, value in zip(targets, nll, strict=True)]
    mean = float(every.sum()) / len(every)
    wrong = sum(float(nll.mean()) for _, nll in found) / len(found)
    parts = []
    for row in seen.rows:
        with torch.no_grad():
            parts.append(float(batch_loss(seen.trainer.model, collate([row]), seen.counts)[0]))
    hand = [exact(f"Σ −log p / N = {float(every.sum()):.6f} / {len(every)}", mean, seen.loss),
            exact("the two micro-batches: " + " + ".join(f"{part:.6f}" for part in parts), sum(parts), seen.loss)]
    facts = [("a blind guess", f"log V = {math.log(seen.trainer.model.config.vocab_size):.4f}"),
             ("mean of the rows' means", f"{wrong:.6f}: not the same, it weighs a token by the company that it keeps")]
    says = ("The loss is the sum of −log p over all targets of the step, divided by their number N: known before, so "
            "that micro-batches and ranks just add up.")  # fmt: skip
    code = source(ChunkedCrossEntropy.forward, "loss_N[part] =")
    return Step("The loss", says, code, facts, hand, table=table)


def exact(how: str, value: float, program: float) -> Hand:
    """Two fp64 computations of one number."""
    return Hand(how, value, program, 1e-12 * max(1.0, abs(value)))


def whole_loss(seen: Seen) -> float:
    with torch.no_grad():
        return sum(float(batch_loss(seen.trainer.model, collate([row]), seen.counts)[0]) for row in seen.rows)


def finite_difference(seen: Seen) -> Step:
    """The largest gradient of one matrix against (L(w + h) − L(w − h)) / 2h, in fp64."""
    gradient = seen.weight.grad
    assert gradient is not None
    seen.place = place = tuple(divmod(int(gradient.abs().argmax()), gradient.shape[1]))  # type: ignore[assignment]
    step, losses = 1e-5, []
    with torch.no_grad():
        original = float(seen.weight[place])
        for sign in (1, -1):
            seen.weight[place] = original + sign * step
            losses.append(whole_loss(seen))
        seen.weight[place] = original
    slope = (losses[0] - losses[1]) / (2 * step)
    # what is left: h²/6 of the third derivative, and the losses' own rounding over 2h
    slack = 1e-6 * abs(slope) + 8 * 2**-52 * losses[0] / (2 * step)
    hand = Hand(f"(L(w + h) − L(w − h)) / 2h = ({losses[0]:.10f} − {losses[1]:.10f}) / {2 * step:g}", slope,
                float(gradient[place]), slack)  # fmt: skip
    facts = [("w", f"{WATCHED}{list(place)} = {original:+.6f}, the largest gradient of its matrix"),
             ("they differ by", f"{abs(hand.value - hand.program):.1e}")]  # fmt: skip
    says = ("The backward pass says how the loss changes with every weight. For one of them we ask the loss itself: a "
            "little more, a little less, and the slope between.")  # fmt: skip
    return Step("One gradient, checked", says, source(Trainer.gradients, "loss.backward()"), facts, [hand])


def clipping(seen: Seen) -> Step:
    params = named_trainable(seen.trainer.model)
    squares = math.fsum(float(p.grad.square().sum()) for p in params.values() if p.grad is not None)
    hand = exact(f"√(Σ g² = {squares:.6g})", math.sqrt(squares), seen.norm)
    limit = seen.trainer.recipe.clip
    facts = [("limit", f"{limit:g}: " + (f"every gradient is multiplied by {limit / seen.norm:.4f}" if seen.norm > limit
                                         else "nothing is clipped"))]  # fmt: skip
    says = "One strange batch must not throw the weights far: the whole gradient is shortened where it is too long."
    return Step("Clipping", says, source(Trainer.update, "param.grad.mul_("), facts, [hand])


def update(seen: Seen) -> Step:
    trainer, before = seen.trainer, float(seen.weight.detach()[seen.place])
    assert seen.weight.grad is not None
    g = float(seen.weight.grad[seen.place]) * min(1.0, trainer.recipe.clip / seen.norm)
    rate = trainer.update(0, seen.norm)
    (b1, b2), decay, eps = trainer.recipe.betas, trainer.recipe.weight_decay, 1e-8
    m, v = (1 - b1) * g / (1 - b1), (1 - b2) * g * g / (1 - b2)
    value = before * (1 - rate * decay) - rate * m / (math.sqrt(v) + eps)
    facts = [("g, clipped", f"{g:+.6e}"), ("m̂ and v̂ after one step", f"{m:+.4e} and {v:.4e}: g and g²"),
             ("w", f"{before:+.8f} → {float(seen.weight.detach()[seen.place]):+.8f}")]  # fmt: skip
    how = f"w · (1 − {rate:g} · {decay:g}) − {rate:g} · m̂ / (√v̂ + {eps:g})"
    says = ("AdamW moves a weight by the average gradient over the root of the average square: its first step is the "
            "learning rate, against the gradient's sign, whatever its size. Weight decay pulls to zero.")  # fmt: skip
    hand = exact(how, value, float(seen.weight.detach()[seen.place]))
    return Step("The update", says, source(adamw, "torch.optim.AdamW"), facts, [hand])


def after(seen: Seen) -> Step:
    count = sum(p.numel() for p in named_trainable(seen.trainer.model).values())
    losses = [seen.loss, whole_loss(seen)]
    for step in range(1, 10):
        seen.trainer.update(step, seen.trainer.gradients(step)[1])
    losses.append(whole_loss(seen))
    tokens = sum(map(len, seen.rows))
    facts = [("loss of these rows", f"{losses[0]:.4f}, then {losses[1]:.4f}, after nine more steps {losses[2]:.4f}"),
             ("FLOPs of a step", f"about {amount(6 * count * tokens, 'FLOP')}: 2 forward and 4 backward for each of "
              f"{count:,} weights and {tokens} tokens"),
             ("memory in fp32", f"{amount(16 * count, 'B')}: weights, gradients and AdamW's two averages")]
    says = "The same two notes again and again: the model learns them by heart, so the step points downhill."
    return Step("And again", says, source(Trainer.run, "self.update(step, norm)"), facts)


def steps(seen: Seen) -> Iterator[Step]:
    for part in (to_rows, the_loss, finite_difference, clipping, update, after):
        yield part(seen)


def main(options: Options) -> int:
    seen = prepare()
    model = seen.trainer.model
    opening = (
        f"A nano Mistral of {sum(p.numel() for p in model.parameters()):,} random weights, all of them trained, in "
        "fp64 so that every comparison is sharp. Two notes with three questions make one step of two micro-batches."
    )
    return tell("One training step", opening, steps(seen), options.html or None)


if __name__ == "__main__":
    run(main, Options)
