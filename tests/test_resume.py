"""Checkpoints: a run that was killed at any moment ends with the same bits; live line; TensorBoard.

RESUME_KILLS=50 pytest tests/test_resume.py -k random: that many SIGKILLs, in all phases.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import warm_process
from conftest import ROOT, TINY, VOCAB, final_line, on_ranks, run_script
from test_optim import weights_of
from test_training import Session, Slow, assert_same
from torch import Tensor

import train_gpt as tg

KILLS = int(os.environ.get("RESUME_KILLS", 0))
# A checkpoint every third step, because times are known that late.
EVERY = dict(run_id="kept", checkpoint_every=1e-6, enable_looping_at=0.5)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Runs write below the working folder. Handlers of signals are as before afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


class Killed(Exception):
    pass


class Mortal(Session):
    """Does `act` in the forward of step `last`."""

    def __init__(self, *args: Any, last: int, act: Callable[[], None], **overrides: Any):
        super().__init__(*args, **overrides)
        self.last = last
        self.act = act

    def forward(self, row: tg.Batch, plan: tuple[tg.Visit, ...]) -> Tensor:
        if len(self.after) == self.last - 1:
            self.act()
        return super().forward(row, plan)


def die() -> None:
    raise Killed


def checkpoints() -> list[Path]:
    """Older first."""
    return sorted(Path("runs/kept").glob("checkpoint.?.pt"), key=lambda p: torch_load(p)["number"])


def torch_load(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    assert hashlib.sha256(data[32:]).digest() == data[:32]
    (path.parent / "inner").write_bytes(data[32:])
    return torch.load(path.parent / "inner", weights_only=True)


def step_of(checkpoint: Path) -> int:
    """The step after which it was saved, in the training."""
    return torch_load(checkpoint)["start"]["training"]["state"]["step"]


# --- The same end ---------------------------------------------------------------------------------
def test_a_run_that_dies_twice_ends_with_the_same_bits(tiny_data):
    """With validations, before and after the loops start, from other random states."""
    wanted = Session(tiny_data, iterations=10, enable_looping_at=0.5, val_loss_every=3).train()
    # The first dies in step 6, the second goes on after step 4 and dies in step 9.
    for last in (6, 9 - 4):
        with pytest.raises(Killed):
            Mortal(tiny_data, iterations=10, val_loss_every=3, last=last, act=die, **EVERY).train()
        torch.rand(last)
    found = Session(tiny_data, iterations=10, val_loss_every=3, **EVERY).train()
    # Steps before the last checkpoint were not done again.
    assert len(found.after) < 4
    assert_same(weights_of(found.model), weights_of(wanted.model))
    assert_same(found.saved[-1][1], wanted.saved[-1][1])
    assert found.saved[-1][2:] == wanted.saved[-1][2:] == (10, True)
    same = ("steps", "train_loss", "train_tokens")
    assert {k: found.final[k] for k in same} == {k: wanted.final[k] for k in same}
    assert found.final["resumed"] == 2
    ends = found.optimizers.state_dict(), wanted.optimizers.state_dict()
    for key in ("weights", "average", "momentum"):
        assert_same(ends[0][key], ends[1][key])
    for mine, theirs in zip(*(end["adam"]["state"].values() for end in ends), strict=True):
        assert_same(mine, theirs)


def test_random_numbers_go_on(tiny_data):
    with pytest.raises(Killed):
        Mortal(tiny_data, iterations=4, last=3, act=die, **EVERY).train()
    wanted = torch_load(checkpoints()[-1])["start"]["training"]["random"]
    torch.manual_seed(99)
    Session(tiny_data, iterations=4, **EVERY).train()
    assert torch.equal(torch_load(checkpoints()[-1])["start"]["training"]["random"], wanted)


def resume_on(ranks: tg.Ranks, data: Path, act: Any, dtype: str = "fp32") -> dict[str, Tensor]:
    settings = dict(iterations=8, compute_dtype=dtype, **EVERY)
    with pytest.raises(Killed):
        Mortal(data, ranks, last=6, act=die, **settings).train()
    return weights_of(Session(data, ranks, **settings).train().model)


def through_on(ranks: tg.Ranks, data: Path, dtype: str = "fp32") -> dict[str, Tensor]:
    run = Session(data, ranks, iterations=8, enable_looping_at=0.5, compute_dtype=dtype)
    return weights_of(run.train().model)


def test_ranks_go_on_with_the_same_bits_in_bf16(tiny_data, tmp_path):
    """In bf16 a rank holds the others' matrices rounded, as they were sent."""
    for through, resumed in on_ranks(
        2, through_then_resumed, tmp_path / "ranks", tiny_data, "bf16"
    ):
        assert_same(resumed, through)


