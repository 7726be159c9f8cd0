"""What the test files share: a tiny data set, a tiny network, runs of the script and of ranks."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Processes run side by side, and spinning threads would fight for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import sentencepiece
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import warm_process
from tiny_run import TINY, VOCAB

import train_gpt as tg

torch.set_num_threads(1)
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or "
    "had an they which one shard token model layer number weight train score adapt window chunk "
    "answer letter river mountain paper garden"
).split()


@pytest.fixture(autouse=True)
def ignored_sigpipe() -> Iterator[None]:
    """Sets SIGPIPE back to how Python has it. The program sets its default before it prints help,
    and the next test that writes to a closed pipe would end the worker.
    """
    yield
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)


# Files of half a minute and more, longest first. A worker takes a whole file, and a long one begun
# last would leave the other worker idle.
LONG_FILES = [
    "test_bench.py",
    "test_sweep.py",
    "test_audit.py",
    "test_run.py",
    "test_evaluation.py",
    "test_resume.py",
    "test_faults_live.py",
    "test_kernels.py",
    "test_bench_evaluation.py",
    "test_pace.py",
    "test_training.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the long files first; the Makefile tells xdist to keep the order."""

    def rank(item: pytest.Item) -> int:
        name = item.path.name
        return LONG_FILES.index(name) if name in LONG_FILES else len(LONG_FILES)

    items.sort(key=rank)


def tiny_text(count: int, seed: int) -> list[str]:
    """`count` documents of 5 to 120 words, with line breaks, digits and letters outside ASCII."""
    rng = random.Random(seed)
    texts = []
    for i in range(count):
        words = [rng.choice(WORDS) for _ in range(rng.choice([5, 20, 60, 120]))]
        texts.append(" ".join(words) + rng.choice([".", "!", f"\n{i} é ß 漢字", " 3.14"]))
    return texts


