"""Generation equals the plain model one token at a time, whatever shares the batch, the tree or the window."""

import gc
from dataclasses import replace

import pytest
import torch
from answering_models import plain_greedy, tiny_model, unseen
from drawn_prompts import KINDS, MODELS, readings, trees, windowed
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.engine.cache import SPARE, Cache
from infer.engine.causal import causal
from infer.engine.generate import Generator, Settings, State, cycles, draw
from infer.engine.lookup import Lookup, best_guess_count
from infer.engine.settings import Hidden
from infer.engine.tree import Prefix, build_tree
from lora import LoRAConfig, add_lora
from model.attention import PlainAttend
from model.mask import Visible
from model.rotary import RopeScaling
from model.support.cli import UserError


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=12)
@given(prompts=trees(), new=st.integers(1, 14), reading=readings())
def test_greedy_equals_the_plain_model(kind, prompts, new, reading, tokenizer):
    window, chunk = reading
    model = windowed(kind, window)
    outs = Generator(model, tokenizer, chunk=chunk).generate(prompts, max_new_tokens=new)
    for prompt, out in zip(prompts, outs, strict=True):
        tokens, logprobs = plain_greedy(model, prompt, new, tokenizer.stop_ids)
        assert out.tokens == tokens
        assert torch.allclose(torch.tensor(out.logprobs), torch.tensor(logprobs), atol=1e-5)


@st.composite
def hidden_parts(draw, prompts) -> list[Hidden | None]:
    """Of some prompts a part that their ends do not see."""
    found: list[Hidden | None] = []
    for prompt in prompts:
        if len(prompt) < 3 or draw(st.booleans()):
            found.append(None)
            continue
        first, stop, after = sorted(draw(st.lists(st.integers(0, len(prompt) - 1), min_size=3, max_size=3)))
        found.append(Hidden(first, stop, after) if first < stop else None)
    return found


@pytest.mark.parametrize("kind", ["plain", "mixed"])
@settings(deadline=None, max_examples=25)
@given(data=st.data(), prompts=trees(), new=st.integers(1, 6), reading=readings())
def test_the_end_of_a_prompt_does_not_see_what_is_hidden_from_it(kind, data, prompts, new, reading, tokenizer):
    window, chunk = reading
    model, hidden = windowed(kind, window), data.draw(hidden_parts(prompts))
    each = [Settings(max_new_tokens=new, hidden=one) for one in hidden]
    outs = Generator(model, tokenizer, chunk=chunk).generate(prompts, each)
    for prompt, one, out in zip(prompts, hidden, outs, strict=True):
        with unseen(model, one):
            tokens, logprobs = plain_greedy(model, prompt, new, tokenizer.stop_ids)
        assert out.tokens == tokens
        assert torch.allclose(torch.tensor(out.logprobs), torch.tensor(logprobs), atol=1e-5)


@settings(deadline=None, max_examples=100)
@given(st.data(), trees())
def test_a_tree_spells_its_prompts(data, prompts):
    hidden = data.draw(hidden_parts(prompts))
    prefixes, branches = build_tree(prompts, hidden, joins=data.draw(st.booleans()))
    for branch in branches:
        one = hidden[branch.prompt]
        assert one is None or branch.start <= one.after, "tokens that do not see it are shared with some that do"
    assert sorted(branch.prompt for branch in branches) == list(range(len(prompts)))
    for row, branch in enumerate(branches):
        path = branch.parent.path() if branch.parent else []
        spelt = [t for prefix in path for t in prefix.tokens] + branch.tokens
        assert spelt == prompts[branch.prompt] and len(branch.tokens) >= 1
        assert {id(n) for n in prefixes if row in n.branches} == {id(n) for n in path}


def test_questions_share_their_note():
    note = list(range(200))
    prefixes, branches = build_tree([note + [7] * i + [9, i] for i in range(9)])
    assert [len(prefix.tokens) for prefix in prefixes][0] == 200
    assert sum(len(prefix.tokens) for prefix in prefixes) + sum(len(branch.tokens) for branch in branches) < 300
    for joins in (False, True):  # a branch's slots are those of the longest: beside others a single prompt keeps few
        _, (branch,) = build_tree([note], joins=joins)
        assert len(branch.tokens) == (1 if joins else 200)


