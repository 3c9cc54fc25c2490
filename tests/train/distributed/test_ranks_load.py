"""Each rank reads its own rows, and what is placed, stepped, saved and resumed is the same on any number of ranks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rank_checks import WIDE
from safetensors.torch import load_file
from test_ranks import launch
from tiny_runs import CONFIG

from lora import LoRAConfig, add_lora, load_adapter, merge_lora, save_adapter
from lora.quantized import quantize_base
from model.support.init import init_weights
from model.transformer import Transformer
from train.distributed.checkpoint import steps_saved
from train.recipe import Recipe
from train.session import train

STRAIGHT = {"narrow": "straight", "full": "full straight"}  # a run that is stopped → the same in one go


def folder_of(model: Transformer, tokenizer: Path, folder: Path) -> str:
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return str(folder)


@pytest.fixture(scope="module")
def cases(data, tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("cases")
    wide = folder_of(init_weights(Transformer(WIDE), 5), data / "tok", root / "wide")
    tied = folder_of(init_weights(Transformer(replace(WIDE, tie_word_embeddings=True)), 5), data / "tok", root / "tied")
    small = folder_of(init_weights(Transformer(CONFIG), 1), data / "tok", root / "small")
    adapted = add_lora(init_weights(Transformer(WIDE), 5), LoRAConfig(r=4), seed=9)
    with torch.no_grad():
        for name, param in adapted.named_parameters():
            if "lora_B" in name:
                param.normal_()
    save_adapter(adapted, root / "adapter")
    (root / "config.json").write_text(json.dumps(WIDE.to_dict()))
    common = {"data": [str(data / "notes.jsonl")], "out": str(root / "out"), "weights": wide, "r": 4, "seed": 3}
    run = {
        **common,
        "weights": small,
        "steps": 6,
        "batch_rows": 3,
        "save_every": 2,
        "learning_rate": 1e-2,
        "block": 400,
        "threads": 1,
        "dtype": "float64",
    }
    return {
        "placed": {
            "new": common,
            "full": {**common, "full": True, "dtype": "float64"},
            "tied": {**common, "weights": tied},
            "nf4": {**common, "base": "nf4", "dtype": "bfloat16"},
            "int8": {**common, "base": "int8"},
            "on": {**common, "adapter": str(root / "adapter")},
            "merged": {**common, "adapter": str(root / "adapter"), "merge_adapter": True},
            "fresh": {
                **common,
                "weights": "",
                "init": str(root / "config.json"),
                "tokenizer": str(data / "tok"),
                "full": True,
            },
        },
        "runs": [
            {**run, "optimizer": "adamw8bit", "out": "8bit", "r": 260},
            {**run, "optimizer": "muon", "out": "muon", "full": True},
            {**run, "weights": wide, "base": "nf4", "out": "nf4"},
            {**run, "base": "int8", "out": "int8"},
            {**run, "full": True, "dtype": "bfloat16", "learning_rate": 1e-3, "out": "masters"},
        ],
        "stopped": {**run, "out": "stopped"},
        **{name: {**run, "dtype": "bfloat16", "steps": 4, "out": name} for name in ("narrow", "straight")},
        **{
            name: {**run, "dtype": "bfloat16", "full": True, "steps": 4, "out": name, "valid_data": run["data"]}
            for name in ("full", "full straight")
        },
    }


def at(cases: dict, folder: Path) -> dict:
    """The cases with their runs' folders under `folder`."""
    placed = {name: {**options, "out": str(folder / "placed" / name)} for name, options in cases["placed"].items()}
    runs = [{**options, "out": str(folder / options["out"])} for options in cases["runs"]]
    others = {name: {**cases[name], "out": str(folder / name)} for name in ("stopped", *STRAIGHT, *STRAIGHT.values())}
    return {"placed": placed, "runs": runs, **others}


@pytest.fixture(scope="module")
def alone(cases, tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("alone")
    return launch(1, at(cases, folder), folder, "rank_checks.py"), folder


def by_case(found: dict, name: str) -> dict:
    return {key.removeprefix(f"{name}/"): value for key, value in found.items() if key.startswith(f"{name}/")}


def same_bits(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key]), key


