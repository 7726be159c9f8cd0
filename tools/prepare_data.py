#!/usr/bin/env python3
"""Write the token shards, the tokenizer and the manifest that train_gpt.py reads.

    prepare_data.py pydocs
    prepare_data.py text train.jsonl.zst --val val.jsonl.zst --tokenizer fineweb_8192_bpe.model
    prepare_data.py text train.jsonl.zst --val val.jsonl.zst --vocab-size 8192 --caseops
    prepare_data.py fineweb --variant sp8192 --train-shards 80
    prepare_data.py fineweb --variant sp8192_caseops
    prepare_data.py doctor data/datasets/pydocs_sp1024_caseops

`pydocs` needs no download: it makes 10 MB from the documentation of the installed packages. `text`
takes your own files, `fineweb` downloads the published shards. `doctor` tells whether a data set is
complete, fits its tokenizer, and keeps validation text out of training. The first three leave the
same layout under --data-dir:

    datasets/<dataset>/<prefix>_train_000000.bin ... <prefix>_val_000000.bin, manifest.json
    tokenizers/<tokenizer>.model

With CaseOps (tools/caseops.py) the data set also holds a side-car, which counts the bytes of the
original text behind each token: <prefix>_val_bytes_000000.bin and so on.

Nothing is left half written: files get their names once they are complete. Exit status: 0 done, 1
the doctor found an error, 2 wrong input, told in one line.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import os
import platform
import random
import re
import shutil
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

try:
    import numpy as np
    import sentencepiece as spm
    from tqdm import tqdm
except ImportError as error:
    print(f"prepare_data.py: {error}; make install brings it into .venv", file=sys.stderr)
    sys.exit(2)

try:
    import zstandard
except ImportError:  # only .zst files need it
    zstandard = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import canonical  # noqa: E402
import caseops  # noqa: E402
import doctor  # noqa: E402
from digests import file_sha256, sha256  # noqa: E402

from train_gpt import (  # noqa: E402
    MAX_JSON_BYTES,
    MAX_TOKENIZER_BYTES,
    ByteTable,
    FileLock,
    UsageError,
    open_regular,
    parse_tokenizer,
    read_regular,
    read_shard,
    reason_of,
    shard_paths,
    write_atomic,
    write_shard,
)

# Bytes of training text that a tokenizer is trained on; more changes little.
TOKENIZER_SAMPLE_BYTES = 64_000_000
BATCH_DOCUMENTS = 512  # encoded at once, over all cores
COUNT_TOKENS = 1 << 22  # counted at once


# === Tokenizer ====================================================================================
def load_tokenizer(model: bytes, name: object) -> spm.SentencePieceProcessor:
    """A serialised SentencePiece model, ready to encode.

    Raises UsageError, naming the file, for anything but a model with a BOS and ids that uint16
    shards can hold.
    """
    try:
        sp = parse_tokenizer(model)
    except RuntimeError:
        raise UsageError(f"{name} is not a SentencePiece model") from None
    if sp.bos_id() < 0 or sp.vocab_size() > 1 << 16:
        found = f"{name} has BOS id {sp.bos_id()} and {sp.vocab_size()} pieces"
        raise UsageError(f"{found}; need a BOS and at most 65536")
    return sp


# The newline pieces keep line ends out of the words, so that a word at the start of a line counts
# as one.
TOKENIZER_OPTIONS = dict(
    model_type="bpe",
    byte_fallback=True,
    split_digits=True,
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=True,
    user_defined_symbols=["\n", "\n\n"],
    max_sentence_length=1 << 28,
    num_threads=4,
    minloglevel=2,
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, transform: caseops.Transform | None = None
) -> bytes:
    """Trains a lossless byte-fallback BPE model; the same texts give the same bytes.

    It normalises nothing, and a piece has at most one space mark, at its front, as the byte table
    assumes. With a transform it is trained on transformed text, the operators have the ids 4 to 7,
    and no space is put before a document, whose first word an operator may precede. Raises
    UsageError if the texts cannot fill, or do not fit, the vocabulary.
    """
    options = dict(TOKENIZER_OPTIONS)
    if transform:
        texts = map(transform.encode, texts)
        symbols = [*caseops.OPERATORS, *options["user_defined_symbols"]]
        options |= dict(user_defined_symbols=symbols, add_dummy_prefix=False)
    model = io.BytesIO()
    # The trainer skips sentences with a tab.
    sentences = (text.replace("\t", "\n") for text in texts)
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            vocab_size=vocab_size,
            **options,
        )
    except RuntimeError as error:
        raise UsageError(f"--vocab-size {vocab_size}: {' '.join(str(error).split())}") from None
    return model.getvalue()


# === Shards and manifest ==========================================================================
class Target(NamedTuple):
    """The name of a data set, its origin and the place it is written to."""

    data_dir: Path
    dataset: str
    source: str  # one sentence for the manifest
    inputs: str  # hash or commit: changes with anything that decides the content
    model: bytes  # serialised SentencePiece model
    tokenizer_file: str
    lossless: bool  # the tokenizer was trained here and must give every document back exactly
    shard_tokens: int
    transform: caseops.Transform | None = None

    @property
    def folder(self) -> Path:
        """The folder of shards and manifest."""
        return self.data_dir / "datasets" / self.dataset

    @property
    def tokenizer(self) -> Path:
        """The file of the SentencePiece model."""
        return self.data_dir / "tokenizers" / self.tokenizer_file


@dataclasses.dataclass
class SplitEntry:
    """The manifest's entry of a split, filled while the split is written or counted."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0  # of text
    # Size of all documents, each compressed by gzip -9: a figure for scale. None: not counted.
    gzip_bytes: int | None = None
    files: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    # With CaseOps: the side-car, and the hash of the original text (caseops.split_digest) where the
    # text was at hand.
    byte_files: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    text_sha256: str = ""

    def add_file(self, path: Path, tokens: int) -> None:
        """Enters a shard that is complete."""
        self.tokens += tokens
        self.files.append({"name": path.name, "tokens": tokens, "sha256": file_sha256(path)})

    def add_byte_file(self, path: Path, counts: int) -> None:
        """Enters a file of the side-car that is complete."""
        self.byte_files.append({"name": path.name, "tokens": counts, "sha256": file_sha256(path)})

    def as_manifest(self) -> dict[str, Any]:
        """The entry, without the keys of CaseOps in another data set."""
        entry = dataclasses.asdict(self)
        for key in ("byte_files", "text_sha256"):
            if not entry[key]:
                del entry[key]
        return entry


