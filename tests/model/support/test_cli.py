"""A mistake on the command line is one line that names it and the remedy, as every other mistake is."""

import errno
import io
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from model.support.cli import UserError, guard, parse, run


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


@dataclass(frozen=True)
class Paths:
    """A program with paths."""

    weights: str
    out: Path
    index: Path | None = None
    separator: str = ""


@pytest.mark.parametrize("empty", [["--weights", ""], ["--weights="], ["--out", ""], ["--out="], ["--index", ""]])
def test_an_empty_path_is_not_the_current_folder(empty):
    given = ["--weights", "w", "--out", ".", "--separator", ""]
    assert parse(Paths, given, "python -m x") == Paths("w", Path(), None, "")
    with pytest.raises(UserError, match=f"^{empty[0].strip('=')} is empty; give a path"):
        parse(Paths, [*given, *empty], "python -m x")
    with pytest.raises(UserError, match=f"^{empty[0].strip('=')} is empty; give a path"):
        parse(Paths | Options, ["paths", *given, *empty], "python -m x")  # commands


def test_a_number_that_no_count_reaches_is_refused_whatever_it_counts():
    assert parse(Options, ["--weights", "w", "--rank", str(2**62)], "python -m x").rank == 2**62
    with pytest.raises(UserError, match=f"^--rank is {2**70}; give a smaller number"):
        parse(Options, ["--weights", "w", "--rank", str(2**70)], "python -m x")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EACCES, "Permission denied", "a"), "a: Permission denied; ask its owner"),
        (OSError(errno.EISDIR, "Is a directory", ".a.x.part", None, "a"), "a: Is a directory; give the name of a file"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some, and give"),
        (OSError(errno.EIO, "Input/output error", "a"), "a: Input/output error\n"),
    ],
)
def test_an_error_of_the_system_names_the_path_and_a_simple_remedy(error, said, capsys):
    def body():
        raise error

    assert guard(body, "x") == 2
    assert capsys.readouterr().err.startswith(f"x: {said}")


def test_a_warning_is_one_line(capsys):
    guard(lambda: None, "x")
    assert warnings.formatwarning("a\nb", UserWarning, "f.py", 1) == "x: a b\n"


def of_a_program(body, **how):
    code = f"from model.support.cli import guard; raise SystemExit(guard(lambda: {body}, 'x'))"
    return subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, **how)


def test_a_character_that_stdout_cannot_write_is_escaped():
    program = of_a_program("print('2 µm')", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert program.communicate() == ("2 \\xb5m\n", "") and program.returncode == 0


def test_a_closed_pipe_ends_a_program_quietly():
    program = of_a_program("(input(), print('a'))[1]", stdin=-1)
    program.stdout.close()
    program.stdin.write("\n")
    program.stdin.close()
    assert program.stderr.read() == "" and program.wait() == 141
