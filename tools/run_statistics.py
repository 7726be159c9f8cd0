"""Textbook statistics of runs: mean and deviation, Welch's test, pairs, and how many runs it takes.

Everything here is about plain numbers, one per run. Differences are `old - new`, so that a positive
one means that the new runs are better. scipy is imported only where a test needs it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

ALPHA = 0.01  # the p below which a difference counts as shown
POWER = 0.8  # the chance with which the needed number of runs shows a true difference
MOST_RUNS = 10_000  # no number of needed runs above this is told


class Spread(NamedTuple):
    """Mean and sample deviation (n - 1) of some values."""

    mean: float
    sd: float | None  # None of a single value


def mean_and_sd(values: Sequence[float]) -> Spread:
    """Mean and sample deviation of at least one value."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), sd)


def smallest_visible_difference(sd: float, runs: int, alpha: float = ALPHA) -> float:
    """The difference of means at which two sets of `runs` such runs give p = alpha, one-sided."""
    from scipy import stats

    return float(stats.t.isf(alpha, 2 * runs - 2) * sd * math.sqrt(2 / runs))


def runs_needed(
    effect: float, sd_a: float, sd_b: float, alpha: float = ALPHA, power: float = POWER
) -> int | None:
    """Runs a side with which a one-sided Welch test shows a true difference `effect`.

    None if that takes more than MOST_RUNS, or if the effect is not positive.
    """
    from scipy import stats

    if effect <= 0:
        return None
    if sd_a + sd_b == 0:
        return 2
    runs = np.arange(2, MOST_RUNS + 1)
    # Welch-Satterthwaite with the same number of runs on both sides.
    freedom = (runs - 1) * (sd_a**2 + sd_b**2) ** 2 / (sd_a**4 + sd_b**4)
    critical = stats.t.isf(alpha, freedom)
    noncentrality = effect / np.sqrt((sd_a**2 + sd_b**2) / runs)
    is_enough = stats.nct.sf(critical, freedom, noncentrality) >= power
    return int(runs[is_enough.argmax()]) if is_enough.any() else None


def pairs_needed(
    effect: float, sd: float, alpha: float = ALPHA, power: float = POWER
) -> int | None:
    """Pairs with which a one-sided t-test of differences shows a true mean `effect`.

    `sd` is the deviation of a difference. None if that takes more than MOST_RUNS, or if the effect
    is not positive.
    """
    from scipy import stats

    if effect <= 0:
        return None
    if sd == 0:
        return 2
    pairs = np.arange(2, MOST_RUNS + 1)
    critical = stats.t.isf(alpha, pairs - 1)
    is_enough = stats.nct.sf(critical, pairs - 1, effect * np.sqrt(pairs) / sd) >= power
    return int(pairs[is_enough.argmax()]) if is_enough.any() else None


def welch(new: Sequence[float], old: Sequence[float], bar: float) -> dict[str, Any] | None:
    """Welch's test of both one-sided hypotheses on `old - new`: above 0, and above `bar`.

    None without two values a side, or where no side has any spread.
    """
    from scipy import stats

    if min(len(new), len(old)) < 2 or len(set(new)) == len(set(old)) == 1:
        return None
    shifted = [value - bar for value in old]
    better = stats.ttest_ind(new, old, equal_var=False, alternative="less")
    record = stats.ttest_ind(new, shifted, equal_var=False, alternative="less")
    two_sided = stats.ttest_ind(new, old, equal_var=False)
    interval = two_sided.confidence_interval(0.95)
    gain = statistics.fmean(old) - statistics.fmean(new)
    deviations = (statistics.stdev(new), statistics.stdev(old))
    return {
        "t": float(two_sided.statistic),
        "df": float(two_sided.df),
        "p_two_sided": float(two_sided.pvalue),
        "ci95": [-interval.high, -interval.low],
        "p_better": float(better.pvalue),
        "p_record": float(record.pvalue),
        "runs_for_better": runs_needed(gain, *deviations),
        "runs_for_record": runs_needed(gain - bar, *deviations),
    }


def paired(differences: np.ndarray) -> dict[str, Any]:
    """The t-test of paired differences (n,); without t and p where they have no spread.

    Keys: pairs, mean, sd, and with a spread t, df, p_better (one-sided) and p_two_sided.
    """
    from scipy import stats

    pairs = len(differences)
    result: dict[str, Any] = {"pairs": pairs, "mean": float(differences.mean()), "sd": None}
    if pairs < 2:
        return result
    result["sd"] = float(differences.std(ddof=1))
    if result["sd"] > 0:
        test = stats.ttest_1samp(differences, 0.0, alternative="greater")
        result["t"] = float(test.statistic)
        result["df"] = pairs - 1
        result["p_better"] = float(test.pvalue)
        result["p_two_sided"] = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return result
