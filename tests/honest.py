"""Honest runs in many settings, each audited by the command of README.md: none may be accused.

    python tests/honest.py FOLDER               # the table, in Markdown, of all settings
    python tests/honest.py FOLDER pr1530 rows   # of some

Runs and verdicts are kept in FOLDER, so the same command goes on where it was stopped, as long as
train_gpt.py is the same. The data are those that `tools/prepare_data.py pydocs` has written below
DATA_DIR (default ./data), and what else a setting names; a setting whose data or user is not here
is left out with the reason. An hour on one core. Exit status: 0 no violation, 1 some, 2 wrong
usage.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from tables import markdown_table  # noqa: E402
from tiny_run import TINY  # noqa: E402

NOBODY = 65534
PYDOCS = {"DATASET": "pydocs_sp1024_caseops", "VOCAB_SIZE": "1024"}
SHORT = {"MAX_WALLCLOCK_SECONDS": "0", "ITERATIONS": "8", "WARMUP_STEPS": "0"}
PART = {"VAL_DOC_FRACTION": "0.08"}
NETWORK = {**TINY, **PYDOCS, **SHORT, **PART, "ITERATIONS": "24", "TTT_LORA_LR": "0.01"}
WHOLE = {**NETWORK, "VAL_DOC_FRACTION": "1"}
EIGHT = {"PRESET": "cpu", "VOCAB_SIZE": "8192", **SHORT, **PART}
SYSTEMS = "pr1530 pr1560 pr1413 pr473 pr605 pr1855 pr2014 pr2135 record".split()
ROWS = {
    "DATA_LOADER": "rows",
    "TTT_MODE": "chunk",
    "TTT_CHUNK_TOKENS": "128",
    "TTT_LR": "0.05",
    "SLIDING_WINDOW_ENABLED": "1",
}


class Setting(NamedTuple):
    """A run, and how it is audited."""

    run: dict[str, str]  # its variables
    environ: dict[str, str] = {}  # what the audit has beside them
    arguments: tuple[str, ...] = ()  # of the audit
    folder: str = ""  # name of the run's folder; runs of equal variables share one
    user: int = 0  # who audits; 0: whoever runs this


def shrunk(preset: str) -> Setting:
    """A system small enough for a CPU."""
    return Setting({"PRESET": preset, "SHRINK": "1", **PYDOCS, **SHORT, **PART})


def miniature(*arguments: str, **environ: str) -> Setting:
    """What `make run` trains, for a few steps, with all of its validation documents."""
    return Setting({"PRESET": "cpu", **PYDOCS, **SHORT}, environ, arguments)


SETTINGS = {
    **{preset: shrunk(preset) for preset in SYSTEMS},
    "make run": miniature(),
    "make run, one core": miniature(OMP_NUM_THREADS="1"),
    "make run, 2 documents": miniature("--docs", "2"),
    "100 documents": Setting(WHOLE, arguments=("--docs", "100")),
    "bf16": Setting({**NETWORK, "COMPUTE_DTYPE": "bf16"}),
    "bf16, one core": Setting({**NETWORK, "COMPUTE_DTYPE": "bf16"}, {"OMP_NUM_THREADS": "1"}),
    "no bytecode": Setting(NETWORK, {"PYTHONDONTWRITEBYTECODE": "1"}),
    "a path with spaces": Setting(NETWORK, folder="a path with spaces"),
    "another user": Setting(NETWORK, folder="of another user", user=NOBODY),
    "rows, chunks, sliding windows": Setting({**NETWORK, **ROWS}),
    "tilt": Setting({**NETWORK, "TILT_ORDER": "4", "TILT_HEDGE": "1,3"}),
    "corpus, 8,192 pieces": Setting({**EIGHT, "DATASET": "corpus_sp8192"}),
    "corpus, CaseOps, 8,192 pieces": Setting({**EIGHT, "DATASET": "corpus_sp8192_caseops"}),
}


def missing(setting: Setting, data: Path) -> str:
    """Why a setting cannot be tried here; empty if it can."""
    manifest = data / "datasets" / setting.run["DATASET"] / "manifest.json"
    if not manifest.is_file():
        return f"{manifest} is not there"
    if setting.user and os.geteuid() != 0:
        return "only root can become another user"
    if setting.user:
        try:
            subprocess.run([sys.executable, "-c", ""], user=setting.user, check=True)
        except (OSError, subprocess.CalledProcessError):
            return f"another user cannot run {sys.executable}"
    return ""


def artifact_of(setting: Setting, folder: Path, data: Path) -> Path:
    """The artifact of a setting's run, which is made unless an earlier call has.

    Raises RuntimeError if the run fails.
    """
    text = json.dumps([setting.run, setting.folder], sort_keys=True)
    name = setting.folder or hashlib.sha256(text.encode()).hexdigest()[:8]
    place = folder / name
    artifact = place / "runs/honest/final_model.int6.ptz"
    if not (artifact.parent / "scores.json").is_file():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        environ = {**os.environ, "DATA_DIR": str(data), "RUN_ID": "honest", **setting.run}
        command = [sys.executable, str(ROOT / "train_gpt.py")]
        done = subprocess.run(
            command, cwd=place, env=environ, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-500:])
    return artifact


def audited(setting: Setting, artifact: Path, data: Path) -> dict[str, Any]:
    """The verdict: exit status, what each test found, seconds."""
    environ = {**os.environ, "DATA_DIR": str(data), **setting.environ}
    out = artifact.parent / "verdict.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "tools/audit.py"), str(artifact), "--json", str(out)]
    if setting.user:
        subprocess.run(["chown", "-R", str(setting.user), artifact.parents[2]], check=True)
        environ["HOME"] = str(artifact.parent)
    start = time.monotonic()
    done = subprocess.run(
        [*command, *setting.arguments],
        env=environ,
        user=setting.user or None,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - start
    tests = json.loads(out.read_text())["tests"] if out.is_file() else {}
    evidence = {name: test["evidence"] for name, test in tests.items() if test["passed"] is False}
    return {
        "status": done.returncode,
        "passed": sum(test["passed"] is True for test in tests.values()),
        "left_out": [name for name, test in tests.items() if test["passed"] is None],
        "failed": evidence,
        "error": "" if tests else done.stderr[-500:],
        "seconds": round(seconds),
    }


def row_of(name: str, verdict: dict[str, Any]) -> list[str]:
    """A line of the table."""
    failed = "; ".join(f"{test}: {text}" for test, text in verdict["failed"].items())
    return [
        name,
        str(verdict["passed"]),
        ", ".join(verdict["left_out"]),
        failed or verdict["error"] or "none",
        str(verdict["seconds"]),
    ]


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    unknown = [name for name in argv[1:] if name not in SETTINGS]
    if not argv or unknown:
        wrong = (
            f"{unknown[0]}: must be one of {', '.join(SETTINGS)}" if unknown else "name a folder"
        )
        print(f"honest.py: {wrong}", file=sys.stderr)
        return 2
    code = (ROOT / "train_gpt.py").read_bytes()
    folder = Path(argv[0]).absolute() / hashlib.sha256(code).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    data = Path(os.environ.get("DATA_DIR", "data")).absolute()
    kept = folder / "verdicts.json"
    verdicts = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in argv[1:] or SETTINGS:
        setting = SETTINGS[name]
        if reason := missing(setting, data):
            print(f"honest.py: {name}: left out: {reason}", file=sys.stderr)
        elif name not in verdicts:
            print(f"honest.py: {name}", file=sys.stderr, flush=True)
            verdicts[name] = audited(setting, artifact_of(setting, folder, data), data)
            kept.write_text(json.dumps(verdicts))
    rows = [row_of(name, verdict) for name, verdict in verdicts.items()]
    print(markdown_table(["setting", "passed", "not claimed or not run", "violations", "s"], rows))
    return int(any(verdict["status"] for verdict in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