@pytest.mark.parametrize("kind", ["full", "window"])
def test_text_far_beyond_the_window(kind, tokenizer):
    model = MODELS[kind]
    prompts = [[(3 * i) % 200 for i in range(150)], [(5 * i) % 200 for i in range(40)]]
    outs = Generator(model, tokenizer).generate(prompts, max_new_tokens=120)
    for prompt, out in zip(prompts, outs, strict=True):
        assert out.tokens == plain_greedy(model, prompt, 120, tokenizer.stop_ids)[0]


@pytest.mark.parametrize("chunk", [1, 25, 2048])
@pytest.mark.parametrize("count", [1, 3])  # a branch alone, or a prefix for each prompt
def test_a_window_bounds_what_is_held(count, chunk, tokenizer):
    """Of 150 tokens read and 100 written, the storage holds the window's keys and values, those of a chunk while it is
    read, and the room to grow."""
    generator, window, length = Generator(MODELS["window"], tokenizer, chunk=chunk), 7, 150
    prefixes, branches = build_tree([[(3 * i + 7 * n) % 200 for i in range(length)] for n in range(count)])
    cache = Cache(generator.engine, prefixes, branches)

    def slots(tensors):
        return max(tensor.untyped_storage().nbytes() for tensor in tensors) / (2 * 8 * 8)  # heads, their size, bytes

    assert len(prefixes) == (count if count > 1 else 0)
    assert all(slots([*prefix.keys, *prefix.values]) <= 2 * window for prefix in prefixes)

    def room(new):
        return count * (window + new + max(SPARE, (window + new) // 4))

    at_once = min(chunk, max(len(branch.tokens) for branch in branches))
    for start in range(0, length, at_once) if count == 1 else [0]:
        tokens_BT = torch.tensor([branch.tokens[start : start + at_once] for branch in branches])
        cache.step(tokens_BT, torch.tensor([at_once]))
        assert slots([*cache.keys, *cache.values]) <= room(at_once)
    for n in range(100):
        cache.step(torch.full((count, 1), n), torch.ones(count, dtype=torch.int64))
        assert slots([*cache.keys, *cache.values]) <= room(at_once)
    assert slots([*cache.keys, *cache.values]) <= room(1)


def test_the_cache_goes_with_its_request(tokenizer):
    """At once: nothing that was computed for a request waits for the collector of cycles."""
    generator, prompts = Generator(MODELS["full"], tokenizer), [[*range(100), n] for n in range(3)]
    gc.collect()
    gc.disable()
    try:
        generator.generate(prompts, max_new_tokens=3)
        assert not [found for found in gc.get_objects() if type(found) in (Cache, Prefix)]
    finally:
        gc.enable()


@settings(deadline=None, max_examples=20)
@given(
    period=st.integers(2, 30),
    prompts=st.integers(1, 4),
    hot=st.booleans(),
    further=st.sampled_from([None, 0.0, 1 / 64, 1 / 4, 1.0]),
)
def test_prompt_lookup_loses_nothing(period, prompts, hot, further, tokenizer):
    """Repeating prompts, where guesses abound: the same tokens with and without, greedy and sampled, whatever a further
    row is thought to take and so whenever requests guess (0: always; 1: never; None: as on this machine)."""
    for kind in ("full", "window"):
        asked = [[(11 * i + n) % period for i in range(60)] for n in range(prompts)]
        chosen = Settings(max_new_tokens=25, temperature=0.2 if hot else 0.0)
        model = MODELS[kind]
        guessing = Generator(model, tokenizer)
        guessing.row_cost = guessing.row_cost if further is None else further
        with_guesses = guessing.generate(asked, chosen)
        without = Generator(model, tokenizer, lookup=False).generate(asked, chosen)
        assert [out.tokens for out in with_guesses] == [out.tokens for out in without]


def test_guesses_come_true_on_repeated_text(tokenizer):
    model = tiny_model()
    tokens = Generator(model, tokenizer, lookup=False).generate([[1, 2, 3]], max_new_tokens=40)[0].tokens
    generator = Generator(model, tokenizer)
    steps = {}
    for further in (0.0, 1.0):
        generator.row_cost = further
        (state,) = generator.states([[1, 2, 3, *tokens, 1, 2, 3]], None, {"max_new_tokens": 30})
        steps[further] = sum(1 for _ in generator.run([state]))
        assert len(state.tokens) == 30
    assert steps[0.0] < 30 == steps[1.0]


@given(
    requests=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=9),
    further=st.floats(0, 1),
)
def test_guesses_are_checked_where_they_are_expected_to_pay(requests, further):
    """best_guess_count() against its definition: no other number of guesses gives more tokens a time, and none is taken
    for a gain below a tenth."""
    rates, known = zip(*requests, strict=True)
    N = len(requests)

    def gain(k):
        tokens = sum(sum(rate**i for i in range(min(k, n) + 1)) for rate, n in requests)
        return tokens / (1 + further * (N * (k + 1) - 1))

    best, chosen = max(gain(k) for k in range(8)), best_guess_count(rates, known, further)
    assert 0 <= chosen <= max(known)
    if chosen:
        assert gain(chosen) >= best * (1 - 1e-12) and gain(chosen) > 1.1 * gain(0)
    else:
        assert best <= 1.1 * gain(0) * (1 + 1e-12)
    assert best_guess_count([0.0] * N, known, further or 0.1) == 0 and best_guess_count(rates, known, 1.0) == 0


def test_a_request_whose_guesses_fail_stops_and_one_whose_guesses_come_true_goes_on(tokenizer):
    lookup = Lookup([1, 2, 3, 1, 2])
    assert lookup.guess(4) == [3, 1, 2] and best_guess_count([lookup.rate], [3], 1 / 8) > 0
    for wrong in range(20):  # the pair (1, 2) is never followed by what followed it before
        lookup.add([10 + wrong, 1, 2])
    assert best_guess_count([lookup.rate], [len(lookup.guess(4))], 1 / 8) == 0
    lookup.add([5, 6, 7, 8] * 8)
    assert lookup.rate > 0.8 and best_guess_count([lookup.rate], [len(lookup.guess(4))], 1 / 8) > 0


def test_prompts_longer_than_a_chunk(tokenizer):
    for kind in ("full", "window", "mixed"):
        prompts = [[(7 * i + n) % 200 for i in range(100)] for n in range(3)]
        outs = Generator(MODELS[kind], tokenizer, chunk=16).generate(prompts, max_new_tokens=6)
        for prompt, out in zip(prompts, outs, strict=True):
            assert out.tokens == plain_greedy(MODELS[kind], prompt, 6, tokenizer.stop_ids)[0]


@settings(deadline=None, max_examples=40)
@given(
    before=st.integers(0, 150),
    new=st.integers(1, 300),
    window=st.sampled_from([None, 1, 9, 130, 1000]),
    block_size=st.sampled_from([5, 64, 512]),
    amx=st.booleans(),
)
def test_reading_in_blocks_is_attention(before, new, window, block_size, amx):
    """causal() against the definition: to 1e-12 in fp64, in bf16 within twice the definition's own error there."""
    S, draw = before + new, torch.Generator().manual_seed(before * 1000 + new)
    q_HTK, k_GSK, v_GSK = (torch.randn(n, t, 8, generator=draw).bfloat16() for n, t in ((4, new), (2, S), (2, S)))
    position_1S = torch.arange(7, 7 + S)[None]
    visible = Visible((position_1S[:, before:], None), (position_1S, None), before)

    def both(dtype):
        q, k, v = (x.to(dtype) for x in (q_HTK, k_GSK, v_GSK))
        plain_HTK = PlainAttend()(q[None], k[None], v[None], visible, window)[0]
        out_THK = causal(q, k, v, 7 + before, position_1S[0], window, block_size)
        return plain_HTK.double(), out_THK.transpose(0, 1).double()

    plain_HTK, ours_HTK = both(torch.float64)
    assert torch.allclose(ours_HTK, plain_HTK, rtol=0, atol=1e-12 * float(plain_HTK.abs().max()))
    with pytest.MonkeyPatch.context() as patch:  # SDPA or explicit products
        patch.setattr("infer.engine.causal.has_amx", lambda: amx)
        off, ours_off = (float((out_HTK - plain_HTK).abs().mean()) for out_HTK in both(torch.bfloat16))
    assert ours_off <= 2 * off


def test_adapters_beside_the_weights_count(tokenizer):
    model = tiny_model()
    before = Generator(model, tokenizer).generate([[1, 2, 3]], max_new_tokens=8)[0]
    add_lora(model, LoRAConfig(r=4, alpha=64, target_modules="all-linear"), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    out = Generator(model, tokenizer).generate([[1, 2, 3]], max_new_tokens=8)[0]
    assert out.tokens == plain_greedy(model, [1, 2, 3], 8, tokenizer.stop_ids)[0]
    assert out.logprobs != before.logprobs


@pytest.mark.parametrize("kind", ["full", "window"])
@settings(deadline=None, max_examples=12)
@given(prompts=trees(), heat=st.sampled_from([0.3, 1.0, 3.0]), new=st.integers(1, 9), seed=st.integers(0, 99))
def test_sampling_does_not_depend_on_the_batch(kind, prompts, heat, new, seed, tokenizer):
    generator = Generator(MODELS[kind], tokenizer)
    chosen = Settings(max_new_tokens=new, temperature=heat, top_k=40, top_p=0.95, min_p=0.001)
    each = [replace(chosen, seed=seed + 5 * i, max_new_tokens=new + i) for i in range(len(prompts))]
    together = generator.generate(prompts, each)
    alone = [generator.generate([prompt], own)[0] for prompt, own in zip(prompts, each, strict=True)]
    assert [out.tokens for out in together] == [out.tokens for out in alone]


def drawn_alone(logits_V, one, random):
    """The definition of sampling, for one row."""
    probability_V, order_V = (logits_V.double() / one.temperature).softmax(-1).sort(descending=True, stable=True)
    keep_V = probability_V >= one.min_p * probability_V[0]
    if one.top_k:
        keep_V[one.top_k :] = False
    if one.top_p < 1:
        keep_V &= probability_V.cumsum(0) - probability_V < one.top_p
    keep_V &= probability_V > 0
    below_V = (probability_V * keep_V).cumsum(0)
    point = torch.rand((), dtype=torch.float64, generator=random) * below_V[-1]
    place = int((below_V <= point).sum())
    return int(order_V[min(place, int(keep_V.nonzero()[-1]))])


@settings(deadline=None, max_examples=60)
@given(
    each=st.lists(
        st.builds(
            Settings,
            temperature=st.sampled_from([0.01, 0.3, 1.0, 3.0]),
            top_k=st.sampled_from([0, 1, 5, 1000]),
            top_p=st.sampled_from([1, 1.0, 0.9, 0.3]),
            min_p=st.sampled_from([0, 0.01, 0.5, 1.0]),
            seed=st.integers(0, 99),
        ),
        min_size=1,
        max_size=5,
    ),
    steps=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_rows_are_drawn_together_as_each_alone(each, steps, seed):
    """Also where a constraint leaves few tokens, and where probabilities are equal."""
    random = torch.Generator().manual_seed(seed)
    states = [State([1], one) for one in each]
    seeded = [torch.Generator().manual_seed(one.seed) for one in each]
    for _ in range(steps):
        logits_BV = (4 * torch.randn(len(each), 50, generator=random)).round()
        logits_BV[0, 3:] = float("-inf")
        tokens = draw(logits_BV, [(state, []) for state in states]).tolist()
        assert tokens == [drawn_alone(*row) for row in zip(logits_BV, each, seeded, strict=True)]
        for state, token in zip(states, tokens, strict=True):
            state.tokens.append(token)


def test_sampling_depends_on_the_seed(tokenizer):
    generator = Generator(MODELS["full"], tokenizer)
    said = [generator.generate([[1, 2, 3]], max_new_tokens=12, temperature=1.0, seed=s)[0].tokens for s in (0, 0, 99)]
    assert said[0] == said[1] != said[2]


def test_sampling_draws_from_the_distribution(tokenizer):
    """Frequencies of the first token against softmax(logits / t), restricted to the three likeliest."""
    model, n = MODELS["full"], 600
    generator = Generator(model, tokenizer)
    outs = generator.generate([[5, 6, 7]] * n, max_new_tokens=1, temperature=2.0, top_k=3)
    values, tokens = (model(torch.tensor([[5, 6, 7]]))[0, -1] / 2).topk(3)
    for share, token_id in zip(values.softmax(-1).tolist(), tokens.tolist(), strict=True):
        seen = sum(out.tokens[0] == token_id for out in outs) / n
        assert abs(seen - share) < 4 * (share * (1 - share) / n) ** 0.5 + 1e-9
    assert {out.tokens[0] for out in outs} <= set(tokens.tolist())


def test_narrow_top_p_min_p_and_top_k_are_greedy(tokenizer):
    generator = Generator(MODELS["full"], tokenizer)
    greedy = generator.generate([[1, 2]], max_new_tokens=6)[0].tokens
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert generator.generate([[1, 2]], max_new_tokens=6, temperature=1.0, **narrow)[0].tokens == greedy
    for cold in (1e-300, 1e-320):  # logits over which overflow
        assert generator.generate([[1, 2]], max_new_tokens=6, temperature=cold)[0].tokens == greedy


class Steps:
    """A constraint that allows every token and counts the choices."""

    chosen = 0

    def allowed(self, tokens):
        self.chosen = len(tokens) + 1


def test_stop_strings_and_streaming(tokenizer):
    generator = Generator(MODELS["full"], tokenizer)
    whole = generator.generate(["tumor"], max_new_tokens=20)[0]
    stop = whole.text[4:6]
    cut = generator.generate(["tumor"], max_new_tokens=20, stop=(stop,))[0]
    assert cut.finish_reason == "stop_string" and cut.text == whole.text[: whole.text.index(stop)]
    assert "".join(generator.stream("tumor", max_new_tokens=20, stop=(stop,))) == cut.text
    for stops in ((), ("in",)):
        steps, pieces, arrived = Steps(), [], []
        for piece in generator.stream("tumor", max_new_tokens=20, stop=stops, constraint=steps):
            pieces.append(piece)
            arrived.append(steps.chosen)
        assert "".join(pieces) == whole.text
        assert arrived[0] < 20 and len(set(arrived)) > 5  # as they are chosen, not after the last


def test_the_end_token_ends(tokenizer):
    model = MODELS["full"]
    first = plain_greedy(model, [1, 2, 3], 5)[0]
    generator = Generator(model, tokenizer)
    generator.stop_ids = frozenset([first[2]])
    out = generator.generate([[1, 2, 3]], max_new_tokens=20)[0]
    assert out.finish_reason == "stop" and out.tokens == first[: first.index(first[2]) + 1]


def test_a_text_that_goes_round_in_circles_ends_and_says_why(tokenizer):
    """Without attention and feed-forward, a tied model says its last token again and again."""
    model = tiny_model(tie_word_embeddings=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    generator = Generator(model, tokenizer)
    for chosen, reason, length in ((True, "repetition", 12), (False, "length", 40)):
        (out,) = generator.generate([[1, 2, 3]], max_new_tokens=40, stop_cycles=chosen)
        assert (out.finish_reason, len(out.tokens), set(out.tokens)) == (reason, length, {3})


@given(st.lists(st.integers(0, 3), max_size=30))
def test_cycles_are_four_whole_turns(tokens):
    found = cycles(tokens)
    turns = any(
        len(tokens) >= max(4 * p, 12) and tokens[-max(4 * p, 12) :] == (tokens[-p:] * 12)[-max(4 * p, 12) :]
        for p in range(1, 17)
    )
    assert found == turns


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 2.0},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"stop": ("",)},
        {"stop": "text"},
        {"stop": None},
        {"stop": (5,)},
        {"stop": (b"x",)},
    ],
)
def test_settings_out_of_range(bad):
    with pytest.raises(UserError):
        Settings(**bad)


