"""A campaign of faults: kills, pairs of processes, odd files and full disks, over many tiny runs.

    faults.py                          # 1,000 kills, 30 pairs, all odd files, 60 full disks
    faults.py --kills 100 --seed 7     # shorter, with other moments

A trial is drawn from SEED and its number alone. What is done is kept in trials.jsonl, so the same
command goes on where it was stopped, as long as train_gpt.py is the same. A table closes the
campaign. Exit status: 0 no fault, 1 faults, whose folders stay; 2 wrong usage.

Everything happens below FOLDER. Full disks are limits on the size of a file (RLIMIT_FSIZE), which
need no root and fill nothing; as root also a file system of its own in memory, of 3 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
import prepare_data  # noqa: E402
import torch  # noqa: E402
import warm_process  # noqa: E402
from odd_files import ODD_FILES, make_odd  # noqa: E402
from tables import markdown_table  # noqa: E402
from tiny_run import TINY  # noqa: E402

import train_gpt as tg  # noqa: E402

KILLS_A_RUN = 8
SCRIPT = ROOT / "train_gpt.py"
# The smallest run that goes through all phases, in about two seconds.
KNOBS = {
    **TINY,
    "WARMUP_STEPS": "0",
    "ITERATIONS": "12",
    "ENABLE_LOOPING_AT": "0.5",
    "CHECKPOINT_EVERY": "1e-6",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
# The last of these in the output tells the phase.
PHASES = {
    "start": "",
    "warm-up": "model_params:",
    "training": "step:1/",
    "export": "stopping:",
    "calibration": "Serialized model:",
    "packing": "GPTQ:collected",
    "scoring": "diagnostic pre-quantization",
    "adaptation": "diagnostic quantized ",
    "report": "quantized_ttt_lora ",
}
# What differs between equal runs.
OF_THE_RUN = ("seconds", "run_id", "resumed", "recompilations")


class Trial(NamedTuple):
    """What a trial has shown."""

    fault: str  # empty: none
    counts: dict[str, int]  # what happened, for the table


# === Processes ====================================================================================
class Started:
    """A process in a folder, with what it prints in two files of its own."""

    def __init__(self, folder: Path, name: str, env: dict[str, str], *command: object):
        """Starts a script with its arguments."""
        self.out = folder / f"{name}.out"
        self.err = folder / f"{name}.err"
        for path in (self.out, self.err):
            path.write_text("")
        base = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
        self.process: BaseProcess = warm_process.start(
            [str(word) for word in command], {**base, **KNOBS, **env}, folder, self.out, self.err
        )

    def end(self, seconds: float = 300) -> int:
        """The exit status. A process that takes longer is killed, which gives -9."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.process.exitcode

    def complaint(self) -> str:
        """What it says on stderr; a traceback is cut to its last line."""
        return self.err.read_text(errors="replace")

    def phase(self) -> str:
        """The phase that it has reached."""
        text = self.out.read_text(errors="replace")
        return [name for name, mark in PHASES.items() if mark in text][-1]


def fault_of_lines(run: Started, statuses: tuple[int, ...]) -> str:
    """Why a process did not end in lines of its own and one of the statuses; empty if it did."""
    status = run.process.exitcode
    text = run.complaint()
    if status not in statuses:
        return f"status {status}: {text[-300:]}"
    if any(not line.startswith("train_gpt.py: ") for line in text.splitlines()):
        return f"more than lines of its own: {text[-300:]}"
    return ""


def result_of(folder: Path, run_id: str) -> dict[str, Any]:
    """What a run leaves that must not depend on faults. Raises an error if it does not agree."""
    text = (folder / f"logs/{run_id}.txt").read_text(encoding="utf-8")
    (line,) = re.findall(r"^final (.*)$", text, re.M)
    final = json.loads(line)
    runs = folder / "runs" / run_id
    artifact = (runs / "final_model.int6.ptz").read_bytes()
    tg.open_artifact(artifact, runs)
    assert hashlib.sha256(artifact).hexdigest() == final["artifact_sha256"], "artifact and log"
    assert json.loads((runs / "scores.json").read_text()).items() <= final.items(), "scores and log"
    weights = torch.load(runs / "final_model.pt", weights_only=True)["weights"]
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode() + weight.contiguous().numpy().tobytes())
    final = {key: value for key, value in final.items() if key not in OF_THE_RUN}
    return {"weights": digest.hexdigest(), "final": final}


