"""tools/prepare_data.py doctor: planted faults are found and named, clean data pass, a stale
verdict never counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece
from conftest import (
    ROOT,
    TINY,
    VOCAB,
    opened,
    run_script,
    tiny_config,
    tiny_text,
    train_tokenizer,
    write_dataset,
)

sys.path.insert(0, str(ROOT / "tools"))
import canonical
import doctor
import overlap
import prepare_data

import train_gpt as tg

BOS = 1
NAME = f"tiny_sp{VOCAB}"
VAL = "tiny_val_000000.bin"
FIRST = "tiny_train_000000.bin"
SECOND = "tiny_train_000001.bin"


@pytest.fixture
def root(tiny_data, tmp_path):
    """A DATA_DIR of one's own, its manifest with hashes as prepare_data.py writes them."""
    root = shutil.copytree(tiny_data, tmp_path / "data")
    alter_manifest(root, lambda m: [f.update(sha256=sha256(root, f["name"])) for f in files_of(m)])
    return root


def folder_of(root):
    return root / "datasets" / NAME


def sha256(root, name):
    return hashlib.sha256((folder_of(root) / name).read_bytes()).hexdigest()


def files_of(manifest):
    return [file for entry in manifest["splits"].values() for file in entry["files"]]


def alter_manifest(root, change):
    path = folder_of(root) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def alter_bytes(name, change):
    def plant(root):
        path = folder_of(root) / name
        path.write_bytes(change(path.read_bytes()))

    return plant


def alter_tokens(name, change):
    """Another shard in its place, and a manifest that agrees with it, so that only the content is
    wrong.
    """

    def plant(root):
        path = folder_of(root) / name
        tokens = change(np.array(tg.read_shard(path)))
        tg.write_shard(path, tokens)

        def agree(manifest):
            for entry in manifest["splits"].values():
                for file in entry["files"]:
                    if file["name"] == name:
                        file.update(tokens=len(tokens), sha256=sha256(root, name))
                shards = [tg.read_shard(folder_of(root) / file["name"]) for file in entry["files"]]
                flat = np.concatenate(shards)
                entry.update(tokens=len(flat), documents=int((flat == BOS).sum()))
                if flat.max() < VOCAB:
                    entry["bytes"] = table_of(root).count(np.append(BOS, flat))

        alter_manifest(root, agree)

    return plant


def tokenizer_of(root):
    return sentencepiece.SentencePieceProcessor(
        model_file=str(root / "tokenizers" / f"{NAME}.model")
    )


def table_of(root):
    return tg.ByteTable.from_sentencepiece(tokenizer_of(root))


def documents(tokens):
    """Whole documents of a shard: the last may go on in the next shard."""
    return np.split(tokens, np.flatnonzero(tokens == BOS)[1:])[:-1]


def examine(root, capsys, *options, status=None):
    """The verdict as --json prints it."""
    found = prepare_data.main(["doctor", str(folder_of(root)), "--json", *options])
    verdict = json.loads(capsys.readouterr().out)
    assert found == (1 if verdict["errors"] else 0) and status in (None, found), verdict
    return verdict


def drop_shard(root):
    """The first of two training shards is gone, and the manifest does not know it either."""
    (folder_of(root) / FIRST).unlink()

    def forget(manifest):
        entry = manifest["splits"]["train"]
        entry["files"] = entry["files"][1:]
        entry["tokens"] = entry["files"][0]["tokens"]

    alter_manifest(root, forget)


def swap_tokenizer(root):
    """Another tokenizer of the same size, and a manifest that agrees with it."""
    text = root / "other.txt"
    text.write_text(
        "\n".join(" ".join(t[::-1] for t in line.split()) for line in tiny_text(172, seed=2))
    )
    path = root / "tokenizers" / f"{NAME}.model"
    train_tokenizer(text, path.with_suffix(""))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    alter_manifest(root, lambda m: m["tokenizer"].update(sha256=digest))


def first_documents(root, name, number):
    return documents(np.array(tg.read_shard(folder_of(root) / name)))[:number]


