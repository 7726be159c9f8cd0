"""tools/report.py: published numbers out of published lines, nothing mixed, a page that works."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT

pytest.importorskip("rich")
scipy = pytest.importorskip("scipy")
from scipy import special, stats

sys.path.insert(0, str(ROOT / "tools"))
import canonical
import claims
import report
from charts import training_curves
from run_documents import loss_by_length, loss_by_position, read_documents
from run_statistics import runs_needed
from runlog import read_final, read_run

import train_gpt as tg

# === Published lines ==============================================================================
# The figures of three public pull requests and of one that became no record.


class Printed(NamedTuple):
    """A score as a log prints it."""

    loss: float
    bpb: float
    ms: int


class Excerpt(NamedTuple):
    """The figures of one published log."""

    steps: int
    train_ms: int
    code_bytes: int
    total_bytes: int
    before: Printed
    quantised: Printed
    sliding: Printed | None
    adapted: Printed


PR1530 = {
    0: Excerpt(
        4867,
        587193,
        121884,
        15996664,
        Printed(2.76877360, 1.07184400, 5993),
        Printed(2.79823422, 1.08324876, 45933),
        None,
        Printed(2.77059090, 1.07258208, 338190),
    ),
    1: Excerpt(
        4845,
        587061,
        116636,
        15993874,
        Printed(2.77007744, 1.07234874, 5948),
        Printed(2.80052355, 1.08413500, 9328),
        None,
        Printed(2.77230836, 1.07324696, 343324),
    ),
    2: Excerpt(
        4847,
        587072,
        116694,
        15984798,
        Printed(2.77237193, 1.07323698, 5942),
        Printed(2.80266675, 1.08496467, 9308),
        None,
        Printed(2.77493185, 1.07426259, 312976),
    ),
}
PR1413 = {
    0: Excerpt(
        5082,
        588035,
        16719,
        15991018,
        Printed(2.81173824, 1.08851149, 5580),
        Printed(2.84312340, 1.10066167, 7815),
        Printed(2.80001078, 1.08397143, 83620),
        Printed(2.79517119, 1.08209788, 293430),
    ),
    42: Excerpt(
        5082,
        588015,
        16719,
        15992546,
        Printed(2.81434292, 1.08951985, 5547),
        Printed(2.84465307, 1.10125385, 7770),
        Printed(2.80189582, 1.08470119, 83569),
        Printed(2.79788378, 1.08314800, 289945),
    ),
    1234: Excerpt(
        5083,
        588071,
        16719,
        15989058,
        Printed(2.81437859, 1.08953366, 5625),
        Printed(2.84853108, 1.10275515, 7798),
        Printed(2.80498685, 1.08589782, 83540),
        Printed(2.79785185, 1.08313564, 295337),
    ),
}
PR549 = {
    1337: Excerpt(
        7179,
        600128,
        89458,
        15977386,
        Printed(1.9196, 1.1369, 1971),
        Printed(1.93358885, 1.14518023, 6562),
        Printed(1.89385556, 1.12165091, 74066),
        Printed(1.88976776, 1.11922988, 410268),
    ),
    42: Excerpt(
        7182,
        600128,
        89458,
        15876510,
        Printed(1.9208, 1.1376, 1977),
        Printed(1.93502821, 1.14603270, 20430),
        Printed(1.89556781, 1.12266500, 97749),
        Printed(1.89110239, 1.12002032, 408049),
    ),
    2025: Excerpt(
        7193,
        600110,
        89458,
        15990006,
        Printed(1.9187, 1.1363, 1978),
        Printed(1.93273877, 1.14467677, 6601),
        Printed(1.89307789, 1.12119033, 73676),
        Printed(1.88919190, 1.11888882, 407984),
    ),
}
PR473 = {
    1337: Excerpt(
        7273,
        600100,
        89436,
        15979188,
        Printed(1.9213, 1.1379, 1957),
        Printed(1.93485051, 1.14592745, 6545),
        Printed(1.89503755, 1.12235095, 73639),
        Printed(1.89181098, 1.12043999, 413276),
    ),
    42: Excerpt(
        7278,
        600121,
        89436,
        15987108,
        Printed(1.9228, 1.1388, 1957),
        Printed(1.93669213, 1.14701817, 6582),
        Printed(1.89724128, 1.12365613, 73565),
        Printed(1.89385339, 1.12164962, 406564),
    ),
    2025: Excerpt(
        7270,
        600058,
        89436,
        15988312,
        Printed(1.9240, 1.1395, 1956),
        Printed(1.93741970, 1.14744908, 6572),
        Printed(1.89783990, 1.12401066, 73453),
        Printed(1.89458859, 1.12208505, 405225),
    ),
}


def score_line(label: str, score: Printed, decimals: int = 8) -> str:
    """A score as all public scripts print it."""
    figures = f"val_loss:{score.loss:.{decimals}f} val_bpb:{score.bpb:.{decimals}f}"
    return f"{label} {figures} eval_time:{score.ms}ms"


def later_log(seed: int, log: Excerpt) -> str:
    """The lines that PR #1530 and PR #1413 print."""
    diagnostic = "" if log.sliding else "diagnostic "
    lines = [
        "Hyperparameters:",
        "  datasets_dir: ./data/datasets/fineweb10B_sp8192",
        "  ema_decay: 0.997",
        f"  logfile: logs/{seed}.txt",
        f"  seed: {seed}",
        "  train_batch_tokens: 786432",
        "=" * 100,
        "val_tokens: 40540160",
        "0/20000 val_loss: 9.0086 val_bpb: 3.4874",
        "500/20000 train_loss: 3.2527 train_time: 0.8m tok/s: 8241348",
        "1000/20000 train_loss: 3.0057 train_time: 1.6m tok/s: 8211974",
        f"{log.steps}/20000 val_loss: 2.7700 val_bpb: 1.0723",
        f"stopping_early: wallclock_cap train_time: {log.train_ms}ms step: {log.steps}/20000",
        score_line(f"{diagnostic}pre-quantization post-ema", log.before),
        f"Code size (uncompressed): {log.code_bytes} bytes",
        "GPTQ:collected 67 Hessians in 12.6s",
        f"Total submission size quantized+brotli: {log.total_bytes} bytes",
        score_line(f"{diagnostic}quantized", log.quantised),
    ]
    adapted = "quantized_ttt_lora"
    if log.sliding:
        adapted = "legal_ttt_exact"
        lines.append(score_line("quantized_sliding_window", log.sliding))
    lines += [
        "ttt_progress: batch 778/782 batch_loss:2.7837 batch_bpb:1.1136 "
        "running_loss:2.7 running_bpb:1.1",
        score_line(adapted, log.adapted),
    ]
    return "\n".join(lines) + "\n"


