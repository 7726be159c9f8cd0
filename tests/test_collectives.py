"""Eight ranks call the same collectives in the same order, whatever happens to one of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from conftest import TINY
from simulated_ranks import Diverged, Outcome, on_simulated_ranks

import train_gpt as tg

WORLD = 8
# A step has a row for each rank. All phases that talk to other ranks are on.
ENV = {
    **TINY,
    "MICRO_BATCH_TOKENS": "64",
    "TRAIN_SEQ_LEN": "32",
    "ITERATIONS": "3",
    "ENABLE_LOOPING_AT": "0.5",
    "GPTQ_CALIBRATION_BATCHES": "8",
    "VAL_DOC_FRACTION": "0.5",
    "PHASED_TTT_NUM_PHASES": "1",
    "PHASED_TTT_PREFIX_DOCS": "3",
    "TTT_CHUNK_TOKENS": "64",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_all(
    env: dict[str, str], monkeypatch, before: Callable[[tg.Run], None] = lambda run: None
) -> list[Outcome]:
    """The outcomes of whole runs on eight ranks. before: called with each run before it goes."""
    cfg, origin = tg.Config.from_env({**ENV, **env}, has_cuda=False)

    def job(ranks: tg.Ranks) -> dict:
        run = tg.Run(cfg, origin, ranks)
        before(run)
        return run.go()

    return on_simulated_ranks(WORLD, job, monkeypatch)


def assert_same(outcomes: list[Outcome]) -> None:
    """All ranks ended the same way, after the same collectives."""
    first = outcomes[0]
    assert len(first.collectives) > 10
    for outcome in outcomes:
        assert outcome.collectives == first.collectives
        assert type(outcome.error) is type(first.error), outcome.error
        assert str(outcome.error) == str(first.error)


# All weights learn from chunks of the stream, with scoring windows that overlap.
CHUNKS = {
    "TTT_MODE": "chunk",
    "PHASED_TTT_NUM_PHASES": "0",
    "SLIDING_WINDOW_ENABLED": "1",
    "EVAL_STRIDE": "16",
    "TTT_LR": "0.05",
}


@pytest.mark.parametrize("learning", [{}, CHUNKS], ids=["adapters and phases", "chunks"])
def test_a_whole_run_with_every_phase(tiny_data, folder, monkeypatch, learning):
    """Validation, checkpoints, compression, scoring and learning, while a rank is late."""
    done = []
    step = tg.Optimizers.step

    def late_step(self: tg.Optimizers, *args):
        if self.ranks.rank == 5:
            time.sleep(0.05)
        done.append(self.ranks.rank)
        return step(self, *args)

    monkeypatch.setattr(tg.Optimizers, "step", late_step)
    env = {
        "DATA_DIR": str(tiny_data),
        "RUN_ID": "eight",
        "VAL_LOSS_EVERY": "2",
        "CHECKPOINT_EVERY": "1e-9",
        **learning,
    }
    outcomes = run_all(env, monkeypatch)
    assert outcomes[0].error is None, outcomes[0].error
    assert_same(outcomes)
    assert len({outcome.result["val_bpb"] for outcome in outcomes}) == 1
    assert set(done) == set(range(WORLD))
    seconds = outcomes[0].result["seconds"]
    assert {"train", "calibrate", "quantise", "pack", "score quantized_ttt_lora"} <= seconds.keys()
    names = {collective.name for collective in outcomes[0].collectives}
    assert len(names) == 5  # four operations, and the end


SHORT = {"ITERATIONS": "2", "TTT_ENABLED": "0", "PHASED_TTT_NUM_PHASES": "0", "WARMUP_STEPS": "0"}


def test_a_loss_that_is_not_finite_on_one_rank_ends_all(tiny_data, folder, monkeypatch):
    accumulate = tg.accumulate_gradients
    rows_seen = []

    def poisoned(forward, plan, rows, num_targets, graphs=None):
        loss = accumulate(forward, plan, rows, num_targets, graphs)
        rows_seen.append(1)
        # One rank of eight, the first to come.
        return loss * math.nan if len(rows_seen) == 1 else loss

    monkeypatch.setattr(tg, "accumulate_gradients", poisoned)
    outcomes = run_all({**SHORT, "DATA_DIR": str(tiny_data)}, monkeypatch)
    assert isinstance(outcomes[0].error, FloatingPointError)
    assert_same(outcomes)


def test_a_signal_to_one_rank_ends_all_after_the_same_step(tiny_data, folder, monkeypatch):
    begin = tg.Trainer.__init__

    def signalled(self: tg.Trainer, run: tg.Run, budget_s: float) -> None:
        begin(self, run, budget_s)
        if run.ranks.rank == 6:
            self.note_signal(15, None)

    monkeypatch.setattr(tg.Trainer, "__init__", signalled)
    outcomes = run_all({**SHORT, "DATA_DIR": str(tiny_data)}, monkeypatch)
    assert "SIGTERM" in str(outcomes[0].error)
    assert_same(outcomes)


@pytest.mark.parametrize(
    "learning", [{"PHASED_TTT_NUM_PHASES": "1"}, CHUNKS], ids=["adapters", "chunks"]
)
def test_a_deadline_that_is_near_on_one_rank_leaves_every_target_scored(
    tiny_data, folder, monkeypatch, learning
):
    must_stop = tg.Deadline.must_stop

    def near_at_once(self: tg.Deadline, targets: float, ranks: tg.Ranks | None = None) -> bool:
        self.late = self.late or self.chosen
        return must_stop(self, targets, ranks)

    monkeypatch.setattr(tg.Deadline, "must_stop", near_at_once)
    monkeypatch.setattr(tg.Deadline, "chosen", False, raising=False)

    def before(run: tg.Run) -> None:
        adapt = run.adapt

        def hurried(deadline, *args):
            deadline.chosen = run.ranks.rank == 2 and not args
            return adapt(deadline, *args)

        run.adapt = hurried

    env = {**SHORT, "TTT_ENABLED": "1", "DATA_DIR": str(tiny_data), **learning}
    outcomes = run_all(env, monkeypatch, before)
    assert outcomes[0].error is None
    assert_same(outcomes)


def test_an_error_on_one_rank_ends_the_others_by_a_line(tiny_data, folder, monkeypatch):
    factor = tg.damped_cholesky
    calls = []

    def bad(hessian: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise tg.BadMatrix("GPTQ: a Hessian has no Cholesky factor")
        return factor(hessian)

    monkeypatch.setattr(tg, "damped_cholesky", bad)
    outcomes = run_all({**SHORT, "DATA_DIR": str(tiny_data)}, monkeypatch)
    errors = [outcome.error for outcome in outcomes]
    assert sum(isinstance(error, tg.BadMatrix) for error in errors) == 1
    monkeypatch.setattr(tg.dist, "is_initialized", lambda: True)
    for error in errors:
        # main() makes one line of either.
        assert isinstance(error, tg.BadMatrix) or tg.is_lost_peer(error)


# --- Planted faults -------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", ["left out", "other order", "other dtype", "one more at the end"])
def test_a_rank_that_differs_is_caught_on_all(fault, monkeypatch):
    def job(ranks: tg.Ranks) -> None:
        differs = ranks.rank == 3
        if not (differs and fault == "left out"):
            ranks.gather("a")
        if differs and fault == "other order":
            ranks.gather(1)
            ranks.sum(torch.zeros(2))
        else:
            dtype = torch.float64 if differs and fault == "other dtype" else torch.float32
            ranks.sum(torch.zeros(2, dtype=dtype))
            ranks.gather(1)
        if differs and fault == "one more at the end":
            ranks.gather(2)

    outcomes = on_simulated_ranks(WORLD, job, monkeypatch)
    assert all(isinstance(outcome.error, Diverged) for outcome in outcomes)


def test_a_phase_in_which_a_rank_saves_a_message_is_caught(tiny_data, folder, monkeypatch):
    reduce = tg.Muon.reduce_gradients

    def frugal(self: tg.Muon) -> torch.Tensor:
        norm = reduce(self)
        # Looks harmless: this rank knows the norm already.
        return norm if self.ranks.rank == 4 else self.ranks.sum(norm)

    monkeypatch.setattr(tg.Muon, "reduce_gradients", frugal)
    outcomes = run_all({**SHORT, "DATA_DIR": str(tiny_data)}, monkeypatch)
    assert all(isinstance(outcome.error, Diverged) for outcome in outcomes)


def test_simulated_collectives_compute_what_real_ones_do(monkeypatch):
    def job(ranks: tg.Ranks) -> tuple:
        mine = torch.arange(4.0) + ranks.rank
        part = torch.zeros(2)
        tg.dist.reduce_scatter_tensor(part, mine)
        both = torch.zeros(4)
        tg.dist.all_gather_into_tensor(both, part)
        tickets = ranks.tickets()
        return ranks.sum(mine.clone()), both, ranks.gather(ranks.rank), next(tickets)

    first, second = (outcome.result for outcome in on_simulated_ranks(2, job, monkeypatch))
    total = 2 * torch.arange(4.0) + 1
    for result in (first, second):
        assert torch.equal(result[0], total)
        assert torch.equal(result[1], total)
        assert result[2] == [0, 1]
    assert {first[3], second[3]} == {0, 1}