def plant_val(share):
    """A validation document, or a share of it inside another one, into the training shard between
    two documents.
    """

    def plant(root):
        val = max(first_documents(root, VAL, 11), key=len)
        inner = (
            val
            if share == 1
            else np.concatenate([[BOS, 77, 78], val[20 : 20 + int(share * len(val))], [79]])
        )
        alter_tokens(
            FIRST, lambda t: np.concatenate([documents(t)[0], inner, t[len(documents(t)[0]) :]])
        )(root)

    return plant


def put(position, *ids):
    def change(tokens):
        tokens[position : position + len(ids)] = ids
        return tokens

    return alter_tokens(FIRST, change)


def header(at, value):
    return alter_bytes(
        SECOND,
        lambda data: data[:at] + int(value).to_bytes(4, "little", signed=True) + data[at + 4 :],
    )


def swap(data):
    return data[:1024] + np.frombuffer(data[1024:], "<u2").byteswap().tobytes()


def agree_hash(plant):
    def both(root):
        plant(root)
        alter_manifest(
            root, lambda m: [f.update(sha256=sha256(root, f["name"])) for f in files_of(m)]
        )

    return both


def copy_shard(root, name="tiny_train_000002.bin"):
    shutil.copy(folder_of(root) / FIRST, folder_of(root) / name)


def change_entry(split, **changes):
    return lambda root: alter_manifest(root, lambda m: m["splits"][split].update(changes))


class Planted(NamedTuple):
    """A fault and what the doctor must say about it."""

    plant: Callable[[Path], None]  # changes a DATA_DIR
    check: str
    file: str
    word: str  # of the text
    at: int | str | None = None  # token in the file, or the name of a place in validation
    level: str = "error"


