"""Processes that begin with PyTorch imported, which takes most of the time of a tiny run.

A server of multiprocessing imports it once, and each process is a fork of that server. The file
under test is not imported there: every process reads it anew.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
# What is not installed is left out.
CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "triton", "sentencepiece", "optuna", "sqlalchemy.orm", "rich"]
)


def run_as_main(command: list[str], env: dict[str, str], cwd: Path, out: Path, err: Path) -> None:
    """Called in the new process: goes on as `python *command` would, its output in two files."""
    os.environ.clear()
    os.environ |= env
    os.chdir(cwd)
    # The server has handlers of its own.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Under nohup the tests ignore it.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for number, path in ((1, out), (2, err)):
        # Both may be the same file.
        with path.open("ab") as file:
            os.dup2(file.fileno(), number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def start(command: list[str], env: dict[str, str], cwd: Path, out: Path, err: Path) -> BaseProcess:
    """A process for `command`, a script and its arguments, with no variables but those of `env`."""
    process = CONTEXT.Process(target=run_as_main, args=(command, env, cwd, out, err))
    process.start()
    return process


def run(
    command: list[str], env: dict[str, str], cwd: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Such a process until its end, as subprocess.run has it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        err = Path(folder) / "err"
        process = start(command, env, cwd, out, err)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        texts = [path.read_text(encoding="utf-8") for path in (out, err)]
        return subprocess.CompletedProcess(command, process.exitcode, *texts)
