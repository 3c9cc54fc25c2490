"""A job of infer.extract on a few small notes, for the tests of its records and of its files."""

import json
import sys
from pathlib import Path

from infer.extract.program import Options, main

SMALL = {"max_new_tokens": 6, "max_new_diagnosis": 9, "batch": 3}


def write_notes(path: Path, count: int = 8) -> Path:
    lines = [
        {"id": f"n{i}", "text": f"Tumor {i}.5 cm of the left breast" + " and more" * (i % 3)} for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answered(out: Path) -> list[dict]:
    """What a job that has not ended has answered so far."""
    parts = sorted(Path(f"{out}.parts").glob("*.jsonl"), key=lambda part: int(part.stem))
    return [record for part in parts for record in records(part)]


def write_parts(out: Path, lines: list[bytes], size: int = 3) -> Path:
    """Put lines in the place of what a job has answered, `size` an epoch; returns the folder."""
    folder = Path(f"{out}.parts")
    folder.mkdir()
    for epoch, start in enumerate(range(0, len(lines), size)):
        (folder / f"{epoch}.jsonl").write_bytes(b"".join(lines[start : start + size]))
    return folder


def extract(weights, notes, out, **options) -> int:
    return main(Options(weights=str(weights), notes=notes, out=out, form="template", **{**SMALL, **options}))


def command(weights, notes, out) -> list[str]:
    return [
        sys.executable,
        "-m",
        "infer.extract",
        "--weights",
        str(weights),
        "--notes",
        str(notes),
        "--out",
        str(out),
        "--form",
        "template",
        "--max-new-tokens",
        "6",
        "--max-new-diagnosis",
        "9",
        "--batch",
        "1",
    ]
