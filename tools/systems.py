"""Systems side by side (`report.py --compare`): a table with a row per preset over its seeds.

Presets and knobs may differ between the rows; code, data, machine and budget of training must not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from claims import NOT_OF_THE_CLAIM, broken_limits, check_claim, score_problems
from run_statistics import mean_and_sd
from runlog import FACTS, STAGES, Run
from tables import DASH, markdown_table, show

from train_gpt import UsageError

BEGIN = "<!-- compare:begin -->"
END = "<!-- compare:end -->"


class System(NamedTuple):
    """A public system that a preset rebuilds."""

    name: str
    parts: str  # what it has
    published: str  # its published val_bpb


# By preset, in the order of the table.
SYSTEMS = {
    "pr1530": System(
        "#1530",
        "attention within documents, layers 3–5 looped, two lanes from 8, XSA, leaky², GPTQ; "
        "adapts a LoRA per document",
        "1.07336",
    ),
    "pr1560": System("#1560", "the same, warm-down over 0.75, chunks of 48", "1.07406"),
    "pr1413": System(
        "#1413",
        "shuffled rows, layers 4–5 looped, no lanes, XSA, leaky², GPTQ; sliding window; "
        "adapts by SGD, chunk by chunk",
        "1.08279",
    ),
    "pr473": System(
        "#473",
        "rows, no loops, bigram hash, SmearGate, value embedding, XSA in 4 layers, relu², "
        "GPTQ-lite; sliding window; adapts by SGD, chunk by chunk",
        "1.12139",
    ),
    "pr605": System(
        "#605",
        "rows, no loops, no XSA, whole RoPE, scaled branches, relu², SWA, pruning, int6; "
        "adapts a LoRA and biases per document, one pass",
        "about 1.15, legal form",
    ),
    "pr1855": System(
        "#1855",
        "#1530 with gates on attention and embedding, Polar Express, finer GPTQ; "
        "adapts a LoRA per document with warm start, all weights in three phases",
        "1.06108, with CaseOps",
    ),
    "pr2014": System(
        "#2014",
        "#1855 with segments and windows that grow to 3,072, short chunks, no adapters on q and v; "
        "one phase",
        "1.05759, with CaseOps",
    ),
    "pr2135": System(
        "#2135",
        "#1855 with windows of 2,560, no adapters on k, more calibration; one phase",
        "1.05651, with CaseOps and token tilt",
    ),
    "record": System(
        "this entry",
        "#2135 with steps by row and by column, chosen by what an error costs",
        DASH,
    ),
}
PUBLISHED_WITH = (
    "published: FineWeb, 8 x H100, 600 s of training, mean of three seeds, "
    "vocabulary 1024 for #473 and #605, else 8192; "
    "#605 printed 0.7227 with a second pass, which was ruled out"
)


def comparison_block(runs: list[Run], left_out: list[str], date: str | None) -> str:
    """The block between its marks: the table, what it was measured with, and what is wrong with it.

    `date` is the day of the runs, if it is known: the logs of a sweep do not name it, and their
    files have the clone's. Raises UsageError where the runs cannot stand in one table.
    """
    groups = group_by_system(runs)
    kinds = [kind for kind in STAGES if any(run.score_of(kind) for run in runs)]
    head = [
        "system",
        "what it has",
        "published",
        "runs",
        *(STAGES[kind] for kind in kinds),
        "artifact + code",
        "training s",
        "evaluation s",
        "steps",
        "ms/step",
    ]
    rows = [system_row(name, group, kinds) for name, group in groups.items()]
    notes = [measured_with(runs[0], date), PUBLISHED_WITH]
    notes += [f"left out: {reason}" for reason in left_out]
    for run in runs:
        notes += [f"{run.label}: over the limit: {text}" for text in broken_limits(run)]
    for run in runs:
        notes += [f"{run.label}: INVALID: {text}" for text in score_problems(run)]
    lines = [BEGIN, markdown_table(head, rows), "", *(f"- {note}" for note in notes), END]
    return "\n".join(lines)


def measured_with(run: Run, date: str | None) -> str:
    """The line on data, budget, machine and code, which are the same for all runs."""
    facts = run.facts
    targets = run.sizes.get("val_tokens", 0)
    budget = f"{training_budget(run)} each"
    if run.config.get("shrink") == "True":
        budget += ", SHRINK=1: small widths, short windows"
    machine = f"{facts.get('world_size', '?')} x {facts.get('device', '?')}"
    machine += f", torch {facts.get('torch', '?')}"
    when = f"; {date}" if date else ""
    code = str(facts.get("code_sha256", "?"))[:12]
    return (
        f"measured: {facts.get('dataset')}, {targets:,} validation targets; "
        f"{budget}; {machine}{when}; code {code}"
    )


def training_budget(run: Run) -> str:
    """What ends the run's training: a number of seconds or, without a clock, of steps."""
    seconds = float(run.config.get("max_wallclock_seconds", 0))
    if seconds:
        return f"{seconds:g} s of training"
    return f"{run.config.get('iterations')} steps of {run.config.get('train_batch_tokens')} tokens"


