"""llama.cpp as a peer, through llama-cpp-python (extra `bench`): requantized files, prefill and decode speed, and the
extraction job.

The job uses llama.cpp's fastest method: the note is prefilled once as sequence 0, which the questions' sequences share;
the questions' tokens are one batch with logits for the last token of each; then each step decodes one token of every
question, greedily like ours. llama.cpp gets as many threads as torch (its default is half of the processors).
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMATS = {"Q4_0": 2, "Q8_0": 7, "F16": 1, "BF16": 32}  # llama.cpp's numbers (llama_ftype)
SLOTS = 2048
SILENT: Any = None  # the log callback; a reference must be kept as long as llama.cpp may call it
MISSING = "llama.cpp is not installed (pip install -c constraints.txt -e .[bench])"


def installed() -> Any | None:
    """The module llama_cpp with its log switched off; None if it is not installed."""
    global SILENT
    try:
        import llama_cpp
    except ImportError:
        return None
    SILENT = SILENT or llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(SILENT, None)
    return llama_cpp


def requantized(peer: Any, file: str, folder: Path) -> Iterator[tuple[str, str]]:
    """(format, file) for the file itself and for its requantizations, written by llama.cpp into `folder`."""
    yield "the file's format", file
    for name, number in FORMATS.items():
        out = folder / f"{name}.gguf"
        asked = peer.llama_model_quantize_default_params()
        asked.ftype, asked.allow_requantize = number, True
        if peer.llama_model_quantize(file.encode(), str(out).encode(), ctypes.byref(asked)) == 0:
            yield name, str(out)


def opened(peer: Any, file: str, flash: bool = False) -> Any:
    """Load a file; `flash`: with llama.cpp's flash attention."""
    threads = torch.get_num_threads()
    how = {"n_threads": threads, "n_threads_batch": threads, "flash_attn": flash, "verbose": False}
    return peer.Llama(file, n_ctx=SLOTS, n_batch=SLOTS, **how)


def named(peer: Any, form: str, flash: bool = False) -> str:
    """A label: llama.cpp's version and CPU features, the file's format, and flash attention."""
    features = peer.llama_print_system_info().decode()
    on = [part.split("=")[0].strip() for part in features.split("|") if part.strip().endswith("= 1")]
    return f"llama.cpp ({peer.__version__}: {' '.join(on)}), {form}{', flash attention' if flash else ''}"


def fastest(weights: str, measure: Callable[[Any, str, bool], Any]) -> tuple[str, Any]:
    """(label, result) of the fastest way to run a GGUF file: in its own or another format, with or without flash
    attention.

    `measure(llama_cpp, file, flash)` returns a rate, or a tuple that begins with one. Returns (MISSING, None) if
    llama.cpp is not installed.
    """
    peer, best = installed(), (MISSING, None)
    with tempfile.TemporaryDirectory() as folder:
        files = {} if peer is None else dict(requantized(peer, weights, Path(folder)))
        for (form, file), flash in product(files.items(), (False, True)):
            found = measure(peer, file, flash)
            if best[1] is None or found > best[1]:
                best = named(peer, form, flash), found
    return best


def decoding(model: Any, prompt: list[int], new: int) -> Callable[[], float]:
    """A function that measures decoding in tokens per second, without the first token."""

    def once() -> float:
        model.reset()
        model.eval(prompt)
        token = model.sample(temp=0.0)
        began = time.perf_counter()
        for _ in range(new):
            model.eval([token])
            token = model.sample(temp=0.0)
        return new / (time.perf_counter() - began)

    return once


def reading(model: Any, prompt: list[int]) -> float:
    """Prefill of a prompt in tokens per second."""
    model.reset()
    began = time.perf_counter()
    model.eval(prompt)
    return len(prompt) / (time.perf_counter() - began)


class Job:
    """Answers questions about notes, up to `sequences` − 1 at once."""

    def __init__(self, peer: Any, file: str, sequences: int, flash: bool = False) -> None:
        self.peer, self.model = peer, opened(peer, file, flash)
        asked = self.model.context_params
        asked.n_seq_max, asked.kv_unified = sequences, True
        self.context = peer.llama_init_from_model(self.model.model, asked)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot create a context of {sequences} sequences for {file}")
        self.vocab = self.model.n_vocab()
        self.memory = peer.llama_get_memory(self.context)
        self.batch = peer.llama_batch_init(SLOTS, 0, 1)

    def answers(self, note: list[int], questions: list[list[int]], new: int) -> list[list[int]]:
        """`new` greedy tokens for each question about the note."""
        peer = self.peer
        peer.llama_memory_clear(self.memory, True)
        self.decode((token, at, 0, False) for at, token in enumerate(note))
        for n in range(len(questions)):
            peer.llama_memory_seq_cp(self.memory, 0, n + 1, -1, -1)
        asked = [
            (token, len(note) + at, n + 1, at == len(question) - 1)
            for n, question in enumerate(questions)
            for at, token in enumerate(question)
        ]
        found = [[token] for token in self.decode(asked)]
        for step in range(new - 1):
            lasts = [
                (given[-1], len(note) + len(question) + step, n + 1, True)
                for n, (question, given) in enumerate(zip(questions, found, strict=True))
            ]
            for given, token in zip(found, self.decode(lasts), strict=True):
                given.append(token)
        return found

    def rate(self, prompt: list[int], rows: int, new: int) -> float:
        """Tokens per second of decode steps with `rows` rows, without each row's first token."""
        questions = [[100 + row] for row in range(rows)]
        began = time.perf_counter()
        self.answers(prompt, questions, 1)
        first = time.perf_counter()
        self.answers(prompt, questions, new + 1)
        return rows * new / (time.perf_counter() - first - (first - began))

    def decode(self, tokens: Iterable[tuple[int, int, int, bool]]) -> list[int]:
        """Run a batch of (token, position, sequence, whether to sample after it); returns the sampled tokens."""
        batch, wanted, count = self.batch, [], 0
        for token, position, sequence, last in tokens:
            batch.token[count], batch.pos[count], batch.n_seq_id[count] = token, position, 1
            batch.seq_id[count][0], batch.logits[count] = sequence, last
            if last:
                wanted.append(count)
            count += 1
        batch.n_tokens = count
        if self.peer.llama_decode(self.context, batch):
            raise RuntimeError(f"llama.cpp cannot fit {count} more tokens into its cache of {SLOTS} slots")
        rows = (self.peer.llama_get_logits_ith(self.context, at) for at in wanted)
        return [int(np.ctypeslib.as_array(row, shape=(self.vocab,)).argmax()) for row in rows]
