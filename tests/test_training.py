"""Training: equal weights on any number of ranks, warm-up, budget, weight average, bad numbers."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, on_ranks, run_script, tiny_config
from test_optim import cpu_ranks, error, on_one, weights_of
from torch import Tensor

import train_gpt as tg

# Banks of 10 and 5 slices: no even shares for 2 or 4 ranks.
DEEPER = dict(num_layers=5, loop_end=2, xsa_last_n=5)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory) -> Iterator[None]:
    """Runs write their logs into the working folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        yield


class Lines(list):
    """A log that keeps its lines."""

    live = False

    def __init__(self):
        super().__init__()
        self.points = []
        self.failures = {}

    def __call__(self, line: str, terminal: bool = True) -> None:
        self.append(line)

    def due(self) -> bool:
        return False

    def wants_progress(self) -> bool:
        return False

    def begin_phase(self, name: str) -> None:
        pass

    def show(self, line: str) -> None:
        pass

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.points.append((step, values))


class Session(tg.Run):
    """The tiny network's run up to its training.

    Notes log lines, plans, saved weights (`saved`) and the weights after each step (`after`).
    """

    def __init__(self, data: Path, ranks: tg.Ranks | None = None, **overrides: Any):
        cfg = tiny_config(**{"data_dir": data, "train_log_every": 1, **overrides})
        super().__init__(cfg, dict.fromkeys(vars(cfg), "default"), ranks or cpu_ranks())
        self.model = tg.GPT(cfg)
        self.log = Lines()
        self.plans = []
        self.saved = []
        self.after = []
        self.optimizers = tg.Optimizers(self.model, cfg, self.ranks)
        self.scoring = self.forward
        step = self.optimizers.step

        def watched(*args: float) -> Tensor:
            norm = step(*args)
            self.after.append(weights_of(self.model))
            return norm

        self.optimizers.step = watched

    def forward(self, row: tg.Batch, plan: tuple[tg.Visit, ...]) -> Tensor:
        self.plans.append(plan)
        return self.model(row, plan)

    def save_weights(self, name: str, weights: dict[str, Tensor], step: int, looped: bool) -> None:
        self.saved.append(
            (name, {key: w.detach().clone() for key, w in weights.items()}, step, looped)
        )

    def train(self, reserve: float = 0.0) -> Session:
        self.looped = tg.train(self, reserve)
        return self

    def numbers(self, pattern: str) -> list[float]:
        """What the pattern's group matches in the log lines, in order."""
        return [float(x) for line in self.log for x in re.findall(pattern, line)]


def warmed_up(run: Session) -> Callable[..., Tensor]:
    """The compiled forward of the run's model after a step of the plain plan.

    The run counts compilations from there on.
    """
    torch.compiler.reset()
    compiled = torch.compile(run.model, backend="aot_eager", fullgraph=True, dynamic=False)
    row = tg.synthetic_row(run.cfg, run.cfg.row_shape, torch.device("cpu"))
    tg.accumulate_gradients(compiled, run.cfg.plans[0], [row], 512)
    run.model.zero_grad()
    run.compilation_counter = tg.CompilationCounter(run.log)
    return compiled


class Breaking(Session):
    """Its forward returns NaN in the step after `last_good` steps, on the last rank only."""

    last_good = 2

    def forward(self, row: tg.Batch, plan: tuple[tg.Visit, ...]) -> Tensor:
        bad = len(self.after) == self.last_good and self.ranks.rank == self.ranks.world_size - 1
        return super().forward(row, plan) * (math.nan if bad else 1.0)


def assert_same(
    found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 0.0
) -> None:
    assert found.keys() == wanted.keys()
    for name, p in found.items():
        assert (
            torch.equal(p, wanted[name]) if tolerance == 0 else error(p, wanted[name]) < tolerance
        ), name


