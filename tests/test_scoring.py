"""Scoring: bytes behind tokens, the meter, windows, and every validation target once, whatever the rows and ranks."""

import dataclasses
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import TINY, VOCAB, on_ranks, tiny_config, tiny_text
from test_data import BOS, rank_of, refused, train_tokenizer

import train_gpt as tg

LENGTH, STRIDE = int(TINY["EVAL_SEQ_LEN"]), int(TINY["EVAL_STRIDE"])


# --- Bytes ---

PIECES = [  # (piece, kind, bytes, leading space, boundary)
    ("<pad>", "control", 0, False, True),
    ("<s>", "control", 0, False, True),
    ("\u2581control", "control", 0, False, True),
    ("<unk>", "unknown", 0, False, True),
    ("\u2581unused", "unused", 0, False, True),
    ("<0x0A>", "byte", 1, False, False),
    ("<0xE2>", "byte", 1, False, False),
    ("the", "normal", 3, False, False),
    ("\u2581", "normal", 0, True, False),
    ("\u2581the", "normal", 3, True, False),
    ("\u2581\u2581a", "normal", 2, True, False),
    ("a\u2581", "normal", 2, False, False),
    ("é", "normal", 2, False, False),
    ("\u2581漢字", "normal", 6, True, False),
    ("🙂", "normal", 4, False, False),
]


def listed_table():
    kinds = ("control", "unknown", "unused", "byte")
    listed = SimpleNamespace(
        **{f"is_{kind}": lambda i, kind=kind: PIECES[i][1] == kind for kind in kinds}
    )
    listed.vocab_size, listed.id_to_piece = lambda: len(PIECES), lambda i: PIECES[i][0]
    return tg.ByteTable.from_sentencepiece(listed)


def test_byte_table_of_every_kind_of_piece():
    table = listed_table()
    assert list(zip(*(x.tolist() for x in table), strict=True)) == [piece[2:] for piece in PIECES]


def test_leading_space_counts_unless_the_token_before_is_a_boundary():
    before, targets = (x.ravel() for x in np.meshgrid(*[np.arange(len(PIECES))] * 2))
    expected = [
        PIECES[t][2] + (PIECES[t][3] and not PIECES[p][4])
        for p, t in zip(before, targets, strict=True)
    ]
    assert listed_table().bytes_of(before, targets).tolist() == expected
    tokens = np.random.default_rng().integers(0, len(PIECES), 500)
    assert listed_table().count(tokens) == listed_table().bytes_of(tokens[:-1], tokens[1:]).sum()


def random_text(rng):
    words = "the|  | |\n|\t|of model|漢字かな|naïve|🙂👍🏽|ſ|\u00a0|3.14|Ж|!|\x07|e\u0301".split(
        "|"
    )
    return "".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(rng.randrange(60)))


def test_bytes_are_those_of_the_text_behind_the_tokens(tiny_data):
    tokenizer = tg.Tokenizer.load(tiny_config(data_dir=tiny_data))
    table, kinds, rng = tg.ByteTable.from_sentencepiece(tokenizer.model), set(), random.Random()
    for text in [" two  spaces ", "漢", "", *(random_text(rng) for _ in range(200))]:
        ids = np.array([BOS, *tokenizer.model.encode(text), BOS])
        assert tokenizer.model.decode(ids.tolist()) == text
        assert table.count(ids) == len(
            text.encode()
        )  # BOS adds none, as first token and as the last target
        kinds |= {(bool(tokenizer.model.is_byte(int(i))), bool(table.space[i])) for i in ids}
    assert len(kinds) == 3  # bytes, words with and without a space


def test_bytes_of_the_documents_add_up_to_the_manifests(tiny_data):
    cfg = tiny_config(data_dir=tiny_data)
    tokenizer = tg.Tokenizer.load(cfg)
    docs = tg.Documents.load(tg.TokenStream(cfg.dataset_dir, "val"), BOS, cfg)
    table, decoded = tg.check_bytes(tokenizer, docs, rank_of(1))
    parts = [
        table.count(docs.tokens[s : s + n + 1])
        for s, n in zip(docs.starts, docs.counts, strict=True)
    ]
    assert sum(parts) == tokenizer.manifest["splits"]["val"]["bytes"] == table.count(docs.tokens)
    assert decoded == sum(parts)
    shares = [tg.check_bytes(tokenizer, docs, rank_of(3, rank))[1] for rank in range(3)]
    assert sum(shares) == decoded > max(shares)
    assert parts == [
        len(text.encode()) for text in tiny_text(172, seed=1)[160:]
    ]  # the texts of the fixture
    lone = docs._replace(
        tokens=np.append(docs.tokens, BOS),
        starts=np.append(docs.starts, len(docs.tokens)),
        counts=np.append([*docs.counts[:-1], docs.counts[-1] + 1], 0),
    )
    tg.check_bytes(tokenizer, lone, rank_of(1))


