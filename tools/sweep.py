#!/usr/bin/env python3
"""Sweep knobs of train_gpt.py over seeds: one command starts the study and goes on with it.

    sweep.py chunks SEED=0,42,1337 TTT_CHUNK_SIZE=32,48
        every combination; mean and deviation over the seeds
    sweep.py rates MATRIX_LR=log:0.01:0.05 MIN_LR=lin:0:0.2 --trials 30
        a range is searched (TPE), 30 settings
    sweep.py rates4 SEED=0,1,2 MATRIX_LR=log:0.01:0.05:4
        four values of a range, spaced evenly in the logarithm
    sweep.py ttt SEED=0,1 TTT_LORA_LR=5e-5,1e-4,2e-4 --eval-only final_model.int6.ptz
        adaptation alone
    MAX_WALLCLOCK_SECONDS=0 ITERATIONS=900 sweep.py decay SEED=0,1,2 MUON_WD=0.05,0.095 \\
            --paired MUON_WD=0.095
        each setting against the baseline, seed by seed: equal data order, equal steps
    MAX_WALLCLOCK_SECONDS=60 sweep.py quick ...
        the environment holds for every run
    sweep.py big ... --storage postgresql://user@host/optuna
        the same on each machine: they share the work
    sweep.py big ... --launcher slurm --parallel 4 --slurm partition=h100
        one job per run; resumed sweeps find their jobs

Every run is a torchrun of train_gpt.py with a RUN_ID (NAME-0003), a log (logs/NAME-0003.txt) and a
folder of its own (runs/sweeps/NAME/0003; output.txt there is what it printed). Names, ranges and
combinations are checked before anything starts. A run that crashes, is refused, takes too long,
scores INVALID or exceeds 16,000,000 bytes is a failed trial with its `outcome` and `reason`, and
the sweep goes on. Ctrl-C ends the runs, and so does a kill -9 of the sweep. The same command then
goes on: no finished run is repeated. Values and seeds may be added; anything else that changes
(script, environment, --nproc) needs a new NAME. SEED is replication: a setting is judged by the
mean over all its seeds, by TPE too. Look at a study, running or finished, with

    optuna-dashboard sqlite:///runs/sweeps/NAME.db

There NAME has a trial per run, and NAME-settings a trial per setting, the mean over its seeds. The
sweep ends in a sentence: what the best setting is ahead by, with what p, and how many seeds it
takes.

Exit status: 0 every run finished, 1 some failed or did not fit the budget, 2 wrong usage, 130
interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import math
import os
import re
import signal
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import scripts  # noqa: E402
from keeper import Job, read_exit, write_json  # noqa: E402
from launchers import Launcher, Local, Slurm  # noqa: E402
from run_statistics import mean_and_sd  # noqa: E402
from sweep_pairs import HEAD, PairedRun, closing_sentence, compare_pairs, pair_cells, parse_baseline  # noqa: E402
from sweep_space import SET_BY_SWEEP, Knob, Refused, Space  # noqa: E402
from sweep_study import (  # noqa: E402
    RUNS_AGAIN,
    Claim,
    Outcome,
    Study,
    describe,
    judge,
    last_line,
    run_key,
    without_seed,
)
from tables import markdown_table  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[1] / "train_gpt.py"
DEFAULT_TRIALS = 20  # settings that TPE tries
POLL_SECONDS = 0.1  # between two looks at the runs
RETRY_SECONDS = 2.0  # before an empty queue is asked again
MOST_TELLS = 60  # attempts to tell the database how a run ended

INTERMEDIATE = re.compile(r"^(\d+)/\d+ val_loss: \S+ val_bpb: (\S+)", re.MULTILINE)

# Figures of a finished run that become attributes of its trial.
KEPT_FIGURES = (
    "val_loss",
    "pre_quantization_bpb",
    "quantized_bpb",
    "quantized_ttt_lora_bpb",
    "artifact_bytes",
    "steps",
    "train_loss",
    "code_sha256",
    "device",
    "world_size",
)


# === The sweep ====================================================================================


@dataclass(eq=False)
class ActiveRun:
    """A run that this worker follows."""

    trial: Any
    folder: Path
    slot: int  # which of the --parallel places for runs it has
    is_prunable: bool
    is_over: Callable[[], bool] | None = None  # None until it is started
    started: float = field(default_factory=time.monotonic)
    last_heartbeat: float = field(default_factory=time.monotonic)
    num_reported: int = 0  # intermediate scores that the study knows
    verdict: str = ""  # why it was told to stop

    def output(self) -> str:
        """What the run has printed."""
        with contextlib.suppress(OSError):
            return (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")
        return ""


@dataclass
class SettingRow:
    """The results of a setting over its seeds."""

    setting: dict[str, str]
    scores: dict[str, float] = field(default_factory=dict)  # by seed
    runs: dict[str, PairedRun] = field(default_factory=dict)  # by seed
    seconds: list[float] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)  # how many did not come through, by kind

    @property
    def mean(self) -> float:
        """Mean val_bpb, inf while there is none."""
        return mean_and_sd(list(self.scores.values())).mean if self.scores else math.inf


class Sweep:
    """One worker of a study: starts runs, follows them and tells the study how they ended."""

    def __init__(
        self,
        args: argparse.Namespace,
        space: Space,
        study: Study,
        launcher: Launcher,
        say: Callable[[str], None],
    ):
        """`say` shows a line to the user."""
        self.args = args
        self.space = space
        self.study = study
        self.launcher = launcher
        self.say = say
        self.active: list[ActiveRun] = []
        self.is_leaving = False
        self.is_idle = False  # the queue was empty when it was asked last
        self.is_budget_spent = False
        self.last_asked = -math.inf

    def go(self, refresh: Callable[[bool], None]) -> None:
        """Follows its runs and starts new ones until nothing is left to do for any worker."""
        while True:
            for run in list(self.active):
                self.follow(run)
            if not self.is_leaving:
                self.start_runs()
            refresh(False)
            if self.is_done():
                return
            time.sleep(POLL_SECONDS)

    def is_done(self) -> bool:
        """Whether this worker follows no run and will start none."""
        if self.active:
            return False
        if self.is_leaving or self.is_budget_spent:
            return True
        return self.is_idle and not self.study.count("RUNNING", "WAITING")

    def leave(self, *_: object) -> None:
        """Handles Ctrl-C: ends the runs; what is over by then still counts."""
        self.is_leaving = True
        for run in self.active:
            self.stop(run, run.verdict or "interrupted")

    # --- Starting ---

    def start_runs(self) -> None:
        """Claims and starts runs while there are places, a budget and something in the queue."""
        while len(self.active) < self.args.parallel and not self.is_budget_spent:
            if self.is_idle and time.monotonic() - self.last_asked < RETRY_SECONDS:
                return
            if not self.is_within_budget():
                self.is_budget_spent = True
                spent = duration(self.spent())
                budget = duration(self.args.budget)
                self.say(f"budget: {spent} of {budget} spent; no run is started any more")
                return
            self.last_asked = time.monotonic()
            claim = self.study.claim()
            if claim is None:
                self.say_that_others_run()
                self.is_idle = True
                return
            self.is_idle = False
            self.begin(claim)

    def is_within_budget(self) -> bool:
        """Whether one more run of usual length would fit beside those that run."""
        if not self.args.budget:
            return True
        expected = self.typical_seconds() * (1 + len(self.active))
        return self.spent() + expected <= self.args.budget

    def say_that_others_run(self) -> None:
        """Says once that this worker stays in case another one dies."""
        others = self.study.count("RUNNING") - len(self.active)
        if not self.is_idle and others > 0:
            self.say(
                f"nothing left to start; waits for {others} runs of other workers, in case one dies"
            )

    def begin(self, claim: Claim) -> None:
        """Starts the run of a claimed trial, or finds it where a dead worker left it."""
        trial = claim.trial
        attributes = trial.user_attrs
        run = ActiveRun(
            trial=trial,
            folder=self.study.folder.absolute() / f"{trial.number:04d}",
            slot=self.free_slot(),
            # A setting that has come through once is not pruned any more: a mean over its lucky
            # seeds would flatter it.
            is_prunable=self.args.prune and not self.study.completed(attributes["env"]),
        )
        self.active.append(run)
        if claim.has_begun:
            run_id = attributes["run_id"]
            self.say(f"trial {trial.number}: goes on with {run_id}, begun by a worker that died")
            run.is_over = self.launcher.find(attributes.get("job", ""), run.folder).is_over
            return

        artifacts = self.prepare_folder(run)
        self.write_job(run, artifacts)
        started = self.launcher.start(run.folder)
        run.is_over = started.is_over
        job = ""
        if started.job:
            trial.set_user_attr("job", started.job)
            job = f" (job {started.job})"
        trial.set_user_attr("log", f"logs/{attributes['run_id']}.txt")
        trial.set_user_attr("folder", os.path.relpath(artifacts))
        self.say(f"trial {trial.number} starts: {describe(attributes['env'])}{job}")

    def free_slot(self) -> int:
        """The lowest number of a place that no run has."""
        taken = {run.slot for run in self.active}
        return next(slot for slot in itertools.count() if slot not in taken)

    def prepare_folder(self, run: ActiveRun) -> Path:
        """Clears what a deleted study of this name has left. Returns the folder for artifacts.

        That is the folder of an earlier trial where the run goes on from its checkpoint.
        """
        run.folder.mkdir(parents=True, exist_ok=True)
        for name in ("exit.json", "stop", "output.txt"):
            (run.folder / name).unlink(missing_ok=True)
        run_id = run.trial.user_attrs["run_id"]
        number = run_id.rpartition("-")[2]
        artifacts = run.folder.with_name(number)
        log = Path("logs") / f"{run_id}.txt"
        if log.exists() and artifacts == run.folder:
            log.rename(log.with_suffix(f".{int(time.time())}.txt"))
        return artifacts

    def write_job(self, run: ActiveRun, artifacts: Path) -> None:
        """Writes down what the keeper shall run."""
        own = {
            **run.trial.user_attrs["env"],
            "RUN_ID": run.trial.user_attrs["run_id"],
            "ARTIFACT_DIR": os.path.relpath(artifacts),
        }
        job = Job(
            token=uuid.uuid4().hex,
            command=self.command(),
            cwd=os.getcwd(),
            timeout=self.args.timeout,
            parent=self.launcher.parent,
            env={**self.space.base, **self.launcher.env(run.slot), **own},
        )
        write_json(run.folder / "job.json", job._asdict())

    def command(self) -> list[str]:
        """The command of a run: the script under torchrun, or by itself with --nproc 0."""
        command = [sys.executable]
        if self.args.nproc:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command.append(f"--nproc_per_node={self.args.nproc}")
        return [*command, str(self.args.script.resolve())]

    # --- Following ---

    def follow(self, run: ActiveRun) -> None:
        """Reports what the run has printed, and tells the study when it is over.

        Stops it when it is hopeless or, by the study, no longer this worker's.
        """
        # Asked before the last look at the output, which therefore misses nothing.
        if run.is_over():
            self.active.remove(run)
            self.finish(run)
            return
        if run.is_prunable and not run.verdict:
            self.report_intermediate(run)
        if time.monotonic() - run.last_heartbeat > self.args.heartbeat:
            run.last_heartbeat = time.monotonic()
            self.send_heartbeat(run)

    def report_intermediate(self, run: ActiveRun) -> None:
        """Tells the study new intermediate scores, and stops the run if they are hopeless."""
        scores = INTERMEDIATE.findall(run.output())
        new = scores[run.num_reported :]
        for step, bpb in new:
            run.trial.report(float(bpb), int(step))
        if new and run.trial.should_prune():
            step, bpb = new[-1]
            self.stop(run, f"val_bpb {bpb} at step {step} is in the worst quarter")
        run.num_reported = len(scores)

    def send_heartbeat(self, run: ActiveRun) -> None:
        """Gives the study a sign of life, and stops the run if it was given to another worker."""
        storage = self.study.storage
        trial_id = run.trial._trial_id
        try:
            storage.record_heartbeat(trial_id)
            if storage.get_trial(trial_id).state.is_finished():
                self.stop(run, "lost")
        # A database that is away for a while must not cost a run, whatever its driver raises.
        except Exception as error:  # noqa: BLE001
            reason = str(error).splitlines()[0]
            self.say(f"trial {run.trial.number}: no heartbeat: {reason}")

    def stop(self, run: ActiveRun, verdict: str) -> None:
        """Asks a run to stop, for a reason."""
        run.verdict = verdict
        (run.folder / "stop").touch()
        self.launcher.stop(run.folder)

    def finish(self, run: ActiveRun) -> None:
        """Tells the study and the user how a run ended."""
        output = run.output()
        ended = read_exit(run.folder)
        seconds = 0.0
        outcome = Outcome("lost", f"killed with its keeper; last line: {last_line(output)}")
        if ended:
            seconds = ended.seconds
            outcome = judge(output, ended, self.space.script.LIMIT_BYTES)
        is_pruned = run.verdict not in ("", *RUNS_AGAIN)
        if is_pruned and outcome.kind == "interrupted":
            outcome = Outcome("pruned", run.verdict)

        figures = {**kept_figures(outcome), "seconds": round(seconds, 1)}
        was_ours = self.tell_patiently(run, outcome._replace(figures=figures))
        result = outcome.reason
        if outcome.kind == "done":
            result = f"val_bpb {outcome.figures['val_bpb']:.5f}"
        setting = describe(run.trial.user_attrs["env"])
        line = f"trial {run.trial.number} {outcome.kind}: {setting}: {result}"
        line += f" ({duration(seconds)})"
        if not was_ours:
            line += ", but it had been given to another worker"
        self.say(line)
        self.save_note()

    def tell_patiently(self, run: ActiveRun, outcome: Outcome) -> bool:
        """Ends the trial; False if it was not this worker's any more.

        Tries for minutes, because a run of half an hour is worth waiting for a database's restart.
        """
        storage_error = self.study.optuna.exceptions.StorageInternalError
        for attempt in range(MOST_TELLS):
            try:
                return self.study.tell(run.trial, outcome)
            except (storage_error, OSError) as error:
                reason = str(error).splitlines()[0]
                self.say(f"trial {run.trial.number}: cannot be told, tries again: {reason}")
                time.sleep(min(10, 1 + attempt))
        return False

    def save_note(self) -> None:
        """Keeps what optuna-dashboard shows: a trial per setting, and the table as a note."""
        by_setting = self.study.write_settings()
        with contextlib.suppress(ImportError):
            import optuna_dashboard

            table = note(self.rows())
            for study in (self.study.study, by_setting):
                optuna_dashboard.save_note(study, table)

    # --- Figures ---

    def spent(self) -> float:
        """Seconds of runs, all workers together, failed ones too."""
        now = time.time()
        seconds = 0.0
        for trial in self.study.trials():
            if not trial.datetime_start:
                continue
            if trial.state.name == "RUNNING":
                seconds += now - trial.datetime_start.timestamp()
            else:
                seconds += trial.user_attrs.get("seconds", 0.0)
        return seconds

    def typical_seconds(self) -> float:
        """Mean seconds of a run that came through, 0 while there is none."""
        done = [trial for trial in self.study.trials() if trial.state.name == "COMPLETE"]
        seconds = [trial.user_attrs["seconds"] for trial in done]
        return mean_and_sd(seconds).mean if seconds else 0.0

    def total(self) -> int:
        """How many runs the study will have."""
        if self.args.search == "tpe":
            return self.args.trials * max(1, len(self.space.seeds))
        return len({run_key(trial.user_attrs["env"]) for trial in self.study.trials()})

    def rows(self) -> list[SettingRow]:
        """A row per setting, the best mean first."""
        rows: dict[Any, SettingRow] = {}
        for trial in self.study.trials():
            env = trial.user_attrs["env"]
            key = run_key(env)
            row = rows.setdefault(key.setting, SettingRow(without_seed(env)))
            kind = trial.user_attrs.get("outcome", trial.state.name.lower())
            if trial.state.name == "COMPLETE":
                row.scores[key.seed] = trial.value
                attributes = trial.user_attrs
                row.runs[key.seed] = PairedRun(
                    trial.value, attributes.get("steps", 0), attributes.get("train s", 0.0)
                )
                row.seconds.append(trial.user_attrs["seconds"])
            elif kind not in ("fail", *RUNS_AGAIN):
                row.others[kind] += 1
        return sorted(rows.values(), key=lambda row: row.mean)


def kept_figures(outcome: Outcome) -> dict[str, Any]:
    """The figures of a run that its trial keeps; of phases those that took time."""
    figures = outcome.figures
    trial_figures = {name: figures[name] for name in KEPT_FIGURES if name in figures}
    if math.isfinite(figures.get("val_bpb", math.nan)):
        trial_figures["val_bpb"] = figures["val_bpb"]
    for phase, seconds in figures.get("seconds", {}).items():
        if seconds >= 0.1:
            trial_figures[f"{phase} s"] = round(seconds, 1)
    return trial_figures


# === What the user sees ===========================================================================

RESULT_COLUMNS = ("runs", "val_bpb, mean ± sd", "to best", "lowest", "time a run", "besides")
BAR_WIDTH = 24  # characters


def duration(seconds: float) -> str:
    """Seconds for readers: 42 s, 3:05 min, 2:10 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02} min"
    minutes = int(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02} h"


