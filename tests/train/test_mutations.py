"""The tests would notice: each mistake, put into the code on purpose, fails the test that guards it.

Every one is a mistake that public trainers have made. The guards are the tests of the other files, called as they are.
"""

# ruff: noqa: E501 - the list of mistakes is a table

import shutil

import pytest
import test_block
import test_ranks
import test_rows
import torch
from tiny_runs import CONFIG, RECIPE, as_recipe, ends, mutate, tiny

from lora import merge_lora
from train.distributed.checkpoint import steps_saved
from train.session import train


@pytest.fixture()
def mistake():
    """Makes one, and takes it out at the end."""
    undo = []
    yield lambda *place: undo.append(mutate(*place))
    for take_out in undo:
        take_out()


MISTAKES = {
    "the document mask dropped": (
        ("train.data.rows", "collate", "document_BT[r, part] = number", "document_BT[r, part] = 0"),
        lambda notes, documents: (
            test_rows.test_the_leak_meter_reads_zero_for_packed_documents_and_not_for_the_faithful_rows(documents, True)
        ),
    ),
    "labels shifted by one, in answers": (
        ("train.data.rows", "branch_columns", "target = whole[1:].copy()", "target = whole[:-1].copy()"),
        lambda notes, documents: test_rows.test_supervised_tokens_are_the_answers_and_their_end_and_never_padding(
            notes
        ),
    ),
    "labels shifted by one, in texts": (
        ("train.data.rows", "text_documents", "zeros, part[1:], ones", "zeros, part[:-1], ones"),
        lambda notes, documents: test_rows.test_every_token_but_the_first_is_a_target_once.hypothesis.inner_test(30, 7),
    ),
    "a padding token in the loss": (
        ("train.data.rows", "collate", "fill_(IGNORE)", "zero_()"),
        lambda notes, documents: test_rows.test_supervised_tokens_are_the_answers_and_their_end_and_never_padding(
            notes
        ),
    ),
    "dropout left out of an adapter's gradient": (
        ("train.fast.block", "JoinedLinears.a_gradient", "self.masks.drop(n_ND, *self.dropped(n)), out", "n_ND, out"),
        lambda notes, documents: the_papers_dropout(notes),
    ),
    "the last block's attention taken from the token before": (
        (
            "train.fast.block",
            "FastBlock.forward",
            "a_ND[wanted_N], x_ND[wanted_N]",
            "a_ND[wanted_N - 1], x_ND[wanted_N]",
        ),
        lambda notes, documents: test_block.test_the_fast_block_is_the_plain_block(notes, CONFIG, ""),
    ),
    "the adapter's scale ignored": (
        ("lora.layer", "LoRALinear.forward", " * self.scale[self.active]", ""),
        lambda notes, documents: an_adapter_does_what_it_adds_to_the_weights(),
    ),
}


def the_papers_dropout(notes):
    test_block.test_the_papers_dropout_runs_through_the_fast_block(notes, "cancerllm-tune")


def an_adapter_does_what_it_adds_to_the_weights():
    model, tokens = tiny(RECIPE).eval(), torch.arange(40)[None]
    with torch.no_grad():
        beside = model(tokens)
        assert (beside - merge_lora(model)(tokens)).abs().max() < 1e-12 * beside.abs().max()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_rows_or_layers_is_noticed(name, mistake, notes, documents):
    place, guard = MISTAKES[name]
    guard(notes, documents)
    mistake(*place)
    with pytest.raises(AssertionError):
        guard(notes, documents)


@pytest.mark.parametrize(
    ("name", "more", "place"),
    [
        (
            "the optimizer's state not restored",
            {},
            ("train.distributed.checkpoint", "restore", "if saved:", "if False:"),
        ),
        (
            "bf16 weights restored in the masters' place",
            {"full": True, "dtype": "bfloat16", "dropout": 0.0},
            ("train.distributed.checkpoint", "restore", "params[name], param)", "params[name], param).bfloat16()"),
        ),
        (
            "one record skipped at resume",
            {},
            (
                "train.data.rows",
                "order",
                "range(step * batch, (step + 1) * batch)",
                "range(step * batch + 1, (step + 1) * batch + 1)",
            ),
        ),
        (
            "dropout's masks begin again at resume",
            {},
            (
                "train.loop",
                "Trainer.gradients",
                "self.plan.begin(step,",
                "self.plan.begin(step % 2,",
            ),
        ),
    ],
)
def test_a_mistake_at_resume_is_noticed(name, more, place, mistake, options, tmp_path):
    """A run of four steps loses its last checkpoint and goes on from the second step, with the mistake."""
    recipe = as_recipe(options, **more, out=str(tmp_path / "run"), steps=4)
    train(recipe, "instruct")
    straight = ends(tmp_path / "run")
    shutil.rmtree(steps_saved(tmp_path / "run" / "checkpoints")[-1])
    mistake(*place)
    train(recipe, "instruct")
    assert ends(tmp_path / "run") != straight


@pytest.mark.slow
def test_a_gradient_divided_by_the_ranks_twice_is_noticed(notes, tmp_path):
    """AdamW's losses hide it; the gradients before clipping do not."""
    case = {**test_ranks.SHARED, "steps": 3, "optimizer": "adamw", "learning_rate": 1e-2, "clip": 0.0}
    cases = {"run": (case, str(notes.path), "instruct")}
    wrong = (
        "train.distributed.sharding",
        "shard",
        "set_gradient_divide_factor(1.0)",
        "set_gradient_divide_factor(float(ranks.world))",
    )
    alone = test_ranks.launch(1, cases, tmp_path / "1")
    twice = test_ranks.launch(2, {**cases, "": wrong}, tmp_path / "2")
    assert test_ranks.largest_difference({"": twice["run/loss"]}, {"": alone["run/loss"]}) < 1e-4, "AdamW hides it"
    assert test_ranks.largest_difference(twice, alone) > 0.1
