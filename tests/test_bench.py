"""bench/: turns and ratios, counts, the adapter for a public script, and the line a run of bench/step.py ends with.

SCRIPT is a made-up script of the public family: its names, its CUDA habits, a network written anew."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, tiny_config

sys.path.insert(0, str(ROOT / "bench"))

import reference as adapter
import step as bench

import train_gpt as tg

CPU = torch.device("cpu")
KEYS = "device backend ratio_plain ratio_looped ratio_gptq noise_ratio grad_error_ratio mfu".split()
SCRIPT = """
import os, torch, torch.nn.functional as F, triton, triton.language as tl
from torch import nn
from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
from triton.tools.tensor_descriptor import TensorDescriptor

@triton.jit
def kernel(a, b, BLOCK: tl.constexpr):
    pass

def linear_leaky_relu_square(a, b, aux=None):
    raise RuntimeError("needs CUDA")

class Hyperparameters:
    L, C, V = (int(os.environ[n]) for n in ("NUM_LAYERS", "EMBEDDING_DIM", "VOCAB_SIZE"))
    H, Hkv = int(os.environ["NUM_HEADS"]), int(os.environ["NUM_KV_HEADS"])
    F, rope, lanes = int(float(os.environ["MLP_MULT"]) * C), int(os.environ["ROPE_DIMS"]), 3
    loop = int(os.environ["LOOP_START"]), int(os.environ["LOOP_END"]) + 1
    gates = bool(int(os.environ["SKIP_GATES_ENABLED"]))
    run_id, rank = os.environ["RUN_ID"], os.environ.get("RANK")
    lr = float(os.environ["MATRIX_LR"])

class MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up, down):
        pre, post = linear_leaky_relu_square(x, up)
        ctx.save_for_backward(x, up, down, pre, post)
        return post @ down.T
    @staticmethod
    def backward(ctx, dy):
        x, up, down, pre, post = ctx.saved_tensors
        dpre = linear_leaky_relu_square(dy, down.T.contiguous(), aux=pre)
        return dpre @ up, dpre.T @ x, dy.T @ post

def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=torch.finfo(torch.float32).eps)

class Attention(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.q_gain = nn.Parameter(torch.ones(h.H))

class Block(nn.Module):
    def __init__(self, h, i):
        super().__init__()
        self.h, self.i, self.attn = h, i, Attention(h)
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.ones(h.C)), nn.Parameter(torch.ones(h.C))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(h.C), torch.zeros(h.C)]))
    def attend(self, x, gpt, cu, longest):
        h, i = self.h, self.i
        heads = lambda w: (x @ w.to(x.dtype).T).unflatten(-1, (-1, h.C // h.H))
        q, k, v = (heads(w) for w in (gpt.qo_bank[i], gpt.kv_bank[i], gpt.kv_bank[h.L + i]))
        n, half = torch.arange(len(x), device=x.device)[:, None, None], h.rope // 2
        angle = n * 10000.0 ** (-torch.arange(half, device=x.device) / half)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        def turn(t):
            a, b, rest = t.split([half, half, t.size(-1) - h.rope], -1)
            return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], -1)
        q, k = turn(norm(q)) * self.attn.q_gain.to(x.dtype)[:, None], turn(norm(k))
        y = flash_attn_varlen_func(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest,
                                   max_seqlen_k=longest, causal=True, window_size=(-1, -1))
        own = F.normalize(v, dim=-1).repeat_interleave(h.H // h.Hkv, 1)
        y = y - (y * own).sum(-1, keepdim=True) * own
        return self.attn_scale.to(x.dtype) * (y.flatten(1) @ gpt.qo_bank[h.L + i].to(x.dtype).T)
    def feed(self, x, gpt):
        up, down = (w[self.i].to(x.dtype) for w in (gpt.mlp_up_bank, gpt.mlp_down_bank))
        return self.mlp_scale.to(x.dtype) * MLP.apply(x, up, down)

class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.h, self.looping_active = h, False
        shapes = dict(qo_bank=(2 * h.L, h.C, h.C), kv_bank=(2 * h.L, h.C // h.H * h.Hkv, h.C),
                      mlp_up_bank=(h.L, h.F, h.C), mlp_down_bank=(h.L, h.C, h.F), skip_weights=(2, h.C),
                      skip_gates=(2, h.C), parallel_post_lambdas=(h.L, 2, 2), parallel_resid_lambdas=(h.L, 2))
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))
        self.tok_emb, self.blocks = nn.Embedding(h.V, h.C), nn.ModuleList(Block(h, i) for i in range(h.L))
    def forward(self, input_ids, target_ids, cu_seqlens=None, max_seqlen=0):
        a, b = self.h.loop
        order = [*range(b), *range(a, b), *range(b, self.h.L)] if self.looping_active else [*range(self.h.L)]
        x = x0 = norm(self.tok_emb(input_ids[0]))
        lane, skips, half = None, [], len(order) // 2
        for place, i in enumerate(order):
            block, scale, take = self.blocks[i], (i + 1) ** -0.5, place - half
            lane = x if i >= self.h.lanes and lane is None else lane
            if place >= half and skips:
                gate = self.skip_gates[take].to(x.dtype).sigmoid()
                x = torch.lerp(self.skip_weights[take].to(x.dtype) * skips.pop(), x, gate)
            mix = block.resid_mix.to(x.dtype)
            u = mix[0] * x + mix[1] * x0
            attn = block.attend(norm(u) * scale, self, cu_seqlens, max_seqlen)
            if lane is None:
                x = u + attn
                x = x + block.feed(norm(x) * scale, self)
            else:
                mlp = block.feed(norm(lane) * scale, self)
                r, p = self.parallel_resid_lambdas[i].to(x.dtype), self.parallel_post_lambdas[i].to(x.dtype)
                x, lane = r[0] * x + p[0, 0] * attn + p[1, 0] * mlp, r[1] * lane + p[0, 1] * attn + p[1, 1] * mlp
            if place < half:
                skips.append(x)
        z = norm((x + lane) / 2) @ self.tok_emb.weight.T
        return F.cross_entropy(30.0 * torch.tanh(z.float() / 30.0), target_ids[0])
    def forward_ttt(self, input_ids, target_ids, lora):
        q = torch.zeros(*input_ids.shape, 2, 8)
        assert flash_attn_func(q, q[:, :, :1], q[:, :, :1], causal=True).shape == q.shape
        return lora * torch.ones(input_ids.shape)

