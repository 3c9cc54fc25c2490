"""Every family: transformers' own files give transformers' own bits, and eval.parity says so."""

import json

import pytest
import torch
from tiny_models import FAMILIES

from eval.parity.program import Options, compare, main
from lora import LoRAConfig, add_lora, save_adapter
from lora.adapter import adapted
from model import Transformer


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_is_bit_identical(family, published):
    """fp32 on a CPU, prompts longer than two windows; gradients, and greedy text with and without the cache."""
    new = 0 if family == "llama-dynamic" else 16  # past its trained length, its cached keys keep their old angles
    report = compare(Options(weights=str(published(family)), tokens=40, new_tokens=new))
    assert report.failed == [], report.summary()
    stages = [row for row in report.rows if row.section == "stage"]
    assert len(stages) == 3 * 7 + 4 and all(row.error == 0 and row.ulps == 0 for row in stages)
    assert sum(row.section == "gradient" for row in report.rows) == len(list(_model(published(family)).parameters()))
    assert report.window is None or report.prompt_tokens > 2 * report.window
    assert sum(row.section == "generation" for row in report.rows) == (2 if new else 0)


def _model(folder) -> Transformer:
    return Transformer.from_pretrained(folder)


@pytest.mark.parametrize("family", ["mistral", "mixtral", "qwen2-window", "llama-3", "llama-tied"])
def test_transformers_loads_what_we_save_bit_for_bit(family, published, tmp_path):
    from transformers import AutoModelForCausalLM

    ours = _model(published(family))
    ours.save_pretrained(tmp_path / "ours", max_shard_bytes=30_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    before = AutoModelForCausalLM.from_pretrained(published(family)).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    report = compare(Options(weights=str(tmp_path / "ours"), tokens=40, new_tokens=0, gradients=False))
    assert report.failed == [], report.summary()


@pytest.mark.parametrize("family", ["mistral", "llama-3", "mixtral"])
def test_bf16_is_judged_by_its_error(family, published):
    report = compare(Options(weights=str(published(family)), tokens=40, new_tokens=0, dtype="bfloat16"))
    assert report.failed == [], report.summary()


def test_experts_of_odd_width_are_judged_by_their_error(published):
    report = compare(Options(weights=str(published("mixtral", intermediate_size=40)), tokens=40, new_tokens=16))
    assert report.failed == [], report.summary()
    assert all(row.error < 1e-5 for row in report.rows if row.section == "stage")


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_an_adapter_against_peft(family, published, tmp_path):
    pytest.importorskip("peft", reason="needs peft: make test installs it")
    model = _model(published(family))
    targets = ("q_proj", "v_proj", "o_proj") if family == "mixtral" else ("q_proj", "k_proj", "up_proj", "down_proj")
    add_lora(model, LoRAConfig(r=3, alpha=6, dropout=0.0, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for layer in adapted(model).values():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    save_adapter(model, tmp_path / "adapter")
    report = compare(
        Options(
            weights=str(published(family)), adapter=str(tmp_path / "adapter"), tokens=40, new_tokens=0, gradients=False
        )
    )
    assert report.failed == [], report.summary()
    assert any(row.section == "adapter" and row.name == "layer 0 q" for row in report.rows)


def test_the_command_prints_a_summary_and_writes_json(published, tmp_path, capsys):
    options = Options(weights=str(published("llama")), tokens=20, new_tokens=4, json=str(tmp_path / "out.json"))
    assert main(options) == 0
    said = capsys.readouterr()
    assert "parity holds: llama, 20 tokens" in said.out
    assert [line for line in said.err.splitlines() if line.startswith("no tokenizer compared: ")] != []
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["holds"] and len(written["rows"]) > 40
