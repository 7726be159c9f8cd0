"""Logs that were edited: what their lines, the program and the documents beside them show."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import audit
import claims
import commitment
import edits
import report
import runlog
from digests import sha256
from packed_code import text_to_pack

import train_gpt as tg

pytest.importorskip("rich")
TABLE = """\
phase                               seconds  counts against
train                                 108.5  train
score quantized                        13.2  eval
score quantized_ttt_lora              182.6  eval
all of train                          108.5  of 125
all of eval                           195.8  of 600"""
SECONDS = {"train": 108.509, "score quantized": 13.204, "score quantized_ttt_lora": 182.558}


def documents() -> dict[str, np.ndarray]:
    """The records of three documents."""
    return {
        "doc_nats": np.array([300.0, 200.0, 100.0]),
        "doc_bytes": np.array([200, 150, 50]),
        "doc_tokens": np.array([80, 60, 30]),
    }


def figures(**changes: object) -> dict:
    """A final line of this program whose score is that of `documents`."""
    found = commitment.totals(documents())
    score = {"quantized_ttt_lora_loss": found.loss, "quantized_ttt_lora_bpb": found.bpb}
    return {
        "run_id": "a",
        "preset": "cpu",
        "seed": 1337,
        "code_sha256": tg.CODE_SHA256,
        "file_sha256": tg.CODE_SHA256,
        "code_bytes": 474509,
        "model_bytes": 1594341,
        "artifact_bytes": 2068850,
        "val_docs": found.documents,
        "val_tokens": found.tokens,
        "val_bytes": found.bytes,
        "val_loss": found.loss,
        "val_bpb": found.bpb,
        **score,
        "documents_sha256": commitment.root(documents()),
        "seconds": SECONDS,
        **changes,
    }


def log_text(source: str = tg.TEXT, **changes: object) -> str:
    """The log of an honest run of this program, as it prints one."""
    final = figures(**changes)
    config, origin = tg.Config.from_env({"PRESET": "cpu"}, has_cuda=False)
    settings = [
        f"  {name}: {value} ({origin[name]})"
        for name, value in sorted(dataclasses.asdict(config).items())
    ]
    score = f"val_loss:{final['val_loss']:.8f} val_bpb:{final['val_bpb']:.8f}"
    lines = [
        f"{source}\nHyperparameters:",
        *settings,
        *(f"{name}: {final[name]}" for name in ("run_id", "preset", "seed", "code_sha256")),
        f"file_sha256: {final['file_sha256']}",
        "Code size (uncompressed): 474509 bytes; model 1594341, its codes' entropy 1735018",
        "Total submission size quantized+ans: 2068850 bytes",
        f"quantized_ttt_lora {score} eval_time:182558ms",
        TABLE,
        "size      2,068,850 of 16,000,000 bytes (12.9 %)",
        "final " + json.dumps(final, sort_keys=True),
    ]
    return "\n".join(lines) + "\n"


def save(folder: Path, text: str) -> Path:
    """The log of a run in a folder, with its documents in the run's folder beside it."""
    path = folder / "logs" / "a.txt"
    path.parent.mkdir()
    path.write_text(text)
    (folder / "runs" / "a").mkdir(parents=True, exist_ok=True)
    np.savez(folder / "runs" / "a" / "documents.npz", **documents())
    return path


def problems(folder: Path, text: str) -> list[str]:
    """What is wrong with a log, if report.py and audit.py agree with it."""
    path = save(folder, text)
    found = claims.score_problems(runlog.read_run(path))
    assert report.main([str(path), "--json", str(folder / "out.json")]) == int(bool(found))
    assert audit.main(["--log", str(path)]) == int(bool(found))
    return found


def test_an_honest_log_contradicts_nothing(tmp_path) -> None:
    assert problems(tmp_path, log_text()) == []


def test_other_line_ends_are_no_edit_and_hide_none(tmp_path) -> None:
    path = save(tmp_path, "")
    path.write_bytes(log_text().replace("\n", "\r\n").encode())
    assert claims.score_problems(runlog.read_run(path)) == []
    edited = log_text(tg.TEXT.replace("NUM_BANDS = 64", "NUM_BANDS = 63"))
    path.write_bytes(edited.replace("\n", "\r\n").encode())
    (found,) = claims.score_problems(runlog.read_run(path))
    assert found.startswith("the source text in the log has the SHA-256")


def test_the_committed_logs_contradict_nothing() -> None:
    paths = [*ROOT.glob("logs/*.txt"), *ROOT.glob("logs/compare/*.txt")]
    for path in paths:
        (run,) = runlog.read_runs(path)
        assert edits.edits_of_run(run) == [], path


