"""Parts of PR #473, #1413 and #605 in the network and its adapters, against a plain form in fp64.

Run as a script, this file is its own child process, which needs TRITON_INTERPRET=1 before the first
import of triton.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, VOCAB, tiny_config
from test_evaluation import nats_of
from test_model import CPU, draw, draw_row, error, rms, spans
from test_optim import cpu_ranks
from test_ttt import (
    ADAPTS,
    BOS,
    LENGTHS,
    C,
    adaptation,
    assert_equal,
    difference,
    documents,
    evaluated,
    scores,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import train_gpt as tg

PLAIN = dict(num_loops=0, parallel_start_layer=0)
FEATURES = dict(bigram_vocab_size=64, bigram_dim=16, smear_enabled=True)
VALUES = dict(ve_enabled=True, ve_dim=16, ve_layers="1,3")
OLDER = dict(leaky_slope=0.0, skip_gates_enabled=False, rope_train_seq_len=32, **PLAIN, **FEATURES)
PR473 = dict(xsa_last_n=2, **OLDER, **VALUES)
PR605 = dict(xsa_last_n=0, rope_dims=0, ln_scale=False, branch_scale=True, **OLDER)
MIXED = dict(
    leaky_slope=0.3, ln_scale=False, branch_scale=True, **PLAIN, **FEATURES, **VALUES
)  # gates, XSA, both
EXTRAS = dict(
    ttt_lora_rank=4,
    ttt_lm_rank=6,
    ttt_bias_tune=True,
    ttt_lr_factors="q:0.5,v:1.5,head:2,bias:3",
    ttt_cosine_chunks=4,
    ttt_min_doc_len=32,
    ttt_max_doc_len=128,
)


# --- The specification: one segment at a time, fp64 -----------------------------------------------
def bucket(ids: list[int], t: int, rows: int) -> int:
    return rows - 1 if t == 0 else ((36313 * ids[t]) ^ (27191 * ids[t - 1])) % (rows - 1)


def rope(x: Tensor, cfg: tg.Config, bound: int) -> Tensor:
    r = cfg.rope_dims or cfg.head_dim
    base = cfg.rope_base
    out = x.clone()
    if cfg.rope_train_seq_len and bound > cfg.rope_train_seq_len:
        base *= (bound / cfg.rope_train_seq_len) ** (r / (r - 2))
    for i in range(r // 2):
        angle = torch.arange(len(x)).double() * base ** (-2 * i / r)
        x1, x2 = x[:, i], x[:, i + r // 2]
        out[:, i] = x1 * angle.cos() + x2 * angle.sin()
        out[:, i + r // 2] = -x1 * angle.sin() + x2 * angle.cos()
    return out


def logits(
    cfg: tg.Config, w: dict[str, Tensor], ids: Tensor, lora: dict, bound: int = 64
) -> Tensor:
    """Logits of a network without loops and lanes.

    lora: (site, layer) -> (A, B), and ("bias", layer) -> vector.
    """
    L = cfg.num_layers
    D = cfg.head_dim
    tokens = ids.tolist()

    def product(site: str, layer: int, n: Tensor, y: Tensor) -> Tensor:
        a, b = lora.get((site, layer), (None, None))
        return y if a is None else y + n @ a.T @ b.T

    x = w["tok_emb"][ids]
    if rows := cfg.bigram_vocab_size:
        hashed = w["bigram_emb"][[bucket(tokens, t, rows) for t in range(len(ids))]]
        x = x + w["bigram_scale"] * (hashed @ w["bigram_proj"].T)
    x = rms(x)
    if cfg.smear_enabled:
        g = w["smear_gate"].sigmoid()
        before = [torch.zeros_like(x[0]), *x[:-1]]
        x = torch.stack(
            [(1 - g) * x[t] + g * before[t] * (tokens[t] != BOS) for t in range(len(ids))]
        )
    x0 = x
    skips = []
    future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for i in range(L):
        depth, scale = 1 / math.sqrt(i + 1), w["resid_mix"][i]
        norm, branch = depth if cfg.ln_scale else 1.0, depth if cfg.branch_scale else 1.0
        if i >= L // 2 and skips:
            j, skip = i - L // 2, skips.pop() * w["skip_weights"][i - L // 2]
            gate = w["skip_gates"][j].sigmoid() if cfg.skip_gates_enabled else None
            x = x + skip if gate is None else gate * x + (1 - gate) * skip
        u = scale[0] * x + scale[1] * x0
        n, heads = rms(u) * norm, []
        q = product("q", i, n, n @ w["qo_bank"][i].T)
        k, v = (product(s, i, n, n @ w["kv_bank"][i + L * (s == "v")].T) for s in "kv")
        if cfg.ve_enabled and str(i) in cfg.ve_layers.split(","):
            place = cfg.ve_layers.split(",").index(str(i))
            v = v + w["ve_layer_scales"][place] * (
                w["ve_scale"] * (w["ve_emb"][ids] @ w["ve_proj"].T)
            )
        for h in range(cfg.num_heads):
            group = h // (cfg.num_heads // cfg.num_kv_heads)
            qh = q[:, h * D : (h + 1) * D]
            kh = k[:, group * D : (group + 1) * D]
            vh = v[:, group * D : (group + 1) * D]
            scores = (
                w["q_gain"][i, h]
                * rope(rms(qh), cfg, bound)
                @ rope(rms(kh), cfg, bound).T
                / math.sqrt(D)
            )
            y = scores.masked_fill(future, -torch.inf).softmax(-1) @ vh
            if i >= L - cfg.xsa_last_n:
                unit = vh / vh.norm(dim=1, keepdim=True)
                y = y - (y * unit).sum(1, keepdim=True) * unit
            heads.append(y)
        x = u + branch * w["attn_scale"][i] * product(
            "o", i, n, torch.cat(heads, 1) @ w["qo_bank"][L + i].T
        )
        n = rms(x) * norm
        pre = n @ w["up_bank"][i].T
        post = (pre.clamp_min(0) + cfg.leaky_slope * pre.clamp_max(0)) ** 2
        x = x + branch * w["mlp_scale"][i] * product("mlp", i, n, post @ w["down_bank"][i].T)
        x = x + lora.get(("bias", i), 0.0)
        skips += [x] if i < L // 2 else []
    x = rms(x)
    return cfg.logit_softcap * torch.tanh(
        product("head", 0, x, x @ w["tok_emb"].T) / cfg.logit_softcap
    )


def b_of_sites(lora: tg.LoRA, up: Tensor) -> tuple[Tensor, ...]:
    """B of every site, from all of them end to end along the last axis but one."""
    return up.split([site.width for site in lora.sites], -2)


def draw_adapters(cfg: tg.Config, count: int) -> tg.LoRA:
    """Adapters of `count` documents that all act."""
    lora = tg.LoRA.zeros(cfg, count, cfg.num_layers, CPU)
    g = torch.Generator().manual_seed(3)
    lora.reset(cfg.seed, list(range(count)))
    with torch.no_grad():
        for leaf in lora.leaves[1:]:
            leaf.normal_(std=0.3, generator=g)
        for site, b in zip(lora.sites, b_of_sites(lora, lora.up), strict=True):
            b[..., site.rank :] = 0  # as updates leave it
    return lora


def repeated(lora: tg.LoRA, count: int) -> tg.LoRA:
    """The adapters of one document for `count` documents."""
    return lora.with_leaves([leaf.repeat_interleave(count, 0) for leaf in lora.leaves])


def plain_adapters(lora: tg.LoRA, leaves: list[Tensor], document: int) -> dict:
    """(site, layer) -> A and B of the site's own rank; nothing beyond it."""
    down, up, *bias = (leaf[document] for leaf in leaves)
    found = {}
    for site, a, b in zip(lora.sites, down, b_of_sites(lora, up), strict=True):
        found[site.site, site.slot] = a[: site.rank], b[:, : site.rank]
    for vectors in bias:
        for layer, vector in enumerate(vectors):
            found["bias", layer] = vector
    return found


