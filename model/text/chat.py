"""Chat formats: a conversation as token ids, ready for the model's next turn.

Messages are {"role": "system" | "user" | "assistant", "content": …}. The model's own Jinja template is rendered in a
sandbox with transformers' settings. A user may name another format. llama-2, chatml and alpaca are templates too; the
mistral formats, for SentencePiece files, which have no template, follow mistral-common's code:

    mistral-v1   <s>[INST] S\\n\\nU [/INST] A</s>[INST] U [/INST]          [INST] as text; system text in the first turn
    mistral-v2   <s>[INST] U [/INST] A </s>[INST] S\\n\\nU [/INST]         [INST] as ids; system text in the last turn
    mistral-v3   as v2
    mistral-v7   <s>[SYSTEM_PROMPT] S [/SYSTEM_PROMPT][INST] U [/INST]   system text before the first turn

No message content becomes a control token. To find the contents in the rendered text, the template is rendered a
second time with a unique marker in place of each content; templates may trim contents. If a template changes contents
in another way, and a content names a control token, the conversation is refused. ("[INST]" is plain text in mistral-v1
and llama-2, so there a content can imitate a turn.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from model.support.cli import UserError, nearest
from model.text.engines import Span
from model.text.sandbox import Sandbox, SandboxError, SandboxLimit

OWN = "chat_template"  # the format of a model with a template
ROLES = ("system", "user", "assistant")
# The format's fixed text.
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TURNS = "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
NAMED = {
    "llama-2": (
        "{% set has = messages[0].role == 'system' %}"
        "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' if has else '' %}"
        + TURNS
        + "{{ bos_token + '[INST] ' + ((system if loop.first else '') + m.content) | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}"
    ),
    "alpaca": (
        "{{ (messages[0].content if messages[0].role == 'system' else '"
        + ALPACA
        + "') + '\n\n' }}"
        + TURNS
        + "{{ '### Instruction:\n' + m.content + '\n\n### Response:\n' }}"
        "{% else %}{{ m.content ~ eos_token }}{% endif %}{% endfor %}"
    ),
}
FORMS = ("mistral-v1", "mistral-v2", "mistral-v3", "mistral-v7", *NAMED)
SANDBOX = Sandbox()


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], form: str) -> list[int]:
    """Ids of a conversation. `form`: OWN (the model's default template), the name of one of its templates, or one of
    FORMS. Raises UserError for an unknown form, and for messages that do not fit it."""
    messages = checked(messages)
    templates = tokenizer.templates
    if form == OWN or form in templates:
        name = "default" if form == OWN else form
        if name not in templates:
            raise UserError(f"the model has no default chat template; name one of {', '.join(sorted(templates))}")
        return render(tokenizer, templates[name], messages)
    if form not in FORMS:
        known = (*FORMS, *templates)
        raise UserError(f"chat form {form!r} is not supported{nearest(form, known)}; supported are {', '.join(known)}")
    system, turns = split_turns(messages)
    if form not in NAMED:
        return _mistral(tokenizer, system, turns, form)
    if form == "chatml":
        for mark in ("<|im_start|>", "<|im_end|>"):
            tokenizer.special_id(mark)
    begin = list(tokenizer.begin) if form == "alpaca" else []
    return begin + render(tokenizer, NAMED[form], messages)


def checked(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The messages' roles and contents. Raises UserError unless roles are known and the last is the user's."""
    found = []
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"chat message {number}: role and content must both be text")
        if role not in ROLES:
            raise UserError(f"chat message {number} has role {role!r}; roles are {', '.join(ROLES)}")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"chat message {number}: not Unicode text: half a surrogate pair") from error
        found.append({"role": role, "content": content})
    if not found or found[-1]["role"] != "user":
        raise UserError("chat: the last message must be the user's")
    return found


