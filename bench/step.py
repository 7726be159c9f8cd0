"""Speed of a training step and of GPTQ: ours, and a public script's on the same weights and tokens.

    python bench/step.py                     # ours alone: times, noise, operations, memory, MFU
    python bench/step.py --reference FILE    # beside a script of the family of PR #1530

bench/reference.py says which scripts these are. Both systems use the same attention function. Knobs
are environment variables, as for train_gpt.py: PRESET=record by default with CUDA, cpu without. A
ratio is ours / reference and holds within this run alone: systems take turns (A B C C B A ..), so
that a drift of the machine cancels. The last line is `bench ` and a JSON object; null is what was
not measured.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from reference import Reference
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record_events

import train_gpt as tg

PARTS = ["forward + backward", "optimizer", "EMA"]
# A step of PR #1530 on 8 H100 before and after looping begins, and its training time: its logs.
PUBLIC_PLAIN_MS = 95.8
PUBLIC_LOOPED_MS = 140.2
PUBLIC_TRAINING_MS = 587e3
# The purpose of an operator (CPU) or kernel (GPU), told by its name. The first that matches counts.
JOBS = {
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


# --- What is timed: two systems with the same four methods ----------------------------------------
class Ours:
    """The parts of a step as train_gpt.train calls them, on the row of one GPU in eight."""

    def __init__(self, cfg: tg.Config, weights: dict[str, Tensor], row: tg.Batch, backend: str):
        """Builds the model with these weights, and its optimisers."""
        self.cfg = cfg
        self.row = row
        self.num_targets = int((row.targets >= 0).sum())
        self.model = tg.GPT(cfg, backend).to(row.inputs.device)
        self.model.load_state_dict(weights)
        self.run = self.model
        if cfg.compile:
            self.run = torch.compile(self.model, fullgraph=True, dynamic=False)
        self.optimizers = tg.Optimizers(self.model, cfg, tg.Ranks({}))

    def forward(self, looped: bool) -> Tensor:
        """The mean loss, with its graph."""
        return self.run(self.row, self.cfg.plans[looped]).sum() / self.num_targets

    def forward_backward(self, looped: bool) -> Tensor:
        """Adds to the gradients; returns the mean loss, detached."""
        plan = self.cfg.plans[looped]
        return tg.accumulate_gradients(self.run, plan, [self.row], self.num_targets)

    def optimize(self) -> None:
        """Updates the weights and clears the gradients."""
        self.optimizers.step(1.0, self.cfg.muon_momentum)

    def average(self) -> None:
        """Does nothing: the pass that updates the weights averages them too."""


class Theirs:
    """The same by the script's functions, in the order of its training loop."""

    def __init__(self, reference: Reference, weights: dict[str, Tensor], row: tg.Batch):
        """Builds the script's model with our weights, and its optimisers."""
        self.reference = reference
        self.cfg = reference.cfg
        self.batch = reference.batch(row)
        self.model = reference.build(weights, looped=False)
        self.run = self.model
        if self.cfg.compile:
            self.run = torch.compile(self.model, dynamic=False, fullgraph=True)
        self.optimizers = reference.module.Optimizers(reference.h, self.model)
        state = self.model.state_dict()
        self.ema = {name: tensor.detach().float().clone() for name, tensor in state.items()}

    def forward(self, looped: bool) -> Tensor:
        """The mean loss, with its graph."""
        self.model.looping_active = looped
        with self.reference.autocast():
            return self.run(**self.batch)

    def forward_backward(self, looped: bool) -> Tensor:
        """Adds to the gradients; returns the mean loss, detached."""
        loss = self.forward(looped)
        loss.backward()
        return loss.detach()

    def optimize(self) -> None:
        """Clips, updates the weights and clears the gradients."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"]
        if self.cfg.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip_norm)
        self.optimizers.step(distributed=False)

    @torch.no_grad()
    def average(self) -> None:
        """Moves the averages of the weights."""
        decay = self.cfg.ema_decay
        for name, tensor in self.model.state_dict().items():
            self.ema[name].mul_(decay).add_(tensor.detach().float(), alpha=1 - decay)


System = Ours | Theirs


def full_row(cfg: tg.Config, shape: tuple[int, int, int], device: torch.device) -> tg.Batch:
    """A row of random ids without padding, in documents as long as FineWeb's.

    Lengths are log-normal with median 474 and mean 808. shape: (tokens, capacity of segments,
    longest segment). Raises UsageError if the row needs more segments than the capacity.
    """
    size, capacity, longest = shape
    rng = np.random.default_rng(0)
    ids = rng.integers(0, cfg.vocab_size, size + 1)
    ends = np.cumsum(rng.lognormal(np.log(474), 1.033, size))
    is_bos = np.zeros(size, dtype=np.int64)
    is_bos[ends[ends < size].astype(int)] = 1
    starts = tg.segment_starts(is_bos, 1, longest)[:capacity]
    if size - starts[-1] > longest:
        raise tg.UsageError(
            f"CU_SEQLENS_CAPACITY={capacity}: a row of {size} tokens needs more segments"
        )
    return tg.pack_row(ids[:-1], ids[1:], starts, shape, device)


@torch.no_grad()
def random_weights(cfg: tg.Config, seed: int = 0) -> dict[str, Tensor]:
    """Weights as at the start of a run, except that none of them is zero."""
    weights = tg.GPT(cfg).state_dict()
    rng = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        spread = float(weight.std()) or 1.0
        weight.add_(torch.randn(weight.shape, generator=rng), alpha=0.1 * min(spread, 1.0))
    return weights


# --- Measuring ------------------------------------------------------------------------------------
class Stopwatch:
    """Seconds between marks.

    On CUDA they are those between events on the device, elsewhere those of the steady clock. With
    OMP_NUM_THREADS=1 it is the CPU time of the process: the same on an idle machine, and right on a
    busy one.
    """

    def __init__(self, device: torch.device):
        """Chooses the clock for the device."""
        self.on_cuda = device.type == "cuda"
        self.marks: list[Any] = []
        self.clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def mark(self) -> None:
        """Notes the time."""
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(self.clock())

    def read(self) -> list[float]:
        """Seconds from each mark to the next. Waits for the device."""
        intervals = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.on_cuda:
            return [end - start for start, end in intervals]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in intervals]


Job = Callable[[], Iterable[None]]


def take_turns(
    jobs: Mapping[str, Job], rounds: int, warmups: int, device: torch.device
) -> dict[str, np.ndarray]:
    """Seconds of each job, by name: (2 * rounds, parts).

    A job yields after each of its parts. A round runs all jobs forth and back, so that the n-th
    entries of two jobs are a pair. Rounds of warm-up come first and are not timed.
    """
    seconds: dict[str, list] = {name: [] for name in jobs}
    for number in range(-warmups, rounds):
        for name in [*jobs, *reversed(jobs)]:
            watch = Stopwatch(device)
            watch.mark()
            for _ in jobs[name]():
                watch.mark()
            if number >= 0:
                seconds[name].append(watch.read())
    return {name: np.array(rows) for name, rows in seconds.items()}


def paired_ratio(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Median over pairs of ours / theirs, each (n, parts) seconds."""
    return float(np.median(ours.sum(1) / theirs.sum(1)))


