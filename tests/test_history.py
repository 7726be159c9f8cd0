"""report.py --history, which `make report` calls: all runs, newest first, by configuration."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("rich")
pytest.importorskip("scipy")
sys.path.insert(0, str(ROOT / "tools"))
import report
from charts import smoothed
from comparison import spread_text
from run_documents import worst_documents
from test_report import figures_of, ours


def kept(folder: Path, name: str, **figures) -> str:
    """A log under the name that a run gives it, or that a kept log has."""
    (path,) = ours(folder / "made" / name, figures)
    log = folder / "logs" / f"{name}.txt"
    log.parent.mkdir(exist_ok=True)
    shutil.move(path, log)
    return str(log)


def after_make_run(folder: Path) -> list[str]:
    """Three kept seeds, and a run of today with the last of these seeds on changed code."""
    old = [
        kept(folder, f"2026-11-21_cpu-pydocs_seed{seed}", seed=seed, val_bpb=2.0 + seed / 10)
        for seed in range(3)
    ]
    stamp = "20261130-185912"
    new = kept(
        folder, f"{stamp}_cpu_seed2", seed=2, val_bpb=1.8, code_sha256="c1", run_id=f"{stamp}_cpu"
    )
    return [*old, new]


def page_data(page: Path) -> dict:
    """The data that a page shows."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_the_newest_run_comes_first_and_a_seed_may_be_there_twice(tmp_path, capsys) -> None:
    found = figures_of(capsys, "--history", *after_make_run(tmp_path))
    assert [run["val_bpb"] for run in found["runs"]] == [1.8, 2.0, 2.1, 2.2]
    assert [run["run"] for run in found["runs"]][0] == "cpu_seed2"


def test_each_code_has_its_own_mean_and_none_is_of_all(tmp_path, capsys) -> None:
    found = figures_of(capsys, "--history", *after_make_run(tmp_path))
    assert found["summary"]["bpb"]["mean"] == 1.8
    assert [group["bpb"]["mean"] for group in found["groups"].values()] == [1.8, pytest.approx(2.1)]
    assert list(found["groups"]) == ["cpu tiny code c1", "cpu tiny code c0"]
    assert [line.split(":")[0] for line in found["statements"]] == [
        "mean of cpu tiny code c1",
        "mean of cpu tiny code c0",
    ]


def test_a_knob_that_its_user_set_names_the_configuration(tmp_path, capsys) -> None:
    logs = [
        kept(tmp_path, f"2026-11-2{day}_a", config={"matrix_lr": f"0.0{day}"}) for day in (1, 2)
    ]
    for log in logs:
        path = Path(log)
        path.write_text(re.sub(r"(matrix_lr: \S+) \(default\)", r"\1 (env)", path.read_text()))
    found = figures_of(capsys, "--history", *logs)
    assert list(found["groups"]) == ["cpu tiny MATRIX_LR=0.02", "cpu tiny MATRIX_LR=0.01"]


def test_a_copy_of_a_log_is_one_run(tmp_path, capsys) -> None:
    log = kept(tmp_path, "20261130-185912_cpu_seed0")
    copy = shutil.copy(log, tmp_path / "logs" / "2026-11-30_cpu_seed0.txt")
    assert len(figures_of(capsys, "--history", log, str(copy))["runs"]) == 1


def test_an_unfinished_run_does_not_stop_the_report(tmp_path, capsys) -> None:
    logs = after_make_run(tmp_path)
    path = Path(logs[0])
    path.write_text(re.sub(r"(?m)^final .*\n", "", path.read_text()))
    found = figures_of(capsys, "--history", *logs)
    assert len(found["runs"]) == 3
    assert "left out" in found["warnings"][0]


