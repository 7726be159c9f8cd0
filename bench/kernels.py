"""Every kernel of train_gpt.py: its code on sm_90 at the record's sizes and, on a GPU, its speed.

    python bench/kernels.py [--first] [--out bench/results/kernels_sm90.md]
    python bench/kernels.py --flatten    # on a GPU: the MLP's loops flattened and not

Each kernel is compiled ahead of time with each tile of its table, which needs no GPU. The table
that is written shows registers, shared memory, stack, spills and the instructions that matter.
--first takes only the first tile of each. With a GPU each operator is also timed, fused and plain,
forward and backward. The last line is `bench ` and one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

# ptxas says nothing about a kernel that it need not compile, so the cache has to be empty.
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import train_gpt as tg

RECORD = tg.Config.from_env({"PRESET": "record"}, has_cuda=True)[0]
T = 1024  # tokens; another number of them compiles nothing new
C = RECORD.model_dim
F = RECORD.mlp_dim
V = RECORD.vocab_size
H = RECORD.num_heads
KV = RECORD.num_kv_heads
D = RECORD.head_dim
HALF = RECORD.rope_dims // 2
LIMIT = 227 * 1024  # bytes of shared memory a block may use
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


class Recorder:
    """Stands for a kernel while its launcher runs, and keeps the arguments of each launch."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple, dict]] = []

    def __getitem__(self, grid: tuple) -> Callable[..., None]:
        """What kernel[grid] would return: a function that launches."""

        def launch(*args: object, **options: object) -> None:
            self.launches.append((args, options))

        return launch


def compiled(kernel: triton.JITFunction, args: tuple, options: dict) -> tuple:
    """The kernel compiled for sm_90 with the arguments of a launch, and what ptxas said of it."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    for name in [*options]:
        if name in kernel.arg_names:
            values[name] = options.pop(name)
    types = {}
    constants = {}
    attributes = {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        is_aligned = False
        if parameter.is_constexpr or value is None:
            types[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = TYPES[value.dtype]
            is_aligned = True
        elif isinstance(value, int):
            types[parameter.name] = "i32"
            is_aligned = value % 16 == 0
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = f"tensordesc<bf16{list(value.block_shape)}>"
        if is_aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return made, log.getvalue()


def half(*shape: int) -> torch.Tensor:
    """Zeros in bf16."""
    return torch.zeros(*shape, dtype=torch.bfloat16)


class Launch(NamedTuple):
    """One launch of a kernel at the record's sizes."""

    row: str  # of the table that is written
    kernel: str  # its name in train_gpt
    tiles: str  # key of TILES
    call: Callable[[tuple], object]  # launches the kernel with a tile


def launches() -> list[Launch]:
    """Every launch of the record's step. Only shapes and dtypes of the tensors matter."""
    x = half(T, C)
    hidden = half(T, F)
    up = half(F, C)
    down = half(C, F)
    row = half(T, (H + 2 * KV) * D)
    gain = half(H)
    rope = torch.zeros(T, 2, 1, HALF)
    q = half(T, H, D)
    k = half(T, KV, D)
    v = row.unflatten(1, (-1, D))[:, H + KV :]  # (T, KV, D)
    z = half(T, V)
    targets = torch.zeros(T, dtype=torch.int64)

    def mlp_up(tile: tuple) -> None:
        tg.launch_mlp(x, up, hidden, hidden, 132, False, tile)

    def mlp_dpre(tile: tuple) -> None:
        tg.launch_mlp(x, down, hidden, hidden, 132, True, tile)

    def loss_and_gradient(tile: tuple) -> None:
        tg.softcap_ce_cuda(z, targets, 30.0, True, tile=tile)

    def loss(tile: tuple) -> None:
        tg.softcap_ce_cuda(z, targets, 30.0, False, tile=tile)

    def loss_with_hints(tile: tuple) -> None:
        tg.softcap_ce_cuda(z, targets, 30.0, True, targets, tile)

    def qk(tile: tuple) -> None:
        tg.qk_rope_cuda(row, gain, rope, D, tile)

    def qk_backward(tile: tuple) -> None:
        tg.qk_rope_backward_cuda(row, gain, rope, q, k, k, k, tile)

    def xsa(tile: tuple) -> None:
        tg.xsa_cuda(q, v, tile)

    def xsa_backward(tile: tuple) -> None:
        tg.xsa_backward_cuda(q, v, q, tile)

    return [
        Launch("mlp_up", "mlp_kernel", "mlp_up", mlp_up),
        Launch("mlp_dpre", "mlp_kernel", "mlp_dpre", mlp_dpre),
        Launch("ce + gradient", "softcap_ce_kernel", "ce", loss_and_gradient),
        Launch("ce", "softcap_ce_kernel", "ce", loss),
        Launch("ce + hints", "softcap_ce_kernel", "ce", loss_with_hints),
        Launch("qk", "qk_rope_kernel", "qk", qk),
        Launch("qk_backward", "qk_rope_backward_kernel", "qk_backward", qk_backward),
        Launch("xsa", "xsa_kernel", "xsa", xsa),
        Launch("xsa_backward", "xsa_backward_kernel", "xsa_backward", xsa_backward),
    ]


