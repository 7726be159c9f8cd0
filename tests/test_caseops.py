"""tools/caseops.py: no text is lost, every byte of the original is counted once, and ids and
side-car are those of the public exporter.

Tests of the published tokenizer need its file, in data/tokenizers/ or ../shared/tokenizers/, and
those of real documents ../shared/corpus/.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import sys
import unicodedata
from typing import Any

import numpy as np
import pytest
import sentencepiece
from conftest import CASEOPS_TEXTS, ROOT, published_caseops_model
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(ROOT / "tools"))
import caseops  # noqa: E402
import prepare_data  # noqa: E402
from caseops import ALLCAPS, BEFORE_SPACE, CAPNEXT, ESC, OPERATORS, PUBLISHED, TITLE  # noqa: E402

CORPUS = ROOT.parent / "shared" / "corpus" / "val.jsonl.zst"
ACUTE = "\u0301"  # combining
ALPHABET = "aB" + OPERATORS + " é" + ACUTE
BOTH = pytest.mark.parametrize("transform", [PUBLISHED, BEFORE_SPACE], ids=["published", "own"])
TEXTS = st.text(
    st.one_of(st.sampled_from("abZ  .\n" + ALPHABET), st.characters(exclude_categories=["Cs"]))
)


def strings(longest: int) -> list[str]:
    """Every string over ALPHABET of at most `longest` characters."""
    every = []
    for length in range(longest + 1):
        every += map("".join, itertools.product(ALPHABET, repeat=length))
    return every


def corpus_documents(count: int) -> list[str]:
    """`count` documents from all over the corpus."""
    zstandard = pytest.importorskip("zstandard")
    if not CORPUS.is_file():
        pytest.skip(f"{CORPUS} is not there")
    with zstandard.open(CORPUS, "rb") as file:
        documents = [json.loads(line)["text"] for line in io.TextIOWrapper(file, "utf-8")]
    return documents[:: len(documents) // count][:count]


def folded(model: Any, text: str) -> str:
    """A text as the tokenizer folds it."""
    return model.normalize(text).replace(caseops.SPACE_MARK, " ")


@pytest.fixture(scope="module")
def published() -> Any:
    """The tokenizer of the published data."""
    return sentencepiece.SentencePieceProcessor(model_file=str(published_caseops_model()))


@pytest.fixture(scope="module")
def lossless() -> dict[str, Any]:
    """Tokenizers of prepare_data.py, by the name of their transform."""
    models = {}
    for transform in (PUBLISHED, BEFORE_SPACE):
        data = prepare_data.train_tokenizer(CASEOPS_TEXTS, 320, transform)
        models[transform.name] = sentencepiece.SentencePieceProcessor(model_proto=data)
    return models


# --- The transform --------------------------------------------------------------------------------
@BOTH
def test_every_short_text_comes_back_from_the_transform(transform):
    for text in strings(4):
        assert transform.decode(transform.encode(text)) == text


def test_every_text_of_five_characters_and_some_of_six_come_back_from_the_published_transform():
    # A line end belongs to no word and to no escape, so all texts are transformed at once.
    texts = strings(5)
    # Those of six are 531,441, which took 15 s, and all came back.
    texts += ["".join(random.choices(ALPHABET, k=6)) for _ in range(20_000)]
    joined = "\n".join(texts)
    encoded = PUBLISHED.encode(joined)
    assert PUBLISHED.decode(encoded) == joined
    lines = encoded.split("\n")
    for i in random.sample(range(len(texts)), 2000):
        assert PUBLISHED.encode(texts[i]) == lines[i]


@BOTH
def test_any_unicode_text_comes_back_from_the_transform(transform):
    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def comes_back(text):
        encoded = transform.encode(text)
        assert transform.decode(encoded) == text
        assert not set(encoded) & set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

    comes_back()


@BOTH
def test_documents_of_the_corpus_come_back_from_the_transform(transform):
    for text in corpus_documents(150):
        assert transform.decode(transform.encode(text)) == text


@BOTH
def test_the_strict_decoder_takes_what_the_encoder_makes_and_nothing_else(transform):
    made = {transform.encode(text) for text in strings(4)}
    accepted = 0
    lower = OPERATORS + "a b"
    for text in map("".join, itertools.product(lower, repeat=4)):
        try:
            original = transform.decode(text)
        except caseops.CaseOpsError:
            assert text.replace("b", "a") not in made or "b" in text
            continue
        accepted += 1
        assert transform.encode(original) == text
    assert 200 < accepted < 7**4 / 2


@pytest.mark.parametrize(
    ("text", "transformed"),
    [
        ("The NASA launch", f"{TITLE}the {ALLCAPS}nasa launch"),
        ("I am", f"{TITLE}i am"),
        ("iPhone McDonald", f"i{CAPNEXT}phone {TITLE}mc{CAPNEXT}donald"),
        ("NASAs", f"{TITLE}n{CAPNEXT}a{CAPNEXT}s{CAPNEXT}as"),
        ("CAFÉ", f"{ALLCAPS}cafÉ"),
        ("éA", f"é{TITLE}a"),
        ("don'T", f"don'{TITLE}t"),
        ("A1B2", f"{TITLE}a1{TITLE}b2"),
        ("İ ı ß ẞ É Ω", "İ ı ß ẞ É Ω"),
        (f"{TITLE}A{ESC}", f"{ESC}{TITLE}{TITLE}a{ESC}{ESC}"),
        ("", ""),
    ],
)
def test_words_are_runs_of_ascii_letters(text, transformed):
    assert PUBLISHED.encode(text) == transformed
    assert PUBLISHED.decode(transformed) == text


def test_the_own_variant_puts_the_operator_before_one_space():
    text = " The NASA  Launch\n Site (USA) i Phone iPhone"
    moved = f"{TITLE} the{ALLCAPS} nasa {TITLE} launch\n{TITLE} site ({ALLCAPS}usa) i{TITLE} phone"
    assert BEFORE_SPACE.encode(text) == f"{moved} i{CAPNEXT}phone"


@pytest.mark.parametrize(
    "text",
    [TITLE, f"{TITLE} a", f"{TITLE}1", f"a{TITLE}b", f"{CAPNEXT}{CAPNEXT}a", f"{ALLCAPS}a", ESC]
    + [f"{ESC}a", f"{TITLE}{ALLCAPS}ab", f"{TITLE}é", f"{CAPNEXT}a", "A", f"{ALLCAPS}a{CAPNEXT}b"],
)
def test_a_misplaced_operator_is_rejected(text):
    with pytest.raises(caseops.CaseOpsError):
        PUBLISHED.decode(text)


def test_a_long_word_takes_linear_time():
    assert PUBLISHED.encode("a" * 200_000 + "B") == "a" * 200_000 + CAPNEXT + "b"


# --- Bytes ----------------------------------------------------------------------------------------
def test_a_transformed_text_holds_the_bytes_of_its_original():
    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def holds(text):
        for transform in (PUBLISHED, BEFORE_SPACE):
            sizes = caseops.original_bytes(transform.encode(text))
            assert sizes.sum() == len(text.encode())

    holds()


@BOTH
def test_a_lossless_tokenizer_counts_every_byte_and_decodes_to_the_original(transform, lossless):
    model = lossless[transform.name]
    table = caseops.PieceTable.from_sentencepiece(model)
    assert model.piece_to_id(list(OPERATORS)) == [4, 5, 6, 7] == caseops.operator_ids(model)
    assert caseops.is_lossless(model)

    @settings(max_examples=200, deadline=None)
    @given(TEXTS.filter(lambda text: caseops.SPACE_MARK not in text))
    def counts(text):
        (document,) = caseops.encode_with_counts(model, [transform.encode(text)])
        ids = np.array([model.bos_id(), *document.ids])
        assert document.counts.sum() == len(text.encode())
        assert transform.decode(model.decode(document.ids)) == text
        # The side-car can be told from the ids alone.
        assert table.counts(ids).tolist() == [0, *document.counts]
        assert not any(map(len, table.misplaced_operators(ids, transform)))

    counts()


# Ids and side-car of the public exporter (PR #1729, with SentencePiece 0.2.0).
EXPORTED = [
    ("NASAs", [4, 8139, 6, 8136, 6, 8140, 6, 299], [0, 1, 0, 1, 0, 1, 0, 2]),
    ("CAFÉ", [5, 8145, 1461, 203, 145], [0, 1, 2, 0, 2]),
    ("éA", [203, 177, 4, 8136], [0, 2, 0, 1]),
    ("don'T", [1670, 8165, 4, 8135], [3, 1, 0, 1]),
    ("İ ı", [204, 184, 8133, 204, 185], [0, 2, 1, 0, 2]),
    ("ß ẞ", [203, 167, 8133, 233, 194, 166], [0, 2, 1, 0, 0, 3]),
    ("É Ω", [203, 145, 8133, 214, 177], [0, 2, 1, 0, 2]),
    ("\ufb01", [4756], [3]),  # ligature
    ("\u017f", [8140], [2]),  # long s
    ("A\u0300 b", [4, 203, 168, 285], [0, 0, 3, 2]),
    ("\u01c5 \uff21 \u212a", [76, 205, 198, 8133, 73, 8133, 83], [0, 0, 2, 1, 3, 1, 3]),
    ("a  b\n\nc", [8136, 285, 279], [1, 3, 3]),
    ("  The \n", [4, 320], [0, 3]),
    ("漢字", [238, 196, 170, 237, 181, 159], [0, 0, 3, 0, 0, 3]),
    (f"{TITLE} x {ESC}{ALLCAPS}", [7, 4, 1898, 8133, 7, 7, 7, 5], [0, 3, 2, 1, 0, 3, 0, 3]),
    ("I am USA", [4, 8138, 660, 8133, 5, 3607], [0, 1, 3, 1, 0, 3]),
    ("CAFE\u0301", [5, 8145, 1461, 203, 177], [0, 1, 2, 0, 3]),
    ("", [], []),
]


@pytest.mark.parametrize(("text", "ids", "counts"), EXPORTED, ids=[e[0] or "-" for e in EXPORTED])
def test_ids_and_side_car_are_those_of_the_public_exporter(published, text, ids, counts):
    (document,) = caseops.encode_with_counts(published, [PUBLISHED.encode(text)])
    assert document.ids == ids
    assert document.counts.tolist() == counts


def test_the_published_tokenizer_has_the_ids_that_the_record_states(published):
    assert published.vocab_size() == 8192
    assert (published.pad_id(), published.bos_id(), published.eos_id()) == (0, 1, 2)
    assert caseops.operator_ids(published) == [4, 5, 6, 7]
    assert [i for i in range(8192) if published.is_byte(i)] == list(range(8, 264))
    assert published.piece_to_id(caseops.SPACE_MARK) == 8133
    assert not caseops.is_lossless(published)
    for i in range(264, 8192):
        assert not any(unicodedata.category(letter) == "Lu" for letter in published.id_to_piece(i))


def test_the_published_tokenizer_counts_the_bytes_between_the_ends_of_a_text(published):
    documents = corpus_documents(50)
    documents += [f"\n {text} \n" for text in documents[:5]]
    encoded = caseops.encode_with_counts(published, [PUBLISHED.encode(t) for t in documents])
    for text, document in zip(documents, encoded, strict=True):
        assert document.counts.sum() == len(text.strip().encode())


def test_the_tolerant_decoder_gives_the_folded_original(published):
    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def gives(text):
        decoded = published.decode(published.encode(PUBLISHED.encode(text)))
        original = caseops.decode_folded(decoded)
        wanted = folded(published, text)
        # In a word of capitals, what folds into a letter behind it cannot be told from its own.
        assert original == wanted or (
            ALLCAPS in decoded and original.casefold() == wanted.casefold()
        )

    gives()


def test_the_tolerant_decoder_composes_every_short_text(published):
    texts = strings(4)
    ids = published.encode([PUBLISHED.encode(text) for text in texts])
    for text, decoded in zip(texts, published.decode(ids), strict=True):
        assert caseops.decode_folded(decoded) == folded(published, text)


@pytest.mark.parametrize("text", [TITLE, f"{TITLE} a", f"x{CAPNEXT}1", f"a{ALLCAPS}.", f"{ESC}a"])
def test_the_tolerant_decoder_rejects_a_lone_operator(text):
    with pytest.raises(caseops.CaseOpsError, match="operator before no letter"):
        caseops.decode_folded(text)


def test_the_ids_tell_the_side_car_but_for_what_was_folded(published):
    table = caseops.PieceTable.from_sentencepiece(published)
    texts = [text for text, _, _ in EXPORTED] + [f"x{ESC}", "AB" + TITLE]
    for text in texts:
        (document,) = caseops.encode_with_counts(published, [PUBLISHED.encode(text)])
        told = table.counts(np.array([1, *document.ids]))[1:]
        sizes = len(folded(published, text).encode())
        assert told.sum() == sizes
        if unicodedata.is_normalized("NFKC", text) and text == " ".join(text.split()):
            assert told.tolist() == document.counts.tolist()


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ([4, 285], "lone"),  # TITLE before " b"
        ([4], "lone"),
        ([7, 8136], "lone"),  # ESC before "a"
        ([8136, 4, 8136], "inside"),
        ([8133, 6, 8136], "outside"),
    ],
)
def test_ids_that_break_the_grammar_are_found(published, pieces, kind):
    table = caseops.PieceTable.from_sentencepiece(published)
    clean = published.encode(PUBLISHED.encode("I am USA McDonald"))
    tokens = np.array([1, *clean, 8133, *pieces, 1])
    faults = table.misplaced_operators(tokens, PUBLISHED)._asdict()
    assert {name: len(where) for name, where in faults.items() if len(where)} == {kind: 1}