def test_ranks_go_on_with_the_same_bits_and_another_number_of_them_goes_on_too(tiny_data, tmp_path):
    first = on_ranks(2, through_then_resumed, tmp_path / "ranks", tiny_data)
    for through, resumed in first:
        assert_same(resumed, through)
    # In a process of its own, which lets go of the run's name.
    on_ranks(1, resume_half, tmp_path / "half", tiny_data)
    for found, wanted in zip(
        on_ranks(2, resume_rest, tmp_path / "rest", tiny_data), first, strict=True
    ):
        assert_same(found, wanted[0], tolerance=1e-5)


def through_then_resumed(ranks: tg.Ranks, data: Path, dtype: str = "fp32") -> tuple[dict, dict]:
    return through_on(ranks, data, dtype), resume_on(ranks, data, None, dtype)


def resume_half(ranks: tg.Ranks, data: Path) -> None:
    with pytest.raises(Killed):
        Mortal(data, ranks, iterations=8, last=6, act=die, **{**EVERY, "run_id": "half"}).train()


def resume_rest(ranks: tg.Ranks, data: Path) -> dict[str, Tensor]:
    run = Session(data, ranks, iterations=8, **{**EVERY, "run_id": "half"}).train()
    assert len(run.after) == 8 - 4
    return weights_of(run.model)


class Lasting(Slow):
    """A `Slow` run that dies in step `last`."""

    last = 0

    def forward(self, row: tg.Batch, plan: tuple[tg.Visit, ...]) -> Tensor:
        if len(self.after) == self.last - 1:
            raise Killed
        return super().forward(row, plan)


def test_the_budget_goes_on_where_it_was(tiny_data):
    settings = dict(max_wallclock_seconds=200, iterations=999, **EVERY)
    wanted = Slow(tiny_data, **{**settings, "checkpoint_every": 0}).train()
    first = Lasting(tiny_data, **settings)
    first.last = 20
    with pytest.raises(Killed):
        first.train()
    rest = Slow(tiny_data, **settings).train()
    assert rest.final["steps"] == pytest.approx(wanted.final["steps"], abs=1)
    # The last checkpoint was after step 18.
    assert len(rest.after) == rest.final["steps"] - 19 + 1
    assert rest.numbers(r"stopping: .* train_time:(\d+)ms")[0] <= 200_000
    # The phase counts the seconds before the kill.
    before_s = first.numbers(r"train_time:(\d+)ms")[-1] / 1000
    assert -rest.excluded_seconds == pytest.approx(before_s, abs=6)


def test_checkpoints_are_as_far_apart_as_was_asked_and_off_the_clock(tiny_data):
    run = Slow(tiny_data, iterations=20, enable_looping_at=1, run_id="kept", checkpoint_every=12)
    save = run.save_checkpoint
    steps = []

    def slow_save(stage: tg.Stage, training: dict[str, Any]) -> None:
        run.seconds += 1000
        steps.append(training["state"]["step"])
        save(stage, training=training)

    run.save_checkpoint = slow_save
    run.train()
    # A step takes 4 s, and the clock is known two steps late.
    assert [b - a for a, b in itertools.pairwise(steps)] == [4] * 3
    assert run.numbers(r"stopping: .* train_time:(\d+)ms")[0] < 100_000
    assert len(checkpoints()) == 2


