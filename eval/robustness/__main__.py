"""Robustness experiments, one command each; an interrupted run continues:

    python -m eval.robustness labels --weights W --recipe R.toml --data train.jsonl --notes heldout.jsonl --out DIR
    python -m eval.robustness misspelling --weights W --adapter A --notes heldout.jsonl --lexicon train.jsonl --out DIR
    python -m eval.robustness canaries --weights W --recipe R.toml --data pretrain.jsonl --out DIR

The figures are in DIR/result.json, which eval.report shows (run.json's "wrong_labels", "misspelling", "canaries").
"""

from __future__ import annotations

from eval.robustness import run_canaries, run_labels, run_misspelling
from eval.robustness.run_canaries import Canaries
from eval.robustness.run_labels import Labels
from eval.robustness.run_misspelling import Misspelling
from model.support.cli import run


def main(options: Labels | Misspelling | Canaries) -> None:
    if isinstance(options, Labels):
        text = run_labels.format_result(run_labels.run_labels(options))
    elif isinstance(options, Misspelling):
        text = run_misspelling.format_result(run_misspelling.run_misspelling(options))
    else:
        text = run_canaries.format_result(run_canaries.run_canaries(options))
    print(f"{text}\nfigures: {options.out / 'result.json'}")


if __name__ == "__main__":
    run(main, Labels | Misspelling | Canaries)  # type: ignore[arg-type]
