"""Test-time training: every target scored once, before it is learnt from, by document."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import VOCAB, on_ranks, tiny_config
from test_compression import random_model

import train_gpt as tg

BOS = 1
C = 16
S = 64
CPU = torch.device("cpu")
ADAPTS = dict(
    ttt_lora_lr=0.01, ttt_chunk_size=C, ttt_eval_seq_len=S
)  # a rate at which every update shows
SGD = dict(ttt_optimizer="sgd", ttt_beta1=0.9, ttt_lora_lr=1.0)
LENGTHS = (150, 64, 65, 33, 16, 1, 100)  # targets: beyond the window, on and off the chunk grid
TABLE = tg.ByteTable(
    np.ones(VOCAB, dtype=np.int64), np.zeros(VOCAB, dtype=bool), np.zeros(VOCAB, dtype=bool)
)


def documents(*counts: int, seed: int = 0) -> tg.Documents:
    """Random documents with that many targets each; the last one lacks the BOS of a next."""
    counts = np.array(counts)
    tokens = np.random.default_rng(seed).integers(4, VOCAB, counts.sum() + 1)
    starts = np.cumsum(counts) - counts
    tokens[starts] = BOS
    return tg.Documents(tokens, starts, counts)


def adaptation(model: tg.GPT, forward=None) -> tg.Adaptation:
    model.requires_grad_(False)
    return tg.Adaptation(model, forward or model, model.cfg.plans[1], CPU)


def scorer_for(
    model: tg.GPT, docs: tg.Documents, ranks: tg.Ranks | None = None, forward=None
) -> tg.Scorer:
    ledger = tg.Ledger(docs, TABLE, CPU, model.cfg)
    log = tg.Log(Path("unused"), False)
    return tg.Scorer(
        forward or model, model.cfg.plans[1], ledger, model.cfg, ranks or tg.Ranks({}), log
    )


def of_documents(ledger: tg.Ledger) -> dict[int, np.ndarray]:
    """document -> nats of its targets that are scored."""
    found = {}
    for d, (start, count) in enumerate(zip(ledger.docs.starts, ledger.docs.counts, strict=True)):
        nats, times = (x[start : start + count].numpy() for x in (ledger.nats, ledger.times_scored))
        found[d] = nats[times > 0]
    return found


def scores(
    state: tg.Adaptation, docs: tg.Documents, batch: list[int] | None = None
) -> dict[int, np.ndarray]:
    """document -> nats of its targets; the documents of `batch` (all) adapt side by side."""
    batch = np.array(range(len(docs.starts)) if batch is None else batch)
    batch = batch[np.argsort(-docs.counts[batch], kind="stable")]
    ledger = tg.Ledger(docs, TABLE, CPU)
    for _ in tg.score_then_learn(state, batch, ledger):
        pass
    return {d: nats for d, nats in of_documents(ledger).items() if d in batch}


def evaluated(
    model: tg.GPT, docs: tg.Documents, ranks: tg.Ranks | None = None, seconds: float = 1e9
) -> tg.Ledger:
    """The whole evaluation as the model's config says."""
    scorer = scorer_for(model, docs, ranks)
    state = adaptation(model) if model.cfg.ttt_mode == "document" else None
    return tg.evaluate_ttt(scorer, state, model, model, tg.Deadline(seconds))


def model_for(count: int, **overrides: object) -> tg.GPT:
    return random_model(tiny_config(**{**ADAPTS, "ttt_batch_size": count, **overrides}))


def with_settings(model: tg.GPT, **overrides: object) -> tg.GPT:
    """A network of the same weights under other settings."""
    other = tg.GPT(dataclasses.replace(model.cfg, **overrides))
    other.load_state_dict(model.state_dict())
    return other


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


def assert_equal(a: np.ndarray, b: np.ndarray) -> None:
    assert np.array_equal(a, b), (
        f"{np.count_nonzero(a != b)} of {a.size} differ, by up to {np.abs(a - b).max()}"
    )


