"""The contrastive encoder: pairs of one patient, negatives of others, a loss in numbers, the public files' form."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch

from infer.retrieval import Encoder
from infer.retrieval.index import Index, build
from infer.retrieval.index import Options as IndexOptions
from model.support.cli import UserError
from train.contrastive import MOST, Options, Pairs, contrast, main, new_model, train, word_pieces

SITES = ["breast nipple areola duct", "lung bronchus lobe pleura", "colon rectum cecum polyp", "skin mole melanoma arm"]
FILLER = "the patient was seen today and examined in clinic without new complaints or other findings".split()


def notes(path, count=48):
    """Notes of two styles; a patient's two notes share a site's words, not their style."""
    dice = random.Random(0)
    rows = []
    for i in range(count):
        own, style = SITES[i // 2 % 4].split(), FILLER if i % 2 else FILLER[::-1]
        words = [dice.choice(own) if dice.random() < 0.3 else style[j % len(style)] for j in range(60)]
        rows.append({"id": f"n{i}", "patient": f"p{i // 2}", "text": " ".join(words)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(tmp_path, **changes):
    small = {"steps": 40, "batch": 12, "vocab": 300, "width": 32, "layers": 1}
    return Options(**{"notes": (notes(tmp_path / "n.jsonl"),), "out": tmp_path / "enc", **small, **changes})


def test_the_loss_in_numbers():
    a, b = 2 * torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    expected = math.log(1 + math.exp(-2 / 0.5))  # own score 2, the other's 0, both divided by the temperature
    assert contrast(a, b, 0.5).item() == pytest.approx(expected)
    assert contrast(a, b.flip(0), 0.5).item() == pytest.approx(expected + 4)
    one_way = contrast(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [1.0]]), 1.0).item()
    assert one_way == pytest.approx((math.log(2) + (math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2) / 2)


def test_a_pair_is_one_patients_and_no_patient_comes_twice():
    texts = [f"{'word ' * 20}{letter}{' word' * 20} {letter * 3}" for letter in "aabbccdd"]
    owners = list("aabbccdd")
    tokenizer = word_pieces([*texts, *texts], 200)
    pairs = Pairs([*texts, "too short"], [*owners, "z"], tokenizer, seed=0)
    assert len(pairs.notes) == 4 and all(len(held) == 2 for held in pairs.notes)
    places = {id(note): patient for patient, held in enumerate(pairs.notes) for note in held}
    seen = []
    pairs.crop = lambda ids: seen.append(places[id(ids)]) or ([], [])
    for _ in range(20):
        seen.clear()
        pairs.batch(4)
        assert seen[0::2] == seen[1::2] and sorted(seen[0::2]) == [0, 1, 2, 3]


def test_a_crop_is_a_stretch_of_the_text():
    text = " ".join(random.Random(0).choices("abcdefgh", k=250))
    tokenizer = word_pieces([text], 200)
    pairs = Pairs([text], ["x"], tokenizer, seed=1)
    ids = pairs.notes[0][0]
    joined = " ".join(map(str, ids))
    lengths = set()
    for _ in range(200):
        (first, *inner, last), types = pairs.crop(ids)
        assert [first, last] == [tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")]
        assert " ".join(map(str, inner)) in joined and len(types) == len(inner) + 2 <= MOST + 2
        lengths.add(len(inner))
    assert min(lengths) < 60 and max(lengths) == MOST


def test_it_learns_the_site_and_is_read_as_contriever_by_us_and_by_transformers(tmp_path):
    given = options(tmp_path, steps=40)
    loss = train(given)
    assert loss < math.log(given.batch) - 0.3
    encoder = Encoder.from_pretrained(given.out, "contriever")
    vectors = encoder.encode(["nipple areola duct", "breast areola", "bronchus lobe pleura", "lung pleura"])
    scores = vectors @ vectors.T
    assert scores[0, 1] > scores[0, 2:].max() and scores[2, 3] > scores[2, :2].max()
    transformers = pytest.importorskip("transformers")
    peer = transformers.BertModel.from_pretrained(given.out, attn_implementation="eager", add_pooling_layer=False)
    tokens = torch.tensor([encoder.tokens("breast areola", query=False)[0]])
    with torch.inference_mode():
        mean = peer(tokens).last_hidden_state.mean(1).numpy()[0]
    assert np.abs(mean - encoder.encode(["breast areola"])[0]).max() < 1e-6
    build(IndexOptions(out=tmp_path / "i", encoder="contriever", weights=given.out, notes=tmp_path / "n.jsonl"))
    found = Index(tmp_path / "i", weights=given.out).neighbours({"id": "q", "text": "pleura of the lung lobe"}, 3)
    assert all("pleura" in record["text"] or "lobe" in record["text"] for record in found)


def test_the_same_seed_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        train(options(tmp_path, out=tmp_path / name, steps=3))
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_positions_that_no_crop_reaches_add_nothing():
    config = {"vocab_size": 9, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "layer_norm_eps": 0,
              "intermediate_size": 8, "type_vocab_size": 2, "max_position_embeddings": 512}  # fmt: skip
    assert not new_model(config, 0).embeddings.position_embeddings.weight.any()


def test_mistakes_are_named_and_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match="only 24 patients"):
        main(options(tmp_path, batch=25))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all I have")
    with pytest.raises(UserError, match="is no encoder"):
        main(options(tmp_path, out=tmp_path / "mine"))
    (tmp_path / "mine" / "config.json").write_text('{"architectures": ["MistralForCausalLM"]}')
    with pytest.raises(UserError, match="is no encoder"):
        main(options(tmp_path, out=tmp_path / "mine"))
    with pytest.raises(UserError, match="no such file"):
        main(options(tmp_path, notes=(tmp_path / "none.jsonl",)))
    for wrong in ({"batch": 1}, {"width": 100}, {"steps": 0}, {"vocab": 10}):
        with pytest.raises(UserError, match="--" + next(iter(wrong))):
            options(tmp_path, **wrong)
    assert not (tmp_path / "enc").exists() and (tmp_path / "mine" / "thesis.txt").exists()
