"""Tokenizer engines: SentencePiece models, and tokenizer.json through the `tokenizers` library.

A control token is an added token that is marked special in its file, named in the tokenizer's settings, spelled like
markup ("<|im_end|>", "[INST]") or used in the chat template. When its characters occur in ordinary text they are
encoded as text. Other added tokens ("HER2+") are words and are found in texts as transformers finds them.

Both engines have the same interface:

    encode(text)                             ids of ordinary text
    encode_with_spans(text)                  (ids, each token's span in the text's UTF-8 bytes)
    encode_rendered(text, contents)          ids of a rendered chat template; `contents`: character spans of messages
    control_tokens(text)                     control tokens in a rendered chat template
    decode(ids)                              text
    controls                                 {control token: id}
    files, settings                          files that `save` writes, and its additions to tokenizer_config.json
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from model.support.cli import UserError
from model.text import protobuf
from model.text.sandbox import Sandbox, SandboxError, encoded

Span = tuple[int, int]
CONTROL, USER_DEFINED = 3, 4  # kinds of pieces in SentencePiece models and GGUF files
MARKUP = re.compile(
    r"<[|｜].*[|｜]>|</?[\w:.-]+>|\[/?(INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_\w+|THINK|ARGS|CALL_ID|IMG\w*|PREFIX"
    r"|MIDDLE|SUFFIX|CONTROL_\d+|PAD|UNK|CLS|SEP|MASK|BOS|EOS)\]",
    re.DOTALL,
)
# Public pre-tokenizer patterns in the tokenizers library's regex dialect. Their time is linear in the text's length,
# except for long runs of white space.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_GROWTH = 16.0  # a normalizer that may lengthen a text by a larger factor runs in the sandbox
KNOWN_REGEXES = frozenset({LLAMA3, QWEN2, GPT2, LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)|", "")})


def is_control(token: str, templates: str) -> bool:
    """True if an added token that is not marked special is a control token, by its spelling or the chat templates."""
    return (
        bool(MARKUP.fullmatch(token))
        or token in templates
        and not token.replace(" ", "").isalnum()
        and token.strip() != ""
    )


class SentencePiece:
    """A SentencePiece model: BPE with byte fallback for Mistral and Llama-2.

    `proto`: the .model file's content. `added`: further tokens as tokenizer.json lists them (id, content, special).
    `legacy`: transformers' option of this name; prefix a space to every segment between added tokens, not only to the
    first. `templates`: the chat templates' text, for `is_control`.
    """

    def __init__(
        self, proto: bytes, name: str, added: Iterable[Mapping[str, Any]] = (), legacy: bool = True, templates: str = ""
    ) -> None:
        import sentencepiece

        if not proto:
            raise UserError(f"{name}: empty; download it again")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
            # The same model without the dummy prefix: of a repeated protobuf field the last value counts.
            no_prefix = protobuf.data(3, protobuf.number(3, 0))
            self.no_prefix = sentencepiece.SentencePieceProcessor(model_proto=proto + no_prefix)
        except RuntimeError as error:
            raise UserError(f"{name}: not a SentencePiece model, or corrupt; download it again") from error
        self.size, self.files, self.legacy = self.model.vocab_size(), {name: proto}, legacy
        self.controls: dict[str, int] = {}
        formed: list[str] = []  # user-defined control pieces, which the library would form from ordinary text
        for i, (piece, kind) in enumerate(_vocabulary(proto)):
            if kind == CONTROL or kind == USER_DEFINED and is_control(piece, templates):
                self.controls[piece] = i
                formed += [piece] if kind == USER_DEFINED else []
        self.added: dict[str, int] = {}
        self.added_names: dict[int, str] = {}
        self.skipped = {i for piece, i in self.controls.items() if piece not in formed}  # ids that decode omits
        tokens = sorted(added, key=lambda token: token["id"])
        for token in tokens:
            self._add_token(token["id"], token["content"], token.get("special", False), templates)
        self.settings: dict[str, Any] = {"legacy": legacy}
        if tokens:
            self.settings["added_tokens_decoder"] = {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in tokens
            }
        words = [piece for piece in self.added if piece not in self.controls]
        self.added_pattern, self.formed_pattern = _any_of(words), _any_of(formed)
        self.control_pattern = _any_of(self.controls)

    def _add_token(self, i: int, content: str, special: bool, templates: str) -> None:
        if i < self.model.vocab_size() and self.model.id_to_piece(i) == content:
            if special and self.model.is_control(i):
                self.controls[content] = i
            return
        self.added[content], self.added_names[i], self.size = i, content, max(self.size, i + 1)
        if special or is_control(content, templates):
            self.controls[content] = i
        if special:
            self.skipped.add(i)

    def encode(self, text: str) -> list[int]:
        return self._encode(text, True)

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        ids, spans, at = [], [], 0
        for part, model in self._split(text, True):
            if isinstance(model, int):
                found, here = [model], [(0, len(part.encode()))]
            else:
                found = model.encode(part)
                here = self._piece_spans(model, part, [model.id_to_piece(i) for i in found])
            ids += found
            spans += [(at + start, at + end) for start, end in here]
            at += len(part.encode())
        return ids, spans

    def _piece_spans(self, model: Any, part: str, pieces: list[str]) -> list[Span]:
        """Exact byte spans by aligning pieces and text; the library's own spans if a normalizer changed the text."""
        aligned = _align(part.encode(), pieces, True) or _align(part.encode(), pieces, False)
        if aligned is not None or not pieces:
            return aligned or []
        proto = model.encode(part, out_type="serialized_proto")
        rows = [dict(protobuf.fields(row)) for field, row in protobuf.fields(proto) if field == 2]  # type: ignore
        return [(row.get(4, 0), row.get(5, 0)) for row in rows]  # type: ignore[misc]

    def _encode(self, text: str, first: bool) -> list[int]:
        ids: list[int] = []
        for part, model in self._split(text, first):
            ids += [model] if isinstance(model, int) else model.encode(part)
        return ids

    def _split(self, text: str, first: bool) -> Iterator[tuple[str, Any]]:
        """Segments of a text, each with the model that encodes it or, for an added word, its id."""
        at = 0
        for found in self.added_pattern.finditer(text):
            yield from self._split_formed(text[at : found.start()], first and at == 0)
            yield found[0], self.added[found[0]]
            at = found.end()
        yield from self._split_formed(text[at:], first and at == 0)

    def _split_formed(self, text: str, first: bool) -> Iterator[tuple[str, Any]]:
        """Split a segment inside each control token that the library would form from it."""
        at = 0
        model = self.model if first or self.legacy and not text.startswith(" ") else self.no_prefix
        for found in self.formed_pattern.finditer(text):
            yield text[at : found.start() + 1], model
            at, model = found.start() + 1, self.no_prefix
        if text[at:]:
            yield text[at:], model

    def encode_rendered(self, text: str, contents: Sequence[Span]) -> list[int]:
        ids: list[int] = []
        at = 0
        for start, end in self._control_spans(text, contents):
            ids += self._encode(text[at:start], at == 0) + [self.controls[text[start:end]]]
            at = end
        return ids + self._encode(text[at:], at == 0)

    def control_tokens(self, text: str) -> list[str]:
        return [text[start:end] for start, end in self._control_spans(text, ())]

    def _control_spans(self, text: str, contents: Sequence[Span]) -> Iterator[Span]:
        at = 0
        while found := self.control_pattern.search(text, at):
            free = not any(_overlap(found.span(), span) for span in contents)
            if free:
                yield found.span()
            at = found.end() if free else found.start() + 1

    def decode(self, ids: list[int]) -> str:
        """Added tokens are written as their content; the library decodes the ids between them."""
        out, run, first = [], [], True
        for i in [*ids, None]:
            if i is not None and i not in self.added_names and i not in self.skipped:
                run.append(i)
                continue
            if run:
                out.append((self.model if first else self.no_prefix).decode(run))
                run, first = [], False
            if i is not None and i not in self.skipped:
                out.append(self.added_names[i])
                first = False
        return "".join(out)

    def piece(self, i: int) -> str | None:
        return self.added_names.get(i) or (self.model.id_to_piece(i) if i < self.model.vocab_size() else None)

    def id_of(self, piece: str) -> int | None:
        if piece in self.added:
            return self.added[piece]
        found = self.model.piece_to_id(piece)
        return found if self.model.id_to_piece(found) == piece else None

    def special(self, piece: str) -> int | None:
        return self.controls.get(piece)


