"""What a row holds: packed documents do not see each other, order, documents, targets."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import RECIPE, mean_loss, tiny

from model.support.cli import UserError
from model.support.init import init_weights
from model.transformer import Block
from train.data.dataset import Rows
from train.data.rows import ANSWER, IGNORE, NOTE, Row, collate, count, order, pack, text_documents
from train.fast.block import FastBlock, fast_blocks
from train.loss import ChunkedCrossEntropy, batch_loss


@torch.no_grad()
def leaks(store, packing: str, fast: bool) -> list[float]:
    """Of each document of a row, how far the logits of the others move when it changes."""
    recipe = replace(RECIPE, packing=packing, block=400)
    rows = Rows(store, recipe, "pretrain")
    made = [rows[i] for i in range(len(rows))]
    row = max(made, key=lambda row: sum(len(document.branches) for document in row.documents))
    model = tiny(recipe).eval()
    model = fast_blocks(model) if fast else model
    assert {type(block) for block in model.model.layers} == {FastBlock if fast else Block}
    batch, start, found = collate([row]), 0, []
    positions, layout = batch.positions, batch.layout
    before_BTV = model(batch.tokens, positions=positions, layout=layout)
    for _, _, length in (branch for document in row.documents for branch in document.branches):
        other, own = batch.tokens.clone(), slice(start, start + length)
        other[0, own] = (other[0, own] + 1) % 256
        change_TV = (model(other, positions=positions, layout=layout) - before_BTV)[0].abs()
        change_TV[own] = 0.0
        found.append(float(change_TV.max()))
        start += length
    return found


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_the_leak_meter_reads_zero_for_packed_documents_and_not_for_the_faithful_rows(documents, fast):
    """Every document in turn, by the plain blocks and by those that train. Nothing comes after the last one."""
    apart, together = (leaks(documents, packing, fast) for packing in ("documents", "concatenate"))
    assert len(apart) > 2 and apart == [0.0] * len(apart)
    assert len(together) > 2 and min(together[:-1]) > 1e-3 and together[-1] == 0.0


def test_faithful_rows_are_full_run_on_and_drop_the_tail(documents):
    rows = Rows(documents, replace(RECIPE, packing="concatenate", block=50), "pretrain")
    flat = np.concatenate([documents[i][1][0] for i in range(len(documents))])
    assert len(rows) == len(flat) // 50
    assert np.array_equal(
        np.concatenate([rows[i].documents[0].tokens for i in range(len(rows))]), flat[: len(rows) * 50]
    )
    assert np.array_equal(rows[1].documents[0].positions, np.arange(50))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=200), st.integers(60, 100), st.integers(1, 64))
@settings(deadline=None, max_examples=60)
def test_packing_keeps_every_unit_once_and_no_row_overflows(lengths, block, window):
    rows = list(pack(np.asarray(lengths), block, window))
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(sum(lengths[document] for document in row) <= block for row in rows)


@given(st.integers(2, 90), st.integers(2, 40))
@settings(deadline=None, max_examples=60)
def test_every_token_but_the_first_is_a_target_once(length, block):
    ids = np.arange(length)
    documents = text_documents("a", ids, block)
    assert np.concatenate([document.target for document in documents]).tolist() == list(range(1, length))
    assert np.concatenate([document.tokens for document in documents]).tolist() == list(range(length - 1))


@given(st.integers(0, 5), st.integers(1, 30), st.integers(1, 7))
@settings(deadline=None, max_examples=40)
def test_passes_follow_each_other_and_each_holds_every_row_once(seed, rows, batch):
    drawn = [i for step in range(-(-3 * rows // batch)) for i in order(seed, step, rows, batch)][: 3 * rows]
    assert all(sorted(drawn[turn * rows : (turn + 1) * rows]) == list(range(rows)) for turn in range(3))


def test_supervised_tokens_are_the_answers_and_their_end_and_never_padding(notes):
    rows = Rows(notes, RECIPE, "instruct")
    texts = dict(notes[i] for i in range(len(notes)))
    for i in range(len(rows)):
        document = rows[i].documents[0]
        pieces = texts[document.record]
        assert document.target[document.target != IGNORE].tolist() == np.concatenate(pieces[2::2]).tolist()
        assert all(answer[-1] == 257 for answer in pieces[2::2]), "an answer ends in the end-of-text token"
    batch = collate([rows[0], rows[1], Row(())])
    padding = batch.layout.document_BT == -1
    assert padding.any() and (batch.target[padding] == IGNORE).all()


def test_the_chunked_loss_is_cross_entropy(notes):
    rows = [Rows(notes, RECIPE, "instruct")[i] for i in range(4)]
    model, batch = tiny(RECIPE), collate(rows)
    loss, summed = batch_loss(model, batch, count(rows))
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    plain = mean_loss(model(batch.tokens, positions=batch.positions, layout=batch.layout), batch.target)
    theirs = torch.autograd.grad(plain, [p for p in model.parameters() if p.requires_grad])
    assert abs(float(loss / plain) - 1) < 1e-13 and abs(float(summed) / count(rows)[ANSWER] / float(plain) - 1) < 1e-13
    for ours, other in zip(grads, theirs, strict=True):
        assert (ours - other).abs().max() < 1e-12 * other.abs().max()
    x_ND = torch.randn(1100, 16, dtype=torch.float64, requires_grad=True)  # three chunks, and the weight's gradient
    weight_VD, target_N = torch.randn(30, 16, dtype=torch.float64, requires_grad=True), torch.arange(1100) % 30
    loss, _ = ChunkedCrossEntropy.apply(x_ND, weight_VD, target_N, torch.full((1100,), 1 / 1100, dtype=torch.float64))
    plain = torch.nn.functional.cross_entropy(x_ND @ weight_VD.t(), target_N)
    for ours, other in zip(
        torch.autograd.grad(loss, (x_ND, weight_VD)), torch.autograd.grad(plain, (x_ND, weight_VD)), strict=True
    ):
        assert (ours - other).abs().max() < 1e-12 * other.abs().max()


def test_a_bf16_heads_gradient_adds_up_in_fp32_over_chunks():
    """Sixty chunks: added up in bf16 the error would be some times that of rounding once."""
    generator = torch.Generator().manual_seed(1)
    x_ND, weight_VD = (torch.randn(n, 4, generator=generator).bfloat16().requires_grad_(True) for n in (30_000, 8))
    target_N = torch.randint(8, (30_000,), generator=generator)
    loss, _ = ChunkedCrossEntropy.apply(x_ND, weight_VD, target_N, torch.full((30_000,), 1 / 30_000))
    (found_VD,) = torch.autograd.grad(loss, weight_VD)
    wide_VD = weight_VD.detach().double().requires_grad_(True)
    plain = torch.nn.functional.cross_entropy(x_ND.double() @ wide_VD.t(), target_N)
    (truth_VD,) = torch.autograd.grad(plain, wide_VD)
    assert found_VD.dtype == torch.bfloat16 and (found_VD - truth_VD).norm() < 2**-8 * truth_VD.norm()


def test_the_notes_own_loss_is_a_mean_beside_the_answers_mean(notes):
    """note_loss weighs it; the loss that is reported is the answers' alone."""
    rows = [Rows(notes, replace(RECIPE, note_loss=0.3), "instruct")[i] for i in range(3)]
    model, batch = tiny(RECIPE), collate(rows)
    loss, summed = batch_loss(model, batch, count(rows), note_loss=0.3)
    with torch.no_grad():
        logits = model(batch.tokens, positions=batch.positions, layout=batch.layout)
        answers, own = (
            float(mean_loss(logits, batch.target.where(batch.kind == kind, IGNORE))) for kind in (ANSWER, NOTE)
        )
    assert answers != own and float(loss.detach()) == pytest.approx(answers + 0.3 * own, rel=1e-12)
    assert float(summed) == pytest.approx(answers * count(rows)[ANSWER], rel=1e-12)


def test_no_gradient_reaches_below_the_first_adapter(notes):
    from lora import LoRAConfig, add_lora
    from model.transformer import Transformer

    model = init_weights(Transformer(tiny(RECIPE).config), 1).double().use_attention("fast")
    add_lora(model, LoRAConfig(r=2, layers=(1,)))
    seen = []
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda m, i, out, number=number: seen.append((number, out.requires_grad)))
    rows = [Rows(notes, RECIPE, "instruct")[0]]
    batch_loss(model, collate(rows), count(rows))
    assert seen == [(0, False), (1, True)]


def test_a_record_longer_than_a_row_is_named(notes):
    with pytest.raises(UserError, match=r"record 'note-\d+' takes \d+ tokens, more than block = 64"):
        Rows(notes, replace(RECIPE, block=64), "instruct")
