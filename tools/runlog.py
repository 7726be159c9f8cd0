"""Reads the logs of runs: those that train_gpt.py writes and those of the public records.

Ours: the source, a block `Hyperparameters:`, lines of steps and scores, the phase table, and one
last line `final {json}` with every figure. The public records print settings as such a block or as
`key:value` words, and scores as `LABEL val_loss:X val_bpb:Y`, whatever the label.

`read_runs` reads the runs of a log, each into a `Run`; logtext.py says where one begins and what a
line is. The smaller functions take a log's text and read one thing from it. What cannot be read
raises LogError, whose message does not name the file: callers do. Standard library only, so that
any program can import it at no cost.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import contradictions
from figures import read_figures
from logtext import LogError, plain_lines, read_text, split_runs

LIMIT_SECONDS = 600.0  # of training and, apart from it, of evaluation
SETTINGS_MARK = "Hyperparameters:"

# The facts of a final line that make two runs comparable: code, data and hardware.
FACTS = (
    "code_sha256",
    "dataset",
    "val_sha256",
    "tokenizer_sha256",
    "preset",
    "device",
    "torch",
    "world_size",
)

# Settings that say where a run lies and what it keeps and tells, not what it computes: neither a
# claim nor an evaluation depends on them. Published logs have other names for some.
BOOKKEEPING = {
    "run_id",
    "data_dir",
    "artifact_dir",
    "tensorboard_dir",
    "checkpoint_every",
    "wandb_project",
    "train_log_every",
    "eval_only_path",
    "logfile",
    "model_path",
    "quantized_model_path",
    "ttt_output_dir",
}
# What an evaluation sets against an environment that was made for training: there is nothing to go
# on from, and its figures go to nobody else.
KEEPS_NOTHING = {"CHECKPOINT_EVERY": "0", "WANDB_PROJECT": ""}

# Kinds of a score -> their names for readers, in the order of a run.
STAGES = {
    "before": "before quantisation",
    "after": "quantised",
    "sliding": "sliding window",
    "adapted": "adapted",
}

# A score is of the first kind whose word its label holds, else "after".
KIND_OF_WORD = {
    "ttt": "adapted",
    "sliding": "sliding",
    "pre-quant": "before",
    "post_ema": "before",
}


# === One thing from the text of a log =============================================================


def final_lines(text: str) -> list[dict[str, Any]]:
    """The figures of every line `final {json}`, in order; what no run writes is left out."""
    figures = []
    for line in plain_lines(text):
        if not line.startswith("final {"):
            continue
        try:
            figures.append(read_figures(line))
        except ValueError:
            continue
    return figures


def read_final(text: str) -> dict[str, Any]:
    """The figures of a finished run. Raises LogError unless one whole final line holds them."""
    plain = plain_lines(text)
    lines = [line for line in plain if line.startswith("final {")]
    if not lines:
        steps = [match[1] for match in map(STEP.match, plain) if match]
        reached = f"step {steps[-1]}" if steps else "no step"
        raise LogError(f"has 0 final lines: its run goes on or was stopped, at {reached} or later")
    if len(lines) > 1:
        raise LogError(f"has {len(lines)} final lines, the log of a finished run has one")
    try:
        return read_figures(lines[0])
    except ValueError as error:
        raise LogError(f"its final line is no JSON object of a run ({error})") from error


def source_at_head(log: bytes) -> bytes | None:
    """The source that our log begins with, None where a log has no block of settings.

    A resumed run prints its settings again but not its source, so the first block ends it.
    """
    source, mark, _ = log.partition(f"\n{SETTINGS_MARK}\n".encode())
    return source if mark else None


class Setting(NamedTuple):
    """A knob as a log shows it."""

    value: str
    origin: str  # "default", "preset", "env" or "measured"; "" where a published log does not say


SETTING = re.compile(r"^ {1,4}(\w+): ?(.*?)(?: \(([a-z]+)\))?$")
WORDS = re.compile(r"^\w+:\S+(?: \w+:\S+)*$")
ASSIGNED = re.compile(r"^\w+ ?= ?\S*(?: \w+=\S*)*$")
ASSIGNED_MARK = "--- Hyperparameters ---"
FIRST_STEP = re.compile(r"(warmup_)?step:|warmup:|\d+/\d+ ")

# A summary of the network, such as `params:73685840 L:10 d:768 h:8 kv:4 ws:8 ga:1 s:42`.
SUMMARY = re.compile(r"^(?:\S+ \| )?params:\d+ (.*)$")
SUMMARY_NAMES = {
    "L": "num_layers",
    "d": "model_dim",
    "h": "num_heads",
    "kv": "num_kv_heads",
    "mlp": "mlp_mult",
    "ga": "grad_accum_steps",
    "s": "seed",
}

# Words of a header that are no settings: what was counted, and the kind of a loader.
NO_SETTINGS = {"model_params", "params", "val_bpb", "val_loader", "ws", "world_size"}


def read_settings(text: str) -> dict[str, Setting]:
    """Field name -> setting, in any of the published forms.

    These are a block of `  name: value`, lines of `name=value` below a mark, and words `name:value`
    before the first step. The last block counts: a resumed run prints its own. The block says all;
    a line that sums up the network only adds the seed to it.
    """
    lines = plain_lines(text)
    words = settings_of_words(lines)
    block = {}
    if SETTINGS_MARK in lines:
        block = settings_of_block(lines)
    elif ASSIGNED_MARK in lines:
        block = settings_of_assignments(lines)
    if not block:
        return words
    if "seed" in words:
        block.setdefault("seed", words["seed"])
    return block


def settings_of_block(lines: list[str]) -> dict[str, Setting]:
    """The settings below the last mark: a resumed run has printed its own there."""
    start = len(lines) - lines[::-1].index(SETTINGS_MARK)
    settings = {}
    for line in lines[start:]:
        match = SETTING.match(line)
        if not match:
            break
        name, value, origin = match.groups(default="")
        settings[name] = Setting(value, origin)
    return settings


def settings_of_assignments(lines: list[str]) -> dict[str, Setting]:
    """The settings `name=value`, many or one a line, below the last mark."""
    start = len(lines) - lines[::-1].index(ASSIGNED_MARK)
    settings = {}
    for line in itertools.takewhile(ASSIGNED.match, lines[start:]):
        for name, value in re.findall(r"(\w+) ?= ?(\S*)", line):
            settings[name] = Setting(value, "")
    return settings


def settings_of_words(lines: list[str]) -> dict[str, Setting]:
    """The settings `name:value` of the header, whose `train_loader:dataset:NAME` names the data."""
    words: dict[str, str] = {}
    for line in itertools.takewhile(lambda line: not FIRST_STEP.match(line), lines):
        summary = SUMMARY.match(line)
        if summary:
            pairs = re.findall(r"(\w+):(\S+)", summary[1])
            words |= {SUMMARY_NAMES.get(name, name): value for name, value in pairs}
        elif WORDS.match(line):
            words |= dict(word.split(":", 1) for word in line.split(" "))
    loader = words.pop("train_loader", "")
    if ":" in loader:
        words["dataset"] = loader.split(":")[1]
    return {name: Setting(value, "") for name, value in words.items() if name not in NO_SETTINGS}


def evaluation_variables(text: str) -> dict[str, str]:
    """The environment that makes an evaluation that of a log's run."""
    return variables_of(read_settings(text))


