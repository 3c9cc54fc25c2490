"""What a record becomes: the sound form, and each switch of the paper's scripts by itself."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import RECIPE, as_recipe, mean_loss

from infer import tasks
from model.support.cli import UserError
from model.text.tokenizer import Tokenizer
from train.data.dataset import Rows
from train.data.records import note_texts, questions
from train.data.rows import ANSWER, IGNORE, collate, count, note_document
from train.data.store import build_store
from train.distributed.sharding import Ranks
from train.optim.optimizer import named_trainable
from train.recipe import encoding_of
from train.session import prepare


@pytest.fixture(scope="module")
def tokenizer(data):
    return Tokenizer.from_pretrained(data / "tok")


@pytest.fixture(scope="module")
def record(data):
    return json.loads((data / "notes.jsonl").read_text().splitlines()[0])


def texts(tokenizer, pieces):
    return [tokenizer.decode([int(i) for i in piece if i < 256]) for piece in pieces]


def test_the_note_comes_first_and_each_answer_ends(tokenizer, record):
    pieces = note_texts(tokenizer, "note-first", "both", append_eos=True)(record)
    found = texts(tokenizer, pieces)
    assert found[0] == tasks.prefix(record["text"]) and pieces[0][0] == tokenizer.bos_id
    size = record["phenotypes"]["tumor_size"][0]["text"]
    assert found[1:3] == [tasks.branch("What is the tumor size?"), f" {size}"]
    assert found[-2:] == [tasks.branch("What is the diagnosis?"), " Malignant neoplasm of breast (C50.9)"]
    assert len(found) == 1 + 2 * 4 and all(answer[-1] == tokenizer.eos_id for answer in pieces[2::2])


def test_without_an_end_no_answer_has_one(tokenizer, record):
    ended, open_ = (note_texts(tokenizer, "note-first", "both", append_eos=end)(record) for end in (True, False))
    assert [piece[:-1].tolist() for piece in ended[2::2]] == [piece.tolist() for piece in open_[2::2]]
    assert tokenizer.eos_id not in np.concatenate(open_)


def test_the_faithful_template_asks_before_the_note(tokenizer, record):
    pieces = note_texts(tokenizer, "faithful", "both", append_eos=False)(record)
    found = texts(tokenizer, pieces)
    assert len(pieces[0]) == 0 and all(prompt[0] == tokenizer.bos_id for prompt in pieces[1::2])
    for prompt, phenotype in zip(found[1::2], record["phenotypes"], strict=False):
        instruction, given = prompt.split("### Input:\n")
        assert tasks.PHENOTYPES[phenotype].question in instruction and record["text"] not in instruction
        assert given == f"{record['text']}\n\n### Response:\n"


@pytest.mark.parametrize(("which", "questions"), [("both", 4), ("phenotype", 3), ("diagnosis", 1)])
def test_the_questions_are_those_of_the_tasks(tokenizer, record, which, questions):
    assert len(note_texts(tokenizer, "note-first", which, append_eos=True)(record)) == 1 + 2 * questions


def test_a_note_without_a_cancer_has_no_diagnosis(tokenizer, record):
    encode = note_texts(tokenizer, "note-first", "diagnosis", append_eos=True)
    assert texts(tokenizer, encode({**record, "diagnosis": {"text": "not relevant"}}))[-1] == " not relevant"


def test_what_a_record_does_not_hold_is_not_asked_and_what_it_holds_in_another_form_is_named(tokenizer, record):
    encode = note_texts(tokenizer, "note-first", "both", append_eos=True)
    without = {key: value for key, value in record.items() if key != "diagnosis"}
    assert len(encode(without)) == len(encode(record)) - 2
    for wrong in (7, "C50.9", ["C50.9"], {"text": "Malignant neoplasm of breast"}, {"text": "a", "code": None}):
        with pytest.raises(ValueError, match="^'diagnosis' is not {'text': …, 'code': …}"):
            encode({**record, "diagnosis": wrong})
    for wrong in (7, "2 cm", ["2 cm"], [{"answer": "2 cm"}], [{"text": 2}], {"text": "2 cm"}):
        with pytest.raises(ValueError, match="^tumor_size is not a list of {'text': …}"):
            encode({**record, "phenotypes": {"tumor_size": wrong}})


def test_a_name_that_is_no_phenotype_s_is_not_quoted(record):
    with pytest.raises(ValueError, match="unknown name .did you mean 'tumor_size'[?].; there are hormone") as refused:
        questions({**record, "phenotypes": {"tumor size SECRET": []}}, "both")
    assert "SECRET" not in str(refused.value)


def test_a_loss_on_all_counts_note_and_prompts_too(notes):
    name, pieces = notes[0]
    document = note_document(name, pieces, loss_on="all")
    branches = [np.concatenate(pair)[1:] for pair in zip(pieces[1::2], pieces[2::2], strict=True)]
    supervised = np.concatenate([pieces[0][1:], *branches])
    assert document.target[document.target != IGNORE].tolist() == supervised.tolist()
    assert len(supervised) == len(document.tokens) - 1, "the note's last token has several successors, so none"


def test_a_recipe_trains_on_its_first_records_and_judges_on_its_first_held_out_rows(options, tmp_path):
    made = prepare(as_recipe(options, out=str(tmp_path), records=4, valid_rows=1), "instruct", Ranks())
    assert len(made.rows.store) == 4 and made.valid is not None and len(made.valid) > 1
    one = made.valid_loss()
    made.recipe = replace(made.recipe, valid_rows=len(made.valid))
    assert made.valid_loss() != one


def test_the_held_out_loss_is_the_mean_over_the_answers_of_its_rows(options, tmp_path):
    """Against the definition, in the middle of training. No two micro-batches have as many targets, so a mean of means
    is another number; the note's own targets are there, and count nowhere."""
    recipe = as_recipe(
        options,
        out=str(tmp_path),
        dtype="float64",
        dropout=0.3,
        valid_rows=5,
        batch_rows=2,
        micro_rows=2,
        note_loss=0.3,
    )
    made = prepare(recipe, "instruct", Ranks())
    generator = torch.Generator().manual_seed(0)
    for name, param in named_trainable(made.model).items():
        if "lora_B" in name:  # it begins at zero, where dropout changes nothing
            param.data.normal_(0.0, 0.3, generator=generator)
    made.gradients(0)
    found = made.valid_loss()
    rows = [made.valid[i] for i in range(5)]
    answers = [count(part)[ANSWER] for part in made.micro_batches(rows)[0]]
    assert len(set(answers)) == 3 and len(made.valid) > 5
    batch = collate(rows)
    with torch.no_grad():
        logits = made.model.eval()(batch.tokens, positions=batch.positions, layout=batch.layout)
    expected = mean_loss(logits, batch.target.where(batch.kind == ANSWER, IGNORE))
    assert found == pytest.approx(float(expected), rel=1e-12)


def test_switches_reach_the_rows(options, tmp_path):
    """Every switch of tuning at once, from a recipe to the tokens of a row."""
    recipe = as_recipe(
        options,
        out=str(tmp_path),
        template="faithful",
        share_prefix=False,
        append_eos=False,
        loss_on="all",
        packing="none",
        tasks="phenotype",
    )
    store = build_store(recipe.data, encoding_of(recipe, "instruct"), tmp_path / "store")
    rows = Rows(store, recipe, "instruct")
    assert len(rows) == 3 * len(store) and store.manifest["identity"]["template"] == "faithful"
    for row in (rows[i] for i in range(len(rows))):
        (document,) = row.documents
        assert (
            document.target == np.append(document.tokens[1:], document.target[-1])
        ).all() and 257 not in document.target
    with pytest.raises(UserError, match="set share_prefix = false"):
        replace(RECIPE, template="faithful", share_prefix=True)
