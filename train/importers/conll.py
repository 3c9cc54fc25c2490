"""Questions from any named-entity corpus: `python -m train.importers.conll --iob F.tsv --out F.jsonl`.

The file is IOB (CoNLL): one token and its tag a line (first and last column), a blank line between sentences; IOB1,
IOB2 and files of several entity types are read. Three consecutive sentences make a record, and every entity type of
the file one question about it; the answer is all mentions of that type, or "not relevant" where there is none:

    {"id": "test-7", "text": "…", "questions": [{"question": "Which disease names are mentioned?",
     "answers": [{"text": "colorectal cancer", "start": 52, "end": 69}, …]}]}

Tokens are joined back into text by the rules of English print, and spans are kept. The records serve train.instruct
and infer.extract.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.support import cli as command
from model.support.cli import UserError
from model.support.files import check_not_read, write_jsonl
from model.support.lock import output

Token = tuple[str, str]
CLOSES, OPENS, TIGHT = set(",.;:!?)]}%"), set("([{$"), set("-/'’–")


@dataclass(frozen=True)
class Options:
    """Make question records of an IOB file."""

    iob: Path
    """One token and its tag a line, a blank line between sentences."""
    out: Path
    """JSON-lines file to write."""
    sentences: int = 3
    """Sentences a record."""
    limit: int = 0
    """Only the first records (0: all)."""
    overwrite: bool = False
    """Replace a file that is there."""

    def __post_init__(self) -> None:
        if self.sentences < 1 or self.limit < 0:
            raise UserError("--sentences must be at least 1 and --limit not negative")


def main(options: Options) -> None:
    check_not_read(options.out, options.iob)
    found = list(records(options.iob, options.sentences))
    found = found[: options.limit] if options.limit else found
    with output(options.out, options.overwrite):
        write_jsonl(options.out, found)
    mentions = [answer["text"] for record in found for asked in record["questions"] for answer in asked["answers"]]
    empty = sum(not asked["answers"] for record in found for asked in record["questions"])
    commas = sum("; " in text for text in mentions)
    print(f"{options.out}: {len(found)} records, {len(mentions)} mentions, {empty} questions not relevant; "
          f"{commas} mentions hold a semicolon, which divides answers")  # fmt: skip


def records(path: Path, size: int = 3) -> Iterator[dict[str, Any]]:
    """Question records of groups of `size` sentences. Raises UserError naming file and line for what is not IOB."""
    sentences = list(read_iob(path))
    types = sorted({tag[2:] or "entity" for sentence in sentences for _, tag in sentence if tag != "O"})
    if not types:
        raise UserError(f"{path}: marks no entity; the last column has to hold tags such as B-Disease, I-Disease and O")
    for number, start in enumerate(range(0, len(sentences), size)):
        text, spans = group(sentences[start : start + size])
        asked = []
        for kind in types:
            answers = [{"text": text[a:b], "start": a, "end": b} for a, b, of in spans if of == kind]
            asked.append({"question": question(kind), "answers": answers})
        yield {"id": f"{path.stem}-{number}", "text": text, "questions": asked}


def question(kind: str) -> str:
    return f"Which {kind.replace('_', ' ').lower()} names are mentioned?"


def read_iob(path: Path) -> Iterator[list[Token]]:
    """Sentences as (token, tag)."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    sentence: list[Token] = []
    for number, line in enumerate([*lines, ""], start=1):
        parts = line.split()
        if parts and parts[0] == "-DOCSTART-":
            continue
        if not parts:
            if sentence:
                yield sentence
            sentence = []
            continue
        if len(parts) < 2 or not (parts[-1] == "O" or parts[-1][:2] in ("B-", "I-", "B", "I")):
            raise UserError(f"{path}:{number}: not a token and its tag (O, B-TYPE or I-TYPE)")
        sentence.append((parts[0], parts[-1]))


def group(sentences: Sequence[Sequence[Token]]) -> tuple[str, list[tuple[int, int, str]]]:
    """(text, [(start, end, type), …]) of some sentences, joined by spaces."""
    text, spans = "", []
    for sentence in sentences:
        text += " " if text else ""
        places = []
        for (before, _), (token, _) in zip([("", ""), *sentence], sentence, strict=False):
            text += " " if before and spaced(before, token, text) else ""
            places.append((len(text), len(text) + len(token)))
            text += token
        for first, last, kind in entities([tag for _, tag in sentence]):
            spans.append((places[first][0], places[last][1], kind))
    return text, spans


def spaced(before: str, token: str, text: str) -> bool:
    """Whether print puts a space between two tokens. A quotation mark opens where an even number stand before it."""
    if token in CLOSES or before in OPENS:
        return False
    if '"' in (token, before):
        return text.count('"') % 2 == 0
    if before in TIGHT:
        return False
    return not (token in TIGHT or token.startswith("'"))


def entities(tags: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """(first, last, type) of each entity; an I- after another type or after O begins one (IOB1)."""
    first, kind = 0, ""
    for index, tag in enumerate([*tags, "O"]):
        now = "" if tag == "O" else tag[2:] or "entity"
        if kind and (tag.startswith("B") or now != kind):
            yield first, index - 1, kind
            kind = ""
        if now and not kind:
            first, kind = index, now


if __name__ == "__main__":
    command.run(main, Options)
