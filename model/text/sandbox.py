"""A subprocess with limited time and memory for untrusted files: it renders chat templates (Jinja) and runs a
tokenizer.json with unknown regular expressions.

`Sandbox.ask` sends a request as a line of JSON and waits for the answer. The kernel kills the process if a request
takes more than SECONDS of CPU time; MEMORY limits its address space. It writes no files and ends with the parent
process. The lower half of this file runs in the subprocess; it imports neither torch nor the rest of this package.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

SECONDS = 10
MEMORY = 4 << 30
CHARACTERS = 1 << 20  # limit of a template's output, in addition to eight times its input


class SandboxError(Exception):
    """A request failed. The message is one line; it may quote the file's error message, never an encoded text."""


class SandboxLimit(SandboxError):
    """A request exceeded one of our limits; the message contains nothing from the file."""


class Sandbox:
    """One subprocess, started by the first request and restarted after a request that killed it."""

    def __init__(self, tokenizer: str | None = None) -> None:
        self.tokenizer, self.lock = tokenizer, threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def ask(self, **request: Any) -> Any:
        """The result of a request: do="…" names a function of `SERVED`, the rest are its arguments. Raises
        SandboxError."""
        with self.lock:
            if self.process is None:
                self.process = self._start()
            answer = self._exchange(request)
            if answer is None:
                self.process = None
                raise SandboxLimit(f"took more than {SECONDS} s of processor time or {MEMORY >> 30} GB of memory")
        if "limit" in answer:
            raise SandboxLimit(answer["limit"])
        if "error" in answer:
            raise SandboxError(answer["error"])
        return answer["result"]

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
            env=environment,
        )
        weakref.finalize(self, process.kill)
        self.process = process
        if self.tokenizer is not None:
            self._exchange({"do": "load", "raw": self.tokenizer})
        return process

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any] | None:
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            return None
        return json.loads(line) if line else None


# What runs in the sandbox.


@functools.lru_cache(8)  # all questions of all notes use the same template
def compiled(template: str) -> Any:
    """A jinja2 template in the environment that transformers gives to chat templates: trimmed blocks, `break` and
    `continue`, `generation` blocks, tojson without HTML escapes, raise_exception and strftime_now."""
    import datetime

    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def render(template: str, inputs: list[dict[str, Any]]) -> list[str]:
    """The template's output for each of the inputs (its variables)."""
    rendered = []
    for variables in inputs:
        remaining = CHARACTERS + 8 * len(json.dumps(variables))
        pieces = []
        for piece in compiled(template).generate(**variables):
            remaining -= len(piece)
            if remaining < 0:
                raise SandboxLimit(f"it writes more than {CHARACTERS} characters in addition to its messages")
            pieces.append(piece)
        rendered.append("".join(pieces))
    return rendered


TOKENIZER: Any = None


def load(raw: str) -> None:
    global TOKENIZER
    import tokenizers

    TOKENIZER = tokenizers.Tokenizer.from_str(raw)
    TOKENIZER.no_truncation()
    TOKENIZER.no_padding()


def encode(text: str, controls: bool) -> tuple[list[int], list[str], list[tuple[int, int]]]:
    return encoded(TOKENIZER, text, controls)


def decode(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def encoded(tokenizer: Any, text: str, controls: bool) -> tuple[list[int], list[str], list[tuple[int, int]]]:
    """(ids, pieces, character spans) of a text; `controls`: control tokens in the text become their ids."""
    tokenizer.encode_special_tokens = not controls
    found = tokenizer.encode(text, add_special_tokens=False)
    return found.ids, found.tokens, found.offsets


SERVED = {function.__name__: function for function in (render, load, encode, decode)}


def serve() -> None:
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + SECONDS, hard))
        try:
            request = json.loads(line)
            answer = {"result": SERVED[request.pop("do")](**request)}
        except SandboxLimit as error:
            answer = {"limit": str(error)}
        except (MemoryError, RecursionError) as error:
            answer = {"limit": f"needs too much memory ({type(error).__name__})"}
        except BaseException as error:  # a panic of the tokenizers library is not an Exception
            answer = {"error": " ".join(f"{error or type(error).__name__}".split())[:200]}
        try:
            text = json.dumps(answer)
        except MemoryError:
            text = json.dumps({"limit": "needs too much memory"})
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
