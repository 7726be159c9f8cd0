"""New runs against a baseline: is the difference real, and is it a record? First as figures, then
in words.

A comparison is a dict that goes into the report's JSON and page as it is. Differences are
`old - new`, so that a positive one means that the new runs are better.
"""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

import numpy as np
from claims import differences
from run_documents import read_documents
from run_statistics import ALPHA, mean_and_sd, paired, smallest_visible_difference, welch
from runlog import FACTS, Run

UNITS = ("nats", "bpb")
BAR_NATS = 0.005  # per token: what a record must be better by
PRACTICE = 0.25  # the p that the public frontier has accepted

# Bytes per token of one tokenizer may differ by this share between two logs, tails being lost.
SAME_TOKENIZER = 1e-3


def score_in(run: Run, unit: str) -> float:
    """The run's score in nats per token or in bits per byte."""
    return run.score.loss if unit == "nats" else run.score.bpb


def summarise(runs: list[Run]) -> dict[str, Any]:
    """Mean and deviation in both units, and the difference to as many such runs that shows.

    `nats` is None over several tokenizers, whose tokens are not the same.
    """
    result: dict[str, Any] = {"runs": len(runs), "seeds": [run.seed for run in runs], "nats": None}
    for unit in UNITS if have_one_tokenizer(runs) else ("bpb",):
        spread = mean_and_sd([score_in(run, unit) for run in runs])
        resolves = None
        if spread.sd is not None:
            resolves = smallest_visible_difference(spread.sd, len(runs))
        result[unit] = {"mean": spread.mean, "sd": spread.sd, "resolves": resolves}
    return result


def have_one_tokenizer(runs: list[Run]) -> bool:
    """Whether a token is the same number of bytes in all runs, a lost tail aside."""
    sizes = [run.score.loss / run.score.bpb for run in runs]
    return max(sizes) / min(sizes) - 1 <= SAME_TOKENIZER


# === Pairs ========================================================================================


class Pair(NamedTuple):
    """A new and an old run that share their artifact or their seed."""

    new: Run
    old: Run


class Pairs(NamedTuple):
    """The pairs of two sets of runs."""

    shared: str  # "artifact", "seed" or ""
    pairs: list[Pair]


def pair_up(new: list[Run], old: list[Run]) -> Pairs:
    """Pairs runs of one artifact or, where there are none, of one seed.

    What stands more than once on a side makes no pair.
    """
    for shared in ("artifact", "seed"):
        new_by_key = unique_by(shared, new)
        old_by_key = unique_by(shared, old)
        common = sorted(key for key in new_by_key if key in old_by_key)
        if common:
            return Pairs(shared, [Pair(new_by_key[key], old_by_key[key]) for key in common])
    return Pairs("", [])


def unique_by(shared: str, runs: list[Run]) -> dict[Any, Run]:
    """Hash of the artifact, or seed -> the one run that has it."""
    if shared == "artifact":
        keys = [run.final.get("artifact_sha256") for run in runs]
    else:
        keys = [run.seed for run in runs]
    return {
        key: run
        for key, run in zip(keys, runs, strict=True)
        if key is not None and keys.count(key) == 1
    }


def compare_documents(pairs: list[Pair]) -> dict[str, Any] | None:
    """Differences per document, averaged over the pairs whose folders hold the same documents.

    None where no pair has them.
    """
    gains = []
    sizes = None
    for pair in pairs:
        new = read_documents(pair.new).arrays
        old = read_documents(pair.old).arrays
        if not new or not old:
            continue
        if sizes is None:
            sizes = new["doc_bytes"].astype(np.float64)
        are_same = np.array_equal(new["doc_bytes"], sizes)
        if are_same and np.array_equal(old["doc_bytes"], sizes):
            gains.append(old["doc_nats"].astype(np.float64) - new["doc_nats"])
    if not gains:
        return None

    gain = np.mean(gains, axis=0)
    result = paired(gain)
    # Nats of a document -> its part in the bits per byte of the whole text.
    bpb_per_nat = 1 / math.log(2) / sizes.mean()
    return {
        **result,
        "artifacts": len(gains),
        "bpb": result["mean"] * bpb_per_nat,
        "better": float((gain > 0).mean()),
        "se_bpb": (result["sd"] or 0.0) / math.sqrt(len(gain)) * bpb_per_nat,
    }


# === The comparison ===============================================================================


def compare(new: list[Run], old: list[Run]) -> dict[str, Any]:
    """Everything about `old - new`: unit by unit, by pairs and by documents; and what was changed.

    `nats` is None between two tokenizers, whose tokens are not the same.
    """
    shared, pairs = pair_up(new, old)
    bpb_per_nat = [bpb_of_a_nat(side) for side in (new, old)]
    result: dict[str, Any] = {
        "pair_by": shared,
        "documents": compare_documents(pairs),
        "nats": None,
    }
    if abs(bpb_per_nat[0] / bpb_per_nat[1] - 1) <= SAME_TOKENIZER:
        result["nats"] = compare_in("nats", new, old, pairs, BAR_NATS)
    # The bar is in nats per token, and what that is in bits per byte depends on the tokenizer.
    # Of two tokenizers the stricter counts.
    result["bpb"] = compare_in("bpb", new, old, pairs, BAR_NATS * max(bpb_per_nat))

    known_to_both = new[0].config.keys() & old[0].config.keys()
    result["changed"] = {
        name: values
        for name, values in differences([new[0], old[0]]).items()
        if name in known_to_both or name in FACTS
    }
    return result


def bpb_of_a_nat(runs: list[Run]) -> float:
    """Bits per byte that one nat per token makes, over some runs."""
    return statistics.fmean(run.score.bpb / run.score.loss for run in runs)


