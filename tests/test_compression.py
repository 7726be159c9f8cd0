"""Compression: Hessians, GPTQ against a plain reference, codecs, and the artifact as a file."""

from __future__ import annotations

import dataclasses
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import on_ranks, tiny_config

import train_gpt as tg

ONE = tg.Ranks({})
SMALL = dict(  # its artifact has about a thousand bytes
    model_dim=8,
    num_heads=2,
    num_layers=2,
    num_loops=0,
    parallel_start_layer=0,
    xsa_last_n=2,
    rope_dims=4,
)


def random_model(cfg: tg.Config, seed: int = 0) -> tg.GPT:
    """A network in which nothing is zero or one, as after training."""
    model = tg.GPT(cfg)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, role in tg.parameter_table(cfg).items():
            noise = torch.randn(role.shape, generator=rng)
            p = model.get_parameter(name)
            if role.packing == "float":
                p.add_(0.1 * noise)
            else:
                p.copy_(noise * role.shape[-1] ** -0.5)
    return model


def random_rows(cfg: tg.Config, count: int) -> list[tg.Batch]:
    """Rows of the training shape in which documents of random lengths stand end to end."""
    rng = np.random.default_rng(5)
    tokens, _, longest = cfg.row_shape
    rows = []
    for _ in range(count):
        ids = rng.integers(4, cfg.vocab_size, tokens + 1)
        starts = tg.segment_starts(rng.random(tokens) < 0.05, True, longest)
        rows.append(tg.pack_row(ids[:-1], ids[1:], starts, cfg.row_shape, torch.device("cpu")))
    return rows


# --- Hessians -------------------------------------------------------------------------------------
def test_record_has_67_matrices_each_with_the_site_of_its_inputs():
    cfg = tg.Config()
    matrices = tg.quantised_matrices(cfg)
    inputs = {(matrix.bank, matrix.index): matrix.input_key for matrix in matrices}
    assert len(matrices) == len(inputs) == 67
    for layer in range(11):
        for matrix in (("qo_bank", layer), ("kv_bank", layer), ("kv_bank", 11 + layer)):
            assert inputs[matrix] == ("attn_in", layer)  # q, k and v share their inputs
        assert inputs["qo_bank", 11 + layer] == ("attn_out", layer)
        assert inputs["up_bank", layer] == ("mlp_in", layer)
        assert inputs["down_bank", layer] == ("mlp_mid", layer)
    assert inputs["tok_emb", 0] == ("head_in", 0)
    everything = {(bank, i) for bank, (n, _, _) in tg.bank_shapes(cfg).items() for i in range(n)}
    assert inputs.keys() == everything


def test_hessian_is_the_mean_outer_product_of_what_each_matrix_reads():
    cfg = tiny_config()
    model = random_model(cfg)
    rows = random_rows(cfg, 3)
    seen = {}

    def tap(site, layer, x):
        seen.setdefault((site, layer), []).append(x.double())

    for row in rows:
        nats = model(row, cfg.plans[1], tap=tap)
        inputs = {key: x[-1] for key, x in seen.items()}
        hidden = tg.leaky_relu_sq(inputs["mlp_in", 2] @ model.up_bank[2].double().T)
        assert torch.allclose(hidden, inputs["mlp_mid", 2], atol=1e-5)
        scores = inputs["head_in", 0] @ model.tok_emb.double().T
        logits = cfg.logit_softcap * torch.tanh(scores / cfg.logit_softcap)
        expected = torch.nn.functional.cross_entropy(logits, row.targets, reduction="none")
        assert torch.allclose(nats.double(), expected, atol=1e-5)
    hessians = tg.collect_hessians(model, cfg.plans[1], rows, ONE)
    keys = {matrix.input_key for matrix in tg.quantised_matrices(cfg)}
    assert hessians.keys() == keys == seen.keys()
    reads = [len(seen["attn_in", layer]) for layer in range(4)]
    assert reads == [3, 6, 3, 3]  # a looped layer reads twice
    for key, xs in seen.items():
        expected = sum(x.T @ x for x in xs) / (3 * cfg.micro_batch_tokens)
        assert (hessians[key] - expected).norm() < 1e-5 * expected.norm(), key