@pytest.mark.parametrize("off", [-1, 1])
def test_manifest_with_other_bytes_is_refused(tiny_data, off):
    cfg = tiny_config(data_dir=tiny_data)
    tokenizer = tg.Tokenizer.load(cfg)
    docs = tg.Documents.load(tg.TokenStream(cfg.dataset_dir, "val"), BOS, cfg)
    total = tokenizer.manifest["splits"]["val"]["bytes"]
    manifest = json.loads(json.dumps(tokenizer.manifest))
    manifest["splits"]["val"]["bytes"] += off
    tokenizer = tokenizer._replace(manifest=manifest)
    refused(lambda: tg.check_bytes(tokenizer, docs, rank_of(1)), tokenizer.path, total, total + off)


def odd_tokenizer(tmp_path, options):
    """Of a tokenizer trained with these options: path, model, and documents of it."""
    known = "\n".join(
        text.splitlines()[0] for text in tiny_text(50, seed=3)
    )  # without the letters outside ASCII
    path = train_tokenizer(tmp_path, "odd", known, **options)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    parts = [[BOS, *model.encode(text)] for text in tiny_text(6, seed=4)]
    docs = documents([len(p) for p in parts])._replace(tokens=np.concatenate(parts))
    return path, model, docs


def test_tokenizer_that_miscounts_is_refused(tmp_path):
    """Even without a manifest: the count is compared with the decoded text of documents."""
    path, model, docs = odd_tokenizer(
        tmp_path, dict(byte_fallback=False, vocab_size=80)
    )  # unknown characters
    refused(
        lambda: tg.check_bytes(tg.Tokenizer(path, model, BOS, "", {}), docs, rank_of(1)),
        path,
        "document at",
    )


@pytest.mark.parametrize(
    "options",
    [dict(treat_whitespace_as_suffix=True), dict(split_by_whitespace=False, vocab_size=500)],
    ids=str,
)
def test_spaces_after_or_amid_words_count_as_a_byte_each(tmp_path, options):
    path, model, docs = odd_tokenizer(tmp_path, options)
    assert any("\u2581" in model.id_to_piece(i)[1:] for i in docs.tokens.tolist())
    table, decoded = tg.check_bytes(tg.Tokenizer(path, model, BOS, "", {}), docs, rank_of(1))
    assert table.count(docs.tokens) == decoded > 1000


# --- Meter ---


def random_table(rng):
    return tg.ByteTable(rng.integers(0, 9, VOCAB), rng.random(VOCAB) < 0.4, rng.random(VOCAB) < 0.1)


def test_result_equals_a_hand_sum_in_float64():
    rng = np.random.default_rng()
    table, docs = random_table(rng), documents([1, 70, 20000, 3000])
    ledger, nats, num_bytes = tg.Ledger(docs, table, torch.device("cpu")), [], 0
    for place in np.array_split(rng.permutation(len(docs.tokens) - 1)[:15000], 7):
        scores = torch.rand(len(place)) * 1e4  # a sum of these in fp32 is off in the fifth digit
        ledger.record(torch.from_numpy(place), scores)
        nats += scores.tolist()
        for p, t in zip(docs.tokens[place], docs.tokens[place + 1], strict=True):
            num_bytes += int(table.base[t]) + int(table.space[t] and not table.boundary[p])
    result = ledger.result()
    assert (result["tokens"], result["bytes"]) == (len(nats), num_bytes)
    assert result["val_loss"] == pytest.approx(math.fsum(nats) / len(nats), rel=1e-12)
    assert result["val_bpb"] == pytest.approx(math.fsum(nats) / math.log(2) / num_bytes, rel=1e-12)


def test_empty_ledger_has_a_result():
    ledger = tg.Ledger(documents([5]), random_table(np.random.default_rng()), torch.device("cpu"))
    assert ledger.result()["tokens"] == 0


# --- Ledger ---


