"""Chat forms: a conversation as token ids, ready for the model's next turn.

Messages are {"role": "system" | "user" | "assistant", "content": …}: at most one system text, first; then user and
assistant in turns, the user last. Contents are encoded apart from the template's special tokens, so that no content
can forge one, but for the two forms that have none (Mistral v1's and Llama-2's "[INST]" are plain text).

    mistral-v1   <s>[INST] S\n\nU [/INST] A</s>[INST] U [/INST]          one text a turn; the system text in the first
    mistral-v2   <s>[INST] U [/INST] A </s>[INST] S\n\nU [/INST]         ids 3 and 4; the system text in the last
    mistral-v3   as v2
    mistral-v7   <s>[SYSTEM_PROMPT] S [/SYSTEM_PROMPT][INST] U [/INST]   the system text in a turn of its own
    llama-2      <s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] U [/INST]
    chatml       <|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n
    alpaca       S\n\n### Instruction:\nU\n\n### Response:\n
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from model.support.cli import UserError, nearest

FORMS = ("mistral-v1", "mistral-v2", "mistral-v3", "mistral-v7", "llama-2", "chatml", "alpaca")
# the form's own words; a model tuned on it expects them
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], form: str) -> list[int]:
    """Ids of a conversation in one of FORMS. Raises UserError for an unknown form or roles out of turn."""
    if form not in FORMS:
        raise UserError(f"chat form {form!r} is not covered{nearest(form, FORMS)}; covered are {', '.join(FORMS)}")
    system, turns = split_turns(messages)
    if form == "chatml":
        return _chatml(tokenizer, system, turns)
    if form == "alpaca":
        return _alpaca(tokenizer, system, turns)
    if form == "llama-2":
        return _llama2(tokenizer, system, turns)
    return _mistral(tokenizer, system, turns, form)


def split_turns(messages: Sequence[Mapping[str, str]]) -> tuple[str | None, list[tuple[str, str | None]]]:
    """(system text, [(user, assistant), …, (user, None)]). Raises UserError where roles are out of turn."""
    system, rest = None, list(messages)
    for number, message in enumerate(rest, start=1):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise UserError(f"chat message {number} lacks a role or content, both texts")
    if rest and rest[0]["role"] == "system":
        system = rest.pop(0)["content"]
    for number, message in enumerate(rest):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            raise UserError(
                f"chat: a {message['role']!r} message where the {expected}'s turn is; "
                "give an optional system message, then user and assistant in turns"
            )
    if len(rest) % 2 == 0:
        raise UserError("chat: the last message has to be the user's")
    contents: list[str | None] = [message["content"] for message in rest]
    return system, list(zip(contents[::2], [*contents[1::2], None], strict=True))  # type: ignore[arg-type]


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]


def _mistral(tokenizer: Any, system: str | None, turns: Sequence[tuple[str, str | None]], form: str) -> list[int]:
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if form == "mistral-v7" and system is not None:
        begin, end = tokenizer.special_id("[SYSTEM_PROMPT]"), tokenizer.special_id("[/SYSTEM_PROMPT]")
        ids += [begin, *tokenizer.encode(system), end]
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
            ids += tokenizer.encode(kept) + _end(tokenizer)
    return ids


def _llama2(tokenizer: Any, system: str | None, turns: Sequence[tuple[str, str | None]]) -> list[int]:
    ids: list[int] = []
    for number, (user, answer) in enumerate(turns):
        if number == 0 and system is not None:
            user = f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}"
        text = f"[INST] {user.strip()} [/INST]"
        if answer is None:
            ids += tokenizer.encode(text, bos=True)
        else:
            ids += tokenizer.encode(f"{text} {answer.strip()} ", bos=True, eos=True)
    return ids


def _chatml(tokenizer: Any, system: str | None, turns: Sequence[tuple[str, str | None]]) -> list[int]:
    begin, end = tokenizer.special_id("<|im_start|>"), tokenizer.special_id("<|im_end|>")
    line = tokenizer.encode("\n")
    system = default_system(tokenizer.template) if system is None else system

    def turn(role: str, content: str) -> list[int]:
        return [begin, *tokenizer.encode(f"{role}\n{content}"), end, *line]

    ids = [] if system is None else turn("system", system)
    for user, answer in turns:
        ids += turn("user", user)
        if answer is not None:
            ids += turn("assistant", answer)
    return [*ids, begin, *tokenizer.encode("assistant\n")]


def default_system(template: str) -> str | None:
    """The system text that a ChatML template puts where the conversation brings none, if it spells one out."""
    found = re.search(r"<\|im_start\|>system(?:\n|\\n)([^<{}'\"]+?)<\|im_end\|>", template)
    return found[1] if found else None


def _alpaca(tokenizer: Any, system: str | None, turns: Sequence[tuple[str, str | None]]) -> list[int]:
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for number, (user, answer) in enumerate(turns):
        preamble = f"{ALPACA if system is None else system}\n\n" if number == 0 else ""
        ids += tokenizer.encode(f"{preamble}### Instruction:\n{user}\n\n### Response:\n")
        if answer is not None:
            ids += tokenizer.encode(answer) + _end(tokenizer)
    return ids


def guess_form(file: str, template: str, model_type: str | None, special: Callable[[str], int | None]) -> str | None:
    """The chat form of a tokenizer: by its template, else its control tokens, else the file's name and model family."""
    if "<<SYS>>" in template:
        return "llama-2"
    if "### Instruction" in template:
        return "alpaca"
    if special("<|im_start|>") is not None and (not template or "<|im_start|>" in template):
        return "chatml"
    if special("[SYSTEM_PROMPT]") is not None:
        return "mistral-v7"
    if special("[INST]") is not None:
        return "mistral-v2" if file.endswith(".v2") else "mistral-v3"
    if "[INST]" in template or model_type in ("mistral", "mixtral") or file.endswith(".v1"):
        return "mistral-v1"
    if model_type == "llama" and file.endswith(".model"):
        return "llama-2"
    return None
