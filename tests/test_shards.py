"""The sharded optimiser against a plain one written out here, on one rank and several."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import on_ranks, tiny_config
from test_optim import UNEVEN, draw_gradients, error, on_one, set_gradients, weights_of
from torch import Tensor

import train_gpt as tg

STEPS = 10


def schedule(step: int) -> tuple[float, float]:
    """Rate factor and momentum of a step. Both change from step to step."""
    return 1.0 - step / (2 * STEPS), 0.85 + 0.1 * step / STEPS


def plain(cfg: tg.Config) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and their average after STEPS steps, in fp64 but for Newton-Schulz in fp32.

    Each parameter is stepped by itself.
    """
    model = tg.GPT(cfg)
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    average = {n: w.clone() for n, w in weights.items()}
    table = tg.parameter_table(cfg)
    momentum = {n: torch.zeros_like(w) for n, w in weights.items()}
    square = {n: torch.zeros_like(w) for n, w in weights.items()}
    for step in range(STEPS):
        scale, mu = schedule(step)
        gradients = draw_gradients(model, step, scale=0.01)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        clip = min(1.0, cfg.grad_clip_norm / (norm + 1e-6))
        for n, w in weights.items():
            g = gradients[n].double() * clip
            group = table[n].group
            if group == "muon":
                momentum[n] = mu * momentum[n] + g
                u = g + mu * momentum[n]
                u = tg.newton_schulz(
                    (u / u.norm(dim=-1, keepdim=True)).float(), cfg.muon_backend_steps
                ).double()
                lr = scale * cfg.matrix_lr
                w.mul_(1 - lr * cfg.muon_wd).sub_(lr * math.sqrt(max(1, w.size(1) / w.size(2))) * u)
            else:
                lr, wd = cfg.scalar_lr, cfg.adam_wd
                if group == "embed":
                    lr, wd = cfg.tied_embed_lr, cfg.embed_wd
                momentum[n] = cfg.beta1 * momentum[n] + (1 - cfg.beta1) * g
                square[n] = cfg.beta2 * square[n] + (1 - cfg.beta2) * g**2
                m = momentum[n] / (1 - cfg.beta1 ** (step + 1))
                v = square[n] / (1 - cfg.beta2 ** (step + 1))
                w.mul_(1 - lr * scale * wd).sub_(lr * scale * m / (v.sqrt() + cfg.adam_eps))
            average[n] = cfg.ema_decay * average[n] + (1 - cfg.ema_decay) * w
    return weights, average


# Muon has one more state with it.
SQUARES = dict(muon_square_decay=0.9)


def stepped(
    ranks: tg.Ranks, overrides: dict[str, Any], first: int = 0, last: int = STEPS, state: Any = None
) -> dict:
    """Steps on gradients of which each rank has a part. If given, `state` is loaded first."""
    cfg = tiny_config(**overrides)
    model = tg.GPT(cfg)
    optimizers = tg.Optimizers(model, cfg, ranks)
    if state:
        optimizers.load_state_dict(deepcopy(state))
    for step in range(first, last):
        total = draw_gradients(model, step, scale=0.01)
        W = ranks.world_size
        parts = [draw_gradients(model, 1000 + r, scale=0.003) for r in range(W - 1)]
        parts.append({n: g - sum(part[n] for part in parts) for n, g in total.items()})
        set_gradients(model, parts[ranks.rank])
        optimizers.step(*schedule(step))
    visible = {n: w.to(cfg.dtype) for n, w in weights_of(model).items()}
    return deepcopy(
        {
            "state": optimizers.state_dict(),
            "average": optimizers.averages(newest_share=1 - cfg.ema_decay),
            "before": optimizers.averages(),
            "model": weights_of(model),
            "visible": visible,
        }
    )


def halves(ranks: tg.Ranks, overrides: dict[str, Any]) -> dict[str, Any]:
    """A run without a break, and one in which new optimisers go on from its middle."""
    middle = stepped(ranks, overrides, 0, 4)
    return {
        "straight": stepped(ranks, overrides, 0, 7),
        "resumed": stepped(ranks, overrides, 4, 7, middle["state"]),
    }