def variables_of(settings: dict[str, Setting]) -> dict[str, str]:
    """The environment that makes an evaluation a run's: its preset and what was set or measured.

    Bookkeeping and paths are left out: they say where, not what.
    """
    variables = {}
    for name, setting in settings.items():
        is_place = name in BOOKKEEPING or name.endswith(("_dir", "_path"))
        is_given = setting.origin in ("env", "measured") and not is_place
        if name == "preset" or is_given:
            variables[name.upper()] = {"True": "1", "False": "0"}.get(setting.value, setting.value)
    return variables


class Phase(NamedTuple):
    """A phase of a run and what it counts against."""

    name: str
    seconds: float
    budget: str  # "train", "eval" or "none"


class BudgetTotal(NamedTuple):
    """The line of the phase table that sums up a budget."""

    budget: str  # "train" or "eval"
    seconds: float
    limit: float  # in seconds; 0 is no limit
    is_over: bool


PHASE = re.compile(r"^(\S.*?) +(\d+(?:\.\d+)?)  (train|eval|none)$")
TOTAL = re.compile(r"^all of (train|eval) +(\d+(?:\.\d+)?)  of (\d+)(, OVER)?")


def read_phase_table(text: str) -> list[Phase]:
    """The rows of the phase table at the end of our log."""
    phases = []
    for line in plain_lines(text):
        match = PHASE.match(line)
        if match:
            name, seconds, budget = match.groups()
            phases.append(Phase(name, float(seconds), budget))
    return phases


