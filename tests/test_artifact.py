"""The artifact: allocation of its bytes, the entropy coder, the fit to a limit, and a reader that trusts nothing."""

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
from conftest import ROOT, tiny_config
from test_compression import (
    ONE,
    correlated,
    gptq_quantize,
    quantize,
    random_model,
    random_rows,
    weighted_error,
)
from test_optim import on_ranks

import train_gpt as tg

sys.path.insert(0, str(ROOT / "bench"))
import artifact as bench

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
SMALL = dict(
    model_dim=8,
    num_heads=2,
    num_layers=2,
    num_loops=0,
    parallel_start_layer=0,
    xsa_last_n=2,
    rope_dims=4,
)


def calibrated(cfg: tg.Config) -> tuple[tg.GPT, dict, dict]:
    model, rows = random_model(cfg), random_rows(cfg, 4)
    hessians = tg.collect_hessians(model, cfg.plans[1], rows, ONE)
    return (
        model,
        hessians,
        tg.collect_sensitivities(model, model, cfg.plans[1], rows, hessians, ONE),
    )


def gaussian_codes(
    shapes: list[tuple[int, int, int]], uneven: float, seed: int = 0
) -> list[np.ndarray]:
    rng, codes = np.random.default_rng(seed), []
    for n, rows, cols in shapes:
        size = np.exp(
            uneven * rng.normal(size=(n, rows, 1)) + uneven * rng.normal(size=(n, 1, cols))
        )
        codes.append(
            np.clip(np.rint(2.4 * size * rng.normal(size=(n, rows, cols))), -127, 127).astype(
                np.int8
            )
        )
    return codes


def entropy_bytes(codes: list[np.ndarray]) -> float:
    count = np.unique(np.concatenate([q.ravel() for q in codes]), return_counts=True)[1]
    return -(count * np.log2(count / count.sum())).sum() / 8


# --- Entropy coder ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("uneven", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(
    "shapes", [[(1, 1, 1)], [(3, 7, 5), (2, 1, 40)], [(2, 130, 33), (1, 17, 64), (5, 3, 8)]]
)
def test_ans_returns_every_code(shapes, uneven):
    codes = gaussian_codes(shapes, uneven)
    codes[0][0, 0] = 0
    codes[-1].flat[0] = -128
    levels = [tg.row_levels(q) for q in codes]
    back = tg.ans_decode(tg.ans_encode(codes, levels), shapes, levels)
    assert all(np.array_equal(a, b) for a, b in zip(codes, back, strict=True))


def ans_bytes(codes: list[np.ndarray]) -> int:
    """Without the tables, whose size hardly depends on the number of codes."""
    data = tg.ans_encode(codes, [tg.row_levels(q) for q in codes])
    return len(data) - int.from_bytes(data[:4], "little")


def test_ans_models_rows_and_columns_below_the_order_0_entropy():
    even, uneven = (gaussian_codes([(2, 512, 256), (1, 1024, 256)], s) for s in (0.0, 0.5))
    assert ans_bytes(even) < 1.012 * entropy_bytes(even)
    assert ans_bytes(uneven) < 0.93 * entropy_bytes(uneven)


def test_ans_models_columns_whose_mean_is_not_zero():
    plain = gaussian_codes([(2, 512, 256)], 0.0)
    leaning = [plain[0] + np.random.default_rng(1).integers(-3, 4, (2, 1, 256)).astype(np.int8)]
    assert ans_bytes(leaning) - ans_bytes(plain) < 0.11 * (
        entropy_bytes(leaning) - entropy_bytes(plain)
    )


def test_contexts_use_integers_that_no_machine_rounds_otherwise():
    # Whole powers of two are exact anywhere.
    exact = [2 ** (16 + (t + 0.5) / 8) for t in range(-36, 24)]
    exact += [2 ** (16 - (k - 65) / 8) for k in range(1, 190) if (k - 65) % 8]
    assert min(abs(x % 1 - 0.5) for x in exact) > 1e-6
    assert {tg.MAGNITUDE_EDGES.dtype, tg.INVERSE_LEVEL.dtype} == {np.dtype(np.int64)}


