"""Trains a SentencePiece tokenizer like Mistral's on JSON-lines texts: BPE, byte fallback, identity normaliser.

    python -m train.data.tokenizer --texts general.jsonl pretrain.jsonl --vocab 2048 --out tokenizer/

Each digit is a piece, as in Mistral's tokenizer. With `--no-split-digits` "2.5" may become one piece, which a very
small model copies more easily; an unseen number is then spelled with several pieces. The same texts and options give
the same file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infer import tasks
from model.support.cli import UserError, run
from model.support.files import atomic_folder, read_jsonl, write_json
from model.support.lock import output

SPECIAL = 3 + 256  # UNK, BOS, EOS, and one piece per byte


@dataclass(frozen=True)
class Options:
    """Train a SentencePiece tokenizer (BPE, byte fallback, identity normaliser) on the "text" of JSON-lines files."""

    texts: tuple[str, ...]
    """JSON-lines files whose records have a "text"."""
    out: str
    """Folder for tokenizer.model and tokenizer_config.json."""
    vocab: int = 2048
    """Number of pieces, including the 259 special and byte pieces."""
    split_digits: bool = True
    """Make each digit a piece of its own."""
    overwrite: bool = False
    """Replace an existing tokenizer."""


def texts_of(files: tuple[str, ...]) -> Iterator[str]:
    """Yields the non-blank lines of all texts."""
    for file in files:
        for _, record in read_jsonl(file, ("text",)):
            yield from (line for line in record["text"].splitlines() if line.strip())


def template_lines() -> list[str]:
    """Lines of the task template: trained on too, so that questions are not spelled letter by letter."""
    asked = [*(phenotype.question for phenotype in tasks.PHENOTYPES.values()), tasks.DIAGNOSIS_QUESTION]
    lines = [line for question in asked for line in tasks.branch(question).splitlines()]
    return [tasks.NOTE.rstrip(), *(line + tasks.answer([]) * line.endswith("Answer:") for line in lines)]


def train_tokenizer(options: Options) -> Path:
    """Writes the tokenizer's folder. Raises UserError for bad input files or an impossible vocabulary size."""
    import sentencepiece

    if options.vocab <= SPECIAL:
        raise UserError(f"--vocab {options.vocab}: {SPECIAL} pieces are special or bytes; give more")
    lines = list(texts_of(options.texts))
    lines += template_lines() * (len(lines) // 200 + 1)
    longest = max(len(line.encode()) for line in lines)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=options.vocab,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=options.split_digits,
            split_by_number=options.split_digits,
            character_coverage=0.9999,
            required_chars="#?",
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            max_sentence_length=max(longest + 1, 4192),
            minloglevel=2,
        )
    except RuntimeError as error:  # the message begins with source lines of SentencePiece: keep the last part
        reason = str(error).rpartition("] ")[2] or "the texts cannot be used"
        raise UserError(f"--vocab {options.vocab}: SentencePiece says: {reason}") from error
    with atomic_folder(options.out, keep_others=True) as folder:
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        write_json(folder / "tokenizer_config.json", {**names, "add_bos_token": True, "add_eos_token": False})
    return Path(options.out)


def main(options: Options) -> int:
    with output(options.out, options.overwrite):
        print(train_tokenizer(options))
    return 0


if __name__ == "__main__":
    run(main, Options)
