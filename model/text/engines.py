"""What turns text into ids: SentencePiece files, and the `tokenizers` library.

A control token has a function in prompts: marked special in its file, named in the tokenizer's settings, written
like markup ("<|im_end|>", "[INST]") or used in the chat template, whatever its file says. Its text inside a text is
text. Other added tokens ("HER2+") are words, and are found in texts as transformers finds them.

Both engines have the same methods: `ids` encodes a text and `spans` says where its tokens are in its UTF-8 bytes;
`rendered` encodes what a chat template wrote, with the places (in characters) of the messages' contents, and `written`
names the control tokens in such a text; `text` decodes. `controls` are the control tokens' ids by their text, `files`
what `save` writes, `settings` what it adds to tokenizer_config.json.
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
MARKUP = re.compile(
    r"<[|｜].*[|｜]>|</?[\w:.-]+>|\[/?(INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_\w+|THINK|ARGS|CALL_ID|IMG\w*|PREFIX"
    r"|MIDDLE|SUFFIX|CONTROL_\d+|PAD|UNK|CLS|SEP|MASK|BOS|EOS)\]",
    re.DOTALL,
)
# Public cutting rules, in the dialect of the tokenizers library; they take time linear in a text but for white space.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GROWTH = 16.0  # how many times as long a normalizer may make a text before it runs bounded
KNOWN = frozenset({LLAMA3, QWEN2, GPT2, LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)|", "")})


def is_control(token: str, templates: str) -> bool:
    """Whether an added token that is not marked special is a control token all the same."""
    return (
        bool(MARKUP.fullmatch(token))
        or token in templates
        and not token.replace(" ", "").isalnum()
        and token.strip() != ""
    )


class SentencePiece:
    """A SentencePiece model: BPE with byte fallback for Mistral and Llama-2.

    `added` are tokens beside the file's own, as tokenizer.json lists them (id, content, special). `each` puts the
    leading space of the format before every text between added tokens, not before the text alone.
    """

    def __init__(
        self, proto: bytes, name: str, added: Iterable[Mapping[str, Any]] = (), each: bool = True, templates: str = ""
    ) -> None:
        import sentencepiece

        if not proto:
            raise UserError(f"{name}: empty; download it again")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
            # the same without the leading space: a message that occurs twice is read as one
            bare = protobuf.data(3, protobuf.number(3, 0))
            self.bare = sentencepiece.SentencePieceProcessor(model_proto=proto + bare)
        except RuntimeError as error:
            raise UserError(f"{name}: not a SentencePiece model, or corrupt; download it again") from error
        self.size, self.files, self.each = self.model.vocab_size(), {name: proto}, each
        self.controls: dict[str, int] = {}
        forming: list[str] = []  # the library itself finds user-defined pieces in a text
        for i, (piece, kind) in enumerate(_pieces_of(proto)):
            if kind == 3 or kind == 4 and is_control(piece, templates):
                self.controls[piece] = i
                forming += [piece] if kind == 4 else []
        self.added: dict[str, int] = {}
        self.names: dict[int, str] = {}
        self.hidden = {i for piece, i in self.controls.items() if piece not in forming}
        kept = sorted(added, key=lambda token: token["id"])
        for token in kept:
            self._add(token["id"], token["content"], token.get("special", False), templates)
        self.settings: dict[str, Any] = {"legacy": each}
        if kept:
            self.settings["added_tokens_decoder"] = {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in kept
            }
        words = [piece for piece in self.added if piece not in self.controls]
        self.words, self.forming = _any_of(words), _any_of(forming)
        self.marks = _any_of(self.controls)

    def _add(self, i: int, content: str, special: bool, templates: str) -> None:
        if i < self.model.vocab_size() and self.model.id_to_piece(i) == content:
            if special and self.model.is_control(i):
                self.controls[content] = i
            return
        self.added[content], self.names[i], self.size = i, content, max(self.size, i + 1)
        if special or is_control(content, templates):
            self.controls[content] = i
        if special:
            self.hidden.add(i)

    def ids(self, text: str) -> list[int]:
        return self._ids(text, True)

    def spans(self, text: str) -> tuple[list[int], list[Span]]:
        ids, spans, at = [], [], 0
        for part, model in self._parts(text, True):
            if isinstance(model, int):
                found, here = [model], [(0, len(part.encode()))]
            else:
                found = model.encode(part)
                here = self._places(model, part, [model.id_to_piece(i) for i in found])
            ids += found
            spans += [(at + start, at + end) for start, end in here]
            at += len(part.encode())
        return ids, spans

    def _places(self, model: Any, part: str, pieces: list[str]) -> list[Span]:
        """The walk along text and pieces, which places bytes exactly; else what the library says of its normalizer."""
        walked = _walk(part.encode(), pieces, True) or _walk(part.encode(), pieces, False)
        if walked is not None or not pieces:
            return walked or []
        proto = model.encode(part, out_type="serialized_proto")
        rows = [dict(protobuf.fields(row)) for field, row in protobuf.fields(proto) if field == 2]  # type: ignore
        return [(row.get(4, 0), row.get(5, 0)) for row in rows]  # type: ignore[misc]

    def _ids(self, text: str, first: bool) -> list[int]:
        ids: list[int] = []
        for part, model in self._parts(text, first):
            ids += [model] if isinstance(model, int) else model.encode(part)
        return ids

    def _parts(self, text: str, first: bool) -> Iterator[tuple[str, Any]]:
        """Parts of a text, each with the model that encodes it or, for an added word, its id."""
        at = 0
        for found in self.words.finditer(text):
            yield from self._cut(text[at : found.start()], first and at == 0)
            yield found[0], self.added[found[0]]
            at = found.end()
        yield from self._cut(text[at:], first and at == 0)

    def _cut(self, text: str, first: bool) -> Iterator[tuple[str, Any]]:
        """A part cut inside every control token that the library would form of it."""
        at = 0
        model = self.model if first or self.each and not text.startswith(" ") else self.bare
        for found in self.forming.finditer(text):
            yield text[at : found.start() + 1], model
            at, model = found.start() + 1, self.bare
        if text[at:]:
            yield text[at:], model

    def rendered(self, text: str, contents: Sequence[Span]) -> list[int]:
        ids: list[int] = []
        at = 0
        for start, end in self._marks(text, contents):
            ids += self._ids(text[at:start], at == 0) + [self.controls[text[start:end]]]
            at = end
        return ids + self._ids(text[at:], at == 0)

    def written(self, text: str) -> list[str]:
        return [text[start:end] for start, end in self._marks(text, ())]

    def _marks(self, text: str, contents: Sequence[Span]) -> Iterator[Span]:
        at = 0
        while found := self.marks.search(text, at):
            free = not any(_cross(found.span(), span) for span in contents)
            if free:
                yield found.span()
            at = found.end() if free else found.start() + 1

    def text(self, ids: list[int]) -> str:
        """Added tokens are written by their names; the library decodes the rest."""
        out, run, first = [], [], True
        for i in [*ids, None]:
            if i is not None and i not in self.names and i not in self.hidden:
                run.append(i)
                continue
            if run:
                out.append((self.model if first else self.bare).decode(run))
                run, first = [], False
            if i is not None and i not in self.hidden:
                out.append(self.names[i])
                first = False
        return "".join(out)

    def piece(self, i: int) -> str | None:
        return self.names.get(i) or (self.model.id_to_piece(i) if i < self.model.vocab_size() else None)

    def id_of(self, piece: str) -> int | None:
        if piece in self.added:
            return self.added[piece]
        found = self.model.piece_to_id(piece)
        return found if self.model.id_to_piece(found) == piece else None

    def special(self, piece: str) -> int | None:
        return self.controls.get(piece)


def _pieces_of(proto: bytes) -> Iterator[tuple[str, int]]:
    """(piece, kind) in order of id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""
    for field, value in protobuf.fields(proto):
        if field == 1 and isinstance(value, bytes):
            row = dict(protobuf.fields(value))
            piece = row.get(1, b"")
            yield (piece.decode("utf-8", "replace") if isinstance(piece, bytes) else ""), int(row.get(3, 1))  # type: ignore


