"""Attention over packed documents: the operator, its compiled form, and the choice of a backend."""

import sys
import types

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import train_gpt
from train_gpt import (
    ATTENTION_BACKENDS,
    ATTENTION_TOLERANCE,
    UsageError,
    attention,
    choose_attention,
)

CPU = torch.device("cpu")
LENGTHS = (1, 7, 7, 7, 30, 2, 16, 16)


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch):
    """Each test compiles afresh and leaves no backend behind."""
    monkeypatch.setattr(train_gpt, "ATTENTION", dict(train_gpt.ATTENTION))
    torch.compiler.reset()
    torch.manual_seed(0)


def offsets(lengths, capacity=None, device=CPU):
    """cu_seqlens of the lengths, padded to capacity + 1 entries."""
    cu = torch.tensor([0, *lengths]).cumsum(0)
    tail = cu[-1:].expand((capacity or len(lengths)) - len(lengths))
    return torch.cat((cu, tail)).to(torch.int32).to(device)


def draw(total, heads=4, kv_heads=2, width=16, dtype=torch.float64, device=CPU):
    """q, k, v as leaves, and a gradient for y."""
    q, k, v, grad = (
        torch.randn(total, n, width, dtype=dtype, device=device)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    return [x.requires_grad_() for x in (q, k, v)], grad


def run(leaves, grad, cu, max_seqlen=64, backend="sdpa", function=attention):
    """y, dq, dk, dv."""
    y = function(*leaves, cu, max_seqlen, backend)
    return y, *torch.autograd.grad(y, leaves, grad)


def masked_softmax(leaves, grad, lengths, queries=slice(None)):
    """y, dq, dk, dv of some queries, written out head by head.

    Every pair of tokens is scored, and the forbidden ones are masked.
    """
    q, k, v = leaves
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(q.device)
    position = torch.arange(q.size(0), device=q.device)
    allowed = (document[:, None] == document) & (position[:, None] >= position)
    heads = []
    for h in range(q.size(1)):
        kv = h // (q.size(1) // k.size(1))
        scores = q[:, h] @ k[:, kv].T / q.size(2) ** 0.5
        heads.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v[:, kv])
    y = torch.stack(heads, 1)[queries]
    return y, *torch.autograd.grad(y, leaves, grad[queries])


def assert_near(found, wanted, limit):
    for name, x, z in zip(("y", "dq", "dk", "dv"), found, wanted, strict=True):
        x, z = x.detach().double(), z.detach().double()
        error = float((x - z).norm() / z.norm())
        assert error <= limit, f"{name} is off by {error:.2e}, limit {limit:.0e}"


# --- The operator ---------------------------------------------------------------------------------


