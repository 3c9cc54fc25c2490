"""The files of a demo's folder, and the experiments that are run on it: a few by eval.experiments.demo, all by
eval.experiments.tables.

Each function returns a command as `python -m` takes it. The program writes result.json into its folder and continues
after an interruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.experiments.steps import RECIPES, training_dtype

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
    def tuned(self) -> list[str]:
        """The tuned model and the held-out notes, as the experiments' programs are given them."""
        return [
            "--weights",
            self.weights,
            "--adapter",
            self.adapter("tuned"),
            "--grounded",
            "--notes",
            str(self.folder / "heldout.jsonl"),
        ]


def labels(
    demo: Demo, out: Path, rates: Sequence[float], filter_rate: float, records: int, epochs: float, notes: int
) -> list[str]:
    return [
        "eval.robustness",
        "labels",
        "--weights",
        demo.weights,
        "--adapter",
        demo.adapter("pretrained"),
        "--grounded",
        "--notes",
        str(demo.folder / "heldout.jsonl"),
        "--dtype",
        demo.dtype,
        "--recipe",
        demo.recipe("instruct"),
        "--data",
        demo.data("train"),
        "--rates",
        *map(str, rates),
        "--filter-rate",
        str(filter_rate),
        "--records",
        str(records),
        "--epochs",
        str(epochs),
        "--limit",
        str(notes),
        "--out",
        str(out / PARTS["wrong_labels"]),
    ]


def misspelling(demo: Demo, out: Path, rates: Sequence[float], notes: int) -> list[str]:
    return [
        "eval.robustness",
        "misspelling",
        *demo.tuned,
        "--lexicon",
        demo.data("train"),
        "--rates",
        *map(str, rates),
        "--limit",
        str(notes),
        "--out",
        str(out / PARTS["misspelling"]),
    ]


def canaries(demo: Demo, out: Path, counts: Sequence[int], each: int, records: int, epochs: float) -> list[str]:
    return [
        "eval.robustness",
        "canaries",
        "--weights",
        demo.weights,
        "--recipe",
        demo.recipe("pretrain"),
        "--data",
        demo.data("pretrain"),
        "--counts",
        *map(str, counts),
        "--each",
        str(each),
        "--records",
        str(records),
        "--epochs",
        str(epochs),
        "--dtype",
        demo.dtype,
        "--out",
        str(out / PARTS["canaries"]),
    ]


def retrieval(demo: Demo, out: Path, notes: int, tune_steps: int = 0) -> list[str]:
    return [
        "eval.experiments.retrieval_table",
        *demo.tuned,
        "--data",
        demo.data("train"),
        "--recipe",
        demo.recipe("instruct"),
        "--dtype",
        demo.dtype,
        "--tune-steps",
        str(tune_steps),
        "--limit",
        str(notes),
        "--out",
        str(out / PARTS["retrieval"]),
    ]