def earlier_log(seed: int, log: Excerpt) -> str:
    """The lines that PR #549 and PR #473 print: no block of settings, rounded scores, echoes."""
    steps = f"{log.steps}/9000"
    lines = [
        "train_loader:dataset:fineweb10B_sp1024 train_shards:80",
        "val_loader:shards pattern=/data/fineweb_val_*.bin tokens:62021632",
        "train_batch_tokens:786432 train_seq_len:2048 iterations:9000",
        f"seed:{seed}",
        "warmup_step:1/20",
        "step:0/9000 val_loss:6.9293 val_bpb:4.1039 train_time:0ms step_avg:0.01ms",
        "step:500/9000 train_loss:2.3966 train_time:41425ms step_avg:82.85ms",
        "step:1000/9000 train_loss:2.2607 train_time:82976ms step_avg:82.98ms",
        f"step:{steps} val_loss:1.9225 val_bpb:1.1386 train_time:{log.train_ms}ms step_avg:83.56ms",
        f"stopping_early: wallclock_cap train_time:{log.train_ms}ms step:{steps}",
        score_line("DIAGNOSTIC post_ema", log.before, decimals=4),
        f"Code size: {log.code_bytes} bytes",
        f"Total submission size int6+lzma: {log.total_bytes} bytes",
        *rounded_and_exact("final_int6_roundtrip", log.quantised),
        *rounded_and_exact("final_int6_sliding_window", log.sliding),
        exact_line("final_int8_zlib_roundtrip", log.sliding),
        "  ttt_chunk [1/1893] bpb=1.120040 time=3.8s",
        "ttt_sliding:done val_loss=1.8 val_bpb=1.1 elapsed=407.5s",
        *rounded_and_exact("legal_ttt", log.adapted),
    ]
    return "\n".join(lines) + "\n"


def exact_line(label: str, score: Printed) -> str:
    """A score with all its digits, without its time."""
    return f"{label}_exact val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}"


def rounded_and_exact(label: str, score: Printed) -> list[str]:
    """The two lines of a score in the earlier logs."""
    return [score_line(label, score, decimals=4), exact_line(label, score)]


def published(folder: Path, name: str) -> list[str]:
    """Paths of the excerpts of a pull request's logs, written under `folder`."""
    excerpts = {"PR1530": PR1530, "PR1413": PR1413, "PR549": PR549, "PR473": PR473}[name]
    write = later_log if name in ("PR1530", "PR1413") else earlier_log
    paths = []
    for seed, excerpt in excerpts.items():
        path = folder / f"{name}_{seed}.log"
        path.write_text(write(seed, excerpt), encoding="utf-8")
        paths.append(str(path))
    return paths


# === Our own logs =================================================================================
FIGURES = {
    "code_sha256": "c0",
    "dataset": "tiny",
    "val_sha256": "v",
    "tokenizer_sha256": "t",
    "preset": "cpu",
    "device": "CPU",
    "torch": "2",
    "world_size": 1,
    "val_tokens": 1000,
    "val_bytes": 2500,
    "steps": 70,
    "artifact_bytes": 1000,
    "train_tokens": 7000,
    "artifact_sha256": "a",
    "seconds": {
        "train": 50.0,
        "pack": 1.0,
        "score quantized": 2.0,
        "score quantized_ttt_lora": 3.0,
    },
}


def table_of(seconds: dict[str, float]) -> str:
    """The phase table of some phases, as a run prints it."""
    rows = [
        (name, spent, "eval" if "score" in name else "train") for name, spent in seconds.items()
    ]
    lines = [f"{'phase':<34}{'seconds':>9}  counts against"]
    lines += [f"{name:<34}{spent:>9.1f}  {budget}" for name, spent, budget in rows]
    for budget, limit in (("train", 60), ("eval", 600)):
        spent = sum(row[1] for row in rows if row[2] == budget)
        lines.append(f"{'all of ' + budget:<34}{spent:>9.1f}  of {limit}")
    return "\n".join(lines)


def nats(bpb: float, tokens: int = 1000, size: int = 2500) -> float:
    """The loss in nats per token that makes so many bits per byte."""
    return bpb * math.log(2) * size / tokens


def step_line(step: int) -> str:
    """What our script prints at a step."""
    figures = f"train_loss:{9 - step / 20:.4f} train_time:{700 * step}ms"
    return f"step:{step}/70 {figures} step_avg:700.00ms tok/s:9 lr_scale:{1 - step / 100:.3f}"