def read_budget_totals(text: str) -> list[BudgetTotal]:
    """The sums below the phase table."""
    totals = []
    for line in plain_lines(text):
        match = TOTAL.match(line)
        if match:
            budget, seconds, limit, over = match.groups()
            totals.append(BudgetTotal(budget, float(seconds), float(limit), over is not None))
    return totals


def implied_bytes_per_token(score: Score) -> float:
    """Bytes of text per token that a loss in nats per token and its bits per byte imply."""
    return score.loss / math.log(2) / score.bpb


def rounding_of_implied_bytes(score: Score) -> float:
    """The relative error of the implied bytes that rounding of the two figures may have made."""
    half_digit = 0.5 * 10.0**-score.decimals
    return half_digit / score.loss + half_digit / score.bpb


def evaluation_scores(text: str) -> list[float]:
    """Bits per byte of every line in which our run reports a finished evaluation, in order."""
    values = re.findall(r"^\S.*? val_loss:\S+ val_bpb:(\S+) eval_time", text, re.MULTILINE)
    return [float(bpb) for bpb in values]


def has_invalid_score(text: str) -> bool:
    """Whether a line of our run calls a score invalid."""
    return re.search(r"^\S.* INVALID: ", text, re.MULTILINE) is not None


def submission_sizes(text: str) -> list[int]:
    """Bytes of every line `Total submission size ..: N bytes`, in order."""
    sizes = re.findall(r"^Total submission size [^:]*: (\d+) bytes", text, re.MULTILINE)
    return [int(size) for size in sizes]


def log_of_run(folder: Path) -> Path:
    """Where a run that leaves its files in `folder` writes its log; neither need exist.

    That is logs/ID.txt beside runs/ID, and of a run of a sweep, runs/sweeps/NAME/0000, it is
    logs/NAME-0000.txt beside runs/.
    """
    folder = folder.absolute()
    if folder.match("runs/sweeps/*/*"):
        return folder.parents[3] / "logs" / f"{folder.parent.name}-{folder.name}.txt"
    return folder.parent.parent / "logs" / f"{folder.name}.txt"


def knobs_of_run(folder: Path) -> dict[str, str]:
    """The environment that makes an evaluation that of a folder's run; {} without its log.

    Raises LogError or OSError if it cannot be read.
    """
    log = log_of_run(folder)
    if not log.is_file():
        return {}
    return evaluation_variables(read_text(log))


# === A whole run ==================================================================================


class Score(NamedTuple):
    """One complete score of a run."""

    label: str
    loss: float  # nats per token
    bpb: float
    seconds: float | None  # that the evaluation took
    decimals: int  # of the printed figures

    @property
    def kind(self) -> str:
        """A key of STAGES."""
        for word, kind in KIND_OF_WORD.items():
            if word in self.label.lower():
                return kind
        return "after"