def row_with_bos(lengths: tuple[int, ...]) -> tg.Batch:
    row = draw_row(lengths)
    row.inputs[[3, sum(lengths) - 5, sum(lengths) - 1]] = (
        BOS  # within segments, as in rows across documents
    )
    return row


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("changes", [PR473, PR605, MIXED], ids=["pr473", "pr605", "mixed"])
def test_nats_and_all_gradients_are_those_of_the_specification(
    changes, fused, adapted, temperature
):
    switches = dict.fromkeys(("fused_mlp", "fused_qk", "fused_xsa", "fused_ce"), fused)
    cfg = tiny_config(**{**changes, **EXTRAS, **switches})
    lengths = (12, 12) if adapted else (1, 7, 30)
    model = draw(cfg)
    row = row_with_bos(lengths)
    lora = draw_adapters(cfg, len(lengths)) if adapted else None
    names, leaves = zip(*model.named_parameters(), strict=True)
    leaves = [*leaves, *(lora.leaves if lora else [])]
    exact = [p.detach().double().requires_grad_() for p in leaves]
    weights = dict(zip(names, exact, strict=False))
    wanted = []
    for d, s in enumerate(spans(lengths)):
        z = logits(
            cfg,
            weights,
            row.inputs[s],
            plain_adapters(lora, exact[len(names) :], d) if lora else {},
        )
        wanted.append(F.cross_entropy(z / temperature, row.targets[s], reduction="none"))
    wanted = torch.cat(wanted)
    mixture = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(2))
    found = model(row, cfg.plans[0], lora=lora, temperature=temperature)
    assert error(found, wanted) < 1e-5
    with torch.no_grad():  # the loss has another way without gradients
        assert error(model(row, cfg.plans[0], lora=lora, temperature=temperature), wanted) < 1e-5
    pairs = zip(
        torch.autograd.grad((found * mixture).sum(), leaves),
        torch.autograd.grad((wanted * mixture).sum(), exact),
        strict=True,
    )
    for name, (g, ref) in zip([*names, "down", "up", "bias"], pairs, strict=False):
        assert ref.any(), name
        assert (g - ref).norm() < 1e-4 * max(float(ref.norm()), 1.0), name


