"""What several runs may claim together: one code, one configuration, one text, true denominators.

A claim is a set of runs that differ in their seed alone. `check_claim` refuses any other set,
`score_problems` finds edited logs and scores whose bytes cannot be right, and `check_texts` refuses
to compare scores of different validation texts.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
from pathlib import Path
from typing import NamedTuple

from canonical import (
    BYTES_TOLERANCE,
    PUBLISHED_SETS,
    TOKENS_TOLERANCE,
    TRUNCATED_CASEOPS_TOKENS,
    ValidationSet,
)
from edits import edits_of_run
from runlog import (
    BOOKKEEPING,
    LogError,
    Run,
    Score,
    implied_bytes_per_token,
    read_runs,
    rounding_of_implied_bytes,
)

from train_gpt import LIMIT_BYTES, UsageError

# Settings that may differ between the seeds of one claim.
NOT_OF_THE_CLAIM = BOOKKEEPING | {"seed", "rank", "local_rank", "is_main_process"}


# === Which runs there are =========================================================================


class FinishedRuns(NamedTuple):
    """The runs of some logs, and why other logs were left out."""

    runs: list[Run]
    left_out: list[str]


def read_finished(paths: list[Path]) -> FinishedRuns:
    """Reads logs, leaving out those of no finished run. Raises UsageError if that leaves none."""
    runs = []
    left_out = []
    for path in paths:
        try:
            runs += read_runs(path)
        except LogError as error:
            left_out.append(f"{path}: {error}")
    if left_out and not runs:
        raise UsageError(left_out[0])
    return FinishedRuns(runs, left_out)


# === One claim ====================================================================================


def differences(runs: list[Run]) -> dict[str, list[str]]:
    """Name -> each run's value, for every fact and setting that is not the same in all runs."""
    names: dict[str, None] = {}
    for run in runs:
        names |= dict.fromkeys(run.facts) | dict.fromkeys(run.config)
    differing = {}
    for name in names:
        values = [comparable_value(run, name) for run in runs]
        if name not in NOT_OF_THE_CLAIM and len(set(values)) > 1:
            differing[name] = values
    return differing


def comparable_value(run: Run, name: str) -> str:
    """A fact or setting as text: numbers in one form, hashes cut short, paths without folders."""
    text = str(run.facts.get(name, run.config.get(name, "-")))
    if "sha256" in name:
        return text[:12]
    with contextlib.suppress(ValueError):
        return format(float(text), ".12g")
    return Path(text).name if "/" in text and name != "code_size" else text


def check_claim(runs: list[Run], mixed: bool) -> dict[str, list[str]]:
    """Raises UsageError unless the runs are seeds of one claim, each seed once.

    With `mixed` takes them all the same, except a log that is given twice, and names each run's
    group by the values that differ. Returns the differences.
    """
    refuse_equal_logs(runs)
    if not mixed:
        refuse_unknown_settings(runs)
    differing = differences(runs)
    if differing and not mixed:
        shown = (
            f"{name}: {', '.join(dict.fromkeys(values))}" for name, values in differing.items()
        )
        remedy = "--mixed takes them all the same"
        fraction, *others = {run.config.get("val_doc_fraction", "1.0") for run in runs}
        if set(differing) == {"val_sha256"} and not others and fraction not in ("1", "1.0"):
            reason = f"VAL_DOC_FRACTION={fraction} draws other documents for every seed"
            remedy = f"{reason}; {remedy}"
        raise UsageError(
            f"not seeds of one claim, {runs[0].source} and others: {'; '.join(shown)}; {remedy}"
        )
    if not mixed:
        refuse_repeated_seeds(runs)
    for i, run in enumerate(runs):
        words = []
        for name, values in differing.items():
            shown_name = name.upper() if name in run.config else name
            words.append(f"{shown_name}={values[i]}")
        run.group = " ".join(words)
    return differing


def group_by_configuration(runs: list[Run]) -> list[list[Run]]:
    """The runs of each code and configuration, newest first, and within it the newest run first.

    Names each run's group: its preset and the knobs that its user had set, and the code or what
    else differs where that does not tell two groups apart.
    """
    differing = differences(runs)
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in sorted(runs, key=age_order, reverse=True):
        key = tuple(comparable_value(run, name) for name in differing)
        groups.setdefault(key, []).append(run)
    names = [configuration_name(members[0]) for members in groups.values()]
    for name, (key, members) in zip(names, groups.items(), strict=True):
        full_name = name
        if names.count(name) > 1:
            values = dict(zip(differing, key, strict=True))
            full_name = f"{name} {distinction(values)}"
        for run in members:
            run.group = full_name
    return list(groups.values())


def age_order(run: Run) -> str:
    """Sorts runs by age, those that tell none by the time of their file."""
    written = datetime.datetime.fromtimestamp(run.path.stat().st_mtime)
    return run.started or written.strftime("%Y-%m-%d %H:%M")


