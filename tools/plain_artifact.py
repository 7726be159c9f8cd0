"""Reads an artifact by its documented format, without any code of train_gpt.py.

The format is that of pack_arrays, ans_encode and pack_codes there, container version 4. The order
of the parameters is that of parameter_table. Value embeddings are not read. The streams of a file
are, in order: codes, row levels, row scales, column exponents, and all other weights in fp16.
"""

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from plain_codes import decode_ans, unpack

# Settings that a file leaves out where they have these values.
DEFAULTS = {
    "leaky_slope": 0.5,
    "rope_train_seq_len": 0,
    "branch_scale": False,
    "bigram_vocab_size": 0,
    "bigram_dim": 128,
    "smear_enabled": False,
    "ve_enabled": False,
    "tables_fp16": False,
    "sparse_attn_gate_enabled": False,
    "sparse_attn_gate_scale": 0.5,
    "smear_gate_enabled": False,
    "gate_window": 12,
}

Arrays = dict[str, np.ndarray]
Settings = dict[str, Any]


class Shapes(NamedTuple):
    """The shapes of the parts of a network by name, in the order of the file."""

    banks: dict[str, tuple[int, ...]]  # integers (matrices, rows, columns), with tables unless fp16
    tables: dict[str, tuple[int, ...]]  # (1, rows, columns)
    floats: dict[str, tuple[int, ...]]
    inputs: dict[str, tuple[int, ...]]  # column exponents by input


