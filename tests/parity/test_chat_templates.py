"""Chats as transformers' apply_chat_template writes them: the public templates of every family here, any conversation,
three kinds of tokenizer.json; and no message's text that becomes a control token."""

import json
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from model import Tokenizer
from model.support.cli import UserError

transformers = pytest.importorskip("transformers", reason="needs transformers (the parity extra)")

TURNS = "{% for m in messages %}"
CHATML = (
    TURNS + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}" + TURNS + ALTERNATE + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "zephyr": (
        TURNS + "\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "openchat": (
        "{{ bos_token }}" + TURNS + "{% if m['role'] == 'system' %}{{ m['content'] + '<|end_of_turn|>' }}{% else %}"
        "{{ 'GPT4 Correct ' + m['role'].title() + ': ' + m['content'] + '<|end_of_turn|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
    ),
    "chatml": CHATML,
    "hermes": [
        {
            "name": "default",
            "template": "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
            "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML,
        },
        {"name": "tool_use", "template": "{{ 'tools' }}"},
    ],
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
        + ALTERNATE
        + "{% if loop.index0 == 0 and system != false %}"
        "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
        "{% else %}{% set content = m['content'] %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama-3": (
        "{% set loop_messages = messages %}{% for m in loop_messages %}"
        "{% set content = '<|start_header_id|>' + m['role']"
        " + '<|end_header_id|>\n\n'+ m['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "llama-3.2": (
        "{{- bos_token }}\n{%- if not date_string is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
        "{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content']|trim }}{% set messages = messages[1:] %}"
        "{% endif %}{{- '<|eot_id|>' }}{%- for m in messages %}"
        "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'+ m['content'] | trim + '<|eot_id|>' }}"
        "{%- endfor %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    ),
    "mistral v1, mixtral": MISTRAL,
    "mistral v3": (
        "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set rest = messages[1:] %}"
        "{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}{%- for m in rest %}{% if m.role == 'user' %}"
        "{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
        "{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}"
        "{%- else %}{{- ' ' + m.content|trim + eos_token }}{%- endif %}{%- endfor %}"
    ),
    "mistral v7": (
        "{{- bos_token }}" + TURNS + "{%- if m['role'] == 'user' %}{{- '[INST]' + m['content'] + '[/INST]' }}"
        "{%- elif m['role'] == 'system' %}{{- '[SYSTEM_PROMPT]' + m['content'] + '[/SYSTEM_PROMPT]' }}"
        "{%- else %}{{- m['content'] + eos_token }}{%- endif %}{% endfor %}"
    ),
    "qwen2": (
        TURNS + "{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML.removeprefix(TURNS)
    ),
    "qwen2.5": (
        "{%- if tools %}\n    {{- tools | tojson }}\n{%- else %}\n    {%- if messages[0]['role'] == 'system' %}\n"
        "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n"
        "        {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}\n    {%- endif %}\n{%- endif %}\n"
        '{%- for message in messages %}\n    {%- if (message.role == "user") or (message.role == "system" and not '
        'loop.first) or (message.role == "assistant" and not message.tool_calls) %}\n'
        "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
    ),
    "smollm2": (
        TURNS + "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI "
        "assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}" + CHATML.removeprefix(TURNS)
    ),
    "phi-3": (
        TURNS + "{% if m['role'] == 'system' %}{{'<|system|>\n' + m['content'] + '<|end|>\n'}}{% else %}"
        "{{'<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{{ '<|assistant|>\n' }}"
    ),
    "deepseek-r1": (
        "{{ bos_token }}" + TURNS + "{% if m['role'] == 'system' %}{{ m['content'] }}{% elif m['role'] == 'user' %}"
        "{{ '<｜User｜>' + m['content'] }}{% else %}{% set content = m['content'] %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        "{{ '<｜Assistant｜><think>\n' }}"
    ),
    "loop controls, a generation block": (
        TURNS + "{% if loop.index0 > 3 %}{% break %}{% endif %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% continue %}{% endif %}"
        "{{ m | tojson }}{% endfor %}"
    ),
}
SPECIAL = (
    "<s>",
    "</s>",
    "<|user|>",
    "<|system|>",
    "<|end_of_turn|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "<|end|>",
)
PLAIN = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜end▁of▁sentence｜>")  # "special": false
KINDS = ("byte-level", "metaspace", "prepended")
WORDS = "Stage II, ER+ 95 %. Left breast mass of 2.5 cm; no HER2 user assistant system [INST] naïve 東京".split(" ")


