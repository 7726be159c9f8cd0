"""A function's compiled kernels and their memory, predicted from a trace of fake tensors.

Nothing is computed or compiled, so no GPU is needed, and seconds are enough for the full size.
AOTAutograd traces forward and backward and decides what the forward keeps, as under torch.compile.
FusedGraph then groups the operators into kernels. Its bytes and times are within 6 % of what
Inductor's own lowering gives (bench/results/graphs_sm90.md; tests/test_plan.py compares them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition

# Assumed of an H100: what good kernels reach.
FLOPS_PER_S = 650e12
BYTES_PER_S = 2.85e12
LAUNCH_S = 1.5e-6

# Parts of the names of operators that are kernels of their own. All others are fused.
CALLS = ("mm", "golf", "attention", "index_put", "sort", "searchsorted", "embedding_dense")
ATTENTION = ("attention", "sdpa")
IN_PLACE = "auto_functionalized"


class Kernel(NamedTuple):
    """A kernel that a compiled graph would launch."""

    name: str  # the operators in it
    nbytes: float  # read and written
    flops: float  # of products

    @property
    def is_attention(self) -> bool:
        """Whether it is the attention, whose time does not follow from its bytes."""
        return any(part in self.name for part in ATTENTION)

    def seconds(self) -> float:
        """The modelled time on an H100, that of a launch alone for attention."""
        if self.is_attention:
            return LAUNCH_S
        return LAUNCH_S + max(self.flops / FLOPS_PER_S, self.nbytes / BYTES_PER_S)


def trace(
    function: Callable[..., Tensor], inputs: Sequence[Any], compiled: bool
) -> list[fx.GraphModule]:
    """The graphs of the forward and, if an input needs a gradient, of the backward.

    function: returns a tensor. inputs: fake tensors, and lists of them. compiled: whether the
    compiler fuses, so that the forward keeps little and the backward computes much again.
    """
    graphs = []

    def partition(joint: fx.GraphModule, joint_inputs: Any, **options: Any) -> tuple:
        split = min_cut_rematerialization_partition if compiled else default_partition
        parts = split(joint, joint_inputs, **options)
        graphs.extend(parts)
        return parts

    def keep(graph: fx.GraphModule, example: Any) -> Callable:
        if not graphs:
            graphs.append(graph)
        return make_boxed_func(graph.forward)

    decompositions = None
    if compiled:
        # Imported here, because it takes a second.
        from torch._inductor.decomposition import select_decomp_table

        decompositions = select_decomp_table()
    aot_function(
        function,
        fw_compiler=keep,
        bw_compiler=keep,
        partition_fn=partition,
        decompositions=decompositions,
    )(*inputs)
    return graphs


def nbytes(value: Any) -> int:
    """Bytes of the values that a fake tensor shows; 0 for anything else."""
    if not isinstance(value, Tensor):
        return 0
    return value.numel() * value.element_size()


def value_of(node: fx.Node) -> Any:
    """The fake tensor that a node returns, or whatever else it returns."""
    return node.meta.get("val")


def is_item(node: fx.Node) -> bool:
    """Whether a node takes one of several results of another."""
    return node.op == "call_function" and "getitem" in str(node.target)


def is_view(node: fx.Node) -> bool:
    """Whether a node only shows another's memory."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        target.is_view or target.name() in ("aten::detach", "prims::broadcast_in_dim")
    )


def base_of(node: fx.Node) -> fx.Node:
    """The node whose memory a node shows: itself, unless it is a view."""
    while True:
        if is_view(node):
            node = node.args[0]
        elif is_item(node) and IN_PLACE in str(node.args[0].target) and node.args[1] > 0:
            # The operator changes its argument; the graph has it as a new tensor.
            node = node.args[0].kwargs["_all_bases"][node.args[1] - 1]
        else:
            return node


