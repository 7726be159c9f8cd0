"""A sweep: every run once whatever is killed, failures with their reason, work that is shared."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pty
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import warm_process
from conftest import ROOT, TINY

for package in ("optuna", "rich"):
    pytest.importorskip(package, reason="pip install -r requirements-tools.txt")
import optuna

SWEEP = ROOT / "tools" / "sweep.py"
FAKE_SCRIPT = Path(__file__).with_name("fake_script.py")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder but for a script that stands in for train_gpt.py."""
    shutil.copy(FAKE_SCRIPT, tmp_path / "fake.py")
    return tmp_path


def command(*args: str, fake: bool = True) -> list[str]:
    """A sweep of the fake script, or of the real one."""
    script = ["--script", "fake.py", "--nproc", "0"] if fake else []
    return [sys.executable, str(SWEEP), *args, *script]


def environment(**env: str) -> dict[str, str]:
    base = {k: os.environ[k] for k in ("PATH", "HOME", "LANG") if k in os.environ}
    return {**base, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}


def sweep(place: Path, *args: str, fake: bool = True, **env: str) -> subprocess.CompletedProcess:
    _, *script = command(*args, fake=fake)
    return warm_process.run(script, environment(**env), place, timeout=240)


def begin(place: Path, *args: str, fake: bool = True, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(*args, fake=fake),
        cwd=place,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def trials(
    place: Path, study: str, storage: str = "", name: str = ""
) -> list[optuna.trial.FrozenTrial]:
    """The trials of a sweep's study, or of the one called `name` in its database."""
    return optuna.load_study(
        study_name=name or study, storage=storage or f"sqlite:///{place}/runs/sweeps/{study}.db"
    ).trials


def ran(place: Path, word: str) -> Counter:
    """(seed, rate) -> how many runs have noted a word: start or end."""
    path = place / "ran.txt"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return Counter((line[1], line[2]) for line in lines if line[0] == word)


def processes(place: Path) -> list[int]:
    """All runs that have started, and the processes that they have started."""
    runs = [int(line.split()[3]) for line in (place / "ran.txt").read_text().splitlines()]
    return runs + [int(pid) for pid in (place / "sleepers.txt").read_text().split()]


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def tool() -> Iterator[object]:
    """tools/sweep.py as a module."""
    spec = importlib.util.spec_from_file_location("sweep_tool", SWEEP)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep_tool"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sweep_tool"]


