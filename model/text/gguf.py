"""The tokenizer inside a GGUF file: byte-level BPE ("gpt2") or SentencePiece's BPE ("llama").

The file lists pieces, merges or scores, and each piece's kind; how text is cut before merging is only named
(`tokenizer.ggml.pre`), so each name's rule stands here as its model's own tokenizer.json has it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from model.support.cli import UserError
from model.text import chat
from model.text.engines import Engine, Fast, SentencePiece

CONTROL, USER_DEFINED = 3, 4  # kinds of piece; 1 normal, 2 unknown, 5 unused, 6 byte
# Cutting rules: digits one by one, then GPT-2's; or a regular expression in the dialect of the tokenizers library.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"llama-bpe": LLAMA3, "llama3": LLAMA3, "qwen2": LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")}


def from_gguf(path: Path) -> tuple[Engine, dict[str, int | None], str, str | None]:
    """(engine, special ids, chat template, chat form) of a GGUF file. Raises UserError for kinds not covered."""
    from model.checkpoints.gguf import open_gguf

    fields = open_gguf(path).fields
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama") or "tokenizer.ggml.tokens" not in fields:
        raise UserError(f"{path}: a tokenizer of kind {kind!r} is not covered; give the model's own tokenizer.json")
    engine = _byte_level(path, fields) if kind == "gpt2" else _sentencepiece(fields)
    specials = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = fields.get(f"tokenizer.ggml.{key}_token_id")
        specials[name] = value if isinstance(value, int) and 0 <= value < engine.size else None
    template = fields.get("tokenizer.chat_template", "")
    form = chat.guess_form("tokenizer.model", template, fields.get("general.architecture"), engine.special)
    return engine, specials, template, form


def _byte_level(path: Path, fields: dict[str, Any]) -> Engine:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces, merges = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.merges", [])
    kinds = fields.get("tokenizer.ggml.token_type", [1] * len(pieces))
    rule = fields.get("tokenizer.ggml.pre", "gpt-2")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=rule in ("llama-bpe", "llama3"),
        )
    )
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in PATTERNS)
    if rule == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), last])
    elif rule in PATTERNS:
        cut = pre_tokenizers.Split(Regex(PATTERNS[rule]), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, last])
    elif rule == "gpt-2":
        tokenizer.pre_tokenizer = last
    else:
        covered = ", ".join(("gpt-2", "smollm", *PATTERNS))
        raise UserError(f"{path}: cutting rule {rule!r} is not covered ({covered}); give the model's tokenizer.json")
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        found = [piece for piece, of in zip(pieces, kinds, strict=True) if of == kind]
        tokenizer.add_tokens([AddedToken(piece, special=special, normalized=False) for piece in found])
    return Fast(tokenizer.to_str(), str(path))


def _sentencepiece(fields: dict[str, Any]) -> Engine:
    """The pieces and scores as a SentencePiece model: BPE, byte fallback, identity normaliser, as llama files mean."""
    pieces, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    kinds = fields["tokenizer.ggml.token_type"]
    out = []
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        entry = _bytes(1, piece.encode()) + _tag(2, 5) + struct.pack("<f", score) + _number(3, int(kind))
        out.append(_bytes(1, entry))
    trainer = _number(3, 2) + _number(4, len(pieces)) + _number(35, 1)  # BPE; vocabulary size; byte fallback
    for field, key, none in ((40, "unknown", 0), (41, "bos", 1), (42, "eos", 2), (43, "padding", -1)):
        trainer += _number(field, int(fields.get(f"tokenizer.ggml.{key}_token_id", none)))
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    normalizer = _bytes(1, b"identity") + _number(3, int(prefix)) + _number(4, 0) + _number(5, 1)
    return SentencePiece(b"".join(out) + _bytes(2, trainer) + _bytes(3, normalizer), "tokenizer.model")


# SentencePiece's model file is a protocol-buffer message: fields of (number, wire type), then a varint, four bytes, or
# a length and bytes.
def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    digits: Iterable[int] = range(0, max(1, value.bit_length()), 7)
    raw = [(value >> shift) & 127 for shift in digits]
    return bytes([digit | 128 for digit in raw[:-1]] + raw[-1:])


def _tag(field: int, wire: int) -> bytes:
    return _varint(field << 3 | wire)


def _number(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(value)) + value
