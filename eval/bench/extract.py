"""Extraction in notes per second: our shared prefix against transformers' generate and llama.cpp, greedy.

Peers: generate() on the eight full prompts of a note as a left-padded batch, in fp32 and in the machine's compute
dtype; generate() in fp32 with the note's prefilled cache copied for its eight questions; and, if the weights are a GGUF
file, llama.cpp with a shared sequence for the note (eval/bench/llama.py). All generate the same number of tokens. Rates
are the best of `repeats` rounds, in which all sides but llama.cpp take turns: a first round compiles kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eval.bench import llama
from eval.bench.models import generator_of, transformers_of, transformers_tokens
from eval.bench.row import Row
from infer import Generator, tasks
from infer.engine.load import load
from model.support.hardware import compute_dtype, int8_products

Answers = list[list[int]]  # tokens
REUSED = "transformers, note's cache reused, float32"


def rows(weights: str, notes: int = 4, note_tokens: int = 400, new_tokens: int = 16, repeats: int = 2) -> list[Row]:
    """Measure on `notes` notes of `note_tokens` tokens, with `new_tokens` per answer to the eight questions."""
    model, tokenizer = load(weights)
    words = tokenizer.encode("Invasive ductal carcinoma of the left breast, 2.5 cm, grade 2, ER positive. " * 60)
    prefixes = [words[7 * n : 7 * n + note_tokens] for n in range(notes)]
    questions = [tokenizer.encode(tasks.branch(p.question)) for p in tasks.PHENOTYPES.values()]
    peers = {dtype: transformers_of(model, dtype) for dtype in (torch.float32, compute_dtype())}
    setting = (
        f"{notes} notes of {note_tokens} tokens, 8 questions, {new_tokens} new each, best of {repeats}, "
        f"{torch.get_num_threads()} threads"
    )
    probed = str(compute_dtype()).removeprefix("torch.")
    ways = {
        "shared prefix": ("wide", "float32", False),
        "shared prefix + prompt lookup": ("wide", "float32", True),
        f"shared prefix, {probed} as the probe chooses": ("wide", probed, False),
        f"shared prefix + prompt lookup, int8 with {probed}": ("int8", probed, True),
    }
    if int8_products():
        ways[f"shared prefix, w8a8 with {probed}"] = ("w8a8", probed, False)

    def timed(answer: Callable[[], Answers]) -> tuple[float, Answers]:
        """(notes per second, all answers)."""
        began = time.perf_counter()
        found = answer()
        return notes / (time.perf_counter() - began), found

    def each_note(answer: Callable[[list[int]], Answers]) -> Answers:
        """A peer's answers; `answer` maps a note's tokens to its answers' tokens."""
        return [tokens for prefix in prefixes for tokens in answer(prefix)]

    def shared_prefix(generator: Generator) -> Answers:
        prompts = [prefix + question for prefix in prefixes for question in questions]
        return [out.tokens for out in generator.generate(prompts, max_new_tokens=new_tokens)]

    sides: dict[str, Callable[[], Answers]] = {}
    for name, (form, dtype, lookup) in ways.items():
        own = model if (form, dtype) == ("wide", "float32") else load(weights, dtype=dtype, form=form)[0]
        sides[name] = partial(shared_prefix, generator_of(own, tokenizer, lookup=lookup))
    how: dict[str, Any] = {"questions": questions, "new": new_tokens}
    for peer_dtype, peer in peers.items():
        name = f"transformers generate, {str(peer_dtype).removeprefix('torch.')}"
        sides[name] = partial(each_note, partial(padded, peer, **how))
    sides[REUSED] = partial(each_note, partial(reused, peers[torch.float32], **how))
    rounds = [{name: timed(answer) for name, answer in sides.items()} for _ in range(repeats)]
    found = {name: max(one[name] for one in rounds) for name in sides}
    theirs: dict[str, tuple[float | None, Answers]] = {name: found[name] for name in sides if name not in ways}
    if Path(weights).suffix == ".gguf":

        def job(peer: Any, file: str, flash: bool) -> tuple[float, Answers]:
            shared = llama.Job(peer, file, len(questions) + 1, flash)
            return max(timed(partial(each_note, partial(shared.answers, **how))) for _ in range(repeats))

        name, measured = llama.fastest(weights, job)
        theirs[f"{name}, the note's sequence shared" if measured else name] = measured or (None, [])
    return [
        Row(f"extract: {name}", found[name][0], rate, peer, "notes/s", f"{setting}; {equal(found[name][1], answers)}")
        for peer, (rate, answers) in theirs.items()
        for name in ways
    ]


def equal(ours: list[list[int]], theirs: list[list[int]]) -> str:
    same = sum(a == b for a, b in zip(ours, theirs, strict=False))
    return f"{same} of {len(theirs)} answers equal"


@torch.inference_mode()
def padded(peer: Any, prefix: list[int], questions: list[list[int]], new: int) -> list[list[int]]:
    """transformers' answers to all questions of a note as one left-padded batch of full prompts."""
    prompts = [prefix + question for question in questions]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return transformers_tokens(peer, ids, mask, new)


@torch.inference_mode()
def reused(peer: Any, prefix: list[int], questions: list[list[int]], new: int) -> list[list[int]]:
    """transformers' answers with the note prefilled once and its cache repeated for the questions. Questions of
    different lengths run separately, because a cache has no padding."""
    from copy import deepcopy

    from transformers import DynamicCache

    note = DynamicCache()
    peer(torch.tensor([prefix]), past_key_values=note, use_cache=True, logits_to_keep=1)
    found: dict[int, list[int]] = {}
    for size in sorted({len(question) for question in questions}):
        chosen = [n for n, question in enumerate(questions) if len(question) == size]
        cache = deepcopy(note)
        cache.batch_repeat_interleave(len(chosen))
        ids = torch.tensor([prefix + questions[n] for n in chosen])
        answers = transformers_tokens(peer, ids, torch.ones_like(ids), new, past_key_values=cache)
        found |= zip(chosen, answers, strict=True)
    return [found[n] for n in range(len(questions))]
