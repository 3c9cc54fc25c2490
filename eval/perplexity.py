"""Perplexity and bits per byte of a text:

    python -m eval.perplexity --weights DIR [--adapter DIR] --text F.jsonl|F.txt

Perplexity is per token and so depends on the tokenizer; bits per byte (the same −log2 p divided by the text's UTF-8
bytes) can be compared between tokenizers. With an adapter both figures are given without and with it, that is before
and after continued pre-training.

    100 tokens of mean loss 2.0 nats over 420 bytes: perplexity e^2 = 7.39, bits per byte 100 · 2.0 / ln 2 / 420 = 0.687

Every document starts with the begin token and is split into windows of 1,024 tokens that overlap by half, so that each
token after the first window has at least half a window of context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch.nn import functional
from tqdm import tqdm

from lora import load_adapter, no_adapter
from lora.origin import check_origin
from model import Tokenizer, Transformer
from model.support.cli import UserError, run
from model.support.files import read_jsonl, read_text, write_json
from model.support.lock import output


@dataclass(frozen=True)
class Options:
    """Measure how well a model predicts a text."""

    weights: Path
    """The model's folder or GGUF file."""
    text: Path
    """JSON lines with a field "text", or a plain text file (one document)."""
    adapter: Path | None = None
    """A LoRA adapter's folder; the figures are then given without and with it."""
    documents: int = 0
    """Read only the first N documents (0: all)."""
    out: Path | None = None
    """Write the figures to this file, as JSON."""
    overwrite: bool = False
    """Replace an existing file."""

    def __post_init__(self) -> None:
        if self.documents < 0:
            raise UserError(f"--documents {self.documents}: 0 or more")


@dataclass(frozen=True)
class Result:
    """Sums over documents. `tokens` counts predicted tokens; without a begin token a document's first is not one."""

    documents: int
    tokens: int
    bytes: int
    nats: float
    perplexity: float
    bits_per_byte: float


def windows(length: int, block: int) -> Iterator[tuple[int, int, int]]:
    """Windows (start, first scored, end) that score each of a document's tokens 1 … length − 1 once.

    >>> list(windows(7, 4))
    [(0, 1, 4), (2, 4, 6), (4, 6, 7)]
    """
    scored, start = 1, 0
    while scored < length:
        end = min(start + block, length)
        yield start, scored, end
        scored, start = end, start + max(1, block // 2)


@torch.no_grad()
def measure(model: Transformer, tokenizer: Tokenizer, texts: Iterable[str], block: int = 1024) -> Result:
    """Perplexity and bits per byte of documents under a model. Raises UserError if there is no token to predict."""
    nats, tokens, size, documents = 0.0, 0, 0, 0
    for text in texts:
        ids = tokenizer.encode(text, bos=True)
        documents += 1
        size += len(text.encode("utf-8"))
        for start, scored, end in windows(len(ids), block):
            tokens_BT = torch.tensor([ids[start:end]], device=model.device)
            logits_TV = model(tokens_BT)[0, scored - start - 1 : -1].double()
            nats += float(functional.cross_entropy(logits_TV, tokens_BT[0, scored - start :], reduction="sum"))
            tokens += end - scored
    if not tokens:
        raise UserError("no token to predict: the text is empty or one token long")
    return Result(documents, tokens, size, nats, math.exp(min(700.0, nats / tokens)), nats / math.log(2) / size)


def read_texts(path: Path, limit: int = 0) -> list[str]:
    """The "text" fields of a .jsonl file (at most `limit`; 0: all), or a text file as one document."""
    if path.suffix != ".jsonl":
        return [read_text(path, keep_mark=True)]
    return [record["text"] for _, record in islice(read_jsonl(path, ("text",)), limit or None)]


def main(options: Options) -> None:
    texts = read_texts(options.text, options.documents)
    if options.adapter is not None:
        check_origin(options.weights, [options.adapter])
    with output(options.out, options.overwrite, options.text):
        results = figures(options, texts)
        if options.out is not None:
            write_json(options.out, {name: asdict(one) for name, one in results.items()})
    for name, one in results.items():
        print(
            f"{name:<8} perplexity {one.perplexity:.3f}  bits per byte {one.bits_per_byte:.4f}  "
            f"({one.documents} documents, {one.tokens} tokens, {one.bytes} bytes)"
        )


def figures(options: Options, texts: list[str]) -> dict[str, Result]:
    """The results for "weights"; with an adapter, for the model "before" and "after" it."""
    model, tokenizer = Transformer.from_pretrained(options.weights), Tokenizer.from_pretrained(options.weights)

    def measured(name: str) -> Result:
        return measure(model, tokenizer, tqdm(texts, desc=name, unit="document", disable=None))

    if options.adapter is None:
        return {"weights": measured("weights")}
    load_adapter(model, options.adapter)
    with no_adapter(model):
        before = measured("before")
    return {"before": before, "after": measured("after")}


if __name__ == "__main__":
    run(main, Options)