def recorded(launch: Launch, tile: tuple) -> tuple[triton.JITFunction, tuple, dict]:
    """The kernel, arguments and options of a launch that does not take place."""
    kernel = getattr(tg, launch.kernel)
    recorder = Recorder()
    setattr(tg, launch.kernel, recorder)
    try:
        launch.call(tile)
    finally:
        setattr(tg, launch.kernel, kernel)
    ((args, options),) = recorder.launches
    return kernel, args, options


SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "TMA": r"cp\.async\.bulk\.tensor",
    "16-byte": r"(ld|st)\.global.*v4\.b32",
}


def figures(launch: Launch, tile: tuple) -> dict:
    """What ptxas and the PTX say about a kernel with one tile."""
    made, log = compiled(*recorded(launch, tile))
    ptx = made.asm["ptx"]
    behind_barrier = ptx.partition("bar.sync")[2]
    return {
        "kernel": launch.row,
        "tile": list(tile),
        "warps": made.metadata.num_warps,
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "shared": made.metadata.shared,
        "stack_spills": [int(number) for found in SPILLS.findall(log) for number in found],
        "instructions": [name for name, what in INSTRUCTIONS.items() if re.search(what, ptx)],
        "wgmma_shapes": sorted(set(re.findall(r"wgmma\.mma_async\S*\.(m\d+n\d+k\d+)\.", ptx))),
        "tma_targets": sorted(set(re.findall(r"cp\.async\.bulk\.tensor\.2d\.(\w+)", ptx))),
        "serialised": "Potential Performance Loss" in log,
        "global_loads": len(re.findall(r"\bld\.global", ptx)),
        "ex2": ptx.count("ex2.approx"),
        "single_loads_after_barrier": len(re.findall(r"\bld\.global\.b16", behind_barrier)),
    }


def compile_all(first: bool) -> list[dict]:
    """Figures of every launch with every tile, or with `first` the first tile of each."""
    rows = []
    for launch in launches():
        tiles = tg.TILES[launch.tiles]
        for tile in tiles[:1] if first else tiles:
            row = figures(launch, tile)
            name, registers, shared = row["kernel"], row["registers"], row["shared"]
            line = f"{name:20} {tile!s:16} {registers:4} registers {shared:7} bytes"
            print(line, flush=True)
            rows.append(row)
    return rows


