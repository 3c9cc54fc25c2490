"""The tour's numbers worked by hand are the model's, for every family; a wrong model is told; the page is harmless."""

import re
import stat
from itertools import islice

import pytest
from tiny_models import FAMILIES, tiny

from model import lesson, tour
from model.lesson import Step, near, source, tell
from model.support.cli import UserError


def seen_of(family, count=40):
    model = tiny(family, dtype=lesson.torch.float32).requires_grad_(False)
    ids = [(7 * i + 3) % model.config.vocab_size for i in range(count)]
    return tour.observe(model, None, ids, ["x"] * count)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_worked_by_hand_is_the_models(family):
    told = list(islice(tour.steps(seen_of(family)), 13))  # without the last, which measures the memory's rate
    hands = [hand for step in told for hand in step.hand]
    assert len(hands) >= 6 and all(hand.ok for hand in hands)


def test_the_costs_add_up_to_two_flops_a_weight():
    """All weights but the embedding's other rows are read once for a token; attention reads keys and values."""
    seen = seen_of("mistral")
    c, told = seen.config, list(tour.steps(seen))
    often = {"Embedding": 1, "The next token": 1, "Norm": 2 * c.num_hidden_layers + 1}
    read = sum(step.cost[1] * often.get(step.title, c.num_hidden_layers) for step in told if step.cost)
    weights = sum(p.numel() for p in seen.model.parameters()) - (c.vocab_size - 1) * c.hidden_size
    held = 2 * c.num_hidden_layers * c.window * c.num_key_value_heads * c.head_dim
    assert read == 4 * (weights + held)


def test_a_model_that_computes_something_else_is_told(capsys):
    seen = seen_of("llama")
    seen.block.input_layernorm.eps = 1e-2  # after the pass: now the hand's number is another
    assert tell("t", "o", tour.steps(seen), None) == 1
    assert "Norm" in capsys.readouterr().err


def test_a_line_that_is_gone_is_noticed():
    with pytest.raises(AssertionError, match="0 lines"):
        source(tour.observe, "no such text")


def test_the_page_shows_the_prompt_and_never_runs_it(tmp_path):
    prompt, page = "<script>alert('x')</script> ER+ \u202e", tmp_path / "tour.html"
    assert tour.main(tour.Options(prompt=prompt, html=str(page))) == 0
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;" in text
    assert not re.search(r"(src|href)=|https?:|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert text.count("<h2") == 14 and "model/transformer.py:" in text
    assert stat.S_IMODE(page.stat().st_mode) == 0o600


def test_the_terminal_and_the_page_tell_the_same(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    step = Step("A step", "It says.", source(near, "size ="), [("a fact", "1 × 2")], [near("1 + 1", 2, 2.0)], (2000, 8))
    assert tell("Title", "Opening.", [step], None) == 0
    told = capsys.readouterr().out
    page = lesson.as_page("Title", "Opening.", [step])
    for text in ("Title", "Opening.", "A step", "It says.", "a fact", "1 × 2", "1 + 1 = 2", "2 kFLOP, 8 B read"):
        assert text in told and text in page
    assert max(map(len, told.splitlines())) <= 100


@pytest.mark.parametrize("prompt", ["", "a" * 600, "\udcff"])
def test_a_prompt_that_cannot_be_told_is_refused(prompt):
    with pytest.raises(UserError, match="--prompt"):
        tour.main(tour.Options(prompt=prompt))
