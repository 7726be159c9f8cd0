"""The network: plans, parameters, adapters, and its forward against a second, plain one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny_config
from test_optim import cpu_ranks
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import train_gpt as tg

CPU = torch.device("cpu")
LENGTHS = (1, 7, 30, 2, 16, 16)  # of the documents of a row
GATES = dict(sparse_attn_gate_enabled=True, smear_gate_enabled=True)
DEEPER = dict(num_layers=5, loop_end=2, xsa_last_n=5)  # 0 1 2 1 2 3 4, two lanes from 3 on
RECORD = tg.Config.from_env({"PRESET": "pr1530", "COMPUTE_DTYPE": "fp32"}, has_cuda=True)[0]


def draw(cfg: tg.Config, seed: int = 0) -> tg.GPT:
    """A network none of whose parameters is zero or equal to another, as after training."""
    model = tg.GPT(cfg)
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        spread = p.size(-1) ** -0.5 if name.endswith("bank") else 0.5 if name == "tok_emb" else 0.2
        p.data = (0.0 if name.endswith("bank") or name == "tok_emb" else 1.0) + spread * noise
    return model


def draw_row(
    lengths: tuple[int, ...], seed: int = 0, vocab: int = VOCAB, padding: int = 0
) -> tg.Batch:
    """Random documents of these lengths in one row."""
    n = sum(lengths)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, n + 1)
    starts = np.cumsum([0, *lengths[:-1]])
    return tg.pack_row(ids[:-1], ids[1:], starts, (n + padding, 2 * len(lengths) + 2, 64), CPU)


def draw_lora(cfg: tg.Config, documents: int, slots: int) -> tg.LoRA:
    """Adapters that act: neither factor is zero."""
    lora = tg.LoRA.zeros(cfg, documents, slots, CPU)
    lora.reset(cfg.seed, list(range(documents)))
    with torch.no_grad():
        lora.up.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return lora


def spans(lengths: tuple[int, ...]) -> list[slice]:
    return [
        slice(end - n, end) for n, end in zip(lengths, np.cumsum(lengths).tolist(), strict=True)
    ]


def error(out: Tensor, ref: Tensor) -> float:
    return float(((out.double() - ref).norm() / ref.norm()).detach())


# --- The specification once more: fp64, one document, one head at a time --------------------------
def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


def halves(cfg: tg.Config, loops: int) -> tuple[list[int], list[int]]:
    segment = [*range(cfg.loop_start, cfg.loop_end + 1)]
    order = (
        [*range(cfg.loop_start)]
        + segment * (loops + 1)
        + [*range(cfg.loop_end + 1, cfg.num_layers)]
    )
    return order[: len(order) // 2], order[len(order) // 2 :]


class Reference:
    def __init__(
        self,
        cfg: tg.Config,
        weights: dict[str, Tensor],
        lora: dict[tuple[str, int], tuple[Tensor, Tensor]],
    ):
        self.cfg = cfg
        self.w = weights
        self.lora = lora

    def adapted(self, y: Tensor, n: Tensor, site: str, slot: int) -> Tensor:
        a, b = self.lora.get((site, slot), (n.new_zeros(1, n.size(1)), n.new_zeros(y.size(1), 1)))
        return y + (n @ a.T) @ b.T

    def rope(self, x: Tensor) -> Tensor:
        dims = self.cfg.rope_dims or self.cfg.head_dim
        out = x.clone()
        for j in range(dims // 2):
            angle = torch.arange(len(x)).double() * self.cfg.rope_base ** (-2 * j / dims)
            x1, x2 = x[:, j], x[:, j + dims // 2]
            out[:, j] = x1 * angle.cos() + x2 * angle.sin()
            out[:, j + dims // 2] = -x1 * angle.sin() + x2 * angle.cos()
        return out

    def attn(self, i: int, slot: int, n: Tensor) -> Tensor:
        cfg = self.cfg
        w = self.w
        L = self.cfg.num_layers
        D = self.cfg.head_dim
        q = self.adapted(n @ w["qo_bank"][i].T, n, "q", slot)
        k = self.adapted(n @ w["kv_bank"][i].T, n, "k", slot)
        v = self.adapted(n @ w["kv_bank"][L + i].T, n, "v", slot)
        future = torch.ones(len(n), len(n), dtype=torch.bool).triu(1)
        heads = []
        for h in range(cfg.num_heads):
            g = h // (cfg.num_heads // cfg.num_kv_heads)
            qh = q[:, h * D : (h + 1) * D]
            kh = k[:, g * D : (g + 1) * D]
            vh = v[:, g * D : (g + 1) * D]
            scores = w["q_gain"][i, h] * self.rope(rms(qh)) @ self.rope(rms(kh)).T / math.sqrt(D)
            y = scores.masked_fill(future, -torch.inf).softmax(-1) @ vh
            if i >= L - cfg.xsa_last_n:
                unit = vh / vh.norm(dim=1, keepdim=True).clamp_min(1e-12)
                y = y - (y * unit).sum(1, keepdim=True) * unit
            if cfg.sparse_attn_gate_enabled:
                z = n[:, : cfg.gate_window] @ w["attn_gate"][i, h]
                y = y * torch.sigmoid(cfg.sparse_attn_gate_scale * z)[:, None]
            heads.append(y)
        y = torch.cat(heads, 1) @ w["qo_bank"][L + i].T
        return w["attn_scale"][i] * self.adapted(y, n, "o", slot)

    def mlp(self, i: int, slot: int, n: Tensor) -> Tensor:
        pre = n @ self.w["up_bank"][i].T
        y = torch.where(pre > 0, pre, 0.5 * pre) ** 2 @ self.w["down_bank"][i].T
        return self.w["mlp_scale"][i] * self.adapted(y, n, "mlp", slot)

    def nats(self, ids: Tensor, targets: Tensor, looped: bool) -> Tensor:
        cfg, w = self.cfg, self.w
        encoder, decoder = halves(cfg, cfg.num_loops if looped else 0)
        full_encoder, full_decoder = halves(cfg, cfg.num_loops)
        full = list(
            zip(full_decoder, reversed(full_encoder), strict=False)
        )  # (receiver, source) of each row
        x = w["tok_emb"][ids]
        if cfg.smear_gate_enabled:
            gate = w["smear_lambda"] * torch.sigmoid(x[:, : cfg.gate_window] @ w["smear_proj"].T)
            before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            x = x + gate * before * (ids != tg.BOS_ID)[:, None]
        x = x0 = rms(x)
        skips, lanes = [], None
        for slot, i in enumerate(encoder + decoder):
            c = 1 / math.sqrt(i + 1) if cfg.ln_scale else 1.0
            m = w["resid_mix"][i]
            k = slot - len(encoder)
            if lanes is None and cfg.parallel_start_layer and i >= cfg.parallel_start_layer:
                lanes = x, x
            if k >= 0 and skips:
                source, s = skips.pop()
                rows = (
                    [k]
                    if looped
                    else [r for r, pair in enumerate(full) if pair == (i, source)] or [k]
                )
                s, stream = w["skip_weights"][rows].mean(0) * s, lanes[0] if lanes else x
                gate = (
                    torch.sigmoid(w["skip_gates"][rows].mean(0)) if cfg.skip_gates_enabled else None
                )
                mixed = stream + s if gate is None else (1 - gate) * s + gate * stream
                x, lanes = (x, (mixed, lanes[1])) if lanes else (mixed, None)
            if lanes:
                a = self.attn(i, slot, rms(m[0] * lanes[0] + m[1] * x0) * c)
                p = self.mlp(i, slot, rms(lanes[1]) * c)
                r, post = w["parallel_resid_lambdas"][i], w["parallel_post_lambdas"][i]
                lanes = tuple(r[j] * lanes[j] + post[0, j] * a + post[1, j] * p for j in range(2))
            else:
                u = m[0] * x + m[1] * x0
                h = u + self.attn(i, slot, rms(u) * c)
                x = h + self.mlp(i, slot, rms(h) * c)
            if k < 0:
                skips.append((i, x))
        if lanes:
            x = {"mean": (lanes[0] + lanes[1]) / 2, "attn": lanes[0], "mlp": lanes[1]}[
                cfg.parallel_final_lane
            ]
        x = rms(x)
        z = self.adapted(x @ w["tok_emb"].T, x, "head", 0)
        logits = cfg.logit_softcap * torch.tanh(z / cfg.logit_softcap)
        return -logits.log_softmax(-1)[torch.arange(len(ids)), targets]


def agree(cfg: tg.Config, looped: bool, lengths: tuple[int, ...], adapted: bool = False) -> None:
    """Nats, and the gradient of a random mixture of them, are those of the reference."""
    model = draw(cfg)
    row = draw_row(lengths)
    plan = cfg.plans[looped]
    lora = draw_lora(cfg, len(lengths), len(plan)) if adapted else None
    mixture = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(2))
    names = [name for name, _ in model.named_parameters()]
    leaves = list(model.parameters())
    if lora:
        names += ["down", "up"]
        leaves += [lora.down, lora.up]
    exact = [p.detach().double().requires_grad_() for p in leaves]
    weights = dict(zip(names, exact, strict=True))
    per_document = [{}] * len(lengths)
    if lora:
        places = [(site.site, site.slot) for site in lora.sites]
        b_of_all = weights["up"].split([site.width for site in lora.sites], 1)
        up = dict(zip(places, b_of_all, strict=True))
        per_document = [
            {
                site: (down, cfg.lora_scale * up[site][d])
                for site, down in zip(places, weights["down"][d], strict=True)
            }
            for d in range(len(lengths))
        ]
    wanted = torch.cat(
        [
            Reference(cfg, weights, adapters).nats(row.inputs[s], row.targets[s], looped)
            for s, adapters in zip(spans(lengths), per_document, strict=True)
        ]
    )
    found = model(row, plan, lora=lora)
    assert error(found, wanted) < 1e-5
    gradients = torch.autograd.grad((found * mixture).sum(), leaves)
    for name, g, ref in zip(
        names, gradients, torch.autograd.grad((wanted * mixture).sum(), exact), strict=True
    ):
        assert (g - ref).norm() < 1e-4 * max(float(ref.norm()), 1.0), (
            name
        )  # 1: in a lambda's one sum much cancels


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(skip_gates_enabled=False),
        dict(ln_scale=False),
        dict(xsa_last_n=2),
        dict(xsa_last_n=0, rope_dims=0),
        dict(parallel_start_layer=0),
        dict(parallel_final_lane="mlp"),
        dict(parallel_final_lane="attn", num_kv_heads=2),
        dict(num_layers=6, num_loops=2, parallel_start_layer=4, logit_softcap=5.0),
        dict(sparse_attn_gate_enabled=True),
        dict(smear_gate_enabled=True),
        dict(GATES, gate_window=5, sparse_attn_gate_scale=1.5, xsa_last_n=2),
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()) or "default",
)
def test_forward_and_gradients_are_those_of_the_specification(changes, looped):
    agree(tiny_config(**{**DEEPER, **changes}), looped, LENGTHS)


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(ttt_lora_alpha=12.0),
        dict(ttt_q_lora=False, ttt_v_lora=False),
        dict(ttt_k_lora=False, ttt_o_lora=False, ttt_mlp_lora=False),
        dict(GATES, ttt_k_lora=False),
    ],
)
def test_adapters_and_their_gradients_are_those_of_the_specification(looped, changes):
    agree(tiny_config(**{**DEEPER, **changes}), looped, (12, 12, 12), adapted=True)


def scored_windows(
    model: tg.GPT, plan: tuple, n: int, padding: int, scored: int, forward=None
) -> list[Tensor]:
    """Nats and adapter gradients of the last `scored` of the `n` positions of three windows.

    By `forward` with these positions selected; without it, by a pass over all positions.
    """
    row = draw_row((n, padding) * 3 if padding else (n,) * 3)
    width = n + padding
    select = (torch.arange(3)[:, None] * width + torch.arange(n - scored, n)).flatten()
    lora = draw_lora(model.cfg, 3, len(plan))
    nats = (
        model(row, plan, lora=lora)[select]
        if forward is None
        else forward(row, plan, lora=lora, select=select)
    )
    return [nats, *torch.autograd.grad(nats.square().sum(), [lora.down, lora.up])]


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize(
    ("n", "padding", "scored"), [(12, 0, 3), (7, 5, 3), (12, 0, 12), (4, 1, 4), (9, 23, 1)]
)
def test_last_visit_at_selected_positions_only_gives_the_same_nats_and_gradients(
    n, padding, scored, looped
):
    model = draw(cfg := tiny_config(**DEEPER))
    whole, part = (
        scored_windows(model, cfg.plans[looped], n, padding, scored, f) for f in (None, model)
    )
    assert all(error(x, z.double()) < 1e-6 for x, z in zip(part, whole, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        dict(fused_qk=False, fused_xsa=False),
        dict(xsa_last_n=0, num_kv_heads=2),
        dict(ttt_q_lora=False),
        dict(ttt_k_lora=False, ttt_v_lora=False),
        dict(ttt_q_lora=False, ttt_k_lora=False, ttt_v_lora=False, ttt_o_lora=False),
        dict(parallel_start_layer=0),
        GATES,
    ],
    ids=str,
)
def test_selected_positions_of_any_network_and_adapters_give_the_same(changes):
    model = draw(cfg := tiny_config(**{**DEEPER, **changes}))
    whole, part = (scored_windows(model, cfg.plans[1], 7, 5, 3, f) for f in (None, model))
    assert all(error(x, z.double()) < 1e-6 for x, z in zip(part, whole, strict=True))


def test_last_visit_alone_asks_for_the_selected_positions_and_for_nothing_without_adapters(
    monkeypatch,
):
    model = draw(cfg := tiny_config(**DEEPER))
    queries = []
    real = tg.attention
    monkeypatch.setattr(tg, "attention", lambda q, *rest: queries.append(len(q)) or real(q, *rest))
    scored_windows(model, cfg.plans[1], 7, 5, 3, model)
    assert queries == [36] * (len(cfg.plans[1]) - 1) + [9]
    queries.clear()
    model(draw_row((7, 5) * 3), cfg.plans[1], select=torch.tensor([4, 5, 6]))
    assert queries == [36] * len(cfg.plans[1])


def test_adaptation_compiles_whole_and_not_again_for_another_window():
    torch.compiler.reset()
    cfg = tiny_config(num_layers=2, num_loops=0, parallel_start_layer=0, xsa_last_n=2)
    model = draw(cfg).requires_grad_(False)
    counter = CompileCounterWithBackend("aot_eager")
    counts = []
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for n, padding, scored in (
        (10, 7, 6),
        (20, 11, 7),
    ):  # no two sizes equal, which would be taken for one
        whole, part = (
            scored_windows(model, cfg.plans[1], n, padding, scored, f) for f in (None, compiled)
        )
        assert all(error(x, z.double()) < 1e-6 for x, z in zip(part, whole, strict=True))
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]
    torch.compiler.reset()


# --- Conformance numbers --------------------------------------------------------------------------
def test_record_has_the_published_number_of_parameters_and_adapter_values():
    assert sum(math.prod(role.shape) for role in tg.parameter_table(RECORD).values()) == 35_944_602
    lora = tg.LoRA.zeros(RECORD, 1, len(RECORD.plans[1]), torch.device("meta"))
    assert lora.down.numel() + lora.up.numel() == 8_355_840


@pytest.fixture(scope="module")
def record_at_init() -> tg.GPT:
    return tg.GPT(RECORD)


def test_record_starts_at_the_loss_of_a_uniform_guess(record_at_init):
    with torch.no_grad():
        nats = record_at_init(draw_row((1, 30, 17), vocab=8192), RECORD.plans[1])
    assert abs(float(nats.mean()) - math.log(8192)) < 0.02


def test_every_block_of_the_record_adds_exactly_nothing_at_first(record_at_init):
    """Only embeddings, skips and the lanes' factor 1.1 are left; random skip weights show them."""
    model = record_at_init
    row = draw_row((1, 30, 17), vocab=8192)
    seen = {}
    with torch.no_grad():
        model.skip_weights.normal_(generator=torch.Generator().manual_seed(0))
        before = model(row, RECORD.plans[1], tap=lambda site, layer, x: seen.update({site: x}))
        for bank in (model.qo_bank[:11], model.kv_bank, model.up_bank):
            bank.mul_(-3.0)
        assert torch.equal(model(row, RECORD.plans[1]), before)
    x = x0 = rms(model.tok_emb.detach()[row.inputs].double())
    w = model.skip_weights.detach().double()
    for k in range(6):  # 5 3 4 5 6 7: a closed gate is 1/2
        x = (w[k] * x0 + x) / 2
    attn, mlp = 1.1 * (w[6] * x0 + x) / 2, 1.1 * x
    attn, mlp = 1.1 * 1.1 * (w[7] * x0 + attn) / 2, 1.1 * 1.1 * mlp
    assert error(seen["head_in"], rms((attn + mlp) / 2)) < 1e-6


