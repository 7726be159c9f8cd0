"""Whole runs as users start them: processes, exit statuses, files and what they print."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from conftest import TINY, VOCAB, final_line, run_script, tiny_config, tiny_text, train_tokenizer

import train_gpt as tg

SCORE_FILES = ("scores.json", "documents.npz")
SCORES = ("pre_quantization", "quantized", "quantized_ttt_lora")
# What a model file knows by itself.
OF_NETWORK = {name.upper() for name in tg.NETWORK_FIELDS}
SHARDS = f"data/datasets/tiny_sp{VOCAB}"
EVAL = {k: v for k, v in TINY.items() if k not in OF_NETWORK}


class Finished(NamedTuple):
    """A run that ended well; `folder` holds its artifact, checkpoint and scores."""

    cwd: Path
    folder: Path
    output: str
    final: dict


def finish(env: dict[str, str], cwd: Path, ranks: int = 0) -> Finished:
    """A run that must end well."""
    cwd.mkdir(exist_ok=True)
    done = run_script(env, cwd, ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return Finished(cwd, cwd / "runs" / env["RUN_ID"], done.stdout, final_line(done.stdout))


@pytest.fixture(scope="session")
def first_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    env = {
        **TINY,
        "DATA_DIR": str(tiny_data),
        "RUN_ID": "first",
        "SLIDING_WINDOW_ENABLED": "1",
        "SEED": "7",
    }
    return finish(env, tmp_path_factory.mktemp("first"))


def listing(root: Path) -> dict[str, int]:
    return {
        str(p.relative_to(root)): p.stat().st_size if p.is_file() else -1
        for p in sorted(root.rglob("*"))
    }


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def start_ranks(env: dict[str, str], cwd: Path, count: int) -> list[subprocess.CompletedProcess]:
    """All ranks of a world, each by itself as a cluster starts them."""
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}

    def start(rank: int) -> subprocess.CompletedProcess:
        return run_script({**env, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


def data_copy(tiny_data: Path, to: Path) -> Path:
    """The tiny data set under `to`, free to be damaged; returns its folder of shards."""
    shutil.copytree(tiny_data, to / "data")
    return to / SHARDS


# --- A run that ends well -------------------------------------------------------------------------
@pytest.mark.parametrize("many", [0, 10**9])
def test_a_network_that_is_too_large_for_a_cpu_is_warned_of(many, monkeypatch):
    monkeypatch.setattr(tg, "MANY_FOR_A_CPU", many)
    lines = []
    parts = dict(cfg=tiny_config(), backend="sdpa", ranks=tg.Ranks({}), log=lines.append)
    tg.Run.build_model(SimpleNamespace(**parts))
    assert any("PRESET=cpu or SHRINK=1" in line for line in lines) == (many == 0)


def test_last_line_and_only_it_holds_every_figure(first_run, tiny_data):
    """`final_line` refuses a second one; here: the last, complete and consistent."""
    final = first_run.final
    assert first_run.output.rstrip("\n").splitlines()[-1].startswith("final {")
    manifest = json.loads(
        (tiny_data / "datasets" / f"tiny_sp{VOCAB}" / "manifest.json").read_text()
    )
    split = manifest["splits"]["val"]
    assert (final["val_bytes"], final["val_tokens"], final["val_docs"]) == (
        split["bytes"],
        split["tokens"] - 1,
        12,
    )
    for score in (*SCORES, "quantized_sliding_window"):
        bpb = final[f"{score}_loss"] / math.log(2) * final["val_tokens"] / final["val_bytes"]
        assert final[f"{score}_bpb"] == pytest.approx(bpb, rel=1e-12)
        assert 0 < final[f"{score}_loss"] < 2 * math.log(VOCAB)
    assert (final["val_loss"], final["val_bpb"]) == (
        final["quantized_ttt_lora_loss"],
        final["quantized_ttt_lora_bpb"],
    )
    assert final["quantized_loss"] != final["pre_quantization_loss"]
    assert (final["preset"], final["seed"], final["world_size"]) == ("cpu", 7, 1)
    assert (final["steps"], final["train_tokens"]) == (6, 6 * 512)
    assert "CPU" in final["device"]
    assert all(seconds >= 0 for seconds in final["seconds"].values())
    phases = {
        "check",
        "warm-up",
        "train",
        "calibrate",
        "quantise",
        "pack",
        *(f"score {s}" for s in SCORES),
    }
    assert phases | {"score quantized_sliding_window"} == final["seconds"].keys()


def test_figures_name_the_code_data_and_artifact_they_come_from(first_run, tiny_data):
    final = first_run.final
    artifact = (first_run.folder / "final_model.int6.ptz").read_bytes()
    shard = tiny_data / "datasets" / f"tiny_sp{VOCAB}" / "tiny_val_000000.bin"
    for key, data in {
        "code_sha256": (first_run.cwd / "logs" / "first.txt").read_bytes()[: final["code_bytes"]],
        "artifact_sha256": artifact,
        "tokenizer_sha256": (tiny_data / "tokenizers" / f"tiny_sp{VOCAB}.model").read_bytes(),
        "val_sha256": shard.read_bytes()[1024:],
    }.items():
        assert final[key] == hashlib.sha256(data).hexdigest(), key
    header, _ = tg.open_artifact(artifact, Path())
    others = sum(stored for _, stored, _ in header["streams"][1:])
    assert (
        final["codes_bytes"]
        == len(artifact) - 13 - int.from_bytes(artifact[5:9], "little") - others
    )
    assert final["model_bytes"] == len(artifact)
    assert final["artifact_bytes"] == len(artifact) + final["code_bytes"]


def test_run_leaves_its_log_checkpoint_artifact_and_scores(first_run):
    expected = {"logs", "logs/first.txt", "runs", "runs/first"}
    expected |= {
        f"runs/first/{name}" for name in ("final_model.pt", "final_model.int6.ptz", *SCORE_FILES)
    }
    assert listing(first_run.cwd).keys() == expected
    kept = json.loads((first_run.folder / "scores.json").read_text())
    assert kept.items() <= first_run.final.items()
    assert {f"{s}_bpb" for s in SCORES} <= kept.keys()


def test_log_begins_with_the_source_and_every_setting_with_its_origin(first_run):
    log = (first_run.cwd / "logs" / "first.txt").read_text(encoding="utf-8")
    source, rest = log.split("\nHyperparameters:\n", 1)
    assert source.startswith('"""One-file entry')
    assert len(source.encode()) == first_run.final["code_bytes"]
    compile(source, "log", "exec")
    names = sorted(f.name for f in dataclasses.fields(tg.Config))
    for name, line in zip(names, rest.splitlines(), strict=False):
        value, origin = re.fullmatch(rf"  {name}: (.*) \((default|preset|env)\)", line).groups()
        given = name.upper() in TINY or name in (
            "data_dir",
            "run_id",
            "sliding_window_enabled",
            "seed",
        )
        assert origin == (
            "env" if given else "preset" if name in tg.PRESETS["cpu"] else "default"
        ), name
        if name.upper() in TINY and re.fullmatch(r"[0-9]+", TINY[name.upper()]):
            assert float(value) == float(TINY[name.upper()]), name


