"""Data: shards and their stream, packed rows for any number of ranks, documents, refusals."""

import itertools
import json
import shutil
import struct
import threading

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import VOCAB, opened, tiny_config, tiny_text

import train_gpt as tg

BOS = 1
DATASET, PREFIX = f"tiny_sp{VOCAB}", "tiny"


def rank_of(world_size, rank=0):
    """One of `world_size` ranks on the CPU, without a process group."""
    ranks = tg.Ranks({})
    ranks.world_size = world_size
    ranks.rank = rank
    ranks.device = torch.device("cpu")
    return ranks


def random_documents(total, lengths):
    """`total` ids: documents with lengths drawn from `lengths`, each with BOS first."""
    rng = np.random.default_rng()
    tokens = []
    while len(tokens) < total:
        tokens += [BOS, *rng.integers(4, VOCAB, rng.choice(lengths) - 1)]
    return np.array(tokens[:total], dtype=np.uint16)


def equal(some, others):
    """Whether two lists of rows are equal."""
    pairs = list(zip(some, others, strict=True))
    return all(torch.equal(x, y) for a, b in pairs for x, y in zip(a[:3], b[:3], strict=True))


def stream_of(folder, tokens, cuts=(), split="train"):
    for i, part in enumerate(np.split(tokens, cuts)):
        tg.write_shard(folder / f"x_{split}_{i:06d}.bin", part)
    return tg.TokenStream(folder, split)


def refused(action, *parts):
    """Asserts that `action` raises a UsageError of one line that names each of `parts`."""
    with pytest.raises(tg.UsageError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert [p for p in parts if str(p) not in message] == [], message


@pytest.fixture
def data_copy(tiny_data, tmp_path):
    """A DATA_DIR that a test may change, and the folder of its data set."""
    root = shutil.copytree(tiny_data, tmp_path / "copy")
    return root, root / "datasets" / DATASET


# --- Shards and stream ---


@pytest.mark.parametrize("count", [1, 2, 255, 4097])
def test_shard_round_trip_in_the_published_layout(tmp_path, count):
    tokens = np.random.default_rng().integers(0, 65536, count).astype(np.uint16)
    tg.write_shard(tmp_path / "a.bin", tokens)
    data = (tmp_path / "a.bin").read_bytes()
    assert data == struct.pack("<256i", 20240520, 1, count, *[0] * 253) + struct.pack(
        f"<{count}H", *tokens.tolist()
    )
    assert np.array_equal(tg.read_shard(tmp_path / "a.bin"), tokens)


GOOD = struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + struct.pack("<3H", 1, 2, 3)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (struct.pack("<i", 20240521) + GOOD[4:], "20240521"),
        (GOOD[:4] + struct.pack("<i", 2) + GOOD[8:], "2]"),
        (GOOD[:-1], "1,029 of 1,030 bytes"),
        (GOOD + b"\0", "1,031 of 1,030 bytes"),
        (GOOD[:8] + struct.pack("<i", 0) + GOOD[12:1024], "is empty"),
        (GOOD[:8] + struct.pack("<i", -1) + GOOD[12:1022], "starts with"),
        (GOOD[:8] + struct.pack("<i", -1) + GOOD[12:1024], "-1"),
        (GOOD[:600], "starts with"),
        (b"", "starts with"),
    ],
    ids="magic version truncated longer empty negative-short negative half-header nothing".split(),
)
def test_bad_shard_is_refused_by_name(tmp_path, data, named):
    path = tmp_path / "x_val_000000.bin"
    path.write_bytes(data)
    refused(lambda: tg.TokenStream(tmp_path, "val"), path, named)


def test_missing_split_is_refused_by_name(tmp_path):
    stream_of(tmp_path, np.arange(5), split="train")
    refused(lambda: tg.TokenStream(tmp_path, "val"), tmp_path, "*_val_*.bin")