def ours(folder: Path, *runs: dict, name: str = "run") -> list[str]:
    """One log per dict of changed figures; `config` in it changes knobs. Paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, run in enumerate(runs):
        knobs = {"matrix_lr": "0.03", "run_id": f"{name}{i}", **run.get("config", {})}
        figures = {
            **FIGURES,
            "seed": i,
            "val_bpb": 1.9,
            "artifact_sha256": f"{name}{i}",
            "run_id": f"{name}{i}",
        }
        figures |= {key: value for key, value in run.items() if key != "config"}
        final = figures["val_bpb"]
        for key, bpb in (
            ("pre_quantization", 2.0),
            ("quantized", 2.1),
            ("quantized_ttt_lora", final),
        ):
            figures |= {f"{key}_bpb": bpb, f"{key}_loss": figures.get(f"{key}_loss", nats(bpb))}
        figures["val_loss"] = figures["quantized_ttt_lora_loss"]

        def line(label: str, key: str, figures: dict = figures) -> str:
            score = Printed(figures[f"{key}_loss"], figures[f"{key}_bpb"], 2000)
            return score_line(label, score)

        text = [
            "import math  # the source stands here",
            "Hyperparameters:",
            *(f"  {knob}: {value} (default)" for knob, value in knobs.items()),
            f"code_sha256: {figures['code_sha256']}",
            *map(step_line, (1, 20, 40)),
            "40/70 val_loss: 4.0000 val_bpb: 2.3083",
            step_line(60),
            "stopping: step:70/70 train_time:49000ms; ema:applying",
            line("diagnostic pre-quantization post-ema", "pre_quantization"),
            line("diagnostic quantized", "quantized"),
            line("quantized_ttt_lora", "quantized_ttt_lora"),
            table_of(figures["seconds"]),
            "final " + json.dumps(figures, sort_keys=True),
        ]
        paths.append(folder / f"{name}{i}.txt")
        paths[-1].write_text("\n".join(text) + "\n", encoding="utf-8")
    return [str(path) for path in paths]


def figures_of(capsys: pytest.CaptureFixture, *argv: str, status: int = 0) -> dict:
    """The tool's --json."""
    assert report.main([*argv, "--json", "-"]) == status, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The one line with which the tool refuses."""
    capsys.readouterr()
    assert report.main(list(argv)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    return error


# === Published results ============================================================================
@pytest.mark.parametrize(
    ("name", "mean", "sd", "nats_mean"),
    [
        ("PR1530", 1.07336, 0.00085, 2.77261),
        ("PR1413", 1.08279, 0.00060, 2.79697),
        ("PR549", 1.11938, 0.00058, None),
        ("PR473", 1.12139, 0.00085, None),
    ],
)
def test_published_means_and_deviations_come_out(
    tmp_path, capsys, name, mean, sd, nats_mean
) -> None:
    found = figures_of(capsys, *published(tmp_path, name), *["--mixed"] * (name == "PR1530"))
    assert round(found["summary"]["bpb"]["mean"], 5) == mean
    assert round(found["summary"]["bpb"]["sd"], 5) == sd
    assert nats_mean is None or round(found["summary"]["nats"]["mean"], 5) == nats_mean
    assert found["problems"] == []


def test_seeds_that_ran_different_code_are_named_though_they_were_published_as_one_claim(
    tmp_path, capsys
) -> None:
    error = refusal(capsys, *published(tmp_path, "PR1530"))
    assert "code_size: 121884, 116636, 116694" in error
    assert "--mixed" in error


def test_a_published_row_has_steps_phases_and_gain_over_the_best_plain_score(
    tmp_path, capsys
) -> None:
    row = figures_of(capsys, *published(tmp_path, "PR549"))["runs"][1]
    assert (row["seed"], row["steps"], row["artifact_bytes"]) == (42, 7182, 15876510)
    assert row["ms_per_step"] == pytest.approx(83.56, abs=0.01)
    assert [(s["kind"], s["bpb"]) for s in row["stages"]] == [
        ("before", 1.1376),
        ("after", 1.14603270),
        ("sliding", 1.12266500),
        ("adapted", 1.12002032),
    ]
    assert row["gain"] == pytest.approx(1.12266500 - 1.12002032)
    assert [p[1:] for p in row["phases"]] == [
        [600.128, "train"],
        [1.977, "none"],
        [20.43, "eval"],
        [97.749, "eval"],
        [408.049, "eval"],
    ]
    assert row["over"] == ["train 600.1 s of 600"]


def test_seconds_come_from_mean_speed_where_a_log_rounds_minutes(tmp_path) -> None:
    run = read_run(Path(published(tmp_path, "PR1530")[0]))
    assert training_curves(run)["train_loss"].seconds[0] == pytest.approx(500 * 786432 / 8241348)
    speed = 500 * 786432 / (1000 * 786432 / 8211974 - 500 * 786432 / 8241348)
    assert training_curves(run)["speed"].y[0] == pytest.approx(speed)


def test_a_run_started_anew_in_its_log_leaves_no_points_of_the_one_before(tmp_path) -> None:
    path = Path(ours(tmp_path, {})[0])
    before = "\n".join(step_line(s) for s in (1, 2, 3, 20, 50)) + "\n"
    path.write_text(path.read_text().replace("step:1/70", before + "step:1/70", 1))
    assert training_curves(read_run(path))["train_loss"].step == [1, 20, 40, 60]
    path.write_text(
        path.read_text().replace(
            "step:60/70", step_line(50) + "\n" + step_line(65) + "\nstep:60/70", 1
        )
    )
    points = {p["step"]: p for p in read_run(path).points}
    assert list(points) == [1, 20, 40, 50, 60] and points[40]["val_bpb"] == 2.3083


def test_the_last_score_counts_even_where_an_earlier_one_is_lower(tmp_path, capsys) -> None:
    path = Path(published(tmp_path, "PR1413")[0])
    retry = "quantized_ttt_again val_loss:3.45114263 val_bpb:1.33604667 eval_time:293430ms\n"
    path.write_text(path.read_text() + retry)
    found = figures_of(capsys, str(path))
    assert found["runs"][0]["gain"] == pytest.approx(1.08397143 - 1.33604667)
    assert found["runs"][0]["val_bpb"] == 1.33604667
    assert any("legal_ttt" in line and "1.08210" in line for line in found["warnings"])


def committed_logs() -> list[str]:
    """The logs of the seeds that README reports."""
    command = ["git", "ls-files", "logs/*.txt"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(str(ROOT / name) for name in listed.stdout.split() if "/compare/" not in name)


def test_the_committed_claim_is_that_of_the_committed_logs(tmp_path) -> None:
    claim = json.loads((ROOT / "submission.json").read_text())
    audits = sorted(map(str, (ROOT / "logs/verdicts").glob("*.json")))
    options = ["--name", claim["name"], "--date", claim["date"], "--audit", *audits]
    path = tmp_path / "claim.json"
    assert len(audits) == len(committed_logs())
    assert report.main([*committed_logs(), "--submission", str(path), *options]) == 0
    assert json.loads(path.read_text()) == claim


def test_the_committed_logs_are_read_whole(capsys) -> None:
    logs = committed_logs()
    found = figures_of(capsys, *logs)
    finals = [read_final(Path(path).read_text()) for path in logs]
    assert found["summary"]["bpb"]["mean"] == pytest.approx(
        np.mean([f["val_bpb"] for f in finals]), abs=1e-12
    )
    for row, final in zip(found["runs"], finals, strict=True):
        assert {name: seconds for name, seconds, _ in row["phases"]} == final["seconds"]
        assert (row["seed"], row["steps"], row["problems"]) == (final["seed"], final["steps"], [])
        assert [s["kind"] for s in row["stages"]] == ["before", "after", "adapted"]


# === Statistics ===================================================================================
def test_p_values_are_those_of_scipy_and_of_the_textbook(tmp_path, capsys) -> None:
    found = figures_of(
        capsys,
        *published(tmp_path, "PR1530"),
        "--mixed",
        "--baseline",
        *published(tmp_path, "PR1413"),
    )
    new_scores = [log.adapted for log in PR1530.values()]
    old_scores = [log.adapted for log in PR1413.values()]
    bpb_per_nat = np.mean([score.bpb / score.loss for score in new_scores])
    for unit, name, bar in (("nats", "loss", 0.005), ("bpb", "bpb", 0.005 * bpb_per_nat)):
        new = [getattr(score, name) for score in new_scores]
        old = [getattr(score, name) for score in old_scores]
        measured = found["comparison"][unit]["welch"]
        theirs = stats.ttest_ind(new, old, equal_var=False)
        assert measured["t"] == pytest.approx(theirs.statistic, rel=1e-12)
        assert measured["p_two_sided"] == pytest.approx(theirs.pvalue, rel=1e-12)

        new_part = np.var(new, ddof=1) / 3
        old_part = np.var(old, ddof=1) / 3
        error = (new_part + old_part) ** 0.5
        df = error**4 / (new_part**2 / 2 + old_part**2 / 2)
        gain = np.mean(old) - np.mean(new)
        half_width = special.stdtrit(df, 0.975) * error
        assert measured["df"] == pytest.approx(df)
        assert measured["p_better"] == pytest.approx(special.stdtr(df, -gain / error))
        assert measured["p_record"] == pytest.approx(special.stdtr(df, -(gain - bar) / error))
        assert measured["ci95"] == pytest.approx([gain - half_width, gain + half_width])
        assert found["comparison"][unit]["difference"] == pytest.approx(gain)
    assert any(line.startswith("record bar") and "passed" in line for line in found["statements"])


def test_two_tokenizers_are_compared_in_bits_per_byte_alone(tmp_path, capsys) -> None:
    found = figures_of(
        capsys, *published(tmp_path, "PR1413"), "--baseline", *published(tmp_path, "PR549")
    )
    assert found["comparison"]["nats"] is None
    assert found["comparison"]["bpb"]["difference"] == pytest.approx(1.11938 - 1.08279, abs=1e-5)
    assert found["comparison"]["bpb"]["bar"] == pytest.approx(
        0.00296, abs=1e-5
    )  # sp1024's, the stricter
    assert any("another tokenizer" in line for line in found["statements"])


def test_scores_of_different_texts_pass_no_bar(tmp_path, capsys) -> None:
    def side(name: str, tokens: int, size: int, bpb: float, **facts: object) -> list[str]:
        def figures(at: float) -> dict:
            scores = {"pre_quantization": 2.0, "quantized": 2.1, "quantized_ttt_lora": at}
            losses = {f"{key}_loss": nats(value, tokens, size) for key, value in scores.items()}
            return {
                "val_bpb": at,
                "val_tokens": tokens,
                "val_bytes": size,
                "dataset": name,
                **losses,
                **facts,
            }

        return ours(tmp_path / name, *(figures(bpb + i / 1e4) for i in range(3)), name=name)

    mine = side("mine", 1000, 2500, 1.8)
    error = refusal(capsys, *mine, "--baseline", *side("other", 1000, 2600, 1.9, val_sha256="w"))
    assert (
        "different validation texts" in error
        and "mine of 2,500 bytes" in error
        and "other of 2,600" in error
    )
    # Another tokenizer, the same text.
    again = side("again", 900, 2501, 1.9, val_sha256="w", tokenizer_sha256="u")
    assert figures_of(capsys, *mine, "--baseline", *again)["comparison"]["nats"] is None

    def fineweb(name: str, tokens: int) -> list[str]:
        facts = {"val_sha256": name, "tokenizer_sha256": name}
        return side(f"fineweb10B_{name}", tokens, canonical.TEXT_BYTES, 1.1, **facts)

    small = fineweb("sp1024", 62_021_846)
    large = fineweb("sp8192", canonical.SP8192_TOKENS)
    assert figures_of(capsys, *large, "--baseline", *small)["comparison"]["bpb"]["welch"]
    assert "different validation texts" in refusal(
        capsys, *mine, "--baseline", *published(tmp_path, "PR549")
    )


def test_a_difference_below_the_bar_is_no_record_and_the_runs_it_takes_are_told(
    tmp_path, capsys
) -> None:
    def scores(at: float) -> list[dict]:
        return [{"seed": i, "val_bpb": at + d} for i, d in enumerate((-0.0007, 0.0, 0.0007))]

    sides = ours(tmp_path, *scores(1.8)), ours(tmp_path, *scores(1.8016), name="base")
    found = figures_of(capsys, *sides[0], "--baseline", *sides[1])
    w = found["comparison"]["nats"]["welch"]
    assert w["p_record"] > 0.5 > 0.25 > w["p_better"] > 0.01
    assert w["runs_for_record"] is None
    assert 3 < w["runs_for_better"] < 12
    assert any(
        "passed at 0.25" in line and f"{w['runs_for_better'] - 3} more" in line
        for line in found["statements"]
    )


def test_the_runs_needed_have_the_power_they_promise() -> None:
    # About 34 by the normal approximation.
    assert 34 <= runs_needed(0.0005, 0.00065, 0.00065) <= 36
    n = runs_needed(1.5, 1.0, 1.0)
    rng = np.random.default_rng(0)

    def power(n: int) -> float:
        new = rng.normal(0, 1, (20000, n))
        old = rng.normal(1.5, 1, (20000, n))
        test = stats.ttest_ind(new, old, axis=1, equal_var=False, alternative="less")
        return (test.pvalue < 0.01).mean()

    assert power(n - 1) - 0.02 < 0.8 < power(n) + 0.02
    assert runs_needed(-0.1, 1.0, 1.0) is None


def test_three_runs_resolve_what_the_t_table_says(tmp_path, capsys) -> None:
    bpb = figures_of(capsys, *published(tmp_path, "PR1413"))["summary"]["bpb"]
    assert bpb["resolves"] == pytest.approx(3.7469 * bpb["sd"] * (2 / 3) ** 0.5, rel=1e-4)


def test_runs_of_one_artifact_are_compared_pair_by_pair(tmp_path, capsys) -> None:
    new = [1.80, 1.85, 1.91]
    old = [1.8102, 1.8601, 1.9199]
    sides = [
        ours(
            tmp_path / name,
            *({"seed": i, "val_bpb": v, "artifact_sha256": f"s{i}"} for i, v in enumerate(side)),
        )
        for name, side in (("new", new), ("old", old))
    ]
    found = figures_of(capsys, *sides[0], "--baseline", *sides[1])["comparison"]
    theirs = stats.ttest_rel(old, new)
    assert found["pair_by"] == "artifact"
    assert found["bpb"]["paired"]["t"] == pytest.approx(theirs.statistic, rel=1e-9)
    assert found["bpb"]["paired"]["p_two_sided"] == pytest.approx(theirs.pvalue, rel=1e-9)
    assert found["bpb"]["paired"]["p_better"] < 0.001 < 0.1 < found["bpb"]["welch"]["p_better"]


def test_seeds_pair_where_artifacts_do_not(tmp_path, capsys) -> None:
    new = ours(tmp_path, *({"seed": s, "val_bpb": 1.8 + s / 1000} for s in (1, 2, 3)))
    old = ours(
        tmp_path, *({"seed": s, "val_bpb": 1.81 + s * s / 1000} for s in (2, 3, 4)), name="base"
    )
    found = figures_of(capsys, *new, "--baseline", *old)["comparison"]
    assert found["pair_by"] == "seed"
    assert found["bpb"]["paired"]["pairs"] == 2
    assert found["bpb"]["paired"]["mean"] == pytest.approx((1.814 - 1.802 + 1.819 - 1.803) / 2)


def save_documents(
    root: Path, run: str, seed: int, shift: float, count: int = 400
) -> tuple[np.ndarray, np.ndarray]:
    """Writes documents.npz, whose losses lie `shift` nats a token higher. Nats and bytes."""
    rng = np.random.default_rng(0)
    tokens = np.exp(rng.normal(5, 1, count)).astype(int) + 8
    spread = np.random.default_rng(seed).normal(0, 0.02, count)
    nats_of = tokens * (3.0 + rng.normal(0, 0.3, count) + spread + shift)
    folder = root / "runs" / run
    folder.mkdir(parents=True, exist_ok=True)
    edges = 2 ** np.arange(8)
    np.savez(
        folder / "documents.npz",
        doc_nats=nats_of,
        doc_bytes=3 * tokens,
        doc_tokens=tokens,
        pos_nats=edges * (6.0 - 0.3 * np.arange(8) + shift),
        pos_tokens=edges,
        pos_edges=edges,
    )
    return nats_of, 3 * tokens


def bpb_of(nats: np.ndarray, size: np.ndarray) -> float:
    return nats.sum() / math.log(2) / size.sum()


def test_documents_of_a_pair_are_compared_one_by_one(tmp_path, capsys) -> None:
    a, size = save_documents(tmp_path, "new0", 1, 0.0)
    b, _ = save_documents(tmp_path, "old0", 2, 0.004)
    new = ours(tmp_path / "logs", {"artifact_sha256": "s", "val_bpb": bpb_of(a, size)}, name="new")
    old = ours(tmp_path / "logs", {"artifact_sha256": "s", "val_bpb": bpb_of(b, size)}, name="old")
    found = figures_of(capsys, *new, "--baseline", *old)["comparison"]
    assert found["bpb"]["welch"] is None  # one run a side has no spread, its documents do
    assert found["documents"]["p_two_sided"] == pytest.approx(stats.ttest_rel(b, a).pvalue)
    assert found["documents"]["bpb"] == pytest.approx(bpb_of(b, size) - bpb_of(a, size))
    assert found["documents"]["pairs"] == 400


def test_documents_of_other_texts_are_not_compared(tmp_path, capsys) -> None:
    a = save_documents(tmp_path, "new0", 1, 0.0)
    b = save_documents(tmp_path, "old0", 2, 0.0, count=399)
    new = ours(tmp_path / "logs", {"artifact_sha256": "s", "val_bpb": bpb_of(*a)}, name="new")
    old = ours(tmp_path / "logs", {"artifact_sha256": "s", "val_bpb": bpb_of(*b)}, name="old")
    assert figures_of(capsys, *new, "--baseline", *old)["comparison"]["documents"] is None


def test_a_torn_file_of_documents_is_refused(tmp_path, capsys) -> None:
    a = save_documents(tmp_path, "run0", 1, 0.0)
    file = tmp_path / "runs" / "run0" / "documents.npz"
    file.write_bytes(file.read_bytes()[:-500])
    logs = ours(tmp_path / "logs", {"val_bpb": bpb_of(*a)})
    assert "documents.npz" in refusal(capsys, *logs, "--html", str(tmp_path / "out.html"))


def test_documents_that_do_not_add_up_to_the_score_are_left_out_with_a_word(
    tmp_path, capsys
) -> None:
    a = save_documents(tmp_path, "new0", 1, 0.0)
    logs = ours(tmp_path / "logs", {"val_bpb": bpb_of(*a) + 0.001}, name="new")
    assert read_documents(read_run(Path(logs[0]))).arrays == {}
    assert any("documents.npz" in line for line in figures_of(capsys, *logs)["warnings"])


# === What is refused ==============================================================================
@pytest.mark.parametrize(
    "change",
    [
        {"code_sha256": "c1"},
        {"preset": "pr1530"},
        {"device": "GPU"},
        {"seed": 0},
        {"val_sha256": "w"},
        {"torch": "3"},
        {"world_size": 2},
        {"config": {"matrix_lr": "0.04"}},
    ],
)
def test_runs_that_are_not_seeds_of_one_claim_are_refused_unless_mixed(
    tmp_path, capsys, change: dict
) -> None:
    logs = ours(tmp_path, {}, {"val_bpb": 1.8, **change})
    name = "matrix_lr: 0.03, 0.04" if "config" in change else next(iter(change))
    assert name in refusal(capsys, *logs)
    assert len(figures_of(capsys, *logs, "--mixed")["runs"]) == 2
    base = ours(tmp_path, {"val_bpb": 1.7}, name="base")
    assert name in refusal(capsys, *base, "--baseline", *logs)


def test_seeds_that_drew_other_documents_are_refused_with_the_knob_that_drew_them(
    tmp_path, capsys
) -> None:
    part = {"config": {"val_doc_fraction": "0.02"}}
    logs = ours(tmp_path, part, {"val_sha256": "b" * 64, **part})
    assert "VAL_DOC_FRACTION=0.02 draws other documents for every seed" in refusal(capsys, *logs)
    logs = ours(tmp_path, {}, {"val_sha256": "b" * 64}, name="whole")
    assert "draws" not in refusal(capsys, *logs)


def test_names_of_files_and_runs_and_ways_to_write_a_number_are_no_difference(
    tmp_path, capsys
) -> None:
    knobs = {"artifact_dir": "runs/other", "data_dir": "/mnt/data", "matrix_lr": "0.030"}
    logs = ours(tmp_path, {}, {"val_bpb": 1.8, "config": knobs})
    assert figures_of(capsys, *logs)["mixed"] == {}


def test_one_log_given_twice_is_refused_even_mixed(tmp_path, capsys) -> None:
    path = ours(tmp_path, {})[0]
    copy = tmp_path / "copy.txt"
    shutil.copy(path, copy)
    assert "same log" in refusal(capsys, path, str(copy), "--mixed")


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("\nfinal {", "\nfnal {", "final"),
        ("\nfinal {", "\nfinal {}\nfinal {", "2 final lines"),
        ("\nfinal {", "\nfinal {{", "JSON"),
    ],
)
def test_the_log_of_no_finished_run_is_refused(
    tmp_path, capsys, old: str, new: str, word: str
) -> None:
    path = Path(ours(tmp_path, {})[0])
    path.write_text(path.read_text().replace(old, new))
    assert word in refusal(capsys, str(path))


def test_unfinished_logs_are_left_out_by_name_but_of_no_submission(tmp_path, capsys) -> None:
    logs = ours(tmp_path, {}, {"val_bpb": 1.8}, {})
    page = tmp_path / "out.html"
    Path(logs[2]).write_text(Path(logs[2]).read_text().replace("\nfinal {", "\nfnal {"))
    assert report.main([*logs, "--mixed", "--html", str(page)]) == 0
    assert page.is_file()
    assert f"left out: {logs[2]}: has 0 final lines: its run goes on" in capsys.readouterr().out
    found = figures_of(capsys, *logs)
    assert (len(found["runs"]), len(found["warnings"])) == (2, 1)
    assert "0 final lines" in refusal(capsys, *logs[:2], "--baseline", logs[2])
    assert "0 final lines" in refusal(
        capsys, *logs, "--submission", str(tmp_path / "s.json"), "--name", "n"
    )


def test_a_file_that_does_not_exist_is_named_with_the_place_of_logs(tmp_path, capsys) -> None:
    said = refusal(capsys, str(tmp_path / "nosuch.txt"))
    assert "nosuch.txt: does not exist" in said and "logs/<RUN_ID>.txt" in said
    assert "Errno" not in said


def test_a_checkpoint_is_called_one_and_its_log_is_wanted(tmp_path, capsys) -> None:
    path = tmp_path / "final_model.pt"
    torch.save({"weights": torch.zeros(3)}, path)
    said = refusal(capsys, str(path))
    assert "is a checkpoint" in said and "logs/<RUN_ID>.txt" in said and "unpack" not in said


def test_runs_of_different_knobs_have_no_mean_as_if_they_were_seeds(tmp_path, capsys) -> None:
    runs = [{"config": {"matrix_lr": lr}, "seed": 0} for lr in ("0.03", "0.04")]
    new = ours(tmp_path, *runs)
    statements = figures_of(capsys, *new, "--mixed")["statements"]
    assert statements == ["no mean of all runs: they differ in matrix_lr"]
    old = ours(tmp_path, {}, {}, name="old")
    compared = figures_of(capsys, *new, "--baseline", *old, "--mixed")["statements"]
    assert any(line.startswith("mean of runs that differ in matrix_lr: ") for line in compared)


def test_a_file_without_a_score_is_refused(tmp_path, capsys) -> None:
    path = tmp_path / "run.txt"
    path.write_text("step:1/20 train_loss:3.0000 train_time:1ms step_avg:1ms\n")
    assert "no score" in refusal(capsys, str(path))
    assert "absent.txt" in refusal(capsys, str(tmp_path / "absent.txt"))


def test_mixed_configurations_are_summed_up_one_by_one(tmp_path, capsys) -> None:
    settings = [(lr, seed) for lr in ("0.03", "0.04") for seed in (0, 1)]
    runs = [
        {"config": {"matrix_lr": lr}, "seed": s, "val_bpb": 1.8 + float(lr) + s / 100}
        for lr, s in settings
    ]
    groups = figures_of(capsys, *ours(tmp_path, *runs), "--mixed")["groups"]
    assert {name: round(g["bpb"]["mean"], 6) for name, g in groups.items()} == {
        "MATRIX_LR=0.03": 1.835,
        "MATRIX_LR=0.04": 1.845,
    }


# === The denominator ==============================================================================
def test_inflated_bytes_are_found_from_the_line_alone(tmp_path, capsys) -> None:
    path = Path(published(tmp_path, "PR1413")[0])
    text = path.read_text().replace("val_bpb:1.08209788", f"val_bpb:{1.08209788 / 1.0895:.8f}")
    path.write_text(text)
    found = figures_of(capsys, str(path), status=1)
    assert len(found["problems"]) == 1
    assert "x1.0895" in found["problems"][0]
    assert "canonical sp8192" in found["problems"][0]


def test_bytes_one_in_five_thousand_off_are_found_and_rounding_is_not_mistaken_for_it(
    tmp_path, capsys
) -> None:
    logs = ours(tmp_path, {"quantized_ttt_lora_loss": nats(1.9) * 1.0002})
    assert "val_bytes" in figures_of(capsys, *logs, status=1)["problems"][0]
    assert (
        figures_of(capsys, *published(tmp_path, "PR549"))["problems"] == []
    )  # its first score has four decimals


def test_a_set_tokenised_a_little_differently_is_the_same_by_its_bytes(tmp_path, capsys) -> None:
    path = Path(published(tmp_path, "PR1413")[0])
    text = (
        path.read_text()
        .replace("sp8192", "sp4096")
        .replace("val_tokens: 40540160", "val_tokens: 45514752")
    )
    scores = [line for line in text.splitlines() if "eval_time" in line]
    for line in scores:  # a token of theirs holds 151,074,053 / 45,514,752 bytes
        loss = float(line.split("val_loss:")[1].split()[0])
        text = text.replace(
            line,
            f"{line.split(' val_loss')[0]} val_loss:{loss:.8f} val_bpb:"
            f"{loss / math.log(2) * 45_514_752 / 151_074_053:.8f} eval_time:1ms",
        )
    path.write_text(text)
    assert figures_of(capsys, str(path))["problems"] == []


def test_a_part_of_the_validation_set_is_told_from_the_whole(tmp_path, capsys) -> None:
    path = Path(published(tmp_path, "PR1413")[0])
    path.write_text(path.read_text().replace("val_tokens: 40540160", "val_tokens: 9662464"))
    found = figures_of(capsys, str(path), status=1)
    assert "23.8% of fineweb10B_sp8192" in found["problems"][0]


def test_without_token_counts_the_nearest_canonical_set_is_named(tmp_path) -> None:
    path = tmp_path / "lines.log"
    path.write_text("quantized val_loss:2.84312340 val_bpb:1.10066167 eval_time:7815ms\n")
    run = read_run(path)
    assert claims.denominator(run, run.score).source == "canonical sp8192"
    path.write_text("quantized val_loss:2.84312340 val_bpb:1.20066167 eval_time:7815ms\n")
    run = read_run(path)
    assert math.isnan(claims.denominator(run, run.score).expected)


def test_the_tools_and_the_script_hold_the_same_totals() -> None:
    assert tg.CANONICAL["fineweb10B_sp8192"] == (
        canonical.DOCUMENTS,
        canonical.SP8192_TOKENS,
        canonical.TEXT_BYTES,
    )
    assert tg.CANONICAL[f"fineweb10B_{canonical.CASEOPS_SUFFIX}"] == (
        canonical.DOCUMENTS,
        canonical.CASEOPS_TOKENS,
        canonical.CASEOPS_TEXT_BYTES,
    )
    sizes = {held[2] for held in tg.CANONICAL.values()}
    assert sizes == {canonical.TEXT_BYTES, canonical.CASEOPS_TEXT_BYTES}


# === Outputs ======================================================================================
def test_the_terminal_shows_every_run_and_what_it_spent(tmp_path, capsys) -> None:
    assert report.main(ours(tmp_path, {"val_bpb": 1.8}, {"seconds": {"train": 70.0}})) == 0
    out = capsys.readouterr().out
    for word in (
        "1.80000",
        "1.90000",
        "51.0 / 60 s",
        "5.0 / 600 s",
        "0.30000",
        "mean: val_bpb 1.850 ± 0.071",
    ):
        assert word in out
    assert "over the limit: train 70.0 s of 60" in out


def test_markdown_is_rewritten_between_its_markers_only(tmp_path, capsys) -> None:
    page = tmp_path / "README.md"
    logs = ours(tmp_path, {"val_bpb": 1.8}, {"val_bpb": 1.9})
    page.write_text(f"# Title\n{report.BEGIN}\nold\n{report.END}\nrest\n")
    for _ in range(2):
        assert report.main([*logs, "--markdown", str(page)]) == 0
        text = page.read_text()
        assert text.startswith(f"# Title\n{report.BEGIN}\n| run | val_bpb | seed |")
        assert text.endswith(f"{report.END}\nrest\n")
        assert text.count("| 1.80000 |") == 1
        assert "mean: val_bpb 1.850 ± 0.071" in text
        assert "old" not in text
    page.write_text("# Title\n")
    assert "report:begin" in refusal(capsys, *logs, "--markdown", str(page))


def test_every_cell_of_a_row_stands_under_its_head(tmp_path, capsys) -> None:
    assert report.main([*ours(tmp_path, {"val_bpb": 1.8}, {}), "--markdown", "-"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    head, _, row, _ = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table)
    assert dict(zip(head, row, strict=True)) == {
        "run": "run0",
        "val_bpb": "1.80000",
        "seed": "0",
        "steps": "70",
        "ms/step": "700.00",
        "before quantisation": "2.00000",
        "quantised": "2.10000",
        "gain": "0.30000",
        "artifact + code": "1,000",
        "training": "51.0 / 60 s",
        "evaluation": "5.0 / 600 s",
        "bytes check": "x1.000000",
    }


@pytest.mark.parametrize("package", ["rich.console", "plotly.offline", "scipy"])
def test_a_missing_package_is_named_with_its_remedy(
    tmp_path, capsys, monkeypatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    error = refusal(
        capsys, *ours(tmp_path, {}, {"val_bpb": 1.8}), "--html", str(tmp_path / "out.html")
    )
    assert error.startswith(f"report.py: {package.split('.')[0]}: is not installed; make dev")


PROVED_BY_LOGS = {"train_under_600s": True, "eval_under_600s": True, "artifact_under_16mb": True}


def submit(folder: Path, logs: list[str], *more: str) -> tuple[int, Path]:
    out = folder / "submission.json"
    return report.main(
        [*logs, "--submission", str(out), "--name", "n", "--date", "2026-01-01", *more]
    ), out


def test_the_claim_is_the_mean_and_deviation_of_its_seeds(tmp_path) -> None:
    logs = ours(
        tmp_path, {"val_bpb": 1.8, "seed": 7}, {"val_bpb": 2.0, "artifact_bytes": 1234, "seed": 3}
    )
    status, out = submit(tmp_path, logs, "--author", "a", "--track", "10min_16mb")
    claim = json.loads(out.read_text())
    assert status == 0
    assert claim["val_bpb"] == pytest.approx(1.9)
    assert claim["val_bpb_std"] == pytest.approx(0.02**0.5)
    assert claim["val_loss"] == pytest.approx(nats(1.9))
    assert (claim["bytes_total"], claim["seeds"], claim["code_sha256"]) == (1234, [3, 7], "c0")
    assert (claim["author"], claim["name"], claim["date"]) == ("a", "n", "2026-01-01")
    assert claim["seed_results"]["3"]["val_bpb"] == 2.0
    assert claim["seed_results"]["7"]["train_time_s"] == 51.0
    assert claim["seed_results"]["7"]["pre_quantization_bpb"] == 2.0
    assert claim["compliance"] == PROVED_BY_LOGS  # nobody has looked at more


@pytest.mark.parametrize(
    "change", [{"code_sha256": "c1"}, {"preset": "pr1530"}, {"device": "GPU"}, {"seed": 0}]
)
@pytest.mark.parametrize("mixed", [[], ["--mixed"]])
def test_runs_that_are_not_seeds_of_one_claim_are_no_submission(
    tmp_path, capsys, change: dict, mixed: list
) -> None:
    status, out = submit(tmp_path, ours(tmp_path, {}, {"val_bpb": 1.8, **change}), *mixed)
    assert status == 2
    assert not out.exists()


@pytest.mark.parametrize("day", ["garbage", "2026-1-2", "2026-02-30", ""])
def test_a_date_is_a_day(tmp_path, capsys, day: str) -> None:
    assert submit(tmp_path, ours(tmp_path, {}), "--date", day)[0] == 2
    assert capsys.readouterr().err == f"report.py: --date {day}: must be a day, YYYY-MM-DD\n"


def test_a_score_with_wrong_bytes_is_no_submission(tmp_path, capsys) -> None:
    status, out = submit(tmp_path, ours(tmp_path, {"quantized_ttt_lora_loss": 3.0}))
    assert status == 2
    assert not out.exists()


def test_compliance_is_what_audits_of_these_very_artifacts_found(tmp_path) -> None:
    logs = ours(tmp_path, {"val_bpb": 1.8}, {"val_bpb": 1.9})

    def audit(i: int, artifact: str, **passed: bool | None) -> str:
        path = tmp_path / f"audit{i}.json"
        found = {name: {"passed": ok, "evidence": f"{name} {i}"} for name, ok in passed.items()}
        path.write_text(json.dumps({"properties": found, "artifact_sha256": artifact}))
        return str(path)

    first = audit(
        0, "run0", causal=True, normalised=True, lossless=True, clean_data=None, single_pass=None
    )
    second = audit(1, "run1", causal=True, normalised=False, clean_data=True, single_pass=False)
    claim = json.loads(submit(tmp_path, logs, "--audit", first, second)[1].read_text())
    assert claim["compliance"] == {
        **PROVED_BY_LOGS,
        "no_slot": True,
        "no_ngram_cache": False,
        "causal": True,
        "normalised": False,
        "single_pass": False,
    }  # not run: no statement
    assert claim["compliance_evidence"]["causal"] == {"0": "causal 0", "1": "causal 1"}
    other = audit(1, "another", causal=True)
    assert (
        json.loads(submit(tmp_path, logs, "--audit", first, other)[1].read_text())["compliance"]
        == PROVED_BY_LOGS
    )


def test_audits_in_the_run_folders_are_found(tmp_path) -> None:
    logs = ours(tmp_path / "logs", {"val_bpb": 1.8})
    (tmp_path / "runs" / "run0").mkdir(parents=True)
    audit = {"properties": {"causal": {"passed": True, "evidence": 0.0}}, "artifact_sha256": "run0"}
    (tmp_path / "runs" / "run0" / "audit.json").write_text(json.dumps(audit))
    compliance = json.loads(submit(tmp_path, logs)[1].read_text())["compliance"]
    assert compliance == {**PROVED_BY_LOGS, "no_slot": True, "causal": True}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"properties": [1]}', '{"properties": {"causal": 1}}', "{}"]
)
def test_an_audit_that_cannot_be_read_is_refused(tmp_path, capsys, text: str) -> None:
    (tmp_path / "audit.json").write_text(text)
    assert submit(tmp_path, ours(tmp_path, {}), "--audit", str(tmp_path / "audit.json"))[0] == 2
    assert "audit.json" in capsys.readouterr().err


def with_documents(root: Path) -> list[str]:
    scores = [bpb_of(*save_documents(root, f"run{i}", i, i / 20)) for i in range(3)]
    return ours(root / "logs", *({"val_bpb": score} for score in scores))


def test_pictures_are_drawn_of_all_that_the_logs_hold(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    assert report.main([*with_documents(tmp_path), "--png", str(tmp_path / "png")]) == 0
    names = {
        path.stem for path in (tmp_path / "png").iterdir() if path.read_bytes()[:4] == b"\x89PNG"
    }
    curves = {
        f"{key}_by_{x}"
        for key in ("train_loss", "val_bpb", "lr_scale", "speed")
        for x in ("step", "seconds")
    }
    assert names == curves | {"scores", "length", "position", "budget_train", "budget_eval"}


def test_losses_by_length_and_position_add_up_to_the_documents(tmp_path) -> None:
    docs = read_documents(read_run(Path(with_documents(tmp_path)[0]))).arrays
    found = loss_by_length(docs)
    assert sum(found.n) == 400
    lengths = docs["doc_tokens"]
    shortest = 2 ** int(math.log2(lengths.min()))
    first = (lengths >= shortest) & (lengths < 2 * shortest)
    bits = docs["doc_nats"][first].sum() / math.log(2)
    assert found.y[0] == pytest.approx(bits / docs["doc_bytes"][first].sum())
    assert loss_by_position(docs).y[:2] == pytest.approx([6.0, 5.7])


# === The page in a real browser ===================================================================
@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("plotly")
    webdriver = pytest.importorskip("selenium.webdriver")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip(f"needs Chromium and chromedriver on PATH, found {binary} and {driver}")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        "hide-scrollbars",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(driver)
    )  # makes a fresh profile
    yield window
    window.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("page")
    logs = with_documents(root)
    old = published(root, "PR1413")
    with pytest.MonkeyPatch.context() as patch:
        # Charts of logs that are as different as can be.
        patch.setattr(report, "check_texts", lambda *_: None)
        assert report.main([*logs, "--baseline", *old, "--html", str(root / "out.html")]) == 0
    return root / "out.html"


def show(browser, page: Path, width: int = 1280, scheme: str = "light") -> None:
    """Opens the page at a width, in a colour scheme; fails on any message on the console."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    scheme = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    browser.get(page.as_uri())
    wait(
        browser,
        "return charts.length > 0 && charts.every(({ node }) => node.querySelector('.main-svg'))",
    )
    assert browser.get_log("browser") == []


