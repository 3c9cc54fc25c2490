"""Text generation: greedy or sampled, batched, with shared prefixes computed once.

    from infer import Generator
    out = Generator(model, tokenizer).generate(["prompt", …], max_new_tokens=50, temperature=0.0)

    python -m infer.generate --weights DIR [--adapter DIR] --prompt TEXT

A request's result depends on its prompt, its settings and its seed, not on what shares its batch, except for rounding.
Logits are at least fp32; greedy ties go to the lowest token id.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from infer.engine.cache import Cache
from infer.engine.compiled import StaticCache
from infer.engine.forward import Engine
from infer.engine.load import load
from infer.engine.lookup import MAX_GUESSES, Lookup, best_guess_count, row_cost
from infer.engine.memory import Plan
from infer.engine.settings import Generation, Settings
from infer.engine.tree import build_tree
from model import Tokenizer, Transformer
from model.support.cli import UserError
from model.support.hardware import return_freed_memory


@dataclass
class State:
    """A request and what has been generated for it; `finish` is its finish reason, None while it is running."""

    prompt: Sequence[int]
    settings: Settings
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    given: int = 0
    """Number of first `tokens` that were given with the request; the prompt ends with them."""
    runner_ups: list[tuple[int, float]] = field(default_factory=list)
    """With Settings.runner_up: each step's second likeliest token and its log-probability, −∞ if it was not allowed."""
    text: str = ""
    finish: str | None = None
    random: torch.Generator | None = None
    drawn: list[float] = field(default_factory=list)
    lookup: Lookup | None = None

    def uniform(self, ahead: int) -> float:
        """The random number in [0, 1), by the request's seed, for its next token (ahead 0), the one after it, …"""
        if self.random is None:
            self.random = torch.Generator().manual_seed(self.settings.seed)
        number = len(self.tokens) - self.given + ahead
        while len(self.drawn) <= number:
            self.drawn.append(torch.rand((), dtype=torch.float64, generator=self.random).item())
        return self.drawn[number]


Draft = tuple[State, list[int]]  # a request and draft tokens after its own: what the next token follows


