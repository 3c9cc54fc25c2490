"""The tokenizer inside a GGUF file: byte-level BPE ("gpt2") or SentencePiece's BPE ("llama").

The file lists pieces, their kinds, and merges or scores. It only names its pre-tokenizer (`tokenizer.ggml.pre`); the
patterns for the supported names are those of the models' own tokenizer.json.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from model.support.cli import UserError
from model.text import protobuf
from model.text.engines import CONTROL, LLAMA3, QWEN2, USER_DEFINED, Engine, Fast, SentencePiece

PATTERNS = {"llama-bpe": LLAMA3, "llama3": LLAMA3, "qwen2": QWEN2}
ADD_BOS = ("llama-bpe", "llama3")  # pre-tokenizers whose models add the begin token if the file does not say


def from_gguf(path: Path) -> tuple[Engine, dict[str, int | None], dict[str, str], bool, list[int]]:
    """(engine, special ids by name, chat templates by name, add_bos_token, ids that end a turn).

    Raises UserError for an unsupported kind of tokenizer.
    """
    from model.checkpoints.gguf import open_gguf

    fields = open_gguf(path).fields
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama") or "tokenizer.ggml.tokens" not in fields:
        raise UserError(f"{path}: tokenizer.ggml.model {kind!r} is not supported; give the model's own tokenizer.json")
    key = "tokenizer.chat_template"
    templates = {"default": fields[key]} if isinstance(fields.get(key), str) else {}
    named = {name.removeprefix(f"{key}."): text for name, text in fields.items() if name.startswith(f"{key}.")}
    templates |= {name: text for name, text in named.items() if isinstance(text, str)}
    template_text = "\0".join(templates.values())
    size = len(fields["tokenizer.ggml.tokens"])

    def token(name: str) -> int | None:
        value = fields.get(f"tokenizer.ggml.{name}_token_id")
        return int(value) if value is not None and 0 <= int(value) < size else None

    specials = {"bos": token("bos"), "eos": token("eos"), "pad": token("padding"), "unk": token("unknown")}
    # llama.cpp's default
    adds_bos = bool(fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or _pre(path, fields) in ADD_BOS))
    adds_bos = adds_bos and specials["bos"] is not None
    begin = specials["bos"] if adds_bos else None
    engine: Engine = (
        _sentencepiece(fields, template_text) if kind == "llama" else _byte_level(path, fields, begin, template_text)
    )
    ends = [i for name in ("eos", "eot", "eom") if (i := token(name)) is not None]
    return engine, specials, templates, adds_bos, ends


def _pre(path: Path, fields: dict[str, Any]) -> str:
    """The name of the pre-tokenizer."""
    pre = fields.get("tokenizer.ggml.pre")
    if not isinstance(pre, str):
        raise UserError(f"{path}: lacks tokenizer.ggml.pre, the name of the pre-tokenizer; convert the model again")
    return pre


def _byte_level(path: Path, fields: dict[str, Any], begin: int | None, templates: str) -> Engine:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces, merges = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.merges", [])
    kinds = fields.get("tokenizer.ggml.token_type", [1] * len(pieces))
    pre = _pre(path, fields)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=pre in ("llama-bpe", "llama3"),
        )
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in PATTERNS)
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif pre in PATTERNS:
        split = pre_tokenizers.Split(Regex(PATTERNS[pre]), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif pre == "gpt-2":
        tokenizer.pre_tokenizer = byte_level
    else:
        supported = ", ".join(("gpt-2", "smollm", *PATTERNS))
        raise UserError(
            f"{path}: pre-tokenizer {pre!r} is not supported (supported: {supported}); give the model's tokenizer.json"
        )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        found = [piece for piece, of in zip(pieces, kinds, strict=True) if of == kind]
        tokenizer.add_tokens([AddedToken(piece, special=special, normalized=False) for piece in found])
    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[pieces[begin], "$A"], special_tokens=[(pieces[begin], begin)]
        )
    return Fast(tokenizer.to_str(), str(path), templates=templates)


def _sentencepiece(fields: dict[str, Any], templates: str) -> Engine:
    """Build a SentencePiece model from pieces and scores: BPE, byte fallback, no normalizer, as llama.cpp assumes."""
    pieces, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    kinds = fields["tokenizer.ggml.token_type"]
    out = []
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        entry = protobuf.data(1, piece.encode()) + protobuf.tag(2, 5) + struct.pack("<f", score)
        out.append(protobuf.data(1, entry + protobuf.number(3, int(kind))))
    trainer = protobuf.number(3, 2) + protobuf.number(4, len(pieces))  # BPE; vocabulary size
    trainer += protobuf.number(35, 1)  # byte fallback
    for field, key, none in ((40, "unknown", 0), (41, "bos", 1), (42, "eos", 2), (43, "padding", -1)):
        trainer += protobuf.number(field, int(fields.get(f"tokenizer.ggml.{key}_token_id", none)))
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    normalizer = protobuf.data(1, b"identity") + protobuf.number(3, int(prefix))
    normalizer += protobuf.number(4, 0) + protobuf.number(5, 1)
    proto = b"".join(out) + protobuf.data(2, trainer) + protobuf.data(3, normalizer)
    return SentencePiece(proto, "tokenizer.model", templates=templates)
