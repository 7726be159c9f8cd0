"""What the compiler makes of a run's graphs on Hopper, without a GPU.

    python bench/graphs.py [--reference FILE] [--out bench/results/graphs_sm90.md]
                           [--sources FOLDER]

Every compiled graph (training with and without loops, scoring, a step of adaptation, the passes of
the optimisers) is traced on fake CUDA tensors and lowered by Inductor to its Triton source for
sm_90, as at the start of a run on an H100. Nothing is executed.

Counted for each kernel: the bytes of its arguments and results, and the FLOPs of products. Modelled
from these: the larger of FLOPs / 650 TFLOP/s and bytes / 2.85 TB/s, plus 1.5 us a kernel. Attention
is library code, the same for all systems: 2.09 ms a visit. A model is no measurement: bench/step.py
measures. Copies from the host are listed.

The system is PRESET=record, or pr1560 beside a public script, PR #1530's, whose training graphs
--reference adds (see bench/reference.py), in the same process. Needs a CPU build of PyTorch
(written for 2.13), Triton and g++. The last line is `bench ` and one JSON object; null is what was
not counted.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fake_hopper import DEVICE, MISSING, autocasting, hopper

# isort: split
import torch
import triton
from reference import Reference
from step import full_row
from torch import Tensor, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx, ir
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode

import train_gpt as tg

# Assumed of an H100.
FLOPS_PER_S = 650e12
BYTES_PER_S = 2.85e12
LAUNCH_S = 1.5e-6
# A visit's attention, forward and backward, on so many tokens.
ATTENTION_S = 2.09e-3
ATTENTION_TOKENS = 98304

# What a kernel is for.
PRODUCTS = "products"
FUSED_MLP = "MLP with activation"
ATTENTION = "attention"
HEAD_LOSS = "head loss"
GENERATED = "norms, RoPE, XSA, residuals"
HOST = "host"
JOBS = [PRODUCTS, FUSED_MLP, ATTENTION, HEAD_LOSS, GENERATED, HOST]
# A part of an operator's name -> its job; the first that matches counts.
JOBS_OF_OPERATORS = {
    "mlp_": FUSED_MLP,
    "attn": ATTENTION,
    "attention": ATTENTION,
    "sdpa": ATTENTION,
    "softcap_ce": HEAD_LOSS,
}


# --- Counting -------------------------------------------------------------------------------------
class Kernel(NamedTuple):
    """A kernel, or a call of a library, that a graph launches."""

    job: str  # of JOBS
    name: str
    nbytes: float  # of its arguments and results
    flops: float  # of products

    def seconds(self) -> float:
        """The modelled time; 0 for attention, which is modelled by visit."""
        if self.job == ATTENTION:
            return 0.0
        return LAUNCH_S + max(self.flops / FLOPS_PER_S, self.nbytes / BYTES_PER_S)


class Graph(NamedTuple):
    """A lowered graph."""

    name: str
    kernels: list[Kernel]
    kept: int  # bytes of its results, which a forward keeps for its backward
    source: str  # the Python module that would run


class Lowered(Exception):
    """Carries what was counted out of the compiler, which must not load what it wrote."""

    def __init__(self, kernels: list[Kernel], source: str):
        """As in Graph."""
        super().__init__()
        self.kernels = kernels
        self.source = source


def count_bytes(values: Any) -> float:
    """Bytes of the tensors and buffers among `values`; a view counts what it shows."""
    total = 0.0
    for x in torch.utils._pytree.tree_leaves(values):
        if isinstance(x, Tensor):
            total += int(x.numel()) * x.element_size()
        elif isinstance(x, ir.IRNode):
            total += math.prod(map(int, x.get_size())) * x.get_dtype().itemsize
    return total


def is_on_host(node: Any) -> bool:
    """Whether a scheduler's node computes on the host or copies from there."""
    if isinstance(node.node, ir.DeviceCopy | ir.DynamicScalar):
        return True
    device = node.get_device()
    return device is None or device.type == "cpu"


