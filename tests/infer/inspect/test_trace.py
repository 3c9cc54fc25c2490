"""The trace's numbers are those of the model and their sums hold; the file is private, whole and harmless."""

import json
import re
import stat
import zlib
from base64 import b64decode
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from answering_models import tiny_model, write_model, write_tokenizer

from infer import record, tasks, trace
from infer.inspect import page as trace_html
from infer.inspect import values as trace_values
from infer.inspect.html import PAGES
from lora import LoRAConfig, add_lora, save_adapter
from lora.adapter import adapted
from model.support.cli import UserError

HOSTILE = (
    '</script><script>document.title="run"</script><img src=x onerror=alert(1)> \u202e\u2028\x00\x1b[31m שלום 2.5 cm'
)


def measured(model, T=14, start=10):
    ids = torch.randint(3, 300, (T,), generator=torch.Generator().manual_seed(0)).tolist()
    return ids, trace_values.measure(model, ids, start, list(range(T)))


def random_adapter(model, **options):
    add_lora(model, LoRAConfig(r=3, alpha=6, **options))
    for number, layer in enumerate(adapted(model).values()):
        torch.nn.init.normal_(layer.lora_B["default"], std=0.2, generator=torch.Generator().manual_seed(number))
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny_model(windows=(4, None)),
        lambda: tiny_model(tie_word_embeddings=True, o_bias=True),
        lambda: tiny_model(num_local_experts=3, num_experts_per_tok=2),
        lambda: random_adapter(tiny_model()),
    ],
)
def test_contributions_sum_to_the_logit_and_to_the_margin(model):
    model = model()
    with torch.no_grad():  # a last norm that is not one everywhere
        model.model.norm.weight.mul_(torch.linspace(0.5, 2, 32, dtype=torch.float64))
    ids, (values, _) = measured(model)
    logits_TV = model(torch.tensor([ids]))[0]
    for kind in ("logit", "margin"):
        its = values["attribution"][kind]
        assert its["sum_error"] <= 1e-12 * logits_TV.abs().max()
        for row, t in enumerate(values["steps"]):
            rival = max((v, -i) for i, v in enumerate(logits_TV[t].tolist()) if i != ids[t + 1])
            wanted = float(logits_TV[t, ids[t + 1]]) - (rival[0] if kind == "margin" else 0)
            assert its["value"][row] == pytest.approx(wanted, abs=1e-9)
            heads, sources = np.sum(its["heads"][row]), np.sum(its["sources"][row])
            assert sources == pytest.approx(heads, abs=2e-2)  # every head's part is what it read (four digits a number)
            assert not np.any(its["sources"][row][t + 1 :])
            whole = its["embed"][row] + its["bias"][row] + heads + np.sum(its["mlps"][row])
            assert whole == pytest.approx(its["value"][row], abs=3e-2)


def test_probabilities_ranks_and_lens_are_the_models():
    model = tiny_model()
    ids, (values, _) = measured(model)
    with record(model, "layers.*.resid_post") as tape:
        share_TV = model(torch.tensor([ids]))[0].softmax(-1)
    for t, said in enumerate(values["predictions"][:-1]):
        assert said["p"] == pytest.approx(float(share_TV[t, ids[t + 1]]), rel=1e-3)
        assert said["rank"] == 1 + int((share_TV[t] > share_TV[t, ids[t + 1]]).sum())
        assert said["best"][0][0] == int(share_TV[t].argmax()) and len(said["best"]) == 5
    assert values["predictions"][-1] is None and values["steps"] == [9, 10, 11, 12]
    for row, t in enumerate(values["steps"]):
        assert values["lens"][row][-1][1:3] == [values["predictions"][t]["best"][0][1], values["predictions"][t]["p"]]
        middle_V = model.head(model.model.norm(tape["layers.0.resid_post"][0, t])).softmax(-1)
        assert values["lens"][row][1][0] == int(middle_V.argmax()) and len(values["lens"][row]) == 3