def result_cells(row: SettingRow, best: float) -> list[str]:
    """The cells of RESULT_COLUMNS for a setting; `best` is the mean of the best one."""
    others = ", ".join(f"{number} {kind}" for kind, number in row.others.items())
    if not row.scores:
        return ["0", "-", "", "", "", others]
    spread = mean_and_sd(list(row.scores.values()))
    deviation = f" ± {spread.sd:.5f}" if spread.sd is not None else ""
    return [
        str(len(row.scores)),
        f"{spread.mean:.5f}{deviation}",
        f"{spread.mean - best:+.5f}",
        f"{min(row.scores.values()):.5f}",
        duration(mean_and_sd(row.seconds).mean),
        others,
    ]


def all_cells(rows: list[SettingRow]) -> list[list[str]]:
    """The table of settings: their values, then their results."""
    table = []
    for row in rows:
        values = [row.setting[name] for name in varied(rows)]
        table.append([*values, *result_cells(row, rows[0].mean)])
    return table


def varied(rows: list[SettingRow]) -> list[str]:
    """The knobs that are not the same in all settings; all of them where there is one setting."""
    names = list(rows[0].setting) if rows else []
    several = [name for name in names if len({row.setting[name] for row in rows}) > 1]
    return several or names


def all_columns(rows: list[SettingRow]) -> list[str]:
    """The head of the table of settings."""
    return [*varied(rows), *RESULT_COLUMNS]