# --- Allocation -------------------------------------------------------------------------------------------------------
def test_published_steps_are_kept_to_the_bit_by_the_published_presets():
    cfg = tiny_config(quantizer="gptq", artifact_limit_bytes=0)
    model, hessians, _ = calibrated(cfg)
    packed = quantize(model, hessians, ONE)
    for bank, i, site, layer in tg.quantised_matrices(cfg):
        weight = model.get_parameter(bank).detach().view(tg.bank_shapes(cfg)[bank])[i : i + 1]
        clip, bits = (15.0, 7) if bank == "tok_emb" else (12.85, 6)
        q, scale = gptq_quantize(weight, hessians[site, layer][None], clip, bits)
        assert torch.equal(packed[bank][1][i], scale[0])
        assert (packed[bank][0][i] != q[0]).double().mean() < 1e-3
    for preset in ("pr1530", "pr1560"):
        chosen = tg.PRESETS[preset]
        assert (chosen["quantizer"], chosen["artifact_limit_bytes"]) == ("gptq", 0)


def test_clip_of_a_group_wins_over_the_matrices_and_that_of_loops_over_both():
    cfg = tiny_config(
        attn_clip_sigmas=13.0, mlp_clip_sigmas=11.0, loop_clip_sigmas=10.0, embed_clip_sigmas=14.0
    )
    found = {
        (bank, layer): tg.clip_sigmas_of(cfg, bank, layer)
        for bank, _, _, layer in tg.quantised_matrices(cfg)
    }
    assert found["qo_bank", 0] == found["kv_bank", 3] == 13.0
    assert found["up_bank", 0] == found["down_bank", 3] == 11.0
    assert found["qo_bank", 1] == found["up_bank", 1] == 10.0  # LOOP_START = LOOP_END = 1
    assert found["tok_emb", 0] == 14.0
    plain = tiny_config()
    assert {
        tg.clip_sigmas_of(plain, b, layer) for b, _, _, layer in tg.quantised_matrices(plain)
    } == {12.85, 15.0}


def test_allocation_costs_less_loss_than_published_steps_of_the_same_entropy():
    cfg = tiny_config(quantizer="allocated")
    model, hessians, sensitivities = calibrated(cfg)
    model.get_parameter("up_bank").data[0] *= (
        3  # a matrix whose steps the published rule would make too coarse
    )
    solver, cost = tg.Quantizer(model, hessians, sensitivities, ONE), {}
    published = tg.Quantizer(model, hessians, None, ONE)
    for name, packed in (
        ("ours", solver.solve(solver.default)),
        ("published", published.solve(1.0)),
    ):
        cost[name] = 0.0
        for bank, i, site, layer in tg.quantised_matrices(cfg):
            e = model.get_parameter(bank).detach().view(tg.bank_shapes(cfg)[bank])[i] - (
                packed[bank][0][i].float() * packed[bank][1][i].float()[:, None]
            )
            cost[name] += float(
                (((e @ hessians[site, layer]) * e).sum(-1) * sensitivities[bank][i]).sum()
            )
    assert cost["ours"] < 0.8 * cost["published"], cost
    assert abs(solver.predict(solver.default) / published.predict(1.0) - 1) < 0.01


def test_rows_the_loss_does_not_mind_become_zeros_and_dear_ones_get_finer_steps():
    cfg = tiny_config(quantizer="allocated")
    model, hessians, sensitivities = calibrated(cfg)
    sensitivities["up_bank"][0, 3] = 0.0
    sensitivities["up_bank"][0, 4] *= 64
    q, scale = quantize(model, hessians, ONE, sensitivities)["up_bank"]
    assert not q[0, 3].any()
    assert q[0, 4].any()
    assert scale[0, 4] < 0.2 * scale[0].median()
    solver = tg.Quantizer(model, hessians, sensitivities, ONE)
    _, power, _, cost, _ = solver.rows["up_bank"]
    cost[0, 5], cost[0, 6] = 0.5 * solver.default / power[0, 5], 3 * solver.default / power[0, 6]
    step = solver.steps("up_bank", solver.default)[0]
    assert step[5] > 50 * power[0, 5].sqrt()  # as zeros it costs less than theta
    assert (
        abs(step[6] / (6 * power[0, 6]).sqrt() - 1) < 0.05
    )  # 12 theta / (3 theta - theta) of its power
    logs = 8 * scale.double().log2()
    assert (logs - logs.round()).abs().max() < 0.01  # steps of 2^(1/8), stored as fp16