@dataclass(eq=False)
class Run:
    """All that a log says about a finished run."""

    path: Path
    seed: int | None
    settings: dict[str, Setting]  # by field name
    facts: dict[str, Any]  # what makes two runs comparable: code, data and hardware
    steps: int | None
    train_seconds: float | None
    scores: list[Score]  # in the order of the log, at least one
    phases: list[Phase]
    limits: dict[str, float]  # budget -> seconds
    sizes: dict[str, int]  # those of SIZES, val_bytes and val_docs, as far as they are known
    points: list[dict[str, float]]  # step, train_loss, val_bpb, seconds, lr_scale of step lines
    final: dict[str, Any]  # the figures of our final line, {} of a published log
    digest: str  # of the run's lines: two runs with one digest are the same run
    left_by_deadline: list[str] = field(default_factory=list)  # in words, by the last score
    warnings: list[str] = field(default_factory=list)  # what the log shows but nothing can use
    contradictions: list[str] = field(default_factory=list)  # what its lines say against another
    packed_source: str = ""  # the text at the head of the log, where a packed file has run
    part: int = 0  # the number of the run in its file, from 1; 0 where the file holds one run
    label: str = ""  # tells it from the other runs of a report
    group: str = ""  # the knobs that differ, where a report mixes configurations

    @property
    def config(self) -> dict[str, str]:
        """Field name -> value of every setting."""
        return {name: setting.value for name, setting in self.settings.items()}

    @property
    def given(self) -> set[str]:
        """The settings that came from the environment."""
        return {name for name, setting in self.settings.items() if setting.origin == "env"}

    @property
    def score(self) -> Score:
        """The last score, which is the one that counts."""
        return self.scores[-1]

    @property
    def source(self) -> str:
        """The file that the run was read from, and which of its runs this is."""
        return f"{self.path} (run {self.part})" if self.part else str(self.path)

    @property
    def started(self) -> str:
        """When the run began, as `YYYY-MM-DD HH:MM`, or its day; "" where nothing tells it.

        The name of the run begins with it or, of a kept log, that of the file.
        """
        for name in (str(self.final.get("run_id", "")), self.path.name):
            match = STARTED.match(name)
            if match:
                year, month, day, hour, minute = match.groups()
                return f"{year}-{month}-{day}" + (f" {hour}:{minute}" if hour else "")
        return ""

    @property
    def results(self) -> tuple:
        """What two readings of one run have in common, and two runs do not."""
        return (self.seed, self.steps, self.train_seconds, [score[1:3] for score in self.scores])

    @property
    def step_avg_ms(self) -> float | None:
        """Mean milliseconds of a training step."""
        if not self.train_seconds or not self.steps:
            return None
        return 1000 * self.train_seconds / self.steps

    @property
    def gain(self) -> float | None:
        """Bits per byte that adaptation won over the best plain score of the same weights."""
        plain = self.score_of("sliding") or self.score_of("after")
        adapted = self.score_of("adapted")
        return plain.bpb - adapted.bpb if plain and adapted else None

    def score_of(self, kind: str) -> Score | None:
        """The last score of a kind."""
        return next((score for score in reversed(self.scores) if score.kind == kind), None)

    def budget_seconds(self, budget: str) -> float | None:
        """Seconds spent on a budget; None if the log has no phase of it."""
        seconds = [phase.seconds for phase in self.phases if phase.budget == budget]
        return sum(seconds) if seconds else None


STARTED = re.compile(r"(\d{4})-?(\d\d)-?(\d\d)(?:-(\d\d)(\d\d)\d\d)?(?=_|-|\.|$)")


def read_runs(path: Path) -> list[Run]:
    """The finished runs of a log file, in order. Raises LogError if it holds none.

    A run that a file holds twice, as of its terminal and of its own log, is one run. The first run
    has a warning for every run that was left out.
    """
    return runs_of_text(path, read_text(path))


def runs_of_text(path: Path, text: str) -> list[Run]:
    """The finished runs of a log's text, as `read_runs` gives them; `path` is where it is from."""
    parts = split_runs(plain_lines(text))
    if len(parts) == 1:
        return [with_source(run_of_lines(path, parts[0]), text)]
    runs = []
    reasons = []
    for number, lines in enumerate(parts, start=1):
        try:
            run = run_of_lines(path, lines)
        except LogError as error:
            reasons.append(f"run {number} of the {len(parts)} in this file {error}")
            continue
        if any(run.results == other.results for other in runs):
            continue
        run.part = number
        runs.append(with_source(run, text) if number == 1 else run)
    if not runs:
        raise LogError(f"holds {len(parts)} runs and none that finished: {reasons[-1]}")
    runs[0].warnings += [f"left out: {reason}" for reason in reasons]
    if len(runs) == 1 and not reasons:
        runs[0].part = 0
    return runs


