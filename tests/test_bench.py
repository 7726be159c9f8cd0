"""bench/: turns and ratios, counts, the adapter for a public script, and what the scripts print.

fake_reference.py stands in for the public script.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, tiny_config
from torch.autograd import DeviceType

sys.path.insert(0, str(ROOT / "bench"))

import artifact
import reference as adapter
import step as bench

import train_gpt as tg

CPU = torch.device("cpu")
SCRIPT = Path(__file__).with_name("fake_reference.py")
KEYS = [
    "device",
    "backend",
    "ratio_plain",
    "ratio_looped",
    "ratio_gptq",
    "noise_ratio",
    "grad_error_ratio",
    "mfu",
]


def last_line(output: str) -> dict:
    """The figures of a script's last line."""
    line = output.splitlines()[-1]
    assert line.startswith("bench "), output[-3000:]
    return json.loads(line.removeprefix("bench "))


def set_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the knobs of the tiny network."""
    for name, value in TINY.items():
        monkeypatch.setenv(name, value)


def load_script(**knobs: object) -> adapter.Reference:
    """The stand-in for the public script, with the tiny network's knobs."""
    return adapter.Reference(SCRIPT, tiny_config(**knobs), CPU, "sdpa")


def random_ours(cfg: tg.Config) -> bench.Ours:
    """Our system with random weights on a full row."""
    row = bench.full_row(cfg, cfg.row_shape, CPU)
    return bench.Ours(cfg, bench.random_weights(cfg), row, "sdpa")


# --- Turns, ratios, counts ------------------------------------------------------------------------
def test_turns_go_forth_and_back_and_drop_the_warm_up():
    order = []

    def job(name: str, num_parts: int) -> Iterator[None]:
        order.append(name)
        yield from [None] * num_parts

    jobs = {"a": partial(job, "a", 2), "b": partial(job, "b", 1)}
    seconds = bench.take_turns(jobs, rounds=2, warmups=1, device=CPU)
    assert "".join(order) == "abba" * 3
    assert seconds["a"].shape == (4, 2)
    assert seconds["b"].shape == (4, 1)
    assert (seconds["a"] > 0).all()


def test_ratio_is_of_pairs_and_so_blind_to_drift():
    theirs = np.array([[1.0, 1.0], [10.0, 10.0], [100.0, 100.0]])
    ours = theirs * [[0.5], [0.9], [0.5]]
    assert bench.paired_ratio(ours, theirs) == pytest.approx(0.5)


def test_overlapping_kernels_count_once():
    assert bench.busy([(5, 6), (0, 3), (1, 2), (2, 4)]) == 5
    assert bench.busy([(0, 1), (1, 2)]) == 2


def gpu_event(name: str, start: int, end: int, **fields: object) -> types.SimpleNamespace:
    """An event of the profiler on a GPU, in microseconds."""
    time_range = types.SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return types.SimpleNamespace(
        **{"name": name, "device_type": DeviceType.CUDA, "time_range": time_range, **fields}
    )


def test_profile_of_a_gpu_counts_kernels_alone():
    profile = bench.profile_of_kernels(
        [
            gpu_event("gemm", 0, 3000),
            gpu_event("gemm", 2000, 4000),
            gpu_event("copy", 8000, 10000),
            gpu_event("step", 0, 10000, is_user_annotation=True),
            gpu_event("on the host", 0, 90000, device_type=DeviceType.CPU),
        ]
    )
    assert profile.costs == {"gemm": bench.Cost(5.0, 2), "copy": bench.Cost(2.0, 1)}
    assert profile.summary == "3 kernels, GPU idle 40.0 % of 10.00 ms"


def test_jobs_are_told_by_name():
    jobs = {
        "aten::mm": "products",
        "nvjet_tst_128x256": "products",
        "x": "other",
        "aten::sum": "reductions",
        "triton_per_fused__to_copy__varlen_attn_backward_add_1": "written by the compiler",
        "qk_rope_kernel": "fused norm, RoPE, XSA",
        "xsa_backward_kernel": "fused norm, RoPE, XSA",
        "softcap_ce_kernel": "loss",
        "triton_red_fused_div_log_tanh_0": "loss",
        "golf::sdpa_varlen": "attention",
        "mlp_kernel": "fused MLP",
        "aten::copy_": "copies and casts",
        "aten::_log_softmax": "loss",
        "aten::mul": "elementwise",
    }
    assert {name: bench.job_of(name) for name in jobs} == jobs


