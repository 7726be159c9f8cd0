"""Reads an artifact by its documented format, without any code of train_gpt.py.

The format is that of pack_arrays, ans_encode and pack_codes there, container version 3. The order
of the parameters is that of parameter_table. Value embeddings are not read.
"""

import json
import lzma
import math
import zlib
from typing import NamedTuple

import numpy as np
import torch

DEFAULTS = dict(leaky_slope=0.5, rope_train_seq_len=0, branch_scale=False, bigram_vocab_size=0)
DEFAULTS |= dict(bigram_dim=128, smear_enabled=False, ve_enabled=False, tables_fp16=False)
DEFAULTS |= dict(sparse_attn_gate_enabled=False, smear_gate_enabled=False, gate_window=12)
DEFAULTS |= dict(sparse_attn_gate_scale=0.5)


def unpack(codec: str, data: bytes, size: int) -> bytes:
    """A stream of a general codec."""
    if codec == "brotli":
        import brotli

        return brotli.decompress(data)
    if codec == "zstd":
        import zstandard

        return zstandard.ZstdDecompressor().decompress(data, size)
    filters = [dict(id=lzma.FILTER_LZMA2, preset=6, lc=0, lp=1, pb=1)]
    return lzma.decompress(data, lzma.FORMAT_RAW, filters=filters)


