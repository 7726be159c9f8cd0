"""Numbers read one step late, the speed gate, predicted steps, recompilations, CUDA graphs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, run_script, tiny_config
from test_optim import cpu_ranks, weights_of
from test_training import Session, Slow, assert_same, warmed_up
from torch import Tensor

sys.path.insert(0, str(ROOT / "tools"))
import runlog

import train_gpt as tg


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        yield


# --- One step late --------------------------------------------------------------------------------
class Watched(Session):
    """Notes the order of forwards, optimizer steps and reads of numbers on the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *args: Any, **overrides: Any):
        super().__init__(*args, **overrides)
        events = self.events = []
        step = self.optimizers.step

        def stepped(*args: float) -> Tensor:
            events.append("step")
            return step(*args)

        class NotedRead(tg.PendingRead):
            def __init__(self, values: Tensor, ranks: tg.Ranks):
                super().__init__(values, ranks)
                self.number = events.count("step")

            def wait(self) -> tuple[list[float], float]:
                events.append(f"read {self.number}")
                return super().wait()

        self.optimizers.step = stepped
        monkeypatch.setattr(tg, "PendingRead", NotedRead)

    def forward(self, row: tg.Batch, plan: tuple[tg.Visit, ...]) -> Tensor:
        self.events.append("forward")
        return super().forward(row, plan)


def test_a_step_is_read_once_the_next_one_has_its_work(tiny_data, monkeypatch):
    run = Watched(monkeypatch, tiny_data, iterations=4, micro_batch_tokens=512).train()
    # The first step is waited for, the last is read at the end.
    first, second = ["forward", "step", "read 1"], ["forward", "step"]
    third, fourth = ["forward", "read 2", "step"], ["forward", "read 3", "step"]
    assert run.events == [*first, *second, *third, *fourth, "read 4"]


def test_numbers_are_read_before_a_validation_and_only_once(tiny_data, monkeypatch):
    run = Watched(monkeypatch, tiny_data, iterations=4, micro_batch_tokens=512, val_loss_every=2)
    scored = SimpleNamespace(result=lambda: {"val_loss": 0.0, "val_bpb": 0.0})
    run.evaluate = lambda plan: run.events.append("validate") or scored
    run.train()
    assert [
        e for e in run.events if e[0] in "rv"
    ] == "read 1,read 2,validate,read 3,read 4,validate".split(",")


def test_late_numbers_come_with_the_time_at_which_they_were_there():
    ranks = cpu_ranks()
    clock = iter((5.0, 9.0))
    ranks.now = lambda: next(clock)
    first = tg.PendingRead(torch.tensor([1.0, 2.0]), ranks)
    second = tg.PendingRead(torch.tensor([3.0]), ranks)
    assert (second.wait(), first.wait()) == (([3.0], 9.0), ([1.0, 2.0], 5.0))


class Uneven(Slow):
    """Steps of uneven length, one of which takes many times as long as the others."""

    def forward(self, row: tg.Batch, plan: tuple[tg.Visit, ...]) -> Tensor:
        number = len(self.plans)
        more = 2.0 if number == 3 else 0.2 * (number % 3)
        self.seconds += more * len(plan)
        return super().forward(row, plan)


def test_a_budget_holds_for_steps_of_uneven_length(tiny_data):
    run = Uneven(
        tiny_data, max_wallclock_seconds=200, iterations=999, enable_looping_at=0.5
    ).train()
    assert 200 - 3 * 15 < run.seconds <= 200


def test_the_share_of_the_budget_stays_below_one_after_a_slow_beginning():
    """Slow early steps raise the mean visit; by the longest recent one, a step may still fit."""
    state = tg.TrainState(
        newest_share=0.0,
        expected_steps=1000,
        step=500,
        elapsed_s=17.95,
        longest_visit_s=0.004,
        untimed_visits=4,
        timed_visits=1000,
    )
    pacer = tg.Pacer(state, cpu_ranks(), budget_s=18.0, iterations=1000)
    assert pacer.fits(4)
    assert pacer.frac() < 1
    assert tg.lr_scale_at(pacer.frac(), tiny_config(warmdown_frac=0, enable_looping_at=1)) == 1.0


