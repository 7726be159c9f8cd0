"""tools/prepare_data.py: lossless tokenizers, honest byte counts, no leak between splits, nothing
half written.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm

TOOL = Path(__file__).resolve().parent.parent / "tools" / "prepare_data.py"
sys.path.insert(0, str(TOOL.parent))
import caseops  # noqa: E402
import prepare_data  # noqa: E402

from train_gpt import ByteTable, read_shard, write_shard  # noqa: E402

TRICKY = [
    "plain words",
    "  two spaces in front, and two behind  ",
    "\n\nnewlines in front",
    "\ttab in front\t\tand inside\n\tand on a line",
    "blank lines\n\n\n\nand   runs   of    spaces\n    indented\n",
    "emoji 🙂🏳️‍🌈 and CJK 漢字かな交じり文, Кириллица, العربية",
    "carriage\r\nreturns, a non-breaking\u00a0space and a zero width\u200bspace",
    "digits 1234567890 and a control \x07 character, ﬁ ligature, e\u0301 combining",
    " ",
    "\n",
]


def run(*arguments: object) -> int:
    return prepare_data.main([str(argument) for argument in arguments])


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def load(data: Path, dataset: str) -> tuple[dict[str, Any], spm.SentencePieceProcessor]:
    manifest = json.loads((data / "datasets" / dataset / "manifest.json").read_text())
    return manifest, spm.SentencePieceProcessor(
        model_file=str(data / "tokenizers" / manifest["tokenizer"]["file"])
    )


def read_split(data: Path, dataset: str, split: str) -> list[list[int]]:
    """Documents of a split as token ids without BOS, from the shards that the manifest lists."""
    manifest, sp = load(data, dataset)
    shards = [
        read_shard(data / "datasets" / dataset / f["name"])
        for f in manifest["splits"][split]["files"]
    ]
    tokens = np.concatenate(shards)
    assert tokens[0] == sp.bos_id() == manifest["tokenizer"]["bos_id"]
    return [
        part.tolist()
        for part in np.split(tokens, np.flatnonzero(tokens == sp.bos_id()))[1:]
        for part in [part[1:]]
    ]


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    rng = np.random.default_rng(0)
    words = [
        "shard",
        "token",
        "byte",
        "piece",
        "space",
        "model",
        "train",
        "score",
        "adapt",
        "window",
        "layer",
        "loss",
    ]
    return [
        f"{i} " + " ".join(rng.choice(words, 40)) + f".\n    Note {i * 7919}: done."
        for i in range(200)
    ]


@pytest.fixture(scope="module")
def model(sentences: list[str]) -> bytes:
    return prepare_data.train_tokenizer(sentences + TRICKY, 512)


@pytest.fixture(scope="module")
def pydocs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs on the standard library alone, side by side, with different hash seeds."""
    folders = [tmp_path_factory.mktemp(f"pydocs{i}") for i in range(2)]
    command = [sys.executable, str(TOOL), "pydocs", "--packages", "--data-dir"]
    runs = [
        subprocess.Popen([*command, str(folder)], env={**os.environ, "PYTHONHASHSEED": str(i)})
        for i, folder in enumerate(folders)
    ]
    assert [process.wait() for process in runs] == [0, 0]
    return folders


# ---- Tokenizer and bytes
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TRICKY, ids=range(len(TRICKY)))
def test_a_trained_tokenizer_gives_text_back_and_the_byte_table_counts_its_utf8_bytes(
    model: bytes, text: str
) -> None:
    sp = spm.SentencePieceProcessor(model_proto=model)
    ids = sp.encode(text)
    assert sp.decode(ids) == text
    assert ByteTable.from_sentencepiece(sp).count(np.array([sp.bos_id(), *ids], np.uint16)) == len(
        text.encode()
    )


def test_a_trained_tokenizer_has_the_contest_ids_and_one_space_mark_a_piece_at_most(
    model: bytes,
) -> None:
    sp = spm.SentencePieceProcessor(model_proto=model)
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id(), sp.vocab_size()) == (
        0,
        1,
        2,
        3,
        512,
    )
    pieces = [sp.id_to_piece(i) for i in range(512)]
    assert all(piece.rfind("\u2581") <= 0 for piece in pieces)
    assert not any(re.search(r"\d\d", piece) for i, piece in enumerate(pieces) if not sp.is_byte(i))