# --- Sizes, and what is off -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("preset", "changes", "count"),
    [
        ("pr473", {}, 27_124_828),
        ("pr473", dict(bigram_vocab_size=1536), 26_928_220),
        ("pr473", dict(bigram_vocab_size=2048), 26_993_756),
        ("pr1413", {}, 35_943_512),
        ("pr605", {}, 26_829_913),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, changes, count):
    cfg = dataclasses.replace(tg.Config(**tg.PRESETS[preset]), **changes)
    assert sum(math.prod(role.shape) for role in tg.parameter_table(cfg).values()) == count


def test_adapters_of_pr605_hold_the_published_values_but_the_unused_second_bias():
    cfg = tg.Config(**tg.PRESETS["pr605"])
    lora = tg.LoRA.zeros(cfg, 1, 11, torch.device("meta"))
    used = 11 * (2 * 512 * 8 + (512 + 256) * 8) + 16 * (512 + 1024) + 11 * 512
    assert sum(site.rank * (512 + site.width) for site in lora.sites) == used - 11 * 512
    assert lora.bias.numel() == 11 * 512


def test_what_is_off_leaves_no_parameter_buffer_or_field_behind():
    cfg = tiny_config()
    assert set(tg.GPT(cfg).state_dict()) == {
        "qo_bank",
        "kv_bank",
        "up_bank",
        "down_bank",
        "tok_emb",
        "skip_weights",
        "skip_gates",
        "attn_scale",
        "mlp_scale",
        "resid_mix",
        "q_gain",
        "parallel_post_lambdas",
        "parallel_resid_lambdas",
    }
    assert [name for name, _ in tg.GPT(cfg).named_buffers()] == []
    assert not set(tg.network_config(cfg)) & set(tg.OPTIONAL_NETWORK_FIELDS)
    assert len(tg.LoRA.zeros(cfg, 1, 4, CPU).leaves) == 2


def test_optimisers_leave_input_features_alone_where_told_to():
    for trains in (True, False):
        cfg = tiny_config(**PR473, train_input_features=trains, adam_wd=0.5, embed_wd=0.5)
        model = draw(cfg)
        optimizers = tg.Optimizers(model, cfg, cpu_ranks())
        before = {n: p.clone() for n, p in model.named_parameters()}
        for _ in range(2):
            model(draw_row((16, 16)), cfg.plans[0]).mean().backward()
            optimizers.step(1.0, 0.9)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        features = {"bigram_emb", "bigram_proj", "bigram_scale", "smear_gate"}
        assert moved == set(before) - (set() if trains else features)


# --- What enters the stream -----------------------------------------------------------------------
def embedded(model: tg.GPT, row: tg.Batch) -> Tensor:
    """x0 of every token of a row."""
    return model.embed(row.inputs, tg.segment_positions(row.cu_seqlens, row.inputs.numel()))


def test_pairs_go_to_the_published_buckets_also_with_the_largest_ids(monkeypatch):
    cfg = tiny_config(**PLAIN, bigram_vocab_size=3072, bigram_dim=2, vocab_size=65536)
    ids = torch.tensor([5, 7, 7, 0, 65535, 65535, 9, 1, 300])
    seen = []
    original = F.embedding
    row = tg.Batch(ids, ids, torch.tensor([0, 6, 9, 9], dtype=torch.int32), 64)
    monkeypatch.setattr(
        F, "embedding", lambda i, table: (seen.append((i, table)), original(i, table))[1]
    )
    model = draw(cfg)
    embedded(model, row)
    (found,) = (i.tolist() for i, table in seen if len(table) == 3072)
    # 36313 * 7 = 254191, 27191 * 5 = 135955, their XOR 127996, mod 3071 = 2085; and so on
    assert found == [3071, 2085, 2947, 3006, 2348, 371, 3071, 1658, 600]
    assert found == [bucket(ids.tolist(), t, 3072) if t != 6 else 3071 for t in range(9)]
    seen.clear()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 65536, 60000))
    embedded(model, tg.Batch(ids, ids, torch.tensor([0, 60000], dtype=torch.int32), 60000))
    (found,) = (i for i, table in seen if len(table) == 3072)
    assert (
        found[0] == 3071 and found[1:].min() == 0 and found[1:].max() == 3070
    )  # no pair meets the row of starts
    assert len(found.unique()) == 3072


