"""bench/evaluation.py: its documents, counts and predictions, the same maths, and its last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, tiny_config
from test_compression import random_model
from test_ttt import TABLE, documents

sys.path.insert(0, str(ROOT / "bench"))

import evaluation as bench

import train_gpt as tg

CPU = torch.device("cpu")
KEYS = [
    "device",
    "ratio_published_way",
    "ratio_reference",
    "max_nats_diff",
    "recompilations",
    "seconds_8xh100",
    "seconds_1xh200",
]
FAST = dict(ttt_lora_lr=0.01, ttt_batch_size=8)


def text_of(*counts: int) -> bench.Text:
    """Random documents with that many targets each."""
    return bench.Text(documents(*counts), TABLE, 1)


def network_of(**knobs: object) -> bench.Network:
    """The tiny network with random weights."""
    model = random_model(tiny_config(**{**FAST, **knobs}))
    return bench.Network(model.cfg, model.state_dict(), looped=True)


def ours_in(way: type[bench.Timed] = bench.Timed, **knobs: object) -> bench.Ours:
    """Our evaluation of the tiny network in one of the two ways."""
    return bench.Ours(network_of(**knobs), "sdpa", CPU, way)


# --- Documents ------------------------------------------------------------------------------------
def test_lengths_are_those_of_the_field():
    lengths = bench.fineweb_lengths(50_000)
    assert lengths.sum() == pytest.approx(40_540_803, rel=0.01)
    assert np.median(lengths) == 474
    assert (lengths > 2048).mean() == pytest.approx(0.064, abs=0.001)


@pytest.mark.parametrize(("chunk", "published"), [(32, 1124e6), (48, 761e6), (64, 580e6)])
def test_published_way_processes_as_many_positions_as_counted_from_the_logs(
    chunk: int, published: float
):
    cfg = tg.Config(ttt_chunk_size=chunk)
    docs = bench.documents_of_lengths(bench.fineweb_lengths(50_000))
    batches = bench.fixed_batches(docs, np.arange(50_000), cfg)
    positions = sum(bench.num_positions(docs, batch, cfg) for batch in batches)
    assert positions == pytest.approx(published, rel=0.03)


def test_representative_documents_are_whole_batches_from_equal_shares_of_the_work():
    cfg = tiny_config(ttt_batch_size=4)
    # The work is that of 8 batches of 4 * 16 positions, then 2 of 4 * (16 + 32 + 48 + 64).
    lengths = np.array([16] * 32 + [64] * 8)
    chosen = lengths[bench.representative(lengths, cfg, 2)]
    assert sorted(chosen) == [16] * 4 + [64] * 4
    chosen = lengths[bench.representative(lengths, cfg, 4)]
    assert sorted(chosen) == [16] * 4 + [64] * 8


def test_documents_are_cut_from_their_beginning_and_begin_with_bos():
    text = text_of(40, 7, 30)
    short = bench.cut(text, np.array([5, 7, 9]))
    # No BOS follows the last one.
    assert short.docs.counts.tolist() == [5, 7, 8]
    assert short.docs.starts.tolist() == [0, 5, 12]
    assert (np.flatnonzero(short.docs.tokens == 1) == short.docs.starts).all()
    assert (short.docs.tokens[12:] == text.docs.tokens[47:56]).all()


# --- Counts and predictions -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [dict(way=bench.Published), {}, dict(ttt_buckets=3), dict(ttt_short_chunks="20:8")],
    ids=str,
)
def test_predicted_work_is_the_work_done(changes: dict):
    ours = ours_in(**changes)
    text = text_of(150, 3, 64, 65, 33, 16, 1, 100, 7, 7, 7, 7)
    ours.evaluate(text)
    steps = ours.steps(1)

    def predicted(costs: list[float]) -> float:
        """The prediction for a cost of each launch, document, position and pair."""
        counts = text.docs.counts
        return bench.predicted_batches(ours.adaptation, np.array(costs), counts, 1).sum()

    assert predicted([1, 0, 0, 0]) == len(steps.seconds)
    assert predicted([0, 1, 0, 0]) == steps.documents.sum()
    assert predicted([0, 0, 1, 0]) == steps.positions.sum()
    assert (steps.seconds > 0).all()
    # Nobody learns from a last chunk.
    assert not steps.learns[-1]


def random_steps(costs: np.ndarray) -> bench.Steps:
    """Steps that take exactly what the costs predict."""
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 64, 50)
    windows = rng.choice([128, 512, 2048], 50)
    seconds = bench.features(rows, windows) @ costs
    return bench.Steps(rows, rows * windows, np.ones(50, bool), seconds)


def test_fit_finds_the_costs():
    costs = np.array([5e-3, 0.0, 2e-7, 1e-11])
    steps = random_steps(costs)
    assert np.allclose(bench.fit(steps), costs, rtol=1e-3, atol=1e-13)
    noise = np.random.default_rng(1).uniform(0.8, 1.2, 50)
    noisy = steps._replace(seconds=steps.seconds * noise)
    assert np.allclose(bench.fit(noisy)[2], costs[2], rtol=0.3)


def test_fit_leaves_out_steps_that_learn_nothing():
    costs = np.array([5e-3, 0.0, 2e-7, 1e-11])
    steps = random_steps(costs)
    steps.learns[:5] = False
    steps.seconds[:5] = 1e-9
    assert np.allclose(bench.fit(steps), costs, rtol=1e-3, atol=1e-13)


def test_no_fitted_cost_is_negative():
    steps = random_steps(np.zeros(4))
    # Time that grows less than in proportion to the window would have a negative cost of pairs.
    steps = steps._replace(seconds=steps.positions / (1 + steps.windows / 500))
    assert bench.fit(steps).min() >= 0


def test_batches_go_to_the_rank_that_is_free_first():
    assert bench.makespan([5, 3, 3, 2, 1], 2) == 7
    assert bench.makespan([5, 3], 1) == 8
    assert bench.makespan([5, 3], 8) == 5


@pytest.mark.parametrize(
    ("name", "scale"), [("NVIDIA H200", 1.0), ("NVIDIA H100 80GB", 1 / 1.19), ("CPU", None)]
)
def test_seconds_are_predicted_only_from_the_gpus_they_are_for(
    name: str, scale: float | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench, "device_name", lambda device: name)
    monkeypatch.setattr(bench, "fineweb_lengths", lambda count: np.array([64] * 40 + [16] * 64))
    adaptation = ours_in(ttt_batch_size=16).adaptation
    rows = np.repeat([1, 4, 16], 3)
    positions = rows * np.tile([16, 32, 64], 3)
    # A second per position.
    steps = bench.Steps(rows, positions, np.ones(9, bool), positions * 1.0)
    on_eight, on_one = bench.predict(adaptation, steps, CPU)
    if scale is None:
        assert on_eight is on_one is None
    else:
        # 40 * (16 + 32 + 48 + 64) + 64 * 16 positions; the longest batch holds the others up.
        assert on_one == pytest.approx(7424 * scale)
        assert on_eight == pytest.approx(16 * 160 * 1.19 * scale)


# --- Same maths -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def published() -> tuple[bench.Text, tg.Ledger]:
    """64 documents of one chunk up to two more than a window has, scored in the published way."""
    text = text_of(*np.random.default_rng(2).integers(1, 90, 64))
    num_chunks = -(-text.docs.counts // 16)
    assert set(num_chunks) == {1, 2, 3, 4, 5, 6}
    return text, ours_in(bench.Published, ttt_batch_size=16).evaluate(text)


@pytest.mark.parametrize("changes", [{}, dict(ttt_buckets=3, ttt_batch_size=7)], ids=str)
def test_documents_score_as_the_published_way_does(
    changes: dict, published: tuple[bench.Text, tg.Ledger]
):
    text, wanted = published
    ours = ours_in(**{"ttt_batch_size": 16, **changes})
    ledger = ours.evaluate(text)
    before, after = bench.largest_differences(text, ours.cfg, ledger.nats, wanted.nats)
    assert before < 1e-6
    # AdamW enlarges rounding.
    assert after < 2e-5
    assert ledger.result()["val_bpb"] == pytest.approx(wanted.result()["val_bpb"], abs=1e-7)


def test_differences_are_told_apart_by_the_first_update():
    text = text_of(40, 30)
    a = torch.zeros(71)
    b = torch.zeros(71)
    # The last targets of the first chunks, and the first ones of the second.
    a[15] = 1.0
    b[55] = 2.0
    a[16] = 3.0
    b[56] = 4.0
    differences = bench.largest_differences(text, tiny_config(ttt_chunk_size=16), a, b)
    assert differences == bench.Differences(before_update=2.0, after_update=4.0)


def test_check_stops_where_the_two_ways_differ(monkeypatch: pytest.MonkeyPatch):
    network = network_of()
    text = text_of(50, 40, 3)
    assert bench.check_maths(network, CPU, text, None) < 1e-5
    begin = tg.Adaptation.begin

    def begin_differently(adaptation: tg.Adaptation, *batch: object) -> None:
        begin(adaptation, *batch)
        if isinstance(adaptation, bench.Published):
            adaptation.documents.master.down.data.mul_(1.01)

    monkeypatch.setattr(tg.Adaptation, "begin", begin_differently)
    with pytest.raises(AssertionError, match="the two ways do not compute the same"):
        bench.check_maths(network, CPU, text, None)


class TheirAdapter(torch.nn.Module):
    """An adapter with the names of the public script's."""

    def __init__(self, batch: int, width: int, out: int, rank: int):
        super().__init__()
        self.A = torch.nn.Parameter(torch.randn(batch, rank, width))
        self.B = torch.nn.Parameter(torch.ones(batch, out, rank))


