"""The documents say what the script does: knobs, commands, files and exit statuses that they name exist."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import train_gpt as tg

HOWTO = ROOT / "docs" / "howto.md"
OUTSIDE = {"SLURM_JOB_ID", "SLURM_JOB_NODELIST"}  # not this program's


def check() -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "knobs.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_reference_of_knobs_is_current():
    done = check()
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reference_has_every_knob_with_the_default_of_every_preset():
    rows = re.findall(
        r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "knobs.md").read_text(encoding="utf-8"), re.M
    )
    assert [name for name, _ in rows] == [f.name.upper() for f in dataclasses.fields(tg.Config)]
    for (_, row), f in zip(rows, dataclasses.fields(tg.Config), strict=True):
        cells = row.split(" | ")
        assert cells[-1] == f.metadata["doc"].replace("|", "/").replace("<", "&lt;")
        for cell, preset in zip(cells, tg.PRESETS, strict=False):
            default = preset if f.name == "preset" else tg.PRESETS[preset].get(f.name, f.default)
            assert (
                cell == (default or "-")
                if isinstance(default, str)
                else float(cell) == float(f"{default:g}")
            )


@pytest.fixture(scope="module")
def howto() -> str:
    return HOWTO.read_text(encoding="utf-8")


def test_every_variable_in_the_how_to_is_a_knob(howto):
    knobs = {f.name.upper() for f in dataclasses.fields(tg.Config)}
    named = set(re.findall(r"\b([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)\b", howto)) - OUTSIDE
    assert named - knobs == set()
    assert {"CHECKPOINT_EVERY", "RUN_ID", "TENSORBOARD_DIR", "MAX_WALLCLOCK_SECONDS"} <= named


def test_every_file_and_target_in_the_how_to_exists(howto):
    for path in set(re.findall(r"\b((?:tools|bench|docs|tests)/[\w.]+\.\w+)", howto)):
        assert (ROOT / path).exists() or path == "docs/knobs.md", path
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(re.findall(r"^make (\w+)", howto, re.M)) <= set(targets)


def test_the_configs_that_the_how_to_sets_are_accepted(howto, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    found = 0
    for line in re.findall(
        r"^(?:export )?((?:[A-Z0-9_]+=\S+(?: |$))+)(?:torchrun|python|$)", howto, re.M
    ):
        env = dict(pair.split("=", 1) for pair in line.split())
        fine = {k: v for k, v in env.items() if k not in OUTSIDE and not v.startswith("$")}
        tg.Config.from_env({"COMPRESSOR": "lzma", **fine}, has_cuda=False)
        found += 1
    assert found == 9
