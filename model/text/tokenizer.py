"""Text to token ids and back: SentencePiece files (Mistral, Llama-2), tokenizer.json, and the tokenizer inside a GGUF.

For every kind, special tokens spelled in a text ("</s>", "<|im_end|>") are encoded as ordinary text; only `bos`, `eos`
and `encode_chat` produce special ids. Texts are encoded one by one and their ids concatenated: tokens never span two
texts.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from model.checkpoints.weights import first_part
from model.support.cli import UserError
from model.support.files import check_regular, read_json, read_text, write_json
from model.text import chat
from model.text.engines import Engine, Fast, SentencePiece, Span
from model.text.gguf import from_gguf

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
TEMPLATES = "additional_chat_templates"
NAMES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


class Tokenizer:
    """`encode`, `decode` and `encode_chat` over an engine (model/text/engines.py).

    `bos_id`, `eos_id`, `pad_id`: special ids, or None. `begin`: the ids that the tokenizer's files put before a text,
    possibly none. `stop_ids`: ids that end generation. `vocab_size`: number of the tokenizer's ids; a model's embedding
    may be padded to more. `templates`: the model's chat templates by name. `names`: the special tokens' texts, for the
    templates. `form`: the default chat format (model/text/chat.py), or None.
    """

    def __init__(
        self,
        engine: Engine,
        specials: Mapping[str, int | None],
        templates: Mapping[str, str] | None = None,
        form: str | None = None,
        begin: Sequence[int] = (),
        stops: Sequence[int] = (),
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.engine = engine
        self.bos_id, self.eos_id, self.pad_id = (specials.get(name) for name in ("bos", "eos", "pad"))
        self.templates = dict(templates or {})
        self.form = chat.OWN if self.templates else form
        self.begin, self.vocab_size = tuple(begin), engine.size
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in (self.eos_id, *stops) if i is not None))
        texts = {f"{name}_token": engine.piece(i) for name, i in specials.items() if i is not None}
        self.names = dict(names) if names is not None else {name: piece for name, piece in texts.items() if piece}

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """Load the tokenizer of a model's folder, or of a tokenizer.json, SentencePiece .model or .gguf file.

        In a folder with several, tokenizer.json comes first, then the newest .model, then the GGUF. Raises UserError
        if there is none, or it is corrupt.
        """
        path = Path(path)
        file = first_part(path) if path.is_file() else _find(path)
        if file.suffix == ".gguf":
            engine, specials, templates, adds_bos, stops = from_gguf(file)
            begin = [specials["bos"]] if adds_bos and specials["bos"] is not None else []
            return cls(engine, specials, templates, None, begin, [*stops, *_stops(file.parent)])
        return cls._from_files(file)

    @classmethod
    def _from_files(cls, file: Path) -> Tokenizer:
        folder = file.parent
        settings, templates = _settings(folder), _templates(folder)
        names = {f"{name}_token": piece for name in NAMES if (piece := _content(settings.get(f"{name}_token")))}
        listed = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
        more = [_content(token) for token in (listed.values() if isinstance(listed, dict) else listed)]
        named = dict.fromkeys([*names.values(), *(piece for piece in more if piece)])
        added, template_text = _added(folder, settings, named), "\0".join(templates.values())
        configured = (folder / "tokenizer_config.json").is_file()
        if file.suffix == ".json":
            engine: Engine = Fast(read_text(file, keep_mark=True), str(file), added, named, template_text)
        else:
            # transformers' option; without a tokenizer_config.json, segments between added tokens get a space prefix
            legacy = bool(settings.get("legacy", not configured))
            engine = SentencePiece(file.read_bytes(), file.name, added, legacy, template_text)
        specials = {name: _special(folder, engine, settings, name) for name in ("bos", "eos", "pad")}
        if isinstance(engine, Fast):
            begin = engine.begin  # with a tokenizer.json transformers ignores add_bos_token
        else:
            adds_bos = bool(settings.get("add_bos_token", not configured))
            begin = (specials["bos"],) if adds_bos and specials["bos"] is not None else ()
            own = {f"{name}_token": engine.piece(i) for name, i in specials.items() if i is not None}
            names = {**{name: piece for name, piece in own.items() if piece}, **names}
        found = re.search(r"\.model\.v([1237])$", file.name)  # mistral-common's file names
        form = f"mistral-v{found[1]}" if found else None
        return cls(engine, specials, templates, form, begin, _stops(folder), names)

    @overload
    def encode(self, text: str, bos: bool = ..., eos: bool = ..., offsets: Literal[False] = ...) -> list[int]: ...
    @overload
    def encode(
        self, text: str, bos: bool = ..., eos: bool = ..., *, offsets: Literal[True]
    ) -> tuple[list[int], list[Span]]: ...

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, offsets: bool = False
    ) -> list[int] | tuple[list[int], list[Span]]:
        """Ids of a text; `bos` prepends `begin`, `eos` appends the end token.

        With `offsets`, also each token's (start, end) in the text's UTF-8 bytes. They are contiguous, unless a
        normalizer changed the text; then they are the library's own, in whole characters. Begin and end tokens get
        empty spans. `to_characters` converts them to character positions. Raises UserError for text that is not
        Unicode (half a surrogate pair), or if a regular expression of the tokenizer's file fails on it.
        """
        before = list(self.begin) if bos else []
        after = [self.eos_id] if eos and self.eos_id is not None else []
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"half a surrogate pair at character {error.start}: the text is not Unicode") from error
        if not offsets:
            return before + self.engine.encode(text) + after
        ids, found = self.engine.encode_with_spans(text)
        return before + ids + after, [(0, 0)] * len(before) + found + [(len(data), len(data))] * len(after)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, without special tokens. Raises UserError for an id out of range."""
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise UserError(f"token id {wrong} is not one of the tokenizer's {self.vocab_size}")
        return self.engine.decode(list(ids))

    def encode_chat(self, messages: Sequence[Mapping[str, str]], form: str | None = None) -> list[int]:
        """Ids of a conversation, ready for the model's turn (forms: model/text/chat.py; None: the tokenizer's own)."""
        form = form or self.form
        if form is None:
            raise UserError(
                f"the model has no chat template, so no chat form; give a plain prompt, or name the form that it was "
                f"tuned on: {', '.join(chat.FORMS)}"
            )
        return chat.encode_chat(self, messages, form)

    def put_begin(self, how: str) -> None:
        """Set `begin` by the option --bos: "yes" the begin token, "no" nothing, "auto" as the tokenizer's files say."""
        if how == "yes" and self.bos_id is None:
            raise UserError("--bos yes: the tokenizer has no begin token")
        if how != "auto":
            self.begin = (self.bos_id,) if how == "yes" and self.bos_id is not None else ()

    def special_id(self, piece: str) -> int:
        """The id of a special token. Raises UserError if the tokenizer has no such special token."""
        found = self.engine.special(piece)
        if found is None:
            raise UserError(f"the tokenizer has no special token {piece}; choose the chat form that it was made for")
        return found

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into a model's folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names: dict[str, Any] = {}
        for key, i in (("bos_token", self.bos_id), ("eos_token", self.eos_id), ("pad_token", self.pad_id)):
            names[key] = None if i is None else self.engine.piece(i)
        if list(self.templates) == ["default"]:
            names["chat_template"] = self.templates["default"]
        elif self.templates:
            names["chat_template"] = [{"name": name, "template": text} for name, text in self.templates.items()]
        kind = "PreTrainedTokenizerFast" if isinstance(self.engine, Fast) else "LlamaTokenizer"
        for name, data in self.engine.files.items():
            (folder / name).write_bytes(data)
        settings = {"tokenizer_class": kind, "add_bos_token": bool(self.begin), **self.engine.settings, **names}
        write_json(folder / "tokenizer_config.json", settings)
        if set(self.stop_ids) - {self.eos_id} and not (folder / "generation_config.json").is_file():
            write_json(folder / "generation_config.json", {"eos_token_id": list(self.stop_ids)})

    def piece(self, i: int) -> str:
        """A token as the vocabulary spells it: "Ġ" or "▁" for a space, special tokens by name."""
        return self.engine.piece(i) or ""


