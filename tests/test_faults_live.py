"""Faults of running processes: two at once, a full disk, signals."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm_process
from conftest import ROOT, TINY, VOCAB, final_line, tiny_config, tiny_text
from test_optim import cpu_ranks

import train_gpt as tg

sys.path.insert(0, str(ROOT / "tools"))
import prepare_data

PREPARE = ROOT / "tools" / "prepare_data.py"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of all processes of a test."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def environment(tiny_data: Path, **knobs: str) -> dict[str, str]:
    """The smallest run: two steps, no adaptation."""
    base = {k: os.environ[k] for k in ("PATH", "HOME", "LANG") if k in os.environ}
    base |= {**TINY, "DATA_DIR": str(tiny_data), "ITERATIONS": "2", "WARMUP_STEPS": "0"}
    base |= {"TTT_ENABLED": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**base, **knobs}


class Started:
    """A process with PyTorch imported, and what it prints."""

    def __init__(self, env: dict[str, str], *command: str, number: int = 0):
        self.out = Path(f"out{number}.txt").absolute()
        self.err = Path(f"err{number}.txt").absolute()
        self.process: BaseProcess = warm_process.start(
            [*map(str, command)] or [str(ROOT / "train_gpt.py")],
            env,
            Path.cwd(),
            self.out,
            self.err,
        )

    def end(self) -> tuple[int, str, str]:
        """Status, stdout and stderr."""
        self.process.join(120)
        assert self.process.exitcode is not None
        return self.process.exitcode, self.out.read_text(), self.err.read_text()

    def wait_for(self, text: str) -> None:
        """Until it has printed a text."""
        while self.process.exitcode is None:
            if self.out.exists() and text in self.out.read_text():
                return
            time.sleep(0.002)
        raise AssertionError(self.out.read_text()[-1000:] + self.err.read_text()[-1000:])


def must_hold_together(run_id: str, status: int, output: str) -> None:
    """Demands that log, artifact, scores and output are of one run that ended well."""
    assert status == 0
    final = final_line(Path(f"logs/{run_id}.txt").read_text())
    assert final == final_line(output)
    artifact = Path(f"runs/{run_id}/final_model.int6.ptz").read_bytes()
    assert tg.hashlib.sha256(artifact).hexdigest() == final["artifact_sha256"]
    assert json.loads(Path(f"runs/{run_id}/scores.json").read_text()).items() <= final.items()


# --- Two at once ----------------------------------------------------------------------------------
def test_one_of_two_runs_of_a_name_wins_and_the_other_is_told_who_has_it(folder, tiny_data):
    env = environment(tiny_data, RUN_ID="one")
    first = Started(env, number=0)
    first.wait_for("run_id: one")
    # Stopped, it cannot end before the others have come, however slow the machine is.
    os.kill(first.process.pid, signal.SIGSTOP)
    status, _, error = Started(env, number=1).end()
    holder = f"process {first.process.pid} on {os.uname().nodename}"
    assert (status, error) == (2, f"train_gpt.py: RUN_ID=one: {holder} is running it\n")
    # Another name for the same folder.
    env |= {"RUN_ID": "other", "ARTIFACT_DIR": "runs/one"}
    status, _, error = Started(env, number=2).end()
    wanted = f"train_gpt.py: ARTIFACT_DIR=runs/one: {holder} writes to runs/one\n"
    assert (status, error) == (2, wanted)
    os.kill(first.process.pid, signal.SIGCONT)
    status, output, _ = first.end()
    must_hold_together("one", status, output)
    assert not [*folder.glob("logs/*.lock"), *folder.glob("runs/*/run.lock")]


def test_runs_without_a_name_that_begin_at_once_get_names_of_their_own(folder, tiny_data):
    runs = [Started(environment(tiny_data), number=i) for i in range(2)]
    names = set()
    for run in runs:
        status, output, _ = run.end()
        name = final_line(output)["run_id"]
        must_hold_together(name, status, output)
        names.add(name)
    assert len(names) == len([*folder.glob("logs/*.txt")]) == 2


def test_a_lock_ends_with_its_process_and_not_with_its_children(folder):
    code = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_gpt as tg
from pathlib import Path
from types import SimpleNamespace
assert tg.FileLock(Path("a.lock")).take()
if os.fork():
    print("taken", flush=True)
time.sleep(60)
"""
    (folder / "hold.py").write_text(code)
    holder = Started(dict(os.environ), "hold.py")
    holder.wait_for("taken")
    lock = tg.FileLock(Path("a.lock"))
    assert not lock.take()
    assert lock.holder == f"process {holder.process.pid} on {os.uname().nodename}"
    holder.process.kill()
    holder.process.join()
    assert lock.take()
    lock.release()
    assert not Path("a.lock").exists()