def note(rows: list[SettingRow]) -> str:
    """The table of settings in Markdown."""
    return markdown_table(all_columns(rows), all_cells(rows))


def table_of_pairs(rows: list[SettingRow], baseline: dict[str, str]) -> str:
    """Every other setting against the baseline, seed by seed, in Markdown."""
    runs_of_baseline = next((row.runs for row in rows if row.setting == baseline), {})
    table = []
    for row in rows:
        if row.setting != baseline:
            result = compare_pairs(row.runs, runs_of_baseline)
            table.append([*row.setting.values(), *pair_cells(result)])
    return markdown_table([*baseline, *HEAD], table)


def conclusion(rows: list[SettingRow], baseline: dict[str, str] | None) -> str:
    """What the sweep has shown, in a sentence."""
    scores = {describe(row.setting): row.scores for row in rows}
    return closing_sentence(scores, describe(baseline) if baseline else "")


class View:
    """A live table on a terminal; elsewhere plain lines, and a table at the end."""

    def __init__(self, args: argparse.Namespace):
        """Opens the terminal. The sweep to show is set before the first picture."""
        import rich.console
        import rich.live

        width = None if sys.stdout.isatty() else 160
        self.console = rich.console.Console(highlight=False, width=width)
        self.args = args
        self.sweep: Sweep | None = None
        self.last_refresh = -math.inf
        self.live = None
        if self.console.is_terminal:
            self.live = rich.live.Live(console=self.console, auto_refresh=False, transient=True)

    def say(self, line: str) -> None:
        """Prints a line with the time of day."""
        self.console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False, soft_wrap=True)

    def refresh(self, force: bool) -> None:
        """Draws the live picture anew, at most once a second unless forced."""
        if self.live and (force or time.monotonic() - self.last_refresh > 1):
            self.last_refresh = time.monotonic()
            self.live.update(self.picture(live=True), refresh=True)

    def picture(self, live: bool) -> Any:
        """The table, the state of the sweep and, live, a line per running run."""
        import rich.console

        rows = self.sweep.rows()
        shown = rows
        if live:
            height = self.console.height or 40
            shown = rows[: max(5, height - 12 - len(self.sweep.active))]
        parts = [self.table(rows, len(shown))]
        if len(rows) > len(shown):
            parts.append(f"  and {len(rows) - len(shown)} more settings")
        parts.append(self.status(rows))
        if live:
            parts += [self.run_line(run) for run in self.sweep.active]
        return rich.console.Group(*parts)

    def table(self, rows: list[SettingRow], num_shown: int) -> Any:
        """The best settings as a table; the best one is bold."""
        import rich.box
        import rich.table

        table = rich.table.Table(box=rich.box.SIMPLE)
        for name in all_columns(rows):
            # Only the last column may be long.
            is_last = name == RESULT_COLUMNS[-1]
            table.add_column(name, justify="left" if is_last else "right", no_wrap=not is_last)
        for i, cells in enumerate(all_cells(rows)[:num_shown]):
            table.add_row(*cells, style="bold" if i == 0 else "")
        return table

    def run_line(self, run: ActiveRun) -> Any:
        """A running run: its setting, its age and what it printed last."""
        import rich.text

        age = duration(time.monotonic() - run.started)
        setting = describe(run.trial.user_attrs["env"])
        line = f"  trial {run.trial.number}  {setting}  {age}  {last_line(run.output())}"
        return rich.text.Text(line, no_wrap=True, overflow="ellipsis")

    def status(self, rows: list[SettingRow]) -> str:
        """How far the sweep is, as a bar and figures."""
        trials = self.sweep.study.trials()
        total = self.sweep.total()
        states = Counter(trial.state.name for trial in trials)
        over = {
            run_key(trial.user_attrs["env"])
            for trial in trials
            if trial.user_attrs.get("outcome") not in (None, *RUNS_AGAIN)
        }
        failed = len(over) - states["COMPLETE"] - states["PRUNED"]
        parts = [
            f"{len(over)}/{total} runs over",
            f"{states['RUNNING']} running",
            f"{failed} failed",
        ]
        scores = [score for row in rows for score in row.scores.values()]
        if scores:
            parts.append(f"best {min(scores):.5f}")
        at_once = max(1, states["RUNNING"], self.args.parallel)
        seconds_left = (total - len(over)) * self.sweep.typical_seconds() / at_once
        if seconds_left:
            parts.append(f"{duration(seconds_left)} left")
        spent = f"{duration(self.sweep.spent())} of runs"
        if self.args.budget:
            spent += f", budget {duration(self.args.budget)}"
        parts.append(spent)
        filled = round(BAR_WIDTH * len(over) / max(1, total))
        bar = "█" * filled + "░" * (BAR_WIDTH - filled)
        return f"  {bar} {' · '.join(parts)}"