def _vocabulary(proto: bytes) -> Iterator[tuple[str, int]]:
    """(piece, kind) in order of ids; kinds: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""
    for field, value in protobuf.fields(proto):
        if field == 1 and isinstance(value, bytes):
            row = dict(protobuf.fields(value))
            piece = row.get(1, b"")
            yield (piece.decode("utf-8", "replace") if isinstance(piece, bytes) else ""), int(row.get(3, 1))  # type: ignore


class Fast:
    """A tokenizer.json: byte-level BPE (SmolLM2, Qwen2, Llama-3), or BPE over "▁" pieces.

    `raw`: the file's content. `added`: tokens of other files, as tokenizer.json lists them. `named`: the special tokens
    that the settings name; those in the vocabulary become control tokens. `templates`: the chat templates' text.
    """

    def __init__(
        self,
        raw: str,
        name: str,
        added: Iterable[Mapping[str, Any]] = (),
        named: Iterable[str] = (),
        templates: str = "",
    ) -> None:
        self.name = name
        data, listed, known = _parse_tokenizer_json(raw, name)
        model = data["model"]
        vocabulary = model.get("vocab") if isinstance(model.get("vocab"), dict) else {}
        more = _unlisted_tokens(known, vocabulary, added, named)
        listed += more
        raw = json.dumps(data, ensure_ascii=False) if more else raw
        self.files = {"tokenizer.json": raw.encode()}
        self.settings: dict[str, Any] = {}
        self.skipped = {token["id"] for token in listed if token.get("special")}  # ids that decode omits
        # The library can leave special tokens unformed in a text, so every control token is marked special for it.
        marked = [t for t in listed if not t.get("special") and is_control(t["content"], templates)]
        for token in marked:
            token["special"] = True
        content = json.dumps(data) if marked else raw
        self.model = _load_library(content, name)
        self.model.no_truncation()
        self.model.no_padding()
        for token in listed:
            if self.model.token_to_id(token["content"]) != token["id"]:
                raise UserError(f"{name}: added token {token['content']!r} cannot have id {token['id']}")
        ids = self.model.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise UserError(f"{name}: the vocabulary is empty; the file is corrupt")
        self.size = max(ids) + 1  # ids may have gaps
        self.controls = {token["content"]: token["id"] for token in listed if token.get("special")}
        # ids that ordinary text must not give; the unknown token may occur
        self.control_ids = set(self.controls.values()) - {vocabulary.get(model.get("unk_token"))}
        self.byte_level = '"ByteLevel"' in json.dumps(data.get("decoder"))
        self.normalizes = data.get("normalizer") is not None
        try:
            self.begin = _prefix_ids(data.get("post_processor"))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"{name}: the post-processor's begin token is missing; the file is corrupt") from error
        unknown = set(_regexes([data.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")])) - KNOWN_REGEXES
        self.sandbox = Sandbox(content) if unknown or _max_growth(data.get("normalizer")) > MAX_GROWTH else None

    def _run(self, text: str, controls: bool = False) -> tuple[list[int], list[str], list[Span]]:
        if self.sandbox is not None:
            return self._ask(do="encode", text=text, controls=controls)
        return encoded(self.model, text, controls)

    def _ask(self, **request: Any) -> Any:
        assert self.sandbox is not None
        try:
            return self.sandbox.ask(**request)
        except SandboxError as error:
            raise UserError(f"{self.name}: a normalizer or regular expression of this file fails: {error}") from error

    def encode(self, text: str) -> list[int]:
        return self._refuse_controls(self._run(text)[0])

    def _refuse_controls(self, ids: list[int]) -> list[int]:
        if not self.control_ids.isdisjoint(ids):
            wrong = next(self.model.id_to_token(i) for i in ids if i in self.control_ids)
            raise UserError(f"{self.name}: plain text was encoded as the control token {wrong!r}; the file is corrupt")
        return ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        ids, pieces, characters = self._run(text)
        data = text.encode()
        found = None
        if self.byte_level:
            found = _align_byte_level(data, pieces)
        elif not self.normalizes:
            found = _align(data, pieces, True) or _align(data, pieces, False)
        return self._refuse_controls(ids), found if found is not None else _to_byte_spans(text, characters)

    def encode_rendered(self, text: str, contents: Sequence[Span]) -> list[int]:
        """The library's ids of the whole text if no message contains a control token.

        Otherwise the control tokens in messages are masked to find the template's own, the text is split there, and the
        parts between them are encoded as ordinary text.
        """
        masked = text
        while True:
            ids, _, places = self._run(masked, controls=True)
            marks = [(i, *place) for i, place in zip(ids, places, strict=True) if i in self.control_ids]
            inside = [_strip_span(masked, a, b) for _, a, b in marks]
            inside = [span for span in inside if any(_overlap(span, content) for content in contents)]
            if not inside:
                break
            for start, end in inside:
                masked = masked[:start] + "\ue000" * (end - start) + masked[end:]
        if masked == text:
            return ids
        out: list[int] = []
        at = 0
        for i, start, end in marks:
            out += [*self._encode_part(text[at:start], at > 0), i]
            at = end
        return out + self._encode_part(text[at:], at > 0)

    def _encode_part(self, text: str, later: bool) -> list[int]:
        """Ids of a part of a text; `later`: without a prefix that the tokenizer puts only at a text's beginning."""
        line = self.encode("\n")
        found = self.encode("\n" + text) if later and text and self._begins_once() else []
        return found[len(line) :] if found[: len(line)] == line and found else self.encode(text)

    def _begins_once(self) -> bool:
        """True if the tokenizer prefixes the beginning of a text, and not every part after a control token."""
        mark = next((piece for piece in self.controls), None)
        if mark is None:
            return False
        ids = self._run(mark + "a", controls=True)[0]
        return ids[1:] != self.encode("a")

    def control_tokens(self, text: str) -> list[str]:
        named = {i: piece for piece, i in self.controls.items()}
        return [named[i] for i in self._run(text, controls=True)[0] if i in named]

    def decode(self, ids: list[int]) -> str:
        kept = [i for i in ids if i not in self.skipped]
        if self.sandbox is not None:
            return self._ask(do="decode", ids=kept)
        return self.model.decode(kept, skip_special_tokens=False)

    def piece(self, i: int) -> str | None:
        return self.model.id_to_token(i)

    def id_of(self, piece: str) -> int | None:
        return self.model.token_to_id(piece)

    def special(self, piece: str) -> int | None:
        return self.controls.get(piece)


