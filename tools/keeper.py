"""The keeper: a process between a sweep and one run, so that the run never outlives the sweep.

    keeper.py FOLDER

It runs what FOLDER/job.json says and leaves FOLDER/exit.json: status, seconds and, if the run was
stopped, why. While it lives it holds FOLDER/lock, and the kernel lets go of the lock of the dead.
Standard library only: a keeper starts in milliseconds and stays as long as its run.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

GRACE_SECONDS = 30.0  # from SIGTERM to SIGKILL: time to write a checkpoint
KILL_SECONDS = 10.0  # a process in the middle of a system call may take a while to go
POLL_SECONDS = 0.1
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class Job(NamedTuple):
    """What FOLDER/job.json holds."""

    token: str  # tells this attempt from an earlier one
    command: list[str]
    cwd: str
    timeout: float  # seconds; 0 is no limit
    parent: int | None  # process whose end ends the run; None where there is none
    env: dict[str, str]  # added to the keeper's own


class Exit(NamedTuple):
    """What FOLDER/exit.json holds."""

    token: str
    status: int  # of the run; a negative one is the number of the signal that killed it
    stopped: str  # "" of a run that ended by itself, else "orphaned", "stopped" or "timed out"
    seconds: float


# === Files and locks ==============================================================================


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is there as a whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value), encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, {} where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_job(folder: Path) -> Job | None:
    """The job of a run's folder, None where there is none."""
    job = read_json(folder / "job.json")
    return Job(**job) if job else None


def read_exit(folder: Path) -> Exit | None:
    """How the run of a folder ended, None while it has not."""
    note = read_json(folder / "exit.json")
    return Exit(**note) if note else None


def is_locked(path: Path) -> bool:
    """Whether a living process of this machine holds the lock."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False


# === Processes ====================================================================================


def prctl(option: int, value: int) -> None:
    """Sets a property of this process on Linux; elsewhere the process group must do."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def die_with_keeper() -> None:
    """Asks the kernel to end this process with its parent, even if that one is killed."""
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def descendants() -> list[int]:
    """All living descendants of this process, in whatever session; none without /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name before the last parenthesis may hold spaces.
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(path.parent.name))
    pids = []
    waiting = [os.getpid()]
    while waiting:
        offspring = children.get(waiting.pop(), [])
        pids += offspring
        waiting += offspring
    return pids


def end_process(run: subprocess.Popen) -> None:
    """Ends a run politely, then kills all that is left of it, its orphans too."""
    if run.poll() is None:
        # torchrun passes the signal on to its workers and waits for them.
        run.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(GRACE_SECONDS)
    with contextlib.suppress(OSError):
        os.killpg(run.pid, signal.SIGKILL)
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        left = descendants()
        if not left:
            return
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


# === The keeper ===================================================================================


class Keeper:
    """Runs the job of a folder. It must be made in the main thread, since it handles SIGTERM."""

    def __init__(self, folder: Path):
        """Makes orphans of the run children of this process, where it finds them."""
        self.folder = folder
        self.parent = os.getppid()
        self.was_terminated = False
        prctl(PR_SET_CHILD_SUBREAPER, 1)

    def keep(self) -> None:
        """Waits for the keeper of an earlier attempt, then runs the job to its end."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            start = time.monotonic()
            signal.signal(signal.SIGTERM, self.note_signal)
            job = read_job(self.folder)
            with (self.folder / "output.txt").open("ab") as output:
                run = self.start(job, output)
            stopped = ""
            while run.poll() is None and not stopped:
                time.sleep(POLL_SECONDS)
                stopped = self.reason_to_stop(job, time.monotonic() - start)
            end_process(run)
            done = Exit(job.token, run.wait(), stopped, time.monotonic() - start)
            write_json(self.folder / "exit.json", done._asdict())

    def note_signal(self, number: int, frame: object) -> None:
        """Handles SIGTERM."""
        self.was_terminated = True

    def start(self, job: Job, output: Any) -> subprocess.Popen:
        """Starts the run in a session of its own."""
        return subprocess.Popen(
            job.command,
            cwd=job.cwd,
            env={**os.environ, **job.env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_keeper,
        )

    def reason_to_stop(self, job: Job, seconds: float) -> str:
        """Why the run must end now, "" if it need not."""
        if os.getppid() != self.parent or job.parent not in (None, self.parent):
            return "orphaned"
        if self.was_terminated or (self.folder / "stop").exists():
            return "stopped"
        if 0 < job.timeout < seconds:
            return "timed out"
        return ""


if __name__ == "__main__":
    Keeper(Path(sys.argv[1])).keep()