# === Trials =======================================================================================
class Campaign:
    """A campaign in its folder: data set, result of an uninterrupted run, and trials."""

    def __init__(self, folder: Path, seed: int, kills_a_run: int = KILLS_A_RUN):
        """Prepares the data and runs once without faults, unless an earlier call has."""
        # A copy runs, so that edits meanwhile change nothing; other code is another campaign.
        code = SCRIPT.read_bytes()
        self.folder = folder.absolute() / hashlib.sha256(code).hexdigest()[:12]
        self.script = self.folder / SCRIPT.name
        self.seed = seed
        self.kills_a_run = kills_a_run
        self.folder.mkdir(parents=True, exist_ok=True)
        self.script.write_bytes(code)
        self.data = self.folder / "data"
        self.environ = {"DATA_DIR": str(self.data)}
        if not (self.data / "datasets/tiny_sp320/manifest.json").is_file():
            self.prepare()
        calm = self.folder / "calm"
        if not (calm / "runs/calm/documents.npz").is_file():
            shutil.rmtree(calm, ignore_errors=True)
            calm.mkdir()
            # The first process waits until PyTorch is imported, which no later one does.
            Started(calm, "first", {}, "-").end()
            start = time.monotonic()
            run = Started(calm, "calm", {**self.environ, "RUN_ID": "calm"}, self.script)
            if run.end() != 0:
                raise RuntimeError(run.complaint())
            (calm / "seconds").write_text(str(time.monotonic() - start))
        self.seconds = float((calm / "seconds").read_text())
        self.wanted = result_of(calm, "calm")

    def prepare(self) -> None:
        """Makes a tiny data set of random words."""
        rng = random.Random(0)
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(rng.choices(letters, k=rng.randrange(2, 9))) for _ in range(200)]
        lines = []
        for _ in range(172):
            text = " ".join(rng.choices(words, k=rng.choice([5, 20, 60, 120])))
            lines.append(json.dumps({"text": text}) + "\n")
        for split, part in (("train", lines[:160]), ("val", lines[160:])):
            (self.folder / f"{split}.jsonl").write_text("".join(part))
        files = [str(self.folder / f"{split}.jsonl") for split in ("train", "val")]
        words = ["text", files[0], "--val", files[1], "--name", "tiny", "--vocab-size", "320"]
        with contextlib.redirect_stdout(sys.stderr):
            if prepare_data.main([*words, "--data-dir", str(self.data)]):
                raise RuntimeError("the data set could not be prepared")

    def finished(self) -> Path:
        """A folder with the uninterrupted run, its data and its packed form."""
        made = self.folder / "finished"
        if not made.is_dir():
            staged = self.folder / "finished.part"
            shutil.rmtree(staged, ignore_errors=True)
            shutil.copytree(self.folder / "calm", staged)
            shutil.copytree(self.data, staged / "data")
            for split in ("train", "val"):
                shutil.copy(self.folder / f"{split}.jsonl", staged)
            words = ["runs/calm", "packed", "--log", "logs/calm.txt", "--source", str(self.script)]
            run = Started(staged, "pack", {}, ROOT / "tools/pack.py", *words)
            if run.end() != 0:
                raise RuntimeError(run.complaint())
            staged.rename(made)
        return made

    def run_trials(
        self, kind: str, is_enough: Callable[[list[Trial]], bool], trial: Callable[..., Trial]
    ) -> list[Trial]:
        """The trials of a kind until they are enough: those of earlier calls, and new ones."""
        log = self.folder / "trials.jsonl"
        done = {}
        lines = log.read_text().splitlines() if log.exists() else []
        for line in lines:
            # A kill may have left half a line.
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if (entry["kind"], entry["seed"]) == (kind, self.seed):
                    done[entry["number"]] = Trial(entry["fault"], entry["counts"])
        trials: list[Trial] = []
        while not is_enough(trials):
            number = len(trials)
            if number in done:
                trials.append(done[number])
                continue
            folder = self.folder / f"{kind}-{number}"
            clear(folder)
            folder.mkdir()
            rng = random.Random(f"{self.seed}/{kind}/{number}")
            try:
                shown = trial(self, folder, number, rng)
            except (AssertionError, OSError, ValueError, KeyError) as error:
                shown = Trial(f"{type(error).__name__}: {error}", {})
            trials.append(shown)
            entry = {"kind": kind, "seed": self.seed, "number": number, **shown._asdict()}
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            if shown.fault:
                print(f"{folder}: {shown.fault}", file=sys.stderr, flush=True)
            else:
                shutil.rmtree(folder)
        return trials