# --- Plans ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("layers", "loops", "segment", "looped", "encoder", "decoder", "skips"),
    [
        (2, 0, (0, 0), False, [0], [1], [(0,)]),
        (3, 0, (0, 0), False, [0], [1, 2], [(0,), ()]),
        (4, 1, (1, 1), True, [0, 1], [1, 2, 3], [(0,), (1,), ()]),
        (
            4,
            1,
            (1, 1),
            False,
            [0, 1],
            [2, 3],
            [(0,), (1,)],
        ),  # pairs that looping does not have: rows by position
        (5, 1, (1, 2), True, [0, 1, 2], [1, 2, 3, 4], [(0,), (1,), (2,), ()]),
        (5, 1, (1, 2), False, [0, 1], [2, 3, 4], [(1,), (2,), ()]),
        (
            11,
            2,
            (3, 5),
            True,
            [0, 1, 2, 3, 4, 5, 3, 4],
            [5, 3, 4, 5, 6, 7, 8, 9, 10],
            [*((k,) for k in range(8)), ()],
        ),
        (
            11,
            2,
            (3, 5),
            False,
            [0, 1, 2, 3, 4],
            [5, 6, 7, 8, 9, 10],
            [(0, 3), (4,), (5,), (6,), (7,), ()],
        ),
    ],
)
def test_plans_written_out_by_hand(layers, loops, segment, looped, encoder, decoder, skips):
    cfg = tiny_config(
        num_layers=layers,
        xsa_last_n=layers,
        num_loops=loops,
        loop_start=segment[0],
        loop_end=segment[1],
        parallel_start_layer=8 if layers == 11 else 0,
    )
    plan = cfg.plans[looped]
    assert [v.layer for v in plan if v.push] == encoder
    assert [v.layer for v in plan if not v.push] == decoder
    assert [v.skip for v in plan if not v.push] == skips
    assert [v.slot for v in plan] == list(range(len(plan)))
    assert [v.layer for v in plan if v.parallel] == ([8, 9, 10] if layers == 11 else [])
    if layers == 11:
        assert plan == RECORD.plans[looped]


