"""What a user reads when data, a connection or a target is wrong: one line with a remedy."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import warm_process
from conftest import ROOT, TINY, run_script

import train_gpt as tg

sys.path.insert(0, str(ROOT / "tools"))
import pack
import prepare_data


def refusal(folder: Path, split: str = "train") -> str:
    """The line with which the shards of a split are refused."""
    with pytest.raises(tg.UsageError) as error:
        tg.TokenStream(folder, split)
    return str(error.value)


# --- Shards ---
@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A shard of 100 tokens."""
    path = tmp_path / "x_train_000000.bin"
    tg.write_shard(path, np.arange(100))
    return path


def test_shard_that_is_cut_short_says_so_with_both_sizes(shard):
    shard.write_bytes(shard.read_bytes()[:-6])
    expected = f"{shard}: cut short: 1,218 of 1,224 bytes; delete it and download again"
    assert refusal(shard.parent) == expected


def test_shard_that_is_too_long_says_so(shard):
    shard.write_bytes(shard.read_bytes() + b"12")
    assert ": too long: 1,226 of 1,224 bytes; " in refusal(shard.parent)


def test_empty_shard_says_so(shard):
    tg.write_shard(shard.with_name("x_train_000001.bin"), np.arange(0))
    assert "x_train_000001.bin: is empty, " in refusal(shard.parent)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("pydocs_sp1024_caseops", "pydocs"),
        ("fineweb10B_sp8192", "fineweb --variant sp8192"),
        (tg.RECORD["dataset"], "fineweb --variant sp8192_caseops"),
        ("mine_sp1024", "text TRAIN.jsonl --val VAL.jsonl"),
    ],
)
def test_data_set_that_is_not_there_names_the_command_that_makes_it(
    tmp_path, monkeypatch, name, command
):
    """From another folder than the program's, the command has whole paths."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my data" / "datasets" / name
    line = refusal(folder)
    tool = ROOT / "tools" / "prepare_data.py"
    command = f"{command} --data-dir '{tmp_path}/my data'"
    assert line.startswith(f"{folder}: does not exist. Get it: python {tool} {command}; or set ")
    folder.mkdir(parents=True)
    assert "holds no *_train_*.bin. Get it: " in refusal(folder)


def test_the_command_is_short_where_it_can_be(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = tg.how_to_get(Path("data/datasets/pydocs_sp1024_nowhere"))
    assert command.startswith("Get it: python tools/prepare_data.py pydocs; or set ")


def test_commands_in_messages_are_understood_by_the_tool(tmp_path):
    parser = prepare_data.build_parser()
    for name in ("pydocs_sp1024_caseops", "fineweb10B_sp8192", tg.RECORD["dataset"], "mine_sp1024"):
        command = tg.how_to_get(tmp_path / name).split("prepare_data.py ")[1].split(";")[0]
        assert parser.parse_args(shlex.split(command))


def test_many_shards_raise_the_soft_limit_of_open_files(tmp_path):
    """The limit of this process must stay, so another one runs the script."""
    folder = tmp_path / "data" / "datasets" / "many"
    first = folder / "x_train_000000.bin"
    tg.write_shard(first, np.full(4, 5))
    for i in range(1, 600):
        first.with_name(f"x_train_{i:06d}.bin").hardlink_to(first)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (512, HARD))\n"
        f"sys.path.insert(0, {str(ROOT)!r}); import train_gpt as tg\n"
        "try: print(tg.TokenStream(Path('data/datasets/many'), 'train').size)\n"
        "except tg.UsageError as error: print(error)\n"
    )
    script = tmp_path / "limited.py"
    for limit, expected in (("4096", "2400"), ("1000", "ulimit -Hn 1112")):
        script.write_text(code.replace("HARD", limit))
        result = warm_process.run([str(script)], {"PATH": "/usr/bin:/bin"}, tmp_path, 60)
        assert expected in result.stdout, result.stderr
        assert result.stdout.count("\n") == 1


def test_side_car_beside_the_shards_is_not_taken_for_tokens(tmp_path, tiny_data):
    folder = tmp_path / "datasets" / TINY["DATASET"]
    shutil.copytree(tiny_data / "datasets" / TINY["DATASET"], folder)
    size = tg.TokenStream(folder, "val").size
    tg.write_shard(folder / "tiny_val_bytes_000000.bin", np.full(size, 60000))
    stream = tg.TokenStream(folder, "val")
    assert (stream.size, stream.sidecar.size) == (size, size)


def test_run_without_its_data_ends_with_the_command_and_status_2(tmp_path):
    result = run_script({"PRESET": "cpu", "DATA_DIR": "nowhere"}, tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        "train_gpt.py: nowhere/datasets/pydocs_sp1024_caseops: does not exist. Get it: python"
        f" {ROOT}/tools/prepare_data.py pydocs --data-dir nowhere; or set DATASET, DATA_DIR\n"
    )


# --- Downloads ---
class FailingHub:
    """A hub that is not reached."""

    def __init__(self, repo: str, revision: str, staging: Path):
        """Fails as the real one does without a connection."""
        raise tg.UsageError(f"{repo}: ConnectionError: no route; {staging.name}")


def downloaded(root: Path) -> argparse.Namespace:
    """A data set as a download leaves it, with two training shards, and the arguments for it."""
    folder = root / "datasets" / "fineweb10B_sp512"
    splits = {}
    for split, count in (("train", 2), ("val", 1)):
        files = []
        for i in range(count):
            path = folder / f"fineweb_{split}_{i:06d}.bin"
            tg.write_shard(path, np.arange(9))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            files.append({"name": path.name, "sha256": digest})
        splits[split] = {"files": files}
    (root / "tokenizers").mkdir()
    (root / "tokenizers" / "a.model").write_bytes(b"model")
    tokenizer = {"file": "a.model", "sha256": hashlib.sha256(b"model").hexdigest()}
    manifest = {"splits": splits, "tokenizer": tokenizer, "inputs": "c0ffee"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    words = ["fineweb", "--variant", "sp512", "--data-dir", str(root), "--train-shards", "2"]
    return prepare_data.build_parser().parse_args(words)


def prepare(args: argparse.Namespace) -> None:
    """Does what the arguments ask for, as the tool's main does."""
    with contextlib.ExitStack() as args.locks:
        prepare_data.run_fineweb(args)