def test_stream_reads_across_shard_borders_and_wraps(tmp_path):
    tokens = np.random.default_rng().integers(0, 65536, 37)
    stream = stream_of(tmp_path, tokens, cuts=[1, 9, 10, 30])
    assert (stream.size, len(stream.shards)) == (37, 5)
    endless = np.tile(tokens, 5)
    for start, count in itertools.product(range(75), (1, 2, 8, 37, 38, 80)):
        part = stream.read(start, count)
        assert part.dtype == np.int64
        assert np.array_equal(part, endless[start : start + count])


# --- Rows ---


def expected_starts(tokens, bos, longest):
    """Segment starts, one token at a time."""
    starts = []
    for i, token in enumerate(tokens):
        if i == 0 or token == bos or i - starts[-1] == longest:
            starts.append(i)
    return starts


ROWS = dict(
    micro_batch_tokens=128, train_batch_tokens=512, train_seq_len=48, cu_seqlens_capacity=20
)
LENGTHS = {"usual": [1, 2, 5, 30, 60, 300], "short": [1, 1, 2], "long": [500, 1000]}


def epoch(stream, cfg, world_size):
    """The rows of one epoch and a few more, in order, and the number of their targets.

    They are made by the loaders of `world_size` ranks.
    """
    loaders = [tg.PackedLoader(stream, BOS, cfg, rank_of(world_size, r)) for r in range(world_size)]
    rows = []
    total = 0
    while total < stream.size:
        parts, counts = zip(*(loader.rows(cfg.rows_per_step) for loader in loaders), strict=True)
        assert len(set(counts)) == 1
        step = [None] * cfg.rows_per_step
        for r, part in enumerate(parts):
            step[r::world_size] = part
        rows += step
        total += counts[0]
    return rows, total


