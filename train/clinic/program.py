"""The clinic: synthetic cancer notes with their truth, because no open corpus matches the two tasks.

    python -m train.clinic --patients 300 --seed 0 --out runs/clinic

writes into `--out`, the same bytes for the same options:

    train, valid, heldout.jsonl   annotated notes in the training styles; a patient's notes stay in one file; train
                                  also holds `--clinical` notes as clinics write them (clinical.py)
    unseen.jsonl                  other patients, in styles and wordings that training never saw
    pretrain.jsonl                text alone: the training notes, notes of further patients, MTS-Dialog sections
    pretrain_valid.jsonl          text alone, for held-out bits per byte
    general.jsonl                 text alone: MTS-Dialog and notes of people without cancer
    manifest.json                 the options, counts and each file's SHA-256

An annotated note is {"id", "patient", "style", "text", "phenotypes", "diagnosis"}. `phenotypes` has all eight names of
infer.tasks.PHENOTYPES, each with a list of {"text", "start", "end"}; an empty list means "not relevant". For the
open ones (size, site, histology, stage) text is note[start:end]; for the closed ones text is a value of the closed list
and note[start:end] the words that show it. `diagnosis` is {"text", "code"}: the ICD-10-CM description and code.

The annotation rules, by which every note can be decided from its text alone:

- The *index cancer* is the one that the note is about. A relative's cancer, an earlier or other cancer of the patient,
  a benign lesion and a diagnosis that was considered and dropped are never answers.
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

Only in pretrain.jsonl notes (those of further patients) end in their encounter diagnosis with its code, as clinic notes
do: that is what continued pre-training can teach. The annotated notes never show a code. Of the notes to train on two
in five draw their wording from varied.py, and no other annotated note does; three in ten are printed in
capitals, because one of the four unseen styles is wholly in capitals, and no note of valid and heldout is.
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
VARIED = 0.4  # share of the notes to train on whose very wording is drawn (varied.py)
CAPITALS = 0.3  # share of the notes to train on that are printed in capitals, as some record systems print everything


@dataclass(frozen=True)
class Options:
    """Write the clinic's synthetic notes, their truth and the text for pre-training."""

    out: Path
    """Folder for the files."""
    overwrite: bool = False
    """Write although the folder is not empty."""
    patients: int = 300
    """Annotated patients: 64 % to train, 6 % to valid, 15 % each to heldout and unseen; one to three notes each."""
    seed: int = 0
    """Seed of everything that is drawn: the same seed gives the same bytes."""
    further_patients: int = 600
    """Patients outside all annotated files whose notes are text for continued pre-training."""
    clinical: int = 0
    """Notes to train on that are written as clinics write (clinical.py), one in ten without cancer."""
    healthy: int = 600
    """Notes of people without cancer in general.jsonl."""

    def __post_init__(self) -> None:
        if self.patients < 20:
            raise UserError(f"--patients {self.patients}: at least 20, so that every split holds some")
        if min(self.further_patients, self.clinical, self.healthy) < 0:
            raise UserError("--further-patients, --clinical and --healthy must not be negative")


def styles_for(case: Case, styles: tuple[Style, ...], rng: random.Random, count: int) -> list[Style]:
    """`count` different styles that suit the case (no surgical pathology where nothing is cut out)."""
    fit = [style for style in styles if case.cancer.surgical or not style.pathology]
    return rng.sample(fit, min(count, len(fit)))


def patient_notes(series: str, number: int, seed: int, source: Source = TRAINING, vary: bool = False) -> Iterator[dict]:
    """The annotated notes of patient `number` of a series ("p" or "x"), drawn from the seed and these two alone.
    `vary`: some of them in a wording of their own."""
    patient = f"{series}{number:05d}"
    rng = random.Random(f"{seed}/{patient}")
    case = draw_case(rng, quantile(number, random.Random(f"{seed}/{series}").random()))
    for number, style in enumerate(styles_for(case, source.styles, rng, rng.choice((1, 1, 2, 3))), start=1):
        if vary and rng.random() < VARIED:
            style = varied(case.cancer.surgical, rng)
        text, truth = write_note(case, style, source.world, rng)
        yield {"id": f"{patient}-n{number}", "patient": patient, "style": style.name, "text": text, **truth}