def read_run(path: Path) -> Run:
    """The run of a log file. Raises LogError if it is not the log of one finished run."""
    runs = read_runs(path)
    if len(runs) > 1:
        raise LogError(f"holds {len(runs)} finished runs, not one")
    return runs[0]


def run_of_text(path: Path, text: str) -> Run:
    """The run of a log's text; `path` is where it came from. Raises LogError as `read_run` does."""
    return with_source(run_of_lines(path, plain_lines(text)), text)


def with_source(run: Run, text: str) -> Run:
    """The run, after the source at the head of its log was held against the log's own hash."""
    # An editor or a version control may have changed how lines end.
    log = text.replace("\r\n", "\n").encode(errors="replace")
    source = source_at_head(log) or b""
    if source.strip():
        run.contradictions += contradictions.in_source(source, run.final)
        if run.final and contradictions.is_packed(run.final):
            run.packed_source = source.decode()
    return run


def contradictions_of(lines: list[str], final: dict[str, Any]) -> list[str]:
    """What the lines of our run say against its final line; [] of a published log."""
    if not final:
        return []
    table = "\n".join(contradictions.last_table(lines))
    return [
        *contradictions.in_figures(lines, final),
        *contradictions.in_scores(lines, final),
        *contradictions.in_seconds(read_phase_table(table), read_budget_totals(table), final),
    ]


def run_of_lines(path: Path, lines: list[str]) -> Run:
    """The run that some lines of a log are about. Raises LogError if it did not finish."""
    text = "\n".join(lines)
    is_ours = any(line.startswith(("code_sha256: ", "final {")) for line in lines)
    final = read_final(text) if is_ours else {}
    settings = read_settings(text)
    points = read_points(lines, number_of(settings, "train_batch_tokens") or 0)
    scores = read_scores(lines, final)
    refuse_bad_scores(scores, lines, points)

    steps, train_seconds = read_training(lines, final, points)
    totals = {total.budget: total.limit for total in read_budget_totals(text)}
    return Run(
        path=path,
        seed=read_seed(path, settings, final),
        settings=settings,
        facts=read_facts(lines, settings, final),
        steps=steps,
        train_seconds=train_seconds,
        scores=scores,
        phases=read_phases(lines, final, scores, train_seconds),
        limits={"train": LIMIT_SECONDS, "eval": LIMIT_SECONDS, **totals},
        sizes=read_sizes(lines, final),
        points=points,
        final=final,
        digest=hashlib.sha256(text.encode()).hexdigest(),
        left_by_deadline=deadline_notes(lines, final),
        warnings=[] if final else warnings_of(path, lines, settings, scores, points),
        contradictions=contradictions_of(lines, final),
    )


# === What is no score, and why ====================================================================

ERROR = re.compile(r"^(?:\S*(?:Error|Exception|Interrupt)\b(?::| at )?.*|Killed|Aborted.*)$")


def refuse_bad_scores(
    scores: list[Score], lines: list[str], points: list[dict[str, float]]
) -> None:
    """Raises LogError, which says why, unless there is a score and all of them are numbers."""
    for score in reversed(scores):
        if not is_positive(score):
            raise LogError(
                f"has the score {score.label} val_loss:{score.loss} val_bpb:{score.bpb}, "
                "which is not a positive number"
            )
    if scores:
        return
    if not any(lines):
        raise LogError("is empty")
    step = int(max((point["step"] for point in points), default=0))
    errors = [line for line in lines[-200:] if ERROR.match(line)]
    if errors:
        place = f"after step {step}" if step else "before its first step"
        raise LogError(f"holds no score: the run ended {place} with {errors[-1][:150]}")
    validated = [point for point in points if "val_bpb" in point]
    if validated:
        last = validated[-1]
        raise LogError(
            "holds no score of the finished model; the last one while training was "
            f"{last['val_bpb']:.4f} at step {last['step']:.0f}"
        )
    if step:
        raise LogError(f"holds no score: it ends at step {step}")
    raise LogError("holds no score: no log of a finished run")


# What our score line says where the deadline of the evaluation left something undone.
LEFT_BY_DEADLINE = re.compile(
    r"\d+ of \d+ documents were scored without adaptation|\d+ chunks were not learnt from"
)


