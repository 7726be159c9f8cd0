#!/usr/bin/env python3
"""Write the token shards, the tokenizer and the manifest that train_gpt.py reads.

    prepare_data.py pydocs                     10 MB of documentation of the installed packages, no download
    prepare_data.py text train.jsonl.zst --val val.jsonl.zst --tokenizer fineweb_8192_bpe.model
    prepare_data.py fineweb --variant sp8192 --train-shards 80
    prepare_data.py doctor data/datasets/pydocs_sp1024    is it whole, does it fit its tokenizer, is validation unseen

The first three leave the same layout under --data-dir:

    datasets/<dataset>/<prefix>_train_000000.bin ... <prefix>_val_000000.bin, manifest.json
    tokenizers/<tokenizer>.model

Nothing is left half written: files get their names once they are complete. Exit status: 0 done, 1 the doctor found an
error, 2 wrong input, told in one line.
"""

from __future__ import annotations

import argparse
import ast
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
import shutil
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import sentencepiece as spm
from tqdm import tqdm

try:
    import zstandard
except ImportError:  # only .zst files need it
    zstandard = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import doctor  # noqa: E402

from train_gpt import ByteTable, UsageError, read_shard, write_shard  # noqa: E402

TOKENIZER_SAMPLE_BYTES = (
    64_000_000  # training text that a tokenizer is trained on; more changes little
)
BATCH_DOCUMENTS = 512  # encoded at once, over all cores
COUNT_TOKENS = 1 << 22  # counted at once

# ---- Tokenizer, shards and manifest ---------------------------------------------------------------------------------


class Target(NamedTuple):
    """What a dataset is called, what it is made from and where it goes."""

    data_dir: Path
    dataset: str
    source: str  # one sentence for the manifest
    inputs: str  # hash or commit: changes with anything that decides the content
    model: bytes  # serialized SentencePiece model
    tokenizer_file: str
    lossless: bool  # the tokenizer was trained here and must give every document back exactly
    shard_tokens: int

    @property
    def folder(self) -> Path:
        return self.data_dir / "datasets" / self.dataset

    @property
    def tokenizer(self) -> Path:
        return self.data_dir / "tokenizers" / self.tokenizer_file


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def inputs_digest(*inputs: object) -> str:
    return hashlib.sha256(json.dumps([spm.__version__, *inputs]).encode()).hexdigest()


