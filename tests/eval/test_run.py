"""Any checkpoint on a labelled set: small random models with each baseline's exact config fields, tokenizer kind and
form."""

import json
import tomllib

import pytest
import torch

from eval import perplexity
from eval.questions import read_references
from eval.run import BASELINES, Options, baseline, main
from lora import LoRAConfig, add_lora, save_adapter
from model import ModelConfig, Tokenizer, Transformer
from model.support.cli import UserError
from model.support.files import write_json, write_jsonl
from model.support.init import init_weights
from train.importers.table import records

NAMES = list(tomllib.loads(BASELINES.read_text()))
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
TABLE = "text,type,answer\n" + "".join(
    f'"Note {i}: left breast mass, {i}.5 cm, grade 2.",{kind},{answer}\n'
    for i in range(1, 4)
    for kind, answer in (("tumor_size", f"{i}.5 cm"), ("cancer_stage", "not relevant"))
)


def sentencepiece(folder, tmp_path):
    from train.data import tokenizer

    write_jsonl(
        tmp_path / "texts.jsonl",
        [{"text": "Left breast mass, 2.5 cm, grade 2. What is the tumor size? [INST] <<SYS>>"}] * 30,
    )
    made = tokenizer.train_tokenizer(
        tokenizer.Options(texts=(str(tmp_path / "texts.jsonl"),), out=str(tmp_path / "sp"), vocab=330)
    )
    (folder / "tokenizer.model").write_bytes((made / "tokenizer.model").read_bytes())
    return 330


def bpe(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    built.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    built.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>", "bos_token": None})
    return built.get_vocab_size()


@pytest.mark.parametrize("name", NAMES)
def test_every_baseline_answers_and_gets_its_row(name, tmp_path):
    entry = baseline(name)
    folder = tmp_path / name
    folder.mkdir()
    size = sentencepiece(folder, tmp_path) if entry["tokenizer"] == "sentencepiece" else bpe(folder)
    grouped = entry["config"]["num_key_value_heads"] != entry["config"]["num_attention_heads"]
    raw = {**entry["config"], **SMALL, "num_key_value_heads": 2 if grouped else 4, "vocab_size": size}
    torch.manual_seed(0)
    init_weights(Transformer(ModelConfig.from_dict(raw)), 1).save_pretrained(folder)
    kept = json.loads((folder / "config.json").read_text())
    for field in set(entry["config"]) - set(SMALL) - {"num_key_value_heads", "vocab_size", "rope_theta", "hidden_act"}:
        assert kept.get(field) == entry["config"][field], field
    (tmp_path / "t.csv").write_text(TABLE)
    write_jsonl(tmp_path / "mine.jsonl", records(tmp_path / "t.csv"))
    out = tmp_path / "run"
    main(
        Options(
            weights=str(folder),
            data=tmp_path / "mine.jsonl",
            out=out,
            model=name,
            max_new_tokens=3,
            max_new_diagnosis=3,
            max_input_tokens=1200,
        )
    )
    run = json.loads((out / "run.json").read_text())
    assert [(system["name"], system["form"]) for system in run["systems"]] == [(entry["title"], entry["form"])]
    (row,) = json.loads((out / "report.json").read_text())["sets"]["data"]["systems"]
    assert row["clinical"]["phenotype"]["n"] == 3 and row["clinical"]["phenotype, unanswerable"]["n"] == 3
    assert row["clinical"]["diagnosis"] is None and row["counts"]["missing"] == [] and row["counts"]["failed"] == []


@pytest.mark.parametrize("name", NAMES)
def test_memory_plans_follow_from_the_configs(name):
    entry = baseline(name)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dict(entry["config"]))
    assert entry["weights_gb"] == pytest.approx(2e-9 * sum(p.numel() for p in model.parameters()), abs=0.06)
    config = model.config
    cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 1500 / 1e6
    assert entry["cache_mb"] == round(cache)