# --- Compiled ---
@pytest.mark.parametrize("rank", [16, 12], ids=["as many as documents", "another number"])
def test_nothing_compiles_after_equal_documents_whatever_the_others(rank):
    """Warm-up's documents are equally long; real ones drop out, and views shrink."""
    duck_shape = torch.fx.experimental._config.use_duck_shape
    settings = dict(ttt_batch_size=16, ttt_lora_rank=rank, ttt_buckets=3, compile=True)
    cfg = tiny_config(**ADAPTS, **settings)
    counters = [torch._dynamo.testing.CompileCounterWithBackend("eager") for _ in range(2)]
    torch.compiler.reset()
    try:
        tg.configure_torch(cfg)
        model = random_model(cfg).requires_grad_(False)
        whole = torch.compile(model, backend=counters[0], fullgraph=True, dynamic=True)
        state = tg.Adaptation(model, whole, cfg.plans[0], CPU)
        state.update = torch.compile(tg.adapter_update, backend=counters[1], dynamic=True)
        scores(state, documents(*16 * [S + C]))
        before = [counter.frame_count for counter in counters]
        rng = np.random.default_rng(0)
        for count, shortest, longest in ((16, 5, 150), (40, 2, 12), (13, 50, 200)):
            scores(state, documents(*rng.integers(shortest, longest, count).tolist()))
    finally:
        torch.fx.experimental._config.use_duck_shape = duck_shape
        torch.compiler.reset()
    assert before[0] == 1 and [counter.frame_count for counter in counters] == before


def test_after_memory_ran_out_documents_still_go_in_whole_granules(monkeypatch):
    state = adaptation(model_for(64))
    counts = []
    state.granule, state.max_tokens = 8, 20 * C
    forward_chunk = state.forward_chunk

    def noting(ledger, start, end, rows):
        counts.append(rows.stop - rows.start)
        return forward_chunk(ledger, start, end, rows)

    monkeypatch.setattr(state, "forward_chunk", noting)
    scores(state, documents(*64 * [S]))
    assert counts
    assert all(count % 8 == 0 for count in counts)


# --- What is scored -------------------------------------------------------------------------------
@pytest.mark.parametrize(("chunk", "steps"), [(32, 813), (48, 542)])
def test_longest_validation_document_takes_as_many_chunks_as_published(chunk, steps):
    """One forward per chunk of 25,988 tokens, and an update after all chunks but the last."""
    lengths = []
    updates = []
    docs = documents(25987)
    model = model_for(1, ttt_chunk_size=chunk, ttt_eval_seq_len=2048, ttt_lora_rank=1)

    def forward(batch, plan, lora, select):
        lengths.append(len(batch.inputs))
        return torch.zeros(len(select)) + lora.up.sum() + lora.down.sum()

    state = adaptation(model, forward)
    ledger = tg.Ledger(docs, TABLE, CPU)
    state.apply_gradients = lambda grads, rows, number: updates.append(number)
    assert sum(1 for _ in tg.score_then_learn(state, np.array([0]), ledger)) == steps
    assert lengths == [min((i + 1) * chunk, 2048) for i in range(steps)]
    assert updates == list(range(1, steps))
    assert ledger.problems(25987) == []


def test_result_counts_every_target_and_byte():
    docs = documents(*LENGTHS, 0)  # a last document with nothing to predict
    model = model_for(4)
    ledger = evaluated(model, docs)
    result = ledger.result()
    assert ledger.problems(TABLE.count(docs.tokens)) == []
    assert (result["tokens"], result["bytes"]) == (sum(LENGTHS), TABLE.count(docs.tokens))
    alone = [
        scores(adaptation(with_settings(model, ttt_batch_size=1)), docs, [i])
        for i in range(len(LENGTHS))
    ]
    loss = sum(nats.astype(np.float64).sum() for d in alone for nats in d.values()) / sum(LENGTHS)
    assert result["val_loss"] == pytest.approx(loss, rel=1e-6)


