"""What an artifact costs: coders of the same integers, and quantisers at equal bytes.

    python bench/artifact.py --full                 # Gaussian weights of the record network's size
    python bench/artifact.py                        # the same for a small network: a quick look
    python bench/artifact.py runs/ID/final_model.pt # a checkpoint; environment as for its run

The Gaussian weights are seeded, and their rows and columns differ in size. Needs what the run
needs; pickle + Brotli and ZPAQ (lrzip) appear where these are installed. ZPAQ takes minutes for 36
million codes; ZPAQ=0 leaves it out. The last line is `bench ` and a JSON object; null is what was
not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import json
import lzma
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg

Packed = dict[str, tuple[Tensor, Tensor]]  # codes int8 (n, rows, cols), scales fp16 (n, rows)
QUIET = tg.Log(Path(os.devnull), is_main=False)
SMALL = dict(
    num_layers=2,
    model_dim=256,
    vocab_size=2048,
    num_loops=0,
    parallel_start_layer=0,
    xsa_last_n=2,
)


def gaussian_codes(cfg: tg.Config) -> Packed:
    """Codes at published steps for Gaussian weights whose rows and columns differ in size."""
    rng = np.random.default_rng(0)
    packed = {}
    for bank, (n, rows, cols) in tg.bank_shapes(cfg).items():
        weight = rng.standard_normal((n, rows, cols), dtype=np.float32)
        weight *= np.exp(0.4 * rng.standard_normal((n, rows, 1), dtype=np.float32))
        weight *= np.exp(0.3 * rng.standard_normal((n, 1, cols), dtype=np.float32))
        is_table = tg.parameter_table(cfg)[bank].is_table
        bits, clip = (7, 15.0) if is_table else (6, 12.85)
        scale = tg.clip_steps(torch.from_numpy(weight), clip, 2 ** (bits - 1) - 1)
        q = np.rint(weight / scale.float().numpy()[..., None]).clip(-127, 127).astype(np.int8)
        packed[bank] = (torch.from_numpy(q), scale)
    return packed


# --- Coders of the same integers ------------------------------------------------------------------
def entropy_given_levels(arrays: list[np.ndarray]) -> float:
    """Entropy given each row's level, in bytes: the bound for a coder that knows rows only."""
    total = 0.0
    for q in arrays:
        levels = tg.row_levels(q).ravel()
        rows = q.reshape(-1, q.shape[-1])
        for level in np.unique(levels):
            total += tg.code_entropy_bytes([rows[levels == level]])
    return total


class AnsCoder:
    """The entropy coder of train_gpt.py together with the levels that the container stores."""

    def __init__(self, shapes: dict[str, tuple[int, int, int]]):
        """Codes and decodes arrays of these shapes, end to end."""
        self.shapes = shapes
        self.row_shapes = {name: shape[:2] for name, shape in shapes.items()}

    def compress(self, data: bytes) -> bytes:
        """u32 size of the levels, the levels in LZMA, the stream of codes."""
        arrays = tg.split_arrays(np.frombuffer(data, np.int8), self.shapes)
        codes = list(arrays.values())
        levels = [tg.row_levels(q) for q in codes]
        stored = tg.compress("lzma", b"".join(level.tobytes() for level in levels))
        return len(stored).to_bytes(4, "little") + stored + tg.ans_encode(codes, levels)

    def decompress(self, data: bytes) -> bytes:
        """The bytes of the arrays."""
        end = 4 + int.from_bytes(data[:4], "little")
        num_rows = sum(math.prod(shape) for shape in self.row_shapes.values())
        flat = np.frombuffer(tg.decompress("lzma", data[4:end], num_rows), np.uint8)
        levels = list(tg.split_arrays(flat, self.row_shapes).values())
        codes = tg.ans_decode(data[end:], list(self.shapes.values()), levels)
        return b"".join(q.tobytes() for q in codes)


class Method(NamedTuple):
    """One way to store the integers of a network."""

    name: str
    data: bytes  # what is compressed: the bytes of the integers, or a pickle of their tensors
    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]


class Result(NamedTuple):
    """What a method needed."""

    size: int  # bytes
    encode_s: float
    decode_s: float