def test_a_file_system_without_locks_is_named_in_the_log(folder, tiny_data, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(tg.fcntl, "lockf", refuse)
    cfg = tiny_config(data_dir=tiny_data, run_id="nfs")
    tg.Run(cfg, dict.fromkeys(vars(cfg), "default"), cpu_ranks())
    wanted = f"warning: {folder}/logs: has no locks (No locks available)"
    assert wanted in Path("logs/nfs.txt").read_text()


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["anew", "--force"])
def test_two_preparations_at_once_leave_one_whole_data_set(folder, force):
    lines = [json.dumps({"text": text}) for text in tiny_text(80, seed=5)]
    Path("train.jsonl").write_text("\n".join(lines[:60]))
    Path("val.jsonl").write_text("\n".join(lines[60:]))
    words = ["text", "train.jsonl", "--val", "val.jsonl", "--vocab-size", str(VOCAB), *force]
    if force:
        assert prepare_data.main(words) == 0
    both = [Started(dict(os.environ), PREPARE, *words, number=i) for i in range(2)]
    ends = [process.end() for process in both]
    assert [status for status, _, _ in ends] == [0, 0], ends
    data = Path("data/datasets")
    assert [path.name for path in data.iterdir()] == [f"corpus_sp{VOCAB}"]
    manifest = json.loads((data / f"corpus_sp{VOCAB}/manifest.json").read_text())
    files = prepare_data.prepared_files(Path("data"), data / f"corpus_sp{VOCAB}", manifest)
    assert all(file.is_intact() for file in files) and len(files) == 3


def test_a_killed_preparation_leaves_the_old_data_set_and_is_tidied_up(folder):
    data = Path("data/datasets")
    (data / ".a_sp320.old").mkdir(parents=True)
    (data / ".a_sp320.old" / "manifest.json").write_text("{}")
    (data / ".a_sp320.99999.part").mkdir()
    (data / ".a_sp320_caseops.99999.part").mkdir()
    args = prepare_data.build_parser().parse_args(["text", "x.jsonl"])
    with prepare_data.contextlib.ExitStack() as args.locks:
        prepare_data.lock_dataset(args, "a_sp320")
    names = {path.name for path in data.iterdir()}
    assert names == {"a_sp320", ".a_sp320_caseops.99999.part"}


# --- Full disks -----------------------------------------------------------------------------------
FULL = """
import errno, os, runpy, sys
sys.path.insert(0, {root!r})
fsync = os.fsync
def full(number):
    name = os.readlink(f"/proc/self/fd/{{number}}")
    if "/runs/full/" in name:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync(number)
os.fsync = full
sys.argv = [{script!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


def test_a_run_goes_on_without_the_files_that_the_disk_cannot_hold(folder, tiny_data):
    """The disk is full for every file of the run's folder; what was there before stays."""
    script = str(ROOT / "train_gpt.py")
    (folder / "full.py").write_text(FULL.format(root=str(ROOT), script=script))
    names = [name for name in tg.OUTPUTS if name != "last_good.pt"]
    for name in names:
        if name.startswith("checkpoint"):
            continue
        Path("runs/full").mkdir(parents=True, exist_ok=True)
        Path("runs/full", name).write_text("before")
    env = environment(tiny_data, RUN_ID="full", CHECKPOINT_EVERY="1e-6", ITERATIONS="4")
    status, output, error = Started(env, "full.py").end()
    assert status == 1
    reasons = {f"runs/full/{name}: No space left on device" for name in names}
    *warnings, last = (line.removeprefix("train_gpt.py: ") for line in error.splitlines())
    assert {*warnings} == {f"warning: not written, the run goes on: {why}" for why in reasons}
    assert len(warnings) == len(reasons)
    assert {*last.removeprefix("not written: ").split("; ")} == reasons
    # Every score is there, and the artifact was scored from memory.
    assert final_line(output)["val_bpb"] > 0
    assert {path.name for path in folder.glob("runs/full/*")} == {*names[2:]}
    assert all(path.read_text() == "before" for path in folder.glob("runs/full/*"))


