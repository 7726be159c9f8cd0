"""What the artifact writes at the end of a run, and the curves that go to Weights & Biases."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm_process
from conftest import ROOT, TINY, final_line, tiny_config

import train_gpt as tg

sys.path.insert(0, str(ROOT / "tools"))
import samples


@pytest.fixture(scope="module")
def model() -> tg.GPT:
    """The tiny network with a head that has opinions."""
    torch.manual_seed(1)
    model = tg.GPT(tiny_config(), "sdpa")
    with torch.no_grad():
        model.tok_emb.normal_(std=0.5)
    return model


PROMPTS = np.random.default_rng(0).integers(4, 320, (3, 10))


def written(model: tg.GPT, prompts: np.ndarray = PROMPTS, count: int = 6) -> np.ndarray:
    """The continuations of the prompts."""
    plan = model.cfg.plans[1]
    return samples.continue_prompts(model, plan, prompts, count, torch.device("cpu"))


def next_token(model: tg.GPT, ids: np.ndarray) -> int:
    """The token with the least nats after a text: a segment for every candidate."""
    candidates = np.arange(model.cfg.vocab_size)
    inputs = np.tile(ids, len(candidates))
    targets = np.full((len(candidates), len(ids)), -1)
    targets[:, -1] = candidates
    starts = np.arange(0, len(inputs), len(ids))
    shape = tg.RowShape(len(inputs), len(starts), len(ids))
    row = tg.pack_row(inputs, targets.ravel(), starts, shape, torch.device("cpu"))
    nats = model(row, model.cfg.plans[1]).detach().view(targets.shape)
    return int(nats[:, -1].argmin())


def test_greedy_text_is_the_token_of_least_nats_at_each_place(model):
    greedy = written(model)[0, 1]
    text = PROMPTS[1]
    for token in greedy[:2]:
        assert token == next_token(model, text)
        text = np.append(text, token)


def test_continuation_does_not_depend_on_the_other_prompts_or_on_the_length(model):
    whole = written(model)
    alone = written(model, PROMPTS[:1], 3)
    assert np.array_equal(alone[0, 0], whole[0, 0, :3])


def test_sample_depends_on_the_seed_alone(model):
    first = written(model)
    torch.rand(5)
    assert np.array_equal(written(model), first)
    assert not np.array_equal(first[0], first[1])


def test_prompts_are_spread_over_documents_that_go_on():
    counts = np.array([10, 30, 24, 40, 50, 25, 60, 99])
    docs = SimpleNamespace(counts=counts)
    assert samples.choose_prompts(docs).tolist() == [1, 4, 6]
    assert samples.choose_prompts(SimpleNamespace(counts=np.array([5, 30]))).tolist() == [1]
    assert samples.choose_prompts(SimpleNamespace(counts=np.array([5]))).tolist() == []


def test_text_of_caseops_is_readable_and_ends_with_its_document():
    pieces = {3: "\ue001the ", 4: "\ue002nasa ", 5: "mc\ue003donald", 6: "\ue004"}
    model = SimpleNamespace(decode=lambda ids: "".join(pieces[i] for i in ids))
    tokenizer = SimpleNamespace(bos_id=1, model=model)
    assert samples.readable_text(tokenizer, np.array([3, 4, 5, 6, 1, 3])) == "The NASA mcDonald"
    pieces |= {7: "\ue001 the", 8: "\ue002 nasa", 9: " mc\ue003donald", 10: "\ue001 4"}
    ids = np.array([7, 8, 9, 10])  # operators before the space, the last one of no word
    assert samples.readable_text(tokenizer, ids) == " The NASA mcDonald 4"


# --- In a run ---
FAKE_WANDB = '''
"""Stands in for the package: it notes what it is told, offline, in a file."""
import json, os

class Error(Exception):
    """What the package raises."""

class Offline:
    """A run."""
    def note(self, *call):
        with open("wandb.jsonl", "a") as file:
            file.write(json.dumps(call) + "\\n")
    def log(self, values, step):
        self.note("log", step, values)
    def finish(self):
        self.note("finish")

def init(**options):
    if os.environ.get("WANDB_MODE") != "offline":
        raise Error("no network\\nmore")
    Offline().note("init", options)
    return Offline()
'''


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory) -> SimpleNamespace:
    """A run with samples, and with W&B offline."""
    cwd = tmp_path_factory.mktemp("samples")
    (cwd / "wandb.py").write_text(FAKE_WANDB)
    script = str(ROOT / "train_gpt.py")
    (cwd / "run.py").write_text(
        f"import runpy, sys\nsys.argv = [{script!r}]\n"
        f"runpy.run_path({script!r}, run_name='__main__')\n"
    )
    env = {**TINY, "DATA_DIR": str(tiny_data), "RUN_ID": "a.b c", "ITERATIONS": "3"}
    env |= {"TTT_ENABLED": "0", "WANDB_PROJECT": "golf"}
    env |= {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    # The folder of the script, with the stand-in, is the first in which modules are looked for.
    result = warm_process.run([str(cwd / "run.py")], env, cwd, 120)
    assert result.returncode == 0, result.stderr
    calls = [json.loads(line) for line in (cwd / "wandb.jsonl").read_text().splitlines()]
    return SimpleNamespace(cwd=cwd, result=result, calls=calls, data_dir=str(tiny_data))


@pytest.fixture(scope="module")
def printed(run) -> str:
    """What the tool prints of that run, which is the newest."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(run.cwd)
        patch.setenv("DATA_DIR", run.data_dir)
        patch.setenv("CHECKPOINT_EVERY", "60")  # as it was exported for the run
        assert samples.main(["--tokens", "12"]) == 0
    return out.getvalue()


