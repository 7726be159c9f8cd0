"""Faults met by the tools: odd files, and figures of odd types, end in a line and no traceback."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from test_faults import ODD, SHARDS, WRONG
from test_report import FIGURES, ours

sys.path.insert(0, str(ROOT / "tools"))
import audit
import pack
import prepare_data
import report
import run_documents
import runlog
import submission
import sweep

import train_gpt as tg

ODD_FILES = {name: put for name, put in ODD.items() if name != "empty"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder. Nothing here may wait: an alarm ends a test that does."""
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def status_of(main: Callable[[list[str]], int], *words: str) -> int:
    """The exit status of a program."""
    try:
        return main([*map(str, words)])
    except SystemExit as end:
        return end.code


def must_refuse(capsys, main: Callable[[list[str]], int], name: str, *words: str) -> None:
    """Demands status 2 and one printable line that names the file."""
    assert status_of(main, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line and line.isprintable()


@pytest.mark.parametrize("odd", ODD_FILES)
def test_no_reader_of_logs_waits_for_what_is_no_file(folder, capsys, odd):
    ODD_FILES[odd](folder / "odd.txt")
    must_refuse(capsys, report.main, "odd.txt", "odd.txt")
    must_refuse(capsys, audit.main, "odd.txt", "--log", "odd.txt")


@pytest.mark.parametrize("odd", ODD_FILES)
@pytest.mark.parametrize("name", ["tiny_val_000000.bin", "manifest.json"])
def test_the_doctor_does_not_wait_for_what_is_no_file(folder, tiny_data, capsys, name, odd):
    shutil.copytree(tiny_data, "data")
    (folder / SHARDS / name).unlink()
    ODD_FILES[odd](folder / SHARDS / name)
    must_refuse(capsys, prepare_data.main, name, "doctor", SHARDS, "--workers", "1")


@pytest.mark.parametrize("odd", ODD_FILES)
def test_preparing_does_not_wait_for_what_is_no_file(folder, capsys, odd):
    ODD_FILES[odd](folder / "odd.jsonl")
    must_refuse(capsys, prepare_data.main, "odd.jsonl", "text", "odd.jsonl")
    (folder / "good.jsonl").write_text('{"text": "a"}\n' * 3)
    ODD_FILES[odd](folder / "odd.model")
    words = ("text", "good.jsonl", "--tokenizer", "odd.model")
    must_refuse(capsys, prepare_data.main, "odd.model", *words)


@pytest.mark.parametrize("name", ["odd.jsonl", "odd.txt"])
def test_preparing_does_not_read_a_file_of_a_terabyte_whole(folder, capsys, monkeypatch, name):
    monkeypatch.setattr(prepare_data, "MAX_TEXT_BYTES", 1 << 20)
    (folder / name).touch()
    os.truncate(folder / name, 2**40)
    must_refuse(capsys, prepare_data.main, f"{name}:1 is longer than 1,048,576", "text", name)


def test_preparing_a_line_that_is_nested_deeply_names_it(folder, capsys):
    (folder / "odd.jsonl").write_text("[" * 100_000)
    must_refuse(capsys, prepare_data.main, "odd.jsonl:1 is nested", "text", "odd.jsonl")


def test_an_empty_tokenizer_is_none(folder, tiny_data, capsys):
    """SentencePiece would say nothing, and know no piece."""
    (folder / "empty.model").touch()
    (folder / "good.jsonl").write_text('{"text": "a"}\n' * 3)
    words = ("text", "good.jsonl", "--tokenizer", "empty.model")
    must_refuse(capsys, prepare_data.main, "empty.model is not a SentencePiece model", *words)
    shutil.copytree(tiny_data, "data")
    (model,) = Path("data/tokenizers").glob("*.model")
    model.write_bytes(b"")
    assert status_of(prepare_data.main, "doctor", SHARDS, "--workers", "1") != 0
    assert "no SentencePiece model" in "".join(capsys.readouterr())


@pytest.mark.parametrize("odd", ODD_FILES)
def test_packing_does_not_wait_for_what_is_no_file(folder, capsys, odd):
    (folder / "run").mkdir()
    ODD_FILES[odd](folder / "odd.txt")
    must_refuse(capsys, pack.main, "odd.txt", "run", "out", "--log", "odd.txt")
    ODD_FILES[odd](folder / "odd.py")
    must_refuse(capsys, pack.main, "odd.py", "--code", "out.py", "--source", "odd.py")


def test_figures_of_every_type_are_read_or_left_out_in_one_line(folder, capsys):
    """A sample of all pairs of figure and value; the rest differ in nothing."""
    (path,) = ours(folder, {})
    text = Path(path).read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("final {")]
    figures = json.loads(line.removeprefix("final "))
    pairs = [(name, odd) for name in figures for odd in WRONG]
    for name, odd in random.Random(24).sample(pairs, 60):
        changed = json.dumps({**figures, name: "MARK"}).replace('"MARK"', WRONG[odd])
        Path(path).write_text(text.replace(line, f"final {changed}"))
        statuses = (status_of(report.main, path), status_of(audit.main, "--log", path))
        assert set(statuses) <= {0, 1, 2}, (name, odd)
        assert all(line.isprintable() for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("name", ["val_bpb", "val_loss", "seed", "steps", "seconds", "run_id"])
@pytest.mark.parametrize("odd", ["true", "NaN", "-1", "[]", '"\\u001b"'])
def test_a_figure_of_another_type_is_named(name, odd):
    line = "final " + json.dumps({**FIGURES, name: "MARK"}).replace('"MARK"', odd)
    if (name, odd) in {("val_bpb", "-1"), ("val_loss", "-1")}:
        assert runlog.read_final(line)[name] == -1
        return
    with pytest.raises(runlog.LogError, match=f"{name} must be"):
        runlog.read_final(line)
    assert runlog.final_lines(line) == []


@pytest.mark.parametrize("key", ["passed", "evidence"])
@pytest.mark.parametrize("odd", ["[]", "{}", "5e400", '"\\u001b"', "NaN"])
def test_an_audit_of_another_type_is_refused(folder, key, odd):
    text = json.dumps({"properties": {"causal": {key: "MARK"}}}).replace('"MARK"', odd)
    (folder / "audit.json").write_text(text)
    with pytest.raises(tg.UsageError, match=f"^audit.json: properties.'causal'.{key} must be"):
        submission.read_audit(Path("audit.json"))


ODD_ARRAYS = {
    "another shape": {"doc_nats": np.ones((2, 2)), "doc_bytes": np.ones(2)},
    "another length": {"doc_nats": np.ones(3), "doc_bytes": np.ones(2)},
    "texts": {"doc_nats": np.array(["a"]), "doc_bytes": np.ones(1)},
    "NaN": {"doc_nats": np.array([np.nan]), "doc_bytes": np.ones(1)},
    "objects": {"doc_nats": np.array([{}], dtype=object)},
}


@pytest.mark.parametrize("odd", ODD_ARRAYS)
def test_arrays_of_another_kind_are_refused(folder, odd):
    np.savez("documents.npz", **ODD_ARRAYS[odd])
    with pytest.raises(tg.UsageError, match=r"^documents.npz: .*: cannot be read$"):
        run_documents.load_arrays(Path("documents.npz"))


def test_an_archive_that_unpacks_to_more_than_it_holds_is_refused(folder, monkeypatch):
    np.savez_compressed("documents.npz", doc_nats=np.zeros(100_000))
    monkeypatch.setattr(run_documents, "MAX_ARRAYS_BYTES", 10_000)
    assert os.path.getsize("documents.npz") < 10_000
    with pytest.raises(tg.UsageError, match="too large"):
        run_documents.load_arrays(Path("documents.npz"))


def test_a_sweep_whose_database_cannot_be_written_ends_in_a_line(folder, monkeypatch, capsys):
    optuna = pytest.importorskip("optuna")
    error = optuna.exceptions.StorageInternalError("An exception is raised")
    error.__cause__ = OSError("(sqlite3.OperationalError) database or disk is full\n[SQL: INSERT]")

    def go(_: object) -> None:
        raise error

    url = SimpleNamespace(render_as_string=lambda: "sqlite:///full.db")
    study = SimpleNamespace(optuna=optuna, url=url, name_of_settings="full-settings")
    full = SimpleNamespace(study=study, go=go, leave=signal.SIG_DFL, total=lambda: 1)
    monkeypatch.setattr(sweep, "prepare", lambda args, view: full)
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    assert sweep.main(["full", "SEED=1"]) == 1
    wanted = "(sqlite3.OperationalError) database or disk is full; the same command goes on"
    assert capsys.readouterr().err == f"sweep.py: sqlite:///full.db: {wanted}\n"
