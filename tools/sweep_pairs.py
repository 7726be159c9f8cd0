"""Pairs of a sweep (`sweep.py --paired BASELINE`): each setting against a baseline, seed by seed.

Runs of one seed read the same data in the same order, so a difference of theirs has much less
spread than their scores. The runs must make equal steps, so training is limited by ITERATIONS and
not by the clock; a change that costs time shows as time per step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from run_statistics import paired
from sweep_space import Knob

LEAST_PAIRS = 3
STANDARD_ERRORS = 2.0  # a mean difference must be as many of them
HEAD = ("pairs", "mean difference", "standard error", "verdict", "time per step")


class PairedRun(NamedTuple):
    """What a pair needs of a finished run."""

    val_bpb: float
    steps: int
    train_s: float


@dataclass
class PairedResult:
    """A setting against the baseline, over the seeds that both have."""

    pairs: int
    mean: float  # of val_bpb, setting - baseline: below 0 is better
    standard_error: float  # nan with fewer than two pairs
    verdict: str
    step_time_ratio: float  # setting / baseline; nan if a run has no steps or no seconds


def parse_baseline(text: str, knobs: list[Knob]) -> dict[str, str]:
    """The setting that BASELINE names: NAME=value for every swept knob besides SEED.

    Raises ValueError, which says what is wrong.
    """
    swept = {knob.name: knob for knob in knobs if knob.name != "SEED"}
    given = dict(part.partition("=")[::2] for part in text.split(","))
    if given.keys() != swept.keys():
        raise ValueError(f"must name {','.join(f'{name}=value' for name in swept)}")
    for name, value in given.items():
        values = [str(v) for v in swept[name].values or ()]
        if value not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}")
    return given


def compare_pairs(
    setting: Mapping[str, PairedRun], baseline: Mapping[str, PairedRun]
) -> PairedResult:
    """Compares two settings whose runs are given by seed."""
    seeds = sorted(setting.keys() & baseline.keys())
    pairs = [(setting[seed], baseline[seed]) for seed in seeds]
    if not pairs:
        return PairedResult(0, math.nan, math.nan, "no pair yet", math.nan)
    test = paired(np.array([ours.val_bpb - theirs.val_bpb for ours, theirs in pairs]))
    error = math.nan if test["sd"] is None else test["sd"] / math.sqrt(len(pairs))
    ratio = time_per_step([a for a, _ in pairs]) / time_per_step([b for _, b in pairs])

    mean = test["mean"]
    if any(ours.steps != theirs.steps for ours, theirs in pairs):
        verdict = "steps differ"
    elif len(pairs) < LEAST_PAIRS:
        verdict = f"fewer than {LEAST_PAIRS} pairs"
    elif abs(mean) <= STANDARD_ERRORS * error:
        verdict = "undecided"
    else:
        verdict = "better" if mean < 0 else "worse"
    return PairedResult(len(pairs), mean, error, verdict, ratio)


def time_per_step(runs: list[PairedRun]) -> float:
    """Seconds of training per step over some runs; nan without steps or seconds."""
    steps = sum(run.steps for run in runs)
    seconds = sum(run.train_s for run in runs)
    return seconds / steps if steps and seconds else math.nan


def pair_cells(result: PairedResult) -> list[str]:
    """The cells of HEAD."""
    if not result.pairs:
        return ["0", "", "", result.verdict, ""]
    error = "" if math.isnan(result.standard_error) else f"{result.standard_error:.5f}"
    time = ""
    if not math.isnan(result.step_time_ratio):
        time = f"{100 * (result.step_time_ratio - 1):+.1f} %"
    return [str(result.pairs), f"{result.mean:+.5f}", error, result.verdict, time]