def test_the_adapters_share_is_that_of_its_products():
    model = random_adapter(tiny_model(), target_modules=("q_proj",))
    ids, (values, _) = measured(model)
    layer = model.model.layers[1].self_attn.q_proj
    with record(model, "layers.1.attn_norm.out") as tape:
        model(torch.tensor([ids]))
    x_TD = tape["layers.1.attn_norm.out"][0]
    added, base = (x_TD @ layer.delta("default").T).norm(dim=-1), (x_TD @ layer.weight.T).norm(dim=-1)
    row = next(one for one in values["lora"] if one["module"] == "model.layers.1.self_attn.q_proj")
    assert len(values["lora"]) == 2 and row["all"] == pytest.approx(float(added.norm() / base.norm()), rel=1e-3)
    assert row["steps"] == pytest.approx((added / base)[values["steps"]].tolist(), rel=1e-3)


def test_experts_are_those_that_the_router_chose():
    model = tiny_model(num_local_experts=3, num_experts_per_tok=2)
    ids, (values, _) = measured(model)
    with record(model, "layers.1.mlp.router") as tape:
        model(torch.tensor([ids]))
    best = tape["layers.1.mlp.router"][0].topk(2).indices.tolist()
    assert [[expert for expert, _ in chosen] for chosen in values["experts"][1]] == best
    assert all(sum(weight for _, weight in chosen) == pytest.approx(1, abs=1e-3) for chosen in values["experts"][1])


def test_packed_attention_is_the_pattern_to_half_a_shade():
    model, rows = tiny_model(windows=(4, None)), [2, 7, 13]
    with record(model, "layers.*.attn.pattern", positions=rows) as tape:
        model(torch.arange(5, 19)[None])
    for n, packed in enumerate(trace_html.pack_attention(tape, rows)):
        shades = np.frombuffer(zlib.decompress(b64decode(packed)), np.uint8).reshape(4, -1)
        assert shades.shape[1] == sum(row + 1 for row in rows)
        pattern_HRT = tape[f"layers.{n}.attn.pattern"][0].numpy()
        there = np.concatenate([pattern_HRT[:, r, : row + 1] for r, row in enumerate(rows)], axis=1)
        assert np.abs(shades / 15 - np.sqrt(there)).max() <= 0.5 / 15 + 1e-9


