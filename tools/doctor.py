"""Examines a data set before a run pays for it: `tools/prepare_data.py doctor
data/datasets/<dataset>`.

Reads every shard once and compares what it finds with the manifest, the tokenizer, the published
totals of FineWeb and the other split:

    files       headers, lengths, numbering, SHA-256, repeated shards, id range, byte order
    documents   BOS at the beginning, empty ones, control pieces inside, copies within a split
    text        bytes by decoding, decode -> encode -> the same ids, totals
    side-car    of CaseOps data: complete, no bytes at BOS and operators, operators where the
                transform puts them, bytes of the original recomputed, totals
    overlap     validation documents that are in training: whole ones by hash, parts by shingles
                (32 ids in a row)

An error means that scores on these data are wrong or that a run would read something else than
text; a warning does not. The verdict goes to doctor.json beside the manifest, with size and time
stamp of every file it is about; train_gpt.py refuses data with an error until a file changes or the
doctor finds none. The scan of a shard is stored in .doctor/ under the hash of the shard's content.
Exit status: 0 no error, 1 errors, 2 wrong usage.

Each check is a generator that yields faults. SPLIT_CHECKS, CONTENT_CHECKS and DATASET_CHECKS list
them in the order in which they run. The search for overlap is in tools/overlap.py.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece as spm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import canonical  # noqa: E402
import caseops  # noqa: E402
import overlap as overlap_search  # noqa: E402
import sidecar  # noqa: E402
from digests import sha256  # noqa: E402
from overlap import PartScan, Shared, ShingleIndex  # noqa: E402

from train_gpt import (  # noqa: E402
    MAX_JSON_BYTES,
    MAX_TOKENIZER_BYTES,
    MAX_WEIGHTS_BYTES,
    SHARD_HEADER,
    ByteTable,
    UsageError,
    parse_tokenizer,
    read_regular,
    read_shard,
    shard_paths,
    write_atomic,
)

HEADER_BYTES = 1024
BLOCK = 1 << 20  # ids looked at together where a whole shard would take too much memory
MAX_PARTS = 0.05  # share of validation documents in training in part; clean web text had 0.024
SAMPLE = 200  # training documents of a shard that are decoded and encoded again
VAL_SAMPLE = 10 * SAMPLE
MAX_LOSSY = 0.05  # share of sampled documents whose ids may change when decoded and encoded again
DECODED_AT_ONCE = 256  # documents
SMALL = 16_000_000  # ids; fewer are scanned in this process
SHOWN_OVERLAPS = 5  # faults of each kind of overlap; the figures have more of them
LISTED_OVERLAPS = 1000


def _version() -> str:
    """Changes with the code that scans, so that another doctor trusts no old scan."""
    modules = (overlap_search, caseops, sidecar)
    sources = [Path(__file__), *(Path(module.__file__) for module in modules)]
    return sha256(b"".join(path.read_bytes() for path in sources))[:16]


VERSION = _version()


# === Faults =======================================================================================
class Fault(NamedTuple):
    """Something wrong with a file, or with a token in it."""

    level: str  # error or warning
    check: str
    file: str
    at: int | None  # token in the file; None: the file as a whole
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.message()}"

    def message(self) -> str:
        """The fault in one line, without its level."""
        where = self.file if self.at is None else f"{self.file}, token {self.at}"
        return f"{where}: {self.check}: {self.text}"


def error(check: str, file: str, text: str, at: int | None = None) -> Fault:
    """A fault that makes scores on these data wrong."""
    return Fault("error", check, file, at, text)


def warning(check: str, file: str, text: str, at: int | None = None) -> Fault:
    """A fault that leaves scores on these data right."""
    return Fault("warning", check, file, at, text)


# === One shard ====================================================================================
class Shard(NamedTuple):
    """One file of tokens, as its own bytes show it."""

    path: Path
    sha256: str
    tokens: int  # 0 if it cannot be read
    first_bos: int  # -1 if it holds none
    faults: list[Fault]


def header_fault(name: str, data: bytes) -> Fault | None:
    """The first thing wrong with header or length of a shard's bytes, or None."""
    if len(data) < HEADER_BYTES:
        return error("cut", name, f"{len(data)} bytes end inside the header of {HEADER_BYTES}")
    known_magic, known_version = SHARD_HEADER
    magic, version, count = np.frombuffer(data, dtype="<i4", count=3)
    if magic.byteswap() == known_magic:
        return error("byte order", name, "is swapped, from the header on")
    if magic != known_magic:
        return error("magic", name, f"starts with {magic}, a shard with {known_magic}")
    if version != known_version:
        return error("version", name, f"is {version}, this doctor knows {known_version}")
    if count <= 0:
        return error("header", name, f"promises {count} tokens")
    extra = len(data) - HEADER_BYTES - 2 * int(count)
    promised = f"the {count} tokens that its header promises"
    if extra < 0:
        return error("cut", name, f"lacks {-extra} bytes of {promised}")
    if extra > 0:
        return error("excess", name, f"{extra} bytes follow {promised}")
    return None


def id_faults(name: str, tokens: np.ndarray, vocab_size: int) -> Iterator[Fault]:
    """Ids outside the vocabulary, which swapped bytes may explain."""
    if tokens.max() < vocab_size:
        return
    bad = np.flatnonzero(tokens >= vocab_size)
    text = f"{tokens[bad[0]]} is the first of {len(bad)} ids outside the vocabulary of {vocab_size}"
    if tokens.byteswap().max() < vocab_size:
        text += ", which all fit with their bytes swapped"
        yield error("byte order", name, text, int(bad[0]))
    else:
        yield error("id range", name, text, int(bad[0]))


def first_position(tokens: np.ndarray, wanted: int) -> int:
    """Position of the first `wanted` in ids (n,), or -1."""
    for start in range(0, len(tokens), BLOCK):
        hit = tokens[start : start + BLOCK] == wanted
        if hit.any():
            return start + int(hit.argmax())
    return -1


def examine_shard(path: Path, vocab_size: int, bos_id: int) -> Shard:
    """Hash, header, length, id range and byte order of one file."""
    data = read_regular(path, MAX_WEIGHTS_BYTES)
    digest = sha256(data)
    if fault := header_fault(path.name, data):
        return Shard(path, digest, 0, -1, [fault])
    tokens = np.frombuffer(data, dtype="<u2", offset=HEADER_BYTES)
    faults = list(id_faults(path.name, tokens, vocab_size))
    return Shard(path, digest, len(tokens), first_position(tokens, bos_id), faults)


