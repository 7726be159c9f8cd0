"""CaseOps: capitals become operators before tokenisation, and no byte of the original is lost.

    The NASA launch    <->    TITLE the ALLCAPS nasa launch

A word is a longest run of ASCII letters. Its letters become lower-case, and one of four private-use
characters, an operator, says which were capitals:

    U+E001 TITLE      before a word whose first letter is a capital
    U+E002 ALLCAPS    before a word of two capitals or more, and nothing else
    U+E003 CAPNEXT    within a word, before each other capital
    U+E004 ESC        before one of the four that the original text holds literally

Every other character stays. The transform is that of PR #1729 (romeerp), whose data and tokenizer
all later records use. BEFORE_SPACE is a variant of our own: an operator in front of a word stands
before the space that precedes the word, so that the tokenizer's pieces with a leading space fit.

The tokenizer sees the transformed text, and a score divides by the bytes of the original. The
side-car holds those: for every token, how many UTF-8 bytes of the original it stands for. Operators
bring none, so their bits are paid for. docs/caseops.md has the proof that nothing is lost, and says
what a tokenizer that folds characters (NFKC) loses afterwards.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

# train_gpt.py must run alone and holds them once more.
TITLE, ALLCAPS, CAPNEXT, ESC = OPERATORS = "\ue001\ue002\ue003\ue004"
OPERATOR = "[\ue001-\ue004]"
SPACE_MARK = "\u2581"  # a piece's space
CAPITAL = re.compile("[A-Z]")


class CaseOpsError(ValueError):
    """A text that the transform cannot have made."""


# === Transform ====================================================================================
class Transform(NamedTuple):
    """A reversible transform of capitals, and the patterns of both directions."""

    name: str  # as the manifest has it
    space: str  # pattern of what may stand between an operator and its word

    def encode(self, text: str) -> str:
        """The transformed text. The result of different texts is different."""
        # Without the second part, the search would begin again at each letter of a long word.
        word = f"({self.space})(?<![A-Za-z])([a-z]*[A-Z][A-Za-z]*)"
        return re.sub(f"{word}|({OPERATOR})", mark_capitals, text)

    def decode(self, text: str) -> str:
        """The original of a transformed text.

        Raises CaseOpsError for any text that `encode` never returns, such as one with a lone
        operator or with an operator inside a word.
        """
        original = self.apply(text)
        again = self.encode(original)
        if again != text:
            at = first_difference(again, text)
            raise CaseOpsError(f"not a transformed text from character {at} on: {text[at:][:20]!r}")
        return original

    def apply(self, text: str) -> str:
        """Does what the operators of any text say; those that stand before nothing stay."""
        first = f"{TITLE}({self.space}[a-z])|{ALLCAPS}({self.space}[a-z]+)"
        marked = f"{first}|{CAPNEXT}([a-z])|{ESC}({OPERATOR})"
        return re.sub(marked, raise_capitals, text)


def mark_capitals(match: re.Match[str]) -> str:
    """Replaces a word with capitals and the space before it, or escapes a literal operator."""
    space, word, operator = match.groups()
    if operator:
        return ESC + operator
    if len(word) > 1 and word.isupper():
        return ALLCAPS + space + word.lower()
    first = TITLE if word[0].isupper() else ""
    others = CAPITAL.sub(lower_with_operator, word[1:])
    return first + space + word[0].lower() + others


def lower_with_operator(match: re.Match[str]) -> str:
    """Replaces a capital inside a word."""
    return CAPNEXT + match[0].lower()


def raise_capitals(match: re.Match[str]) -> str:
    """Replaces an operator and what it applies to."""
    title, allcaps, capnext, literal = match.groups()
    return literal or (title or allcaps or capnext).upper()


def first_difference(one: str, other: str) -> int:
    """Index of the first character in which two different texts differ."""
    for at, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return at
    return min(len(one), len(other))


PUBLISHED = Transform("lossless_caps_caseops_v1", "")
BEFORE_SPACE = Transform("caseops_before_space", " ?")
TRANSFORMS = {transform.name: transform for transform in (PUBLISHED, BEFORE_SPACE)}


# === Text that a tokenizer has folded =============================================================
def accented_letters() -> str:
    """Every character that is an ASCII lower-case letter with accents, composed."""
    ranges = (*range(0xC0, 0x250), *range(0x1E00, 0x1F00))
    letters = []
    for letter in map(chr, ranges):
        parts = unicodedata.normalize("NFD", letter)
        if len(parts) > 1 and "a" <= parts[0] <= "z":
            letters.append(letter)
    return "".join(letters)


LETTER = f"[a-z{accented_letters()}]"
FOLDED = re.compile(
    f"{TITLE}({LETTER})|{ALLCAPS}([a-z]+)|{CAPNEXT}({LETTER})|{ESC}({OPERATOR})|{OPERATOR}"
)


def decode_folded(text: str) -> str:
    """The original of a text of PUBLISHED that NFKC has folded after the transform, folded too.

    Folding composes: "A" with a combining grave is TITLE, "a", grave, and then TITLE, "à". So the
    base letter is raised. It also makes ASCII letters of other characters, which may thus stand
    before an operator. Not every such text has one original: see docs/caseops.md. Raises
    CaseOpsError for an operator that stands before no letter.
    """
    return FOLDED.sub(raise_folded, text)


def raise_folded(match: re.Match[str]) -> str:
    """Replaces an operator and what it applies to. Raises CaseOpsError if that is nothing."""
    title, allcaps, capnext, literal = match.groups()
    if literal or allcaps:
        return literal or allcaps.upper()
    letter = title or capnext
    if not letter:
        raise CaseOpsError(f"character {match.start()} is an operator before no letter")
    base, *accents = unicodedata.normalize("NFD", letter)
    return unicodedata.normalize("NFC", base.upper() + "".join(accents))


# === Bytes of the original behind each token ======================================================
def active_operators(kinds: np.ndarray) -> np.ndarray:
    """Which characters, or tokens, are operators that no ESC makes literal: (n,) bool.

    kinds: (n,), 1 to 4 for the four operators in order, 0 for anything else.
    """
    escaped = np.zeros(len(kinds) + 1, dtype=bool)
    for at in np.flatnonzero(kinds == len(OPERATORS)).tolist():
        escaped[at + 1] = not escaped[at]
    return (kinds > 0) & ~escaped[:-1]


def original_bytes(transformed: str) -> np.ndarray:
    """UTF-8 bytes of the original behind each character of a transformed text: (n,) int64.

    An operator has none; a literal operator has its three; a letter has one in either case.
    """
    codes = np.frombuffer(transformed.encode("utf-32-le"), dtype="<u4").astype(np.int64)
    sizes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    is_operator = (codes >= ord(TITLE)) & (codes <= ord(ESC))
    kinds = np.where(is_operator, codes - ord(TITLE) + 1, 0)
    sizes[active_operators(kinds)] = 0
    return sizes


class CountedTokens(NamedTuple):
    """A document in tokens, without BOS."""

    ids: list[int]
    counts: np.ndarray  # (n,) int64: bytes of the original behind each token, its side-car


def encode_with_counts(model: Any, texts: list[str], num_threads: int = 1) -> list[CountedTokens]:
    """Tokens of transformed texts, with their side-cars.

    model: a SentencePieceProcessor. A token is worth the stretch of text that it was made from: the
    last byte piece of a character is worth all of it, a space mark as many white-space characters
    as were folded into it. White space that the model removes at either end is not counted.
    """
    counted = []
    spans = token_spans(model, texts, num_threads)
    for text, (ids, offsets) in zip(texts, spans, strict=True):
        before = np.append(0, np.cumsum(original_bytes(text)))
        begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        assert (begins[1:] == ends[:-1]).all(), "the tokens do not tile the text"
        counted.append(CountedTokens(ids, before[ends] - before[begins]))
    return counted


class TokenSpans(NamedTuple):
    """Tokens and the stretches of text that they stand for."""

    ids: list[int]
    offsets: list[tuple[int, int]]  # begin and end, in characters


def token_spans(model: Any, texts: list[str], num_threads: int) -> list[TokenSpans]:
    """Tokenises texts and says where in the text each token lies."""
    if hasattr(model, "encode_as_offset_mapping"):
        found = model.encode_as_offset_mapping(texts, num_threads=num_threads)
        return [TokenSpans(one["ids"], one["offsets"]) for one in found]
    # SentencePiece before 0.2.2 has surfaces in their place.
    spans = []
    for text in texts:
        pieces = model.encode_as_immutable_proto(text).pieces
        offsets = [(piece.begin, piece.end) for piece in pieces]
        spans.append(TokenSpans([piece.id for piece in pieces], offsets))
    return spans


def text_digest(text: str) -> bytes:
    """SHA-256 of a document, 32 bytes. A split's is `split_digest` of its documents'."""
    return hashlib.sha256(text.encode()).digest()


def split_digest(digests: Iterable[bytes]) -> str:
    """SHA-256 of the original documents of a split, in their order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