class Fast:
    """A tokenizer.json: byte-level BPE (SmolLM2, Qwen2, Llama-3), or BPE over "▁" pieces.

    `added` are tokens of other files (as tokenizer.json lists them), `named` the texts of the begin,
    end and padding token, which are control tokens where the vocabulary has them.
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
        try:
            data = json.loads(raw)
            listed = data.setdefault("added_tokens", [])
            model = data["model"]
            known = {token["content"]: token["id"] for token in listed}
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{name}: not a tokenizer.json that the tokenizers library reads, or corrupt") from error
        vocabulary = model.get("vocab") if isinstance(model.get("vocab"), dict) else {}
        more = [dict(token) for token in sorted(added, key=lambda token: token["id"]) if token["content"] not in known]
        here = {token["content"] for token in more} | set(known)
        more += [_token(vocabulary[piece], piece, True) for piece in named if piece in vocabulary and piece not in here]
        listed += more
        raw = json.dumps(data, ensure_ascii=False) if more else raw
        self.files = {"tokenizer.json": raw.encode()}
        self.settings: dict[str, Any] = {}
        self.hidden = {token["id"] for token in listed if token.get("special")}
        # the library leaves special tokens' texts alone; those that only look like control tokens are marked for it
        forced = [t for t in listed if not t.get("special") and is_control(t["content"], templates)]
        for token in forced:
            token["special"] = True
        ready = json.dumps(data) if forced else raw
        self.model = _library(ready, name)
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
        # what a text may become: the unknown token
        self.formable = set(self.controls.values()) - {vocabulary.get(model.get("unk_token"))}
        self.byte_level = '"ByteLevel"' in json.dumps(data.get("decoder"))
        self.normalizes = data.get("normalizer") is not None
        try:
            self.begin = _begin(data.get("post_processor"))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"{name}: its post-processor names no token for the beginning; it is corrupt") from error
        unknown = set(_patterns([data.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")])) - KNOWN
        self.sandbox = Sandbox(ready) if unknown or _growth(data.get("normalizer")) > GROWTH else None

    def _encoded(self, text: str, controls: bool = False) -> tuple[list[int], list[str], list[Span]]:
        if self.sandbox is not None:
            return self._ask(do="encode", text=text, controls=controls)
        return encoded(self.model, text, controls)

    def _ask(self, **request: Any) -> Any:
        assert self.sandbox is not None
        try:
            return self.sandbox.ask(**request)
        except SandboxError as error:
            raise UserError(f"{self.name}: a normalizer or regular expression of this file fails: {error}") from error

    def ids(self, text: str) -> list[int]:
        return self._plain(self._encoded(text)[0])

    def _plain(self, ids: list[int]) -> list[int]:
        if not self.formable.isdisjoint(ids):
            wrong = next(self.model.id_to_token(i) for i in ids if i in self.formable)
            raise UserError(f"{self.name}: its vocabulary spells the control token {wrong!r} from plain text")
        return ids

    def spans(self, text: str) -> tuple[list[int], list[Span]]:
        ids, pieces, characters = self._encoded(text)
        data = text.encode()
        found = None
        if self.byte_level:
            found = _bytes_of(data, pieces)
        elif not self.normalizes:
            found = _walk(data, pieces, True) or _walk(data, pieces, False)
        return self._plain(ids), found if found is not None else _to_bytes(text, characters)

    def rendered(self, text: str, contents: Sequence[Span]) -> list[int]:
        """The library's own ids of the whole text, where no content holds a control token. Else the text is cut at
        the template's control tokens, and what is between them is encoded as text."""
        masked = text
        while True:
            ids, _, places = self._encoded(masked, controls=True)
            marks = [(i, *place) for i, place in zip(ids, places, strict=True) if i in self.formable]
            inside = [_trimmed(masked, a, b) for _, a, b in marks]
            inside = [span for span in inside if any(_cross(span, content) for content in contents)]
            if not inside:
                break
            for start, end in inside:
                masked = masked[:start] + "\ue000" * (end - start) + masked[end:]
        if masked == text:
            return ids
        out: list[int] = []
        at = 0
        for i, start, end in marks:
            out += [*self._after(text[at:start], at > 0), i]
            at = end
        return out + self._after(text[at:], at > 0)

    def _after(self, text: str, later: bool) -> list[int]:
        """The ids of a part; `later`: without what the tokenizer puts at the beginning of a text only."""
        line = self.ids("\n")
        found = self.ids("\n" + text) if later and text and self._first_only() else []
        return found[len(line) :] if found[: len(line)] == line and found else self.ids(text)

    def _first_only(self) -> bool:
        mark = next((piece for piece in self.controls), None)
        if mark is None:
            return False
        ids = self._encoded(mark + "a", controls=True)[0]
        return ids[1:] != self.ids("a")

    def written(self, text: str) -> list[str]:
        named = {i: piece for piece, i in self.controls.items()}
        return [named[i] for i in self._encoded(text, controls=True)[0] if i in named]

    def text(self, ids: list[int]) -> str:
        kept = [i for i in ids if i not in self.hidden]
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