def configuration_name(run: Run) -> str:
    """Preset and data of a run and the knobs that its user had set."""
    words = [str(run.facts.get("preset", "")), str(run.facts.get("dataset", ""))]
    for name in sorted(run.given - NOT_OF_THE_CLAIM - {"preset", "dataset"}):
        words.append(f"{name.upper()}={run.config[name]}")
    return " ".join(filter(None, words)) or "unknown"


def distinction(values: dict[str, str]) -> str:
    """What tells a group from others of its name: its code, and else the first knobs."""
    if "code_sha256" in values:
        return f"code {values['code_sha256'][:7]}"
    return " ".join(f"{name}={value}" for name, value in list(values.items())[:3])


def without_copies(runs: list[Run]) -> list[Run]:
    """The runs, each once: a kept log may be a copy of one that is still in logs/."""
    return list({run.digest: run for run in runs}.values())


def refuse_equal_logs(runs: list[Run]) -> None:
    """Raises UsageError if a log is given twice, which would count one run as two.

    Encoding, compression and prefixes of the lines make no other log of it.
    """
    source_of_digest: dict[str, str] = {}
    for run in runs:
        if run.digest in source_of_digest:
            raise UsageError(f"{run.source}: is the same log as {source_of_digest[run.digest]}")
        source_of_digest[run.digest] = run.source


def refuse_unknown_settings(runs: list[Run]) -> None:
    """Raises UsageError if a log among several tells no settings: they may have been any."""
    for run in runs if len(runs) > 1 else []:
        if not run.final and not run.config.keys() - NOT_OF_THE_CLAIM:
            raise UsageError(
                f"{run.source}: tells no settings, so nothing shows that it belongs to one claim "
                "with the others; --mixed takes them all the same"
            )


def refuse_repeated_seeds(runs: list[Run]) -> None:
    """Raises UsageError if two logs are of one seed."""
    seeds = [run.seed for run in runs if run.seed is not None]
    for seed in seeds:
        if seeds.count(seed) > 1:
            paths = ", ".join(run.source for run in runs if run.seed == seed)
            raise UsageError(
                f"seed {seed}: is in more than one log ({paths}); --mixed takes them all the same"
            )


def broken_limits(run: Run) -> list[str]:
    """Which limits of time and bytes the run broke, in words."""
    broken = []
    for budget, limit in run.limits.items():
        seconds = run.budget_seconds(budget) or 0
        if 0 < limit < seconds:
            broken.append(f"{budget} {seconds:.1f} s of {limit:g}")
    size = run.sizes.get("artifact_bytes", 0)
    if size > LIMIT_BYTES:
        broken.append(f"{size:,} bytes of {LIMIT_BYTES:,}")
    return broken


# === The denominator of a score ===================================================================


class Denominator(NamedTuple):
    """The bytes per token that a score implies, and those it should."""

    implied: float
    expected: float  # nan where nothing is known
    known: ValidationSet | None = None  # the published set that was scored, if it is one
    tolerance: float = BYTES_TOLERANCE  # share by which a true figure may be off, digits aside

    @property
    def ratio(self) -> float:
        """Implied over expected bytes."""
        return self.implied / self.expected

    @property
    def source(self) -> str:
        """Whose figure `expected` is."""
        if self.known:
            return f"canonical {self.known.name}"
        return "no known set" if math.isnan(self.expected) else "the run's own val_bytes"


def denominator(run: Run, score: Score) -> Denominator:
    """Compares what loss and bpb imply with the published set of the run, or with its own bytes.

    A published set is known by its number of tokens or else by its name. It counts by its own
    number of tokens or by the run's, whichever fits better: some logs drop a tail, and some
    tokenise a little differently. Where a log does not tell the number, that may be.
    """
    implied = implied_bytes_per_token(score)
    targets = run.sizes.get("val_tokens")
    same_size = [known for known in PUBLISHED_SETS if targets and has_size(known, targets)]
    same_name = [known for known in PUBLISHED_SETS if is_named(known, run.facts.get("dataset"))]
    if same_size:
        known = same_size[0]
        expected = nearest([known.bytes_per_token, known.text_bytes / targets], implied)
        return Denominator(implied, expected, known)
    if same_name:
        known = same_name[0]
        tolerance = BYTES_TOLERANCE if targets else TOKENS_TOLERANCE
        return Denominator(implied, known.bytes_per_token, known, tolerance)
    if targets and run.sizes.get("val_bytes"):
        return Denominator(implied, run.sizes["val_bytes"] / targets)

    off = [abs(known.bytes_per_token / implied - 1) for known in PUBLISHED_SETS]
    known = PUBLISHED_SETS[off.index(min(off))]
    if min(off) < BYTES_TOLERANCE:
        return Denominator(implied, known.bytes_per_token, known)
    return Denominator(implied, math.nan)


def has_size(known: ValidationSet, targets: int) -> bool:
    """Whether so many scored tokens are those of a published set, a lost tail aside."""
    return abs(targets / known.targets - 1) < TOKENS_TOLERANCE


def is_named(known: ValidationSet, dataset: str | None) -> bool:
    """Whether a data set has the name of a published one."""
    return dataset == f"fineweb10B_{known.name}"


def nearest(candidates: list[float], value: float) -> float:
    """The candidate that is nearest to a value."""
    distances = [abs(candidate - value) for candidate in candidates]
    return candidates[distances.index(min(distances))]