def average(
    start: dict[str, Tensor], after: list[dict[str, Tensor]], decay: float
) -> dict[str, Tensor]:
    """The EMA of weights, from the initial ones on, in fp64."""
    ema = {name: p.double() for name, p in start.items()}
    for weights in after:
        ema = {name: decay * e + (1 - decay) * weights[name].double() for name, e in ema.items()}
    return ema


# --- Ranks ----------------------------------------------------------------------------------------
def train_on(ranks: tg.Ranks, data: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """8 steps, looped from the fourth on; then a few whose last rank returns NaN."""
    done = Session(
        data, ranks, iterations=8, ema_decay=0, enable_looping_at=0.35, **overrides
    ).train()
    broken = Breaking(data, ranks, iterations=5, **overrides)
    with pytest.raises(FloatingPointError) as caught:
        broken.train()
    return {
        "weights": weights_of(done.model),
        "final": done.final,
        "looped at": done.numbers(r"enabled step:(\d+)"),
        "error": str(caught.value),
        "saved": broken.saved,
    }


@pytest.fixture(scope="module")
def alone(tiny_data) -> dict[str, Any]:
    return on_one(train_on, tiny_data, DEEPER)


@pytest.fixture(scope="module", params=[2, 4])
def together(request, tiny_data, tmp_path_factory) -> list[dict[str, Any]]:
    return on_ranks(request.param, train_on, tmp_path_factory.mktemp("ranks"), tiny_data, DEEPER)


def test_ranks_train_the_weights_of_one(alone, together):
    assert alone["looped at"] == [3]
    for found in together:
        assert_same(found["weights"], alone["weights"], tolerance=1e-5)
        assert_same(found["weights"], together[0]["weights"])
        assert found["final"]["train_loss"] == pytest.approx(alone["final"]["train_loss"], rel=1e-5)
        assert found["final"]["train_tokens"] == alone["final"]["train_tokens"] > 0
        assert found["looped at"] == alone["looped at"]


def test_one_rank_with_a_bad_number_stops_them_all(together):
    for found in together:
        assert "loss nan" in found["error"]
        assert [(name, step) for name, _, step, _ in found["saved"]] == [("last_good.pt", 2)]
        assert_same(found["saved"][0][1], together[0]["saved"][0][1])


# --- Repeatable, and warm-up leaves no trace ------------------------------------------------------
def test_the_same_seed_trains_the_same_weights_bit_for_bit(tiny_data):
    def trained(seed: int) -> dict[str, Tensor]:
        return weights_of(Session(tiny_data, iterations=8, seed=seed).train().model)

    first = trained(1)
    second = trained(1)
    other = trained(2)
    assert_same(first, second)
    assert not torch.equal(first["tok_emb"], other["tok_emb"])


def test_training_after_warm_up_is_training_without_bit_for_bit(tiny_data, tmp_path):
    weights = []
    for steps in ("0", "3"):
        env = {
            **TINY,
            "DATA_DIR": str(tiny_data),
            "ITERATIONS": "5",
            "WARMUP_STEPS": steps,
            "ARTIFACT_DIR": steps,
        }
        result = run_script({**env, "TTT_ENABLED": "1"}, tmp_path)
        assert result.returncode == 0, result.stderr
        assert ("warmup_step: 3/3" in result.stdout) == (steps == "3")
        weights.append(
            torch.load(tmp_path / steps / "final_model.pt", weights_only=True)["weights"]
        )
    assert_same(*weights)


def everything(session: Session) -> dict[str, Any]:
    """All that warm-up could leave behind, as copies."""
    optimizers, adam = session.optimizers, session.optimizers.adam.state_dict()
    state = {
        f"adam.{key}.{name}": value
        for key, entry in adam["state"].items()
        for name, value in entry.items()
    }
    state |= {
        f"{key}.{name}": x for key, own in optimizers.state.items() for name, x in own.items()
    }
    tensors = {
        **dict(session.model.named_parameters()),
        **dict(session.model.named_buffers()),
        **state,
    }
    gradients = {
        name: None if p.grad is None else p.grad.clone()
        for name, p in session.model.named_parameters()
    }
    drawn = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    rates = [{k: v for k, v in g.items() if k != "params"} for g in adam["param_groups"]]
    tensors = {name: t.detach().clone() for name, t in tensors.items()}
    return {"tensors": tensors, "gradients": gradients, "drawn": drawn, "rates": rates}


def test_restored_leaves_everything_as_it_was(tiny_data):
    """Also after real optimizer steps and a gradient that no step has used."""
    session = Session(tiny_data)
    model, optimizers, cfg = session.model, session.optimizers, session.cfg
    row = tg.synthetic_row(cfg, cfg.row_shape, torch.device("cpu"))
    before = everything(session)
    with tg.state_restored(model, optimizers):
        for plan in (cfg.plans[0], cfg.plans[1], cfg.plans[1]):
            tg.accumulate_gradients(model, plan, [row], cfg.micro_batch_tokens)
            optimizers.step(1.0, 0.9)
            torch.rand(3)
        inside = everything(session)
        tg.accumulate_gradients(model, cfg.plans[0], [row], cfg.micro_batch_tokens)
    after = everything(session)
    # AdamW has state by then.
    assert inside["tensors"].keys() > before["tensors"].keys()
    assert not any(
        torch.equal(inside["tensors"][name], before["tensors"][name])
        for name in ("tok_emb", "qo_bank")
    )
    assert_same(after["tensors"], before["tensors"])
    assert after["rates"] == before["rates"]
    assert torch.equal(after["drawn"][0], before["drawn"][0])
    assert after["drawn"][1:] == before["drawn"][1:]
    assert after["gradients"] == before["gradients"] == dict.fromkeys(before["gradients"])


def test_more_ranks_than_rows_of_a_step_are_refused(tiny_data):
    ranks = cpu_ranks()
    ranks.world_size = 4
    Session(tiny_data, ranks)
    ranks.world_size = 5
    with pytest.raises(tg.UsageError) as caught:
        Session(tiny_data, ranks)
    assert str(caught.value) == (
        "WORLD_SIZE=5: must be at most 4, the rows of a step;"
        " TRAIN_BATCH_TOKENS=640 has a row for each"
    )
    Session(tiny_data, ranks, train_batch_tokens=640)


# --- Schedule, average, progress ------------------------------------------------------------------
@pytest.mark.parametrize(("share", "first_looped"), [(0.0, 0), (0.5, 5), (0.35, 4), (1.0, 10)])
def test_loops_run_from_the_requested_share_of_the_steps_on(tiny_data, share, first_looped):
    session = Session(tiny_data, iterations=10, enable_looping_at=share).train()
    plain, looped = session.cfg.plans
    rows = session.cfg.rows_per_step
    first = [plain] * rows * first_looped
    rest = [looped] * rows * (10 - first_looped)
    assert session.plans == first + rest
    assert session.looped == (share < 1)
    assert session.numbers(r"layer_loop:enabled step:(\d+) ") == [first_looped] * session.looped


def test_a_network_without_loops_says_nothing_of_them(tiny_data):
    session = Session(tiny_data, iterations=3, num_loops=0, enable_looping_at=0).train()
    assert not session.looped
    assert session.numbers(r"layer_loop:enabled step:(\d+) ") == []


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9965])
def test_training_leaves_the_average_of_the_weights(tiny_data, decay):
    session = Session(tiny_data, iterations=6, ema_decay=decay)
    start = weights_of(session.model)
    wanted = average(start, session.train().after, decay)
    assert len(session.after) == 6
    assert_same(weights_of(session.model), wanted, tolerance=1e-6)


