"""The sparse attention gate (PR #1787) and SmearGate (PR #1667), wherever the forward is used."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny_config
from test_compression import ONE, random_rows
from test_model import CPU, DEEPER, GATES, LENGTHS, draw, draw_lora, draw_row, error, spans
from test_ttt import adaptation, documents, scorer_for
from torch import Tensor

import train_gpt as tg

GATED = tiny_config(**DEEPER, **GATES)


def like(model: tg.GPT, **changes: object) -> tg.GPT:
    """A network with other knobs and, where both have a parameter, the same weights."""
    other = tg.GPT(dataclasses.replace(model.cfg, **changes))
    other.load_state_dict(model.state_dict(), strict=False)
    return other


def row_of_documents(model: tg.GPT, seed: int = 0) -> tg.Batch:
    """A row whose documents begin with BOS; it has one in the middle of a segment, too."""
    row = draw_row(LENGTHS, seed)
    starts = row.cu_seqlens[: len(LENGTHS)].long()
    row.inputs[starts] = tg.BOS_ID
    row.inputs[20] = tg.BOS_ID
    return row


@pytest.fixture(scope="module")
def model() -> tg.GPT:
    """A network whose gates are far from their initial values."""
    return draw(GATED)


# --- Initial values -------------------------------------------------------------------------------
@pytest.mark.parametrize("looped", [False, True])
def test_gate_of_zeros_is_half_of_the_branch_to_the_bit(model, looped):
    halved = like(model, sparse_attn_gate_enabled=False)
    closed = like(model)
    row = row_of_documents(model)
    with torch.no_grad():
        halved.attn_scale.mul_(0.5)
        closed.attn_gate.zero_()
        assert torch.equal(closed(row, GATED.plans[looped]), halved(row, GATED.plans[looped]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_smear_with_a_lambda_of_zero_changes_no_bit(model, dtype):
    without = like(model, smear_gate_enabled=False, compute_dtype=dtype)
    with_it = like(model, compute_dtype=dtype)
    row = row_of_documents(model)
    with torch.no_grad():
        with_it.smear_lambda.zero_()
        assert torch.equal(with_it(row, GATED.plans[1]), without(row, GATED.plans[1]))


def test_first_step_moves_lambda_and_not_the_projection(model):
    fresh = like(model)
    with torch.no_grad():
        for name in ("smear_proj", "smear_lambda"):
            fresh.get_parameter(name).zero_()
    fresh(row_of_documents(model), GATED.plans[1]).sum().backward()
    assert (fresh.smear_proj.grad == 0).all()
    assert fresh.smear_lambda.grad.abs() > 1e-3


def test_new_network_has_both_closed_and_in_the_group_of_the_scalars():
    fresh = tg.GPT(GATED)
    table = tg.parameter_table(GATED)
    for name in ("attn_gate", "smear_proj", "smear_lambda"):
        assert (fresh.get_parameter(name) == 0).all()
        assert (table[name].group, table[name].packing) == ("scalar", "float")


def test_smear_is_the_formula_on_raw_embeddings(model):
    row = row_of_documents(model)
    positions = tg.segment_positions(row.cu_seqlens, len(row.inputs))
    e = model.tok_emb.detach()[row.inputs].double()
    proj = model.smear_proj.detach()[0].double()
    wanted = e.clone()
    for t in range(1, len(e)):
        if positions[t] > 0 and row.inputs[t] != tg.BOS_ID:
            gate = model.smear_lambda.item() * torch.sigmoid(proj @ e[t, :12])
            wanted[t] += gate * e[t - 1]
    with torch.no_grad():
        smeared = model.embed(row.inputs, positions)
    assert error(smeared, tg.rms_norm(wanted)) < 1e-6


# --- Documents ------------------------------------------------------------------------------------
@pytest.mark.parametrize("looped", [False, True])
def test_packed_row_equals_its_documents_one_by_one(model, looped):
    row = row_of_documents(model)
    plan = GATED.plans[looped]
    with torch.no_grad():
        packed = model(row, plan)
        for s in spans(LENGTHS):
            n = s.stop - s.start
            starts = np.zeros(1, dtype=int)
            ids = row.inputs[s].numpy(), row.targets[s].numpy()
            alone = model(tg.pack_row(*ids, starts, tg.RowShape(n, 2, 64), CPU), plan)
            assert error(alone, packed[s].double()) < 1e-6


@pytest.mark.parametrize("document", range(len(LENGTHS)))
def test_no_token_sees_another_document(model, document):
    row = row_of_documents(model)
    other = row._replace(inputs=row.inputs.clone())
    span = spans(LENGTHS)[document]
    other.inputs[span] = (row.inputs[span] + 7) % VOCAB
    with torch.no_grad():
        before = model(row, GATED.plans[1])
        after = model(other, GATED.plans[1])
    unchanged = torch.ones(len(before), dtype=torch.bool)
    unchanged[span] = False
    assert torch.equal(before[unchanged], after[unchanged])
    assert not torch.equal(before[span], after[span])


def test_token_after_a_bos_inside_a_window_does_not_pass_it_on(model):
    """A BOS takes nothing from its predecessor, even where no segment begins."""
    row = row_of_documents(model)
    positions = tg.segment_positions(row.cu_seqlens, len(row.inputs))
    other = row.inputs.clone()
    other[19] = (other[19] + 7) % VOCAB
    with torch.no_grad():
        a, b = (model.embed(ids, positions) for ids in (row.inputs, other))
    assert [t for t in range(len(a)) if not torch.equal(a[t], b[t])] == [19]


# --- One forward for all uses ---------------------------------------------------------------------
def test_training_scoring_and_adaptation_without_learning_agree(model):
    """On documents that fit into one window and one chunk."""
    docs = documents(16, 9, 3)
    cfg = dataclasses.replace(GATED, ttt_chunk_size=16, ttt_lora_lr=0.0)
    network = like(model, **{"ttt_lora_lr": 0.0, "ttt_chunk_size": 16})
    scored = tg.score_all(scorer_for(network, docs), 0).nats[:-1]
    ledger = scorer_for(network, docs)
    adapted = tg.evaluate_ttt(ledger, adaptation(network), network, network, tg.Deadline(1e9))
    assert error(adapted.nats[:-1], scored.double()) < 1e-6
    shape = tg.RowShape(28, 4, 64)
    row = tg.pack_row(docs.tokens[:-1], docs.tokens[1:], docs.starts, shape, CPU)
    with torch.no_grad():
        trained = network(row, cfg.plans[1])
    assert error(trained, scored.double()) < 1e-6


@pytest.mark.parametrize("looped", [False, True])
def test_fresh_adapters_add_nothing(model, looped):
    plan = GATED.plans[looped]
    row = draw_row((12, 12, 12))
    lora = draw_lora(GATED, 3, len(plan))
    with torch.no_grad():
        lora.up.zero_()
        assert error(model(row, plan, lora=lora), model(row, plan).double()) < 1e-6


def test_calibration_sees_the_gated_input_of_the_output_projection(model):
    """The Hessian of closed gates is a quarter of that without any, in the first layer."""
    closed = like(model)
    with torch.no_grad():
        closed.attn_gate.zero_()
    open_ = like(model, sparse_attn_gate_enabled=False)
    rows = random_rows(GATED, 2)
    quarter, whole = (
        tg.collect_hessians(m, GATED.plans[0], rows, ONE)["attn_out", 0] for m in (closed, open_)
    )
    assert torch.equal(4 * quarter, whole)


def test_artifact_holds_the_gates_as_fp16(model, tmp_path):
    quantizer = tg.Quantizer(model, None, None, ONE)
    data = tg.pack_artifact(model, quantizer.solve(1.0), {"looped": True, "tokenizer": "0" * 64})
    header, arrays = tg.open_artifact(data, Path("model"))
    assert tg.config_of_header(header).sparse_attn_gate_enabled
    other = tg.GPT(GATED)
    tg.load_artifact(other, arrays)
    for name in ("attn_gate", "smear_proj", "smear_lambda"):
        stored: Tensor = model.get_parameter(name).detach().half().float()
        assert torch.equal(other.get_parameter(name).detach(), stored)
