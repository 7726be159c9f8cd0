"""What the compiler makes of a run's graphs on Hopper, without a GPU: kernels, bytes, products, copies from the host.

    PRESET=record python bench/graphs.py [--reference FILE] [--out bench/results/graphs_sm90.md] [--sources FOLDER]

Every compiled graph (training with and without loops, scoring, a step of adaptation, the optimizers' passes) is
traced on fake CUDA tensors and lowered by Inductor to its Triton source for sm_90, as at the start of a run on an H100;
nothing is executed. Counted per kernel: bytes of its arguments and results, FLOPs of products. Modelled from them: the
larger of FLOPs / 650 TFLOP/s and bytes / 2.85 TB/s, plus 1.5 us a kernel; attention is library code, the same for all:
2.09 ms a visit. A model is no measurement: bench/step.py measures.

With --reference also the public script's training graphs (see bench/reference.py), in the same process. Needs a CPU
build of PyTorch (written for 2.13), Triton and g++. The last line is `bench ` and one JSON object; null is what was not
counted."""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import math
import os
import sys
from collections.abc import Callable
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

FLOP_RATE, BYTE_RATE, LAUNCH = (
    650e12,
    2.85e12,
    1.5e-6,
)  # per second, per second, seconds: assumed of an H100
ATTENTION = (
    2.09e-3  # seconds of a visit's attention, forward and backward, on 98,304 tokens: assumed too
)
JOBS = [
    "products",
    "MLP with activation",
    "attention",
    "head loss",
    "norms, RoPE, XSA, residuals",
    "host",
]


class Kernel(NamedTuple):
    job: str
    name: str
    nbytes: float
    flops: float

    def seconds(self) -> float:  # modelled
        return (
            0.0
            if self.job == "attention"
            else LAUNCH + max(self.flops / FLOP_RATE, self.nbytes / BYTE_RATE)
        )


class Graph(NamedTuple):
    name: str
    kernels: list[Kernel]
    kept: int  # bytes that a forward keeps for its backward
    source: str  # the Python module that would run


class Lowered(Exception): ...  # carries what was counted out of the compiler


def nbytes(values: Any) -> float:  # of the tensors or buffers among them, of a view what it shows
    total = 0.0
    for x in torch.utils._pytree.tree_leaves(values):
        if isinstance(x, Tensor):
            total += int(x.numel()) * x.element_size()
        elif isinstance(x, ir.IRNode):
            total += math.prod(map(int, x.get_size())) * x.get_dtype().itemsize
    return total


def counted(node: Any, moved: float, logits: int) -> Kernel | None:
    """A scheduler's node as a kernel; nothing if it launches none. `moved`: its bytes as Inductor counts them, a view
    as its whole buffer; `logits`: how many values those have."""
    inner, kind, device = node.node, type(node).__name__, node.get_device()
    if "Nop" in kind or isinstance(inner, ir.MultiOutput):
        return None
    if (
        isinstance(inner, ir.DeviceCopy | ir.DynamicScalar)
        or device is None
        or device.type == "cpu"
    ):
        return Kernel("host", f"{kind} {node.get_name()}", moved, 0.0)
    if not isinstance(inner, ir.ExternKernel):
        parts = node.get_nodes()
        deps = (
            d
            for part in parts
            for d in part.read_writes.reads_and_writes()
            if hasattr(d, "get_numel")
        )
        names = {
            origin.name.rstrip("_0123456789") for part in parts for origin in part.node.origins
        }
        job = JOBS[3] if logits in {int(d.get_numel()) for d in deps} else JOBS[4]
        return Kernel(job, ",".join(sorted(names)), moved, 0.0)
    name, inputs = str(inner.op_overload or inner.python_kernel_name), inner.inputs
    outputs = list(getattr(inner, "outputs", ())) or [inner] * (
        not isinstance(inner.layout, ir.NoneLayout)
    )
    changed = (
        inputs[:1] if "softcap_ce" in name and True in inner.constant_args else []
    )  # in place, for a gradient
    moved, shapes = (
        nbytes([*inputs, *outputs, *changed]),
        [[int(n) for n in x.get_size()] for x in inputs],
    )
    flops = (
        2.0 * math.prod(shapes[-2]) * shapes[-1][-1] if "mm" in name else 0.0
    )  # [bias,] a (.., m, k), b (.., k, n)
    if "mlp_" in name:  # x (T, C) and w_up (F, C), or dy (T, C) and w_down (C, F)
        flops = 2.0 * math.prod(shapes[0]) * math.prod(shapes[1]) / shapes[0][1]
    jobs = {
        "mlp_": JOBS[1],
        "attn": JOBS[2],
        "attention": JOBS[2],
        "sdpa": JOBS[2],
        "softcap_ce": JOBS[3],
    }
    job = next((job for part, job in jobs.items() if part in name), JOBS[0] if flops else JOBS[4])
    return Kernel(job, name, moved, flops)