def test_every_adapter_of_both_systems_starts_from_the_same_a():
    cfg = tiny_config()
    module = types.SimpleNamespace(BatchedLinearLoRA=TheirAdapter)
    with bench.equal_starts(types.SimpleNamespace(module=module)):
        ours = tg.LoRA.zeros(cfg, 2, 3, CPU)
        ours.reset(1, [1, 2])
        theirs = module.BatchedLinearLoRA(2, cfg.model_dim, 5, cfg.ttt_lora_rank)
        assert (ours.down == theirs.A[0]).all()
        assert (theirs.A[0] == theirs.A[1]).all()
        theirs.A.data.zero_()
        theirs.reset()
        assert (ours.down == theirs.A[1]).all()
        assert (theirs.B == 0).all()
        assert theirs.A.abs().max() <= cfg.model_dim**-0.5

    assert module.BatchedLinearLoRA is TheirAdapter
    ours.reset(1, [1, 2])
    assert (ours.down[0] != ours.down[1]).any()


# --- The whole run --------------------------------------------------------------------------------
def test_run_alone_ends_with_the_line():
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env |= TINY
    env |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DATA_DIR": "none",
        "TTT_BATCH_SIZE": "64",
    }
    command = [sys.executable, "bench/evaluation.py", "--docs", "6", "--check", "4"]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1].removeprefix("bench "))
    assert list(figures) == KEYS
    assert figures["device"] == "CPU, 1 threads"
    assert figures["recompilations"] == 0
    missing = [key for key in KEYS if figures[key] is None]
    assert missing == ["ratio_reference", "seconds_8xh100", "seconds_1xh200"]
    assert 0.1 < figures["ratio_published_way"] < 2
    assert 0 <= figures["max_nats_diff"] < 1e-3


def test_wrong_model_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    for name, value in {**TINY, "EVAL_ONLY_PATH": str(tmp_path / "none.ptz")}.items():
        monkeypatch.setenv(name, value)
    assert bench.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench/evaluation.py: EVAL_ONLY_PATH=")
    assert error.count("\n") == 1