def quantize(
    model: tg.GPT, hessians: dict, ranks: tg.Ranks, sensitivities: dict | None = None
) -> tg.Quantised:
    """Integers and scales of the size that the clips ask for."""
    quantizer = tg.Quantizer(model, hessians, sensitivities, ranks)
    return quantizer.solve(quantizer.default_theta)


def hessians_and_codes(ranks: tg.Ranks) -> tuple[dict, tg.Quantised]:
    cfg = tiny_config()
    model = random_model(cfg)
    rows = random_rows(cfg, 3)
    hessians = tg.collect_hessians(model, cfg.plans[1], rows[ranks.rank :: ranks.world_size], ranks)
    shared = tg.collect_hessians(model, cfg.plans[1], rows, ONE)  # equal to the last bit on all
    return hessians, quantize(model, shared, ranks)


def test_two_ranks_find_the_hessians_and_codes_of_one(tmp_path):
    hessians, packed = hessians_and_codes(ONE)
    # Two rows on one rank, one on the other.
    for other_hessians, other_packed in on_ranks(2, hessians_and_codes, tmp_path):
        for key, h in hessians.items():
            assert (other_hessians[key] - h).norm() < 1e-5 * h.norm()
        for part, other_part in zip(packed, other_packed, strict=True):
            for key, values in part.items():
                assert torch.equal(other_part[key], values), key


# --- GPTQ -----------------------------------------------------------------------------------------
def correlated(
    n: int, rows: int, cols: int, seed: int = 0, tokens: int = 4096
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the Hessians of inputs that share a few strong directions and differ in size."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, cols, cols, generator=rng) * torch.linspace(1.5, 0.05, cols)[:, None]
    x = torch.randn(n, tokens, cols, generator=rng) @ mix
    x = x * torch.rand(n, 1, cols, generator=rng).add(0.2)
    return torch.randn(n, rows, cols, generator=rng) / cols**0.5, x.mT @ x / tokens


def gptq_quantize(
    weight: torch.Tensor, hessian: torch.Tensor, clip_sigmas: float, bits: int
) -> tuple:
    """The published quantiser: q int8 (n, rows, cols) and scale fp16 (n, rows)."""
    qmax = 2 ** (bits - 1) - 1
    scale = tg.clip_steps(weight, clip_sigmas, qmax)
    ones = torch.ones_like(weight[:, 0])
    return tg.GptqSolver.prepare(weight, hessian).solve(scale.float(), ones, qmax), scale


def row_scale(weight: torch.Tensor, clip_sigmas: float, bits: int) -> torch.Tensor:
    """The published step of each row, fp16, not below the smallest normal number."""
    qmax = 2 ** (bits - 1) - 1
    return (clip_sigmas * weight.std(-1, correction=1) / qmax).clamp_min(2.0**-14).half()


def rounded(weight: torch.Tensor, clip_sigmas: float, bits: int) -> torch.Tensor:
    """Codes by rounding to nearest."""
    qmax = 2 ** (bits - 1) - 1
    step = row_scale(weight, clip_sigmas, bits).float()[..., None]
    return (weight / step).round().clamp(-qmax, qmax)


def reference_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, bits: int
) -> torch.Tensor:
    """Codes of one matrix (rows, cols) by the published algorithm.

    It goes column by column in float64 and uses H^-1 itself: no factor, no blocks.
    """
    qmax = 2 ** (bits - 1) - 1
    s = scale.double()
    h = hessian.double()
    order = h.diagonal().argsort(descending=True)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    inverse = torch.linalg.inv(damped[order][:, order])
    w = weight.double()[:, order]
    q = torch.zeros_like(w)
    for j in range(len(h)):
        q[:, j] = (w[:, j] / s).round().clamp(-qmax, qmax)
        error = (w[:, j] - q[:, j] * s) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]  # the best answer of the columns still free
        inverse = (inverse - inverse[:, :1] * inverse[:1] / inverse[0, 0])[1:, 1:]
    return q[:, order.argsort()]