def test_a_skip_keeps_its_meaning_when_looping_starts():
    """A pair of layers mixes alike in both plans; the plain plan trains every row of a pair."""
    cfg = tiny_config(
        num_layers=11, xsa_last_n=11, num_loops=2, loop_start=3, loop_end=5, parallel_start_layer=8
    )
    model = draw(cfg)
    (x, skip) = torch.randn(2, 9, cfg.model_dim)
    used = []
    for plan in cfg.plans:
        sources = [v.layer for v in plan if v.push]
        used.append([(v.layer, sources.pop(), v.skip) for v in plan if v.skip])
    plain = {(receiver, source): rows for receiver, source, rows in used[0]}
    with torch.no_grad():
        for rows in (model.skip_weights, model.skip_gates):
            rows[3] = rows[0]  # both of 5 <- 4
        for receiver, source, rows in used[1]:
            if (receiver, source) in plain:
                merged = model.merge_skip(x, skip, plain[receiver, source])
                torch.testing.assert_close(
                    merged, model.merge_skip(x, skip, rows), rtol=0, atol=1e-6
                )
    model(draw_row(LENGTHS), cfg.plans[0]).sum().backward()
    for p in (model.skip_weights, model.skip_gates):
        assert [k for k in range(8) if p.grad[k].any()] == [0, 3, 4, 5, 6, 7]
        assert torch.equal(p.grad[0], p.grad[3])


