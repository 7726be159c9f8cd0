"""How a sweep starts a run's keeper and asks it to stop: on this machine, or as a job of Slurm."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import keeper
from sweep_space import Refused

JOB_MINUTES = 120  # of a job in Slurm, unless --timeout or timeout_min says otherwise
SPARE_MINUTES = 5  # of a job beyond --timeout

# Options that submitit knows for every cluster; all others are sbatch's.
SHARED_OPTIONS = ("timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node")


class Started(NamedTuple):
    """A run that has been started or found again."""

    job: str  # its id in Slurm, else ""
    is_over: Callable[[], bool]


class Launcher(Protocol):
    """What a sweep needs of either launcher."""

    parent: int | None  # the process whose end ends the runs, None where they outlive the sweep

    def env(self, slot: int) -> dict[str, str]:
        """Variables for the run in a slot: one of the --parallel places for runs."""

    def start(self, folder: Path) -> Started:
        """Starts the keeper of a run's folder."""

    def find(self, job: str, folder: Path) -> Started:
        """Finds a run again that another worker started."""

    def stop(self, folder: Path) -> None:
        """Stops a run that may not have begun. One that runs sees the file FOLDER/stop."""


def keeper_command(folder: Path) -> list[str]:
    """The command that runs the job of a folder."""
    return [sys.executable, str(Path(keeper.__file__).resolve()), str(folder)]


def has_exited(process: subprocess.Popen) -> bool:
    """Whether a keeper on this machine has exited."""
    return process.poll() is not None


def is_released(folder: Path) -> bool:
    """Whether the keeper of a folder has let go of its lock."""
    return not keeper.is_locked(folder / "lock")


def is_job_over(job: Any, folder: Path) -> bool:
    """Whether the keeper in a job has left its note, or the job has ended without one."""
    return (folder / "exit.json").exists() or (job.done() and is_released(folder))


class Local:
    """Runs on this machine, each with GPUs of its own."""

    def __init__(self, args: argparse.Namespace, gpus: list[str]):
        """Shares the cores out over all processes that run at once."""
        self.gpus = gpus
        self.ranks = max(args.nproc, 1)
        self.parent = os.getpid()
        cores = os.cpu_count() or 1
        self.threads = max(1, cores // (args.parallel * self.ranks))

    def env(self, slot: int) -> dict[str, str]:
        """The slot's GPUs, and its share of threads where the user has not set a number."""
        chosen = {}
        own_gpus = self.gpus[slot * self.ranks : (slot + 1) * self.ranks]
        if own_gpus:
            chosen["CUDA_VISIBLE_DEVICES"] = ",".join(own_gpus)
        if "OMP_NUM_THREADS" not in os.environ:
            chosen["OMP_NUM_THREADS"] = str(self.threads)
        return chosen

    def start(self, folder: Path) -> Started:
        """Starts a keeper in a session of its own."""
        process = subprocess.Popen(
            keeper_command(folder), stdin=subprocess.DEVNULL, start_new_session=True
        )
        return Started("", partial(has_exited, process))

    def find(self, job: str, folder: Path) -> Started:
        """A run is over when its keeper has let go of the lock."""
        return Started("", partial(is_released, folder))

    def stop(self, folder: Path) -> None:
        """Does nothing: the keeper sees FOLDER/stop."""


class Slurm:
    """A job per run through submitit. Jobs outlive the sweep and are found again by their id."""

    parent = None

    def __init__(self, args: argparse.Namespace):
        """Checks the options of --slurm. Raises Refused if submitit does not take them."""
        import submitit

        options: dict[str, Any] = {}
        for pair in args.slurm:
            name, value = pair.split("=", 1)
            options[name] = int(value) if value.isdigit() else value
        cluster = options.pop("cluster", "slurm")
        self.submitit = submitit
        self.job_class = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}[cluster]
        self.jobs: dict[Path, Any] = {}

        minutes = math.ceil(args.timeout / 60) + SPARE_MINUTES if args.timeout else JOB_MINUTES
        parameters: dict[str, Any] = {"timeout_min": minutes, "nodes": 1, "tasks_per_node": 1}
        if cluster == "slurm":
            parameters["gpus_per_node"] = max(args.nproc, 1)
            parameters["name"] = args.name
        for name, value in options.items():
            parameters[name if name in SHARED_OPTIONS else f"slurm_{name}"] = value
        try:
            self.executor = submitit.AutoExecutor(args.folder / "jobs", cluster=cluster)
            self.executor.update_parameters(**parameters)
        except (RuntimeError, NameError, TypeError, AssertionError) as error:
            raise Refused(f"--launcher slurm: {str(error).splitlines()[0]}") from error

    def env(self, slot: int) -> dict[str, str]:
        """Nothing: Slurm gives a job its GPUs."""
        return {}

    def start(self, folder: Path) -> Started:
        """Submits a job that is the keeper."""
        command = self.submitit.helpers.CommandFunction(keeper_command(folder))
        return self.watch(self.executor.submit(command), folder)

    def find(self, job: str, folder: Path) -> Started:
        """Finds a job by its id."""
        return self.watch(self.job_class(self.executor.folder, job), folder)

    def watch(self, job: Any, folder: Path) -> Started:
        """Remembers a job, so that it can be stopped."""
        self.jobs[folder] = job
        return Started(job.job_id, partial(is_job_over, job, folder))

    def stop(self, folder: Path) -> None:
        """Cancels a job that still waits for its turn; one that runs ends by itself."""
        if not (folder / "output.txt").exists():
            self.jobs[folder].cancel()