class Generator:
    """Generates text with one model.

    `lookup` allows speculation where it pays (lookup.py). `compile` compiles the decode step instead (compiled.py),
    which pays for many tokens of the same requests. `cache_dtype` and `chunk` are Engine's. `max_length` bounds prompt
    and answer together, in tokens (0: the config's batch_length). Fused models (fuse.py) use their kernels.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        lookup: bool = True,
        cache_dtype: torch.dtype | None = None,
        chunk: int = 2048,
        max_length: int = 0,
        compile: bool = False,
    ) -> None:
        self.engine, self.tokenizer = Engine(model, cache_dtype, chunk), tokenizer
        return_freed_memory()  # of weights that the engine has concatenated
        self.compile = compile
        self.lookup, self.row_cost = lookup and not self.compile, row_cost(self.engine)
        ends = {*tokenizer.stop_ids, *model.config.eos_token_id}
        self.stop_ids = frozenset(i for i in ends if i < model.config.vocab_size)
        own = model.config.batch_length
        if max_length < 0:
            raise UserError(f"--max-length {max_length}; it must be at least 1, or 0 for the model's own")
        if max_length > own and model.config.is_dynamic:
            raise UserError(
                f"--max-length {max_length}: beyond the {own} tokens of training, dynamic rotary scaling would let an "
                f"answer depend on the prompts beside it; leave it out, or give at most {own}"
            )
        if max_length > own:
            warnings.warn(f"--max-length {max_length} is beyond the {own} tokens of the model's config", stacklevel=2)
        self.max_length = max_length or own

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        settings: Settings | Sequence[Settings] | None = None,
        **options: Any,
    ) -> list[Generation]:
        """Continues each prompt, a text (encoded with the begin token) or token ids.

        `settings` is one Settings or one per prompt; `options` override its fields. With one Settings for several
        prompts, prompt i is sampled with seed + i. Raises UserError for an empty prompt, one beyond the model's
        length, or settings out of range.
        """
        states = self.states(prompts, settings, options)
        for _ in self.run(states):
            pass
        return [self.result(state) for state in states]

    def stream(self, prompt: str | Sequence[int], settings: Settings | None = None, **options: Any) -> Iterator[str]:
        """Yields the text of one continuation in pieces, as it is generated."""
        (state,) = self.states([prompt], settings, options)
        shown = 0
        longest = max((len(text) for text in state.settings.stop), default=0)
        for _ in self.run([state]):
            if state.finish is None:
                state.text = self.decode(state.tokens)
            text = state.text
            # hold back what may still become part of a stop string or of an incomplete character
            safe = len(text) if state.finish else max(shown, len(text.rstrip("\ufffd")) - longest)
            if safe > shown:
                yield text[shown:safe]
                shown = safe

    def states(self, prompts: Any, settings: Any, options: dict[str, Any]) -> list[State]:
        """New requests from `generate`'s arguments. Raises UserError as `generate` does."""
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise UserError(f"prompts is {'one text' if isinstance(prompts, str) else repr(prompts)}; give a list")
        ids = [self.ids(number, prompt) for number, prompt in enumerate(prompts)]
        if settings is None or isinstance(settings, Settings):
            one = replace(settings or Settings(), **options)
            each = [replace(one, seed=one.seed + i) for i in range(len(ids))]
        else:
            given = list(settings) if isinstance(settings, Iterable) else [settings]
            if len(given) != len(ids) or not all(isinstance(s, Settings) for s in given):
                raise UserError(f"settings must be one Settings, or one for each of the {len(ids)} prompts")
            each = [replace(s, **options) for s in given]
        for text in {text for chosen in each for text in chosen.stop}:
            self.check_stop(text)
        limit = self.max_length
        for number, (prompt, chosen) in enumerate(zip(ids, each, strict=True)):
            if not prompt:
                raise UserError(f"prompt {number} holds no token, and the tokenizer has no begin token")
            if len(prompt) + chosen.max_new_tokens > limit:
                raise UserError(
                    f"prompt {number} has {len(prompt)} tokens; with {chosen.max_new_tokens} new ones that exceeds "
                    f"the model's {limit}; give a shorter prompt, or --max-length"
                )
            wrong = next((t for t in prompt if not 0 <= t < self.engine.config.vocab_size), None)
            if wrong is not None:
                raise UserError(f"prompt {number}: token id {wrong} is outside the vocabulary")
        return [State(prompt, chosen) for prompt, chosen in zip(ids, each, strict=True)]

    def ids(self, number: int, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True)
        try:
            return [operator.index(token) for token in prompt]
        except TypeError as error:
            raise UserError(f"prompt {number} is neither a text nor a list of token ids") from error

    def check_stop(self, text: str) -> None:
        """Raises UserError for a stop string that cannot occur in generated text."""
        if self.tokenizer.engine.special(text) is not None:
            raise UserError(f"stop string {text!r} is a special token: texts never hold it, and an end token ends them")
        if text not in self.tokenizer.decode(self.tokenizer.encode(text)):
            raise UserError(f"stop string {text!r} cannot occur: the tokenizer has no way to spell it")

    def run(self, states: list[State]) -> Iterator[None]:
        """Runs all requests to completion; yields after each step."""
        rows = RequestBatch(self)
        rows.add(states)
        if self.compile and rows.active and not any(state.settings.hidden for state in states):
            rows.compile()
        yield
        while rows.active:
            rows.step()
            yield

    def guess(self, active: list[State]) -> list[list[int]]:
        """Draft tokens to verify for each request; all [] if speculation would not pay."""
        possible = best_guess_count([1.0] * len(active), [MAX_GUESSES] * len(active), self.row_cost)
        if not possible or not self.lookup:
            return [[] for _ in active]  # with this many requests, not even drafts that are always right would pay
        found, rates = [], []
        for state in active:
            if state.lookup is None:
                state.lookup = Lookup(state.prompt)
            state.lookup.add(state.tokens[len(state.lookup.ids) - len(state.prompt) + state.given :])
            rates.append(state.lookup.rate)
            found.append(state.lookup.guess(state.settings.max_new_tokens - len(state.tokens) - 1))
        k = best_guess_count(rates, [len(guess) for guess in found], self.row_cost)
        return [guess[:k] for guess in found]

    def take(self, x_BTD: Tensor, active: list[State], guesses: list[list[int]], cache: Cache | StaticCache) -> None:
        """Chooses every request's next token from x_BTD, and further ones as long as its draft tokens are right."""
        pairs = list(zip(active, guesses, strict=True))
        drafts = [(state, guess[:count]) for state, guess in pairs for count in range(len(guess) + 1)]
        x_ND = x_BTD[:, 0]
        if len(drafts) > len(active):
            x_ND = torch.cat([x_TD[: 1 + len(guess)] for x_TD, guess in zip(x_BTD, guesses, strict=True)])
        chosen = iter(self.choose(self.engine.logits(x_ND), drafts))
        accepted = []
        for state, guess in pairs:
            choices = [next(chosen) for _ in range(len(guess) + 1)]
            count = 0
            self.enter(state, *choices[0])
            while state.finish is None and count < len(guess) and state.tokens[-1] == guess[count]:
                count += 1
                self.enter(state, *choices[count])
            accepted.append(count)
        if any(accepted):
            assert isinstance(cache, Cache)  # compiled steps do not speculate
            cache.length_B = cache.length_B + torch.tensor(accepted)

    def prefill_branches(self, cache: Cache, own: list[list[int]]) -> Tensor:
        """Prefills the branches' tokens → x_BD, the hidden state of each branch's last token."""
        longest = max(len(tokens) for tokens in own)
        tokens_BT = torch.tensor(
            [[*tokens, *[0] * (longest - len(tokens))] for tokens in own], device=self.engine.device
        )
        count_B = torch.tensor([len(tokens) for tokens in own])
        last_BD = None
        size = max(1, 2 * self.engine.chunk // len(own)) if len(own) > 1 else self.engine.chunk
        for start in range(0, longest, size):
            part_BT = tokens_BT[:, start : start + size]
            here_B = (count_B - start).clamp(0, part_BT.shape[1])
            x_BTD = cache.step(part_BT, here_B)
            end_BD = x_BTD[torch.arange(len(own)), (here_B - 1).clamp_min(0).to(x_BTD.device)]
            fresh_B1 = (here_B > 0)[:, None].to(x_BTD.device)
            last_BD = end_BD if last_BD is None else torch.where(fresh_B1, end_BD, last_BD)
        assert last_BD is not None
        return last_BD

    def choose(self, logits_NV: Tensor, drafts: list[Draft]) -> list[list[float]]:
        """Chooses a token for each draft: [id, log-probability], with runner-ups their two numbers after these."""
        normal_N = logits_NV.logsumexp(-1)
        masked_NV = self.constrain(logits_NV, drafts)
        best_N = masked_NV.argmax(-1)  # lowest id among ties
        sampled = [row for row, (state, _) in enumerate(drafts) if state.settings.temperature > 0]
        if sampled:
            best_N[sampled] = draw(masked_NV[sampled], [drafts[row] for row in sampled])

        columns = [best_N, logits_NV.gather(1, best_N[:, None])[:, 0] - normal_N]
        if any(state.settings.runner_up for state, _ in drafts):
            second = masked_NV.scatter(1, best_N[:, None], float("-inf")).max(-1)
            columns += [second.indices, second.values - normal_N]
        # one transfer, the step's only synchronization; fp64 represents ids and log-probabilities exactly
        chosen: list[list[float]] = torch.stack([column.double() for column in columns], -1).tolist()
        return chosen

    def constrain(self, logits_NV: Tensor, drafts: list[Draft]) -> Tensor:
        """The logits with −∞ for tokens that a request's constraint does not allow."""
        rows, ids = [], []
        for row, (state, draft) in enumerate(drafts):
            constraint = state.settings.constraint
            allowed = None if constraint is None else constraint.allowed([*state.tokens, *draft])
            if allowed is not None:
                rows.append(row)
                ids.append(torch.as_tensor(allowed, dtype=torch.int64, device=logits_NV.device))
        if not rows:
            return logits_NV
        id_M = torch.cat(ids)
        counts = torch.tensor([len(each) for each in ids])
        row_n = torch.tensor(rows)
        row_M = row_n.repeat_interleave(counts).to(logits_NV.device)
        masked_NV = logits_NV.index_fill(0, row_n.to(logits_NV.device), float("-inf"))
        masked_NV[row_M, id_M] = logits_NV[row_M, id_M]
        return masked_NV

    def enter(self, state: State, token: float, logprob: float, *runner_up: float) -> None:
        """Adds a chosen token, and its runner-up if there is one, to a request, which may end with it."""
        token, settings = int(token), state.settings
        state.tokens.append(token)
        state.logprobs.append(logprob)
        if settings.runner_up and runner_up:
            state.runner_ups.append((int(runner_up[0]), runner_up[1]))
        if token in self.stop_ids:
            state.finish = "stop"
            state.text = self.decode(state.tokens[:-1])
            return
        last = len(state.tokens) >= settings.max_new_tokens
        if settings.stop or last:  # only when needed: decoding all tokens at every step is quadratic
            state.text = self.decode(state.tokens)
        for stop in settings.stop:
            if stop in state.text:
                state.text, state.finish = state.text[: state.text.index(stop)], "stop_string"
        if state.finish is None and settings.stop_cycles and cycles(state.tokens):
            state.text, state.finish = self.decode(state.tokens), "repetition"
        if state.finish is None and last:
            state.finish = "length"

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i < self.tokenizer.vocab_size])

    def result(self, state: State) -> Generation:
        assert state.finish is not None
        return Generation(state.text, state.tokens, state.logprobs, state.finish, len(state.prompt) - state.given)


