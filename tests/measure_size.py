"""How large the repository is: the table of CONTRIBUTING.md (`make size`)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from draw_packages import IMPORTS, PACKAGES, ROOT
from test_core_size import CORE, lines_of_code

PAGE = ROOT / "CONTRIBUTING.md"


def lines(files: Iterable[Path]) -> int:
    return sum(file.read_text(encoding="utf-8").count("\n") for file in files)


def table() -> str:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.splitlines()]
    code = [file for file in files if file.suffix in (".py", ".js")]
    tests = [file for file in code if file.is_relative_to(ROOT / "tests")]
    core = {name: lines_of_code((ROOT / "model" / f"{name}.py").read_text(encoding="utf-8")) for name in CORE}
    rows = {
        "lines of code outside the tests (Python and JavaScript)": lines(set(code) - set(tests)),
        "of these Python without blank lines, comments and docstrings": sum(
            lines_of_code(file.read_text(encoding="utf-8")) for file in set(code) - set(tests) if file.suffix == ".py"
        ),
        **{f"of these in {name}/": lines(f for f in code if f.is_relative_to(ROOT / name)) for name in PACKAGES},
        "of these in the core (six files of model/), without blank lines, comments and docstrings": sum(core.values()),
        "lines of compiled facts (kernels/proof/facts.json)": lines([ROOT / "kernels" / "proof" / "facts.json"]),
        "lines of tests": lines(tests),
        "wordings of the synthetic notes (train/clinic/*.toml), lines": lines(ROOT.glob("train/clinic/*.toml")),
        "files of Python outside the tests; imports between them; circles": f"{len(IMPORTS)}; "
        f"{sum(map(len, IMPORTS.values()))}; 0 (tests/test_structure.py)",
        "size of a checkout, MB": round(sum(file.stat().st_size for file in files) / 1e6, 1),
    }
    return "\n".join(["| what | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    written, count = re.subn(r"(<!-- size -->\n).*(\n<!-- /size -->)", rf"\g<1>{table()}\g<2>", page, flags=re.S)
    assert count == 1, f"{PAGE} lacks the place of the table"
    PAGE.write_text(written, encoding="utf-8")
    print(table())
