"""Every golf:: operator: schema, gradient and fakes, and the memory layout of its results.

torch.compile plans memory and kernels with an operator's fake. If a result on a GPU had another
dtype, shape or stride, the run would end at its first step. So three are compared for inputs of
every layout: the fake, the reference on a CPU, and the launcher, whose kernels stay silent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import train_gpt as tg

T, H, KV, D, C, F, V = 7, 4, 2, 8, 16, 24, 11
Arguments = tuple[Any, ...]


def dense(*shape: int) -> Tensor:
    """A tensor whose values lie end to end."""
    return torch.randn(shape)


def part_of_row(*shape: int) -> Tensor:
    """Some of the columns or heads of a longer row, as q, k and v are of one product."""
    return torch.randn(shape[0], shape[1] + 2, *shape[2:])[:, 1:-1]


def transposed(*shape: int) -> Tensor:
    """A tensor whose first two axes have changed places."""
    return torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1)


LAYOUTS = [dense, part_of_row, transposed]


def offsets() -> Tensor:
    """Three segments, one of them empty, and two unused entries."""
    return torch.tensor([0, 3, 3, T, T, T], dtype=torch.int32)


def cases(make: Callable[..., Tensor]) -> Iterator[tuple[str, Arguments]]:
    """(name of an operator, arguments) for every operator, its floats laid out by `make`."""
    yield "mlp_up", (make(T, C), make(F, C), 0.5)
    yield "mlp_dpre", (make(T, C), make(C, F), make(T, F), 0.5)
    targets = torch.tensor([0, -1, 3, 8, 2, 10, -1])
    for gradient in (False, True):
        for hints in (None, targets.flip(0)):
            # The logits are a product of their own, hence dense.
            yield "softcap_ce", (dense(T, V), targets, 30.0, gradient, hints)
    gain = dense(H)
    rope = dense(T, 2, 1, 3)
    row = make(T, (H + 2 * KV) * D)
    yield "qk_rope", (row, gain, rope, D)
    # As in a last visit, where only keys and values are made of every token.
    yield "qk_rope", (make(T, 2 * KV * D), gain[:0], rope, D)
    for uses in (1, 2):
        grads = [make(T, heads, D) for heads in (H, *[KV] * (1 + uses))]
        yield "qk_rope_backward", (row, gain, rope, *grads)
    y, v, grad = make(T, H, D), make(T, KV, D), make(T, H, D)
    yield "xsa", (y, v)
    yield "xsa_backward", (y, v, grad)
    k = make(T, KV, D)
    cu = offsets()
    yield "sdpa_varlen", (y, k, v, cu, cu.clone(), T)
    lse = torch.zeros(H, T)
    yield "sdpa_varlen_backward", (grad, y, k, v, dense(T, H, D), lse, cu, cu.clone())


def operator(name: str) -> Callable:
    """The operator golf::`name`."""
    return getattr(torch.ops.golf, name)


def layout(results: Any) -> list[tuple]:
    """(dtype, shape, strides) of every result; those of an axis of one value do not matter."""
    if isinstance(results, Tensor):
        results = [results]
    found = []
    for x in results:
        strides = [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1]
        found.append((x.dtype, tuple(x.shape), tuple(strides)))
    return found


def fake_layout(call: Callable, arguments: Arguments) -> list[tuple]:
    """The layout of what the operator's fake returns."""
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments]
        return layout(call(*fakes))


def real_layout(call: Callable, arguments: Arguments) -> list[tuple]:
    """The layout of what the operator, or a launcher, returns; what it changes is a copy."""
    copies = []
    for x in arguments:
        if isinstance(x, Tensor):
            copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
            copies.append(copy.copy_(x))
        else:
            copies.append(x)
    return layout(call(*copies))


def launcher(name: str, monkeypatch: pytest.MonkeyPatch) -> Callable | None:
    """The operator's launcher, whose kernels compute nothing; None without a kernel."""

    class Silent:
        def __getitem__(self, grid: Any) -> Callable:
            return lambda *args, **kwargs: None

    monkeypatch.setattr(tg, "launch_heads", lambda *args: None)
    monkeypatch.setattr(tg, "launch_fastest_mlp", lambda *args: None)
    monkeypatch.setattr(tg, "mlp_kernel_fits", lambda *args: True)
    monkeypatch.setattr(tg, "softcap_ce_kernel", Silent())
    return getattr(tg, f"{name}_cuda", None)


def test_every_operator_has_a_case_and_every_kernel_a_launcher(monkeypatch):
    names = {name for name, _ in cases(dense)}
    defined = torch._C._dispatch_get_all_op_names()
    assert names == {
        name.removeprefix("golf::").split(".")[0] for name in defined if name.startswith("golf::")
    }
    without = {name for name in names if launcher(name, monkeypatch) is None}
    # On a GPU they are the same functions of PyTorch as on a CPU.
    assert without == {"sdpa_varlen", "sdpa_varlen_backward"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", LAYOUTS)
def test_results_are_laid_out_as_their_fakes_on_cpu_and_gpu(make, dtype, monkeypatch):
    wrong = []
    for name, arguments in cases(make):
        inputs = []
        for x in arguments:
            # Cosines, sines and the logsumexp are fp32 in every run.
            is_fp32 = isinstance(x, Tensor) and (x.ndim == 4 or x.shape == (H, T))
            floats = isinstance(x, Tensor) and x.is_floating_point() and not is_fp32
            inputs.append(x.to(dtype) if floats else x)
        expected = fake_layout(operator(name), inputs)
        if real_layout(operator(name), inputs) != expected:
            wrong.append((name, "on a CPU"))
        launch = launcher(name, monkeypatch)
        if launch and real_layout(launch, inputs) != expected:
            wrong.append((name, "on a GPU"))
        monkeypatch.undo()
    assert wrong == []


@pytest.mark.parametrize("make", LAYOUTS)
def test_every_operator_keeps_the_rules_of_torch_library(make):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for name, arguments in cases(make):
        torch.library.opcheck(operator(name), arguments, test_utils=checks)


def planted(name: str, fake: Callable) -> Callable:
    """An operator that doubles a tensor and keeps its strides, with this fake."""

    def double(x: Tensor) -> Tensor:
        return x * 2

    custom = torch.library.custom_op(f"planted::{name}", double, mutates_args=())
    custom.register_fake(fake)
    return custom


@pytest.mark.parametrize(
    ("name", "fake"),
    [
        ("strides", lambda x: x.new_empty(x.shape)),
        ("dtype", lambda x: torch.empty_like(x, dtype=torch.float64)),
        ("shape", lambda x: torch.empty_like(x[1:])),
    ],
)
def test_a_fake_with_another_layout_is_caught(name, fake):
    call = planted(name, fake)
    arguments = (transposed(T, C),)
    assert fake_layout(call, arguments) != real_layout(call, arguments)
    honest = planted(f"{name}_honest", torch.empty_like)
    assert fake_layout(honest, arguments) == real_layout(honest, arguments)
