"""The life of a run: its output may close, its deadline may come, and it says how far it is."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import warm_process
from conftest import ROOT, TINY, final_line

import train_gpt as tg

sys.path.insert(0, str(ROOT / "tools"))
import run_documents
import runlog

SHORT = {**TINY, "ITERATIONS": "2", "RUN_ID": "short", "OMP_NUM_THREADS": "1"}


class Piped(NamedTuple):
    """A run whose stdout is not as usual, and its log."""

    result: subprocess.CompletedProcess[str]
    log: str
    cwd: Path


def run_with_stdout(change: str, cwd: Path, **env: str) -> Piped:
    """A short run that begins after the statements `change`, which may spoil its stdout."""
    script = ROOT / "train_gpt.py"
    code = f"import os, runpy, sys\n{change}\nsys.argv = [{str(script)!r}]\n"
    code += f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    (cwd / "piped.py").write_text(code)
    result = warm_process.run([str(cwd / "piped.py")], {**SHORT, **env}, cwd, 120)
    (log,) = (cwd / "logs").glob("*.txt")
    return Piped(result, log.read_text(encoding="utf-8"), cwd)


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


# --- Progress ---
class Clock:
    """A clock that a test sets."""

    def __init__(self, now: float):
        """It shows `now`."""
        self.now = now

    def __call__(self) -> float:
        """The time it shows."""
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The clock of the script."""
    clock = Clock(1000.0)
    monkeypatch.setattr(tg.time, "monotonic", clock)
    return clock


class Halfway:
    """A ledger of 200 targets, of which this rank has scored 25."""

    docs = SimpleNamespace(counts=np.array([150, 50]))

    def result(self) -> dict[str, float]:
        """The figures so far."""
        return {"val_loss": 3.25, "val_bpb": 2.125, "tokens": 25, "bytes": 100}


def half_scored(log: tg.Log) -> tg.Scorer:
    """A scorer of two ranks, each of which has scored an eighth of the targets."""
    return tg.Scorer(None, (), Halfway(), None, SimpleNamespace(world_size=2), log)


def test_progress_names_targets_done_of_all_the_time_left_and_the_score(clock, tmp_path, capsys):
    log = tg.Log(tmp_path / "log.txt", is_main=True)
    log.begin_phase("score quantized")
    clock.now += 10
    half_scored(log).show_progress("eval_progress", "score")
    line = "eval_progress: targets:50/200 left:30s running_loss:3.2500 running_bpb:2.1250\n"
    assert capsys.readouterr().out == line == (tmp_path / "log.txt").read_text()
    half_scored(log).show_progress("eval_progress", "score")
    assert capsys.readouterr().out == ""


def test_time_left_of_adaptation_is_never_more_than_its_deadline_allows(clock, tmp_path, capsys):
    log = tg.Log(tmp_path / "log.txt", is_main=True)
    clock.now += 10
    half_scored(log).show_progress("ttt_progress", "adapt", tg.Deadline(12.0).seconds_left())
    assert " left:12s " in capsys.readouterr().out


def test_forty_columns_still_show_the_score_and_the_time_left(clock, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tg.shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((40, 24)))
    log = tg.Log(tmp_path / "log.txt", is_main=True, live=True)
    clock.now += 2
    half_scored(log).show_progress("ttt_progress", "adapt")
    shown = capsys.readouterr().out.removeprefix(tg.ERASE_LINE)
    assert shown == "adapt: bpb 2.1250, 6 s left, 50 of 200 targets"[:39]
    assert (tmp_path / "log.txt").read_text() == ""


def step_line(capsys, columns: int, step: int, budget_s: float) -> str:
    """What a terminal of so many columns shows of a step of training."""
    state = tg.TrainState(0.1, expected_steps=20000, rank_s=0.25 * step)
    reporter = object.__new__(tg.StepReporter)
    reporter.cfg = tg.Config(iterations=20000)
    reporter.state, reporter.budget_s = state, budget_s
    reporter.predicted_bytes, reporter.peak_flops = 16_000_000, math.nan
    reporter.log = tg.Log(Path("unused"), is_main=False, live=True)
    numbers = tg.StepNumbers(step, 3.25, 1.0, 1.0, 0, 0, 0.25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tg.shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((columns, 24))
        )
        reporter.show_live_line(numbers, 1000.0)
    return capsys.readouterr().out.removeprefix(tg.ERASE_LINE)


def test_training_line_leads_with_loss_and_time_left_also_at_forty_columns(capsys):
    assert step_line(capsys, 40, 40, 125.0) == "train: loss 3.2500, 115 s left, step 40"


def test_training_line_says_that_the_speed_is_being_measured_until_it_is_known(capsys):
    assert "step 3, measuring speed, " in step_line(capsys, 200, 3, 125.0)
    assert "step 22 of about 20000, " in step_line(capsys, 200, 22, 125.0)
    assert "step 3 of about 20000, " in step_line(capsys, 200, 3, math.inf)


