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
from run_statistics import ALPHA, MOST_RUNS, paired, pairs_needed
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


def closing_sentence(scores: Mapping[str, Mapping[str, float]], baseline: str = "") -> str:
    """What a sweep has shown: the best setting, p of its lead, and the seeds that would show it.

    scores: setting in words -> val_bpb by seed, the best mean first. The lead is over `baseline`
    or, without one, over the second best. p is multiplied by the number of settings that the best
    one was chosen among (Bonferroni), because the best of many leads by chance.
    """
    scored = {name: by_seed for name, by_seed in scores.items() if by_seed}
    if len(scored) < 2:
        names = ", ".join(scored) or "no setting"
        return f"{names} came through: there is nothing to compare"
    best, second = list(scored)[:2]
    other = baseline if baseline in scored and baseline != best else second
    seeds = scored[best].keys() & scored[other].keys()
    leads = np.array([scored[other][seed] - scored[best][seed] for seed in sorted(seeds)])
    if len(leads) < 2:
        return f"{best} has the best score, but one run a setting shows no p: add seeds, SEED=0,1,2"
    test = paired(leads)
    lead = leads.mean()
    if lead >= 0:
        head = f"{best} is best, {lead:+.5f} bpb ahead of {other}"
    else:
        # The means are of all runs, and one of these settings lacks a seed of the other's.
        head = f"{best} has the best mean, but in common seeds is {-lead:.5f} bpb behind {other}"
    if "p_better" not in test:
        return f"{head} in all of {len(leads)} seeds alike: no spread, no p"
    chosen_among = len(scored) - 1
    p = min(1.0, test["p_better"] * chosen_among)
    needed = pairs_needed(test["mean"], test["sd"], ALPHA / chosen_among)
    if p < ALPHA:
        verdict = f"shown at {ALPHA}"
    elif needed:
        verdict = f"not shown at {ALPHA}; {needed} seeds a setting would show it"
    elif lead > 0:
        verdict = f"not shown at {ALPHA}; more than {MOST_RUNS:,} seeds would be needed"
    else:
        verdict = f"not shown at {ALPHA}; the seeds that both have show no lead"
    among = f", times {chosen_among} settings it was chosen among" if chosen_among > 1 else ""
    return f"{head}: p {p:.2g} ({len(leads)} seeds, paired, one-sided{among}), {verdict}"


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
