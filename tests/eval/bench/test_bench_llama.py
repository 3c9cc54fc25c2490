"""llama.cpp does the job that it is measured at: every question gets the answer that it gets by itself."""

import pytest

from eval.bench import llama
from infer.released import smollm2


@pytest.mark.slow
def test_answers_of_shared_sequences_are_those_of_whole_prompts():
    peer = pytest.importorskip("llama_cpp", reason="pip install -c constraints.txt -e .[bench] builds llama.cpp")
    file = str(smollm2())
    note, questions = [*range(100, 160)], [[*range(300, 305)], [*range(400, 409)], [500]]
    job = llama.Job(peer, file, 4)
    shared = job.answers(note, questions, 6)
    assert job.answers(note, questions, 6) == shared, "nothing is left of the note before"
    model = llama.opened(peer, file)
    for question, answer in zip(questions, shared, strict=True):
        model.reset()
        model.eval([*note, *question])
        for token in answer:
            assert model.sample(temp=0.0) == token
            model.eval([token])
