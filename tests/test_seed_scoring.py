"""Compression and scoring of the older systems: quantisers, tables, headers, chunks."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import on_ranks, tiny_config
from test_artifact import parts, rebuilt
from test_compression import ONE, compressor, random_model, random_rows  # noqa: F401
from test_evaluation import edited, nats_of, plain
from test_optim import cpu_ranks
from test_ttt import S, adaptation, assert_equal, documents, scorer_for, with_settings
from torch import Tensor

import train_gpt as tg

FEATURES = dict(
    bigram_vocab_size=50,
    bigram_dim=8,
    smear_enabled=True,
    ve_enabled=True,
    ve_dim=8,
    ve_layers="1,3",
    leaky_slope=0.25,
    ln_scale=False,
    branch_scale=True,
    rope_train_seq_len=32,
)
SMALL = dict(compile=False, num_loops=0, parallel_start_layer=0)
PRESETS = {  # the structure and the adaptation of each, tiny
    "pr1413": {**SMALL, "num_loops": 2, "xsa_last_n": 4},
    "pr473": {
        **SMALL,
        "bigram_vocab_size": 50,
        "bigram_dim": 8,
        "ve_dim": 8,
        "ve_layers": "2,3",
        "rope_train_seq_len": 32,
        "xsa_last_n": 2,
    },
    "pr605": {
        **SMALL,
        "bigram_vocab_size": 50,
        "bigram_dim": 8,
        "xsa_last_n": 0,
        "rope_train_seq_len": 32,
        "rope_dims": 0,
        "ttt_lm_rank": 6,
        "ttt_min_doc_len": 20,
    },
}
MANY = (150, 3, 64, 65, 33, 16, 1, 100, 200, 40, 7, 80, 30, 64, 12, 90)
CHUNKS = dict(
    ttt_mode="chunk",
    ttt_chunk_tokens=128,
    ttt_lr=0.05,
    ttt_epochs=3,
    eval_stride=16,
    sliding_window_enabled=True,
)


def preset_config(name: str, **overrides: Any) -> tg.Config:
    return tiny_config(
        **{"preset": name, "ttt_chunk_tokens": 128, "ttt_lr": 0.05, **PRESETS[name], **overrides}
    )


def evaluated(
    model: tg.GPT, docs: tg.Documents, ranks: tg.Ranks | None = None, seconds: float = 1e9
) -> tg.Ledger:
    scorer = scorer_for(model, docs, ranks)
    state = adaptation(model) if model.cfg.ttt_mode == "document" else None
    return tg.evaluate_ttt(scorer, state, model, model, tg.Deadline(seconds))


def calibrating(cfg: tg.Config, model: tg.GPT, ranks: tg.Ranks) -> SimpleNamespace:
    """What `Run.calibrate` needs of a run."""
    shown = lambda rows, what: iter(rows)  # noqa: E731
    return SimpleNamespace(cfg=cfg, model=model, ranks=ranks, forward=model, shown=shown)


def packed_by(
    cfg: tg.Config, ranks: tg.Ranks = ONE, model: tg.GPT | None = None
) -> tuple[tg.GPT, bytes]:
    """A network of random weights and its artifact, as `Run.compress` makes it."""
    model = model or random_model(cfg)
    rows = random_rows(cfg, 4)
    run = calibrating(cfg, model, ranks)
    calibration = tg.Run.calibrate(run, cfg.plans[1], rows[ranks.rank :: ranks.world_size])
    return model, tg.fit_artifact(
        tg.Quantizer(model, *calibration, ranks), model, {"looped": True}, lambda line: None
    )


def loaded(cfg: tg.Config, data: bytes) -> tuple[tg.GPT, dict[str, np.ndarray]]:
    """The network in a file, and its integers."""
    other = random_model(cfg, seed=1)
    _, arrays = tg.open_artifact(data, Path("file"))
    tg.load_artifact(other, arrays)
    return other, arrays.codes


def relative(found: tg.GPT, wanted: tg.GPT, name: str) -> float:
    a, b = (m.get_parameter(name).detach() for m in (found, wanted))
    return float((a - b).norm() / b.norm())


# --- Quantisers without Hessians ------------------------------------------------------------------
PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)


def reference_steps(
    w: np.ndarray, qmax: int, floor: float, shares: tuple[float, ...]
) -> tuple[np.ndarray, int]:
    """Steps (rows,) fp16 of one matrix in fp64, and which percentile they are of."""
    found = []
    for q in shares:
        step = (np.maximum(np.quantile(np.abs(w), q, axis=1), floor) / qmax).astype(np.float16)
        s = step.astype(np.float64)[:, None]
        found.append((((w - s * np.clip(np.rint(w / s), -qmax, qmax)) ** 2).mean(), step))
    best = min(range(len(found)), key=lambda i: found[i][0])
    return found[best][1], best


@pytest.mark.parametrize("floor", [1.0, 0.3, 1e-3])
def test_each_matrix_has_the_percentile_of_least_error_but_no_step_below_the_floor(floor):
    rng = np.random.default_rng(0)
    qmax = 31
    weights = rng.normal(0, 0.1, (4, 6, 3000))
    weights[1, :, 0] = 30  # far outliers: to clip them costs more than fine steps gain
    weights[2] = rng.laplace(0, 0.1, (6, 3000))
    weights[3] = rng.standard_t(4, (6, 3000)) * 0.1
    found = tg.percentile_steps(torch.from_numpy(weights).float(), qmax, floor, PERCENTILES)
    chosen = set()
    for w, steps in zip(weights, found, strict=True):
        wanted, best = reference_steps(w, qmax, floor, PERCENTILES)
        chosen.add(best)
        assert np.allclose(steps.numpy(), wanted, rtol=1e-3, atol=0)
        clipped = np.quantile(np.abs(w), PERCENTILES[best], axis=1)
        assert (steps.numpy()[clipped < floor] == np.float16(floor / qmax)).all()
        whole = (torch.from_numpy(np.abs(w).max(1)).float().clamp_min(floor) / qmax).half()
        errors = []
        for step in (steps.double(), whole.double()):
            q = (torch.from_numpy(w) / step[:, None]).round().clamp(-qmax, qmax)
            errors.append(float((torch.from_numpy(w) - q * step[:, None]).square().mean()))
        assert errors[0] <= errors[1]
    assert len(chosen) > 1 or floor == 1
    assert (found == np.float16(1 / 31)).any() if floor == 1 else True
    single = tg.percentile_steps(torch.from_numpy(weights).float(), qmax, floor, (0.9999984,))
    for w, steps in zip(weights, single, strict=True):
        assert np.allclose(
            steps.numpy(), reference_steps(w, qmax, floor, (0.9999984,))[0], rtol=1e-3, atol=0
        )


def test_a_row_of_zeros_spoils_neither_steps_nor_choice():
    w = torch.zeros(1, 3, 400)
    w[0, 1] = torch.randn(400, generator=torch.Generator().manual_seed(0))
    w[0, 1, 7] = 9.0
    found = tg.percentile_steps(w, 31, 0.0, PERCENTILES)
    wanted = tg.percentile_steps(w[:, 1:2], 31, 0.0, PERCENTILES)
    assert found[0, 1] == wanted[0, 0]
    assert (found[0, [0, 2]] == 2.0**-14).all()
    q = tg.GptqSolver.prepare(w, [torch.eye(400)]).solve(found.float(), torch.ones(1, 400), 31)
    assert torch.equal(q, (w / found.float()[..., None]).round().clamp(-31, 31).short())
    assert (q[0, [0, 2]] == 0).all()


@pytest.mark.parametrize("quantizer", ["gptq_lite", "int6"])
def test_codes_are_the_nearest_and_come_back_through_every_compressor(quantizer, compressor):  # noqa: F811
    cfg = tiny_config(
        **FEATURES, quantizer=quantizer, compressor=compressor, artifact_limit_bytes=0, embed_bits=8
    )
    model = random_model(cfg)
    with torch.no_grad():
        model.up_bank.mul_(20)  # beyond the floor
    _, data = packed_by(cfg, model=model)
    other, codes = loaded(cfg, data)
    assert {"tok_emb", "bigram_emb", "ve_emb"} < codes.keys()
    for name, q in codes.items():
        table = name.endswith("_emb")
        qmax = 127 if table else 31
        shares = PERCENTILES if quantizer == "gptq_lite" and not table else (0.9999984,)
        w = model.get_parameter(name).detach().view(q.shape).double().numpy()
        for i, matrix in enumerate(w):
            step = reference_steps(matrix, qmax, 1.0, shares)[0].astype(np.float64)[:, None]
            near = np.clip(np.rint(matrix / step), -qmax, qmax)
            assert (near != q[i]).mean() < 0.01, name  # a step may be rounded the other way
            back = other.get_parameter(name).detach().view(q.shape)[i].numpy()
            assert np.abs(back - near * step).max() <= 1.01 * step.max()
            if np.abs(matrix).max() < 1:
                scale = back[q[i] != 0] / q[i][q[i] != 0]
                assert np.allclose(
                    scale, np.float16(1 / qmax), rtol=1e-6
                )  # fp16(1/31), fp16(1/127)
    for name in tg.float_shapes(cfg):
        if name != "parallel_resid_lambdas" and name != "parallel_post_lambdas":
            assert torch.equal(
                other.get_parameter(name), model.get_parameter(name).half().float()
            ), name


def digest(ranks: tg.Ranks) -> list[str]:
    found = []
    for quantizer, limit in (
        ("gptq_lite", 0),
        ("int6", 0),
        ("gptq_lite", 20_000),
        ("allocated", 20_000),
    ):
        limit = limit and limit + tg.CODE_BYTES
        cfg = tiny_config(
            **FEATURES, quantizer=quantizer, compressor="zstd", artifact_limit_bytes=limit
        )
        model = random_model(cfg)
        rows = random_rows(cfg, 4)
        run = calibrating(cfg, model, ONE)
        calibration = tg.Run.calibrate(run, cfg.plans[1], rows)  # equal to the last bit on all
        data = tg.fit_artifact(
            tg.Quantizer(model, *calibration, ranks), model, {}, lambda line: None
        )
        found.append(hashlib.sha256(data).hexdigest())
    return found


@pytest.mark.parametrize("quantizer", ["gptq_lite", "int6"])
def test_a_fit_without_hessians_lands_under_the_limit_and_more_room_never_costs_accuracy(quantizer):
    shape = dict(
        model_dim=64, num_heads=4, mlp_mult=4, quantizer=quantizer, compressor="ans", **FEATURES
    )
    free = tiny_config(**shape, artifact_limit_bytes=0)
    errors = []
    for limit in (50_000, 70_000, 90_000, 10**7):
        cfg = dataclasses.replace(free, artifact_limit_bytes=limit + tg.CODE_BYTES)
        model, data = packed_by(cfg)
        assert len(data) <= limit
        assert len(data) > limit - 4096 or limit == 10**7
        errors.append(
            {name: relative(loaded(cfg, data)[0], model, name) for name in tg.bank_shapes(cfg)}
        )
    model, data = packed_by(free)
    base = loaded(free, data)[0]
    for name in tg.bank_shapes(free):
        series = [e[name] for e in errors]
        assert series == sorted(series, reverse=True), name
        assert series[-1] < relative(base, model, name)  # the limit leaves room: finer, not clipped


@pytest.mark.parametrize("quantizer", ["allocated", "gptq", "gptq_lite", "int6"])
@pytest.mark.parametrize("fp16", [False, True])
def test_tables_survive_every_quantizer(quantizer, fp16):
    cfg = tiny_config(
        **FEATURES, quantizer=quantizer, tables_fp16=fp16, embed_bits=8, clip_floor=0.01
    )
    model, data = packed_by(cfg)
    other, codes = loaded(cfg, data)
    for name in ("tok_emb", "bigram_emb", "ve_emb"):
        assert (name in codes) != fp16
        bound = (
            1e-3 if fp16 else 0.1 if quantizer != "allocated" else 1.0
        )  # which may do without a table
        assert 0 < relative(other, model, name) <= bound, name
        if fp16:
            assert torch.equal(other.get_parameter(name), model.get_parameter(name).half().float())
    row = random_rows(cfg, 1)[0]
    with torch.no_grad():
        nats = [m(row, cfg.plans[1]).mean() for m in (model, other)]
    assert abs(nats[0] - nats[1]) < 0.02 * nats[0]


# --- Pruning --------------------------------------------------------------------------------------
def test_the_smallest_share_of_banks_and_tables_becomes_zero_and_nothing_else_changes():
    cfg = tiny_config(**FEATURES, prune_frac=0.1)
    model = random_model(cfg)
    before = random_model(cfg)
    tg.prune(model)
    pruned = [n for n, role in tg.parameter_table(cfg).items() if role.packing != "float"]
    assert {"tok_emb", "bigram_emb", "ve_emb", "down_bank"} < set(pruned)

    def flat(network: tg.GPT) -> np.ndarray:
        return np.concatenate([network.get_parameter(n).detach().flatten().numpy() for n in pruned])

    was = flat(before)
    now = flat(model)
    least = np.quantile(np.abs(was), 0.1, method="lower")
    assert np.array_equal(now, np.where(np.abs(was) < least, 0, was))
    assert abs((now == 0).mean() - 0.1) < 1e-4
    assert all(
        torch.equal(model.get_parameter(n), p)
        for n, p in before.named_parameters()
        if n not in pruned
    )
    tg.prune(model)
    assert np.array_equal(now, flat(model))
    fp16 = tg.GPT(dataclasses.replace(cfg, tables_fp16=True))
    fp16.load_state_dict(before.state_dict())
    tg.prune(fp16)
    assert all(torch.equal(fp16.get_parameter(n), model.get_parameter(n)) for n in pruned)


# --- Files ----------------------------------------------------------------------------------------
def test_a_file_names_the_added_parts_only_where_they_are_there():
    plain_cfg = tiny_config()
    cfg = tiny_config(**FEATURES, tables_fp16=True)
    assert not set(tg.OPTIONAL_NETWORK_FIELDS) & tg.network_config(plain_cfg).keys()
    assert tg.read_network_config(tg.network_config(plain_cfg)) == {
        f: getattr(plain_cfg, f) for f in tg.NETWORK_FIELDS
    }
    gates = {name for name in tg.OPTIONAL_NETWORK_FIELDS if "gate" in name}
    header, _ = tg.open_artifact(packed_by(cfg)[1], Path("file"))
    present = set(tg.OPTIONAL_NETWORK_FIELDS) & header["config"].keys()
    assert present == set(tg.OPTIONAL_NETWORK_FIELDS) - gates
    read = tg.config_of_header(header)
    assert tg.parameter_table(read) == tg.parameter_table(cfg)
    assert all(getattr(read, f) == getattr(cfg, f) for f in tg.NETWORK_FIELDS)
    with pytest.raises(KeyError):  # what every file has must be there
        tg.read_network_config(
            {f: x for f, x in tg.network_config(cfg).items() if f != "rope_dims"}
        )


FORGED = {
    "leaky_slope": [2.0, -0.5, "0.5", None, math.nan],
    "branch_scale": [1, "yes"],
    "rope_train_seq_len": [-1, 0.5],
    "bigram_vocab_size": [1, -3, 49, 2**40, True],
    "bigram_dim": [0, 9, "8"],
    "smear_enabled": [0, False],
    "ve_enabled": [False, 1],
    "ve_dim": [0, 7],
    "ve_layers": ["", "1,4", "1,1", "x", "9" * 5000, 3, ["1", "3"]],
    "tables_fp16": [True, 0],
    "data_loader": ["other"],
}


def test_forged_headers_of_added_parts_are_refused_in_one_line():
    _, data = packed_by(tiny_config(**{**FEATURES, "ln_scale": True, "branch_scale": False}))
    header = parts(data)[0]
    for field, values in FORGED.items():
        for value in values:
            forged = {**header, "config": {**header["config"], field: value}}
            with pytest.raises(tg.UsageError, match=r"^some.ptz: damaged: [^\n]*$"):
                tg.open_artifact(rebuilt(data, forged), Path("some.ptz"))
    for field in (
        "bigram_vocab_size",
        "ve_enabled",
        "smear_enabled",
    ):  # lost: the streams are another network's
        forged = {**header, "config": {f: x for f, x in header["config"].items() if f != field}}
        with pytest.raises(tg.UsageError, match=r"^some.ptz: damaged: "):
            tg.open_artifact(rebuilt(data, forged), Path("some.ptz"))


def test_a_checkpoint_brings_its_parts_and_the_environment_may_not_contradict(tmp_path):
    cfg = tiny_config(**FEATURES)
    weights = {n: p.detach() for n, p in random_model(cfg).named_parameters()}
    torch.save(
        {"config": tg.network_config(cfg), "weights": weights, "looped": True, "step": 1},
        data := io.BytesIO(),
    )
    path = tmp_path / "final_model.pt"
    path.write_bytes(data.getvalue())
    asking = tiny_config(eval_only_path=path)
    found, _ = tg.load_model_file(asking, dict.fromkeys(vars(asking), "default"))
    assert tg.parameter_table(found) == tg.parameter_table(cfg) != tg.parameter_table(asking)
    other = dataclasses.replace(asking, ve_dim=16)
    origin = dict.fromkeys(vars(other), "default") | {"ve_dim": "env", "num_layers": "env"}
    with pytest.raises(tg.UsageError, match="was made with VE_DIM=8$"):
        tg.load_model_file(other, origin)


def test_what_may_be_trained_can_be_read_again():
    for settings in (
        dict(logit_softcap=100.0, fused_ce=False),
        dict(num_loops=64, loop_start=0, loop_end=0),
    ):
        model, data = packed_by(tiny_config(**settings))
        assert tg.open_artifact(data, Path("x"))[0]["config"] == tg.network_config(model.cfg)


def test_knobs_are_judged_by_the_network_of_the_file(tmp_path):
    cfg = tiny_config()
    saved = {
        "config": tg.network_config(cfg),
        "weights": tg.GPT(cfg).state_dict(),
        "looped": True,
        "step": 1,
    }
    torch.save(saved, path := tmp_path / "x.pt")
    asking = dataclasses.replace(
        tiny_config(eval_only_path=path), num_layers=9, ttt_freeze_blocks=5
    )
    with pytest.raises(tg.UsageError, match=r"^TTT_FREEZE_BLOCKS=5: must be at most NUM_LAYERS=4$"):
        tg.load_model_file(asking, dict.fromkeys(vars(asking), "default"))


@pytest.mark.parametrize(
    "forged", [{"num_heads": 0}, {"mlp_mult": math.inf}, {"mlp_mult": math.nan}], ids=str
)
def test_a_checkpoint_of_an_impossible_network_is_refused_by_name(tmp_path, forged):
    cfg = tiny_config()
    saved = {
        "config": tg.network_config(cfg) | forged,
        "weights": tg.GPT(cfg).state_dict(),
        "looped": True,
        "step": 1,
    }
    torch.save(saved, path := tmp_path / "x.pt")
    asking = tiny_config(eval_only_path=path)
    with pytest.raises(tg.UsageError, match=f"^{next(iter(forged)).upper()}=[^\n]*$"):
        tg.load_model_file(asking, dict.fromkeys(vars(asking), "default"))


@pytest.mark.parametrize(
    "forged",
    [{"looped": 7}, {"looped": None}, {"looped": "x"}, {"weights": {}}, {"weights": 5}],
    ids=str,
)
def test_fields_that_no_run_writes_are_refused_in_one_line(tmp_path, forged):
    cfg = tiny_config(**FEATURES)
    model, data = packed_by(cfg)
    (tmp_path / "x.ptz").write_bytes(rebuilt(data, {**parts(data)[0], **forged}))
    saved = {
        "config": tg.network_config(cfg),
        "weights": model.state_dict(),
        "looped": True,
        "step": 1,
        **forged,
    }
    torch.save(saved, tmp_path / "x.pt")
    for name in ("x.ptz", "x.pt"):
        asking = tiny_config(eval_only_path=tmp_path / name)
        with pytest.raises(tg.UsageError, match=rf"^(EVAL_ONLY_PATH=)?/[^\n]*/{name}: [^\n]*$"):
            tg.load_model_file(asking, dict.fromkeys(vars(asking), "default"))


# --- Windows and chunks ---------------------------------------------------------------------------
@pytest.mark.parametrize(("targets", "count"), [(62_021_632, 969_057), (40_540_160, 633_409)])
def test_scorer_makes_the_published_windows_of_a_stream_of_rows(targets, count):
    cfg = SimpleNamespace(eval_seq_len=2048, data_loader="rows")
    docs = SimpleNamespace(__getitem__=None)
    scorer = tg.Scorer(None, (), SimpleNamespace(docs=docs, padding_index=targets), cfg, ONE, None)
    scored = 0
    windows = 0
    last = 0
    for start, score, end in scorer.stream_windows(64):
        assert score == last and start <= score < end <= start + 2048 and start % 64 == 0
        scored = scored + end - score
        windows = windows + 1
        last = end
    assert (windows, scored, last) == (count, targets, targets)


def test_chunks_hold_the_published_windows_whole():
    """SP8192: 1238 chunks, each target once, all chunks but the last learnt from."""

    class Stub(tg.Scorer):
        def score_windows(self, spans, shared):
            self.log.append(
                (len(spans), spans[0][1], spans[-1][2], sum(end - score for _, score, end in spans))
            )

    targets = 40_540_160
    cfg = tg.Config(preset="pr1413", ttt_mode="chunk", sliding_window_enabled=True)
    cfg = dataclasses.replace(cfg, data_loader="rows")
    docs = SimpleNamespace(target_indices=lambda: np.arange(targets))
    scorer = Stub(
        None, (), SimpleNamespace(docs=docs, padding_index=targets), cfg, ONE, found := []
    )
    learns = [(len(learnt), left) for left, learnt in tg.score_chunks(scorer, tg.Deadline(1e9))]
    assert len(found) == 1238
    assert sum(windows for windows, *_ in found) == 633_409  # none is cut
    for k, (_, first, end, scored) in enumerate(found):
        assert (first, end) == (k * 32768, min((k + 1) * 32768, targets))
        assert scored == end - first
    assert learns == [(1, targets - (k + 1) * 32768) for k in range(1237)]


@pytest.fixture
def steps(monkeypatch):
    """(rate, places) of every learn_weights, and the weights after the last one."""
    calls, real = [], tg.learn_weights

    def spy(model, forward, sgd, scorer, place):
        real(model, forward, sgd, scorer, place)
        calls.append(
            (
                sgd.param_groups[0]["lr"],
                place,
                {n: p.detach().clone() for n, p in model.named_parameters()},
            )
        )

    monkeypatch.setattr(tg, "learn_weights", spy)
    return calls


@pytest.mark.parametrize("settings", [dict(ttt_chunk_optimizer="adam", ttt_lr=0.002), {}], ids=str)
@pytest.mark.parametrize("loader", ["documents", "shuffled"])
def test_tokens_after_a_chunk_do_not_change_it_with_all_parts_on(steps, settings, loader):
    """Token (k + 1) C is the last target of chunk k; those after it may be anything."""
    cfg = tiny_config(**{**FEATURES, **CHUNKS, **settings, "data_loader": loader})
    docs = documents(*MANY)
    model = random_model(cfg)
    before = nats_of(evaluated(model, docs))
    chunks = -(-len(before) // 128)
    assert [len(place) for _, place, _ in steps] == [128] * (chunks - 1)
    assert steps[0][0] == cfg.ttt_lr
    assert np.abs(before - nats_of(plain(model, docs, 16)))[128:].mean() > 1e-4
    assert_equal(before[:128], nats_of(plain(model, docs, 16))[:128])
    for k in (0, 3):
        other = docs
        for place in range((k + 1) * 128 + 1, (k + 1) * 128 + 40):
            other = other if place in docs.starts else edited(other, place)
        after = nats_of(evaluated(model, other))
        assert_equal(after[: (k + 1) * 128], before[: (k + 1) * 128])
        assert (after[(k + 2) * 128 :] != before[(k + 2) * 128 :]).mean() > 0.9
    learnt = steps[-1][2]
    unchanged = {n for n, p in model.named_parameters() if torch.equal(p, learnt[n])}
    assert unchanged <= {"parallel_post_lambdas", "parallel_resid_lambdas"}  # all parts learn


def test_adam_by_chunks_takes_the_steps_of_torchs_adamw(steps):
    cfg = tiny_config(
        **{
            **FEATURES,
            **CHUNKS,
            "ttt_chunk_optimizer": "adam",
            "ttt_epochs": 1,
            "ttt_grad_clip": 0.0,
        }
    )
    docs = documents(128, 100)
    model = random_model(cfg)
    evaluated(model, docs)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    ((lr, place, after),) = steps
    tokens = torch.from_numpy(docs.tokens)
    cu = torch.tensor([0, 64, 128], dtype=torch.int32)
    model.zero_grad()
    model(tg.Batch(tokens[place], tokens[place + 1], cu, S), cfg.plans[1]).mean().backward()
    for name, p in model.named_parameters():  # Adam's first step is lr * g / (|g| + eps)
        moved, wanted = after[name] - start[name], -lr * p.grad / (p.grad.abs() + 1e-8)
        firm = p.grad.abs() > 1e-5
        assert torch.allclose(moved[firm], wanted[firm], atol=2e-3 * lr), name


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_frozen_layers_keep_their_bits_with_all_parts_on(steps, optimizer):
    cfg = tiny_config(
        **{**FEATURES, **CHUNKS, "ttt_freeze_blocks": 2, "ttt_chunk_optimizer": optimizer}
    )
    model = random_model(cfg)
    evaluated(model, documents(*MANY))
    L, whole = cfg.num_layers, ("tok_", "skip_", "bigram_", "smear_", "ve_")
    for name, now in steps[-1][2].items():
        changed = (now != model.get_parameter(name).detach()).flatten(1 if now.dim() > 1 else 0)
        if name.startswith(whole):
            assert changed.any(), name
        else:
            layers = changed.view(-1, L, changed[0].numel())
            assert not layers[:, :2].any(), name
            assert layers[:, 2:].any() or name.startswith("parallel"), name


@pytest.mark.parametrize("name", PRESETS)
def test_deadline_of_zero_is_base_scoring_in_every_preset(name):
    docs = documents(*MANY)
    model = random_model(preset_config(name))
    assert model.cfg.ttt_mode == ("document" if name == "pr605" else "chunk")
    stride = model.cfg.eval_stride * model.cfg.sliding_window_enabled
    ledger = evaluated(model, docs, seconds=0.0)
    loader = "documents" if name == "pr605" else model.cfg.data_loader
    other = with_settings(model, data_loader=loader)  # in document mode no window leaves its text
    base = nats_of(plain(other, docs))
    first = docs.target_indices()[: model.cfg.ttt_chunk_tokens]
    base[first] = nats_of(plain(other, docs, stride))[
        first
    ]  # once the time is over, no window overlaps another
    assert np.abs(nats_of(ledger) - base).max() < 1e-5
    assert ledger.num_not_learnt_from > 0
    learnt = evaluated(model, docs)
    assert learnt.num_not_learnt_from == 0 and (nats_of(learnt) != nats_of(ledger)).any()


@pytest.mark.parametrize("stride", [16, 64])
@pytest.mark.parametrize("name", ["pr473", "pr1413"])
def test_a_rate_of_zero_is_sliding_scoring_at_the_stride_that_was_asked_for(name, stride):
    docs = documents(*MANY)
    model = random_model(preset_config(name, ttt_lr=0, eval_stride=stride))
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = nats_of(evaluated(model, docs))
    assert np.abs(found - nats_of(plain(model, docs, stride))).max() < 1e-6
    assert np.abs(found - nats_of(plain(model, docs, 80 - stride))).max() > 1e-3
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())


class Watched(tg.Run):
    """A run in this process that keeps the weights before and after adaptation."""

    def warm_up(self, last: tuple) -> float:
        return 0.0

    def adapt(self, *args: Any) -> tg.Ledger:
        self.began = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        ledger = super().adapt(*args)
        self.left = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        return ledger


@pytest.mark.parametrize("name", ["pr473", "pr1413"])
def test_adaptation_begins_with_the_artifact_and_leaves_it(tiny_data, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    cfg = preset_config(
        name, data_dir=tiny_data, run_id="x", ttt_lr=0, train_seq_len=64, iterations=2
    )
    run = Watched(cfg, dict.fromkeys(vars(cfg), "default"), cpu_ranks())
    final = run.go()
    model, _ = loaded(cfg, Path("runs/x/final_model.int6.ptz").read_bytes())
    trained = torch.load("runs/x/final_model.pt", weights_only=True)["weights"]
    for n, p in model.named_parameters():
        unread = cfg.parallel_start_layer if n.startswith("parallel") else 0
        assert torch.equal(run.began[n][unread:], p[unread:]), n
        assert torch.equal(run.left[n], run.began[n])
    assert not torch.equal(run.began["up_bank"], trained["up_bank"])
    assert final["quantized_ttt_lora_loss"] == pytest.approx(
        final["quantized_sliding_window_loss"], abs=1e-7
    )


def chunks_on(ranks: tg.Ranks, chunk: int) -> tuple[np.ndarray, dict[str, Tensor], int]:
    """Scores, and the weights after the last update and how many there were."""
    found, real = [], tg.learn_weights
    tg.learn_weights = lambda model, *args: (real(model, *args), found.append(model.state_dict()))
    try:
        cfg = tiny_config(**{**FEATURES, **CHUNKS, "ttt_chunk_tokens": chunk})
        model = random_model(cfg)
        real_dict = model.state_dict
        model.state_dict = lambda: {n: p.clone() for n, p in real_dict().items()}
        ledger = evaluated(model, documents(*MANY[:9]), ranks)
    finally:
        tg.learn_weights = real
    return nats_of(ledger), found[-1], len(found)


def on_both(ranks: tg.Ranks) -> tuple[list[str], dict[int, tuple]]:
    return digest(ranks), {chunk: chunks_on(ranks, chunk) for chunk in (128, 64)}


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[tuple]:
    return on_ranks(2, on_both, tmp_path_factory.mktemp("ranks"))


def test_two_ranks_quantise_to_the_bytes_of_one(together):
    (first, _), (second, _) = together
    assert first == digest(ONE)
    assert set(second) == {hashlib.sha256(b"").hexdigest()}


@pytest.mark.parametrize("chunk", [128, 64])  # two rows a chunk; one row, so that a rank has none
def test_ranks_take_the_steps_of_one_even_without_a_row(together, chunk):
    nats, weights, count = chunks_on(cpu_ranks(), chunk)
    assert count == -(-sum(MANY[:9]) // chunk) - 1
    for _, found in together:
        assert found[chunk][2] == count
        assert np.abs(found[chunk][0] - nats).max() < 1e-3
        for name, w in found[chunk][1].items():
            assert (w - weights[name]).norm() <= 1e-4 * weights[name].norm(), name
            assert torch.equal(w, together[0][1][chunk][1][name]), name