def test_the_loss_goes_down(tiny_data):
    session = Session(tiny_data, iterations=40, micro_batch_tokens=512).train()
    losses = session.numbers(r"^step:.* train_loss:(\S+)")
    assert len(losses) == 40
    assert abs(losses[0] - math.log(session.cfg.vocab_size)) < 0.05
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0
    assert session.final["train_loss"] == pytest.approx(losses[-1], abs=1e-4)


# --- The budget -----------------------------------------------------------------------------------
class Slow(Session):
    """Time passes only in forwards, a second per visit of a layer, and in validation.

    A step is one row, and so one forward.
    """

    seconds = 0.0

    def __init__(self, *args: Any, **overrides: Any):
        super().__init__(*args, micro_batch_tokens=512, **overrides)
        self.ranks.now = lambda: self.seconds
        self.checked = []

    def forward(self, row: tg.Batch, plan: tuple[tg.Visit, ...]) -> Tensor:
        self.seconds += len(plan)
        return super().forward(row, plan)

    def evaluate(self, plan: tuple[tg.Visit, ...]) -> SimpleNamespace:
        self.seconds += 1000
        self.checked.append(plan)
        return SimpleNamespace(result=lambda: {"val_loss": 0.0, "val_bpb": 0.0})


@pytest.mark.parametrize("share", [0.0, 0.35, 0.95, 1.0])
def test_no_step_ends_after_the_budget_less_the_reserve(tiny_data, share):
    """Nor is one left out that fits: of 100 s, a plain step takes 4 and a looped one 5.

    Validation is off the clock.
    """
    run = Slow(
        tiny_data,
        max_wallclock_seconds=109,
        iterations=99,
        enable_looping_at=share,
        val_loss_every=7,
    )
    run.train(reserve=9.0)
    ends = run.numbers(r"^step:.* train_time:(\d+)ms")
    (total,) = run.numbers(r"^stopping: .*train_time:(\d+)ms")
    assert ends[-1] == total
    assert 95_000 < total <= 100_000
    looped = [len(plan) == 5 for plan in run.plans]
    assert [start >= 100_000 * share for start in [0, *ends[:-1]]] == looped
    assert run.looped == looped[-1]
    assert len(run.checked) == len(looped) // 7


