"""The field's validation sets in numbers: the one home of such totals for every program in tools/.

A score's denominator is the number of bytes of the validation text. Whoever counts a wrong one gets
a better val_bpb for nothing, so report.py, audit.py and doctor.py compare with the totals here.
train_gpt.py must run alone and therefore holds DOCUMENTS, SP8192_TOKENS and TEXT_BYTES once more,
and the same three of CaseOps; tests/test_report.py shows that both agree.
"""

from __future__ import annotations

from typing import NamedTuple


class ValidationSet(NamedTuple):
    """A published validation set as a run scores it."""

    name: str  # the data set is called fineweb10B_NAME
    targets: int  # tokens that are scored
    text_bytes: int  # bytes that these targets decode to

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per scored token."""
        return self.text_bytes / self.targets


# The published FineWeb validation set holds 50,000 documents of 151,080,891 bytes. With the sp8192
# tokenizer they are 40,540,803 tokens; the first is never a target.
DOCUMENTS = 50_000
TEXT_BYTES = 151_080_891
SP8192_TOKENS = 40_540_803

# The same documents with CaseOps (PR #1729, totals inferred from the logs of PR #2014). The bytes
# are those of its side-car; counting by table gives 246 more. Training is 80 shards.
CASEOPS_SUFFIX = "sp8192_lossless_caps_caseops_v1_reserved"
CASEOPS_TOKENS = 47_853_344
CASEOPS_TEXT_BYTES = 151_080_645
CASEOPS_TOKENIZER_SHA256 = "97754754561f20def5edd99765ca0668f880bd94e67316d54aa10ab25f45cc4d"
TRAIN_SHARDS = 80

# Other validation sets that were mistaken for it. A build with 10,000 documents trains on the other
# 40,000 (PR #2127); another was cut off (PR #2071).
LEAKY_DOCUMENTS = 10_000
TRUNCATED_CASEOPS_TOKENS = 9_662_464

# Counted over the public logs, in which long windows drop a tail of at most 2,048 tokens.
PUBLISHED_SETS = (
    ValidationSet("sp1024", 62_021_632, 151_080_363),
    ValidationSet("sp4096", 45_508_608, 151_074_053),
    ValidationSet("sp8192", 40_540_160, 151_078_222),
    ValidationSet("sp8192 CaseOps", 47_851_520, 151_074_499),
    ValidationSet("byte260", 151_130_112, 151_080_114),
    ValidationSet("sp1024, first split", 63_779_840, 155_769_746),
)

# Fewest and most tokens that a complete set may have. Only the count for sp8192 is known exactly;
# the others are known from scored totals, which leave out a last part of at most 2,048 tokens.
TOKEN_RANGES = {
    "sp1024": (62_021_632, 62_023_681),
    "sp4096": (45_508_608, 45_510_657),
    "sp8192": (SP8192_TOKENS, SP8192_TOKENS),
    CASEOPS_SUFFIX: (CASEOPS_TOKENS, CASEOPS_TOKENS),
}

# The split of the first baseline was withdrawn: no score on it counts.
WITHDRAWN_TARGETS = 63_779_840
WITHDRAWN_TOKENS = range(WITHDRAWN_TARGETS, WITHDRAWN_TARGETS + 2049)

# Share of the bytes that a denominator may be off. Dropped tails make 4e-5 at the usual window
# lengths; the smallest known fault makes 1e-2.
BYTES_TOLERANCE = 1e-4

# Share of the tokens that may be missing, or more, where a set still counts as the published one.
TOKENS_TOLERANCE = 1e-3
