"""The packages are as CONTRIBUTING.md says: imports go one way, without circles; names do not collide."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter

from draw_packages import FILES, IMPORTS, ROOT, draw, imported

BELOW = {
    "kernels": set(),
    "model": set(),
    "lora": {"model"},
    "infer": {"kernels", "model", "lora"},
    "train": {"kernels", "model", "lora", "infer"},
    "eval": {"kernels", "model", "lora", "infer", "train"},
}


def test_packages_import_only_packages_below_them():
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in sorted(others)
        if (below := other.split(".")[0]) != (package := name.split(".")[0]) and below not in BELOW[package]
    ]
    assert not wrong


def test_files_do_not_import_one_another_in_a_circle():
    order = TopologicalSorter({name: others - {name} for name, others in IMPORTS.items()})
    try:
        order.prepare()
    except CycleError as circle:
        raise AssertionError(" -> ".join(circle.args[1])) from None


def test_an_import_inside_a_function_counts():
    text = "def f():\n    from train.loop import Trainer\n    import model.config\n    from lora import layer\n"
    assert imported(text, ["train.loop", "model.config", "lora", "lora.layer"]) == {
        "train.loop",
        "model.config",
        "lora.layer",
    }


def test_the_drawing_of_the_packages_is_of_these_imports():
    kept = (ROOT / "docs" / "packages.svg").read_text(encoding="utf-8")
    assert kept == draw(), "docs/packages.svg shows other imports: make drawing (python tests/draw_packages.py)"


def test_every_package_is_listed_for_installation():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert listed == {name for name, file in FILES.items() if file.name == "__init__.py"}


def test_there_are_no_other_top_level_folders():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {name.split("/")[0] for name in listed.split("\n") if "/" in name}
    assert folders <= {*BELOW, "tests", ".ci", "docs"}


def test_no_package_reaches_for_triton_or_a_peer_when_it_is_imported():
    code = "import sys, kernels, model, lora, infer; print(sorted({'triton', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_transformers_can_be_imported_beside_our_kernels():
    code = "import kernels, transformers, transformers.integrations.hub_kernels; print(hasattr(kernels, '__version__'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.strip() == "False"


def test_the_distribution_is_outside_the_versions_that_transformers_would_take_for_its_kernels():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "cancerllm-reference"
    major, minor = (int(part) for part in project["version"].split(".")[:2])
    assert not (0, 18) <= (major, minor) < (0, 20)


HELPS = """
import runpy, sys
for name in ("infer.extract", "infer.generate", "infer.quick", "infer.serve", "infer.view"):
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert end.code == 0, name
    assert "torch" not in sys.modules, name
"""


def test_help_and_a_mistake_in_the_options_load_no_torch():
    subprocess.run([sys.executable, "-c", HELPS], cwd=ROOT, check=True, capture_output=True)
