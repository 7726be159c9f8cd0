"""One-file entry for Parameter Golf: the best language model that fits in 16,000,000 bytes.

How to run it:

    python train_gpt.py                                      # one process, on any device
    torchrun --standalone --nproc_per_node=8 train_gpt.py    # 8 GPUs over FineWeb shards
    python train_gpt.py --knobs [WORD]                       # knobs, meanings and defaults
    python train_gpt.py --plan                               # what a run will need: no GPU, no data
    PRESET=cpu SEED=42 python train_gpt.py                   # knobs are environment variables

The run, and what each phase leaves behind (files without a folder lie in runs/<RUN_ID>/):

    check       configuration, data, tokenizer, attention    logs/<RUN_ID>.txt begins
      |
    warm up     compile on random tokens, then undo          compiled graphs
      |
    train       within the budget of time or steps           checkpoint.[01].pt, final_model.pt
      |
    calibrate   training rows through the final weights      Hessians and sensitivities
      |
    quantise    step sizes, then GPTQ                        integers and their scales
      |
    pack        fit the step sizes to the byte limit         final_model.int6.ptz
      |
    diagnose    score the weights before quantisation        for comparison, off both budgets
      |
    reload      the artifact, and nothing else               the weights that are scored
      |
    score       every validation token once                  scores.json, documents.npz
      |
    adapt       score a chunk first, then learn from it      scores.json, documents.npz
      |
    report      phases against their budgets                 the one line `final {...}`

Contents, in the order of a run, then what stands behind it:

     1  Configuration            knobs, rules, presets
     2  Runtime                  ranks, log, clock, files
     3  Data                     shards of tokens -> rows of packed documents
     4  Model                    plain maths, order of layers, parameters, one forward
     5  Adapters                 a LoRA for every document of a batch
     6  Optimisers               Muon on the banks, AdamW on the rest, schedules
     7  Training                 steps, validation, pace, checkpoints
     8  Scoring                  nats and bytes of every validation token
     9  Compression, artifact    Hessians -> step sizes -> integers -> one file
    10  Test-time training       score a chunk, then learn from it
    11  Run                      the phases above
    12  Kernels                  each beside a plain reference
    13  Attention backends       accepted by their numbers, at the start
    14  Names of variables       what other scripts and clusters set
    15  Command line             arguments, exit statuses

Letters in shapes: T tokens per row, C model width, H query heads, Hkv key/value heads, D head
width, F MLP width, V vocabulary, L layers, W ranks, R rows of documents that adapt together, N
tokens of the validation text (in section 12: rows of logits). n is any other number of things,
named beside it. A word in a shape, as in (docs,), is the number of those things.

Words: a row is a fixed number of packed tokens, the unit of a forward. A segment is a part of a row
within which attention is causal: a document, or a piece of one. A window is a segment that is
scored. A chunk is what is scored before something learns from it. A visit is one run of a layer (of
a looped layer there are several), and its slot is its number in the order. A bank holds one kind of
matrix of all layers. From PARALLEL_START_LAYER on the stream of activations has two lanes.

Importing this file reads no environment variable and needs neither a GPU nor an optional package.
The system on a GPU is that of PR #2135 (1.05651), which goes back to PR #1530 (samacqua), with a
quantiser of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import enum
import errno
import fnmatch
import hashlib
import importlib.util
import inspect
import io
import json
import lzma
import math
import os
import pickle
import platform
import random
import re
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":

    def leave(number: int, _: Any) -> None:
        """Ends the program in one line, also while PyTorch is imported, which takes seconds."""
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"train_gpt.py: SIGINT: the run is stopped\n")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, leave)

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError as error:
    print(
        f"train_gpt.py: {error}; with Python 3.10 to 3.13: make install, then"
        f" .venv/bin/python train_gpt.py (this is Python {sys.version.split()[0]})",
        file=sys.stderr,
    )
    sys.exit(2)

# Windows has no such locks.
try:
    import fcntl
except ImportError:
    fcntl = None

# Without Triton (macOS, Windows) the plain reference beside each kernel runs instead.
try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    jit = triton.jit
except ImportError:
    triton = None

    def jit(kernel: Callable) -> Callable:
        """Leave a kernel as it is: nothing launches it."""
        return kernel


# The file that runs is the file whose bytes count. It is read before anyone can edit it.
SOURCE = Path(__file__).read_bytes()
CODE_BYTES = len(SOURCE)
LIMIT_BYTES = 16_000_000  # code and model together, decimal
EVAL_LIMIT_SECONDS = 600.0  # for all evaluations of the artifact
MANY_FOR_A_CPU = 20_000_000  # parameters; such a network takes minutes for a step there

# The readable source and its hash, for the log. The packed file of tools/pack.py runs this text
# with UNPACKED = (text, hash) defined.
if "UNPACKED" in globals():
    TEXT, CODE_SHA256 = globals()["UNPACKED"]
else:
    TEXT = SOURCE.decode()
    CODE_SHA256 = hashlib.sha256(SOURCE).hexdigest()

COMPRESSORS = ("zstd", "ans", "lzma", "brotli")
MAX_VISITS = 1024  # of layers, loops unrolled


class UsageError(ValueError):
    """Wrong configuration, data or file.

    The message is all that the user sees, one line per problem. Exit status 2.
    """


class BadRank(UsageError):
    """What is wrong with one rank, which only that rank knows. The message may be empty."""


class FilesNotWritten(OSError):
    """A run went on to its end without files that could not be written. One line, exit status 1."""


class RunStopped(RuntimeError):
    """The run reached a limit that the user has set. One line, exit status 3."""


class ForeignValue(TypeError):
    """A file holds a value that no run writes. The message, one line, does not name the file."""


class OutOfMemory(RuntimeError):
    """Memory has run out. One line, which names the knob that helps; exit status 1."""


class BadMatrix(FloatingPointError):
    """A matrix or its Hessian cannot be quantised. Raised only on the rank that quantises it."""


# === 1. Configuration ===
# Every knob is an environment variable, and a field of Config is its variable in lower case. A
# group of fields holds knobs, properties derived from them, and the rules between them. Methods of
# a group may read the fields of all groups: they only run as part of a Config.
NO_LIMIT = 1e18  # upper bound of a knob that has none


def knob(
    default: Any,
    doc: str,
    lo: float = 0,
    hi: float = NO_LIMIT,
    choices: tuple[str, ...] = (),
    network: bool | str = False,
    free_on_resume: bool = False,
    shrinks: bool = False,
) -> Any:
    """A field of Config.

    doc: meaning and unit, to be read alone in a table.
    lo, hi: the bounds of a number. choices: the texts that are allowed; empty: all.
    network: True if a model file decides the value; "optional" if the file holds it only where it
    is not the default.
    free_on_resume: a run may resume from its checkpoint with another value.
    shrinks: SHRINK=1 divides the value, a length, by eight.
    """
    metadata = dict(doc=doc, lo=lo, hi=hi, choices=choices)
    metadata |= dict(network=network, free_on_resume=free_on_resume, shrinks=shrinks)
    return dataclasses.field(default=default, metadata=metadata)


class Rule(NamedTuple):
    """A rule that a config breaks."""

    field: str  # the field to blame
    requirement: str  # completes "must be", with the values of the other knobs involved


class RowShape(NamedTuple):
    """The fixed size of a row of packed segments: one shape needs one compiled graph.

    A row of too many segments for its capacity is cut after half of them and padded. The padding
    is segments of max_seqlen, at most ceil(tokens / max_seqlen), for which the other half must do.
    """

    tokens: int
    capacity: int  # segments that the row can hold
    max_seqlen: int  # tokens of the longest segment


@dataclasses.dataclass(frozen=True)
class RunKnobs:
    """The run, its name and the files it writes."""

    preset: str = knob("record", "defaults to start from; unset: record with CUDA, cpu without")
    shrink: bool = knob(False, "preset's structure at CPU size: narrow layers, short rows")
    seed: int = knob(1337, "seed of weights, adapters and the sample of documents", 0, 2**31)
    run_id: str = knob("", "name of log and folder; empty: date, preset, seed", free_on_resume=True)
    artifact_dir: str = knob("", "output folder; empty: runs/<RUN_ID>", free_on_resume=True)
    checkpoint_every: float = knob(
        0.0, "seconds between checkpoints, from which RUN_ID resumes; 0: none", free_on_resume=True
    )
    tensorboard_dir: str = knob(
        "", "parent folder of the run's TensorBoard folder; empty: none", free_on_resume=True
    )
    wandb_project: str = knob(
        "", "project of Weights & Biases for the run's curves; empty: none", free_on_resume=True
    )
    eval_only_path: str = knob(
        "", "final_model.pt to quantise and score, or artifact to score, instead of training"
    )
    train_log_every: int = knob(500, "steps between log lines; 0: one per 8 s", free_on_resume=True)

    def rules(self) -> Iterator[Rule]:
        """What is wrong with the run's name and its checkpoints."""
        if not re.fullmatch(r"([^./][^/]*)?", self.run_id):
            yield Rule("run_id", "a file name, which does not begin with a dot")
        if self.checkpoint_every and not self.run_id:
            yield Rule("checkpoint_every", "0 without RUN_ID")
        if self.checkpoint_every and self.eval_only_path:
            yield Rule("checkpoint_every", f"0 with EVAL_ONLY_PATH={self.eval_only_path}")


@dataclasses.dataclass(frozen=True)
class DataKnobs:
    """The data set, and the rows that training reads from it."""

    data_dir: str = knob("./data", "folder with datasets/ and tokenizers/", free_on_resume=True)
    dataset: str = knob("", "folder of the data set in datasets/; empty: fineweb10B_sp<VOCAB_SIZE>")
    tokenizer_path: str = knob(
        "", "SentencePiece model; empty: the one that the data set names", free_on_resume=True
    )
    data_loader: str = knob(
        "documents",
        "rows of packed documents, or cut across documents, in order or shuffled",
        choices=("documents", "rows", "shuffled"),
        network=True,
    )
    train_batch_tokens: int = knob(786432, "tokens per step, over all ranks", 1)
    micro_batch_tokens: int = knob(98304, "tokens per row; ranks take a step's rows in turn", 1)
    train_seq_len: int = knob(2048, "longest training segment, in tokens", 2, shrinks=True)
    cu_seqlens_capacity: int = knob(512, "segments a row can hold; fixed, to compile one graph", 2)
    seq_len_schedule: str = knob(
        "",
        "longest segments by share of the budget, as in 0:1024,0.1:2048,0.7:3072 (PR #2014)",
    )

    @property
    def dataset_dir(self) -> Path:
        """The folder of the shards."""
        name = self.dataset or f"fineweb10B_sp{self.vocab_size}"
        return Path(self.data_dir) / "datasets" / name

    @property
    def reads_caseops(self) -> bool:
        """Whether the data set is CaseOps by its name."""
        return "caseops" in self.dataset_dir.name

    @property
    def rows_per_step(self) -> int:
        """Rows of one training step, over all ranks."""
        return self.train_batch_tokens // self.micro_batch_tokens

    @property
    def row_shape(self) -> RowShape:
        """The shape of a training row."""
        return RowShape(self.micro_batch_tokens, self.cu_seqlens_capacity, self.train_seq_len)

    @property
    def seq_len_stages(self) -> list[tuple[float, int]]:
        """SEQ_LEN_SCHEDULE: (share of the budget, longest segment from there on), in order."""
        pairs = (pair.split(":") for pair in self.seq_len_schedule.split(",") if pair)
        stages = [(float(share), int(length)) for share, length in pairs]
        return stages or [(0.0, self.train_seq_len)]

    def longest_segment(self, frac: float) -> int:
        """Tokens of the longest segment when a share `frac` of the budget is spent."""
        return [length for share, length in self.seq_len_stages if share <= frac][-1]

    def rules(self) -> Iterator[Rule]:
        """What is wrong with rows and steps, and with the schedule of their segments."""
        yield from self.rules_of_rows()
        if not self.seq_len_schedule:
            return
        if not self.seq_len_schedule_is_valid():
            yield Rule(
                "seq_len_schedule",
                "share:length,.. with shares from 0 on, rising and below 1, and lengths of 2 to"
                f" TRAIN_SEQ_LEN={self.train_seq_len}",
            )
        elif self.data_loader == "shuffled":
            # A shorter length would cut a piece so that a segment runs into the next piece.
            yield Rule("seq_len_schedule", "empty with DATA_LOADER=shuffled")

    def seq_len_schedule_is_valid(self) -> bool:
        """Whether SEQ_LEN_SCHEDULE begins at 0 and its lengths fit TRAIN_SEQ_LEN."""
        if not re.fullmatch(r"(0?\.?\d+:\d+(,|$))+", self.seq_len_schedule):
            return False
        shares = [share for share, _ in self.seq_len_stages]
        rising = shares[0] == 0 and shares == sorted(set(shares)) and shares[-1] < 1
        return rising and all(
            2 <= length <= self.train_seq_len for _, length in self.seq_len_stages
        )

    def rules_of_rows(self) -> Iterator[Rule]:
        """What is wrong with the sizes of rows and steps."""
        row = self.micro_batch_tokens
        length = self.train_seq_len
        if self.train_batch_tokens % row:
            yield Rule("train_batch_tokens", f"a multiple of MICRO_BATCH_TOKENS={row}")
        if length > row:
            yield Rule("train_seq_len", f"at most MICRO_BATCH_TOKENS={row}")
        if self.data_loader == "shuffled" and row % length:
            yield Rule(
                "train_seq_len", f"a divisor of MICRO_BATCH_TOKENS={row} with DATA_LOADER=shuffled"
            )
        # Half is for the segments of documents, half for those of the padding.
        name = "TRAIN_SEQ_LEN"
        if self.seq_len_schedule and self.seq_len_schedule_is_valid():
            name = "the least length of SEQ_LEN_SCHEDULE"
            length = min(length for _, length in self.seq_len_stages)
        least = 2 + 2 * math.ceil(row / length)
        if self.cu_seqlens_capacity < least:
            yield Rule(
                "cu_seqlens_capacity",
                f"at least {least} with MICRO_BATCH_TOKENS={row} and {name}={length}",
            )


@dataclasses.dataclass(frozen=True)
class ModelKnobs:
    """The network."""

    vocab_size: int = knob(8192, "tokens in the tokenizer's vocabulary", 2, 65536, network=True)
    num_layers: int = knob(11, "number of physical layers", 2, 256, network=True)
    model_dim: int = knob(512, "width of the residual stream", 8, network=True)
    num_heads: int = knob(8, "query heads per layer", 1, network=True)
    num_kv_heads: int = knob(4, "key and value heads per layer", 1, network=True)
    mlp_mult: float = knob(4.0, "MLP width as a multiple of MODEL_DIM", 0.01, network=True)
    leaky_slope: float = knob(
        0.5, "slope of the MLP's squared leaky ReLU; 0: squared ReLU", 0, 1, network="optional"
    )
    xsa_last_n: int = knob(
        11, "top layers that remove the token's own value from attention output (XSA)", network=True
    )
    skip_gates_enabled: bool = knob(True, "gate skip connections; 0: scale only", network=True)
    tied_embed_init_std: float = knob(0.005, "initial standard deviation of the token embedding")
    logit_softcap: float = knob(30.0, "bound c in c * tanh(logits / c)", 0.01, network=True)
    rope_base: float = knob(10000.0, "base of RoPE's wavelengths", 1.01, network=True)
    rope_dims: int = knob(16, "dimensions per head that RoPE rotates; 0: all", network=True)
    rope_train_seq_len: int = knob(
        0, "segments longer than this raise ROPE_BASE; 0: never", network="optional", shrinks=True
    )
    ln_scale: bool = knob(True, "scale normalised inputs of layer i by 1/sqrt(i+1)", network=True)
    branch_scale: bool = knob(
        False, "like LN_SCALE, but on the outputs of layer i (PR #568)", network="optional"
    )
    qk_gain_init: float = knob(5.0, "initial query scale per head, after QK norm; learned")
    num_loops: int = knob(2, "extra passes over layers LOOP_START..LOOP_END", 0, 64, network=True)
    loop_start: int = knob(3, "first looped layer, counted from 0", network=True)
    loop_end: int = knob(5, "last looped layer, counted from 0", network=True)
    parallel_start_layer: int = knob(8, "first layer with two lanes, from 0; 0: none", network=True)
    parallel_final_lane: str = knob(
        "mean",
        "lane to read after the last layer, or the mean of both",
        choices=("mean", "mlp", "attn"),
        network=True,
    )
    bigram_vocab_size: int = knob(
        0, "rows of the hashed embedding of token pairs (PR #162); 0: none", network="optional"
    )
    bigram_dim: int = knob(128, "width of the embedding of token pairs", 1, network="optional")
    smear_enabled: bool = knob(
        False, "blend each channel with that of the token before (PR #162)", network="optional"
    )
    train_input_features: bool = knob(
        True, "train pair embedding, SMEAR_ENABLED; 0: frozen (PR #605)"
    )
    ve_enabled: bool = knob(
        False, "add token embeddings to the values of VE_LAYERS (PR #414)", network="optional"
    )
    ve_dim: int = knob(128, "width of the embedding of VE_ENABLED", 1, network="optional")
    ve_layers: str = knob("9,10", "layers of VE_ENABLED, from 0, as in 9,10", network="optional")
    sparse_attn_gate_enabled: bool = knob(
        False,
        "gate each head's output by a few channels of its input (PR #1787)",
        network="optional",
    )
    sparse_attn_gate_scale: float = knob(
        0.5, "factor in the sigmoid of SPARSE_ATTN_GATE_ENABLED (PR #1855)", network="optional"
    )
    smear_gate_enabled: bool = knob(
        False,
        "add a gated share of the token before to each token (SmearGate, PR #1667)",
        network="optional",
    )
    gate_window: int = knob(
        12, "channels that the gates of attention and SmearGate read", 1, network="optional"
    )

    @property
    def ties_embeddings(self) -> bool:
        """Whether the head is the embedding table: it is in every network here."""
        return True

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """Width of the keys of a token, and of its values: Hkv * D."""
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return int(self.mlp_mult * self.model_dim)

    @cached_property
    def plans(self) -> tuple[tuple[Visit, ...], tuple[Visit, ...]]:
        """The order of layers before the loops run, and with them."""
        return layer_plan(self, looped=False), layer_plan(self, looped=True)

    @property
    def value_embedding_layers(self) -> list[int]:
        """The layers whose values get the second embedding."""
        if not self.ve_enabled:
            return []
        return [int(layer) for layer in re.findall(r"\d+", self.ve_layers)]

    def rules(self) -> Iterator[Rule]:
        """What is wrong with the network."""
        # First, because the rules below unroll the depth: 256 layers with 64 loops took 19 s.
        if self.num_layers * (1 + self.num_loops) > MAX_VISITS:
            most = MAX_VISITS // self.num_layers - 1
            yield Rule("num_loops", f"at most {most} with NUM_LAYERS={self.num_layers}")
            return
        yield from self.rules_of_widths()
        yield from self.rules_of_layers()

    def rules_of_widths(self) -> Iterator[Rule]:
        """What is wrong with widths, heads and tables."""
        if self.model_dim % (2 * self.num_heads):
            yield Rule("model_dim", f"a multiple of {2 * self.num_heads}, 2 * NUM_HEADS")
        if self.num_heads % self.num_kv_heads:
            yield Rule("num_kv_heads", f"a divisor of NUM_HEADS={self.num_heads}")
        if self.rope_train_seq_len and (self.rope_dims or self.head_dim) <= 2:
            yield Rule("rope_train_seq_len", "0 where RoPE rotates only two dimensions")
        if self.rope_dims % 2 or self.rope_dims > self.head_dim:
            yield Rule("rope_dims", f"even and at most {self.head_dim}")
        gated = self.sparse_attn_gate_enabled or self.smear_gate_enabled
        if gated and self.gate_window > self.model_dim:
            yield Rule("gate_window", f"at most MODEL_DIM={self.model_dim}")
        if self.smear_gate_enabled and self.smear_enabled:
            yield Rule("smear_gate_enabled", "0 with SMEAR_ENABLED=1, the form of PR #162")
        if self.mlp_dim < 1:
            yield Rule("mlp_mult", f"enough for one hidden unit at MODEL_DIM={self.model_dim}")
        # The fused loss adds up to 65,536 exponentials in fp32 without a running maximum.
        if self.fused_ce and self.logit_softcap > 75 * min(self.logit_temperature, 1):
            yield Rule(
                "logit_softcap",
                f"at most 75, and 75 * LOGIT_TEMPERATURE={self.logit_temperature}, with FUSED_CE=1",
            )
        if self.bigram_vocab_size == 1:
            yield Rule("bigram_vocab_size", "0, or at least 2")
        if sum(stream_sizes(self)) > MAX_STREAM_BYTES:
            most = MAX_STREAM_BYTES
            yield Rule("model_dim", f"smaller: an artifact unpacks to {most} bytes at most")

    def rules_of_layers(self) -> Iterator[Rule]:
        """What is wrong with the order of layers and what a layer has."""
        layers = self.num_layers
        if self.xsa_last_n > layers:
            yield Rule("xsa_last_n", f"at most NUM_LAYERS={layers}")
        if self.branch_scale and self.ln_scale:
            yield Rule("branch_scale", "0 with LN_SCALE=1")
        if self.ve_enabled and not self.ve_layers_are_valid():
            yield Rule("ve_layers", f"as in 9,10, each below NUM_LAYERS={layers}")
        if self.num_loops and self.loop_start > self.loop_end:
            yield Rule("loop_start", f"at most LOOP_END={self.loop_end}")
        if self.num_loops and self.loop_end >= layers:
            yield Rule("loop_end", f"below NUM_LAYERS={layers}, or NUM_LOOPS=0")
        if self.parallel_start_layer >= layers:
            yield Rule(
                "parallel_start_layer", f"below NUM_LAYERS={layers}, or 0 for no second lane"
            )
        if self.num_loops and 0 < self.parallel_start_layer <= self.loop_end:
            yield Rule(
                "parallel_start_layer",
                f"0 or above LOOP_END={self.loop_end}: the second lane begins once, so no loop may"
                " run over it",
            )
        elif any(visit.parallel and visit.push for plan in self.plans for visit in plan):
            yield Rule("parallel_start_layer", "in the decoder half of the layers")

    def ve_layers_are_valid(self) -> bool:
        """Whether VE_LAYERS lists different layers of the network."""
        if not re.fullmatch(r"\d+(,\d+)*", self.ve_layers):
            return False
        layers = self.value_embedding_layers
        return len(set(layers)) == len(layers) and max(layers) < self.num_layers


@dataclasses.dataclass(frozen=True)
class OptimizerKnobs:
    """Optimisers, and the averages of the weights."""

    tied_embed_lr: float = knob(0.03, "AdamW rate of the embedding tables")
    scalar_lr: float = knob(0.02, "AdamW rate of scales, gains, gates, lambdas and the like")
    matrix_lr: float = knob(0.026, "Muon rate: spectral norm of a square update (PR #1586)")
    muon_momentum: float = knob(0.97, "momentum of Muon after its warm-up", 0, 0.9999)
    muon_momentum_warmup_start: float = knob(0.92, "momentum of Muon at the first step", 0, 0.9999)
    muon_momentum_warmup_steps: int = knob(1500, "steps from the first to the final Muon momentum")
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations per update of Muon", 1, 20)
    muon_coeffs: str = knob(
        "quintic", "Newton-Schulz coefficients; polar: Polar Express", choices=("quintic", "polar")
    )
    muon_row_normalize: bool = knob(True, "scale rows to unit norm before Newton-Schulz (MuonEq-R)")
    muon_square_decay: float = knob(
        0.0,
        "decay of the squares that divide Muon's gradients before Newton-Schulz; 0: off",
        0,
        0.9999,
    )
    beta1: float = knob(0.9, "decay of AdamW's first moment per step", 0, 0.9999)
    beta2: float = knob(0.95, "decay of AdamW's second moment per step", 0, 0.99999)
    adam_eps: float = knob(1e-8, "epsilon in the denominator of AdamW", 1e-20)
    grad_clip_norm: float = knob(0.3, "limit of the gradient norm of all parameters; 0: no limit")
    adam_wd: float = knob(0.02, "decoupled weight decay of the parameters of SCALAR_LR")
    muon_wd: float = knob(0.095, "decoupled weight decay of the banks")
    embed_wd: float = knob(0.085, "decoupled weight decay of the embedding tables")
    export_weights: str = knob(
        "ema",
        "weights to keep; swa: EMA, then SWA's mean; raw: the last",
        choices=("ema", "swa", "raw"),
    )
    ema_decay: float = knob(0.9965, "decay per step of the average of all parameters", 0, 0.999999)
    ema_every: int = knob(1, "steps between weights that enter the exponential average", 1)
    swa_threshold: float = knob(0.2, "rate factor below which SWA averages weights (PR #374)", 0, 2)
    swa_every: int = knob(50, "steps between weights that enter the mean of SWA", 1)
    late_qat: bool = knob(False, "train late in the run through the rounding to MATRIX_BITS")
    late_qat_threshold: float = knob(0.15, "rate factor at which LATE_QAT begins; 2: at once", 0, 2)

    @property
    def exports_average(self) -> bool:
        """Whether the weights to keep are an average of those of several steps."""
        return self.export_weights != "raw"

    def rules(self) -> Iterator[Rule]:
        """What is wrong with the optimisers."""
        most = len(MUON_COEFFS[self.muon_coeffs])
        if self.muon_backend_steps > most:
            yield Rule("muon_backend_steps", f"at most {most} with MUON_COEFFS={self.muon_coeffs}")


@dataclasses.dataclass(frozen=True)
class ScheduleKnobs:
    """The length of training and its schedule."""

    iterations: int = knob(20000, "limit of the number of training steps", 1)
    max_wallclock_seconds: float = knob(600.0, "seconds from training to packing; 0: no limit")
    gptq_reserve_seconds: float = knob(
        -1.0, "seconds of MAX_WALLCLOCK_SECONDS kept for compression; -1: measured in warm-up", -1
    )
    warmdown_frac: float = knob(0.75, "last share of the budget, in which rates fall", 0, 1)
    warmdown_iters: int = knob(0, "steps in which rates fall (PR #473); 0: WARMDOWN_FRAC")
    min_lr: float = knob(0.1, "least factor of the learning rates (PR #1787)", 0, 1)
    enable_looping_at: float = knob(0.35, "share of the budget after which the loops run", 0, 1)
    pod_speedgate_ms: float = knob(0.0, "mean ms of 20 steps above which the run stops; 0: off")
    val_loss_every: int = knob(4000, "steps between validations, off the clock; 0: none")

    @property
    def wallclock(self) -> float:
        """Seconds of the training budget; infinite without a limit."""
        return self.max_wallclock_seconds or math.inf

    def rules(self) -> Iterator[Rule]:
        """What is wrong with the budget."""
        if not self.eval_only_path and 2 * self.gptq_reserve_seconds > self.wallclock:
            yield Rule(
                "gptq_reserve_seconds",
                f"at most half of MAX_WALLCLOCK_SECONDS={self.max_wallclock_seconds:g}",
            )


@dataclasses.dataclass(frozen=True)
class ArtifactKnobs:
    """Quantisation and the artifact."""

    gptq_calibration_batches: int = knob(16, "training rows for the Hessians, over all ranks", 1)
    quantizer: str = knob(
        "allocated",
        "by sensitivity; GPTQ (PR #1394); no Hessians: gptq_lite (PR #374), int6 (PR #568)",
        choices=("allocated", "gptq", "gptq_lite", "int6"),
    )
    clip_floor: float = knob(1.0, "least clip range of a row's weights (gptq_lite, int6)")
    tables_fp16: bool = knob(False, "store embedding tables as fp16", network="optional")
    prune_frac: float = knob(0.0, "share of the smallest weights that becomes 0 (PR #568)", 0, 0.99)
    artifact_limit_bytes: int = knob(
        LIMIT_BYTES, "bytes of code and model to fit; 0: MATRIX_ and EMBED_CLIP_SIGMAS decide"
    )
    matrix_bits: int = knob(6, "bits of the banks' integers; allocated: limit of their mean", 2, 8)
    embed_bits: int = knob(7, "bits of the tables' integers (PR #1586); allocated: always 8", 2, 8)
    matrix_clip_sigmas: float = knob(12.85, "range of banks' integers, in row std deviations", 0.1)
    embed_clip_sigmas: float = knob(15.0, "range of tables' integers, in row std deviations", 0.1)
    attn_clip_sigmas: float = knob(0.0, "MATRIX_CLIP_SIGMAS of q, k, v and o; 0: the same")
    mlp_clip_sigmas: float = knob(0.0, "MATRIX_CLIP_SIGMAS of the MLP; 0: the same")
    compressor: str = knob("ans", "compressor of the integers", choices=COMPRESSORS)
    column_scales: bool = knob(True, "step sizes by column too, where there are Hessians")

    @property
    def no_hessians(self) -> bool:
        """Whether the quantiser works without Hessians."""
        return self.quantizer in ("gptq_lite", "int6")

    def rules(self) -> Iterator[Rule]:
        """What is wrong with the limit of the artifact."""
        num_weights = sum(math.prod(role.shape) for role in parameter_table(self).values())
        least = CODE_BYTES + num_weights // 8
        if 0 < self.artifact_limit_bytes < least and not self.eval_only_path:
            yield Rule(
                "artifact_limit_bytes",
                f"0 or at least {least}, code and one bit a weight; or lower"
                f" MODEL_DIM={self.model_dim}, MLP_MULT={self.mlp_mult},"
                f" NUM_LAYERS={self.num_layers}",
            )


@dataclasses.dataclass(frozen=True)
class ScoringKnobs:
    """Scoring."""

    val_batch_tokens: int = knob(524288, "tokens of eight scoring rows; no row splits a window", 16)
    eval_seq_len: int = knob(2048, "longest window of scoring, in tokens", 2, shrinks=True)
    eval_stride: int = knob(64, "tokens scored by each sliding window but the first", 1)
    logit_temperature: float = knob(1.0, "divisor of scored logits; choose it beforehand", 0.01)
    sliding_window_enabled: bool = knob(False, "score with sliding windows as well")
    val_doc_fraction: float = knob(1.0, "share of the validation documents, drawn by SEED", 1e-9, 1)
    eval_deadline_seconds: float = knob(580.0, "seconds for all scores; learning stops in time")
    tilt_order: int = knob(
        0, "token tilt: hints from equal runs of TILT_ORDER - 1 tokens (PR #2135); 0: none", 0, 64
    )
    tilt_threshold: float = knob(
        0.8, "token tilt: least share of a hint among earlier continuations", 0.01, 1
    )
    tilt_beta: float = knob(2.625, "token tilt: added to the log-odds of the hint", 0, 30)
    tilt_gamma: float = knob(
        0.0, "token tilt: beta times (1 - probability of the hint) to this power (PR #2129)", 0, 8
    )
    tilt_hedge: str = knob(
        "", "token tilt: several TILT_BETA, as in 1,2,3, mixed by their scores so far (PR #2050)"
    )

    @property
    def tilt_betas(self) -> tuple[float, ...]:
        """The values of beta that are mixed: those of TILT_HEDGE, or TILT_BETA alone."""
        values = self.tilt_hedge or str(self.tilt_beta)
        return tuple(float(value) for value in values.split(","))

    @property
    def val_row_shape(self) -> RowShape:
        """The shape of a row of scoring.

        Half of the capacity is for windows, the other half for the padding. A row's tokens can all
        be used if its windows have at least min(128, EVAL_SEQ_LEN / 2) tokens on average; shorter
        windows reach the capacity first.
        """
        capacity = self.val_batch_tokens // min(512, 2 * self.eval_seq_len)
        return RowShape(self.val_batch_tokens // 8, capacity, self.eval_seq_len)

    def rules(self) -> Iterator[Rule]:
        """What is wrong with the windows of scoring."""
        if self.val_batch_tokens < 8 * self.eval_seq_len:
            yield Rule("val_batch_tokens", f"at least 8 * EVAL_SEQ_LEN={self.eval_seq_len}")
        if self.eval_stride > self.eval_seq_len:
            yield Rule("eval_stride", f"at most EVAL_SEQ_LEN={self.eval_seq_len}")
        number = r"\d{1,2}(\.\d+)?"
        if not re.fullmatch(f"({number}(,{number})*)?", self.tilt_hedge):
            yield Rule("tilt_hedge", "values of TILT_BETA below 100 between commas, as in 1,2.5")


@dataclasses.dataclass(frozen=True)
class AdaptationKnobs:
    """Test-time training."""

    ttt_enabled: bool = knob(True, "learn from validation tokens after they are scored")
    ttt_mode: str = knob(
        "document", "learn a LoRA per document, or all weights", choices=("document", "chunk")
    )
    ttt_buckets: int = knob(10, "window lengths to compile and pad to; 0: every length", 0, 64)
    ttt_lora_rank: int = knob(96, "rank of every adapter", 1)
    ttt_lora_alpha: float = knob(0.0, "scale adapters by this / TTT_LORA_RANK (PR #1767); 0: by 1")
    ttt_lora_lr: float = knob(1e-4, "learning rate of the adapters")
    ttt_lm_rank: int = knob(0, "rank of the head's adapter; 0: TTT_LORA_RANK")
    ttt_bias_tune: bool = knob(False, "learn a vector that is added after every layer (PR #596)")
    ttt_lr_factors: str = knob("", "factors of TTT_LORA_LR by site, as in q:0.5,head:2 (PR #596)")
    ttt_cosine_chunks: int = knob(0, "chunks in which a document's rate falls to a tenth; 0: none")
    ttt_min_doc_len: int = knob(0, "tokens into a document before learning begins", shrinks=True)
    ttt_max_doc_len: int = knob(0, "tokens into a document after which learning ends; 0: none")
    ttt_warm_start_a: bool = knob(
        False, "begin with A of the batch before (PR #1767); stream order, fixed share per rank"
    )
    ttt_chunk_size: int = knob(48, "tokens of a document scored, then learnt from (PR #1560)", 1)
    ttt_short_chunks: str = knob("", "chunk sizes up to positions, as in 256:8,2000:24 (PR #2014)")
    ttt_eval_seq_len: int = knob(2048, "longest window of adaptation, in tokens", 2, shrinks=True)
    ttt_batch_size: int = knob(
        64, "documents at once on a rank; of short ones 4x, of long ones 1/4 (batch_size_factor)", 1
    )
    ttt_grad_steps: int = knob(1, "updates per scored chunk of a document", 1)
    ttt_weight_decay: float = knob(0.5, "weight decay of the adapters, decoupled in AdamW")
    ttt_beta1: float = knob(0.0, "first moment's decay of the adapters; SGD: momentum", 0, 0.9999)
    ttt_beta2: float = knob(0.999, "decay of the second moment of the adapters", 0, 0.99999)
    ttt_q_lora: bool = knob(True, "adapter on the queries")
    ttt_k_lora: bool = knob(True, "adapter on the keys")
    ttt_v_lora: bool = knob(True, "adapter on the values")
    ttt_mlp_lora: bool = knob(True, "adapter beside the MLP")
    ttt_o_lora: bool = knob(True, "adapter beside the attention output")
    ttt_optimizer: str = knob("adam", "adapters' optimiser, AdamW or SGD", choices=("adam", "sgd"))
    phased_ttt_num_phases: int = knob(0, "places in the stream where all weights learn (PR #1626)")
    phased_ttt_prefix_docs: int = knob(
        2000, "documents before the last place of PHASED_TTT_NUM_PHASES; the places are even", 1
    )
    phased_ttt_prefix_tokens: int = knob(
        0, "targets before the last of PHASED_TTT_NUM_PHASES places; 0: PHASED_TTT_PREFIX_DOCS"
    )
    ttt_chunk_optimizer: str = knob(
        "sgd", "all weights: SGD, or AdamW with BETA1, BETA2 (PR #473)", choices=("sgd", "adam")
    )
    ttt_lr: float = knob(0.002, "learning of all weights: first rate of the cosine (PR #461)")
    ttt_momentum: float = knob(0.9, "learning of all weights: momentum", 0, 0.9999)
    ttt_epochs: int = knob(
        1, "learning of all weights: passes over a scored chunk (PR #1413: 3)", 1
    )
    ttt_chunk_tokens: int = knob(32768, "learning of all weights: tokens of a chunk", 2)
    ttt_batch_seqs: int = knob(
        32, "learning of all weights: rows of EVAL_SEQ_LEN per rank and step", 1
    )
    ttt_grad_clip: float = knob(1.0, "learning of all weights: limit of the gradient norm; 0: none")
    ttt_freeze_blocks: int = knob(
        0, "learning of all weights: layers from the bottom that do not learn"
    )

    @property
    def lora_scale(self) -> float:
        """Factor of what the adapters add."""
        return self.ttt_lora_alpha / self.ttt_lora_rank if self.ttt_lora_alpha else 1.0

    @property
    def adapter_rate_factors(self) -> dict[str, float]:
        """TTT_LR_FACTORS: site -> factor of the learning rate; 1 for a site that is absent."""
        pairs = (pair.split(":") for pair in self.ttt_lr_factors.split(",") if pair)
        return {site: float(factor) for site, factor in pairs}

    @property
    def short_chunks(self) -> list[tuple[int, int]]:
        """TTT_SHORT_CHUNKS: (position in a document, size of the chunks up to it), in order."""
        pairs = (pair.split(":") for pair in self.ttt_short_chunks.split(",") if pair)
        return sorted((int(position), int(size)) for position, size in pairs)

    @property
    def learns_by_chunks(self) -> bool:
        """Whether all weights learn by SGD, chunk by chunk."""
        return self.ttt_enabled and (self.ttt_mode == "chunk" or self.phased_ttt_num_phases > 0)

    def rules(self) -> Iterator[Rule]:
        """What is wrong with test-time training."""
        longest = self.ttt_eval_seq_len
        if self.ttt_chunk_size > longest:
            yield Rule("ttt_chunk_size", f"at most TTT_EVAL_SEQ_LEN={longest}")
        if not self.short_chunks_are_valid():
            yield Rule(
                "ttt_short_chunks",
                f"position:size,.. with sizes up to TTT_EVAL_SEQ_LEN={longest}",
            )
        if not re.fullmatch(r"((q|k|v|o|mlp|head|bias):\d*\.?\d+(,|$))*", self.ttt_lr_factors):
            yield Rule("ttt_lr_factors", "site:factor,.. with sites q, k, v, o, mlp, head, bias")
        if 0 < self.ttt_max_doc_len <= self.ttt_min_doc_len:
            yield Rule("ttt_max_doc_len", f"0 or above TTT_MIN_DOC_LEN={self.ttt_min_doc_len}")
        phases = self.phased_ttt_num_phases
        if self.ttt_mode == "chunk" and phases:
            yield Rule("ttt_mode", f"document with PHASED_TTT_NUM_PHASES={phases}")
        if self.ttt_epochs > 1 and self.ttt_mode == "document" and not phases:
            yield Rule(
                "ttt_epochs",
                "1 with TTT_MODE=document: a document is learnt from once (ruling on PR #605)",
            )
        if self.ttt_chunk_tokens < self.eval_seq_len:
            yield Rule("ttt_chunk_tokens", f"at least EVAL_SEQ_LEN={self.eval_seq_len}")
        if self.ttt_freeze_blocks > self.num_layers:
            yield Rule("ttt_freeze_blocks", f"at most NUM_LAYERS={self.num_layers}")

    def short_chunks_are_valid(self) -> bool:
        """Whether TTT_SHORT_CHUNKS is a list of positions and sizes that fit into a window."""
        if not re.fullmatch(r"(\d+:[1-9]\d*(,|$))*", self.ttt_short_chunks):
            return False
        return all(size <= self.ttt_eval_seq_len for _, size in self.short_chunks)


@dataclasses.dataclass(frozen=True)
class KernelKnobs:
    """Kernels, compilation and warm-up."""

    compute_dtype: str = knob(
        "bf16",
        "dtype of activations and products; auto: bf16, but fp32 on a CPU that is slow in bf16",
        choices=("auto", "bf16", "fp32"),
    )
    compile: bool = knob(True, "use torch.compile for the forwards and Newton-Schulz")
    warmup_steps: int = knob(3, "synthetic steps per graph, undone; 0: compile inside the run")
    recompile_limit: int = knob(-1, "compilations allowed after warm-up; -1: any number", -1)
    cuda_graph: bool = knob(False, "replay a row's forward and backward as a CUDA graph")
    attention_backend: str = knob(
        "auto",
        "attention kernel; auto: the first that passes the check",
        choices=("auto", "fa3", "fa4", "fa2", "torch", "sdpa"),
    )
    fused_mlp: bool = knob(True, "fuse the MLP's products with its activation; 0: separate")
    fused_qk: bool = knob(True, "fuse norm, RoPE and gain of queries and keys; 0: separate")
    fused_xsa: bool = knob(True, "fuse the operators of XSA; 0: separate")
    fused_ce: bool = knob(True, "fuse head and loss, in place on the logits; 0: separate")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations and products. A run replaces "auto"; elsewhere it is fp32."""
        return torch.bfloat16 if self.compute_dtype == "bf16" else torch.float32

    def rules(self) -> Iterator[Rule]:
        """What is wrong with kernels and compilation."""
        if self.recompile_limit >= 0 and not self.warmup_steps:
            yield Rule("recompile_limit", "-1 with WARMUP_STEPS=0")


# A dataclass takes the fields of its last base first, so the first group stands last.
@dataclasses.dataclass(frozen=True)
class Config(
    KernelKnobs,
    AdaptationKnobs,
    ScoringKnobs,
    ArtifactKnobs,
    ScheduleKnobs,
    OptimizerKnobs,
    ModelKnobs,
    DataKnobs,
    RunKnobs,
):
    """All knobs of a run. Defaults are the `record` preset's.

    PRESETS overrides the defaults, and the environment overrides both.
    """

    @classmethod
    def from_env(cls, environ: Mapping[str, str], has_cuda: bool) -> tuple[Config, dict[str, str]]:
        """The config that `environ` asks for, and the origin of each field.

        An origin is "default", "preset" or "env". Raises UsageError with every problem at once.
        """
        given = canonical_names(environ)
        problems = list(problems_of_names(given))
        asked = {}
        for name in sorted(FIELDS):
            if name.upper() not in given:
                continue
            try:
                asked[name] = parse_knob(FIELDS[name], given[name.upper()])
            except ValueError as error:
                problems.append(f"{name.upper()}={given[name.upper()]}: {error}")
        preset = given.get("PRESET", "record" if has_cuda else "cpu")
        if preset not in PRESETS:
            problems.append(f"PRESET={preset}: must be one of {', '.join(PRESETS)}")
            raise UsageError("\n".join(problems))

        values = preset_values(preset, shrink=given.get("SHRINK") == "1")
        origin = {name: "preset" if name in values else "default" for name in FIELDS}
        origin |= {name: "env" for name in FIELDS if name.upper() in given}
        cfg = cls(**values | asked)
        problems += problems_of_aliases(environ)
        problems += problems_of_switches(environ, cfg)
        if cfg.warmdown_iters and origin["warmdown_frac"] == "env":
            problems.append(
                f"WARMDOWN_FRAC={cfg.warmdown_frac:g}: not with WARMDOWN_ITERS={cfg.warmdown_iters}"
            )
        problems += cfg.problems(origin)
        if problems:
            raise UsageError("\n".join(problems))
        return cfg, origin

    def problems(self, origin: Mapping[str, str] | None = None) -> list[str]:
        """A line for each value out of range or, if there is none, for each rule that is broken.

        origin: of each field, "default", "preset" or "env", for the lines.
        """
        broken = list(self.out_of_range()) or list(self.rules()) or list(self.rules_of_storage())
        return [self.message(rule, (origin or {}).get(rule.field, "")) for rule in broken]

    def message(self, rule: Rule, origin: str = "") -> str:
        """The line for the user: variable, value, and what it must be.

        A value that the user has not set gets its origin: the remedy may be another knob.
        """
        value = getattr(self, rule.field)
        if isinstance(value, bool):
            value = int(value)
        source = {"preset": f", from PRESET={self.preset}", "default": ", the default"}
        return f"{rule.field.upper()}={value}{source.get(origin, '')}: must be {rule.requirement}"

    def out_of_range(self) -> Iterator[Rule]:
        """The values that are out of range or not among the choices."""
        for name, field in FIELDS.items():
            value = getattr(self, name)
            lo = field.metadata["lo"]
            hi = field.metadata["hi"]
            choices = field.metadata["choices"]
            if choices:
                if value not in choices:
                    yield Rule(name, f"one of {', '.join(choices)}")
            elif not isinstance(value, str) and not lo <= value <= hi:
                yield Rule(name, f"{lo:g}..{hi:g}" if hi < NO_LIMIT else f"at least {lo:g}")

    def rules(self) -> Iterator[Rule]:
        """The rules between knobs that are broken, of all groups."""
        for group in GROUPS:
            yield from group.rules(self)

    def rules_of_storage(self) -> Iterator[Rule]:
        """The knobs that change the network, but that no model file would hold.

        Without this rule the run would find out only when it reads its artifact back.
        """
        if shapes_and_plans(self) == shapes_and_plans(stored_network(self)):
            return
        for name, field in FIELDS.items():
            if name in NETWORK_FIELDS or getattr(self, name) == field.default:
                continue
            without = dataclasses.replace(self, **{name: field.default})
            if shapes_and_plans(without) != shapes_and_plans(self):
                yield Rule(
                    name, f"{field.default}, or a knob with network=True: it changes the network"
                )

    def warnings(self) -> Iterator[str]:
        """A sentence for each setting that others have tried and found harmful."""
        if self.learns_by_chunks:
            yield from self.warnings_of_chunks()
        if self.export_weights == "swa" and self.swa_threshold > 0.2:
            yield (
                f"SWA_THRESHOLD={self.swa_threshold:g}: an average from 0.5 on hurt, from 0.2 on it"
                " cost nothing (PR #374)"
            )
        if self.compile and self.num_loops and not self.warmup_steps:
            yield (
                "WARMUP_STEPS=0: with loops and compilation on the clock a port had 1440 steps in"
                " 600 s (remark in PR #1530)"
            )
        if self.logit_temperature != 1:
            yield (
                f"LOGIT_TEMPERATURE={self.logit_temperature:g}: legal only if chosen without a look"
                " at validation scores (issue #1017; PR #605 was refused)"
            )

    def warnings_of_chunks(self) -> Iterator[str]:
        """A sentence for each such setting of the SGD of all weights, chunk by chunk."""
        if self.ttt_chunk_optimizer == "adam":
            yield (
                "TTT_CHUNK_OPTIMIZER=adam overfits the chunk: 1.1598 bpb, SGD 1.1220 (PR #473);"
                " 1.0825 became 1.1885 (PR #1947)"
            )
        if self.ttt_epochs > 3:
            yield (
                f"TTT_EPOCHS={self.ttt_epochs}: gains end near 1.1202 bpb, and only 3 fit into"
                " 600 s on 8xH100 (PR #473); from 3 to 30 they gave 0.002 (PR #526)"
            )
        elif self.ttt_freeze_blocks:
            yield (
                f"TTT_FREEZE_BLOCKS={self.ttt_freeze_blocks}: with few epochs, none frozen was best"
                " (PR #473, #549)"
            )
        if self.late_qat:
            yield "LATE_QAT=1 hurt under test-time training of all weights (PR #398)"
        if self.quantizer == "gptq" and not self.num_loops:
            yield (
                "QUANTIZER=gptq: SGD by chunks gained nothing on such a model (1.12075, before"
                " 1.12070: PR #533)"
            )

    def idle_knobs(self) -> Iterator[tuple[str, str]]:
        """Patterns of knobs that have no effect, and the setting that is the reason."""
        if not self.num_loops:
            yield "loop_* enable_looping_at", "NUM_LOOPS=0"
        if not self.parallel_start_layer:
            yield "parallel_final_lane", "PARALLEL_START_LAYER=0"
        if not self.bigram_vocab_size:
            yield "bigram_dim", "BIGRAM_VOCAB_SIZE=0"
        if not self.ve_enabled:
            yield "ve_dim ve_layers", "VE_ENABLED=0"
        if not self.sparse_attn_gate_enabled:
            yield "sparse_attn_gate_scale", "SPARSE_ATTN_GATE_ENABLED=0"
            if not self.smear_gate_enabled:
                yield "gate_window", "SPARSE_ATTN_GATE_ENABLED=0 SMEAR_GATE_ENABLED=0"
        if self.export_weights != "swa":
            yield "swa_*", f"EXPORT_WEIGHTS={self.export_weights}"
        if self.export_weights == "raw":
            yield "ema_*", "EXPORT_WEIGHTS=raw"
        if not self.late_qat:
            yield "late_qat_threshold", "LATE_QAT=0"
        if self.no_hessians:
            yield "column_scales gptq_calibration_batches", f"QUANTIZER={self.quantizer}"
        else:
            yield "clip_floor", f"QUANTIZER={self.quantizer}"
        yield from self.idle_knobs_of_evaluation()

    def idle_knobs_of_evaluation(self) -> Iterator[tuple[str, str]]:
        """The same for scoring and adaptation."""
        if not self.sliding_window_enabled:
            yield "eval_stride", "SLIDING_WINDOW_ENABLED=0"
        if not self.tilt_order:
            yield "tilt_*", "TILT_ORDER=0"
        if not self.ttt_enabled:
            yield "ttt_* phased_ttt_*", "TTT_ENABLED=0"
            return
        if self.ttt_mode == "chunk":
            yield (
                "ttt_lora_* ttt_*_lora ttt_lm_rank ttt_bias_tune ttt_lr_factors ttt_cosine_chunks"
                " ttt_m??_doc_len ttt_warm_start_a ttt_chunk_size ttt_short_chunks ttt_batch_size"
                " ttt_grad_steps ttt_weight_decay ttt_beta? ttt_optimizer",
                "TTT_MODE=chunk",
            )
        if not self.learns_by_chunks:
            yield (
                "phased_ttt_prefix_* ttt_chunk_optimizer ttt_lr ttt_momentum ttt_epochs"
                " ttt_chunk_tokens ttt_batch_seqs ttt_grad_clip ttt_freeze_blocks",
                "TTT_MODE=document PHASED_TTT_NUM_PHASES=0",
            )

    def warnings_of_idle_knobs(self, origin: Mapping[str, str]) -> Iterator[str]:
        """A line for each setting that leaves knobs of the environment without effect."""
        switches = ("ttt_enabled", "tilt_order")
        for patterns, reason in self.idle_knobs():
            idle = []
            for name in FIELDS:
                if origin[name] == "env" and name not in switches and is_named(name, patterns):
                    idle.append(name.upper())
            if idle:
                yield f"{', '.join(idle)}: no effect with {reason}"


GROUPS = Config.__bases__[::-1]
FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def fields_marked(mark: str, *values: object) -> tuple[str, ...]:
    """The names of the fields whose metadata has one of `values` under `mark`."""
    return tuple(name for name, field in FIELDS.items() if field.metadata[mark] in values)


NETWORK_FIELDS = fields_marked("network", True, "optional")
OPTIONAL_NETWORK_FIELDS = fields_marked("network", "optional")
FREE_FIELDS = fields_marked("free_on_resume", True)
SHRUNK_LENGTHS = fields_marked("shrinks", True)


def network_config(cfg: Config) -> dict[str, Any]:
    """The network's fields as a model file holds them."""
    config = {}
    for name in NETWORK_FIELDS:
        value = getattr(cfg, name)
        if name not in OPTIONAL_NETWORK_FIELDS or value != FIELDS[name].default:
            config[name] = value
    return config


def read_network_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """All of the network's fields, from those a model file holds.

    Raises KeyError if one is missing, ForeignValue if one has another type than its knob.
    """
    defaults = {name: FIELDS[name].default for name in OPTIONAL_NETWORK_FIELDS}
    values = defaults | config
    for name in NETWORK_FIELDS:
        if type(values[name]) is not type(FIELDS[name].default):
            raise ForeignValue(f"its config holds {name}={values[name]!a}")
    return {name: values[name] for name in NETWORK_FIELDS}


def stored_network(cfg: Config) -> Config:
    """The config that a reader of the model file of `cfg` would have."""
    return Config(**read_network_config(network_config(cfg)))


def shapes_and_plans(cfg: Config) -> tuple[Any, ...]:
    """The shapes of all parameters, and the orders of layers."""
    return {name: role.shape for name, role in parameter_table(cfg).items()}, cfg.plans


# --- Values and paths ---
def parse_knob(field: dataclasses.Field, text: str) -> Any:
    """The value of a variable. Raises ValueError, which says what it must be."""
    kind = type(field.default)
    if kind is bool:
        if text not in ("0", "1"):
            raise ValueError("must be 0 or 1")
        return text == "1"
    try:
        return kind(text)
    except ValueError:
        number = "a whole number" if kind is int else "a number"
        raise ValueError(f"must be {number}") from None


def check_paths(cfg: Config) -> None:
    """Check what the run will write to and the packages it will import.

    Raises UsageError, one line per problem.
    """
    problems = []
    log = Path("logs", f"{cfg.run_id}.txt")
    if not can_be_written(Path("logs", "x"), is_file=True):
        problems.append("logs: cannot be written; change its permissions, or run in another folder")
    elif cfg.run_id and not can_be_written(log, is_file=True):
        rule = Rule("run_id", "the name of a file that can be written in logs")
        problems.append(cfg.message(rule))
    problems += [cfg.message(rule) for rule in rules_of_paths(cfg)]
    if problems:
        raise UsageError("\n".join(problems))


# The files that a run writes to its folder. Where a folder has such a name, the run cannot write.
OUTPUTS = (
    "checkpoint.0.pt",
    "checkpoint.1.pt",
    "last_good.pt",
    "final_model.pt",
    "final_model.int6.ptz",
    "scores.json",
    "documents.npz",
)


def rules_of_paths(cfg: Config) -> Iterator[Rule]:
    """The rules about the run's other files and folders, and about packages, that are broken."""
    folder = Path(cfg.artifact_dir or f"runs/{cfg.run_id}")
    if not can_be_written(folder):
        yield Rule("artifact_dir", "a folder that can be written")
    for name in OUTPUTS:
        # Without RUN_ID the folder will be a new one.
        if (cfg.artifact_dir or cfg.run_id) and (folder / name).is_dir():
            yield Rule("artifact_dir", f"a place where {folder / name} is no folder")
    if cfg.tensorboard_dir:
        if importlib.util.find_spec("tensorboard") is None:
            yield Rule("tensorboard_dir", "empty, or tensorboard must be installed")
        elif not can_be_written(Path(cfg.tensorboard_dir, cfg.run_id)):
            yield Rule("tensorboard_dir", "empty or a folder that can be written")
    if cfg.wandb_project and importlib.util.find_spec("wandb") is None:
        yield Rule("wandb_project", "empty, or wandb must be installed")
    package = {"zstd": "zstandard", "brotli": "brotli"}.get(cfg.compressor)
    if package and importlib.util.find_spec(package) is None:
        yield Rule("compressor", f"ans or lzma, or {package} must be installed")


def can_be_written(path: Path, is_file: bool = False) -> bool:
    """Whether a folder (or file) can be written or, if there is none, made."""
    path = Path.cwd() / path
    existing = path
    while not os.path.lexists(existing):
        # A name may have 255 bytes; four are left free, because a log's name may get .old.
        if len(os.fsencode(existing.name)) > 251:
            return False
        existing = existing.parent

    is_there = existing == path
    # Whatever is not there yet is made in the nearest folder above it. A link to nothing is there.
    needs_folder = not (is_file and is_there)
    is_right = existing.is_dir() if needs_folder else existing.is_file()
    return is_right and os.access(existing, os.W_OK)


# --- Presets: what differs from the defaults ---
# The published system: parallel lanes, loops, GPTQ, a LoRA per document.
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
    column_scales=False,
    artifact_limit_bytes=0,
)

# PR #1530's script with a longer fall of the rates and longer chunks.
PR1560 = dict(PR1530, warmdown_frac=0.75, ttt_chunk_size=48)

# What the three earlier systems have in common: one lane, and SGD of all weights in three epochs.
SEED_SYSTEMS = dict(
    PR1530,
    parallel_start_layer=0,
    muon_momentum=0.99,
    matrix_lr=0.02,
    sliding_window_enabled=True,
    ttt_mode="chunk",
    ttt_epochs=3,
)

# Loops of two layers, shuffled rows of equal length.
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

# What the two oldest have in common: vocabulary 1024, no loops, squared ReLU, SmearGate.
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

# Embedding of token pairs, value embeddings, quantisation without Hessians.
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

# The legal form of PR #605: one pass over a document, which is scored first.
PR605 = dict(
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

# The record's structure on two CPU cores in two minutes, over the docstrings of installed packages.
CPU = dict(
    dataset="pydocs_sp1024_caseops",
    vocab_size=1024,
    compile=False,
    # bf16 takes ten times as long on a processor without instructions for it.
    compute_dtype="auto",
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
    # On two idle cores the evaluation takes 95 s; on busy ones this bounds it.
    eval_deadline_seconds=200.0,
    ttt_lora_rank=8,
    ttt_lora_lr=3e-3,
    ttt_chunk_size=128,
    ttt_eval_seq_len=512,
    ttt_batch_size=16,
    ttt_buckets=0,
    ttt_chunk_tokens=4096,
)

# The accepted records of April and May 2026, as far as their maths keeps the rules; docs/presets.md
# lists what differs.
PR1855 = dict(
    dataset="fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
    sparse_attn_gate_enabled=True,
    smear_gate_enabled=True,
    warmdown_frac=0.85,
    muon_coeffs="polar",
    beta2=0.99,
    val_loss_every=0,
    quantizer="gptq",
    mlp_clip_sigmas=11.5,
    attn_clip_sigmas=13.0,
    embed_clip_sigmas=14.0,
    column_scales=False,
    ttt_lora_rank=80,
    ttt_lora_alpha=144.0,
    ttt_warm_start_a=True,
    ttt_beta2=0.99,
    phased_ttt_num_phases=3,
    # The 289 chunks of 32,768 targets from which its last phase learnt.
    phased_ttt_prefix_tokens=9_470_000,
    ttt_lr=0.001,
)

# Longer segments as training goes on, shorter chunks at the beginning of documents.
PR2014 = dict(
    PR1855,
    train_seq_len=3072,
    seq_len_schedule="0:1024,0.1:2048,0.7:3072",
    qk_gain_init=5.25,
    eval_seq_len=3072,
    ttt_eval_seq_len=3072,
    ttt_batch_size=24,
    ttt_short_chunks="256:8,2000:24",
    ttt_lora_lr=0.75e-4,
    ttt_q_lora=False,
    ttt_v_lora=False,
    phased_ttt_num_phases=1,
)

# The last accepted record.
PR2135 = dict(
    PR1855,
    matrix_lr=0.028,
    gptq_calibration_batches=32,
    eval_seq_len=2560,
    ttt_eval_seq_len=2560,
    ttt_lora_lr=8e-5,
    ttt_weight_decay=2.0,
    ttt_k_lora=False,
    phased_ttt_num_phases=1,
    tilt_order=16,
)

# The last accepted record with this file's own quantiser: steps by what an error of a row and of a
# column costs. EXPERIMENTS.md has the evidence.
RECORD = dict(
    PR2135,
    quantizer="allocated",
    column_scales=True,
)

PRESETS = {
    "record": RECORD,
    "pr1530": PR1530,
    "pr1560": PR1560,
    "pr1413": PR1413,
    "pr473": PR473,
    "pr605": PR605,
    "cpu": CPU,
    "pr1855": PR1855,
    "pr2014": PR2014,
    "pr2135": PR2135,
}

# SHRINK=1 changes every preset but cpu in three ways: SHRUNK_LENGTHS become an eighth, the fields
# in SHRUNK_AS_CPU take their values from the cpu preset, and the rest of SHRINK is set as below.
SHRUNK_AS_CPU = (
    "dataset",
    "vocab_size",
    "compile",
    "compute_dtype",
    "train_batch_tokens",
    "micro_batch_tokens",
    "ema_decay",
    "muon_momentum",
    "muon_momentum_warmup_start",
    "muon_momentum_warmup_steps",
    "val_batch_tokens",
    "ttt_lora_rank",
    "ttt_lora_lr",
    "ttt_batch_size",
    "ttt_buckets",
    "ttt_chunk_tokens",
)
SHRINK = {name: CPU[name] for name in SHRUNK_AS_CPU} | dict(
    model_dim=128,
    num_heads=4,
    num_kv_heads=2,
    bigram_vocab_size=512,
    bigram_dim=32,
    ve_dim=32,
    max_wallclock_seconds=40.0,
    gptq_reserve_seconds=-1.0,
    gptq_calibration_batches=16,
    warmdown_iters=200,
    cu_seqlens_capacity=128,
    swa_every=5,
    eval_stride=128,
    ttt_chunk_size=32,
    ttt_epochs=1,
    seq_len_schedule="0:128,0.1:256,0.7:384",
    ttt_lora_alpha=14.4,
    ttt_short_chunks="32:8,128:16",
    phased_ttt_prefix_tokens=16384,
)


def preset_values(preset: str, shrink: bool) -> dict[str, Any]:
    """The fields that a preset sets, made small if `shrink`."""
    values = {**PRESETS[preset], "preset": preset}
    if not shrink or preset == "cpu":
        return values

    full = {name: values.get(name, field.default) for name, field in FIELDS.items()}
    for name, small in SHRINK.items():
        # A feature that the preset leaves off (0 or empty) stays off. An empty `dataset` is no such
        # feature: it stands for FineWeb.
        if full[name] or name == "dataset":
            values[name] = small
    for name in SHRUNK_LENGTHS:
        values[name] = full[name] // 8
    return values


def print_knobs(word: str) -> None:
    """Print each knob whose name or meaning has `word`, in lines of at most 100 columns.

    A variable stands with its default in the preset `record` and in those that differ, then its
    meaning. Raises UsageError if there is none.
    """
    wrap = partial(textwrap.fill, width=100, break_on_hyphens=False)
    is_known = False
    for name, field in FIELDS.items():
        meaning = " ".join([field.metadata["doc"], " | ".join(field.metadata["choices"])]).strip()
        if word.lower() not in f"{name} {meaning}".lower():
            continue
        is_known = True
        cells = {}
        for preset in PRESETS:
            value = preset_values(preset, shrink=False).get(name, field.default)
            cells[preset] = f"{value:g}" if isinstance(value, (int, float)) else value or "-"
        usual = cells.pop("record")
        others = " ".join(f"{preset}={cell}" for preset, cell in cells.items() if cell != usual)
        print(wrap(f"{name.upper()}={usual}  {others}".strip(), subsequent_indent=" " * 8))
        print(wrap(meaning, initial_indent=" " * 4, subsequent_indent=" " * 4))
    if not is_known:
        raise UsageError(f"--knobs {word}: no knob has this word in its name or meaning")


# === 2. Runtime: ranks, log, clock, files ===
# What differs on a GPU:
#   PRESET defaults to record (main), the device is set and ranks talk over NCCL (Ranks);
#   the clock waits for the device (Ranks.now), copies are pinned and do not block (to_device,
#   PendingRead), and an error leaves NCCL's group as it is (main);
#   Triton kernels run in place of their references (define_operator) with measured tiles
#   (TileTuner); Hopper has a kernel for the MLP (mlp_kernel_fits);
#   attention is chosen by a check of each backend (choose_attention);
#   with CUDA_GRAPH=1 a training row is one launch (capture_row, Run.capture_training);
#   the adapters' first values come from the device's generator (LoRA.reset), sdpa takes one segment
#   at a time, and adaptation survives a lack of memory (Adaptation.run_chunk);
#   the device's random state is restored too (state_restored), and the log names the device, the
#   model FLOP utilisation (PEAK_FLOPS) and the peak memory (Run.describe, Run.report).


class PendingRead:
    """Numbers (n,) that are being copied from the device to the host without blocking."""

    def __init__(self, values: Tensor, ranks: Ranks):
        """Starts the copy."""
        self.copied = None
        if values.is_cuda:
            # The host tensor is pinned, so this returns at once.
            self.host = values.to("cpu", non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self.host = values
            self.time = ranks.now()

    def wait(self) -> tuple[list[float], float]:
        """Waits for these numbers only; returns them and their arrival in monotonic seconds."""
        if self.copied is not None:
            self.copied.synchronize()
            self.time = time.monotonic()
        return self.host.tolist(), self.time


def is_running(pid: int) -> bool:
    """Whether a process of this machine lives."""
    try:
        # The name before the last parenthesis may hold spaces.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        # Too many open files, say: no reason to think that it has died.
        return True


def process_space() -> str:
    """Names the set of processes that this one can see; empty where that is not known."""
    try:
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def tell_peers(reason: str) -> None:
    """Leaves the reason why this rank ends where the other ranks find it."""
    # The store may have ended with the rank that held it.
    with contextlib.suppress(Exception):
        store = dist.distributed_c10d._get_default_store()
        store.set(f"train_gpt/end{dist.get_rank()}", reason)


LOST_A_PEER = "lost a peer"


def describe_lost_peers() -> str:
    """Which ranks have ended, each with the reason that it gave; empty if that cannot be known."""
    space, pid = process_space(), os.getpid()
    lost = []
    try:
        store = dist.distributed_c10d._get_default_store()
        # The system may still be at work on the end of a process whose connections are closed.
        deadline = time.monotonic() + 3
        while not lost and time.monotonic() < deadline:
            time.sleep(0.1)
            for rank in range(dist.get_world_size()):
                process_key, end_key = f"train_gpt/process{rank}", f"train_gpt/end{rank}"
                if store.check([end_key]):
                    reason = store.get(end_key).decode()
                    if reason != LOST_A_PEER:
                        lost.append(f"rank {rank} failed: {reason}")
                elif store.check([process_key]):
                    peer, peer_space = store.get(process_key).decode().split(" ", 1)
                    is_seen = peer_space != "" and peer_space == space
                    if is_seen and int(peer) != pid and not is_running(int(peer)):
                        lost.append(
                            f"rank {rank} (process {peer}) was killed, from outside or by the"
                            " system for lack of memory"
                        )
    except dist.DistNetworkError:
        lost.append("the process that keeps the store, rank 0 or torchrun, has ended")
    # The line is for people: whatever else fails here, the lost peer itself is reported.
    except Exception:
        return ""
    return "; ".join(lost)


def complain(message: str) -> None:
    """Writes the program's one line of error, if there is a message."""
    if message:
        with contextlib.suppress(OSError):
            print(f"train_gpt.py: {message}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; empty if it has none."""
    return str(error).partition("\n")[0]


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether a GPU, or the host, had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # PyTorch's words on Linux and macOS, and on Windows.
    return re.search("t allocate memory|not enough memory", str(error)) is not None


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has gone."""
    # gloo writes "Connection", NCCL "connection".
    return dist.is_initialized() and "connection" in str(error).lower()


def complain_of_lost_peers(error: RuntimeError) -> None:
    """Says which peers were lost, by the error of the collective that failed."""
    reason = describe_lost_peers() or first_line(error)
    tell_peers(LOST_A_PEER)
    if dist.get_rank() == 0:
        # Without torchrun this rank keeps the store, and the others want to know, too.
        time.sleep(4)
    complain(f"rank {dist.get_rank()} {LOST_A_PEER}: {reason}")


def launch_numbers(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; (0, 1, LOCAL_RANK) without RANK.

    Raises BadRank if they cannot be right.
    """
    remedy = "start with torchrun, which sets it, or unset RANK"

    def number(name: str, default: int) -> int:
        text = environ.get(name, default)
        try:
            return int(text)
        except ValueError:
            raise BadRank(f"{name}={text}: must be a whole number; {remedy}") from None

    local_rank = number("LOCAL_RANK", 0)
    if "RANK" not in environ:
        return 0, 1, local_rank
    rank = number("RANK", 0)
    world_size = number("WORLD_SIZE", 1)
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in environ:
            raise BadRank(f"RANK={rank}: needs {name}; {remedy}")
    if not 0 <= rank < world_size:
        raise BadRank(f"RANK={rank}: must be below WORLD_SIZE={world_size}; {remedy}")
    return rank, world_size, local_rank


def end_with_parent() -> None:
    """Asks Linux for SIGTERM when the parent ends: torchrun may be killed, or end by SIGUSR1."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM), 0, 0, 0)  # PR_SET_PDEATHSIG


class Ranks:
    """This process among its peers, as torchrun's variables describe them.

    All ranks must call `sum`, `gather` and `tickets` together. Without a process group, `sum`
    returns its tensor unchanged, and `gather` a list of the one value.
    """

    def __init__(self, environ: Mapping[str, str]):
        # Without RANK, WORLD_SIZE means nothing: clusters may set it for any process.
        self.distributed = "RANK" in environ
        self.rank, self.world_size, local_rank = launch_numbers(environ)
        self.is_main = self.rank == 0
        # Someone may be watching rank 0's terminal.
        self.live = self.is_main and is_terminal(sys.stdout) and "CI" not in environ
        self.num_queues = 0
        # Set when the run is over and peers may end.
        self.finished = threading.Event()
        # A number of threads that the user has chosen stays; torchrun chooses for him.
        self.may_choose_threads = not self.distributed and "OMP_NUM_THREADS" not in environ
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.may_choose_threads = False
            count = torch.cuda.device_count()
            if local_rank >= count:
                message = (
                    f"LOCAL_RANK={local_rank}: this machine has {count} GPUs; start torchrun with"
                    f" --nproc_per_node={count}"
                )
                # One line is enough: the first surplus rank speaks for the others.
                raise BadRank(message if local_rank == count else "")
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        if self.distributed:
            if "TORCHELASTIC_RUN_ID" in environ:
                end_with_parent()
            self._join_group(environ.get("TORCHELASTIC_RESTART_COUNT", 0))

    def _join_group(self, restart_count: int | str) -> None:
        """Joins the process group: NCCL on GPUs, gloo on CPUs."""
        # Imported before the group exists: afterwards the default arguments of its functions would
        # hold the group and keep its threads alive.
        importlib.import_module("torch.distributed.nn")
        store, rank, size = next(dist.rendezvous("env://"))
        # torchrun keeps the store when it restarts the ranks, with the keys of the earlier start.
        store = dist.PrefixStore(f"start {restart_count}", store)
        group = dict(store=store, rank=rank, world_size=size)
        if self.device.type == "cuda":
            dist.init_process_group("nccl", device_id=self.device, **group)
        else:
            dist.init_process_group("gloo", **group)

    def sum(self, t: Tensor) -> Tensor:
        """Sums a tensor over all ranks, in place, and returns it."""
        if self.distributed:
            dist.all_reduce(t)
        return t

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in the order of the ranks. The values are pickled."""
        values = [value] * self.world_size
        if self.distributed:
            dist.all_gather_object(values, value)
        return values

    def watch_peers(self) -> None:
        """Ends this process seconds after a peer on this machine has died.

        In any phase after the check. Usually the next collective fails first; but a rank may be far
        from it, or NCCL may wait. A peer elsewhere is for torchrun to watch. All ranks must call
        it.
        """
        if not self.distributed:
            return
        space, pid = process_space(), os.getpid()
        processes = self.gather((space, pid))
        store = dist.distributed_c10d._get_default_store()
        store.set(f"train_gpt/process{self.rank}", f"{pid} {space}")
        peers = {}
        for rank, (peer_space, peer) in enumerate(processes):
            if peer != pid and peer_space and peer_space == space:
                peers[rank] = peer
        if peers:
            threading.Thread(target=self.end_after_peers, args=(peers,), daemon=True).start()

    def end_after_peers(self, peers: dict[int, int]) -> None:
        """Waits for the end of a peer; then ends this process, unless it does so by itself.

        peers: processes by rank.
        """
        while not self.finished.wait(1):
            lost = [rank for rank, pid in peers.items() if not is_running(pid)]
            if lost and not self.finished.wait(10):
                reason = describe_lost_peers() or f"rank {lost[0]} has died"
                complain(f"rank {self.rank} {LOST_A_PEER}: {reason}")
                os._exit(1)

    def alone(self) -> Ranks:
        """This rank as if it were the only one. Not collective."""
        single = copy.copy(self)
        single.rank = 0
        single.world_size = 1
        single.distributed = False
        return single

    def tickets(self) -> Iterator[int]:
        """The numbers 0, 1, 2, ... without end, each given to the one rank that asks first.

        A rank that has finished a part of the work takes the next, so all ranks stay busy although
        the parts differ in length.
        """
        self.num_queues += 1
        key = f"train_gpt/queue{self.num_queues}"
        store = dist.distributed_c10d._get_default_store() if self.distributed else dist.HashStore()
        while True:
            yield store.add(key, 1) - 1

    def now(self) -> float:
        """Monotonic seconds, read once the device has finished all work it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()


ERASE_LINE = "\r\033[K"


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal. sys.stdout is None if the program began without one."""
    return stream is not None and stream.isatty()


def print_while_open(text: str, end: str = "\n") -> None:
    """Prints to stdout. If nobody reads it any more, all later output goes nowhere."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        # The descriptor is replaced, so that Python's last flush finds no broken pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_output() -> None:
    """Makes stdout take any text, and exist, so that no file gets its descriptor.

    What the encoding of stdout lacks becomes a question mark.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


class Log:
    """Lines for people: rank 0 writes them to a file and to stdout, other ranks do nothing.

    A live log also shows a line on the terminal that is rewritten in place. `prefix` begins every
    line. `tensorboard_dir`, if not empty, receives the numbers given to `scalars`.
    """

    def __init__(self, path: Path, is_main: bool, live: bool = False, tensorboard_dir: str = ""):
        self.is_main = is_main
        self.live = live
        self.prefix = ""
        self.path = path
        self.phase_start = time.monotonic()
        self.tensorboard_dir = tensorboard_dir
        self.tensorboard = None  # SummaryWriter, made with the first numbers
        self.wandb = None  # the run at Weights & Biases, see open_wandb
        self.last_line_time = time.monotonic()
        self.last_shown_time = 0.0
        if is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                # A killed run may have left half a line.
                os.truncate(path, read_regular(path, MAX_LOG_BYTES).rfind(b"\n") + 1)
            self.file = path.open("ab", buffering=0)
        # Bytes of lines that could not be written yet.
        self.pending = b""
        # What to say of each file that could not be written, by its path.
        self.failures: dict[str, str] = {}

    def __call__(self, line: str, terminal: bool = True) -> None:
        """Writes a line to the file and, with `terminal`, to the terminal."""
        self.last_line_time = time.monotonic()
        if not self.is_main:
            return
        self.write(f"{self.prefix}{line}\n".encode(errors="replace"))
        if terminal:
            erase = ERASE_LINE if self.live else ""
            print_while_open(erase + self.prefix + line)

    def write(self, data: bytes) -> None:
        """Adds to the file. A full disk ends no run: the rest waits for the next line."""
        self.pending += data
        try:
            while self.pending:
                count = self.file.write(self.pending)
                self.pending = self.pending[count:]
            self.failures.pop(self.file.name, None)
        except OSError as error:
            self.note_failure(self.file.name, f"{self.file.name}: {error.strerror}")

    def note_failure(self, path: str, reason: str) -> None:
        """Remembers that a file could not be written, and says so once."""
        if self.failures.get(path) != reason:
            self.failures[path] = reason
            complain(f"warning: not written, the run goes on: {reason}")

    def due(self) -> bool:
        """Whether 8 s have passed since the last line, so that a long loop should show progress."""
        return time.monotonic() - self.last_line_time > 8

    def show(self, line: str, min_interval_s: float = 0.0) -> None:
        """Rewrites the live line, unless that was done less than `min_interval_s` seconds ago."""
        if self.live and time.monotonic() - self.last_shown_time >= min_interval_s:
            self.last_shown_time = time.monotonic()
            width = shutil.get_terminal_size().columns - 1
            print_while_open(ERASE_LINE + line[:width], end="")

    def begin_phase(self, name: str) -> None:
        """Shows that a phase has begun; `seconds_left` counts from here."""
        self.phase_start = time.monotonic()
        self.show(f"{name} ..")

    def seconds_left(self, share: float) -> float:
        """The time that the phase will take if a share of it, above 0, is done."""
        return (time.monotonic() - self.phase_start) * (1 / max(share, 1e-9) - 1)

    def wants_progress(self) -> bool:
        """Whether a long loop should show how far it is; the figures wait for the device."""
        if not self.is_main:
            return False
        return self.due() or (self.live and time.monotonic() - self.last_shown_time >= 2)

    def progress(self, line: str, live_line: str) -> None:
        """Shows how far a long loop is: as a line each 8 s, and on the live line."""
        if self.due():
            self(line, terminal=not self.live)
        self.show(live_line)

    def open_wandb(self, project: str, run_id: str, settings: dict[str, Any]) -> str:
        """Begins a run at Weights & Biases, or goes on with it. Returns why it cannot, or ""."""
        if not self.is_main or not project:
            return ""
        import wandb

        names = dict(project=project, name=run_id, id=re.sub(r"[^\w.-]", "-", run_id))
        try:
            self.wandb = wandb.init(**names, resume="allow", config=settings)
        except wandb.Error as error:
            reason = first_line(error)
            return f"WANDB_PROJECT={project}: {reason}; WANDB_MODE=offline needs no network"
        return ""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds numbers to TensorBoard and W&B at a training step, by name."""
        if self.wandb is not None:
            self.wandb.log(values, step=step)
        if not self.is_main or not self.tensorboard_dir:
            return
        if self.tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            # A run that was killed and resumes here has left points of later steps: drop them.
            self.tensorboard = SummaryWriter(self.tensorboard_dir, purge_step=step)
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what the boards have not written yet; the text is always written at once."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def raise_stopped(number: int, _: Any = None, after: str = "") -> None:
    """Raises KeyboardInterrupt for signal `number`, with a message and the exit status."""
    name = signal.Signals(number).name
    raise KeyboardInterrupt(f"{name}: the run is stopped{after}", 128 + number)


def handle_signals(handler: Callable[[int, Any], Any]) -> None:
    """Sets the handler of SIGINT, SIGTERM, SIGHUP (the terminal is gone) and SIGUSR1 (by Slurm).

    In training the handler is Trainer.note_signal, with which the run ends after its step.
    Otherwise it is raise_stopped, which ends the run at once.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        # Windows lacks the last two.
        number = getattr(signal, name, signal.SIGTERM)
        # nohup ignores SIGHUP, and so does the run then.
        if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


class CompilationCounter:
    """Counts graphs and Triton kernels compiled since it was made, and logs the reason for each."""

    def __init__(self, log: Callable[[str], None]):
        self.log = log
        self.count = 0
        self.unlogged = []
        torch._dynamo.utils.clear_compilation_metrics()
        if triton is not None:
            triton.knobs.runtime.jit_post_compile_hook = self.note_kernel

    def note_kernel(self, **details: Any) -> None:
        """Triton calls this after each kernel it compiles."""
        self.unlogged.append(f"kernel {details['repr']}")

    def poll(self) -> int:
        """Logs what was compiled since the last call; returns the count so far."""
        for metrics in torch._dynamo.utils.get_compilation_metrics():
            # The backward of a graph has an entry of its own, which would count it twice.
            if metrics.is_forward:
                reason = metrics.recompile_reason or "its first graph"
                self.unlogged.append(f"{metrics.co_name}: {reason}")
        torch._dynamo.utils.clear_compilation_metrics()
        self.count += len(self.unlogged)
        for compiled in self.unlogged:
            self.log(f"recompilation: {compiled}")
        self.unlogged.clear()
        return self.count


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file by way of a temporary one, so that a kill leaves the old file or the new.

    Raises OSError naming the file. Then the old file is as it was, and no temporary one is left.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


class FileLock:
    """A lock that only one process at a time can hold, and that ends with its process.

    The kernel keeps it (fcntl.lockf), on NFS the server; processes that are forked from the holder
    do not have it. The file says who holds it. It is removed in the end; after a kill it stays, and
    means nothing.
    """

    def __init__(self, path: Path):
        # A program may change its working folder.
        self.path = path.absolute()
        self.file: io.FileIO | None = None
        # Who holds it, if not this process; why there are no locks here.
        self.holder = ""
        self.reason = ""

    def take(self, wait: bool = False) -> bool:
        """Whether this process holds the lock now; with `wait` it waits for the other to end.

        True also where the file system has no locks; then `reason` says so. Raises OSError.
        """
        if fcntl is None:
            self.reason = f"{self.path.parent}: this system has no locks"
            return True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
            file = io.FileIO(os.open(self.path, flags, 0o644), "r+")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except (BlockingIOError, PermissionError):
                self.holder = file.read(200).decode(errors="replace").strip() or "another process"
                file.close()
                return False
            except OSError as error:
                self.reason = f"{self.path.parent}: has no locks ({error.strerror})"
            # The holder before may have removed the file after it was opened here.
            if os.path.exists(self.path) and os.path.samestat(
                os.fstat(file.fileno()), os.stat(self.path)
            ):
                break
            file.close()
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        self.file = file
        atexit.register(self.release)
        return True

    def release(self) -> None:
        """Lets go of the lock, if it is held."""
        if self.file is not None:
            # In this order: whoever opens the file from now on makes a new one.
            with contextlib.suppress(OSError):
                self.path.unlink()
            self.file.close()
            self.file = None
        atexit.unregister(self.release)


def torch_bytes(contents: dict[str, Any]) -> bytes:
    """The file that torch.save would write."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


# --- Reading files: nothing is believed ---
FILE_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# The largest of each kind that is read whole.
MAX_JSON_BYTES = 2**24
MAX_TOKENIZER_BYTES = 2**26
MAX_ARTIFACT_BYTES = 2**28
MAX_LOG_BYTES = 2**30
MAX_WEIGHTS_BYTES = 2**34


@contextlib.contextmanager
def named_errors(path: str) -> Iterator[None]:
    """Gives an OSError that does not know its file the path of it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


class NamedFile(io.FileIO):
    """A file whose errors of reading name it, as those of opening do."""

    def readinto(self, buffer: Any, /) -> int | None:
        """Fills a buffer; returns the number of bytes."""
        with named_errors(self.name):
            return super().readinto(buffer)

    def readall(self) -> bytes | None:
        """All that is left."""
        with named_errors(self.name):
            return super().readall()


def open_regular(path: Path, max_bytes: float = math.inf) -> io.BufferedReader:
    """Opens a file of at most `max_bytes` for reading.

    Raises OSError at once for all that is no file: a folder, a device, a link to nothing, or a
    FIFO, which would make the program wait.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError as error:
        if not os.path.islink(path):
            raise
        raise OSError(error.errno, "is a link to nothing", str(path)) from error
    if kind != stat.S_IFREG:
        reason = f"is {FILE_KINDS.get(kind, 'something else')}, not a file"
        raise OSError(errno.EINVAL, reason, str(path))
    file = io.BufferedReader(NamedFile(str(path)))
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        file.close()
        reason = f"holds {size} bytes, at most {max_bytes} are read"
        raise OSError(errno.EFBIG, reason, str(path))
    return file


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a file. Raises OSError as `open_regular`."""
    with open_regular(path, max_bytes) as file:
        return file.read(max_bytes)


def reason_of(error: OSError) -> str:
    """The file that an error is about, and what is wrong with it, in one line."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


class Entry(NamedTuple):
    """What a value in a file of JSON must be."""

    words: str
    fits: Callable[[Any], bool]


WHOLE = Entry("a whole number from 0 to 2^63", lambda v: type(v) is int and 0 <= v <= 2**63)
NUMBER = Entry("a number", lambda v: type(v) in (int, float) and abs(v) < 1e300)
TEXT_LINE = Entry("a text of one line", lambda v: type(v) is str and v.isprintable())


def fault_in(value: Any, schema: Any, where: str = "its content") -> str:
    """What is wrong with a value read from JSON, in one line; empty if it fits the schema.

    schema: an Entry; [schema] for a list of such values; or a dict for an object. There a key that
    ends with "?" may be missing, "*" stands for all keys, and keys that are not named are free.
    """
    if isinstance(schema, Entry):
        return "" if schema.fits(value) else f"{where} must be {schema.words}"
    if not isinstance(value, type(schema)):
        return f"{where} must be {'a list' if isinstance(schema, list) else 'an object'}"
    if isinstance(schema, list):
        pairs = [(f"{where}[{i}]", item, schema[0]) for i, item in enumerate(value)]
    else:
        prefix = "" if where == "its content" else f"{where}."
        pairs = []
        for key, part in schema.items():
            name = key.removesuffix("?")
            if key == "*":
                pairs += [(f"{prefix}{k!a}", item, part) for k, item in value.items()]
            elif name in value:
                pairs.append((prefix + name, value[name], part))
            elif name == key:
                return f"{prefix}{name} is missing"
    for place, item, part in pairs:
        fault = fault_in(item, part, place)
        if fault:
            return fault
    return ""


def read_json(path: Path, schema: Any) -> Any:
    """The value in a file of JSON. Raises UsageError if it does not fit the schema (`fault_in`).

    Raises OSError as `read_regular`.
    """
    try:
        value = json.loads(read_regular(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "is no JSON"
        raise UsageError(f"{path}: {reason}") from error
    if fault := fault_in(value, schema):
        raise UsageError(f"{path}: {fault}")
    return value


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_plain(name: str, value: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises ForeignValue unless all tensors in nested dicts and lists are plain ones on the CPU.

    name: stands for the value in the message.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(f"{name}[{key!a}]", item, dtypes)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_plain(f"{name}[{i}]", item, dtypes)
    elif isinstance(value, Tensor):
        # A subclass need not behave like a tensor.
        is_plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
        if not is_plain or value.device.type != "cpu" or value.dtype not in dtypes:
            raise ForeignValue(f"{name} is no plain tensor of numbers")


def check_weights(weights: dict[str, Tensor]) -> None:
    """Raises ForeignValue unless all are plain tensors of finite floats on the CPU."""
    check_plain("weights", weights, FLOATS)
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ForeignValue(f"weights[{name!a}] holds a number that is not finite")


# === 3. Data: shards of uint16 tokens -> rows of packed documents ===
SHARD_HEADER = [20240520, 1]  # magic, version; then the token count; 256 int32 in all


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes ids (n,) as a shard: a header of 1024 bytes, then uint16; little-endian."""
    header = np.zeros(256, dtype="<i4")
    header[:2] = SHARD_HEADER
    header[2] = len(tokens)
    write_atomic(path, header.tobytes() + np.ascontiguousarray(tokens, dtype="<u2").tobytes())


def read_shard(path: Path) -> np.ndarray:
    """The ids of a shard, memory-mapped, (n,) uint16.

    Raises UsageError for another kind of file, another version, a wrong length or an empty shard.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        header = np.frombuffer(file.read(1024)[: size // 4 * 4], dtype="<i4")
    if len(header) < 256 or header[:2].tolist() != SHARD_HEADER:
        raise UsageError(
            f"{path}: starts with {header[:2].tolist()}; a shard starts with {SHARD_HEADER}"
        )
    num_tokens = int(header[2])
    if num_tokens <= 0:
        raise UsageError(f"{path}: is empty, its header promises {num_tokens} tokens; delete it")
    promised = 1024 + 2 * num_tokens
    if size != promised:
        fault = "cut short" if size < promised else "too long"
        raise UsageError(
            f"{path}: {fault}: {size:,} of {promised:,} bytes; delete it and download again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(num_tokens,))


def allow_open_files(count: int) -> None:
    """Raises the soft limit of open files for `count` shards: each stays open while it is mapped.

    Raises UsageError if the hard limit is too low.
    """
    try:
        import resource
    except ImportError:
        # Windows has no such limit.
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Libraries, sockets and pipes need some, too.
    wanted = count + 512
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise UsageError(
            f"{count} shards: the limit of open files is {hard}; raise it: ulimit -Hn {wanted}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def how_to_get(folder: Path) -> str:
    """The command that makes a data set of this name, or a name like it that is there."""
    name, data_dir = folder.name, folder.parent.parent
    if not folder.is_dir() and folder.parent.is_dir():
        there = [path.name for path in folder.parent.iterdir()]
        if nearest := difflib.get_close_matches(name, there, n=1, cutoff=0.85):
            return f"Did you mean DATASET={nearest[0]}?"
    if name.startswith("pydocs"):
        source = "pydocs"
    elif match := re.fullmatch(r"fineweb10B_(sp\d+)(\w*caseops\w*)?", name):
        source = f"fineweb --variant {match[1]}" + ("_caseops" if match[2] else "")
    else:
        source = "text TRAIN.jsonl --val VAL.jsonl"
    tool = Path(__file__).with_name("tools") / "prepare_data.py"
    if Path.cwd() == tool.parents[1] or not tool.is_file():
        tool = Path("tools/prepare_data.py")
    if data_dir != Path("data"):
        source += f" --data-dir {shlex.quote(str(data_dir))}"
    return f"Get it: python {shlex.quote(str(tool))} {source}; or set DATASET, DATA_DIR"


def shard_paths(folder: Path, split: str) -> list[Path]:
    """The shards of a split, in order. The files *_val_bytes_*.bin are a side-car, not shards."""
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    return [path for path in paths if f"_{split}_bytes_" not in path.name]


class TokenStream:
    """All shards of a split, end to end.

    A document may straddle two shards, and the first token of a shard is the target of the last
    token of the shard before it. A side-car, in files of the same format, holds for every token the
    bytes of the original text that it stands for (CaseOps, PR #1729).
    """

    def __init__(self, folder: Path, split: str):
        self.paths = shard_paths(folder, split)
        if not self.paths:
            fault = f"holds no *_{split}_*.bin" if folder.is_dir() else "does not exist"
            raise UsageError(f"{folder}: {fault}. {how_to_get(folder)}")
        # Those of the other splits and of side-cars will be open as well.
        allow_open_files(sum(1 for _ in folder.glob("*.bin")))
        self.shards = [read_shard(path) for path in self.paths]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        self.size = int(self.starts[-1])
        self.sidecar: TokenStream | None = None
        if shard_paths(folder, f"{split}_bytes"):
            self.sidecar = TokenStream(folder, f"{split}_bytes")

    def read(self, start: int, count: int) -> np.ndarray:
        """The ids from index `start` on, (count,) int64. After its end the stream begins again."""
        parts = []
        while count > 0:
            index = start % self.size
            shard = int(np.searchsorted(self.starts, index, side="right")) - 1  # that holds index
            part = self.shards[shard][index - self.starts[shard] :][:count]
            parts.append(part)
            start += len(part)
            count -= len(part)
        return np.concatenate(parts).astype(np.int64)


class Batch(NamedTuple):
    """A row of T tokens: segments end to end.

    Attention stays within a segment, and positions count from its start.
    """

    inputs: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64; -1 where nothing is predicted
    cu_seqlens: Tensor  # (capacity + 1,) int32: segment starts, then T in every unused entry
    # Bound on the length of a segment, in tokens. It is the same for all batches, because
    # kernels and graphs are compiled for it.
    max_seqlen: int
    # (T,) int64: the hint of each target, -1 where there is none; None without the token tilt.
    hints: Tensor | None = None


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Copies an array to the device; a GPU's copy is pinned and does not block."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def pack_row(
    inputs: np.ndarray,
    targets: np.ndarray,
    starts: np.ndarray,
    shape: RowShape,
    device: torch.device,
) -> Batch:
    """Makes a row of `shape`.

    inputs, targets: ids (n,), n <= T; the rest of the row is padding, which predicts nothing.
    starts: index of the first token of every segment. Raises AssertionError if the segments and
    those of the padding are more than the capacity.
    """
    num_tokens, capacity, max_seqlen = shape
    n = len(inputs)
    # As int32 they are half as many bytes to copy as in int64.
    ids = np.zeros((2, num_tokens), dtype=np.int32)
    ids[0, :n] = inputs
    ids[1, :n] = targets
    ids[1, n:] = -1

    # No segment of the padding is longer than max_seqlen either.
    segments = [*starts, *range(n, num_tokens, max_seqlen)]
    assert len(segments) <= capacity, (len(segments), capacity)
    unused = capacity + 1 - len(segments)
    cu_seqlens = np.array(segments + [num_tokens] * unused, dtype=np.int32)
    row_inputs, row_targets = to_device(ids, device).long()
    return Batch(row_inputs, row_targets, to_device(cu_seqlens, device), max_seqlen)


def segment_starts(tokens: np.ndarray, bos_id: int, max_seqlen: int) -> np.ndarray:
    """Starts (n,) of a row's segments.

    They are index 0, the index of every BOS, and every `max_seqlen` tokens after one of those.
    """
    documents = np.union1d([0], np.flatnonzero(tokens == bos_id))
    ends = np.append(documents[1:], len(tokens))
    pieces = []
    for start, end in zip(documents, ends, strict=True):
        pieces.append(np.arange(start, end, max_seqlen))
    return np.concatenate(pieces)


class EpochOrder(NamedTuple):
    """The order in which DATA_LOADER=shuffled reads the pieces of one epoch."""

    epoch: int
    offset: int  # index in the stream at which the first piece starts
    permutation: np.ndarray  # of the pieces


class PackedLoader:
    """Rows of training tokens.

    Each token is a target once per epoch; the first token comes last, because the stream begins
    again. DATA_LOADER=shuffled leaves out what does not fill a piece.

    A row takes the next MICRO_BATCH_TOKENS tokens of the stream, or fewer if their documents fill
    the capacity. All ranks walk over all rows, and each builds every W-th, so a step is the same
    for any number of ranks. With DATA_LOADER=shuffled (PR #1394) the stream is cut into pieces of
    TRAIN_SEQ_LEN tokens, from a random offset on, and an epoch takes them in random order.
    """

    def __init__(self, stream: TokenStream, bos_id: int, cfg: Config, ranks: Ranks):
        self.stream = stream
        self.cfg = cfg
        self.ranks = ranks
        self.cursor = 0  # targets served so far, over all epochs
        # Tokens of the longest segment that the next rows get (SEQ_LEN_SCHEDULE). Their declared
        # max_seqlen stays that of the config: kernels and graphs are made for it.
        self.longest = cfg.train_seq_len
        # No token has the id -1, so rows are then not cut at documents.
        self.bos_id = bos_id if cfg.data_loader == "documents" else -1
        self.order = EpochOrder(epoch=-1, offset=0, permutation=np.arange(0))

    def next_tokens(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, each (count,) int64, from the cursor on. The cursor stays."""
        if self.cfg.data_loader == "shuffled":
            return self.next_pieces(count)
        tokens = self.stream.read(self.cursor, count + 1)
        return tokens[:-1], tokens[1:]

    def next_pieces(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """As next_tokens, from the shuffled pieces; `count` is a multiple of TRAIN_SEQ_LEN."""
        length = self.cfg.train_seq_len
        pieces_per_epoch = (self.stream.size - 1) // length
        pieces = []
        for number in range(self.cursor // length, (self.cursor + count) // length):
            epoch, index = divmod(number, pieces_per_epoch)
            if self.order.epoch != epoch:
                self.order = self.draw_order(epoch, pieces_per_epoch)
            start = self.order.offset + self.order.permutation[index] * length
            pieces.append(self.stream.read(int(start), length + 1))
        inputs = np.concatenate([piece[:-1] for piece in pieces])
        targets = np.concatenate([piece[1:] for piece in pieces])
        return inputs, targets

    def draw_order(self, epoch: int, num_pieces: int) -> EpochOrder:
        """The order of an epoch, drawn from SEED and the epoch: a resumed run draws the same."""
        rng = np.random.Generator(np.random.PCG64([self.cfg.seed, epoch]))
        offset = rng.integers(self.cfg.train_seq_len)
        return EpochOrder(epoch, offset, rng.permutation(num_pieces))

    def rows(self, count: int, longest: int | None = None) -> tuple[list[Batch], int]:
        """Reads the next `count` rows; returns those of this rank, and the targets in all rows.

        longest: tokens of the longest segment, TRAIN_SEQ_LEN if None.
        """
        shape = self.cfg.row_shape
        size, capacity, max_seqlen = shape
        first = self.cursor
        own_rows = []
        for row in range(count):
            inputs, targets = self.next_tokens(size)
            starts = segment_starts(inputs, self.bos_id, longest or max_seqlen)
            n = size
            if len(starts) > capacity:
                # The other half of the capacity is left to the segments of the padding.
                n = int(starts[capacity // 2])
                starts = starts[: capacity // 2]
            if row % self.ranks.world_size == self.ranks.rank:
                device = self.ranks.device
                own_rows.append(pack_row(inputs[:n], targets[:n], starts, shape, device))
            self.cursor += n
        return own_rows, self.cursor - first

    def steps(self) -> Iterator[tuple[list[Batch], int]]:
        """Yields `rows` of one training step after another. A thread prepares the next step.

        A step has segments of at most `longest` tokens as it is when the step is asked for. If the
        thread has prepared the step for another length, its rows are cut anew from the same tokens.
        """
        count = self.cfg.rows_per_step
        with ThreadPoolExecutor(1) as pool:
            longest = self.longest
            ahead = pool.submit(self.rows, count, longest)
            while True:
                rows, num_targets = ahead.result()
                if longest != self.longest:
                    longest = self.longest
                    self.cursor -= num_targets
                    rows, num_targets = self.rows(count, longest)
                ahead = pool.submit(self.rows, count, longest)
                yield rows, num_targets


class Documents(NamedTuple):
    """The validation documents within their token stream.

    The target of an input is the token after it, so the last target of a document is the BOS of
    the next one: every token of the stream but the first is predicted exactly once. A target's
    stream index is that of its input: tokens[index + 1] is predicted from tokens[: index + 1].
    """

    tokens: np.ndarray  # (N,) int64
    starts: np.ndarray  # (docs,) stream index of each document's BOS
    counts: np.ndarray  # (docs,) number of each document's targets
    # (N,) bytes of original text behind each token, from the side-car; None: there is none, and a
    # ByteTable counts
    bytes: np.ndarray | None = None

    @classmethod
    def load(cls, stream: TokenStream, bos_id: int, cfg: Config) -> Documents:
        """Reads the split; draws a share of VAL_DOC_FRACTION of its documents with SEED.

        Unless DATA_LOADER=documents, windows cross documents. Then `tokens` holds only the drawn
        documents, so that no window reads another one.
        """
        tokens = stream.read(0, stream.size)
        starts = np.flatnonzero(tokens == bos_id)
        counts = np.diff(starts, append=len(tokens) - 1)
        num_wanted = max(1, round(cfg.val_doc_fraction * len(starts)))
        sample = sorted(random.Random(cfg.seed).sample(range(len(starts)), num_wanted))
        num_bytes = stream.sidecar.read(0, stream.size) if stream.sidecar else None
        docs = cls(tokens, starts[sample], counts[sample], num_bytes)
        if cfg.data_loader == "documents":
            return docs
        joined_starts = np.cumsum(np.append(0, docs.counts[:-1]))
        if num_bytes is not None:
            num_bytes = docs.join(num_bytes)
        return cls(docs.joined_tokens(), joined_starts, docs.counts, num_bytes)

    def spans(self, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """The stream indices start..end-1 of the targets of each document before `stop`."""
        for start, count in zip(self.starts[:stop], self.counts[:stop], strict=True):
            yield start, start + count

    def join(self, values: np.ndarray) -> np.ndarray:
        """Values (N,) of these documents end to end, and of the last target: (targets + 1,)."""
        pieces = [values[start:end] for start, end in self.spans()]
        end = self.starts[-1] + self.counts[-1]
        return np.concatenate([*pieces, values[end : end + 1]])

    def joined_tokens(self) -> np.ndarray:
        """`join` of the tokens."""
        return self.join(self.tokens)

    def target_indices(self, stop: int | None = None) -> np.ndarray:
        """Stream indices (targets,), rising, of all targets of the documents before `stop`."""
        pieces = [np.arange(start, end) for start, end in self.spans(stop)]
        # With no document before `stop`, the empty array is the result.
        return np.concatenate([np.arange(0), *pieces])


# What a run reads of the files of JSON beside the shards.
FILE_ENTRY = {"name": TEXT_LINE, "tokens": WHOLE}
MANIFEST = {
    "tokenizer": {"file": TEXT_LINE, "sha256": TEXT_LINE},
    "splits?": {"*": {"tokens?": WHOLE, "bytes?": WHOLE, "files": [FILE_ENTRY]}},
}
DOCTOR_VERDICT = {"files": {"*": [WHOLE]}, "errors": [TEXT_LINE]}


def load_manifest(cfg: Config) -> tuple[dict[str, Any], str, str | None]:
    """The data set's manifest, the name of its tokenizer's file and that file's SHA-256.

    Without a manifest these are {}, the challenge's name, and None. That name ends like the data
    set's. Raises UsageError if the manifest does not fit MANIFEST, OSError if it cannot be read.
    """
    path = cfg.dataset_dir / "manifest.json"
    if not os.path.lexists(path):
        ending = cfg.dataset_dir.name.partition(f"_sp{cfg.vocab_size}")[2]
        return {}, f"fineweb_{cfg.vocab_size}_bpe{ending}.model", None
    manifest = read_json(path, MANIFEST)
    return manifest, manifest["tokenizer"]["file"], manifest["tokenizer"]["sha256"]


# Title, all capitals, next letter, escape. They stand for capitals and have no bytes (PR #1729);
# tools/caseops.py has the transform.
CASE_OPERATORS = "\ue001\ue002\ue003\ue004"


def parse_tokenizer(data: bytes) -> Any:
    """The SentencePieceProcessor of a serialised model.

    Raises RuntimeError for any other content, UsageError without the package.
    """
    # Imported here, because benchmarks that use this file without text need no such package.
    try:
        import sentencepiece
    except ImportError as error:
        raise UsageError(f"{error}: make install, or pip install sentencepiece") from error
    # SentencePiece takes no content for no model, in silence.
    if not data:
        raise RuntimeError("it is empty")
    return sentencepiece.SentencePieceProcessor(model_proto=data)


class Tokenizer(NamedTuple):
    """The SentencePiece tokenizer of the data set."""

    path: Path
    model: Any  # SentencePieceProcessor
    bos_id: int
    sha256: str
    manifest: dict[str, Any]  # of the data set; empty if it has none

    @classmethod
    def load(cls, cfg: Config) -> Tokenizer:
        """Loads TOKENIZER_PATH or, if that is empty, the tokenizer that the data set names.

        Raises UsageError if the file is no tokenizer, has another size than VOCAB_SIZE, miscounts
        bytes, or is not the tokenizer that the manifest names.
        """
        manifest, default_name, wanted_sha256 = load_manifest(cfg)
        path = Path(cfg.tokenizer_path or Path(cfg.data_dir) / "tokenizers" / default_name)
        try:
            data = read_regular(path, MAX_TOKENIZER_BYTES)
            model = parse_tokenizer(data)
        except (OSError, RuntimeError) as error:
            if not os.path.lexists(path):
                remedy = how_to_get(cfg.dataset_dir) + ", TOKENIZER_PATH"
                if cfg.tokenizer_path and wanted_sha256:
                    remedy = f"Unset it: {cfg.dataset_dir} names {default_name}"
                raise UsageError(f"TOKENIZER_PATH={path}: does not exist. {remedy}") from error
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UsageError(f"TOKENIZER_PATH={path}: no SentencePiece model ({reason})") from error
        sha256 = hashlib.sha256(data).hexdigest()
        loaded = cls(path, model, model.bos_id(), sha256, manifest)
        loaded.check(cfg)
        if wanted_sha256 is not None and sha256 != wanted_sha256:
            source = cfg.dataset_dir / "manifest.json"
            raise UsageError(f"TOKENIZER_PATH={path}: not the tokenizer that {source} names")
        return loaded

    def operator_ids(self) -> list[int]:
        """The ids of the four operators of CaseOps, ESC last; [] for another tokenizer."""
        ids = [self.model.piece_to_id(operator) for operator in CASE_OPERATORS]
        return [] if self.model.unk_id() in ids else ids

    def check(self, cfg: Config) -> None:
        """Raises UsageError if the network or the count of bytes cannot use this tokenizer."""
        path, model = self.path, self.model
        if model.vocab_size() != cfg.vocab_size:
            pieces = model.vocab_size()
            reason = f"{path} has {pieces} pieces; set VOCAB_SIZE={pieces}, or another DATASET"
            raise UsageError(f"VOCAB_SIZE={cfg.vocab_size}: {reason}")
        if cfg.smear_enabled and self.bos_id != BOS_ID:
            raise UsageError(f"SMEAR_ENABLED=1: needs BOS id {BOS_ID}, {path} has {self.bos_id}")
        if self.bos_id < 0 or model.piece_to_id("\u2581") == model.unk_id():
            raise UsageError(
                f"TOKENIZER_PATH={path}: needs BOS and the bare space mark, or bytes are miscounted"
            )


def check_doctor_verdict(cfg: Config, tokenizer: Tokenizer) -> None:
    """Raises UsageError if `tools/prepare_data.py doctor` found an error in these very files.

    Likewise if doctor.json is there but holds no verdict. Without one, nothing is checked.
    """
    path = cfg.dataset_dir / "doctor.json"
    if not os.path.lexists(path):
        return
    try:
        verdict = read_json(path, DOCTOR_VERDICT)
    except UsageError as error:
        remedy = "tools/prepare_data.py doctor writes it anew"
        raise UsageError(f"{error}; {remedy}") from error
    shards = cfg.dataset_dir.glob("*.bin")
    manifest = cfg.dataset_dir.glob("manifest.json")
    sizes_and_times = {}
    for file in (tokenizer.path, *shards, *manifest):
        status = os.stat(file)
        sizes_and_times[file.name] = [status.st_size, status.st_mtime_ns]
    # If these differ, a file has changed since the doctor looked, and its verdict is void.
    if verdict["files"] == sizes_and_times and verdict["errors"]:
        error = verdict["errors"][0]
        raise UsageError(f"{cfg.dataset_dir}: {error}; found by tools/prepare_data.py doctor")


def check_shards(
    cfg: Config, tokenizer: Tokenizer, ranks: Ranks, streams: dict[str, TokenStream]
) -> None:
    """Raises UsageError for splits that cannot be used. Each rank scans every W-th shard's ids."""
    check_doctor_verdict(cfg, tokenizer)
    promised_tokens = {}
    for split in tokenizer.manifest.get("splits", {}).values():
        for file in split["files"]:
            promised_tokens[file["name"]] = file["tokens"]
    for name, stream in streams.items():
        for i, (path, shard) in enumerate(zip(stream.paths, stream.shards, strict=True)):
            promised = promised_tokens.get(path.name, 0)
            if promised_tokens and promised != len(shard):
                raise UsageError(f"{path}: holds {len(shard)} tokens, the manifest says {promised}")
            if i % ranks.world_size == ranks.rank:
                largest = int(shard.max())
                if largest >= cfg.vocab_size:
                    raise UsageError(f"{path}: holds id {largest}, VOCAB_SIZE={cfg.vocab_size}")
        check_split(cfg, tokenizer.bos_id, name, stream)
        if name == "val":
            check_sidecar(tokenizer, stream)


def check_split(cfg: Config, bos_id: int, name: str, stream: TokenStream) -> None:
    """Raises UsageError if a split has no document starts, or too few tokens for one step."""
    is_start = stream.shards[0] == bos_id
    if not is_start.any() or (name == "val" and not is_start[0]):
        where = "at its beginning" if name == "val" else "in it"
        raise UsageError(f"{stream.paths[0]}: no document starts {where} (BOS id {bos_id})")
    if name == "train" and stream.size <= cfg.train_batch_tokens:
        raise UsageError(
            f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: the shards hold {stream.size} tokens"
        )


def check_sidecar(tokenizer: Tokenizer, stream: TokenStream) -> None:
    """Raises UsageError if the validation bytes need a side-car that is missing or not theirs."""
    operators = tokenizer.operator_ids()
    sidecar = stream.sidecar
    if sidecar is None:
        if operators:
            raise UsageError(
                f"{stream.paths[0]}: {tokenizer.path} has the operators of CaseOps, "
                "so bytes are counted by *_val_bytes_*.bin, which are missing"
            )
        return

    lengths = [len(shard) for shard in sidecar.shards]
    if lengths != [len(shard) for shard in stream.shards]:
        raise UsageError(f"{sidecar.paths[0]}: holds {lengths} counts for {stream.size} tokens")
    total = 0
    for path, shard, counts in zip(sidecar.paths, stream.shards, sidecar.shards, strict=True):
        # After ESC an operator is text, and the first token of a shard may follow an ESC.
        is_after_escape = np.append(True, np.isin(shard[:-1], operators[-1:]))
        is_operator = np.isin(shard, operators) & ~is_after_escape
        wrong = np.flatnonzero((is_operator | (shard == tokenizer.bos_id)) & (counts > 0))
        if len(wrong):
            raise UsageError(
                f"{path}: counts {counts[wrong[0]]} bytes for token {wrong[0]}, "
                "BOS or an operator, which has none"
            )
        total += int(counts.sum(dtype=np.int64))
    manifest = tokenizer.manifest.get("splits", {}).get("val", {})
    if manifest.get("tokens") == stream.size and manifest.get("bytes", total) != total:
        raise UsageError(
            f"{sidecar.paths[0]}: counts {total} bytes, the manifest {manifest['bytes']}"
        )


# === 4. Model: plain maths, the order of layers, and one forward for every use ====================
# --- Plain maths ---
# Default slope of the kernels' functions; LEAKY_SLOPE decides in a run. A power of two keeps both
# branches of the activation and of its derivative exact up to one rounding.
MLP_SLOPE = 0.5

# The same for every dtype.
NORM_EPS = torch.finfo(torch.float32).eps


def rms_norm(x: Tensor, scale: float = 1.0) -> Tensor:
    """scale * x / sqrt(mean(x^2) + eps), the mean over the last axis."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS) * scale


def leaky_relu_sq(pre: Tensor, slope: float = MLP_SLOPE) -> Tensor:
    """pre^2 where pre is positive, (slope * pre)^2 elsewhere (PR #549)."""
    return F.leaky_relu(pre, slope).square()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (T, H, D) by the angles of cos and sin (T, 1, half).

    Dimensions j and j + half form a pair, which turns as (a, b) -> (a cos + b sin, b cos - a sin).
    Dimensions from 2 * half on stay as they are.
    """
    half = cos.size(-1)
    x1 = x[..., :half]
    x2 = x[..., half : 2 * half]
    unrotated = x[..., 2 * half :]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, unrotated], dim=-1)


def remove_own_value(y: Tensor, v: Tensor) -> Tensor:
    """XSA, exclusive self-attention (PR #1530): y - (y . u) u with u = v / |v|.

    Each head's output loses its component along the value of the token itself. y: attention output
    (T, H, D). v: values of the same tokens (T, Hkv, D); each serves H / Hkv query heads. Computed
    in fp32 or better and returned in the dtype of y.
    """
    y32 = y.to(torch.promote_types(y.dtype, torch.float32))
    y32 = y32.unflatten(1, (v.size(1), -1))  # (T, Hkv, H / Hkv, D)
    unit = F.normalize(v.to(y32.dtype), dim=-1).unsqueeze(2)  # (T, Hkv, 1, D)
    along = (y32 * unit).sum(-1, keepdim=True)  # (T, Hkv, H / Hkv, 1)
    return torch.addcmul(y32, along, unit, value=-1).flatten(1, 2).to(y.dtype)


# --- Order of layers and table of parameters ---
class Visit(NamedTuple):
    """One step of the unrolled depth: which layer runs, and which skips it stores or takes."""

    layer: int
    slot: int  # position in the plan; adapters are kept per slot
    push: bool  # store the output for a later skip
    skip: tuple[int, ...]  # rows of skip_weights whose mean scales the skip; empty: no skip
    parallel: bool  # attention and MLP run side by side on two lanes


def split_depth(cfg: Config, loops: int) -> tuple[list[int], list[int]]:
    """The order of layers with LOOP_START..LOOP_END repeated `loops` times more, in two halves.

    The first half (encoder) stores skips, the second (decoder) takes them.
    """
    order = list(range(cfg.num_layers))
    order[cfg.loop_start : cfg.loop_start] = order[cfg.loop_start : cfg.loop_end + 1] * loops
    middle = len(order) // 2
    return order[:middle], order[middle:]


def skip_pairs(encoder: list[int], decoder: list[int]) -> list[tuple[int, int]]:
    """(receiver, source) of every skip: the decoder takes the last one stored first."""
    return list(zip(decoder, reversed(encoder), strict=False))


def layer_plan(cfg: Config, looped: bool) -> tuple[Visit, ...]:
    """The order of layers as data; the only place that knows it.

    Training begins without loops and turns them on later, which changes the layers that skips
    connect. A row of skip_weights therefore belongs to a pair of layers (receiver, source), not to
    a position. Four layers, of which 1 and 2 are looped once:

        plain    encoder 0 1      decoder 2 3      pairs        (2, 1)  (3, 0)
        looped   encoder 0 1 2    decoder 1 2 3    pairs (1, 2) (2, 1)  (3, 0)
                                                   row      0      1       2

    The plain plan uses rows 1 and 2, those of the same pairs. If it used rows 0 and 1 by position,
    the weight that learnt to scale 2 <- 1 would scale 1 <- 2 from the first looped step on.
    Where the looped plan visits a pair twice, the plain plan takes the mean of both rows. A pair
    that the looped plan lacks uses the row of its position.
    """
    encoder, decoder = split_depth(cfg, cfg.num_loops if looped else 0)
    pairs = skip_pairs(encoder, decoder)
    pair_of_row = skip_pairs(*split_depth(cfg, cfg.num_loops))
    first_parallel = cfg.parallel_start_layer or cfg.num_layers

    plan = [
        Visit(layer, slot, push=True, skip=(), parallel=layer >= first_parallel)
        for slot, layer in enumerate(encoder)
    ]
    for position, layer in enumerate(decoder):
        # With an odd number of visits the decoder is one longer, and its last layer has no skip.
        skip = ()
        if position < len(pairs):
            skip = (position,)
            same_pair = [row for row, pair in enumerate(pair_of_row) if pair == pairs[position]]
            if same_pair and not looped:
                skip = tuple(same_pair)
        plan.append(Visit(layer, len(plan), False, skip, layer >= first_parallel))
    return tuple(plan)


class Role(NamedTuple):
    """The facts about a parameter that the rest of the program needs.

    Names of input sites: "attn_in", "attn_out", "mlp_in" and "mlp_mid" within a layer, "head_in"
    before the head. An embedding table that is only looked up has its own name as its site.
    """

    shape: tuple[int, ...]
    init: float | str  # constant, "orthogonal", "normal", "small" or "first"; see GPT.initialise
    group: str = "scalar"  # optimiser group: "muon", "embed", "scalar" or "fixed"
    packing: str = "float"  # in the artifact: "matrix" or "embed" (integers), "float" (fp16)
    sites: tuple[str, ...] = ()  # input site of each stack of a bank, or of a table
    is_table: bool = False  # an embedding table, indexed by token or by pair of tokens
    per_layer: bool = False  # the first axis is the layers, `stacks` times over
    unread: int = 0  # leading rows that no forward reads; the artifact leaves them out

    @property
    def stacks(self) -> int:
        """How many stacks of all layers lie end to end along the first axis: two in qo and kv."""
        return max(1, len(self.sites))


def parameter_table(cfg: Config) -> dict[str, Role]:
    """Every parameter by name, in the order of the artifact. Matrices act as y = x W^T."""
    L, C, V = cfg.num_layers, cfg.model_dim, cfg.vocab_size
    kv = cfg.kv_dim
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
        # Embedding table and head in one. It is fp32: bf16 would lose small updates.
        "tok_emb": table_of((V, C), "normal", "embed", "head_in"),
        "skip_weights": Role((num_skips, C), 1.0),
        "attn_scale": Role((L, C), 1.0, per_layer=True),
        "mlp_scale": Role((L, C), 1.0, per_layer=True),
        "resid_mix": Role((L, 2, C), "first", per_layer=True),  # row 0: stream, row 1: embedding
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
    if cfg.sparse_attn_gate_enabled:
        table["attn_gate"] = Role((L, cfg.num_heads, cfg.gate_window), 0.0, per_layer=True)
    if cfg.smear_gate_enabled:
        table["smear_proj"] = Role((1, cfg.gate_window), 0.0)
        table["smear_lambda"] = Role((1,), 0.0)
    return table


# The BOS of all tokenizers of the challenge. SmearGate needs it where rows cross documents. The
# forward needs a constant; the tokenizer's check compares it.
BOS_ID = 1


def segment_positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Each token's index in its own segment, (T,) int64.

    RoPE turns by this index. An index in the row would depend on the row's other documents.
    """
    index = torch.arange(num_tokens, device=cu_seqlens.device)
    return index - cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]


class LayerWeights(NamedTuple):
    """Weights of one layer in the compute dtype. Matrices act as y = x W^T."""

    qkv: Tensor  # (C + 2 kv, C) with kv = Hkv * D: queries, keys and values as one product
    o: Tensor  # (C, C), its rows times attn_scale
    up: Tensor  # (F, C) with F = mlp_dim
    down: Tensor  # (C, F), its rows times mlp_scale
    attn_scale: Tensor  # (C,)
    mlp_scale: Tensor  # (C,)
    resid_mix: Tensor  # (2, C): of the stream and of x0
    q_gain: Tensor  # (H,)
    attn_gate: Tensor | None = None  # (H, GATE_WINDOW); None without it


class PassInfo(NamedTuple):
    """The values that all layers of one forward share."""

    batch: Batch
    positions: Tensor  # (T,) int64: index of each token in its segment
    rope: Tensor  # (T, 2, 1, rope_dims / 2) fp32: cos and sin at each token's position
    tap: Callable[[str, int, Tensor], None]  # called with (site, layer, input) of every product
    adapters: AdapterView
    values: Tensor | None  # (T, Hkv * D), added to the values of the layers in VE_LAYERS


class Heads(NamedTuple):
    """The arguments of attention: n query tokens, and T tokens that they may see."""

    q: Tensor  # (n, H, D), normed, rotated, times q_gain
    k: Tensor  # (T, Hkv, D), normed, rotated
    v: Tensor  # (T, Hkv, D)
    own_v: Tensor | None  # (n, Hkv, D): v at the query tokens, for XSA; None without it
    cu_queries: Tensor | None  # int32 offsets of the query tokens; None if they are all tokens
    projected: dict[str, Tensor]  # the adapters' x A^T at the query tokens


def take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """The given rows of x, or a view of all if `rows` is None."""
    # Always a new view. The two lanes begin as one tensor: with a view each, autograd sums the
    # gradient of each lane before it adds the two. Without, the last bits would differ.
    return x[:] if rows is None else x[rows]


class GPT(nn.Module):
    """The network of PR #1530. Parameters are fp32, products run in the compute dtype."""

    def __init__(self, cfg: Config, attention_backend: str = "sdpa"):
        super().__init__()
        self.cfg = cfg
        self.attention_backend = attention_backend
        if cfg.late_qat:
            # A tensor, so that turning rounding on neither compiles nor breaks a captured graph.
            self.register_buffer("qat", torch.zeros(()), persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Makes every parameter of the table as its role says, from SEED.

        Random values are drawn on the CPU, so they are equal on every rank and device.
        """
        generator = torch.Generator().manual_seed(self.cfg.seed)
        normal_std = {"normal": self.cfg.tied_embed_init_std, "small": 0.01}
        for name, role in parameter_table(self.cfg).items():
            constant = 0.0 if isinstance(role.init, str) else float(role.init)
            weight = torch.full(role.shape, constant)
            if role.init == "orthogonal":
                for matrix in weight.view(-1, *role.shape[-2:]):
                    nn.init.orthogonal_(matrix, generator=generator)
            elif role.init == "first":
                weight[:, 0] = 1.0
            elif role.init in normal_std:
                nn.init.normal_(weight, std=normal_std[role.init], generator=generator)
            self.register_parameter(name, nn.Parameter(weight))
        # Output projections are zero like down_bank: every block starts as the identity.
        self.qo_bank.data[self.cfg.num_layers :] = 0.0

    # --- Weights as the forward uses them ---

    def set_rounding(self, on: bool) -> None:
        """Rounds the banks in the next forwards, or does not. Without LATE_QAT it does nothing."""
        if self.cfg.late_qat:
            self.qat.fill_(on)

    def bank(self, name: str) -> Tensor:
        """A bank as the forward sees it, (matrices, out, in) fp32.

        With LATE_QAT and rounding on, each row is rounded to MATRIX_BITS with the step that its
        largest weight needs, so training learns weights that survive quantisation. The gradient
        passes as if nothing were rounded (straight-through). `qat` is 0 or 1 within the graph.
        """
        weight = self.get_parameter(name)
        cfg = self.cfg
        if not cfg.late_qat:
            return weight
        qmax = qmax_of_bits(cfg.matrix_bits)
        # Peers hold each other's slices in the compute dtype only (see Muon). Rounding what all
        # ranks can see makes them round alike.
        seen = weight.detach().to(cfg.dtype).float()
        floor = 1e-12
        if cfg.no_hessians:
            # The quantisers without Hessians have this floor, too.
            floor += cfg.clip_floor
        step = seen.abs().amax(-1, keepdim=True).clamp_min(floor) / qmax
        rounded = (seen / step).round().clamp(-qmax, qmax) * step
        return weight + self.qat * (rounded - weight.detach())

    def layer_weights(self) -> list[LayerWeights]:
        """The weights of every layer, cast to the compute dtype once per forward.

        attn_scale and mlp_scale are folded into the product before them: scale * (y W^T) =
        y (diag(scale) W)^T. Adapters beside these products still need the scales themselves.
        """
        q, o = self.bank("qo_bank").chunk(2)
        k, v = self.bank("kv_bank").chunk(2)
        attn_scale = self.attn_scale
        mlp_scale = self.mlp_scale
        if self.cfg.branch_scale:
            layer = torch.arange(1, self.cfg.num_layers + 1, device=o.device)
            depth_scale = layer.rsqrt().unsqueeze(1)  # (L, 1)
            attn_scale = depth_scale * attn_scale
            mlp_scale = depth_scale * mlp_scale
        stacks = LayerWeights(
            qkv=torch.cat([q, k, v], 1),
            o=attn_scale.unsqueeze(2) * o,
            up=self.bank("up_bank"),
            down=mlp_scale.unsqueeze(2) * self.bank("down_bank"),
            attn_scale=attn_scale,
            mlp_scale=mlp_scale,
            resid_mix=self.resid_mix,
            q_gain=self.q_gain,
            attn_gate=self.attn_gate if self.cfg.sparse_attn_gate_enabled else None,
        )
        # unbind has one stack as its gradient; an index per layer would have L padded copies. The
        # only stack that may be missing is the last.
        by_name = [stack.to(self.cfg.dtype).unbind(0) for stack in stacks if stack is not None]
        return [LayerWeights(*weights) for weights in zip(*by_name, strict=True)]

    # --- Inputs of the layers ---

    def rotations(self, positions: Tensor, max_seqlen: int) -> Tensor:
        """cos and sin (T, 2, 1, half) fp32 of every token, at its position in its segment.

        A max_seqlen above ROPE_TRAIN_SEQ_LEN raises the base (NTK scaling, PR #414).
        """
        cfg = self.cfg
        dims = cfg.rope_dims or cfg.head_dim
        base = cfg.rope_base
        if cfg.rope_train_seq_len:
            stretch = max(max_seqlen / cfg.rope_train_seq_len, 1)
            base = base * stretch ** (dims / (dims - 2))
        pair = torch.arange(dims // 2, dtype=torch.float64, device=positions.device)
        angles = positions[:, None, None] * base ** (-pair / (dims // 2))  # (T, 1, half) fp64
        return torch.stack([angles.cos(), angles.sin()], 1).float()

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """x0 (T, C): the normed embedding, with pairs and the token before where they are on."""
        cfg = self.cfg
        x = F.embedding(ids, self.tok_emb.to(cfg.dtype))
        if cfg.smear_gate_enabled:
            x = self.add_predecessors(x, ids, positions)
        if cfg.bigram_vocab_size:
            # The last row is for a first token, the others are for a hash of the pair (PR #162).
            last_row = cfg.bigram_vocab_size - 1
            hashed = (36313 * ids ^ 27191 * ids.roll(1)) % last_row
            pair = torch.where(positions == 0, last_row, hashed)
            proj = (self.bigram_scale * self.bigram_proj).to(cfg.dtype)
            x = x + F.linear(F.embedding(pair, self.bigram_emb.to(cfg.dtype)), proj)
        x = rms_norm(x)
        if cfg.smear_enabled:
            # Blends in the previous token, but never across the start of a document.
            gate = self.smear_gate.sigmoid().to(cfg.dtype)
            starts = (positions == 0) | (ids == BOS_ID)
            x = (1 - gate) * x + gate * x.roll(1, 0) * ~starts[:, None]
        return x

    def add_predecessors(self, x: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
        """SmearGate (PR #1667): x_t + lambda sigmoid(W x_t[:GATE_WINDOW]) x_{t-1}, (T, C).

        x: raw embeddings (T, C). A BOS takes nothing, so this gate lets no document see another
        one (PR #1851). The first token of a segment takes nothing either: its predecessor is not in
        the window.
        """
        logits = F.linear(x[:, : self.cfg.gate_window], self.smear_proj.to(x.dtype))  # (T, 1)
        gate = self.smear_lambda.to(x.dtype) * logits.sigmoid()
        starts = (positions == 0) | (ids == BOS_ID)
        return x + (gate * ~starts[:, None]) * x.roll(1, 0)

    def value_embedding(self, ids: Tensor) -> Tensor | None:
        """(T, Hkv * D), added to the values of VE_LAYERS by token id (PR #414); None if off."""
        if not self.cfg.ve_enabled:
            return None
        dtype = self.cfg.dtype
        proj = (self.ve_scale * self.ve_proj).to(dtype)
        return F.linear(F.embedding(ids, self.ve_emb.to(dtype)), proj)

    # --- One layer ---

    def has_xsa(self, layer: int) -> bool:
        """Whether the layer is one of the last XSA_LAST_N, which apply XSA."""
        return layer >= self.cfg.num_layers - self.cfg.xsa_last_n

    def project_heads(
        self,
        normed: Tensor,
        weight: Tensor,
        sites: tuple[str, ...],
        projected: dict[str, Tensor],
        visit: Visit,
        info: PassInfo,
    ) -> Tensor:
        """The product x W^T of the named sites, plus their adapters and the value embedding.

        normed: x (T, C). weight: the rows of "q", "k" and "v" that `sites` names, stacked.
        Returns (T, sum of their widths).
        """
        kv = self.cfg.kv_dim
        rows = F.linear(normed, weight)
        if any(site in projected for site in sites):
            # All sites are added as one tensor: its gradient is then that of the rows, uncopied.
            added = []
            for site in sites:
                if site in projected:
                    added.append(info.adapters.product(projected, site, visit.slot))
                else:
                    width = normed.size(1) if site == "q" else kv
                    added.append(rows.new_zeros(len(rows), width))
            rows = rows + torch.cat(added, -1)
        value_layers = self.cfg.value_embedding_layers
        if info.values is not None and "v" in sites and visit.layer in value_layers:
            scale = self.ve_layer_scales[value_layers.index(visit.layer)].to(normed.dtype)
            rows = rows + F.pad(scale * info.values, (rows.size(1) - kv, 0))
        return rows

    def heads_of_all(self, normed: Tensor, w: LayerWeights, visit: Visit, info: PassInfo) -> Heads:
        """Queries, keys and values of every token of `normed` (T, C), from one product."""
        cfg = self.cfg
        has_xsa = self.has_xsa(visit.layer)
        projected = info.adapters.project(normed, "attn", visit.slot)
        rows = self.project_heads(normed, w.qkv, ("q", "k", "v"), projected, visit, info)
        # XSA uses v again. Two views of it have separate gradients, added in norm_rope's kernel.
        uses = 2 if has_xsa else 1
        q, k, *values = norm_rope(rows, w.q_gain, info.rope, cfg.head_dim, cfg.fused_qk, uses)
        own_v = values[1] if has_xsa else None
        return Heads(q, k, values[0], own_v, None, projected)

    def heads_of_selected(
        self, normed: Tensor, w: LayerWeights, visit: Visit, info: PassInfo, queries: Tensor
    ) -> Heads:
        """Queries of the tokens `queries` (n,) only; keys and values of all tokens, (T, C)."""
        cfg = self.cfg
        C = normed.size(1)
        has_xsa = self.has_xsa(visit.layer)
        projected = info.adapters.project(normed, "attn", visit.slot)

        rows = self.project_heads(normed, w.qkv[C:], ("k", "v"), projected, visit, info)
        uses = 2 if has_xsa else 1
        # The product has as many query heads as there are gains: none here.
        no_gain = w.q_gain[:0]
        _, k, *values = norm_rope(rows, no_gain, info.rope, cfg.head_dim, cfg.fused_qk, uses)
        own_v = values[1][queries] if has_xsa else None

        selected = {}
        for site, h in projected.items():  # h: (documents, tokens, rank)
            selected[site] = h.flatten(0, 1)[queries].unflatten(0, (h.size(0), -1))
        rows = self.project_heads(normed[queries], w.qkv[:C], ("q",), selected, visit, info)
        q, *_ = norm_rope(rows, w.q_gain, info.rope[queries], cfg.head_dim, cfg.fused_qk)
        cu_queries = torch.searchsorted(queries, info.batch.cu_seqlens.long(), out_int32=True)
        return Heads(q, k, values[0], own_v, cu_queries, selected)

    def attend(
        self, normed: Tensor, w: LayerWeights, visit: Visit, info: PassInfo, queries: Tensor | None
    ) -> Tensor:
        """Causal attention within each segment.

        normed: (T, C) in the compute dtype. queries: (n,) int64, the tokens whose output is
        wanted: a run of tokens at the end of some segments, in rising order; None for all tokens.
        Returns (n, C) or (T, C).
        """
        if queries is None:
            heads = self.heads_of_all(normed, w, visit, info)
        else:
            heads = self.heads_of_selected(normed, w, visit, info, queries)
        y = attention(
            heads.q,
            heads.k,
            heads.v,
            info.batch.cu_seqlens,
            info.batch.max_seqlen,
            self.attention_backend,
            heads.cu_queries,
        )  # (n, H, D)
        if heads.own_v is not None:
            remove = xsa if self.cfg.fused_xsa else remove_own_value
            y = remove(y, heads.own_v)
        if w.attn_gate is not None:
            y = self.gate_heads(y, take_rows(normed, queries), w.attn_gate)
        y = y.flatten(1)  # (n, C)
        info.tap("attn_in", visit.layer, normed)
        info.tap("attn_out", visit.layer, y)
        out = F.linear(y, w.o)
        return info.adapters.add_to(out, heads.projected, "o", visit.slot, w.attn_scale)

    def gate_heads(self, y: Tensor, normed: Tensor, weight: Tensor) -> Tensor:
        """Sparse gate (PR #1787): head h of y (n, H, D) times sigmoid(s W_h x[:GATE_WINDOW]).

        normed: x (n, C), the attention's input at the same tokens. weight: W (H, GATE_WINDOW). s is
        SPARSE_ATTN_GATE_SCALE. At W = 0 every gate is 1/2.
        """
        logits = F.linear(normed[:, : self.cfg.gate_window], weight)  # (n, H)
        return y * (self.cfg.sparse_attn_gate_scale * logits).sigmoid().unsqueeze(2)

    def feed(self, normed: Tensor, w: LayerWeights, visit: Visit, info: PassInfo) -> Tensor:
        """The MLP on `normed` (T, C); returns (T, C)."""
        mlp = fused_mlp if self.cfg.fused_mlp else plain_mlp
        out, post = mlp(normed, w.up, w.down, self.cfg.leaky_slope)
        info.tap("mlp_in", visit.layer, normed)
        info.tap("mlp_mid", visit.layer, post)
        projected = info.adapters.project(normed, "mlp", visit.slot)
        return info.adapters.add_to(out, projected, "mlp", visit.slot, w.mlp_scale)

    # --- All layers ---

    def merge_skip(self, x: Tensor, skip: Tensor, rows: tuple[int, ...]) -> Tensor:
        """Merges a stored activation into the stream x (T, C); a gate of 1 keeps x alone.

        rows: as in Visit.skip; weight and gate are the means of the parameters' rows.
        """

        def mean(parameter: Tensor) -> Tensor:
            # A list as an index would be copied from the host in every uncompiled forward.
            return torch.stack([parameter[row] for row in rows]).mean(0).to(x.dtype)

        skip = mean(self.skip_weights) * skip
        if self.cfg.skip_gates_enabled:
            return torch.lerp(skip, x, mean(self.skip_gates).sigmoid())
        return x + skip

    def write_lanes(
        self, lanes: tuple[Tensor, Tensor], attn_out: Tensor, mlp_out: Tensor, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Both lanes after a layer: each keeps a share of itself and takes a share of both outputs.

        lanes: (attention lane, MLP lane). All are (T, C).
        """
        attn_lane, mlp_lane = lanes
        keep = self.parallel_resid_lambdas[layer].to(attn_lane.dtype)  # (lane,)
        post = self.parallel_post_lambdas[layer].to(attn_lane.dtype)  # (source, lane)
        attn, mlp = 0, 1
        new_attn = keep[attn] * attn_lane + post[attn, attn] * attn_out + post[mlp, attn] * mlp_out
        new_mlp = keep[mlp] * mlp_lane + post[attn, mlp] * attn_out + post[mlp, mlp] * mlp_out
        return new_attn, new_mlp

    def hidden(self, info: PassInfo, plan: tuple[Visit, ...], select: Tensor | None) -> Tensor:
        """Final normalised hidden states (T, C); (n, C) with `select` (n,).

        With `select` the last visit computes only the selected tokens. A layer reads a mixture of
        the stream and x0. Up to PARALLEL_START_LAYER it works in order, with h the mixture:

            h = h + attention(h);  stream = h + mlp(h)

        From there on there are two lanes. The stream goes on as the attention's lane, which alone
        takes skips and the adapters' biases; the MLP reads its own lane, and write_lanes adds both
        outputs to both. PARALLEL_FINAL_LANE says what is read at the end.
        """
        layers = self.layer_weights()
        x0 = self.embed(info.batch.inputs, info.positions)
        x = x0  # the stream; from PARALLEL_START_LAYER on the attention lane
        mlp_lane = None
        skips = []
        for visit in plan:
            w = layers[visit.layer]
            norm_scale = 1 / math.sqrt(visit.layer + 1) if self.cfg.ln_scale else 1.0
            queries = select if visit.slot + 1 == len(plan) else None

            if visit.parallel and mlp_lane is None:
                mlp_lane = x
            if visit.skip:
                x = self.merge_skip(x, skips.pop(), visit.skip)
            mixed = w.resid_mix[0] * x + w.resid_mix[1] * x0
            attn_out = self.attend(rms_norm(mixed, norm_scale), w, visit, info, queries)
            mixed = take_rows(mixed, queries)
            x = take_rows(x, queries)
            if mlp_lane is not None:
                mlp_lane = take_rows(mlp_lane, queries)

            if visit.parallel:
                # Attention reads one lane and the MLP the other; both write to both.
                mlp_out = self.feed(rms_norm(mlp_lane, norm_scale), w, visit, info)
                x, mlp_lane = self.write_lanes((x, mlp_lane), attn_out, mlp_out, visit.layer)
            else:
                h = mixed + attn_out
                x = h + self.feed(rms_norm(h, norm_scale), w, visit, info)
            x = info.adapters.add_bias(x, visit.slot)
            if visit.push:
                skips.append(x)

        if mlp_lane is not None:
            if self.cfg.parallel_final_lane == "mean":
                x = (x + mlp_lane) / 2
            elif self.cfg.parallel_final_lane == "mlp":
                x = mlp_lane
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
        """Nats per token (T,) fp32, 0 where the target is -1.

        If the batch has hints, the result is (2, T): nats of targets and, without a gradient, of
        hints.

        lora: one adapter per document. Each document then holds an equal number of consecutive
            tokens of the row, in one or more segments (see Adaptation.chunk_windows).
        select: (n,) int64, the tokens that get logits; the result is then (n,). With `lora` they
            must be as the `queries` of `attend`, and equally many of every document.
        tap: called with (site, layer, input) of every product, for calibration.
        temperature: divides the logits.
        """
        cfg = self.cfg
        if lora is None:
            adapters = AdapterView({}, {}, {}, None, 1.0)
        else:
            adapters = lora.view()
        positions = segment_positions(batch.cu_seqlens, batch.inputs.numel())
        info = PassInfo(
            batch,
            positions,
            self.rotations(positions, batch.max_seqlen),
            tap,
            adapters,
            self.value_embedding(batch.inputs),
        )
        targets = batch.targets
        hints = batch.hints
        # Without adapters every token passes the last visit: one graph serves training and scoring.
        x = self.hidden(info, plan, None if lora is None else select)
        tap("head_in", 0, x)
        if select is not None:
            targets = targets[select]
            if hints is not None:
                hints = hints[select]
            if lora is None:
                x = x[select]

        projected = adapters.project(x, "head", 0)
        extra = adapters.product(projected, "head", 0) if projected else None
        if temperature != 1:
            # cap / t * tanh(z / cap) is the softcap of z / t with a cap of cap / t.
            x = x / temperature
            if extra is not None:
                extra = extra / temperature
        head = self.tok_emb.to(cfg.dtype)
        cap = cfg.logit_softcap / temperature
        return head_loss(x, head, extra, targets, cap, cfg.fused_ce, hints)


# === 5. Adapters: a LoRA for every document of a batch, at every visit of a layer =================
class AdapterSite(NamedTuple):
    """Where one adapter sits in the network, and its size."""

    source: str  # the input that it reads: of the attention ("attn"), the "mlp" or the "head"
    site: str  # the product it is added to: "q", "k", "v", "o", "mlp" or "head"
    slot: int  # position in the plan; 0 for the head
    width: int  # output width of that product: rows of B
    rank: int  # rows of A in use; beyond them A and B are zero, so neither gets a gradient


class AdapterView(NamedTuple):
    """The adapters of one forward, by where they read and where they add.

    Each document holds an equal number of consecutive tokens of the row. Without adapters all
    dictionaries are empty: `project` then returns {}, and add_to and add_bias change nothing.
    """

    # (source, slot) -> the A matrices of all its sites, (documents, ranks end to end, C)
    down: dict[tuple[str, int], Tensor]
    sites: dict[tuple[str, int], list[str]]  # (source, slot) -> the sites that share this A
    # (site, slot) -> the adapters' B matrices, (documents, width, rank)
    up: dict[tuple[str, int], Tensor]
    bias: Tensor | None  # (documents, slots, C)
    scale: float

    def project(self, x: Tensor, source: str, slot: int) -> dict[str, Tensor]:
        """x A^T of every adapter that reads x (T, C), by site: (documents, tokens of each, rank).

        One product serves all of them.
        """
        if (source, slot) not in self.down:
            return {}
        a = self.down[source, slot]
        sites = self.sites[source, slot]
        h = x.unflatten(0, (a.size(0), -1)) @ a.mT  # (documents, tokens, ranks end to end)
        return dict(zip(sites, h.chunk(len(sites), -1), strict=True))

    def product(self, projected: dict[str, Tensor], site: str, slot: int) -> Tensor:
        """scale * (x A^T) B^T of one adapter, (T, width)."""
        b = self.up[site, slot] * self.scale
        return (projected[site] @ b.mT).flatten(0, 1)

    def add_to(
        self, y: Tensor, projected: dict[str, Tensor], site: str, slot: int, row_scale: Tensor
    ) -> Tensor:
        """y (T, width) + scale * (x A^T) B^T, with the rows of B times row_scale (width,)."""
        if site not in projected:
            return y
        b = self.up[site, slot] * row_scale[:, None]
        y = y.unflatten(0, (b.size(0), -1))  # (documents, tokens, width)
        return torch.baddbmm(y, projected[site], b.mT, alpha=self.scale).flatten(0, 1)

    def add_bias(self, x: Tensor, slot: int) -> Tensor:
        """x (T, C), plus each document's vector for this visit (TTT_BIAS_TUNE)."""
        if self.bias is None:
            return x
        x = x.unflatten(0, (self.bias.size(0), -1))  # (documents, tokens, C)
        return (x + self.bias[:, slot, None]).flatten(0, 1)


def adapter_sites(cfg: Config, slots: int) -> tuple[AdapterSite, ...]:
    """The adapters that the TTT_*_LORA knobs ask for, neighbours where they read the same input."""
    C = cfg.model_dim
    kv = cfg.kv_dim
    rank = cfg.ttt_lora_rank
    sites = []
    for slot in range(slots):
        if cfg.ttt_q_lora:
            sites.append(AdapterSite("attn", "q", slot, C, rank))
        if cfg.ttt_k_lora:
            sites.append(AdapterSite("attn", "k", slot, kv, rank))
        if cfg.ttt_v_lora:
            sites.append(AdapterSite("attn", "v", slot, kv, rank))
        if cfg.ttt_o_lora:
            sites.append(AdapterSite("attn", "o", slot, C, rank))
        if cfg.ttt_mlp_lora:
            sites.append(AdapterSite("mlp", "mlp", slot, C, rank))
    sites.append(AdapterSite("head", "head", 0, cfg.vocab_size, cfg.ttt_lm_rank or rank))
    return tuple(sites)


# Compared by identity: comparing tensors would be neither cheap nor a yes or no.
@dataclasses.dataclass(eq=False)
class LoRA:
    """One adapter set per document, in two or three leaf tensors: y += scale * (x A^T) B^T.

    q, k, v and o read the normalised input of the attention, mlp that of the MLP, head the final
    state. With PRESET=record a document has 8,355,840 values, at 17 visits and the head.
    """

    sites: tuple[AdapterSite, ...]
    scale: float
    down: Tensor  # (documents, len(sites), rank, C): every A, at the largest rank
    up: Tensor  # (documents, sum of widths, rank): every B, end to end
    bias: Tensor | None  # (documents, slots, C): added after every visit

    @classmethod
    def zeros(cls, cfg: Config, batch: int, slots: int, device: torch.device) -> LoRA:
        """Adapters of zeros in fp32 for `batch` documents and a plan of `slots` visits."""
        sites = adapter_sites(cfg, slots)
        rank = max(site.rank for site in sites)
        width = sum(site.width for site in sites)

        def leaf(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, device=device, requires_grad=True)

        down = leaf(len(sites), rank, cfg.model_dim)
        up = leaf(width, rank)
        bias = leaf(slots, cfg.model_dim) if cfg.ttt_bias_tune else None
        return cls(sites, cfg.lora_scale, down, up, bias)

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that learn: down, up and, with TTT_BIAS_TUNE, bias."""
        if self.bias is None:
            return [self.down, self.up]
        return [self.down, self.up, self.bias]

    def with_leaves(self, leaves: list[Tensor]) -> LoRA:
        """These adapters with other tensors, in the order of `leaves`."""
        bias = None if self.bias is None else leaves[2]
        return dataclasses.replace(self, down=leaves[0], up=leaves[1], bias=bias)

    def to(self, dtype: torch.dtype) -> LoRA:
        """The adapters in a dtype; the same tensors if they have it already."""
        return self.with_leaves([leaf.to(dtype) for leaf in self.leaves])

    def rows(self, rows: slice) -> LoRA:
        """The adapters of some documents, as new leaves that share the memory."""
        return self.with_leaves([leaf[rows].detach().requires_grad_() for leaf in self.leaves])

    @torch.no_grad()
    def reset(self, seed: int, keys: Iterable[int]) -> None:
        """Fresh adapters, in place: B and bias 0, A uniform in +-1 / sqrt(C).

        A document's values depend on the seed and its key only, so neither the batch nor the rank
        that adapts a document changes its score. Rows beyond the keys are padding and keep their A.
        """
        bound = self.down.size(-1) ** -0.5
        generator = torch.Generator(self.down.device)
        for a, key in zip(self.down, keys, strict=False):
            # A generator on the CPU takes the low 32 bits of this.
            generator.manual_seed(seed * 1_000_000_007 + key)
            a.uniform_(-bound, bound, generator=generator)
        for i, site in enumerate(self.sites):
            if site.rank < self.down.size(2):
                self.down[:, i, site.rank :] = 0
        for leaf in self.leaves[1:]:
            leaf.zero_()

    def rate_factors(self, factors: Mapping[str, float]) -> list[Tensor]:
        """Factors of the rate for down, up and bias (TTT_LR_FACTORS), which broadcast to them."""
        device = self.down.device
        if not factors:
            return [torch.ones((), dtype=torch.float64, device=device)] * 3
        by_site = torch.tensor([float(factors.get(s.site, 1)) for s in self.sites], device=device)
        widths = torch.tensor([site.width for site in self.sites], device=device)
        bias = by_site.new_tensor(float(factors.get("bias", 1)))
        return [by_site[:, None, None], by_site.repeat_interleave(widths)[:, None], bias]

    def view(self) -> AdapterView:
        """The adapters for one forward. `split` makes a leaf's gradient in one copy."""
        # A dictionary, because Dynamo does not trace groupby with a key.
        sites_of = {}
        for site in self.sites:
            sites_of.setdefault((site.source, site.slot), []).append(site.site)
        rank = self.down.size(2)
        a = self.down.flatten(1, 2).split([len(sites) * rank for sites in sites_of.values()], 1)
        b = self.up.split([site.width for site in self.sites], 1)
        return AdapterView(
            down=dict(zip(sites_of, a, strict=True)),
            sites=sites_of,
            up=dict(zip([(site.site, site.slot) for site in self.sites], b, strict=True)),
            bias=self.bias,
            scale=self.scale,
        )


# === 6. Optimisers: Muon on banks, AdamW on the rest, schedules ===
# Each iteration maps every singular value x to a x + b x^3 + c x^5, with its own (a, b, c).
MUON_COEFFS = {
    # Muon (K. Jordan): takes 0.002 .. 1 to 0.68 .. 1.20.
    "quintic": [(3.4445, -4.7750, 2.0315)] * 20,
    # Polar Express (arXiv 2505.16932; PR #1344): takes 0.001 .. 1 to 0.86 .. 1.14. It diverges
    # from 1.022 on.
    "polar": [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ],
}


def newton_schulz(g: Tensor, steps: int, coeffs: str = "quintic") -> Tensor:
    """Moves the singular values of each matrix of g (n, r, c) towards 1; keeps its vectors.

    Each step computes x <- a x + (b y + c y^2) x with y = x x^T, on the shorter side. `coeffs`
    names an entry of MUON_COEFFS. Newton-Schulz iteration of Muon, K. Jordan.
    """
    x = g.mT if g.size(-2) > g.size(-1) else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in MUON_COEFFS[coeffs][:steps]:
        y = x @ x.mT
        polynomial = torch.baddbmm(y, y, y, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if g.size(-2) > g.size(-1) else x


def muon_update(
    grad: Tensor, buffer: Tensor, squares: Tensor | None, momentum: Tensor, cfg: Config
) -> Tensor:
    """The direction of a Muon step (n, r, c), in the compute dtype: orthogonalised momentum.

    Computes m <- mu m + g and u = g + mu m (Nesterov). With MUON_SQUARE_DECAY, b, also
    v <- b v + (1 - b) g^2 and u <- u / sqrt(v) entry by entry (Muon^2, arXiv 2604.09967). v begins
    at 0, so it is too small by 1 - b^t at first: one factor of all entries, which changes nothing.
    With MUON_ROW_NORMALIZE each row of u is scaled to norm 1 before the orthogonalisation
    (MuonEq-R).

    grad: (n, r, c) fp32. buffer and squares: m and v, changed in place; squares is None without
    MUON_SQUARE_DECAY.
    """
    buffer.mul_(momentum).add_(grad)
    u = grad + momentum * buffer
    if squares is not None:
        squares.lerp_(grad.square(), 1 - cfg.muon_square_decay)
        u = u / (squares.sqrt() + 1e-10)
    if cfg.muon_row_normalize:
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    return newton_schulz(u.to(cfg.dtype), cfg.muon_backend_steps, cfg.muon_coeffs)


def muon_step(
    grad: Tensor,
    buffer: Tensor,
    squares: Tensor | None,
    weight: Tensor,
    average: Tensor,
    outbox: Tensor | None,
    rates: Tensor,
    cfg: Config,
) -> None:
    """A Muon step of matrices (n, out, in) that one rank owns, in one pass over memory.

    Computes W <- (1 - lr wd) W - lr sqrt(max(1, out / in)) U with U of muon_update. Changes in
    place: buffer, squares, weight and average, all fp32, and outbox, which receives the new weights
    in the compute dtype. rates: (4,) fp32, the factor of clipping, the momentum, the learning rate
    and `average_share` as in Optimizers.step.
    """
    clip, momentum, lr, average_share = rates.unbind()
    average.lerp_(weight, average_share)
    update = muon_update(grad.float() * clip, buffer, squares, momentum, cfg).float()
    shape_factor = math.sqrt(max(1.0, weight.size(-2) / weight.size(-1)))
    weight.mul_(1 - lr * cfg.muon_wd).sub_(update * (lr * shape_factor))
    if outbox is not None:
        outbox.copy_(weight)


def assign_matrices(banks: dict[str, Tensor], world_size: int) -> list[dict[str, slice]]:
    """For each rank, the slice of every bank that it owns.

    The largest matrices are assigned first, each to the rank with the fewest values so far. With
    the record model on 8 ranks the largest load is 2 % above the mean; if every bank had to be
    divided equally, it would be 36 % above.
    """
    matrix_sizes = {name: bank[0].numel() for name, bank in banks.items()}
    counts = {name: [0] * world_size for name in banks}
    loads = [0] * world_size
    for name in sorted(banks, key=matrix_sizes.get, reverse=True):
        for _ in range(len(banks[name])):
            rank = loads.index(min(loads))
            loads[rank] += matrix_sizes[name]
            counts[name][rank] += 1

    slices = [{} for _ in range(world_size)]
    for name in banks:
        start = 0
        for rank, count in enumerate(counts[name]):
            slices[rank][name] = slice(start, start + count)
            start += count
    return slices


def take_slices(banks: dict[str, Tensor], slices: dict[str, slice]) -> dict[str, Tensor]:
    """Views of the given slice of every bank."""
    return {name: bank[slices[name]] for name, bank in banks.items()}


def split_like(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of the first values of a flat tensor, one after another, in the shapes of `like`."""
    sizes = [x.numel() for x in like.values()]
    parts = flat[: sum(sizes)].split(sizes)
    return {name: part.view_as(x) for (name, x), part in zip(like.items(), parts, strict=True)}


class MessageSlot(NamedTuple):
    """The part of a message that holds one rank's slice of one bank."""

    rank: int
    bank: str
    view: Tensor  # (matrices, out, in), a view of the message


class Muon:
    """Muon for banks of matrices (n, out, in) that act as y = x W^T, divided between the ranks.

    Each bank is cut in rank order, at the ends that assign_matrices chose: a rank owns a slice of
    consecutive matrices. Only the owner keeps exact fp32 weights, momentum, squares and average
    of its slices, and only it steps them. The other slices of its model's banks are as received,
    rounded to the compute dtype, to which the forward casts anyway. (Banks in that dtype would save
    a cast, 0.1 % of a step, but would add up the gradients of microbatches in bf16.)

    A message has a row for each rank, which holds the slices that this rank owns. Collectives want
    rows of one length, so zeros end the row of a smaller load. For two ranks and three layers:

        row 0:  | qo[0:3] | kv[0:3] | up[0:2] | down[0:1] |
        row 1:  | qo[3:6] | kv[3:6] | up[2:3] | down[1:3] |

    Two messages travel in a step, in the compute dtype:

        gradients   reduce-scatter   each rank fills all rows; rank r receives the sum of row r
        weights     all-gather       each rank sends its row (`outbox`); all receive all rows

    PR #399 gathers updates instead of weights. An update has a spectral norm of about the learning
    rate times sqrt(max(1, out / in)).
    """

    def __init__(self, banks: dict[str, nn.Parameter], cfg: Config, ranks: Ranks):
        self.banks = banks
        self.cfg = cfg
        self.ranks = ranks
        self.step_matrices = torch.compile(muon_step, dynamic=False) if cfg.compile else muon_step
        self.slices_of_ranks = assign_matrices(banks, ranks.world_size)
        data = {name: bank.data for name, bank in banks.items()}
        weights_of_ranks = [take_slices(data, slices) for slices in self.slices_of_ranks]
        self.owned_slices = self.slices_of_ranks[ranks.rank]
        self.owned_weights = weights_of_ranks[ranks.rank]  # stepped in place
        self.momentum = {name: torch.zeros_like(w) for name, w in self.owned_weights.items()}
        self.squares = {}  # decaying means of squared gradients, with MUON_SQUARE_DECAY
        if cfg.muon_square_decay:
            self.squares = {name: torch.zeros_like(w) for name, w in self.owned_weights.items()}
        self.average = {name: w.clone() for name, w in self.owned_weights.items()}
        self.gradients = {}  # per bank, those of the owned slices; set by reduce_gradients
        # Without other ranks there are no messages.
        self.message = self.received_row = self.sent_row = None  # set by allocate_messages
        self.message_slots = []
        self.outbox = {}  # per bank a view of sent_row
        self.peer_weights = []  # the slices of the other ranks in the model's banks
        self.peer_views = []  # the same slices in the message
        if ranks.world_size > 1:
            self.allocate_messages(weights_of_ranks)

    def allocate_messages(self, weights_of_ranks: list[dict[str, Tensor]]) -> None:
        """Allocates a message of all ranks, and the rows that this rank receives and sends."""
        loads = [sum(w.numel() for w in weights.values()) for weights in weights_of_ranks]
        shape = self.ranks.world_size, max(loads)
        self.message = torch.zeros(shape, dtype=self.cfg.dtype, device=self.ranks.device)
        self.received_row = torch.zeros_like(self.message[0])
        self.sent_row = torch.zeros_like(self.message[0])
        self.outbox = split_like(self.sent_row, self.owned_weights)
        for rank, weights in enumerate(weights_of_ranks):
            for bank, view in split_like(self.message[rank], weights).items():
                self.message_slots.append(MessageSlot(rank, bank, view))
        for slot in self.message_slots:
            if slot.rank != self.ranks.rank:
                self.peer_weights.append(weights_of_ranks[slot.rank][slot.bank])
                self.peer_views.append(slot.view)

    def gather_full(self, owned: dict[str, Tensor]) -> dict[str, Tensor]:
        """The full fp32 banks, put together from each rank's slices. All ranks must call it.

        Tensors in `owned` that belong to no bank are returned as they are.
        """
        full = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.banks.items()}
        for name, slice_ in self.owned_slices.items():
            full[name][slice_] = owned[name]
        return owned | {name: self.ranks.sum(bank) for name, bank in full.items()}

    def reduce_gradients(self) -> Tensor:
        """Sums the gradients over the ranks, each slice at its owner. All ranks must call it.

        Returns the squared norm () of the sums in all banks, the same on every rank.
        """
        self.gradients = {name: p.grad for name, p in self.banks.items()}
        if self.ranks.world_size > 1:
            parts = []
            for slot in self.message_slots:
                slice_ = self.slices_of_ranks[slot.rank][slot.bank]
                parts.append(self.gradients[slot.bank][slice_])
            torch._foreach_copy_([slot.view for slot in self.message_slots], parts)
            # gloo does not accept a message in rows.
            dist.reduce_scatter_tensor(self.received_row, self.message.view(-1))
            self.gradients = split_like(self.received_row, self.owned_weights)
        squares = [g.float().square().sum() for g in self.gradients.values()]
        return self.ranks.sum(torch.stack(squares).sum())

    def step(self, rates: Tensor) -> None:
        """Steps this rank's slices by the reduced gradients, then gathers the weights of all ranks.

        rates: (4,) as in muon_step. All ranks must call it.
        """
        for name, weight in self.owned_weights.items():
            if len(weight):
                self.step_matrices(
                    self.gradients[name],
                    self.momentum[name],
                    self.squares.get(name),
                    weight,
                    self.average[name],
                    self.outbox.get(name),
                    rates,
                    self.cfg,
                )
        if self.ranks.world_size > 1:
            dist.all_gather_into_tensor(self.message.view(-1), self.sent_row)
            torch._foreach_copy_(self.peer_weights, self.peer_views)


class Optimizers:
    """Muon for the banks and AdamW for all other parameters, as one optimiser.

    A step sums all gradients over the ranks, clips them by the norm of the sums, and updates
    weights and their average. The parameters outside the banks become views of one flat tensor,
    which is the same on every rank: one message carries their gradients, and one operation
    updates their average.
    """

    def __init__(self, model: GPT, cfg: Config, ranks: Ranks):
        self.model = model
        self.cfg = cfg
        self.ranks = ranks
        # A CUDA graph adds to the gradients where they are, so they must be zeroed in place.
        self.keep_gradients = False
        groups = self.parameter_groups()
        self.muon = Muon(groups["muon"], cfg, ranks)
        self.small = groups["embed"] | groups["scalar"] | groups["fixed"]
        self.sizes = [
            sum(p.numel() for p in groups[name].values()) for name in ("embed", "scalar", "fixed")
        ]
        self.flat_weights = torch.cat([p.detach().flatten() for p in self.small.values()])
        self.flat_average = self.flat_weights.clone()
        weights = split_like(self.flat_weights, self.small)
        average = split_like(self.flat_average, self.small)
        for name, p in self.small.items():
            p.data = weights[name]
        # Parameters in "fixed" are not stepped.
        embed, scalar, _ = self.flat_weights.split(self.sizes)
        self.leaves = [nn.Parameter(embed), nn.Parameter(scalar)]
        self.adam = self.build_adam()
        # The exact values that this rank steps: flat parameters and its slices of the banks.
        self.state = {
            "weights": weights | self.muon.owned_weights,
            "average": average | self.muon.average,
            "momentum": self.muon.momentum,
        }
        if self.muon.squares:
            self.state["squares"] = self.muon.squares

    def parameter_groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """The model's parameters by optimiser group and name."""
        table = parameter_table(self.cfg)
        groups = {"muon": {}, "embed": {}, "scalar": {}, "fixed": {}}
        for name, p in self.model.named_parameters():
            groups[table[name].group][name] = p
        # In the flat tensor, parameters whose size is not a multiple of 4 come last, because
        # vectorised loads need an alignment of 16 bytes.
        for key in ("scalar", "fixed"):
            surplus = {name: p.numel() % 4 for name, p in groups[key].items()}
            groups[key] = {name: groups[key][name] for name in sorted(surplus, key=surplus.get)}
        return groups

    def build_adam(self) -> torch.optim.AdamW:
        """AdamW over the leaves: embeddings and scalars, with a rate and a decay each."""
        cfg = self.cfg
        embed, scalar = self.leaves
        groups = [
            dict(params=[embed], lr=cfg.tied_embed_lr, weight_decay=cfg.embed_wd),
            dict(params=[scalar], lr=cfg.scalar_lr, weight_decay=cfg.adam_wd),
        ]
        for group in groups:
            group["base_lr"] = group["lr"]
        betas = cfg.beta1, cfg.beta2
        return torch.optim.AdamW(groups, betas=betas, eps=cfg.adam_eps, fused=True)

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float, average_share: float | None = None) -> Tensor:
        """Updates the weights by the gradients, which it clears. All ranks must call it.

        lr_scale: factor of all learning rates. momentum: Muon's. Returns the norm () of the
        gradient summed over the ranks, before clipping.

        average_share: the share that the weights get in the average, as they are before this step;
        by default EMA's, 1 - EMA_DECAY. They enter the average a step late, because only now does
        the host know that the step which made them had a finite loss and gradient: a bad step
        never reaches the average.
        """
        if average_share is None:
            average_share = 1 - self.cfg.ema_decay
        squares = self.muon.reduce_gradients()
        flat = self.ranks.sum(torch.cat([p.grad.flatten() for p in self.small.values()]))
        norm = (squares + flat.square().sum()).sqrt()
        clip = ((self.cfg.grad_clip_norm or math.inf) / (norm + 1e-6)).clamp_max(1.0)

        self.flat_average.lerp_(self.flat_weights, average_share)
        embed_grad, scalar_grad, _ = flat.mul_(clip).split(self.sizes)
        for leaf, grad in zip(self.leaves, (embed_grad, scalar_grad), strict=True):
            leaf.grad = grad
        # load_state_dict replaces these groups, so they are looked up anew in each step.
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adam.step()

        # new_full fills on the device. A copy from the host would wait for the device's work.
        rates = [
            norm.new_full((), x) for x in (momentum, self.cfg.matrix_lr * lr_scale, average_share)
        ]
        self.muon.step(torch.stack([clip, *rates]))
        self.model.zero_grad(set_to_none=not self.keep_gradients)
        return norm

    @torch.no_grad()
    def averages(self, newest_share: float | None = None) -> dict[str, Tensor]:
        """The average of all weights, in full. All ranks must call it.

        newest_share: the share that the weights after the last step get. Without it they are left
        out, as after `step`.
        """
        averages = self.state["average"]
        if newest_share is not None:
            weights = self.state["weights"]
            averages = {n: old.lerp(weights[n], newest_share) for n, old in averages.items()}
        return self.muon.gather_full(averages)

    def state_dict(self) -> dict[str, Any]:
        """The full state of weights and optimisers, the same for any number of ranks.

        Some of its tensors are live, as in torch. All ranks must call it.
        """
        state = {key: self.muon.gather_full(owned) for key, owned in self.state.items()}
        return state | {"adam": self.adam.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what state_dict returned, on any number of ranks, into model and optimisers."""
        self.model.load_state_dict(state["weights"])
        # After a step the weights of other ranks are rounded to the compute dtype. Exact ones would
        # change a resumed run, because the forward scales them before the cast.
        for weight in self.muon.peer_weights:
            weight.copy_(weight.to(self.cfg.dtype))
        for key, owned in self.state.items():
            for name, x in owned.items():
                saved = state[key][name]
                if name in self.muon.owned_slices:
                    saved = saved[self.muon.owned_slices[name]]
                x.copy_(saved)
        self.adam.load_state_dict(state["adam"])


def lr_scale_at(frac: float, cfg: Config, step: int = 0) -> float:
    """Factor of all learning rates when a share `frac` of training is done.

    It is 1, then falls linearly to 0 at the end, but is at least MIN_LR. The fall takes the share
    WARMDOWN_FRAC of training or, if set, the last WARMDOWN_ITERS steps. Training is expected to
    have step / frac steps in all.
    """
    warmdown = cfg.warmdown_frac
    if cfg.warmdown_iters:
        warmdown = cfg.warmdown_iters * frac / max(step, 1)
    return 1.0 if frac < 1 - warmdown else max((1 - frac) / warmdown, cfg.min_lr)


# Steps over which the rates rise again after a change of SEQ_LEN_SCHEDULE (PR #2014).
LENGTH_RAMP_STEPS = 32


def ramp_after_change(step: int, changed_at: int) -> float:
    """Factor of all learning rates in step `step`, k / 32 in the k-th step after a change.

    changed_at: the first step with the new length; 0 if there was no change.
    """
    if not changed_at:
        return 1.0
    return min((step - changed_at + 1) / LENGTH_RAMP_STEPS, 1.0)


def muon_momentum(step: int, cfg: Config) -> float:
    """Muon's momentum: start + (end - start) min(step / warm-up steps, 1)."""
    start, end = cfg.muon_momentum_warmup_start, cfg.muon_momentum
    share = min((step + 1e-9) / (cfg.muon_momentum_warmup_steps + 1e-9), 1.0)
    return start + (end - start) * share


# === 7. Training ==================================================================================
def backward_row(forward: Callable, plan: tuple[Visit, ...], row: Batch, count: Tensor) -> Tensor:
    """Adds the gradient of one row's part of the loss to the parameters' gradients.

    count: fp32 scalar, the number of targets in all rows of the step. The parts of all rows and
    ranks therefore add up to the mean loss. Returns this row's part, detached.
    """
    loss = forward(row, plan).sum() / count
    loss.backward()
    return loss.detach()


def capture_row(
    forward: Callable, plan: tuple[Visit, ...], row: Batch, pool: Any
) -> Callable[[Batch, Tensor], Tensor]:
    """Records `backward_row` of one plan as a CUDA graph, so that a row costs one launch.

    A graph works in fixed memory. The returned function copies each row to where the graph reads,
    and overwrites the loss that it returned before. Gradients must be zeroed in place.
    """
    tensors = [x.clone() for x in (row.inputs, row.targets, row.cu_seqlens)]
    count = torch.ones((), device=row.inputs.device)
    once = partial(backward_row, forward, plan, Batch(*tensors, row.max_seqlen), count)

    # The first call is not recorded, because libraries allocate their lasting memory in it.
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        once()
    torch.cuda.synchronize()

    # By default a capture fails when another thread uses CUDA, as the loader's thread does.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        loss = once()

    def replay(row: Batch, new_count: Tensor) -> Tensor:
        """Adds the gradient of `row`; returns its part of the loss."""
        sources = [row.inputs, row.targets, row.cu_seqlens, new_count]
        torch._foreach_copy_([*tensors, count], sources)
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
    """Adds the gradient of this rank's part of the mean loss; returns that part, detached.

    rows: this rank's rows of the step. num_targets: the targets in the rows of all ranks. graphs:
    for each recorded plan, the function that `capture_row` returned.
    """
    count = torch.full((), float(num_targets), device=rows[0].inputs.device)
    backward = partial(backward_row, forward, plan)
    if graphs and plan in graphs:
        backward = graphs[plan]

    total = torch.zeros_like(count)
    for row in rows:
        total += backward(row, count)
    return total


def synthetic_row(cfg: Config, shape: RowShape, device: torch.device) -> Batch:
    """A row of random ids in documents of many lengths: warm-up sees no real token."""
    size, capacity, max_seqlen = shape
    rng = np.random.default_rng(0)
    ids = rng.integers(0, cfg.vocab_size, size + 1)
    is_start = rng.random(size) < 2 / max_seqlen
    # As a token, True equals 1, which plays the BOS.
    starts = segment_starts(is_start, 1, max_seqlen)

    # The other half of the capacity is left to the segments of the padding.
    most = capacity // 2
    n = size if len(starts) <= most else int(starts[most])
    return pack_row(ids[:n], ids[1 : n + 1], starts[:most], shape, device)


def weights_sha256(model: nn.Module) -> str:
    """The SHA-256 of all parameters in fp32, little-endian, end to end in the model's order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().float().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def state_restored(model: nn.Module, optimizers: Optimizers) -> Iterator[None]:
    """Restores the training state after its body, PyTorch's random state included.

    Weights, averages and momentum are copied back, gradients cleared. AdamW's state is dropped, so
    AdamW must not have taken a step before.
    """
    tensors = list(model.state_dict().values())
    for by_name in optimizers.state.values():
        tensors += by_name.values()
    copies = [t.clone() for t in tensors]
    devices = [model.tok_emb.device] if model.tok_emb.is_cuda else []
    with torch.random.fork_rng(devices):
        yield
    torch._foreach_copy_(tensors, copies)
    optimizers.adam.state.clear()
    model.zero_grad(set_to_none=True)


def gaussian_bits(qmax: int, clip_sigmas: float) -> float:
    """The entropy in bits of a Gaussian weight that is rounded to integers from -qmax to qmax.

    The largest integer stands for `clip_sigmas` standard deviations. A step is then
    clip_sigmas / qmax deviations, and the entropy about log2(sqrt(2 pi e) / step).
    """
    return math.log2(math.sqrt(2 * math.pi * math.e) * qmax / clip_sigmas)


def predict_submission_bytes(cfg: Config) -> float:
    """Bytes of code and model together, predicted from the config alone.

    An artifact that is fitted has the size that fit_artifact aims at. In any other each weight of a
    quantised matrix counts its `gaussian_bits`, and every other parameter 16 bits.
    """
    if cfg.artifact_limit_bytes:
        return CODE_BYTES + fitted_bytes(cfg)
    bits = 0.0
    shapes = bank_shapes(cfg)
    for matrix in quantised_matrices(cfg):
        _, rows, columns = shapes[matrix.bank]
        qmax = qmax_of(cfg, matrix.bank)
        bits += rows * columns * gaussian_bits(qmax, clip_sigmas_of(cfg, matrix))
    for shape in float_shapes(cfg).values():
        bits += 16 * math.prod(shape)
    return CODE_BYTES + bits / 8


# Dense bf16 FLOP/s by data sheet, for every device whose name holds the key.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


def flops_per_token(cfg: Config, looped: bool) -> float:
    """FLOPs of training on a token: 6 for each weight, as often as its layer is visited."""
    visits_per_layer = len(cfg.plans[looped]) / cfg.num_layers
    flops = 0.0
    for role in parameter_table(cfg).values():
        times = visits_per_layer if role.group == "muon" else 1
        flops += 6 * math.prod(role.shape) * times
    return flops


@dataclasses.dataclass
class TrainState:
    """The numbers that training remembers from one step to the next; a checkpoint holds them.

    Times are in seconds of training. `Pacer`, `AverageSchedule` and `StepReporter` each change
    fields of their own.
    """

    # The share that the newest weights get in the average, which they enter in the next step.
    newest_share: float
    # Steps that the run will probably take, for the live line.
    expected_steps: float

    # Steps given to the device so far, and their targets on all ranks.
    step: int = 0
    tokens: int = 0
    # Mean nats per target in the last step whose numbers have been read.
    loss: float = math.nan
    # Whether the layers are looped, and whether weights are rounded (LATE_QAT), from now on.
    looped: bool = False
    rounded: bool = False
    # Weights in the average since SWA began.
    swa_count: int = 0
    # The longest segment of the last step, 0 before the first, and the first step with this length
    # if there was a change (SEQ_LEN_SCHEDULE).
    longest_segment: int = 0
    length_changed_at: int = 0

    # The ranks' mean clock as far as it is known, the visits of layers that it covers, and the
    # visits sent since.
    elapsed_s: float = 0.0
    timed_visits: int = 0
    untimed_visits: int = 0
    # The longest visit of a layer. It decays by 2 % a step.
    longest_visit_s: float = 0.0
    # This rank's own clock at the end of the last step that it has read.
    rank_s: float = 0.0

    # The mean clock at the last checkpoint.
    checkpoint_s: float = 0.0
    # This rank's clock and the targets at the last log line, and the losses and steps since.
    logged_s: float = 0.0
    logged_tokens: int = 0
    unlogged_loss: float = 0.0
    unlogged_steps: int = 0
    # The mean clock and the visits at the end of the first step, which is not representative.
    first_step_s: float = 0.0
    first_step_visits: int = 0


class StepNumbers(NamedTuple):
    """The numbers of one step, read on the host; all but `seconds` are the same on all ranks."""

    step: int  # from 1
    loss: float  # nats per target
    grad_norm: float  # of the reduced gradient, before clipping
    lr_scale: float  # the factor of the learning rates
    compilations: float  # on all ranks since warm-up
    signals: float  # sum of the signal numbers that ranks have received; 0: none
    seconds: float  # on this rank, since the end of the previous step


class SentStep(NamedTuple):
    """A step whose numbers are on their way to the host."""

    # Visits of layers between the last clock known to all ranks and the clock in these numbers.
    covered_visits: int
    lr_scale: float
    numbers: PendingRead


class Pacer:
    """Knows how far the schedule is, and whether another step fits into the budget.

    It never makes the device wait. A step's numbers are sent to the host at once but read one step
    late, while the device has the next step's work. With step n travels the mean time at which the
    ranks had finished step n - 1, so all ranks know the same time and decide alike. For later steps
    the visits of layers are counted and their duration is estimated: all steps have equally many
    rows, so a visit takes as long in each. With 6 visits a step:

        step sent   numbers read   elapsed_s is the end of   timed visits   untimed visits
            1             1                step 1                  6                0
            2             -                step 1                  6                6
            3             2                step 1                  6               12
            4             3                step 2                 12               12

    `budget_s` is in seconds of training, infinite if only ITERATIONS ends the run.
    """

    def __init__(self, state: TrainState, ranks: Ranks, budget_s: float, iterations: int):
        self.state = state
        self.ranks = ranks
        self.budget_s = budget_s
        self.iterations = iterations
        self.unread: SentStep | None = None
        # A resumed run has trained for `rank_s` seconds already.
        self.started_at = ranks.now() - state.rank_s

    def frac(self) -> float:
        """The share of the budget, or of ITERATIONS, that is spent before the next step.

        A visit of a layer that is not timed yet counts as a mean visit.
        """
        state = self.state
        if self.budget_s == math.inf:
            return state.step / self.iterations
        spent = state.elapsed_s * (1 + state.untimed_visits / max(state.timed_visits, 1))
        # Below 1, so that ENABLE_LOOPING_AT=1 never loops.
        return min(spent / self.budget_s, 1 - 1e-9)

    def fits(self, visits: int) -> bool:
        """Whether a step of so many visits of layers will end within the budget.

        Each visit that is not timed yet counts as a longest visit.
        """
        visits += self.state.untimed_visits
        return self.state.elapsed_s + self.state.longest_visit_s * visits <= self.budget_s

    def exclude(self, seconds: float) -> None:
        """Takes seconds that have just passed off the clock."""
        self.started_at += seconds

    def send(
        self,
        loss: Tensor,
        grad_norm: Tensor,
        lr_scale: float,
        visits: int,
        compilations: int,
        signal_number: int,
    ) -> None:
        """Counts a step and starts to read its numbers. All ranks must call it.

        loss: this rank's part; grad_norm: the same on all ranks (both fp32 scalars on the device).
        visits: the step's visits of layers. compilations and signal_number: this rank's so far.
        """
        state = self.state
        if state.step == 0:
            # Without the time of the first step the speed is not known, so that step is waited for.
            clock = self.ranks.now() - self.started_at
            covered_visits = visits
        else:
            # The previous step has been read by now. So this rank's clock is at the end of that
            # step, whose visits are the only ones that the known clock does not cover yet.
            clock = state.rank_s
            covered_visits = state.untimed_visits
        state.untimed_visits += visits
        state.step += 1

        world_size = self.ranks.world_size
        # Filled on the device, as in Optimizers.step.
        facts = [clock / world_size, compilations, signal_number]
        filled = [grad_norm.new_full((), fact) for fact in facts]
        numbers = self.ranks.sum(torch.stack([loss, grad_norm / world_size, *filled]))
        self.unread = SentStep(covered_visits, lr_scale, PendingRead(numbers, self.ranks))

    def read(self) -> StepNumbers | None:
        """Waits for the last step's numbers and sets the clocks; None if already read."""
        if self.unread is None:
            return None
        covered_visits, lr_scale, pending = self.unread
        self.unread = None
        (loss, grad_norm, clock, compilations, signals), now = pending.wait()

        state = self.state
        before_s = state.rank_s
        state.loss = loss
        state.rank_s = now - self.started_at
        if covered_visits:
            visit_s = (clock - state.elapsed_s) / covered_visits
            state.longest_visit_s = max(state.longest_visit_s * 0.98, visit_s)
            state.elapsed_s = clock
            state.timed_visits += covered_visits
            state.untimed_visits -= covered_visits
        seconds = max(state.rank_s - before_s, 1e-9)
        return StepNumbers(state.step, loss, grad_norm, lr_scale, compilations, signals, seconds)


class AverageSchedule:
    """The share that the weights after each step get in the exported average (EXPORT_WEIGHTS).

    ema: 1 - EMA_DECAY^EMA_EVERY, every EMA_EVERY steps. swa: the same until lr_scale is below
    SWA_THRESHOLD; from there on the average is the plain mean of the weights after every
    SWA_EVERY-th step. raw: only the newest weights count.
    """

    def __init__(self, cfg: Config, state: TrainState):
        self.cfg = cfg
        self.state = state

    def newest_share(self, step: int, lr_scale: float) -> float:
        """The share in [0, 1] of the weights after step `step`, from 1. Call it once a step."""
        cfg = self.cfg
        if cfg.export_weights == "raw":
            return 1.0
        if cfg.export_weights == "swa" and lr_scale < cfg.swa_threshold:
            if step % cfg.swa_every:
                return 0.0
            self.state.swa_count += 1
            return 1 / self.state.swa_count
        if step % cfg.ema_every:
            return 0.0
        return 1 - cfg.ema_decay**cfg.ema_every


# The step after which a run says its speed.
SPEED_STEP = 22


class StepReporter:
    """Writes log lines, the live line and TensorBoard's curves, and checks the speed of steps."""

    def __init__(self, run: Run, state: TrainState, budget_s: float):
        self.cfg = run.cfg
        self.log = run.log
        self.state = state
        self.budget_s = budget_s  # seconds of training
        self.predicted_bytes = predict_submission_bytes(run.cfg)
        # FLOP/s of all devices by data sheet, where it is known.
        self.peak_flops = math.nan
        for device, flops in PEAK_FLOPS.items():
            if device in run.facts["device"]:
                self.peak_flops = flops * run.ranks.world_size

    def report(self, numbers: StepNumbers) -> None:
        """Reports one step. Raises RunStopped if POD_SPEEDGATE_MS is set and steps take longer."""
        state, step = self.state, numbers.step
        state.unlogged_loss += numbers.loss
        state.unlogged_steps += 1
        if step == 1:
            state.first_step_s = state.elapsed_s
            state.first_step_visits = state.timed_visits
        elif step == SPEED_STEP:
            self.judge_speed()

        every = self.cfg.train_log_every
        if step <= 3 or self.log.due() or (every and step % every == 0):
            self.log_step(numbers)
        tokens_per_s = self.cfg.train_batch_tokens / numbers.seconds
        self.log.scalars(
            step,
            {"train_loss": numbers.loss, "lr_scale": numbers.lr_scale, "tok/s": tokens_per_s},
        )
        if self.log.live:
            self.show_live_line(numbers, tokens_per_s)

    def judge_speed(self) -> None:
        """Predicts the steps that the budget allows. Raises RunStopped beyond POD_SPEEDGATE_MS."""
        cfg, state = self.cfg, self.state
        # The clock covers all steps but this one, and the first is not representative.
        seconds = state.elapsed_s - state.first_step_s
        visits = state.timed_visits - state.first_step_visits
        budget_visits = self.budget_s * visits / seconds

        plain, looped = map(len, cfg.plans)
        plain_share = cfg.enable_looping_at
        steps = budget_visits * (plain_share / plain + (1 - plain_share) / looped)
        steps = min(cfg.iterations, steps)
        state.expected_steps = steps
        step_ms = 1000 * seconds / (SPEED_STEP - 2)
        self.log(f"speed: {step_ms:.1f}ms per step; the budget allows about {steps:.0f} steps")
        if 0 < cfg.pod_speedgate_ms < step_ms:
            raise RunStopped(
                f"POD_SPEEDGATE_MS={cfg.pod_speedgate_ms:g}: a step takes {step_ms:.1f} ms"
            )

    def log_step(self, numbers: StepNumbers) -> None:
        """Writes a step's line; its train_loss and tok/s are means since the previous line."""
        state = self.state
        seconds = max(state.rank_s - state.logged_s, 1e-9)
        tokens_per_s = (state.tokens - state.logged_tokens) / seconds
        state.logged_s = state.rank_s
        state.logged_tokens = state.tokens
        loss = state.unlogged_loss / state.unlogged_steps
        state.unlogged_loss = 0.0
        state.unlogged_steps = 0
        time_ms = 1000 * state.rank_s
        self.log(
            f"step:{numbers.step}/{self.cfg.iterations} train_loss:{loss:.4f} "
            f"train_time:{time_ms:.0f}ms step_avg:{time_ms / numbers.step:.2f}ms "
            f"tok/s:{tokens_per_s:.0f} lr_scale:{numbers.lr_scale:.3f}",
            terminal=not self.log.live,
        )

    def show_live_line(self, numbers: StepNumbers, tokens_per_s: float) -> None:
        """Rewrites the terminal's live line, at most ten times a second."""
        state, step = self.state, numbers.step
        iterations_s = (self.cfg.iterations - step) * state.rank_s / step
        left_s = min(self.budget_s - state.rank_s, iterations_s)
        # Without a budget the number of steps is known.
        steps = f"step {step}, measuring speed"
        if step >= SPEED_STEP or self.budget_s == math.inf:
            steps = f"step {step} of about {state.expected_steps:.0f}"
        # A narrow terminal cuts the line, so what matters most comes first.
        parts = [
            f"train: loss {numbers.loss:.4f}",
            f"{left_s:.0f} s left",
            steps,
            f"{1000 * numbers.seconds:.0f} ms/step",
            f"{tokens_per_s:.0f} tok/s",
        ]
        if not math.isnan(self.peak_flops):
            flops = flops_per_token(self.cfg, state.looped) * tokens_per_s
            parts.append(f"MFU {100 * flops / self.peak_flops:.0f} %")
        parts.append(f"about {self.predicted_bytes:.0f} bytes")
        self.log.show(", ".join(parts), min_interval_s=0.1)


def restore_training(run: Run) -> TrainState:
    """A new state, or that of the run's checkpoint.

    With a checkpoint, weights, optimisers and PyTorch's random state are restored, too.
    """
    saved = run.start.training
    if saved is None:
        # Before the first step weights and average are equal, so any share would do.
        return TrainState(newest_share=1.0, expected_steps=run.cfg.iterations)
    state = TrainState(**saved["state"])
    run.optimizers.load_state_dict(saved["optimizers"])
    torch.set_rng_state(saved["random"])
    return state


class Trainer:
    """Acts between steps: on a step's numbers, on signals, on validations and checkpoints due.

    `train` is the loop over the steps.
    """

    def __init__(self, run: Run, budget_s: float):
        self.run = run
        self.cfg = run.cfg
        self.state = restore_training(run)
        self.pacer = Pacer(self.state, run.ranks, budget_s, run.cfg.iterations)
        self.reporter = StepReporter(run, self.state, budget_s)
        # The signal that this rank has received, and whether the ranks have agreed to stop.
        self.signal_number = 0
        self.must_stop = False
        # Negative: the phase's time grows by the training before the run was resumed.
        run.excluded_seconds -= self.state.rank_s

    def note_signal(self, number: int, frame: Any) -> None:
        """Remembers a signal until the step is over."""
        self.signal_number = number

    def read_step(self) -> None:
        """Waits for the last step's numbers, if they have not been read, and acts on them.

        Raises FloatingPointError if they are not finite, after saving the average of the earlier
        steps, and RunStopped if RECOMPILE_LIMIT or POD_SPEEDGATE_MS is exceeded.
        """
        numbers = self.pacer.read()
        if numbers is None:
            return
        self.must_stop = numbers.signals > 0
        if not math.isfinite(numbers.loss + numbers.grad_norm):
            average = self.run.optimizers.averages()
            self.run.save_weights("last_good.pt", average, numbers.step - 1, self.state.looped)
            raise FloatingPointError(
                f"loss {numbers.loss}, gradient norm {numbers.grad_norm} in step {numbers.step}; "
                "last_good.pt holds the average before that step"
            )
        self.run.check_recompilations(numbers.compilations)
        self.reporter.report(numbers)

    @contextlib.contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Takes the time of its body off the clock and off the phase of training."""
        self.read_step()
        run = self.run
        # A phase in the body, as in `validate`, adds its own seconds; they must not count twice.
        excluded = run.excluded_seconds
        start = run.ranks.now()
        yield
        seconds = run.ranks.now() - start
        self.pacer.exclude(seconds)
        run.excluded_seconds = excluded + seconds

    def validate(self, plan: tuple[Visit, ...]) -> None:
        """Scores the validation documents with the weights as they are, off the clock."""
        run, step = self.run, self.state.step
        with self.off_the_clock(), run.phase("validate", budget="none"):
            result = run.evaluate(plan=plan).result()
        loss, bpb = result["val_loss"], result["val_bpb"]
        run.log(f"{step}/{self.cfg.iterations} val_loss: {loss:.4f} val_bpb: {bpb:.4f}")
        run.log.scalars(step, {"val_bpb": bpb})

    def rounds_weights(self, lr_scale: float) -> bool:
        """Whether the next step rounds its weights (LATE_QAT); remembers and logs the beginning."""
        state = self.state
        if self.cfg.late_qat and lr_scale < self.cfg.late_qat_threshold and not state.rounded:
            self.run.log(f"late_qat:enabled step:{state.step} lr_scale:{lr_scale:.3f}")
            state.rounded = True
        return state.rounded

    def longest_segment(self, frac: float) -> int:
        """The longest segment of the next step by SEQ_LEN_SCHEDULE; remembers and logs a change."""
        state = self.state
        longest = self.cfg.longest_segment(frac)
        if longest != state.longest_segment:
            if self.cfg.seq_len_schedule:
                self.run.log(f"seq_len:{longest} step:{state.step} frac:{frac:.3f}")
            state.longest_segment = longest
            state.length_changed_at = state.step
        return longest

    def pause(self) -> None:
        """Saves a checkpoint when one is due, and ends the run after a signal.

        With CHECKPOINT_EVERY, a checkpoint is also saved at that end. Raises KeyboardInterrupt to
        end the run. All ranks must call it.
        """
        every = self.cfg.checkpoint_every
        if every:
            since_last_s = self.state.elapsed_s - self.state.checkpoint_s
            if self.must_stop or since_last_s >= every:
                self.save_checkpoint()
        if self.must_stop:
            after = f" after step {self.state.step}"
            if every:
                after += "; the same command goes on"
            else:
                after += "; nothing is kept without CHECKPOINT_EVERY"
            raise_stopped(self.signal_number or signal.SIGTERM, after=after)

    def save_checkpoint(self) -> None:
        """Saves a checkpoint, off the clock."""
        run, state = self.run, self.state
        with self.off_the_clock():
            state.checkpoint_s = state.elapsed_s
            training = {
                "state": dataclasses.asdict(state),
                "optimizers": run.optimizers.state_dict(),
                "random": torch.get_rng_state(),
            }
            run.save_checkpoint(Stage.NOTHING, training=training)

    def finish(self) -> None:
        """Leaves the exported weights in the model and in final_model.pt.

        A signal during the last step ends the run first.
        """
        run, cfg, state = self.run, self.cfg, self.state
        self.read_step()
        # Nothing else can use the memory of CUDA graphs.
        run.graphs = {}
        handle_signals(raise_stopped)
        if any(run.ranks.gather(self.signal_number)):
            self.must_stop = True
            self.pause()

        weights = run.optimizers.averages(newest_share=state.newest_share)
        run.log(
            f"stopping: step:{state.step}/{cfg.iterations} train_time:{1000 * state.rank_s:.0f}ms; "
            f"{cfg.export_weights}:applying {cfg.export_weights.upper()} weights"
        )
        run.model.load_state_dict(weights)
        run.final["steps"] = state.step
        run.final["train_loss"] = state.loss
        run.final["train_tokens"] = state.tokens
        run.save_weights("final_model.pt", weights, state.step, state.looped)


def train(run: Run, reserve: float) -> bool:
    """Trains until the budget less `reserve` seconds is spent, or for ITERATIONS steps.

    No step begins that is expected to end after the budget. Schedules follow the spent share of the
    budget, or of ITERATIONS. Leaves the weights that EXPORT_WEIGHTS names in the model. Returns
    whether the layers were looped in the last step, because scoring must use the depth that was
    trained. Raises as `read_step` and `pause` of the Trainer. All ranks must call it.
    """
    cfg, model, optimizers = run.cfg, run.model, run.optimizers
    trainer = Trainer(run, cfg.wallclock - reserve)
    state, pacer = trainer.state, trainer.pacer
    average = AverageSchedule(cfg, state)
    loader = PackedLoader(run.streams["train"], run.tokenizer.bos_id, cfg, run.ranks)
    loader.cursor = state.tokens
    steps = loader.steps()
    handle_signals(trainer.note_signal)

    while state.step < cfg.iterations:
        frac, step = pacer.frac(), state.step
        loops_begin = cfg.num_loops > 0 and not state.looped and frac >= cfg.enable_looping_at
        plan = cfg.plans[state.looped or loops_begin]
        if not pacer.fits(len(plan)):
            break
        if loops_begin:
            order = [visit.layer for visit in plan]
            run.log(f"layer_loop:enabled step:{step} frac:{frac:.3f} order:{order}")
        loader.longest = trainer.longest_segment(frac)
        rows, num_targets = next(steps)
        lr_scale = lr_scale_at(frac, cfg, step)
        model.set_rounding(trainer.rounds_weights(lr_scale))
        loss = accumulate_gradients(run.forward, plan, rows, num_targets, run.graphs)
        model.set_rounding(False)

        # The device is busy with this step, so reading the previous step costs no time.
        trainer.read_step()
        # Not earlier: read_step may save the previous step as last_good.pt.
        state.looped = state.looped or loops_begin
        # SWA and LATE_QAT follow the schedule alone, without the ramp.
        rate = lr_scale * ramp_after_change(step, state.length_changed_at)
        grad_norm = optimizers.step(rate, muon_momentum(step, cfg), state.newest_share)
        state.newest_share = average.newest_share(step + 1, lr_scale)
        state.tokens += num_targets
        compilations = run.compilation_counter.poll()
        pacer.send(loss, grad_norm, rate, len(plan), compilations, trainer.signal_number)
        if state.step == 1:
            trainer.read_step()
        if cfg.val_loss_every and state.step % cfg.val_loss_every == 0:
            trainer.validate(plan)
        trainer.pause()

    steps.close()
    trainer.finish()
    return state.looped


# === 8. Scoring: nats and bytes of every validation token, once ===
class ByteTable(NamedTuple):
    """Bytes of text behind each token. A piece's leading space counts, except after a boundary."""

    base: np.ndarray  # (V,) int64: UTF-8 length of the text without one leading space
    space: np.ndarray  # (V,) bool: the piece begins with the space mark
    # (V,) bool: a control, unknown or unused piece, after which text starts anew
    boundary: np.ndarray

    @classmethod
    def from_sentencepiece(cls, model: Any) -> ByteTable:
        """Builds the table of a SentencePieceProcessor."""
        base = []
        space = []
        boundary = []
        for i in range(model.vocab_size()):
            is_boundary = model.is_control(i) or model.is_unknown(i) or model.is_unused(i)
            if is_boundary:
                piece = ""
            elif model.is_byte(i):
                piece = "?"  # any text of one byte
            else:
                piece = model.id_to_piece(i)
            text = piece.removeprefix("\u2581").replace("\u2581", " ")
            base.append(len(text.encode()))
            space.append(piece.startswith("\u2581"))
            boundary.append(is_boundary)
        return cls(np.array(base), np.array(space), np.array(boundary))

    def bytes_of(self, before: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Bytes (n,) int64 of targets (n,), each of which follows the token `before` (n,)."""
        return self.base[targets] + (self.space[targets] & ~self.boundary[before])

    def to(self, device: torch.device) -> ByteTable:
        """The same table in tensors on a device, for `bytes_of` of tensors."""
        return ByteTable(*(torch.from_numpy(x).to(device) for x in self))

    def count(self, tokens: np.ndarray) -> int:
        """Bytes of all targets tokens[1:] of a stream (n,)."""
        return int(self.bytes_of(tokens[:-1], tokens[1:]).sum())


def check_bytes(
    tokenizer: Tokenizer, docs: Documents, ranks: Ranks
) -> tuple[ByteTable | None, int]:
    """Compares the table's bytes with the decoded text, for this rank's share of the documents.

    Returns the table, and the decoded bytes of this share. Raises UsageError if a document differs,
    or if all of them differ from the manifest. Documents with a side-car get no table, so that no
    score can mix both; their bytes are then the side-car's, which `check_sidecar` has checked.
    """
    own_spans = list(docs.spans())[ranks.rank :: ranks.world_size]
    if docs.bytes is not None:
        return None, sum(int(docs.bytes[start + 1 : end + 1].sum()) for start, end in own_spans)
    table = ByteTable.from_sentencepiece(tokenizer.model)
    decoded = 0
    for start, end in own_spans:
        # The last target is the next document's BOS, which has no text, except at the very end.
        if end == len(docs.tokens) - 1:
            end += 1
        ids = docs.tokens[start:end]
        num_bytes = len(tokenizer.model.decode(ids[1:].tolist()).encode())
        counted = table.count(ids)
        if counted != num_bytes:
            raise UsageError(
                f"{tokenizer.path}: counts {counted} bytes, not {num_bytes}, "
                f"for the document at {start}"
            )
        decoded += num_bytes

    manifest = tokenizer.manifest.get("splits", {}).get("val", {})
    if manifest.get("tokens") == len(docs.tokens):
        counted = table.count(docs.tokens)
        promised = manifest.get("bytes")
        if promised not in (None, counted):
            raise UsageError(
                f"{tokenizer.path}: counts {counted} validation bytes, the manifest {promised}"
            )
    return table, decoded


class DatasetTotals(NamedTuple):
    """The size of a validation set; 0 where a number is not known."""

    documents: int
    tokens: int
    bytes: int


# The challenge's validation sets. Other numbers mean other data, or that its end is lost.
CANONICAL = {
    "fineweb10B_sp8192": DatasetTotals(50_000, 40_540_803, 151_080_891),
    "fineweb10B_sp4096": DatasetTotals(50_000, 0, 151_080_891),
    "fineweb10B_sp1024": DatasetTotals(50_000, 0, 151_080_891),
    # Bytes of the side-car (PR #2014). Counting by table gives the same text 246 more.
    "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved": DatasetTotals(
        50_000, 47_853_344, 151_080_645
    ),
}


class InvalidScore(RuntimeError):
    """The ledger found a broken rule, so there is no score."""


# --- Token tilt -----------------------------------------------------------------------------------
#
# A target's hint is the token that most often followed the same TILT_ORDER - 1 tokens earlier in
# the stream, if its share of these continuations reaches TILT_THRESHOLD (PR #2135, its one legal
# channel). The score is that of the model's distribution q, tilted towards the hint h:
#
#     p(v) = q(v) e^(b [v = h]) / (1 + q(h) (e^b - 1)),    b = TILT_BETA (1 - q(h))^TILT_GAMMA
#
# It sums to 1, and learning never sees it. Hints are looked up in stream order, whichever document
# is scored first. So the conditional of a target is a function of the artifact and of the targets
# before it in the stream. Documents are not independent then.
TARGETS_AT_ONCE = 2**22  # a dozen tensors of so many int64 are in memory at a time
KEYS_AT_ONCE = 2**15  # stay in the cache of a core, and are too few to wait for other threads
MIX_FACTORS = (-7046029254386353131, -4658895280553007687)  # odd: of splitmix64's finaliser


def mix_bits(keys: Tensor, factor: int) -> Tensor:
    """A bijection of int64: multiply, then fold the upper half into the lower."""
    keys = keys * factor
    return keys ^ ((keys >> 32) & 0xFFFFFFFF)


def context_keys(tokens: Tensor, count: int) -> Tensor:
    """A 64-bit key of the `count` tokens before each token from number `count` on: (n - count,).

    Equal contexts have equal keys. Two different ones share a key with probability about 2^-64,
    and some pair of 50 million does with 1 in 15,000. Then both count as one context: the hint may
    be worse, and is a function of earlier tokens all the same.
    """
    keys = tokens.new_empty(max(len(tokens) - count, 0), dtype=torch.int64)
    for start in range(0, len(keys), KEYS_AT_ONCE):
        piece = keys[start : start + KEYS_AT_ONCE].zero_()
        for i in range(start, start + count):
            piece.add_(tokens[i : i + len(piece)] + 1)
            piece.copy_(mix_bits(piece, MIX_FACTORS[0]))
        piece.copy_(mix_bits(piece, MIX_FACTORS[1]))
    return keys


def starts_of_runs(values: Tensor) -> Tensor:
    """Where a value differs from the one before it: (n,) bool, true at first."""
    is_start = torch.ones_like(values, dtype=torch.bool)
    is_start[1:] = values[1:] != values[:-1]
    return is_start


def rank_in_run(is_start: Tensor) -> Tensor:
    """The index of each element in its run (n,) int64; runs begin where `is_start` (n,)."""
    index = torch.arange(len(is_start), device=is_start.device)
    return index - torch.where(is_start, index, 0).cummax(0).values


def repeated_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts the keys (n,) that occur more than once, stably.

    Returns their order (m,), and for each the number of its group of equal keys (m,), rising.
    """
    keys, order = keys.sort(stable=True)
    is_start = starts_of_runs(keys)
    is_single = is_start & torch.cat([is_start[1:], is_start[:1]])
    group = is_start.cumsum(0)
    return order[~is_single], group[~is_single]


def top_continuations(keys: Tensor, tokens: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The hints of the targets `tokens` (n,), whose contexts have the keys (n,) int64.

    Returns the numbers of the targets that have one (m,), and for each the number of the earlier
    target that it repeats (m,). A context's top token changes where another's count becomes
    strictly greater. Counts and ranks are those before the target itself is counted.
    """
    order, group = repeated_keys(keys)
    if not len(order):
        return order, order
    rank = rank_in_run(starts_of_runs(group))

    # How often a token has followed its context, itself included.
    pair, by_pair = (group * 2**17 + tokens[order]).sort(stable=True)
    count = torch.empty_like(rank)
    count[by_pair] = 1 + rank_in_run(starts_of_runs(pair))

    # The largest count so far in the group. Every group begins above all of the one before it.
    base = group * 2**31
    largest = (base + count).cummax(0).values
    rises = starts_of_runs(largest)
    index = torch.arange(len(rank), device=rank.device)
    top = torch.where(rises, index, 0).cummax(0).values

    # A target sees the state that the target before it in the group has left.
    share = (largest - base)[:-1].double() / rank[1:].double()
    hinted = ((rank[1:] > 0) & (share >= threshold)).nonzero().squeeze(1)
    return order[hinted + 1], order[top[hinted]]


def hint_sources(tokens: Tensor, order: int, threshold: float) -> Tensor:
    """For each target, the number of the earlier target that its hint repeats; -1: no hint.

    tokens: the targets of a stream in order, (n,) int32. Returns (n,) int32. Contexts are taken in
    parts, chosen by their keys, so that memory is bounded unless one context prevails. Only
    integers are sorted, so every rank and device finds the same.
    """
    sources = torch.full_like(tokens, -1)
    keys = context_keys(tokens, order - 1)
    num_parts = min(len(keys) // TARGETS_AT_ONCE + 1, 255)
    part_of_key = (((keys >> 32 & 0xFFFF) * num_parts) >> 16).to(torch.uint8)
    for part in range(num_parts):
        places = (part_of_key == part).nonzero().squeeze(1)
        targets = places + order - 1
        hinted, repeated = top_continuations(keys[places], tokens[targets], threshold)
        sources[targets[hinted]] = targets[repeated].int()
    return sources


def tilt_losses(
    hint_nats: Tensor, is_hit: Tensor, betas: tuple[float, ...], gamma: float
) -> Tensor:
    """What each beta adds to the nats of hinted targets: (n, betas) fp64.

    hint_nats: nats of the hints (n,). is_hit: whether the hint is the target (n,). In fp64, because
    the nats of a hint of probability 1 - 1e-6 would be lost in the rounding of beta.
    """
    q = (-hint_nats.double().clamp_min(0)).exp().unsqueeze(1)  # (n, 1)
    beta = torch.tensor(betas, dtype=torch.float64, device=q.device) * (1 - q) ** gamma
    return (q * beta.expm1()).log1p() - beta * is_hit.unsqueeze(1)


def mixed_loss(losses: Tensor) -> Tensor:
    """What a mixture of experts adds to the nats, (n,), where each adds `losses` (n, experts).

    Bayes' mixture, which is Hedge at rate 1: an expert's weight is e^-(its losses before). All
    together it is at most ln(experts) nats above the best one. With one expert it is that one.
    """
    if losses.size(1) == 1:
        return losses[:, 0]
    evidence = F.pad(-losses.cumsum(0), (0, 0, 1, 0)).logsumexp(1)  # before and after each target
    return evidence[:-1] - evidence[1:]


class Tilt:
    """The hints of a stream's targets, and what they make of the model's nats.

    A hint is held as the stream index of the target that it repeats, so the token is read from the
    stream. All ranks find the same hints, each by itself and within the evaluation's time.
    """

    def __init__(self, docs: Documents, tokens: Tensor, cfg: Config):
        """Looks up all hints. tokens: those of the documents on the device, (N,) int32."""
        self.cfg = cfg
        self.tokens = tokens
        index = torch.from_numpy(docs.target_indices()).to(tokens.device)
        sources = hint_sources(tokens[index + 1], cfg.tilt_order, cfg.tilt_threshold)
        is_hinted = sources >= 0
        # Stream indices of the hinted targets and of those that they repeat, (H,) int64.
        self.index = index[is_hinted]
        self.sources = index[sources[is_hinted].long()]
        self.hints = torch.full_like(tokens, -1)  # (N,) int32
        self.hints[self.index] = tokens[self.sources + 1]
        # Nats of the hints, as first scored, (N,) fp32; after `join`, the gain of each (H,) fp32.
        self.nats = torch.zeros(len(tokens), device=tokens.device)
        self.gains = torch.zeros_like(self.nats[:0])
        self.is_shared = True

    def join(self, nats: Tensor, ranks: Ranks) -> Tensor:
        """The scores (N,) of all targets from the model's joined nats (N,). Collective.

        Also compares the hints of all ranks.
        """
        ranks.sum(self.nats)
        factors = 1 + 2 * torch.arange(len(self.index), device=nats.device)
        checksum = int((factors * (self.index * len(nats) + self.sources)).sum())
        self.is_shared = len(set(ranks.gather((len(self.index), checksum)))) == 1

        cfg = self.cfg
        is_hit = self.hints[self.index] == self.tokens[self.index + 1]
        losses = tilt_losses(self.nats[self.index], is_hit, cfg.tilt_betas, cfg.tilt_gamma)
        change = mixed_loss(losses)
        self.gains = -change.float()
        tilted = nats[self.index] + change
        return nats.index_copy(0, self.index, tilted.float())

    def problems(self) -> list[str]:
        """The rules that the hints break, in words; complete after `join`."""
        problems = []
        if late := int((self.sources >= self.index).sum()):
            problems.append(f"{late} hints do not come from earlier targets")
        if not self.is_shared:
            problems.append("ranks have different hints")
        return problems


class Ledger:
    """The score of every target of the validation stream, and the only source of val_loss, val_bpb.

    A target is named by its stream index, as in Documents. The ledger holds its nats as first
    scored and how often it was scored. An update of adapters or weights must declare the targets
    that it reads before it reads them: a target may only be read after its score. The tensors are
    on the device, so no step waits for them. Each evaluation has a ledger of its own; each rank has
    a part of it until `join`. With the token tilt, `nats` holds the model's nats until then.
    """

    def __init__(
        self,
        docs: Documents,
        table: ByteTable | None,
        device: torch.device,
        cfg: Config | None = None,
    ):
        """An empty ledger. The bytes are those of `docs`, or else the table's.

        cfg: decides about the token tilt; without it there is none.
        """
        self.docs = docs
        self.padding_index = len(docs.tokens) - 1  # receives the scores of padding
        self.tokens = torch.from_numpy(docs.tokens.astype(np.int32)).to(device)  # (N,)
        if docs.bytes is None:
            num_bytes = table.to(device).bytes_of(self.tokens[:-1], self.tokens[1:])
        else:
            num_bytes = torch.from_numpy(docs.bytes[1:].astype(np.int64)).to(device)
        self.bytes = num_bytes  # (N - 1,) int64
        self.nats = torch.zeros(len(self.tokens), device=device)  # (N,) fp32
        self.times_scored = torch.zeros_like(self.tokens)  # (N,) int32
        # Targets that an update read before their score, () int64.
        self.num_read_early = torch.zeros((), dtype=torch.int64, device=device)
        # Documents, or chunks of the stream, that were not learnt from because of the deadline.
        self.num_not_learnt_from = 0
        # Those documents, all or the rest of which was scored without adaptation.
        self.num_not_adapted = 0
        self.tilt = Tilt(docs, self.tokens, cfg) if cfg and cfg.tilt_order else None

    def hints_of(self, index: Tensor, size: int) -> Tensor | None:
        """The hints of the targets `index` (n,), -1 where there is none, padded to (size,) int64.

        None without the token tilt.
        """
        if self.tilt is None:
            return None
        return F.pad(self.tilt.hints[index].long(), (0, size - len(index)), value=-1)

    def record(self, index: Tensor, nats: Tensor) -> None:
        """Records the scores of the targets `index` (n,) int64: nats (n,) fp32.

        With the token tilt nats are (2, n), of targets and hints. Scores are final. A second score
        changes nothing, but is counted.
        """
        is_new = self.times_scored[index] == 0
        if self.tilt is not None:
            nats, hint_nats = nats
            self.tilt.nats[index] = torch.where(is_new, hint_nats, self.tilt.nats[index])
        self.nats[index] = torch.where(is_new, nats, self.nats[index])
        self.times_scored.index_add_(0, index, torch.ones_like(index, dtype=torch.int32))

    def require_scored(self, index: Tensor, ranks: Ranks | None = None) -> None:
        """Declares that an update reads the targets `index` (n,) int64, and counts the unscored.

        With `ranks`, a target that any rank has scored counts as scored; all ranks must call it.
        """
        times = self.times_scored[index]
        if ranks:
            times = ranks.sum(times)
        self.num_read_early += ((times == 0) & (index != self.padding_index)).sum()

    def result(self) -> dict[str, float]:
        """Figures of the targets scored so far: nats per token, bits per byte, tokens, bytes."""
        scored = self.times_scored[:-1] > 0
        nats = self.nats[:-1].double().sum().item()
        tokens = int(scored.sum())
        num_bytes = int((self.bytes * scored).sum())
        loss = nats / max(tokens, 1)
        bpb = loss / math.log(2) * tokens / max(num_bytes, 1)
        return {"val_loss": loss, "val_bpb": bpb, "tokens": tokens, "bytes": num_bytes}

    def join(self, ranks: Ranks) -> Ledger:
        """Adds up the ledgers of all ranks, in each of them. All ranks must call it.

        A target that two ranks scored counts as scored twice.
        """
        self.num_not_learnt_from = sum(ranks.gather(self.num_not_learnt_from))
        self.num_not_adapted = sum(ranks.gather(self.num_not_adapted))
        for t in (self.nats, self.times_scored, self.num_read_early):
            ranks.sum(t)
        if self.tilt is not None:
            self.nats = self.tilt.join(self.nats, ranks)
        return self

    def by_document(self) -> dict[str, np.ndarray]:
        """Nats, bytes and targets of every document, (docs,) each.

        With the token tilt also the stream index of each hinted target, and the nats that its hint
        has saved, (hints,) each.
        """
        starts = self.docs.starts
        ends = starts + self.docs.counts

        def sum_documents(values: Tensor) -> np.ndarray:
            sums = np.append(0, values.cpu().double().numpy().cumsum())
            return sums[ends] - sums[starts]

        arrays = {
            "doc_nats": sum_documents(self.nats[:-1]),
            "doc_bytes": sum_documents(self.bytes),
            "doc_tokens": self.docs.counts,
            **self.by_position(),
        }
        if self.tilt is not None:
            arrays["tilt_index"] = self.tilt.index.cpu().numpy()
            arrays["tilt_gains"] = self.tilt.gains.cpu().numpy()
        return arrays

    def by_position(self) -> dict[str, np.ndarray]:
        """Nats and targets by position in the document, (bins,) each, and where each bin begins.

        Bins are about an eighth of an octave wide, and at least one position.
        """
        longest = max(int(self.docs.counts.max()), 1)
        octaves = longest.bit_length()
        edges = np.unique(np.rint(np.geomspace(1, longest + 1, 8 * octaves + 1)))[:-1] - 1
        edges = edges.astype(np.int64)
        index = self.docs.target_indices()
        position = index - np.repeat(self.docs.starts, self.docs.counts)
        nats = self.nats.cpu().double().numpy()[index]
        nats = np.bincount(position, weights=nats, minlength=longest)
        tokens = np.bincount(position, minlength=longest)
        return {
            "pos_edges": edges,
            "pos_nats": np.add.reduceat(nats, edges),
            "pos_tokens": np.add.reduceat(tokens, edges),
        }

    def problems(self, decoded_bytes: int) -> list[str]:
        """The rules that a joined ledger breaks, in words.

        decoded_bytes: bytes of the decoded text of all documents.
        """
        wanted = np.bincount(self.docs.target_indices(), minlength=self.padding_index)
        times = self.times_scored[:-1].cpu().numpy()
        counts = {
            "targets were never scored": (times < wanted).sum(),
            "targets were scored too often": (times > wanted).sum(),
            "targets were read by an update before their score": self.num_read_early.item(),
            "scores are not finite": (~self.nats[:-1].isfinite()).sum().item(),
        }
        problems = [f"{count} {broken_rule}" for broken_rule, count in counts.items() if count]
        counted_bytes = self.result()["bytes"]
        if counted_bytes != decoded_bytes:
            problems.append(
                f"{counted_bytes} bytes were counted, the documents hold {decoded_bytes}"
            )
        if self.tilt is not None:
            problems += self.tilt.problems()
        return problems


def commitment(documents: Mapping[str, np.ndarray]) -> str:
    """The hash that commits a run to the score of every document, as `Ledger.by_document` has it.

    A document's record is its number, nats, bytes and targets, little-endian u64, fp64, u64, u64.
    The commitment is the SHA-256 of all records' SHA-256, end to end in the order of the stream: so
    the score of a document can be shown without those of the others.
    """
    columns = [np.arange(len(documents["doc_nats"]))]
    columns += [documents[name] for name in ("doc_nats", "doc_bytes", "doc_tokens")]
    hashes = hashlib.sha256()
    for number, nats, num_bytes, targets in zip(*columns, strict=True):
        record = struct.pack("<QdQQ", int(number), nats, int(num_bytes), int(targets))
        hashes.update(hashlib.sha256(record).digest())
    return hashes.hexdigest()


# The inputs start .. end - 1 are read; the targets of first_scored .. end - 1 are scored.
Window = tuple[int, int, int]  # (start, first_scored, end)


def scoring_windows(num_targets: int, length: int, stride: int) -> list[Window]:
    """Windows over a text that score each of its targets once. Indices count from its start.

    Windows start at multiples of `stride`, wherever the text ends: if the last one were moved to
    end with the text, its scores would depend on where that is. With stride = length windows do not
    overlap (plain scoring); otherwise all but the first score only their last `stride` targets.
    """
    if num_targets <= 0:
        return []
    windows = []
    # Up to the first window that reaches the end.
    for start in range(0, max(num_targets - length, 0) + stride, stride):
        first_scored = start + length - stride if start else 0
        windows.append((start, first_scored, min(start + length, num_targets)))
    return windows


class Scorer(NamedTuple):
    """Scores windows of the validation stream without learning, for all evaluations."""

    forward: Callable
    plan: tuple[Visit, ...]
    ledger: Ledger
    cfg: Config
    ranks: Ranks
    log: Log

    def stream_windows(self, stride: int, first: int = 0) -> Iterator[Window]:
        """Windows over all texts, `stride` targets apart, that score the targets from `first` on.

        A text is a document with DATA_LOADER=documents, otherwise the stream. All indices are those
        of the stream. A stride of 0 stands for the length of a window, EVAL_SEQ_LEN.
        """
        docs = self.ledger.docs
        if self.cfg.data_loader == "documents":
            texts = zip(docs.starts, docs.counts, strict=True)
        else:
            # The padding index, behind the last target, is also the number of targets.
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
        """Scores windows of the stream and records the results in the ledger.

        With `shared` the ranks divide the rows between them, and all must call it.
        """
        rows = self.pack_windows(windows)
        if shared:
            rows = rows[self.ranks.rank :: self.ranks.world_size]
        for row in rows:
            self.score_row(row)
            self.show_progress("eval_progress", "score")

    def show_progress(self, label: str, live_label: str, at_most_s: float = math.inf) -> None:
        """Shows targets done of all, the time left (but at most `at_most_s`) and the score so far.

        Every rank is taken to have done as many as this one.
        """
        if not self.log.wants_progress():
            return
        result = self.ledger.result()
        total = int(self.ledger.docs.counts.sum())
        done = min(result["tokens"] * self.ranks.world_size, total)
        left_s = min(self.log.seconds_left(done / total), at_most_s)
        loss, bpb = result["val_loss"], result["val_bpb"]
        self.log.progress(
            f"{label}: targets:{done}/{total} left:{left_s:.0f}s"
            f" running_loss:{loss:.4f} running_bpb:{bpb:.4f}",
            f"{live_label}: bpb {bpb:.4f}, {left_s:.0f} s left, {done} of {total} targets",
        )

    def pack_windows(self, windows: Iterable[Window]) -> list[list[Window]]:
        """The windows of each row, in order. No score depends on the other windows of its row."""
        size, capacity, _ = self.cfg.val_row_shape
        rows = []
        used = math.inf  # tokens of the last row; at first there is none to add to
        for start, first_scored, end in windows:
            if used + end - start > size or len(rows[-1]) == capacity // 2:
                rows.append([])
                used = 0
            rows[-1].append((start, first_scored, end))
            used += end - start
        return rows

    def score_row(self, row: list[Window]) -> None:
        """Scores the windows of one row in one forward."""
        ledger, device = self.ledger, self.ledger.nats.device
        read = np.concatenate([np.arange(start, end) for start, _, end in row])
        scored = np.concatenate([np.arange(start, end) >= first for start, first, end in row])
        lengths = [end - start for start, _, end in row]
        starts = np.cumsum([0] + lengths[:-1])
        inputs = ledger.docs.tokens[read]
        targets = np.where(scored, ledger.docs.tokens[read + 1], -1)
        batch = pack_row(inputs, targets, starts, self.cfg.val_row_shape, device)
        index = to_device(np.where(scored, read, ledger.padding_index), device)
        batch = batch._replace(hints=ledger.hints_of(index, len(batch.inputs)))
        ledger.record(index, self.forward(batch, self.plan)[..., : len(index)])


def score_all(scorer: Scorer, stride: int) -> Ledger:
    """Scores every target once, in windows as in stream_windows. All ranks must call it."""
    scorer.score_windows(scorer.stream_windows(stride), shared=True)
    return scorer.ledger.join(scorer.ranks)


# === 9. Compression: Hessians -> steps -> GPTQ -> integers -> one file ============================
#
# A large matrix W (rows, cols) is stored as small integers q, called codes, and one fp16 step for
# each row; it is read back as q * step. In this section a step is always such a distance between
# neighbouring values, and a row is one of a matrix; rows of tokens are called training rows. All
# other parameters are stored as fp16. The sub-sections follow the data: which parameters become
# codes, what calibration says about them, how they are rounded and how finely, how the file meets
# a limit in bytes, and how the codes become a file.


# --- What becomes integers ------------------------------------------------------------------------
#
# Banks of matrices and embedding tables become codes, the rest stays fp16. Below, "bank" stands for
# both, a table being a bank of one matrix. Both lists follow from the parameter table and so from
# the config alone, which is why a file needs no names or shapes.


class Matrix(NamedTuple):
    """One matrix that becomes integers: a slice of a bank, or a table."""

    bank: str
    index: int  # along the bank's first axis
    site: str  # whose inputs it multiplies; the bank itself for a table that is only looked up
    layer: int  # 0 for a table

    @property
    def input_key(self) -> tuple[str, int]:
        """Names the inputs, and so their Hessian. Queries, keys and values of a layer share one."""
        return self.site, self.layer


def quantised_matrices(cfg: Config) -> list[Matrix]:
    """All matrices that become integers, in the order of the artifact: banks before tables."""
    slices = []
    tables = []
    for name, role in parameter_table(cfg).items():
        if role.packing == "float":
            continue
        if role.is_table:
            tables.append(Matrix(name, 0, role.sites[0], 0))
            continue
        for half, site in enumerate(role.sites):
            for layer in range(cfg.num_layers):
                slices.append(Matrix(name, half * cfg.num_layers + layer, site, layer))
    return slices + tables


def matrices_of(cfg: Config, bank: str) -> list[Matrix]:
    """The matrices of one bank, in the order of its first axis."""
    return [matrix for matrix in quantised_matrices(cfg) if matrix.bank == bank]


def is_table(cfg: Config, bank: str) -> bool:
    """Whether this bank is an embedding table."""
    return parameter_table(cfg)[bank].is_table


def bank_shapes(cfg: Config) -> dict[str, tuple[int, int, int]]:
    """(n, rows, cols) of every bank of integers, in the order of the artifact."""
    return {
        name: (math.prod(role.shape[:-2]), *role.shape[-2:])
        for name, role in parameter_table(cfg).items()
        if role.packing != "float"
    }


def column_shapes(cfg: Config) -> dict[tuple[str, int], tuple[int]]:
    """(cols,) of every Matrix.input_key, in the order of the artifact."""
    shapes = bank_shapes(cfg)
    return {matrix.input_key: shapes[matrix.bank][2:] for matrix in quantised_matrices(cfg)}


def float_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters stored as fp16, without the leading rows that nothing reads."""
    return {
        name: (role.shape[0] - role.unread, *role.shape[1:])
        for name, role in parameter_table(cfg).items()
        if role.packing == "float"
    }


# --- Calibration: which errors the loss notices ---------------------------------------------------
#
# Rounding W to W + E changes an output by E x. The Hessian H, the mean of x x^T over the inputs x,
# turns this into a number: the change of output r, which row r of W computes, has the mean square
# e_r H e_r^T. The sensitivity of output r says how much the loss suffers from such a change. Both
# are measured on a few training rows, packed and attended to as in training: the published script
# calibrated on windows that cross documents, with dense attention over unrelated text.

Hessians = dict[tuple[str, int], Tensor]  # by Matrix.input_key, (in, in) fp32
Sensitivities = dict[str, Tensor]  # by bank, (n, rows) fp32


@torch.no_grad()
def collect_hessians(
    model: GPT, plan: tuple[Visit, ...], rows: Iterable[Batch], ranks: Ranks
) -> Hessians:
    """H of each site and layer: the mean of x x^T per token, summed over visits, over all rows.

    A layer that is visited three times has three inputs x per token. The scale of an H is free: it
    cancels in the cost of a row, its sensitivity times the mean of L_jj^2, and damping is relative.

    A table that is only looked up has no inputs and gets the identity. All ranks must call it, each
    with its own training rows; all get the same means.
    """
    sums = {}
    lookups = {}
    for matrix in quantised_matrices(model.cfg):
        size = model.get_parameter(matrix.bank).size(-1)
        if matrix.site == matrix.bank:
            lookups[matrix.input_key] = torch.eye(size, device=ranks.device)
        elif matrix.input_key not in sums:
            sums[matrix.input_key] = torch.zeros(size, size, device=ranks.device)

    def tap(site: str, layer: int, x: Tensor) -> None:
        if (site, layer) in sums:
            sums[site, layer].addmm_(x.mT.float(), x.float())

    # The forward is needed up to the head's inputs, so one target is enough.
    select = torch.zeros(1, dtype=torch.long, device=ranks.device)
    num_rows = torch.zeros((), device=ranks.device)
    for row in rows:
        model(row, plan, tap=tap, select=select)
        num_rows += 1

    count = ranks.sum(num_rows) * model.cfg.micro_batch_tokens
    means = {key: ranks.sum(total) / count for key, total in sums.items()}
    return means | lookups


def collect_sensitivities(
    forward: Callable,
    model: GPT,
    plan: tuple[Visit, ...],
    rows: Iterable[Batch],
    hessians: Hessians,
    ranks: Ranks,
) -> Sensitivities:
    """Cost in nats of a squared error of each output (a row of W), up to a common factor.

    It is the mean square of the loss's gradient g_r by output r. The gradient by W_r, the row's
    weights, is the sum of g_r x over tokens. So its square, divided by the mean of |x|^2, which is
    the trace of H, stands for the mean square of g_r:

        sensitivity[r] = sum over training rows of |dL / dW_r|^2 / trace(H)

    The tied table's gradient holds both its roles, head and lookup. So its Hessian is replaced, in
    place in `hessians`, by the covariance of the directions of that gradient, scaled to the same
    trace. All ranks must call it; all get the same numbers.
    """
    squares = {
        bank: torch.zeros(shape[:2], device=ranks.device)
        for bank, shape in bank_shapes(model.cfg).items()
    }
    head_inputs = ("head_in", 0)
    # False if the table is stored as fp16.
    has_head_codes = head_inputs in hessians
    both_roles = torch.zeros(model.cfg.model_dim, model.cfg.model_dim, device=ranks.device)
    for row in rows:
        forward(row, plan).sum().backward()
        with torch.no_grad():
            for bank, total in squares.items():
                total += model.get_parameter(bank).grad.square().sum(-1).view_as(total)
            if has_head_codes:
                directions = F.normalize(model.tok_emb.grad, dim=-1)
                both_roles.addmm_(directions.mT, directions)
        model.zero_grad(set_to_none=True)

    if has_head_codes:
        both_roles = ranks.sum(both_roles)
        scale = hessians[head_inputs].trace() / both_roles.trace().clamp_min(1e-30)
        hessians[head_inputs] = both_roles * scale

    sensitivities = {}
    for bank, total in squares.items():
        traces = [hessians[matrix.input_key].trace() for matrix in matrices_of(model.cfg, bank)]
        sensitivity = ranks.sum(total) / torch.stack(traces).clamp_min(1e-30)[:, None]
        if is_table(model.cfg, bank):
            # A token may be absent from these rows and still occur in the test, so every token gets
            # a share of the typical sensitivity. The mean of the roots is typical, because the few
            # frequent tokens hardly move it. The 0.25 was set by hand, without a measurement.
            sensitivity += 0.25 * sensitivity.sqrt().mean().square()
        sensitivities[bank] = sensitivity
    return sensitivities


# --- Pruning --------------------------------------------------------------------------------------


def prune(model: GPT) -> None:
    """Sets the smallest PRUNE_FRAC of all weights of banks and tables to 0, in place.

    The system of PR #568 does so before it rounds, which shortens the file.
    """
    weights = []
    for name, role in parameter_table(model.cfg).items():
        if role.group == "muon" or role.is_table:
            weights.append(model.get_parameter(name).detach())
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    k = 1 + int(model.cfg.prune_frac * (len(magnitudes) - 1))
    threshold = magnitudes.kthvalue(k).values
    for weight in weights:
        weight[weight.abs() < threshold] = 0


# --- GPTQ solver ----------------------------------------------------------------------------------
#
# GPTQ (Frantar et al. 2022) rounds a matrix column by column and lets the columns that are still
# free make up for the error of those already rounded. The published form needs the inverse of the
# Hessian, this one does not. With H = L L^T, L lower triangular, a row's error e = w - q step costs
#
#     e H e^T = |e L|^2 = sum over columns j of (sum over k >= j of e_k L_kj)^2
#
# and the term of column j holds no error of a column before j. So columns are rounded from the last
# to the first, and each q_j makes the term of its column as small as possible: q_j step is
# w_j + sum over k > j of e_k L_kj / L_jj, rounded (QuIP, arXiv 2307.13304, theorem 6).

GPTQ_BLOCK_COLUMNS = 32  # the errors of a block reach the columns before it in one product


def damped_cholesky(hessian: Tensor) -> Tensor:
    """L (cols, cols), lower triangular, with L L^T = the Hessian plus damping on its diagonal.

    The damping is 1 % of the diagonal's mean. It grows tenfold, up to five times, until there is a
    factor. Raises BadMatrix if there is none even then.
    """
    diagonal = hessian.diagonal()
    damped = hessian.clone()
    for num_increases in range(6):
        damped.diagonal().copy_(diagonal + 0.01 * 10**num_increases * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and lower.diagonal().isfinite().all():
            return lower
    raise BadMatrix("GPTQ: a Hessian has no Cholesky factor")


class InputFactor(NamedTuple):
    """The Hessian of a matrix's inputs, sorted and factored; all in the order of the solver."""

    order: Tensor  # (cols,), the input that each column belongs to
    dead: Tensor  # bool (cols,), whether that input was never active
    lower: Tensor  # L (cols, cols)

    @classmethod
    def of(cls, hessian: Tensor) -> InputFactor:
        """Sorts by rising diagonal, damps and factors a Hessian (cols, cols). Raises BadMatrix.

        Inputs that were never active get a typical diagonal, so that they neither spoil the factor
        nor change the damping of the others.
        """
        # Sorted as the published script does, then reversed, which decides the order of ties.
        order = hessian.diagonal().argsort(descending=True).flip(0)
        h = hessian.index_select(0, order).index_select(1, order)
        dead = h.diagonal() <= 0
        typical = h.diagonal().sum() / (~dead).sum().clamp_min(1)
        h.diagonal().add_(typical.clamp_min(1e-12) * dead)
        return cls(order, dead, damped_cholesky(h))


class GptqSolver(NamedTuple):
    """Rounds n matrices of one shape (rows, cols) at once. `solve` may be called for many steps.

    Columns are sorted by rising diagonal of the Hessian. As the last is rounded first, the inputs
    of the largest mean square are rounded first ("act-order"). All tensors have the columns on the
    second axis, so that a column is contiguous.
    """

    weight: Tensor  # (n, cols, rows) fp32
    order: Tensor  # (n, cols), the input that each column belongs to
    upper: Tensor  # L^T (n, cols, cols); a step s costs s^2 / 12 * L_jj^2 in column j

    @classmethod
    def prepare(cls, weight: Tensor, hessians: Iterable[Tensor]) -> GptqSolver:
        """Sorts the columns of weights (n, rows, cols); factors their n Hessians (cols, cols).

        Inputs that were never active get columns of zeros. Raises BadMatrix.
        """
        n, rows, cols = weight.shape
        ordered = weight.new_empty(n, cols, rows, dtype=torch.float32)
        upper = weight.new_empty(n, cols, cols, dtype=torch.float32)
        orders = []
        # One by one: this takes memory for a copy of one Hessian, not of all.
        for i, hessian in enumerate(hessians):
            factor = InputFactor.of(hessian)
            in_order = weight[i].index_select(1, factor.order)
            ordered[i] = in_order.masked_fill(factor.dead, 0).mT
            upper[i] = factor.lower.mT
            orders.append(factor.order)
        return cls(ordered, torch.stack(orders), upper)

    def error_power(self, column_scale: Tensor) -> tuple[Tensor, Tensor]:
        """The effects of rounding errors whose mean square in column j is c_j^2, in fp32.

        column_scale: c (n, cols), in the order of the inputs. Returns

            (n,)       the mean square that they add to an output: the mean of c_j^2 L_jj^2
            (n, cols)  what the errors of the columns k rounded before j add to the power of what is
                       rounded in j, relative to c_j^2: sum of (c_k L_kj)^2 / (c_j L_jj)^2, in the
                       order of the inputs
        """
        scale = column_scale.gather(1, self.order)
        squares = (self.upper * scale[:, None]).square()
        diagonal = squares.diagonal(dim1=1, dim2=2)
        feedback = (squares.sum(2) - diagonal) / diagonal
        return diagonal.mean(-1), torch.empty_like(feedback).scatter_(1, self.order, feedback)

    def column_exponents(self) -> Tensor:
        """Exponents of the scales 1 / L_jj, int8 (n, cols), in the order of the inputs.

        The geometric mean of the scales of a matrix is 1.
        """
        octaves = self.upper.diagonal(dim1=1, dim2=2).log2()
        octaves = octaves.mean(1, keepdim=True) - octaves
        k = (SCALES_PER_OCTAVE * octaves).round().clamp(-127, 127).to(torch.int8)
        return torch.empty_like(k).scatter_(1, self.order, k)

    def solve(self, step: Tensor, column_scale: Tensor, qmax: int) -> Tensor:
        """Codes int16 (n, rows, cols) in [-qmax, qmax] with W ~ codes * step * column_scale.

        step (n, rows) and column_scale (n, cols) are fp32. Raises BadMatrix if a weight or a
        Hessian is not finite.
        """
        scale = column_scale.gather(1, self.order)
        # Columns that are already rounded hold their errors e, the others their weights w.
        errors = self.weight.clone()
        codes = torch.empty_like(self.weight, dtype=torch.int16)
        for end in range(errors.size(1), 0, -GPTQ_BLOCK_COLUMNS):
            start = max(end - GPTQ_BLOCK_COLUMNS, 0)
            width = end - start
            block = errors[:, start:end]
            ratios = self.upper[:, start:end, start:]
            ratios = ratios / ratios.diagonal(dim1=1, dim2=2).unsqueeze(2)  # [j, k] = L_kj / L_jj
            # w plus the errors behind the block; the errors within it are added column by column.
            targets = torch.baddbmm(block, ratios[..., width:], errors[:, end:])
            for j in reversed(range(width)):
                target = ratios[:, j, None, j + 1 : width] @ block[:, j + 1 :]
                target = target.squeeze(1).add_(targets[:, j])  # (n, rows)
                column_step = step * scale[:, start + j, None]
                rounded = target.div_(column_step).round_().clamp_(-qmax, qmax)
                block[:, j].addcmul_(rounded, column_step, value=-1)
                codes[:, start + j] = rounded
        if not errors.isfinite().all():
            raise BadMatrix("GPTQ: a weight or a Hessian is not finite")

        # Back to the order of the inputs. The argsort of a permutation is its inverse.
        columns = self.order.argsort(-1)
        unsorted = [q.index_select(0, column).mT for q, column in zip(codes, columns, strict=True)]
        return torch.stack(unsorted)


# --- Column scales --------------------------------------------------------------------------------
#
# A weight in row r and column j that is rounded with the step s_rj leaves the squared error
# s_rj^2 / 12. It costs sigma_r L_jj^2 s_rj^2 / 12, with sigma_r the sensitivity of the row's output
# and L the factor of the solver. And it takes log2(1 / s_rj) bits plus what does not depend on the
# step. The sum of costs at a given sum of bits is least where every weight costs the same
# (reverse water-filling): sigma_r L_jj^2 s_rj^2 / 12 = theta. Solved for the step,
#
#     s_rj = sqrt(12 theta) * 1 / sqrt(sigma_r) * 1 / L_jj,
#
# a factor of the row times a factor of the column, however much rows and columns differ in power.
# Power only matters to weights that would cost less than theta as zeros: see BankRows. So one scale
# per column, c_j = 1 / L_jj, and one step per row are the optimum, and are found one after the
# other: W / c has the Hessian diag(c) H diag(c), whose factor c_j L_jj is even, and its rows get
# their steps as if there were no columns (WaterSIC, arXiv 2603.04956). Only where the integers of a
# column would leave their range its scale is larger.
#
# With steps by row alone the mean of L_jj^2 decides the cost, with column scales their geometric
# mean. At equal cost this saves 1/2 log2(arithmetic mean / geometric mean) bits per weight.
#
# The scales belong to the inputs: queries, keys and values share theirs, and a layer that is
# visited many times has one Hessian and so one vector. L is that of the damped Hessian, which keeps
# inputs that hardly vary from steps so coarse that another text's inputs would notice. An input
# that was never active counts as a typical one. A table that is only looked up has the identity for
# its Hessian and so no scales. The tied table's Hessian holds both its roles.

SCALES_PER_OCTAVE = 4
# 2^(0/4) to 2^(3/4) in fp32. They are written out because a library's exp2 may round otherwise.
QUARTERS_OF_OCTAVE = np.array([1.0, 1.1892071, 1.4142135, 1.6817929], np.float32)

ColumnExponents = dict[tuple[str, int], Tensor]  # by Matrix.input_key, int8 (cols,) on the CPU


def column_scales(exponents: np.ndarray) -> np.ndarray:
    """The scales 2^(k/4) of exponents k, int8 -> fp32, equal to the bit on any machine."""
    octaves, quarters = np.divmod(exponents.astype(np.int32), SCALES_PER_OCTAVE)
    return np.ldexp(QUARTERS_OF_OCTAVE[quarters], octaves)


def bank_exponents(cfg: Config, exponents: Mapping) -> dict[str, np.ndarray]:
    """The exponents of every bank's columns, int8 (n, cols), from those by input key."""
    stacks = {}
    for bank in bank_shapes(cfg):
        keys = [matrix.input_key for matrix in matrices_of(cfg, bank)]
        stacks[bank] = np.stack([np.asarray(exponents[key]) for key in keys])
    return stacks


# --- Step sizes -----------------------------------------------------------------------------------
#
# Halving the step of a row costs one bit more per weight and leaves a quarter of the squared error.
# Published systems derive the step from the standard deviation of the row (clips) or from its
# largest weights (percentiles) alone. QUANTIZER=allocated uses what an error of the row costs, and
# gives fine steps to the rows where it costs most.

FP16_TINY = torch.finfo(torch.float16).tiny  # 2^-14; a smaller fp16 has fewer bits, or is zero
# Percentiles of |w|, as shares: GPTQ-lite (PR #374) chooses among the first, PR #568 has the one.
GPTQ_LITE_PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
INT6_PERCENTILES = (0.9999984,)


def qmax_of_bits(bits: int) -> int:
    """Largest code of this many bits. Codes are symmetric about 0."""
    return 2 ** (bits - 1) - 1


def qmax_of(cfg: Config, bank: str) -> int:
    """Largest code of a bank by the published rule."""
    return qmax_of_bits(cfg.embed_bits if is_table(cfg, bank) else cfg.matrix_bits)


def clip_sigmas_of(cfg: Config, matrix: Matrix) -> float:
    """Range of a matrix's codes in standard deviations of a row.

    A clip of the matrix's group, attention or MLP, goes before MATRIX_CLIP_SIGMAS unless it is 0.
    """
    if is_table(cfg, matrix.bank):
        return cfg.embed_clip_sigmas
    if matrix.site in ("attn_in", "attn_out"):
        return cfg.attn_clip_sigmas or cfg.matrix_clip_sigmas
    return cfg.mlp_clip_sigmas or cfg.matrix_clip_sigmas


def clip_steps(weight: Tensor, clip_sigmas: Tensor | float, qmax: int) -> Tensor:
    """SDClip (PR #1394): step = clip_sigmas * std(row) / qmax, (n, rows) fp16.

    The floor is FP16_TINY, because the published 1e-10 is zero in fp16.
    """
    return (clip_sigmas * weight.float().std(dim=-1) / qmax).clamp_min(FP16_TINY).half()


def percentile_steps(weight: Tensor, qmax: int, floor: float, shares: Iterable[float]) -> Tensor:
    """step = max(percentile of the row's |w|, floor) / qmax, (n, rows) fp16.

    Each matrix takes, among the percentiles in `shares`, the one of the least squared error:
    GPTQ-lite (PR #374), which has no Hessian and so is no GPTQ.
    """
    chosen = []
    for w in weight.float():
        largest = w.abs().quantile(w.new_tensor(shares), -1)  # (shares, rows)
        largest = largest.clamp_min(max(floor, qmax * FP16_TINY))
        steps = (largest / qmax).half()
        errors = []
        for step in steps.float():
            codes = (w / step[:, None]).round().clamp(-qmax, qmax)
            errors.append((w - step[:, None] * codes).square().mean())
        best = int(torch.stack(errors).argmin())
        chosen.append(steps[best])
    return torch.stack(chosen)


def published_steps(cfg: Config, bank: str, weight: Tensor, has_hessians: bool) -> Tensor:
    """Steps (n, rows) fp16 by the rule of the published quantiser that the config names."""
    qmax = qmax_of(cfg, bank)
    if has_hessians:
        sigmas = [clip_sigmas_of(cfg, matrix) for matrix in matrices_of(cfg, bank)]
        return clip_steps(weight, torch.tensor(sigmas, device=weight.device)[:, None], qmax)
    shares = INT6_PERCENTILES
    if cfg.quantizer == "gptq_lite" and not is_table(cfg, bank):
        shares = GPTQ_LITE_PERCENTILES
    return percentile_steps(weight, qmax, cfg.clip_floor, shares)


# Rounded. One more digit would change the bytes of every fitted artifact.
TWO_PI_E = 17.08
# Allocated steps may use the whole range of the coder: bits are saved by the entropy coder, not by
# the range. The rows of the tied table, which the loss notices most, need more than a byte.
ALLOCATED_QMAX = {"ans": 1023}  # by COMPRESSOR; the others code bytes
BYTE_QMAX = 127
STEPS_PER_OCTAVE = 8
MAX_STEP = 2.0**15  # fp16 holds up to 65504


def entropy_bits(power: Tensor, step: Tensor) -> Tensor:
    """Bits per weight of Gaussian rows, 1/2 log2(1 + 2 pi e power / step^2).

    For fine steps this is the entropy of a Gaussian minus log2(step). For steps so coarse that
    every code is 0, the 1 brings it to 0.
    """
    return 0.5 * torch.log2(1 + TWO_PI_E * power / step.square())


class BankRows(NamedTuple):
    """The facts about each row of a bank that decide its step; tensors are (n, rows) fp32.

    "Weights" are those of the solver, already divided by their column scales.

    One number, theta, sets the size of the artifact: all steps grow with it. With sensitivities it
    is the cost that every row is allowed, in nats per weight, up to the sensitivities' common
    factor. Without them, published steps are multiplied by its square root.
    """

    published_step: Tensor
    power: Tensor  # mean square of the weights, above 0
    column_power: Tensor  # (n, groups of columns), relative to the mean of all
    feedback: Tensor  # (n, groups), power that a unit of squared error adds to later columns
    # The largest |w|, after weights in columns of more than mean power are divided by its root:
    # such columns can get a coarser scale, see Quantizer.columns_in_range.
    largest: Tensor
    cost: Tensor | None  # nats per weight and unit of squared error; None without sensitivities
    qmax: int  # largest code

    def entropy_bits(self, step: Tensor) -> Tensor:
        """Bits per weight of each row (n, rows), for steps of the same shape.

        What the solver rounds has the power of the weights plus that of the errors which it makes
        up for. The power of a weight is taken as that of its row times that of its column's group.
        """
        error = 1 / (12 / step.square() + 1 / self.power)
        power = self.power[..., None] * self.column_power[:, None]
        power = power + error[..., None] * self.feedback[:, None]
        return entropy_bits(power, step[..., None]).mean(-1)

    def steps(self, theta: float) -> Tensor:
        """Steps (n, rows) for this theta, in fp32; fp16 holds every one of them exactly."""
        if self.cost is None:
            return self.scaled_steps(theta)
        return self.allocated_steps(theta)

    def scaled_steps(self, theta: float) -> Tensor:
        """The published steps times sqrt(theta), not so fine that more weights are clipped."""
        finest = torch.minimum(self.published_step, self.largest / self.qmax)
        step = (self.published_step * math.sqrt(theta)).maximum(finest)
        return step.clamp(FP16_TINY, MAX_STEP).half().float()

    def allocated_steps(self, theta: float) -> Tensor:
        """Steps by reverse water-filling, the least total cost for a given number of bits.

        A step s leaves the squared error d = s^2 / 12 per weight, but never more than the power p,
        which is the error if all codes are 0: 1 / d = 12 / s^2 + 1 / p joins the two. With c for
        the cost, the sum of c d at a given sum of rates 1/2 log2(p / d) is least where every row
        costs the same, c d = theta. Rows that cannot cost that much, c p < theta, become zeros
        (Cover and Thomas, Elements of Information Theory, section 10.3). Solved for s:

            12 theta = s^2 (c - theta / p)

        Steps are then rounded to powers of 2^(1/8): 0.1 % more error, 60 KB less of scales.
        """
        step = (12 * theta / (self.cost - theta / self.power).clamp_min(1e-37)).sqrt()
        # Steps of 100 standard deviations round all weights of a row to 0. The largest weight must
        # stay within the range of codes.
        step = torch.minimum(step, 100 * self.power.sqrt()).maximum(self.largest / self.qmax)
        step = step.clamp(FP16_TINY, MAX_STEP)
        octaves = (STEPS_PER_OCTAVE * step.log2()).round() / STEPS_PER_OCTAVE
        return torch.exp2(octaves).half().float()


# --- Quantizer ------------------------------------------------------------------------------------
#
# The quantizer joins solver and steps. Ordering and factoring the Hessians does not depend on the
# size of the artifact, so it is done once. Only solving depends on it, and is repeated with other
# steps until the file fits. Of W ranks each solves every W-th matrix of a bank and holds zeros for
# the others, so the sum over the ranks is complete.

LOG2_THETA_RANGE = (-140.0, 60.0)  # at both ends every step has reached one of its bounds
THETA_HALVINGS = 48


COLUMN_GROUPS = 16


def by_column_group(power: Tensor, values: Tensor) -> Tensor:
    """Means of values in up to 16 groups of columns of similar power, (n, cols) -> (n, groups).

    The groups have equally many columns, or almost.
    """
    values = values.gather(1, power.argsort(1))
    groups = values.tensor_split(min(COLUMN_GROUPS, values.size(1)), dim=1)
    return torch.stack([group.mean(1) for group in groups], dim=1)


class Quantised(NamedTuple):
    """A model's integers and what they are multiplied by; on the CPU, equal on all ranks."""

    codes: dict[str, Tensor]  # by bank, int16 (n, rows, cols)
    scales: dict[str, Tensor]  # by bank, the steps fp16 (n, rows)
    columns: ColumnExponents


class Quantizer:
    """Turns a model's banks and tables into codes and scales, for any size of the artifact.

    Without Hessians the solver works with the identity and so rounds to nearest. Without
    sensitivities the steps are the published ones. All ranks must call the constructor and `solve`.
    """

    def __init__(
        self,
        model: GPT,
        hessians: Hessians | None,
        sensitivities: Sensitivities | None,
        ranks: Ranks,
    ):
        """Factors this rank's Hessians and measures all rows. Raises BadMatrix."""
        self.cfg = model.cfg
        self.ranks = ranks
        self.shapes = bank_shapes(model.cfg)
        # Along the first axis of every bank.
        self.solved_here = slice(ranks.rank, None, ranks.world_size)
        self.weights = {
            bank: model.get_parameter(bank).detach().view(shape)
            for bank, shape in self.shapes.items()
        }
        self.solvers: dict[str, GptqSolver] = {}
        for bank in self.shapes:
            self.add_solver(bank, hessians)
        self.has_columns = self.cfg.column_scales and hessians is not None
        self.columns = self.find_columns()
        self.rows: dict[str, BankRows] = {}
        for bank, scale in self.bank_scales(self.columns).items():
            self.add_rows(bank, scale, hessians is not None, sensitivities)

        # Bytes of codes when every step is as fine as it can be.
        self.finest_bytes = self.predicted_bytes(2.0 ** LOG2_THETA_RANGE[0])
        # With this theta the codes take as many bytes as with the published steps.
        self.default_theta = 1.0
        if sensitivities is not None:
            steps = {bank: rows.published_step for bank, rows in self.rows.items()}
            self.default_theta = self.theta_for(self.entropy_bytes(steps))

    def find_columns(self) -> ColumnExponents:
        """The exponents of all columns; zeros, for scales of 1, where there are none.

        Matrices of equal inputs share those of the first. Each rank knows its own matrices, and all
        get the same. All ranks must call it.
        """
        exponents = {}
        for bank, (n, _, cols) in self.shapes.items():
            k = torch.zeros(n, cols, dtype=torch.int8, device=self.ranks.device)
            if self.has_columns and bank in self.solvers:
                k[self.solved_here] = self.solvers[bank].column_exponents()
            k = self.ranks.sum(k).cpu()
            for matrix in matrices_of(self.cfg, bank):
                exponents.setdefault(matrix.input_key, k[matrix.index])
        return exponents

    def bank_scales(self, exponents: ColumnExponents) -> dict[str, Tensor]:
        """The column scales of every bank, fp32 (n, cols)."""
        return {
            bank: torch.from_numpy(column_scales(k)).to(self.ranks.device)
            for bank, k in bank_exponents(self.cfg, exponents).items()
        }

    def add_solver(self, bank: str, hessians: Hessians | None) -> None:
        """Makes the solver of this rank's matrices of a bank, if it owns any."""
        matrices = matrices_of(self.cfg, bank)[self.solved_here]
        if not matrices:
            return
        weight = self.weights[bank]
        if hessians is None:
            identity = torch.eye(weight.size(-1), device=weight.device)
            inputs = [identity] * len(matrices)
        else:
            inputs = [hessians[matrix.input_key] for matrix in matrices]
        self.solvers[bank] = GptqSolver.prepare(weight[self.solved_here], inputs)

    def add_rows(
        self,
        bank: str,
        column_scale: Tensor,
        has_hessians: bool,
        sensitivities: Sensitivities | None,
    ) -> None:
        """Measures the rows of a bank, whose columns are divided by column_scale (n, cols)."""
        n, _, cols = self.shapes[bank]
        # They hold 0 for the matrices of other ranks.
        output_power = torch.zeros(n, device=self.ranks.device)
        feedback = torch.zeros(n, cols, device=self.ranks.device)
        here = self.solved_here
        if bank in self.solvers:
            powers = self.solvers[bank].error_power(column_scale[here])
            output_power[here], feedback[here] = powers
        output_power = self.ranks.sum(output_power)
        feedback = self.ranks.sum(feedback)

        weight = self.weights[bank] / column_scale[:, None]
        squares = weight.square()
        column_power = squares.mean(1)
        column_power /= column_power.mean(1, keepdim=True).clamp_min(1e-20)
        largest = weight.abs()
        if self.has_columns:
            largest = largest / column_power.sqrt().clamp_min(1)[:, None]
        allocates = sensitivities is not None
        largest_allocated = ALLOCATED_QMAX.get(self.cfg.compressor, BYTE_QMAX)
        self.rows[bank] = BankRows(
            published_step=published_steps(self.cfg, bank, weight, has_hessians).float(),
            power=squares.mean(-1).clamp_min(1e-20),
            column_power=by_column_group(column_power, column_power),
            feedback=by_column_group(column_power, feedback),
            largest=largest.amax(-1),
            cost=output_power[:, None] * sensitivities[bank] if allocates else None,
            qmax=largest_allocated if allocates else qmax_of(self.cfg, bank),
        )

    def entropy_bytes(self, steps: dict[str, Tensor]) -> float:
        """Bytes of all codes at these steps by bank, predicted from the powers of the rows."""
        total = 0.0
        for bank, (_, _, cols) in self.shapes.items():
            bits = self.rows[bank].entropy_bits(steps[bank])
            total += cols / 8 * bits.double().sum().item()
        return total

    def predicted_bytes(self, theta: float) -> float:
        """entropy_bytes of the steps of this theta."""
        return self.entropy_bytes({bank: rows.steps(theta) for bank, rows in self.rows.items()})

    def theta_for(self, budget: float) -> float:
        """The least theta whose predicted bytes are at most `budget`, by bisection."""
        low, high = LOG2_THETA_RANGE
        for _ in range(THETA_HALVINGS):
            middle = (low + high) / 2
            if self.predicted_bytes(2.0**middle) <= budget:
                high = middle
            else:
                low = middle
        return 2.0**high

    def columns_in_range(self, steps: dict[str, Tensor]) -> ColumnExponents:
        """The exponents, raised where the largest integer of a column would leave its range.

        An eighth of the range is left to the errors that the solver makes up for.
        """
        if not self.has_columns:
            return self.columns
        columns = dict(self.columns)
        for bank, step in steps.items():
            integers = (self.weights[bank] / step[..., None]).abs().amax(1)
            share_of_range = integers / (0.875 * self.rows[bank].qmax)
            least = (SCALES_PER_OCTAVE * share_of_range.log2()).ceil().clamp(-127, 127)
            for k, matrix in zip(least.cpu(), matrices_of(self.cfg, bank), strict=True):
                columns[matrix.input_key] = columns[matrix.input_key].maximum(k.to(torch.int8))
        return columns

    def solve(self, theta: float) -> Quantised:
        """The integers of the steps of this theta.

        All ranks must call it; all get the same. Raises BadMatrix.
        """
        steps = {bank: rows.steps(theta) for bank, rows in self.rows.items()}
        columns = self.columns_in_range(steps)
        scales = self.bank_scales(columns)
        here = self.solved_here
        all_codes = {}
        for bank, shape in self.shapes.items():
            # NCCL adds no int16.
            codes = torch.zeros(shape, dtype=torch.int32, device=self.ranks.device)
            if bank in self.solvers:
                qmax = self.rows[bank].qmax
                solver = self.solvers[bank]
                codes[here] = solver.solve(steps[bank][here], scales[bank][here], qmax).int()
            all_codes[bank] = self.ranks.sum(codes).short().cpu()
        halves = {bank: step.half().cpu() for bank, step in steps.items()}
        return Quantised(all_codes, halves, columns)


# --- Fit to the byte limit ------------------------------------------------------------------------
#
# Finer steps always lose less, so the best artifact is the one that just fits. The bytes of a theta
# are predicted, then measured on the real file. The bytes by which a round misses the goal then
# correct the predicted bytes that the next round aims at.

FIT_SLACK_BYTES = 4096  # a file this close under the goal is good enough


def fitted_bytes(cfg: Config) -> int:
    """The goal of fit_artifact: what ARTIFACT_LIMIT_BYTES leaves to the model, if it can use that.

    A tiny model takes MATRIX_BITS per weight instead, and 16 bits for what is not quantised: no
    finer step is worth its bytes.
    """
    num_weights = sum(math.prod(shape) for shape in bank_shapes(cfg).values())
    num_floats = sum(math.prod(shape) for shape in float_shapes(cfg).values())
    useful = num_weights * cfg.matrix_bits // 8 + 2 * num_floats
    return min(cfg.artifact_limit_bytes - CODE_BYTES, useful)


def fit_artifact(
    quantizer: Quantizer, model: GPT, meta: dict, log: Callable[[str], None], rounds: int = 12
) -> bytes:
    """The artifact with the finest steps that keep the model under `fitted_bytes`.

    It is at most FIT_SLACK_BYTES smaller, or no step can be finer. Without a limit the size is that
    of the published steps. `rounds` limits the attempts. A call with rounds=1 is a rehearsal: it
    may return b"" on rank 0. All ranks must call it; rank 0 gets the file, the others b"". Raises
    UsageError if the model cannot fit.
    """
    cfg = model.cfg
    is_main = quantizer.ranks.is_main
    if not cfg.artifact_limit_bytes:
        quantised = quantizer.solve(quantizer.default_theta)
        return pack_artifact(model, quantised, meta) if is_main else b""

    room = fitted_bytes(cfg)
    finest = quantizer.finest_bytes
    budget = min(0.96 * room, finest)  # predicted bytes of the codes
    best = b""
    best_size = 0
    size = 0
    for turn in range(1, rounds + 1):
        quantised = quantizer.solve(quantizer.theta_for(budget))
        data = pack_artifact(model, quantised, meta) if is_main else b""
        size = quantizer.ranks.gather(len(data))[0]
        log(f"fit:{turn} codes predicted:{budget:.0f} model:{size} room:{room}")
        if best_size < size <= room:
            best = data
            best_size = size
        is_close = room - FIT_SLACK_BYTES < size <= room
        is_finest = budget == finest and size <= room
        if is_close or is_finest:
            break
        # Codes take budget / size of the file, so they get that share of the bytes that are
        # missing. One round never cuts the budget to less than a quarter.
        missing = room - FIT_SLACK_BYTES // 2 - size
        budget = max(budget + missing * min(1.0, budget / size), budget / 4)
        budget = min(budget, finest)
    if not best_size and rounds > 1:
        raise UsageError(
            f"ARTIFACT_LIMIT_BYTES={cfg.artifact_limit_bytes}: the model is {size - room} bytes "
            f"over with steps for {budget:.0f} bytes of integers; lower MLP_MULT or MODEL_DIM"
        )
    return best


# --- Entropy coder --------------------------------------------------------------------------------
#
# Asymmetric numeral systems (ANS, J. Duda), the range variant: a sequence of symbols becomes one
# large integer, the state, and a symbol of frequency f / 2^14 makes it 2^14 / f times larger, which
# is log2(2^14 / f) bits. The state is a stack: what was pushed last is popped first, so the encoder
# goes through the codes backwards. The coder is exact integer arithmetic in NumPy, so that any
# machine decodes alike, and many independent states work side by side to make it fast. Its tables
# and the levels of the rows come from powers and logarithms in fp64, which are rounded; none lies
# so near a half that another machine could round it otherwise (a test asserts it).
#
# How likely a code is depends on its context: how large the codes of its row and of its column are,
# and whether the column leans to one side. Encoder and decoder must agree on it. So it is made only
# from what the decoder has by then: the levels of the rows, which are stored before the codes, and
# the codes of the rows above.

ANS_BITS = 14
FREQUENCY_SUM = 1 << ANS_BITS  # of all symbols of a context
SLOT_MASK = FREQUENCY_SUM - 1
WORD_BITS = 16  # a state sheds and takes in words of this size
STATE_MIN = 1 << WORD_BITS  # a state x lies in 2^16 <= x < 2^32, between any two symbols
CODES_PER_STATE = 1 << 13
NUM_SYMBOLS = 2048
ZERO_SYMBOL = 1024  # the symbol of code 0: symbol = code * sign + 1024

# A context is a pair: a band of magnitude, and a class of how far a column's mean is off 0.
NUM_BANDS = 64
NUM_BIASES = 4
NUM_CONTEXTS = NUM_BANDS * NUM_BIASES
BIAS_EDGES = (7, 19, 39)  # |mean code| of a column in per cent of its mean |code|

# Magnitudes are logarithmic: level k stands for a mean |code| of 2^((k - 65) / 8), level 0 for a
# row of zeros. A column's offset says by how many levels its codes are larger than those of its
# rows, from -36 to 24, plus 36. So level + offset - 36 is the level to expect where a row and a
# column meet. A band holds three neighbouring values of level + offset.
LEVELS_PER_OCTAVE = 8
UNIT_LEVEL = 65
LEVELS_PER_BAND = 3
# In fixed point, with 16 bits after the point: 1 / (mean |code|) of each level, and the boundaries
# halfway between offsets. A column's offset is the number of boundaries below its relative mean.
FIXED_POINT = 1 << 16
INVERSE_LEVEL = np.array(
    [0] + [round(FIXED_POINT * 2 ** ((UNIT_LEVEL - k) / LEVELS_PER_OCTAVE)) for k in range(1, 256)]
)
# 1 / column scale of exponent k.
INVERSE_COLUMN_SCALE = np.array(
    [round(FIXED_POINT * 2 ** (-k / SCALES_PER_OCTAVE)) for k in range(256)]
)
OFFSET_EDGES = np.array(
    [round(FIXED_POINT * 2 ** ((t + 0.5) / LEVELS_PER_OCTAVE)) for t in range(-36, 24)]
)


def row_levels(codes: np.ndarray) -> np.ndarray:
    """Level of each row's mean |code|: int16 (n, rows, cols) -> uint8 (n, rows)."""
    mean = np.stack([np.abs(matrix).mean(-1) for matrix in codes])
    level = np.rint(LEVELS_PER_OCTAVE * np.log2(np.maximum(mean, 2**-8)) + UNIT_LEVEL)
    return np.where(mean > 0, level, 0).astype(np.uint8)


def num_coder_states(codes: list[np.ndarray]) -> int:
    """How many independent states code these arrays. More are faster; each costs 2 bytes."""
    widest = max(q.shape[2] for q in codes)
    return max(widest, sum(q.size for q in codes) // CODES_PER_STATE)


class ColumnStatistics:
    """Sums over the rows coded so far, for every column of m matrices, in fixed point.

    Each code is divided by the mean |code| of its row's level. Changed in place by `add`.
    """

    PRIOR_ROWS = 64
    # Renewing offset, bias and sign at every row is slower and predicts no better.
    ROWS_PER_RENEWAL = 8

    def __init__(self, exponents: np.ndarray):
        """Starts as after PRIOR_ROWS unbiased rows, from the exponents of column scales, (m, cols).

        The codes of those rows are as large as their level, times 1 / scale of their column.
        """
        self.num_rows = 0
        above_least = exponents.astype(np.int64) - exponents.min(1, keepdims=True)
        inverse = INVERSE_COLUMN_SCALE[above_least]
        mean = inverse.sum(1, keepdims=True) // exponents.shape[1] + 1
        prior = self.PRIOR_ROWS * FIXED_POINT * inverse // mean
        self.magnitude = np.maximum(prior, 1)  # of |code|
        self.total = np.zeros_like(self.magnitude)  # of codes
        self.renew()

    def renew(self) -> None:
        """Sets each column's offset, bias and sign from the sums."""
        mean = self.magnitude // (self.num_rows + self.PRIOR_ROWS)
        self.offset = np.searchsorted(OFFSET_EDGES, mean)
        per_cent = 100 * abs(self.total) // self.magnitude
        self.bias = np.searchsorted(BIAS_EDGES, per_cent, side="right")
        self.sign = np.where(self.total < 0, -1, 1)

    def contexts(self, level: np.ndarray) -> np.ndarray:
        """Contexts (m, cols) of one row of each matrix, given the rows' levels int64 (m, 1)."""
        band = np.minimum((level + self.offset) // LEVELS_PER_BAND, NUM_BANDS - 1)
        return np.where(level > 0, band, 0) * NUM_BIASES + self.bias

    def add(self, codes: np.ndarray, level: np.ndarray) -> None:
        """Adds one row of each matrix, codes (m, cols) with levels int64 (m, 1)."""
        codes = codes.astype(np.int64)
        inverse = INVERSE_LEVEL[level]
        # A row of zeros says nothing about the columns, so it counts as an average row.
        self.magnitude += np.where(level > 0, abs(codes) * inverse, FIXED_POINT)
        self.total += codes * inverse
        self.num_rows += 1
        if self.num_rows % self.ROWS_PER_RENEWAL == 0:
            self.renew()


def coding_order(
    codes: list[np.ndarray], levels: list[np.ndarray], columns: list[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (codes, contexts, signs), each (m, cols), row by row in the order of the stream.

    One item is one row of as many matrices as there are states for. With states for two matrices, a
    bank of three matrices (2 rows each) gives row 0 of matrices 0 and 1, row 1 of both, row 0 of
    matrix 2, row 1 of matrix 2.

    The encoder reads the codes. The decoder starts from zeros and fills `codes`, a view, in place
    before it asks for the next item, whose contexts depend on them. `signs` are the signs of the
    columns' means. Codes times signs lean to the positive side, so one table serves both sides.
    """
    num_states = num_coder_states(codes)
    for bank, bank_levels, exponents in zip(codes, levels, columns, strict=True):
        num_matrices, num_rows, cols = bank.shape
        matrices_at_once = num_states // cols
        for first in range(0, num_matrices, matrices_at_once):
            group = bank[first : first + matrices_at_once]
            group_levels = bank_levels[first : first + matrices_at_once].astype(np.int64)
            statistics = ColumnStatistics(exponents[first : first + matrices_at_once])
            for row in range(num_rows):
                level = group_levels[:, row, None]
                yield group[:, row], statistics.contexts(level), statistics.sign
                statistics.add(group[:, row], level)


def frequency_table(counts: np.ndarray) -> np.ndarray:
    """Frequencies that add up to 2^14 in each context, from counts (contexts, 2048).

    Every symbol that occurs gets at least 1; the most frequent one takes what rounding leaves.
    """
    totals = np.maximum(counts.sum(1, keepdims=True), 1)
    table = np.maximum(FREQUENCY_SUM * counts // totals, counts > 0)
    most_frequent = table.argmax(1)
    table[np.arange(len(table)), most_frequent] += FREQUENCY_SUM - table.sum(1)
    return table


def range_starts(table: np.ndarray) -> np.ndarray:
    """For each symbol the sum of the frequencies before it in its context, (contexts * 2048,)."""
    return (table.cumsum(1) - table).ravel()


def ans_encode(
    codes: list[np.ndarray], levels: list[np.ndarray], columns: list[np.ndarray]
) -> bytes:
    """The codes, int16 (n, rows, cols), as one stream.

    Each bank has levels uint8 (n, rows) and exponents of column scales int8 (n, cols).

    Layout: u32 size of the tables; the tables, frequencies u16 (contexts, 2048) in LZMA; the states
    u32 at the end of encoding, where decoding starts; words u16 in the order of decoding.

    Pushing a symbol of frequency f that starts at c: x -> (x // f) * 2^14 + c + x % f. Before that,
    a state that would leave its range sheds its lower 16 bits as a word. So STATE_MIN <= x < 2^32
    holds before and after each push, for every state.
    """
    pushes = []
    for q, context, sign in coding_order(codes, levels, columns):
        index = context * NUM_SYMBOLS + q * sign + ZERO_SYMBOL
        pushes.append(index.ravel().astype(np.int32))
    counts = np.bincount(np.concatenate(pushes), minlength=NUM_CONTEXTS * NUM_SYMBOLS)
    table = frequency_table(counts.reshape(-1, NUM_SYMBOLS))
    frequency = table.ravel()
    start = range_starts(table)

    states = np.full(num_coder_states(codes), STATE_MIN, np.int64)
    words = []
    for index in reversed(pushes):
        x = states[: len(index)]  # a view
        f = frequency[index]
        is_full = x >= f << (2 * WORD_BITS - ANS_BITS)  # the push would reach 2^32
        words.append(x[is_full].astype("<u2"))  # the lower 16 bits
        x[is_full] >>= WORD_BITS
        x[:] = (x // f) * FREQUENCY_SUM + start[index] + x % f

    tables = compress("lzma", table.astype("<u2").tobytes())
    numbers = [states.astype("<u4"), *reversed(words)]
    body = b"".join(array.tobytes() for array in numbers)
    return len(tables).to_bytes(4, "little") + tables + body


def ans_decode(
    data: bytes, shapes: Iterable[tuple], levels: list[np.ndarray], columns: list[np.ndarray]
) -> list[np.ndarray]:
    """The codes, arrays of these shapes, from what ans_encode wrote.

    A pop undoes a push. The lower 14 bits of x, the slot, name the symbol, and
    x -> f * (x >> 14) + slot - c removes it; a state below STATE_MIN then takes in a word. So
    STATE_MIN <= x < 2^32 holds again, and at the end each state is where the encoder started it.
    Raises ValueError or IndexError if ans_encode cannot have written `data`.
    """
    codes = [np.zeros(shape, np.int16) for shape in shapes]
    tables_end = 4 + int.from_bytes(data[:4], "little")
    tables = decompress("lzma", data[4:tables_end], 2 * NUM_CONTEXTS * NUM_SYMBOLS)
    table = np.frombuffer(tables, "<u2").astype(np.int64).reshape(NUM_CONTEXTS, NUM_SYMBOLS)
    if (table.sum(1) != FREQUENCY_SUM).any():
        raise ValueError("a table of frequencies does not add up")
    counts = np.zeros(NUM_CONTEXTS * NUM_SYMBOLS, np.int64)
    frequency = table.ravel()
    start = range_starts(table)
    # In each context, as many slots name a symbol as its frequency says: (contexts, 2^14).
    every_symbol = np.tile(np.arange(NUM_SYMBOLS, dtype=np.uint16), NUM_CONTEXTS)
    symbol_of_slot = np.repeat(every_symbol, frequency).reshape(NUM_CONTEXTS, FREQUENCY_SUM)

    states = np.frombuffer(data, "<u4", num_coder_states(codes), tables_end).astype(np.int64)
    words_start = tables_end + 4 * len(states)
    words = np.frombuffer(data, "<u2", offset=words_start).astype(np.int64)
    num_read = 0
    for q, context, sign in coding_order(codes, levels, columns):
        x = states[: q.size]  # a view
        slot = x & SLOT_MASK
        symbol = symbol_of_slot[context.ravel(), slot].astype(np.int64)
        index = context.ravel() * NUM_SYMBOLS + symbol
        np.add.at(counts, index, 1)
        x[:] = frequency[index] * (x >> ANS_BITS) + slot - start[index]
        low = np.flatnonzero(x < STATE_MIN)
        x[low] = (x[low] << WORD_BITS) + words[num_read : num_read + len(low)]
        num_read += len(low)
        q[:] = (symbol - ZERO_SYMBOL).reshape(q.shape) * sign
    if num_read != len(words) or (states != STATE_MIN).any():
        raise ValueError("words are left over")
    # Otherwise tables that nothing uses could hold 31 kB of something else.
    if (frequency_table(counts.reshape(-1, NUM_SYMBOLS)) != table).any():
        raise ValueError("a table of frequencies is not that of the codes")
    return codes


def code_entropy_bytes(codes: Iterable[np.ndarray]) -> float:
    """Order-0 entropy of codes in bytes: the least for a coder that knows no contexts."""
    flat = np.concatenate([q.ravel() for q in codes])
    counts = np.bincount(flat.astype(np.int64) + ZERO_SYMBOL, minlength=NUM_SYMBOLS)
    total = counts.sum()
    return sum(-n * math.log2(n / total) / 8 for n in counts if n)


# --- General codecs -------------------------------------------------------------------------------
#
# COMPRESSOR may also be a general codec, and the small streams are always LZMA: raw LZMA2, because
# a container has a header that would have to be trusted. lp=1 and pb=1 model the low and the high
# bytes of fp16 apart.

LZMA_FILTERS = [dict(id=lzma.FILTER_LZMA2, preset=6, lc=0, lp=1, pb=1)]


def compress(codec: str, data: bytes) -> bytes:
    """One stream by lzma, brotli (at the quality of PR #1530 and PR #1413) or zstd."""
    if codec == "lzma":
        return lzma.compress(data, lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    if codec == "brotli":
        import brotli

        return brotli.compress(data, quality=11)
    import zstandard

    # The levels of zstd look for matches that are not there (+16 % at level 3). These settings
    # leave little but the Huffman coding of literals, which suits codes.
    parameters = zstandard.ZstdCompressionParameters(
        strategy=1, window_log=17, hash_log=6, chain_log=6, search_log=1, min_match=6
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def decompress(codec: str, data: bytes, size: int) -> bytes:
    """A stream of `size` bytes, which is not trusted: this takes little memory besides.

    Raises ValueError unless the stream ends there and nothing stands behind it, or any error of the
    codec's library.
    """
    if codec == "lzma":
        decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS)
        raw = decoder.decompress(data, size + 1)
        is_whole = decoder.eof and not decoder.unused_data
    elif codec == "brotli":
        import brotli

        decoder = brotli.Decompressor()
        raw = decoder.process(data, size + 1)
        # The library itself refuses what stands behind the end.
        is_whole = decoder.is_finished()
    else:
        raw, is_whole = decompress_zstd(data, size)
    if len(raw) != size or not is_whole:
        raise ValueError("a stream is not as long as its header says")
    return raw


def decompress_zstd(data: bytes, size: int) -> tuple[bytes, bool]:
    """The first frame, up to little more than `size` bytes of it; whether it is all of `data`."""
    import zstandard

    decoder = zstandard.ZstdDecompressor(max_window_size=1 << 20).decompressobj()
    raw = bytearray()
    # A block of 4 bytes may stand for 128 KiB, so the input comes in small pieces.
    for first in range(0, len(data), 256):
        if decoder.eof or len(raw) > size:
            return bytes(raw), False
        raw += decoder.decompress(data[first : first + 256])
    return bytes(raw), decoder.eof and not decoder.unused_data


def order_of_size(levels: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Sorts the codes of a bank by the size to expect: flat indices, int64 (n * rows * cols,).

    The size follows from levels uint8 (n, rows) and exponents of column scales int8 (n, cols).
    """
    octaves = LEVELS_PER_OCTAVE // SCALES_PER_OCTAVE
    size = levels[:, :, None].astype(np.int16) - octaves * exponents[:, None].astype(np.int16)
    return size.argsort(axis=None, kind="stable")


def pack_codes(
    compressor: str, codes: list[np.ndarray], levels: list[np.ndarray], columns: list[np.ndarray]
) -> bytes:
    """The codes, int16 (n, rows, cols), as one stream.

    Each bank has levels uint8 (n, rows) and exponents of column scales int8 (n, cols). ans knows
    how to use them. For the others the codes, which are bytes then, are sorted within a bank by the
    size to expect, which makes zstd's stream about 9 % shorter.
    """
    if compressor == "ans":
        return ans_encode(codes, levels, columns)
    sorted_codes = []
    for q, level, exponents in zip(codes, levels, columns, strict=True):
        in_order = q.ravel()[order_of_size(level, exponents)]
        sorted_codes.append(in_order.astype(np.int8).tobytes())
    return compress(compressor, b"".join(sorted_codes))


def unpack_codes(
    compressor: str,
    data: bytes,
    shapes: list[tuple],
    levels: list[np.ndarray],
    columns: list[np.ndarray],
) -> list[np.ndarray]:
    """The codes that pack_codes packed, arrays of these shapes.

    Raises ValueError, or an error of the codec, if the stream does not hold them.
    """
    if compressor == "ans":
        return ans_decode(data, shapes, levels, columns)
    raw = decompress(compressor, data, sum(math.prod(shape) for shape in shapes))
    flat = np.frombuffer(raw, np.int8)
    codes = []
    start = 0
    for shape, level, exponents in zip(shapes, levels, columns, strict=True):
        end = start + math.prod(shape)
        q = np.empty(math.prod(shape), np.int16)
        q[order_of_size(level, exponents)] = flat[start:end]
        codes.append(q.reshape(shape))
        start = end
    return codes


# --- Container: writing ---------------------------------------------------------------------------
#
# The file is a header and five streams, laid out as `pack_arrays` says. Its bytes follow from the
# weights and the config alone: no time and no path goes into it.

ARTIFACT_MAGIC = b"PGLM"
ARTIFACT_VERSION = 4
HEADER_START = 13  # after magic, version, length and CRC-32 of the header
MAX_HEADER_BYTES = 1 << 16  # of JSON
MAX_STREAM_BYTES = 1 << 27  # of all streams, decompressed
# A file may hold 1 MiB, plus 16 bytes for each of its own, decompressed: 16 codes from a byte
# are half a bit each. No run comes near it, and no small file makes much work.
MAX_EXPANSION = 16
SMALL_STREAM_BYTES = 1 << 20


class ArtifactArrays(NamedTuple):
    """The contents of an artifact, in the order of the parameter table.

    `columns` is by Matrix.input_key, the others are by parameter name.
    """

    codes: dict[str, np.ndarray]  # int16 (n, rows, cols)
    levels: dict[str, np.ndarray]  # uint8 (n, rows)
    scales: dict[str, np.ndarray]  # fp16 (n, rows)
    columns: dict[tuple[str, int], np.ndarray]  # int8 (cols,), exponents k of scales 2^(k/4)
    floats: dict[str, np.ndarray]  # fp16, without the leading rows that nothing reads


class StreamSizes(NamedTuple):
    """Bytes of the five streams before compression, in the order of the file."""

    codes: int
    levels: int
    scales: int
    columns: int
    floats: int


def stream_sizes(cfg: Config) -> StreamSizes:
    """Sizes of the streams of a network."""
    shapes = bank_shapes(cfg).values()
    num_rows = sum(math.prod(shape[:2]) for shape in shapes)
    num_floats = sum(math.prod(shape) for shape in float_shapes(cfg).values())
    return StreamSizes(
        codes=sum(math.prod(shape) for shape in shapes),
        levels=num_rows,
        scales=2 * num_rows,
        columns=sum(math.prod(shape) for shape in column_shapes(cfg).values()),
        floats=2 * num_floats,
    )


def fp16_array(tensor: Tensor) -> np.ndarray:
    """The values of a tensor as little-endian fp16."""
    return tensor.detach().half().cpu().numpy().astype("<f2")


def pack_artifact(model: GPT, quantised: Quantised, meta: dict[str, Any]) -> bytes:
    """The artifact file of quantised banks and tables and of the model's other parameters.

    `meta` joins the header.
    """
    cfg = model.cfg
    codes = {name: q.numpy() for name, q in quantised.codes.items()}
    floats = {}
    for name, shape in float_shapes(cfg).items():
        floats[name] = fp16_array(model.get_parameter(name)[-shape[0] :])
    arrays = ArtifactArrays(
        codes=codes,
        levels={name: row_levels(q) for name, q in codes.items()},
        scales={name: fp16_array(scale) for name, scale in quantised.scales.items()},
        columns={key: k.numpy() for key, k in quantised.columns.items()},
        floats=floats,
    )
    return pack_arrays(cfg, arrays, meta)


def pack_arrays(cfg: Config, arrays: ArtifactArrays, meta: dict[str, Any]) -> bytes:
    """The artifact file that holds these arrays; `meta` joins the header.

    Its layout, all numbers little-endian:

        "PGLM", u8 version, u32 length and u32 CRC-32 of the header
        the header: zlib-compressed JSON of at most 64 KiB, {config, compressor,
            streams: [[raw bytes, stored bytes, CRC-32 of the stored bytes], ..], ..meta}
        five streams, each in the order of the parameter table:
            codes    by pack_codes; one raw byte counts for each, whatever the coder
            levels   u8, of every row of codes, by row_levels, in LZMA
            scales   fp16, the step of every row of codes, in LZMA
            columns  int8, k of the column scales 2^(k/4) of every Matrix.input_key, in LZMA
            floats   fp16, without the rows that nothing reads, in LZMA
    """
    bank_columns = list(bank_exponents(cfg, arrays.columns).values())
    codes, levels = list(arrays.codes.values()), list(arrays.levels.values())
    streams = [pack_codes(cfg.compressor, codes, levels, bank_columns)]
    for part in arrays[1:]:
        streams.append(compress("lzma", b"".join(array.tobytes() for array in part.values())))
    header = {"config": network_config(cfg), "compressor": cfg.compressor, **meta}
    header["streams"] = []
    for size, stream in zip(stream_sizes(cfg), streams, strict=True):
        header["streams"].append([size, len(stream), zlib.crc32(stream)])
    head = zlib.compress(header_text(header), 9)
    length = len(head).to_bytes(4, "little")
    checksum = zlib.crc32(head).to_bytes(4, "little")
    start = ARTIFACT_MAGIC + bytes([ARTIFACT_VERSION]) + length + checksum
    return start + head + b"".join(streams)


def header_text(header: dict[str, Any]) -> bytes:
    """The one spelling of a header."""
    return json.dumps(header, sort_keys=True).encode()


# --- Container: reading ---------------------------------------------------------------------------
#
# Nothing that is read is executed: the file holds JSON and arrays of numbers. The config in the
# header says how large each stream must be. Before anything is allocated, the config and the stated
# sizes are checked: however the file was forged, it unpacks to at most 64 KiB of header and, of
# streams, to 2^27 bytes and little more than 16 times its own size. Nothing hides in it: header and
# levels have one spelling, every stream ends where it should, and nothing stands behind it. (Codecs
# may still spell a stream in several ways; tools/container.py compares with their own way.) A
# damaged file may raise any error in the functions below; open_artifact turns it into one line.


def config_of_header(header: dict[str, Any]) -> Config:
    """The config of an artifact's network. Raises ValueError if there can be no such network."""
    fields = read_network_config(header["config"])
    # Rules that have nothing to do with the network are switched off.
    defaults = Config(artifact_limit_bytes=0, fused_ce=False)
    cfg = dataclasses.replace(defaults, **fields)
    # The rules may rely on every value being in its range.
    for rule in list(cfg.out_of_range()) or cfg.rules():
        if rule.field in fields:
            raise ValueError("a field out of range")
    if network_config(cfg) != header["config"]:
        raise ValueError("a field that no run writes")
    return cfg


def read_header(data: bytes) -> tuple[dict[str, Any], int]:
    """Header of an artifact and offset of its first stream.

    Raises ValueError for a header that `pack_arrays` would spell otherwise.
    """
    end = HEADER_START + int.from_bytes(data[5:9], "little")
    head = data[HEADER_START:end]
    if len(data) < end or zlib.crc32(head).to_bytes(4, "little") != data[9:HEADER_START]:
        raise ValueError("its header does not match its checksum")
    decoder = zlib.decompressobj()
    text = decoder.decompress(head, MAX_HEADER_BYTES)
    header = json.loads(text)
    if not decoder.eof or decoder.unused_data or header_text(header) != text:
        raise ValueError("its header has another spelling than its own")
    unknown = set(header) - {"config", "compressor", "streams", "looped", "tokenizer"}
    digest = header.get("tokenizer", "0" * 64)
    is_known = type(header.get("looped", True)) is bool and re.fullmatch("[0-9a-f]{64}", digest)
    if unknown or not is_known:
        raise ValueError("its header has fields that no run writes")
    return header, end


def stored_streams(data: bytes, header: dict[str, Any], start: int, cfg: Config) -> list[bytes]:
    """The five streams as stored, checked against header and network."""
    sizes, lengths, checksums = zip(*header["streams"], strict=True)
    expected = stream_sizes(cfg)
    is_expected = sizes == expected and sum(expected) <= MAX_STREAM_BYTES
    if not is_expected or header["compressor"] not in COMPRESSORS:
        raise ValueError("its streams are not those of its network, or of an unknown compressor")
    if sum(expected) > MAX_EXPANSION * len(data) + SMALL_STREAM_BYTES:
        raise ValueError("its streams are too short for its network")
    streams = []
    for length, checksum in zip(lengths, checksums, strict=True):
        stream = data[start : start + length]
        if zlib.crc32(stream) != checksum:
            raise ValueError("a stream does not match its checksum")
        streams.append(stream)
        start += length
    if start != len(data):
        raise ValueError("bytes are left over")
    return streams


def split_arrays(flat: np.ndarray, shapes: dict[Any, tuple[int, ...]]) -> dict[Any, np.ndarray]:
    """Views of arrays that lie end to end in `flat`. Raises ValueError if they do not fill it."""
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    parts = np.split(flat, ends[:-1])
    named_parts = zip(shapes.items(), parts, strict=True)
    return {name: part.reshape(shape) for (name, shape), part in named_parts}


def unpack_streams(streams: list[bytes], compressor: str, cfg: Config) -> ArtifactArrays:
    """The arrays in the five stored streams."""
    sizes = stream_sizes(cfg)
    shapes = bank_shapes(cfg)
    row_shapes = {bank: shape[:2] for bank, shape in shapes.items()}
    stored_codes, stored_levels, stored_scales, stored_columns, stored_floats = streams
    raw_levels = decompress("lzma", stored_levels, sizes.levels)
    raw_scales = decompress("lzma", stored_scales, sizes.scales)
    raw_columns = decompress("lzma", stored_columns, sizes.columns)
    raw_floats = decompress("lzma", stored_floats, sizes.floats)
    levels = split_arrays(np.frombuffer(raw_levels, np.uint8), row_shapes)
    columns = split_arrays(np.frombuffer(raw_columns, np.int8), column_shapes(cfg))
    codes = unpack_codes(
        compressor,
        stored_codes,
        list(shapes.values()),
        list(levels.values()),
        list(bank_exponents(cfg, columns).values()),
    )
    for level, q in zip(levels.values(), codes, strict=True):
        if (level != row_levels(q)).any():
            raise ValueError("levels are not those of the codes")
    return ArtifactArrays(
        codes=dict(zip(shapes, codes, strict=True)),
        levels=levels,
        scales=split_arrays(np.frombuffer(raw_scales, "<f2"), row_shapes),
        columns=columns,
        floats=split_arrays(np.frombuffer(raw_floats, "<f2"), float_shapes(cfg)),
    )


def open_artifact(data: bytes, path: Path) -> tuple[dict[str, Any], ArtifactArrays]:
    """Header and arrays of an artifact; `path` is for messages only.

    Raises UsageError for a file that is cut, altered or not consistent in itself.
    """
    if data[:4] != ARTIFACT_MAGIC:
        raise UsageError(f"{path}: not an artifact of train_gpt.py (starts with {data[:4]!r})")
    if len(data) > 4 and data[4] != ARTIFACT_VERSION:
        raise UsageError(
            f"{path}: container version {data[4]}, this program reads {ARTIFACT_VERSION}"
        )
    try:
        header, start = read_header(data)
        cfg = config_of_header(header)
        streams = stored_streams(data, header, start, cfg)
        return header, unpack_streams(streams, header["compressor"], cfg)
    except ImportError as error:
        raise UsageError(f"{path}: its compressor is not installed ({error})") from error
    # Each codec has its own errors, and a hostile file may provoke any of them.
    except Exception as error:
        reason = type(error).__name__
        if type(error) in (ValueError, ForeignValue):
            reason = " ".join(str(error).splitlines()[:1])
        raise UsageError(f"{path}: damaged: {reason}") from error


@torch.no_grad()
def load_artifact(model: GPT, arrays: ArtifactArrays) -> None:
    """Sets every parameter of the model, in place, to its fp16 value or to that of its codes.

    A code stands for (code * scale of its row) * scale of its column, in fp32.

    Rows that nothing reads stay as they are.
    """
    exponents = bank_exponents(model.cfg, arrays.columns)
    for name, q in arrays.codes.items():
        parameter = model.get_parameter(name)
        row_scale = arrays.scales[name].astype(np.float32)[..., None]
        column_scale = column_scales(exponents[name])[:, None]
        parameter.copy_(torch.from_numpy(q * row_scale * column_scale).view(parameter.shape))
    for name, values in arrays.floats.items():
        parameter = model.get_parameter(name)
        parameter[-len(values) :] = torch.from_numpy(values.astype(np.float32))


# === 10. Test-time training: score a chunk, then learn from it, before a deadline =================
# The rules, in one place:
#
# * Score first, then learn. A chunk's scores are final in the ledger before anything learns from
#   it. The ledger counts every target that an update reads before its score; a single one is
#   enough for the result to be refused.
# * With TTT_MODE=document a target's score may depend on the artifact, the tokens before the target
#   in its window, and the adapter of its document, which starts from SEED and learns from earlier
#   chunks of that document. So neither the batch, nor its order, nor the number of ranks matters.
#   Three options add text that comes earlier in the stream, and `record` has all of them:
#       TILT_ORDER             hints from what followed the same tokens before (section 8)
#       PHASED_TTT_NUM_PHASES  all weights learn from earlier documents
#       TTT_WARM_START_A       adapters start from the A of earlier batches on the same rank, so
#                              the number of ranks matters
#   With TTT_MODE=chunk all weights learn from earlier chunks of the stream.
# * With DATA_LOADER=rows or shuffled a window may hold the end of an earlier document.
# * Windows, sizes of chunks and the range that is learnt from depend on the index in a document,
#   never on where the document ends: that is information about the future. A document's last window
#   ends on the grid of chunks like every other, and is padded there.
# * When a chunk's scoring or its first gradient runs out of GPU memory, half as many documents are
#   run at once from then on. The chunk is then scored in parts; scores change in rounding alone.
# * The deadline only decides whether there is another update: see Deadline. The remaining targets
#   are scored plainly, in windows without learning, so every target has a score in time.
class Deadline:
    """When learning must stop, so that all targets are scored before the evaluation's time is over.

    Learning stops as soon as now + 2 * longest_gap + 2 * (time to score the remaining targets
    plainly) reaches the end. Once `late` is true it stays true.
    """

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds
        # The longest time in seconds between two calls of `must_stop`, decaying by a tenth a call.
        self.longest_gap = 0.0
        self.called_at = math.inf
        self.seconds_per_target = 0.0  # of plain scoring on one rank; set once it is measured
        self.late = False

    def seconds_left(self) -> float:
        """Seconds until the end."""
        return max(self.end - time.monotonic(), 0.0)

    def must_stop(self, targets: float, ranks: Ranks | None = None) -> bool:
        """Whether learning must stop, with `targets` left for this rank.

        Call it before each step: it measures the time since the last call. With `ranks` all ranks
        must call it, and all stop if one must.
        """
        now = time.monotonic()
        self.longest_gap = max(0.9 * self.longest_gap, now - self.called_at)
        self.called_at = now
        needed = 2 * self.longest_gap + 2 * self.seconds_per_target * targets
        late = self.late or now + needed >= self.end
        self.late = any(ranks.gather(late)) if ranks else late
        return self.late


# --- Adapters of documents ---
def adapter_update(
    leaf: Tensor,
    master: Tensor,
    grad: Tensor,
    moments: list[Tensor],
    t: Tensor,
    rate: Tensor,
    cfg: Config,
) -> None:
    """Update number `t` of adapters, in place, with AdamW or SGD (TTT_OPTIMIZER).

    master: fp32. leaf: the tensor that the forward reads, either `master` itself or its rounding to
    the compute dtype. moments: SGD's momentum (factor TTT_BETA1); or AdamW's second moment and,
    with TTT_BETA1 > 0, the first. t and rate are tensors, so that new values compile nothing.
    """
    grad = grad.float()
    decay = cfg.ttt_weight_decay
    if cfg.ttt_optimizer == "sgd":
        grad = moments[0].mul_(cfg.ttt_beta1).add_(grad.add(master, alpha=decay))
        master.sub_(rate * grad)
    else:
        second, *first = moments
        second.mul_(cfg.ttt_beta2).addcmul_(grad, grad, value=1 - cfg.ttt_beta2)
        if first:
            grad = first[0].lerp_(grad, 1 - cfg.ttt_beta1) / (1 - cfg.ttt_beta1**t)
        denominator = (second / (1 - cfg.ttt_beta2**t)).sqrt_().add_(1e-10)
        master.mul_(1 - rate * decay).sub_(rate * grad / denominator)
    if leaf is not master:
        leaf.copy_(master)


def chunk_grid(cfg: Config, longest: int) -> list[tuple[int, int]]:
    """(start, end) of the chunks of a document, up to `longest` targets.

    TTT_SHORT_CHUNKS shortens chunks by their index in the document. PR #2014 uses the length of the
    document, which tells the model where the document ends.
    """
    grid = []
    start = 0
    while start < longest:
        size = cfg.ttt_chunk_size
        for limit, short_size in cfg.short_chunks:
            if start < limit:
                size = short_size
                break
        grid.append((start, start + size))
        start += size
    return grid


def window_buckets(cfg: Config) -> list[int]:
    """The TTT_BUCKETS window lengths that are compiled, rising on a geometric scale."""
    longest = cfg.ttt_eval_seq_len
    shortest = min(2 * cfg.ttt_chunk_size, longest)
    # Made from the longest down: with TTT_BUCKETS=1 that is the one.
    lengths = np.geomspace(longest, shortest, cfg.ttt_buckets)[::-1]
    return [min(math.ceil(int(length) / 16) * 16, longest) for length in lengths]


@dataclasses.dataclass(eq=False)
class DocumentBatch:
    """Documents that adapt side by side, longest first, each with an adapter of its own.

    All tensors have R rows. Rows beyond the documents, if any, have no targets.
    """

    lengths: np.ndarray  # (R,) targets of each document
    counts: Tensor  # (R, 1) int64: the same on the device
    starts: Tensor  # (R, 1) int64: stream index of each document's first token
    master: LoRA  # fp32
    lora: LoRA  # read by the forward: the master itself, or rounded to the compute dtype
    moments: list[list[Tensor]]  # the optimiser's, for each leaf of the master
    rate_factors: list[Tensor]  # factors of the rate, for each leaf
    updates: int = 0  # number of updates so far

    @classmethod
    @torch.no_grad()
    def start(cls, cfg: Config, docs: Documents, batch: np.ndarray, master: LoRA) -> DocumentBatch:
        """The documents `batch` (n,) with new adapters `master`, which may have more rows."""
        device = master.down.device
        empty_rows = len(master.down) - len(batch)
        lengths = np.pad(docs.counts[batch], (0, empty_rows))
        starts = np.pad(docs.starts[batch], (0, empty_rows))
        num_moments = 2 if cfg.ttt_optimizer == "adam" and cfg.ttt_beta1 > 0 else 1
        moments = []
        for leaf in master.leaves:
            moments.append([torch.zeros_like(leaf) for _ in range(num_moments)])
        return cls(
            lengths=lengths,
            counts=to_device(lengths[:, None], device),
            starts=to_device(starts[:, None], device),
            master=master,
            lora=master.to(cfg.dtype),
            moments=moments,
            rate_factors=master.rate_factors(cfg.adapter_rate_factors),
        )

    def num_longer(self, index: int) -> int:
        """How many documents have more than `index` targets; they are the first rows."""
        return int((self.lengths > index).sum())


class WarmStart(NamedTuple):
    """The adapters' A of a batch, with which the next one begins (TTT_WARM_START_A, PR #1767).

    Rows are ordered by length, which depends on text to come. A is therefore handed on by place in
    the stream: the document in place p of the next batch takes over from place p of this one.
    """

    down: Tensor  # (R, sites, LoRA rank, C): the batch's own tensor, which goes on learning
    row_of_place: np.ndarray  # (R,) the row of the document in each place


class ChunkScores(NamedTuple):
    """The outcome of a forward over one chunk of several documents."""

    index: Tensor  # (n,) stream index of each scored target, the padding index where there is none
    nats: Tensor  # (n,) fp32, detached; (2, n) with the nats of hints
    grads: tuple[Tensor, ...]  # for each leaf of the adapters; empty if none of them learns


class Adaptation:
    """Scores documents chunk by chunk and teaches their adapters (PR #1530), on one rank.

    The network does not change. `begin` a batch of documents, then `run_chunk` for every chunk.
    """

    def __init__(
        self, model: GPT, forward: Callable, plan: tuple[Visit, ...], device: torch.device
    ):
        cfg = model.cfg
        self.cfg = cfg
        self.forward = forward
        self.plan = plan
        self.device = device
        # The number of documents at once is a multiple of it, so that few shapes are compiled.
        self.granule = 8 if cfg.compile else 1
        # Documents that end with a chunk need no gradient, so they are run apart from the others.
        # When compiled, one graph serves both.
        self.separates_learners = not cfg.compile
        self.update = torch.compile(adapter_update, dynamic=True) if cfg.compile else adapter_update
        self.buckets = window_buckets(cfg)
        self.max_tokens = 1 << 60  # that memory holds at once; no bound is known at first
        self.documents: DocumentBatch | None = None
        self.warm: WarmStart | None = None

    def whole_granules(self, count: int) -> int:
        """`count` documents, rounded up to a multiple of the granule."""
        return math.ceil(count / self.granule) * self.granule

    @torch.no_grad()
    def begin(self, docs: Documents, batch: np.ndarray) -> None:
        """Makes new adapters for the documents `batch` (n,), longest first."""
        cfg = self.cfg
        rows = self.whole_granules(len(batch))
        master = LoRA.zeros(cfg, rows, len(self.plan), self.device)
        if cfg.ttt_warm_start_a:
            # A document's place is its rank in the stream; empty rows keep their number as place.
            row_of_place = np.append(np.argsort(batch), np.arange(len(batch), rows))
            # The argsort of a permutation is its inverse.
            place_of_row = np.argsort(row_of_place)
            master.reset(cfg.seed, place_of_row.tolist())
            # Only the last batch of a phase is smaller, so there is an A for every place.
            if self.warm is not None and len(self.warm.down) >= rows:
                master.down.copy_(self.warm.down[self.warm.row_of_place[place_of_row]])
            self.warm = WarmStart(master.down, row_of_place)
        else:
            master.reset(cfg.seed, docs.starts[batch].tolist())
        self.documents = DocumentBatch.start(cfg, docs, batch, master)

    def learns_from(self, end: int) -> bool:
        """Whether documents learn from a chunk that ends at `end`; their own ends do not matter."""
        return self.cfg.ttt_min_doc_len <= end <= (self.cfg.ttt_max_doc_len or math.inf)

    def run_chunk(self, ledger: Ledger, start: int, end: int) -> None:
        """Scores the targets start..end-1 of all documents, then learns from them."""
        documents = self.documents
        live = self.whole_granules(documents.num_longer(start))
        learners = 0
        if self.separates_learners and self.learns_from(end):
            learners = documents.num_longer(end)
        # The longest documents come first, so those that go on after `end` are the first ones.
        for part in (range(learners), range(learners, live)):
            self.run_part(ledger, start, end, part)
        if self.learns_from(end):
            documents.updates += self.cfg.ttt_grad_steps

    def run_part(self, ledger: Ledger, start: int, end: int, part: range) -> None:
        """Runs the chunk start..end-1 of the documents in `part`, as many at once as memory holds.

        Raises torch.OutOfMemoryError if not even one granule fits.
        """
        tokens = min(end, self.cfg.ttt_eval_seq_len)  # per document
        first = part.start
        while first < part.stop:
            fitting = self.max_tokens // tokens // self.granule * self.granule
            count = min(part.stop - first, max(fitting, self.granule))
            rows = slice(first, first + count)
            try:
                scores = self.forward_chunk(ledger, start, end, rows)
            except torch.OutOfMemoryError:
                if count <= self.granule:
                    raise
                self.max_tokens = tokens * count // 2
                continue
            ledger.record(scores.index, scores.nats)
            if scores.grads:
                self.learn_chunk(ledger, start, end, rows, scores)
            first = rows.stop

    def chunk_windows(
        self, ledger: Ledger, start: int, end: int, rows: slice
    ) -> tuple[Batch, Tensor, Tensor]:
        """The windows in which the targets start..end-1 of these documents are scored, as one row.

        Each holds the TTT_EVAL_SEQ_LEN inputs before `end`, or as many as there are, and is padded
        to a bucket. Padding is a segment of its own. Returns the row and, for each scored target,
        its stream index (n,) and its position in the row (n,).
        """
        starts = self.documents.starts[rows]
        counts = self.documents.counts[rows]
        length = min(end, self.cfg.ttt_eval_seq_len)
        padded = next((bucket for bucket in self.buckets if bucket >= length), length)

        offset = torch.arange(end - length, end - length + padded, device=self.device)
        inside = (offset < counts) & (offset < end)  # (rows, padded)
        index = torch.where(inside, starts + offset, ledger.padding_index)
        next_index = (index + 1).clamp_max(ledger.padding_index)
        inputs = torch.where(inside, ledger.tokens[index], 0)
        targets = torch.where(inside & (offset >= start), ledger.tokens[next_index], -1)

        # First position of each window in the row, and of its padding.
        begin = torch.arange(0, index.numel(), padded, device=self.device)[:, None]
        cu_seqlens = torch.cat([begin, begin + length], 1).flatten()
        cu_seqlens = F.pad(cu_seqlens, (0, 1), value=index.numel()).int()
        batch = Batch(
            inputs.flatten().long(),
            targets.flatten().long(),
            cu_seqlens,
            self.cfg.ttt_eval_seq_len,
            ledger.hints_of(index.flatten(), index.numel()),
        )
        first_scored = length - (end - start)
        scored = torch.arange(first_scored, length, device=self.device)
        return batch, index[:, first_scored:length].flatten(), (begin + scored).flatten()

    def forward_chunk(self, ledger: Ledger, start: int, end: int, rows: slice) -> ChunkScores:
        """Nats of the targets start..end-1 of these documents, each with its own adapter.

        Also the gradient of the adapters, if any of these documents goes on after `end`: a document
        does not learn from its last chunk, because nothing is left to score.
        """
        lora = self.documents.lora.rows(rows)
        batch, index, select = self.chunk_windows(ledger, start, end, rows)
        goes_on = bool((self.documents.lengths[rows] > end).any())
        learns = self.learns_from(end) and goes_on
        with torch.set_grad_enabled(learns or not self.separates_learners):
            nats = self.forward(batch, self.plan, lora=lora, select=select)
        grads = ()
        if learns:
            # The second row, if there is one, holds the nats of hints.
            of_targets = nats if nats.ndim == 1 else nats[0]
            document_nats = of_targets.view(-1, end - start).mean(1)
            loss = (document_nats * (self.documents.counts[rows, 0] > end)).sum()
            grads = torch.autograd.grad(loss, lora.leaves)
        return ChunkScores(index, nats.detach(), grads)

    def learn_chunk(
        self, ledger: Ledger, start: int, end: int, rows: slice, scores: ChunkScores
    ) -> None:
        """Makes TTT_GRAD_STEPS updates from a scored chunk; `scores` has the first gradient."""
        grads = scores.grads
        for repeat in range(self.cfg.ttt_grad_steps):
            ledger.require_scored(scores.index)
            if repeat:
                grads = self.forward_chunk(ledger, start, end, rows).grads
            self.apply_gradients(grads, rows, self.documents.updates + repeat + 1)

    @torch.no_grad()
    def apply_gradients(self, grads: tuple[Tensor, ...], rows: slice, number: int) -> None:
        """Makes update `number`, from 1 on, of the adapters of these documents.

        Over TTT_COSINE_CHUNKS chunks, if set, the rate falls on a cosine to a tenth.
        """
        cfg = self.cfg
        documents = self.documents
        chunk = (number - 1) // cfg.ttt_grad_steps
        share = min(chunk / (cfg.ttt_cosine_chunks or math.inf), 1)
        rate = cfg.ttt_lora_lr * max(0.1, 0.5 + 0.5 * math.cos(math.pi * share))
        t = torch.full((), float(number), device=self.device)
        for i, grad in enumerate(grads):
            master = documents.master.leaves[i][rows]
            leaf = master
            if documents.lora.leaves[i] is not documents.master.leaves[i]:
                leaf = documents.lora.leaves[i][rows]
            moments = [moment[rows] for moment in documents.moments[i]]
            self.update(leaf, master, grad, moments, t, rate * documents.rate_factors[i], cfg)


def batch_size_factor(length: int, cfg: Config, world_size: int) -> float:
    """How many times TTT_BATCH_SIZE documents of about `length` targets run at once.

    Short documents, up to 1/8 of a window, fill the device badly, so four times as many run. Of
    long ones, above two windows, a quarter run if other ranks can take the rest.
    """
    if cfg.ttt_warm_start_a:
        return 1
    windows = length / cfg.ttt_eval_seq_len
    if windows <= 1 / 8:
        return 4
    if windows <= 2:
        return 1
    return 0.25 if world_size > 1 else 1


def plan_batches(
    docs: Documents, chosen: np.ndarray, cfg: Config, world_size: int = 1
) -> list[np.ndarray]:
    """Batches of the documents `chosen` (n,) that have targets, each batch longest first.

    A batch has documents of similar length. Batches of long documents come first, so that no rank
    waits at the end. With TTT_WARM_START_A batches keep the order of the stream, because each
    learns for later ones.
    """
    chosen = chosen[docs.counts[chosen] > 0]
    if not cfg.ttt_warm_start_a:
        chosen = chosen[np.argsort(-docs.counts[chosen], kind="stable")]
    batches = []
    while len(chosen):
        factor = batch_size_factor(docs.counts[chosen[0]], cfg, world_size)
        batch, chosen = np.split(chosen, [max(1, int(cfg.ttt_batch_size * factor))])
        batches.append(batch[np.argsort(-docs.counts[batch], kind="stable")])
    return batches


def score_then_learn(adaptation: Adaptation, batch: np.ndarray, ledger: Ledger) -> Iterator[int]:
    """Runs the documents `batch` (n,) chunk by chunk.

    Yields before each chunk how many targets of each document have been scored.
    """
    adaptation.begin(ledger.docs, batch)
    longest = int(ledger.docs.counts[batch].max())
    for start, end in chunk_grid(adaptation.cfg, longest):
        yield start
        adaptation.run_chunk(ledger, start, end)


def score_rest(scorer: Scorer, batch: np.ndarray, num_scored: int) -> None:
    """Scores the documents `batch` after their first `num_scored` targets, without learning."""
    docs = scorer.ledger.docs
    windows = []
    for document in batch:
        start, count = docs.starts[document], docs.counts[document]
        if count > num_scored:
            scorer.ledger.num_not_learnt_from += 1
            scorer.ledger.num_not_adapted += 1
        windows += scorer.text_windows(start, count, stride=0, first=start + num_scored)
    scorer.score_windows(windows, shared=False)


def adapt_documents(
    adaptation: Adaptation, scorer: Scorer, first: int, stop: int, deadline: Deadline
) -> None:
    """Scores the documents first..stop-1 once, and teaches their adapters.

    Ranks take batches from a shared counter; with TTT_WARM_START_A each has a fixed share. When the
    deadline is near, a rank scores the rest of its batch and all later batches without learning.
    """
    ledger = scorer.ledger
    cfg = scorer.cfg
    ranks = scorer.ranks
    counts = ledger.docs.counts
    batches = plan_batches(ledger.docs, np.arange(first, stop), cfg, ranks.world_size)
    # The number of targets after each batch, with those of later phases.
    in_batches = np.array([counts[batch].sum() for batch in batches], dtype=np.int64)
    left_after = counts[stop:].sum() + in_batches.sum() - in_batches.cumsum()
    if cfg.ttt_warm_start_a:
        numbers = range(ranks.rank, len(batches), ranks.world_size)
    else:
        numbers = takewhile(lambda n: n < len(batches), ranks.tickets())
    for number in numbers:
        batch = batches[number]
        done = 0
        if not deadline.late:
            for done in score_then_learn(adaptation, batch, ledger):
                in_batch = (counts[batch] - done).clip(0).sum()
                if deadline.must_stop(in_batch + left_after[number] / ranks.world_size):
                    break
                scorer.show_progress("ttt_progress", "adapt", deadline.seconds_left())
        if deadline.late:
            score_rest(scorer, batch, done)


# --- All weights ---
class LearningChunk(NamedTuple):
    """Scored targets that all weights learn from at once."""

    index: np.ndarray  # (n,) stream index of each target
    share: float  # the share of the rate's cosine schedule that is done, in [0, 1]


class LearningTask(NamedTuple):
    """The chunks that all weights learn from between two parts of an evaluation."""

    targets_left: int  # to score after it
    chunks: list[LearningChunk]


def phase_stops(counts: np.ndarray, cfg: Config) -> list[int]:
    """How many documents of the stream are scored before each place where all weights learn.

    counts: (docs,) targets of each document. The places are even, in documents or, with
    PHASED_TTT_PREFIX_TOKENS, in targets: then each comes after the document that reaches its share.
    A number of targets means the same amount of learning in any order of documents; the first 2,500
    of a stream hold a quarter of the text that the 2,500 longest ones hold.
    """
    phases = cfg.phased_ttt_num_phases
    if not cfg.phased_ttt_prefix_tokens:
        prefix = min(cfg.phased_ttt_prefix_docs, len(counts))
        return [prefix * phase // phases for phase in range(1, phases + 1)]
    ends = counts.cumsum()
    prefix = min(cfg.phased_ttt_prefix_tokens, int(ends[-1]))
    shares = [prefix * phase / phases for phase in range(1, phases + 1)]
    return [int(np.searchsorted(ends, share)) + 1 for share in shares]


def score_documents(
    adaptation: Adaptation, scorer: Scorer, deadline: Deadline
) -> Iterator[LearningTask]:
    """Scores each document with its own adapter, and yields the chunks for all weights.

    With PHASED_TTT_NUM_PHASES all weights learn (PR #1626) from the documents up to a point in the
    stream, before any document after it is scored. So scores only depend on earlier text. The
    published queue runs the longest document first, so its scores also depend on later text.
    """
    cfg = scorer.cfg
    docs = scorer.ledger.docs
    num_docs = len(docs.counts)
    settings = f"rank:{cfg.ttt_lora_rank} lr:{cfg.ttt_lora_lr} chunk:{cfg.ttt_chunk_size}"
    scorer.log(f"ttt_lora:docs:{num_docs} {settings}")
    if cfg.ttt_warm_start_a or cfg.phased_ttt_num_phases:
        scorer.log(
            "ttt_lora:a document's score depends on earlier documents of the stream"
            f" (TTT_WARM_START_A={int(cfg.ttt_warm_start_a)},"
            f" PHASED_TTT_NUM_PHASES={cfg.phased_ttt_num_phases})"
        )
    stops = phase_stops(docs.counts, cfg)
    first = 0
    for stop in [*stops, num_docs]:
        adapt_documents(adaptation, scorer, first, stop, deadline)
        first = stop
        # A phase begins with fresh adapters.
        adaptation.warm = None
        # After the last document there is nothing left to learn for.
        index = docs.target_indices(stop if stop < num_docs else 0)
        size = cfg.ttt_chunk_tokens
        chunks = []
        for start in range(0, len(index) - size + 1, size):
            chunks.append(LearningChunk(index[start : start + size], start / len(index)))
        yield LearningTask(int(docs.counts[stop:].sum()), chunks)


def windows_by_chunk(scorer: Scorer, index: np.ndarray) -> list[list[Window]]:
    """Scoring windows of the stream for each chunk of TTT_CHUNK_TOKENS of the targets `index` (n,).

    A window that scores targets of several chunks appears in each with that chunk's part of them.
    """
    cfg = scorer.cfg
    size = cfg.ttt_chunk_tokens
    stride = cfg.eval_stride if cfg.sliding_window_enabled else 0
    by_chunk = [[] for _ in range(0, len(index), size)]
    for start, first_scored, end in scorer.stream_windows(stride):
        # Counted along `index`, the window scores targets first..last. With size 100, 90..209 are
        # divided so: 90..99 go to chunk 0, 100..199 to chunk 1, 200..209 to chunk 2.
        first = int(np.searchsorted(index, first_scored))
        last = first + end - first_scored - 1
        for k in range(first // size, last // size + 1):
            part_start = max(first_scored, first_scored + k * size - first)
            part_end = min(end, first_scored + (k + 1) * size - first)
            by_chunk[k].append((start, part_start, part_end))
    return by_chunk


def score_chunks(scorer: Scorer, deadline: Deadline) -> Iterator[LearningTask]:
    """Scores the stream chunk by chunk, and yields each chunk but the last for all weights.

    TTT_MODE=chunk (PR #461, #1413). With SLIDING_WINDOW_ENABLED windows lie EVAL_STRIDE apart. Once
    the deadline is near, the rest is scored at once in plain windows.
    """
    ledger = scorer.ledger
    size = scorer.cfg.ttt_chunk_tokens
    index = ledger.docs.target_indices()
    *earlier, windows_of_last = windows_by_chunk(scorer, index)
    last = len(earlier)
    for k, windows in enumerate(earlier):
        scorer.score_windows(windows, shared=True)
        left = index[(k + 1) * size :]
        yield LearningTask(len(left), [LearningChunk(index[k * size : (k + 1) * size], k / last)])
        # While this function waited, all weights learnt, or found that there is no time left.
        if deadline.late:
            scorer.score_windows(scorer.stream_windows(stride=0, first=left[0]), shared=True)
            if scorer.ranks.is_main:
                ledger.num_not_learnt_from += last - k - 1
            return
    scorer.score_windows(windows_of_last, shared=True)


def evaluate_ttt(
    scorer: Scorer,
    adaptation: Adaptation | None,
    model: GPT,
    forward: Callable,
    deadline: Deadline,
) -> Ledger:
    """Scores every target once while learning, with adapters (`adaptation`) or in chunk mode.

    All weights learn from the yielded chunks, alike on all ranks, at a rate that falls on a cosine.
    At the end they are restored. Returns the joined ledger. All ranks must call it.
    """
    cfg = scorer.cfg
    ranks = scorer.ranks
    weights = list(model.parameters())
    saved = [p.detach().clone() for p in weights]
    if cfg.ttt_chunk_optimizer == "adam":
        betas = (cfg.beta1, cfg.beta2)
        optimizer = torch.optim.AdamW(weights, betas=betas, weight_decay=0)
    else:
        optimizer = torch.optim.SGD(weights, momentum=cfg.ttt_momentum)

    # Otherwise a compiled backward of the adapters would compute the gradients of all weights, too.
    model.requires_grad_(False)
    if adaptation:
        tasks = score_documents(adaptation, scorer, deadline)
    else:
        tasks = score_chunks(scorer, deadline)
    for task in tasks:
        for chunk in task.chunks:
            if deadline.must_stop(task.targets_left / ranks.world_size, ranks):
                if ranks.is_main:
                    scorer.ledger.num_not_learnt_from += 1
            else:
                rate = 0.5 * cfg.ttt_lr * (1 + math.cos(math.pi * chunk.share))
                optimizer.param_groups[0]["lr"] = rate
                learn_weights(model, forward, optimizer, scorer, chunk.index)
        if adaptation:
            # Each phase starts with fresh momenta.
            optimizer.state.clear()

    model.requires_grad_(True)
    torch._foreach_copy_([p.detach() for p in weights], saved)
    return scorer.ledger.join(ranks)


def learning_row(scorer: Scorer, index: np.ndarray) -> Batch:
    """A row that predicts the targets `index` (n,), in segments of at most EVAL_SEQ_LEN.

    With DATA_LOADER=documents segments also begin with documents.
    """
    docs = scorer.ledger.docs
    length = scorer.cfg.eval_seq_len
    starts = np.arange(0, len(index), length)
    if scorer.cfg.data_loader == "documents":
        starts = np.union1d(starts, np.flatnonzero(np.isin(index, docs.starts)))
    capacity = max(64, 1 << len(starts).bit_length())
    shape = RowShape(len(index), capacity, length)
    tokens = docs.tokens
    return pack_row(tokens[index], tokens[index + 1], starts, shape, scorer.ranks.device)


def sum_gradients(model: GPT, ranks: Ranks) -> None:
    """Sums the gradients over the ranks, in place. All ranks must call it; one without adds 0."""
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        ranks.sum(p.grad)


def freeze_first_layers(model: GPT) -> None:
    """Zeroes the gradients of the first TTT_FREEZE_BLOCKS layers, in place."""
    cfg = model.cfg
    table = parameter_table(cfg)
    for name, p in model.named_parameters():
        role = table[name]
        if role.per_layer:
            by_layer = p.grad.unflatten(0, (role.stacks, cfg.num_layers))
            by_layer[:, : cfg.ttt_freeze_blocks] = 0


def learn_weights(
    model: GPT,
    forward: Callable,
    optimizer: torch.optim.Optimizer,
    scorer: Scorer,
    index: np.ndarray,
) -> None:
    """Updates all weights, in place, in TTT_EPOCHS passes over the scored targets `index` (n,).

    A step takes TTT_BATCH_SEQS rows of EVAL_SEQ_LEN targets from each rank. A remainder that does
    not fill a row is left out. All ranks must call it.
    """
    cfg = scorer.cfg
    ranks = scorer.ranks
    length = cfg.eval_seq_len
    scorer.ledger.require_scored(to_device(index, ranks.device), ranks)
    rows = index[: len(index) // length * length].reshape(-1, length)
    step_rows = cfg.ttt_batch_seqs * ranks.world_size
    steps = [rows[first : first + step_rows] for first in range(0, len(rows), step_rows)]

    model.requires_grad_(True)
    for step in steps * cfg.ttt_epochs:
        rank_index = step[ranks.rank :: ranks.world_size].ravel()
        if len(rank_index):
            nats = forward(learning_row(scorer, rank_index), scorer.plan)
            (nats.sum() / step.size).backward()
        sum_gradients(model, ranks)
        freeze_first_layers(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.ttt_grad_clip or math.inf)
        optimizer.step()
        model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


# === 11. Run: its phases in order, each leaving a file ============================================
# Errors from reading a file that no run of this program wrote.
FOREIGN_FILE_ERRORS = (
    OSError,
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    NotImplementedError,
    MemoryError,
    RecursionError,
    OverflowError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def why_unreadable(error: Exception, otherwise: str) -> str:
    """Why a file is refused, by one of FOREIGN_FILE_ERRORS; `otherwise` if it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ForeignValue):
        return str(error)
    if is_lack_of_memory(error):
        return "there is not enough memory to read it"
    return otherwise


def load_torch(data: bytes) -> dict[str, Any]:
    """The dict in a file that torch.save has written. Raises one of FOREIGN_FILE_ERRORS.

    torch.save never compresses, so what is small cannot become large.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > len(data):
            raise ForeignValue("is compressed")
    with warnings.catch_warnings():
        # Torch warns of kinds of tensors that are refused anyway.
        warnings.simplefilter("ignore")
        saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if type(saved) is not dict:
        raise ForeignValue("holds no dict")
    return saved


def read_model_file(path: Path) -> dict[str, Any]:
    """The fields of a weights file (final_model.pt), or of an artifact's header, with `arrays`.

    A weights file is what Run.save_weights writes. A run's own checkpoint is another kind of file,
    which only read_checkpoint reads. Raises UsageError for a file that is neither or is a damaged
    artifact, and one of FOREIGN_FILE_ERRORS for what torch.load refuses.
    """
    with open_regular(path) as file:
        # A weights file is a zip file; a run's own checkpoint begins with its SHA-256.
        is_zip = file.read(2) == b"PK"
    if is_zip:
        return load_torch(read_regular(path, MAX_WEIGHTS_BYTES))
    header, arrays = open_artifact(read_regular(path, MAX_ARTIFACT_BYTES), path)
    return {**header, "arrays": arrays}


def reasons_to_refuse(
    name: str, cfg: Config, asked: Config, origin: dict[str, str], saved: dict[str, Any]
) -> list[str]:
    """Why a model file cannot be used, a line for each reason; empty if it can.

    name: stands for the file in messages. cfg: the config with the file's network. asked: the
    config that the environment asks for.
    """
    differences = []
    for field in NETWORK_FIELDS:
        value = getattr(cfg, field)
        if origin[field] == "env" and getattr(asked, field) != value:
            differences.append(f"{field.upper()}={value}")
    if differences:
        return [f"{name}: was made with {', '.join(differences)}"]
    if problems := cfg.problems():
        return problems
    if "weights" in saved:
        shapes = {n: tuple(w.shape) for n, w in saved["weights"].items()}
        expected = {n: role.shape for n, role in parameter_table(cfg).items()}
        if shapes != expected:
            return [f"{name}: was made with another network than its config says"]
    return []


def load_model_file(cfg: Config, origin: dict[str, str]) -> tuple[Config, dict[str, Any]]:
    """The config with the network of EVAL_ONLY_PATH, and the fields of that file.

    The fields are those of `read_model_file`. Raises UsageError if the file is neither a file of
    weights nor an artifact, or if the environment asks for another network than the file has.
    """
    path = Path(cfg.eval_only_path)
    name = f"EVAL_ONLY_PATH={cfg.eval_only_path}"
    try:
        saved = read_model_file(path)
        has_both = "weights" in saved and "arrays" in saved
        if has_both or type(saved.get("looped", True)) is not bool:
            raise TypeError("fields that no run writes")
        check_weights(saved.get("weights", {}))
        file_cfg = dataclasses.replace(cfg, **read_network_config(saved["config"]))
        reasons = reasons_to_refuse(name, file_cfg, cfg, origin, saved)
    except UsageError:
        raise
    except FOREIGN_FILE_ERRORS as error:
        reason = why_unreadable(error, "neither an artifact nor a weights file of train_gpt.py")
        raise UsageError(f"{name}: {reason}") from error
    if reasons:
        raise UsageError("\n".join(reasons))
    return file_cfg, saved


def configure_torch(cfg: Config) -> None:
    """Sets how PyTorch draws random numbers, multiplies and compiles, before there is a model."""
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high" if cfg.compute_dtype == "bf16" else "highest")
    # Training, scoring and adaptation share GPT.forward, each with graphs of its own.
    torch._dynamo.config.recompile_limit = 64
    # Integer and float arguments are settings that do not change; only sizes vary.
    torch._dynamo.config.specialize_int = True
    torch._dynamo.config.specialize_float = True
    # Every size gets a symbol of its own, though in warm-up some are equal by chance.
    torch.fx.experimental._config.use_duck_shape = False


def faster_dtype(device: torch.device) -> tuple[str, str]:
    """COMPUTE_DTYPE for a device, and a line for the log: fp32 on a CPU that is slow in bf16.

    A CPU computes a small product in both. All else in a step costs a little more in bf16, so its
    products must take less than .4 of the time. With AMX they take .15, without instructions for
    bf16 many times as long.
    """
    if device.type != "cpu":
        return "bf16", "compute_dtype: bf16 (this device is made for it)"
    matrices = [torch.ones(512, 512, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    seconds = [math.inf, math.inf]
    # Several threads would wait for one another where other programs run.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    begin = time.monotonic()
    for turn in range(20):
        for i, matrix in enumerate(matrices):
            start = time.monotonic()
            torch.mm(matrix, matrix)
            seconds[i] = min(seconds[i], time.monotonic() - start)
        # Without instructions for bf16 the product takes a tenth of a second.
        if turn > 1 and time.monotonic() - begin > 0.5:
            break
    torch.set_num_threads(threads)
    ratio = seconds[0] / seconds[1]
    chosen = "bf16" if ratio < 0.4 else "fp32"
    return chosen, f"compute_dtype: {chosen} (a product in bf16 takes {ratio:.2f} of that in fp32)"


def resolve_dtype(
    cfg: Config, device: torch.device, earlier_log: Path | None = None
) -> tuple[Config, list[str]]:
    """The config with COMPUTE_DTYPE=auto replaced, and lines for the log.

    earlier_log: of a run of this name that may go on; it keeps the dtype that it has measured.
    """
    if cfg.compute_dtype != "auto":
        return cfg, []
    chosen = ""
    if earlier_log:
        with contextlib.suppress(OSError):
            text = read_regular(earlier_log, MAX_LOG_BYTES).decode(errors="replace")
            found = re.findall(r"^  compute_dtype: (bf16|fp32) \(measured\)$", text, re.M)
            chosen = found[-1] if found else ""
    line = f"compute_dtype: {chosen} (as this run began)"
    if not chosen:
        chosen, line = faster_dtype(device)
    return dataclasses.replace(cfg, compute_dtype=chosen), [line]


def compile_any_size(model: nn.Module) -> Callable:
    """The compiled forward of adaptation: one graph for all sizes."""
    options = {}
    # With this reduction there would be a second graph, for few tokens. Older versions lack it.
    if "triton.mix_order_reduction" in torch._inductor.list_options():
        options["triton.mix_order_reduction"] = False
    return torch.compile(model, fullgraph=True, dynamic=True, options=options)


class Phase(NamedTuple):
    """A phase of a run that is over."""

    name: str
    # "train" or "eval", the budget that it counts against, or "none".
    budget: str
    # Without the seconds of the phases within it.
    seconds: float


class Stage(enum.IntEnum):
    """How far a run has come."""

    # Training has not ended.
    NOTHING = 0
    # There are the exported weights, final_model.pt.
    TRAINED = 1
    # There is the artifact.
    PACKED = 2


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from: nothing, its own newest checkpoint, or the file of EVAL_ONLY_PATH."""

    stage: Stage = Stage.NOTHING
    # Whether it is the file of EVAL_ONLY_PATH.
    from_file: bool = False
    # The exported weights; None before the end of training, and for an artifact.
    weights: dict[str, Tensor] | None = None
    # Whether the layers were looped when training ended; None if unknown.
    looped: bool | None = None
    # What Trainer.save_checkpoint saved, if the checkpoint was made during training.
    training: dict[str, Any] | None = None
    # The hash of the tokenizer that the file was made with; empty if unknown.
    tokenizer_sha256: str = ""

    @property
    def is_artifact(self) -> bool:
        """Whether the run only scores and adapts an artifact; then it needs no training data."""
        return self.from_file and self.stage == Stage.PACKED

    @classmethod
    def from_model_file(cls, saved: dict[str, Any]) -> Start:
        """From the fields that `load_model_file` returns."""
        return cls(
            stage=Stage.PACKED if "arrays" in saved else Stage.TRAINED,
            from_file=True,
            weights=saved.get("weights"),
            looped=saved.get("looped"),
            tokenizer_sha256=saved.get("tokenizer", ""),
        )


def read_checkpoint(path: Path, made_with: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The contents of a checkpoint of `Run.save_checkpoint`, and the reason to refuse it.

    It is refused if it is damaged or was made with other values than `made_with`; otherwise the
    reason is empty.
    """
    try:
        data = read_regular(path, MAX_WEIGHTS_BYTES)
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            return {}, "damaged"
        saved = load_torch(data[32:])
        check_checkpoint(saved)
    except FOREIGN_FILE_ERRORS as error:
        return {}, why_unreadable(error, "holds what no run writes")
    differences = []
    for key in sorted(saved["made_with"].keys() | made_with.keys()):
        value = saved["made_with"].get(key)
        if made_with.get(key) != value:
            differences.append(f"made with {key}={value}")
    return saved, ", ".join(differences)


CHECKPOINT = {
    "number": WHOLE,
    "made_with": {},
    "start": {"stage": Entry("a stage", lambda v: v in list(Stage))},
    "final": {"*": Entry("a number or a text", lambda v: NUMBER.fits(v) or type(v) is str)},
}


def check_checkpoint(saved: dict[str, Any]) -> None:
    """Raises ForeignValue unless a checkpoint has the fields and types that a run writes."""
    if fault := fault_in(saved, CHECKPOINT):
        raise ForeignValue(fault)
    for name, budget, seconds in saved["phases"]:
        if not (type(name) is type(budget) is str and NUMBER.fits(seconds)):
            raise ForeignValue(f"phases holds {name!a}")
    start = Start(**saved["start"])
    check_weights(start.weights or {})
    if start.looped not in (None, False, True):
        raise ForeignValue("looped must be a truth value")
    if start.training is not None:
        check_plain("training", start.training, (*FLOATS, torch.int64, torch.int32, torch.uint8))
        for key, value in TrainState(**start.training["state"]).__dict__.items():
            # Only two fields are truth values.
            wanted = (bool,) if key in ("looped", "rounded") else (int, float)
            if type(value) not in wanted:
                raise ForeignValue(f"state.{key} is {value!a}")


def has_final_line(log: Path) -> bool:
    """Whether a log holds a run's result."""
    if not log.exists():
        return False
    with open_regular(log) as file:
        return any(line.startswith(b"final ") and line.endswith(b"\n") for line in file)


# The labels of scores in the log, as PR #1530's script has them, by the keys of the final line. The
# last one also stands for learning by chunks (TTT_MODE=chunk), which has no adapters.
SCORE_LABELS = {
    "pre_quantization": "diagnostic pre-quantization post-ema",
    "quantized": "diagnostic quantized",
    "quantized_sliding_window": "diagnostic quantized_sliding_window",
    "quantized_ttt_lora": "quantized_ttt_lora",
}


class Run:
    """One run on one rank, from its data to its report.

    The constructor checks everything that can be wrong and opens the data; `go` goes through the
    phases. All ranks must call the same methods in the same order. `open_data` sets streams,
    tokenizer, docs, table (bytes of each token) and decoded (bytes of the documents, decoded);
    `build_model` sets model, forwards and optimizers.
    """

    def __init__(
        self, cfg: Config, origin: dict[str, str], ranks: Ranks, early_warnings: Iterable[str] = ()
    ):
        """Raises UsageError on all ranks if one of them finds something wrong.

        origin: where each field of `cfg` comes from, as Config.from_env returns it.
        early_warnings: for the log, before those of the config.
        """
        self.ranks = ranks
        self.start = Start()
        lines = []
        if cfg.compute_dtype == "auto":
            earlier = Path(f"logs/{cfg.run_id}.txt") if cfg.run_id else None
            cfg, lines = ranks.gather(resolve_dtype(cfg, ranks.device, earlier))[0]
            origin = {**origin, "compute_dtype": "measured"}
        self.cfg = cfg
        # The figures of the final line, and the phases that are over.
        self.final: dict[str, Any] = {}
        self.phases: list[Phase] = []
        # The artifact, if its file could not be written.
        self.unsaved_artifact: bytes | None = None
        # Seconds that do not count against the phase that is running.
        self.excluded_seconds = 0.0
        # CUDA graphs of the training, by plan.
        self.graphs: dict[tuple[Visit, ...], Callable] = {}
        self.tuner = TileTuner()
        use_tuner(self.tuner)
        with self.phase("check", budget="none"):
            lines += self.check_together(origin)

        cfg = self.cfg
        run_id = self.claim_names(lines)
        self.folder = Path(cfg.artifact_dir or f"runs/{run_id}")
        self.artifact = self.folder / "final_model.int6.ptz"
        log_path = Path(f"logs/{run_id}.txt")
        self.facts = self.describe(run_id)
        self.made_with = self.checkpoint_identity()
        self.checkpoint_number = -1
        lines += self.load_checkpoint(log_path)
        self.looped = cfg.num_loops > 0 and cfg.enable_looping_at < 1
        if self.start.looped is not None:
            self.looped = self.start.looped

        board = f"{cfg.tensorboard_dir}/{run_id}" if cfg.tensorboard_dir else ""
        self.log = Log(log_path, ranks.is_main, ranks.live, board)
        self.compilation_counter = CompilationCounter(self.log)
        self.log_settings(origin, lines, early_warnings)
        problem = self.log.open_wandb(cfg.wandb_project, run_id, dataclasses.asdict(cfg))
        if problem := ranks.gather(problem)[0]:
            raise UsageError(problem)

    @property
    def plan(self) -> tuple[Visit, ...]:
        """The order of layers at the end of training, which scoring and adaptation use."""
        return self.cfg.plans[self.looped]

    # --- Before the phases ---
    def claim_names(self, lines: list[str]) -> str:
        """The run's name; no other process can use it or write to its folder until this run ends.

        Adds to the lines for the log. Raises UsageError if another process uses them. All ranks
        must call it.
        """
        self.locks: list[FileLock] = []
        run_id = problem = ""
        if self.ranks.is_main:
            try:
                run_id = self.lock_names()
            except UsageError as error:
                problem = str(error)
            except OSError as error:
                problem = reason_of(error)
        lines += [f"warning: {lock.reason}" for lock in self.locks if lock.reason]
        run_id, problem = self.ranks.gather((run_id, problem))[0]
        if problem:
            raise UsageError(problem)
        return run_id

    def lock_names(self) -> str:
        """Locks name and folder of the run on rank 0; returns the name.

        Without RUN_ID it is date, preset and seed, with a number if another run has that name.
        """
        cfg = self.cfg
        default_id = f"{time.strftime('%Y%m%d-%H%M%S')}_{cfg.preset}_seed{cfg.seed}"
        run_id = cfg.run_id or default_id
        number = 1
        while not self.lock(Path(f"logs/{run_id}.lock")) or (
            not cfg.run_id and os.path.lexists(f"logs/{run_id}.txt")
        ):
            if cfg.run_id:
                raise UsageError(f"RUN_ID={run_id}: {self.locks[-1].holder} is running it")
            self.locks.pop().release()
            number += 1
            run_id = f"{default_id}_{number}"
        folder = Path(cfg.artifact_dir or f"runs/{run_id}")
        if not self.lock(folder / "run.lock"):
            holder = self.locks[-1].holder
            self.release_locks()
            raise UsageError(f"ARTIFACT_DIR={cfg.artifact_dir}: {holder} writes to {folder}")
        return run_id

    def lock(self, path: Path) -> bool:
        """Adds a lock to those of this run; whether it was free."""
        self.locks.append(FileLock(path))
        return self.locks[-1].take()

    def release_locks(self) -> None:
        """Lets another run have the name and the folder."""
        for lock in self.locks:
            lock.release()

    def check_together(self, origin: dict[str, str]) -> list[str]:
        """Calls `check` on all ranks; if one raises UsageError, all do.

        Otherwise the others would wait for the one that has left. Returns lines for the log.
        """
        lines = []
        problem = None
        self.decoded = 0
        try:
            lines = self.check(origin)
        except UsageError as error:
            problem = str(error)
        except OSError as error:
            problem = reason_of(error)
        for message in self.ranks.gather(problem):
            if message:
                raise UsageError(message)
        self.decoded = sum(self.ranks.gather(self.decoded))
        if not self.decoded:
            path = self.streams["val"].paths[0]
            raise UsageError(f"{path}: the validation documents hold no text to score")
        return lines

    def check(self, origin: dict[str, str]) -> list[str]:
        """Checks the model file and the data, and chooses the attention; returns lines for the log.

        Raises UsageError if something is wrong.
        """
        check_paths(self.cfg)
        if self.cfg.eval_only_path:
            self.cfg, saved = load_model_file(self.cfg, origin)
            self.start = Start.from_model_file(saved)
        self.check_world_size()
        self.open_data()
        self.backend, lines = choose_attention(
            self.cfg.attention_backend, self.ranks.device, self.cfg.dtype
        )
        for name, stream in self.streams.items():
            lines.append(f"{name}_shards: {len(stream.paths)} {name}_tokens: {stream.size}")
        if self.docs.bytes is not None:
            lines.append("val_bytes: counted by the side-car")
        return lines

    def check_world_size(self) -> None:
        """Raises UsageError if a rank would have no row of a training step."""
        world_size, rows = self.ranks.world_size, self.cfg.rows_per_step
        if not self.start.from_file and world_size > rows:
            tokens = world_size * self.cfg.micro_batch_tokens
            raise UsageError(
                f"WORLD_SIZE={world_size}: must be at most {rows}, the rows of a step;"
                f" TRAIN_BATCH_TOKENS={tokens} has a row for each"
            )

    def open_data(self) -> None:
        """Opens and checks shards, tokenizer and validation documents; raises UsageError.

        Sets `decoded` to the bytes of this rank's part of the documents, counted by decoding them.
        """
        cfg, ranks = self.cfg, self.ranks
        # Shards come before the tokenizer: if all data is missing, the message should say so.
        splits = ["val"] if self.start.is_artifact else ["val", "train"]
        self.streams = {split: TokenStream(cfg.dataset_dir, split) for split in splits}
        self.tokenizer = Tokenizer.load(cfg)
        if self.start.tokenizer_sha256 not in ("", self.tokenizer.sha256):
            raise UsageError(
                f"EVAL_ONLY_PATH={cfg.eval_only_path}: {self.tokenizer.path} is not its tokenizer"
            )
        check_shards(cfg, self.tokenizer, ranks, self.streams)
        self.docs = Documents.load(self.streams["val"], self.tokenizer.bos_id, cfg)
        self.table, self.decoded = check_bytes(self.tokenizer, self.docs, ranks)

    def describe(self, run_id: str) -> dict[str, Any]:
        """The facts that the log and the final line state: code, data, machine, versions."""
        cfg, ranks = self.cfg, self.ranks
        preset = f"{cfg.preset} shrunk" if cfg.shrink else cfg.preset
        if ranks.device.type == "cuda":
            device = torch.cuda.get_device_name()
        else:
            device = f"CPU, {os.cpu_count()} cores"
        val_tokens = self.docs.joined_tokens().astype("<u2")
        sidecar = {}
        if self.docs.bytes is not None:
            counts = self.docs.join(self.docs.bytes).astype("<u2")
            sidecar = {"sidecar_sha256": hashlib.sha256(counts.tobytes()).hexdigest()}
        return {
            "run_id": run_id,
            "preset": preset,
            "seed": cfg.seed,
            "world_size": ranks.world_size,
            "device": device,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "dataset": cfg.dataset_dir.name,
            "code_sha256": CODE_SHA256,
            "file_sha256": hashlib.sha256(SOURCE).hexdigest(),
            "code_bytes": CODE_BYTES,
            "attention": self.backend,
            "val_docs": len(self.docs.counts),
            "tokenizer_sha256": self.tokenizer.sha256,
            "val_sha256": hashlib.sha256(val_tokens.tobytes()).hexdigest(),
            **sidecar,
        }

    def log_settings(
        self, origin: dict[str, str], lines: list[str], early_warnings: Iterable[str]
    ) -> None:
        """Begins the log with the source, all settings, the facts, `lines` and all warnings.

        A resumed run's log has the source already.
        """
        source = "" if self.checkpoint_number >= 0 else TEXT
        self.log(f"{source}\nHyperparameters:", terminal=False)
        for field, value in sorted(dataclasses.asdict(self.cfg).items()):
            self.log(f"  {field}: {value} ({origin[field]})", terminal=origin[field] == "env")
        facts = [f"{key}: {value}" for key, value in self.facts.items()]
        self.log("\n".join(facts + lines))
        if self.cfg.tilt_order:
            self.log(
                "tilt: the conditional of a target is a function of the artifact and of the"
                " targets before it in the stream; scores of documents depend on earlier documents"
            )
        idle = self.cfg.warnings_of_idle_knobs(origin)
        for warning in (*early_warnings, *idle, *self.cfg.warnings()):
            self.log(f"warning: {warning}")

    # --- Checkpoints ---
    def checkpoint_identity(self) -> dict[str, Any]:
        """Code, data and all settings that change results: a checkpoint must agree with them."""
        identity = {}
        for field, value in dataclasses.asdict(self.cfg).items():
            if field not in FREE_FIELDS:
                identity[field] = value
        for key in ("code_sha256", "tokenizer_sha256", "val_sha256"):
            identity[key] = self.facts[key]
        identity["tokens"] = sum(stream.size for stream in self.streams.values())
        return identity

    def load_checkpoint(self, log: Path) -> list[str]:
        """Starts from this run's newest usable checkpoint, or anew with a new log.

        The checkpoint of rank 0 counts. Returns lines for the log. Raises UsageError if the log
        holds a result already, or if there are checkpoints and none can be used. All ranks must
        call it.
        """
        newest = {}
        refusals = []
        if self.ranks.is_main:
            if has_final_line(log):
                refusals = [
                    f"RUN_ID={self.cfg.run_id}: {log} has its result already; choose another name"
                ]
            elif self.cfg.checkpoint_every:
                newest, refusals = self.find_checkpoint()
        # Only rank 0 reads files: nodes may not share folders.
        newest, lines = self.ranks.gather((newest, refusals))[0]
        if lines and not newest:
            raise UsageError("\n".join(lines))

        if newest:
            self.start = Start(**newest["start"])
            self.checkpoint_number = newest["number"]
            self.final = newest["final"]
            self.final["resumed"] = self.final.get("resumed", 0) + 1
            self.phases += [Phase(*phase) for phase in newest["phases"]]
            lines.append(f"resumed: from checkpoint {self.checkpoint_number}")
        elif self.ranks.is_main and log.exists():
            # A run of this name did not reach its end.
            log.replace(f"{log}.old")
        return lines

    def find_checkpoint(self) -> tuple[dict[str, Any], list[str]]:
        """The newest usable checkpoint in the run's folder, and a line for each refused one.

        Removes half-written files that a killed run has left.
        """
        for part in self.folder.glob("*.part"):
            part.unlink()
        newest = {}
        refusals = []
        for path in self.folder.glob("checkpoint.[01].pt"):
            saved, reason = read_checkpoint(path, self.made_with)
            if reason:
                refusals.append(f"{path}: refused: {reason}")
            elif saved["number"] > newest.get("number", -1):
                newest = saved
        return newest, refusals

    def save_checkpoint(self, stage: Stage, **contents: Any) -> None:
        """Saves what the run needs to go on from `stage`, if CHECKPOINT_EVERY is set.

        The folder holds two checkpoints, and this one replaces the older. The file is a SHA-256 of
        32 bytes, then a dict saved by torch:

            number      of the checkpoint in this run, from 0
            made_with   code, data and settings, see `checkpoint_identity`
            start       fields of `Start`: `stage` and `contents`
            phases      those that are over and count against a budget
            final       the figures so far

        The contents by stage:

            NOTHING     training: state (the fields of TrainState; the position in the data is its
                        `tokens`), optimizers (Optimizers.state_dict, weights and average included)
                        and random (PyTorch's random state)
            TRAINED     weights (those exported) and looped
            PACKED      weights (after PRUNE_FRAC) and looped; the artifact is a file of its own

        All ranks must call it.
        """
        if not self.cfg.checkpoint_every:
            return
        self.checkpoint_number += 1
        # Rank 0 alone knows whether the artifact could be written.
        is_incomplete = stage == Stage.PACKED and self.unsaved_artifact is not None
        if self.ranks.is_main and not is_incomplete:
            saved = {
                "number": self.checkpoint_number,
                "made_with": self.made_with,
                "start": {"stage": int(stage), **contents},
                "phases": [tuple(phase) for phase in self.phases if phase.budget != "none"],
                "final": self.final,
            }
            body = torch_bytes(saved)
            path = self.folder / f"checkpoint.{self.checkpoint_number % 2}.pt"
            self.save(path, hashlib.sha256(body).digest() + body)
        self.wait_for_files()

    def wait_for_files(self) -> None:
        """Nobody goes on, or leaves, before rank 0 has written its files. All ranks must call it.

        A rank that waited in the next step instead would count the time as training, and one that
        left would end rank 0 in the middle of a file.
        """
        self.ranks.gather(None)

    def save_weights(self, name: str, weights: dict[str, Tensor], step: int, looped: bool) -> None:
        """Saves full weights and their network's config in the run's folder, for EVAL_ONLY_PATH.

        All ranks must call it.
        """
        saved = {
            "config": network_config(self.cfg),
            "looped": looped,
            "step": step,
            "tokenizer": self.tokenizer.sha256,
            "weights": {key: value.detach().cpu() for key, value in weights.items()},
        }
        if self.ranks.is_main:
            data = torch_bytes(saved)
            if self.save(self.folder / name, data):
                self.log(f"Serialized model: {len(data)} bytes in {self.folder / name}")
        self.wait_for_files()

    def save(self, path: Path, data: bytes) -> bool:
        """Writes a file of the run; whether that was possible. The run goes on without it.

        Its exit status tells in the end.
        """
        try:
            write_atomic(path, data)
        except OSError as error:
            self.log.note_failure(str(path), reason_of(error))
            return False
        self.log.failures.pop(str(path), None)
        return True

    # --- The phases ---
    @contextlib.contextmanager
    def phase(self, name: str, budget: str) -> Iterator[None]:
        """Times its body as a phase. budget: "train", "eval" or, off both budgets, "none"."""
        outer_excluded = self.excluded_seconds
        self.excluded_seconds = 0.0
        start = self.ranks.now()
        # The check comes before there is a log.
        if name != "check":
            self.log.begin_phase(name)
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, OutOfMemory) or not is_lack_of_memory(error):
                raise
            raise OutOfMemory(self.memory_advice(name, error)) from error
        seconds = self.ranks.now() - start
        self.phases.append(Phase(name, budget, seconds - self.excluded_seconds))
        self.excluded_seconds = outer_excluded + seconds

    def memory_advice(self, phase: str, error: Exception) -> str:
        """The line for the user when memory has run out in a phase: which knob to lower."""
        cfg = self.cfg
        advice = f"lower MICRO_BATCH_TOKENS={cfg.micro_batch_tokens}, the tokens of a row"
        if phase == "score quantized_ttt_lora":
            advice = f"lower TTT_BATCH_SIZE={cfg.ttt_batch_size}"
            if cfg.learns_by_chunks:
                advice += f" or TTT_BATCH_SEQS={cfg.ttt_batch_seqs}"
        elif phase.startswith(("score", "validate")):
            advice = f"lower VAL_BATCH_TOKENS={cfg.val_batch_tokens}"
        elif phase == "warm-up":
            advice += f", VAL_BATCH_TOKENS={cfg.val_batch_tokens}"
            advice += f" or TTT_BATCH_SIZE={cfg.ttt_batch_size}"
        reason = first_line(error)
        return f"out of memory in {phase}; {advice} ({reason[:200]})"

    def go(self) -> dict[str, Any]:
        """Goes through the phases that are still to do; returns the figures of the final line."""
        start = self.start
        configure_torch(self.cfg)
        self.ranks.watch_peers()
        self.build_model()
        with self.phase("warm-up", budget="none"):
            reserve = self.warm_up(self.plan)

        if start.weights is not None:
            self.model.load_state_dict(start.weights)
        elif start.stage == Stage.NOTHING:
            self.run_training(reserve)

        path = self.artifact
        if start.stage < Stage.PACKED:
            self.compress(path)
        if start.is_artifact:
            # The check has read this file already, so that a damaged one ends the run before its
            # warm-up. It is read again below, because the file of rank 0 counts for all ranks.
            path = self.artifact = Path(self.cfg.eval_only_path)
        else:
            self.run_evaluation("pre_quantization", self.evaluate, budget="none")

        self.load_artifact_file(path)
        self.evaluate_artifact()
        figures = self.report()
        self.log.close()
        self.release_locks()
        failures = self.ranks.gather(self.log.failures)[0]
        self.ranks.finished.set()
        if failures:
            raise FilesNotWritten(f"not written: {'; '.join(failures.values())}")
        return figures

    def build_model(self) -> None:
        """Makes the model, its forwards and its optimisers.

        `forward` trains, `scoring` scores, and `ttt_forward` adapts, with one graph for all sizes.
        """
        cfg = self.cfg
        self.model = GPT(cfg, self.backend).to(self.ranks.device)
        self.forward = self.model
        any_size = self.model
        if cfg.compile:
            self.forward = torch.compile(self.model, fullgraph=True, dynamic=False)
            any_size = compile_any_size(self.model)
        self.scoring = partial(self.forward, temperature=cfg.logit_temperature)
        self.ttt_forward = partial(any_size, temperature=cfg.logit_temperature)
        self.optimizers = Optimizers(self.model, cfg, self.ranks)
        num_parameters = sum(p.numel() for p in self.model.parameters())
        self.log(f"model_params:{num_parameters}")
        if num_parameters > MANY_FOR_A_CPU and self.ranks.device.type == "cpu":
            self.log(
                "warning: a step of this network takes minutes on a CPU; PRESET=cpu or SHRINK=1"
                " makes one that does not"
            )

    def run_training(self, reserve: float) -> None:
        """Trains, keeping `reserve` seconds of the budget for compression.

        The hash of the weights before the first step shows that warm-up has taught them nothing.
        """
        self.final["first_weights_sha256"] = weights_sha256(self.model)
        self.log(f"weights before step 1: sha256 {self.final['first_weights_sha256']}")
        with self.phase("train", budget="train"):
            self.looped = train(self, reserve)
        weights = self.model.state_dict()
        self.save_checkpoint(Stage.TRAINED, weights=weights, looped=self.looped)

    # --- Warm-up ---
    def warm_up(self, last_plan: tuple[Visit, ...]) -> float:
        """Compiles and measures what the run will need, on random tokens; the model stays as it is.

        last_plan: the order of layers with which training will probably end. Returns the seconds of
        the budget to keep for compression.
        """
        cfg, ranks = self.cfg, self.ranks
        trains = self.start.stage == Stage.NOTHING
        plans = [last_plan]
        if trains:
            plans = sorted({cfg.plans[0], last_plan}, key=len)
        row = synthetic_row(cfg, cfg.row_shape, ranks.device)
        reserve = 0.0

        with state_restored(self.model, self.optimizers):
            # Before the steps, which would be as slow with a thread too many.
            if cfg.warmup_steps and ranks.may_choose_threads:
                self.choose_threads(last_plan, row)
            self.warm_up_training(plans, row)
            if trains and cfg.gptq_reserve_seconds < 0 and cfg.wallclock < math.inf:
                reserve = self.measure_compression(last_plan, row)
            if cfg.warmup_steps:
                self.warm_up_evaluation(plans)

        # sdpa asks the host for the lengths of segments. A CUDA graph cannot ask the host.
        can_capture = ranks.device.type == "cuda" and self.backend != "sdpa"
        if trains and cfg.cuda_graph and can_capture:
            self.capture_training(plans, row)
        # From here on, compilations are counted and no tile is timed any more.
        self.compilation_counter = CompilationCounter(self.log)
        self.tuner.may_measure = not cfg.warmup_steps
        return self.agree_on_reserve(reserve)

    def warm_up_training(self, plans: list[tuple[Visit, ...]], row: Batch) -> None:
        """Compiles the graphs of training, or of calibration if the run does not train."""
        cfg = self.cfg
        trains = self.start.stage == Stage.NOTHING
        calibrates = cfg.quantizer == "allocated" and self.start.stage < Stage.PACKED
        if not (trains or calibrates):
            return
        for step in range(cfg.warmup_steps):
            self.log.show(f"warm-up: step {step + 1} of {cfg.warmup_steps}")
            for plan in plans:
                accumulate_gradients(self.forward, plan, [row], cfg.micro_batch_tokens)
                if trains:
                    self.optimizers.step(1.0, cfg.muon_momentum)
            self.log(f"warmup_step: {step + 1}/{cfg.warmup_steps}")

    def choose_threads(self, plan: tuple[Visit, ...], row: Batch) -> None:
        """Computes with one thread fewer where another program keeps a core of this CPU busy.

        All threads wait for the slowest one. Beside a busy program a step has taken four times as
        long on two cores, where one thread takes twice as long.
        """
        most = torch.get_num_threads()
        if most == 1:
            return
        self.log.show("warm-up: which number of threads is fastest")
        seconds = {most - 1: math.inf, most: math.inf}
        for turn in range(3):
            for threads in seconds:
                torch.set_num_threads(threads)
                start = time.monotonic()
                accumulate_gradients(self.forward, plan, [row], self.cfg.micro_batch_tokens)
                seconds[threads] = min(seconds[threads], time.monotonic() - start)
            # One row may be slow by chance, two are not.
            if turn and seconds[most] > 3 * seconds[most - 1]:
                break
        # The two must differ clearly, because the choice lasts for the whole run.
        chosen = most - 1 if seconds[most - 1] < 0.8 * seconds[most] else most
        torch.set_num_threads(chosen)
        times = ", ".join(f"{1000 * s:.0f} ms a row with {n}" for n, s in seconds.items())
        self.log(f"threads: {chosen} ({times}; OMP_NUM_THREADS decides otherwise)")

    def measure_compression(self, plan: tuple[Visit, ...], row: Batch) -> float:
        """The seconds to keep for calibration, quantisation and packing, measured on one row.

        They include a margin: one second, and a quarter of what was measured.
        """
        cfg, ranks = self.cfg, self.ranks
        self.log.show("warm-up: compression")
        # The first time compiles, and other programs may hold up either: the faster one counts.
        times = []
        for _ in range(2):
            start = ranks.now()
            calibration = self.calibrate(plan, [row])
            calibrated = ranks.now()
            quantizer = Quantizer(self.model, *calibration, ranks)
            fit_artifact(quantizer, self.model, {}, self.log, rounds=1)
            times.append((calibrated - start, ranks.now() - calibrated))
        row_s, rest_s = (min(times_of_part) for times_of_part in zip(*times, strict=True))
        rows_per_rank = math.ceil(cfg.gptq_calibration_batches / ranks.world_size)
        # Fitting the artifact has taken up to four rounds.
        rounds = 4 if cfg.artifact_limit_bytes else 1
        return 1.0 + 1.25 * (rows_per_rank * row_s + rounds * rest_s)

    def warm_up_evaluation(self, plans: list[tuple[Visit, ...]]) -> None:
        """Compiles the graphs of scoring and adaptation, on documents of random tokens.

        Each document is longer than a window, so that windows of every length occur. plans: the
        orders of layers in training; the last one also serves the evaluation.
        """
        cfg, ranks = self.cfg, self.ranks
        length = cfg.ttt_eval_seq_len + cfg.ttt_chunk_size
        least = max(2 * cfg.ttt_chunk_tokens, cfg.val_row_shape.tokens)
        starts = np.arange(0, least, length)
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, cfg.vocab_size, length * len(starts) + 1)
        # Without a table, every document must say how many bytes it has.
        num_bytes = np.zeros_like(tokens) if self.table is None else None
        docs = Documents(tokens, starts, np.full(len(starts), length), num_bytes)

        self.log.show("warm-up: scoring and adaptation")
        # What is scored here must not look like a score.
        self.log.prefix = "warmup: "
        *earlier_plans, last_plan = plans
        if cfg.val_loss_every:
            # A validation may come before the loops begin.
            for plan in earlier_plans:
                self.evaluate(plan=plan, docs=docs, ranks=ranks.alone())
        self.evaluate(plan=last_plan, docs=docs, ranks=ranks.alone())
        if cfg.ttt_enabled:
            # A prefix of the real stream would hold all of these documents, and after the last one
            # no weights learn. Their graphs must be compiled here.
            prefix = dict(phased_ttt_prefix_tokens=0, phased_ttt_prefix_docs=len(starts) - 1)
            cfg = dataclasses.replace(cfg, **prefix)
            self.adapt(Deadline(math.inf), docs, ranks.alone(), cfg)
        self.log.prefix = ""
        self.log("warmup:done (random tokens, no validation data)")

    def capture_training(self, plans: list[tuple[Visit, ...]], row: Batch) -> None:
        """Records the training of a row as a CUDA graph for each plan.

        From then on the gradients stay in place, because a graph adds to fixed memory.
        """
        self.optimizers.keep_gradients = True
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        pool = torch.cuda.graph_pool_handle()
        for plan in plans:
            self.graphs[plan] = capture_row(self.forward, plan, row, pool)
        self.model.zero_grad(set_to_none=False)

    def agree_on_reserve(self, measured: float) -> float:
        """The seconds to keep for compression: GPTQ_RESERVE_SECONDS, or the most a rank measured.

        At most half of the budget is kept: a slow machine trains too, though it ends late.
        """
        cfg, reserve = self.cfg, self.cfg.gptq_reserve_seconds
        if reserve < 0:
            reserve = max(self.ranks.gather(measured))
        if self.start.stage == Stage.NOTHING and cfg.wallclock < 2 * reserve:
            self.log(
                f"warning: compression needs about {reserve:.0f} s, more than half of"
                f" MAX_WALLCLOCK_SECONDS={cfg.wallclock:g}: the run will end late, unless it is"
                f" {2 * reserve:.0f} or GPTQ_CALIBRATION_BATCHES={cfg.gptq_calibration_batches}"
                " is less"
            )
            reserve = cfg.wallclock / 2
        effective_ms = 1000 * (cfg.wallclock - reserve)
        self.log(f"gptq:reserving {reserve:.1f}s, effective={effective_ms:.0f}ms")
        return reserve

    def check_recompilations(self, count: float) -> None:
        """Notes the compilations after warm-up. Raises RunStopped beyond RECOMPILE_LIMIT."""
        self.final["recompilations"] = int(count)
        limit = self.cfg.recompile_limit
        if 0 <= limit < count:
            raise RunStopped(f"RECOMPILE_LIMIT={limit}: {count:.0f} compilations after warm-up")

    # --- Compression ---
    def calibrate(
        self, plan: tuple[Visit, ...], rows: list[Batch]
    ) -> tuple[dict | None, dict | None]:
        """Hessians of the matrices and sensitivities of the loss, from rows of training text.

        What QUANTIZER does not use is None. All ranks must call it.
        """
        cfg, model, ranks = self.cfg, self.model, self.ranks
        hessians = None
        sensitivities = None
        if not cfg.no_hessians:
            hessians = collect_hessians(model, plan, self.shown(rows, "Hessians"), ranks)
        if cfg.quantizer == "allocated":
            shown = self.shown(rows, "sensitivities")
            sensitivities = collect_sensitivities(self.forward, model, plan, shown, hessians, ranks)
        return hessians, sensitivities

    def shown(self, rows: list[Batch], what: str) -> Iterator[Batch]:
        """The rows, one by one; the log shows how many of them are done."""
        for done, row in enumerate(rows):
            if self.log.wants_progress():
                line = f"{what}: {done} of {len(rows)} rows"
                self.log.progress(f"calibrate: {line}", f"calibrate: {line}")
            yield row

    def compress(self, path: Path) -> None:
        """Calibrates on the first training rows, quantises, and writes the artifact to `path`."""
        cfg, model, ranks = self.cfg, self.model, self.ranks
        # Only a run that trains is held to the budget of training.
        budget = "none" if self.start.from_file else "train"
        with self.phase("calibrate", budget=budget):
            loader = PackedLoader(self.streams["train"], self.tokenizer.bos_id, cfg, ranks)
            rows, _ = loader.rows(0 if cfg.no_hessians else cfg.gptq_calibration_batches)
            calibration = self.calibrate(self.plan, rows)
        hessians, _ = calibration
        self.log(
            f"GPTQ:collected {len(hessians or ())} Hessians "
            f"for {len(quantised_matrices(cfg))} matrices"
        )
        with self.phase("quantise", budget=budget):
            if cfg.prune_frac:
                prune(model)
            quantizer = Quantizer(model, *calibration, ranks)
        with self.phase("pack", budget=budget):
            meta = {"looped": self.looped, "tokenizer": self.tokenizer.sha256}
            data = fit_artifact(quantizer, model, meta, self.log)
            if ranks.is_main and not self.save(path, data):
                self.unsaved_artifact = data
        self.save_checkpoint(Stage.PACKED, weights=model.state_dict(), looped=self.looped)

    def load_artifact_file(self, path: Path) -> None:
        """Replaces the model's weights with those of an artifact, and logs its size.

        Rank 0's file counts. All ranks must call it. Raises UsageError if the file is damaged.
        """
        own_data = self.unsaved_artifact
        if self.ranks.is_main and own_data is None:
            own_data = read_regular(path, MAX_ARTIFACT_BYTES)
        data = self.ranks.gather(own_data)[0]
        header, arrays = open_artifact(data, path)
        load_artifact(self.model, arrays)
        entropy_bytes = int(code_entropy_bytes(arrays.codes.values()))
        total = len(data) + CODE_BYTES
        self.final["model_bytes"] = len(data)
        self.final["artifact_bytes"] = total
        self.final["codes_bytes"] = header["streams"][0][1]
        self.final["codes_entropy_bytes"] = entropy_bytes
        self.final["artifact_sha256"] = hashlib.sha256(data).hexdigest()
        self.log(
            f"Code size (uncompressed): {CODE_BYTES} bytes; model {len(data)}, "
            f"its codes' entropy {entropy_bytes}"
        )
        over = f", {total - LIMIT_BYTES} OVER THE LIMIT" if total > LIMIT_BYTES else ""
        self.log(f"Total submission size quantized+{header['compressor']}: {total} bytes{over}")

    # --- Evaluation ---
    def scorer(
        self, plan: tuple[Visit, ...], docs: Documents | None, ranks: Ranks | None
    ) -> Scorer:
        """A scorer with an empty ledger. docs and ranks: those of the run if None."""
        ledger = Ledger(docs or self.docs, self.table, self.ranks.device, self.cfg)
        return Scorer(self.scoring, plan, ledger, self.cfg, ranks or self.ranks, self.log)

    def evaluate(
        self,
        stride: int = 0,
        plan: tuple[Visit, ...] | None = None,
        docs: Documents | None = None,
        ranks: Ranks | None = None,
    ) -> Ledger:
        """Scores every target once, without learning, in windows `stride` tokens apart.

        With stride 0 windows follow one another. plan, docs and ranks: those of the run if None.
        """
        # evaluate_ttt does the same. So its scoring after the deadline needs no new graph.
        self.model.requires_grad_(False)
        ledger = score_all(self.scorer(plan or self.plan, docs, ranks), stride)
        self.model.requires_grad_(True)
        return ledger

    def adapt(
        self,
        deadline: Deadline,
        docs: Documents | None = None,
        ranks: Ranks | None = None,
        cfg: Config | None = None,
    ) -> Ledger:
        """Scores every target once and learns from what is scored (TTT_MODE), until the deadline.

        docs, ranks and cfg: those of the run if None; cfg decides where all weights learn.
        Afterwards the weights are as before.
        """
        scorer = self.scorer(self.plan, docs, ranks)._replace(cfg=cfg or self.cfg)
        adaptation = None
        if self.cfg.ttt_mode == "document":
            adaptation = Adaptation(self.model, self.ttt_forward, self.plan, self.ranks.device)
        return evaluate_ttt(scorer, adaptation, self.model, self.ttt_forward, deadline)

    def evaluate_artifact(self) -> None:
        """Runs the evaluations of the artifact that the settings ask for, with one deadline."""
        cfg = self.cfg
        deadline = Deadline(cfg.eval_deadline_seconds)
        self.run_evaluation("quantized", self.evaluate)
        seconds = self.phases[-1].seconds
        deadline.seconds_per_target = seconds * self.ranks.world_size / self.docs.counts.sum()

        if cfg.sliding_window_enabled:
            sliding = partial(self.evaluate, cfg.eval_stride)
            self.run_evaluation("quantized_sliding_window", sliding)
        if cfg.ttt_enabled:
            self.run_evaluation("quantized_ttt_lora", partial(self.adapt, deadline))

    def run_evaluation(
        self, key: str, evaluation: Callable[[], Ledger], budget: str = "eval"
    ) -> None:
        """Times an evaluation as a phase, checks what it scored, logs and saves the result.

        key: one of SCORE_LABELS. Raises InvalidScore if a rule was broken.
        """
        label = SCORE_LABELS[key]
        with self.phase(f"score {key}", budget=budget):
            ledger = evaluation()
        compilations = self.ranks.gather(self.compilation_counter.poll())
        self.check_recompilations(sum(compilations))
        if reasons := self.broken_rules(ledger):
            raise InvalidScore(f"{label} INVALID: {'; '.join(reasons)}")
        result = ledger.result()
        loss, bpb = result["val_loss"], result["val_bpb"]
        time_ms = 1000 * self.phases[-1].seconds
        scores = f"val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{time_ms:.0f}ms"
        self.log(f"{label} {scores}{self.note_deadline(ledger)}")
        self.log.scalars(self.final.get("steps", 0), {f"val_bpb/{key}": bpb})
        if ledger.tilt is not None:
            gains = ledger.tilt.gains.double()
            gain_bpb = gains.sum().item() / math.log(2) / result["bytes"]
            num_hits = int((gains > 0).sum())
            self.log(f"tilt: hints:{len(gains)} hits:{num_hits} gain_bpb:{gain_bpb:.8f}")
            self.final[f"{key}_tilt_gain"] = gain_bpb
        self.final[f"{key}_loss"] = loss
        self.final[f"{key}_bpb"] = bpb
        self.final["val_loss"] = loss
        self.final["val_bpb"] = bpb
        self.final["val_tokens"] = result["tokens"]
        self.final["val_bytes"] = result["bytes"]
        if self.ranks.is_main:
            documents = ledger.by_document()
            self.final["documents_sha256"] = commitment(documents)
            self.save_scores(documents)

    def note_deadline(self, ledger: Ledger) -> str:
        """What the deadline left without learning, for the line of a score; also in the figures."""
        documents = ledger.num_not_adapted
        chunks = ledger.num_not_learnt_from - documents
        notes = ""
        if documents:
            self.final["documents_not_adapted"] = documents
            knob = f"EVAL_DEADLINE_SECONDS={self.cfg.eval_deadline_seconds:g}"
            self.log(
                f"warning: {knob} was over before all documents could adapt; the challenge allows"
                f" {EVAL_LIMIT_SECONDS:g} s of evaluation in all"
            )
            total = len(ledger.docs.counts)
            notes += f", {documents} of {total} documents were scored without adaptation"
        if chunks:
            self.final["chunks_not_learnt_from"] = chunks
            notes += f", {chunks} chunks were not learnt from"
        return notes

    def broken_rules(self, ledger: Ledger) -> list[str]:
        """Why an evaluation has no score; empty if it has one.

        Either the ledger found a rule broken, or the data set is named like one of the challenge's
        but holds other documents.
        """
        problems = ledger.problems(self.decoded)
        known = CANONICAL.get(self.cfg.dataset_dir.name)
        if problems or known is None or self.cfg.val_doc_fraction < 1:
            return problems
        held = (len(self.docs.starts), self.streams["val"].size, self.decoded)
        for number, wanted in zip(held, known, strict=True):
            # 0 stands for a number that is not known. The others may be off by a ten-thousandth.
            if wanted and abs(number - wanted) > 1e-4 * wanted:
                problems.append(
                    f"(documents, tokens, bytes) are {held}, the challenge's are {tuple(known)}"
                )
                break
        return problems

    def save_scores(self, documents: dict[str, np.ndarray]) -> None:
        """Saves all figures so far, and the newest evaluation's scores of `documents`."""
        figures = json.dumps(self.final, indent=1)
        self.save(self.folder / "scores.json", figures.encode())
        buffer = io.BytesIO()
        np.savez(buffer, **documents)
        self.save(self.folder / "documents.npz", buffer.getvalue())

    # --- Report ---
    def report(self) -> dict[str, Any]:
        """Logs the table of phases, then the line that starts with `final`; returns its figures."""
        self.log_phases()
        self.log_gzip()
        if self.ranks.device.type == "cuda":
            self.final["peak_memory_mib"] = torch.cuda.max_memory_allocated() >> 20
            self.log(f"peak memory allocated: {self.final['peak_memory_mib']} MiB")

        # The line has the sum of all phases of one name, for instance of all validations.
        seconds = {}
        for phase in self.phases:
            seconds[phase.name] = seconds.get(phase.name, 0) + phase.seconds
        self.final |= self.facts
        self.final["seconds"] = {name: round(s, 3) for name, s in seconds.items()}
        self.log_ending()
        # On a terminal it would hide the lines above.
        self.log("final " + json.dumps(self.final, sort_keys=True), terminal=not self.log.live)
        return self.final

    def log_phases(self) -> None:
        """Logs the seconds of each phase, and for each budget those spent and allowed."""
        self.log(f"{'phase':<34}{'seconds':>9}  counts against")
        for name, budget, seconds in self.phases:
            self.log(f"{name:<34}{seconds:>9.1f}  {budget}")
        limits = {"train": self.cfg.max_wallclock_seconds, "eval": EVAL_LIMIT_SECONDS}
        for budget, limit in limits.items():
            spent = sum(phase.seconds for phase in self.phases if phase.budget == budget)
            over = ", OVER" if 0 < limit < spent else ""
            self.log(f"{'all of ' + budget:<34}{spent:>9.1f}  of {limit:.0f}{over}")

    def log_gzip(self) -> None:
        """Logs how well gzip compresses the validation text, if the manifest knows."""
        val = self.tokenizer.manifest.get("splits", {}).get("val", {})
        # Only for show: a manifest that says something odd here ends no run.
        gzip_bytes, size = val.get("gzip_bytes"), val.get("bytes")
        if WHOLE.fits(gzip_bytes) and gzip_bytes and size:
            self.final["gzip_bpb"] = 8 * gzip_bytes / size
            self.log(f"for scale, gzip -9 of each document: val_bpb:{self.final['gzip_bpb']:.4f}")

    def log_ending(self) -> None:
        """Logs what people look for: the score, the size, where the files are, and what is next."""
        final = self.final
        if "val_bpb" not in final:
            return
        scale = ""
        if "gzip_bpb" in final:
            scale = f" (gzip -9: {final['gzip_bpb']:.4f})"
        if left := final.get("documents_not_adapted"):
            scale += f"; without adaptation for {left} of {final['val_docs']} documents"
        share = 100 * final["artifact_bytes"] / LIMIT_BYTES
        self.log(f"score     {final['val_bpb']:.4f} bits per byte, lower is better{scale}")
        self.log(f"size      {final['artifact_bytes']:,} of {LIMIT_BYTES:,} bytes ({share:.1f} %)")
        self.log(f"log       {self.log.path}")
        self.log(f"artifact  {self.artifact}")
        if Path(__file__).with_name("tools").is_dir():
            self.log(f"next      make report LOGS={self.log.path}")


# === 12. Kernels: MLP, cross-entropy, norm and RoPE, XSA, each beside a plain reference ===
#
# After what all kernels share, each has its sub-section, in one order: formula and source,
# reference forward and backward, Triton kernel, launcher, operator of torch.library, autograd
# function, public function.


# --- Shared by all kernels: choice of tiles, operators, launches over heads -----------------------
#
# A program is one of the instances of a kernel that run side by side; a tile is the share of the
# work that a program does at once.

HEAD_TILES = [(32, 8), (32, 4), (16, 4), (64, 8)]  # heads per program, warps
TILES = {
    "mlp_up": [(128, 256, 64), (128, 128, 64)],  # tokens, hidden units, terms of each sum at once
    "mlp_dpre": [(128, 256, 64), (128, 128, 64)],
    "ce": [(8192, 16), (8192, 8), (4096, 8), (1024, 4)],  # columns at once, warps
    "qk": HEAD_TILES,
    "qk_backward": HEAD_TILES,
    "xsa": HEAD_TILES,
    "xsa_backward": HEAD_TILES,
}


class TileTuner:
    """Finds the fastest tile of TILES for each kernel and shape by measuring on this GPU.

    A run owns one and forbids it to measure once warm-up is over: a CUDA graph cannot record a
    measurement, and training time should not pay for one. The choices are kept beside Triton's
    compiled kernels, so that a machine measures each shape once and all its ranks use one tile.
    """

    MIN_ROWS = 2**14  # fewer do not fill a GPU; they take the first tile of the table

    def __init__(self) -> None:
        self.may_measure = True
        self.chosen: dict[tuple, tuple] = {}  # (kernel, *shape) -> tile

    def fastest_tile(
        self, kernel: str, rows: int, shape: tuple, launch: Callable[[tuple], None]
    ) -> tuple:
        """The tile with which `launch(tile)` is fastest; the first one while none was measured.

        kernel: a key of TILES. shape: whatever decides about speed, except the number of rows.
        """
        key = (kernel, *shape)
        if key not in self.chosen and rows >= self.MIN_ROWS and self.may_measure:
            self.chosen[key] = self.load_or_measure(key, TILES[kernel], launch)
        return self.chosen.get(key, TILES[kernel][0])

    def load_or_measure(
        self, key: tuple, tiles: list[tuple], launch: Callable[[tuple], None]
    ) -> tuple:
        """The tile that is saved on disk for `key`; measured and saved if there is none yet."""
        identity = str((key, tiles, torch.cuda.get_device_name(), triton.__version__))
        digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
        path = Path(triton.knobs.cache.dir) / f"tile-{digest}.json"
        if not path.is_file():
            times_ms = [
                triton.testing.do_bench(partial(launch, tile), warmup=5, rep=20) for tile in tiles
            ]
            fastest = tiles[int(np.argmin(times_ms))]
            own_path = path.with_suffix(f".{os.getpid()}")
            write_atomic(own_path, json.dumps(fastest).encode())
            # A link fails where the file exists already. So the first rank to finish decides for
            # all: ranks with different tiles would round sums differently. Some file systems have
            # no links; there each rank uses its own measurement.
            with contextlib.suppress(OSError):
                os.link(own_path, path)
            own_path.unlink()
            if not path.is_file():
                return fastest
        return tuple(json.loads(path.read_text()))


# The tuner that launchers ask. An operator of torch.library takes only tensors and numbers, and its
# backward may run on another thread. So neither an argument nor a context variable can bring the
# run's tuner to a launcher; this global does. A run installs its own with use_tuner.
active_tuner = TileTuner()


def use_tuner(tuner: TileTuner) -> None:
    """Makes all launchers of this process ask `tuner` from now on."""
    global active_tuner
    active_tuner = tuner


def dense_heads(x: Tensor) -> Tensor:
    """x (T, heads, D), copied unless each token's heads lie side by side without gaps.

    The XSA kernels expect that, and PyTorch's attention on a CPU misreads a last axis with gaps.
    """
    return x if x.stride()[1:] == (x.size(2), 1) else x.contiguous()


def define_operator(
    name: str,
    reference: Callable,
    launcher: Callable,
    fake: Callable | None = None,
    mutates: tuple[str, ...] = (),
) -> Any:
    """Registers golf::`name`, an operator that runs `launcher` on a GPU and `reference` elsewhere.

    Both take the same arguments; torch.compile looks into neither. The annotations of `reference`
    become the operator's schema. fake: returns empty outputs while a graph is traced, by default
    `reference` itself. mutates: names of arguments that are changed in place.
    """

    def on_gpu(x: Tensor, *args: Any) -> Any:
        # Kernels sum in fp32, so fp64 takes the reference. So does an empty tensor.
        if triton is not None and x.element_size() <= 4 and x.numel() > 0:
            return launcher(x, *args)
        return reference(x, *args)

    operator = torch.library.custom_op(f"golf::{name}", reference, mutates_args=mutates)
    operator.register_kernel("cuda", on_gpu)
    operator.register_fake(fake or reference)
    return operator


@jit
def heads_of_program(ROWS: tl.constexpr, COLS: tl.constexpr):
    """Indices of the heads of this program (ROWS, 1), int64, and of their columns (1, COLS)."""
    head = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, COLS)[None, :]
    return head, col


def launch_heads(
    kernel: Any, table: str, arguments: list, rows: int, sizes: dict[str, Any], tile: tuple | None
) -> None:
    """Launches kernel(*arguments, rows, **sizes, ...), whose programs share out the heads.

    arguments: tensors, None for one that is left out, and strides; the first gives the dtype.
    rows: how many heads there are, of D values each; a program takes all columns of its heads.
    tile: heads per program and warps, or None for the fastest of TILES[table].
    """
    columns = triton.next_power_of_2(sizes["D"])

    def launch(tile: tuple) -> None:
        heads, warps = tile
        grid = (triton.cdiv(rows, heads),)
        kernel[grid](*arguments, rows, **sizes, ROWS=heads, COLS=columns, num_warps=warps)

    if tile is None:
        num_given = sum(argument is not None for argument in arguments)
        shape = (*sizes.values(), num_given, arguments[0].dtype)
        tile = active_tuner.fastest_tile(table, rows, shape, launch)
    launch(tile)


# --- Fused MLP ------------------------------------------------------------------------------------
#
# out = leaky_relu(x @ w_up.T)^2 @ w_down.T for x (T, C), w_up (F, C), w_down (C, F). From PR #1530,
# after modded-nanogpt. An epilogue is what a kernel does with a product before it stores it. Here
# one product has the activation as its epilogue, and one of the backward its derivative. Both are
# operators, computed by PyTorch or, on Hopper, by one Triton kernel.


def mlp_up_reference(x: Tensor, w_up: Tensor, slope: float = MLP_SLOPE) -> tuple[Tensor, Tensor]:
    """pre = x @ w_up.T and post = leaky_relu(pre)^2, both (T, F)."""
    pre = F.linear(x, w_up)
    return pre, leaky_relu_sq(pre, slope)


def mlp_dpre_reference(dy: Tensor, w_down: Tensor, pre: Tensor, slope: float = MLP_SLOPE) -> Tensor:
    """Gradient of pre (T, F) from dy (T, C): (dy @ w_down) * derivative of leaky_relu^2 at pre.

    The derivative is twice leaky_relu with the slope squared. In bf16 on a CPU this form takes 1/12
    of the time of torch.where.
    """
    return (dy @ w_down).mul_(F.leaky_relu(pre, slope**2)).mul_(2)


@jit
def mlp_kernel(a, w, pre, out, BACKWARD: tl.constexpr, SLOPE: tl.constexpr, FLATTEN: tl.constexpr):
    """A product of two matrices and its epilogue, for both operators.

    Forward: a = x (T, C), w = w_up (F, C). Stores pre = a @ w.T and out = leaky_relu(pre)^2.
    Backward: a = dy (T, C), w = w_down (C, F). Loads pre and stores
    out = (a @ w) * derivative of leaky_relu^2 at pre. Both pre and out are (T, F).

    The operands are tensor descriptors, which bring their dtype; sums are fp32. A sum is rounded to
    the dtype before the epilogue, as it would be between separate operators. TMA reads zeros and
    writes nothing past an edge, so there are no masks. Programs stride over the tiles in groups of
    8 row blocks, so that weights stay in the L2 cache. The epilogue works on column halves, so that
    its staging buffer fits. FLATTEN starts the loads of the next tile before the epilogue of this
    one; it is off, because Triton's pass for it has read memory that its source never reads (faults
    #11519, #11601, #11612).
    """
    BM: tl.constexpr = a.block_shape[0]
    BH: tl.constexpr = out.block_shape[1]
    row_blocks = tl.cdiv(out.shape[0], BM)
    col_blocks = tl.cdiv(out.shape[1], 2 * BH)
    num_tiles = row_blocks * col_blocks
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        i, j = tl.swizzle2d(tile // col_blocks, tile % col_blocks, row_blocks, col_blocks, 8)
        row = i * BM
        col = j * 2 * BH
        acc = tl.zeros((BM, 2 * BH), tl.float32)
        for k in range(0, a.shape[1], a.block_shape[1]):
            # Both weights are read as they are stored; no transposed copy of one is made.
            if BACKWARD:
                b = w.load([k, col])
            else:
                b = w.load([col, k]).T
            acc = tl.dot(a.load([row, k]), b, acc)
        halves = tl.split(tl.permute(tl.reshape(acc.to(out.dtype), (BM, 2, BH)), (0, 2, 1)))

        # Let f(z) be z above zero and SLOPE^2 * z below. Then leaky_relu(z)^2 = z * f(z), and its
        # derivative is 2 * f(z) = f(2 * z).
        for h in tl.static_range(2):
            half = halves[h]
            half_col = col + h * BH
            if BACKWARD:
                doubled = 2 * pre.load([row, half_col])
                derivative = tl.where(doubled > 0, doubled, SLOPE * SLOPE * doubled)
                out.store([row, half_col], half * derivative)
            else:
                factor = tl.where(half > 0, half, SLOPE * SLOPE * half)
                out.store([row, half_col], half * factor)
                pre.store([row, half_col], half)


# ruff: disable[PLR0913]
def launch_mlp(
    a: Tensor,
    w: Tensor,
    pre: Tensor,
    out: Tensor,
    programs: int,
    backward: bool,
    tile: tuple,
    slope: float = MLP_SLOPE,
    flatten: bool = False,
) -> None:
    """Fills `out`, and in the forward `pre`, with at most `programs` programs of many tiles each.

    T must not be 0; a new T compiles nothing. Descriptors are made for every call, because a cache
    of them would keep activations alive; a replayed CUDA graph makes none. Of 227 KB of shared
    memory the forward takes 224 KB with its 4 stages, the backward, which also stages `pre`, 176 KB
    with 3.
    """
    bm, bn, bk = tile
    w_box = [bk, bn] if backward else [bn, bk]
    half_box = [bm, bn // 2]
    num_tiles = triton.cdiv(out.shape[0], bm) * triton.cdiv(out.shape[1], bn)
    grid = (min(programs, num_tiles),)
    mlp_kernel[grid](
        TensorDescriptor(a, a.shape, a.stride(), [bm, bk]),
        TensorDescriptor(w, w.shape, w.stride(), w_box),
        TensorDescriptor(pre, pre.shape, pre.stride(), half_box),
        TensorDescriptor(out, out.shape, out.stride(), half_box),
        BACKWARD=backward,
        SLOPE=slope,
        FLATTEN=flatten,
        num_warps=8,
        num_stages=3 if backward else 4,
    )


# ruff: enable[PLR0913]


def launch_fastest_mlp(
    a: Tensor, w: Tensor, pre: Tensor, out: Tensor, backward: bool, slope: float
) -> None:
    """launch_mlp with the fastest tile, and as many programs as the GPU has multiprocessors."""
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count
    launch = partial(launch_mlp, a, w, pre, out, programs, backward, slope=slope)
    table = "mlp_dpre" if backward else "mlp_up"
    shape = (out.size(1), a.size(1), a.dtype)
    launch(active_tuner.fastest_tile(table, len(a), shape, launch))


def mlp_kernel_fits(hidden: int, *operands: Tensor) -> bool:
    """Whether mlp_kernel can read these operands (rows, columns) and write rows of `hidden` values.

    It needs Hopper and a dtype of two bytes. TMA needs dense columns, and rows that begin at
    multiples of 16 bytes, which are 8 values.
    """
    first = operands[0]
    if triton is None or torch.cuda.get_device_properties(first.device).major != 9:
        return False
    if first.dtype not in (torch.bfloat16, torch.float16) or len(first) == 0 or hidden % 8 != 0:
        return False
    for t in operands:
        is_aligned = t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0
        if t.dtype != first.dtype or not is_aligned:
            return False
    return True


def mlp_up_cuda(x: Tensor, w_up: Tensor, slope: float = MLP_SLOPE) -> tuple[Tensor, Tensor]:
    """mlp_up on a GPU: the kernel where it fits, otherwise the reference."""
    hidden = w_up.size(0)
    if not mlp_kernel_fits(hidden, x, w_up):
        return mlp_up_reference(x, w_up, slope)
    pre = x.new_empty(len(x), hidden)
    post = x.new_empty(len(x), hidden)
    launch_fastest_mlp(x, w_up, pre, post, False, slope)
    return pre, post


def mlp_dpre_cuda(dy: Tensor, w_down: Tensor, pre: Tensor, slope: float = MLP_SLOPE) -> Tensor:
    """mlp_dpre on a GPU: the kernel where it fits, otherwise the reference."""
    hidden = w_down.size(1)
    if not mlp_kernel_fits(hidden, dy, w_down, pre):
        return mlp_dpre_reference(dy, w_down, pre, slope)
    dpre = dy.new_empty(len(dy), hidden)
    launch_fastest_mlp(dy, w_down, pre, dpre, True, slope)
    return dpre


mlp_up = define_operator("mlp_up", mlp_up_reference, mlp_up_cuda)
mlp_dpre = define_operator("mlp_dpre", mlp_dpre_reference, mlp_dpre_cuda)


class FusedMLP(torch.autograd.Function):
    """The second product of the MLP. Its backward is that of the whole MLP, mlp_up's included."""

    @staticmethod
    def forward(
        ctx, x: Tensor, w_up: Tensor, w_down: Tensor, pre: Tensor, post: Tensor, slope: float
    ) -> Tensor:
        """out (T, C). What only the gradient of a frozen weight would need is not saved."""
        _, need_up, need_down, *_ = ctx.needs_input_grad
        saved_x = x if need_up else None
        saved_post = post if need_down else None
        ctx.save_for_backward(saved_x, w_up, w_down, pre, saved_post)
        ctx.slope = slope
        return F.linear(post, w_down)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and both weights, None where not needed."""
        x, w_up, w_down, pre, post = ctx.saved_tensors
        need_x, need_up, need_down, *_ = ctx.needs_input_grad
        dpre = mlp_dpre(dy, w_down, pre, ctx.slope) if need_x or need_up else None
        dx = dpre @ w_up if need_x else None
        dw_up = dpre.t() @ x if need_up else None
        dw_down = dy.t() @ post if need_down else None
        return dx, dw_up, dw_down, None, None, None


def fused_mlp(
    x: Tensor, w_up: Tensor, w_down: Tensor, slope: float = MLP_SLOPE
) -> tuple[Tensor, Tensor]:
    """out (T, C), and post (T, F) = leaky_relu(x @ w_up.T)^2 without gradient."""
    # Were pre and post outputs of FusedMLP, autograd would fill zeros as the gradient of post.
    pre, post = mlp_up(x.detach(), w_up.detach(), slope)
    return FusedMLP.apply(x, w_up, w_down, pre, post, slope), post


def plain_mlp(
    x: Tensor, w_up: Tensor, w_down: Tensor, slope: float = MLP_SLOPE
) -> tuple[Tensor, Tensor]:
    """fused_mlp in separate operators with PyTorch's autograd."""
    post = leaky_relu_sq(F.linear(x, w_up), slope)
    return F.linear(post, w_down), post


# --- Head and softcapped cross-entropy ------------------------------------------------------------
#
# Nats of the logits cap * tanh(z / cap), where z = x @ w.T (N, V). Everything after the product is
# fp32: the public script rounds logits to bf16, whose spacing at 16 to 32 is 0.125, which costs up
# to 8e-4 nats a token. |logits| <= cap <= 75 bounds the sum of 65,536 exponentials, so no running
# maximum is needed. The forward replaces z by d nats / d z. The incoming gradient then scales rows
# of x and dx (N, C) instead of z, so the backward is two products and no other pass over z.
#
# The token tilt also needs the nats of a second token of each row, its hint. They cost one more
# load and store in the same pass, and nothing learns from them.


def softcap_ce_reference(
    z: Tensor, targets: Tensor, cap: float, gradient: bool, hints: Tensor | None = None
) -> Tensor:
    """Nats (N,) in fp32 or better, 0 where the target is -1.

    z: (N, V). With `gradient` it becomes d nats / d z in place, nats being those of the targets.
    hints: ids (N,) like the targets. With them the result is (2, N): nats of targets and hints.
    """
    nats = softcap_ce_fake(z, targets, cap, gradient, hints)
    wide = nats.dtype
    # Some rows at a time: on a CPU, 512 KB of fp32 stay in the cache of a core.
    values_at_once = 2**17 if z.is_cpu else 2**28
    rows_at_once = values_at_once // z.size(1) + 1
    for start in range(0, len(z), rows_at_once):
        rows = slice(start, start + rows_at_once)
        target = targets[rows]
        tanh = torch.tanh(z[rows].to(wide) / cap)
        p = (tanh * cap).exp_()
        total = p.sum(-1, keepdim=True)
        of_target = picked_nats(tanh, total, target, cap)
        if hints is None:
            nats[rows] = of_target
        else:
            nats[0, rows] = of_target
            nats[1, rows] = picked_nats(tanh, total, hints[rows], cap)
        if gradient:
            index = target.clamp_min(0).unsqueeze(1)
            p.div_(total).scatter_add_(1, index, p.new_full((), -1.0).expand_as(index))
            slope = tanh.square_().neg_().add_(1)
            z[rows] = p.mul_(slope).mul_((target >= 0).unsqueeze(1))
    return nats


def picked_nats(tanh: Tensor, total: Tensor, ids: Tensor, cap: float) -> Tensor:
    """Nats (n,) of one id of each row, 0 where it is -1, from tanh (n, V) and the sums (n, 1)."""
    index = ids.clamp_min(0).unsqueeze(1)
    return (total.log() - cap * tanh.gather(1, index)).squeeze(1) * (ids >= 0)


@jit
def load_logits(z_row, start, cols, V: tl.constexpr):
    """Columns start + cols of a row of z in fp32, zero past its end."""
    return tl.load(z_row + start + cols, start + cols < V, other=0.0).to(tl.float32)


@jit
def softcap(z, cap):
    """cap * tanh(z / cap) and its derivative.

    Both are formed from the exponential of a negative number, which keeps them exact near 0.
    """
    m = tl.exp(tl.abs(z) * (-2.0 / cap))
    r = 1.0 / (1.0 + m)
    return cap * tl.where(z < 0, -1.0, 1.0) * (1.0 - m) * r, 4.0 * m * r * r


@jit
def softcap_ce_kernel(
    z, targets, hints, nats, cap, V: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """Nats of one row per program. With V <= BLOCK the program reads its row only once.

    Without hints (None) there is no code for them.
    """
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    z_row = z + row.to(tl.int64) * V

    logits, slope = softcap(load_logits(z_row, 0, cols, V), cap)
    sums = tl.where(cols < V, tl.exp(logits), 0.0)
    for start in range(BLOCK, V, BLOCK):
        logits, slope = softcap(load_logits(z_row, start, cols, V), cap)
        sums += tl.where(start + cols < V, tl.exp(logits), 0.0)

    # The target's logit must be loaded before the sum, and the hint's as well. In tl.sum all warps
    # wait for each other; behind that barrier a warp that is ahead may already overwrite z with its
    # gradient, and a score read then would be wrong without any sign of it.
    target_logit, _ = softcap(tl.load(z_row + tl.maximum(target, 0)).to(tl.float32), cap)
    if hints is not None:
        hint = tl.load(hints + row)
        hint_logit, _ = softcap(tl.load(z_row + tl.maximum(hint, 0)).to(tl.float32), cap)
    total = tl.sum(sums, 0)
    is_scored = tl.where(target >= 0, 1.0, 0.0)
    tl.store(nats + row, is_scored * (tl.log(total) - target_logit))
    if hints is not None:
        hint_nats = tl.where(hint >= 0, tl.log(total) - hint_logit, 0.0)
        tl.store(nats + tl.num_programs(0) + row, hint_nats)

    if GRADIENT:
        for start in range(0, V, BLOCK):
            if V > BLOCK:
                logits, slope = softcap(load_logits(z_row, start, cols, V), cap)
            is_target = tl.where(start + cols == target, 1.0, 0.0)
            dz = (tl.exp(logits) * (is_scored / total) - is_target) * slope
            tl.store(z_row + start + cols, dz.to(z.dtype.element_ty), start + cols < V)


def softcap_ce_cuda(
    z: Tensor,
    targets: Tensor,
    cap: float,
    gradient: bool,
    hints: Tensor | None = None,
    tile: tuple | None = None,
) -> Tensor:
    """softcap_ce on a GPU, with the fastest tile unless one is given. z must be contiguous."""
    assert z.is_contiguous(), z.stride()
    N, V = z.shape
    nats = z.new_empty(N if hints is None else (2, N), dtype=torch.float32)
    ids = [targets.contiguous(), hints]
    if hints is not None:
        ids[1] = hints.contiguous()

    def launch(z: Tensor, tile: tuple) -> None:
        block, warps = tile
        softcap_ce_kernel[(N,)](z, *ids, nats, cap, V, gradient, BLOCK=block, num_warps=warps)

    def launch_on_copy(tile: tuple) -> None:
        """For measurements, because a launch may overwrite z."""
        launch(z.clone(), tile)

    if tile is None:
        tile = active_tuner.fastest_tile("ce", N, (V, z.dtype, gradient), launch_on_copy)
    launch(z, tile)
    return nats


def softcap_ce_fake(
    z: Tensor, targets: Tensor, cap: float, gradient: bool, hints: Tensor | None = None
) -> Tensor:
    """Empty nats (N,), or (2, N) with hints."""
    shape = targets.shape if hints is None else (2, z.size(0))
    return z.new_empty(shape, dtype=torch.promote_types(z.dtype, torch.float32))


softcap_ce = define_operator(
    "softcap_ce", softcap_ce_reference, softcap_ce_cuda, softcap_ce_fake, mutates=("z",)
)


def head_product(x: Tensor, w: Tensor, extra: Tensor | None) -> Tensor:
    """z (N, V) = x @ w.T, plus `extra` (N, V) where an adapter adds to the product."""
    z = F.linear(x, w)
    if extra is not None:
        z = z + extra
    return z


class HeadLoss(torch.autograd.Function):
    """head_loss where a gradient is needed. The forward leaves d nats / d z in z."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        w: Tensor,
        extra: Tensor | None,
        targets: Tensor,
        cap: float,
        hints: Tensor | None,
    ) -> Tensor:
        """Nats (N,) or (2, N). Saves d nats / d z (N, V), and x unless w is frozen."""
        _, need_w, *_ = ctx.needs_input_grad
        z = head_product(x, w, extra)
        nats = softcap_ce(z, targets, cap, True, hints)
        ctx.save_for_backward(x if need_w else None, w, z)
        return nats

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, w and extra from that of the nats, None where not needed.

        Nats of hints, in the second row, have no gradient.
        """
        x, w, dz = ctx.saved_tensors
        need_x, need_w, need_extra, *_ = ctx.needs_input_grad
        if grad.ndim == 2:
            grad = grad[0]
        grad = grad.unsqueeze(1)  # (N, 1)
        dx = ((dz @ w) * grad).to(w.dtype) if need_x else None
        dw = dz.t() @ (x * grad).to(w.dtype) if need_w else None
        dextra = (dz * grad).to(w.dtype) if need_extra else None
        return dx, dw, dextra, None, None, None


def head_loss(
    x: Tensor,
    w: Tensor,
    extra: Tensor | None,
    targets: Tensor,
    cap: float,
    fused: bool,
    hints: Tensor | None = None,
) -> Tensor:
    """Nats (N,) of the targets in fp32 or better, 0 where a target is -1.

    x: (N, C), w: (V, C). extra: what an adapter adds to their product (N, V), or None. With hints
    (N,), ids like the targets, the result is (2, N): nats of targets, and of hints without a
    gradient.
    """
    is_trained = any(t is not None and t.requires_grad for t in (x, w, extra))
    if fused and is_trained and torch.is_grad_enabled():
        return HeadLoss.apply(x, w, extra, targets, cap, hints)
    z = head_product(x, w, extra)
    if fused:
        return softcap_ce(z, targets, cap, False, hints)
    logits = cap * torch.tanh(z.to(torch.promote_types(z.dtype, torch.float32)) / cap)
    cross_entropy = partial(F.cross_entropy, ignore_index=-1, reduction="none")
    nats = cross_entropy(logits, targets)
    if hints is None:
        return nats
    return torch.stack([nats, cross_entropy(logits.detach(), hints)])


# --- Norm, RoPE and gain of queries and keys ------------------------------------------------------
#
# A row of qkv holds H + 2 Hkv heads of D values. q (T, H, D) = gain * rotate(rms_norm(q heads)),
# k (T, Hkv, D) = rotate(rms_norm(k heads)), and v (T, Hkv, D) is a view of the row. Because of that
# view the row stays in memory anyway. So the forward saves nothing else, and the backward norms
# the heads again.


def normed_heads(qkv: Tensor, gain: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of q and k (T, H + Hkv, D) in fp32 or better, their 1 / rms, and their gains.

    The gains are (H + Hkv, 1), and 1 for keys.
    """
    wide = torch.promote_types(qkv.dtype, torch.float32)
    heads = qkv.unflatten(1, (-1, head_dim))  # (T, H + 2 Hkv, D)
    num_qk = (heads.size(1) + len(gain)) // 2  # (H + 2 Hkv + H) / 2 = H + Hkv
    x = heads[:, :num_qk].to(wide)
    gains = F.pad(gain.to(wide), (0, num_qk - len(gain)), value=1.0).unsqueeze(1)
    return x, torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS), gains


def qk_rope_reference(qkv: Tensor, gain: Tensor, rope: Tensor, head_dim: int) -> Tensor:
    """Heads of q, then of k (T, H + Hkv, D): normed, rotated, those of q times their gain (H,).

    rope: (T, 2, 1, half) fp32, cosines and sines of each token.
    """
    x, rstd, gains = normed_heads(qkv, gain, head_dim)
    cos, sin = rope.to(x.dtype).unbind(1)
    return rotate(x * (rstd * gains), cos, sin).to(qkv.dtype)


def qk_rope_backward_reference(
    qkv: Tensor,
    gain: Tensor,
    rope: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    du: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and gain. du: the gradient of a second use of the values, or None.

    dq and dk are rotated back to the normed heads, so nothing is divided by a gain, which may be 0.
    """
    x, rstd, gains = normed_heads(qkv, gain, dq.size(-1))
    cos, sin = rope.to(x.dtype).unbind(1)
    g = rotate(torch.cat([dq, dk], 1).to(x.dtype), cos, -sin)
    normed = x * rstd
    dot = (g * normed).sum(-1, keepdim=True)
    dx = torch.addcmul(g, normed, dot / x.size(-1), value=-1).mul_(rstd * gains)
    dvalues = dv if du is None else dv + du
    dqkv = torch.cat([dx.to(dv.dtype), dvalues], 1).flatten(1)
    return dqkv, dot[:, : len(gain), 0].sum(0).to(gain.dtype)


@jit
def load_rope(rope, t, col, is_qk, HALF: tl.constexpr):
    """cos and sin for each column of a head of token t, and its partner, the column paired with it.

    Columns j and j + HALF are a pair, of which the second has -sin. A column that is not rotated
    has cos 1, sin 0 and itself as its partner. rope: (T, 2, HALF) fp32.
    """
    angle = rope + t * 2 * HALF + col % HALF
    is_rotated = is_qk & (col < 2 * HALF)
    cos = tl.load(angle, is_rotated, other=1.0)
    sin = tl.load(angle + HALF, is_rotated, other=0.0)
    sin = tl.where(col < HALF, sin, -sin)
    partner = tl.where(col < HALF, col + HALF, tl.where(col < 2 * HALF, col - HALF, col))
    return cos, sin, partner


@jit
def load_head(head, gain, h, col, is_qk, H: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr):
    """A head of q or k in fp32, its 1 / rms, and that times its gain, which is 1 for keys."""
    x = tl.load(head + col, is_qk, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + EPS)
    scale = rstd * tl.load(gain + h, h < H, other=1.0).to(tl.float32)
    return x, rstd, scale


# In both kernels r counts the heads of all tokens, and is head h of token t. Triton takes each
# pointer and each size as a separate argument.
# ruff: disable[PLR0913]
@jit
def qk_rope_kernel(
    qkv,
    gain,
    rope,
    out,
    rows,
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out (T, H + KV, D): the heads of q and k, normed, rotated and scaled."""
    HEADS: tl.constexpr = H + KV
    r, col = heads_of_program(ROWS, COLS)
    t = r // HEADS
    h = r % HEADS
    mask = (r < rows) & (col < D)
    cos, sin, partner = load_rope(rope, t, col, mask, HALF)
    head = qkv + (t * (H + 2 * KV) + h) * D
    x, _, scale = load_head(head, gain, h, col, mask, H, D, EPS)

    x_partner = tl.load(head + partner, mask, other=0.0).to(tl.float32)
    x = (x * cos + x_partner * sin) * scale
    tl.store(out + r * D + col, x.to(out.dtype.element_ty), mask)


@jit
def qk_rope_backward_kernel(
    dq,
    dk,
    dv,
    du,
    qkv,
    gain,
    rope,
    dqkv,
    dgain,
    rows,
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dqkv (T, H + 2 KV, D); and dgain (T, H + 2 KV) fp32, the gain's gradient from each head.

    du: the gradient of a second use of the values, or None.
    """
    HEADS: tl.constexpr = H + 2 * KV
    r, col = heads_of_program(ROWS, COLS)
    t = r // HEADS
    h = r % HEADS
    mask = (r < rows) & (col < D)
    is_q = mask & (h < H)
    is_k = mask & (h >= H) & (h < H + KV)
    is_v = mask & (h >= H + KV)
    cos, sin, partner = load_rope(rope, t, col, is_q | is_k, HALF)
    head = qkv + (t * HEADS + h) * D
    x, rstd, scale = load_head(head, gain, h, col, is_q | is_k, H, D, EPS)

    # The gradient of a head stands in one of dq, dk and dv; loads from the other two give zero.
    dq_head = dq + (t * H + h) * D
    dk_head = dk + (t * KV + h - H) * D
    v_values = (t * KV + h - H - KV) * D + col
    g = tl.load(dq_head + col, is_q, other=0.0) + tl.load(dk_head + col, is_k, other=0.0)
    g = (g + tl.load(dv + v_values, is_v, other=0.0)).to(tl.float32)
    if du is not None:
        g += tl.load(du + v_values, is_v, other=0.0).to(tl.float32)
    dq_partner = tl.load(dq_head + partner, is_q, other=0.0)
    dk_partner = tl.load(dk_head + partner, is_k, other=0.0)
    g_partner = (dq_partner + dk_partner).to(tl.float32)

    g = g * cos - g_partner * sin
    normed = x * rstd
    dot = tl.sum(g * normed, 1, keep_dims=True)
    dx = (g - normed * (dot / D)) * tl.where(h < H + KV, scale, 1.0)
    tl.store(dgain + r, dot, r < rows)
    tl.store(dqkv + r * D + col, dx.to(dqkv.dtype.element_ty), mask)


# ruff: enable[PLR0913]


def qk_rope_cuda(
    qkv: Tensor, gain: Tensor, rope: Tensor, head_dim: int, tile: tuple | None = None
) -> Tensor:
    """qk_rope on a GPU, with the fastest tile unless one is given."""
    qkv = qkv.contiguous()
    H = len(gain)
    KV = (qkv.size(1) // head_dim - H) // 2
    out = qkv.new_empty(len(qkv), H + KV, head_dim)
    sizes = dict(H=H, KV=KV, D=head_dim, HALF=rope.size(-1), EPS=NORM_EPS)
    rows = len(qkv) * (H + KV)
    launch_heads(qk_rope_kernel, "qk", [qkv, gain, rope, out], rows, sizes, tile)
    return out


def qk_rope_backward_cuda(
    qkv: Tensor,
    gain: Tensor,
    rope: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    du: Tensor | None = None,
    tile: tuple | None = None,
) -> tuple[Tensor, Tensor]:
    """qk_rope_backward on a GPU, with the fastest tile unless one is given."""
    qkv, dq, dk, dv = (t.contiguous() for t in (qkv, dq, dk, dv))
    if du is not None:
        du = du.contiguous()
    _, H, D = dq.shape
    KV = dk.size(1)
    dqkv = qkv.new_empty(qkv.shape)
    dgain = qkv.new_empty(len(qkv), H + 2 * KV, dtype=torch.float32)
    arguments = [dq, dk, dv, du, qkv, gain, rope, dqkv, dgain]
    sizes = dict(H=H, KV=KV, D=D, HALF=rope.size(-1), EPS=NORM_EPS)
    launch_heads(qk_rope_backward_kernel, "qk_backward", arguments, dgain.numel(), sizes, tile)
    return dqkv, dgain[:, :H].sum(0).to(gain.dtype)


qk_rope = define_operator("qk_rope", qk_rope_reference, qk_rope_cuda)
qk_rope_backward = define_operator(
    "qk_rope_backward", qk_rope_backward_reference, qk_rope_backward_cuda
)


class NormRope(torch.autograd.Function):
    """norm_rope by operators; the values are returned once for each of their uses."""

    @staticmethod
    def forward(
        ctx, qkv: Tensor, gain: Tensor, rope: Tensor, head_dim: int, uses: int
    ) -> tuple[Tensor, ...]:
        """q, k, and `uses` views of v, which get separate gradients."""
        ctx.save_for_backward(qkv, gain, rope)
        qk = qk_rope(qkv, gain, rope, head_dim)
        heads = qkv.unflatten(1, (-1, head_dim))  # (T, H + 2 Hkv, D)
        values = [heads[:, qk.size(1) :] for _ in range(uses)]
        return qk[:, : len(gain)], qk[:, len(gain) :], *values

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of qkv and gain from those of q, k and one or two of v."""
        return *qk_rope_backward(*ctx.saved_tensors, *grads), None, None, None


def norm_rope(
    qkv: Tensor, gain: Tensor, rope: Tensor, head_dim: int, fused: bool, uses: int = 1
) -> tuple[Tensor, ...]:
    """q (T, H, D), k and v (T, Hkv, D): q and k normed and rotated, q times its gain (H,).

    rope: (T, 2, 1, half) fp32, cosines and sines of each token. With two `uses`, v is returned
    twice: its gradients then meet in the kernel instead of in a pass of their own.
    """
    if fused:
        return NormRope.apply(qkv, gain, rope, head_dim, uses)
    H = len(gain)
    qk = qk_rope_reference(qkv, gain, rope, head_dim)
    values = qkv.unflatten(1, (-1, head_dim))[:, qk.size(1) :]
    return qk[:, :H], qk[:, H:], *([values] * uses)


# --- XSA ------------------------------------------------------------------------------------------
#
# From each head of y (T, H, D), its component along the token's own value v (T, Hkv, D) is removed:
# y - (y . u) u with u = v / |v| (PR #1530). The plain form of the forward is remove_own_value in
# section 4.


def xsa_reference(y: Tensor, v: Tensor) -> Tensor:
    """remove_own_value, whose result is as dense as the kernel's."""
    return remove_own_value(y.contiguous(), v)


def xsa_backward_reference(y: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and v. A value of length 0 removes nothing, so its gradient is 0."""
    y = y.contiguous()
    grad = grad.contiguous()
    wide = torch.promote_types(y.dtype, torch.float32)
    KV = v.size(1)
    g = grad.to(wide).unflatten(1, (KV, -1))  # (T, Hkv, H / Hkv, D)
    x = y.to(wide).unflatten(1, (KV, -1))
    length = v.to(wide).norm(dim=-1, keepdim=True)  # (T, Hkv, 1)
    safe_length = length.clamp_min(1e-12)
    unit = v / safe_length  # (T, Hkv, D)
    group_unit = unit.unsqueeze(2)
    g_along = (g * group_unit).sum(-1, keepdim=True)
    x_along = (x * group_unit).sum(-1, keepdim=True)
    dy = torch.addcmul(g, g_along, group_unit, value=-1)
    dunit = -(g_along * x).addcmul_(x_along, g).sum(2)
    along = (dunit * unit).sum(-1, keepdim=True) * (length > 1e-12)
    dv = dunit.addcmul_(along, unit, value=-1).div_(safe_length)
    return dy.flatten(1, 2).to(y.dtype), dv.to(v.dtype)


@jit
def load_unit_value(v, r, col, mask, stride, KV: tl.constexpr, D: tl.constexpr):
    """Value head r divided by its length, in fp32, and the length. stride: of v's rows."""
    u = tl.load(v + r // KV * stride + r % KV * D + col, mask, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(u * u, 1, keep_dims=True))
    return u / tl.maximum(length, 1e-12), length


# ruff: disable[PLR0913]
@jit
def xsa_kernel(
    y,
    v,
    out,
    stride,
    rows,
    G: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out (T, H, D): y without its component along v. r is a value head with G query heads."""
    r, col = heads_of_program(ROWS, COLS)
    mask = (r < rows) & (col < D)
    u, _ = load_unit_value(v, r, col, mask, stride, KV, D)
    for i in range(G):
        query = (r * G + i) * D + col
        x = tl.load(y + query, mask, other=0.0).to(tl.float32)
        along = tl.sum(x * u, 1, keep_dims=True)
        tl.store(out + query, (x - along * u).to(out.dtype.element_ty), mask)


@jit
def xsa_backward_kernel(
    grad,
    y,
    v,
    dy,
    dv,
    stride,
    rows,
    G: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dy (T, H, D): grad without its component along v. dv (T, KV, D): the gradient through u."""
    r, col = heads_of_program(ROWS, COLS)
    mask = (r < rows) & (col < D)
    u, length = load_unit_value(v, r, col, mask, stride, KV, D)
    du = tl.zeros((ROWS, COLS), tl.float32)
    for i in range(G):
        query = (r * G + i) * D + col
        g = tl.load(grad + query, mask, other=0.0).to(tl.float32)
        g_along = tl.sum(g * u, 1, keep_dims=True)
        x = tl.load(y + query, mask, other=0.0).to(tl.float32)
        du -= g_along * x + tl.sum(x * u, 1, keep_dims=True) * g
        tl.store(dy + query, (g - g_along * u).to(dy.dtype.element_ty), mask)
    along = tl.where(length > 1e-12, tl.sum(du * u, 1, keep_dims=True), 0.0)
    dvalue = (du - along * u) / tl.maximum(length, 1e-12)
    tl.store(dv + r * D + col, dvalue.to(dv.dtype.element_ty), mask)


# ruff: enable[PLR0913]


def xsa_cuda(y: Tensor, v: Tensor, tile: tuple | None = None) -> Tensor:
    """xsa on a GPU, with the fastest tile unless one is given."""
    y = y.contiguous()
    v = dense_heads(v)
    T, KV, D = v.shape
    out = y.new_empty(y.shape)
    sizes = dict(G=y.size(1) // KV, KV=KV, D=D)
    launch_heads(xsa_kernel, "xsa", [y, v, out, v.stride(0)], T * KV, sizes, tile)
    return out


def xsa_backward_cuda(
    y: Tensor, v: Tensor, grad: Tensor, tile: tuple | None = None
) -> tuple[Tensor, Tensor]:
    """xsa_backward on a GPU, with the fastest tile unless one is given."""
    y = y.contiguous()
    v = dense_heads(v)
    grad = grad.contiguous()
    T, KV, D = v.shape
    dy = y.new_empty(y.shape)
    dv = v.new_empty(v.shape)
    sizes = dict(G=y.size(1) // KV, KV=KV, D=D)
    arguments = [grad, y, v, dy, dv, v.stride(0)]
    launch_heads(xsa_backward_kernel, "xsa_backward", arguments, T * KV, sizes, tile)
    return dy, dv


xsa = define_operator("xsa", xsa_reference, xsa_cuda)
xsa_backward = define_operator("xsa_backward", xsa_backward_reference, xsa_backward_cuda)


def save_xsa_inputs(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    """Saves y and v for the backward."""
    ctx.save_for_backward(*inputs)


def xsa_gradients(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and v."""
    return xsa_backward(*ctx.saved_tensors, grad)


xsa.register_autograd(xsa_gradients, setup_context=save_xsa_inputs)


# === 13. Attention backends ===
#
# Every backend has the signature of sdpa_varlen: q (T, H, D), k and v (T, Hkv, D), and cu_seqlens
# int32 (capacity + 1,), the start offsets of a row's segments, filled up with T. max_seqlen is a
# constant, so one graph serves all batches. A backend is causal within each segment, and no token
# may see another segment: only cu_seqlens separates segments, here and in every backend. The
# queries have offsets too, cu_queries. If a segment has fewer queries than keys, they are those
# of its last positions; it may also have none.
#
# torch.compile must trace a backend without a break, and its outputs and gradients must be those of
# masked SDPA: check_attention tests both. torch.compile can trace operators, which FA2, FA3 (from
# 2025-12) and torch's varlen are; SDPA becomes one here. FA4 was not an operator in 2026-08; it is
# refused until it is one.


class AttentionBackend(NamedTuple):
    """The module and the name in it under which a backend's function is imported."""

    module: str
    function: str


# The order is that of preference. sdpa is sdpa_varlen below, for any device and any float type.
ATTENTION_BACKENDS = {
    "fa3": AttentionBackend("flash_attn_interface", "flash_attn_varlen_func"),
    "fa4": AttentionBackend("flash_attn.cute", "flash_attn_varlen_func"),
    "fa2": AttentionBackend("flash_attn", "flash_attn_varlen_func"),
    "torch": AttentionBackend("torch.nn.attention.varlen", "varlen_attn"),
    "sdpa": None,
}
# Largest relative error (a ratio of norms) of an output or gradient. fp32 may be computed as TF32.
ATTENTION_TOLERANCE = {
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
    torch.float32: 2e-3,
    torch.float64: 1e-5,
}
# Raised if a package is absent or of another version, if its library does not load, if it refuses
# the dtype, the head width or the GPU, or if torch.compile has to break the graph.
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


# --- SDPA over packed documents -------------------------------------------------------------------
#
# A segment is a document, or a part of one; with DATA_LOADER=rows or shuffled it is a stretch of
# the stream of TRAIN_SEQ_LEN or EVAL_SEQ_LEN tokens, wherever documents begin.


class EqualRun(NamedTuple):
    """Neighbouring segments that form a batch: equally many queries, and equally many keys."""

    count: int  # segments
    queries: slice  # their rows of q, y and the logsumexp
    keys: slice  # their rows of k and v

    def query_batch(self, x: Tensor) -> Tensor:
        """View (count, heads, queries per segment, ...) of the run's rows of x (n, heads, ...)."""
        return x[self.queries].unflatten(0, (self.count, -1)).transpose(1, 2)

    def key_batch(self, x: Tensor) -> Tensor:
        """View (count, heads, keys per segment, ...) of the run's rows of x (T, heads, ...)."""
        return x[self.keys].unflatten(0, (self.count, -1)).transpose(1, 2)

    def batches(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The run's batches of q, k and v, or of their gradients."""
        return self.query_batch(q), self.key_batch(k), self.key_batch(v)


def equal_runs(cu_queries: Tensor, cu_keys: Tensor, merge: bool) -> Iterator[EqualRun]:
    """The segments that have queries, in order; with `merge`, equal neighbours in one run.

    cu_queries, cu_keys: int32 (segments + 1,). A segment without keys is padding.
    """
    pairs = zip(cu_queries.diff().tolist(), cu_keys.diff().tolist(), strict=True)
    lengths = [pair for pair in pairs if pair[1] > 0]
    if merge:
        counted = [(pair, len(list(same))) for pair, same in groupby(lengths)]
    else:
        counted = [(pair, 1) for pair in lengths]
    query_start = 0
    key_start = 0
    for (num_queries, num_keys), count in counted:
        queries = slice(query_start, query_start + count * num_queries)
        keys = slice(key_start, key_start + count * num_keys)
        if num_queries > 0:
            yield EqualRun(count, queries, keys)
        query_start = queries.stop
        key_start = keys.stop


def check_segments(
    q: Tensor, k: Tensor, cu_queries: Tensor, cu_keys: Tensor, max_seqlen: int
) -> None:
    """Asserts that both offsets fit their tensors, and that no segment is too long.

    A segment has at most max_seqlen keys, and no more queries than keys.
    """
    cu = torch.stack([cu_queries, cu_keys])
    lengths = cu.diff()
    ends = cu[:, [0, -1]].tolist()
    shortest = int(lengths[0].min())
    longest = int(lengths[1].max())
    fits = ends == [[0, len(q)], [0, len(k)]] and shortest >= 0 and longest <= max_seqlen
    queries_have_keys = bool((lengths[0] <= lengths[1]).all())
    assert fits and queries_have_keys, f"{ends=}, {shortest=}, {longest=}, {lengths=}"


def causal_options(q: Tensor, k: Tensor) -> dict[str, Any]:
    """Options of SDPA for queries (..., n, D) that are the last of the keys' positions (..., m, D).

    is_causal would take them for the first positions, so it is right only for n = m.
    """
    n, m = q.size(-2), k.size(-2)
    if n == m:
        return {"is_causal": True, "attn_mask": None}
    # -inf above the diagonal that ends at the last query and the last key.
    return {"is_causal": False, "attn_mask": q.new_full((n, m), -torch.inf).triu(1 + m - n)}


def plain_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA of a batch, causal: q (segments, H, n, D), k and v (segments, Hkv, m, D)."""
    return F.scaled_dot_product_attention(q, k, v, **causal_options(q, k), enable_gqa=True)


def causal_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """dq, dk and dv of plain_causal. Inside an operator autograd is off, so torch.func does it."""
    _, gradients = torch.func.vjp(plain_causal, q, k, v)
    return gradients(grad)


def sdpa_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Empty y (T, H, D), and zeros for the logsumexp (H, T), which only a CPU fills."""
    T, H, _ = q.shape
    lse = q.new_zeros((H, T), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("golf::sdpa_varlen", mutates_args=())
def sdpa_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor, Tensor]:
    """y (T, H, D) and logsumexp (H, T), run by run.

    On two cores, 16 x 512 bf16 tokens with H = 4 and D = 32 take 16 ms, and 35 ms in the backward.
    """
    check_segments(q, k, cu_queries, cu_seqlens, max_seqlen)
    q, k, v = (dense_heads(x) for x in (q, k, v))
    y, lse = sdpa_outputs(q)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # A GPU holds the (n, m) scores of a batch in memory, so it takes one segment at a time.
    for run in equal_runs(cu_queries, cu_seqlens, merge=q.is_cpu):
        q_batch, k_batch, v_batch = run.batches(q, k, v)
        if q.is_cpu:
            options = causal_options(q_batch, k_batch)
            y_batch, lse_batch = flash(q_batch, k_batch, v_batch, **options)
            run.query_batch(lse.T).copy_(lse_batch)
        else:
            y_batch = plain_causal(q_batch, k_batch, v_batch)
        run.query_batch(y).copy_(y_batch)
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
    """dq, dk and dv from the gradient of y and from what sdpa_varlen was given and returned."""
    grad, q, k, v, y = (dense_heads(x) for x in (grad, q, k, v, y))
    # Keys of segments without queries are never visited: their gradients are zero.
    dq = q.new_empty(q.shape)
    dk = k.new_zeros(k.shape)
    dv = v.new_zeros(v.shape)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for run in equal_runs(cu_queries, cu_seqlens, merge=q.is_cpu):
        grad_batch = run.query_batch(grad)
        q_batch, k_batch, v_batch = run.batches(q, k, v)
        if q.is_cpu:
            results = run.query_batch(y), run.query_batch(lse.T)
            options = causal_options(q_batch, k_batch)
            gradients = flash(
                grad_batch, q_batch, k_batch, v_batch, *results, dropout_p=0.0, **options
            )
        else:
            gradients = causal_gradients(grad_batch, q_batch, k_batch, v_batch)
        for view, gradient in zip(run.batches(dq, dk, dv), gradients, strict=True):
            view.copy_(gradient)
    return dq, dk, dv


@sdpa_varlen.register_fake
def sdpa_varlen_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor, Tensor]:
    """Outputs without values, while a graph is traced."""
    return sdpa_outputs(q)


@sdpa_varlen_backward.register_fake
def sdpa_varlen_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs without values, while a graph is traced."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def save_attention(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Saves what sdpa_varlen_backward needs."""
    q, k, v, cu_queries, cu_seqlens, _ = inputs
    y, lse = output
    ctx.save_for_backward(q, k, v, y, lse, cu_queries, cu_seqlens)


def attention_gradients(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k and v; the offsets and the length have none."""
    return *sdpa_varlen_backward(grad, *ctx.saved_tensors), None, None, None


sdpa_varlen.register_autograd(attention_gradients, setup_context=save_attention)


# --- Calling, checking and choosing a backend -----------------------------------------------------
# The functions of the backends that this process has loaded; candidate_attention adds others.
ATTENTION = {"sdpa": sdpa_varlen}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str,
    cu_queries: Tensor | None = None,
) -> Tensor:
    """y, of the shape of q, by a loaded backend; scores are scaled by D ** -0.5.

    Query head h reads key/value head h // (H // Hkv). Without cu_queries all tokens are queries.
    """
    if cu_queries is None:
        cu_queries = cu_seqlens
    y = ATTENTION[backend](q, k, v, cu_queries, cu_seqlens, max_seqlen)
    # sdpa_varlen, FA4, and FA3 before 2025-07 return the logsumexp as well.
    return y[0] if isinstance(y, tuple) else y


def load_attention(backend: str) -> Callable[..., Tensor]:
    """The function of an imported backend, with the signature of sdpa_varlen.

    Raises one of BACKEND_ERRORS if it cannot be imported.
    """
    module, name = ATTENTION_BACKENDS[backend]
    function = getattr(importlib.import_module(module), name)
    if backend == "torch":
        return adapt_torch_varlen(function)

    return adapt_flash_varlen(function)


def adapt_flash_varlen(function: Callable) -> Callable[..., Tensor]:
    """flash_attn_varlen_func of FA2, FA3 or FA4 with the signature of sdpa_varlen.

    FA4 has no lengths before 2026-01 and takes them from the offsets. FA3 of 2025-01 demands the
    used lengths of segments, of which None means all. Raises TypeError for any other signature.
    """
    signature = inspect.signature(function)
    known = signature.parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    length_names = ["max_seqlen_q", "max_seqlen_k"]
    if not takes_any:
        length_names = [name for name in length_names if name in known]
    options: dict[str, Any] = {"causal": True}
    for name in ("seqused_q", "seqused_k"):
        if name in known and known[name].default is inspect.Parameter.empty:
            options[name] = None
    # This error names the parameter; that of torch.compile would not.
    given = dict.fromkeys(["cu_seqlens_q", "cu_seqlens_k", *length_names])
    signature.bind(None, None, None, **given, **options)

    def flash(q, k, v, cu_queries, cu_seqlens, max_seqlen):
        offsets = {"cu_seqlens_q": cu_queries, "cu_seqlens_k": cu_seqlens}
        lengths = dict.fromkeys(length_names, max_seqlen)
        return function(q, k, v, **offsets, **lengths, **options)

    return flash


def adapt_torch_varlen(function: Callable) -> Callable[..., Tensor]:
    """torch's varlen_attn with the signature of sdpa_varlen, in every version of torch that has it.

    2.10 has `is_causal`, later ones a window. `enable_gqa` is required since 2.12, implied before.
    """
    known = inspect.signature(function).parameters
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1, 0)
    else:
        options["is_causal"] = True
    if "enable_gqa" in known:
        options["enable_gqa"] = True

    def varlen(q, k, v, cu_queries, cu_seqlens, max_seqlen):
        return function(q, k, v, cu_queries, cu_seqlens, max_seqlen, max_seqlen, **options)

    return varlen


# The row on which backends are compared: documents of 1, 129 and 170 tokens, and padding. It is
# tried twice: with all tokens as queries, then with the token of the first document, none of the
# second, and the last 48 of the third.
PROBE_CU_SEQLENS = [0, 1, 130, 300, 300, 300]
PROBE_CU_QUERIES = [0, 1, 1, 49, 49, 49]
PROBE_QUERIES = [0, *range(252, 300)]


def reference_attention(grad: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """y, dq, dk and dv of both tries in fp32 or better, from the gradient of y and q, k, v.

    It is one SDPA over the row with a mask of every pair that is causal and in one document.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    leaves = [x.detach().to(wide).requires_grad_() for x in inputs]
    heads = [x.repeat_interleave(4 // x.size(1), 1).transpose(0, 1) for x in leaves]
    lengths = torch.tensor(PROBE_CU_SEQLENS, device=grad.device).diff()
    document = torch.arange(len(lengths), device=grad.device).repeat_interleave(lengths)
    mask = (document[:, None] == document).tril()
    y = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(0, 1)
    results = []
    for tokens in (slice(None), PROBE_QUERIES):
        part = y[tokens]
        gradients = torch.autograd.grad(part, leaves, grad[tokens].to(wide), retain_graph=True)
        results += [part, *gradients]
    return results


def candidate_attention(backend: str, grad: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """y, dq, dk and dv of both tries from a backend, compiled into one graph.

    Raises one of BACKEND_ERRORS if it cannot.
    """
    if backend not in ATTENTION:
        ATTENTION[backend] = load_attention(backend)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    q, k, v = leaves
    cu_seqlens = torch.tensor(PROBE_CU_SEQLENS, dtype=torch.int32, device=grad.device)
    cu_queries = torch.tensor(PROBE_CU_QUERIES, dtype=torch.int32, device=grad.device)
    results = []
    for tokens, cu in ((slice(None), None), (PROBE_QUERIES, cu_queries)):
        y = compiled(q[tokens], k, v, cu_seqlens, 256, backend, cu)
        results += [y, *torch.autograd.grad(y, leaves, grad[tokens])]
    return results


def check_attention(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why to refuse a backend, in one line; empty if it compiles whole and its numbers are SDPA's.

    The numbers are y, dq, dk and dv of both tries. The global random state is left alone.
    """
    rng = torch.Generator(device).manual_seed(0)
    grad, *inputs = (
        torch.randn(300, heads, 64, generator=rng, device=device).to(dtype)
        for heads in (4, 4, 2, 2)
    )
    references = reference_attention(grad, inputs)
    try:
        results = candidate_attention(backend, grad, inputs)
    except BACKEND_ERRORS as failure:
        message = str(failure).strip() or repr(failure)
        return message.splitlines()[0][:200]
    pairs = zip(results, references, strict=True)
    errors = torch.stack([(x - z).norm() / z.norm() for x, z in pairs])
    largest = float(errors.max().detach())
    if largest <= ATTENTION_TOLERANCE[dtype]:  # false for NaN
        return ""
    return f"relative error {largest:.1e} against masked SDPA"


def choose_attention(
    requested: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, list[str]]:
    """A backend for `attention`, and lines for the log: those refused, then the one chosen.

    "auto" takes the first of ATTENTION_BACKENDS that passes check_attention. If the one requested,
    or all, are refused, raises UsageError, which names the others that would work.
    """
    if requested == "auto" and device.type == "cpu":
        return "sdpa", ["attention_backend:sdpa (the others need a GPU)"]

    if requested == "auto":
        candidates = list(ATTENTION_BACKENDS)
        # On a GPU sdpa loops over documents, which takes seconds per training step. Bf16 has faster
        # backends, so sdpa is used only if asked for by name; other types often have no other.
        if dtype == torch.bfloat16:
            candidates.remove("sdpa")
    else:
        candidates = [name for name in ATTENTION_BACKENDS if name == requested]

    log = []
    reason = "no such backend"
    for name in candidates:
        reason = check_attention(name, device, dtype)
        if not reason:
            log.append(f"attention_backend:{name}")
            return name, log
        log.append(f"{name}: {reason}")

    others = [name for name in ATTENTION_BACKENDS if name not in candidates]
    working = [name for name in others if not check_attention(name, device, dtype)]
    raise UsageError(
        f"ATTENTION_BACKEND={requested}: {reason}; works here: {', '.join(working) or 'none'}"
    )


# === 14. Names of variables: what other scripts and clusters set ==================================
# A variable that this program does not read must not be ignored in silence: it is translated, or
# refused with the reason, or, where a cluster may have set it, warned of.

# Spellings of other programs for knobs of this one.
ALIASES = {
    "VAL_BATCH_SIZE": "VAL_BATCH_TOKENS",
    "TTT_MAX_EVAL_SECS": "EVAL_DEADLINE_SECONDS",
    "GLOBAL_TTT_LR": "TTT_LR",
    "GLOBAL_TTT_EPOCHS": "TTT_EPOCHS",
    "GLOBAL_TTT_CHUNK_TOKENS": "TTT_CHUNK_TOKENS",
    "GLOBAL_TTT_MOMENTUM": "TTT_MOMENTUM",
    "GLOBAL_TTT_BATCH_SEQS": "TTT_BATCH_SEQS",
    "GLOBAL_TTT_GRAD_CLIP": "TTT_GRAD_CLIP",
    "FUSED_CE_ENABLED": "FUSED_CE",
    "MUON_WEIGHT_DECAY": "MUON_WD",
    "ADAM_WEIGHT_DECAY": "ADAM_WD",
    "MUON_EQ_R": "MUON_ROW_NORMALIZE",
    "NEGATIVE_SLOPE": "LEAKY_SLOPE",
    "SWA_START_FRAC": "SWA_THRESHOLD",
    "QAT_THRESHOLD": "LATE_QAT_THRESHOLD",
    "WARMDOWN_FRACTION": "WARMDOWN_FRAC",
    "BIGRAM_BUCKETS": "BIGRAM_VOCAB_SIZE",
    "BIGRAM_HASH_BUCKETS": "BIGRAM_VOCAB_SIZE",
    "BIGRAM_HASH_DIM": "BIGRAM_DIM",
    "SMEAR_GATE": "SMEAR_GATE_ENABLED",
    "SMEAR_GATE_WIDTH": "GATE_WINDOW",
    "SLIDING_EVAL": "SLIDING_WINDOW_ENABLED",
    "SLIDING_EVAL_STRIDE": "EVAL_STRIDE",
    "EVAL_TEMP": "LOGIT_TEMPERATURE",
    "EVAL_TEMPERATURE": "LOGIT_TEMPERATURE",
    "EVAL_ONLY_QUANTIZED_PATH": "EVAL_ONLY_PATH",
    "QUANT_BITS": "MATRIX_BITS",
    "QUANT_BITS_EMBED": "EMBED_BITS",
    "GPTQ_EMBED_CLIP_SIGMAS": "EMBED_CLIP_SIGMAS",
    "NUM_ITERATIONS": "ITERATIONS",
}

# Switches of the published scripts: a field or property of Config that is not 0 where the switch is
# on, and how to make it so. A switch that agrees is accepted.
SWITCHES = {
    "CASEOPS_ENABLED": ("reads_caseops", "set DATASET"),
    "PHASED_TTT_ENABLED": ("phased_ttt_num_phases", "set PHASED_TTT_NUM_PHASES"),
    "PARALLEL_RESIDUAL": ("parallel_start_layer", "set PARALLEL_START_LAYER"),
    "BIGRAM_HASH": ("bigram_vocab_size", "set BIGRAM_VOCAB_SIZE"),
    "USE_BIGRAM_HASH": ("bigram_vocab_size", "set BIGRAM_VOCAB_SIZE"),
    "TIE_EMBEDDINGS": ("ties_embeddings", "the head is the embedding"),
    "EMA_ENABLED": ("exports_average", "set EXPORT_WEIGHTS=ema or raw"),
}

# Knobs of the published scripts that are refused here, each with the reason. Silently ignoring one
# would let the user believe that it works.
SET_ELSEWHERE = {
    "ROPE_YARN": "ROPE_TRAIN_SEQ_LEN alone decides",
    "MLP_HIDDEN": "set MLP_MULT",
    "DATA_PATH": "set DATA_DIR, DATASET",
    "TRAIN_FILES": "set DATA_DIR, DATASET",
    "VAL_FILES": "set DATA_DIR, DATASET",
    "QAT_ENABLED": "set LATE_QAT=1 LATE_QAT_THRESHOLD=2",
    "SWA_ENABLED": "set EXPORT_WEIGHTS=swa",
    "LAWA_ENABLED": "set EXPORT_WEIGHTS",
    "EMBEDDING_DIM": "the head is the embedding",
    "EMBED_LR": "the head is the embedding; set TIED_EMBED_LR",
    "HEAD_LR": "the head is the embedding; set TIED_EMBED_LR",
    "TRAIN_SEQ_SCHEDULE": "set SEQ_LEN_SCHEDULE, as in 0:1024,0.1:2048",
    "TTT_SHORT_SCORE_FIRST_STEPS": "set TTT_SHORT_CHUNKS, which go by position",
    "TTT_LOCAL_LR_MULT": "set TTT_LORA_LR",
    "TTT_MASK": "set TTT_Q_LORA, TTT_V_LORA",
    "TRAIN_BATCH_SIZE": "set TRAIN_BATCH_TOKENS",
    "GRAD_ACCUM_STEPS": "set MICRO_BATCH_TOKENS, the tokens of a row",
    "GPTQ_RESERVE_MS": "set GPTQ_RESERVE_SECONDS",
    "GPTQ_CLIP_SIGMAS": "set MATRIX_CLIP_SIGMAS and QUANTIZER=gptq",
    "TARGET_MB": "set ARTIFACT_LIMIT_BYTES",
    "PARALLEL_RESIDUAL_START": "set PARALLEL_START_LAYER, which begins two lanes (PR #1530)",
}
AGAINST_THE_RULES = {
    "TTT_TEMP_RESCALE": "a factor on the nats is no probability (ruling on PR #605);"
    " LOGIT_TEMPERATURE keeps a sum of 1",
    "TTT_MIN_NLL": "the best of several passes is chosen by the answer (ruling on PR #605)",
    "TTT_COSINE_LR": "a fall over the document reveals its length; set TTT_COSINE_CHUNKS",
}
# They never changed a score, or have nothing to change in this program.
WITHOUT_EFFECT = {
    "MUON_BETA2": "nothing read it; see MUON_SQUARE_DECAY",
    "CONTROL_TENSOR_NAME_PATTERNS": "nothing read it",
    "LOOP_CLIP_SIGMAS": "no gain was ever reported (PR #1530); set MATRIX_CLIP_SIGMAS",
    "TTT_FAST": "there is one way to adapt; bench/evaluation.py times the published one",
    "TTT_CUDA_GRAPH": "it gains nothing: most graphs would be captured within the clock",
    "EVAL_BUDGET_INCLUDES_COMPILE": "set EVAL_DEADLINE_SECONDS",
    "TTT_EVAL_BATCHES": "it was for debugging",
    "TTT_OUTPUT_DIR": "it was for debugging",
    "TTT_DEBUG_BYPASS": "it was for debugging",
    "ASYM_LOGIT_RESCALE": "no optimiser of the published runs held its two scalars",
    "SMEAR_GATE_BOS_FIX": "SmearGate takes nothing across a BOS here",
    "EVAL_INCLUDE_TAIL": "every target is scored",
}
REJECTED_NAMES = SET_ELSEWHERE | AGAINST_THE_RULES | WITHOUT_EFFECT
# Those of them whose value is a path to shards.
PATHS_OF_SHARDS = ("DATA_PATH", "TRAIN_FILES", "VAL_FILES")

# What to say of names that belong to parts of public scripts which are not here; * stands for any
# text. They are refused unless their value, one of OFF, switches the part off. This table and the
# next stay behind when the file is packed.
OFF = ("", "0", "0.0", "-1", "none", "false")
ABSENT = {
    "QUANTIZER=allocated gives those rows finer steps (PR #1797)": "LQER_* AWQ_*",
    "set SPARSE_ATTN_GATE_ENABLED, the later form (PR #1787)": """
        ATTN_OUT_GATE* GATED_ATTN* GATED_ATTENTION GATE_ATTN_* GATE_MLP_OUT GATE_WIDTH
        SPARSE_ATTN_GATE_INIT_STD""",
    "set NUM_LOOPS, LOOP_START, LOOP_END, ENABLE_LOOPING_AT (PR #1394)": """
        RECUR_* LOOP_PHASE2_AT *_DEPTH_RECURRENCE EFFECTIVE_DEPTH NUM_UNIQUE_BLOCKS
        DEPTH_LORA_RANK""",
    "off or dropped since (PR #1204, #1412)": """
        *UNTIE_LOOP_MLPS *UNTIE_MLP* UNTIE_AT_FRACTION BANK_SPLIT MATRIX_LR_EARLY MATRIX_LR_LATE
        CANON_AC_LAYERS DISABLE_LAYER0_ATTN PARALLEL_START_LAYER_IS_PHYSICAL""",
    "off in every record, dropped in PR #1218": "VALUE_RESIDUAL DTG_ENABLED MTP_* TRIGRAM",
    "set TILT_ORDER (PR #2135)": "NGRAM_*",
    "it learns from what it then scores (PR #1209)": "SLOT_ENABLED SLOT_LR SLOT_STEPS ETLB_*",
    "set LOGIT_TEMPERATURE, chosen beforehand (PR #640)": "TEMP_SCALING TEMP_CALIB",
    "no rate depends on the loss (PR #1412)": "TTT_ENTROPY_* TTT_NS_STEPS",
    "set PHASED_TTT_NUM_PHASES (PR #1626)": """
        GLOBAL_TTT_WARMUP_* GLOBAL_TTT_RESPECT_* GLOBAL_TTT_DOC_LIMIT TTT_DOC_LIMIT""",
    "set EVAL_ONLY_PATH": """
        PREQUANT_ONLY TTT_ONLY TTT_ONLY_EVAL TTT_EVAL_ONLY SKIP_POST_TRAIN_EVAL
        POST_GPTQ_EVAL_ONLY SWEEP_MODE""",
    "set MUON_COEFFS=polar (PR #1787)": "POLAR_EXPRESS USE_POLAR_EXPRESS USE_GRAM_NS",
    "set SMEAR_ENABLED (PR #162) or SMEAR_GATE_ENABLED (PR #1667)": "USE_SMEARGATE SMEAR",
    "set COMPRESSOR": "USE_ZSTD USE_LZMA USE_BROTLI ZSTD_LEVEL",
    "set QUANTIZER, MATRIX_BITS and CLIP_SIGMAS (PR #1394)": """
        USE_GPTQ USE_INT6 GPTQ_ENABLED GPTQ_LITE QAT_INT6 QUANT_BITS_MLP QUANT_CLIP_RANGE
        QUANT_CONFIG INT4_* INT5_* INT6_* N_INT6_LAYERS MIXED_QUANT HESSIAN_CLIP_LAMBDA CLIP_MULT_*
        LOOP_LAYER_* FP_STORAGE SCALE_STORAGE""",
    "set TABLES_FP16": "FP16_EMBED_EXPORT",
    "set PRUNE_FRAC": "PRUNE_RATIO",
    "set LATE_QAT, LATE_QAT_THRESHOLD": "QAT_FRACTION QAT_START_FRAC QAT_AFTER_STEP QAT_BITS",
    "set GPTQ_CALIBRATION_BATCHES, rows of training text (PR #1019: of its own text)": """
        GPTQ_AR_SELFGEN GPTQ_GEN_* GPTQ_TEMPERATURE GPTQ_NUM_SEQS GPTQ_BATCH_SIZE GPTQ_CALIB_*""",
    "set ROPE_TRAIN_SEQ_LEN, ROPE_BASE": "EVAL_NTK_ALPHA YARN_MAX_LEN ROPE_TYPE",
    "set VAL_DOC_FRACTION; every target is scored": "VAL_MAX_* EVAL_OVERLAP EVAL_STATE_RESET",
    "set SEQ_LEN_SCHEDULE (PR #2014)": """
        SEQ_LEN_START SEQ_SCHEDULE_FRACTION BATCH_TOKENS_START BATCH_SCHEDULE_FRACTION""",
    "set EXPORT_WEIGHTS": "LAWA_* SWA_DECAY EMA_START_FRACTION",
    "set MUON_WD, which is constant (PR #1729: falling)": "WD_TAPER_* CAUTIOUS_WD",
    "set WARMDOWN_FRAC, MIN_LR": """
        WARMDOWN_SHAPE LR_SCHEDULE LR_START LR_WARMUP_STEPS MUON_COOLDOWN_*""",
    "no later record has it (PR #86, #640)": "BLOCK_LARS_* ASYMMETRIC_LOGIT MATRIX_OPTIMIZER",
    "another network (PR #542, #640, #903, #1104, #1337, #1371, #1388, #1443, #1644, #2058)": """
        ATTN_VARIANT ATTN_PROJ_TYPE ATTN_RES BINARIZE_ACTIVATIONS BITNET_* BLOCK_TYPE CE_PURE_FRAC
        CE_WEIGHT CHURN_LOG_EVERY COEFF_LR_* CORR_WEIGHT_LR DETACH_TARGETS DIFF_ATTN EGGROLL_*
        EMBED_INNER_DIM FITNESS_SHAPING GDN_* HNET_* INDEPENDENT_LR JEPA_* LATENT_KV_DIM LEGENDRE_*
        LOGIT_HEAD_TYPE MAMBA3_* MLP_EVERY MLP_GROUPS MLP_RANK NUM_ATTN_LAYERS NUM_LIGHT_BLOCKS
        NUM_VIRTUAL_LAYERS OUTER_LAYERS POP_SIZE PREDICTOR_* PROJECTOR_* RATIO_LOSS_WEIGHT REFINER*
        SIGN_COMPRESS_REG SIGREG_* SKIP_TOKENS SOFTCAP_TYPE TARGET_AVG_CHUNK_LEN TVERSKY_*
        USE_ORTHO_INIT USE_WRAP WRAP_INIT_SCALE XNOR_*""",
}
# The same for names that are only warned of: they change no score, or others may set them, too.
WARNED = {
    "set MATRIX_LR, SCALAR_LR, TIED_EMBED_LR": "LEARNING_RATE ADAM_LR LR MUON_LR",
    "set TRAIN_BATCH_TOKENS": "BATCH_SIZE",
    "set ITERATIONS": "ITERS NUM_STEPS MAX_STEPS TRAIN_STEPS",
    "set NUM_LAYERS": "LAYERS N_LAYER N_LAYERS",
    "set MODEL_DIM": "DIM",
    "set WARMDOWN_FRAC": "WARMDOWN",
    "set MUON_WD, ADAM_WD, EMBED_WD": "WEIGHT_DECAY",
    "set DATA_DIR, DATASET": """
        DATASETS DATASETS_DIR DATASET_DIR DATASET_PATH TOKENIZER""",
    "set ARTIFACT_DIR": "MODEL_DIR OUT_DIR MODEL_SAVE_PATH CHECKPOINT_DIR",
    "set CHECKPOINT_EVERY and RUN_ID": "RESUME_FROM",
    "set VAL_BATCH_TOKENS": "EVAL_BATCH_* SW_EVAL_BATCH SLIDING_BATCH_SIZE",
    "set TABLES_FP16": "FP16_*_PATTERNS INT8_*_PATTERNS",
    "set EVAL_STRIDE": "STRIDE",
    "set EXPORT_WEIGHTS": "EMA",
    "set LATE_QAT": "QAT",
    "set TTT_LORA_RANK, TTT_LORA_LR": "LORA_RANK LORA_LR",
    "set COMPILE": "USE_COMPILE COMPILE_MODE COMPILE_MODEL",
    "nothing reads it": "MODE ACTIVATION EMBED_DIM D_STATE D_CONV EXPAND",
    "it changes no score": """
        GPTQ_DAMP GPTQ_BLOCK_SIZE TTT_HEARTBEAT_SECONDS LOGIT_CHUNK_TOKENS MLX_* USE_*_KERNEL""",
}


# A variable whose name begins so is meant for a program like this one.
FAMILIES = ("TTT_", "MUON_", "GPTQ_", "TILT_")


def canonical_names(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with every alias replaced by its knob's name. A knob's own spelling wins."""
    renamed = {ALIASES[name]: text for name, text in environ.items() if name in ALIASES}
    others = {name: text for name, text in environ.items() if name not in ALIASES}
    return renamed | others


def is_named(name: str, patterns: str) -> bool:
    """Whether a name matches one of several patterns with spaces between them."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split())


def reason_in(table: Mapping[str, str], name: str) -> str:
    """What ABSENT or WARNED says of a name; empty if the name is not in that table."""
    return next((reason for reason, names in table.items() if is_named(name, names)), "")


def knobs_of_path(path: Path) -> str:
    """The knobs that name the data set of a path below DATA_DIR/datasets, or nothing."""
    folder = path if not path.suffix and "*" not in path.name else path.parent
    if folder.parent.name != "datasets":
        return ""
    data_dir = shlex.quote(str(folder.parent.parent))
    return f"set DATA_DIR={data_dir} DATASET={shlex.quote(folder.name)}"


def could_be(name: str, text: str) -> bool:
    """Whether a knob could have this value, so that a name like the knob's may be a slip."""
    field = FIELDS[name.lower()]
    if isinstance(field.default, str):
        return "/" not in text or name.endswith(("_DIR", "_PATH"))
    with contextlib.suppress(ValueError):
        parse_knob(field, text)
        return True
    return False


def warnings_of_names(environ: Mapping[str, str]) -> Iterator[str]:
    """A line for each variable that a public script reads and this program ignores."""
    for name, text in sorted(environ.items()):
        if reason := reason_in(WARNED, name):
            yield f"{name}={text}: not a knob of this program; {reason}"
        elif (
            name.startswith(FAMILIES)
            and name.lower() not in FIELDS
            and name not in {*ALIASES, *SWITCHES, *REJECTED_NAMES}
            and not reason_in(ABSENT, name)
        ):
            family = name.partition("_")[0]
            yield f"{name}={text}: not a knob of this program; --knobs {family} lists those"


def problems_of_names(given: Mapping[str, str]) -> Iterator[str]:
    """A line for each variable that this program lacks, or that looks like one of its knobs."""
    knobs = {name.upper() for name in FIELDS}
    # Others may use TRAIN_FILE and the like.
    other_names = [*ALIASES, *(REJECTED_NAMES.keys() - {"TRAIN_FILES", "VAL_FILES"})]
    for name in sorted(given.keys() - knobs - SWITCHES.keys()):
        text = given[name]
        if reason_in(WARNED, name):
            continue
        if name.upper() in knobs and could_be(name.upper(), text):
            yield f"{name}={text}: not a knob; names are in capitals: {name.upper()}"
            continue
        if reason := REJECTED_NAMES.get(name) or reason_in(ABSENT, name):
            if name in PATHS_OF_SHARDS:
                reason = knobs_of_path(Path(text)) or reason
            if name in REJECTED_NAMES or text.lower() not in OFF:
                yield f"{name}={text}: not a knob of this program; {reason}"
            continue
        # Names of other scripts must be closer: a cluster may set DATASET_PATH, unlike DATA_PATH.
        nearest = difflib.get_close_matches(name, other_names, n=1, cutoff=0.9)
        if not nearest:
            nearest = difflib.get_close_matches(name, knobs, n=1, cutoff=0.85)
        if not nearest and "_" in name:
            # MAX_WALLCLOCK for MAX_WALLCLOCK_SECONDS.
            nearest = [knob for knob in sorted(knobs) if knob.startswith(f"{name}_")]
        if not nearest:
            continue
        if nearest[0] in REJECTED_NAMES:
            reason = REJECTED_NAMES[nearest[0]]
            yield f"{name}={text}: not a knob of this program; {reason}"
        elif could_be(ALIASES.get(nearest[0], nearest[0]), text):
            yield f"{name}={text}: not a knob; did you mean {nearest[0]}?"


def problems_of_switches(environ: Mapping[str, str], cfg: Config) -> Iterator[str]:
    """A line for each switch of a public script that does not agree with the config."""
    for name, (field, remedy) in SWITCHES.items():
        if name in environ and bool(getattr(cfg, field)) == (environ[name].lower() in OFF):
            yield f"{name}={environ[name]}: not a knob of this program; {remedy}"


def problems_of_aliases(environ: Mapping[str, str]) -> Iterator[str]:
    """A line for each knob that is set twice, under two spellings, to different values."""
    for alias, name in ALIASES.items():
        if alias in environ and name in environ and environ[alias] != environ[name]:
            yield f"{alias}={environ[alias]}: the same knob as {name}={environ[name]}"


# === 15. Command line =============================================================================
def message_and_status(error: BaseException) -> tuple[str, int]:
    """The line for the user and the exit status, for an error that ends the program in one line."""
    if isinstance(error, KeyboardInterrupt):
        # raise_stopped gives both; Python's own, where no handler was set, has neither.
        return error.args or ("SIGINT: the run is stopped", 128 + signal.SIGINT)
    status = 1
    if isinstance(error, UsageError):
        status = 2
    elif isinstance(error, RunStopped):
        status = 3
    return str(error), status


def print_plan() -> int:
    """Prints what a run will need, and returns the exit status. Raises UsageError without tools/.

    It is a process of its own, because the program there imports this file.
    """
    path = Path(__file__).resolve().parent / "tools" / "plan.py"
    if not path.is_file():
        raise UsageError(f"--plan: needs {path}, which comes with the repository")
    return subprocess.run([sys.executable, str(path)]).returncode


def answer(argv: list[str]) -> None:
    """Prints what the arguments ask for: help, knobs or plan. Raises UsageError for others."""
    # A pipe that closes early, as that to `head`, ends the program in silence. Windows has no
    # SIGPIPE; there the default of SIGTERM is set again, which changes nothing.
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGTERM), signal.SIG_DFL)
    if argv in (["--help"], ["-h"]):
        # tools/pack.py leaves docstrings out, unless a source names its own as a variable.
        usage = "python train_gpt.py [--knobs [WORD] | --plan]; knobs are environment variables"
        print(inspect.getdoc(sys.modules[__name__]) or usage)
    elif argv[0] == "--knobs" and len(argv) <= 2:
        print_knobs(argv[1] if len(argv) == 2 else "")
    else:
        raise UsageError(
            f"{argv[0]}: knobs are environment variables; arguments are --knobs [WORD], --plan,"
            " --help"
        )


def main(argv: list[str]) -> int:
    """Runs the program. Returns its exit status.

    0: done. 1: the run failed. 2: wrong configuration or data. 3: stopped by a limit that the user
    has set. 128 + n: stopped by signal n, as a shell has it.
    """
    # Whether every rank is on its way to this same end.
    ends_together = False
    try:
        if argv == ["--plan"]:
            return print_plan()
        if argv:
            answer(argv)
            return 0
        prepare_output()
        handle_signals(raise_stopped)
        cfg, origin = Config.from_env(os.environ, torch.cuda.is_available())
        Run(cfg, origin, Ranks(os.environ), warnings_of_names(os.environ)).go()
        ends_together = True
    except (UsageError, RunStopped, KeyboardInterrupt, FloatingPointError, InvalidScore) as error:
        ends_together = isinstance(error, (UsageError, RunStopped, InvalidScore))
        message, status = message_and_status(error)
        tell_peers(message)
        # Rank 0 speaks for all. But some errors are known only to the rank that they happen to.
        if isinstance(error, (BadMatrix, BadRank)) or os.environ.get("RANK", "0") == "0":
            complain(message)
        return status
    except OutOfMemory as error:
        # Only the rank that it happened to knows.
        tell_peers(str(error))
        complain(f"rank {os.environ.get('RANK', '0')}: {error}")
        return 1
    except OSError as error:
        tell_peers(reason_of(error))
        ends_together = isinstance(error, FilesNotWritten)
        if not ends_together or os.environ.get("RANK", "0") == "0":
            complain(reason_of(error))
        return 1
    except Exception as error:
        if isinstance(error, RuntimeError) and is_lost_peer(error):
            complain_of_lost_peers(error)
            return 1
        tell_peers(f"{type(error).__name__}: {first_line(error)}")
        raise
    finally:
        # NCCL waits for all ranks when its group is destroyed. A rank that fails by itself would
        # hang there, its traceback unseen.
        if dist.is_initialized() and (ends_together or dist.get_backend() != "nccl"):
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
