"""The campaign of `make faults` in its short form, and that it sees the faults it is for."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import faults


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a campaign of one trial of each kind."""
    return tmp_path_factory.mktemp("campaign")


def test_a_short_campaign_finds_no_fault_and_goes_on_where_it_was(folder, capsys):
    words = ["--folder", str(folder), "--kills", "2", "--pairs", "0"]
    words += ["--odd", "1", "--tools", "1", "--full", "1"]
    assert faults.main(words) == 0, capsys.readouterr()
    table = capsys.readouterr().out
    (log,) = folder.glob("*/trials.jsonl")
    trials = log.read_text()
    done = [json.loads(line) for line in trials.splitlines()]
    kinds = dict.fromkeys(trial["kind"] for trial in done)
    assert list(kinds) == ["kills", "odd files", "odd files, tools", "full disks"]
    kills = [sum(trial["counts"].values()) for trial in done if trial["kind"] == "kills"]
    # It ends as soon as there are enough; a trial that was not killed counts as one.
    assert sum(max(1, number) for number in kills) >= 2 > sum(max(1, n) for n in kills[:-1])
    # What was done is not done again, and half a line is none.
    log.write_text(trials + '{"kind": "ki')
    assert faults.main(words) == 0
    assert capsys.readouterr().out == table
    assert [*folder.glob("*/*-*")] == []


def test_a_small_disk_that_a_killed_campaign_has_left_is_taken_away(tmp_path):
    trial = tmp_path / "full disks-0"
    (trial / "disk").mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=100000", "faults", str(trial / "disk")]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may mount nothing")
    (trial / "disk/file").touch()
    faults.clear(trial)
    assert not trial.exists()
    faults.clear(trial)


def test_another_result_and_a_file_that_is_not_whole_are_faults(folder):
    campaign = faults.Campaign(folder, seed=1)
    calm = campaign.folder / "calm"
    for kind in ("logs", "runs"):
        for path in (calm / kind).glob("calm*"):
            path.rename(path.with_name(path.name.replace("calm", "killed")))
    run = faults.Started(calm, "ended", {}, "-")
    run.process.join()
    run.process = type("Ended", (), {"exitcode": 0})
    run.err.write_text("")
    counts = collections.Counter()
    assert faults.end_of_kills(campaign, calm, run, counts).fault == ""
    campaign.wanted["weights"] = "another"
    assert "differs" in faults.end_of_kills(campaign, calm, run, counts).fault
    run.err.write_text("Traceback (most recent call last):\n")
    assert "lines of its own" in faults.end_of_kills(campaign, calm, run, counts).fault
    assert faults.half_written(calm / "runs/killed") == ""
    (calm / "runs/killed/checkpoint.0.pt").write_bytes(b"half")
    assert faults.half_written(calm / "runs/killed") == "checkpoint.0.pt is not whole"
