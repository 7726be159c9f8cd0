"""bench/agreement.py: that it finds agreement with a script, and every kind of difference."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, tiny_config

sys.path.insert(0, str(ROOT / "bench"))

import agreement
import reference as adapter

SCRIPT = Path(__file__).with_name("fake_reference.py")
GATES = {"SPARSE_ATTN_GATE_ENABLED": "1", "SMEAR_GATE_ENABLED": "1"}
TRAINING = '''

def train_model(h, device, val_data):
    """Training by the clock."""

    def lr_mul(frac):
        """Factor of all rates."""
        return max((1 - frac) / h.warmdown_frac, h.min_lr) if frac >= 1 - h.warmdown_frac else 1.0

    def step_fn(step):
        """A step."""
        if step <= h.muon_momentum_warmup_steps:
            share = min(step / h.muon_momentum_warmup_steps, 1.0)
            for group in optimizers.optimizer_muon.param_groups:
                group["momentum"] = h.start + share * (h.end - h.start)
'''
KNOBS = """
    warmdown_frac = float(os.environ["WARMDOWN_FRAC"])
    min_lr = float(os.environ["MIN_LR"])
    muon_momentum_warmup_steps = int(os.environ["MUON_MOMENTUM_WARMUP_STEPS"])
    start = float(os.environ["MUON_MOMENTUM_WARMUP_START"])
    end = float(os.environ["MUON_MOMENTUM"])
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The knobs of the tiny network, with gates."""
    for name, value in (TINY | GATES).items():
        monkeypatch.setenv(name, value)


def script_with_training(folder: Path) -> Path:
    """The stand-in with the schedules of a public script."""
    text = SCRIPT.read_text()
    place = '    rank = os.environ.get("RANK")\n'
    assert place in text
    path = folder / "script.py"
    path.write_text(text.replace(place, place + KNOBS.lstrip("\n")) + TRAINING)
    return path


def test_the_stand_in_computes_the_same(capsys):
    assert agreement.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1].removeprefix("agreement "))
    assert 0 < figures["worst"] < agreement.LIMIT
    for name in ("attn_gate", "smear_proj", "smear_lambda", "skip_weights", "loss"):
        assert any(f" {name} " in line for line in lines), name


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("h.attn_gate_scale * gate", "gate"), ("ids[1:] != BOS_ID", "ids[1:] != 7")],
)
def test_another_gate_or_mask_is_found(ours, theirs, tmp_path, capsys):
    path = tmp_path / "script.py"
    text = SCRIPT.read_text()
    assert ours in text
    path.write_text(text.replace(ours, theirs))
    assert agreement.main(["--reference", str(path)]) == 1
    assert "training plain: at most" in capsys.readouterr().out


def test_schedules_are_run_from_the_text_of_the_script(tmp_path):
    cfg = tiny_config(warmdown_frac=0.6, min_lr=0.1, muon_momentum_warmup_steps=900)
    script = adapter.Reference(script_with_training(tmp_path), cfg, torch.device("cpu"), "sdpa")
    found = agreement.compare_schedules(script)
    assert found.keys() == {"rates", "momentum"}
    assert max(found.values()) < 1e-9
    script.h.min_lr = 0.3
    script.h.end = 0.5
    found = agreement.compare_schedules(script)
    assert min(found.values()) > 0.01


def test_rows_of_skips_are_put_in_the_order_of_the_plan():
    cfg = tiny_config(
        num_layers=11, xsa_last_n=11, num_loops=2, loop_start=3, loop_end=5, parallel_start_layer=8
    )
    rows = torch.arange(8.0)[:, None]
    plain, looped = (agreement.by_position(rows, plan, torch.mean) for plan in cfg.plans)
    assert torch.equal(looped, rows)
    assert plain[:5, 0].tolist() == [1.5, 4, 5, 6, 7]


def test_what_is_no_such_script_is_refused_in_a_line(tmp_path, capsys):
    path = tmp_path / "other.py"
    path.write_text("x = 1")
    assert agreement.main(["--reference", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench/agreement.py: {path}: ")
    assert error.count("\n") == 1
