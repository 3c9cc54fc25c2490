"""The comparisons behind `python -m eval.parity`: stages, gradients, greedy text, tokenizers. Each returns rows.

In fp32 on a CPU a stage passes if it is bit-identical. Elsewhere (GPU, bf16), and for gradients, both sides are
compared with our own model in a wider dtype on the same weights, and ours passes if its RMS error is at most twice
transformers'.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model import KVCache, Tokenizer, Transformer
from model.text.chat import OWN
from model.text.engines import Fast
from model.text.tokenizer import to_characters

RATIO = 2.0  # largest accepted (our error) / (transformers' error)


@dataclass(frozen=True)
class Row:
    """The result of one comparison. `error` is the largest absolute difference, `ulps` the same in units in the last
    place."""

    section: str
    name: str
    ok: bool
    error: float = 0.0
    ulps: int | None = None
    cosine: float = 1.0
    detail: str = ""


def ulps(a: Tensor, b: Tensor) -> int:
    """Largest difference of two tensors of one dtype in ULPs: the number of steps between neighbouring floats."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    low = torch.iinfo(kind).min

    def rank(x: Tensor) -> Tensor:  # position in the order of all floats; −0 and 0 are equal
        bits = x.contiguous().view(kind)
        return torch.where(bits < 0, low - bits, bits).double()

    return int((rank(a) - rank(b)).abs().max()) if a.numel() else 0


def compare(section: str, name: str, got: Tensor, wanted: Tensor, exact: Tensor | None) -> Row:
    """Compare two tensors: bit for bit, or, if the reference `exact` is given, by the ratio of their errors against
    it."""
    if got.shape != wanted.shape:
        return Row(section, name, False, float("inf"), detail=f"shape {list(got.shape)}, theirs {list(wanted.shape)}")
    same = torch.equal(got, wanted.to(got.dtype))
    a, b = got.double().flatten(), wanted.double().flatten()
    error = float((a - b).abs().max()) if a.numel() else 0.0
    norms = float(a.norm() * b.norm())
    cosine = min(1.0, float(a @ b) / norms) if norms else float(same)
    steps = ulps(got.float(), wanted.float()) if got.dtype == torch.float64 else ulps(got, wanted.to(got.dtype))
    if exact is None or same:
        return Row(section, name, same, error, steps, cosine)
    truth = exact.double().flatten()
    mine, peer = float((a - truth).square().mean().sqrt()), float((b - truth).square().mean().sqrt())
    # The peer may be closer than rounding explains, by luck: assume at least half an ULP RMS, one for a single number.
    floor = torch.finfo(got.dtype).eps * float(truth.square().mean().sqrt()) * (0.5 if got.numel() > 1 else 1)
    ratio = mine / max(peer, floor, 1e-300)
    return Row(section, name, ratio <= RATIO, error, steps, cosine, f"error {ratio:.2f} of theirs")


def compare_all(
    section: str, got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], exact: Mapping[str, Tensor] | None = None
) -> list[Row]:
    """Rows for two sets of named tensors, in the order of `got`. A name that only one side has fails."""
    rows = []
    for name in [*got, *(name for name in wanted if name not in got)]:
        if name not in got or name not in wanted:
            rows.append(Row(section, name, False, float("inf"), detail=f"only {'ours' if name in got else 'theirs'}"))
        else:
            rows.append(compare(section, name, got[name], wanted[name], exact[name] if exact else None))
    return rows


# ---- greedy text ----------------------------------------------------------------------------------------------

Text = tuple[list[int], Tensor]  # N generated tokens, and the logits_NV that they are the argmax of


@torch.no_grad()
def greedy(step: Callable[[Tensor], Tensor], tokens_1T: Tensor, count: int) -> Text:
    """Generate `count` tokens greedily. `step` maps the next tokens_1T to their logits_1TV and keeps the cache itself.
    Ties go to the lowest id."""
    chosen: list[int] = []
    logits: list[Tensor] = []
    for _ in range(count):
        logits.append(step(tokens_1T)[0, -1].float().cpu())
        chosen.append(int(logits[-1].argmax()))
        tokens_1T = torch.tensor([chosen[-1:]], device=tokens_1T.device)
    return chosen, torch.stack(logits)


@torch.no_grad()
def uncached(logits_of: Callable[[Tensor], Tensor], prompt_1T: Tensor, chosen: Sequence[int]) -> Text:
    """The argmax at each step from one forward pass over prompt and chosen tokens, without a cache."""
    more = torch.tensor([list(chosen[:-1])], dtype=torch.int64, device=prompt_1T.device)
    logits = logits_of(torch.cat((prompt_1T, more), dim=1))[0, prompt_1T.shape[1] - 1 :].float().cpu()
    return logits.argmax(-1).tolist(), logits