def kernel_of(node: Any, moved: float, num_logits: int) -> Kernel | None:
    """A scheduler's node as a kernel, or None if it launches none.

    moved: its bytes as Inductor counts them, where a view counts as its whole buffer. A generated
    kernel that reads or writes `num_logits` values belongs to the loss.
    """
    kind = type(node).__name__
    if "Nop" in kind or isinstance(node.node, ir.MultiOutput):
        return None
    if is_on_host(node):
        return Kernel(HOST, f"{kind} {node.get_name()}", moved, 0.0)
    if isinstance(node.node, ir.ExternKernel):
        return library_kernel(node.node)

    sizes = set()
    names = set()
    for part in node.get_nodes():
        for dependency in part.read_writes.reads_and_writes():
            if hasattr(dependency, "get_numel"):
                sizes.add(int(dependency.get_numel()))
        for origin in part.node.origins:
            names.add(origin.name.rstrip("_0123456789"))
    job = HEAD_LOSS if num_logits in sizes else GENERATED
    return Kernel(job, ",".join(sorted(names)), moved, 0.0)


def library_kernel(operator: ir.ExternKernel) -> Kernel:
    """A call of a library, or of one of our operators, as a kernel."""
    name = str(operator.op_overload or operator.python_kernel_name)
    inputs = operator.inputs
    outputs = list(getattr(operator, "outputs", ()))
    if not outputs and not isinstance(operator.layout, ir.NoneLayout):
        outputs = [operator]
    moved = count_bytes([*inputs, *outputs])
    if "softcap_ce" in name and True in operator.constant_args:
        # The logits become their gradient, in place.
        moved += count_bytes(inputs[0])
    flops = product_flops(name, [[int(n) for n in x.get_size()] for x in inputs])
    job = PRODUCTS if flops else GENERATED
    for part, job_of_part in JOBS_OF_OPERATORS.items():
        if part in name:
            job = job_of_part
            break
    return Kernel(job, name, moved, flops)


def product_flops(name: str, shapes: list[list[int]]) -> float:
    """FLOPs of an operator with inputs of these shapes, if it is a product."""
    if "mlp_" in name:
        # x (T, C) and w_up (F, C), or dy (T, C) and w_down (C, F).
        return 2.0 * math.prod(shapes[0]) * math.prod(shapes[1]) / shapes[0][1]
    if "mm" in name:
        # Perhaps a bias, then a (.., m, k) and b (.., k, n).
        *_, a, b = shapes
        return 2.0 * math.prod(a) * b[-1]
    return 0.0