def test_lines_keep_the_published_templates_and_a_table_of_phases_closes(first_run):
    output, final = first_run.output, first_run.final
    labels = ("diagnostic pre-quantization post-ema", "diagnostic quantized", "quantized_ttt_lora")
    scores = {
        **dict(zip(SCORES, labels, strict=True)),
        "quantized_sliding_window": f"{labels[1]}_sliding_window",
    }
    lines = [
        rf"{label} val_loss:{final[f'{key}_loss']:.8f} val_bpb:{final[f'{key}_bpb']:.8f} "
        r"eval_time:\d+ms"
        for key, label in scores.items()
    ]
    lines += [
        r"step:1/6 train_loss:\d+\.\d{4} train_time:\d+ms .*",
        r"layer_loop:enabled step:\d frac:0\.\d{3} .*",
    ]
    lines += [
        r"Total submission size quantized\+ans: \d+ bytes",
        r"model_params:\d+",
        "ttt_lora:docs:12 rank:4 .*",
    ]
    for line in lines:
        assert len(re.findall(rf"^{line}$", output, re.M)) == 1, line
    ending = output[output.index("\nphase ") : output.index("\nscore     ")]
    table = ending.splitlines()[2:]
    rows = {
        name: (float(seconds), counts)
        for name, seconds, counts in (re.split(r"  +", row) for row in table)
    }
    for name, seconds in final["seconds"].items():
        assert rows.pop(name)[0] == pytest.approx(seconds, abs=0.051)
    assert rows.keys() == {"all of train", "all of eval"}