def _library(raw: str, name: str) -> Any:
    """The tokenizers library's object. A panic in it prints on its own, and is no Exception."""
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
    """Nothing on standard error from native code."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _begin(post: Any) -> tuple[int, ...]:
    """The ids that a post-processor puts before a text."""
    if not isinstance(post, dict):
        return ()
    if post.get("type") == "Sequence":
        return tuple(i for one in post.get("processors", []) for i in _begin(one))
    if isinstance(post.get("cls"), list):
        return (post["cls"][1],)
    ids: list[int] = []
    for part in post.get("single", []) if post.get("type") == "TemplateProcessing" else []:
        if "SpecialToken" not in part:
            break
        ids += post["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    return tuple(ids)


def _patterns(part: Any) -> Iterator[str]:
    """Every regular expression of a tokenizer.json's parts."""
    if isinstance(part, dict):
        if isinstance(part.get("Regex"), str):
            yield part["Regex"]
        yield from _patterns(list(part.values()))
    elif isinstance(part, list):
        for one in part:
            yield from _patterns(one)


def _growth(part: Any) -> float:
    """How many times as long a normalizer's replacements may make a text; without end where they replace nothing."""
    if isinstance(part, list):
        return math.prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1.0
    replaced = part.get("pattern", {}).get("String") if isinstance(part.get("pattern"), dict) else None
    if part.get("type") == "Replace" and isinstance(replaced, str):
        return max(1.0, len(part.get("content", "")) / len(replaced)) if replaced else math.inf
    return _growth(list(part.values()))