def deadline_notes(lines: list[str], final: dict[str, Any]) -> list[str]:
    """What the deadline of the last score left without adaptation, by its line or the final one."""
    scored = [line for line in lines if SCORE.match(line) and not STEP.match(line)]
    notes = LEFT_BY_DEADLINE.findall(scored[-1]) if scored else []
    documents = final.get("documents_not_adapted")
    if not notes and documents:
        total = final.get("val_docs", "?")
        notes = [f"{documents} of {total} documents were scored without adaptation"]
    return notes


def warnings_of(
    path: Path,
    lines: list[str],
    settings: dict[str, Setting],
    scores: list[Score],
    points: list[dict[str, float]],
) -> list[str]:
    """What a published log shows that was not used, or that contradicts itself."""
    warnings = []
    diverged = next((point for point in points if math.isnan(point.get("train_loss", 0))), None)
    if diverged:
        warnings.append(f"the training loss is nan from step {diverged['step']:.0f}")
    named = seed_of_name(path)
    told = settings.get("seed")
    if told and named is not None and told.value != str(named):
        warnings.append(f"the log says seed {told.value}, the name of its file says {named}")
    warnings += [f"not understood: {line[:120]}" for line in unread_scores(lines, scores)[:3]]
    return warnings


ANY_BPB = re.compile(r"\b(?:val_)?bpb\b ?[:=]+ *(\d+\.\d+|-?nan\b)", re.IGNORECASE)
PROGRESS = re.compile(r"running|progress|chunk|batch|partial|epoch|warm", re.IGNORECASE)


def unread_scores(lines: list[str], scores: list[Score]) -> list[str]:
    """Lines with bits per byte that are no step, no progress, no score and repeat none."""
    unread = []
    for line in lines:
        match = ANY_BPB.search(line)
        if not match or STEP.match(line) or PROGRESS.search(line):
            continue
        digits = len(match[1].partition(".")[2])
        half = 0.51 * 10.0**-digits
        if not any(abs(score.bpb - float(match[1])) <= half for score in scores):
            unread.append(line)
    return unread


def is_positive(score: Score) -> bool:
    """Whether both figures are finite and above 0."""
    return 0 < score.bpb < math.inf and 0 < score.loss < math.inf


NUMBER = r"(?:\d+\.?\d*(?:e[-+]?\d+)?)"
FIGURE = rf"({NUMBER}|[-+]?nan|[-+]?inf)"  # a score that is no number is one all the same
SCORE = re.compile(
    rf"^(\S.*?)[ ,]+((?:\w+[ _])?)val_loss ?[:=] ?{FIGURE},?\s+(?:\| )?"
    rf"(?:\w+[ _])?val_bpb ?[:=] ?{FIGURE}(?![\w.])(?:.*? eval_time:({NUMBER})ms)?",
    re.IGNORECASE,
)
STEP = re.compile(r"^(?:step:)?(\d+)/(\d+) (?=.*loss:)")
STEP_FIGURE = re.compile(rf"([\w/]+): ?({NUMBER}|nan)(ms|m|s)?(?= |$)")
STEP_NAMES = {"loss": "train_loss", "t": "train_time"}
STOPPING = re.compile(r"stopping.*?train_time: ?(\d+)ms.*")
CODE_SIZE = re.compile(r"(?:Code size.*?: |artifact:.* code:)(\d+)(?: bytes|$)")
SIZES = {
    "artifact_bytes": re.compile(
        r"(?:Total submission size[^:]*: |.*\| Total submission: |budget:|artifact_bytes: +)(\d+)"
        r"(?: bytes|/\d+|$)"
    ),
    "code_bytes": CODE_SIZE,
    "val_tokens": re.compile(r"(?:val_tokens: ?|val_loader:.* tokens:)(\d+)"),
}