def weighted_error(
    weight: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """tr(E H E^T) per matrix: the mean squared change of the outputs."""
    e = weight.double() - q.double() * scale.double()[..., None]
    return ((e @ hessian.double()) * e).sum((-1, -2))


@pytest.mark.parametrize(("rows", "cols"), [(24, 48), (7, 200)])
def test_identity_hessian_gives_rounding_to_nearest(rows, cols):
    weight = torch.randn(2, rows, cols)
    q, scale = gptq_quantize(weight, torch.eye(cols).expand(2, -1, -1), 12.85, 6)
    assert torch.equal(q.float(), rounded(weight, 12.85, 6))
    assert torch.equal(scale, row_scale(weight, 12.85, 6))


@pytest.mark.parametrize(
    ("cols", "bits", "sigmas"), [(40, 6, 12.85), (300, 6, 12.85), (96, 7, 15.0), (64, 4, 2.0)]
)
def test_gptq_agrees_with_a_slow_reference_and_beats_rounding(cols, bits, sigmas):
    weight, hessian = correlated(2, 24, cols)
    q, scale = gptq_quantize(weight, hessian, sigmas, bits)
    expected = torch.stack(
        [reference_gptq(*one, bits) for one in zip(weight, hessian, scale, strict=True)]
    )
    # A tie rounded the other way moves a few codes after it.
    assert (q != expected).double().mean() < 2e-3
    error = weighted_error(weight, q, scale, hessian)
    reference = weighted_error(weight, expected, scale, hessian)
    plain = weighted_error(weight, rounded(weight, sigmas, bits), scale, hessian)
    assert (error / reference - 1).abs().max() < 1e-2
    assert (error < 0.75 * plain).all(), error / plain


def test_batch_of_matrices_equals_one_at_a_time():
    weight, hessian = correlated(4, 16, 160)
    # Only this one needs more damping.
    hessian[2] -= 0.3 * hessian[2].diagonal().mean() * torch.eye(160)
    q, scale = gptq_quantize(weight, hessian, 12.85, 6)
    for i in range(4):
        (q_alone,), (scale_alone,) = gptq_quantize(weight[i : i + 1], hessian[i : i + 1], 12.85, 6)
        assert torch.equal(q_alone, q[i])
        assert torch.equal(scale_alone, scale[i])


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_stay_in_range_and_fill_it(bits):
    weight, hessian = correlated(1, 16, 64)
    q, _ = gptq_quantize(weight, hessian, 0.8, bits)
    qmax = 2 ** (bits - 1) - 1
    assert q.dtype == torch.int16
    assert (int(q.min()), int(q.max())) == (-qmax, qmax)


def test_scale_is_the_unbiased_deviation_with_the_smallest_normal_fp16_as_floor():
    """Rows with little or no spread give finite codes and a scale that fp16 holds.

    The published floor, 1e-10, is zero in fp16: a division by it gives NaN.
    """
    weight, hessian = correlated(1, 8, 32)
    weight[0, 0] = 0.0
    weight[0, 1] = 0.37
    weight[0, 2] *= 1e-7
    weight[0, 3] = -5e-5
    q, scale = gptq_quantize(weight, hessian, 12.85, 6)
    assert torch.equal(scale, row_scale(weight, 12.85, 6))
    assert scale.dtype == torch.float16
    assert (scale[0, :4] == 2.0**-14).all()
    assert not q[0, 0].any()
    assert not q[0, 2].any()
    assert (q[0, 4:] != 0).any(-1).all()


def test_dead_inputs_get_zero_columns_and_change_nothing_else():
    weight, hessian = correlated(2, 16, 60)
    dead = torch.zeros(60, dtype=torch.bool)
    dead[[3, 20, 59]] = True
    hessian[:, dead] = hessian[:, :, dead] = 0
    q, scale = gptq_quantize(weight, hessian, 12.85, 6)
    assert not q[..., dead].any()
    for w, h, s, codes in zip(weight, hessian, scale, q, strict=True):
        expected = reference_gptq(w[:, ~dead], h[~dead][:, ~dead], s, 6)
        assert (codes[:, ~dead] != expected).double().mean() < 2e-3


@pytest.mark.parametrize(
    "kind", ["few tokens", "one direction", "huge range", "not positive", "all dead"]
)
def test_difficult_hessian_is_damped_until_it_factors(kind):
    weight, hessian = correlated(2, 16, 96, tokens=8 if kind == "few tokens" else 4096)
    mean = hessian[0].diagonal().mean()
    if kind == "one direction":
        hessian[0] = torch.ones(96, 96)
    elif kind == "huge range":
        sizes = torch.logspace(-12, 6, 96)
        hessian[0] *= sizes[:, None] * sizes
    elif kind == "not positive":
        # Its smallest eigenvalue is far below zero: 1 % of the mean is not enough.
        hessian[0] -= 0.5 * mean * torch.eye(96)
        mean = hessian[0].diagonal().mean()
        assert torch.linalg.eigvalsh(hessian[0])[0] < -0.05 * mean
        assert torch.linalg.cholesky_ex(hessian[0] + 0.01 * mean * torch.eye(96)).info != 0
    elif kind == "all dead":
        hessian[0] = 0
    q, scale = gptq_quantize(weight, hessian, 12.85, 6)
    assert scale.isfinite().all()
    assert int(q.abs().max()) <= 31
    assert q[0].any() == (kind != "all dead")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["weight", "hessian"])