class EncodedBatch(NamedTuple):
    """Some documents as tokens."""

    # (1, n) uint16: each document BOS + ids; with CaseOps (2, n), the second row is the side-car
    tokens: np.ndarray
    documents: int
    bytes: int  # of the decoded text; with CaseOps, of the original text behind the tokens
    gzip_bytes: int
    altered: int  # documents that do not come back exactly when decoded
    dropped: int  # documents left out


def encode_batch(
    texts: list[str], sp: spm.SentencePieceProcessor, lossless: bool, with_gzip: bool
) -> EncodedBatch:
    """Encodes documents and decodes them again, which is what their bytes are counted by.

    Leaves out empty documents and, with `lossless`, those that the tokenizer cannot give back: they
    hold U+2581, which SentencePiece uses for the space.
    """
    encoded = sp.encode(texts, num_threads=os.cpu_count() or 1)
    parts = [np.empty((1, 0), dtype=np.uint16)]
    num_bytes = 0
    gzip_bytes = 0
    altered = 0
    for text, ids, decoded in zip(texts, encoded, sp.decode(encoded), strict=True):
        is_altered = decoded != text
        altered += is_altered
        if not ids or (lossless and is_altered):
            continue
        raw = decoded.encode()
        num_bytes += len(raw)
        if with_gzip:
            gzip_bytes += len(gzip.compress(raw, 9))
        parts.append(np.array([[sp.bos_id(), *ids]], dtype=np.uint16))
    documents = len(parts) - 1
    dropped = len(texts) - documents
    tokens = np.concatenate(parts, axis=1)
    return EncodedBatch(tokens, documents, num_bytes, gzip_bytes, altered, dropped)


def encode_caseops_batch(
    texts: list[str],
    sp: spm.SentencePieceProcessor,
    target: Target,
    with_gzip: bool,
    digests: list[bytes],
) -> EncodedBatch:
    """As encode_batch, for transformed text; adds the digest of every original to `digests`.

    Raises UsageError if a token is worth more bytes than a side-car can say.
    """
    transformed = [target.transform.encode(text) for text in texts]
    encoded = caseops.encode_with_counts(sp, transformed, os.cpu_count() or 1)
    decoded = sp.decode([document.ids for document in encoded])
    parts = [np.empty((2, 0), dtype=np.uint16)]
    num_bytes = 0
    gzip_bytes = 0
    altered = 0
    for text, wanted, document, given in zip(texts, transformed, encoded, decoded, strict=True):
        is_altered = wanted != given or target.transform.decode(wanted) != text
        altered += is_altered
        if not document.ids or (target.lossless and is_altered):
            continue
        if document.counts.max() >= 1 << 16:
            raise UsageError(f"a token is worth {document.counts.max()} bytes; at most 65535 fit")
        digests.append(caseops.text_digest(text))
        num_bytes += int(document.counts.sum())
        if with_gzip:
            gzip_bytes += len(gzip.compress(text.encode(), 9))
        rows = [[sp.bos_id(), *document.ids], [0, *document.counts]]
        parts.append(np.array(rows, dtype=np.uint16))
    documents = len(parts) - 1
    dropped = len(texts) - documents
    tokens = np.concatenate(parts, axis=1)
    return EncodedBatch(tokens, documents, num_bytes, gzip_bytes, altered, dropped)


def check_table(target: Target, table: ByteTable, batch: EncodedBatch) -> None:
    """Raises UsageError where the byte table and the decoded text disagree, because every
    bits-per-byte figure would be wrong.
    """
    counted = table.count(batch.tokens[0])
    if counted != batch.bytes:
        raise UsageError(
            f"{target.tokenizer_file} does not suit byte counting: "
            f"table {counted}, text {batch.bytes}"
        )


def encode(
    target: Target, documents: Iterable[str], entry: SplitEntry, split: str
) -> Iterator[np.ndarray]:
    """Yields the tokens of one batch of documents after another, and adds them up in `entry`.

    Raises UsageError where their bytes cannot be counted.
    """
    sp = load_tokenizer(target.model, target.tokenizer_file)
    table = ByteTable.from_sentencepiece(sp)
    digests: list[bytes] = []
    with_gzip = split == "val"
    if with_gzip:
        entry.gzip_bytes = 0
    stream = iter(documents)
    altered = 0
    dropped = 0
    while texts := list(itertools.islice(stream, BATCH_DOCUMENTS)):
        if target.transform:
            batch = encode_caseops_batch(texts, sp, target, with_gzip, digests)
        else:
            batch = encode_batch(texts, sp, target.lossless, with_gzip)
            check_table(target, table, batch)
        entry.documents += batch.documents
        entry.bytes += batch.bytes
        if with_gzip:
            entry.gzip_bytes += batch.gzip_bytes
        altered += batch.altered
        dropped += batch.dropped
        yield batch.tokens
    if target.transform:
        entry.text_sha256 = caseops.split_digest(digests)
    if altered or dropped:
        told = f"{altered} documents do not come back exactly from the tokenizer"
        print(f"{split}: {told}, {dropped} left out")