def kill_trial(campaign: Campaign, folder: Path, number: int, rng: random.Random) -> Trial:
    """A run that is killed several times, each time at a random moment, and must end as if not."""
    env = {**campaign.environ, "RUN_ID": "killed"}
    counts: Counter[str] = Counter()
    for attempt in range(campaign.kills_a_run):
        run = Started(folder, f"run{attempt}", env, campaign.script)
        if rng.random() < 0.3:
            wait_for_writing(run, folder / "runs/killed", rng.randrange(1, 8))
        else:
            # With later moments most runs would end after a kill or two.
            run.process.join(rng.uniform(0, campaign.seconds / 2))
        phase = run.phase()
        run.process.kill()
        run.process.join()
        # A run may have been killed behind its last line.
        if run.process.exitcode == 0 or "has its result already" in run.complaint():
            return end_of_kills(campaign, folder, run, counts)
        if run.process.exitcode != -signal.SIGKILL:
            return Trial(f"status {run.process.exitcode}: {run.complaint()[-300:]}", dict(counts))
        counts[phase] += 1
        if fault := half_written(folder / "runs/killed"):
            return Trial(fault, dict(counts))
    run = Started(folder, "last", env, campaign.script)
    run.end()
    return end_of_kills(campaign, folder, run, counts)


def end_of_kills(campaign: Campaign, folder: Path, run: Started, counts: Counter[str]) -> Trial:
    """Compares the result of a run that was killed with that of the uninterrupted one."""
    fault = fault_of_lines(run, (0, 2))
    if not fault and result_of(folder, "killed") != campaign.wanted:
        fault = "the result differs from that of the uninterrupted run"
    left = [path.name for path in folder.glob("runs/killed/*.part")]
    return Trial(fault or ", ".join(left), dict(counts))


def wait_for_writing(run: Started, folder: Path, times: int) -> None:
    """Returns while a file is being written, the `times`-th one that is seen, or at the end."""
    seen: set[str] = set()
    while run.process.exitcode is None and len(seen) < times:
        with contextlib.suppress(OSError):
            seen |= {path.name for path in folder.glob("*.part")}
        time.sleep(0.0005)


def half_written(folder: Path) -> str:
    """The first file in a run's folder that is there but not whole; empty if there is none."""
    for path in sorted(folder.glob("*")):
        data = path.read_bytes()
        if path.name.startswith("checkpoint") and path.suffix == ".pt":
            if hashlib.sha256(data[32:]).digest() != data[:32]:
                return f"{path.name} is not whole"
        elif path.suffix == ".ptz":
            tg.open_artifact(data, path)
        elif path.suffix == ".json":
            json.loads(data)
    return ""


