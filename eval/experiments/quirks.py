"""The cost of each quirk of the paper's released scripts: one command, everything from nothing, at nano scale.

    python -m eval.experiments.quirks --out runs/quirks          # `--scale tiny` proves in half a minute that it runs

A nano Mistral is trained on general clinical text. Then the sound way and each quirk, switched on alone, train on the
same records for the same steps: continued pre-training (texts run together without a mask), tuning (instruction before
the note, loss on the prompt too, no end-of-text token, NF4 base, 8-bit AdamW, clipping at 0.3), and all of tuning's
together. Every adapter is evaluated alike: −log p of the held-out answers and their end, exact match and share of
answers that stop, under greedy decoding of the form that it was trained on. The leak meter changes each document of a
packed row in turn and reads how far the logits of the others move. Scoring's quirk is evaluated on the sound answers.

Where questions do not share a note's row (the instruction first), a step has as many tokens, so fewer questions.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from eval.experiments.steps import RECIPES, Run, begin, check_folder
from eval.metrics import score
from model.support.cli import UserError, run
from model.support.files import read_jsonl, write_json


@dataclass(frozen=True)
class Options:
    """Train with and without each quirk of the paper's scripts and print what it costs."""

    out: Path = Path("runs/quirks")
    """The run's folder; an interrupted run continues."""
    scale: Literal["nano", "tiny"] = "nano"
    """nano: minutes on two cores. tiny: the same steps in half a minute; its figures mean nothing."""
    overwrite: bool = False
    """Remove the run that is there, and begin again."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    patients: int
    texts: int
    base_steps: int
    further_steps: int
    tune_steps: int
    batch: int
    notes: int
    vocab: int
    block: int
    records: int = 0
    """Of each file (0: all)."""


SIZES = {
    "nano": Size(
        patients=400,
        texts=500,
        base_steps=120,
        further_steps=60,
        tune_steps=80,
        batch=4,
        notes=16,
        vocab=2048,
        block=1024,
    ),
    "tiny": Size(
        patients=20,
        texts=20,
        base_steps=2,
        further_steps=2,
        tune_steps=2,
        batch=2,
        notes=2,
        vocab=512,
        block=2048,
        records=60,
    ),
}
SOUND = "sound"
FURTHER = {SOUND: {}, "texts run together": {"packing": "concatenate"}}
TUNING: dict[str, dict[str, Any]] = {
    SOUND: {},
    "instruction first": {"template": "faithful", "share_prefix": False},
    "loss on the prompt too": {"loss_on": "all"},
    "no end-of-text": {"append_eos": False},
    "NF4 base": {"base": "nf4"},
    "8-bit AdamW": {"optimizer": "adamw8bit"},
    "clipping at 0.3": {"clip": 0.3},
}
TUNING["all of tuning's"] = {key: value for values in TUNING.values() for key, value in values.items()}
ROWS_A_NOTE = 2  # rows of one question each that have about as many tokens as a note with all of its questions


def name_of(stage: str, quirk: str) -> str:
    return f"{stage}-{quirk.replace(' ', '-').replace(chr(39), '')}"


def prepare(run: Run, scale: str, size: Size) -> None:
    """Data, tokenizer and the base of all adapters."""
    data = run.out / "data"
    run.step(
        "clinic",
        [
            "train.clinic",
            "--out",
            str(data),
            "--patients",
            str(size.patients),
            "--seed",
            "3",
            "--further-patients",
            str(size.texts),
            "--healthy",
            str(size.texts),
            "--overwrite",
        ],
    )
    texts = [str(data / "general.jsonl"), str(data / "pretrain.jsonl")]
    run.step(
        "tokenizer",
        [
            "train.data.tokenizer",
            "--texts",
            *texts,
            "--vocab",
            str(size.vocab),
            "--out",
            str(run.out / "tokenizer"),
            "--overwrite",
        ],
    )
    run.step(
        "base",
        lambda: trained(
            "pretrain",
            f"{scale}-base",
            {
                "init": str(RECIPES / f"{scale}.json"),
                "tokenizer": str(run.out / "tokenizer"),
                "data": tuple(texts),
                "out": str(run.out / "base"),
                "warmup": 1,
                "steps": size.base_steps,
                "records": size.records,
            },
        ),
    )


def trained(stage: str, recipe: str, options: dict[str, Any]) -> None:
    from train.recipe import Recipe, read_toml
    from train.session import train

    train(Recipe(**{**read_toml(RECIPES / f"{recipe}.toml"), **options}), stage)


def adapter(run: Run, stage: str, scale: str, size: Size, quirk: str, changed: dict[str, Any]) -> None:
    """Train one adapter; the recipe is the demo's of this scale, but for the sizes and the quirk."""
    pretrain, folder = stage == "pretrain", run.out / "data"
    # the note's own loss is always off: with the instruction first a row has no note separate from its question
    data = "pretrain" if pretrain else "train"
    rows = size.batch * (1 if changed.get("share_prefix", True) else ROWS_A_NOTE)
    run.step(
        f"{stage}: {quirk}",
        lambda: trained(
            stage,
            f"{scale}-{stage}",
            {
                "weights": str(run.out / "base" / "model"),
                "data": (str(folder / f"{data}.jsonl"),),
                "records": size.records,
                "out": str(run.out / name_of(stage, quirk)),
                "batch_rows": rows,
                "micro_rows": 1,
                "block": size.block,
                "steps": size.further_steps if pretrain else size.tune_steps,
                "warmup": 1,
                "packing": "documents" if pretrain else "none",
                "note_loss": 0.0,
                **changed,
            },
        ),
    )