def recut(arrays: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Yields the same columns in arrays of exactly `length` of them, the last one shorter."""
    pending: list[np.ndarray] = []
    num_pending = 0
    for array in arrays:
        pending.append(array)
        num_pending += array.shape[1]
        if num_pending >= length:
            joined = np.concatenate(pending, axis=1)
            num_pending %= length
            full = joined.shape[1] - num_pending
            yield from np.split(joined[:, :full], full // length, axis=1)
            pending = [joined[:, full:]]
    if num_pending:
        yield np.concatenate(pending, axis=1)


def write_split(target: Target, folder: Path, split: str, documents: Iterable[str]) -> SplitEntry:
    """Writes the shards of one split, and the side-car if it has one, into `folder`.

    Raises UsageError if it has no document.
    """
    entry = SplitEntry()
    prefix = target.dataset.rpartition("_sp")[0]
    bar = tqdm(documents, desc=f"encoding {split}", unit="document", disable=None)
    shards = recut(encode(target, bar, entry, split), target.shard_tokens)
    for number, (tokens, *sidecar) in enumerate(shards):
        path = folder / f"{prefix}_{split}_{number:06d}.bin"
        write_shard(path, tokens)
        entry.add_file(path, len(tokens))
        for counts in sidecar:
            path = folder / f"{prefix}_{split}_bytes_{number:06d}.bin"
            write_shard(path, counts)
            entry.add_byte_file(path, len(counts))
    if not entry.documents:
        raise UsageError(f"no documents are left for the {split} split")
    return entry


def write_manifest(target: Target, folder: Path, splits: dict[str, SplitEntry]) -> None:
    """Writes manifest.json into `folder`, last of all files, and prints one line per split."""
    sp = load_tokenizer(target.model, target.tokenizer_file)
    entries = {split: entry.as_manifest() for split, entry in splits.items()}
    del entries["train"]["gzip_bytes"]  # the figure for scale is of validation only
    manifest = {
        "version": 1,
        "dataset": target.dataset,
        "source": target.source,
        "inputs": target.inputs,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "tokenizer": {
            "file": target.tokenizer_file,
            "sha256": sha256(target.model),
            "vocab_size": sp.vocab_size(),
            "bos_id": sp.bos_id(),
        },
        "splits": entries,
    }
    if target.transform:
        manifest["transform"] = target.transform.name
    content = json.dumps(manifest, indent=1) + "\n"
    write_atomic(folder / "manifest.json", content.encode())
    for split, entry in splits.items():
        print(describe_split(split, entry))


def describe_split(split: str, entry: SplitEntry) -> str:
    """The line that is printed about a split."""
    line = f"{split}: {entry.documents} documents, {entry.tokens} tokens, {entry.bytes} bytes, "
    line += f"{entry.tokens / max(entry.bytes, 1):.4f} tokens per byte"
    if entry.gzip_bytes:
        bits = 8 * entry.gzip_bytes / entry.bytes
        line += f", {bits:.4f} bits per byte by gzip -9 of each document"
    return line


def write_dataset(target: Target, splits: dict[str, Iterable[str]], force: bool) -> None:
    """Writes all splits under a temporary name, then puts tokenizer and data set in place.

    Raises UsageError rather than replace the tokenizer of other data sets, unless `force` is given.
    A tokenizer that was trained here belongs to this data set alone and may be replaced.
    """
    occupied = target.tokenizer.exists()
    if occupied:
        occupied = read_regular(target.tokenizer, MAX_TOKENIZER_BYTES) != target.model
    if occupied and not force and not target.lossless:
        raise UsageError(f"{target.tokenizer} exists with other content; --force replaces it")
    staging = target.folder.with_name(f".{target.dataset}.{os.getpid()}.part")
    try:
        staging.mkdir(parents=True)
        entries = {}
        for split, documents in splits.items():
            entries[split] = write_split(target, staging, split, documents)
        write_manifest(target, staging, entries)
        write_atomic(target.tokenizer, target.model)
        put_in_place(staging, target.folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"wrote {target.folder}")


# === Two at once ==================================================================================
def lock_dataset(args: argparse.Namespace, dataset: str) -> None:
    """Waits until no other process prepares this data set, and keeps others waiting until the end.

    Then tidies up after a process that was killed.
    """
    folder = args.data_dir / "datasets" / dataset
    lock = FileLock(folder.with_name(f".{dataset}.lock"))
    try:
        if not lock.take():
            print(f"{folder}: waiting for {lock.holder}", file=sys.stderr)
            lock.take(wait=True)
    except OSError:
        # Where nothing can be written, nothing can be lost: the data set is there or is not.
        return
    args.locks.callback(lock.release)
    if lock.reason:
        print(f"{lock.reason}; do not prepare {dataset} twice at once", file=sys.stderr)
        return
    for path in folder.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(dataset)}\.\d+\.part", path.name):
            shutil.rmtree(path, ignore_errors=True)
    aside = aside_of(folder)
    if aside.exists() and not folder.exists():
        aside.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def aside_of(folder: Path) -> Path:
    """Where a data set stays until the new one is in its place."""
    return folder.with_name(f".{folder.name}.old")


def put_in_place(staging: Path, folder: Path) -> None:
    """Replaces a data set by a new one, so that a kill leaves the old one or the new."""
    aside = aside_of(folder)
    if folder.exists():
        folder.rename(aside)
    staging.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


# Values of --caseops besides the names of transforms.
NO_CASEOPS = "none"
BEST_CASEOPS = "best"


def transform_of(args: argparse.Namespace) -> caseops.Transform | None:
    """The transform that --caseops names, or None.

    Without a name it is the published one for a tokenizer that is given, else the one of our own,
    which scores better on data made here (EXPERIMENTS.md, 2026-11-30).
    """
    if args.caseops == NO_CASEOPS:
        return None
    if args.caseops == BEST_CASEOPS:
        return caseops.PUBLISHED if getattr(args, "tokenizer", None) else caseops.BEFORE_SPACE
    return caseops.TRANSFORMS[args.caseops]


def dataset_name(name: str, vocab_size: int, transform: caseops.Transform | None) -> str:
    """The name of a data set that is made here."""
    return f"{name}_sp{vocab_size}_caseops" if transform else f"{name}_sp{vocab_size}"


def transform_inputs(transform: caseops.Transform | None) -> list[str]:
    """What the transform adds to the digest of the inputs; data sets without one keep theirs."""
    return [transform.name] if transform else []


def inputs_digest(*inputs: object) -> str:
    """A hash that changes with any of the inputs and with the version of SentencePiece."""
    return sha256(json.dumps([spm.__version__, *inputs]).encode())


class PreparedFile(NamedTuple):
    """A file that a manifest names."""

    path: Path
    sha256: str

    def is_intact(self) -> bool:
        """Whether it is there with the content that the manifest names."""
        return self.path.is_file() and file_sha256(self.path) == self.sha256


def prepared_files(data_dir: Path, folder: Path, manifest: dict[str, Any]) -> list[PreparedFile]:
    """All files that a manifest names. Raises LookupError or TypeError if it is another tool's."""
    files = []
    for entry in manifest["splits"].values():
        for file in [*entry["files"], *entry.get("byte_files", [])]:
            files.append(PreparedFile(folder / file["name"], file["sha256"]))
    tokenizer = manifest["tokenizer"]
    model = data_dir / "tokenizers" / tokenizer["file"]
    files.append(PreparedFile(model, tokenizer["sha256"]))
    return files


def is_prepared(args: argparse.Namespace, dataset: str, inputs: str) -> bool:
    """Whether the data set was made from the same inputs and every file is intact.

    Raises UsageError if the folder holds anything else: nothing of value is overwritten without
    --force.
    """
    lock_dataset(args, dataset)
    folder = args.data_dir / "datasets" / dataset
    if args.force or not folder.exists():
        return False
    try:
        manifest = json.loads(read_regular(folder / "manifest.json", MAX_JSON_BYTES))
        files = prepared_files(args.data_dir, folder, manifest)
        made_from = manifest.get("inputs")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        text = f"{folder} exists without a usable manifest.json; --force replaces it"
        raise UsageError(text) from None
    if made_from != inputs:
        text = f"{folder} was made from other inputs; --force replaces it"
        raise UsageError(f"{text}, --name puts another beside it")
    intact = all(file.is_intact() for file in files)
    if intact:
        print(f"{folder} is there and intact; --force makes it anew")
    return intact


# === pydocs: documentation of the installed Python, NumPy and PyTorch =============================
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "idlelib",
    "site-packages",
    "dist-packages",
    "_vendor",
    "third_party",
    "distutils",  # newer Pythons lack this one and the next
    "lib2to3",
}
MIN_DOCUMENT_BYTES = 200
MAX_DOCUMENT_BYTES = 10_000  # a longer module is cut between docstrings, into equal parts
PYDOCS_VAL_DOCUMENTS = 100
SHINGLE_WORDS = 32
MAX_SHARED = 0.2  # share of a validation document's shingles that other documents may contain


