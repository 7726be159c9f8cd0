"""Evaluation: its speed, deadline, chunk mode and phases, and what a broken rule leads to."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, VOCAB, final_line, on_ranks, run_script, tiny_config
from test_training import Session
from test_ttt import (
    LENGTHS,
    S,
    adaptation,
    assert_equal,
    documents,
    evaluated,
    model_for,
    scorer_for,
    with_settings,
)

import train_gpt as tg

MANY = (150, 3, 64, 65, 33, 16, 1, 100, 200, 40, 7, 80, 30, 64, 12, 90)
CHUNKS = dict(ttt_mode="chunk", ttt_chunk_tokens=128, ttt_lr=0.05, ttt_epochs=2)
SLIDING = dict(sliding_window_enabled=True, eval_stride=2)
PHASES = dict(phased_ttt_num_phases=2, phased_ttt_prefix_docs=10, ttt_chunk_tokens=64, ttt_lr=0.1)


def edited(docs: tg.Documents, place: int) -> tg.Documents:
    tokens = docs.tokens.copy()
    tokens[place] = 4 + (tokens[place] - 3) % (VOCAB - 4)
    return docs._replace(tokens=tokens)


def nats_of(ledger: tg.Ledger) -> np.ndarray:
    assert ledger.problems(int(ledger.docs.counts.sum())) == []
    return ledger.nats[:-1].numpy()


def plain(model: tg.GPT, docs: tg.Documents, stride: int = 0) -> tg.Ledger:
    return tg.score_all(scorer_for(model, docs), stride)


# --- Speed leaves the scores alone ---
@pytest.mark.parametrize(
    "changes",
    [
        dict(ttt_buckets=3),
        dict(ttt_batch_size=1),
        dict(ttt_batch_size=7, ttt_buckets=1),
    ],
    ids=str,
)
def test_buckets_and_batches_leave_the_scores_alone(changes):
    docs = documents(*MANY)
    model = model_for(4)
    found = nats_of(evaluated(with_settings(model, **changes), docs))
    expected = nats_of(evaluated(model, docs))
    assert np.abs(found - expected).max() < 1e-6


def test_windows_are_padded_to_few_lengths_and_finished_documents_leave():
    seen = []
    docs = documents(*MANY)
    model = model_for(4, ttt_buckets=3, ttt_chunk_size=8)

    def forward(batch, plan, lora, select):
        seen.append(
            (len(lora.down), len(batch.inputs) // len(lora.down), len(select) // len(lora.down))
        )
        return model(batch, plan, lora=lora, select=select)

    scorer = scorer_for(model, docs)
    tg.evaluate_ttt(scorer, adaptation(model, forward), model, forward, tg.Deadline(1e9))
    assert {n for _, n, _ in seen} == {16, 32, 64}
    assert {c for _, _, c in seen} == {8}
    chunks = sum(-(-count // 8) for count in MANY)
    # No row is processed once its document is over.
    assert sum(rows for rows, _, _ in seen) == chunks
    assert {rows for rows, _, _ in seen} >= {1, 2, 3, 4}


def test_memory_that_runs_out_makes_batches_smaller_and_changes_no_score():
    docs = documents(*MANY)
    model = model_for(8)
    tried = []

    def forward(batch, plan, **options):
        tried.append(len(batch.inputs))
        if tried[-1] > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(batch, plan, **options)

    scorer = scorer_for(model, docs)
    found = nats_of(
        tg.evaluate_ttt(scorer, adaptation(model, forward), model, forward, tg.Deadline(1e9))
    )
    failed = [i for i, size in enumerate(tried) if size > 150]
    # What did not fit is not tried again.
    assert failed and len(failed) < 10
    # Half of it is, rounded down to whole documents.
    assert all(tried[i] / 3 < tried[i + 1] <= tried[i] / 2 for i in failed)
    assert np.abs(found - nats_of(evaluated(model, docs))).max() < 1e-6
    with pytest.raises(torch.OutOfMemoryError):
        narrow = model_for(8, ttt_eval_seq_len=S)
        state = adaptation(
            narrow, lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("too little"))
        )
        tg.evaluate_ttt(scorer_for(narrow, docs), state, narrow, narrow, tg.Deadline(1e9))


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_updates_are_those_of_torchs_optimisers(optimizer, beta1):
    cfg = tiny_config(
        ttt_optimizer=optimizer, ttt_beta1=beta1, ttt_lora_lr=0.01, ttt_weight_decay=0.5
    )
    leaf = torch.randn(5, 7).requires_grad_()
    master = leaf.detach().clone()
    rounded = leaf.detach().bfloat16()
    kind = torch.optim.AdamW
    special = dict(betas=(beta1, cfg.ttt_beta2), eps=1e-10)
    if optimizer == "sgd":
        kind = torch.optim.SGD
        special = dict(momentum=beta1)
    theirs = kind([leaf], lr=0.01, weight_decay=0.5, **special)
    moments = [torch.zeros(5, 7) for _ in range(2)]
    moments = moments[: 1 + (optimizer == "adam" and beta1 > 0)]
    for number in range(1, 6):
        leaf.grad = torch.randn(5, 7)
        theirs.step()
        tg.adapter_update(
            rounded,
            master,
            leaf.grad,
            moments,
            torch.tensor(float(number)),
            torch.tensor(0.01),
            cfg,
        )
        assert (master - leaf).norm() / leaf.norm() < 1e-6
        assert torch.equal(rounded, master.bfloat16())


@pytest.mark.parametrize(
    ("buckets", "lengths"), [(0, []), (1, [64]), (2, [16, 64]), (3, [16, 32, 64])]
)
def test_one_bucket_holds_every_window_and_more_of_them_shorter_ones(buckets, lengths):
    assert adaptation(model_for(4, ttt_buckets=buckets, ttt_chunk_size=8)).buckets == lengths


def test_short_chunks_go_by_the_place_in_a_document_and_not_by_its_length():
    cfg = tiny_config(ttt_chunk_size=16, ttt_short_chunks="8:4,30:10")
    assert tg.chunk_grid(cfg, 50) == [(0, 4), (4, 8), (8, 18), (18, 28), (28, 38), (38, 54)]
    assert all(
        tg.chunk_grid(cfg, n) == tg.chunk_grid(cfg, 200)[: len(tg.chunk_grid(cfg, n))]
        for n in range(1, 200)
    )
    docs = documents(*LENGTHS)
    model = model_for(4, ttt_short_chunks="8:4,30:10", ttt_buckets=3)
    whole = evaluated(model, docs)
    short = evaluated(model, docs._replace(counts=np.minimum(docs.counts, 40)))
    for start, count in zip(docs.starts, np.minimum(docs.counts, 40), strict=True):
        assert (
            np.abs(
                nats_of(whole)[start : start + count] - short.nats.numpy()[start : start + count]
            ).max()
            < 1e-6
        )


def test_adapters_kept_from_earlier_documents_carry_nothing_back():
    """With TTT_WARM_START_A documents learn for later ones of the stream, never for earlier."""
    docs = documents(*MANY)
    model = model_for(2, ttt_warm_start_a=True)
    before = nats_of(evaluated(model, docs))
    place = int(docs.starts[7]) + 5
    after = nats_of(evaluated(model, edited(docs, place)))
    # Batches hold two documents.
    assert_equal(after[: docs.starts[6]], before[: docs.starts[6]])
    # It changes one document of each later batch.
    assert (after[docs.starts[8] :] != before[docs.starts[8] :]).mean() > 0.3
    fresh = nats_of(evaluated(with_settings(model, ttt_warm_start_a=False), docs))
    assert (fresh != before).any()


@pytest.mark.parametrize("doc,left", [(0, 20), (2, 9), (5, 50), (7, 4)])
def test_earlier_end_of_a_document_changes_no_score_before_it_when_adapters_are_kept(doc, left):
    """Rows of a batch are sorted by length, so adapters kept by row would know what is ahead."""
    docs = documents(150, 120, 64, 65, 33, 90, 100, 200, 40, 7)
    model = model_for(3, ttt_warm_start_a=True)
    tokens = docs.tokens.copy()
    cut = int(docs.starts[doc]) + left
    # BOS: what is left becomes a document of its own.
    tokens[cut] = 1
    starts = np.insert(docs.starts, doc + 1, cut)
    shorter = tg.Documents(tokens, starts, np.diff(starts, append=len(tokens) - 1))
    before, after = (nats_of(evaluated(model, d))[: cut - 1] for d in (docs, shorter))
    assert np.abs(before - after).max() < 1e-6


# --- Deadline ---
class Clock:
    """Time that passes only in forwards: 1 ms per token, 3 ms with adapters."""

    def __init__(self, monkeypatch, model):
        self.now = 1000.0
        self.model = model
        monkeypatch.setattr(tg.time, "monotonic", lambda: self.now)

    def __call__(self, batch, plan, lora=None, select=None):
        self.now += 1e-3 * len(batch.inputs) * (3 if lora else 1)
        return self.model(batch, plan, lora=lora, select=select)

    def evaluated(self, docs, seconds, forward=None):
        start = self.now
        tg.score_all(scorer_for(self.model, docs, forward=self), 0)
        rate, start = (self.now - start) / docs.counts.sum(), self.now
        deadline, scorer = tg.Deadline(seconds), scorer_for(self.model, docs, forward=self)
        deadline.seconds_per_target = rate
        state = adaptation(self.model, self) if self.model.cfg.ttt_mode == "document" else None
        ledger = tg.evaluate_ttt(scorer, state, self.model, self, deadline)
        return ledger, self.now - start


@pytest.mark.parametrize(
    "settings",
    [{}, {**CHUNKS, "ttt_epochs": 9}, PHASES, {**CHUNKS, **SLIDING}],
    ids=["document", "chunk", "phase", "sliding chunk"],
)
def test_deadline_of_a_third_of_the_time_ends_inside_it_with_every_target_scored(
    monkeypatch, settings
):
    docs = documents(*MANY * 3)
    model = model_for(4, val_batch_tokens=512, **settings)
    clock = Clock(monkeypatch, model)
    whole, needed = clock.evaluated(docs, 1e9)
    learnt = []
    learn = tg.learn_weights
    monkeypatch.setattr(tg, "learn_weights", lambda *args: learnt.append(learn(*args)))
    part, spent = clock.evaluated(docs, needed / 3)
    assert part.num_not_learnt_from > whole.num_not_learnt_from == 0
    if model.cfg.ttt_mode == "chunk":
        # Each chunk but the last is learnt from or counted.
        assert learnt and len(learnt) + part.num_not_learnt_from == -(-docs.counts.sum() // 128) - 1
    # It ends within the deadline, and not much before it.
    assert needed / 6 < spent <= needed / 3
    same = nats_of(part) == nats_of(whole)
    stride = model.cfg.eval_stride * model.cfg.sliding_window_enabled
    base = np.abs(nats_of(part) - nats_of(plain(model, docs, stride))) < 1e-6
    # Some scores are those without a deadline, others those without learning.
    assert same.sum() > 100
    assert base.sum() > 100


@pytest.mark.parametrize("mode", ["document", "chunk", "phases"])
def test_deadline_of_zero_is_plain_scoring_and_says_what_was_not_learnt_from(mode):
    docs = documents(*MANY)
    model = model_for(4, **{"chunk": CHUNKS, "phases": PHASES}.get(mode, {}))
    ledger = evaluated(model, docs, seconds=0.0)
    assert np.abs(nats_of(ledger) - nats_of(plain(model, docs))).max() < 1e-5
    # Nothing learns from the last chunk.
    chunks = -(-docs.counts.sum() // 128) - 1
    # Full chunks before the second and the third phase.
    before = docs.counts[:5].sum() // 64 + docs.counts[:10].sum() // 64
    assert ledger.num_not_learnt_from == {"chunk": chunks, "phases": len(MANY) + before}.get(
        mode, len(MANY)
    )


def late_on_the_second(
    ranks: tg.Ranks, settings: dict[str, dict]
) -> dict[str, tuple[np.ndarray, int]]:
    docs = documents(*MANY)
    found = {}
    for mode, more in settings.items():
        ledger = evaluated(model_for(4, **more), docs, ranks, seconds=0.0 if ranks.rank else 1e9)
        found[mode] = nats_of(ledger), ledger.num_not_learnt_from
    return found


def test_deadline_of_one_rank_ends_the_learning_of_all_weights_on_all(tmp_path):
    """Each rank has its own clock. If only one learnt, weights would differ or both would hang."""
    # Adapters do not learn, so that only the learning of the weights shows.
    still = {"ttt_lora_lr": 0.0}
    both = on_ranks(
        2, late_on_the_second, tmp_path, {"chunk": CHUNKS, "phases": {**PHASES, **still}}
    )
    docs = documents(*MANY)
    model = model_for(4, **still)
    base = nats_of(plain(model, docs))
    adapted = nats_of(evaluated(model, docs))
    for mode in ("chunk", "phases"):
        (nats, unlearnt), (others, other) = (found[mode] for found in both)
        assert_equal(nats, others)
        unmoved = base if mode == "chunk" else np.where(np.abs(nats - base) < 1e-5, base, adapted)
        assert np.abs(nats - unmoved).max() < 1e-5
        pieces = (
            docs.counts.sum() // 128
            if mode == "chunk"
            else sum(docs.counts[:n].sum() // 64 for n in (5, 10))
        )
        assert unlearnt == other
        # In phases the documents that the second rank took are counted too.
        assert 0 <= unlearnt - pieces <= (0 if mode == "chunk" else len(MANY))


def test_deadline_that_was_near_stays_near(monkeypatch):
    monkeypatch.setattr(tg.time, "monotonic", lambda: 100.0)
    deadline = tg.Deadline(10.0)
    deadline.seconds_per_target = 0.1
    assert [deadline.must_stop(targets) for targets in (0, 49, 50, 0)] == [False, False, True, True]


# --- Chunk mode and phases: all weights learn ---
@pytest.fixture
def learnt(monkeypatch):
    """A list that receives (indices, learning rate, weights afterwards) of each learn_weights."""
    calls = []
    real = tg.learn_weights

    def spy(model, forward, sgd, scorer, place):
        real(model, forward, sgd, scorer, place)
        lr = sgd.param_groups[0]["lr"]
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        calls.append((place, lr, weights))

    monkeypatch.setattr(tg, "learn_weights", spy)
    return calls


@pytest.mark.parametrize("sliding", [False, True])
def test_chunk_is_scored_by_weights_that_learnt_from_the_chunks_before_it(learnt, sliding):
    docs = documents(*MANY)
    model = model_for(4, **CHUNKS, sliding_window_enabled=sliding, eval_stride=16)
    found = nats_of(evaluated(model, docs))
    stride = 16 if sliding else 0
    # There are 955 targets, and the last chunk is not learnt from.
    assert [len(place) for place, _, _ in learnt] == [128] * 7
    rates = [0.5 * 0.05 * (1 + math.cos(math.pi * k / 7)) for k in range(7)]
    assert [lr for _, lr, _ in learnt] == pytest.approx(rates)
    assert_equal(
        np.concatenate([place for place, _, _ in learnt]), docs.target_indices()[: 7 * 128]
    )
    expected = np.zeros_like(found)
    weights = [model.state_dict(), *(w for _, _, w in learnt)]
    for k, state in enumerate(weights):
        other = tg.GPT(model.cfg)
        other.load_state_dict(state)
        chunk = docs.target_indices()[k * 128 : (k + 1) * 128]
        expected[chunk] = nats_of(plain(other, docs, stride))[chunk]
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found - nats_of(plain(model, docs, stride)))[128:].mean() > 1e-3


def test_first_sgd_step_is_that_of_the_mean_loss_of_the_chunk(learnt):
    """The step is written out with autograd: one epoch, clipped, still without momentum."""
    docs = documents(*MANY)
    model = model_for(4, **{**CHUNKS, "ttt_epochs": 1, "ttt_grad_clip": 0.5})
    evaluated(model, docs)
    tokens = torch.from_numpy(docs.tokens)
    place = docs.target_indices()[:128]
    starts = sorted({0, S, *(int(s) for s in docs.starts if s < 128)})
    cu = torch.tensor([*starts, 128], dtype=torch.int32)
    model.zero_grad()
    model(tg.Batch(tokens[place], tokens[place + 1], cu, S), model.cfg.plans[1]).mean().backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    for name, p in model.named_parameters():
        expected = p.detach() - 0.05 * min(1.0, 0.5 / norm) * p.grad
        assert (learnt[0][2][name] - expected).abs().max() < 1e-6, name
    assert norm > 0.5


def test_edited_token_changes_no_chunk_before_its_own():
    docs = documents(*MANY)
    model = model_for(4, **CHUNKS)
    before = nats_of(evaluated(model, docs))
    for place in (130, 300, 600):
        after = nats_of(evaluated(model, edited(docs, place)))
        assert_equal(after[: place - 1], before[: place - 1])
        following = (place // 128 + 1) * 128
        assert (after[following:] != before[following:]).mean() > 0.9


@pytest.mark.parametrize("frozen", [0, 1, 3, 4])
def test_frozen_layers_stay_as_they_are_in_every_bank(learnt, frozen):
    model = model_for(4, **CHUNKS, ttt_freeze_blocks=frozen)
    evaluated(model, documents(*MANY))
    L = model.cfg.num_layers
    for name, now in learnt[-1][2].items():
        # The evaluation has put the model's own weights back.
        was = model.get_parameter(name).detach()
        changed = (now != was).flatten(1).any(1) if now.dim() > 1 else now != was
        if name in ("tok_emb", "skip_weights", "skip_gates"):
            assert changed.any(), name
        else:
            layers = changed.view(-1, L)
            assert not layers[:, :frozen].any(), name
            if frozen < L and not name.startswith("parallel"):
                assert layers[:, frozen:].any(), name


@pytest.mark.parametrize("settings", [CHUNKS, PHASES], ids=["chunk", "phases"])
def test_weights_are_afterwards_as_before(settings):
    model = model_for(4, **settings)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    evaluated(model, documents(*MANY))
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_phases_learn_from_scored_documents_before_the_next_is_scored(learnt):
    docs = documents(*MANY)
    model = model_for(4, **PHASES)
    found = nats_of(evaluated(model, docs))
    without = nats_of(evaluated(model_for(4), docs))
    first, second = docs.counts[:5].sum(), docs.counts[:10].sum()
    assert [len(place) for place, _, _ in learnt] == [64] * (first // 64 + second // 64)
    assert_equal(
        np.concatenate([p for p, _, _ in learnt[: first // 64]]),
        docs.target_indices(5)[: first // 64 * 64],
    )
    assert_equal(found[:first], without[:first])
    assert (found[first:] != without[first:]).mean() > 0.9


def test_phases_keep_to_the_order_of_the_stream():
    """The published queue scores the longest documents first; here nothing flows backwards."""
    docs = documents(*MANY)
    model = model_for(4, **PHASES)
    before = nats_of(evaluated(model, docs))
    for d in (1, 4, 7, 9, 12):
        place = int(docs.starts[d])
        after = nats_of(evaluated(model, edited(docs, place + 1)))
        # The first document of its phase.
        bound = next(b for b in (0, 5, 10) if b + 5 > d or b == 10)
        assert_equal(after[: docs.starts[bound]], before[: docs.starts[bound]])
        others = np.ones(len(before), bool)
        others[place : place + docs.counts[d]] = False
        others[docs.starts[min(bound + 5, len(docs.starts) - 1)] :] &= bound == 10
        assert_equal(after[others], before[others])


def test_phases_beyond_the_documents_score_them_all(learnt):
    docs = documents(*LENGTHS)
    model = model_for(4, **{**PHASES, "phased_ttt_prefix_docs": 1000})
    nats_of(evaluated(model, docs))
    half = set(docs.target_indices(len(LENGTHS) // 2).tolist())
    # Nothing learns from the second half: after it nothing is scored.
    assert learnt
    assert all(half.issuperset(place.tolist()) for place, *_ in learnt)


@pytest.mark.parametrize(("phases", "tokens"), [(1, 9_470_000), (3, 9_470_000), (1, 0)])
def test_warm_up_learns_with_all_weights_whatever_the_prefix(
    tiny_data, tmp_path, monkeypatch, phases, tokens
):
    monkeypatch.chdir(tmp_path)
    learnt = []
    monkeypatch.setattr(tg, "learn_weights", lambda *args: learnt.append(len(args[-1])))
    settings = dict(phased_ttt_num_phases=phases, phased_ttt_prefix_tokens=tokens)
    cfg = tiny_config(data_dir=str(tiny_data), ttt_chunk_tokens=64, **settings)
    run = tg.Run(cfg, dict.fromkeys(vars(cfg), "default"), tg.Ranks({}))
    run.build_model()
    run.warm_up_evaluation([cfg.plans[1]])
    assert learnt and set(learnt) == {64}


def test_prefix_in_targets_ends_with_the_document_that_reaches_it():
    counts = np.array([30, 5, 40, 25, 60, 40])  # ends: 30 35 75 100 160 200
    stops = {
        (1, 75): [3],
        (1, 76): [4],
        (2, 100): [3, 4],
        (3, 200): [3, 5, 6],
        (2, 10**7): [4, 6],
        (0, 100): [],
    }
    for (phases, tokens), wanted in stops.items():
        cfg = tiny_config(phased_ttt_num_phases=phases, phased_ttt_prefix_tokens=tokens)
        assert tg.phase_stops(counts, cfg) == wanted, (phases, tokens)


def test_prefix_in_targets_is_of_one_size_in_any_order_and_knows_nothing_of_what_follows():
    cfg = tiny_config(phased_ttt_num_phases=1, phased_ttt_prefix_tokens=400)
    counts = np.array(MANY)
    for order in (counts, np.sort(counts), np.sort(counts)[::-1]):
        (stop,) = tg.phase_stops(order, cfg)
        assert order[: stop - 1].sum() < 400 <= order[:stop].sum()
        later = np.concatenate([order[:stop], order[stop:][::-1], [999]])
        assert tg.phase_stops(later, cfg) == [stop]


@pytest.mark.parametrize(
    ("settings", "said"),
    [({}, False), (dict(ttt_warm_start_a=True), True), (PHASES, True)],
)
def test_log_says_where_a_score_depends_on_other_documents(settings, said, monkeypatch):
    monkeypatch.setattr(tg, "adapt_documents", lambda *_: None)
    docs = documents(20, 20)
    model = model_for(2, **settings)
    lines = []
    scorer = scorer_for(model, docs)._replace(log=lines.append)
    next(tg.score_documents(adaptation(model), scorer, tg.Deadline(1e9)))
    assert any("depends on earlier documents" in line for line in lines) == said


def test_epochs_and_batches_make_as_many_steps(monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: steps.append(1))
    evaluated(model_for(4, **{**CHUNKS, "ttt_epochs": 3, "ttt_batch_seqs": 1}), documents(*MANY))
    # 7 chunks, 3 epochs, 2 rows of 64 targets, one row a step.
    assert len(steps) == 7 * 3 * 2


# --- The whole program ---
def broken(line: str, data: Path, folder: Path, **env: str) -> subprocess.CompletedProcess:
    """A run of the script in a process in which `line` has spoilt the evaluation."""
    code = f"import sys, train_gpt as tg\n{line}\nsys.exit(tg.main([]))"
    env = {
        **os.environ,
        **TINY,
        "DATA_DIR": str(data),
        "PYTHONPATH": str(ROOT),
        "RUN_ID": "x",
        **env,
    }
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


DROPS_TAIL = (
    "real = tg.scoring_windows; tg.scoring_windows = lambda n, *rest: real(max(n - 1, 0), *rest)"
)


def test_failed_check_takes_the_place_of_the_score(tiny_data, tmp_path):
    done = broken(DROPS_TAIL, tiny_data, tmp_path, ITERATIONS="2")
    assert done.returncode == 1
    assert re.fullmatch(
        r"train_gpt.py: diagnostic .* INVALID: \d+ targets were never scored; .*\n", done.stderr
    )
    assert "val_bpb:" not in done.stdout and "final " not in done.stdout
    # Nothing that was computed is lost.
    assert (tmp_path / "runs" / "x" / "final_model.int6.ptz").is_file()


def test_data_with_the_fields_name_must_be_the_fields(tiny_data, tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "fineweb10B_sp1024").symlink_to(
        tiny_data / "datasets" / TINY["DATASET"]
    )
    (tmp_path / "tokenizers").symlink_to(tiny_data / "tokenizers")
    done = run_script(
        {**TINY, "DATA_DIR": str(tmp_path), "DATASET": "fineweb10B_sp1024", "ITERATIONS": "2"},
        tmp_path,
    )
    assert done.returncode == 1
    assert "INVALID" in done.stderr and "151080891" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("held", "share", "fine"),
    [
        (1_000_100, 1.0, True),
        (999_900, 1.0, True),
        (1_000_101, 1.0, False),
        (999_899, 1.0, False),
        (999_899, 0.5, True),
    ],
)
def test_a_ten_thousandth_may_differ_from_the_fields_counts(
    tiny_data, tmp_path, monkeypatch, held, share, fine
):
    monkeypatch.chdir(tmp_path)
    run = Session(tiny_data, val_doc_fraction=share)
    figures = {"val_loss": 1.0, "val_bpb": 2.0, "tokens": 3, "bytes": 4}
    ledger = SimpleNamespace(
        problems=lambda decoded: [],
        result=lambda: figures,
        num_not_learnt_from=0,
        num_not_adapted=0,
        by_document=lambda: dict.fromkeys(("doc_nats", "doc_bytes", "doc_tokens"), np.zeros(0)),
        tilt=None,
    )
    # The number of tokens is not known.
    totals = tg.DatasetTotals(documents=len(run.docs.starts), tokens=0, bytes=1_000_000)
    monkeypatch.setitem(tg.CANONICAL, TINY["DATASET"], totals)
    run.decoded = held
    if fine:
        run.run_evaluation("quantized", lambda: ledger)
        assert run.final["val_bpb"] == 2.0
    else:
        known = f"are .*, {held}\\), the challenge's are .*, 1000000\\)$"
        with pytest.raises(tg.InvalidScore, match=f"^diagnostic quantized INVALID: .* {known}"):
            run.run_evaluation("quantized", lambda: ledger)
        assert "val_bpb" not in run.final


def test_the_report_sums_the_seconds_of_a_phase_that_came_more_than_once(
    tiny_data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run = Session(tiny_data)
    phases = [("validate", "none", 1.5), ("train", "train", 4.0), ("validate", "none", 2.25)]
    run.phases = [tg.Phase(*phase) for phase in phases]
    assert run.report()["seconds"] == {"validate": 3.75, "train": 4.0}


def test_the_report_names_what_gzip_takes_of_the_same_text(tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Session(tiny_data)
    assert "gzip_bpb" not in run.report()
    run.tokenizer = run.tokenizer._replace(
        manifest={"splits": {"val": {"gzip_bytes": 131, "bytes": 400}}}
    )
    assert run.report()["gzip_bpb"] == 2.62
    assert "for scale, gzip -9 of each document: val_bpb:2.6200" in run.log


# An adaptation of many steps, long enough to be killed.
LONGER = {**TINY, "TTT_CHUNK_SIZE": "1", "TTT_LORA_RANK": "16", "RUN_ID": "x"}


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train_gpt.py")]


def launch(command: list[str], data: Path, folder: Path, **env: str) -> subprocess.Popen:
    env = {
        **os.environ,
        "DATA_DIR": str(data),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **env,
    }
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_rank_ends_all_with_one_line_and_the_artifact_is_still_there(tiny_data, tmp_path):
    run = launch(torchrun("--standalone", "--nproc_per_node=2"), tiny_data, tmp_path, **LONGER)
    for line in run.stdout:
        if line.startswith("diagnostic quantized"):
            break
    ranks = subprocess.run(
        ["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    start = time.monotonic()
    _, errors = run.communicate(timeout=60)
    assert time.monotonic() - start < 30
    assert run.returncode != 0
    assert len([line for line in errors.splitlines() if line.startswith("train_gpt.py:")]) <= 1
    # There is no traceback of the script.
    assert 'train_gpt.py", line' not in errors
    artifact = tmp_path / "runs" / "x" / "final_model.int6.ptz"
    again = run_script(
        {**TINY, "DATA_DIR": str(tiny_data), "EVAL_ONLY_PATH": str(artifact)}, tmp_path
    )
    assert again.returncode == 0
    assert final_line(again.stdout)["val_bpb"] > 0


def test_two_nodes_score_as_one_process(tiny_data, tmp_path):
    artifact = tmp_path / "runs" / "a" / "final_model.int6.ptz"
    env = {**TINY, "DATA_DIR": str(tiny_data)}
    one = run_script({**env, "RUN_ID": "a", "ITERATIONS": "2"}, tmp_path)
    endpoint = f"--rdzv_endpoint=127.0.0.1:{29000 + os.getpid() % 2000}"
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=x", endpoint]
    (tmp_path / "other").mkdir()
    # Nodes do not share a working directory.
    folders = tmp_path, tmp_path / "other"
    (tmp_path / "other" / "runs").symlink_to(tmp_path / "runs")
    env = {**TINY, "EVAL_ONLY_PATH": str(artifact), "RUN_ID": "b"}
    nodes = [launch(torchrun(*options), tiny_data, folder, **env) for folder in folders]
    outputs = [node.communicate(timeout=240) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    two = final_line("".join(out for out, _ in outputs))
    assert two["world_size"] == 2
    for key in ("quantized_bpb", "quantized_ttt_lora_bpb"):
        assert two[key] == pytest.approx(final_line(one.stdout)[key], abs=1e-6)
