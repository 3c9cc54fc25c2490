"""Command lines: a user's mistake is reported in one line on stderr, with exit code 2.

A program is a frozen dataclass of options (each with a docstring, which becomes its `--help`) and a function that
takes it and returns an exit code: 0 or None for success, 1 for a failed check. A user's mistake raises `UserError`;
any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

Options = TypeVar("Options")
TORCHRUN_SECONDS = 10  # within which torchrun ends the other ranks after one failed
REMEDIES = {
    errno.EACCES: "ask its owner for the permission, or give another",
    errno.EEXIST: "give another name",
    errno.EISDIR: "give the name of a file",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOSPC: "free some, and give the same command again",
    errno.ENOTDIR: "give another name",
    errno.ELOOP: "it is a link to itself; give another",
}


class UserError(ValueError):
    """A mistake that the user can correct. The message says what is wrong, where, and what to do, on one line.

    It never quotes a note, which is patient data: it names the file, the line or the record's id.
    """


def one_line(error: BaseException) -> str:
    """The error's message on one line."""
    said = str(error)
    if isinstance(error, OSError) and error.strerror:  # str(error) would have the error's number, and no remedy
        path, remedy = error.filename2 or error.filename, REMEDIES.get(error.errno or 0)
        said = (f"{path}: " if path else "") + error.strerror + (f"; {remedy}" if remedy else "")
    return " ".join(said.split()) or type(error).__name__


def run(main: Callable[[Options], int | None], options_type: type[Options], argv: Sequence[str] | None = None) -> None:
    """Parse the command line into `options_type`, call `main` with it, and exit with its code.

    Always raises SystemExit: 0 on success, 1 on a failed check, 2 on bad usage or bad input, 130 on Ctrl-C.
    """
    from tyro.conf import OmitArgPrefixes

    program = sys.modules["__main__"].__spec__
    name = program.name.removesuffix(".__main__") if program is not None else os.path.basename(sys.argv[0])
    prog = f"python -m {name}"
    is_rank0 = os.environ.get("LOCAL_RANK", "0") == "0"

    def body() -> int | None:
        options = None
        try:
            options = parse(options_type, argv, prog, config=(OmitArgPrefixes,), console_outputs=is_rank0)
            return main(options)
        except (UserError, OSError):
            if not is_rank0:
                time.sleep(TORCHRUN_SECONDS)  # rank 0 reports the error, and torchrun ends the other ranks
                if options is None:  # the command line is wrong, which rank 0 has reported
                    return 2
            raise

    raise SystemExit(guard(body, name))


def parse(kind: Callable[..., Options], argv: Sequence[str] | None, prog: str, **how: Any) -> Options:
    """Parse the command line with tyro (`how`: options of `tyro.cli`). Raises UserError if tyro refuses it."""
    import tyro

    check_paths(kind, sys.argv[1:] if argv is None else argv)
    if isinstance(kind, type):
        join_help_lines(kind)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            options = tyro.cli(kind, prog=prog, args=argv, **how)
    except SystemExit as stop:
        if stop.code != 2:
            raise
        raise UserError(f"{unboxed(captured.getvalue())}; {prog} --help explains every option") from None
    sys.stderr.write(captured.getvalue())
    for name, value in getattr(options, "__dict__", {}).items():
        if isinstance(value, int) and abs(value) > 2**62:
            raise UserError(f"--{name.replace('_', '-')} is {value}; give a smaller number")
    return options


def check_paths(kind: Callable[..., Any], argv: Sequence[str]) -> None:
    """Raise UserError if an option's path is empty: `Path("")` would be the current folder."""
    kinds = get_args(kind) or (kind,)  # of a union, a command each
    hints = {name: hint for one in kinds for name, hint in get_type_hints(one).items()}
    words = (word for argument in argv for word in (argument.split("=", 1) if argument[:2] == "--" else [argument]))
    for option, value in itertools.pairwise(words):
        name = option[2:].replace("-", "_")
        optional = any(hasattr(one, name) for one in kinds)
        needed = name in ("weights", "adapter", "out") and not optional  # a path that is kept as a text
        if not value and (hints.get(name) in (Path, Path | None) or needed):
            raise UserError(f"{option} is empty; give a path (. is the current folder)")


@cache
def join_help_lines(kind: type) -> None:
    """Give every option its docstring as one paragraph: tyro keeps the line breaks of an indented one."""
    import docstring_parser
    from tyro.conf import arg

    for cls in kind.__mro__:
        annotations = cls.__dict__.get("__annotations__")
        if annotations:
            hints = get_type_hints(cls, include_extras=True)
            for option in docstring_parser.parse_from_object(cls).params:
                paragraph = " ".join((option.description or "").split())
                annotations[option.arg_name] = Annotated[hints[option.arg_name], arg(help=paragraph)]


def unboxed(box: str) -> str:
    """tyro's error box as one line, without its frame and the options' help texts."""
    parts: list[list[str]] = [[]]
    for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines():
        text = line.strip("│ ")
        if not text.strip("─-"):
            parts.append([])
        # two columns of frame (blank if the terminal cannot draw it), then the text; help texts are indented by eight
        elif line[:2] in ("│ ", "  ") and not line[2:].startswith(" " * 8):
            parts[-1].append(text)
    sentences = [" ".join(part) for part in parts if part]
    return "; ".join(part for part in sentences if not part.startswith(("Argument helptext", "For full helptext")))


def guard(body: Callable[[], int | None], name: str) -> int:
    """Run `body`; report a user's mistake, and each warning, as one line on stderr. Returns the exit code."""
    warnings.formatwarning = lambda message, *_: f"{name}: {' '.join(str(message).split())}\n"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of an encoding that lacks a character
    try:
        code = body() or 0
        print(end="", flush=True)
        return code
    except BrokenPipeError:  # stdout's reader has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE
    except (UserError, OSError) as error:  # OSError: disk full, read-only file system, broken device
        if type(error) is OSError and error.errno is None:
            raise
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


@contextlib.contextmanager
def on_sigterm(handler: Callable[..., Any]) -> Iterator[None]:
    """Inside this context `handler` handles SIGTERM."""
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def python_here() -> str:
    """Path of this Python, relative to the working directory if it is inside; for commands in messages."""
    python = Path(sys.executable)
    return str(python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python)


def nearest(word: str, known: Sequence[str]) -> str:
    """' (did you mean …?)' with the known word nearest to `word`, or '' if none is near."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