class DocstringCollector:
    """Collects the docstrings of a syntax tree in source order."""

    def __init__(self) -> None:
        """Starts with nothing collected."""
        self.found: list[str] = []

    def visit(self, node: ast.AST, name: str) -> None:
        """Collects below `node`, which lies in the definition with the qualified name `name`."""
        if is_doc_call(node):
            self.add_attached(node, name)
            return
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if hasattr(node, "name"):
                name = f"{name}.{node.name}"
            text = ast.get_docstring(node)
            if text:
                self.found.append(f"{name}\n\n{text.strip()}")
        for child in ast.iter_child_nodes(node):
            self.visit(child, name)

    def add_attached(self, call: ast.Call, name: str) -> None:
        """Collects the text that a call such as add_docstr(torch.abs, "...") attaches to something.

        The name of the thing is the first argument, or the dotted strings in add_newdoc("numpy",
        "ndarray", ("T", ...)).
        """
        strings = []
        for node in ast.walk(call):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
        texts = [string for string in strings if "\n" in string.strip()]
        if not texts:
            return
        if len(call.args) > 1:
            if isinstance(call.args[0], ast.Constant):
                name = ".".join(s for s in strings if s.replace(".", "").isidentifier())
            else:
                name = ast.unparse(call.args[0])
        longest = max(texts, key=len)
        self.found.append(f"{name}\n\n{inspect.cleandoc(longest).strip()}")


def is_doc_call(node: ast.AST) -> bool:
    """Whether this calls a function whose name speaks of documentation, as add_docstr does."""
    if not isinstance(node, ast.Call):
        return False
    return "doc" in getattr(node.func, "attr", getattr(node.func, "id", ""))