# === Manifest and tokenizer =======================================================================
class Tokenizer(NamedTuple):
    """The SentencePiece model of a data set."""

    path: Path
    sha256: str
    data: bytes
    bos_id: int
    vocab_size: int
    transform: caseops.Transform | None = None  # of the text; None without case operators


def is_manifest(manifest: Any) -> bool:
    """Whether a JSON value has every key of a manifest that prepare_data.py writes and the doctor
    reads.
    """
    try:
        for entry in manifest["splits"].values():
            tokens = sum(file["tokens"] for file in entry["files"])
            _ = tokens + entry["documents"] + entry["bytes"] + entry["tokens"]
            _ = [file["name"] for file in entry["files"]]
        _ = manifest["tokenizer"]["file"], manifest["tokenizer"]["sha256"]
    except (KeyError, TypeError, AttributeError):
        return False
    return True


def read_manifest(folder: Path, faults: list[Fault]) -> dict[str, Any]:
    """The manifest; {} and a fault if there is none or if prepare_data.py did not write it."""
    path = folder / "manifest.json"
    if not os.path.lexists(path):
        text = "there is none, so totals and hashes are not checked"
        faults.append(warning("manifest", path.name, text))
        return {}
    with contextlib.suppress(ValueError, RecursionError):
        manifest = json.loads(read_regular(path, MAX_JSON_BYTES))
        if is_manifest(manifest):
            return manifest
    faults.append(error("manifest", path.name, "is not one of tools/prepare_data.py"))
    return {}


def find_tokenizer(folder: Path, given: Path | None, manifest: dict[str, Any]) -> Path:
    """The tokenizer given, or the manifest's, or the one that the data set's name implies."""
    if given:
        return given
    named = manifest.get("tokenizer", {}).get("file")
    if not named:
        size = re.search(r"_sp(\d+)(\w*)$", folder.name)
        named = f"fineweb_{size[1]}_bpe{size[2]}.model" if size else "fineweb_0_bpe.model"
    return folder.parent.parent / "tokenizers" / named


def load_tokenizer(path: Path, manifest: dict[str, Any], faults: list[Fault]) -> Tokenizer | None:
    """The tokenizer, compared with its manifest entry; None and a fault if documents cannot be told
    apart with it.
    """
    try:
        data = read_regular(path, MAX_TOKENIZER_BYTES)
        sp = parse_tokenizer(data)
    except (OSError, RuntimeError) as reason:
        text = f"no SentencePiece model at {path} ({type(reason).__name__})"
        faults.append(error("tokenizer", path.name, text))
        return None
    transform = caseops.transform_of(sp, manifest)
    tokenizer = Tokenizer(path, sha256(data), data, sp.bos_id(), sp.vocab_size(), transform)
    entry = manifest.get("tokenizer", {})
    if entry.get("sha256", tokenizer.sha256) != tokenizer.sha256:
        text = f"SHA-256 is {tokenizer.sha256}, the manifest has another"
        faults.append(error("tokenizer", path.name, text))
    for key in ("vocab_size", "bos_id"):
        value = getattr(tokenizer, key)
        if entry.get(key, value) != value:
            faults.append(
                error("tokenizer", path.name, f"{key} is {value}, manifest: {entry[key]}")
            )
    if tokenizer.bos_id < 0:
        text = "has no BOS, so documents cannot be told apart"
        faults.append(error("tokenizer", path.name, text))
        return None
    return tokenizer


# === Spans: whole documents, scanned together =====================================================
class Piece(NamedTuple):
    """Some tokens of one shard."""

    path: Path
    sha256: str
    begin: int
    end: int

    def read(self) -> np.ndarray:
        """The ids (end - begin,) uint16, memory-mapped."""
        return read_shard(self.path)[self.begin : self.end]


class Span(NamedTuple):
    """The documents that begin in one shard; the last one may end in a later shard."""

    split: str
    offset: int  # of its first token in the stream
    pieces: list[Piece]
    has_sidecar: bool = False

    @property
    def tokens(self) -> int:
        """How many ids it holds."""
        return sum(piece.end - piece.begin for piece in self.pieces)

    def read(self) -> np.ndarray:
        """Its ids (tokens,) uint16."""
        parts = [piece.read() for piece in self.pieces]
        return np.concatenate(parts) if len(parts) > 1 else np.asarray(parts[0])

    def read_counts(self) -> np.ndarray | None:
        """The side-car of its ids, (tokens,) uint16, or None."""
        if not self.has_sidecar:
            return None
        parts = []
        for piece in self.pieces:
            counts = read_shard(sidecar_path(piece.path, self.split))
            parts.append(counts[piece.begin : piece.end])
        return np.concatenate(parts)


def sidecar_path(shard: Path, split: str) -> Path:
    """The file of the side-car that belongs to a shard."""
    front, mark, number = shard.name.rpartition(f"_{split}_")
    return shard.with_name(f"{front}{mark}bytes_{number}")


def spans_of(split: str, shards: list[Shard], has_sidecar: bool = False) -> list[Span]:
    """The spans of a split in the order of its stream. What comes before the first BOS belongs to
    none.
    """
    spans: list[Span] = []
    start = 0
    for shard in shards:
        has_bos = shard.first_bos >= 0
        head = shard.first_bos if has_bos else shard.tokens
        if head and spans:
            spans[-1].pieces.append(Piece(shard.path, shard.sha256, 0, head))
        if has_bos:
            rest = Piece(shard.path, shard.sha256, head, shard.tokens)
            spans.append(Span(split, start + head, [rest], has_sidecar))
        start += shard.tokens
    return spans


class Scan(NamedTuple):
    """All that the verdict needs of a span; positions are counted from its beginning."""

    starts: np.ndarray  # (D,) its documents
    hashes: np.ndarray  # (D,)
    bytes: np.ndarray  # () of text, by the side-car or else by the byte table
    tokens: np.ndarray  # ()
    control: np.ndarray  # positions of control, unknown and unused pieces inside a text
    decoded: np.ndarray  # () number of documents that were decoded
    sampled: np.ndarray  # () number of documents that were encoded again
    miscounted: np.ndarray  # positions of documents for which byte table and decoded text disagree
    lossy: np.ndarray  # positions of documents that do not give their ids back
    found: np.ndarray  # of training: the validation shingles that occur, as in overlap.Occurrences
    where: np.ndarray
    # As in sidecar.Comparison.
    operators: np.ndarray
    misplaced: np.ndarray
    with_bytes: np.ndarray
    differing: np.ndarray
    own_bytes: np.ndarray
    digests: np.ndarray  # (decoded, 32) uint8 of the originals, where they are known; (0, 32) else

    @property
    def part(self) -> PartScan:
        """What the search for overlap needs."""
        occurrences = overlap_search.Occurrences(self.found, self.where)
        return PartScan(self.starts, self.hashes, occurrences)

    @property
    def empty(self) -> np.ndarray:
        """Positions of documents without text."""
        lengths = np.diff(self.starts, append=self.tokens)
        return self.starts[lengths == 1]