def load_tokenizer(model: bytes, name: object) -> spm.SentencePieceProcessor:
    """Raises UsageError, naming the file, for anything but a SentencePiece model that uint16 shards can hold."""
    try:
        sp = spm.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise UsageError(f"{name} is not a SentencePiece model") from None
    if sp.bos_id() < 0 or sp.vocab_size() > 1 << 16:
        raise UsageError(
            f"{name} has BOS id {sp.bos_id()} and {sp.vocab_size()} pieces; need a BOS and at most 65536"
        )
    return sp


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a lossless byte-fallback BPE model; the same texts give the same bytes.

    No normalisation, and at most one space mark a piece, in front, as the byte table assumes. The newline pieces keep
    line ends out of the words, so that a word at the start of a line counts as one. Raises UsageError if the texts
    cannot fill, or do not fit, the vocabulary.
    """
    model = io.BytesIO()
    options = dict(
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
    )
    options |= dict(
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True
    )
    options |= dict(
        user_defined_symbols=["\n", "\n\n"],
        max_sentence_length=1 << 28,
        num_threads=4,
        minloglevel=2,
    )
    sentences = (
        text.replace("\t", "\n") for text in texts
    )  # the trainer skips sentences with a tab
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=model, vocab_size=vocab_size, **options
        )
    except RuntimeError as error:
        raise UsageError(f"--vocab-size {vocab_size}: {' '.join(str(error).split())}") from None
    return model.getvalue()


def encode(
    target: Target, documents: Iterable[str], entry: dict[str, Any], split: str
) -> Iterator[np.ndarray]:
    """Yields batches of documents as uint16 tokens, each document BOS + ids, and adds them up in `entry`.

    Leaves out empty documents and, with a tokenizer trained here, those it cannot give back (they hold U+2581, which
    SentencePiece uses for the space). Raises UsageError where the byte table and the decoded text disagree, because
    every bits-per-byte figure would be wrong.
    """
    sp = load_tokenizer(target.model, target.tokenizer_file)
    table, bos = ByteTable.from_sentencepiece(sp), sp.bos_id()
    stream, altered, dropped = iter(documents), 0, 0
    while texts := list(itertools.islice(stream, BATCH_DOCUMENTS)):
        ids = sp.encode(texts, num_threads=os.cpu_count() or 1)
        batch, num_bytes = [np.empty(0, dtype=np.uint16)], 0
        for text, document, decoded in zip(texts, ids, sp.decode(ids), strict=True):
            altered += decoded != text
            if not document or (target.lossless and decoded != text):
                dropped += 1
                continue
            raw = decoded.encode()
            num_bytes += len(raw)
            entry["gzip_bytes"] += len(gzip.compress(raw, 9)) if split == "val" else 0
            batch.append(np.array([bos, *document], dtype=np.uint16))
        tokens = np.concatenate(batch)
        if table.count(tokens) != num_bytes:
            raise UsageError(
                f"{target.tokenizer_file} does not suit byte counting: table {table.count(tokens)}, text {num_bytes}"
            )
        entry["documents"] += len(batch) - 1
        entry["bytes"] += num_bytes
        yield tokens
    if altered or dropped:
        print(
            f"{split}: {altered} documents do not come back exactly from the tokenizer, {dropped} left out"
        )


def recut(arrays: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """The same tokens in arrays of exactly `length`, the last one shorter."""
    pending: list[np.ndarray] = []
    held = 0
    for array in arrays:
        pending.append(array)
        held += len(array)
        if held >= length:
            flat = np.concatenate(pending)
            held %= length
            yield from np.split(flat[: len(flat) - held], (len(flat) - held) // length)
            pending = [flat[len(flat) - held :]]
    if held:
        yield np.concatenate(pending)


def write_split(
    target: Target, folder: Path, split: str, documents: Iterable[str]
) -> dict[str, Any]:
    """Writes the shards of one split into `folder`; returns its manifest entry. Raises UsageError if it is empty."""
    entry: dict[str, Any] = {"documents": 0, "tokens": 0, "bytes": 0, "gzip_bytes": 0, "files": []}
    prefix = target.dataset.rpartition("_sp")[0]
    bar = tqdm(documents, desc=f"encoding {split}", unit="document", disable=None)
    for number, tokens in enumerate(recut(encode(target, bar, entry, split), target.shard_tokens)):
        path = folder / f"{prefix}_{split}_{number:06d}.bin"
        write_shard(path, tokens)
        entry["tokens"] += len(tokens)
        entry["files"].append(
            {"name": path.name, "tokens": len(tokens), "sha256": file_sha256(path)}
        )
    if not entry["documents"]:
        raise UsageError(f"no documents are left for the {split} split")
    return entry


def write_manifest(target: Target, folder: Path, splits: dict[str, dict[str, Any]]) -> None:
    """Writes manifest.json into `folder`, last of all files, and prints one line per split."""
    sp = load_tokenizer(target.model, target.tokenizer_file)
    splits["train"].pop("gzip_bytes", None)  # a figure for scale, only of validation
    tokenizer = {"file": target.tokenizer_file, "sha256": hashlib.sha256(target.model).hexdigest()}
    tokenizer |= {"vocab_size": sp.vocab_size(), "bos_id": sp.bos_id()}
    manifest = {
        "version": 1,
        "dataset": target.dataset,
        "source": target.source,
        "inputs": target.inputs,
    }
    manifest |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    manifest |= {"tokenizer": tokenizer, "splits": splits}
    replace_file(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    for split, entry in splits.items():
        line = f"{split}: {entry['documents']} documents, {entry['tokens']} tokens, {entry['bytes']} bytes, "
        line += f"{entry['tokens'] / max(entry['bytes'], 1):.4f} tokens per byte"
        if gzip_bytes := entry.get("gzip_bytes"):
            line += (
                f", {8 * gzip_bytes / entry['bytes']:.4f} bits per byte by gzip -9 of each document"
            )
        print(line)


def replace_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(content)
    partial.replace(path)


def write_dataset(target: Target, splits: dict[str, Iterable[str]], force: bool) -> None:
    """Writes all splits under a temporary name, then puts tokenizer and dataset in place."""
    occupied = target.tokenizer.exists() and target.tokenizer.read_bytes() != target.model
    if occupied and not (force or target.lossless):  # a trained one belongs to this dataset alone
        raise UsageError(f"{target.tokenizer} exists with other content; --force replaces it")
    staging = target.folder.with_name(f".{target.dataset}.part")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        entries = {
            split: write_split(target, staging, split, documents)
            for split, documents in splits.items()
        }
        write_manifest(target, staging, entries)
        replace_file(target.tokenizer, target.model)
        shutil.rmtree(target.folder, ignore_errors=True)
        staging.rename(target.folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"wrote {target.folder}")


def is_prepared(args: argparse.Namespace, dataset: str, inputs: str) -> bool:
    """True if the dataset was made from the same inputs and every file is intact.

    Raises UsageError if the folder holds anything else: nothing of value is overwritten without --force.
    """
    folder = args.data_dir / "datasets" / dataset
    if args.force or not folder.exists():
        return False
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {
            folder / file["name"]: file["sha256"]
            for s in manifest["splits"].values()
            for file in s["files"]
        }
        files[args.data_dir / "tokenizers" / manifest["tokenizer"]["file"]] = manifest["tokenizer"][
            "sha256"
        ]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{folder} exists without a usable manifest.json; --force replaces it"
        ) from None
    if manifest.get("inputs") != inputs:
        raise UsageError(
            f"{folder} was made from other inputs; --force replaces it, --name puts another beside it"
        )
    if intact := all(
        path.is_file() and file_sha256(path) == sha256 for path, sha256 in files.items()
    ):
        print(f"{folder} is there and intact; --force makes it anew")
    return intact


# ---- pydocs: documentation of the installed Python, NumPy and PyTorch -----------------------------------------------

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "idlelib",
    "site-packages",
    "dist-packages",
    "_vendor",
    "third_party",
}
SKIPPED_FOLDERS |= {"distutils", "lib2to3"}  # gone from newer Pythons
MIN_DOCUMENT_BYTES, MAX_DOCUMENT_BYTES = (
    200,
    10_000,
)  # a longer module is cut between docstrings, into equal parts
PYDOCS_VAL_DOCUMENTS = 100
SHINGLE_WORDS = 32
MAX_SHARED = 0.2  # share of a validation document's shingles that other documents may contain


def docstrings(source: bytes, module: str) -> list[str]:
    """Every docstring of a module in source order, each headed by the qualified name of what it documents.

    Includes strings attached by a call, as in add_docstr(torch.abs, "..."): PyTorch and NumPy describe their compiled
    functions that way. Returns [] for a source that this Python cannot parse.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    found: list[str] = []

    def attached(call: ast.Call, name: str) -> None:
        strings = [
            n.value
            for n in ast.walk(call)
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        ]
        if texts := [s for s in strings if "\n" in s.strip()]:
            if len(call.args) > 1 and isinstance(
                call.args[0], ast.Constant
            ):  # ("numpy", "ndarray", ("T", "..."))
                name = ".".join(s for s in strings if s.replace(".", "").isidentifier())
            elif len(call.args) > 1:
                name = ast.unparse(call.args[0])
            found.append(f"{name}\n\n{inspect.cleandoc(max(texts, key=len)).strip()}")

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.Call) and "doc" in getattr(
            node.func, "attr", getattr(node.func, "id", "")
        ):
            attached(node, name)
            return
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{name}.{node.name}" if hasattr(node, "name") else name
            found.extend(f"{name}\n\n{text.strip()}" for text in [ast.get_docstring(node)] if text)
        for child in ast.iter_child_nodes(node):
            visit(child, name)

    visit(tree, module)
    return found


