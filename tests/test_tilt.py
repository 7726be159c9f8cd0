"""The token tilt: hints against a plain loop, the distribution, scores of all evaluations."""

from __future__ import annotations

import itertools
import math
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, on_ranks, run_script, tiny_config
from test_ttt import CPU, TABLE, documents, evaluated, model_for, scorer_for, with_settings
from torch import Tensor

import train_gpt as tg

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "bench")]
import hints
import tilt

NUM_TOKENS = 100_000
TILT = dict(tilt_order=3, tilt_threshold=0.6)
MODES = {
    "plain": dict(ttt_enabled=False),
    "sliding": dict(ttt_enabled=False, eval_stride=16),
    "document": {},
    "chunk": dict(ttt_mode="chunk", ttt_chunk_tokens=128, ttt_lr=0.05),
    "phases": dict(
        phased_ttt_num_phases=2, phased_ttt_prefix_docs=3, ttt_chunk_tokens=64, ttt_lr=0.05
    ),
}
LENGTHS = (100, 33, 1, 70, 16)


# --- Hints ----------------------------------------------------------------------------------------
def online(tokens: list[int], order: int) -> tuple[list[int], list[float]]:
    """One token after the other: the earlier target with the top token, and the share of that.

    A target is counted after its entries are made.
    """
    table = {}
    sources, shares = [], []
    for i, token in enumerate(tokens):
        context = tuple(tokens[i - order + 1 : i])
        seen, most, source, counts = table.get(context, (0, 0, -1, {}))
        if i < order - 1:
            seen = 0
        sources.append(source)
        shares.append(most / seen if seen else -1.0)
        if i >= order - 1:
            counts[token] = counts.get(token, 0) + 1
            if counts[token] > most:
                most, source = counts[token], i
            table[context] = (seen + 1, most, source, counts)
    return sources, shares


@cache
def stream(kind: str) -> Tensor:
    """(NUM_TOKENS,) int32: random bits, a text repeated with errors, or the bytes of this code."""
    rng = np.random.default_rng(0)
    if kind == "random":
        tokens = rng.integers(0, 2, NUM_TOKENS)
    elif kind == "repetitive":
        text = np.resize(rng.integers(0, 9, 200), NUM_TOKENS)
        tokens = np.where(rng.random(NUM_TOKENS) < 0.03, rng.integers(0, 9, NUM_TOKENS), text)
    else:
        tokens = np.frombuffer((ROOT / "train_gpt.py").read_bytes(), np.uint8)[-NUM_TOKENS:]
    return torch.tensor(tokens.astype(np.int32))


@pytest.mark.parametrize("order", [2, 3, 5, 9, 16])
@pytest.mark.parametrize("kind", ["random", "repetitive", "real"])
def test_hints_are_those_of_a_loop_over_the_tokens(kind, order):
    tokens = stream(kind)
    assert len(tokens) == NUM_TOKENS
    sources, shares = map(np.array, online(tokens.tolist(), order))
    for threshold in (0.5, 0.55, 0.8, 1.0):
        found = tg.hint_sources(tokens, order, threshold).numpy()
        assert np.array_equal(found, np.where(shares >= threshold, sources, -1))
    assert (shares > 0).any()


@pytest.mark.parametrize("length", [0, 1, 2, 15, 16, 17, 300])
def test_short_streams_and_the_first_context(length):
    tokens = torch.ones(length, dtype=torch.int32)
    found = tg.hint_sources(tokens, 16, 0.8)
    # The first context is complete at target 15 and seen again at 16; its count rose last before.
    assert found.tolist() == [-1] * min(length, 16) + list(range(15, length - 1))


def test_parts_change_nothing(monkeypatch):
    tokens = stream("real")
    whole = tg.hint_sources(tokens, 5, 0.5)
    monkeypatch.setattr(tg, "TARGETS_AT_ONCE", 3001)
    monkeypatch.setattr(tg, "KEYS_AT_ONCE", 977)
    assert torch.equal(tg.hint_sources(tokens, 5, 0.5), whole)