class Tracer:
    """A backend for torch.compile that lowers and counts; what it returns computes shapes on fake tensors."""

    def __init__(self, logits: int):
        self.mode, self.graphs, self.name, self.logits = (
            FakeTensorMode(allow_non_fake_inputs=True),
            [],
            "",
            logits,
        )

    def fake(self, t: Tensor) -> Tensor:
        t = self.mode.from_tensor(t.detach())
        with self.mode:
            return t.to(DEVICE)

    def move(self, module: nn.Module) -> nn.Module:  # its parameters and buffers become fake
        for part in module.modules():
            for name, p in part._parameters.items():
                part._parameters[name] = (
                    None if p is None else nn.Parameter(self.fake(p), p.requires_grad)
                )
            for name, b in part._buffers.items():
                part._buffers[name] = None if b is None else self.fake(b)
        return module

    def finish(self, graph: GraphLowering) -> None:
        source, _ = graph.codegen()
        found = [counted(node, 4.0 * words, self.logits) for node, words in graph.count_bytes()[1]]
        raise Lowered([kernel for kernel in found if kernel], source.value)

    def kept(self, module: torch.fx.GraphModule) -> float:  # bytes of a graph's results
        return nbytes([n.meta.get("val") for n in [*module.graph.nodes][-1].all_input_nodes])

    def inner(self, module: torch.fx.GraphModule, inputs: list, **options: Any) -> Callable:
        kept, run = self.kept(module), torch.fx.GraphModule(module, copy.deepcopy(module.graph))
        try:
            with hopper(self.finish):
                compile_fx.compile_fx_inner(module, inputs, **options)
        except Exception as error:
            while not isinstance(error, Lowered):
                if (error := error.__cause__ or error.__context__) is None:
                    raise
            name = self.name + (", backward" if options.get("is_backward") else "")
            self.graphs.append(Graph(name, error.args[0], int(kept), error.args[1]))
        return make_boxed_func(run.forward)

    def compiled(self, function: Callable, **options: Any) -> Callable:
        return torch.compile(
            function, backend=partial(compile_fx.compile_fx, inner_compile=self.inner), **options
        )

    def named(
        self, call: Callable, name: str
    ) -> Callable:  # of the graphs that a call or its backward compiles
        def run(*args: Any, **kwargs: Any) -> Any:
            self.name = name
            return call(*args, **kwargs)

        return run


class AnySize(Tracer):
    """Lowers graphs whose sizes are symbols: counts the graphs, not their bytes."""

    def kept(self, module: torch.fx.GraphModule) -> float:
        return 0.0

    def finish(self, graph: GraphLowering) -> None:
        graph.codegen()
        raise Lowered([], "")

    def in_place_of_inductor(
        self,
    ) -> contextlib.AbstractContextManager:  # for a torch.compile that names no backend
        compiler = partial(compile_fx.compile_fx, inner_compile=self.inner)
        return mock.patch.object(compile_fx, "compile_fx", compiler)


# --- What is lowered ---
def prepare(env: dict[str, str]) -> tg.Config:
    """Once, before anything is lowered. Attention is torch's own for variable lengths, which traces without a GPU."""
    inductor_config.joint_graph_constant_folding, inductor_config.force_disable_caches = (
        False,
        True,
    )  # it would compute
    cfg, _ = tg.Config.from_env(env, has_cuda=True)
    tg.configure_torch(cfg)
    tg.ATTENTION["torch"] = tg.load_attention("torch")
    return cfg


