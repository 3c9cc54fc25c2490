"""Text to token ids and back: SentencePiece files (Mistral, Llama-2), tokenizer.json, and the tokenizer inside a GGUF.

Two rules hold for every kind. A special token's text inside a text ("</s>", "<|im_end|>") is text and never becomes
the special id: only `bos`, `eos` and `encode_chat` place those. And a text is encoded as it stands, apart from what
comes before and after it: ids of several pieces are joined, never merged.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from model.support.cli import UserError
from model.support.files import read_json, write_json
from model.text import chat
from model.text.engines import Engine, Fast, SentencePiece, Span
from model.text.gguf import from_gguf

# Ends of a turn or text that models of the covered families emit, beside their config's eos.
STOPS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


class Tokenizer:
    """`encode`, `decode` and `encode_chat` over one of the engines.

    `bos_id`, `eos_id` and `pad_id` are ids or None; `stop_ids` are the ids that end generation; `vocab_size` counts the
    tokenizer's ids (a model's own vocabulary may be padded to more).
    """

    def __init__(self, engine: Engine, specials: Mapping[str, int | None], template: str, form: str | None) -> None:
        self.engine = engine
        self.bos_id, self.eos_id, self.pad_id = (specials.get(name) for name in ("bos", "eos", "pad"))
        self.template, self.form = template, form
        self.vocab_size = engine.size
        ends = [self.eos_id, *(engine.special(piece) for piece in STOPS)]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in ends if i is not None))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a model's folder, or of one file: tokenizer.json, a SentencePiece .model, a .gguf.

        A folder with several keeps to tokenizer.json, then the newest .model, then the GGUF. Raises UserError where
        there is none, or it is damaged.
        """
        path = Path(path)
        file = path if path.is_file() else _find(path)
        if file.suffix == ".gguf":
            return cls(*from_gguf(file))
        try:
            raw = file.read_bytes()
            engine: Engine = Fast(raw.decode(), str(file)) if file.suffix == ".json" else SentencePiece(raw, file.name)
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text; the file is damaged") from error
        settings = _settings(file.parent)
        specials = {name: _special(engine, settings, name) for name in ("bos", "eos", "pad")}
        template = settings.get("chat_template")
        template = template if isinstance(template, str) else ""
        form = chat.guess_form(file.name, template, settings.get("model_type"), engine.special)
        return cls(engine, specials, template, form)

    @overload
    def encode(self, text: str, bos: bool = ..., eos: bool = ..., offsets: Literal[False] = ...) -> list[int]: ...
    @overload
    def encode(
        self, text: str, bos: bool = ..., eos: bool = ..., *, offsets: Literal[True]
    ) -> tuple[list[int], list[Span]]: ...

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, offsets: bool = False
    ) -> list[int] | tuple[list[int], list[Span]]:
        """Ids of a text, with the begin and end tokens on request (where the tokenizer has them).

        With `offsets`, also (start, end) of every token in the text's UTF-8 bytes; they follow each other without gaps
        (but where a normaliser rewrote the text), and begin and end tokens get empty spans. `to_characters` turns them
        into character positions. Raises UserError for text that is not Unicode (half a surrogate pair).
        """
        before = [self.bos_id] if bos and self.bos_id is not None else []
        after = [self.eos_id] if eos and self.eos_id is not None else []
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"half a surrogate pair at character {error.start}: the text is not Unicode") from error
        if not offsets:
            return before + self.engine.ids(text) + after
        ids, pieces, spans = self.engine.pieces(text)
        found = byte_spans(data, pieces, getattr(self.engine, "byte_level", False)) or _to_bytes(text, spans or [])
        if len(found) != len(ids):
            raise UserError("this tokenizer rewrites the text and does not say where its tokens stand in it")
        return before + ids + after, [(0, 0)] * len(before) + found + [(len(data), len(data))] * len(after)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; special tokens leave nothing. Raises UserError for an id out of range."""
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise UserError(f"token id {wrong} is not one of the tokenizer's {self.vocab_size}")
        return self.engine.text(list(ids))

    def encode_chat(self, messages: Sequence[Mapping[str, str]], form: str | None = None) -> list[int]:
        """Ids of a conversation, ready for the model's turn (forms: model/text/chat.py; None: the tokenizer's own)."""
        form = form or self.form
        if form is None:
            raise UserError(f"the tokenizer does not say its chat form; name one of {', '.join(chat.FORMS)}")
        return chat.encode_chat(self, messages, form)

    def special_id(self, piece: str) -> int:
        """The id of a special token, or a UserError where the tokenizer has none of that text."""
        found = self.engine.special(piece)
        if found is None:
            raise UserError(f"the tokenizer has no special token {piece}; this is not its chat form")
        return found

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into a model's folder, so that it is whole by itself."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names: dict[str, Any] = {}
        for key, i in (("bos_token", self.bos_id), ("eos_token", self.eos_id), ("pad_token", self.pad_id)):
            names[key] = None if i is None else self.piece(i)
        if self.template:
            names["chat_template"] = self.template
        if self.form:
            names["chat_form"] = self.form
        kind = "PreTrainedTokenizerFast" if isinstance(self.engine, Fast) else "LlamaTokenizer"
        for name, data in self.engine.files.items():
            (folder / name).write_bytes(data)
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": kind, "add_bos_token": False, **names})

    def piece(self, i: int) -> str:
        """A token as its file spells it: with "Ġ" or "▁" for a space, a special token by its name."""
        engine = self.engine
        return engine.model.id_to_token(i) if isinstance(engine, Fast) else engine.model.id_to_piece(i)  # type: ignore


def _find(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such file or folder; give the folder of a model's or tokenizer's files")
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    models = sorted(file for file in folder.iterdir() if re.search(r"\.model(\.v\d+)?$", file.name))
    if models:
        return max(models, key=lambda file: (_version(file.name), file.name))
    found = sorted(folder.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if (folder / "tekken.json").is_file():
        raise UserError(f"{folder}: holds only tekken.json, which is not covered; add the model's tokenizer.json")
    raise UserError(f"{folder}: holds no tokenizer (tokenizer.json, a SentencePiece .model, or one GGUF file)")


def _version(name: str) -> int:
    found = re.search(r"\.v(\d+)$", name)
    return int(found[1]) if found else 0


def _settings(folder: Path) -> dict[str, Any]:
    """What the files beside a tokenizer say of its special tokens, the first file that says so counting."""
    found: dict[str, Any] = {}
    for name in (*CONFIG_FILES, "config.json"):
        if (folder / name).is_file():
            read = read_json(folder / name)
            found = {**(read if isinstance(read, dict) else {}), **found}
    if "chat_template" not in found and (folder / "chat_template.jinja").is_file():
        try:
            found["chat_template"] = (folder / "chat_template.jinja").read_text("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{folder / 'chat_template.jinja'}: not UTF-8 text; the file is damaged") from error
    return found


def _special(engine: Engine, settings: Mapping[str, Any], name: str) -> int | None:
    """A special token's id: by its text, else by the model config's id, else SentencePiece's own."""
    piece = settings.get(f"{name}_token")
    piece = piece.get("content") if isinstance(piece, dict) else piece
    if isinstance(piece, str):
        return engine.special(piece) if engine.special(piece) is not None else _plain_id(engine, piece)
    if f"{name}_token" in settings:  # an explicit null
        return None
    by_id = settings.get(f"{name}_token_id")
    by_id = by_id[0] if isinstance(by_id, list) and by_id else by_id
    if isinstance(by_id, int) and 0 <= by_id < engine.size:
        return by_id
    if isinstance(engine, SentencePiece):
        own = getattr(engine.model, f"{name}_id")()
        return own if own >= 0 else None
    return None


