"""Training of the older systems: shuffled rows, schedules, averages, late rounding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import on_ranks, tiny_config
from test_compression import random_model, random_rows
from test_data import equal, rank_of, stream_of
from test_optim import cpu_ranks, on_one, weights_of
from test_resume import Killed, Mortal, die
from test_training import Breaking, Session, assert_same, warmed_up
from torch import Tensor

import train_gpt as tg

PARTS = dict(
    bigram_vocab_size=50,
    bigram_dim=8,
    smear_enabled=True,
    ve_enabled=True,
    ve_dim=8,
    ve_layers="1,3",
)
SHUFFLED = dict(data_loader="shuffled", train_seq_len=32, cu_seqlens_capacity=32)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory) -> Iterator[None]:
    """Runs write their logs into the working folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        yield


# --- Shuffled rows --------------------------------------------------------------------------------
def loader_of(
    stream: tg.TokenStream, world_size: int = 1, rank: int = 0, **overrides: Any
) -> tg.PackedLoader:
    cfg = tiny_config(**{**SHUFFLED, **overrides})
    return tg.PackedLoader(stream, 1, cfg, rank_of(world_size, rank))


# 62 and 16 pieces of 32 tokens, in rows of four.
@pytest.mark.parametrize("size", [2000, 513])
def test_an_epoch_takes_every_piece_once_and_the_next_another_order(tmp_path, size):
    loader = loader_of(stream_of(tmp_path, np.arange(size, dtype=np.uint16), [100]))
    pieces = (size - 1) // 32
    # 128 pieces.
    rows = [row for _ in range(8) for row in loader.rows(4)[0]]
    inputs = torch.cat([row.inputs for row in rows])
    targets = torch.cat([row.targets for row in rows])
    assert torch.equal(targets, (inputs + 1) % size)
    assert all(
        torch.equal(row.cu_seqlens.unique(), torch.arange(0, 129, 32, dtype=torch.int32))
        for row in rows
    )
    begins = inputs.view(-1, 32)[:, 0]
    assert torch.equal(inputs.view(-1, 32), (begins[:, None] + torch.arange(32)) % size)
    epochs = begins.split(pieces)[:2]
    firsts = []
    for epoch in epochs:
        assert len(epoch.unique()) == pieces
        # On the ring, every piece starts a multiple of 32 tokens after the epoch's first one.
        distances = (epoch - epoch[:, None]) % size
        is_first = ((distances % 32 == 0) & (distances < 32 * pieces)).all(1)
        firsts += epoch[is_first][:1].tolist()
    # Each epoch has a random phase.
    assert len(firsts) == 2
    assert firsts[0] != firsts[1]
    assert max(firsts) < 32
    assert not torch.equal(epochs[0] - firsts[0], epochs[1] - firsts[1])
    assert (epochs[0].diff() == 32).float().mean() < 0.3


def test_any_number_of_ranks_and_a_new_loader_at_a_cursor_serve_the_same_rows(tmp_path):
    stream = stream_of(tmp_path, np.arange(1000, dtype=np.uint16))
    one = loader_of(stream)
    wanted = []
    # More than an epoch of 31 pieces, whose end lies within a row.
    for _ in range(12):
        wanted += one.rows(4)[0]
    for world_size in (2, 3, 4):
        loaders = [loader_of(stream, world_size, rank) for rank in range(world_size)]
        found = []
        for _ in range(12):
            served = [iter(loader.rows(4)[0]) for loader in loaders]
            found += [next(served[row % world_size]) for row in range(4)]
        assert equal(found, wanted)
    again = loader_of(stream)
    again.cursor = 5 * 4 * 128
    assert equal([row for _ in range(7) for row in again.rows(4)[0]], wanted[20:])
    other = loader_of(stream, seed=2)
    assert not equal(other.rows(4)[0], wanted[:4])


