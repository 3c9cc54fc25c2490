"""Each training record's loss under an adapter: wrong answers stay unlikely for longer than right ones are learnt."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from lora import load_adapter
from model import Transformer
from train.data.dataset import Rows
from train.data.rows import collate, count
from train.data.store import Encoding, build_store
from train.loss import batch_loss
from train.recipe import Recipe


@torch.no_grad()
def answer_losses(weights: str, adapter: str, data: Path, scratch: Path) -> dict[str, float]:
    """{record id: mean −log p of its answers' tokens} of annotated notes; `scratch` keeps their tokens."""
    store = build_store([str(data)], Encoding("instruct", weights), scratch)
    model = Transformer.from_pretrained(weights).eval()
    load_adapter(model, adapter)
    model.use_attention("fast")
    largest = model.config.max_position_embeddings
    rows = Rows(
        store, Recipe(weights=weights, data=(str(data),), out=str(scratch), block=largest, packing="none"), "instruct"
    )
    found = {}
    for number in tqdm(range(len(rows)), desc="losses", unit="record", disable=None):
        row = rows[number]
        found[row.units[0].record] = float(batch_loss(model, collate([row]), count([row]))[0])
    return found


def ranking(losses: dict[str, float]) -> list[str]:
    """Record ids, the highest loss first, equal ones by name."""
    return sorted(losses, key=lambda name: (-losses[name], name))
