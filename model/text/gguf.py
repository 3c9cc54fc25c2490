"""The tokenizer inside a GGUF file: byte-level BPE ("gpt2") or SentencePiece's BPE ("llama").

The file lists pieces, merges or scores, and each piece's kind; how text is cut before merging is only named
(`tokenizer.ggml.pre`), so each name's rule is here as its model's own tokenizer.json has it.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from model.support.cli import UserError
from model.text import protobuf
from model.text.engines import LLAMA3, QWEN2, Engine, Fast, SentencePiece

CONTROL, USER_DEFINED = 3, 4  # kinds of piece; 1 normal, 2 unknown, 5 unused, 6 byte
PATTERNS = {"llama-bpe": LLAMA3, "llama3": LLAMA3, "qwen2": QWEN2}
BEGINS = ("llama-bpe", "llama3")  # cutting rules whose models begin with the begin token where the file is silent


def from_gguf(path: Path) -> tuple[Engine, dict[str, int | None], dict[str, str], bool, list[int]]:
    """(engine, special ids, chat templates by name, whether texts begin with the begin token, ids that end a turn).

    Raises UserError for kinds not covered.
    """
    from model.checkpoints.gguf import open_gguf

    fields = open_gguf(path).fields
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama") or "tokenizer.ggml.tokens" not in fields:
        raise UserError(f"{path}: a tokenizer of kind {kind!r} is not covered; give the model's own tokenizer.json")
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
    # llama.cpp's rule where the file is silent
    adds_bos = bool(fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or _rule(path, fields) in BEGINS))
    adds_bos = adds_bos and specials["bos"] is not None
    begin = specials["bos"] if adds_bos else None
    engine: Engine = (
        _sentencepiece(fields, template_text) if kind == "llama" else _byte_level(path, fields, begin, template_text)
    )
    ends = [i for name in ("eos", "eot", "eom") if (i := token(name)) is not None]
    return engine, specials, templates, adds_bos, ends


def _rule(path: Path, fields: dict[str, Any]) -> str:
    rule = fields.get("tokenizer.ggml.pre")
    if not isinstance(rule, str):
        raise UserError(f"{path}: tokenizer.ggml.pre is missing, so how a text is cut is not known; convert it again")
    return rule


def _byte_level(path: Path, fields: dict[str, Any], begin: int | None, templates: str) -> Engine:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces, merges = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.merges", [])
    kinds = fields.get("tokenizer.ggml.token_type", [1] * len(pieces))
    rule = _rule(path, fields)
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
    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[pieces[begin], "$A"], special_tokens=[(pieces[begin], begin)]
        )
    return Fast(tokenizer.to_str(), str(path), templates=templates)


def _sentencepiece(fields: dict[str, Any], templates: str) -> Engine:
    """The pieces and scores as a SentencePiece model: BPE, byte fallback, identity normaliser, as llama files mean."""
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