def test_packed_row_equals_its_documents_one_by_one():
    leaves, grad = draw(sum(LENGTHS))
    packed = run(leaves, grad, offsets(LENGTHS))
    parts, start = [], 0
    for n in LENGTHS:
        alone = [x.detach()[start : start + n].clone().requires_grad_() for x in leaves]
        parts.append(run(alone, grad[start : start + n], offsets([n])))
        start += n
    assert_near(packed, [torch.cat(x) for x in zip(*parts, strict=True)], 1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_token_sees_its_future_or_another_document(dtype):
    leaves, _ = draw(sum(LENGTHS), dtype=dtype)
    q, k, v = (x.detach() for x in leaves)
    cu = offsets(LENGTHS)
    before = attention(q, k, v, cu, 64, "sdpa")
    bounds = cu.tolist()
    for changed in (0, 1, 10, 25, 51, 60, 85):
        q2, k2, v2 = q.clone(), k.clone(), v.clone()
        for x in (q2, k2, v2):
            x[changed] += 1
        after = attention(q2, k2, v2, cu, 64, "sdpa")
        end = next(b for b in bounds if b > changed)
        assert torch.equal(after[:changed], before[:changed])
        assert torch.equal(after[end:], before[end:])
        assert (after[changed:end] != before[changed:end]).flatten(1).any(1).all()


def test_gradients_reach_neither_the_future_nor_another_document():
    leaves, _ = draw(sum(LENGTHS))
    y = attention(*leaves, offsets(LENGTHS), 64, "sdpa")
    token, start = 30, 22  # in the document of tokens 22..51
    gradients = torch.autograd.grad(y[token].sum(), leaves)
    for x, first in zip(gradients, (token, start, start), strict=True):
        assert x[:first].eq(0).all() and x[token + 1 :].eq(0).all()
        assert x[first : token + 1].ne(0).flatten(1).any(1).all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_matches_masked_softmax_written_by_hand(heads, kv_heads):
    leaves, grad = draw(sum(LENGTHS), heads, kv_heads)
    assert_near(run(leaves, grad, offsets(LENGTHS)), masked_softmax(leaves, grad, LENGTHS), 1e-14)


def test_long_documents_match_masked_softmax():
    lengths = (300, 1, 211)  # longer than one block of the flash kernels
    leaves, grad = draw(sum(lengths))
    assert_near(
        run(leaves, grad, offsets(lengths), 300), masked_softmax(leaves, grad, lengths), 1e-14
    )


def test_padded_tail_and_empty_segments_change_nothing():
    leaves, grad = draw(sum(LENGTHS))
    wanted = run(leaves, grad, offsets(LENGTHS))
    holes = (0, *LENGTHS[:2], 0, 0, *LENGTHS[2:])
    for cu, max_seqlen in (
        (offsets(LENGTHS, 100), 64),
        (offsets(holes, 20), 64),
        (offsets(LENGTHS), 4096),
    ):
        for x, z in zip(run(leaves, grad, cu, max_seqlen), wanted, strict=True):
            assert torch.equal(x, z)


def test_rows_of_equal_length_equal_a_batch():
    leaves, grad = draw(5 * 12)
    y, *_ = run(leaves, grad, offsets([12] * 5, 9))
    q, k, v = (x.unflatten(0, (5, 12)).transpose(1, 2) for x in leaves)
    batch = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(y, batch.transpose(1, 2).flatten(0, 1), rtol=1e-13, atol=1e-13)


def test_strides_do_not_matter():
    leaves, grad = draw(sum(LENGTHS))
    wanted = run(leaves, grad, offsets(LENGTHS))
    swapped = [
        x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in leaves
    ]
    assert_near(run(swapped, grad, offsets(LENGTHS)), wanted, 1e-14)
    fused = torch.cat([x.detach() for x in leaves], 1).requires_grad_()
    y = attention(*fused.split([4, 2, 2], 1), offsets(LENGTHS), 64, "sdpa")
    (fused_grad,) = torch.autograd.grad(y, fused, grad)
    assert_near((y, *fused_grad.split([4, 2, 2], 1)), wanted, 1e-14)
    # The gradient of a sum is an expanded scalar.
    total = attention(*leaves, offsets(LENGTHS), 64, "sdpa").sum()
    ones = torch.autograd.grad(total, leaves)
    for x, z in zip(ones, run(leaves, torch.ones_like(grad), offsets(LENGTHS))[1:], strict=True):
        torch.testing.assert_close(x, z, rtol=1e-13, atol=1e-13)


def test_gradcheck_in_float64():
    leaves, _ = draw(9, heads=2, kv_heads=1, width=4)
    cu = offsets([4, 0, 4, 1], 6)
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, cu, 4, "sdpa"), leaves)