@pytest.mark.parametrize(
    "pattern,replacement,values",
    [
        (r'"artifact_bytes": 2068850', '"artifact_bytes": 1968850', ("1968850", "2068850")),
        (r"^(Total submission .*): 2068850", r"\1: 1968850", ("1968850", "2068850")),
        (r"^size +2,0", "size      1,9", ("1968850", "2068850")),
        (r"model 1594341", "model 1494341", ("1494341", "1594341")),
        (r"^all of eval +195.8", "all of eval                            95.8", ("95.8", "195.8")),
        (r"^(score quantized_ttt_lora +)182.6", r"\g<1>82.6", ("182.558", "82.6")),
        (r'"train": 108.509', '"train": 98.509', ("98.509", "108.5")),
        (r"^seed: 1337", "seed: 42", ("1337", "42")),
        (r"(quantized_ttt_lora val_loss:\S+ val_bpb:)2", r"\g<1>1", ("2.16", "1.16")),
        (r"^code_sha256: .{8}", "code_sha256: 00000000", (tg.CODE_SHA256[:8], "00000000")),
    ],
)
def test_a_figure_that_was_edited_in_one_place_is_named_with_both_values(
    tmp_path, capsys, pattern: str, replacement: str, values: tuple[str, str]
) -> None:
    text, number = re.subn(pattern, replacement, log_text(), flags=re.MULTILINE)
    assert number == 1
    found = problems(tmp_path, text)
    assert any(all(value in problem for value in values) for problem in found), found
    said = capsys.readouterr().out
    assert "VIOLATION" in said and all(value in said for value in values)


def test_an_edited_source_is_told_with_both_hashes(tmp_path, capsys) -> None:
    text = log_text().replace("LIMIT_BYTES = 16_000_000", "LIMIT_BYTES = 17_000_000", 1)
    (found,) = problems(tmp_path, text)
    source = runlog.source_at_head(text.encode())
    assert sha256(source)[:8] in found and tg.CODE_SHA256[:8] in found
    assert found in capsys.readouterr().out


def test_the_text_of_a_packed_file_is_the_program_of_its_readable_source(tmp_path) -> None:
    text = text_to_pack(tg.TEXT.encode())
    log = log_text(text, file_sha256="1" * 64)
    (tmp_path / "edited").mkdir()
    assert problems(tmp_path, log) == []
    edited = log.replace("LIMIT_BYTES=16000000", "LIMIT_BYTES=17000000", 1)
    edited = edited if edited != log else log.replace("16_000_000", "17_000_000", 1)
    assert edited != log
    (found,) = problems(tmp_path / "edited", edited)
    assert "not the program" in found and tg.CODE_SHA256[:8] in found


def test_a_value_that_is_not_the_presets_is_told_with_the_presets(tmp_path) -> None:
    text = log_text().replace("  num_layers: 6 (preset)", "  num_layers: 11 (default)")
    (found,) = problems(tmp_path, text)
    assert "num_layers is 11 (default)" in found and "6 (preset) with PRESET=cpu" in found


def test_a_value_from_the_environment_is_no_edit(tmp_path) -> None:
    text = log_text().replace("  num_layers: 6 (preset)", "  num_layers: 11 (env)")
    assert problems(tmp_path, text) == []


def test_the_presets_of_another_program_are_not_known(tmp_path) -> None:
    other = tg.TEXT + "\n# another\n"
    text = log_text(other, code_sha256=sha256(other.encode()), file_sha256=sha256(other.encode()))
    assert problems(tmp_path, text.replace("num_layers: 6 (p", "num_layers: 11 (p")) == []


def test_a_score_that_is_not_that_of_the_committed_documents_is_invalid(tmp_path, capsys) -> None:
    found = commitment.totals(documents())
    better = {"val_loss": found.loss * 0.9, "val_bpb": found.bpb * 0.9}
    better |= {"quantized_ttt_lora_loss": found.loss * 0.9}
    better |= {"quantized_ttt_lora_bpb": found.bpb * 0.9}
    said = problems(tmp_path, log_text(**better))
    (bpb,) = [problem for problem in said if problem.startswith("val_bpb")]
    assert str(found.bpb) in bpb and "documents.npz" in bpb
    assert "VIOLATION" in capsys.readouterr().out


def test_documents_to_which_the_log_does_not_commit_prove_nothing(tmp_path) -> None:
    changes = {"documents_sha256": "0" * 64}
    assert problems(tmp_path, log_text(**changes)) == []


@pytest.mark.parametrize("more", [0, 1])
def test_a_size_that_is_not_that_of_the_artifact_it_names_is_invalid(tmp_path, more) -> None:
    content = b"P" * (1594341 + more)
    text = log_text(artifact_sha256=hashlib.sha256(content).hexdigest())
    artifact = tmp_path / "runs" / "a" / "final_model.int6.ptz"
    artifact.parent.mkdir(parents=True)
    artifact.write_bytes(content)
    found = claims.score_problems(runlog.read_run(save(tmp_path, text)))
    told = f"model_bytes is 1594341 in the log, but {artifact}, which it names, has 1594342 bytes"
    assert found == [told] * more


def test_another_artifact_than_the_logs_says_nothing_about_its_size(tmp_path) -> None:
    path = save(tmp_path, log_text(artifact_sha256="0" * 64))
    (tmp_path / "runs" / "a" / "final_model.int6.ptz").write_bytes(b"another")
    assert claims.score_problems(runlog.read_run(path)) == []
