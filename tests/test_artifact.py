"""The artifact: allocation of bytes, entropy coder, fit to a limit, a reader that trusts no one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import math
import pickle
import sys
import time
import tracemalloc
import zlib
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, on_ranks, tiny_config
from test_compression import (
    ONE,
    SMALL,
    correlated,
    gptq_quantize,
    quantize,
    random_model,
    random_rows,
    weighted_error,
)

import train_gpt as tg

sys.path.insert(0, str(ROOT / "bench"))
import artifact as bench

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def calibrated(cfg: tg.Config) -> tuple[tg.GPT, dict, dict]:
    """A random network, its Hessians and its sensitivities."""
    model = random_model(cfg)
    rows = random_rows(cfg, 4)
    hessians = tg.collect_hessians(model, cfg.plans[1], rows, ONE)
    loss = tg.collect_sensitivities(model, model, cfg.plans[1], rows, hessians, ONE)
    return model, hessians, loss


def row_levels(codes: list[np.ndarray]) -> list[np.ndarray]:
    return [tg.row_levels(q) for q in codes]


def no_exponents(codes: list[np.ndarray]) -> list[np.ndarray]:
    """Exponents of column scales that are all 1."""
    return [np.zeros((len(q), q.shape[2]), np.int8) for q in codes]


def codes_and_exponents(
    shapes: list[tuple[int, int, int]], uneven: float, seed: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Codes of a spread of 2.4; `uneven` is how much rows and columns differ, in log units.

    With them the exponents of the column scales that weights of even columns must have had.
    """
    rng = np.random.default_rng(seed)
    codes = []
    exponents = []
    for n, rows, cols in shapes:
        row_size = uneven * rng.normal(size=(n, rows, 1))
        col_size = uneven * rng.normal(size=(n, 1, cols))
        values = 2.4 * np.exp(row_size + col_size) * rng.normal(size=(n, rows, cols))
        codes.append(np.clip(np.rint(values), -1023, 1023).astype(np.int16))
        exponents.append(np.rint(-4 * col_size[:, 0] / math.log(2)).astype(np.int8))
    return codes, exponents


def gaussian_codes(
    shapes: list[tuple[int, int, int]], uneven: float, seed: int = 0
) -> list[np.ndarray]:
    """The codes of codes_and_exponents."""
    return codes_and_exponents(shapes, uneven, seed)[0]


def entropy_bytes(codes: list[np.ndarray]) -> float:
    """Order-0 entropy of the codes."""
    _, counts = np.unique(np.concatenate([q.ravel() for q in codes]), return_counts=True)
    return -(counts * np.log2(counts / counts.sum())).sum() / 8


def test_entropy_in_the_report_is_that_of_the_codes():
    codes = gaussian_codes([(2, 30, 20), (1, 7, 5)], 0.5)
    assert tg.code_entropy_bytes(codes) == pytest.approx(entropy_bytes(codes), rel=1e-12)