def docstrings(source: bytes, module: str) -> list[str]:
    """Every docstring of a module in source order, each headed by the qualified name of what it
    documents.

    Includes strings attached by a call: PyTorch and NumPy describe their compiled functions that
    way. Returns [] for a source that this Python cannot parse.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    collector = DocstringCollector()
    collector.visit(tree, module)
    return collector.found


def cut(sections: list[str]) -> list[str]:
    """Joins the docstrings of a module into documents of like length, about MAX_DOCUMENT_BYTES at
    most.
    """
    if not sections:
        return []
    ends = np.cumsum([len(section.encode()) for section in sections])
    total = int(ends[-1])
    num_parts = -(-total // MAX_DOCUMENT_BYTES)
    parts: dict[int, list[str]] = {}
    for section, end in zip(sections, ends.tolist(), strict=True):
        number = (end - 1) * num_parts // total
        parts.setdefault(number, []).append(section)
    return ["\n\n\n".join(part) for part in parts.values()]


class Module(NamedTuple):
    """The source of a Python module."""

    name: str
    path: Path


def modules_of(prefix: str, root: Path) -> Iterator[Module]:
    """Yields the modules of a package in sorted order, without those in SKIPPED_FOLDERS."""
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(inner[:-1]):
            words = [word for word in (prefix, *inner) if word not in ("", "__init__")]
            yield Module(".".join(words), path)


def python_documents(packages: dict[str, Path]) -> list[str]:
    """One document per module of each folder, long ones cut; the keys are dotted prefixes, "" for
    the stdlib.

    Sources are parsed, not imported, in sorted order, so that the same versions give the same list.
    Tiny documents and exact duplicates are left out.
    """
    modules = []
    for prefix, root in packages.items():
        modules += modules_of(prefix, root)
    documents = []
    for module in tqdm(modules, desc="parsing", unit="file", disable=None):
        documents += cut(docstrings(module.path.read_bytes(), module.name))
    distinct = dict.fromkeys(documents)
    return [text for text in distinct if len(text.encode()) >= MIN_DOCUMENT_BYTES]


def shared_fraction(documents: list[str]) -> np.ndarray:
    """For each document, the share of its distinct shingles (32 words in a row) that another one
    also contains.

    Returns (documents,) float64. Shingles are hashed to 64 bits, so a false match is next to
    impossible.
    """
    factors = np.random.default_rng(0).integers(1, 2**63, SHINGLE_WORDS, dtype=np.uint64)
    shingles = []
    for text in documents:
        words = np.array([zlib.crc32(word.encode()) + 1 for word in text.split()], dtype=np.uint64)
        words = np.pad(words, (0, max(0, SHINGLE_WORDS - len(words))))
        windows = np.lib.stride_tricks.sliding_window_view(words, SHINGLE_WORDS)
        shingles.append(np.unique(windows @ factors))
    owner = np.repeat(np.arange(len(documents)), [len(distinct) for distinct in shingles])
    _, inverse, counts = np.unique(
        np.concatenate(shingles), return_inverse=True, return_counts=True
    )
    is_shared = counts[inverse] > 1
    return np.bincount(owner, weights=is_shared) / np.bincount(owner)


class HeldOut(NamedTuple):
    """Documents divided between the splits, each shuffled."""

    train: list[str]
    val: list[str]


def hold_out(documents: list[str], num_val: int, seed: int) -> HeldOut:
    """Divides documents; validation takes one document of each of num_val length classes.

    Only a document that shares at most MAX_SHARED of its shingles with all others together may
    become validation, so families of near-copies stay in training.
    """
    rng = random.Random(seed)
    shared = shared_fraction(documents)
    eligible = [i for i in range(len(documents)) if shared[i] <= MAX_SHARED]
    eligible.sort(key=lambda i: len(documents[i]))
    val = {int(rng.choice(length_class)) for length_class in np.array_split(eligible, num_val)}
    order = rng.sample(range(len(documents)), len(documents))
    return HeldOut(
        train=[documents[i] for i in order if i not in val],
        val=[documents[i] for i in order if i in val],
    )


def package_folder(package: str) -> Path:
    """The folder of an installed package, which is not imported. Raises UsageError if there is
    none.
    """
    try:
        return Path(importlib.util.find_spec(package).submodule_search_locations[0])
    except (AttributeError, TypeError, ModuleNotFoundError):
        text = f"--packages {package}: there is no installed package of that name"
        raise UsageError(text) from None


def run_pydocs(args: argparse.Namespace) -> None:
    """Documentation of the installed Python, NumPy and PyTorch, with a tokenizer trained on it."""
    from pydoc_data import topics

    packages = {"": Path(sysconfig.get_paths()["stdlib"])}
    python = f"{platform.python_implementation()} {platform.python_version()}"
    source = f"docstrings and help topics of {python}"
    for package in args.packages:
        packages[package] = package_folder(package)
        source += f", {package} {importlib.metadata.version(package)}"
    transform = transform_of(args)
    dataset = dataset_name(args.name, args.vocab_size, transform)
    options = [args.vocab_size, args.seed, args.shard_tokens]
    inputs = inputs_digest(source, *options, *transform_inputs(transform))
    if is_prepared(args, dataset, inputs):
        return
    documents = [f"{name}\n\n{text.strip()}" for name, text in sorted(topics.topics.items())]
    documents += python_documents(packages)
    splits = hold_out(documents, PYDOCS_VAL_DOCUMENTS, args.seed)
    target = Target(
        data_dir=args.data_dir,
        dataset=dataset,
        source=source,
        inputs=inputs,
        model=train_tokenizer(splits.train, args.vocab_size, transform),
        tokenizer_file=f"{dataset}.model",
        lossless=True,
        shard_tokens=args.shard_tokens,
        transform=transform,
    )
    write_dataset(target, {"train": splits.train, "val": splits.val}, args.force)


# === text: documents from files ===================================================================
BROKEN_ARCHIVE: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
if zstandard:
    BROKEN_ARCHIVE += (zstandard.ZstdError,)


class Document(NamedTuple):
    """A document of an input file."""

    text: str
    split: str
    where: str  # FILE:LINE
    key: bytes  # as document_key makes it


class Line(NamedTuple):
    """A text and the line of its file that it begins on."""

    number: int
    text: str


MAX_TEXT_BYTES = 1 << 28  # of a document, as a line or a file


def open_input(path: Path) -> BinaryIO:
    """Decompressed bytes of a file. Raises UsageError for an unknown suffix."""
    kind = path.suffix
    # Files are read more than once, which nothing but a file allows.
    file = open_regular(path)
    if kind in (".zst", ".gz"):
        kind = "".join(path.suffixes[-2:])
    if kind in (".txt", ".jsonl"):
        return file
    if kind == ".jsonl.gz":
        return gzip.open(file)
    if kind != ".jsonl.zst":
        raise UsageError(f"{path}: expected .jsonl, .jsonl.zst, .jsonl.gz or .txt")
    if zstandard is None:
        raise UsageError(f"{path}: reading .zst files needs the zstandard package")
    decompressor = zstandard.ZstdDecompressor()
    return io.BufferedReader(decompressor.stream_reader(file, read_across_frames=True))


def parse_line(line: bytes, field: str) -> str:
    """The text of one JSON line. Raises ValueError with the reason if there is none."""
    record = json.loads(line.decode())
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"has no text under the key {field!r}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half of a surrogate pair, which is not text")
    return text


def read_file(path: Path, field: str) -> Iterator[Line]:
    """Yields the texts: a .txt file is one document, a .jsonl file holds one JSON object a line.

    Raises UsageError naming FILE:LINE for malformed input, and for a file without any text.
    """
    is_txt = path.suffix == ".txt"
    number = 0
    is_empty = True
    try:
        with open_input(path) as file:
            # A file without line ends must not be read whole, whatever its size.
            read = file.read if is_txt else file.readline
            lines = [read(MAX_TEXT_BYTES)] if is_txt else iter(partial(read, MAX_TEXT_BYTES), b"")
            for number, line in enumerate(lines, 1):
                if len(line) == MAX_TEXT_BYTES:
                    raise UsageError(f"{path}:{number} is longer than {MAX_TEXT_BYTES:,} bytes")
                if line.strip():
                    is_empty = False
                    yield Line(number, line.decode() if is_txt else parse_line(line, field))
    except UsageError:
        raise
    except UnicodeDecodeError as error:
        number += error.object.count(b"\n", 0, error.start)
        raise UsageError(f"{path}:{number} is not UTF-8") from None
    except json.JSONDecodeError as error:
        text = f"{path}:{number} is not JSON: {error.msg}, column {error.colno}"
        raise UsageError(text) from None
    except BROKEN_ARCHIVE as error:
        raise UsageError(f"{path}:{number + 1} cannot be decompressed: {error}") from None
    except ValueError as error:
        raise UsageError(f"{path}:{number} {error}") from None
    except RecursionError:
        raise UsageError(f"{path}:{number} is nested too deeply") from None
    if is_empty:
        raise UsageError(f"{path}:1 is empty")


def read_corpus(args: argparse.Namespace) -> Iterator[Document]:
    """Yields every document of the input files, validation files first. Nothing is kept in memory.

    Without validation files the hash of a text decides its split, so equal texts fall on the same
    side.
    """
    for path in args.val:
        for line in read_file(path, args.key):
            key = document_key(line.text, args.seed)
            yield Document(line.text, "val", f"{path}:{line.number}", key)
    for path in args.files:
        for line in read_file(path, args.key):
            key = document_key(line.text, args.seed)
            is_held_out = not args.val and fraction(key[:8]) < args.val_fraction
            split = "val" if is_held_out else "train"
            yield Document(line.text, split, f"{path}:{line.number}", key)


def document_key(text: str, seed: int) -> bytes:
    """A seeded hash of a text with its white space folded: 16 bytes."""
    salt = seed.to_bytes(8, "little", signed=True)
    folded = " ".join(text.split()).encode()
    return hashlib.blake2b(folded, digest_size=16, salt=salt).digest()


def fraction(digest: bytes) -> float:
    """A hash as a number in [0, 1)."""
    return int.from_bytes(digest, "little") / 256 ** len(digest)


class Survey(NamedTuple):
    """What a first reading of all input files found."""

    val_keys: set[bytes]  # of the validation documents
    train_bytes: int  # of training text


def survey(args: argparse.Namespace) -> Survey:
    """Reads everything once.

    Raises UsageError for malformed input and, without --drop-overlap, for training documents that
    are in validation.
    """
    val_keys: set[bytes] = set()
    train_bytes = 0
    overlap: list[str] = []
    for document in tqdm(read_corpus(args), desc="checking", unit="document", disable=None):
        if document.split == "val":
            val_keys.add(document.key)
        elif document.key in val_keys:
            overlap.append(document.where)
        else:
            train_bytes += len(document.text.encode())
    if not val_keys:
        text = "no document fell to validation; raise --val-fraction or name files with --val"
        raise UsageError(text)
    if overlap and not args.drop_overlap:
        text = f"is in the validation set, like {len(overlap)} training documents in all"
        raise UsageError(f"{overlap[0]} {text}; --drop-overlap leaves them out of training")
    if overlap:
        print(f"train: {len(overlap)} documents left out because they are in the validation set")
    return Survey(val_keys, train_bytes)


def texts_of(
    args: argparse.Namespace, split: str, val_keys: set[bytes], share: float = 1.0
) -> Iterator[str]:
    """Yields the texts of a split, or about a share of them; no training text that validation
    holds.
    """
    for document in read_corpus(args):
        is_overlap = split == "train" and document.key in val_keys
        if document.split == split and not is_overlap and fraction(document.key[8:]) < share:
            yield document.text


def text_inputs(args: argparse.Namespace, model: bytes, vocab_size: int) -> str:
    """A hash of everything that decides the content of a data set made from files."""
    files = []
    for paths in (args.files, args.val):
        files.append([file_sha256(path) for path in paths])
    options = [
        args.key,
        args.seed,
        args.shard_tokens,
        args.drop_overlap,
        args.val_fraction,
        vocab_size,
    ]
    return inputs_digest(files, options, sha256(model), *transform_inputs(transform_of(args)))


def describe_files(args: argparse.Namespace) -> str:
    """The manifest's sentence on the input files."""
    train = ", ".join(path.name for path in args.files)
    val = ", ".join(path.name for path in args.val)
    if not val:
        val = f"{args.val_fraction:g} of the documents, by hash"
    return f"text of {train}; validation: {val}"


