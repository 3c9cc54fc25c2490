"""Generates synthetic cancer notes with their annotations (no open corpus matches the two tasks).

    python -m train.clinic --patients 300 --seed 0 --out runs/clinic

Files in `--out`, byte-identical for the same options:

    train, valid, heldout.jsonl   annotated notes in the training styles, split by patient; train also has the
                                  `--clinical` notes (clinical.py)
    unseen.jsonl                  other patients, in styles and wordings that training has not seen
    pretrain.jsonl                plain text: the training notes, notes of further patients, MTS-Dialog sections
    pretrain_valid.jsonl          plain text, for held-out bits per byte
    general.jsonl                 plain text: MTS-Dialog and notes of people without cancer
    manifest.json                 the options, counts and each file's SHA-256

An annotated note is {"id", "patient", "style", "text", "phenotypes", "diagnosis"}. `phenotypes` has all eight names of
infer.tasks.PHENOTYPES, each with a list of {"text", "start", "end"}; an empty list means "not relevant". For the
open ones (size, site, histology, stage) text is note[start:end]; for the closed ones text is a value of the closed list
and note[start:end] the words that state it. `diagnosis` is {"text", "code"}: the ICD-10-CM description and code.

Annotation rules. They determine every answer from the note's text:

- The *index cancer* is the one that the note is about. A relative's cancer, an earlier or other cancer of the patient,
  a benign lesion and a diagnosis that was considered and rejected are never answers.
- tumor_size: the index tumour's size as written, all dimensions and the unit. The pathologist's beats imaging, the
  latest beats an older one, and of several index tumours the largest counts. Not: margins, nodes, specimens, scars.
- tumor_site: the most specific place of the index tumour as written, without its side ("upper lobe"); the organ where
  nothing more is said. A thyroid or prostate lobe is a side, not a site. Abbreviations that fuse both ("LUL") count
  whole. A leukemia has none.
- tumor_laterality: the index tumour's side where the note gives one: left, right or bilateral.
- histological_type: the index tumour's type as written. In situ components and background changes are not it.
- cancer_grade: well or low = 1, moderate or intermediate = 2, poor or high = 3; Nottingham, FIGO, WHO and Fuhrman or
  ISUP nuclear grades by number; for the prostate the grade group (3+3 = 1, 3+4 = 2, 4+3 = 3, 8 = 4; the clinic has no
  group 5, which the closed list could not answer). A resection beats the biopsy. Not: toxicity, regression,
  dysplasia.
- cancer_stage: the stage group without the word "stage" where one is given, else T, N and M as written. The
  pathologic or final one beats an earlier clinical one. Not: kidney disease, pressure injuries, other cancers.
- hormone_receptor_type: those of ER, PR and HER2 with a result for the index tumour; one that is pending or missing is
  left out. hormone_receptor_status: each result. HER2 0 or 1+ is negative, 3+ or amplified positive, 2+ equivocal
  unless in-situ hybridisation decides it.
- diagnosis: the most specific ICD-10-CM code that the note supports; what it does not say is "unspecified".

Only in pretrain.jsonl do notes (those of further patients) end in their encounter diagnosis with its code, so that
continued pre-training can teach the codes; annotated notes never contain one. Of the training notes two in five have a
wording drawn by varied.py, and three in ten are in capitals, because one of the four unseen styles is. No note of valid
or heldout is either.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from infer.tasks import PHENOTYPES
from model.support.cli import UserError
from model.support.files import atomic_folder, read_jsonl, sha256_file, write_json, write_jsonl
from model.support.lock import output
from train.clinic.clinical import MTS_DIALOG, clinical_notes
from train.clinic.general import general_note
from train.clinic.notes import write_note
from train.clinic.patients import Case, draw_case, quantile
from train.clinic.terms import TRAINING, UNSEEN, Source, Style
from train.clinic.varied import varied

SHARES = {"train": 0.64, "valid": 0.06, "heldout": 0.15, "unseen": 0.15}
CODED = 1.0  # share of the further patients' notes that end in their encounter diagnosis
VARIED = 0.4  # share of the training notes whose wording is drawn (varied.py)
CAPITALS = 0.3  # share of the training notes in capitals, as some record systems print them


@dataclass(frozen=True)
class Options:
    """Generate synthetic cancer notes, their annotations, and text for pre-training."""

    out: Path
    """Folder for the files."""
    overwrite: bool = False
    """Write even if the folder is not empty."""
    patients: int = 300
    """Number of annotated patients, one to three notes each: 64 % train, 6 % valid, 15 % heldout, 15 % unseen."""
    seed: int = 0
    """Random seed; the same options give the same bytes."""
    further_patients: int = 600
    """Number of other patients, whose notes are text for continued pre-training."""
    clinical: int = 0
    """Number of further training notes in the manner of real clinic notes (clinical.py), one in ten without cancer."""
    healthy: int = 600
    """Number of notes of people without cancer in general.jsonl."""

    def __post_init__(self) -> None:
        if self.patients < 20:
            raise UserError(f"--patients {self.patients}: at least 20, so that every split holds some")
        if min(self.further_patients, self.clinical, self.healthy) < 0:
            raise UserError("--further-patients, --clinical and --healthy must not be negative")


def styles_for(case: Case, styles: tuple[Style, ...], rng: random.Random, count: int) -> list[Style]:
    """At most `count` different styles that suit the case (no surgical pathology without surgery)."""
    fit = [style for style in styles if case.cancer.surgical or not style.pathology]
    return rng.sample(fit, min(count, len(fit)))


def patient_notes(series: str, number: int, seed: int, source: Source = TRAINING, vary: bool = False) -> Iterator[dict]:
    """The annotated notes of patient `number` of a series ("p" or "x"), a function of these two and the seed.

    `vary`: the share VARIED of them has a wording drawn by varied.py.
    """
    patient = f"{series}{number:05d}"
    rng = random.Random(f"{seed}/{patient}")
    case = draw_case(rng, quantile(number, random.Random(f"{seed}/{series}").random()))
    for number, style in enumerate(styles_for(case, source.styles, rng, rng.choice((1, 1, 2, 3))), start=1):
        if vary and rng.random() < VARIED:
            style = varied(case.cancer.surgical, rng)
        text, truth = write_note(case, style, source.world, rng)
        yield {"id": f"{patient}-n{number}", "patient": patient, "style": style.name, "text": text, **truth}


def some_in_capitals(notes: Iterable[dict], seed: int) -> Iterator[dict]:
    """Puts the share CAPITALS of the notes in capitals: a model trained on none of these can hardly read them.

    The choice is a function of (seed, note id). Spans are unchanged; open answers are in capitals too.
    """
    for note in notes:
        if random.Random(f"{seed}/capitals/{note['id']}").random() < CAPITALS:
            text = note["text"].upper()
            assert len(text) == len(note["text"]), note["id"]
            phenotypes = {name: in_capitals(name, answers) for name, answers in note["phenotypes"].items()}
            note = note | {"text": text, "phenotypes": phenotypes}
        yield note


def in_capitals(name: str, answers: list[dict]) -> list[dict]:
    """A phenotype's answers in capitals; values of a closed list are unchanged."""
    return answers if PHENOTYPES[name].values else [answer | {"text": answer["text"].upper()} for answer in answers]