class Documents(NamedTuple):
    """Some documents end to end."""

    tokens: np.ndarray  # (n,)
    starts: np.ndarray  # (D,)

    def texts(self) -> Iterator[np.ndarray]:
        """Yields each document with its BOS; the last one ends where `tokens` ends."""
        ends = np.append(self.starts[1:], len(self.tokens))
        for start, end in zip(self.starts.tolist(), ends.tolist(), strict=True):
            yield self.tokens[start:end]

    def pick(self, which: np.ndarray) -> Documents:
        """The documents of these numbers, end to end."""
        if len(which) == len(self.starts):
            return self
        ends = np.append(self.starts[1:], len(self.tokens))
        parts = []
        for number in which:
            parts.append(self.tokens[self.starts[number] : ends[number]])
        starts = np.cumsum([0] + [len(part) for part in parts[:-1]])
        return Documents(np.concatenate(parts), starts)


def decoded_bytes(documents: Documents, sp: spm.SentencePieceProcessor) -> np.ndarray:
    """UTF-8 bytes of each document's text, by really decoding it: (D,) int64."""
    texts = list(documents.texts())
    sizes: list[int] = []
    for first in range(0, len(texts), DECODED_AT_ONCE):
        ids = [text[1:].tolist() for text in texts[first : first + DECODED_AT_ONCE]]
        sizes += [len(text.encode()) for text in sp.decode(ids)]
    return np.array(sizes, dtype=np.int64)


NO_DIGESTS = np.empty((0, 32), dtype=np.uint8)


class Inverted(NamedTuple):
    """What the originals of some documents say."""

    miscounted: np.ndarray  # (D,) bool: the transform cannot have made it, or the side-car differs
    digests: np.ndarray  # (D, 32) uint8; (0, 32) if the tokenizer does not give back the original


def invert(
    documents: Documents,
    counts: Documents | None,
    sp: spm.SentencePieceProcessor,
    transform: caseops.Transform | None,
) -> Inverted:
    """Inverts the transform and compares the bytes of every original with its side-car.

    A tokenizer that folds characters has lost the original, and then nothing is miscounted here.
    """
    miscounted = np.zeros(len(documents.starts), dtype=bool)
    if transform is None or not caseops.is_lossless(sp):
        return Inverted(miscounted, NO_DIGESTS)
    ids = [text[1:].tolist() for text in documents.texts()]
    texts = sidecar.originals(sp, transform, ids)
    sizes = sidecar.sizes_of(texts)
    if counts is None:
        miscounted = sizes < 0
    else:
        miscounted = sizes != [int(one.sum()) for one in counts.texts()]
    digests = [caseops.text_digest(text or "") for text in texts]
    return Inverted(miscounted, np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32))


def round_trip(
    documents: Documents, which: Iterable[int], sp: spm.SentencePieceProcessor
) -> list[int]:
    """Numbers of the documents, among those asked for, that change their ids when decoded and
    encoded again.

    A few do with a tokenizer that normalises, or whose text was cut in pieces before it was
    encoded. Most of them do with another tokenizer than the one that made the ids.
    """
    texts = list(documents.texts())
    lossy = []
    for number in which:
        ids = texts[number][1:].tolist()
        if sp.encode(sp.decode(ids)) != ids:
            lossy.append(int(number))
    return lossy


def spread(number: int, wanted: int) -> np.ndarray:
    """At most `wanted` of 0 .. number - 1, evenly spread."""
    return np.unique(np.linspace(0, number - 1, min(number, wanted)).astype(np.int64))


class Bytes(NamedTuple):
    """What the byte table says about ids."""

    total: int
    control: np.ndarray  # positions of control, unknown and unused pieces inside a text


def count_bytes(tokens: np.ndarray, table: ByteTable, bos_id: int) -> Bytes:
    """Counts the bytes of a stream (n,) block by block, and looks for control pieces."""
    total = 0
    control = []
    for begin in range(0, len(tokens), BLOCK):
        # One token more than a block, because a target's bytes depend on the token before it.
        block = tokens[begin : begin + BLOCK + 1]
        total += table.count(block)
        ids = block[:BLOCK]
        inside = table.boundary[ids] & (ids != bos_id)
        control.append(begin + np.flatnonzero(inside))
    return Bytes(total, np.concatenate(control))


def scan_span(span: Span, tokenizer: Tokenizer, index: ShingleIndex) -> Scan:
    """Scans the documents of a span; those of training are also searched for the shingles in
    `index`.

    The byte table counts every document. All of validation and SAMPLE documents of each training
    shard are decoded.
    """
    is_train = span.split == "train"
    sp = spm.SentencePieceProcessor(model_proto=tokenizer.data)
    table = ByteTable.from_sentencepiece(sp)
    table.base[caseops.operator_ids(sp)] = 0
    tokens = span.read()
    counts = span.read_counts()
    starts = overlap_search.document_starts(tokens, tokenizer.bos_id)
    counted = count_bytes(tokens, table, tokenizer.bos_id)

    decoded = spread(len(starts), SAMPLE if is_train else len(starts))
    documents = Documents(tokens, starts).pick(decoded)
    sampled = spread(len(decoded), SAMPLE if is_train else VAL_SAMPLE)
    lossy = round_trip(documents, sampled, sp)
    comparison = sidecar.NOTHING
    digests = NO_DIGESTS
    if tokenizer.transform or counts is not None:
        pieces = caseops.PieceTable.from_sentencepiece(sp)
        comparison = sidecar.compare(tokens, counts, tokenizer.bos_id, pieces, tokenizer.transform)
        sizes = None if counts is None else Documents(counts, starts).pick(decoded)
        inverted = invert(documents, sizes, sp, tokenizer.transform)
        miscounted, digests = inverted
    else:
        by_table = np.array([table.count(text) for text in documents.texts()], dtype=np.int64)
        miscounted = decoded_bytes(documents, sp) != by_table

    occurrences = overlap_search.Occurrences(
        overlap_search.NO_POSITIONS, overlap_search.NO_POSITIONS
    )
    if is_train:
        occurrences = index.find(tokens)
    return Scan(
        starts=starts,
        hashes=overlap_search.document_hashes(tokens, starts),
        bytes=np.asarray(counted.total if counts is None else counts.sum(dtype=np.int64)),
        tokens=np.asarray(len(tokens)),
        control=counted.control,
        decoded=np.asarray(len(decoded)),
        sampled=np.asarray(len(sampled)),
        miscounted=starts[decoded[miscounted]],
        lossy=starts[decoded[lossy]],
        found=occurrences.found,
        where=occurrences.where,
        digests=digests,
        **comparison._asdict(),
    )