def full_ledger(docs):
    """A ledger whose every target is scored, and the bytes it should hold."""
    table = tg.ByteTable(
        np.ones(VOCAB, dtype=np.int64), np.zeros(VOCAB, dtype=bool), np.zeros(VOCAB, dtype=bool)
    )
    ledger, places = (
        tg.Ledger(docs, table, torch.device("cpu")),
        torch.from_numpy(docs.target_indices()),
    )
    ledger.record(places, torch.rand(len(places)))
    return ledger, len(places)


@pytest.mark.parametrize("sampled", [False, True])
def test_ledger_of_one_pass_has_no_problem(sampled):
    docs = documents([9, 1, 40, 2, 7])
    docs = (
        docs._replace(starts=docs.starts[[0, 3]], counts=docs.counts[[0, 3]]) if sampled else docs
    )
    ledger, num_bytes = full_ledger(docs)
    ledger.require_scored(torch.from_numpy(docs.target_indices()))
    ledger.require_scored(torch.full((3,), ledger.padding_index))  # padding is no target
    assert ledger.problems(num_bytes) == []


def spoil(ledger, how, docs):
    first = torch.tensor([0])
    if how == "never":
        ledger.times_scored[3] = 0
    elif how == "often":
        ledger.record(first, torch.ones(1))
    elif how == "twice at once":
        ledger.times_scored[0] = 0
        ledger.record(torch.tensor([0, 0]), torch.ones(2))
    elif how == "before":
        ledger.times_scored[0] = 0
        ledger.require_scored(first)
        ledger.record(first, torch.ones(1))
    elif how == "finite":
        ledger.nats[2] = float("nan")
    elif how == "outside":
        ledger.record(torch.tensor([int(docs.starts[1])]), torch.ones(1))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("never", "1 targets were never scored"),
        ("often", "1 targets were scored too often"),
        ("twice at once", "1 targets were scored too often"),
        ("before", "1 targets were read by an update before"),
        ("finite", "1 scores are not finite"),
        ("outside", "1 targets were scored too often"),
        ("bytes", "bytes"),
    ],
)
def test_ledger_names_the_broken_rule(how, reason):
    docs = documents([9, 1, 40, 2, 7])
    docs = docs._replace(starts=docs.starts[[0, 2]], counts=docs.counts[[0, 2]])
    ledger, num_bytes = full_ledger(docs)
    spoil(ledger, how, documents([9, 1, 40, 2, 7]))
    found = ledger.problems(num_bytes + (how == "bytes"))
    assert reason in "; ".join(found)
    assert len(found) == 1 + (how in ("never", "outside"))  # both change the bytes as well


def test_first_score_stays():
    ledger, _ = full_ledger(documents([9, 4]))
    before = ledger.nats.clone()
    ledger.record(torch.tensor([1, 2]), torch.zeros(2))
    assert torch.equal(ledger.nats, before)


def ledger_of_rank(ranks, both):
    docs = documents([9, 4, 6])._replace(tokens=np.full(19, 5))
    table = tg.ByteTable(
        np.ones(VOCAB, dtype=np.int64), np.zeros(VOCAB, dtype=bool), np.zeros(VOCAB, dtype=bool)
    )
    ledger, places = (
        tg.Ledger(docs, table, torch.device("cpu")),
        torch.from_numpy(docs.target_indices()),
    )
    places = places[ranks.rank :: 2] if not both else places[min(ranks.rank, 1) * 7 :]
    ledger.record(places, places.float())
    return ledger.join(ranks).problems(18), ledger.result()


@pytest.mark.parametrize("both", [False, True])
def test_ranks_join_their_ledgers_and_see_targets_that_two_scored(tmp_path, both):
    for problems, result in on_ranks(2, ledger_of_rank, tmp_path, both):
        assert problems == ([] if not both else ["11 targets were scored too often"])
        assert both or result["val_loss"] == pytest.approx(np.arange(18).mean())


# --- Windows ---

CASES = [
    (length, stride)
    for length in (2, 7, 16, 64)
    for stride in (1, 3, 7, 16, 64)
    if stride <= length
]


@pytest.mark.parametrize(("length", "stride"), CASES)
def test_windows_score_each_target_once_with_the_context_of_the_grid(length, stride):
    counts = (
        0,
        1,
        stride,
        length - 1,
        length,
        length + 1,
        length + stride,
        5 * length + 1,
        random.randrange(500),
    )
    for targets in counts:
        found = tg.scoring_windows(targets, length, stride)
        assert [j for _, score, end in found for j in range(score, end)] == list(range(targets))
        for start, score, end in found:
            assert start % stride == 0 and start <= score < end <= start + length
            assert (
                start == 0 or score - start == length - stride
            )  # the others see as much as they can


