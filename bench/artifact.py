"""What an artifact costs: coders of the same integers, and bits against loss of quantisers.

    python bench/artifact.py --full                 # coders only, at the record network's size
    python bench/artifact.py                        # small Gaussian weights, a trained miniature
    python bench/artifact.py runs/ID/final_model.pt # a checkpoint; environment as for its run
    python bench/artifact.py --png curves.png       # the rate-distortion curves as a picture too

The coders get integers of seeded Gaussian weights whose rows and columns differ in size. Needs what
the run needs; pickle + Brotli and ZPAQ (lrzip) appear where these are installed. ZPAQ takes minutes
for 36 million codes; ZPAQ=0 leaves it out. The miniature needs the data of `make run`. The last
line is `bench ` and a JSON object; null is what was not measured.
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

Packed = dict[str, Tensor]  # codes int8 (n, rows, cols) by bank
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
        packed[bank] = torch.from_numpy(q)
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
        # As other coders, it knows nothing of column scales here.
        self.columns = [np.zeros((n, cols), np.int8) for n, _, cols in shapes.values()]

    def compress(self, data: bytes) -> bytes:
        """u32 size of the levels, the levels in LZMA, the stream of codes."""
        arrays = tg.split_arrays(np.frombuffer(data, np.int8), self.shapes)
        codes = list(arrays.values())
        levels = [tg.row_levels(q) for q in codes]
        stored = tg.compress("lzma", b"".join(level.tobytes() for level in levels))
        coded = tg.ans_encode(codes, levels, self.columns)
        return len(stored).to_bytes(4, "little") + stored + coded

    def decompress(self, data: bytes) -> bytes:
        """The bytes of the arrays."""
        end = 4 + int.from_bytes(data[:4], "little")
        num_rows = sum(math.prod(shape) for shape in self.row_shapes.values())
        flat = np.frombuffer(tg.decompress("lzma", data[4:end], num_rows), np.uint8)
        levels = list(tg.split_arrays(flat, self.row_shapes).values())
        codes = tg.ans_decode(data[end:], list(self.shapes.values()), levels, self.columns)
        return b"".join(q.astype(np.int8).tobytes() for q in codes)


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

    plain = b"".join(q.numpy().tobytes() for q in packed.values())
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    pickled = buffer.getvalue()

    zstd = partial(tg.compress, "zstd")
    unzstd = partial(tg.decompress, "zstd", size=len(plain))
    ans = AnsCoder({name: tuple(q.shape) for name, q in packed.items()})
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
    arrays = [q.numpy() for q in packed.values()]
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


# --- Quantisers: bits a weight against loss -------------------------------------------------------
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
        self.unquantised = self.score()

    def calibrate(self) -> None:
        """Measures Hessians (the published ones and ours) and sensitivities."""
        model, rows = self.model, self.rows
        self.hessians = tg.collect_hessians(model, self.plan, rows, self.ranks)
        # Here the Hessian of the tied table is replaced by that of both its roles.
        self.hessians_of_both_roles = dict(self.hessians)
        self.sensitivities = tg.collect_sensitivities(
            model, model, self.plan, rows, self.hessians_of_both_roles, self.ranks
        )

    def score(self, data: bytes | None = None) -> float:
        """Nats per target of the network, or of the artifact `data` of it."""
        model = self.model
        if data:
            model = tg.GPT(self.cfg, self.model.attention_backend).to(self.ranks.device)
            _, arrays = tg.open_artifact(data, Path("artifact"))
            tg.load_artifact(model, arrays)
        ledger = tg.Ledger(self.docs, self.table, self.ranks.device)
        scorer = tg.Scorer(model, self.plan, ledger, self.cfg, self.ranks, QUIET)
        return tg.score_all(scorer, 0).result()["val_loss"]

    def weighted_error(self, data: bytes) -> float:
        """Sum over rows of sensitivity * e H e^T, e the error of an artifact's weights.

        This is the quantisers' own measure of harm: nats, up to one factor.
        """
        restored = tg.GPT(self.cfg, self.model.attention_backend).to(self.ranks.device)
        _, arrays = tg.open_artifact(data, Path("artifact"))
        tg.load_artifact(restored, arrays)
        total = 0.0
        for matrix in tg.quantised_matrices(self.cfg):
            bank, i = matrix.bank, matrix.index
            shape = tg.bank_shapes(self.cfg)[bank]
            e = self.model.get_parameter(bank).detach().view(shape)[i]
            e = e - restored.get_parameter(bank).detach().view(shape)[i]
            harm = ((e @ self.hessians_of_both_roles[matrix.input_key]) * e).sum(-1)
            total += float((harm * self.sensitivities[bank][i]).sum())
        return total

    def identities(self) -> tg.Hessians:
        """Hessians without correlations: the solver then rounds to nearest."""
        return {key: torch.eye(len(h), device=h.device) for key, h in self.hessians.items()}


class Quantising(NamedTuple):
    """One way to quantise a network, at every size."""

    name: str
    quantizer: str  # QUANTIZER
    column_scales: bool
    knows_inputs: bool = True  # False: identities in place of the Hessians


ROWS = Quantising("allocated, rows", "allocated", False)
ROWS_AND_COLUMNS = Quantising("rows and columns", "allocated", True)
PUBLISHED = Quantising("published GPTQ", "gptq", False)
QUANTISERS = (
    Quantising("round to nearest", "gptq", False, knows_inputs=False),
    PUBLISHED,
    Quantising("published, columns", "gptq", True),
    ROWS,
    ROWS_AND_COLUMNS,
)
BITS = (2.0, 2.5, 3.0, 3.5)  # predicted bits a weight of the integers


class Measured(NamedTuple):
    """An artifact of one size."""

    size: int  # bytes
    bits: float  # of the whole artifact but its fp16 values, a weight
    error: float  # see Checkpoint.weighted_error
    lost: float  # nats per target
    seconds: float  # to quantise and pack, without the Hessians' factors
    bound: float | None  # least bits a weight for this error; None without sensitivities


def least_bits(quantizer: tg.Quantizer, error: float) -> float:
    """Bits a weight below which no code has this weighted error, for independent Gaussian weights.

    Reverse water-filling over groups of weights: a weight of power p and cost c, both from the
    quantiser, is left the error min(p, theta / c) and takes 1/2 log2 of p over that. A quantiser
    that rounds to multiples of a step needs a quarter of a bit more where its steps are fine.
    """
    costs = []
    counts = []
    for bank, rows in quantizer.rows.items():
        cost = (rows.cost * rows.power)[..., None] * rows.column_power[:, None]
        costs.append(cost.double().flatten())
        cols = quantizer.shapes[bank][2]
        counts.append(torch.full_like(costs[-1], cols / rows.column_power.size(1)))
    cost = torch.cat(costs)
    count = torch.cat(counts)
    low, high = -140.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        if (cost.clamp_max(2.0**middle) * count).sum() <= error:
            low = middle
        else:
            high = middle
    bits = 0.5 * (cost / 2.0**low).log2().clamp_min(0)
    return float((bits * count).sum() / count.sum())


def measure_curve(point: Checkpoint, way: Quantising) -> list[Measured]:
    """Quantises to several sizes and scores each. Prints a line a size."""
    changes = dict(quantizer=way.quantizer, column_scales=way.column_scales)
    model = point.model
    model.cfg = dataclasses.replace(point.cfg, **changes, compressor="ans", artifact_limit_bytes=0)
    sensitivities = None
    hessians = point.hessians if way.knows_inputs else point.identities()
    if way.quantizer == "allocated":
        hessians, sensitivities = point.hessians_of_both_roles, point.sensitivities
    quantizer = tg.Quantizer(model, hessians, sensitivities, point.ranks)
    num_weights = sum(math.prod(shape) for shape in quantizer.shapes.values())
    num_floats = sum(math.prod(shape) for shape in tg.float_shapes(point.cfg).values())
    curve = []
    for bits in BITS:
        start = time.perf_counter()
        quantised = quantizer.solve(quantizer.theta_for(bits * num_weights / 8))
        data = tg.pack_artifact(model, quantised, {})
        seconds = time.perf_counter() - start
        error = point.weighted_error(data)
        measured = Measured(
            size=len(data),
            bits=8 * (len(data) - 2 * num_floats) / num_weights,
            error=error,
            lost=point.score(data) - point.unquantised,
            seconds=seconds,
            bound=None if sensitivities is None else least_bits(quantizer, error),
        )
        bound = "" if measured.bound is None else f"{measured.bound:.3f}"
        print(
            f"{way.name:<20}{measured.size:>11}{measured.bits:>8.3f}{bound:>8}"
            f"{measured.error:>13.4e}{measured.lost:>11.6f}{measured.seconds:>7.1f}",
            flush=True,
        )
        curve.append(measured)
    return curve


def loss_at(curve: list[Measured], size: float) -> float | None:
    """Nats lost at a size in bytes, between the measured ones on a logarithmic scale of losses.

    None beyond them. Sizes at which the network seems to have lost nothing are left out.
    """
    curve = sorted(measured for measured in curve if measured.lost > 0)
    sizes = [measured.size for measured in curve]
    losses = [measured.lost for measured in curve]
    if not sizes or not sizes[0] <= size <= sizes[-1]:
        return None
    return math.exp(np.interp(size, sizes, np.log(losses)))


def loss_ratio(curve: list[Measured], other: list[Measured]) -> float | None:
    """Loss of `curve` over that of `other` at equal bytes: geometric mean over the sizes of both.

    None if their sizes do not overlap.
    """
    ratios = []
    for size in (measured.size for measured in [*curve, *other]):
        losses = loss_at(curve, size), loss_at(other, size)
        if None not in losses:
            ratios.append(math.log(losses[0] / losses[1]))
    return round(math.exp(sum(ratios) / len(ratios)), 4) if ratios else None


def draw(curves: dict[str, list[Measured]], path: Path) -> None:
    """Writes the curves and the bound as a picture. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for name, curve in curves.items():
        axes.plot([m.bits for m in curve], [m.lost for m in curve], marker="o", label=name)
    best = curves[ROWS_AND_COLUMNS.name]
    axes.plot([m.bound for m in best], [m.lost for m in best], "k--", label="bound of the theory")
    axes.set(yscale="log", xlabel="bits a weight", ylabel="nats lost per target")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def compare_quantizers(point: Checkpoint, picture: Path | None) -> dict[str, float | None]:
    """Prints a line a quantiser and size, all coded with ans. Returns figures of the last line."""
    print(
        f"{'quantiser':<20}{'bytes':>11}{'bits/w':>8}{'bound':>8}{'error':>13}{'nats lost':>11}"
        f"{'s':>7}  unquantised {point.unquantised:.5f}"
    )
    curves = {way.name: measure_curve(point, way) for way in QUANTISERS}
    if picture:
        draw(curves, picture)
    best = curves[ROWS_AND_COLUMNS.name]
    return {
        "columns_over_rows_loss": loss_ratio(best, curves[ROWS.name]),
        "columns_over_published_loss": loss_ratio(best, curves[PUBLISHED.name]),
    }