# --- Speed ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("share", "steps"), [(0.0, 40), (0.5, 45), (1.0, 50)])
def test_the_log_predicts_the_steps_that_the_budget_allows(tiny_data, share, steps):
    """Of 200 s, a plain step of 4 visits takes 4, a looped one 5."""
    run = Slow(
        tiny_data, max_wallclock_seconds=200, iterations=999, enable_looping_at=share
    ).train()
    assert run.numbers(r"allows about (\d+) steps") == [steps]
    assert run.numbers(r"^speed: (\S+)ms per step") == [5000.0 if share == 0 else 4000.0]
    assert run.final["steps"] == pytest.approx(steps, abs=1)


def test_without_a_budget_the_iterations_are_predicted(tiny_data):
    run = Slow(tiny_data, iterations=25).train()
    assert run.numbers(r"allows about (\d+) steps") == [25]


@pytest.mark.parametrize(("gate", "refused"), [(0, False), (3999, True), (4000, False)])
def test_the_gate_stops_a_run_after_twenty_timed_steps(tiny_data, gate, refused):
    run = Slow(tiny_data, iterations=30, enable_looping_at=1, pod_speedgate_ms=gate)
    if refused:
        with pytest.raises(tg.RunStopped, match="^POD_SPEEDGATE_MS=3999: a step takes 4000.0 ms$"):
            run.train()
        # The clock of the 21st step comes with the numbers of the 22nd, before the 23rd is taken.
        assert len(run.after) == 22
        assert run.saved == []
    else:
        assert run.train().final["steps"] == 30


# --- Recompilations -------------------------------------------------------------------------------
class Lines(list[str]):
    """A log whose lines are kept."""

    def __call__(self, line: str) -> None:
        """Keeps a line."""
        self.append(line)

    def show(self, line: str) -> None:
        """A line that is only shown for a while."""


@pytest.mark.parametrize(
    ("with_3", "with_2", "chosen", "rows"), [(4.0, 1.0, 2, 4), (2.0, 1.0, 2, 6), (1.0, 0.9, 3, 6)]
)
def test_a_busy_core_costs_the_run_one_thread(monkeypatch, with_3, with_2, chosen, rows):
    # The clock is the sum of what the rows took.
    clock = [0.0]
    monkeypatch.setattr(tg.time, "monotonic", lambda: clock[0])

    counted = []

    def row(*_: Any) -> None:
        counted.append(1)
        clock[0] += {3: with_3, 2: with_2}[torch.get_num_threads()]

    monkeypatch.setattr(tg, "accumulate_gradients", row)
    lines = Lines()
    cfg = SimpleNamespace(micro_batch_tokens=1)
    run = SimpleNamespace(cfg=cfg, forward=None, log=lines)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        tg.Run.choose_threads(run, (), None)
        assert torch.get_num_threads() == chosen
        assert lines[0].startswith(f"threads: {chosen} (")
        # Rows that take four times as long show enough after the second.
        assert len(counted) == rows
    finally:
        torch.set_num_threads(threads)


def test_only_a_lone_process_without_a_number_of_threads_chooses_one():
    assert tg.Ranks({}).may_choose_threads != torch.cuda.is_available()
    assert not tg.Ranks({"OMP_NUM_THREADS": "2"}).may_choose_threads


@pytest.mark.parametrize(
    "in_bf16, in_fp32, chosen", [(1.0, 3.0, "bf16"), (1.0, 1.5, "fp32"), (9.0, 1.0, "fp32")]
)
def test_a_cpu_computes_in_bf16_only_where_it_multiplies_much_faster_in_it(
    monkeypatch, in_bf16, in_fp32, chosen
):
    clock = [0.0]
    monkeypatch.setattr(tg.time, "monotonic", lambda: clock[0])

    def product(a: torch.Tensor, b: torch.Tensor) -> None:
        clock[0] += in_bf16 if a.dtype == b.dtype == torch.bfloat16 else in_fp32

    monkeypatch.setattr(tg.torch, "mm", product)
    assert tg.faster_dtype(torch.device("cpu"))[0] == chosen
    assert tg.faster_dtype(torch.device("cuda"))[0] == "bf16"


