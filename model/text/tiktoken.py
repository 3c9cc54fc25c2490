"""Convert `qwen.tiktoken`, the tokenizer of Qwen-7B's first version, to a tokenizer.json.

Each line is a piece in base64 and its rank. BPE by ranks repeatedly joins the adjacent pair whose joined piece has the
lowest rank; the tokenizers library needs the pairs. The pair of a piece is found by encoding it with the lower ranks
only, which leaves exactly two parts.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from model.support.cli import UserError
from model.support.files import read_json
from model.text.engines import QWEN2, Fast, byte_letters
from model.text.tokenizer import Tokenizer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))

# The format of the chat model's own code; its files contain no template.
CHAT = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def open_qwen(folder: Path) -> Tokenizer:
    """The tokenizer of a Qwen-7B folder; it has a chat template if generation_config.json says chatml."""
    path, settings = folder / "qwen.tiktoken", folder / "generation_config.json"
    engine = Fast(tokenizer_json(path), str(path))
    chats = settings.is_file() and read_json(settings).get("chat_format") == "chatml"
    ends = [engine.controls["<|im_end|>"]] if chats else []
    end = engine.special("<|endoftext|>")
    return Tokenizer(engine, {"eos": end, "pad": end}, {"default": CHAT} if chats else {}, stops=ends)


def tokenizer_json(path: Path) -> str:
    """The content of an equivalent tokenizer.json. Raises UserError for a corrupt file."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    ranks = read_ranks(path)
    letters = byte_letters()
    texts = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    merges = []
    for piece, rank in ranks.items():
        if len(piece) > 1:
            parts = encode_by_rank(ranks, piece, rank)
            if len(parts) != 2:
                raise UserError(f"{path}: the piece of rank {rank} is not a pair of earlier ones; the file is corrupt")
            merges.append((texts[parts[0]], texts[parts[1]]))
    tokenizer = Tokenizer(models.BPE(vocab={texts[piece]: rank for piece, rank in ranks.items()}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(QWEN2), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIALS])
    return tokenizer.to_str()


def read_ranks(path: Path) -> dict[bytes, int]:
    """{piece: rank} in order of rank. Raises UserError unless ranks run from 0 without gaps and cover all bytes."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(f"{path}:{number}: not a piece in base64 and its rank; the file is corrupt") from error
    if list(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(f"{path}: ranks do not run from 0 without gaps, or a byte is missing; the file is corrupt")
    return ranks


def encode_by_rank(ranks: dict[bytes, int], piece: bytes, below: int) -> list[bytes]:
    """BPE of `piece` with the pieces of rank lower than `below`."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 1:
        joined = [ranks.get(a + b, below) for a, b in zip(parts, parts[1:], strict=False)]
        lowest = min(joined)
        if lowest >= below:
            break
        at = joined.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