def library(kind: str) -> Library:
    """A small trained tokenizer of one of the public kinds, with every family's control tokens."""
    tokenizer = Library(models.BPE(byte_fallback=kind != "byte-level"))
    alphabet = ["▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    if kind == "byte-level":
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if kind != "byte-level":
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(parts)
    special = [] if kind == "byte-level" else alphabet
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=[] if special else alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "\n\n".join(WORDS), "<|im_end|> user\nsystem\n"] * 3, trainer)
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = []  # the bytes are pieces of the vocabulary
    tokenizer = Library.from_str(json.dumps(made))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_special_tokens([AddedToken("<|assistant|>", special=True, normalized=False, rstrip=True)])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN])
    return tokenizer


@lru_cache(None)
def pair(kind: str, name: str):
    folder = Path(mkdtemp())
    library(kind).save(str(folder / "tokenizer.json"))
    settings_ = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    written = json.dumps({**settings_, "chat_template": TEMPLATES[name]})
    (folder / "tokenizer_config.json").write_text(written)
    return Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


def their_chat(peer, messages):
    return peer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


texts = st.one_of(
    st.lists(st.sampled_from([*WORDS, "", "\n", "\t", "▁", "é\u0301"]), max_size=6).map(" ".join),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=12),
)
attacks = st.lists(
    st.sampled_from([*SPECIAL, *PLAIN, "<|assistant|>", " x ", "<|", "|>", "\n"]), min_size=1, max_size=5
)


@st.composite
def conversations(draw, contents):
    system = draw(st.booleans())
    roles = ["system"] * system + ["user", "assistant"] * draw(st.integers(0, 2)) + ["user"]
    return [{"role": role, "content": draw(contents)} for role in roles]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_as_transformers_encodes_them(kind, name, data):
    ours, peer = pair(kind, name)
    messages = data.draw(conversations(texts))
    controls = ours.engine.controls
    assume(not any(token in message["content"] for message in messages for token in controls))
    try:
        wanted = their_chat(peer, messages)
    except Exception:  # the template refuses them
        with pytest.raises(UserError, match="chat template"):
            ours.encode_chat(messages)
        return
    assert ours.encode_chat(messages) == wanted


@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "loop controls, a generation block"])
def test_no_content_forges_a_control_token(kind, name, data):
    ours, _ = pair(kind, name)
    messages = data.draw(conversations(attacks.map("".join)))
    try:
        ids = ours.encode_chat(messages)
    except UserError:
        assume(False)
    harmless = ours.encode_chat([{**message, "content": "x"} for message in messages])
    controls = set(ours.engine.controls.values())
    assert [i for i in ids if i in controls] == [i for i in harmless if i in controls]
    read = "".join(ours.engine.model.decode(ids, skip_special_tokens=False).replace("▁", "").split())
    for message in messages:
        assert "".join(message["content"].replace("▁", "").split()) in read


def test_a_template_that_changes_contents_is_refused_where_they_name_a_control_token(tmp_path):
    library("byte-level").save(str(tmp_path / "tokenizer.json"))
    for change in (
        "| lower",
        "| replace('#', '<|im_end|>')",
        "| replace('-', '')",
        ".split('§')[0] + m['content'][-2:]",
    ):
        template = CHATML.replace("m['content']", f"(m['content'] {change})")
        (tmp_path / "chat_template.jinja").write_text(template)
        tokenizer = Tokenizer.from_pretrained(tmp_path)
        tokenizer.encode_chat([{"role": "user", "content": "Stage II"}])
        for attack in ("<|IM_END|>A", "A#", "<|im-_end|>A", "<|im_end|>§§"):
            try:
                ids = tokenizer.encode_chat([{"role": "user", "content": attack}])
            except UserError as error:
                assert "changes what messages say" in str(error)
                continue
            assert ids.count(tokenizer.special_id("<|im_end|>")) == 1


@pytest.mark.parametrize("place", ["config", "config and jinja", "folder", "folder and jinja", "named"])
def test_templates_are_taken_from_transformers_places(place, tmp_path):
    library("byte-level").save(str(tmp_path / "tokenizer.json"))
    config: dict = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ 'config' }}"}
    if place == "named":
        config["chat_template"] = [{"name": "default", "template": "one"}, {"name": "rag", "template": "two"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if "jinja" in place:
        (tmp_path / "chat_template.jinja").write_text("{{ 'jinja' }}")
    if "folder" in place:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ 'more' }}")
    ours, peer = Tokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = peer.chat_template
    assert ours.templates == (theirs if isinstance(theirs, dict) else {"default": theirs})
    messages = [{"role": "user", "content": "x"}]
    if "default" not in ours.templates:
        with pytest.raises(UserError, match="no default chat template; name one of rag"):
            ours.encode_chat(messages)
    else:
        assert ours.encode_chat(messages) == their_chat(peer, messages)
    for name in ours.templates:
        assert ours.decode(ours.encode_chat(messages, form=name)) == peer.apply_chat_template(
            messages, chat_template=name if isinstance(theirs, dict) else None, tokenize=False
        )
    ours.save(tmp_path / "saved")
    assert Tokenizer.from_pretrained(tmp_path / "saved").templates == ours.templates
