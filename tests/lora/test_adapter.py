"""Adapters against their definition, against peft in both directions, merged, unmerged and audited."""

import json
import shutil
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import TOKENS, base, trained

from lora import (
    DropoutPlan,
    LoRAConfig,
    add_lora,
    load_adapter,
    merge_lora,
    no_adapter,
    save_adapter,
    set_adapter,
    unmerge_lora,
)
from lora.adapter import adapted
from lora.audit import Options as AuditOptions
from lora.audit import audit, draw
from lora.audit import main as audit_main
from lora.dropout import TABLE_SIZE
from lora.merge import Options, main
from model import Transformer
from model.support.cli import UserError


@pytest.fixture()
def weights(tmp_path):
    base().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": None,
                "post_processor": None,
                "decoder": None,
                "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
            }
        )
    )
    return tmp_path / "base"


CONFIGS = [
    LoRAConfig(r=4, alpha=8.0),
    LoRAConfig(r=3, alpha=5.0, rslora=True, target_modules=("q_proj", "down_proj")),
    LoRAConfig(r=4, layers=(1,), rank_pattern={"v_proj": 2}, alpha_pattern={"o_proj": 3.0}),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_new_adapter_changes_nothing_and_a_trained_one_adds_its_scaled_product(config):
    assert torch.equal(add_lora(base(), config)(TOKENS), base()(TOKENS))
    model = trained(config, torch.float64)
    merged_base = base(torch.float64)
    for path, layer in adapted(model).items():
        name, rank = path.rpartition(".")[2], config.rank_pattern.get(path.rpartition(".")[2], config.r)
        alpha = config.alpha_pattern.get(name, config.alpha)
        scale = alpha / (rank**0.5 if config.rslora else rank)
        with torch.no_grad():
            merged_base.get_submodule(path).weight += scale * layer.lora_B["default"] @ layer.lora_A["default"]
    ours, theirs = model(TOKENS), merged_base(TOKENS)
    assert (ours - base(torch.float64)(TOKENS)).abs().max() > 1e-2
    assert (ours - theirs).abs().max() < 1e-12 * theirs.abs().max()


def test_dropout_is_for_training_only():
    sure, drops = trained(CONFIGS[0]), trained(replace(CONFIGS[0], dropout=0.5))
    assert torch.equal(drops.eval()(TOKENS), sure.eval()(TOKENS))
    assert not torch.equal(drops.train()(TOKENS), sure.train()(TOKENS))


@pytest.mark.parametrize("config", CONFIGS)
def test_peft_loads_ours_and_we_load_pefts(config, weights, tmp_path):
    peft, transformers = (
        pytest.importorskip("peft", reason="needs peft: make test installs it"),
        pytest.importorskip("transformers", reason="needs transformers: make test installs it"),
    )
    model = trained(config)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "README.md").write_text("mine")
    save_adapter(model, tmp_path / "ours", base=weights)
    assert (tmp_path / "ours" / "README.md").read_text() == "mine", "a folder keeps what is not ours"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(weights, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours", is_trainable=True)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, back = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == back.keys() and all(torch.equal(ours[key], back[key]) for key in ours)
    again = load_adapter(base(), tmp_path / "theirs")
    assert torch.equal(again(TOKENS), model(TOKENS))
    judge = trained(config, torch.float64)(TOKENS)
    wrong = (theirs(TOKENS).logits.double() - judge).abs().max()
    assert (model(TOKENS).double() - judge).abs().max() <= 2 * wrong
    # one step down the gradient of the same loss: the trained tensors agree as the gradients do
    for each in (theirs, again):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        out = each(TOKENS)
        logits = out.logits if hasattr(out, "logits") else out
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        optimizer.step()
    save_adapter(again, tmp_path / "ours2")
    theirs.save_pretrained(tmp_path / "theirs2")
    ours, back = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours2", "theirs2"))
    for key in ours:
        torch.testing.assert_close(ours[key], back[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_gives_the_base_back_bit_for_bit(dtype):
    model = trained(CONFIGS[0], dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with_adapter = model(TOKENS)
    merge_lora(model)
    merged = model(TOKENS)
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    if dtype == torch.float32:
        assert (merged - with_adapter).abs().max() < 1e-4
    unmerge_lora(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model(TOKENS), with_adapter)


def test_a_merge_for_good_holds_the_original_of_one_layer_at_a_time():
    """Held until the end, they took a second copy of a model's linear layers."""
    model, left = trained(CONFIGS[0]), []
    count = len(adapted(model))
    for layer in adapted(model).values():
        weakref.finalize(layer, lambda: left.append(len(adapted(model))))
    del layer
    merge_lora(model, keep=False)
    assert left == [*range(count - 1, -1, -1)] and count > 10  # layers left to merge, as each is freed


def test_several_adapters_one_active_and_off_in_a_context():
    model = trained(CONFIGS[0])
    first = model(TOKENS)
    add_lora(model, CONFIGS[0], name="second", seed=5)
    assert torch.equal(model(TOKENS), base()(TOKENS)), "a new adapter is active and changes nothing"
    assert all("second" in name for name, p in model.named_parameters() if p.requires_grad)
    set_adapter(model, "default")
    assert torch.equal(model(TOKENS), first)
    with no_adapter(model):
        assert torch.equal(model(TOKENS), base()(TOKENS))
    assert torch.equal(model(TOKENS), first)
    merge_lora(model)
    for change in (
        lambda: set_adapter(model, "second"),
        lambda: add_lora(model, CONFIGS[0], name="third"),
        lambda: no_adapter(model).__enter__(),
    ):
        with pytest.raises(UserError, match="call unmerge_lora first"):
            change()
    unmerge_lora(model)
    with pytest.raises(UserError, match="no dots"):
        add_lora(model, CONFIGS[0], name="a.b")
    with pytest.raises(UserError, match="did you mean 'second'"):
        set_adapter(model, "secnd")


def test_streamed_merge_equals_the_merge_in_memory(weights, tmp_path, capsys):
    model = trained(CONFIGS[2])
    save_adapter(model, tmp_path / "adapter")
    main(Options(str(weights), str(tmp_path / "adapter"), str(tmp_path / "merged")))
    merge_lora(model, keep=False)
    loaded = Transformer.from_pretrained(tmp_path / "merged").state_dict()
    ours = model.state_dict()
    assert loaded.keys() == ours.keys()
    for key in ours:
        torch.testing.assert_close(loaded[key], ours[key], rtol=1e-6, atol=1e-7)  # the order of a sum over r
    with pytest.raises(UserError, match="is itself read"):
        main(Options(str(weights), str(tmp_path / "adapter"), str(weights), overwrite=True))
    (tmp_path / "notes.jsonl").write_text("all I have")
    with pytest.raises(UserError, match="a file is there"):
        main(Options(str(weights), str(tmp_path / "adapter"), str(tmp_path / "notes.jsonl"), overwrite=True))
    assert (tmp_path / "notes.jsonl").read_text() == "all I have"
    (weights / "tokenizer.json").write_text("{")
    assert main(Options(str(weights), str(tmp_path / "adapter"), str(tmp_path / "again"))) == 0
    assert "again/tokenizer.json: not a tokenizer.json" in capsys.readouterr().err
    (weights / "tokenizer.json").unlink()  # weights alone are merged too
    assert main(Options(str(weights), str(tmp_path / "adapter"), str(tmp_path / "again"), overwrite=True)) == 0
    assert "without a tokenizer that can be read: " in capsys.readouterr().err
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "merged" / "model.safetensors"
    ).read_bytes()


def test_audit_agrees_with_the_whole_matrices(weights, tmp_path):
    model = trained(CONFIGS[0])
    save_adapter(model, tmp_path / "adapter")
    rows = {row["module"]: row for row in audit(str(tmp_path / "adapter"), str(weights))}
    assert rows.keys() == adapted(model).keys()
    for path, layer in adapted(model).items():
        delta = layer.delta("default").double()
        sigma = torch.linalg.svdvals(delta)
        assert rows[path]["norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert rows[path]["top"] == pytest.approx(sigma[:4].tolist(), rel=1e-4)
        assert rows[path]["relative_norm"] == pytest.approx(float(delta.norm() / layer.weight.norm()), rel=1e-5)
        share = sigma[:4] / sigma[:4].sum()
        assert rows[path]["effective_rank"] == pytest.approx(float(torch.special.entr(share).sum().exp()), rel=1e-4)
        narrow = layer.weight.detach().bfloat16().double()
        lost = (narrow + delta).bfloat16().double() - (narrow + delta)
        distortion = float(lost.norm() / delta.norm())
        assert distortion > 0 and rows[path]["bf16_distortion"] == pytest.approx(distortion, rel=1e-2)
    assert [row["module"] for row in rows.values()] == sorted(rows), "layer by layer"
    for empty, said in (({}, "holds no adapter's matrices"), ({"lora_A": torch.zeros(4, 4)}, "holds no adapter's")):
        shutil.copytree(tmp_path / "adapter", tmp_path / "empty", dirs_exist_ok=True)
        save_file(empty, tmp_path / "empty" / "adapter_model.safetensors")
        with pytest.raises(UserError, match=said):
            audit(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="none of the adapter's modules is in a numbered layer"):
        draw([{"module": "head", "norm": 1.0}], str(tmp_path / "none.png"))
    draw(list(rows.values()), str(tmp_path / "map.png"))
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_a_base_of_zeros_and_a_missing_matplotlib_are_no_traceback(weights, tmp_path, monkeypatch, capsys):
    save_adapter(trained(CONFIGS[2]), tmp_path / "adapter")
    held = load_file(weights / "model.safetensors")
    held["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(held, weights / "model.safetensors")
    rows = {row["module"].rpartition(".")[2]: row for row in audit(str(tmp_path / "adapter"), str(weights))}
    assert rows["up_proj"]["relative_norm"] is None and rows["up_proj"]["norm"] > 0 < rows["q_proj"]["relative_norm"]
    draw(list(rows.values()), str(tmp_path / "map.png"))
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    asked = AuditOptions(str(tmp_path / "adapter"), str(weights), heat_map=str(tmp_path / "none.png"))
    with pytest.raises(UserError, match="none.png: no heat map: matplotlib is not installed"):
        audit_main(asked)
    line = next(line for line in capsys.readouterr().out.splitlines() if "up_proj" in line)
    assert line.split()[3] == "–" and not (tmp_path / "none.png").exists()


def corrupt(folder, how):
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    raw, held = json.loads(config.read_text()), load_file(tensors)
    key = sorted(held)[0]
    if how == "dora":
        raw["use_dora"] = True
    elif how == "unknown":
        raw["use_magic"] = True
    elif how == "rank":
        raw["r"] = 0
    elif how == "missing":
        del held[key]
    elif how == "surplus":
        held["base_model.model.other.lora_A.weight"] = torch.zeros(4, 4)
    elif how == "shape":
        held[key] = torch.zeros(5, 7)
    elif how == "nan":
        held[key] = held[key] * float("nan")
    save_file(held, tensors)
    config.write_text(json.dumps(raw))
    if how == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("dora", "use_dora is not supported"),
        ("unknown", "unknown field 'use_magic'"),
        ("rank", "whole number from 1"),
        ("missing", "lacks"),
        ("surplus", "no place for"),
        ("shape", "made for another model"),
        ("nan", "not finite"),
        ("truncated", "corrupt|truncated|past the end"),
    ],
)
def test_a_wrong_adapter_is_refused_by_name(tmp_path, how, said):
    save_adapter(trained(CONFIGS[0]), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    corrupt(tmp_path / "b", how)
    with pytest.raises(UserError, match=said):
        load_adapter(base(), tmp_path / "b")
    load_adapter(base(), tmp_path / "a")


def test_wrong_settings_are_refused():
    for wrong, said in (({"r": 0}, "rank"), ({"dropout": 1.0}, "dropout"), ({"target_modules": ()}, "empty")):
        with pytest.raises(UserError, match=said):
            replace(LoRAConfig(), **wrong)
    with pytest.raises(UserError, match="did you mean 'q_proj'"):
        add_lora(base(), LoRAConfig(target_modules=("q_prj",)))


def test_dropouts_masks_are_of_the_token_and_of_nothing_beside_it():
    """A record's masks are the same in another row, behind another record, and differ by step, branch, token, module
    and column; each keeps 1 − p of its inputs, whatever another keeps."""
    plan = DropoutPlan(seed=3)
    plan.begin(5, [[("a", 0, 300), ("a", 1, 100)]])
    x = torch.ones(1, 400, 210, dtype=torch.float64)
    mask = plan.mask(x, 0.25, "q")
    plan.begin(5, [[("b", 0, 40)], [("c", 0, 50), ("a", 1, 100), ("a", 0, 300)]])
    other = plan.mask(torch.ones(2, 450, 210, dtype=torch.float64), 0.25, "q")
    assert torch.equal(mask[0, :300], other[1, 150:]) and torch.equal(mask[0, 300:], other[1, 50:150])
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.75}
    other_module = plan.mask(torch.ones(2, 450, 210, dtype=torch.float64), 0.25, "k")[1, 150:]
    plan.begin(6, [[("a", 0, 300), ("a", 1, 100)]])
    kept, pairs = mask[0, :300] > 0, 300 * 210
    unlike = {
        "module": other_module > 0,
        "step": plan.mask(x, 0.25, "q")[0, :300] > 0,
        "token": kept.roll(1, 0),
        "column": kept.roll(1, 1),
        "word": kept.roll(2, 1),
        "branch": torch.cat([mask[0, 300:] > 0] * 3),
    }
    spread = 5 * (0.25 * 0.75 / pairs) ** 0.5  # five standard deviations of a share
    assert abs(float(kept.double().mean()) - 0.75) < spread
    for name, mask_TD in unlike.items():
        assert abs(float((kept & mask_TD).double().mean()) - 0.75**2) < 3 * spread, name
    assert torch.equal(kept.double().mean(0) > 0.6, torch.ones(210, dtype=torch.bool)), "no column is dropped for all"


def test_a_branch_longer_than_the_table_of_draws_repeats_no_mask():
    plan, width = DropoutPlan(seed=3), TABLE_SIZE // 4  # a window holds two tokens
    plan.begin(1, [[("a", 0, 3), ("b", 0, 2)]])
    mask = plan.mask(torch.ones(1, 5, width, dtype=torch.bfloat16), 0.25, "q")[0] > 0
    plan.begin(1, [[("b", 0, 2), ("a", 0, 3)]])
    other = plan.mask(torch.ones(1, 5, width, dtype=torch.bfloat16), 0.25, "q")[0] > 0
    assert torch.equal(mask[:3], other[2:]) and torch.equal(mask[3:], other[:2])
    for one in range(5):
        for two in range(one):
            both = float((mask[one] & mask[two]).double().mean())
            assert abs(both - 0.75**2) < 0.01, (one, two)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_drops_what_a_cpu_drops(dtype):
    plan, found = DropoutPlan(seed=3), []
    plan.begin(1, [[("a", 0, 300), ("a", 1, 100)]])
    for device in ("cpu", "cuda"):
        x_ND = torch.ones(450, 512, dtype=dtype, device=device)
        sum_ND = torch.zeros_like(x_ND)
        plan.masks(1, 450).add_kept(sum_ND, x_ND, 0.05, "q")
        found.append([plan.masks(1, 450).drop(x_ND, 0.05, "q").cpu(), sum_ND.cpu()])
        found[-1].append((plan.mask(x_ND[None], 0.05, "q")[0] > 0).to("cpu", dtype))
    assert all(torch.equal(mask_ND, found[0][0]) for each in found for mask_ND in each)
