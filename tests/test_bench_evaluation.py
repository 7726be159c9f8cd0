"""bench/evaluation.py: the documents it measures with, counts and predictions, the same maths, and its last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

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
KEYS = "device ratio_published_way ratio_reference max_nats_diff recompilations seconds_8xh100 seconds_1xh200".split()
FAST = dict(ttt_lora_lr=0.01, ttt_batch_size=8)


def text_of(*counts: int) -> bench.Text:
    return bench.Text(documents(*counts), TABLE, 1)


def way(kind: type[bench.Timed] = bench.Timed, **changes: object) -> bench.Ours:
    model = random_model(tiny_config(**{**FAST, **changes}))
    return bench.Ours(model.cfg, model.state_dict(), True, "sdpa", CPU, kind)


# --- Documents ---
def test_lengths_are_those_of_the_field():
    lengths = bench.fineweb_lengths(50_000)
    assert lengths.sum() == pytest.approx(40_540_803, rel=0.01)
    assert np.median(lengths) == 474 and (lengths > 2048).mean() == pytest.approx(0.064, abs=0.001)


@pytest.mark.parametrize(("chunk", "published"), [(32, 1124e6), (48, 761e6), (64, 580e6)])
def test_published_way_processes_as_many_positions_on_them_as_counted_from_the_logs(
    chunk, published
):
    cfg, lengths = tg.Config(ttt_chunk_size=chunk), bench.fineweb_lengths(50_000)
    docs = tg.Documents(np.arange(0), np.arange(len(lengths)), lengths)
    batches = bench.fixed_batches(docs, np.arange(len(lengths)), cfg)
    assert sum(bench.positions(docs, batch, cfg) for batch in batches) == pytest.approx(
        published, rel=0.03
    )


def test_representative_documents_are_whole_batches_from_equal_shares_of_the_work():
    cfg = tiny_config(ttt_batch_size=4)
    lengths = np.array(
        [16] * 32 + [64] * 8
    )  # work: 8 batches of 4 * 16, then 2 of 4 * (16 + 32 + 48 + 64)
    assert sorted(lengths[bench.representative(lengths, cfg, 2)]) == [16] * 4 + [64] * 4
    assert sorted(lengths[bench.representative(lengths, cfg, 4)]) == [16] * 4 + [64] * 8


def test_documents_are_cut_from_their_beginning_and_begin_with_bos():
    text = text_of(40, 7, 30)
    short = bench.cut(text, np.array([5, 7, 9]))
    assert short.docs.counts.tolist() == [5, 7, 8] and short.docs.starts.tolist() == [
        0,
        5,
        12,
    ]  # no BOS after the last
    assert (np.flatnonzero(short.docs.tokens == 1) == short.docs.starts).all()
    assert (short.docs.tokens[12:] == text.docs.tokens[47:56]).all()


# --- Counts and predictions ---
@pytest.mark.parametrize(
    "changes",
    [dict(kind=bench.Published), {}, dict(ttt_buckets=3), dict(ttt_short_chunks="20:8")],
    ids=str,
)
def test_predicted_work_is_the_work_done(changes):
    ours, lengths = way(**changes), np.array([150, 3, 64, 65, 33, 16, 1, 100, 7, 7, 7, 7])
    ours.evaluate(text_of(*lengths))
    sizes, seconds = ours.steps(1)
    counts = text_of(*lengths).docs.counts
    for column, cost in ((0, [0, 1, 0, 0]), (1, [0, 0, 1, 0])):
        done = bench.predicted_batches(ours.cfg, ours.state, np.array(cost), counts, 1).sum()
        assert done == sizes[:, column].sum()
    assert (
        bench.predicted_batches(ours.cfg, ours.state, np.eye(4)[0], counts, 1).sum()
        == len(sizes)
        == len(seconds)
    )
    assert (seconds > 0).all() and sizes[-1, 2] == 0  # nobody learns from a last chunk


def test_fit_finds_the_costs_and_none_is_negative():
    rng, cost = np.random.default_rng(0), np.array([5e-3, 0.0, 2e-7, 1e-11])
    rows, window = rng.integers(1, 64, 50), rng.choice([128, 512, 2048], 50)
    seconds = bench.features(rows, window) @ cost
    sizes = np.stack([rows, rows * window, np.ones(50, int)], 1)
    assert np.allclose(bench.fit(sizes, seconds), cost, rtol=1e-3, atol=1e-13)
    seconds *= rng.uniform(0.8, 1.2, 50)
    sizes[:5, 2], seconds[:5] = 0, 1e-9  # steps that learnt nothing are not fitted
    assert (found := bench.fit(sizes, seconds)).min() >= 0 and np.allclose(
        found[2], cost[2], rtol=0.3
    )
    assert (
        bench.fit(sizes, sizes[:, 1] / (1 + window / 500)).min() >= 0
    )  # else negative for the square


def test_batches_go_to_the_rank_that_is_free_first():
    assert (
        bench.makespan([5, 3, 3, 2, 1], 2) == 7
        and bench.makespan([5, 3], 1) == 8
        and bench.makespan([5, 3], 8) == 5
    )


@pytest.mark.parametrize(
    ("name", "scale"), [("NVIDIA H200", 1.0), ("NVIDIA H100 80GB", 1 / 1.19), ("CPU", None)]
)
def test_seconds_are_predicted_only_from_the_gpus_they_are_for(name, scale, monkeypatch):
    monkeypatch.setattr(bench, "device_name", lambda device: name)
    monkeypatch.setattr(bench, "fineweb_lengths", lambda count: np.array([64] * 40 + [16] * 64))
    cfg, state = tiny_config(ttt_batch_size=16), types.SimpleNamespace(granule=1, buckets=[])
    sizes = np.array([[r, r * n, 1] for r in (1, 4, 16) for n in (16, 32, 64)])
    eight, one = bench.predict(cfg, state, sizes, sizes[:, 1] * 1.0, CPU)  # a second per position
    if scale is None:
        assert eight is one is None
    else:  # 40 * (16 + 32 + 48 + 64) + 64 * 16 positions
        assert one == pytest.approx(7424 * scale)
        assert eight == pytest.approx(
            16 * 160 * 1.19 * scale
        )  # the longest batch holds the others up


# --- Same maths ---
@pytest.mark.parametrize("changes", [{}, dict(ttt_buckets=3, ttt_batch_size=7)], ids=str)
def test_256_documents_score_as_the_published_way_does(changes, published):
    text, wanted = published
    ours = way(**{"ttt_batch_size": 64, **changes})
    found = ours.evaluate(text)
    before, after = bench.largest_differences(text, ours.cfg, found.nats, wanted.nats)
    assert before < 1e-6 and after < 2e-5  # AdamW enlarges rounding
    assert abs(found.result()["val_bpb"] - wanted.result()["val_bpb"]) < 1e-7


@pytest.fixture(scope="module")
def published() -> tuple[bench.Text, tg.Ledger]:
    text = text_of(*np.random.default_rng(2).integers(1, 90, 256))
    assert set(-(-text.docs.counts // 16)) == {
        1,
        2,
        3,
        4,
        5,
        6,
    }  # numbers of chunks, beyond the window of four
    return text, way(bench.Published, ttt_batch_size=64).evaluate(text)


def test_differences_are_told_apart_by_the_first_update():
    text, cfg = text_of(40, 30), tiny_config(ttt_chunk_size=16)
    a, b = torch.zeros(71), torch.zeros(71)
    a[15], a[16], b[55], b[56] = 1.0, 3.0, 2.0, 4.0
    assert bench.largest_differences(text, cfg, a, b) == (2.0, 4.0)


def test_check_stops_where_the_two_ways_differ(monkeypatch):
    model = random_model(tiny_config(**FAST))
    weights, text = model.state_dict(), text_of(50, 40, 3)
    assert bench.check_maths(model.cfg, weights, True, CPU, text, None) < 1e-5
    begin = tg.Adaptation.begin

    def other(state: tg.Adaptation, *batch: object) -> None:
        begin(state, *batch)
        if isinstance(state, bench.Published):
            state.documents.master.down.data.mul_(1.01)

    monkeypatch.setattr(tg.Adaptation, "begin", other)
    with pytest.raises(AssertionError, match="the two ways do not compute the same"):
        bench.check_maths(model.cfg, weights, True, CPU, text, None)


def test_every_adapter_of_both_systems_starts_from_the_same_a():
    class Theirs(torch.nn.Module):
        def __init__(self, batch: int, width: int, out: int, rank: int):
            super().__init__()
            self.A = torch.nn.Parameter(torch.randn(batch, rank, width))
            self.B = torch.nn.Parameter(torch.ones(batch, out, rank))

    module, cfg = types.SimpleNamespace(BatchedLinearLoRA=Theirs), tiny_config()
    with bench.equal_starts(types.SimpleNamespace(module=module)):
        lora, one = (
            tg.LoRA.zeros(cfg, 2, 3, CPU),
            module.BatchedLinearLoRA(2, cfg.model_dim, 5, cfg.ttt_lora_rank),
        )
        lora.reset(1, [1, 2])
        assert (lora.down == one.A[0]).all() and (one.A[0] == one.A[1]).all()
        one.A.data.zero_()
        one.reset()
        assert (
            (lora.down == one.A[1]).all()
            and (one.B == 0).all()
            and one.A.abs().max() <= cfg.model_dim**-0.5
        )
    assert module.BatchedLinearLoRA is Theirs
    lora.reset(1, [1, 2])
    assert (lora.down[0] != lora.down[1]).any()


# --- The whole run ---
def test_run_alone_ends_with_the_line():
    env = {k: os.environ[k] for k in ("PATH", "HOME") if k in os.environ}
    env |= {
        **TINY,
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
    found = json.loads(done.stdout.splitlines()[-1].removeprefix("bench "))
    assert (
        list(found) == KEYS and found["device"] == "CPU, 1 threads" and found["recompilations"] == 0
    )
    assert [k for k in KEYS if found[k] is None] == [
        "ratio_reference",
        "seconds_8xh100",
        "seconds_1xh200",
    ]
    assert 0.1 < found["ratio_published_way"] < 2 and 0 <= found["max_nats_diff"] < 1e-3


def test_wrong_model_file_is_one_line(tmp_path, monkeypatch, capsys):
    for name, value in {**TINY, "EVAL_ONLY_PATH": str(tmp_path / "none.ptz")}.items():
        monkeypatch.setenv(name, value)
    assert bench.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench/evaluation.py: EVAL_ONLY_PATH=") and error.count("\n") == 1