def trace_ours(cfg: tg.Config, row: tg.Batch) -> list[Graph]:
    """Every graph of a run."""
    tracer = Tracer(len(row.inputs) * cfg.vocab_size)
    model, row = (
        tracer.move(tg.GPT(cfg, "torch")),
        tg.Batch(*map(tracer.fake, row[:3]), row.max_seqlen),
    )
    forward = tracer.compiled(model, fullgraph=True, dynamic=False)
    with tracer.mode:
        for looped in range(1 + (cfg.num_loops > 0)):
            once = tracer.named(forward, "training" + ", looped" * looped)
            tg.backward_row(once, cfg.plans[looped], row, torch.ones((), device=DEVICE))
        with torch.no_grad():
            tracer.named(forward, "scoring")(row, cfg.plans[-1])
        if cfg.ttt_enabled and cfg.ttt_mode == "document":
            trace_adaptation(tracer, cfg, model)
        for name in [
            name for name, role in tg.parameter_table(cfg).items() if role.group == "muon"
        ]:
            masters = [torch.empty_like(model.get_parameter(name)) for _ in range(4)]
            sent, rates = masters[0].to(cfg.dtype), torch.empty(4, device=DEVICE)
            tracer.named(tracer.compiled(tg.muon_step, dynamic=False), f"Muon, {name}")(
                *masters, sent, rates, cfg
            )
    return tracer.graphs


def trace_adaptation(tracer: Tracer, cfg: tg.Config, model: tg.GPT) -> None:
    """A step of a full batch in the longest window, as Adaptation.forward_chunk and .apply_gradients call it, of fixed sizes."""
    forward = tracer.compiled(model.requires_grad_(False), fullgraph=True, dynamic=False)
    master, lora, grads = adapt(
        cfg, tracer.named(forward, "adaptation"), cfg.ttt_batch_size, cfg.ttt_eval_seq_len
    )
    for name, leaf, whole, grad in zip(
        ("down", "up", "bias"), lora.leaves, master.leaves, grads, strict=False
    ):
        update, t = tracer.compiled(tg.adapter_update, dynamic=False), torch.ones((), device=DEVICE)
        moments = [torch.empty_like(whole)] * (
            1 + (cfg.ttt_beta1 > 0) * (cfg.ttt_optimizer != "sgd")
        )
        with torch.no_grad():
            tracer.named(update, f"adapters, {name}")(
                leaf, whole.detach(), grad, moments, t, t.double(), cfg
            )


def adapt(
    cfg: tg.Config, forward: Callable, rows: int, n: int
) -> tuple[tg.LoRA, tg.LoRA, tuple[Tensor, ...]]:
    """The adapters of `rows` documents, what a forward over windows of n reads of them, and their gradient."""
    master = tg.LoRA.zeros(cfg, rows, len(cfg.plans[-1]), DEVICE)
    lora = master.to(cfg.dtype).rows(slice(None))
    ids, ends = (
        torch.zeros(rows * n, dtype=torch.int64, device=DEVICE),
        torch.zeros(2 * rows + 1, device=DEVICE),
    )
    batch = tg.Batch(ids, ids.clone(), ends.int(), cfg.ttt_eval_seq_len)
    nats = forward(batch, cfg.plans[-1], lora=lora, select=ids[: rows * cfg.ttt_chunk_size].clone())
    return master, lora, torch.autograd.grad(nats.sum(), lora.leaves)