# Tokenizer and index of a worker process. They are large, so they are sent once, not with every
# span.
_worker_context: tuple[Tokenizer, ShingleIndex] | None = None


def _begin_worker(tokenizer: Tokenizer, index: ShingleIndex) -> None:
    global _worker_context
    _worker_context = tokenizer, index


def _scan_in_worker(span: Span) -> Scan:
    return scan_span(span, *_worker_context)


def scan_spans(
    spans: list[Span], tokenizer: Tokenizer, index: ShingleIndex, workers: int
) -> Iterator[Scan]:
    """Yields the scan of each span, made by worker processes unless starting them would take longer
    than the work.
    """
    if workers < 2 or sum(span.tokens for span in spans) < SMALL:
        for span in spans:
            yield scan_span(span, tokenizer, index)
        return
    with concurrent.futures.ProcessPoolExecutor(
        workers, initializer=_begin_worker, initargs=(tokenizer, index)
    ) as pool:
        yield from pool.map(_scan_in_worker, spans)


def examine_shards(paths: list[Path], vocab_size: int, bos_id: int, workers: int) -> list[Shard]:
    """`examine_shard` of each file, by worker processes as in `scan_spans`."""
    vocab_sizes = [vocab_size] * len(paths)
    bos_ids = [bos_id] * len(paths)
    if workers < 2 or sum(path.stat().st_size for path in paths) // 2 < SMALL:
        return list(map(examine_shard, paths, vocab_sizes, bos_ids))
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        return list(pool.map(examine_shard, paths, vocab_sizes, bos_ids))