def test_a_real_run_stops_within_its_budget_and_says_so(tiny_data):
    run = Session(tiny_data, max_wallclock_seconds=3, iterations=1_000_000).train(reserve=1.0)
    (total,) = run.numbers(r"^stopping: .*train_time:(\d+)ms")
    assert 0 < total <= 3000
    assert [run.final["steps"]] == run.numbers(r"^stopping: step:(\d+)/1000000") == [len(run.after)]


# --- Bad numbers ----------------------------------------------------------------------------------
def test_a_loss_that_is_not_finite_stops_at_its_step_and_saves_the_average_before(tiny_data):
    run = Breaking(tiny_data, iterations=9, ema_decay=0.9)
    start = weights_of(run.model)
    run.last_good = 3
    with pytest.raises(FloatingPointError, match="step 4"):
        run.train()
    ((name, weights, step, _),) = run.saved
    assert (name, step) == ("last_good.pt", 3)
    assert_same(weights, average(start, run.after[:3], 0.9), tolerance=1e-6)


def test_a_run_that_diverges_ends_with_one_line_status_1_and_its_last_good_weights(
    tiny_data, tmp_path
):
    env = {
        **TINY,
        "DATA_DIR": str(tiny_data),
        "ARTIFACT_DIR": "out",
        "MATRIX_LR": "1e17",
        "SCALAR_LR": "1e17",
        "MUON_WD": "0",
        "ADAM_WD": "0",
        "WARMUP_STEPS": "0",
    }
    result = run_script(env, tmp_path)
    assert result.returncode == 1, result.stdout[-2000:]
    (line,) = result.stderr.splitlines()
    assert line.startswith("train_gpt.py: loss ")
    assert "last_good.pt" in line
    saved = torch.load(tmp_path / "out" / "last_good.pt", weights_only=True)
    assert f"step {saved['step'] + 1}" in line
    assert all(w.isfinite().all() for w in saved["weights"].values())
    assert "final " not in result.stdout
    assert not (tmp_path / "out" / "final_model.pt").exists()
