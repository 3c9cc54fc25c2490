"""Answers for a file of notes: phenotypes with their places in the note, diagnoses with their ICD-10-CM codes.

    python -m infer.extract --weights DIR [--adapter DIR] --task both --notes notes.jsonl --out answers.jsonl
    torchrun --nproc-per-node 2 -m infer.extract …            the same job; each process takes notes as it is free

Notes are JSON lines or a CSV table with `id` and `text` (`--id-column`, `--text-column` name others), or a folder of
.txt files. A JSON record may bring `questions` of its own ([{"question": "…"}, …]), which take the place of the task's.
The output holds one JSON object a note in the input's order; its schema is written beside it (OUT.schema.json). The
same command continues a job that was interrupted.

With `--retriever NAME --index DIR` (python -m infer.retrieval.index) the diagnosis question is asked with the nearest
notes of other patients and their diagnoses; the record's `neighbours` are their ids.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from infer.extract.answers import SCHEMA, read_calibration
from infer.extract.job import EPOCH, Job, Unchanged, begun, epochs, mark_of, stamp, tally
from infer.extract.notes import Note, fingerprint, ignored_files, read_notes
from infer.extract.options import AskOptions, planned
from infer.extract.ranks import barrier
from infer.retrieval.repair import read_repair
from model.support.cli import UserError
from model.support.files import read_json, sha256_file, write_json
from model.support.torchrun import rank_and_world

if TYPE_CHECKING:  # they need torch, which --help and a mistake in the options do not
    from infer.engine.memory import Plan
    from infer.extract.ask import Asker
    from infer.retrieval.neighbours import Neighbours


ELSEWHERE = ("out", "json", "encoder_weights")  # options that do not decide the answers, or whose index does


@dataclass(frozen=True)
class Options(AskOptions):
    """Extract phenotypes and diagnoses from notes."""

    notes: Path
    """JSON lines (.jsonl, .jsonl.gz) or a table (.csv) with `id` and `text`, or a folder of .txt files."""
    out: Path
    """JSON lines, one object a note, in the notes' order."""
    text_column: str = "text"
    """The column or field that holds a note's text."""
    id_column: str = "id"
    """The column or field that holds a note's id."""
    task: Literal["phenotype", "diagnosis", "both"] = "both"
    """What is asked: the eight phenotypes, the diagnosis, or both."""
    retriever: Literal["none", "bm25", "contriever", "medcpt", "specter2", "sgpt", "sentence-transformers"] = "none"
    """Show neighbours of the note with its diagnosis question, found by this retriever."""
    index: Path | None = None
    """The retriever's index of training notes (python -m infer.retrieval.index)."""
    encoder_weights: Path | None = None
    """The retriever's encoder folder (none for bm25)."""
    neighbours: int = 3
    """How many neighbours to show, as many as --max-input-tokens allows."""
    neighbour_tokens: int = 64
    """Tokens of each neighbour's text, from its beginning."""
    repair: Path | None = None
    """A lexicon (JSON lines whose `text` is spelled well: training notes): correct the notes' spelling and expand their
    abbreviations before reading them. Answers' places are those of the original note; `repairs` says what changed."""

    json: bool = False
    """Print one JSON object (notes, errors, seconds) as the last line."""


def main(options: Options) -> int:
    rank, world = rank_and_world()
    options.check()
    if options.out.is_dir():
        raise UserError(f"{options.out}: a folder; name the output file")
    neighbours = open_neighbours(options)
    options, plan = planned(options, options.task, begun(options.out), rank, world)
    own = (options.out, schema_of(options.out), mark_of(options.out))
    if os.path.realpath(options.notes) in map(os.path.realpath, own):
        raise UserError(f"{options.notes}: the notes, and a file that --out {options.out} writes; choose another --out")
    if options.out.suffix == ".txt" and os.path.realpath(options.notes) == os.path.realpath(options.out.parent):
        raise UserError(f"{options.out}: would be one of the notes of {options.notes} itself; choose another --out")
    if next(source(options), None) is None:  # before anything is made; it refuses a missing file itself
        raise UserError(f"{options.notes}: holds no note")
    if rank == 0 and options.notes.is_dir() and (rest := ignored_files(options.notes)):
        print(f"{options.notes}: not read: {rest}", file=sys.stderr)
    notes = Unchanged(options.notes)
    job = Job(options.out, identity(options, notes), rank)
    began = time.perf_counter()
    with job.lock():
        check_schema(options.out)
        finished = job.claim()
        if rank == 0:
            write_json(schema_of(options.out), SCHEMA)  # of a finished job too: it may be an older one's
        if not finished:
            barrier(world)
            sizes = extract(options, job, notes, neighbours, plan)
            try:
                barrier(world)
            except RuntimeError as error:  # a process of the others has ended: say which one, by what it had taken
                raise UserError(f"{options.out}: {job.missing(sizes) or 'a process has ended'}") from error
            if rank == 0:
                job.finish(sizes, notes)
            barrier(world)
    if rank != 0:
        return 0
    records, errors = tally(options.out)
    seconds = time.perf_counter() - began
    if options.json:
        print(json.dumps({"notes": records, "errors": errors, "seconds": round(seconds, 2), "out": str(options.out)}))
    else:
        done = "already finished" if finished else f"{seconds:.1f} s"
        print(f"{options.out}: {records} notes, {errors} with an error, {done}")
    return 1 if errors else 0


