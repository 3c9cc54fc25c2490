"""Chat forms: a conversation as token ids, ready for the model's next turn.

Messages are {"role": "system" | "user" | "assistant", "content": …}. A model's own template, the Jinja text of its
files, is rendered in a sandbox as transformers renders it. Three forms that a user may name are templates too
(llama-2, chatml, alpaca). Mistral's own SentencePiece files have no template; mistral-common's code is their form:

    mistral-v1   <s>[INST] S\\n\\nU [/INST] A</s>[INST] U [/INST]          one text a turn; the system text in the first
    mistral-v2   <s>[INST] U [/INST] A </s>[INST] S\\n\\nU [/INST]         ids 3 and 4; the system text in the last
    mistral-v3   as v2
    mistral-v7   <s>[SYSTEM_PROMPT] S [/SYSTEM_PROMPT][INST] U [/INST]   the system text in a turn of its own

A content never becomes a control token, whatever the template. It is rendered twice, the second time with marks in the
contents' place; that shows which parts of the text are contents, trimmed or not. Where a template changes contents in
another way, and one of them names a control token, the conversation is refused. (Mistral v1's and Llama-2's "[INST]"
are plain text and no control tokens: there a content can write what a turn looks like.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from model.support.cli import UserError, nearest
from model.text.engines import Span
from model.text.sandbox import Sandbox, SandboxError, SandboxLimit

OWN = "chat_template"  # the form of a model with a template
ROLES = ("system", "user", "assistant")
# the form's own words; a model tuned on it expects them
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
    """Ids of a conversation: in the model's own template (OWN, or a name that it gives one of several), or in one of
    FORMS. Raises UserError for an unknown form, and for messages that the form has no place for."""
    messages = checked(messages)
    templates = tokenizer.templates
    if form == OWN or form in templates:
        name = "default" if form == OWN else form
        if name not in templates:
            raise UserError(f"the model has no default chat template; name one of {', '.join(sorted(templates))}")
        return render(tokenizer, templates[name], messages)
    if form not in FORMS:
        known = (*FORMS, *templates)
        raise UserError(f"chat form {form!r} is not covered{nearest(form, known)}; covered are {', '.join(known)}")
    system, turns = split_turns(messages)
    if form not in NAMED:
        return _mistral(tokenizer, system, turns, form)
    if form == "chatml":
        for mark in ("<|im_start|>", "<|im_end|>"):
            tokenizer.special_id(mark)
    begin = list(tokenizer.begin) if form == "alpaca" else []
    return begin + render(tokenizer, NAMED[form], messages)


def checked(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The messages, each with a known role and a text, the user's last."""
    found = []
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"chat message {number} lacks a role or content, both texts")
        if role not in ROLES:
            raise UserError(f"chat message {number} has role {role!r}; roles are {', '.join(ROLES)}")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"chat message {number}: half a surrogate pair; the text is not Unicode") from error
        found.append({"role": role, "content": content})
    if not found or found[-1]["role"] != "user":
        raise UserError("chat: the last message has to be the user's")
    return found


def render(tokenizer: Any, template: str, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of what a template writes of the messages, no content forming a control token."""
    contents = [message["content"] for message in messages]
    letters = set("".join(contents))
    free = next(letter for letter in map(chr, range(0xE000, 0xF900)) if letter not in letters)  # for private use
    marks = [f"{free}{number}{free}" for number in range(len(messages))]
    marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    given = {"tools": None, "documents": None, "add_generation_prompt": True, **tokenizer.names}
    try:
        inputs = [{"messages": turns, **given} for turns in (messages, marked)]
        text, frame = SANDBOX.ask(do="render", template=template, inputs=inputs)
    except SandboxError as error:
        message = str(error)
        # ours, or one that the template spells out; any other may quote what a chat says
        known = isinstance(error, SandboxLimit) or message in template
        reason = message if known else "it cannot render these messages, or is corrupt"
        raise UserError(f"the model's chat template: {reason}") from error
    places = locate(text, frame, dict(zip(marks, contents, strict=True)))
    if places is not None:
        return tokenizer.engine.rendered(text, places)
    normalized = "".join("".join(contents).split()).casefold()
    named = [token for token in tokenizer.engine.controls if "".join(token.split()).casefold() in normalized]
    if named or tokenizer.engine.written(text) != tokenizer.engine.written(frame):
        raise UserError(
            "the model's chat template changes what messages say, so a control token in one looks like "
            "its own; ask with --form template, or take the token out of the message"
        )
    return tokenizer.engine.rendered(text, ())


def locate(text: str, frame: str, contents: Mapping[str, str]) -> list[Span] | None:
    """Where the contents are in a rendered text, as they are or trimmed, by the `frame` that has marks in their
    place; None where the text is not that frame around them."""
    parts = re.split(f"({'|'.join(contents)})", frame)  # literal, mark, literal, mark, …, literal
    ways: dict[int, list[Span]] = {len(parts[0]): []} if text.startswith(parts[0]) else {}
    for mark, literal in zip(parts[1::2], parts[2::2], strict=True):
        further: dict[int, list[Span]] = {}
        for at, path in ways.items():
            for content in variants(contents[mark]):
                end = at + len(content)
                if text.startswith(content, at) and text.startswith(literal, end):
                    further.setdefault(end + len(literal), [*path, (at, end)])
        ways = further
    return ways.get(len(text))


def variants(content: str) -> list[str]:
    """A content as templates write it: itself, or without white space at its ends."""
    return list(dict.fromkeys([content, content.strip(), content.rstrip(), content.lstrip()]))


def split_turns(messages: Sequence[Mapping[str, str]]) -> tuple[str | None, list[tuple[str, str | None]]]:
    """(system text, [(user, assistant), …, (user, None)]). Raises UserError where roles are out of turn."""
    rest = list(messages)
    system = rest.pop(0)["content"] if rest[0]["role"] == "system" else None
    for number, message in enumerate(rest):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            raise UserError(
                f"chat: a {message['role']!r} message where the {expected}'s turn is; "
                "give an optional system message, then user and assistant in turns"
            )
    contents: list[str | None] = [message["content"] for message in rest]
    return system, list(zip(contents[::2], [*contents[1::2], None], strict=True))  # type: ignore[arg-type]


def _mistral(tokenizer: Any, system: str | None, turns: Sequence[tuple[str, str | None]], form: str) -> list[int]:
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
            kept = answer if form == "mistral-v1" else answer.rstrip(" ")  # as mistral-common does
            ids += tokenizer.encode(kept) + end
    return ids