@pytest.mark.parametrize("size", [130, 200, 256, 257])
def test_a_stream_of_hardly_a_piece_is_enough(tmp_path, size):
    settings = dict(
        train_seq_len=128, micro_batch_tokens=128, train_batch_tokens=128, cu_seqlens_capacity=8
    )
    loader = loader_of(stream_of(tmp_path, np.arange(size, dtype=np.uint16)), **settings)
    rows = [loader.rows(1)[0][0] for _ in range(5)]
    assert all(torch.equal(row.targets, (row.inputs + 1) % size) for row in rows)
    # Epochs differ in their phase.
    assert len({int(row.inputs[0]) for row in rows}) > 1


def test_calibration_reads_what_training_began_with(tiny_data):
    seen = []

    class Watched(Session):
        def forward(self, row: tg.Batch, plan: tuple[tg.Visit, ...]) -> Tensor:
            seen.append(row)
            return super().forward(row, plan)

        def calibrate(self, plan: tuple[tg.Visit, ...], rows: list[tg.Batch]) -> tuple:
            self.calibrated = rows
            raise Killed

    run = Watched(tiny_data, iterations=3, gptq_calibration_batches=8, **SHUFFLED).train()
    with pytest.raises(Killed):
        run.compress(Path("unused"))
    assert equal(run.calibrated, seen[:8])
    assert len(seen) == 12


# --- Validation of a part -------------------------------------------------------------------------
@pytest.mark.parametrize("loader", ["rows", "shuffled"])
@pytest.mark.parametrize("stride", [0, 16])
def test_a_share_of_rows_is_the_sample_of_documents_end_to_end(tiny_data, loader, stride):
    settings = dict(data_dir=tiny_data, data_loader=loader, train_seq_len=64)
    found = {}
    for share in (1.0, 0.4):
        cfg = tiny_config(**settings, val_doc_fraction=share)
        tokenizer = tg.Tokenizer.load(cfg)
        stream = tg.TokenStream(cfg.dataset_dir, "val")
        docs = tg.Documents.load(stream, tokenizer.bos_id, cfg)
        table, decoded = tg.check_bytes(tokenizer, docs, cpu_ranks())
        ledger = tg.Ledger(docs, table, torch.device("cpu"))
        model = random_model(cfg)
        log = tg.Log(Path("unused"), False)
        tg.score_all(tg.Scorer(model, cfg.plans[0], ledger, cfg, cpu_ranks(), log), stride)
        assert ledger.problems(decoded) == []
        found[share] = docs, ledger
    (whole, every), (part, some) = found[1.0], found[0.4]
    assert len(part.starts) == len(part.counts) == round(0.4 * 12)
    count = int(part.counts.sum())
    sample = tg.Documents.load(
        stream, tokenizer.bos_id, dataclasses.replace(cfg, data_loader="documents")
    )
    texts = [
        sample.tokens[a:b]
        for a, b in zip(sample.starts, sample.starts + sample.counts, strict=True)
    ]
    # The last target, which is the BOS of the next document if there is one.
    after = sample.tokens[sample.starts[-1] + sample.counts[-1]]
    assert np.array_equal(part.tokens, [*np.concatenate(texts), after])
    assert np.array_equal(part.joined_tokens(), sample.joined_tokens()) and np.array_equal(
        whole.joined_tokens(), whole.tokens
    )
    assert np.array_equal(part.tokens[part.starts], np.full(len(texts), tokenizer.bos_id))
    assert some.result()["tokens"] == count < every.result()["tokens"]


# --- Warm-down by iterations ----------------------------------------------------------------------
def published_scale(step: int, elapsed: float, budget: float, cfg: tg.Config) -> float:
    """As PR #473 has it: the time left over WARMDOWN_ITERS mean steps; without a budget, steps."""
    if budget == math.inf:
        return min(1.0, (cfg.iterations - step) / cfg.warmdown_iters)
    window = cfg.warmdown_iters * elapsed / max(step, 1)
    return min(1.0, max(budget - elapsed, 0.0) / max(window, 1e-9))