def _plain_id(engine: Engine, piece: str) -> int | None:
    """The id of a piece that the vocabulary holds without marking it special (pad = unk, for one)."""
    if isinstance(engine, Fast):
        return engine.model.token_to_id(piece)
    assert isinstance(engine, SentencePiece)
    found = engine.model.piece_to_id(piece)
    return found if engine.model.id_to_piece(found) == piece else None


def byte_spans(data: bytes, pieces: Sequence[str], byte_level: bool) -> list[Span] | None:
    """Where each piece stands in the text's bytes, by walking along both; None where they do not match.

    A byte-level piece spells one byte a character. Other pieces spell a space as "▁" (a "▁" of the text stays one),
    what the vocabulary lacks as bytes `<0xE2>`, and may begin with a space that the text does not have.
    """
    if byte_level:
        spans, at = [], 0
        for piece in pieces:
            spans.append((at, at + len(piece)))
            at += len(piece)
        return spans if at == len(data) else None
    return _walk(data, pieces, True) or _walk(data, pieces, False)


def _walk(data: bytes, pieces: Sequence[str], dummy_space: bool) -> list[Span] | None:
    spans, at = [], 0
    for number, piece in enumerate(pieces):
        start = at
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) and data[at : at + 1] == bytes([int(piece[3:5], 16)]):
            at += 1
        else:
            for place, letter in enumerate(piece):
                if letter == "▁" and number == place == 0 and dummy_space:
                    continue
                spelt = b" " if letter == "▁" and data[at : at + 1] == b" " else letter.encode()
                if not data.startswith(spelt, at):
                    return None
                at += len(spelt)
        spans.append((start, at))
    return spans if at == len(data) else None


def _to_bytes(text: str, spans: Sequence[Span]) -> list[Span]:
    """Character spans as byte spans."""
    at = [0]
    for letter in text:
        at.append(at[-1] + len(letter.encode()))
    return [(at[start], at[end]) for start, end in spans]


def to_characters(text: str, spans: Sequence[Span]) -> list[Span]:
    """Byte spans (of `encode(..., offsets=True)`) as character spans; one that cuts a letter takes it whole."""
    letter_of = []
    for index, letter in enumerate(text):
        letter_of += [index] * len(letter.encode())
    letter_of.append(len(text))
    return [(letter_of[start], letter_of[end - 1] + 1 if end > start else letter_of[start]) for start, end in spans]


def copy_tokenizer(source: str | Path, folder: str | Path) -> None:
    """Copy a tokenizer's own files as they are; where they are inside a GGUF, write them out."""
    source, folder = Path(source), Path(folder)
    names = re.compile(r".*\.model(\.v\d+)?|tokenizer\.json|chat_template\.jinja|tekken\.json|added_tokens\.json")
    if not source.is_dir() or not any(names.fullmatch(file.name) for file in source.iterdir()):
        Tokenizer.from_pretrained(source).save(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if names.fullmatch(file.name) or file.name in CONFIG_FILES:
            shutil.copyfile(file, folder / file.name)