# --- Entropy coder --------------------------------------------------------------------------------
@pytest.mark.parametrize("uneven", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(
    "shapes", [[(1, 1, 1)], [(3, 7, 5), (2, 1, 40)], [(2, 130, 33), (1, 17, 64), (5, 3, 8)]]
)
def test_ans_returns_every_code(shapes, uneven):
    codes, exponents = codes_and_exponents(shapes, uneven)
    codes[0][0, 0] = 0
    codes[-1].flat[0] = -1024
    levels = row_levels(codes)
    data = tg.ans_encode(codes, levels, exponents)
    decoded = tg.ans_decode(data, shapes, levels, exponents)
    for expected, q in zip(codes, decoded, strict=True):
        assert np.array_equal(q, expected)


def test_order_of_coding_is_row_by_row_of_as_many_matrices_as_there_are_states():
    """The example in the docstring: three matrices of two rows, states for two matrices."""
    codes = [np.arange(24, dtype=np.int16).reshape(3, 2, 4), np.zeros((1, 1, 8), np.int16)]
    items = tg.coding_order(codes, row_levels(codes), no_exponents(codes))
    seen = [q.copy() for q, _, _ in items]
    expected = [codes[0][:2, 0], codes[0][:2, 1], codes[0][2:, 0], codes[0][2:, 1], codes[1][:, 0]]
    for q, rows in zip(seen, expected, strict=True):
        assert np.array_equal(q, rows)


def ans_bytes(codes: list[np.ndarray], exponents: list[np.ndarray] | None = None) -> int:
    """Without the tables, whose size hardly depends on the number of codes."""
    data = tg.ans_encode(codes, row_levels(codes), exponents or no_exponents(codes))
    return len(data) - int.from_bytes(data[:4], "little")


def test_ans_models_rows_and_columns_below_the_order_0_entropy():
    shapes = [(2, 512, 256), (1, 1024, 256)]
    even = gaussian_codes(shapes, 0.0)
    uneven = gaussian_codes(shapes, 0.5)
    assert ans_bytes(even) < 1.012 * entropy_bytes(even)
    assert ans_bytes(uneven) < 0.93 * entropy_bytes(uneven)


def test_ans_models_columns_whose_mean_is_not_zero():
    plain = gaussian_codes([(2, 512, 256)], 0.0)
    leaning = [plain[0] + np.random.default_rng(1).integers(-3, 4, (2, 1, 256)).astype(np.int8)]
    added_entropy = entropy_bytes(leaning) - entropy_bytes(plain)
    assert ans_bytes(leaning) - ans_bytes(plain) < 0.11 * added_entropy


def test_column_scales_tell_every_coder_how_large_codes_are_before_the_first_row():
    codes, exponents = codes_and_exponents([(12, 16, 256)], 0.7)
    assert ans_bytes(codes, exponents) < 0.97 * ans_bytes(codes)
    levels = row_levels(codes)
    for codec in ("zstd", "lzma"):
        stored = tg.pack_codes(codec, codes, levels, exponents)
        assert len(stored) < 0.99 * len(tg.pack_codes(codec, codes, levels, no_exponents(codes)))
        (restored,) = tg.unpack_codes(codec, stored, [codes[0].shape], levels, exponents)
        assert np.array_equal(restored, codes[0])


def test_contexts_use_integers_that_no_machine_rounds_otherwise():
    # Whole powers of two are exact anywhere.
    exact = [2 ** (16 + (t + 0.5) / 8) for t in range(-36, 24)]
    exact += [2 ** (16 - (k - 65) / 8) for k in range(1, 190) if (k - 65) % 8]
    exact += [2 ** (16 - k / 4) for k in range(256) if k % 4]
    assert min(abs(x % 1 - 0.5) for x in exact) > 1e-6
    tables = (tg.OFFSET_EDGES, tg.INVERSE_LEVEL, tg.INVERSE_COLUMN_SCALE)
    assert {table.dtype for table in tables} == {np.dtype(np.int64)}


# --- Allocation -----------------------------------------------------------------------------------
def matrix_weight(model: tg.GPT, matrix: tg.Matrix) -> torch.Tensor:
    """(rows, cols) of one of the matrices that become integers."""
    shape = tg.bank_shapes(model.cfg)[matrix.bank]
    return model.get_parameter(matrix.bank).detach().view(shape)[matrix.index]


def test_published_steps_are_kept_to_the_bit_by_the_published_presets():
    cfg = tiny_config(quantizer="gptq", artifact_limit_bytes=0, column_scales=False)
    model, hessians, _ = calibrated(cfg)
    packed = quantize(model, hessians, ONE)
    for matrix in tg.quantised_matrices(cfg):
        weight = matrix_weight(model, matrix)[None]
        hessian = hessians[matrix.input_key][None]
        if matrix.bank == "tok_emb":
            (q,), (scale,) = gptq_quantize(weight, hessian, 15.0, 7)
        else:
            (q,), (scale,) = gptq_quantize(weight, hessian, 12.85, 6)
        assert torch.equal(packed.scales[matrix.bank][matrix.index], scale)
        assert (packed.codes[matrix.bank][matrix.index] != q).double().mean() < 1e-3
    for preset in ("pr1530", "pr1560"):
        chosen = tg.PRESETS[preset]
        assert (chosen["quantizer"], chosen["artifact_limit_bytes"]) == ("gptq", 0)


def test_clip_of_a_group_wins_over_that_of_the_matrices():
    cfg = tiny_config(attn_clip_sigmas=13.0, mlp_clip_sigmas=11.0, embed_clip_sigmas=14.0)
    clips = {
        (matrix.bank, matrix.layer): tg.clip_sigmas_of(cfg, matrix)
        for matrix in tg.quantised_matrices(cfg)
    }
    assert clips["qo_bank", 0] == clips["kv_bank", 3] == 13.0
    assert clips["up_bank", 0] == clips["down_bank", 3] == 11.0
    assert clips["tok_emb", 0] == 14.0
    plain = tiny_config()
    default = {tg.clip_sigmas_of(plain, matrix) for matrix in tg.quantised_matrices(plain)}
    assert default == {12.85, 15.0}


def loss_of_rounding(
    model: tg.GPT, packed: tg.Quantised, hessians: dict, sensitivities: dict
) -> float:
    """Sum over rows of sensitivity * e H e^T: nats, up to one factor."""
    total = 0.0
    for matrix in tg.quantised_matrices(model.cfg):
        scale = packed.scales[matrix.bank][matrix.index].float()[:, None]
        column_scale = 2.0 ** (packed.columns[matrix.input_key] / 4)
        restored = packed.codes[matrix.bank][matrix.index].float() * scale * column_scale
        e = matrix_weight(model, matrix) - restored
        errors = ((e @ hessians[matrix.input_key]) * e).sum(-1)
        total += float((errors * sensitivities[matrix.bank][matrix.index]).sum())
    return total


def test_allocation_costs_less_loss_than_published_steps_of_the_same_entropy():
    cfg = tiny_config(quantizer="allocated")
    model, hessians, sensitivities = calibrated(cfg)
    # A matrix whose steps the published rule makes too coarse.
    model.get_parameter("up_bank").data[0] *= 3
    ours = tg.Quantizer(model, hessians, sensitivities, ONE)
    published = tg.Quantizer(model, hessians, None, ONE)
    loss = loss_of_rounding(model, ours.solve(ours.default_theta), hessians, sensitivities)
    published_loss = loss_of_rounding(model, published.solve(1.0), hessians, sensitivities)
    assert loss < 0.8 * published_loss
    assert abs(ours.predicted_bytes(ours.default_theta) / published.predicted_bytes(1.0) - 1) < 0.01


def test_rows_without_influence_on_the_loss_become_zeros_and_costly_ones_get_finer_steps():
    cfg = tiny_config(quantizer="allocated")
    model, hessians, sensitivities = calibrated(cfg)
    sensitivities["up_bank"][0, 3] = 0.0
    sensitivities["up_bank"][0, 4] *= 64
    quantised = quantize(model, hessians, ONE, sensitivities)
    q, scale = quantised.codes["up_bank"], quantised.scales["up_bank"]
    assert not q[0, 3].any()
    assert q[0, 4].any()
    assert scale[0, 4] < 0.2 * scale[0].median()
    quantizer = tg.Quantizer(model, hessians, sensitivities, ONE)
    theta = quantizer.default_theta
    rows = quantizer.rows["up_bank"]
    rows.cost[0, 5] = 0.5 * theta / rows.power[0, 5]
    rows.cost[0, 6] = 3 * theta / rows.power[0, 6]
    step = rows.steps(theta)[0]
    deviation = rows.power[0].sqrt()
    assert step[5] > 50 * deviation[5]  # even as zeros it costs less than theta
    # 12 theta / (cost - theta / power) = 12 theta / (3 theta - theta) of its power
    assert abs(step[6] / (math.sqrt(6) * deviation[6]) - 1) < 0.05
    logs = 8 * scale.double().log2()
    assert (logs - logs.round()).abs().max() < 0.01  # steps of 2^(1/8), stored as fp16


def test_sensitivity_is_the_mean_square_of_the_gradient_by_a_rows_outputs():
    cfg = tiny_config()
    model, hessians, sensitivities = calibrated(cfg)
    assert sensitivities.keys() == tg.bank_shapes(cfg).keys()
    rows = random_rows(cfg, 4)
    squares = 0.0
    for row in rows:
        model.zero_grad()
        model(row, cfg.plans[1]).sum().backward()
        squares = squares + model.up_bank.grad[2].square().sum(-1)
    expected = squares / hessians["mlp_in", 2].trace()
    assert torch.allclose(sensitivities["up_bank"][2], expected, rtol=1e-4)
    h = hessians["head_in", 0]
    assert torch.linalg.eigvalsh(h).min() > -1e-6 * h.trace()
    plain = tg.collect_hessians(model, cfg.plans[1], rows, ONE)["head_in", 0]
    # Both roles of the tied table, at the scale of the head.
    assert abs(h.trace() / plain.trace() - 1) < 1e-4
    assert (h - plain).norm() > 0.01 * plain.norm()


def test_solver_spread_predicts_the_weighted_error_of_a_fine_step():
    weight, hessian = correlated(1, 64, 96)
    ones = torch.ones(1, 96)
    step = 0.05 * weight.std(-1)
    solver = tg.GptqSolver.prepare(weight, hessian)
    error = weighted_error(weight, solver.solve(step, ones, 127).float(), step, hessian)
    spread = 96 * solver.error_power(ones)[0]
    assert 0.8 < float(error / (spread * step.square().sum(-1) / 12)) < 1.1


# --- Column scales --------------------------------------------------------------------------------
def uneven_inputs(hessian: torch.Tensor, spread: float) -> torch.Tensor:
    """The Hessian after each input is multiplied by a random number; the spread is of its log."""
    rng = torch.Generator().manual_seed(len(hessian))
    size = (spread * torch.randn(len(hessian), generator=rng)).exp()
    return hessian * size[:, None] * size


def test_column_scales_are_the_roots_of_two_rounded_to_fp32():
    k = np.arange(-127, 128)
    expected = np.array([np.float32(2.0 ** (x / 4)) for x in k.tolist()])
    assert np.array_equal(tg.column_scales(k.astype(np.int8)), expected)
    assert tg.column_scales(k.astype(np.int8)).dtype == np.float32


def test_exponents_even_out_the_factor_and_inputs_without_correlation_get_none():
    cfg = tiny_config()
    model, hessians, _ = calibrated(cfg)
    # The third input of a layer was never active; a table that is looked up has the identity.
    hessians["mlp_in", 1][2] = hessians["mlp_in", 1][:, 2] = 0
    hessians["head_in", 0] = torch.eye(cfg.model_dim)
    exponents = tg.Quantizer(model, hessians, None, ONE).columns
    assert list(exponents) == list(tg.column_shapes(cfg))
    assert not exponents["head_in", 0].any()
    for key, k in exponents.items():
        order, dead, lower = tg.InputFactor.of(hessians[key])
        octaves = lower.diagonal().log2()
        # Rounding to quarters of an octave moves a scale by an eighth of an octave at most.
        assert (k[order] / 4 + octaves - octaves.mean()).abs().max() < 0.1251, key
        assert abs(float(k.float().mean())) < 0.5, key
        assert int(dead.sum()) == (key == ("mlp_in", 1))
    assert exponents["attn_in", 0].unique().numel() > 3


def test_column_scales_of_one_change_no_code(monkeypatch):
    cfg = tiny_config(column_scales=False)
    model, hessians, sensitivities = calibrated(cfg)
    expected = quantize(model, hessians, ONE, sensitivities)
    ones = {
        key: torch.zeros(shape, dtype=torch.int8) for key, shape in tg.column_shapes(cfg).items()
    }
    monkeypatch.setattr(tg.Quantizer, "find_columns", lambda self: ones)
    model.cfg = dataclasses.replace(cfg, column_scales=True)
    for part, other in zip(expected, quantize(model, hessians, ONE, sensitivities), strict=True):
        for key, values in part.items():
            assert torch.equal(values, other[key]), key


def test_column_scales_save_the_bits_of_the_closed_form_at_equal_loss():
    """1/2 log2 of the arithmetic over the geometric mean of L_jj^2, for fine steps."""
    weight, hessian = correlated(1, 256, 96)
    hessian = uneven_inputs(hessian[0], 0.6)[None]
    solver = tg.GptqSolver.prepare(weight, hessian)
    squares = solver.upper.diagonal(dim1=1, dim2=2).square()
    scale = torch.empty(1, 96)
    scale[0, solver.order[0]] = squares[0].rsqrt() * squares.log().mean().div(2).exp()

    def bits_and_loss(scale: torch.Tensor) -> tuple[float, float]:
        step = 0.02
        q = solver.solve(torch.full((1, 256), step), scale, 127)
        # The entropy of every column by itself: what a coder needs that knows the columns.
        entropy = [tg.code_entropy_bytes([q[0, :, j].numpy()]) for j in range(96)]
        error = weight - q * step * scale[:, None]
        loss = ((error @ hessian[0]) * error).sum()
        return 8 * sum(entropy) / q.numel(), 0.5 * math.log2(loss)

    plain_bits, plain_loss = bits_and_loss(torch.ones(1, 96))
    bits, loss = bits_and_loss(scale)
    saved = plain_bits + plain_loss - bits - loss
    closed_form = 0.5 * math.log2(squares.mean() / squares.log().mean().exp())
    assert closed_form > 0.3
    assert abs(saved - closed_form) < 0.1


def test_a_column_that_costs_most_stays_in_range_and_leaves_the_others_their_bits():
    cfg = tiny_config(quantizer="allocated")
    model, hessians, sensitivities = calibrated(cfg)
    size = torch.ones(cfg.model_dim)
    size[3] = 300
    hessians["mlp_in", 1] *= size[:, None] * size
    quantizer = tg.Quantizer(model, hessians, sensitivities, ONE)
    num_weights = sum(math.prod(shape) for shape in quantizer.shapes.values())
    losses = []
    for bits in (2, 3, 4):
        quantised = quantizer.solve(quantizer.theta_for(bits * num_weights / 8))
        assert quantised.codes["up_bank"][1].abs().max() < tg.ALLOCATED_QMAX["ans"]
        losses.append(loss_of_rounding(model, quantised, hessians, sensitivities))
    # One more bit a weight leaves a quarter of the loss.
    assert all(more > 3 * less for more, less in zip(losses, losses[1:], strict=False))


def test_a_row_that_the_loss_notices_most_gets_integers_beyond_a_byte_if_the_coder_takes_them():
    cfg = tiny_config(quantizer="allocated")
    model, hessians, sensitivities = calibrated(cfg)
    sensitivities["tok_emb"][0, 3] *= 1e6
    losses = {}
    for compressor in ("zstd", "ans"):
        model.cfg = dataclasses.replace(cfg, compressor=compressor)
        quantizer = tg.Quantizer(model, hessians, sensitivities, ONE)
        num_weights = sum(math.prod(shape) for shape in quantizer.shapes.values())
        quantised = quantizer.solve(quantizer.theta_for(3 * num_weights / 8))
        largest = max(int(q.abs().max()) for q in quantised.codes.values())
        assert largest > 127 if compressor == "ans" else largest <= 127
        data = tg.pack_artifact(model, quantised, {})
        _, arrays = tg.open_artifact(data, Path("file"))
        assert all((q == quantised.codes[bank].numpy()).all() for bank, q in arrays.codes.items())
        losses[compressor] = loss_of_rounding(model, quantised, hessians, sensitivities)
    assert losses["ans"] < 0.9 * losses["zstd"]


def test_predicted_bits_count_the_errors_that_the_solver_makes_up_for():
    weight, hessian = correlated(1, 512, 96)
    ones = torch.ones(1, 96)
    solver = tg.GptqSolver.prepare(weight, hessian)
    _, feedback = solver.error_power(ones)
    power = weight.square().mean(-1)
    step = power.sqrt()
    rows = tg.BankRows(
        published_step=step,
        power=power,
        column_power=tg.by_column_group(ones, ones),
        feedback=tg.by_column_group(ones, feedback),
        largest=weight.abs().amax(-1),
        cost=None,
        qmax=127,
    )
    q = solver.solve(step, ones, 127)
    entropy = sum(tg.code_entropy_bytes([q[0, :, j].numpy()]) for j in range(96))
    bits = 8 * entropy / q.numel()
    without = rows._replace(feedback=torch.zeros_like(rows.feedback))
    assert abs(float(rows.entropy_bits(step).mean()) - bits) < 0.05
    assert float(without.entropy_bits(step).mean()) < bits - 0.1


def test_allocation_over_rows_and_columns_costs_less_than_over_rows_at_equal_bytes():
    model, hessians, sensitivities = fitting_model()
    hessians = {key: uneven_inputs(hessian, 1.0) for key, hessian in hessians.items()}
    losses = {}
    for columns in (False, True):
        cfg = dataclasses.replace(model.cfg, column_scales=columns, artifact_limit_bytes=0)
        model.cfg = cfg
        quantizer = tg.Quantizer(model, hessians, sensitivities, ONE)
        sizes = []
        for budget in (30_000, 40_000, 50_000):
            quantised = quantizer.solve(quantizer.theta_for(budget))
            loss = loss_of_rounding(model, quantised, hessians, sensitivities)
            sizes.append((len(tg.pack_artifact(model, quantised, {})), math.log(loss)))
        losses[columns] = np.interp(50_000, *zip(*sizes, strict=True))
    assert losses[True] < losses[False] + math.log(0.55)


# --- Fit ------------------------------------------------------------------------------------------
@cache
def fitting_model() -> tuple[tg.GPT, dict, dict]:
    """A network whose artifact has 40 to 110 KB."""
    cfg = tiny_config(
        model_dim=64, num_heads=4, mlp_mult=4, quantizer="allocated", compressor="ans"
    )
    return calibrated(cfg)


def fitted(limit: int, ranks: tg.Ranks = ONE, **changes: object) -> bytes:
    """Its artifact under a limit for the model alone, in bytes."""
    model, hessians, sensitivities = fitting_model()
    limit_with_code = limit + tg.CODE_BYTES
    model.cfg = dataclasses.replace(model.cfg, artifact_limit_bytes=limit_with_code, **changes)
    if model.cfg.quantizer != "allocated":
        sensitivities = None
    quantizer = tg.Quantizer(model, hessians, sensitivities, ranks)
    return tg.fit_artifact(quantizer, model, {}, lambda line: None)


@pytest.mark.parametrize(
    "limit", [40_000, 53_211, 60_001, 66_666, 72_345, 80_000, 87_654, 93_000, 101_010, 110_000]
)
def test_model_lands_within_4_kb_under_any_limit(limit):
    assert limit - 4096 < len(fitted(limit, quantizer="allocated", compressor="ans")) <= limit


@pytest.mark.parametrize(
    ("quantizer", "compressor"), [("gptq", "zstd"), ("allocated", "zstd"), ("gptq", "ans")]
)
def test_fit_serves_every_quantizer_and_compressor(quantizer, compressor):
    for limit in (70_000, 90_000):
        data = fitted(limit, quantizer=quantizer, compressor=compressor)
        assert limit - 4096 < len(data) <= limit


@pytest.mark.parametrize(
    ("share", "finest", "rounds"), [(0.9, 1e9, 4), (1.1, 1e9, 4), (0.9, 200_000, 1)]
)
def test_fit_of_a_large_model_is_done_when_4_kb_or_no_bits_are_left(
    monkeypatch, share, finest, rounds
):
    """At 16 MB the first guess leaves more than the 4 KB that a tiny model may leave over."""
    cfg = tiny_config(artifact_limit_bytes=1_000_000 + tg.CODE_BYTES)
    monkeypatch.setattr(tg, "fitted_bytes", lambda cfg: 1_000_000)
    quantizer = SimpleNamespace(
        finest_bytes=finest,
        ranks=ONE,
        theta_for=lambda budget: budget,
        solve=lambda budget: budget,
    )

    def pack(model: SimpleNamespace, budget: float, meta: dict) -> bytes:
        return bytes(int(share * budget) + 5_000)

    monkeypatch.setattr(tg, "pack_artifact", pack)
    lines = []
    data = tg.fit_artifact(quantizer, SimpleNamespace(cfg=cfg), {}, lines.append)
    assert len(lines) <= rounds
    if finest < 1e9:
        assert len(data) == 185_000
    else:
        assert 1_000_000 - 4096 < len(data) <= 1_000_000


def test_steps_stay_within_what_fp16_holds_with_all_its_bits():
    """Below 2^-14 a scale would lose bits, beyond 65504 it would be infinite."""
    power = torch.tensor([[1e-20, 1.0, 1e12]])
    largest = torch.tensor([[1e-10, 1.0, 1e6]])
    rows = tg.BankRows(
        published_step=power,
        power=power,
        column_power=torch.ones(1, 1),
        feedback=torch.zeros(1, 1),
        largest=largest,
        cost=torch.ones(1, 3),
        qmax=127,
    )
    (fine,) = rows.steps(1e-30).tolist()
    (coarse,) = rows.steps(1e30).tolist()
    assert fine[0] == coarse[0] == 2.0**-14
    assert coarse[2] == 2.0**15
    # The largest weight must fit into 127 steps.
    assert fine[1:] == [2.0 ** (round(8 * math.log2(x / 127)) / 8) for x in (1.0, 1e6)]


def test_published_steps_of_any_theta_are_numbers_that_fp16_holds():
    weight = torch.tensor([[[0.0, 0.0], [1.0, -1.0], [1e-9, 0.0]]])
    rows = tg.BankRows(
        published_step=tg.clip_steps(weight, 12.85, 31).float(),
        power=weight.square().mean(-1).clamp_min(1e-20),
        column_power=torch.ones(1, 1),
        feedback=torch.zeros(1, 1),
        largest=weight.abs().amax(-1),
        cost=None,
        qmax=31,
    )
    for theta in (2.0**-140, 1.0, 2.0**60):
        steps = rows.steps(theta)
        assert (steps >= tg.FP16_TINY).all() and steps.isfinite().all()
        assert torch.equal(steps, steps.half().float())
        assert rows.entropy_bits(steps).isfinite().all()


def test_no_table_of_the_coder_and_no_level_of_a_row_lies_where_rounding_could_differ():
    k = np.arange(256)
    fixed = tg.FIXED_POINT
    inverse = fixed * 2.0 ** ((tg.UNIT_LEVEL - k[1:]) / tg.LEVELS_PER_OCTAVE)
    column = fixed * 2.0 ** (-k / tg.SCALES_PER_OCTAVE)
    edges = fixed * 2.0 ** ((np.arange(-36, 24) + 0.5) / tg.LEVELS_PER_OCTAVE)
    for values in (inverse, column, edges):
        # A whole power of two is exact everywhere.
        is_exact = values * 2**30 % 1 == 0
        assert (is_exact | (abs(values % 1 - 0.5) > 1e-9 * values)).all()
    # The width of the record's products, and of its MLP.
    for columns in (512, 2048):
        sums = np.arange(1, 127 * columns + 1)
        levels = tg.LEVELS_PER_OCTAVE * np.log2(np.maximum(sums / columns, 2**-8))
        assert (abs(levels % 1 - 0.5) > 1e-10).all()


def test_small_model_stops_at_matrix_bits_and_is_not_padded():
    data = fitted(10**7, quantizer="allocated", compressor="ans", matrix_bits=6)
    cfg = fitting_model()[0].cfg
    weights = sum(map(math.prod, tg.bank_shapes(cfg).values()))
    floats = sum(map(math.prod, tg.float_shapes(cfg).values()))
    expected = 6 * weights // 8 + 2 * floats
    assert expected - 4096 < len(data) <= expected
    # What the log announces before training.
    assert tg.predict_submission_bytes(cfg) == expected + tg.CODE_BYTES


def test_model_that_cannot_fit_says_by_how_much_and_which_knob_to_turn():
    message = r"ARTIFACT_LIMIT_BYTES=\d+: the model is \d+ bytes over .* lower MLP_MULT"
    with pytest.raises(tg.UsageError, match=message):
        fitted(3_000, quantizer="gptq", compressor="ans")
    with pytest.raises(tg.UsageError, match=r"ARTIFACT_LIMIT_BYTES=\d+: must be 0 or at least \d+"):
        tiny_config(artifact_limit_bytes=tg.CODE_BYTES + 100)


def fit_digest(ranks: tg.Ranks) -> str:
    data = fitted(60_001, ranks, quantizer="allocated", compressor="ans")
    return hashlib.sha256(data).hexdigest()


def test_two_ranks_fit_to_the_bytes_of_one(tmp_path):
    first, second = on_ranks(2, fit_digest, tmp_path)
    assert first == fit_digest(ONE) == fit_digest(ONE)
    assert second == hashlib.sha256(b"").hexdigest()  # only rank 0 has the file


# --- A reader that trusts nothing -----------------------------------------------------------------
@cache
def intact(compressor: str) -> bytes:
    """An artifact of about three thousand bytes."""
    cfg = tiny_config(**SMALL, compressor=compressor)
    model = random_model(cfg)
    hessians = tg.collect_hessians(model, cfg.plans[0], random_rows(cfg, 2), ONE)
    return tg.pack_artifact(model, quantize(model, hessians, ONE), {"looped": False})


@pytest.mark.parametrize("content", [None, b"# text", "an artifact"])
def test_the_bench_wants_a_checkpoint_and_says_so_in_a_line(tmp_path, capsys, content):
    path = tmp_path / "model"
    if content == "an artifact":
        path.write_bytes(intact("lzma"))
    elif content:
        path.write_bytes(content)
    assert bench.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench/artifact.py: ")
    assert error.count("\n") == 1
    assert str(path) in error


def header_end(data: bytes) -> int:
    return 13 + int.from_bytes(data[5:9], "little")


def rebuilt(data: bytes, header: dict, streams: list[bytes] | None = None) -> bytes:
    """The file with another header, whose length and checksum are right again."""
    head = zlib.compress(json.dumps(header).encode(), 9)
    length = len(head).to_bytes(4, "little")
    checksum = zlib.crc32(head).to_bytes(4, "little")
    body = b"".join(streams) if streams else data[header_end(data) :]
    return data[:5] + length + checksum + head + body


def parts(data: bytes) -> tuple[dict, list[bytes]]:
    """Header and stored streams of an artifact."""
    start = header_end(data)
    header = json.loads(zlib.decompress(data[13:start]))
    streams = []
    for _, length, _ in header["streams"]:
        streams.append(data[start : start + length])
        start += length
    return header, streams


def refused(data: bytes) -> None:
    """In one line, in less than a second of this processor."""
    start = time.process_time()
    with pytest.raises(tg.UsageError) as caught:
        tg.open_artifact(data, Path("some.ptz"))
    assert time.process_time() - start < 1
    assert str(caught.value).startswith("some.ptz: ")
    assert "\n" not in str(caught.value)


class Hostile:
    def __reduce__(self) -> tuple:
        return (Path.write_text, (Path("owned"), "x"))


junk = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=9),
    st.none(),
    st.booleans(),
    st.lists(st.integers(), max_size=3),
)


