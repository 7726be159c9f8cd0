"""Finds validation documents that training data hold, whole or in part.

A whole copy is found by the hash of its ids. A part is found by shingles: SHINGLE ids in a row.
Every STRIDE-th shingle of each validation document is indexed and looked for at every position of
training. All functions work on arrays of ids, so that any tool can use them: `overlap` does
everything at once; tools/doctor.py scans the parts of a training stream in several processes and
joins what they found with `merge_overlap`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from digests import sha256

SHINGLE = 32  # ids in a row; a power of two
STRIDE = 8  # every 8th shingle of a validation document is looked for at every position of training
MIN_PART = 64  # ids; shorter common passages are phrases
MAX_SHARED = 0.5  # share of a validation document's shingles that training may hold
MAX_RUN = 512  # ids in a row that a validation document may share with training
CHUNK = 1 << 14  # positions hashed at once; they fit the cache of a core

_RNG = np.random.default_rng(20240520)
ID_HASH = _RNG.integers(0, 2**64, 1 << 16, dtype=np.uint64)
_HALF_FACTORS = _RNG.integers(0, 2**63, SHINGLE.bit_length() - 1, dtype=np.uint64)
SPAN_FACTOR = _HALF_FACTORS * np.uint64(2) + np.uint64(1)  # odd, one for each doubling of the span

NO_POSITIONS = np.empty(0, np.int64)
NO_HASHES = np.empty(0, np.uint64)


# === Hashes of documents and shingles =============================================================
def document_starts(tokens: np.ndarray, bos_id: int) -> np.ndarray:
    """Positions (D,) int64 of every BOS in ids (n,)."""
    return np.flatnonzero(tokens == bos_id)


def document_hashes(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """BLAKE2b of each document's ids without its BOS, cut to 64 bits: (D,) uint64.

    The last document ends where `tokens` ends.
    """
    data = memoryview(np.ascontiguousarray(tokens, dtype="<u2")).cast("B")
    ends = np.append(starts[1:], len(tokens))
    hashes = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        ids = data[2 * start + 2 : 2 * end]
        hashes.append(hashlib.blake2b(ids, digest_size=8).digest())
    return np.frombuffer(b"".join(hashes), dtype="<u8")


def shingle_hashes(tokens: np.ndarray) -> np.ndarray:
    """64-bit hash of every SHINGLE ids in a row of `tokens` (n,): (max(n - 31, 0),) uint64.

    The span doubles five times: hash(2s ids at i) = hash(s ids at i) * factor + hash(s ids at i +
    s), modulo 2^64.
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


