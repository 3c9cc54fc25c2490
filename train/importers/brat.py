"""Makes records of brat's standoff files: `python -m train.importers.brat --folder DIR --out my.jsonl`.

Every NAME.txt with a NAME.ann, in sub-folders too, becomes one record. Entities ("T1<TAB>TumorSize 19 25<TAB>2.5 cm")
become answers. Their type is a phenotype's name in any spelling (tumor_size, TumorSize), or is mapped: `--types
Size=tumor_size Dx=diagnosis`. Every phenotype that is annotated anywhere in the folder is asked of every text, with the
answer "not relevant" where a text has none. Of several diagnoses in a text the first is asked for; the others are kept
as `further_diagnoses`. The parts of a discontinuous entity are joined by spaces; if other text lies between them, the
answer has `fragments`, [[start, end], …]. Other annotations (relations, events, attributes, notes) are only counted.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from infer.extract.notes import kinds, listed
from model.support import cli as command
from model.support.cli import UserError
from model.support.files import read_text
from model.support.lock import output
from train.importers.record import Record, diagnosis, label, write

_ENTITY = re.compile(r"(T\d+)\t(\S+) (\d{1,12} \d{1,12}(?:;\d{1,12} \d{1,12})*)\t(.*)")
OTHER = "annotations that are not entities, not read"
LINE_ENDS = r"texts whose offsets count \r\n as one character: their records have \n"
MARK = "texts whose offsets do not count the byte order mark"


@dataclass(frozen=True)
class Options:
    """Make records from a folder of brat annotations."""

    folder: Path
    """Folder with NAME.txt and NAME.ann, in sub-folders too."""
    out: Path
    """JSON-lines file to write."""
    types: tuple[str, ...] = ()
    """Meaning of entity types: TYPE=phenotype, TYPE=diagnosis, or TYPE= to ignore a type."""
    overwrite: bool = False
    """Replace an existing file."""

    def __post_init__(self) -> None:
        for pair in self.types:
            if "=" not in pair:
                raise UserError(f"--types {pair}: write TYPE=phenotype")


@dataclass(frozen=True)
class Entity:
    """An entity of an .ann file; `where` is its file and line, for error messages."""

    where: str
    name: str
    type: str
    spans: tuple[tuple[int, int], ...]
    text: str

    def fits(self, note: str) -> bool:
        """True if the note has the entity's words at its offsets."""
        inside = all(0 <= start < end <= len(note) for start, end in self.spans)
        return inside and self.words(note) == self.text.split()

    def words(self, note: str) -> list[str]:
        return " ".join(note[start:end] for start, end in self.spans).split()

    def answer(self, note: str) -> Record:
        words, start, end = self.words(note), self.spans[0][0], self.spans[-1][1]
        if words == note[start:end].split():
            return {"text": " ".join(words), "start": start, "end": end}
        return {"text": " ".join(words), "start": None, "end": None, "fragments": [list(span) for span in self.spans]}


def entities(path: Path, notices: Counter[str]) -> list[Entity]:
    """The entities of an .ann file in order of their offsets; other lines are counted in `notices`."""
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.startswith("T"):
            notices[OTHER] += bool(line.strip())
            continue
        match = _ENTITY.fullmatch(line.rstrip())
        if match is None:
            raise UserError(f"{path}:{number}: not an entity; brat writes ID<TAB>TYPE START END<TAB>TEXT")
        spans = tuple((int(start), int(end)) for start, end in (part.split() for part in match[3].split(";")))
        found.append(Entity(f"{path}:{number}", match[1], match[2], spans, match[4]))
    return sorted(found, key=lambda entity: entity.spans)