SIZED_FIELDS = (
    "vocab_size num_layers model_dim num_kv_heads num_loops parallel_start_layer mlp_mult".split()
)


def cannot_be_a_size(value: object) -> bool:
    if type(value) is int:
        return not 0 <= value < 2**20
    return type(value) is not float


@st.composite
def broken_files(draw: st.DrawFn) -> bytes:
    """An artifact cut or with a byte changed."""
    data = intact(draw(st.sampled_from(["zstd", "ans", "lzma"])))
    position = draw(st.integers(0, len(data) - 1))
    if draw(st.booleans()):
        return data[:position]
    changed = data[position] ^ draw(st.integers(1, 255))
    return data[:position] + bytes([changed]) + data[position + 1 :]


@st.composite
def forged_headers(draw: st.DrawFn) -> bytes:
    """An artifact whose header, with a right checksum, tells of other streams than follow."""
    data = intact(draw(st.sampled_from(["zstd", "ans", "lzma"])))
    header, _ = parts(data)
    kind = draw(st.sampled_from(["config", "sizes", "order"]))
    if kind == "config":
        field = draw(st.sampled_from(SIZED_FIELDS))
        header["config"][field] = draw(junk.filter(cannot_be_a_size))
    elif kind == "sizes":
        stream = draw(st.sampled_from(header["streams"]))
        i = draw(st.integers(0, 2))
        written = stream[i]
        stream[i] = draw(junk.filter(lambda value: value != written))
    else:
        written = list(header["streams"])
        permuted = st.permutations(written).filter(lambda order: order != written)
        header["streams"] = draw(permuted)
    return rebuilt(data, header)


