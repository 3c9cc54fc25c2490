"""Your own labelled set from brat's standoff files: `python -m train.importers.brat --folder DIR --out my.jsonl`.

Every NAME.txt with its NAME.ann makes one record. Entities ("T1<TAB>TumorSize 19 25<TAB>2.5 cm") are answers; their
type is a phenotype's name in any spelling (tumor_size, TumorSize) or is mapped: `--types Size=tumor_size Dx=diagnosis`.
Every phenotype that is annotated anywhere in the folder is asked of every text: where a text has none of it, the answer
is "not relevant". Of several diagnoses in a text the first is asked for, the others are kept beside it. A discontinuous
entity gives its parts joined by spaces. Relations, events, attributes and notes are passed over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.support import cli as command
from model.support.cli import UserError
from model.support.files import check_not_read, write_jsonl
from model.support.lock import output
from train.importers.table import diagnosis, label, remarks

_ENTITY = re.compile(r"(T\d+)\t(\S+) (\d+ \d+(?:;\d+ \d+)*)\t(.*)")


@dataclass(frozen=True)
class Options:
    """Make records of a folder of brat annotations."""

    folder: Path
    """Folder that holds NAME.txt and NAME.ann."""
    out: Path
    """JSON-lines file to write."""
    types: tuple[str, ...] = ()
    """Entity types and what they are, as TYPE=phenotype, TYPE=diagnosis, or TYPE= to pass a type over."""
    overwrite: bool = False
    """Replace a file that is there."""

    def __post_init__(self) -> None:
        for pair in self.types:
            if "=" not in pair:
                raise UserError(f"--types {pair}: write TYPE=phenotype")


def read(path: Path) -> str:
    """A file's text as it is: offsets count every character, "\\r" too."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def entities(path: Path, text: str, types: dict[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """(phenotype or diagnosis, {"text", "start", "end"}) of an .ann file, in the text's order."""
    found = []
    for number, line in enumerate(read(path).removeprefix("\ufeff").split("\n"), 1):
        where = f"{path}:{number}"
        if not line.startswith("T"):
            continue
        match = _ENTITY.fullmatch(line.rstrip())
        if match is None:
            raise UserError(f"{where}: not an entity; brat writes ID<TAB>TYPE START END<TAB>TEXT")
        spans = [tuple(map(int, part.split())) for part in match[3].split(";")]
        said = " ".join(text[start:end] for start, end in spans)
        if any(not 0 <= start < end <= len(text) for start, end in spans) or said.split() != match[4].split():
            raise UserError(f"{where}: {match[1]} does not stand at its offsets; is this the .txt that was annotated?")
        kind = types.get(match[2])
        if kind is None:
            kind = label(
                re.sub(r"(?<=[a-z])(?=[A-Z])", "_", match[2]), f"{where} (or say what it is: --types {match[2]}=…)"
            )
        if kind:
            found.append((kind, {"text": " ".join(said.split()), "start": spans[0][0], "end": spans[-1][1]}))
    return sorted(found, key=lambda item: item[1]["start"])


def records(folder: Path, types: dict[str, str]) -> list[dict[str, Any]]:
    """One record a text, in the order of their names."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    pairs = [
        (path, path.with_suffix(".ann")) for path in sorted(folder.glob("*.txt")) if path.with_suffix(".ann").exists()
    ]
    if not pairs:
        raise UserError(f"{folder}: holds no NAME.txt with a NAME.ann beside it")
    types = {name: label(kind, f"--types {name}={kind}") if kind else "" for name, kind in types.items()}
    made, asked = [], set()
    for text_path, ann_path in pairs:
        text = read(text_path)
        record: dict[str, Any] = {
            "id": text_path.stem,
            "patient": text_path.stem,
            "style": "",
            "text": text,
            "phenotypes": {},
        }
        for kind, one in entities(ann_path, text, types):
            if kind == "diagnosis":
                found = diagnosis(one["text"], str(ann_path))
                if record.setdefault("diagnosis", found) != found:
                    record.setdefault("further_diagnoses", []).append(found)
                continue
            asked.add(kind)
            given = record["phenotypes"].setdefault(kind, [])
            if one["text"] not in [other["text"] for other in given]:
                given.append(one)
        made.append(record)
    for record in made:
        record["phenotypes"] = {name: record["phenotypes"].get(name, []) for name in sorted(asked)}
    return made


def main(options: Options) -> None:
    check_not_read(options.out, *options.folder.glob("*.txt"), *options.folder.glob("*.ann"))
    made = records(options.folder, dict(pair.split("=", 1) for pair in options.types))
    with output(options.out, options.overwrite):
        write_jsonl(options.out, made)
    print(f"{options.out}: {remarks(made)}")


if __name__ == "__main__":
    command.run(main, Options)