def test_without_the_knob_nothing_is_kept(tiny_data):
    Session(tiny_data, iterations=2, run_id="kept").train()
    assert checkpoints() == []


# --- What is not trusted --------------------------------------------------------------------------
@pytest.fixture
def two(tiny_data) -> list[Path]:
    """Checkpoints after steps 1 and 4."""
    with pytest.raises(Killed):
        Mortal(tiny_data, iterations=6, last=5, act=die, **EVERY).train()
    found = checkpoints()
    assert [step_of(p) for p in found] == [1, 4]
    return found


def rewritten(path: Path, change: Callable[[dict], None]) -> None:
    """Whole again, but with other contents."""
    state = torch_load(path)
    change(state)
    torch.save(state, path)
    data = path.read_bytes()
    path.write_bytes(hashlib.sha256(data).digest() + data)


DAMAGE = {
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-100]),
    "empty": lambda p: p.write_bytes(b""),
    "a bit": lambda p: p.write_bytes(
        p.read_bytes()[:5000] + bytes([p.read_bytes()[5000] ^ 4]) + p.read_bytes()[5001:]
    ),
    "its checksum": lambda p: p.write_bytes(bytes(32) + p.read_bytes()[32:]),
    "code": lambda p: rewritten(p, lambda s: s["made_with"].update(code_sha256="0" * 64)),
    "data": lambda p: rewritten(p, lambda s: s["made_with"].update(val_sha256="0" * 64)),
    "config": lambda p: rewritten(p, lambda s: s["made_with"].update(matrix_lr=0.5)),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_torn_or_foreign_is_refused_and_the_one_before_is_used(tiny_data, two, what):
    DAMAGE[what](two[1])
    run = Session(tiny_data, iterations=6, **EVERY)
    assert run.start.training["state"]["step"] == 1
    text = Path("logs/kept.txt").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^{two[1]}: refused: .*$", text, re.M)
    assert line.endswith("damaged") == (what in ("cut", "empty", "a bit", "its checksum"))
    wanted = Session(tiny_data, iterations=6, enable_looping_at=0.5).train()
    assert_same(weights_of(run.train().model), weights_of(wanted.model))
    # The refused one was overwritten.
    assert [torch_load(p)["number"] for p in checkpoints()] == [1, 2]


def test_with_nothing_to_trust_the_run_is_refused(tiny_data, two):
    for path in two:
        DAMAGE["cut"](path)
    before = [p.read_bytes() for p in two]
    with pytest.raises(tg.UsageError) as caught:
        Session(tiny_data, iterations=6, **EVERY)
    assert sorted(str(caught.value).splitlines()) == [f"{p}: refused: damaged" for p in sorted(two)]
    assert [p.read_bytes() for p in two] == before


def test_a_run_of_another_config_is_refused_and_keeps_what_is_there(tiny_data, two):
    before = [p.read_bytes() for p in two]
    with pytest.raises(tg.UsageError, match="refused: made with iterations=6$"):
        Session(tiny_data, iterations=7, **EVERY)
    assert [p.read_bytes() for p in two] == before


def test_a_run_on_fewer_training_tokens_is_refused(tiny_data, tmp_path, two):
    shutil.copytree(tiny_data, tmp_path / "less")
    folder = tmp_path / f"less/datasets/tiny_sp{VOCAB}"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / manifest["splits"]["train"]["files"].pop(0)["name"]).unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(tg.UsageError, match=r"refused: made with tokens=\d+$"):
        Session(tmp_path / "less", iterations=6, **EVERY)


def test_what_does_not_change_the_result_may_differ(tiny_data, two):
    other = {
        **EVERY,
        "checkpoint_every": 5,
        "train_log_every": 0,
        "artifact_dir": str(two[0].parent.absolute()),
    }
    run = Session(tiny_data, iterations=6, **other)
    assert run.start.training["state"]["step"] == 4