def cut(sections: list[str]) -> list[str]:
    """Joins docstrings into documents of about MAX_DOCUMENT_BYTES at most, all of one module alike in length."""
    ends = np.cumsum([len(section.encode()) for section in sections])
    parts: dict[int, list[str]] = {}
    for section, end in zip(sections, ends, strict=True):
        parts.setdefault(
            int((end - 1) * -(-ends[-1] // MAX_DOCUMENT_BYTES) // ends[-1]), []
        ).append(section)
    return ["\n\n\n".join(part) for part in parts.values()]


def python_documents(packages: dict[str, Path]) -> list[str]:
    """One document per module (long ones cut) of each folder, named by its dotted prefix ("" for the stdlib).

    Sources are parsed, not imported, in sorted order, so that the same versions give the same list. Tiny documents and
    exact duplicates are left out.
    """
    documents = []
    files = [
        (prefix, root, path)
        for prefix, root in packages.items()
        for path in sorted(root.rglob("*.py"))
    ]
    for prefix, root, path in tqdm(files, desc="parsing", unit="file", disable=None):
        inner = path.relative_to(root).with_suffix("").parts
        if not SKIPPED_FOLDERS & set(inner[:-1]):
            module = ".".join(part for part in (prefix, *inner) if part not in ("", "__init__"))
            documents += cut(docstrings(path.read_bytes(), module))
    return [text for text in dict.fromkeys(documents) if len(text.encode()) >= MIN_DOCUMENT_BYTES]


def shared_fraction(documents: list[str]) -> np.ndarray:
    """For each document, the share of its distinct shingles (32 words in a row) that another one also contains.

    Returns (documents,) float64. Shingles are hashed to 64 bits, so a false match is next to impossible.
    """
    factors = np.random.default_rng(0).integers(1, 2**63, SHINGLE_WORDS, dtype=np.uint64)
    shingles = []
    for text in documents:
        words = np.array([zlib.crc32(word.encode()) + 1 for word in text.split()], dtype=np.uint64)
        words = np.pad(words, (0, max(0, SHINGLE_WORDS - len(words))))
        shingles.append(
            np.unique(np.lib.stride_tricks.sliding_window_view(words, SHINGLE_WORDS) @ factors)
        )
    owner = np.repeat(np.arange(len(documents)), [len(s) for s in shingles])
    _, inverse, counts = np.unique(
        np.concatenate(shingles), return_inverse=True, return_counts=True
    )
    return np.bincount(owner, weights=counts[inverse] > 1) / np.bincount(owner)


def hold_out(documents: list[str], num_val: int, seed: int) -> tuple[list[str], list[str]]:
    """Splits into (train, validation), both shuffled; validation takes one document of each of num_val length classes.

    Only a document that shares at most MAX_SHARED of its shingles with all others together may become validation, so
    families of near-copies stay in training.
    """
    rng = random.Random(seed)
    shared = shared_fraction(documents)
    eligible = sorted(
        (i for i in range(len(documents)) if shared[i] <= MAX_SHARED),
        key=lambda i: len(documents[i]),
    )
    val = {int(rng.choice(length_class)) for length_class in np.array_split(eligible, num_val)}
    order = rng.sample(range(len(documents)), len(documents))
    return [documents[i] for i in order if i not in val], [documents[i] for i in order if i in val]


def run_pydocs(args: argparse.Namespace) -> None:
    """Documentation of the installed Python, NumPy and PyTorch, with a tokenizer trained on it."""
    from pydoc_data import topics

    packages = {"": Path(sysconfig.get_paths()["stdlib"])}
    source = f"docstrings and help topics of {platform.python_implementation()} {platform.python_version()}"
    for package in args.packages:
        try:
            packages[package] = Path(
                importlib.util.find_spec(package).submodule_search_locations[0]
            )
            source += f", {package} {importlib.metadata.version(package)}"
        except (AttributeError, TypeError, ModuleNotFoundError):
            raise UsageError(
                f"--packages {package}: there is no installed package of that name"
            ) from None
    dataset = f"{args.name}_sp{args.vocab_size}"
    inputs = inputs_digest(source, args.vocab_size, args.seed, args.shard_tokens)
    if is_prepared(args, dataset, inputs):
        return
    documents = [f"{name}\n\n{text.strip()}" for name, text in sorted(topics.topics.items())]
    train, val = hold_out(documents + python_documents(packages), PYDOCS_VAL_DOCUMENTS, args.seed)
    model = train_tokenizer(train, args.vocab_size)
    target = Target(
        args.data_dir, dataset, source, inputs, model, f"{dataset}.model", True, args.shard_tokens
    )
    write_dataset(target, {"train": train, "val": val}, args.force)


# ---- text: documents from files -------------------------------------------------------------------------------------

BROKEN_ARCHIVE = (
    EOFError,
    zlib.error,
    gzip.BadGzipFile,
    *([zstandard.ZstdError] if zstandard else []),
)


class Document(NamedTuple):
    text: str
    split: str
    where: str  # FILE:LINE
    key: bytes  # seeded hash of the text with its white space folded, 16 bytes


def open_input(path: Path) -> BinaryIO:
    """Decompressed bytes of a file. Raises UsageError for an unknown suffix."""
    kind = "".join(path.suffixes[-2:]) if path.suffix in (".zst", ".gz") else path.suffix
    if kind not in (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst"):
        raise UsageError(f"{path}: expected .jsonl, .jsonl.zst, .jsonl.gz or .txt")
    if kind == ".jsonl.zst":
        if zstandard is None:
            raise UsageError(f"{path}: reading .zst files needs the zstandard package")
        return io.BufferedReader(
            zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True)
        )
    return gzip.open(path) if kind == ".jsonl.gz" else path.open("rb")


def parse_line(line: bytes, field: str) -> str:
    """The text of one JSON line. Raises ValueError with the reason if there is none."""
    record = json.loads(line.decode())
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"has no text under the key {field!r}")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("holds half of a surrogate pair, which is not text")
    return text


def read_file(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """Yields (line number, text): a .txt file is one document, a .jsonl file holds one JSON object a line.

    Raises UsageError naming FILE:LINE for malformed input, and for a file without any text.
    """
    is_txt, number, found = path.suffix == ".txt", 0, False
    try:
        with open_input(path) as file:
            for number, line in enumerate([file.read()] if is_txt else file, 1):
                if line.strip():
                    found = True
                    yield number, line.decode() if is_txt else parse_line(line, field)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}:{number + error.object.count(10, 0, error.start)} is not UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}:{number} is not JSON: {error.msg}, column {error.colno}"
        ) from None
    except BROKEN_ARCHIVE as error:
        raise UsageError(f"{path}:{number + 1} cannot be decompressed: {error}") from None
    except ValueError as error:
        raise (
            error if isinstance(error, UsageError) else UsageError(f"{path}:{number} {error}")
        ) from None
    if not found:
        raise UsageError(f"{path}:1 is empty")


