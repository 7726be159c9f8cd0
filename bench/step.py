"""Speed of a training step and of GPTQ: ours, and a public script's on the same weights, tokens and attention.

    python bench/step.py                     # ours alone: times, noise, operations, memory, MFU
    python bench/step.py --reference FILE    # beside a script of the family of PR #1530 (see bench/reference.py)

Knobs are environment variables, as for train_gpt.py: PRESET=record by default with CUDA, cpu without. A ratio is ours /
reference and holds within this run alone: systems take turns (A B C C B A ..), so drift of the machine cancels. The
last line is `bench ` and a JSON object; null is what was not measured."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from reference import Reference
from torch import Tensor

import train_gpt as tg

PARTS = ["forward + backward", "optimizer", "EMA"]
PUBLIC_MS = 95.8, 140.2  # a step of PR #1530 on 8 H100 before and after looping, from its logs
JOBS = {  # what an operator (CPU) or kernel (GPU) is for, by its name; the first that matches
    "written by the compiler": r"^triton_(?!.*(softmax|tanh))",
    "attention": r"sdpa|scaled_dot|flash|fmha|varlen|attention",
    "fused MLP": r"mlp_kernel|mlp_up|mlp_dpre|linear_leaky_relu|leaky_relu",
    "loss": r"softcap_ce|softmax|nll|cross_entropy|tanh",
    "fused norm, RoPE, XSA": r"qk_rope|xsa_kernel|xsa_backward_kernel|golf::xsa",
    "products": r"::(mm|addmm|bmm|baddbmm|linear|matmul)|gemm|nvjet|cutlass|xmma|wgmma",
    "optimizer": r"adam|lerp|foreach",
    "copies and casts": r"copy|_to\b|clone|contiguous|cat|stack|Memcpy|Memset|fill|zero",
    "reductions": r"sum|mean|norm|amax|reduce",
    "embedding, gather": r"embedding|index|gather|scatter|searchsorted",
    "elementwise": r"::(mul|add|sub|div|rsqrt|pow|square|neg|sigmoid|abs|where|clamp)|elementwise",
    "other": "",
}


# --- What is timed: two systems with the same four methods ---
class Ours:  # the parts of a step as train_gpt.train calls them; one row, as one of eight GPUs has it
    def __init__(self, cfg: tg.Config, weights: dict[str, Tensor], row: tg.Batch, backend: str):
        self.cfg, self.row, self.count = cfg, row, int((row.targets >= 0).sum())
        self.model = tg.GPT(cfg, backend).to(row.inputs.device)
        self.model.load_state_dict(weights)
        self.run = (
            torch.compile(self.model, fullgraph=True, dynamic=False) if cfg.compile else self.model
        )
        self.optimizers = tg.Optimizers(self.model, cfg, tg.Ranks({}))

    def forward(self, looped: bool) -> Tensor:  # mean loss, with its graph
        return self.run(self.row, self.cfg.plans[looped]).sum() / self.count

    def forward_backward(self, looped: bool) -> Tensor:
        return tg.accumulate_gradients(self.run, self.cfg.plans[looped], [self.row], self.count)

    def optimize(self) -> None:  # clears the gradients
        self.optimizers.step(1.0, self.cfg.muon_momentum)

    def average(self) -> None: ...  # in the pass that steps


class Theirs:  # the same by the script's functions, in the order of its training loop
    def __init__(self, reference: Reference, weights: dict[str, Tensor], row: tg.Batch):
        self.reference, self.cfg, self.batch = reference, reference.cfg, reference.batch(row)
        self.model = reference.build(weights, looped=False)
        self.run = (
            torch.compile(self.model, dynamic=False, fullgraph=True)
            if self.cfg.compile
            else self.model
        )
        self.optimizers = reference.module.Optimizers(reference.h, self.model)
        self.ema = {name: t.detach().float().clone() for name, t in self.model.state_dict().items()}

    def forward(self, looped: bool) -> Tensor:
        self.model.looping_active = looped
        with self.reference.autocast():
            return self.run(**self.batch)

    def forward_backward(self, looped: bool) -> Tensor:
        loss = self.forward(looped)
        loss.backward()
        return loss.detach()

    def optimize(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"]
        if self.cfg.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip_norm)
        self.optimizers.step(distributed=False)

    def average(self) -> None:
        with torch.no_grad():
            for name, t in self.model.state_dict().items():
                self.ema[name].mul_(self.cfg.ema_decay).add_(
                    t.detach().float(), alpha=1 - self.cfg.ema_decay
                )


def full_row(cfg: tg.Config, shape: tuple[int, int, int], device: torch.device) -> tg.Batch:
    """A row of random ids without padding, in documents as long as FineWeb's: log-normal, median 474, mean 808."""
    (size, capacity, longest), rng = shape, np.random.default_rng(0)
    ids, ends = (
        rng.integers(0, cfg.vocab_size, size + 1),
        np.cumsum(rng.lognormal(np.log(474), 1.033, size)),
    )
    is_bos = np.zeros(size, dtype=np.int64)
    is_bos[ends[ends < size].astype(int)] = 1
    starts = tg.segment_starts(is_bos, 1, longest)[:capacity]
    if size - starts[-1] > longest:
        raise tg.UsageError(
            f"CU_SEQLENS_CAPACITY={capacity}: a row of {size} tokens needs more segments"
        )
    return tg.pack_row(ids[:-1], ids[1:], starts, shape, device)