@pytest.mark.parametrize(("length", "stride"), CASES)
def test_windows_do_not_look_at_the_end_of_the_document(length, stride):
    for targets in range(1, 4 * length, 5):
        longer = tg.scoring_windows(targets + random.randrange(1, 3 * length), length, stride)
        common = [
            (start, score, min(end, targets)) for start, score, end in longer if score < targets
        ]
        assert tg.scoring_windows(targets, length, stride) == common


@pytest.mark.parametrize(("targets", "count"), [(62_021_632, 969_057), (40_540_160, 633_409)])
def test_number_of_sliding_windows_over_the_published_validation_sets(targets, count):
    found = tg.scoring_windows(targets, 2048, 64)
    assert len(found) == count
    assert sum(end - score for _, score, end in found) == targets == found[-1][2]


# --- Evaluation ---


def documents(lengths):
    """Documents of these lengths with random ids."""
    starts, rng = np.cumsum([0, *lengths[:-1]]), np.random.default_rng()
    tokens = rng.integers(4, VOCAB, sum(lengths))
    tokens[starts] = BOS
    return tg.Documents(tokens, starts, np.diff(starts, append=len(tokens) - 1))


@pytest.fixture
def model():
    """A network whose every part matters: at its initial weights no token would see another."""
    network = tg.GPT(tiny_config())
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return network


@pytest.fixture
def score(tmp_path):
    """evaluate(..) of some documents on one rank, or another."""

    def run(forward, docs, table, stride=LENGTH, ranks=None, **overrides):
        cfg = tiny_config(**overrides)
        log = tg.Log(tmp_path / "log.txt", is_main=False)
        ledger = tg.Ledger(docs, table, torch.device("cpu"))
        return tg.score_all(
            tg.Scorer(forward, cfg.plans[1], ledger, cfg, ranks or rank_of(1), log), stride
        ).result()

    return run


@pytest.mark.parametrize("stride", [LENGTH, STRIDE, 50, 1])
@pytest.mark.parametrize("loader", ["documents", "rows"])
@pytest.mark.parametrize("val_batch_tokens", [8 * LENGTH, 8 * LENGTH + 999, 9999])
def test_every_target_is_scored_once_on_some_rank(score, stride, loader, val_batch_tokens):
    """The tail of the stream, documents of one token and a lone BOS at its end included (W39)."""
    lengths = [1, 2, LENGTH, 1, LENGTH + 1, LENGTH + 2, 200, *[2] * 150, 3, 90, 1]
    docs, table = documents(lengths), random_table(np.random.default_rng())
    docs = docs._replace(tokens=np.arange(len(docs.tokens)))  # a token is its place
    first = set(docs.starts.tolist()) if loader == "documents" else {0}
    table = tg.ByteTable(*(np.resize(x, len(docs.tokens)) for x in table))
    for world_size in (1, 2, 3):
        seen, results = [], []

        def forward(batch, plan, seen=seen):
            segments = [
                x.tensor_split(batch.cu_seqlens[1:-1].long()) for x in (batch.inputs, batch.targets)
            ]
            for inputs, targets in zip(*segments, strict=True):
                if (targets >= 0).any():  # not padding, so one piece of one document
                    assert torch.equal(inputs, torch.arange(inputs[0], inputs[0] + len(inputs)))
                    assert not first & set(inputs[1:].tolist()) and len(inputs) <= LENGTH
                    assert torch.equal(targets, torch.where(targets >= 0, inputs + 1, -1))
                    seen += targets[targets >= 0].tolist()
            return torch.ones(len(batch.inputs))

        for rank in range(world_size):
            results.append(
                score(
                    forward,
                    docs,
                    table,
                    stride,
                    rank_of(world_size, rank),
                    data_loader=loader,
                    val_batch_tokens=val_batch_tokens,
                )
            )
        assert sorted(seen) == list(range(1, len(docs.tokens)))
        assert sum(r["tokens"] for r in results) == docs.counts.sum() == len(docs.tokens) - 1
        assert sum(r["bytes"] for r in results) == table.count(docs.tokens)