@pytest.mark.parametrize("loader", ["documents", "rows"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_an_epoch_serves_every_transition_once_in_the_same_rows_for_any_world_size(
    tmp_path, lengths, loader
):
    tokens = random_documents(3001, LENGTHS[lengths]).astype(np.int64)
    stream = stream_of(tmp_path, tokens, cuts=[777, 778, 2000])
    cfg = tiny_config(**ROWS, data_loader=loader)
    one, total = epoch(stream, cfg, 1)
    inputs, targets = torch.cat([r.inputs for r in one]), torch.cat([r.targets for r in one])
    assert (inputs.dtype, targets.dtype, int((targets >= 0).sum())) == (
        torch.int64,
        torch.int64,
        total,
    )
    inputs, targets = inputs[targets >= 0].numpy(), targets[targets >= 0].numpy()
    # Each token comes once as an input, in order, and none is left out where a row ends.
    assert np.array_equal(inputs[:3001], tokens)
    assert np.array_equal(targets[:3001], np.roll(tokens, -1))
    for world_size in (2, 3, 4):
        rows, same = epoch(stream, cfg, world_size)
        assert (len(rows), same) == (len(one), total)
        assert equal(rows, one)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_row_is_cut_at_every_document_and_at_the_bound(tmp_path, lengths):
    tokens = random_documents(3001, LENGTHS[lengths])
    cfg = tiny_config(**ROWS)
    rows, _ = epoch(stream_of(tmp_path, tokens), cfg, 1)
    for row in rows:
        cu, n = row.cu_seqlens, int((row.targets >= 0).sum())
        assert (cu.dtype, len(cu), int(cu[0]), int(cu[-1]), row.max_seqlen) == (
            torch.int32,
            21,
            0,
            128,
            48,
        )
        assert int(cu.diff().min()) >= 0 and int(cu.diff().max()) <= 48
        starts = cu.unique().tolist()
        assert [s for s in starts if s < n] == expected_starts(row.inputs[:n].tolist(), BOS, 48)
        # Padding belongs to no document.
        assert n == 128 or n in starts
    if lengths == "short":
        # The capacity is used up before the row is full.
        assert all((row.targets < 0).any() for row in rows)


def test_padding_comes_last_and_predicts_nothing(tmp_path):
    rows, _ = epoch(stream_of(tmp_path, random_documents(600, [1, 2])), tiny_config(**ROWS), 1)
    for row in rows:
        n = int((row.targets >= 0).sum())
        # Half of the capacity is 10 documents, of 1 or 2 tokens each.
        assert 10 <= n < 128
        assert (row.targets[n:] == -1).all() and (row.inputs[n:] == 0).all()


def test_rows_mode_ignores_documents(tmp_path):
    rows, _ = epoch(
        stream_of(tmp_path, random_documents(600, [1, 2])),
        tiny_config(**ROWS, data_loader="rows"),
        1,
    )
    assert all(row.cu_seqlens.tolist() == [0, 48, 96] + [128] * 18 for row in rows)


def test_smallest_allowed_capacity_holds_every_row(tmp_path):
    """The rule of CU_SEQLENS_CAPACITY leaves room for the segments of the padding."""
    for micro, longest in ((128, 48), (96, 48), (97, 96), (64, 2), (7, 7)):
        shape = dict(micro_batch_tokens=micro, train_batch_tokens=micro, train_seq_len=longest)
        cfg = tiny_config(**shape, cu_seqlens_capacity=2 + 2 * -(-micro // longest))
        for i, lengths in enumerate(LENGTHS.values()):
            rows, total = epoch(
                stream_of(tmp_path / f"{micro}{i}", random_documents(500, lengths)), cfg, 1
            )
            assert total >= 500
            assert all(int(row.cu_seqlens.diff().max()) <= longest for row in rows)


@pytest.mark.parametrize(
    "shape", [(128, 6, 64), (8192, 18, 1024), (2048, 512, 16), (1024, 16, 256), (4096, 64, 256)]
)
def test_synthetic_rows_keep_to_the_bound_whatever_the_capacity(shape):
    row = tg.synthetic_row(tiny_config(), shape, torch.device("cpu"))
    assert (len(row.inputs), len(row.cu_seqlens), row.max_seqlen) == (
        shape[0],
        shape[1] + 1,
        shape[2],
    )
    assert int(row.cu_seqlens.diff().max()) <= shape[2]
    assert int(row.inputs.min()) >= 0 and int(row.inputs.max()) < VOCAB
    # It is not mostly padding.
    assert (row.targets >= 0).sum() >= shape[0] // 4


def test_prefetched_steps_equal_direct_calls_and_end_with_the_iterator(tmp_path):
    stream = stream_of(tmp_path, random_documents(3001, LENGTHS["usual"]))
    cfg = tiny_config(**ROWS)
    direct = tg.PackedLoader(stream, BOS, cfg, rank_of(2, 1))
    before = set(threading.enumerate())
    steps = tg.PackedLoader(stream, BOS, cfg, rank_of(2, 1)).steps()
    for _ in range(5):
        rows, total = next(steps)
        expected, same = direct.rows(cfg.rows_per_step)
        assert (len(rows), total) == (2, same)
        assert equal(rows, expected)
    assert set(threading.enumerate()) - before
    steps.close()
    assert set(threading.enumerate()) == before


# --- Documents ---


@pytest.mark.parametrize("tail", [[], [BOS], [BOS, BOS], [BOS, 9]], ids=str)
def test_documents_predict_every_token_but_the_first_once(tmp_path, tail):
    """A lone BOS at the end is the last target of the document before it; it has none itself."""
    tokens = np.concatenate([random_documents(500, [1, 2, 40]), np.array(tail, dtype=np.uint16)])
    docs = tg.Documents.load(
        stream_of(tmp_path, tokens, cuts=[100], split="val"), BOS, tiny_config()
    )
    targets = [
        range(start + 1, start + count + 1)
        for start, count in zip(docs.starts, docs.counts, strict=True)
    ]
    assert list(itertools.chain(*targets)) == list(range(1, len(tokens)))
    assert int(docs.counts.sum()) == len(tokens) - 1
    assert (docs.tokens[docs.starts] == BOS).all() and len(docs.starts) == (tokens == BOS).sum()


def test_sample_of_documents_is_drawn_with_the_seed_and_keeps_their_order(tmp_path):
    stream = stream_of(tmp_path, random_documents(3000, [10]), split="val")

    def sample(fraction, seed):
        docs = tg.Documents.load(stream, BOS, tiny_config(val_doc_fraction=fraction, seed=seed))
        assert (np.diff(docs.starts) > 0).all()
        assert (docs.counts == np.where(docs.starts == 2990, 9, 10)).all()
        return docs.starts.tolist()

    assert [len(sample(f, 1)) for f in (1.0, 0.5, 0.1, 1e-9)] == [300, 150, 30, 1]
    assert sample(0.5, 1) == sample(0.5, 1) != sample(0.5, 2)


# --- Checks before anything is expensive ---


def test_good_data_is_opened(tiny_data):
    cfg = tiny_config(data_dir=tiny_data)
    streams = opened(cfg)
    manifest = json.loads((cfg.dataset_dir / "manifest.json").read_text())
    assert {k: s.size for k, s in streams.items()} == {
        k: v["tokens"] for k, v in manifest["splits"].items()
    }


@pytest.mark.parametrize("manifest", [True, False])
def test_id_past_the_vocabulary_is_refused_by_the_rank_that_scans_it(data_copy, manifest):
    root, folder = data_copy
    path = folder / f"{PREFIX}_train_000001.bin"
    tokens = np.array(tg.read_shard(path))
    tokens[len(tokens) // 2] = VOCAB
    tg.write_shard(path, tokens)
    if not manifest:
        (folder / "manifest.json").unlink()
    cfg = tiny_config(data_dir=root, tokenizer_path=root / "tokenizers" / f"{DATASET}.model")
    refused(lambda: opened(cfg), path, f"id {VOCAB}", f"VOCAB_SIZE={VOCAB}")
    refused(lambda: opened(cfg, rank_of(2, 1)), path, f"id {VOCAB}")
    # The other rank scans other shards.
    opened(cfg, rank_of(2, 0))


@pytest.mark.parametrize(
    ("split", "positions"), [("train", "all"), ("val", "all"), ("val", "first")]
)
def test_stream_without_document_starts_is_refused(data_copy, split, positions):
    root, folder = data_copy
    path = folder / f"{PREFIX}_{split}_000000.bin"
    tokens = np.array(tg.read_shard(path))
    tokens[(tokens == BOS) if positions == "all" else 0] = 7
    tg.write_shard(path, tokens)
    refused(lambda: opened(tiny_config(data_dir=root)), path, f"BOS id {BOS}")


def test_shard_that_is_not_the_manifests_is_refused(data_copy):
    root, folder = data_copy
    path = folder / f"{PREFIX}_val_000000.bin"
    tokens = np.array(tg.read_shard(path))
    tg.write_shard(path, tokens[:-1])
    refused(lambda: opened(tiny_config(data_dir=root)), path, len(tokens), len(tokens) - 1)
    tg.write_shard(path, tokens)
    tg.write_shard(folder / f"{PREFIX}_val_000001.bin", tokens)
    refused(
        lambda: opened(tiny_config(data_dir=root)), folder / f"{PREFIX}_val_000001.bin", len(tokens)
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_set_without_a_split_is_refused(data_copy, split):
    root, folder = data_copy
    for path in folder.glob(f"*_{split}_*.bin"):
        path.unlink()
    refused(lambda: opened(tiny_config(data_dir=root)), folder, f"_{split}_")


def test_shards_that_hold_no_batch_are_refused(tiny_data):
    size = tg.TokenStream(tiny_config(data_dir=tiny_data).dataset_dir, "train").size
    for batch in (size, 2 * size):
        shape = dict(train_batch_tokens=batch, micro_batch_tokens=batch, cu_seqlens_capacity=batch)
        cfg = tiny_config(data_dir=tiny_data, **shape)
        refused(lambda cfg=cfg: opened(cfg), f"TRAIN_BATCH_TOKENS={batch}", size)


def train_tokenizer(root, name, text, **options):
    (root / f"{name}.txt").write_text(text, encoding="utf-8")
    settings = dict(
        model_type="bpe", byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / f"{name}.txt"),
        model_prefix=str(root / name),
        **{"vocab_size": VOCAB, **settings, **options},
    )
    return root / f"{name}.model"


def test_tokenizer_is_the_manifests(tiny_data):
    cfg = tiny_config(data_dir=tiny_data)
    tokenizer = tg.Tokenizer.load(cfg)
    assert tokenizer.path == tiny_data / "tokenizers" / f"{DATASET}.model"
    assert (tokenizer.bos_id, tokenizer.model.vocab_size()) == (BOS, VOCAB)
    assert tokenizer.sha256 == tokenizer.manifest["tokenizer"]["sha256"]


def test_tokenizer_of_another_size_is_refused(tiny_data):
    cfg = tiny_config(data_dir=tiny_data, vocab_size=VOCAB + 1)
    refused(
        lambda: tg.Tokenizer.load(cfg),
        f"VOCAB_SIZE={VOCAB + 1}",
        f"{DATASET}.model has {VOCAB} pieces",
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"not a model", bytes(range(256)) * 50, None],
    ids=["empty", "text", "binary", "folder"],
)
def test_file_that_is_no_tokenizer_is_refused(tiny_data, tmp_path, content):
    path = tmp_path / "a.model"
    path.mkdir() if content is None else path.write_bytes(content)
    refused(lambda: tg.Tokenizer.load(tiny_config(data_dir=tiny_data, tokenizer_path=path)), path)


def test_missing_tokenizer_is_refused_by_its_default_name(tmp_path):
    cfg = tiny_config(data_dir=tmp_path)
    refused(
        lambda: tg.Tokenizer.load(cfg),
        tmp_path / "tokenizers" / f"fineweb_{VOCAB}_bpe.model",
        "TOKENIZER_PATH=",
    )


def test_a_missing_tokenizer_that_the_user_named_is_to_be_unset_if_the_data_set_names_its_own(
    tiny_data, tmp_path
):
    cfg = tiny_config(data_dir=tiny_data, tokenizer_path=tmp_path / "old.model")
    named = tg.load_manifest(cfg)[1]
    refused(lambda: tg.Tokenizer.load(cfg), f"Unset it: {cfg.dataset_dir} names {named}")


def test_another_tokenizer_than_the_manifests_is_refused(tiny_data, tmp_path):
    path = train_tokenizer(
        tmp_path, "other", "\n".join(t.replace("\n", " ") for t in tiny_text(100, seed=2))
    )
    cfg = tiny_config(data_dir=tiny_data, tokenizer_path=path)
    refused(lambda: tg.Tokenizer.load(cfg), path, cfg.dataset_dir / "manifest.json")


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("nobos", "the cat sat on a mat and the dog sat too", dict(bos_id=-1)),
        ("nospace", "abcabcabbacbbacaabbccabacbac", dict(add_dummy_prefix=False, vocab_size=270)),
    ],
)
def test_tokenizer_that_would_miscount_is_refused(tmp_path, name, text, options):
    path = train_tokenizer(tmp_path, name, text, hard_vocab_limit=False, **options)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert (model.bos_id() < 0, model.piece_to_id("\u2581") == model.unk_id()) == (
        name == "nobos",
        name == "nospace",
    )
    cfg = tiny_config(data_dir=tmp_path, tokenizer_path=path, vocab_size=model.vocab_size())
    refused(lambda: tg.Tokenizer.load(cfg), path, "needs BOS and the bare space mark")