def annotated_text(path: Path, found: list[Entity], notices: Counter[str]) -> str:
    """The text that the offsets refer to: the file unchanged, with "\\n" for "\\r\\n", or without byte order mark."""
    raw = read_text(path, keep_mark=True)
    unix = raw.replace("\r\n", "\n")
    for text in (raw, unix, raw.removeprefix("\ufeff"), unix.removeprefix("\ufeff")):
        if all(entity.fits(text) for entity in found):
            notices[LINE_ENDS] += text.count("\r") < raw.count("\r")
            notices[MARK] += raw[:1] == "\ufeff" != text[:1]
            return text
    misfit = next(entity for entity in found if not entity.fits(raw))
    raise UserError(f"{misfit.where}: {misfit.name} is not the text at its offsets; is {path} what was annotated?")


def pairs(folder: Path) -> tuple[list[tuple[Path, Path]], dict[str, list[str]]]:
    """([(.txt, .ann), …] of every name that has both, names of the folder's other files by kind)."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    visible = [path for path in files if path.name[0] != "."]
    texts = {path.with_suffix(""): path for path in visible if path.suffix.lower() == ".txt"}
    annotations = {path.with_suffix(""): path for path in visible if path.suffix.lower() == ".ann"}
    both = [(path, annotations[name]) for name, path in texts.items() if name in annotations]
    groups = {
        "texts without an .ann": [path.name for name, path in texts.items() if name not in annotations],
        "annotations without a .txt": [path.name for name, path in annotations.items() if name not in texts],
    }
    used = {*texts.values(), *annotations.values()}
    groups |= kinds(path for path in files if path not in used)
    return both, {kind: names for kind, names in groups.items() if names}


def records(folder: Path, types: dict[str, str], notices: Counter[str] | None = None) -> list[Record]:
    """One record per text, in the order of their names; `notices` counts what was not read or was read differently.

    Raises UserError, naming file and line, for malformed annotations and unknown types.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    both, _ = pairs(folder)
    if not both:
        raise UserError(f"{folder}: holds no NAME.txt with a NAME.ann beside it")
    types = {name: label(kind, f"--types {name}={kind}") if kind else "" for name, kind in types.items()}
    notices = Counter() if notices is None else notices
    found = []
    for text_path, ann_path in both:
        marked = entities(ann_path, notices)
        text = annotated_text(text_path, marked, notices)
        name = text_path.relative_to(folder).with_suffix("").as_posix()
        record: Record = {"id": name, "patient": name, "style": "", "text": text, "phenotypes": {}}
        for entity in marked:
            add_answer(record, entity, types)
        found.append(record)
    asked = sorted({name for record in found for name in record["phenotypes"]})
    for record in found:
        record["phenotypes"] = {name: record["phenotypes"].get(name, []) for name in asked}
    return found


def add_answer(record: Record, entity: Entity, types: dict[str, str]) -> None:
    """Adds an entity to its record, as a diagnosis or as an answer of its phenotype (once per text)."""
    kind = types.get(entity.type)
    if kind is None:
        spelled = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", entity.type)
        kind = label(spelled, f"{entity.where} (or say what it is: --types {entity.type}=…)")
    answer = entity.answer(record["text"])
    if kind == "diagnosis":
        code = diagnosis(answer["text"], f"{entity.where} (or ignore its type: --types {entity.type}=)")
        if record.setdefault("diagnosis", code) != code:
            record.setdefault("further_diagnoses", []).append(code)
    elif kind:
        answers = record["phenotypes"].setdefault(kind, [])
        if answer["text"] not in [other["text"] for other in answers]:
            answers.append(answer)


def main(options: Options) -> None:
    notices: Counter[str] = Counter()
    read = (path for path in options.folder.rglob("*") if path.suffix.lower() in (".txt", ".ann"))
    with output(options.out, options.overwrite, *read):
        made = records(options.folder, dict(pair.split("=", 1) for pair in options.types), notices)
        rest = listed(pairs(options.folder)[1])
        write(made, options.out, notices, rest and f"not read: {rest}")


if __name__ == "__main__":
    command.run(main, Options)
