"""The clinic's files: truth that stands in the text, patients in one split, the same bytes for the same seed."""

import re
import resource
import statistics
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from infer.codes import CODES, is_billable
from infer.tasks import PHENOTYPES
from model.support.cli import UserError
from model.support.files import read_json, read_jsonl
from train.clinic import program as clinic
from train.clinic.program import Options, annotated, main
from train.clinic.terms import CANCERS, UNSEEN

ANNOTATED = ("train", "valid", "heldout", "unseen")
TEXTS = ("pretrain", "pretrain_valid", "general")
PAGE = (Path(clinic.__file__).parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("clinic")
    main(Options(out=out, patients=240, seed=3, further_patients=60, healthy=20))
    return out


@pytest.fixture(scope="module")
def files(folder):
    return {name: [row for _, row in read_jsonl(folder / f"{name}.jsonl")] for name in ANNOTATED + TEXTS}


@pytest.fixture(scope="module")
def notes(files):
    return [note for name in ANNOTATED for note in files[name]]


def grams(text, n=8):
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_open_answers_are_spans_of_the_note_and_closed_ones_have_evidence(notes):
    for note in notes:
        assert list(note["phenotypes"]) == list(PHENOTYPES)
        for name, found in note["phenotypes"].items():
            for answer in found:
                evidence = note["text"][answer["start"] : answer["end"]]
                assert evidence.strip() == evidence != "" and "," not in answer["text"], note["id"]
                if PHENOTYPES[name].values:
                    assert answer["text"] in PHENOTYPES[name].values
                else:
                    assert evidence == answer["text"] and len(found) == 1


def test_receptor_types_are_those_that_have_a_status(notes):
    for note in notes:
        types = [answer["text"] for answer in note["phenotypes"]["hormone_receptor_type"]]
        states = [re.split(r"[+\- ]", answer["text"])[0] for answer in note["phenotypes"]["hormone_receptor_status"]]
        assert types == states


def test_diagnoses_are_billable_and_hardly_ever_verbatim(notes):
    verbatim = 0
    for note in notes:
        code = note["diagnosis"]["code"]
        assert is_billable(code) and note["diagnosis"]["text"] == CODES[code]
        assert code.lower() not in note["text"].lower() or "." not in code
        verbatim += note["diagnosis"]["text"].lower() in note["text"].lower()
    assert verbatim < 0.05 * len(notes)


def test_patients_stay_in_one_split_and_ids_are_unique(files, notes):
    home = {name: {note["patient"] for note in files[name]} for name in ANNOTATED}
    assert sum(len(patients) for patients in home.values()) == len(set().union(*home.values())) == 240
    assert len({note["id"] for note in notes}) == len(notes)
    tested = home["valid"] | home["heldout"] | home["unseen"]
    for name in TEXTS:
        assert not tested & {row["patient"] for row in files[name]}
    pretrained = {row["patient"] for row in files["pretrain"]} | {row["patient"] for row in files["general"]}
    assert not pretrained & {row["patient"] for row in files["pretrain_valid"]}


def test_one_seed_gives_one_set_of_bytes(folder, tmp_path):
    main(Options(out=tmp_path / "again", patients=240, seed=3, further_patients=60, healthy=20))
    main(Options(out=tmp_path / "other", patients=240, seed=4, further_patients=60, healthy=20))
    for name in ANNOTATED + TEXTS:
        first = (folder / f"{name}.jsonl").read_bytes()
        assert first == (tmp_path / "again" / f"{name}.jsonl").read_bytes()
        assert first != (tmp_path / "other" / f"{name}.jsonl").read_bytes()


def test_the_notes_are_those_that_the_published_figures_were_made_with(tmp_path):
    """Other wordings or another order of draws change the notes: then all figures and these hashes are made again."""
    main(Options(out=tmp_path / "clinic", patients=40, seed=5, further_patients=12, healthy=6))
    files = read_json(tmp_path / "clinic" / "manifest.json")["sha256"]
    assert {name: digest[:12] for name, digest in files.items()} == {
        "train": "beacc13ed4c2",
        "valid": "8a3e428c21b7",
        "heldout": "bcc2c4f98e54",
        "unseen": "0d9576469ac0",
        "pretrain": "c18eeb6f8c36",
        "pretrain_valid": "2601092c72ea",
        "general": "2bb938ffc619",
    }


def test_unseen_styles_share_no_sentence_with_training(files):
    trained = set()
    for name in ("train", "valid", "pretrain"):
        trained |= set().union(*(grams(row["text"]) for row in files[name] if not row["id"].startswith("mts")))
    unseen = [grams(note["text"]) for note in files["unseen"]]
    heldout = [grams(note["text"]) for note in files["heldout"]]
    assert not set().union(*unseen) & trained
    assert sum(len(own & trained) for own in heldout) >= 0.05 * sum(len(own) for own in heldout)  # the bound can fail


def test_unseen_notes_share_no_abbreviation_with_training_but_those_that_the_page_names(files):
    def abbreviations(notes):
        texts = [note["text"] for note in notes if not note["text"].isupper()]
        found = set().union(*(re.findall(r"\b[A-Z]{2,5}\d?\b", text) for text in texts))
        return {one for one in found if not re.fullmatch(r"[IV]+[ABC]?\d?", one)}

    (named,) = re.findall(r"in both training and unseen notes: (.*?), and stages", PAGE, re.S)
    unseen = [note for number in range(150) for note in clinic.patient_notes("u", number, 1, UNSEEN)]
    shared = abbreviations(files["train"]) & abbreviations(unseen)
    assert {"ER", "PR", "HER2", "CKD"} <= shared <= set(re.findall(r"[A-Z]+2?", named))


def test_nearly_every_tested_code_occurs_in_training(files):
    trained = {note["diagnosis"]["code"] for note in files["train"][:250]}
    for name in ("heldout", "unseen"):
        codes = [note["diagnosis"]["code"] for note in files[name]]
        assert sum(code in trained for code in codes) >= 0.95 * len(codes)
    assert 45 <= len({note["diagnosis"]["code"] for name in ANNOTATED for note in files[name]}) <= 60


def test_all_cancers_and_all_difficulties_occur(files):
    assert len(CANCERS) == 17
    categories = defaultdict(int)
    for note in files["train"]:
        categories[note["diagnosis"]["code"][:3]] += 1
    solid = {"C50", "C34", "C61", "C67", "C64", "C25", "C22", "C16", "C15", "C73", "C56", "C54", "C43", "C71"}
    assert solid | {"C92", "C91"} <= set(categories) and {"C18", "C20"} & set(categories)
    assert {"C81", "C82", "C83"} & set(categories)
    texts = [note["text"].lower() for note in files["train"]]

    def share(pattern):
        return sum(bool(re.search(pattern, text)) for text in texts) / len(texts)

    assert share(r"\bno\b|denies|negative|ruled out|r/o\b") > 0.5
    assert share(r"mother|father|sister|brother|aunt|uncle|niece|cousin") > 0.3
    assert share(r"\d(?:\.\d)? ?(?:cm|mm|centimeters|millimeters)\b.*\d(?:\.\d)? ?(?:cm|mm|cent|mill)") > 0.5
    assert share(r"two (?:tumors|foci|nodules|lesions|spots)|2 foci|additional focus|satellite|tumor foci") > 0.1
    missing = Counter(name for note in files["train"] for name, found in note["phenotypes"].items() if not found)
    for name in ("tumor_size", "cancer_grade", "cancer_stage", "tumor_laterality"):
        assert missing[name] > 0.08 * len(texts), name


def test_the_page_gives_the_spread_of_the_demos_notes():
    for split, notes in annotated(Options(out=Path(), patients=250, seed=1)).items():
        words = [len(note["text"].split()) for note in notes]
        short = sum(length < 100 for length in words) / len(words)
        row = f"| `{split}` | {100 * short:.0f} % | {min(words)} | {statistics.median(words):g} | {max(words)} |"
        assert row in PAGE and short < 0.4 and max(words) <= 300


def test_notes_are_as_long_as_the_demo_plans_for(notes):
    lengths = [len(note["text"].split()) for note in notes]
    assert 100 <= sum(lengths) / len(lengths) <= 170
    assert min(lengths) >= 30 and max(lengths) <= 400


def test_a_write_that_fails_leaves_the_old_files_or_none(tmp_path):
    """The system refuses files larger than half of pretrain.jsonl (RLIMIT_FSIZE)."""
    small = {"patients": 20, "further_patients": 2, "healthy": 2}
    main(Options(tmp_path / "old", **small))
    before = {file: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    (tmp_path / "old" / "my own.txt").write_text("kept")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[tmp_path / "old" / "pretrain.jsonl"]) // 2, hard))
    try:
        for name in ("old", "new"):
            with pytest.raises(OSError, match="File too large"):
                main(Options(tmp_path / name, seed=1, overwrite=True, **small))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file: file.read_bytes() for file in before} == before and not (tmp_path / "new").exists()
    main(Options(tmp_path / "old", seed=1, overwrite=True, **small))
    assert all(file.read_bytes() != old for file, old in before.items() if file.stem in ("train", "manifest"))
    assert (tmp_path / "old" / "my own.txt").read_text() == "kept"


