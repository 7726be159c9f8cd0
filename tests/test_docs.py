"""The documents name only knobs, commands, files and targets that exist."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import knobs

import train_gpt as tg

HOWTO = ROOT / "docs" / "howto.md"
# Variables in the how-to that are not this program's.
FOREIGN = {"OMP_NUM_THREADS", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "DATA_PATH", "WANDB_MODE"}


def test_the_reference_of_knobs_is_current(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["knobs.py", "--check"])
    assert knobs.main() == 0, capsys.readouterr().out


def test_the_reference_has_every_knob_with_the_default_of_every_preset():
    text = (ROOT / "docs" / "knobs.md").read_text(encoding="utf-8")
    # Before them stand the fifteen that matter, with two presets.
    _, fifteen, text = text.split("\n## ", 2)
    assert fifteen.startswith("The fifteen that matter\n") and fifteen.count("\n| `") == 15
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.M)
    fields = dataclasses.fields(tg.Config)
    assert [name for name, _ in rows] == [f.name.upper() for f in fields]
    for (_, row), f in zip(rows, fields, strict=True):
        cells = row.split(" | ")
        assert cells[-1] == f.metadata["doc"].replace("|", "/").replace("<", "&lt;")
        for cell, preset in zip(cells, tg.PRESETS, strict=False):
            default = tg.preset_values(preset, shrink=False).get(f.name, f.default)
            if isinstance(default, str):
                assert cell == (default or "-")
            else:
                assert float(cell) == float(f"{default:g}")


@pytest.fixture(scope="module")
def howto() -> str:
    return HOWTO.read_text(encoding="utf-8")


def test_every_variable_in_the_how_to_is_a_knob(howto):
    fields = {f.name.upper() for f in dataclasses.fields(tg.Config)}
    named = set(re.findall(r"\b([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)\b", howto)) - FOREIGN
    assert named - fields == set()
    assert {"CHECKPOINT_EVERY", "RUN_ID", "TENSORBOARD_DIR", "MAX_WALLCLOCK_SECONDS"} <= named


def test_every_file_and_target_in_the_how_to_exists(howto):
    for path in set(re.findall(r"\b((?:tools|bench|docs|tests)/[\w.]+\.\w+)", howto)):
        assert (ROOT / path).exists() or path == "docs/knobs.md", path
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(re.findall(r"^make (\w+)", howto, re.M)) <= set(targets)


def test_the_configs_that_the_how_to_sets_are_accepted(howto):
    settings = r"^(?:export )?((?:[A-Z0-9_]+=\S+(?: |$))+)(?:torchrun|python|$)"
    lines = re.findall(settings, howto, re.M)
    assert len(lines) == 12
    for line in lines:
        pairs = dict(pair.split("=", 1) for pair in line.split())
        env = {k: v for k, v in pairs.items() if k not in FOREIGN and not v.startswith("$")}
        tg.Config.from_env(env, has_cuda=False)


def test_the_readme_resolves_its_links_and_names_every_tool_and_bench():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        assert link.startswith("https://") or (ROOT / path).exists(), link
        assert path or anchor in anchors, link
    table = text.partition("\n## Files\n")[2]
    named = set()
    for cell in table.splitlines():
        folder = ""
        for name in re.findall(r"`([\w./-]+)`", cell):
            if "/" in name:
                folder = name.rpartition("/")[0] + "/"
                named.add(name)
            elif "." in name and not name.startswith("."):
                named.add(name if (ROOT / name).exists() else folder + name)
    for name in named:
        assert (ROOT / name).exists(), name
    scripts = [*ROOT.glob("tools/*.py"), *ROOT.glob("bench/*.py")]
    assert {str(path.relative_to(ROOT)) for path in scripts} <= named