def test_flops_by_hand():
    # C 32, H 2, Hkv 1, F 64, V 320, in two documents of 64 tokens.
    cfg = tiny_config(num_loops=0, num_layers=2, xsa_last_n=2, parallel_start_layer=0)
    ids = np.zeros(128, int)
    row = tg.pack_row(ids, ids, np.array([0, 64]), (128, 32, 64), CPU)
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 2 * 64 * 32
    head = 320 * 32
    attention = 14 * 32 * (2 * 64 * 65 // 2)
    products = 6 * 128 * (2 * layer + head)
    flops = bench.step_flops(cfg, row, looped=False)
    assert flops.performed == products + 2 * attention
    assert flops.by_parameters == products

    looping = tiny_config(micro_batch_tokens=128)
    plain = bench.step_flops(looping, row, looped=False)
    looped = bench.step_flops(looping, row, looped=True)
    one_more_visit = 6 * 128 * layer + attention
    assert looped.performed - plain.performed == one_more_visit
    assert looped.by_parameters == 6 * 128 * (4 * layer + head)


def test_row_is_full_and_its_documents_fit():
    cfg = tiny_config(train_seq_len=100)
    row = bench.full_row(cfg, (2000, 64, 100), CPU)
    assert (row.targets >= 0).all()
    assert int(row.cu_seqlens.diff().max()) <= 100
    assert torch.equal(row.inputs[1:], row.targets[:-1])
    with pytest.raises(tg.UsageError, match="CU_SEQLENS_CAPACITY=16"):
        bench.full_row(cfg, (2000, 16, 100), CPU)


def test_random_weights_leave_no_gradient_zero():
    cfg = tiny_config()
    grads = bench.gradients(random_ours(cfg)).grads
    assert set(grads) == set(tg.parameter_table(cfg))
    assert all(grad.norm() > 0 for grad in grads.values())


def test_saved_bytes_grow_with_the_depth_and_leave_parameters_out():
    ours = random_ours(tiny_config())
    plain = bench.saved_bytes(ours, looped=False)
    looped = bench.saved_bytes(ours, looped=True)
    assert 0 < plain < looped < 2 * plain


# --- The adapter ----------------------------------------------------------------------------------
def test_attention_stand_in_keeps_to_documents_and_to_rows():
    flash = adapter.flash_attention("sdpa")
    q = torch.randn(3, 8, 4, 16)
    k = torch.randn(3, 8, 2, 16)
    v = torch.randn(3, 8, 2, 16)
    heads = [x.repeat_interleave(4 // x.size(2), 2).transpose(1, 2) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(flash.flash_attn_func(q, k, v, causal=True), wanted)
    cu_seqlens = torch.tensor([0, 8, 16, 24, 24], dtype=torch.int32)
    packed = flash.flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=8,
        max_seqlen_k=8,
        causal=True,
        window_size=(-1, -1),
    )
    torch.testing.assert_close(packed.view_as(q), wanted)


def test_mlp_stand_in_has_the_kernels_value_and_gradient():
    a = torch.randn(5, 4)
    b = torch.randn(6, 4)
    dy = torch.randn(5, 6)
    pre = (a @ b.T).requires_grad_()
    post = torch.where(pre > 0, pre, 0.5 * pre) ** 2
    post.backward(dy)
    values = adapter.linear_leaky_relu_square(a, b)
    torch.testing.assert_close(values, (pre.detach(), post.detach()))
    gradient = adapter.linear_leaky_relu_square(dy, torch.eye(6), aux=pre.detach())
    torch.testing.assert_close(gradient, pre.grad)


def test_script_sees_our_knobs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "3")
    h = load_script(matrix_lr=0.125).h
    assert (h.lr, h.vocab_size, h.width, h.rank, h.gates) == (0.125, 320, 32, None, True)
    # The run id names a file in /tmp.
    assert load_script().h.run_id != h.run_id


def test_script_leaves_nothing_behind():
    before = {}
    for name, module in sys.modules.items():
        if name.startswith(("triton", "flash", "torch")):
            before[name] = module
    environ = dict(os.environ)
    script = load_script()
    assert {name: sys.modules.get(name) for name in before} == before
    assert "flash_attn_interface" not in sys.modules
    assert dict(os.environ) == environ
    assert script.module.compiled(1) == 1
    assert torch.compile is not adapter.uncompiled


def test_weights_go_there_and_gradients_come_back():
    script = load_script()
    weights = bench.random_weights(script.cfg)
    model = script.build(weights, looped=True)
    assert model.looping_active
    assert torch.equal(model.blocks[2].attn.q_gain, weights["q_gain"][2])
    back = script.stacked(model.state_dict(), weights)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())
    with pytest.raises(AssertionError, match="no_such"):
        script.build({"no_such": torch.zeros(1)}, looped=False)