def test_a_run_that_goes_on_keeps_the_dtype_that_it_has_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(tg, "faster_dtype", lambda device: ("fp32", "measured anew"))
    cfg = tiny_config(compute_dtype="auto")
    log = tmp_path / "a.txt"
    cpu = torch.device("cpu")
    assert tg.resolve_dtype(cfg, cpu, log)[0].compute_dtype == "fp32"
    log.write_text("Hyperparameters:\n  compute_dtype: bf16 (measured)\n")
    assert tg.resolve_dtype(cfg, cpu, log)[0].compute_dtype == "bf16"
    assert tg.resolve_dtype(cfg, cpu)[0].compute_dtype == "fp32"
    fixed = tiny_config(compute_dtype="fp32")
    assert tg.resolve_dtype(fixed, cpu, log) == (fixed, [])


@pytest.mark.parametrize("measured", ["bf16", "fp32"])
def test_a_measured_dtype_is_in_the_log_and_in_the_variables_of_an_evaluation(
    tiny_data, tmp_path, monkeypatch, measured
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tg, "faster_dtype", lambda device: (measured, f"compute_dtype: {measured}"))
    cfg = tiny_config(data_dir=str(tiny_data), compute_dtype="auto")
    run = tg.Run(cfg, dict.fromkeys(vars(cfg), "preset"), cpu_ranks())
    assert run.cfg.compute_dtype == measured
    assert run.made_with["compute_dtype"] == measured
    (log,) = Path("logs").glob("*.txt")
    text = log.read_text()
    assert f"  compute_dtype: {measured} (measured)" in text
    assert runlog.evaluation_variables(text)["COMPUTE_DTYPE"] == measured


def test_compression_keeps_at_most_half_of_the_budget_and_says_so():
    lines: list[str] = []
    cfg = SimpleNamespace(gptq_reserve_seconds=-1.0, wallclock=100.0, gptq_calibration_batches=16)
    ranks = SimpleNamespace(gather=lambda seconds: [seconds, 2 * seconds])
    start = SimpleNamespace(stage=tg.Stage.NOTHING)
    run = SimpleNamespace(cfg=cfg, ranks=ranks, log=lines.append, start=start)
    assert tg.Run.agree_on_reserve(run, 20.0) == 40.0
    assert len(lines) == 1
    assert tg.Run.agree_on_reserve(run, 40.0) == 50.0
    assert "warning: compression needs about 80 s" in lines[1]
    assert "MAX_WALLCLOCK_SECONDS=100" in lines[1]
    # A run that does not train has no budget to divide.
    start.stage = tg.Stage.TRAINED
    assert tg.Run.agree_on_reserve(run, 40.0) == 80.0
    assert len(lines) == 4 and "warning" not in lines[3]


class Reshaped(Session):
    """Compiled, and the rows of its third step allow longer segments."""

    def __init__(self, *args: Any, **overrides: Any):
        small = dict(num_layers=2, xsa_last_n=2, num_loops=0, parallel_start_layer=0)
        super().__init__(*args, micro_batch_tokens=512, iterations=5, **small, **overrides)
        self.compiled = warmed_up(self)

    def forward(self, row: tg.Batch, plan: tuple[tg.Visit, ...]) -> Tensor:
        return self.compiled(row._replace(max_seqlen=row.max_seqlen + (len(self.after) == 2)), plan)


def test_a_new_shape_after_warm_up_is_counted_and_logged_with_its_reason(tiny_data):
    run = Reshaped(tiny_data).train()
    assert run.final["recompilations"] == 1
    (line,) = [line for line in run.log if line.startswith("recompilation: ")]
    assert "forward" in line
    assert "max_seqlen" in line
    assert run.final["steps"] == 5


def test_a_new_shape_after_warm_up_is_refused_at_limit_0(tiny_data):
    run = Reshaped(tiny_data, recompile_limit=0)
    with pytest.raises(tg.RunStopped, match="^RECOMPILE_LIMIT=0: 1 compilations after warm-up$"):
        run.train()
    assert len(run.after) == 3
    torch.compiler.reset()


def test_an_error_of_another_rank_counts_and_scoring_looks_too(tiny_data):
    run = Session(tiny_data, recompile_limit=1)
    run.check_recompilations(1)
    run.ranks.gather = lambda count: [count, 2]
    with pytest.raises(tg.RunStopped, match="RECOMPILE_LIMIT=1: 2 "):
        run.run_evaluation("quantized", lambda: {"tokens": int(run.docs.counts.sum())})


