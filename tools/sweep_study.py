"""A sweep's study: what became of a run, and trials in a database that workers share.

Whatever must not happen twice (creating, queueing, claiming, taking over) happens while holding a
lock: a file beside an SQLite database, an advisory lock in PostgreSQL.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import re
import signal
import statistics
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from keeper import Exit, is_locked, read_exit, read_job
from runlog import final_lines
from sweep_space import Refused, Space

MOST_LOSSES = 3  # a run that was lost so often (dead worker, dead machine) is given up
RUNS_AGAIN = ("lost", "interrupted")  # outcomes after which a run is wanted again
MOST_CHARACTERS = 300  # of a reason
PRUNED_PERCENTILE = 75  # a run is pruned in the worst quarter ..
PRUNED_FROM = 4  # .. of at least so many finished runs


# === What became of a run =========================================================================


class Outcome(NamedTuple):
    """How a run ended."""

    # done, crashed, refused, timed out, invalid, oversized or pruned; interrupted and lost runs
    # run again.
    kind: str
    reason: str = ""
    figures: Mapping[str, Any] = MappingProxyType({})


def judge(output: str, ended: Exit, limit_bytes: int) -> Outcome:
    """The outcome by what a run printed and its keeper's note.

    INVALID counts before all else, so that no such score is ever ranked.
    """
    finals = final_lines(output)
    figures = finals[-1] if finals else {}
    status = worker_status(output, ended.status)
    if ended.stopped == "timed out":
        reason = f"stopped after {ended.seconds:.0f} s; last line: {last_line(output)}"
        return Outcome("timed out", reason)
    if ended.stopped:
        return Outcome("interrupted", ended.stopped)
    invalid = re.search(r"^.*\bINVALID\b.*$", output, re.MULTILINE)
    if invalid:
        return Outcome("invalid", invalid[0][:MOST_CHARACTERS], figures)
    if status == 2:
        reasons = script_errors(output) or [last_line(output)]
        return Outcome("refused", reasons[-1])
    # A final line with such a number has no figures.
    unscored = re.search(r'^final \{.*"val_bpb": (NaN|-?Infinity)', output, re.MULTILINE)
    if unscored and not status:
        return Outcome("invalid", f"val_bpb is {unscored[1].lower()}")
    if status or not figures:
        return Outcome("crashed", reason_of_crash(output, status), figures)
    if not math.isfinite(figures.get("val_bpb", math.nan)):
        return Outcome("invalid", f"val_bpb is {figures.get('val_bpb')}", figures)
    size = figures.get("artifact_bytes", 0)
    if size > limit_bytes:
        reason = f"artifact of {size} bytes, {size - limit_bytes} over the limit"
        return Outcome("oversized", reason, figures)
    return Outcome("done", "", figures)


def worker_status(output: str, status: int) -> int:
    """The exit status of the script: torchrun ends with 1 whatever its workers ended with."""
    nested = re.search(r"exitcode\s*:\s*(-?\d+)", output)
    return int(nested[1]) if nested and status else status


def script_errors(output: str) -> list[str]:
    """What the script said of its own failure."""
    return re.findall(r"^train_gpt\.py: (.+)$", output, re.MULTILINE)


def reason_of_crash(output: str, status: int) -> str:
    """The exit status and the first of: the script's own words, an exception, the last line."""
    raised = re.findall(
        r"^(?:\[rank\d+\]: *)?([\w.]*(?:Error|Exception|Interrupt)\b.*)$", output, re.MULTILINE
    )
    raised = [error for error in raised if "ChildFailedError" not in error]
    why = [*script_errors(output), *raised, last_line(output)][0]
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"{how}: {why}"[:MOST_CHARACTERS]