def test_log_lines_that_do_not_fit_are_written_once_there_is_space(folder, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    log = tg.Log(Path("logs/full.txt"), is_main=True)
    log("first")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
        log("second")
        log("third")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert Path("logs/full.txt").read_text() == "first\nse"
    assert list(log.failures.values()) == ["logs/full.txt: File too large"]
    log("fourth")
    assert Path("logs/full.txt").read_text() == "first\nsecond\nthird\nfourth\n"
    # Nothing is missing any more, so the run ends with status 0.
    assert log.failures == {}
    said = capsys.readouterr()
    assert said.out == "first\nsecond\nthird\nfourth\n"
    wanted = "warning: not written, the run goes on: logs/full.txt: File too large"
    assert said.err == f"train_gpt.py: {wanted}\n"


def test_a_write_that_fails_names_the_file_and_leaves_the_old_one_alone(folder, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("a.bin").write_bytes(b"before")
    monkeypatch.setattr(tg.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: 'a.bin'"):
        tg.write_atomic(Path("a.bin"), b"after")
    assert [path.name for path in folder.iterdir()] == ["a.bin"]
    assert Path("a.bin").read_bytes() == b"before"


# --- Signals --------------------------------------------------------------------------------------
def test_a_lost_terminal_ends_a_run_as_sigterm_does(folder, tiny_data):
    number = signal.SIGHUP
    env = environment(tiny_data, RUN_ID="kept", CHECKPOINT_EVERY="1000", ITERATIONS="100000")
    run = Started(env)
    run.wait_for("step:2/")
    os.kill(run.process.pid, number)
    status, _, error = run.end()
    assert status == 128 + number
    assert error.startswith(f"train_gpt.py: {number.name}: the run is stopped after step ")
    assert error.endswith("; the same command goes on\n") and error.count("\n") == 1
    assert [path.name for path in folder.glob("runs/kept/*.p*")] == ["checkpoint.0.pt"]


def test_nohup_keeps_a_run_alive_without_its_terminal(monkeypatch):
    handlers = {}
    monkeypatch.setattr(tg.signal, "getsignal", lambda number: signal.SIG_IGN)
    monkeypatch.setattr(tg.signal, "signal", handlers.__setitem__)
    tg.handle_signals(tg.raise_stopped)
    assert signal.SIGHUP not in handlers and {signal.SIGTERM, signal.SIGUSR1} <= {*handlers}


def test_an_interrupt_while_torch_is_imported_ends_in_a_line(folder):
    # A signal just before a long sleep would be seen behind it.
    naps = "import time\nfor _ in range(2000):\n    time.sleep(0.05)\n"
    (folder / "torch.py").write_text("print('importing', flush=True)\n" + naps)
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    env = {**os.environ, "PYTHONPATH": str(folder)}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "train_gpt.py: SIGINT: the run is stopped\n")


# --- Lost ranks -----------------------------------------------------------------------------------
BROKEN = """
import runpy, sys
sys.path.insert(0, {root!r})
import torch
def broken(*args, **kwargs):
    raise {error}
torch.nn.functional.rms_norm = broken
sys.argv = [{script!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


def start_ranks(env: dict[str, str], count: int, *commands: str) -> list[Started]:
    """Ranks as a cluster starts them, without torchrun; the last one may have its own command."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(count):
        command = commands if rank == count - 1 else ()
        ranks.append(Started({**env, **world, "RANK": str(rank)}, *command, number=rank))
    return ranks


@pytest.mark.parametrize(("count", "phase"), [(4, "model_params"), (2, "diagnostic pre")])
def test_a_killed_rank_ends_the_others_with_a_line_that_names_it(folder, tiny_data, count, phase):
    env = environment(tiny_data, RUN_ID="lost", ITERATIONS="6", SLIDING_WINDOW_ENABLED="1")
    ranks = start_ranks(env, count)
    ranks[0].wait_for(phase)
    victim = ranks[-1].process
    victim.kill()
    start = time.monotonic()
    for rank, process in enumerate(ranks[:-1]):
        status, _, error = process.end()
        assert status == 1
        said = [line for line in error.splitlines() if line.startswith("train_gpt.py: ")]
        wanted = f"rank {rank} lost a peer: rank {count - 1} (process {victim.pid}) was killed"
        assert len(said) == 1 and wanted in said[0], error
    assert time.monotonic() - start < 30


@pytest.fixture
def no_memory() -> Iterator[Path]:
    """A control group of the kernel whose processes get no more memory; the next page is fatal."""
    group = Path(f"/sys/fs/cgroup/memory/golf-{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text("1M")
    except OSError as error:
        pytest.skip(f"no control group for memory here: {error}")
    try:
        yield group
    finally:
        # A killed process leaves its group a moment after it has died.
        deadline = time.monotonic() + 30
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        group.rmdir()


@pytest.mark.parametrize("phase", ["step:2/", "GPTQ:collected"])
def test_a_rank_that_the_kernel_kills_for_memory_ends_the_others(
    folder, tiny_data, no_memory, phase
):
    env = environment(tiny_data, RUN_ID="lost", ITERATIONS="6", SLIDING_WINDOW_ENABLED="1")
    ranks = start_ranks(env, 2)
    ranks[0].wait_for(phase)
    victim = ranks[1].process
    (no_memory / "cgroup.procs").write_text(str(victim.pid))
    start = time.monotonic()
    status, _, error = ranks[0].end()
    assert status == 1
    assert f"rank 0 lost a peer: rank 1 (process {victim.pid}) was killed" in error
    assert time.monotonic() - start < 30
    victim.join(30)
    assert victim.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("ValueError('no reason')", "ValueError: no reason"),
        ("MemoryError('no room')", "out of memory in "),
    ],
)
def test_a_rank_that_fails_tells_the_others_why(folder, tiny_data, error, reason):
    script = str(ROOT / "train_gpt.py")
    (folder / "broken.py").write_text(BROKEN.format(root=str(ROOT), script=script, error=error))
    ranks = start_ranks(environment(tiny_data, RUN_ID="lost"), 2, "broken.py")
    status, _, error = ranks[0].end()
    assert status == 1
    assert f"train_gpt.py: rank 0 lost a peer: rank 1 failed: {reason}" in error
    assert ranks[1].end()[0] == 1


def test_a_rank_that_waits_for_nothing_ends_all_the_same(monkeypatch, capsys):
    """The watch, without a collective that would fail."""
    ended = []
    monkeypatch.setattr(tg.os, "_exit", lambda status: (ended.append(status), sys.exit()))
    monkeypatch.setattr(tg, "describe_lost_peers", lambda: "")
    ranks = cpu_ranks()
    ranks.finished = SimpleNamespace(wait=lambda _: False)
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(SystemExit):
        ranks.end_after_peers({1: child.pid})
    assert ended == [1]
    assert capsys.readouterr().err == "train_gpt.py: rank 0 lost a peer: rank 1 has died\n"
    ranks.finished = SimpleNamespace(wait=lambda _: True)
    ranks.end_after_peers({1: child.pid})


def test_torchrun_that_ends_by_a_signal_leaves_a_checkpoint_and_no_process(folder, tiny_data):
    """By SIGUSR1, which torchrun does not handle. Its ranks notice."""
    env = environment(tiny_data, RUN_ID="kept", CHECKPOINT_EVERY="1000", ITERATIONS="100000")
    options = ["--standalone", "--nproc_per_node=2", str(ROOT / "train_gpt.py")]
    out = Path("out.txt")
    with out.open("w") as file:
        command = [sys.executable, "-m", "torch.distributed.run", *options]
        torchrun = subprocess.Popen(command, env=env, stdout=file, stderr=file)
    while "step:2/" not in out.read_text():
        assert torchrun.poll() is None, out.read_text()[-2000:]
        time.sleep(0.05)
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    torchrun.send_signal(signal.SIGUSR1)
    torchrun.wait(60)
    deadline = time.monotonic() + 60
    while any(tg.is_running(int(pid)) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(tg.is_running(int(pid)) for pid in children)
    assert "the same command goes on" in out.read_text()
    assert {path.name for path in folder.glob("runs/kept/*")} == {"checkpoint.0.pt"}
