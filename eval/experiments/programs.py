"""Paths in a demo's folder, and the commands of the experiments on its models (eval.experiments.demo runs some,
eval.experiments.tables all).

Each experiment's program writes result.json into its folder and continues after an interruption.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.experiments.steps import RECIPES, argv, training_dtype

TITLES_OF = {
    "labels": "table 3: wrong labels",
    "misspelling": "table 4: misspelled notes, plain and repaired",
    "canaries": "canaries",
    "retrieval": "table 6: retrieval",
}
AMOUNTS = tomllib.loads(Path(__file__).with_name("scales.toml").read_text("utf-8"))


@dataclass(frozen=True)
class Demo:
    """Paths in the folder of a demo of some scale."""

    folder: Path
    scale: str

    @property
    def weights(self) -> str:
        return str(self.folder / ("base" if self.scale == "full" else "base/model"))

    def recipe(self, stage: str) -> str:
        return str(RECIPES / f"{'demo' if self.scale == 'full' else self.scale}-{stage}.toml")

    @property
    def dtype(self) -> str:
        """Dtype of the frozen base in training: training_dtype for the public base, fp32 for models trained from
        scratch. Adapters and optimizer state are always fp32."""
        if self.scale != "full":
            return "float32"
        return training_dtype(self.folder)

    def data(self, name: str) -> str:
        return str(self.folder / "data" / f"{name}.jsonl")

    def adapter(self, name: str) -> str:
        return str(self.folder / name / "adapter")


def experiment(demo: Demo, out: Path, name: str, **amounts: Any) -> list[str]:
    """The command of an experiment on a demo's models. `name` is one of TITLES_OF; `amounts` are its own options."""
    heldout = {"weights": demo.weights, "notes": demo.folder / "heldout.jsonl", "grounded": True}
    tuned = heldout | {"adapter": demo.adapter("tuned")}
    tuning = {"data": demo.data("train"), "recipe": demo.recipe("instruct"), "dtype": demo.dtype}
    given: dict[str, dict[str, Any]] = {
        "labels": heldout | {"adapter": demo.adapter("pretrained")} | tuning,
        "misspelling": tuned | {"lexicon": demo.data("train")},
        "canaries": {
            "weights": demo.weights,
            "data": demo.data("pretrain"),
            "recipe": demo.recipe("pretrain"),
            "dtype": demo.dtype,
        },
        "retrieval": tuned | tuning,
    }
    program = "eval.experiments.retrieval_table" if name == "retrieval" else f"eval.robustness {name}"
    return argv(program, **given[name], **amounts, out=out / name)
