"""The simulated job asks what a job asks, and its clock adds up what each reading and step was measured to take."""

import pytest
from answering_models import tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from eval.bench.job import ForcedAsker, SimulatedBatch, between, clinic, simulated
from infer.engine.generate import Generator
from infer.extract.notes import Note


@given(st.dictionaries(st.integers(1, 600), st.floats(0.1, 9), min_size=2, max_size=5), st.integers(0, 900))
def test_a_cost_is_the_measured_one_or_between_its_neighbours(costs, size):
    found = between(costs, size)
    assert found == pytest.approx(costs[size]) if size in costs else found >= 0
    below, above = [n for n in costs if n < size], [n for n in costs if n > size]
    if below and above and size not in costs:
        near = costs[max(below)], costs[min(above)]
        assert min(near) - 1e-9 <= found <= max(near) + 1e-9
    assert between(costs, 0) == 0


def test_a_simulated_job_gives_the_notes_own_answers(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    told = {note["id"]: note for note in clinic(6)}
    asked = [Note(name, note["text"]) for name, note in told.items()]
    costs = {"read": {1: 1.0, 2: 2.0}, "read products": {1: 0.5, 2: 1.0}}
    costs |= {"step": {1: 1.0, 2: 1.0}, "step products": {1: 0.25, 2: 0.25}}
    clocks = {}
    for refilled in (True, False):
        generator = Generator(tiny_model(), tokenizer)
        clocks[refilled] = clock = SimulatedBatch(generator, costs)
        asker = ForcedAsker(generator, told, 4, clock)
        found = asker.records(asked[:2])
        for record, note in zip(found, told.values(), strict=False):
            assert note["diagnosis"]["text"] in record["diagnosis"]["text"]
            for name, one in record["phenotypes"].items():
                values = {value["text"] for value in note["phenotypes"].get(name, ())}
                assert {answer["text"] for answer in one["answers"]} == values
        before = clock.steps
        simulated(asker, asked, 4, refilled)
        assert clock.steps > before and not clock.active
        rest, products = clock.taken["the rest of a step"], clock.taken["products"]
        read = products - 0.25 * clock.steps  # half a second a token
        assert rest == pytest.approx(read + 0.75 * clock.steps) and read > 0
    assert clocks[True].row_steps == clocks[False].row_steps
