"""The fast block and its attention are the plain ones: results and gradients, in fp64 and against fp64."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import CONFIG, RECIPE, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from infer.engine.fuse import FusedBlock
from lora import DropoutPlan, merge_lora
from lora.adapter import adapted
from lora.quantized import quantize_base
from model.attention import PlainAttend
from model.config import ModelConfig
from model.mask import Visible
from train.data.dataset import Rows
from train.data.rows import IGNORE, Row, collate, count, note_document
from train.distributed.sharding import Ranks
from train.fast.attention import DocumentAttend, find_documents
from train.fast.block import FastBlock, fast_blocks, frozen_weights, join_weights, training_blocks
from train.loop import Trainer
from train.loss import batch_loss
from train.recipe import parse

WIDE = replace(CONFIG, windows=(None, None), qkv_bias=True)


def step(model, batch, counts) -> dict[str, torch.Tensor]:
    """The loss of a batch and every gradient."""
    model.train()
    loss, _ = batch_loss(model, batch, counts, note_loss=0.5)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all("lora_" in name for name in found)
    return {"loss": loss.detach(), **found}


def worst(ours: dict, theirs: dict) -> float:
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[k].double() - theirs[k].double()).abs().max() / theirs[k].abs().max().clamp_min(1e-30))
        for k in theirs
    )


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Its root mean square: unlike the largest one, hardly a matter of chance."""
    return float((ours.double() - truth).pow(2).mean().sqrt())


def batches(notes) -> tuple:
    rows = Rows(notes, replace(RECIPE, packing="documents", block=800, note_loss=0.5), "instruct")
    held = [rows[i] for i in range(3)]
    return collate(held), count(held)


@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["window", "bias"])
@pytest.mark.parametrize("base", ["", "int8", "nf4"])
def test_the_fast_block_is_the_plain_block(notes, config: ModelConfig, base: str):
    """1e-12 in fp64; in fp32 and bf16 no further from fp64 over the same weights than twice the plain block, gradient
    by gradient, or than two roundings of its largest number."""
    if base == "nf4":  # its groups are 64 columns; other widths would be kept in int8
        config = replace(config, hidden_size=64, intermediate_size=128, head_dim=16)
    batch, counts = batches(notes)

    def made(dtype: torch.dtype, fast: bool, wide: bool = False, packed: bool = False) -> dict[str, torch.Tensor]:
        model = tiny(RECIPE, config, dtype)
        model = model.double() if wide else model
        model = quantize_base(model, base) if base else model
        kinds = {layer.quantized.kind for layer in adapted(model).values() if layer.quantized is not None}
        assert kinds == ({base} if base else set())
        model = fast_blocks(model) if fast else model.use_attention("plain")
        assert isinstance(model.model.layers[0], FastBlock) == fast
        if packed:
            join_weights(model)
        return step(model, batch, counts)

    for packed in (False, True):
        assert worst(made(torch.float64, True, packed=packed), made(torch.float64, False)) < 1e-12
    for dtype in () if base else (torch.float32, torch.bfloat16):  # a quantized base's own values differ between dtypes
        judge, plain, fast = made(dtype, False, wide=True), made(dtype, False), made(dtype, True, packed=True)
        assert plain["loss"].dtype == torch.float32 and judge["loss"].dtype == torch.float64
        for name in judge.keys() - {"loss"}:
            rounding = 2 * torch.finfo(torch.float32).eps * float(judge[name].abs().max())
            allowed = max(2 * error(plain[name], judge[name]), rounding)
            assert 0 < error(fast[name], judge[name]) <= allowed, (dtype, name)


@pytest.mark.parametrize("joined", [False, True])
def test_adapters_on_some_layers_of_a_quantized_base(notes, joined: bool):
    """q_proj and v_proj alone: k_proj, which shares their input, stays in the wide dtype."""
    batch, counts = batches(notes)
    found = []
    for fast in (False, True):
        model = quantize_base(tiny(replace(RECIPE, target_modules=("q_proj", "v_proj"))), "int8")
        model = fast_blocks(model) if fast else model.use_attention("plain")
        if joined:
            join_weights(model)
        found.append(step(model, batch, counts))
    assert worst(found[1], found[0]) < 1e-12