def test_a_model_placed_row_by_row_is_the_one_loaded_whole(cases, alone):
    """One process against loading, adding, merging and narrowing in memory."""
    found, (path, tied) = alone[0], (cases["placed"][name]["weights"] for name in ("new", "tied"))
    adapter, config = cases["placed"]["on"]["adapter"], LoRAConfig(r=4)
    made = {
        "new": lambda: add_lora(Transformer.from_pretrained(path), config, seed=3),
        "full": lambda: Transformer.from_pretrained(path, dtype=torch.float64),
        "tied": lambda: add_lora(Transformer.from_pretrained(tied), config, seed=3),
        "nf4": lambda: quantize_base(
            add_lora(Transformer.from_pretrained(path, dtype=torch.bfloat16), config, seed=3), "nf4"
        ),
        "int8": lambda: quantize_base(add_lora(Transformer.from_pretrained(path), config, seed=3), "int8"),
        "on": lambda: load_adapter(Transformer.from_pretrained(path), adapter),
        "fresh": lambda: init_weights(Transformer(WIDE), 3),
    }
    for name, build in made.items():
        model = build()
        expected = dict([*model.named_parameters(), *model.named_buffers()])
        ours = {key: value for key, value in by_case(found, name).items() if key != "bytes"}
        same_bits(ours, {key: value.detach() for key, value in expected.items()})
    model = add_lora(merge_lora(load_adapter(Transformer.from_pretrained(path), adapter), keep=False), config, seed=3)
    for key, value in by_case(found, "merged").items():
        if key != "bytes":
            torch.testing.assert_close(value, model.get_parameter(key).detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_three_ranks_place_step_and_resume_as_one_does(cases, alone, tmp_path):
    """Rows are shared out unevenly: of an adapter's four rows the last rank holds none."""
    (one, before), ranks = alone, 3
    for run in cases["runs"]:
        shutil.copytree(before / run["out"], tmp_path / run["out"])
        shutil.rmtree(steps_saved(tmp_path / run["out"] / "checkpoints")[-1])  # step 4 of one process is the newest
    found = launch(ranks, at(cases, tmp_path), tmp_path, "rank_checks.py")
    bits = {key for key in one if not key.endswith("/bytes")}
    same_bits({key: found[key] for key in found if not key.endswith("/bytes")}, {key: one[key] for key in bits})
    for name, options in cases["placed"].items():
        read, whole = found[f"{name}/bytes"].tolist(), int(one[f"{name}/bytes"])
        if name == "fresh":
            assert read == [0] * ranks and whole == 0
            continue
        assert (
            whole == (Path(options["weights"]) / "model.safetensors").stat().st_size - header(options["weights"])
            or name == "merged"
        )
        if name == "nf4":  # a block of 64 may begin within a row: at most a row more at each of the two edges
            assert whole <= sum(read) <= 1.1 * whole
        elif name != "merged":  # there the first rank has read the base once more, to merge it
            assert sum(read) == whole, "each byte is read once, whatever the number of ranks"
            assert max(read) <= -(-whole // ranks) * 1.05
    for run in cases["runs"]:
        ours, theirs = (
            [json.loads(line) for line in (folder / run["out"] / "metrics.jsonl").read_text().splitlines()]
            for folder in (tmp_path, before)
        )
        assert len(ours) == len(theirs) == 6 and ours[0]["loss"] - ours[-1]["loss"] > 0.002
        loss, norm = (1e-3, 1e-2) if run["dtype"] == "bfloat16" else (1e-12, 1e-10)
        for a, b in zip(ours, theirs, strict=True):
            assert abs(a["loss"] / b["loss"] - 1) < loss and abs(a["grad_norm"] / b["grad_norm"] - 1) < norm
    told = json.loads((tmp_path / f"{ranks}.json").read_text())
    assert told["went on"] == ["step-000003"] * 3
    last, lines = Path("checkpoints") / "step-000004", [Path("metrics.jsonl")]
    files = lines + [last / name for name in ("trainable.safetensors", "optimizer.safetensors", "state.json")]
    for stopped, straight in STRAIGHT.items():  # gone on with in bf16, or in one go, on as many ranks
        for file in files:
            assert (tmp_path / stopped / file).read_bytes() == (tmp_path / straight / file).read_bytes(), file
    for differ, missing in told["refusals"]:
        assert f"ranks disagree: recipe.learning_rate on rank 0 0.01, on rank {ranks - 1} 0.5" in differ
        assert missing == f"on rank {ranks - 1}: no such file"
    train(
        Recipe(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in cases["stopped"].items()}
            | {"out": str(tmp_path / "alone")}
        ),
        "instruct",
    )
    stopped, straight = (
        load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("stopped", "alone")
    )
    assert all((stopped[key] - straight[key]).abs().max() < 1e-9 for key in straight)
    names = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert names == [1, 2, 3, 4, 5, 6]


def header(folder: str) -> int:
    with open(Path(folder) / "model.safetensors", "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
