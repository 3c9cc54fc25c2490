"""What the pages name is there: files, links, programs, options and make's targets."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[a-z]*/README.md"), *ROOT.glob("[a-z]*/*/README.md")]
)
PAGES = [page for page in PAGES if not {".venv", "runs"} & set(page.relative_to(ROOT).parts)]
PACKAGES = ("kernels", "model", "lora", "infer", "train", "eval")
PLACES = [ROOT, *(ROOT / package for package in PACKAGES)]


def annotated_names() -> set[str]:
    """Names of dataclass fields, parameters (eval.bench) and string options, as a command line spells them."""
    found = set()
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found.add("--" + node.target.id.replace("_", "-"))
                elif isinstance(node, ast.arg):
                    found.add("--" + node.arg.replace("_", "-"))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
                    found.add(node.value)
    return found | {"--help"}


OPTIONS = annotated_names()


def programs(text: str) -> list[tuple[str, str]]:
    """(module, what follows on the line) of each `python -m` of ours."""
    found = re.findall(rf"python -m ((?:{'|'.join(PACKAGES)})[\w.]*)([^`\n]*)", text)
    return [(module.rstrip("."), rest) for module, rest in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_and_their_options_are_there(page):
    for module, rest in programs(page.read_text(encoding="utf-8")):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
        missing = {option for option in re.findall(r"(?<!\S)\[?(--[a-z][\w-]*)", rest)} - OPTIONS
        assert not missing, f"{module}: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_are_there(page):
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#"))]
    wrong = [link for link in links if link and not (page.parent / link).exists()]
    named = re.findall(r"`([\w.-]+/[\w./-]+\.(?:py|toml|json|jsonl|tsv|svg|md))`", text)
    wrong += [name for name in named if not name.startswith("runs/") and not any((at / name).exists() for at in PLACES)]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_targets_are_makes(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    code = re.findall(r"`make ([a-z-]+)|^    make ([a-z-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {one or other for one, other in code} <= targets


def test_a_wrong_name_is_found():
    (module, rest), *_ = programs("`python -m eval.score --predictions F --no-such-option`")
    assert module == "eval.score"
    assert set(re.findall(r"(--[a-z][\w-]*)", rest)) - OPTIONS == {"--no-such-option"}