class FusedGraph:
    """A traced graph, grouped into the kernels that a compiler would make of it.

    A call (CALLS) is a kernel of its own. Other nodes are one kernel if they depend on one another
    and on equally many calls one after another. A value lies in memory if a call or another kernel
    reads it, or if the graph returns it. But a function of one large tensor is not stored for other
    kernels: they read that tensor and compute the value again.
    """

    def __init__(self, module: fx.GraphModule):
        self.nodes = list(module.graph.nodes)
        self.depth: dict[fx.Node, int] = {}  # calls one after another before a node
        self.leader: dict[fx.Node, fx.Node] = {}  # a node of the same kernel; see kernel_of
        for node in self.nodes:
            self.place(node)
        self.stored = self.find_stored()

    # --- Which nodes are one kernel ---
    @staticmethod
    def is_call(node: fx.Node) -> bool:
        """Whether a node is a kernel of its own."""
        name = str(node.target)
        return IN_PLACE in name or any(part in name for part in CALLS)

    def kernel_of(self, node: fx.Node) -> fx.Node | None:
        """The node that stands for a node's kernel; None for an input of the graph."""
        if is_item(node):
            node = node.args[0]
        if node not in self.leader:
            return None
        while self.leader[node] is not node:
            node = self.leader[node]
        return node

    def place(self, node: fx.Node) -> None:
        """Gives a node its depth, and joins it with the kernels that it depends on."""
        self.depth[node] = 0
        if node.op != "call_function" or is_view(node) or is_item(node):
            return
        self.leader[node] = node
        sources = []
        for argument in node.all_input_nodes:
            kernel = self.kernel_of(base_of(argument))
            if kernel is not None:
                sources.append(kernel)
        is_call = self.is_call(node)
        for source in sources:
            crosses = is_call or self.is_call(source)
            self.depth[node] = max(self.depth[node], self.depth[source] + crosses)
        if is_call:
            return
        for source in sources:
            if not self.is_call(source) and self.depth[source] == self.depth[node]:
                self.leader[self.kernel_of(source)] = node

    # --- What lies in memory ---
    def is_free(self, node: fx.Node) -> bool:
        """Whether a node reads nothing, as one that fills a tensor with zeros."""
        return node in self.leader and not node.all_input_nodes

    def origin(self, node: fx.Node) -> fx.Node:
        """What a generated kernel reads for the value of a node of another kernel."""
        while True:
            node = base_of(node)
            value = value_of(node)
            is_made = node in self.leader and not self.is_call(node)
            if not is_made or not isinstance(value, Tensor):
                return node
            large = []
            for argument in node.all_input_nodes:
                shown = value_of(argument)
                is_large = isinstance(shown, Tensor) and 2 * shown.numel() > value.numel()
                if is_large and not self.is_free(base_of(argument)):
                    large.append(argument)
            if "slice_scatter" in str(node.target) and len(large) == 2:
                # A gradient of x[:] is written over all of what was there.
                large = large[1:]
            if len(large) != 1 or value_of(large[0]).numel() != value.numel():
                return node
            node = large[0]

    def reads(self, node: fx.Node) -> Iterator[tuple[fx.Node, int]]:
        """The nodes that a node reads from memory, with the bytes of each."""
        kernel = self.kernel_of(node)
        for argument in node.all_input_nodes:
            source = base_of(argument) if self.is_call(node) else self.origin(argument)
            if self.is_free(source) and not self.is_call(node):
                continue
            source_kernel = self.kernel_of(source)
            if source_kernel is None or source_kernel is not kernel:
                # A view may show a part, or one value many times.
                yield source, min(nbytes(value_of(argument)), nbytes(value_of(source)))

    def outputs(self) -> list[fx.Node]:
        """The nodes whose memory the graph returns, each once."""
        return list({base_of(node): None for node in self.nodes[-1].all_input_nodes})

    def find_stored(self) -> set[fx.Node]:
        """The nodes whose values are written to memory."""
        stored = {node for node in self.outputs() if self.kernel_of(node) is not None}
        for node in self.leader:
            if self.is_call(node):
                stored.add(node)
            for source, _ in self.reads(node):
                if self.kernel_of(source) is not None:
                    stored.add(source)
        return stored

    # --- Figures ---
    def kernels(self) -> list[Kernel]:
        """All kernels that read or write anything."""
        read: dict[fx.Node, dict[fx.Node, int]] = {}
        written: dict[fx.Node, dict[fx.Node, int]] = {}
        names: dict[fx.Node, set[str]] = {}
        flops: dict[fx.Node, float] = {}
        for node in self.leader:
            kernel = self.kernel_of(node)
            names.setdefault(kernel, set()).add(operator_name(node))
            flops[kernel] = flops.get(kernel, 0.0) + product_flops(node)
            sources = read.setdefault(kernel, {})
            for source, size in self.reads(node):
                sources[source] = max(sources.get(source, 0), size)
            if node in self.stored:
                written.setdefault(kernel, {})[node] = written_bytes(node)
        kernels = []
        for kernel, sources in read.items():
            moved = sum(sources.values()) + sum(written.get(kernel, {}).values())
            if moved:
                kernels.append(Kernel(",".join(sorted(names[kernel])), moved, flops[kernel]))
        return kernels

    def kept_bytes(self) -> int:
        """Bytes of the results that the graph itself makes: what a forward keeps."""
        made = [node for node in self.outputs() if self.kernel_of(node) is not None]
        return sum(nbytes(value_of(node)) for node in made)

    def peak_bytes(self) -> int:
        """The most memory at once, of what the graph makes or takes over from its forward.

        Its first inputs, called primals, are the caller's and do not count.
        """
        last_use: dict[fx.Node, int] = {}
        for time, node in enumerate(self.nodes):
            if node in self.leader:
                for source, _ in self.reads(node):
                    last_use[source] = time
        for node in self.outputs():
            last_use[node] = len(self.nodes)

        freed: dict[int, int] = {}
        live = peak = 0
        for time, node in enumerate(self.nodes):
            is_kept = node.op == "placeholder" and "primals" not in node.name
            if is_kept or self.is_allocated(node):
                size = nbytes(value_of(node))
                live += size
                end = last_use.get(node, time)
                freed[end] = freed.get(end, 0) + size
            peak = max(peak, live)
            live -= freed.get(time, 0)
        return peak

    def is_allocated(self, node: fx.Node) -> bool:
        """Whether memory is allocated for the value of this node."""
        if is_item(node):
            return base_of(node) is node
        return node in self.stored


def operator_name(node: fx.Node) -> str:
    """The short name of a node's operator."""
    target = node.args[0] if IN_PLACE in str(node.target) else node.target
    return str(target).removeprefix("aten.").removeprefix("prims.").split(".default")[0]


def written_bytes(node: fx.Node) -> int:
    """Bytes that a stored node writes; what it changes in place counts as well."""
    value = value_of(node)
    if not isinstance(value, (tuple, list)):
        return nbytes(value)
    return sum(map(nbytes, value))


def product_flops(node: fx.Node) -> float:
    """FLOPs of a node that is a product, 0 for any other."""
    name = operator_name(node)
    if "mlp_" in name:
        # x (T, C) and w_up (F, C), or dy (T, C) and w_down (C, F).
        a, w = (value_of(argument) for argument in node.args[:2])
        return 2.0 * a.numel() * w.numel() / a.shape[1]
    if "mm" in name and "golf" not in name:
        # Perhaps a bias, then a (.., m, k) and b (.., k, n).
        a, b = (value_of(argument) for argument in node.all_input_nodes[-2:])
        return 2.0 * math.prod(a.shape) * b.shape[-1]
    return 0.0