def test_a_grid_runs_every_combination_once_and_gives_mean_and_deviation_over_seeds(
    place: Path,
) -> None:
    args = ("grid", "SEED=0,1,2", "MATRIX_LR=0.01,0.02", "--parallel", "2")
    first = sweep(place, *args)
    assert first.returncode == 0, first.stdout + first.stderr
    done = trials(place, "grid")
    assert [t.state.name for t in done] == ["COMPLETE"] * 6
    assert [(t.params["SEED"], t.params["MATRIX_LR"]) for t in done][:2] == [
        (0, 0.01),
        (0, 0.02),
    ]  # breadth first
    assert set(ran(place, "end").values()) == {1}
    values = [t.value for t in done if t.params["MATRIX_LR"] == 0.01]
    assert f"{statistics.mean(values):.5f} ± {statistics.stdev(values):.5f}" in first.stdout
    kept = {
        "outcome": "done",
        "setting": "MATRIX_LR=0.02",
        "seed": 1,
        "artifact_bytes": 1000,
        "run_id": "grid-0003",
    }
    assert done[3].user_attrs.items() >= {**kept, "train s": 1.5, "val_bpb": 1.001}.items()
    assert (place / "runs/sweeps/grid/0003/output.txt").read_text().count("final {") == 1
    assert "MATRIX_LR=0.02 is best, +0.10000 bpb ahead of MATRIX_LR=0.01" in first.stdout
    by_setting = trials(place, "grid", name="grid-settings")
    assert [t.params for t in by_setting] == [{"MATRIX_LR": 0.01}, {"MATRIX_LR": 0.02}]
    assert [t.value for t in by_setting] == pytest.approx([1.101, 1.001])
    again = sweep(place, *args)
    assert again.returncode == 0
    assert "starts" not in again.stdout
    more = sweep(place, "grid", "SEED=0,1,2,3", "MATRIX_LR=0.01,0.02")
    assert more.stdout.count("starts") == 2, more.stdout + more.stderr
    assert sum(ran(place, "start").values()) == 8
    assert [t.user_attrs["runs"] for t in trials(place, "grid", name="grid-settings")] == [4, 4]
    code = sweep(place, *args, MIN_LR="0.2")
    assert code.returncode == 2
    assert 'environment {}, now {"MIN_LR": "0.2"}' in code.stderr


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("MATRX_LR=0.1,0.2",), "MATRX_LR: not a knob of train_gpt.py; did you mean MATRIX_LR?"),
        (("MATRIX_LR=-1,0.2",), "MATRIX_LR=-1.0: must be at least 0"),
        (("NUM_KV_HEADS=1,2",), "NUM_KV_HEADS=2: must be a divisor of NUM_HEADS=3"),
        (("SEED=1,1",), "SEED=1,1: must be"),
        (("MATRIX_LR=log:0:1",), "log above 0"),
        (("MATRIX_LR=log:0.1:0.2", "--search", "grid"), "a range has no grid"),
        (("RUN_ID=a,b",), "RUN_ID: set by the sweep"),
        (("SEED=0", "--eval-only", "nothing.ptz"), "--eval-only nothing.ptz: no such file"),
        (("SEED=0", "--prune"), "--prune: nothing to judge by"),
        (
            ("SEED=0", "--storage", "mysql://user:secret@host/db"),
            "mysql://user:***@host/db: must be sqlite",
        ),
        (("COMPUTE_DTYPE=lin:0:1",), "COMPUTE_DTYPE: has no range"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    place, tool, capsys, monkeypatch, args, told
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("PRESET", "cpu")
    assert tool.main(["wrong", *args]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert all(line.startswith("sweep.py: ") for line in error.splitlines())
    assert "secret" not in error
    assert [p.name for p in place.iterdir()] == ["fake.py"]


def test_a_study_that_cannot_be_read_is_named(place, tool, capsys, monkeypatch) -> None:
    monkeypatch.chdir(place)
    study = place / "runs/sweeps/torn.db"
    study.parent.mkdir(parents=True)
    study.write_bytes(b"no database" * 99)
    assert tool.main(["torn", "SEED=0"]) == 2
    assert capsys.readouterr().err.startswith("sweep.py: runs/sweeps/torn.db: ")


def test_a_failed_run_is_kept_with_its_reason_and_stops_nothing(place: Path) -> None:
    fates = "crash killed refused diverged invalid nan big silent hang".split()
    seeds = ",".join(str(i) for i in range(len(fates) + 1))
    table = json.dumps({str(i): fate for i, fate in enumerate(fates)})
    done = sweep(place, "fates", f"SEED={seeds}", "--timeout", "2", "--parallel", "4", FAKE=table)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {
        fates[t.params["SEED"]] if t.params["SEED"] < len(fates) else "": t
        for t in trials(place, "fates")
    }
    told = {
        fate: (t.state.name, t.user_attrs["outcome"], t.user_attrs.get("reason", ""))
        for fate, t in found.items()
    }
    assert told.pop("hang")[:2] == ("FAIL", "timed out")
    assert told == {
        "crash": ("FAIL", "crashed", "exit status 1: RuntimeError: out of memory"),
        "killed": ("FAIL", "crashed", "killed by SIGKILL: it printed nothing"),
        "refused": ("FAIL", "refused", "NUM_HEADS=3: must be even"),
        "diverged": ("FAIL", "crashed", "exit status 1: loss nan in step 3"),
        "invalid": ("FAIL", "invalid", "score INVALID: 3 targets scored twice"),
        "nan": ("FAIL", "invalid", "val_bpb is nan"),
        "big": ("FAIL", "oversized", "artifact of 16000001 bytes, 1 over the limit"),
        "silent": ("FAIL", "crashed", "exit status 0: 50/50 val_loss: 1.0070 val_bpb: 1.2070"),
        "": ("COMPLETE", "done", ""),
    }
    assert (
        sweep(place, "fates", f"SEED={seeds}", FAKE=table).stdout.count("starts") == 0
    )  # a failure is a result
    retried = sweep(
        place, "fates", f"SEED={seeds}", "--retry", "--timeout", "2", "--parallel", "4", FAKE=table
    )
    assert retried.stdout.count("starts") == len(fates), retried.stdout


def test_kill_9_leaves_no_process_and_no_run_is_repeated_or_lost(place: Path) -> None:
    args = ("kill", "SEED=0,1,2", "MATRIX_LR=0.01,0.02")
    env = {"FAKE_SECONDS": "0.5", "GRANDCHILD": "1"}
    process = begin(place, *args, **env)
    until(lambda: sum(ran(place, "end").values()) >= 2 and sum(ran(place, "start").values()) >= 3)
    process.kill()
    until(lambda: not any(map(alive, processes(place))), 20)
    ended = sum(ran(place, "end").values())
    assert ended < 6
    done = sweep(place, *args, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    found = trials(place, "kill")
    complete = [t for t in found if t.state.name == "COMPLETE"]
    assert sorted((t.params["SEED"], t.params["MATRIX_LR"]) for t in complete) == [
        (seed, rate) for seed in range(3) for rate in (0.01, 0.02)
    ]
    assert set(ran(place, "end").values()) == {1}
    assert [t.user_attrs.get("outcome") for t in found if t.state.name != "COMPLETE"] == [
        None
    ]  # the one it died in
    assert not any(map(alive, processes(place)))


def test_a_run_that_ended_while_nobody_looked_is_not_repeated(place: Path) -> None:
    process = begin(place, "late", "SEED=0", FAKE_SECONDS="1")
    until(lambda: ran(place, "start"))
    os.kill(process.pid, signal.SIGSTOP)  # it no longer sees its run end
    until(lambda: (place / "runs/sweeps/late/0000/exit.json").exists())
    process.kill()
    process.wait()
    done = sweep(place, "late", "SEED=0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "begun by a worker that died" in done.stdout
    assert ran(place, "start") == {("0", "0.02"): 1}
    assert [t.state.name for t in trials(place, "late")] == ["COMPLETE"]


def test_ctrl_c_ends_the_runs_and_the_same_command_goes_on(place: Path) -> None:
    args = ("stop", "SEED=0,1", "--parallel", "2")
    process = begin(place, *args, FAKE_SECONDS="20", GRANDCHILD="1")
    until(
        lambda: (
            sum(ran(place, "start").values()) == 2
            and len((place / "sleepers.txt").read_text().split()) == 2
        )
    )
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert output.rstrip().endswith("interrupted; the same command goes on")
    assert not any(map(alive, processes(place)))
    assert {t.user_attrs["outcome"] for t in trials(place, "stop")} == {"interrupted"}
    assert sweep(place, *args).returncode == 0
    assert ran(place, "end") == {("0", "0.02"): 1, ("1", "0.02"): 1}


@pytest.mark.parametrize(("every", "same"), [("60", True), ("0", False)])
def test_a_stopped_run_with_checkpoints_goes_on_under_its_name(
    place: Path, every: str, same: bool
) -> None:
    args = ("on", "SEED=3")
    env = {"CHECKPOINT_EVERY": every}
    process = begin(place, *args, FAKE_SECONDS="20", **env)
    until(lambda: (place / "ids.txt").exists() and (place / "ids.txt").read_text().endswith("\n"))
    (place / "logs").mkdir()
    (place / "logs/on-0000.txt").write_text("step:1/9\n")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) and process.returncode == 130
    assert sweep(place, *args, **env).returncode == 0
    ids = [line.split() for line in (place / "ids.txt").read_text().splitlines()]
    again = "0000" if same else "0001"
    assert ids == [["on-0000", "runs/sweeps/on/0000"], [f"on-{again}", f"runs/sweeps/on/{again}"]]
    assert (place / "logs/on-0000.txt").exists()
    assert [t.state.name for t in trials(place, "on")] == ["FAIL", "COMPLETE"]


def test_two_workers_on_one_file_share_the_runs(place: Path) -> None:
    args = ("pair", "SEED=0,1,2,3,4,5,6,7,8,9", "--parallel", "2")
    workers = [begin(place, *args, FAKE_SECONDS="1") for _ in range(2)]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert set(ran(place, "start").values()) == {1}
    assert [t.state.name for t in trials(place, "pair")] == ["COMPLETE"] * 10
    assert len({t.user_attrs["worker"] for t in trials(place, "pair")}) == 2


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a PostgreSQL server of this test's own, on a loopback port; skips without one."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    folders = [str(folder) for folder in Path("/usr/lib/postgresql").glob("*/bin")]
    if shutil.which("initdb"):
        folders.insert(0, "")
    if not folders:
        pytest.skip("PostgreSQL's initdb is not installed")
    as_user = {"user": "postgres"} if os.getuid() == 0 else {}  # it refuses to run as root
    root = tmp_path_factory.mktemp("pg")
    port = 20000 + os.getpid() % 20000
    if as_user:
        for folder in (root, *root.parents[:-2]):
            folder.chmod(0o755)
        try:
            shutil.chown(root, "postgres")
        except LookupError:
            pytest.skip("PostgreSQL does not run as root and there is no user postgres")
    tool_path = {name: str(Path(folders[0]) / name) for name in ("initdb", "postgres")}
    options = dict(**as_user, cwd=root, capture_output=True, text=True, check=False)
    made = subprocess.run(
        [tool_path["initdb"], "-D", f"{root}/db", "-U", "sweeper", "-A", "trust"], **options
    )
    if made.returncode:
        pytest.skip(f"initdb failed: {made.stderr[-300:]}")
    server = subprocess.Popen(
        [
            tool_path["postgres"],
            "-D",
            f"{root}/db",
            "-p",
            str(port),
            "-k",
            str(root),
            "-F",
            "-c",
            "listen_addresses=127.0.0.1",
        ],
        **as_user,
        cwd=root,
        stdout=subprocess.DEVNULL,
        stderr=(root / "log").open("w"),
    )
    try:
        until(lambda: "ready to accept" in (root / "log").read_text() or server.poll() is not None)
        assert server.poll() is None, (root / "log").read_text()
        yield f"postgresql://sweeper@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # its fast shutdown
        server.wait(30)


def test_two_machines_share_a_postgresql_study_and_one_takes_up_what_a_dead_one_left(
    place: Path, postgres
) -> None:
    machines = [place / "a", place / "b"]  # no folder in common: only the database connects them
    for machine in machines:
        machine.mkdir()
        shutil.copy(FAKE_SCRIPT, machine / "fake.py")
    args = ("pg", "SEED=0,1,2,3,4,5", "--storage", postgres, "--heartbeat", "1")
    env = {"FAKE_SECONDS": "1.2", "RAN": str(place / "ran.txt")}
    workers = [begin(machine, *args, **env) for machine in machines]

    def both_have_finished_one_and_the_first_is_at_another() -> bool:
        if not (place / "ran.txt").exists():
            return False
        found = trials(place, "pg", postgres)
        done = {t.user_attrs["worker"] for t in found if t.state.name == "COMPLETE"}
        running = [t for t in found if t.state.name == "RUNNING"]
        first = f"-{workers[0].pid}-"
        seeds = {str(t.params["SEED"]) for t in running if first in t.user_attrs.get("worker", "")}
        began = {seed for seed, _ in ran(place, "start")} & seeds
        # Its run may be over, and only its result not yet known.
        ended = {seed for seed, _ in ran(place, "end")} & seeds
        return len(done) == 2 and len(began) == 1 and not ended

    until(both_have_finished_one_and_the_first_is_at_another)
    workers[0].kill()
    output, _ = workers[1].communicate(timeout=120)
    assert workers[1].returncode == 0, output
    found = trials(place, "pg", postgres)
    complete = [t for t in found if t.state.name == "COMPLETE"]
    assert sorted(t.params["SEED"] for t in complete) == list(range(6))
    assert len({t.user_attrs["worker"] for t in complete}) == 2
    assert set(ran(place, "end").values()) == {1}
    assert [t.state.name for t in found if t not in complete] == [
        "FAIL"
    ]  # the one the dead worker was at


def test_tpe_searches_the_mean_over_seeds_and_proposes_nothing_refused(
    place: Path, tool, monkeypatch
) -> None:
    done = sweep(
        place,
        "rates",
        "SEED=0,1",
        "MATRIX_LR=log:0.005:0.1",
        "NUM_HEADS=2,3",
        "--trials",
        "4",
        "--parallel",
        "2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pairs = Counter((t.params["MATRIX_LR"], t.params["NUM_HEADS"]) for t in trials(place, "rates"))
    assert list(pairs.values()) == [2] * 4
    assert all(0.005 <= rate <= 0.1 for rate, _ in pairs)
    monkeypatch.setenv("PRESET", "cpu")
    space = tool.Space(
        tool.load_script(ROOT / "train_gpt.py"),
        [tool.Knob.parse("MATRIX_LR=log:0.005:0.1")],
        base={},
        has_cuda=False,
    )
    seen: list = []
    for i in range(40):
        setting = space.propose(seen, i, 10)
        seen.append((setting, math.log(float(setting["MATRIX_LR"]) / 0.02) ** 2))
    late = [value for _, value in seen[25:]]
    assert statistics.median(late) < 0.5 * statistics.median(value for _, value in seen[:10])
    knob = tool.Knob.parse("ROPE_DIMS=lin:2:64")
    uneven = tool.Space(space.script, [knob], base={}, has_cuda=False)
    assert {int(uneven.propose([], i, 10)["ROPE_DIMS"]) % 2 for i in range(12)} == {0}


def test_hopeless_runs_are_pruned_on_demand_only(place: Path) -> None:
    values = ("SEED=0,1", "MATRIX_LR=0.024,0.023,0.022,0.021,0.09")
    env = {"VAL_LOSS_EVERY": "10", "FAKE_SECONDS": "0.7"}
    done = sweep(place, "prune", *values, "--prune", **env)
    found = {(t.params["MATRIX_LR"], t.params["SEED"]): t for t in trials(place, "prune")}
    assert [key for key, t in found.items() if t.state.name == "PRUNED"] == [
        (0.09, 0),
        (0.09, 1),
    ], done.stdout
    assert "worst quarter" in found[0.09, 0].user_attrs["reason"]
    assert 0 < len(found[0.09, 0].intermediate_values) < 5
    assert ran(place, "start")["1", "0.09"] == 0  # its other seed never ran
    assert (
        "--prune"
        not in sweep(place, "plain", "SEED=0,1,2,3,4,5", **{**env, "FAKE_SECONDS": "0"}).stdout
    )
    assert {t.state.name for t in trials(place, "plain")} == {"COMPLETE"}


def test_jobs_of_submitit_outlive_the_sweep_and_are_found_again(place: Path) -> None:
    pytest.importorskip("submitit")
    args = (
        "jobs",
        "SEED=0,1",
        "--launcher",
        "slurm",
        "--slurm",
        "cluster=local",
        "--eval-only",
        "fake.py",
    )
    process = begin(place, *args, FAKE='{"0": "wait"}')
    until(lambda: ran(place, "start"))
    process.kill()
    process = begin(place, *args)
    until(lambda: "goes on with jobs-0000" in process.stdout.readline())
    (place / "go").touch()  # only now does the job end
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert ran(place, "start") == ran(place, "end") == {("0", "0.02"): 1, ("1", "0.02"): 1}
    assert all(t.user_attrs["job"].isdigit() for t in trials(place, "jobs"))
    final = (place / "runs/sweeps/jobs/0001/output.txt").read_text()
    assert f'"eval_only": "{place}/fake.py"' in final


def test_on_a_terminal_there_is_a_live_table(place: Path) -> None:
    main, end = pty.openpty()
    env = environment(FAKE_SECONDS="3", TERM="xterm", COLUMNS="140", LINES="40")
    args = command("live", "SEED=0,1", "--budget", "3.5")
    process = subprocess.Popen(args, cwd=place, env=env, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    while chunk := read(main):
        shown += chunk
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert process.wait(60) == 1, text
    assert re.search(r"trial 0  SEED=0  \d s  \d0/50 val_loss", text), (
        text
    )  # what the run printed last
    assert "0/2 runs over" in text
    assert "of 4 s spent; no run is started any more" in text
    assert text.count("starts") == 1
    assert "budget 4 s" in text


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux: the other side has closed
        return b""


def test_a_real_run_under_torchrun_is_scored_and_a_real_refusal_told(
    tmp_path: Path, tiny_data: Path
) -> None:
    data = {**TINY, "DATA_DIR": str(tiny_data), "ITERATIONS": "3", "VAL_LOSS_EVERY": "2"}
    del data["DATASET"]
    done = sweep(
        tmp_path, "real", f"DATASET={TINY['DATASET']},absent", "--nproc", "1", fake=False, **data
    )
    assert done.returncode == 1, done.stdout + done.stderr
    scored, refused = trials(tmp_path, "real")
    assert scored.state.name == "COMPLETE"
    log = (tmp_path / "logs" / "real-0000.txt").read_text()
    assert f'"val_bpb": {scored.value}' in log
    assert (tmp_path / "runs/sweeps/real/0000/final_model.int6.ptz").exists()
    assert refused.user_attrs["outcome"] == "refused"
    assert "absent: does not exist. Get it: " in refused.user_attrs["reason"]


# --- Pairs ----------------------------------------------------------------------------------------
def test_paired_sweep_prints_each_setting_against_the_baseline(place: Path):
    args = ("pairs", "SEED=0,1,2", "MATRIX_LR=0.01,0.02", "--paired", "MATRIX_LR=0.02")
    done = sweep(place, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| 0.01 ")]
    assert row.split(" | ")[1:3] == ["3", "+0.10000"]


def test_pairs_that_cannot_be_are_refused_before_a_run(place: Path):
    grid = ("pairs", "SEED=0,1", "MATRIX_LR=0.01,0.02")
    for args, env, said in (
        ((*grid, "--paired", "MATRIX_LR=3"), {}, "MATRIX_LR must be one of 0.01, 0.02"),
        (("pairs", "MATRIX_LR=0.01,0.02", "--paired", "MATRIX_LR=0.01"), {}, "needs SEED"),
        (
            (*grid, "--paired", "MATRIX_LR=0.01"),
            {"MAX_WALLCLOCK_SECONDS": "60"},
            "MAX_WALLCLOCK_SECONDS=60: must be 0 with --paired",
        ),
    ):
        done = sweep(place, *args, **env)
        assert done.returncode == 2
        assert said in done.stderr
    assert not ran(place, "start")