def test_training_a_tokenizer_twice_gives_equal_bytes(model: bytes, sentences: list[str]) -> None:
    assert prepare_data.train_tokenizer(sentences + TRICKY, 512) == model


def test_manifest_totals_equal_what_the_shards_decode_to(
    tmp_path: Path, sentences: list[str]
) -> None:
    train = write_lines(tmp_path / "a.jsonl", sentences + TRICKY)
    val = write_lines(tmp_path / "b.jsonl", ["x y", "\n z"])
    assert run("text", train, "--val", val, "--vocab-size", 400, "--data-dir", tmp_path / "d") == 0
    manifest, sp = load(tmp_path / "d", "corpus_sp400")
    for split, texts in (("train", sentences + TRICKY), ("val", ["x y", "\n z"])):
        entry = manifest["splits"][split]
        documents = read_split(tmp_path / "d", "corpus_sp400", split)
        assert [sp.decode(ids) for ids in documents] == texts
        assert entry["documents"] == len(texts)
        assert entry["bytes"] == sum(len(text.encode()) for text in texts)
        assert entry["tokens"] == sum(len(ids) + 1 for ids in documents)
    assert manifest["splits"]["val"]["gzip_bytes"] == sum(
        len(gzip.compress(t, 9)) for t in (b"x y", b"\n z")
    )
    model = (tmp_path / "d/tokenizers/corpus_sp400.model").read_bytes()
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(model).hexdigest()


def test_documents_a_trained_tokenizer_cannot_give_back_are_left_out_and_told(
    tmp_path: Path, sentences: list[str], capsys: pytest.CaptureFixture
) -> None:
    train = write_lines(tmp_path / "a.jsonl", [*sentences, "holds \u2581 the mark"])
    val = write_lines(tmp_path / "b.jsonl", ["fine"])
    assert run("text", train, "--val", val, "--vocab-size", 400, "--data-dir", tmp_path / "d") == 0
    assert (
        "train: 1 documents do not come back exactly from the tokenizer, 1 left out"
        in capsys.readouterr().out
    )
    assert len(read_split(tmp_path / "d", "corpus_sp400", "train")) == len(sentences)


def test_a_given_tokenizer_is_copied_and_decoded_bytes_are_counted(
    tmp_path: Path, sentences: list[str]
) -> None:
    lossy = tmp_path / "lossy.model"
    with lossy.open("wb") as file:  # folds white space and compatibility characters
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_id=0,
            minloglevel=2,
        )
    train = write_lines(tmp_path / "a.jsonl", sentences)
    val = write_lines(tmp_path / "b.jsonl", ["a  ﬁne   one"])
    assert (
        run(
            "text",
            train,
            "--val",
            val,
            "--tokenizer",
            lossy,
            "--data-dir",
            tmp_path / "d",
            "--name",
            "mine",
        )
        == 0
    )
    manifest, _ = load(tmp_path / "d", "mine_sp400")
    assert (tmp_path / "d/tokenizers/lossy.model").read_bytes() == lossy.read_bytes()
    assert manifest["splits"]["val"]["bytes"] == len(b"a fine one")
    assert files_below(tmp_path / "d/datasets/mine_sp400")[1:] == [
        "mine_train_000000.bin",
        "mine_val_000000.bin",
    ]


# ---- Splits and shards
# ----------------------------------------------------------------------------------------------