def find_lowered(error: BaseException) -> Lowered | None:
    """The Lowered among the causes of an error of the compiler."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Lowered):
        cause = cause.__cause__ or cause.__context__
    return cause


class Tracer:
    """A backend for torch.compile that lowers and counts.

    What it returns computes nothing but shapes, on fake tensors. `graphs` grows with each graph.
    """

    def __init__(self, logits: int):
        """logits: how many values the logits of a row have."""
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.graphs: list[Graph] = []
        self.name = ""  # of the next graph
        self.num_logits = logits

    def fake(self, tensor: Tensor) -> Tensor:
        """A fake tensor on the GPU with the same shape and dtype."""
        tensor = self.mode.from_tensor(tensor.detach())
        with self.mode:
            return tensor.to(DEVICE)

    def fake_row(self, row: tg.Batch) -> tg.Batch:
        """A row of fake tensors."""
        return tg.Batch(
            self.fake(row.inputs), self.fake(row.targets), self.fake(row.cu_seqlens), row.max_seqlen
        )

    def move(self, module: nn.Module) -> nn.Module:
        """Makes the parameters and buffers of a module fake, in place."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    fake = self.fake(parameter)
                    part._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self.fake(buffer)
        return module

    def finish(self, graph: GraphLowering) -> None:
        """Counts a lowered graph. Raises Lowered, always."""
        source, _ = graph.codegen()
        kernels = []
        for node, words in graph.count_bytes()[1]:
            kernel = kernel_of(node, 4.0 * words, self.num_logits)
            if kernel:
                kernels.append(kernel)
        raise Lowered(kernels, source.value)

    def result_bytes(self, module: torch.fx.GraphModule) -> float:
        """Bytes of a graph's results."""
        output = list(module.graph.nodes)[-1]
        return count_bytes([node.meta.get("val") for node in output.all_input_nodes])

    def compile_inner(self, module: torch.fx.GraphModule, inputs: list, **options: Any) -> Callable:
        """Lowers a graph in place of Inductor's compile_fx_inner, and notes what was counted."""
        # Inductor changes the graph.
        kept = self.result_bytes(module)
        original = torch.fx.GraphModule(module, copy.deepcopy(module.graph))
        try:
            with hopper(self.finish):
                compile_fx.compile_fx_inner(module, inputs, **options)
        except Exception as error:  # the compiler wraps Lowered in errors of its own
            lowered = find_lowered(error)
            if lowered is None:
                raise
            name = self.name + (", backward" if options.get("is_backward") else "")
            self.graphs.append(Graph(name, lowered.kernels, int(kept), lowered.source))
        return make_boxed_func(original.forward)

    def backend(self) -> Callable:
        """Inductor's compile_fx with `compile_inner`."""
        return partial(compile_fx.compile_fx, inner_compile=self.compile_inner)

    def compiled(self, function: Callable, **options: Any) -> Callable:
        """torch.compile with this tracer."""
        return torch.compile(function, backend=self.backend(), **options)

    def named(self, call: Callable, name: str) -> Callable:
        """The same call, where graphs that it or its backward compiles get this name."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.name = name
            return call(*args, **kwargs)

        return run


class AnySize(Tracer):
    """Lowers graphs whose sizes are symbols: it counts the graphs, not their bytes."""

    def result_bytes(self, module: torch.fx.GraphModule) -> float:
        """Nothing: results have no numbers for sizes."""
        return 0.0

    def finish(self, graph: GraphLowering) -> None:
        """Writes the source. Raises Lowered, always."""
        graph.codegen()
        raise Lowered([], "")

    def in_place_of_inductor(self) -> contextlib.AbstractContextManager:
        """Makes this the backend of a torch.compile that names none, for a while."""
        return mock.patch.object(compile_fx, "compile_fx", self.backend())


# --- What is lowered ------------------------------------------------------------------------------
def prepare(env: Mapping[str, str]) -> tg.Config:
    """The config, once PyTorch is set up, before anything is lowered. Raises UsageError.

    Attention is PyTorch's own for variable lengths, which is traced without a GPU.
    """
    # Folding constants would compute.
    inductor_config.joint_graph_constant_folding = False
    inductor_config.force_disable_caches = True
    cfg, _ = tg.Config.from_env(env, has_cuda=True)
    tg.configure_torch(cfg)
    tg.ATTENTION["torch"] = tg.load_attention("torch")
    return cfg


def depths(cfg: tg.Config) -> list[bool]:
    """Whether a step loops: the kinds of step in a run, in their order."""
    return [False, True] if cfg.num_loops else [False]


def training_name(looped: bool) -> str:
    """The name of the graphs of a training step."""
    return "training, looped" if looped else "training"


def trace_ours(cfg: tg.Config, row: tg.Batch) -> list[Graph]:
    """Every graph of a run with a row like this one."""
    tracer = Tracer(len(row.inputs) * cfg.vocab_size)
    model = tracer.move(tg.GPT(cfg, "torch"))
    row = tracer.fake_row(row)
    forward = tracer.compiled(model, fullgraph=True, dynamic=False)
    with tracer.mode:
        for looped in depths(cfg):
            named = tracer.named(forward, training_name(looped))
            tg.backward_row(named, cfg.plans[looped], row, torch.ones((), device=DEVICE))
        with torch.no_grad():
            tracer.named(forward, "scoring")(row, cfg.plans[-1])
        if cfg.ttt_enabled and cfg.ttt_mode == "document":
            trace_adaptation(tracer, cfg, model)
        trace_muon(tracer, cfg, model)
    return tracer.graphs


def trace_muon(tracer: Tracer, cfg: tg.Config, model: tg.GPT) -> None:
    """A step of Muon for each bank, on one rank."""
    for name, role in tg.parameter_table(cfg).items():
        if role.group != "muon":
            continue
        shape = model.get_parameter(name).shape
        gradient, momentum, weights, average = (torch.empty(shape, device=DEVICE) for _ in range(4))
        squares = torch.empty(shape, device=DEVICE) if cfg.muon_square_decay else None
        outbox = torch.empty(shape, dtype=cfg.dtype, device=DEVICE)
        rates = torch.empty(4, device=DEVICE)
        step = tracer.compiled(tg.muon_step, dynamic=False)
        state = gradient, momentum, squares, weights, average
        tracer.named(step, f"Muon, {name}")(*state, outbox, rates, cfg)


class AdapterGradients(NamedTuple):
    """Adapters and the outcome of a forward and backward with them."""

    master: tg.LoRA
    lora: tg.LoRA  # what the forward reads
    grads: tuple[Tensor, ...]  # for each leaf


def adapter_gradients(
    cfg: tg.Config, forward: Callable, rows: int, window: int
) -> AdapterGradients:
    """Runs a chunk of `rows` documents as Adaptation.forward_chunk does, in windows of one size."""
    master = tg.LoRA.zeros(cfg, rows, len(cfg.plans[-1]), DEVICE)
    lora = master.to(cfg.dtype).rows(slice(None))
    ids = torch.zeros(rows * window, dtype=torch.int64, device=DEVICE)
    # A window and its padding are segments.
    cu_seqlens = torch.zeros(2 * rows + 1, device=DEVICE).int()
    batch = tg.Batch(ids, ids.clone(), cu_seqlens, cfg.ttt_eval_seq_len)
    select = ids[: rows * cfg.ttt_chunk_size].clone()
    nats = forward(batch, cfg.plans[-1], lora=lora, select=select)
    return AdapterGradients(master, lora, torch.autograd.grad(nats.sum(), lora.leaves))


def trace_adaptation(tracer: Tracer, cfg: tg.Config, model: tg.GPT) -> None:
    """A step of a full batch in the longest window, of fixed sizes.

    It is that of Adaptation.forward_chunk and Adaptation.apply_gradients.
    """
    forward = tracer.compiled(model.requires_grad_(False), fullgraph=True, dynamic=False)
    named = tracer.named(forward, "adaptation")
    master, lora, grads = adapter_gradients(cfg, named, cfg.ttt_batch_size, cfg.ttt_eval_seq_len)
    num_moments = 2 if cfg.ttt_optimizer == "adam" and cfg.ttt_beta1 > 0 else 1
    t = torch.ones((), device=DEVICE)
    rate = t.double()
    names = ["down", "up", "bias"]
    for name, leaf, whole, grad in zip(names, lora.leaves, master.leaves, grads, strict=False):
        moments = [torch.empty_like(whole) for _ in range(num_moments)]
        update = tracer.compiled(tg.adapter_update, dynamic=False)
        with torch.no_grad():
            tracer.named(update, f"adapters, {name}")(
                leaf, whole.detach(), grad, moments, t, rate, cfg
            )


# --- Sizes that one graph serves ------------------------------------------------------------------
def sizes_of_adaptation(cfg: tg.Config, buckets: list[int]) -> list[tuple[int, int]]:
    """(documents, tokens of a window) of forwards in adaptation, warm-up's first, each once."""
    # TTT_BUCKETS=0 pads no window, so that every length occurs.
    windows = buckets or [cfg.ttt_chunk_size, cfg.ttt_eval_seq_len]
    shortest = windows[0]
    middle = windows[(len(windows) - 1) // 2]
    longest = windows[-1]

    most = cfg.ttt_batch_size
    warm_up_tokens = max(2 * cfg.ttt_chunk_tokens, cfg.val_row_shape.tokens)
    warm_up_docs = warm_up_tokens // (cfg.ttt_eval_seq_len + cfg.ttt_chunk_size)
    sizes = [(min(8 + warm_up_docs // 8 * 8, most), shortest)]
    sizes += product((8, 16, most), (shortest, middle, longest))
    # Four times as many short documents: see tg.batch_size_factor.
    sizes += product([4 * most], (shortest, middle))
    return list(dict.fromkeys(sizes))


def rows_of_learning(cfg: tg.Config) -> list[int]:
    """Rows of a rank in a step of all weights: on 1, 2, 4 and 8 ranks, and with a row for each."""
    counts = []
    for world_size in (1, 2, 4, 8, cfg.ttt_chunk_tokens):
        rows = min(cfg.ttt_chunk_tokens // cfg.eval_seq_len, cfg.ttt_batch_seqs * world_size)
        counts.append(math.ceil(rows / world_size))
    return counts


def learn_row(cfg: tg.Config, forward: Callable, rows: int) -> None:
    """A forward and backward of all weights over so many rows of EVAL_SEQ_LEN tokens."""
    ids = torch.zeros(rows * cfg.eval_seq_len, dtype=torch.int64, device=DEVICE)
    cu_seqlens = torch.zeros(65, dtype=torch.int64, device=DEVICE).int()
    batch = tg.Batch(ids, ids.clone(), cu_seqlens, cfg.eval_seq_len)
    forward(batch, cfg.plans[-1]).sum().backward()


GraphCounts = dict[str, dict[str, int]]  # purpose -> size -> number of graphs compiled at it


def trace_sizes(cfg: tg.Config) -> GraphCounts:
    """Counts the graphs that the run's own torch.compile makes at one size after another.

    Warm-up's size is the first. On a GPU Inductor may split a graph by size, which it does not do
    on a CPU.
    """
    tracer = AnySize(0)
    model = tracer.move(tg.GPT(cfg, "torch"))
    forward = tg.compile_any_size(model)
    counts: GraphCounts = {}

    def count(purpose: str, size: str, call: Callable[[], Any]) -> None:
        before = len(tracer.graphs)
        call()
        counts.setdefault(purpose, {})[size] = len(tracer.graphs) - before

    with tracer.mode, tracer.in_place_of_inductor():
        if cfg.ttt_mode == "document":
            model.requires_grad_(False)
            buckets = tg.Adaptation(model, forward, cfg.plans[-1], DEVICE).buckets
            for rows, window in sizes_of_adaptation(cfg, buckets):
                call = partial(adapter_gradients, cfg, forward, rows, window)
                count("adaptation", f"{rows} x {window}", call)
        if cfg.ttt_mode == "chunk" or cfg.phased_ttt_num_phases:
            model.requires_grad_(True)
            for rows in rows_of_learning(cfg):
                call = partial(learn_row, cfg, forward, rows)
                count("learning by all weights", f"{rows} x {cfg.eval_seq_len}", call)
    return counts


# --- The public script ----------------------------------------------------------------------------
def bf16_rms_norm(
    x: Tensor, shape: tuple, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """rms_norm as the script had it.

    In PyTorch 2.13, but not yet in 2.11, autocast turns it to fp32, and then all that follows.
    """
    with torch.autocast("cuda", enabled=False):
        return torch.rms_norm(x, shape, weight, eps)


def linear_leaky_relu_square(
    a: Tensor, b: Tensor, aux: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Our operators in place of the script's launches of the same two MLP kernels."""
    if aux is None:
        return tg.mlp_up(a, b)
    return tg.mlp_dpre(a, b.t(), aux)


def trace_reference(script: Reference, cfg: tg.Config, row: tg.Batch) -> list[Graph]:
    """The script's training graphs, with our operators for its MLP."""
    script.module.linear_leaky_relu_square = linear_leaky_relu_square
    tracer = Tracer(len(row.inputs) * cfg.vocab_size)
    model = script.module.GPT(script.h)
    if cfg.dtype == torch.bfloat16:
        script.module.restore_fp32_params(model.bfloat16())
    model = tracer.move(model.train())
    batch = script.batch(row)
    for name, value in batch.items():
        if isinstance(value, Tensor):
            batch[name] = tracer.fake(value)
    forward = tracer.compiled(model, fullgraph=True, dynamic=False)
    with tracer.mode:
        script.prepare_rotary(model, len(row.inputs))
        for looped in depths(cfg):
            model.looping_active = looped
            with (
                autocasting(),
                script.autocast(),
                mock.patch.object(torch.nn.functional, "rms_norm", bf16_rms_norm),
            ):
                loss = tracer.named(forward, training_name(looped))(**batch)
            loss.backward()
    return tracer.graphs


# --- Tables ---------------------------------------------------------------------------------------
class Sums(NamedTuple):
    """Sums over kernels."""

    kernels: int
    gigabytes: float
    teraflops: float
    milliseconds: float  # modelled

    @classmethod
    def of(cls, kernels: list[Kernel], visits: float = 0) -> Sums:
        """Sums over kernels and the attention of so many visits of a full row."""
        nbytes = sum(kernel.nbytes for kernel in kernels)
        flops = sum(kernel.flops for kernel in kernels)
        seconds = sum(kernel.seconds() for kernel in kernels) + ATTENTION_S * visits
        return cls(len(kernels), nbytes / 1e9, flops / 1e12, 1e3 * seconds)

    def cells(self) -> str:
        """The sums as four cells of a table in Markdown."""
        sizes = f"{self.kernels} | {self.gigabytes:.2f} | {self.teraflops:.2f}"
        return f"{sizes} | {self.milliseconds:.2f} |"


class Section(NamedTuple):
    """A part of the output."""

    lines: list[str]  # in Markdown
    figures: dict[str, Any]  # for the last line


Systems = dict[str, list[Graph]]  # ours and, if there is one, the reference


def kernels_by_step(graphs: list[Graph]) -> dict[str, list[Kernel]]:
    """The kernels of each forward together with those of its backward."""
    steps: dict[str, list[Kernel]] = {}
    for graph in graphs:
        name = graph.name.removesuffix(", backward")
        steps.setdefault(name, []).extend(graph.kernels)
    return steps


def training_sums(systems: Systems, looped: bool, visits: float) -> dict[str, list[Sums]]:
    """Sums by job and over all of them, each for every system."""
    rows: dict[str, list[Sums]] = {job: [] for job in [*JOBS, "**all**"]}
    for graphs in systems.values():
        kernels = kernels_by_step(graphs)[training_name(looped)]
        for job in JOBS:
            of_job = [kernel for kernel in kernels if kernel.job == job]
            rows[job].append(Sums.of(of_job, visits if job == ATTENTION else 0))
        rows["**all**"].append(Sums.of(kernels, visits))
    return rows


def training_section(systems: Systems, looped: bool, visits: float) -> Section:
    """The table of a training step. `visits` have attention of ATTENTION_TOKENS tokens each."""
    name = training_name(looped)
    heads = [f" {system}: kernels | GB | TFLOP | ms |" for system in systems]
    lines = [
        f"## {name}, forward and backward",
        "",
        f"| job |{''.join(heads)}",
        f"|---|{'---|' * 4 * len(systems)}",
    ]
    rows = training_sums(systems, looped, visits)
    for job, sums in rows.items():
        if any(of_system.kernels for of_system in sums):
            lines.append(f"| {job} | {' '.join(of_system.cells() for of_system in sums)}")

    kept = {}
    for system, graphs in systems.items():
        kept[system] = sum(graph.kept for graph in graphs if graph.name == name) / 1e9
    cells = [f"{system} {gigabytes:.1f} GB" for system, gigabytes in kept.items()]
    lines += ["", f"Kept for the backward: {', '.join(cells)}", ""]

    ours, *others = rows["**all**"]
    bytes_ratio = None
    modelled_ratio = None
    if others:
        bytes_ratio = ours.gigabytes / others[0].gigabytes
        modelled_ratio = ours.milliseconds / others[0].milliseconds
    key = "looped" if looped else "plain"
    return Section(
        lines,
        {
            f"kernels_{key}": ours.kernels,
            f"gigabytes_{key}": ours.gigabytes,
            f"kept_{key}": kept["ours"],
            f"bytes_ratio_{key}": bytes_ratio,
            f"modelled_ratio_{key}": modelled_ratio,
        },
    )


def all_graphs_section(graphs: list[Graph]) -> Section:
    """The table of all graphs of a run, with what comes from the host and our operators."""
    lines = [
        "## Every graph of a run",
        "",
        "| graph | kernels | GB | TFLOP | ms without attention | from the host |",
        "|---|---|---|---|---|---|",
    ]
    from_host = []
    operators = {}
    for name, kernels in kernels_by_step(graphs).items():
        on_host = [kernel.name for kernel in kernels if kernel.job == HOST]
        lines.append(f"| {name} | {Sums.of(kernels).cells()} {len(on_host)} |")
        from_host += [f"{name}: {kernel}" for kernel in on_host]
        ours = [kernel.name for kernel in kernels if kernel.name.startswith("golf")]
        operators[name] = collections.Counter(ours)
    return Section(lines, {"host": from_host, "operators": operators})


def all_sections(cfg: tg.Config, row: tg.Batch, systems: Systems) -> Section:
    """The head of the output, and the tables of kernels."""
    versions = f"PyTorch {torch.__version__}, Triton {triton.__version__}"
    lines = [
        f"# Graphs lowered for sm_90 ({versions}), nothing executed",
        "",
        f"Written by `python bench/graphs.py`. {cfg.preset}: {cfg.num_layers} layers, "
        f"width {cfg.model_dim}, vocabulary {cfg.vocab_size}, rows of {len(row.inputs)} tokens.",
        "GB: arguments and results of kernels. "
        "ms: modelled, not measured: the larger of FLOPs / 650 T and bytes /",
        "2.85 TB/s, plus 1.5 us a kernel; attention 2.09 ms a visit of 98,304 tokens.",
        "",
    ]
    figures: dict[str, Any] = {}
    for looped in depths(cfg):
        visits = len(cfg.plans[looped]) * len(row.inputs) / ATTENTION_TOKENS
        section = training_section(systems, looped, visits)
        lines += section.lines
        figures |= section.figures
    section = all_graphs_section(systems["ours"])
    return Section(lines + section.lines, figures | section.figures)


def sizes_section(counts: GraphCounts) -> Section:
    """A line for each purpose: how many graphs were compiled at each size."""
    lines = [
        "",
        "## Sizes of one compiled graph",
        "",
        "Graphs compiled, forward and backward, at rows x tokens, one after another; "
        "warm-up's size is the first.",
        "",
    ]
    for purpose, of_sizes in counts.items():
        cells = [f"{size}: {count}" for size, count in of_sizes.items()]
        lines.append(f"- {purpose}: {', '.join(cells)}")
    return Section(lines, {"sizes": counts})


# --- The run --------------------------------------------------------------------------------------
def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, help="the public script")
    parser.add_argument(
        "--out", type=Path, help="where the tables go; default: nowhere but the screen"
    )
    parser.add_argument(
        "--sources", type=Path, help="a folder for the Python module written for each graph"
    )
    return parser.parse_args(argv)


def check_writable(out: Path | None, sources: Path | None) -> None:
    """Creates the file and the folder for the results. Raises UsageError if that is impossible."""
    try:
        if out:
            out.touch()
        if sources:
            sources.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise tg.UsageError(str(error)) from error


def write_sources(systems: Systems, folder: Path) -> None:
    """Writes the Python module of each graph into the folder."""
    for system, graphs in systems.items():
        for graph in graphs:
            name = f"{system}, {graph.name}.py".replace(", ", "-").replace(" ", "_")
            (folder / name).write_text(graph.source)


def run(args: argparse.Namespace, env: Mapping[str, str]) -> dict[str, Any]:
    """Lowers, prints and writes what is asked for; returns the figures. Raises UsageError."""
    cfg = prepare(env)
    row = full_row(cfg, cfg.row_shape, torch.device("cpu"))
    # A script or a path that cannot be used is an error before minutes of work.
    script = None
    if args.reference:
        script = Reference(args.reference, cfg, DEVICE, "torch")
    check_writable(args.out, args.sources)

    systems = {"ours": trace_ours(cfg, row)}
    if script:
        systems["reference"] = trace_reference(script, cfg, row)
    lines, figures = all_sections(cfg, row, systems)
    if cfg.ttt_enabled:
        sizes = sizes_section(trace_sizes(cfg))
        lines += sizes.lines
        figures |= sizes.figures
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)
    if args.sources:
        write_sources(systems, args.sources)
    return figures


def main(argv: list[str]) -> int:
    """Prints the tables. Exit status 2 if environment, script or a path cannot be used."""
    args = parse_arguments(argv)
    if MISSING:
        print(f"bench/graphs.py: nothing lowered: {MISSING}")
        print('bench {"target": "sm_90", "host": null}')
        return 0
    try:
        preset = "pr1560" if args.reference else "record"
        figures = run(args, {"PRESET": preset, **os.environ})
    except tg.UsageError as error:
        print(f"bench/graphs.py: {error}", file=sys.stderr)
        return 2
    print("bench " + json.dumps({"target": "sm_90", **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
