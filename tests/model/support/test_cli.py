"""A mistake on the command line is one line that names it and the remedy, as every other mistake is."""

import io
import subprocess
import sys
from dataclasses import dataclass

import pytest

from model.support.cli import UserError, parse, run


@dataclass(frozen=True)
class Options:
    """A program."""

    weights: str
    """The model's folder, which is said at such length here that no terminal shows it on a line of its own,
    nor the source."""
    rank: int = 8
    """How many columns."""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--weights", "w", "--rnak", "1"], "Unrecognized options: --rnak, 1; Perhaps you meant: --rank INT"),
        (["--weights", "w", "--rank", "zero"], "Error parsing --rank: invalid literal for int() with base 10: 'zero'"),
        (["--weights"], "Missing value for argument '--weights'. Expected 1 values."),
        (["--rank", "2"], "Missing from python -m x: --weights STR"),
        (["--weights", "w", "y"], "Unrecognized options: y"),
    ],
)
@pytest.mark.parametrize(("columns", "encoding"), [("40", "ascii"), ("40", "utf-8"), ("200", "utf-8")])
def test_a_refused_command_line_is_one_line(argv, said, columns, encoding, monkeypatch, capsys):
    """However wide the terminal is, and whether or not it can draw a frame."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(UserError) as refused:
        parse(Options, argv, "python -m x")
    assert str(refused.value) == f"{said}; python -m x --help explains every option"
    with pytest.raises(SystemExit) as stop:
        run(lambda options: 0, Options, argv)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and sys.stdout.tell() == 0


def test_what_is_right_is_parsed_and_help_is_whole(capsys):
    assert parse(Options, ["--weights", "w", "--rank", "3"], "python -m x") == Options("w", 3)
    with pytest.raises(SystemExit) as stop:
        run(lambda options: 0, Options, ["--help"])
    assert stop.value.code in (0, None) and "How many columns." in capsys.readouterr().out


def test_a_benchmarks_command_line_too():
    done = subprocess.run([sys.executable, "-m", "eval.bench", "plan", "--onyl", "x"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("eval.bench: Unrecognized options: --onyl") and done.stderr.count("\n") == 1


def test_help_breaks_its_lines_where_the_terminal_does(monkeypatch, capsys):
    """And not where the source does."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        run(lambda options: 0, Options, ["--help"])
    assert "on a line of its own, nor the source." in capsys.readouterr().out
