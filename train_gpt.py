"""One-file entry for the Parameter Golf challenge: the best language model that fits in 16,000,000 bytes.

    python train_gpt.py                                      # one process, on whatever device there is
    torchrun --standalone --nproc_per_node=8 train_gpt.py    # 8 GPUs over FineWeb shards
    python train_gpt.py --knobs                              # every knob, its meaning and its default per preset

The run: check, warm up, train, calibrate, quantise, pack, reload, score, adapt, report; so the file. Importing it reads
no environment and needs neither a GPU nor an optional package. The system is that of PR #1530 (samacqua) and PR #1560;
W1..W57 number weak points of the published script and stand where they are mended."""

from __future__ import annotations

import contextlib
import copy
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
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import chain, groupby, takewhile
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
jit = triton.jit if triton else lambda kernel: kernel

SOURCE = Path(
    __file__
).read_bytes()  # the file that runs and counts, taken before anyone can edit it (W35)
# Its text and the hash of the readable source: tools/pack.py puts both into the packed file, otherwise they are SOURCE.
TEXT, CODE_SHA256 = globals().get("UNPACKED") or (
    SOURCE.decode(),
    hashlib.sha256(SOURCE).hexdigest(),
)
LIMIT_BYTES = 16_000_000  # code and model together, decimal
COMPRESSORS = ("zstd", "ans", "lzma", "brotli")
CODE_BYTES = len(SOURCE)  # what the code counts for


class UsageError(ValueError):
    """Wrong configuration, data or file. The message is all the user sees, one line per problem; exit status 2."""


class RunStopped(RuntimeError): ...  # by a limit that the user has set; one line, exit status 3


class BadMatrix(FloatingPointError): ...  # on the rank that quantises it


# === 1. Configuration: every knob is an environment variable; a field is its variable in lower case ===================
def knob(default: Any, doc: str, lo: float = 0, hi: float = 1e18, choices: tuple = ()) -> Any:
    return dataclasses.field(default=default, metadata=dict(doc=doc, lo=lo, hi=hi, choices=choices))


