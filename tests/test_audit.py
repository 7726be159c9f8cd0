"""The audit: passes the honest evaluation in every mode, catches each planted cheat, reads logs of
whoever.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cheats
import honest
import numpy as np
import pytest
import torch
from cheats import CHEATS, CHUNK, ROOT, plant
from conftest import TINY, run_script

sys.path.insert(0, str(ROOT / "tools"))
import audit
import canonical
import case
import commitment
import fresh_process
import legality
import probe
import runlog
from runlog import log_of_run
from scripts import load_script

import train_gpt as tg

RATES = {"TTT_LORA_LR": "0.01"}  # at which every update shows
PHASES = {
    "PHASED_TTT_NUM_PHASES": "2",
    "PHASED_TTT_PREFIX_DOCS": "8",
    "TTT_CHUNK_TOKENS": "64",
    "TTT_LR": "0.05",
    "TTT_WARM_START_A": "1",
}
IN_PROCESS = ["T1", "T2", "T3", "T4", "T5", "T6", "T10", "T11", "T20"]
SCRIPT = ROOT / "train_gpt.py"


@pytest.fixture(scope="session")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short run: logs/a.txt, runs/a/final_model.int6.ptz."""
    folder = tmp_path_factory.mktemp("audited")
    done = run_script(
        {**TINY, **RATES, "DATA_DIR": str(tiny_data), "ITERATIONS": "24", "RUN_ID": "a"}, folder
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def knobs(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("DATA_DIR", str(tiny_data))
    return {**TINY, **RATES, "DATA_DIR": str(tiny_data), "WARMUP_STEPS": "0"}


def artifact_of(run: Path) -> Path:
    return run / "runs" / "a" / "final_model.int6.ptz"


def failed(result: dict) -> list[str]:
    return [name for name, test in result["tests"].items() if test["passed"] is False]


# === Honest =======================================================================================
@pytest.mark.parametrize("mode", ["document", "chunk", "phases", "tilt", "chunk, tilt"])
def test_honest_run_passes_every_test(run, knobs, mode):
    modes = {"document": {"WARMUP_STEPS": "1"}, "chunk": CHUNK, "phases": PHASES}
    modes["tilt"] = {"TILT_ORDER": "4", "TILT_HEDGE": "1,3", "TILT_GAMMA": "0.5"}
    changes = {}
    for name in mode.split(", "):
        changes |= modes[name]
    tests = [*IN_PROCESS, "T21"] if "tilt" in mode else IN_PROCESS
    log = None
    if mode == "document":
        tests = list(legality.TESTS)
        log = run / "logs" / "a.txt"
    result = audit.audit(SCRIPT, artifact_of(run), {**knobs, **changes}, tests, 6, log)
    assert failed(result) == [], {
        name: result["tests"][name]["evidence"] for name in failed(result)
    }
    assert result["always_on"] == []
    ran = {name for name, test in result["tests"].items() if test["passed"]}
    assert ran >= set(tests) - {"T21"}
    assert mode != "document" or ran == set(legality.TESTS) - {"T21"}
    # Without the tilt there are no hints to look at.
    assert ("T21" in ran) is ("tilt" in mode)
    held = {name: row["passed"] for name, row in result["properties"].items()}
    assert held["document_independent"] is (True if mode == "document" else None)
    assert all(
        held[name] for name in ("repeatable", "causal", "normalised", "score_first", "single_pass")
    )
    if mode != "document":  # learning happened, or the tests above had nothing to see
        assert re.search(
            r"quantized_ttt_lora [1-9]\d+ targets read", result["tests"]["T5"]["evidence"]
        )


def test_hints_on_a_data_set_with_a_side_car_are_looked_at(caseops_data, tmp_path):
    """Such a run has no table of bytes, so the shortened stream needs its side-car, too."""
    environ = {**TINY, **RATES, "DATA_DIR": str(caseops_data), "DATASET": "tiny_sp320_caseops"}
    environ |= {"WARMUP_STEPS": "0", "TTT_ENABLED": "0", "TILT_ORDER": "4", "TILT_HEDGE": "1,3"}
    done = run_script({**environ, "RUN_ID": "a"}, tmp_path)
    assert done.returncode == 0, done.stderr
    result = audit.audit(SCRIPT, artifact_of(tmp_path), environ, ["T21"], 6)
    assert result["tests"]["T21"]["passed"], result["tests"]["T21"]["evidence"]


@pytest.fixture(scope="session")
def run_of_rows(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with rows that cross documents."""
    folder = tmp_path_factory.mktemp("rows")
    environ = {
        **TINY,
        **RATES,
        "DATA_DIR": str(tiny_data),
        "ITERATIONS": "24",
        "RUN_ID": "a",
        "DATA_LOADER": "rows",
    }
    done = run_script(environ, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("mode", ["document", "chunk"])
def test_honest_run_on_rows_passes_and_claims_no_more_than_it_has(run_of_rows, knobs, mode):
    sliding = {**CHUNK, "SLIDING_WINDOW_ENABLED": "1"}
    environ = {**knobs, "DATA_LOADER": "rows", **(sliding if mode == "chunk" else {})}
    result = audit.audit(
        SCRIPT, artifact_of(run_of_rows), environ, [*IN_PROCESS, "T7", "T8", "T9", "T18"], 6
    )
    assert failed(result) == [], {
        name: result["tests"][name]["evidence"] for name in failed(result)
    }
    held = {name: row["passed"] for name, row in result["properties"].items()}
    assert all(
        held[name] for name in ("repeatable", "causal", "normalised", "score_first", "single_pass")
    )
    assert held["self_contained"] and held["document_independent"] is None
    assert (
        "over documents (DATA_LOADER)" in result["properties"]["document_independent"]["evidence"]
    )
    evidence = {name: test["evidence"] for name, test in result["tests"].items()}
    assert "quantized not claimed: DATA_LOADER=rows" in evidence["T10"]
    assert result["tests"]["T10"]["passed"] is (
        True if mode == "document" else None
    )  # adapters are a document's own
    assert re.search(r"quantized 0.0e\+00 nats at \d+ places beyond a window", evidence["T11"])
    assert re.search(r"quantized_ttt_lora [1-9]\d+ targets read", evidence["T5"])
    assert "2 documents in an empty folder" in evidence["T8"]  # the first ones, not the whole set


def test_every_honest_setting_is_a_configuration():
    assert len(honest.SETTINGS) >= 20
    for setting in honest.SETTINGS.values():
        tg.Config.from_env(setting.run, False)


def test_the_table_of_honest_runs_keeps_its_verdicts_and_tells_a_violation(
    tiny_data, tmp_path, monkeypatch, capsys
):
    setting = honest.Setting({**TINY, "TTT_ENABLED": "0"}, arguments=("--tests", "T4"))
    monkeypatch.setattr(honest, "SETTINGS", {"tiny": setting})
    monkeypatch.setenv("DATA_DIR", str(tiny_data))
    assert honest.main([str(tmp_path)]) == 0
    # T0 always runs.
    assert "\n| tiny | 2 |  | none | " in capsys.readouterr().out
    # Nothing is audited again, and what was found counts.
    (kept,) = tmp_path.glob("*/verdicts.json")
    verdicts = json.loads(kept.read_text())
    verdicts["tiny"] |= {"status": 1, "failed": {"T4": "forged"}}
    kept.write_text(json.dumps(verdicts))
    assert honest.main([str(tmp_path)]) == 1
    assert "T4: forged" in capsys.readouterr().out
    assert honest.main([str(tmp_path), "nothing"]) == 2


# === Planted cheats ===============================================================================
@pytest.mark.parametrize("name", CHEATS)
def test_cheat_is_caught(run, knobs, tmp_path, name):
    cheat = CHEATS[name]
    expected = cheat.tests
    beside = artifact_of(run).with_name("beside.npy")
    if name == "state_beside_the_artifact":
        np.save(beside, np.float32(0.01))
    try:
        result = audit.audit(
            plant(name, tmp_path), artifact_of(run), {**knobs, **cheat.knobs}, list(expected), 6
        )
    finally:
        beside.unlink(missing_ok=True)
    evidence = {test: found["evidence"] for test, found in result["tests"].items()}
    assert set(failed(result)) - {"T0"} == set(expected), evidence
    assert not any("Error:" in text for text in evidence.values()), evidence  # caught, not crashed
    broken = {name for name, row in result["properties"].items() if row["passed"] is False}
    assert broken  # and said in terms of a property


@pytest.mark.parametrize(
    "name,expected",
    [
        ("bias_from_target", {"T2", "T3", "T9"}),
        ("unnormalised_mixing", {"T2", "T3"}),
        ("peek_in_attention", {"T1", "T2"}),
        ("chunk_before_its_score", {"T1", "T5"}),
        ("memory_of_the_stream", {"T11"}),
        ("last_windows_dropped", {"T4"}),
        ("validation_learnt_before_the_evaluation", {"T8"}),
    ],
)
def test_cheat_on_rows_is_caught(run_of_rows, knobs, tmp_path, name, expected):
    environ = {
        **knobs,
        **CHUNK,
        "DATA_LOADER": "rows",
        "SLIDING_WINDOW_ENABLED": "1",
        **CHEATS[name].knobs,
    }
    result = audit.audit(
        plant(name, tmp_path), artifact_of(run_of_rows), environ, sorted(expected), 6
    )
    evidence = {test: found["evidence"] for test, found in result["tests"].items()}
    assert set(failed(result)) - {"T0"} == expected, evidence
    assert not any("Error:" in text for text in evidence.values()), evidence


def test_coverage_of_a_sample_of_rows_is_what_the_shards_hold_of_it(run_of_rows, knobs, tmp_path):
    environ = {**knobs, "DATA_LOADER": "rows", "VAL_DOC_FRACTION": "0.4"}
    found = audit.audit(SCRIPT, artifact_of(run_of_rows), environ, ["T14"], 4)["tests"]["T14"]
    assert found["passed"] is None and found["evidence"].startswith("5 of 5 documents")
    assert "no claim: VAL_DOC_FRACTION=0.4" in found["evidence"]
    source = SCRIPT.read_text()
    other = source.replace(
        "random.Random(cfg.seed).sample", "random.Random(cfg.seed + 1).sample"
    )  # another choice
    assert other != source
    (tmp_path / "train_gpt.py").write_text(other)
    result = audit.audit(tmp_path / "train_gpt.py", artifact_of(run_of_rows), environ, ["T14"], 4)
    assert failed(result) == ["T14"]


def test_nan_fails_every_test_that_looks_at_scores(run, knobs, tmp_path):
    """NaN compares as neither more nor less, so a comparison alone would pass it."""
    text = SCRIPT.read_text()
    nan = "    init = GPT.forward\n    GPT.forward = lambda *a, **k: init(*a, **k) * math.nan\n"
    path = tmp_path / "train_gpt.py"
    before, entry, after = text.rpartition(cheats.ENTRY)
    path.write_text(f"{before}if True:\n{nan}\n\n{entry}{after}")
    tests = ["T0", "T1", "T2", "T3", "T4", "T5", "T6", "T9", "T10", "T11", "T20"]
    result = audit.audit(path, artifact_of(run), knobs, tests, 2)
    assert failed(result) == tests, result["tests"]
    assert math.isnan(probe.worst_of(0.0, math.nan)) and math.isnan(probe.worst_of(math.nan, 1.0))


@pytest.mark.parametrize(
    "error,is_machine",
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (MemoryError("no"), True),
        (subprocess.TimeoutExpired("x", 1), True),
        (fresh_process.MachineError("killed"), True),
        (OSError(errno.ENOENT, "No such file"), False),
        (ValueError("no"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_the_machine_is_no_violation_and_no_pass(
    run, knobs, monkeypatch, capsys, error, is_machine
):
    def fail(*_):
        raise error

    monkeypatch.setattr(case, "Subject", fail)
    for name, value in knobs.items():
        monkeypatch.setenv(name, value)
    assert audit.main([str(artifact_of(run)), "--tests", "T4"]) == (3 if is_machine else 1)
    said = capsys.readouterr()
    assert ("not run: the machine" in said.out) is is_machine
    assert ("VIOLATION" in said.out) is not is_machine


def test_a_process_that_the_system_killed_or_a_full_disk_ended_is_known_by_its_end():
    failure = fresh_process.failure_of_machine
    assert failure(-9, "no output") and failure(1, "OSError: [Errno 28] No space left on device")
    assert not failure(0, "No space left on device") and not failure(1, "ValueError: no")


def test_the_fresh_process_computes_as_this_one_does(tmp_path, monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    variables = fresh_process.environment(tmp_path, "d", {})
    assert variables["OMP_NUM_THREADS"] == str(torch.get_num_threads())
    assert variables["MKL_CBWR"] == "COMPATIBLE"
    assert variables["PYTHONDONTWRITEBYTECODE"] == "1"  # no bytecode of ours is a violation


def test_what_another_number_of_threads_does_is_no_violation(run, knobs):
    """Scores of two processes may differ by twice what threads do, and by no more."""
    trial = case.Case(SCRIPT, artifact_of(run), knobs, 4, None)
    assert trial.thread_floor < 1e-4
    honest = trial.fresh
    trial.thread_floor = 0.8e-5
    for factor, passed in ((1, True), (3, False)):
        apart = honest.doc_nats + factor * 1e-5 * trial.few_docs.counts
        trial.fresh = honest._replace(doc_nats=apart)
        assert legality.run_tests(trial, ["T8"])["T8"].passed is passed


def test_the_score_is_the_sum_of_the_documents_that_the_log_commits_to(run, knobs, tmp_path):
    final = final_of(run)
    settings = runlog.read_settings((run / "logs" / "a.txt").read_text())
    with np.load(run / "runs" / "a" / "documents.npz") as file:
        documents = dict(file)
    assert list(commitment.problems(final, settings, documents)) == []

    def faults(final=final, documents=documents, settings=settings):
        return " ".join(commitment.problems(final, settings, documents))

    assert "val_bpb is" in faults({**final, "val_bpb": final["val_bpb"] - 1e-6})
    assert "val_bpb is nan" in faults({**final, "val_bpb": math.nan})
    lower = {**documents, "doc_nats": documents["doc_nats"] * 0.99}
    assert "not those that the final line commits to" in faults(documents=lower)
    # A log that was edited consistently is left to the replay.
    edited = {**final, "documents_sha256": commitment.root(lower)}
    edited["val_bpb"], edited["val_loss"] = final["val_bpb"] * 0.99, final["val_loss"] * 0.99
    assert faults(edited, lower) == ""
    assert "missing" in faults(documents=None)
    swapped = {name: values[::-1] for name, values in documents.items()}
    assert "commits to" in faults(documents=swapped)
    sample = {**settings, "val_doc_fraction": runlog.Setting("0.5", "env")}
    assert "VAL_DOC_FRACTION=0.5" in faults(settings=sample)
    assert "commits to no documents" in faults({"val_bpb": 1.0})


def test_documents_that_are_not_those_of_the_shards_are_found(run, knobs, tmp_path):
    """An edited log and documents that fit each other, with bytes that the text does not have."""
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    shutil.copy(artifact_of(run), folder)
    with np.load(run / "runs" / "a" / "documents.npz") as file:
        documents = dict(file)
    documents["doc_bytes"] = documents["doc_bytes"].astype(int) + 1
    np.savez(folder / "documents.npz", **documents)
    found = commitment.totals(documents)
    final = {**final_of(run), "documents_sha256": commitment.root(documents)}
    final |= {"val_bpb": found.bpb, "val_bytes": found.bytes}
    text = (run / "logs" / "a.txt").read_text()
    log = tmp_path / "a.txt"
    log.write_text(re.sub(r"^final .*$", f"final {json.dumps(final)}", text, flags=re.M))
    trial = case.Case(SCRIPT, folder / "final_model.int6.ptz", knobs, 4, log)
    finding = legality.run_tests(trial, ["T22"])["T22"]
    assert finding.passed is False and "12 documents have other bytes" in finding.evidence


def final_of(run: Path) -> dict:
    return runlog.read_final((run / "logs" / "a.txt").read_text())


def test_a_subject_that_cannot_start_is_tried_once(run, knobs, monkeypatch):
    tries = []

    def refused(*_):
        tries.append(1)
        raise load_script(SCRIPT).UsageError("no")

    monkeypatch.setattr(case, "Subject", refused)
    result = audit.audit(SCRIPT, artifact_of(run), knobs, IN_PROCESS, 4)
    assert len(tries) == 1
    assert {result["tests"][name]["evidence"] for name in IN_PROCESS} == {"the run refuses: no"}


def test_sixteen_kinds_of_cheat_and_more_are_planted():
    assert len(CHEATS) >= 16
    assert {test for cheat in CHEATS.values() for test in cheat.tests} >= {
        "T1",
        "T2",
        "T3",
        "T4",
        "T5",
        "T6",
        "T7",
        "T8",
        "T9",
        "T10",
        "T11",
        "T12",
        "T14",
        "T17",
        "T18",
        "T21",
    }


# === Logs =========================================================================================
def log_of(tmp_path: Path, loss: float, bpb: float, tokens: int, digits: int = 8) -> Path:
    path = tmp_path / "train.log"
    path.write_text(
        f"val_tokens: {tokens}\n1/2 val_loss: 4.1 val_bpb: 2.5\n"
        f"quantized_ttt val_loss:{loss:.{digits}f} val_bpb:{bpb:.{digits}f} eval_time:1ms\n"
    )
    return path


@pytest.mark.parametrize(
    "tokens,factor,passed",
    [
        (40_540_160, 1.0, True),
        (40_540_160, 1.1671, False),
        (62_021_632, 1.0413, False),
        (62_021_632, 1.0, True),
        (45_508_608, 1.0099, False),
        (47_851_520, 1.0, True),
        (63_779_840, 1.0, False),
        (9_662_464, 1.0, False),
    ],
)
def test_implied_bytes_of_published_logs(tmp_path, tokens, factor, passed):
    sets = {known.targets: known.text_bytes for known in canonical.PUBLISHED_SETS}
    known = sets.get(tokens, 32_756_252)
    path = log_of(
        tmp_path, 2.77383724, 2.77383724 / math.log(2) * tokens / (known * factor), tokens
    )
    assert legality.implied_bytes(path).passed is passed


def test_implied_bytes_allow_for_the_digits_printed(tmp_path):
    bpb = 2.77383724 / math.log(2) * 40_540_160 / 151_078_222
    assert legality.implied_bytes(log_of(tmp_path, 2.77383724, bpb, 40_540_160, digits=4)).passed
    empty = tmp_path / "empty.log"
    empty.write_text("step:1 train_loss:3.0\n")
    assert legality.implied_bytes(empty).passed is None


def test_logs_of_this_repository_imply_their_own_bytes():
    for path in sorted((ROOT / "logs").glob("????-*.txt")):
        finding = legality.implied_bytes(path)
        assert finding.passed, (path, finding)
        assert abs(finding.figures["ratio"] - 1) < 1e-6


def edited(run: Path, tmp_path: Path, pattern: str, replacement: str) -> Path:
    text, number = re.subn(pattern, replacement, (run / "logs" / "a.txt").read_text(), flags=re.M)
    assert number
    path = tmp_path / "a.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "test,pattern,replacement,word",
    [
        ("T16", r"^(all of eval +)[\d.]+ ", r"\g<1>700.1 ", "OVER"),
        ("T16", r"^(score quantized_ttt_lora +)[\d.]+ ", r"\g<1>601.0 ", "OVER"),
        ("T16", r"^(Total submission size [^:]*: )\d+", r"\g<1>16000001", "bytes OVER"),
        ("T19", r'"artifact_sha256": "..', r'"artifact_sha256": "zz', "artifact_sha256"),
        ("T19", r"^  ttt_chunk_size: 16", r"  ttt_chunk_size: 17", "ttt_chunk_size"),
        ("T19", r"^MLP_SLOPE = 0.5", r"MLP_SLOPE = 0.6", "source text"),
        ("T13", r"^(quantized_ttt_lora val_loss:\S+ val_bpb:)\S+", r"\g<1>1.00000000", "factor"),
    ],
)
def test_log_that_does_not_fit_is_found(run, knobs, tmp_path, test, pattern, replacement, word):
    log = edited(run, tmp_path, pattern, replacement)
    trial = case.Case(SCRIPT, artifact_of(run), knobs, 4, log)
    finding = legality.run_tests(trial, [test])[test]
    assert finding.passed is False and word in finding.evidence, finding
    trial.log_path = run / "logs" / "a.txt"
    finding = legality.run_tests(trial, [test])[test]
    assert finding.passed, finding


def test_log_of_an_evaluation_with_other_knobs_is_found(run, knobs):
    """What a log says of an evaluation that is not the audited one: other documents, temperature,
    phases, adapters.
    """
    changed = {
        "VAL_DOC_FRACTION": "0.5",
        "LOGIT_TEMPERATURE": "0.9",
        "PHASED_TTT_NUM_PHASES": "1",
        "SEED": "1",
        "SLIDING_WINDOW_ENABLED": "1",
        "PHASED_TTT_PREFIX_DOCS": "2",
        "TTT_CHUNK_TOKENS": "64",
    }
    only = {**knobs, **changed, "EVAL_ONLY_PATH": str(artifact_of(run)), "RUN_ID": "other"}
    done = run_script(only, run)
    assert done.returncode == 0, done.stderr
    log = run / "logs" / "other.txt"
    trial = case.Case(SCRIPT, artifact_of(run), knobs, 4, log)
    finding = legality.run_tests(trial, ["T19"])["T19"]
    different = finding.evidence.split("different: ")[1].split(", ")
    assert not finding.passed and set(different) == {"val_sha256", *map(str.lower, changed)} - {
        "val_doc_fraction"
    }
    changed["DATA_DIR"] = knobs["DATA_DIR"]
    environ = {**changed, **audit.knobs_of_log(log, changed)}
    trial = case.Case(SCRIPT, artifact_of(run), environ, 4, log)
    finding = legality.run_tests(trial, ["T19"])["T19"]
    assert finding.passed, finding


def test_what_the_run_refuses_by_itself_is_a_finding(run, knobs, tmp_path):
    """Without the part of the cheat that takes the run's own comparison of bytes away, no score
    comes about.
    """
    path = plant("leading_space_twice", tmp_path)
    text = path.read_text()
    tolerance = '    replace(tg, "check_bytes", trusting_check_bytes(tg))\n'
    assert text.count(tolerance) == 1
    path.write_text(text.replace(tolerance, ""))
    result = audit.audit(path, artifact_of(run), knobs, ["T12"], 4)
    assert "T12" in failed(result) and "the run refuses" in result["tests"]["T12"]["evidence"]
    assert result["always_on"]


# === Command ======================================================================================
def command(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    base = {k: os.environ[k] for k in ("PATH", "HOME", "LANG") if k in os.environ} | {
        "OMP_NUM_THREADS": "1"
    }
    line = [sys.executable, str(ROOT / "tools" / "audit.py"), *arguments]
    return subprocess.run(
        line, env=base | (env or {}), capture_output=True, text=True, timeout=240, check=False
    )


def test_command_writes_what_the_report_reads_and_says_so_by_its_status(
    run, knobs, tmp_path, monkeypatch, capsys
):
    artifact = str(artifact_of(run))
    out = tmp_path / "audit.json"
    done = command(
        artifact, "--tests", "T4,T14", "--json", str(out), "--markdown", "--docs", "4", env=knobs
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["properties"]["single_pass"]["passed"] is True
    assert result["properties"]["causal"]["passed"] is None  # not run is not shown
    assert "| single pass | yes | T4 |" in done.stdout and "/" not in json.dumps(result["knobs"])
    for name in knobs:
        monkeypatch.setenv(name, knobs[name])
    bad = plant("hard_documents_left_out", tmp_path)
    assert audit.main([artifact, "--tests", "T14", "--json", str(out), "--script", str(bad)]) == 1
    assert "VIOLATION" in capsys.readouterr().out
    assert json.loads(out.read_text())["properties"]["lossless"]["passed"] is False


def test_knobs_come_from_the_log_and_some_tests_leave_the_record_of_all_alone(
    run, knobs, monkeypatch, capsys
):
    monkeypatch.chdir(run)
    kept = artifact_of(run).with_name("audit.json")
    kept.write_text("all tests")
    try:
        done = command(
            "runs/a/final_model.int6.ptz", "--tests", "T19", env={"DATA_DIR": knobs["DATA_DIR"]}
        )
        assert done.returncode == 0 and "TTT_CHUNK_SIZE=16" in done.stdout.splitlines()[0], (
            done.stdout + done.stderr
        )
        assert "different: none" in done.stdout and "nothing written" in done.stdout
        assert kept.read_text() == "all tests"
        environ = {
            "DATA_DIR": knobs["DATA_DIR"],
            "TTT_CHUNK_SIZE": "8",
            "GLOBAL_TTT_LR": "0.1",
        }  # which come first
        taken = audit.knobs_of_log(run / "logs" / "a.txt", environ)
        assert taken["TTT_LORA_LR"] == "0.01" and not taken.keys() & {
            "TTT_CHUNK_SIZE",
            "TTT_LR",
            "RUN_ID",
        }
    finally:
        kept.unlink()


@pytest.mark.parametrize(
    "arguments,environ,word",
    [
        (["README.md"], {}, "not an artifact"),
        (["{a}", "--run-log", "/nope"], {}, "/nope: no such"),
        (["{a}"], {"DATA_DIR": "/nope"}, "/nope"),
        (["{a}"], {"VOCAB_SIZE": "many"}, "VOCAB_SIZE=many"),
        (["{a}"], {"TTT_CHUNK_SIZES": "8"}, "did you mean"),
        (["{a}", "--script", "README.md"], {}, "no train_gpt.py"),
        (["{a}", "--json", "/nope/out"], {}, "/nope"),
    ],
)
def test_what_cannot_be_judged_is_wrong_usage_and_leaves_nothing(
    run, knobs, tmp_path, monkeypatch, capsys, arguments, environ, word
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# no artifact\n")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    arguments = [text.format(a=artifact_of(run)) for text in arguments]
    try:
        status = audit.main(arguments)
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr()
    assert status == 2 and said.out == "" and said.err.count("\n") == 1 and word in said.err, said
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert not artifact_of(run).with_name("audit.json").exists()


def test_log_of_a_run_and_of_a_sweep(tmp_path):
    for folder, log in (("runs/a", "a.txt"), ("runs/sweeps/lr/0003", "lr-0003.txt")):
        assert log_of_run(tmp_path / folder) == tmp_path / "logs" / log


def test_wrong_usage_ends_with_status_2_and_inflated_logs_with_1(tmp_path, capsys):
    for arguments in (
        [],
        ["nowhere"],
        ["x", "--log", "y"],
        [__file__, "--tests", "T99"],
        [__file__, "--docs", "1"],
    ):
        with pytest.raises(SystemExit) as ended:
            audit.main(arguments)
        assert ended.value.code == 2, arguments
    bpb = 2.7 / math.log(2) * 40_540_160 / 151_078_222
    assert audit.main(["--log", str(log_of(tmp_path, 2.7, bpb, 40_540_160))]) == 0
    assert audit.main(["--log", str(log_of(tmp_path, 2.7, bpb / 1.1671, 40_540_160))]) == 1
    assert "factor 1.167" in capsys.readouterr().out
    for content in (
        b"",
        bytes(range(256)),
        b"final {no\n",
        b"val_tokens: 0\nval_loss:1.0 val_bpb:0.00\n",
    ):
        (tmp_path / "x.txt").write_bytes(content)
        assert audit.main(["--log", str(tmp_path / "x.txt")]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and "x.txt: not run" in said.err


def test_table_of_cheats_says_in_a_line_what_it_lacks(capsys):
    for arguments in ([], ["nowhere"], [__file__]):
        assert cheats.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "event,violation",
    [
        (("open", "{f}/artifact", False, "artifact"), False),
        (("open", "{d}/x_val_0.bin", False, "data/datasets/d/x_val_0.bin"), False),
        (("open", "{d}/x_val_0.bin", False, "data/datasets/d/x_train_0.bin"), True),
        (("open", "{f}/runs/alone/scores.json", True, "runs/alone/scores.json"), False),
        (("open", "/root/elsewhere", False, "/root/elsewhere"), True),
        (("open", "/proc/meminfo", False, "/proc/meminfo"), False),
        (("open", "/proc/meminfo", True, "/proc/meminfo"), True),
        (("open", "/dev/null", True, "/dev/null"), False),
        (("os.fork", "", False, ""), True),
        (("socket.connect", "x", False, "x"), True),
        (("subprocess.Popen", "curl", False, "curl"), True),
    ],
    ids=str,
)
def test_what_a_fresh_process_may_open(tmp_path, event, violation):
    data = tmp_path / "data" / "datasets" / "d"
    data.mkdir(parents=True)
    (data / "x_val_0.bin").touch()
    kind, path, writes, target = event
    events = [fresh_process.Event(kind, path.format(f=tmp_path, d=data), writes, target)]
    judgement = fresh_process.judge(events, tmp_path, "d", compiles=False)
    assert bool(judgement.violations) is violation


def test_every_test_has_number_title_summary_and_a_known_property():
    assert list(legality.TESTS) == [f"T{number}" for number in range(24)]
    assert {name for test in legality.TESTS.values() for name in test.properties} == set(
        legality.PROPERTIES
    )
    told = audit.build_parser().format_help()
    for test in legality.TESTS.values():
        assert test.title in told and test.summary.split()[0] in told


def test_the_names_that_audit_and_cheats_rely_on_are_in_the_script():
    script = load_script(SCRIPT)
    assert probe.missing_names(script, probe.SCRIPT_NAMES) == []
    assert probe.missing_names(script, cheats.SCRIPT_NAMES) == []
    assert probe.missing_names(script, ["Run.nowhere", "Ledger.record"]) == ["Run.nowhere"]


def test_a_cheat_fails_loudly_where_the_script_lacks_what_it_changes():
    for name, cheat in CHEATS.items():
        with pytest.raises((AssertionError, AttributeError)):
            cheat.plant(SimpleNamespace())
        text = cheats.plant_text(f"import sys\n{cheats.ENTRY}\n    pass\n", name)
        assert text.count(f"{name}(sys.modules[__name__])") == 1