def test_rates_fall_over_the_last_iterations_by_clock_and_by_step():
    cfg = tiny_config(warmdown_iters=30, iterations=100, min_lr=0)
    for step in range(100):
        wanted = published_scale(step, 0, math.inf, cfg)
        assert tg.lr_scale_at(step / 100, cfg, step) == pytest.approx(wanted)
        # Each step takes longer than the one before.
        elapsed = 0.8 * step + 0.002 * step**2
        if elapsed < 90:
            wanted = published_scale(step, elapsed, 90.0, cfg)
            assert tg.lr_scale_at(elapsed / 90, cfg, step) == pytest.approx(wanted, abs=1e-12)
    assert tg.lr_scale_at(0.99, tiny_config(warmdown_iters=30, min_lr=0.1), 99) == 0.1
    # Without WARMDOWN_ITERS, the step does not matter.
    assert tg.lr_scale_at(0.5, tiny_config(warmdown_frac=0.75), 7) == pytest.approx(0.5 / 0.75)


def test_training_falls_over_the_last_iterations(tiny_data):
    run = Session(tiny_data, iterations=8, warmdown_iters=4, min_lr=0).train()
    assert run.numbers(r"lr_scale:(\S+)") == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


# --- The weights that are exported ----------------------------------------------------------------
EXPORTS = {
    "ema every third": dict(export_weights="ema", ema_decay=0.8, ema_every=3),
    "swa": dict(
        export_weights="swa",
        ema_decay=0.9,
        ema_every=2,
        swa_threshold=0.6,
        swa_every=2,
        warmdown_iters=8,
    ),
    "swa of one": dict(
        export_weights="swa", ema_decay=0.9, swa_threshold=0.6, swa_every=9, warmdown_iters=8
    ),
    "swa that never came": dict(
        export_weights="swa", ema_decay=0.9, swa_threshold=0.6, swa_every=50
    ),
    "raw": dict(export_weights="raw", ema_decay=0.9),
}


def exported(
    start: dict[str, Tensor], after: list[dict[str, Tensor]], cfg: tg.Config
) -> dict[str, Tensor]:
    """From the weights before and after every step, in fp64."""
    found = {name: w.double() for name, w in start.items()}
    taken = []
    for step, weights in enumerate(after, 1):
        scale = tg.lr_scale_at((step - 1) / cfg.iterations, cfg, step - 1)
        if cfg.export_weights == "swa" and scale < cfg.swa_threshold:
            taken += [weights] * (step % cfg.swa_every == 0)
        elif step % cfg.ema_every == 0:
            keep = cfg.ema_decay**cfg.ema_every
            found = {
                name: keep * x + (1 - keep) * weights[name].double() for name, x in found.items()
            }
    if cfg.export_weights == "raw":
        return {name: w.double() for name, w in after[-1].items()}
    if taken:
        return {name: torch.stack([w[name].double() for w in taken]).mean(0) for name in found}
    return found


@pytest.mark.parametrize("kind", EXPORTS)
def test_exported_weights_are_those_of_a_plain_reference(tiny_data, kind):
    run = Session(tiny_data, iterations=10, **EXPORTS[kind])
    start = weights_of(run.model)
    wanted = exported(start, run.train().after, run.cfg)
    assert_same(weights_of(run.model), wanted, tolerance=0 if kind == "raw" else 3e-7)
    assert_same(run.saved[-1][1], weights_of(run.model))
    assert run.saved[-1][0] == "final_model.pt"
    others = [
        exported(start, run.after, tiny_config(**{**x, "iterations": 10}))
        for k, x in EXPORTS.items()
    ]
    assert all(
        others[i]["up_bank"].ne(others[j]["up_bank"]).any() for i in range(5) for j in range(i)
    )


@pytest.mark.parametrize("kind", ["swa", "ema every third", "raw"])
def test_the_last_good_weights_are_the_export_of_the_steps_before(tiny_data, kind):
    run = Breaking(tiny_data, iterations=10, **EXPORTS[kind])
    start = weights_of(run.model)
    run.last_good = 7
    with pytest.raises(FloatingPointError, match="step 8"):
        run.train()
    ((name, weights, step, _),) = run.saved
    assert (name, step) == ("last_good.pt", 7)
    assert_same(weights, exported(start, run.after[:7], run.cfg), tolerance=3e-7)