@dataclasses.dataclass(frozen=True)
class Config:  # defaults are the `record` preset's; `PRESETS` overrides them and the environment both
    # Run and data
    preset: str = knob("record", "row of the preset table; default: record with CUDA, cpu without")
    shrink: bool = knob(
        False, "the preset's structure in small, for a CPU: narrow, short rows, little time"
    )
    seed: int = knob(1337, "initial weights, adapter init, document sampling", 0, 2**31)
    run_id: str = knob("", "names the log and the output folder; default: date, preset and seed")
    artifact_dir: str = knob("", "output folder; default: runs/<RUN_ID>")
    checkpoint_every: float = knob(
        0.0, "seconds of training; started again, RUN_ID goes on from the last; 0: never"
    )
    tensorboard_dir: str = knob("", "folder for TensorBoard, a curve per RUN_ID")
    eval_only_path: str = knob(
        "", "checkpoint (quantise, score, adapt) or artifact (score, adapt) instead of training"
    )
    data_dir: str = knob("./data", "holds datasets/ and tokenizers/")
    dataset: str = knob("", "folder under datasets/; default: fineweb10B_sp<VOCAB_SIZE>")
    tokenizer_path: str = knob(
        "", "SentencePiece model; default: the manifest's, else fineweb_<VOCAB_SIZE>_bpe.model"
    )
    data_loader: str = knob(
        "documents", "packed; or rows across them", choices=("documents", "rows", "shuffled")
    )
    compute_dtype: str = knob(
        "bf16", "activations and products; parameters are fp32", choices=("bf16", "fp32")
    )
    cuda_graph: bool = knob(
        False, "forward and backward of a row as a CUDA graph, where attention allows it"
    )
    compile: bool = knob(True, "torch.compile the forwards and Newton-Schulz")
    attention_backend: str = knob(
        "auto", "or the first right", choices=("auto", "fa3", "fa4", "fa2", "torch", "sdpa")
    )
    fused_mlp: bool = knob(True, "products of the MLP with their activation; 0: separate operators")
    fused_qk: bool = knob(True, "norm, RoPE and gain of q and k at once; 0: separate operators")
    fused_xsa: bool = knob(True, "the same for XSA")
    fused_ce: bool = knob(
        True, "head and softcapped cross-entropy, the gradient overwriting the logits; 0: separate"
    )
    # Length and schedule of training
    iterations: int = knob(20000, "step limit", 1)
    max_wallclock_seconds: float = knob(
        600.0, "training, calibration, quantisation, packing; 0: ITERATIONS steps"
    )
    gptq_reserve_seconds: float = knob(
        -1.0, "of that, kept for all after the last step; -1: measured in warm-up", -1
    )
    warmup_steps: int = knob(
        3, "synthetic steps per graph, undone afterwards; 0: compile inside the run"
    )
    warmdown_frac: float = knob(
        0.75, "last share of the budget, over which the rates fall linearly", 0, 1
    )
    warmdown_iters: int = knob(
        0, "steps of that fall, at the mean time of a step (PR #473); 0: WARMDOWN_FRAC"
    )
    min_lr: float = knob(0.1, "floor of the learning-rate factor (PR #1787)", 0, 1)
    enable_looping_at: float = knob(0.35, "share of the budget after which the loops run", 0, 1)
    train_batch_tokens: int = knob(786432, "tokens per step, all ranks together", 1)
    micro_batch_tokens: int = knob(
        98304, "tokens per row; a rank takes every WORLD_SIZE-th row of a step", 1
    )
    train_seq_len: int = knob(2048, "longest segment; longer documents are cut", 2)
    cu_seqlens_capacity: int = knob(512, "segments a row can hold: one shape, one graph (W25)", 2)
    pod_speedgate_ms: float = knob(
        0.0, "a mean of 20 steps above it stops the run, exit status 3; 0: off"
    )
    recompile_limit: int = knob(
        -1, "more compilations after warm-up stop the run, exit status 3; -1: only count", -1
    )
    train_log_every: int = knob(500, "steps; besides, a line every 8 s; 0: only those")
    val_loss_every: int = knob(4000, "steps between validations, off the clock; 0: never")
    # Model
    vocab_size: int = knob(8192, "must be the tokenizer's", 2, 65536)
    num_layers: int = knob(11, "physical layers", 2, 256)
    model_dim: int = knob(512, "width", 8)
    num_heads: int = knob(8, "query heads", 1)
    num_kv_heads: int = knob(4, "key and value heads", 1)
    mlp_mult: float = knob(4.0, "hidden width / MODEL_DIM", 0.01)
    leaky_slope: float = knob(
        0.5, "MLP: the square of the input, of this times it below zero; 0: relu squared", 0, 1
    )
    xsa_last_n: int = knob(11, "layers with XSA, counted from the top")
    skip_gates_enabled: bool = knob(True, "gated skips; 0: weighted add")
    tied_embed_init_std: float = knob(0.005, "initial standard deviation of the embedding")
    logit_softcap: float = knob(30.0, "logits = cap * tanh(z / cap)", 0.01)
    rope_base: float = knob(10000.0, "slowest wavelength / 2 pi", 1.01)
    rope_dims: int = knob(16, "rotated dims per head; 0: all")
    rope_train_seq_len: int = knob(
        0, "longer segments raise ROPE_BASE (NTK, PR #414); 0: none does"
    )
    ln_scale: bool = knob(True, "norm outputs times 1 / sqrt(layer + 1)")
    branch_scale: bool = knob(
        False, "what a layer adds to the stream times that, instead (PR #568)"
    )
    qk_gain_init: float = knob(5.0, "query scale per head after QK norm, learned")
    num_loops: int = knob(2, "extra passes over LOOP_START..LOOP_END", 0, 64)
    loop_start: int = knob(3, "first looped layer")
    loop_end: int = knob(5, "last looped layer")
    parallel_start_layer: int = knob(8, "first layer with two lanes; 0: never")
    parallel_final_lane: str = knob(
        "mean", "what leaves the two lanes", choices=("mean", "mlp", "attn")
    )
    bigram_vocab_size: int = knob(0, "rows of the hashed table of token pairs (PR #162); 0: none")
    bigram_dim: int = knob(128, "its width", 1)
    smear_enabled: bool = knob(
        False, "mix every token with the one before in its document (SmearGate, PR #162)"
    )
    train_input_features: bool = knob(True, "0: both stay as initialised (PR #605)")
    ve_enabled: bool = knob(False, "a second embedding, added to the values of VE_LAYERS (PR #414)")
    ve_dim: int = knob(128, "its width", 1)
    ve_layers: str = knob("9,10", "layers, from 0")
    # Optimisers
    tied_embed_lr: float = knob(0.03, "AdamW rate of the embedding")
    scalar_lr: float = knob(0.02, "AdamW rate of scales, gains, gates and lambdas")
    matrix_lr: float = knob(
        0.026, "Muon rate: spectral norm of an update of a square matrix (PR #1586)"
    )
    muon_momentum: float = knob(0.97, "final momentum", 0, 0.9999)
    muon_momentum_warmup_start: float = knob(0.92, "first momentum", 0, 0.9999)
    muon_momentum_warmup_steps: int = knob(1500, "steps from the first to the final momentum")
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", 1, 20)
    muon_coeffs: str = knob("quintic", "of these; polar has five", choices=("quintic", "polar"))
    muon_row_normalize: bool = knob(True, "rows of the update to unit norm first (MuonEq-R)")
    beta1: float = knob(0.9, "AdamW", 0, 0.9999)
    beta2: float = knob(0.95, "AdamW", 0, 0.99999)
    adam_eps: float = knob(1e-8, "AdamW", 1e-20)
    grad_clip_norm: float = knob(0.3, "norm of the reduced gradient of all parameters; 0: off")
    adam_wd: float = knob(0.02, "decoupled decay of what SCALAR_LR moves")
    muon_wd: float = knob(0.095, "decoupled decay of the banks")
    embed_wd: float = knob(0.085, "decoupled decay of the embedding")
    export_weights: str = knob(
        "ema", "averages, or the last weights", choices=("ema", "swa", "raw")
    )
    ema_decay: float = knob(0.9965, "of the average of all parameters, per step", 0, 0.999999)
    ema_every: int = knob(1, "steps between weights that enter it", 1)
    swa_threshold: float = knob(
        0.2, "swa: the mean of all weights while the rate factor is below (PR #374)", 0, 2
    )
    swa_every: int = knob(50, "steps between weights that enter it", 1)
    late_qat: bool = knob(
        False, "train through the rounding of the banks to MATRIX_BITS, late in the run"
    )
    late_qat_threshold: float = knob(0.15, "from this rate factor on; 2: from the start", 0, 2)
    # Artifact
    gptq_calibration_batches: int = knob(
        16, "training rows for the Hessians, shared out over the ranks", 1
    )
    quantizer: str = knob(
        "allocated",
        "steps by what the loss minds; as in PR #1394; without Hessians: #374, #568",
        choices=("allocated", "gptq", "gptq_lite", "int6"),
    )
    clip_floor: float = knob(1.0, "least range of a row's integers, of the two without Hessians")
    tables_fp16: bool = knob(False, "embeddings as fp16, not as integers")
    prune_frac: float = knob(
        0.0, "this share of the weights, the smallest, becomes 0 (PR #568)", 0, 0.99
    )
    artifact_limit_bytes: int = knob(
        LIMIT_BYTES, "code and model: the steps are fitted to it; 0: the clips decide"
    )
    matrix_bits: int = knob(
        6, "integer width of the banks; allocated: most bits a weight, integers being 8 wide", 2, 8
    )
    embed_bits: int = knob(7, "integer width of the embedding (PR #1586); allocated: 8", 2, 8)
    matrix_clip_sigmas: float = knob(
        12.85, "range of the integers in standard deviations of a row", 0.1
    )
    embed_clip_sigmas: float = knob(15.0, "the same for the embedding", 0.1)
    attn_clip_sigmas: float = knob(0.0, "the same for q, k, v, o; 0: MATRIX_CLIP_SIGMAS")
    mlp_clip_sigmas: float = knob(0.0, "the same for the MLP; 0: MATRIX_CLIP_SIGMAS")
    loop_clip_sigmas: float = knob(
        0.0, "the same for looped layers, before the two above; 0: no other than those"
    )
    compressor: str = knob("zstd", "of the codes", choices=COMPRESSORS)
    # Scoring and test-time training
    val_batch_tokens: int = knob(524288, "eight rows of scoring; a row never cuts a window", 16)
    eval_seq_len: int = knob(2048, "longest window of plain and sliding scoring", 2)
    eval_stride: int = knob(64, "tokens scored by each sliding window but the first", 1)
    logit_temperature: float = knob(
        1.0, "logits / it wherever something is scored; to be chosen beforehand", 0.01
    )
    sliding_window_enabled: bool = knob(False, "score with sliding windows as well")
    val_doc_fraction: float = knob(
        1.0, "share of the validation documents, drawn with SEED, for quick looks", 1e-9, 1
    )
    eval_deadline_seconds: float = knob(
        580.0, "from the first scored token; what is left then is scored plainly"
    )
    eval_budget_includes_compile: bool = knob(
        False, "take warm-up of the evaluation off EVAL_DEADLINE_SECONDS"
    )
    ttt_enabled: bool = knob(True, "learn from what is scored, score first")
    ttt_mode: str = knob(
        "document", "a LoRA per document, or SGD chunk by chunk", choices=("document", "chunk")
    )
    ttt_fast: bool = knob(
        True, "0: the published way, to compare: whole windows, all logits, fixed batches"
    )
    ttt_buckets: int = knob(
        10, "window lengths that are compiled, others padded to them; 0: every length", 0, 64
    )
    ttt_cuda_graph: bool = knob(
        False, "a CUDA graph per shape of a window; most are captured within the clock"
    )
    ttt_lora_rank: int = knob(96, "rank of every adapter", 1)
    ttt_lora_alpha: float = knob(
        0.0, "adapters times TTT_LORA_ALPHA / TTT_LORA_RANK (PR #1767); 0: times 1"
    )
    ttt_lora_lr: float = knob(1e-4, "rate of the adapters")
    ttt_lm_rank: int = knob(0, "of the head's; 0: TTT_LORA_RANK")
    ttt_bias_tune: bool = knob(False, "learn a vector to add after every layer, too (PR #596)")
    ttt_lr_factors: str = knob("", "of TTT_LORA_LR, as in q:0.5,v:1.5,head:2,bias:3 (PR #596)")
    ttt_cosine_chunks: int = knob(
        0, "chunks of a document in which it falls on a cosine to a tenth; 0: it stays"
    )
    ttt_min_doc_len: int = knob(0, "learn nothing before this place in a document")
    ttt_max_doc_len: int = knob(0, "nor after this one; 0: none")
    ttt_warm_start_a: bool = knob(
        False, "keep A from earlier documents (PR #1767): stream order, fixed schedule"
    )
    ttt_chunk_size: int = knob(48, "tokens scored, then learnt from, at once (PR #1560)", 1)
    ttt_short_chunks: str = knob(
        "", "smaller chunks up to a position in a document, as in 256:8,2000:24 (PR #2014)"
    )
    ttt_eval_seq_len: int = knob(2048, "longest window", 2)
    ttt_batch_size: int = knob(
        64, "documents at once on a rank; fast: four times as many short, a quarter long", 1
    )
    ttt_grad_steps: int = knob(1, "updates per scored chunk", 1)
    ttt_weight_decay: float = knob(0.5, "decoupled")
    ttt_beta1: float = knob(0.0, "AdamW; momentum with sgd", 0, 0.9999)
    ttt_beta2: float = knob(0.999, "AdamW", 0, 0.99999)
    ttt_q_lora: bool = knob(True, "adapter on queries")
    ttt_k_lora: bool = knob(True, "adapter on keys")
    ttt_v_lora: bool = knob(True, "adapter on values")
    ttt_mlp_lora: bool = knob(True, "adapter beside the MLP")
    ttt_o_lora: bool = knob(True, "adapter beside the attention output")
    ttt_optimizer: str = knob("adam", "AdamW or SGD", choices=("adam", "sgd"))
    phased_ttt_num_phases: int = knob(
        0, "SGD of all weights on the documents before each of so many places (PR #1626)"
    )
    phased_ttt_prefix_docs: int = knob(
        2000, "the last of these places, in documents of the stream", 1
    )
    ttt_chunk_optimizer: str = knob(
        "sgd", "the same: or AdamW, to repeat PR #473", choices=("sgd", "adam")
    )
    ttt_lr: float = knob(
        0.002, "SGD of all weights: first rate of a cosine over its chunks (PR #461)"
    )
    ttt_momentum: float = knob(0.9, "the same: momentum", 0, 0.9999)
    ttt_epochs: int = knob(1, "the same: passes over a chunk that has been scored (PR #1413: 3)", 1)
    ttt_chunk_tokens: int = knob(32768, "the same: tokens of a chunk", 2)
    ttt_batch_seqs: int = knob(32, "the same: rows of EVAL_SEQ_LEN tokens per rank and step", 1)
    ttt_grad_clip: float = knob(1.0, "the same: norm of the gradient of all weights; 0: off")
    ttt_freeze_blocks: int = knob(0, "the same: layers from the bottom that stay as they are")
    dtype = property(lambda c: torch.bfloat16 if c.compute_dtype == "bf16" else torch.float32)
    head_dim = property(lambda c: c.model_dim // c.num_heads)
    mlp_dim = property(lambda c: int(c.mlp_mult * c.model_dim))
    wallclock = property(lambda c: c.max_wallclock_seconds or math.inf)
    rows_per_step = property(lambda c: c.train_batch_tokens // c.micro_batch_tokens)
    plans = cached_property(lambda c: (layer_plan(c, looped=False), layer_plan(c, looped=True)))
    no_hessians = property(lambda c: c.quantizer in ("gptq_lite", "int6"))
    lora_scale = property(lambda c: c.ttt_lora_alpha / c.ttt_lora_rank if c.ttt_lora_alpha else 1.0)
    adapter_rate_factors = property(
        lambda c: dict(pair.split(":") for pair in c.ttt_lr_factors.split(",") if pair)
    )
    value_embedding_layers = property(
        lambda c: [int(n) for n in re.findall(r"\d+", c.ve_layers) if c.ve_enabled]
    )
    short_chunks = property(
        lambda c: sorted(  # (position in a document, size of the chunks up to it)
            tuple(map(int, pair.split(":"))) for pair in c.ttt_short_chunks.split(",") if pair
        )
    )
    dataset_dir = property(
        lambda c: Path(c.data_dir) / "datasets" / (c.dataset or f"fineweb10B_sp{c.vocab_size}")
    )
    row_shape = property(lambda c: (c.micro_batch_tokens, c.cu_seqlens_capacity, c.train_seq_len))
    val_row_shape = property(
        lambda c: (
            c.val_batch_tokens // 8,
            c.val_batch_tokens // min(512, 2 * c.eval_seq_len),
            c.eval_seq_len,
        )
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str], has_cuda: bool) -> tuple[Config, dict[str, str]]:
        """The config of `environ`, and each field's origin: default, preset or env. UsageError names every problem."""
        fields, problems, given = {f.name.upper(): f for f in dataclasses.fields(cls)}, [], environ
        environ = {
            ALIASES.get(name, name): text
            for name, text in sorted(given.items(), key=lambda i: i[0] in fields)
        }
        for name in sorted(environ.keys() - fields.keys()):
            if name in REJECTED_NAMES:
                problems.append(
                    f"{name}={environ[name]}: not a knob of this program; {REJECTED_NAMES[name]}"
                )
            elif near := difflib.get_close_matches(name, fields, n=1, cutoff=0.85):
                problems.append(f"{name}={environ[name]}: not a knob; did you mean {near[0]}?")
        preset = environ.get("PRESET", "record" if has_cuda else "cpu")
        if preset not in PRESETS:
            raise UsageError(
                "\n".join([*problems, f"PRESET={preset}: must be one of {', '.join(PRESETS)}"])
            )
        values = {**PRESETS[preset], "preset": preset}
        if environ.get("SHRINK") == "1" and preset != "cpu":  # what the preset has not stays off
            values |= {
                f: x for f, x in SHRINK.items() if values.get(f, getattr(cls, f)) or f == "dataset"
            }
            values |= {f: values.get(f, getattr(cls, f)) // 8 for f in SHRUNK_LENGTHS}
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
        for name, other in ALIASES.items():
            if other in given and given.get(name, given[other]) != given[other]:
                problems.append(f"{name}={given[name]}: the same knob as {other}={given[other]}")
        if cfg.warmdown_iters and origin["warmdown_frac"] == "env":
            problems.append(
                f"WARMDOWN_FRAC={cfg.warmdown_frac:g}: not with WARMDOWN_ITERS={cfg.warmdown_iters}"
            )
        if problems := problems + cfg.problems():
            raise UsageError("\n".join(problems))
        return cfg, origin

    def problems(
        self,
    ) -> list[str]:  # values out of range or, if there is none, combinations that cannot work (W7)
        def named(text: str) -> str:  # each variable in the text with its value
            return re.sub(
                r"[A-Z0-9_]{6,}",
                lambda m: f"{m[0]}={getattr(self, m[0].lower(), '')}".rstrip("="),
                text,
            )

        found = []
        for f in dataclasses.fields(self):
            value, lo, hi, choices = (
                getattr(self, f.name),
                *(f.metadata[key] for key in ("lo", "hi", "choices")),
            )
            if (
                value not in choices
                if choices
                else not isinstance(value, str) and not lo <= value <= hi
            ):
                must = f"one of {', '.join(choices)}" if choices else f"{lo:g}..{hi:g}"
                found.append(f"{f.name.upper()}={value}: must be {must}")
        return found or [
            f"{named(name)}: must be {named(must)}"
            for name, ok, must in self.combinations()
            if not ok
        ]

    def combinations(
        self,
    ) -> list[tuple[str, bool, str]]:  # (variable, whether it is fine, what it must be)
        c, loops, row, lanes = (
            self,
            self.num_loops > 0,
            self.micro_batch_tokens,
            self.parallel_start_layer,
        )
        stale, package, at = (
            loops and 0 < lanes <= c.loop_end,
            c.compressor.replace("zstd", "zstandard"),
            Path.cwd(),
        )
        least = CODE_BYTES + sum(math.prod(r.shape) for r in parameter_table(c).values()) // 8
        pushed = any(visit.parallel and visit.push for plan in c.plans for visit in plan)
        room = c.cu_seqlens_capacity - 2 - 2 * -(-row // c.train_seq_len)

        def writable(path: Path, is_file: bool = False) -> bool:  # it, or where it is to be made
            found = next(
                p
                for p in (path, *path.parents)
                if os.path.exists(p) or len(os.fsencode(p.name)) > 251
            )
            return os.access(found, os.W_OK) and found.is_dir() != (is_file and found == path)

        return [
            (
                "RUN_ID",
                re.fullmatch(r"([^./][^/]*)?", c.run_id) is not None
                and writable(at / f"logs/{c.run_id}.txt", is_file=True),
                "a name of a file to write in logs",
            ),
            (
                "CHECKPOINT_EVERY",
                not c.checkpoint_every or c.run_id != "" and not c.eval_only_path,
                "0 without RUN_ID, or with EVAL_ONLY_PATH",
            ),
            (
                "TENSORBOARD_DIR",
                not c.tensorboard_dir
                or importlib.util.find_spec("tensorboard") is not None
                and writable(at / c.tensorboard_dir / c.run_id),
                "empty or a folder to write, with tensorboard installed",
            ),
            ("MODEL_DIM", c.model_dim % (2 * c.num_heads) == 0, "a multiple of 2 * NUM_HEADS"),
            ("NUM_KV_HEADS", c.num_heads % c.num_kv_heads == 0, "a divisor of NUM_HEADS"),
            (
                "ROPE_TRAIN_SEQ_LEN",
                not c.rope_train_seq_len or (c.rope_dims or c.head_dim) > 2,
                "0 with two ROPE_DIMS",
            ),
            (
                "ROPE_DIMS",
                c.rope_dims % 2 == 0 and c.rope_dims <= c.head_dim,
                f"even and at most {c.head_dim}",
            ),
            ("MLP_MULT", c.mlp_dim >= 1, "enough for one hidden unit at MODEL_DIM"),
            ("XSA_LAST_N", c.xsa_last_n <= c.num_layers, "at most NUM_LAYERS"),
            ("BRANCH_SCALE", not (c.branch_scale and c.ln_scale), "0 with LN_SCALE"),
            ("BIGRAM_VOCAB_SIZE", c.bigram_vocab_size != 1, "0, or at least 2"),
            (
                "VE_LAYERS",
                not c.ve_enabled
                or re.fullmatch(r"\d+(,\d+)*", c.ve_layers) is not None
                and len({*c.value_embedding_layers}) == len(c.value_embedding_layers)
                and max(c.value_embedding_layers) < c.num_layers,
                "as in 9,10, below NUM_LAYERS",
            ),
            (
                "LOGIT_SOFTCAP",
                not c.fused_ce or c.logit_softcap <= 75 * min(c.logit_temperature, 1),
                "at most 75, and 75 * LOGIT_TEMPERATURE, with FUSED_CE",
            ),
            ("LOOP_START", not loops or c.loop_start <= c.loop_end, "at most LOOP_END"),
            ("LOOP_END", not loops or c.loop_end < c.num_layers, "below NUM_LAYERS"),
            (
                "NUM_LOOPS",
                c.num_layers * (1 + c.num_loops) <= 1024,
                "at most 1024 / NUM_LAYERS - 1",
            ),
            (
                "MODEL_DIM",
                sum(stream_sizes(c)) <= 1 << 27,
                "smaller: an artifact unpacks to 134217728 bytes at most",
            ),
            (
                "PARALLEL_START_LAYER",
                not stale,
                "0 or above LOOP_END: later passes would work on stale lanes",
            ),
            ("PARALLEL_START_LAYER", lanes < c.num_layers, "below NUM_LAYERS"),
            ("PARALLEL_START_LAYER", stale or not pushed, "in the decoder half of the layers"),
            (
                "TRAIN_BATCH_TOKENS",
                c.train_batch_tokens % row == 0,
                "a multiple of MICRO_BATCH_TOKENS",
            ),
            ("TRAIN_SEQ_LEN", c.train_seq_len <= row, "at most MICRO_BATCH_TOKENS"),
            (
                "TRAIN_SEQ_LEN",
                c.data_loader != "shuffled" or row % c.train_seq_len == 0,
                "a divisor of MICRO_BATCH_TOKENS with DATA_LOADER",
            ),
            (
                "CU_SEQLENS_CAPACITY",
                room >= 0,
                "at least 2 + 2 * MICRO_BATCH_TOKENS / TRAIN_SEQ_LEN",
            ),
            (
                "VAL_BATCH_TOKENS",
                c.val_batch_tokens >= 8 * c.eval_seq_len,
                "at least 8 * EVAL_SEQ_LEN",
            ),
            ("EVAL_STRIDE", c.eval_stride <= c.eval_seq_len, "at most EVAL_SEQ_LEN"),
            ("TTT_CHUNK_SIZE", c.ttt_chunk_size <= c.ttt_eval_seq_len, "at most TTT_EVAL_SEQ_LEN"),
            (
                "MUON_BACKEND_STEPS",
                c.muon_backend_steps <= len(MUON_COEFFS[c.muon_coeffs]),
                "up to 5 with MUON_COEFFS",
            ),
            (
                "RECOMPILE_LIMIT",
                c.recompile_limit < 0 or c.warmup_steps > 0,
                "-1 with WARMUP_STEPS",
            ),
            (
                "TTT_SHORT_CHUNKS",
                re.fullmatch(r"(\d+:[1-9]\d*(,|$))*", c.ttt_short_chunks) is not None
                and max([size for _, size in c.short_chunks], default=1) <= c.ttt_eval_seq_len,
                "position:size,.. with sizes up to TTT_EVAL_SEQ_LEN",
            ),
            (
                "TTT_LR_FACTORS",
                re.fullmatch(r"((q|k|v|o|mlp|head|bias):\d*\.?\d+(,|$))*", c.ttt_lr_factors)
                is not None,
                "site:factor,.. of q, k, v, o, mlp, head, bias",
            ),
            (
                "TTT_MAX_DOC_LEN",
                not c.ttt_max_doc_len or c.ttt_max_doc_len > c.ttt_min_doc_len,
                "0 or above TTT_MIN_DOC_LEN",
            ),
            (
                "TTT_MODE",
                c.ttt_mode != "chunk" or not c.phased_ttt_num_phases,
                "document for PHASED_TTT_NUM_PHASES",
            ),
            (
                "TTT_EPOCHS",
                c.ttt_epochs == 1 or c.ttt_mode == "chunk" or c.phased_ttt_num_phases > 0,
                "1 with TTT_MODE=document: a document is learnt from once (ruling on PR #605)",
            ),
            ("TTT_CHUNK_TOKENS", c.ttt_chunk_tokens >= c.eval_seq_len, "at least EVAL_SEQ_LEN"),
            ("TTT_FREEZE_BLOCKS", c.ttt_freeze_blocks <= c.num_layers, "at most NUM_LAYERS"),
            (
                "GPTQ_RESERVE_SECONDS",
                c.eval_only_path != "" or 2 * c.gptq_reserve_seconds <= c.wallclock,
                "at most half of MAX_WALLCLOCK_SECONDS",
            ),
            (
                "COMPRESSOR",
                package == "ans" or importlib.util.find_spec(package) is not None,
                f"ans, lzma, or {package} must be installed",
            ),
            (
                "ARTIFACT_LIMIT_BYTES",
                not 0 < c.artifact_limit_bytes < least or c.eval_only_path != "",
                f"0 or at least {least}, code and one bit a weight; or lower MODEL_DIM, MLP_MULT, NUM_LAYERS",
            ),
            (
                "ARTIFACT_DIR",
                writable(at / (c.artifact_dir or f"runs/{c.run_id}")),
                "a folder that can be written",
            ),
        ]

    def warnings(self) -> list[str]:  # what others have tried and regretted
        c, chunks = (
            self,
            self.ttt_enabled and (self.ttt_mode == "chunk" or self.phased_ttt_num_phases > 0),
        )
        return [
            text
            for applies, text in [
                (
                    chunks and c.ttt_chunk_optimizer == "adam",
                    "TTT_CHUNK_OPTIMIZER=adam overfits the chunk: 1.1598 bpb, SGD "
                    "1.1220 (PR #473); 1.0825 became 1.1885 (PR #1947)",
                ),
                (
                    chunks and c.ttt_epochs > 3,
                    f"TTT_EPOCHS={c.ttt_epochs}: gains end near 1.1202 bpb, and only 3 fit into "
                    "600 s on 8xH100 (PR #473); from 3 to 30 they gave 0.002 (PR #526)",
                ),
                (
                    chunks and c.ttt_freeze_blocks > 0 and c.ttt_epochs <= 3,
                    f"TTT_FREEZE_BLOCKS={c.ttt_freeze_blocks}: with few epochs, none frozen was best (PR #473, #549)",
                ),
                (
                    chunks and c.late_qat,
                    "LATE_QAT=1 hurt under test-time training of all weights (PR #398)",
                ),
                (
                    chunks and c.quantizer == "gptq" and not c.num_loops,
                    "QUANTIZER=gptq: SGD by chunks gained nothing on "
                    "such a model (1.12075, before 1.12070: PR #533)",
                ),
                (
                    c.export_weights == "swa" and c.swa_threshold > 0.2,
                    f"SWA_THRESHOLD={c.swa_threshold:g}: an average from 0.5 on hurt, from 0.2 on it cost nothing (PR #374)",
                ),
                (
                    c.compile and c.num_loops > 0 and not c.warmup_steps,
                    "WARMUP_STEPS=0: loops and compilation in the clock "
                    "left 1440 steps of 600 s to a port (remark in PR #1530)",
                ),
                (
                    c.loop_clip_sigmas > 0,
                    f"LOOP_CLIP_SIGMAS={c.loop_clip_sigmas:g}: no gain was ever given (PR #1530)",
                ),
                (
                    c.logit_temperature != 1,
                    f"LOGIT_TEMPERATURE={c.logit_temperature:g}: legal only if chosen without a "
                    "look at validation scores (issue #1017; PR #605 was refused)",
                ),
            ]
            if applies
        ]


# The network: a model file decides these, not the environment. Of the first group it holds what is not the default.
OPTIONAL_NETWORK_FIELDS = """leaky_slope branch_scale rope_train_seq_len bigram_vocab_size bigram_dim smear_enabled ve_enabled
    ve_dim ve_layers tables_fp16""".split()
NETWORK_FIELDS = (
    """vocab_size num_layers model_dim num_heads num_kv_heads mlp_mult xsa_last_n skip_gates_enabled
    rope_base rope_dims logit_softcap ln_scale num_loops loop_start loop_end parallel_start_layer parallel_final_lane
    data_loader""".split()
    + OPTIONAL_NETWORK_FIELDS
)


def network_config(cfg: Config) -> dict[str, Any]:  # as a file holds it
    return {
        f: getattr(cfg, f)
        for f in NETWORK_FIELDS
        if f not in OPTIONAL_NETWORK_FIELDS or getattr(cfg, f) != getattr(Config, f)
    }


def read_network_config(
    config: Mapping[str, Any],
) -> dict[str, Any]:  # all fields of what a file holds; KeyError
    return {
        f: config.get(f, getattr(Config, f)) if f in OPTIONAL_NETWORK_FIELDS else config[f]
        for f in NETWORK_FIELDS
    }


# What a checkpoint does not depend on.
FREE_FIELDS = "run_id artifact_dir checkpoint_every tensorboard_dir train_log_every data_dir tokenizer_path".split()
# Knobs of the published scripts that are none here, and why.
REJECTED_NAMES = {
    "ROPE_YARN": "ROPE_TRAIN_SEQ_LEN alone decides",
    "MLP_HIDDEN": "set MLP_MULT",
    "DATA_PATH": "set DATA_DIR, DATASET",
    "QAT_ENABLED": "set LATE_QAT=1 LATE_QAT_THRESHOLD=2",
    "TTT_TEMP_RESCALE": "a factor on the nats is no probability "
    "(ruling on PR #605); LOGIT_TEMPERATURE keeps a sum of 1",
    "TTT_MIN_NLL": "the best of several passes is chosen by the answer (ruling on PR #605)",
    "TTT_COSINE_LR": "a fall as long as the document tells where it ends; set TTT_COSINE_CHUNKS",
    **dict.fromkeys(("EMA_ENABLED", "SWA_ENABLED", "LAWA_ENABLED"), "set EXPORT_WEIGHTS"),
    **dict.fromkeys(
        ("EMBEDDING_DIM", "TIE_EMBEDDINGS", "EMBED_LR", "HEAD_LR"), "the head is the embedding"
    ),
    **dict.fromkeys(
        (
            "MUON_BETA2",
            "CONTROL_TENSOR_NAME_PATTERNS",
            "TTT_EVAL_BATCHES",
            "TTT_OUTPUT_DIR",
            "TTT_DEBUG_BYPASS",
        ),
        "it was dead, or for debugging",
    ),
}
ALIASES = {
    "VAL_BATCH_SIZE": "VAL_BATCH_TOKENS",
    "TTT_MAX_EVAL_SECS": "EVAL_DEADLINE_SECONDS",
}  # spellings of others
ALIASES |= {
    f"GLOBAL_TTT_{x}": f"TTT_{x}"
    for x in "LR EPOCHS CHUNK_TOKENS MOMENTUM BATCH_SEQS GRAD_CLIP".split()
}
PR1530 = dict(
    warmdown_frac=0.72,
    min_lr=0.0,
    matrix_lr=0.022,
    gptq_reserve_seconds=13.0,
    embed_bits=8,
    embed_clip_sigmas=20.0,
    compressor="brotli",
    ttt_chunk_size=32,
    gptq_calibration_batches=64,
    quantizer="gptq",
    artifact_limit_bytes=0,
)
PR1560 = dict(PR1530, warmdown_frac=0.75, ttt_chunk_size=48)
SEED_SYSTEMS = dict(  # what the systems before have in common
    PR1530,
    parallel_start_layer=0,
    muon_momentum=0.99,
    matrix_lr=0.02,
    sliding_window_enabled=True,
    ttt_mode="chunk",
    ttt_epochs=3,
)
PR1413 = dict(
    SEED_SYSTEMS,
    data_loader="shuffled",
    loop_start=4,
    enable_looping_at=0.5,
    muon_wd=0.085,
    ema_decay=0.997,
    warmdown_frac=0.667,
    gptq_reserve_seconds=12.0,
    ttt_lr=0.005,
)
OLDER_SYSTEMS = dict(
    SEED_SYSTEMS,
    vocab_size=1024,
    data_loader="rows",
    num_loops=0,
    mlp_mult=3.0,
    leaky_slope=0.0,
    skip_gates_enabled=False,
    qk_gain_init=1.5,
    rope_train_seq_len=1024,
    smear_enabled=True,
    muon_row_normalize=False,
    muon_wd=0.04,
    adam_wd=0.04,
    embed_wd=0.04,
    warmdown_iters=3500,
    gptq_reserve_seconds=-1.0,
)
PR473 = dict(
    OLDER_SYSTEMS,
    iterations=9000,
    bigram_vocab_size=3072,
    ve_enabled=True,
    xsa_last_n=4,
    tied_embed_lr=0.035,
    matrix_lr=0.025,
    scalar_lr=0.025,
    ema_decay=0.997,
    quantizer="gptq_lite",
    compressor="lzma",
)
PR605 = dict(  # the legal form: one pass, scored first
    OLDER_SYSTEMS,
    train_seq_len=1024,
    bigram_vocab_size=2048,
    train_input_features=False,
    xsa_last_n=0,
    ln_scale=False,
    branch_scale=True,
    rope_dims=0,
    rope_base=50000.0,
    warmdown_iters=3000,
    ema_decay=0.999,
    ema_every=10,
    export_weights="swa",
    quantizer="int6",
    prune_frac=0.04,
    tables_fp16=True,
    compressor="zstd",
    sliding_window_enabled=False,
    ttt_mode="document",
    ttt_epochs=1,
    ttt_lora_rank=8,
    ttt_lm_rank=16,
    ttt_k_lora=False,
    ttt_mlp_lora=False,
    ttt_o_lora=False,
    ttt_bias_tune=True,
    ttt_lora_lr=0.01,
    ttt_cosine_chunks=8,
    ttt_lr_factors="q:0.5,v:1.5,head:2,bias:3",
    ttt_beta1=0.9,
    ttt_beta2=0.95,
    ttt_weight_decay=0.0,
    ttt_chunk_size=256,
    ttt_eval_seq_len=1024,
    ttt_min_doc_len=512,
    eval_deadline_seconds=550.0,
)
CPU = dict(
    dataset="pydocs_sp1024",
    vocab_size=1024,
    compile=False,
    num_layers=6,
    model_dim=192,
    num_heads=3,
    num_kv_heads=1,
    mlp_mult=3.0,
    xsa_last_n=6,
    num_loops=1,
    loop_start=2,
    loop_end=3,
    enable_looping_at=0.8,
    parallel_start_layer=4,
    max_wallclock_seconds=125.0,
    train_batch_tokens=2048,
    micro_batch_tokens=2048,
    train_seq_len=512,
    cu_seqlens_capacity=64,
    train_log_every=0,
    val_loss_every=0,
    matrix_lr=0.03,
    muon_momentum=0.95,
    muon_momentum_warmup_start=0.85,
    muon_momentum_warmup_steps=100,
    ema_decay=0.98,
    val_batch_tokens=65536,
    eval_seq_len=512,
    ttt_lora_rank=8,
    ttt_lora_lr=3e-3,
    ttt_chunk_size=128,
    ttt_eval_seq_len=512,
    ttt_batch_size=16,
    ttt_buckets=0,
    ttt_chunk_tokens=4096,
)
PRESETS = dict(
    record={}, pr1530=PR1530, pr1560=PR1560, pr1413=PR1413, pr473=PR473, pr605=PR605, cpu=CPU
)
SHRINK = {
    f: CPU[f]
    for f in """dataset vocab_size compile train_batch_tokens micro_batch_tokens ema_decay muon_momentum
    muon_momentum_warmup_start muon_momentum_warmup_steps val_batch_tokens ttt_lora_rank ttt_batch_size ttt_buckets
    ttt_chunk_tokens""".split()
}
SHRINK |= dict(
    model_dim=128,
    num_heads=4,
    num_kv_heads=2,
    bigram_vocab_size=512,
    bigram_dim=32,
    ve_dim=32,
    ttt_lora_lr=3e-3,
    max_wallclock_seconds=40.0,
    gptq_reserve_seconds=-1.0,
    gptq_calibration_batches=16,
    warmdown_iters=200,
    cu_seqlens_capacity=128,
    swa_every=5,
    eval_stride=128,
    ttt_chunk_size=32,
    ttt_epochs=1,
)
SHRUNK_LENGTHS = (
    "train_seq_len",
    "eval_seq_len",
    "ttt_eval_seq_len",
    "rope_train_seq_len",
    "ttt_min_doc_len",
)  # an eighth


def print_knobs() -> None:  # variable, default per preset, meaning
    print(f"{'variable':28}" + "".join(f"{p:>14}" for p in PRESETS) + "  meaning")
    for f in dataclasses.fields(Config):
        values = [PRESETS[p].get(f.name, f.default) if f.name != "preset" else p for p in PRESETS]
        cells = [
            f" {v:>13g}" if isinstance(v, (int, float)) else f" {v or '-':>13}" for v in values
        ]
        print(
            f"{f.name.upper():28}{''.join(cells)}  {f.metadata['doc']} {' | '.join(f.metadata['choices'])}"
        )


# === 2. Runtime: ranks, log, clock ====================================================================================
class PendingRead:
    """Numbers (n,) on their way from the device to the host."""

    def __init__(self, values: Tensor, ranks: Ranks):
        self.copied = None
        if values.is_cuda:
            self.host = values.to("cpu", non_blocking=True)  # pinned: returns at once
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self.host = values
            self.time = ranks.now()

    def wait(self) -> tuple[list[float], float]:
        """Waits for these numbers alone; returns them and when they were there, on the steady clock."""
        if self.copied is not None:
            self.copied.synchronize()
            self.time = time.monotonic()
        return self.host.tolist(), self.time


class Ranks:  # this process among its peers: all ranks must call a method together; on one rank it is the identity
    def __init__(self, environ: Mapping[str, str]):
        self.rank, self.distributed, self.queues = int(environ.get("RANK", 0)), "RANK" in environ, 0
        self.world_size = (
            int(environ.get("WORLD_SIZE", 1)) if self.distributed else 1
        )  # clusters may set it alone
        self.is_main = self.rank == 0
        self.live = (
            self.is_main and sys.stdout.isatty() and "CI" not in environ
        )  # whether someone may be looking on
        cuda, local = torch.cuda.is_available(), int(environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.distributed:
            importlib.import_module(
                "torch.distributed.nn"
            )  # later, its defaults would keep the group's threads alive
            store, rank, size = next(
                dist.rendezvous("env://")
            )  # torchrun keeps it over restarts, old keys and all
            store = dist.PrefixStore(f"start {environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend, device = ("nccl", self.device) if cuda else ("gloo", None)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, device_id=device
            )

    def sum(self, t: Tensor) -> Tensor:  # in place
        if self.distributed:
            dist.all_reduce(t)
        return t

    def gather(self, value: Any) -> list[Any]:  # every rank's, in rank order
        values = [value] * self.world_size
        if self.distributed:
            dist.all_gather_object(values, value)
        return values

    def alone(self) -> Ranks:  # this rank as if it were the only one
        other = copy.copy(self)
        other.rank, other.world_size, other.distributed = 0, 1, False
        return other

    def tickets(
        self,
    ) -> Iterator[int]:  # 0, 1, 2, .. of a new counter; each goes to the rank that asks first (W49)
        self.queues += 1
        store = dist.distributed_c10d._get_default_store() if self.distributed else dist.HashStore()
        while True:
            yield store.add(f"train_gpt/queue{self.queues}", 1) - 1

    def now(self) -> float:  # seconds on a steady clock, once the device has done all it was given
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def start_read(self, values: Tensor) -> PendingRead:
        """Starts copying numbers (n,) to the host without blocking."""
        return PendingRead(values, self)


class Log:  # lines for people on rank 0: to the terminal and to a file; `live`: also one that is rewritten in place
    def __init__(self, path: Path, is_main: bool, live: bool = False, board: Any = ""):
        self.last, self.shown, self.is_main, self.live, self.board = (
            time.monotonic(),
            0.0,
            is_main,
            live,
            board,
        )
        self.prefix = ""
        if is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():  # a killed run may have left half a line
                os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
            self.file = path.open("a", encoding="utf-8")

    def __call__(self, line: str, terminal: bool = True) -> None:
        self.last = time.monotonic()
        for file in [self.file, sys.stdout][: 1 + terminal] if self.is_main else []:
            print(
                "\r\033[K" * (self.live and file is sys.stdout) + self.prefix + line,
                file=file,
                flush=True,
            )

    def due(self) -> bool:  # whether the last line is 8 s ago: a long loop shows that it is alive
        return time.monotonic() - self.last > 8

    def show(
        self, line: str, rest: float = 0.0
    ) -> None:  # unless the last one is not `rest` seconds ago
        if self.live and time.monotonic() - self.shown >= rest:
            self.shown = time.monotonic()
            print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def scalars(self, step: int, values: dict[str, float]) -> None:  # for TensorBoard
        if self.is_main and self.board and isinstance(self.board, str):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(
                self.board, purge_step=step
            )  # what is there from later steps was lost
        for name, value in values.items() if self.is_main and self.board else ():
            self.board.add_scalar(name, value, step)


def raise_stopped(
    number: int, _: Any = None, after: str = ""
) -> None:  # exit status as a shell has it
    raise KeyboardInterrupt(
        f"{signal.Signals(number).name}: the run is stopped{after}", 128 + number
    )


def handle_signals(
    act: Callable[[int, Any], Any],
) -> None:  # `stop` wherever it comes, in training after a step
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, act)


class CompilationCounter:  # counts graphs and kernels compiled since it was made, and logs why
    def __init__(self, log: Callable[[str], None]):
        self.log, self.count, self.found = log, 0, []
        torch._dynamo.utils.clear_compilation_metrics()
        if triton is not None:
            triton.knobs.runtime.jit_post_compile_hook = lambda **about: self.found.append(
                f"kernel {about['repr']}"
            )

    def poll(self) -> int:
        graphs = [
            m for m in torch._dynamo.utils.get_compilation_metrics() if m.is_forward
        ]  # or it counts twice
        torch._dynamo.utils.clear_compilation_metrics()
        self.found += [f"{m.co_name}: {m.recompile_reason or 'its first graph'}" for m in graphs]
        self.count += len(self.found)
        while self.found:
            self.log(f"recompilation: {self.found.pop(0)}")
        return self.count


def write_atomic(
    path: Path, data: bytes
) -> None:  # afterwards `path` holds all of it or is untouched
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


# === 3. Data: shards of uint16 tokens -> rows of packed documents =====================================================
SHARD_HEADER = [20240520, 1]  # magic, version; then the token count; 256 int32 in all


def write_shard(
    path: Path, tokens: np.ndarray
) -> None:  # header of 1024 bytes, ids (n,) as uint16; little-endian
    header = np.array([*SHARD_HEADER, len(tokens)] + [0] * 253, dtype="<i4")
    write_atomic(path, header.tobytes() + np.ascontiguousarray(tokens, dtype="<u2").tobytes())


def read_shard(
    path: Path,
) -> np.ndarray:  # memory-mapped uint16 (n,); UsageError if foreign, newer, cut or empty
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
            raise UsageError(
                f"{folder}: holds no *_{split}_*.bin; run tools/prepare_data.py or set DATASET, DATA_DIR"
            )
        self.shards = [read_shard(p) for p in self.paths]
        self.starts = np.cumsum([0] + [len(s) for s in self.shards])
        self.size = int(self.starts[-1])

    def read(
        self, start: int, count: int
    ) -> np.ndarray:  # ids int64 from `start` on, again from 0 past the end
        parts = []
        while count > 0:
            i = int(np.searchsorted(self.starts, start % self.size, side="right")) - 1
            parts.append(self.shards[i][start % self.size - self.starts[i] :][:count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts).astype(np.int64)


class Batch(
    NamedTuple
):  # a row of segments end to end; attention stays within one, positions count from its start
    inputs: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64; -1 where nothing is predicted
    cu_seqlens: Tensor  # (capacity + 1,) int32: segment starts, then T in every unused entry
    max_seqlen: int  # bound on the length of a segment, constant over batches so that it compiles once (W26)


def pack_row(
    inputs: np.ndarray, targets: np.ndarray, starts: np.ndarray, shape: tuple, device: torch.device
) -> Batch:
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
    piece = np.arange(pieces.sum()) - np.repeat(
        np.cumsum(pieces) - pieces, pieces
    )  # 0, 1, .. within each document
    return np.repeat(documents, pieces) + piece * max_seqlen


class PackedLoader:
    """Rows of the stream in order, each transition once an epoch (W13). All ranks walk over all rows and build every
    W-th, so the world size changes no step. A row takes MICRO_BATCH_TOKENS tokens, or what the capacity allows. With
    DATA_LOADER=shuffled (PR #1394) an epoch takes pieces of TRAIN_SEQ_LEN tokens, from a random one on, at random."""

    def __init__(self, stream: TokenStream, bos_id: int, cfg: Config, ranks: Ranks):
        self.stream, self.cfg, self.ranks, self.cursor = stream, cfg, ranks, 0
        self.bos_id = bos_id if cfg.data_loader == "documents" else -1
        self.order = -1, 0, np.arange(0)  # of the pieces: epoch, first place, permutation

    def read(
        self, count: int
    ) -> tuple[np.ndarray, np.ndarray]:  # inputs and targets (count,) from the cursor on
        if self.cfg.data_loader != "shuffled":
            tokens = self.stream.read(self.cursor, count + 1)
            return tokens[:-1], tokens[1:]
        length, pieces = self.cfg.train_seq_len, []
        for number in range(self.cursor // length, (self.cursor + count) // length):
            epoch, number = divmod(number, (self.stream.size - 1) // length)
            if epoch != self.order[0]:
                rng = np.random.Generator(np.random.PCG64([self.cfg.seed, epoch]))
                self.order = (
                    epoch,
                    rng.integers(length),
                    rng.permutation((self.stream.size - 1) // length),
                )
            pieces.append(
                self.stream.read(int(self.order[1] + self.order[2][number] * length), length + 1)
            )
        return np.concatenate([x[:-1] for x in pieces]), np.concatenate([x[1:] for x in pieces])

    def rows(
        self, count: int
    ) -> tuple[list[Batch], int]:  # this rank's of the next rows, and the targets in them all
        mine, first, (size, capacity, max_seqlen) = [], self.cursor, self.cfg.row_shape
        for row in range(count):
            (tokens, targets), n = self.read(size), size
            starts = segment_starts(tokens, self.bos_id, max_seqlen)
            if len(starts) > capacity:  # leave room for the segments of the padding
                starts, n = starts[: capacity // 2], int(starts[capacity // 2])
            if row % self.ranks.world_size == self.ranks.rank:
                mine.append(
                    pack_row(tokens[:n], targets[:n], starts, self.cfg.row_shape, self.ranks.device)
                )
            self.cursor += n
        return mine, self.cursor - first

    def steps(
        self,
    ) -> Iterator[tuple[list[Batch], int]]:  # `rows` of each step; a thread prepares the next
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.rows, self.cfg.rows_per_step)
            while True:
                rows, ahead = ahead.result(), pool.submit(self.rows, self.cfg.rows_per_step)
                yield rows


class Documents(
    NamedTuple
):  # targets end with the next one's BOS: all tokens but the first are predicted once (W39)
    tokens: np.ndarray  # (N,) int64
    starts: np.ndarray  # (D,) of each document
    counts: np.ndarray  # (D,) of its targets

    @classmethod
    def load(cls, stream: TokenStream, bos_id: int, cfg: Config) -> Documents:
        tokens = stream.read(0, stream.size)
        starts = np.flatnonzero(tokens == bos_id)
        wanted = max(1, round(cfg.val_doc_fraction * len(starts)))
        sample = sorted(random.Random(cfg.seed).sample(range(len(starts)), wanted))
        docs = cls(tokens, starts[sample], np.diff(starts, append=len(tokens) - 1)[sample])
        if cfg.data_loader == "documents":
            return docs
        return cls(docs.joined_tokens(), np.cumsum(np.append(0, docs.counts[:-1])), docs.counts)

    def joined_tokens(
        self,
    ) -> np.ndarray:  # of these documents alone, end to end, with the target after the last
        spans = [
            (start, start + count) for start, count in zip(self.starts, self.counts, strict=True)
        ]
        return np.concatenate(
            [*(self.tokens[a:b] for a, b in spans), self.tokens[spans[-1][1] :][:1]]
        )

    def target_indices(
        self, stop: int | None = None
    ) -> np.ndarray:  # of all targets of the documents before `stop`, rising
        pairs = zip(self.starts[:stop], self.counts[:stop], strict=True)
        return np.concatenate(
            [np.arange(0), *(np.arange(start, start + count) for start, count in pairs)]
        )


class Tokenizer(NamedTuple):
    path: Path
    model: Any  # SentencePieceProcessor
    bos_id: int
    sha256: str
    manifest: dict[str, Any]  # of the data set; empty if it has none

    @classmethod
    def load(
        cls, cfg: Config
    ) -> Tokenizer:  # UsageError if it is none, of another size, or not the manifest's
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
            raise UsageError(
                f"TOKENIZER_PATH={path}: no SentencePiece model ({str(error).splitlines()[0]})"
            ) from error
        loaded = cls(path, model, model.bos_id(), hashlib.sha256(data).hexdigest(), manifest)
        if model.vocab_size() != cfg.vocab_size:
            raise UsageError(f"VOCAB_SIZE={cfg.vocab_size}: {path} has {model.vocab_size()} pieces")
        if cfg.smear_enabled and loaded.bos_id != BOS_ID:
            raise UsageError(f"SMEAR_ENABLED=1: needs BOS id {BOS_ID}, {path} has {loaded.bos_id}")
        if loaded.bos_id < 0 or model.piece_to_id("\u2581") == model.unk_id():
            raise UsageError(
                f"TOKENIZER_PATH={path}: needs BOS and the bare space mark, or bytes are miscounted"
            )
        if sha256 not in (None, loaded.sha256):
            raise UsageError(f"TOKENIZER_PATH={path}: not the tokenizer that {named} names")
        return loaded


def check_doctor_verdict(
    cfg: Config, tokenizer: Tokenizer
) -> None:  # UsageError if doctor.json, on these files, has an error
    error, files = (
        None,
        [tokenizer.path, *cfg.dataset_dir.glob("*.bin"), *cfg.dataset_dir.glob("manifest.json")],
    )
    with contextlib.suppress(
        OSError, ValueError, LookupError, TypeError
    ):  # no verdict, or none against the data
        verdict = json.loads((cfg.dataset_dir / "doctor.json").read_text())
        if verdict["files"] == {
            p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in files
        }:  # else it is stale
            error = verdict["errors"][0]
    if error:
        raise UsageError(f"{cfg.dataset_dir}: {error}; found by tools/prepare_data.py doctor")


def check_shards(
    cfg: Config, tokenizer: Tokenizer, ranks: Ranks, streams: dict[str, TokenStream]
) -> None:
    """UsageError for what cannot be used of these splits; each rank scans its share of the ids."""
    check_doctor_verdict(cfg, tokenizer)
    known = {
        f["name"]: f["tokens"]
        for s in tokenizer.manifest.get("splits", {}).values()
        for f in s["files"]
    }
    for split, stream in streams.items():
        for i, (path, shard) in enumerate(zip(stream.paths, stream.shards, strict=True)):
            if known and known.get(path.name) != len(shard):
                raise UsageError(
                    f"{path}: holds {len(shard)} tokens, the manifest says {known.get(path.name, 0)}"
                )
            if (
                i % ranks.world_size == ranks.rank
                and (largest := int(shard.max())) >= cfg.vocab_size
            ):
                raise UsageError(f"{path}: holds id {largest}, VOCAB_SIZE={cfg.vocab_size}")
        found = stream.shards[0] == tokenizer.bos_id
        if not found.any() or (split == "val" and not found[0]):
            raise UsageError(
                f"{stream.paths[0]}: no document starts at its beginning (BOS id {tokenizer.bos_id})"
            )
        if split == "train" and stream.size <= cfg.train_batch_tokens:
            raise UsageError(
                f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: the shards hold {stream.size} tokens"
            )


# === 4. Model: banks, the order of layers, one forward for training, calibration, scoring and adaptation ==============
# --- Plain maths ---
MLP_SLOPE = 0.5  # a power of two: both branches, of the activation and of its derivative, are exact before one rounding


def leaky_relu_sq(
    pre: Tensor, slope: float = MLP_SLOPE
) -> Tensor:  # pre^2 above zero, (slope * pre)^2 below
    return F.leaky_relu(pre, slope).square()


NORM_EPS = torch.finfo(torch.float32).eps  # for any dtype


def rms_norm(
    x: Tensor, scale: float = 1.0
) -> Tensor:  # scale * x / sqrt(mean(x^2) + eps) over the last axis
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS) * scale


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:  # RoPE on the first 2 * half dims of x (T, H, D)
    half = cos.size(-1)  # dims j and j + half form a pair
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest], dim=-1)


def remove_own_value(
    y: Tensor, v: Tensor
) -> Tensor:  # XSA: from y (T, H, D), its component along v (T, Hkv, D)
    wide = y.to(torch.promote_types(y.dtype, torch.float32)).unflatten(
        1, (v.size(1), -1)
    )  # (T, Hkv, H / Hkv, D)
    unit = F.normalize(v.to(wide.dtype), dim=-1).unsqueeze(2)  # (T, Hkv, 1, D)
    return (
        torch.addcmul(wide, (wide * unit).sum(-1, keepdim=True), unit, value=-1)
        .flatten(1, 2)
        .to(y.dtype)
    )


# --- Order of layers and table of parameters ---
class Visit(
    NamedTuple
):  # one step of the unrolled depth: which layer runs, which skips it stores or takes
    layer: int
    slot: int  # position in the plan; adapters are kept per slot
    push: bool  # store the output for a later skip
    skip: tuple[
        int, ...
    ]  # rows of skip_weights whose mean scales the skip popped here; empty: none
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
    skips = [(k,) if looped or not rows else rows for k, rows in enumerate(same)] + [()] * (
        len(decoder) - len(pairs)
    )
    first = cfg.parallel_start_layer or cfg.num_layers
    steps = [(i, True, ()) for i in encoder] + [
        (i, False, skip) for i, skip in zip(decoder, skips, strict=True)
    ]
    return tuple(
        Visit(i, slot, push, skip, i >= first) for slot, (i, push, skip) in enumerate(steps)
    )


class Role(NamedTuple):
    """What the rest of the program needs to know of a parameter.

    Names of input sites: "attn_in", "attn_out", "mlp_in" and "mlp_mid" within a layer, "head_in"
    before the head. An embedding table that is only looked up has its own name as its site.
    """

    shape: tuple[int, ...]
    init: float | str  # constant, "orthogonal", "normal", "small" or "first"; see GPT.__init__
    group: str = "scalar"  # optimiser group: "muon", "embed", "scalar" or "fixed"
    packing: str = "float"  # in the artifact: "matrix" or "embed" (integers), "float" (fp16)
    sites: tuple[str, ...] = ()  # input site of each of the equal parts of a bank, or of a table
    is_table: bool = False  # an embedding table, indexed by token or by pair of tokens
    per_layer: bool = False  # the first axis is the layers, `halves` times over
    unread: int = 0  # leading rows that no forward reads; the artifact leaves them out

    @property
    def halves(self) -> int:
        """How many stacks of layers lie end to end along the first axis."""
        return max(1, len(self.sites))


def parameter_table(cfg: Config) -> dict[str, Role]:
    """Every parameter by name, in the order of the artifact. Matrices act as y = x W^T."""
    L, C, V = cfg.num_layers, cfg.model_dim, cfg.vocab_size
    kv = cfg.num_kv_heads * cfg.head_dim
    num_skips = sum(bool(visit.skip) for visit in layer_plan(cfg, looped=True))

    def bank(shape: tuple[int, ...], init: float | str, *sites: str) -> Role:
        return Role(shape, init, "muon", "matrix", sites, per_layer=True)

    def table_of(shape: tuple[int, ...], init: float | str, group: str, site: str) -> Role:
        packing = "float" if cfg.tables_fp16 else "embed"
        return Role(shape, init, group, packing, (site,), is_table=True)

    table = {
        # L queries, then L outputs; the outputs are zero at first.
        "qo_bank": bank((2 * L, C, C), "orthogonal", "attn_in", "attn_out"),
        # L keys, then L values.
        "kv_bank": bank((2 * L, kv, C), "orthogonal", "attn_in", "attn_in"),
        "up_bank": bank((L, cfg.mlp_dim, C), "orthogonal", "mlp_in"),
        "down_bank": bank((L, C, cfg.mlp_dim), 0.0, "mlp_mid"),
        # Table and head at once. The master is fp32: bf16 would lose small updates.
        "tok_emb": table_of((V, C), "normal", "embed", "head_in"),
        "skip_weights": Role((num_skips, C), 1.0),
        "attn_scale": Role((L, C), 1.0, per_layer=True),
        "mlp_scale": Role((L, C), 1.0, per_layer=True),
        "resid_mix": Role((L, 2, C), "first", per_layer=True),  # row 0 for x, row 1 for x0
        "q_gain": Role((L, cfg.num_heads), cfg.qk_gain_init, per_layer=True),
    }
    if cfg.skip_gates_enabled:
        table["skip_gates"] = Role((num_skips, C), 0.0)
    if cfg.parallel_start_layer:
        unread = cfg.parallel_start_layer
        # [layer, source, lane] and [layer, lane]
        table["parallel_post_lambdas"] = Role((L, 2, 2), 1.0, per_layer=True, unread=unread)
        table["parallel_resid_lambdas"] = Role((L, 2), 1.1, per_layer=True, unread=unread)
    inputs = "scalar" if cfg.train_input_features else "fixed"
    if cfg.bigram_vocab_size:  # scale * table[hash of a pair] P^T; zero at first
        shape = (cfg.bigram_vocab_size, cfg.bigram_dim)
        group = "embed" if cfg.train_input_features else "fixed"
        table["bigram_emb"] = table_of(shape, 0.0, group, "bigram_emb")
        table["bigram_proj"] = Role((C, cfg.bigram_dim), "orthogonal", inputs)
        table["bigram_scale"] = Role((1,), 0.05, inputs)
    if cfg.smear_enabled:
        table["smear_gate"] = Role((C,), 0.0, inputs)
    if cfg.ve_enabled:  # scale * layer scale * table[token] P^T
        table["ve_emb"] = table_of((V, cfg.ve_dim), "small", "embed", "ve_emb")
        table["ve_proj"] = Role((kv, cfg.ve_dim), "orthogonal")
        table["ve_scale"] = Role((1,), 0.1)
        table["ve_layer_scales"] = Role((len(cfg.value_embedding_layers),), 1.0)
    return table


LAYER_TENSORS = "qkv o up down attn_scale mlp_scale resid_mix q_gain".split()
LayerWeights = NamedTuple(
    "LayerWeights", [(name, Tensor) for name in LAYER_TENSORS]
)  # of one layer, compute dtype


class PassInfo(NamedTuple):  # what every layer of one forward shares
    batch: Batch
    place: Tensor  # (T,) int64: index in the segment
    rope: Tensor  # fp32 (T, 2, 1, rope_dims / 2): cos, sin at each token's position in its segment
    tap: Callable[[str, int, Tensor], None]  # (site, layer, input of a product): calibration
    lora: LoRA | None
    down: dict[
        tuple[str, int], tuple[Tensor, list[str]]
    ] = {}  # (input, slot) -> A (B, sites * rank, C), sites
    up: dict[tuple[str, int], Tensor] = {}  # (site, slot) -> B (B, out, rank)
    values: Tensor | None = None  # (T, kv) that VE_LAYERS add to theirs

    def lora_in(self, x: Tensor, source: str, slot: int) -> dict[str, Tensor]:
        """x (T, C), T / B tokens per document -> x A^T (B, T / B, rank) of all adapters that read it, in a product."""
        a, sites = self.down.get((source, slot), (x, ()))
        h = (x.unflatten(0, (a.size(0), -1)) @ a.mT).chunk(len(sites), -1) if sites else ()
        return dict(zip(sites, h, strict=True))

    def lora_up(
        self, h: dict[str, Tensor], site: str, slot: int
    ) -> Tensor:  # (T, out): scale * h B^T
        return (h[site] @ (self.up[site, slot] * self.lora.scale).mT).flatten(0, 1)

    def lora_out(
        self, y: Tensor, h: dict[str, Tensor], site: str, slot: int, scale: Tensor
    ) -> Tensor:
        """y (T, out) + h B^T, the columns of the product times `scale` (out,)."""
        if site not in h:
            return y
        b = self.up[site, slot] * scale[:, None]
        return torch.baddbmm(
            y.unflatten(0, (b.size(0), -1)), h[site], b.mT, alpha=self.lora.scale
        ).flatten(0, 1)

    def biased(
        self, x: Tensor, slot: int
    ) -> Tensor:  # x (T, C) and what a document's adapter adds to it
        if self.lora is None or self.lora.bias is None:
            return x
        return (
            x.unflatten(0, (self.lora.bias.size(0), -1)) + self.lora.bias[:, slot, None]
        ).flatten(0, 1)


BOS_ID = 1  # of all tokenizers of the field; SmearGate needs it where rows cross documents


def segment_positions(
    cu_seqlens: Tensor, num_tokens: int
) -> Tensor:  # (T,) int64: each token's index in its segment (W17)
    index = torch.arange(num_tokens, device=cu_seqlens.device)
    return index - cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]


class GPT(
    nn.Module
):  # the network of PR #1530; parameters are fp32, products run in the compute dtype
    def __init__(self, cfg: Config, attention_backend: str = "sdpa"):
        super().__init__()
        self.cfg, self.attention_backend, g = (
            cfg,
            attention_backend,
            torch.Generator().manual_seed(cfg.seed),
        )
        if cfg.late_qat:
            self.register_buffer(
                "qat", torch.zeros(()), persistent=False
            )  # 1: the banks are rounded; see bank
        for name, role in parameter_table(
            cfg
        ).items():  # drawn on the CPU: equal on every rank and device
            weight = torch.full(role.shape, 0.0 if isinstance(role.init, str) else float(role.init))
            if role.init == "orthogonal":
                for matrix in weight.view(-1, *role.shape[-2:]):
                    nn.init.orthogonal_(matrix, generator=g)
            elif role.init in ("normal", "small"):
                std = cfg.tied_embed_init_std if role.init == "normal" else 0.01
                nn.init.normal_(weight, std=std, generator=g)
            elif role.init == "first":
                weight[:, 0] = 1.0
            self.register_parameter(name, nn.Parameter(weight))
        self.qo_bank.data[cfg.num_layers :] = (
            0.0  # like down_bank: every block starts as the identity
        )

    def rotations(
        self, place: Tensor, length: int
    ) -> Tensor:  # cos, sin (T, 2, 1, half) fp32, for segments so long
        dims, short = self.cfg.rope_dims or self.cfg.head_dim, self.cfg.rope_train_seq_len
        base = self.cfg.rope_base * (max(length / short, 1) ** (dims / (dims - 2)) if short else 1)
        half = torch.arange(dims // 2, dtype=torch.float64, device=place.device)
        angles = place[:, None, None] * base ** (-half / (dims // 2))
        return torch.stack([angles.cos(), angles.sin()], 1).float()

    def embed(
        self, info: PassInfo
    ) -> tuple[Tensor, PassInfo]:  # x0 (T, C), and what the tokens add to values
        cfg, ids, dtype = self.cfg, info.batch.inputs, self.cfg.dtype
        x = F.embedding(ids, self.tok_emb.to(dtype))
        if N := cfg.bigram_vocab_size:
            pair = torch.where(
                info.place == 0, N - 1, (36313 * ids ^ 27191 * ids.roll(1)) % (N - 1)
            )
            proj = (self.bigram_scale * self.bigram_proj).to(dtype)
            x = x + F.linear(F.embedding(pair, self.bigram_emb.to(dtype)), proj)
        x = rms_norm(x)
        if cfg.smear_enabled:
            gate, begins = self.smear_gate.sigmoid().to(dtype), (info.place == 0) | (ids == BOS_ID)
            x = (1 - gate) * x + gate * x.roll(1, 0) * ~begins[:, None]
        if cfg.ve_enabled:
            values = F.linear(
                F.embedding(ids, self.ve_emb.to(dtype)), (self.ve_scale * self.ve_proj).to(dtype)
            )
            info = info._replace(values=values)
        return x, info

    def rounded(
        self, on: bool
    ) -> None:  # LATE_QAT in the next forwards: a value in the graph, so nothing compiles
        if self.cfg.late_qat:
            self.qat.fill_(on)

    def bank(
        self, name: str
    ) -> Tensor:  # with LATE_QAT as if rounded, by qat; the gradient passes as it is
        w, cfg = self.get_parameter(name), self.cfg
        if not cfg.late_qat:
            return w
        q, seen = (
            2 ** (cfg.matrix_bits - 1) - 1,
            w.detach().to(cfg.dtype).float(),
        )  # by all ranks: see Muon
        step = (
            seen.abs().amax(-1, keepdim=True).clamp_min(cfg.clip_floor * cfg.no_hessians + 1e-12)
            / q
        )
        return w + self.qat * ((seen / step).round().clamp(-q, q) * step - w.detach())

    def attend(
        self, n: Tensor, w: LayerWeights, visit: Visit, info: PassInfo, keep: slice | Tensor
    ) -> Tensor:
        """Attention of normalised n (T, C); the output (n, C) at the positions `keep`: all, or the last of segments."""
        C, kv, h = (
            n.size(1),
            self.cfg.num_kv_heads * self.cfg.head_dim,
            info.lora_in(n, "attn", visit.slot),
        )
        has_xsa = visit.layer >= self.cfg.num_layers - self.cfg.xsa_last_n

        def heads(
            sites: str, n: Tensor, weight: Tensor, gain: Tensor, rope: Tensor, h: dict
        ) -> tuple[Tensor, ...]:
            x = F.linear(n, weight)
            if set(h) & set(sites):  # added to the row as one: its gradient is then the row's
                x = x + torch.cat(
                    [
                        info.lora_up(h, site, visit.slot)
                        if site in h
                        else x.new_zeros(len(x), C if site == "q" else kv)
                        for site in sites
                    ],
                    -1,
                )
            if (
                info.values is not None
                and "v" in sites
                and visit.layer in self.cfg.value_embedding_layers
            ):
                scale = self.ve_layer_scales[self.cfg.value_embedding_layers.index(visit.layer)].to(
                    n.dtype
                )
                x = x + F.pad(scale * info.values, (x.size(1) - kv, 0))
            return norm_rope(x, gain, rope, self.cfg.head_dim, self.cfg.fused_qk, 1 + has_xsa)

        if isinstance(keep, slice):
            (q, k, v, *own), cu_queries = heads("qkv", n, w.qkv, w.q_gain, info.rope, h), None
        else:  # of queries, only these
            _, k, v, *own = heads("kv", n, w.qkv[C:], w.q_gain[:0], info.rope, h)
            h = {site: x.flatten(0, 1)[keep].unflatten(0, (x.size(0), -1)) for site, x in h.items()}
            q, own = (
                heads("q", n[keep], w.qkv[:C], w.q_gain, info.rope[keep], h)[0],
                [x[keep] for x in own],
            )
            cu_queries = torch.searchsorted(keep, info.batch.cu_seqlens.long(), out_int32=True)
        y = attention(
            q,
            k,
            v,
            info.batch.cu_seqlens,
            info.batch.max_seqlen,
            self.attention_backend,
            cu_queries,
        )
        if has_xsa:
            y = (xsa if self.cfg.fused_xsa else remove_own_value)(y, *own)
        y = y.flatten(1)  # (T, C)
        info.tap("attn_in", visit.layer, n)
        info.tap("attn_out", visit.layer, y)
        return info.lora_out(F.linear(y, w.o), h, "o", visit.slot, w.attn_scale)

    def feed(
        self, n: Tensor, w: LayerWeights, visit: Visit, info: PassInfo
    ) -> Tensor:  # the same for the MLP
        out, post = (fused_mlp if self.cfg.fused_mlp else plain_mlp)(
            n, w.up, w.down, self.cfg.leaky_slope
        )
        info.tap("mlp_in", visit.layer, n)
        info.tap("mlp_mid", visit.layer, post)
        return info.lora_out(
            out, info.lora_in(n, "mlp", visit.slot), "mlp", visit.slot, w.mlp_scale
        )

    def merge_skip(
        self, x: Tensor, skip: Tensor, rows: tuple[int, ...]
    ) -> Tensor:  # a gate of 1 keeps the stream x
        def mean(
            p: Tensor,
        ) -> Tensor:  # uncompiled, a list as an index would be copied from the host each time
            return torch.stack([p[row] for row in rows]).mean(0).to(x.dtype)

        skip = mean(self.skip_weights) * skip
        return (
            torch.lerp(skip, x, mean(self.skip_gates).sigmoid())
            if self.cfg.skip_gates_enabled
            else x + skip
        )

    def layers(self) -> list[LayerWeights]:
        """Weights cast once: q, k, v as one product; scale * (y W^T) = y (diag(scale) W)^T as rows of o and down. The
        adapters beside those need the scales. unbind, because its gradient is one stack and not L padded copies."""
        (q, o), (k, v) = self.bank("qo_bank").chunk(2), self.bank("kv_bank").chunk(2)
        scales = self.attn_scale, self.mlp_scale
        if self.cfg.branch_scale:
            depth = torch.arange(1, self.cfg.num_layers + 1, device=o.device).rsqrt().unsqueeze(1)
            scales = tuple(depth * x for x in scales)
        o, down = (
            scale.unsqueeze(2) * w
            for scale, w in zip(scales, (o, self.bank("down_bank")), strict=True)
        )
        others = scales + (self.resid_mix, self.q_gain)
        stacks = torch.cat([q, k, v], 1), o, self.bank("up_bank"), down, *others
        return [
            LayerWeights(*w)
            for w in zip(*(t.to(self.cfg.dtype).unbind(0) for t in stacks), strict=True)
        ]

    def hidden(self, info: PassInfo, plan: tuple[Visit, ...], select: Tensor | None) -> Tensor:
        """Final normalised hidden states (T, C); (n, C) with `select` (n,): the last visit skips what nobody reads."""
        layers = self.layers()
        x0, info = self.embed(info)
        x, skips, lane = (
            x0,
            [],
            None,
        )  # `lane` is the MLP lane; x is the attention lane once there are two
        for visit in plan:
            w, scale = (
                layers[visit.layer],
                1 / math.sqrt(visit.layer + 1) if self.cfg.ln_scale else 1.0,
            )
            lane = x if visit.parallel and lane is None else lane
            x = self.merge_skip(x, skips.pop(), visit.skip) if visit.skip else x
            u = w.resid_mix[0] * x + w.resid_mix[1] * x0
            at = slice(None) if select is None or visit.slot + 1 < len(plan) else select
            a = self.attend(rms_norm(u, scale), w, visit, info, at)
            u, x, lane = u[at], x[at], None if lane is None else lane[at]
            if (
                visit.parallel
            ):  # attention reads one lane, the MLP the other; both are written to both
                m = self.feed(rms_norm(lane, scale), w, visit, info)
                lambdas = self.parallel_resid_lambdas, self.parallel_post_lambdas
                keep, post = (p[visit.layer].to(x.dtype) for p in lambdas)
                x, lane = (
                    keep[j] * s + post[0, j] * a + post[1, j] * m for j, s in enumerate((x, lane))
                )
            else:
                h = u + a
                x = h + self.feed(rms_norm(h, scale), w, visit, info)
            x = info.biased(x, visit.slot)
            skips += [x] if visit.push else []
        if lane is not None:
            x = {"mean": (x + lane) / 2, "attn": x, "mlp": lane}[self.cfg.parallel_final_lane]
        return rms_norm(x)

    def forward(
        self,
        batch: Batch,
        plan: tuple[Visit, ...],
        lora: LoRA | None = None,
        select: Tensor | None = None,
        tap: Callable[..., None] = lambda *_: None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Nats per token (T,) fp32, 0 where the target is -1. `lora` adapts segments of equal length, one adapter each.
        With `select` (n,) int64 only these get logits: (n,); beside `lora` they are the last of segments, rising."""
        place, cfg = segment_positions(batch.cu_seqlens, batch.inputs.numel()), self.cfg
        rope = self.rotations(place, batch.max_seqlen)
        info = PassInfo(batch, place, rope, tap, lora, *(lora.views() if lora else ()))
        x, targets = self.hidden(info, plan, select if lora else None), batch.targets
        tap("head_in", 0, x)
        if select is not None:
            x, targets = x if lora else x[select], targets[select]
        h = info.lora_in(x, "head", 0)
        extra = info.lora_up(h, "head", 0) if h else None
        if temperature != 1:  # cap / T * tanh(z / cap) is a cap of cap / T on z / T
            x, extra = x / temperature, None if extra is None else extra / temperature
        return head_loss(
            x,
            self.tok_emb.to(cfg.dtype),
            extra,
            targets,
            cfg.logit_softcap / temperature,
            cfg.fused_ce,
        )


# === 5. Adapters: a LoRA for every document of a batch, at every visit of a layer =====================================
class LoRA(NamedTuple):
    """Adapters of B documents in two leaf tensors: y += scale * (x A^T) B^T. q, k, v and o read the normalised input of
    the attention, mlp that of the MLP, head the final state. Record: 8,355,840 values per document, 17 visits, head."""

    sites: tuple[
        tuple[str, int], ...
    ]  # (site, slot) of every adapter; those that read one input are neighbours
    widths: tuple[int, ...]  # its output width
    ranks: tuple[int, ...]  # rows of A in use: zeros get no gradient, so what is one stays one
    scale: float
    down: Tensor  # (B, len(sites), rank, C)
    up: Tensor  # (B, sum(widths), rank)
    bias: Tensor | None  # (B, slots, C): added after every visit
    leaves = property(lambda lora: [x for x in lora[4:] if x is not None])

    @classmethod
    def zeros(cls, cfg: Config, batch: int, slots: int, device: torch.device) -> LoRA:
        C, kv, ranks = (
            cfg.model_dim,
            cfg.num_kv_heads * cfg.head_dim,
            {"head": cfg.ttt_lm_rank or cfg.ttt_lora_rank},
        )
        on = {
            "q": C * cfg.ttt_q_lora,
            "k": kv * cfg.ttt_k_lora,
            "v": kv * cfg.ttt_v_lora,
            "o": C * cfg.ttt_o_lora,
            "mlp": C * cfg.ttt_mlp_lora,
        }
        widths = {
            (site, slot): width for slot in range(slots) for site, width in on.items() if width
        }
        widths["head", 0] = cfg.vocab_size
        ranks = tuple(ranks.get(site, cfg.ttt_lora_rank) for site, _ in widths)
        shapes = [(len(widths), max(ranks), C), (sum(widths.values()), max(ranks)), (slots, C)]
        leaves = [torch.zeros(batch, *shape, device=device, requires_grad=True) for shape in shapes]
        return cls(
            tuple(widths),
            tuple(widths.values()),
            ranks,
            cfg.lora_scale,
            *leaves[:2],
            leaves[2] if cfg.ttt_bias_tune else None,
        )

    def over(self, change: Callable[[Tensor], Tensor]) -> LoRA:  # the same of changed leaves
        return LoRA(*self[:4], *(None if x is None else change(x) for x in self[4:]))

    def rows(
        self, rows: slice
    ) -> LoRA:  # the adapters of these documents, as leaves on the same memory
        return self.over(lambda leaf: leaf[rows].detach().requires_grad_())

    @torch.no_grad()
    def reset(
        self, seed: int, keys: Iterable[int]
    ) -> None:  # B 0, A +-1/sqrt(C) by seed and document key alone (W48)
        generator, bound = torch.Generator(self.down.device), self.down.size(-1) ** -0.5
        for a, key in zip(self.down, keys, strict=False):
            a.uniform_(
                -bound, bound, generator=generator.manual_seed(seed * 1_000_000_007 + key)
            )  # CPU: low 32 bits
        for i in [i for i, rank in enumerate(self.ranks) if rank < self.down.size(2)]:
            self.down[:, i, self.ranks[i] :] = 0
        for leaf in self.leaves[1:]:
            leaf.zero_()

    def factors(
        self, of: Mapping[str, str]
    ) -> list[Tensor]:  # of the rate, for each leaf: TTT_LR_FACTORS
        if not of:
            return [torch.ones((), dtype=torch.float64, device=self.down.device)] * 3
        each = torch.tensor(
            [float(of.get(site, 1)) for site, _ in self.sites], device=self.down.device
        )
        widths = torch.tensor(self.widths, device=self.down.device)
        return [
            each[:, None, None],
            each.repeat_interleave(widths)[:, None],
            each.new_tensor(float(of.get("bias", 1))),
        ]

    def views(
        self,
    ) -> tuple[dict, dict]:  # PassInfo.down and .up, by split, so that a gradient is one copy
        reads = {}  # Dynamo does not trace groupby with a key
        for site, slot in self.sites:
            reads.setdefault(("attn" if site in "qkvo" else site, slot), []).append(site)
        a = self.down.flatten(1, 2).split(
            [len(sites) * self.down.size(2) for sites in reads.values()], 1
        )
        up = dict(zip(self.sites, self.up.split(self.widths, 1), strict=True))
        return dict(zip(reads, zip(a, reads.values(), strict=True), strict=True)), up


# === 6. Optimisation: Muon on banks, AdamW on the rest, schedules =====================================================
MUON_COEFFS = {  # x -> a x + b x^3 + c x^5 of every singular value, a triple per iteration
    "quintic": [(3.4445, -4.7750, 2.0315)] * 20,  # of Muon (K. Jordan): 0.002..1 to 0.68..1.20
    "polar": [  # Polar Express (arXiv 2505.16932; PR #1344): 0.001..1 to 0.86..1.14; diverges from 1.022 on
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ],
}


def newton_schulz(g: Tensor, steps: int, coeffs: str = "quintic") -> Tensor:
    """Singular values of each matrix of g (n, r, c) towards 1, the vectors as they are."""
    x = g.mT if g.size(-2) > g.size(-1) else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in MUON_COEFFS[coeffs][:steps]:
        y = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(y, y, y, beta=b, alpha=c), x, beta=a)
    return x.mT if g.size(-2) > g.size(-1) else x


def muon_update(grad: Tensor, buffer: Tensor, momentum: Tensor, cfg: Config) -> Tensor:
    """Gradient (n, r, c) fp32 and momentum buffer, changed in place -> orthogonalised Nesterov step, compute dtype."""
    buffer.mul_(momentum).add_(grad)
    u = grad + momentum * buffer
    if cfg.muon_row_normalize:
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    return newton_schulz(u.to(cfg.dtype), cfg.muon_backend_steps, cfg.muon_coeffs)


def muon_step(
    grad: Tensor,
    buffer: Tensor,
    weight: Tensor,
    average: Tensor,
    sent: Tensor | None,
    rates: Tensor,
    cfg: Config,
) -> None:
    """One pass over matrices (n, r, c) of a rank: fp32 and changed in place, but `sent`, which gets the new weights in
    the compute dtype. `rates`: clip, momentum, learning rate, and the share of the weights of the step before in the
    average, which takes them in now: by now the host knows that their loss was finite."""
    clip, momentum, lr, share = rates.unbind()
    average.lerp_(weight, share)
    update = muon_update(grad.float() * clip, buffer, momentum, cfg).float()
    weight.mul_(1 - lr * cfg.muon_wd).sub_(
        update * (lr * math.sqrt(max(1.0, weight.size(-2) / weight.size(-1))))
    )
    if sent is not None:
        sent.copy_(weight)


def assign_matrices(banks: dict[str, Tensor], world_size: int) -> list[dict[str, slice]]:
    """The slices of every bank that each rank owns: largest matrices first, each to the rank with the fewest values so
    far. The record model on 8 ranks: the largest share is 2 % above the mean, where equal banks need 36 % (W21)."""
    loads, counts = [0] * world_size, {name: [0] * world_size for name in banks}
    for name, bank in sorted(banks.items(), key=lambda item: -item[1][0].numel()):
        for _ in range(len(bank)):
            rank = loads.index(min(loads))
            loads[rank] += bank[0].numel()
            counts[name][rank] += 1
    ends = {name: np.cumsum(count).tolist() for name, count in counts.items()}
    return [
        {name: slice(ends[name][r] - counts[name][r], ends[name][r]) for name in banks}
        for r in range(world_size)
    ]


def split_like(
    flat: Tensor, like: dict[str, Tensor]
) -> dict[str, Tensor]:  # its first values, in the shapes of `like`
    sizes = [x.numel() for x in like.values()]
    parts = zip(like.items(), flat[: sum(sizes)].split(sizes), strict=True)
    return {name: part.view_as(x) for (name, x), part in parts}


class Muon:
    """Muon for banks of matrices (B, out, in) that act as y = x W^T: reduce-scatter of gradients, one pass over what a
    rank owns, all-gather of weights (PR #399 gathers updates). Momentum, average and exact weights exist only at their
    owner; the other slices of the model's banks are as received, in the compute dtype, to which the forward casts
    anyway. (Banks of that dtype would save a cast, 0.1 % of a step, and add up microbatches in bf16.) A message has a
    row for each rank: its slices end to end, then zeros up to the largest share, because collectives want equal ones.
    The rate is the spectral norm of an update over sqrt(max(1, out / in))."""

    def __init__(self, banks: dict[str, nn.Parameter], cfg: Config, ranks: Ranks):
        self.banks, self.cfg, self.ranks, self.shares = (
            banks,
            cfg,
            ranks,
            assign_matrices(banks, ranks.world_size),
        )
        self.one_pass = torch.compile(muon_step, dynamic=False) if cfg.compile else muon_step
        slices = [
            {name: bank.data[share[name]] for name, bank in banks.items()} for share in self.shares
        ]  # by rank
        self.mine, self.own, self.sent = (
            self.shares[ranks.rank],
            slices[ranks.rank],
            {},
        )  # stepped in place
        self.alone = ranks.world_size == 1
        self.momentum = {name: torch.zeros_like(w) for name, w in self.own.items()}
        self.average = {name: w.clone() for name, w in self.own.items()}
        if not self.alone:
            room = max(sum(x.numel() for x in share.values()) for share in slices)
            self.message = torch.zeros(ranks.world_size, room, dtype=cfg.dtype, device=ranks.device)
            self.reduced, self.part = (
                torch.zeros_like(self.message[0]),
                torch.zeros_like(self.message[0]),
            )
            self.sent, rows = split_like(self.part, self.own), map(split_like, self.message, slices)
            self.message_slots = [(rank, *x) for rank, row in enumerate(rows) for x in row.items()]
            others = [place for place in self.message_slots if place[0] != ranks.rank]
            self.theirs = [slices[rank][name] for rank, name, _ in others], [x for *_, x in others]

    def whole(
        self, own: dict[str, Tensor]
    ) -> dict[str, Tensor]:  # banks in fp32 of all ranks' slices; all call it
        banks = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.banks.items()}
        for name, s in self.mine.items():
            banks[name][s] = own[name]
        return own | {name: self.ranks.sum(bank) for name, bank in banks.items()}

    def reduce(
        self,
    ) -> Tensor:  # sums gradients over ranks, at their owners; returns the squared norm of them all
        self.grads = {name: p.grad for name, p in self.banks.items()}
        if not self.alone:
            parts = [
                self.grads[name][self.shares[rank][name]] for rank, name, _ in self.message_slots
            ]
            torch._foreach_copy_([x for *_, x in self.message_slots], parts)
            dist.reduce_scatter_tensor(self.reduced, self.message.view(-1))  # gloo knows no rows
            self.grads = split_like(self.reduced, self.own)
        return self.ranks.sum(
            torch.stack([g.float().square().sum() for g in self.grads.values()]).sum()
        )

    def step(
        self, rates: Tensor
    ) -> None:  # one update from the reduced gradients; `rates` as in muon_step
        for name, w in self.own.items():
            if len(w):
                state = self.momentum[name], w, self.average[name], self.sent.get(name)
                self.one_pass(self.grads[name], *state, rates, self.cfg)
        if not self.alone:
            dist.all_gather_into_tensor(self.message.view(-1), self.part)
            torch._foreach_copy_(*self.theirs)


class Optimizers:
    """All as one: reduce every gradient, clip by the norm of the reduced ones (W2), step, average. The embedding and
    the small parameters become views of one flat tensor, the same on every rank: one message, one average."""

    def __init__(self, model: GPT, cfg: Config, ranks: Ranks):
        self.model, self.cfg, self.ranks, table = model, cfg, ranks, parameter_table(cfg)
        self.keep_gradients = False  # zeroed in place: a CUDA graph adds to them
        group = {"muon": {}, "embed": {}, "scalar": {}, "fixed": {}}
        for name, p in model.named_parameters():
            group[table[name].group][name] = p
        rest = [
            x
            for g in ("scalar", "fixed")
            for x in sorted(group[g].items(), key=lambda item: item[1].numel() % 4)
        ]
        self.muon, self.small = (
            Muon(group["muon"], cfg, ranks),
            group["embed"] | dict(rest),
        )  # loads want 16 bytes
        self.flat = torch.cat([p.detach().flatten() for p in self.small.values()])
        for name, view in split_like(self.flat, self.small).items():
            self.small[name].data = view
        self.average = self.flat.clone()
        self.sizes = [
            sum(p.numel() for p in group[name].values()) for name in ("embed", "scalar", "fixed")
        ]
        self.leaves = [nn.Parameter(x) for x in self.flat.split(self.sizes)[:2]]
        settings = zip(
            self.leaves,
            (cfg.tied_embed_lr, cfg.scalar_lr),
            (cfg.embed_wd, cfg.adam_wd),
            strict=True,
        )
        groups = [
            dict(params=[leaf], lr=lr, base_lr=lr, weight_decay=decay)
            for leaf, lr, decay in settings
        ]
        self.adam = torch.optim.AdamW(
            groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True
        )
        weights, average = (split_like(flat, self.small) for flat in (self.flat, self.average))
        self.state = {
            "weights": weights | self.muon.own,
            "average": average | self.muon.average,
            "momentum": self.muon.momentum,
        }  # this rank's, exact

    @torch.no_grad()
    def step(
        self, lr_scale: float, momentum: float, average_share: float | None = None
    ) -> Tensor:  # clears the gradients; returns the reduced one's norm
        share = 1 - self.cfg.ema_decay if average_share is None else average_share
        squares = self.muon.reduce()
        flat = self.ranks.sum(torch.cat([p.grad.flatten() for p in self.small.values()]))
        norm = (squares + flat.square().sum()).sqrt()
        clip = ((self.cfg.grad_clip_norm or math.inf) / (norm + 1e-6)).clamp_max(1.0)
        self.average.lerp_(self.flat, share)  # of the step before, as in muon_step
        for leaf, g in zip(self.leaves, flat.mul_(clip).split(self.sizes), strict=False):
            leaf.grad = g
        for g in self.adam.param_groups:  # anew each time: load_state_dict replaces them
            g["lr"] = g["base_lr"] * lr_scale
        self.adam.step()
        rates = momentum, self.cfg.matrix_lr * lr_scale, share
        rates = [norm.new_full((), x) for x in rates]  # a copy would be waited for
        self.muon.step(torch.stack([clip, *rates]))
        self.model.zero_grad(set_to_none=not self.keep_gradients)
        return norm

    @torch.no_grad()
    def averages(
        self, newest_share: float | None = None
    ) -> dict[str, Tensor]:  # whole, with the newest step's weights or as before it
        weights = self.state["weights"]
        found = {
            n: old if newest_share is None else old.lerp(weights[n], newest_share)
            for n, old in self.state["average"].items()
        }
        return self.muon.whole(found)

    def state_dict(self) -> dict[str, Any]:
        """All that steps read and change, whole (some live, as in torch), the same for any ranks; all must call it."""
        return {key: self.muon.whole(own) for key, own in self.state.items()} | {
            "adam": self.adam.state_dict()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["weights"])
        for x in (
            [] if self.muon.alone else self.muon.theirs[0]
        ):  # as received: what scales them sees the rounding
            x.copy_(x.to(self.cfg.dtype))
        for name, x, saved in [
            (n, x, state[key][n]) for key, own in self.state.items() for n, x in own.items()
        ]:
            x.copy_(saved[self.muon.mine.get(name, ...)])
        self.adam.load_state_dict(state["adam"])


def lr_scale(
    frac: float, cfg: Config, step: int = 0
) -> float:  # 1, then linear to 0 at the end; at least MIN_LR
    fall = cfg.warmdown_iters * frac / max(step, 1) if cfg.warmdown_iters else cfg.warmdown_frac
    return 1.0 if frac < 1 - fall else max((1 - frac) / fall, cfg.min_lr)


def muon_momentum(step: int, cfg: Config) -> float:
    share = min((step + 1e-9) / (cfg.muon_momentum_warmup_steps + 1e-9), 1.0)
    return (
        cfg.muon_momentum_warmup_start
        + (cfg.muon_momentum - cfg.muon_momentum_warmup_start) * share
    )


# === 7. Training ======================================================================================================
def backward_row(forward: Callable, plan: tuple[Visit, ...], row: Batch, count: Tensor) -> Tensor:
    """Adds the gradient of the row's nats / count to the parameters'; returns that part of the loss, detached."""
    loss = forward(row, plan).sum() / count
    loss.backward()
    return loss.detach()


def capture_row(
    forward: Callable, plan: tuple[Visit, ...], row: Batch, pool: Any
) -> Callable[[Batch, Tensor], Tensor]:
    """`backward` of one plan as a CUDA graph: one launch per row. It works in fixed places: rows are copied to where it
    reads, gradients are zeroed where they are, and the loss is overwritten by the next call."""
    inputs = [*(x.clone() for x in row[:3]), torch.ones((), device=row.inputs.device)]
    call = partial(backward_row, forward, plan, Batch(*inputs[:3], row.max_seqlen), inputs[3])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        call()  # so that libraries allocate what they keep
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(
        graph, pool=pool, capture_error_mode="thread_local"
    ):  # other threads may use CUDA meanwhile
        loss = call()

    def replay(row: Batch, count: Tensor) -> Tensor:
        torch._foreach_copy_(inputs, [*row[:3], count])
        graph.replay()
        return loss

    return replay


def accumulate_gradients(
    forward: Callable,
    plan: tuple[Visit, ...],
    rows: list[Batch],
    num_targets: int,
    graphs: Mapping[tuple[Visit, ...], Callable] | None = None,
) -> Tensor:
    """Adds the gradient of this rank's part of the mean loss over `num_targets`; returns that part, detached."""
    count = torch.full((), float(num_targets), device=rows[0].inputs.device)
    once, total = (
        (graphs or {}).get(plan) or partial(backward_row, forward, plan),
        torch.zeros_like(count),
    )
    for row in rows:
        total += once(row, count)
    return total


def synthetic_row(cfg: Config, shape: tuple[int, int, int], device: torch.device) -> Batch:
    """Random ids in documents of many lengths: what warm-up sees in place of any real token (W43)."""
    (size, room, longest), rng = (shape[0], shape[1] // 2, shape[2]), np.random.default_rng(0)
    ids, starts = (
        rng.integers(0, cfg.vocab_size, size + 1),
        segment_starts(rng.random(size) < 2 / longest, 1, longest),
    )
    n = int([*starts, size][min(room, len(starts))])  # cut where the loader would
    return pack_row(ids[:n], ids[1 : n + 1], starts[:room], shape, device)


@contextlib.contextmanager
def state_restored(
    model: nn.Module, optimizers: Optimizers
) -> Iterator[None]:  # afterwards all state is as before (W1)
    kept = [
        *model.state_dict().values(),
        *(x for own in optimizers.state.values() for x in own.values()),
    ]
    copies, devices = [t.clone() for t in kept], [model.tok_emb.device] * model.tok_emb.is_cuda
    with torch.random.fork_rng(devices):
        yield
    torch._foreach_copy_(kept, copies)
    optimizers.adam.state.clear()
    model.zero_grad(set_to_none=True)


def predict_submission_bytes(
    cfg: Config,
) -> float:  # code and model: codes at the entropy of Gaussian rows, or to fit the limit
    kinds = {
        "matrix": (cfg.matrix_bits, cfg.matrix_clip_sigmas),
        "embed": (cfg.embed_bits, cfg.embed_clip_sigmas),
    }
    bits = {
        kind: math.log2(math.sqrt(2 * math.pi * math.e) * (2**b / 2 - 1) / sd)
        for kind, (b, sd) in kinds.items()
    }
    fitted = cfg.quantizer == "allocated" and cfg.artifact_limit_bytes > 0
    bits = dict.fromkeys(bits, cfg.matrix_bits) if fitted else bits
    size = sum(
        math.prod(role.shape) * bits.get(role.packing, 16) / 8
        for role in parameter_table(cfg).values()
    )
    return min(size + CODE_BYTES, cfg.artifact_limit_bytes if fitted else math.inf)


PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
}  # dense bf16, by data sheet


class Progress:
    """What all ranks know of the training. A step's numbers are read one step late, while the device has the next one's
    work (W20). Time is the ranks' mean clock at the end of a step; in later ones a visit of a layer counts as long as
    the longest, so that none ends after `budget` seconds. A checkpoint restores all numbers of the first lines."""

    def __init__(self, run: Run, budget: float):
        self.step, self.tokens, self.loss, self.ended, self.marked = (
            0,
            0,
            math.nan,
            0.0,
            (0.0, 0),
        )  # on this rank
        self.elapsed, self.visits, self.flying, self.longest, self.timed = (
            0.0,
            0,
            0,
            0.0,
            (0.0, 0),
        )  # on all
        self.looped, self.expected, self.kept = False, run.cfg.iterations, 0.0
        self.share, self.taken, self.rounds = (
            1 - run.cfg.ema_decay,
            0,
            False,
        )  # of the average; LATE_QAT
        if "progress" in run.kept:
            vars(self).update(run.kept["progress"])
            run.optimizers.load_state_dict(run.kept["optimizers"])
            torch.set_rng_state(run.kept["random"])
        self.run, self.cfg, self.budget, self.unread, self.signal, self.stop = (
            run,
            run.cfg,
            budget,
            None,
            0,
            0.0,
        )
        self.start, run.inner = (
            run.ranks.now() - self.ended,
            run.inner - self.ended,
        )  # it has trained so long before

    def frac(self) -> float:  # share of the budget, or of ITERATIONS, at the start of the next step
        spent = self.elapsed * (1 + self.flying / max(self.visits, 1))
        return (
            self.step / self.cfg.iterations
            if self.budget == math.inf
            else min(spent / self.budget, 1 - 1e-9)
        )

    def fits(
        self, visits: int
    ) -> bool:  # whether a step of so many visits will end within the budget
        return self.elapsed + self.longest * (self.flying + visits) <= self.budget

    def average(self, scale: float) -> float:
        """The newest weights' share in the average. SWA decays as EMA does, then is the mean of all since it began."""
        cfg, step = self.cfg, self.step + 1
        swa = cfg.export_weights == "swa" and scale < cfg.swa_threshold
        due = step % (cfg.swa_every if swa else cfg.ema_every) == 0
        self.taken += swa and due
        self.share = 1 / max(self.taken, 1) if swa else 1 - cfg.ema_decay**cfg.ema_every
        self.share = 1.0 if cfg.export_weights == "raw" else self.share * due
        return self.share

    def send(
        self, local: Tensor, norm: Tensor, visits: int, num_targets: int, scale: float
    ) -> None:
        """After a step: part of the loss, norm of the reduced gradient, visits of layers, targets, rate factor."""
        ranks, first = (
            self.run.ranks,
            self.step == 0,
        )  # the first is waited for: without it, no time is known
        clock, ending = (ranks.now() - self.start, visits) if first else (self.ended, self.flying)
        self.flying, self.step, self.tokens = (
            self.flying + visits,
            self.step + 1,
            self.tokens + num_targets,
        )
        facts = clock / ranks.world_size, self.run.sentinel.poll(), self.signal
        facts = (norm.new_full((), x) for x in facts)  # fills: no wait
        self.unread = (
            ending,
            scale,
            ranks.start_read(ranks.sum(torch.stack([local, norm / ranks.world_size, *facts]))),
        )
        if first:
            self.read()

    def read(self) -> None:  # what has not been read; raises if it is bad
        if not self.unread:
            return
        (ending, scale, late), self.unread, run, step, before = (
            self.unread,
            None,
            self.run,
            self.step,
            self.ended,
        )
        (self.loss, norm, clock, compiled, self.stop), now = late.wait()
        self.ended = now - self.start
        if not math.isfinite(self.loss + norm):
            run.save("last_good.pt", run.optimizers.averages(), step - 1, self.looped)
            raise FloatingPointError(
                f"loss {self.loss}, gradient norm {norm} in step {step}; last_good.pt is before"
            )
        run.check_compiled(compiled)
        if ending:
            self.longest = max(self.longest * 0.98, (clock - self.elapsed) / ending)
            self.elapsed, self.visits, self.flying = (
                clock,
                self.visits + ending,
                self.flying - ending,
            )
        if step == 1:
            self.timed = self.elapsed, self.visits
        elif step == 22:
            self.judge(self.elapsed - self.timed[0], self.visits - self.timed[1])
        self.tell(step, scale, max(self.ended - before, 1e-9))

    def tell(
        self, step: int, scale: float, seconds: float
    ) -> None:  # what all can know of a step that took so long
        cfg, log, tokens = self.cfg, self.run.log, self.cfg.train_batch_tokens
        if step <= 3 or log.due() or (cfg.train_log_every and step % cfg.train_log_every == 0):
            ms, rate = (
                1000 * self.ended,
                (self.tokens - self.marked[1]) / max(self.ended - self.marked[0], 1e-9),
            )
            self.marked = self.ended, self.tokens
            log(
                f"step:{step}/{cfg.iterations} train_loss:{self.loss:.4f} train_time:{ms:.0f}ms "
                f"step_avg:{ms / step:.2f}ms tok/s:{rate:.0f} lr_scale:{scale:.3f}",
                terminal=not log.live,
            )
        rate = tokens / seconds
        log.scalars(step, {"train_loss": self.loss, "lr_scale": scale, "tok/s": rate})
        if log.live:
            table, share = (
                parameter_table(cfg).values(),
                len(cfg.plans[self.looped]) / cfg.num_layers,
            )  # of visits
            used = sum(
                math.prod(role.shape) * (share if role.group == "muon" else 1) for role in table
            )
            mfu = [
                f"MFU {600 * used * rate / self.run.ranks.world_size / peak:.0f} %"
                for gpu, peak in PEAK_FLOPS.items()
                if gpu in self.run.facts["device"]
            ]
            left = min(self.budget - self.ended, (cfg.iterations - step) * self.ended / step)
            log.show(
                ", ".join(
                    [
                        f"train: step {step} of about {self.expected:.0f}",
                        f"{left:.0f} s left",
                        f"loss {self.loss:.4f}",
                        f"{1000 * seconds:.0f} ms/step",
                        f"{rate:.0f} tok/s",
                        *mfu,
                        f"about {predict_submission_bytes(cfg):.0f} bytes",
                    ]
                ),
                rest=0.1,
            )

    def judge(
        self, seconds: float, visits: int
    ) -> None:  # by steps 2 to 21: what the budget allows, whether to go on
        cfg, (plain, looped), share = (
            self.cfg,
            map(len, self.cfg.plans),
            min(self.cfg.enable_looping_at, 1.0),
        )
        self.expected = min(
            cfg.iterations, self.budget * visits / seconds * (share / plain + (1 - share) / looped)
        )
        self.run.log(
            f"speed: {50 * seconds:.1f}ms per step; the budget allows about {self.expected:.0f} steps"
        )
        if 0 < cfg.pod_speedgate_ms < 50 * seconds:
            raise RunStopped(
                f"POD_SPEEDGATE_MS={cfg.pod_speedgate_ms:g}: a step takes {50 * seconds:.1f} ms"
            )

    def pause(
        self,
    ) -> (
        None
    ):  # a checkpoint when it is time; after a signal, one and the end. All ranks agree on both
        run, every, now = self.run, self.cfg.checkpoint_every, self.run.ranks.now
        if every and (self.stop or self.elapsed - self.kept >= every):
            self.read()
            self.kept, start = self.elapsed, now()
            numbers = {
                name: x for name, x in vars(self).items() if isinstance(x, (int, float, tuple))
            }
            run.keep(
                progress=numbers,
                optimizers=run.optimizers.state_dict(),
                random=torch.get_rng_state(),
            )
            self.start, run.inner = (
                self.start + now() - start,
                run.inner + now() - start,
            )  # off the clock
        if self.stop:
            hint = "; the same command goes on" * (every > 0)
            raise_stopped(self.signal or signal.SIGTERM, after=f" after step {self.step}{hint}")


def train(run: Run, reserve: float) -> bool:
    """Trains until the budget less `reserve` seconds is spent, never longer; leaves EXPORT_WEIGHTS in the model.
    Schedules follow the share of the budget spent, or of ITERATIONS. Returns whether the loops ran at the end: scoring
    uses the depth that was trained (W6). FloatingPointError if a loss or gradient is not finite: see last_good.pt."""
    cfg, ranks, log, plans = run.cfg, run.ranks, run.log, run.cfg.plans
    progress = Progress(run, cfg.wallclock - reserve)
    loader = PackedLoader(run.streams["train"], run.tokenizer.bos_id, cfg, ranks)
    loader.cursor, steps = progress.tokens, loader.steps()
    handle_signals(lambda number, _: setattr(progress, "signal", number))
    while progress.step < cfg.iterations:
        frac, step = progress.frac(), progress.step
        switch = cfg.num_loops > 0 and not progress.looped and frac >= cfg.enable_looping_at
        plan = plans[progress.looped or switch]
        if not progress.fits(len(plan)):
            break
        if switch:
            log(f"layer_loop:enabled step:{step} frac:{frac:.3f} order:{[v.layer for v in plan]}")
        (rows, num_targets), scale = next(steps), lr_scale(frac, cfg, step)
        if cfg.late_qat and scale < cfg.late_qat_threshold and not progress.rounds:
            log(f"late_qat:enabled step:{step} lr_scale:{scale:.3f}")
            progress.rounds = True
        run.model.rounded(progress.rounds)
        local = accumulate_gradients(run.forward, plan, rows, num_targets, run.graphs)
        run.model.rounded(False)
        progress.read()  # of the step before, which the device has done by now
        progress.looped |= switch
        norm = run.optimizers.step(scale, muon_momentum(step, cfg), progress.share)
        progress.average(scale)
        progress.send(local, norm, len(plan), num_targets, scale)
        if cfg.val_loss_every and progress.step % cfg.val_loss_every == 0:
            progress.read()
            with run.phase("validate", "none"):
                result = run.evaluate(plan=plan).result()
            progress.start += run.phases[-1][2]  # off the clock
            log(
                f"{step + 1}/{cfg.iterations} val_loss: {result['val_loss']:.4f} val_bpb: {result['val_bpb']:.4f}"
            )
            log.scalars(step + 1, {"val_bpb": result["val_bpb"]})
        progress.pause()
    steps.close()
    progress.read()
    run.graphs = {}  # nothing else can use their memory
    handle_signals(raise_stopped)
    if any(ranks.gather(progress.signal)):  # in the last step
        progress.stop = 1.0
        progress.pause()
    step, ema = progress.step, run.optimizers.averages(newest_share=progress.share)
    log(
        f"stopping: step:{step}/{cfg.iterations} train_time:{1000 * progress.ended:.0f}ms; "
        f"{cfg.export_weights}:applying {cfg.export_weights.upper()} weights"
    )
    run.model.load_state_dict(ema)
    run.final |= {"steps": step, "train_loss": progress.loss, "train_tokens": progress.tokens}
    run.save("final_model.pt", ema, step, progress.looped)
    return progress.looped


# === 8. Scoring: nats and bytes of every validation token, once =======================================================
class ByteTable(
    NamedTuple
):  # bytes of text per token: a leading space counts unless after a boundary
    base: (
        np.ndarray
    )  # (V,) int64: UTF-8 length of the piece's text without one leading space; 1 for byte pieces
    space: np.ndarray  # (V,) bool: the piece begins with the space mark
    boundary: (
        np.ndarray
    )  # (V,) bool: control, unknown or unused piece, after which the text begins anew

    @classmethod
    def from_sentencepiece(cls, model: Any) -> ByteTable:
        ids = range(model.vocab_size())
        boundary = np.array(
            [model.is_control(i) or model.is_unknown(i) or model.is_unused(i) for i in ids]
        )
        pieces = [
            "" if boundary[i] else "?" if model.is_byte(i) else model.id_to_piece(i) for i in ids
        ]
        base = np.array(
            [len(piece.removeprefix("\u2581").replace("\u2581", " ").encode()) for piece in pieces]
        )
        return cls(base, np.array([piece.startswith("\u2581") for piece in pieces]), boundary)

    def bytes_of(
        self, before: np.ndarray, targets: np.ndarray
    ) -> np.ndarray:  # of each target after its predecessor
        return self.base[targets] + (self.space[targets] & ~self.boundary[before])

    def to(self, device: torch.device) -> ByteTable:  # the same of tensors
        return ByteTable(*(torch.from_numpy(x).to(device) for x in self))

    def count(self, tokens: np.ndarray) -> int:  # bytes of all targets tokens[1:] of a stream (n,)
        return int(self.bytes_of(tokens[:-1], tokens[1:]).sum())


def check_bytes(tokenizer: Tokenizer, docs: Documents, ranks: Ranks) -> tuple[ByteTable, int]:
    """The table, and the bytes of every W-th document decoded. UsageError unless it counts those of each the same."""
    table, decoded = ByteTable.from_sentencepiece(tokenizer.model), 0
    for start, count in list(zip(docs.starts, docs.counts, strict=True))[
        ranks.rank :: ranks.world_size
    ]:
        ids = docs.tokens[
            start : start + count + (start + count == len(docs.tokens) - 1)
        ]  # without the next BOS
        real = len(tokenizer.model.decode(ids[1:].tolist()).encode())
        if (counted := table.count(ids)) != real:
            raise UsageError(
                f"{tokenizer.path}: counts {counted} bytes, not {real}, for the document at {start}"
            )
        decoded += real
    about = tokenizer.manifest.get("splits", {}).get("val", {})
    total = about.get("bytes") if about.get("tokens") == len(docs.tokens) else None
    if total not in (None, table.count(docs.tokens)):
        raise UsageError(
            f"{tokenizer.path}: counts {table.count(docs.tokens)} validation bytes, the manifest {total}"
        )
    return table, decoded


class DatasetTotals(NamedTuple):
    """What a validation set holds; 0 where a number is not known."""

    documents: int
    tokens: int
    bytes: int


# What the field's validation sets hold; other numbers mean other data or a lost tail.
CANONICAL = {
    "fineweb10B_sp8192": DatasetTotals(50_000, 40_540_803, 151_080_891),
    "fineweb10B_sp4096": DatasetTotals(50_000, 0, 151_080_891),
    "fineweb10B_sp1024": DatasetTotals(50_000, 0, 151_080_891),
}


class InvalidScore(RuntimeError): ...  # the ledger found a broken rule: there is no score


class Ledger:
    """Every target of the validation stream, named by the place of the token before it: its nats as first scored, and
    how often it was scored. An update says what it reads, and reads only what is scored. All on the device: no step
    waits for it. One per evaluation, and the only place that makes val_loss and val_bpb."""

    def __init__(self, docs: Documents, table: ByteTable, device: torch.device):
        self.docs, self.padding_index = docs, len(docs.tokens) - 1  # where scores of padding go
        self.tokens = torch.from_numpy(docs.tokens.astype(np.int32)).to(device)  # (N,)
        self.bytes = table.to(device).bytes_of(self.tokens[:-1], self.tokens[1:])  # (N - 1,) int64
        self.nats = torch.zeros(len(self.tokens), device=device)
        self.times_scored = torch.zeros_like(self.tokens)
        self.num_read_early = torch.zeros(
            (), dtype=torch.int64, device=device
        )  # targets that an update read too soon
        self.num_not_learnt_from = (
            0  # documents, or chunks of the stream, that the deadline kept from being learnt from
        )

    def record(
        self, place: Tensor, nats: Tensor
    ) -> None:  # (n,) int64 and fp32, final: a second score changes nothing
        self.nats[place] = torch.where(self.times_scored[place] == 0, nats, self.nats[place])
        self.times_scored.index_add_(0, place, torch.ones_like(place, dtype=torch.int32))

    def require_scored(
        self, place: Tensor, ranks: Ranks | None = None
    ) -> None:  # an update reads these targets (n,) int64
        times = self.times_scored[place]
        self.num_read_early += (
            ((ranks.sum(times) if ranks else times) == 0) & (place != self.padding_index)
        ).sum()

    def result(self) -> dict[str, float]:  # so far
        scored = self.times_scored[:-1] > 0
        nats, tokens = self.nats[:-1].double().sum().item(), int(scored.sum())
        num_bytes, loss = int((self.bytes * scored).sum()), nats / max(tokens, 1)
        bpb = loss / math.log(2) * tokens / max(num_bytes, 1)
        return {"val_loss": loss, "val_bpb": bpb, "tokens": tokens, "bytes": num_bytes}

    def join(
        self, ranks: Ranks
    ) -> Ledger:  # the ledgers of all ranks into each; a target of two ranks counts twice
        self.nats[-1] = 0.0
        self.num_not_learnt_from = sum(ranks.gather(self.num_not_learnt_from))
        for t in (self.nats, self.times_scored, self.num_read_early):
            ranks.sum(t)
        return self

    def by_document(
        self,
    ) -> dict[str, np.ndarray]:  # (D,) each: nats, bytes and targets of every document
        ends = [
            np.append(0, x[:-1].cpu().double().numpy().cumsum())
            for x in (self.nats, F.pad(self.bytes, (0, 1)))
        ]
        starts, stops = self.docs.starts, self.docs.starts + self.docs.counts
        nats, num_bytes = (x[stops] - x[starts] for x in ends)
        return {"doc_nats": nats, "doc_bytes": num_bytes, "doc_tokens": self.docs.counts}

    def problems(
        self, decoded_bytes: int
    ) -> list[str]:  # of the joined ledger; none: every rule was kept
        wanted, times = (
            np.bincount(self.docs.target_indices(), minlength=self.padding_index),
            self.times_scored[:-1].cpu().numpy(),
        )
        counts = {
            "targets were never scored": (times < wanted).sum(),
            "targets were scored too often": (times > wanted).sum(),
            "targets were read by an update before their score": self.num_read_early.item(),
            "scores are not finite": (~self.nats[:-1].isfinite()).sum().item(),
        }
        counted = self.result()["bytes"]
        lost = [f"{counted} bytes were counted, the documents hold {decoded_bytes}"] * (
            counted != decoded_bytes
        )
        return [f"{n} {what}" for what, n in counts.items() if n] + lost


# Inputs start .. end - 1 are read, and the targets of the inputs first_scored .. end - 1 are scored.
Window = tuple[int, int, int]  # (start, first_scored, end)


def scoring_windows(num_targets: int, length: int, stride: int) -> list[Window]:
    """(start, score, end): read inputs start..end-1 of a document, score its targets score..end-1; target j follows j.
    Each window starts on the grid of `stride`, wherever the document ends (W51); stride = length is plain scoring."""
    starts = range(0, max(num_targets - length, 0) + stride, stride)
    return [
        (s, s + length - stride if s else 0, min(s + length, num_targets))
        for s in starts
        if num_targets > 0
    ]


class Scorer(NamedTuple):  # scores without learning; what every evaluation needs
    forward: Callable
    plan: tuple[Visit, ...]
    ledger: Ledger
    cfg: Config
    ranks: Ranks
    log: Log

    def stream_windows(self, stride: int, first: int = 0) -> Iterator[Window]:
        """Windows over all texts, `stride` targets apart, that score the targets from `first` on.

        A text is a document with DATA_LOADER=documents, otherwise the stream. Windows and `first`
        are indices into the stream. A stride of 0 is the length of a window, EVAL_SEQ_LEN.
        """
        docs = self.ledger.docs
        if self.cfg.data_loader == "documents":
            texts = zip(docs.starts, docs.counts, strict=True)
        else:
            texts = [(0, self.ledger.padding_index)]
        for start, num_targets in texts:
            yield from self.text_windows(start, num_targets, stride, first)

    def text_windows(
        self, text_start: int, num_targets: int, stride: int, first: int = 0
    ) -> Iterator[Window]:
        """Windows as in stream_windows over the text that starts at index `text_start`."""
        length = self.cfg.eval_seq_len
        stride = min(stride or length, length)
        for start, first_scored, end in scoring_windows(num_targets, length, stride):
            if text_start + end > first:
                yield text_start + start, max(text_start + first_scored, first), text_start + end

    @torch.no_grad()
    def score_windows(self, windows: Iterable[Window], shared: bool) -> None:
        """Windows (start, score, end), packed into rows as they come; no score depends on its row. With `shared` the
        ranks, which all call it, divide the rows between them."""
        ledger, (size, capacity, _), rows, used = self.ledger, self.cfg.val_row_shape, [], math.inf
        for start, score, end in windows:
            if used + end - start > size or len(rows[-1]) == capacity // 2:
                rows.append([])
                used = 0
            rows[-1].append((start, score, end))
            used += end - start
        for row in rows[self.ranks.rank :: self.ranks.world_size] if shared else rows:
            index = np.concatenate([np.arange(start, end) for start, _, end in row])
            scored = np.concatenate([np.arange(start, end) >= score for start, score, end in row])
            starts = np.cumsum([0] + [end - start for start, _, end in row[:-1]])
            before, targets = (
                ledger.docs.tokens[index],
                np.where(scored, ledger.docs.tokens[index + 1], -1),
            )
            batch = pack_row(before, targets, starts, self.cfg.val_row_shape, ledger.nats.device)
            place = torch.from_numpy(np.where(scored, index, ledger.padding_index)).to(
                ledger.nats.device
            )  # waits, so first
            ledger.record(place, self.forward(batch, self.plan)[: len(index)])
            if self.log.due():
                self.log(
                    "eval_progress: {tokens} targets running_bpb:{val_bpb:.4f}".format(
                        **ledger.result()
                    )
                )


def score_all(
    scorer: Scorer, stride: int
) -> Ledger:  # every target once, in windows `stride` (0: a window) apart
    scorer.score_windows(scorer.stream_windows(stride), shared=True)
    return scorer.ledger.join(scorer.ranks)


# === 9. Compression: Hessians -> steps -> GPTQ -> integers -> one file ===============================================
class Matrix(NamedTuple):
    """One matrix that becomes integers: a slice of a bank, or a table."""

    bank: str
    index: int  # along the bank's first axis
    site: str  # whose inputs it multiplies: key of a Hessian together with `layer`
    layer: int


def quantised_matrices(cfg: Config) -> list[Matrix]:
    """All matrices that become integers, banks before tables, in the order of the artifact."""
    L = cfg.num_layers
    banks, tables = [], []
    for name, role in parameter_table(cfg).items():
        if role.packing == "matrix":
            for half, site in enumerate(role.sites):
                banks += [Matrix(name, half * L + layer, site, layer) for layer in range(L)]
        elif role.packing == "embed":
            tables.append(Matrix(name, 0, role.sites[0], 0))
    return banks + tables


def bank_shapes(
    cfg: Config,
) -> dict[str, tuple[int, int, int]]:  # name -> (n, rows, cols), in the order of the artifact
    table = parameter_table(cfg).items()
    return {
        name: (math.prod(r.shape[:-2]), *r.shape[-2:]) for name, r in table if r.packing != "float"
    }


def float_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters kept as fp16, without the leading rows that nothing reads."""
    return {
        name: (role.shape[0] - role.unread, *role.shape[1:])
        for name, role in parameter_table(cfg).items()
        if role.packing == "float"
    }


@torch.no_grad()
def collect_hessians(
    model: GPT, plan: tuple[Visit, ...], rows: list[Batch], ranks: Ranks
) -> dict[tuple, Tensor]:
    """(site, layer) -> mean of x x^T (in, in) over visits and all ranks' rows, as in training (W31); I for lookups."""
    sites = {
        (site, layer): model.get_parameter(bank).size(-1)
        for bank, _, site, layer in quantised_matrices(model.cfg)
    }
    lookups = {
        key: torch.eye(size, device=ranks.device)
        for key, size in sites.items()
        if key[0] in parameter_table(model.cfg)
    }
    sums = {
        key: torch.zeros(size, size, device=ranks.device)
        for key, size in sites.items()
        if key not in lookups
    }

    def tap(site: str, layer: int, x: Tensor) -> None:
        if (site, layer) in sums:
            sums[site, layer].addmm_(x.mT.float(), x.float())

    for row in rows:
        model(row, plan, tap=tap, select=torch.zeros(1, dtype=torch.long, device=ranks.device))
    count = (
        ranks.sum(torch.tensor(float(len(rows)), device=ranks.device))
        * model.cfg.micro_batch_tokens
    )
    return {key: ranks.sum(total) / count for key, total in sums.items()} | lookups


def collect_sensitivities(
    forward: Callable,
    model: GPT,
    plan: tuple[Visit, ...],
    rows: list[Batch],
    hessians: dict[tuple, Tensor],
    ranks: Ranks,
) -> dict[str, Tensor]:
    """bank -> (n, rows) fp32, all ranks: what a squared error of a row's output costs in nats, up to one factor: the
    mean square of the loss's gradient by it, here the squared gradient of the row's weights over its inputs' energy.
    The tied table's gradient holds both its roles, so its Hessian becomes, in `hessians`, their covariance (W31)."""
    squares = {
        name: torch.zeros(shape[:2], device=ranks.device)
        for name, shape in bank_shapes(model.cfg).items()
    }
    both, key, found = (
        torch.zeros(2 * [model.cfg.model_dim], device=ranks.device),
        ("head_in", 0),
        {},
    )
    for row in rows:
        forward(row, plan).sum().backward()
        with torch.no_grad():
            for name, total in squares.items():
                total += model.get_parameter(name).grad.square().sum(-1).view_as(total)
            directions = F.normalize(model.tok_emb.grad, dim=-1)
            both.addmm_(directions.mT, directions)
        model.zero_grad(set_to_none=True)
    if key in hessians:
        hessians[key] = ranks.sum(both) * (hessians[key].trace() / both.trace().clamp_min(1e-30))
    for name, total in squares.items():
        energy = torch.stack(
            [hessians[m[2:]].trace() for m in quantised_matrices(model.cfg) if m[0] == name]
        )
        found[name] = ranks.sum(total) / energy.clamp_min(1e-30)[:, None]
        if name.endswith("_emb"):  # a token may be absent from these rows, not from the test
            found[name] += 0.25 * found[name].sqrt().mean().square()
    return found


def damped_cholesky(hessian: Tensor) -> Tensor:  # L (c, c) with H = L L^T, from the lower triangle
    diagonal, damped = hessian.diagonal(), hessian.clone()
    for tenfold in range(6):  # damped by 1 % of the diagonal's mean, more where that is not enough
        damped.diagonal().copy_(diagonal + 0.01 * 10**tenfold * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and lower.diagonal().isfinite().all():
            return lower
    raise BadMatrix("GPTQ: a Hessian has no Cholesky factor")


class GptqSolver(NamedTuple):
    """GPTQ (Frantar et al. 2022) with act-order for all matrices of one shape at once. Columns go by falling Hessian
    diagonal, the error of each to those after it; inputs that are never active get zero columns. With H = L L^T in the
    opposite order no inverse is needed: column j is rounded as w_j + sum of e_k L_kj / L_jj over the columns k before
    it, e = w - q step (QuIP, arXiv 2307.13304, theorem 6). A column is contiguous."""

    weight: Tensor  # (n, cols, rows) fp32, columns in that order: from the last to the first
    order: Tensor  # (n, cols)
    upper: Tensor  # L^T (n, cols, cols): a step s costs s^2 / 12 * L_jj^2 of weighted error in column j

    @classmethod
    def prepare(
        cls, weight: Tensor, hessians: Iterable[Tensor]
    ) -> GptqSolver:  # (n, rows, cols), n of (cols, cols)
        n, rows, cols = weight.shape
        w, upper = (weight.new_empty(n, cols, size, dtype=torch.float32) for size in (rows, cols))
        orders = []
        for i, hessian in enumerate(hessians):  # one by one: a copy of each at a time, not of all
            orders.append(order := hessian.diagonal().argsort(descending=True).flip(0))
            h = hessian.index_select(0, order).index_select(1, order)
            dead = h.diagonal() <= 0
            typical = h.diagonal().sum() / (~dead).sum().clamp_min(1)
            h.diagonal().add_(typical.clamp_min(1e-12) * dead)
            w[i] = weight[i].index_select(1, order).masked_fill(dead, 0).mT
            upper[i] = damped_cholesky(h).mT
        return cls(w, torch.stack(orders), upper)

    def solve(
        self, step: Tensor, qmax: int
    ) -> Tensor:  # (n, rows) -> q int8 (n, rows, cols), W ~ q * step
        e, q = self.weight.clone(), torch.empty_like(self.weight, dtype=torch.int8)
        for stop in range(e.size(1), 0, -32):
            start = max(stop - 32, 0)
            block, u = e[:, start:stop], self.upper[:, start:stop, start:]
            u, inside = u / u.diagonal(dim1=1, dim2=2).unsqueeze(2), stop - start
            wanted = torch.baddbmm(block, u[..., inside:], e[:, stop:])
            for j in reversed(range(inside)):
                sent = u[:, j, None, j + 1 : inside] @ block[:, j + 1 :]
                rounded = sent.squeeze(1).add_(wanted[:, j]).div_(step).round_().clamp_(-qmax, qmax)
                block[:, j].addcmul_(rounded, step, value=-1)
                q[:, start + j] = rounded
        if not e.isfinite().all():
            raise BadMatrix("GPTQ: a weight or a Hessian is not finite")
        return torch.stack(
            [x.index_select(0, o).mT for x, o in zip(q, self.order.argsort(-1), strict=True)]
        )


def percentile_steps(weight: Tensor, qmax: int, floor: float, shares: Iterable[float]) -> Tensor:
    """(n, rows) fp16. A row's largest integer stands for this percentile of its |w|, at least for `floor`; of several,
    each matrix has the one with the least squared error: GPTQ-lite (PR #374), which is no GPTQ."""
    found = []
    for w in weight.float():
        largest = (
            w.abs()
            .quantile(w.new_tensor(shares), -1)
            .clamp_min(max(floor, qmax * torch.finfo(torch.half).tiny))
        )
        steps = (largest / qmax).half()
        rounded = (s[:, None] * (w / s[:, None]).round().clamp(-qmax, qmax) for s in steps.float())
        found.append(steps[int(torch.stack([(w - x).square().mean() for x in rounded]).argmin())])
    return torch.stack(found)


def prune(
    model: GPT,
) -> None:  # PRUNE_FRAC (PR #568): of all banks and tables together, the smallest weights become 0
    names = [
        name
        for name, role in parameter_table(model.cfg).items()
        if role.group == "muon" or name.endswith("_emb")
    ]
    weights = [model.get_parameter(name).detach() for name in names]
    sizes = torch.cat([w.abs().flatten() for w in weights])
    least = sizes.kthvalue(1 + int(model.cfg.prune_frac * (len(sizes) - 1))).values
    for w in weights:
        w[w.abs() < least] = 0


def clip_steps(
    weight: Tensor, clip_sigmas: Tensor | float, qmax: int
) -> Tensor:  # SDClip (PR #1394): (n, rows) fp16
    floor = torch.finfo(torch.float16).tiny  # below, fp16 loses bits (W33)
    return (clip_sigmas * weight.float().std(dim=-1) / qmax).clamp_min(floor).half()


class Quantizer:
    """All of quantisation that is the same for any size; a rank prepares every W-th slice of a bank. Steps are those of
    CLIP_SIGMAS times sqrt(theta), or with sensitivities by reverse water-filling over all rows: a row of power p and
    step s takes 1/2 log2(1 + 2 pi e p / s^2) bits a weight and costs, by Solver.upper, e s^2 / 12 nats a weight. The
    sum of costs is least at 12 theta = s^2 (e - theta / p), with nothing but zeros where e p < theta. Steps are powers
    of 2^(1/8) then: 0.1 % more error, 60 KB less of scales. Without Hessians: percentile_steps and, by I, rounding."""

    def __init__(
        self,
        model: GPT,
        hessians: dict | None,
        sensitivities: dict[str, Tensor] | None,
        ranks: Ranks,
    ):
        cfg, self.ranks, self.shapes, self.solvers, self.rows = (
            model.cfg,
            ranks,
            bank_shapes(model.cfg),
            {},
            {},
        )
        self.finest = (
            sum(map(math.prod, self.shapes.values())) * cfg.matrix_bits / 8
        )  # bytes; see fit
        for bank, shape in self.shapes.items():
            weight, spread = (
                model.get_parameter(bank).detach().view(shape),
                torch.zeros(shape[0], device=ranks.device),
            )
            all_of = [m for m in quantised_matrices(cfg) if m[0] == bank]
            if mine := all_of[ranks.rank :: ranks.world_size]:
                index = torch.tensor([m[1] for m in mine], device=weight.device)
                each = [
                    hessians[m[2:]] if hessians else torch.eye(shape[2], device=weight.device)
                    for m in mine
                ]
                self.solvers[bank] = index, (solver := GptqSolver.prepare(weight[index], each))
                spread[index] = solver.upper.diagonal(dim1=1, dim2=2).square().mean(-1)
            qmax = 2 ** ((cfg.embed_bits if bank.endswith("_emb") else cfg.matrix_bits) - 1) - 1
            clips = torch.tensor(
                [clip_sigmas_of(cfg, bank, m[3]) for m in all_of], device=weight.device
            )[:, None]
            lite = cfg.quantizer == "gptq_lite" and not bank.endswith("_emb")
            shares = (0.999, 0.9995, 0.9999, 0.99999, 1.0) if lite else (0.9999984,)
            published = (
                clip_steps(weight, clips, qmax)
                if hessians is not None
                else percentile_steps(weight, qmax, cfg.clip_floor, shares)
            ).float()
            power = weight.square().mean(-1).clamp_min(1e-20)
            cost = ranks.sum(spread)[:, None] * sensitivities[bank] if sensitivities else None
            self.rows[bank] = (
                published,
                power,
                weight.abs().amax(-1),
                cost,
                127 if sensitivities else qmax,
            )
        self.default = (
            self.theta(self.predict(1.0, published=True)) if sensitivities else 1.0
        )  # size: CLIP_SIGMAS'

    def steps(self, bank: str, theta: float) -> Tensor:  # (n, rows) fp32, values that fp16 has
        published, power, largest, cost, qmax = self.rows[bank]
        if cost is None:
            return (
                (published * math.sqrt(theta))
                .maximum(torch.minimum(published, largest / qmax))
                .half()
                .float()
            )
        step = (12 * theta / (cost - theta / power).clamp_min(1e-37)).sqrt()
        step = (
            torch.minimum(step, 100 * power.sqrt()).maximum(largest / qmax).clamp(2.0**-14, 2.0**15)
        )
        return torch.exp2((8 * step.log2()).round() / 8).half().float()

    def predict(
        self, theta: float, published: bool = False
    ) -> float:  # bytes of codes by the entropy formula
        total = 0.0
        for bank, (_, _, cols) in self.shapes.items():
            step = self.rows[bank][0] if published else self.steps(bank, theta)
            total += (
                cols
                / 16
                * torch.log2(1 + 17.08 * self.rows[bank][1] / step.square()).double().sum().item()
            )
        return total

    def theta(
        self, budget: float
    ) -> float:  # the least with codes of at most `budget` bytes, predicted
        low, high = -140.0, 60.0  # log2
        for _ in range(48):
            middle = (low + high) / 2
            low, high = (low, middle) if self.predict(2.0**middle) <= budget else (middle, high)
        return 2.0**high

    def solve(self, theta: float) -> dict[str, tuple[Tensor, Tensor]]:
        """name -> (q int8 (n, rows, cols), scale fp16 (n, rows)) on the CPU, the same on all ranks."""
        packed = {}
        for bank, shape in self.shapes.items():
            step, q = (
                self.steps(bank, theta),
                torch.zeros(shape, dtype=torch.int8, device=self.ranks.device),
            )
            if bank in self.solvers:
                index, solver = self.solvers[bank]
                q[index] = solver.solve(step[index], self.rows[bank][4])
            packed[bank] = self.ranks.sum(q).cpu(), step.half().cpu()
        return packed


def clip_sigmas_of(cfg: Config, bank: str, layer: int) -> float:
    looped = cfg.num_loops > 0 and cfg.loop_start <= layer <= cfg.loop_end and cfg.loop_clip_sigmas
    group = {"qo_bank": cfg.attn_clip_sigmas, "kv_bank": cfg.attn_clip_sigmas}.get(
        bank, cfg.mlp_clip_sigmas
    )
    return (
        cfg.embed_clip_sigmas
        if bank.endswith("_emb")
        else looped or group or cfg.matrix_clip_sigmas
    )


def fit_artifact(
    solver: Quantizer,
    model: GPT,
    meta: dict[str, Any],
    log: Callable[[str], None],
    rounds: int = 12,
) -> bytes:
    """The artifact (on rank 0; all call it) with the finest steps that keep code and model under ARTIFACT_LIMIT_BYTES,
    at most 4 KB under it unless the weights take MATRIX_BITS each on average: no finer step is worth its bytes."""
    cfg, lead, finest = model.cfg, solver.ranks.is_main, solver.finest
    if not cfg.artifact_limit_bytes:
        packed = solver.solve(solver.default)
        return pack_artifact(model, packed, meta) if lead else b""
    room, fits, best, size = cfg.artifact_limit_bytes - CODE_BYTES, 0, b"", 0
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
        budget = min(
            max(budget + (room - 2048 - size) * min(1.0, budget / size), budget / 4), finest
        )
    if not fits and rounds > 1:
        raise UsageError(
            f"ARTIFACT_LIMIT_BYTES={cfg.artifact_limit_bytes}: the model is {size - room} bytes over at "
            f"{budget / finest * cfg.matrix_bits:.2f} bits a weight; lower MLP_MULT or MODEL_DIM"
        )
    return best


# --- Entropy coder: interleaved range ANS (J. Duda) in NumPy, exact integers only, so any machine decodes alike ---
ANS_BITS, NUM_BANDS = (
    14,
    64,
)  # frequencies of a table add up to 2^14; a table per band of magnitude, times 4 of bias
MAGNITUDE_EDGES = np.array(
    [round(2 ** (16 + (t + 0.5) / 8)) for t in range(-36, 24)]
)  # of a column's mean |q|, relative, * 2^16
INVERSE_LEVEL = np.array(
    [0] + [round(2 ** (16 - (k - 65) / 8)) for k in range(1, 256)]
)  # 2^16 / a level's mean |q|


def row_levels(
    q: np.ndarray,
) -> np.ndarray:  # (n, rows, cols) int8 -> u8 (n, rows): mean |q| in steps of 2^(1/8)
    mean = np.stack([np.abs(matrix.astype(np.int16)).mean(-1) for matrix in q])
    return np.where(mean > 0, np.rint(8 * np.log2(np.maximum(mean, 2**-8)) + 65), 0).astype(
        np.uint8
    )


def num_coder_states(
    codes: list[np.ndarray],
) -> int:  # independent states: more are faster, each costs 2 bytes
    return max(max(q.shape[2] for q in codes), sum(q.size for q in codes) >> 13)


def coding_order(
    codes: list[np.ndarray], levels: list[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(codes, contexts, signs), each (m, cols), of one row of m matrices, all rows in the stream's order; who decodes
    fills in the codes before going on. Context: band of magnitude (the row's level, known beforehand, and the column's
    mean |q| in rows above) and how far off 0 the column's mean is. The sign is this mean's: times it, codes lean up."""
    lanes = num_coder_states(codes)
    for bank, bank_levels in zip(codes, levels, strict=True):
        for first in range(0, len(bank), lanes // bank.shape[2]):
            part, level = (x[first : first + lanes // bank.shape[2]] for x in (bank, bank_levels))
            size = np.full((len(part), part.shape[2]), 8 << 16)
            total = np.zeros_like(size)
            for row in range(part.shape[1]):
                if row % 8 == 0:
                    offset = np.searchsorted(MAGNITUDE_EDGES, size // (row + 8))
                    bias, sign = (
                        np.searchsorted([7, 19, 39], 100 * abs(total) // size, "right"),
                        1 - 2 * (total < 0),
                    )
                k = level[:, row, None].astype(np.int64)
                yield (
                    part[:, row],
                    np.where(k, np.minimum((k + offset) // 3, NUM_BANDS - 1), 0) * 4 + bias,
                    sign,
                )
                q = part[:, row].astype(np.int64)
                size += np.where(k, abs(q) * INVERSE_LEVEL[k], 1 << 16)
                total += q * INVERSE_LEVEL[k]


def ans_encode(codes: list[np.ndarray], levels: list[np.ndarray]) -> bytes:
    """u32 size of the tables, these, LZMA of frequencies u16 (contexts, 256), then final states u32, then words u16."""
    steps = [
        (context << 8 | q * sign + 128).ravel().astype(np.int32)
        for q, context, sign in coding_order(codes, levels)
    ]
    counts = np.bincount(np.concatenate(steps), minlength=NUM_BANDS * 4 * 256).reshape(-1, 256)
    table = np.maximum(
        (counts << ANS_BITS) // np.maximum(counts.sum(1, keepdims=True), 1), counts > 0
    )
    table[np.arange(len(table)), table.argmax(1)] += (1 << ANS_BITS) - table.sum(1)
    freq, start = table.ravel(), (table.cumsum(1) - table).ravel()
    state, words = np.full(num_coder_states(codes), 1 << 16, np.int64), []
    for step in reversed(steps):
        x = state[: len(step)]
        full = x >= freq[step] << 32 - ANS_BITS
        words.append(x[full].astype("<u2"))
        x[full] >>= 16
        x += x // freq[step] * ((1 << ANS_BITS) - freq[step]) + start[step]
    tables = codec("lzma")[0](table.astype("<u2").tobytes())
    numbers = b"".join(x.tobytes() for x in (state.astype("<u4"), *reversed(words)))
    return len(tables).to_bytes(4, "little") + tables + numbers


def ans_decode(data: bytes, shapes: Iterable[tuple], levels: list[np.ndarray]) -> list[np.ndarray]:
    """The codes. ValueError or IndexError if ans_encode cannot have written `data`."""
    codes, end, at = (
        [np.zeros(shape, np.int8) for shape in shapes],
        4 + int.from_bytes(data[:4], "little"),
        0,
    )
    tables = codec("lzma")[1](data[4:end], NUM_BANDS * 4 * 512)
    table = np.frombuffer(tables, "<u2").astype(np.int64).reshape(NUM_BANDS * 4, 256)
    if (table.sum(1) != 1 << ANS_BITS).any():
        raise ValueError("a table of frequencies does not add up")
    symbols = np.repeat(np.tile(np.arange(256, dtype=np.uint8), len(table)), table.ravel()).reshape(
        len(table), -1
    )
    freq, start = table.ravel(), (table.cumsum(1) - table).ravel()
    state = np.frombuffer(data, "<u4", num_coder_states(codes), end).astype(np.int64)
    words = np.frombuffer(data, "<u2", offset=end + 4 * len(state)).astype(np.int64)
    for q, context, sign in coding_order(codes, levels):
        x, slot = state[: q.size], state[: q.size] & (1 << ANS_BITS) - 1
        index = context.ravel() << 8 | symbols[context.ravel(), slot]
        x[:] = freq[index] * (x >> ANS_BITS) + slot - start[index]
        low = np.flatnonzero(x < 1 << 16)
        x[low] = x[low] << 16 | words[at : at + len(low)]
        at += len(low)
        q[:] = ((index & 255) - 128).reshape(q.shape) * sign
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
        coder = zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(**fast)
        )
        reader = partial(
            zstandard.ZstdDecompressor(max_window_size=1 << 20).stream_reader,
            read_across_frames=False,
        )
        return coder.compress, lambda data, size: reader(data).read(size)
    if name == "brotli":
        import brotli

        return partial(
            brotli.compress, quality=11
        ), lambda data, size: brotli.Decompressor().process(data, size)
    import lzma

    pairs = dict(
        id=lzma.FILTER_LZMA2, preset=6, lc=0, lp=1, pb=1
    )  # models low and high bytes of fp16 apart
    raw = dict(format=lzma.FORMAT_RAW, filters=[pairs])  # no header, none to trust
    return partial(lzma.compress, **raw), lambda data, size: lzma.LZMADecompressor(
        **raw
    ).decompress(data, size)


def split_arrays(
    flat: np.ndarray, shapes: Iterable[tuple[int, ...]]
) -> list[np.ndarray]:  # arrays that lie end to end
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes, strict=True)]


def pack_codes(compressor: str, codes: list[np.ndarray], levels: list[np.ndarray]) -> bytes:
    """COMPRESSOR=ans knows a row's level; every other one gets a bank's rows by rising level (zstd: 7 % less)."""
    if compressor == "ans":
        return ans_encode(codes, levels)
    rows = [
        q.reshape(lv.size, -1)[lv.argsort(axis=None, kind="stable")]
        for q, lv in zip(codes, levels, strict=True)
    ]
    return codec(compressor)[0](b"".join(q.tobytes() for q in rows))


def unpack_codes(
    compressor: str, data: bytes, shapes: list[tuple], levels: list[np.ndarray]
) -> list[np.ndarray]:
    if compressor == "ans":
        return ans_decode(data, shapes, levels)
    rows = np.frombuffer(codec(compressor)[1](data, sum(map(math.prod, shapes))), np.int8)
    places = [lv.argsort(axis=None, kind="stable").argsort() for lv in levels]
    return [
        q.reshape(len(i), -1)[i] for q, i in zip(split_arrays(rows, shapes), places, strict=True)
    ]


ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGLM", 2


def stream_sizes(cfg: Config) -> list[int]:  # raw: codes, levels, scales, floats
    shapes = bank_shapes(cfg).values()
    rows = sum(math.prod(shape[:2]) for shape in shapes)
    return [
        sum(map(math.prod, shapes)),
        rows,
        2 * rows,
        2 * sum(map(math.prod, float_shapes(cfg).values())),
    ]


def fp16_bytes(tensors: Iterable[Tensor]) -> bytes:
    return (
        torch.cat([t.detach().flatten().half() for t in tensors])
        .cpu()
        .numpy()
        .astype("<f2")
        .tobytes()
    )


def pack_artifact(
    model: GPT, packed: dict[str, tuple[Tensor, Tensor]], meta: dict[str, Any]
) -> bytes:
    """The artifact file, equal for equal weights. All numbers little-endian:
        "PGLM", u8 version, u32 length and u32 CRC-32 of the header, the header: zlib-compressed JSON of at most 64 KiB
            {config, compressor, streams: [[raw bytes, stored bytes, CRC-32 of the stored ones], ..], ..meta};
        four streams: codes (int8, each matrix in the order of the parameter table; pack_codes), and with LZMA the level
            of each row (u8, row_levels), scales and floats (fp16), without the rows that nothing reads.
    Names and shapes follow from the config."""
    cfg, codes = model.cfg, [q.numpy() for q, _ in packed.values()]
    levels = [row_levels(q) for q in codes]
    raw = [
        b"".join(lv.tobytes() for lv in levels),
        fp16_bytes(scale for _, scale in packed.values()),
        fp16_bytes(model.get_parameter(n)[-shape[0] :] for n, shape in float_shapes(cfg).items()),
    ]
    stored = [pack_codes(cfg.compressor, codes, levels), *map(codec("lzma")[0], raw)]
    header = {"config": network_config(cfg), "compressor": cfg.compressor, **meta}
    header["streams"] = [
        [n, len(s), zlib.crc32(s)] for n, s in zip(stream_sizes(cfg), stored, strict=True)
    ]
    head = zlib.compress(json.dumps(header, sort_keys=True).encode(), 9)
    numbers = len(head).to_bytes(4, "little") + zlib.crc32(head).to_bytes(4, "little")
    return ARTIFACT_MAGIC + bytes([ARTIFACT_VERSION]) + numbers + head + b"".join(stored)


def config_of_header(
    header: dict[str, Any],
) -> Config:  # of the network an artifact holds; ValueError if none can be
    theirs, defaults = (
        read_network_config(header["config"]),
        Config(artifact_limit_bytes=0, fused_ce=False),
    )
    if any(type(value) is not type(getattr(defaults, f)) for f, value in theirs.items()):
        raise ValueError("a field of another type")
    cfg = dataclasses.replace(defaults, **theirs)
    if any(p.split("=")[0].lower() in theirs for p in cfg.problems()):
        raise ValueError("a field out of range")
    return cfg


def open_artifact(data: bytes, path: Path) -> tuple[dict[str, Any], list[bytes]]:
    """Header and raw streams (codes, levels, scales, floats) of an artifact. Raises UsageError (one line) for whatever
    was not written whole by us, forged with care or not; nothing read is executed, sizes are checked before use."""
    if data[:4] != ARTIFACT_MAGIC:
        raise UsageError(f"{path}: not an artifact of train_gpt.py (starts with {data[:4]!r})")
    if len(data) > 4 and data[4] != ARTIFACT_VERSION:
        raise UsageError(
            f"{path}: container version {data[4]}, this program reads {ARTIFACT_VERSION}"
        )
    at = 13 + int.from_bytes(data[5:9], "little")
    try:
        if len(data) < at or zlib.crc32(data[13:at]).to_bytes(4, "little") != data[9:13]:
            raise ValueError("its header does not match its checksum")
        header = json.loads(zlib.decompressobj().decompress(data[13:at], 1 << 16))
        cfg, (sizes, lengths, checksums) = (
            config_of_header(header),
            zip(*header["streams"], strict=True),
        )
        if (
            list(sizes) != stream_sizes(cfg)
            or sum(sizes) > 1 << 27
            or header["compressor"] not in COMPRESSORS
        ):
            raise ValueError(
                "its streams are not those of its network, or of an unknown compressor"
            )
        ends = np.cumsum([at, *lengths]).tolist()
        stored = [data[start:end] for start, end in zip(ends, ends[1:], strict=False)]
        if ends[-1] != len(data) or [zlib.crc32(s) for s in stored] != list(checksums):
            raise ValueError("a stream does not match its checksum")
        rest, shapes = (
            list(map(codec("lzma")[1], stored[1:], sizes[1:])),
            list(bank_shapes(cfg).values()),
        )
        levels = split_arrays(np.frombuffer(rest[0], np.uint8), [shape[:2] for shape in shapes])
        codes = unpack_codes(header["compressor"], stored[0], shapes, levels)
        streams = [b"".join(q.tobytes() for q in codes), *rest]
        if [len(s) for s in streams] != list(sizes):
            raise ValueError("a stream is shorter than its header says")
    except Exception as error:  # each codec has its own class of errors, and a hostile file may provoke any of them
        reason = (
            str(error).splitlines()[:1] if type(error) is ValueError else [type(error).__name__]
        )
        raise UsageError(f"{path}: damaged: {' '.join(reason)}") from error
    return header, streams


@torch.no_grad()
def load_artifact(
    model: GPT, streams: list[bytes]
) -> None:  # every parameter becomes q * scale or its fp16 value
    shapes, small = bank_shapes(model.cfg), float_shapes(model.cfg)
    codes = split_arrays(np.frombuffer(streams[0], np.int8), shapes.values())
    scales, values = (np.frombuffer(data, "<f2").astype(np.float32) for data in streams[2:])
    scales = split_arrays(scales, [shape[:2] for shape in shapes.values()])
    for name, q, scale in zip(shapes, codes, scales, strict=True):
        p = model.get_parameter(name)
        p.copy_(torch.from_numpy(q * scale[..., None]).view(p.shape))
    for (name, shape), value in zip(
        small.items(), split_arrays(values, small.values()), strict=True
    ):
        model.get_parameter(name)[-shape[0] :] = torch.from_numpy(value)


# === 10. Test-time training: score a chunk, then learn from it, before a deadline =====================================
class Deadline:  # of all evaluation: late, for good, once a step and plain scoring of the targets left may not fit in
    def __init__(self, seconds: float):
        self.end, self.step, self.last, self.rate, self.late = (
            time.monotonic() + seconds,
            0.0,
            math.inf,
            0.0,
            False,
        )

    def near(
        self, targets: float, ranks: Ranks | None = None
    ) -> bool:  # asked before each step, by one rank or by all
        now = time.monotonic()
        self.step, self.last = max(0.9 * self.step, now - self.last), now
        late = (
            self.late or now + 2 * self.step + 2 * self.rate * targets >= self.end
        )  # rate: seconds per plain target
        self.late = any(ranks.gather(late)) if ranks else late
        return self.late


def adapter_update(
    leaf: Tensor,
    master: Tensor,
    grad: Tensor,
    moments: list[Tensor],
    t: Tensor,
    rate: Tensor,
    cfg: Config,
) -> None:
    """Update number `t` of adapters, in place: AdamW (`moments`: second, with TTT_BETA1 > 0 also first) or SGD with
    momentum TTT_BETA1. `master` is fp32; `leaf`, what the forward reads, is the same or its rounding."""
    grad, decay = grad.float(), cfg.ttt_weight_decay
    if cfg.ttt_optimizer == "sgd":
        grad = moments[0].mul_(cfg.ttt_beta1).add_(grad.add(master, alpha=decay))
        master.sub_(rate * grad)
    else:
        second, *first = moments
        second.mul_(cfg.ttt_beta2).addcmul_(grad, grad, value=1 - cfg.ttt_beta2)
        grad = first[0].lerp_(grad, 1 - cfg.ttt_beta1) / (1 - cfg.ttt_beta1**t) if first else grad
        master.mul_(1 - rate * decay).sub_(
            rate * grad / (second / (1 - cfg.ttt_beta2**t)).sqrt_().add_(1e-10)
        )
    if leaf is not master:
        leaf.copy_(master)


def chunk_grid(cfg: Config, longest: int) -> list[tuple[int, int]]:
    """(start, end) of the chunks of every document. The size depends on the place in the document, not on the length of
    the document as in PR #2014: that would tell the model where a document ends (W51)."""
    grid, end = [], 0
    while end < longest:
        size = next((size for upto, size in cfg.short_chunks if end < upto), cfg.ttt_chunk_size)
        grid.append((end, end := end + size))
    return grid


class Adaptation:
    """On one rank (PR #1530): an adapter for each document of a batch, learning chunk by chunk; the model stays as it
    is. A document's scores depend on that document alone, whatever the batch, its order, or the ranks."""

    def __init__(
        self, model: GPT, forward: Callable, plan: tuple[Visit, ...], device: torch.device
    ):
        self.cfg, self.forward, self.plan, self.device, cfg = (
            model.cfg,
            forward,
            plan,
            device,
            model.cfg,
        )
        self.granule = 8 if cfg.compile else 1  # documents at once are a multiple of it: few shapes
        self.split = (
            cfg.ttt_fast and not cfg.compile
        )  # one graph serves documents that learn and those that end
        self.update = torch.compile(adapter_update, dynamic=True) if cfg.compile else adapter_update
        longest, buckets = (
            cfg.ttt_eval_seq_len,
            cfg.ttt_buckets * cfg.ttt_fast,
        )  # longest first: one bucket holds all
        lengths = np.geomspace(longest, min(2 * cfg.ttt_chunk_size, longest), buckets)[::-1]
        self.buckets = [min(-(-int(n) // 16) * 16, longest) for n in lengths]
        self.room, self.warm = (
            1 << 60,
            None,
        )  # tokens that memory holds at once; kept A, its rows in stream order

    @torch.no_grad()
    def begin(
        self, docs: Documents, batch: np.ndarray
    ) -> None:  # new adapters for the documents (n,), longest first
        cfg, rows = self.cfg, -(-len(batch) // self.granule) * self.granule
        self.lengths, starts = (
            np.pad(x[batch], (0, rows - len(batch))) for x in (docs.counts, docs.starts)
        )
        self.counts, self.starts = (
            torch.from_numpy(x[:, None]).to(self.device) for x in (self.lengths, starts)
        )
        self.master, self.updates = LoRA.zeros(cfg, rows, len(self.plan), self.device), 0
        rank = np.append(
            np.argsort(np.argsort(batch)), np.arange(len(batch), rows)
        )  # a row's place in the stream
        self.master.reset(
            cfg.seed, (rank if cfg.ttt_warm_start_a else starts[: len(batch)]).tolist()
        )
        if (
            self.warm is not None and len(self.warm[0]) >= rows
        ):  # by that place: rows go by length, later text's too
            self.master.down.copy_(self.warm[0][self.warm[1][rank]])
        self.warm = (self.master.down, np.argsort(rank)) if cfg.ttt_warm_start_a else None
        self.lora = self.master.over(lambda x: x.to(cfg.dtype))  # the same tensors in fp32
        kept, self.factors = (
            1 + (cfg.ttt_beta1 > 0) * (cfg.ttt_optimizer != "sgd"),
            self.master.factors(cfg.adapter_rate_factors),
        )
        self.moments = [[torch.zeros_like(x) for _ in range(kept)] for x in self.master.leaves]

    def learning(
        self, end: int
    ) -> bool:  # from a chunk that ends there; never by where the document does (W51)
        return self.cfg.ttt_min_doc_len <= end <= (self.cfg.ttt_max_doc_len or math.inf)

    def step(self, ledger: Ledger, start: int, end: int) -> None:
        """Scores the targets start..end-1 of a batch's documents, only then learns; with little memory, few at once."""
        live = int((self.lengths > start).sum()) if self.cfg.ttt_fast else len(self.lengths)
        first, live, tokens = (
            0,
            -(-live // self.granule) * self.granule,
            min(end, self.cfg.ttt_eval_seq_len),
        )
        learners = int((self.lengths > end).sum()) * (
            self.split and self.learning(end)
        )  # others need no gradient
        while first < live:
            stop = learners if first < learners else live
            most = max(self.room // tokens // self.granule * self.granule, self.granule)
            rows = slice(first, first + int(min(stop - first, most)))
            try:
                place, nats, grads = self.score(ledger, start, end, rows)
            except torch.OutOfMemoryError:
                if rows.stop - first <= self.granule:
                    raise
                self.room = tokens * (rows.stop - first) // 2
                continue
            ledger.record(place, nats)  # final from here on
            for again in range(self.cfg.ttt_grad_steps * (len(grads) > 0)):
                ledger.require_scored(place)
                self.learn(
                    self.score(ledger, start, end, rows)[2] if again else grads,
                    rows,
                    self.updates + again + 1,
                )
            first = rows.stop
        self.updates += self.cfg.ttt_grad_steps * self.learning(end)

    def score(
        self, ledger: Ledger, start: int, end: int, rows: slice
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Places and nats (n,) of the targets start..end-1 of these documents, each in a window that ends on the chunk
        grid, with its adapter; and the gradient of the adapters, unless all these documents end here."""
        lora, starts, counts = self.lora.rows(rows), self.starts[rows], self.counts[rows]
        n, c = min(end, self.cfg.ttt_eval_seq_len), end - start
        m = next((bucket for bucket in self.buckets if bucket >= n), n)
        offset = torch.arange(end - n, end - n + m, device=self.device)
        place = torch.where(
            (offset < counts) & (offset < end), starts + offset, ledger.padding_index
        )  # (r, m)
        inside = place != ledger.padding_index
        inputs = torch.where(inside, ledger.tokens[place], 0)
        targets = torch.where(
            inside & (offset >= start),
            ledger.tokens[(place + 1).clamp_max(ledger.padding_index)],
            -1,
        )
        base = torch.arange(0, place.numel(), m, device=self.device)[:, None]
        ends = F.pad(
            torch.cat([base, base + n], 1).flatten(), (0, 1), value=place.numel()
        )  # padding: own segments
        batch = Batch(
            inputs.flatten().long(), targets.flatten().long(), ends.int(), self.cfg.ttt_eval_seq_len
        )
        select = (base + torch.arange(n - c, n, device=self.device)).flatten()
        learns = self.learning(end) and bool(
            (self.lengths[rows] > end).any()
        )  # no document from its last chunk
        with torch.set_grad_enabled(learns or not self.split):
            nats = self.forward(
                batch, self.plan, lora=lora, select=select if self.cfg.ttt_fast else None
            )
        nats, grads = nats if self.cfg.ttt_fast else nats[select], ()
        if learns:
            loss = (nats.view(-1, c).mean(1) * (counts[:, 0] > end)).sum()
            grads = torch.autograd.grad(loss, lora.leaves)
        return place[:, n - c : n].flatten(), nats.detach(), grads

    @torch.no_grad()
    def learn(self, grads: tuple[Tensor, ...], rows: slice, number: int) -> None:
        t, cfg = torch.full((), float(number), device=self.device), self.cfg
        share = min((number - 1) // cfg.ttt_grad_steps / (cfg.ttt_cosine_chunks or math.inf), 1)
        lr = cfg.ttt_lora_lr * max(0.1, 0.5 + 0.5 * math.cos(math.pi * share))
        leaves = zip(
            self.lora.leaves, self.master.leaves, grads, self.moments, self.factors, strict=False
        )
        for leaf, master, grad, moments, factor in leaves:
            mine, about = master[rows], [x[rows] for x in moments]
            self.update(
                mine if leaf is master else leaf[rows], mine, grad, about, t, lr * factor, cfg
            )


def plan_batches(
    docs: Documents, chosen: np.ndarray, cfg: Config, world_size: int = 1
) -> list[np.ndarray]:
    """Documents of like length together, longest first so that no rank waits at the end; many short ones at once, few
    long ones where another rank can take the others. TTT_WARM_START_A: in stream order, as each learns for later."""
    chosen, batches = chosen[docs.counts[chosen] > 0], []
    if not cfg.ttt_warm_start_a:
        chosen = chosen[np.argsort(-docs.counts[chosen], kind="stable")]
    while len(chosen):
        relative, even = (
            docs.counts[chosen[0]] / cfg.ttt_eval_seq_len,
            cfg.ttt_warm_start_a or not cfg.ttt_fast,
        )
        factor = (
            1
            if even or 1 / 8 < relative <= 2
            else 4
            if relative < 1
            else 0.25
            if world_size > 1
            else 1
        )
        batch, chosen = np.split(chosen, [max(1, int(cfg.ttt_batch_size * factor))])
        batches.append(batch[np.argsort(-docs.counts[batch], kind="stable")])
    return batches


def score_then_learn(state: Adaptation, batch: np.ndarray, ledger: Ledger) -> Iterator[int]:
    """Chunk by chunk: scores, only then learns. Yields before each how many targets of a document are scored."""
    state.begin(ledger.docs, batch)
    for start, end in chunk_grid(state.cfg, int(ledger.docs.counts[batch].max())):
        yield start
        state.step(ledger, start, end)


def adapt_documents(
    state: Adaptation, scorer: Scorer, first: int, stop: int, deadline: Deadline
) -> None:
    """Scores the documents first..stop-1 once; the ranks take batches from a shared counter. When the deadline is near,
    a rank scores the rest of its batch, and the batches it takes from there on, without learning."""
    (ledger, cfg, ranks, log), (_, starts, counts) = scorer[2:], scorer.ledger.docs
    batches = plan_batches(ledger.docs, np.arange(first, stop), cfg, ranks.world_size)
    left = np.cumsum([counts[stop:].sum(), *(counts[b].sum() for b in batches[::-1])])[
        ::-1
    ]  # targets from a batch on
    numbers = (
        range(ranks.rank, len(batches), ranks.world_size)
        if cfg.ttt_warm_start_a
        else ranks.tickets()
    )
    for number in takewhile(lambda n: n < len(batches), numbers):
        batch, done = batches[number], 0
        for done in score_then_learn(state, batch, ledger) if not deadline.late else ():
            if deadline.near(
                (counts[batch] - done).clip(0).sum() + left[number + 1] / ranks.world_size
            ):
                break
            if log.due():
                running = "running_loss:{val_loss:.4f} running_bpb:{val_bpb:.4f}".format(
                    **ledger.result()
                )
                log(f"ttt_progress: batch {number + 1}/{len(batches)} {running}")
        rest = [d for d in batch if deadline.late and counts[d] > done]
        for_each = (
            scorer.text_windows(starts[d], counts[d], stride=0, first=starts[d] + done)
            for d in rest
        )
        scorer.score_windows(chain.from_iterable(for_each), shared=False)
        ledger.num_not_learnt_from += len(rest)


def score_documents(
    state: Adaptation, scorer: Scorer, deadline: Deadline
) -> Iterator[tuple[int, list]]:
    """Each document with its own adapter. With PHASED_TTT_NUM_PHASES all weights learn (PR #1626) from the documents up
    to a place in the stream before any document after it is scored: all conditionals belong to the order of the stream,
    where the published queue, longest document first, has another. Yields as score_chunks."""
    cfg, docs, size = scorer.cfg, scorer.ledger.docs, scorer.cfg.ttt_chunk_tokens
    phases = cfg.phased_ttt_num_phases
    bounds = [
        min(cfg.phased_ttt_prefix_docs, len(docs.counts)) * p // phases
        for p in range(1, phases + 1)
    ]
    about = f"rank:{cfg.ttt_lora_rank} lr:{cfg.ttt_lora_lr} chunk:{cfg.ttt_chunk_size}"
    scorer.log(f"ttt_lora:docs:{len(docs.starts)} {about}")
    for first, stop in zip([0, *bounds], [*bounds, len(docs.counts)], strict=True):
        adapt_documents(state, scorer, first, stop, deadline)
        state.warm, places = (
            None,
            docs.target_indices(stop if stop < len(docs.counts) else 0),
        )  # nothing for no one
        starts = range(0, len(places) - size + 1, size)
        yield (
            int(docs.counts[stop:].sum()),
            [(places[i : i + size], i / len(places)) for i in starts],
        )


def score_chunks(scorer: Scorer, deadline: Deadline) -> Iterator[tuple[int, list]]:
    """TTT_MODE=chunk (PR #461, #1413): scores every window of a chunk of the stream; windows that straddle chunks in
    parts, EVAL_STRIDE apart with SLIDING_WINDOW_ENABLED; what is late at once, in plain ones. Yields the targets left,
    and what all weights learn from before the next chunk, after the last nothing: (places, share of the schedule)."""
    size, places, spans = scorer.cfg.ttt_chunk_tokens, scorer.ledger.docs.target_indices(), {}
    for start, score, end in scorer.stream_windows(
        scorer.cfg.eval_stride * scorer.cfg.sliding_window_enabled
    ):
        at = int(np.searchsorted(places, score))
        for k in range(at // size, (at + end - score - 1) // size + 1):
            part = max(score, score + k * size - at), min(end, score + (k + 1) * size - at)
            spans.setdefault(k, []).append((start, *part))
    last = len(spans) - 1
    for k in range(len(spans)):
        scorer.score_windows(spans[k], shared=True)
        chunk, left = places[k * size : (k + 1) * size], places[(k + 1) * size :]
        yield len(left), [(chunk, k / last)] if k < last else []
        if deadline.late and k < last:
            scorer.score_windows(scorer.stream_windows(stride=0, first=left[0]), shared=True)
            scorer.ledger.num_not_learnt_from += scorer.ranks.is_main * (last - k - 1)
            break


def evaluate_ttt(
    scorer: Scorer, state: Adaptation | None, model: GPT, forward: Callable, deadline: Deadline
) -> Ledger:
    """Scores every target once, with adapters `state` or without; in between, SGD on all weights over targets that are
    scored, the rate on a cosine, the same on all ranks. All call it. Afterwards the weights are as before."""
    ranks, cfg, weights = scorer.ranks, scorer.cfg, list(model.parameters())
    kept = [p.detach().clone() for p in weights]
    sgd = torch.optim.SGD(weights, momentum=cfg.ttt_momentum)
    if cfg.ttt_chunk_optimizer == "adam":
        sgd = torch.optim.AdamW(weights, betas=(cfg.beta1, cfg.beta2), weight_decay=0)
    model.requires_grad_(False)  # or a compiled backward would compute the gradients of all weights
    for left, learns in (
        score_documents(state, scorer, deadline) if state else score_chunks(scorer, deadline)
    ):
        for place, share in learns:
            if deadline.near(left / ranks.world_size, ranks):
                scorer.ledger.num_not_learnt_from += ranks.is_main
            else:
                sgd.param_groups[0]["lr"] = 0.5 * cfg.ttt_lr * (1 + math.cos(math.pi * share))
                learn_weights(model, forward, sgd, scorer, place)
        if state:  # each phase starts anew
            sgd.state.clear()
    model.requires_grad_(True)
    torch._foreach_copy_([p.detach() for p in weights], kept)
    return scorer.ledger.join(ranks)


def learn_weights(
    model: GPT, forward: Callable, sgd: torch.optim.Optimizer, scorer: Scorer, place: np.ndarray
) -> None:
    """TTT_EPOCHS passes over the targets `place` (n,) in rows of EVAL_SEQ_LEN, less a rest. Ranks share the rows, one
    without any adds a zero gradient. Layers below TTT_FREEZE_BLOCKS stay as they are."""
    (ledger, cfg, ranks, _), length, tokens = (
        scorer[2:],
        scorer.cfg.eval_seq_len,
        scorer.ledger.docs.tokens,
    )
    ledger.require_scored(torch.from_numpy(place).to(ranks.device), ranks)
    rows, size = (
        place[: len(place) // length * length].reshape(-1, length),
        cfg.ttt_batch_seqs * ranks.world_size,
    )
    model.requires_grad_(True)
    for group in [rows[i : i + size] for i in range(0, len(rows), size)] * cfg.ttt_epochs:
        if len(mine := group[ranks.rank :: ranks.world_size].ravel()):
            begins = np.isin(mine, ledger.docs.starts) & (cfg.data_loader == "documents")
            starts = np.union1d(np.arange(0, len(mine), length), np.flatnonzero(begins))
            shape = len(mine), max(64, 1 << len(starts).bit_length()), length
            row = pack_row(tokens[mine], tokens[mine + 1], starts, shape, ranks.device)
            (forward(row, scorer.plan).sum() / group.size).backward()
        for name, p in model.named_parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if not name.startswith(
                ("tok_", "skip_", "bigram_", "smear_", "ve_")
            ):  # others: by layer, some twice over
                p.grad.unflatten(0, (-1, cfg.num_layers))[:, : cfg.ttt_freeze_blocks] = 0
            ranks.sum(p.grad)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.ttt_grad_clip or math.inf)
        sgd.step()
        model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


# === 11. Entry: the phases of a run, each leaving a file ==============================================================
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
        if type(saved.get("looped", True)) is not bool or {"weights", "streams"} <= saved.keys():
            raise TypeError("fields that no run writes")
        theirs = read_network_config(saved["config"])
        asked = [
            f"{f.upper()}={v}"
            for f, v in theirs.items()
            if origin[f] == "env" and getattr(cfg, f) != v
        ]
        cfg = dataclasses.replace(cfg, **theirs)
        problems = [f"{name}: was made with {', '.join(asked)}"] if asked else cfg.problems()
        if (
            not problems
            and "weights" in saved
            and {n: tuple(w.shape) for n, w in saved["weights"].items()}
            != {n: role.shape for n, role in parameter_table(cfg).items()}
        ):
            problems = [f"{name}: was made with another network than its config says"]
    except (
        OSError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        zlib.error,
        pickle.UnpicklingError,
    ) as error:
        reason = (
            getattr(error, "strerror", None)
            or "neither an artifact nor a checkpoint of train_gpt.py"
        )
        raise UsageError(f"{name}: {reason}") from error
    if problems:
        raise UsageError("\n".join(problems))
    return cfg, saved


def configure_torch(
    cfg: Config,
) -> None:  # how it draws, multiplies and compiles, before anything is built
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high" if cfg.compute_dtype == "bf16" else "highest")
    torch._dynamo.config.recompile_limit = 64  # training, scoring and adaptation share GPT.forward
    torch._dynamo.config.specialize_int = torch._dynamo.config.specialize_float = (
        True  # settings; only sizes vary
    )
    torch.fx.experimental._config.use_duck_shape = (
        False  # each for itself: in warm-up some are equal by chance
    )


def compile_any_size(
    model: nn.Module, cuda_graph: bool
) -> Callable:  # one graph for all sizes of adaptation
    options = {
        "triton.cudagraphs": cuda_graph,
        "triton.mix_order_reduction": False,
    }  # or two: for few tokens
    known = {name: options[name] for name in options if name in torch._inductor.list_options()}
    return torch.compile(model, fullgraph=True, dynamic=True, options=known)


class Run:  # from its data to its report, the same on all ranks; `go` holds the phases in order
    def __init__(
        self, cfg: Config, origin: dict[str, str], ranks: Ranks
    ):  # checks all that can be wrong, on all ranks
        self.cfg, self.ranks, self.saved, self.final, error = (
            cfg,
            ranks,
            {},
            {},
            None,
        )  # saved: EVAL_ONLY_PATH's file
        self.phases, self.inner = [], 0.0
        with self.phase("check", "none"):
            try:
                lines = self.check(origin)
            except UsageError as caught:
                error = str(caught)
            if found := next(
                filter(None, ranks.gather(error)), None
            ):  # or a peer would wait for one that has left
                raise UsageError(found)
            self.decoded = sum(ranks.gather(self.decoded))
        cfg, run_id = (
            self.cfg,
            cfg.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}_{cfg.preset}_seed{cfg.seed}",
        )
        run_id = ranks.gather(run_id)[0]
        self.folder = Path(cfg.artifact_dir or f"runs/{run_id}")
        self.facts = {
            "run_id": run_id,
            "preset": cfg.preset + " shrunk" * cfg.shrink,
            "seed": cfg.seed,
            "world_size": ranks.world_size,
            "device": torch.cuda.get_device_name()
            if ranks.device.type == "cuda"
            else f"CPU, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "dataset": cfg.dataset_dir.name,
            "code_sha256": CODE_SHA256,
            "file_sha256": hashlib.sha256(SOURCE).hexdigest(),
            "code_bytes": CODE_BYTES,
            "attention": self.backend,
            "val_docs": len(self.docs.counts),
            "tokenizer_sha256": self.tokenizer.sha256,
            "val_sha256": hashlib.sha256(
                self.docs.joined_tokens().astype("<u2").tobytes()
            ).hexdigest(),
        }
        lines += self.resume(log := Path(f"logs/{run_id}.txt"))
        self.log = Log(
            log,
            ranks.is_main,
            ranks.live,
            cfg.tensorboard_dir and f"{cfg.tensorboard_dir}/{run_id}",
        )
        self.sentinel, self.graphs = CompilationCounter(self.log), {}
        self.log(TEXT * (not self.kept) + "\nHyperparameters:", terminal=False)
        for field, value in sorted(dataclasses.asdict(cfg).items()):
            self.log(f"  {field}: {value} ({origin[field]})", terminal=origin[field] == "env")
        self.log("\n".join([*(f"{key}: {value}" for key, value in self.facts.items()), *lines]))
        for warning in cfg.warnings():
            self.log(f"warning: {warning}")

    def check(
        self, origin: dict[str, str]
    ) -> list[str]:  # sets what the phases need, returns lines for the log
        if self.cfg.eval_only_path:
            self.cfg, self.saved = load_model_file(self.cfg, origin)
        cfg, ranks = self.cfg, self.ranks
        if not self.saved and ranks.world_size > cfg.rows_per_step:
            raise UsageError(
                f"WORLD_SIZE={ranks.world_size}: must be at most {cfg.rows_per_step}, the rows of a step"
            )
        splits = (
            ["val"] if "streams" in self.saved else ["val", "train"]
        )  # no data is an error before no tokenizer
        self.streams = {split: TokenStream(cfg.dataset_dir, split) for split in splits}
        self.tokenizer = Tokenizer.load(cfg)
        if self.saved.get("tokenizer", self.tokenizer.sha256) != self.tokenizer.sha256:
            raise UsageError(
                f"EVAL_ONLY_PATH={cfg.eval_only_path}: {self.tokenizer.path} is not its tokenizer"
            )
        check_shards(cfg, self.tokenizer, ranks, self.streams)
        self.docs = Documents.load(self.streams["val"], self.tokenizer.bos_id, cfg)
        self.table, self.decoded = check_bytes(self.tokenizer, self.docs, ranks)
        self.backend, lines = choose_attention(cfg.attention_backend, ranks.device, cfg.dtype)
        return lines + [
            f"{name}_shards: {len(s.paths)} {name}_tokens: {s.size}"
            for name, s in self.streams.items()
        ]

    def resume(self, log: Path) -> list[str]:
        """Sets `kept`, the newest whole checkpoint of this run, rank 0's on all ranks; empty if there is none: then a
        new log begins. Returns lines for it. UsageError if it has a result, or all are damaged or another run's."""
        facts = {key: self.facts[key] for key in ("code_sha256", "tokenizer_sha256", "val_sha256")}
        facts["tokens"] = sum(stream.size for stream in self.streams.values())
        self.made = {
            k: v for k, v in dataclasses.asdict(self.cfg).items() if k not in FREE_FIELDS
        } | facts
        kept, lines = {}, []
        if self.ranks.is_main:
            over = log.exists() and re.search(rb"^final .*\n", log.read_bytes(), re.M)
            lines = [f"RUN_ID={self.cfg.run_id}: {log} has its result already"] if over else []
            for part in (
                self.folder.glob("*.part") if self.cfg.checkpoint_every else ()
            ):  # of a killed run
                part.unlink()
            for path in (
                self.folder.glob("checkpoint.[01].pt")
                if self.cfg.checkpoint_every and not over
                else ()
            ):
                data = path.read_bytes()
                whole, other = hashlib.sha256(data[32:]).digest() == data[:32], ["damaged"]
                if whole:
                    state = torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)
                    other = [
                        f"made with {k}={v}"
                        for k, v in state["made"].items()
                        if self.made.get(k, v) != v
                    ]
                lines += [f"{path}: refused: {', '.join(other)}"] * bool(other)
                kept = kept if other else max(kept, state, key=lambda s: s.get("number", -1))
        self.kept, lines = self.ranks.gather((kept, lines))[0]  # nodes may not share folders
        if lines and not self.kept:
            raise UsageError("\n".join(lines))
        if self.ranks.is_main and not self.kept and log.exists():  # of a run that did not end
            log.replace(f"{log}.old")
        self.final, self.phases = (
            self.kept.get("final", {}),
            self.phases + self.kept.get("phases", []),
        )
        if self.kept:
            self.final["resumed"] = self.final.get("resumed", 0) + 1
            lines.append(f"resumed: from checkpoint {self.kept['number']}")
        return lines

    def keep(self, **state: Any) -> None:  # a checkpoint, in place of the one before the last
        if self.cfg.checkpoint_every:
            self.kept = {"number": self.kept.get("number", -1) + 1}
            spent = [phase for phase in self.phases if phase[1] != "none"]
            state |= {**self.kept, "made": self.made, "phases": spent, "final": self.final}
            torch.save(state, data := io.BytesIO())
            if self.ranks.is_main:
                path, data = (
                    self.folder / f"checkpoint.{self.kept['number'] % 2}.pt",
                    data.getvalue(),
                )
                write_atomic(path, hashlib.sha256(data).digest() + data)

    @contextlib.contextmanager
    def phase(
        self, name: str, budget: str
    ) -> Iterator[None]:  # times, against a budget, less phases within it
        outer, self.inner, start = self.inner, 0.0, self.ranks.now()
        if name != "check":  # which comes before the log
            self.log.show(f"{name} ..")
        yield
        seconds = self.ranks.now() - start
        self.phases.append((name, budget, seconds - self.inner))
        self.inner = outer + seconds

    def go(
        self,
    ) -> dict[str, Any]:  # each phase leaves a file before the next begins; returns the figures
        cfg, saved, path = self.cfg, self.saved, Path(self.cfg.eval_only_path)
        configure_torch(cfg)
        self.model = GPT(cfg, self.backend).to(self.ranks.device)
        self.forward = (
            torch.compile(self.model, fullgraph=True, dynamic=False) if cfg.compile else self.model
        )
        graphs = cfg.ttt_cuda_graph and self.backend != "sdpa"  # which asks the host
        both = self.forward, compile_any_size(self.model, graphs) if cfg.compile else self.model
        self.scoring, self.ttt_forward = (
            partial(f, temperature=cfg.logit_temperature) for f in both
        )
        self.log(f"model_params:{sum(p.numel() for p in self.model.parameters())}")
        start = saved or self.kept
        looped = start.get("looped", cfg.num_loops > 0 and cfg.enable_looping_at < 1)
        with self.phase("warm-up", "none"):
            reserve = self.warm_up(cfg.plans[looped])
        if "weights" in start:
            self.model.load_state_dict(start["weights"])
        elif not saved:
            with self.phase("train", "train"):
                looped = train(self, reserve)
            self.keep(weights=self.model.state_dict(), looped=looped)
        self.plan = cfg.plans[looped]
        if "streams" not in saved:
            path = self.folder / "final_model.int6.ptz"
            if "packed" not in start:
                self.compress(path, {"looped": looped, "tokenizer": self.tokenizer.sha256})
                self.keep(weights=self.model.state_dict(), looped=looped, packed=True)
            self.score("diagnostic pre-quantization post-ema", "none", self.evaluate)
        self.reload(path)
        deadline = Deadline(
            cfg.eval_deadline_seconds - cfg.eval_budget_includes_compile * self.eval_warm_up
        )
        self.score("diagnostic quantized", "eval", self.evaluate)
        deadline.rate = self.phases[-1][2] * self.ranks.world_size / self.docs.counts.sum()
        if cfg.sliding_window_enabled:
            self.score(
                "diagnostic quantized_sliding_window",
                "eval",
                partial(self.evaluate, cfg.eval_stride),
            )
        if cfg.ttt_enabled:
            self.score("quantized_ttt_lora", "eval", partial(self.adapt, deadline))
        return self.report()

    def warm_up(
        self, last: tuple[Visit, ...]
    ) -> float:  # synthetic tokens, undone; the seconds to keep after training
        cfg, ranks, reserve, trains = (
            self.cfg,
            self.ranks,
            0.0,
            not self.saved and "weights" not in self.kept,
        )
        calibrates = cfg.quantizer == "allocated" and not (
            "streams" in self.saved or "packed" in self.kept
        )
        plans = sorted({cfg.plans[0], last}, key=len) if trains else [last]
        self.optimizers, row = (
            Optimizers(self.model, cfg, ranks),
            synthetic_row(cfg, cfg.row_shape, ranks.device),
        )
        with state_restored(self.model, self.optimizers):
            for step in range(cfg.warmup_steps * (trains or calibrates)):
                for plan in plans:
                    accumulate_gradients(self.forward, plan, [row], cfg.micro_batch_tokens)
                    if trains:
                        self.optimizers.step(1.0, cfg.muon_momentum)
                self.log(f"warmup_step: {step + 1}/{cfg.warmup_steps}")
            measured = trains and cfg.gptq_reserve_seconds < 0 and cfg.wallclock < math.inf
            for _ in range(2 * measured):  # cold, then timed
                start = ranks.now()
                calibration = self.calibrate(last, [row])
                middle, rows = ranks.now(), -(-cfg.gptq_calibration_batches // ranks.world_size)
                solver = Quantizer(self.model, *calibration, ranks)
                fit_artifact(solver, self.model, {}, self.log, rounds=1)
                rounds = (
                    4 if 0 < cfg.artifact_limit_bytes < 1.2 * solver.finest else 1
                )  # a fit has taken up to four
                reserve = 1.0 + 1.25 * (rows * (middle - start) + rounds * (ranks.now() - middle))
            if cfg.warmup_steps:  # documents of random tokens, in every length of a window
                count = cfg.ttt_eval_seq_len + cfg.ttt_chunk_size
                starts = np.arange(0, max(2 * cfg.ttt_chunk_tokens, cfg.val_row_shape[0]), count)
                tokens = np.random.default_rng(0).integers(
                    0, cfg.vocab_size, count * len(starts) + 1
                )
                self.plan, docs = last, Documents(tokens, starts, np.full(len(starts), count))
                self.log.prefix = "warmup: "  # what it scores are random tokens
                for plan in (
                    plans if cfg.val_loss_every else [last]
                ):  # validation may come before the loops
                    start = ranks.now()
                    self.evaluate(plan=plan, docs=docs, ranks=ranks.alone())
                if cfg.ttt_enabled:
                    self.adapt(Deadline(math.inf), docs, ranks.alone())
                self.log.prefix = ""
                self.log("warmup:done (random tokens, no validation data)")
            self.eval_warm_up = ranks.now() - start if cfg.warmup_steps else 0.0
        if (
            trains and cfg.cuda_graph and ranks.device.type == "cuda" and self.backend != "sdpa"
        ):  # sdpa asks the host
            self.optimizers.keep_gradients, pool = True, torch.cuda.graph_pool_handle()
            for p in self.model.parameters():
                p.grad = torch.zeros_like(p)
            self.graphs = {plan: capture_row(self.forward, plan, row, pool) for plan in plans}
            self.model.zero_grad(set_to_none=False)
        self.sentinel = CompilationCounter(self.log)  # of what is compiled from here on
        fastest_tile.measures = not cfg.warmup_steps
        reserve = (
            max(ranks.gather(reserve)) if cfg.gptq_reserve_seconds < 0 else cfg.gptq_reserve_seconds
        )
        if trains and cfg.wallclock < 2 * reserve:
            raise UsageError(
                f"MAX_WALLCLOCK_SECONDS={cfg.wallclock:g}: compression needs {reserve:.1f} s"
            )
        self.log(
            f"gptq:reserving {reserve:.1f}s, effective={1000 * (cfg.wallclock - reserve):.0f}ms"
        )
        return reserve

    def check_compiled(self, count: float) -> None:  # of all ranks, since warm-up
        self.final["recompilations"] = int(count)
        if 0 <= self.cfg.recompile_limit < count:
            raise RunStopped(
                f"RECOMPILE_LIMIT={self.cfg.recompile_limit}: {count:.0f} compilations after warm-up"
            )

    def save(self, name: str, weights: dict[str, Tensor], step: int, looped: bool) -> None:
        saved = {"config": network_config(self.cfg), "looped": looped, "step": step}
        saved |= {
            "tokenizer": self.tokenizer.sha256,
            "weights": {k: v.detach().cpu() for k, v in weights.items()},
        }
        torch.save(saved, buffer := io.BytesIO())
        if self.ranks.is_main:
            write_atomic(self.folder / name, buffer.getvalue())
        self.log(f"Serialized model: {buffer.tell()} bytes in {self.folder / name}")

    def calibrate(
        self, plan: tuple[Visit, ...], rows: list[Batch]
    ) -> tuple[dict | None, dict | None]:
        model, ranks, allocated = self.model, self.ranks, self.cfg.quantizer == "allocated"
        hessians = None if self.cfg.no_hessians else collect_hessians(model, plan, rows, ranks)
        return hessians, collect_sensitivities(
            self.forward, model, plan, rows, hessians, ranks
        ) if allocated else None

    def compress(self, path: Path, meta: dict[str, Any]) -> None:
        budget = "none" if self.saved else "train"
        with self.phase("calibrate", budget):
            loader = PackedLoader(
                self.streams["train"], self.tokenizer.bos_id, self.cfg, self.ranks
            )
            rows, _ = loader.rows(0 if self.cfg.no_hessians else self.cfg.gptq_calibration_batches)
            calibration = self.calibrate(self.plan, rows)
        self.log(
            f"GPTQ:collected {len(calibration[0] or ())} Hessians for {len(quantised_matrices(self.cfg))} matrices"
        )
        with self.phase("quantise", budget):
            if self.cfg.prune_frac:
                prune(self.model)
            solver = Quantizer(self.model, *calibration, self.ranks)
        with self.phase("pack", budget):
            data = fit_artifact(solver, self.model, meta, self.log)
            if self.ranks.is_main:
                write_atomic(path, data)

    def reload(self, path: Path) -> None:
        data = self.ranks.gather(path.read_bytes() if self.ranks.is_main else None)[
            0
        ]  # nodes may not share folders
        header, streams = open_artifact(data, path)
        load_artifact(self.model, streams)
        counts, total = np.bincount(np.frombuffer(streams[0], np.uint8)), len(data) + CODE_BYTES
        bound = int(
            sum(-n * math.log2(n / counts.sum()) / 8 for n in counts if n)
        )  # order-0 entropy
        self.final |= {
            "model_bytes": len(data),
            "artifact_bytes": total,
            "codes_bytes": header["streams"][0][1],
        }
        self.final |= {
            "codes_entropy_bytes": bound,
            "artifact_sha256": hashlib.sha256(data).hexdigest(),
        }
        self.log(
            f"Code size (uncompressed): {CODE_BYTES} bytes; model {len(data)}, its codes' entropy {bound}"
        )
        over = f", {total - LIMIT_BYTES} OVER THE LIMIT" if total > LIMIT_BYTES else ""
        self.log(f"Total submission size quantized+{header['compressor']}: {total} bytes{over}")

    def scorer(
        self, plan: tuple[Visit, ...], docs: Documents | None, ranks: Ranks | None
    ) -> Scorer:
        ledger = Ledger(docs or self.docs, self.table, self.ranks.device)
        return Scorer(self.scoring, plan, ledger, self.cfg, ranks or self.ranks, self.log)

    def evaluate(
        self,
        stride: int = 0,
        plan: tuple[Visit, ...] | None = None,
        docs: Documents | None = None,
        ranks: Ranks | None = None,
    ) -> Ledger:
        self.model.requires_grad_(
            False
        )  # as in evaluate_ttt: or what the deadline leaves would compile once more
        ledger = score_all(self.scorer(plan or self.plan, docs, ranks), stride)
        self.model.requires_grad_(True)
        return ledger

    def adapt(
        self, deadline: Deadline, docs: Documents | None = None, ranks: Ranks | None = None
    ) -> Ledger:
        scorer, mode = self.scorer(self.plan, docs, ranks), self.cfg.ttt_mode
        state = (
            Adaptation(self.model, self.ttt_forward, self.plan, self.ranks.device)
            if mode == "document"
            else None
        )
        return evaluate_ttt(scorer, state, self.model, self.ttt_forward, deadline)

    def score(self, label: str, budget: str, evaluation: Callable[[], Ledger]) -> None:
        """Times an evaluation, logs its result in the field's template, keeps it. InvalidScore if a rule was broken."""
        key = label.removeprefix("diagnostic ").split()[0].replace("-", "_")
        with self.phase(f"score {key}", budget):
            ledger = evaluation()
        self.check_compiled(sum(self.ranks.gather(self.sentinel.poll())))
        problems, held = (
            ledger.problems(self.decoded),
            (len(self.docs.starts), self.streams["val"].size, self.decoded),
        )
        known = (
            CANONICAL.get(self.cfg.dataset_dir.name, held)
            if self.cfg.val_doc_fraction == 1
            else held
        )
        if problems or any(abs(n - m) > 1e-4 * m for n, m in zip(held, known, strict=True) if m):
            reasons = problems or [
                f"(documents, tokens, bytes) are {held}, in the field's data set {tuple(known)}"
            ]
            raise InvalidScore(f"{label} INVALID: {'; '.join(reasons)}")
        (loss, bpb, tokens, num_bytes), seconds = ledger.result().values(), self.phases[-1][2]
        self.log(f"{label} val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{1000 * seconds:.0f}ms")
        self.log.scalars(self.final.get("steps", 0), {f"val_bpb/{key}": bpb})
        if ledger.num_not_learnt_from:
            self.log(
                f"deadline: {ledger.num_not_learnt_from} of them scored without learning from them"
            )
        self.final |= {f"{key}_loss": loss, f"{key}_bpb": bpb, "val_loss": loss, "val_bpb": bpb}
        self.final |= {"val_tokens": tokens, "val_bytes": num_bytes}
        if self.ranks.is_main:
            write_atomic(self.folder / "scores.json", json.dumps(self.final, indent=1).encode())
            np.savez(buffer := io.BytesIO(), **ledger.by_document())
            write_atomic(self.folder / "documents.npz", buffer.getvalue())

    def report(
        self,
    ) -> dict[
        str, Any
    ]:  # the table of phases and budgets, then the one line that starts with `final`
        self.log(f"{'phase':<34}{'seconds':>9}  counts against")
        for name, budget, seconds in self.phases:
            self.log(f"{name:<34}{seconds:>9.1f}  {budget}")
        for budget, limit in (("train", self.cfg.max_wallclock_seconds), ("eval", 600.0)):
            spent = sum(seconds for _, b, seconds in self.phases if b == budget)
            self.log(
                f"{'all of ' + budget:<34}{spent:>9.1f}  of {limit:.0f}"
                + ", OVER" * (0 < limit < spent)
            )
        if (val := self.tokenizer.manifest.get("splits", {}).get("val", {})).get("gzip_bytes"):
            self.final["gzip_bpb"] = 8 * val["gzip_bytes"] / val["bytes"]
            self.log(f"for scale, gzip -9 of each document: val_bpb:{self.final['gzip_bpb']:.4f}")
        if self.ranks.device.type == "cuda":
            self.final["peak_memory_mib"] = torch.cuda.max_memory_allocated() >> 20
            self.log(f"peak memory allocated: {self.final['peak_memory_mib']} MiB")
        seconds = {
            name: sum(s for n, _, s in self.phases if n == name) for name, *_ in self.phases
        }  # some come often
        self.final |= {**self.facts, "seconds": {name: round(s, 3) for name, s in seconds.items()}}
        self.log("final " + json.dumps(self.final, sort_keys=True))
        return self.final


# === 12. Kernels: MLP, cross-entropy, norm and RoPE, XSA, each beside a plain reference ===
HEAD_TILES = [(32, 8), (32, 4), (16, 4), (64, 8)]  # heads, warps
TILES = {
    "mlp_up": [(128, 256, 64), (128, 128, 64)],
    "mlp_dpre": [(128, 256, 64), (128, 128, 64)],  # tokens, hidden, summed
    "ce": [(8192, 16), (8192, 8), (4096, 8), (1024, 4)],  # columns at once, warps
    "qk": HEAD_TILES,
    "qk_backward": HEAD_TILES,
    "xsa": HEAD_TILES,
    "xsa_backward": HEAD_TILES,
}
chosen: dict[tuple, tuple] = {}  # (kernel, ..shape) -> tile


def fastest_tile(kernel: str, rows: int, shape: tuple, launch: Callable[[tuple], None]) -> tuple:
    """The tile of TILES[kernel] with which launch(tile) is fastest on this GPU: measured once per shape, with many rows
    (few fill no GPU: the first tile), kept beside Triton's compiled kernels. Warm-up comes here before a CUDA graph."""
    key = (kernel, *shape)
    if key not in chosen and rows >= 2**14 and fastest_tile.measures:
        about = str((key, TILES[kernel], torch.cuda.get_device_name(), triton.__version__))
        path = (
            Path(triton.knobs.cache.dir)
            / f"tile-{hashlib.sha256(about.encode()).hexdigest()[:32]}.json"
        )
        if not path.is_file():
            times = [
                triton.testing.do_bench(partial(launch, tile), warmup=5, rep=20)
                for tile in TILES[kernel]
            ]
            best, own = TILES[kernel][int(np.argmin(times))], path.with_suffix(f".{os.getpid()}")
            write_atomic(own, json.dumps(best).encode())
            with contextlib.suppress(
                OSError
            ):  # the first of all ranks decides: other tiles round sums otherwise
                os.link(own, path)
            own.unlink()
        chosen[key] = tuple(json.loads(path.read_text())) if path.is_file() else best
    return chosen.get(key, TILES[kernel][0])


fastest_tile.measures = True  # until warm-up is over


def define_operator(
    name: str, reference: Callable, kernel: Callable, fake: Any = None, changes: tuple = ()
) -> Any:
    def on_gpu(x: Tensor, *args: Any) -> Any:  # the kernels sum in fp32
        fits = triton is not None and x.element_size() <= 4 and x.numel() > 0
        return (kernel if fits else reference)(x, *args)

    op = torch.library.custom_op(f"golf::{name}", reference, mutates_args=changes)
    op.register_kernel("cuda", on_gpu)
    op.register_fake(fake or reference)
    return op


def launch_heads(kernel: Any, name: str, args: list, rows: int, tile: tuple, **shape: Any) -> None:
    """kernel(*args, rows, ..): `rows` heads of D values, tile[0] of them to a program."""

    def launch(tile: tuple) -> None:
        block = dict(ROWS=tile[0], COLS=triton.next_power_of_2(shape["D"]), num_warps=tile[1])
        kernel[(triton.cdiv(rows, tile[0]),)](*args, rows, **shape, **block)

    launch(tile or fastest_tile(name, rows, (*shape.values(), args[0].dtype), launch))


# --- Fused MLP: out = leaky_relu(x @ w_up.T)^2 @ w_down.T for x (T, C), w_up (F, C), w_down (C, F). ---
# PR #1530; after modded-nanogpt. Both products with an activation epilogue are operators: PyTorch, or Triton on Hopper.
@jit
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
    for tile in tl.range(
        tl.program_id(0), row_blocks * col_blocks, tl.num_programs(0), flatten=True
    ):
        i, j = tl.swizzle2d(tile // col_blocks, tile % col_blocks, row_blocks, col_blocks, 8)
        row, col = i * BM, j * 2 * BH
        acc = tl.zeros((BM, 2 * BH), tl.float32)
        for k in range(0, a.shape[1], a.block_shape[1]):
            b = (
                w.load([k, col]) if BACKWARD else w.load([col, k]).T
            )  # as stored: no transposed copy
            acc = tl.dot(a.load([row, k]), b, acc)
        halves = tl.split(tl.permute(tl.reshape(acc.to(out.dtype), (BM, 2, BH)), (0, 2, 1)))
        for h in tl.static_range(2):
            half, at = halves[h], [row, col + h * BH]
            z = 2 * pre.load(at) if BACKWARD else half
            out.store(at, half * tl.where(z > 0, z, SLOPE * SLOPE * z))
            if not BACKWARD:
                pre.store(at, half)


def launch_mlp(
    a: Tensor,
    w: Tensor,
    pre: Tensor,
    out: Tensor,
    programs: int,
    backward: bool,
    tile: tuple,
    slope: float = MLP_SLOPE,
) -> None:
    """Fills `out` (forward also `pre`) with at most that many persistent programs. T must not be 0; a new T compiles
    nothing. Descriptors are made per call (a cache would keep activations alive), never in a replayed CUDA graph.
    Shared memory, of 227 KB: forward 224 (4 stages), backward with its staged `pre` 208 (3 stages)."""
    bm, bn, bk = tile
    boxes = [bm, bk], [bk, bn] if backward else [bn, bk], [bm, bn // 2], [bm, bn // 2]
    args = [
        TensorDescriptor(t, t.shape, t.stride(), box)
        for t, box in zip((a, w, pre, out), boxes, strict=True)
    ]
    grid = (min(programs, triton.cdiv(out.shape[0], bm) * triton.cdiv(out.shape[1], bn)),)
    mlp_kernel[grid](
        *args, BACKWARD=backward, SLOPE=slope, num_warps=8, num_stages=3 if backward else 4
    )


def mlp_up_reference(x: Tensor, w_up: Tensor, slope: float = MLP_SLOPE) -> tuple[Tensor, Tensor]:
    pre = F.linear(x, w_up)
    return pre, leaky_relu_sq(pre, slope)


def mlp_dpre_reference(dy: Tensor, w_down: Tensor, pre: Tensor, slope: float = MLP_SLOPE) -> Tensor:
    return (
        (dy @ w_down).mul_(F.leaky_relu(pre, slope**2)).mul_(2)
    )  # 1/12 of torch.where's time on a CPU in bf16


def mlp_cuda(a: Tensor, w: Tensor, pre: Tensor | None = None, slope: float = MLP_SLOPE) -> Any:
    """Either operator; the reference off Hopper, for dtypes that have not two bytes, or without TMA's alignment."""
    backward, gpu = pre is not None, torch.cuda.get_device_properties(a.device)
    hidden, inputs = (w.shape[1], (a, w, pre)) if backward else (w.shape[0], (a, w))
    fits = (
        triton is not None
        and gpu.major == 9
        and a.dtype in (torch.bfloat16, torch.float16)
        and len(a) > 0
    )
    rows = (
        (t.dtype == a.dtype, t.stride(1) == 1, t.stride(0) % 8 == 0, t.data_ptr() % 16 == 0)
        for t in inputs
    )
    if not (fits and hidden % 8 == 0 and all(map(all, rows))):
        return mlp_dpre_reference(*inputs, slope) if backward else mlp_up_reference(*inputs, slope)
    pre, out = pre if backward else a.new_empty(len(a), hidden), a.new_empty(len(a), hidden)
    launch = partial(launch_mlp, a, w, pre, out, gpu.multi_processor_count, backward, slope=slope)
    launch(
        fastest_tile(
            "mlp_dpre" if backward else "mlp_up", len(a), (hidden, a.size(1), a.dtype), launch
        )
    )
    return out if backward else (pre, out)


mlp_up = define_operator(
    "mlp_up", mlp_up_reference, lambda x, w_up, slope=MLP_SLOPE: mlp_cuda(x, w_up, slope=slope)
)
mlp_dpre = define_operator("mlp_dpre", mlp_dpre_reference, mlp_cuda)


class FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, w_up: Tensor, w_down: Tensor, pre: Tensor, post: Tensor, slope: float
    ) -> Tensor:
        ctx.slope, (_, need_up, need_down, *_) = (
            slope,
            ctx.needs_input_grad,
        )  # a frozen weight keeps nothing alive
        ctx.save_for_backward(
            x if need_up else None, w_up, w_down, pre, post if need_down else None
        )
        return F.linear(post, w_down)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w_up, w_down, pre, post = ctx.saved_tensors
        need_x, need_up, need_down, *_ = ctx.needs_input_grad
        dpre = mlp_dpre(dy, w_down, pre, ctx.slope) if need_x or need_up else None
        dx, dw_up = dpre @ w_up if need_x else None, dpre.t() @ x if need_up else None
        return dx, dw_up, dy.t() @ post if need_down else None, None, None, None


def fused_mlp(
    x: Tensor, w_up: Tensor, w_down: Tensor, slope: float = MLP_SLOPE
) -> tuple[Tensor, Tensor]:
    """out (T, C), and post (T, F) without gradient."""
    pre, post = mlp_up(
        x.detach(), w_up.detach(), slope
    )  # outputs of FusedMLP would have autograd fill zeros for post
    return FusedMLP.apply(x, w_up, w_down, pre, post, slope), post


def plain_mlp(
    x: Tensor, w_up: Tensor, w_down: Tensor, slope: float = MLP_SLOPE
) -> tuple[Tensor, Tensor]:  # the same
    post = leaky_relu_sq(F.linear(x, w_up), slope)
    return F.linear(post, w_down), post


# --- Head and softcapped cross-entropy: nats of logits cap * tanh(z / cap), z = x w^T (N, V), in fp32 (W16). ---
# |logits| <= cap <= 75 bounds a sum of 65,536 exponentials: no running maximum. d nats / d z replaces z in the forward,
# so its gradient scales rows of x and dx (N, C), not of z: the backward is two products and no other pass over z.
@jit
def softcap(
    z, cap
):  # cap * tanh(z / cap) and its derivative; exp of a negative number keeps both exact near 0
    m = tl.exp(tl.abs(z) * (-2.0 / cap))
    r = 1.0 / (1.0 + m)
    return cap * tl.where(z < 0, -1.0, 1.0) * (1.0 - m) * r, 4.0 * m * r * r


@jit
def softcap_ce_kernel(
    z, targets, nats, cap, V: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """A row per program. With V <= BLOCK all of it is read, and its two exponentials computed, once."""
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    target, z = tl.load(targets + row), z + row.to(tl.int64) * V
    c, slope = softcap(tl.load(z + cols, cols < V, other=0.0).to(tl.float32), cap)
    sums = tl.where(cols < V, tl.exp(c), 0.0)
    for start in range(BLOCK, V, BLOCK):
        c, slope = softcap(
            tl.load(z + start + cols, start + cols < V, other=0.0).to(tl.float32), cap
        )
        sums += tl.where(start + cols < V, tl.exp(c), 0.0)
    score, _ = softcap(
        tl.load(z + tl.maximum(target, 0)).to(tl.float32), cap
    )  # before the barrier of the sum:
    total, keep = (
        tl.sum(sums, 0),
        tl.where(target >= 0, 1.0, 0.0),
    )  # after it, other warps overwrite z
    tl.store(nats + row, keep * (tl.log(total) - score))
    if GRADIENT:
        for start in range(0, V, BLOCK):
            if V > BLOCK:
                c, slope = softcap(
                    tl.load(z + start + cols, start + cols < V, other=0.0).to(tl.float32), cap
                )
            dz = (tl.exp(c) * (keep / total) - tl.where(start + cols == target, 1.0, 0.0)) * slope
            tl.store(z + start + cols, dz.to(z.dtype.element_ty), start + cols < V)


def softcap_ce_reference(z: Tensor, targets: Tensor, cap: float, gradient: bool) -> Tensor:
    """Nats (N,), fp32 or better, 0 where the target is -1. With `gradient`, z (N, V) becomes d nats / d z."""
    nats = z.new_empty(len(z), dtype=torch.promote_types(z.dtype, torch.float32))
    count = (2**17 if z.is_cpu else 2**28) // z.size(
        1
    ) + 1  # rows at a time: 512 KB stay in a core's cache
    for rows, target, out in zip(
        z.split(count), targets.split(count), nats.split(count), strict=True
    ):
        t, keep, target = (
            torch.tanh(rows.to(out.dtype) / cap),
            target >= 0,
            target.clamp_min(0).unsqueeze(1),
        )
        p = (t * cap).exp_()
        total = p.sum(-1, keepdim=True)
        out.copy_((total.log() - cap * t.gather(1, target)).squeeze(1) * keep)
        if gradient:
            p.div_(total).scatter_add_(1, target, p.new_full((), -1.0).expand_as(target))
            rows.copy_(p.mul_(t.square_().neg_().add_(1)).mul_(keep.unsqueeze(1)))
    return nats


def softcap_ce_cuda(
    z: Tensor, targets: Tensor, cap: float, gradient: bool, tile: tuple = ()
) -> Tensor:
    assert z.is_contiguous(), z.stride()
    (N, V), nats = z.shape, z.new_empty(len(z), dtype=torch.float32)

    def launch(z: Tensor, tile: tuple) -> None:
        softcap_ce_kernel[(N,)](
            z, targets.contiguous(), nats, cap, V, gradient, BLOCK=tile[0], num_warps=tile[1]
        )

    launch(
        z,
        tile or fastest_tile("ce", N, (V, z.dtype, gradient), lambda tile: launch(z.clone(), tile)),
    )
    return nats


softcap_ce = define_operator(
    "softcap_ce",
    softcap_ce_reference,
    softcap_ce_cuda,
    lambda z, *_: z.new_empty(z.size(0), dtype=torch.promote_types(z.dtype, torch.float32)),
    ("z",),
)


def head_product(x: Tensor, w: Tensor, extra: Tensor | None) -> Tensor:
    return F.linear(x, w) if extra is None else F.linear(x, w) + extra


class HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, w: Tensor, extra: Tensor | None, targets: Tensor, cap: float
    ) -> Tensor:
        nats = softcap_ce(z := head_product(x, w, extra), targets, cap, True)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w, z)
        return nats

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, w, dz), g, (need_x, need_w, need_extra, *_) = (
            ctx.saved_tensors,
            g.unsqueeze(1),
            ctx.needs_input_grad,
        )
        dx = (dz @ w * g).to(w.dtype) if need_x else None
        dw = dz.t() @ (x * g).to(w.dtype) if need_w else None
        return dx, dw, (dz * g).to(w.dtype) if need_extra else None, None, None


def head_loss(
    x: Tensor, w: Tensor, extra: Tensor | None, targets: Tensor, cap: float, fused: bool
) -> Tensor:
    """Nats (N,) of the targets, 0 where -1, from x (N, C), w (V, C) and what an adapter adds to the product (N, V)."""
    if (
        fused
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (x, w, extra))
    ):
        return HeadLoss.apply(x, w, extra, targets, cap)
    z = head_product(x, w, extra)
    if fused:
        return softcap_ce(z, targets, cap, False)
    logits = cap * torch.tanh(z.to(torch.promote_types(z.dtype, torch.float32)) / cap)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")


# --- Norm, RoPE, gain: rows (T, H + 2 Hkv heads of D) -> q (T, H, D), k, v (T, Hkv, D). And XSA, on y (T, H, D). ---
# v is a view of the row, which therefore outlives the step anyway: the backward norms it again and saves nothing else.
# ROWS heads to a program, all their COLS >= D columns at once
@jit
def qk_kernel(
    dq,
    dk,
    dv,
    du,
    qkv,
    gain,
    rope,
    out,
    dgain,
    rows,
    H: tl.constexpr,
    KV: tl.constexpr,  # noqa: PLR0913
    D: tl.constexpr,
    HALF: tl.constexpr,
    EPS: tl.constexpr,
    BACKWARD: tl.constexpr,
    TWICE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out: heads of q and k; or, rotating back first, gradients of the row's heads, and each one's dgain."""
    HEADS: tl.constexpr = H + 2 * KV if BACKWARD else H + KV
    r, col = (
        (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None],
        tl.arange(0, COLS)[None, :],
    )
    t, h, mask = r // HEADS, r % HEADS, (r < rows) & (col < D)
    in_q, in_k, in_v = mask & (h < H), mask & (h >= H) & (h < H + KV), mask & (h >= H + KV)
    at, turned = (
        rope + t * 2 * HALF + col % HALF,
        (in_q | in_k) & (col < 2 * HALF),
    )  # cos, sin (T, 2, HALF)
    cos, sin = tl.load(at, turned, other=1.0), tl.load(at + HALF, turned, other=0.0)
    sin = tl.where(col < HALF, sin, -sin)
    partner = tl.where(
        col < HALF, col + HALF, tl.where(col < 2 * HALF, col - HALF, col)
    )  # of a pair
    row = qkv + (t * (H + 2 * KV) + h) * D
    x = tl.load(row + col, in_q | in_k, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + EPS)
    scale = rstd * tl.load(gain + h, h < H, other=1.0).to(tl.float32)
    if BACKWARD:
        of_q, of_k, of_v = (
            dq + (t * H + h) * D,
            dk + (t * KV + h - H) * D,
            (t * KV + h - H - KV) * D + col,
        )
        g = tl.load(of_q + col, in_q, other=0.0) + tl.load(of_k + col, in_k, other=0.0)
        g = (g + tl.load(dv + of_v, in_v, other=0.0)).to(tl.float32)  # one of the three
        if TWICE:
            g += tl.load(du + of_v, in_v, other=0.0).to(tl.float32)
        other = tl.load(of_q + partner, in_q, other=0.0) + tl.load(of_k + partner, in_k, other=0.0)
        g, n = g * cos - other.to(tl.float32) * sin, x * rstd
        dot = tl.sum(g * n, 1, keep_dims=True)
        x = (g - n * (dot / D)) * tl.where(h < H + KV, scale, 1.0)
        tl.store(dgain + r, dot, r < rows)
    else:
        x = (x * cos + tl.load(row + partner, mask, other=0.0).to(tl.float32) * sin) * scale
    tl.store(out + r * D + col, x.to(out.dtype.element_ty), mask)


@jit
def xsa_kernel(
    grad,
    y,
    v,
    out,
    dv,
    stride,
    rows,
    G: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,  # noqa: PLR0913
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out = g less its component along v: y where g = y, and dy where g is the gradient of that. Then also dv."""
    r, col = (
        (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None],
        tl.arange(0, COLS)[None, :],
    )
    mask = (r < rows) & (col < D)
    u = tl.load(v + r // KV * stride + r % KV * D + col, mask, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(u * u, 1, keep_dims=True))
    u, du = u / tl.maximum(length, 1e-12), tl.zeros((ROWS, COLS), tl.float32)
    for i in range(G):  # the query heads of this value
        at = (r * G + i) * D + col
        g = tl.load(grad + at, mask, other=0.0).to(tl.float32)
        a = tl.sum(g * u, 1, keep_dims=True)
        if BACKWARD:
            x = tl.load(y + at, mask, other=0.0).to(tl.float32)
            du -= a * x + tl.sum(x * u, 1, keep_dims=True) * g
        tl.store(out + at, (g - a * u).to(out.dtype.element_ty), mask)
    if BACKWARD:
        along = tl.where(length > 1e-12, tl.sum(du * u, 1, keep_dims=True), 0.0)
        dx = (du - along * u) / tl.maximum(length, 1e-12)
        tl.store(dv + r * D + col, dx.to(dv.dtype.element_ty), mask)


def normed_heads(qkv: Tensor, gain: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k heads (T, H + Hkv, D) in fp32 or better, their 1 / rms, and their gains, 1 for keys."""
    heads, wide = qkv.unflatten(1, (-1, head_dim)), torch.promote_types(qkv.dtype, torch.float32)
    x = heads[:, : (heads.size(1) + len(gain)) // 2].to(wide)
    gains = F.pad(gain.to(wide), (0, x.size(1) - len(gain)), value=1.0).unsqueeze(1)
    return x, torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS), gains


def qk_rope_reference(
    qkv: Tensor, gain: Tensor, rope: Tensor, head_dim: int
) -> Tensor:  # q, then k (T, H + Hkv, D)
    x, rstd, gains = normed_heads(qkv, gain, head_dim)
    return rotate(x * (rstd * gains), *rope.to(x.dtype).unbind(1)).to(qkv.dtype)


def qk_rope_backward_reference(
    qkv: Tensor,
    gain: Tensor,
    rope: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    du: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of row and gain; du is a second one of the values. They rotate back first: no division by a gain."""
    x, rstd, gains = normed_heads(qkv, gain, dq.size(-1))
    cos, sin = rope.to(x.dtype).unbind(1)
    g, n = rotate(torch.cat([dq, dk], 1).to(x.dtype), cos, -sin), x * rstd
    dot = (g * n).sum(-1, keepdim=True)
    dx = torch.addcmul(g, n, dot / x.size(-1), value=-1).mul_(rstd * gains)
    dx = torch.cat([dx.to(dv.dtype), dv if du is None else dv + du], 1).flatten(1)
    return dx, dot[:, : len(gain), 0].sum(0).to(gain.dtype)


def xsa_backward_reference(y: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(y.dtype, torch.float32)
    g, x = (t.to(wide).unflatten(1, (v.size(1), -1)) for t in (grad, y))
    length = v.to(wide).norm(dim=-1, keepdim=True)
    unit = (v / length.clamp_min(1e-12)).unsqueeze(2)
    a, s = (g * unit).sum(-1, keepdim=True), (x * unit).sum(-1, keepdim=True)
    dy, du, unit = (
        torch.addcmul(g, a, unit, value=-1),
        -(a * x).addcmul_(s, g).sum(2),
        unit.squeeze(2),
    )
    along = (du * unit).sum(-1, keepdim=True) * (length > 1e-12)
    dv = du.addcmul_(along, unit, value=-1).div_(length.clamp_min(1e-12))
    return dy.flatten(1, 2).to(y.dtype), dv.to(v.dtype)


def qk_rope_cuda(
    qkv: Tensor, gain: Tensor, rope: Tensor, head_dim: int, *grads: Tensor, tile: tuple = ()
) -> Any:
    """What qk_rope returns; given dq, dk, dv and perhaps du, what qk_rope_backward does."""
    qkv, *grads = (t.contiguous() for t in (qkv, *grads) if t is not None)
    H, KV = len(gain), (qkv.size(1) // head_dim - len(gain)) // 2
    out = qkv.new_empty(len(qkv), H + KV * (2 if grads else 1), head_dim)
    parts = qkv.new_empty(out.shape[:2] if grads else 0, dtype=torch.float32)
    args = [*grads, *[qkv] * (4 - len(grads)), qkv, gain, rope, out, parts]
    shape = dict(
        H=H,
        KV=KV,
        D=head_dim,
        HALF=rope.size(-1),
        EPS=NORM_EPS,
        BACKWARD=bool(grads),
        TWICE=len(grads) == 4,
    )
    launch_heads(
        qk_kernel, "qk_backward" if grads else "qk", args, len(qkv) * out.size(1), tile, **shape
    )
    return (out.flatten(1), parts[:, :H].sum(0).to(gain.dtype)) if grads else out


def xsa_cuda(
    y: Tensor, v: Tensor, grad: Tensor | None = None, tile: tuple = ()
) -> Tensor | tuple[Tensor, Tensor]:
    (T, KV, D), backward = v.shape, grad is not None
    v, y = v if v.stride()[1:] == (D, 1) else v.contiguous(), y.contiguous()
    out, dv = y.new_empty(y.shape), v.new_empty(v.shape if backward else 0)
    args = [grad.contiguous() if backward else y, y, v, out, dv, v.stride(0)]
    shape = dict(G=y.size(1) // KV, KV=KV, D=D, BACKWARD=backward)
    launch_heads(xsa_kernel, "xsa_backward" if backward else "xsa", args, T * KV, tile, **shape)
    return (out, dv) if backward else out


qk_rope = define_operator("qk_rope", qk_rope_reference, qk_rope_cuda)
qk_rope_backward = define_operator(
    "qk_rope_backward",
    qk_rope_backward_reference,
    lambda qkv, gain, rope, dq, *more: qk_rope_cuda(qkv, gain, rope, dq.size(-1), dq, *more),
)
xsa = define_operator("xsa", remove_own_value, xsa_cuda)
xsa_backward = define_operator("xsa_backward", xsa_backward_reference, xsa_cuda)
xsa.register_autograd(
    lambda ctx, grad: xsa_backward(*ctx.saved_tensors, grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, qkv: Tensor, gain: Tensor, rope: Tensor, head_dim: int, uses: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(qkv, gain, rope)
        qk = qk_rope(qkv, gain, rope, head_dim)
        values = (qkv.unflatten(1, (-1, head_dim))[:, qk.size(1) :] for _ in range(uses))
        return qk[:, : len(gain)], qk[:, len(gain) :], *values

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *qk_rope_backward(*ctx.saved_tensors, *grads), None, None, None


def norm_rope(
    qkv: Tensor, gain: Tensor, rope: Tensor, head_dim: int, fused: bool, uses: int = 1
) -> tuple[Tensor, ...]:
    """q, k, v: normed, rotated by rope (T, 2, 1, half) fp32 = cos, sin of each token, queries times gain (H,). For two
    `uses` of v it comes twice, so that its gradients meet in the kernel and not in a pass of their own."""
    if fused:
        return NormRope.apply(qkv, gain, rope, head_dim, uses)
    qk, H = qk_rope_reference(qkv, gain, rope, head_dim), len(gain)
    return qk[:, :H], qk[:, H:], *[qkv.unflatten(1, (-1, head_dim))[:, qk.size(1) :]] * uses


# === 13. Attention backends ===
# --- Attention over packed documents, one signature for every backend: q (T, H, D), k and v (T, Hkv, D), cu_seqlens
# int32 (capacity + 1,) ending in repeated T, max_seqlen a constant: one graph for all batches. FA2, FA3 (from 2025-12)
# and torch's varlen trace as operators, FA4 not by 2026-08 (refused until it does); per-document SDPA becomes one here.
# Queries may have own cu_seqlens: then they are the last positions of each segment of keys, or none of them.
ATTENTION_BACKENDS = {
    "fa3": "flash_attn_interface",
    "fa4": "flash_attn.cute",
    "fa2": "flash_attn",
}  # by preference
ATTENTION_BACKENDS |= {
    "torch": "torch.nn.attention.varlen",
    "sdpa": "",
}  # sdpa: any device, any float type
ATTENTION_TOLERANCE = {
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
    torch.float32: 2e-3,
    torch.float64: 1e-5,
}  # TF32 2e-3
# Package absent; library does not load; another version; dtype, head width or GPU refused, or a graph break.
BACKEND_ERRORS = (
    ImportError,
    OSError,
    AttributeError,
    KeyError,
    TypeError,
    AssertionError,
    ValueError,
    RuntimeError,
)


def for_each_run(kernel: Callable, inputs: tuple, outputs: tuple, cu: Tensor) -> None:
    """Fills outputs (T, heads, ...) with kernel(*inputs), called on (rows, heads, n, ...) views of equal neighbours
    with queries. cu (2, segments + 1): cu_seqlens of queries, of keys."""
    totals, pairs = cu[:, -1].tolist(), [pair for pair in cu.diff().T.tolist() if pair[1]]
    start, runs = (
        dict.fromkeys(totals, 0),
        [(pair, len(list(same))) for pair, same in groupby(pairs)],
    )
    for pair, rows in (
        runs if inputs[0].is_cpu else ((p, 1) for p in pairs)
    ):  # a GPU holds the (n, m) scores: one row
        n = dict(
            zip(totals, pair, strict=True)
        )  # by length of a tensor: as many queries as keys are the same segments
        views = (
            x[start[len(x)] :][: rows * n[len(x)]].unflatten(0, (rows, n[len(x)]))
            for x in (*inputs, *outputs)
        )
        parts = [x.transpose(1, 2) for x in views]
        for part, result in zip(
            parts[len(inputs) :], kernel(*parts[: len(inputs)]) if pair[0] else (), strict=False
        ):
            part.copy_(result)
        start = {total: first + rows * n[total] for total, first in start.items()}


def causal_options(
    q: Tensor, k: Tensor
) -> dict[str, Any]:  # queries (.., n, D) are the last of the positions (.., m, D);
    n, m = q.size(-2), k.size(-2)  # is_causal takes them for the first
    return {
        "is_causal": n == m,
        "attn_mask": None if n == m else q.new_full((n, m), -torch.inf).triu(1 + m - n),
    }


def plain_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (rows, heads, n, D)
    return F.scaled_dot_product_attention(q, k, v, **causal_options(q, k), enable_gqa=True)


def causal_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor
) -> tuple[Tensor, ...]:  # dq, dk, dv
    return torch.func.vjp(plain_causal, q, k, v)[1](
        grad
    )  # autograd is off inside an operator, this is not


def dense_rows(x: Tensor) -> Tensor:  # the CPU kernels misread a strided last dimension
    return x if x.stride(-1) == 1 else x.contiguous()


def sdpa_outputs(
    q: Tensor,
) -> tuple[Tensor, Tensor]:  # y (T, H, D), logsumexp (H, T), used only on a CPU
    return q.new_empty(q.shape), q.new_zeros(
        q.shape[1::-1], dtype=torch.promote_types(q.dtype, torch.float32)
    )


@torch.library.custom_op("golf::sdpa_varlen", mutates_args=())
def sdpa_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor, Tensor]:
    """y and logsumexp. On two cores, 16 x 512 bf16 tokens, H=4, D=32: 16 ms, 35 ms in backward."""
    lengths = (cu := torch.stack([cu_queries, cu_seqlens])).diff()
    ends, shortest, longest = cu[:, [0, -1]].tolist(), int(lengths[0].min()), int(lengths[1].max())
    fits = ends == [[0, len(q)], [0, len(k)]] and shortest >= 0 and longest <= max_seqlen
    assert fits and bool((lengths[0] <= lengths[1]).all()), (
        f"{ends=}, {shortest=}, {longest=}, {lengths=}"
    )
    inputs = tuple(map(dense_rows, (q, k, v)))
    y, lse = sdpa_outputs(q)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return flash(q, k, v, **causal_options(q, k)) if q.is_cpu else (plain_causal(q, k, v),)

    for_each_run(kernel, inputs, (y, lse.T), cu)
    return y, lse


@torch.library.custom_op("golf::sdpa_varlen_backward", mutates_args=())
def sdpa_varlen_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (*map(dense_rows, (grad, q, k, v, y)), lse.T)
    grads = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    kernel = (
        (lambda *x: flash(*x, dropout_p=0.0, **causal_options(*x[1:3])))
        if q.is_cpu
        else causal_gradients
    )
    for_each_run(kernel, inputs, grads, torch.stack([cu_queries, cu_seqlens]))
    return grads


sdpa_varlen.register_fake(lambda q, *_: sdpa_outputs(q))
sdpa_varlen_backward.register_fake(
    lambda grad, *saved: tuple(x.new_empty(x.shape) for x in saved[:3])
)
sdpa_varlen.register_autograd(
    lambda ctx, grad, _: (*sdpa_varlen_backward(grad, *ctx.saved_tensors), None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(
        *inputs[:3], *output, *inputs[3:5]
    ),
)
ATTENTION = {"sdpa": sdpa_varlen}  # check_attention adds the others


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str,
    cu_queries: Tensor | None = None,
) -> Tensor:
    """y (T, H, D), causal within each segment, scale D ** -0.5; query head h reads key/value head h // (H // Hkv)."""
    y = ATTENTION[backend](
        q, k, v, cu_seqlens if cu_queries is None else cu_queries, cu_seqlens, max_seqlen
    )
    return (
        y[0] if isinstance(y, tuple) else y
    )  # ours, FA4, and FA3 before 2025-07 add the logsumexp


def load_attention(
    backend: str,
) -> Callable[..., Tensor]:  # with our signature; raises one of BACKEND_ERRORS
    name = "varlen_attn" if backend == "torch" else "flash_attn_varlen_func"
    function = getattr(importlib.import_module(ATTENTION_BACKENDS[backend]), name)
    if (
        backend == "torch"
    ):  # 2.10 has is_causal, later a window; enable_gqa is required since 2.12, implied before
        known = inspect.signature(function).parameters
        options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        options |= {"enable_gqa": True} if "enable_gqa" in known else {}
        return lambda q, k, v, cu_q, cu_k, n: function(q, k, v, cu_q, cu_k, n, n, **options)
    return lambda q, k, v, cu_q, cu_k, n: function(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=n, max_seqlen_k=n, causal=True
    )


def check_attention(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why to refuse a backend, or "" if it compiles whole and y, dq, dk, dv, of all and of few queries, are SDPA's."""
    cu, few = torch.tensor(
        [[0, 1, 130, 300, 300, 300], [0, 1, 1, 49, 49, 49]], dtype=torch.int32, device=device
    )
    segment = torch.tensor([0] + 129 * [1] + 170 * [2], device=device)
    rng = torch.Generator(device).manual_seed(0)  # leaves the global one alone
    grad, *leaves = (
        torch.randn(300, n, 64, generator=rng, device=device).to(dtype) for n in (4, 4, 2, 2)
    )
    exact = [x.to(torch.promote_types(dtype, torch.float32)).requires_grad_() for x in leaves]
    heads = (x.repeat_interleave(4 // x.size(1), 1).transpose(0, 1) for x in exact)
    y = F.scaled_dot_product_attention(
        *heads, attn_mask=(segment[:, None] == segment).tril()
    ).transpose(0, 1)
    compiled, found, wanted = torch.compile(attention, backend="aot_eager", fullgraph=True), [], []
    try:
        ATTENTION[backend] = sdpa_varlen if backend == "sdpa" else load_attention(backend)
        q, *kv = leaves = [x.detach().clone().requires_grad_() for x in leaves]
        for cu_queries, at in ((None, slice(None)), (few, [0, *range(252, 300)])):
            z, x = y[at], compiled(q[at], *kv, cu, 256, backend, cu_queries)
            wanted += [z, *torch.autograd.grad(z, exact, grad[at].to(y.dtype), retain_graph=True)]
            found += [x, *torch.autograd.grad(x, leaves, grad[at])]
    except BACKEND_ERRORS as error:
        return (str(error).strip() or repr(error)).splitlines()[0][:200]
    error = float(
        torch.stack([(x - z).norm() / z.norm() for x, z in zip(found, wanted, strict=True)])
        .max()
        .detach()
    )
    return (
        ""
        if error <= ATTENTION_TOLERANCE[dtype]
        else f"relative error {error:.1e} against masked SDPA"
    )


def choose_attention(
    requested: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, list[str]]:
    """A name for `attention` ("auto": the first that works) and log lines; UsageError if there is none."""
    if requested == "auto" and device.type == "cpu":
        return "sdpa", ["attention_backend:sdpa (the others need a GPU)"]
    some = [
        n for n in ATTENTION_BACKENDS if n != "sdpa" or dtype != torch.bfloat16
    ]  # its loop on a GPU: only by name
    names, log, reason = [requested] if requested != "auto" else some, [], "no such backend"
    for name in filter(ATTENTION_BACKENDS.__contains__, names):
        reason = check_attention(name, device, dtype)
        if not reason:
            return name, [*log, f"attention_backend:{name}"]
        log.append(f"{name}: {reason}")
    works = [
        name
        for name in ATTENTION_BACKENDS
        if name not in names and not check_attention(name, device, dtype)
    ]
    raise UsageError(
        f"ATTENTION_BACKEND={requested}: {reason}; works here: {', '.join(works) or 'none'}"
    )


# === 14. Command line ===
def main(
    argv: list[str],
) -> int:  # exit status: 0 done, 1 the run failed, 2 wrong configuration or data, 3 stopped
    together = False  # whether all ranks end alike
    try:
        if argv == ["--knobs"]:
            signal.signal(
                getattr(signal, "SIGPIPE", signal.SIGTERM), signal.SIG_DFL
            )  # of | head, to end in silence
            print_knobs()
            return 0
        if argv:
            raise UsageError(
                f"{argv[0]}: knobs are environment variables; the only argument is --knobs"
            )
        handle_signals(raise_stopped)
        Run(*Config.from_env(os.environ, torch.cuda.is_available()), Ranks(os.environ)).go()
        together = True
    except (UsageError, RunStopped, KeyboardInterrupt, FloatingPointError, InvalidScore) as error:
        together = isinstance(error, (UsageError, RunStopped, InvalidScore))
        if isinstance(error, BadMatrix) or os.environ.get("RANK", "0") == "0":
            print(f"train_gpt.py: {error.args[0]}", file=sys.stderr, flush=True)
        return {UsageError: 2, RunStopped: 3, KeyboardInterrupt: error.args[-1]}.get(type(error), 1)
    except RuntimeError as error:
        if not dist.is_initialized() or "onnection" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        print(
            f"train_gpt.py: rank {dist.get_rank()} lost a peer: {reason}",
            file=sys.stderr,
            flush=True,
        )
        return 1
    finally:  # NCCL's end waits for all ranks: one that fails by itself would hang, its traceback unseen
        if dist.is_initialized() and (together or dist.get_backend() != "nccl"):
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