# --- Score first ----------------------------------------------------------------------------------
@pytest.mark.parametrize("grad_steps", [1, 2])
@pytest.mark.parametrize("place", [5, 15, 16, 17, 40, 63, 64, 65, 96, 130])
def test_edited_token_changes_no_score_before_it_and_no_other_document(place, grad_steps):
    """Neither the forward nor what is learnt lets a token act before its own score."""
    docs = documents(150, 120, 33)
    state = adaptation(model_for(3, ttt_grad_steps=grad_steps))
    before = scores(state, docs)
    at = docs.starts[0] + place
    docs.tokens[at] = 4 + (docs.tokens[at] - 3) % (VOCAB - 4)
    after = scores(state, docs)
    assert_equal(after[0][: place - 1], before[0][: place - 1])
    assert (
        after[0][place - 1 :] != before[0][place - 1 :]
    ).mean() > 0.9  # the edit is felt, also beyond the window
    assert_equal(after[1], before[1])
    assert_equal(after[2], before[2])


@pytest.mark.parametrize("settings", [{}, SGD])
def test_chunk_is_scored_with_the_adapters_of_the_chunks_before_it(settings):
    """The loop written plainly for one document: score with what there is, learn, go on."""
    docs = documents(75)
    model = model_for(1, **settings)
    state = adaptation(model)
    state.begin(docs, np.array([0]))
    lora = state.documents.lora.rows(slice(0, 1))
    leaves, found = [lora.down, lora.up], []
    optimizer = torch.optim.AdamW(leaves, lr=0.01, betas=(0.0, 0.999), eps=1e-10, weight_decay=0.5)
    if settings:
        optimizer = torch.optim.SGD(leaves, lr=1.0, momentum=0.9, weight_decay=0.5)
    for end in range(C, 75 + C, C):
        first = max(0, end - S)
        last = min(end, 75)
        ids = torch.from_numpy(docs.tokens[first : last + 1])
        cu = torch.tensor([0, last - first], dtype=torch.int32)
        nats = model(tg.Batch(ids[:-1], ids[1:], cu, S), state.plan, lora=lora)[end - C - first :]
        found.append(nats.detach().numpy())
        if end < 75:
            optimizer.zero_grad()
            nats.mean().backward()
            optimizer.step()
    assert difference(scores(adaptation(model), docs)[0], np.concatenate(found)) < 1e-5


def test_without_learning_the_score_is_the_base_model_on_windows_of_the_chunk_grid():
    docs = documents(*LENGTHS)
    model = model_for(len(LENGTHS), ttt_lora_lr=0.0)
    found = scores(adaptation(model), docs)
    for d, (start, count) in enumerate(zip(docs.starts, docs.counts, strict=True)):
        expected = []
        for end in range(C, count + C, C):
            first = max(0, end - S)
            last = min(end, count)
            ids = torch.from_numpy(docs.tokens[start + first : start + last + 1])
            cu = torch.tensor([0, last - first], dtype=torch.int32)
            with torch.no_grad():
                nats = model(tg.Batch(ids[:-1], ids[1:], cu, S), model.cfg.plans[1])
            expected.append(nats[end - C - first :].numpy())
        assert difference(found[d], np.concatenate(expected)) < 1e-6


@pytest.mark.parametrize("count", [1, 16, 39, 64, 70, 80, 129])
def test_longer_document_leaves_the_scores_of_its_beginning_alone(count):
    """Windows start on the chunk grid, so the end of a document is not felt before it."""
    whole = documents(170)
    state = adaptation(model_for(1))
    short = scores(state, whole._replace(counts=np.array([count])))[0]
    assert len(short) == count
    assert_equal(scores(state, whole)[0][:count], short)


def test_adapting_lowers_the_loss_of_repetitive_text():
    phrase = np.random.default_rng(3).integers(4, VOCAB, 24)
    docs = tg.Documents(
        np.concatenate([[BOS], np.tile(phrase, 12)]), np.array([0]), np.array([288])
    )
    model = model_for(1)
    adapted, base = (
        scores(adaptation(with_settings(model, ttt_lora_lr=lr)), docs)[0] for lr in (0.01, 0.0)
    )
    assert_equal(adapted[:C], base[:C])
    assert adapted[-96:].mean() < 0.8 * base[-96:].mean()