def step_parts(system: System, looped: bool) -> Iterator[None]:
    """Runs a training step and yields after each of PARTS."""
    system.forward_backward(looped)
    yield
    system.optimize()
    yield
    system.average()
    yield


def forward_alone(system: System, looped: bool) -> Iterator[None]:
    """Runs a forward, and yields after it."""
    system.forward(looped)
    yield


def print_quantiles(label: str, seconds: np.ndarray) -> None:
    """Prints a line of `print_times`: median, minimum, 10 % and 90 % of `seconds` (n,)."""
    low, median, high = np.quantile(seconds, [0.1, 0.5, 0.9]) * 1000
    print(f"{label:<34}{median:>9.2f}{seconds.min() * 1000:>9.2f}{low:>9.2f}{high:>9.2f}")


def print_times(label: str, seconds: Mapping[str, np.ndarray], parts: Sequence[str] = ()) -> None:
    """Prints times and ratios of jobs that took turns, and the times of their parts if named."""
    print(f"\n{label + ', ms':<34}{'median':>9}{'min':>9}{'10 %':>9}{'90 %':>9}")
    for name, values in seconds.items():
        print_quantiles(name, values.sum(1))
        for index, part in enumerate(parts):
            print_quantiles(f"{name} {part}", values[:, index])

    ours = seconds["ours"]
    for name, values in seconds.items():
        if name == "ours":
            continue
        ratio = np.median(ours.sum(1)) / np.median(values.sum(1))
        print(
            f"ours / {name}: ratio of medians {ratio:.3f}, "
            f"median of paired ratios {paired_ratio(ours, values):.3f}"
        )