FAULTS = {
    "magic": Planted(header(0, 20240521), "magic", SECOND, "20240521"),
    "version": Planted(header(4, 2), "version", SECOND, "2"),
    "cut": Planted(alter_bytes(VAL, lambda d: d[:-3]), "cut", VAL, "3 bytes"),
    "cut in the header": Planted(alter_bytes(VAL, lambda d: d[:700]), "cut", VAL, "700"),
    "excess": Planted(alter_bytes(VAL, lambda d: d + b"\0\0"), "excess", VAL, "2 bytes"),
    "no tokens": Planted(
        alter_bytes(VAL, lambda d: d[:8] + bytes(4) + d[12:1024]), "header", VAL, "0 tokens"
    ),
    "header in the other byte order": Planted(
        alter_bytes(VAL, lambda d: np.frombuffer(d[:1024], "<i4").byteswap().tobytes() + d[1024:]),
        "byte order",
        VAL,
        "swapped",
    ),
    "ids in the other byte order": Planted(
        alter_bytes(FIRST, swap), "byte order", FIRST, "swapped", at=1
    ),
    "id out of range": Planted(put(40, VOCAB), "id range", FIRST, str(VOCAB), at=40),
    "no BOS at the start": Planted(put(0, 50), "no BOS", FIRST, "begin", at=0),
    "empty document": Planted(
        alter_tokens(FIRST, lambda t: np.insert(t, 0, BOS)), "empty document", FIRST, "1 in", at=0
    ),
    "control piece in a text": Planted(put(9, 2), "control id", FIRST, "control", at=9),
    "another tokenizer": Planted(swap_tokenizer, "round trip", VAL, "tokenizer", at=0),
    "tokenizer not the manifest's": Planted(
        lambda root: alter_manifest(root, lambda m: m["tokenizer"].update(sha256="0" * 64)),
        "tokenizer",
        f"{NAME}.model",
        "SHA-256",
    ),
    "no tokenizer": Planted(
        lambda root: (root / "tokenizers" / f"{NAME}.model").unlink(),
        "tokenizer",
        f"{NAME}.model",
        "no SentencePiece model",
    ),
    "document twice": Planted(
        alter_tokens(VAL, lambda t: np.concatenate([t, documents(t)[3]])),
        "duplicate document",
        VAL,
        "1 copies in 13 val",
        at="end",
        level="warning",
    ),
    "validation document in training": Planted(
        plant_val(1), "overlap", VAL, "1 of 12", at="longest"
    ),
    "part of one in training": Planted(
        plant_val(0.7), "overlap in part", VAL, "ids in a row", at="longest"
    ),
    "shard missing from the sequence": Planted(drop_shard, "missing shard", FIRST, "number 1"),
    "shard the manifest names is gone": Planted(
        lambda root: (folder_of(root) / SECOND).unlink(), "missing shard", SECOND, "manifest"
    ),
    "number taken twice": Planted(
        lambda root: copy_shard(root, "tiny_train_1.bin"),
        "name",
        "tiny_train_1.bin",
        f"number of {SECOND}",
    ),
    "shard of another data set": Planted(
        lambda root: copy_shard(root, "z_train_000002.bin"), "name", "z_train_000002.bin", "prefix"
    ),
    "split gone": Planted(
        lambda root: (folder_of(root) / VAL).unlink(), "missing split", NAME, "_val_"
    ),
    "shard twice": Planted(copy_shard, "shard twice", "tiny_train_000002.bin", FIRST),
    "shard the manifest does not know": Planted(
        copy_shard, "foreign shard", "tiny_train_000002.bin", "name"
    ),
    "manifest with another hash": Planted(
        lambda root: alter_manifest(
            root, lambda m: m["splits"]["train"]["files"][1].update(sha256="0" * 64)
        ),
        "manifest sha256",
        SECOND,
        "manifest",
    ),
    "manifest with other tokens": Planted(
        lambda root: alter_manifest(
            root, lambda m: m["splits"]["train"]["files"][1].update(tokens=5)
        ),
        "manifest tokens",
        SECOND,
        "5",
    ),
    "manifest with another sum": Planted(
        change_entry("train", tokens=6), "manifest tokens", "manifest.json", "6"
    ),
    "manifest with other bytes": Planted(
        change_entry("val", bytes=7), "manifest bytes", "manifest.json", "7"
    ),
    "manifest with other documents": Planted(
        change_entry("train", documents=8), "manifest documents", "manifest.json", "8"
    ),
    "manifest of another tool": Planted(
        lambda root: (folder_of(root) / "manifest.json").write_text('{"splits": 3}'),
        "manifest",
        "manifest.json",
        "prepare_data",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named_with_file_and_position(root, capsys, name):
    planted = FAULTS[name]
    clean = tg.read_shard(folder_of(root) / VAL).copy()
    planted.plant(root)
    docs = np.split(clean, np.flatnonzero(clean == BOS)[1:])
    longest = max(range(11), key=lambda i: len(docs[i]))
    places = {"end": len(clean), "longest": sum(map(len, docs[:longest]))}
    at = places.get(planted.at, planted.at)
    verdict = examine(root, capsys, status=1 if planted.level == "error" else 0)
    wanted = (planted.level, planted.check, planted.file, at)
    keys = ("level", "check", "file", "at")
    found = [fault for fault in verdict["faults"] if tuple(fault[key] for key in keys) == wanted]
    assert len(found) == 1 and planted.word in found[0]["text"], verdict["faults"]


def test_clean_data_pass_without_a_word(root, capsys):
    verdict = examine(root, capsys, status=0)
    assert verdict["faults"] == []
    manifest = json.loads((folder_of(root) / "manifest.json").read_text())
    for split, entry in manifest["splits"].items():
        assert {key: verdict["splits"][split][key] for key in ("documents", "tokens", "bytes")} == {
            key: entry[key] for key in ("documents", "tokens", "bytes")
        }
        assert verdict["splits"][split]["changed"] == 0 < verdict["splits"][split]["decoded"]


def test_all_of_validation_is_decoded_and_a_sample_of_each_training_shard(
    root, capsys, monkeypatch
):
    monkeypatch.setattr(doctor, "SAMPLE", 5)
    splits = examine(root, capsys, status=0)["splits"]
    found = {split: (entry["decoded"], entry["encoded_again"]) for split, entry in splits.items()}
    assert found == {"train": (10, 10), "val": (12, 12)}


def test_the_table_has_a_line_per_fault(root, capsys):
    put(40, VOCAB)(root)
    assert prepare_data.main(["doctor", str(folder_of(root))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith(f"error: {FIRST}, token 40: id range: {VOCAB} ") for line in lines
    ), lines
    assert lines[-1] == f"{NAME}: 1 errors, 0 warnings"


def test_a_folder_without_shards_is_wrong_usage(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "none"):
        assert prepare_data.main(["doctor", str(folder)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_the_tool_prepares_is_clean(tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_text(300, seed=5)))
    options = [
        "--vocab-size",
        "320",
        "--shard-tokens",
        "3000",
        "--val-fraction",
        "0.1",
        "--data-dir",
        str(tmp_path),
    ]
    assert prepare_data.main(["text", str(texts), *options]) == 0
    capsys.readouterr()
    assert prepare_data.main(["doctor", str(tmp_path / "datasets" / "corpus_sp320"), "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["errors"] == [] and verdict["splits"]["train"]["files"] > 3


# --- Overlap --------------------------------------------------------------------------------------


def random_documents(rng, number, length):
    return [
        np.append(BOS, rng.integers(4, 60000, rng.integers(length // 2, length))).astype(np.uint16)
        for _ in range(number)
    ]


@pytest.mark.parametrize("form", ["whole", "embedded", "cut", "across a shard border"])
def test_one_validation_document_in_ten_thousand_is_found_at_its_place(form):
    rng = np.random.default_rng(3)
    train = random_documents(rng, 10_000, 300)
    val = random_documents(rng, 100, 300)
    number = int(rng.integers(9_000))
    planted = val[42]
    inner = random_documents(rng, 1, 300)[0]
    if form != "whole":
        body = (
            planted[1:]
            if form == "embedded"
            else planted[len(planted) // 4 + 1 : len(planted) - 20]
        )
        planted = np.concatenate([inner[:51], body, inner[51:]])
    train.insert(number, planted)
    at = sum(map(len, train[:number]))
    cut = sum(map(len, train[: number + (form != "across a shard border")]))
    parts = [part for part in np.split(np.concatenate(train), [cut]) if len(part)]
    found = overlap.overlap(parts, np.concatenate(val), BOS)
    assert [(one.document, one.whole) for one in found] == [(42, form == "whole")]
    assert found[0].val_at == sum(map(len, val[:42]))
    if form == "whole":
        assert found[0].train_at == at
    else:  # the first indexed shingle of the common run
        assert 0 <= found[0].train_at - (at + 51) < overlap.STRIDE


def test_the_first_of_several_places_in_training_is_named():
    rng = np.random.default_rng(8)
    fill = random_documents(rng, 5, 300)
    val = random_documents(rng, 2, 300)
    part = np.concatenate(
        [fill[0], val[1][:-9], fill[1]]
    )  # all but the end of a document, the second one of part
    found = overlap.overlap(
        [np.concatenate([fill[2], fill[3]]), part, part], np.concatenate(val), BOS
    )
    assert [(one.document, one.whole) for one in found] == [(1, False)]
    assert found[0].train_at == sum(map(len, (fill[2], fill[3], fill[0]))) + 1


def test_neighbours_in_validation_are_told_apart():
    rng = np.random.default_rng(9)
    val = random_documents(rng, 3, 300)
    fill = random_documents(rng, 2, 300)
    train = [np.concatenate([fill[0], val[1][1:]]), np.concatenate([fill[1], val[2][1:]])]
    found = overlap.overlap(train, np.concatenate(val), BOS)
    assert [(one.document, one.train_at) for one in found] == [
        (1, len(fill[0])),
        (2, len(train[0]) + len(fill[1])),
    ]
    assert all(0 <= len(val[one.document]) - 1 - one.run < overlap.STRIDE for one in found)


def test_phrases_and_documents_alike_in_part_are_no_overlap():
    rng = np.random.default_rng(4)
    train = random_documents(rng, 300, 400)
    val = random_documents(rng, 30, 400)
    phrase = rng.integers(4, 60000, 50).astype(np.uint16)
    for docs in (train, val):
        for i in range(0, len(docs), 2):
            docs[i] = np.concatenate([docs[i], phrase])
    val.append(np.append(BOS, phrase).astype(np.uint16))
    assert overlap.overlap([np.concatenate(train)], np.concatenate(val), BOS) == []
    assert overlap.overlap([], np.concatenate(val), BOS) == []


def test_an_index_finds_exactly_the_shingles_that_occur_at_their_first_position():
    rng = np.random.default_rng(5)
    val = np.concatenate(
        [np.append(BOS, rng.integers(4, 7, n)) for n in (0, 31, 32, 39, 40, 300)]
    ).astype(np.uint16)
    train = np.concatenate([rng.integers(4, 7, 20_000).astype(np.uint16), val[-200:], val[-150:]])
    index = overlap.ShingleIndex(val, BOS)
    places = {}
    for i in range(len(train) - 31):
        places.setdefault(train[i : i + 32].tobytes(), i)
    expected = set()
    owner = []
    starts = [*np.flatnonzero(val == BOS), len(val)]
    for document, (a, b) in enumerate(zip(starts, starts[1:], strict=False)):
        for i in range(a + 1, b - 31, overlap.STRIDE):
            owner.append(document)
            if (place := places.get(val[i : i + 32].tobytes())) is not None:
                expected.add(place)
    found, where = index.find(train)
    assert set(where.tolist()) == expected and len(found) == len(expected) > 10
    assert index.owner.tolist() == owner


def test_overlap_may_be_allowed_and_warnings_may_count(root, capsys):
    plant_val(1)(root)
    assert [f["check"] for f in examine(root, capsys, status=1)["faults"]] == ["overlap"]
    assert examine(root, capsys, "--allow-overlap", "1", status=0)["warnings"]
    assert examine(root, capsys, "--allow-overlap", "1", "--strict", status=1)["warnings"] == []


# --- Scans ----------------------------------------------------------------------------------------


def test_decoded_bytes_are_those_of_each_text(tiny_data):
    sp = sentencepiece.SentencePieceProcessor(
        model_file=str(tiny_data / "tokenizers" / f"{NAME}.model")
    )
    texts = tiny_text(600, seed=9)
    tokens = np.concatenate([np.array([BOS, *sp.encode(text)], dtype=np.uint16) for text in texts])
    starts = overlap.document_starts(tokens, BOS)
    documents = doctor.Documents(tokens, starts)
    assert doctor.decoded_bytes(documents, sp).tolist() == [len(text.encode()) for text in texts]
    assert doctor.round_trip(documents, range(600), sp) == []
    tokens[starts[7] + 1 : starts[8]] = sp.piece_to_id(
        "<0x61>"
    )  # an "a" is never written as a byte
    assert doctor.round_trip(documents, [6, 7, 8], sp) == [7]


def test_hashes_tell_documents_apart_and_know_the_same_one_wherever_it_stands():
    rng = np.random.default_rng(6)
    docs = random_documents(rng, 50, 40)
    docs += [docs[3], docs[7][:-1]]
    random.Random(1).shuffle(docs)
    tokens = np.concatenate(docs)
    hashes = overlap.document_hashes(tokens, overlap.document_starts(tokens, BOS)).tolist()
    assert [hashes.index(h) for h in hashes] == [
        next(j for j, other in enumerate(docs) if np.array_equal(doc, other)) for doc in docs
    ]


@pytest.mark.parametrize("tokens", ["published", "fewer", "withdrawn"])
def test_fineweb_is_compared_with_its_published_totals(
    tmp_path, monkeypatch, tiny_data, capsys, tokens
):
    """The totals are set to those of a tiny validation set: what is compared is tokens, documents
    and bytes.
    """
    model = tiny_data / "tokenizers" / f"{NAME}.model"
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    docs = [[BOS, *sp.encode(text)] for text in tiny_text(60, seed=11)]
    root = tmp_path / "data"
    shutil.copytree(tiny_data / "tokenizers", root / "tokenizers")
    write_dataset(
        root, docs[20:], docs[: 19 if tokens == "fewer" else 20], model, "fineweb10B_sp1024"
    )
    size = sum(len(sp.decode(d).encode()) for d in docs[:20])
    count = sum(map(len, docs[:20]))
    monkeypatch.setattr(canonical, "DOCUMENTS", 20)
    monkeypatch.setattr(canonical, "TEXT_BYTES", size)
    monkeypatch.setattr(canonical, "TOKEN_RANGES", {"sp1024": (count, count)})
    if tokens == "withdrawn":
        monkeypatch.setattr(canonical, "WITHDRAWN_TOKENS", range(count, count + 1))
    status = prepare_data.main(["doctor", str(root / "datasets" / "fineweb10B_sp1024"), "--json"])
    verdict = json.loads(capsys.readouterr().out)
    found = [fault["text"] for fault in verdict["faults"] if fault["check"] == "canonical"]
    assert (
        status == (tokens != "published")
        and len(found) == {"published": 0, "fewer": 3, "withdrawn": 1}[tokens]
    )


# --- Cache and verdict ----------------------------------------------------------------------------


def test_a_second_visit_scans_only_what_changed(root, capsys):
    first = examine(root, capsys)
    second = examine(root, capsys)
    assert [(v["scanned"], v["cached"]) for v in (first, second)] == [(3, 0), (0, 3)]
    volatile = ("date", "scanned", "cached")
    assert {k: v for k, v in first.items() if k not in volatile} == {
        k: v for k, v in second.items() if k not in volatile
    }
    path = folder_of(root) / SECOND
    before = path.stat()
    tokens = np.array(tg.read_shard(path))
    tokens[-5] = 2
    tg.write_shard(
        path, tokens
    )  # same length; then the old time stamp, so that only the content tells
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    third = examine(root, capsys, status=1)
    assert (third["scanned"], third["cached"]) == (1, 2)  # not the first, which goes on in it
    assert {"manifest sha256", "control id"} <= {fault["check"] for fault in third["faults"]}
    assert len(list((folder_of(root) / ".doctor").glob("*.npz"))) == 3  # the old scan is forgotten
    assert examine(root, capsys, "--no-cache")["scanned"] == 3


def test_training_is_scanned_again_when_validation_changed_and_a_damaged_scan_is_not_used(
    root, capsys
):
    examine(root, capsys)
    plant_val(1)(root)
    assert examine(root, capsys, status=1)["scanned"] == 1
    alter_tokens(VAL, lambda t: t[: len(t) - len(documents(t)[-1])])(root)
    assert examine(root, capsys)["scanned"] == 3
    for file in (folder_of(root) / ".doctor").glob("*.npz"):
        file.write_bytes(file.read_bytes()[:200])
    assert examine(root, capsys)["scanned"] == 3


def test_worker_processes_find_the_same(root, capsys, monkeypatch):
    plant_val(1)(root)
    copy_shard(root)
    here = examine(root, capsys, "--no-cache", status=1)
    monkeypatch.setattr(doctor, "SMALL", 0)
    there = examine(root, capsys, "--no-cache", "--workers", "2", status=1)
    assert here["faults"] == there["faults"] and here["splits"] == there["splits"]


def test_a_run_refuses_data_with_an_error_in_one_line(root, capsys, tmp_path):
    plant_val(1)(root)
    examine(root, capsys, status=1)
    result = run_script({**TINY, "DATA_DIR": str(root)}, tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert all(word in result.stderr for word in ("train_gpt.py: ", VAL, "overlap", "doctor"))


def test_a_verdict_counts_only_for_the_very_files(root, capsys):
    opened(tiny_config(data_dir=root))  # no verdict, no refusal
    examine(root, capsys, status=0)
    opened(tiny_config(data_dir=root))
    plant_val(1)(root)
    opened(tiny_config(data_dir=root))  # the good verdict was about other files, and so is none
    examine(root, capsys, status=1)
    verdict = (folder_of(root) / "doctor.json").read_text()

    def refused():
        with pytest.raises(tg.UsageError, match="overlap"):
            opened(tiny_config(data_dir=root))

    refused()
    for name in (FIRST, VAL, "manifest.json", f"../../tokenizers/{NAME}.model"):
        path = folder_of(root) / name
        before = path.stat()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        opened(tiny_config(data_dir=root))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        refused()
    extra = folder_of(root) / "other_test_000000.bin"
    extra.write_bytes(b"")
    opened(tiny_config(data_dir=root))
    extra.unlink()
    for damaged in ("", "[]", '{"errors": ["x"]}', verdict[:-30]):
        (folder_of(root) / "doctor.json").write_text(damaged)
        with pytest.raises(tg.UsageError, match=r"doctor.json: .*; .* doctor writes it anew$"):
            opened(tiny_config(data_dir=root))
    (folder_of(root) / "doctor.json").write_text(verdict)
    refused()


def test_the_tool_tells_what_it_looks_for(capsys):
    with pytest.raises(SystemExit):
        prepare_data.main(["doctor", "--help"])
    text = capsys.readouterr().out
    assert all(
        word in text for word in ("--allow-overlap", "shingles", "doctor.json", "Exit status")
    )