def test_documents_that_straddle_shards_read_back_whole(
    tmp_path: Path, sentences: list[str]
) -> None:
    train = write_lines(tmp_path / "a.jsonl", sentences)
    val = write_lines(tmp_path / "b.jsonl", ["x"])
    options = [
        "--val",
        val,
        "--vocab-size",
        400,
        "--data-dir",
        tmp_path / "d",
        "--shard-tokens",
        100,
    ]
    assert run("text", train, *options) == 0
    manifest, sp = load(tmp_path / "d", "corpus_sp400")
    lengths = [file["tokens"] for file in manifest["splits"]["train"]["files"]]
    assert len(lengths) > 50 and set(lengths[:-1]) == {100} and 0 < lengths[-1] <= 100
    assert [
        sp.decode(ids) for ids in read_split(tmp_path / "d", "corpus_sp400", "train")
    ] == sentences


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_compressed_and_plain_files_give_the_same_shards(
    tmp_path: Path, sentences: list[str], ending: str
) -> None:
    raw = write_lines(tmp_path / "plain", sentences).read_bytes()
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress}
    if ending == "jsonl.zst":
        frame = pytest.importorskip("zstandard").ZstdCompressor().compress
        pack[ending] = lambda raw: (
            frame(raw[:5000]) + frame(raw[5000:])
        )  # two frames, cut inside a line
    (tmp_path / f"a.{ending}").write_bytes(pack[ending](raw))
    assert (
        run(
            "text",
            tmp_path / f"a.{ending}",
            "--vocab-size",
            400,
            "--val-fraction",
            0.1,
            "--data-dir",
            tmp_path,
        )
        == 0
    )
    _, sp = load(tmp_path, "corpus_sp400")
    read = [
        sp.decode(ids)
        for split in ("train", "val")
        for ids in read_split(tmp_path, "corpus_sp400", split)
    ]
    assert sorted(read) == sorted(sentences)


def test_a_held_out_fraction_never_shares_a_text_with_training(
    tmp_path: Path, sentences: list[str]
) -> None:
    doubled = [*sentences, *(text.replace(" ", "  ") for text in sentences)]
    train = write_lines(tmp_path / "a.jsonl", doubled)
    assert (
        run("text", train, "--val-fraction", 0.2, "--vocab-size", 400, "--data-dir", tmp_path) == 0
    )
    _, sp = load(tmp_path, "corpus_sp400")
    split = {
        name: {
            " ".join(sp.decode(ids).split()) for ids in read_split(tmp_path, "corpus_sp400", name)
        }
        for name in ("train", "val")
    }
    assert not split["train"] & split["val"] and 20 < len(split["val"]) < 60


def test_overlap_is_refused_by_line_and_dropped_from_training_on_request(
    tmp_path: Path, sentences: list[str], capsys: pytest.CaptureFixture
) -> None:
    train = write_lines(tmp_path / "a.jsonl", sentences)
    val = write_lines(
        tmp_path / "b.jsonl", [sentences[4].replace(" ", "\n"), sentences[9], "other"]
    )
    options = ["text", train, "--val", val, "--vocab-size", 400, "--data-dir", tmp_path / "d"]
    assert run(*options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"prepare_data.py: {train}:5 ") and "2 training documents" in error
    assert files_below(tmp_path / "d") == []
    assert run(*options, "--drop-overlap") == 0
    _, sp = load(tmp_path / "d", "corpus_sp400")
    kept = [sp.decode(ids) for ids in read_split(tmp_path / "d", "corpus_sp400", "train")]
    assert kept == [text for i, text in enumerate(sentences) if i not in (4, 9)]