# --- Starting from a file -------------------------------------------------------------------------
def test_artifact_alone_gives_the_same_scores_without_training_data(first_run, tiny_data, tmp_path):
    shards = data_copy(tiny_data, tmp_path)
    for path in shards.glob("*train*"):
        path.unlink()
    env = {**EVAL, "DATA_DIR": str(tmp_path / "data"), "RUN_ID": "again", "SEED": "7"}
    again = finish(
        {**env, "EVAL_ONLY_PATH": str(first_run.folder / "final_model.int6.ptz")}, tmp_path / "cwd"
    )
    for key in (
        "quantized_loss",
        "quantized_ttt_lora_loss",
        "val_bpb",
        "artifact_sha256",
        "artifact_bytes",
    ):
        assert again.final[key] == first_run.final[key], key
    assert (
        not {"pre_quantization_loss", "quantized_sliding_window_loss", "steps"} & again.final.keys()
    )
    assert listing(again.folder).keys() == set(SCORE_FILES)


def test_warm_up_of_an_artifact_neither_trains_nor_compresses(first_run, tiny_data, tmp_path):
    """So no budget of training, however small, refuses what only scores."""
    env = {
        **EVAL,
        "DATA_DIR": str(tiny_data),
        "EVAL_ONLY_PATH": str(first_run.folder / "final_model.int6.ptz"),
    }
    again = finish(
        {
            **env,
            "RUN_ID": "again",
            "SEED": "7",
            "MAX_WALLCLOCK_SECONDS": "20",
            "GPTQ_RESERVE_SECONDS": "13",
        },
        tmp_path,
    )
    assert again.final["val_bpb"] == first_run.final["val_bpb"]
    assert "warmup:done" in again.output
    assert not re.search(r"^(warmup_step|fit):", again.output, re.M)


def test_checkpoint_gives_the_same_artifact_to_the_byte(first_run, tiny_data, tmp_path):
    env = {
        **EVAL,
        "DATA_DIR": str(tiny_data),
        "RUN_ID": "again",
        "SEED": "7",
        "ARTIFACT_DIR": "a/b",
    }
    again = finish({**env, "EVAL_ONLY_PATH": str(first_run.folder / "final_model.pt")}, tmp_path)
    name = "final_model.int6.ptz"
    assert (tmp_path / "a/b" / name).read_bytes() == (first_run.folder / name).read_bytes()
    for key in (f"{score}_loss" for score in SCORES):
        assert again.final[key] == first_run.final[key], key


def test_four_ranks_score_one_artifact_alike(first_run, tiny_data, tmp_path):
    env = {**EVAL, "DATA_DIR": str(tiny_data), "RUN_ID": "ranks", "SEED": "7"}
    # A training step of one row would have none for the other ranks, but there is no training.
    env |= {"TRAIN_BATCH_TOKENS": "128"}
    artifact = str(first_run.folder / "final_model.int6.ptz")
    ranks = start_ranks({**env, "EVAL_ONLY_PATH": artifact}, tmp_path, count=4)
    assert [rank.returncode for rank in ranks] == [0] * 4, [rank.stderr[-1000:] for rank in ranks]
    shared = final_line(ranks[0].stdout)
    assert shared["world_size"] == 4
    for key in ("quantized_loss", "quantized_ttt_lora_loss"):
        assert shared[key] == pytest.approx(first_run.final[key], abs=1e-6)
    assert shared["val_bytes"] == first_run.final["val_bytes"]