def generator_for(options: Any, plan: Plan, compile: bool = False) -> Generator:
    """The Generator for a program's options (ModelOptions) and memory plan; loads the model."""
    model, tokenizer = load(options.weights, options.adapter, options.dtype, form=plan.form, fused=options.fuse)
    tokenizer.put_begin(options.bos)
    return Generator(
        model,
        tokenizer,
        cache_dtype=plan.cache,
        chunk=plan.chunk,
        max_length=options.max_length,
        compile=compile,
    )


class RequestBatch:
    """Continuous batching: requests that share a cache. `add` prefills further requests, `step` decodes.

    Added requests are prefilled in a tree of their own, which is then joined to the cache, so a request's result does
    not depend on when it was added, except for rounding.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.held: list[State] = []  # requests in the cache; finished ones are dropped before the next step
        self.cache: Cache | StaticCache | None = None

    @property
    def active(self) -> list[State]:
        """The unfinished requests."""
        return [state for state in self.held if state.finish is None]

    @torch.inference_mode()
    def add(self, states: Sequence[State]) -> None:
        """Prefills further requests and chooses their first tokens. Prefixes still in the cache are reused, also those
        of requests that finished in the last step."""
        if not states:
            return
        assert not isinstance(self.cache, StaticCache)
        generator, hidden = self.generator, [state.settings.hidden for state in states]
        prefixes, branches = build_tree([state.prompt for state in states], hidden, joins=self.cache is not None)
        cache = Cache(generator.engine, prefixes, branches, hidden, self.cache)
        self._drop_ended()
        added = [states[branch.prompt] for branch in branches]
        x_BTD = generator.prefill_branches(cache, [branch.tokens for branch in branches])[:, None]
        generator.take(x_BTD, added, [[] for _ in added], cache)
        if self.cache is None:
            self.cache = cache
        else:
            self.cache.join(cache)
        self.held += added

    @torch.inference_mode()
    def compile(self) -> None:
        """Switches to a compiled decode step. No requests can be added afterwards."""
        self._drop_ended()
        assert isinstance(self.cache, Cache)
        new = max(state.settings.max_new_tokens for state in self.held)
        self.cache = StaticCache(self.generator.engine, self.cache, new)

    @torch.inference_mode()
    def step(self) -> None:
        """Decodes one token of every request, and further ones where draft tokens are right."""
        self._drop_ended()
        cache, active, generator = self.cache, self.held, self.generator
        assert cache is not None
        guesses = generator.guess(active)
        T = 1 + max(map(len, guesses))
        fed = [[state.tokens[-1], *guess] for state, guess in zip(active, guesses, strict=True)]
        tokens_BT = torch.tensor([[*row, *[0] * (T - len(row))] for row in fed], device=generator.engine.device)
        x_BTD = cache.step(tokens_BT, torch.ones(len(fed), dtype=torch.int64))
        generator.take(x_BTD, active, guesses, cache)

    def _drop_ended(self) -> None:
        kept = [row for row, state in enumerate(self.held) if state.finish is None]
        if not kept:
            self.cache = None
        elif len(kept) < len(self.held):
            assert self.cache is not None
            self.cache.retain(kept)
        self.held = [self.held[row] for row in kept]


def draw(logits_BV: Tensor, drafts: Sequence[Draft]) -> Tensor:
    """Samples a token_B from softmax(logits / temperature) after top-k, top-p and min-p, each row by its request's
    settings and rng. The host reads nothing from the device."""
    device, V = logits_BV.device, logits_BV.shape[1]

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float64, device=device)[:, None]

    each, rank_V = [state.settings for state, _ in drafts], torch.arange(V, device=device)
    temperature_B1 = column(settings.temperature for settings in each)
    below_best_BV = logits_BV.double() - logits_BV.amax(-1, keepdim=True)  # so that no quotient overflows
    probability_BV, order_BV = (below_best_BV / temperature_B1).softmax(-1).sort(descending=True, stable=True)
    keep_BV = probability_BV >= column(settings.min_p for settings in each) * probability_BV[:, :1]
    keep_BV &= rank_V < column(settings.top_k or V for settings in each)
    before_BV = probability_BV.cumsum(-1) - probability_BV  # the token that crosses top_p is kept
    keep_BV &= before_BV < column(settings.top_p if settings.top_p < 1 else float("inf") for settings in each)
    keep_BV &= probability_BV > 0
    below_BV = (probability_BV * keep_BV).cumsum(-1)
    point_B1 = column(state.uniform(len(draft)) for state, draft in drafts) * below_BV[:, -1:]
    place_B1 = (below_BV <= point_B1).sum(-1, keepdim=True)
    last_B1 = (keep_BV * rank_V).amax(-1, keepdim=True)
    return order_BV.gather(1, torch.minimum(place_B1, last_B1))[:, 0]


def cycles(tokens: Sequence[int]) -> bool:
    """True if the text ends in a repetition: the same 1 to 16 tokens at least four times, over at least 12 tokens."""
    for period in range(1, 17):
        span = max(4 * period, 12)
        if len(tokens) >= span and all(tokens[-i] == tokens[-i - period] for i in range(1, span - period + 1)):
            return True
    return False
