"""Evidence is made by one command, goes on after a kill, and reaches every document."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import evidence

from train_gpt import UsageError

CODE = "c0de" * 16


def final_line(run_id: str, code: str = CODE) -> str:
    """The last line of a finished run, with the figures that the tables need."""
    figures = {
        "run_id": run_id,
        "code_sha256": code,
        "seed": 1,
        "preset": "cpu",
        "steps": 10,
        "seconds": {"train": 2.5},
        "pre_quantization_bpb": 2.5,
        "quantized_bpb": 2.25,
        "val_bpb": 2.125,
        "device": "CPU",
        "torch": "2.13.0",
        "python": "3.11",
        "gzip_bpb": 2.75,
    }
    return f"final {json.dumps(figures)}\n"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The environments of the runs that were started; each leaves the log of a finished run."""
    environments = []

    def run(script: Path, environ: dict[str, str], folder: Path) -> int:
        environments.append(environ)
        log = folder / "logs" / f"{environ['RUN_ID']}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("a line\n" + final_line(environ["RUN_ID"]))
        return 0

    monkeypatch.setattr(evidence, "run_training", run)
    return environments


def test_the_plan_is_three_seeds_of_make_run_and_nine_systems_of_one_budget():
    seeds = evidence.seed_runs()
    assert [run.knobs["SEED"] for run in seeds] == ["0", "42", "1337"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, value in seeds[0].knobs.items():
        assert name == "SEED" or f"\n{name} ?= {value}\n" in makefile
    assert 'PRESET="$(PRESET)" DATASET="$(DATASET)" DATA_DIR=' in makefile
    assert all({*run.knobs} == {"PRESET", "DATASET", "SEED"} for run in seeds)
    for has_corpus in (False, True):
        systems = evidence.system_runs(has_corpus)
        assert [run.knobs["PRESET"] for run in systems] == list(evidence.SYSTEMS)
        shared = {
            tuple(sorted(run.knobs.items() - {("PRESET", run.knobs["PRESET"])})) for run in systems
        }
        assert len(shared) == 1


def test_finished_runs_of_this_source_are_not_repeated(started, tmp_path: Path):
    runs = evidence.seed_runs()
    evidence.complete(runs[:1], Path("train_gpt.py"), tmp_path, CODE)
    evidence.complete(runs, Path("train_gpt.py"), tmp_path, CODE)
    assert [environ["SEED"] for environ in started] == ["0", "42", "1337"]


@pytest.mark.parametrize("text", ["half a run\n", final_line("x", code="other")])
def test_an_unfinished_log_or_one_of_other_code_is_no_evidence(started, tmp_path: Path, text: str):
    run = evidence.seed_runs()[0]
    log = tmp_path / "logs" / f"{run.run_id(CODE)}.txt"
    log.parent.mkdir()
    log.write_text(text)
    evidence.complete([run], Path("train_gpt.py"), tmp_path, CODE)
    assert len(started) == 1


def test_a_run_that_fails_ends_the_command_with_its_name_and_status(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(evidence, "run_training", lambda script, environ, folder: 3)
    with pytest.raises(UsageError, match="seed0: ended with status 3"):
        evidence.complete(evidence.seed_runs(), Path("train_gpt.py"), tmp_path, CODE)


def test_kept_logs_replace_earlier_ones_and_no_others(started, tmp_path: Path):
    old = tmp_path / "logs" / "2020-01-01_cpu-pydocs_seed0.txt"
    mine = tmp_path / "logs" / "mine.txt"
    old.parent.mkdir()
    old.write_text("old")
    mine.write_text("mine")
    runs = evidence.seed_runs()
    logs = evidence.complete(runs, Path("train_gpt.py"), tmp_path, CODE)
    kept = evidence.keep_logs(runs, logs, tmp_path)
    assert not old.exists() and mine.exists()
    assert [path.read_bytes() for path in kept] == [log.read_bytes() for log in logs]


def test_a_run_is_judged_once_and_what_speaks_against_it_ends_the_command(
    monkeypatch, tmp_path: Path
):
    """The audit leaves its file and the replay its page; both must end with status 0."""
    run = evidence.seed_runs()[0]
    log = tmp_path / "logs/a.txt"
    log.parent.mkdir()
    log.touch()
    name = run.kept.format(date=evidence.day_of(log)).removesuffix(".txt")
    with pytest.raises(UsageError, match=f"No such file or directory; remove {log}"):
        evidence.judge(run, log, tmp_path)
    artifact = tmp_path / "runs/a/final_model.int6.ptz"
    artifact.parent.mkdir(parents=True)
    artifact.write_bytes(b"artifact")
    old = tmp_path / "logs/verdicts/2020-01-01_seed0.md"
    old.write_text("old")
    statuses = {"audit": 0, "replay": 0}
    calls = []

    def tool(environ: dict[str, str], program: str, *words: object) -> int:
        # What is exported here must not judge another setting.
        assert environ["SEED"] == run.knobs["SEED"]
        kind = "replay" if "replay" in words else "audit"
        calls.append(kind)
        if kind == "audit":
            found = {"artifact_sha256": evidence.file_sha256(artifact)}
            Path(words[words.index("--json") + 1]).write_text(json.dumps(found))
        elif not statuses[kind]:
            # The page takes from it what was tested.
            assert artifact.with_name("audit.json").exists()
            words[words.index("--page") + 1].with_suffix(".html").write_text("page")
        return statuses[kind]

    monkeypatch.setattr(evidence, "run_tool", tool)
    monkeypatch.setenv("SEED", "7")
    statuses["replay"] = 1
    with pytest.raises(UsageError, match="a: its replay ended with status 1"):
        evidence.judge(run, log, tmp_path)
    statuses["replay"] = 0
    evidence.judge(run, log, tmp_path)
    evidence.judge(run, log, tmp_path)
    assert calls == ["audit", "replay"] * 2
    # Another artifact has no verdict yet.
    artifact.write_bytes(b"another")
    statuses["audit"] = 1
    with pytest.raises(UsageError, match="a: its audit ended with status 1"):
        evidence.judge(run, log, tmp_path)
    audit = old.with_name(f"{name}.json")
    audit.write_text("no JSON")
    with pytest.raises(UsageError, match="a: its audit ended with status 1"):
        evidence.judge(run, log, tmp_path)
    evidence.forget_other_verdicts([log.with_name(f"{name}.txt")], tmp_path)
    assert not old.exists() and audit.exists()


def test_a_block_is_replaced_between_its_marks_alone(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x:begin -->\nold\n<!-- x:end -->\nz\n")
    evidence.rewrite_block(page, "x", ["new", "lines"])
    assert page.read_text() == "a\n<!-- x:begin -->\nnew\nlines\n<!-- x:end -->\nz\n"
    with pytest.raises(UsageError, match="needs one line"):
        evidence.rewrite_block(page, "y", [])


def test_the_committed_documents_are_those_of_the_kept_logs():
    """README, EXPERIMENTS and submission.json hold what the kept logs say, all of one source."""
    seeds, systems = evidence.kept_logs(ROOT)
    results = [evidence.result_of(log) for log in seeds]
    assert len({evidence.result_of(log)["code_sha256"] for log in seeds + systems}) == 1
    claim = json.loads((ROOT / "submission.json").read_text(encoding="utf-8"))
    mean = sum(result["val_bpb"] for result in results) / len(results)
    assert claim["val_bpb"] == pytest.approx(mean)
    assert claim["code_sha256"] == results[0]["code_sha256"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    experiments = (ROOT / "EXPERIMENTS.md").read_text(encoding="utf-8")
    for result in results:
        assert f"{result['val_bpb']:.5f}" in readme
        assert f"{result['val_bpb']:.4f}" in experiments