def last_line(output: str) -> str:
    """The last line that is not empty."""
    lines = [line.strip() for line in output[-4000:].splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


# === Settings and seeds ===========================================================================


class RunKey(NamedTuple):
    """Which run of a study it is; two trials of one key are two attempts."""

    setting: tuple[tuple[str, str], ...]  # sorted (knob, value) pairs
    seed: str  # "" where no seeds are listed


def run_key(env: dict[str, str]) -> RunKey:
    """The key of the run with an environment."""
    return RunKey(tuple(sorted(without_seed(env).items())), env.get("SEED", ""))


def without_seed(env: dict[str, str]) -> dict[str, str]:
    """The setting of an environment."""
    return {name: value for name, value in env.items() if name != "SEED"}


def with_seed(setting: dict[str, str], seed: str) -> dict[str, str]:
    """The environment of a setting with a seed, or with none."""
    return {**setting, "SEED": seed} if seed else dict(setting)


def describe(env: dict[str, str]) -> str:
    """An environment in words."""
    return " ".join(f"{name}={value}" for name, value in env.items()) or "as configured"


# === The study ====================================================================================


class Claim(NamedTuple):
    """A trial that only this worker has."""

    trial: Any
    has_begun: bool  # a dead worker left its run behind, which goes on or is over


class Study:
    """Optuna's study of one NAME, shared by all workers of its database."""

    def __init__(
        self, args: argparse.Namespace, space: Space, description: dict[str, Any], worker: str
    ):
        """Opens or creates the study and queues what is wanted.

        Raises Refused if the database cannot be used, or if the study was started with another
        `description`: code, environment, knobs.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        # A worker that asks and tells sends its signs of life by hand.
        warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")
        self.args = args
        self.space = space
        self.worker = worker
        self.optuna = optuna
        self.states = optuna.trial.TrialState
        self.folder = Path("runs/sweeps") / args.name
        self.url = self.database_url()
        self.storage = None  # until it is open
        self.storage = self.open_storage()
        pruner = optuna.pruners.PercentilePruner(
            PRUNED_PERCENTILE, n_startup_trials=PRUNED_FROM, n_min_trials=PRUNED_FROM
        )
        with self.alone():
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=args.name,
                pruner=pruner,
                direction="minimize",
                load_if_exists=True,
            )
            self.check_description(description)
            self.fill(again=args.retry)

    # --- The database ---

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Turns what goes wrong with the database into Refused, without a password."""
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (SQLAlchemyError, ImportError, OSError, ValueError) as error:
            where = f"{self.folder}.db"
            if self.args.storage:
                where = re.sub(r"//[^@/]*@", "//...@", f"--storage {self.args.storage}")
            raise Refused(f"{where}: {str(error).splitlines()[0]}") from error

    def database_url(self) -> Any:
        """The URL of --storage, or of a file of the study's own."""
        from sqlalchemy.engine import make_url

        with self.refusing():
            url = make_url(self.args.storage or f"sqlite:///{self.folder}.db")
        if url.get_backend_name() not in ("sqlite", "postgresql"):
            shown = url.render_as_string()
            raise Refused(f"--storage {shown}: must be sqlite:///FILE or postgresql://...")
        return url

    def open_storage(self) -> Any:
        """Optuna's storage. Two workers must not create its tables at once."""
        engine_options: dict[str, Any] = {"pool_pre_ping": True}
        heartbeat = max(1, round(self.args.heartbeat))
        with self.refusing():
            if self.is_sqlite:
                engine_options = {"connect_args": {"timeout": 60}}
                Path(self.url.database or "").parent.mkdir(parents=True, exist_ok=True)
            with self.alone():
                return self.optuna.storages.RDBStorage(
                    self.url.render_as_string(hide_password=False),
                    engine_kwargs=engine_options,
                    heartbeat_interval=heartbeat,
                    grace_period=4 * heartbeat,
                )

    @property
    def is_sqlite(self) -> bool:
        """Whether the database is a file; else it is PostgreSQL's."""
        return self.url.get_backend_name() == "sqlite"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """What is done within, one worker does at a time."""
        if self.is_sqlite:
            with Path(f"{self.url.database}.lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
            return

        import sqlalchemy

        engine = self.storage.engine if self.storage else sqlalchemy.create_engine(self.url)
        key = {"key": zlib.crc32(b"train_gpt sweep " + self.args.name.encode())}
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("select pg_advisory_lock(:key)"), key)
            # The lock is the connection's, not the transaction's.
            connection.commit()
            try:
                yield
            finally:
                connection.execute(sqlalchemy.text("select pg_advisory_unlock(:key)"), key)

    def check_description(self, description: dict[str, Any]) -> None:
        """Keeps what the study was started with. Raises Refused if it was started with another.

        Runs of different code or environment are no sweep. A grid may grow by values, and any
        study by seeds.
        """
        known = dict(self.study.user_attrs)
        if "knobs" not in known:
            self.study.set_metric_names(["val_bpb"])
        for key, value in description.items():
            if key not in known or known[key] == value:
                continue
            if key == "knobs":
                has_same_names = list(known[key]) == list(value)
                if description["search"] == "grid" and has_same_names:
                    continue
                if {**known[key], "SEED": 0} == {**value, "SEED": 0}:
                    continue
            was = json.dumps(known[key])
            now = json.dumps(value)
            raise Refused(
                f"{self.args.name}: was started with {key} {was}, now {now}; take another NAME"
            )
        for key, value in description.items():
            if known.get(key) != value:
                self.study.set_user_attr(key, value)

    # --- The queue ---

    def trials(self) -> list[Any]:
        """All trials of the study, in the order of their numbers."""
        return self.study.get_trials(deepcopy=False)

    def trials_in(self, *states: Any) -> list[Any]:
        """The trials in one of the states."""
        return [trial for trial in self.trials() if trial.state in states]

    def count(self, *states: str) -> int:
        """How many trials are in states of these names."""
        return sum(trial.state.name in states for trial in self.trials())

    def completed(self, env: dict[str, str]) -> int:
        """How many runs of the same setting came through."""
        setting = run_key(env).setting
        done = self.trials_in(self.states.COMPLETE)
        return sum(run_key(trial.user_attrs["env"]).setting == setting for trial in done)

    def outcome_of(self, trial: Any) -> str:
        """The kind of a trial's outcome, "" while it has none.

        A trial that failed without an outcome was lost with its worker.
        """
        is_lost = trial.state == self.states.FAIL
        return trial.user_attrs.get("outcome", "lost" if is_lost else "")

    def fill(self, again: bool = False) -> None:
        """Queues every run that is wanted and neither queued, running nor over.

        Lost and interrupted runs are wanted again, with `again` all that failed. Every setting
        comes with the first seed, then with the second, and so on.
        """
        covered = set()
        losses: Counter[RunKey] = Counter()
        run_ids: dict[RunKey, str] = {}
        settings: dict[tuple, dict[str, str]] = {}
        for trial in self.trials():
            env = trial.user_attrs["env"]
            key = run_key(env)
            settings.setdefault(key.setting, without_seed(env))
            outcome = self.outcome_of(trial)
            has_failed = trial.state == self.states.FAIL
            if not has_failed or (outcome not in RUNS_AGAIN and not again):
                covered.add(key)
            elif outcome == "lost":
                losses[key] += 1
            if outcome in RUNS_AGAIN and "run_id" in trial.user_attrs:
                run_ids[key] = trial.user_attrs["run_id"]
        if self.args.search == "grid":
            settings |= {run_key(setting).setting: setting for setting in self.space.settings()}

        for seed in self.space.seeds or ("",):
            for name, setting in settings.items():
                key = RunKey(name, seed)
                if key not in covered and (again or losses[key] < MOST_LOSSES):
                    self.queue(with_seed(setting, seed), run_ids.get(key, ""))

    def queue(self, env: dict[str, str], run_id: str = "") -> None:
        """Queues a run: a new one, or one that goes on from the checkpoint of the run `run_id`."""
        attributes: dict[str, Any] = {"env": env, "setting": describe(without_seed(env))}
        if "SEED" in env:
            attributes["seed"] = int(env["SEED"])
        if run_id and self.space.config(env).checkpoint_every:
            attributes["run_id"] = run_id
        parameters, _ = self.space.shown(env)
        self.study.enqueue_trial(parameters, user_attrs=attributes)

    def draw(self) -> None:
        """Queues TPE's next setting with every seed, until there are as many as asked for."""
        trials_of: dict[tuple, list[Any]] = {}
        for trial in self.trials():
            trials_of.setdefault(run_key(trial.user_attrs["env"]).setting, []).append(trial)
        if len(trials_of) >= self.args.trials:
            return
        seen = []
        for group in trials_of.values():
            setting = without_seed(group[0].user_attrs["env"])
            seen.append((setting, self.mean_of_setting(group)))
        startup = min(10, max(3, self.args.trials // 4))
        random_seed = zlib.crc32(self.args.name.encode()) + len(trials_of)
        setting = self.space.propose(seen, random_seed, startup)
        if setting:
            for seed in self.space.seeds or ("",):
                self.queue(with_seed(setting, seed))

    # --- A trial per setting ---

    @property
    def name_of_settings(self) -> str:
        """The name of the study with a trial per setting."""
        return f"{self.args.name}-settings"

    def write_settings(self) -> Any:
        """Brings the study that has a trial per setting up to date, and returns it.

        A setting is there once all its runs are over, with the mean over its seeds. A trial that is
        over never changes, so where a setting has got more runs all are written anew.
        """
        groups: dict[str, list[Any]] = {}
        for trial in self.trials():
            groups.setdefault(trial.user_attrs["setting"], []).append(trial)
        unfinished = (self.states.RUNNING, self.states.WAITING)
        over = {
            setting: trials
            for setting, trials in groups.items()
            if not any(trial.state in unfinished for trial in trials)
        }
        with self.alone():
            study = self.open_settings()
            written = {t.user_attrs["setting"]: t.user_attrs["trials"] for t in study.trials}
            if any(number != len(over.get(name, ())) for name, number in written.items()):
                self.optuna.delete_study(study_name=study.study_name, storage=self.storage)
                study = self.open_settings()
                written = {}
            for setting, trials in over.items():
                if setting not in written:
                    study.add_trial(self.trial_of_setting(setting, trials))
        return study

    def open_settings(self) -> Any:
        """The study with a trial per setting, made where it is not there."""
        study = self.optuna.create_study(
            storage=self.storage,
            study_name=self.name_of_settings,
            direction="minimize",
            load_if_exists=True,
        )
        if not study.metric_names:
            study.set_metric_names(["mean val_bpb"])
        return study

    def trial_of_setting(self, setting: str, trials: list[Any]) -> Any:
        """One trial for all runs of a setting: the mean of those that came through, or failed."""
        scores = [trial.value for trial in trials if trial.state == self.states.COMPLETE]
        parameters, distributions = self.space.shown(trials[0].user_attrs["env"])
        parameters.pop("SEED", None)
        distributions.pop("SEED", None)
        attributes = {"setting": setting, "trials": len(trials), "runs": len(scores)}
        if len(scores) > 1:
            attributes["sd"] = statistics.stdev(scores)
        return self.optuna.trial.create_trial(
            state=self.states.COMPLETE if scores else self.states.FAIL,
            value=statistics.fmean(scores) if scores else None,
            params=parameters,
            distributions=distributions,
            user_attrs=attributes,
        )

    def mean_of_setting(self, trials: list[Any]) -> float | None:
        """Mean score of a setting's trials: None while none is done, inf where all have failed."""
        done = [trial.value for trial in trials if trial.state == self.states.COMPLETE]
        if done:
            return statistics.fmean(done)
        unfinished = (self.states.RUNNING, self.states.WAITING)
        is_pending = any(trial.state in unfinished for trial in trials)
        return None if is_pending else math.inf

    # --- Claiming ---

    def claim(self) -> Claim | None:
        """A trial for this worker: one that a dead worker left behind, else the next in the queue.

        Draws TPE's next setting once nothing is queued. Skips settings of which a seed was pruned.
        """
        with self.alone():
            left = self.take_over()
            if left:
                return Claim(left, has_begun=True)
            if self.args.search == "tpe" and not self.trials_in(self.states.WAITING):
                self.draw()
            pruned = self.trials_in(self.states.PRUNED)
            hopeless = {run_key(trial.user_attrs["env"]).setting for trial in pruned}
            for trial in self.trials_in(self.states.WAITING):
                env = trial.user_attrs["env"]
                # Optuna gives the oldest queued trial.
                asked = self.study.ask(self.space.shown(env)[1])
                assert asked.number == trial.number, (asked.number, trial.number)
                if run_key(env).setting in hopeless:
                    self.tell(asked, Outcome("pruned", "another seed of this setting was pruned"))
                    continue
                self.storage.record_heartbeat(asked._trial_id)
                asked.set_user_attr("worker", self.worker)
                # With a run_id it goes on from the checkpoint of a lost run.
                if "run_id" not in trial.user_attrs:
                    asked.set_user_attr("run_id", f"{self.args.name}-{asked.number:04d}")
                return Claim(asked, has_begun=False)
        return None

    def take_over(self) -> Any:
        """Fails trials whose worker is gone, without an outcome, and queues them anew.

        If a run itself needs no second try, because it is over or goes on in Slurm, its trial
        becomes this worker's and is returned.
        """
        for trial in self.trials_in(self.states.RUNNING):
            worker = trial.user_attrs.get("worker", "")
            if worker == self.worker or (worker and not self.is_gone(worker)):
                continue
            folder = self.folder / f"{trial.number:04d}"
            if worker and (is_over(folder) or trial.user_attrs.get("job")):
                mine = self.optuna.trial.Trial(self.study, trial._trial_id)
                mine.set_user_attr("worker", self.worker)
                return mine
            # While the run's lock is held, its keeper is still ending it.
            if not worker or not is_locked(folder / "lock"):
                self.storage.set_trial_state_values(trial._trial_id, self.states.FAIL)
        self.optuna.storages.fail_stale_trials(self.study)
        self.fill()
        return None

    def is_gone(self, worker: str) -> bool:
        """Whether a worker of this machine is gone: nobody holds its lock.

        One of another machine has no lock here; it is gone when its heartbeat has stopped.
        """
        path = self.folder / "workers" / worker
        return path.exists() and not is_locked(path)

    def tell(self, trial: Any, outcome: Outcome) -> bool:
        """Ends a trial; False if it was no longer this worker's to end.

        Needs no lock, because a trial ends once.
        """
        trial_id = trial._trial_id
        values = None
        state = self.states.FAIL
        if outcome.kind == "done":
            state = self.states.COMPLETE
            values = [outcome.figures["val_bpb"]]
        elif outcome.kind == "pruned":
            state = self.states.PRUNED
            known = self.storage.get_trial(trial_id)
            last = known.intermediate_values.get(known.last_step, math.nan)
            values = [last] if math.isfinite(last) else None
        attributes = {"outcome": outcome.kind, "reason": outcome.reason, **outcome.figures}
        try:
            for name, value in attributes.items():
                if value != "":
                    self.storage.set_trial_user_attr(trial_id, name, value)
            return self.storage.set_trial_state_values(trial_id, state, values)
        except self.optuna.exceptions.UpdateFinishedTrialError:
            return False


def is_over(folder: Path) -> bool:
    """Whether the present attempt of a run's folder has ended by itself."""
    job = read_job(folder)
    ended = read_exit(folder)
    return bool(job and ended and ended.token == job.token and not ended.stopped)