class Ceilings(NamedTuple):
    """What the device does at best."""

    copy: float  # bytes/s
    product: float  # FLOP/s


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Times a large copy and a large square product."""
    on_cuda = device.type == "cuda"
    num_bytes = 8 * 10**9 if on_cuda else 5 * 10**7
    n = 8192 if on_cuda else 768
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)

    def job() -> Iterator[None]:
        target.copy_(source)
        yield
        a @ b
        yield

    copy_s, product_s = take_turns({"": job}, 3, 1, device)[""].min(0)
    return Ceilings(2 * num_bytes / copy_s, 2 * n**3 / product_s)


# --- Counting -------------------------------------------------------------------------------------
class StepFlops(NamedTuple):
    """FLOPs of a forward and backward, counted in two ways."""

    performed: float  # of all products, once for each visit of a layer, and of attention
    by_parameters: float  # 6 x parameters x tokens


def step_flops(cfg: tg.Config, row: tg.Batch, looped: bool) -> StepFlops:
    """Counts the FLOPs of a step on one row."""
    sizes = {}
    for name, role in tg.parameter_table(cfg).items():
        if role.packing != "float":
            sizes[name] = math.prod(role.shape)
    head = sizes.pop("tok_emb")
    layers = sum(sizes.values())
    num_tokens = len(row.inputs)
    visits = len(cfg.plans[looped])

    # Pairs of a query and a key that it sees. Attention has two products forward and five backward.
    lengths = row.cu_seqlens.diff().double()
    pairs = float((lengths * (lengths + 1) / 2).sum())
    attention = (2 + 5) * 2 * cfg.num_heads * cfg.head_dim * pairs * visits

    products = 6 * num_tokens * (layers * visits / cfg.num_layers + head)
    return StepFlops(products + attention, 6 * num_tokens * (layers + head))


def saved_bytes(system: System, looped: bool) -> int:
    """Bytes that a forward keeps for its backward, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in system.model.parameters()}
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = system.forward(looped)
    # Addresses tell storages apart only while the graph, which holds them, is alive.
    total = sum(saved.values())
    del loss
    return total


def peak_bytes(system: System, looped: bool) -> int:
    """Peak memory of a step on CUDA; the weights of the other system count too."""
    torch.cuda.reset_peak_memory_stats()
    for _ in step_parts(system, looped):
        pass
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def print_memory(systems: Mapping[str, System], looped: bool, device: torch.device) -> None:
    """Prints the memory that a step of each system needs."""
    label = "kept for backward"
    measure = saved_bytes
    if device.type == "cuda":
        label = "peak memory"
        measure = peak_bytes
    cells = [f"{name} {measure(s, looped) / 1e6:.0f}" for name, s in systems.items()]
    print(f"{label}, MB: {', '.join(cells)}")