# --- Rows, documents, time ------------------------------------------------------------------------
@pytest.mark.parametrize("looped", [False, True])
def test_a_row_equals_its_documents_one_by_one_wherever_they_stand(looped):
    cfg = tiny_config(**DEEPER)
    model = draw(cfg)
    row = draw_row(LENGTHS * 3, padding=20)
    plan = cfg.plans[looped]
    with torch.no_grad():
        nats = model(row, plan)
        for s in spans(
            LENGTHS * 3
        ):  # 216 tokens: a position in the row would lie outside the table of 64
            n = s.stop - s.start
            alone = tg.pack_row(
                row.inputs[s].numpy(), row.targets[s].numpy(), np.array([0]), (n, 2, 64), CPU
            )
            assert error(nats[s], model(alone, plan).double()) < 1e-5
    assert not nats[sum(LENGTHS * 3) :].any()  # padding


def test_positions_count_from_the_start_of_each_segment():
    cu = torch.tensor([0, 3, 4, 9, 9, 9], dtype=torch.int32)
    assert tg.segment_positions(cu, 9).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("looped", [False, True])
def test_no_token_sees_its_future_or_another_document(looped, adapted):
    cfg = tiny_config(**DEEPER)
    lengths = (16, 16, 16)
    model = draw(cfg)
    row = draw_row(lengths)
    plan = cfg.plans[looped]
    lora = draw_lora(cfg, 3, len(plan)) if adapted else None
    with torch.no_grad():
        before = model(row, plan, lora=lora)
        for changed in (0, 15, 16, 20, 31, 47):
            inputs = row.inputs.clone()
            inputs[changed] = (inputs[changed] + 1) % VOCAB
            differs = model(row._replace(inputs=inputs), plan, lora=lora) != before
            end = changed // 16 * 16 + 16
            assert not differs[:changed].any()
            assert not differs[end:].any()
            assert differs[changed:end].all()