@torch.no_grad()
def random_weights(
    cfg: tg.Config, seed: int = 0
) -> dict[str, Tensor]:  # as at the start, but nothing is zero
    weights, rng = tg.GPT(cfg).state_dict(), torch.Generator().manual_seed(seed)
    for w in weights.values():
        spread = float(w.std()) or 1.0
        w.add_(torch.randn(w.shape, generator=rng), alpha=0.1 * min(spread, 1.0))
    return weights


# --- Measuring ---
class Stopwatch:  # seconds between marks: device events on CUDA, the steady clock elsewhere; with OMP_NUM_THREADS=1 the
    def __init__(
        self, device: torch.device
    ):  # process's CPU time, the same on an idle machine and right on a busy one
        self.cuda, self.marks = device.type == "cuda", []
        self.clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(self.clock())

    def read(self) -> list[float]:
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.cuda:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairs]


def take_turns(
    jobs: dict[str, Callable[[], Any]], rounds: int, warmups: int, device: torch.device
) -> dict[str, Any]:
    """name -> seconds (2 * rounds, parts): a job returns after each part by yielding; every round runs them all forth
    and back, so that the n-th entries of two jobs are a pair."""
    seconds: dict[str, list] = {name: [] for name in jobs}
    for number in range(-warmups, rounds):
        for name in [*jobs, *reversed(jobs)]:
            watch = Stopwatch(device)
            watch.mark()
            for _ in jobs[name]():
                watch.mark()
            if number >= 0:
                seconds[name].append(watch.read())
    return {name: np.array(s) for name, s in seconds.items()}


def paired_ratio(
    ours: np.ndarray, theirs: np.ndarray
) -> float:  # median over pairs of (n, parts) seconds
    return float(np.median(ours.sum(1) / theirs.sum(1)))


def step(system: Ours | Theirs, looped: bool) -> Iterable[None]:
    for part in (lambda: system.forward_backward(looped), system.optimize, system.average):
        part()
        yield


def print_times(label: str, seconds: dict[str, np.ndarray], parts: list[str]) -> None:
    print(f"\n{label + ', ms':<34}{'median':>9}{'min':>9}{'10 %':>9}{'90 %':>9}")
    for name, values in seconds.items():
        for part, column in [("", values.sum(1)), *zip(parts, values.T, strict=True)][
            : None if len(parts) > 1 else 1
        ]:
            low, middle, high = np.quantile(column, [0.1, 0.5, 0.9]) * 1000
            print(
                f"{name + ' ' + part:<34}{middle:>9.2f}{column.min() * 1000:>9.2f}{low:>9.2f}{high:>9.2f}"
            )
    for name in [n for n in seconds if n != "ours"]:
        medians = np.median(seconds["ours"].sum(1)) / np.median(seconds[name].sum(1))
        print(
            f"ours / {name}: ratio of medians {medians:.3f}, median of paired ratios "
            f"{paired_ratio(seconds['ours'], seconds[name]):.3f}"
        )


