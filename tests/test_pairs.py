"""Pairs of a sweep: settings against a baseline, seed by seed."""

from __future__ import annotations

import math
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from sweep_pairs import PairedRun, compare_pairs, pair_cells, parse_baseline
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
