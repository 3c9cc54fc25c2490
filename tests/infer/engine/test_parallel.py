"""Two ranks that hold a model together give the tokens of one, and each holds half of the split matrices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from answering_models import CONFIG, tiny_model, write_model
from jobs import command, write_notes

from infer.engine.generate import Generator
from infer.engine.load import load
from infer.engine.parallel import check_divides
from infer.extract.program import Options, main
from lora import LoRAConfig, add_lora, save_adapter
from model.support.cli import UserError, guard, run

KINDS = {
    "llama": {},
    "window": {"windows": (7, 7), "model_type": "mistral"},
    "biases": {"model_type": "llama", "qkv_bias": True, "o_bias": True, "tie_word_embeddings": True},
    "experts": {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
}


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([*launch, *arguments], env=env, capture_output=True, text=True, timeout=300)


def write_adapter(weights: Path, folder: Path) -> Path:
    model, _ = load(weights)
    add_lora(model, LoRAConfig(r=4, alpha=16, target_modules="all-linear"), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    save_adapter(model, folder)
    return folder


@pytest.mark.slow
def test_two_ranks_generate_the_tokens_of_one(tmp_path):
    prompts = [[(7 * i + n) % 200 for i in range(5 + 11 * n)] for n in range(3)] + [[1, 2, 3], [1, 2, 4]]
    cases = {name: (str(write_model(tmp_path / name, **kind)), [], prompts) for name, kind in KINDS.items()}
    cases["adapter"] = (cases["llama"][0], [str(write_adapter(tmp_path / "llama", tmp_path / "a"))], prompts)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = torchrun(str(Path(__file__).with_name("two_ranks.py")), str(tmp_path / "cases.json"), str(tmp_path / "o"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "o").read_text())
    for name, (weights, adapters, _) in cases.items():
        model, tokenizer = load(weights, adapters, "float64")
        split = sum(p.numel() for n, p in model.named_parameters() if n.endswith("_proj.weight") or ".experts." in n)
        outs = Generator(model, tokenizer).generate(prompts, max_new_tokens=12, temperature=0.5)
        for (tokens, logprobs), out in zip(found[name]["outs"], outs, strict=True):
            assert tokens == out.tokens, name
            assert torch.allclose(torch.tensor(logprobs), torch.tensor(out.logprobs), atol=1e-9), name
        whole = sum(p.numel() for p in model.parameters())
        assert found[name]["held"] <= whole - split // 2, name
    plain, adapted = (found[name]["outs"] for name in ("llama", "adapter"))
    assert plain != adapted


@pytest.mark.slow
def test_extraction_with_a_model_on_two_ranks(tmp_path):
    weights, notes = write_model(tmp_path / "model"), write_notes(tmp_path / "n.jsonl", 5)
    one = [*command(weights, notes, tmp_path / "one.jsonl"), "--dtype", "float64"]
    subprocess.run(one, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    two = [*command(weights, notes, tmp_path / "two.jsonl"), "--dtype", "float64", "--tensor-parallel", "2"]
    done = torchrun(*two[1:])
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


@pytest.mark.slow
def test_a_mistake_is_said_once_and_not_by_every_rank(tmp_path):
    done = torchrun(*command(tmp_path, tmp_path / "n.jsonl", tmp_path / "o.jsonl")[1:], "--limit=0")
    assert done.returncode == 1 and done.stderr.count("--limit is 0") == 1


def test_a_wrong_option_is_said_by_the_first_of_a_machine(monkeypatch, capsys):
    monkeypatch.setattr("model.support.cli.TORCHRUN_SECONDS", 0.0)
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as exit_:
            run(main, Options, ["--weights", "w", "--notes", "n", "--out", "o", "--bach", "2"])
        assert exit_.value.code == 2 and ("--bach" in capsys.readouterr().err) == (rank == "0")


def test_a_rank_that_is_none(tmp_path, monkeypatch, capsys):
    options = Options(weights="w", notes=tmp_path / "n", out=tmp_path / "o")
    for rank, world in (("x", "2"), ("2", "2"), ("-1", "2"), ("1", ""), ("0", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        assert guard(lambda: main(options), "infer.extract") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"RANK={rank}, WORLD_SIZE={world}" in line


def test_heads_and_units_are_shared_evenly():
    check_divides(CONFIG, 2)
    with pytest.raises(UserError, match="num_key_value_heads"):
        check_divides(tiny_model(num_attention_heads=8).config, 4)
