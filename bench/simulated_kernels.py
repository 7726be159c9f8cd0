"""Every Triton kernel executed for Hopper without a GPU: bounds, races, unwritten reads, numbers.

    make simulate

runs this file under ttsem (PyPI), which executes the code that Triton's compiler makes and stops at
the line of a kernel that reads or writes out of bounds, that races with another program, or whose
result is undefined. Memory that was never written is NaN. ttsem needs Python 3.12, Triton 3.8 and
torch 2.14, hence an environment of its own. The controls come first: a simulator that does not stop
at their faults proves nothing about the rest.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import train_gpt as tg
from train_gpt import mlp_kernel

ROWS = [1, 37, 129]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values."""
    return torch.randn(shape).to(dtype).to("cuda")


def assert_near(found: Tensor, wanted: Tensor, limit: float = 1e-5) -> None:
    """Relative error of the norms, in fp64; NaN is an error."""
    found, wanted = found.cpu().double(), wanted.cpu().double()
    assert (found - wanted).norm() <= limit * wanted.norm()


# --- Controls -------------------------------------------------------------------------------------
@triton.jit
def unmasked_copy(source, target, BLOCK: tl.constexpr):
    """Writes whole blocks, whatever the length."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index))


@triton.jit
def racing_copy(source, target, BLOCK: tl.constexpr):
    """All programs write the same block."""
    index = tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index) + tl.program_id(0))


def test_control_a_write_past_the_end_stops():
    source, target = draw(100), draw(100)
    with pytest.raises(Exception, match="past the end"):
        unmasked_copy[(2,)](source, target, BLOCK=64)


def test_control_a_race_between_programs_stops():
    source, target = draw(64), draw(64)
    with pytest.raises(Exception, match="program"):
        racing_copy[(2,)](source, target, BLOCK=64)


# --- MLP ------------------------------------------------------------------------------------------
# ruff: disable[PLR0913]
@triton.jit
def mlp_of_pointers(
    a,
    w,
    pre,
    out,
    T,
    K,
    F,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BACKWARD: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """mlp_kernel with descriptors made in the kernel: ttsem does not write through the host's."""
    a_box = tl.make_tensor_descriptor(a, [T, K], [K, 1], [BM, BK])
    if BACKWARD:
        w_box = tl.make_tensor_descriptor(w, [K, F], [F, 1], [BK, BN])
    else:
        w_box = tl.make_tensor_descriptor(w, [F, K], [K, 1], [BN, BK])
    pre_box = tl.make_tensor_descriptor(pre, [T, F], [F, 1], [BM, BN // 2])
    out_box = tl.make_tensor_descriptor(out, [T, F], [F, 1], [BM, BN // 2])
    mlp_kernel(a_box, w_box, pre_box, out_box, BACKWARD, 0.5, FLATTEN)


# ruff: enable[PLR0913]


@pytest.fixture
def allocator() -> None:
    """Memory for descriptors that a kernel makes."""
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8))


@pytest.mark.parametrize("flatten", [False, True], ids=["loops", "flattened"])
@pytest.mark.parametrize("tile", [(32, 32, 32), (128, 256, 64)], ids=str)
@pytest.mark.parametrize("rows", [37, 129])
def test_mlp_forward_and_backward(rows, tile, flatten, allocator):
    width, hidden = (96, 80) if tile[0] == 32 else (128, 272)
    half = torch.float16
    x, dy = draw(rows, width, dtype=half), draw(rows, width, dtype=half)
    up = draw(hidden, width, dtype=half) * width**-0.5
    down = draw(width, hidden, dtype=half) * width**-0.5
    pre, post, dpre = torch.full((3, rows, hidden), float("nan"), dtype=half).to("cuda")
    options = dict(zip(("BM", "BN", "BK"), tile, strict=True), FLATTEN=flatten, num_warps=8)
    sizes = (rows, width, hidden)
    # Three programs share the tiles, as on a GPU with as many multiprocessors.
    mlp_of_pointers[(3,)](x, up, pre, post, *sizes, BACKWARD=False, **options)
    mlp_of_pointers[(3,)](dy, down, pre, dpre, *sizes, BACKWARD=True, **options)
    wide = [t.cpu().float() for t in (x, up, dy, down, pre)]
    wanted_pre, wanted_post = tg.mlp_up_reference(wide[0], wide[1])
    assert_near(pre, wanted_pre, 2e-3)
    assert_near(post, wanted_post, 2e-3)
    assert_near(dpre, tg.mlp_dpre_reference(wide[2], wide[3], wide[4]), 2e-3)


# --- The others -----------------------------------------------------------------------------------
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_loss(rows, gradient):
    columns = 1000
    z = draw(rows, columns) * 10
    targets = torch.randint(-1, columns, (rows,)).to("cuda")
    wanted_z = z.cpu().clone()
    wanted = tg.softcap_ce_reference(wanted_z, targets.cpu(), 30.0, gradient)
    for tile in ((1024, 4), (256, 4)):
        logits = z.clone()
        nats = tg.softcap_ce_cuda(logits, targets, 30.0, gradient, tile=tile)
        assert_near(nats, wanted)
        assert_near(logits, wanted_z)


@pytest.mark.parametrize("rows", ROWS)
def test_norm_rope_and_gain(rows):
    heads, kv, dim, half = 6, 2, 24, 5
    row = draw(rows, (heads + 2 * kv) * dim)
    gain = draw(heads)
    rope = draw(rows, 2, 1, half)
    grads = [draw(rows, n, dim) for n in (heads, kv, kv, kv)]
    inputs = [t.cpu() for t in (row, gain, rope)]
    tile = (16, 4)
    out = tg.qk_rope_cuda(row, gain, rope, dim, tile)
    assert_near(out, tg.qk_rope_reference(*inputs, dim))
    found = tg.qk_rope_backward_cuda(row, gain, rope, *grads, tile)
    wanted = tg.qk_rope_backward_reference(*inputs, *(grad.cpu() for grad in grads))
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("rows", ROWS)
def test_xsa(rows):
    y, v, grad = draw(rows, 6, 24), draw(rows, 2, 24), draw(rows, 6, 24)
    inputs = [t.cpu() for t in (y, v, grad)]
    tile = (16, 4)
    assert_near(tg.xsa_cuda(y, v, tile), tg.xsa_reference(*inputs[:2]))
    found = tg.xsa_backward_cuda(y, v, grad, tile)
    for a, b in zip(found, tg.xsa_backward_reference(*inputs), strict=True):
        assert_near(a, b)
