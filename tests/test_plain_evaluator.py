"""The plain evaluator gives the scores of train_gpt.py, which shares no code with it."""

from __future__ import annotations

import ast
import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

sys.path.insert(0, str(ROOT / "tools"))
from plain_artifact import read_artifact
from plain_evaluator import Model, number
from probe import Subject

import train_gpt as tg

# TINY's sizes without its structure, for the structure of other presets.
STRUCTURE = ("PRESET", "NUM_LOOPS", "PARALLEL_START_LAYER", "XSA_LAST_N", "ROPE_DIMS", "MLP_MULT")
SIZES = {n: v for n, v in TINY.items() if n not in (*STRUCTURE, "LOOP_START", "LOOP_END")}
SYSTEMS = {
    "cpu": dict(TINY),
    "pr1530": {**SIZES, "PRESET": "pr1530", "SHRINK": "1", "NUM_LAYERS": "11"},
    "pr605": {**SIZES, "PRESET": "pr605", "SHRINK": "1", "TTT_MIN_DOC_LEN": "32"},
    "pr1413": {**SIZES, "PRESET": "pr1413", "SHRINK": "1", "NUM_LAYERS": "11"},
}
COMMON = {"ARTIFACT_LIMIT_BYTES": "0", "WARMUP_STEPS": "0", "TTT_CHUNK_TOKENS": "512"}


def random_artifact(cfg: tg.Config, tokenizer: Path) -> bytes:
    """The file of a network of random weights, quantised without Hessians."""
    torch.manual_seed(0)
    model = tg.GPT(cfg)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.cfg = dataclasses.replace(cfg, quantizer="int6", column_scales=False)
    quantizer = tg.Quantizer(model, None, None, tg.Ranks({}))
    sha256 = tg.hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    quantised = quantizer.solve(quantizer.default_theta)
    # Columns of several scales, as the allocated quantiser makes them.
    for exponents in quantised.columns.values():
        exponents += (torch.arange(len(exponents)) % 5 - 2).to(exponents.dtype)
    return tg.pack_artifact(model, quantised, {"looped": True, "tokenizer": sha256})


@pytest.mark.parametrize("system", SYSTEMS)
def test_plain_and_adapted_scores_are_those_of_the_script(tiny_data, tmp_path, system):
    environ = {**SYSTEMS[system], **COMMON, "DATA_DIR": str(tiny_data)}
    cfg, _ = tg.Config.from_env(environ, False)
    path = tmp_path / "artifact"
    path.write_bytes(random_artifact(cfg, next((tiny_data / "tokenizers").glob("*.model"))))
    subject = Subject(tg, {**environ, "EVAL_ONLY_PATH": str(path)})
    settings = {name: str(v) for name, v in dataclasses.asdict(subject.run.cfg).items()}
    model = Model(path.read_bytes(), settings)
    everything = subject.run.docs
    longest = np.sort(np.argsort(everything.counts)[-4:])
    few = everything._replace(starts=everything.starts[longest], counts=everything.counts[longest])
    for name in subject.names:
        on_stream = subject.reads_across_documents(name)
        docs = everything if on_stream else few
        nats = subject.nats(name, docs)
        for start, end in [(0, len(nats))] if on_stream else docs.spans():
            ids = docs.tokens[start : end + 1]
            if "ttt" not in name:
                stride = subject.cfg.eval_stride if "sliding" in name else 0
                found = model.plain(ids, stride)
            elif subject.cfg.ttt_mode == "chunk":
                found = model.chunks(ids)
            else:
                found = model.adapted(ids, int(start))
            assert abs(found - nats[start:end]).mean() < 1e-4, (name, start)
            assert abs(found - nats[start:end]).max() < 1e-2


def test_the_reader_finds_the_weights_that_the_script_loads(tiny_data):
    tokenizer = next((tiny_data / "tokenizers").glob("*.model"))
    for compressor in ("ans", "lzma"):
        environ = {**TINY, **COMMON, "DATA_DIR": str(tiny_data), "COMPRESSOR": compressor}
        cfg, _ = tg.Config.from_env(environ, False)
        data = random_artifact(cfg, tokenizer)
        _, weights = read_artifact(data)
        model = tg.GPT(cfg)
        tg.load_artifact(model, tg.open_artifact(data, Path("x"))[1])
        for name in ("qo_bank", "kv_bank", "up_bank", "down_bank", "tok_emb", "resid_mix"):
            assert torch.equal(weights[name], model.get_parameter(name)), name


def test_it_is_short_and_shares_no_code_with_the_script():
    names = {path.stem for path in (ROOT / "tools").glob("plain_*.py")}
    assert "plain_evaluator" in names
    for name in names:
        text = (ROOT / "tools" / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 250
        assert "__import__" not in text and "importlib" not in text
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                modules = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules = {node.module}
            else:
                continue
            known = {"numpy", "torch", "math", "json", "lzma", "zlib", "typing", "collections"}
            known |= {"brotli", "zstandard"} | names
            assert {module.split(".")[0] for module in modules} <= known


def test_what_it_does_not_know_is_no_score(tiny_data):
    environ = {**TINY, **COMMON, "DATA_DIR": str(tiny_data)}
    cfg, _ = tg.Config.from_env(environ, False)
    data = random_artifact(cfg, next((tiny_data / "tokenizers").glob("*.model")))
    settings = dataclasses.asdict(dataclasses.replace(cfg, ttt_warm_start_a=True))
    with pytest.raises(NotImplementedError, match="ttt_warm_start_a"):
        Model(data, settings)
    assert number("True") is True and number("3") == 3 and number("1e-3") == 1e-3
    assert number("q:0.5") == "q:0.5" and math.isinf(number("inf"))