def bank_shapes(c: Settings) -> dict[str, tuple[int, ...]]:
    """The banks of matrices (matrices, rows, columns)."""
    L = c["num_layers"]
    C = c["model_dim"]
    kv = c["num_kv_heads"] * (C // c["num_heads"])
    mlp = int(c["mlp_mult"] * C)
    return {
        "qo_bank": (2 * L, C, C),
        "kv_bank": (2 * L, kv, C),
        "up_bank": (L, mlp, C),
        "down_bank": (L, C, mlp),
    }


def float_shapes(c: Settings) -> dict[str, tuple[int, ...]]:
    """The parameters in fp16, without the tables that precede or follow them."""
    L, C, H = c["num_layers"], c["model_dim"], c["num_heads"]
    skips = len(skip_pairs(c, c["num_loops"]))
    shapes = {
        "skip_weights": (skips, C),
        "attn_scale": (L, C),
        "mlp_scale": (L, C),
        "resid_mix": (L, 2, C),
        "q_gain": (L, H),
    }
    if c["skip_gates_enabled"]:
        shapes["skip_gates"] = (skips, C)
    if c["parallel_start_layer"]:
        parallel_layers = L - c["parallel_start_layer"]
        shapes["post_lambdas"] = (parallel_layers, 2, 2)
        shapes["resid_lambdas"] = (parallel_layers, 2)
    if c["bigram_vocab_size"]:
        if c["tables_fp16"]:
            shapes["bigram_emb"] = (1, c["bigram_vocab_size"], c["bigram_dim"])
        shapes["bigram_proj"] = (C, c["bigram_dim"])
        shapes["bigram_scale"] = (1,)
    if c["smear_enabled"]:
        shapes["smear_gate"] = (C,)
    if c["sparse_attn_gate_enabled"]:
        shapes["attn_gate"] = (L, H, c["gate_window"])
    if c["smear_gate_enabled"]:
        shapes["smear_proj"] = (1, c["gate_window"])
        shapes["smear_lambda"] = (1,)
    return shapes


def shapes_of(c: Settings) -> Shapes:
    """The shapes of everything in the file of a network."""
    L = c["num_layers"]
    C = c["model_dim"]
    banks = bank_shapes(c)
    floats = float_shapes(c)
    tables = {"tok_emb": (1, c["vocab_size"], C)}
    if c["bigram_vocab_size"]:
        tables["bigram_emb"] = (1, c["bigram_vocab_size"], c["bigram_dim"])
    inputs = {
        "attn_in": (L, C),
        "attn_out": (L, C),
        "mlp_in": (L, C),
        "mlp_mid": (L, banks["up_bank"][1]),
    }
    if c["tables_fp16"]:
        floats = {"tok_emb": tables["tok_emb"], **floats}
    else:
        banks |= tables
        for name, (_, _, columns) in tables.items():
            inputs[name] = (1, columns)
    return Shapes(banks, tables, floats, inputs)


def read_artifact(data: bytes) -> tuple[Settings, dict[str, torch.Tensor]]:
    """The network's settings, with `looped`, and all of its weights in the default dtype."""
    header, streams = split_file(data)
    settings = DEFAULTS | header["config"] | {"looped": header["looped"]}
    shapes = shapes_of(settings)
    row_shapes = {name: shape[:2] for name, shape in shapes.banks.items()}
    levels = split_array(unpack("lzma", *streams[1]), "u1", row_shapes)
    scales = split_array(unpack("lzma", *streams[2]), "<f2", row_shapes)
    exponents = split_array(unpack("lzma", *streams[3]), "i1", shapes.inputs)
    floats = split_array(unpack("lzma", *streams[4]), "<f2", shapes.floats)

    columns = exponents_of_banks(exponents)
    codes = read_codes(header["compressor"], *streams[0], shapes.banks, levels, columns)
    weights = {name: values.astype("f4") for name, values in floats.items()}
    for name, q in codes.items():
        row_scale = scales[name].astype("f4")[:, :, None]
        column_scale = 2.0 ** (columns[name][:, None, :] / 4)
        weights[name] = q * row_scale * column_scale.astype("f4")
    for name in shapes.tables:
        weights[name] = weights[name][0]
    dtype = torch.get_default_dtype()
    return settings, {name: torch.tensor(w, dtype=dtype) for name, w in weights.items()}


def split_file(data: bytes) -> tuple[dict[str, Any], list[tuple[bytes, int]]]:
    """The header, and each stream with its size when unpacked.

    The file is: PGLM, a version, the length of the header, its checksum, the header, the streams.
    """
    assert data[:5] == b"PGLM\4", "not an artifact of container version 4"
    start = 13 + int.from_bytes(data[5:9], "little")
    header = json.loads(zlib.decompress(data[13:start]))
    streams = []
    for unpacked_size, length, _ in header["streams"]:
        streams.append((data[start : start + length], unpacked_size))
        start += length
    return header, streams


def exponents_of_banks(exponents: Arrays) -> Arrays:
    """The column exponents (matrices, columns) of every bank, from those of the inputs.

    Queries, keys and values read one input, so they share its exponents.
    """
    of_banks = dict(exponents)
    of_banks["qo_bank"] = np.concatenate([exponents["attn_in"], exponents["attn_out"]])
    of_banks["kv_bank"] = np.concatenate([exponents["attn_in"], exponents["attn_in"]])
    of_banks["up_bank"] = exponents["mlp_in"]
    of_banks["down_bank"] = exponents["mlp_mid"]
    return of_banks


def read_codes(
    codec: str,
    data: bytes,
    size: int,
    shapes: Mapping[str, tuple[int, ...]],
    levels: Arrays,
    columns: Arrays,
) -> Arrays:
    """The codes of all banks (matrices, rows, columns).

    levels: of every row, by bank. columns: the column exponents by bank.
    """
    if codec == "ans":
        in_order = [columns[name] for name in shapes]
        banks = decode_ans(data, list(shapes.values()), list(levels.values()), in_order)
        return dict(zip(shapes, banks, strict=True))
    codes = {}
    for name, stored in split_array(unpack(codec, data, size), "i1", shapes).items():
        # Codes of equal expected size lie together in the file.
        level = levels[name][:, :, None].astype(int)
        expected = level - 2 * columns[name][:, None, :].astype(int)
        order = expected.argsort(axis=None, kind="stable")
        restored = np.empty(stored.size, np.int16)
        restored[order] = stored.ravel()
        codes[name] = restored.reshape(stored.shape)
    return codes


def split_array(data: bytes, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Arrays of the given shapes that lie end to end."""
    flat = np.frombuffer(data, kind)
    arrays = {}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape)
        arrays[name] = flat[start:end].reshape(shape)
        start = end
    return arrays


# === Order of the layers ==========================================================================
def unrolled(c: Settings, loops: int) -> list[int]:
    """The layers in the order in which they run, with the loop repeated `loops` times more."""
    first, last = c["loop_start"], c["loop_end"]
    loop = list(range(first, last + 1)) * loops
    return [*range(first), *loop, *range(first, c["num_layers"])]


def skip_pairs(c: Settings, loops: int) -> list[tuple[int, int]]:
    """(receiver, source) of every skip connection, in the order of the receivers."""
    order = unrolled(c, loops)
    middle = len(order) // 2
    return list(zip(order[middle:], reversed(order[:middle]), strict=False))