def test_values_that_are_not_finite_raise(which, bad):
    weight, hessian = correlated(2, 8, 32)
    {"weight": weight, "hessian": hessian}[which][1, 3, 3] = bad
    with pytest.raises(FloatingPointError):
        gptq_quantize(weight, hessian, 12.85, 6)


# --- Codecs ---------------------------------------------------------------------------------------
@pytest.fixture(params=["zstd", "lzma", "brotli"])
def compressor(request: pytest.FixtureRequest) -> str:
    pytest.importorskip({"zstd": "zstandard"}.get(request.param, request.param))
    return request.param


@pytest.mark.parametrize("size", [0, 1, 2, 3, 255, 256, 257, 4097, 70001])
def test_codec_returns_all_values_at_ragged_lengths(compressor, size):
    random = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    int6 = np.resize(np.arange(-31, 32), size).astype(np.int8).tobytes()
    for data in (int6, (bytes(range(256)) * 300)[:size], random):
        stored = tg.compress(compressor, data)
        assert tg.decompress(compressor, stored, len(data)) == data


@pytest.mark.parametrize("size", [1, 2, 255, 63488])
def test_streams_return_every_finite_fp16_value(size):
    values = np.arange(65536, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)][:: 63488 // size][:size]
    assert len(values) == size
    parts = torch.from_numpy(values).tensor_split(3)  # as from several tensors
    stored = tg.compress("lzma", b"".join(tg.fp16_array(part).tobytes() for part in parts))
    assert tg.decompress("lzma", stored, 2 * size) == values.astype("<f2").tobytes()


def test_zstd_stores_gaussian_codes_within_two_percent_of_their_entropy():
    pytest.importorskip("zstandard")
    codes = np.random.default_rng(2).normal(0, 31 / 12.85, 2_100_000).round().astype(np.int8)
    _, counts = np.unique(codes, return_counts=True)
    share = counts / len(codes)
    entropy = -(share * np.log2(share)).sum() * len(codes) / 8
    stored = tg.compress("zstd", codes.tobytes())
    assert entropy < len(stored) < 1.02 * entropy


# --- The artifact ---------------------------------------------------------------------------------
def artifact(cfg: tg.Config, **meta: object) -> tuple[tg.GPT, tg.Quantised, bytes]:
    """A network of random weights, its integers and its file."""
    model = random_model(cfg)
    hessians = tg.collect_hessians(model, cfg.plans[1], random_rows(cfg, 4), ONE)
    packed = quantize(model, hessians, ONE)
    return model, packed, tg.pack_artifact(model, packed, meta)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(skip_gates_enabled=0, parallel_start_layer=0, num_loops=0),
        dict(matrix_bits=5, embed_bits=8),
        dict(column_scales=False),
    ],
)
def test_loaded_network_is_q_times_scale_and_fp16_to_the_bit(settings, compressor):
    cfg = tiny_config(compressor=compressor, **settings)
    model, packed, data = artifact(cfg)
    by_hand = tg.GPT(cfg)
    loaded = random_model(cfg, seed=1)
    table = tg.parameter_table(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in packed.codes:
                q, scale = packed.codes[name], packed.scales[name]
                keys = [matrix.input_key for matrix in tg.matrices_of(cfg, name)]
                column_scale = torch.tensor(
                    [[2.0 ** (k / 4) for k in packed.columns[key].tolist()] for key in keys]
                )[:, None]
                assert (column_scale.max() > 1) == cfg.column_scales
                weight = p.view(q.shape) / column_scale
                if table[name].is_table:
                    assert torch.equal(scale, row_scale(weight, 15.0, cfg.embed_bits))
                else:
                    assert torch.equal(scale, row_scale(weight, 12.85, cfg.matrix_bits))
                restored = q.float() * scale.float()[..., None] * column_scale
                by_hand.get_parameter(name).copy_(restored.view(p.shape))
                assert 0 < (by_hand.get_parameter(name) - p).norm() < 0.5 * p.norm()
            else:
                by_hand.get_parameter(name).copy_(p.half())
                for network in (by_hand, loaded):  # rows that nothing reads do not travel
                    network.get_parameter(name)[: table[name].unread] = 0
    _, arrays = tg.open_artifact(data, Path("file"))
    tg.load_artifact(loaded, arrays)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, by_hand.get_parameter(name)), name
    row = random_rows(cfg, 1)[0]
    with torch.no_grad():
        assert torch.equal(loaded(row, cfg.plans[1]), by_hand(row, cfg.plans[1]))