def test_batch_is_the_loaders():
    ids = np.arange(128)
    row = tg.pack_row(ids, ids, np.arange(0, 128, 2), (128, 100, 64), CPU)
    batch = load_script().batch(row)
    assert batch["input_ids"].shape == (1, 128)
    assert batch["cu_seqlens"].tolist() == [*range(0, 128, 2)] + [128] * 64


def test_ttt_is_called_as_published():
    script = load_script()
    table = tg.ByteTable(
        base=np.array([0, 1, 2, 3]),
        space=np.array([False, False, True, True]),
        boundary=np.array([True, False, False, False]),
    )
    model = script.build(bench.random_weights(script.cfg), looped=True)
    counter = Path(f"/tmp/ttt_counter_{script.h.run_id}")
    counter.touch()
    tokens = np.array([0, 2, 3, 1])
    lines = []
    loss, num_bytes = script.evaluate_ttt(model, tokens, table, bos_id=0, log=lines.append)
    assert loss == 2.0
    assert num_bytes == table.count(tokens)
    assert lines == ["ttt 0"]
    assert not counter.exists()


def test_fp32_gradients_of_script_and_ours_agree_or_the_check_stops(
    monkeypatch: pytest.MonkeyPatch,
):
    script = load_script()
    cfg = script.cfg
    row = bench.full_row(cfg, cfg.row_shape, CPU)
    errors = bench.gradient_errors(cfg, script, row, "sdpa", seed=0)
    # The errors are those of bf16.
    for of_system in errors.values():
        assert of_system.keys() == {*tg.parameter_table(cfg), "loss"}
        assert of_system["loss"] < 1e-2
        assert 1e-4 < of_system["qo_bank"] < 0.1
    assert list(errors) == ["ours", "reference"]
    monkeypatch.setitem(adapter.PER_LAYER, "attn_scale", "mlp_scale")
    monkeypatch.setitem(adapter.PER_LAYER, "mlp_scale", "attn_scale")
    with pytest.raises(AssertionError, match="do not compute the same"):
        bench.gradient_errors(cfg, script, row, "sdpa", seed=0)