def test_smallest_table_has_a_row_for_pairs_and_one_for_starts():
    cfg = tiny_config(**PLAIN, bigram_vocab_size=2, bigram_dim=4)
    model = draw(cfg)
    model(draw_row((5, 3)), cfg.plans[0]).sum().backward()
    assert model.bigram_emb.grad.any(1).all()


def test_pairs_add_nothing_at_first_but_reach_their_table():
    cfg = tiny_config(**PLAIN, bigram_vocab_size=64, bigram_dim=16)
    model = tg.GPT(cfg)
    row = draw_row((9, 6))
    assert torch.equal(embedded(model, row), tg.rms_norm(F.embedding(row.inputs, model.tok_emb)))
    x = embedded(model, row)
    (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    used = {
        bucket(row.inputs[s].tolist(), t, 64)
        for s in spans((9, 6))
        for t in range(s.stop - s.start)
    }
    assert set(model.bigram_emb.grad.any(1).nonzero().flatten().tolist()) == used
    assert model.bigram_scale.item() == pytest.approx(0.05)
    torch.testing.assert_close(
        model.bigram_proj.T @ model.bigram_proj, torch.eye(16), atol=1e-5, rtol=0
    )


def test_smear_is_at_first_the_mean_with_the_predecessor_and_crosses_no_document():
    cfg = tiny_config(**PLAIN, smear_enabled=True)
    lengths = (6, 1, 9)
    model = tg.GPT(cfg)
    row = draw_row(lengths)
    row.inputs[[2, 10, 11]] = BOS
    x = embedded(model, row)
    token = tg.rms_norm(F.embedding(row.inputs, model.tok_emb))
    begins = {0, 6, 7, 2, 10, 11}
    for t in range(16):
        assert torch.equal(x[t], token[t] / 2 if t in begins else (token[t] + token[t - 1]) / 2), t
    with torch.no_grad():
        model.smear_gate.fill_(50.0)  # all of the predecessor, if there is one
    x = embedded(model, row)
    for t in range(16):
        assert torch.equal(x[t], token[t] * 0 if t in begins else token[t - 1]), t


def test_second_embedding_is_added_to_the_values_of_its_layers_alone(monkeypatch):
    cfg = tiny_config(**PLAIN, **VALUES)
    model = tg.GPT(cfg)
    row = draw_row((9, 6))
    seen = []
    original = tg.attention
    monkeypatch.setattr(
        tg,
        "attention",
        lambda q, k, v, *rest: (seen.append((q, k, v)), original(q, k, v, *rest))[1],
    )
    with torch.no_grad():
        model(row, cfg.plans[0])
        assert model.ve_emb.std() == pytest.approx(0.01, rel=0.05)
        added = 0.1 * 1.0 * model.ve_emb[row.inputs] @ model.ve_proj.T
        model.ve_layer_scales.zero_()
        model(row, cfg.plans[0])  # all blocks add nothing yet: no layer feels another's values
    for layer, (new, old) in enumerate(zip(seen[:4], seen[4:], strict=True)):
        assert torch.equal(new[0], old[0]) and torch.equal(new[1], old[1])
        difference = (new[2] - old[2]).flatten(1)
        torch.testing.assert_close(difference, added * (layer in (1, 3)), atol=1e-6, rtol=1e-4)
    assert added.abs().max() > 1e-3


@pytest.mark.parametrize("changes", [PR473, PR605, MIXED], ids=["pr473", "pr605", "mixed"])
def test_no_token_sees_its_future_or_another_document(changes):
    cfg = tiny_config(**changes)
    model = draw(cfg)
    row = draw_row((16, 16, 16))
    with torch.no_grad():
        before = model(row, cfg.plans[0])
        for changed in (0, 15, 16, 20, 31, 47):
            inputs = row.inputs.clone()
            inputs[changed] = 4 + inputs[changed] % 300
            differs = model(row._replace(inputs=inputs), cfg.plans[0]) != before
            end = changed // 16 * 16 + 16
            assert not differs[:changed].any() and not differs[end:].any()
            assert differs[changed:end].all()


@pytest.mark.parametrize(
    ("dims", "base", "length", "wanted"),
    [
        (16, 10000.0, 2048, 22082),
        (0, 50000.0, 2048, 102261),
        (16, 10000.0, 1024, 10000),
        (16, 10000.0, 96, 10000),
    ],
)
def test_longer_segments_raise_the_base_of_rope(dims, base, length, wanted):
    cfg = tiny_config(rope_dims=dims, rope_base=base, rope_train_seq_len=1024, model_dim=128)
    model = tg.GPT(cfg)
    cos, sin = model.rotations(torch.tensor([1]), length)[0, :, 0].double()
    half = len(cos)
    assert half == (dims or 64) // 2
    for j in (1, half // 2):
        assert float(torch.atan2(sin[j], cos[j])) ** (-half / j) == pytest.approx(
            wanted, abs=0.6, rel=1e-5
        )


def test_the_bound_of_a_row_and_not_its_segments_decides_on_the_base():
    cfg = tiny_config(**PLAIN, rope_train_seq_len=32)
    model = draw(cfg)
    row = draw_row((9, 30))
    with torch.no_grad():
        plain = draw(dataclasses.replace(cfg, rope_train_seq_len=0))(row, cfg.plans[0])
        assert torch.equal(model(row._replace(max_seqlen=32), cfg.plans[0]), plain)
        assert not torch.equal(model(row, cfg.plans[0]), plain)  # its bound is 64


# --- The slope of the MLP -------------------------------------------------------------------------
def plain_activation(pre: Tensor, slope: float) -> Tensor:
    return (pre.clamp_min(0) + slope * pre.clamp_max(0)).square()


@pytest.mark.parametrize("slope", [0.0, 0.3, 0.5])
def test_fused_mlp_of_any_slope_equals_autograd(slope):
    g = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((37, 24), (40, 24), (24, 40))
    ]
    dy = torch.randn(37, 24, generator=g, dtype=torch.float64)
    results = []
    for mlp in (
        tg.fused_mlp,
        tg.plain_mlp,
        lambda x, up, down, s: (plain_activation(x @ up.T, s) @ down.T, None),
    ):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = mlp(*leaves, slope)[0]
        results.append([out, *torch.autograd.grad(out, leaves, dy)])
    for found in results[:2]:
        for a, b in zip(found, results[2], strict=True):
            assert error(a, b) < 1e-12
    pre = torch.tensor([[-3.0, 2.0]], dtype=torch.float64)  # f' = 2 slope^2 z below zero, 2 z above
    eye = torch.eye(2, dtype=torch.float64)
    assert tg.mlp_dpre(torch.ones_like(pre), eye, pre, slope).tolist()[0] == pytest.approx(
        [-6.0 * slope**2, 4.0]
    )


def interpreted() -> list:
    """[slope, what, error] of the Triton kernel run by its interpreter."""
    results = []
    g = torch.Generator().manual_seed(0)
    for slope in (0.0, 0.3):
        x, dy, up, down = (
            torch.randn(*s, generator=g, dtype=torch.float64) * s[-1] ** -0.5
            for s in ((37, 48), (37, 48), (80, 48), (48, 80))
        )
        x, dy, up, down = (t.float() for t in (x, dy, up, down))
        pre, post, dpre = torch.full((3, 37, 80), float("nan"))
        tg.launch_mlp(x, up, pre, post, 3, False, (32, 32, 32), slope)
        tg.launch_mlp(dy, down, pre, dpre, 3, True, (32, 32, 32), slope)
        exact = (x.double() @ up.double().T).requires_grad_()
        wanted = plain_activation(exact, slope)
        (grad,) = torch.autograd.grad(wanted, exact, dy.double() @ down.double())
        pairs = zip(("pre", "post", "dpre"), (pre, post, dpre), (exact, wanted, grad), strict=True)
        results += [[slope, name, error(found, ref)] for name, found, ref in pairs]
    return results


def test_interpreted_kernel_of_any_slope_equals_float64():
    pytest.importorskip("triton")
    env = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": f"{Path(tg.__file__).parent}:{Path(__file__).parent}",
    }
    child = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr[-3000:]
    results = json.loads(child.stdout.splitlines()[-1])
    assert len(results) == 6
    assert all(found < 1e-6 for *_, found in results), results  # false for NaN, too