def ceilings(
    device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:  # bytes/s of a copy, FLOP/s of a product
    cuda = device.type == "cuda"
    x, n = (
        torch.empty(8 * 10**9 if cuda else 5 * 10**7, dtype=torch.uint8, device=device),
        8192 if cuda else 768,
    )
    y, a, b = torch.empty_like(x), *(torch.randn(n, n, device=device).to(dtype) for _ in range(2))

    def job() -> Iterable[None]:
        y.copy_(x)
        yield
        a @ b
        yield

    copy, product = take_turns({"": job}, 3, 1, device)[""].min(0)
    return 2 * len(x) / copy, 2 * n**3 / product


# --- Counting ---
def step_flops(cfg: tg.Config, row: tg.Batch, looped: bool) -> tuple[float, float]:
    """FLOPs of forward and backward: of all products with loops, and attention; and 6 x parameters x tokens alone."""
    sizes = {
        name: math.prod(role.shape)
        for name, role in tg.parameter_table(cfg).items()
        if role.packing != "float"
    }
    head, tokens, visits = sizes.pop("tok_emb"), len(row.inputs), len(cfg.plans[looped])
    lengths = row.cu_seqlens.diff().double()
    visible = float((lengths * (lengths + 1) / 2).sum())  # pairs of a query and a key it sees
    attention = (
        (2 + 5) * 2 * cfg.num_heads * cfg.head_dim * visible * visits
    )  # 2 products forward, 5 back
    layers = sum(sizes.values())
    return 6 * tokens * (layers * visits / cfg.num_layers + head) + attention, 6 * tokens * (
        layers + head
    )


def saved_bytes(
    system: Ours | Theirs, looped: bool
) -> int:  # what a forward keeps for its backward, parameters aside
    kept, own = {}, {p.untyped_storage().data_ptr() for p in system.model.parameters()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = system.forward(looped)
    total = sum(kept.values())
    del loss
    return total


def peak_bytes(
    system: Ours | Theirs, looped: bool
) -> int:  # of a step; the other system's weights count too
    torch.cuda.reset_peak_memory_stats()
    for _ in step(system, looped):
        pass
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def busy(intervals: list[tuple[float, float]]) -> float:  # length of the union of (start, end)
    total, until = 0.0, -np.inf
    for start, end in sorted(intervals):
        total, until = total + max(0.0, end - max(start, until)), max(until, end)
    return total


def job_of(name: str) -> str:
    return next(job for job, pattern in JOBS.items() if re.search(pattern, name))


def profile(
    system: Ours | Theirs, looped: bool, device: torch.device
) -> tuple[dict[str, np.ndarray], str]:
    """operator (CPU) or kernel (GPU) -> (ms, calls, GFLOP) of one step; and a line on launches and idle time."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with record(
        activities=activities, with_flops=True, record_shapes=True, acc_events=True
    ) as prof:
        for _ in step(system, looped):
            pass
        if cuda:
            torch.cuda.synchronize()
    table: dict[str, np.ndarray] = {}
    if not cuda:
        for event in prof.key_averages():
            table[event.key] = np.array(
                [event.self_cpu_time_total / 1000, event.count, event.flops / 1e9]
            )
        return table, f"{int(sum(v[1] for v in table.values()))} operator calls"
    kernels = [e for e in prof.events() if e.device_type == DeviceType.CUDA]
    kernels = [e for e in kernels if not getattr(e, "is_user_annotation", False)]  # which span many
    for e in kernels:
        table[e.name] = table.get(e.name, np.zeros(3)) + [e.time_range.elapsed_us() / 1000, 1, 0]
    spans = [(e.time_range.start, e.time_range.end) for e in kernels]
    span = max(end for _, end in spans) - min(start for start, _ in spans)
    return (
        table,
        f"{len(kernels)} kernels, GPU idle {100 * (1 - busy(spans) / span):.1f} % of {span / 1000:.2f} ms",
    )


def print_operations(
    tables: dict[str, dict[str, np.ndarray]], top: int
) -> None:  # by job, then the largest alone
    def summed(table: dict[str, np.ndarray], job: str) -> np.ndarray:
        return sum((value for name, value in table.items() if job_of(name) == job), np.zeros(3))

    jobs = {system: {job: summed(table, job) for job in JOBS} for system, table in tables.items()}
    names = sorted(
        set().union(*tables.values()), key=lambda n: -max(t.get(n, [0])[0] for t in tables.values())
    )
    for rows, source in ((list(JOBS), jobs), (names[:top], tables)):
        print(f"\n{'':<58}" + "".join(f"{s + ' ms':>15}{'calls':>7}{'GFLOP/s':>9}" for s in tables))
        for name in rows:
            cells = [source[s].get(name, np.zeros(3)) for s in tables]
            rates = [f"{1000 * c[2] / c[0]:.0f}" if c[2] and c[0] else "" for c in cells]
            columns = (
                f"{c[0]:>15.2f}{c[1]:>7.0f}{r:>9}" for c, r in zip(cells, rates, strict=True)
            )
            print(f"{name[:57]:<58}" + "".join(columns))


# --- The four measurements ---
def gradients(
    system: Ours | Theirs,
) -> tuple[float, dict[str, Tensor]]:  # loss; name -> gradient, looped
    loss = float(system.forward_backward(looped=True))
    return loss, {
        name: p.grad.float() for name, p in system.model.named_parameters() if p.grad is not None
    }


def gradient_errors(
    cfg: tg.Config, reference: Reference | None, row: tg.Batch, backend: str, seed: int
) -> dict[str, dict[str, float]]:
    """system -> name -> ||gradient - exact|| / ||exact|| in bf16 with random weights; exact is our fp32 run, with which
    the reference's must agree (AssertionError). In the looped plan a row of skip_weights means the same to both."""
    weights, device, errors = random_weights(cfg, seed), row.inputs.device, {}
    bf16, fp32 = (
        dataclasses.replace(cfg, compute_dtype=d, compile=False) for d in ("bf16", "fp32")
    )
    loss, exact = gradients(Ours(fp32, weights, row, "sdpa"))
    runs = {"ours": gradients(Ours(bf16, weights, row, backend))}
    if reference:
        for name, config, attention in (
            ("fp32 reference", fp32, "sdpa"),
            ("reference", bf16, backend),
        ):
            script = Reference(reference.path, config, device, attention)
            found, grads = gradients(Theirs(script, weights, row))
            runs[name] = found, script.stacked(grads, exact)
    for name, (found, grads) in runs.items():
        errors[name] = {n: float((grads[n] - g).norm() / g.norm()) for n, g in exact.items()}
        errors[name]["loss"] = abs(found - loss) / loss
    agree = max(errors.pop("fp32 reference", {"": 0.0}).values())
    assert agree < 1e-3, (
        f"in fp32 the two systems differ by {agree:.1e}: they do not compute the same"
    )
    return errors


def numeric_gate(
    cfg: tg.Config, reference: Reference | None, device: torch.device, backend: str
) -> float | None:
    """Prints the errors of bf16 and returns the largest ratio ours / reference. Root mean squares over sets of weights:
    gradients of a few numbers, as of the lambdas, differ by half from set to set, so a ratio needs many."""
    tokens = min(cfg.micro_batch_tokens, 4096)
    row = full_row(cfg, (tokens, cfg.cu_seqlens_capacity, cfg.train_seq_len), device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    runs = [
        gradient_errors(cfg, reference, row, backend, seed)
        for seed in range(16 if reference else 3)
    ]
    torch.set_float32_matmul_precision(precision)
    errors = {
        s: {n: sum(run[s][n] ** 2 / len(runs) for run in runs) ** 0.5 for n in runs[0][s]}
        for s in runs[0]
    }
    print(f"\n{'relative error in bf16':<34}" + "".join(f"{s:>12}" for s in errors))
    for name in errors["ours"]:
        print(f"{name:<34}" + "".join(f"{e[name]:>12.1e}" for e in errors.values()))
    if not reference:
        return None
    print("fp32: the gradients of both agree")
    return max(errors["ours"][n] / e for n, e in errors["reference"].items())


def training_steps(
    systems: dict[str, Ours | Theirs], looped: bool, rounds: int, warmups: int
) -> tuple:
    """Times, operations and memory of a step; returns ours / reference (None without), the noise, our seconds."""
    device = systems["ours"].row.inputs.device
    takes = {**systems, "ours again": systems["ours"]}
    jobs = {name: (lambda s=s: step(s, looped)) for name, s in takes.items()}
    seconds = take_turns(jobs, rounds, warmups, device)
    print_times("step, looped" if looped else "step, not looped", seconds, PARTS)

    def forward(system: Ours | Theirs) -> Iterable[None]:
        system.forward(looped)
        yield

    jobs = {name: (lambda s=s: forward(s)) for name, s in systems.items()}
    print_times("forward alone", take_turns(jobs, max(1, rounds // 3), 1, device), [""])
    what, measure = (
        ("peak memory", peak_bytes) if device.type == "cuda" else ("kept for backward", saved_bytes)
    )
    print(
        f"{what}, MB: "
        + ", ".join(f"{name} {measure(s, looped) / 1e6:.0f}" for name, s in systems.items())
    )
    profiles = {name: profile(s, looped, device) for name, s in systems.items()}
    print("\n".join(f"{name}: {line}" for name, (_, line) in profiles.items()))
    print_operations({name: table for name, (table, _) in profiles.items()}, top=20)
    ratio = paired_ratio(seconds["ours"], seconds["reference"]) if "reference" in systems else None
    return (
        ratio,
        paired_ratio(seconds["ours"], seconds["ours again"]),
        float(np.median(seconds["ours"].sum(1))),
    )


def gptq(reference: Reference | None, layers: int, device: torch.device) -> float | None:
    """Seconds to solve the matrices of the record model from given Hessians: ours, and the script's one by one."""
    cfg = tg.Config(num_layers=layers, xsa_last_n=layers, num_loops=0, parallel_start_layer=0)
    table, rng = tg.parameter_table(cfg), torch.Generator().manual_seed(0)

    def hessian(size: int, scale: float) -> Tensor:  # of correlated inputs of unequal sizes
        x = torch.randn(size, size, generator=rng) * torch.rand(size, generator=rng) * scale
        return (x.T @ x / size).add_(torch.eye(size), alpha=1e-2)

    listed = tg.quantised_matrices(cfg)
    widths = {m[2]: table[m[0]].shape[-1] for m in listed}
    base = {site: hessian(width, 1.0) for site, width in widths.items()}
    hessians = {m[2:]: base[m[2]] * (1 + m[3]) for m in listed}
    model = torch.nn.Module()
    model.cfg = cfg
    for name in {m[0] for m in listed}:
        model.register_parameter(
            name, torch.nn.Parameter(0.02 * torch.randn(table[name].shape, generator=rng))
        )
    ranks, solved = tg.Ranks({}), {}
    moved = {key: h.to(device) for key, h in hessians.items()}
    model.to(device)

    def ours() -> Iterable[None]:
        solver = tg.Quantizer(model, moved, None, ranks)
        solved["ours"] = solver.solve(solver.default_theta)
        yield

    def theirs() -> Iterable[None]:  # on the CPU, as published
        solve, values = (
            reference.module.gptq_quantize_weight,
            {n: p.cpu() for n, p in model.state_dict().items()},
        )
        solved["reference"] = {}
        for bank, index, site, layer in listed:
            kind, weight = (
                table[bank].packing,
                values[bank].view(-1, *table[bank].shape[-2:])[index],
            )
            sigmas, bits = getattr(cfg, f"{kind}_clip_sigmas"), getattr(cfg, f"{kind}_bits")
            solved["reference"][bank, index] = solve(
                weight, hessians[site, layer], sigmas, 2 ** (bits - 1) - 1
            )
        yield

    jobs = {"ours": ours} | ({"reference": theirs} if reference else {})
    seconds = take_turns(jobs, 1, 0, device)
    print_times(f"GPTQ of {len(listed)} matrices", seconds, [""])
    if not reference:
        return None
    same = [
        float((solved["ours"][b][0].view(-1, *q.shape)[i] == q).float().mean())
        for (b, i), (q, _) in solved["reference"].items()
    ]
    print(
        f"equal integers: {100 * np.mean(same):.2f} % on average, {100 * min(same):.2f} % in the worst matrix"
    )
    return paired_ratio(seconds["ours"], seconds["reference"])


def report_speed(
    cfg: tg.Config, row: tg.Batch, times: dict[bool, tuple], peak: float, source: str
) -> float:
    """Prints FLOP shares and the projection for 8 GPUs; returns the MFU of the looped step."""
    print(
        f"\nMFU of {peak / 1e12:.2f} TFLOP/s ({source}), with loops and attention; and 6 x parameters x tokens alone"
    )
    mfu = 0.0
    for looped, (_, _, seconds) in times.items():
        mfu, plain = (f / seconds / peak for f in step_flops(cfg, row, looped))
        print(
            f"{'looped' if looped else 'not looped':<12}{100 * mfu:>6.1f} %{100 * plain:>7.1f} %"
            f"{len(row.inputs) / seconds:>12.0f} tokens/s"
        )
    if row.inputs.is_cuda and len(times) == 2 and times[True][0]:
        share = cfg.enable_looping_at

        def count(ratios: tuple[float, float]) -> float:
            return 587e3 * sum(
                s / (r * ms) for s, r, ms in zip((share, 1 - share), ratios, PUBLIC_MS, strict=True)
            )

        print(
            f"estimate for 8 H100 from the ratios of one GPU: {count((times[False][0], times[True][0])):.0f} steps "
            f"in 587 s, the reference {count((1.0, 1.0)):.0f}"
        )
    return mfu


def prepare(path: Path | None) -> tuple[tg.Config, tg.Batch, str, Reference | None]:
    """Config, row, attention backend and the script, each checked (UsageError); prints what the figures depend on."""
    cfg, _ = tg.Config.from_env(os.environ, torch.cuda.is_available())
    device = tg.Ranks({}).device
    tg.configure_torch(cfg)
    backend, lines = tg.choose_attention(cfg.attention_backend, device, cfg.dtype)
    reference, row = (
        Reference(path, cfg, device, backend) if path else None,
        full_row(cfg, cfg.row_shape, device),
    )
    versions = f"torch:{torch.__version__} triton:{tg.triton.__version__ if tg.triton else 'none'}"
    print(
        f"device:{device_name(device)} {versions} dtype:{cfg.compute_dtype} compile:{cfg.compile}",
        *lines,
        sep="\n",
    )
    print(
        f"preset:{cfg.preset} layers:{cfg.num_layers} width:{cfg.model_dim} vocabulary:{cfg.vocab_size} row: "
        f"{len(row.inputs)} tokens, {int((row.cu_seqlens.diff() > 0).sum())} segments"
    )
    return cfg, row, backend, reference


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, help="the public script")
    parser.add_argument(
        "--rounds", type=int, help="each runs every system twice; default 15 on CUDA, 5 on a CPU"
    )
    parser.add_argument(
        "--gptq-layers", type=int, help="0: no GPTQ; default 11 with --reference, 2 without"
    )
    args = parser.parse_args(argv)
    try:
        cfg, row, backend, reference = prepare(args.reference)
    except tg.UsageError as error:
        print(f"bench/step.py: {error}", file=sys.stderr)
        return 2
    device, cuda = row.inputs.device, row.inputs.is_cuda
    copy, product = ceilings(device, cfg.dtype)
    print(
        f"ceilings: copy {copy / 1e9:.1f} GB/s, {cfg.compute_dtype} product {product / 1e12:.2f} TFLOP/s"
    )
    errors, weights = numeric_gate(cfg, reference, device, backend), random_weights(cfg)
    systems: dict[str, Ours | Theirs] = {"ours": Ours(cfg, weights, row, backend)}
    if reference:
        systems["reference"] = Theirs(reference, weights, row)
    rounds, warmups = args.rounds or (15 if cuda else 5), 5 if cuda else 1
    depths = (False, True) if cfg.num_loops else (False,)
    times = {looped: training_steps(systems, looped, rounds, warmups) for looped in depths}
    del systems
    known = next(
        (flops for gpu, flops in tg.PEAK_FLOPS.items() if gpu in device_name(device)), None
    )
    mfu = report_speed(
        cfg, row, times, known or product, "data sheet" if known else "product measured above"
    )
    layers = (11 if reference else 2) if args.gptq_layers is None else args.gptq_layers
    solve = gptq(reference, layers, device) if layers else None
    noise = max(
        (t[1] for t in times.values()), key=lambda r: abs(np.log(r))
    )  # the worse of the two
    found = {
        "device": device_name(device),
        "backend": backend,
        "ratio_plain": times[False][0],
        "ratio_looped": times[True][0] if cfg.num_loops else None,
        "ratio_gptq": solve,
        "noise_ratio": noise,
        "grad_error_ratio": errors,
        "mfu": mfu,
    }
    print(
        "bench "
        + json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
