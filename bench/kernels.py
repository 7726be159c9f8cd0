"""Every kernel of train_gpt.py: what it becomes on sm_90 at the record's sizes and, on a GPU, how fast it is.

    python bench/kernels.py [--first] [--out bench/results/kernels_sm90.md]

Without a GPU: each kernel with each tile of its table is compiled ahead of time; registers, shared memory, stack,
spills and the instructions that matter go to the table. --first: only the first tile of each. With a GPU each
operator is also timed, fused and plain, forward and backward. The last line is `bench ` and one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_CACHE_DIR"] = (
    tempfile.mkdtemp()
)  # ptxas says nothing about a kernel that it need not compile
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import train_gpt as tg

RECORD = tg.Config.from_env({"PRESET": "record"}, has_cuda=True)[0]
T, C, F, V = (
    1024,
    RECORD.model_dim,
    RECORD.mlp_dim,
    RECORD.vocab_size,
)  # the number of tokens compiles nothing new
H, KV, D, HALF = RECORD.num_heads, RECORD.num_kv_heads, RECORD.head_dim, RECORD.rope_dims // 2
LIMIT = 227 * 1024  # bytes of shared memory a block may use
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


class Recorder:
    """Stands for a kernel while its launcher runs; keeps what would have been launched."""

    def __init__(self, kernel: triton.JITFunction):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid: tuple):
        return lambda *args, **options: self.launches.append((args, options))


def compiled(kernel: triton.JITFunction, args: tuple, options: dict) -> tuple:
    """The compiled kernel for sm_90 and what ptxas said, for these arguments of a launch."""
    given = dict(zip(kernel.arg_names, args, strict=False))
    given |= {k: options.pop(k) for k in [*options] if k in kernel.arg_names}
    types, constants, aligned = {}, {}, {}
    for i, (param, value) in enumerate((p, given[p.name]) for p in kernel.params):
        if param.is_constexpr:
            types[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[param.name], aligned[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, (int, float)):
            types[param.name] = "i32" if isinstance(value, int) else "fp32"
            aligned |= (
                {(i,): [["tt.divisibility", 16]]}
                if isinstance(value, int) and value % 16 == 0
                else {}
            )
        else:
            types[param.name] = f"tensordesc<bf16{list(value.block_shape)}>"
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return made, log.getvalue()


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def launchers() -> list[tuple]:
    """(kernel's name in train_gpt, its row of TILES, launch(tile))."""
    x, hidden, up, down = half(T, C), half(T, F), half(F, C), half(C, F)
    row, gain, rope = half(T, (H + 2 * KV) * D), half(H), torch.zeros(T, 2, 1, HALF)
    q, k, v, z = half(T, H, D), half(T, KV, D), row.unflatten(1, (-1, D))[:, H + KV :], half(T, V)
    ids = torch.zeros(T, dtype=torch.int64)
    return [
        (
            "mlp_kernel",
            "mlp_up",
            lambda tile: tg.launch_mlp(x, up, hidden, hidden, 132, False, tile),
        ),
        (
            "mlp_kernel",
            "mlp_dpre",
            lambda tile: tg.launch_mlp(x, down, hidden, hidden, 132, True, tile),
        ),
        ("softcap_ce_kernel", "ce", lambda tile: tg.softcap_ce_cuda(z, ids, 30.0, True, tile)),
        ("softcap_ce_kernel", "ce", lambda tile: tg.softcap_ce_cuda(z, ids, 30.0, False, tile)),
        ("qk_kernel", "qk", lambda tile: tg.qk_rope_cuda(row, gain, rope, D, tile=tile)),
        (
            "qk_kernel",
            "qk_backward",
            lambda tile: tg.qk_rope_cuda(row, gain, rope, D, q, k, k, k, tile=tile),
        ),
        ("xsa_kernel", "xsa", lambda tile: tg.xsa_cuda(q, v, None, tile)),
        ("xsa_kernel", "xsa_backward", lambda tile: tg.xsa_cuda(q, v, q, tile)),
    ]


def compile_all(first: bool) -> list[dict]:
    """One row per kernel and tile."""
    rows = []
    for name, table, launch in launchers():
        for tile in tg.TILES[table][: 1 if first else None]:
            kernel = getattr(tg, name)
            recorder = Recorder(kernel)
            setattr(tg, name, recorder)
            try:
                launch(tile)
            finally:
                setattr(tg, name, kernel)
            ((args, options),) = recorder.launches
            what = table + (" + gradient" if table == "ce" and args[5] else "")
            made, log = compiled(kernel, args, options)
            spills = re.findall(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
            )
            ptx = made.asm["ptx"]
            marks = {
                "wgmma": "wgmma.mma_async",
                "TMA": "cp.async.bulk.tensor",
                "16-byte": r"(ld|st)\.global.*v4\.b32",
            }
            rows.append(
                {
                    "kernel": what,
                    "tile": list(tile),
                    "warps": made.metadata.num_warps,
                    "registers": int(re.search(r"Used (\d+) registers", log)[1]),
                    "shared": made.metadata.shared,
                    "stack_spills": [int(x) for group in spills for x in group],
                    "instructions": [
                        mark for mark, pattern in marks.items() if re.search(pattern, ptx)
                    ],
                    "global_loads": len(re.findall(r"\bld\.global", ptx)),
                    "ex2": ptx.count("ex2.approx"),
                    "single_loads_after_barrier": len(
                        re.findall(r"\bld\.global\.b16", ptx.partition("bar.sync")[2])
                    ),
                }
            )
            print(
                "{kernel:20} {tile!s:16} {registers:4} registers {shared:7} bytes".format(
                    **rows[-1]
                ),
                flush=True,
            )
    return rows


def as_table(rows: list[dict]) -> str:
    sizes = f"C={C} F={F} V={V} heads {H}+2x{KV} of {D}, bf16"
    lines = [
        f"# Kernels compiled for sm_90 (Triton {triton.__version__}), {sizes}",
        "",
        "Written by `python bench/kernels.py`. Stack and spills: bytes of stack, spill stores, spill loads.",
        "",
        "| kernel | tile | warps | registers | shared memory, bytes | stack, spills | instructions |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['kernel']} | {'x'.join(map(str, r['tile']))} | {r['warps']} | {r['registers']} | "
            f"{r['shared']} | {r['stack_spills']} | {', '.join(r['instructions'])} |"
        )
    return "\n".join(lines) + "\n"


def time_all(tokens: int = 98304) -> list[dict]:
    """On a GPU: milliseconds forward and backward, fused and plain (both compiled), GB/s by the fused form's bytes."""
    torch._functorch.config.donated_buffer = False  # a backward is timed more than once

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    row, gain, y, x, w = (
        draw(tokens, (H + 2 * KV) * D),
        draw(H),
        draw(tokens, H, D),
        draw(tokens, C),
        draw(V, C),
    )
    v, rope = draw(tokens, KV, D), torch.rand(tokens, 2, 1, HALF, device="cuda")
    up, down, ids = draw(F, C), draw(C, F), torch.randint(0, V, (tokens,), device="cuda")
    U = tokens * C * 2  # bytes of one (T, C) tensor in bf16
    ops = {  # plain or fused, leaves, bytes forward and backward
        "norm_rope": (
            lambda f: lambda row, gain: tg.norm_rope(row, gain, rope, D, f, 2),
            (row, gain),
            3 * U,
            6 * U,
        ),
        "xsa": (lambda f: tg.xsa if f else tg.remove_own_value, (y, v), 2.5 * U, 4 * U),
        "head_loss": (
            lambda f: lambda x, w: tg.head_loss(x, w, None, ids, 30.0, f),
            (x, w),
            6 * tokens * V,
            4 * tokens * V,
        ),
        "mlp": (
            lambda f: lambda *a: (tg.fused_mlp if f else tg.plain_mlp)(*a)[0],
            (x, up, down),
            14 * U,
            18 * U,
        ),
    }
    rows = []
    for name, (form, leaves, *moved) in ops.items():
        for fused in (True, False):
            function = torch.compile(form(fused))
            out = function(*leaves)
            out = [t for t in (out if isinstance(out, tuple) else (out,)) if t.requires_grad]
            grads = [torch.randn_like(t) for t in out]

            def backward(out=out, leaves=leaves, grads=grads):
                torch.autograd.grad(out, leaves, grads, retain_graph=True)

            forward_ms = triton.testing.do_bench(lambda f=function, a=leaves: f(*a))
            backward_ms = None
            if (
                name != "head_loss" or not fused
            ):  # its backward frees nothing, but is two products alone
                backward_ms = triton.testing.do_bench(backward)
            rows.append(
                {
                    "op": name,
                    "fused": fused,
                    "forward_ms": forward_ms,
                    "backward_ms": backward_ms,
                    "forward_gb_s": moved[0] / forward_ms / 1e6,
                }
            )
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", action="store_true", help="only the first tile of each table")
    parser.add_argument(
        "--out", type=Path, help="where the table goes; default: nowhere but the screen"
    )
    given = parser.parse_args()
    if given.out:  # before the work, not after it
        try:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.touch()
        except OSError as error:
            parser.exit(2, f"bench/kernels.py: {given.out}: {error.strerror}\n")
    rows = compile_all(given.first)
    print(as_table(rows))
    if given.out:
        given.out.write_text(as_table(rows))
    times = time_all() if torch.cuda.is_available() else []
    clean = not any(any(r["stack_spills"]) for r in rows) and all(
        r["shared"] <= LIMIT for r in rows
    )
    print(
        "bench " + json.dumps({"target": "sm_90", "clean": clean, "kernels": rows, "times": times})
    )