class ScanCache:
    """Scans in .doctor/, each under a hash of the content scanned and of everything that scanned
    it.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, index: ShingleIndex) -> None:
        """Keeps scans in `folder`, which need not exist."""
        self.folder = folder
        self.tokenizer = tokenizer
        self.index_key = index.key
        self.used: set[Path] = set()

    def file_of(self, span: Span) -> Path:
        """Where the scan of this content is stored; it counts as used from here on."""
        first, *others = span.pieces
        tail = b"".join(piece.read().tobytes() for piece in others)
        content = [[first.sha256, first.begin, first.end], sha256(tail)]
        if span.has_sidecar:
            content.append(sha256(span.read_counts().tobytes()))
        index_key = self.index_key if span.split == "train" else ""
        maker = [VERSION, spm.__version__, self.tokenizer.sha256, index_key]
        if self.tokenizer.transform:
            maker.append(self.tokenizer.transform.name)
        file = self.folder / f"{sha256(json.dumps([*maker, content]).encode())[:32]}.npz"
        self.used.add(file)
        return file

    def load(self, file: Path) -> Scan | None:
        """A stored scan; None if there is none or it is damaged."""
        try:
            with np.load(file, allow_pickle=False) as stored:
                return Scan(**stored)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def store(self, file: Path, scan: Scan) -> None:
        """Stores a scan. A data set on a read-only disk is scanned again each time."""
        buffer = io.BytesIO()
        np.savez(buffer, **scan._asdict())
        with contextlib.suppress(OSError):
            write_atomic(file, buffer.getvalue())


# === One split ====================================================================================
class Position(NamedTuple):
    """A token, by file."""

    file: str
    at: int  # token in the file


@dataclasses.dataclass
class Split:
    """One split of a data set: its files, then the scans of its contents."""

    name: str  # train or val
    shards: list[Shard]
    sidecar: list[Shard]  # its files, as they were found
    manifest_entry: dict[str, Any] | None
    tokenizer: Tokenizer | None
    spans: list[Span] = dataclasses.field(default_factory=list)
    scans: list[Scan] = dataclasses.field(default_factory=list)
    figures: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        """Its files, in the order of their names."""
        return [shard.path for shard in self.shards]

    @property
    def offsets(self) -> np.ndarray:
        """Where each span begins in the stream: (spans,) int64."""
        return np.array([span.offset for span in self.spans], dtype=np.int64)

    @property
    def parts(self) -> list[PartScan]:
        """The scans, as the search for overlap takes them."""
        return [scan.part for scan in self.scans]

    def documents(self) -> overlap_search.StreamDocuments:
        """Hashes and positions of all documents."""
        return overlap_search.stream_documents(self.parts, self.offsets)

    def position(self, stream_index: int) -> Position:
        """The file that holds a token of the stream."""
        starts = np.cumsum([0] + [shard.tokens for shard in self.shards])
        number = int(np.searchsorted(starts, stream_index, side="right")) - 1
        return Position(self.paths[number].name, int(stream_index - starts[number]))

    def count_at(self, stream_index: int) -> int:
        """Bytes that the side-car has for a token of the stream."""
        file, at = self.position(stream_index)
        shard = next(path for path in self.paths if path.name == file)
        return int(read_shard(sidecar_path(shard, self.name))[at])

    def is_lossless(self) -> bool:
        """Whether the tokenizer gives back every text."""
        return caseops.is_lossless(spm.SentencePieceProcessor(model_proto=self.tokenizer.data))

    def total(self, field: str) -> int:
        """Sum over all scans of a field that is a number."""
        return sum(int(getattr(scan, field)) for scan in self.scans)

    def occurrences(self, field: str) -> np.ndarray:
        """Positions in the stream from all scans of a field that holds positions."""
        positions = [overlap_search.NO_POSITIONS]
        for scan, offset in zip(self.scans, self.offsets, strict=True):
            positions.append(getattr(scan, field) + offset)
        return np.concatenate(positions)


# --- Checks of a split's files --------------------------------------------------------------------
def check_presence(split: Split, folder: str) -> Iterator[Fault]:
    """A split without shards."""
    if not split.shards:
        yield error("missing split", folder, f"holds no *_{split.name}_*.bin")


def check_sidecar_files(split: Split, folder: str) -> Iterator[Fault]:
    """A side-car that is missing, or has other files than the shards or the manifest."""
    has_operators = bool(split.tokenizer and split.tokenizer.transform)
    if split.name == "val" and split.shards and has_operators and not split.sidecar:
        text = "the tokenizer has case operators, and no side-car counts the original bytes; "
        text += "counting by table makes them 9 % more, and bits per byte too low"
        yield error("side-car", folder, text)
    if not split.sidecar:
        return
    wanted = {sidecar_path(path, split.name).name for path in split.paths}
    present = {shard.path.name: shard for shard in split.sidecar}
    for name in sorted(wanted - present.keys()):
        yield error("side-car", name, "is missing, other shards have theirs")
    for name in sorted(present.keys() - wanted):
        yield error("side-car", name, "belongs to no shard")
    listed = (split.manifest_entry or {}).get("byte_files", [])
    for file in listed:
        shard = present.get(file["name"])
        if shard is None:
            yield error("side-car", file["name"], "is missing, the manifest names it")
        elif file["sha256"] != shard.sha256:
            text = f"is {shard.sha256}, the manifest has another"
            yield error("manifest sha256", file["name"], text)


def length_faults(split: Split) -> Iterator[Fault]:
    """Files of the side-car with another number of counts than their shard has tokens."""
    tokens = {sidecar_path(shard.path, split.name): shard.tokens for shard in split.shards}
    for shard in split.sidecar:
        wanted = tokens.get(shard.path, 0)
        if not shard.faults and shard.tokens != wanted:
            text = f"holds {shard.tokens} counts for {wanted} tokens"
            yield error("side-car", shard.path.name, text)


class NumberedName(NamedTuple):
    """The name of a shard, taken apart."""

    file: str
    prefix: str
    digits: str


def check_numbering(split: Split, folder: str) -> Iterator[Fault]:
    """Shards missing from 0 to the last number, numbers taken twice, names of two kinds."""
    names: list[NumberedName] = []
    for path in split.paths:
        match = re.fullmatch(rf"(.+)_{split.name}_(\d+)\.bin", path.name)
        if match:
            names.append(NumberedName(path.name, match[1], match[2]))
        else:
            text = f"is read as a {split.name} shard, but has no number at the end"
            yield error("name", path.name, text)
    file_of_number: dict[int, str] = {}
    for name in names:
        number = int(name.digits)
        if name.prefix != names[0].prefix:
            yield error("name", name.file, f"has another prefix than {names[0].file}")
        elif number in file_of_number:
            yield error("name", name.file, f"has the number of {file_of_number[number]}")
        file_of_number[number] = name.file
    last = max(file_of_number, default=-1)
    for number in range(last + 1):
        if number not in file_of_number:
            digits = f"{number:0{len(names[0].digits)}d}"
            file = f"{names[0].prefix}_{split.name}_{digits}.bin"
            yield error("missing shard", file, f"the shards go on to number {last}")


def check_against_manifest(split: Split, folder: str) -> Iterator[Fault]:
    """Files, hashes and token counts that differ from the manifest; hashes are compared where the
    manifest has them.
    """
    entry = split.manifest_entry
    if not entry:
        return
    listed = {file["name"]: file for file in entry["files"]}
    present = {shard.path.name for shard in split.shards}
    if len(listed) < len(entry["files"]):
        yield error("manifest", "manifest.json", "names a file twice")
    for name in sorted(listed.keys() - present):
        yield error("missing shard", name, "the manifest names it")
    for shard in split.shards:
        name = shard.path.name
        if name not in listed:
            yield error("foreign shard", name, "the manifest does not name it")
            continue
        if listed[name].get("sha256", shard.sha256) != shard.sha256:
            text = f"is {shard.sha256}, the manifest has another"
            yield error("manifest sha256", name, text)
        promised = listed[name]["tokens"]
        if shard.tokens and promised != shard.tokens:
            text = f"holds {shard.tokens}, the manifest says {promised}"
            yield error("manifest tokens", name, text)
    total = sum(file["tokens"] for file in entry["files"])
    if entry["tokens"] != total:
        text = f"says {entry['tokens']} for a split whose files add up to {total}"
        yield error("manifest tokens", "manifest.json", text)


def check_repeated_files(shards: list[Shard]) -> Iterator[Fault]:
    """Shards, of either split, that are the same file under two names."""
    first_name: dict[str, str] = {}
    for shard in shards:
        if shard.sha256 in first_name:
            text = f"is the same file as {first_name[shard.sha256]}"
            yield error("shard twice", shard.path.name, text)
        first_name.setdefault(shard.sha256, shard.path.name)


# --- Checks of a split's contents -----------------------------------------------------------------
def check_first_document(split: Split) -> Iterator[Fault]:
    """A stream that begins in the middle of a document."""
    first = split.shards[0]
    if first.first_bos == 0:
        return
    text = "no document begins in this split"
    if split.spans:
        text = "the stream does not begin with a document"
    bos = f"(BOS id {split.tokenizer.bos_id})"
    yield error("no BOS", first.path.name, f"{text} {bos}", at=0)


def check_empty_documents(split: Split) -> Iterator[Fault]:
    """Documents without text."""
    found = split.occurrences("empty")
    if len(found):
        file, at = split.position(found[0])
        text = f"BOS without text, {len(found)} in this split"
        yield error("empty document", file, text, at)


def check_control_pieces(split: Split) -> Iterator[Fault]:
    """Control, unknown and unused pieces inside a text."""
    found = split.occurrences("control")
    if len(found):
        file, at = split.position(found[0])
        text = f"a control, unknown or unused piece in a text, {len(found)} in this split"
        yield error("control id", file, text, at)


def check_decoded_bytes(split: Split) -> Iterator[Fault]:
    """Documents whose text has another length than the byte table counts."""
    found = split.occurrences("miscounted")
    if len(found):
        file, at = split.position(found[0])
        checked = split.total("decoded")
        counted_by = "side-car" if split.sidecar else "byte table"
        text = f"{counted_by} and decoded text disagree in {len(found)} of {checked} documents"
        yield error("bytes", file, text, at)


def check_silent_tokens(split: Split) -> Iterator[Fault]:
    """BOS and operators that are worth bytes in the side-car."""
    found = split.occurrences("with_bytes")
    if len(found):
        file, at = split.position(found[0])
        worth = int(split.count_at(found[0]))
        text = f"{worth} bytes for BOS or an operator, which has none; {len(found)} in this split"
        if worth == len(caseops.TITLE.encode()):
            text += "; were the bytes of the transformed text counted?"
        yield error("side-car", file, text, at)


def check_counts(split: Split) -> Iterator[Fault]:
    """A side-car that is not that of these ids: all of it is recomputed from them.

    A lossless tokenizer's must agree. One that folds may differ where it folded, and does so in any
    real text.
    """
    if not split.sidecar:
        return
    found = split.occurrences("differing")
    tokens = sum(shard.tokens for shard in split.shards)
    documents = split.figures["documents"]
    is_lossless = split.is_lossless()
    if len(found) > sidecar.allowed_differing(tokens, is_lossless):
        file, at = split.position(found[0])
        text = f"{len(found)} of {tokens} tokens are worth other bytes than their text has; "
        yield error("side-car", file, f"{text}is it that of other ids?", at)
    if not is_lossless and not len(found):
        text = "every token is worth the bytes of its folded text; "
        text += "were the bytes counted after NFKC and folding?"
        is_much = documents >= sidecar.LEAST_FOLDED_DOCUMENTS
        make_fault = error if is_much else warning
        yield make_fault("side-car", split.sidecar[0].path.name, text)


def check_operators(split: Split) -> Iterator[Fault]:
    """Operators where the transform puts none; folding may cause a few."""
    found = split.occurrences("misplaced")
    if not len(found):
        return
    file, at = split.position(found[0])
    operators = split.total("operators")
    text = f"an operator stands alone or inside a word, {len(found)} of {operators} in this split"
    allowed = sidecar.allowed_misplaced(operators, split.is_lossless())
    make_fault = error if len(found) > allowed else warning
    yield make_fault("operators", file, text, at)


def check_originals(split: Split) -> Iterator[Fault]:
    """Originals that are not the text the manifest has the hash of."""
    wanted = (split.manifest_entry or {}).get("text_sha256", "")
    digests = np.concatenate([NO_DIGESTS, *(scan.digests for scan in split.scans)])
    if not wanted or len(digests) != split.figures["documents"]:
        return
    digest = caseops.split_digest([digests.tobytes()])
    if digest != wanted:
        text = f"the originals of {split.name} have the SHA-256 {digest}, the manifest has another"
        yield error("original text", "manifest.json", text)


def check_round_trip(split: Split) -> Iterator[Fault]:
    """Documents that change their ids when decoded and encoded again; a few are a warning."""
    found = split.occurrences("lossy")
    if not len(found):
        return
    file, at = split.position(found[0])
    sampled = split.total("sampled")
    text = f"{len(found)} of {sampled} documents change their ids when decoded and encoded again"
    if len(found) > MAX_LOSSY * sampled:
        yield error("round trip", file, f"{text}; was this the tokenizer?", at)
    else:
        yield warning("round trip", file, text, at)


def check_copies(split: Split) -> Iterator[Fault]:
    """Documents that the split holds already; a web corpus has some, so they are a warning."""
    documents = split.documents()
    copies = find_copies(documents.hashes)
    if not copies:
        return
    first = min(copies, key=lambda copy: copy.later)
    file, at = split.position(documents.starts[first.later])
    original = split.position(documents.starts[first.earlier])
    text = f"is the one at {original.file}, token {original.at}; "
    text += f"{len(copies)} copies in {len(documents.hashes)} {split.name} documents"
    yield warning("duplicate document", file, text, at)


class Copy(NamedTuple):
    """Two equal documents, by number."""

    earlier: int
    later: int


def find_copies(hashes: np.ndarray) -> list[Copy]:
    """Every document (D,) that has come before, with the nearest equal one before it."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    return [Copy(int(order[i]), int(order[i + 1])) for i in same]