def busy(intervals: list[tuple[float, float]]) -> float:
    """The length of the union of (start, end) intervals."""
    total = 0.0
    covered_until = -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, covered_until))
        covered_until = max(covered_until, end)
    return total


def job_of(name: str) -> str:
    """The purpose of an operator or kernel, a key of JOBS."""
    return next(job for job, pattern in JOBS.items() if re.search(pattern, name))


@dataclasses.dataclass
class Cost:
    """What one operator, kernel or job took in a step."""

    ms: float = 0.0
    calls: int = 0
    gflop: float = 0.0  # as far as the profiler counts it; on a GPU it does not

    def add(self, other: Cost) -> None:
        """Adds another cost, in place."""
        self.ms += other.ms
        self.calls += other.calls
        self.gflop += other.gflop

    def cells(self) -> str:
        """The cost as columns of a table."""
        rate = f"{1000 * self.gflop / self.ms:.0f}" if self.gflop and self.ms else ""
        return f"{self.ms:>15.2f}{self.calls:>7}{rate:>9}"


Costs = dict[str, Cost]  # by name of an operator, kernel or job


class Profile(NamedTuple):
    """The costs of one step, and a line about launches and idle time."""

    costs: Costs
    summary: str


def profile(system: System, looped: bool, device: torch.device) -> Profile:
    """Costs of one step: of operators on a CPU, of kernels on a GPU."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    options = {"with_flops": True, "record_shapes": True, "acc_events": True}
    with record_events(activities=activities, **options) as recorded:
        for _ in step_parts(system, looped):
            pass
        if device.type == "cuda":
            torch.cuda.synchronize()
    if device.type == "cuda":
        return profile_of_kernels(recorded.events())

    costs = {}
    for event in recorded.key_averages():
        ms = event.self_cpu_time_total / 1000
        costs[event.key] = Cost(ms, event.count, event.flops / 1e9)
    return Profile(costs, f"{sum(cost.calls for cost in costs.values())} operator calls")


def profile_of_kernels(events: Iterable[Any]) -> Profile:
    """The profile of a step on a GPU, from the profiler's events."""
    costs = collections.defaultdict(Cost)
    intervals = []
    for event in events:
        # An annotation spans many kernels.
        is_annotation = getattr(event, "is_user_annotation", False)
        if event.device_type != DeviceType.CUDA or is_annotation:
            continue
        span = event.time_range
        costs[event.name].add(Cost(span.elapsed_us() / 1000, 1))
        intervals.append((span.start, span.end))
    first_start = min(start for start, _ in intervals)
    last_end = max(end for _, end in intervals)
    step_us = last_end - first_start
    idle = 1 - busy(intervals) / step_us
    summary = f"{len(intervals)} kernels, GPU idle {100 * idle:.1f} % of {step_us / 1000:.2f} ms"
    return Profile(dict(costs), summary)


def costs_of_jobs(costs: Costs) -> Costs:
    """The costs of operators or kernels, summed by job."""
    jobs = {job: Cost() for job in JOBS}
    for name, cost in costs.items():
        jobs[job_of(name)].add(cost)
    return jobs


def print_costs(names: list[str], costs: Mapping[str, Costs]) -> None:
    """Prints a table with a line a name and three columns a system."""
    heads = [f"{system + ' ms':>15}{'calls':>7}{'GFLOP/s':>9}" for system in costs]
    print(f"\n{'':<58}{''.join(heads)}")
    for name in names:
        cells = [of_system.get(name, Cost()).cells() for of_system in costs.values()]
        print(f"{name[:57]:<58}{''.join(cells)}")


def print_operations(costs: Mapping[str, Costs], num_largest: int) -> None:
    """Prints the costs by job, and then those of the largest operators or kernels."""

    def most_ms(name: str) -> float:
        return max(of_system.get(name, Cost()).ms for of_system in costs.values())

    print_costs(list(JOBS), {system: costs_of_jobs(table) for system, table in costs.items()})
    names = set().union(*costs.values())
    print_costs(sorted(names, key=most_ms, reverse=True)[:num_largest], costs)