def test_no_target_no_loss_and_select_returns_the_nats_it_names():
    cfg = tiny_config(**DEEPER)
    model = draw(cfg)
    row = draw_row(LENGTHS)
    plan = cfg.plans[1]
    nats = model(row, plan)
    some = torch.arange(len(nats)) % 3 == 0
    masked = model(row._replace(targets=row.targets.masked_fill(some, -1)), plan)
    assert not masked[some].any()
    assert torch.equal(masked[~some], nats[~some])
    order = torch.tensor([40, 3, 3, 71, 0])
    torch.testing.assert_close(model(row, plan, select=order), nats[order], rtol=1e-5, atol=1e-6)


def test_taps_see_every_product_and_change_nothing():
    """And training, calibration and scoring are one forward: not a bit depends on the mode."""
    cfg = tiny_config(**DEEPER)
    model = draw(cfg)
    row = draw_row(LENGTHS)
    plan = cfg.plans[1]
    seen = []
    trained = model.train()(row, plan)
    with torch.no_grad():
        tapped = model.eval()(
            row, plan, tap=lambda site, layer, x: seen.append((site, layer, x.size(1)))
        )
        assert torch.equal(tapped, model(row, plan))
    assert torch.equal(tapped, trained)
    widths = {
        "attn_in": cfg.model_dim,
        "attn_out": cfg.model_dim,
        "mlp_in": cfg.model_dim,
        "mlp_mid": cfg.mlp_dim,
    }
    sites = [(site, v.layer, width) for v in plan for site, width in widths.items()]
    assert seen == [*sites, ("head_in", 0, cfg.model_dim)]


