"""Curves of F1 against corruption: the same questions at every rate, slopes and recoveries with their intervals."""

from __future__ import annotations

import pytest

from eval.questions import Question, f1_of
from eval.robustness.canaries import Canaries, run_canaries
from eval.robustness.curve import curve, recovery, text_table
from eval.robustness.labels import Labels, auc, ranking, run_labels
from eval.robustness.misspelling import Misspelling, run_misspelling
from model.support.cli import UserError
from model.support.files import write_jsonl


def asked(right: int, of: int = 20) -> list[Question]:
    """Twenty patients with a size and a diagnosis each; the first `right` are answered."""
    made = []
    for i in range(of):
        said = ("2.5 cm",) if i < right else ("nowhere",)
        made.append(Question(f"n{i}", f"p{i}", "tumor_size", ("2.5 cm",), said))
        made.append(Question(f"n{i}", f"p{i}", "diagnosis", ("lung cancer",), ("lung cancer",)))
        made.append(Question(f"n{i}", f"p{i}", "cancer_grade", (), ()))
    return made


def test_a_curve_holds_every_rates_figures_and_its_slope():
    part = curve({"plain": {0.0: asked(20), 0.1: asked(15), 0.2: asked(10)}, "repaired": {0.1: asked(18)}})
    plain = part["series"]["plain"]
    assert part["rates"] == plain["rates"] == [0.0, 0.1, 0.2] and part["series"]["repaired"]["rates"] == [0.1]
    assert [row["exact_match"]["f1"] for row in plain["phenotype"]] == [100, 75, 50]
    assert plain["slope"]["phenotype"]["slope"] == pytest.approx(-25)  # points for ten points of rate
    assert plain["slope"]["phenotype"]["low"] < -25 < plain["slope"]["phenotype"]["high"] < 0
    assert plain["slope"]["diagnosis"]["slope"] == pytest.approx(0)
    assert plain["phenotype, unanswerable"][0]["n"] == 20
    assert "  10%   75.0" in text_table(part)


def test_recovery_is_the_share_of_what_was_lost():
    found = recovery(asked(20), asked(10), asked(16))
    one = found["phenotype"]
    assert [one[key] for key in ("lost", "recovered", "share")] == pytest.approx([50, 30, 0.6])
    assert one["low"] > 0 and one["p"] < 0.05
    assert found["diagnosis"]["lost"] == 0 and found["diagnosis"]["share"] is None


def test_the_average_is_the_papers_mean_of_three():
    assert f1_of(Question("n", "p", "tumor_site", ("left lobe",), ("left lobe",)), "average_f1") == 100
    half = f1_of(Question("n", "p", "tumor_site", ("left upper lobe",), ("left lobe",)), "average_f1")
    assert 0 < half < 100


def test_loss_ranks_records_and_auc_is_the_chance_of_a_right_order():
    losses = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 3.0}
    assert ranking(losses) == ["b", "d", "c", "a"]
    assert auc(losses, {"b", "d"}) == 1 and auc(losses, {"a"}) == 0 and auc(losses, {"b"}) == pytest.approx(5 / 6)
    assert auc(losses, set()) is None


def test_mistakes_are_one_line_and_leave_nothing(tmp_path):
    write_jsonl(tmp_path / "bare.jsonl", [{"id": "a", "text": "t"}])
    base = {"weights": "w", "notes": tmp_path / "bare.jsonl", "out": tmp_path / "out"}
    with pytest.raises(UserError, match="must be among --rates"):
        Labels(recipe="r", data=tmp_path / "bare.jsonl", filter_rate=0.25, **base)
    with pytest.raises(UserError, match="between 0 and 1"):
        Labels(recipe="r", data=tmp_path / "bare.jsonl", rates=(0.0, 1.5), **base)
    with pytest.raises(UserError, match="same tenth of a percent"):  # they would share one adapter
        Labels(recipe="r", data=tmp_path / "bare.jsonl", rates=(0.0, 0.3001, 0.3), **base)
    with pytest.raises(UserError, match="same tenth of a percent"):
        Misspelling(lexicon=tmp_path / "bare.jsonl", rates=(0.0, 0.1, 0.1001), **base)
    for wrong in (
        {"phenotypes": {"tumor_size": "2 cm"}},
        {"phenotypes": {"tumor_size": ["2 cm"]}},
        {"phenotypes": []},
        {"phenotypes": {}, "diagnosis": "C61"},
    ):
        write_jsonl(tmp_path / "short.jsonl", [{"id": "a", "text": "t", **wrong}])
        with pytest.raises(UserError, match="short.jsonl:1: "):
            run_labels(Labels(recipe="r", data=tmp_path / "short.jsonl", filter_rate=0, **base))
    with pytest.raises(UserError, match="including 0"):
        Misspelling(lexicon=tmp_path / "bare.jsonl", rates=(0.1,), **base)
    with pytest.raises(UserError, match="'phenotypes'"):
        run_labels(Labels(recipe="r", data=tmp_path / "bare.jsonl", **base))
    with pytest.raises(UserError, match="give annotated notes"):
        run_misspelling(Misspelling(lexicon=tmp_path / "bare.jsonl", **base))
    full = {"id": "a", "text": "t", "phenotypes": {"tumor_size": [{"text": "t"}]}}
    write_jsonl(tmp_path / "full.jsonl", [full, {**full, "id": "b"}, {**full, "id": "c"}])
    given = {**base, "data": tmp_path / "full.jsonl"}
    with pytest.raises(UserError, match="bare.jsonl:1: no 'phenotypes'"):  # the test notes, before any tuning
        run_labels(Labels(recipe="r", **given))
    for run, options in (
        (run_labels, Labels(recipe="r.toml", **{**given, "notes": tmp_path / "full.jsonl"})),
        (run_canaries, Canaries("w", "r.toml", tmp_path / "full.jsonl", tmp_path / "out")),
    ):
        with pytest.raises(UserError, match="^r.toml: no such file; give a recipe"):
            run(options)
    write_jsonl(tmp_path / "lexicon.jsonl", [{"id": "a", "text": "t"}, {"id": "b", "text": 5}])
    with pytest.raises(UserError, match="lexicon.jsonl:2: 'text' is not text"):  # before the plain answers
        run_misspelling(Misspelling(lexicon=tmp_path / "lexicon.jsonl", **{**base, "notes": tmp_path / "full.jsonl"}))
    assert not (tmp_path / "out").exists()
