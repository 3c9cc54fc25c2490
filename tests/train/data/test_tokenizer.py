"""The trained tokenizer gives every text back as it was, and spells numbers digit by digit unless told otherwise."""

import random

import pytest

from model.support.cli import run
from model.support.files import write_jsonl
from model.text.tokenizer import Tokenizer
from train.data.tokenizer import Options, main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders of two tokenizers of the same notes, by what the command line says of digits."""
    folder, dice = tmp_path_factory.mktemp("tokenizer"), random.Random(0)
    words = "left right breast mass grade stage of the size margin node".split()
    write_jsonl(
        folder / "texts.jsonl",
        [{"text": f"{' '.join(dice.choices(words, k=6))} 2.5 cm, 12 mm, T2N0"} for _ in range(200)],
    )
    for name, more in (("split", []), ("again", []), ("joined", ["--no-split-digits"])):
        options = ["--texts", str(folder / "texts.jsonl"), "--vocab", "400", "--out", str(folder / name), *more]
        with pytest.raises(SystemExit) as ended:
            run(main, Options, options)
        assert ended.value.code == 0
    return folder


def pieces(tokenizer, text):
    return [tokenizer.decode([one]) for one in tokenizer.encode(text)]


def test_no_text_is_normalised_and_what_was_never_met_falls_to_bytes(made):
    tokenizer = Tokenizer.from_pretrained(made / "split")
    for text in ("left  breast,   2.5 cm ", "ﬁne ½ ① ﾃ e\u0301 Å", "日本 \U0001fa7a café", "# ? ###"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and 0 not in ids
    assert len(tokenizer.encode("日")) - len(tokenizer.encode("")) in (3, 4)  # its UTF-8 bytes, and a space before
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_a_digit_is_a_piece_unless_numbers_may_be_joined(made):
    split, joined = (Tokenizer.from_pretrained(made / name) for name in ("split", "joined"))
    assert [one for one in pieces(split, "size 12 mm and 2.5 cm") if any(map(str.isdigit, one))] == ["1", "2", "2", "5"]
    assert {"12", "2.5", "T2N0"} <= set(map(str.strip, pieces(joined, "size 12 mm, 2.5 cm, T2N0")))


def test_the_same_texts_and_options_give_the_same_file(made):
    split, again, joined = ((made / name / "tokenizer.model").read_bytes() for name in ("split", "again", "joined"))
    assert split == again != joined
