#!/usr/bin/env python3
"""Sweep knobs of train_gpt.py over seeds: one command starts the study, the same command goes on with it.

    sweep.py chunks SEED=0,42,1337 TTT_CHUNK_SIZE=32,48                    every combination, mean and sd over the seeds
    sweep.py rates MATRIX_LR=log:0.01:0.05 MIN_LR=lin:0:0.2 --trials 30    a range is searched (TPE), 30 settings
    sweep.py rates4 SEED=0,1,2 MATRIX_LR=log:0.01:0.05:4                   four values of a range, spaced evenly in log
    sweep.py ttt SEED=0,1 TTT_LORA_LR=5e-5,1e-4,2e-4 --eval-only final_model.int6.ptz       adaptation alone
    MAX_WALLCLOCK_SECONDS=60 sweep.py quick ...                            the environment holds for every run
    sweep.py big ... --storage postgresql://user@host/optuna               the same on each machine: they share the work
    sweep.py big ... --launcher slurm --parallel 4 --slurm partition=h100  one job a run, resumed sweeps find their jobs

Every run is a torchrun of train_gpt.py with a RUN_ID (NAME-0003), a log (logs/NAME-0003.txt) and a folder of its own
(runs/sweeps/NAME/0003; output.txt there is what it printed). Names, ranges and combinations are checked before anything
starts. A run that crashes, is refused, takes too long, scores INVALID or exceeds 16,000,000 bytes is a failed trial
with its `outcome` and `reason`, and the sweep goes on. Ctrl-C ends the runs, and so does a kill -9 of the sweep. The
same command then goes on: no finished run is repeated. Values and seeds may be added; anything else that changes
(script, environment, --nproc) needs a new NAME. SEED is replication: a setting is judged by the mean over all its
seeds, by TPE too. Look at a study, running or finished, with

    optuna-dashboard sqlite:///runs/sweeps/NAME.db

Exit status: 0 every run finished, 1 some failed or did not fit the budget, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
import scripts  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[1] / "train_gpt.py"
OWN = ("RUN_ID", "ARTIFACT_DIR")  # what tells runs apart is the sweep's to set
GRACE = 30.0  # seconds from SIGTERM to SIGKILL: time to write a checkpoint
LOSSES = 3  # a run that was lost so often (dead worker, dead machine) is given up


class Refused(Exception):
    """Wrong usage. The message is all the user sees, a line per problem; exit status 2."""


# ---- The keeper: a process between the sweep and one run, so that the run never outlives the sweep -------------------


def write_json(path: Path, value: Any) -> None:  # whole or not at all
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value), encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any]:  # {} where there is none
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def locked(
    path: Path,
) -> bool:  # whether a living process of this machine holds it: the kernel lets go for the dead
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def descendants() -> list[
    int
]:  # of this process, in whatever session, zombies left out; none without /proc
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(path.parent.name))
    found = [os.getpid()]
    for process in found:
        found += children.get(process, [])
    return found[1:]


def prctl(option: int, value: int) -> None:  # Linux only; elsewhere the process group must do
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def end(run: subprocess.Popen) -> None:  # politely, then all that is left of it, its orphans too
    if run.poll() is None:
        run.terminate()  # torchrun passes it on to its workers and waits for them
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(GRACE)
    deadline = (
        time.monotonic() + 10
    )  # a process in the middle of a system call may take a while to go
    with contextlib.suppress(OSError):
        os.killpg(run.pid, signal.SIGKILL)
    while (left := descendants()) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def keep(folder: Path) -> int:
    """Runs folder/job.json and leaves folder/exit.json: status, seconds and, if it was stopped, why. Stops the run with
    all its descendants when its time is up, folder/stop appears, SIGTERM comes or what started this process is gone."""
    parent = os.getppid()
    prctl(
        36, 1
    )  # PR_SET_CHILD_SUBREAPER: orphans of the run become children of this process, where it finds them
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for the keeper of an attempt before
        job, stopped, start = read_json(folder / "job.json"), "", time.monotonic()
        terminated: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))

        def die_with_keeper() -> None:
            prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: even if this process is killed

        with (folder / "output.txt").open("ab") as output:
            run = subprocess.Popen(
                job["command"],
                cwd=job["cwd"],
                env={**os.environ, **job["env"]},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_keeper,
            )
        while run.poll() is None and not stopped:
            time.sleep(0.1)
            if os.getppid() != parent or job["parent"] not in (None, parent):
                stopped = "orphaned"
            elif terminated or (folder / "stop").exists():
                stopped = "stopped"
            elif 0 < job["timeout"] < time.monotonic() - start:
                stopped = "timed out"
        end(run)
        done = {
            "token": job["token"],
            "status": run.wait(),
            "stopped": stopped,
            "seconds": time.monotonic() - start,
        }
        write_json(folder / "exit.json", done)
    return 0


# ---- What the user asked for: knobs, checked against the script ------------------------------------------------------


class Knob(NamedTuple):
    name: str
    values: tuple[str, ...]  # as the environment wants them; empty for a range
    span: tuple[float, ...] = ()  # low and high
    log: bool = False

    @classmethod
    def parse(cls, text: str) -> Knob:
        """NAME=a,b,c, or NAME=log:low:high or lin:low:high, with :count for that many values. Refused if malformed."""
        name, equals, value = text.partition("=")
        kind, *bounds = value.split(":")
        if kind not in ("log", "lin"):
            values = tuple(value.split(","))
            if not name or not equals or "" in values or len(set(values)) < len(values):
                raise Refused(
                    f"{text}: must be NAME=value,value.. without repeats, or NAME=log:low:high, lin:low:high"
                )
            return cls(name, values)
        try:
            low, high, count = (
                float(bounds[0]),
                float(bounds[1]),
                int(bounds[2]) if bounds[2:] else 0,
            )
            wrong = len(bounds) > 3 or not low < high < math.inf or kind == "log" and low <= 0
            wrong |= bool(bounds[2:]) and count < 2
        except (ValueError, IndexError):
            wrong = True
        if wrong:
            raise Refused(
                f"{text}: must be {kind}:low:high or {kind}:low:high:count, low below high, log above 0"
            )
        if not count:
            return cls(name, (), (low, high), kind == "log")
        steps = [i / (count - 1) for i in range(count)]
        points = [
            low * (high / low) ** s if kind == "log" else low + (high - low) * s for s in steps
        ]
        return cls(name, tuple(f"{p:.4g}" for p in points), log=kind == "log")


class Space:  # every run the command stands for
    def __init__(
        self, script: ModuleType, knobs: list[Knob], base: dict[str, str], gpus: list[str]
    ):
        self.script, self.knobs, self.base, self.has_cuda = script, knobs, base, bool(gpus)
        self.fields = script.Config.__dataclass_fields__
        self.seeds = next((k.values for k in knobs if k.name == "SEED"), ())
        self.searched = [k for k in knobs if k.name != "SEED"]

    def config(self, env: dict[str, str]) -> Any:  # the script's own check; raises its UsageError
        around = {k: v for k, v in os.environ.items() if k not in OWN} | {"RUN_ID": "sweep"}
        return self.script.Config.from_env({**around, **self.base, **env}, self.has_cuda)[0]

    def check(self) -> Any:
        """The config of the first combination. Refused, with all problems at once, if the script would refuse one."""
        for knob in self.knobs:
            if knob.name in OWN:
                raise Refused(f"{knob.name}: set by the sweep, a different one for every run")
            if len([k for k in self.knobs if k.name == knob.name]) > 1:
                raise Refused(f"{knob.name}: given more than once")
            if knob.span and not isinstance(self.value(knob.name), (int, float)):
                raise Refused(f"{knob.name}: has no range; list its values")
        ends = [k.values or tuple(self.text(k, end) for end in k.span) for k in self.knobs]
        configs, problems = [], {}
        for values in itertools.product(*ends):
            try:
                configs.append(
                    self.config(dict(zip([k.name for k in self.knobs], values, strict=True)))
                )
            except self.script.UsageError as error:
                problems |= dict.fromkeys(str(error).splitlines())
        unknown = [
            self.near(k) for k in self.knobs if k.name not in [f.upper() for f in self.fields]
        ]
        if unknown or problems:
            raise Refused(
                "\n".join([*unknown, *(p for p in problems if ": not a knob; " not in p)])
            )
        return configs[0]

    def near(self, knob: Knob) -> str:
        import difflib

        found = difflib.get_close_matches(knob.name.lower(), self.fields, n=1, cutoff=0.6)
        hint = f"did you mean {found[0].upper()}?" if found else "train_gpt.py --knobs lists them"
        return f"{knob.name}: not a knob of {Path(self.script.__file__).name}; {hint}"

    def value(self, name: str) -> Any:  # a knob's default, for its type
        return getattr(self.fields.get(name.lower()), "default", "")

    def text(
        self, knob: Knob, value: float
    ) -> str:  # as the environment wants it: four digits, inside the range
        if isinstance(self.value(knob.name), int):
            return str(round(value))
        return f"{min(max(float(f'{value:.4g}'), knob.span[0]), knob.span[1]):.10g}"

    def settings(self) -> list[dict[str, str]]:  # of a grid: every combination, seeds apart
        names = [k.name for k in self.searched]
        return [
            dict(zip(names, v, strict=True))
            for v in itertools.product(*(k.values for k in self.searched))
        ]

    def shown(self, env: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Optuna parameters and distributions of a run, for the dashboard: numbers as numbers. Bounds may move as
        values are added, so numeric knobs are intervals even when they are listed."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        params, kinds = {}, {}
        for knob in self.knobs:
            text, default = env[knob.name], self.value(knob.name)
            if isinstance(default, bool) or not isinstance(default, (int, float)):
                choices = self.fields[knob.name.lower()].metadata["choices"] or knob.values
                kinds[knob.name] = CategoricalDistribution(
                    ("0", "1") if isinstance(default, bool) else choices
                )
                params[knob.name] = text
                continue
            number = type(default)
            params[knob.name] = number(text)
            points = [number(v) for v in (*knob.values, *knob.span, text)]
            make = IntDistribution if number is int else FloatDistribution
            kinds[knob.name] = make(min(points), max(points), log=knob.log)
        return params, kinds

    def propose(
        self, seen: list[tuple[dict[str, str], float | None]], seed: int, startup: int
    ) -> dict[str, str]:
        """TPE's next setting. `seen`: each setting with its mean val_bpb, inf if it failed, None while it runs. Seeds
        are no dimension: TPE must not learn which seed is lucky. What the script would refuse is told to TPE as bad."""
        import optuna
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        kinds = {}
        for k in self.searched:
            number = type(self.value(k.name))
            make = IntDistribution if number is int else FloatDistribution
            bounds = [number(end) for end in k.span]
            kinds[k.name] = (
                make(*bounds, log=k.log) if k.span else CategoricalDistribution(k.values)
            )
        sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True
        )
        study, state = optuna.create_study(sampler=sampler), optuna.trial.TrialState

        def add(setting: dict[str, str], value: float | None) -> None:
            params = {
                k.name: (setting[k.name] if k.values else type(self.value(k.name))(setting[k.name]))
                for k in self.searched
            }
            known = dict(state=state.RUNNING) if value is None else dict(state=state.PRUNED)
            if value is not None and math.isfinite(value):
                known = dict(state=state.COMPLETE, value=value)
            study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, **known))

        for setting, value in seen:
            add(setting, value)
        old = [setting for setting, _ in seen]
        for _ in range(200):
            drawn = study.ask(kinds).params
            setting = {
                k.name: drawn[k.name] if k.values else self.text(k, drawn[k.name])
                for k in self.searched
            }
            try:
                self.config(setting)
            except self.script.UsageError:
                add(setting, math.inf)
                continue
            if setting not in old:
                return setting
        return {}


# ---- What became of a run --------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    kind: str  # done, crashed, refused, timed out, invalid, oversized, pruned; interrupted and lost ones run again
    reason: str = ""
    figures: dict[str, Any] = {}  # noqa: RUF012


INTERMEDIATE = re.compile(r"^(\d+)/\d+ val_loss: \S+ val_bpb: (\S+)", re.MULTILINE)


def judge(output: str, ended: dict[str, Any], limit_bytes: int) -> Outcome:
    """From what a run printed and its keeper's note. INVALID counts before all else: no such score is ever ranked."""
    finals = re.findall(r"^final (\{.*\})$", output, re.MULTILINE)
    figures = json.loads(finals[-1]) if finals else {}
    own = re.findall(
        r"^train_gpt\.py: (.+)$", output, re.MULTILINE
    )  # what the script says of its own failure
    status = ended["status"]
    if nested := re.search(
        r"exitcode\s*:\s*(-?\d+)", output
    ):  # torchrun ends with 1 whatever its workers ended with
        status = int(nested[1]) if status else 0
    if ended["stopped"] == "timed out":
        return Outcome(
            "timed out", f"stopped after {ended['seconds']:.0f} s; last line: {last_line(output)}"
        )
    if ended["stopped"]:
        return Outcome("interrupted", ended["stopped"])
    if invalid := re.search(r"^.*\bINVALID\b.*$", output, re.MULTILINE):
        return Outcome("invalid", invalid[0][:300], figures)
    if status == 2:
        return Outcome("refused", own[-1] if own else last_line(output))
    if status or not figures:
        raised = re.findall(
            r"^(?:\[rank\d+\]: *)?([\w.]*(?:Error|Exception|Interrupt)\b.*)$", output, re.MULTILINE
        )
        why = [*own, *(e for e in raised if "ChildFailedError" not in e), last_line(output)][0]
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return Outcome("crashed", f"{how}: {why}"[:300], figures)
    if not math.isfinite(figures.get("val_bpb", math.nan)):
        return Outcome("invalid", f"val_bpb is {figures.get('val_bpb')}", figures)
    if figures.get("artifact_bytes", 0) > limit_bytes:
        over = figures["artifact_bytes"] - limit_bytes
        return Outcome(
            "oversized",
            f"artifact of {figures['artifact_bytes']} bytes, {over} over the limit",
            figures,
        )
    return Outcome("done", "", figures)