def restore_fp32_params(model):
    for name, p in model.named_parameters():
        p.data = p.data if name.startswith("tok_emb") else p.data.float()

class Optimizers:
    def __init__(self, h, model):
        self.sgd = torch.optim.SGD([{"params": list(model.parameters()), "lr": h.lr, "base_lr": h.lr}])
    def __iter__(self):
        return iter([self.sgd])
    def step(self, distributed):
        self.sgd.step()
        self.sgd.zero_grad()

def gptq_quantize_weight(w, H, clip_sigmas, clip_range):
    s = (clip_sigmas * w.std(1) / clip_range).half()
    return (w / s.float()[:, None]).round().clamp(-clip_range, clip_range).to(torch.int8), s

@torch.compile
def compiled(x):
    return x

BatchedTTTLoRA, BOS_ID = None, None
def eval_val_ttt_lora(h, model, device, data, forward_ttt_train):
    torch.cuda.synchronize()
    log(f"ttt {BOS_ID}")
    tokens = data.val_tokens.long()
    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        loss = forward_ttt_train(tokens[None, :-1], tokens[None, 1:], lora=torch.tensor(2.0))
    assert data.val_tokens.dtype == torch.int32 and (tokens == BOS_ID).sum() == 1
    space = data.has_leading_space_lut[tokens[1:]] & ~data.is_boundary_token_lut[tokens[:-1]]
    return loss.mean().item(), int(data.base_bytes_lut[tokens[1:]].sum() + space.sum())
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "script.py"
    path.write_text(SCRIPT)
    return path


def last_line(output: str) -> dict:
    assert output.splitlines()[-1].startswith("bench "), output[-3000:]
    return json.loads(output.splitlines()[-1].removeprefix("bench "))


# --- Turns, ratios, counts ---
def test_turns_go_forth_and_back_and_drop_the_warm_up():
    order = []

    def job(name: str, parts: int):
        order.append(name)
        yield from range(parts)

    seconds = bench.take_turns(
        {"a": lambda: job("a", 2), "b": lambda: job("b", 1)}, rounds=2, warmups=1, device=CPU
    )
    assert "".join(order) == "abba" * 3
    assert (
        seconds["a"].shape == (4, 2) and seconds["b"].shape == (4, 1) and (seconds["a"] > 0).all()
    )