def exports_on(ranks: tg.Ranks, data: Path, *kinds: str) -> list[dict[str, Tensor]]:
    """The exported weights, and those of a run that died and went on."""
    found = []
    for kind in kinds:
        export, _, rounded = kind.partition(" ")
        settings = {**EXPORTS[export], **SHUFFLED, **PARTS, "iterations": 10, "warmdown_iters": 8}
        settings |= dict(late_qat=rounded != "", late_qat_threshold=0.9)
        found.append(weights_of(Session(data, ranks, **settings).train().model))
        settings |= dict(run_id=f"{kind}{ranks.world_size}", checkpoint_every=1e-6)
        with pytest.raises(Killed):
            Mortal(data, ranks, last=9, act=die, **settings).train()
        run = Session(data, ranks, **settings).train()
        assert len(run.after) < 5
        # It goes on without saying so again.
        assert run.numbers(r"late_qat:enabled step:(\d+)") == []
        found.append(weights_of(run.model))
    return found


def test_ranks_and_resumed_runs_export_the_same(tiny_data, tmp_path):
    """With shuffled rows and late rounding: both go on where they were."""
    alone = on_one(exports_on, tiny_data, "swa", "raw", "swa rounded")
    together = on_ranks(2, exports_on, tmp_path, tiny_data, "swa", "swa rounded")
    for found in (alone, *together):
        for through, resumed in zip(found[::2], found[1::2], strict=True):
            assert_same(resumed, through)
    assert alone[0]["up_bank"].ne(alone[2]["up_bank"]).any()
    for plain, _, rounded, _ in together:
        # With rounding, a weight may fall on another integer.
        assert_same(plain, alone[0], tolerance=1e-5)
        assert_same(rounded, together[0][2])


# --- Late rounding --------------------------------------------------------------------------------
ROUNDED = ("qo_bank", "kv_bank", "up_bank", "down_bank")


@pytest.mark.parametrize(
    "settings",
    [
        dict(quantizer="gptq"),
        dict(quantizer="int6", clip_floor=0.4),
        dict(quantizer="gptq_lite", matrix_bits=4),
    ],
    ids=str,
)
def test_late_rounding_changes_the_forward_and_passes_the_gradient(settings):
    """As in a network of weights rounded by hand, with the floor of the quantiser."""
    cfg = tiny_config(late_qat=True, **settings)
    model, plain, (row,) = random_model(cfg), random_model(cfg), random_rows(cfg, 1)
    q = 2 ** (cfg.matrix_bits - 1) - 1
    floor = 0 if cfg.quantizer == "gptq" else cfg.clip_floor
    with torch.no_grad():
        for name in ROUNDED:
            w = plain.get_parameter(name)
            step = torch.maximum(w.abs().amax(-1, keepdim=True), torch.tensor(float(floor))) / q
            assert (step == floor / q).any() == (floor > 0)
            w.copy_((w / step).round().clamp(-q, q) * step)
    before, place = model(row, cfg.plans[1]), model.qat.data_ptr()
    model.set_rounding(True)
    assert model.qat.data_ptr() == place  # where a CUDA graph reads it
    after, wanted = model(row, cfg.plans[1]), plain(row, cfg.plans[1])
    assert (before - after).abs().max() > 1e-3
    assert torch.allclose(after, wanted, atol=2e-5)
    after.sum().backward()
    wanted.sum().backward()
    for name, p in model.named_parameters():
        theirs = plain.get_parameter(name).grad
        assert (p.grad - theirs).norm() <= 1e-4 * theirs.norm(), name
    model.set_rounding(False)
    assert torch.equal(model(row, cfg.plans[1]), before)