def printed(notes: Iterable[dict], seed: int) -> Iterator[dict]:
    """Some of the notes in capitals: a model that met none reads hardly any. Places stay; open answers are capitals
    too, since they are the note's own words. A function of (seed, the note's id)."""
    for note in notes:
        if random.Random(f"{seed}/capitals/{note['id']}").random() < CAPITALS:
            text = note["text"].upper()
            assert len(text) == len(note["text"]), note["id"]
            found = {name: capitals(name, answers) for name, answers in note["phenotypes"].items()}
            note = note | {"text": text, "phenotypes": found}
        yield note


def capitals(name: str, answers: list[dict]) -> list[dict]:
    """A phenotype's answers about a note in capitals; a value of a closed list stays as it is."""
    return answers if PHENOTYPES[name].values else [answer | {"text": answer["text"].upper()} for answer in answers]


def annotated(options: Options) -> dict[str, list[dict]]:
    """The four annotated splits: runs of consecutive patients, each with the cancers in their proportions."""
    splits: dict[str, list[dict]] = {}
    bar = tqdm(total=options.patients, desc="patients", unit="patient", disable=None)
    start = 0
    for split, share in SHARES.items():
        end = options.patients if split == "unseen" else start + max(1, round(share * options.patients))
        splits[split] = []
        source = UNSEEN if split == "unseen" else TRAINING
        for number in range(start, end):
            notes = patient_notes("p", number, options.seed, source, vary=split == "train")
            splits[split].extend(printed(notes, options.seed) if split == "train" else notes)
            bar.update()
        start = end
    bar.close()
    splits["train"].extend(clinical_notes(options.clinical, options.seed))
    return splits


def further_notes(options: Options) -> Iterator[dict]:
    """Text of patients outside the annotated files, some with their encounter diagnosis below."""
    rng = random.Random(f"{options.seed}/coded")
    for number in range(options.further_patients):
        for note in printed(patient_notes("x", number, options.seed, vary=True), options.seed):
            text = note["text"]
            if rng.random() < CODED:
                label = rng.choice(("Encounter diagnosis", "ICD-10-CM", "Billing diagnosis", "Visit diagnosis"))
                text += f"\n{label}: {note['diagnosis']['text']} ({note['diagnosis']['code']})"
            yield {"id": note["id"], "patient": note["patient"], "text": text}


def documents(options: Options, train: list[dict]) -> dict[str, list[dict]]:
    """The three files of text alone. Every twentieth further patient and MTS-Dialog section is held out."""
    mts = [{"id": row["id"], "patient": row["id"], "text": row["text"]} for _, row in read_jsonl(MTS_DIALOG)]
    notes = list(further_notes(options))
    held_patients = {f"x{number:05d}" for number in range(0, options.further_patients, 20)}
    held_mts = {row["id"] for row in mts[::20]}
    pretrain = [{"id": note["id"], "patient": note["patient"], "text": note["text"]} for note in train]
    pretrain += [note for note in notes if note["patient"] not in held_patients]
    pretrain += [row for row in mts if row["id"] not in held_mts]
    valid = [note for note in notes if note["patient"] in held_patients] + [row for row in mts if row["id"] in held_mts]
    rng = random.Random(f"{options.seed}/general")
    general = [row for row in mts if row["id"] not in held_mts]
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
    """The files of all splits and their manifest; returns how many records each holds."""
    splits = annotated(options)
    files = splits | documents(options, splits["train"])
    counts = {name: write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in files.items()}
    write_json(
        folder / "manifest.json",
        {
            "seed": options.seed,
            "patients": options.patients,
            "further_patients": options.further_patients,
            "clinical": options.clinical,
            "healthy": options.healthy,
            "records": counts,
            "sha256": {name: sha256_file(folder / f"{name}.jsonl") for name in files},
        },
    )
    return counts