# === What ids alone tell ==========================================================================
def operator_ids(model: Any) -> list[int]:
    """The ids of the four operators, or [] if the tokenizer lacks one."""
    ids = [model.piece_to_id(operator) for operator in OPERATORS]
    return [] if model.unk_id() in ids else ids


def transform_of(model: Any, manifest: dict[str, Any]) -> Transform | None:
    """The transform that a data set's manifest names, else the published one; None without the
    operators.
    """
    if not operator_ids(model):
        return None
    return TRANSFORMS.get(manifest.get("transform", ""), PUBLISHED)


def is_lossless(model: Any) -> bool:
    """Whether a tokenizer gives back characters and white space that NFKC and folding change."""
    probe = " \ufb01  x\n\u00a0\uff41 "
    return model.decode(model.encode(probe)) == probe


class PieceTable(NamedTuple):
    """What the pieces of a tokenizer with operators tell about the text. Arrays of (V,)."""

    sizes: np.ndarray  # int64: UTF-8 bytes; 1 for a byte piece, 0 for operators and control pieces
    byte: np.ndarray  # int64: value of a byte piece, -1 for another
    kind: np.ndarray  # int64: 1 to 4 for the operators, else 0
    is_space: np.ndarray  # bool: the space mark alone
    begins_with_space: np.ndarray  # bool: the first character is a space and the second a letter
    begins_with_letter: np.ndarray  # bool: the first character is an ASCII lower-case letter
    ends_with_letter: np.ndarray  # bool: the last one is

    @classmethod
    def from_sentencepiece(cls, model: Any) -> PieceTable:
        """Builds the table of a SentencePieceProcessor."""
        texts = []
        values = []
        for i in range(model.vocab_size()):
            piece = model.id_to_piece(i)
            is_control = model.is_control(i) or model.is_unknown(i) or model.is_unused(i)
            is_text = not is_control and not model.is_byte(i)
            value = int(piece[3:5], 16) if model.is_byte(i) else -1
            values.append(value)
            text = piece.replace(SPACE_MARK, " ") if is_text else ""
            texts.append(chr(value) if 0 <= value < 0x80 else text)
        sizes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
        byte = np.array(values, dtype=np.int64)
        kind = np.zeros(len(texts), dtype=np.int64)
        kind[operator_ids(model)] = range(1, 5)
        sizes[byte >= 0] = 1
        sizes[kind > 0] = 0
        return cls(
            sizes=sizes,
            byte=byte,
            kind=kind,
            is_space=np.array([text == " " for text in texts]),
            begins_with_space=np.array([bool(re.match(" [a-z]", text)) for text in texts]),
            begins_with_letter=np.array([bool(re.match("[a-z]", text)) for text in texts]),
            ends_with_letter=np.array([bool(re.search("[a-z]$", text)) for text in texts]),
        )

    def counts(self, tokens: np.ndarray) -> np.ndarray:
        """The side-car (n,) int64 that the decoded text of ids (n,) gives.

        It is the real one if the tokenizer is lossless. If it folds, the real one has the bytes
        from before.
        """
        counts = self.sizes[tokens]
        is_literal = (self.kind[tokens] > 0) & ~active_operators(self.kind[tokens])
        counts[is_literal] = len(ESC.encode())
        # The last byte of a character has the bytes of all.
        byte = self.byte[tokens]
        is_continued = np.append((byte[1:] & 0xC0) == 0x80, False) & (byte >= 0)
        is_continued[:-1] &= byte[1:] >= 0
        where = np.arange(len(tokens))
        is_last = (byte >= 0) & ~is_continued
        is_first = ~np.append(False, is_continued[:-1])
        first = np.maximum.accumulate(np.where(is_first, where, 0))
        counts[is_continued] = 0
        counts[is_last] = (where - first + 1)[is_last]
        return counts

    def misplaced_operators(self, tokens: np.ndarray, transform: Transform) -> MisplacedOperators:
        """Operators at which the ids (n,) break the transform's grammar.

        A byte piece after an operator may begin a composed letter, and a capital, as a byte piece,
        may be folded from another character, so both are allowed.
        """
        kind = np.where(active_operators(self.kind[tokens]), self.kind[tokens], 0)
        following = np.append(tokens[1:], tokens[:1])
        after_next = np.append(following[1:], following[:1])
        is_letter = self.begins_with_letter | (self.byte >= 0x80)
        is_before_letter = is_letter[following]
        if transform.space:
            is_before_letter |= (kind <= 2) & self.begins_with_space[following]
            is_spaced = self.is_space[following] & is_letter[after_next]
            is_before_letter |= (kind <= 2) & is_spaced
        is_before_operator = self.kind[following] > 0
        is_fitting = np.where(kind == 4, is_before_operator, is_before_letter)
        is_fitting[-1:] = False

        is_after_letter = np.append(False, self.ends_with_letter[tokens[:-1]])
        moved = self.begins_with_space[following] | self.is_space[following]
        is_inside = is_after_letter & ~moved if transform.space else is_after_letter
        is_word_start = (kind == 1) | (kind == 2)
        return MisplacedOperators(
            lone=np.flatnonzero((kind > 0) & ~is_fitting),
            inside=np.flatnonzero(is_word_start & is_inside & is_fitting),
            outside=np.flatnonzero((kind == 3) & ~is_after_letter & is_fitting),
        )


class MisplacedOperators(NamedTuple):
    """Positions of operators that the transform does not put there."""

    lone: np.ndarray  # before nothing that they apply to
    inside: np.ndarray  # TITLE or ALLCAPS after a letter, so within a word
    outside: np.ndarray  # CAPNEXT after no letter