def test_sensitivity_is_the_mean_square_of_the_gradient_by_a_rows_outputs():
    cfg = tiny_config()
    model, hessians, sensitivities = calibrated(cfg)
    assert sensitivities.keys() == tg.bank_shapes(cfg).keys()
    model.zero_grad()
    rows = random_rows(cfg, 4)
    squares = 0.0
    for row in rows:
        model.zero_grad()
        model(row, cfg.plans[1]).sum().backward()
        squares = squares + model.up_bank.grad[2].square().sum(-1)
    assert torch.allclose(
        sensitivities["up_bank"][2], squares / hessians["mlp_in", 2].trace(), rtol=1e-4
    )
    h = hessians["head_in", 0]
    assert torch.linalg.eigvalsh(h).min() > -1e-6 * h.trace()
    plain = tg.collect_hessians(model, cfg.plans[1], rows, ONE)["head_in", 0]
    assert (
        abs(h.trace() / plain.trace() - 1) < 1e-4
    )  # both roles of the tied table, at the scale of the head
    assert (h - plain).norm() > 0.01 * plain.norm()


def test_solver_spread_predicts_the_weighted_error_of_a_fine_step():
    weight, hessian = correlated(1, 64, 96)
    step = 0.05 * weight.std(-1)
    solver = tg.GptqSolver.prepare(weight, hessian)
    error = weighted_error(weight, solver.solve(step, 127).float(), step, hessian)
    spread = solver.upper.diagonal(dim1=1, dim2=2).square().sum(-1)
    assert 0.8 < float(error / (spread * step.square().sum(-1) / 12)) < 1.1


# --- Fit --------------------------------------------------------------------------------------------------------------
@cache
def fitting_model() -> tuple:
    cfg = tiny_config(
        model_dim=64, num_heads=4, mlp_mult=4, quantizer="allocated", compressor="ans"
    )
    return calibrated(cfg)


def fitted(limit: int, ranks: tg.Ranks = ONE, **changes: object) -> bytes:
    model, hessians, sensitivities = fitting_model()
    model.cfg = dataclasses.replace(
        model.cfg, artifact_limit_bytes=limit + tg.CODE_BYTES, **changes
    )
    loss = sensitivities if model.cfg.quantizer == "allocated" else None
    solver = tg.Quantizer(model, hessians, loss, ranks)
    return tg.fit_artifact(solver, model, {}, lambda line: None)


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
        assert (
            limit - 4096 < len(fitted(limit, quantizer=quantizer, compressor=compressor)) <= limit
        )


@pytest.mark.parametrize(
    ("share", "finest", "rounds"), [(0.9, 1e9, 4), (1.1, 1e9, 4), (0.9, 200_000, 1)]
)
def test_fit_of_a_large_model_is_done_when_4_kb_or_no_bits_are_left(
    monkeypatch, share, finest, rounds
):
    """At 16 MB the first guess leaves more than the 4 KB that a tiny model may leave over."""
    cfg = tiny_config(artifact_limit_bytes=1_000_000 + tg.CODE_BYTES)
    solver = SimpleNamespace(
        finest=finest, ranks=ONE, theta=lambda budget: budget, solve=lambda budget: budget
    )
    monkeypatch.setattr(
        tg, "pack_artifact", lambda model, size, meta: bytes(int(share * size) + 5_000)
    )
    data = tg.fit_artifact(solver, SimpleNamespace(cfg=cfg), {}, (lines := []).append)
    assert len(lines) <= rounds
    assert len(data) == 185_000 if finest < 1e9 else 1_000_000 - 4096 < len(data) <= 1_000_000