def decode_ans(data: bytes, shapes: list, levels: list, columns: list) -> list[np.ndarray]:
    """The codes of all banks: one symbol for every state in turn, contexts from the rows above."""
    end = 4 + int.from_bytes(data[:4], "little")
    table = np.frombuffer(unpack("lzma", data[4:end], 0), "<u2").astype(np.int64).reshape(256, 256)
    first = table.cumsum(1) - table
    count = max(max(s[2] for s in shapes), sum(map(math.prod, shapes)) >> 13)
    states = np.frombuffer(data, "<u4", count, end).astype(np.int64)
    words = np.frombuffer(data, "<u2", offset=end + 4 * count).astype(np.int64)
    inverse = [0] + [round(2**16 * 2 ** ((65 - k) / 8)) for k in range(1, 256)]
    inverse = np.array(inverse)
    edges = [round(2**16 * 2 ** ((t + 0.5) / 8)) for t in range(-36, 24)]
    scale = np.array([round(2**16 * 2 ** (-k / 4)) for k in range(256)])
    banks = [np.zeros(shape, np.int8) for shape in shapes]
    for bank, level, exponents in zip(banks, levels, columns, strict=True):
        at_once = count // bank.shape[2]
        for group in range(0, len(bank), at_once):
            q = bank[group : group + at_once]
            k = exponents[group : group + at_once].astype(np.int64)
            prior = scale[k - k.min(1, keepdims=True)]
            mean = prior.sum(1, keepdims=True) // k.shape[1] + 1
            size = np.maximum(64 * 2**16 * prior // mean, 1)
            total = np.zeros_like(size)
            for row in range(bank.shape[1]):
                if row % 8 == 0:
                    offset = np.searchsorted(edges, size // (row + 64))
                    bias = np.searchsorted((7, 19, 39), 100 * abs(total) // size, side="right")
                    sign = np.where(total < 0, -1, 1)
                lv = level[group : group + at_once, row, None].astype(np.int64)
                band = np.where(lv > 0, np.minimum((lv + offset) // 3, 63), 0)
                context = (band * 4 + bias).ravel()
                x = states[: len(context)]
                slot = x % 2**14
                symbol = (first[context] <= slot[:, None]).sum(1) - 1
                # A symbol of frequency 0 starts where the next one does; the last one there counts.
                x[:] = table[context, symbol] * (x >> 14) + slot - first[context, symbol]
                low = np.flatnonzero(x < 2**16)
                x[low] = x[low] * 2**16 + words[: len(low)]
                words = words[len(low) :]
                q[:, row] = (symbol - 128).reshape(sign.shape) * sign
                value = q[:, row].astype(np.int64)
                size += np.where(lv > 0, abs(value) * inverse[lv], 2**16)
                total += value * inverse[lv]
    return banks


class Shapes(NamedTuple):
    """The parts of a network by name, in the order of the file."""

    banks: dict[str, tuple]  # integers, tables among them unless they are fp16
    tables: dict[str, tuple]  # (1, rows, columns)
    floats: dict[str, tuple]
    inputs: dict[str, tuple]  # column scales by input


def shapes_of(c: dict) -> Shapes:
    """The shapes of all weights."""
    L, C, V, H = c["num_layers"], c["model_dim"], c["vocab_size"], c["num_heads"]
    mlp, kv = int(c["mlp_mult"] * C), c["num_kv_heads"] * (C // H)
    skips = len(skip_pairs(c, c["num_loops"]))
    banks = {"qo_bank": (2 * L, C, C), "kv_bank": (2 * L, kv, C)}
    banks |= {"up_bank": (L, mlp, C), "down_bank": (L, C, mlp)}
    tables = {"tok_emb": (1, V, C)}
    floats = {"skip_weights": (skips, C), "attn_scale": (L, C), "mlp_scale": (L, C)}
    floats |= {"resid_mix": (L, 2, C), "q_gain": (L, H)}
    if c["skip_gates_enabled"]:
        floats["skip_gates"] = (skips, C)
    if c["parallel_start_layer"]:
        rows = L - c["parallel_start_layer"]
        floats |= {"post_lambdas": (rows, 2, 2), "resid_lambdas": (rows, 2)}
    if c["bigram_vocab_size"]:
        tables["bigram_emb"] = (1, c["bigram_vocab_size"], c["bigram_dim"])
        if c["tables_fp16"]:  # in the order of the parameters
            floats["bigram_emb"] = tables["bigram_emb"]
        floats |= {"bigram_proj": (C, c["bigram_dim"]), "bigram_scale": (1,)}
    if c["smear_enabled"]:
        floats["smear_gate"] = (C,)
    if c["sparse_attn_gate_enabled"]:
        floats["attn_gate"] = (L, H, c["gate_window"])
    if c["smear_gate_enabled"]:
        floats |= {"smear_proj": (1, c["gate_window"]), "smear_lambda": (1,)}
    if c["tables_fp16"]:
        floats = {"tok_emb": tables["tok_emb"], **floats}
    else:
        banks |= tables
    inputs = {"attn_in": (L, C), "attn_out": (L, C), "mlp_in": (L, C), "mlp_mid": (L, mlp)}
    inputs |= {name: shape[::2] for name, shape in tables.items() if name in banks}
    return Shapes(banks, tables, floats, inputs)


def read_artifact(data: bytes) -> tuple[dict, dict[str, torch.Tensor]]:
    """The network's settings, with `looped`, and all of its weights in the default dtype."""
    assert data[:5] == b"PGLM\3", "not an artifact of container version 3"
    end = 13 + int.from_bytes(data[5:9], "little")
    header = json.loads(zlib.decompress(data[13:end]))
    c = DEFAULTS | header["config"] | {"looped": header["looped"]}
    shapes = shapes_of(c)
    stored = []
    for size, length, _ in header["streams"]:
        stored.append((data[end : end + length], size))
        end += length
    rows = {name: shape[:2] for name, shape in shapes.banks.items()}
    levels = split(unpack("lzma", *stored[1]), "u1", rows)
    scales = split(unpack("lzma", *stored[2]), "<f2", rows)
    by_input = split(unpack("lzma", *stored[3]), "i1", shapes.inputs)
    k = {"qo_bank": np.concatenate([by_input["attn_in"], by_input["attn_out"]])}
    k |= {"kv_bank": np.tile(by_input["attn_in"], (2, 1)), "up_bank": by_input["mlp_in"]}
    k |= {**by_input, "down_bank": by_input["mlp_mid"]}
    weights = {}
    for name, values in split(unpack("lzma", *stored[4]), "<f2", shapes.floats).items():
        weights[name] = values.astype("f4")
    codes = decode(header["compressor"], *stored[0], shapes.banks, levels, k)
    for name, q in codes.items():
        step = scales[name].astype("f4")[..., None]
        weights[name] = q * step * (2.0 ** (k[name][:, None] / 4)).astype("f4")
    for name in shapes.tables:
        weights[name] = weights[name][0]
    dtype = torch.get_default_dtype()
    return c, {name: torch.tensor(w, dtype=dtype) for name, w in weights.items()}


def decode(
    codec: str, data: bytes, size: int, shapes: dict, levels: dict, k: dict
) -> dict[str, np.ndarray]:
    """The codes of all banks. k: exponents of the column scales by bank."""
    if codec == "ans":
        args = (list(shapes.values()), list(levels.values()), [k[name] for name in shapes])
        return dict(zip(shapes, decode_ans(data, *args), strict=True))
    codes = split(unpack(codec, data, size), "i1", shapes)
    for name, flat in codes.items():  # sorted by the size to expect
        expected = levels[name][:, :, None].astype(int) - 2 * k[name][:, None].astype(int)
        q = np.empty(flat.size, np.int8)
        q[expected.argsort(axis=None, kind="stable")] = flat.ravel()
        codes[name] = q.reshape(flat.shape)
    return codes


def split(data: bytes, kind: str, shapes: dict) -> dict[str, np.ndarray]:
    """Arrays that lie end to end."""
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    arrays = np.split(np.frombuffer(data, kind), ends[:-1])
    return {n: a.reshape(s) for (n, s), a in zip(shapes.items(), arrays, strict=True)}


def unrolled(c: dict, loops: int) -> list[int]:
    """The layers in the order in which they run."""
    loop = list(range(c["loop_start"], c["loop_end"] + 1)) * loops
    return [*range(c["loop_start"]), *loop, *range(c["loop_start"], c["num_layers"])]


def skip_pairs(c: dict, loops: int) -> list[tuple[int, int]]:
    """(receiver, source) of every skip connection."""
    order = unrolled(c, loops)
    half = len(order) // 2
    return list(zip(order[half:], reversed(order[:half]), strict=False))


def visits(c: dict) -> list[tuple[int, list[int] | None]]:
    """The layers in order, each with the rows of skip_weights whose mean its skip uses."""
    loops = c["num_loops"] if c["looped"] else 0
    rows = skip_pairs(c, c["num_loops"])
    skips = []
    for position, pair in enumerate(skip_pairs(c, loops)):
        same = [row for row, known in enumerate(rows) if known == pair]
        skips.append([position] if c["looped"] or not same else same)
    order = unrolled(c, loops)
    return list(zip(order, [None] * (len(order) // 2) + skips + [None], strict=False))


def windows(count: int, length: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, first scored, end) of windows that score `count` targets once."""
    found = []
    for start in range(0, max(count - length, 0) + stride, stride):
        found.append((start, start + length - stride if start else 0, min(start + length, count)))
    return found


# === Settings =====================================================================================
def number(value: object) -> object:
    """A setting as a log prints it, as a number or a truth value where it is one."""
    if value in ("True", "False"):
        return value == "True"
    for kind in (int, float):
        try:
            return value if isinstance(value, bool) else kind(str(value))
        except ValueError:
            continue
    return value


def pairs(text: object) -> list[tuple[str, float]]:
    """The pairs of a setting as q:0.5,v:1.5."""
    split = [pair.split(":") for pair in str(text).split(",") if pair]
    return [(name, float(value)) for name, value in split]
