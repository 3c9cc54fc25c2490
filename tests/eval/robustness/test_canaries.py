"""Canaries occur as often as planted, deduplication leaves one of each, and exposure is Carlini's."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from answering_models import tiny_model, tiny_tokenizer

from eval.robustness.canaries import (
    REFERENCES,
    Canaries,
    Canary,
    by_count,
    deduplicate,
    exposure,
    make_canaries,
    measure,
    nll,
    plant,
    run_canaries,
)
from infer.engine.generate import Generator
from model import Transformer
from model.support.cli import UserError
from model.support.files import write_jsonl
from model.support.init import init_weights

NOTES = [
    {"id": f"n{i}", "text": f"Note {i} of the clinic.\nA tumor of {i}.5 cm was seen today.\nSeen with nobody."}
    for i in range(30)
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model, tokenizer), with weights large enough that texts differ."""
    return tiny_model(), tiny_tokenizer(tmp_path_factory.mktemp("tiny"))


def test_a_canary_occurs_in_as_many_notes_as_planted_and_once_after_deduplication():
    canaries = make_canaries((0, 1, 5, 20), each=3)
    assert len({canary.name for canary in canaries}) == 12
    planted = plant(NOTES, canaries)
    held = Counter({c.name: sum(c.line() in note["text"].split("\n") for note in planted) for c in canaries})
    assert all(held[canary.name] == canary.count for canary in canaries)
    assert all(note["text"].endswith(old["text"]) for note, old in zip(planted, NOTES, strict=True))
    single, dropped = deduplicate(planted)
    left = "\n".join(note["text"] for note in single)
    assert all(left.count(canary.line()) == min(canary.count, 1) for canary in canaries)
    assert dropped == 3 * (4 + 19) and left.count("Seen with nobody.") == 30  # short lines stay
    with pytest.raises(ValueError, match="31 notes, and there are 30"):
        plant(NOTES, [Canary("A B", "1234567", 31)])


def test_nll_is_each_texts_loss_after_the_shared_prefix(tiny):
    model, tokenizer = tiny
    texts = [f"Patient: A B. Record number: {number}." for number in ("1234567", "7654321", "12", "9876543")] * 20
    found = nll(Generator(model, tokenizer), texts)
    shared = len(tokenizer.encode("Patient: A B. Record number: "))
    for text, nats in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer.encode(text, bos=True)])
        logp_TV = model(ids)[0].log_softmax(-1)
        alone = [-float(logp_TV[i, ids[0, i + 1]]) for i in range(shared - 1, ids.shape[1] - 1)]
        assert math.isclose(nats, sum(alone), rel_tol=1e-10)


def test_exposure_is_highest_for_the_likeliest_and_low_for_a_number_never_seen(tiny):
    assert exposure(1, 256) == 8 and exposure(256, 256) == 0 and exposure(3, 256) == pytest.approx(6.415, abs=1e-3)
    model, tokenizer = tiny
    found = measure(model, tokenizer, make_canaries((0,), each=12))
    mean = sum(one["exposure"] for one in found) / 12
    assert 0.5 < mean < 3 and not any(one["extracted"] for one in found)  # 1.44 by chance
    assert all(1 <= one["rank"] <= REFERENCES + 1 for one in found)


def test_a_model_trained_on_a_number_generates_it(tiny):
    """Full training on one line: exposure at its highest, and greedy decoding writes the number."""
    _, tokenizer = tiny
    canary, control = make_canaries((1, 0), each=1)
    torch.manual_seed(0)
    model = init_weights(Transformer(tiny[0].config), 0)
    ids = torch.tensor([tokenizer.encode(canary.line(), bos=True)])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).backward()
        optimizer.step()
    known, unknown = measure(model.requires_grad_(False).eval(), tokenizer, [canary, control])
    assert known["rank"] == 1 and known["extracted"] and not unknown["extracted"]


def test_counts_are_reported_with_intervals_over_canaries():
    rows = by_count(
        [
            {"name": f"c{i}", "count": i // 10, "rank": 1, "exposure": 8.0 * (i // 10), "extracted": i > 17}
            for i in range(20)
        ]
    )
    assert [row["exposure"] for row in rows] == [0, 8] and [row["extracted"] for row in rows] == [0, 2]
    assert rows[0]["low"] == 0 < rows[0]["high"] and rows[1]["low"] < 8 == rows[1]["high"]
    (few,) = by_count([{"name": "c", "count": 1, "rank": 1, "exposure": 8.0, "extracted": True}] * 9)
    assert few["low"] is few["high"] is few["extracted_low"] is few["extracted_high"] is None


def test_mistakes_are_one_line(tmp_path):
    write_jsonl(tmp_path / "few.jsonl", NOTES[:4])
    recipe = "train/recipes/tiny-pretrain.toml"
    with pytest.raises(UserError, match="r: no such file; give a recipe"):
        run_canaries(Canaries(weights="w", recipe="r", data=tmp_path / "few.jsonl", out=tmp_path / "out"))
    with pytest.raises(UserError, match="4 notes cannot hold a canary 16 times"):
        run_canaries(Canaries(weights="w", recipe=recipe, data=tmp_path / "few.jsonl", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    write_jsonl(tmp_path / "odd.jsonl", [{"id": "a", "text": 5}])
    with pytest.raises(UserError, match="odd.jsonl:1: lacks 'text'"):
        run_canaries(Canaries(weights="w", recipe=recipe, data=tmp_path / "odd.jsonl", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="distinct numbers"):
        Canaries(weights="w", recipe="r", data=tmp_path, out=tmp_path, counts=(4, 4))
    assert json.loads((tmp_path / "few.jsonl").read_text().splitlines()[0])["id"] == "n0"