def lrzip(data: bytes, options: str) -> bytes:
    """What lrzip makes of `data` with these options."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.lrz"
        target = Path(folder) / "out"
        source.write_bytes(data)
        command = ["lrzip", "-Q", *options.split(), "-o", str(target), str(source)]
        subprocess.run(command, check=True)
        return target.read_bytes()


def available_methods(packed: Packed) -> list[Method]:
    """All methods whose packages and programs are installed."""
    import zstandard

    codes = {name: q for name, (q, _) in packed.items()}
    plain = b"".join(q.numpy().tobytes() for q in codes.values())
    buffer = io.BytesIO()
    torch.save(codes, buffer)
    pickled = buffer.getvalue()

    zstd = partial(tg.compress, "zstd")
    unzstd = partial(tg.decompress, "zstd", size=len(plain))
    ans = AnsCoder({name: tuple(q.shape) for name, q in codes.items()})
    zstd_22 = partial(zstandard.compress, level=22)
    methods = [
        Method("pickle + zstd 22", pickled, zstd_22, zstandard.decompress),
        Method("lzma 6", plain, partial(lzma.compress, preset=6), lzma.decompress),
        Method("zstd (ours)", plain, zstd, unzstd),
        Method("ans (ours)", plain, ans.compress, ans.decompress),
    ]
    if importlib.util.find_spec("brotli"):
        import brotli

        brotli_11 = partial(brotli.compress, quality=11)
        methods.append(Method("pickle + Brotli 11", pickled, brotli_11, brotli.decompress))
    if shutil.which("lrzip") and os.environ.get("ZPAQ", "1") == "1":
        zpaq = partial(lrzip, options="-z -L 9")
        methods.append(Method("ZPAQ (lrzip -z -L 9)", plain, zpaq, partial(lrzip, options="-d")))
    return methods


def measure(method: Method) -> Result:
    """Compresses and decompresses once. Raises AssertionError if it is not lossless."""
    start = time.perf_counter()
    data = method.compress(method.data)
    encoded = time.perf_counter()
    restored = method.decompress(data)
    decoded = time.perf_counter()
    assert restored == method.data, method.name
    return Result(len(data), encoded - start, decoded - encoded)


def compare_coders(packed: Packed) -> dict[str, float | None]:
    """Prints a line a method, with the peak memory of the process.

    Returns the figures of the last line; None is a ratio to a method that is not installed.
    """
    arrays = [q.numpy() for q, _ in packed.values()]
    num_codes = sum(q.size for q in arrays)
    entropy = tg.code_entropy_bytes(arrays)
    conditional = entropy_given_levels(arrays)
    print(
        f"{num_codes} codes; entropy of order 0 {entropy:.0f} bytes, "
        f"given the row's level {conditional:.0f}"
    )
    print(
        f"{'method':<22}{'bytes':>11}{'bits/w':>8}{'/order0':>8}{'/row':>8}"
        f"{'enc s':>7}{'dec s':>7}{'MiB':>7}"
    )
    results = {}
    for method in available_methods(packed):
        result = measure(method)
        results[method.name] = result
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(
            f"{method.name:<22}{result.size:>11}{8 * result.size / num_codes:>8.3f}"
            f"{result.size / entropy:>8.4f}{result.size / conditional:>8.4f}"
            f"{result.encode_s:>7.2f}{result.decode_s:>7.2f}{peak_mib:>7}"
        )

    ans = results["ans (ours)"]
    ans_over_brotli = None
    if "pickle + Brotli 11" in results:
        ans_over_brotli = round(ans.size / results["pickle + Brotli 11"].size, 5)
    return {
        "zstd_over_entropy": round(results["zstd (ours)"].size / entropy, 5),
        "ans_over_entropy": round(ans.size / entropy, 5),
        "ans_over_brotli": ans_over_brotli,
        "encode_s": round(ans.encode_s, 5),
        "decode_s": round(ans.decode_s, 5),
    }


# --- Quantisers at equal bytes --------------------------------------------------------------------
class Checkpoint:
    """A trained network with its calibration rows and its validation documents."""

    def __init__(self, path: str):
        """Reads a checkpoint and calibrates. Raises UsageError if the file is none."""
        env = {"TTT_ENABLED": "0", "VAL_DOC_FRACTION": "0.1", **os.environ, "EVAL_ONLY_PATH": path}
        cfg, origin = tg.Config.from_env(env, torch.cuda.is_available())
        self.cfg, saved = tg.load_model_file(cfg, origin)
        if "weights" not in saved:
            raise tg.UsageError(
                f"{path}: is an artifact; a checkpoint is needed, final_model.pt beside it"
            )
        self.ranks = tg.Ranks({})
        tokenizer = tg.Tokenizer.load(self.cfg)
        streams = {split: tg.TokenStream(self.cfg.dataset_dir, split) for split in ("train", "val")}
        tg.check_shards(self.cfg, tokenizer, self.ranks, streams)
        self.docs = tg.Documents.load(streams["val"], tokenizer.bos_id, self.cfg)
        self.table, _ = tg.check_bytes(tokenizer, self.docs, self.ranks)
        self.plan = self.cfg.plans[saved["looped"]]
        backend, _ = tg.choose_attention(
            self.cfg.attention_backend, self.ranks.device, self.cfg.dtype
        )
        self.model = tg.GPT(self.cfg, backend).to(self.ranks.device)
        self.model.load_state_dict(saved["weights"])
        loader = tg.PackedLoader(streams["train"], tokenizer.bos_id, self.cfg, self.ranks)
        self.rows, _ = loader.rows(self.cfg.gptq_calibration_batches)
        self.calibrate()

    def calibrate(self) -> None:
        """Measures Hessians (the published ones and ours) and sensitivities."""
        model, rows = self.model, self.rows
        self.hessians = tg.collect_hessians(model, self.plan, rows, self.ranks)
        # Here the Hessian of the tied table is replaced by that of both its roles.
        self.hessians_of_both_roles = dict(self.hessians)
        self.sensitivities = tg.collect_sensitivities(
            model, model, self.plan, rows, self.hessians_of_both_roles, self.ranks
        )

    def bpb(self, data: bytes | None = None) -> float:
        """Bits per byte of the network, or of the artifact `data` of it."""
        model = self.model
        if data:
            model = tg.GPT(self.cfg, self.model.attention_backend).to(self.ranks.device)
            _, arrays = tg.open_artifact(data, Path("artifact"))
            tg.load_artifact(model, arrays)
        ledger = tg.Ledger(self.docs, self.table, self.ranks.device)
        scorer = tg.Scorer(model, self.plan, ledger, self.cfg, self.ranks, QUIET)
        return tg.score_all(scorer, 0).result()["val_bpb"]

    def weighted_error(self, data: bytes) -> float:
        """Sum over rows of sensitivity * e H e^T, e the error of an artifact's weights.

        This is the quantisers' own measure of harm: nats, up to one factor.
        """
        _, arrays = tg.open_artifact(data, Path("artifact"))
        shapes = tg.bank_shapes(self.cfg)
        total = 0.0
        for matrix in tg.quantised_matrices(self.cfg):
            bank, i = matrix.bank, matrix.index
            scale = arrays.scales[bank][i].astype(np.float32)
            restored = torch.from_numpy(arrays.codes[bank][i] * scale[:, None])
            weight = self.model.get_parameter(bank).detach().view(shapes[bank])[i]
            e = weight - restored.to(self.ranks.device)
            harm = ((e @ self.hessians_of_both_roles[matrix.input_key]) * e).sum(-1)
            total += float((harm * self.sensitivities[bank][i]).sum())
        return total

    def identities(self) -> tg.Hessians:
        """Hessians without correlations: the solver then rounds to nearest."""
        return {key: torch.eye(len(h), device=h.device) for key, h in self.hessians.items()}


def compare_quantizers(point: Checkpoint) -> Packed:
    """Prints a line a quantiser, all fitted to the bytes of published GPTQ and coded with ans.

    Returns the integers and scales of the last one, ours.
    """
    model, ranks = point.model, point.ranks
    published = dataclasses.replace(
        point.cfg, quantizer="gptq", compressor="ans", artifact_limit_bytes=0
    )
    model.cfg = published
    unquantised = point.bpb()
    quantizer = tg.Quantizer(model, point.hessians, None, ranks)
    published_size = len(tg.fit_artifact(quantizer, model, {}, QUIET))
    model.cfg = dataclasses.replace(
        published, artifact_limit_bytes=published_size + 2048 + tg.CODE_BYTES
    )
    print(
        f"{'quantiser':<20}{'bytes':>11}{'weighted error':>16}{'bpb lost':>10}{'s':>7}"
        f"  unquantised {unquantised:.5f}"
    )
    for name, hessians, sensitivities in (
        ("round to nearest", point.identities(), None),
        ("published GPTQ", point.hessians, None),
        ("allocated (ours)", point.hessians_of_both_roles, point.sensitivities),
    ):
        start = time.perf_counter()
        quantizer = tg.Quantizer(model, hessians, sensitivities, ranks)
        data = tg.fit_artifact(quantizer, model, {}, QUIET)
        seconds = time.perf_counter() - start
        lost = point.bpb(data) - unquantised
        error = point.weighted_error(data)
        print(f"{name:<20}{len(data):>11}{error:>16.4e}{lost:>10.5f}{seconds:>7.1f}", flush=True)

    _, arrays = tg.open_artifact(data, Path("artifact"))
    packed = {}
    for bank, q in arrays.codes.items():
        packed[bank] = (torch.from_numpy(q.copy()), torch.from_numpy(arrays.scales[bank].copy()))
    return packed


def main(argv: list[str]) -> int:
    """Prints the tables. Exit status 2 if the file is not a checkpoint of train_gpt.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", help="final_model.pt; without it Gaussian weights")
    parser.add_argument("--full", action="store_true", help="Gaussian weights at full size")
    args = parser.parse_args(argv)
    if args.checkpoint:
        try:
            point = Checkpoint(args.checkpoint)
        except tg.UsageError as error:
            print(f"bench/artifact.py: {error}", file=sys.stderr)
            return 2
        packed = compare_quantizers(point)
    else:
        packed = gaussian_codes(tg.Config() if args.full else tg.Config(**SMALL))
    print("bench " + json.dumps(compare_coders(packed)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
