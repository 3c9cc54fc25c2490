"""Quantized weights: bytes, error of the logits, and score of the answers, on a model that was trained in fp32.

The model is a demo's (`make demo SCALE=nano`: base, continued pre-training and tuning all from nothing, in fp32).
SmolLM2's public file would show nothing: it is in 4 bits already. Speed of each format: `eval.bench decode`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from eval.bench.row import Row
from eval.metrics.statistics import format_interval
from eval.questions import figures, pair, read_references
from infer.engine.generate import Generator
from infer.engine.load import load
from infer.engine.memory import weight_bytes
from infer.extract.ask import Asker, Limits
from infer.extract.notes import Note
from infer.tasks import prefix
from model.support.cli import UserError

FORMS = ("wide", "int8", "int4-32", "int4-64", "int4-128", "nf4")


def rows(run: str = "runs/demo-nano", notes: int = 40, batch: int = 8) -> list[Row]:
    """Three rows a format: bytes, the logits' error over the held-out notes' tokens, and average F1.

    `run`: a demo's folder; `notes`: how many of its held-out notes.
    """
    folder = Path(run)
    if not (folder / "tuned" / "adapter").is_dir():
        raise UserError(f"{run}: no demo's run; make one: make demo SCALE=nano")
    weights = folder / "base" / "model" if (folder / "base" / "model").is_dir() else folder / "base"
    adapters = [folder / "tuned" / "adapter"]  # it was started from the pretrained one, and contains it
    records = read_references(folder / "heldout.jsonl")[:notes]
    found: list[Row] = []
    exact: list[torch.Tensor] = []
    for form in FORMS:
        model, tokenizer = load(weights, adapters, form=form)
        texts = [tokenizer.encode(prefix(record["text"]), bos=True) for record in records]
        with torch.inference_mode():
            logits = [model(torch.tensor([ids]))[0] for ids in texts]
        exact = exact or logits
        own, true = torch.cat(logits).double(), torch.cat(exact).double()
        agree = (own.argmax(-1) == true.argmax(-1)).double().mean().item()
        asker = Asker(Generator(model, tokenizer), "both", "template", Limits(), batch=batch)
        answers: list[dict[str, Any]] = []
        for start in range(0, len(records), batch):
            part = [Note(record["id"], record["text"]) for record in records[start : start + batch]]
            answers += asker.records(part)
        average = figures(pair(records, answers)[0])["average_f1"]  # type: ignore[index]
        size = weight_bytes(model.config, form, torch.float32) / 1e6
        wide = weight_bytes(model.config, "wide", torch.float32) / 1e6
        setting = f"{folder.name}, {len(records)} held-out notes, {len(true)} tokens, the last adapter unmerged"
        error = (own - true).square().mean().sqrt().item() / true.std().item()
        spread = format_interval(average["low"], average["high"])  # none below 10 patients
        first = found[2].ours if found else average["f1"]
        found += [
            Row(f"bytes: {form}", size, wide, "fp32", "MB", setting),
            Row(
                f"logits: {form}",
                100 * error,
                None,
                None,
                "% of the logits' spread (rms)",
                f"the likeliest token is fp32's in {100 * agree:.1f} %; {setting}",
            ),
            Row(
                f"answers: {form}",
                average["f1"],
                first,
                "fp32",
                "average F1",
                f"{spread} {setting}".strip(),
                average["ceiling"],
            ),
        ]
    return found