def test_equal_weights_give_equal_bytes(compressor):
    _, _, first = artifact(tiny_config(compressor=compressor), looped=True)
    _, _, second = artifact(tiny_config(compressor=compressor), looped=True)
    assert first == second


def test_header_carries_the_config_of_the_network():
    cfg = tiny_config(num_heads=4, rope_base=5000.0, seed=3)
    _, _, data = artifact(cfg, looped=True, tokenizer="a" * 64)
    header, arrays = tg.open_artifact(data, Path("file"))
    rebuilt = dataclasses.replace(tg.Config(), **header["config"])
    assert tg.parameter_table(rebuilt) == tg.parameter_table(cfg)
    assert rebuilt.plans == cfg.plans
    assert rebuilt.rope_base == 5000.0
    assert rebuilt.num_heads == 4
    assert rebuilt.logit_softcap == cfg.logit_softcap
    assert header["looped"] is True
    assert header["tokenizer"] == "a" * 64
    num_codes = sum(q.size for q in arrays.codes.values())
    sizes = [sum(array.nbytes for array in part.values()) for part in arrays[1:]]
    sizes.insert(0, num_codes)
    assert [size for size, _, _ in header["streams"]] == sizes


@pytest.fixture(scope="module")
def small_artifact() -> bytes:
    _, _, data = artifact(tiny_config(**SMALL))
    return data


def refusal(data: bytes) -> str:
    with pytest.raises(tg.UsageError) as caught:
        tg.open_artifact(data, Path("some.ptz"))
    message = str(caught.value)
    assert message.startswith("some.ptz: ")
    assert "\n" not in message
    return message


def test_file_cut_anywhere_is_refused_in_one_line(small_artifact):
    assert tg.open_artifact(small_artifact, Path("whole"))
    header_end = 13 + int.from_bytes(small_artifact[5:9], "little")
    for length in range(len(small_artifact)):
        if length <= header_end or length % 7 == 0:
            refusal(small_artifact[:length])
    refusal(small_artifact[:-1])
    refusal(small_artifact + b"\0")


def test_file_with_any_bit_flipped_is_refused_in_one_line(small_artifact):
    places = [(byte, bit) for byte in range(64) for bit in range(8)]
    places += [(byte, byte % 8) for byte in range(64, len(small_artifact), 3)]
    for byte, bit in places:
        damaged = bytearray(small_artifact)
        damaged[byte] ^= 1 << bit
        refusal(bytes(damaged))


def test_foreign_and_newer_files_are_refused_for_what_they_are(small_artifact):
    assert "not an artifact" in refusal(b"PK\3\4" + small_artifact[4:])
    assert "not an artifact" in refusal(b"")
    for version in (0, 1, 2, 3, 5):
        assert f"version {version}" in refusal(
            small_artifact[:4] + bytes([version]) + small_artifact[5:]
        )


def test_artifact_holds_no_pickle(small_artifact, monkeypatch):
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(small_artifact), weights_only=False)
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(small_artifact)
    monkeypatch.setattr(torch, "load", None)
    for name in ("loads", "load", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    _, arrays = tg.open_artifact(small_artifact, Path("file"))
    assert b"PK\3\4" not in small_artifact
    for part in arrays:
        assert b"PK\3\4" not in b"".join(array.tobytes() for array in part.values())


def test_compression_executes_nothing_that_it_reads():
    source = tg.TEXT
    start = source.index("# === 9. Compression")
    section = source[start : source.index("# === 10. ", start)]
    assert tg.open_artifact.__name__ in section
    for word in ("pickle.", "torch.load", "torch.save", "eval(", "exec("):
        assert word not in section