def check_manifest_totals(split: Split) -> Iterator[Fault]:
    """Documents and bytes that differ from the manifest."""
    if not split.manifest_entry:
        return
    for key in ("documents", "bytes"):
        promised = split.manifest_entry[key]
        if promised != split.figures[key]:
            text = f"says {promised} for {split.name}, the shards hold {split.figures[key]}"
            yield error(f"manifest {key}", "manifest.json", text)


SPLIT_CHECKS = (check_presence, check_numbering, check_against_manifest, check_sidecar_files)
CONTENT_CHECKS = (
    check_first_document,
    check_empty_documents,
    check_control_pieces,
    check_silent_tokens,
    check_counts,
    check_operators,
    check_decoded_bytes,
    check_originals,
    check_round_trip,
    check_copies,
    check_manifest_totals,
)


def split_figures(split: Split) -> dict[str, int]:
    """The line of the table about one split."""
    hashes = split.documents().hashes
    return {
        "files": len(split.shards),
        "documents": len(hashes),
        "tokens": sum(shard.tokens for shard in split.shards),
        "bytes": split.total("bytes"),
        "decoded": split.total("decoded"),
        "changed": len(split.occurrences("lossy")),
        "encoded_again": split.total("sampled"),
        "copies": len(find_copies(hashes)),
    }