def wait(browser, script: str) -> None:
    """Waits until a script gives true."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20, 0.05).until(lambda b: b.execute_script(script))


def traces(browser, chart: str) -> list[str]:
    """Names of what the chart really shows."""
    shown = f"document.getElementById('{chart}').data.filter((t) => t.visible !== 'legendonly')"
    return browser.execute_script(f"return {shown}.map((t) => t.name)")


CHARTS = set(
    """train_loss val_bpb lr_scale speed scores budget_train budget_eval budget_none length
    position""".split()
)


def test_the_page_draws_every_chart(browser, page: Path) -> None:
    show(browser, page)
    drawn = browser.execute_script("""
        const marks = '.scatterlayer path.point, .barlayer .point path';
        return Object.fromEntries(charts.map(({ node }) =>
          [node.id, node.querySelectorAll(marks).length]))""")
    assert set(drawn) == CHARTS
    assert all(count >= 3 for count in drawn.values()), drawn
    assert len(traces(browser, "train_loss")) == 6  # three runs over three of the baseline
    assert browser.execute_script("return document.querySelectorAll('table tbody tr').length") >= 6


def test_hovering_tells_the_value(browser, page: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    show(browser, page)
    point = browser.find_element("css selector", "#scores .scatterlayer path.point")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
    ActionChains(browser).move_to_element(point).perform()
    wait(browser, "return document.querySelectorAll('#scores .hovertext').length > 0")
    assert (
        "before quantisation: 2.00000"
        in browser.find_element("css selector", "#scores .hovertext").text
    )


def test_a_click_on_a_run_takes_it_out_of_every_chart_and_back(browser, page: Path) -> None:
    show(browser, page)
    chip = browser.find_elements("css selector", "#chips button")[0]
    name = chip.text
    before = {chart: traces(browser, chart) for chart in CHARTS}
    assert name in before["train_loss"]
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    for chart in ("train_loss", "val_bpb", "lr_scale", "speed", "scores", "length", "position"):
        assert name not in traces(browser, chart)
    bars = "return document.getElementById('budget_train').data[0].y"
    assert name not in browser.execute_script(bars)
    chip.click()
    assert {chart: traces(browser, chart) for chart in CHARTS} == before
    assert name in browser.execute_script(bars)


def test_a_click_in_a_legend_takes_a_phase_out(browser, page: Path) -> None:
    show(browser, page)
    toggle = browser.find_element("css selector", "#budget_eval .legendtoggle")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", toggle)
    before = traces(browser, "budget_eval")
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).move_to_element(toggle).click().perform()
    chart = "document.getElementById('budget_eval')"
    wait(browser, f"return {chart}.data.some((t) => t.visible === 'legendonly')")
    assert len(traces(browser, "budget_eval")) == len(before) - 1


def test_the_axis_of_the_curves_changes_to_time_and_tokens(browser, page: Path) -> None:
    show(browser, page)

    def first() -> list[float]:
        return browser.execute_script("return document.getElementById('train_loss').data[0].x")

    assert first() == [1, 20, 40, 60]
    for i, values in ((1, [0.7, 14, 28, 42]), (2, [100, 2000, 4000, 6000])):
        browser.find_elements("css selector", "#axis button")[i].click()
        assert first() == pytest.approx(values)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_follows_its_colours(browser, page: Path, scheme: str) -> None:
    show(browser, page, width=390, scheme=scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    widths = browser.execute_script(
        "return charts.map(({ node }) => node.querySelector('.main-svg').clientWidth)"
    )
    assert all(250 < width <= 390 for width in widths), widths
    ground, card, text, ticks, *lines = browser.execute_script("""
        const of = (node, what) => getComputedStyle(node)[what];
        const one = (selector) => document.querySelector(selector);
        const lines = [...document.querySelectorAll('#scores path.js-line')];
        return [of(document.body, 'backgroundColor'), of(one('.card'), 'backgroundColor'),
                of(document.body, 'color'), of(one('#scores .xtick text'), 'fill'),
                ...lines.map((line) => of(line, 'stroke'))]""")
    assert len(lines) == 6
    assert (luminance(ground) < 0.1) == (scheme == "dark")
    assert min(contrast(text, ground), contrast(ticks, card)) > 7  # WCAG AAA for text
    assert min(contrast(line, card) for line in lines) > 4


def luminance(colour: str) -> float:
    """By WCAG 2 from 0, black, to 1, white, of a computed style "rgb(1, 2, 3)"."""
    numbers = re.findall(r"\d+", colour)[:3]
    parts = [int(number) / 255 for number in numbers]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """The contrast of two colours by WCAG 2, from 1 to 21."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_the_page_needs_no_network_and_no_name_in_a_log_runs_as_script(browser, tmp_path) -> None:
    evil = "</script><script>window.hit = 1</script><b>"
    logs = ours(tmp_path, {"dataset": evil, "val_bpb": 1.8}, {"dataset": evil, "val_bpb": 1.9})
    assert report.main([*logs, "--html", str(tmp_path / "out.html")]) == 0
    show(browser, tmp_path / "out.html")
    assert browser.execute_script("return window.hit") is None
    assert evil in browser.find_element("id", "about").text
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map((e) => e.name)"
    )
    assert [name for name in loaded if name.startswith("http")] == []