def chunked_hashes(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Yields `shingle_hashes` of a long array in parts of CHUNK positions, the last one shorter."""
    for start in range(0, max(0, len(tokens) - SHINGLE + 1), CHUNK):
        yield shingle_hashes(tokens[start : start + CHUNK + SHINGLE - 1])


# === The index of validation ======================================================================
class Occurrences(NamedTuple):
    """Which indexed shingles occur in an array of ids."""

    found: np.ndarray  # (F,) int64, positions in ShingleIndex.hashes
    where: np.ndarray  # (F,) int64, first position of each in the array


class Coverage(NamedTuple):
    """How much of each validation document was found in training."""

    share: np.ndarray  # (D,) float64, of the document's indexed shingles
    run: np.ndarray  # (D,) int64, longest run of ids that found shingles cover
    first: np.ndarray  # (D,) int64, the shingle at which that run begins, as index into `owner`


class ShingleIndex:
    """Every STRIDE-th shingle of each validation document, none across a BOS.

    Any MIN_PART ids in a row of a validation document hold at least four of its indexed shingles.
    """

    def __init__(self, val: np.ndarray, bos_id: int) -> None:
        """Indexes the validation stream `val` (n,) of ids."""
        self.starts = document_starts(val, bos_id)
        ends = np.append(self.starts[1:], len(val))
        counts = np.maximum(0, (ends - self.starts - 1 - SHINGLE) // STRIDE + 1)
        self.owner = np.repeat(np.arange(len(counts)), counts)  # (S,) document of each shingle

        number_in_document = np.arange(len(self.owner)) - np.repeat(
            np.cumsum(counts) - counts, counts
        )
        positions = self.starts[self.owner] + 1 + STRIDE * number_in_document
        every_hash = np.concatenate([NO_HASHES, *chunked_hashes(val)])
        # hashes: sorted (U,); number: (S,) index of each shingle into it.
        self.hashes, self.number = np.unique(every_hash[positions], return_inverse=True)
        self._fill_filters()

    def _fill_filters(self) -> None:
        """Makes two bit tables; each ends 7 in 8 searches for a hash that is not indexed."""
        bits = max(16, int(8 * len(self.hashes)).bit_length())
        self.shift = np.uint64(64 - bits)
        self.filters = np.zeros((2, 1 << bits), dtype=bool)
        self.filters[0][self.hashes >> self.shift] = True
        self.filters[1][self._second_key(self.hashes)] = True

    @property
    def key(self) -> str:
        """The SHA-256 of the indexed hashes: equal for equal validation text."""
        return sha256(self.hashes.tobytes())

    def _second_key(self, hashed: np.ndarray) -> np.ndarray:
        return (hashed * SPAN_FACTOR[0]) >> self.shift

    def find(self, tokens: np.ndarray) -> Occurrences:
        """Looks for the indexed shingles at every position of ids (n,)."""
        found = [NO_POSITIONS]
        where = [NO_POSITIONS]
        if len(self.hashes):
            for number, hashed in enumerate(chunked_hashes(tokens)):
                candidates = np.flatnonzero(self.filters[0][hashed >> self.shift])
                passed = self.filters[1][self._second_key(hashed[candidates])]
                candidates = candidates[passed]
                wanted = hashed[candidates]
                index = np.searchsorted(self.hashes, wanted)
                index = np.minimum(index, len(self.hashes) - 1)
                hit = self.hashes[index] == wanted
                found.append(index[hit])
                where.append(candidates[hit] + number * CHUNK)
        distinct, first = np.unique(np.concatenate(found), return_index=True)
        return Occurrences(distinct, np.concatenate(where)[first])

    def coverage(self, found: np.ndarray) -> Coverage:
        """What training holds of each document, from which `hashes` were found: (U,) bool."""
        hit = found[self.number]
        num_documents = len(self.starts)
        totals = np.bincount(self.owner, minlength=num_documents)
        hits = np.bincount(self.owner, weights=hit, minlength=num_documents)
        share = hits / np.maximum(totals, 1)

        # A run of hits ends where the document does.
        new_document = np.diff(self.owner, prepend=-1) != 0
        begins = np.flatnonzero(hit & (new_document | ~np.append(False, hit[:-1])))
        ends = begins
        if len(hit):
            ends = np.flatnonzero(hit & np.append(new_document[1:] | ~hit[1:], True))
        length = (ends - begins) * STRIDE + SHINGLE

        run = np.zeros(num_documents, dtype=np.int64)
        first = np.zeros(num_documents, dtype=np.int64)
        order = np.argsort(length, kind="stable")  # the longest run of a document is written last
        run[self.owner[begins[order]]] = length[order]
        first[self.owner[begins[order]]] = begins[order]
        return Coverage(share, run, first)


# === Overlap of training and validation ===========================================================
class PartScan(NamedTuple):
    """What a part of the training stream holds; positions count from the part's beginning."""

    starts: np.ndarray  # (D,) int64, its documents
    hashes: np.ndarray  # (D,) uint64, of their ids
    occurrences: Occurrences  # of validation shingles


class StreamDocuments(NamedTuple):
    """All documents of a stream in order."""

    hashes: np.ndarray  # (D,) uint64
    starts: np.ndarray  # (D,) int64, positions in the stream


class Shared(NamedTuple):
    """A validation document that is in training."""

    document: int  # number in the validation stream
    val_at: int  # position of its BOS in the validation stream
    train_at: int  # position in training: the whole copy's BOS, or the longest common run
    share: float  # of its shingles that training holds; 1 for a whole copy
    run: int  # ids in a row
    whole: bool


def scan_part(tokens: np.ndarray, bos_id: int, index: ShingleIndex) -> PartScan:
    """Scans a part of training that begins with a document and holds whole ones."""
    starts = document_starts(tokens, bos_id)
    return PartScan(starts, document_hashes(tokens, starts), index.find(tokens))


def overlap(train: Sequence[np.ndarray], val: np.ndarray, bos_id: int) -> list[Shared]:
    """Validation documents that training holds, whole (same hash) or in part, in the order of
    validation.

    train: arrays of ids that each begin with a document and hold whole ones, as a training stream
    in pieces; val: ids. In part means at least MAX_SHARED of its shingles and MIN_PART ids in a
    row, or MAX_RUN ids in a row, wherever they stand in training. A part that was put together from
    shorter passages of several documents counts as well.
    """
    index = ShingleIndex(val, bos_id)
    scans = [scan_part(part, bos_id, index) for part in train]
    offsets = np.cumsum([0] + [len(part) for part in train])[: len(train)]
    return merge_overlap(index, document_hashes(val, index.starts), scans, offsets)


def merge_overlap(
    index: ShingleIndex, val_hashes: np.ndarray, scans: Sequence[PartScan], offsets: np.ndarray
) -> list[Shared]:
    """`overlap` from the scans of all parts of training.

    val_hashes: (D,) of the validation documents; offsets: (parts,) where each part begins in the
    training stream.
    """
    # First position in training of each indexed shingle; -1 where training does not hold it.
    first_position = np.full(len(index.hashes), -1, dtype=np.int64)
    for scan, offset in zip(reversed(scans), offsets[::-1], strict=True):
        first_position[scan.occurrences.found] = scan.occurrences.where + offset
    covered = index.coverage(first_position >= 0)

    documents = stream_documents(scans, offsets)
    order = np.argsort(documents.hashes, kind="stable")
    sorted_hashes = documents.hashes[order]
    slot = np.searchsorted(sorted_hashes, val_hashes)
    slot = np.minimum(slot, max(len(sorted_hashes) - 1, 0))
    whole = np.zeros(len(val_hashes), dtype=bool)
    if len(sorted_hashes):
        whole = sorted_hashes[slot] == val_hashes
    many_shingles = (covered.share >= MAX_SHARED) & (covered.run >= MIN_PART)
    in_part = many_shingles | (covered.run >= MAX_RUN)

    shared = []
    for i in np.flatnonzero(whole | in_part):
        if whole[i]:
            train_at = documents.starts[order[slot[i]]]
            share = 1.0
        else:
            train_at = first_position[index.number[covered.first[i]]]
            share = float(covered.share[i])
        val_at = int(index.starts[i])
        run = int(covered.run[i])
        shared.append(Shared(int(i), val_at, int(train_at), share, run, bool(whole[i])))
    return shared


def stream_documents(scans: Sequence[PartScan], offsets: np.ndarray) -> StreamDocuments:
    """Hash and position in the stream of every document of all parts; offsets: (parts,)."""
    starts = [scan.starts + offset for scan, offset in zip(scans, offsets, strict=True)]
    hashes = [scan.hashes for scan in scans]
    return StreamDocuments(
        np.concatenate([NO_HASHES, *hashes]), np.concatenate([NO_POSITIONS, *starts])
    )
