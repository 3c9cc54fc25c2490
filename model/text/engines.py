"""What turns text into ids: SentencePiece files, and the `tokenizers` library."""

from __future__ import annotations

import json
from typing import Protocol

from model.support.cli import UserError

Span = tuple[int, int]


class Engine(Protocol):
    """What turns text into ids: SentencePiece, or the `tokenizers` library."""

    size: int
    files: dict[str, bytes]

    def ids(self, text: str) -> list[int]: ...
    def pieces(self, text: str) -> tuple[list[int], list[str], list[Span] | None]: ...
    def text(self, ids: list[int]) -> str: ...
    def special(self, piece: str) -> int | None: ...


class SentencePiece:
    """A SentencePiece model: BPE with byte fallback for Mistral and Llama-2."""

    def __init__(self, proto: bytes, name: str) -> None:
        import sentencepiece

        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise UserError(f"{name}: not a SentencePiece model, or damaged; download it again") from error
        if not proto:
            raise UserError(f"{name}: empty; download it again")
        self.size = self.model.vocab_size()
        self.files = {name: proto}

    def ids(self, text: str) -> list[int]:
        return self.model.encode(text)

    def pieces(self, text: str) -> tuple[list[int], list[str], None]:
        ids = self.model.encode(text)
        return ids, [self.model.id_to_piece(i) for i in ids], None

    def text(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def special(self, piece: str) -> int | None:
        found = self.model.piece_to_id(piece)
        known = found != self.model.unk_id() and self.model.is_control(found)
        return found if known else None


class Fast:
    """A tokenizer.json: byte-level BPE (SmolLM2, Qwen2, Llama-3), or BPE over "▁" pieces."""

    def __init__(self, raw: str, name: str) -> None:
        import tokenizers

        try:
            self.model = tokenizers.Tokenizer.from_str(raw)
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{name}: not a tokenizer.json that the tokenizers library reads, or damaged") from error
        self.model.no_truncation()
        self.model.no_padding()
        self.model.encode_special_tokens = True  # a special token's text inside a text is text
        ids = self.model.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise UserError(f"{name}: the vocabulary is empty; the file is damaged")
        self.size = max(ids) + 1  # ids may have gaps
        self.files = {"tokenizer.json": raw.encode()}
        self.added = {token.content: i for i, token in self.model.get_added_tokens_decoder().items()}
        self.byte_level = '"ByteLevel"' in json.dumps(json.loads(raw).get("decoder"))

    def ids(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def pieces(self, text: str) -> tuple[list[int], list[str], list[Span]]:
        found = self.model.encode(text, add_special_tokens=False)
        return found.ids, found.tokens, found.offsets

    def text(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=True)

    def special(self, piece: str) -> int | None:
        return self.added.get(piece)