def score_problems(run: Run) -> list[str]:
    """What is wrong with the run's log and the denominators of its scores; empty if nothing is."""
    problems = edits_of_run(run)
    for score in run.scores:
        bytes_ = denominator(run, score)
        tolerance = bytes_.tolerance + rounding_of_implied_bytes(score)
        if abs(bytes_.ratio - 1) > tolerance:
            problems.append(
                f"{score.label}: implies {bytes_.implied:.5f} bytes a token, "
                f"x{bytes_.ratio:.4f} of {bytes_.source}, {bytes_.expected:.5f}"
            )

    targets = run.sizes.get("val_tokens")
    dataset = str(run.facts.get("dataset", ""))
    complete = next((known for known in PUBLISHED_SETS if is_named(known, dataset)), None)
    if complete and targets and targets < complete.targets * (1 - TOKENS_TOLERANCE):
        share = targets / complete.targets
        problems.append(f"covers {targets:,} validation tokens, {share:.1%} of {dataset}")
    if targets and abs(targets - TRUNCATED_CASEOPS_TOKENS) <= 1:
        problems.append(
            f"covers {targets:,} validation tokens, a copy of the set that was cut off (PR #2071)"
        )
    if "val_bpb" in run.final and run.final["val_bpb"] != run.score.bpb:
        problems.append(
            f"final val_bpb {run.final['val_bpb']} is not that of the last score, {run.score.label}"
        )
    return problems


class BytesVerdict(NamedTuple):
    """Whether the last score of a run counts the right bytes, for report.py and audit.py alike."""

    passed: bool | None  # None where nothing is known of the text
    evidence: str
    implied: float  # bytes of the whole text or, where the log tells no tokens, of one token
    ratio: float  # implied over expected bytes; nan where nothing is known
    is_known_text: bool  # whether the text is a published set; else the log can only fit itself


def judge_bytes(run: Run) -> BytesVerdict:
    """Compares the bytes that the last score implies with those that the text has."""
    bytes_ = denominator(run, run.score)
    targets = run.sizes.get("val_tokens", 1)
    unit = "bytes" if "val_tokens" in run.sizes else "bytes a token"
    form = ",.0f" if "val_tokens" in run.sizes else ".5f"
    implied = bytes_.implied * targets
    evidence = f"val_bpb {run.score.bpb} implies {implied:{form}} {unit}"
    problems = score_problems(run)
    passed: bool | None = not problems
    if math.isnan(bytes_.expected):
        evidence += "; the text is none of the known sets"
        if "val_tokens" in run.sizes:
            evidence += f", which have other numbers of tokens than {targets:,}"
        passed = False if problems else None
    else:
        slack = bytes_.tolerance + rounding_of_implied_bytes(run.score)
        evidence += f", {bytes_.expected * targets:{form}} by {bytes_.source}: "
        evidence += f"factor {bytes_.ratio:.6f} (+- {slack:.0e})"
    others = [problem for problem in problems if not problem.startswith(f"{run.score.label}: ")]
    evidence = "; ".join([evidence, *others])
    return BytesVerdict(passed, evidence, implied, bytes_.ratio, bytes_.known is not None)


# === One validation text ==========================================================================


class ValidationText(NamedTuple):
    """What a log tells about the text that was scored."""

    path: Path
    sha256: str  # of the tokens; "?" where the log does not say
    dataset: str
    num_bytes: float | None

    def __str__(self) -> str:
        size = f" of {self.num_bytes:,.0f} bytes" if self.num_bytes else ""
        return f"{self.path} {self.dataset}{size}"


def validation_text(run: Run) -> ValidationText:
    """The text of the run's score."""
    sha256 = str(run.facts.get("val_sha256", "?"))
    return ValidationText(run.path, sha256, str(run.facts.get("dataset", "?")), text_bytes(run))


def text_bytes(run: Run) -> float | None:
    """Bytes of the validation text, as far as a log tells."""
    bytes_ = denominator(run, run.score)
    targets = run.sizes.get("val_tokens")
    if targets:
        per_token = bytes_.implied if math.isnan(bytes_.expected) else bytes_.expected
        return run.sizes.get("val_bytes") or targets * per_token
    return float(bytes_.known.text_bytes) if bytes_.known else None


def are_same_text(a: ValidationText, b: ValidationText) -> bool:
    """Whether two texts are one.

    They are told apart by their bytes, because tokenizers and lost tails change tokens only.
    """
    if a.sha256 == b.sha256 and a.sha256 != "?":
        return True
    if a.num_bytes and b.num_bytes:
        return abs(a.num_bytes / b.num_bytes - 1) <= TOKENS_TOLERANCE
    return a.dataset == b.dataset


def check_texts(new: list[Run], old: list[Run]) -> None:
    """Raises UsageError if a new and an old score are of different validation texts."""
    for a, b in itertools.product(map(validation_text, new), map(validation_text, old)):
        if not are_same_text(a, b):
            raise UsageError(f"not comparable, scores of different validation texts: {a}, {b}")
