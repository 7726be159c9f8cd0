"""What can be told about a byte side-car: from the ids, the decoded text and the published totals.

A side-car says how many bytes of the original text each token stands for, and a score divides by
their sum. `compare` looks at ids and counts alone. `originals` inverts the transform, which proves
the bytes where the tokenizer is lossless. The doctor (tools/doctor.py) makes faults of what they
find, and the audit (tools/legality.py) a verdict.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import caseops  # noqa: E402

# Share of the tokens that may be worth other bytes than the decoded text has, because the tokenizer
# folded something. It was 0.006 on a corpus with much code; a shift by one token makes 0.8.
MAX_FOLDED = 0.2
# Share of the operators that folding may have put at a place where the transform puts none.
MAX_MISPLACED = 1e-4
# Text that folds nothing in so many documents was counted after folding, not before.
LEAST_FOLDED_DOCUMENTS = 100


def allowed_differing(tokens: int, is_lossless: bool) -> float:
    """How many of `tokens` may be worth other bytes than the decoded text has."""
    return 0 if is_lossless else MAX_FOLDED * tokens


def allowed_misplaced(operators: int, is_lossless: bool) -> float:
    """How many of `operators` may stand where the transform puts none."""
    return 0 if is_lossless else MAX_MISPLACED * operators


class Comparison(NamedTuple):
    """What ids and counts say about each other. Positions (n,) in the ids."""

    operators: np.ndarray  # () number of operators that are not literal text
    misplaced: np.ndarray  # operators where the transform puts none
    with_bytes: np.ndarray  # BOS and operators that are worth bytes, though they have none
    differing: np.ndarray  # tokens worth other bytes than the decoded text has
    own_bytes: np.ndarray  # () bytes of the decoded text without operators

    def moved(self, by: int) -> Comparison:
        """The same with all positions counted from `by` tokens earlier."""
        return self._replace(
            misplaced=self.misplaced + by,
            with_bytes=self.with_bytes + by,
            differing=self.differing + by,
        )


NOWHERE = np.empty(0, dtype=np.int64)
NOTHING = Comparison(np.asarray(0), NOWHERE, NOWHERE, NOWHERE, np.asarray(0))
BLOCK = 1 << 20  # ids looked at together, and more up to the end of a document


def compare(
    tokens: np.ndarray,
    counts: np.ndarray | None,
    bos_id: int,
    table: caseops.PieceTable,
    transform: caseops.Transform | None,
) -> Comparison:
    """Compares ids (n,) with their side-car (n,), or looks at the ids alone.

    An operator inside a word is no fault if the token before it was folded from another character,
    as a ligature is, which the side-car shows.
    """
    starts = np.flatnonzero(tokens == bos_id)
    begin = 0
    parts = [NOTHING]
    while begin < len(tokens):
        # The grammar ends with a document.
        following = np.searchsorted(starts, begin + BLOCK)
        end = int(starts[following]) if following < len(starts) else len(tokens)
        part_counts = None if counts is None else counts[begin:end]
        part = compare_block(tokens[begin:end], part_counts, bos_id, table, transform)
        parts.append(part.moved(begin))
        begin = end
    return Comparison(
        operators=np.asarray(sum(int(part.operators) for part in parts)),
        misplaced=np.concatenate([part.misplaced for part in parts]),
        with_bytes=np.concatenate([part.with_bytes for part in parts]),
        differing=np.concatenate([part.differing for part in parts]),
        own_bytes=np.asarray(sum(int(part.own_bytes) for part in parts)),
    )


def compare_block(
    tokens: np.ndarray,
    counts: np.ndarray | None,
    bos_id: int,
    table: caseops.PieceTable,
    transform: caseops.Transform | None,
) -> Comparison:
    """`compare` of some documents, all at once."""
    kind = table.kind[tokens]
    is_active = caseops.active_operators(kind)
    faults = table.misplaced_operators(tokens, transform or caseops.PUBLISHED)
    inside = faults.inside
    with_bytes = differing = NOWHERE
    own = table.counts(tokens)
    if counts is not None:
        has_none = (tokens == bos_id) | is_active
        with_bytes = np.flatnonzero(has_none & (counts > 0))
        differing = np.flatnonzero((counts != own) & ~has_none)
        inside = inside[(counts == own)[inside - 1]]
    return Comparison(
        operators=is_active.sum(),
        misplaced=np.sort(np.concatenate([faults.lone, inside, faults.outside])),
        with_bytes=with_bytes,
        differing=differing,
        own_bytes=own.sum(),
    )


def originals(
    model: Any, transform: caseops.Transform, documents: list[list[int]]
) -> list[str | None]:
    """The original text of each document, ids without BOS, of a lossless tokenizer.

    None for a document that the transform cannot have made.
    """
    texts: list[str | None] = []
    for decoded in model.decode(documents):
        try:
            texts.append(transform.decode(decoded))
        except caseops.CaseOpsError:
            texts.append(None)
    return texts


def sizes_of(texts: list[str | None]) -> np.ndarray:
    """UTF-8 bytes (D,) int64 of texts; -1 for None."""
    sizes = [-1 if text is None else len(text.encode()) for text in texts]
    return np.array(sizes, dtype=np.int64)