def both(ranks: tg.Ranks, overrides: dict[str, Any]) -> dict[str, Any]:
    rounded = stepped(ranks, {**overrides, "compute_dtype": "bf16"}, last=3)
    return {
        "long": stepped(ranks, overrides),
        "halves": halves(ranks, overrides | SQUARES),
        "bf16": rounded,
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return on_one(both, UNEVEN)


@pytest.fixture(scope="module", params=[2, 4])
def together(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    return on_ranks(request.param, both, tmp_path_factory.mktemp("shards"), UNEVEN)


def leaves(state: Any, name: str = "") -> dict[str, Any]:
    """Every value of nested dicts and lists, by its path."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in items for k, v in leaves(value, f"{name}/{key}").items()}
    return {name: state}


def assert_equal(found: Any, wanted: Any) -> None:
    found, wanted = leaves(found), leaves(wanted)
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        assert torch.equal(x, wanted[name]) if isinstance(x, Tensor) else x == wanted[name], name


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        assert x.dtype == torch.float32
        assert error(x, wanted[name]) < tolerance, (name, error(x, wanted[name]))


def test_many_steps_are_those_of_a_plain_optimizer(alone):
    weights, average = plain(tiny_config(**UNEVEN))
    assert_near(alone["long"]["model"], weights, 2e-6)
    assert_near(alone["long"]["average"], average, 2e-6)


def test_any_number_of_ranks_steps_as_one_does(alone, together):
    for found in together:
        for key in ("model", "average", "before"):
            assert_near(found["long"][key], alone["long"][key], 1e-5)
        assert_equal(found["long"], together[0]["long"])


def test_state_is_whole_and_does_not_depend_on_the_number_of_ranks(alone, together):
    one = leaves(alone["long"]["state"])
    for found in together:
        state = leaves(found["long"]["state"])
        assert state.keys() == one.keys()
        for name, x in state.items():
            if isinstance(x, Tensor):
                assert x.shape == one[name].shape, name
                assert error(x, one[name]) < 1e-5, name


def test_a_state_loaded_in_the_middle_goes_on_bit_for_bit(alone, together):
    for found in [alone, *together]:
        assert_equal(found["halves"]["resumed"], found["halves"]["straight"])
        for key in ("momentum", "squares"):
            assert all(m.any() for m in found["halves"]["straight"]["state"][key].values())


def test_a_state_of_several_ranks_goes_on_alone(together):
    """The gradients of several ranks are sums, so no step is compared, only what is loaded."""
    end = together[0]["halves"]["straight"]
    resumed = on_one(stepped, UNEVEN | SQUARES, 7, 7, end["state"])
    assert_equal(resumed["state"], end["state"])
    assert_equal(resumed["average"], end["average"])


def test_in_bf16_ranks_see_equal_weights_and_their_owners_keep_exact_ones(together):
    for found in together:
        assert_equal(found["bf16"]["visible"], together[0]["bf16"]["visible"])
        assert_equal(found["bf16"]["state"], together[0]["bf16"]["state"])
        assert_equal(found["bf16"]["average"], together[0]["bf16"]["average"])
    exact = together[0]["bf16"]["state"]["weights"]
    banks = [
        n for n, role in tg.parameter_table(tiny_config(**UNEVEN)).items() if role.group == "muon"
    ]
    assert all(not torch.equal(exact[n], exact[n].bfloat16().float()) for n in banks)
    for name in banks:
        # A rank holds the slices of others rounded, and each slice is exact on one rank.
        views = torch.stack([found["bf16"]["model"][name] for found in together])
        assert ((views == exact[name]) | (views == exact[name].bfloat16().float())).all()
        assert (views == exact[name]).flatten(2).all(-1).any(0).all()
        assert not torch.equal(views[0], views[1])


def test_the_average_lags_a_step_so_that_a_bad_one_never_enters_it():
    """A step on NaN spoils all weights, but leaves the average of the steps before as it was."""
    cfg = tiny_config(**UNEVEN, ema_decay=0.5)
    model = tg.GPT(cfg)
    optimizers = on_one(lambda ranks: tg.Optimizers(model, cfg, ranks))
    for step in range(4):
        wanted = deepcopy(optimizers.averages(newest_share=0.5))
        set_gradients(model, draw_gradients(model, step, scale=math.nan if step == 3 else 1.0))
        optimizers.step(1.0, 0.9)
        assert_equal(optimizers.averages(), wanted)
    assert not any(p.isfinite().any() for p in model.parameters())
    assert all(w.isfinite().all() for w in wanted.values())