def loaded(run: Run, stage: str, quirk: str, base: str = "") -> Any:
    from lora import load_adapter
    from lora.quantized import quantize_base
    from model import Transformer

    model = load_adapter(
        Transformer.from_pretrained(run.out / "base" / "model"), run.out / name_of(stage, quirk) / "adapter"
    )
    return (quantize_base(model, base) if base else model).use_attention("fast").eval()


def held_out(run: Run, stage: str, size: Size, quirk: str, changed: dict[str, Any], model: Any) -> dict[str, float]:
    """−log p a token of the held-out texts, or of the held-out answers and their end, in the adapter's own form."""
    from train.data.dataset import Rows
    from train.data.rows import ANSWER, collate, count
    from train.data.store import Encoding, build_store
    from train.loss import batch_loss
    from train.recipe import Recipe

    form = {key: changed[key] for key in ("template", "share_prefix") if key in changed}
    recipe = Recipe(
        data=("x",),
        out="x",
        weights="x",
        block=size.block,
        packing="documents" if stage == "pretrain" else "none",
        **form,
    )
    source = run.out / "data" / f"{'pretrain_valid' if stage == 'pretrain' else 'heldout'}.jsonl"
    encoding = Encoding(stage, str(run.out / "base" / "model"), recipe.template)
    store = build_store([str(source)], encoding, run.out / "valid" / f"{stage}-{recipe.template}", 2 * size.notes)
    rows = Rows(store, recipe, stage)
    total, targets = 0.0, 0
    with torch.no_grad():
        for row in (rows[i] for i in range(len(rows))):
            counts = count([row])
            total += float(batch_loss(model, collate([row]), counts)[1])
            targets += counts[ANSWER]
    return {"held_out_loss": total / targets}


def answered(run: Run, size: Size, changed: dict[str, Any], model: Any) -> dict[str, Any]:
    """Greedy answers to the held-out notes' questions: exact match, the share that stops, and the answers."""
    from infer import Generator, tasks
    from model import Tokenizer
    from train.data.records import note_pieces, questions

    tokenizer = Tokenizer.from_pretrained(run.out / "base" / "model")
    encode = note_pieces(tokenizer, changed.get("template", "note-first"), "phenotype", True)
    prompts, golds = [], []
    for _, record in list(read_jsonl(run.out / "data" / "heldout.jsonl"))[: size.notes]:
        pieces = encode(record)
        prompts += [[*map(int, pieces[0]), *map(int, prompt)] for prompt in pieces[1::2]]
        golds += [tasks.parse_answer(answer) for _, answer in questions(record, "phenotype")]
    made, generator = [], Generator(model, tokenizer)
    for start in range(0, len(prompts), 8):
        made += generator.generate(prompts[start : start + 8], max_new_tokens=24, temperature=0.0)
    # an empty output is no answer: only the words "not relevant" say that the note has none
    given = [tasks.parse_answer(one.text) if one.text.strip() else ["(no answer)"] for one in made]
    right = [set(a) == set(b) for a, b in zip(given, golds, strict=True)]
    stopped = [one.finish_reason == "stop" for one in made]
    return {
        "exact_match": sum(right) / len(right),
        "stops": sum(stopped) / len(stopped),
        "questions": len(right),
        "not_relevant": sum(not gold for gold in golds) / len(golds),
        "answers": given,
        "golds": golds,
    }


def moved(model: Any, row: Any, words: int) -> list[float]:
    """For each document of a row: the largest change of a logit of the others when it is another text."""
    from train.data.rows import collate

    batch, start, found = collate([row]), 0, []
    positions, layout = batch.positions, batch.layout
    with torch.no_grad():
        before = model(batch.tokens, positions=positions, layout=layout)
        for _, _, length in (stretch for unit in row.units for stretch in unit.stretches):
            other, own = batch.tokens.clone(), slice(start, start + length)
            other[0, own] = (other[0, own] + 1) % words
            change_TV = (model(other, positions=positions, layout=layout) - before)[0].abs()
            change_TV[own] = 0.0
            found.append(float(change_TV.max()))
            start += length
    return found