def read_corpus(args: argparse.Namespace) -> Iterator[Document]:
    """Every document of the input files with its split, validation files first. Nothing is kept in memory."""
    salt = args.seed.to_bytes(8, "little", signed=True)
    for is_val, path in [(True, path) for path in args.val] + [
        (False, path) for path in args.files
    ]:
        for number, text in read_file(path, args.key):
            key = hashlib.blake2b(
                " ".join(text.split()).encode(), digest_size=16, salt=salt
            ).digest()
            held_out = (
                not args.val and fraction(key[:8]) < args.val_fraction
            )  # equal texts fall on the same side
            yield Document(text, "val" if is_val or held_out else "train", f"{path}:{number}", key)


def fraction(digest: bytes) -> float:
    return int.from_bytes(digest, "little") / 256 ** len(digest)


def survey(args: argparse.Namespace) -> tuple[set[bytes], int]:
    """Reads everything once and returns the keys of the validation documents and the bytes of training text.

    Raises UsageError for malformed input and, without --drop-overlap, for training documents that are in validation.
    """
    val_keys: set[bytes] = set()
    train_bytes, overlap = 0, []
    for document in tqdm(read_corpus(args), desc="checking", unit="document", disable=None):
        if document.split == "val":
            val_keys.add(document.key)
        elif document.key in val_keys:
            overlap.append(document.where)
        else:
            train_bytes += len(document.text.encode())
    if not val_keys:
        raise UsageError(
            "no document fell to validation; raise --val-fraction or name files with --val"
        )
    if overlap and not args.drop_overlap:
        line = f"is in the validation set, like {len(overlap)} training documents in all"
        raise UsageError(f"{overlap[0]} {line}; --drop-overlap leaves them out of training")
    if overlap:
        print(f"train: {len(overlap)} documents left out because they are in the validation set")
    return val_keys, train_bytes


