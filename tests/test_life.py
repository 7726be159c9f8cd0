"""The life of a run: its output may close, its deadline may come, and it says how far it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import warm_process
from conftest import ROOT, TINY, final_line

sys.path.insert(0, str(ROOT / "tools"))
import runlog

SHORT = {**TINY, "ITERATIONS": "2", "RUN_ID": "short", "OMP_NUM_THREADS": "1"}


class Piped(NamedTuple):
    """A run whose stdout is not as usual, and its log."""

    result: subprocess.CompletedProcess[str]
    log: str


def run_with_stdout(change: str, cwd: Path, **env: str) -> Piped:
    """A short run that begins after the statements `change`, which may spoil its stdout."""
    script = ROOT / "train_gpt.py"
    code = f"import os, runpy, sys\n{change}\nsys.argv = [{str(script)!r}]\n"
    code += f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    (cwd / "piped.py").write_text(code)
    result = warm_process.run([str(cwd / "piped.py")], {**SHORT, **env}, cwd, 120)
    (log,) = (cwd / "logs").glob("*.txt")
    return Piped(result, log.read_text(encoding="utf-8"))


# What `| head -1` leaves behind, and what `>&-` does.
CLOSED_PIPE = "r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w); sys.stdout = open(1, 'w')"
NO_STDOUT = "os.close(1); sys.stdout = None"
ASCII = "sys.stdout.reconfigure(encoding='ascii')"


@pytest.fixture(scope="module")
def late_run(tiny_data, tmp_path_factory) -> Piped:
    """A run whose stdout is a closed pipe, and whose deadline leaves no time to adapt."""
    env = {"DATA_DIR": str(tiny_data), "EVAL_DEADLINE_SECONDS": "0.001"}
    return run_with_stdout(CLOSED_PIPE, tmp_path_factory.mktemp("late"), **env)


def test_closed_pipe_does_not_end_the_run_and_its_log_is_whole(late_run):
    assert (late_run.result.returncode, late_run.result.stderr) == (0, "")
    assert final_line(late_run.log)["steps"] == 2


def test_missing_stdout_does_not_end_the_run_and_no_file_takes_its_place(tiny_data, tmp_path):
    run = run_with_stdout(NO_STDOUT, tmp_path, DATA_DIR=str(tiny_data), TTT_ENABLED="0")
    assert (run.result.returncode, run.result.stderr) == (0, "")
    assert final_line(run.log)["steps"] == 2


def test_text_that_stdout_cannot_encode_becomes_a_question_mark(tiny_data, tmp_path):
    env = {"DATA_DIR": str(tiny_data), "TTT_ENABLED": "0", "RUN_ID": "schön"}
    run = run_with_stdout(ASCII, tmp_path, **env)
    assert (run.result.returncode, run.result.stderr) == (0, "")
    assert "run_id: sch?n" in run.result.stdout
    assert "run_id: schön" in run.log


# --- The deadline ---
def test_score_line_says_how_many_documents_were_scored_without_adaptation(late_run):
    (line,) = re.findall(r"^quantized_ttt_lora .*$", late_run.log, re.M)
    assert line.endswith("ms, 12 of 12 documents were scored without adaptation")


def test_final_line_and_kept_scores_say_it_too(late_run):
    assert final_line(late_run.log)["documents_not_adapted"] == 12


def test_log_reader_reads_the_score_of_such_a_line(late_run):
    scores = runlog.evaluation_scores(late_run.log)
    assert scores[-1] == pytest.approx(final_line(late_run.log)["val_bpb"], abs=1e-8)
