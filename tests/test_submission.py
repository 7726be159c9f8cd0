"""submission.json is made from logs, and only from logs that are seeds of one claim."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FIGURES = {
    "code_sha256": "c0", "dataset": "tiny", "val_sha256": "v", "tokenizer_sha256": "t", "preset": "cpu",
    "device": "CPU", "torch": "2", "world_size": 1, "pre_quantization_bpb": 2.0, "quantized_bpb": 2.1,
    "quantized_ttt_lora_bpb": 1.9, "val_loss": 3.0, "steps": 7, "artifact_bytes": 1000, "seconds": {"train": 5.0},
}  # fmt: skip


def make(folder: Path, *runs: dict) -> tuple[subprocess.CompletedProcess, Path]:
    """Runs the tool on one log per dict of changed figures."""
    logs = []
    for i, run in enumerate(runs):
        logs.append(folder / f"run{i}.txt")
        figures = {**FIGURES, "seed": i, "val_bpb": 1.9, **run}
        logs[-1].write_text("step:1\nfinal " + json.dumps(figures) + "\n", encoding="utf-8")
    out = folder / "submission.json"
    command = [sys.executable, str(ROOT / "tools" / "make_submission.py"), *map(str, logs), "--name", "n"]
    command += ["--date", "2026-01-01", "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False), out


def test_the_claim_is_the_mean_and_deviation_of_its_seeds(tmp_path: Path) -> None:
    done, out = make(tmp_path, {"val_bpb": 1.8}, {"val_bpb": 2.0, "artifact_bytes": 1234})
    assert done.returncode == 0, done.stderr
    claim = json.loads(out.read_text())
    assert claim["val_bpb"] == pytest.approx(1.9)
    assert claim["val_bpb_sd"] == pytest.approx(0.02**0.5)
    assert claim["bytes_total"] == 1234
    assert claim["seeds"] == [0, 1]


@pytest.mark.parametrize("change", [{"code_sha256": "c1"}, {"preset": "pr1530"}, {"device": "GPU"}, {"seed": 0}])
def test_logs_that_are_not_seeds_of_one_claim_are_refused(tmp_path: Path, change: dict) -> None:
    done, out = make(tmp_path, {}, change)
    assert done.returncode == 2
    assert next(iter(change)) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not out.exists()


def test_a_log_of_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    done, out = make(tmp_path, {})
    (tmp_path / "run0.txt").write_text("step:1\n", encoding="utf-8")
    command = done.args
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 2
    assert "final" in again.stderr