def run_text(args: argparse.Namespace) -> None:
    """Documents from your own files, with a tokenizer you give or one trained on the training documents."""
    if not 0 < args.val_fraction < 1:
        raise UsageError(f"--val-fraction {args.val_fraction:g}: must lie between 0 and 1")
    model = args.tokenizer.read_bytes() if args.tokenizer else b""
    vocab_size = (
        load_tokenizer(model, args.tokenizer).vocab_size() if args.tokenizer else args.vocab_size
    )
    dataset = f"{args.name}_sp{vocab_size}"
    files = [[file_sha256(path) for path in paths] for paths in (args.files, args.val)]
    options = [
        args.key,
        args.seed,
        args.shard_tokens,
        args.drop_overlap,
        args.val_fraction,
        vocab_size,
    ]
    inputs = inputs_digest(files, options, hashlib.sha256(model).hexdigest())
    if is_prepared(args, dataset, inputs):
        return
    val_keys, train_bytes = survey(args)

    def texts(split: str, share: float = 1.0) -> Iterator[str]:
        for document in read_corpus(args):
            wanted = document.split == split and (split == "val" or document.key not in val_keys)
            if wanted and fraction(document.key[8:]) < share:
                yield document.text

    if not args.tokenizer:
        model = train_tokenizer(
            texts("train", TOKENIZER_SAMPLE_BYTES / max(train_bytes, 1)), vocab_size
        )
    names = [", ".join(path.name for path in paths) for paths in (args.files, args.val)]
    source = f"text of {names[0]}; validation: {names[1] or f'{args.val_fraction:g} of the documents, by hash'}"
    tokenizer_file = args.tokenizer.name if args.tokenizer else f"{dataset}.model"
    lossless = not args.tokenizer
    target = Target(
        args.data_dir, dataset, source, inputs, model, tokenizer_file, lossless, args.shard_tokens
    )
    write_dataset(target, {"train": texts("train"), "val": texts("val")}, args.force)


