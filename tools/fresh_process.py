"""Runs a train_gpt.py by itself in an empty folder, and notes what it opens.

    python tools/fresh_process.py SCRIPT    # run it; write what it opened to opened.json

`run_alone` starts that command in a folder that holds only what an evaluation needs: script,
artifact, tokenizer and validation shards. `judge` divides what the process did into what an
evaluation needs and violations. Files that C libraries open by themselves are not seen.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

# The imports that every script has come before the hook, so that only its own doings are noted.
import numpy as np
import torch  # noqa: F401

TIMEOUT_SECONDS = 3600
# What Python's audit hooks call the events that let data into a process or start another one.
WATCHED_EVENTS = (
    "open",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "socket.sendto",
    "urllib.Request",
)
# What a process may have from its environment: compilers and devices, no data. The prefixes are of
# variables by which libraries choose their arithmetic: other choices give other roundings.
INHERITED_VARIABLES = ("PATH", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CC")
ARITHMETIC_PREFIXES = ("OMP_", "MKL_", "ATEN_", "DNNL_", "ONEDNN_", "OPENBLAS_", "KMP_")
# What the last line of a process says if the machine has failed it.
SIGNS_OF_THE_MACHINE = (
    "No space left on device",
    "Cannot allocate memory",
    "Too many open files",
    "Disk quota exceeded",
    "Read-only file system",
    "Input/output error",
    "MemoryError",
    "OutOfMemoryError",
)
SYSTEM_FOLDERS = ("/proc", "/sys", "/dev", "/etc", "/usr", "/lib")


class Event(NamedTuple):
    """Something that the process did."""

    kind: str  # one of WATCHED_EVENTS
    path: str  # of an open: the file, links followed
    writes: bool
    target: str  # as the process named it


class Judgement(NamedTuple):
    """What a process opened, and what it did beyond that."""

    opened: list[str]
    violations: list[str]


class MachineError(Exception):
    """The machine has failed an evaluation, so nothing is known of it; the message says how."""


class Outcome(NamedTuple):
    """What came of a script run alone."""

    returncode: int
    error: str  # last line of stderr
    invalid: list[str]  # lines by which the run itself calls a score invalid
    output: str
    doc_nats: np.ndarray | None  # (D,) of its last evaluation
    judgement: Judgement


# === In the fresh process =========================================================================
def describe_event(kind: str, args: tuple) -> Event:
    """An audit event as a record."""
    target = str(args[0]) if args else ""  # a fork has no arguments
    if kind in ("subprocess.Popen", "os.posix_spawn") and not args[0]:
        target = str(args[1])
    if kind != "open":
        return Event(kind, target, False, target)
    mode = str(args[1]) if len(args) > 1 else ""
    flags = args[2] if len(args) > 2 and isinstance(args[2], int) else 0
    has_write_mode = any(letter in mode for letter in "wax+")
    has_write_flag = bool(flags & (os.O_WRONLY | os.O_RDWR))
    return Event(kind, os.path.realpath(target), has_write_mode or has_write_flag, target)


def run_watched(script: str) -> None:
    """Runs a script as a program and writes what it did to opened.json in the current folder."""
    events: list[Event] = []
    out = Path("opened.json").resolve()

    def hook(kind: str, args: tuple) -> None:
        if kind in WATCHED_EVENTS:
            events.append(describe_event(kind, args))

    sys.argv = [script]
    sys.path[0] = str(Path(script).parent)
    sys.addaudithook(hook)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        out.write_text(json.dumps(events))


# === Outside it ===================================================================================
class Allowance:
    """The files that a fresh process in `folder` may open."""

    def __init__(self, folder: Path, dataset: str) -> None:
        """Looks up the validation shards that the folder holds."""
        self.folder = folder
        data = folder / "data" / "datasets" / dataset
        names = ("train_gpt.py", "artifact", "tokenizer.model", "opened.json")
        self.given = {str(folder / name) for name in names}
        self.given |= {str(path) for path in data.glob("*_val_*.bin")}
        # The doctor's verdict is looked for and not there; compilers write to the null device.
        self.given |= {str(data / "doctor.json"), os.devnull}
        own = ("runs/", "logs/", "tmp/", "home/.triton")
        self.own_prefixes = tuple(f"{folder}/{name}" for name in own)
        system = {Path(path).resolve() for path in (sys.prefix, sys.base_prefix, *SYSTEM_FOLDERS)}
        self.system = system | {
            Path(path).resolve() for path in sys.path if "site-packages" in path
        }

    def spell_out(self, target: str) -> str:
        """The path that the process named, before links are followed: the bait is a link."""
        return os.path.normpath(os.path.join(self.folder, target))

    def shorten(self, path: str) -> str:
        """A path relative to the folder, where it lies in it."""
        return path.replace(f"{self.folder}/", "")

    def is_given(self, path: str) -> bool:
        """Whether a file is one that an evaluation needs, or its own output."""
        return path in self.given or path.startswith(self.own_prefixes)

    def is_system(self, path: str) -> bool:
        """Whether a file belongs to the interpreter or the operating system."""
        return any(Path(path).is_relative_to(folder) for folder in self.system)


def judge(events: Iterable[Event], folder: Path, dataset: str, compiles: bool) -> Judgement:
    """Divides what a process did into what an evaluation needs and violations.

    `compiles`: the script may start a compiler.
    """
    allowance = Allowance(folder, dataset)
    opened = set()
    violations = set()
    for event in events:
        path = allowance.spell_out(event.target)
        if event.kind != "open":
            is_compiler = compiles and event.kind == "subprocess.Popen"
            if not is_compiler:
                violations.add(f"{event.kind} {event.target}".strip())
        elif event.target.isdigit():
            opened.add("descriptor")
        elif allowance.is_given(path):
            opened.add(allowance.shorten(path))
        elif event.writes:
            violations.add(f"write of {allowance.shorten(path)}")
        elif not allowance.is_system(event.path):
            violations.add(f"read of {allowance.shorten(path)}")
    return Judgement(sorted(opened), sorted(violations))


class Luggage(NamedTuple):
    """What a fresh process takes along."""

    script: Path
    artifact: Path
    tokenizer: Path
    shard_name: str  # of the validation shard
    dataset: str
    variables: dict[str, str]  # knobs of the evaluation
    compiles: bool


def lay_out(folder: Path, script: Path, tokenizer: Path, dataset: str) -> Path:
    """Copies what every process needs into an empty folder; returns the empty one for its data."""
    data = folder / "data" / "datasets" / dataset
    data.mkdir(parents=True)
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    shutil.copy(script, folder / "train_gpt.py")
    shutil.copy(tokenizer, folder / "tokenizer.model")
    return data


def last_line(text: str) -> str:
    """The last line of what a process has said."""
    return (text.strip().splitlines() or ["no output"])[-1]


def environment(folder: Path, dataset: str, knobs: dict[str, str]) -> dict[str, str]:
    """The whole environment of the process. knobs: those of its evaluation or training."""
    variables = {}
    for name, value in os.environ.items():
        if name in INHERITED_VARIABLES or name.startswith(ARITHMETIC_PREFIXES):
            variables[name] = value
    variables |= {
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        # With another number of threads sums are rounded otherwise.
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        # An installation without bytecode must not look like a write of the script.
        "PYTHONDONTWRITEBYTECODE": "1",
        **knobs,
        "EVAL_ONLY_PATH": "artifact",
        "DATA_DIR": "data",
        "TOKENIZER_PATH": "tokenizer.model",
        "RUN_ID": "alone",
        "DATASET": dataset,
    }
    variables.pop("ARTIFACT_DIR", None)
    return variables


def run_alone(
    luggage: Luggage, write_shard: Any, tokens: np.ndarray, counts: np.ndarray | None
) -> Outcome:
    """Evaluates in a fresh process that knows nothing else.

    `write_shard(path, tokens)` writes the validation shard in the format of the script, and with
    `counts` its side-car. Raises MachineError if the process ended for want of memory or space.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        data = lay_out(folder, luggage.script, luggage.tokenizer, luggage.dataset)
        shutil.copy(luggage.artifact, folder / "artifact")
        shard = data / luggage.shard_name
        # A link to it has a training shard's name: whoever opens it wants training data.
        (data / shard.name.replace("_val_", "_train_")).symlink_to(shard)
        write_shard(shard, tokens)
        if counts is not None:
            write_shard(shard.with_name(shard.name.replace("_val_", "_val_bytes_")), counts)
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), str(folder / "train_gpt.py")],
            cwd=folder,
            env=environment(folder, luggage.dataset, luggage.variables),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        events = []
        if (folder / "opened.json").is_file():
            records = json.loads((folder / "opened.json").read_text())
            events = [Event(*record) for record in records]
        scores = folder / "runs" / "alone" / "documents.npz"
        said = last_line(done.stderr)
        if reason := failure_of_machine(done.returncode, said):
            raise MachineError(f"the fresh process: {reason}")
        return Outcome(
            returncode=done.returncode,
            error=said.replace(str(folder), "."),
            invalid=[line for line in done.stderr.splitlines() if "INVALID" in line],
            output=done.stdout,
            doc_nats=scores_left_at(scores),
            judgement=judge(events, folder, luggage.dataset, luggage.compiles),
        )


def scores_left_at(path: Path) -> np.ndarray | None:
    """The scores of documents that a process has left, None where there are none to be read."""
    # Not above: the fresh process must not load another train_gpt.py than its own.
    from run_documents import load_arrays

    from train_gpt import UsageError

    try:
        return load_arrays(path).get("doc_nats")
    except UsageError:
        return None


def failure_of_machine(returncode: int, last_line: str) -> str:
    """How the machine has failed a process, by its exit status and last line; "" if it has not.

    SIGKILL is what the system does to a process for which there is no memory.
    """
    if returncode == -signal.SIGKILL:
        return "killed by the system, as for want of memory"
    if returncode and any(sign in last_line for sign in SIGNS_OF_THE_MACHINE):
        return last_line
    return ""


if __name__ == "__main__":
    run_watched(sys.argv[1])
