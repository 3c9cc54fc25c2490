"""The tours run as scripts and stop where the model computes something else than what they work by hand."""

import functools
import json
import runpy
from dataclasses import replace

import pytest
import torch

from infer.engine.generate import Generator
from infer.extract.grounded import Grammar
from lora import LoRAConfig, add_lora, fold, peft, save_adapter
from lora.layer import LoRALinear
from model import KVCache, ModelConfig, Transformer
from model.attention import Attention, PlainAttend, Scores
from model.mask import Visible
from model.rotary import Rotate
from model.support.init import init_weights
from model.support.source import ROOT, place
from model.transformer import RMSNorm
from train import loop
from train.clinic.program import patient_notes
from train.data.tokenizer import Options, train_tokenizer
from train.optim import optimizer

TOURS = sorted((ROOT / "docs/tours").glob("*.py"))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """A tour takes a run from runs/ where there is one."""
    monkeypatch.chdir(tmp_path)


def tour(name):
    runpy.run_path(str(ROOT / f"docs/tours/{name}.py"), run_name="__main__")


@pytest.mark.parametrize("path", TOURS, ids=lambda path: path.stem)
def test_a_tour_shows_lines_of_code_and_numbers_worked_by_hand(path, capsys):
    tour(path.stem)
    told = capsys.readouterr().out
    assert told.count("by hand: ") >= 3 and told.count(".py:") >= 4


@pytest.mark.parametrize("path", TOURS, ids=lambda path: path.stem)
def test_a_tour_is_cells_of_whole_statements_each_under_its_text(path):
    head, *cells = path.read_text("utf-8").split("# %%")
    assert head == ""
    kinds = [cell.startswith(" [markdown]\n") for cell in cells]
    assert kinds == [True, False] * (len(cells) // 2)
    for cell, is_text in zip(cells, kinds, strict=True):
        if is_text:
            assert all(line.startswith("# ") for line in cell.splitlines()[1:])
        else:
            compile(cell, str(path), "exec")


def test_the_tours_together_have_at_most_350_lines():
    assert sum(len(path.read_text("utf-8").splitlines()) for path in TOURS) <= 350


def scaled(x):
    return x * 1.001


def a_key_too_many(mask_BTS):
    return mask_BTS | mask_BTS.roll(-1, -1)


def more_decay(made):
    made.param_groups[0]["weight_decay"] = 0.5
    return made


def likelier(out):
    return replace(out, logprobs=[0.9 * logprob for logprob in out.logprobs])


WRONG = {  # what is broken, how its result is changed, and the number by which the tour notices
    "eps": ("forward_pass", RMSNorm, "scale", scaled, "mean"),
    "rotation": ("forward_pass", Rotate, "forward", scaled, "cos"),
    "window": ("forward_pass", Visible, "block", a_key_too_many, "min"),
    "scores": ("forward_pass", Scores, "forward", scaled, "own weight"),
    "values": ("forward_pass", PlainAttend, "forward", scaled, "Σ weight"),
    "residual": ("forward_pass", Attention, "forward", scaled, "Σ z"),
    "logits": ("forward_pass", Transformer, "head", scaled, "Σ n_D"),
    "cache": ("forward_pass", KVCache, "append", lambda kv: (kv[0], kv[1] * 1.001), "from the cache"),
    "adapter's scale": ("adapter", LoRAConfig, "scale", scaled, "α / R"),
    "adapter's start": ("adapter", LoRALinear, "forward", lambda y: y + torch.rand_like(y), "new adapter changes"),
    "merge": ("adapter", fold, "merged_weight", scaled, "W\\[0, 0\\]"),
    "unmerge": ("adapter", fold, "unmerge_lora", lambda model: fold.merge_lora(model), "unmerging"),
    "adapter on disk": ("adapter", peft.AdapterFile, "__getitem__", lambda tensor: 2 * tensor, "saving"),
    "count of targets": ("training_step", loop, "batch_loss", lambda pair: (pair[0] * 13 / 8, pair[1]), "2h"),
    "gradient": ("training_step", loop, "batch_loss", lambda pair: (pair[0] * 1.001, pair[1]), "2h"),
    "loss": ("training_step", loop, "batch_loss", lambda pair: (pair[0], pair[1] * 1.001), "log p / N"),
    "norm": ("training_step", loop.Trainer, "gradient_norm", scaled, "Σ g²"),
    "decay": ("training_step", optimizer, "adamw", more_decay, "rate"),
    "grammar": ("extraction", Grammar, "may_end", lambda ends: True, "not an allowed answer"),
    "answer's probability": ("extraction", Generator, "result", likelier, "Σ log p"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_a_tour_stops_where_the_program_is_wrong(case, monkeypatch):
    name, owner, attribute, change, number = case
    right = getattr(owner, attribute)

    @functools.wraps(right)
    def wrong(*args, **options):
        return change(right(*args, **options))

    monkeypatch.setattr(owner, attribute, wrong)
    with pytest.raises(AssertionError, match=number):
        tour(name)


def test_the_extraction_asks_the_tuned_model_of_a_run(tmp_path, capsys):
    base, tuned = tmp_path / "runs/demo-x/base", tmp_path / "runs/demo-x/tuned"
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(note) + "\n" for note in patient_notes("p", 2, 0)))
    train_tokenizer(Options((str(tmp_path / "texts.jsonl"),), str(base), 512))
    config = ModelConfig.from_dict(json.loads((ROOT / "train/recipes/tiny.json").read_text()))
    model = init_weights(Transformer(config), 5)
    model.save_pretrained(base)
    save_adapter(add_lora(model, LoRAConfig(r=2)), tuned / "adapter")
    recipe = {"weights": str(base), "adapter": "", "merge_adapter": False}
    (tuned / "run.json").write_text(json.dumps({"recipe": recipe}))
    tour("extraction")
    assert "runs/demo-x/tuned/adapter" in capsys.readouterr().out


@pytest.mark.parametrize("fragment", ["no such text", "self"])
def test_a_line_that_is_gone_or_not_the_only_one_is_noticed(fragment):
    with pytest.raises(LookupError, match="lines contain"):
        place(Attention.forward, fragment)
