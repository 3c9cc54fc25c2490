"""Recording and overwriting: the definitions hold among the values kept, a generation's tape is one pass's, a change
moves exactly what depends on it, and nothing is ever kept empty in silence."""

import pytest
import torch
from answering_models import tiny_model

from infer import Generator, patch, record
from infer.engine.fuse import fuse
from lora import LoRAConfig, add_lora
from lora.adapter import adapted
from model import KVCache
from model.support.cli import UserError


def tokens(T=11, B=2):
    return torch.randint(3, 300, (B, T), generator=torch.Generator().manual_seed(T))


def close(a, b):
    return bool((a - b).abs().max() <= 1e-12 * b.abs().max().clamp(min=1))


def adapted_model(**changes):
    model = tiny_model(**changes)
    add_lora(model, LoRAConfig(r=3, alpha=6))
    for number, layer in enumerate(adapted(model).values()):
        torch.nn.init.normal_(layer.lora_B["default"], std=0.1, generator=torch.Generator().manual_seed(number))
    return model.eval()


@pytest.mark.parametrize("experts", [0, 3])
def test_the_values_are_those_of_the_definitions(experts):
    model = adapted_model(windows=(4, None), num_local_experts=experts, num_experts_per_tok=2 if experts else 0)
    with record(model, "*") as tape, torch.no_grad():
        logits = model(tokens())
    assert set(tape) == set(record.names(model)) and all(tape[name].isfinite().all() for name in tape)
    assert torch.equal(tape["logits"], logits)
    for n in (0, 1):
        at = {name.removeprefix(f"layers.{n}."): tape[name] for name in tape if name.startswith(f"layers.{n}.")}
        assert torch.equal(at["attn_norm.in"], at["resid_pre"]) and torch.equal(at["mlp_norm.in"], at["resid_mid"])
        block = model.model.layers[n]
        for norm, module in (("attn_norm", block.input_layernorm), ("mlp_norm", block.post_attention_layernorm)):
            assert close(at[f"{norm}.in"] * at[f"{norm}.scale"] * module.weight, at[f"{norm}.out"])
        k = at["attn.k_rot"].repeat_interleave(2, dim=1)
        scores, seen = at["attn.q_rot"] @ k.transpose(2, 3) * 8**-0.5, at["attn.scores"] > -1e30
        distance = torch.arange(11)[:, None] - torch.arange(11)
        assert torch.equal(seen[0, 0], (distance >= 0) & (distance < (4 if n == 0 else 99)))
        assert close(at["attn.scores"][seen], scores[seen])
        assert close(at["attn.scores"].softmax(-1), at["attn.pattern"])
        assert close(at["attn.pattern"] @ at["attn.v"].repeat_interleave(2, dim=1), at["attn.z"])
        assert close(at["attn.result"].sum(1), at["attn.out"])  # with an adapter on o_proj
        assert close(at["resid_pre"] + at["attn.out"], at["resid_mid"])
        assert close(at["resid_mid"] + at["mlp.out"], at["resid_post"])
        if not experts:
            assert close(torch.nn.functional.silu(at["mlp.gate"]) * at["mlp.up"], at["mlp.hidden"])
    assert torch.equal(tape["embed"], tape["layers.0.resid_pre"])
    assert torch.equal(tape["layers.1.resid_post"], tape["final_norm.in"])


@pytest.mark.parametrize("window", [None, 3])
def test_each_pass_of_a_generation_has_its_own_values(window):
    """Prefill in two chunks, then token by token, with slots dropped from a full cache."""
    model, ids = tiny_model(windows=(window, window)), tokens(17)
    asked = "layers.*.attn.z, layers.1.resid_mid, layers.0.attn.k_rot, logits"
    with record(model, asked) as whole:
        model(ids)
    cache = KVCache(model.config, slack=2)
    with record(model, asked) as parts:
        for chunk in ids.split([5, 4, 1, 1, 1, 1, 1, 1, 1, 1], dim=1):
            model(chunk, cache=cache)
    assert len(parts.passes) == 10 and (window is None or cache.dropped > 0)
    for name, shape in whole.shapes.items():
        joined = torch.cat([values[name] for values in parts.passes], dim=shape.index("T"))
        assert close(joined, whole[name]), name


def test_the_positions_are_those_asked_for():
    model, ids = tiny_model(), tokens()
    with record(model, "*") as all_of_it, torch.no_grad():
        model(ids)
    for wanted, rows in (([-1], [10]), (range(2, 5), [2, 3, 4]), ([0, 7], [0, 7])):
        with record(model, "*", positions=wanted) as tape:
            model(ids)
        for name, shape in tape.shapes.items():
            kept = all_of_it[name].index_select(shape.index("T"), torch.tensor(rows))
            assert torch.equal(tape[name], kept), name


