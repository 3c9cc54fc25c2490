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
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        pair = {"q.lora_A.weight": torch.randn(2, 8), "q.lora_B.weight": torch.randn(5, 2)}
        save_file(pair, folder / "adapter_model.safetensors")
        config = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": "/home/somebody/base"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "trained_on.json").write_text('{"norms": "abc", "merged": []}')
    return folders


def update(folder, size=lambda value: value):
    """s B A, or with `size` = abs the largest that its terms can add up to."""
    config = json.loads((folder / "adapter_config.json").read_text())
    pair = load_file(folder / "adapter_model.safetensors")
    a_RD, b_OR = (pair[f"q.lora_{kind}.weight"].double() for kind in "AB")
    return config["lora_alpha"] / config["r"] * size(b_OR) @ size(a_RD)


def test_the_released_adapter_is_the_mean_of_the_trained_ones_in_bfloat16(trained, tmp_path):
    adapter.write_mean(trained, tmp_path / "out")
    assert {value.dtype for value in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    mean = sum(update(folder) for folder in trained) / 2
    terms = sum(update(folder, torch.abs) for folder in trained) / 2
    rounding = (1 + 2**-8) ** 2 - 1  # of each term: its two factors are rounded to 8 bits
    assert ((update(tmp_path / "out") - mean).abs() <= rounding * terms).all()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == adapter.BASE
    assert (tmp_path / "out" / "trained_on.json").read_text() != ""


def run_card():
    recipe = {key: "/home/somebody" for key in adapter.PATHS} | {"r": 16}
    kept = dict.fromkeys(("steps", "rows", "tokens", "best_valid_loss", "training_seconds", "tokens_per_second"), 7)
    data = {"sources": {"/home/somebody/train.jsonl": "0123456789abcdef0123"}}
    return {"recipe": recipe, "data": data, "code": {"commit": "f" * 40}, "ranks": 1, **kept, "training_seconds": 120.0}


def test_a_stages_card_has_no_path_of_its_machine():
    card = adapter.card(run_card())
    assert "somebody" not in json.dumps(card) and card["data"] == {"train.jsonl": "0123456789abcdef0123"}


def test_the_model_card_is_filled_from_training_and_scores(tmp_path):
    gguf = tmp_path / "base.gguf"
    gguf.write_bytes(b"weights")
    host = {"cpu": "A processor", "threads": 2}
    one = {"name": "tuning", "clinic": {"seed": 22, **adapter.CLINIC}, **adapter.card(run_card())}
    groups = {"phenotype": GROUP, "diagnosis": GROUP, "phenotype, unanswerable": None}
    system = {"groups": groups, "phenotypes": dict.fromkeys(PHENOTYPES, GROUP)}
    bins = [{"p": 0.25, "right": 0.5, "n": 2}, {"p": 0.75, "right": 1.0, "n": 2}]
    calibration = scores.calibration({"n": 4, "reliability": bins, "error": 0.25, "log_loss": 0.5})
    calibrations = dict.fromkeys(("phenotype", "diagnosis"), calibration)
    test = {
        "notes": 3,
        "calibration": calibrations,
        "systems": {"regular expressions": system, scores.RELEASED: system},
    }
    found = {"code": {"commit": "e" * 40}, "host": host, "seconds": 90, "sets": dict.fromkeys(scores.SETS, test)}
    (tmp_path / "training.json").write_text(json.dumps({"host": host, "stages": [one, one]}))
    (tmp_path / "adapter_config.json").write_text('{"r": 32}')
    (tmp_path / "REMARKS.md").write_text("It is wrong at times.")
    card = scores.card(tmp_path, found, gguf)
    assert card.count("2 minutes on A processor") == 3 and "--clinical 2200" in card and "rank 32" in card
    assert card.count("50.0 [40.0, 60.0]") == len(scores.SETS) * (2 * 2 + len(PHENOTYPES))
    assert card.count("| 50 / 75 / 25.0 / 0.50 ") == 2 * len(scores.SETS) and "2 minutes on A processor, 2" in card
    assert "{" not in card and card.endswith("It is wrong at times.")