def write_dataset(
    root: Path, train: list[list[int]], val: list[list[int]], tokenizer: Path, name: str
) -> None:
    """Shards (two of training, cut inside a document) and manifest of token lists under `root`."""
    folder = root / "datasets" / name
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    prefix = name.split("_")[0]
    splits = {}
    for split, docs in (("train", train), ("val", val)):
        flat = np.concatenate([np.array(d, dtype=np.uint16) for d in docs])
        parts = np.split(flat, [len(flat) // 2]) if split == "train" else [flat]
        files = []
        for i, part in enumerate(parts):
            tg.write_shard(folder / f"{prefix}_{split}_{i:06d}.bin", part)
            files.append({"name": f"{prefix}_{split}_{i:06d}.bin", "tokens": len(part)})
        size = sum(len(model.decode(d[1:]).encode()) for d in docs)
        splits[split] = {"documents": len(docs), "tokens": len(flat), "bytes": size, "files": files}
    about = {
        "file": tokenizer.name,
        "sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
        "vocab_size": model.vocab_size(),
        "bos_id": model.bos_id(),
    }
    manifest = {"version": 1, "dataset": name, "tokenizer": about, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def train_tokenizer(text: Path, prefix: Path, split_digits: bool = True) -> None:
    """Trains a tokenizer of VOCAB pieces on a text file and writes it to `prefix`.model."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(prefix),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=split_digits,
        character_coverage=0.99,
        minloglevel=2,
    )


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATA_DIR with the data set `tiny_sp320`: 160 training and 12 validation documents.

    Copy it before changing it.
    """
    root = tmp_path_factory.mktemp("data")
    texts = tiny_text(172, seed=1)
    (root / "tokenizers").mkdir()
    prefix = root / "tokenizers" / f"tiny_sp{VOCAB}"
    (root / "text.txt").write_text("\n".join(t.replace("\n", " ") for t in texts), encoding="utf-8")
    train_tokenizer(root / "text.txt", prefix)
    model = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    docs = [[model.bos_id(), *model.encode(t)] for t in texts]
    write_dataset(root, docs[:160], docs[160:], Path(f"{prefix}.model"), f"tiny_sp{VOCAB}")
    return root


def caseops_texts() -> list[str]:
    """Documents with capitals in every position, literal operators and characters NFKC folds."""
    rng = random.Random(3)
    texts = []
    for text in tiny_text(200, seed=2):
        some, other, third = (rng.choice(WORDS) for _ in range(3))
        capitals = f"The {some.title()} of {other.upper()}, Mc{third.title()} \ue001 {third}\n"
        others = f"i{other.title()} A\u0300 CAF\u00c9  {some.upper()}s \ufb01 \u6f22"
        texts.append(f"{capitals}{others} {text}")
    return texts


CASEOPS_TEXTS = caseops_texts()


def published_caseops_model() -> Path:
    """The tokenizer of the published CaseOps data. Skips the test where it is not at hand."""
    name = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
    for folder in (ROOT / "data" / "tokenizers", ROOT.parent / "shared" / "tokenizers"):
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"{name} is not there")


def write_caseops_data(root: Path, *options: str) -> Path:
    """DATA_DIR with CaseOps data of CASEOPS_TEXTS as tools/prepare_data.py makes them.

    The data set is `tiny_sp320_caseops`, or has another number with --tokenizer in `options`.
    """
    sys.path.insert(0, str(ROOT / "tools"))
    import prepare_data

    for split, texts in (("train", CASEOPS_TEXTS[15:]), ("val", CASEOPS_TEXTS[:15])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / f"{split}.jsonl").write_text(lines)
    files = [str(root / "train.jsonl"), "--val", str(root / "val.jsonl"), "--name", "tiny"]
    command = ["text", *files, "--data-dir", str(root), *options]
    if "--tokenizer" not in options:
        command += ["--vocab-size", str(VOCAB)]
    if "--caseops" not in options:
        command += ["--caseops", "lossless_caps_caseops_v1"]
    assert prepare_data.main(command) == 0
    return root


@pytest.fixture(scope="session")
def caseops_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATA_DIR with the data set `tiny_sp320_caseops`. Copy it before changing it."""
    return write_caseops_data(tmp_path_factory.mktemp("caseops"))


def tiny_config(**overrides: object) -> tg.Config:
    """The tiny network's config, knobs overridden by field name."""
    changed = {
        k.upper(): str(int(v)) if isinstance(v, bool) else str(v) for k, v in overrides.items()
    }
    return tg.Config.from_env({**TINY, **changed}, has_cuda=False)[0]


def opened(cfg: tg.Config, ranks: tg.Ranks | None = None) -> dict[str, tg.TokenStream]:
    """Both splits of the data set, checked as a run checks them."""
    streams = {split: tg.TokenStream(cfg.dataset_dir, split) for split in ("train", "val")}
    tg.check_shards(cfg, tg.Tokenizer.load(cfg), ranks or tg.Ranks({}), streams)
    return streams


def run_script(
    env: dict[str, str], cwd: Path, ranks: int = 0, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """train_gpt.py in a process of its own, with `env` and little else set.

    If `ranks` is given, that many of them run under torchrun.
    """
    base = {k: os.environ[k] for k in ("PATH", "HOME", "LANG") if k in os.environ}
    base |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    script = ROOT / "train_gpt.py"
    # Only a new Python looks at PYTHONPATH.
    if not ranks and "PYTHONPATH" not in env:
        return warm_process.run([str(script)], base, cwd, timeout)
    command = [sys.executable, str(script)]
    if ranks:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        command, cwd=cwd, env=base, capture_output=True, text=True, timeout=timeout, check=False
    )


def start_rank(
    rank: int, env: dict[str, str], port: int, job: Callable, folder: Path, args: tuple
) -> None:
    """Called in a new process: keeps what job(ranks, *args) returns in a file."""
    os.environ.clear()
    os.environ |= env
    os.environ |= {"RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.save(job(tg.Ranks(os.environ), *args), folder / f"{rank}.pt")
    dist.destroy_process_group()


def on_ranks(world_size: int, job: Callable, folder: Path, *args: Any) -> list[Any]:
    """What job(ranks, *args) returns on each of `world_size` processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "WORLD_SIZE": str(world_size)}
    torch.multiprocessing.start_processes(
        start_rank, (env, port, job, folder, args), nprocs=world_size, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def final_line(output: str) -> dict:
    """The figures of the one line that starts with `final`."""
    lines = [line for line in output.splitlines() if line.startswith("final ")]
    assert len(lines) == 1, output[-2000:]
    return json.loads(lines[0].removeprefix("final "))
