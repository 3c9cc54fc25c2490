"""What make adapter and make scores write around an adapter: bfloat16 matrices, no machine's paths, a filled card."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.experiments import adapter, scores
from infer.tasks import PHENOTYPES

GROUP = {"n": 3, "f1": 50.0, "low": 40.0, "high": 60.0, "average_f1": 55.0}


@pytest.fixture
def trained(tmp_path):
    folder = tmp_path / "tuned"
    folder.mkdir()
    save_file({"q.lora_A.weight": torch.randn(2, 8)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 2, "base_model_name_or_path": "/home/somebody/base"}')
    (folder / "trained_on.json").write_text('{"norms": "abc", "merged": []}')
    return folder


def test_a_released_adapter_is_in_bfloat16_and_names_the_public_base(trained, tmp_path):
    adapter.release(trained, tmp_path / "out")
    before = load_file(trained / "adapter_model.safetensors")["q.lora_A.weight"]
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")["q.lora_A.weight"]
    assert after.dtype == torch.bfloat16 and torch.equal(after, before.to(torch.bfloat16))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == adapter.BASE
    assert (tmp_path / "out" / "trained_on.json").read_text() != ""


def run_card():
    recipe = {key: "/home/somebody" for key in adapter.PATHS} | {"r": 16}
    kept = dict.fromkeys(("steps", "rows", "tokens", "best_valid_loss", "training_seconds", "tokens_per_second"), 7)
    data = {"sources": {"/home/somebody/train.jsonl": "0123456789abcdef0123"}}
    return {"recipe": recipe, "data": data, "code": {"commit": "f" * 40}, "ranks": 1, **kept}


def test_a_stages_card_has_no_path_of_its_machine():
    card = adapter.card(run_card())
    assert "somebody" not in json.dumps(card) and card["data"] == {"train.jsonl": "0123456789abcdef0123"}


def test_the_model_card_is_filled_from_training_and_scores(monkeypatch, tmp_path):
    gguf = tmp_path / "base.gguf"
    gguf.write_bytes(b"weights")
    monkeypatch.setattr(scores, "smollm2", lambda: gguf)
    host = {"cpu": "A processor", "threads": 2}
    stage = adapter.card(run_card())
    training = {"host": host, "clinic": adapter.CLINIC, "steps": {"tuning": {"seconds": 120.0}}}
    groups = {"phenotype": GROUP, "diagnosis": GROUP, "phenotype, unanswerable": None}
    system = {"groups": groups, "phenotypes": dict.fromkeys(PHENOTYPES, GROUP)}
    test = {"notes": 3, "systems": {"regular expressions": system, scores.RELEASED: system}}
    found = {"code": {"commit": "e" * 40}, "host": host, "sets": dict.fromkeys(scores.SETS, test)}
    (tmp_path / "training.json").write_text(json.dumps(training | {"pretrained": stage, "tuned": stage}))
    (tmp_path / "REMARKS.md").write_text("It is wrong at times.")
    card = scores.card(tmp_path, found)
    assert "2 minutes on A processor, 2 threads" in card and "--clinical 2000" in card
    assert card.count("50.0 [40.0, 60.0]") == len(scores.SETS) * (2 * 2 + len(PHENOTYPES))
    assert "{" not in card and card.endswith("It is wrong at times.")
