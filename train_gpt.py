"""One-file entry for the Parameter Golf challenge: the best language model that fits in 16,000,000 bytes.

    python train_gpt.py                                      # one process, on whatever device there is
    torchrun --standalone --nproc_per_node=8 train_gpt.py    # 8 GPUs over FineWeb shards
    python train_gpt.py --knobs                              # every knob, its meaning and its default per preset

The run: check, warm up, train, calibrate, quantise, pack, reload, score, adapt, report; so the file. Importing it reads
no environment and needs neither a GPU nor an optional package. The system is that of PR #1530 (samacqua) and PR #1560;
W1..W57 number weak points of the published script and stand where they are mended."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import pickle
import random
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:  # the plain reference beside the kernel runs everywhere else
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # macOS, Windows
    triton = None

SOURCE = Path(__file__).read_bytes()  # the text that runs, taken before anyone can edit the file (W35)
LIMIT_BYTES = 16_000_000  # code and model together, decimal
COMPRESSORS = ("zstd", "ans", "lzma", "brotli")
def code_bytes() -> int:  # what the code counts for
    return len(SOURCE)
class UsageError(ValueError):
    """Wrong configuration, data or file. The message is all the user sees, one line per problem; exit status 2."""

# === 1. Configuration: every knob is an environment variable; a field is its variable in lower case ===================
def knob(default: Any, doc: str, lo: float = 0, hi: float = 1e18, choices: tuple = ()) -> Any:
    return dataclasses.field(default=default, metadata=dict(doc=doc, lo=lo, hi=hi, choices=choices))

@dataclasses.dataclass(frozen=True)
class Config:  # defaults are the `record` preset's; `PRESETS` overrides them and the environment both
    # Run and data
    preset: str = knob("record", "row of the preset table; default: record with CUDA, cpu without")
    seed: int = knob(1337, "initial weights, adapter init, document sampling", 0, 2**31)
    run_id: str = knob("", "names the log and the output folder; default: date, preset and seed")
    artifact_dir: str = knob("", "output folder; default: runs/<RUN_ID>")
    eval_only_path: str = knob("", "checkpoint (quantise, score, adapt) or artifact (score, adapt) instead of training")
    data_dir: str = knob("./data", "holds datasets/ and tokenizers/")
    dataset: str = knob("", "folder under datasets/; default: fineweb10B_sp<VOCAB_SIZE>")
    tokenizer_path: str = knob("", "SentencePiece model; default: the manifest's, else fineweb_<VOCAB_SIZE>_bpe.model")
    data_loader: str = knob("documents", "attention stays within documents, or rows", choices=("documents", "rows"))
    compute_dtype: str = knob("bf16", "activations and products; parameters are fp32", choices=("bf16", "fp32"))
    compile: bool = knob(True, "torch.compile the forwards and Newton-Schulz")
    attention_backend: str = knob("auto", "or the first right", choices=("auto", "fa3", "fa4", "fa2", "torch", "sdpa"))
    # Length and schedule of training
    iterations: int = knob(20000, "step limit", 1)
    max_wallclock_seconds: float = knob(600.0, "training, calibration, quantisation, packing; 0: ITERATIONS steps")
    gptq_reserve_seconds: float = knob(-1.0, "of that, kept for all after the last step; -1: measured in warm-up", -1)
    warmup_steps: int = knob(3, "synthetic steps per graph, undone afterwards; 0: compile inside the run")
    warmdown_frac: float = knob(0.75, "last share of the budget, over which the rates fall linearly", 0, 1)
    min_lr: float = knob(0.1, "floor of the learning-rate factor (PR #1787)", 0, 1)
    enable_looping_at: float = knob(0.35, "share of the budget after which the loops run", 0, 1)
    train_batch_tokens: int = knob(786432, "tokens per step, all ranks together", 1)
    micro_batch_tokens: int = knob(98304, "tokens per row; a rank takes every WORLD_SIZE-th row of a step", 1)
    train_seq_len: int = knob(2048, "longest segment; longer documents are cut", 2)
    cu_seqlens_capacity: int = knob(512, "segments a row can hold: one shape, one graph (W25)", 2)
    train_log_every: int = knob(500, "steps; besides, a line every 8 s; 0: only those")
    val_loss_every: int = knob(4000, "steps between validations, off the clock; 0: never")
    # Model
    vocab_size: int = knob(8192, "must be the tokenizer's", 2, 65536)
    num_layers: int = knob(11, "physical layers", 2, 256)
    model_dim: int = knob(512, "width", 8)
    num_heads: int = knob(8, "query heads", 1)
    num_kv_heads: int = knob(4, "key and value heads", 1)
    mlp_mult: float = knob(4.0, "hidden width / MODEL_DIM", 0.01)
    xsa_last_n: int = knob(11, "layers with XSA, counted from the top")
    skip_gates_enabled: bool = knob(True, "gated skips; 0: weighted add")
    tied_embed_init_std: float = knob(0.005, "initial standard deviation of the embedding")
    logit_softcap: float = knob(30.0, "logits = cap * tanh(z / cap)", 0.01)
    rope_base: float = knob(10000.0, "slowest wavelength / 2 pi", 1.01)
    rope_dims: int = knob(16, "rotated dims per head; 0: all")
    ln_scale: bool = knob(True, "norm outputs times 1 / sqrt(layer + 1)")
    qk_gain_init: float = knob(5.0, "query scale per head after QK norm, learned")
    num_loops: int = knob(2, "extra passes over LOOP_START..LOOP_END", 0, 64)
    loop_start: int = knob(3, "first looped layer")
    loop_end: int = knob(5, "last looped layer")
    parallel_start_layer: int = knob(8, "first layer with two lanes; 0: never")
    parallel_final_lane: str = knob("mean", "what leaves the two lanes", choices=("mean", "mlp", "attn"))
    # Optimisers
    tied_embed_lr: float = knob(0.03, "AdamW rate of the embedding")
    scalar_lr: float = knob(0.02, "AdamW rate of scales, gains, gates and lambdas")
    matrix_lr: float = knob(0.026, "Muon rate: spectral norm of an update of a square matrix (PR #1586)")
    muon_momentum: float = knob(0.97, "final momentum", 0, 0.9999)
    muon_momentum_warmup_start: float = knob(0.92, "first momentum", 0, 0.9999)
    muon_momentum_warmup_steps: int = knob(1500, "steps from the first to the final momentum")
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", 1, 20)
    muon_row_normalize: bool = knob(True, "rows of the update to unit norm first (MuonEq-R)")
    beta1: float = knob(0.9, "AdamW", 0, 0.9999)
    beta2: float = knob(0.95, "AdamW", 0, 0.99999)
    adam_eps: float = knob(1e-8, "AdamW", 1e-20)
    grad_clip_norm: float = knob(0.3, "norm of the reduced gradient of all parameters; 0: off")
    adam_wd: float = knob(0.02, "decoupled decay of what SCALAR_LR moves")
    muon_wd: float = knob(0.095, "decoupled decay of the banks")
    embed_wd: float = knob(0.085, "decoupled decay of the embedding")
    ema_decay: float = knob(0.9965, "of the average of all parameters that is exported", 0, 0.999999)
    # Artifact
    gptq_calibration_batches: int = knob(64, "training rows for the Hessians, shared out over the ranks", 1)
    quantizer: str = knob("allocated", "steps by what the loss minds, or as published", choices=("allocated", "gptq"))
    artifact_limit_bytes: int = knob(LIMIT_BYTES, "code and model: the steps are fitted to it; 0: the clips decide")
    matrix_bits: int = knob(6, "integer width of the banks; allocated: most bits a weight, integers being 8 wide", 2, 8)
    embed_bits: int = knob(7, "integer width of the embedding (PR #1586); allocated: 8", 2, 8)
    matrix_clip_sigmas: float = knob(12.85, "range of the integers in standard deviations of a row", 0.1)
    embed_clip_sigmas: float = knob(15.0, "the same for the embedding", 0.1)
    attn_clip_sigmas: float = knob(0.0, "the same for q, k, v, o; 0: MATRIX_CLIP_SIGMAS")
    mlp_clip_sigmas: float = knob(0.0, "the same for the MLP; 0: MATRIX_CLIP_SIGMAS")
    loop_clip_sigmas: float = knob(0.0, "the same for looped layers, before the two above; 0: no other than those")
    compressor: str = knob("zstd", "of the codes", choices=COMPRESSORS)
    # Scoring and test-time training
    val_batch_tokens: int = knob(524288, "eight rows of scoring; a row never cuts a window", 16)
    eval_seq_len: int = knob(2048, "longest window of plain and sliding scoring", 2)
    eval_stride: int = knob(64, "tokens scored by each sliding window but the first", 1)
    sliding_window_enabled: bool = knob(False, "score with sliding windows as well")
    val_doc_fraction: float = knob(1.0, "share of the validation documents, drawn with SEED, for quick looks", 1e-9, 1)
    ttt_enabled: bool = knob(True, "adapt a LoRA per document, score first")
    ttt_lora_rank: int = knob(96, "rank of every adapter", 1)
    ttt_lora_lr: float = knob(1e-4, "rate of the adapters")
    ttt_chunk_size: int = knob(48, "tokens scored, then learnt from, at once (PR #1560)", 1)
    ttt_eval_seq_len: int = knob(2048, "longest window", 2)
    ttt_batch_size: int = knob(64, "documents at once on a rank", 1)
    ttt_grad_steps: int = knob(1, "updates per scored chunk", 1)
    ttt_weight_decay: float = knob(0.5, "decoupled")
    ttt_beta1: float = knob(0.0, "AdamW; momentum with sgd", 0, 0.9999)
    ttt_beta2: float = knob(0.999, "AdamW", 0, 0.99999)
    ttt_k_lora: bool = knob(True, "adapter on keys")
    ttt_mlp_lora: bool = knob(True, "adapter beside the MLP")
    ttt_o_lora: bool = knob(True, "adapter beside the attention output")
    ttt_optimizer: str = knob("adam", "AdamW or SGD", choices=("adam", "sgd"))
    dtype = property(lambda c: torch.bfloat16 if c.compute_dtype == "bf16" else torch.float32)
    head_dim = property(lambda c: c.model_dim // c.num_heads)
    mlp_dim = property(lambda c: int(c.mlp_mult * c.model_dim))
    rows_per_step = property(lambda c: c.train_batch_tokens // c.micro_batch_tokens)
    plans = property(lambda c: (layer_plan(c, looped=False), layer_plan(c, looped=True)))
    dataset_dir = property(lambda c: Path(c.data_dir) / "datasets" / (c.dataset or f"fineweb10B_sp{c.vocab_size}"))
    row_shape = property(lambda c: (c.micro_batch_tokens, c.cu_seqlens_capacity, c.train_seq_len))
    val_row_shape = property(lambda c: (c.val_batch_tokens // 8, c.val_batch_tokens // min(512, 2 * c.eval_seq_len),
                                        c.eval_seq_len))  # fmt: skip

    @classmethod
    def from_env(cls, environ: Mapping[str, str], has_cuda: bool) -> tuple[Config, dict[str, str]]:
        """The config of `environ`, and each field's origin: default, preset or env. UsageError names every problem."""
        fields, problems = {f.name.upper(): f for f in dataclasses.fields(cls)}, []
        for name in sorted(environ.keys() - fields.keys()):
            if name in NOT_KNOBS:
                problems.append(f"{name}={environ[name]}: not a knob of this program")
            elif near := difflib.get_close_matches(name, fields, n=1, cutoff=0.85):
                problems.append(f"{name}={environ[name]}: not a knob; did you mean {near[0]}?")
        preset = environ.get("PRESET", "record" if has_cuda else "cpu")
        if preset not in PRESETS:
            raise UsageError("\n".join([*problems, f"PRESET={preset}: must be one of {', '.join(PRESETS)}"]))
        values = {**PRESETS[preset], "preset": preset}
        origin = {f.name: "preset" if f.name in values else "default" for f in fields.values()}
        expected = {bool: "0 or 1", int: "a whole number", float: "a number"}
        for name in sorted(fields.keys() & environ.keys()):
            field, kind, text = name.lower(), type(fields[name].default), environ[name]
            origin[field] = "env"
            try:
                values[field] = {"0": False, "1": True}[text] if kind is bool else kind(text)
            except (KeyError, ValueError):
                problems.append(f"{name}={text}: must be {expected[kind]}")
        cfg = cls(**values)
        if problems := problems + cfg.problems():
            raise UsageError("\n".join(problems))
        return cfg, origin

    def problems(self) -> list[str]:  # values out of range or, if there is none, combinations that cannot work (W7)
        def named(text: str) -> str:  # each variable in the text with its value
            return re.sub(r"[A-Z0-9_]{6,}", lambda m: f"{m[0]}={getattr(self, m[0].lower(), '')}".rstrip("="), text)
        found = []
        for f in dataclasses.fields(self):
            value, lo, hi, choices = getattr(self, f.name), *(f.metadata[key] for key in ("lo", "hi", "choices"))
            if value not in choices if choices else not isinstance(value, str) and not lo <= value <= hi:
                must = f"one of {', '.join(choices)}" if choices else f"{lo:g}..{hi:g}"
                found.append(f"{f.name.upper()}={value}: must be {must}")
        return found or [f"{named(name)}: must be {named(must)}" for name, ok, must in self.combinations() if not ok]

    def combinations(self) -> list[tuple[str, bool, str]]:  # (variable, whether it is fine, what it must be)
        c, loops, row, lanes = self, self.num_loops > 0, self.micro_batch_tokens, self.parallel_start_layer
        stale, package = loops and 0 < lanes <= c.loop_end, c.compressor.replace("zstd", "zstandard")
        least = code_bytes() + sum(math.prod(r.shape) for r in parameter_table(c).values()) // 8
        pushed = any(visit.parallel and visit.push for plan in c.plans for visit in plan)
        room, limit = c.cu_seqlens_capacity - 2 - 2 * -(-row // c.train_seq_len), c.max_wallclock_seconds
        def writable(path: Path) -> bool:
            folder = next(p for p in (path, *path.parents) if p.exists())
            return folder.is_dir() and os.access(folder, os.W_OK)
        return [
            ("RUN_ID", "/" not in c.run_id and writable(Path("logs").absolute()), "a name of a file to write in logs"),
            ("MODEL_DIM", c.model_dim % (2 * c.num_heads) == 0, "a multiple of 2 * NUM_HEADS"),
            ("NUM_KV_HEADS", c.num_heads % c.num_kv_heads == 0, "a divisor of NUM_HEADS"),
            ("ROPE_DIMS", c.rope_dims % 2 == 0 and c.rope_dims <= c.head_dim, f"even and at most {c.head_dim}"),
            ("MLP_MULT", c.mlp_dim >= 1, "enough for one hidden unit at MODEL_DIM"),
            ("XSA_LAST_N", c.xsa_last_n <= c.num_layers, "at most NUM_LAYERS"),
            ("LOOP_START", not loops or c.loop_start <= c.loop_end, "at most LOOP_END"),
            ("LOOP_END", not loops or c.loop_end < c.num_layers, "below NUM_LAYERS"),
            ("PARALLEL_START_LAYER", not stale, "0 or above LOOP_END: later passes would work on stale lanes"),
            ("PARALLEL_START_LAYER", lanes < c.num_layers, "below NUM_LAYERS"),
            ("PARALLEL_START_LAYER", stale or not pushed, "in the decoder half of the layers"),
            ("TRAIN_BATCH_TOKENS", c.train_batch_tokens % row == 0, "a multiple of MICRO_BATCH_TOKENS"),
            ("TRAIN_SEQ_LEN", c.train_seq_len <= row, "at most MICRO_BATCH_TOKENS"),
            ("CU_SEQLENS_CAPACITY", room >= 0, "at least 2 + 2 * MICRO_BATCH_TOKENS / TRAIN_SEQ_LEN"),
            ("VAL_BATCH_TOKENS", c.val_batch_tokens >= 8 * c.eval_seq_len, "at least 8 * EVAL_SEQ_LEN"),
            ("EVAL_STRIDE", c.eval_stride <= c.eval_seq_len, "at most EVAL_SEQ_LEN"),
            ("TTT_CHUNK_SIZE", c.ttt_chunk_size <= c.ttt_eval_seq_len, "at most TTT_EVAL_SEQ_LEN"),
            ("GPTQ_RESERVE_SECONDS", not limit or c.gptq_reserve_seconds < limit, "below MAX_WALLCLOCK_SECONDS"),
            ("COMPRESSOR", package == "ans" or importlib.util.find_spec(package) is not None,
             f"ans, lzma, or {package} must be installed"),
            ("ARTIFACT_LIMIT_BYTES", not c.artifact_limit_bytes or c.artifact_limit_bytes >= least,
             f"0 or at least {least}, code and one bit a weight; or lower MODEL_DIM, MLP_MULT, NUM_LAYERS"),
            ("VAL_DOC_FRACTION", c.val_doc_fraction == 1 or c.data_loader == "documents", "1 with DATA_LOADER"),
            ("ARTIFACT_DIR", writable(Path(c.artifact_dir or "runs").absolute()), "a folder that can be written"),
        ]  # fmt: skip

# What defines the network and travels with its weights: a model file decides these, not the environment.
MODEL_FIELDS = """vocab_size num_layers model_dim num_heads num_kv_heads mlp_mult xsa_last_n skip_gates_enabled
    rope_base rope_dims logit_softcap ln_scale num_loops loop_start loop_end parallel_start_layer parallel_final_lane
    data_loader""".split()
# Knobs of the published scripts that are none here: the head is the embedding, the others were dead or for debugging.
NOT_KNOBS = """EMBEDDING_DIM TIE_EMBEDDINGS EMBED_LR HEAD_LR ROPE_TRAIN_SEQ_LEN ROPE_YARN MUON_BETA2 TTT_DEBUG_BYPASS
    CONTROL_TENSOR_NAME_PATTERNS TTT_EVAL_BATCHES TTT_OUTPUT_DIR""".split()
PR1530 = dict(warmdown_frac=0.72, min_lr=0.0, matrix_lr=0.022, gptq_reserve_seconds=13.0, embed_bits=8,
              embed_clip_sigmas=20.0, compressor="brotli", ttt_chunk_size=32, quantizer="gptq",
              artifact_limit_bytes=0)  # fmt: skip
PR1560 = {**PR1530, "warmdown_frac": 0.75, "ttt_chunk_size": 48}
CPU = dict(
    dataset="pydocs_sp1024", vocab_size=1024, compile=False, num_layers=6, model_dim=192, num_heads=3, num_kv_heads=1,
    mlp_mult=3.0, xsa_last_n=6, num_loops=1, loop_start=2, loop_end=3, enable_looping_at=0.8, parallel_start_layer=4,
    max_wallclock_seconds=125.0, train_batch_tokens=2048, micro_batch_tokens=2048, train_seq_len=512,
    cu_seqlens_capacity=64, train_log_every=0, val_loss_every=0, matrix_lr=0.03, muon_momentum=0.95,
    muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=100, ema_decay=0.98, gptq_calibration_batches=16,
    val_batch_tokens=65536, eval_seq_len=512, ttt_lora_rank=8, ttt_lora_lr=1e-3, ttt_chunk_size=128,
    ttt_eval_seq_len=512, ttt_batch_size=16)  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {"record": {}, "pr1530": PR1530, "pr1560": PR1560, "cpu": CPU}

def print_knobs() -> None:  # variable, default per preset, meaning
    print(f"{'variable':28}" + "".join(f"{p:>14}" for p in PRESETS) + "  meaning")
    for f in dataclasses.fields(Config):
        values = [PRESETS[p].get(f.name, f.default) if f.name != "preset" else p for p in PRESETS]
        cells = [f"{v:>14g}" if isinstance(v, (int, float)) else f"{v or '-':>14}" for v in values]
        print(f"{f.name.upper():28}{''.join(cells)}  {f.metadata['doc']} {' | '.join(f.metadata['choices'])}")

# === 2. Runtime: ranks, log, clock ====================================================================================
class Ranks:  # this process among its peers: all ranks must call a method together; on one rank it is the identity
    def __init__(self, environ: Mapping[str, str]):
        self.rank, self.world_size = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
        self.is_main, self.distributed, self.queues = self.rank == 0, "RANK" in environ, 0
        cuda, local = torch.cuda.is_available(), int(environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.distributed:
            importlib.import_module("torch.distributed.nn")  # later, its defaults would keep the group's threads alive
            dist.init_process_group("nccl" if cuda else "gloo", device_id=self.device if cuda else None)
    def sum(self, t: Tensor) -> Tensor:  # in place
        if self.distributed:
            dist.all_reduce(t)
        return t
    def gather(self, value: Any) -> list[Any]:  # every rank's, in rank order
        values = [value] * self.world_size
        if self.distributed:
            dist.all_gather_object(values, value)
        return values
    def reduce_scatter(self, shard: Tensor, full: Tensor) -> None:  # shard <- this rank's 1 / W of the sum of full
        if self.distributed and full.is_cuda:  # not every torch we support has it for gloo
            dist.reduce_scatter_tensor(shard, full)
        else:
            shard.copy_(self.sum(full).unflatten(0, (self.world_size, -1))[self.rank])
    def all_gather(self, shard: Tensor) -> Tensor:  # (n, ...) of every rank, in rank order -> (world_size * n, ...)
        if not self.distributed:
            return shard
        full = shard.new_empty(self.world_size * len(shard), *shard.shape[1:])
        dist.all_gather_into_tensor(full, shard)
        return full
    def tickets(self) -> Iterator[int]:  # 0, 1, 2, .. of a new counter; each goes to the rank that asks first (W49)
        self.queues += 1
        store = dist.distributed_c10d._get_default_store() if self.distributed else dist.HashStore()
        while True:
            yield store.add(f"train_gpt/queue{self.queues}", 1) - 1
    def now(self) -> float:  # seconds on a steady clock, once the device has done all it was given
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

class Log:  # lines for people on rank 0: to the terminal and to a file
    def __init__(self, path: Path, is_main: bool):
        self.last, self.is_main = time.monotonic(), is_main
        if is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a", encoding="utf-8")
    def __call__(self, line: str, terminal: bool = True) -> None:
        self.last = time.monotonic()
        for file in [self.file, sys.stdout][: 1 + terminal] if self.is_main else []:
            print(line, file=file, flush=True)
    def due(self) -> bool:  # whether the last line is 8 s ago: a long loop shows that it is alive
        return time.monotonic() - self.last > 8

def write_atomic(path: Path, data: bytes) -> None:  # afterwards `path` holds all of it or is untouched
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)

# === 3. Data: shards of uint16 tokens -> rows of packed documents =====================================================
SHARD_HEADER = [20240520, 1]  # magic, version; then the token count; 256 int32 in all
def write_shard(path: Path, tokens: np.ndarray) -> None:  # header of 1024 bytes, ids (n,) as uint16; little-endian
    header = np.array([*SHARD_HEADER, len(tokens)] + [0] * 253, dtype="<i4")
    write_atomic(path, header.tobytes() + np.ascontiguousarray(tokens, dtype="<u2").tobytes())
def read_shard(path: Path) -> np.ndarray:  # memory-mapped uint16 (n,); UsageError if foreign, newer, cut or empty
    size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[:2].tolist() != SHARD_HEADER:
        raise UsageError(f"{path}: starts with {header[:2].tolist()}, a shard with {SHARD_HEADER}")
    if size != 1024 + 2 * int(header[2]) or not header[2]:
        raise UsageError(f"{path}: holds {size} bytes, its header promises 1024 + 2 * {header[2]}")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(int(header[2]),))