def test_ratio_is_of_pairs_and_so_blind_to_drift():
    theirs = np.array([[1.0, 1.0], [10.0, 10.0], [100.0, 100.0]])
    assert bench.paired_ratio(theirs * [[0.5], [0.9], [0.5]], theirs) == pytest.approx(0.5)


def test_overlapping_kernels_count_once():
    assert bench.busy([(5, 6), (0, 3), (1, 2), (2, 4)]) == 5 and bench.busy([(0, 1), (1, 2)]) == 2


def test_jobs_are_told_by_name():
    names = {
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
    assert {name: bench.job_of(name) for name in names} == names


def test_flops_by_hand():
    cfg = tiny_config(
        num_loops=0, num_layers=2, xsa_last_n=2, parallel_start_layer=0
    )  # C 32, H 2, Hkv 1, F 64, V 320
    row = tg.pack_row(np.zeros(128, int), np.zeros(128, int), np.array([0, 64]), (128, 32, 64), CPU)
    layer, head, pairs = 2 * 32 * 32 + 2 * 16 * 32 + 2 * 64 * 32, 320 * 32, 2 * 64 * 65 // 2
    products = 6 * 128 * (2 * layer + head)
    assert bench.step_flops(cfg, row, False) == (products + 2 * 14 * 32 * pairs, products)
    looped = tiny_config(micro_batch_tokens=128)
    more, parameters = bench.step_flops(looped, row, True)
    assert (
        more - bench.step_flops(looped, row, False)[0] == 6 * 128 * layer + 14 * 32 * pairs
    )  # one visit more
    assert parameters == 6 * 128 * (4 * layer + head)


def test_row_is_full_and_its_documents_fit():
    cfg = tiny_config(train_seq_len=100)
    row = bench.full_row(cfg, (2000, 64, 100), CPU)
    assert (row.targets >= 0).all() and int(row.cu_seqlens.diff().max()) <= 100
    assert torch.equal(row.inputs[1:], row.targets[:-1])
    with pytest.raises(tg.UsageError, match="CU_SEQLENS_CAPACITY=16"):
        bench.full_row(cfg, (2000, 16, 100), CPU)


def test_random_weights_leave_no_gradient_zero():
    cfg = tiny_config()
    row = bench.full_row(cfg, cfg.row_shape, CPU)
    _, grads = bench.gradients(bench.Ours(cfg, bench.random_weights(cfg), row, "sdpa"))
    assert set(grads) == set(tg.parameter_table(cfg))
    assert all(g.norm() > 0 for g in grads.values())


def test_saved_bytes_grow_with_the_depth_and_leave_parameters_out():
    cfg = tiny_config()
    row = bench.full_row(cfg, cfg.row_shape, CPU)
    ours = bench.Ours(cfg, bench.random_weights(cfg), row, "sdpa")
    plain, looped = bench.saved_bytes(ours, False), bench.saved_bytes(ours, True)
    assert 0 < plain < looped < 2 * plain


# --- The adapter ---
def test_attention_stand_in_keeps_to_documents_and_to_rows():
    flash = adapter.flash_attention("sdpa")
    q, k, v = (torch.randn(3, 8, n, 16) for n in (4, 2, 2))
    heads = [x.repeat_interleave(4 // x.size(2), 2).transpose(1, 2) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(flash.flash_attn_func(q, k, v, causal=True), wanted)
    cu = torch.tensor([0, 8, 16, 24, 24], dtype=torch.int32)
    options = dict(
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
        max_seqlen_q=8,
        max_seqlen_k=8,
        causal=True,
        window_size=(-1, -1),
    )
    packed = flash.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), **options)
    torch.testing.assert_close(packed.view_as(q), wanted)


def test_mlp_stand_in_has_the_kernels_value_and_gradient():
    a, b, dy = torch.randn(5, 4), torch.randn(6, 4), torch.randn(5, 6)
    pre = (a @ b.T).requires_grad_()
    post = torch.where(pre > 0, pre, 0.5 * pre) ** 2
    post.backward(dy)
    torch.testing.assert_close(
        adapter.linear_leaky_relu_square(a, b), (pre.detach(), post.detach())
    )
    torch.testing.assert_close(
        adapter.linear_leaky_relu_square(dy, torch.eye(6), aux=pre.detach()), pre.grad
    )


def test_script_sees_our_knobs_and_leaves_nothing_behind(
    script: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "3")
    before = {
        name: module
        for name, module in sys.modules.items()
        if name.startswith(("triton", "flash", "torch"))
    }
    environ = dict(os.environ)
    ref = adapter.Reference(script, tiny_config(matrix_lr=0.125), CPU, "sdpa")
    assert (ref.h.lr, ref.h.V, ref.h.C, ref.h.rank, ref.h.gates) == (0.125, 320, 32, None, True)
    assert (
        ref.h.run_id != adapter.Reference(script, tiny_config(), CPU, "sdpa").h.run_id
    )  # it names a file in /tmp
    assert {
        n: sys.modules.get(n) for n in before
    } == before and "flash_attn_interface" not in sys.modules
    assert (
        dict(os.environ) == environ
        and ref.module.compiled(1) == 1
        and torch.compile is not adapter.uncompiled
    )


def test_weights_go_there_and_gradients_come_back(script: Path):
    cfg = tiny_config()
    ref, weights = adapter.Reference(script, cfg, CPU, "sdpa"), bench.random_weights(cfg)
    model = ref.build(weights, looped=True)
    assert model.looping_active and torch.equal(model.blocks[2].attn.q_gain, weights["q_gain"][2])
    back = ref.stacked(model.state_dict(), weights)
    assert back.keys() == weights.keys() and all(
        torch.equal(back[n], w) for n, w in weights.items()
    )
    with pytest.raises(AssertionError, match="no_such"):
        ref.build({"no_such": torch.zeros(1)}, looped=False)


def test_batch_is_the_loaders(script: Path):
    ref = adapter.Reference(script, tiny_config(), CPU, "sdpa")
    row = tg.pack_row(np.arange(128), np.arange(128), np.arange(0, 128, 2), (128, 100, 64), CPU)
    batch = ref.batch(row)
    assert (
        batch["input_ids"].shape == (1, 128)
        and batch["cu_seqlens"].tolist() == [*range(0, 128, 2)] + [128] * 64
    )


def test_ttt_is_called_as_published(script: Path):
    ref, lines = adapter.Reference(script, tiny_config(), CPU, "sdpa"), []
    table = tg.ByteTable(
        np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1], bool), np.array([1, 0, 0, 0], bool)
    )
    model = ref.build(bench.random_weights(tiny_config()), looped=True)
    counter = Path(f"/tmp/ttt_counter_{ref.h.run_id}")
    counter.touch()
    loss, num_bytes = ref.evaluate_ttt(
        model, np.array([0, 2, 3, 1]), table, bos_id=0, log=lines.append
    )
    assert loss == 2.0 and num_bytes == table.count(np.array([0, 2, 3, 1])) and lines == ["ttt 0"]
    assert not counter.exists()