# --- Gradients ------------------------------------------------------------------------------------
class LossAndGradients(NamedTuple):
    """The outcome of a forward and backward."""

    loss: float
    grads: dict[str, Tensor]  # fp32, by name of the parameter


Errors = dict[str, float]  # relative, by name of the parameter or `loss`


def gradients(system: System) -> LossAndGradients:
    """Loss and gradients in the looped plan."""
    loss = float(system.forward_backward(looped=True))
    grads = {}
    for name, parameter in system.model.named_parameters():
        if parameter.grad is not None:
            grads[name] = parameter.grad.float()
    return LossAndGradients(loss, grads)


def relative_errors(result: LossAndGradients, exact: LossAndGradients) -> Errors:
    """||gradient - exact|| / ||exact|| by name of the parameter, and the error of the loss."""
    errors = {}
    for name, grad in exact.grads.items():
        errors[name] = float((result.grads[name] - grad).norm() / grad.norm())
    errors["loss"] = abs(result.loss - exact.loss) / exact.loss
    return errors


def gradient_errors(
    cfg: tg.Config, reference: Reference | None, row: tg.Batch, backend: str, seed: int
) -> dict[str, Errors]:
    """Errors of gradients in bf16 with random weights, by system.

    They are relative to our gradients in fp32. Raises AssertionError if the reference in fp32 does
    not agree with these. The plan is the looped one, in which a row of skip_weights means the same
    to both systems.
    """
    weights = random_weights(cfg, seed)
    bf16 = dataclasses.replace(cfg, compute_dtype="bf16", compile=False)
    fp32 = dataclasses.replace(cfg, compute_dtype="fp32", compile=False)
    exact = gradients(Ours(fp32, weights, row, "sdpa"))
    errors = {"ours": relative_errors(gradients(Ours(bf16, weights, row, backend)), exact)}
    if not reference:
        return errors

    def errors_of_script(config: tg.Config, attention: str) -> Errors:
        script = Reference(reference.path, config, row.inputs.device, attention)
        loss, grads = gradients(Theirs(script, weights, row))
        return relative_errors(LossAndGradients(loss, script.stacked(grads, exact.grads)), exact)

    difference = max(errors_of_script(fp32, "sdpa").values())
    assert difference < 1e-3, (
        f"in fp32 the two systems differ by {difference:.1e}: they do not compute the same"
    )
    errors["reference"] = errors_of_script(bf16, backend)
    return errors


