"""What an artifact costs, in two tables: coders of the same integers, and quantisers at equal bytes.

    python bench/artifact.py --full                 # seeded Gaussian weights of uneven rows and columns, full size
    python bench/artifact.py                        # the same of a small network, for a quick look
    python bench/artifact.py runs/ID/final_model.pt # a checkpoint; environment as for the run that made it

Needs what the run needs; pickle + Brotli and ZPAQ (lrzip) appear where these are installed. ZPAQ of 36 M codes takes
minutes: ZPAQ=0 leaves it out. The last line is `bench ` and JSON."""

from __future__ import annotations

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

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg

Packed = dict[str, tuple[torch.Tensor, torch.Tensor]]


def gaussian(cfg: tg.Config) -> Packed:
    """Integers of the published steps for Gaussian weights whose rows and columns differ in size."""
    rng, packed = np.random.default_rng(0), {}
    for bank, (n, rows, cols) in tg.bank_shapes(cfg).items():
        weight = rng.standard_normal((n, rows, cols), dtype=np.float32)
        weight *= np.exp(0.4 * rng.standard_normal((n, rows, 1), dtype=np.float32))
        weight *= np.exp(0.3 * rng.standard_normal((n, 1, cols), dtype=np.float32))
        bits, clip = (7, 15.0) if bank == "tok_emb" else (6, 12.85)
        scale = tg.clip_steps(torch.from_numpy(weight), clip, 2 ** (bits - 1) - 1)
        q = np.rint(weight / scale.float().numpy()[..., None]).clip(-127, 127).astype(np.int8)
        packed[bank] = torch.from_numpy(q), scale
    return packed


def order_0(codes: np.ndarray) -> float:  # bytes
    count = np.bincount(codes.view(np.uint8).ravel())
    count = count[count > 0]
    return float(-(count * np.log2(count / count.sum())).sum() / 8)


def per_row(packed: Packed) -> float:
    """Entropy given each row's level, in bytes: what a coder reaches that knows rows but not columns."""
    total = 0.0
    for q, _ in packed.values():
        level, rows = tg.row_levels(q.numpy()).ravel(), q.numpy().reshape(-1, q.shape[-1])
        total += sum(order_0(rows[level == k]) for k in np.unique(level))
    return total


class Methods:
    """name -> (encode, decode) of the codes of one network; pickles hold the tensors, the others their bytes."""

    def __init__(self, packed: Packed):
        self.arrays = [q.numpy() for q, _ in packed.values()]
        self.plain = b"".join(q.tobytes() for q in self.arrays)
        buffer = io.BytesIO()
        torch.save({name: q for name, (q, _) in packed.items()}, buffer)
        self.pickled, self.levels = buffer.getvalue(), [tg.row_levels(q) for q in self.arrays]

    def ans(self) -> bytes:
        levels = tg.codec("lzma")[0](
            b"".join(lv.tobytes() for lv in self.levels)
        )  # as the container stores them
        return len(levels).to_bytes(4, "little") + levels + tg.ans_encode(self.arrays, self.levels)

    def unans(self, data: bytes) -> bytes:
        shapes, end = [q.shape for q in self.arrays], 4 + int.from_bytes(data[:4], "little")
        levels = np.frombuffer(
            tg.codec("lzma")[1](data[4:end], sum(lv.size for lv in self.levels)), np.uint8
        )
        levels = tg.split_arrays(levels, [shape[:2] for shape in shapes])
        return b"".join(q.tobytes() for q in tg.ans_decode(data[end:], shapes, levels))

    def table(self) -> dict[str, tuple[Callable[[], bytes], Callable[[bytes], bytes], bytes]]:
        import zstandard

        zstd, unzstd = tg.codec("zstd")
        size, plain, pickled = len(self.plain), self.plain, self.pickled
        found = {
            "pickle + zstd 22": (
                lambda: zstandard.compress(pickled, 22),
                zstandard.decompress,
                pickled,
            ),
            "lzma 6": (lambda: lzma.compress(plain, preset=6), lzma.decompress, plain),
            "zstd (ours)": (lambda: zstd(plain), lambda data: unzstd(data, size), plain),
            "ans (ours)": (self.ans, self.unans, plain),
        }
        if importlib.util.find_spec("brotli"):
            import brotli

            found["pickle + Brotli 11"] = (
                lambda: brotli.compress(pickled, quality=11),
                brotli.decompress,
                pickled,
            )
        if shutil.which("lrzip") and os.environ.get("ZPAQ", "1") == "1":
            pack, unpack = partial(lrzip, plain, "-z -L 9"), partial(lrzip, options="-d")
            found["ZPAQ (lrzip -z -L 9)"] = pack, unpack, plain
        return found


