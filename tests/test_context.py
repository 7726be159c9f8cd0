"""SEQ_LEN_SCHEDULE: segments that grow in training, in rows of one shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from test_data import BOS, equal, random_documents, rank_of, stream_of
from test_model import draw
from test_optim import weights_of
from test_resume import EVERY, Killed, Mortal, die, folder  # noqa: F401, a fixture
from test_training import Session, assert_same
from torch._dynamo.testing import CompileCounterWithBackend

import train_gpt as tg

GROWS = dict(seq_len_schedule="0:16,0.3:32,0.6:64")
PR2014 = tg.Config(**tg.PRESETS["pr2014"])


@pytest.fixture
def stream(tmp_path: Path) -> tg.TokenStream:
    """Documents of 5 to 150 tokens."""
    return stream_of(tmp_path, random_documents(5001, range(5, 150)))


def tokens_of(rows: list[tg.Batch]) -> list[int]:
    return [id for row in rows for id in row.inputs.tolist()]


# --- The schedule ---------------------------------------------------------------------------------
def test_lengths_of_pr2014_at_twenty_points_of_the_clock():
    for k in range(20):
        frac = k / 20
        wanted = 1024 if frac < 0.1 else 2048 if frac < 0.7 else 3072
        assert PR2014.longest_segment(frac) == wanted, frac


def test_without_a_schedule_the_length_is_always_that_of_the_knob():
    assert {tiny_config().longest_segment(frac) for frac in (0.0, 0.5, 1 - 1e-9)} == {64}


def test_rates_rise_over_32_steps_from_a_change_on():
    assert [tg.ramp_after_change(step, 0) for step in (0, 5, 900)] == [1.0] * 3
    found = [tg.ramp_after_change(100 + k, 100) for k in range(40)]
    assert found == [min(k + 1, 32) / 32 for k in range(40)]


# --- Rows -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("longest", [16, 32, 64])
def test_rows_of_any_length_hold_the_same_tokens_cut_at_the_length(stream, longest):
    cfg = tiny_config(**GROWS)
    whole, total = tg.PackedLoader(stream, BOS, cfg, rank_of(1, 0)).rows(4)
    rows, same = tg.PackedLoader(stream, BOS, cfg, rank_of(1, 0)).rows(4, longest)
    assert same == total == 4 * cfg.micro_batch_tokens
    assert tokens_of(rows) == tokens_of(whole)
    for row, other in zip(rows, whole, strict=True):
        assert torch.equal(row.targets, other.targets)
        assert row.max_seqlen == 64
        wanted = tg.segment_starts(row.inputs.numpy(), BOS, longest)
        assert row.cu_seqlens[: len(wanted)].tolist() == wanted.tolist()
        assert row.cu_seqlens.diff().max() <= longest


def test_step_is_cut_by_the_length_at_which_it_was_asked_for(stream):
    """The thread has the next step ready in the old length; its tokens are cut anew."""
    cfg = tiny_config(**GROWS)
    loader = tg.PackedLoader(stream, BOS, cfg, rank_of(2, 1))
    direct = tg.PackedLoader(stream, BOS, cfg, rank_of(2, 1))
    steps = loader.steps()
    for longest in (16, 16, 32, 64, 64):
        loader.longest = longest
        rows, total = next(steps)
        wanted, same = direct.rows(cfg.rows_per_step, longest)
        assert total == same
        assert equal(rows, wanted)
    steps.close()


def test_capacity_must_hold_the_segments_of_the_shortest_length(stream):
    with pytest.raises(tg.UsageError, match=r"least length of SEQ_LEN_SCHEDULE=16"):
        tiny_config(cu_seqlens_capacity=17, **GROWS)
    cfg = tiny_config(cu_seqlens_capacity=18, **GROWS)
    loader = tg.PackedLoader(stream, BOS, cfg, rank_of(1, 0))
    for _ in range(20):
        rows, count = loader.rows(1, 16)
        assert count >= 16 and rows[0].cu_seqlens.diff().max() <= 64


def test_every_length_runs_in_one_graph(stream):
    torch.compiler.reset()
    cfg = tiny_config(num_layers=2, num_loops=0, parallel_start_layer=0, xsa_last_n=2, **GROWS)
    counter = CompileCounterWithBackend("eager")
    model = draw(cfg)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    loader = tg.PackedLoader(stream, BOS, cfg, rank_of(1, 0))
    for longest in (16, 32, 64):
        (row,), _ = loader.rows(1, longest)
        compiled(row, cfg.plans[0])
    assert counter.frame_count == 1
    torch.compiler.reset()


# --- Training -------------------------------------------------------------------------------------
class Watching(Session):
    """Notes the longest segment of every row."""

    def forward(self, row: tg.Batch, plan: tuple[tg.Visit, ...]) -> torch.Tensor:
        self.longest = [*getattr(self, "longest", []), int(row.cu_seqlens.diff().max())]
        return super().forward(row, plan)


def test_training_changes_the_length_on_time_and_ramps_the_rates(tiny_data):
    run = Watching(tiny_data, iterations=10, enable_looping_at=1, **GROWS).train()
    by_step = [max(run.longest[4 * k : 4 * k + 4]) for k in range(10)]
    assert by_step == [16] * 3 + [32] * 3 + [64] * 4
    changes = [line for line in run.log if line.startswith("seq_len:")]
    assert [line.split(" frac")[0] for line in changes] == [
        "seq_len:16 step:0",
        "seq_len:32 step:3",
        "seq_len:64 step:6",
    ]
    cfg = run.cfg
    wanted = []
    for step in range(10):
        k = 32 if step < 3 else (step - 3) % 3 + 1 if step < 6 else step - 5
        wanted.append(tg.lr_scale_at(step / 10, cfg, step) * k / 32)
    found = [values["lr_scale"] for _, values in run.log.points if "lr_scale" in values]
    assert found == pytest.approx(wanted)
    assert run.final["train_tokens"] == 10 * cfg.train_batch_tokens


def test_run_that_dies_around_a_change_ends_with_the_same_bits(tiny_data):
    """It dies in the ramp after a change, with a checkpoint from there, and goes on to the next."""
    settings = dict(iterations=8, seq_len_schedule="0:16,0.25:32,0.75:64")
    wanted = Session(tiny_data, **settings, enable_looping_at=0.5).train()
    with pytest.raises(Killed):
        Mortal(tiny_data, last=6, act=die, **settings, **EVERY).train()
    found = Session(tiny_data, **settings, **EVERY).train()
    assert len(found.after) == 8 - 4
    assert_same(weights_of(found.model), weights_of(wanted.model))