def test_rows_of_calibration_are_counted_on_the_live_line(clock, tmp_path, capsys):
    run = object.__new__(tg.Run)
    run.log = tg.Log(tmp_path / "log.txt", is_main=True, live=True)
    for _ in run.shown(["a", "b", "c"], "Hessians"):
        clock.now += 2
    shown = capsys.readouterr().out.split(tg.ERASE_LINE)
    assert "calibrate: Hessians: 1 of 3 rows" in shown
    assert "calibrate: Hessians: 2 of 3 rows" in shown


# --- The end ---
def test_run_ends_with_score_size_log_artifact_and_the_next_command(late_run):
    final = final_line(late_run.log)
    lines = late_run.log.splitlines()[-6:]
    score = f"score     {final['val_bpb']:.4f} bits per byte, lower is better"
    assert lines[0] == f"{score}; without adaptation for 12 of 12 documents"
    assert "warning: EVAL_DEADLINE_SECONDS=0.001 was over before all" in late_run.log
    assert re.fullmatch(r"size      [\d,]+ of 16,000,000 bytes \(\d+\.\d %\)", lines[1])
    assert lines[2:5] == [
        "log       logs/short.txt",
        "artifact  runs/short/final_model.int6.ptz",
        "next      make report LOGS=logs/short.txt",
    ]
    assert lines[5].startswith("final {")


def test_gzip_stands_beside_the_score(tmp_path, capsys):
    run = object.__new__(tg.Run)
    run.final = {"val_bpb": 2.0734, "artifact_bytes": 1_869_353, "gzip_bpb": 2.6236}
    run.artifact = Path("a.ptz")
    run.log = tg.Log(tmp_path / "log.txt", is_main=True)
    run.log_ending()
    line = "score     2.0734 bits per byte, lower is better (gzip -9: 2.6236)"
    assert capsys.readouterr().out.splitlines()[0] == line


def test_on_a_terminal_the_final_line_goes_to_the_log_alone(tmp_path, capsys):
    run = object.__new__(tg.Run)
    run.final, run.facts, run.phases = {"val_bpb": 2.0, "artifact_bytes": 9}, {}, []
    run.cfg, run.artifact = tg.Config(), Path("a.ptz")
    run.tokenizer = SimpleNamespace(manifest={})
    run.ranks = SimpleNamespace(device=SimpleNamespace(type="cpu"))
    for live in (False, True):
        run.log = tg.Log(tmp_path / f"{live}.txt", is_main=True, live=live)
        run.report()
        assert ("final {" in capsys.readouterr().out) == (not live)
        assert (tmp_path / f"{live}.txt").read_text().count("final {") == 1


# --- What a run stores ---
def test_nats_by_position_are_sums_over_documents_and_the_report_reads_them():
    counts = np.array([3, 1, 40])
    starts = np.array([5, 8, 9])
    docs = tg.Documents(np.zeros(50, dtype=np.int64), starts, counts)
    ledger = object.__new__(tg.Ledger)
    ledger.docs = docs
    ledger.nats = torch.arange(50).float()
    found = ledger.by_position()
    edges, nats, tokens = (found[f"pos_{name}"] for name in ("edges", "nats", "tokens"))
    assert edges[:3].tolist() == [0, 1, 2]
    assert nats[:3].tolist() == [5 + 8 + 9, 6 + 10, 7 + 11]
    assert tokens[:3].tolist() == [3, 2, 2]
    assert (tokens.sum(), nats.sum()) == (44, 5 + 6 + 7 + 8 + sum(range(9, 49)))
    wide = np.diff(np.append(edges, 40)) / (edges + 1)
    assert wide.max() <= 1 and wide[edges > 16].max() < 0.2
    profile = run_documents.loss_by_position(found)
    assert profile.x[0] == 1 and profile.y[0] == pytest.approx(22 / 3)


def test_run_keeps_nats_by_position_that_add_up_to_its_score(late_run):
    kept = np.load(late_run.cwd / "runs" / "short" / "documents.npz")
    final = final_line(late_run.log)
    assert kept["pos_tokens"].sum() == final["val_tokens"]
    assert kept["pos_nats"].sum() / final["val_tokens"] == pytest.approx(final["val_loss"])


def test_log_lines_carry_the_mean_loss_since_the_line_before(tmp_path, capsys):
    state = tg.TrainState(0.1, expected_steps=9)
    reporter = object.__new__(tg.StepReporter)
    reporter.cfg = tg.Config(iterations=9, train_log_every=4)
    reporter.state, reporter.budget_s = state, math.inf
    reporter.log = tg.Log(tmp_path / "log.txt", is_main=True)
    for step in range(1, 9):
        reporter.report(tg.StepNumbers(step, float(step), 1.0, 1.0, 0, 0, 0.25))
    losses = re.findall(r"step:(\d)/9 train_loss:(\S+)", capsys.readouterr().out)
    means = [("1", "1.0000"), ("2", "2.0000"), ("3", "3.0000"), ("4", "4.0000"), ("8", "6.5000")]
    assert losses == means