def test_two_ranks_train_to_the_same_end(first_run, tiny_data, tmp_path):
    env = {**TINY, "DATA_DIR": str(tiny_data), "RUN_ID": "two", "SEED": "7"}
    two = finish(env, tmp_path, ranks=2)
    assert two.output.rstrip("\n").splitlines()[-1].startswith("final {")
    assert first_run.final.keys() - two.final.keys() == {
        f"quantized_sliding_window_{x}" for x in ("loss", "bpb")
    }
    assert (two.final["world_size"], two.final["steps"], two.final["train_tokens"]) == (
        2,
        6,
        6 * 512,
    )
    # The same rows make a step; only sums are rounded in another order.
    for score in SCORES:
        assert two.final[f"{score}_loss"] == pytest.approx(
            first_run.final[f"{score}_loss"], abs=0.01
        )
    assert listing(two.folder).keys() == listing(first_run.folder).keys()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="lists threads as Linux does")
def test_process_group_ends_with_the_run(first_run, tiny_data, tmp_path):
    """A thread of gloo that lives on may abort the process at exit, with the scores printed."""
    script = """if True:
        import glob, train_gpt
        assert train_gpt.main([]) == 0
        print(*(open(name).read() for name in glob.glob("/proc/self/task/*/comm")))"""
    env = {
        **EVAL,
        "DATA_DIR": str(tiny_data),
        "EVAL_ONLY_PATH": str(first_run.folder / "final_model.int6.ptz"),
    }
    env |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(tg.__file__).parent),
    }
    env |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "gloo" not in done.stdout.split("final {")[1]


# How main ends for each error: its exit status, and whether all ranks end alike.
ENDS = {
    None: (0, True),
    tg.UsageError("x"): (2, True),
    tg.RunStopped("x"): (3, True),
    tg.InvalidScore("x"): (1, True),
    tg.BadMatrix("x"): (1, False),
    FloatingPointError("x"): (1, False),
    KeyboardInterrupt("x", 143): (143, False),
    RuntimeError("Connection reset"): (1, False),
    ZeroDivisionError("x"): (None, False),
}


@pytest.fixture
def end_with(monkeypatch) -> Callable[..., tuple[int | None, list]]:
    """A function: what main returns when a run raises `error`, and the process groups it ended."""

    def end(error: BaseException | None, backend: str, rank: str) -> tuple[int | None, list]:
        ended = []

        def go() -> None:
            if error:
                raise error

        for name, value in {
            "is_initialized": lambda: True,
            "get_backend": lambda: backend,
            "get_rank": lambda: int(rank),
            "destroy_process_group": lambda: ended.append(backend),
        }.items():
            monkeypatch.setattr(tg.dist, name, value)
        for name, value in {
            "handle_signals": lambda act: None,
            "Ranks": lambda env: None,
            "Run": lambda *_: SimpleNamespace(go=go),
        }.items():
            monkeypatch.setattr(tg, name, value)
        monkeypatch.setattr(tg.os, "environ", {**TINY, "RANK": rank})
        try:
            return tg.main([]), ended
        except ZeroDivisionError:
            return None, ended

    return end


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
@pytest.mark.parametrize("error", ENDS, ids=repr)
def test_a_rank_that_fails_by_itself_does_not_wait_for_nccl(end_with, capsys, backend, error):
    """NCCL's communicator ends when all ranks end it; gloo's threads must be ended in any case."""
    status, together = ENDS[error]
    # An unknown error leaves main, so that its traceback is shown.
    assert end_with(error, backend, rank="3") == (
        status,
        [backend] if together or backend == "gloo" else [],
    )
    said = {
        tg.BadMatrix: "train_gpt.py: x\n",
        RuntimeError: "train_gpt.py: rank 3 lost a peer: Connection reset\n",
    }
    assert capsys.readouterr().err == said.get(type(error), "")


