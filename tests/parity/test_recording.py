"""Recorded values are transformers' own: hidden_states and attentions, bit for bit, with their meaning stated."""

import pytest
import torch
from tiny_models import FAMILIES, some_tokens

from infer import record
from model import Transformer


@pytest.fixture
def one_thread():
    """transformers joins an expert's gate and up; several threads cut so wide a product at other places than ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama-dynamic"])
def test_hidden_states_and_attentions(family, published, one_thread):
    """hidden_states[i] is layer i's resid_pre; the last one is *normed* in transformers: final_norm.out, not
    resid_post of the last layer, which transformers does not give."""
    from transformers import AutoModelForCausalLM

    ours, tokens = Transformer.from_pretrained(published(family)), some_tokens(20)
    options = {"experts_implementation": "eager"} if "mixtral" in family else {}
    theirs = AutoModelForCausalLM.from_pretrained(published(family), attn_implementation="eager", **options).eval()
    with torch.no_grad():
        with record(ours, "layers.*.resid_*, layers.*.attn.pattern, final_norm.out, logits") as tape:
            ours(tokens)
        out = theirs(tokens, output_hidden_states=True, output_attentions=True, use_cache=False)
    layers = ours.config.num_hidden_layers
    assert len(out.hidden_states) == layers + 1 and len(out.attentions) == layers
    for n in range(layers):
        assert torch.equal(tape[f"layers.{n}.resid_pre"], out.hidden_states[n])
        assert torch.equal(tape[f"layers.{n}.attn.pattern"], out.attentions[n])
    assert torch.equal(tape["final_norm.out"], out.hidden_states[-1])
    assert not torch.equal(tape[f"layers.{layers - 1}.resid_post"], out.hidden_states[-1])
    assert torch.equal(tape["logits"], out.logits)