def pair_trial(campaign: Campaign, folder: Path, number: int, rng: random.Random) -> Trial:
    """Two processes at once: runs of one name, runs without a name, or preparations."""
    kind = ("one name", "no name", "one data set")[number % 3]
    command: tuple[object, ...] = (campaign.script,)
    env = dict(campaign.environ)
    if kind == "one name":
        env["RUN_ID"] = "pair"
    elif kind == "no name":
        env["CHECKPOINT_EVERY"] = "0"
    else:
        command = (
            *(ROOT / "tools/prepare_data.py", "text", campaign.folder / "train.jsonl"),
            *("--val", campaign.folder / "val.jsonl", "--vocab-size", "320"),
            *(["--force"] if rng.random() < 0.5 else []),
        )
    first = Started(folder, "first", env, *command)
    time.sleep(rng.uniform(0, campaign.seconds) * (rng.random() < 0.5))
    second = Started(folder, "second", env, *command)
    statuses = sorted([first.end(), second.end()])
    if kind == "one data set":
        data = folder / "data/datasets/corpus_sp320"
        manifest = json.loads((data / "manifest.json").read_text())
        files = prepare_data.prepared_files(folder / "data", data, manifest)
        whole = statuses == [0, 0] and all(file.is_intact() for file in files)
        return Trial("" if whole else f"statuses {statuses}", {kind: 1})
    wanted = [0, 2] if kind == "one name" else [0, 0]
    fault = fault_of_lines(first, (0, 2)) or fault_of_lines(second, (0, 2))
    if not fault and statuses != wanted:
        fault = f"statuses {statuses} and not {wanted}"
    names = [path.stem for path in folder.glob("logs/*.txt")]
    if not fault and len(names) != statuses.count(0):
        fault = f"logs of {names}"
    for name in names if not fault else []:
        result_of(folder, name)
    return Trial(fault, {kind: 1})


ODD_PLACES = {
    "training shard": "data/datasets/tiny_sp320/tiny_train_000000.bin",
    "validation shard": "data/datasets/tiny_sp320/tiny_val_000000.bin",
    "side-car": "data/datasets/tiny_sp320/tiny_val_bytes_000000.bin",
    "manifest": "data/datasets/tiny_sp320/manifest.json",
    "doctor.json": "data/datasets/tiny_sp320/doctor.json",
    "tokenizer": "data/tokenizers/tiny_sp320.model",
    "model file": "model.pt",
    "checkpoint": "runs/odd/checkpoint.0.pt",
}
ODD_CASES = [(place, odd) for place in ODD_PLACES for odd in ODD_FILES]


class Reader(NamedTuple):
    """A tool beside a finished run, its packed form and its data, and the file that becomes odd."""

    path: str
    words: str  # its command line


LOG = "logs/calm.txt"
ARTIFACT = "runs/calm/final_model.int6.ptz"
DOCUMENTS = "runs/calm/documents.npz"
SHARDS = "data/datasets/tiny_sp320"
TOKENIZER = "data/tokenizers/tiny_sp320.model"
PREPARE = "prepare_data.py text train.jsonl --val val.jsonl --name again --data-dir again"
DOCTOR = f"prepare_data.py doctor {SHARDS} --workers 1"
REPLAY = f"audit.py replay {LOG} {ARTIFACT} --documents 2"
READERS = {
    "log, report": Reader(LOG, f"report.py {LOG}"),
    "log, history": Reader(LOG, f"report.py --history {LOG} --html page.html"),
    "log, audit": Reader(LOG, f"audit.py --log {LOG}"),
    "log, replay": Reader(LOG, REPLAY),
    "log, training replay": Reader(LOG, f"audit.py training {LOG} --steps 2"),
    "log, pack": Reader(LOG, f"pack.py runs/calm out --log {LOG}"),
    "log, picture": Reader(LOG, f"picture.py {LOG}"),
    "artifact, container": Reader(ARTIFACT, f"container.py {ARTIFACT}"),
    "artifact, audit": Reader(ARTIFACT, f"audit.py {ARTIFACT} --tests T1 --docs 2"),
    "artifact, replay": Reader(ARTIFACT, REPLAY),
    "artifact, pack": Reader(ARTIFACT, "pack.py runs/calm out"),
    "artifact, samples": Reader(ARTIFACT, "samples.py runs/calm --tokens 2"),
    "documents, replay": Reader(DOCUMENTS, REPLAY),
    "documents, pack": Reader(DOCUMENTS, "pack.py runs/calm out"),
    "documents, tilt": Reader(DOCUMENTS, "tilt.py runs/calm"),
    "documents, page": Reader(DOCUMENTS, f"report.py {LOG} --html page.html"),
    "scores, pack": Reader("runs/calm/scores.json", "pack.py runs/calm out"),
    "claim, check": Reader("packed/submission.json", "pack.py --check packed"),
    "sums, check": Reader("packed/SHA256SUMS", "pack.py --check packed"),
    "code, check": Reader("packed/train_gpt.py", "pack.py --check packed"),
    "text, preparation": Reader("train.jsonl", f"{PREPARE} --vocab-size 320"),
    "tokenizer, preparation": Reader(TOKENIZER, f"{PREPARE} --tokenizer {TOKENIZER}"),
    "shard, doctor": Reader(f"{SHARDS}/tiny_train_000000.bin", DOCTOR),
    "manifest, doctor": Reader(f"{SHARDS}/manifest.json", DOCTOR),
    "tokenizer, doctor": Reader(TOKENIZER, DOCTOR),
}
TOOL_CASES = [(reader, odd) for reader in READERS for odd in ODD_FILES]