def compare_in(
    unit: str, new: list[Run], old: list[Run], pairs: list[Pair], bar: float
) -> dict[str, Any]:
    """The difference in one unit, Welch's test with `bar` and, where there are pairs, theirs."""
    new_scores = [score_in(run, unit) for run in new]
    old_scores = [score_in(run, unit) for run in old]
    gains = np.array([score_in(pair.old, unit) - score_in(pair.new, unit) for pair in pairs])
    return {
        "difference": statistics.fmean(old_scores) - statistics.fmean(new_scores),
        "bar": bar,
        "welch": welch(new_scores, old_scores, bar),
        "paired": paired(gains) if len(gains) else None,
    }


# === In words =====================================================================================


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 run", "2 runs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def mean_sentence(what: str, summary: dict[str, Any]) -> str:
    """The summary of some runs as a statement."""
    parts = [f"val_bpb {spread_text(summary['bpb'])}"]
    if summary["nats"]:
        parts.append(f"{spread_text(summary['nats'])} nats")
    else:
        parts.append("several tokenizers: no mean of nats")
    runs = "one run" if summary["runs"] == 1 else f"{summary['runs']} runs, ± is their deviation"
    return f"{what}: {', '.join(parts)} ({runs})"


def spread_text(spread: dict[str, float | None]) -> str:
    """A mean and its deviation, of which two digits are shown: 2.15 ± 0.14, 1.07336 ± 0.00085."""
    deviation = spread["sd"]
    if not deviation:
        return f"{spread['mean']:.5f}" + (" ± 0" if deviation == 0 else "")
    decimals = min(max(1 - math.floor(math.log10(deviation)), 2), 8)
    return f"{spread['mean']:.{decimals}f} ± {deviation:.{decimals}f}"


def visible_sentence(summary: dict[str, Any]) -> str | None:
    """The smallest difference that as many runs a side detect; None of a single run."""
    resolves = summary["bpb"]["resolves"]
    if resolves is None:
        return None
    return (
        f"with {summary['runs']} runs a side, differences above {resolves:.2g} bpb are detectable "
        f"(p < {ALPHA})"
    )


def verdict(comparison: dict[str, Any], new: int, old: int) -> list[str]:
    """The comparison of `new` with `old` runs in words, one statement a line."""
    by_unit = {unit: comparison[unit] for unit in UNITS if comparison[unit]}
    bpb = comparison["bpb"]
    word = "better" if bpb["difference"] > 0 else "worse"
    sizes = [f"{abs(x['difference']):.5f} {unit}" for unit, x in by_unit.items()]
    lines = [f"{word} by {', '.join(sizes)} ({count(new, 'run')} against {old})"]
    if "nats" not in by_unit:
        lines.append("another tokenizer: nats per token cannot be compared, bits per byte can")
    lines += welch_lines(by_unit, new)
    if bpb["paired"]:
        lines.append(pairs_line(by_unit, comparison["pair_by"]))
    if comparison["documents"]:
        lines.append(documents_line(comparison["documents"]))
    return lines


def welch_lines(by_unit: dict[str, dict[str, Any]], new: int) -> list[str]:
    """Welch's tests in words: both units two-sided, then the two bars in bits per byte."""
    bpb = by_unit["bpb"]
    if not bpb["welch"]:
        return ["Welch: needs two runs on each side, not all of one score"]

    tests = []
    for unit, figures in by_unit.items():
        test = figures["welch"]
        low, high = test["ci95"]
        tests.append(
            f"{unit}: t {test['t']:.3f}, df {test['df']:.2f}, p {test['p_two_sided']:.3g}, "
            f"95 % {low:+.5f} .. {high:+.5f}"
        )
    test = bpb["welch"]
    record = f"record bar, {BAR_NATS} nats = {bpb['bar']:.5f} bpb"
    return [
        f"Welch, two-sided, {'; '.join(tests)}",
        bar_line("better at all", test["p_better"], test["runs_for_better"], new),
        bar_line(record, test["p_record"], test["runs_for_record"], new),
    ]


def bar_line(title: str, p: float, needed: int | None, new: int) -> str:
    """Whether a bar is passed and, if not, how many runs a side would show the difference."""
    if p < ALPHA:
        return f"{title}: p {p:.3g} one-sided, passed"
    state = f"not passed at {ALPHA}"
    if p < PRACTICE:
        state += f" (passed at {PRACTICE})"
    enough = "no number of runs would show it"
    if needed:
        enough = f"{needed} runs a side would show it, {max(needed - new, 0)} more"
    return f"{title}: p {p:.3g} one-sided, {state}; {enough}"


def pairs_line(by_unit: dict[str, dict[str, Any]], shared: str) -> str:
    """The comparison pair by pair."""
    test = by_unit["bpb"]["paired"]
    gains = [f"{figures['paired']['mean']:+.6f} {unit}" for unit, figures in by_unit.items()]
    line = f"{count(test['pairs'], 'pair')} of one {shared}: better by {', '.join(gains)}"
    if "t" in test:
        line += f" (sd {test['sd']:.6f} bpb), t {test['t']:.3f}, p {test['p_better']:.3g} one-sided"
    return line


def documents_line(test: dict[str, Any]) -> str:
    """The comparison document by document."""
    line = (
        f"{test['pairs']:,} documents of {count(test['artifacts'], 'pair')}: "
        f"better by {test['bpb']:+.6f} bpb (standard error {test['se_bpb']:.6f}), "
        f"in {test['better']:.1%} of them"
    )
    if "t" in test:
        line += f", t {test['t']:.2f}, p {test['p_better']:.3g} one-sided"
    return line