def as_table(rows: list[dict]) -> str:
    """The figures in Markdown."""
    sizes = f"C={C} F={F} V={V} heads {H}+2x{KV} of {D}, bf16"
    lines = [
        f"# Kernels compiled for sm_90 (Triton {triton.__version__}), {sizes}",
        "",
        "Written by `python bench/kernels.py`. Stack and spills: bytes of stack, spill stores,"
        " spill loads.",
        "",
        "| kernel | tile | warps | registers | shared memory, bytes | stack, spills"
        " | instructions |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["kernel"],
            "x".join(map(str, row["tile"])),
            row["warps"],
            row["registers"],
            row["shared"],
            row["stack_spills"],
            ", ".join(row["instructions"]),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


class Operation(NamedTuple):
    """An operator in two forms, and what it has to move."""

    name: str
    fused: Callable
    plain: Callable
    leaves: tuple[torch.Tensor, ...]
    forward_bytes: float  # of the fused form


def operations(tokens: int) -> list[Operation]:
    """What a layer and the head are made of, on a GPU in bf16."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    rope = torch.rand(tokens, 2, 1, HALF, device="cuda")
    targets = torch.randint(0, V, (tokens,), device="cuda")
    stream_bytes = tokens * C * 2  # of one (T, C) tensor

    def norm_rope(row: torch.Tensor, gain: torch.Tensor, fused: bool) -> tuple[torch.Tensor, ...]:
        return tg.norm_rope(row, gain, rope, D, fused, 2)

    def head_loss(x: torch.Tensor, w: torch.Tensor, fused: bool) -> torch.Tensor:
        return tg.head_loss(x, w, None, targets, 30.0, fused)

    return [
        Operation(
            "norm_rope",
            partial(norm_rope, fused=True),
            partial(norm_rope, fused=False),
            (draw(tokens, (H + 2 * KV) * D), draw(H)),
            3 * stream_bytes,
        ),
        Operation(
            "xsa",
            tg.xsa,
            tg.remove_own_value,
            (draw(tokens, H, D), draw(tokens, KV, D)),
            2.5 * stream_bytes,
        ),
        Operation(
            "head_loss",
            partial(head_loss, fused=True),
            partial(head_loss, fused=False),
            (draw(tokens, C), draw(V, C)),
            6 * tokens * V,
        ),
        Operation(
            "mlp",
            tg.fused_mlp,
            tg.plain_mlp,
            (draw(tokens, C), draw(F, C), draw(C, F)),
            14 * stream_bytes,
        ),
    ]


def time_form(operation: Operation, fused: bool) -> dict:
    """Milliseconds of the compiled forward and backward of one form."""
    leaves = operation.leaves
    function = torch.compile(operation.fused if fused else operation.plain)
    outputs = function(*leaves)
    if isinstance(outputs, torch.Tensor):
        outputs = (outputs,)
    if operation.name == "mlp":
        outputs = outputs[:1]  # the other one is the activation
    grads = [torch.randn_like(t) for t in outputs]

    def backward() -> None:
        torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    forward_ms = triton.testing.do_bench(partial(function, *leaves))
    backward_ms = None
    # The backward of the fused loss is two products and nothing else.
    if operation.name != "head_loss" or not fused:
        backward_ms = triton.testing.do_bench(backward)
    return {
        "op": operation.name,
        "fused": fused,
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "forward_gb_s": operation.forward_bytes / forward_ms / 1e6,
    }


def time_all(tokens: int = 98304) -> list[dict]:
    """Times of every operator, fused and plain, on a GPU; GB/s by the bytes of the fused form."""
    torch._functorch.config.donated_buffer = False  # a backward is timed more than once
    rows = []
    for operation in operations(tokens):
        for fused in (True, False):
            rows.append(time_form(operation, fused))
            print(rows[-1], flush=True)
    return rows


# Relative, of an output in bf16.
MAX_ERROR = 1e-2


def compare_flattened(tokens: int = 98304) -> list[dict]:
    """The MLP kernel without and with flattened loops, on a GPU: errors against PyTorch, then ms.

    `tokens` less one is tried too, so that the last tile is cut.
    """
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    rows = []
    for size in (tokens, tokens - 1):
        x, dy = torch.randn(2, size, C, device="cuda").bfloat16()
        up = torch.randn(F, C, device="cuda").bfloat16() * C**-0.5
        down = torch.randn(C, F, device="cuda").bfloat16() * C**-0.5
        pre, post = tg.mlp_up_reference(x, up)
        wanted = {"mlp_up": post, "mlp_dpre": tg.mlp_dpre_reference(dy, down, pre)}
        for name, exact in wanted.items():
            backward = name == "mlp_dpre"
            operands = (dy, down, pre) if backward else (x, up, torch.empty_like(pre))
            for tile, flatten in itertools.product(tg.TILES[name], (False, True)):
                out = torch.full_like(post, float("nan"))
                launch = partial(
                    tg.launch_mlp, *operands, out, programs, backward, tile, flatten=flatten
                )
                launch()
                error = float((out - exact).norm() / exact.norm())
                rows.append(
                    {
                        "kernel": name,
                        "tile": tile,
                        "tokens": size,
                        "flatten": flatten,
                        "error": error,
                        "ms": triton.testing.do_bench(launch),
                    }
                )
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Compiles, times and writes what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--flatten", action="store_true", help="only the MLP's loops, flattened and not, on a GPU"
    )
    parser.add_argument("--first", action="store_true", help="only the first tile of each table")
    parser.add_argument(
        "--out", type=Path, help="where the table goes; default: nowhere but the screen"
    )
    given = parser.parse_args()
    if given.flatten:
        if not torch.cuda.is_available():
            parser.exit(2, "bench/kernels.py: --flatten: needs a GPU\n")
        rows = compare_flattened()
        print("bench " + json.dumps({"flatten": rows}))
        # A run launches the loops that are not flattened. NaN is wrong, too.
        if not all(row["error"] <= MAX_ERROR for row in rows if not row["flatten"]):
            parser.exit(1, f"bench/kernels.py: --flatten: an error is above {MAX_ERROR}\n")
        return
    if given.out:
        # A path that cannot be written is an error before the work, not after it.
        try:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.touch()
        except OSError as error:
            parser.exit(2, f"bench/kernels.py: {given.out}: {error.strerror}\n")
    rows = compile_all(given.first)
    table = as_table(rows)
    print(table)
    if given.out:
        given.out.write_text(table)
    times = time_all() if torch.cuda.is_available() else []
    spills = any(any(row["stack_spills"]) for row in rows)
    fits = all(row["shared"] <= LIMIT for row in rows)
    result = {"target": "sm_90", "clean": fits and not spills, "kernels": rows, "times": times}
    print("bench " + json.dumps(result))


if __name__ == "__main__":
    main()