# --- Each document by itself ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("batches", "settings"),
    [
        ([[0, 1, 2, 3], [4, 5, 6]], {}),
        ([[6, 2, 4, 0], [5, 3, 1]], {}),
        ([[3, 0]], {}),
        ([[3, 0, 1]], SGD),
    ],
)
def test_batch_size_mates_and_order_do_not_change_a_score(batches, settings):
    docs = documents(*LENGTHS)
    model = model_for(4, **settings)
    together = adaptation(model)
    alone = adaptation(with_settings(model, ttt_batch_size=1))
    for batch in batches:
        for d, nats in scores(together, docs, batch).items():
            assert difference(nats, scores(alone, docs, [d])[d]) < 1e-6


@pytest.mark.parametrize(
    ("length", "count", "alone"),
    [(1, 32, 32), (8, 32, 32), (9, 8, 8), (64, 8, 8), (128, 8, 8), (129, 2, 8)],
)
def test_short_documents_share_a_step_by_the_dozen_and_long_ones_are_left_to_other_ranks(
    length, count, alone
):
    """As many as memory holds: a step of long windows takes no more of them than TTT_BATCH_SIZE."""
    docs = documents(*[length] * 100)
    cfg = tiny_config(ttt_batch_size=8, ttt_eval_seq_len=64)
    for world_size, size in ((1, alone), (2, count)):
        sizes = [len(batch) for batch in tg.plan_batches(docs, np.arange(100), cfg, world_size)]
        assert sizes == [size] * (100 // size) + [100 % size] * (100 % size > 0)
    even = tg.plan_batches(docs, np.arange(100), dataclasses.replace(cfg, ttt_warm_start_a=True), 2)
    assert [len(batch) for batch in even] == [8] * 12 + [4]


def test_left_out_documents_do_not_change_the_score_of_the_others():
    docs = documents(*LENGTHS)
    state = adaptation(model_for(4))
    some = docs._replace(starts=docs.starts[[3, 0]], counts=docs.counts[[3, 0]])
    part = scores(state, some)
    whole = scores(state, docs, [3, 0, 1, 2])
    assert_equal(part[0], whole[3])
    assert_equal(part[1], whole[0])


MODES = {
    "document": {},
    "phased": dict(
        phased_ttt_num_phases=2, phased_ttt_prefix_docs=5, ttt_chunk_tokens=64, ttt_lr=0.1
    ),
    "chunk": dict(ttt_mode="chunk", ttt_chunk_tokens=128, ttt_lr=0.1, ttt_epochs=2),
}


@pytest.mark.parametrize("count", [31, 32, 33])
def test_a_phase_learns_every_whole_chunk_of_the_documents_before_it(monkeypatch, count):
    docs = documents(*[count] * 6)
    adapted = []
    monkeypatch.setattr(
        tg, "adapt_documents", lambda state, scorer, *bounds: adapted.append(bounds[:2])
    )
    model = model_for(2, phased_ttt_num_phases=2, phased_ttt_prefix_docs=4, ttt_chunk_tokens=64)
    phases = list(tg.score_documents(adaptation(model), scorer_for(model, docs), tg.Deadline(1e9)))
    assert adapted == [(0, 2), (2, 4), (4, 6)]
    assert [left for left, _ in phases] == [4 * count, 2 * count, 0]
    for (_, learns), whole in zip(phases, (2 * count // 64, 4 * count // 64, 0), strict=True):
        read = [place.tolist() for place, _ in learns]
        assert read == [[*range(64 * k, 64 * k + 64)] for k in range(whole)]


def nats_of(ranks: tg.Ranks, mode: str) -> np.ndarray:
    ledger = evaluated(model_for(2, **MODES[mode]), documents(*LENGTHS), ranks)
    assert ledger.problems(sum(LENGTHS)) == []
    return ledger.nats.numpy()


@pytest.mark.parametrize("mode", MODES)
def test_two_and_four_ranks_score_as_one_does(tmp_path, mode):
    one = nats_of(tg.Ranks({}), mode)
    for world_size in (2, 4) if mode == "document" else (2,):
        for found in on_ranks(world_size, nats_of, tmp_path / str(world_size), mode):
            assert np.abs(found - one).max() < (1e-6 if mode == "document" else 1e-4)


# --- Adapters and what they leave behind ----------------------------------------------------------
def test_adapter_init_depends_on_seed_and_document_only():
    cfg = tiny_config()

    def drawn(seed, keys):
        lora = tg.LoRA.zeros(cfg, len(keys), len(cfg.plans[1]), torch.device("cpu"))
        torch.rand(len(keys))  # whatever the global generator has done
        lora.reset(seed, keys)
        assert not lora.up.any()
        return lora.down.detach()

    a = drawn(1337, [7, 0, 900])
    bound = cfg.model_dim**-0.5
    assert a.abs().max() <= bound
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert torch.equal(drawn(1337, [900, 7])[[1, 0]], a[[0, 2]])
    different = [*a, *drawn(1338, [7, 0, 900]), *drawn(2**31, [7])]
    assert all(
        (x != y).float().mean() > 0.99 for i, x in enumerate(different) for y in different[:i]
    )


def test_record_adapters_hold_as_many_values_as_published():
    cfg = tg.Config()
    lora = tg.LoRA.zeros(cfg, 1, len(cfg.plans[1]), torch.device("meta"))
    assert lora.down.numel() + lora.up.numel() == 8_355_840


@pytest.mark.parametrize("settings", [{}, SGD, dict(ttt_beta1=0.9)])
def test_batch_leaves_nothing_to_the_next(settings):
    """Adapters and moments begin anew: a batch scores the same, whatever came between."""
    docs = documents(100, 70)
    state = adaptation(model_for(2, **settings))
    first = scores(state, docs)
    scores(state, documents(90, 80, seed=1))
    again = scores(state, docs)
    assert all(np.array_equal(first[d], again[d]) for d in first)


@pytest.mark.parametrize(
    ("settings", "per_visit"),
    [
        ({}, 5),
        (dict(ttt_k_lora=False), 4),
        (dict(ttt_o_lora=False), 4),
        (dict(ttt_mlp_lora=False), 4),
        (dict(ttt_k_lora=False, ttt_o_lora=False, ttt_mlp_lora=False), 2),
    ],
)
def test_switches_remove_their_adapters(settings, per_visit):
    docs = documents(60)
    model = model_for(1)
    state = adaptation(with_settings(model, **settings))
    found, default = scores(state, docs)[0], scores(adaptation(model), docs)[0]
    assert len(state.documents.lora.sites) == per_visit * len(state.plan) + 1
    assert_equal(found[:C], default[:C])
    assert np.array_equal(found, default) == (not settings)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("settings", [dict(ttt_grad_steps=3), SGD])
def test_updates_per_chunk_and_optimiser_can_be_chosen(settings):
    docs = documents(60)
    model = model_for(1)
    state = adaptation(with_settings(model, **settings))
    found, default = scores(state, docs)[0], scores(adaptation(model), docs)[0]
    assert_equal(found[:C], default[:C])  # the score stays that from before the first update
    assert (found[C:] != default[C:]).mean() > 0.9
    assert np.isfinite(found).all()


def test_every_chunk_but_the_last_is_learnt_from_as_often_as_asked():
    state = adaptation(model_for(2, ttt_grad_steps=2))
    updates = []
    state.apply_gradients = lambda grads, rows, number: updates.append((number, rows.stop))
    scores(state, documents(100, 20))
    assert updates == [
        (n, 2 if n <= 2 else 1) for n in range(1, 13)
    ]  # the second document ends in its second chunk


def test_base_weights_are_left_as_they_were():
    model = model_for(2)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    scores(adaptation(model), documents(100, 70))
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
