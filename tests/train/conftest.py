"""Small notes and documents, a byte-level tokenizer, and their token stores: all seeded."""

import json
import random
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, processors

from model.support.init import init_weights
from model.transformer import Transformer
from train.data.store import Encoding, TokenStore, build_store

WORDS = (
    "patient tumor breast left right grade stage cm margin positive negative biopsy showed invasive ductal "
    "carcinoma lesion measured"
).split()


def make_note(rng: random.Random, number: int, words: int) -> dict:
    size, side = f"{rng.randint(1, 9)}.{rng.randint(0, 9)} cm", rng.choice(["left", "right"])
    text = f"{' '.join(rng.choices(WORDS, k=words))} size {size} on the {side} side"
    found = {"tumor_size": size, "tumor_laterality": side}
    names = ("tumor_size", "tumor_laterality", "cancer_grade")
    phenotypes = {
        name: [{"text": found[name], "start": text.rindex(found[name]), "end": 0}] if name in found else []
        for name in names
    }
    diagnosis = {"text": "Malignant neoplasm of breast", "code": "C50.9"}
    return {
        "id": f"note-{number}",
        "patient": f"p{number}",
        "text": text,
        "phenotypes": phenotypes,
        "diagnosis": diagnosis,
    }


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with notes.jsonl, documents.jsonl, and tok/ (bytes as tokens; <s> 256, </s> 257)."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    write_lines(folder / "notes.jsonl", [make_note(rng, i, rng.randint(1, 9)) for i in range(10)])
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(23)]
    write_lines(folder / "documents.jsonl", [{"id": f"text-{i}", "text": text} for i, text in enumerate(texts)])
    (folder / "tok").mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<s>", "</s>"])
    begin = [("<s>", fast.token_to_id("<s>"))]
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    fast.save(str(folder / "tok" / "tokenizer.json"))
    (folder / "tok" / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


@pytest.fixture(scope="session")
def notes(data, tmp_path_factory) -> TokenStore:
    encoding = Encoding("instruct", str(data / "tok"))
    return build_store([str(data / "notes.jsonl")], encoding, tmp_path_factory.mktemp("stores") / "notes")


@pytest.fixture(scope="session")
def documents(data, tmp_path_factory) -> TokenStore:
    encoding = Encoding("pretrain", str(data / "tok"))
    return build_store([str(data / "documents.jsonl")], encoding, tmp_path_factory.mktemp("stores") / "documents")


@pytest.fixture(scope="session")
def options(data, tmp_path_factory) -> dict:
    from tiny_runs import CONFIG

    folder = tmp_path_factory.mktemp("weights")
    init_weights(Transformer(CONFIG), 1).save_pretrained(folder)
    for file in (data / "tok").iterdir():
        shutil.copy(file, folder)
    return {
        "data": [str(data / "notes.jsonl")],
        "valid_data": [str(data / "notes.jsonl")],
        "weights": str(folder),
        "valid_rows": 2,
        "valid_every": 2,
        "steps": 6,
        "batch_rows": 3,
        "save_every": 2,
        "r": 3,
        "dropout": 0.1,
        "learning_rate": 1e-2,
        "block": 400,
        "threads": 1,
    }
