"""The files of a demo's folder, and the experiments that are run on it: a few by eval.experiments.demo, all by
eval.experiments.tables.

Each function returns a command as `python -m` takes it. The program writes result.json into its folder and continues
after an interruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.experiments.steps import RECIPES, argv, training_dtype

PARTS = {"wrong_labels": "labels", "misspelling": "misspelling", "canaries": "canaries", "retrieval": "retrieval"}
# run.json's name for each experiment, and its folder


@dataclass(frozen=True)
class Demo:
    """A demo's folder."""

    folder: Path
    scale: str

    @property
    def weights(self) -> str:
        return str(self.folder / ("base" if self.scale == "full" else "base/model"))

    def recipe(self, stage: str) -> str:
        return str(RECIPES / f"{'demo' if self.scale == 'full' else self.scale}-{stage}.toml")

    @property
    def dtype(self) -> str:
        """What the real base trains in: the faster of fp32 and bf16 on this machine, found once a demo. Adapters and
        their optimizer are fp32 either way; the small models from nothing are fp32, and so is extraction (a decoded
        row is too small for bf16 products to pay)."""
        if self.scale != "full":
            return "float32"
        return training_dtype(self.folder)

    def data(self, name: str) -> str:
        return str(self.folder / "data" / f"{name}.jsonl")

    def adapter(self, name: str) -> str:
        return str(self.folder / name / "adapter")

    @property
    def tuned(self) -> dict[str, Any]:
        """The tuned model and the held-out notes, as the experiments' programs are given them."""
        return {
            "weights": self.weights,
            "adapter": self.adapter("tuned"),
            "grounded": True,
            "notes": self.folder / "heldout.jsonl",
        }


def labels(
    demo: Demo, out: Path, rates: Sequence[float], filter_rate: float, records: int, epochs: float, notes: int
) -> list[str]:
    return argv(
        "eval.robustness labels",
        **demo.tuned | {"adapter": demo.adapter("pretrained")},
        dtype=demo.dtype,
        recipe=demo.recipe("instruct"),
        data=demo.data("train"),
        rates=rates,
        filter_rate=filter_rate,
        records=records,
        epochs=epochs,
        limit=notes,
        out=out / PARTS["wrong_labels"],
    )


def misspelling(demo: Demo, out: Path, rates: Sequence[float], notes: int) -> list[str]:
    own = {"lexicon": demo.data("train"), "rates": rates, "limit": notes, "out": out / PARTS["misspelling"]}
    return argv("eval.robustness misspelling", **demo.tuned, **own)


def canaries(demo: Demo, out: Path, counts: Sequence[int], each: int, records: int, epochs: float) -> list[str]:
    return argv(
        "eval.robustness canaries",
        weights=demo.weights,
        recipe=demo.recipe("pretrain"),
        data=demo.data("pretrain"),
        counts=counts,
        each=each,
        records=records,
        epochs=epochs,
        dtype=demo.dtype,
        out=out / PARTS["canaries"],
    )


def retrieval(demo: Demo, out: Path, notes: int, tune_steps: int = 0) -> list[str]:
    return argv(
        "eval.experiments.retrieval_table",
        **demo.tuned,
        data=demo.data("train"),
        recipe=demo.recipe("instruct"),
        dtype=demo.dtype,
        tune_steps=tune_steps,
        limit=notes,
        out=out / PARTS["retrieval"],
    )