def test_the_model_is_as_before_after_a_recording():
    model, ids = fuse(tiny_model()), tokens()
    before, attends = model(ids), [block.self_attn.attend for block in model.model.layers]
    with record(model, "*"), patch(model, {"layers.0.attn.pattern": 0.0}):
        changed = model(ids)
    assert not torch.equal(changed, before) and torch.equal(model(ids), before)
    assert [block.self_attn.attend for block in model.model.layers] == attends
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("path", ["fast", "fused"])
def test_fast_paths_record_the_plain_paths_values(path):
    asked = "layers.1.attn.pattern, layers.*.attn.scores, layers.0.mlp.gate, layers.1.attn_norm.out"
    model, ids = tiny_model(windows=(4, None)), tokens(30)
    with record(model, asked) as plain:
        model(ids)
    with record(fuse(model) if path == "fused" else model.use_attention("fast"), asked) as fast:
        model(ids)
    assert all(close(fast[name], plain[name]) for name in plain)


def test_a_change_moves_what_depends_on_it_and_nothing_else():
    model, ids = tiny_model(), tokens()
    with record(model, "*") as before, torch.no_grad():
        model(ids)
    head = torch.full((2, 11, 8), 0.5, dtype=torch.float64)
    with patch(model, {"layers.1.attn.z[:, 2]": head}), record(model, "*") as tape, torch.no_grad():
        model(ids)
    moved = {name for name in tape if not torch.equal(tape[name], before[name])}
    assert torch.equal(tape["layers.1.attn.z"][:, 2], head)
    assert moved == set(list(tape)[list(tape).index("layers.1.attn.z") :])
    with record(model, "*") as tape, patch(model, {"layers.0.resid_mid[:, 6]": lambda x: x * 2}), torch.no_grad():
        model(ids)
    assert torch.equal(tape["layers.0.resid_mid"][:, 6], 2 * before["layers.0.resid_mid"][:, 6])
    assert torch.equal(tape["logits"][:, :6], before["logits"][:, :6])
    assert not torch.equal(tape["logits"][:, 6], before["logits"][:, 6])


def test_putting_back_what_was_there_changes_nothing():
    model, ids = tiny_model(), tokens()
    with record(model, "*") as tape, torch.no_grad():
        model(ids)
    derived = [name for name in tape if name.endswith((".scale", ".result"))]
    with patch(model, {name: tape[name] for name in tape if name not in derived}), torch.no_grad():
        assert torch.equal(model(ids), tape["logits"])
    for name in derived:
        with pytest.raises(UserError, match="derived"), patch(model, {name: 0.0}):
            pass


def test_restoring_the_residual_stream_restores_the_answer():
    """Activation patching: a corrupted prompt with the clean stream put back at every position is the clean prompt."""
    model, clean, corrupt = tiny_model(), tokens(9), tokens(9).flip(1)
    with record(model, "layers.1.resid_pre") as tape:
        wanted = model(clean)
    with patch(model, {"layers.1.resid_pre": tape["layers.1.resid_pre"]}):
        assert torch.equal(model(corrupt), wanted)


def test_a_recording_without_a_value_raises(tokenizer):
    model, ids = tiny_model(), tokens()
    with pytest.raises(UserError, match="the generation engine does not run the model's modules"):
        with record(model, "layers.*.attn.pattern"):
            Generator(model, tokenizer).generate([[5, 6, 7]], max_new_tokens=2)
    with pytest.raises(UserError, match="the generation engine"), patch(model, {"embed": 0.0}):
        Generator(model, tokenizer).generate([[5, 6, 7]], max_new_tokens=2)
    with pytest.raises(UserError, match="no forward pass"), record(model, "embed"):
        pass
    with pytest.raises(UserError, match="nothing was recorded for logits"), record(model, "logits, embed"):
        model(ids, readout=lambda x, head: None)
    with pytest.raises(UserError, match="overwrote nothing"), patch(model, {"logits[0]": 0.0}):
        model.model(ids, None, None, None)
    with record(model, "embed") as tape:
        model(ids), model(ids)
    with pytest.raises(UserError, match="2 passes were recorded"):
        tape["embed"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("layers.0.atn.patern", "nearest: layers.0.attn.pattern"),
        ("layers.7.attn.pattern", "nearest: "),
        ("layers.*.attention", "nearest: "),
        ("", "record.names"),
    ],
)
def test_a_name_that_names_nothing_lists_the_nearest(names, said):
    with pytest.raises(UserError, match=said), record(tiny_model(), names):
        pass


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("layers.0.resid_mid[:, -1", 0.0, "not a name with an index"),
        ("layers.0.resid_mid[a]", 0.0, "not a name with an index"),
        ("layers.0.resid_mid[1-2]", 0.0, "is not an index"),
        ("layers.0.resid_mid[:, 99]", 0.0, "does not fit"),
        ("layers.0.resid_mid[:, -1]", torch.zeros(5), r"shape \[5\] cannot replace \[2, 32\]"),
        ("layers.0.resid_mdi", 0.0, "nearest: layers.0.resid_mid"),
    ],
)
def test_a_change_that_cannot_be_made_names_the_reason(key, value, said):
    model = tiny_model()
    with pytest.raises(UserError, match=said), patch(model, {key: value}):
        model(tokens())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_printed_table_holds_every_name_once():
    listed = record.names(tiny_model())
    assert "layers.1.attn.pattern" in listed and "BHTS" in listed["layers.1.attn.pattern"]
    lines = str(listed).splitlines()
    assert sum(line.startswith("layers.N.attn.pattern ") for line in lines) == 1 and len(lines) < len(listed)