Engine = SentencePiece | Fast


def _load_library(raw: str, name: str) -> Any:
    """The tokenizers library's object. A panic in it prints to stderr and is not an Exception."""
    import tokenizers

    with _quiet():
        try:
            return tokenizers.Tokenizer.from_str(raw)
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            message = " ".join(str(error).split())[:120]
            raise UserError(
                f"{name}: not a tokenizer.json that the tokenizers library reads, or corrupt ({message})"
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context in which native code cannot write to stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _prefix_ids(post: Any) -> tuple[int, ...]:
    """The ids that a tokenizer.json's post-processor puts before a text."""
    if not isinstance(post, dict):
        return ()
    if post.get("type") == "Sequence":
        return tuple(i for one in post.get("processors", []) for i in _prefix_ids(one))
    if isinstance(post.get("cls"), list):
        return (post["cls"][1],)
    ids: list[int] = []
    for part in post.get("single", []) if post.get("type") == "TemplateProcessing" else []:
        if "SpecialToken" not in part:
            break
        ids += post["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    return tuple(ids)


def _regexes(part: Any) -> Iterator[str]:
    """All regular expressions in a part of a tokenizer.json."""
    if isinstance(part, dict):
        if isinstance(part.get("Regex"), str):
            yield part["Regex"]
        yield from _regexes(list(part.values()))
    elif isinstance(part, list):
        for one in part:
            yield from _regexes(one)


def _max_growth(part: Any) -> float:
    """The largest factor by which a normalizer may lengthen a text; inf if it replaces the empty text."""
    if isinstance(part, list):
        return math.prod(map(_max_growth, part))
    if not isinstance(part, dict):
        return 1.0
    replaced = part.get("pattern", {}).get("String") if isinstance(part.get("pattern"), dict) else None
    if part.get("type") == "Replace" and isinstance(replaced, str):
        return max(1.0, len(part.get("content", "")) / len(replaced)) if replaced else math.inf
    return _max_growth(list(part.values()))


def _parse_tokenizer_json(raw: str, name: str) -> tuple[dict[str, Any], list[dict[str, Any]], set[str]]:
    """(the file's content, its list of added tokens, their contents). Raises UserError for a corrupt file."""
    try:
        data = json.loads(raw)
        listed = data.setdefault("added_tokens", [])
        known = {token["content"]: token["id"] for token in listed}
        data["model"].get("vocab")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{name}: not a tokenizer.json that the tokenizers library reads, or corrupt") from error
    return data, listed, set(known)


def _unlisted_tokens(
    known: set[str], vocabulary: Mapping[str, int], added: Iterable[Mapping[str, Any]], named: Iterable[str]
) -> list[dict[str, Any]]:
    """The tokens to append to a tokenizer.json's list: those of `added`, and those of `named` in the vocabulary."""
    more = [dict(token) for token in sorted(added, key=lambda token: token["id"]) if token["content"] not in known]
    known = known | {token["content"] for token in more}
    own = [piece for piece in named if piece in vocabulary and piece not in known]
    return more + [_added_token(vocabulary[piece], piece, True) for piece in own]


def _added_token(i: int, content: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": i, "content": content, **flags, "special": special}


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of some texts, the longest first; without texts it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _overlap(a: Span, b: Span) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _strip_span(text: str, start: int, end: int) -> Span:
    """A token's span without white space at its ends, which a token with lstrip or rstrip includes."""
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())


def byte_letters() -> list[str]:
    """Byte-level BPE's letter for each byte: the byte's own character if printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    moved = {byte: chr(0x100 + number) for number, byte in enumerate(others)}
    return [moved.get(byte, chr(byte)) for byte in range(256)]


BYTES: Mapping[str, int] = {letter: byte for byte, letter in enumerate(byte_letters())}


def _align_byte_level(data: bytes, pieces: Sequence[str]) -> list[Span] | None:
    """Byte spans of byte-level pieces; None if they do not spell exactly the text's bytes."""
    spans, at = [], 0
    for piece in pieces:
        is_byte_level = all(letter in BYTES for letter in piece)
        expected = bytes(BYTES[letter] for letter in piece) if is_byte_level else piece.encode()
        if not data.startswith(expected, at):
            return None
        spans.append((at, at + len(expected)))
        at += len(expected)
    return spans if at == len(data) else None


def _align(data: bytes, pieces: Sequence[str], dummy_space: bool) -> list[Span] | None:
    """Byte spans of "▁" pieces; None if they do not match the text.

    In a piece "▁" stands for a space (or a "▁" of the text), and `<0xE2>` for a byte that no piece covers. With
    `dummy_space` the first piece begins with a space that the text does not have.
    """
    spans, at = [], 0
    for number, piece in enumerate(pieces):
        start = at
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) and data[at : at + 1] == bytes([int(piece[3:5], 16)]):
            at += 1
        else:
            for place, letter in enumerate(piece):
                if letter == "▁" and number == place == 0 and dummy_space:
                    continue
                expected = b" " if letter == "▁" and data[at : at + 1] == b" " else letter.encode()
                if not data.startswith(expected, at):
                    return None
                at += len(expected)
        spans.append((start, at))
    return spans if at == len(data) else None


def _to_byte_spans(text: str, spans: Sequence[Span]) -> list[Span]:
    """Convert character spans to byte spans."""
    at = [0]
    for letter in text:
        at.append(at[-1] + len(letter.encode()))
    return [(at[start], at[end]) for start, end in spans]