def test_steps_stay_within_what_fp16_holds_with_all_its_bits():
    """Below 2^-14 a scale would lose bits, beyond 65504 it would be infinite."""
    power, largest = torch.tensor([[1e-20, 1.0, 1e12]]), torch.tensor([[1e-10, 1.0, 1e6]])
    solver = object.__new__(tg.Quantizer)
    solver.rows = {"up_bank": (power, power, largest, torch.ones(1, 3), 127)}
    fine, coarse = (solver.steps("up_bank", theta)[0].tolist() for theta in (1e-30, 1e30))
    assert fine[0] == coarse[0] == 2.0**-14 and coarse[2] == 2.0**15
    assert fine[1:] == [2.0 ** (round(8 * math.log2(x / 127)) / 8) for x in (1.0, 1e6)]


def test_small_model_stops_at_matrix_bits_and_is_not_padded():
    data = fitted(10**7, quantizer="allocated", compressor="ans", matrix_bits=6)
    weights = sum(map(math.prod, tg.bank_shapes(fitting_model()[0].cfg).values()))
    assert 0.7 * 6 * weights / 8 < len(data) < 1.2 * 6 * weights / 8


def test_model_that_cannot_fit_says_by_how_much_and_which_knob_to_turn():
    with pytest.raises(
        tg.UsageError,
        match=r"ARTIFACT_LIMIT_BYTES=\d+: the model is \d+ bytes over .* lower MLP_MULT",
    ):
        fitted(3_000, quantizer="gptq", compressor="ans")
    with pytest.raises(tg.UsageError, match=r"ARTIFACT_LIMIT_BYTES=\d+: must be 0 or at least \d+"):
        tiny_config(artifact_limit_bytes=tg.CODE_BYTES + 100)


def fit_digest(ranks: tg.Ranks) -> str:
    return hashlib.sha256(
        fitted(60_001, ranks, quantizer="allocated", compressor="ans")
    ).hexdigest()


def test_two_ranks_fit_to_the_bytes_of_one(tmp_path):
    first, second = on_ranks(2, fit_digest, tmp_path)
    assert first == fit_digest(ONE) == fit_digest(ONE)
    assert second == hashlib.sha256(b"").hexdigest()  # only rank 0 has the file


# --- A reader that trusts nothing -------------------------------------------------------------------------------------
@cache
def whole(compressor: str) -> bytes:
    cfg = tiny_config(**SMALL, compressor=compressor)
    model = random_model(cfg)
    packed = quantize(
        model, tg.collect_hessians(model, cfg.plans[0], random_rows(cfg, 2), ONE), ONE
    )
    return tg.pack_artifact(model, packed, {"looped": False})


@pytest.mark.parametrize("content", [None, b"# text", "an artifact"])
def test_the_bench_wants_a_checkpoint_and_says_so_in_a_line(tmp_path, capsys, content):
    path = tmp_path / "model"
    if content:
        path.write_bytes(whole("lzma") if content == "an artifact" else content)
    assert bench.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench/artifact.py: ") and error.count("\n") == 1 and str(path) in error


def rebuilt(data: bytes, header: dict, streams: list[bytes] | None = None) -> bytes:
    """The file with another header, lengths and checksums right again."""
    at = 13 + int.from_bytes(data[5:9], "little")
    head = zlib.compress(json.dumps(header).encode(), 9)
    body = b"".join(streams) if streams else data[at:]
    return (
        data[:5]
        + len(head).to_bytes(4, "little")
        + zlib.crc32(head).to_bytes(4, "little")
        + head
        + body
    )