# ---- fineweb: the published contest shards --------------------------------------------------------------------------


class Hub:
    """One commit of a dataset repository on the hub that HF_ENDPOINT names. Every failure becomes a UsageError."""

    def __init__(self, repo: str, revision: str, staging: Path) -> None:
        try:
            import huggingface_hub
            from huggingface_hub.errors import HfHubHTTPError
        except ImportError:
            raise UsageError("fineweb needs the huggingface_hub package") from None
        self.failures = (
            OSError,
            ValueError,
            *HfHubHTTPError.__bases__,
        )  # its bases hold the HTTP library's error
        self.repo, self.staging = repo, staging
        self.api, self.hf_hub_download = huggingface_hub.HfApi(), huggingface_hub.hf_hub_download
        self.published: dict[str, Any] = {}  # path -> size and checksum
        self.commit = self.call(self.api.dataset_info, repo, revision=revision).sha

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except self.failures as error:
            raise UsageError(
                f"{self.repo}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from None

    def look_up(self, paths: list[str]) -> None:
        """Asks for size and checksum of each path; raises UsageError if one is not in the repository."""
        infos = self.call(
            self.api.get_paths_info, self.repo, paths, repo_type="dataset", revision=self.commit
        )
        self.published |= {info.path: info for info in infos}
        if missing := [path for path in paths if path not in self.published]:
            raise UsageError(f"{self.repo} has no {missing[0]}")

    def problem(self, remote: str, path: Path) -> str:
        """What is wrong with a local copy of a published file, or an empty string."""
        info = self.published[remote]
        if path.stat().st_size != info.size:
            return f"{path.stat().st_size} bytes instead of {info.size}"
        if info.lfs and file_sha256(path) != info.lfs.sha256:
            return f"SHA-256 is not the published {info.lfs.sha256}"
        if not info.lfs:  # a small file, known by its git hash
            git_hash = hashlib.sha1(b"blob %d\0" % info.size + path.read_bytes()).hexdigest()
            if git_hash != info.blob_id:
                return f"git hash is not the published {info.blob_id}"
        if path.suffix == ".bin":
            try:
                read_shard(path)
            except UsageError as error:
                return str(error)
        return ""

    def fetch(self, remote: str, local: Path) -> None:
        """Puts a published file at `local` unless an intact copy is there. Raises UsageError if it arrives damaged."""
        if local.is_file() and not self.problem(remote, local):
            return
        options = dict(repo_type="dataset", revision=self.commit, local_dir=self.staging)
        arrived = Path(self.call(self.hf_hub_download, self.repo, remote, **options))
        if problem := self.problem(remote, arrived):
            arrived.unlink()
            raise UsageError(f"{self.repo}: {remote} arrived damaged: {problem}")
        local.parent.mkdir(parents=True, exist_ok=True)
        arrived.replace(local)


def published_export(path: Path, dataset: str) -> tuple[dict[str, Any], str]:
    """From the publisher's manifest: the statistics of a dataset and the path of its tokenizer model."""
    try:
        manifest = json.loads(path.read_text())
        entry = next(item for item in manifest["datasets"] if item["name"] == dataset)
        tokenizer = next(
            item for item in manifest["tokenizers"] if item["name"] == entry["tokenizer_name"]
        )
        return entry["stats"] | {
            key: int(entry["stats"][key]) for key in ("files_train", "files_val")
        }, tokenizer["model_path"]
    except (ValueError, KeyError, TypeError, StopIteration):
        raise UsageError(
            f"the published manifest.json does not describe {dataset} and its tokenizer"
        ) from None


def count_shards(paths: list[Path], sp: spm.SentencePieceProcessor) -> dict[str, Any]:
    """Manifest entry of a split that is already in shards: documents by BOS, bytes by the byte table."""
    table, bos = ByteTable.from_sentencepiece(sp), sp.bos_id()
    entry: dict[str, Any] = {
        "documents": 0,
        "tokens": 0,
        "bytes": 0,
        "gzip_bytes": None,
        "files": [],
    }
    previous = np.empty(
        0, dtype=np.uint16
    )  # the token before a chunk decides whether a leading space counts
    for path in tqdm(paths, desc="counting", unit="shard", disable=None):
        shard = read_shard(path)
        for start in range(0, len(shard), COUNT_TOKENS):
            chunk = np.asarray(shard[start : start + COUNT_TOKENS])
            entry["documents"] += int(np.count_nonzero(chunk == bos))
            entry["bytes"] += table.count(np.concatenate([previous, chunk]))
            previous = chunk[-1:]
        entry["tokens"] += len(shard)
        entry["files"].append(
            {"name": path.name, "tokens": len(shard), "sha256": file_sha256(path)}
        )
    return entry


def run_fineweb(args: argparse.Namespace) -> None:
    """The published contest shards: downloads what is missing, checks every file, writes the manifest."""
    dataset = f"{args.name}_{args.variant}"
    folder, tokenizers = args.data_dir / "datasets" / dataset, args.data_dir / "tokenizers"
    staging = folder.with_name(
        f".{dataset}.part"
    )  # kept after a failure, so that a download can go on
    default_repo = (
        "willdepueoai/parameter-golf" if args.variant == "sp1024" else "kevclark/parameter-golf"
    )
    hub = Hub(args.repo or default_repo, args.revision, staging)
    hub.look_up([f"{args.root}/manifest.json"])
    hub.fetch(f"{args.root}/manifest.json", staging / "published.json")
    stats, model_path = published_export(staging / "published.json", dataset)
    if args.train_shards > stats["files_train"]:
        raise UsageError(
            f"--train-shards {args.train_shards}: {hub.repo} has {stats['files_train']} of {dataset}"
        )
    names = [f"fineweb_val_{i:06d}.bin" for i in range(stats["files_val"])]
    names += [f"fineweb_train_{i:06d}.bin" for i in range(args.train_shards)]
    files = {f"{args.root}/{model_path}": tokenizers / Path(model_path).name}
    files |= {f"{args.root}/datasets/{dataset}/{name}": folder / name for name in names}
    hub.look_up(list(files))
    for remote, local in tqdm(files.items(), desc="downloading", unit="file", disable=None):
        hub.fetch(remote, local)
    model = (tokenizers / Path(model_path).name).read_bytes()
    sp = load_tokenizer(model, model_path)
    splits = {
        split: count_shards(sorted(folder.glob(f"fineweb_{split}_*.bin")), sp)
        for split in ("train", "val")
    }
    for key, value in (
        ("tokens_val", splits["val"]["tokens"]),
        ("docs_val", splits["val"]["documents"]),
    ):
        if stats.get(key, value) != value:
            raise UsageError(
                f"{folder}: {key} is {value}, the published manifest says {stats[key]}"
            )
    source = f"{dataset} as published by {hub.repo} at commit {hub.commit}"
    target = Target(
        args.data_dir, dataset, source, hub.commit, model, Path(model_path).name, False, 0
    )
    write_manifest(target, folder, splits)
    shutil.rmtree(staging)


# ---- Command line ---------------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        run: Callable[[argparse.Namespace], None], name: str, dataset: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run)
        sub.add_argument(
            "--data-dir",
            type=Path,
            default=Path("data"),
            help="root of the layout (default ./data)",
        )
        sub.add_argument(
            "--name", default=dataset, help=f"first part of the dataset's name (default {dataset})"
        )
        return sub

    pydocs, text = command(run_pydocs, "pydocs", "pydocs"), command(run_text, "text", "corpus")
    packages = "installed packages to read beside the standard library (default numpy torch)"
    pydocs.add_argument(
        "--packages", nargs="*", default=["numpy", "torch"], metavar="PACKAGE", help=packages
    )
    kinds = ".jsonl, .jsonl.zst or .jsonl.gz (one object a line) or .txt (the whole file is one document)"
    text.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help=f"training documents: {kinds}"
    )
    text.add_argument(
        "--key", default="text", help="key of the JSON objects that holds the text (default text)"
    )
    text.add_argument(
        "--drop-overlap", action="store_true", help="leave validation documents out of training"
    )
    pieces, group = text.add_mutually_exclusive_group(), text.add_mutually_exclusive_group()
    pieces.add_argument(
        "--tokenizer", type=Path, metavar="MODEL", help="use this SentencePiece model, train none"
    )
    group.add_argument(
        "--val", nargs="+", type=Path, default=[], metavar="FILE", help="validation documents"
    )
    group.add_argument(
        "--val-fraction", type=float, default=0.01, help="or the share to hold out (default 0.01)"
    )
    for sub, vocabulary in ((pydocs, pydocs), (text, pieces)):
        vocabulary.add_argument(
            "--vocab-size",
            type=positive,
            default=1024,
            help="pieces of a new tokenizer (default 1024)",
        )
        sub.add_argument("--seed", type=int, default=0, help="decides what is held out (default 0)")
        sub.add_argument(
            "--shard-tokens",
            type=positive,
            default=100_000_000,
            help="tokens a shard (default 100 M)",
        )
        sub.add_argument(
            "--force", action="store_true", help="replace a dataset that is already there"
        )

    fineweb = command(run_fineweb, "fineweb", "fineweb10B")
    fineweb.add_argument(
        "--variant", default="sp8192", help="vocabulary: sp1024, sp8192 ... (default sp8192)"
    )
    fineweb.add_argument(
        "--train-shards", type=positive, default=80, help="100 M tokens each (default 80)"
    )
    fineweb.add_argument(
        "--repo",
        help="dataset repository (default kevclark/ or, sp1024, willdepueoai/parameter-golf)",
    )
    fineweb.add_argument("--revision", default="main", help="branch, tag or commit (default main)")
    fineweb.add_argument(
        "--root",
        default="datasets",
        help="folder of the export in the repository (default datasets)",
    )

    sub = commands.add_parser("doctor", help=doctor.__doc__.partition(":")[0])
    sub.set_defaults(run=doctor.run)
    doctor.add_arguments(sub)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 the doctor found an error, 2 wrong input, told in one line on stderr."""
    args = build_parser().parse_args(argv)
    try:
        if "/" in (name := getattr(args, "name", "")):  # the doctor has none
            raise UsageError(
                f"--name {name}: must be a name; --data-dir says where the data set goes"
            )
        return args.run(args) or 0
    except UsageError as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a missing file, a folder, no permission, a full disk
        print(f"prepare_data.py: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
