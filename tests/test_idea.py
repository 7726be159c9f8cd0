"""docs/idea.md: its gate, applied to a copy of the script, runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import warm_process
from conftest import ROOT, TINY, final_line

GATE = {**TINY, "ITERATIONS": "2", "TTT_ENABLED": "0", "MLP_GATE_ENABLED": "1", "RUN_ID": "gate"}


def with_idea(source: str) -> str:
    """The source after the changes of the page: lines with + stand before the one that follows."""
    text = (ROOT / "docs" / "idea.md").read_text(encoding="utf-8")
    changes = re.findall(r"```diff\n(.*?)```", text, re.S)
    assert len(changes) == 3
    for change in changes:
        lines = change.splitlines(keepends=True)
        added = "".join(line[1:] for line in lines if line.startswith("+"))
        place = "".join(line[1:] for line in lines if line.startswith(" "))
        assert source.count(place) == 1, place
        source = source.replace(place, added + place)
    return source


@pytest.fixture
def script(tmp_path) -> Path:
    """A copy of the script with the gate."""
    path = tmp_path / "train_gpt.py"
    path.write_text(with_idea((ROOT / "train_gpt.py").read_text(encoding="utf-8")))
    return path


def test_gate_of_the_page_trains_and_its_artifact_is_read_back(script, tiny_data):
    env = {**GATE, "DATA_DIR": str(tiny_data), "OMP_NUM_THREADS": "1"}
    result = warm_process.run([str(script)], env, script.parent, 120)
    assert result.returncode == 0, result.stderr
    assert final_line(result.stdout)["steps"] == 2
    assert "mlp_gate_enabled: True (env)" in result.stdout


def test_gate_that_is_not_stored_with_the_network_stops_the_run_at_its_start(script, tiny_data):
    text = script.read_text().replace(', network="optional")\n    sparse', ")\n    sparse")
    script.write_text(text)
    env = {**GATE, "DATA_DIR": str(tiny_data), "OMP_NUM_THREADS": "1"}
    result = warm_process.run([str(script)], env, script.parent, 120)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "MLP_GATE_ENABLED=1: must be" in result.stderr and "network=True" in result.stderr
    assert not (script.parent / "logs").exists()