def trace_sizes(cfg: tg.Config) -> dict[str, dict[str, int]]:
    """graph -> size -> how many graphs were compiled at it, warm-up's size first, by the run's own torch.compile. On a
    GPU Inductor may split a graph by size, as it does not on a CPU."""
    tracer, found, longest = AnySize(0), {}, cfg.eval_seq_len
    model = tracer.move(tg.GPT(cfg, "torch"))
    forward = tg.compile_any_size(model)

    def count(graph: str, size: str, call: Callable[[], Any]) -> None:
        before = len(tracer.graphs)
        call()
        found.setdefault(graph, {})[size] = len(tracer.graphs) - before

    with tracer.mode, tracer.in_place_of_inductor():
        if cfg.ttt_mode == "document":
            model.requires_grad_(False)
            buckets, most = (
                tg.Adaptation(model, forward, cfg.plans[-1], DEVICE).buckets,
                cfg.ttt_batch_size,
            )
            buckets = buckets or [
                cfg.ttt_chunk_size,
                cfg.ttt_eval_seq_len,
            ]  # TTT_BUCKETS=0: every length
            warm_up = max(2 * cfg.ttt_chunk_tokens, cfg.val_row_shape[0]) // (
                cfg.ttt_eval_seq_len + cfg.ttt_chunk_size
            )
            shorter = buckets[0], buckets[(len(buckets) - 1) // 2]
            sizes = (
                (min(8 + warm_up // 8 * 8, most), shorter[0]),
                *product((8, 16, most), (*shorter, buckets[-1])),
            )
            for rows, n in dict.fromkeys(
                (*sizes, *product([4 * most], shorter))
            ):  # 4: see tg.plan_batches
                count("adaptation", f"{rows} x {n}", partial(adapt, cfg, forward, rows, n))
        if cfg.ttt_mode == "chunk" or cfg.phased_ttt_num_phases:
            model.requires_grad_(True)

            def learn(rows: int) -> None:
                ids, ends = (
                    torch.zeros(n, dtype=torch.int64, device=DEVICE) for n in (rows * longest, 65)
                )
                forward(
                    tg.Batch(ids, ids.clone(), ends.int(), longest), cfg.plans[-1]
                ).sum().backward()

            for world in (1, 2, 4, 8, cfg.ttt_chunk_tokens):  # the last: a row each
                rows = -(-min(cfg.ttt_chunk_tokens // longest, cfg.ttt_batch_seqs * world) // world)
                count("learning by all weights", f"{rows} x {longest}", partial(learn, rows))
    return found


def bf16_rms_norm(
    x: Tensor, shape: tuple, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """As the script had it: in torch 2.13, not yet in 2.11, autocast makes it fp32, and then all that follows."""
    with torch.autocast("cuda", enabled=False):
        return torch.rms_norm(x, shape, weight, eps)


def trace_reference(script: Reference, cfg: tg.Config, row: tg.Batch) -> list[Graph]:
    """The script's training graphs, with our operators in place of its launches of the same two MLP kernels."""
    script.module.linear_leaky_relu_square = lambda a, b, aux=None: (
        tg.mlp_up(a, b) if aux is None else tg.mlp_dpre(a, b.t(), aux)
    )
    tracer, model = Tracer(len(row.inputs) * cfg.vocab_size), script.module.GPT(script.h)
    if cfg.dtype == torch.bfloat16:
        script.module.restore_fp32_params(model.bfloat16())
    model = tracer.move(model.train())
    batch = {
        k: tracer.fake(v) if isinstance(v, Tensor) else v for k, v in script.batch(row).items()
    }
    forward = tracer.compiled(model, fullgraph=True, dynamic=False)
    with tracer.mode:
        for block in model.blocks:
            if hasattr(block.attn, "rotary"):  # filled before anything is compiled, as it does
                block.attn.rotary(len(row.inputs), DEVICE, cfg.dtype)
        for looped in range(1 + (cfg.num_loops > 0)):
            model.looping_active = bool(looped)
            with (
                autocasting(),
                script.autocast(),
                mock.patch.object(torch.nn.functional, "rms_norm", bf16_rms_norm),
            ):
                loss = tracer.named(forward, "training" + ", looped" * looped)(**batch)
            loss.backward()
    return tracer.graphs


# --- Tables ---
class Sums(NamedTuple):
    kernels: int
    gigabytes: float
    teraflops: float
    milliseconds: float  # modelled

    @classmethod
    def of(cls, kernels: list[Kernel], visits: int = 0) -> Sums:
        moved, flops = sum(k.nbytes for k in kernels), sum(k.flops for k in kernels)
        seconds = sum(k.seconds() for k in kernels) + ATTENTION * visits
        return cls(len(kernels), moved / 1e9, flops / 1e12, 1e3 * seconds)


def steps(
    graphs: list[Graph],
) -> dict[str, list[Kernel]]:  # a forward's kernels and its backward's together
    found: dict[str, list[Kernel]] = {}
    for graph in graphs:
        found.setdefault(graph.name.removesuffix(", backward"), []).extend(graph.kernels)
    return found


def training_table(
    cfg: tg.Config, systems: dict[str, list[Graph]], looped: bool, visits: float
) -> tuple[list, dict]:
    """Lines of Markdown, and what the last line says; `visits` have attention's size at 98,304 tokens."""
    name, key = "training" + ", looped" * looped, "looped" if looped else "plain"
    kernels = [steps(graphs)[name] for graphs in systems.values()]
    rows = {
        job: [
            Sums.of([k for k in ks if k.job == job], visits * (job == "attention"))
            for ks in kernels
        ]
        for job in JOBS
    } | {"**all**": [Sums.of(ks, visits) for ks in kernels]}
    head = "".join(f" {system}: kernels | GB | TFLOP | ms |" for system in systems)
    lines = [
        f"## {name}, forward and backward",
        "",
        f"| job |{head}",
        "|---|" + "---|" * 4 * len(systems),
    ]
    for job, sums in rows.items():
        if any(s.kernels for s in sums):
            lines.append(
                f"| {job} |"
                + "".join(f" {s[0]} | {s[1]:.2f} | {s[2]:.2f} | {s[3]:.2f} |" for s in sums)
            )
    kept = {
        system: sum(g.kept for g in graphs if g.name == name) / 1e9
        for system, graphs in systems.items()
    }
    lines += [
        "",
        "Kept for the backward: " + ", ".join(f"{system} {k:.1f} GB" for system, k in kept.items()),
        "",
    ]
    ours, *others = rows["**all**"]
    bytes_ratio, ms_ratio = next(
        ((ours[1] / other[1], ours[3] / other[3]) for other in others), (None, None)
    )
    return lines, {
        f"kernels_{key}": ours.kernels,
        f"gigabytes_{key}": ours.gigabytes,
        f"kept_{key}": kept["ours"],
        f"bytes_ratio_{key}": bytes_ratio,
        f"modelled_ratio_{key}": ms_ratio,
    }


def tables(
    cfg: tg.Config, row: tg.Batch, systems: dict[str, list[Graph]]
) -> tuple[str, dict[str, Any]]:
    """Markdown, and what the last line says."""
    lines = [
        f"# Graphs lowered for sm_90 (PyTorch {torch.__version__}, Triton {triton.__version__}), nothing executed",
        "",
        f"Written by `python bench/graphs.py`. {cfg.preset}: {cfg.num_layers} layers, width {cfg.model_dim}, "
        f"vocabulary {cfg.vocab_size}, rows of {len(row.inputs)} tokens.",
        "GB: arguments and results of kernels. ms: modelled, not measured: the larger of FLOPs / 650 T and bytes /",
        "2.85 TB/s, plus 1.5 us a kernel; attention 2.09 ms a visit of 98,304 tokens.",
        "",
    ]
    found: dict[str, Any] = {}
    for looped in (False, True)[: 1 + (cfg.num_loops > 0)]:
        visits = len(cfg.plans[looped]) * len(row.inputs) / 98304
        table, values = training_table(cfg, systems, looped, visits)
        lines, found = lines + table, found | values
    lines += [
        "## Every graph of a run",
        "",
        "| graph | kernels | GB | TFLOP | ms without attention | from the host |",
        "|---|---|---|---|---|---|",
    ]
    for name, kernels in steps(systems["ours"]).items():
        sums, host = Sums.of(kernels), sum(k.job == "host" for k in kernels)
        lines.append(
            f"| {name} | {sums[0]} | {sums[1]:.2f} | {sums[2]:.2f} | {sums[3]:.2f} | {host} |"
        )
    ours = steps(systems["ours"]).items()
    found["host"] = [
        f"{name}: {k.name}" for name, kernels in ours for k in kernels if k.job == "host"
    ]
    found["operators"] = {
        n: collections.Counter(k.name for k in ks if k.name.startswith("golf")) for n, ks in ours
    }
    return "\n".join(lines) + "\n", found


def sizes_table(sizes: dict[str, dict[str, int]]) -> str:
    lines = [
        "## Sizes of one compiled graph",
        "",
        "Graphs compiled, forward and backward, at rows x tokens, one after "
        "another; warm-up's size is the first.",
        "",
    ]
    for graph, counts in sizes.items():
        lines += [f"- {graph}: " + ", ".join(f"{size}: {count}" for size, count in counts.items())]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
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
    given = parser.parse_args(argv)
    if MISSING:
        print(
            f"bench/graphs.py: nothing lowered: {MISSING}",
            'bench {"target": "sm_90", "host": null}',
            sep="\n",
        )
        return 0
    try:
        cfg = prepare({"PRESET": "record"} | dict(os.environ))
        row = full_row(cfg, cfg.row_shape, torch.device("cpu"))
        script = given.reference and Reference(
            given.reference, cfg, DEVICE, "torch"
        )  # refused before minutes of work
        try:
            if given.out:
                given.out.touch()
            if given.sources:
                given.sources.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise tg.UsageError(str(error)) from error
        systems = {"ours": trace_ours(cfg, row)}
        if script:
            systems["reference"] = trace_reference(script, cfg, row)
    except tg.UsageError as error:
        print(f"bench/graphs.py: {error}", file=sys.stderr)
        return 2
    table, found = tables(cfg, row, systems)
    if cfg.ttt_enabled:
        found["sizes"] = trace_sizes(cfg)
        table += "\n" + sizes_table(found["sizes"])
    print(table)
    if given.out:
        given.out.write_text(table)
    for system, graphs in systems.items() if given.sources else ():
        for graph in graphs:
            (
                given.sources / f"{system}, {graph.name}.py".replace(", ", "-").replace(" ", "_")
            ).write_text(graph.source)
    print("bench " + json.dumps({"target": "sm_90", **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