# --- Adapters -------------------------------------------------------------------------------------
def test_fresh_adapters_change_not_a_bit():
    cfg = tiny_config(**DEEPER)
    model = draw(cfg)
    row = draw_row((16, 16, 16))
    plan = cfg.plans[1]
    lora = tg.LoRA.zeros(cfg, 3, len(plan), CPU)
    lora.reset(cfg.seed, [5, 0, 7])
    assert lora.down.abs().min() > 0
    assert torch.equal(model(row, plan, lora=lora), model(row, plan))


def test_an_adapter_serves_its_document_alone():
    cfg = tiny_config(**DEEPER)
    model = draw(cfg)
    row = draw_row((16, 16, 16))
    plan = cfg.plans[1]
    lora = draw_lora(cfg, 3, len(plan))
    before = model(row, plan, lora=lora)
    before[16:32].sum().backward()
    for leaf in (lora.down, lora.up):
        assert leaf.grad[1].flatten(1).any(1).all()
        assert not leaf.grad[[0, 2]].any()
        with torch.no_grad():
            leaf[1] *= 1.5
            differs = model(row, plan, lora=lora) != before
            assert differs[16:32].all()
            assert not differs[:16].any()
            assert not differs[32:].any()


# --- Precision and compilation --------------------------------------------------------------------
def test_bf16_stays_near_fp32():
    nats = []
    for dtype in ("fp32", "bf16"):
        cfg = tiny_config(**DEEPER, compute_dtype=dtype)
        nats.append(draw(cfg)(draw_row(LENGTHS), cfg.plans[1]).detach())
    assert nats[1].dtype == torch.float32
    assert 0 < error(nats[1], nats[0].double()) < 2e-2