def odd_trial(campaign: Campaign, folder: Path, number: int, rng: random.Random) -> Trial:
    """A run that finds something odd in the place of a file."""
    place, odd = ODD_CASES[number]
    shutil.copytree(campaign.data, folder / "data")
    path = folder / ODD_PLACES[place]
    path.parent.mkdir(parents=True, exist_ok=True)
    good = path if path.exists() else campaign.folder / "calm/runs/calm/final_model.pt"
    data = good.read_bytes()
    path.unlink(missing_ok=True)
    make_odd(odd, path, data)
    env = {"RUN_ID": "odd", "DATA_DIR": "data"}
    if place == "model file":
        env |= {"EVAL_ONLY_PATH": "model.pt", "CHECKPOINT_EVERY": "0"}
    run = Started(folder, "odd", env, campaign.script)
    # The limit is 10 s of a machine that does nothing else.
    if run.end(60) == -signal.SIGKILL:
        return Trial(f"{odd} as {place}: waits", {})
    fault = fault_of_lines(run, (2,))
    if not fault and (path.name not in run.complaint() or run.complaint().count("\n") != 1):
        fault = f"its line does not name the file: {run.complaint()[:300]}"
    return Trial(f"{odd} as {place}: {fault}" if fault else "", {place: 1})


def tool_trial(campaign: Campaign, folder: Path, number: int, rng: random.Random) -> Trial:
    """A tool that finds something odd in the place of a file."""
    name, odd = TOOL_CASES[number]
    reader = READERS[name]
    beside = folder / "beside"
    shutil.copytree(campaign.finished(), beside)
    path = beside / reader.path
    data = path.read_bytes()
    path.unlink()
    make_odd(odd, path, data)
    tool, *words = reader.words.split()
    env = {"DATA_DIR": "data", "PYTHONDONTWRITEBYTECODE": "1"}
    run = Started(beside, "tool", env, ROOT / "tools" / tool, *words)
    if run.end(60) == -signal.SIGKILL:
        return Trial(f"{odd} as {name}: waits", {})
    fault = fault_of_tool(run, tool, path.name)
    return Trial(f"{odd} as {name}: {fault}" if fault else "", {name: 1})