def test_prompts_that_cannot_be(tokenizer):
    generator = Generator(MODELS["full"], tokenizer)
    for prompts in ([[]], [[999]], [[1] * 4090], "text", None, 5, [5], [None], [["a"]], [[1.5]], [b""]):
        with pytest.raises(UserError):
            generator.generate(prompts)


def test_a_prompt_may_be_as_long_as_rotary_scaling_allows_and_longer_with_a_warning(tokenizer):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    model = tiny_model(rope_scaling=RopeScaling(**scaling), max_position_embeddings=16)
    generator = Generator(model, tokenizer)
    assert len(generator.generate([[3] * 60], max_new_tokens=4)[0].tokens) == 4
    with pytest.raises(UserError, match="64"):
        generator.generate([[3] * 61], max_new_tokens=4)
    with pytest.warns(UserWarning, match="beyond the 64 tokens"):
        longer = Generator(model, tokenizer, max_length=80)
    assert len(longer.generate([[3] * 76], max_new_tokens=4)[0].tokens) == 4
    with pytest.raises(UserError, match="80"):
        longer.generate([[3] * 77], max_new_tokens=4)


def test_with_dynamic_scaling_an_answer_does_not_depend_on_longer_prompts(tokenizer):
    model = tiny_model(rope_scaling=RopeScaling("dynamic", 4.0), max_position_embeddings=16)
    generator = Generator(model, tokenizer)
    (alone,), (beside, _) = (generator.generate(prompts, max_new_tokens=4) for prompts in ([[5]], [[5], [3] * 12]))
    assert alone.tokens == beside.tokens
    assert torch.allclose(torch.tensor(alone.logprobs), torch.tensor(beside.logprobs), atol=1e-5)
    with pytest.raises(UserError, match="exceeds the model's 16"):  # it would turn the other's positions too
        generator.generate([[5], [3] * 13], max_new_tokens=4)
    with pytest.raises(UserError, match="--max-length 17: .*dynamic"):
        Generator(model, tokenizer, max_length=17)