def _find(folder: Path) -> Path:
    """The file to load from a folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such file or folder; give the folder of a model's or tokenizer's files")
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    models = sorted(file for file in folder.iterdir() if re.search(r"\.model(\.v\d+)?$", file.name))
    if models:
        return max(models, key=lambda file: (_version(file.name), file.name))
    found = sorted({first_part(file) for file in folder.glob("*.gguf")})
    if len(found) == 1:
        return found[0]
    if (folder / "tekken.json").is_file():
        raise UserError(f"{folder}: holds only tekken.json, which is not supported; add the model's tokenizer.json")
    raise UserError(f"{folder}: holds no tokenizer (tokenizer.json, a SentencePiece .model, or one GGUF file)")


def _version(name: str) -> int:
    found = re.search(r"\.v(\d+)$", name)
    return int(found[1]) if found else 0


def _json(file: Path) -> dict[str, Any]:
    read = read_json(file) if file.is_file() else {}
    return read if isinstance(read, dict) else {}


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, updated from the older special_tokens_map.json if transformers reads that, and the special
    ids of generation_config.json and config.json."""
    settings = _json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _json(folder / "special_tokens_map.json")
    for name in ("generation_config.json", "config.json"):
        ids = {key: value for key, value in _json(folder / name).items() if key.endswith("_token_id")}
        settings = {**ids, **settings}
    return settings