def test_training_compiles_once_per_plan_whatever_the_documents(tiny_data):
    """AOT autograd traces forward and backward; generating code would take too long."""
    torch.compiler.reset()
    cfg = tiny_config()
    counter = CompileCounterWithBackend("aot_eager")
    rng = np.random.default_rng(0)
    model = draw(cfg)
    shape = cfg.row_shape
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    loader = tg.PackedLoader(
        tg.TokenStream(tiny_data / "datasets" / cfg.dataset, "train"), 1, cfg, cpu_ranks()
    )
    for step in range(200):
        (row,), _ = loader.rows(1)
        if step % 2:  # and rows of any length, full of short documents
            n = int(rng.integers(1, shape[0] + 1))
            starts = tg.segment_starts(rng.random(n) < rng.uniform(0, 0.1), True, shape[2])[
                : shape[1] // 2
            ]
            n = n if len(starts) < shape[1] // 2 else int(starts[-1])
            ids = rng.integers(0, VOCAB, n + 1)
            row = tg.pack_row(ids[:-1], ids[1:], starts[starts < n], shape, CPU)
        model.zero_grad()
        compiled(row, cfg.plans[step // 2 % 2]).sum().backward()
    assert counter.frame_count == 2
    compiled_gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(row, cfg.plans[1]).sum().backward()
    for p, g in zip(model.parameters(), compiled_gradients, strict=True):
        assert error(g, p.grad.double()) < 1e-5
    torch.compiler.reset()
