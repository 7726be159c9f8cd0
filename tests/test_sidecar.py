"""CaseOps data in use: train_gpt.py divides by the bytes of the side-car and of nothing else, the
doctor names every planted fault, and the audit proves the bytes.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import (
    CASEOPS_TEXTS,
    ROOT,
    TINY,
    final_line,
    opened,
    published_caseops_model,
    run_script,
    tiny_config,
    write_caseops_data,
)
from test_data import refused
from test_run import start_ranks

sys.path.insert(0, str(ROOT / "tools"))
import audit
import canonical
import caseops
import digests
import prepare_data
import sidecar

import train_gpt as tg

NAME = "tiny_sp320_caseops"
NUM_VAL = 15
VAL = "tiny_val_000000.bin"
SIDECAR = "tiny_val_bytes_000000.bin"
TRAIN = "tiny_train_000000.bin"
VAL_BYTES = [len(text.encode()) for text in CASEOPS_TEXTS[:NUM_VAL]]


@pytest.fixture(scope="session")
def published_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same texts in the published tokenizer's pieces: `tiny_sp8192_caseops`."""
    root = tmp_path_factory.mktemp("published")
    return write_caseops_data(root, "--tokenizer", str(published_caseops_model()))


@pytest.fixture
def folder(caseops_data: Path, tmp_path: Path) -> Path:
    """The folder of a copy of the data set."""
    return shutil.copytree(caseops_data, tmp_path / "data") / "datasets" / NAME


@pytest.fixture
def published_folder(published_data: Path, tmp_path: Path) -> Path:
    """The folder of a copy of the data set in published pieces."""
    root = shutil.copytree(published_data, tmp_path / "published")
    return root / "datasets" / "tiny_sp8192_caseops"


def config(folder: Path, **changes: Any) -> tg.Config:
    """The tiny network on a data set."""
    sizes = {"tiny_sp8192_caseops": 8192}
    return tiny_config(
        data_dir=folder.parent.parent,
        dataset=folder.name,
        vocab_size=sizes.get(folder.name, 320),
        **changes,
    )


def load(folder: Path, **changes: Any) -> tg.Documents:
    """The validation documents, checked as a run checks them."""
    cfg = config(folder, **changes)
    return tg.Documents.load(opened(cfg)["val"], 1, cfg)