def read_scores(lines: list[str], final: dict[str, Any]) -> list[Score]:
    """Complete scores in order. An `_exact` line replaces its rounded twin, the final line has all
    digits. Older logs repeat the sliding score under the baseline's label; that echo is left out.
    """
    scores: dict[str, Score] = {}
    for line in lines:
        match = SCORE.match(line)
        label = label_of_score(match) if match and not STEP.match(line) else ""
        if not label:
            continue
        score = printed_score(label, match, final)
        sliding = [(s.loss, s.bpb) for s in scores.values() if s.kind == "sliding"]
        if score.kind == "after" and (score.loss, score.bpb) in sliding:
            continue
        earlier = scores.pop(label, None)
        if score.seconds is None and earlier:
            score = score._replace(seconds=earlier.seconds)
        scores[label] = score
    if final and not scores:
        return scores_of_final(final)
    return list(scores.values())


def label_of_score(match: re.Match) -> str:
    """The label of a score's line; "" where it reports progress, as `ttt_sliding:done` does."""
    first, *others = f"{match[1]} {match[2]}".rstrip(" _").split()
    if ":" in first.rstrip(":") or PROGRESS.search(match[1]):
        return ""
    return " ".join([first.rstrip(":").removesuffix("_exact"), *others])


def printed_score(label: str, match: re.Match, final: dict[str, Any]) -> Score:
    """The score of a line, with all digits where the final line has them and agrees."""
    printed = (float(match[3]), float(match[4]))
    decimals = min(len(match[i].partition(".")[2]) for i in (3, 4))
    key = label.removeprefix("diagnostic ").split()[0].replace("-", "_")
    exact = (final.get(f"{key}_loss"), final.get(f"{key}_bpb"))
    if None not in exact and all(
        abs(a - b) <= 10.0**-decimals for a, b in zip(exact, printed, strict=True)
    ):
        printed = exact
        decimals = 15
    seconds = float(match[5]) / 1000 if match[5] else None
    return Score(label, *printed, seconds, decimals)


def scores_of_final(final: dict[str, Any]) -> list[Score]:
    """The scores of a log that was cut down to its last line, in the order of a run."""
    kinds = [key.removesuffix("_bpb") for key in final if key.endswith("_bpb")]
    kinds = [kind for kind in kinds if f"{kind}_loss" in final and kind != "val"]
    ordered = sorted(kinds, key=lambda kind: ("pre" not in kind, "ttt" in kind))
    scores = []
    for kind in ordered or ["val"]:
        label = kind.replace("pre_quant", "pre-quant")
        scores.append(Score(label, final[f"{kind}_loss"], final[f"{kind}_bpb"], None, 15))
    return scores


def read_points(lines: list[str], batch_tokens: float) -> list[dict[str, float]]:
    """What the lines of a step say. Where a log gives minutes, its mean tokens per second tell the
    seconds. A run that was started anew counts its steps from further back: what had been made of
    them is gone, and so are their lines.
    """
    points: dict[int, dict[str, float]] = {}
    for line in lines:
        match = STEP.match(line)
        if not match:
            continue
        step = int(match[1])
        if step < next(reversed(points), 0):
            points = {known: point for known, point in points.items() if known < step}
        point = points.setdefault(step, {"step": step})

        figures = {}
        units = {}
        for name, value, unit in STEP_FIGURE.findall(line[match.end() :]):
            name = STEP_NAMES.get(name, name)
            figures[name] = float(value)
            units[name] = unit
        for name in ("train_loss", "val_bpb", "lr_scale"):
            if name in figures:
                point[name] = figures[name]
        unit = units.get("train_time")
        if unit == "m" and figures.get("tok/s"):
            point["seconds"] = step * batch_tokens / figures["tok/s"]
        elif unit == "ms":
            point["seconds"] = figures["train_time"] / 1000
        elif unit == "s":
            point["seconds"] = figures["train_time"]
    return list(points.values())


def read_training(
    lines: list[str], final: dict[str, Any], points: list[dict[str, float]]
) -> tuple[int | None, float | None]:
    """(steps, seconds of training) by the line that says why it stopped, else by the last step."""
    steps = max((point["step"] for point in points), default=None)
    seconds = max((point["seconds"] for point in points if "seconds" in point), default=None)
    stopping = [line for line in lines if STOPPING.match(line)]
    if stopping:
        match = STOPPING.match(stopping[-1])
        seconds = float(match[1]) / 1000
        step = re.search(r"step: ?(\d+)", match[0])
        steps = int(step[1]) if step else steps
    return final.get("steps") or steps, seconds