def test_fp32_gradients_of_script_and_ours_agree_or_the_gate_stops(
    script: Path, monkeypatch: pytest.MonkeyPatch
):
    cfg = tiny_config()
    row, ref = bench.full_row(cfg, cfg.row_shape, CPU), adapter.Reference(script, cfg, CPU, "sdpa")
    errors = bench.gradient_errors(cfg, ref, row, "sdpa", seed=0)
    assert all(e["loss"] < 1e-2 and 1e-4 < e["qo_bank"] < 0.1 for e in errors.values())  # of bf16
    assert errors["ours"].keys() == errors["reference"].keys() == {*tg.parameter_table(cfg), "loss"}
    monkeypatch.setitem(adapter.PER_LAYER, "attn_scale", "mlp_scale")
    monkeypatch.setitem(adapter.PER_LAYER, "mlp_scale", "attn_scale")
    with pytest.raises(AssertionError, match="do not compute the same"):
        bench.gradient_errors(cfg, ref, row, "sdpa", seed=0)


@pytest.mark.parametrize("text", ["import no_such_package", "def", "x = 1", None])
def test_what_is_no_such_script_is_refused_in_a_line(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "other.py"
    if text is not None:
        path.write_text(text)
    for name, value in TINY.items():
        monkeypatch.setenv(name, value)
    assert bench.main(["--reference", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench/step.py: {path}: ") and error.count("\n") == 1


# --- Whole runs ---
def test_run_alone_ends_with_the_line():
    env = {k: os.environ[k] for k in ("PATH", "HOME") if k in os.environ}
    env |= {**TINY, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "bench/step.py", "--rounds", "1", "--gptq-layers", "0"]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = last_line(done.stdout)
    assert (
        list(found) == KEYS and found["backend"] == "sdpa" and found["device"] == "CPU, 1 threads"
    )
    assert [k for k in KEYS if found[k] is None] == [
        "ratio_plain",
        "ratio_looped",
        "ratio_gptq",
        "grad_error_ratio",
    ]
    assert 0.1 < found["noise_ratio"] < 10 and 0 < found["mfu"] < 1


def test_run_beside_a_script_measures_every_ratio(
    script: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    for name, value in TINY.items():
        monkeypatch.setenv(name, value)

    def small(reference: adapter.Reference, layers: int, device: torch.device) -> float:
        cfg = tiny_config(num_layers=layers, xsa_last_n=layers, num_loops=0, parallel_start_layer=0)
        monkeypatch.setattr(tg, "Config", lambda **_: cfg)
        return gptq(reference, layers, device)

    gptq = bench.gptq
    monkeypatch.setattr(bench, "gptq", small)
    assert bench.main(["--reference", str(script), "--rounds", "1", "--gptq-layers", "2"]) == 0
    output = capsys.readouterr().out
    found = last_line(output)
    assert list(found) == KEYS and all(found[k] for k in KEYS)
    for line in (
        "gradients of both agree",
        "step, looped, ms",
        "kept for backward",
        "operator calls",
        "GPTQ of 13",
    ):
        assert line in output, line


# --- Graphs for a GPU that is not there ---
NO_STAND_IN = shutil.which("g++") is None or torch.backends.cuda.is_built() or tg.triton is None
lowering = pytest.mark.skipif(NO_STAND_IN, reason="needs g++, Triton and a CPU build of PyTorch")
COUNT = """
import sys
sys.path.insert(0, "bench")
import graphs, json, torch
tracer, found = graphs.Tracer(logits=0), {}
def count(name, function, *inputs):
    with tracer.mode, torch.no_grad():
        tracer.named(tracer.compiled(function), name)(*inputs)
    found[name] = [[k.job, k.nbytes, k.flops] for k in tracer.graphs[-1].kernels]
with tracer.mode:
    x, w, v = (torch.empty(*shape, device="cuda") for shape in ((1000, 64), (64, 32), (1000, 256)))
count("sum of two", lambda x: x + 2 * x.cos(), x)
count("product", lambda x, w: x @ w, x, w)
count("product of a view", lambda v, w: v[:, 64:128] @ w, v, w)
with tracer.mode:
    host = torch.empty(64)
count("from the host", lambda x, h: x + h.to(x.device), x, host)
print(json.dumps(found))
"""


def lower(command: list[str], **env: str) -> str:
    env |= {
        "OMP_NUM_THREADS": "1",
        **{k: os.environ[k] for k in ("PATH", "HOME") if k in os.environ},
    }
    command = [sys.executable, *command]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@lowering
@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("kernels", "--out"),
        ("graphs", "--reference"),
        ("graphs", "--out"),
        ("graphs", "--sources"),
    ],
)
def test_a_path_that_cannot_be_is_told_before_the_work(script: str, option: str):
    command = [sys.executable, f"bench/{script}.py", option, "README.md/x"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr[
        -3000:
    ]
    assert done.stderr.startswith(f"bench/{script}.py: ") and "README.md/x" in done.stderr


@lowering
def test_kernels_lowered_for_hopper_are_counted_exactly():
    found = json.loads(lower(["-c", COUNT]).splitlines()[-1])
    generated, products = "norms, RoPE, XSA, residuals", "products"
    assert found["sum of two"] == [[generated, 2 * 4 * 64000, 0]]
    assert found["product"] == [[products, 4 * (64000 + 2048 + 32000), 2 * 1000 * 64 * 32]]
    assert found["product of a view"] == found["product"]
    assert [job for job, *_ in found["from the host"]] == ["host", generated]


@lowering
def test_a_run_lowers_whole_for_hopper_without_a_copy_from_the_host(script: Path):
    small = {**TINY, "COMPUTE_DTYPE": "bf16", "MICRO_BATCH_TOKENS": "512"}
    found = last_line(lower(["bench/graphs.py", "--reference", str(script)], **small))
    assert found["host"] == []
    banks = {f"Muon, {name}" for name in ("qo_bank", "kv_bank", "up_bank", "down_bank")}
    assert set(found["operators"]) == {
        "training",
        "training, looped",
        "scoring",
        "adaptation",
        "adapters, down",
        "adapters, up",
        *banks,
    }
    for graph, visits in (("training", 4), ("training, looped", 5)):
        wanted = dict.fromkeys(
            ("qk_rope", "qk_rope_backward", "xsa", "xsa_backward", "mlp_up", "mlp_dpre"), visits
        )
        assert found["operators"][graph] == {
            f"golf.{k}.default": n for k, n in {**wanted, "softcap_ce": 1}.items()
        }
    assert (
        found["operators"]["adaptation"]["golf.qk_rope.default"] == 6
    )  # keys and queries apart in the last visit
    for plan in ("plain", "looped"):
        assert (
            0.1 < found[f"bytes_ratio_{plan}"] < 0.95 and 0.1 < found[f"modelled_ratio_{plan}"] < 1
        )
    plain = {f"FUSED_{part}": "0" for part in ("QK", "XSA", "CE", "MLP")}
    without = last_line(
        lower(["bench/graphs.py"], **small | plain | {"NUM_LOOPS": "0", "TTT_ENABLED": "0"})
    )
    assert not any(without["operators"].values())
    for count in ("kernels", "gigabytes"):
        assert without[f"{count}_plain"] > 1.1 * found[f"{count}_plain"], (without, found)


SIZES = """
import sys
sys.path.insert(0, "bench")
import graphs, json
print(json.dumps(graphs.trace_sizes(graphs.prepare(json.loads(sys.argv[1])))))
"""


@lowering
@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        (
            {
                "TTT_MODE": "chunk",
                "TTT_CHUNK_TOKENS": "524288",
                "EVAL_SEQ_LEN": "4096",
                "TTT_BATCH_SEQS": "128",
                "VAL_BATCH_TOKENS": "32768",
            },
            {
                "learning by all weights": [
                    "128 x 4096",
                    "64 x 4096",
                    "32 x 4096",
                    "16 x 4096",
                    "1 x 4096",
                ]
            },
        ),
        (
            {"TTT_BUCKETS": "3", "TTT_EVAL_SEQ_LEN": "2048", "TTT_BATCH_SIZE": "512"},
            {
                "adaptation": [
                    "8 x 32",
                    "8 x 256",
                    "8 x 2048",
                    "16 x 32",
                    "16 x 256",
                    "16 x 2048",
                    "512 x 32",
                    "512 x 256",
                    "512 x 2048",
                    "2048 x 32",
                    "2048 x 256",
                ]
            },
        ),
    ],
)
def test_one_graph_for_hopper_serves_all_sizes_of_adaptation(
    env: dict[str, str], wanted: dict[str, list[str]]
):
    """At width 32 Inductor would have a second one below 163,840 tokens."""
    two = {"NUM_LAYERS": "2", "XSA_LAST_N": "2", "NUM_LOOPS": "0", "PARALLEL_START_LAYER": "0"}
    small = {**TINY, "COMPUTE_DTYPE": "bf16", **two, **env}
    found = json.loads(lower(["-c", SIZES, json.dumps(small)]).splitlines()[-1])
    assert {graph: list(sizes) for graph, sizes in found.items()} == wanted
    for sizes in found.values():
        assert list(sizes.values()) == [2, *[0] * (len(sizes) - 1)], found


# --- bench/gpu.sh, with a Python and a GPU that only say they are there ---
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


def test_a_part_on_a_gpu_that_fails_or_is_too_slow_leaves_its_output_and_stops_no_other(
    tmp_path: Path,
):
    for folder in ("bench", "bin", "out", "shared/corpus"):
        (tmp_path / folder).mkdir(parents=True)
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text("#!/bin/bash\n" + text)
        (tmp_path / "bin" / name).chmod(0o755)
    shutil.copy(ROOT / "bench" / "gpu.sh", tmp_path / "bench")
    env = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "OUT": str(tmp_path / "out"),
        "RUN_SECONDS": "1",
    }
    command = ["bash", "bench/gpu.sh", "python", "step", "run", "kernels"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and done.stderr == "bench/gpu.sh: failed or cut: step run\n"
    found = {path.name.split("_")[0]: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert found["step"].startswith("step record\nstep: exit status 3 ")
    assert (
        found["run"] == "run record corpus_sp8192 60\nrun: exit status 124 (124: cut after 1 s)\n"
    )
    assert found["kernels"] == "-u bench/kernels.py --first\n"
    kept = {
        path.name.split("_")[0]: path.read_text()
        for path in (tmp_path / "bench" / "results").iterdir()
    }
    assert set(kept) == set(found) and all(
        "a GPU" in kept[name] and found[name] in kept[name] for name in kept
    )
    command[3:] = ["tset"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and "tset: must be one of tests step" in done.stderr
