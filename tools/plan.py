"""What a run will need, predicted in seconds, without a GPU and without data.

    python train_gpt.py --plan                   # PRESET=record; knobs are environment variables
    PRESET=pr1530 MLP_MULT=3 python train_gpt.py --plan

Printed are the parameters and the predicted bytes, the graphs with their kernels, the most memory
that each phase takes of a GPU, the steps that fit into the budget on 8xH100, and the seconds of the
adaptation. The phases run on fake tensors of full size: they have shapes and no values.

How each figure is made:

* Bytes: predict_submission_bytes() of train_gpt.py.
* Memory: that of the compiled graphs as in fused_graph.py, that of the optimisers, the calibration
  and the quantiser by running their own code and adding up the tensors that are alive.
* A step: for each kernel the larger of FLOPs / 650 TFLOP/s and bytes / 2.85 TB/s, plus 1.5 us;
  attention by its FLOPs. This is 1/1.08 of what the clock of PR #1530's logs says. Its optimiser
  takes about 5 ms.
* Adaptation: the same, on documents as long as FineWeb's, times 1.2 to 1.4. The log of PR #1530
  says 1.4 times what is modelled for it.

A model is no measurement: bench/gpu.sh measures. The last line is `plan ` and one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import terminal  # noqa: E402
import torch  # noqa: E402
from canonical import DOCUMENTS, SP8192_TOKENS  # noqa: E402
from document_lengths import fineweb_lengths  # noqa: E402
from fused_graph import BYTES_PER_S, FLOPS_PER_S, LAUNCH_S, FusedGraph, Kernel, trace  # noqa: E402
from tables import markdown_table  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import train_gpt as tg  # noqa: E402

CPU = torch.device("cpu")
NUM_GPUS = 8
GPU_BYTES = {"H100": 80e9, "H200": 141e9}
# What CUDA and the libraries take beside tensors, about.
CONTEXT_BYTES = 1.5e9
# Columns of the matrices on which the solver is tried.
NARROW = 16

# Attention, forward and backward, of one visit in PR #1530's step on an H100, and its size: tokens,
# mean tokens that a token sees, width of all query heads. Windows of equal length fill the tiles of
# the kernel better than documents: 0.65 of the time (modelled).
ATTENTION_S = 2.09e-3
ATTENTION_SIZE = 98304 * 610 * 512
WINDOWS_FACTOR = 0.65
# The clock over the model, and the optimiser of 35.9 M parameters on 8 GPUs: logs of PR #1530.
CLOCK_FACTOR = 1.08
OPTIMISER_S = 5e-3
OPTIMISER_PARAMETERS = 35.9e6
# The same ratio for the adaptation: 1.4 in that log. Without its copies that wait for the GPU and
# its graph of dynamic shapes 1.2 are expected.
ADAPTATION_FACTORS = (1.2, 1.4)
# The reserve for compression where a run measures it: PR #1530's.
RESERVE_S = 13.0


# --- Memory of code that is not compiled ----------------------------------------------------------
class LiveBytes(TorchDispatchMode):
    """Adds up the memory of all tensors made in its body; `peak` is the most at once.

    Numbers that the code reads from a tensor have no value here: True for a bool, else 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and counts what it allocates."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.count(value.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage until it is freed."""
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()

        def forget(_: weakref.ref) -> None:
            del self.known[key]
            self.live -= size

        self.known[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


class OneOfMany(tg.Ranks):
    """Rank 0 of several, alone in its process: nothing is sent and nothing arrives."""

    def __init__(self, world_size: int):
        super().__init__({})
        self.world_size = world_size
        self.device = CPU


class UnreadQuantizer(tg.Quantizer):
    """The quantiser without what it reads on the host: all column scales are 1."""

    def find_columns(self) -> dict:
        """No exponents."""
        return {}

    def bank_scales(self, exponents: dict) -> dict[str, Tensor]:
        """Scales of 1, fp32 (n, cols)."""
        return {bank: torch.ones(n, cols) for bank, (n, _, cols) in self.shapes.items()}

    def theta_for(self, budget: float) -> float:
        """Any theta."""
        return 1.0

    def solve_once(self) -> None:
        """Solves every bank, as matrices of as many values but at most 16 columns.

        Each column takes a turn of the solver's loop, and all take the same memory.
        """
        for solver in self.solvers.values():
            n, columns = solver.order.shape
            columns = min(columns, NARROW)
            weight = solver.weight.view(n, columns, -1)
            upper = solver.upper[:, :columns, :columns]
            narrow = tg.GptqSolver(weight, solver.order[:, :columns], upper)
            scale = torch.ones(n, columns)
            narrow.solve(torch.ones(n, weight.size(2)), scale, 1)


# --- Graphs ---------------------------------------------------------------------------------------
class FunctionalGPT(tg.GPT):
    """The network, where any tensor may stand for a parameter."""

    def get_parameter(self, name: str) -> Tensor:
        """A parameter, or the tensor that stands for it."""
        return getattr(self, name)


class GraphPlan(NamedTuple):
    """The predicted figures of one forward, or of forward and backward."""

    name: str
    kernels: list[Kernel]
    visits: int  # of layers
    tokens: int
    peak_bytes: int  # of what the graph makes
    attention_s: float

    @property
    def nbytes(self) -> float:
        """Bytes that all kernels read and write."""
        return sum(kernel.nbytes for kernel in self.kernels)

    @property
    def flops(self) -> float:
        """FLOPs of all products but attention's."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def seconds(self) -> float:
        """The modelled seconds on an H100."""
        return sum(kernel.seconds() for kernel in self.kernels) + self.attention_s


def mean_context(cfg: tg.Config, lengths: np.ndarray) -> float:
    """How many tokens a token of training sees on average.

    lengths: those of documents. They are cut at TRAIN_SEQ_LEN unless rows cross documents.
    """
    longest = cfg.train_seq_len
    if cfg.data_loader != "documents":
        return longest / 2
    whole, rest = np.divmod(lengths, longest)
    return float((whole * longest**2 + rest**2).sum() / 2 / lengths.sum())


class Tracing:
    """The network on fake tensors, and the graphs that are traced of it."""

    def __init__(self, cfg: tg.Config, lengths: np.ndarray):
        """lengths: tokens of the documents."""
        self.cfg = cfg
        self.lengths = lengths
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            self.model = FunctionalGPT(cfg, "sdpa")
        self.names = [name for name, _ in self.model.named_parameters()]

    def fake_row(self, row: tg.Batch) -> tg.Batch:
        """A row of fake tensors."""
        tensors = (row.inputs, row.targets, row.cu_seqlens)
        return tg.Batch(*map(self.mode.from_tensor, tensors), row.max_seqlen)

    def call(self, parameters: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The forward with these tensors as parameters."""
        named = dict(zip(self.names, parameters, strict=True))
        return torch.func.functional_call(self.model, named, args, kwargs)

    def adapter_values(self) -> int:
        """How many values the adapters of one document have."""
        with self.mode:
            lora = tg.LoRA.zeros(self.cfg, 1, len(self.cfg.plans[-1]), CPU)
        return sum(leaf.numel() for leaf in lora.leaves)

    def plan_of(
        self, name: str, modules: list[torch.fx.GraphModule], tokens: int, context: float
    ) -> GraphPlan:
        """The figures of a traced forward and backward, whose tokens see `context` others."""
        graphs = [FusedGraph(module) for module in modules]
        kernels = [kernel for graph in graphs for kernel in graph.kernels()]
        visits = len(self.cfg.plans[-1])
        size = tokens * context * self.cfg.model_dim
        attention_s = visits * ATTENTION_S * size / ATTENTION_SIZE
        peak = max(graph.peak_bytes() for graph in graphs)
        return GraphPlan(name, kernels, visits, tokens, peak, attention_s)

    def training(self) -> GraphPlan:
        """Forward and backward of a row, at the greatest depth."""
        cfg = self.cfg
        plan = cfg.plans[-1]
        row = self.fake_row(tg.synthetic_row(cfg, cfg.row_shape, CPU))

        def loss(parameters: list[Tensor], *tensors: Tensor) -> Tensor:
            return self.call(parameters, tg.Batch(*tensors, row.max_seqlen), plan).sum()

        with self.mode:
            parameters = list(self.model.parameters())
            modules = trace(loss, [parameters, *row[:3]], cfg.compile)
        context = mean_context(cfg, self.lengths)
        name = "training, looped" if cfg.num_loops else "training"
        return self.plan_of(name, modules, len(row.inputs), context)

    def adaptation(self) -> GraphPlan:
        """A chunk of TTT_BATCH_SIZE documents in whole windows, as Adaptation runs it."""
        cfg = self.cfg
        plan = cfg.plans[-1]
        rows, window = cfg.ttt_batch_size, cfg.ttt_eval_seq_len
        with self.mode:
            lora = tg.LoRA.zeros(cfg, rows, len(plan), CPU).to(cfg.dtype).rows(slice(None))
            ids = torch.zeros(rows * window, dtype=torch.int64)
            offsets = torch.zeros(2 * rows + 1, dtype=torch.int32)
            select = ids[: rows * cfg.ttt_chunk_size].clone()

            def loss(leaves: list[Tensor], parameters: list[Tensor], *tensors: Tensor) -> Tensor:
                *row, chosen = tensors
                nats = self.call(
                    parameters,
                    tg.Batch(*row, window),
                    plan,
                    lora=lora.with_leaves(leaves),
                    select=chosen,
                )
                return nats.sum()

            frozen = [parameter.detach() for parameter in self.model.parameters()]
            inputs = [lora.leaves, frozen, ids, ids.clone(), offsets, select]
            modules = trace(loss, inputs, cfg.compile)
        name = f"adaptation, {rows} x {window}"
        return self.plan_of(name, modules, len(ids), WINDOWS_FACTOR * window / 2)


# --- Memory ---------------------------------------------------------------------------------------
def bytes_of(tensors: Any) -> int:
    """Bytes of all tensors in lists, tuples and dictionaries."""
    leaves = tree_leaves(tensors)
    return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))