def test_ranks_that_see_a_slice_in_the_compute_dtype_round_it_alike():
    cfg = tiny_config(late_qat=True, compute_dtype="bf16")
    owner, other = random_model(cfg), random_model(cfg)
    other.up_bank.data = other.up_bank.data.bfloat16().float()
    for model in (owner, other):
        model.set_rounding(True)
    found, wanted = (m.bank("up_bank").detach().bfloat16() for m in (owner, other))
    assert torch.equal(found, wanted)
    assert not torch.equal(owner.up_bank, other.up_bank)


def test_without_the_knob_a_bank_is_its_parameter():
    model = tg.GPT(tiny_config())
    model.set_rounding(True)
    assert model.bank("up_bank") is model.up_bank
    assert "qat" not in dict(model.named_buffers())


class Observed(Session):
    """Notes whether weights are rounded, in every forward and validation."""

    def __init__(self, *args: Any, **overrides: Any):
        super().__init__(*args, late_qat=True, **overrides)
        self.seen = []
        self.checked = []

    def forward(self, row: tg.Batch, plan: tuple[tg.Visit, ...]) -> Tensor:
        self.seen.append(bool(self.model.qat))
        return super().forward(row, plan)

    def evaluate(self, plan: tuple[tg.Visit, ...]) -> SimpleNamespace:
        self.checked.append(bool(self.model.qat))
        return SimpleNamespace(result=lambda: {"val_loss": 0.0, "val_bpb": 0.0})


@pytest.mark.parametrize(("threshold", "first"), [(0.6, 6), (2.0, 0), (0.0, 10)])
def test_weights_are_rounded_from_the_threshold_on_but_never_in_evaluation(
    tiny_data, threshold, first
):
    run = Observed(
        tiny_data, iterations=10, warmdown_iters=8, late_qat_threshold=threshold, val_loss_every=2
    ).train()
    assert run.seen == [False] * 4 * first + [True] * 4 * (10 - first)
    assert run.checked == [False] * 5
    assert not run.model.qat
    assert run.numbers(r"late_qat:enabled step:(\d+)") == [first] * (first < 10)


class Compiled(Observed):
    def __init__(self, *args: Any, **overrides: Any):
        super().__init__(*args, **overrides)
        self.compiled = warmed_up(self)

    def forward(self, row: tg.Batch, plan: tuple[tg.Visit, ...]) -> Tensor:
        self.seen.append(bool(self.model.qat))
        return self.compiled(row, plan)


def test_rounding_sets_in_without_a_compilation_and_reaches_the_compiled_graph(tiny_data):
    small = dict(
        num_layers=2, num_loops=0, parallel_start_layer=0, xsa_last_n=1, micro_batch_tokens=512
    )
    settings = dict(
        iterations=4,
        warmdown_iters=4,
        late_qat_threshold=0.6,
        **{**PARTS, **small, "ve_layers": "1"},
    )
    run = Compiled(tiny_data, recompile_limit=0, **settings).train()
    assert run.final["recompilations"] == 0
    assert run.seen == [False, False, True, True]
    eager, without = (
        Observed(tiny_data, **settings | dict(late_qat_threshold=x)).train() for x in (0.6, 0.0)
    )
    for found, wanted in zip(run.after, eager.after, strict=True):
        assert_same({n: found[n] for n in ROUNDED}, {n: wanted[n] for n in ROUNDED}, tolerance=1e-4)
    assert torch.equal(eager.after[1]["up_bank"], without.after[1]["up_bank"])
    assert (eager.after[2]["up_bank"] - without.after[2]["up_bank"]).abs().max() > 1e-4
    torch.compiler.reset()


# --- Features that stay as they begin -------------------------------------------------------------
def test_features_that_are_not_trained_keep_their_bits(tiny_data):
    names = ("bigram_emb", "bigram_proj", "bigram_scale", "smear_gate")
    for trains in (False, True):
        run = Session(tiny_data, iterations=4, train_input_features=trains, **PARTS)
        start = weights_of(run.model)
        run.train()
        for name, w in weights_of(run.model).items():
            assert torch.equal(w, start[name]) == (name in names and not trains), name
        for name in names:
            assert torch.equal(run.optimizers.state["weights"][name], start[name]) != trains