def test_an_interrupt_before_the_handlers_are_set_ends_in_one_line(monkeypatch, capsys):
    """Python's own KeyboardInterrupt has neither a message nor an exit status."""

    def interrupt(handler: Callable) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tg, "handle_signals", interrupt)
    assert tg.main([]) == 130
    assert capsys.readouterr().err == "train_gpt.py: SIGINT: the run is stopped\n"


@pytest.mark.parametrize("error", [tg.UsageError, tg.RunStopped, tg.InvalidScore], ids=repr)
def test_what_stops_all_ranks_is_one_line_of_the_first(end_with, capsys, error):
    end_with(error("why it stopped"), "gloo", rank="0")
    assert capsys.readouterr().err == "train_gpt.py: why it stopped\n"


def test_rows_loader_scores_every_token_too(tiny_data, tmp_path, first_run):
    env = {
        **TINY,
        "DATA_DIR": str(tiny_data),
        "RUN_ID": "rows",
        "DATA_LOADER": "rows",
        "PRESET": "pr1530",
    }
    rows = finish({**env, "COMPILE": "0", "COMPRESSOR": "lzma", "VAL_LOSS_EVERY": "3"}, tmp_path)
    assert (rows.final["preset"], rows.final["val_tokens"]) == (
        "pr1530",
        first_run.final["val_tokens"],
    )
    assert rows.final["val_bytes"] == first_run.final["val_bytes"]
    assert (
        len(re.findall(r"^[36]/6 val_loss: \d+\.\d{4} val_bpb: \d+\.\d{4}$", rows.output, re.M))
        == 2
    )
    spent = [
        float(seconds) for seconds in re.findall(r"^validate +([\d.]+)  none$", rows.output, re.M)
    ]
    assert len(spent) == 2 and rows.final["seconds"]["validate"] == pytest.approx(
        sum(spent), abs=0.11
    )


def test_nothing_compiles_after_warm_up_in_early_validation_late_scoring_or_calibration_alone(
    tiny_data, tmp_path
):
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\n"
        "compile = torch.compile\n"
        "def eager(f=None, options=None, **rest):\n"
        "    return compile(f, **rest | {'backend': 'aot_eager'})\n"
        "torch.compile = eager\n"
    )
    env = {
        **TINY,
        "DATA_DIR": str(tiny_data),
        "COMPILE": "1",
        "RECOMPILE_LIMIT": "0",
        "PYTHONPATH": str(tmp_path),
    }
    env |= {
        "NUM_LAYERS": "2",
        "PARALLEL_START_LAYER": "0",
        "XSA_LAST_N": "2",
        "VAL_LOSS_EVERY": "2",
    }
    run = finish({**env, "RUN_ID": "first", "ENABLE_LOOPING_AT": "0.5"}, tmp_path)
    lines = [
        line.split()[0]
        for line in run.output.splitlines()
        if re.match(r"\d/6 val_loss|layer_loop:enabled", line)
    ]
    assert lines == ["2/6", "layer_loop:enabled", "4/6", "6/6"]
    assert (run.final["recompilations"], "recompilation:" in run.output) == (0, False)
    env |= {"EVAL_ONLY_PATH": str(run.folder / "final_model.pt"), "EVAL_DEADLINE_SECONDS": "0.01"}
    again = finish({**env, "RUN_ID": "again"}, tmp_path)
    assert (again.final["recompilations"], again.final["artifact_sha256"]) == (
        0,
        run.final["artifact_sha256"],
    )
    assert re.search(
        r"^quantized_ttt_lora .*ms(, \d+ of 12 documents were scored without adaptation)?"
        r"(, \d+ chunks were not learnt from)?$",
        again.output,
        re.M,
    )