def last_line(output: str) -> str:
    lines = [line.strip() for line in output[-4000:].splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


# ---- The study: trials in a database, claimed by one worker at a time ------------------------------------------------


class Study:
    """Optuna's study of one NAME. All that must not happen twice (creating, queueing, claiming, taking over) happens
    while holding a lock: a file beside an SQLite database, an advisory lock in PostgreSQL."""

    def __init__(self, args: argparse.Namespace, space: Space, about: dict[str, Any], worker: str):
        import optuna
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import SQLAlchemyError

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings(
            "ignore", message="Heartbeat of storage is supposed"
        )  # ask and tell beat here by hand
        self.args, self.space, self.worker, self.optuna = args, space, worker, optuna
        self.states, self.folder = optuna.trial.TrialState, Path("runs/sweeps") / args.name
        try:
            self.url = make_url(args.storage or f"sqlite:///{self.folder}.db")
            if self.url.get_backend_name() not in ("sqlite", "postgresql"):
                raise Refused(
                    f"--storage {self.url.render_as_string()}: must be sqlite:///FILE or postgresql://..."
                )
            wait = {"pool_pre_ping": True}
            if self.url.get_backend_name() == "sqlite":
                wait = {"connect_args": {"timeout": 60}}
                Path(self.url.database or "").parent.mkdir(parents=True, exist_ok=True)
            beat, self.storage = max(1, round(args.heartbeat)), None
            with self.alone():  # two workers must not create the tables at once
                self.storage = optuna.storages.RDBStorage(
                    self.url.render_as_string(hide_password=False),
                    engine_kwargs=wait,
                    heartbeat_interval=beat,
                    grace_period=4 * beat,
                )
        except (SQLAlchemyError, ImportError, OSError, ValueError) as error:
            url = (
                re.sub(r"//[^@/]*@", "//...@", f"--storage {args.storage}")
                if args.storage
                else f"{self.folder}.db"
            )
            raise Refused(f"{url}: {str(error).splitlines()[0]}") from error
        pruner = optuna.pruners.PercentilePruner(75, n_startup_trials=4, n_min_trials=4)
        with self.alone():
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=args.name,
                pruner=pruner,
                direction="minimize",
                load_if_exists=True,
            )
            self.compare(about)
            self.fill(again=args.retry)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:  # what is done within, one worker does at a time
        if self.url.get_backend_name() == "sqlite":
            with Path(f"{self.url.database}.lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        else:
            import sqlalchemy

            engine = self.storage.engine if self.storage else sqlalchemy.create_engine(self.url)
            with engine.connect() as connection:
                key = zlib.crc32(b"train_gpt sweep " + self.args.name.encode())
                connection.execute(sqlalchemy.text("select pg_advisory_lock(:key)"), {"key": key})
                connection.commit()  # the lock is the connection's, not the transaction's
                try:
                    yield
                finally:
                    connection.execute(
                        sqlalchemy.text("select pg_advisory_unlock(:key)"), {"key": key}
                    )

    def compare(self, about: dict[str, Any]) -> None:
        """Keeps what the study was started with, or refuses: runs of different code or environment are no sweep."""
        known = dict(self.study.user_attrs)
        if "knobs" not in known:
            self.study.set_metric_names(["val_bpb"])
        for key in [k for k in about if k in known and known[k] != about[k]]:
            if key == "knobs" and about["search"] == "grid" and [*known[key]] == [*about[key]]:
                continue  # a grid may grow
            if key == "knobs" and {**known[key], "SEED": 0} == {**about[key], "SEED": 0}:
                continue  # more seeds for every setting
            was, now = json.dumps(known[key]), json.dumps(about[key])
            raise Refused(
                f"{self.args.name}: was started with {key} {was}, now {now}; take another NAME"
            )
        for key, value in about.items():
            if known.get(key) != value:
                self.study.set_user_attr(key, value)

    def trials(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    @staticmethod
    def key(env: dict[str, str]) -> tuple[tuple[tuple[str, str], ...], str]:  # (setting, seed)
        return tuple(sorted((k, v) for k, v in env.items() if k != "SEED")), env.get("SEED", "")

    def fill(self, again: bool = False) -> None:
        """Queues every run that is wanted and neither queued, running nor over. A trial that failed without an outcome
        was lost with its worker; it and an interrupted one are wanted again, with `again` all that failed."""
        covered, lost, left, settings = set(), {}, {}, {}
        for trial in self.trials():
            env = trial.user_attrs["env"]
            setting, seed = self.key(env)
            settings.setdefault(setting, {k: v for k, v in env.items() if k != "SEED"})
            outcome = trial.user_attrs.get(
                "outcome", "lost" if trial.state == self.states.FAIL else ""
            )
            if (
                trial.state != self.states.FAIL
                or outcome not in ("lost", "interrupted")
                and not again
            ):
                covered.add((setting, seed))
            elif outcome == "lost":
                lost.setdefault((setting, seed), []).append(trial)
            if outcome in ("lost", "interrupted") and "run_id" in trial.user_attrs:
                left[setting, seed] = trial.user_attrs["run_id"]
        if self.args.search == "grid":
            settings |= {self.key(s)[0]: s for s in self.space.settings()}
        for seed in self.space.seeds or (
            "",
        ):  # every setting with the first seed, then with the second ..
            for setting, env in settings.items():
                if (setting, seed) not in covered and (
                    again or len(lost.get((setting, seed), [])) < LOSSES
                ):
                    self.queue(
                        {**env, **({"SEED": seed} if seed else {})}, left.get((setting, seed), "")
                    )

    def queue(
        self, env: dict[str, str], run_id: str = ""
    ) -> None:  # a new run, or on with the one that left run_id
        about = {
            "env": env,
            "setting": label(env),
            **({"seed": int(env["SEED"])} if "SEED" in env else {}),
        }
        if run_id and self.space.config(env).checkpoint_every:
            about["run_id"] = run_id
        self.study.enqueue_trial(self.space.shown(env)[0], user_attrs=about)

    def completed(self, env: dict[str, str]) -> int:  # runs of the same setting
        setting = self.key(env)[0]
        done = [t for t in self.trials() if t.state == self.states.COMPLETE]
        return sum(self.key(t.user_attrs["env"])[0] == setting for t in done)

    def count(self, *states: str) -> int:
        return sum(t.state.name in states for t in self.trials())

    def claim(self) -> tuple[Any, bool] | None:
        """A trial that only this worker has, and whether its run has begun already: one that a dead worker left behind,
        else the next in the queue. Draws TPE's next setting once nothing is queued."""
        with self.alone():
            if left := self.take_over():
                return left, True
            trials = self.trials()
            if self.args.search == "tpe" and not any(
                t.state == self.states.WAITING for t in trials
            ):
                self.draw(trials)
            hopeless = {
                self.key(t.user_attrs["env"])[0] for t in trials if t.state == self.states.PRUNED
            }
            for trial in [t for t in self.trials() if t.state == self.states.WAITING]:
                asked = self.study.ask(
                    self.space.shown(trial.user_attrs["env"])[1]
                )  # the oldest queued one
                assert asked.number == trial.number, (asked.number, trial.number)
                if self.key(trial.user_attrs["env"])[0] in hopeless:
                    self.tell(asked, Outcome("pruned", "another seed of this setting was pruned"))
                    continue
                self.storage.record_heartbeat(asked._trial_id)
                asked.set_user_attr("worker", self.worker)
                if "run_id" not in trial.user_attrs:  # else it goes on from a lost one's checkpoint
                    asked.set_user_attr("run_id", f"{self.args.name}-{asked.number:04d}")
                return asked, False
        return None

    def take_over(self) -> Any:
        """Fails trials whose worker is gone, without an outcome, and queues them anew. On this machine a worker is gone
        when nobody holds its lock; elsewhere when its heartbeat has stopped. If the run itself needs no second try (it
        is over, or goes on in Slurm), makes the trial this worker's and returns it."""
        for trial in [t for t in self.trials() if t.state == self.states.RUNNING]:
            worker, folder = trial.user_attrs.get("worker", ""), self.folder / f"{trial.number:04d}"
            path = self.folder / "workers" / (worker or "none")
            if worker == self.worker or worker and (not path.exists() or locked(path)):
                continue
            job, ended = read_json(folder / "job.json"), read_json(folder / "exit.json")
            over = ended.get("token") == job.get("token", "") and not ended["stopped"]
            if worker and (over or trial.user_attrs.get("job")):
                mine = self.optuna.trial.Trial(self.study, trial._trial_id)
                mine.set_user_attr("worker", self.worker)
                return mine
            if not worker or not locked(folder / "lock"):  # else its keeper is still ending it
                self.storage.set_trial_state_values(trial._trial_id, self.states.FAIL)
        self.optuna.storages.fail_stale_trials(self.study)
        self.fill()
        return None

    def tell(self, trial: Any, outcome: Outcome) -> bool:
        """Ends a trial; False if it was no longer this worker's to end. Needs no lock: a trial ends once."""
        state = {"done": self.states.COMPLETE, "pruned": self.states.PRUNED}.get(
            outcome.kind, self.states.FAIL
        )
        known, id_ = self.storage.get_trial(trial._trial_id), trial._trial_id
        values = None
        if state == self.states.COMPLETE:
            values = [outcome.figures["val_bpb"]]
        elif state == self.states.PRUNED and math.isfinite(
            known.intermediate_values.get(known.last_step, math.nan)
        ):
            values = [known.intermediate_values[known.last_step]]
        try:
            for name, value in {
                "outcome": outcome.kind,
                "reason": outcome.reason,
                **outcome.figures,
            }.items():
                if value != "":
                    self.storage.set_trial_user_attr(id_, name, value)
            return self.storage.set_trial_state_values(id_, state, values)
        except self.optuna.exceptions.UpdateFinishedTrialError:
            return False

    def draw(self, trials: list[Any]) -> None:  # TPE's next setting, queued with every seed
        runs: dict[tuple, list[Any]] = {}
        for trial in trials:
            runs.setdefault(self.key(trial.user_attrs["env"])[0], []).append(trial)
        if len(runs) >= self.args.trials:
            return
        seen = []
        for group in runs.values():
            done = [t.value for t in group if t.state == self.states.COMPLETE]
            pending = any(t.state in (self.states.RUNNING, self.states.WAITING) for t in group)
            value = None if pending and not done else statistics.fmean(done) if done else math.inf
            env = group[0].user_attrs["env"]
            seen.append(({k: v for k, v in env.items() if k != "SEED"}, value))
        startup = min(10, max(3, self.args.trials // 4))
        setting = self.space.propose(seen, zlib.crc32(self.args.name.encode()) + len(runs), startup)
        for seed in (self.space.seeds or ("",)) if setting else ():
            self.queue({**setting, **({"SEED": seed} if seed else {})})


def label(env: dict[str, str]) -> str:  # a setting in words
    return " ".join(f"{k}={v}" for k, v in env.items() if k != "SEED") or "as configured"


# ---- Launchers: how a keeper is started and asked to stop ------------------------------------------------------------


class Local:  # a keeper on this machine; `slot` says which of its GPUs
    parent = staticmethod(os.getpid)  # whose end ends the runs

    def __init__(self, args: argparse.Namespace, gpus: list[str]):
        self.args, self.gpus = args, gpus
        cores = os.cpu_count() or 1
        self.threads = str(max(1, cores // (args.parallel * max(args.nproc, 1))))

    def env(self, slot: int) -> dict[str, str]:
        ranks = max(self.args.nproc, 1)
        mine = self.gpus[slot * ranks : (slot + 1) * ranks]
        chosen = {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {}
        return chosen | (
            {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": self.threads}
        )

    def start(
        self, folder: Path
    ) -> tuple[str, Callable[[], bool]]:  # job id, and whether the run is over
        command = [sys.executable, str(Path(__file__).resolve()), "--keep", str(folder)]
        keeper = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        return "", lambda: keeper.poll() is not None

    def find(self, job: str, folder: Path) -> Callable[[], bool]:
        return lambda: not locked(folder / "lock")

    def stop(self, folder: Path) -> None:  # the keeper sees folder/stop
        pass


class Slurm:  # a keeper in a job of its own, through submitit; jobs outlive the sweep and are found again by their id
    def __init__(self, args: argparse.Namespace):
        import submitit

        options = {
            k: int(v) if v.isdigit() else v for k, v in (pair.split("=", 1) for pair in args.slurm)
        }
        cluster, shared = (
            options.pop("cluster", "slurm"),
            ("timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node"),
        )
        self.make = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}[cluster]
        minutes = math.ceil(args.timeout / 60) + 5 if args.timeout else 120
        asked = {"timeout_min": minutes, "nodes": 1, "tasks_per_node": 1}
        if cluster == "slurm":
            asked |= {"gpus_per_node": max(args.nproc, 1), "name": args.name}
        try:
            self.executor = submitit.AutoExecutor(args.folder / "jobs", cluster=cluster)
            named = {k if k in shared else f"slurm_{k}": v for k, v in options.items()}
            self.executor.update_parameters(**asked | named)
        except (RuntimeError, NameError, TypeError, AssertionError) as error:
            raise Refused(f"--launcher slurm: {str(error).splitlines()[0]}") from error
        self.submit, self.jobs = submitit.helpers.CommandFunction, {}

    parent = staticmethod(lambda: None)

    def env(self, slot: int) -> dict[str, str]:
        return {}

    def start(self, folder: Path) -> tuple[str, Callable[[], bool]]:
        job = self.executor.submit(
            self.submit([sys.executable, str(Path(__file__).resolve()), "--keep", str(folder)])
        )
        return job.job_id, self.watch(job, folder)

    def find(self, job: str, folder: Path) -> Callable[[], bool]:
        return self.watch(self.make(self.executor.folder, job), folder)

    def watch(self, job: Any, folder: Path) -> Callable[[], bool]:
        self.jobs[folder] = job
        return lambda: (folder / "exit.json").exists() or job.done() and not locked(folder / "lock")

    def stop(self, folder: Path) -> None:
        if not (
            folder / "output.txt"
        ).exists():  # still waiting for its turn; a running one ends by itself
            self.jobs[folder].cancel()


# ---- The sweep -------------------------------------------------------------------------------------------------------


class Active:  # a run this worker follows
    def __init__(self, trial: Any, folder: Path, slot: int):
        self.trial, self.folder, self.slot, self.over = trial, folder, slot, lambda: False
        self.started, self.beat, self.verdict, self.reported = (
            time.monotonic(),
            time.monotonic(),
            "",
            0,
        )
        self.prunable = False

    def output(self) -> str:
        with contextlib.suppress(OSError):
            return (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")
        return ""


KEPT = """val_loss pre_quantization_bpb quantized_bpb quantized_ttt_lora_bpb artifact_bytes steps train_loss code_sha256
    device world_size""".split()  # figures of a finished run that become attributes of its trial


class Sweep:
    def __init__(
        self,
        args: argparse.Namespace,
        space: Space,
        study: Study,
        launcher: Any,
        say: Callable[[str], None],
    ):
        self.args, self.space, self.study, self.launcher, self.say = (
            args,
            space,
            study,
            launcher,
            say,
        )
        self.active: list[Active] = []
        self.leaving, self.asked, self.idle, self.cut = 0, -math.inf, False, False

    def go(self, refresh: Callable[[bool], None]) -> None:
        """Follows its runs and starts new ones until nothing is left to do, for other workers neither."""
        while True:
            for run in list(self.active):
                self.follow(run)
            if not self.leaving:
                self.start_some()
            refresh(False)
            if not self.active and (self.leaving or self.cut or self.finished()):
                return
            time.sleep(0.1)

    def finished(self) -> bool:  # asked when there is nothing to start
        return self.idle and not self.study.count("RUNNING", "WAITING")

    def start_some(self) -> None:
        while len(self.active) < self.args.parallel and not self.cut:
            if self.idle and time.monotonic() - self.asked < 2:  # nothing was there a moment ago
                return
            if (
                self.args.budget
                and self.spent() + self.typical() * (1 + len(self.active)) > self.args.budget
            ):
                self.cut = True
                self.say(
                    f"budget: {span(self.spent())} of {span(self.args.budget)} spent; no run is started any more"
                )
                return
            self.asked, claimed = time.monotonic(), self.study.claim()
            if (
                claimed is None
                and not self.idle
                and (others := self.study.count("RUNNING") - len(self.active)) > 0
            ):
                self.say(
                    f"nothing left to start; waits for {others} runs of other workers, in case one dies"
                )
            self.idle = claimed is None
            if claimed is None:
                return
            self.begin(*claimed)

    def begin(self, trial: Any, begun: bool) -> None:
        slot = next(i for i in itertools.count() if i not in [run.slot for run in self.active])
        run = Active(trial, self.study.folder.absolute() / f"{trial.number:04d}", slot)
        attrs, env = trial.user_attrs, trial.user_attrs["env"]
        self.active.append(run)
        # A setting that has come through once is not pruned any more: a mean over its lucky seeds would flatter it.
        run.prunable = self.args.prune and not self.study.completed(env)
        if begun:
            self.say(
                f"trial {trial.number}: goes on with {attrs['run_id']}, begun by a worker that died"
            )
            run.over = self.launcher.find(attrs.get("job", ""), run.folder)
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        for name in ("exit.json", "stop", "output.txt"):  # of a study of this name that was deleted
            (run.folder / name).unlink(missing_ok=True)
        number = attrs["run_id"].rpartition("-")[
            2
        ]  # an earlier trial's, whose checkpoints this one goes on from
        log, artifacts = Path("logs") / f"{attrs['run_id']}.txt", run.folder.with_name(number)
        if log.exists() and artifacts == run.folder:
            log.rename(log.with_suffix(f".{int(time.time())}.txt"))
        own = {**env, "RUN_ID": attrs["run_id"], "ARTIFACT_DIR": os.path.relpath(artifacts)}
        write_json(
            run.folder / "job.json",
            {
                "token": uuid.uuid4().hex,
                "command": self.command(),
                "cwd": os.getcwd(),
                "timeout": self.args.timeout,
                "parent": self.launcher.parent(),
                "env": {**self.space.base, **self.launcher.env(slot), **own},
            },
        )
        job, run.over = self.launcher.start(run.folder)
        for name, value in (
            ("job", job),
            ("log", f"logs/{attrs['run_id']}.txt"),
            ("folder", own["ARTIFACT_DIR"]),
        ):
            if value:
                trial.set_user_attr(name, value)
        self.say(f"trial {trial.number} starts: {describe(env)}" + f" (job {job})" * bool(job))

    def command(self) -> list[str]:
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={self.args.nproc}",
        ]
        return [
            sys.executable,
            *(torchrun if self.args.nproc else []),
            str(self.args.script.resolve()),
        ]

    def follow(self, run: Active) -> None:
        """Reports what the run has printed, tells the study when it is over, stops it when it is hopeless or, by the
        study, no longer this worker's."""
        over, trial = (
            run.over(),
            run.trial,
        )  # asked first: what comes after the last look is not missed
        if over:
            self.active.remove(run)
            return self.finish(run)
        if run.prunable and not run.verdict:
            found = INTERMEDIATE.findall(run.output())
            for step, bpb in found[run.reported :]:
                trial.report(float(bpb), int(step))
            if found[run.reported :] and trial.should_prune():
                self.stop(
                    run, f"val_bpb {found[-1][1]} at step {found[-1][0]} is in the worst quarter"
                )
            run.reported = len(found)
        if time.monotonic() - run.beat > self.args.heartbeat:
            run.beat = time.monotonic()
            try:
                self.study.storage.record_heartbeat(trial._trial_id)
                if self.study.storage.get_trial(trial._trial_id).state.is_finished():
                    self.stop(run, "lost")
            except Exception as error:  # noqa: BLE001  a database that is away for a while must not cost a run
                self.say(f"trial {trial.number}: no heartbeat: {str(error).splitlines()[0]}")
        return None

    def stop(self, run: Active, verdict: str) -> None:
        run.verdict = verdict
        (run.folder / "stop").touch()
        self.launcher.stop(run.folder)

    def finish(self, run: Active) -> None:
        ended = read_json(run.folder / "exit.json") or {"seconds": 0.0}
        outcome = Outcome("lost", f"killed with its keeper; last line: {last_line(run.output())}")
        if "status" in ended:
            outcome = judge(run.output(), ended, self.space.script.LIMIT_BYTES)
        if (
            run.verdict
            and outcome.kind == "interrupted"
            and run.verdict not in ("lost", "interrupted")
        ):
            outcome = Outcome("pruned", run.verdict)
        all_, bpb = outcome.figures, outcome.figures.get("val_bpb", math.nan)
        figures = {k: all_[k] for k in KEPT if k in all_} | (
            {"val_bpb": bpb} if math.isfinite(bpb) else {}
        )
        figures |= {f"{k} s": round(v, 1) for k, v in all_.get("seconds", {}).items() if v >= 0.1}
        told = self.patiently(
            run, outcome._replace(figures={**figures, "seconds": round(ended["seconds"], 1)})
        )
        line = f"trial {run.trial.number} {outcome.kind}: {describe(run.trial.user_attrs['env'])}: "
        line += f"val_bpb {bpb:.5f}" if outcome.kind == "done" else outcome.reason
        self.say(
            line
            + f" ({span(ended['seconds'])})"
            + ", but it had been given to another worker" * (not told)
        )
        with contextlib.suppress(ImportError):
            import optuna_dashboard

            optuna_dashboard.save_note(self.study.study, markdown(self.rows()))

    def patiently(
        self, run: Active, outcome: Outcome
    ) -> bool:  # a run of half an hour outlasts a database's restart
        for attempt in range(60):
            try:
                return self.study.tell(run.trial, outcome)
            except (self.study.optuna.exceptions.StorageInternalError, OSError) as error:
                self.say(
                    f"trial {run.trial.number}: cannot be told, tries again: {str(error).splitlines()[0]}"
                )
                time.sleep(min(10, 1 + attempt))
        return False

    def leave(self) -> None:  # Ctrl-C: end the runs; what is over by then still counts
        self.leaving += 1
        for run in self.active:
            self.stop(run, run.verdict or "interrupted")

    # -- figures

    def spent(self) -> float:  # seconds of runs, all workers together, failed ones too
        now = time.time()
        return sum(
            now - t.datetime_start.timestamp()
            if t.state.name == "RUNNING"
            else t.user_attrs.get("seconds", 0.0)
            for t in self.study.trials()
            if t.datetime_start
        )

    def typical(self) -> float:  # seconds of a run
        done = [t.user_attrs["seconds"] for t in self.study.trials() if t.state.name == "COMPLETE"]
        return statistics.fmean(done) if done else 0.0

    def total(self) -> int:
        if self.args.search == "tpe":
            return self.args.trials * max(1, len(self.space.seeds))
        return len({self.study.key(t.user_attrs["env"]) for t in self.study.trials()})

    def rows(self) -> list[dict[str, Any]]:  # one per setting, best mean first
        groups: dict[Any, dict[str, Any]] = {}
        for t in self.study.trials():
            env = t.user_attrs["env"]
            row = groups.setdefault(
                self.study.key(env)[0], {"env": env, "bpb": {}, "seconds": [], "other": {}}
            )
            if t.state.name == "COMPLETE":
                row["bpb"][env.get("SEED", "")] = t.value
                row["seconds"].append(t.user_attrs["seconds"])
            elif (kind := t.user_attrs.get("outcome", t.state.name.lower())) not in (
                "fail",
                "lost",
                "interrupted",
            ):
                row["other"][kind] = row["other"].get(kind, 0) + 1  # those three run again
        for row in groups.values():
            values = list(row["bpb"].values())
            row["mean"] = statistics.fmean(values) if values else math.inf
            row["sd"] = statistics.stdev(values) if len(values) > 1 else math.nan
        return sorted(groups.values(), key=lambda r: r["mean"])


# ---- What the user sees ----------------------------------------------------------------------------------------------


def describe(env: dict[str, str]) -> str:
    return " ".join(f"{k}={v}" for k, v in env.items()) or "as configured"


def span(seconds: float) -> str:  # 42 s, 3:05 min, 2:10 h
    if seconds < 100:
        return f"{seconds:.0f} s"
    whole, unit = (seconds, "min") if seconds < 3600 else (seconds / 60, "h")
    return f"{int(whole) // 60}:{int(whole) % 60:02} {unit}"


def cells(row: dict[str, Any], best: float) -> list[str]:
    done, other = row["bpb"], ", ".join(f"{n} {kind}" for kind, n in row["other"].items())
    mean = f"{row['mean']:.5f}" if done else "-"
    sd = f" ± {row['sd']:.5f}" if len(done) > 1 else ""
    gap = f"{row['mean'] - best:+.5f}" if done else ""
    low = f"{min(done.values()):.5f}" if done else ""
    return [
        str(len(done)),
        mean + sd,
        gap,
        low,
        span(statistics.fmean(row["seconds"])) if done else "",
        other,
    ]


HEADS = ["runs", "val_bpb, mean ± sd", "to best", "lowest", "time a run", "besides"]


def markdown(
    rows: list[dict[str, Any]],
) -> str:  # the table as the note that optuna-dashboard shows with the study
    names = [k for k in rows[0]["env"] if k != "SEED"] if rows else []
    lines = [[*names, *HEADS], ["---"] * (len(names) + len(HEADS))]
    lines += [[*(r["env"][n] for n in names), *cells(r, rows[0]["mean"])] for r in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class View:  # a live table on a terminal, plain lines and a table at the end elsewhere
    def __init__(self, args: argparse.Namespace):
        import rich.console
        import rich.live

        self.console = rich.console.Console(
            highlight=False, width=None if sys.stdout.isatty() else 160
        )
        self.live, self.args, self.last, self.sweep = None, args, -math.inf, None
        if self.console.is_terminal:
            self.live = rich.live.Live(console=self.console, auto_refresh=False, transient=True)

    def say(self, line: str) -> None:
        self.console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False, soft_wrap=True)

    def refresh(self, force: bool) -> None:
        if self.live and (force or time.monotonic() - self.last > 1):
            self.last = time.monotonic()
            self.live.update(self.picture(live=True), refresh=True)

    def picture(self, live: bool) -> Any:
        import rich.console
        import rich.progress_bar
        import rich.table

        rows = self.sweep.rows()
        names = [k for k in rows[0]["env"] if k != "SEED"] if rows else []
        table = rich.table.Table(box=rich.box.SIMPLE)
        for i, head in enumerate([*names, *HEADS]):
            table.add_column(
                head, justify="left" if i == len(names) + 5 else "right", no_wrap=i < len(names) + 5
            )
        fit = (
            max(5, (self.console.height or 40) - 12 - len(self.sweep.active)) if live else len(rows)
        )
        for i, row in enumerate(rows[:fit]):
            table.add_row(
                *(row["env"][n] for n in names),
                *cells(row, rows[0]["mean"]),
                style="bold" if i == 0 else "",
            )
        parts = [
            table,
            *([f"  and {len(rows) - fit} more settings"] if len(rows) > fit else []),
            self.status(rows),
        ]
        if live:
            for run in self.sweep.active:
                age = span(time.monotonic() - run.started)
                what = describe(run.trial.user_attrs["env"])
                line = f"  trial {run.trial.number}  {what}  {age}  {last_line(run.output())}"
                parts.append(rich.text.Text(line, no_wrap=True, overflow="ellipsis"))
        return rich.console.Group(*parts)

    def status(self, rows: list[dict[str, Any]]) -> str:
        study, total = self.sweep.study, self.sweep.total()
        names = [t.state.name for t in study.trials()]
        again = (None, "lost", "interrupted")
        over = {
            study.key(t.user_attrs["env"])
            for t in study.trials()
            if t.user_attrs.get("outcome") not in again
        }
        failed = len(over) - names.count("COMPLETE") - names.count("PRUNED")
        best = min(
            ((v, r) for r in rows for v in r["bpb"].values()),
            key=lambda pair: pair[0],
            default=None,
        )
        parts = [
            f"{len(over)}/{total} runs over",
            f"{names.count('RUNNING')} running",
            f"{failed} failed",
        ]
        if best:
            parts.append(f"best {best[0]:.5f}")
        width, filled = 24, round(24 * len(over) / max(1, total))
        left = (
            (total - len(over))
            * self.sweep.typical()
            / max(1, names.count("RUNNING"), self.args.parallel)
        )
        if left:
            parts.append(f"{span(left)} left")
        budget = f", budget {span(self.args.budget)}" if self.args.budget else ""
        spent = f"{span(self.sweep.spent())} of runs{budget}"
        return f"  {'█' * filled}{'░' * (width - filled)} " + " · ".join([*parts, spent])


# ---- Command line ----------------------------------------------------------------------------------------------------


def load_script(path: Path) -> ModuleType:  # train_gpt.py as a module: its Config checks the knobs
    if path.suffix != ".py" or not path.is_file():
        raise Refused(f"--script {path}: is not a Python file")
    return scripts.load_script(path)


def gpu_names(script: ModuleType) -> list[str]:  # those the script may use
    found = [str(i) for i in range(script.torch.cuda.device_count())]
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(found)).split(",") if found else []


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="sweep.py NAME KNOB=value,value.. KNOB=log:low:high .. [options]",
    )
    add = parser.add_argument
    add("name", metavar="NAME", help="of the study, its folder and its runs")
    add(
        "knobs",
        metavar="KNOB=..",
        nargs="+",
        help="a,b,c: these values; log:low:high or lin:low:high: a range for "
        "TPE; with :count appended that many values of it, evenly spaced",
    )
    add(
        "--nproc",
        type=int,
        help="processes, one per GPU, of a run under torchrun (default: the GPUs there are, "
        "shared out over --parallel; 1 without any); 0: python without torchrun, which starts seconds faster",
    )
    add(
        "--parallel",
        type=int,
        default=1,
        metavar="K",
        help="runs at once, each with GPUs of its own (default 1)",
    )
    add("--search", choices=("grid", "tpe"), help="default: tpe if a knob has a range, else grid")
    add(
        "--trials",
        type=int,
        metavar="N",
        help="settings that TPE tries, each with every seed (default 20)",
    )
    add(
        "--eval-only",
        type=Path,
        metavar="FILE",
        help="checkpoint or artifact to score instead of training",
    )
    add(
        "--prune",
        action=argparse.BooleanOptionalAction,
        help="stop a run whose intermediate val_bpb "
        "(VAL_LOSS_EVERY) is in the worst quarter at that step, and skip the setting's other seeds; never once a "
        "seed of it has finished (default: with tpe, not in a grid)",
    )
    add(
        "--timeout",
        type=float,
        default=0,
        metavar="S",
        help="seconds after which a run is stopped (default: never)",
    )
    add(
        "--budget",
        type=float,
        default=0,
        metavar="S",
        help="seconds of runs, all workers together; none is started that would not fit",
    )
    add("--retry", action="store_true", help="run what failed again, once")
    add(
        "--storage",
        metavar="URL",
        help="sqlite:///FILE or postgresql://.. (default sqlite:///runs/sweeps/NAME.db)",
    )
    add(
        "--heartbeat",
        type=float,
        default=30,
        metavar="S",
        help="seconds between signs of life; a worker on another "
        "machine that gives none for four times as long is dead and its run starts again (default 30)",
    )
    add(
        "--launcher",
        choices=("local", "slurm"),
        default="local",
        help="slurm: each run is a job (submitit)",
    )
    add(
        "--slurm",
        nargs="+",
        default=[],
        metavar="K=V",
        help="sbatch options: partition=h100 account=x mem_gb=200 "
        "timeout_min=40; cluster=local tries the same without Slurm",
    )
    add(
        "--script",
        type=Path,
        default=SCRIPT,
        help="the script to run (default: train_gpt.py of this repository)",
    )
    return parser


def check_args(
    args: argparse.Namespace,
) -> list[Knob]:  # fills in the defaults that depend on others
    knobs = [Knob.parse(text) for text in args.knobs]
    ranges = [k.name for k in knobs if k.span]
    args.search = args.search or ("tpe" if ranges else "grid")
    wrong = {
        f"NAME={args.name}: letters, digits, '.', '_' and '-' only": not re.fullmatch(
            r"[A-Za-z0-9][\w.-]*", args.name
        ),
        f"{', '.join(ranges)}: a range has no grid; append :count, list values or use --search tpe": bool(
            ranges
        )
        and args.search == "grid",
        "--trials: only TPE counts settings; a grid runs all of its own": args.trials is not None
        and args.search == "grid",
        "SEED: list the seeds; they are replication, not searched": "SEED" in ranges,
        "--search tpe: needs a knob besides SEED": args.search == "tpe"
        and all(k.name == "SEED" for k in knobs),
        f"--eval-only {args.eval_only}: no such file": bool(args.eval_only)
        and not args.eval_only.is_file(),
        "--parallel, --trials, --heartbeat: must be above 0": min(
            args.parallel, args.trials or 1, args.heartbeat
        )
        <= 0,
        "--nproc, --timeout, --budget: must not be negative": min(
            args.nproc or 0, args.timeout, args.budget
        )
        < 0,
        "--slurm: must be KEY=VALUE": any("=" not in pair for pair in args.slurm),
        "--prune: steps of another TRAIN_BATCH_TOKENS cannot be compared; sweep it without": bool(
            args.prune
        )
        and any(k.name == "TRAIN_BATCH_TOKENS" for k in knobs),
    }
    if found := [text for text, is_wrong in wrong.items() if is_wrong]:
        raise Refused("\n".join(found))
    args.trials = args.trials or 20
    args.folder = Path("runs/sweeps") / args.name
    return knobs


def prepare(args: argparse.Namespace, view: View) -> Sweep:
    """Everything that can be refused is refused here, before a file or a study is made."""
    knobs = check_args(args)
    script = load_script(args.script)
    known = {f.upper() for f in script.Config.__dataclass_fields__} - {*OWN}
    base = {
        k: v for k, v in os.environ.items() if k in known and k not in [knob.name for knob in knobs]
    }
    if args.eval_only:
        base["EVAL_ONLY_PATH"] = str(args.eval_only.resolve())
    remote, gpus = args.launcher == "slurm" and "cluster=local" not in args.slurm, gpu_names(script)
    space = Space(script, knobs, base, gpus or ["Slurm's"] * remote)
    cfg = space.check()
    if args.nproc is None:
        args.nproc = max(1, len(gpus) // args.parallel)
    if args.launcher == "local" and gpus and max(args.nproc, 1) * args.parallel > len(gpus):
        raise Refused(
            f"--nproc {args.nproc} --parallel {args.parallel}: more GPUs than the {len(gpus)} there are"
        )
    if args.prune and not cfg.val_loss_every:
        raise Refused("--prune: nothing to judge by; set VAL_LOSS_EVERY, or use --no-prune")
    args.prune = bool(cfg.val_loss_every) and (
        args.search == "tpe" if args.prune is None else args.prune
    )
    args.prune &= all(k.name != "TRAIN_BATCH_TOKENS" for k in knobs)
    about = {
        "search": args.search,
        "knobs": {k.name: list(k.values or (k.log, *k.span)) for k in knobs},
        "environment": base,
        "nproc": args.nproc,
        "code_sha256": hashlib.sha256(args.script.read_bytes()).hexdigest(),
    }
    launcher = Slurm(args) if args.launcher == "slurm" else Local(args, gpus)
    worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    study = Study(args, space, about, worker)
    args.lock = hold(args.folder / "workers" / worker)
    return Sweep(args, space, study, launcher, view.say)


def hold(
    path: Path,
) -> Any:  # this worker's sign of life for others on the machine: kept open and locked
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def main(argv: list[str] | None = None) -> int:
    if (argv := sys.argv[1:] if argv is None else argv)[:1] == ["--keep"]:
        return keep(Path(argv[1]))
    args = build_parser().parse_args(argv)
    try:
        view = View(args)
        view.sweep = sweep = prepare(args, view)
    except ImportError as error:
        print(
            f"sweep.py: {error.name}: not installed; pip install -r requirements-tools.txt",
            file=sys.stderr,
        )
        return 2
    except Refused as error:
        print("\n".join(f"sweep.py: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sweep.leave())
    view.say(
        f"{args.name}: {sweep.total()} runs of {args.script.name}, {args.parallel} at once; optuna-dashboard "
        f"{sweep.study.url.render_as_string()}"
    )
    with view.live or contextlib.nullcontext():
        sweep.go(view.refresh)
    view.console.print(view.picture(live=False))
    Path(args.lock.name).unlink(missing_ok=True)
    if sweep.leaving:
        view.say("interrupted; the same command goes on")
        return 130
    return int(any(row["other"] for row in sweep.rows()))


if __name__ == "__main__":
    sys.exit(main())
