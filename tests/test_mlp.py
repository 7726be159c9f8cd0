"""The fused MLP: reference, operators, autograd, and the Triton kernel, interpreted without a GPU.

Run as a script, this file is its own child process: Triton's interpreter needs TRITON_INTERPRET=1
from the first import of triton. The last line it prints is a JSON list. The tests of all kernels
show that this one compiles for Hopper without spills.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_gpt

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU_AND_GPU = ["cpu", pytest.param("cuda", marks=GPU)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SMALL_TILE = (32, 32, 32)
REAL_TILE = (128, 256, 64)


def relative_error(out, reference):
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()


def plain_mlp(x, w_up, w_down):
    return F.linear(train_gpt.leaky_relu_sq(F.linear(x, w_up)), w_down)


def random_inputs(rows, width, hidden, dtype=torch.float64, device="cpu"):
    """x, w_up, w_down and dy, scaled so that every intermediate is of order 1."""
    shapes = (rows, width), (hidden, width), (width, hidden), (rows, width)
    scales = 1.0, width**-0.5, hidden**-0.5, 1.0
    return [
        (torch.randn(s, dtype=torch.float64) * k).to(device, dtype)
        for s, k in zip(shapes, scales, strict=True)
    ]


def fake_hopper(monkeypatch, major=9):
    """A GPU of 7 multiprocessors that can be asked for its properties and nothing else."""
    gpu = SimpleNamespace(major=major, multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)


# --- Reference, operators, autograd ---


def test_reference_gradient_by_gradcheck():
    pre = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(train_gpt.leaky_relu_sq, pre)


def test_reference_squares_positive_values_and_halved_negative_values():
    pre = torch.tensor([-4.0, -1.0, 0.0, 0.5, 3.0])
    assert torch.equal(train_gpt.leaky_relu_sq(pre), torch.tensor([4.0, 0.25, 0.0, 0.25, 9.0]))


def test_fused_gradient_by_gradcheck():
    *inputs, _ = random_inputs(4, 6, 10)
    for t in inputs:
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: train_gpt.fused_mlp(*args)[0], inputs)


def test_derivative_matches_autograd_at_zero_and_on_both_sides():
    pre = torch.tensor([[-3.0, -0.0, 0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    eye = torch.eye(4, dtype=torch.float64)
    for k in range(4):
        (want,) = torch.autograd.grad(train_gpt.leaky_relu_sq(pre)[0, k], pre)
        assert torch.equal(train_gpt.mlp_dpre(eye[k : k + 1], eye, pre.detach()), want)


@pytest.mark.parametrize("device", CPU_AND_GPU)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 24, 40), (37, 64, 264), (129, 72, 256), (300, 128, 520)], ids=str
)
def test_output_and_gradients_equal_plain_autograd_in_float64(shape, dtype, device):
    *inputs, dy = random_inputs(*shape, dtype=dtype, device=device)
    exact = [t.double().requires_grad_() for t in inputs]
    want = plain_mlp(*exact)
    want.backward(dy.double())
    for t in inputs:
        t.requires_grad_()
    out, post = train_gpt.fused_mlp(*inputs)
    out.backward(dy)
    assert out.dtype == post.dtype == dtype and not post.requires_grad
    got = [out, post, *(t.grad for t in inputs)]
    wanted = [want, train_gpt.leaky_relu_sq(F.linear(exact[0], exact[1])), *(t.grad for t in exact)]
    for name, a, b in zip(("out", "post", "dx", "dw_up", "dw_down"), got, wanted, strict=True):
        assert relative_error(a, b) < TOLERANCE[dtype], name


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])
def test_only_wanted_gradients_are_computed(wanted, monkeypatch):
    *inputs, dy = random_inputs(9, 8, 16)
    exact = [t.clone().requires_grad_() for t in inputs]
    plain_mlp(*exact).backward(dy)
    products = []
    real = train_gpt.mlp_dpre
    monkeypatch.setattr(train_gpt, "mlp_dpre", lambda *args: products.append(1) or real(*args))
    for t, want in zip(inputs, wanted, strict=True):
        t.requires_grad_(bool(want))
    train_gpt.fused_mlp(*inputs)[0].backward(dy)
    assert len(products) == (wanted != (0, 0, 1))
    for t, e, want in zip(inputs, exact, wanted, strict=True):
        assert relative_error(t.grad, e.grad) < 1e-12 if want else t.grad is None


def test_frozen_weights_keep_neither_input_nor_activation_alive():
    x, w_up, w_down, _ = random_inputs(9, 8, 16)
    out, _ = train_gpt.fused_mlp(x.requires_grad_(), w_up, w_down)
    saved_x, *_, saved_post = out.grad_fn.saved_tensors
    assert saved_x is None and saved_post is None


def test_without_gradients_nothing_is_recorded():
    *inputs, _ = random_inputs(9, 8, 16)
    for t in inputs:
        t.requires_grad_()
    with torch.no_grad():
        out, post = train_gpt.fused_mlp(*inputs)
    assert out.grad_fn is None and post.grad_fn is None
    assert relative_error(out, plain_mlp(*inputs)) < 1e-12


@pytest.mark.parametrize("device", CPU_AND_GPU)
def test_no_rows_give_empty_output_and_zero_weight_gradients(device):
    *inputs, dy = random_inputs(0, 8, 16, torch.bfloat16, device)
    for t in inputs:
        t.requires_grad_()
    out, post = train_gpt.fused_mlp(*inputs)
    out.backward(dy)
    assert out.shape == (0, 8) and post.shape == (0, 16)
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in inputs)


@pytest.mark.parametrize("device", CPU_AND_GPU)
def test_operators_agree_with_their_fakes(device):
    x, w_up, w_down, dy = random_inputs(5, 8, 16, torch.float32, device)
    torch.library.opcheck(train_gpt.mlp_up, (x, w_up))
    torch.library.opcheck(train_gpt.mlp_dpre, (dy, w_down, F.linear(x, w_up)))


@pytest.mark.parametrize("device", CPU_AND_GPU)
def test_forward_and_backward_compile_whole_and_once(device):
    def loss(x, w_up, w_down):
        out, post = train_gpt.fused_mlp(x.sin(), w_up, w_down)
        return (out.cos() * post.mean()).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for call in range(3):
        inputs = [t.requires_grad_() for t in random_inputs(33, 16, 24, device=device)[:3]]
        want = torch.autograd.grad(loss(*inputs), inputs)
        with torch.compiler.set_stance("fail_on_recompile" if call else "default"):
            got = torch.autograd.grad(compiled(*inputs), inputs)
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < 1e-12


# --- The kernel: which tensors reach it, what it computes, what it compiles to ---


@pytest.mark.parametrize(
    ("major", "dtype", "rows", "width", "hidden", "used"),
    [
        (9, torch.bfloat16, 3, 16, 24, True),
        (9, torch.float16, 3, 16, 24, True),
        (9, torch.float32, 3, 16, 24, False),
        (9, torch.float64, 3, 16, 24, False),
        (8, torch.bfloat16, 3, 16, 24, False),
        (12, torch.bfloat16, 3, 16, 24, False),
        (9, torch.bfloat16, 3, 20, 24, False),
        (9, torch.bfloat16, 3, 16, 20, False),
        (9, torch.bfloat16, 0, 16, 24, False),
    ],
)
def test_kernel_takes_only_aligned_two_byte_rows_on_hopper(
    monkeypatch, major, dtype, rows, width, hidden, used
):
    pytest.importorskip("triton")
    fake_hopper(monkeypatch, major)
    launches = []
    monkeypatch.setattr(train_gpt, "launch_mlp", lambda *args, slope: launches.append(args))
    x, w_up, w_down, dy = random_inputs(rows, width, hidden, dtype)
    pre, post = train_gpt.mlp_up_cuda(x, w_up)
    dpre = train_gpt.mlp_dpre_cuda(dy, w_down, pre)
    for t in (pre, post, dpre):
        assert t.shape == (rows, hidden) and t.dtype == dtype
    assert len(launches) == 2 * used
    for launch, out, backward in zip(launches, (post, dpre), (False, True), strict=False):
        _, _, launched_pre, launched_out, *options = launch
        assert launched_pre is pre and launched_out is out
        assert options == [7, backward, REAL_TILE]


def test_misaligned_or_strided_inputs_take_the_reference(monkeypatch):
    pytest.importorskip("triton")
    fake_hopper(monkeypatch)
    monkeypatch.delattr(train_gpt, "launch_mlp")
    x, w_up, w_down, _ = random_inputs(16, 16, 24, torch.bfloat16)
    pre, post = train_gpt.mlp_up_reference(x, w_up)
    shifted = torch.empty(16 * 16 + 1, dtype=x.dtype)[1:].view(16, 16).copy_(x)
    for strange in (shifted, x.t().contiguous().t()):
        _, found = train_gpt.mlp_up_cuda(strange, w_up)
        assert torch.equal(found, post)
    ones = torch.ones((), dtype=x.dtype).expand(16, 16)  # the gradient of sum()
    wanted = train_gpt.mlp_dpre_reference(ones, w_down, pre)
    assert torch.equal(train_gpt.mlp_dpre_cuda(ones, w_down, pre), wanted)


@pytest.mark.parametrize(("rows", "programs"), [(1000, 64), (1025, 72), (9000, 132)])
def test_no_more_programs_than_tiles_or_processors(rows, programs, monkeypatch):
    pytest.importorskip("triton")
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(train_gpt, "mlp_kernel", Recorder())
    x, w_up = torch.empty(rows, 512), torch.empty(2048, 512)
    pre, post = torch.empty(2, rows, 2048)
    train_gpt.launch_mlp(x, w_up, pre, post, 132, False, REAL_TILE)
    assert grids == [(programs,)]


def interpret(dtype):
    """Errors of the interpreted kernel, as [what, tile, shape, relative error, guards intact]."""
    results = []
    # Widths are multiples of 16: the interpreter of Triton 3.5 takes strides for bytes where it
    # checks alignment.
    shapes = (48, 80, SMALL_TILE), (32, 64, SMALL_TILE), (16, 16, SMALL_TILE), (80, 272, REAL_TILE)
    for rows in (1, 37, 129, 300):
        for width, hidden, tile in shapes:
            x, w_up, w_down, dy = random_inputs(rows, width, hidden, dtype)
            # Outputs lie between guard rows, and all is NaN: a missed element and a write past
            # either edge both show.
            padded = torch.full((3, rows + 2, hidden), float("nan"), dtype=dtype)
            pre, post, dpre = (t[1:-1] for t in padded)
            train_gpt.launch_mlp(x, w_up, pre, post, 3, False, tile)
            exact = F.linear(x.double(), w_up.double())
            train_gpt.launch_mlp(dy, w_down, exact.to(dtype), dpre, 3, True, tile)

            exact_post = train_gpt.leaky_relu_sq(exact.requires_grad_())
            (slope,) = torch.autograd.grad(exact_post.sum(), exact)
            exact_dpre = (dy.double() @ w_down.double()) * slope
            guarded = bool(padded[:, [0, -1]].isnan().all())
            for what, found, wanted in (
                ("pre", pre, exact),
                ("post", post, exact_post),
                ("dpre", dpre, exact_dpre),
            ):
                error = relative_error(found, wanted)
                results.append([what, tile, [rows, width, hidden], error, guarded])
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted_kernel_equals_float64_over_odd_shapes(dtype):
    pytest.importorskip("triton")
    root = str(Path(train_gpt.__file__).parent)
    child = subprocess.run(
        [sys.executable, __file__, str(dtype).split(".")[1]],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    results = json.loads(child.stdout.splitlines()[-1])
    assert len(results) == 48
    for what, tile, shape, error, guarded in results:
        assert error < TOLERANCE[dtype], (what, tile, shape, error)  # false for NaN, too
        assert guarded, (what, tile, shape)


def test_file_imports_and_computes_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, train_gpt; x = torch.ones(2, 8)\n"
        "assert train_gpt.triton is None\n"
        "assert train_gpt.fused_mlp(x, torch.ones(16, 8), torch.ones(8, 16))[0][0, 0] == 1024\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(train_gpt.__file__).parent)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 37, 129, 1000, 4099])
@pytest.mark.parametrize(("width", "hidden"), [(512, 2048), (192, 768), (72, 264), (8, 8)])
def test_kernel_on_gpu_equals_float64_over_odd_shapes(width, hidden, rows, dtype):
    gpu = torch.cuda.get_device_properties("cuda")
    if gpu.major != 9 or train_gpt.triton is None:
        pytest.skip("the kernel is for Hopper")
    x, w_up, w_down, dy = random_inputs(rows, width, hidden, dtype, "cuda")
    padded = torch.full((3, rows + 2, hidden), float("nan"), dtype=dtype, device="cuda")
    pre, post, dpre = (t[1:-1] for t in padded)
    train_gpt.launch_mlp(x, w_up, pre, post, gpu.multi_processor_count, False, REAL_TILE)
    train_gpt.launch_mlp(dy, w_down, pre, dpre, gpu.multi_processor_count, True, REAL_TILE)
    # From the kernel's own rounding of pre, so that signs near zero agree.
    exact = pre.double().requires_grad_()
    wanted_post = train_gpt.leaky_relu_sq(exact)
    wanted_post.backward(dy.double() @ w_down.double())
    assert padded[:, [0, -1]].isnan().all()
    assert relative_error(pre, F.linear(x.double(), w_up.double())) < TOLERANCE[dtype]
    assert relative_error(post, wanted_post) < TOLERANCE[dtype]
    assert relative_error(dpre, exact.grad) < TOLERANCE[dtype]


if __name__ == "__main__":
    print(json.dumps(interpret(getattr(torch, sys.argv[1]))))