def compare_text(name: str, got: Text, wanted: Text) -> Row:
    """Compare two greedy runs. At the first different token the gap of the two best logits must be at most twice the
    logits' error, else the row fails."""
    length = len(got[0])
    first = next((i for i in range(length) if got[0][i] != wanted[0][i]), length)
    shared = slice(0, min(first + 1, length))
    error = float((got[1][shared] - wanted[1][shared]).abs().max())
    if first == length:
        return Row("generation", name, True, error, detail=f"{length} tokens equal")
    best = wanted[1][first].topk(2).values
    gap = float(best[0] - best[1])
    detail = f"{first} tokens equal, then the two best logits lie {gap:.1e} apart"
    return Row("generation", name, gap <= 2 * error, error, detail=detail)


def generation_rows(model: Transformer, peer: Any, prompt_1T: Tensor, count: int) -> list[Row]:
    """Greedy text of both models: ours with against without its cache, and ours against theirs."""
    cache, past = KVCache(model.config), None

    def their_step(tokens_1T: Tensor) -> Tensor:
        nonlocal past
        out = peer(tokens_1T, past_key_values=past, use_cache=True)
        past = out.past_key_values
        return out.logits

    mine = greedy(lambda tokens_1T: model(tokens_1T, cache=cache), prompt_1T, count)
    rows = [compare_text("ours, cached and not", uncached(model, prompt_1T, mine[0]), mine)]
    if model.config.window == 1:  # transformers' cached decode is wrong for this window; compare with its uncached pass
        logits_of = lambda tokens_1T: peer(tokens_1T, use_cache=False).logits  # noqa: E731
        return [*rows, compare_text("ours and theirs, uncached", mine, uncached(logits_of, prompt_1T, mine[0]))]
    return [*rows, compare_text("ours and theirs, cached", mine, greedy(their_step, prompt_1T, count))]


# ---- tokenizers -----------------------------------------------------------------------------------------------


def tokenizer_rows(
    tokenizer: Tokenizer, peer: Any | None, lines: Sequence[str], stops: Iterable[int] = (), theirs: Iterable[int] = ()
) -> list[Row]:
    """Check a tokenizer on `lines`, alone and against transformers' tokenizer of the same files (`peer`).

    Alone: decode(encode(line)) is the line, and the offsets cover it. Against the peer: ids, offsets, begin token, stop
    ids, added tokens and a chat. `stops` and `theirs` are the end-of-text ids in our config and in theirs.
    """
    checks: dict[str, list[int]] = {"text → ids → text": [], "offsets cover the text": []}
    library = None if peer is None else _with_file_rules(tokenizer, peer)
    if library is not None:
        checks |= {"ids as transformers'": [], "offsets as transformers'": []}
    for number, line in enumerate(lines, start=1):
        ids, offsets = tokenizer.encode(line, offsets=True)
        # NFKC: a normalizer may compose letters (é), so that the decoded text differs in form only
        back, normal = (unicodedata.normalize("NFKC", text) for text in (tokenizer.decode(ids), line))
        covered = {byte for start, end in offsets for byte in range(start, end)}
        holds = [back == normal, covered >= set(range(len(line.encode())))]
        if library is not None:
            found = library(line, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
            holds += [found.input_ids == ids, [*map(tuple, found.offset_mapping)] == to_characters(line, offsets)]
        for wrong, right in zip(checks.values(), holds, strict=True):
            wrong += [] if right else [number]
    rows = []
    for name, wrong in checks.items():
        detail = f"{len(lines) - len(wrong)} of {len(lines)} lines" + (f"; first wrong: {wrong[0]}" if wrong else "")
        rows.append(Row("tokenizer", name, not wrong, detail=detail))
    if peer is None or library is None:
        return rows

    def row(name: str, ours: Any, wanted: Any) -> None:
        detail = str(ours) if ours == wanted else f"ours {ours}, theirs {wanted}"
        rows.append(Row("tokenizer", name, ours == wanted, detail=detail[:120]))

    row("stop ids", sorted({*tokenizer.stop_ids, *stops}), sorted({*theirs, peer.eos_token_id} - {None}))
    row("begin token", tokenizer.encode("hi", bos=True), library("hi").input_ids)
    added = {token.content: i for i, token in peer.added_tokens_decoder.items() if i >= tokenizer.vocab_size}
    missing = {text: i for text, i in peer.added_tokens_encoder.items() if tokenizer.engine.id_of(text) != i}
    row("added tokens", missing | added, {})
    if tokenizer.form == OWN and peer.chat_template:
        messages = [{"role": "user", "content": "Which stage? "}]
        wanted = peer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        wanted = library(wanted, add_special_tokens=False).input_ids
        ours = tokenizer.encode_chat(messages)
        rows.append(Row("tokenizer", "a chat", ours == wanted, detail=f"{len(ours)} tokens, theirs {len(wanted)}"))
    return rows


def _with_file_rules(tokenizer: Tokenizer, peer: Any) -> Any:
    """transformers' tokenizer with the normalizer and pre-tokenizer of its file. Its classes for some model families
    (such as Qwen2) replace them, and the rows would fail for a difference between transformers and the file."""
    if isinstance(tokenizer.engine, Fast):
        for part in ("normalizer", "pre_tokenizer"):
            setattr(peer.backend_tokenizer, part, getattr(tokenizer.engine.model, part))
    return peer