# --- A miniature ----------------------------------------------------------------------------------
MINIATURE = {
    "PRESET": "cpu",
    "RUN_ID": "miniature",
    "NUM_LAYERS": "4",
    "NUM_LOOPS": "0",
    "MODEL_DIM": "96",
    "PARALLEL_START_LAYER": "3",
    "XSA_LAST_N": "4",
    "MAX_WALLCLOCK_SECONDS": "0",
    "ITERATIONS": "150",
    "WARMUP_STEPS": "0",
    "TTT_ENABLED": "0",
    "VAL_DOC_FRACTION": "0.05",
}


def train_miniature(folder: Path) -> Path | None:
    """Trains a small network in `folder`, in half a minute. None without its data set."""
    root = Path(tg.__file__).parent
    environ = {
        **os.environ,
        **MINIATURE,
        "DATA_DIR": os.environ.get("DATA_DIR", str(root / "data")),
    }
    if not (Path(environ["DATA_DIR"]) / "datasets" / tg.CPU["dataset"]).is_dir():
        print(
            f"no miniature: {environ['DATA_DIR']} holds no {tg.CPU['dataset']} (make run makes it)"
        )
        return None
    command = [sys.executable, tg.__file__]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise tg.UsageError(f"the miniature was not trained: {done.stderr.strip()}")
    os.environ.update({name: environ[name] for name in ("PRESET", "DATA_DIR", "VAL_DOC_FRACTION")})
    return folder / "runs" / "miniature" / "final_model.pt"


def quantiser_figures(checkpoint: str | None, picture: Path | None) -> dict[str, float | None]:
    """The figures of compare_quantizers, of a miniature where no checkpoint is given."""
    if checkpoint:
        return compare_quantizers(Checkpoint(checkpoint), picture)
    with tempfile.TemporaryDirectory() as folder:
        path = train_miniature(Path(folder))
        if path:
            return compare_quantizers(Checkpoint(str(path)), picture)
    return {"columns_over_rows_loss": None, "columns_over_published_loss": None}


def main(argv: list[str]) -> int:
    """Prints the tables. Exit status 2 if the file is not a checkpoint of train_gpt.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", help="final_model.pt; without it a miniature")
    parser.add_argument("--full", action="store_true", help="Gaussian weights at full size")
    parser.add_argument("--png", type=Path, help="the curves as a picture, for example curves.png")
    args = parser.parse_args(argv)
    try:
        figures = {} if args.full else quantiser_figures(args.checkpoint, args.png)
    except tg.UsageError as error:
        print(f"bench/artifact.py: {error}", file=sys.stderr)
        return 2
    figures |= compare_coders(gaussian_codes(tg.Config() if args.full else tg.Config(**SMALL)))
    print("bench " + json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