def run_text(args: argparse.Namespace) -> None:
    """Documents from your own files, with a tokenizer you give or one trained on the training
    documents.
    """
    if not 0 < args.val_fraction < 1:
        raise UsageError(f"--val-fraction {args.val_fraction:g}: must lie between 0 and 1")
    model = b""
    vocab_size = args.vocab_size
    if args.tokenizer:
        model = read_regular(args.tokenizer, MAX_TOKENIZER_BYTES)
        sp = load_tokenizer(model, args.tokenizer)
        vocab_size = sp.vocab_size()
        if bool(transform_of(args)) != bool(caseops.operator_ids(sp)):
            has = "no" if transform_of(args) else "the"
            text = "--caseops needs them, other data cannot use them"
            raise UsageError(f"--tokenizer {args.tokenizer}: has {has} case operators; {text}")
    transform = transform_of(args)
    dataset = dataset_name(args.name, vocab_size, transform)
    # What holds no text is refused before all of it is hashed.
    for path in (*args.files, *args.val):
        with contextlib.closing(read_file(path, args.key)) as lines:
            next(lines)
    inputs = text_inputs(args, model, vocab_size)
    if is_prepared(args, dataset, inputs):
        return
    found = survey(args)
    if not args.tokenizer:
        share = TOKENIZER_SAMPLE_BYTES / max(found.train_bytes, 1)
        texts = texts_of(args, "train", found.val_keys, share)
        model = train_tokenizer(texts, vocab_size, transform)
    target = Target(
        data_dir=args.data_dir,
        dataset=dataset,
        source=describe_files(args),
        inputs=inputs,
        model=model,
        tokenizer_file=args.tokenizer.name if args.tokenizer else f"{dataset}.model",
        lossless=not args.tokenizer,
        shard_tokens=args.shard_tokens,
        transform=transform,
    )
    splits = {split: texts_of(args, split, found.val_keys) for split in ("train", "val")}
    write_dataset(target, splits, args.force)


# === fineweb: the published contest shards ========================================================
class Hub:
    """One commit of a dataset repository on the hub that HF_ENDPOINT names. Every failure becomes a
    UsageError.
    """

    def __init__(self, repo: str, revision: str, staging: Path) -> None:
        """Asks for the commit of a revision. Downloads go to `staging` first."""
        try:
            import huggingface_hub
            from huggingface_hub.errors import HfHubHTTPError
        except ImportError:
            raise UsageError("fineweb needs the huggingface_hub package") from None
        # The bases of the hub's own error hold the HTTP library's error. ImportError: a proxy of a
        # kind that the HTTP library needs another package for.
        self.failures = (OSError, ValueError, ImportError, *HfHubHTTPError.__bases__)
        self.repo = repo
        self.staging = staging
        self.api = huggingface_hub.HfApi()
        self.hf_hub_download = huggingface_hub.hf_hub_download
        self.published: dict[str, Any] = {}  # path -> size and checksum
        self.commit = self.call(self.api.dataset_info, repo, revision=revision).sha

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Calls the hub's client. Raises UsageError for whatever fails there."""
        try:
            return function(*args, **options)
        except self.failures as error:
            reason = " ".join(str(error).split())[:300]
            message = f"{self.repo}: {type(error).__name__}: {reason}"
            raise UsageError(f"{message}{remedy_of(error)}") from None

    def look_up(self, paths: list[str]) -> None:
        """Asks for size and checksum of each path. Raises UsageError if one is missing there."""
        infos = self.call(
            self.api.get_paths_info, self.repo, paths, repo_type="dataset", revision=self.commit
        )
        for info in infos:
            self.published[info.path] = info
        for path in paths:
            if path not in self.published:
                raise UsageError(f"{self.repo} has no {path}")

    def check_space(self, files: dict[str, Path]) -> None:
        """Tells the size of what is missing. Raises UsageError if the disk cannot hold it.

        files: path in the repository -> path here.
        """
        missing = {remote: local for remote, local in files.items() if not local.is_file()}
        size = sum(self.published[remote].size for remote in missing)
        if not size:
            return
        folder = self.staging.parent
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        print(f"{len(missing)} files, {size / 1e9:.1f} GB to download; {free / 1e9:.1f} GB free")
        if size > free:
            raise UsageError(
                f"{folder}: {size / 1e9:.1f} GB do not fit into {free / 1e9:.1f} GB; free some,"
                " lower --train-shards, or set --data-dir"
            )

    def problem(self, remote: str, path: Path) -> str:
        """What is wrong with a local copy of a published file, or an empty string."""
        info = self.published[remote]
        size = path.stat().st_size
        if size != info.size:
            return f"{size} bytes instead of {info.size}"
        if info.lfs:
            if file_sha256(path) != info.lfs.sha256:
                return f"SHA-256 is not the published {info.lfs.sha256}"
        elif git_hash(path) != info.blob_id:  # a small file is known by its git hash
            return f"git hash is not the published {info.blob_id}"
        if path.suffix == ".bin":
            try:
                read_shard(path)
            except UsageError as error:
                return str(error)
        return ""

    def fetch(self, remote: str, local: Path) -> None:
        """Puts a published file at `local` unless an intact copy is there.

        Raises UsageError if it arrives damaged.
        """
        if local.is_file() and not self.problem(remote, local):
            return
        options = dict(repo_type="dataset", revision=self.commit, local_dir=self.staging)
        arrived = Path(self.call(self.hf_hub_download, self.repo, remote, **options))
        if problem := self.problem(remote, arrived):
            arrived.unlink()
            raise UsageError(f"{self.repo}: {remote} arrived damaged: {problem}")
        local.parent.mkdir(parents=True, exist_ok=True)
        arrived.replace(local)