# --- Temperature ----------------------------------------------------------------------------------
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
def test_probabilities_of_all_tokens_add_up_to_one_at_any_temperature(fused, adapted, gradient):
    cfg = tiny_config(**PLAIN, **EXTRAS, fused_ce=fused)
    model = draw(cfg)
    one = torch.tensor([1, 44, 90, 17])
    targets = torch.stack([one, one, one, one]).repeat(VOCAB // 4, 1)
    targets[:, -1] = torch.arange(VOCAB)  # every candidate, after the same context
    row = tg.Batch(
        one.repeat(VOCAB),
        targets.flatten(),
        torch.arange(0, 4 * VOCAB + 1, 4, dtype=torch.int32),
        64,
    )
    lora = repeated(draw_adapters(cfg, 1), VOCAB) if adapted else None
    with torch.set_grad_enabled(gradient):
        hot, cold, given = (
            model(row, cfg.plans[0], lora=lora, temperature=t)[3::4].detach().double().neg().exp()
            for t in (2.0, 0.7, 1.0)
        )
    assert hot.sum() == pytest.approx(1, abs=1e-5) and cold.sum() == pytest.approx(1, abs=1e-5)
    assert error(cold, given ** (1 / 0.7) / (given ** (1 / 0.7)).sum()) < 1e-5
    assert abs(float((given**0.7).sum()) - 1) > 0.1  # a factor on the nats would not


def test_temperature_applies_wherever_something_is_scored_and_nowhere_else(
    tiny_data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    env = {
        **TINY,
        **{
            k.upper(): str(int(v) if isinstance(v, bool) else v)
            for k, v in {**PR473, **EXTRAS}.items()
        },
    }
    env |= {
        "DATA_DIR": str(tiny_data),
        "ITERATIONS": "2",
        "WARMUP_STEPS": "0",
        "LOGIT_TEMPERATURE": "0.8",
        "VAL_DOC_FRACTION": "0.3",
        "QUANTIZER": "gptq",
        "ARTIFACT_LIMIT_BYTES": "0",
        "COMPRESSOR": "lzma",
        "TTT_BATCH_SIZE": "8",
        "NUM_LAYERS": "4",
    }
    seen, original = {}, tg.GPT.forward

    def forward(self, batch, plan, **options):
        use = "adapts" if options.get("lora") else "calibrates" if "tap" in options else "scores"
        use = "trains" if torch.is_grad_enabled() and use == "scores" else use
        seen.setdefault(use, set()).add(options.get("temperature", 1.0))
        return original(self, batch, plan, **options)

    monkeypatch.setattr(tg.GPT, "forward", forward)
    result = tg.Run(*tg.Config.from_env(env, has_cuda=False), tg.Ranks({})).go()
    assert seen == {"trains": {1.0}, "calibrates": {1.0}, "scores": {0.8}, "adapts": {0.8}}
    assert 0 < result["val_bpb"] < 20


# --- Adapters -------------------------------------------------------------------------------------
def model_with(**overrides: object) -> tg.GPT:
    return draw(tiny_config(**{**ADAPTS, **PR473, **EXTRAS, "ttt_batch_size": 8, **overrides}))


OPTIMISERS = [
    {},
    dict(ttt_beta1=0.9, ttt_beta2=0.95),
    dict(ttt_optimizer="sgd", ttt_beta1=0.9, ttt_lora_lr=1.0),
]


@pytest.mark.parametrize("settings", OPTIMISERS, ids=["adam", "adam with momentum", "sgd"])
@pytest.mark.parametrize("ranks", [(4, 6), (6, 4)])
def test_what_lies_beyond_a_sites_rank_is_and_stays_zero(ranks, settings):
    state = adaptation(
        model_with(ttt_lora_rank=ranks[0], ttt_lm_rank=ranks[1], ttt_min_doc_len=0, **settings)
    )
    scores(state, documents(100, 70))
    assert state.documents.updates == 7
    master = state.documents.master
    down = master.down.detach()
    up = b_of_sites(master, master.up.detach())
    for i, (site, b) in enumerate(zip(master.sites, up, strict=True)):
        rank = ranks[1] if site.site == "head" else ranks[0]
        assert site.rank == rank
        assert down[:, i, :rank].all() and b[..., :rank].any(1).all()  # all in use have moved
        assert not down[:, i, rank:].any() and not b[..., rank:].any()


def test_equal_ranks_draw_what_they_always_drew():
    cfg = tiny_config()
    drawn = []
    for rank in (0, cfg.ttt_lora_rank):
        lora = tg.LoRA.zeros(dataclasses.replace(cfg, ttt_lm_rank=rank), 2, 4, CPU)
        lora.reset(1337, [7, 9])
        drawn.append(lora.down.detach())
    g = torch.Generator().manual_seed(1337 * 1_000_000_007 + 9)
    bound = cfg.model_dim**-0.5
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(
        drawn[0][1], torch.empty_like(drawn[0][1]).uniform_(-bound, bound, generator=g)
    )


def first_update(settings: dict) -> tuple[tg.LoRA, list[Tensor]]:
    """The adapters of two documents, and what one update of random gradients added to each leaf."""
    state = adaptation(model_with(**settings, ttt_weight_decay=0.0))
    state.begin(documents(40, 30), np.array([0, 1]))
    master = state.documents.master
    before = [leaf.detach().clone() for leaf in master.leaves]
    g = torch.Generator().manual_seed(4)
    grads = tuple(torch.randn(leaf.shape, generator=g) for leaf in master.leaves)
    state.apply_gradients(grads, slice(0, 2), 1)
    return master, [leaf.detach() - x for leaf, x in zip(master.leaves, before, strict=True)]


@pytest.mark.parametrize("settings", OPTIMISERS, ids=["adam", "adam with momentum", "sgd"])
def test_factors_scale_the_first_update_of_their_adapters_and_of_no_other(settings):
    factors = {"q": 0.5, "v": 1.5, "head": 2.0, "bias": 4.0}
    text = ",".join(f"{site}:{factor:g}" for site, factor in factors.items())
    lora, (a, b, bias) = first_update({**settings, "ttt_lr_factors": ""})
    _, (scaled_a, scaled_b, scaled_bias) = first_update({**settings, "ttt_lr_factors": text})
    assert bias.all()
    assert torch.equal(scaled_bias, 4 * bias)
    pairs = zip(b_of_sites(lora, b), b_of_sites(lora, scaled_b), strict=True)
    for i, (plain, scaled) in enumerate(pairs):
        factor = factors.get(lora.sites[i].site, 1.0)
        # B starts from 0, so a power of two scales it exactly.
        if factor == 1.5:
            assert error(scaled, factor * plain.double()) < 1e-6
        else:
            assert torch.equal(scaled, factor * plain)
        limit = 1e-6 * max(1.0, float(a.abs().max()))
        assert (scaled_a[:, i] - factor * a[:, i]).abs().max() < limit


@pytest.mark.parametrize("steps", [1, 2])
def test_rate_falls_on_a_cosine_to_a_tenth_over_as_many_chunks_as_told(steps):
    settings = dict(ttt_min_doc_len=0, ttt_max_doc_len=0, ttt_lr_factors="bias:1")
    state = adaptation(model_with(**settings, ttt_grad_steps=steps))
    update, rates = state.update, []

    def noting(leaf, master, grad, moments, t, rate, cfg):
        rates.append(float(rate.max()))
        update(leaf, master, grad, moments, t, rate, cfg)

    state.update = noting
    scores(state, documents(8 * C))
    # Seven chunks are learnt from, each by three leaves.
    wanted = [1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.1, 0.1, 0.1]
    of_chunk = rates[:: 3 * steps]
    assert of_chunk == pytest.approx([0.01 * x for x in wanted])
    assert rates == [rate for rate in of_chunk for _ in range(3 * steps)]


def test_zero_bias_changes_no_bit_and_each_vector_serves_its_document_and_layer():
    cfg = tiny_config(**MIXED, **EXTRAS)
    model = draw(cfg)
    row = draw_row((12, 12, 12))
    lora = draw_adapters(cfg, 3)
    with torch.no_grad():
        without = model(row, cfg.plans[0], lora=dataclasses.replace(lora, bias=None))
        lora.bias.zero_()
        assert torch.equal(model(row, cfg.plans[0], lora=lora), without)
        lora.bias[1, 2] = 0.1
        differs = model(row, cfg.plans[0], lora=lora) != without
    assert differs[12:24].all() and not differs[:12].any() and not differs[24:].any()
    nats = model(row, cfg.plans[0], lora=lora)
    (grad,) = torch.autograd.grad(nats[12:24].sum(), lora.bias)
    assert grad[1].any(1).all() and not grad[[0, 2]].any()


@pytest.mark.parametrize("lanes", [0, 3])
def test_selected_positions_give_the_same_nats_and_gradients_with_biases(lanes):
    cfg = tiny_config(**{**MIXED, **EXTRAS, "parallel_start_layer": lanes})
    model = draw(cfg)
    row = draw_row((12, 12))
    found = []
    select = torch.tensor([9, 10, 11, 21, 22, 23])
    for picked in (None, select):
        lora = draw_adapters(cfg, 2)
        nats = model(row, cfg.plans[0], lora=lora, select=picked, temperature=0.7)
        nats = nats[select] if picked is None else nats
        found.append([nats, *torch.autograd.grad(nats.square().sum(), lora.leaves)])
    for whole, part in zip(*found, strict=True):
        assert error(part, whole.double()) < 1e-6


# --- From the first to the last place to learn from -----------------------------------------------
def test_nothing_is_learnt_outside_the_range_of_places():
    docs = documents(200, 20)
    state = adaptation(model_with(ttt_min_doc_len=48, ttt_max_doc_len=96, ttt_grad_steps=2))
    forward_chunk, apply_gradients = state.forward_chunk, state.apply_gradients
    ends, learnt = [], []

    def forward(ledger, start, end, rows):
        ends.append(end)
        return forward_chunk(ledger, start, end, rows)

    def learn(grads, rows, number):
        learnt.append((ends[-1], number))
        apply_gradients(grads, rows, number)

    state.forward_chunk, state.apply_gradients = forward, learn
    found = scores(state, docs)[0]
    # Chunks that end at 48, 64, 80 and 96, twice each.
    assert learnt == [(48 + 16 * (i // 2), i + 1) for i in range(8)]
    base = scores(adaptation(model_with(ttt_lora_lr=0.0)), docs)[0]
    assert_equal(found[:48], base[:48])
    # Also after the last update: what is learnt stays.
    assert (found[48:] != base[48:]).mean() > 0.9


@pytest.mark.parametrize("count", [1, 20, 31, 32, 33, 48, 90, 128, 129, 160])
def test_cut_or_continued_document_keeps_the_scores_of_its_beginning(count):
    """The range goes by the place: a document shorter than it learns as its continuation does."""
    whole = documents(190)
    state = adaptation(model_with())
    short = scores(state, whole._replace(counts=np.array([count])))[0]
    assert len(short) == count
    assert_equal(scores(state, whole)[0][:count], short)


@pytest.mark.parametrize("place", [5, 16, 17, 40, 64, 65, 130])
def test_edited_token_changes_no_score_before_it_and_no_other_document(place):
    docs = documents(150, 120, 33)
    state = adaptation(model_with(ttt_grad_steps=2))
    before = scores(state, docs)
    at = docs.starts[0] + place
    docs.tokens[at] = 4 + (docs.tokens[at] - 3) % (VOCAB - 4)
    after = scores(state, docs)
    assert_equal(after[0][: place - 1], before[0][: place - 1])
    assert (after[0][place - 1 :] != before[0][place - 1 :]).mean() > 0.9
    assert_equal(after[1], before[1])
    assert_equal(after[2], before[2])


@pytest.mark.parametrize("settings", OPTIMISERS[1:], ids=["adam", "sgd"])
def test_batch_mates_and_order_do_not_change_a_score_with_everything_on(settings):
    docs = documents(*LENGTHS)
    model = model_with(**settings)
    state = adaptation(model)
    alone = {d: scores(state, docs, [d])[d] for d in range(len(LENGTHS))}
    for batch in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 4, 0], [5, 3, 1]):
        for d, nats in scores(state, docs, batch).items():
            assert difference(nats, alone[d]) < 1e-6
    ledger = evaluated(model, docs)
    assert ledger.problems(sum(LENGTHS)) == []
    ends = np.cumsum(docs.counts)[:-1]
    for d, nats in enumerate(np.split(nats_of(ledger)[: sum(LENGTHS)], ends)):
        assert difference(nats, alone[d]) < 1e-6


# --- Compilation ----------------------------------------------------------------------------------
def test_adapted_forward_with_everything_on_is_one_graph():
    torch.compiler.reset()
    cfg = tiny_config(**{**PR473, **EXTRAS, "num_layers": 2, "xsa_last_n": 1, "ve_layers": "1"})
    model = draw(cfg)
    counter = CompileCounter()
    with torch._dynamo.config.patch(specialize_int=True, specialize_float=True):
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        for count, n in (
            (7, 14),
            (7, 20),
            (9, 10),
        ):  # first sizes that no other has: torch takes equal ones for one
            (inputs, targets, *_) = draw_row((n,) * count)
            lora = draw_adapters(cfg, count)
            ends = torch.arange(2 * count + 1, dtype=torch.int32).mul(n).clamp_max(n * count)
            row = tg.Batch(inputs.clone(), targets.clone(), ends, 64)
            select = torch.arange(n * count).view(count, n)[:, -3:].flatten()
            found, plain = (
                f(row, cfg.plans[0], lora=lora, select=select, temperature=0.7)
                for f in (compiled, model)
            )
            assert error(found, plain.double()) < 1e-6
    assert counter.frame_count == 1
    torch.compiler.reset()


if __name__ == "__main__":
    print(json.dumps(interpreted()))
