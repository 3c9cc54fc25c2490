"""An alternative answer is the second choice at one step and then greedy; asking for it changes no answer."""

import copy
from dataclasses import replace

import pytest
import torch
from answering_models import tiny_model

from infer import tasks
from infer.engine.generate import Generator, RequestBatch, Settings
from infer.extract.alternatives import second_choices
from infer.extract.ask import Asker, Limits
from infer.extract.notes import Note
from infer.extract.schedule import Schedule, Work

NOTES = [Note(str(n), f"Left breast {n}, 2.{n} cm, grade 2. ER positive; PR negative.") for n in range(3)]


def ask(tokenizer, alternatives, grounded=True, limit=1500):
    generator = Generator(tiny_model(), tokenizer)
    asker = Asker(
        generator, "both", "template", Limits(limit, 8, 20), "windows", grounded, batch=2, alternatives=alternatives
    )
    return asker.records(NOTES)


def entries(record):
    return [*record["phenotypes"].values(), record["diagnosis"]]


@pytest.mark.parametrize("grounded", [True, False])
def test_answers_are_the_same_with_alternatives_and_without(tokenizer, grounded):
    plain, more = ask(tokenizer, 0, grounded), ask(tokenizer, 2, grounded)
    found = []
    for record in more:
        for answer in entries(record):
            found += answer["alternatives"]
            logprobs = [one["logprob"] for one in answer["alternatives"]]
            assert len(logprobs) <= 2 and logprobs == sorted(logprobs, reverse=True)
            own = {answer.get("text"), "; ".join(value["text"] for value in answer.get("answers", ()))}
            assert not own & {one["text"] for one in answer["alternatives"]}
            del answer["alternatives"]
    assert len(found) > 5 and more == plain


def test_a_grounded_alternative_is_an_answer_that_the_grammar_allows(tokenizer):
    for note, record in zip(NOTES, ask(tokenizer, 3), strict=True):
        for name, answer in record["phenotypes"].items():
            for value in (one for other in answer["alternatives"] for one in tasks.parse_answer(other["text"])):
                closed = tasks.PHENOTYPES[name].values
                assert value in closed if closed else value in " ".join(note.text.split())


@pytest.mark.parametrize("lookup", [True, False])
def test_a_second_choice_is_the_second_likeliest_token_and_then_greedy(tokenizer, lookup):
    model = tiny_model()
    generator = Generator(model, tokenizer, lookup=lookup)
    prompts = [[5, 6, 7, 5, 6, 7, 5, 6], list(range(40, 60))]
    states = generator.states(prompts, Settings(max_new_tokens=6, runner_up=True), {})
    for _ in generator.run(states):
        pass
    for state in states:
        assert len(state.runner_ups) == len(state.tokens) == 6
        logits_TV = model(torch.tensor([[*state.prompt, *state.tokens]]))[0][len(state.prompt) - 1 : -1]
        logprobs_TV = logits_TV.log_softmax(-1)
        top = logprobs_TV.topk(2)
        assert [token for token, _ in state.runner_ups] == top.indices[:, 1].tolist()
        assert torch.allclose(torch.tensor([logprob for _, logprob in state.runner_ups]).double(), top.values[:, 1])
        totals = [float(top.values[:n, 0].sum() + top.values[n, 1]) for n in range(6)]
        best = max(range(6), key=totals.__getitem__)
        (one,) = second_choices(generator, copy.copy(state), 1)
        forced = [*state.tokens[:best], state.runner_ups[best][0]]
        assert one.tokens == forced and sum(one.logprobs) == pytest.approx(totals[best], abs=1e-9)
        for _ in generator.run([one]):
            pass
        greedy = generator.generate([[*state.prompt, *forced]], max_new_tokens=7 - len(forced))[0].tokens
        assert one.tokens == [*forced, *greedy[: 6 - len(forced)]]


class Counting(RequestBatch):
    """A RequestBatch that keeps the largest number of requests in the cache."""

    most = 0

    def add(self, states):
        super().add(states)
        self.most = max(self.most, len(self.held))


@pytest.mark.parametrize("questions", [None, [f"What is said {'and ' * 60}of {n}?" for n in range(6)]])
def test_alternatives_take_no_more_rows_than_the_answers(tokenizer, questions):
    """Long questions count as several, and each round has at most one diagnosis a note."""
    most = []
    for alternatives in (0, 4):
        generator = Generator(tiny_model(), tokenizer)
        asker = Asker(
            generator, "both", "template", Limits(1500, 8, 20), "error", True, batch=1, alternatives=alternatives
        )
        batch = Counting(generator)
        notes = [replace(note, questions=tuple(questions or ())) for note in NOTES]
        works = (Work(asker.work(note)) for note in notes)
        records = Schedule(batch, 1, asker.max_questions, lambda: None).results(works)
        assert not any("error" in record for record in records)
        most.append(batch.most)
    assert most[1] <= most[0] and (questions is None or most[0] < 6)


def test_drafts_for_an_alternative_know_its_tokens_once(tokenizer):
    generator = Generator(tiny_model(), tokenizer)
    (state,) = generator.states([[1, 2, *range(50, 60), 1, 2]], Settings(max_new_tokens=20, runner_up=True), {})
    for _ in generator.run([state]):
        pass
    for one in second_choices(generator, state, 8):
        if one.finish is None:
            generator.row_cost = 0.0  # guess always
            generator.guess([one])
            assert one.lookup.ids == one.prompt and generator.result(replace(one, finish="stop")).prompt_tokens == 14


def test_a_note_that_is_not_read_whole_has_no_alternatives(tokenizer):
    note = Note("long", " ".join(f"word {n}." for n in range(400)))
    for long in ("windows", "truncate"):
        asker = Asker(
            Generator(tiny_model(), tokenizer), "both", "template", Limits(400, 4, 4), long, True, alternatives=1
        )
        (record,) = asker.records([note])
        assert "long" in record and all("alternatives" not in answer for answer in entries(record))


def test_alternatives_end_where_an_answer_has_no_more(tokenizer):
    """10**9 rounds would not end."""
    assert ask(tokenizer, 10**9) == ask(tokenizer, 100)