def test_artifact_continues_three_prompts(printed):
    block = printed.splitlines()[1:10]
    names = [re.fullmatch(r'  (\w+) +(".*")', line).groups() for line in block]
    assert [name for name, _ in names] == ["prompt", "greedy", "sampled"] * 3
    assert all(isinstance(json.loads(text), str) for _, text in names)
    assert json.loads(names[0][1])


def test_samples_are_kept_with_the_text_of_the_document(run, printed):
    kept = json.loads((run.cwd / "runs/a.b c/samples.json").read_text(encoding="utf-8"))
    assert len(kept) == 3
    assert {*kept[0]} == {"number", "prompt", "greedy", "sampled", "document"}


def test_samples_leave_log_and_scores_of_the_run_as_they_are(run, printed):
    assert sorted(path.name for path in (run.cwd / "logs").glob("*")) == ["a.b c.txt"]
    assert final_line((run.cwd / "logs/a.b c.txt").read_text())["steps"] == 3


def test_without_an_artifact_there_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert samples.main([]) == 2
    told = f"{tmp_path / 'runs'}: holds no run with an artifact; make run makes one"
    assert capsys.readouterr().err == f"samples.py: {told}\n"


def test_wandb_gets_the_project_the_run_and_its_settings(run):
    name, options = run.calls[0]
    assert name == "init"
    assert (options["project"], options["name"], options["id"]) == ("golf", "a.b c", "a.b-c")
    assert options["config"]["iterations"] == 3


def test_wandb_gets_the_curves_and_the_scores_and_is_finished(run):
    points = [(step, values) for kind, step, values in run.calls[1:-1]]
    assert [step for step, values in points if "train_loss" in values] == [1, 2, 3]
    final = final_line(run.result.stdout)
    assert points[-1] == (3, {"val_bpb/quantized": final["val_bpb"]})
    assert run.calls[-1] == ["finish"]


def test_wandb_that_cannot_begin_says_why_in_one_line(monkeypatch, tmp_path):
    module = types.ModuleType("wandb")
    exec(FAKE_WANDB, module.__dict__)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    log = tg.Log(tmp_path / "log.txt", is_main=True)
    reason = log.open_wandb("golf", "a", {})
    assert reason == "WANDB_PROJECT=golf: no network; WANDB_MODE=offline needs no network"
    assert log.open_wandb("", "a", {}) == ""


def test_wandb_is_off_by_default_and_refused_if_it_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert tg.Config().wandb_project == ""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(tg.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(tg.UsageError, match="WANDB_PROJECT=x: must be empty, or wandb must be"):
        tg.check_paths(tiny_config(wandb_project="x", compressor="ans"))
    assert Path("logs").exists() is False