def test_options_that_make_a_claim_do_not_go_with_a_history(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        report.parse(["--history", "a.txt", "--mixed"])
    assert "--history goes with" in capsys.readouterr().err


# === The page =====================================================================================
def test_the_page_begins_with_the_newest_score_and_leads_to_its_log(tmp_path) -> None:
    logs = after_make_run(tmp_path)
    page = tmp_path / "runs" / "report.html"
    page.parent.mkdir()
    assert report.main(["--history", *logs, "--html", str(page)]) == 0
    data = page_data(page)
    assert data["score"]["value"] == "1.80000"
    assert "lower is better" in data["score"]["words"]
    (runs,) = data["tables"]
    assert runs["head"][:5] == ["run", "val_bpb", "seed", "date", "config"]
    assert runs["rows"][0][:5] == [
        "cpu_seed2",
        "1.80000",
        "2",
        "2026-11-30 18:59",
        "cpu tiny code c1",
    ]
    assert (page.parent / runs["links"][0]).resolve() == Path(logs[-1]).resolve()


def test_the_page_of_many_runs_shows_few_at_first(tmp_path) -> None:
    logs = [kept(tmp_path, f"2026-11-{day}_a", code_sha256=f"c{day}") for day in range(10, 20)]
    page = tmp_path / "report.html"
    assert report.main(["--history", *logs, "--html", str(page)]) == 0
    data = page_data(page)
    assert (len(data["runs"]), data["shown"]) == (10, report.MOST_SHOWN)


def test_the_page_names_the_worst_documents(tmp_path) -> None:
    nats = np.array([10.0, 90.0, 20.0])
    size = np.array([100, 100, 100])
    bits = nats.sum() / np.log(2)
    log = kept(tmp_path, "run0", val_bpb=bits / size.sum(), val_bytes=300, val_tokens=120)
    (tmp_path / "runs" / "run0").mkdir(parents=True)
    np.savez(tmp_path / "runs" / "run0" / "documents.npz", doc_nats=nats, doc_bytes=size)
    page = tmp_path / "report.html"
    report.main([log, "--html", str(page)])
    worst = page_data(page)["tables"][1]
    assert worst["rows"][0] == ["2", "1.2984", "100", "75.00%"]
    assert [row[0] for row in worst["rows"]] == ["2", "3", "1"]
    assert worst_documents({}) == []


@pytest.mark.parametrize(
    ("mean", "deviation", "text"),
    [
        (2.1523, 0.1432, "2.15 ± 0.14"),
        (1.073363, 0.000848, "1.07336 ± 0.00085"),
        (2.08648, 0.06809, "2.086 ± 0.068"),
        (1.5, 0.0, "1.50000 ± 0"),
        (1.5, None, "1.50000"),
    ],
)
def test_a_mean_has_the_digits_that_its_deviation_allows(mean, deviation, text) -> None:
    assert spread_text({"mean": mean, "sd": deviation}) == text


def test_the_smallest_difference_that_can_be_seen_is_told(tmp_path, capsys) -> None:
    logs = ours(tmp_path, *({"val_bpb": 1.8 + i / 10} for i in range(4)))
    statements = figures_of(capsys, *logs)["statements"]
    assert statements[1].startswith("with 4 runs a side, differences above 0.29 bpb are detectable")


# === Noise, samples ===============================================================================
def test_a_smooth_line_leaves_a_straight_one_and_quiets_noise() -> None:
    steps = np.arange(0.0, 400.0, 4.0)
    straight = 6.0 - steps / 100
    assert np.allclose(smoothed(steps, straight), straight)
    noise = np.random.default_rng(0).normal(0, 0.2, len(steps))
    line = np.array(smoothed(steps, straight + noise))
    assert np.abs(line - straight).mean() < 0.5 * np.abs(noise).mean()
    assert smoothed([1, 2], [3.0, 4.0]) == []


def test_the_page_draws_a_noisy_loss_smooth_and_leaves_out_what_is_nan(tmp_path) -> None:
    path = Path(kept(tmp_path, "run0"))
    steps = [
        f"step:{i}/70 train_loss:{9 - i / 20 + i % 2:.4f} train_time:{i}ms" for i in range(2, 19)
    ]
    lines = "\n".join([*steps, "step:19/70 train_loss:nan train_time:19ms"])
    path.write_text(path.read_text().replace("step:1/70", f"{lines}\nstep:1/70", 1))
    path.write_text(re.sub(r"(?m)^step:1/70.*\n", "", path.read_text()))
    page = tmp_path / "report.html"
    report.main([str(path), "--html", str(page)])
    curve = page_data(page)["runs"][0]["curves"]["train_loss"]
    assert len(curve["smooth"]) == len(curve["y"]) >= 17
    jumps = [float(np.abs(np.diff(curve[key][2:12])).mean()) for key in ("y", "smooth")]
    assert jumps[1] < 0.3 * jumps[0]


def test_the_page_shows_what_the_artifact_writes(tmp_path, capsys) -> None:
    log = kept(tmp_path, "run0")
    folder = tmp_path / "runs" / "run0"
    folder.mkdir(parents=True)
    texts = {"prompt": "Return", "greedy": " the", "sampled": " a", "document": " nothing"}
    (folder / "samples.json").write_text(json.dumps([{"number": 7, **texts}]))
    page = tmp_path / "report.html"
    assert report.main([log, "--html", str(page)]) == 0
    assert page_data(page)["tables"][1]["rows"] == [["Return", " the", " a", " nothing"]]
    (folder / "samples.json").write_text("[1]")
    assert report.main([log, "--html", str(page)]) == 2
    assert "samples.json: its content[0] must be an object" in capsys.readouterr().err