def _stops(folder: Path) -> list[int]:
    """All end tokens listed in config.json and generation_config.json."""
    found: list[int] = []
    for name in ("config.json", "generation_config.json"):
        ids = _json(folder / name).get("eos_token_id")
        found += [i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int and i >= 0]
    return found


def _templates(folder: Path) -> dict[str, str]:
    """The chat templates by name: from template files if there are any, else from tokenizer_config.json (one template,
    or a list of names and templates), as transformers does."""
    files = {"default": folder / "chat_template.jinja"} if (folder / "chat_template.jinja").is_file() else {}
    files |= {file.stem: file for file in sorted((folder / TEMPLATES).glob("*.jinja"))}
    if files:
        return {name: read_text(file, keep_mark=True) for name, file in files.items()}
    found = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    try:
        listed = {one["name"]: one["template"] for one in found} if isinstance(found, list) else found or {}
    except (TypeError, KeyError) as error:
        raise UserError(f"{folder}: chat_template in tokenizer_config.json lacks names or templates") from error
    return {str(name): text for name, text in listed.items() if isinstance(text, str)}


def _content(token: Any) -> str | None:
    """A special token's text; settings give it as a string or an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _added(folder: Path, settings: Mapping[str, Any], named: Iterable[str]) -> list[dict[str, Any]]:
    """Added tokens in tokenizer.json's form, from added_tokens_decoder or the older added_tokens.json (where a token
    is special if the settings name it)."""
    special = set(named)
    try:
        if "added_tokens_decoder" in settings:
            found = [{**token, "id": int(i)} for i, token in settings["added_tokens_decoder"].items()]
        else:
            plain = {"single_word": False, "lstrip": False, "rstrip": False}
            found = [
                {"id": int(i), "content": text, **plain, "normalized": text not in special, "special": text in special}
                for text, i in _json(folder / "added_tokens.json").items()
            ]
        keys = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")
        found = [{key: token.get(key, key == "normalized") for key in keys} for token in found]
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: an added token has no text or no id; the files are corrupt") from error
    if any(not isinstance(token["content"], str) or not token["content"] or token["id"] < 0 for token in found):
        raise UserError(f"{folder}: an added token has no text or no id; the files are corrupt")
    return found


def _special(folder: Path, engine: Engine, settings: Mapping[str, Any], name: str) -> int | None:
    """A special token's id: by its text in the settings, else its id in the model's config, else SentencePiece's."""
    key = f"{name}_token"
    piece = _content(settings.get(key))
    if piece is not None:
        found = engine.id_of(piece)
        if found is None and name == "eos":
            raise UserError(
                f"{folder}: the eos_token {piece!r} of tokenizer_config.json is not in the vocabulary, so generation "
                "would never end; use the tokenizer files of one model"
            )
        return found
    if key in settings:  # an explicit null
        return None
    by_id = settings.get(f"{key}_id")
    by_id = by_id[0] if isinstance(by_id, list) and by_id else by_id
    if isinstance(by_id, int) and 0 <= by_id < engine.size:
        return by_id
    if isinstance(engine, SentencePiece):
        own = getattr(engine.model, f"{name}_id")()
        return own if own >= 0 else None
    return None


def to_characters(text: str, spans: Sequence[Span]) -> list[Span]:
    """Convert byte spans (of `encode(..., offsets=True)`) to character spans; a cut character is included whole."""
    letter_of = []
    for index, letter in enumerate(text):
        letter_of += [index] * len(letter.encode())
    letter_of.append(len(text))
    return [(letter_of[start], letter_of[end - 1] + 1 if end > start else letter_of[start]) for start, end in spans]


def copy_tokenizer(source: str | Path, folder: str | Path) -> None:
    """Copy a tokenizer's files unchanged, or write the tokenizer inside a GGUF as files."""
    source, folder = Path(source), Path(folder)
    names = re.compile(r".*\.model(\.v\d+)?|tokenizer\.json|chat_template\.jinja|tekken\.json|added_tokens\.json")
    if not source.is_dir() or not any(names.fullmatch(file.name) for file in source.iterdir()):
        Tokenizer.from_pretrained(source).save(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if names.fullmatch(file.name) or file.name in SETTINGS:
            check_regular(file)
            shutil.copyfile(file, folder / file.name)
    if (source / TEMPLATES).is_dir():
        (folder / TEMPLATES).mkdir(exist_ok=True)
        for file in (source / TEMPLATES).glob("*.jinja"):
            check_regular(file)
            shutil.copyfile(file, folder / TEMPLATES / file.name)
