# %% [markdown]
# # One training step
# One step of the training loop (`Trainer.gradients`, `Trainer.update`) in fp64, on a small model and two short notes in
# two micro-batches. Worked by hand: the loss from the logits, a gradient by finite differences, AdamW for one weight.
# %%
import json
import math
import tempfile

import numpy as np
import torch

from model import ModelConfig, Transformer
from model.support.init import init_weights
from model.support.source import ROOT, check, show
from train.data.rows import ANSWER, IGNORE, Row, collate, count, note_document
from train.distributed.sharding import Ranks
from train.loop import Trainer
from train.loss import ChunkedCrossEntropy, batch_loss
from train.optim.optimizer import adamw
from train.recipe import Recipe

config = ModelConfig.from_dict(json.loads((ROOT / "train/recipes/tiny.json").read_text()))
model = init_weights(Transformer(config), 0).double()

# %% [markdown]
# ## Notes, rows, loss
# A row contains a note once; its questions are branches that attend to the note and to themselves. Targets are the
# answer's tokens and an end token (0; every other token is a byte). The loss is Σ −log p over the step's targets,
# divided by their number N, which is known before the first micro-batch, so micro-batches and ranks just add up.
# %%
notes = {"Left breast, grade 2.": {"Side? ": "left", "Grade? ": "2"}, "Right lung.": {"Side? ": "right"}}
rows = []
for note, questions in notes.items():
    texts = [note, *(text for question, answer in questions.items() for text in (question, answer + "\0"))]
    pieces = [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]
    rows.append(Row((note_document(f"note-{len(rows)}", pieces),)))
show(note_document, "branch_columns(", branch=rows[0].documents[0].branch, positions=rows[0].documents[0].positions)
N = sum(len(answer) + 1 for questions in notes.values() for answer in questions.values())
check("N, bytes of all answers and an end token each", N, count(rows)[ANSWER])
shape = {"steps": 100, "batch_rows": 2, "micro_rows": 1, "learning_rate": 3e-3, "warmup": 0, "clip": 0.5}
recipe = Recipe(data=("two notes",), out=tempfile.gettempdir(), init="tiny", tokenizer="bytes", full=True, **shape)
trainer = Trainer(recipe, model, rows, None, Ranks(), {})
loss, norm, _ = trainer.gradients(0)
nll = []
for row in rows:
    batch = collate([row])
    with torch.no_grad():
        logits_TV = model(batch.tokens, positions=batch.positions, layout=batch.layout)[0]
    for z_V, target in zip(logits_TV.tolist(), batch.target[0].tolist(), strict=True):
        if target != IGNORE:
            nll.append(math.log(math.fsum(math.exp(z) for z in z_V)) - z_V[target])
show(ChunkedCrossEntropy.forward, "loss_N[part] =", uniform_guess=f"log V = {math.log(config.vocab_size):.4f}")
check("Σ −log p / N", math.fsum(nll) / N, loss)

# %% [markdown]
# ## One gradient by finite differences
# For the weight with the largest gradient in one matrix, the loss is computed at w + h and w − h; the slope between
# them must equal the gradient of the backward pass.
# %%
weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
place = divmod(int(weight.grad.abs().argmax()), weight.shape[1])
before, h = float(weight[place].detach()), 1e-5
losses = []
for value in (before + h, before - h, before):
    weight.data[place] = value
    losses.append(sum(float(batch_loss(model, collate([row]), count(rows))[0].detach()) for row in rows))
show(Trainer.gradients, "loss.backward()", w=f"up_proj{list(place)} = {before:+.6f}")
check("the sum of the micro-batches' losses", losses[2], loss)
check("(L(w + h) − L(w − h)) / 2h", (losses[0] - losses[1]) / (2 * h), weight.grad[place], tolerance=1e-6)

# %% [markdown]
# ## Clipping and the update
# A gradient whose norm exceeds the limit is scaled down to it. AdamW divides the average gradient m by the root of the
# average square v, so the first step moves each weight by the learning rate against the gradient's sign. Weight decay
# pulls weights to zero. Ten steps on the same two notes lower the loss.
# %%
squares = math.fsum(float(p.grad.square().sum()) for p in model.parameters())
show(Trainer.update, "param.grad.mul_(", limit=recipe.clip, factor=min(1.0, recipe.clip / norm))
check("√ Σ g²", math.sqrt(squares), norm)
g = float(weight.grad[place]) * min(1.0, recipe.clip / norm)
rate = trainer.update(0, norm)
by_hand = before * (1 - rate * recipe.weight_decay) - rate * g / (math.sqrt(g * g) + 1e-8)  # m = g, v = g² at first
show(adamw, "torch.optim.AdamW", g=g, learning_rate=rate)
check("w (1 − rate · decay) − rate · m / (√v + ε)", by_hand, weight[place].detach())
for step in range(1, 10):
    trainer.update(step, trainer.gradients(step)[1])
after = trainer.gradients(10)[0]
show(Trainer.run, "self.update(step, norm)", loss=f"{loss:.4f}, after ten steps {after:.4f}")
assert after < loss