def reference(model, docs, stride):
    """Nats per target, one forward per target in fp64 (logits fp32), the window ending at it; stream order."""

    class Exact(tg.Config):
        dtype = property(lambda cfg: torch.float64)

    exact = tg.GPT(Exact(**dataclasses.asdict(model.cfg))).double()
    exact.load_state_dict(model.state_dict())
    nats = []
    for first, count in zip(docs.starts, docs.counts, strict=True):
        for j in range(count):
            start = -(-max(0, j + 1 - LENGTH) // stride) * stride
            ids = torch.from_numpy(docs.tokens[first + start : first + j + 2])
            row = tg.Batch(
                ids[:-1], ids[1:], torch.tensor([0, len(ids) - 1], dtype=torch.int32), LENGTH
            )
            with torch.no_grad():
                nats.append(float(exact(row, model.cfg.plans[1])[-1]))
    return nats


@pytest.mark.parametrize("stride", [LENGTH, STRIDE])
def test_evaluation_equals_a_plain_loop_over_documents(score, model, stride):
    docs, table = (
        documents([30, 1, LENGTH + 1, 2, 2 * LENGTH + 11]),
        random_table(np.random.default_rng()),
    )
    nats, result = reference(model, docs, stride), score(model, docs, table, stride)
    total = table.count(docs.tokens)
    assert (result["tokens"], result["bytes"]) == (len(nats), total)
    assert result["val_loss"] == pytest.approx(math.fsum(nats) / len(nats), rel=1e-6)
    assert result["val_bpb"] == pytest.approx(math.fsum(nats) / math.log(2) / total, rel=1e-6)


def test_result_depends_neither_on_the_row_length_nor_on_the_ranks(score, model):
    docs, table = (
        documents([30, 1, LENGTH + 1, 2, 300, 2, 2, 100]),
        random_table(np.random.default_rng()),
    )
    one = score(model, docs, table, STRIDE)
    for tokens in (8 * LENGTH, 8 * LENGTH + 333, 16384):
        other = score(model, docs, table, STRIDE, val_batch_tokens=tokens)
        assert other == pytest.approx(one, rel=1e-6)
    parts = [
        score(model, docs, table, STRIDE, rank_of(2, rank), val_batch_tokens=8 * LENGTH)
        for rank in range(2)
    ]
    assert all(part["tokens"] for part in parts)
    tokens, total = (sum(part[key] for part in parts) for key in ("tokens", "bytes"))
    nats = sum(part["val_loss"] * part["tokens"] for part in parts)
    together = dict(
        val_loss=nats / tokens, val_bpb=nats / math.log(2) / total, tokens=tokens, bytes=total
    )
    assert together == pytest.approx(one, rel=1e-6)
    assert score(model, docs, table)["val_loss"] != pytest.approx(
        one["val_loss"], rel=1e-6
    )  # context does matter


@pytest.mark.parametrize("loader", ["documents", "rows"])
def test_no_document_influences_anothers_score(score, model, loader):
    docs, table = documents([1, 30, 90, 7, 50, 8]), random_table(np.random.default_rng())
    other = documents([1, 30, 90, 7, 50, 8])
    tokens = other.tokens.copy()
    tokens[31:121] = docs.tokens[31:121]  # the third document is the same, all others are new

    def nats_of(docs):
        found = []

        def forward(batch, plan):
            nats = model(batch, plan)
            found.append(nats[batch.targets >= 0])
            return nats

        score(forward, docs, table, data_loader=loader)
        return torch.cat(found)  # plain scoring: in the order of the stream

    a, b = nats_of(docs), nats_of(docs._replace(tokens=tokens))
    assert (a[:29] != b[:29]).any()
    same = (a[31:121] - b[31:121]).norm() <= 1e-6 * a[
        31:121
    ].norm()  # its targets, the next BOS included
    assert same == (loader == "documents")  # rows mode is one text from end to end


def test_a_sample_of_documents_scores_the_targets_of_the_sample(score, model, tiny_data):
    cfg = tiny_config(data_dir=tiny_data, val_doc_fraction=0.4)
    docs = tg.Documents.load(tg.TokenStream(cfg.dataset_dir, "val"), BOS, cfg)
    table = random_table(np.random.default_rng())
    whole, each = (
        score(model, docs, table, val_doc_fraction=0.4),
        zip(docs.starts, docs.counts, strict=True),
    )
    parts = [
        score(model, docs._replace(starts=np.array([s]), counts=np.array([n])), table)
        for s, n in each
    ]
    assert (len(parts), whole["tokens"]) == (5, docs.counts.sum())
    nats = sum(part["val_loss"] * part["tokens"] for part in parts)
    assert whole["val_loss"] * whole["tokens"] == pytest.approx(nats, rel=1e-6)
