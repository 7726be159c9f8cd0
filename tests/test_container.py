"""An artifact has one spelling: what is forged is refused, quickly and in little memory."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_config

sys.path.insert(0, str(ROOT / "tools"))
import container

import train_gpt as tg

# tools/container.py ARTIFACT --mutants 10000 is the long form.
MUTANTS = int(os.environ.get("FUZZ_MUTANTS", "240"))


def artifact(compressor: str, **fields: object) -> bytes:
    """The file of a tiny network of random weights."""
    cfg = tiny_config(compressor=compressor, quantizer="int6", artifact_limit_bytes=0, **fields)
    torch.manual_seed(0)
    model = tg.GPT(cfg)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    quantizer = tg.Quantizer(model, None, None, tg.Ranks({}))
    meta = {"looped": True, "tokenizer": "0" * 64}
    return tg.pack_artifact(model, quantizer.solve(quantizer.default_theta), meta)


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {compressor: artifact(compressor) for compressor in tg.COMPRESSORS}


@pytest.mark.parametrize("compressor", tg.COMPRESSORS)
def test_an_honest_file_is_the_same_when_packed_again(files, compressor):
    assert container.difference(files[compressor]) == ""


@pytest.mark.parametrize("compressor", ["ans", "zstd"])
def test_no_forged_file_says_the_same_with_other_bytes(files, compressor):
    found = list(container.forge(files[compressor], MUTANTS // 2, seed=1))
    assert {one.kind for one in found} == {change.__name__ for change in container.MUTATIONS}
    assert [one for one in found if one.is_hole] == []
    assert sum(one.is_refused for one in found) > 0.9 * len(found)
    # Not a second of one core: others may share it.
    assert max(one.seconds for one in found) < 5 * container.MAX_SECONDS


def test_the_fuzz_finds_a_loader_that_does_not_look_behind_streams(files, monkeypatch):
    def trusting(codec, data, size):
        decoder = tg.lzma.LZMADecompressor(tg.lzma.FORMAT_RAW, filters=tg.LZMA_FILTERS)
        return decoder.decompress(data, size)

    monkeypatch.setattr(tg, "decompress", trusting)
    found = list(container.forge(files["lzma"], 60, seed=2))
    behind = [one for one in found if one.kind == "longer_stream" and one.is_loaded]
    assert behind and all(one.is_refused for one in behind)  # by packing again alone


def of_another_zstd(data: bytes) -> bytes:
    """The file with its codes compressed at another level, as another version might do it."""
    zstandard = pytest.importorskip("zstandard")
    parts = container.Parts.of(data)
    raw = tg.decompress("zstd", parts.streams[0], parts.header["streams"][0][0])
    return container.with_stream(parts, 0, zstandard.ZstdCompressor(level=19).compress(raw))


def test_codes_spelt_by_another_version_of_a_codec_are_told_from_other_forgery(files):
    parts = container.Parts.of(files["zstd"])
    other = of_another_zstd(files["zstd"])
    assert "differs from byte" in container.difference(other)
    assert container.is_of_another_library(other)
    raw = tg.decompress("lzma", parts.streams[4], parts.header["streams"][4][0])
    filters = [{**tg.LZMA_FILTERS[0], "mode": tg.lzma.MODE_FAST, "nice_len": 5}]
    stream = tg.lzma.compress(raw, tg.lzma.FORMAT_RAW, filters=filters)
    forged = container.with_stream(parts, 4, stream)
    assert stream != parts.streams[4] and not container.is_of_another_library(forged)


def test_what_was_accepted_once_is_refused(files):
    """Unused header fields, 40 kB behind a stream, skippable frames, unused ANS tables."""
    parts = container.Parts.of(files["zstd"])
    frame = bytes([0x50, 0x2A, 0x4D, 0x18, 4, 0, 0, 0]) + b"text"
    forged = [
        parts._replace(header={**parts.header, "note": "a document"}).joined(),
        container.with_stream(parts, 0, parts.streams[0] + bytes(40_000)),
        container.with_stream(parts, 0, parts.streams[0] + frame),
        container.with_stream(parts, 4, parts.streams[4] + bytes(40_000)),
    ]
    ans = container.Parts.of(files["ans"])
    stream = ans.streams[0]
    end = 4 + int.from_bytes(stream[:4], "little")
    size = 2 * tg.NUM_CONTEXTS * tg.NUM_SYMBOLS
    table = bytearray(tg.decompress("lzma", stream[4:end], size))
    assert table[-4096:-4094] == (1 << 14).to_bytes(2, "little")  # no code has the last context
    table[-4096:-4092] = (1 << 13).to_bytes(2, "little") * 2
    stored = tg.compress("lzma", bytes(table))
    with_text = len(stored).to_bytes(4, "little") + stored + stream[end:]
    forged.append(container.with_stream(ans, 0, with_text))
    for data in forged:
        with pytest.raises(tg.UsageError, match="damaged"):
            tg.open_artifact(data, Path("x"))


def test_depth_is_bounded_before_it_is_unrolled(files, monkeypatch):
    """num_layers 256 with num_loops 64 took 19 s."""

    def unrolled(*_):
        raise RuntimeError("the depth was unrolled")

    parts = container.Parts.of(files["zstd"])
    header = json.loads(json.dumps(parts.header))
    header["config"] |= {"num_layers": 256, "num_loops": 64, "loop_end": 200}
    monkeypatch.setattr(tg, "layer_plan", unrolled)
    with pytest.raises(tg.UsageError, match="out of range"):
        tg.open_artifact(parts._replace(header=header).joined(), Path("x"))


def test_a_small_file_cannot_ask_for_a_large_network(files):
    parts = container.Parts.of(files["zstd"])
    header = json.loads(json.dumps(parts.header))
    header["config"] |= {"model_dim": 1024}
    container.fit_sizes(header)
    cfg = tg.config_of_header(header)
    bomb = tg.compress("zstd", bytes(sum(tg.stream_sizes(cfg)[:1])))
    forged = container.with_stream(parts._replace(header=header), 0, bomb)
    assert len(forged) < 100_000 < sum(tg.stream_sizes(cfg))
    with pytest.raises(tg.UsageError, match="too short for its network"):
        tg.open_artifact(forged, Path("x"))


def test_command_says_what_differs_in_one_line(files, tmp_path, capsys):
    path = tmp_path / "a.ptz"
    path.write_bytes(files["zstd"])
    assert container.main([str(path), "--mutants", "20"]) == 0
    assert "the same when packed again" in capsys.readouterr().out
    parts = container.Parts.of(files["zstd"])
    raw = tg.decompress("lzma", parts.streams[4], parts.header["streams"][4][0])
    filters = [{**tg.LZMA_FILTERS[0], "mode": tg.lzma.MODE_FAST, "nice_len": 5}]
    other = tg.lzma.compress(raw, tg.lzma.FORMAT_RAW, filters=filters)
    # The loader reads it, and only packing again sees it.
    assert other != parts.streams[4]
    path.write_bytes(container.with_stream(parts, 4, other))
    assert container.main([str(path)]) == 1
    assert "differs from byte" in capsys.readouterr().out
    for wrong in (["nowhere"], [str(path), "--mutants", "-1"]):
        with pytest.raises(SystemExit):
            container.main(wrong)


def test_command_does_not_judge_a_file_of_another_version_of_its_codec(files, tmp_path, capsys):
    path = tmp_path / "a.ptz"
    path.write_bytes(of_another_zstd(files["zstd"]))
    assert container.main([str(path)]) == 3
    assert "not shown" in capsys.readouterr().out


def test_as_many_forged_files_are_read_as_asked_for(files):
    for seed in range(8):
        assert len(list(container.forge(files["ans"], 1, seed))) == 1