@pytest.mark.parametrize("text", ["import no_such_package", "def", "x = 1", None])
def test_what_is_no_such_script_is_refused_in_a_line(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "other.py"
    if text is not None:
        path.write_text(text)
    set_environment(monkeypatch)
    assert bench.main(["--reference", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench/step.py: {path}: ")
    assert error.count("\n") == 1


# --- Coders of the same integers ------------------------------------------------------------------
def test_a_ratio_to_a_coder_that_is_not_installed_is_null(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZPAQ", "0")
    monkeypatch.setattr(artifact.importlib.util, "find_spec", mock.Mock(return_value=None))
    codes = torch.arange(64, dtype=torch.int8).view(1, 8, 8)
    figures = artifact.compare_coders({"up_bank": codes})
    assert [name for name, value in figures.items() if value is None] == ["ans_over_brotli"]
    json.dumps(figures, allow_nan=False)


def test_the_knobs_of_the_miniature_are_accepted_and_make_a_smaller_network():
    cfg, _ = tg.Config.from_env(artifact.MINIATURE, False)
    assert cfg.num_layers < tg.CPU["num_layers"]


# --- Whole runs -----------------------------------------------------------------------------------
def base_environment() -> dict[str, str]:
    """What a process needs besides the knobs."""
    return {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}


def test_run_alone_ends_with_the_line():
    env = base_environment() | TINY | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "bench/step.py", "--rounds", "1", "--gptq-layers", "0"]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = last_line(done.stdout)
    assert list(figures) == KEYS
    assert figures["backend"] == "sdpa"
    assert figures["device"] == "CPU, 1 threads"
    missing = [key for key in KEYS if figures[key] is None]
    assert missing == ["ratio_plain", "ratio_looped", "ratio_gptq", "grad_error_ratio"]
    assert 0.1 < figures["noise_ratio"] < 10
    assert 0 < figures["mfu"] < 1


def test_run_beside_a_script_measures_every_ratio(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    set_environment(monkeypatch)
    compare_gptq = bench.compare_gptq

    def compare_tiny_gptq(
        reference: adapter.Reference, layers: int, device: torch.device
    ) -> float | None:
        cfg = tiny_config(num_layers=layers, xsa_last_n=layers, num_loops=0, parallel_start_layer=0)
        monkeypatch.setattr(tg, "Config", mock.Mock(return_value=cfg))
        return compare_gptq(reference, layers, device)

    monkeypatch.setattr(bench, "compare_gptq", compare_tiny_gptq)
    assert bench.main(["--reference", str(SCRIPT), "--rounds", "1", "--gptq-layers", "2"]) == 0
    output = capsys.readouterr().out
    figures = last_line(output)
    assert list(figures) == KEYS
    assert all(figures.values())
    for line in (
        "gradients of both agree",
        "step, looped, ms",
        "kept for backward",
        "operator calls",
        "GPTQ of 13",
    ):
        assert line in output, line


# --- Graphs for a GPU that is not there -----------------------------------------------------------
NO_STAND_IN = shutil.which("g++") is None or torch.backends.cuda.is_built() or tg.triton is None
lowering = pytest.mark.skipif(NO_STAND_IN, reason="needs g++, Triton and a CPU build of PyTorch")
COUNT = """
import json
import sys

sys.path.insert(0, "bench")
import graphs
import torch

tracer = graphs.Tracer(logits=0)
figures = {}


def count(name, function, *inputs):
    with tracer.mode, torch.no_grad():
        tracer.named(tracer.compiled(function), name)(*inputs)
    kernels = tracer.graphs[-1].kernels
    figures[name] = [[kernel.job, kernel.nbytes, kernel.flops] for kernel in kernels]


with tracer.mode:
    x = torch.empty(1000, 64, device="cuda")
    w = torch.empty(64, 32, device="cuda")
    wide = torch.empty(1000, 256, device="cuda")
    host = torch.empty(64)
count("sum of two", lambda x: x + 2 * x.cos(), x)
count("product", lambda x, w: x @ w, x, w)
count("product of a view", lambda wide, w: wide[:, 64:128] @ w, wide, w)
count("from the host", lambda x, host: x + host.to(x.device), x, host)
print(json.dumps(figures))
"""


def lower(command: list[str], **env: str) -> str:
    """The output of Python with this command line; these knobs are its environment."""
    # A pool of compiling processes takes longer to start than the compilers take.
    env |= base_environment() | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, *command]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


PATHS = """
import runpy
import sys

sys.path.insert(0, "bench")
script, *options = sys.argv[1:]
for option in options:
    sys.argv = [script, option, "README.md/x"]
    try:
        runpy.run_path(f"bench/{script}.py", run_name="__main__")
    except SystemExit as end:
        assert end.code == 2
"""


@lowering
@pytest.mark.parametrize(
    ("script", "options"),
    [("kernels", ["--out"]), ("graphs", ["--reference", "--out", "--sources"])],
)
def test_a_path_that_cannot_be_is_told_before_the_work(script: str, options: list[str]):
    command = [sys.executable, "-c", PATHS, script, *options]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == len(options)
    for line in lines:
        assert line.startswith(f"bench/{script}.py: ")
        assert "README.md/x" in line


@lowering
def test_kernels_lowered_for_hopper_are_counted_exactly():
    figures = json.loads(lower(["-c", COUNT]).splitlines()[-1])
    generated = "norms, RoPE, XSA, residuals"
    assert figures["sum of two"] == [[generated, 2 * 4 * 64000, 0]]
    nbytes = 4 * (64000 + 2048 + 32000)
    assert figures["product"] == [["products", nbytes, 2 * 1000 * 64 * 32]]
    assert figures["product of a view"] == figures["product"]
    assert [job for job, *_ in figures["from the host"]] == ["host", generated]


# Two layers, of which the first is looped and the second has two lanes. At width 32 Inductor would
# have a second graph of the learning below 163,840 tokens.
SMALL = {
    **TINY,
    "COMPUTE_DTYPE": "bf16",
    "MICRO_BATCH_TOKENS": "512",
    "NUM_LAYERS": "2",
    "XSA_LAST_N": "2",
    "LOOP_START": "0",
    "LOOP_END": "0",
    "PARALLEL_START_LAYER": "1",
}


@pytest.fixture(scope="module")
def lowered() -> dict[str, Any]:
    """The figures of a run and of a public script, with windows of three lengths in adaptation."""
    sizes = {"TTT_BUCKETS": "3", "TTT_EVAL_SEQ_LEN": "2048", "TTT_BATCH_SIZE": "512"}
    return last_line(lower(["bench/graphs.py", "--reference", str(SCRIPT)], **SMALL | sizes))


@lowering
def test_a_run_lowers_whole_for_hopper_without_a_copy_from_the_host(lowered):
    assert lowered["host"] == []
    operators = lowered["operators"]
    assert set(operators) == {
        "training",
        "training, looped",
        "scoring",
        "adaptation",
        "adapters, down",
        "adapters, up",
        "Muon, qo_bank",
        "Muon, kv_bank",
        "Muon, up_bank",
        "Muon, down_bank",
    }
    for graph, visits in (("training", 2), ("training, looped", 3)):
        assert operators[graph] == {
            "golf.qk_rope.default": visits,
            "golf.qk_rope_backward.default": visits,
            "golf.xsa.default": visits,
            "golf.xsa_backward.default": visits,
            "golf.mlp_up.default": visits,
            "golf.mlp_dpre.default": visits,
            "golf.softcap_ce.default": 1,
        }
    # In the last visit keys and queries go apart.
    assert operators["adaptation"]["golf.qk_rope.default"] == 4


@lowering
def test_a_run_moves_fewer_bytes_than_a_public_script_and_than_without_fused_operators(lowered):
    for plan in ("plain", "looped"):
        assert 0.1 < lowered[f"bytes_ratio_{plan}"] < 0.95
        assert 0.1 < lowered[f"modelled_ratio_{plan}"] < 1

    plain = {f"FUSED_{part}": "0" for part in ("QK", "XSA", "CE", "MLP")}
    plain |= {"NUM_LOOPS": "0", "TTT_ENABLED": "0"}
    without = last_line(lower(["bench/graphs.py"], **SMALL | plain))
    assert not any(without["operators"].values())
    for figure in ("kernels_plain", "gigabytes_plain"):
        assert without[figure] > 1.1 * lowered[figure], (without, lowered)


SIZES = """
import json
import os
import sys

sys.path.insert(0, "bench")
import graphs

cfg = graphs.prepare(dict(os.environ))
print(json.dumps(graphs.trace_sizes(cfg)))
"""


def assert_one_graph(counts: dict[str, dict[str, int]], purpose: str, sizes: list[str]) -> None:
    """A forward and a backward are compiled at the first size, and nothing at those after it."""
    assert list(counts) == [purpose]
    assert list(counts[purpose]) == sizes
    assert list(counts[purpose].values()) == [2] + [0] * (len(sizes) - 1)


@lowering
def test_one_graph_for_hopper_serves_all_sizes_of_adaptation(lowered):
    few = ["8 x 32", "8 x 256", "8 x 2048", "16 x 32", "16 x 256", "16 x 2048"]
    many = ["512 x 32", "512 x 256", "512 x 2048", "2048 x 32", "2048 x 256"]
    assert_one_graph(lowered["sizes"], "adaptation", few + many)


@lowering
def test_one_graph_for_hopper_serves_all_sizes_of_learning():
    knobs = {
        "TTT_MODE": "chunk",
        "TTT_CHUNK_TOKENS": "524288",
        "EVAL_SEQ_LEN": "4096",
        "TTT_BATCH_SEQS": "128",
        "VAL_BATCH_TOKENS": "32768",
    }
    plain = {"NUM_LOOPS": "0", "PARALLEL_START_LAYER": "0"}
    counts = json.loads(lower(["-c", SIZES], **SMALL | plain | knobs).splitlines()[-1])
    sizes = ["128 x 4096", "64 x 4096", "32 x 4096", "16 x 4096", "1 x 4096"]
    assert_one_graph(counts, "learning by all weights", sizes)


# --- bench/gpu.sh, with a Python and a GPU that only say they are there ---------------------------
STAND_INS = {
    "nvidia-smi": "echo a GPU",
    "python": """
case "$*" in
  *step.py*) echo "step $PRESET$DATASET"; exit 3 ;;
  *train_gpt.py*) echo "run $PRESET $DATASET $MAX_WALLCLOCK_SECONDS"; exec sleep 20 ;;
  -) cat > /dev/null ;;
  *) echo "$*" ;;
esac""",
}


@pytest.fixture
def gpu_folder(tmp_path: Path) -> Path:
    """A folder with bench/gpu.sh and the stand-ins."""
    for folder in ("bench", "bin", "out", "shared/corpus"):
        (tmp_path / folder).mkdir(parents=True)
    for name, text in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.write_text("#!/bin/bash\n" + text)
        program.chmod(0o755)
    shutil.copy(ROOT / "bench" / "gpu.sh", tmp_path / "bench")
    return tmp_path


def run_gpu_parts(folder: Path, *parts: str) -> subprocess.CompletedProcess:
    """Runs parts of bench/gpu.sh; the part `run` is given a second."""
    env = {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "OUT": str(folder / "out"),
        "RUN_SECONDS": "1",
    }
    command = ["bash", "bench/gpu.sh", "python", *parts]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False
    )


def texts_by_part(folder: Path) -> dict[str, str]:
    """The files in a folder of results, by name of the part."""
    return {path.name.split("_")[0]: path.read_text() for path in folder.iterdir()}


def test_a_part_on_a_gpu_that_fails_or_is_too_slow_leaves_its_output_and_stops_no_other(
    gpu_folder: Path,
):
    done = run_gpu_parts(gpu_folder, "step", "run", "kernels")
    assert done.returncode == 1
    assert done.stderr == "bench/gpu.sh: failed or cut: step run\n"
    copies = texts_by_part(gpu_folder / "out")
    assert copies["step"].startswith("step record\nstep: exit status 3 ")
    cut = "run: exit status 124 (124: cut after 1 s); try: RUN_SECONDS=2 gives it more time\n"
    assert copies["run"] == f"run record corpus_sp8192 60\n{cut}"
    assert copies["kernels"] == "-u bench/kernels.py --first\n"
    results = texts_by_part(gpu_folder / "bench" / "results")
    assert results.keys() == copies.keys()
    for name, text in results.items():
        assert "a GPU" in text
        assert copies[name] in text


def test_an_unknown_part_on_a_gpu_is_refused(gpu_folder: Path):
    done = run_gpu_parts(gpu_folder, "tset")
    assert done.returncode == 2
    assert "tset: must be one of tests flatten" in done.stderr