def fault_of_tool(run: Started, tool: str, name: str) -> str:
    """What is wrong with how a tool told of an odd file; empty if nothing is."""
    status = run.process.exitcode
    text = run.complaint()
    lines = text.splitlines()
    if status not in (0, 1, 2) or "Traceback" in text or not all(map(str.isprintable, lines)):
        return f"status {status}: {text[-300:]}"
    said = text + run.out.read_text(errors="replace")
    if status == 2 and name not in said:
        return f"its line does not name the file: {said[:300]}"
    if status == 2 and len(lines) > 1 and any(not line.startswith(f"{tool}: ") for line in lines):
        return f"more than lines of its own: {text[:300]}"
    return ""


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = [{script!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


def clear(folder: Path) -> None:
    """Removes the folder of a trial, and the file system that a killed campaign has left in it."""
    disk = folder / "disk"
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of its own at a folder; False where this process may not mount one."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "faults", str(folder)]
    is_mounted = (
        os.geteuid() == 0
        and not subprocess.run(["mount", *options], capture_output=True, check=False).returncode
    )
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def full_trial(campaign: Campaign, folder: Path, number: int, rng: random.Random) -> Trial:
    """A run on a disk that is full at some moment; with more space the same command ends it."""
    env = {**campaign.environ, "RUN_ID": "full"}
    limited = folder / "limited.py"
    limit = int(math.exp(rng.uniform(math.log(40_000), math.log(900_000))))
    with small_disk(folder / "disk", 3_000_000) as is_mounted:
        if is_mounted and number % 2:
            kind = "small file system"
            env["ARTIFACT_DIR"] = "disk/run"
            (folder / "disk/ballast").write_bytes(bytes(rng.randrange(2_000_000, 2_990_000)))
            run = Started(folder, "full", env, campaign.script)
        else:
            kind = "limit of a file's size"
            limited.write_text(LIMITED.format(limit=limit, script=str(campaign.script)))
            run = Started(folder, "full", env, limited)
        status = run.end()
        fault = fault_of_lines(run, (0, 1))
        parts = [path.name for path in folder.glob("**/*.part")]
        if not fault and parts:
            fault = f"left {parts}"
        for runs in (folder / "disk/run", folder / "runs/full"):
            fault = fault or half_written(runs)
        text = run.out.read_text()
        if not fault and re.search(r"^final ", text, re.M) is None:
            fault = "no final line: the run did not go on"
    return Trial(fault, {f"{kind}, {'not written' if status else 'all written'}": 1})


# === Command line =================================================================================
def table_of(trials: dict[str, list[Trial]]) -> str:
    """The table that closes a campaign."""
    rows = []
    for kind, shown in trials.items():
        counts: Counter[str] = Counter()
        for trial in shown:
            counts.update(trial.counts)
        details = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        faults = sum(bool(trial.fault) for trial in shown)
        rows.append([kind, str(sum(counts.values())), str(len(shown)), str(faults), details])
    return markdown_table(["kind", "faults set", "trials", "failed", "of these"], rows)


def are_killed(kills: int, trials: list[Trial]) -> bool:
    """Whether so many kills are done. A trial without one counts as one, so it comes to an end."""
    return sum(max(1, sum(trial.counts.values())) for trial in trials) >= kills


def are_as_many(count: int, trials: list[Trial]) -> bool:
    """Whether so many trials are done."""
    return len(trials) >= count


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, default=Path("runs/faults"), help="default runs/faults")
    add("--seed", type=int, default=1, help="of all moments and choices (default 1)")
    add("--kills", type=int, default=1000, help="about so many kills (default 1000)")
    add("--pairs", type=int, default=30, help="pairs of processes (default 30)")
    add("--odd", type=int, default=len(ODD_CASES), help="odd files (default all)")
    add("--tools", type=int, default=len(TOOL_CASES), help="odd files for tools (default all)")
    add("--full", type=int, default=60, help="full disks (default 60)")
    return parser


def leave(number: int, _: object) -> NoReturn:
    """Ends the campaign for a signal, and cleans up."""
    sys.exit(128 + number)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 no fault, 1 faults."""
    args = build_parser().parse_args(argv)
    campaign = Campaign(args.folder, args.seed, max(1, min(KILLS_A_RUN, args.kills)))
    trials = {"kills": campaign.run_trials("kills", partial(are_killed, args.kills), kill_trial)}
    others = {
        "pairs": (args.pairs, pair_trial),
        "odd files": (min(args.odd, len(ODD_CASES)), odd_trial),
        "odd files, tools": (min(args.tools, len(TOOL_CASES)), tool_trial),
        "full disks": (args.full, full_trial),
    }
    for kind, (count, trial) in others.items():
        trials[kind] = campaign.run_trials(kind, partial(are_as_many, count), trial)
    print(table_of(trials))
    if os.geteuid() != 0:
        print("left out without root: full disks on a file system of their own")
    return int(any(trial.fault for shown in trials.values() for trial in shown))


if __name__ == "__main__":
    # Otherwise a trial's file system would stay mounted.
    signal.signal(signal.SIGTERM, leave)
    sys.exit(main())