def annotated(options: Options) -> dict[str, list[dict]]:
    """The four annotated splits: ranges of consecutive patients, each with the cancers in their proportions."""
    splits: dict[str, list[dict]] = {}
    bar = tqdm(total=options.patients, desc="patients", unit="patient", disable=None)
    start = 0
    for split, share in SHARES.items():
        end = options.patients if split == "unseen" else start + max(1, round(share * options.patients))
        splits[split] = []
        source = UNSEEN if split == "unseen" else TRAINING
        for number in range(start, end):
            notes = patient_notes("p", number, options.seed, source, vary=split == "train")
            splits[split].extend(some_in_capitals(notes, options.seed) if split == "train" else notes)
            bar.update()
        start = end
    bar.close()
    splits["train"].extend(clinical_notes(options.clinical, options.seed))
    return splits


def further_notes(options: Options) -> Iterator[dict]:
    """Notes of patients outside the annotated files, the share CODED of them with its encounter diagnosis appended."""
    rng = random.Random(f"{options.seed}/coded")
    for number in range(options.further_patients):
        for note in some_in_capitals(patient_notes("x", number, options.seed, vary=True), options.seed):
            text = note["text"]
            if rng.random() < CODED:
                label = rng.choice(("Encounter diagnosis", "ICD-10-CM", "Billing diagnosis", "Visit diagnosis"))
                text += f"\n{label}: {note['diagnosis']['text']} ({note['diagnosis']['code']})"
            yield {"id": note["id"], "patient": note["patient"], "text": text}


def documents(options: Options, train: list[dict]) -> dict[str, list[dict]]:
    """The three files of plain text. Every twentieth further patient and MTS-Dialog section is held out."""
    mts = [{"id": row["id"], "patient": row["id"], "text": row["text"]} for _, row in read_jsonl(MTS_DIALOG)]
    notes = list(further_notes(options))
    valid_patients = {f"x{number:05d}" for number in range(0, options.further_patients, 20)}
    valid_mts, train_mts = mts[::20], [row for index, row in enumerate(mts) if index % 20]
    pretrain = [{"id": note["id"], "patient": note["patient"], "text": note["text"]} for note in train]
    pretrain += [note for note in notes if note["patient"] not in valid_patients]
    pretrain += train_mts
    valid = [note for note in notes if note["patient"] in valid_patients] + valid_mts
    rng = random.Random(f"{options.seed}/general")
    general = list(train_mts)
    for number in range(options.healthy):
        name = f"g{number:05d}"
        general.append({"id": f"{name}-n1", "patient": name, "text": general_note(rng)})
    rng.shuffle(pretrain)
    rng.shuffle(general)
    return {"pretrain": pretrain, "pretrain_valid": valid, "general": general}


def main(options: Options) -> None:
    with output(options.out, options.overwrite), atomic_folder(options.out, keep_others=True) as folder:
        counts = write_files(options, folder)
    print(f"{options.out}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


def write_files(options: Options, folder: Path) -> dict[str, int]:
    """Writes all files and the manifest. Returns the number of records of each file."""
    splits = annotated(options)
    files = splits | documents(options, splits["train"])
    counts = {name: write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in files.items()}
    made_of = {name: value for name, value in vars(options).items() if name not in ("out", "overwrite")}
    hashes = {name: sha256_file(folder / f"{name}.jsonl") for name in files}
    write_json(folder / "manifest.json", {**made_of, "records": counts, "sha256": hashes})
    return counts
