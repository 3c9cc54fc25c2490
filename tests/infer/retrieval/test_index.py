"""An index gives the exact nearest vectors, continues an interrupted build, and refuses another encoder and changed
files."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.retrieval import index, search
from infer.retrieval.bert import Bert
from infer.retrieval.index import Index, Options, build
from infer.retrieval.search import allowed, top_k
from model.checkpoints.safetensors import write_safetensors
from model.support.cli import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SITES = ["left breast", "right lung", "colon", "prostate", "bladder", "thyroid", "ovary"]


def encoder_folder(path, seed=0):
    path.mkdir()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    config = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "vocab_size": len(pieces),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "type_vocab_size": 2,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "vocab.txt").write_text("\n".join(pieces))
    torch.manual_seed(seed)
    state = Bert(config).state_dict()
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in state.items()}
    write_safetensors(path / "model.safetensors", shapes, lambda key: iter([state[key]]))
    return path


def notes_file(path, count=150):
    rows = [
        {"id": f"n{i}", "patient": f"p{i // 2}", "text": f"Mass of the {SITES[i % 7]}, number {i}."}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 12), st.sampled_from(["dot", "cosine", "euclidean"]))
def test_blocked_search_is_the_sorted_whole(seed, rows, k, similarity):
    rng = np.random.default_rng(seed)
    matrix, query = (rng.integers(-2, 3, (n, 3)).astype(np.float32) for n in (rows, 4))  # small integers: many ties
    whole = search.similarities(query, matrix, "dot")
    if similarity == "euclidean":
        whole = -((query[:, None] - matrix[None]) ** 2).sum(-1)
    elif similarity == "cosine":
        unit = query / np.maximum(np.linalg.norm(query, axis=1, keepdims=True), 1e-12)
        whole = unit @ matrix.T / np.maximum(np.linalg.norm(matrix, axis=1), 1e-12)
    found, scores = top_k(query, matrix, k, similarity, block=7)
    for q in range(4):
        best = np.argsort(-whole[q], kind="stable")[: min(k, rows)]
        if similarity == "cosine":  # equal up to rounding: the scores decide, not the rows
            assert np.allclose(whole[q][found[q]], whole[q][best], atol=1e-6)
        else:
            assert found[q].tolist() == best.tolist()
        assert (np.diff(scores[q]) <= 0).all()


def test_a_note_is_found_by_its_own_text_and_vectors_are_fp32(tmp_path):
    weights, notes = encoder_folder(tmp_path / "enc"), notes_file(tmp_path / "notes.jsonl")
    build(Options(out=tmp_path / "index", encoder="contriever", weights=weights, notes=notes))
    found = Index(tmp_path / "index", weights=weights)
    euclidean = top_k(found.vectors_ND[:20], found.vectors_ND, 1, "euclidean")[0]
    assert euclidean[:, 0].tolist() == list(range(20))
    assert found.vectors_ND.dtype == np.float32 and found.vectors_ND.shape == (150, 16)
    assert (tmp_path / "index" / "notes.jsonl").stat().st_mode & 0o077 == 0


@contextlib.contextmanager
def no_file_larger_than(size):
    """The system refuses writes beyond `size` bytes of a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_interrupted_build_continues_to_the_same_bytes(tmp_path):
    weights, notes = encoder_folder(tmp_path / "enc"), notes_file(tmp_path / "notes.jsonl")
    whole = build(Options(out=tmp_path / "whole", encoder="contriever", weights=weights, notes=notes))
    options = Options(out=tmp_path / "cut", encoder="contriever", weights=weights, notes=notes)
    one_batch_and_a_half_row = index.BATCH * 16 * 4 + 10
    with no_file_larger_than(one_batch_and_a_half_row), pytest.raises(OSError, match="large"):
        build(options)
    (raw,) = tmp_path.glob(".cut.*.vectors")
    assert raw.stat().st_size == one_batch_and_a_half_row
    again = build(options)
    assert again["vectors_sha256"] == whole["vectors_sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "enc", "notes.jsonl", "whole"]


def test_the_guard_never_gives_the_note_its_patient_or_a_near_duplicate(tmp_path):
    text = "Mass of the left breast seen on mammography last week in clinic, biopsy shows carcinoma of grade two."
    rows = [
        {"id": "a", "patient": "p1", "text": text},
        {"id": "b", "patient": "p1", "text": "Left breast biopsy shows carcinoma, other visit of that patient."},
        {"id": "c", "patient": "p2", "text": text.replace("last week", "this week")},
        {"id": "d", "patient": "p3", "text": text},
        {"id": "e", "patient": "p4", "text": "Biopsy of the left breast: carcinoma."},
        {"id": "f", "patient": "p5", "text": "Colon polyp removed without trouble."},
    ]
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(Options(out=tmp_path / "i", notes=tmp_path / "n.jsonl"))
    found = Index(tmp_path / "i").neighbours(rows[0], 6)
    assert [record["id"] for record in found] == ["e", "f"]
    assert not allowed(rows[0], rows[2])
    assert not allowed({"id": "x", "text": "one", "patient": "7"}, {"id": "y", "text": "two", "patient": 7})
    assert not allowed({"id": 7, "text": "one"}, {"id": "7", "text": "two"})
    assert allowed({"id": "x", "text": "one", "patient": ""}, {"id": "y", "text": "two", "patient": ""})
    assert allowed({"id": "x", "text": "one"}, {"id": "y", "text": "two"})  # no patient known on either side


def test_what_does_not_fit_is_refused_and_the_old_index_stays(tmp_path):
    weights, other = encoder_folder(tmp_path / "enc"), encoder_folder(tmp_path / "other", seed=1)
    notes, out = notes_file(tmp_path / "notes.jsonl", 10), tmp_path / "i"
    build(Options(out=out, encoder="contriever", weights=weights, notes=notes))
    (tmp_path / "i.old" / "kept").mkdir(parents=True)  # a backup of the user's, say
    with pytest.raises(UserError, match="give --overwrite to replace it"):
        build(Options(out=out, encoder="contriever", weights=weights, notes=notes))
    build(Options(out=out, encoder="contriever", weights=weights, notes=notes, overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["enc", "i", "i.old", "notes.jsonl", "other"]
    before = (out / "manifest.json").read_bytes()
    twice = tmp_path / "twice.jsonl"
    twice.write_text(notes.read_text() + notes.read_text())
    with pytest.raises(UserError, match=r"twice.jsonl:11: its id is that of line 1 too"):
        build(Options(out=out, encoder="contriever", weights=weights, notes=twice, overwrite=True))
    with pytest.raises(UserError, match="weights not given"):
        build(Options(out=out, encoder="sgpt", notes=notes))
    with pytest.raises(UserError, match="model_type 'bert'"):
        build(Options(out=out, encoder="sgpt", weights=weights, notes=notes, overwrite=True))
    assert (out / "manifest.json").read_bytes() == before
    with pytest.raises(UserError, match="another encoder or tokenizer"):
        Index(out, weights=other)
    retokenised = tmp_path / "retokenised"
    shutil.copytree(weights, retokenised)
    (retokenised / "vocab.txt").write_text((weights / "vocab.txt").read_text() + "\nextra")
    with pytest.raises(UserError, match="another encoder or tokenizer"):
        Index(out, weights=retokenised)
    with pytest.raises(UserError, match="was built by contriever, not bm25"):
        Index(out, "bm25")
    with pytest.raises(UserError, match="query is empty"):
        Index(out, weights=weights).search(" ", 3)
    (out / "notes.jsonl").write_text(notes.read_text().replace("colon", "liver"))
    with pytest.raises(UserError, match="notes.jsonl was changed"):
        Index(out, weights=weights)


def test_a_question_is_answered_whatever_form_the_diagnoses_have(tmp_path, capsys):
    said = [{"text": "Neoplasm of breast", "code": "C50"}, "Breast cancer", {"code": "C50"}, ["x"], 5, None]
    rows = [{"id": f"n{i}", "text": f"breast mass {i}", "diagnosis": one} for i, one in enumerate(said)]
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(Options(out=tmp_path / "i", notes=tmp_path / "n.jsonl"))
    index.main(Options(out=tmp_path / "i", ask="breast", k=6))
    lines = sorted(line.split(maxsplit=1)[1].strip() for line in capsys.readouterr().out.splitlines())
    assert lines == ["n0  Neoplasm of breast", "n1  Breast cancer", "n2", "n3", "n4", "n5"]
    for options, wrong in (
        ({"k": 0}, "--k 0"),
        ({"weights": tmp_path}, "bm25 has no weights"),
        ({"encoder": "contriever", "weights": tmp_path / "no"}, "no such folder"),
    ):
        with pytest.raises(UserError, match=wrong):
            build(Options(out=tmp_path / "j", notes=tmp_path / "n.jsonl", **options))
    with pytest.raises(UserError, match="no such index; build it"):
        Index(tmp_path / "j")


def test_a_note_longer_than_the_encoder_reads_is_counted(tmp_path, capsys):
    weights = encoder_folder(tmp_path / "enc")
    (tmp_path / "n.jsonl").write_text(json.dumps({"id": "long", "text": "word " * 400}) + "\n")
    made = build(Options(out=tmp_path / "i", encoder="contriever", weights=weights, notes=tmp_path / "n.jsonl"))
    assert made["cut"] == 1
    assert "1 notes were truncated" in capsys.readouterr().err


def test_specter2_is_compared_by_squared_distance(tmp_path):
    weights, notes = encoder_folder(tmp_path / "enc"), notes_file(tmp_path / "notes.jsonl", 9)
    specter = tmp_path / "specter2"
    specter.mkdir()
    shutil.copytree(weights, specter / "base")
    for part in ("proximity", "adhoc_query"):
        (specter / part).mkdir()
        (specter / part / "adapter_config.json").write_text("{}")
        shapes = {
            "adapter_down.0.weight": (4, 16),
            "adapter_down.0.bias": (4,),
            "adapter_up.weight": (16, 4),
            "adapter_up.bias": (16,),
        }
        state = {f"encoder.layer.0.output.adapters.{part}.{key}": torch.randn(shape) for key, shape in shapes.items()}
        described = {key: (tuple(value.shape), value.dtype) for key, value in state.items()}
        write_safetensors(specter / part / "adapter.safetensors", described, lambda key, held=state: iter([held[key]]))
    build(Options(out=tmp_path / "index", encoder="specter2", weights=specter, notes=notes))
    found = Index(tmp_path / "index", "specter2", specter)
    scores = {record["id"]: score for record, score in found.search("Mass of the colon.", 9)}
    query_D, vectors_ND = found.encoder.encode(["Mass of the colon."], query=True)[0], found.vectors_ND
    for i in range(9):
        assert scores[f"n{i}"] == pytest.approx(2 * vectors_ND[i] @ query_D - (vectors_ND[i] ** 2).sum(), rel=1e-4)
