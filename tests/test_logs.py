"""tools/runlog.py on logs as people keep them: other forms, other encodings, several runs a file.

The expected figures of the public logs' forms are those that their owners claimed.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import sys
from pathlib import Path

import pytest
import zstandard
from conftest import ROOT

pytest.importorskip("rich")
pytest.importorskip("scipy")
sys.path.insert(0, str(ROOT / "tools"))
import audit
import claims
import legality
import report
import runlog
import terminal
from logtext import LogError, decode, plain_line
from test_report import figures_of, ours, refusal

HEAD = """\
val_loader:shards pattern=./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:62021632
seed:1337
step:1000/20000 val_loss:2.0178 val_bpb:1.1950 train_time:599000ms step_avg:599.00ms
stopping_early: wallclock_cap train_time:599000ms step:1000/20000
Code size: 55931 bytes
"""
SCORE = "final_int6_roundtrip_exact val_loss:2.02025601 val_bpb:1.19650941\n"
SLIDING = "final_sliding_window_eval_exact stride:64 val_loss:1.96369923 val_bpb:1.16301431\n"


def log(folder: Path, text: str | bytes, name: str = "train.log") -> Path:
    """A log file."""
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(folder: Path, text: str | bytes) -> runlog.Run:
    """The one run of a text."""
    return runlog.read_run(log(folder, text))


def reason(folder: Path, text: str | bytes) -> str:
    """Why a text is refused."""
    with pytest.raises(LogError) as error:
        read(folder, text)
    return str(error.value)


# === Sizes and scores =============================================================================
@pytest.mark.parametrize(
    ("lines", "total", "code"),
    [
        (
            "Total submission size: 86155282 bytes\n"
            "Total submission size int6+zlib-9: 15353490 bytes\n",
            15353490,
            55931,
        ),
        (
            "Total submission size: 86155282 bytes\nCode size (compressed): 31999 bytes\n"
            "Total submission size quantized+brotli: 15900001 bytes\n",
            15900001,
            31999,
        ),
        (
            "artifact:15.92MB ternary:64880640(14239486B) fp:2513744(2537376B) code:70853\n"
            "budget:15993853/16000000 (15.99/16.00MB) FITS\n",
            15993853,
            70853,
        ),
        ("INT7+zlib model: 15000000 bytes | Total submission: 15441941 bytes\n", 15441941, 55931),
        ("---\nartifact_bytes:   15555017\n", 15555017, 55931),
    ],
)
def test_the_last_sizes_count(tmp_path, lines: str, total: int, code: int) -> None:
    run = read(tmp_path, HEAD + lines + SCORE)
    assert run.sizes["artifact_bytes"] == total
    assert run.sizes["code_bytes"] == code
    assert claims.broken_limits(run) == []


@pytest.mark.parametrize(
    ("line", "bpb", "kind"),
    [
        (SLIDING, 1.16301431, "sliding"),
        ("final sliding val_loss:1.96369923 sliding val_bpb:1.16301431", 1.16301431, "sliding"),
        ("final_sliding val_loss:1.9637 val_bpb:1.1630 (stride=16, T=0.90)", 1.1630, "sliding"),
        ("legal_ttt val_loss=1.9637 val_bpb=1.1630 elapsed=407.5s", 1.1630, "adapted"),
        ("Final: val_loss: 1.9637, val_bpb: 1.1630", 1.1630, "after"),
        ("final_eval stride:64 T:1.0 q_val_loss:1.9637 q_val_bpb:1.1630", 1.1630, "after"),
    ],
)
def test_a_score_is_read_in_every_form(tmp_path, line: str, bpb: float, kind: str) -> None:
    run = read(tmp_path, HEAD + SCORE + line + "\n")
    assert (run.score.bpb, run.score.kind) == (bpb, kind)
    assert run.warnings == []


def test_progress_is_no_score(tmp_path) -> None:
    progress = (
        "ttt_sliding:done val_loss=1.8 val_bpb=1.1 elapsed=407.5s\n"
        "ttt_progress: batch 3/9 val_loss:1.7 val_bpb:1.0\n"
        "eval chunk 3 val_loss:1.7 val_bpb:1.0\n"
    )
    assert read(tmp_path, HEAD + SCORE + progress).score.bpb == 1.19650941


def test_a_score_that_is_not_understood_is_told(tmp_path) -> None:
    run = read(tmp_path, HEAD + SCORE + "after adaptation: bpb: 1.1400 (best of both)\n")
    assert run.warnings == ["not understood: after adaptation: bpb: 1.1400 (best of both)"]


def test_a_summary_that_repeats_the_score_is_no_news(tmp_path) -> None:
    assert read(tmp_path, HEAD + SCORE + "---\nval_bpb:          1.1965\n").warnings == []


def test_an_echo_of_the_sliding_score_leaves_the_quantised_one(tmp_path) -> None:
    echo = "final_int6_roundtrip_exact val_loss:1.96369923 val_bpb:1.16301431\n"
    run = read(tmp_path, HEAD + SCORE + SLIDING + echo)
    assert [(score.kind, score.bpb) for score in run.scores] == [
        ("after", 1.19650941),
        ("sliding", 1.16301431),
    ]


@pytest.mark.parametrize("figure", ["nan", "-nan", "NaN", "inf"])
def test_a_score_that_is_no_number_is_refused_whatever_came_before(tmp_path, figure: str) -> None:
    before = "diagnostic pre-quantization post-ema val_loss:2.01770000 val_bpb:1.19500000\n"
    last = f"final_int6_roundtrip_exact val_loss:{figure} val_bpb:{figure}\n"
    assert "final_int6_roundtrip val_loss" in reason(tmp_path, HEAD + before + last)


def test_a_loss_that_became_nan_is_told(tmp_path) -> None:
    steps = "step:200/20000 train_loss:nan train_time:9000ms step_avg:45.00ms\n"
    assert read(tmp_path, HEAD + steps + SCORE).warnings == [
        "the training loss is nan from step 200"
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        (HEAD, "the last one while training was 1.1950 at step 1000"),
        (
            HEAD + "torch.OutOfMemoryError: CUDA out of memory.\n",
            "ended after step 1000 with torch.Out",
        ),
        (
            "seed:1\nModuleNotFoundError: No module named 'flash_attn'\n",
            "before its first step with Mod",
        ),
        ("seed:1\nstep:5/9 train_loss:3.0 train_time:1ms\n", "it ends at step 5"),
        ("nothing of a run\n", "no log of a finished run"),
        (b"PK\x03\x04zip", "a ZIP archive: unpack it"),
        (b"\x28\xb5\x2f\xfdzstd", "cut short or damaged"),
        (zstandard.compress(SCORE.encode())[:-9], "cut short or damaged"),
        (b"\x1f\x8bnot gzip", "cut short or damaged"),
        (b"\x00\x01\x02\x03" * 100, "is no text"),
    ],
)
def test_a_refusal_names_the_cause(tmp_path, text: str | bytes, words: str) -> None:
    assert words in reason(tmp_path, text)


# === What a deadline left =========================================================================
def test_report_and_audit_say_what_the_deadline_left(tmp_path, capsys) -> None:
    left = "65 of 100 documents were scored without adaptation"
    path = Path(ours(tmp_path, {"documents_not_adapted": 65, "val_docs": 100})[0])
    assert figures_of(capsys, str(path))["warnings"] == [f"run0: {left}"]
    assert legality.implied_bytes(path).evidence.endswith(left)
    cut = log(tmp_path, path.read_text().splitlines()[-1] + "\n", "cut.log")
    assert runlog.read_run(cut).left_by_deadline == [left]


def test_a_log_that_only_fits_itself_proves_nothing(tmp_path, capsys) -> None:
    """Scores and bytes that were edited alike fit each other as well as honest ones."""
    path = ours(tmp_path, {})[0]
    assert audit.main(["--log", path]) == 0
    said = capsys.readouterr().out
    assert said.startswith("no proof  ") and "the text is no known set: audit.py replay" in said


def test_what_the_deadline_left_is_read_from_the_line_of_the_score(tmp_path) -> None:
    score = "quantized_ttt val_loss:1.9637 val_bpb:1.1630 eval_time:9ms"
    left = ["3 of 9 documents were scored without adaptation", "2 chunks were not learnt from"]
    run = read(tmp_path, f"{HEAD}{score}, {left[0]}, {left[1]}\n")
    assert run.left_by_deadline == left


# === Several runs in one file =====================================================================
def test_a_run_that_died_behind_a_finished_one_is_left_out_with_a_word(tmp_path, capsys) -> None:
    second = HEAD.replace("1337", "42").splitlines()[:3]
    text = HEAD + SCORE + "\n".join([*second, "torch.OutOfMemoryError: CUDA out of memory."])
    found = figures_of(capsys, str(log(tmp_path, text)))
    assert [(run["seed"], run["val_bpb"]) for run in found["runs"]] == [(1337, 1.19650941)]
    (warning,) = found["warnings"]
    assert "left out: run 2 of the 2 in this file holds no score" in warning
    assert "torch.OutOfMemoryError" in warning


def test_finished_runs_of_one_file_are_told_apart(tmp_path, capsys) -> None:
    head = HEAD.replace("seed:", "train_seq_len:1024 iterations:20000\nseed:")
    other = SLIDING
    text = head + SCORE + head.replace("1337", "42") + other
    found = figures_of(capsys, str(log(tmp_path, text)))
    assert [run["seed"] for run in found["runs"]] == [1337, 42]
    repeated = log(tmp_path, head + SCORE + head + other)
    assert "train.log (run 1), " in refusal(capsys, str(repeated))


def test_a_run_that_a_file_holds_twice_is_one_run(tmp_path) -> None:
    run = read(tmp_path, HEAD + SCORE + HEAD + SCORE)
    assert (run.score.bpb, run.part) == (1.19650941, 0)


def test_a_resumed_run_is_one_run(tmp_path) -> None:
    path = Path(ours(tmp_path, {})[0])
    text = path.read_text()
    header = "Hyperparameters:\n  matrix_lr: 0.03 (default)\nresumed: from checkpoint 3\n"
    path.write_text(text.replace("step:60/70", f"{header}step:60/70"))
    assert [run.seed for run in runlog.read_runs(path)] == [0]


# === Settings =====================================================================================
def test_settings_are_read_where_they_are_assigned(tmp_path) -> None:
    settings = "--- Hyperparameters ---\nmodel_dim=768 seed=7 data_path=./data/fineweb10B_sp8192\n"
    run = read(tmp_path, settings + "step:9/9 loss:3.3 t:91478ms avg:91.5ms\n" + SCORE)
    assert (run.seed, run.config["model_dim"], run.facts["dataset"]) == (
        7,
        "768",
        "fineweb10B_sp8192",
    )
    assert run.points == [{"step": 9, "train_loss": 3.3, "seconds": 91.478}]


def test_a_summary_of_the_network_tells_seed_and_shape(tmp_path) -> None:
    run = read(tmp_path, "NET | params:1 L:10 d:768 act:relu2 s:1\n" + SCORE)
    assert run.seed == 1
    assert run.config == {"num_layers": "10", "model_dim": "768", "act": "relu2", "seed": "1"}


def test_logs_without_settings_are_no_claim(tmp_path, capsys) -> None:
    paths = [str(log(tmp_path, SCORE.replace("1.19", f"1.{i}9"), f"seed{i}.txt")) for i in (1, 2)]
    assert "seed1.txt: tells no settings" in refusal(capsys, *paths)
    assert len(figures_of(capsys, *paths, "--mixed")["runs"]) == 2


def test_nats_over_several_tokenizers_have_no_mean(tmp_path, capsys) -> None:
    other = HEAD.replace("62021632", "40540160").replace("1024/", "8192/")
    score = "final val_loss:2.77383724 val_bpb:1.07384722\n"
    paths = [str(log(tmp_path, HEAD + SCORE, "a.txt")), str(log(tmp_path, other + score, "b.txt"))]
    found = figures_of(capsys, *paths, "--mixed")
    assert found["summary"]["nats"] is None
    assert found["statements"][0] == "no mean of all runs: they differ in dataset"
    assert report.main([*paths, "--mixed", "--html", str(tmp_path / "page.html")]) == 0


def test_a_seed_that_the_name_contradicts_is_told(tmp_path) -> None:
    run = runlog.read_run(log(tmp_path, HEAD + SCORE, "train_seed42.log"))
    assert run.warnings == ["the log says seed 1337, the name of its file says 42"]


# === Encodings, compression, prefixes =============================================================
FORMS = {
    "utf-16 with a mark": lambda text: text.encode("utf-16"),
    "utf-16 without one": lambda text: text.encode("utf-16-le"),
    "utf-16, big end first": lambda text: text.encode("utf-16-be"),
    "utf-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "windows line ends": lambda text: text.replace("\n", "\r\n").encode(),
    "gzip": lambda text: gzip.compress(text.encode()),
    "bzip2": lambda text: bz2.compress(text.encode()),
    "xz of utf-16": lambda text: lzma.compress(text.encode("utf-16")),
    "zstd": lambda text: zstandard.compress(text.encode()),
    "two frames of zstd": lambda text: b"".join(
        zstandard.compress(part.encode()) for part in (text[:99], text[99:])
    ),
    "colours": lambda text: "".join(f"\x1b[32m{x}\x1b[0m\n" for x in text.splitlines()).encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_log_is_read_however_it_was_stored(tmp_path, form: str) -> None:
    content = FORMS[form](HEAD + SCORE)
    run = read(tmp_path, content)
    assert (run.seed, run.steps, run.score.bpb) == (1337, 1000, 1.19650941)


def test_a_log_in_zstd_without_the_package_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    said = reason(tmp_path, zstandard.compress(SCORE.encode()))
    assert said.endswith("is compressed with zstd: unpack it with zstd -d")


PREFIXES = [
    "[default0]:",
    "[rank0]: ",
    "0: ",
    "[1,0]<stdout>:",
    "(train_fn pid=4242, ip=10.0.0.7) ",
    "1711111111.123 ",
    "2026-04-01 12:34:56,789 INFO ",
    "2026-04-01 12:34:56,789 - trainer - INFO - ",
    "[2026-04-01 12:34:56,789][trainer][INFO] - ".replace(" - ", " "),
    "2026-04-01T12:34:56.789012345Z ",
    "[12:34:56] ",
    "INFO:root:",
    "[pod/trainer-0/main] ",
    "2026-04-01T12:34:56Z [default0]:",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_launchers_put_before_a_line_is_taken_off(tmp_path, prefix: str) -> None:
    settings = "Hyperparameters:\n  seed: 7\n  model_dim: 512\n"
    text = "".join(f"{prefix}{line}\n" for line in (settings + HEAD + SCORE).splitlines())
    run = read(tmp_path, text)
    assert (run.seed, run.config["model_dim"], run.score.bpb) == (7, "512", 1.19650941)
    assert run.sizes["val_tokens"] == 62021632


@pytest.mark.parametrize(
    "line", ["0/20000 val_loss: 9.0 val_bpb: 3.4", "step:1/9 train_loss:3.0", "  seed: 1"]
)
def test_a_line_of_a_log_is_no_prefix(line: str) -> None:
    assert plain_line(line) == line


def test_our_own_log_is_read_behind_prefixes_and_as_utf_16(tmp_path, capsys) -> None:
    path = Path(ours(tmp_path, {})[0])
    before = figures_of(capsys, str(path))["runs"][0]
    lines = path.read_text().splitlines()
    path.write_bytes("".join(f"[default0]:{line}\n" for line in lines).encode("utf-16"))
    assert figures_of(capsys, str(path))["runs"][0] == before


def test_bytes_that_are_no_utf_8_do_not_stop_a_log() -> None:
    assert decode(b"caf\xe9 val") == "caf\ufffd val"


# === One rule of bytes ============================================================================
def test_report_and_audit_judge_the_bytes_of_a_log_alike(tmp_path, capsys) -> None:
    text = HEAD.replace("62021632", "62027776")  # the same text, tokenised a little differently
    loss = 2.02025601
    for size, passed in ((151_080_891, True), (155_000_000, False)):
        bpb = loss / 0.6931471805599453 * 62027776 / size
        path = log(tmp_path, f"{text}final_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}\n")
        assert legality.implied_bytes(path).passed is passed
        assert audit.main(["--log", str(path)]) == (0 if passed else 1)
        assert report.main([str(path)]) == (0 if passed else 1)
    capsys.readouterr()


# === The terminal =================================================================================
def test_signs_that_the_terminal_lacks_are_replaced(tmp_path, monkeypatch) -> None:
    path = str(log(tmp_path, HEAD + SCORE))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["report.py", path])
    assert terminal.run(report.main) == 0
    stream.seek(0)
    assert "1.19651" in stream.read()


def test_a_closed_pipe_ends_a_program_quietly(tmp_path, monkeypatch, capfd) -> None:
    path = str(log(tmp_path, HEAD + SCORE))
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "argv", ["report.py", path])
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert terminal.run(report.main) == 0
    assert capfd.readouterr().err == ""


def test_ctrl_c_ends_a_tool_in_one_line(monkeypatch, capsys):
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["tools/audit.py"])
    assert terminal.run(interrupted) == 130
    assert capsys.readouterr().err == "audit.py: stopped before its end\n"