# === The data set =================================================================================
class Examination:
    """One visit to a data set: collects `faults` in the order found, and the figures of the
    verdict.
    """

    def __init__(
        self, folder: Path, tokenizer: Path | None, workers: int, allow_overlap: int, cache: bool
    ) -> None:
        """Reads manifest and tokenizer. Raises UsageError if the folder holds no shards."""
        self.folder = folder
        self.workers = workers
        self.allow_overlap = allow_overlap
        self.use_cache = cache
        self.faults: list[Fault] = []
        self.figures: dict[str, Any] = {}
        self.splits: dict[str, Split] = {}
        self.scan_cache: ScanCache | None = None
        self.index: ShingleIndex | None = None
        self.paths = {}
        self.sidecar_paths = {}
        for split in ("train", "val"):
            self.paths[split] = shard_paths(folder, split)
            self.sidecar_paths[split] = shard_paths(folder, f"{split}_bytes")
        if not any(self.paths.values()):
            raise UsageError(f"{folder} holds no *_train_*.bin and no *_val_*.bin")
        self.manifest = read_manifest(folder, self.faults)
        self.tokenizer_path = find_tokenizer(folder, tokenizer, self.manifest)
        self.tokenizer = load_tokenizer(self.tokenizer_path, self.manifest, self.faults)
        # Sizes and time stamps are taken before anything is read, so that a later change makes the
        # verdict stale.
        self.watched = self._stat_files()

    def _stat_files(self) -> dict[str, list[int]]:
        """Size and time stamp in ns of every file that the verdict is about."""
        watched = [*self.folder.glob("*.bin"), self.folder / "manifest.json", self.tokenizer_path]
        stats = {path.name: path.stat() for path in watched if path.is_file()}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

    def examine(self) -> None:
        """Checks the files, then their contents.

        Contents are examined only if every shard can be read: its faults would be faults of
        everything else.
        """
        paths = self.paths["train"] + self.paths["val"]
        vocab_size = self.tokenizer.vocab_size if self.tokenizer else 1 << 16
        bos_id = self.tokenizer.bos_id if self.tokenizer else -1
        shards = examine_shards(paths, vocab_size, bos_id, self.workers)
        entries = self.manifest.get("splits", {})
        broken = [fault for shard in shards for fault in shard.faults]
        for name in ("train", "val"):
            members = [shard for shard in shards if shard.path in self.paths[name]]
            # Counts are uint16, and none of them is a BOS.
            counts = examine_shards(self.sidecar_paths[name], 1 << 16, -1, self.workers)
            split = Split(name, members, counts, entries.get(name), self.tokenizer)
            self.splits[name] = split
            for check in SPLIT_CHECKS:
                self.faults += check(split, self.folder.name)
            broken += [fault for shard in counts for fault in shard.faults]
            broken += length_faults(split)
        self.faults += check_repeated_files(shards)
        self.faults += broken
        if self.tokenizer and not broken:
            self.examine_contents()
        else:
            text = "documents, text and overlap are not examined until the files can be read"
            self.figures["unread"] = text

    def examine_contents(self) -> None:
        """Scans every span and checks what the scans found."""
        train = self.splits["train"]
        val = self.splits["val"]
        for split in (train, val):
            has_sidecar = len(split.sidecar) == len(split.shards) > 0
            split.spans = spans_of(split.name, split.shards, has_sidecar)
        parts = [np.empty(0, np.uint16), *(span.read() for span in val.spans)]
        self.index = ShingleIndex(np.concatenate(parts), self.tokenizer.bos_id)
        self.scan_cache = ScanCache(self.folder / ".doctor", self.tokenizer, self.index)
        # Validation takes longest, so it comes first.
        scans = self.scan(val.spans + train.spans)
        val.scans = scans[: len(val.spans)]
        train.scans = scans[len(val.spans) :]
        for split in (train, val):
            if split.shards:
                split.figures = split_figures(split)
                for check in CONTENT_CHECKS:
                    self.faults += check(split)
        for check in DATASET_CHECKS:
            self.faults += check(self)

    def scan(self, spans: list[Span]) -> list[Scan]:
        """The scan of each span, from the cache where that content was scanned before."""
        files = [self.scan_cache.file_of(span) for span in spans]
        scans: list[Scan | None] = [None] * len(spans)
        if self.use_cache:
            scans = [self.scan_cache.load(file) for file in files]
        missing = [number for number, scan in enumerate(scans) if scan is None]
        self.figures["scanned"] = len(missing)
        self.figures["cached"] = len(files) - len(missing)
        unscanned = [spans[number] for number in missing]
        new_scans = scan_spans(unscanned, self.tokenizer, self.index, self.workers)
        for number, scan in zip(missing, new_scans, strict=True):
            scans[number] = scan
            self.scan_cache.store(files[number], scan)
        return scans

    def verdict(self) -> dict[str, Any]:
        """The content of doctor.json.

        train_gpt.py reads `errors` and `files` (name -> size, time stamp in ns).
        """
        return {
            "version": 1,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "dataset": self.folder.name,
            "tokenizer": self.tokenizer_path.name,
            "errors": [fault.message() for fault in self.faults if fault.level == "error"],
            "warnings": [fault.message() for fault in self.faults if fault.level == "warning"],
            "splits": {name: split.figures for name, split in self.splits.items() if split.figures},
            **self.figures,
            "faults": [fault._asdict() for fault in self.faults],
            "sha256": {
                shard.path.name: shard.sha256
                for split in self.splits.values()
                for shard in [*split.shards, *split.sidecar]
            },
            "files": self.watched,
        }

    def save(self, verdict: dict[str, Any]) -> None:
        """Writes doctor.json and forgets scans of content that is gone."""
        content = json.dumps(verdict, indent=1) + "\n"
        write_atomic(self.folder / "doctor.json", content.encode())
        used = self.scan_cache.used if self.scan_cache else set()
        for file in (self.folder / ".doctor").glob("*.npz"):
            if file not in used:
                file.unlink()


# --- Checks of both splits together ---------------------------------------------------------------
def check_overlap(visit: Examination) -> Iterator[Fault]:
    """Validation documents that are in training; leaves its figures in the examination."""
    train = visit.splits["train"]
    val = visit.splits["val"]
    if not train.scans or not val.scans:
        return
    hashes = val.documents().hashes
    shared = overlap_search.merge_overlap(visit.index, hashes, train.parts, train.offsets)
    visit.figures["overlap"] = overlap_figures(visit.index, train.scans, shared)
    whole = [one for one in shared if one.whole]
    in_part = [one for one in shared if not one.whole]
    yield from overlap_faults(visit, whole, visit.allow_overlap)
    allowed_parts = int(MAX_PARTS * len(hashes)) + visit.allow_overlap
    yield from overlap_faults(visit, in_part, allowed_parts)


def overlap_faults(visit: Examination, shared: list[Shared], allowed: int) -> Iterator[Fault]:
    """Faults of the documents of one kind, largest share first: errors if there are more than
    allowed.
    """
    make_fault = error if len(shared) > allowed else warning
    train = visit.splits["train"]
    val = visit.splits["val"]
    documents = val.documents()
    by_share = sorted(shared, key=lambda one: -one.share)
    for rank, one in enumerate(by_share[:SHOWN_OVERLAPS]):
        file, at = val.position(documents.starts[one.document])
        there = train.position(one.train_at)
        where = f"{there.file}, token {there.at}"
        if one.whole:
            check = "overlap"
            text = f"the document is in training, at {where}"
        else:
            check = "overlap in part"
            text = f"{one.share:.0%} of its shingles are in training, "
            text += f"{one.run} ids in a row at {where}"
        if rank == 0:
            text += f"; {len(shared)} of {len(documents.hashes)} validation documents"
        yield make_fault(check, file, text, at)


