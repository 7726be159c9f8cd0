"""Faults: odd files in the place of good ones, values of the wrong type, data without a text.

Each ends in one line with status 2, and none makes the program wait. Full disks, two processes at
once, signals and lost ranks are in tests/test_faults_live.py.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny_config
from test_optim import cpu_ranks

import train_gpt as tg

SHARDS = f"data/datasets/tiny_sp{VOCAB}"
MODEL = f"data/tokenizers/tiny_sp{VOCAB}.model"
EVAL = "model.pt"


@pytest.fixture(autouse=True)
def in_a_minute() -> Iterator[None]:
    """Nothing here may wait: the alarm ends a test that does."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def folder(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, with a copy of the data set as `data`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_data, "data")
    yield tmp_path


def begin(**knobs: Any) -> tg.Run:
    """A run up to the end of its checks."""
    cfg = tiny_config(data_dir="data", **knobs)
    return tg.Run(cfg, dict.fromkeys(vars(cfg), "default"), cpu_ranks())


def refusal(**knobs: Any) -> str:
    """The one line with which a run is refused before it has written anything."""
    with pytest.raises(tg.UsageError) as caught:
        begin(**knobs)
    line = str(caught.value)
    assert "\n" not in line and line.isprintable()
    assert not any(path.is_file() and path.stat().st_size for path in Path("logs").glob("*.txt"))
    return line


# --- Things that are not files --------------------------------------------------------------------
def put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        # The address of a socket may only have 107 bytes.
        server.bind(os.path.relpath(path))


ODD = {
    "a folder": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a socket": put_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a folder": lambda path: path.symlink_to("."),
    # Its kind is that of a file. Reading fails as on a disk that is broken.
    "unreadable": lambda path: path.symlink_to("/proc/self/mem"),
    "empty": Path.touch,
}
PLACES = {
    "training shard": f"{SHARDS}/tiny_train_000001.bin",
    "validation shard": f"{SHARDS}/tiny_val_000000.bin",
    "side-car": f"{SHARDS}/tiny_val_bytes_000000.bin",
    "manifest": f"{SHARDS}/manifest.json",
    "doctor's verdict": f"{SHARDS}/doctor.json",
    "tokenizer": MODEL,
    "model file": EVAL,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_file_is_refused_in_one_line_that_names_it(folder, odd, place):
    path = folder / PLACES[place]
    path.unlink(missing_ok=True)
    ODD[odd](path)
    line = refusal(eval_only_path=EVAL if place == "model file" else "")
    assert path.name in line
    kinds = {"a FIFO": "is a FIFO", "a device": "is a device", "a link to nothing": "to nothing"}
    assert kinds.get(odd, "") in line
    assert (odd, place) != ("empty", "tokenizer") or "no SentencePiece model (it is empty)" in line


@pytest.mark.parametrize("odd", [odd for odd in ODD if odd not in ("empty", "unreadable")])
@pytest.mark.parametrize("place", ["logs/odd.txt", "runs/odd"])
def test_a_run_does_not_write_through_what_is_no_file(folder, odd, place):
    path = folder / place
    path.parent.mkdir()
    ODD[odd](path)
    before = path.lstat()
    if place == "runs/odd" and "folder" in odd:
        begin(run_id="odd")
        return
    refusal(run_id="odd")
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)


@pytest.mark.parametrize("odd", [odd for odd in ODD if odd != "empty"])
def test_an_odd_checkpoint_is_refused_by_its_name(folder, odd):
    path = folder / "runs/odd/checkpoint.0.pt"
    path.parent.mkdir(parents=True)
    ODD[odd](path)
    assert "runs/odd/checkpoint.0.pt" in refusal(run_id="odd", checkpoint_every=5)


def test_what_will_be_written_must_not_be_a_folder(folder):
    (folder / "runs/odd/scores.json").mkdir(parents=True)
    assert "runs/odd/scores.json" in refusal(run_id="odd")


