"""Muon, AdamW, clipping and schedules, on one rank and on real processes joined by gloo."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import on_ranks, tiny_config
from torch import Tensor

import train_gpt as tg

# Banks of 6 and 3 matrices, which ranks cannot divide evenly.
UNEVEN = dict(num_layers=3, xsa_last_n=3, parallel_start_layer=2)
RATES = {"muon": "matrix_lr", "embed": "tied_embed_lr", "scalar": "scalar_lr"}
DECAYS = {"muon": "muon_wd", "embed": "embed_wd", "scalar": "adam_wd"}


def on_one(job: Callable, *args: Any) -> Any:
    """What job(ranks, *args) returns in this process, without a process group."""
    return job(cpu_ranks(), *args)


def test_a_world_size_without_a_rank_is_no_world():
    """Clusters may set WORLD_SIZE for processes that nobody launched as ranks."""
    assert [
        (r.world_size, r.distributed) for r in (tg.Ranks({"WORLD_SIZE": "2"}), tg.Ranks({}))
    ] == [(1, False)] * 2


def cpu_ranks() -> tg.Ranks:
    ranks = tg.Ranks({})
    ranks.device = torch.device("cpu")
    return ranks


def build(**overrides: Any) -> tuple[tg.Config, tg.GPT, tg.Optimizers]:
    cfg = tiny_config(**overrides)
    model = tg.GPT(cfg)
    return cfg, model, tg.Optimizers(model, cfg, cpu_ranks())


def draw_gradients(model: tg.GPT, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(p.shape, generator=g) for name, p in model.named_parameters()}


def set_gradients(model: tg.GPT, gradients: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.grad = gradients[name].clone()


def weights_of(model: tg.GPT) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def error(out: Tensor, ref: Tensor) -> float:
    return float((out.double() - ref.double()).norm() / ref.double().norm())


def assert_near_orthogonal(matrices: Tensor) -> None:
    values = torch.linalg.svdvals(matrices)
    assert values.min() > 0.6
    assert values.max() < 1.3


# --- Newton-Schulz and the Muon update ---
@pytest.mark.parametrize("shape", [(3, 96, 32), (3, 32, 96), (2, 64, 256), (1, 17, 5), (3, 48, 48)])
def test_newton_schulz_moves_singular_values_near_one_and_leaves_the_vectors(shape):
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.empty(shape[0], min(shape[1:])).uniform_(0.1, 1)
    g = (u * values[:, None]) @ vh * 1e-3
    out = tg.newton_schulz(g, 5)
    assert_near_orthogonal(out)
    assert_near_orthogonal(tg.newton_schulz(torch.randn(2, 24, 96), 5))
    wanted = values.double() / values.double().norm(dim=1, keepdim=True)
    # Five steps of each singular value by itself.
    for _ in range(5):
        wanted = 3.4445 * wanted - 4.7750 * wanted**3 + 2.0315 * wanted**5
    # The 1e-7 added to the small norm counts here, 3.4445**5 times.
    assert error(u.mT @ out @ vh.mT, torch.diag_embed(wanted)) < 1e-3
    for one, all_at_once in zip(g, out, strict=True):
        assert error(tg.newton_schulz(one[None], 5)[0], all_at_once) < 1e-5


@pytest.mark.parametrize("normalize", [True, False])
def test_momentum_nesterov_and_row_norms_are_those_of_a_hand_loop(normalize):
    cfg = tiny_config(muon_row_normalize=normalize)
    mu = 0.9
    buffer = torch.zeros(2, 24, 48)
    mine = [[[0.0] * 48 for _ in range(24)] for _ in range(2)]
    for step in range(3):
        grad = torch.randn(2, 24, 48, generator=torch.Generator().manual_seed(step)) * 10.0**-step
        wanted = torch.zeros(2, 24, 48, dtype=torch.float64)
        for b, r in [(b, r) for b in range(2) for r in range(24)]:
            g = grad[b, r].tolist()
            mine[b][r] = [mu * m + x for m, x in zip(mine[b][r], g, strict=True)]
            row = [x + mu * m for m, x in zip(mine[b][r], g, strict=True)]
            norm = math.sqrt(sum(x * x for x in row)) if normalize else 1.0
            wanted[b, r] = torch.tensor([x / norm for x in row], dtype=torch.float64)
        update = tg.muon_update(grad, buffer, None, torch.tensor(mu), cfg)
        assert error(buffer, torch.tensor(mine)) < 1e-6
        assert error(update, tg.newton_schulz(wanted, 5)) < 1e-4


def test_squares_divide_the_update_entry_by_entry_before_its_rows_are_normed():
    cfg = tiny_config(muon_square_decay=0.75, muon_row_normalize=False)
    mu = 0.9
    buffer, squares = torch.zeros(3, 12, 20), torch.zeros(3, 12, 20)
    m = v = torch.zeros(3, 12, 20, dtype=torch.float64)
    for step in range(3):
        grad = torch.randn(3, 12, 20) * 10.0**-step
        m = mu * m + grad
        v = 0.75 * v + 0.25 * grad.double() ** 2
        update = tg.muon_update(grad, buffer, squares, torch.tensor(mu), cfg)
        assert error(squares, v) < 1e-6
        assert error(update, tg.newton_schulz((grad + mu * m) / v.sqrt(), 5)) < 1e-4


@pytest.mark.parametrize(
    ("bank", "factor"),
    [("qo_bank", 1.0), ("kv_bank", 1.0), ("up_bank", math.sqrt(2)), ("down_bank", 1.0)],
)
def test_a_muon_step_decays_then_moves_by_its_rate_in_spectral_norm(bank, factor):
    """The tiny up bank is (64, 32), so sqrt(out / in) = sqrt(2). Other matrices are not tall."""
    cfg, model, optimizers = build(muon_wd=0.5)
    gradients = draw_gradients(model, 0)
    before = weights_of(model)[bank]
    rate = 0.4 * cfg.matrix_lr
    set_gradients(model, gradients)
    optimizers.step(0.4, 0.95)
    momentum = torch.zeros_like(before)
    update = tg.muon_update(gradients[bank], momentum, None, torch.tensor(0.95), cfg)
    wanted = (1 - rate * 0.5) * before.double() - rate * factor * update.double()
    assert error(model.get_parameter(bank).detach() - before, wanted - before) < 1e-5


def test_the_first_update_of_every_wide_or_tall_bank_is_near_orthogonal():
    cfg, model, optimizers = build(muon_wd=0)
    set_gradients(model, draw_gradients(model, 1))
    before = weights_of(model)
    optimizers.step(1.0, 0.95)
    for bank, factor in (("kv_bank", 1), ("up_bank", math.sqrt(2)), ("down_bank", 1)):
        assert_near_orthogonal(
            (before[bank] - model.get_parameter(bank).detach()) / (cfg.matrix_lr * factor)
        )


# --- AdamW, groups, state ---
@pytest.mark.parametrize(
    "name", ["tok_emb", "q_gain", "resid_mix", "skip_gates", "parallel_post_lambdas"]
)
def test_the_rest_follows_adamw_written_out_by_hand(name):
    cfg, model, optimizers = build(grad_clip_norm=0, adam_wd=0.3, embed_wd=0.2)
    lr, wd = (cfg.tied_embed_lr, 0.2) if name == "tok_emb" else (cfg.scalar_lr, 0.3)
    p = model.get_parameter(name).detach().double()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step, scale in enumerate((1.0, 0.5, 0.1), start=1):
        gradients = draw_gradients(model, step, scale=10.0**-step)
        set_gradients(model, gradients)
        optimizers.step(scale, 0.9)
        g = gradients[name].double()
        m, v = cfg.beta1 * m + (1 - cfg.beta1) * g, cfg.beta2 * v + (1 - cfg.beta2) * g**2
        unit = (m / (1 - cfg.beta1**step)) / ((v / (1 - cfg.beta2**step)).sqrt() + cfg.adam_eps)
        p = (1 - lr * scale * wd) * p - lr * scale * unit
        assert error(model.get_parameter(name).detach(), p) < 1e-6


def test_every_parameter_has_exactly_one_owner_and_the_rate_of_its_group():
    """The rate of one group at a time is doubled: just its parameters step twice as far."""
    for group, rate in RATES.items():
        steps = []
        for factor in (1, 2):
            cfg, model, optimizers = build(
                **{DECAYS[group]: 0.0, rate: factor * getattr(tiny_config(), rate)}
            )
            before = weights_of(model)
            set_gradients(model, draw_gradients(model, 0))
            optimizers.step(1.0, 0.9)
            steps.append({name: w - before[name] for name, w in weights_of(model).items()})
        for name, role in tg.parameter_table(cfg).items():
            assert steps[0][name].any(), name
            wanted = (1 + (role.group == group)) * steps[0][name]
            # 1e-4 because steps of fp32 weights near 1 are rounded.
            assert error(steps[1][name], wanted) < 1e-4, (name, group)


def test_small_parameters_are_views_of_one_tensor_and_compiled_loads_stay_aligned():
    cfg, model, optimizers = build(num_layers=5, loop_end=2, xsa_last_n=5)
    offsets = {}
    for name, role in tg.parameter_table(cfg).items():
        p = model.get_parameter(name)
        inside = p.data_ptr() - optimizers.flat_weights.data_ptr()
        assert (0 <= inside < 4 * optimizers.flat_weights.numel()) == (role.group != "muon"), name
        if role.group != "muon":
            offsets[name] = inside
    odd = [name for name, offset in offsets.items() if offset % 16]
    assert set(odd) <= {n for n in offsets if model.get_parameter(n).numel() % 4}
    assert any(model.get_parameter(n).numel() % 4 for n in offsets)


# --- Ranks ---
def test_each_slice_has_one_owner_and_no_rank_has_much_more_than_its_share():
    for slices in range(1, 25):
        for world in range(1, 9):
            banks = {"small": torch.zeros(2 * slices, 2, 2), "large": torch.zeros(slices, 4, 4)}
            shares = tg.assign_matrices(banks, world)
            for name, bank in banks.items():
                assert [i for share in shares for i in range(len(bank))[share[name]]] == [
                    *range(len(bank))
                ]
            loads = [sum(banks[name][s].numel() for name, s in share.items()) for share in shares]
            assert max(loads) - min(loads) <= 16


@pytest.mark.parametrize(("world", "excess"), [(2, 0.0), (4, 0.009), (8, 0.025)])
def test_messages_of_the_record_model_hold_next_to_no_zeros(world, excess):
    table = tg.parameter_table(tg.Config())
    banks = {
        n: torch.zeros(role.shape, device="meta")
        for n, role in table.items()
        if role.group == "muon"
    }
    loads = [
        sum(banks[n][s].numel() for n, s in share.items())
        for share in tg.assign_matrices(banks, world)
    ]
    assert max(loads) * world / sum(loads) - 1 <= excess


def two_clipped_steps(ranks: tg.Ranks, overrides: dict[str, Any]) -> dict[str, Any]:
    """Steps on a fixed gradient of which each rank has a part, the first rank by far the most."""
    cfg = tiny_config(**overrides)
    model = tg.GPT(cfg)
    optimizers = tg.Optimizers(model, cfg, ranks)
    norms = []
    squares = 0.0
    for step in range(2):
        total = draw_gradients(model, step, scale=(5.0, 0.5)[step])
        rest = draw_gradients(model, 9, scale=0.01)
        if ranks.world_size == 2:
            total = rest if ranks.rank else {name: g - rest[name] for name, g in total.items()}
        set_gradients(model, total)
        norms.append(float(optimizers.step(1.0, 0.9)))
        if step == 0:
            # After one step Muon's momentum is the clipped gradient, and AdamW's first moment is
            # 1 - beta1 of it.
            squares = (
                sum(s["exp_avg"].square().sum() for s in optimizers.adam.state.values())
                / (1 - cfg.beta1) ** 2
            )
            mine = sum(m.square().sum() for m in optimizers.muon.momentum.values())
            squares = float(squares + ranks.sum(mine))
    assert all(p.grad is None for p in model.parameters())
    return {"weights": weights_of(model), "norms": norms, "applied": math.sqrt(squares)}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, two_clipped_steps, tmp_path_factory.mktemp("two"), UNEVEN)


def test_two_ranks_step_as_one_does(two_ranks):
    one = on_one(two_clipped_steps, UNEVEN)
    for found in two_ranks:
        assert found["norms"] == pytest.approx(one["norms"], rel=1e-5)
        for name, p in found["weights"].items():
            assert error(p, one["weights"][name]) < 1e-5, name
            assert torch.equal(p, two_ranks[0]["weights"][name]), name


def test_clipping_bounds_the_norm_of_the_reduced_gradient(two_ranks):
    model = tg.GPT(tiny_config(**UNEVEN))
    limit = tiny_config().grad_clip_norm
    flat = torch.cat([g.flatten() for g in draw_gradients(model, 0, scale=5.0).values()])
    for found in (on_one(two_clipped_steps, UNEVEN), *two_ranks):
        assert found["norms"][0] == pytest.approx(float(flat.norm()), rel=1e-5)
        assert found["applied"] == pytest.approx(limit, rel=1e-4)


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_a_gradient_within_the_limit_is_left_alone(limit):
    found = on_one(two_clipped_steps, {**UNEVEN, "grad_clip_norm": limit})
    assert found["applied"] == pytest.approx(found["norms"][0], rel=1e-5)


@pytest.mark.parametrize("on", [False, True])
def test_compile_decides_whether_muon_is_compiled(monkeypatch, on):
    compiled = []
    monkeypatch.setattr(
        tg.torch, "compile", lambda function, **_: compiled.append(function) or function
    )
    build(**UNEVEN, compile=on)
    assert compiled == [tg.muon_step] * on


# --- Schedules ---
@pytest.mark.parametrize(
    ("warmdown", "floor", "values"),
    [
        (
            0.75,
            0.1,
            {
                0: 1,
                0.2499: 1,
                0.25: 1,
                0.625: 0.5,
                0.85: 0.2,
                0.925: 0.1,
                0.99: 0.1,
                1: 0.1,
                1.1: 0.1,
            },
        ),
        (0.72, 0.0, {0.28: 1, 0.64: 0.5, 0.982: 0.025, 1: 0}),
        (1.0, 0.0, {0: 1, 0.25: 0.75, 0.9: 0.1}),
        (0.0, 0.1, {0: 1, 0.5: 1, 0.9999: 1}),
    ],
)
def test_rates_stay_then_fall_linearly_to_their_floor(warmdown, floor, values):
    cfg = tiny_config(warmdown_frac=warmdown, min_lr=floor)
    for frac, factor in values.items():
        assert tg.lr_scale_at(frac, cfg) == pytest.approx(factor, abs=1e-9), frac


def test_momentum_rises_linearly_to_its_final_value():
    cfg = tiny_config(
        muon_momentum_warmup_start=0.92, muon_momentum=0.97, muon_momentum_warmup_steps=1500
    )
    for step, value in {0: 0.92, 300: 0.93, 750: 0.945, 1500: 0.97, 9000: 0.97}.items():
        assert tg.muon_momentum(step, cfg) == pytest.approx(value, abs=1e-12)
    cfg = tiny_config(muon_momentum_warmup_steps=0)
    assert tg.muon_momentum(1, cfg) == pytest.approx(cfg.muon_momentum)
