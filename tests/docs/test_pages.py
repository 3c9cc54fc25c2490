"""What the pages name is there: files, links, programs, options and make's targets."""

import inspect
import re
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from eval.bench import gpu
from eval.robustness.__main__ import Canaries, Labels, Misspelling
from train.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[a-z]*/README.md"), *ROOT.glob("[a-z]*/*/README.md")]
)
PAGES = [page for page in PAGES if not {".venv", "runs"} & set(page.relative_to(ROOT).parts)]
PACKAGES = ("kernels", "model", "lora", "infer", "train", "eval")
PLACES = [ROOT, *(ROOT / package for package in PACKAGES)]


def fields_of(*kinds: type) -> set[str]:
    """Names of the dataclasses' fields; those of a nested one in its place."""
    found = [field for kind in kinds for field in fields(kind)]
    nested = {field.name: fields_of(type(field.default)) for field in found if is_dataclass(field.default)}
    return set().union({field.name for field in found} - nested.keys(), *nested.values())


@cache
def options(module: str, benchmark: str) -> set[str]:
    """The options of a program, as a command line spells them; `benchmark`: its first argument."""
    if (module, benchmark) == ("eval.bench", "gpu"):  # has argparse
        names = set(re.findall(r'"--([a-z-]+)"', inspect.getsource(gpu)))
    elif module == "eval.bench":
        names = {"json", "overwrite", *inspect.signature(import_module(f"eval.bench.{benchmark}").rows).parameters}
    elif module in ("train.pretrain", "train.instruct"):
        names = fields_of(Recipe)
    elif module == "eval.robustness":
        names = fields_of(Labels, Misspelling, Canaries)
    else:
        main = "" if (ROOT / module.replace(".", "/")).with_suffix(".py").is_file() else ".__main__"
        names = fields_of(import_module(module + main).Options)
    return {f"--{name.replace('_', '-')}" for name in names} | {"--help"}


def wrong_options(module: str, rest: str) -> set[str]:
    """The options of a command that its program has not."""
    named = set(re.findall(r"(?<!\S)\[?(--[a-z][\w-]*)", rest))
    return named - options(module, rest.split()[0].replace("-", "_")) if named else set()


def programs(text: str) -> list[tuple[str, str]]:
    """(module, its arguments) of each `-m` of ours."""
    text = text.replace("\\\n", " ")
    found = re.findall(rf" -m ((?:{'|'.join(PACKAGES)})[\w.]*)([^`\n;#)]*)", text)
    return [(module.rstrip("."), rest) for module, rest in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_and_their_options_are_there(page):
    for module, rest in programs(page.read_text(encoding="utf-8")):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
        assert not wrong_options(module, rest), (module, rest)


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
    commands = programs(
        "`python -m eval.score --predictions F --no-such-option`, `torchrun -m train.instruct R --grounded`"
    )
    assert [wrong_options(*command) for command in commands] == [{"--no-such-option"}, {"--grounded"}]