def change_shard(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Another shard or side-car in its place, and a manifest that agrees with it."""
    values = change(np.array(tg.read_shard(folder / name)).astype(np.int64))
    tg.write_shard(folder / name, values)
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["splits"].values():
        files = [*entry["files"], *entry.get("byte_files", [])]
        for file in files:
            file["sha256"] = digests.file_sha256(folder / file["name"])
            file["tokens"] = len(tg.read_shard(folder / file["name"]))
        entry["tokens"] = sum(file["tokens"] for file in entry["files"])
        counts = [tg.read_shard(folder / file["name"]) for file in entry.get("byte_files", [])]
        entry["bytes"] = int(sum(shard.sum(dtype=np.int64) for shard in counts))
        ids = [tg.read_shard(folder / file["name"]) for file in entry["files"]]
        entry["documents"] = int(sum((shard == 1).sum() for shard in ids))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def model_of(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer of a data set."""
    name = json.loads((folder / "manifest.json").read_text())["tokenizer"]["file"]
    path = folder.parent.parent / "tokenizers" / name
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def diagnose(folder: Path) -> dict[str, Any]:
    """The doctor's verdict."""
    status = prepare_data.main(["doctor", "--workers", "1", str(folder)])
    verdict = json.loads((folder / "doctor.json").read_text())
    assert status == (1 if verdict["errors"] else 0)
    return verdict


# --- train_gpt.py ---------------------------------------------------------------------------------
def test_bytes_of_targets_are_those_of_the_original_text(caseops_data):
    folder = caseops_data / "datasets" / NAME
    cfg = config(folder)
    docs = load(folder)
    tokenizer = tg.Tokenizer.load(cfg)
    table, total = tg.check_bytes(tokenizer, docs, tg.Ranks({}))
    # Without a table, nothing can be counted by one.
    assert table is None
    assert total == sum(VAL_BYTES)
    ledger = tg.Ledger(docs, table, torch.device("cpu"))
    assert ledger.by_document()["doc_bytes"].tolist() == VAL_BYTES
    for loader in ("documents", "rows"):
        drawn = load(folder, val_doc_fraction=0.5, data_loader=loader)
        ledger = tg.Ledger(drawn, None, torch.device("cpu"))
        sizes = ledger.by_document()["doc_bytes"].tolist()
        assert len(sizes) == 8
        assert set(sizes) <= set(VAL_BYTES)


def test_the_side_car_of_every_rank_s_documents_adds_up(caseops_data):
    folder = caseops_data / "datasets" / NAME
    docs = load(folder)
    tokenizer = tg.Tokenizer.load(config(folder))
    shares = []
    for rank in range(3):
        ranks = tg.Ranks({})
        ranks.rank, ranks.world_size = rank, 3
        shares.append(tg.check_bytes(tokenizer, docs, ranks)[1])
    assert sum(shares) == sum(VAL_BYTES) > max(shares) > 0


def test_both_files_know_the_same_operators():
    assert tg.CASE_OPERATORS == caseops.OPERATORS


def test_a_side_car_is_no_shard(caseops_data):
    folder = caseops_data / "datasets" / NAME
    assert [path.name for path in tg.shard_paths(folder, "val")] == [VAL]
    assert [path.name for path in tg.shard_paths(folder, "val_bytes")] == [SIDECAR]
    stream = tg.TokenStream(folder, "val")
    assert stream.size == stream.sidecar.size == len(tg.read_shard(folder / VAL))


def test_the_bytes_of_documents_without_a_side_car_still_come_from_the_table(tiny_data):
    cfg = tiny_config(data_dir=tiny_data)
    docs = tg.Documents.load(opened(cfg)["val"], 1, cfg)
    assert docs.bytes is None
    assert tg.check_bytes(tg.Tokenizer.load(cfg), docs, tg.Ranks({}))[0] is not None


def silent(tokens: np.ndarray) -> np.ndarray:
    """Where ids of a tokenizer of prepare_data.py are BOS, or an operator that is no text."""
    kinds = np.where((tokens >= 4) & (tokens <= 7), tokens - 3, 0)
    return (tokens == 1) | caseops.active_operators(kinds)


def ids_of(folder: Path) -> np.ndarray:
    """The validation ids."""
    (path,) = tg.shard_paths(folder, "val")
    return np.array(tg.read_shard(path)).astype(np.int64)


def remove_sidecar(folder: Path) -> None:
    """The data set as an export without side-car would be."""
    for path in folder.glob("*_bytes_*.bin"):
        path.unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["splits"].values():
        del entry["byte_files"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def by_table(folder: Path) -> None:
    """A side-car that counts the bytes of the transformed text."""
    table = tg.ByteTable.from_sentencepiece(model_of(folder))
    ids = ids_of(folder)
    counts = np.append(0, table.bytes_of(ids[:-1], ids[1:]))
    change_shard(folder, SIDECAR, lambda _: counts)


def change_counts(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable:
    """Plants a side-car that is a function of ids and counts."""

    def plant(folder: Path) -> None:
        ids = ids_of(folder)
        change_shard(folder, SIDECAR, lambda counts: change(ids, counts))

    return plant


def folded_counts(folder: Path) -> None:
    """A side-car with the bytes of the text after NFKC: the ligature is worth 2, not 3."""
    model = model_of(folder)
    counts = np.array(tg.read_shard(folder / SIDECAR)).astype(np.int64)
    ids = ids_of(folder)
    ligature = model.encode("\ufb01")[-1]
    counts[ids == ligature] -= 1
    change_shard(folder, SIDECAR, lambda _: counts)


def put(*ids: int) -> Callable[[Path], None]:
    """Plants ids after the first document's BOS, in the shard and zeros in the side-car."""

    def plant(folder: Path) -> None:
        change_shard(folder, VAL, lambda tokens: np.insert(tokens, 1, ids))
        change_shard(folder, SIDECAR, lambda counts: np.insert(counts, 1, [0] * len(ids)))

    return plant


def inside(folder: Path) -> None:
    """Moves a TITLE behind the first letter of its word."""
    model = model_of(folder)
    letters = [model.piece_to_id(letter) for letter in "aeot"]
    put(letters[0], 4, letters[1])(folder)
    # The letters bring bytes, so only the operator is wrong.
    change_shard(folder, SIDECAR, lambda counts: np.concatenate([[0, 1, 0, 1], counts[4:]]))


def other_ids(ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Counts of another tokenizer's ids: as many, and none where there are no bytes here."""
    has_none = silent(ids)
    own = counts[~has_none]
    counts[~has_none] = np.roll(own, 7)
    return counts


ONE_SHORT = change_counts(lambda ids, counts: counts[:-1])
SHIFTED = change_counts(lambda ids, counts: np.roll(counts, 1))
BOS_COUNTED = change_counts(lambda ids, counts: counts + (ids == 1))
OPERATOR_COUNTED = change_counts(
    lambda ids, counts: counts + (silent(ids) & (ids != 1)).astype(np.int64)
)


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (remove_sidecar, ["operators of CaseOps", "*_val_bytes_*.bin"]),
        (ONE_SHORT, [SIDECAR, "counts for"]),
        (SHIFTED, [SIDECAR, "which has none"]),
        (by_table, [SIDECAR, "counts 3 bytes", "which has none"]),
        (BOS_COUNTED, [SIDECAR, "counts 1 bytes for token 0"]),
        (OPERATOR_COUNTED, [SIDECAR, "counts 1 bytes"]),
    ],
    ids=["none", "one short", "shifted", "transformed", "bos", "operator"],
)
def test_a_side_car_that_cannot_be_right_is_refused_with_one_line(folder, plant, words):
    plant(folder)
    refused(lambda: opened(config(folder)), *words)


def test_a_side_car_with_other_bytes_than_the_manifest_is_refused(folder):
    counts = np.array(tg.read_shard(folder / SIDECAR))
    counts[-1] += 1
    tg.write_shard(folder / SIDECAR, counts)
    refused(lambda: opened(config(folder)), SIDECAR, sum(VAL_BYTES) + 1, sum(VAL_BYTES))


def test_without_its_side_car_a_run_ends_with_status_2_and_one_line(folder):
    remove_sidecar(folder)
    env = {**TINY, "DATA_DIR": str(folder.parent.parent), "DATASET": NAME}
    done = run_script(env, folder.parent.parent)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "operators of CaseOps" in line


def test_data_without_a_manifest_find_the_published_tokenizer(published_folder):
    (published_folder / "manifest.json").unlink()
    name = f"fineweb10B_{canonical.CASEOPS_SUFFIX}"
    folder = published_folder.rename(published_folder.with_name(name))
    cfg = tiny_config(data_dir=folder.parent.parent, dataset=name, vocab_size=8192)
    assert tg.Tokenizer.load(cfg).operator_ids() == [4, 5, 6, 7]
    assert diagnose(folder)["tokenizer"] == published_caseops_model().name


def test_blocks_of_documents_are_compared_like_all_of_them(caseops_data, monkeypatch):
    folder = caseops_data / "datasets" / NAME
    ids = ids_of(folder)
    counts = np.roll(np.array(tg.read_shard(folder / SIDECAR)).astype(np.int64), 1)
    ids[::7] = 4
    table = caseops.PieceTable.from_sentencepiece(model_of(folder))
    whole = sidecar.compare(ids, counts, 1, table, caseops.PUBLISHED)
    monkeypatch.setattr(sidecar, "BLOCK", 100)
    cut = sidecar.compare(ids, counts, 1, table, caseops.PUBLISHED)
    for one, other in zip(whole, cut, strict=True):
        assert np.array_equal(one, other)
    assert len(whole.misplaced) > 100 and len(whole.differing) > 100


# --- The doctor -----------------------------------------------------------------------------------
def test_clean_data_have_no_faults(caseops_data, published_data):
    for root, name in ((caseops_data, NAME), (published_data, "tiny_sp8192_caseops")):
        verdict = diagnose(root / "datasets" / name)
        assert verdict["errors"] == []
        assert all("duplicate" in warning for warning in verdict["warnings"])
        assert verdict["splits"]["val"]["bytes"] == sum(VAL_BYTES)


@pytest.mark.parametrize(
    ("plant", "check", "words"),
    [
        (remove_sidecar, "side-car", "counting by table makes them 9 % more"),
        (ONE_SHORT, "side-car", "counts for"),
        (SHIFTED, "side-car", "bytes for BOS or an operator"),
        (SHIFTED, "side-car", "is it that of other ids?"),
        (by_table, "side-car", "were the bytes of the transformed text counted?"),
        (folded_counts, "side-car", "other bytes than their text has"),
        (BOS_COUNTED, "side-car", "1 bytes for BOS or an operator"),
        (OPERATOR_COUNTED, "side-car", "1 bytes for BOS or an operator"),
        (change_counts(other_ids), "side-car", "is it that of other ids?"),
        (put(4, 8), "operators", "stands alone"),
        (inside, "operators", "inside a word"),
        (inside, "bytes", "side-car and decoded text disagree in 1 of 15"),
    ],
    ids=["none", "one short", "shifted", "shifted ids", "transformed", "folded", "bos", "operator"]
    + ["other", "lone", "inside", "inverted"],
)
def test_the_doctor_names_a_planted_fault(folder, plant, check, words):
    plant(folder)
    faults = [fault for fault in diagnose(folder)["faults"] if fault["level"] == "error"]
    assert any(fault["check"] == check and words in fault["text"] for fault in faults), faults


def test_the_doctor_names_bytes_counted_after_folding(published_folder):
    table = caseops.PieceTable.from_sentencepiece(model_of(published_folder))
    change_shard(published_folder, SIDECAR, lambda _: table.counts(ids_of(published_folder)))
    texts = [fault["text"] for fault in diagnose(published_folder)["faults"]]
    assert any("counted after NFKC and folding" in text for text in texts)


def test_another_original_than_the_manifest_s_is_named(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    texts = CASEOPS_TEXTS[:NUM_VAL]
    digest = caseops.split_digest(map(caseops.text_digest, texts))
    assert manifest["splits"]["val"]["text_sha256"] == digest
    # One letter in the other case, which changes neither ids nor bytes but for an operator.
    letter = model_of(folder).piece_to_id("t")
    tokens = ids_of(folder)
    at = int(np.flatnonzero(tokens == letter)[-1])
    change_shard(folder, VAL, lambda ids: np.concatenate([ids[:at], [letter + 1], ids[at + 1 :]]))
    checks = {fault["check"] for fault in diagnose(folder)["faults"]}
    assert "original text" in checks


def published_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data set under the published name, with its own totals for the published ones."""
    name = f"fineweb10B_{canonical.CASEOPS_SUFFIX}"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["dataset"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    tokens = len(ids_of(folder))
    monkeypatch.setitem(canonical.TOKEN_RANGES, canonical.CASEOPS_SUFFIX, (tokens, tokens))
    monkeypatch.setattr(canonical, "DOCUMENTS", NUM_VAL)
    monkeypatch.setattr(canonical, "CASEOPS_TEXT_BYTES", sum(VAL_BYTES))
    return folder.rename(folder.with_name(name))


def test_data_under_the_published_name_must_be_the_published(published_folder, monkeypatch):
    folder = published_by_name(published_folder, monkeypatch)
    assert diagnose(folder)["errors"] == []

    monkeypatch.setattr(canonical, "DOCUMENTS", 50_000)
    monkeypatch.setattr(canonical, "LEAKY_DOCUMENTS", NUM_VAL)
    monkeypatch.setattr(canonical, "TRAIN_SHARDS", 0)
    monkeypatch.setattr(canonical, "CASEOPS_TOKENIZER_SHA256", "another")
    monkeypatch.setattr(canonical, "CASEOPS_TEXT_BYTES", 151_080_645)
    tokens = canonical.CASEOPS_TOKENS
    monkeypatch.setitem(canonical.TOKEN_RANGES, canonical.CASEOPS_SUFFIX, (tokens, tokens))
    monkeypatch.setattr(canonical, "TRUNCATED_CASEOPS_TOKENS", len(ids_of(folder)))
    found = " | ".join(diagnose(folder)["errors"])
    for words in (
        f"{NUM_VAL} documents, published are 50000; such a build has the rest of them in training",
        "this file is known to be cut off",
        "1 training shards, published are 0",
        "published with these data was another",
        "published are 151080645",
    ):
        assert words in found


# --- A run and its audit --------------------------------------------------------------------------
RUN = {
    **TINY,
    "DATASET": NAME,
    "ITERATIONS": "3",
    "WARMUP_STEPS": "0",
    "TTT_ENABLED": "0",
    "SLIDING_WINDOW_ENABLED": "0",
    "RUN_ID": "a",
}


@pytest.fixture(scope="module")
def run(caseops_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short run on one rank."""
    folder = tmp_path_factory.mktemp("run")
    done = run_script({**RUN, "DATA_DIR": str(caseops_data)}, folder)
    assert done.returncode == 0, done.stderr
    assert "val_bytes: counted by the side-car" in done.stdout
    return folder


def test_the_score_is_nats_over_bytes_of_the_original(run):
    scores = np.load(run / "runs" / "a" / "documents.npz")
    bits = scores["doc_nats"].sum() / math.log(2)
    final = final_line((run / "logs" / "a.txt").read_text())
    assert final["val_bpb"] == pytest.approx(bits / sum(VAL_BYTES), rel=1e-12)
    assert final["val_bytes"] == sum(VAL_BYTES)
    assert scores["doc_bytes"].tolist() == VAL_BYTES


def test_two_ranks_score_the_same(run, caseops_data, tmp_path):
    artifact = str(run / "runs" / "a" / "final_model.int6.ptz")
    env = {**RUN, "DATA_DIR": str(caseops_data), "EVAL_ONLY_PATH": artifact}
    ranks = start_ranks(env, tmp_path, count=2)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr
    one = final_line((run / "logs" / "a.txt").read_text())
    two = final_line(ranks[0].stdout)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert two["val_bytes"] == one["val_bytes"]
    assert two["val_bpb"] == pytest.approx(one["val_bpb"], abs=1e-6)


def test_the_audit_proves_the_bytes(run, caseops_data):
    environ = {**RUN, "DATA_DIR": str(caseops_data)}
    tests = ["T4", "T12", "T13", "T14", "T18"]
    artifact = run / "runs" / "a" / "final_model.int6.ptz"
    log = run / "logs" / "a.txt"
    result = audit.audit(ROOT / "train_gpt.py", artifact, environ, tests, 6, log)
    found = {name: (test["passed"], test["evidence"]) for name, test in result["tests"].items()}
    assert all(passed for passed, _ in found.values()), found
    assert "the manifest's hash of the original text" in found["T12"][1]
    assert f"{sum(VAL_BYTES)} bytes of the original" in found["T14"][1]
