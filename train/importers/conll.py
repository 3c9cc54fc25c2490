"""Makes question records of a named-entity corpus: `python -m train.importers.conll --iob F.tsv --out F.jsonl`.

The file has CoNLL's format: one token and its tag per line (first and last column, separated by tabs if the file has
any, else by spaces), a blank line between sentences, "-DOCSTART-" or "# newdoc" between documents; other lines that
begin with "#" are comments. Tags are IO, IOB1, BIO (IOB2), BIOES or BILOU, of any number of entity types. Three
consecutive sentences of a document make a record, with one question for each entity type of the file; the answer is all
mentions of that type, or "not relevant":

    {"id": "test-7", "text": "…", "questions": [{"question": "Which disease names are mentioned?",
     "answers": [{"text": "colorectal cancer", "start": 52, "end": 69}, …]}]}

Tokens are joined into text with spaces as in printed English; answers keep their spans in it. The records are for
train.instruct, infer.extract and eval.run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.support import cli as command
from model.support.cli import UserError
from model.support.files import read_text
from model.support.lock import output
from train.importers.record import Record, write

Token = tuple[str, str]
Sentence = list[Token]
TAG = re.compile(r"O|[BIESLU](-.+)?")
CLOSES, OPENS, TIGHT = set(",.;:!?)]}%"), set("([{$"), set("-/'’–")


@dataclass(frozen=True)
class Options:
    """Make question records from an IOB file."""

    iob: Path
    """File with one token and its tag per line and a blank line between sentences."""
    out: Path
    """JSON-lines file to write."""
    sentences: int = 3
    """Sentences per record."""
    limit: int = 0
    """Number of records to write, from the first (0: all)."""
    overwrite: bool = False
    """Replace an existing file."""

    def __post_init__(self) -> None:
        if self.sentences < 1 or self.limit < 0:
            raise UserError("--sentences must be at least 1 and --limit not negative")


def main(options: Options) -> None:
    with output(options.out, options.overwrite, options.iob):
        found = list(records(options.iob, options.sentences))
        write(found[: options.limit or None], options.out)


def records(path: Path, size: int = 3) -> Iterator[Record]:
    """Yields a question record for every `size` sentences of a document.

    Raises UserError, naming file and line, if the file is not IOB.
    """
    documents = read_iob(path)
    tags = {tag for sentences in documents for sentence in sentences for _, tag in sentence}
    types = sorted({tag[2:] or "entity" for tag in tags - {"O"}})
    if not types:
        raise UserError(f"{path}: marks no entity; the last column has to hold tags such as B-Disease, I-Disease and O")
    groups = (sentences[at : at + size] for sentences in documents for at in range(0, len(sentences), size))
    for number, sentences in enumerate(groups):
        text, spans = group(sentences)
        asked = []
        for kind in types:
            answers = [{"text": text[a:b], "start": a, "end": b} for a, b, of in spans if of == kind]
            asked.append({"question": question(kind), "answers": answers})
        yield {"id": f"{path.stem}-{number}", "text": text, "questions": asked}


def question(kind: str) -> str:
    return f"Which {kind.replace('_', ' ').lower()} names are mentioned?"


def read_iob(path: Path) -> list[list[Sentence]]:
    """The file's documents, each a list of sentences of (token, tag)."""
    lines = re.split(r"\r\n|\r|\n", read_text(path))  # not splitlines: a token may hold Unicode's other line separators
    tokens = [line for line in lines if line.strip(" \t") and not line.startswith(("#", "-DOCSTART-"))]
    tabs = any("\t" in line for line in tokens)

    def columns(line: str) -> list[str]:
        return [part.strip(" ") for part in line.split("\t")] if tabs else re.findall("[^ ]+", line)

    width = len(columns(tokens[0])) if tokens else 0
    documents: list[list[Sentence]] = [[[]]]
    for number, line in enumerate(lines, start=1):
        parts = columns(line)
        is_token = len(parts) == width >= 2 and TAG.fullmatch(parts[-1]) is not None and parts[0] != ""
        if line.startswith(("-DOCSTART-", "# newdoc")):
            documents.append([[]])
        elif not line.strip(" \t"):
            documents[-1].append([])
        elif is_token:
            documents[-1][-1].append((parts[0], parts[-1]))
        elif not line.startswith("#"):
            cause = f"{len(parts)} columns where the first token has {width}" if len(parts) != width else "no such tag"
            raise UserError(f"{path}:{number}: not a token and its tag ({cause}); tags are IO, BIO, BIOES or BILOU")
    return [[sentence for sentence in sentences if sentence] for sentences in documents]


def group(sentences: Sequence[Sequence[Token]]) -> tuple[str, list[tuple[int, int, str]]]:
    """Joins sentences. Returns (text, [(start, end, type), …] of its entities)."""
    text, spans = "", []
    for sentence in sentences:
        text += " " if text else ""
        offsets = []
        for (before, _), (token, _) in zip([("", ""), *sentence], sentence, strict=False):
            text += " " if before and spaced(before, token, text) else ""
            offsets.append((len(text), len(text) + len(token)))
            text += token
        for first, last, kind in entities([tag for _, tag in sentence]):
            spans.append((offsets[first][0], offsets[last][1], kind))
    return text, spans


def spaced(before: str, token: str, text: str) -> bool:
    """True if a space belongs between two tokens. A quotation mark opens if the text so far has an even number."""
    if token in CLOSES or before in OPENS:
        return False
    if '"' in (token, before):
        return text.count('"') % 2 == 0
    if before in TIGHT:
        return False
    return not (token in TIGHT or token.startswith("'"))


def entities(tags: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Yields (first, last, type) of each entity, in any of the schemes.

    B, S and U start an entity, and so does any tag after O, another type or an end (IO, IOB1); E, L, S and U end one.
    """
    first, kind = 0, ""
    for index, tag in enumerate([*tags, "O"]):
        prefix, tag_type = tag[0], "" if tag == "O" else tag[2:] or "entity"
        if kind and (prefix in "BSU" or tag_type != kind):
            yield first, index - 1, kind
            kind = ""
        if tag_type and not kind:
            first, kind = index, tag_type
        if kind and prefix in "ELSU":
            yield first, index, kind
            kind = ""


if __name__ == "__main__":
    command.run(main, Options)