MALFORMED = {
    "empty.jsonl": (b"", ":1 is empty"),
    "blank.txt": (b" \n", ":1 is empty"),
    "bytes.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', ":2 is not UTF-8"),
    "bytes.txt": (b"one\ntwo\n\xff", ":3 is not UTF-8"),
    "cut.jsonl": (b'{"text": "a"}\n\n{"text": "b\n', ":3 is not JSON"),
    "key.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', ":2 has no text under the key 'text'"),
    "list.jsonl": (b'["a"]\n', ":1 has no text"),
    "number.jsonl": (b'{"text": 3}\n', ":1 has no text"),
    "surrogate.jsonl": (b'{"text": "\\ud83d"}\n', ":1 holds half of a surrogate pair"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 9)[:-9], " cannot be decompressed"),
    "cut.jsonl.zst": (b"no zstandard frame", ":1 cannot be decompressed"),
    "table.csv": (b"a,b\n", ": expected .jsonl"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_input_ends_in_one_line_with_status_2_and_leaves_no_file(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    content, expected = MALFORMED[name]
    path = tmp_path / name
    good = write_lines(tmp_path / "good.jsonl", ["fine"])
    path.write_bytes(content)
    assert run("text", path, "--val", good, "--data-dir", tmp_path / "d") == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and error.startswith(f"prepare_data.py: {path}:")
        and expected in error
    )
    assert files_below(tmp_path) == sorted([name, "good.jsonl"])


def test_a_missing_file_a_foreign_tokenizer_and_a_vocabulary_too_large_end_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    good = write_lines(tmp_path / "good.jsonl", ["fine", "also fine"])
    for arguments, expected in (
        [[tmp_path / "none.jsonl"], "none.jsonl: No such file"],
        [[good, "--tokenizer", good], "good.jsonl is not a SentencePiece model"],
        [[good, "--val-fraction", "0.5", "--vocab-size", "9999"], "--vocab-size 9999: "],
        [[good, "--val-fraction", "2"], "--val-fraction 2: must lie between 0 and 1"],
        [[good, "--name", "../../x"], "--name ../../x: must be a name"],
    ):
        assert run("text", *arguments, "--data-dir", tmp_path / "d") == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1, error
        assert error.startswith("prepare_data.py: ") and expected in error
    assert files_below(tmp_path) == ["good.jsonl"]


def test_a_prepared_dataset_is_kept_repaired_if_damaged_and_replaced_only_by_force(
    tmp_path: Path, sentences: list[str], capsys: pytest.CaptureFixture
) -> None:
    command = [
        "text",
        write_lines(tmp_path / "a.jsonl", sentences),
        "--vocab-size",
        400,
        "--data-dir",
        tmp_path,
    ]
    shard = tmp_path / "datasets/corpus_sp400/corpus_train_000000.bin"
    assert run(*command, "--val-fraction", 0.1) == 0
    first = shard.read_bytes()
    assert run(*command, "--val-fraction", 0.1) == 0
    assert "is there and intact" in capsys.readouterr().out
    assert run(*command, "--val-fraction", 0.2) == 2
    assert "made from other inputs" in capsys.readouterr().err and shard.read_bytes() == first
    shard.write_bytes(first[:-2])
    assert run(*command, "--val-fraction", 0.1) == 0 and shard.read_bytes() == first
    assert run(*command, "--val-fraction", 0.2, "--force") == 0 and shard.read_bytes() != first


# ---- Documentation of the installed packages
# ------------------------------------------------------------------------


def test_docstrings_are_found_in_order_with_names_and_attached_ones_included() -> None:
    source = '''
"""Module."""
class A:
    """Class."""
    async def f(self):
        """Method

        with an
            indented line.
        """
add_docstr(torch.abs, r"""abs(x)

    Absolute {out}""".format(**args))
add_newdoc("numpy", "ndarray", ("T", """The
    transpose."""))
template = """not a
docstring"""
'''
    assert prepare_data.docstrings(source.encode(), "m") == [
        "m\n\nModule.",
        "m.A\n\nClass.",
        "m.A.f\n\nMethod\n\nwith an\n    indented line.",
        "torch.abs\n\nabs(x)\n\nAbsolute {out}",
        "numpy.ndarray.T\n\nThe\ntranspose.",
    ]


def test_near_copies_never_become_validation() -> None:
    rng = np.random.default_rng(1)
    single = [" ".join(f"w{n}" for n in rng.integers(0, 5000, 100)) for _ in range(60)]
    copies = [text + f" changed {i}" for i, text in enumerate(single[:20])]
    train, val = prepare_data.hold_out(single + copies, 10, seed=0)
    assert len(val) == 10 and len(train) == 70 and set(val) <= set(single[20:])


def test_pydocs_is_lossless_and_no_validation_document_is_mostly_in_training(
    pydocs: list[Path],
) -> None:
    manifest, sp = load(pydocs[0], "pydocs_sp1024_caseops")
    decode = caseops.TRANSFORMS[manifest["transform"]].decode
    texts = {
        split: [decode(sp.decode(i)) for i in read_split(pydocs[0], "pydocs_sp1024_caseops", split)]
        for split in ("train", "val")
    }
    for split, entry in manifest["splits"].items():
        assert entry["documents"] == len(texts[split])
        assert entry["bytes"] == sum(len(text.encode()) for text in texts[split])
    assert len(texts["val"]) == 100 and manifest["splits"]["train"]["bytes"] > 1_000_000

    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 32]) for i in range(0, max(1, len(words) - 31))}

    seen = set().union(*(shingles(text) for text in texts["train"]))
    assert max(len(shingles(text) & seen) / len(shingles(text)) for text in texts["val"]) <= 0.2