def test_hints_of_a_prefix_are_those_of_the_stream_that_ends_there():
    tokens = stream("real")
    whole = tg.hint_sources(tokens, 5, 0.5)
    for cut in (10, 777, 50_000):
        assert torch.equal(tg.hint_sources(tokens[:cut], 5, 0.5), whole[:cut])
        changed = tokens.clone()
        changed[cut - 1 :] = changed[cut - 1 :].flip(0)  # the target of the last hint, too
        assert torch.equal(tg.hint_sources(changed, 5, 0.5)[:cut], whole[:cut])


def test_a_shared_key_joins_two_contexts_and_the_hint_still_comes_from_earlier_tokens(monkeypatch):
    monkeypatch.setattr(tg, "mix_bits", lambda keys, factor: keys * 0)  # all contexts collide
    tokens = stream("real")[:5000]
    found = tg.hint_sources(tokens, 9, 0.1)
    hinted = (found >= 0).nonzero().squeeze(1)
    assert len(hinted) > 100 and (found[hinted] < hinted).all()
    assert torch.equal(tg.hint_sources(tokens[:3000], 9, 0.1), found[:3000])


def test_keys_differ_where_contexts_do():
    """All contexts of two tokens of 512, which also differ in one bit or in their order."""
    a, b = torch.arange(512).repeat_interleave(512), torch.arange(512).repeat(512)
    # Stream a0 b0 a1 b1 ..: every second context is a pair.
    tokens = torch.stack([a, b], 1).flatten().int()
    keys = tg.context_keys(tokens, 2)[::2]
    assert len(keys.unique()) == len(keys)
    # Every bit is set in half of the keys.
    bits = (keys[:100_000, None] >> torch.arange(64)) & 1
    assert (bits.float().mean(0) - 0.5).abs().max() < 0.01


