"""`report.py --compare`: a row per system over its seeds; only presets and knobs may differ."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from test_report import Printed, nats, ours, refusal, report, score_line

BUDGET = {"max_wallclock_seconds": "40.0", "shrink": "True", "val_doc_fraction": "1.0"}


def logs(folder: Path, *runs: dict, name: str = "run") -> list[str]:
    """As `ours`; `preset` of each, and `env`: knobs that the environment had set."""
    made = []
    for run in runs:
        figures = {key: value for key, value in run.items() if key != "env"}
        config = {**BUDGET, **run.get("config", {}), **run.get("env", {})}
        # A run with SHRINK=1 says so behind its preset.
        made.append({**figures, "config": config, "preset": f"{run['preset']} shrunk"})
    paths = ours(folder, *made, name=name)
    for path, run in zip(map(Path, paths), runs, strict=True):
        text = path.read_text()
        for knob in run.get("env", {}):
            text = re.sub(rf"^(  {knob}: .*) \(default\)$", r"\1 (env)", text, flags=re.M)
        path.write_text(text)
    return paths


def compared(
    capsys: pytest.CaptureFixture, paths: list[str], status: int = 0
) -> tuple[list[dict], list[str]]:
    """Rows by column, and the lines below the table."""
    capsys.readouterr()
    assert report.main(["--compare", *paths]) == status
    begin, head, _, *lines, end = capsys.readouterr().out.splitlines()
    assert (begin, end) == ("<!-- compare:begin -->", "<!-- compare:end -->")
    names = head[2:-2].split(" | ")
    rows = []
    for line in lines:
        if line.startswith("|"):
            rows.append(dict(zip(names, line[2:-2].split(" | "), strict=True)))
    return rows, [line.removeprefix("- ") for line in lines if line.startswith("- ")]


def test_each_system_has_a_row_with_what_it_is_what_was_published_and_what_was_measured(
    tmp_path, capsys
) -> None:
    presets = ["pr2135", "pr605", "pr473", "pr1413", "pr1560", "pr1530"]
    rows, notes = compared(
        capsys, logs(tmp_path, *({"preset": p, "seed": 0, "val_bpb": 1.9} for p in presets))
    )
    assert [row["system"] for row in rows] == ["#1530", "#1560", "#1413", "#473", "#605", "#2135"]
    assert [row["published"] for row in rows] == [
        "1.07336",
        "1.07406",
        "1.08279",
        "1.12139",
        "about 1.15, legal form",
        "1.05651, with CaseOps and token tilt",
    ]
    assert all(row["what it has"] for row in rows)
    measured = {
        "runs": "1",
        "before quantisation": "2.00000",
        "quantised": "2.10000",
        "adapted": "1.90000",
        "artifact + code": "1,000",
        "training s": "51.0",
        "evaluation s": "5.0",
        "steps": "70",
        "ms/step": "700.0",
    }
    assert all(measured.items() <= row.items() for row in rows)
    assert "sliding window" not in rows[0]  # none ran it
    # No day is given, and that of a file is the clone's.
    assert re.search(
        r"tiny, 1,000 validation targets; 40 s of training each, SHRINK=1.*; "
        r"1 x CPU, torch 2; code c0$",
        notes[0],
    )
    assert "0.7227" in notes[1]


def test_seeds_are_one_row_with_mean_and_deviation(tmp_path, capsys) -> None:
    bpb = {"pr1530": 1.8, "pr473": 1.9}
    seeds = [
        {"preset": preset, "seed": s, "val_bpb": bpb[preset] + s / 100}
        for preset in bpb
        for s in (0, 1)
    ]
    rows, _ = compared(capsys, logs(tmp_path, *seeds))
    assert [(row["runs"], row["adapted"]) for row in rows] == [
        ("2", "1.80500 ± 0.00707"),
        ("2", "1.90500 ± 0.00707"),
    ]


def test_a_sliding_score_has_a_column_where_one_of_the_systems_has_it(tmp_path, capsys) -> None:
    paths = logs(tmp_path, {"preset": "pr473"}, {"preset": "pr605"})
    text = Path(paths[0]).read_text()
    sliding = score_line("diagnostic quantized_sliding_window", Printed(nats(2.05), 2.05, 9))
    adapted = "quantized_ttt_lora val_loss"
    Path(paths[0]).write_text(text.replace(adapted, f"{sliding}\n{adapted}", 1))
    rows, _ = compared(capsys, paths)
    assert [row["sliding window"] for row in rows] == ["2.05000", "–"]


def test_knobs_set_for_one_system_alone_make_a_row_of_their_own(tmp_path, capsys) -> None:
    leaky = {"preset": "pr473", "env": {"leaky_slope": "0.5"}, "val_bpb": 1.85}
    both = {"env": {"matrix_lr": "0.04"}}
    rows, _ = compared(capsys, logs(tmp_path, {"preset": "pr473"}, leaky, {"preset": "cpu"}))
    assert [(row["system"], row["published"]) for row in rows] == [
        ("#473", "1.12139"),
        ("#473", "–"),
        ("`cpu`", "–"),
    ]
    assert "here `LEAKY_SLOPE=0.5`" in rows[1]["what it has"]
    rows, _ = compared(
        capsys,
        logs(tmp_path, {"preset": "pr473", **both}, {"preset": "pr605", **both}, name="both"),
    )
    assert not any("here" in row["what it has"] for row in rows)  # set for all


@pytest.mark.parametrize(
    "change",
    [
        {"code_sha256": "c1"},
        {"val_sha256": "w"},
        {"dataset": "other"},
        {"tokenizer_sha256": "u"},
        {"device": "GPU"},
        {"torch": "3"},
        {"world_size": 2},
        {"config": {"max_wallclock_seconds": "90.0"}},
        {"config": {"shrink": "False"}},
        {"config": {"val_doc_fraction": "0.5"}},
    ],
    ids=str,
)
def test_other_code_data_machine_or_budget_is_refused(tmp_path, capsys, change: dict) -> None:
    paths = logs(tmp_path, {"preset": "pr1530"}, {"preset": "pr473", **change})
    name = next(iter(change.get("config", change)))
    if name == "max_wallclock_seconds":
        name = "budget"
    assert f"{name}: " in refusal(capsys, "--compare", *paths)


def test_steps_are_the_budget_where_there_is_no_clock(tmp_path, capsys) -> None:
    def run(preset: str, steps: str) -> dict:
        knobs = {"max_wallclock_seconds": "0.0", "iterations": steps, "train_batch_tokens": "2048"}
        return {"preset": preset, "config": knobs}

    paths = logs(tmp_path, run("pr1530", "70"), run("pr473", "80"))
    assert "budget: 70 steps of 2048 tokens, 80 steps" in refusal(capsys, "--compare", *paths)
    _, notes = compared(
        capsys, logs(tmp_path, run("pr1530", "70"), run("pr473", "70"), name="same")
    )
    assert "70 steps of 2048 tokens each" in notes[0]


def test_seeds_of_one_system_must_be_of_one_configuration(tmp_path, capsys) -> None:
    paths = logs(
        tmp_path, {"preset": "pr473"}, {"preset": "pr473", "config": {"matrix_lr": "0.04"}}
    )
    assert "matrix_lr: 0.03, 0.04" in refusal(capsys, "--compare", *paths)
    paths = logs(
        tmp_path, {"preset": "pr473", "seed": 0}, {"preset": "pr473", "seed": 0}, name="twice"
    )
    assert "seed 0" in refusal(capsys, "--compare", *paths)


def test_a_run_that_did_not_finish_is_left_out_with_a_word(tmp_path, capsys) -> None:
    paths = logs(tmp_path, {"preset": "pr1530"}, {"preset": "pr473"})
    Path(paths[1]).write_text(Path(paths[1]).read_text().replace("\nfinal {", "\nfnal {"))
    rows, notes = compared(capsys, paths)
    assert [row["system"] for row in rows] == ["#1530"]
    assert any(note.startswith("left out: ") and "run1.txt" in note for note in notes)
    assert "final line" in refusal(capsys, "--compare", paths[1])


def test_broken_limits_and_denominators_are_said(tmp_path, capsys) -> None:
    over = {"preset": "pr473", "seconds": {"train": 70.0}}
    _, notes = compared(capsys, logs(tmp_path, {"preset": "pr1530"}, over))
    assert any("over the limit: train 70.0 s of 60" in note for note in notes)
    _, notes = compared(
        capsys, logs(tmp_path, {"preset": "pr605", "val_bytes": 3000}, name="bad"), status=1
    )
    assert any("INVALID" in note for note in notes)


def test_the_table_goes_between_its_own_marks(tmp_path, capsys) -> None:
    page = tmp_path / "README.md"
    paths = logs(tmp_path, {"preset": "pr1530"})
    before = f"# Title\n{report.BEGIN}\nkept\n{report.END}\n"
    page.write_text(f"{before}<!-- compare:begin -->\nold\n<!-- compare:end -->\nrest\n")
    assert report.main(["--compare", *paths, "--markdown", str(page), "--date", "2031-01-02"]) == 0
    text = page.read_text()
    assert text.startswith(f"{before}<!-- compare:begin -->\n| system |")
    assert text.endswith("<!-- compare:end -->\nrest\n")
    assert "old" not in text and "2031-01-02" in text
    with pytest.raises(SystemExit) as ended:
        report.main(["--compare", *paths, "--json", "-"])
    assert ended.value.code == 2


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_compare_prepares_its_data_sweeps_the_systems_and_prints_the_table() -> None:
    def lines(*knobs: str) -> str:
        command = ["make", "-n", "-o", "dev", "compare", *knobs]
        plain = {"PATH": os.environ["PATH"]}
        return subprocess.run(
            command, cwd=ROOT, env=plain, capture_output=True, text=True, check=True
        ).stdout

    done = lines("SEED=0,1", "DATASET=other_sp8192", "VOCAB_SIZE=8192", "DATA_DIR=/d")
    assert "prepare_data" not in done  # other data is there already
    assert re.search(
        r'DATASET="other_sp8192" DATA_DIR="/d" VAL_DOC_FRACTION="0.1" \\\s+\S+ tools/sweep.py '
        r'"compare-other_sp8192-\d+" '
        r'PRESET="pr1530,pr1560,pr1413,pr473,pr605,pr1855,pr2014,pr2135,record" SHRINK="1"',
        done,
    )
    assert 'VAL_DOC_FRACTION="1" ' in lines("VAL_DOC_FRACTION=1")
    assert 'SEED="0,1"' in done and 'PRESET="pr1413 pr473" ' in lines("SYSTEMS=pr1413 pr473")
    assert re.search(r"report.py --compare logs/\"compare-other_sp8192-\d+\"-\?{4}\.txt", done)
    default = lines()
    assert 'prepare_data.py pydocs --data-dir "data"' in default
    assert "compare-pydocs_sp1024_caseops-" in default