def leak(run: Run, size: Size, quirk: str, changed: dict[str, Any], model: Any) -> float:
    """How far a row's other documents move, at most: by the plain blocks, then by those that train, which stay."""
    from train.data.dataset import Rows
    from train.data.store import TokenStore
    from train.fast.block import training_blocks
    from train.recipe import Recipe

    together = changed.get("packing") == "concatenate"
    store = TokenStore(run.out / name_of("pretrain", quirk) / "tokens" / "train")
    recipe = Recipe(
        data=("x",), out="x", weights="x", block=size.block, packing="concatenate" if together else "documents"
    )
    rows = Rows(store, recipe, "pretrain")
    several = (row for row in (rows[i] for i in range(len(rows))) if sum(len(unit.stretches) for unit in row.units) > 1)
    row = next(several, None)
    if row is None:
        raise UserError(f"{store.path}: no row of {size.block} tokens has two texts")
    return max(moved(model, row, size.vocab) + moved(training_blocks(model), row, size.vocab))


def scoring(answers: list[list[str]], golds: list[list[str]]) -> dict[str, float]:
    """Exact-match F1 of the same answers under the sound scorer and under the paper's."""
    given, right = [", ".join(one) for one in answers], [", ".join(one) for one in golds]
    return {preset: score(given, right, preset).exact_match.f1 for preset in ("clinical", "cancerllm")}


def measure(run: Run, size: Size) -> dict[str, Any]:
    found: dict[str, Any] = {"pretrain": {}, "instruct": {}}
    for quirk, changed in FURTHER.items():
        model = loaded(run, "pretrain", quirk)
        found["pretrain"][quirk] = {
            **held_out(run, "pretrain", size, quirk, {}, model),
            "leak": leak(run, size, quirk, changed, model),
        }
    for quirk, changed in TUNING.items():
        model = loaded(run, "instruct", quirk, changed.get("base", ""))
        found["instruct"][quirk] = {
            **held_out(run, "instruct", size, quirk, changed, model),
            **answered(run, size, changed, model),
        }
    sound = found["instruct"][SOUND]
    found["scoring"] = scoring(sound["answers"], sound["golds"])
    for entry in found["instruct"].values():
        del entry["answers"], entry["golds"]
    return found


def table(found: dict[str, Any]) -> str:
    lines = [f"{'continued pre-training':26} {'held-out loss':>14} {'cost':>8} {'leak':>10}"]
    sound = found["pretrain"][SOUND]
    for quirk, entry in found["pretrain"].items():
        cost = entry["held_out_loss"] - sound["held_out_loss"]
        lines.append(f"{quirk:26} {entry['held_out_loss']:14.4f} {cost:+8.4f} {entry['leak']:10.3g}")
    lines += ["", f"{'tuning':26} {'held-out loss':>14} {'cost':>8} {'exact match':>12} {'cost':>7} {'stops':>7}"]
    sound = found["instruct"][SOUND]
    for quirk, entry in found["instruct"].items():
        cost, lost = entry["held_out_loss"] - sound["held_out_loss"], sound["exact_match"] - entry["exact_match"]
        lines.append(
            f"{quirk:26} {entry['held_out_loss']:14.4f} {cost:+8.4f} {entry['exact_match']:12.1%} "
            f"{lost:+7.1%} {entry['stops']:7.1%}"
        )
    floor = f'({sound["questions"]} questions; answering all "not relevant" matches {sound["not_relevant"]:.1%})'
    clinical, paper = found["scoring"]["clinical"], found["scoring"]["cancerllm"]
    return "\n".join(
        [
            *lines,
            floor,
            "",
            f"scoring, exact-match F1 of the sound answers: {clinical:.1f} as defined, "
            f"{paper:.1f} by the paper's scorer ({paper - clinical:+.1f})",
        ]
    )


def main(options: Options) -> int:
    check_folder()
    size = SIZES[options.scale]
    made_of = {"scale": options.scale, "size": vars(size), "tuning": TUNING}
    with begin(options.out, made_of, "quirks.json", options.overwrite) as run:
        prepare(run, options.scale, size)
        for quirk, changed in FURTHER.items():
            adapter(run, "pretrain", options.scale, size, quirk, changed)
        for quirk, changed in TUNING.items():
            adapter(run, "instruct", options.scale, size, quirk, changed)
        found = measure(run, size)
        found["seconds"], found["scale"] = run.took(), options.scale
        write_json(options.out / "quirks.json", found)
    print(json.dumps(found, indent=2) if options.json else table(found))
    print(f"{run.took() / 60:.1f} minutes of training; {options.out / 'quirks.json'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main, Options)