class MemoryPlan:
    """The most bytes of tensors that each phase takes of one GPU."""

    def __init__(self, tracing: Tracing, ranks: OneOfMany):
        self.cfg = tracing.cfg
        self.tracing = tracing
        self.ranks = ranks
        # Weights, averages, momentum and messages are there until the end of the run.
        with tracing.mode, LiveBytes() as memory:
            model = tg.GPT(self.cfg)
            optimizers = tg.Optimizers(model, self.cfg, ranks)
            for leaf in optimizers.leaves:
                leaf.grad = torch.zeros_like(leaf)
            optimizers.adam.step()
            for leaf in optimizers.leaves:
                leaf.grad = None
            self.state_bytes = memory.live

    def training(self, graph: GraphPlan) -> int:
        """A step: the optimisers' state, the gradients of earlier rows, and a row's graphs."""
        rows = math.ceil(self.cfg.rows_per_step / self.ranks.world_size)
        gradients = bytes_of(list(self.tracing.model.parameters()))
        return self.state_bytes + graph.peak_bytes + (gradients if rows > 1 else 0)

    def hessians(self) -> tuple[dict | None, int]:
        """The Hessians, and the most bytes while they are collected from a row."""
        cfg = self.cfg
        if cfg.no_hessians:
            return None, 0
        row = self.tracing.fake_row(tg.synthetic_row(cfg, cfg.row_shape, CPU))
        with LiveBytes() as memory:
            model = self.tracing.model
            hessians = tg.collect_hessians(model, cfg.plans[-1], [row], self.ranks)
        return hessians, memory.peak

    def compression(self, graph: GraphPlan) -> tuple[int, int]:
        """Calibration, and quantisation with its solver."""
        cfg = self.cfg
        with self.tracing.mode:
            hessians, calibration = self.hessians()
            sensitivities = None
            if cfg.quantizer == "allocated":
                calibration = max(calibration, bytes_of(hessians) + graph.peak_bytes)
                sensitivities = {
                    bank: torch.ones(shape[:2]) for bank, shape in tg.bank_shapes(cfg).items()
                }
            kept = self.state_bytes + bytes_of(hessians)
            with LiveBytes() as memory:
                quantizer = UnreadQuantizer(self.tracing.model, hessians, sensitivities, self.ranks)
                quantizer.solve_once()
        return self.state_bytes + calibration, kept + memory.peak

    def adapters(self) -> int:
        """Bytes of one document's adapters, their moments and their gradient."""
        # Factors of the rates are small, and are made of numbers, which fake tensors do not have.
        cfg = dataclasses.replace(self.cfg, ttt_lr_factors="")
        with self.tracing.mode:
            master = tg.LoRA.zeros(cfg, 1, len(cfg.plans[-1]), CPU)
            docs = tg.Documents(np.arange(0), np.arange(1), np.ones(1, np.int64))
            batch = tg.DocumentBatch.start(cfg, docs, np.arange(1), master)
        leaves = [*master.leaves, *batch.moments, *batch.lora.leaves]
        distinct = list({id(leaf): leaf for leaf in tree_leaves(leaves)}.values())
        return bytes_of(distinct) + bytes_of(batch.lora.leaves)

    def adaptation(self, graph: GraphPlan) -> int:
        """A batch of documents in whole windows, or four times as many short ones."""
        cfg = self.cfg
        per_document = self.adapters()
        most = 0
        for length in (cfg.ttt_eval_seq_len, cfg.ttt_eval_seq_len // 8):
            factor = tg.batch_size_factor(length, cfg, self.ranks.world_size)
            documents = int(cfg.ttt_batch_size * factor)
            activations = graph.peak_bytes * documents * length / graph.tokens
            most = max(most, int(documents * per_document + activations))
        return self.state_bytes + most

    def learning(self, graph: GraphPlan) -> int:
        """A step of all weights on scored text, beside a copy of the weights."""
        cfg = self.cfg
        weights = bytes_of(list(self.tracing.model.parameters()))
        copies = 3 if cfg.ttt_chunk_optimizer == "adam" else 2
        tokens = cfg.ttt_batch_seqs * cfg.eval_seq_len
        return int(self.state_bytes + copies * weights + graph.peak_bytes * tokens / graph.tokens)


# --- Time -----------------------------------------------------------------------------------------
class StepSeconds(NamedTuple):
    """Predicted seconds of a training step on 8 H100, before and after the loops begin."""

    plain: float
    looped: float

    @classmethod
    def predict(cls, cfg: tg.Config, graph: GraphPlan, parameters: int) -> StepSeconds:
        """From the graphs of a row at the greatest depth.

        The head is computed once, everything else once a visit.
        """
        logits = graph.tokens * cfg.vocab_size
        products = 6 * logits * cfg.model_dim / FLOPS_PER_S
        head = min(products + 8 * logits / BYTES_PER_S, graph.seconds)
        share = len(cfg.plans[0]) / graph.visits
        rows = math.ceil(cfg.rows_per_step / NUM_GPUS)
        optimiser = OPTIMISER_S * parameters / OPTIMISER_PARAMETERS

        def clock(seconds: float) -> float:
            return rows * CLOCK_FACTOR * seconds + optimiser

        plain = head + share * (graph.seconds - head)
        return cls(clock(plain), clock(graph.seconds))

    def steps_in(self, cfg: tg.Config, budget_s: float) -> float:
        """How many steps the budget allows."""
        looped_share = 1 - cfg.enable_looping_at if cfg.num_loops else 0.0
        if budget_s == math.inf:
            return cfg.iterations
        steps = budget_s * ((1 - looped_share) / self.plain + looped_share / self.looped)
        return min(cfg.iterations, steps)


def budget_of_steps(cfg: tg.Config) -> float:
    """Seconds of training less the reserve for compression."""
    reserve = cfg.gptq_reserve_seconds
    return cfg.wallclock - (RESERVE_S if reserve < 0 else reserve)


def adaptation_seconds(cfg: tg.Config, lengths: np.ndarray, graph: GraphPlan, values: int) -> float:
    """Modelled seconds of the documents' adaptation on 8 H100.

    values: in the adapters of one document. The graph's time is its launches, a part that grows
    with the documents (reading adapters and writing gradients), and one that grows with tokens.
    """
    docs = tg.Documents(np.arange(0), np.arange(len(lengths)), lengths)
    buckets = np.array(tg.window_buckets(cfg))
    launches = LAUNCH_S * len(graph.kernels)
    in_graph = 8 * values / BYTES_PER_S  # bf16: read twice, its gradient written and read
    update = 20 * values / BYTES_PER_S  # fp32 weight and moment, bf16 copy and gradient
    documents = graph.tokens // cfg.ttt_eval_seq_len
    of_tokens = graph.seconds - launches - documents * in_graph
    per_token = max(of_tokens, 0.0) / graph.tokens

    total = 0.0
    for batch in tg.plan_batches(docs, np.arange(len(lengths)), cfg, NUM_GPUS):
        counts = np.sort(lengths[batch])
        starts, ends = np.array(tg.chunk_grid(cfg, int(counts[-1]))).T
        windows = np.minimum(ends, cfg.ttt_eval_seq_len)
        if cfg.ttt_buckets:
            windows = buckets[np.searchsorted(buckets, windows)]
        live = len(counts) - np.searchsorted(counts, starts, side="right")
        seconds = launches + live * (in_graph + update) + live * windows * per_token
        total += seconds.sum()
    return total / NUM_GPUS


def learning_seconds(cfg: tg.Config, num_targets: int, graph: GraphPlan) -> float:
    """Modelled seconds of learning with all weights on 8 H100, from all chunks or in phases.

    By chunks, the scoring before it counts as well: its forwards are a third of a step.
    """
    tokens = float(num_targets)
    stride = cfg.eval_stride if cfg.sliding_window_enabled else cfg.eval_seq_len
    scored = num_targets * cfg.eval_seq_len / stride
    if cfg.ttt_mode == "document":
        phases = cfg.phased_ttt_num_phases
        prefix = cfg.phased_ttt_prefix_tokens
        if not prefix:
            prefix = num_targets * cfg.phased_ttt_prefix_docs / DOCUMENTS
        # A phase learns from all documents before it.
        tokens = prefix * (phases + 1) / 2
        scored = 0.0
    per_token = graph.seconds / graph.tokens
    return (cfg.ttt_epochs * tokens + scored / 3) * per_token / NUM_GPUS


# --- The plan -------------------------------------------------------------------------------------
class Plan(NamedTuple):
    """What a run will need."""

    preset: str
    parameters: int
    submission_bytes: float  # code and model
    graphs: list[GraphPlan]
    memory: dict[str, int]  # by phase, bytes of one GPU
    num_gpus: int  # among which the memory is divided
    step: StepSeconds
    budget_s: float
    steps: float
    adaptation_s: float | None  # modelled; None without adaptation
    deadline_s: float

    @classmethod
    def of(cls, cfg: tg.Config) -> Plan:
        """The plan of a configuration."""
        known = tg.CANONICAL.get(cfg.dataset_dir.name)
        num_targets = (known.tokens if known else 0) or SP8192_TOKENS
        lengths = fineweb_lengths(DOCUMENTS)
        lengths = np.ceil(lengths * (num_targets / lengths.sum())).astype(np.int64)

        tg.configure_torch(cfg)
        tracing = Tracing(cfg, lengths)
        parameters = sum(p.numel() for p in tracing.model.parameters())
        ranks = OneOfMany(min(NUM_GPUS, cfg.rows_per_step))
        memory = MemoryPlan(tracing, ranks)
        training = tracing.training()
        graphs = [training]
        phases = {"training step": memory.training(training)}
        phases["calibration"], phases["quantisation"] = memory.compression(training)
        seconds = 0.0
        if cfg.ttt_enabled and cfg.ttt_mode == "document":
            graph = tracing.adaptation()
            graphs.append(graph)
            phases["adaptation batch"] = memory.adaptation(graph)
            values = tracing.adapter_values()
            seconds += adaptation_seconds(cfg, lengths, graph, values)
        if cfg.learns_by_chunks:
            phases["learning of all weights"] = memory.learning(training)
            seconds += learning_seconds(cfg, num_targets, training)
        step = StepSeconds.predict(cfg, training, parameters)
        budget_s = budget_of_steps(cfg)
        return cls(
            preset=cfg.preset,
            parameters=parameters,
            submission_bytes=tg.predict_submission_bytes(cfg),
            graphs=graphs,
            memory=phases,
            num_gpus=ranks.world_size,
            step=step,
            budget_s=budget_s,
            steps=step.steps_in(cfg, budget_s),
            adaptation_s=seconds if cfg.ttt_enabled else None,
            deadline_s=cfg.eval_deadline_seconds,
        )

    def lines(self) -> Iterator[str]:
        """The plan for people."""
        over = self.submission_bytes - tg.LIMIT_BYTES
        verdict = f"{over:,.0f} OVER THE LIMIT" if over > 0 else "fits"
        yield f"PRESET={self.preset}: {self.parameters:,} parameters"
        yield (
            f"code and model: about {self.submission_bytes:,.0f} of {tg.LIMIT_BYTES:,} bytes,"
            f" {verdict}; {tg.CODE_BYTES:,} are the code as it stands, which tools/pack.py packs"
        )
        yield ""
        yield "Graphs on one GPU, nothing executed; ms modelled for an H100:"
        rows = []
        for graph in self.graphs:
            figures = (graph.nbytes / 1e9, graph.flops / 1e12, 1000 * graph.seconds)
            rows.append([graph.name, str(len(graph.kernels)), *(f"{x:.1f}" for x in figures)])
        yield markdown_table(["forward and backward", "kernels", "GB", "TFLOP", "ms"], rows)
        yield ""
        yield f"Memory of one GPU of {self.num_gpus}, with {CONTEXT_BYTES / 1e9:.1f} GB for CUDA:"
        rows = []
        for phase, nbytes in self.memory.items():
            needed = nbytes + CONTEXT_BYTES
            fits = ["fits" if needed <= size else "TOO LARGE" for size in GPU_BYTES.values()]
            rows.append([phase, f"{nbytes / 1e9:.1f}", *fits])
        gpus = [f"{name}, {size / 1e9:.0f} GB" for name, size in GPU_BYTES.items()]
        yield markdown_table(["phase", "GB of tensors", *gpus], rows)
        yield ""
        yield from self.lines_of_time()

    def lines_of_time(self) -> Iterator[str]:
        """The predicted times, and how sure they are."""
        if self.preset.startswith("cpu"):
            yield "Made for a CPU, which is not modelled: on 2 cores a step takes .25 to .5 s."
        yield f"Expected on {NUM_GPUS}xH100 (modelled, not measured; see tools/plan.py):"
        looped = ""
        if self.step.looped != self.step.plain:
            looped = f", {1000 * self.step.looped:.1f} ms looped"
        yield f"- a step: {1000 * self.step.plain:.1f} ms{looped}"
        within = f" in {self.budget_s:.0f} s" if self.budget_s < math.inf else ""
        yield f"- steps: about {self.steps:.0f}{within}"
        if self.adaptation_range():
            low, high = self.adaptation_range()
            yield (
                f"- adaptation of {DOCUMENTS:,} documents: about {low:.0f} to {high:.0f} s;"
                f" the evaluation's deadline is {self.deadline_s:.0f} s"
            )

    def adaptation_range(self) -> list[float] | None:
        """The seconds of the adaptation, from and to; None without adaptation."""
        if self.adaptation_s is None:
            return None
        return [round(factor * self.adaptation_s, 1) for factor in ADAPTATION_FACTORS]

    def figures(self) -> dict[str, Any]:
        """The plan for programs."""
        return {
            "preset": self.preset,
            "parameters": self.parameters,
            "submission_bytes": round(self.submission_bytes),
            "graphs": {graph.name: round(1000 * graph.seconds, 2) for graph in self.graphs},
            "memory": self.memory,
            "num_gpus": self.num_gpus,
            "step_ms": round(1000 * self.step.plain, 2),
            "looped_step_ms": round(1000 * self.step.looped, 2),
            "steps": round(self.steps),
            "adaptation_s": self.adaptation_range(),
        }


def main(environ: Mapping[str, str]) -> int:
    """Prints the plan of the configuration in `environ`. Exit status 2 if it cannot work."""
    try:
        cfg, _ = tg.Config.from_env(environ, has_cuda=True)
        plan = Plan.of(cfg)
    except tg.UsageError as error:
        tg.complain(str(error))
        return 2
    print("\n".join(plan.lines()))
    print("plan " + json.dumps(plan.figures()))
    return 0


if __name__ == "__main__":
    sys.exit(terminal.run(lambda _: main(os.environ)))