class CountProducts(TorchDispatchMode):
    """`rows`: the number of rows of each product with a frozen matrix of the blocks, in order."""

    def __init__(self, model) -> None:
        super().__init__()
        frozen = (p for name, p in model.model.layers.named_parameters() if p.dim() == 2 and "lora_" not in name)
        self.storages, self.rows = {p.untyped_storage().data_ptr() for p in frozen}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            x, weight = args[-2:]
            if weight.untyped_storage().data_ptr() in self.storages:
                self.rows.append(len(x))
        return function(*args, **(kwargs or {}))


def test_a_block_has_four_products_each_way_and_the_last_one_only_for_targets(notes):
    """Joining changes no weight, and later changes to a weight take effect."""
    batch, counts = batches(notes)
    model = fast_blocks(tiny(RECIPE))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    join_weights(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with CountProducts(model) as products:
        step(model, batch, counts)
    every, read = batch.target.numel(), int((batch.target != IGNORE).sum())
    assert 0 < read < every
    forward = [every] * 4 * (CONFIG.num_hidden_layers - 1) + [every, read, read, read]
    assert products.rows == forward + [read, read, read, every] + [every] * (4 * (CONFIG.num_hidden_layers - 1) - 1)
    three = model.model.layers[0].groups()[0]
    three[1].weight.data.zero_()
    (joined_OD,) = frozen_weights(three, torch.float64)
    assert torch.equal(joined_OD, torch.cat([linear.weight for linear in three]))
    merge_lora(model)  # its weights are new parameters
    assert [id(one) for one in frozen_weights(three, torch.float64)] == [id(linear.weight) for linear in three]


def test_no_gradient_below_the_first_adapter_and_recomputed_blocks_agree(notes):
    batch, counts = batches(notes)
    found = []
    for fast, again in ((False, False), (True, False), (True, True)):
        model = tiny(RECIPE)
        for name, p in model.named_parameters():
            if "layers.0." in name:
                p.requires_grad_(False)
        model = fast_blocks(model) if fast else model
        model.model.checkpoint_blocks = again
        seen = []
        runs = []
        for number, block in enumerate(model.model.layers):
            block.register_forward_pre_hook(lambda *_, number=number, runs=runs: runs.append(number))
            block.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out.requires_grad))
        found.append(step(model, batch, counts))
        assert seen[:2] == [False, True]
        assert runs == [0, 1] + [1] * again, "a block that learns is computed once more in the backward pass"
    assert worst(found[1], found[0]) < 1e-12 and worst(found[2], found[0]) < 1e-12


def is_fast(out: torch.Tensor) -> bool:
    """True if a block's output was computed by FastBlock's own forward pass: its graph ends in FeedForward."""
    nodes = [out.grad_fn]
    for _ in range(2):  # below a reshape, and in the last block an index_copy
        nodes += [before for node in nodes for before, _ in node.next_functions if before is not None]
    return any("FeedForward" in node.name() for node in nodes)


@pytest.mark.parametrize("name", ["cancerllm", "cancerllm-faithful", "cancerllm-tune", "cancerllm-tune-faithful"])
def test_the_papers_dropout_runs_through_the_fast_block(notes, name):
    """Its masks are the plain block's, forward and backward, also for recomputed blocks; no block falls back to the
    plain one."""
    batch, counts = batches(notes)
    p = parse([f"train/recipes/{name}.toml"], "instruct" if "tune" in name else "pretrain").dropout
    assert p > 0
    ran_fast: list[bool] = []

    def made(fast: bool, dtype: torch.dtype, drop: float = p, again: bool = False) -> dict[str, torch.Tensor]:
        model = tiny(replace(RECIPE, dropout=drop), dtype=dtype)
        model = fast_blocks(model) if fast else model.use_attention("plain")
        model.model.checkpoint_blocks = again
        plan = DropoutPlan(seed=1)
        plan.begin(2, batch.branches)
        for layer in adapted(model).values():
            layer.plan = plan
        for block in model.model.layers:
            block.register_forward_hook(lambda block, given, out: ran_fast.append(is_fast(out)))
        return step(model, batch, counts)

    fast = [made(True, torch.float64), made(True, torch.float64, again=True)]
    fast_fp32, without = made(True, torch.float32), made(True, torch.float64, drop=0.0)
    assert all(ran_fast)
    ran_fast.clear()
    judge, plain_fp32 = made(False, torch.float64), made(False, torch.float32)
    assert not any(ran_fast) and all(worst(one, judge) < 1e-12 for one in fast) and worst(without, judge) > 1e-3
    wide = made(False, torch.float64)
    for key in wide.keys() - {"loss"}:
        assert error(fast_fp32[key], plain_fp32[key].double()) <= 1e-4 * float(wide[key].abs().max())