def test_without_a_connection_complete_data_are_enough(tmp_path, monkeypatch, capsys):
    args = downloaded(tmp_path)
    monkeypatch.setattr(prepare_data, "Hub", FailingHub)
    prepare(args)
    assert "is there and intact; the hub was not asked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"), [("train_shards", 3), ("revision", "other"), ("variant", "sp1024")]
)
def test_without_a_connection_other_data_are_not_enough(tmp_path, monkeypatch, name, value):
    args = downloaded(tmp_path)
    setattr(args, name, value)
    monkeypatch.setattr(prepare_data, "Hub", FailingHub)
    with pytest.raises(tg.UsageError, match="no route"):
        prepare(args)


def test_without_a_connection_a_damaged_file_is_not_enough(tmp_path, monkeypatch):
    args = downloaded(tmp_path)
    (tmp_path / "tokenizers" / "a.model").write_bytes(b"other")
    monkeypatch.setattr(prepare_data, "Hub", FailingHub)
    with pytest.raises(tg.UsageError, match="no route"):
        prepare(args)


@pytest.mark.parametrize(
    ("error", "offline", "remedy"),
    [
        (
            ImportError("Using SOCKS proxy, but 'socksio' is not installed"),
            "",
            "pip install socksio",
        ),
        (ConnectionError("offline mode is enabled"), "1", "unset HF_HUB_OFFLINE"),
        (ConnectionError("refused"), "0", "set HTTPS_PROXY"),
        (ValueError("not JSON"), "", ""),
    ],
)
def test_failed_connection_ends_in_one_line_with_the_remedy(monkeypatch, error, offline, remedy):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)

    def fail(*_: object, **__: object) -> None:
        raise error

    hub = object.__new__(prepare_data.Hub)
    hub.repo = "a/b"
    hub.failures = (OSError, ValueError, ImportError)
    with pytest.raises(tg.UsageError) as refused:
        hub.call(fail)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"a/b: {type(error).__name__}: {error}")
    assert str(refused.value).removeprefix(f"a/b: {type(error).__name__}: {error}").count(";") == (
        1 if remedy else 0
    )
    assert remedy in str(refused.value)


def test_size_of_a_download_is_told_and_compared_with_the_disk(tmp_path, monkeypatch, capsys):
    hub = object.__new__(prepare_data.Hub)
    hub.staging = tmp_path / "datasets" / ".x.part"
    sizes = {"a": 2_000_000_000, "b": 1_500_000_000}
    hub.published = {name: argparse.Namespace(size=size) for name, size in sizes.items()}
    (tmp_path / "b").write_bytes(b"there")
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((2_100_000_000, True), (1_900_000_000, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if fits:
            hub.check_space({"a": tmp_path / "a", "b": tmp_path / "b"})
            assert "1 files, 2.0 GB to download; 2.1 GB free" in capsys.readouterr().out
        else:
            with pytest.raises(tg.UsageError, match="2.0 GB do not fit into 1.9 GB; free some"):
                hub.check_space({"a": tmp_path / "a", "b": tmp_path / "b"})


# --- Packing ---
def test_packed_code_never_overwrites_its_source(tmp_path, capsys):
    source = tmp_path / "train_gpt.py"
    source.write_text("print(1)\n")
    (tmp_path / "link.py").symlink_to(source)
    for target in (source, tmp_path / "link.py", tmp_path / "x" / ".." / "train_gpt.py"):
        (tmp_path / "x").mkdir(exist_ok=True)
        assert pack.main(["--code", str(target), "--source", str(source)]) == 2
        assert "is the readable source; name another file" in capsys.readouterr().err
    assert source.read_text() == "print(1)\n"


# --- Installation ---
def test_wrong_python_ends_make_install_in_one_line_with_the_remedy(tmp_path):
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", "--no-print-directory", "install", f"PYTHON={old}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    expected = f"make: {old} is not Python 3.10 to 3.13; choose one: make PYTHON=python3.12\n"
    assert result.stdout == expected
    assert not (tmp_path / ".venv").exists()


def test_make_record_without_a_gpu_ends_before_the_download():
    command = ["make", "--no-print-directory", "-o", "install", "record", "GPUS=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = "make record: nvidia-smi shows no GPU here; make run is for a CPU\n"
    assert (done.returncode, done.stdout) == (2, said)


def test_missing_package_of_the_data_tool_ends_in_one_line(tmp_path):
    script = str(ROOT / "tools" / "prepare_data.py")
    (tmp_path / "run.py").write_text(
        f"import runpy, sys\nsys.modules['tqdm'] = None\nsys.argv = ['x', 'pydocs']\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    result = warm_process.run([str(tmp_path / "run.py")], {"PATH": "/usr/bin:/bin"}, tmp_path, 60)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("prepare_data.py: ") and "make install" in result.stderr