def test_bits_per_byte_before_and_after_an_adapter(tmp_path, capsys):
    raw = {**baseline("mistral-7b")["config"], **SMALL, "num_key_value_heads": 2, "vocab_size": bpe(tmp_path)}
    model = init_weights(Transformer(ModelConfig.from_dict(raw)), 1)
    model.save_pretrained(tmp_path)
    add_lora(model, LoRAConfig(r=2, alpha=64), seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(2))
    save_adapter(model, tmp_path / "adapter")
    write_jsonl(tmp_path / "texts.jsonl", [{"text": "Left breast mass."}, {"text": "Größe 2 cm"}])
    asked = {"weights": tmp_path, "text": tmp_path / "texts.jsonl"}
    found = []
    for adapter in (None, tmp_path / "adapter"):
        perplexity.main(perplexity.Options(adapter=adapter, out=tmp_path / "bits.json", overwrite=True, **asked))
        found.append(json.loads((tmp_path / "bits.json").read_text()))
        said = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in said] == list(found[-1])
    assert found[0]["weights"] == found[1]["before"] and found[1]["before"]["bytes"] == 17 + 12
    after = perplexity.measure(model, Tokenizer.from_pretrained(tmp_path), ["Left breast mass.", "Größe 2 cm"])
    assert found[1]["after"]["nats"] == pytest.approx(after.nats) != found[1]["before"]["nats"]
    with pytest.raises(UserError, match="--documents -1"):
        perplexity.Options(**asked, documents=-1)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="did you mean 'mistral-7b'"):
        baseline("mistral7b")
    with pytest.raises(UserError, match="did you mean 'chatml'"):
        Options(weights="x", data=tmp_path, out=tmp_path, form="chatm")
    write_jsonl(tmp_path / "bare.jsonl", [{"id": "1", "text": "a", "phenotypes": {}}])
    with pytest.raises(UserError, match="bare.jsonl: no question"):
        main(Options(weights="x", data=tmp_path / "bare.jsonl", out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    for lines, said in (
        (2 * [{"id": "SECRET", "text": "a", "phenotypes": {}}], "bare.jsonl:2: its id is that of line 1 too"),
        ([{"id": "1", "text": "a", "phenotypes": {"SECRET": []}}], "bare.jsonl:1: 'phenotypes' has an unknown name"),
    ):
        write_jsonl(tmp_path / "bare.jsonl", lines)
        with pytest.raises(UserError, match=said) as refused:
            read_references(tmp_path / "bare.jsonl")
        assert "SECRET" not in str(refused.value)
    write_jsonl(tmp_path / "mine.jsonl", [{"id": "1", "text": "a", "phenotypes": {"tumor_size": []}}])
    for name in ("m" * 101, "a\nb", "a\udcff"):
        with pytest.raises(UserError, match="the row's name has more than 100 characters, or one that cannot be"):
            main(Options(weights="x", data=tmp_path / "mine.jsonl", out=tmp_path / "none", name=name))
    assert not (tmp_path / "none").exists()
    write_json(tmp_path / "run.json", {})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="was not written by a job"):
        main(Options(weights="x", data=tmp_path / "mine.jsonl", out=tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_row_is_replaced_only_with_overwrite_and_the_notes_never(tmp_path):
    """Two names that would share a file of answers are one row's too. A blank note is not put to the model."""
    folder = tmp_path / "base"
    folder.mkdir()
    raw = {**baseline("mistral-7b")["config"], **SMALL, "num_key_value_heads": 2, "vocab_size": bpe(folder)}
    init_weights(Transformer(ModelConfig.from_dict(raw)), 1).save_pretrained(folder)
    write_jsonl(
        tmp_path / "mine.jsonl",
        [
            {"id": "a", "text": "Mass.", "phenotypes": {"tumor_size": []}},
            {"id": "b", "text": " \n", "phenotypes": {"tumor_size": []}},
        ],
    )
    out = tmp_path / "run"
    asked = {
        "weights": str(folder),
        "data": tmp_path / "mine.jsonl",
        "out": out,
        "form": "template",
        "max_new_tokens": 2,
    }
    main(Options(name="a b", **asked))
    answers = (out / "predictions" / "a-b.jsonl").read_text()
    assert [json.loads(line).get("error") for line in answers.splitlines()] == [None, "the note is empty"]
    for name in ("a b", "a-b"):
        with pytest.raises(UserError, match="has the row 'a b' already; give --name, or --overwrite"):
            main(Options(name=name, **asked))
    main(Options(name="a b", overwrite=True, **asked))
    main(Options(name="c", **asked))
    assert [row["name"] for row in json.loads((out / "run.json").read_text())["systems"]] == ["a b", "c"]
    write_jsonl(tmp_path / "mine.jsonl", [{"id": "a", "text": "Other.", "phenotypes": {"tumor_size": []}}])
    with pytest.raises(UserError, match=r"another job \(other data\)"):
        main(Options(name="d", overwrite=True, **asked))
