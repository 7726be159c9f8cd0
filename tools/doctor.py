"""Examines a data set before a run pays for it: `tools/prepare_data.py doctor data/datasets/<dataset>`.

Reads every shard once and compares what it finds with the manifest, the tokenizer, the published totals of FineWeb and
the other split:

    files       headers, lengths, numbering, SHA-256, shards that are there twice, id range, byte order
    documents   BOS at the beginning, empty ones, control pieces inside, copies within a split
    text        bytes by decoding, decode -> encode -> the same ids, totals
    overlap     validation documents that are in training: whole ones by hash, parts by shingles (32 ids in a row)

An error means that scores on these data are wrong or that a run would read something else than text; a warning does
not. The verdict goes to doctor.json beside the manifest, with size and time stamp of every file it is about;
train_gpt.py refuses data with an error until a file changes or the doctor finds none. What was found in a shard is kept
in .doctor/ under the hash of its content. Exit status: 0 no error, 1 errors, 2 wrong usage.

The scans are functions of arrays, for other tools too: `document_starts`, `document_hashes`, `shingle_hashes`,
`decoded_bytes`, `round_trip`, `ShingleIndex` and `overlap`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece as spm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt import CANONICAL, SHARD_HEADER, ByteTable, UsageError, read_shard, write_atomic  # noqa: E402

SHINGLE = 32  # ids in a row; a power of two
STRIDE = 8  # every 8th shingle of a validation document is looked for at every position of training
MIN_PART = 64  # ids: shorter common passages are phrases
MAX_SHARED = 0.5  # share of a validation document's shingles that training may hold
MAX_RUN = 512  # ids in a row that a validation document may share with training
MAX_PARTS = 0.05  # share of validation documents in training in part; web text without a whole copy had 0.024
CHUNK = 1 << 14  # positions hashed at once: fits the cache of a core
SAMPLE = 200  # training documents of a shard that are decoded and encoded again; of validation ten times as many
MAX_LOSSY = 0.05  # share of sampled documents whose ids may change when decoded and encoded again
SMALL = 16_000_000  # ids: fewer are scanned in this process
VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[
    :16
]  # another doctor trusts no old scan

# What the published FineWeb validation set holds: 50,000 documents, 151,080,891 bytes. The ids are exact for sp8192,
# the others from scored totals in logs of merged records, which leave out a last part of at most 2048 ids.
CANONICAL_DOCUMENTS = CANONICAL["fineweb10B_sp8192"].documents
CANONICAL_BYTES = CANONICAL["fineweb10B_sp8192"].bytes
SP8192_TOKENS = CANONICAL["fineweb10B_sp8192"].tokens
BYTES_TOLERANCE = 1e-4
CANONICAL_TOKENS = {
    "sp1024": (62_021_632, 62_023_681),
    "sp4096": (45_508_608, 45_510_657),
    "sp8192": (SP8192_TOKENS, SP8192_TOKENS),
}
WITHDRAWN_TOKENS = range(63_779_840, 63_779_840 + 2049)  # sp1024 of the first baseline

_RNG = np.random.default_rng(20240520)
ID_HASH = _RNG.integers(0, 2**64, 1 << 16, dtype=np.uint64)
SPAN_FACTOR = _RNG.integers(0, 2**63, SHINGLE.bit_length() - 1, dtype=np.uint64) * np.uint64(
    2
) + np.uint64(1)

# ---- Scans of arrays ------------------------------------------------------------------------------------------------


def document_starts(tokens: np.ndarray, bos_id: int) -> np.ndarray:
    """Positions (D,) int64 of every BOS in ids (n,)."""
    return np.flatnonzero(tokens == bos_id)


def document_hashes(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """BLAKE2b of each document's ids without its BOS, cut to 64 bits: (D,) uint64. The last one ends with `tokens`."""
    data, ends = (
        memoryview(np.ascontiguousarray(tokens, dtype="<u2")).cast("B"),
        np.append(starts[1:], len(tokens)),
    )
    hashes = [
        hashlib.blake2b(data[2 * a + 2 : 2 * b], digest_size=8).digest()
        for a, b in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    return np.frombuffer(b"".join(hashes), dtype="<u8")


def shingle_hashes(tokens: np.ndarray) -> np.ndarray:
    """64-bit hash of every SHINGLE ids in a row of `tokens` (n,): (max(n - 31, 0),) uint64.

    Doubles the span five times: hash(2s ids at i) = hash(s ids at i) * factor + hash(s ids at i + s), modulo 2^64.
    """
    hashed = ID_HASH[tokens]
    for level, factor in enumerate(SPAN_FACTOR):
        span = 1 << level
        if len(hashed) <= span:
            return hashed[:0]
        left = hashed[:-span] * factor
        left += hashed[span:]
        hashed = left
    return hashed


def decoded_bytes(
    tokens: np.ndarray, starts: np.ndarray, sp: spm.SentencePieceProcessor
) -> np.ndarray:
    """UTF-8 bytes of each document's text, by really decoding it: (D,) int64. The last one ends with `tokens`."""
    ends = np.append(starts[1:], len(tokens))
    sizes = np.empty(len(starts), dtype=np.int64)
    for first in range(0, len(starts), 256):
        part = slice(first, first + 256)
        ids = [tokens[a + 1 : b].tolist() for a, b in zip(starts[part], ends[part], strict=True)]
        sizes[part] = [len(text.encode()) for text in sp.decode(ids)]
    return sizes


def round_trip(tokens: np.ndarray, starts: np.ndarray, which: Iterable[int], sp: Any) -> list[int]:
    """Which documents, of those asked for, do not give their ids back when decoded and encoded again.

    A few do not with a tokenizer that normalises or whose text was cut in pieces before it was encoded; most of them do
    not with another tokenizer than the one that made the ids.
    """
    ends, lossy = np.append(starts[1:], len(tokens)), []
    for i in which:
        ids = tokens[starts[i] + 1 : ends[i]].tolist()
        if sp.encode(sp.decode(ids)) != ids:
            lossy.append(int(i))
    return lossy


class ShingleIndex:
    """Every STRIDE-th shingle of each validation document, none across a BOS; finds them at any position elsewhere.

    Any MIN_PART ids in a row of a validation document hold at least four of its indexed shingles.
    """

    def __init__(self, val: np.ndarray, bos_id: int) -> None:
        self.starts = document_starts(val, bos_id)
        ends = np.append(self.starts[1:], len(val))
        counts = np.maximum(0, (ends - self.starts - 1 - SHINGLE) // STRIDE + 1)
        self.owner = np.repeat(
            np.arange(len(counts)), counts
        )  # (S,) document of each indexed shingle
        within = np.arange(len(self.owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        at = self.starts[self.owner] + 1 + STRIDE * within
        every = np.concatenate([np.empty(0, np.uint64), *chunked_hashes(val)])
        self.hashes, self.number = np.unique(
            every[at], return_inverse=True
        )  # sorted (U,); (S,) index into it
        bits = max(16, int(8 * len(self.hashes)).bit_length())
        self.shift = np.uint64(64 - bits)
        self.filters = np.zeros(
            (2, 1 << bits), dtype=bool
        )  # each ends all but 1 in 8 searches for what is not there
        self.filters[0][self.hashes >> self.shift] = True
        self.filters[1][self.second_key(self.hashes)] = True

    @property
    def key(self) -> str:
        return hashlib.sha256(self.hashes.tobytes()).hexdigest()

    def second_key(self, hashed: np.ndarray) -> np.ndarray:
        return (hashed * SPAN_FACTOR[0]) >> self.shift

    def find(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of `hashes` occur in ids (n,), and the first position of each: two arrays (F,) int64."""
        found: list[np.ndarray] = []
        where: list[np.ndarray] = []
        if len(self.hashes):
            for number, hashed in enumerate(chunked_hashes(tokens)):
                at = np.flatnonzero(self.filters[0][hashed >> self.shift])
                at = at[self.filters[1][self.second_key(hashed[at])]]
                candidates = hashed[at]
                index = np.minimum(np.searchsorted(self.hashes, candidates), len(self.hashes) - 1)
                hit = self.hashes[index] == candidates
                found.append(index[hit])
                where.append(at[hit] + number * CHUNK)
        index, first = np.unique(np.concatenate([np.empty(0, np.int64), *found]), return_index=True)
        return index, np.concatenate([np.empty(0, np.int64), *where])[first]

    def shared(self, found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """From which `hashes` were found, (U,) bool: per validation document (D,) the share of its shingles found, its
        longest run of ids in a row that they cover, and where that run begins (index into `owner`)."""
        hit, number = found[self.number], len(self.starts)
        totals = np.bincount(self.owner, minlength=number)
        share = np.bincount(self.owner, weights=hit, minlength=number) / np.maximum(totals, 1)
        # runs of hits within one document
        edge = np.diff(self.owner, prepend=-1) != 0
        begins = np.flatnonzero(hit & (edge | ~np.append(False, hit[:-1])))
        ends = np.flatnonzero(hit & np.append(edge[1:] | ~hit[1:], True)) if len(hit) else begins
        length = (ends - begins) * STRIDE + SHINGLE
        run, first = np.zeros(number, dtype=np.int64), np.zeros(number, dtype=np.int64)
        order = np.argsort(length, kind="stable")  # the longest is written last
        run[self.owner[begins[order]]] = length[order]
        first[self.owner[begins[order]]] = begins[order]
        return share, run, first


def chunked_hashes(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """`shingle_hashes` of a long array in parts of CHUNK positions, the last one shorter."""
    for start in range(0, max(0, len(tokens) - SHINGLE + 1), CHUNK):
        yield shingle_hashes(tokens[start : start + CHUNK + SHINGLE - 1])


class Shared(NamedTuple):
    """A validation document that is in training."""

    document: int  # number in the validation stream
    val_at: int  # position of its BOS in the validation stream
    train_at: int  # of the whole copy's BOS, or of the beginning of the longest common run, in the training stream
    share: float  # of its shingles that training holds; 1 for a whole copy
    run: int  # ids in a row
    whole: bool


def overlap(train: Sequence[np.ndarray], val: np.ndarray, bos_id: int) -> list[Shared]:
    """Validation documents that training holds, whole (same hash) or in part; in the order of validation.

    train: arrays of ids that each begin with a document and hold whole ones, as a training stream in pieces; val: ids.
    In part means at least MAX_SHARED of its shingles and MIN_PART ids in a row, or MAX_RUN ids in a row, wherever they
    stand in training. A part that was put together from shorter passages of several documents counts as well.
    """
    index = ShingleIndex(val, bos_id)
    scans, offsets = [], np.cumsum([0] + [len(part) for part in train])
    for part in train:
        starts = document_starts(part, bos_id)
        found, where = index.find(part)
        scans.append(
            {
                "starts": starts,
                "hashes": document_hashes(part, starts),
                "found": found,
                "where": where,
            }
        )
    return merge_overlap(index, document_hashes(val, index.starts), scans, offsets)


def merge_overlap(
    index: ShingleIndex, val_hashes: np.ndarray, scans: list[dict], offsets: np.ndarray
) -> list[Shared]:
    """`overlap` from what was found in each part of training; offsets: where each part begins in its stream."""
    place = np.full(
        len(index.hashes), -1, dtype=np.int64
    )  # first position in training of each shingle
    for scan, offset in zip(reversed(scans), offsets[: len(scans)][::-1], strict=True):
        place[scan["found"]] = scan["where"] + offset
    share, run, first = index.shared(place >= 0)
    hashes, at = stream_documents(scans, offsets)
    order = np.argsort(hashes, kind="stable")
    slot = np.minimum(np.searchsorted(hashes[order], val_hashes), max(len(hashes) - 1, 0))
    whole = (
        hashes[order][slot] == val_hashes if len(hashes) else np.zeros(len(val_hashes), dtype=bool)
    )
    part = ((share >= MAX_SHARED) & (run >= MIN_PART)) | (run >= MAX_RUN)
    found = []
    for i in np.flatnonzero(whole | part):
        train_at = at[order[slot[i]]] if whole[i] else place[index.number[first[i]]]
        share_i = 1.0 if whole[i] else float(share[i])
        found.append(
            Shared(
                int(i), int(index.starts[i]), int(train_at), share_i, int(run[i]), bool(whole[i])
            )
        )
    return found


def stream_documents(
    scans: list[dict[str, np.ndarray]], offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Hash and position in the stream of every document of all parts, in order: (D,) uint64, (D,) int64."""
    at = [
        scan["starts"] + offset for scan, offset in zip(scans, offsets[: len(scans)], strict=True)
    ]
    hashes = [scan["hashes"] for scan in scans]
    return np.concatenate([np.empty(0, np.uint64), *hashes]), np.concatenate(
        [np.empty(0, np.int64), *at]
    )


# ---- Files ----------------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    level: str  # error or warning
    check: str
    file: str
    at: int | None  # token in the file; None: the file as a whole
    text: str

    def __str__(self) -> str:
        place = self.file if self.at is None else f"{self.file}, token {self.at}"
        return f"{self.level}: {place}: {self.check}: {self.text}"


class Shard(NamedTuple):
    path: Path
    sha256: str
    tokens: int  # 0 if it cannot be read
    first_bos: int  # -1 if it holds none
    faults: list[Fault]


class Tokenizer(NamedTuple):
    path: Path
    sha256: str
    data: bytes
    bos_id: int
    vocab_size: int


def header_fault(name: str, data: bytes) -> Fault | None:
    """What is wrong with header or length of a shard's bytes."""

    def fault(check: str, text: str) -> Fault:
        return Fault("error", check, name, None, text)

    if len(data) < 1024:
        return fault("cut", f"{len(data)} bytes end inside the header of 1024")
    magic, version, count = np.frombuffer(data, dtype="<i4", count=3)
    if magic != SHARD_HEADER[0]:
        swapped = magic.byteswap() == SHARD_HEADER[0]
        wrong = fault("byte order", "is swapped, from the header on") if swapped else None
        return wrong or fault("magic", f"starts with {magic}, a shard with {SHARD_HEADER[0]}")
    if version != SHARD_HEADER[1]:
        return fault("version", f"is {version}, this doctor knows {SHARD_HEADER[1]}")
    if count <= 0:
        return fault("header", f"promises {count} tokens")
    extra = len(data) - 1024 - 2 * int(count)
    if extra < 0:
        return fault("cut", f"lacks {-extra} bytes of the {count} tokens that its header promises")
    return (
        fault("excess", f"{extra} bytes follow the {count} tokens that its header promises")
        if extra
        else None
    )


def examine_shard(path: Path, vocab_size: int, bos_id: int) -> Shard:
    """Hash, header, length, id range and byte order of one file."""
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if fault := header_fault(path.name, data):
        return Shard(path, sha256, 0, -1, [fault])
    tokens, faults = np.frombuffer(data, dtype="<u2", offset=1024), []
    if tokens.max() >= vocab_size:
        bad = np.flatnonzero(tokens >= vocab_size)
        text = f"{tokens[bad[0]]} is the first of {len(bad)} ids outside the vocabulary of {vocab_size}"
        check = "byte order" if tokens.byteswap().max() < vocab_size else "id range"
        text += ", which all fit with their bytes swapped" if check == "byte order" else ""
        faults.append(Fault("error", check, path.name, int(bad[0]), text))
    first = next(
        (
            i + int(hit.argmax())
            for i in range(0, len(tokens), 1 << 20)
            if (hit := tokens[i : i + (1 << 20)] == bos_id).any()
        ),
        -1,
    )
    return Shard(path, sha256, len(tokens), first, faults)


def numbering(paths: list[Path], split: str) -> Iterator[Fault]:
    """Shards missing from 0 to the last number, numbers taken twice, names of two kinds."""
    matches = {path: re.fullmatch(rf"(.+)_{split}_(\d+)\.bin", path.name) for path in paths}
    for path, match in matches.items():
        if not match:
            yield Fault(
                "error",
                "name",
                path.name,
                None,
                f"is read as a {split} shard, but has no number at the end",
            )
    named = [(path, match[1], int(match[2])) for path, match in matches.items() if match]
    seen: dict[int, Path] = {}
    for path, prefix, number in named:
        if prefix != named[0][1]:
            yield Fault(
                "error", "name", path.name, None, f"has another prefix than {named[0][0].name}"
            )
        elif number in seen:
            yield Fault("error", "name", path.name, None, f"has the number of {seen[number].name}")
        seen[number] = path
    for number in sorted(set(range(max(seen, default=-1) + 1)) - set(seen)):
        width = len(re.search(r"(\d+)\.bin", named[0][0].name)[1])
        name = f"{named[0][1]}_{split}_{number:0{width}d}.bin"
        yield Fault("error", "missing shard", name, None, f"the shards go on to number {max(seen)}")


def twice(shards: list[Shard]) -> Iterator[Fault]:
    seen: dict[str, str] = {}
    for shard in shards:
        if shard.sha256 in seen:
            yield Fault(
                "error",
                "shard twice",
                shard.path.name,
                None,
                f"is the same file as {seen[shard.sha256]}",
            )
        seen.setdefault(shard.sha256, shard.path.name)


def against_manifest(entry: dict[str, Any], shards: list[Shard]) -> Iterator[Fault]:
    """Files of one split, their hashes and tokens; hashes are compared where the manifest has them."""
    listed = {file["name"]: file for file in entry["files"]}
    if len(listed) < len(entry["files"]):
        yield Fault("error", "manifest", "manifest.json", None, "names a file twice")
    here = {shard.path.name: shard for shard in shards}
    for name in sorted(set(listed) - set(here)):
        yield Fault("error", "missing shard", name, None, "the manifest names it")
    for name, shard in here.items():
        if name not in listed:
            yield Fault("error", "foreign shard", name, None, "the manifest does not name it")
            continue
        if listed[name].get("sha256", shard.sha256) != shard.sha256:
            yield Fault(
                "error",
                "manifest sha256",
                name,
                None,
                f"is {shard.sha256}, the manifest has another",
            )
        if shard.tokens and listed[name]["tokens"] != shard.tokens:
            text = f"holds {shard.tokens}, the manifest says {listed[name]['tokens']}"
            yield Fault("error", "manifest tokens", name, None, text)
    if entry["tokens"] != sum(file["tokens"] for file in entry["files"]):
        text = f"says {entry['tokens']} for a split whose files add up to {sum(f['tokens'] for f in entry['files'])}"
        yield Fault("error", "manifest tokens", "manifest.json", None, text)


# ---- Contents -------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """The documents that begin in one shard; the last one may end in a later shard."""

    split: str
    offset: int  # of its first token in the stream
    parts: list[tuple[Path, str, int, int]]  # file, its SHA-256, from, to

    def read(self) -> np.ndarray:
        parts = [read_shard(path)[begin:end] for path, _, begin, end in self.parts]
        return np.concatenate(parts) if len(parts) > 1 else np.asarray(parts[0])


def spans_of(split: str, shards: list[Shard]) -> list[Span]:
    spans: list[Span] = []
    starts = np.cumsum([0] + [shard.tokens for shard in shards])
    for shard, start in zip(shards, starts[:-1].tolist(), strict=True):
        head = shard.first_bos if shard.first_bos >= 0 else shard.tokens
        if head and spans:
            spans[-1].parts.append((shard.path, shard.sha256, 0, head))
        if shard.first_bos >= 0:
            spans.append(
                Span(split, start + head, [(shard.path, shard.sha256, head, shard.tokens)])
            )
    return spans


def scan_span(
    span: Span, tokenizer: Tokenizer, index: ShingleIndex | None
) -> dict[str, np.ndarray]:
    """All that the verdict needs of a span, positions counted from its beginning. index: of validation, for training.

    Bytes are counted by the byte table for every document; decoded are all of validation and SAMPLE of each training
    shard. `miscounted` are those decoded documents where table and text disagree, `lossy` as in `round_trip`.
    """
    sp = spm.SentencePieceProcessor(model_proto=tokenizer.data)
    table, tokens = ByteTable.from_sentencepiece(sp), span.read()
    starts, total, control = document_starts(tokens, tokenizer.bos_id), 0, []
    for begin in range(0, len(tokens), 1 << 20):
        chunk = tokens[
            begin : begin + (1 << 20) + 1
        ]  # one more: a target's bytes depend on its predecessor
        total += table.count(chunk)
        inside = table.boundary[chunk[: 1 << 20]] & (chunk[: 1 << 20] != tokenizer.bos_id)
        control.append(begin + np.flatnonzero(inside))
    decoded = spread(len(starts), len(starts) if index is None else SAMPLE)
    picked, at = pick(tokens, starts, decoded)
    ends = np.append(at[1:], len(picked))
    counted = np.array(
        [table.count(picked[a:b]) for a, b in zip(at, ends, strict=True)], dtype=np.int64
    )
    sampled = spread(len(at), SAMPLE * (10 if index is None else 1))
    lossy = round_trip(picked, at, sampled, sp)
    result = {
        "starts": starts,
        "hashes": document_hashes(tokens, starts),
        "bytes": total,
        "tokens": len(tokens),
        "control": np.concatenate(control),
        "decoded": len(decoded),
        "sampled": len(sampled),
        "miscounted": decoded[decoded_bytes(picked, at, sp) != counted],
        "lossy": decoded[lossy],
    }
    if index is not None:
        result["found"], result["where"] = index.find(tokens)
    return {key: np.asarray(value) for key, value in result.items()}


def spread(number: int, wanted: int) -> np.ndarray:
    """At most `wanted` of 0 .. number - 1, evenly spread."""
    return np.unique(np.linspace(0, number - 1, min(number, wanted)).astype(np.int64))


def pick(
    tokens: np.ndarray, starts: np.ndarray, which: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The documents `which` end to end, and where each of them starts."""
    ends = np.append(starts[1:], len(tokens))
    if len(which) == len(starts):
        return tokens, starts
    parts = [tokens[a:b] for a, b in zip(starts[which], ends[which], strict=True)]
    return np.concatenate(parts), np.cumsum([0] + [len(part) for part in parts[:-1]])


_CONTEXT: tuple = ()  # of a worker process: tokenizer and index, sent once


def _begin(*context: Any) -> None:
    global _CONTEXT
    _CONTEXT = context


def _scan(span: Span) -> dict[str, np.ndarray]:
    tokenizer, index = _CONTEXT
    return scan_span(span, tokenizer, index if span.split == "train" else None)


class Examination:
    """One visit: `faults` in the order found, `splits` with the figures of each, `overlaps`."""

    def __init__(
        self, folder: Path, tokenizer: Path | None, workers: int, allow_overlap: int, cache: bool
    ) -> None:
        self.folder, self.workers, self.allow_overlap, self.use_cache = (
            folder,
            workers,
            allow_overlap,
            cache,
        )
        self.faults: list[Fault] = []
        self.splits: dict[str, dict[str, Any]] = {}
        self.figures: dict[str, Any] = {}
        self.used: set[Path] = set()  # cache files
        self.paths = {split: sorted(folder.glob(f"*_{split}_*.bin")) for split in ("train", "val")}
        if not any(self.paths.values()):
            raise UsageError(f"{folder} holds no *_train_*.bin and no *_val_*.bin")
        self.manifest = self.read_manifest()
        self.tokenizer = self.load_tokenizer(tokenizer)
        watched = [*folder.glob("*.bin"), folder / "manifest.json", self.tokenizer_path]
        stats = {
            path.name: path.stat() for path in watched if path.is_file()
        }  # before anything is read
        self.watched = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

    def error(
        self, check: str, file: str, text: str, at: int | None = None, level: str = "error"
    ) -> None:
        self.faults.append(Fault(level, check, file, at, text))

    def read_manifest(self) -> dict[str, Any]:
        """The manifest, {} if there is none or if it is none of prepare_data.py."""
        path = self.folder / "manifest.json"
        if not path.exists():
            self.error(
                "manifest",
                path.name,
                "there is none, so totals and hashes are not checked",
                level="warning",
            )
            return {}
        try:
            manifest = json.loads(path.read_text())
            for entry in manifest["splits"].values():
                _ = (
                    entry["documents"]
                    + entry["bytes"]
                    + entry["tokens"]
                    + sum(f["tokens"] for f in entry["files"])
                )
                _ = [f["name"] for f in entry["files"]]
            _ = manifest["tokenizer"]["file"], manifest["tokenizer"]["sha256"]
        except (ValueError, KeyError, TypeError, AttributeError):
            self.error("manifest", path.name, "is not one of tools/prepare_data.py")
            return {}
        return manifest

    def load_tokenizer(self, given: Path | None) -> Tokenizer | None:
        about = self.manifest.get("tokenizer", {})
        size = re.search(r"_sp(\d+)$", self.folder.name)
        default = about.get("file") or f"fineweb_{size[1] if size else 0}_bpe.model"
        self.tokenizer_path = path = given or self.folder.parent.parent / "tokenizers" / default
        try:
            data = path.read_bytes()
            sp = spm.SentencePieceProcessor(model_proto=data)
        except (OSError, RuntimeError) as error:
            self.error(
                "tokenizer", path.name, f"no SentencePiece model at {path} ({type(error).__name__})"
            )
            return None
        tokenizer = Tokenizer(
            path, hashlib.sha256(data).hexdigest(), data, sp.bos_id(), sp.vocab_size()
        )
        if about.get("sha256", tokenizer.sha256) != tokenizer.sha256:
            self.error(
                "tokenizer", path.name, f"SHA-256 is {tokenizer.sha256}, the manifest has another"
            )
        for key in ("vocab_size", "bos_id"):
            if about.get(key, getattr(tokenizer, key)) != getattr(tokenizer, key):
                self.error(
                    "tokenizer",
                    path.name,
                    f"{key} is {getattr(tokenizer, key)}, manifest: {about[key]}",
                )
        if tokenizer.bos_id < 0:
            self.error("tokenizer", path.name, "has no BOS, so documents cannot be told apart")
            return None
        return tokenizer

    def examine(self) -> None:
        """Files first; contents only of shards that can be read, for their faults would be faults of everything."""
        jobs = [path for paths in self.paths.values() for path in paths]
        vocab_size, bos_id = (
            (self.tokenizer.vocab_size, self.tokenizer.bos_id) if self.tokenizer else (1 << 16, -1)
        )
        with self.pool(sum(path.stat().st_size for path in jobs) // 2) as run:
            shards = list(run(examine_shard, jobs, [vocab_size] * len(jobs), [bos_id] * len(jobs)))
        self.sha256 = {shard.path.name: shard.sha256 for shard in shards}
        self.shards = {
            split: [s for s in shards if s.path in paths] for split, paths in self.paths.items()
        }
        for split, members in self.shards.items():
            if not members:
                self.error("missing split", self.folder.name, f"holds no *_{split}_*.bin")
            self.faults += numbering(self.paths[split], split)
            if entry := self.manifest.get("splits", {}).get(split):
                self.faults += against_manifest(entry, members)
        self.faults += twice(shards)
        broken = [fault for shard in shards for fault in shard.faults]
        self.faults += broken
        if self.tokenizer and not broken:
            self.contents()
        else:
            self.figures["unread"] = (
                "documents, text and overlap are not examined until the files can be read"
            )

    @contextlib.contextmanager
    def pool(self, tokens: int, *context: Any) -> Iterator[Any]:
        """A `map` over worker processes, or in this one where starting them would take longer than the work."""
        if tokens < SMALL or self.workers < 2:
            _begin(*context)
            yield map
        else:
            with concurrent.futures.ProcessPoolExecutor(
                self.workers, initializer=_begin, initargs=context
            ) as pool:
                yield pool.map

    def scan(self, spans: list[Span], index: ShingleIndex) -> list[dict[str, np.ndarray]]:
        """`scan_span` of each, from the cache where that content was scanned before."""
        files, index_key = [], index.key
        for span in spans:
            tail = [read_shard(path)[begin:end].tobytes() for path, _, begin, end in span.parts[1:]]
            content = [span.parts[0][1:], hashlib.sha256(b"".join(tail)).hexdigest()]
            about = [
                VERSION,
                spm.__version__,
                self.tokenizer.sha256,
                index_key if span.split == "train" else "",
            ]
            key = hashlib.sha256(json.dumps([*about, content]).encode()).hexdigest()[:32]
            files.append(self.folder / ".doctor" / f"{key}.npz")
        results = [load_scan(file) if self.use_cache else None for file in files]
        missing = [i for i, result in enumerate(results) if result is None]
        self.figures |= {"scanned": len(missing), "cached": len(files) - len(missing)}
        sizes = [sum(part[3] - part[2] for part in spans[i].parts) for i in missing]
        with self.pool(sum(sizes), self.tokenizer, index) as run:
            for i, result in zip(missing, run(_scan, [spans[i] for i in missing]), strict=True):
                results[i] = result
                self.store(files[i], result)
        self.used |= set(files)
        return results

    def store(self, file: Path, result: dict[str, np.ndarray]) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **result)
        with contextlib.suppress(
            OSError
        ):  # a data set on a read-only disk is scanned again each time
            write_atomic(file, buffer.getvalue())

    def contents(self) -> None:
        spans = {split: spans_of(split, shards) for split, shards in self.shards.items()}
        val = np.concatenate([np.empty(0, np.uint16), *(span.read() for span in spans["val"])])
        index = ShingleIndex(val, self.tokenizer.bos_id)
        del val
        results = self.scan(
            spans["val"] + spans["train"], index
        )  # validation takes longest, so it comes first
        scans = {"val": results[: len(spans["val"])], "train": results[len(spans["val"]) :]}
        for split in ("train", "val"):
            if self.shards[split]:
                self.split_faults(split, spans[split], scans[split])
        if all(scans.values()):
            self.overlap_faults(index, spans, scans)
        self.canonical()

    def place(self, split: str, position: int) -> tuple[str, int]:
        """Position in the stream -> name of the file, token in it."""
        starts = np.cumsum([0] + [shard.tokens for shard in self.shards[split]])
        i = int(np.searchsorted(starts, position, side="right")) - 1
        return self.shards[split][i].path.name, int(position - starts[i])

    def split_faults(
        self, split: str, spans: list[Span], scans: list[dict[str, np.ndarray]]
    ) -> None:
        """Everything about one split by itself; leaves its figures in `splits`."""
        offsets = np.array([span.offset for span in spans], dtype=np.int64)
        first = self.shards[split][0]
        if first.first_bos != 0:
            text = (
                "the stream does not begin with a document"
                if spans
                else "no document begins in this split"
            )
            self.error("no BOS", first.path.name, f"{text} (BOS id {self.tokenizer.bos_id})", at=0)

        def first_of(
            key: str,
        ) -> Iterator[tuple[int, int]]:  # (position in the stream, how many in all)
            positions = [
                scan[key] + offset
                for scan, offset in zip(scans, offsets, strict=True)
                if len(scan[key])
            ]
            if positions:
                yield int(positions[0][0]), sum(map(len, positions))

        for scan in scans:  # numbers of documents -> positions
            scan["empty"] = scan["starts"][np.diff(scan["starts"], append=scan["tokens"]) == 1]
            scan["miscounted_at"], scan["lossy_at"] = (
                scan["starts"][scan["miscounted"]],
                scan["starts"][scan["lossy"]],
            )
        sampled = sum(int(scan["sampled"]) for scan in scans)
        for position, number in first_of("empty"):
            file, at = self.place(split, position)
            self.error("empty document", file, f"BOS without text, {number} in this split", at)
        for position, number in first_of("control"):
            file, at = self.place(split, position)
            self.error(
                "control id",
                file,
                f"a control, unknown or unused piece in a text, {number} in this split",
                at,
            )
        for position, number in first_of("miscounted_at"):
            file, at = self.place(split, position)
            text = f"byte table and decoded text disagree in {number} of {sum(int(s['decoded']) for s in scans)}"
            self.error("bytes", file, f"{text} documents", at)
        lossy = 0
        for position, lossy in first_of("lossy_at"):
            file, at = self.place(split, position)
            level = "error" if lossy > MAX_LOSSY * sampled else "warning"
            text = f"{lossy} of {sampled} documents change their ids when decoded and encoded again"
            text += "; was this the tokenizer?" if level == "error" else ""
            self.error("round trip", file, text, at, level)
        hashes, at = stream_documents(scans, offsets)
        figures = {"files": len(self.shards[split]), "documents": len(hashes)}
        figures |= {"tokens": sum(shard.tokens for shard in self.shards[split])}
        figures |= {"bytes": sum(int(scan["bytes"]) for scan in scans)}
        figures |= {
            "decoded": sum(int(s["decoded"]) for s in scans),
            "changed": lossy,
            "encoded_again": sampled,
        }
        figures["copies"] = self.copies(split, hashes, at)
        self.splits[split] = figures
        if entry := self.manifest.get("splits", {}).get(split):
            for key in ("documents", "bytes"):
                if entry[key] != figures[key]:
                    text = f"says {entry[key]} for {split}, the shards hold {figures[key]}"
                    self.error(f"manifest {key}", "manifest.json", text)

    def copies(self, split: str, hashes: np.ndarray, at: np.ndarray) -> int:
        """Documents of a split that are there before; a web corpus has some, so they are warnings."""
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        if len(same):
            later = order[same + 1]
            i = int(same[later.argmin()])
            (file, position), (before, there) = (
                self.place(split, at[order[j]]) for j in (i + 1, i)
            )
            text = f"is the one at {before}, token {there}; {len(same)} copies in {len(hashes)} {split} documents"
            self.error("duplicate document", file, text, position, "warning")
        return len(same)

    def overlap_faults(
        self, index: ShingleIndex, spans: dict[str, list[Span]], scans: dict[str, list[dict]]
    ) -> None:
        offsets = {
            split: np.array([span.offset for span in spans[split]], dtype=np.int64)
            for split in spans
        }
        val_hashes, val_at = stream_documents(scans["val"], offsets["val"])
        shared = merge_overlap(index, val_hashes, scans["train"], offsets["train"])
        for kind, allowed in ((True, 0), (False, int(MAX_PARTS * len(val_hashes)))):
            members = sorted(
                (one for one in shared if one.whole == kind), key=lambda one: -one.share
            )
            level = "error" if len(members) > allowed + self.allow_overlap else "warning"
            for one in members[:5]:  # the figures have them all
                file, at = self.place("val", val_at[one.document])
                train = "{}, token {}".format(*self.place("train", one.train_at))
                part = f"{one.share:.0%} of its shingles are in training, {one.run} ids in a row"
                text = (
                    f"the document is in training, at {train}"
                    if one.whole
                    else f"{part} at {train}"
                )
                if one is members[0]:
                    text += f"; {len(members)} of {len(val_hashes)} validation documents"
                self.error("overlap" if one.whole else "overlap in part", file, text, at, level)
        self.figures["overlap"] = {
            "whole": sum(o.whole for o in shared),
            "part": sum(not o.whole for o in shared),
        }
        self.figures["overlap"] |= {"documents": [one._asdict() for one in shared[:1000]]}
        held = np.zeros(len(index.hashes), dtype=bool)
        for scan in scans["train"]:
            held[scan["found"]] = True
        share, run, _ = index.shared(held)
        self.figures["overlap"] |= {
            "shingles": round(float(held[index.number].mean()), 6) if len(held) else 0.0
        }
        most = {
            "longest_run": int(run.max(initial=0)),
            "highest_share": round(float(share.max(initial=0)), 6),
        }
        self.figures["overlap"] |= most

    def canonical(self) -> None:
        """Totals of the published FineWeb validation set, where the data set says that it is one of it."""
        match = re.fullmatch(r"fineweb10B_(sp\d+)", self.manifest.get("dataset", self.folder.name))
        if not match or match[1] not in CANONICAL_TOKENS or "val" not in self.splits:
            return
        (low, high), val, file = (
            CANONICAL_TOKENS[match[1]],
            self.splits["val"],
            self.paths["val"][0].name,
        )
        if match[1] == "sp1024" and val["tokens"] in WITHDRAWN_TOKENS:
            text = f"{val['tokens']} tokens: the validation set that was withdrawn after the first baseline"
            self.error("canonical", file, text)
        elif not low <= val["tokens"] <= high:
            allowed = f"{low}" if low == high else f"{low} to {high}"
            self.error(
                "canonical",
                file,
                f"{val['tokens']} tokens, the published validation set has {allowed}",
            )
        if val["documents"] != CANONICAL_DOCUMENTS:
            self.error(
                "canonical",
                file,
                f"{val['documents']} documents, published are {CANONICAL_DOCUMENTS}",
            )
        if abs(val["bytes"] / CANONICAL_BYTES - 1) > BYTES_TOLERANCE:
            self.error("canonical", file, f"{val['bytes']} bytes, published are {CANONICAL_BYTES}")
        self.figures["canonical"] = match[1]

    def verdict(self) -> dict[str, Any]:
        """What doctor.json holds. train_gpt.py reads `errors` and `files` (name -> size, time stamp in ns)."""
        lines = {
            level: [str(f).partition(": ")[2] for f in self.faults if f.level == level]
            for level in ("error", "warning")
        }
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        verdict = {
            "version": 1,
            "date": now,
            "dataset": self.folder.name,
            "tokenizer": str(self.tokenizer_path.name),
        }
        verdict |= {
            "errors": lines["error"],
            "warnings": lines["warning"],
            "splits": self.splits,
            **self.figures,
        }
        verdict |= {
            "faults": [fault._asdict() for fault in self.faults],
            "sha256": self.sha256,
            "files": self.watched,
        }
        return verdict

    def save(self, verdict: dict[str, Any]) -> None:
        """Writes the verdict and forgets scans of content that is gone."""
        write_atomic(self.folder / "doctor.json", (json.dumps(verdict, indent=1) + "\n").encode())
        for file in (self.folder / ".doctor").glob("*.npz"):
            if file not in self.used:
                file.unlink()


def load_scan(file: Path) -> dict[str, np.ndarray] | None:
    """A scan that was stored; None if there is none or it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


# ---- Command line ---------------------------------------------------------------------------------------------------


def print_report(verdict: dict[str, Any]) -> None:
    columns = [
        "files",
        "documents",
        "tokens",
        "bytes",
        "decoded",
        "encoded_again",
        "changed",
        "copies",
    ]
    if verdict["splits"]:
        rows = [["split", *(column.replace("_", " ") for column in columns)]]
        rows += [
            [split, *(f"{entry[c]:,}" for c in columns)]
            for split, entry in verdict["splits"].items()
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            print(row[0].ljust(widths[0]), *cells)
    if "overlap" in verdict:
        o = verdict["overlap"]
        line = f"overlap: {o['whole']} validation documents are in training, {o['part']} more in part; "
        line += f"{o['shingles']:.2%} of all {SHINGLE}-id shingles, at most {o['highest_share']:.0%} of a document's"
        print(f"{line} and {o['longest_run']} ids in a row")
    if "unread" in verdict:
        print(verdict["unread"])
    for level in ("error", "warning"):
        for line in verdict[f"{level}s"]:
            print(f"{level}: {line}")
    print(
        f"{verdict['dataset']}: {len(verdict['errors'])} errors, {len(verdict['warnings'])} warnings"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.description = argparse.RawDescriptionHelpFormatter, __doc__
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="folder of the shards, as data/datasets/pydocs_sp1024",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="MODEL",
        help="default: the manifest's, beside the data set",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the verdict as JSON instead of a table"
    )
    parser.add_argument(
        "--strict", action="store_true", help="warnings count as errors, here and for train_gpt.py"
    )
    overlap_help = "whole validation documents that training may hold without error (default 0)"
    parser.add_argument("--allow-overlap", type=int, default=0, metavar="N", help=overlap_help)
    parser.add_argument("--no-cache", action="store_true", help="scan every shard again")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--workers", type=int, default=cores, help=f"processes (default {cores}, all cores)"
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit status: 0 no error, 1 errors. Raises UsageError if DIR holds no shards."""
    if not args.folder.is_dir():
        raise UsageError(f"{args.folder} is not a folder")
    folder = args.folder.resolve()
    visit = Examination(folder, args.tokenizer, args.workers, args.allow_overlap, not args.no_cache)
    visit.examine()
    if args.strict:
        visit.faults = [fault._replace(level="error") for fault in visit.faults]
    verdict = visit.verdict()
    print(json.dumps(verdict, indent=1)) if args.json else print_report(verdict)
    try:
        visit.save(verdict)
    except OSError as error:
        print(
            f"doctor.json is not written ({error.strerror}), so train_gpt.py does not know",
            file=sys.stderr,
        )
    return 1 if verdict["errors"] else 0
