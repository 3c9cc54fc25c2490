"""The robustness experiments. An interrupted run continues.

    python -m eval.robustness labels --weights W --recipe R.toml --data train.jsonl --notes heldout.jsonl --out DIR
    python -m eval.robustness misspelling --weights W --adapter A --notes heldout.jsonl --lexicon train.jsonl --out DIR
    python -m eval.robustness canaries --weights W --recipe R.toml --data pretrain.jsonl --out DIR

Each writes DIR/result.json, which eval.report shows (run.json's "wrong_labels", "misspelling", "canaries").
"""

from __future__ import annotations

from eval.robustness import canaries, labels, misspelling
from eval.robustness.canaries import Canaries
from eval.robustness.labels import Labels
from eval.robustness.misspelling import Misspelling
from model.support.cli import run


def main(options: Labels | Misspelling | Canaries) -> None:
    if isinstance(options, Labels):
        text = labels.format_result(labels.run_labels(options))
    elif isinstance(options, Misspelling):
        text = misspelling.format_result(misspelling.run_misspelling(options))
    else:
        text = canaries.format_result(canaries.run_canaries(options))
    print(f"{text}\nfigures: {options.out / 'result.json'}")


if __name__ == "__main__":
    run(main, Labels | Misspelling | Canaries)  # type: ignore[arg-type]