def test_too_few_patients_are_refused(tmp_path):
    with pytest.raises(UserError, match="--patients 3"):
        Options(out=tmp_path, patients=3)
    with pytest.raises(UserError, match="negative"):
        Options(out=tmp_path, healthy=-1)


def test_a_third_of_the_training_notes_are_in_capitals_and_no_tested_note_is_made_so(files):
    def share(notes):
        return sum(note["text"].isupper() for note in notes) / len(notes)

    assert 0.2 < share(files["train"]) < 0.4
    assert share(files["valid"]) == share(files["heldout"]) == 0.0
    assert {note["style"] for note in files["unseen"] if note["text"].isupper()} == {"parts"}
    for note in files["train"]:
        if note["text"].isupper():
            for answer in note["phenotypes"]["tumor_size"] + note["phenotypes"]["histological_type"]:
                assert answer["text"].upper() == answer["text"]


def test_two_in_five_training_notes_have_a_wording_of_their_own_and_no_tested_note_has(files):
    shares = {name: sum(note["style"] == "varied" for note in files[name]) / len(files[name]) for name in ANNOTATED}
    assert 0.3 < shares["train"] < 0.5 and shares["valid"] == shares["heldout"] == shares["unseen"] == 0.0


def test_every_further_note_ends_in_a_diagnosis_of_the_classification(files):
    further = [row["text"] for row in files["pretrain"] if row["patient"].startswith("x")]
    assert further
    for text in further:
        found = re.search(r"\n[^\n:]+: ([^\n]+) \(([^()\s]+)\)$", text)
        assert found and CODES[found[2]] == found[1]