@pytest.mark.skipif(tg.triton is None, reason="needs Triton")
def test_kernels_that_triton_compiles_are_counted():
    lines = []
    sentinel = tg.CompilationCounter(lines.append)
    hook = tg.triton.knobs.runtime.jit_post_compile_hook
    hook(
        key="k",
        repr="mlp_kernel[...]",
        fn=None,
        compile={},
        is_manual_warmup=False,
        already_compiled=False,
    )
    assert (sentinel.poll(), sentinel.poll(), lines) == (
        1,
        1,
        ["recompilation: kernel mlp_kernel[...]"],
    )


# --- Polar Express --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("coeffs", "low", "high", "floor"),
    [("quintic", 0.68, 1.203, 2e-3), ("polar", 0.858, 1.142, 1e-3)],
)
def test_singular_values_of_any_size_land_near_one(coeffs, low, high, floor):
    u, v = (torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0] for _ in "uv")
    # Small values lie denser.
    values = torch.logspace(0, 1, 60, dtype=torch.float64).sub(1).div(9).mul(0.7).add(floor)
    for value in values:
        # A matrix of norm 1 with two singular values.
        s = torch.zeros(16, dtype=torch.float64)
        s[0] = (1 - value**2).sqrt()
        s[1] = value
        out = torch.linalg.svdvals(tg.newton_schulz(((u * s) @ v.mT)[None], 5, coeffs)[0])[:2]
        assert low <= out.min(), (value, out)
        assert out.max() <= high, (value, out)
    tall = torch.randn(2, 40, 16)
    wide = tg.newton_schulz(tall.mT.contiguous(), 5, coeffs)
    assert torch.allclose(tg.newton_schulz(tall, 5, coeffs), wide.mT, atol=1e-5)
    assert not tg.newton_schulz(torch.zeros(1, 4, 8), 5, coeffs).any()


def test_polar_coefficients_reach_the_weights(tiny_data):
    found = {
        c: weights_of(Session(tiny_data, iterations=2, muon_coeffs=c).train().model)
        for c in ("quintic", "polar")
    }
    assert not torch.equal(found["quintic"]["up_bank"], found["polar"]["up_bank"])


# --- CUDA graph -----------------------------------------------------------------------------------
def test_gradients_that_stay_in_place_train_the_same_weights(tiny_data):
    """This is what a CUDA graph needs of the optimizer; a function stands in for its replay."""
    runs = []
    for fixed in (False, True):
        run = Session(tiny_data, iterations=4)
        if fixed:
            run.optimizers.keep_gradients = True
            for p in run.model.parameters():
                p.grad = torch.zeros_like(p)
            places = [p.grad.data_ptr() for p in run.model.parameters()]
            loss = torch.zeros(())

            def replay(
                row: tg.Batch, count: Tensor, run: Session = run, loss: Tensor = loss
            ) -> Tensor:
                return loss.copy_(tg.backward_row(run.forward, run.cfg.plans[0], row, count))

            run.graphs = {run.cfg.plans[0]: replay}
        runs.append(run.train())
    assert places == [p.grad.data_ptr() for p in runs[1].model.parameters()]
    assert runs[0].final["train_loss"] == runs[1].final["train_loss"]
    assert_same(weights_of(runs[1].model), weights_of(runs[0].model))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_losses_with_and_without_a_cuda_graph_are_equal(tiny_data, tmp_path: Path):
    # Otherwise a GPU sums the gradients of the embedding and of queries in any order.
    (tmp_path / "sitecustomize.py").write_text(
        "import torch; torch.use_deterministic_algorithms(True, warn_only=True)"
    )
    losses = []
    for graph in ("0", "1"):
        env = {
            **TINY,
            "DATA_DIR": str(tiny_data),
            "ARTIFACT_DIR": graph,
            "ITERATIONS": "30",
            "COMPILE": "1",
            "COMPUTE_DTYPE": "bf16",
            "CUDA_VISIBLE_DEVICES": "0",
            "CUDA_GRAPH": graph,
            "TRAIN_LOG_EVERY": "1",
            "TTT_ENABLED": "0",
            "PYTHONPATH": str(tmp_path),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        }
        result = run_script(env, tmp_path, timeout=600)
        assert result.returncode == 0, result.stderr
        assert "\ndevice: CPU" not in result.stdout
        losses.append(
            [
                line.split("train_loss:")[1].split()[0]
                for line in result.stdout.splitlines()
                if line.startswith("step:")
            ]
        )
    assert len(losses[0]) == 30
    assert losses[0] == losses[1]