def compare_gradients(
    cfg: tg.Config, reference: Reference | None, device: torch.device, backend: str
) -> float | None:
    """Prints the errors of gradients in bf16 and returns the largest ratio ours / reference.

    Errors are root mean squares over several sets of weights. The gradients of parameters with few
    numbers, such as the lambdas, differ by half from set to set, so a ratio needs many sets.
    """
    num_tokens = min(cfg.micro_batch_tokens, 4096)
    row = full_row(cfg, (num_tokens, cfg.cu_seqlens_capacity, cfg.train_seq_len), device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    num_sets = 16 if reference else 3
    runs = [gradient_errors(cfg, reference, row, backend, seed) for seed in range(num_sets)]
    torch.set_float32_matmul_precision(precision)

    errors: dict[str, Errors] = {}
    for system, of_first_run in runs[0].items():
        errors[system] = {}
        for name in of_first_run:
            mean_square = sum(run[system][name] ** 2 / num_sets for run in runs)
            errors[system][name] = mean_square**0.5

    heads = [f"{system:>12}" for system in errors]
    print(f"\n{'relative error in bf16':<34}{''.join(heads)}")
    for name in errors["ours"]:
        cells = [f"{of_system[name]:>12.1e}" for of_system in errors.values()]
        print(f"{name:<34}{''.join(cells)}")
    if not reference:
        return None
    print("fp32: the gradients of both agree")
    return max(errors["ours"][name] / error for name, error in errors["reference"].items())


# --- Training steps -------------------------------------------------------------------------------
class StepTimes(NamedTuple):
    """Times of a training step in one plan."""

    ratio: float | None  # ours / reference; None without a reference
    noise: float  # ours / ours
    seconds: float  # ours, median


def measure_steps(systems: dict[str, System], looped: bool, rounds: int, warmups: int) -> StepTimes:
    """Measures and prints times, operations and memory of a step."""
    device = systems["ours"].row.inputs.device
    timed = {**systems, "ours again": systems["ours"]}
    jobs = {name: partial(step_parts, system, looped) for name, system in timed.items()}
    seconds = take_turns(jobs, rounds, warmups, device)
    print_times("step, looped" if looped else "step, not looped", seconds, PARTS)

    jobs = {name: partial(forward_alone, system, looped) for name, system in systems.items()}
    print_times("forward alone", take_turns(jobs, max(1, rounds // 3), 1, device))
    print_memory(systems, looped, device)

    profiles = {name: profile(system, looped, device) for name, system in systems.items()}
    for name, of_system in profiles.items():
        print(f"{name}: {of_system.summary}")
    costs = {name: of_system.costs for name, of_system in profiles.items()}
    print_operations(costs, num_largest=20)

    ratio = None
    if "reference" in systems:
        ratio = paired_ratio(seconds["ours"], seconds["reference"])
    noise = paired_ratio(seconds["ours"], seconds["ours again"])
    return StepTimes(ratio, noise, float(np.median(seconds["ours"].sum(1))))


def estimated_steps(plain_share: float, plain_ms: float, looped_ms: float) -> float:
    """Steps in the published training time, a share of which goes to steps that do not loop."""
    return PUBLIC_TRAINING_MS * (plain_share / plain_ms + (1 - plain_share) / looped_ms)


def report_speed(
    cfg: tg.Config, row: tg.Batch, times: dict[bool, StepTimes], peak: float, source: str
) -> float:
    """Prints shares of the peak (FLOP/s) and the projection for 8 GPUs.

    Returns the share of the last plan in `times`, the looped one if there is any.
    """
    print(
        f"\nMFU of {peak / 1e12:.2f} TFLOP/s ({source}), with loops and attention; "
        "and 6 x parameters x tokens alone"
    )
    mfu = 0.0
    for looped, of_plan in times.items():
        flops = step_flops(cfg, row, looped)
        mfu = flops.performed / of_plan.seconds / peak
        by_parameters = flops.by_parameters / of_plan.seconds / peak
        label = "looped" if looped else "not looped"
        print(
            f"{label:<12}{100 * mfu:>6.1f} %{100 * by_parameters:>7.1f} %"
            f"{len(row.inputs) / of_plan.seconds:>12.0f} tokens/s"
        )
    if row.inputs.is_cuda and len(times) == 2 and times[True].ratio:
        share = cfg.enable_looping_at
        plain_ms = times[False].ratio * PUBLIC_PLAIN_MS
        looped_ms = times[True].ratio * PUBLIC_LOOPED_MS
        ours = estimated_steps(share, plain_ms, looped_ms)
        published = estimated_steps(share, PUBLIC_PLAIN_MS, PUBLIC_LOOPED_MS)
        print(
            f"estimate for 8 H100 from the ratios of one GPU: {ours:.0f} steps in 587 s, "
            f"the reference {published:.0f}"
        )
    return mfu


# --- GPTQ -----------------------------------------------------------------------------------------
class GptqProblem(NamedTuple):
    """Matrices to quantise, on the device, and the Hessians of their inputs, on the CPU."""

    model: torch.nn.Module  # as much of a GPT as a Quantizer reads
    hessians: tg.Hessians


def random_hessian(size: int, rng: torch.Generator) -> Tensor:
    """The Hessian of correlated inputs of unequal sizes."""
    x = torch.randn(size, size, generator=rng) * torch.rand(size, generator=rng)
    return (x.T @ x / size).add_(torch.eye(size), alpha=1e-2)


def gptq_problem(layers: int, device: torch.device) -> GptqProblem:
    """Random matrices of the record network with so many layers, and random Hessians."""
    cfg = tg.Config(num_layers=layers, xsa_last_n=layers, num_loops=0, parallel_start_layer=0)
    table = tg.parameter_table(cfg)
    matrices = tg.quantised_matrices(cfg)
    rng = torch.Generator().manual_seed(0)

    widths = {matrix.site: table[matrix.bank].shape[-1] for matrix in matrices}
    of_site = {site: random_hessian(width, rng) for site, width in widths.items()}
    hessians = {}
    for matrix in matrices:
        hessians[matrix.input_key] = of_site[matrix.site] * (1 + matrix.layer)

    model = torch.nn.Module()
    model.cfg = cfg
    for bank in tg.bank_shapes(cfg):
        weight = 0.02 * torch.randn(table[bank].shape, generator=rng)
        model.register_parameter(bank, torch.nn.Parameter(weight))
    return GptqProblem(model.to(device), hessians)


def solve_by_script(reference: Reference, problem: GptqProblem) -> dict[tuple[str, int], Tensor]:
    """The script's integers of each (bank, index), solved one by one on the CPU, as published."""
    cfg = problem.model.cfg
    table = tg.parameter_table(cfg)
    weights = {name: weight.cpu() for name, weight in problem.model.state_dict().items()}
    codes = {}
    for matrix in tg.quantised_matrices(cfg):
        role = table[matrix.bank]
        weight = weights[matrix.bank].view(-1, *role.shape[-2:])[matrix.index]
        bits = getattr(cfg, f"{role.packing}_bits")
        clip_sigmas = getattr(cfg, f"{role.packing}_clip_sigmas")
        hessian = problem.hessians[matrix.input_key]
        q, _ = reference.module.gptq_quantize_weight(
            weight, hessian, clip_sigmas, 2 ** (bits - 1) - 1
        )
        codes[matrix.bank, matrix.index] = q
    return codes


def compare_gptq(reference: Reference | None, layers: int, device: torch.device) -> float | None:
    """Times the solving of the record network's matrices: ours, and the script's.

    Prints how many integers are equal; returns ours / reference, None without a reference.
    """
    problem = gptq_problem(layers, device)
    on_device = {key: hessian.to(device) for key, hessian in problem.hessians.items()}
    our_codes = {}
    their_codes = {}

    def ours() -> Iterator[None]:
        solver = tg.Quantizer(problem.model, on_device, None, tg.Ranks({}))
        our_codes.update(solver.solve(solver.default_theta).codes)
        yield

    def theirs() -> Iterator[None]:
        their_codes.update(solve_by_script(reference, problem))
        yield

    jobs: dict[str, Job] = {"ours": ours}
    if reference:
        jobs["reference"] = theirs
    seconds = take_turns(jobs, 1, 0, device)
    print_times(f"GPTQ of {len(tg.quantised_matrices(problem.model.cfg))} matrices", seconds)
    if not reference:
        return None

    shares = []
    for (bank, index), q in their_codes.items():
        shares.append(float((our_codes[bank][index] == q).float().mean()))
    print(
        f"equal integers: {100 * np.mean(shares):.2f} % on average, "
        f"{100 * min(shares):.2f} % in the worst matrix"
    )
    return paired_ratio(seconds["ours"], seconds["reference"])


# --- The run --------------------------------------------------------------------------------------
class Setting(NamedTuple):
    """What a run measures with."""

    cfg: tg.Config
    row: tg.Batch
    backend: str  # of attention
    reference: Reference | None


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def prepare(path: Path | None) -> Setting:
    """Reads and checks the environment and the script at `path`, and prints what figures depend on.

    Raises UsageError.
    """
    cfg, _ = tg.Config.from_env(os.environ, torch.cuda.is_available())
    device = tg.Ranks({}).device
    cfg, _ = tg.resolve_dtype(cfg, device)
    tg.configure_torch(cfg)
    backend, lines = tg.choose_attention(cfg.attention_backend, device, cfg.dtype)
    reference = Reference(path, cfg, device, backend) if path else None
    row = full_row(cfg, cfg.row_shape, device)
    triton_version = tg.triton.__version__ if tg.triton else "none"
    print(
        f"device:{device_name(device)} torch:{torch.__version__} triton:{triton_version} "
        f"dtype:{cfg.compute_dtype} compile:{cfg.compile}"
    )
    print(*lines, sep="\n")
    print(
        f"preset:{cfg.preset} layers:{cfg.num_layers} width:{cfg.model_dim} "
        f"vocabulary:{cfg.vocab_size} row: {len(row.inputs)} tokens, "
        f"{int((row.cu_seqlens.diff() > 0).sum())} segments"
    )
    return Setting(cfg, row, backend, reference)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options of the command line."""
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
    return parser.parse_args(argv)


def measure_plans(setting: Setting, rounds: int | None) -> dict[bool, StepTimes]:
    """Measures a step in each plan: not looped, and looped if the network loops."""
    cfg, row, backend, reference = setting
    weights = random_weights(cfg)
    systems: dict[str, System] = {"ours": Ours(cfg, weights, row, backend)}
    if reference:
        systems["reference"] = Theirs(reference, weights, row)
    on_cuda = row.inputs.is_cuda
    rounds = rounds or (15 if on_cuda else 5)
    warmups = 5 if on_cuda else 1
    times = {False: measure_steps(systems, False, rounds, warmups)}
    if cfg.num_loops:
        times[True] = measure_steps(systems, True, rounds, warmups)
    return times


def worst_noise(times: dict[bool, StepTimes]) -> float:
    """The noise of the plan in which it is farther from 1, as a factor."""

    def distance(ratio: float) -> float:
        return abs(math.log(ratio))

    return max((of_plan.noise for of_plan in times.values()), key=distance)


def main(argv: list[str]) -> int:
    """Prints the tables. Exit status 2 if the environment or the script cannot be used."""
    args = parse_arguments(argv)
    try:
        setting = prepare(args.reference)
    except tg.UsageError as error:
        print(f"bench/step.py: {error}", file=sys.stderr)
        return 2
    cfg, row, backend, reference = setting
    device = row.inputs.device
    ceilings = measure_ceilings(device, cfg.dtype)
    print(
        f"ceilings: copy {ceilings.copy / 1e9:.1f} GB/s, "
        f"{cfg.compute_dtype} product {ceilings.product / 1e12:.2f} TFLOP/s"
    )
    error_ratio = compare_gradients(cfg, reference, device, backend)
    times = measure_plans(setting, args.rounds)

    peak = ceilings.product
    source = "product measured above"
    for gpu, flops in tg.PEAK_FLOPS.items():
        if gpu in device_name(device):
            peak = flops
            source = "data sheet"
    mfu = report_speed(cfg, row, times, peak, source)

    layers = args.gptq_layers
    if layers is None:
        layers = 11 if reference else 2
    gptq_ratio = compare_gptq(reference, layers, device) if layers else None

    figures = {
        "device": device_name(device),
        "backend": backend,
        "ratio_plain": times[False].ratio,
        "ratio_looped": times[True].ratio if cfg.num_loops else None,
        "ratio_gptq": gptq_ratio,
        "noise_ratio": worst_noise(times),
        "grad_error_ratio": error_ratio,
        "mfu": mfu,
    }
    for name, value in figures.items():
        if isinstance(value, float):
            figures[name] = round(value, 4)
    print("bench " + json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
