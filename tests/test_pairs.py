"""Pairs of a sweep: settings against a baseline, seed by seed."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from conftest import ROOT

stats = pytest.importorskip("scipy").stats
sys.path.insert(0, str(ROOT / "tools"))

import sweep
from run_statistics import pairs_needed
from sweep_pairs import PairedRun, closing_sentence, compare_pairs, pair_cells, parse_baseline
from sweep_space import Knob

KNOBS = [Knob.parse(text) for text in ("SEED=0,1,2", "MATRIX_LR=0.01,0.02", "MIN_LR=0,0.1")]


def runs(*scores: float, steps: int = 100, seconds: float = 50.0) -> dict[str, PairedRun]:
    """A run per seed."""
    return {str(seed): PairedRun(bpb, steps, seconds) for seed, bpb in enumerate(scores)}


def test_difference_is_of_runs_of_one_seed_and_its_error_is_theirs_alone():
    """Seeds differ by 0.5, the settings by 0.01, always alike."""
    result = compare_pairs(runs(1.0, 1.5, 2.0, 9.0), runs(1.01, 1.512, 2.008))
    assert result.pairs == 3
    assert result.mean == pytest.approx(-0.01)
    assert result.standard_error == pytest.approx(0.002 / math.sqrt(3))
    assert result.verdict == "better"
    assert pair_cells(result)[:4] == ["3", "-0.01000", "0.00115", "better"]


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ((1.1, 1.11, 1.09), "worse"),
        ((0.9, 0.91, 0.89), "better"),
        ((1.02, 0.99, 1.0), "undecided"),
        ((0.9, 0.9), "fewer than 3 pairs"),
        ((), "no pair yet"),
    ],
)
def test_verdict_asks_for_three_pairs_and_two_standard_errors(scores, verdict):
    assert compare_pairs(runs(*scores), runs(1.0, 1.0, 1.0)).verdict == verdict


def test_equal_scores_are_undecided():
    assert compare_pairs(runs(1.0, 2.0, 3.0), runs(1.0, 2.0, 3.0)).verdict == "undecided"


def test_unequal_steps_are_no_pair():
    found = compare_pairs(runs(0.9, 0.9, 0.9, steps=99), runs(1.0, 1.0, 1.0))
    assert found.verdict == "steps differ"


def test_cost_is_the_time_of_a_step():
    found = compare_pairs(runs(1.0, 1.0, seconds=55.0), runs(1.0, 1.1))
    assert pair_cells(found)[-1] == "+10.0 %"
    assert pair_cells(compare_pairs(runs(1.0, seconds=0.0), runs(1.0)))[-1] == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("MATRIX_LR=0.01", "must name MATRIX_LR=value,MIN_LR=value"),
        ("MATRIX_LR=0.01,MIN_LR=0.5", "MIN_LR must be one of 0, 0.1"),
        ("SEED=0,MATRIX_LR=0.01,MIN_LR=0", "must name"),
    ],
)
def test_baseline_must_be_one_setting_of_the_grid(text, said):
    with pytest.raises(ValueError, match=said):
        parse_baseline(text, KNOBS)


def test_baseline_is_a_setting():
    wanted = {"MIN_LR": "0.1", "MATRIX_LR": "0.02"}
    assert parse_baseline("MIN_LR=0.1,MATRIX_LR=0.02", KNOBS) == wanted


# === The sentence at the end of a sweep ===========================================================
def by_seed(*scores: float) -> dict[str, float]:
    return {str(seed): score for seed, score in enumerate(scores)}


def test_a_sweep_ends_in_a_sentence_with_p_and_the_seeds_it_takes():
    scores = {"A=1": by_seed(2.00, 2.03, 2.01), "A=2": by_seed(2.01, 2.03, 2.04)}
    leads = np.array([0.01, 0.0, 0.03])
    p = stats.ttest_1samp(leads, 0, alternative="greater").pvalue
    needed = pairs_needed(leads.mean(), leads.std(ddof=1))
    assert closing_sentence(scores) == (
        f"A=1 is best, +0.01333 bpb ahead of A=2: p {p:.2g} (3 seeds, paired, one-sided), "
        f"not shown at 0.01; {needed} seeds a setting would show it"
    )


def test_the_best_of_many_settings_needs_a_smaller_p():
    scores = {f"A={i}": by_seed(2 + i, 2.02 + i, 2.01 + i * 1.01) for i in range(5)}
    text = closing_sentence(scores)
    p = stats.ttest_1samp([1, 1, 1.01], 0, alternative="greater").pvalue
    assert f"p {4 * p:.2g} (3 seeds, paired, one-sided, times 4 settings" in text
    assert text.endswith("shown at 0.01")


def test_a_baseline_takes_the_place_of_the_second_best():
    scores = {"A=1": by_seed(1, 1.1), "A=2": by_seed(2, 2.2), "A=3": by_seed(3, 3.3)}
    assert "ahead of A=3: " in closing_sentence(scores, "A=3")
    assert "ahead of A=2: " in closing_sentence(scores, "A=1")


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ({"A=1": {"0": 1.0}, "A=2": {"0": 2.0}}, "one run a setting shows no p: add seeds"),
        ({"A=1": by_seed(1, 2), "A=2": {}}, "A=1 came through: there is nothing to compare"),
        ({"A=1": by_seed(1, 2), "A=2": by_seed(2, 3)}, "in all of 2 seeds alike: no spread"),
    ],
)
def test_what_a_sweep_cannot_show_is_said(scores, words):
    assert words in closing_sentence(scores)


def test_a_lead_too_small_for_any_affordable_number_of_seeds_is_still_a_lead():
    scores = {"A=1": by_seed(2.0, 2.1), "A=2": by_seed(2.1001, 2.0001)}
    text = closing_sentence(scores)
    assert "+0.00010 bpb ahead of A=2" in text
    assert text.endswith("more than 10,000 seeds would be needed")


def test_the_best_mean_may_be_behind_in_the_seeds_that_both_settings_have():
    scores = {"A=1": by_seed(2.0, 2.2, 1.0), "A=2": by_seed(1.9, 2.1999)}
    text = closing_sentence(scores)
    assert text.startswith("A=1 has the best mean, but in common seeds is 0.05005 bpb behind A=2:")
    assert text.endswith("the seeds that both have show no lead")


def test_the_pairs_needed_have_the_power_they_promise():
    effect, sd = 0.013, 0.015
    pairs = pairs_needed(effect, sd)
    draws = np.random.default_rng(0).normal(effect, sd, (4000, pairs))
    shown = stats.ttest_1samp(draws, 0, axis=1, alternative="greater").pvalue < 0.01
    assert 0.78 < shown.mean() < 0.9
    assert pairs_needed(0, sd) is None


def test_a_table_has_a_column_for_every_knob_that_varies_and_for_no_other():
    rows = [
        sweep.SettingRow({"MATRIX_LR": rate, "PRESET": "cpu", "COMPILE": "0"})
        for rate in ("0.02", "0.03")
    ]
    assert sweep.varied(rows) == ["MATRIX_LR"]
    assert sweep.varied(rows[:1]) == ["MATRIX_LR", "PRESET", "COMPILE"]
    assert sweep.varied([]) == []
    assert sweep.all_columns(rows) == ["MATRIX_LR", *sweep.RESULT_COLUMNS]