def schema_of(out: Path) -> Path:
    return out.with_name(out.name + ".schema.json")


def check_schema(out: Path) -> None:
    """Refuse a file in the schema's place that is no job's: it would be overwritten."""
    schema = schema_of(out)
    if not os.path.lexists(schema) or begun(out):
        return
    try:
        same = read_json(schema) == SCHEMA
    except (UserError, OSError):  # no JSON, or a folder
        same = False
    if not same:
        raise UserError(f"{schema}: exists and was not written by a job; choose another --out or remove it")


def source(options: Options) -> Iterator[Note]:
    return islice(read_notes(options.notes, options.text_column, options.id_column), options.limit)


def split(options: Options) -> Iterator[list[Note]]:
    return epochs(source(options), EPOCH * options.batch)


def identity(options: Options, notes: Unchanged) -> dict[str, object]:
    """What decides the output's bytes: models and files by their content, all other options by their value."""
    files: dict[str, object] = {
        "notes": notes.hash,
        "weights": stamp(options.weights),
        "adapter": [stamp(adapter) for adapter in options.adapter],
        "repair": options.repair and fingerprint(options.repair),
        "index": options.index and [str(options.index), sha256_file(options.index / "manifest.json")],
    }
    return {key: value for key, value in vars(options).items() if key not in ELSEWHERE} | files


def open_neighbours(options: Options) -> Neighbours | None:
    """The index of `--retriever`. Raises UserError where the options or the index do not fit together."""
    if options.retriever == "none":
        if options.index is not None or options.encoder_weights is not None:
            raise UserError("--index and --encoder-weights belong to a --retriever; name it (none is chosen)")
        return None
    if options.index is None:
        raise UserError(f"--retriever {options.retriever} needs --index DIR; python -m infer.retrieval.index makes one")
    if options.task == "phenotype":
        raise UserError("neighbours are shown with the diagnosis question; ask with --task diagnosis or both")
    if options.retriever == "bm25" and options.encoder_weights is not None:
        raise UserError("--retriever bm25 has no weights; leave --encoder-weights out")
    from infer.retrieval.index import Index
    from infer.retrieval.neighbours import Neighbours

    index = Index(options.index, options.retriever, options.encoder_weights)
    return Neighbours(index, options.neighbours, options.neighbour_tokens)


def extract(options: Options, job: Job, notes: Unchanged, neighbours: Neighbours | None, plan: Plan) -> list[int]:
    """Answer what is not yet answered, with the other processes. Returns how many notes each epoch has."""
    from infer.engine.generate import generator_for
    from infer.extract.ask import Asker, form_for

    sizes = [len(epoch) for epoch in split(options)]
    done = job.done(sizes)
    repair = None if options.repair is None else read_repair(options.repair)
    generator = generator_for(options, plan)
    form = form_for(generator.tokenizer, options.adapter) if options.form == "auto" else options.form
    if form not in ("template", "chat"):
        generator.tokenizer.form, form = form, "chat"
    batch = begun(options.out).get("batch now", options.batch)
    how = (options.long, options.grounded, neighbours, batch, repair, read_calibration(options.adapter))
    asker = Asker(generator, options.task, form, options.limits, *how, options.alternatives)
    shown = {"total": sum(sizes), "initial": sum(sizes[epoch] for epoch in done), "unit": "note", "desc": "extracting"}
    with tqdm(disable=None if job.rank == 0 else True, **shown) as bar:
        for epoch, held in enumerate(split(options)):
            if epoch not in done and job.take(epoch):
                records = answered(asker, held, job, bar)
                notes.check()
                job.write(epoch, records)
            elif epoch not in done:
                bar.update(len(held))
    if neighbours is not None and neighbours.index.cut:
        print(
            f"{neighbours.index.cut} notes are longer than {options.retriever} reads; their beginnings were searched",
            file=sys.stderr,
        )
    return sizes


def answered(asker: Asker, notes: list[Note], job: Job, bar: tqdm[Any]) -> list[dict[str, Any]]:
    """An epoch's records. Where a device's memory is not enough, again with half as many notes at once, from then on:
    another number of rows rounds differently, so the job's file records it."""
    import torch

    while True:
        before = bar.n
        try:
            return asker.records(notes, bar.update)
        except torch.OutOfMemoryError as error:
            if asker.batch == 1:
                raise UserError("the device's memory is not enough for one note; give --format int8 or int4") from error
        bar.n = before
        torch.cuda.empty_cache()
        asker.batch //= 2
        job.remember("batch now", asker.batch)
        print(f"out of the device's memory: {asker.batch} notes at once from here on", file=sys.stderr)
