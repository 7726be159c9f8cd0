"""Fused norm, RoPE and gain; XSA; head and cross-entropy: operators, autograd, knobs, kernels.

No test needs a GPU. Run as a script, this file is its own child process: Triton's interpreter needs
TRITON_INTERPRET=1 from the first import of triton. The last line it prints is a JSON list.
"""

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
import torch.nn.functional as F
from torch import Tensor

import train_gpt as tg

KNOBS = ("fused_mlp", "fused_qk", "fused_xsa", "fused_ce")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# (T, H, Hkv, D, half of the rotated columns)
HEADS = [
    (1, 2, 1, 8, 2),
    (19, 3, 1, 64, 8),
    (37, 4, 4, 24, 12),
    (5, 6, 2, 40, 3),
    (16, 8, 4, 64, 8),
    (33, 5, 5, 6, 1),
]
# Rows of queries alone, or of keys and values alone.
SPLIT = [
    (19, 3, 0, 64, 8),
    (37, 0, 4, 24, 12),
    (5, 2, 0, 6, 1),
    (1, 0, 1, 40, 3),
]
# (N, C, V, cap)
LOGITS = [
    (1, 2, 33, 30.0),
    (17, 5, 129, 30.0),
    (24, 16, 1000, 5.0),
    (9, 8, 1024, 75.0),
    (12, 12, 2049, 15.0),
]


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float(
        (out.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)
    )


def exact_qk(
    qkv: Tensor, gain: Tensor, rope: Tensor, dim: int, uses: int = 1
) -> tuple[Tensor, ...]:
    """Norm, rotation and gain in other words: pairs are complex numbers, and heads come one by one.

    The values are returned as often as they are used.
    """
    heads = qkv.unflatten(1, (-1, dim))
    H = len(gain)
    kv = (heads.size(1) - H) // 2
    half = rope.size(-1)
    turn = torch.complex(rope[:, 0, 0], -rope[:, 1, 0])
    out = []
    for h in range(H + kv):
        rms = (heads[:, h].square().mean(1, keepdim=True) + 2.0**-23).sqrt()
        x = heads[:, h] / rms
        z = torch.complex(x[:, :half], x[:, half : 2 * half]) * turn
        x = torch.cat([z.real, z.imag, x[:, 2 * half :]], 1)
        out.append(x * gain[h] if h < H else x)
    none = heads[:, :0] * gain.sum()
    q = torch.stack(out[:H], 1) if H else none
    k = torch.stack(out[H:], 1) if kv else none
    return q, k, *[heads[:, H + kv :]] * uses


