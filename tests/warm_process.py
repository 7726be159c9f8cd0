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
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "triton", "sentencepiece"])


def run_as_main(script: Path, env: dict[str, str], cwd: Path, out: Path, err: Path) -> None:
    """Called in the new process: goes on as `python script` would, with its output in two files."""
    os.environ.clear()
    os.environ |= env
    os.chdir(cwd)
    # The server has handlers of its own.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, path in ((1, out), (2, err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = [str(script)]
    runpy.run_path(str(script), run_name="__main__")


def run(
    script: Path, env: dict[str, str], cwd: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """A run of `script` in a process of its own, which has no variables but those of `env`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        err = Path(folder) / "err"
        process = CONTEXT.Process(target=run_as_main, args=(script, env, cwd, out, err))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(str(script), timeout)
        texts = [path.read_text(encoding="utf-8") for path in (out, err)]
        return subprocess.CompletedProcess([str(script)], process.exitcode, *texts)