def test_files_are_read_up_to_a_size(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        # Without a block on the disk.
        file.truncate(2**40)
    with pytest.raises(OSError, match="holds 1099511627776 bytes, at most 16777216 are read"):
        tg.read_regular(path, tg.MAX_JSON_BYTES)
    assert refusal(eval_only_path="large").endswith("bytes, at most 268435456 are read")
    # A file that says nothing about its size.
    assert tg.read_regular(Path("/proc/self/stat"), tg.MAX_JSON_BYTES)[:1].isdigit()


# --- Values of the wrong type ---------------------------------------------------------------------
WRONG = {
    "null": "null",
    "a truth value": "true",
    "a text": '"x"',
    "a number": "5",
    "not whole": "5.5",
    "negative": "-1",
    "beyond 64 bits": "99999999999999999999999",
    "infinite": "1e999",
    "NaN": "NaN",
    "a list": "[]",
    "an object": "{}",
    "control characters": '"\\u001b[2J\\u0000"',
    "deep": "[" * 100_000 + "]" * 100_000,
}
# File -> its schema, and for each place in it the values of `WRONG` that are right there.
FIELDS = {
    "manifest.json": {
        "tokenizer": [],
        "tokenizer.file": ["a text"],
        "tokenizer.sha256": ["a text"],
        "splits": ["an object"],
        "splits.val": [],
        "splits.val.tokens": ["a number"],
        "splits.val.bytes": ["a number"],
        "splits.val.files": ["a list"],
        "splits.train.files.0": [],
        "splits.train.files.0.name": ["a text"],
        "splits.train.files.0.tokens": ["a number"],
    },
    "doctor.json": {
        "files": ["an object"],
        "files.a": ["a list"],
        "files.a.0": ["a number"],
        "errors": ["a list"],
        "errors.0": ["a text"],
    },
}
SCHEMAS = {"manifest.json": tg.MANIFEST, "doctor.json": tg.DOCTOR_VERDICT}


def replaced(text: str, place: str, new: str) -> str:
    """JSON with another value at a place in nested objects and lists."""
    whole = value = json.loads(text)
    *path, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    for part in path:
        value = value[part]
    value[last] = "MARK"
    return json.dumps(whole).replace('"MARK"', new)


@pytest.mark.parametrize("file", FIELDS)
def test_every_value_of_a_wrong_type_is_refused_in_one_line(folder, file):
    path = folder / SHARDS / file
    content = '{"files": {"a": [1, 2]}, "errors": ["none"]}'
    if file == "manifest.json":
        content = path.read_text()
    for place, right in FIELDS[file].items():
        for wrong in WRONG:
            path.write_text(replaced(content, place, WRONG[wrong]))
            if wrong in right:
                tg.read_json(path, SCHEMAS[file])
                continue
            with pytest.raises(tg.UsageError) as caught:
                tg.read_json(path, SCHEMAS[file])
                raise AssertionError((place, wrong))
            line = str(caught.value)
            assert line.startswith(f"{path}: ") and line.isprintable(), (place, wrong)


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"\xff\xfe{", b"{", b"[" * 100_000])
@pytest.mark.parametrize("file", FIELDS)
def test_a_run_refuses_a_file_that_holds_something_else(folder, file, content):
    (folder / SHARDS / file).write_bytes(content)
    assert f"{SHARDS}/{file}: " in refusal()


def test_the_line_says_where_the_value_stands_and_what_it_must_be(folder):
    path = folder / SHARDS / "manifest.json"
    path.write_text(replaced(path.read_text(), "splits.val.files.0.tokens", "true"))
    wanted = "splits.'val'.files[0].tokens must be a whole number from 0 to 2^63"
    assert refusal() == f"{SHARDS}/manifest.json: {wanted}"