def remedy_of(error: Exception) -> str:
    """What helps against a failure of the connection; empty for others."""
    if isinstance(error, ImportError):
        return "; pip install socksio PySocks, or unset ALL_PROXY, HTTPS_PROXY"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no", "off"):
        return "; unset HF_HUB_OFFLINE"
    if isinstance(error, ConnectionError) or "Connect" in type(error).__name__:
        return "; no network? Behind a proxy set HTTPS_PROXY, for a mirror HF_ENDPOINT"
    return ""


def is_downloaded(args: argparse.Namespace, dataset: str) -> bool:
    """Whether an earlier download has left all files that are asked for, each of them intact."""
    folder = args.data_dir / "datasets" / dataset
    try:
        manifest = json.loads(read_regular(folder / "manifest.json", MAX_JSON_BYTES))
        files = prepared_files(args.data_dir, folder, manifest)
        num_shards = len(manifest["splits"]["train"]["files"])
        has_revision = args.revision in ("main", manifest["inputs"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False
    enough = has_revision and num_shards >= args.train_shards
    return enough and all(file.is_intact() for file in files)


def git_hash(path: Path) -> str:
    """The id of a file's content in git."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class PublishedExport(NamedTuple):
    """What the publisher's manifest says about a data set."""

    num_train_files: int
    num_val_files: int
    stats: dict[str, Any]  # may hold tokens_val and docs_val
    tokenizer: str  # path of the model in the repository


def published_export(path: Path, dataset: str) -> PublishedExport:
    """Reads the publisher's manifest. Raises UsageError if it does not describe the data set."""
    try:
        manifest = json.loads(path.read_text())
        entry = next(item for item in manifest["datasets"] if item["name"] == dataset)
        wanted = entry["tokenizer_name"]
        tokenizer = next(item for item in manifest["tokenizers"] if item["name"] == wanted)
        stats = entry["stats"]
        return PublishedExport(
            num_train_files=int(stats["files_train"]),
            num_val_files=int(stats["files_val"]),
            stats=stats,
            tokenizer=tokenizer["model_path"],
        )
    except (ValueError, KeyError, TypeError, StopIteration):
        text = f"the published manifest.json does not describe {dataset} and its tokenizer"
        raise UsageError(text) from None


def count_shards(folder: Path, split: str, sp: spm.SentencePieceProcessor) -> SplitEntry:
    """Manifest entry of a split that is already in shards: documents by BOS, bytes by the side-car
    or, without one, by the byte table. Operators have none.
    """
    table = ByteTable.from_sentencepiece(sp)
    table.base[caseops.operator_ids(sp)] = 0
    entry = SplitEntry()
    paths = shard_paths(folder, split)
    byte_paths = shard_paths(folder, f"{split}_bytes")
    # The token before a chunk decides whether a leading space counts.
    previous = np.empty(0, dtype=np.uint16)
    for path in tqdm(paths, desc="counting", unit="shard", disable=None):
        shard = read_shard(path)
        for start in range(0, len(shard), COUNT_TOKENS):
            chunk = np.asarray(shard[start : start + COUNT_TOKENS])
            entry.documents += int(np.count_nonzero(chunk == sp.bos_id()))
            entry.bytes += table.count(np.concatenate([previous, chunk]))
            previous = chunk[-1:]
        entry.add_file(path, len(shard))
    if byte_paths:
        entry.bytes = 0
    for path in byte_paths:
        counts = read_shard(path)
        entry.bytes += int(counts.sum(dtype=np.int64))
        entry.add_byte_file(path, len(counts))
    return entry


# The published CaseOps export (PR #1729), whose side-car is part of it.
CASEOPS_VARIANT = "sp8192_caseops"


def published_name(args: argparse.Namespace) -> str:
    """The name of a data set in its repository, which it keeps here."""
    if args.variant == CASEOPS_VARIANT:
        return f"{args.name}_{canonical.CASEOPS_SUFFIX}"
    return f"{args.name}_{args.variant}"


def default_repository(variant: str) -> str:
    """Where the shards of a vocabulary are published."""
    if variant == "sp1024":
        return "willdepueoai/parameter-golf"
    if variant == CASEOPS_VARIANT:
        return "romeerp/parameter-golf-caseops-v1"
    return "kevclark/parameter-golf"


def check_published_totals(folder: Path, val: SplitEntry, stats: dict[str, Any]) -> None:
    """Raises UsageError if the validation split is not as large as the publisher says."""
    counted = {"tokens_val": val.tokens, "docs_val": val.documents}
    for key, value in counted.items():
        if stats.get(key, value) != value:
            text = f"{key} is {value}, the published manifest says {stats[key]}"
            raise UsageError(f"{folder}: {text}")


def run_fineweb(args: argparse.Namespace) -> None:
    """The published contest shards: downloads what is missing, checks every file, writes the
    manifest.
    """
    dataset = published_name(args)
    lock_dataset(args, dataset)
    folder = args.data_dir / "datasets" / dataset
    staging = folder.with_name(f".{dataset}.part")  # stays after a failure, so a download can go on
    try:
        hub = Hub(args.repo or default_repository(args.variant), args.revision, staging)
        hub.look_up([f"{args.root}/manifest.json"])
    except UsageError as error:
        if not is_downloaded(args, dataset):
            raise
        print(f"{folder} is there and intact; the hub was not asked ({error})")
        return
    hub.fetch(f"{args.root}/manifest.json", staging / "published.json")
    export = published_export(staging / "published.json", dataset)
    if args.train_shards > export.num_train_files:
        available = f"{hub.repo} has {export.num_train_files} of {dataset}"
        raise UsageError(f"--train-shards {args.train_shards}: {available}")

    is_caseops = args.variant == CASEOPS_VARIANT
    names = [f"fineweb_val_{i:06d}.bin" for i in range(export.num_val_files)]
    if is_caseops:
        names += [f"fineweb_val_bytes_{i:06d}.bin" for i in range(export.num_val_files)]
    names += [f"fineweb_train_{i:06d}.bin" for i in range(args.train_shards)]
    tokenizer = args.data_dir / "tokenizers" / Path(export.tokenizer).name
    files = {f"{args.root}/{export.tokenizer}": tokenizer}
    for name in names:
        files[f"{args.root}/datasets/{dataset}/{name}"] = folder / name
    hub.look_up(list(files))
    hub.check_space(files)
    for remote, local in tqdm(files.items(), desc="downloading", unit="file", disable=None):
        hub.fetch(remote, local)

    model = tokenizer.read_bytes()
    sp = load_tokenizer(model, export.tokenizer)
    splits = {}
    for split in ("train", "val"):
        splits[split] = count_shards(folder, split, sp)
    check_published_totals(folder, splits["val"], export.stats)
    target = Target(
        data_dir=args.data_dir,
        dataset=dataset,
        source=f"{dataset} as published by {hub.repo} at commit {hub.commit}",
        inputs=hub.commit,
        model=model,
        tokenizer_file=tokenizer.name,
        lossless=False,
        shard_tokens=0,
        transform=caseops.PUBLISHED if is_caseops else None,
    )
    write_manifest(target, folder, splits)
    shutil.rmtree(staging)


# === Command line =================================================================================
def positive(text: str) -> int:
    """An argument that must be a whole number above 0."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def add_command(
    commands: Any, run: Callable[[argparse.Namespace], None], name: str, dataset: str
) -> argparse.ArgumentParser:
    """A subcommand that runs `run`, with the options that all of them have; its help is run's
    docstring.
    """
    command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
    command.set_defaults(run=run)
    add = command.add_argument
    data_dir_help = "root of the layout (default ./data)"
    add("--data-dir", type=Path, default=Path("data"), help=data_dir_help)
    name_help = f"first part of the dataset's name (default {dataset})"
    add("--name", default=dataset, help=name_help)
    return command


def add_encoding_options(command: Any, vocabulary: Any, default_transform: str) -> None:
    """Options of the commands that encode text.

    vocabulary: the command, or a group in it. default_transform: --caseops if it is not given.
    """
    vocab_help = "pieces of a new tokenizer (default 1024)"
    vocabulary.add_argument("--vocab-size", type=positive, default=1024, help=vocab_help)
    add = command.add_argument
    add("--seed", type=int, default=0, help="decides what is held out (default 0)")
    shard_help = "tokens a shard (default 100 M)"
    add("--shard-tokens", type=positive, default=100_000_000, help=shard_help)
    add("--force", action="store_true", help="replace a dataset that is already there")
    names = [*caseops.TRANSFORMS, BEST_CASEOPS, NO_CASEOPS]
    caseops_help = "transform capitals and write a side-car; without NAME the best transform: "
    caseops_help += "the published one with its tokenizer, else caseops_before_space"
    add(
        "--caseops",
        nargs="?",
        const=BEST_CASEOPS,
        default=default_transform,
        choices=names,
        metavar="NAME",
        help=f"{caseops_help} (all: {', '.join(names)}; default {default_transform})",
    )


def add_pydocs(commands: Any) -> None:
    """Describes `prepare_data.py pydocs`."""
    command = add_command(commands, run_pydocs, "pydocs", "pydocs")
    packages = ["numpy", "torch"]
    about = "installed packages to read beside the standard library (default numpy torch)"
    command.add_argument("--packages", nargs="*", default=packages, metavar="PACKAGE", help=about)
    add_encoding_options(command, command, BEST_CASEOPS)


def add_text(commands: Any) -> None:
    """Describes `prepare_data.py text`."""
    command = add_command(commands, run_text, "text", "corpus")
    add = command.add_argument
    kinds = ".jsonl, .jsonl.zst or .jsonl.gz (one object a line)"
    kinds += " or .txt (the whole file is one document)"
    add("files", nargs="+", type=Path, metavar="FILE", help=f"training documents: {kinds}")
    key_help = "key of the JSON objects that holds the text (default text)"
    add("--key", default="text", help=key_help)
    overlap_help = "leave validation documents out of training"
    add("--drop-overlap", action="store_true", help=overlap_help)

    pieces = command.add_mutually_exclusive_group()
    tokenizer_help = "use this SentencePiece model, train none"
    pieces.add_argument("--tokenizer", type=Path, metavar="MODEL", help=tokenizer_help)
    validation = command.add_mutually_exclusive_group()
    val_help = "validation documents"
    validation.add_argument(
        "--val", nargs="+", type=Path, default=[], metavar="FILE", help=val_help
    )
    fraction_help = "or the share to hold out (default 0.01)"
    validation.add_argument("--val-fraction", type=float, default=0.01, help=fraction_help)
    add_encoding_options(command, pieces, NO_CASEOPS)


def add_fineweb(commands: Any) -> None:
    """Describes `prepare_data.py fineweb`."""
    command = add_command(commands, run_fineweb, "fineweb", "fineweb10B")
    add = command.add_argument
    variant_help = f"vocabulary: sp1024, sp8192, {CASEOPS_VARIANT} ... (default sp8192)"
    add("--variant", default="sp8192", help=variant_help)
    shards_help = "100 M tokens each (default 80)"
    add("--train-shards", type=positive, default=80, help=shards_help)
    repo_help = "dataset repository (default: the one that published the variant)"
    add("--repo", help=repo_help)
    add("--revision", default="main", help="branch, tag or commit (default main)")
    root_help = "folder of the export in the repository (default datasets)"
    add("--root", default="datasets", help=root_help)


def build_parser() -> argparse.ArgumentParser:
    """The command line: a subcommand per source, and the doctor."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_pydocs(commands)
    add_text(commands)
    add_fineweb(commands)
    command = commands.add_parser("doctor", help=doctor.__doc__.partition(":")[0])
    command.set_defaults(run=doctor.run)
    doctor.add_arguments(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 the doctor found an error, 2 wrong input, told in one line
    on stderr.
    """
    args = build_parser().parse_args(argv)
    try:
        name = getattr(args, "name", "")  # the doctor has none
        if "/" in name:
            text = "must be a name; --data-dir says where the data set goes"
            raise UsageError(f"--name {name}: {text}")
        with contextlib.ExitStack() as args.locks:
            return args.run(args) or 0
    except UsageError as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a missing file, a folder, no permission, a full disk
        print(f"prepare_data.py: {reason_of(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