def render(tokenizer: Any, template: str, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of the messages rendered by a template; no content becomes a control token."""
    contents = [message["content"] for message in messages]
    used = set("".join(contents))
    free = next(letter for letter in map(chr, range(0xE000, 0xF900)) if letter not in used)  # private use area
    markers = [f"{free}{number}{free}" for number in range(len(messages))]
    marked = [{**message, "content": marker} for message, marker in zip(messages, markers, strict=True)]
    variables = {"tools": None, "documents": None, "add_generation_prompt": True, **tokenizer.names}
    try:
        inputs = [{"messages": turns, **variables} for turns in (messages, marked)]
        text, marked_text = SANDBOX.ask(do="render", template=template, inputs=inputs)
    except SandboxError as error:
        message = str(error)
        # Other messages may quote the conversation.
        safe = isinstance(error, SandboxLimit) or message in template
        reason = message if safe else "it cannot render these messages, or is corrupt"
        raise UserError(f"the model's chat template: {reason}") from error
    spans = content_spans(text, marked_text, dict(zip(markers, contents, strict=True)))
    if spans is not None:
        return tokenizer.engine.encode_rendered(text, spans)
    normalized = "".join("".join(contents).split()).casefold()
    named = [token for token in tokenizer.engine.controls if "".join(token.split()).casefold() in normalized]
    if named or tokenizer.engine.control_tokens(text) != tokenizer.engine.control_tokens(marked_text):
        raise UserError(
            "the model's chat template changes what messages say, so a control token in one looks like "
            "its own; ask with --form template, or take the token out of the message"
        )
    return tokenizer.engine.encode_rendered(text, ())


def content_spans(text: str, marked_text: str, contents: Mapping[str, str]) -> list[Span] | None:
    """Character spans of the contents (marker → content) in a rendered text, or None if it changed them.

    `marked_text` is the same rendering with markers as contents. The literals between its markers must follow each
    other in `text` with a variant of each content between them; `ends` maps each end reached so far to its spans.
    """
    parts = re.split(f"({'|'.join(contents)})", marked_text)  # literal, marker, literal, marker, …, literal
    ends: dict[int, list[Span]] = {len(parts[0]): []} if text.startswith(parts[0]) else {}
    for marker, literal in zip(parts[1::2], parts[2::2], strict=True):
        next_ends: dict[int, list[Span]] = {}
        for start, spans in ends.items():
            for content in variants(contents[marker]):
                end = start + len(content)
                if text.startswith(content, start) and text.startswith(literal, end):
                    next_ends.setdefault(end + len(literal), [*spans, (start, end)])
        ends = next_ends
    return ends.get(len(text))


def variants(content: str) -> list[str]:
    """The content, and the content without white space at its ends, as templates trim it."""
    return list(dict.fromkeys([content, content.strip(), content.rstrip(), content.lstrip()]))


def split_turns(messages: Sequence[Mapping[str, str]]) -> tuple[str | None, list[tuple[str, str | None]]]:
    """(system text, [(user, assistant), …, (user, None)]). Raises UserError unless user and assistant alternate."""
    rest = list(messages)
    system = rest.pop(0)["content"] if rest[0]["role"] == "system" else None
    for number, message in enumerate(rest):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            raise UserError(
                f"chat: a {message['role']!r} message in the {expected}'s turn; "
                "give an optional system message, then user and assistant in turns"
            )
    contents: list[str | None] = [message["content"] for message in rest]
    return system, list(zip(contents[::2], [*contents[1::2], None], strict=True))  # type: ignore[arg-type]


def _mistral(tokenizer: Any, system: str | None, turns: Sequence[tuple[str, str | None]], form: str) -> list[int]:
    """Ids in one of the mistral formats."""
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if form == "mistral-v7" and system is not None:
        first, last = tokenizer.special_id("[SYSTEM_PROMPT]"), tokenizer.special_id("[/SYSTEM_PROMPT]")
        ids += [first, *tokenizer.encode(system), last]
        system = None
    with_system = 0 if form == "mistral-v1" else len(turns) - 1
    for number, (user, answer) in enumerate(turns):
        if system is not None and number == with_system:
            user = f"{system}\n\n{user}"
        if form == "mistral-v1":
            ids += tokenizer.encode(f"[INST] {user} [/INST]")
        else:
            ids += [tokenizer.special_id("[INST]"), *tokenizer.encode(user), tokenizer.special_id("[/INST]")]
        if answer is not None:
            ids += tokenizer.encode(answer if form == "mistral-v1" else answer.rstrip(" ")) + end  # as mistral-common
    return ids