def test_operator_keeps_the_rules_of_torch_library():
    leaves, _ = draw(sum(LENGTHS), dtype=torch.float32)
    cu = offsets(LENGTHS, 12)
    torch.library.opcheck(train_gpt.sdpa_varlen, (*leaves, cu, cu.clone(), 64))


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-6)]
)
def test_low_precision_is_near_float64(dtype, limit):
    lengths = (130, 1, 90, 90)
    leaves, grad = draw(sum(lengths), dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    found = run(leaves, grad, offsets(lengths, 8), 130)
    assert all(x.dtype == dtype for x in found)
    assert_near(found, masked_softmax(exact, grad.double(), lengths), limit)


def test_gradients_written_out_for_other_devices_match_autograd():
    q, k, v, grad = (torch.randn(3, n, 21, 8, dtype=torch.float64) for n in (6, 2, 2, 6))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    found = train_gpt.causal_gradients(grad, q, k, v)
    for x, z in zip(found, torch.autograd.grad(y, leaves, grad), strict=True):
        torch.testing.assert_close(x, z, rtol=1e-12, atol=1e-12)


def test_a_gpu_takes_one_segment_at_a_time_and_a_cpu_equal_neighbours_at_once():
    cu_queries, cu_keys = offsets([5, 5, 0, 2, 0]), offsets([7, 7, 3, 2, 0])

    def runs(merge):
        found = train_gpt.equal_runs(cu_queries, cu_keys, merge)
        return [(run.count, run.queries, run.keys) for run in found]

    last = (1, slice(10, 12), slice(17, 19))
    assert runs(True) == [(2, slice(0, 10), slice(0, 14)), last]
    assert runs(False) == [(1, slice(0, 5), slice(0, 7)), (1, slice(5, 10), slice(7, 14)), last]


@pytest.mark.parametrize("cu", [[0, 5, 9], [1, 5, 10], [0, 10], [0, 7, 3, 10]])
def test_offsets_that_do_not_fit_the_row_are_refused(cu):
    leaves, _ = draw(10)
    with pytest.raises(AssertionError, match="longest"):
        attention(*leaves, torch.tensor(cu, dtype=torch.int32), 8, "sdpa")


# --- Queries of some positions only: the last of each segment -------------------------------------


def draw_some(rng, segments, longest):
    """Lengths of segments, and how many of the last positions of each are queries."""
    lengths = [int(n) for n in rng.integers(0, longest, segments)]
    counts = [int(rng.choice([0, rng.integers(0, n + 1), n])) for n in lengths]
    return [*lengths, 2], [*counts, 1]


def at_ends(lengths, counts):
    """Positions of the queries."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [i for end, n in zip(ends, counts, strict=True) for i in range(end - n, end)]


def some_of(function, queries, leaves, grad):
    """y, dq (of all positions), dk, dv of some queries alone."""
    y = function(leaves[0][queries], *leaves[1:])
    return y, *torch.autograd.grad(y, leaves, grad[queries])


# Lengths and queries of the windows of adaptation, with padding and without.
WINDOWS = [([9, 7] * 3, [4, 0] * 3), ([16] * 3, [5] * 3)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1)])
def test_last_queries_of_segments_match_masked_softmax(seed, heads, kv_heads):
    if seed < len(WINDOWS):
        lengths, counts = WINDOWS[seed]
    else:
        rng = np.random.default_rng(seed)
        lengths, counts = draw_some(rng, 7, int(rng.choice([6, 40, 300])))
    leaves, grad = draw(sum(lengths), heads, kv_heads)
    queries = at_ends(lengths, counts)
    cu, few = offsets(lengths, 12), offsets(counts, 12)
    found = some_of(lambda *qkv: attention(*qkv, cu, 300, "sdpa", few), queries, leaves, grad)
    assert_near(found, masked_softmax(leaves, grad, lengths, queries), 1e-14)
    unasked = torch.repeat_interleave(torch.tensor(counts), torch.tensor(lengths)) == 0
    assert all(x[unasked].eq(0).all() for x in found[2:])


def test_as_many_queries_as_keys_is_the_usual_form_to_the_bit():
    leaves, grad = draw(sum(LENGTHS))
    cu = offsets(LENGTHS, 12)
    found = some_of(
        lambda *qkv: attention(*qkv, cu, 64, "sdpa", cu.clone()), slice(None), leaves, grad
    )
    assert all(torch.equal(x, z) for x, z in zip(found, run(leaves, grad, cu), strict=True))


def test_gradcheck_of_some_queries():
    (q, k, v), _ = draw(9, heads=2, kv_heads=1, width=4)
    cu, few = offsets([4, 0, 4, 1], 6), offsets([2, 0, 0, 1], 6)
    q = q.detach()[:3].requires_grad_()
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, cu, 4, "sdpa", few), (q, k, v))
    torch.library.opcheck(train_gpt.sdpa_varlen, (q, k, v, few, cu, 4))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-6)])
def test_low_precision_of_some_queries_is_near_float64(dtype, limit):
    lengths, counts = (130, 1, 90, 90), (48, 0, 90, 7)
    leaves, grad = draw(sum(lengths), dtype=dtype)
    queries = at_ends(lengths, counts)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    cu, few = offsets(lengths, 8), offsets(counts, 8)
    found = some_of(lambda *qkv: attention(*qkv, cu, 130, "sdpa", few), queries, leaves, grad)
    assert_near(found, masked_softmax(exact, grad.double(), lengths, queries), limit)


def test_gradients_of_some_queries_written_out_for_other_devices_match_autograd():
    q, k, v, grad = (
        torch.randn(3, h, n, 8, dtype=torch.float64) for h, n in ((6, 5), (2, 21), (2, 21), (6, 5))
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    seen = torch.ones(5, 21, dtype=torch.bool).tril(16)
    y = F.scaled_dot_product_attention(*leaves, attn_mask=seen, enable_gqa=True)
    found = train_gpt.causal_gradients(grad, q, k, v)
    for x, z in zip(found, torch.autograd.grad(y, leaves, grad), strict=True):
        torch.testing.assert_close(x, z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("few", [[0, 3, 4], [0, 6, 7], [1, 2, 7], [0, -1, 7]])
def test_queries_that_are_not_of_the_segments_are_refused(few):
    leaves, _ = draw(10)
    cu, few = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 10], few))
    with pytest.raises(AssertionError, match="longest"):
        attention(leaves[0][:7], *leaves[1:], cu, 8, "sdpa", few)


# --- The compiled graph ---------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_whole_gives_the_same_and_never_recompiles(compiler):
    graphs = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(attention, backend=graphs, fullgraph=True)
    leaves, grad = draw(64, dtype=torch.float32)
    for lengths in ([64], [16] * 4, [1, 2, 3, 58], [0, 30, 0, 34], [8] * 8):
        cu = offsets(lengths, 12)
        assert_near(run(leaves, grad, cu, function=compiled), run(leaves, grad, cu), 1e-6)
    assert graphs.frame_count == 1


def test_some_queries_compile_whole_for_every_number_of_them():
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, backend=graphs, fullgraph=True, dynamic=True)
    cases = [*WINDOWS, ([9, 7] * 3, [9, 0] * 3), ([20, 12] * 3, [4, 0] * 3)]
    for lengths, counts in cases:
        leaves, grad = draw(sum(lengths), dtype=torch.float32)
        queries = at_ends(lengths, counts)
        segments = offsets(lengths, 6), 64, "sdpa", offsets(counts, 6)

        def results(function, segments=segments, case=(queries, leaves, grad)):
            return some_of(lambda *qkv: function(*qkv, *segments), *case)

        assert_near(results(compiled), results(attention), 1e-6)
    assert graphs.frame_count == 1


# --- The choice of a backend ----------------------------------------------------------------------


# Stand-ins have the signatures of the functions that they stand for.
# ruff: disable[PLR0913]
def flash_module(monkeypatch, name, wrong=0.0, extra=False):
    """Puts a stand-in for a flash attention package under `name`, called by its keywords.

    wrong: y is off by this factor. extra: it returns the logsumexp as well.
    """

    def flash_attn_varlen_func(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False
    ):
        assert causal and max_seqlen_q == max_seqlen_k
        y, lse = train_gpt.sdpa_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q)
        y = y * (1 + wrong)
        return (y, lse) if extra else y

    module = types.ModuleType(name)
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, name, module)


def varlen_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):
    assert is_causal and max_q == max_k
    return train_gpt.sdpa_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q)[0]


def varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
    assert window_size == (-1, 0)
    return varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=True)


def varlen_2_12(
    query, key, value, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa
    return varlen_2_11(query, key, value, cu_q, cu_k, max_q, max_k, window_size=window_size)


# ruff: enable[PLR0913]


def hide(monkeypatch, *backends):
    for name in backends:
        monkeypatch.setitem(sys.modules, ATTENTION_BACKENDS[name].module, None)


def test_auto_takes_sdpa_on_a_cpu_and_says_why():
    name, log = choose_attention("auto", CPU, torch.bfloat16)
    assert name == "sdpa"
    assert log == ["attention_backend:sdpa (the others need a GPU)"]


@pytest.mark.parametrize("dtype", list(ATTENTION_TOLERANCE))
def test_sdpa_passes_its_own_check_in_every_float_type(dtype):
    assert choose_attention("sdpa", CPU, dtype) == ("sdpa", ["attention_backend:sdpa"])


@pytest.mark.parametrize("name", ["fa3", "fa4", "fa2", "torch"])
def test_named_backend_that_cannot_run_is_one_clear_line(name, monkeypatch):
    hide(monkeypatch, "fa3", "fa4", "fa2")
    with pytest.raises(UsageError) as caught:
        choose_attention(name, CPU, torch.bfloat16)
    text = str(caught.value)
    assert text.startswith(f"ATTENTION_BACKEND={name}: ") and text.endswith("works here: sdpa")
    assert "\n" not in text and caught.value.__cause__ is None
    assert ATTENTION_BACKENDS[name].module in text or name == "torch"


def test_unknown_backend_is_refused_by_name(monkeypatch):
    hide(monkeypatch, "fa3", "fa4", "fa2", "torch")
    with pytest.raises(
        UsageError, match="^ATTENTION_BACKEND=fa5: no such backend; works here: sdpa$"
    ):
        choose_attention("fa5", CPU, torch.float32)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("name", ["fa3", "fa4", "fa2"])
def test_right_flash_package_is_chosen_with_or_without_logsumexp(name, extra, monkeypatch):
    flash_module(monkeypatch, ATTENTION_BACKENDS[name].module, extra=extra)
    assert choose_attention(name, CPU, torch.float32) == (name, [f"attention_backend:{name}"])
    leaves, grad = draw(sum(LENGTHS))
    assert_near(
        run(leaves, grad, offsets(LENGTHS), backend=name),
        masked_softmax(leaves, grad, LENGTHS),
        1e-14,
    )


@pytest.mark.parametrize("varlen_attn", [varlen_2_10, varlen_2_11, varlen_2_12])
def test_every_version_of_torch_varlen_is_called_as_it_expects(varlen_attn, monkeypatch):
    name = ATTENTION_BACKENDS["torch"].module
    module = types.ModuleType(name)
    module.varlen_attn = varlen_attn
    monkeypatch.setitem(sys.modules, name, module)
    assert choose_attention("torch", CPU, torch.bfloat16)[0] == "torch"


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_backend_with_wrong_numbers_is_refused(wrong, monkeypatch):
    hide(monkeypatch, "fa4", "fa2", "torch")
    flash_module(monkeypatch, "flash_attn_interface", wrong=wrong)
    with pytest.raises(
        UsageError, match="ATTENTION_BACKEND=fa3: relative error .* works here: sdpa"
    ):
        choose_attention("fa3", CPU, torch.bfloat16)


def test_backend_with_wrong_gradients_is_refused(monkeypatch):
    flash_module(monkeypatch, "flash_attn_interface")
    right = sys.modules["flash_attn_interface"].flash_attn_varlen_func

    def wrong(q, k, v, **rest):
        """y is right, and dk is half of what it should be."""
        return right(q, k.detach() + 0.5 * (k - k.detach()), v, **rest)

    monkeypatch.setattr(sys.modules["flash_attn_interface"], "flash_attn_varlen_func", wrong)
    reason = train_gpt.check_attention("fa3", CPU, torch.float32)
    assert reason == "relative error 5.0e-01 against masked SDPA"


def test_backend_that_takes_the_last_queries_for_the_first_is_refused(monkeypatch):
    """flash-attn before 2.1 did; it shows only where there are fewer queries than keys."""
    flash_module(monkeypatch, "flash_attn")
    right = sys.modules["flash_attn"].flash_attn_varlen_func

    def top_left(q, k, v, *, cu_seqlens_q, cu_seqlens_k, **rest):
        index = torch.arange(len(q), dtype=torch.int32)
        segment = torch.searchsorted(cu_seqlens_q, index, right=True) - 1
        seen = cu_seqlens_k[segment] + index - cu_seqlens_q[segment]
        offsets = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_q)
        return right(q, k[seen], v[seen], **offsets, **rest)

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", top_left)
    reason = train_gpt.check_attention("fa2", CPU, torch.float32)
    assert reason.startswith("relative error ") and reason.endswith("against masked SDPA")
    leaves, grad = draw(sum(LENGTHS))
    assert_near(
        run(leaves, grad, offsets(LENGTHS), backend="fa2"),
        masked_softmax(leaves, grad, LENGTHS),
        1e-14,
    )


def test_backend_that_breaks_the_graph_is_refused(monkeypatch):
    flash_module(monkeypatch, "flash_attn")
    right = sys.modules["flash_attn"].flash_attn_varlen_func

    def breaking(*inputs, **rest):
        torch._dynamo.graph_break()
        return right(*inputs, **rest)

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", breaking)
    assert train_gpt.check_attention("fa2", CPU, torch.float32)


@pytest.mark.parametrize(
    "error", [OSError("undefined symbol: _ZN3c10"), RuntimeError("first line\nsecond line")]
)
def test_package_that_fails_to_import_is_a_reason_not_a_crash(error, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr(train_gpt.importlib, "import_module", fail)
    assert train_gpt.check_attention("fa3", CPU, torch.float32) == str(error).splitlines()[0]


def test_auto_walks_the_table_and_logs_each_refusal(monkeypatch):
    refused = {
        "fa3": "No module named 'flash_attn_interface'",
        "fa4": "relative error 1.0e+00",
        "fa2": "",
    }
    monkeypatch.setattr(train_gpt, "check_attention", lambda name, device, dtype: refused[name])
    name, log = choose_attention("auto", torch.device("cuda"), torch.bfloat16)
    assert name == "fa2"
    assert log == [f"fa3: {refused['fa3']}", f"fa4: {refused['fa4']}", "attention_backend:fa2"]


def test_auto_never_ends_at_a_loop_over_documents_on_a_gpu_in_bf16(monkeypatch):
    reasons = {name: f"no {name}" for name in ATTENTION_BACKENDS} | {"sdpa": ""}
    monkeypatch.setattr(train_gpt, "check_attention", lambda name, *_: reasons[name])
    gpu = torch.device("cuda")
    with pytest.raises(UsageError, match="^ATTENTION_BACKEND=auto: no torch; works here: sdpa$"):
        choose_attention("auto", gpu, torch.bfloat16)
    for requested, dtype in (("sdpa", torch.bfloat16), ("auto", torch.float32)):
        name, _ = choose_attention(requested, gpu, dtype)
        assert name == "sdpa"


def test_choice_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    choose_attention("sdpa", CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", list(ATTENTION_BACKENDS))
def test_backend_on_gpu_is_near_float64(backend, dtype):
    device = torch.device("cuda")
    reason = train_gpt.check_attention(backend, device, dtype)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    lengths = (1, 700, 64, 64, 0, 129, 333)
    leaves, grad = draw(sum(lengths), 8, 4, 64, dtype, device)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wanted = masked_softmax(exact, grad.double(), lengths)
    compiled = torch.compile(attention, fullgraph=True)
    for function in (attention, compiled):
        for capacity in (len(lengths), 64):
            found = run(leaves, grad, offsets(lengths, capacity, device), 1024, backend, function)
            assert_near(found, wanted, ATTENTION_TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_on_gpu_finds_a_backend_in_every_float_type():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        name, log = choose_attention("auto", torch.device("cuda"), dtype)
        assert name in ATTENTION_BACKENDS and log[-1] == f"attention_backend:{name}"
        # In bf16 sdpa, which loops over documents, would take seconds a step.
        assert name != "sdpa" or dtype != torch.bfloat16, log