def test_pydocs_run_twice_gives_identical_shards_and_tokenizer(pydocs: list[Path]) -> None:
    first, second = (
        {name: (folder / name).read_bytes() for name in files_below(folder)} for folder in pydocs
    )
    assert first.keys() == second.keys() and len(first) == 6
    assert all(first[name] == second[name] for name in first if not name.endswith("manifest.json"))


# ---- CaseOps
# --------------------------------------------------------------------------------------------


def make_caseops(folder: Path, *options: object) -> int:
    """Makes `mixed_sp320_caseops` of sentences with capitals, in `folder`."""
    texts = [
        f"{word.title()} of {word.upper()} and mc{word.title()}, {i}."
        for i in range(30)
        for word in ("shard", "token", "byte")
    ]
    write_lines(folder / "train.jsonl", texts[:-9])
    write_lines(folder / "val.jsonl", texts[-9:])
    files = [folder / "train.jsonl", "--val", folder / "val.jsonl", "--vocab-size", 320]
    return run("text", *files, "--name", "mixed", "--data-dir", folder, *options)


@pytest.mark.parametrize("transform", list(caseops.TRANSFORMS))
def test_caseops_data_have_a_side_car_for_both_splits_and_give_back_the_original(
    tmp_path: Path, transform: str
) -> None:
    assert make_caseops(tmp_path, "--caseops", transform, "--shard-tokens", 400) == 0
    manifest, sp = load(tmp_path, "mixed_sp320_caseops")
    assert manifest["transform"] == transform
    for split in ("train", "val"):
        entry = manifest["splits"][split]
        lines = (tmp_path / f"{split}.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        decoded = [sp.decode(ids) for ids in read_split(tmp_path, "mixed_sp320_caseops", split)]
        assert [caseops.TRANSFORMS[transform].decode(text) for text in decoded] == texts
        assert entry["bytes"] == sum(len(text.encode()) for text in texts)
        assert entry["text_sha256"] == caseops.split_digest(map(caseops.text_digest, texts))
        folder = tmp_path / "datasets" / "mixed_sp320_caseops"
        counts = [read_shard(folder / file["name"]) for file in entry["byte_files"]]
        assert [len(part) for part in counts] == [file["tokens"] for file in entry["files"]]
        assert sum(int(part.sum()) for part in counts) == entry["bytes"]
        assert len(counts) > (split == "train")


def test_caseops_data_are_made_once_and_again_for_another_transform(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert make_caseops(tmp_path, "--caseops") == 0
    assert make_caseops(tmp_path, "--caseops") == 0
    assert "is there and intact" in capsys.readouterr().out
    sidecar = tmp_path / "datasets/mixed_sp320_caseops/mixed_val_bytes_000000.bin"
    sidecar.write_bytes(sidecar.read_bytes()[:-2])
    assert make_caseops(tmp_path, "--caseops") == 0
    assert "wrote" in capsys.readouterr().out
    assert make_caseops(tmp_path, "--caseops", caseops.PUBLISHED.name) == 2
    assert "was made from other inputs" in capsys.readouterr().err


def test_a_tokenizer_without_the_operators_is_refused_for_caseops_and_one_with_them_without(
    tmp_path: Path, model: bytes, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "plain.model").write_bytes(model)
    texts = write_lines(tmp_path / "texts.jsonl", ["A Word"] * 30)
    command = ["text", texts, "--data-dir", tmp_path, "--val-fraction", 0.5]
    assert run(*command, "--tokenizer", tmp_path / "plain.model", "--caseops") == 2
    assert "plain.model: has no case operators" in capsys.readouterr().err
    assert make_caseops(tmp_path, "--caseops") == 0
    marked = tmp_path / "tokenizers" / "mixed_sp320_caseops.model"
    assert run(*command, "--tokenizer", marked) == 2
    assert "mixed_sp320_caseops.model: has the case operators" in capsys.readouterr().err


# ---- Published shards, from a local hub
# -----------------------------------------------------------------------------

REPO = "someone/golf"
DATASET = "fineweb10B_sp512"
COMMIT = "c0ffee" * 6 + "beef"


class LocalHub(ThreadingHTTPServer):
    """The routes of the hub that huggingface_hub uses for one dataset repository."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.sent = dict(files)  # what really goes over the wire
        self.cut_once: set[str] = set()  # connections to break in the middle, once
        self.requests: list[
            tuple[str, str, str | None]
        ] = []  # method, path in the repository, Range


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        from urllib.parse import parse_qs

        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        infos = []
        for path in (path for path in asked if path in self.server.files):
            content = self.server.files[path]
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            info: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": oid}
            if path.endswith(".bin"):
                sha256 = hashlib.sha256(content).hexdigest()
                info["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            infos.append(info)
        self.answer(200, json.dumps(infos).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path.split("?")[0] == f"/api/datasets/{REPO}/revision/main":
            info = {
                "id": REPO,
                "sha": COMMIT,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [],
            }
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        path = self.path.split("?")[0].removeprefix(f"/datasets/{REPO}/resolve/{COMMIT}/")
        if path not in self.server.files:
            return self.answer(404, X_Error_Code="RepoNotFound")
        self.server.requests.append((self.command, path, self.headers["Range"]))
        body = self.server.sent[path]
        etag = hashlib.sha256(self.server.files[path]).hexdigest()
        headers = {
            "ETag": f'"{etag}"',
            "X_Linked_Etag": f'"{etag}"',
            "X_Repo_Commit": COMMIT,
            "Accept_Ranges": "bytes",
        }
        if self.headers["Range"]:
            start = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1])
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            return self.answer(206, body[start:], **headers)
        if self.command == "GET" and path in self.server.cut_once:
            self.server.cut_once.remove(path)
            self.answer(200, body[: 11 << 20], **headers, Content_Length=str(len(body)))
            self.close_connection = True
            return None
        return self.answer(200, body, **headers)


@pytest.fixture
def hub(tmp_path: Path, model: bytes, sentences: list[str]) -> Iterator[LocalHub]:
    """Two training shards that share a document, and a validation shard larger than the client's 10
    MB chunks.
    """
    pytest.importorskip("huggingface_hub")
    sp = spm.SentencePieceProcessor(model_proto=model)
    stream = np.concatenate([[sp.bos_id(), *sp.encode(text)] for text in sentences]).astype(
        np.uint16
    )
    shards = {
        "train_000000": stream[:4000],
        "train_000001": stream[4000:9000],
        "val_000000": np.resize(stream, 6_000_000),
    }
    files = {"datasets/tokenizers/fineweb_512_bpe.model": model}
    for name, tokens in shards.items():
        write_shard(tmp_path / "shard.bin", tokens)
        files[f"datasets/datasets/{DATASET}/fineweb_{name}.bin"] = (
            tmp_path / "shard.bin"
        ).read_bytes()
    stats = {"files_train": 2, "files_val": 1, "tokens_val": len(shards["val_000000"])}
    entry = {"name": DATASET, "tokenizer_name": "sp_bpe_512", "stats": stats}
    tokenizer = {"name": "sp_bpe_512", "model_path": "tokenizers/fineweb_512_bpe.model"}
    files["datasets/manifest.json"] = json.dumps(
        {"datasets": [entry], "tokenizers": [tokenizer]}
    ).encode()
    server = LocalHub(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def download(hub: LocalHub, data: Path, *options: str) -> subprocess.CompletedProcess:
    hub.requests.clear()
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(data / "home"),
    }
    command = [
        sys.executable,
        TOOL,
        "fineweb",
        "--repo",
        REPO,
        "--variant",
        "sp512",
        "--data-dir",
        data,
        *options,
    ]
    return subprocess.run(
        [str(part) for part in command], env=env, capture_output=True, text=True, timeout=60
    )


def fetched(hub: LocalHub) -> list[str]:
    return [Path(path).name for method, path, _ in hub.requests if method == "GET"]


def test_a_download_is_checked_counted_resumed_and_extended(
    hub: LocalHub, tmp_path: Path, model: bytes
) -> None:
    val = f"datasets/datasets/{DATASET}/fineweb_val_000000.bin"
    hub.cut_once.add(val)
    result = download(hub, tmp_path, "--train-shards", "1")
    assert result.returncode == 0, result.stderr
    first, second = [
        asked for method, path, asked in hub.requests if method == "GET" and path == val
    ]
    assert first is None and second == f"bytes={10 << 20}-"  # goes on after the last whole chunk
    manifest, sp = load(tmp_path, DATASET)
    tokens = read_shard(tmp_path / "datasets" / DATASET / "fineweb_val_000000.bin")
    entry = manifest["splits"]["val"]
    assert entry["tokens"] == len(tokens) and entry["documents"] == int(
        (tokens == sp.bos_id()).sum()
    )
    assert (
        entry["bytes"] == ByteTable.from_sentencepiece(sp).count(tokens)
        and entry["gzip_bytes"] is None
    )
    assert COMMIT in manifest["source"] and len(manifest["splits"]["train"]["files"]) == 1
    assert (tmp_path / "tokenizers/fineweb_512_bpe.model").read_bytes() == model

    assert download(hub, tmp_path, "--train-shards", "2").returncode == 0
    assert fetched(hub) == ["manifest.json", "fineweb_train_000001.bin"]
    manifest, _ = load(tmp_path, DATASET)
    assert [f["tokens"] for f in manifest["splits"]["train"]["files"]] == [4000, 5000]
    listed = {
        f["name"]: f["sha256"] for entry in manifest["splits"].values() for f in entry["files"]
    }
    for name, sha256 in listed.items():
        assert (
            hashlib.sha256(hub.files[f"datasets/datasets/{DATASET}/{name}"]).hexdigest() == sha256
        )
    assert not (tmp_path / "datasets" / f".{DATASET}.part").exists()


CASEOPS_DATASET = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"


@pytest.fixture
def caseops_hub(tmp_path: Path, sentences: list[str]) -> Iterator[LocalHub]:
    """The published CaseOps export in small: two training shards, and a side-car of validation."""
    pytest.importorskip("huggingface_hub")
    transform = caseops.PUBLISHED
    texts = [text.title() for text in sentences]
    model = prepare_data.train_tokenizer(texts, 320, transform)
    sp = spm.SentencePieceProcessor(model_proto=model)
    encoded = caseops.encode_with_counts(sp, [transform.encode(text) for text in texts])
    ids = [[1, *document.ids] for document in encoded]
    counts = [[0, *document.counts] for document in encoded]
    shards = {
        "val_000000": np.concatenate(ids[:20]),
        "val_bytes_000000": np.concatenate(counts[:20]),
        "train_000000": np.concatenate(ids[20:100]),
        "train_000001": np.concatenate(ids[100:]),
    }
    tokenizer = "tokenizers/caseops.model"
    files = {f"datasets/{tokenizer}": model}
    for name, values in shards.items():
        write_shard(tmp_path / "shard.bin", values)
        path = f"datasets/datasets/{CASEOPS_DATASET}/fineweb_{name}.bin"
        files[path] = (tmp_path / "shard.bin").read_bytes()
    # The publisher counts every file of the split val, but not the side-car.
    stats = {
        "files_train": 2,
        "files_val": 1,
        "docs_val": 20,
        "tokens_val": sum(map(len, ids[:20])),
    }
    entry = {"name": CASEOPS_DATASET, "tokenizer_name": "caseops", "stats": stats}
    about = {"name": "caseops", "model_path": tokenizer}
    manifest = {"datasets": [entry], "tokenizers": [about]}
    files["datasets/manifest.json"] = json.dumps(manifest).encode()
    server = LocalHub(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_published_caseops_export_comes_with_its_side_car(
    caseops_hub: LocalHub, tmp_path: Path, sentences: list[str]
) -> None:
    options = ["--variant", "sp8192_caseops", "--train-shards", "2"]
    sidecar = f"datasets/datasets/{CASEOPS_DATASET}/fineweb_val_bytes_000000.bin"
    whole = caseops_hub.files[sidecar]
    # An earlier download was stopped after the shard.
    folder = tmp_path / "datasets" / CASEOPS_DATASET
    folder.mkdir(parents=True)
    shard = sidecar.replace("_bytes", "")
    (folder / "fineweb_val_000000.bin").write_bytes(caseops_hub.files[shard])
    (folder / "fineweb_val_bytes_000000.bin").write_bytes(whole[:-1] + b"\7")
    result = download(caseops_hub, tmp_path, *options)
    assert result.returncode == 0, result.stderr
    assert "fineweb_val_000000.bin" not in fetched(caseops_hub)
    assert "fineweb_val_bytes_000000.bin" in fetched(caseops_hub)
    assert (folder / "fineweb_val_bytes_000000.bin").read_bytes() == whole
    manifest, _ = load(tmp_path, CASEOPS_DATASET)
    assert manifest["transform"] == "lossless_caps_caseops_v1"
    val = manifest["splits"]["val"]
    (entry,) = val["byte_files"]
    assert entry["name"] == "fineweb_val_bytes_000000.bin"
    assert entry["sha256"] == hashlib.sha256(whole).hexdigest()
    assert entry["tokens"] == val["tokens"]
    assert val["bytes"] == sum(len(text.encode()) for text in sentences[:20])
    train = manifest["splits"]["train"]
    # This tokenizer is lossless, so the text without operators has the bytes of the original.
    assert train["bytes"] == sum(len(text.encode()) for text in sentences[20:])
    assert "byte_files" not in train


def test_a_wrong_checksum_is_refused_and_the_next_run_fetches_only_what_is_missing(
    hub: LocalHub, tmp_path: Path
) -> None:
    path = f"datasets/datasets/{DATASET}/fineweb_train_000000.bin"
    hub.sent[path] = hub.files[path][:-2] + b"\0\0"
    result = download(hub, tmp_path, "--train-shards", "1")
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith(
        f"prepare_data.py: {REPO}: {path} "
    )
    assert "SHA-256" in result.stderr and "Traceback" not in result.stderr
    folder = tmp_path / "datasets" / DATASET
    assert files_below(folder) == ["fineweb_val_000000.bin"]
    hub.sent[path] = hub.files[path]
    assert download(hub, tmp_path, "--train-shards", "1").returncode == 0
    assert "fineweb_val_000000.bin" not in fetched(hub) and "fineweb_train_000000.bin" in fetched(
        hub
    )


def test_a_published_shard_that_is_truncated_is_refused(hub: LocalHub, tmp_path: Path) -> None:
    path = f"datasets/datasets/{DATASET}/fineweb_train_000000.bin"
    hub.files[path] = hub.sent[path] = hub.files[path][:-100]
    result = download(hub, tmp_path, "--train-shards", "1")
    assert result.returncode == 2 and "fineweb_train_000000.bin arrived damaged" in result.stderr
    assert "manifest.json" not in files_below(tmp_path / "datasets" / DATASET)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--train-shards", "3"], "has 2 of"),
        (["--variant", "sp99"], "does not describe fineweb10B_sp99"),
        (["--repo", "someone/else"], "someone/else: RepositoryNotFoundError"),
        (["--root", "nowhere"], "has no nowhere/manifest.json"),
    ],
    ids=["shards", "variant", "repo", "root"],
)
def test_what_the_hub_does_not_have_ends_in_one_line(
    hub: LocalHub, tmp_path: Path, options: list[str], expected: str
) -> None:
    result = download(hub, tmp_path, *options)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert (
        result.stderr.splitlines()[-1].startswith("prepare_data.py: ") and expected in result.stderr
    )
    with contextlib.suppress(FileNotFoundError):
        assert files_below(tmp_path / "datasets" / DATASET) == []


@pytest.mark.parametrize("kind", ["pipe", "deep", "other"])
def test_an_odd_manifest_is_no_earlier_download_and_stops_nothing(tmp_path, kind):
    path = tmp_path / "datasets" / "d" / "manifest.json"
    path.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("[" * 200_000 if kind == "deep" else "[1]")
    args = argparse.Namespace(data_dir=tmp_path, revision="main", train_shards=1)
    assert not prepare_data.is_downloaded(args, "d")
