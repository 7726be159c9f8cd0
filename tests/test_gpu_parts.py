"""The first fifteen minutes on a GPU, bench/gpu.sh, with the device replaced by the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

sys.path.insert(0, str(ROOT / "bench"))

import phases

import train_gpt as tg

ORDER = ["tests", "flatten", "capture", "step", "evaluation", "compression", "run", "kernels"]
SMALL = {name: value for name, value in TINY.items() if name not in ("PRESET", "DATASET")}
SMALL |= {"ARTIFACT_LIMIT_BYTES": "0"}

# Notes which tables are there when a part begins. The two parts of bench/phases.py are real.
PYTHON = """#!/bin/bash
[ "$1" = - ] && exec cat > /dev/null
[[ $* = *import* || $* = *prepare_data* ]] && exit
ls bench/results >> begun
echo "begins: $*" >> begun
case "$*" in
  *phases.py*) PRESET=cpu exec {python} -u {root}/bench/phases.py "$3" ;;
  *"-m gpu"*) echo "one test failed"; exit 1 ;;
  *) echo "$*" ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with bench/gpu.sh and stand-ins for Python and for the GPU's own program."""
    for name in ("bench", "bin", "out", "shared/corpus"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "bench" / "gpu.sh", tmp_path / "bench")
    programs = {
        "python": PYTHON.format(python=sys.executable, root=ROOT),
        "nvidia-smi": "#!/bin/bash\necho a CPU\n",
    }
    for name, text in programs.items():
        program = tmp_path / "bin" / name
        program.write_text(text)
        program.chmod(0o755)
    return tmp_path


def part_of(name: str) -> str:
    """The part that wrote a table of this file name."""
    return name.split("_")[0]


def test_all_parts_run_in_order_and_each_leaves_its_table_before_the_next(folder: Path):
    env = {**SMALL, "PATH": f"{folder}/bin:{os.environ['PATH']}", "OUT": str(folder / "out")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "bench/gpu.sh", "python"], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "bench/gpu.sh: failed or cut: tests\n"
    failure = "tests: exit status 1 (124: cut after 120 s); try: FUSED_MLP=0"
    assert done.stdout.count(failure) == 1

    # When a part begins, the tables are those of the parts before it and its own.
    tables: list[str] = []
    begun = []
    for line in (folder / "begun").read_text().splitlines():
        if line.startswith("begins: "):
            begun.append(sorted(map(part_of, tables)))
            tables = []
        else:
            tables.append(line)
    assert begun == [sorted(ORDER[: i + 1]) for i in range(len(ORDER))]

    results = {part_of(path.name): path.read_text() for path in (folder / "out").iterdir()}
    assert results.keys() == set(ORDER)
    assert "a CPU has no CUDA graph" in results["capture"]
    last = results["compression"].splitlines()[-1]
    figures = json.loads(last.removeprefix("bench "))["compression"]
    assert figures["bytes"] > 10_000
    assert list(figures["seconds"]) == [
        "calibrate, first row",
        "calibrate, a row",
        "quantise",
        "pack",
        "read",
    ]


def test_an_unknown_part_of_a_run_is_refused_by_name(capsys):
    assert phases.main(["captrue"]) == 2
    assert "captrue: must be one of capture, compression" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [1.0, 1.5])
def test_the_table_of_a_captured_row_shows_other_gradients(fault, monkeypatch, capsys):
    cfg, _ = tg.Config.from_env({**SMALL, "PRESET": "cpu"}, has_cuda=False)
    setting = phases.Setting(cfg)

    def capture_row(forward, plan, row, pool):
        def replay(row: tg.Batch, count: torch.Tensor) -> torch.Tensor:
            return tg.backward_row(forward, plan, row, count / fault)

        return replay

    class Cuda:
        type = "cuda"

    monkeypatch.setattr(tg, "capture_row", capture_row)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(phases, "milliseconds", lambda setting, once: 1.0)
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *args, device: full(*args))
    monkeypatch.setattr(setting.ranks, "device", Cuda())
    figures = phases.capture(setting)
    assert set(figures) == {str(len(plan)) for plan in cfg.plans}
    for of_plan in figures.values():
        assert (of_plan["error"] < 1e-5) == (fault == 1.0)