def test_every_line_of_code_that_the_page_names_is_there():
    for line in trace_html.code().values():
        text = (PAGES.parents[2] / line["file"]).read_text().splitlines()[line["line"] - 1]
        assert text.strip() == line["code"] and line["code"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, two adapters, another model, a page about a hostile note."""
    at = tmp_path_factory.mktemp("trace")
    weights = write_model(at / "model")
    write_model(at / "other", seed=3)
    for name, seed in (("one", 1), ("two", 2)):
        model = random_adapter(tiny_model(dtype=torch.float32))
        for layer in adapted(model).values():
            layer.lora_A["default"].mul_(seed)
        save_adapter(model, at / name)
    note = at / "note.txt"
    note.write_text(HOSTILE, encoding="utf-8")
    options = trace.Options(
        weights=str(weights), out=at / "page.html", note=note, adapter=(str(at / "one"),), max_new_tokens=6
    )
    assert trace.main(options) == 0
    return SimpleNamespace(at=at, weights=str(weights), options=options)


def data_of(page):
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_the_page_is_private_and_its_text_cannot_act(made):
    page = made.at / "page.html"
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 2 == text.count("</script>") and "onerror=alert" not in text
    assert not set(text) & {"\u2028", "\u202e", "\x00", "\x1b"} and not re.search(r"""(src|href)\s*=\s*["']?\w""", text)
    assert "default-src 'none'; script-src 'sha256-" in text
    run = data_of(page)["runs"][0]
    spelt = b"".join(bytes.fromhex(run["vocabulary"][str(i)][0]) for i in run["ids"][: run["start"]])
    assert spelt.decode().startswith(tasks.NOTE + HOSTILE)


def test_base_and_adapted_read_the_same_tokens(made):
    adapted_run, base = data_of(made.at / "page.html")["runs"]
    assert adapted_run["ids"] == base["ids"] and adapted_run["lora"] and not base["lora"]
    assert adapted_run["own"] == adapted_run["ids"][adapted_run["start"] :] and base["own"] != adapted_run["own"]


@pytest.mark.parametrize("other", ["two", "other"])
def test_compare_puts_another_adapter_or_model_beside_it(other, made, tmp_path):
    out = tmp_path / "page.html"
    trace.main(
        trace.Options(
            weights=made.weights,
            out=out,
            prompt="size 2.5 cm",
            adapter=(str(made.at / "one"),),
            max_new_tokens=3,
            compare=str(made.at / other),
        )
    )
    a, b = data_of(out)["runs"]
    assert a["ids"] == b["ids"] and other in b["name"] and bool(b["lora"]) == (other == "two")
    assert a["attribution"]["logit"]["value"] != b["attribution"]["logit"]["value"]


def test_models_of_other_tokens_are_shown_each_on_its_own(made, tmp_path):
    write_model(tmp_path / "letters", seed=4)
    raw = json.loads((tmp_path / "letters" / "tokenizer.json").read_text())
    raw["model"]["merges"] = []
    (tmp_path / "letters" / "tokenizer.json").write_text(json.dumps(raw))
    out = tmp_path / "page.html"
    options = trace.Options(weights=made.weights, out=out, prompt="size 2.5 cm", max_new_tokens=3)
    trace.main(replace(options, compare=str(tmp_path / "letters")))
    a, b = data_of(out)["runs"]
    assert a["start"] < b["start"] == 11 and "tokenize the text differently" in data_of(out)["notices"][0]


def test_without_new_tokens_the_page_shows_the_notes_prompt_alone(made, tmp_path):
    options = replace(made.options, out=tmp_path / "page.html", max_new_tokens=0)
    assert trace.main(options) == 0
    for run in data_of(tmp_path / "page.html")["runs"]:
        assert len(run["ids"]) == run["start"] > 0


def test_what_exceeds_the_limits_is_left_out_with_a_notice(made, tmp_path):
    options = trace.Options(weights=made.weights, out=tmp_path / "p", prompt="size 2.5 cm " * 5, max_new_tokens=3)
    page, data = trace.traced(options, None, max_rows=20)
    (run,) = data["runs"]
    assert run["rows"] == run["steps"] and len(run["predictions"]) == len(run["ids"])
    assert run["attention"] and [notice for notice in data["notices"] if "are left out" in notice]
    smaller, data = trace.traced(options, None, max_rows=20, max_bytes=len(page) - 50)
    assert len(smaller) < len(page) and data["runs"][0]["attention"] is None
    assert "attention maps" in data["notices"][-1] and "attention maps" in smaller
    with pytest.raises(UserError, match="give a shorter text"):
        trace.traced(options, None, max_bytes=10)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": None}, "either --prompt TEXT or --note"),
        ({"prompt": "x" * 5000}, "give a shorter one"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"max_new_tokens": -1}, "at least 0"),
        ({"adapter": ("nowhere",)}, "no adapter_config.json"),
        ({"compare": "nowhere"}, "takes a model or an adapter"),
        ({"prompt": None, "note": "note.txt", "ask": "tumor_sise"}, "did you mean 'tumor_size'"),
        ({"prompt": None, "note": "note.txt", "id": "p9"}, "no record has the id 'p9'"),
    ],
)
def test_a_mistake_is_one_line_and_no_page(changes, said, made, tmp_path):
    given = {"weights": made.weights, "out": tmp_path / "page.html", "prompt": "a", **changes}
    if "note" in given:
        given["note"] = made.at / given["note"]
    with pytest.raises(UserError, match=said):
        trace.main(trace.Options(**given))
    assert not (tmp_path / "page.html").exists()


def test_an_adapter_of_another_base_is_refused(made, tmp_path):
    tiny_model(dtype=torch.float32, hidden_size=16).save_pretrained(tmp_path / "narrow")
    write_tokenizer(tmp_path / "narrow")
    options = trace.Options(
        weights=str(tmp_path / "narrow"), out=tmp_path / "p.html", prompt="a", adapter=(str(made.at / "one"),)
    )
    with pytest.raises(UserError, match="made for another model"):
        trace.main(options)