def test_full_training_keeps_its_blocks():
    model = fast_blocks(tiny(replace(RECIPE, full=True)))
    assert not any(isinstance(block, FastBlock) for block in model.model.layers)


pieces = st.lists(st.integers(1, 90), max_size=4).flatmap(
    lambda branches: st.tuples(st.integers(0 if branches else 2, 150), st.just(branches))
)


@given(st.lists(st.lists(pieces, min_size=1, max_size=3), min_size=1, max_size=3), st.sampled_from([None, 5, 400]))
@settings(deadline=None, max_examples=40)
def test_documents_hold_exactly_the_pairs_that_see_each_other(rows, window):
    """Against the definition: result and gradients to 1e-12, whatever stands in the rows."""
    made = [
        Row(
            tuple(
                note_document("a", [np.zeros(n, int), *(np.zeros(k, int) for b in sizes for k in (b, 1))])
                for n, sizes in row
            )
        )
        for row in rows
    ]
    batch = collate(made)
    B, T = batch.tokens.shape
    visible = Visible((batch.positions, batch.layout), (batch.positions, batch.layout), 0)
    real_B1T1 = (batch.layout.document_BT != -1)[:, None, :, None]
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(B, H, T, 4, dtype=torch.float64, generator=generator) for H in (4, 2, 2, 4))
    found = []
    for attend in (PlainAttend(), DocumentAttend()):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, visible, window) * real_B1T1
        found.append([out, *torch.autograd.grad(out, inputs, grad)])
    by_documents = window is None or int(batch.positions.max()) < window
    assert (find_documents(visible, window) is not None) == by_documents
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert float((ours - theirs).detach().abs().max()) <= 1e-12 * float(theirs.detach().abs().max())


def test_scores_are_computed_up_to_the_chunks_edges_alone():
    """The docstring's figures: a note of 400 tokens with eight questions of 40 has 720² pairs, 41 % visible."""
    texts = [np.zeros(400, int), *8 * [np.zeros(38, int), np.zeros(3, int)]]  # an answer's last token is no input
    batch = collate([Row((note_document("a", texts),))])
    visible = Visible((batch.positions, batch.layout), (batch.positions, batch.layout), 0)
    (document,) = find_documents(visible, None)
    x_1TK = torch.zeros(1, 720, 1)
    scores = sum(x_1TK[:, chunk.queries].shape[1] * chunk.gather(x_1TK).shape[1] for chunk in document.chunks())
    assert (scores, int(visible.mask(None).sum())) == (267_904, 214_760)


def test_running_rows_are_one_document(documents):
    rows = Rows(documents, replace(RECIPE, packing="concatenate", block=120), "pretrain")
    batch = collate([rows[0]])
    visible = Visible((batch.positions, batch.layout), (batch.positions, batch.layout), 0)
    found = find_documents(visible, None)
    assert found is not None and [one.prefix for one in found] == [slice(0, 120)]


def test_a_run_with_the_gpus_kernels_takes_the_plain_steps(notes):
    """`fuse = true`: on a CPU the kernels' definitions are computed, so the gradients must be the plain block's."""
    batch, counts = batches(notes)
    plain, fused = (step(model, batch, counts) for model in (tiny(RECIPE), training_blocks(tiny(RECIPE), fuse=True)))
    assert isinstance(training_blocks(tiny(RECIPE), fuse=True).model.layers[0], FusedBlock)
    assert worst(fused, plain) < 1e-12


@pytest.mark.slow
def test_compiled_blocks_train_as_the_plain_ones_do(notes, monkeypatch):
    """`compile = true`, traced and differentiated ahead of time; inductor's code generation, most of the minute that a
    compilation takes, is left out."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found = []
    for compiled in (False, True):
        recipe = replace(RECIPE, r=3, batch_rows=1, steps=2, dropout=0.0, learning_rate=1e-2, compile=compiled)
        made = Trainer(recipe, tiny(recipe), Rows(notes, recipe, "instruct"), None, Ranks(), {})
        assert all((block._compiled_call_impl is not None) == compiled for block in made.model.model.layers)
        for _ in range(2):
            loss, norm, _ = made.gradients(0)  # of one row, so that no other length is compiled
            found.append((loss, norm))
            made.update(0, norm)
    assert found[0][0] != found[1][0] and found[2:] == [pytest.approx(pair, rel=1e-10) for pair in found[:2]]