def test_a_log_with_a_result_is_not_added_to(tiny_data, two):
    log = Path("logs/kept.txt")
    log.write_text(log.read_text(encoding="utf-8") + 'final {"half": ', encoding="utf-8")
    Session(tiny_data, iterations=6, **EVERY)
    # Half a line is no result.
    assert '"half"' not in log.read_text(encoding="utf-8")
    log.write_text(log.read_text(encoding="utf-8") + 'final {"whole": 1}\n', encoding="utf-8")
    with pytest.raises(
        tg.UsageError,
        match=r"^RUN_ID=kept: logs/kept.txt has its result already; choose another name$",
    ):
        Session(tiny_data, iterations=6, **EVERY)


def test_without_checkpoints_a_result_is_kept_and_an_end_without_one_is_begun_anew(
    tiny_data, tmp_path
):
    log = tmp_path / "logs/kept.txt"
    env = {**environment(tiny_data, RUN_ID="kept"), "CHECKPOINT_EVERY": "0"}
    log.parent.mkdir()
    log.write_text("another source\nstep:50/60\n", encoding="utf-8")
    assert run_script({**env, "ITERATIONS": "1", "TTT_ENABLED": "0"}, tmp_path).returncode == 0
    text = log.read_text(encoding="utf-8")
    assert "another source" not in text and final_line(text)["steps"] == 1
    assert Path(f"{log}.old").read_text() == "another source\nstep:50/60\n"
    again = run_script(env, tmp_path)
    assert (again.returncode, again.stderr) == (
        2,
        "train_gpt.py: RUN_ID=kept: logs/kept.txt has its result already; choose another name\n",
    )
    assert log.read_text(encoding="utf-8") == text


# --- Signals --------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("every", [0, 1000])
@pytest.mark.parametrize(("last", "step"), [(3, 4), (9, 9)], ids=["midway", "in the last step"])
def test_a_signal_ends_training_after_the_step_with_a_checkpoint_if_there_are_any(
    tiny_data, number, every, last, step
):
    settings = dict(iterations=9, run_id="kept", checkpoint_every=every, last=last)
    with pytest.raises(KeyboardInterrupt) as caught:
        Mortal(tiny_data, act=lambda: signal.raise_signal(number), **settings).train()
    line, status = caught.value.args
    assert status == 128 + number
    # Ranks hear of a signal with the numbers of a step, which are read a step late.
    assert line.startswith(f"{number.name}: the run is stopped after step {step}")
    assert ("same command goes on" in line) == (every > 0)
    assert ("nothing is kept without CHECKPOINT_EVERY" in line) == (every == 0)
    assert [step_of(p) for p in checkpoints()] == [step] * (every > 0)