def test_settings_that_fit_no_prompts(tokenizer):
    generator = Generator(MODELS["full"], tokenizer)
    for wrong in ([], [Settings()], [Settings()] * 3, [Settings(), None], 5, "ab"):
        with pytest.raises(UserError, match="one for each of the 2 prompts"):
            generator.generate([[1], [2]], wrong)
    ids = generator.generate([torch.tensor([1, 2])], max_new_tokens=2)[0].tokens
    assert ids == generator.generate([[1, 2]], [Settings(2)])[0].tokens


def test_in_bf16_shared_prompts_are_as_near_to_fp64_as_the_plain_bf16_path(tokenizer):
    narrow, exact = (add_lora(tiny_model(dtype=torch.bfloat16), LoRAConfig(r=4, alpha=8), seed=3) for _ in range(2))
    for model in (narrow, exact):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    exact = exact.double()
    note = [(7 * n) % 240 for n in range(90)]
    prompts = [[*note, *range(start, start + 5)] for start in (1, 40, 80)]
    outs = Generator(narrow, tokenizer).generate(prompts, max_new_tokens=24)
    errors = torch.zeros(2, dtype=torch.float64)
    for prompt, out in zip(prompts, outs, strict=True):
        ids, place = torch.tensor([prompt + out.tokens]), slice(len(prompt) - 1, -1)
        truth, plain = (
            model(ids)[0, place].detach().double().log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
            for model in (exact, narrow)
        )
        ours = torch.tensor(out.logprobs, dtype=torch.float64)
        errors += torch.stack([(ours - truth).square().sum(), (plain - truth).square().sum()])
    assert errors[0] > 0 and errors[0].sqrt() <= 2 * errors[1].sqrt()