class TokenStream:  # all shards of a split end to end: a document or a transition may straddle two of them (W13)
    def __init__(self, folder: Path, split: str):
        self.paths = sorted(folder.glob(f"*_{split}_*.bin"))
        if not self.paths:
            raise UsageError(f"{folder}: holds no *_{split}_*.bin; run tools/prepare_data.py or set DATASET, DATA_DIR")
        self.shards = [read_shard(p) for p in self.paths]
        self.starts = np.cumsum([0] + [len(s) for s in self.shards])
        self.size = int(self.starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:  # ids int64 from `start` on, again from 0 past the end
        parts = []
        while count > 0:
            i = int(np.searchsorted(self.starts, start % self.size, side="right")) - 1
            parts.append(self.shards[i][start % self.size - self.starts[i] :][:count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts).astype(np.int64)

class Batch(NamedTuple):  # a row of segments end to end; attention stays within one, positions count from its start
    inputs: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64; -1 where nothing is predicted
    cu_seqlens: Tensor  # (capacity + 1,) int32: segment starts, then T in every unused entry
    max_seqlen: int  # bound on the length of a segment, constant over batches so that it compiles once (W26)

def pack_row(inputs: np.ndarray, targets: np.ndarray, starts: np.ndarray, shape: tuple, device: torch.device) -> Batch:
    """ids (n,) and segment starts -> Batch of `shape` (T, capacity, max_seqlen); beyond n the row predicts nothing."""
    (tokens, capacity, max_seqlen), n = shape, len(inputs)
    ids = np.zeros((2, tokens), dtype=np.int32)  # half of what int64 would send over PCIe
    ids[1], ids[0, :n], ids[1, :n] = -1, inputs, targets
    segments = [*starts, *range(n, tokens, max_seqlen)]  # padding keeps to the bound too
    assert len(segments) <= capacity, (len(segments), capacity)
    cu_seqlens = np.array(segments + [tokens] * (capacity + 1 - len(segments)), dtype=np.int32)
    sent = [torch.from_numpy(x) for x in (ids, cu_seqlens)]
    if device.type == "cuda":
        sent = [x.pin_memory().to(device, non_blocking=True) for x in sent]
    return Batch(*sent[0].long(), sent[1], max_seqlen)

def segment_starts(tokens: np.ndarray, bos_id: int, max_seqlen: int) -> np.ndarray:
    """Starts of the segments of a row (n,): 0, every BOS, and every `max_seqlen` tokens after either."""
    documents = np.union1d([0], np.flatnonzero(tokens == bos_id))
    pieces = -(-np.diff(documents, append=len(tokens)) // max_seqlen)
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # 0, 1, .. within each document
    return np.repeat(documents, pieces) + piece * max_seqlen

class PackedLoader:
    """Rows of the stream in order, each transition once an epoch (W13). All ranks walk over all rows and build every
    W-th, so the world size changes no step. A row takes MICRO_BATCH_TOKENS tokens, or what the capacity allows."""
    def __init__(self, stream: TokenStream, bos_id: int, cfg: Config, ranks: Ranks):
        self.stream, self.cfg, self.ranks, self.cursor = stream, cfg, ranks, 0
        self.bos_id = bos_id if cfg.data_loader == "documents" else -1
    def rows(self, count: int) -> tuple[list[Batch], int]:  # this rank's of the next rows, and the targets in them all
        mine, first, (size, capacity, max_seqlen) = [], self.cursor, self.cfg.row_shape
        for row in range(count):
            tokens, n = self.stream.read(self.cursor, size + 1), size
            starts = segment_starts(tokens[:-1], self.bos_id, max_seqlen)
            if len(starts) > capacity:  # leave room for the segments of the padding
                starts, n = starts[: capacity // 2], int(starts[capacity // 2])
            if row % self.ranks.world_size == self.ranks.rank:
                mine.append(pack_row(tokens[:n], tokens[1 : n + 1], starts, self.cfg.row_shape, self.ranks.device))
            self.cursor += n
        return mine, self.cursor - first
    def steps(self) -> Iterator[tuple[list[Batch], int]]:  # `rows` of each step; a thread prepares the next
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.rows, self.cfg.rows_per_step)
            while True:
                rows, ahead = ahead.result(), pool.submit(self.rows, self.cfg.rows_per_step)
                yield rows

class Documents(NamedTuple):  # targets end with the next one's BOS: all tokens but the first are predicted once (W39)
    tokens: np.ndarray  # (N,) int64
    starts: np.ndarray  # (D,) of each document
    counts: np.ndarray  # (D,) of its targets
    @classmethod
    def load(cls, stream: TokenStream, bos_id: int, cfg: Config) -> Documents:
        tokens = stream.read(0, stream.size)
        starts = np.flatnonzero(tokens == bos_id)
        wanted = max(1, round(cfg.val_doc_fraction * len(starts)))
        sample = sorted(random.Random(cfg.seed).sample(range(len(starts)), wanted))
        return cls(tokens, starts[sample], np.diff(starts, append=len(tokens) - 1)[sample])

class Tokenizer(NamedTuple):
    path: Path
    model: Any  # SentencePieceProcessor
    bos_id: int
    sha256: str
    manifest: dict[str, Any]  # of the data set; empty if it has none
    @classmethod
    def load(cls, cfg: Config) -> Tokenizer:  # UsageError if it is none, of another size, or not the manifest's
        import sentencepiece  # here, so that what needs no text needs no package
        named = cfg.dataset_dir / "manifest.json"
        manifest, default, sha256 = {}, f"fineweb_{cfg.vocab_size}_bpe.model", None
        if named.is_file():
            try:
                manifest = json.loads(named.read_text())
                default, sha256 = (manifest["tokenizer"][key] for key in ("file", "sha256"))
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{named}: not a manifest of tools/prepare_data.py") from error
        path = Path(cfg.tokenizer_path or Path(cfg.data_dir) / "tokenizers" / default)
        try:
            data = path.read_bytes()
            model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (OSError, RuntimeError) as error:
            raise UsageError(f"TOKENIZER_PATH={path}: no SentencePiece model ({str(error).splitlines()[0]})") from error
        loaded = cls(path, model, model.bos_id(), hashlib.sha256(data).hexdigest(), manifest)
        if model.vocab_size() != cfg.vocab_size:
            raise UsageError(f"VOCAB_SIZE={cfg.vocab_size}: {path} has {model.vocab_size()} pieces")
        if loaded.bos_id < 0 or model.piece_to_id("\u2581") == model.unk_id():
            raise UsageError(f"TOKENIZER_PATH={path}: needs BOS and the bare space mark, or bytes are miscounted")
        if sha256 not in (None, loaded.sha256):
            raise UsageError(f"TOKENIZER_PATH={path}: not the tokenizer that {named} names")
        return loaded

def open_shards(cfg: Config, tokenizer: Tokenizer, ranks: Ranks, splits: list[str]) -> dict[str, TokenStream]:
    """The streams of `splits`. Raises UsageError for what cannot be used; each rank scans its share of the ids."""
    streams = {split: TokenStream(cfg.dataset_dir, split) for split in splits}
    known = {f["name"]: f["tokens"] for s in tokenizer.manifest.get("splits", {}).values() for f in s["files"]}
    for split, stream in streams.items():
        for i, (path, shard) in enumerate(zip(stream.paths, stream.shards, strict=True)):
            if known and known.get(path.name) != len(shard):
                raise UsageError(f"{path}: holds {len(shard)} tokens, the manifest says {known.get(path.name, 0)}")
            if i % ranks.world_size == ranks.rank and (largest := int(shard.max())) >= cfg.vocab_size:
                raise UsageError(f"{path}: holds id {largest}, VOCAB_SIZE={cfg.vocab_size}")
        found = stream.shards[0] == tokenizer.bos_id
        if not found.any() or (split == "val" and not found[0]):
            raise UsageError(f"{stream.paths[0]}: no document starts at its beginning (BOS id {tokenizer.bos_id})")
        if split == "train" and stream.size <= cfg.train_batch_tokens:
            raise UsageError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: the shards hold {stream.size} tokens")
    return streams

# === 4. Kernels: the fused MLP and variable-length attention, each beside a plain reference ===========================
# --- Fused MLP: out = leaky_relu(x @ w_up.T)^2 @ w_down.T for x (T, C), w_up (F, C), w_down (C, F). ---
# PR #1530; after modded-nanogpt. Both products with an activation epilogue are operators: PyTorch, or Triton on Hopper.
MLP_SLOPE = 0.5  # a power of two: both branches, of the activation and of its derivative, are exact before one rounding
MLP_TILE = (128, 256, 64)  # tokens, hidden units, summed width
def leaky_relu_sq(pre: Tensor) -> Tensor:  # in the dtype given: pre^2 above zero, (MLP_SLOPE * pre)^2 below
    return F.leaky_relu(pre, MLP_SLOPE).square()

if triton is not None:
    @triton.jit
    def mlp_kernel(a, w, pre, out, BACKWARD: tl.constexpr, SLOPE: tl.constexpr):
        """One product and its epilogue. Operands are tensor descriptors and bring their dtype; sums are fp32.
        forward : a = x (T, C), w = w_up (F, C);    stores pre = a @ w.T and out = leaky_relu(pre)^2, both (T, F)
        backward: a = dy (T, C), w = w_down (C, F); loads pre, stores out = (a @ w) * derivative of leaky_relu^2 at pre
        A sum is rounded to the dtype before the epilogue, as between separate operators. TMA reads zeros and writes
        nothing past an edge: no masks. Programs stride over tiles in groups of 8 row blocks (weights stay in L2).
        `flatten` starts the next tile's loads before this epilogue, done by column halves so that staging fits."""
        BM: tl.constexpr = a.block_shape[0]
        BH: tl.constexpr = out.block_shape[1]
        row_blocks, col_blocks = tl.cdiv(out.shape[0], BM), tl.cdiv(out.shape[1], 2 * BH)
        for tile in tl.range(tl.program_id(0), row_blocks * col_blocks, tl.num_programs(0), flatten=True):
            i, j = tl.swizzle2d(tile // col_blocks, tile % col_blocks, row_blocks, col_blocks, 8)
            row, col = i * BM, j * 2 * BH
            acc = tl.zeros((BM, 2 * BH), tl.float32)
            for k in range(0, a.shape[1], a.block_shape[1]):
                b = w.load([k, col]) if BACKWARD else w.load([col, k]).T  # as stored: no transposed copy
                acc = tl.dot(a.load([row, k]), b, acc)
            halves = tl.split(tl.permute(tl.reshape(acc.to(out.dtype), (BM, 2, BH)), (0, 2, 1)))
            for h in tl.static_range(2):
                half, at = halves[h], [row, col + h * BH]
                z = 2 * pre.load(at) if BACKWARD else half
                out.store(at, half * tl.where(z > 0, z, SLOPE * SLOPE * z))
                if not BACKWARD:
                    pre.store(at, half)

def launch_mlp(a: Tensor, w: Tensor, pre: Tensor, out: Tensor, programs: int, backward: bool, tile=MLP_TILE) -> None:
    """Fills `out` (forward also `pre`) with at most that many persistent programs. T must not be 0; a new T compiles
    nothing. Descriptors are made per call (a cache would keep activations alive), never in a replayed CUDA graph.
    Shared memory, of 227 KB: forward 224 (4 stages), backward with its staged `pre` 208 (3 stages)."""
    bm, bn, bk = tile
    boxes = [bm, bk], [bk, bn] if backward else [bn, bk], [bm, bn // 2], [bm, bn // 2]
    args = [TensorDescriptor(t, t.shape, t.stride(), box) for t, box in zip((a, w, pre, out), boxes, strict=True)]
    grid = (min(programs, triton.cdiv(out.shape[0], bm) * triton.cdiv(out.shape[1], bn)),)
    mlp_kernel[grid](*args, BACKWARD=backward, SLOPE=MLP_SLOPE, num_warps=8, num_stages=3 if backward else 4)

def mlp_up_reference(x: Tensor, w_up: Tensor) -> tuple[Tensor, Tensor]:
    pre = F.linear(x, w_up)
    return pre, leaky_relu_sq(pre)
def mlp_dpre_reference(dy: Tensor, w_down: Tensor, pre: Tensor) -> Tensor:
    return (dy @ w_down).mul_(F.leaky_relu(pre, MLP_SLOPE**2)).mul_(2)  # 1/12 of torch.where's time on a CPU in bf16

def mlp_cuda(a: Tensor, w: Tensor, pre: Tensor | None = None) -> tuple[Tensor, Tensor] | Tensor:
    """Either operator; the reference off Hopper, for dtypes that have not two bytes, or without TMA's alignment."""
    backward, gpu = pre is not None, torch.cuda.get_device_properties(a.device)
    hidden, inputs = (w.shape[1], (a, w, pre)) if backward else (w.shape[0], (a, w))
    fits = triton is not None and gpu.major == 9 and a.dtype in (torch.bfloat16, torch.float16) and len(a) > 0
    rows = ((t.dtype == a.dtype, t.stride(1) == 1, t.stride(0) % 8 == 0, t.data_ptr() % 16 == 0) for t in inputs)
    if not (fits and hidden % 8 == 0 and all(map(all, rows))):
        return mlp_dpre_reference(*inputs) if backward else mlp_up_reference(*inputs)
    pre, out = pre if backward else a.new_empty(len(a), hidden), a.new_empty(len(a), hidden)
    launch_mlp(a, w, pre, out, gpu.multi_processor_count, backward)
    return out if backward else (pre, out)

mlp_up = torch.library.custom_op("golf::mlp_up", mlp_up_reference, mutates_args=())
mlp_dpre = torch.library.custom_op("golf::mlp_dpre", mlp_dpre_reference, mutates_args=())
for op, reference in ((mlp_up, mlp_up_reference), (mlp_dpre, mlp_dpre_reference)):
    op.register_fake(reference)
    op.register_kernel("cuda", mlp_cuda)

class FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w_up: Tensor, w_down: Tensor, pre: Tensor, post: Tensor) -> Tensor:
        _, need_up, need_down, *_ = ctx.needs_input_grad  # a frozen weight keeps nothing alive
        ctx.save_for_backward(x if need_up else None, w_up, w_down, pre, post if need_down else None)
        return F.linear(post, w_down)
    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w_up, w_down, pre, post = ctx.saved_tensors
        need_x, need_up, need_down, *_ = ctx.needs_input_grad
        dpre = mlp_dpre(dy, w_down, pre) if need_x or need_up else None
        dx, dw_up = dpre @ w_up if need_x else None, dpre.t() @ x if need_up else None
        return dx, dw_up, dy.t() @ post if need_down else None, None, None

def fused_mlp(x: Tensor, w_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor]:  # out (T, C), post (T, F): no gradient
    pre, post = mlp_up(x.detach(), w_up.detach())  # not outputs of FusedMLP, or autograd would fill zeros for post
    return FusedMLP.apply(x, w_up, w_down, pre, post), post

# --- Attention over packed documents, one signature for every backend: q (T, H, D), k and v (T, Hkv, D), cu_seqlens
# int32 (capacity + 1,) ending in repeated T, max_seqlen a constant: one graph for all batches. FA2, FA3 (from 2025-12)
# and torch's varlen trace as operators, FA4 not by 2026-08 (refused until it does); per-document SDPA becomes one here.
ATTENTION_BACKENDS = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute", "fa2": "flash_attn"}  # by preference
ATTENTION_BACKENDS |= {"torch": "torch.nn.attention.varlen", "sdpa": ""}  # sdpa: any device, any float type
ATTENTION_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 2e-3, torch.float64: 1e-5}  # TF32 2e-3
# Package absent; library does not load; another version; dtype, head width or GPU refused, or a graph break.
BACKEND_ERRORS = (ImportError, OSError, AttributeError, KeyError, TypeError, AssertionError, ValueError, RuntimeError)
def over_documents(kernel: Callable, inputs: tuple, outputs: tuple, cu_seqlens: Tensor) -> None:
    """Fills outputs (T, heads, ...) with kernel(*inputs), called on (rows, heads, n, ...) views of equal neighbours."""
    start, lengths = 0, [n for n in cu_seqlens.diff().tolist() if n]
    runs = [(n, len(list(same))) for n, same in groupby(lengths)]
    for n, rows in runs if inputs[0].is_cpu else ((n, 1) for n in lengths):  # a GPU holds the (n, n) scores: one row
        parts = [x[start : start + rows * n].unflatten(0, (rows, n)).transpose(1, 2) for x in (*inputs, *outputs)]
        for part, result in zip(parts[len(inputs) :], kernel(*parts[: len(inputs)]), strict=False):
            part.copy_(result)
        start += rows * n

def causal_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    """dq, dk, dv of causal attention on (rows, heads, n, D) from the whole (n, n) scores, in fp32 or better."""
    wide, scale = torch.promote_types(q.dtype, torch.float32), q.size(-1) ** -0.5
    grad, q, y = (x.to(wide).unflatten(1, (k.size(1), -1)) for x in (grad, q, y))  # (rows, Hkv, H // Hkv, n, D)
    k, v = k.to(wide).unsqueeze(2), v.to(wide).unsqueeze(2)
    p = (q @ k.mT * scale + q.new_full(q.shape[3:4] * 2, -torch.inf).triu(1)).softmax(-1)
    ds = p * (grad @ v.mT - (grad * y).sum(-1, keepdim=True)) * scale
    return (ds @ k).flatten(1, 2), (ds.mT @ q).sum(2), (p.mT @ grad).sum(2)

def sdpa_outputs(q: Tensor) -> tuple[Tensor, Tensor]:  # y (T, H, D), logsumexp (H, T), used only on a CPU
    return q.new_empty(q.shape), q.new_zeros(q.shape[1::-1], dtype=torch.promote_types(q.dtype, torch.float32))

@torch.library.custom_op("golf::sdpa_varlen", mutates_args=())
def sdpa_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """y and logsumexp. On two cores, 16 x 512 bf16 tokens, H=4, D=32: 16 ms, 35 ms in backward."""
    ends, (shortest, longest) = cu_seqlens[[0, -1]].tolist(), map(int, cu_seqlens.diff().aminmax())
    assert ends == [0, q.size(0)] and 0 <= shortest <= longest <= max_seqlen, f"{ends=}, {shortest=}, {longest=}"
    inputs = tuple(x.contiguous() for x in (q, k, v))  # the CPU kernels misread a strided last dimension
    y, lse = sdpa_outputs(q)
    flash = partial(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, is_causal=True)
    plain = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    over_documents(flash if q.is_cpu else lambda *rows: [plain(*rows)], inputs, (y, lse.T), cu_seqlens)
    return y, lse

@torch.library.custom_op("golf::sdpa_varlen_backward", mutates_args=())
def sdpa_varlen_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor,
                         cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv. Autograd is off inside an operator, so off the CPU the gradient is written out (slow)."""
    inputs = (*(x.contiguous() for x in (grad, q, k, v, y)), lse.T)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    flash = partial(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, dropout_p=0.0, is_causal=True)
    over_documents(flash if q.is_cpu else causal_gradients, inputs, grads, cu_seqlens)
    return grads

sdpa_varlen.register_fake(lambda q, *_: sdpa_outputs(q))
sdpa_varlen_backward.register_fake(lambda grad, *saved: tuple(x.new_empty(x.shape) for x in saved[:3]))
sdpa_varlen.register_autograd(
    lambda ctx, grad, _: (*sdpa_varlen_backward(grad, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3], *output, inputs[3]))  # fmt: skip
ATTENTION = {"sdpa": sdpa_varlen}  # check_attention adds the others
def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str) -> Tensor:
    """y (T, H, D), causal within each segment, scale D ** -0.5; query head h reads key/value head h // (H // Hkv)."""
    y = ATTENTION[backend](q, k, v, cu_seqlens, max_seqlen)
    return y[0] if isinstance(y, tuple) else y  # ours, FA4, and FA3 before 2025-07 add the logsumexp

def load_attention(backend: str) -> Callable[..., Tensor]:  # with our signature; raises one of BACKEND_ERRORS
    name = "varlen_attn" if backend == "torch" else "flash_attn_varlen_func"
    function = getattr(importlib.import_module(ATTENTION_BACKENDS[backend]), name)
    if backend == "torch":  # 2.10 has is_causal, later a window; enable_gqa is required since 2.12, implied before
        known = inspect.signature(function).parameters
        options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        options |= {"enable_gqa": True} if "enable_gqa" in known else {}
        return lambda q, k, v, cu, n: function(q, k, v, cu, cu, n, n, **options)
    return lambda q, k, v, cu, n: function(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=n, max_seqlen_k=n,
                                           causal=True)  # fmt: skip

def check_attention(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Compiles a backend whole and compares y, dq, dk, dv with masked SDPA; the reason to refuse it, or nothing."""
    cu = torch.tensor([0, 1, 130, 300, 300, 300], dtype=torch.int32, device=device)
    segment = torch.tensor([0] + 129 * [1] + 170 * [2], device=device)
    rng = torch.Generator(device).manual_seed(0)  # leaves the global one alone
    grad, *leaves = (torch.randn(300, n, 64, generator=rng, device=device).to(dtype) for n in (4, 4, 2, 2))
    exact = [x.to(torch.promote_types(dtype, torch.float32)).requires_grad_() for x in leaves]
    heads = (x.repeat_interleave(4 // x.size(1), 1).transpose(0, 1) for x in exact)
    y = F.scaled_dot_product_attention(*heads, attn_mask=(segment[:, None] == segment).tril()).transpose(0, 1)
    wanted = y, *torch.autograd.grad(y, exact, grad.to(y.dtype))
    try:
        ATTENTION[backend] = sdpa_varlen if backend == "sdpa" else load_attention(backend)
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        y = torch.compile(attention, backend="aot_eager", fullgraph=True)(*leaves, cu, 256, backend)
        found = y, *torch.autograd.grad(y, leaves, grad)
    except BACKEND_ERRORS as error:
        return (str(error).strip() or repr(error)).splitlines()[0][:200]
    error = float(torch.stack([(x - z).norm() / z.norm() for x, z in zip(found, wanted, strict=True)]).max().detach())
    return "" if error <= ATTENTION_TOLERANCE[dtype] else f"relative error {error:.1e} against masked SDPA"

def choose_attention(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[str, list[str]]:
    """A name for `attention` ("auto": the first that works) and log lines; UsageError if there is none."""
    if requested == "auto" and device.type == "cpu":
        return "sdpa", ["attention_backend:sdpa (the others need a GPU)"]
    names, log, reason = (requested,) if requested != "auto" else tuple(ATTENTION_BACKENDS), [], "no such backend"
    for name in filter(ATTENTION_BACKENDS.__contains__, names):
        reason = check_attention(name, device, dtype)
        if not reason:
            return name, [*log, f"attention_backend:{name}"]
        log.append(f"{name}: {reason}")
    works = [name for name in ATTENTION_BACKENDS if name not in names and not check_attention(name, device, dtype)]
    raise UsageError(f"ATTENTION_BACKEND={requested}: {reason}; works here: {', '.join(works) or 'none'}")

# === 5. Model: banks, the order of layers, one forward for training, calibration, scoring and adaptation ==============
class Visit(NamedTuple):  # one step of the unrolled depth: which layer runs, which skips it stores or takes
    layer: int
    slot: int  # position in the plan; adapters are kept per slot
    push: bool  # store the output for a later skip
    skip: tuple[int, ...]  # rows of skip_weights whose mean scales the skip popped here; empty: none
    parallel: bool  # two lanes

def layer_plan(cfg: Config, looped: bool) -> tuple[Visit, ...]:
    """The order of layers; the only place that knows it. The first half stores its outputs as skips, the second takes
    them last in, first out. Rows of skip_weights belong to pairs (receiver, source) of the looped plan; the plain plan
    uses those of the same pair (their mean, if looping visits it twice), so a skip keeps its meaning (W4)."""
    def halves(loops: int) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        order = [*range(cfg.num_layers)]
        order[cfg.loop_start : cfg.loop_start] = order[cfg.loop_start : cfg.loop_end + 1] * loops
        encoder, decoder = order[: len(order) // 2], order[len(order) // 2 :]
        return encoder, decoder, list(zip(decoder, reversed(encoder), strict=False))
    full = halves(cfg.num_loops)[2]
    encoder, decoder, pairs = halves(cfg.num_loops if looped else 0)
    same = [tuple(row for row, other in enumerate(full) if other == pair) for pair in pairs]
    skips = [(k,) if looped or not rows else rows for k, rows in enumerate(same)] + [()] * (len(decoder) - len(pairs))
    first = cfg.parallel_start_layer or cfg.num_layers
    steps = [(i, True, ()) for i in encoder] + [(i, False, skip) for i, skip in zip(decoder, skips, strict=True)]
    return tuple(Visit(i, slot, push, skip, i >= first) for slot, (i, push, skip) in enumerate(steps))

class Role(NamedTuple):  # what the rest of the program needs to know of a parameter
    shape: tuple[int, ...]
    init: float | str  # constant, "orthogonal" (gain 1), "normal", or "first": row 0 ones, row 1 zeros
    group: str = "scalar"  # optimiser: muon, embed or scalar
    packing: str = "float"  # in the artifact: matrix or embed (integers), or float (fp16)

def parameter_table(cfg: Config) -> dict[str, Role]:  # the only list of parameters; weights act as y = x W^T
    L, C, V, kv = cfg.num_layers, cfg.model_dim, cfg.vocab_size, cfg.num_kv_heads * cfg.head_dim
    num_skips = sum(bool(v.skip) for v in layer_plan(cfg, looped=True))
    table = {
        "qo_bank": Role((2 * L, C, C), "orthogonal", "muon", "matrix"),  # L queries, then L outputs (zero at first)
        "kv_bank": Role((2 * L, kv, C), "orthogonal", "muon", "matrix"),  # L keys, then L values
        "up_bank": Role((L, cfg.mlp_dim, C), "orthogonal", "muon", "matrix"),
        "down_bank": Role((L, C, cfg.mlp_dim), 0.0, "muon", "matrix"),
        "tok_emb": Role((V, C), "normal", "embed", "embed"),  # table and head; fp32 master (W8)
        "skip_weights": Role((num_skips, C), 1.0), "attn_scale": Role((L, C), 1.0), "mlp_scale": Role((L, C), 1.0),
        "resid_mix": Role((L, 2, C), "first"),  # row 0 for x, row 1 for x0
        "q_gain": Role((L, cfg.num_heads), cfg.qk_gain_init)}  # fmt: skip
    if cfg.skip_gates_enabled:
        table["skip_gates"] = Role((num_skips, C), 0.0)
    if cfg.parallel_start_layer:
        table["parallel_post_lambdas"] = Role((L, 2, 2), 1.0)  # [layer, source, lane]
        table["parallel_resid_lambdas"] = Role((L, 2), 1.1)  # [layer, lane]
    return table

LAYER_TENSORS = "q o k v up down attn_scale mlp_scale resid_mix q_gain".split()
LayerWeights = NamedTuple("LayerWeights", [(name, Tensor) for name in LAYER_TENSORS])  # of one layer, compute dtype
class PassInfo(NamedTuple):  # what every layer of one forward shares
    batch: Batch
    rope: tuple[Tensor, Tensor]  # cos, sin (T, 1, rope_dims / 2) at each token's position in its segment
    tap: Callable[[str, int, Tensor], None]  # (site, layer, input of a product): calibration
    lora: dict[tuple[str, int], tuple[Tensor, Tensor]]  # (site, slot) -> A, B; empty without adapters
    def add_lora(self, y: Tensor, x: Tensor, site: str, slot: int) -> Tensor:  # x (T, C): T / B tokens per document
        if (site, slot) not in self.lora:
            return y
        a, b = self.lora[site, slot]
        return y + (x.unflatten(0, (len(a), -1)) @ a.mT @ b.mT).flatten(0, 1)

def rms_norm(x: Tensor) -> Tensor:  # x / sqrt(mean(x^2) + eps) over the last axis, fp32 inside, its eps for any dtype
    eps = torch.finfo(torch.float32).eps
    if x.is_cuda:  # on a CPU in bf16, F.rms_norm takes 20 times as long as the lines below
        return F.rms_norm(x, (x.size(-1),), eps=eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

def positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:  # (T,) int64: each token's index in its segment (W17)
    index = torch.arange(num_tokens, device=cu_seqlens.device)
    return index - cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # RoPE on the first 2 * half dims of x (T, H, D)
    half = cos.size(-1)  # dims j and j + half form a pair
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest], dim=-1)
def remove_own_value(y: Tensor, v: Tensor) -> Tensor:  # XSA: from y (T, H, D), its component along v (T, Hkv, D)
    wide = y.to(torch.promote_types(y.dtype, torch.float32)).unflatten(1, (v.size(1), -1))  # (T, Hkv, H / Hkv, D)
    unit = F.normalize(v.to(wide.dtype), dim=-1).unsqueeze(2)  # (T, Hkv, 1, D)
    return (wide - (wide * unit).sum(-1, keepdim=True) * unit).flatten(1, 2).to(y.dtype)

class GPT(nn.Module):  # the network of PR #1530; parameters are fp32, products run in the compute dtype
    def __init__(self, cfg: Config, attention_backend: str = "sdpa"):
        super().__init__()
        self.cfg, self.attention_backend, g = cfg, attention_backend, torch.Generator().manual_seed(cfg.seed)
        half = (cfg.rope_dims or cfg.head_dim) // 2
        longest = max(cfg.train_seq_len, cfg.eval_seq_len, cfg.ttt_eval_seq_len)
        frequencies = cfg.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(longest)[:, None, None] * frequencies  # (longest, 1, half)
        self.register_buffer("rope", torch.stack([angles.cos(), angles.sin()], 1).float(), persistent=False)
        for name, role in parameter_table(cfg).items():  # drawn on the CPU: equal on every rank and device
            weight = torch.full(role.shape, 0.0 if isinstance(role.init, str) else float(role.init))
            if role.init == "orthogonal":
                for matrix in weight:
                    nn.init.orthogonal_(matrix, generator=g)
            elif role.init == "normal":
                nn.init.normal_(weight, std=cfg.tied_embed_init_std, generator=g)
            elif role.init == "first":
                weight[:, 0] = 1.0
            self.register_parameter(name, nn.Parameter(weight))
        self.qo_bank.data[cfg.num_layers :] = 0.0  # like down_bank: every block starts as the identity

    def attend(self, n: Tensor, w: LayerWeights, visit: Visit, info: PassInfo) -> Tensor:  # of normalised n (T, C)
        q, k, v = (info.add_lora(F.linear(n, getattr(w, site)), n, site, visit.slot) for site in "qkv")
        q, k, v = (x.unflatten(-1, (-1, self.cfg.head_dim)) for x in (q, k, v))  # (T, H, D), (T, Hkv, D) twice
        q, k = rotate(rms_norm(q), *info.rope) * w.q_gain[:, None], rotate(rms_norm(k), *info.rope)
        y = attention(q, k, v, info.batch.cu_seqlens, info.batch.max_seqlen, self.attention_backend)
        xsa = visit.layer >= self.cfg.num_layers - self.cfg.xsa_last_n
        y = (remove_own_value(y, v) if xsa else y).flatten(1)  # (T, C)
        info.tap("attn_in", visit.layer, n)
        info.tap("attn_out", visit.layer, y)
        return info.add_lora(F.linear(y, w.o), n, "o", visit.slot)
    def feed(self, n: Tensor, w: LayerWeights, visit: Visit, info: PassInfo) -> Tensor:  # the same for the MLP
        out, post = fused_mlp(n, w.up, w.down)
        info.tap("mlp_in", visit.layer, n)
        info.tap("mlp_mid", visit.layer, post)
        return info.add_lora(out, n, "mlp", visit.slot)
    def merge_skip(self, x: Tensor, skip: Tensor, rows: tuple[int, ...]) -> Tensor:  # a gate of 1 keeps the stream x
        skip = self.skip_weights[list(rows)].mean(0).to(x.dtype) * skip
        gated = self.cfg.skip_gates_enabled
        return torch.lerp(skip, x, self.skip_gates[list(rows)].mean(0).to(x.dtype).sigmoid()) if gated else x + skip
    def hidden(self, info: PassInfo, plan: tuple[Visit, ...]) -> Tensor:  # final normalised hidden states (T, C)
        names, L = ["qo_bank", "kv_bank", "up_bank", "down_bank", *LAYER_TENSORS[6:]], self.cfg.num_layers
        # Cast once, and unbind, because its gradient is one stack and not L padded copies.
        qo, kv, *rest = (self.get_parameter(name).to(self.cfg.dtype).unbind(0) for name in names)
        layers = [LayerWeights(*w) for w in zip(qo[:L], qo[L:], kv[:L], kv[L:], *rest, strict=True)]
        x = x0 = rms_norm(F.embedding(info.batch.inputs, self.tok_emb.to(self.cfg.dtype)))
        skips, lane = [], None  # `lane` is the MLP lane; x is the attention lane once there are two
        for visit in plan:
            w, scale = layers[visit.layer], 1 / math.sqrt(visit.layer + 1) if self.cfg.ln_scale else 1.0
            lane = x if visit.parallel and lane is None else lane
            x = self.merge_skip(x, skips.pop(), visit.skip) if visit.skip else x
            u = w.resid_mix[0] * x + w.resid_mix[1] * x0
            a = w.attn_scale * self.attend(rms_norm(u) * scale, w, visit, info)
            if visit.parallel:  # attention reads one lane, the MLP the other; both are written to both
                m = w.mlp_scale * self.feed(rms_norm(lane) * scale, w, visit, info)
                lambdas = self.parallel_resid_lambdas, self.parallel_post_lambdas
                keep, post = (p[visit.layer].to(x.dtype) for p in lambdas)
                x, lane = (keep[j] * s + post[0, j] * a + post[1, j] * m for j, s in enumerate((x, lane)))
            else:
                h = u + a
                x = h + w.mlp_scale * self.feed(rms_norm(h) * scale, w, visit, info)
            skips += [x] if visit.push else []
        if lane is not None:
            x = {"mean": (x + lane) / 2, "attn": x, "mlp": lane}[self.cfg.parallel_final_lane]
        return rms_norm(x)

    def forward(self, batch: Batch, plan: tuple[Visit, ...], lora: LoRA | None = None, select: Tensor | None = None,
                tap: Callable[[str, int, Tensor], None] = lambda site, layer, x: None) -> Tensor:  # fmt: skip
        """Nats per token (T,) fp32, 0 where the target is -1. `lora` adapts segments of equal length, one adapter each.
        `tap` sees the input of every product. With `select` (n,) int64, only these positions get logits: (n,)."""
        place, dtype = positions(batch.cu_seqlens, batch.inputs.numel()), self.cfg.dtype
        info = PassInfo(batch, self.rope[place].to(dtype).unbind(1), tap, lora.views(dtype) if lora else {})
        x, targets = self.hidden(info, plan), batch.targets
        tap("head_in", 0, x)
        if select is not None:
            x, targets = x[select], targets[select]
        z = info.add_lora(F.linear(x, self.tok_emb.to(dtype)), x, "head", 0)
        logits = self.cfg.logit_softcap * torch.tanh(z.float() / self.cfg.logit_softcap)  # fp32 from here on (W16)
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")

# === 6. Adapters: a LoRA for every document of a batch, at every visit of a layer =====================================
class LoRA(NamedTuple):
    """Adapters of B documents in two fp32 leaf tensors: y += (x A^T) B^T. q, k, v, o read the normalised input of the
    attention, mlp that of the MLP, head the final state. Record: 8,355,840 values per document, 17 visits and head."""
    sites: tuple[tuple[str, int], ...]  # (site, slot) of every adapter
    widths: tuple[int, ...]  # its output width
    down: Tensor  # (B, len(sites), rank, C)
    up: Tensor  # (B, sum(widths), rank)
    @classmethod
    def zeros(cls, cfg: Config, batch: int, slots: int, device: torch.device) -> LoRA:
        C, kv, rank = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim, cfg.ttt_lora_rank
        on = {"q": C, "k": kv * cfg.ttt_k_lora, "v": kv, "o": C * cfg.ttt_o_lora, "mlp": C * cfg.ttt_mlp_lora}
        widths = {(site, slot): width for slot in range(slots) for site, width in on.items() if width}
        widths["head", 0] = cfg.vocab_size
        shapes = (len(widths), rank, C), (sum(widths.values()), rank)
        leaves = (torch.zeros(batch, *shape, device=device, requires_grad=True) for shape in shapes)
        return cls(tuple(widths), tuple(widths.values()), *leaves)
    @torch.no_grad()
    def reset(self, seed: int, keys: list[int]) -> None:  # B zero, A +-1/sqrt(C) by seed and document key alone (W48)
        generator, bound = torch.Generator(self.down.device), self.down.size(-1) ** -0.5
        for a, key in zip(self.down, keys, strict=True):
            a.uniform_(-bound, bound, generator=generator.manual_seed(seed * 1_000_000_007 + key))  # CPU: low 32 bits
        self.up.zero_()
    def views(self, dtype: torch.dtype) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        """(site, slot) -> A (B, rank, C), B (B, out, rank); unbind and split, so that a gradient is one copy."""
        pairs = zip(self.down.to(dtype).unbind(1), self.up.to(dtype).split(self.widths, 1), strict=True)
        return dict(zip(self.sites, pairs, strict=True))

# === 7. Optimisation: Muon on banks, AdamW on the rest, schedules =====================================================
def newton_schulz(g: Tensor, steps: int) -> Tensor:  # singular values of each matrix of g (n, r, c) towards 1
    a, b, c = 3.4445, -4.7750, 2.0315  # quintic, of Muon (K. Jordan)
    x = g.mT if g.size(-2) > g.size(-1) else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        y = x @ x.mT
        x = a * x + torch.baddbmm(y, y, y, beta=b, alpha=c) @ x
    return x.mT if g.size(-2) > g.size(-1) else x

def muon_update(grad: Tensor, buffer: Tensor, momentum: Tensor, cfg: Config) -> Tensor:
    """Gradient (n, r, c) fp32 and momentum buffer, changed in place -> orthogonalised Nesterov step, compute dtype."""
    buffer.mul_(momentum).add_(grad)
    u = grad + momentum * buffer
    if cfg.muon_row_normalize:
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    return newton_schulz(u.to(cfg.dtype), cfg.muon_backend_steps)

class Muon(torch.optim.Optimizer):
    """Muon for banks of matrices (B, out, in) that act as y = x W^T: reduce-scatter of gradients, step on the shard,
    all-gather of updates (PR #399). A rank owns floor or ceil(B / W) slices; one more in a shard is padding. The rate
    is the spectral norm of an update over sqrt(max(1, out / in)). All state is in the state dict (W1)."""
    def __init__(self, banks: list[nn.Parameter], cfg: Config, ranks: Ranks):
        super().__init__([{"params": banks, "lr": cfg.matrix_lr, "base_lr": cfg.matrix_lr}], {})
        self.cfg, self.ranks, W = cfg, ranks, ranks.world_size
        self.update = torch.compile(muon_update, dynamic=False) if cfg.compile else muon_update
        self.places, self.own, self.shards = {}, {}, {}
        for p in banks:
            share, counts = -(-len(p) // W), [len(p) // W + (r < len(p) % W) for r in range(W)]
            places = [r * share + i for r, count in enumerate(counts) for i in range(count)]
            self.places[p] = torch.tensor(places, device=p.device)  # slice of the bank -> slice of the gathered shards
            self.own[p], dtype = counts[ranks.rank], torch.float32 if W == 1 else cfg.dtype
            self.shards[p] = torch.zeros(share, *p.shape[1:], device=p.device, dtype=dtype)
            self.state[p]["momentum_buffer"] = torch.zeros(self.own[p], *p.shape[1:], device=p.device)

    def reduce(self) -> Tensor:  # sums gradients over ranks into the shards; returns the squared norm of them all
        total = torch.zeros((), device=next(iter(self.shards)).device)
        for p, shard in self.shards.items():
            full = shard.new_zeros(self.ranks.world_size * len(shard), *p.shape[1:])
            self.ranks.reduce_scatter(shard, full.index_copy_(0, self.places[p], p.grad.to(full.dtype)))
            total += shard[: self.own[p]].float().square().sum()
        return self.ranks.sum(total)

    @torch.no_grad()
    def step(self, clip: Tensor, momentum: Tensor) -> None:  # one update from the reduced shards times `clip`; scalars
        lr = self.param_groups[0]["lr"]
        for p, shard in self.shards.items():
            mine = torch.zeros(shard.shape, device=p.device, dtype=self.cfg.dtype)
            if own := self.own[p]:
                buffer = self.state[p]["momentum_buffer"]
                mine[:own] = self.update(shard[:own].float() * clip, buffer, momentum, self.cfg)
            full = self.ranks.all_gather(mine)
            p.mul_(1 - lr * self.cfg.muon_wd)
            p.add_(full[self.places[p]], alpha=-lr * math.sqrt(max(1.0, p.size(-2) / p.size(-1))))

class Optimizers:  # all as one: reduce every gradient, clip by the norm of the reduced ones (W2), step
    def __init__(self, model: GPT, cfg: Config, ranks: Ranks):
        self.model, self.cfg, self.ranks, table = model, cfg, ranks, parameter_table(cfg)
        group = {"muon": [], "embed": [], "scalar": []}
        for name, p in model.named_parameters():
            group[table.pop(name).group].append(p)
        assert not table, f"the table names {list(table)}, which the model has not"
        self.muon, self.replicated = Muon(group["muon"], cfg, ranks), [*group["scalar"], *group["embed"]]
        settings = [("embed", cfg.tied_embed_lr, cfg.embed_wd), ("scalar", cfg.scalar_lr, cfg.adam_wd)]
        groups = [dict(params=group[name], lr=lr, base_lr=lr, weight_decay=decay) for name, lr, decay in settings]
        self.adam = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)

    def step(self, lr_scale: float, momentum: float) -> Tensor:  # clears the gradients; returns the reduced one's norm
        squares = self.muon.reduce()
        flat = self.ranks.sum(torch.cat([p.grad.flatten() for p in self.replicated]))  # all small ones in one message
        norm = (squares + flat.square().sum()).sqrt()
        clip = ((self.cfg.grad_clip_norm or math.inf) / (norm + 1e-6)).clamp_max(1.0)
        for p, g in zip(self.replicated, (flat * clip).split([p.numel() for p in self.replicated]), strict=True):
            p.grad = g.view_as(p)
        for g in [*self.muon.param_groups, *self.adam.param_groups]:  # anew each time: load_state_dict replaces them
            g["lr"] = g["base_lr"] * lr_scale
        self.adam.step()
        self.muon.step(clip, torch.tensor(momentum, device=norm.device))
        self.model.zero_grad(set_to_none=True)
        return norm

def lr_scale(frac: float, cfg: Config) -> float:  # 1, then linear to 0 over the last WARMDOWN_FRAC; at least MIN_LR
    return 1.0 if frac < 1 - cfg.warmdown_frac else max((1 - frac) / cfg.warmdown_frac, cfg.min_lr)
def muon_momentum(step: int, cfg: Config) -> float:
    share = min((step + 1e-9) / (cfg.muon_momentum_warmup_steps + 1e-9), 1.0)
    return cfg.muon_momentum_warmup_start + (cfg.muon_momentum - cfg.muon_momentum_warmup_start) * share

# === 8. Scoring: nats and bytes of every validation token, once =======================================================
class ByteTable(NamedTuple):  # bytes of text per token: a leading space counts unless after a boundary
    base: np.ndarray  # (V,) int64: UTF-8 length of the piece without one leading space mark; 1 for byte pieces
    space: np.ndarray  # (V,) bool: the piece begins with the space mark
    boundary: np.ndarray  # (V,) bool: control, unknown or unused piece, after which the text begins anew
    @classmethod
    def from_sentencepiece(cls, model: Any) -> ByteTable:
        ids = range(model.vocab_size())
        boundary = np.array([model.is_control(i) or model.is_unknown(i) or model.is_unused(i) for i in ids])
        pieces = ["" if boundary[i] else "?" if model.is_byte(i) else model.id_to_piece(i) for i in ids]
        base = np.array([len(piece.removeprefix("\u2581").encode()) for piece in pieces])
        return cls(base, np.array([piece.startswith("\u2581") for piece in pieces]), boundary)
    def bytes_of(self, before: np.ndarray, targets: np.ndarray) -> np.ndarray:  # of each target after its predecessor
        return self.base[targets] + (self.space[targets] & ~self.boundary[before])
    def count(self, tokens: np.ndarray) -> int:  # bytes of all targets tokens[1:] of a stream (n,)
        return int(self.bytes_of(tokens[:-1], tokens[1:]).sum())

def check_bytes(tokenizer: Tokenizer, docs: Documents) -> ByteTable:  # UsageError unless up to 200 documents agree
    table = ByteTable.from_sentencepiece(tokenizer.model)
    for start, count in list(zip(docs.starts, docs.counts, strict=True))[:: len(docs.starts) // 200 + 1]:
        ids = docs.tokens[start : start + count + (start + count == len(docs.tokens) - 1)]  # without the next BOS
        real = len(tokenizer.model.decode(ids[1:].tolist()).encode())
        if (counted := table.count(ids)) != real:
            raise UsageError(f"{tokenizer.path}: counts {counted} bytes, not {real}, for the document at {start}")
    total = tokenizer.manifest.get("splits", {}).get("val", {}).get("bytes")
    if total not in (None, table.count(docs.tokens)):
        raise UsageError(f"{tokenizer.path}: counts {table.count(docs.tokens)} validation bytes, the manifest {total}")
    return table

class BpbMeter:  # nats, bytes and tokens so far, in float64; the only place that makes val_loss and val_bpb of them
    def __init__(self, table: ByteTable):
        self.table, self.totals = table, np.zeros(3)
    def add(self, nats: Tensor, before: np.ndarray, targets: np.ndarray) -> None:  # (n,) each; not where target is -1
        keep = targets >= 0
        num_bytes = self.table.bytes_of(before[keep], targets[keep]).sum()
        self.totals += (nats.double().cpu().numpy()[keep].sum(), num_bytes, keep.sum())
    def result(self, ranks: Ranks | None = None) -> dict[str, float]:  # with `ranks`, of them all (all must call it)
        totals = torch.tensor(self.totals)
        nats, num_bytes, tokens = (ranks.sum(totals.to(ranks.device)) if ranks else totals).tolist()
        loss = nats / max(tokens, 1)
        bpb = loss / math.log(2) * tokens / max(num_bytes, 1)
        return {"val_loss": loss, "val_bpb": bpb, "tokens": int(tokens), "bytes": int(num_bytes)}

def windows(num_targets: int, length: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, score, end): read inputs start..end-1 of a document, score its targets score..end-1; target j follows j.
    Each window starts on the grid of `stride`, wherever the document ends (W51); stride = length is plain scoring."""
    starts = range(0, max(num_targets - length, 0) + stride, stride)
    return [(s, s + length - stride if s else 0, min(s + length, num_targets)) for s in starts if num_targets > 0]

def evaluate(forward: Callable, plan: tuple[Visit, ...], docs: Documents, table: ByteTable, stride: int, cfg: Config,
             ranks: Ranks, log: Log) -> dict[str, float]:  # fmt: skip
    """Scores every target once, in windows; the score depends neither on the rows nor on the ranks. All call it."""
    meter, (size, capacity, length) = BpbMeter(table), cfg.val_row_shape
    by_document, rows, used = cfg.data_loader == "documents", [], size + 1
    texts = zip(docs.starts.tolist(), docs.counts.tolist(), strict=True) if by_document else [(0, len(docs.tokens) - 1)]
    for first, count in texts:
        for start, score, end in windows(count, length, min(stride or length, length)):
            if used + end - start > size or len(rows[-1]) == capacity // 2:
                rows.append([])
                used = 0
            rows[-1].append((first + start, first + score, first + end))  # in tokens of the stream from here on
            used += end - start
    for number, row in list(enumerate(rows))[ranks.rank :: ranks.world_size]:
        index = np.concatenate([np.arange(start, end) for start, _, end in row])
        scored = np.concatenate([np.arange(start, end) >= score for start, score, end in row])
        starts = np.cumsum([0] + [end - start for start, _, end in row[:-1]])
        before, targets = docs.tokens[index], np.where(scored, docs.tokens[index + 1], -1)
        with torch.no_grad():
            nats = forward(pack_row(before, targets, starts, cfg.val_row_shape, ranks.device), plan)
        meter.add(nats[: len(index)], before, targets)
        if log.due():
            log(f"eval_progress: row {number + 1}/{len(rows)} running_bpb:{meter.result()['val_bpb']:.4f}")
    return meter.result(ranks)

# === 9. Training ======================================================================================================
def accumulate(forward: Callable, plan: tuple[Visit, ...], rows: list[Batch], num_targets: int) -> Tensor:
    """Adds the gradient of this rank's part of the mean loss over `num_targets`; returns that part, detached."""
    total = torch.zeros((), device=rows[0].inputs.device)
    for row in rows:
        loss = forward(row, plan).sum() / num_targets
        loss.backward()
        total += loss.detach()
    return total

def synthetic_row(cfg: Config, shape: tuple[int, int, int], device: torch.device) -> Batch:
    """Random ids in documents of many lengths: what warm-up sees in place of any real token (W43)."""
    (size, room, longest), rng = (shape[0], shape[1] // 2, shape[2]), np.random.default_rng(0)
    ids, starts = rng.integers(0, cfg.vocab_size, size + 1), segment_starts(rng.random(size) < 2 / longest, 1, longest)
    n = int([*starts, size][min(room, len(starts))])  # cut where the loader would
    return pack_row(ids[:n], ids[1 : n + 1], starts[:room], shape, device)

@contextlib.contextmanager
def restored(model: nn.Module, optimizers: Optimizers) -> Iterator[None]:  # afterwards all state is as before (W1)
    kept = [*model.state_dict().values(), *(s["momentum_buffer"] for s in optimizers.muon.state.values())]
    copies, devices = [t.clone() for t in kept], [model.rope.device] * model.rope.is_cuda
    with torch.random.fork_rng(devices):
        yield
    torch._foreach_copy_(kept, copies)
    optimizers.adam.state.clear()
    model.zero_grad(set_to_none=True)

def train(run: Run, reserve: float) -> bool:
    """Trains until the budget less `reserve` seconds is spent and leaves the EMA of the weights in the model. Schedules
    follow the share of the budget spent (the ranks' mean clock), or of ITERATIONS without one. No step may end too
    late. Returns whether the loops ran at the end: scoring uses the depth that was trained (W6). Raises
    FloatingPointError on a loss or gradient that is not finite, once the average of the steps before is saved."""
    cfg, ranks, log, live = run.cfg, run.ranks, run.log, [p.detach() for p in run.model.parameters()]
    ema = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    budget = (cfg.max_wallclock_seconds or math.inf) - reserve
    elapsed, longest, looped, loss, tokens, step, marked = 0.0, 0.0, False, math.nan, 0, 0, (0.0, 0)
    steps, start = PackedLoader(run.streams["train"], run.tokenizer.bos_id, cfg, ranks).steps(), ranks.now()
    while step < cfg.iterations:
        frac = step / cfg.iterations if budget == math.inf else elapsed / budget
        switch = cfg.num_loops > 0 and not looped and frac >= cfg.enable_looping_at
        longest *= len(cfg.plans[1]) / cfg.num_layers if switch else 1.0  # the next steps are longer
        if elapsed + longest > budget:
            break
        if switch:
            looped = True
            log(f"layer_loop:enabled step:{step} frac:{frac:.3f} order:{[v.layer for v in cfg.plans[1]]}")
        rows, num_targets = next(steps)
        local = accumulate(run.forward, cfg.plans[looped], rows, num_targets)
        norm = float(run.optimizers.step(lr_scale(frac, cfg), muon_momentum(step, cfg)))
        mine = torch.stack([local, local.new_tensor((ranks.now() - start) / ranks.world_size)])
        before, (loss, elapsed) = elapsed, ranks.sum(mine).tolist()
        if not math.isfinite(loss + norm):
            run.save("last_good.pt", ema, step, looped)
            raise FloatingPointError(f"loss {loss}, gradient norm {norm} in step {step + 1}; last_good.pt is before")
        torch._foreach_lerp_(list(ema.values()), live, 1 - cfg.ema_decay)
        step, tokens, longest = step + 1, tokens + num_targets, max(longest * 0.98, elapsed - before)
        if step <= 3 or log.due() or (cfg.train_log_every and step % cfg.train_log_every == 0):
            rate, marked = (tokens - marked[1]) / max(elapsed - marked[0], 1e-9), (elapsed, tokens)
            log(f"step:{step}/{cfg.iterations} train_loss:{loss:.4f} train_time:{1000 * elapsed:.0f}ms step_avg:"
                f"{1000 * elapsed / step:.2f}ms tok/s:{rate:.0f} lr_scale:{lr_scale(frac, cfg):.3f}")  # fmt: skip
        if cfg.val_loss_every and step % cfg.val_loss_every == 0:
            with run.phase("validate", "none"):
                result = run.evaluate(plan=cfg.plans[looped])
            start += run.phases[-1][2]  # off the clock
            log(f"{step}/{cfg.iterations} val_loss: {result['val_loss']:.4f} val_bpb: {result['val_bpb']:.4f}")
    steps.close()
    log(f"stopping: step:{step}/{cfg.iterations} train_time:{1000 * elapsed:.0f}ms; ema:applying EMA weights")
    torch._foreach_copy_(live, list(ema.values()))
    run.final |= {"steps": step, "train_loss": loss, "train_tokens": tokens}
    run.save("final_model.pt", ema, step, looped)
    return looped

# === 10. Compression: Hessians -> steps -> GPTQ -> integers -> one file ===============================================
def matrices(cfg: Config) -> list[tuple[str, int, str, int]]:  # all integer ones: (bank, slice, input site, layer)
    L, each = cfg.num_layers, [("qo_bank", 0, "attn_in"), ("qo_bank", 1, "attn_out"), ("kv_bank", 0, "attn_in"),
                               ("kv_bank", 1, "attn_in"), ("up_bank", 0, "mlp_in"), ("down_bank", 0, "mlp_mid")]
    found = [(bank, half * L + i, site, i) for bank, half, site in each for i in range(L)]
    return [*found, ("tok_emb", 0, "head_in", 0)]
def banks(cfg: Config) -> dict[str, tuple[int, int, int]]:  # name -> (n, rows, cols), in the order of the artifact
    table = parameter_table(cfg).items()
    return {name: (math.prod(r.shape[:-2]), *r.shape[-2:]) for name, r in table if r.packing != "float"}

@torch.no_grad()
def collect_hessians(model: GPT, plan: tuple[Visit, ...], rows: list[Batch], ranks: Ranks) -> dict[tuple, Tensor]:
    """(site, layer) -> mean of x x^T (in, in) fp32 over visits and all ranks' rows, packed as in training (W31)."""
    sites = {(site, layer): model.get_parameter(bank).size(-1) for bank, _, site, layer in matrices(model.cfg)}
    sums = {key: torch.zeros(size, size, device=ranks.device) for key, size in sites.items()}
    def tap(site: str, layer: int, x: Tensor) -> None:
        sums[site, layer].addmm_(x.mT.float(), x.float())
    for row in rows:
        model(row, plan, tap=tap, select=torch.zeros(1, dtype=torch.long, device=ranks.device))
    count = ranks.sum(torch.tensor(float(len(rows)), device=ranks.device)) * model.cfg.micro_batch_tokens
    return {key: ranks.sum(total) / count for key, total in sums.items()}

def collect_sensitivities(forward: Callable, model: GPT, plan: tuple[Visit, ...], rows: list[Batch],
                          hessians: dict[tuple, Tensor], ranks: Ranks) -> dict[str, Tensor]:  # fmt: skip
    """bank -> (n, rows) fp32, all ranks: what a squared error of a row's output costs in nats, up to one factor: the
    mean square of the loss's gradient by it, here the squared gradient of the row's weights over its inputs' energy.
    The tied table's gradient holds both its roles, so its Hessian becomes, in `hessians`, their covariance (W31)."""
    squares = {name: torch.zeros(shape[:2], device=ranks.device) for name, shape in banks(model.cfg).items()}
    both, key, found = torch.zeros_like(hessians["head_in", 0]), ("head_in", 0), {}
    for row in rows:
        forward(row, plan).sum().backward()
        with torch.no_grad():
            for name, total in squares.items():
                total += model.get_parameter(name).grad.square().sum(-1).view_as(total)
            directions = F.normalize(model.tok_emb.grad, dim=-1)
            both.addmm_(directions.mT, directions)
        model.zero_grad(set_to_none=True)
    hessians[key] = ranks.sum(both) * (hessians[key].trace() / both.trace().clamp_min(1e-30))
    for name, total in squares.items():
        energy = torch.stack([hessians[m[2:]].trace() for m in matrices(model.cfg) if m[0] == name])
        found[name] = ranks.sum(total) / energy.clamp_min(1e-30)[:, None]
    rare = 0.25 * found["tok_emb"].sqrt().mean().square()  # a token may be absent from these rows, not from the test
    return {**found, "tok_emb": found["tok_emb"] + rare}

def inverse_factor(hessian: Tensor) -> Tensor:  # upper U (n, c, c) with H^-1 = U^T U
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)  # damped by 1 % of it, more where that is not enough
    damping, eye = torch.full_like(mean, 0.01), torch.eye(hessian.size(-1), device=hessian.device)
    for _ in range(6):
        lower, failed = torch.linalg.cholesky_ex(hessian + (damping * mean)[:, None, None] * eye)
        upper, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        bad = (failed != 0) | (failed_too != 0) | ~upper.isfinite().all(-1).all(-1)
        if not bad.any():
            return upper
        damping[bad] *= 10
    raise FloatingPointError(f"Hessians {bad.nonzero().flatten().tolist()} of a bank have no Cholesky factor")

class Solver(NamedTuple):
    """GPTQ (Frantar et al. 2022) with act-order for all matrices of one shape at once. Columns go by falling Hessian
    diagonal, the error of each to those after it; inputs that are never active get zero columns."""
    weight: Tensor  # (n, rows, cols) fp32, columns in that order
    order: Tensor  # (n, cols)
    u: Tensor  # (n, cols, cols) upper, H^-1 = U^T U: a step s costs s^2 / 12 / U_jj^2 of weighted error in column j
    @classmethod
    def prepare(cls, weight: Tensor, hessian: Tensor) -> Solver:  # (n, rows, cols), (n, cols, cols)
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        dead = diagonal <= 0
        typical = diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp_min(1)
        hessian = hessian + torch.diag_embed(typical.clamp_min(1e-12) * dead)
        order = diagonal.argsort(-1, descending=True)
        each = torch.arange(len(order), device=order.device)[:, None, None]
        w = weight.float().masked_fill(dead.unsqueeze(1), 0).gather(-1, order.unsqueeze(1).expand_as(weight))
        return cls(w, order, inverse_factor(hessian[each, order[:, :, None], order[:, None, :]]))
    def solve(self, step: Tensor, qmax: int) -> Tensor:  # (n, rows) -> q int8 (n, rows, cols), W ~ q * step
        w, u, cols = self.weight.clone(), self.u, self.weight.size(-1)
        q = torch.empty_like(w)
        for start in range(0, cols, 128):
            stop = min(start + 128, cols)
            block, error = w[..., start:stop], torch.empty_like(w[..., start:stop])
            for j in range(stop - start):
                q[..., start + j] = (block[..., j] / step).round().clamp(-qmax, qmax)
                error[..., j] = (block[..., j] - q[..., start + j] * step) / u[:, start + j, start + j, None]
                block[..., j:] -= error[..., j, None] * u[:, start + j, None, start + j : stop]
            w[..., stop:] -= error @ u[:, start:stop, stop:]
        if not q.isfinite().all():
            raise FloatingPointError("GPTQ: a weight or a Hessian is not finite")
        return torch.empty_like(q).scatter_(-1, self.order.unsqueeze(1).expand_as(q), q).to(torch.int8)

def clip_steps(weight: Tensor, clip_sigmas: Tensor | float, qmax: int) -> Tensor:  # SDClip (PR #1394): (n, rows) fp16
    floor = torch.finfo(torch.float16).tiny  # below, fp16 loses bits (W33)
    return (clip_sigmas * weight.float().std(dim=-1) / qmax).clamp_min(floor).half()

class Quantizer:
    """All of quantisation that is the same for any size; a rank prepares every W-th slice of a bank. Steps are those of
    CLIP_SIGMAS times sqrt(theta), or with sensitivities by reverse water-filling over all rows: a row of power p and
    step s takes 1/2 log2(1 + 2 pi e p / s^2) bits a weight and costs, by Solver.u, e s^2 / 12 nats a weight. The sum of
    costs is least at 12 theta = s^2 (e - theta / p), with nothing but zeros where e p < theta. Steps are powers of
    2^(1/8) then: 0.1 % more error, 60 KB fewer of scales at full size."""
    def __init__(self, model: GPT, hessians: dict[tuple[str, int], Tensor], sensitivities: dict[str, Tensor] | None,
                 ranks: Ranks):  # fmt: skip
        self.cfg = cfg = model.cfg
        self.ranks, self.shapes, self.solvers, self.rows = ranks, banks(cfg), {}, {}
        self.finest = sum(map(math.prod, self.shapes.values())) * cfg.matrix_bits / 8  # bytes; see fit
        for bank, shape in self.shapes.items():
            weight, spread = model.get_parameter(bank).detach().view(shape), torch.zeros(shape[0], device=ranks.device)
            all_of = [m for m in matrices(cfg) if m[0] == bank]
            if mine := all_of[ranks.rank :: ranks.world_size]:
                index = torch.tensor([m[1] for m in mine], device=weight.device)
                solver = Solver.prepare(weight[index], torch.stack([hessians[m[2:]] for m in mine]))
                self.solvers[bank], spread[index] = (index, solver), solver.u.diagonal(dim1=1, dim2=2).pow(-2).mean(-1)
            qmax = 2 ** ((cfg.embed_bits if bank == "tok_emb" else cfg.matrix_bits) - 1) - 1
            clips = torch.tensor([clip_sigmas(cfg, bank, m[3]) for m in all_of], device=weight.device)[:, None]
            published, power = clip_steps(weight, clips, qmax).float(), weight.square().mean(-1).clamp_min(1e-20)
            cost = ranks.sum(spread)[:, None] * sensitivities[bank] if sensitivities else None
            self.rows[bank] = published, power, weight.abs().amax(-1), cost, 127 if sensitivities else qmax
        self.default = self.theta(self.predict(1.0, published=True)) if sensitivities else 1.0  # size: CLIP_SIGMAS'
    def steps(self, bank: str, theta: float) -> Tensor:  # (n, rows) fp32, values that fp16 has
        published, power, largest, cost, qmax = self.rows[bank]
        if cost is None:
            return (published * math.sqrt(theta)).half().float()
        step = (12 * theta / (cost - theta / power).clamp_min(1e-37)).sqrt()
        step = torch.minimum(step, 100 * power.sqrt()).maximum(largest / qmax).clamp(2.0**-14, 2.0**15)
        return torch.exp2((8 * step.log2()).round() / 8).half().float()
    def predict(self, theta: float, published: bool = False) -> float:  # bytes of codes by the entropy formula
        total = 0.0
        for bank, (_, _, cols) in self.shapes.items():
            step = self.rows[bank][0] if published else self.steps(bank, theta)
            total += cols / 16 * torch.log2(1 + 17.08 * self.rows[bank][1] / step.square()).double().sum().item()
        return total
    def theta(self, budget: float) -> float:  # the least with codes of at most `budget` bytes, predicted
        low, high = -140.0, 60.0  # log2
        for _ in range(48):
            middle = (low + high) / 2
            low, high = (low, middle) if self.predict(2.0**middle) <= budget else (middle, high)
        return 2.0**high
    def solve(self, theta: float) -> dict[str, tuple[Tensor, Tensor]]:
        """name -> (q int8 (n, rows, cols), scale fp16 (n, rows)) on the CPU, the same on all ranks."""
        packed = {}
        for bank, shape in self.shapes.items():
            step, q = self.steps(bank, theta), torch.zeros(shape, dtype=torch.int8, device=self.ranks.device)
            if bank in self.solvers:
                index, solver = self.solvers[bank]
                q[index] = solver.solve(step[index], self.rows[bank][4])
            packed[bank] = self.ranks.sum(q).cpu(), step.half().cpu()
        return packed

def clip_sigmas(cfg: Config, bank: str, layer: int) -> float:
    looped = cfg.num_loops > 0 and cfg.loop_start <= layer <= cfg.loop_end and cfg.loop_clip_sigmas
    group = {"qo_bank": cfg.attn_clip_sigmas, "kv_bank": cfg.attn_clip_sigmas}.get(bank, cfg.mlp_clip_sigmas)
    return cfg.embed_clip_sigmas if bank == "tok_emb" else looped or group or cfg.matrix_clip_sigmas

def quantize(model: GPT, hessians: dict[tuple[str, int], Tensor], ranks: Ranks,
             sensitivities: dict[str, Tensor] | None = None) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    solver = Quantizer(model, hessians, sensitivities, ranks)
    return solver.solve(solver.default)

def fit(solver: Quantizer, model: GPT, meta: dict[str, Any], log: Callable[[str], None], rounds: int = 12) -> bytes:
    """The artifact (on rank 0; all call it) with the finest steps that keep code and model under ARTIFACT_LIMIT_BYTES,
    at most 4 KB under it unless the weights take MATRIX_BITS each on average: no finer step is worth its bytes."""
    cfg, lead, finest = model.cfg, solver.ranks.is_main, solver.finest
    if not cfg.artifact_limit_bytes:
        packed = solver.solve(solver.default)
        return pack_artifact(model, packed, meta) if lead else b""
    room, fits, best, size = cfg.artifact_limit_bytes - code_bytes(), 0, b"", 0
    budget = min(0.96 * room, finest)
    for turn in range(rounds):
        packed = solver.solve(solver.theta(budget))
        data = pack_artifact(model, packed, meta) if lead else b""
        size = solver.ranks.gather(len(data))[0]
        log(f"fit:{turn + 1} codes predicted:{budget:.0f} model:{size} room:{room}")
        if fits < size <= room:
            best, fits = data, size
        if room - 4096 < size <= room or (budget == finest and size <= room):
            break
        budget = min(max(budget + (room - 2048 - size) * min(1.0, budget / size), budget / 4), finest)
    if not fits and rounds > 1:
        raise UsageError(f"ARTIFACT_LIMIT_BYTES={cfg.artifact_limit_bytes}: the model is {size - room} bytes over at "
                         f"{budget / finest * cfg.matrix_bits:.2f} bits a weight; lower MLP_MULT or MODEL_DIM")
    return best

# --- Entropy coder: interleaved range ANS (J. Duda) in NumPy, exact integers only, so any machine decodes alike ---
ANS_BITS, BANDS = 14, 48  # frequencies of a table add up to 2^14; bands of magnitude, times 4 of bias, for each bank
EDGES = np.array([round(2 ** (16 + (t + 0.5) / 8)) for t in range(-36, 24)])  # of a column's mean |q|, relative, * 2^16
INVERSE = np.array([0] + [round(2 ** (16 - (k - 65) / 8)) for k in range(1, 256)])  # 2^16 / a level's mean |q|
def row_levels(q: np.ndarray) -> np.ndarray:  # (n, rows, cols) int8 -> u8 (n, rows): mean |q| in steps of 2^(1/8)
    mean = np.stack([np.abs(matrix.astype(np.int16)).mean(-1) for matrix in q])
    return np.where(mean > 0, np.rint(8 * np.log2(np.maximum(mean, 2**-8)) + 65), 0).astype(np.uint8)

def walk(shapes: list[tuple[int, int, int]], levels: list[np.ndarray], code: Callable) -> None:
    """Calls code(bank, matrices, row, context, sign) -> codes (m, cols), all rows in the stream's order. Context: bank,
    band of magnitude (the row's level, known beforehand, and the column's mean |q| in rows above) and how far off 0 the
    column's mean is; `sign` is this mean's, and times it the codes lean to the positive."""
    lanes = num_lanes(shapes)
    for bank, (n, rows, cols) in enumerate(shapes):
        for part in (slice(first, first + lanes // cols) for first in range(0, n, lanes // cols)):
            level = levels[bank][part, :, None].astype(np.int64)  # (m, rows, 1)
            size = np.full((len(level), cols), 8 << 16)
            total, offset, bias, sign = np.zeros_like(size), 0, 0, 1
            for row in range(rows):
                if row % 8 == 0:
                    offset = np.searchsorted(EDGES, size // (row + 8))
                    bias, sign = np.searchsorted([7, 19, 39], 100 * abs(total) // size, "right"), 1 - 2 * (total < 0)
                k = level[:, row]
                band = np.where(k, np.minimum((k + offset) // 4, BANDS - 1), 0)
                q = code(bank, part, row, (BANDS * bank + band) * 4 + bias, sign).astype(np.int64)
                size += np.where(k, abs(q) * INVERSE[k], 1 << 16)
                total += q * INVERSE[k]
def num_lanes(shapes: list[tuple[int, int, int]]) -> int:  # independent states: more are faster, each costs 2 bytes
    return max(max(s[2] for s in shapes), sum(map(math.prod, shapes)) >> 13)

def choose_tables(counts: np.ndarray) -> np.ndarray:
    """counts (banks, BANDS, 4, 256) -> for each context, flat, the context whose table it uses: that of all banks, or
    of all biases, where tables of their own, at 9 bits an entry, would not pay."""
    def bits(c: np.ndarray) -> np.ndarray:
        total, each = (x * np.log2(np.maximum(x, 1)) for x in (c.sum(-1), c))
        return total - each.sum(-1) + 9 * (c > 0).sum(-1)
    own, bank = np.arange(counts[..., 0].size).reshape(counts.shape[:3]), counts.sum(2)
    apart, together = bits(counts).sum(-1), bits(bank)  # (banks, BANDS)
    split = bits(bank.sum(0)) > np.minimum(apart, together).sum(0)  # (BANDS,)
    return np.where(split[:, None], np.where((apart < together)[..., None], own, own[..., :1]), own[:1, :, :1]).ravel()

def ans_encode(codes: list[np.ndarray], levels: list[np.ndarray]) -> tuple[bytes, bytes]:
    """int8 codes -> table of each context and frequencies (contexts, 256), u16; final states u32 and words u16."""
    shapes, steps = [q.shape for q in codes], []
    def see(bank: int, part: slice, row: int, context: np.ndarray, sign: np.ndarray) -> np.ndarray:
        steps.append((context << 8 | codes[bank][part, row] * sign + 128).ravel().astype(np.int32))
        return codes[bank][part, row]
    walk(shapes, levels, see)
    seen = np.zeros((len(shapes) * BANDS * 4, 256), np.int64)
    for at in range(0, len(steps), 256):
        seen += np.bincount(np.concatenate(steps[at : at + 256]), minlength=seen.size).reshape(-1, 256)
    chosen, counts = choose_tables(seen.reshape(len(shapes), BANDS, 4, 256)), np.zeros_like(seen)
    np.add.at(counts, chosen, seen)
    table = np.maximum((counts << ANS_BITS) // np.maximum(counts.sum(1, keepdims=True), 1), counts > 0)
    table[np.arange(len(table)), table.argmax(1)] += ((1 << ANS_BITS) - table.sum(1)) * counts.any(1)
    freq, start = table.ravel(), (table.cumsum(1) - table).ravel()
    state, words = np.full(num_lanes(shapes), 1 << 16, np.int64), []
    for step in reversed(steps):
        x, index = state[: len(step)], chosen[step >> 8] << 8 | step & 255
        full = x >= freq[index] << 32 - ANS_BITS
        words.append(x[full].astype("<u2"))
        x[full] >>= 16
        x += x // freq[index] * ((1 << ANS_BITS) - freq[index]) + start[index]
    tables = chosen.astype("<u2").tobytes() + table.astype("<u2").tobytes()
    return tables, b"".join(w.tobytes() for w in (state.astype("<u4"), *reversed(words)))

def ans_decode(tables: bytes, data: bytes, shapes: list[tuple], levels: list[np.ndarray]) -> list[np.ndarray]:
    """The codes. ValueError or IndexError if ans_encode cannot have written `tables` and `data`."""
    codes, contexts, at = [np.zeros(shape, np.int8) for shape in shapes], len(shapes) * BANDS * 4, 0
    chosen, table = np.split(np.frombuffer(tables, "<u2").astype(np.int64), [contexts])
    table, used = table.reshape(contexts, 256), table.reshape(contexts, 256).any(1)
    state = np.frombuffer(data, "<u4", num_lanes(shapes)).astype(np.int64)
    words = np.frombuffer(data, "<u2", offset=4 * len(state)).astype(np.int64)
    if (table[used].sum(1) != 1 << ANS_BITS).any():
        raise ValueError("a table of frequencies does not add up")
    slots = np.repeat(np.tile(np.arange(256, dtype=np.uint8), contexts), table.ravel()).reshape(-1, 1 << ANS_BITS)
    place, freq, start = np.cumsum(used) - 1, table.ravel(), (table.cumsum(1) - table).ravel()
    def read(bank: int, part: slice, row: int, context: np.ndarray, sign: np.ndarray) -> np.ndarray:
        nonlocal at
        own = chosen[context.ravel()]
        x, slot = state[: len(own)], state[: len(own)] & (1 << ANS_BITS) - 1
        index = own << 8 | slots[place[own], slot]
        x[:] = freq[index] * (x >> ANS_BITS) + slot - start[index]
        low = np.flatnonzero(x < 1 << 16)
        x[low] = x[low] << 16 | words[at : at + len(low)]
        at += len(low)
        codes[bank][part, row] = ((index & 255) - 128).reshape(context.shape) * sign
        return codes[bank][part, row]
    walk(shapes, levels, read)
    if at != len(words) or (state != 1 << 16).any():
        raise ValueError("words are left over")
    return codes

# --- Container ---
def codec(name: str) -> tuple[Callable[[bytes], bytes], Callable[[bytes, int], bytes]]:
    """compress(data) and decompress(data, size): at most `size` bytes and little memory besides, whatever data says."""
    if name == "zstd":
        import zstandard
        # zstd's own levels look for matches that are not there (+16 % at level 3): codes want Huffman on literals
        fast = dict(strategy=1, window_log=17, hash_log=6, chain_log=6, search_log=1, min_match=6)
        coder = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(**fast))
        reader = partial(zstandard.ZstdDecompressor(max_window_size=1 << 20).stream_reader, read_across_frames=False)
        return coder.compress, lambda data, size: reader(data).read(size)
    if name == "brotli":
        import brotli
        return partial(brotli.compress, quality=11), lambda data, size: brotli.Decompressor().process(data, size)
    import lzma
    raw = dict(format=lzma.FORMAT_RAW, filters=[dict(id=lzma.FILTER_LZMA2, preset=6)])  # no header, none to trust
    return partial(lzma.compress, **raw), lambda data, size: lzma.LZMADecompressor(**raw).decompress(data, size)

def split_planes(tensors: Iterable[Tensor]) -> bytes:  # fp16: all low bytes, then the high ones, which repeat
    values = torch.cat([t.detach().flatten().half() for t in tensors]).cpu().numpy().astype("<f2")
    return values.view(np.uint8).reshape(-1, 2).T.tobytes()
def join_planes(data: bytes) -> np.ndarray:  # the inverse, as fp32
    return np.frombuffer(data, np.uint8).reshape(2, -1).T.copy().view("<f2").ravel().astype(np.float32)
def split_scales(scale: Tensor) -> bytes:  # fp16 (rows,): 256 sorted values and a u8 each if that is less, else planes
    values, index = np.unique(scale.numpy(), return_inverse=True)
    if len(values) > 256 or len(scale) <= 512:  # then the length tells the two apart
        return split_planes([scale])
    table = np.pad(values, (0, 256 - len(values)), mode="edge")
    return split_planes([torch.from_numpy(table)]) + np.diff(index.astype(np.uint8), prepend=np.uint8(0)).tobytes()
def join_scales(data: bytes, rows: int) -> np.ndarray:  # the inverse, as fp32; which of the two is seen by the length
    if len(data) == 2 * rows:
        return join_planes(data)
    return join_planes(data[:512])[np.cumsum(np.frombuffer(data[512:], np.uint8), dtype=np.uint8)]
def read_part(cfg: Config, name: str, p: Tensor) -> Tensor:  # the rows of a parameter that the network reads
    return p[cfg.parallel_start_layer :] if name.startswith("parallel_") else p

MAGIC, VERSION = b"PGLM", 2
def stream_sizes(cfg: Config) -> list[set[int]]:  # allowed raw sizes of codes, levels, scales and floats
    rows, params = sum(n * rows for n, rows, _ in banks(cfg).values()), parameter_table(cfg).items()
    floats = [read_part(cfg, n, torch.empty(r.shape, device="meta")) for n, r in params if r.packing == "float"]
    codes = sum(map(math.prod, banks(cfg).values()))
    return [{codes}, {rows}, {2 * rows, min(2 * rows, 512 + rows)}, {2 * sum(f.numel() for f in floats)}]

def pack_artifact(model: GPT, packed: dict[str, tuple[Tensor, Tensor]], meta: dict[str, Any]) -> bytes:
    """The artifact file, equal for equal weights. All numbers little-endian:
        "PGLM", u8 version, u32 length and u32 CRC-32 of the header, the header: zlib-compressed JSON of at most 64 KiB
            {config, compressor, streams: [[raw bytes, stored bytes, CRC-32 of the stored ones], ..], ..meta};
        four streams: codes (int8, each matrix in the order of the parameter table), the level of each row (row_levels,
            u8 differences), scales (split_scales) and floats (fp16 planes), without the rows that nothing reads.
    COMPRESSOR=ans codes the codes with ans_encode, its tables with LZMA as all other streams; every other compressor
    gets a bank's rows by rising level, so that alike rows share a block. Names and shapes follow from the config."""
    cfg, table, squeeze = model.cfg, parameter_table(model.cfg).items(), codec("lzma")[0]
    codes = [q.numpy() for q, _ in packed.values()]
    levels, flat = [row_levels(q).ravel() for q in codes], [q.reshape(-1, q.shape[-1]) for q in codes]
    if cfg.compressor == "ans":
        tables, words = ans_encode(codes, [lv.reshape(q.shape[:2]) for lv, q in zip(levels, codes, strict=True)])
        stored = len(tables := squeeze(tables)).to_bytes(4, "little") + tables + words
    else:
        alike = [q[i].tobytes() for q, i in zip(flat, (lv.argsort(kind="stable") for lv in levels), strict=True)]
        stored = codec(cfg.compressor)[0](b"".join(alike))
    raw = [np.diff(np.concatenate(levels), prepend=np.uint8(0)).tobytes(),
           split_scales(torch.cat([scale.flatten() for _, scale in packed.values()])),
           split_planes(read_part(cfg, n, model.get_parameter(n)) for n, role in table if role.packing == "float")]
    sizes, stored = [sum(q.size for q in codes), *map(len, raw)], [stored, *map(squeeze, raw)]
    header = {"config": {f: getattr(cfg, f) for f in MODEL_FIELDS}, "compressor": cfg.compressor, **meta}
    header["streams"] = [[size, len(s), zlib.crc32(s)] for size, s in zip(sizes, stored, strict=True)]
    head = zlib.compress(json.dumps(header, sort_keys=True).encode(), 9)
    numbers = len(head).to_bytes(4, "little") + zlib.crc32(head).to_bytes(4, "little")
    return MAGIC + bytes([VERSION]) + numbers + head + b"".join(stored)

def header_config(header: dict[str, Any]) -> Config:  # of the network an artifact holds; ValueError if none can be
    theirs, defaults = {f: header["config"][f] for f in MODEL_FIELDS}, Config(artifact_limit_bytes=0)
    if any(type(value) is not type(getattr(defaults, f)) for f, value in theirs.items()):
        raise ValueError("a field of another type")
    cfg = dataclasses.replace(defaults, **theirs)
    if cfg.num_layers * (1 + cfg.num_loops) > 1024 or any(p.split("=")[0].lower() in theirs for p in cfg.problems()):
        raise ValueError("a field out of range")
    return cfg

def open_artifact(data: bytes, path: Path) -> tuple[dict[str, Any], list[bytes]]:
    """Header and raw streams (codes, levels, scales, floats) of an artifact. Raises UsageError (one line) for whatever
    was not written whole by us, forged with care or not; nothing read is executed, sizes are checked before use."""
    if data[:4] != MAGIC:
        raise UsageError(f"{path}: not an artifact of train_gpt.py (starts with {data[:4]!r})")
    if len(data) > 4 and data[4] != VERSION:
        raise UsageError(f"{path}: container version {data[4]}, this program reads {VERSION}")
    at = 13 + int.from_bytes(data[5:9], "little")
    try:
        if len(data) < at or zlib.crc32(data[13:at]).to_bytes(4, "little") != data[9:13]:
            raise ValueError("its header does not match its checksum")
        header = json.loads(zlib.decompressobj().decompress(data[13:at], 1 << 16))
        cfg = header_config(header)
        if header["compressor"] not in COMPRESSORS:
            raise ValueError("an unknown compressor")
        sizes = [size for size, _, _ in header["streams"]]
        right = [size in allowed for size, allowed in zip(sizes, stream_sizes(cfg), strict=True)]
        if not all(right) or sum(sizes) > 1 << 27:
            raise ValueError("the sizes of its streams are not those of its network")
        ends = np.cumsum([at, *(abs(length) for _, length, _ in header["streams"])]).tolist()
        stored = [data[start:end] for start, end in zip(ends, ends[1:], strict=False)]
        if ends[-1] != len(data) or [zlib.crc32(s) for s in stored] != [c for _, _, c in header["streams"]]:
            raise ValueError("a stream does not match its checksum")
        rest = [codec("lzma")[1](s, size) for s, size in zip(stored[1:], sizes[1:], strict=True)]
        streams = [unpack_codes(header["compressor"], stored[0], cfg, rest[0]), *rest]
        if sizes != [len(s) for s in streams]:
            raise ValueError("a stream is shorter than its header says")
    except Exception as error:  # each codec has its own class of errors, and a hostile file may provoke any of them
        reason = str(error).splitlines()[:1] if type(error) is ValueError else [type(error).__name__]
        raise UsageError(f"{path}: damaged: {' '.join(reason)}") from error
    return header, streams

def unpack_codes(compressor: str, data: bytes, cfg: Config, levels: bytes) -> bytes:  # the codes as the model has them
    shapes, flat = list(banks(cfg).values()), np.cumsum(np.frombuffer(levels, np.uint8), dtype=np.uint8)
    by_bank = np.split(flat, np.cumsum([n * rows for n, rows, _ in shapes])[:-1])
    if compressor == "ans":
        end = 4 + int.from_bytes(data[:4], "little")
        tables = codec("lzma")[1](data[4:end], len(shapes) * BANDS * 4 * 514)
        by_bank = [levels.reshape(shape[:2]) for levels, shape in zip(by_bank, shapes, strict=True)]
        return b"".join(q.tobytes() for q in ans_decode(tables, data[end:], shapes, by_bank))
    alike = np.frombuffer(codec(compressor)[1](data, sum(map(math.prod, shapes))), np.int8)
    parts = np.split(alike, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    orders = [lv.argsort(kind="stable").argsort() for lv in by_bank]
    return b"".join(q.reshape(len(i), -1)[i].tobytes() for q, i in zip(parts, orders, strict=True))

@torch.no_grad()
def load_artifact(model: GPT, streams: list[bytes]) -> None:  # every parameter becomes q * scale or its fp16 value
    cfg, codes, floats = model.cfg, np.frombuffer(streams[0], np.int8), join_planes(streams[3])
    scales = join_scales(streams[2], len(streams[1]))
    for name, role in parameter_table(cfg).items():
        p, rows = model.get_parameter(name), math.prod(role.shape[:-1])
        if role.packing == "float":
            p = read_part(cfg, name, p)
            value, floats = floats[: p.numel()], floats[p.numel() :]
        else:
            value = codes[: p.numel()].reshape(rows, -1) * scales[:rows, None]
            codes, scales = codes[p.numel() :], scales[rows:]
        p.copy_(torch.from_numpy(value).view(p.shape))
    assert len(codes) == len(scales) == len(floats) == 0, "artifact and config disagree"

# === 11. Test-time training: score a chunk of every document of a batch, then learn from it ===========================
class Adaptation:  # on one rank (PR #1530): an adapter per document of a batch, an optimiser, the model frozen
    def __init__(self, model: GPT, forward: Callable, plan: tuple[Visit, ...], device: torch.device):
        self.cfg, self.forward, self.plan, self.device = model.cfg, forward, plan, device
        self.lora = LoRA.zeros(model.cfg, model.cfg.ttt_batch_size, len(plan), device)
        model.requires_grad_(False)  # or a compiled backward would compute the gradients of all weights
    def begin(self, keys: list[int]) -> None:  # adapters as drawn for documents with these keys, no optimiser state
        cfg, leaves = self.cfg, [self.lora.down, self.lora.up]
        self.lora.reset(cfg.seed, keys)
        kind, special = torch.optim.AdamW, dict(betas=(cfg.ttt_beta1, cfg.ttt_beta2), eps=1e-10, fused=True)
        if cfg.ttt_optimizer == "sgd":
            kind, special = torch.optim.SGD, dict(momentum=cfg.ttt_beta1)
        self.optimizer = kind(leaves, lr=cfg.ttt_lora_lr, weight_decay=cfg.ttt_weight_decay, **special)
    def score(self, inputs: np.ndarray, targets: np.ndarray) -> Tensor:  # (B, n) -> nats (B, C) of the last C targets
        (B, n), C = inputs.shape, self.cfg.ttt_chunk_size
        shape = (B * n, B, self.cfg.ttt_eval_seq_len)
        batch = pack_row(inputs.ravel(), targets.ravel(), np.arange(0, B * n, n), shape, self.device)
        select = (torch.arange(B)[:, None] * n + torch.arange(n - C, n)).flatten().to(self.device)
        return self.forward(batch, self.plan, lora=self.lora, select=select).view(B, C)
    def adapt(self, nats: Tensor, learns: np.ndarray, again: Callable[[], Tensor]) -> None:
        """TTT_GRAD_STEPS updates on a chunk that has been scored; `learns` (B,) leaves out documents ending in it."""
        mask = torch.from_numpy(learns).to(nats)
        for step in range(self.cfg.ttt_grad_steps):
            loss = ((again() if step else nats).mean(1) * mask).sum()
            self.optimizer.zero_grad()
            loss.backward(inputs=[self.lora.down, self.lora.up])
            self.optimizer.step()
    def warm_up(self) -> None:  # scores and learns from random tokens at the shortest and the longest window
        B, rng = self.cfg.ttt_batch_size, np.random.default_rng(0)
        self.begin([0] * B)
        for n in (self.cfg.ttt_chunk_size, self.cfg.ttt_eval_seq_len):
            score = partial(self.score, *rng.integers(0, self.cfg.vocab_size, (2, B, n)))
            self.adapt(score(), np.ones(B), again=score)

def score_then_adapt(state: Adaptation, docs: Documents, batch: np.ndarray, meter: BpbMeter) -> Iterator[None]:
    """Chunk by chunk of a batch's documents: scores, only then learns, yields; windows end on the chunk grid (W51)."""
    cfg, C, padding = state.cfg, state.cfg.ttt_chunk_size, state.cfg.ttt_batch_size - len(batch)
    counts, starts = (np.pad(x[batch], (0, padding))[:, None] for x in (docs.counts, docs.starts))  # (B, 1)
    state.begin(starts[:, 0].tolist())
    for end in range(C, int(counts.max()) + C, C):
        place = np.arange(max(0, end - cfg.ttt_eval_seq_len), end)  # (n,) of the window in each document
        inside = place < counts  # (B, n)
        index = np.where(inside, starts + place, 0)
        inputs, targets = docs.tokens[index], np.where(inside & (place >= end - C), docs.tokens[index + 1], -1)
        learns = counts[:, 0] > end
        nats = state.score(inputs, targets)  # with gradient even where nobody learns: one compiled graph
        meter.add(nats.detach().flatten(), inputs[:, -C:].ravel(), targets[:, -C:].ravel())  # final from here on
        if learns.any():
            state.adapt(nats, learns, again=partial(state.score, inputs, targets))
        yield

def evaluate_ttt(state: Adaptation, docs: Documents, table: ByteTable, ranks: Ranks, log: Log) -> dict[str, float]:
    """Scores every target once; a score depends on its document alone. All ranks call it and take batches of documents
    of like length, longest first, from a shared counter."""
    cfg, meter, order = state.cfg, BpbMeter(table), np.argsort(docs.counts, kind="stable")[::-1]
    order = order[docs.counts[order] > 0]
    batches = np.split(order, range(cfg.ttt_batch_size, len(order), cfg.ttt_batch_size))
    log(f"ttt_lora:docs:{len(docs.starts)} rank:{cfg.ttt_lora_rank} lr:{cfg.ttt_lora_lr} chunk:{cfg.ttt_chunk_size}")
    for number in takewhile(lambda n: n < len(batches), ranks.tickets()):
        for _ in score_then_adapt(state, docs, batches[number], meter):
            if log.due():
                running = "running_loss:{val_loss:.4f} running_bpb:{val_bpb:.4f}".format(**meter.result())
                log(f"ttt_progress: batch {number + 1}/{len(batches)} {running}")
    return meter.result(ranks)

# === 12. Entry: the phases of a run, each leaving a file ==============================================================
def load_model_file(cfg: Config, origin: dict[str, str]) -> tuple[Config, dict[str, Any]]:
    """The config with EVAL_ONLY_PATH's network, the file's header with `weights` (checkpoint) or `streams` (artifact).
    Executes nothing it reads. UsageError if it is neither, or the environment asks for another network."""
    path, name = Path(cfg.eval_only_path), f"EVAL_ONLY_PATH={cfg.eval_only_path}"
    try:
        data = path.read_bytes()
        if data[:2] == b"PK":  # a checkpoint is a zip file
            saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        else:
            saved, saved["streams"] = open_artifact(data, path)
        theirs = {f: saved["config"][f] for f in MODEL_FIELDS}
        asked = [f"{f.upper()}={v}" for f, v in theirs.items() if origin[f] == "env" and getattr(cfg, f) != v]
        cfg = dataclasses.replace(cfg, **theirs)
        shapes = {n: role.shape for n, role in parameter_table(cfg).items()}
        fits = "streams" in saved or {n: tuple(w.shape) for n, w in saved["weights"].items()} == shapes
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, zlib.error, pickle.UnpicklingError) as error:
        reason = getattr(error, "strerror", None) or "neither an artifact nor a checkpoint of train_gpt.py"
        raise UsageError(f"{name}: {reason}") from error
    if asked or not fits:
        raise UsageError(f"{name}: was made with {', '.join(asked) or 'another network than its config says'}")
    return cfg, saved

class Run:  # from its data to its report, the same on all ranks; `go` holds the phases in order
    def __init__(self, cfg: Config, origin: dict[str, str], ranks: Ranks):  # checks all that can be wrong, on all ranks
        self.cfg, self.ranks, self.saved, self.final, error = cfg, ranks, {}, {}, None
        self.phases, self.inner = [], 0.0
        with self.phase("check", "none"):
            try:
                lines = self.check(origin)
            except UsageError as caught:
                error = str(caught)
            if found := next(filter(None, ranks.gather(error)), None):  # or a peer would wait for one that has left
                raise UsageError(found)
        cfg, run_id = self.cfg, cfg.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}_{cfg.preset}_seed{cfg.seed}"
        run_id = ranks.gather(run_id)[0]
        self.folder = Path(cfg.artifact_dir or f"runs/{run_id}")
        self.log = Log(Path(f"logs/{run_id}.txt"), ranks.is_main)
        self.facts = {
            "run_id": run_id, "preset": cfg.preset, "seed": cfg.seed, "world_size": ranks.world_size,
            "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
            "torch": torch.__version__, "python": sys.version.split()[0], "dataset": cfg.dataset_dir.name,
            "code_sha256": hashlib.sha256(SOURCE).hexdigest(), "code_bytes": code_bytes(), "attention": self.backend,
            "val_docs": len(self.docs.counts), "tokenizer_sha256": self.tokenizer.sha256,
            "val_sha256": hashlib.sha256(self.docs.tokens.astype("<u2").tobytes()).hexdigest()}  # fmt: skip
        self.log(SOURCE.decode() + "\nHyperparameters:", terminal=False)
        for field, value in sorted(dataclasses.asdict(cfg).items()):
            self.log(f"  {field}: {value} ({origin[field]})", terminal=origin[field] == "env")
        self.log("\n".join([*(f"{key}: {value}" for key, value in self.facts.items()), *lines]))

    def check(self, origin: dict[str, str]) -> list[str]:  # sets what the phases need, returns lines for the log
        if self.cfg.eval_only_path:
            self.cfg, self.saved = load_model_file(self.cfg, origin)
        cfg, ranks = self.cfg, self.ranks
        if not self.saved and ranks.world_size > cfg.rows_per_step:
            raise UsageError(f"WORLD_SIZE={ranks.world_size}: must be at most {cfg.rows_per_step}, the rows of a step")
        self.tokenizer = Tokenizer.load(cfg)
        if self.saved.get("tokenizer", self.tokenizer.sha256) != self.tokenizer.sha256:
            raise UsageError(f"EVAL_ONLY_PATH={cfg.eval_only_path}: {self.tokenizer.path} is not its tokenizer")
        self.streams = open_shards(cfg, self.tokenizer, ranks, ["val"] if "streams" in self.saved else ["train", "val"])
        self.docs = Documents.load(self.streams["val"], self.tokenizer.bos_id, cfg)
        self.table = check_bytes(self.tokenizer, self.docs)
        self.backend, lines = choose_attention(cfg.attention_backend, ranks.device, cfg.dtype)
        return lines + [f"{name}_shards: {len(s.paths)} {name}_tokens: {s.size}" for name, s in self.streams.items()]
    @contextlib.contextmanager
    def phase(self, name: str, budget: str) -> Iterator[None]:  # times, against a budget, less phases within it
        outer, self.inner, start = self.inner, 0.0, self.ranks.now()
        yield
        seconds = self.ranks.now() - start
        self.phases.append((name, budget, seconds - self.inner))
        self.inner = outer + seconds
    def go(self) -> dict[str, Any]:  # each phase leaves a file before the next begins; returns the figures
        cfg, saved, path = self.cfg, self.saved, Path(self.cfg.eval_only_path)
        torch.manual_seed(cfg.seed)
        torch.set_float32_matmul_precision("high" if cfg.compute_dtype == "bf16" else "highest")
        torch._dynamo.config.recompile_limit = 64  # training, scoring and adaptation share GPT.forward
        self.model = GPT(cfg, self.backend).to(self.ranks.device)
        self.forward = torch.compile(self.model, fullgraph=True, dynamic=False) if cfg.compile else self.model
        self.ttt_forward = torch.compile(self.model, fullgraph=True, dynamic=True) if cfg.compile else self.model
        self.log(f"model_params:{sum(p.numel() for p in self.model.parameters())}")
        looped = saved.get("looped", cfg.num_loops > 0 and cfg.enable_looping_at < 1)
        with self.phase("warm-up", "none"):
            reserve = self.warm_up(cfg.plans[looped])
        if not saved:
            with self.phase("train", "train"):
                looped = train(self, reserve)
        elif "weights" in saved:
            self.model.load_state_dict(saved["weights"])
        self.plan = cfg.plans[looped]
        if "streams" not in saved:
            path = self.folder / "final_model.int6.ptz"
            self.compress(path, {"looped": looped, "tokenizer": self.tokenizer.sha256})
            self.score("diagnostic pre-quantization post-ema", "none", self.evaluate)
        self.reload(path)
        self.score("diagnostic quantized", "eval", self.evaluate)
        if cfg.sliding_window_enabled:
            self.score("diagnostic quantized_sliding_window", "eval", partial(self.evaluate, cfg.eval_stride))
        if cfg.ttt_enabled:
            state = Adaptation(self.model, self.ttt_forward, self.plan, self.ranks.device)
            adapting = partial(evaluate_ttt, state, self.docs, self.table, self.ranks, self.log)
            self.score("quantized_ttt_lora", "eval", adapting)
        return self.report()

    def warm_up(self, last: tuple[Visit, ...]) -> float:  # synthetic tokens, undone; the seconds to keep after training
        cfg, ranks, reserve, trains = self.cfg, self.ranks, 0.0, not self.saved
        self.optimizers, row = Optimizers(self.model, cfg, ranks), synthetic_row(cfg, cfg.row_shape, ranks.device)
        with restored(self.model, self.optimizers):
            for step in range(cfg.warmup_steps * trains):
                for plan in sorted({cfg.plans[0], last}, key=len):
                    accumulate(self.forward, plan, [row], cfg.micro_batch_tokens)
                    self.optimizers.step(1.0, cfg.muon_momentum)
                self.log(f"warmup_step: {step + 1}/{cfg.warmup_steps}")
            for _ in range(2 * trains * (cfg.max_wallclock_seconds > 0)):  # cold, then timed
                start = ranks.now()
                calibration = self.calibrate(last, [row])
                middle, rows = ranks.now(), -(-cfg.gptq_calibration_batches // ranks.world_size)
                solver = Quantizer(self.model, *calibration, ranks)
                fit(solver, self.model, {}, self.log, rounds=1)
                rounds = 4 if 0 < cfg.artifact_limit_bytes < 1.2 * solver.finest else 1  # a fit has taken up to four
                reserve = 1.0 + 1.25 * (rows * (middle - start) + rounds * (ranks.now() - middle))
            if cfg.warmup_steps:
                with torch.no_grad():
                    self.forward(synthetic_row(cfg, cfg.val_row_shape, ranks.device), last)
                if cfg.ttt_enabled:
                    Adaptation(self.model, self.ttt_forward, last, ranks.device).warm_up()
                    self.model.requires_grad_(True)
                self.log("warmup:done (random tokens, no validation data)")
        reserve = max(ranks.gather(reserve)) if cfg.gptq_reserve_seconds < 0 else cfg.gptq_reserve_seconds
        if 0 < cfg.max_wallclock_seconds < 2 * reserve:
            raise UsageError(f"MAX_WALLCLOCK_SECONDS={cfg.max_wallclock_seconds:g}: compression needs {reserve:.1f} s")
        self.log(f"gptq:reserving {reserve:.1f}s, effective={1000 * (cfg.max_wallclock_seconds - reserve):.0f}ms")
        return reserve

    def save(self, name: str, weights: dict[str, Tensor], step: int, looped: bool) -> None:
        saved = {"config": {f: getattr(self.cfg, f) for f in MODEL_FIELDS}, "looped": looped, "step": step}
        saved |= {"tokenizer": self.tokenizer.sha256, "weights": {k: v.detach().cpu() for k, v in weights.items()}}
        torch.save(saved, buffer := io.BytesIO())
        if self.ranks.is_main:
            write_atomic(self.folder / name, buffer.getvalue())
        self.log(f"Serialized model: {buffer.tell()} bytes in {self.folder / name}")

    def calibrate(self, plan: tuple[Visit, ...], rows: list[Batch]) -> tuple[dict, dict | None]:
        hessians = collect_hessians(self.model, plan, rows, self.ranks)
        if self.cfg.quantizer == "gptq":
            return hessians, None
        return hessians, collect_sensitivities(self.forward, self.model, plan, rows, hessians, self.ranks)
    def compress(self, path: Path, meta: dict[str, Any]) -> None:
        budget = "none" if self.saved else "train"
        with self.phase("calibrate", budget):
            loader = PackedLoader(self.streams["train"], self.tokenizer.bos_id, self.cfg, self.ranks)
            rows, _ = loader.rows(self.cfg.gptq_calibration_batches)
            calibration = self.calibrate(self.plan, rows)
        self.log(f"GPTQ:collected {len(calibration[0])} Hessians for {len(matrices(self.cfg))} matrices")
        with self.phase("quantise", budget):
            solver = Quantizer(self.model, *calibration, self.ranks)
        with self.phase("pack", budget):
            data = fit(solver, self.model, meta, self.log)
            if self.ranks.is_main:
                write_atomic(path, data)

    def reload(self, path: Path) -> None:
        data = self.ranks.gather(path.read_bytes() if self.ranks.is_main else None)[0]  # nodes may not share folders
        header, streams = open_artifact(data, path)
        load_artifact(self.model, streams)
        counts, total = np.bincount(np.frombuffer(streams[0], np.uint8)), len(data) + code_bytes()
        bound = int(sum(-n * math.log2(n / counts.sum()) / 8 for n in counts if n))  # order-0 entropy
        self.final |= {"model_bytes": len(data), "artifact_bytes": total, "codes_bytes": header["streams"][0][1]}
        self.final |= {"codes_entropy_bytes": bound, "artifact_sha256": hashlib.sha256(data).hexdigest()}
        self.log(f"Code size (uncompressed): {code_bytes()} bytes; model {len(data)}, its codes' entropy {bound}")
        over = f", {total - LIMIT_BYTES} OVER THE LIMIT" if total > LIMIT_BYTES else ""
        self.log(f"Total submission size quantized+{header['compressor']}: {total} bytes{over}")
    def evaluate(self, stride: int = 0, plan: tuple[Visit, ...] | None = None) -> dict[str, float]:
        return evaluate(self.forward, plan or self.plan, self.docs, self.table, stride, self.cfg, self.ranks, self.log)
    def score(self, label: str, budget: str, evaluation: Callable[[], dict[str, float]]) -> None:
        """Times an evaluation, logs its result in the field's template, keeps it; refuses one that left targets out."""
        key, expected = label.removeprefix("diagnostic ").split()[0].replace("-", "_"), int(self.docs.counts.sum())
        with self.phase(f"score {key}", budget):
            result = evaluation()
        if result["tokens"] != expected:
            raise RuntimeError(f"{label}: scored {result['tokens']} targets of {expected}")
        loss, bpb, seconds = result["val_loss"], result["val_bpb"], self.phases[-1][2]
        self.log(f"{label} val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{1000 * seconds:.0f}ms")
        self.final |= {f"{key}_loss": loss, f"{key}_bpb": bpb, "val_loss": loss, "val_bpb": bpb}
        self.final |= {"val_tokens": expected, "val_bytes": result["bytes"]}
        if self.ranks.is_main:
            write_atomic(self.folder / "scores.json", json.dumps(self.final, indent=1).encode())

    def report(self) -> dict[str, Any]:  # the table of phases and budgets, then the one line that starts with `final`
        self.log(f"{'phase':<34}{'seconds':>9}  counts against")
        for name, budget, seconds in self.phases:
            self.log(f"{name:<34}{seconds:>9.1f}  {budget}")
        for budget, limit in (("train", self.cfg.max_wallclock_seconds), ("eval", 600.0)):
            spent = sum(seconds for _, b, seconds in self.phases if b == budget)
            self.log(f"{'all of ' + budget:<34}{spent:>9.1f}  of {limit:.0f}" + ", OVER" * (0 < limit < spent))
        if (val := self.tokenizer.manifest.get("splits", {}).get("val", {})).get("gzip_bytes"):
            self.final["gzip_bpb"] = 8 * val["gzip_bytes"] / val["bytes"]
            self.log(f"for scale, gzip -9 of each document: val_bpb:{self.final['gzip_bpb']:.4f}")
        if self.ranks.device.type == "cuda":
            self.final["peak_memory_mib"] = torch.cuda.max_memory_allocated() >> 20
            self.log(f"peak memory allocated: {self.final['peak_memory_mib']} MiB")
        self.final |= {**self.facts, "seconds": {name: round(s, 3) for name, _, s in self.phases}}
        self.log("final " + json.dumps(self.final, sort_keys=True))
        return self.final

def main(argv: list[str]) -> int:  # exit status: 0 done, 2 wrong configuration or data, 1 the run failed
    try:
        if argv == ["--knobs"]:
            print_knobs()
            return 0
        if argv:
            raise UsageError(f"{argv[0]}: knobs are environment variables; the only argument is --knobs")
        Run(*Config.from_env(os.environ, torch.cuda.is_available()), Ranks(os.environ)).go()
    except (UsageError, FloatingPointError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train_gpt.py: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UsageError) else 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