def overlap_figures(index: ShingleIndex, scans: list[Scan], shared: list[Shared]) -> dict[str, Any]:
    """How much of validation training holds: documents, and shingles wherever they are."""
    held = np.zeros(len(index.hashes), dtype=bool)
    for scan in scans:
        held[scan.found] = True
    covered = index.coverage(held)
    held_share = float(held[index.number].mean()) if len(held) else 0.0
    return {
        "whole": sum(one.whole for one in shared),
        "part": sum(not one.whole for one in shared),
        "documents": [one._asdict() for one in shared[:LISTED_OVERLAPS]],
        "shingles": round(held_share, 6),
        "longest_run": int(covered.run.max(initial=0)),
        "highest_share": round(float(covered.share.max(initial=0)), 6),
    }


def check_published_totals(visit: Examination) -> Iterator[Fault]:
    """Totals of the published FineWeb validation set, where the data set's name says that it is
    that one.
    """
    name = visit.manifest.get("dataset", visit.folder.name)
    vocabulary = name.removeprefix("fineweb10B_")
    val = visit.splits["val"]
    if vocabulary == name or vocabulary not in canonical.TOKEN_RANGES or not val.shards:
        return
    visit.figures["canonical"] = vocabulary
    file = val.paths[0].name
    tokens = val.figures["tokens"]
    fewest, most = canonical.TOKEN_RANGES[vocabulary]
    if vocabulary == "sp1024" and tokens in canonical.WITHDRAWN_TOKENS:
        text = f"{tokens} tokens: the validation set that was withdrawn after the first baseline"
        yield error("canonical", file, text)
    elif not fewest <= tokens <= most:
        said = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        text = f"{tokens} tokens, the published validation set has {said}"
        if tokens == canonical.TRUNCATED_CASEOPS_TOKENS:
            text += "; this file is known to be cut off"
        yield error("canonical", file, text)
    documents = val.figures["documents"]
    if documents != canonical.DOCUMENTS:
        text = f"{documents} documents, published are {canonical.DOCUMENTS}"
        if documents == canonical.LEAKY_DOCUMENTS:
            text += "; such a build has the rest of them in training"
        yield error("canonical", file, text)
    size = val.figures["bytes"]
    is_caseops = vocabulary == canonical.CASEOPS_SUFFIX
    published = canonical.CASEOPS_TEXT_BYTES if is_caseops else canonical.TEXT_BYTES
    if abs(size / published - 1) > canonical.BYTES_TOLERANCE:
        yield error("canonical", file, f"{size} bytes, published are {published}")


def check_published_caseops(visit: Examination) -> Iterator[Fault]:
    """Tokenizer and number of training shards of the published CaseOps data, by its name."""
    name = visit.manifest.get("dataset", visit.folder.name)
    if name != f"fineweb10B_{canonical.CASEOPS_SUFFIX}":
        return
    if visit.tokenizer.sha256 != canonical.CASEOPS_TOKENIZER_SHA256:
        text = f"SHA-256 is {visit.tokenizer.sha256}, published with these data was another"
        yield error("canonical", visit.tokenizer_path.name, text)
    shards = len(visit.splits["train"].shards)
    if shards > canonical.TRAIN_SHARDS:
        text = f"{shards} training shards, published are {canonical.TRAIN_SHARDS}; "
        text += "a build with more has validation documents in training"
        yield error("canonical", name, text)


DATASET_CHECKS = (check_overlap, check_published_totals, check_published_caseops)


# === Command line =================================================================================
COLUMNS = ("files", "documents", "tokens", "bytes", "decoded", "encoded_again", "changed", "copies")


def print_splits(splits: dict[str, dict[str, int]]) -> None:
    """Prints a table with a line per split."""
    rows = [["split", *(column.replace("_", " ") for column in COLUMNS)]]
    for name, figures in splits.items():
        rows.append([name, *(f"{figures[column]:,}" for column in COLUMNS)])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for first, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print(first.ljust(widths[0]), *padded)


def print_report(verdict: dict[str, Any]) -> None:
    """Prints a verdict for people: the splits, the overlap, a line per fault, the counts."""
    if verdict["splits"]:
        print_splits(verdict["splits"])
    if "overlap" in verdict:
        found = verdict["overlap"]
        print(
            f"overlap: {found['whole']} validation documents are in training, "
            f"{found['part']} more in part; "
            f"{found['shingles']:.2%} of all {overlap_search.SHINGLE}-id shingles, "
            f"at most {found['highest_share']:.0%} of a document's "
            f"and {found['longest_run']} ids in a row"
        )
    if "unread" in verdict:
        print(verdict["unread"])
    for level in ("error", "warning"):
        for line in verdict[f"{level}s"]:
            print(f"{level}: {line}")
    num_errors = len(verdict["errors"])
    num_warnings = len(verdict["warnings"])
    print(f"{verdict['dataset']}: {num_errors} errors, {num_warnings} warnings")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command line of the doctor."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        metavar="DIR",
        help="folder of the shards, as data/datasets/pydocs_sp1024_caseops",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="MODEL",
        help="default: the manifest's, beside the data set",
    )
    add("--json", action="store_true", help="print the verdict as JSON instead of a table")
    strict_help = "warnings count as errors, here and for train_gpt.py"
    add("--strict", action="store_true", help=strict_help)
    overlap_help = "whole validation documents that training may hold without error (default 0)"
    add("--allow-overlap", type=int, default=0, metavar="N", help=overlap_help)
    add("--no-cache", action="store_true", help="scan every shard again")
    cores = os.cpu_count() or 1
    add("--workers", type=int, default=cores, help=f"processes (default {cores}, all cores)")


def run(args: argparse.Namespace) -> int:
    """Examines a data set and returns the exit status: 0 no error, 1 errors.

    Raises UsageError if DIR holds no shards.
    """
    if not args.folder.is_dir():
        raise UsageError(f"{args.folder} is not a folder")
    folder = args.folder.resolve()
    visit = Examination(folder, args.tokenizer, args.workers, args.allow_overlap, not args.no_cache)
    visit.examine()
    if args.strict:
        visit.faults = [fault._replace(level="error") for fault in visit.faults]
    verdict = visit.verdict()
    if args.json:
        print(json.dumps(verdict, indent=1))
    else:
        print_report(verdict)
    try:
        visit.save(verdict)
    except OSError as reason:
        text = f"doctor.json is not written ({reason.strerror}), so train_gpt.py does not know"
        print(text, file=sys.stderr)
    return 1 if verdict["errors"] else 0