def preset_of(run: Run) -> str:
    """The preset's name; a run with SHRINK=1 says "NAME shrunk"."""
    return str(run.facts.get("preset")).removesuffix(" shrunk")


# === Rows =========================================================================================


def group_by_system(runs: list[Run]) -> dict[str, list[Run]]:
    """Preset and knobs that were set for it alone -> its runs, in the order of SYSTEMS.

    Raises UsageError unless all else is the same, and unless the runs of a row are one claim.
    """
    refuse_other_conditions(runs)
    own_knobs = knobs_not_set_alike(runs)
    unknown = sorted({preset_of(run) for run in runs} - SYSTEMS.keys())
    order = [*SYSTEMS, *unknown]
    groups: dict[str, list[Run]] = {}
    for preset in order:
        for run in runs:
            if preset_of(run) == preset:
                knobs = [f"{k.upper()}={run.config[k]}" for k in own_knobs if k in run.given]
                groups.setdefault(" ".join([preset, *knobs]), []).append(run)
    for group in groups.values():
        check_claim(group, mixed=False)
    return groups


def refuse_other_conditions(runs: list[Run]) -> None:
    """Raises UsageError if budget, size, share of the documents, code, data or machine differ."""
    problems = []
    names = [name for name in FACTS if name != "preset"]
    for name in ("budget", "shrink", "val_doc_fraction", *names):
        values = dict.fromkeys(condition(run, name) for run in runs)
        if len(values) > 1:
            problems.append(f"{name}: {', '.join(values)}")
    if problems:
        raise UsageError(f"cannot stand in one table, {'; '.join(problems)}")


def condition(run: Run, name: str) -> str:
    """What must be the same for all runs of a table, as text; of a hash the first 12 digits."""
    if name == "budget":
        return training_budget(run)
    if name in ("shrink", "val_doc_fraction"):
        return str(run.config.get(name))
    text = str(run.facts.get(name))
    return text[:12] if "sha256" in name else text


def knobs_not_set_alike(runs: list[Run]) -> list[str]:
    """The knobs that the environment of one run had set, but not the same for all."""
    names = set().union(*(run.given for run in runs)) - NOT_OF_THE_CLAIM - {"preset"}
    differing = []
    for name in sorted(names):
        values = {run.config.get(name) if name in run.given else None for run in runs}
        if len(values) > 1:
            differing.append(name)
    return differing


def system_row(name: str, runs: list[Run], kinds: list[str]) -> list[str]:
    """The cells of a row, whose name is a preset and the knobs that were set for it alone."""
    preset, *knobs = name.split(" ")
    system = SYSTEMS.get(preset, System(f"`{preset}`", "", DASH))
    if knobs:
        parts = f"{system.parts}; here `{' '.join(knobs)}`"
        system = System(system.name, parts, DASH)
    scores = [mean_score(runs, kind) for kind in kinds]
    return [
        *system,
        str(len(runs)),
        *scores,
        mean_of((run.sizes.get("artifact_bytes") for run in runs), ",.0f"),
        mean_of((run.budget_seconds("train") for run in runs), ".1f"),
        mean_of((run.budget_seconds("eval") for run in runs), ".1f"),
        mean_of((run.steps for run in runs), ".0f"),
        mean_of((run.step_avg_ms for run in runs), ".1f"),
    ]


def mean_score(runs: list[Run], kind: str) -> str:
    """Mean of the runs' scores of a kind, with the deviation where there is one."""
    scores = [run.score_of(kind) for run in runs]
    values = [score.bpb for score in scores if score]
    if not values:
        return DASH
    spread = mean_and_sd(values)
    if spread.sd is None:
        return f"{spread.mean:.5f}"
    return f"{spread.mean:.5f} ± {spread.sd:.5f}"


def mean_of(values: Iterable[float | None], form: str) -> str:
    """Mean of the values that are known, in a format."""
    known = [value for value in values if value is not None]
    return show(mean_and_sd(known).mean if known else None, form)
