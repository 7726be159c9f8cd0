"""Does a public script compute the same? Ours and the script with equal random weights, in fp32.

    PRESET=pr1855 python bench/agreement.py --reference FILE

FILE is a script of the family of PR #1530 (see bench/reference.py), unpacked; by default the tests'
stand-in for one. The network is that of the preset at CPU size (SHRINK=1). Gates, lambdas and all
other weights are drawn at random. Compared are, without and with loops:

- nats of every token, loss, logits and the gradients of all parameters, in training;
- nats and the gradients of the adapters in adaptation, with B at zero and at random;

and, where the script has them, the number of parameters at full size, and the factor of the rates,
the momentum and the longest segment at twenty points of the clock. A relative error is the norm of
the difference over the norm of the script's value. Exit status 1 if one is above 1e-5. The last
line is `agreement ` and a JSON object.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from reference import SCRIPTS_OWN, Reference
from torch import Tensor, nn

import train_gpt as tg

STAND_IN = Path(__file__).resolve().parents[1] / "tests" / "fake_reference.py"
LIMIT = 1e-5
POINTS = 20
# A plain plan has fewer skips than the tables have rows, so some rows have no gradient in either.
ROWS_OF_SKIPS = ("skip_weights", "skip_gates")

Errors = dict[str, float]


def error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||, the norm of the difference if `wanted` is zero."""
    found = found.detach().double()
    wanted = wanted.detach().double()
    return float((found - wanted).norm()) / (float(wanted.norm()) or 1.0)


def random_network(cfg: tg.Config, seed: int = 0) -> tg.GPT:
    """Our network with all weights at random, far from their initial values."""
    model = tg.GPT(cfg)
    rng = torch.Generator().manual_seed(seed)
    for name, role in tg.parameter_table(cfg).items():
        noise = torch.randn(role.shape, generator=rng)
        if role.group == "muon":
            noise *= role.shape[-1] ** -0.5
        elif name == "tok_emb":
            noise *= 0.5
        else:
            noise = model.get_parameter(name).detach() + 0.3 * noise
        model.get_parameter(name).data = noise
    return model


def random_row(cfg: tg.Config, lengths: list[int], seed: int = 0) -> tg.Batch:
    """A row of random documents of these lengths, each with BOS first, without padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(tg.BOS_ID + 1, cfg.vocab_size, sum(lengths) + 1)
    starts = np.cumsum([0, *lengths[:-1]])
    ids[starts] = tg.BOS_ID
    shape = tg.RowShape(sum(lengths), len(lengths), max(lengths))
    return tg.pack_row(ids[:-1], ids[1:], starts, shape, torch.device("cpu"))


# --- The two networks -----------------------------------------------------------------------------
def by_position(value: Tensor, plan: tuple[tg.Visit, ...], merge: Callable) -> Tensor:
    """Rows of a table of skips in the order in which the plan takes them, the rest as they are.

    In the script a row belongs to a position of the plan, in ours to a pair of layers. So where a
    skip of ours has several rows, the script's row is `merge` of them.
    """
    rows = [visit.skip for visit in plan if visit.skip]
    moved = value.detach().clone()
    for position, skip in enumerate(rows):
        moved[position] = merge(value[list(skip)], 0)
    return moved


def names_of_script(weights: Mapping[str, Tensor], plan: tuple, merge: Callable) -> dict:
    """The tensors with tables of skips ordered as the script's."""
    return {
        name: by_position(value, plan, merge) if name in ROWS_OF_SKIPS else value
        for name, value in weights.items()
    }


def used_rows(value: Tensor, plan: tuple[tg.Visit, ...]) -> Tensor:
    """The rows of a table of skips that the plan takes."""
    return value[: sum(bool(visit.skip) for visit in plan)]


def build_theirs(reference: Reference, model: tg.GPT, looped: bool) -> nn.Module:
    """The script's network with the weights of ours."""
    plan = model.cfg.plans[looped]
    weights = names_of_script(model.state_dict(), plan, torch.mean)
    return reference.build(weights, looped)


