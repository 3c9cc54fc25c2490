"""The house stands as CONTRIBUTING.md says: imports go one way, packages are listed, names do not collide."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {
    "kernels": set(),
    "model": set(),
    "lora": {"model"},
    "infer": {"kernels", "model", "lora"},
    "train": {"kernels", "model", "lora", "infer"},
    "eval": {"kernels", "model", "lora", "infer", "train"},
}
FILES = [file for room in BELOW for file in sorted((ROOT / room).rglob("*.py"))]


def imported(text: str) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down_the_house_only(file):
    room = file.relative_to(ROOT).parts[0]
    above = (imported(file.read_text(encoding="utf-8")) & BELOW.keys()) - BELOW[room] - {room}
    assert not above, f"{room} may not import {', '.join(sorted(above))}"


def test_an_import_inside_a_function_counts():
    assert imported("def f():\n    from train.loop import Trainer\n    import model.config\n") == {"train", "model"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_is_one_idea(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, "more than 400 lines ask to be two files"


def test_every_package_is_listed_for_installation():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {".".join(file.parent.relative_to(ROOT).parts) for file in FILES if file.name == "__init__.py"}
    assert listed == there


def test_there_are_no_other_top_level_folders():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {name.split("/")[0] for name in listed.split("\n") if "/" in name}
    assert folders <= {*BELOW, "tests", ".ci", "docs"}


def test_no_package_reaches_for_triton_or_a_peer_when_it_is_imported():
    code = "import sys, kernels, model, lora, infer; print(sorted({'triton', 'transformers'} & sys.modules.keys()))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_transformers_can_be_imported_beside_our_kernels():
    code = "import kernels, transformers, transformers.integrations.hub_kernels; print(hasattr(kernels, '__version__'))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-500:]
    assert said.stdout.strip() == "False"


def test_the_distribution_is_outside_the_versions_that_transformers_would_take_for_its_kernels():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "cancerllm-reference"
    major, minor = (int(part) for part in project["version"].split(".")[:2])
    assert not (0, 18) <= (major, minor) < (0, 20)


def test_torch_is_pinned_in_the_constraints():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pins["torch"] == "2.13.0"
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values())