def _token(i: int, content: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": i, "content": content, **flags, "special": special}


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Any of some texts, the longest first; of none it finds nothing."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _cross(a: Span, b: Span) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _trimmed(text: str, start: int, end: int) -> Span:
    """A token's place without the white space that it may take along."""
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())


def byte_letters() -> list[str]:
    """The letter that byte-level BPE spells each byte with: itself where it is printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    moved = {byte: chr(0x100 + number) for number, byte in enumerate(others)}
    return [moved.get(byte, chr(byte)) for byte in range(256)]


BYTES: Mapping[str, int] = {letter: byte for byte, letter in enumerate(byte_letters())}


def _bytes_of(data: bytes, pieces: Sequence[str]) -> list[Span] | None:
    """Byte-level pieces' places, where together they spell exactly the text's bytes."""
    spans, at = [], 0
    for piece in pieces:
        is_byte_level = all(letter in BYTES for letter in piece)
        expected = bytes(BYTES[letter] for letter in piece) if is_byte_level else piece.encode()
        if not data.startswith(expected, at):
            return None
        spans.append((at, at + len(expected)))
        at += len(expected)
    return spans if at == len(data) else None


def _walk(data: bytes, pieces: Sequence[str], dummy_space: bool) -> list[Span] | None:
    """Where each "▁" piece is in the text's bytes, by walking along both; None where they do not match.

    A piece spells a space as "▁" (a "▁" of the text stays one), what the vocabulary lacks as bytes `<0xE2>`, and the
    first may begin with a space that the text does not have.
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


def _to_bytes(text: str, spans: Sequence[Span]) -> list[Span]:
    """Character spans as byte spans."""
    at = [0]
    for letter in text:
        at.append(at[-1] + len(letter.encode()))
    return [(at[start], at[end]) for start, end in spans]