def compare_training(reference: Reference, model: tg.GPT, row: tg.Batch, looped: bool) -> Errors:
    """Errors of logits, nats, loss and every gradient of a training row."""
    cfg = model.cfg
    plan = cfg.plans[looped]
    hidden = {}
    model.zero_grad()
    nats = model(row, plan, tap=lambda site, layer, x: hidden.update({site: x.detach()}))
    nats.mean().backward()

    theirs = build_theirs(reference, model, looped)
    batch = reference.batch(row)
    loss = theirs(**batch)
    loss.backward()
    errors = {"loss": error(nats.mean(), loss)}
    if hasattr(theirs, "forward_logits"):
        targets = batch.pop("target_ids")[0]
        with torch.no_grad():
            logits = theirs.forward_logits(**batch)[0]
            ours = hidden["head_in"] @ model.tok_emb.T
            ours = cfg.logit_softcap * torch.tanh(ours / cfg.logit_softcap)
        errors["logits"] = error(ours, logits)
        errors["nats"] = error(nats, F.cross_entropy(logits, targets, reduction="none"))

    grads = {}
    for name, parameter in theirs.named_parameters():
        grads[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    wanted = reference.stacked(grads, own)
    # The script's row is a mean of ours, so each of ours has a share of its gradient.
    own = names_of_script(own, plan, torch.sum)
    for name, grad in own.items():
        if name in ROWS_OF_SKIPS:
            errors[name] = error(used_rows(grad, plan), used_rows(wanted[name], plan))
        else:
            errors[name] = error(grad, wanted[name])
    return errors


def their_adapters(reference: Reference, theirs: nn.Module, lora: tg.LoRA) -> nn.Module:
    """The script's adapters with the values of ours."""
    cfg = reference.cfg
    kinds = dict(k_lora=cfg.ttt_k_lora, mlp_lora=cfg.ttt_mlp_lora, o_lora=cfg.ttt_o_lora)
    code = reference.module.BatchedTTTLoRA.__init__.__code__
    if "q_lora" in code.co_varnames:  # PR #2014
        kinds |= dict(q_lora=cfg.ttt_q_lora, v_lora=cfg.ttt_v_lora)
    adapters = reference.module.BatchedTTTLoRA(len(lora.down), theirs, cfg.ttt_lora_rank, **kinds)
    for place, a, b in zip(places(adapters, lora), *split(lora.leaves, lora), strict=True):
        place.A.data = a.detach().clone()
        place.B.data = b.detach().clone()
    return adapters


def places(adapters: nn.Module, lora: tg.LoRA) -> list[nn.Module]:
    """The script's adapter of each of our sites."""
    found = []
    for site in lora.sites:
        if site.site == "head":
            found.append(adapters.lm_head_lora)
        else:
            found.append(getattr(adapters, f"{site.site}_loras")[site.slot])
    return found


def split(leaves: list[Tensor], lora: tg.LoRA) -> tuple[list[Tensor], list[Tensor]]:
    """A (documents, rank, C) and B (documents, width, rank) of each site, from two leaves."""
    down, up = leaves
    return list(down.unbind(1)), list(up.split([site.width for site in lora.sites], 1))


def compare_adaptation(reference: Reference, model: tg.GPT, looped: bool, b_std: float) -> Errors:
    """Errors of nats, and of the adapters' gradients by site, of documents of equal length."""
    cfg = model.cfg
    plan = cfg.plans[looped]
    documents, length = 3, 24
    row = random_row(cfg, [length] * documents, seed=1)
    lora = tg.LoRA.zeros(cfg, documents, len(plan), row.inputs.device)
    lora.reset(cfg.seed, range(documents))
    with torch.no_grad():
        lora.up.normal_(std=b_std, generator=torch.Generator().manual_seed(2))
    nats = model(row, plan, lora=lora)
    weight = torch.rand(len(nats), generator=torch.Generator().manual_seed(3))
    own = split(list(torch.autograd.grad((nats * weight).sum(), lora.leaves)), lora)

    theirs = build_theirs(reference, model, looped).eval()
    adapters = their_adapters(reference, theirs, lora)
    shape = documents, length
    wanted = theirs.forward_ttt(row.inputs.view(shape), row.targets.view(shape), lora=adapters)
    (wanted.flatten() * weight).sum().backward()
    errors = {"nats": error(nats, wanted.flatten())}
    for letter, of_site in zip("AB", own, strict=True):
        by_name: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for site, grad, place in zip(lora.sites, of_site, places(adapters, lora), strict=True):
            pair = grad.flatten(), getattr(place, letter).grad.flatten()
            by_name.setdefault(f"{site.site} {letter}", []).append(pair)
        for name, pairs in by_name.items():
            found, exact = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            errors[name] = error(found, exact)
    return errors


# --- Schedules ------------------------------------------------------------------------------------
def inner_function(reference: Reference, outer: str, name: str, **closed: Any) -> Callable | None:
    """A function that the script defines within another one, made alone; None if there is none.

    closed: the names of the outer function that it reads.
    """
    tree = ast.parse(reference.path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == outer:
            for inner in ast.walk(node):
                if isinstance(inner, ast.FunctionDef) and inner.name == name:
                    return run_alone(reference, [inner], closed)[name]
    return None


def run_alone(reference: Reference, nodes: list[ast.stmt], names: Mapping[str, Any]) -> dict:
    """The names after running some statements of the script with these names."""
    space = {**vars(reference.module), **names}
    exec(compile(ast.Module(nodes, []), str(reference.path), "exec"), space)
    return space


def momentum_of_script(reference: Reference, step: int) -> float | None:
    """Muon's momentum in a step of the script's training; None if it has no such statement."""
    tree = ast.parse(reference.path.read_text(encoding="utf-8"))
    group = {"momentum": reference.cfg.muon_momentum}
    muon = types.SimpleNamespace(param_groups=[group])
    names = {
        "h": reference.h,
        "step": step,
        "optimizers": types.SimpleNamespace(optimizer_muon=muon),
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "muon_momentum_warmup_steps" in ast.unparse(node.test):
            run_alone(reference, [node], names)
            return group["momentum"]
    return None


def compare_schedules(reference: Reference) -> Errors:
    """Largest differences over twenty points of the clock, of what the script defines."""
    cfg, module = reference.cfg, reference.module
    lr_mul = inner_function(
        reference, "train_model", "lr_mul", h=reference.h, max_wallclock_ms=600e3
    )
    plan_of = getattr(module, "parse_train_seq_schedule", None)
    differences: dict[str, list[float]] = {}
    for point in range(POINTS):
        # Not at a change itself, where the scripts' comparisons differ by the sign of equality.
        frac = (point + 0.5) / POINTS
        step = 100 * point
        if lr_mul:
            known = {"frac": frac, "step": step, "elapsed_ms": 600e3 * frac}
            arguments = lr_mul.__code__.co_varnames[: lr_mul.__code__.co_argcount]
            theirs = lr_mul(*(known[name] for name in arguments))
            ours = tg.lr_scale_at(frac, cfg, step)
            differences.setdefault("rates", []).append(abs(ours / theirs - 1))
        momentum = momentum_of_script(reference, step)
        if momentum is not None:
            ours = tg.muon_momentum(step, cfg)
            differences.setdefault("momentum", []).append(abs(ours / momentum - 1))
        if plan_of:
            theirs = length_of_script(reference, frac)
            differences.setdefault("context", []).append(abs(cfg.longest_segment(frac) - theirs))
    return {name: max(values) for name, values in differences.items()}


def length_of_script(reference: Reference, frac: float) -> int:
    """The script's longest segment at a share of the clock, from our SEQ_LEN_SCHEDULE.

    The script names the end of each stage, ours its beginning.
    """
    stages = reference.cfg.seq_len_stages
    ends = [share for share, _ in stages[1:]] + [1.0]
    text = ",".join(f"{length}@{end}" for (_, length), end in zip(stages, ends, strict=True))
    module = reference.module
    length, _ = module.current_train_seq_len(
        module.parse_train_seq_schedule(text, reference.cfg.train_seq_len),
        step=0,
        iterations=1,
        elapsed_ms=600e3 * frac,
        max_wallclock_ms=600e3,
        schedule_mode="wallclock",
    )
    return length


def parameter_counts(path: Path, cfg: tg.Config) -> tuple[int, int]:
    """Parameters of ours and of the script, at full size."""
    ours = sum(p.numel() for p in tg.GPT(cfg).parameters())
    reference = Reference(path, cfg, torch.device("cpu"), "sdpa")
    theirs = reference.module.GPT(reference.h)
    return ours, sum(p.numel() for p in theirs.parameters())


# --- The run --------------------------------------------------------------------------------------
def compare(reference: Reference) -> dict[str, Errors]:
    """All errors, by what was compared."""
    cfg = reference.cfg
    model = random_network(cfg)
    row = random_row(cfg, [1, 30, 7, 64, 2, 24])
    errors = {}
    for looped in (False, True):
        plan = "looped" if looped else "plain"
        errors[f"training {plan}"] = compare_training(reference, model, row, looped)
        if getattr(reference.module, "BatchedTTTLoRA", None) is not None:
            for b_std, form in ((0.0, "zero"), (0.1, "random")):
                found = compare_adaptation(reference, model, looped, b_std)
                errors[f"adaptation {plan}, {form} B"] = found
    errors["schedules"] = compare_schedules(reference)
    return errors


def print_errors(errors: Mapping[str, Errors]) -> None:
    """A line for each comparison: the largest error and its name, then all of them."""
    for part, of_part in errors.items():
        if of_part:
            worst = max(of_part, key=of_part.get)
            print(f"{part}: at most {of_part[worst]:.1e} ({worst})")
            print("    " + ", ".join(f"{name} {value:.1e}" for name, value in of_part.items()))


def main(argv: list[str]) -> int:
    """Prints the errors. Exit status 2 if the environment or the script cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, default=STAND_IN, help="the public script")
    parser.add_argument("--full-size", action="store_true", help="count all parameters as well")
    args = parser.parse_args(argv)
    small = {"SHRINK": "1", **os.environ, "COMPUTE_DTYPE": "fp32", "COMPILE": "0"}
    try:
        cfg, _ = tg.Config.from_env(small, has_cuda=False)
        cfg = dataclasses.replace(cfg, tied_embed_init_std=0.5)
        reference = Reference(args.reference, cfg, torch.device("cpu"), "sdpa")
    except tg.UsageError as problem:
        print(f"bench/agreement.py: {problem}", file=sys.stderr)
        return 2
    with mock.patch.dict(os.environ, SCRIPTS_OWN):
        errors = compare(reference)
    print_errors(errors)
    worst = max(max(of_part.values()) for of_part in errors.values() if of_part)
    figures: dict[str, Any] = {"reference": str(args.reference), "worst": worst}
    agree = worst <= LIMIT
    if args.full_size:
        full, _ = tg.Config.from_env({**small, "SHRINK": "0"}, has_cuda=False)
        ours, theirs = parameter_counts(args.reference, full)
        figures |= {"parameters": ours, "parameters_of_reference": theirs}
        agree = agree and ours == theirs
    print("agreement " + json.dumps(figures))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
