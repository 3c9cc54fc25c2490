"""Notes per second: infer's shared prefix against transformers' generate on the same weights, greedy, in one run.

Peers: generate() on the eight full prompts of a note, left-padded in a batch, in fp32 and in the dtype that the probe
chooses; generate()'s own cache reused by hand in fp32, the note read once and copied for its eight questions; and,
where the weights are a GGUF file, llama.cpp with the note's sequence shared (eval/bench/llama.py). All give the same
number of new tokens.
"""

from __future__ import annotations

import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from eval.bench import llama
from eval.bench.row import Row
from infer import tasks
from infer.engine.generate import Generator
from infer.engine.load import load
from model.support.hardware import compute_dtype, int8_products


def rows(weights: str, notes: int = 4, note_tokens: int = 400, new_tokens: int = 16) -> list[Row]:
    """Measure on `notes` notes of `note_tokens` tokens, `new_tokens` for each of the eight questions."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(weights)
    words = tokenizer.encode("Invasive ductal carcinoma of the left breast, 2.5 cm, grade 2, ER positive. " * 60)
    prefixes = [words[7 * n : 7 * n + note_tokens] for n in range(notes)]
    questions = [tokenizer.encode(tasks.branch(p.question)) for p in tasks.PHENOTYPES.values()]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "peer")
        peers = {
            dtype: AutoModelForCausalLM.from_pretrained(Path(folder) / "peer", dtype=dtype).eval()
            for dtype in (torch.float32, compute_dtype())
        }
    setting = (
        f"{notes} notes of {note_tokens} tokens, 8 questions, {new_tokens} new each, {torch.get_num_threads()} threads"
    )

    ours: dict[str, tuple[float, list[list[int]]]] = {}
    probed = str(compute_dtype()).removeprefix("torch.")
    ways = {
        "shared prefix": ("wide", "float32", False),
        "shared prefix + prompt lookup": ("wide", "float32", True),
        f"shared prefix, {probed} as the probe chooses": ("wide", probed, False),
        f"shared prefix + prompt lookup, int8 with {probed}": ("int8", probed, True),
    }
    if int8_products():
        ways[f"shared prefix, w8a8 with {probed}"] = ("w8a8", probed, False)
    for name, (form, dtype, lookup) in ways.items():
        own = model if (form, dtype) == ("wide", "float32") else load(weights, dtype=dtype, form=form)[0]
        generator = Generator(own, tokenizer, lookup=lookup)
        generator.stop_ids = frozenset()  # every request runs to its last token, as the peers' do
        began = time.perf_counter()
        outs = generator.generate([t + q for t in prefixes for q in questions], max_new_tokens=new_tokens)
        ours[name] = (notes / (time.perf_counter() - began), [out.tokens for out in outs])
    found = []
    theirs_by_name = {f"transformers generate, {str(d).removeprefix('torch.')}": (padded, p) for d, p in peers.items()}
    theirs_by_name["transformers, note's cache reused, float32"] = (reused, peers[torch.float32])
    for peer_name, (body, peer) in theirs_by_name.items():
        began = time.perf_counter()
        theirs = [answer for prefix in prefixes for answer in body(peer, prefix, questions, new_tokens)]
        rate = notes / (time.perf_counter() - began)
        for name, (mine, tokens) in ours.items():
            same = sum(a == b for a, b in zip(tokens, theirs, strict=True))
            equal = f"{same} of {len(theirs)} answers equal"
            found.append(Row(f"extract: {name}", mine, rate, peer_name, "notes/s", f"{setting}; {equal}"))
    if Path(weights).suffix == ".gguf":
        name, theirs_rate, theirs = llama_cpp(weights, prefixes, questions, new_tokens)
        for way, (mine, tokens) in ours.items():
            same = sum(a == b for a, b in zip(tokens, theirs, strict=False))
            equal = f"{same} of {len(theirs)} answers equal"
            found.append(Row(f"extract: {way}", mine, theirs_rate, name, "notes/s", f"{setting}; {equal}"))
    return found


def llama_cpp(
    weights: str, prefixes: list[list[int]], questions: list[list[int]], new: int
) -> tuple[str, float | None, list[list[int]]]:
    """(name, notes a second, answers) of llama.cpp's fastest format of the file; no rate where it is not installed."""
    best: tuple[str, float | None, list[list[int]]] = (llama.MISSING, None, [])
    peer = llama.installed()
    with tempfile.TemporaryDirectory() as folder:
        files = {} if peer is None else dict(llama.requantized(peer, weights, Path(folder)))
        for (form, file), flash in product(files.items(), (False, True)):
            job = llama.Job(peer, file, len(questions) + 1, flash)
            began = time.perf_counter()
            found = [answer for prefix in prefixes for answer in job.answers(prefix, questions, new)]
            rate = len(prefixes) / (time.perf_counter() - began)
            if best[1] is None or rate > best[1]:
                best = (f"{llama.named(peer, form, flash)}, the note's sequence shared", rate, found)
    return best


@torch.inference_mode()
def padded(peer: Any, prefix: list[int], questions: list[list[int]], new: int) -> list[list[int]]:
    prompts = [prefix + question for question in questions]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return generate(peer, ids, mask, new)


@torch.inference_mode()
def reused(peer: Any, prefix: list[int], questions: list[list[int]], new: int) -> list[list[int]]:
    """The note's cache once, repeated for the questions; each question length by itself (a cache has no padding)."""
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
        for n, tokens in zip(chosen, generate(peer, ids, torch.ones_like(ids), new, cache), strict=True):
            found[n] = tokens
    return [found[n] for n in range(len(questions))]


def generate(peer: Any, ids: torch.Tensor, mask: torch.Tensor, new: int, cache: Any = None) -> list[list[int]]:
    options = {} if cache is None else {"past_key_values": cache}
    out = peer.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )
    return out[:, ids.shape[1] :].tolist()