def exact_xsa(y: Tensor, v: Tensor) -> Tensor:
    unit = (v / v.norm(dim=-1, keepdim=True)).repeat_interleave(y.size(1) // v.size(1), 1)
    return y - (y * unit).sum(-1, keepdim=True) * unit


def exact_nats(z: Tensor, targets: Tensor, cap: float) -> Tensor:
    log_p = (cap * torch.tanh(z / cap)).log_softmax(-1)
    picked = log_p.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    return torch.where(targets < 0, 0.0, -picked)


def qk_inputs(
    T: int, H: int, kv: int, dim: int, half: int, dtype: torch.dtype, uses: int = 1
) -> tuple[list, list]:
    """(row, gain, rope), and gradients of q, k, and v for each use.

    One of the gains is zero, and the angles are large.
    """
    angles = torch.rand(T, 1, half, dtype=torch.float64) * 100
    rope = torch.stack([angles.cos(), angles.sin()], 1).to(
        torch.promote_types(dtype, torch.float32)
    )
    gain = torch.randn(H, dtype=torch.float64) * 3
    gain[:1] = 0.0
    row = torch.randn(T, (H + 2 * kv) * dim, dtype=torch.float64)
    grads = [torch.randn(T, n, dim, dtype=torch.float64).to(dtype) for n in (H, kv, *[kv] * uses)]
    return [row.to(dtype), gain.to(dtype), rope], grads


def xsa_inputs(T: int, H: int, kv: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """y, v (a view of a row, as in the model), gradient."""
    y, row, grad = (
        torch.randn(T, n, dim, dtype=torch.float64).to(dtype) for n in (H, H + 2 * kv, H)
    )
    return [y, row[:, H + kv :], grad]


def ce_inputs(N: int, C: int, V: int, dtype: torch.dtype) -> list[Tensor]:
    """x, w, what an adapter adds, targets with some -1, gradient of the nats."""
    x = torch.randn(N, C)
    w = torch.randn(V, C) * 8 * C**-0.5
    extra = torch.randn(N, V)
    targets = torch.randint(0, V, (N,))
    targets[2::3] = -1
    return [x.to(dtype), w.to(dtype), extra.to(dtype), targets, torch.randn(N, dtype=torch.float64)]


def as_tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def against_exact(function, exact, inputs: list[Tensor], grads: list[Tensor]) -> list[float]:
    """Relative errors of outputs and of the gradient of every input."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outs = as_tuple(function(*leaves))
    out_grads = [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)]
    found = torch.autograd.grad(outs, leaves, out_grads)

    wide = [t.detach().double().requires_grad_() for t in inputs]
    wanted = as_tuple(exact(*wide))
    wanted_grads = torch.autograd.grad(wanted, wide, [g.double() for g in grads])
    pairs = zip((*outs, *found), (*wanted, *wanted_grads), strict=True)
    return [relative_error(a.detach(), b.detach()) for a, b in pairs]


# --- Operators on a CPU, fused and plain, against fp64 --------------------------------------------
@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEADS + SPLIT, ids=str)
def test_norm_rope_and_gain_equal_fp64_autograd(shape, dtype, fused, uses):
    (row, gain, rope), grads = qk_inputs(*shape, dtype, uses)
    D = shape[3]
    errors = against_exact(
        lambda row, gain: tg.norm_rope(row, gain, rope, D, fused, uses),
        lambda row, gain: exact_qk(row, gain, rope.double(), D, uses),
        [row, gain],
        grads,
    )
    assert max(errors) < (1 if fused else 3) * TOLERANCE[dtype], errors


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_xsa_equals_fp64_autograd(shape, dtype, fused):
    y, v, grad = xsa_inputs(*shape[:4], dtype)
    errors = against_exact(tg.xsa if fused else tg.remove_own_value, exact_xsa, [y, v], [grad])
    assert max(errors) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("shape", LOGITS, ids=str)
def test_head_loss_equals_fp64_autograd(shape, adapted, dtype, fused):
    *sizes, cap = shape
    x, w, extra, targets, grad = ce_inputs(*sizes, dtype)
    leaves = [x, w, extra] if adapted else [x, w]

    def exact(x, w, extra=None):
        z = F.linear(x, w) if extra is None else F.linear(x, w) + extra
        rounding = z.detach().to(dtype).double() - z.detach()  # of the product
        return exact_nats(z + rounding, targets, cap)

    def loss(x, w, extra=None):
        return tg.head_loss(x, w, extra, targets, cap, fused)

    errors = against_exact(loss, exact, leaves, [grad])
    assert max(errors) < 12 * TOLERANCE[dtype], errors
    # Scoring gives the same nats, from an operator that leaves the logits alone.
    with torch.no_grad():
        nats = tg.head_loss(x, w, extra if adapted else None, targets, cap, fused)
    assert nats.dtype == torch.promote_types(dtype, torch.float32)
    assert not nats[targets < 0].any()
    wide = [t.double() for t in leaves]
    assert relative_error(nats, exact(*wide)) < 12 * TOLERANCE[dtype]
    # Nats of hints come beside them, have no gradient, and change nothing else.
    hints = targets.flip(0)

    def both(x, w, extra=None):
        return tg.head_loss(x, w, extra, targets, cap, fused, hints)

    def of_targets(*leaves):
        nats = both(*leaves)
        return nats[0] + 0 * nats[1]

    assert against_exact(of_targets, exact, leaves, [grad]) == errors
    trained = [t.clone().requires_grad_() for t in leaves]
    gradients = torch.autograd.grad(both(*trained)[1].sum(), trained, allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)
    with torch.no_grad():
        scored = both(x, w, extra if adapted else None)
    assert torch.equal(scored[0], nats) and not scored[1][hints < 0].any()
    targets = hints  # of `exact`
    assert relative_error(scored[1], exact(*wide)) < 12 * TOLERANCE[dtype]


def test_a_value_of_zero_takes_nothing_and_gives_no_nan():
    y, v, grad = xsa_inputs(5, 4, 2, 8, torch.float64)
    v = v.clone().index_fill_(0, torch.tensor([1, 3]), 0.0).requires_grad_()
    out = tg.xsa(y.requires_grad_(), v)
    dy, dv = torch.autograd.grad(out, (y, v), grad)
    assert torch.equal(out[[1, 3]], y[[1, 3]]) and torch.equal(dy[[1, 3]], grad[[1, 3]])
    assert not dv[[1, 3]].any() and dv.isfinite().all()


def test_logits_are_overwritten_only_for_a_gradient_and_never_twice():
    z, targets = torch.randn(6, 9), torch.randint(0, 9, (6,))
    before = z.clone()
    nats = tg.softcap_ce(z, targets, 30.0, False)
    assert torch.equal(z, before)
    leaf = before.clone().requires_grad_()
    torch.testing.assert_close(nats, exact_nats(leaf, targets, 30.0).detach())
    tg.softcap_ce(z, targets, 30.0, True)
    torch.testing.assert_close(
        z, torch.autograd.grad(exact_nats(leaf, targets, 30.0).sum(), leaf)[0]
    )


def test_softcap_reaches_its_cap_without_overflow():
    z = torch.tensor([[1e4, -1e4, 0.0], [torch.finfo(torch.bfloat16).max, 0.0, -3e38]])
    targets = torch.tensor([1, 0])
    nats = tg.softcap_ce(z.clone(), targets, 75.0, False)
    torch.testing.assert_close(nats.double(), exact_nats(z.double(), targets, 75.0))
    tg.softcap_ce(z, targets, 75.0, True)
    assert z.isfinite().all()


def test_operators_agree_with_their_fakes():
    (row, gain, rope), grads = qk_inputs(7, 4, 2, 8, 3, torch.float32, uses=2)
    y, v, grad = xsa_inputs(7, 4, 2, 8, torch.float32)
    torch.library.opcheck(tg.qk_rope, (row, gain, rope, 8))
    for uses in (1, 2):
        torch.library.opcheck(tg.qk_rope_backward, (row, gain, rope, *grads[: 2 + uses]))
    torch.library.opcheck(tg.xsa, (y.requires_grad_(), v.clone().requires_grad_()))
    torch.library.opcheck(tg.xsa_backward, (y.detach(), v, grad))
    targets = torch.tensor([0, -1, 3, 8, 2])
    for gradient in (False, True):
        for hints in (None, targets.flip(0)):
            arguments = (torch.randn(5, 9), targets, 30.0, gradient, hints)
            torch.library.opcheck(tg.softcap_ce, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_fused_form_compiles_whole_and_changes_nothing(backend):
    def loss(row, w, gain, rope, targets):
        q, k, v, own = tg.norm_rope(row.sin(), gain, rope, 8, True, 2)
        y = tg.xsa(q * (k * v).repeat_interleave(2, 1), own).flatten(1)
        return tg.head_loss(y, w, None, targets, 30.0, True).mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for call in range(2):
        (row, gain, rope), _ = qk_inputs(7, 4, 2, 8, 3, torch.float32)
        w, targets = torch.randn(11, 32).requires_grad_(), torch.randint(-1, 11, (7,))
        leaves = [row.requires_grad_(), w, gain.requires_grad_()]
        want = torch.autograd.grad(loss(*leaves, rope, targets), leaves)
        with torch.compiler.set_stance("fail_on_recompile" if call else "default"):
            got = torch.autograd.grad(compiled(*leaves, rope, targets), leaves)
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < 1e-5
    torch._dynamo.reset()


# --- The network with and without them ------------------------------------------------------------
def nats_and_gradients(adapted: bool, **knobs: object) -> list[Tensor]:
    """Of a random tiny network, every parameter (and adapter) away from its initial value."""
    from conftest import VOCAB, tiny_config

    cfg = tiny_config(num_layers=5, loop_end=2, xsa_last_n=4, **knobs)
    model, g, rng = tg.GPT(cfg), torch.Generator().manual_seed(0), np.random.default_rng(0)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=g)
    ids = rng.integers(0, VOCAB, 49)
    row = tg.pack_row(ids[:-1], ids[1:], np.array([0, 16, 32]), (48, 8, 64), torch.device("cpu"))
    leaves, lora = list(model.parameters()), None
    if adapted:
        model.requires_grad_(False)
        lora = tg.LoRA.zeros(cfg, 3, len(cfg.plans[1]), torch.device("cpu"))
        lora.reset(0, [0, 1, 2])
        with torch.no_grad():
            lora.up.normal_(std=0.1, generator=g)
        leaves = [x.detach().to(cfg.dtype).requires_grad_() for x in (lora.down, lora.up)]
        lora = lora.with_leaves(leaves)
    nats = model(row, cfg.plans[1], lora=lora)
    return [
        nats.detach(),
        *torch.autograd.grad((nats * torch.randn(48, generator=g)).sum(), leaves),
    ]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    "off", [*[(knob,) for knob in KNOBS], KNOBS], ids=lambda off: "+".join(off)
)
def test_a_knob_changes_nothing_but_rounding(off, adapted, dtype):
    fused = nats_and_gradients(adapted, compute_dtype=dtype)
    plain = nats_and_gradients(adapted, compute_dtype=dtype, **dict.fromkeys(off, False))
    for a, b in zip(fused, plain, strict=True):
        scale = max(float(b.norm()), 1.0)
        assert float((a - b).norm()) < (1e-5 if dtype == "fp32" else 5e-2) * scale


def test_a_knob_decides_which_operators_run(monkeypatch):
    calls = []

    def counting(name: str):
        operator = getattr(tg, name)

        def call(*args):
            calls.append(name)
            return operator(*args)

        return call

    operators = dict(zip(KNOBS, ("mlp_up", "qk_rope", "xsa", "softcap_ce"), strict=True))
    for name in operators.values():
        monkeypatch.setattr(tg, name, counting(name))
    for knob, name in operators.items():
        calls.clear()
        nats_and_gradients(False, **{knob: False})
        assert set(calls) == {*operators.values()} - {name}
    calls.clear()
    nats_and_gradients(False)
    assert set(calls) == {*operators.values()}


# --- Choice of tiles ------------------------------------------------------------------------------
@pytest.fixture
def tile_folder(monkeypatch, tmp_path):
    """An empty folder in place of Triton's cache, for a GPU that is not there."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    return tmp_path


def no_launch(tile: tuple) -> None:
    pass


def test_the_fastest_tile_is_measured_once_per_shape_and_kept_on_disk(monkeypatch, tile_folder):
    times_ms = {(8192, 16): 3.0, (8192, 8): 1.0, (4096, 8): 2.0, (1024, 4): 4.0}
    measured = []

    def bench(launch, **_):
        (tile,) = launch.args
        measured.append(tile)
        return times_ms[tile]

    monkeypatch.setattr(tg.triton.testing, "do_bench", bench)
    first, fastest = (8192, 16), (8192, 8)
    for shape, measurements in (((0,), 4), ((0,), 4), ((1,), 8)):
        tuner = tg.TileTuner()  # as in a new process
        assert tuner.fastest_tile("ce", 2**14, shape, no_launch) == fastest
        assert len(measured) == measurements
    assert tuner.fastest_tile("ce", 1, (1,), no_launch) == fastest
    # Too few rows to measure, and no measurement after warm-up.
    assert tuner.fastest_tile("ce", 2**14 - 1, (9,), no_launch) == first
    tuner.may_measure = False
    assert tuner.fastest_tile("ce", 2**14, (9,), no_launch) == first
    assert tuner.fastest_tile("ce", 2**14, (1,), no_launch) == fastest
    assert len(measured) == 8 and len(list(tile_folder.iterdir())) == 2


def test_ranks_that_measure_at_once_use_the_tile_of_the_first_to_end(monkeypatch, tile_folder):
    def tile_of_rank(best, meanwhile=None):
        def bench(launch, **_):
            if meanwhile is not None:
                meanwhile()
            return float(launch.args != (best,))

        monkeypatch.setattr(tg.triton.testing, "do_bench", bench)
        return tg.TileTuner().fastest_tile("ce", 2**14, (1,), no_launch)

    def another_rank_ends():
        if not any(tile_folder.iterdir()):
            tile_of_rank((1024, 4))

    assert tile_of_rank((8192, 8), another_rank_ends) == (1024, 4)
    assert tile_of_rank((4096, 8)) == (1024, 4)
    assert [p.suffix for p in tile_folder.iterdir()] == [".json"]


def test_without_links_each_rank_uses_its_own_measurement(monkeypatch, tile_folder):
    def no_links(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(
        tg.triton.testing, "do_bench", lambda launch, **_: float(launch.args != ((4096, 8),))
    )
    assert tg.TileTuner().fastest_tile("ce", 2**14, (1,), no_launch) == (4096, 8)
    assert not any(tile_folder.iterdir())


def test_launchers_ask_the_tuner_that_was_installed_last(monkeypatch):
    tuner = tg.TileTuner()
    monkeypatch.setattr(tg, "active_tuner", tg.active_tuner)
    tg.use_tuner(tuner)
    launched = []
    monkeypatch.setattr(tg, "launch_mlp", lambda *args, slope: launched.append(args))
    gpu = types.SimpleNamespace(multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    a = torch.zeros(3, 8)
    tuner.chosen["mlp_up", 16, 8, a.dtype] = (1, 2, 3)
    tg.launch_fastest_mlp(a, a, a, torch.zeros(3, 16), False, 0.5)
    ((*_, tile),) = launched
    assert tile == (1, 2, 3)


# --- The kernels, compiled without a GPU ----------------------------------------------------------
def run_script(*command: str, **environ: str) -> str:
    """The last line that a Python program prints."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environ
    child = subprocess.run(
        [sys.executable, *command],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout.splitlines()[-1]


def test_every_kernel_compiles_for_hopper_without_spills():
    pytest.importorskip("triton")
    line = run_script(str(Path(tg.__file__).parent / "bench" / "kernels.py"), "--first")
    found = json.loads(line.removeprefix("bench "))
    assert found["clean"]
    assert {r["kernel"] for r in found["kernels"]} == {*tg.TILES, "ce + gradient", "ce + hints"}
    for r in found["kernels"]:
        assert r["stack_spills"] == [0, 0, 0], r
        assert r["registers"] <= 255 and r["shared"] <= 227 * 1024, r
        if r["kernel"].startswith("mlp"):
            assert r["instructions"] == ["wgmma", "TMA"] and not r["serialised"], r
            assert r["wgmma_shapes"] == ["m64n256k16"], r
            assert r["tma_targets"] == ["global", "shared"], r
        else:
            assert r["instructions"] == ["16-byte"], r
        if r["kernel"].startswith("ce"):
            # 16 columns to a thread: two exponentials for each, one for the target, one for a hint.
            assert r["ex2"] == 2 * 16 + 1 + (r["kernel"] == "ce + hints"), r
            # Neither logit is loaded behind the barrier: other warps overwrite it there.
            assert r["single_loads_after_barrier"] == 0, r


# --- The kernels, interpreted ---------------------------------------------------------------------
MARGIN = 128  # values of NaN on both sides of every buffer that a launcher asks for
new_empty = Tensor.new_empty
POISONED = []  # those buffers


def poisoned(like: Tensor, *shape, dtype: torch.dtype | None = None, **options) -> Tensor:
    """Tensor.new_empty filled with NaN, so that a missed element and a write past an edge show."""
    if options:  # a call by the interpreter
        return new_empty(like, *shape, dtype=dtype or like.dtype, **options)
    shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 2 * MARGIN,), float("nan"), dtype=dtype or like.dtype)
    POISONED.append(buffer)
    return buffer[MARGIN : MARGIN + size].view(shape)


def errors_of(names: tuple, found: tuple, wanted: tuple, *case) -> list[list]:
    """[name, *case, relative error] of each output."""
    triples = zip(names, found, wanted, strict=True)
    return [[name, *case, relative_error(a, b.detach())] for name, a, b in triples]


def interpret_qk(shape: tuple, tile: tuple, uses: int, dtype: torch.dtype) -> list[list]:
    (row, gain, rope), grads = qk_inputs(*shape, dtype, uses)
    wide = [t.double().requires_grad_() for t in (row, gain)]
    q, k, *values = exact_qk(*wide, rope.double(), shape[3], uses)
    wanted_grads = torch.autograd.grad((q, k, *values), wide, [g.double() for g in grads])
    qk = tg.qk_rope_cuda(row, gain, rope, shape[3], tile)
    dqkv, dgain = tg.qk_rope_backward_cuda(row, gain, rope, *grads, tile=tile)
    wanted = (torch.cat([q, k], 1), *wanted_grads)
    return errors_of(("qk", "dqkv", "dgain"), (qk, dqkv, dgain), wanted, shape, tile)


def interpret_xsa(shape: tuple, tile: tuple, dtype: torch.dtype) -> list[list]:
    y, v, grad = xsa_inputs(*shape[:4], dtype)
    wide = [t.double().requires_grad_() for t in (y, v)]
    out = exact_xsa(*wide)
    wanted = (out, *torch.autograd.grad(out, wide, grad.double()))
    found = (tg.xsa_cuda(y, v, tile), *tg.xsa_backward_cuda(y, v, grad, tile))
    return errors_of(("xsa", "dy", "dv"), found, wanted, shape, tile)


def interpret_ce(case: tuple, tile: tuple, dtype: torch.dtype) -> list[list]:
    N, _, V, cap = case
    z = (torch.randn(N, V) * 3).to(dtype)
    targets = torch.randint(-1, V, (N,))
    exact = z.double().requires_grad_()
    wanted = exact_nats(exact, targets, cap)
    (wanted_dz,) = torch.autograd.grad(wanted.sum(), exact)
    before = z.clone()
    nats = tg.softcap_ce_cuda(z, targets, cap, False, tile=tile)
    assert torch.equal(z, before)
    again = tg.softcap_ce_cuda(z, targets, cap, True, tile=tile)
    assert torch.equal(again, nats)
    hints = torch.randint(-1, V, (N,))
    of_hints = exact_nats(exact.detach(), hints, cap)
    found = tg.softcap_ce_cuda(before.clone(), targets, cap, False, hints, tile)
    assert torch.equal(found[0], nats)
    learnt = before.clone()
    assert torch.equal(tg.softcap_ce_cuda(learnt, targets, cap, True, hints, tile), found)
    assert torch.equal(learnt, z)
    names = ("nats", "dz", "hint nats")
    return errors_of(names, (nats, z, found[1]), (wanted, wanted_dz, of_hints), case, tile)


def interpret(dtype: torch.dtype) -> list:
    """Errors of the interpreted kernels: [what, shape, tile, relative error]."""
    Tensor.new_empty = poisoned
    results = []
    for tile in ((32, 1), (128, 1)):
        for shape in HEADS + SPLIT:
            for uses in (1, 2):
                results += interpret_qk(shape, tile, uses, dtype)
        for shape in HEADS:
            results += interpret_xsa(shape, tile, dtype)
    for tile in ((256, 1), (4096, 1)):
        for case in LOGITS:
            results += interpret_ce(case, tile, dtype)
    margins = torch.stack([torch.stack([t[:MARGIN], t[-MARGIN:]]).float() for t in POISONED])
    return [*results, ["margins", len(POISONED), 0, float(not margins.isnan().all())]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted_kernels_equal_float64_over_odd_shapes(dtype):
    pytest.importorskip("triton")
    root = str(Path(tg.__file__).parent)
    line = run_script(__file__, str(dtype).split(".")[1], TRITON_INTERPRET="1", PYTHONPATH=root)
    results = json.loads(line)
    outputs = 2 * 2 * 3 * len(HEADS + SPLIT) + 2 * 3 * len(HEADS) + 2 * 3 * len(LOGITS)
    assert len(results) == outputs + 1
    for *what, error in results:
        assert error <= TOLERANCE[dtype], (what, error)  # false for NaN, too


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(interpret(getattr(torch, sys.argv[1]))))