def parts(data: bytes) -> tuple[dict, list[bytes]]:
    at = 13 + int.from_bytes(data[5:9], "little")
    header, streams = json.loads(zlib.decompress(data[13:at])), []
    for _, length, _ in header["streams"]:
        streams.append(data[at : at + length])
        at += length
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


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    data = whole(draw(st.sampled_from(["zstd", "ans", "lzma"])))
    kind = draw(
        st.sampled_from(["cut", "flip", "config", "sizes", "stream", "pickle", "bomb", "splice"])
    )
    header, streams = parts(data)
    at = draw(st.integers(0, len(data) - 1))
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    if kind == "config":  # a network that the streams do not hold
        sized = "vocab_size num_layers model_dim num_kv_heads num_loops parallel_start_layer mlp_mult".split()
        field = draw(st.sampled_from(sized))
        value = draw(
            junk.filter(
                lambda v: type(v) is not float and (type(v) is not int or not 0 <= v < 2**20)
            )
        )
        header["config"][field] = value
        return rebuilt(data, header)
    if kind == "sizes":
        i, j = draw(st.integers(0, 3)), draw(st.integers(0, 2))
        header["streams"][i][j] = draw(junk.filter(lambda v: v != header["streams"][i][j]))
        return rebuilt(data, header)
    if kind == "splice":
        header["streams"] = draw(
            st.permutations(header["streams"]).filter(lambda s: s != header["streams"])
        )
        return rebuilt(data, header)
    i = draw(st.sampled_from([1, 2, 3]) if kind == "stream" else st.integers(0, 3))
    if kind == "stream":  # a stream cut short, its checksum corrected
        streams[i] = streams[i][: draw(st.integers(0, len(streams[i]) // 2))]
    elif kind == "pickle":
        streams[i] = pickle.dumps(Hostile())
    else:
        zeros = bytes(1 << 22)
        raw = dict(format=lzma.FORMAT_RAW, filters=[dict(id=lzma.FILTER_LZMA2, preset=6)])
        streams[i] = draw(st.sampled_from(bombs(zeros, **raw)))
        header["streams"][i][0] = draw(st.sampled_from([1 << 22, 1 << 40, -1]))
    header["streams"][i][1:] = [len(streams[i]), zlib.crc32(streams[i])]
    return rebuilt(data, header, streams)


@cache
def _bombs() -> list[bytes]:
    import zstandard

    raw = dict(format=lzma.FORMAT_RAW, filters=[dict(id=lzma.FILTER_LZMA2, preset=6)])
    zeros = bytes(1 << 24)
    return [
        lzma.compress(zeros, **raw),
        zstandard.compress(zeros),
        lzma.compress(zeros),
        zlib.compress(zeros),
    ]


def bombs(zeros: bytes, **raw: object) -> list[bytes]:
    return _bombs()


@hypothesis.settings(
    max_examples=2500,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(mutations())
def test_no_mutated_artifact_is_read(data):
    refused(data)
    assert not Path("owned").exists()


def test_bombs_take_no_memory():
    header, streams = parts(whole("zstd"))
    tracemalloc.start()
    head = zlib.compress(b" " * (300 << 20), 9)
    tracemalloc.reset_peak()
    peak = 0
    refused(
        b"PGLM\2" + len(head).to_bytes(4, "little") + zlib.crc32(head).to_bytes(4, "little") + head
    )
    for i, bomb in [(0, _bombs()[1]), (1, _bombs()[0]), (3, _bombs()[0])]:
        forged, swapped = json.loads(json.dumps(header)), list(streams)
        swapped[i] = bomb
        forged["streams"][i][1:] = [len(bomb), zlib.crc32(bomb)]
        data = rebuilt(whole("zstd"), forged, swapped)
        if i:  # cut off at the size that the network allows, and read as zeros
            assert [len(s) for s in tg.open_artifact(data, Path("x"))[1]] == [
                raw for raw, _, _ in header["streams"]
            ]
        else:  # its window is larger than any of ours
            refused(data)
        peak = max(peak, tracemalloc.get_traced_memory()[1])
    forged = json.loads(json.dumps(header))
    forged["config"] |= {"vocab_size": 65536, "model_dim": 65536}
    forged["streams"][0][0] = 1 << 33
    refused(rebuilt(whole("zstd"), forged))
    peak = max(peak, tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert peak < 200 << 20