# === Command line =================================================================================


def build_parser() -> argparse.ArgumentParser:
    """The command line: what is run."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="sweep.py NAME KNOB=value,value.. KNOB=log:low:high .. [options]",
    )
    parser.add_argument("name", metavar="NAME", help="of the study, its folder and its runs")
    parser.add_argument(
        "knobs",
        metavar="KNOB=..",
        nargs="+",
        help="a,b,c: these values; log:low:high or lin:low:high: a range for TPE; with :count "
        "appended that many values of it, evenly spaced",
    )
    add_search_options(parser)
    add_limit_options(parser)
    add_machine_options(parser)
    return parser


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """The options for which settings are run, and with what."""
    parser.add_argument(
        "--search", choices=("grid", "tpe"), help="default: tpe if a knob has a range, else grid"
    )
    parser.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help=f"settings that TPE tries, each with every seed (default {DEFAULT_TRIALS})",
    )
    parser.add_argument(
        "--eval-only",
        type=Path,
        metavar="FILE",
        help="checkpoint or artifact to score instead of training",
    )
    parser.add_argument(
        "--prune",
        action=argparse.BooleanOptionalAction,
        help="stop a run whose intermediate val_bpb (VAL_LOSS_EVERY) is in the worst quarter at "
        "that step, and skip the setting's other seeds; never once a seed of it has finished "
        "(default: with tpe, not in a grid)",
    )
    parser.add_argument(
        "--paired",
        metavar="NAME=value,..",
        help="one setting of the grid: compare every other with it, seed by seed; needs SEED, "
        "ITERATIONS and MAX_WALLCLOCK_SECONDS=0",
    )
    parser.add_argument(
        "--script",
        type=Path,
        default=SCRIPT,
        help="the script to run (default: train_gpt.py of this repository)",
    )


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """The options for time and failures."""
    parser.add_argument(
        "--timeout",
        type=float,
        default=0,
        metavar="S",
        help="seconds after which a run is stopped (default: never)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=0,
        metavar="S",
        help="seconds of runs, all workers together; none is started that would not fit",
    )
    parser.add_argument("--retry", action="store_true", help="run what failed again, once")


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """The options for processes, machines and the database."""
    parser.add_argument(
        "--nproc",
        type=int,
        help="processes, one per GPU, of a run under torchrun (default: the GPUs there are, "
        "shared out over --parallel; 1 without any); 0: python without torchrun, which starts "
        "seconds faster",
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        metavar="K",
        help="runs at once, each with GPUs of its own (default 1)",
    )
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="sqlite:///FILE or postgresql://.. (default sqlite:///runs/sweeps/NAME.db)",
    )
    parser.add_argument(
        "--heartbeat",
        type=float,
        default=30,
        metavar="S",
        help="seconds between signs of life; a worker on another machine that gives none for four "
        "times as long is dead and its run starts again (default 30)",
    )
    parser.add_argument(
        "--launcher",
        choices=("local", "slurm"),
        default="local",
        help="slurm: each run is a job (submitit)",
    )
    parser.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="K=V",
        help="sbatch options: partition=h100 account=x mem_gb=200 timeout_min=40; cluster=local "
        "tries the same without Slurm",
    )


def check_args(args: argparse.Namespace) -> list[Knob]:
    """Fills in the defaults that depend on others and returns the knobs. May raise Refused."""
    knobs = [Knob.parse(text) for text in args.knobs]
    if not args.search:
        args.search = "tpe" if any(knob.span for knob in knobs) else "grid"
    problems = search_problems(args, knobs) + option_problems(args, knobs)
    if problems:
        raise Refused("\n".join(problems))
    args.trials = args.trials or DEFAULT_TRIALS
    args.folder = Path("runs/sweeps") / args.name
    return knobs


def search_problems(args: argparse.Namespace, knobs: list[Knob]) -> list[str]:
    """What is wrong with the name and with what is searched."""
    ranges = [knob.name for knob in knobs if knob.span]
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", args.name):
        problems.append(f"NAME={args.name}: letters, digits, '.', '_' and '-' only")
    if ranges and args.search == "grid":
        problems.append(
            f"{', '.join(ranges)}: a range has no grid; "
            "append :count, list values or use --search tpe"
        )
    if args.trials is not None and args.search == "grid":
        problems.append("--trials: only TPE counts settings; a grid runs all of its own")
    if "SEED" in ranges:
        problems.append("SEED: list the seeds; they are replication, not searched")
    if args.search == "tpe" and all(knob.name == "SEED" for knob in knobs):
        problems.append("--search tpe: needs a knob besides SEED")
    return problems


def option_problems(args: argparse.Namespace, knobs: list[Knob]) -> list[str]:
    """What is wrong with files, numbers and combinations of options."""
    problems = []
    if args.eval_only and not args.eval_only.is_file():
        problems.append(f"--eval-only {args.eval_only}: no such file")
    if min(args.parallel, args.trials or 1, args.heartbeat) <= 0:
        problems.append("--parallel, --trials, --heartbeat: must be above 0")
    if min(args.nproc or 0, args.timeout, args.budget) < 0:
        problems.append("--nproc, --timeout, --budget: must not be negative")
    if any("=" not in pair for pair in args.slurm):
        problems.append("--slurm: must be KEY=VALUE")
    problems += pairing_problems(args, knobs)
    if args.prune and sweeps_batch_size(knobs):
        problems.append(
            "--prune: steps of another TRAIN_BATCH_TOKENS cannot be compared; sweep it without"
        )
    return problems


def pairing_problems(args: argparse.Namespace, knobs: list[Knob]) -> list[str]:
    """What is wrong with --paired; sets `args.baseline`, the setting that it names."""
    args.baseline = None
    if not args.paired:
        return []
    problems = []
    if args.search == "tpe":
        problems.append("--paired: needs a grid, in which every setting has every seed")
    if not any(knob.name == "SEED" for knob in knobs):
        problems.append("--paired: needs SEED=a,b,c, which the pairs are made of")
    try:
        args.baseline = parse_baseline(args.paired, knobs)
    except ValueError as error:
        problems.append(f"--paired {args.paired}: {error}")
    return problems


def sweeps_batch_size(knobs: list[Knob]) -> bool:
    """Whether runs differ in their batch, so that their steps cannot be compared."""
    return any(knob.name == "TRAIN_BATCH_TOKENS" for knob in knobs)


def load_script(path: Path) -> ModuleType:
    """The script as a module, whose configuration checks the knobs. May raise Refused."""
    if path.suffix != ".py" or not path.is_file():
        raise Refused(f"--script {path}: is not a Python file")
    return scripts.load_script(path)


def gpu_names(script: ModuleType) -> list[str]:
    """The GPUs that the script may use, as CUDA_VISIBLE_DEVICES names them."""
    number = script.torch.cuda.device_count()
    if not number:
        return []
    all_names = ",".join(map(str, range(number)))
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or all_names).split(",")


def base_environment(
    script: ModuleType, knobs: list[Knob], args: argparse.Namespace
) -> dict[str, str]:
    """The knobs that the environment, and --eval-only, set for every run."""
    fields = {name.upper() for name in script.Config.__dataclass_fields__}
    swept = {knob.name for knob in knobs}
    base = {k: v for k, v in os.environ.items() if k in fields - swept - {*SET_BY_SWEEP}}
    if args.eval_only:
        base["EVAL_ONLY_PATH"] = str(args.eval_only.resolve())
    return base


def choose_processes(args: argparse.Namespace, gpus: list[str]) -> None:
    """Fills in --nproc. Raises Refused if the runs at once would need more GPUs than there are."""
    if args.nproc is None:
        args.nproc = max(1, len(gpus) // args.parallel)
    needed = max(args.nproc, 1) * args.parallel
    if args.launcher == "local" and gpus and needed > len(gpus):
        raise Refused(
            f"--nproc {args.nproc} --parallel {args.parallel}: "
            f"more GPUs than the {len(gpus)} there are"
        )


def choose_pruning(args: argparse.Namespace, knobs: list[Knob], has_scores: bool) -> None:
    """Fills in --prune: with TPE, where runs have intermediate scores that can be compared."""
    if args.prune and not has_scores:
        raise Refused("--prune: nothing to judge by; set VAL_LOSS_EVERY, or use --no-prune")
    if args.prune is None:
        args.prune = args.search == "tpe"
    args.prune = args.prune and has_scores and not sweeps_batch_size(knobs)


def prepare(args: argparse.Namespace, view: View) -> Sweep:
    """The sweep of a command line. Raises Refused before a file or a study is made."""
    knobs = check_args(args)
    script = load_script(args.script)
    base = base_environment(script, knobs, args)
    gpus = gpu_names(script)
    runs_in_slurm = args.launcher == "slurm" and "cluster=local" not in args.slurm
    space = Space(script, knobs, base, has_cuda=bool(gpus) or runs_in_slurm)
    config = space.check()
    if args.paired and config.max_wallclock_seconds and not args.eval_only:
        raise Refused(
            f"MAX_WALLCLOCK_SECONDS={config.max_wallclock_seconds:g}: must be 0 with --paired, so "
            "that runs make equal steps; set ITERATIONS"
        )
    num_seeds = sum(len(knob.values) for knob in knobs if knob.name == "SEED")
    if getattr(config, "val_doc_fraction", 1) < 1 and num_seeds > 1:
        fraction = f"VAL_DOC_FRACTION={config.val_doc_fraction:g}"
        view.say(f"warning: {fraction} draws other documents for every seed, so seeds spread more")
    choose_processes(args, gpus)
    choose_pruning(args, knobs, has_scores=bool(config.val_loss_every))
    description = {
        "search": args.search,
        "knobs": {knob.name: list(knob.values or (knob.log, *knob.span)) for knob in knobs},
        "environment": base,
        "nproc": args.nproc,
        "code_sha256": hashlib.sha256(args.script.read_bytes()).hexdigest(),
    }
    launcher = Slurm(args) if args.launcher == "slurm" else Local(args, gpus)
    worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    study = Study(args, space, description, worker)
    args.lock = hold_lock(args.folder / "workers" / worker)
    return Sweep(args, space, study, launcher, view.say)


def hold_lock(path: Path) -> Any:
    """This worker's sign of life for others on the machine: a file, kept open and locked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = build_parser().parse_args(argv)
    try:
        view = View(args)
        view.sweep = sweep = prepare(args, view)
    except ImportError as error:
        remedy = "not installed; make dev brings it into .venv"
        print(f"sweep.py: {error.name}: {remedy}", file=sys.stderr)
        return 2
    except Refused as error:
        for line in str(error).splitlines():
            print(f"sweep.py: {line}", file=sys.stderr)
        return 2

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, sweep.leave)
    view.say(
        f"{args.name}: {sweep.total()} runs of {args.script.name}, {args.parallel} at once; "
        f"optuna-dashboard {sweep.study.url.render_as_string()} shows a trial per setting in "
        f"{sweep.study.name_of_settings}, a trial per run in {args.name}"
    )
    try:
        with view.live or contextlib.nullcontext():
            sweep.go(view.refresh)
    except (sweep.study.optuna.exceptions.StorageInternalError, OSError) as error:
        # A full disk, for instance. Runs under way are ended by their keepers.
        url = sweep.study.url.render_as_string()
        cause = str(error.__cause__ or error).splitlines()[0]
        print(f"sweep.py: {url}: {cause}; the same command goes on", file=sys.stderr)
        return 1
    view.console.print(view.picture(live=False))
    if args.baseline:
        view.say(table_of_pairs(sweep.rows(), args.baseline))
    view.say(conclusion(sweep.rows(), args.baseline))
    Path(args.lock.name).unlink(missing_ok=True)
    if sweep.is_leaving:
        view.say("interrupted; the same command goes on")
        return 130
    return 1 if any(row.others for row in sweep.rows()) else 0


if __name__ == "__main__":
    sys.exit(main())