@st.composite
def forged_streams(draw: st.DrawFn) -> bytes:
    """An artifact with another stream in the place of one, and all checksums right."""
    data = intact(draw(st.sampled_from(["zstd", "ans", "lzma"])))
    header, streams = parts(data)
    kind = draw(st.sampled_from(["cut", "pickle", "bomb"]))
    # A codec may decode a cut stream of codes to other codes, so this kind leaves it alone.
    i = draw(st.integers(1, 4) if kind == "cut" else st.integers(0, 4))
    if kind == "cut":
        streams[i] = streams[i][: draw(st.integers(0, len(streams[i]) // 2))]
    elif kind == "pickle":
        streams[i] = pickle.dumps(Hostile())
    else:
        streams[i] = draw(st.sampled_from(bombs()))
        header["streams"][i][0] = draw(st.sampled_from([1 << 22, 1 << 40, -1]))
    header["streams"][i][1:] = [len(streams[i]), zlib.crc32(streams[i])]
    return rebuilt(data, header, streams)


@cache
def bombs() -> list[bytes]:
    """A few kilobytes that decompress to 16 MiB: raw LZMA2, zstd, xz, zlib."""
    import zstandard

    zeros = bytes(1 << 24)
    raw = dict(format=lzma.FORMAT_RAW, filters=[dict(id=lzma.FILTER_LZMA2, preset=6)])
    return [
        lzma.compress(zeros, **raw),
        zstandard.compress(zeros),
        lzma.compress(zeros),
        zlib.compress(zeros),
    ]


@hypothesis.settings(
    max_examples=2000,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(st.one_of(broken_files(), forged_headers(), forged_streams()))
def test_no_mutated_artifact_is_read(data):
    refused(data)
    assert not Path("owned").exists()


def with_stream(data: bytes, i: int, stream: bytes) -> bytes:
    """The artifact with another stream in the place of number i."""
    header, streams = parts(data)
    streams[i] = stream
    header["streams"][i][1:] = [len(stream), zlib.crc32(stream)]
    return rebuilt(data, header, streams)


def test_bombs_take_no_memory():
    data = intact("zstd")
    lzma_bomb, zstd_bomb, _, _ = bombs()
    head = zlib.compress(b" " * (300 << 20), 9)
    numbers = len(head).to_bytes(4, "little") + zlib.crc32(head).to_bytes(4, "little")
    tracemalloc.start()

    refused(b"PGLM\3" + numbers + head)
    refused(with_stream(data, 0, zstd_bomb))  # its window is larger than any of ours
    for i in (1, 2, 3, 4):
        refused(with_stream(data, i, lzma_bomb))  # cut off one byte beyond what the network allows

    header, _ = parts(data)
    header["config"] |= {"vocab_size": 65536, "model_dim": 65536}
    header["streams"][0][0] = 1 << 33
    refused(rebuilt(data, header))

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 << 20