def lrzip(data: bytes, options: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.lrz", Path(folder) / "out"
        source.write_bytes(data)
        subprocess.run(
            ["lrzip", "-Q", *options.split(), "-o", str(target), str(source)], check=True
        )
        return target.read_bytes()


def coders(packed: Packed) -> dict[str, float]:
    methods, found = Methods(packed), {}
    codes = np.concatenate([q.ravel() for q in methods.arrays])
    entropy, conditional = order_0(codes), per_row(packed)
    print(
        f"{codes.size} codes; entropy of order 0 {entropy:.0f} bytes, given the row's level {conditional:.0f}"
    )
    print(
        f"{'method':<22}{'bytes':>11}{'bits/w':>8}{'/order0':>8}{'/row':>8}{'enc s':>7}{'dec s':>7}{'MiB':>7}"
    )
    for name, (encode, decode, plain) in methods.table().items():
        start = time.perf_counter()
        data = encode()
        middle = time.perf_counter()
        assert decode(data) == plain, name
        end, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        found[name] = len(data), middle - start, end - middle
        print(
            f"{name:<22}{len(data):>11}{8 * len(data) / codes.size:>8.3f}{len(data) / entropy:>8.4f}"
            f"{len(data) / conditional:>8.4f}{middle - start:>7.2f}{end - middle:>7.2f}{peak:>7}"
        )
    size, encode_s, decode_s = found["ans (ours)"]
    brotli = found.get("pickle + Brotli 11", (math.nan,))[0]
    return {
        "zstd_over_entropy": found["zstd (ours)"][0] / entropy,
        "ans_over_entropy": size / entropy,
        "ans_over_brotli": size / brotli,
        "encode_s": encode_s,
        "decode_s": decode_s,
    }


QUIET = tg.Log(Path(os.devnull), is_main=False)


class Checkpoint:
    """A trained network with its calibration rows and its validation documents."""

    def __init__(self, path: str):
        env = {"TTT_ENABLED": "0", "VAL_DOC_FRACTION": "0.1", **os.environ, "EVAL_ONLY_PATH": path}
        cfg, origin = tg.Config.from_env(env, torch.cuda.is_available())
        self.cfg, saved = tg.load_model_file(cfg, origin)
        if "weights" not in saved:
            raise tg.UsageError(
                f"{path}: is an artifact; a checkpoint is needed, final_model.pt beside it"
            )
        self.ranks, tokenizer = tg.Ranks({}), tg.Tokenizer.load(self.cfg)
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
        self.hessians = tg.collect_hessians(self.model, self.plan, self.rows, self.ranks)
        self.both = dict(self.hessians)  # the embedding's Hessian of both its roles
        self.loss = tg.collect_sensitivities(
            self.model, self.model, self.plan, self.rows, self.both, self.ranks
        )

    def bpb(self, data: bytes | None = None) -> float:
        model = self.model
        if data:
            model = tg.GPT(self.cfg, self.model.attention_backend).to(self.ranks.device)
            tg.load_artifact(model, tg.open_artifact(data, Path("artifact"))[1])
        ledger = tg.Ledger(self.docs, self.table, self.ranks.device)
        scorer = tg.Scorer(model, self.plan, ledger, self.cfg, self.ranks, QUIET)
        return tg.score_all(scorer, 0).result()["val_bpb"]

    def error(self, packed: Packed) -> float:
        """Sum over rows of sensitivity * e H e^T: the quantisers' own measure of harm, nats up to one factor."""
        total = 0.0
        for bank, i, site, layer in tg.quantised_matrices(self.cfg):
            q, scale = (x[i].to(self.ranks.device).float() for x in packed[bank])
            weight = self.model.get_parameter(bank).detach().view(tg.bank_shapes(self.cfg)[bank])[i]
            e = weight - q * scale[:, None]
            total += float((((e @ self.both[site, layer]) * e).sum(-1) * self.loss[bank][i]).sum())
        return total

    def nearest(self) -> dict:  # Hessians without correlations: the solver then rounds to nearest
        return {key: torch.eye(len(h), device=h.device) for key, h in self.hessians.items()}


def unpacked(data: bytes, cfg: tg.Config) -> Packed:  # codes and scales of an artifact
    _, streams = tg.open_artifact(data, Path("artifact"))
    shapes = tg.bank_shapes(cfg)
    codes = tg.split_arrays(np.frombuffer(streams[0], np.int8), shapes.values())
    scales = tg.split_arrays(
        np.frombuffer(streams[2], np.float16), [shape[:2] for shape in shapes.values()]
    )
    parts = zip(shapes, codes, scales, strict=True)
    return {
        bank: (torch.from_numpy(q.copy()), torch.from_numpy(scale.copy()))
        for bank, q, scale in parts
    }


def quantizers(point: Checkpoint) -> Packed:
    """Round to nearest, published GPTQ and ours, all fitted to the bytes of the published one and coded with ans."""
    cfg, model, ranks = point.cfg, point.model, point.ranks
    published = dataclasses.replace(cfg, quantizer="gptq", compressor="ans", artifact_limit_bytes=0)
    model.cfg, before = published, point.bpb()
    limit = (
        len(tg.fit_artifact(tg.Quantizer(model, point.hessians, None, ranks), model, {}, QUIET))
        + 2048
        + tg.CODE_BYTES
    )
    print(
        f"{'quantiser':<20}{'bytes':>11}{'weighted error':>16}{'bpb lost':>10}{'s':>7}  unquantised {before:.5f}"
    )
    for name, hessians, loss in (
        ("round to nearest", point.nearest(), None),
        ("published GPTQ", point.hessians, None),
        ("allocated (ours)", point.both, point.loss),
    ):
        start = time.perf_counter()
        model.cfg = dataclasses.replace(published, artifact_limit_bytes=limit)
        solver = tg.Quantizer(model, hessians, loss, ranks)
        data = tg.fit_artifact(solver, model, {}, QUIET)
        seconds, packed = time.perf_counter() - start, unpacked(data, cfg)
        lost = point.bpb(data) - before
        print(
            f"{name:<20}{len(data):>11}{point.error(packed):>16.4e}{lost:>10.5f}{seconds:>7.1f}",
            flush=True,
        )
    return packed


def main(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    small = dict(
        num_layers=2,
        model_dim=256,
        vocab_size=2048,
        num_loops=0,
        parallel_start_layer=0,
        xsa_last_n=2,
    )
    cfg = tg.Config(**({} if argv == ["--full"] else small))
    try:
        point = Checkpoint(argv[0]) if argv and argv != ["--full"] else None
    except tg.UsageError as error:
        print(f"bench/artifact.py: {error}", file=sys.stderr)
        return 2
    packed = quantizers(point) if point else gaussian(cfg)
    print("bench " + json.dumps({key: round(value, 5) for key, value in coders(packed).items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
