"""Tokenizer files as others write them: offsets under normalizers, stop ids, GGUF's fields, hostile files."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from model import Tokenizer
from model.support.cli import UserError
from model.text.tokenizer import copy_tokenizer, to_characters

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
NORMALIZERS = {
    "none": None,
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "NFKC": normalizers.NFKC(),
    "lower": normalizers.Lowercase(),
    "accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "prepended": normalizers.Prepend("▁"),
    "strip": normalizers.Strip(),
}


def byte_level(special: tuple[str, ...] = (), plain: tuple[str, ...] = ()) -> Library:
    tokenizer = Library(models.BPE({c: i for i, c in enumerate(LETTERS)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return tokenizer


def folder(path: Path, tokenizer: Library, **files) -> Path:
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


# what shrinks and what grows under NFC and NFKC, and letters whose lower case is longer
ODD = [
    "e\u0301",
    "\u2126",
    "\u212a",
    "\ufb2a",
    "\u0344",
    "\u09c7\u09be",
    "\u09df",
    "\u0958",
    "ﬁ",
    "½",
    "①",
    "İ",
    "ẞ",
    "ＡＢ",
]


@pytest.fixture(scope="module")
def normalizing(tmp_path_factory):
    made = {}
    for name, normalizer in NORMALIZERS.items():
        tokenizer = byte_level()
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        path = folder(tmp_path_factory.mktemp("normalizing") / "m", tokenizer)
        made[name] = Tokenizer.from_pretrained(path), tokenizer
    return made


@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(
        st.one_of(
            st.sampled_from([*ODD, " 2.5 cm ", "ER+", " "]),
            st.text(st.characters(exclude_categories=("Cs",)), max_size=4),
        ),
        max_size=6,
    ).map("".join)
)
@pytest.mark.parametrize("name", NORMALIZERS)
def test_offsets_are_the_librarys(normalizing, name, text):
    ours, library = normalizing[name]
    ids, spans = ours.encode(text, offsets=True)
    wanted = library.encode(text, add_special_tokens=False)
    assert ids == wanted.ids and to_characters(text, spans) == wanted.offsets


def test_stop_ids_are_all_that_the_files_list(tmp_path):
    tokenizer = byte_level(("<|end|>", "<|im_end|>", "<|eot_id|>"))
    path = folder(
        tmp_path / "m",
        tokenizer,
        tokenizer_config={"eos_token": "<|end|>"},
        config={"eos_token_id": 257},
        generation_config={"eos_token_id": [256, 7]},
    )
    ours = Tokenizer.from_pretrained(path)
    assert sorted(ours.stop_ids) == [7, 256, 257] and ours.eos_id == 256  # none because of its name alone
    ours.save(tmp_path / "saved")
    assert sorted(Tokenizer.from_pretrained(tmp_path / "saved").stop_ids) == [7, 256, 257]


def test_an_end_token_that_the_vocabulary_lacks_is_an_error(tmp_path):
    path = folder(tmp_path / "m", byte_level(("<s>",)), tokenizer_config={"eos_token": "<|im_end|>"})
    with pytest.raises(UserError, match="vocabulary lacks the eos_token '<|im_end|>'"):
        Tokenizer.from_pretrained(path)


def test_an_added_token_keeps_the_id_that_its_file_gives(tmp_path):
    path = folder(tmp_path / "m", byte_level(), added_tokens={"HER2+": 256, "<|im_end|>": 257})
    ours = Tokenizer.from_pretrained(path)
    assert ours.vocab_size == 258 and ours.encode("HER2+") == [256] and ours.decode([256, 257]) == "HER2+<|im_end|>"
    assert 257 not in ours.encode("<|im_end|>")
    folder(tmp_path / "m", byte_level(), added_tokens={"HER2+": 300})
    with pytest.raises(UserError, match="cannot have id 300"):
        Tokenizer.from_pretrained(path)


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(["<|im_end|>", "<|im_start|>", "<tool_call>", "### User:", "HER2+", " ", "a"]), max_size=6
    ).map("".join)
)
def test_control_tokens_written_as_plain_ones_are_not_forged(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "plain"
    if not path.exists():
        plain = ("<|im_end|>", "<|im_start|>", "<tool_call>", "### User:", "HER2+")
        folder(path, byte_level(plain=plain), tokenizer_config={"chat_template": CHATML + "{{ '### User:' }}"})
    ours = Tokenizer.from_pretrained(path)
    ids = ours.encode(text)
    assert not {256, 257, 258, 259} & set(ids) and ids.count(260) == text.count("HER2+")
    assert ours.decode(ids) == text
    chat = ours.encode_chat([{"role": "user", "content": text}])
    assert [i for i in chat if 256 <= i < 260] == [257, 256, 259] and chat.count(260) == text.count("HER2+")


def gguf_file(path: Path, kind: str, pre: str | None, tokens: list[str], types: list[int], parts=1, **fields) -> Path:
    gguf = pytest.importorskip("gguf", reason="needs gguf: make test installs it")
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=1 if parts > 1 else 0)
    writer.add_tokenizer_model(kind)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
    else:
        writer.add_token_merges([])
    for name, value in fields.items():
        key = f"tokenizer.ggml.{name}" if "chat" not in name else f"tokenizer.{name}".replace("__", ".")
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(key, value)
    for number in range(parts):
        writer.add_tensor(f"blk.{number}.attn_norm.weight", np.zeros((32, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "kind, pre, said, puts",
    [
        ("gpt2", "qwen2", None, False),
        ("gpt2", "qwen2", True, True),
        ("gpt2", "llama-bpe", None, True),
        ("gpt2", "llama-bpe", False, False),
        ("llama", None, None, True),
        ("llama", None, False, False),
    ],
)
def test_a_gguf_says_how_a_text_begins_and_ends(kind, pre, said, puts, tmp_path):
    marks, plain = ["<s>", "</s>", "<|eot|>", "<|eom|>"], ["HER2+", "<|note|>"]
    base = LETTERS if kind == "gpt2" else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    types = [1] * 256 if kind == "gpt2" else [2, *[6] * 256, 1]
    n = len(base)
    more = {} if said is None else {"add_bos_token": said}
    path = gguf_file(
        tmp_path / "m.gguf",
        kind,
        pre,
        [*base, *marks, *plain],
        [*types, *[3] * 4, *[4] * 2],
        bos_token_id=n,
        eos_token_id=n + 1,
        eot_token_id=n + 2,
        eom_token_id=n + 3,
        chat_template=CHATML,
        chat_template__rag="x",
        **more,
    )
    ours = Tokenizer.from_pretrained(path)
    ours.save(tmp_path / "saved")
    for tokenizer in (ours, Tokenizer.from_pretrained(tmp_path / "saved")):
        assert tokenizer.begin == ((n,) if puts else ())
        assert sorted(tokenizer.stop_ids) == [n + 1, n + 2, n + 3] and set(tokenizer.templates) == {"default", "rag"}
        ids = tokenizer.encode("a HER2+<|note|></s>")
        assert ids.count(n + 4) == 1 and not {n, n + 1, n + 2, n + 3, n + 5} & set(ids)
        assert tokenizer.decode(ids) == "a HER2+<|note|></s>"


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_folder_of_one_gguf_gives_its_tokenizer_in_however_many_parts(parts, tmp_path):
    gguf_file(tmp_path / "m.gguf", "gpt2", "qwen2", [*LETTERS, "</s>"], [*[1] * 256, 3], parts, eos_token_id=256)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) == parts
    for path in (tmp_path, *files):  # the folder, or any part, is the model
        tokenizer = Tokenizer.from_pretrained(path)
        assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
        assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    (tmp_path / "other.gguf").write_bytes(files[0].read_bytes())
    with pytest.raises(UserError, match="one GGUF"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_gguf_without_a_cutting_rule_is_refused(tmp_path):
    path = gguf_file(tmp_path / "m.gguf", "gpt2", None, LETTERS, [1] * 256)
    with pytest.raises(UserError, match="lacks tokenizer.ggml.pre"):
        Tokenizer.from_pretrained(path)


@pytest.mark.parametrize("pattern", [r"(x+x+)+y", r"(a|a|aa)*(x+x+)+y", r"(?:x{1,30000}){1,30000}y"])
def test_regular_expressions_of_others_run_bounded(pattern, tmp_path):
    tokenizer = byte_level()
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    ours = Tokenizer.from_pretrained(folder(tmp_path / "m", tokenizer))
    assert ours.decode(ours.encode("ER+ 95 %")) == "ER+ 95 %"
    with pytest.raises(UserError, match="tokenizer.json: a normalizer or regular expression of this file fails"):
        ours.encode("x" * 5000)
    assert ours.decode(ours.encode("ER+ 95 %")) == "ER+ 95 %"  # and what comes after is encoded


def test_replacements_of_others_that_double_a_text_again_and_again_run_bounded(tmp_path):
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("x", "xx")] * 40)
    ours = Tokenizer.from_pretrained(folder(tmp_path / "m", tokenizer))
    assert ours.decode(ours.encode("ER+ 95 %")) == "ER+ 95 %"
    with pytest.raises(UserError, match="tokenizer.json: a normalizer or regular expression of this file fails"):
        ours.encode("x")


def test_a_normalizer_that_replaces_nothing_is_an_error_of_its_text_and_not_a_panic(tmp_path):
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Replace("", "x")
    ours = Tokenizer.from_pretrained(folder(tmp_path / "m", tokenizer))
    with pytest.raises(UserError, match="a normalizer or regular expression of this file fails"):
        ours.encode("ER+ 95 %")


def test_a_post_processor_without_its_tokens_is_named(tmp_path):
    path = folder(tmp_path / "m", byte_level()) / "tokenizer.json"
    single = [{"SpecialToken": {"id": "x", "type_id": 0}}]
    post = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": post}))
    with pytest.raises(UserError, match="tokenizer.json: the post-processor's begin token is missing"):
        Tokenizer.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("said", ["it writes ", "took more ", "needs too much "])
def test_no_template_can_put_a_chats_text_into_the_error(said, tmp_path):
    tokenizer = byte_level()
    template = "{{ raise_exception('" + said + "' + messages[0].content) }}"
    ours = Tokenizer.from_pretrained(folder(tmp_path / "m", tokenizer, tokenizer_config={"chat_template": template}))
    with pytest.raises(UserError, match="it cannot render these messages") as caught:
        ours.encode_chat([{"role": "user", "content": "the patient's name"}])
    assert "patient" not in str(caught.value)


def test_a_link_to_an_endless_file_is_not_copied(tmp_path):
    source = folder(tmp_path / "m", byte_level())
    (source / "chat_template.jinja").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="chat_template.jinja"):
        copy_tokenizer(source, tmp_path / "copy")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ 9**(9**9) }}",
        "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ messages.__class__.__mro__ }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no such role') }}",
        "{{ cycler.__init__.__globals__.os.listdir('/') }}",
        "{% if %}",
    ],
)
def test_templates_of_others_run_bounded_and_see_no_file(template, tmp_path):
    path = folder(tmp_path / "m", byte_level(("<s>",)), tokenizer_config={"chat_template": template})
    ours = Tokenizer.from_pretrained(path)
    with pytest.raises(UserError, match="^the model's chat template: ") as caught:
        ours.encode_chat([{"role": "user", "content": "Stage IIB"}])
    assert "IIB" not in str(caught.value) and "\n" not in str(caught.value)
