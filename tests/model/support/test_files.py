"""Writing takes nothing that is not ours: a file in a folder's place stays, a folder's other files are kept."""

import os

import pytest

from model.support.cli import UserError
from model.support.files import atomic_folder


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "notes.jsonl").write_text("all I have")
    with pytest.raises(UserError, match="notes.jsonl: a file is there"), atomic_folder(tmp_path / "notes.jsonl"):
        pass
    assert os.listdir(tmp_path) == ["notes.jsonl"] and (tmp_path / "notes.jsonl").read_text() == "all I have"


def test_a_folder_keeps_what_the_new_one_does_not_have(tmp_path):
    old = tmp_path / "model"
    (old / "plots").mkdir(parents=True)
    names = ("config.json", "README.md", "plots/loss.png")
    for name in names:
        (old / name).write_text("old")
    with atomic_folder(old, keep_others=True) as new:
        (new / "config.json").write_text("new")
    assert [(old / name).read_text() for name in names] == ["new", "old", "old"]
    assert os.listdir(tmp_path) == ["model"]


def test_nothing_is_changed_where_the_work_fails(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "model") as new:
        (new / "config.json").write_text(str(1 / 0))
    assert (tmp_path / "model" / "config.json").read_text() == "old" and os.listdir(tmp_path) == ["model"]