# --- The tilted distribution ----------------------------------------------------------------------
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 2.625, 12.0])
@pytest.mark.parametrize("height", [-60.0, -20.0, 0.0, 5.0, 14.0, 40.0])
def test_tilt_is_a_distribution_at_every_probability_of_the_hint(height, beta, gamma):
    logits = torch.randn(50, dtype=torch.float64)
    logits[7] = height
    log_q = logits.log_softmax(0)
    wanted = log_q.clone()
    wanted[7] += beta * (-log_q.exp()[7] + 1).clamp_min(0) ** gamma
    wanted = -wanted.log_softmax(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        nats = -log_q.to(dtype)
        is_hit = torch.arange(50) == 7
        losses = tg.tilt_losses(nats[7].expand(50), is_hit, (beta,), gamma)[:, 0]
        tilted = nats.double() + losses
        assert abs(float((-tilted).exp().sum()) - 1) < max(tolerance, 1e-6)
        assert ((tilted - wanted).abs() <= tolerance * wanted.abs().clamp_min(1)).all()


def test_nats_below_zero_by_rounding_give_no_nan():
    losses = tg.tilt_losses(torch.tensor([-1e-7, 0.0]), torch.tensor([True, False]), (2.0,), 0.5)
    assert losses.isfinite().all()


def test_hedge_is_the_mixture_by_earlier_scores_and_close_to_the_best_beta():
    betas, count = (0.0, 1.0, 2.0, 4.0), 400
    hint_nats = torch.rand(count, dtype=torch.float64) * 4
    is_hit = torch.rand(count) < 0.7
    losses = tg.tilt_losses(hint_nats, is_hit, betas, 0.0)
    found = tg.mixed_loss(losses)
    weights = np.full(4, 0.25)
    for i in range(count):
        p = np.exp(-losses[i].numpy())
        assert abs(float(found[i]) + math.log(weights @ p)) < 1e-9
        weights = weights * p / (weights @ p)
    assert float(found.sum()) <= float(losses.sum(0).min()) + math.log(4) + 1e-9
    single = losses[:, 2:3]
    assert torch.equal(tg.mixed_loss(single), single[:, 0])


# --- Scores ---------------------------------------------------------------------------------------
def repetitive_documents() -> tg.Documents:
    """Documents over few tokens, in which short contexts come again, with right and wrong hints."""
    docs = documents(*LENGTHS)
    rng = np.random.default_rng(1)
    text = np.resize(rng.integers(4, 40, 30), len(docs.tokens))
    tokens = np.where(rng.random(len(text)) < 0.1, rng.integers(4, 40, len(text)), text)
    tokens[docs.starts] = docs.tokens[docs.starts]
    return docs._replace(tokens=tokens)


def scored(model: tg.GPT, docs: tg.Documents, ranks: tg.Ranks | None = None) -> tg.Ledger:
    if model.cfg.ttt_enabled:
        return evaluated(model, docs, ranks)
    return tg.score_all(scorer_for(model, docs, ranks), model.cfg.eval_stride % 64)


@pytest.mark.parametrize("mode", MODES)
def test_every_evaluation_tilts_the_scores_that_it_gives_without(mode):
    """Learning sees the untilted loss: otherwise the scores below would differ."""
    docs = repetitive_documents()
    plain = model_for(3, **MODES[mode])
    without = scored(plain, docs)
    assert without.tilt is None
    zero = scored(with_settings(plain, **TILT, tilt_beta=0.0), docs)
    assert torch.equal(zero.nats, without.nats)

    ledger = scored(with_settings(plain, **TILT, tilt_gamma=0.5), docs)
    hints = ledger.tilt
    assert ledger.problems(int(docs.counts.sum())) == []
    assert len(hints.index) > 30 and (hints.gains > 0).any() and (hints.gains < 0).any()
    untilted = ledger.nats.clone()
    untilted[hints.index] += hints.gains
    assert (untilted - without.nats).abs().max() < 1e-6
    is_hinted = torch.zeros(len(ledger.nats), dtype=torch.bool)
    is_hinted[hints.index] = True
    assert torch.equal(ledger.nats[~is_hinted], without.nats[~is_hinted])
    saved = ledger.by_document()
    total = float(without.nats.double().sum()) - saved["doc_nats"].sum()
    assert abs(saved["tilt_gains"].sum() - total) < 1e-3


def score_on_rank(ranks: tg.Ranks, settings: dict, docs: tg.Documents) -> Tensor:
    ledger = scored(model_for(2, **settings, **TILT, tilt_hedge="1,2,3"), docs, ranks)
    assert ledger.problems(int(docs.counts.sum())) == []
    return ledger.nats


def test_ranks_and_batches_leave_tilted_scores_alone(tmp_path):
    docs = repetitive_documents()
    model = model_for(2, **TILT, tilt_hedge="1,2,3")
    one = scored(model, docs).nats
    others = scored(with_settings(model, ttt_batch_size=7), docs).nats
    assert (others - one).abs().max() < 1e-6
    # Adaptation enlarges the rounding of another head.
    others = scored(with_settings(model, fused_ce=False), docs).nats
    assert (others - one).abs().max() < 1e-5
    two = on_ranks(2, score_on_rank, tmp_path, {}, docs)
    assert torch.equal(two[0], two[1]) and (two[0] - one).abs().max() < 1e-6


def test_stream_of_a_sample_is_its_documents_in_order():
    docs = repetitive_documents()
    chosen = [0, 2, 3]
    sample = docs._replace(starts=docs.starts[chosen], counts=docs.counts[chosen])
    cfg = tiny_config(**TILT)
    found = tg.Ledger(sample, TABLE, CPU, cfg).tilt
    joined = [docs.tokens[start + 1 : end + 1] for start, end in sample.spans()]
    sources = tg.hint_sources(torch.tensor(np.concatenate(joined), dtype=torch.int32), 3, 0.6)
    index = sample.target_indices()
    assert found.index.tolist() == index[sources.numpy() >= 0].tolist()
    assert found.sources.tolist() == index[sources[sources >= 0].numpy()].tolist()


def test_ledger_finds_hints_from_later_targets_and_ranks_that_differ(monkeypatch):
    docs = repetitive_documents()
    model = model_for(3, **MODES["plain"], **TILT)
    find = tg.hint_sources

    def from_the_end(tokens, *rest):
        later = find(tokens.flip(0), *rest).flip(0)
        return torch.where(later < 0, -1, len(tokens) - 1 - later)

    monkeypatch.setattr(tg, "hint_sources", from_the_end)
    (problem,) = scored(model, docs).problems(int(docs.counts.sum()))
    assert "hints do not come from earlier targets" in problem

    monkeypatch.setattr(tg, "hint_sources", find)
    calls = itertools.count()
    ranks = tg.Ranks({})
    ranks.gather = lambda value: [value, (next(calls), *value)] if value else [value]
    (problem,) = scored(model, docs, ranks).problems(int(docs.counts.sum()))
    assert problem == "ranks have different hints"


def test_without_the_tilt_a_batch_has_no_hints_and_nothing_is_looked_up(monkeypatch):
    monkeypatch.delattr(tg, "hint_sources")
    model = model_for(3, **MODES["plain"])
    batches = []

    def forward(batch, *rest):
        batches.append(batch)
        return model(batch, *rest)

    tg.score_all(scorer_for(model, repetitive_documents(), forward=forward), 0)
    assert batches and all(batch.hints is None for batch in batches)


@pytest.mark.parametrize("transform", ["", "_caseops"])
def test_log_and_tool_say_what_the_order_is_and_where_hints_gained(
    tiny_data: Path, caseops_data: Path, tmp_path: Path, monkeypatch, capsys, transform
):
    data = caseops_data if transform else tiny_data
    dataset = TINY["DATASET"] + transform
    environ = {**TINY, "DATA_DIR": str(data), "DATASET": dataset, "TILT_ORDER": "3"}
    environ |= {"RUN_ID": "a"}
    environ |= {"ITERATIONS": "1", "WARMUP_STEPS": "0", "TTT_ENABLED": "0"}
    done = run_script(environ, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a function of the artifact and of the targets before it" in done.stdout
    assert "tilt: hints:" in done.stdout and "quantized_tilt_gain" in done.stdout
    saved = np.load(tmp_path / "runs" / "a" / "documents.npz")
    assert len(saved["tilt_index"]) == len(saved["tilt_gains"]) > 0

    monkeypatch.setenv("DATA_DIR", str(data))
    monkeypatch.setenv("DATASET", dataset)
    monkeypatch.setenv("VOCAB_SIZE", TINY["VOCAB_SIZE"])
    assert tilt.main([str(tmp_path / "runs" / "a")]) == 0
    kinds, places = capsys.readouterr().out.split("\n\n")
    bpb = saved["tilt_gains"].sum() / math.log(2) / saved["doc_bytes"].sum()
    for table in (kinds, places):
        *_, last = table.strip().splitlines()
        cells = last.split(" | ")
        assert cells[1] == f"{saved['doc_tokens'].sum():,}"
        assert cells[4] == f"{bpb:.5f}" and cells[5] == "100.0% |"


def test_tool_tells_kinds_apart_and_refuses_a_run_without_hints(tmp_path, capsys):
    assert tilt.kind_of("for i in range(9):\n    x[i] = {'a': (i, 2)}\n") == "code"
    assert tilt.kind_of("Fruit\n- apples\n- pears\n* plums") == "lists"
    assert tilt.kind_of("It was a bright cold day in April.") == "prose"
    for arguments in ([], [str(tmp_path)]):
        assert tilt.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_benchmark_of_hints_finds_the_repetition_that_it_has_planted():
    stream = hints.planted_stream(50_000)
    assert (stream == hints.planted_stream(50_000)).all()
    row = hints.measure(50_000)
    # A copy is hinted from its sixteenth token on.
    assert 0.05 < row["hinted"] < hints.COPIED_SHARE
    assert row["seconds"] > 0
    assert row["peak_gb"] > 0