@pytest.mark.parametrize("odd", ['"many"', "-5", "null", "[1]", "1e999", "NaN", "0"])
def test_a_figure_for_show_ends_no_run(folder, odd):
    path = folder / SHARDS / "manifest.json"
    path.write_text(replaced(path.read_text(), "splits.val.gzip_bytes", odd))
    run = begin()
    run.log_gzip()
    assert "gzip_bpb" not in run.final


# --- Model files and checkpoints ------------------------------------------------------------------
def quantised(weight: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)


ODD_TENSORS = {
    "meta": lambda w: w.to("meta"),
    "sparse": lambda w: w.to_sparse(),
    "quantised": quantised,
    "complex": lambda w: w.to(torch.complex64),
    "truth values": lambda w: w > 0,
    "fp8": lambda w: w.to(torch.float8_e4m3fn),
    "whole numbers": lambda w: w.int(),
    "NaN": lambda w: w * math.nan,
    "a list": lambda w: w.tolist(),
    "another shape": lambda w: w[:1],
    "none": lambda w: None,
}
ODD_CONFIGS = {
    "a truth value": ("num_layers", True),
    "a text": ("num_layers", "4"),
    "NaN": ("logit_softcap", math.nan),
    "huge": ("model_dim", 2**40),
    "negative": ("num_heads", -2),
    "nothing": ("num_heads", None),
}


@pytest.fixture(scope="module")
def weights(tiny_data: Path) -> dict[str, Any]:
    """The content of a file of weights."""
    cfg = tiny_config()
    return {
        "config": tg.network_config(cfg),
        "looped": True,
        "step": 6,
        "tokenizer": "",
        "weights": dict(tg.GPT(cfg).state_dict()),
    }


@pytest.mark.parametrize("odd", [*ODD_TENSORS, *ODD_CONFIGS])
def test_weights_of_another_kind_are_refused_in_one_line(folder, weights, odd):
    changed = {**weights, "weights": {**weights["weights"]}, "config": {**weights["config"]}}
    if odd in ODD_TENSORS:
        name = next(iter(changed["weights"]))
        changed["weights"][name] = ODD_TENSORS[odd](changed["weights"][name])
    if odd in ODD_CONFIGS:
        name, value = ODD_CONFIGS[odd]
        changed["config"][name] = value
    torch.save(changed, EVAL)
    assert EVAL in refusal(eval_only_path=EVAL) or odd in ("huge", "negative")


@pytest.mark.parametrize("field", ["config", "looped", "weights", "tokenizer"])
@pytest.mark.parametrize("value", [None, 5, "x", [], float("nan")], ids=repr)
def test_fields_of_another_type_are_refused_in_one_line(folder, weights, field, value):
    torch.save({**weights, field: value}, EVAL)
    assert EVAL in refusal(eval_only_path=EVAL)


def test_the_weights_themselves_are_taken(folder, weights):
    torch.save(weights, EVAL)
    assert begin(eval_only_path=EVAL).start.stage == tg.Stage.TRAINED


# --- Data that cannot be scored -------------------------------------------------------------------
@pytest.mark.parametrize(
    "tokens", [[1], [1, 1], [1] * 50, [1, 0], [5], [5, 6, 7], [1, 2, 2]], ids=str
)
def test_validation_without_a_text_is_refused(folder, tokens):
    tg.write_shard(folder / SHARDS / "tiny_val_000000.bin", np.array(tokens, dtype=np.uint16))
    (folder / SHARDS / "manifest.json").unlink()
    assert "tiny_val_000000.bin" in refusal(tokenizer_path=MODEL)


def test_one_letter_can_be_scored(folder):
    letter = 4 + ord("a")
    tg.write_shard(folder / SHARDS / "tiny_val_000000.bin", np.array([1, letter], dtype=np.uint16))
    (folder / SHARDS / "manifest.json").unlink()
    run = begin(tokenizer_path=MODEL)
    assert (run.decoded, run.docs.counts.tolist()) == (1, [1])