def read_seed(path: Path, settings: dict[str, Setting], final: dict[str, Any]) -> int | None:
    """The seed by the final line, the settings or, where neither has it, the name of the file."""
    if "seed" in final:
        return final["seed"]
    told = number_of(settings, "seed")
    return seed_of_name(path) if told is None else int(told)


def number_of(settings: dict[str, Setting], name: str) -> float | None:
    """The number that a setting is; None where it is not there or no number."""
    try:
        return float(settings[name].value)
    except (KeyError, ValueError):
        return None


def seed_of_name(path: Path) -> int | None:
    """The seed in the name of a file, None where there is none."""
    named = re.search(r"seed[_-]?(\d+)", path.stem)
    return int(named[1]) if named else None


VAL_SHARDS = re.compile(r"([^\s/]+)/fineweb_val_")


def read_facts(
    lines: list[str], settings: dict[str, Setting], final: dict[str, Any]
) -> dict[str, Any]:
    """What makes two runs comparable. In a published log the size of the code is its only trace."""
    facts = {key: final[key] for key in FACTS if key in final}
    config = {name: setting.value for name, setting in settings.items()}
    dataset = final.get("dataset") or config.get("dataset")
    dataset = dataset or Path(config.get("datasets_dir") or config.get("data_path") or "").name
    if not dataset:
        shards = filter(None, (VAL_SHARDS.search(line) for line in lines))
        dataset = next((match[1] for match in shards), "")
    if dataset:
        facts["dataset"] = dataset
    code = [match[1] for match in map(CODE_SIZE.match, lines) if match]
    if code and not final:
        facts["code_size"] = "/".join(dict.fromkeys(code))
    return facts


def read_sizes(lines: list[str], final: dict[str, Any]) -> dict[str, int]:
    """The sizes that are known: by the final line, else by the last line that tells one.

    Public scripts print the size of the raw model first, in the same words.
    """
    sizes = {}
    for line in lines:
        for name, pattern in SIZES.items():
            match = pattern.match(line)
            if match:
                sizes[name] = int(match[1])
    in_final = [name for name in (*SIZES, "val_bytes", "val_docs") if name in final]
    return sizes | {name: final[name] for name in in_final}


def read_phases(
    lines: list[str], final: dict[str, Any], scores: list[Score], train_seconds: float | None
) -> list[Phase]:
    """The phases of a run in order, with the exact seconds of the final line.

    Published logs have no phase table: what they time is put against the same budgets.
    """
    if final:
        return phases_of_final(lines, final)

    phases = []
    if train_seconds:
        phases.append(Phase("train", train_seconds, "train"))
    for line in lines:
        hessians = re.match(rf"GPTQ:collected \d+ Hessians in ({NUMBER})s", line)
        warm_up = re.match(rf"ttt_lora:compile warmup done \(({NUMBER})s\)", line)
        if hessians:
            phases.append(Phase("calibrate", float(hessians[1]), "train"))
        elif warm_up:
            phases.append(Phase("adaptation warm-up", float(warm_up[1]), "none"))
    for score in scores:
        if score.seconds is not None:
            budget = "none" if score.kind == "before" else "eval"
            phases.append(Phase(f"score {STAGES[score.kind]}", score.seconds, budget))
    return phases


# What a phase counts against, where a log has figures but no phase table.
USUAL_BUDGETS = {
    "score pre_quantization": "none",
    "train": "train",
    "calibrate": "train",
    "quantise": "train",
    "pack": "train",
}


def phases_of_final(lines: list[str], final: dict[str, Any]) -> list[Phase]:
    """The final line's seconds in the order of the phase table: JSON sorted them by name."""
    budgets = {phase.name: phase.budget for phase in read_phase_table("\n".join(lines))}
    seconds = final.get("seconds", {})
    in_table = [name for name in budgets if name in seconds]
    others = [name for name in seconds if name not in budgets]
    phases = []
    for name in in_table + others:
        usual = "eval" if name.startswith("score") else "none"
        budget = budgets.get(name, USUAL_BUDGETS.get(name, usual))
        phases.append(Phase(name, seconds[name], budget))
    return phases