# --- Whole runs -----------------------------------------------------------------------------------
def environment(tiny_data: Path, **more: str) -> dict[str, str]:
    base = {
        **TINY,
        "DATA_DIR": str(tiny_data),
        "ITERATIONS": "16",
        "WARMUP_STEPS": "0",
        "CHECKPOINT_EVERY": "1e-6",
    }
    return {**base, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def started(env: dict[str, str], cwd: Path) -> BaseProcess:
    """A run whose output goes to a new file, out.txt."""
    base = {k: os.environ[k] for k in ("PATH", "HOME", "LANG") if k in os.environ}
    out = cwd / "out.txt"
    out.write_text("")
    return warm_process.start([str(ROOT / "train_gpt.py")], base | env, cwd, out, out)


def wait_for(process: BaseProcess, seen: Callable[[], bool]) -> bool:
    """Whether it was seen before the process ended."""
    while process.exitcode is None:
        if seen():
            return True
        time.sleep(0.0005)
    return False


def output_has(cwd: Path, text: str) -> Callable[[], bool]:
    return lambda: text in (cwd / "out.txt").read_text(errors="replace")


def result(cwd: Path, run_id: str) -> dict[str, Any]:
    """What must not depend on kills: parameters, artifact, figures. Exactly one final line."""
    final = final_line((cwd / f"logs/{run_id}.txt").read_text(encoding="utf-8"))
    folder = cwd / "runs" / run_id
    artifact = (folder / "final_model.int6.ptz").read_bytes()
    tg.open_artifact(artifact, folder)
    assert hashlib.sha256(artifact).hexdigest() == final["artifact_sha256"]
    assert json.loads((folder / "scores.json").read_text()).items() <= final.items()
    weights = torch.load(folder / "final_model.pt", weights_only=True)["weights"]
    dropped = ("seconds", "run_id", "resumed", "recompilations")
    return {"weights": weights, "final": {k: v for k, v in final.items() if k not in dropped}}


@pytest.fixture(scope="module")
def uninterrupted(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cwd = tmp_path_factory.mktemp("through")
    done = run_script({**environment(tiny_data), "RUN_ID": "through", "CHECKPOINT_EVERY": "0"}, cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    return result(cwd, "through")


def must_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert_same(found["weights"], wanted["weights"])
    assert found["final"] == wanted["final"]


def test_a_run_killed_in_training_quantisation_packing_and_scoring_ends_the_same(
    tiny_data, tmp_path, uninterrupted
):
    env = environment(tiny_data, RUN_ID="killed")
    for line in ("step:3/", "Serialized model", "GPTQ:collected", "diagnostic quantized "):
        process = started(env, tmp_path)
        assert wait_for(process, output_has(tmp_path, line)), (tmp_path / "out.txt").read_text()[
            -2000:
        ]
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    done = run_script(env, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    must_equal(result(tmp_path, "killed"), uninterrupted)
    # Phases that were over were not repeated.
    assert "step:" not in done.stdout
    assert "GPTQ:" not in done.stdout
    assert final_line(done.stdout)["seconds"].keys() >= {"train", "calibrate", "quantise", "pack"}
    again = run_script(env, tmp_path)
    assert again.returncode == 2
    told = "RUN_ID=killed: logs/killed.txt has its result already; choose another name"
    assert again.stderr == f"train_gpt.py: {told}\n"


def fresh_part(folder: Path, old: set[Path]) -> bool:
    return bool({*folder.glob("*.part")} - old)


@pytest.mark.skipif(not KILLS, reason="takes minutes; RESUME_KILLS=50")
def test_runs_killed_at_random_moments_end_the_same(tiny_data, tmp_path, uninterrupted):
    rng = random.Random(os.environ.get("RESUME_SEED", "1"))
    counts = {}
    finished = 0
    moments = {
        "start": None,
        "training": "step:2/",
        "looping": "layer_loop",
        "averaging": "stopping:",
        "quantising": "Serialized model",
        "packing": "GPTQ:collected",
        "scoring": "diagnostic quantized ",
    }
    while sum(counts.values()) < KILLS or not (tmp_path / f"logs/r{finished}.txt").exists():
        env = environment(tiny_data, RUN_ID=f"r{finished}")
        runs = tmp_path / f"runs/r{finished}"
        over = sum(counts.values()) >= KILLS
        process = started(env, tmp_path)
        writing = partial(fresh_part, runs, {*runs.glob("*.part")})
        name = rng.choice([*moments, "writing", "writing", "a step", "a step"])
        if name == "writing":
            # One of the next files.
            for _ in range(rng.randrange(1, 8)):
                wait_for(process, writing)
                wait_for(process, lambda: not writing())  # noqa: B023
            reached = wait_for(process, writing)
        else:
            line = moments.get(name, "step:1/" if name == "a step" else None)
            reached = not line or wait_for(process, output_has(tmp_path, line))
            time.sleep({"start": 4, "a step": 1.5}.get(name, 0.05) * rng.random())
        if reached and not over and process.exitcode is None:
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            counts[name] = counts.get(name, 0) + 1
            continue
        assert process.exitcode == 0, (tmp_path / "out.txt").read_text()[-2000:]
        must_equal(result(tmp_path, f"r{finished}"), uninterrupted)
        finished += 1
        if over:
            break
    print(f"{sum(counts.values())} kills {counts}, {finished} runs finished alike")


def test_torchrun_restarts_a_run_whose_rank_was_killed(tiny_data, tmp_path):
    env = environment(tiny_data, RUN_ID="ranks", ENABLE_LOOPING_AT="0.5", ITERATIONS="8")
    script = str(ROOT / "train_gpt.py")
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, script]
    out = tmp_path / "out.txt"
    base = {k: os.environ[k] for k in ("PATH", "HOME", "LANG") if k in os.environ}
    with out.open("w") as file:
        torchrun = subprocess.Popen(command, cwd=tmp_path, env=base | env, stdout=file, stderr=file)
    while "step:3/" not in out.read_text():
        assert torchrun.poll() is None, out.read_text()[-2000:]
        time.sleep(0.01)
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert torchrun.wait(120) == 0, out.read_text()[-2000:]
    text = out.read_text()
    assert len(re.findall("^resumed: from checkpoint", text, re.M)) == 1
    wanted = on_ranks(2, through_average, tmp_path / "through", tiny_data)
    assert_same(result(tmp_path, "ranks")["weights"], wanted[0])


def through_average(ranks: tg.Ranks, data: Path) -> dict[str, Tensor]:
    return Session(data, ranks, iterations=8, enable_looping_at=0.5).train().saved[-1][1]


# --- What people see ------------------------------------------------------------------------------
def test_a_terminal_shows_one_line_in_place_and_the_file_every_step(tiny_data, tmp_path):
    env = {k: os.environ[k] for k in ("PATH", "HOME") if k in os.environ} | {"COLUMNS": "200"}
    env |= environment(
        tiny_data, RUN_ID="live", TTT_ENABLED="0", MAX_WALLCLOCK_SECONDS="60", TRAIN_LOG_EVERY="1"
    )
    master, slave = pty.openpty()
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=slave, stderr=slave)
    text = b""
    os.close(slave)
    while True:
        try:
            text += os.read(master, 65536)
        except OSError:
            # The other end is closed.
            break
    os.close(master)
    assert process.wait() == 0, text[-2000:]
    shown = re.findall(r"\r\x1b\[K(train: [^\r\n]*)", text.decode())
    assert len(shown) >= 3
    # No MFU, because the peak of this device is not known.
    words = r"train: loss \d+\.\d{4}, \d+ s left, step \d+, measuring speed, "
    words += r"\d+ ms/step, \d+ tok/s, about \d+ bytes"
    assert all(re.fullmatch(words, line) for line in shown), shown
    phases = re.findall(r"\r\x1b\[K([^\r\n]*) \.\.", text.decode())
    scored = [f"score {name}" for name in ("pre_quantization", "quantized")]
    assert phases == ["warm-up", "train", "calibrate", "quantise", "pack", *scored]
    assert "step:1/16" not in text.decode()
    log = (tmp_path / "logs/live.txt").read_text(encoding="utf-8")
    step = r"^step:\d+/16 train_loss:\S+ train_time:\d+ms .*tok/s:\d+ lr_scale:\S+$"
    assert len(re.findall(step, log, re.M)) == 16
    assert "\x1b" not in log.split("\nHyperparameters:")[1]
    final = final_line(log)
    assert int(re.search(r"about (\d+) bytes", shown[-1])[1]) == pytest.approx(
        final["artifact_bytes"], rel=0.05
    )


def test_a_line_in_place_waits_until_the_last_one_has_rested(tmp_path, monkeypatch, capsys):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(tg.time, "monotonic", lambda: clock.now)
    log = tg.Log(tmp_path / "log.txt", is_main=True, live=True)
    for clock.now, line, rest in (
        (100, "a", 0.5),
        (100.25, "b", 0.5),
        (100.25, "c", 0),
        (100.5, "d", 0.5),
        (100.75, "e", 0.5),
    ):
        log.show(line, rest)
    assert capsys.readouterr().out == "\r\x1b[Ka\r\x1b[Kc\r\x1b[Ke"
    tg.Log(tmp_path / "log.txt", is_main=True).show("to a file, not a terminal")
    assert capsys.readouterr().out == (tmp_path / "log.txt").read_text() == ""


@pytest.mark.parametrize("sd", [0.02, 1.0])
def test_the_expected_bytes_are_the_entropy_of_gaussian_weights(sd):
    changed = dict(preset="cpu", quantizer="gptq", artifact_limit_bytes=0)
    cfg = tg.Config(**{**tg.PRESETS["cpu"], **changed})
    codes = tg.CODE_BYTES
    for role in tg.parameter_table(cfg).values():
        if role.packing == "float":
            codes += 2 * torch.Size(role.shape).numel()
            continue
        clip, bits = (cfg.matrix_clip_sigmas, 6)
        if role.packing == "embed":
            clip, bits = (cfg.embed_clip_sigmas, 7)
        w = (
            torch.randn(torch.Size(role.shape).numel(), generator=torch.Generator().manual_seed(1))
            * sd
        )
        q = (w / (clip * sd / (2 ** (bits - 1) - 1))).round()
        share = q.unique(return_counts=True)[1] / q.numel()
        codes += float(-(share * share.log2()).sum()) * q.numel() / 8
    assert tg.predict_submission_bytes(cfg) == pytest.approx(codes, rel=0.01)


def test_the_expected_bytes_of_a_fitted_artifact_are_the_limit_or_the_bits_a_weight():
    assert tg.predict_submission_bytes(tg.Config()) == 16_000_000
    small = tg.Config(**{**tg.PRESETS["cpu"], "preset": "cpu"})
    codes = sum(n * rows * cols for n, rows, cols in tg.bank_shapes(small).values())
    floats = sum(torch.Size(shape).numel() for shape in tg.float_shapes(small).values())
    expected = tg.CODE_BYTES + codes * 6 // 8 + 2 * floats
    assert tg.predict_submission_bytes(small) == expected


def test_the_expected_bytes_know_the_clips_of_attention_and_mlp():
    settings = {**tg.PRESETS["pr1530"], "preset": "pr1530", "artifact_limit_bytes": 0}
    one_clip = tg.Config(**settings)
    two_clips = tg.Config(**settings | dict(attn_clip_sigmas=2 * one_clip.matrix_clip_sigmas))
    # Steps twice as coarse take a bit less a weight.
    shapes = tg.bank_shapes(one_clip)
    attention = sum(math.prod(shapes[bank]) for bank in ("qo_bank", "kv_bank"))
    saved = tg.predict_submission_bytes(one_clip) - tg.predict_submission_bytes(two_clips)
    assert saved == pytest.approx(attention / 8)


def test_mfu_is_shown_where_the_peak_is_known(tiny_data):
    run = Session(tiny_data, iterations=2)
    run.facts["device"] = "NVIDIA H100 80GB HBM3"
    run.log.live = True
    shown = []
    run.log.show = lambda line, **_: shown.append(line)
    run.train()
    assert re.search(r" tok/s, MFU 0 %, about ", shown[-1])


def test_tensorboard_gets_loss_rate_speed_and_scores(tiny_data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = tg.Log(tmp_path / "log.txt", True, tensorboard_dir=str(tmp_path / "board"))
    run = Session(tiny_data, iterations=4, val_loss_every=2)
    run.log.scalars = log.scalars
    run.train()
    log.tensorboard.close()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    points = {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert points == {
        "train_loss": [1, 2, 3, 4],
        "lr_scale": [1, 2, 3, 4],
        "tok/s": [1, 2, 3, 4],
        "val_bpb": [2, 4],
    }
    assert events.Scalars("train_loss")[-1].value == pytest.approx(
        run.final["train_loss"], rel=1e-6
    )