# --- Bad input ------------------------------------------------------------------------------------
class Bad(NamedTuple):
    """A case: words that its one line must hold; wrong knobs, or damage to a copy of the data."""

    expected: str
    env: dict[str, str] = {}
    damage: Callable[[Path], None] = lambda shards: None


def edit_shard(name: str, change: Callable[[np.ndarray], None]) -> Callable[[Path], None]:
    """Changes the ids of a shard in place."""

    def damage(shards: Path) -> None:
        ids = np.memmap(shards / name, dtype="<u2", mode="r+", offset=1024)
        change(ids)
        ids.flush()

    return damage


def edit_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda shards: (shards / name).write_bytes(change((shards / name).read_bytes())) and None


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda shards: [path.unlink() for path in shards.glob(pattern)] and None


def no_bos(ids: np.ndarray) -> None:
    ids[ids == 1] = 5


def other_tokenizer(shards: Path) -> None:
    """Another model of the same size, and no manifest that would tell."""
    (shards / "manifest.json").unlink()
    texts = (text.replace("\n", " ")[::-1] for text in tiny_text(100, seed=9))
    (shards / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    train_tokenizer(shards / "text.txt", shards / "other", split_digits=False)


TRAIN, VAL = "tiny_train_000001.bin", "tiny_val_000000.bin"
BAD = {
    "wrong magic": Bad(TRAIN, damage=edit_bytes(TRAIN, lambda b: b"\1" + b[1:])),
    "truncated shard": Bad(TRAIN, damage=edit_bytes(TRAIN, lambda b: b[:-2])),
    "other shard than the manifest's": Bad(
        VAL,
        damage=edit_bytes(
            VAL, lambda b: b[:8] + (len(b) // 2 - 513).to_bytes(4, "little") + b[12:-2]
        ),
    ),
    "id beyond the vocabulary": Bad(
        f"{TRAIN}: holds id 320", damage=edit_shard(TRAIN, lambda ids: ids.put(77, 320))
    ),
    "no BOS in training": Bad("BOS", damage=edit_shard("tiny_train_000000.bin", no_bos)),
    "no BOS at the start": Bad(f"{VAL}", damage=edit_shard(VAL, lambda ids: ids.put(0, 5))),
    "other text than the manifest's": Bad(
        "bytes", damage=edit_shard(VAL, lambda ids: ids.put(5, 1))
    ),
    "manifest that is none": Bad(
        "manifest.json", damage=edit_bytes("manifest.json", lambda b: b[: len(b) // 2])
    ),
    "tokenizer of another size": Bad("VOCAB_SIZE=321", {"VOCAB_SIZE": "321"}),
    "tokenizer that is none": Bad("TOKENIZER_PATH", {"TOKENIZER_PATH": f"{SHARDS}/{VAL}"}),
    "tokenizer the manifest does not name": Bad(
        "manifest.json",
        damage=edit_bytes("manifest.json", lambda b: re.sub(rb'"sha256": "\w', b'"sha256": "x', b)),
    ),
    "no data set": Bad(
        "nowhere: does not exist. Get it: ", {"DATASET": "nowhere", "TOKENIZER_PATH": "none"}
    ),
    "missing split": Bad("train", damage=remove("*train*")),
    "empty shard": Bad(VAL, damage=edit_bytes(VAL, lambda b: b[:8] + bytes(4) + b[12:1024])),
    "too little for a batch": Bad("TRAIN_BATCH_TOKENS=65536", {"TRAIN_BATCH_TOKENS": "65536"}),
    "misspelt knob": Bad("NUM_LAYER=3: not a knob; did you mean NUM_LAYERS?", {"NUM_LAYER": "3"}),
    "lanes inside the loop": Bad("PARALLEL_START_LAYER=1", {"PARALLEL_START_LAYER": "1"}),
    "chunk beyond the window": Bad("TTT_CHUNK_SIZE=65", {"TTT_CHUNK_SIZE": "65"}),
    "knob of another script": Bad("EMBEDDING_DIM=16: not a knob", {"EMBEDDING_DIM": "16"}),
    "folder below a file": Bad("ARTIFACT_DIR=text.txt/below", {"ARTIFACT_DIR": "text.txt/below"}),
    "no file to evaluate": Bad("EVAL_ONLY_PATH=nowhere.pt", {"EVAL_ONLY_PATH": "nowhere.pt"}),
    "garbage to evaluate": Bad("text.txt", {"EVAL_ONLY_PATH": "text.txt"}),
    "cut artifact": Bad("cut.ptz", {"EVAL_ONLY_PATH": "cut.ptz"}),
    "cut checkpoint": Bad("cut.pt", {"EVAL_ONLY_PATH": "cut.pt"}),
    "checkpoint of another tokenizer": Bad(
        "EVAL_ONLY_PATH",
        {"EVAL_ONLY_PATH": "final_model.pt", "TOKENIZER_PATH": f"{SHARDS}/other.model"},
        other_tokenizer,
    ),
    "artifact of another network": Bad(
        "NUM_LAYERS=4", {"EVAL_ONLY_PATH": "final_model.int6.ptz", "NUM_LAYERS": "5"}
    ),
}


@pytest.fixture(scope="module")
def bad_runs(tiny_data, first_run, tmp_path_factory) -> Iterator[dict[str, Future]]:
    """Every case of `BAD`, two at a time: the process, and all files around it before and after."""

    def run(case: Bad, cwd: Path) -> tuple[subprocess.CompletedProcess, dict, dict]:
        shards = data_copy(tiny_data, cwd)
        for name in ("final_model.pt", "final_model.int6.ptz"):
            data = (first_run.folder / name).read_bytes()
            (cwd / name).write_bytes(data)
            (cwd / name.replace("final_model", "cut").replace(".int6", "")).write_bytes(
                data[: len(data) // 2]
            )
        (cwd / "text.txt").write_text("no model\n")
        case.damage(shards)
        before = listing(cwd)
        done = run_script({**TINY, "DATA_DIR": "data", **case.env}, cwd)
        return done, before, listing(cwd)

    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(run, case, tmp_path_factory.mktemp("bad"))
            for name, case in BAD.items()
        }


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_line_with_status_2_and_writes_nothing(bad_runs, name):
    done, before, after = bad_runs[name].result()
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.count("\n") == 1, done.stderr[-2000:]
    assert done.stderr.startswith("train_gpt.py: ")
    assert BAD[name].expected in done.stderr
    assert done.stdout == ""
    assert after == before


@pytest.mark.parametrize(
    ("place", "env", "expected"),
    [(77, {}, "holds id 320"), (None, {"TTT_CHUNK_SIZE": "65"}, "TTT_CHUNK_SIZE=65")],
)
def test_every_rank_leaves_when_one_finds_bad_input(tiny_data, tmp_path, place, env, expected):
    """Rank 1 scans the shard with the bad id; rank 0 must hear of it, and only rank 0 speaks."""
    shards = data_copy(tiny_data, tmp_path)
    if place:
        edit_shard(TRAIN, lambda ids: ids.put(place, 320))(shards)
    before = listing(tmp_path)
    main, other = start_ranks({**TINY, "DATA_DIR": "data", **env}, tmp_path, count=2)
    assert (main.returncode, other.returncode) == (2, 2)
    assert expected in main.stderr
    assert main.stderr.count("\n") == 1
    # torch 2.9 prints lines of gloo.
    said = (main.stdout + other.stdout).splitlines()
    said = [line for line in said if not line.startswith("[Gloo]")]
    assert (said, other.stderr) == ([], "")
    assert listing(tmp_path) == before
