"""One claim: report.py and pack.py write one submission.json, --check takes the field's forms.

The five folders of other people have the form of accepted records; every value in them is invented.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("rich")
pytest.importorskip("scipy")
sys.path.insert(0, str(ROOT / "tools"))
import commitment
import pack
import report
from test_pack import ARTIFACT, make, sha256, write_run

BPB_OF_A_NAT = 1 / math.log(2) / 3  # of the runs of `write_run`: 10 tokens, 30 bytes


def run_of(root: Path, seed: int, loss: float = 3.0, **figures: object) -> Path:
    """A run whose score implies the bytes of its text."""
    return write_run(root, seed, val_loss=loss, val_bpb=loss * BPB_OF_A_NAT, **figures)


def claimed(*more: str) -> list[str]:
    """What a command line claims."""
    return ["--name", "Loops, gates", "--author", "A. Nother", "--track", "track_10min_16mb", *more]


def audited(run: Path) -> None:
    """Leaves an audit of its artifact in a run's folder."""
    held = {"causal": {"passed": True, "evidence": run.name}}
    audit = {"artifact_sha256": sha256((run / ARTIFACT).read_bytes()), "properties": held}
    (run / "audit.json").write_text(json.dumps(audit))


def packed_record(
    root: Path, monkeypatch, *more: object, finish: Callable[[Path], None] = lambda run: None
) -> Path:
    """The folder that pack.py --records writes for the runs of seeds 1 to 3, once `finish` has been
    called with the folder of each.
    """
    monkeypatch.chdir(root)
    runs = [run_of(root, seed, 3.0 + seed / 100) for seed in (1, 2, 3)]
    for run in runs:
        finish(run)
    logs = [f"logs/s{seed}.txt" for seed in (2, 3)]
    options = ["--records", "records", *claimed(), "--log", *logs, "--date", "2026-11-30"]
    assert pack.main([str(runs[0]), *options, *map(str, more)]) == 0
    return root / "records/track_10min_16mb/2026-11-30_Loops_gates"


# === One writer ===================================================================================
@pytest.mark.parametrize("finish", [lambda run: None, audited], ids=["plain", "audited"])
def test_report_and_pack_write_one_file(tmp_path, monkeypatch, finish) -> None:
    folder = packed_record(tmp_path, monkeypatch, finish=finish)
    logs = [f"logs/s{seed}.txt" for seed in (1, 2, 3)]
    options = ["--submission", "mine.json", *claimed("--date", "2026-11-30")]
    assert report.main([*logs, *options]) == 0
    assert Path("mine.json").read_bytes() == (folder / "submission.json").read_bytes()


def test_the_claim_has_the_fields_of_accepted_records_and_ours(tmp_path, monkeypatch) -> None:
    claim = json.loads((packed_record(tmp_path, monkeypatch) / "submission.json").read_text())
    field = "author github_id name blurb date track val_loss val_bpb val_loss_std val_bpb_std seeds"
    field += " seed_results bytes_total bytes_code hardware pytorch_version technique_summary"
    field += " compliance comparison"
    ours = "val_sha256 tokenizer_sha256 code_sha256 dataset counted_files bytes_limit"
    assert set(f"{field} {ours}".split()) <= claim.keys()
    assert (claim["track"], claim["author"]) == ("10min_16mb", "A. Nother")
    assert {"val_bpb", "val_loss", "artifact_bytes", "steps", "train_time_s"} <= claim[
        "seed_results"
    ]["2"].keys()
    assert claim["technique_summary"] == "PRESET=cpu COMPILE=False"


def test_compliance_is_stated_where_the_logs_prove_it(tmp_path, monkeypatch) -> None:
    claim = json.loads((packed_record(tmp_path, monkeypatch) / "submission.json").read_text())
    assert claim["compliance"] == {
        "train_under_600s": True,
        "artifact_under_16mb": True,
        "three_seeds": True,
    }  # the logs have no evaluation, and nobody has audited


def test_an_audit_states_compliance_in_the_fields_names(tmp_path) -> None:
    run = run_of(tmp_path, 1, quantized_ttt_lora_bpb=3 * BPB_OF_A_NAT, quantized_ttt_lora_loss=3.0)
    held = {name: {"passed": True, "evidence": ""} for name in ("causal", "score_first")}
    audit = {"artifact_sha256": sha256((run / ARTIFACT).read_bytes()), "properties": held}
    (run / "audit.json").write_text(json.dumps(audit))
    claim = json.loads(make(run, tmp_path / "out")["submission.json"])
    assert {"score_first_ttt", "no_slot", "causal", "score_first"} <= {
        name for name, holds in claim["compliance"].items() if holds
    }


def test_audits_of_all_seeds_travel_and_state_compliance(tmp_path, monkeypatch) -> None:
    folder = packed_record(tmp_path, monkeypatch, finish=audited)
    assert {path.name for path in folder.glob("audit*")} == {
        *("audit.json", "audit_seed2.json", "audit_seed3.json")
    }
    claim = json.loads((folder / "submission.json").read_text())
    assert claim["compliance"]["causal"] is True
    assert claim["compliance_evidence"]["causal"] == {"1": "s1", "2": "s2", "3": "s3"}
    (folder / "audit_seed3.json").write_text('{"properties": {"causal": {"passed": false}}}')
    assert "audit_seed3.json: says that causal does not hold" in problems(folder)


def test_the_date_is_that_of_the_run(tmp_path) -> None:
    run = run_of(tmp_path, 1, run_id="20260415-120000_cpu_seed1")
    claim = json.loads(make(run, tmp_path / "out")["submission.json"])
    assert claim["date"] == "2026-04-15"


# === The folder of a record =======================================================================
def test_a_record_has_no_weights_unless_asked(tmp_path, monkeypatch) -> None:
    folder = packed_record(tmp_path, monkeypatch)
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "SHA256SUMS", "requirements.txt", "submission.json"),
        *("train_gpt.py", "train_gpt_readable.py"),
        *("train_seed1.log", "train_seed2.log", "train_seed3.log"),
    }
    assert pack.main(["--check", str(folder)]) == 0
    shutil.rmtree(tmp_path / "runs"), shutil.rmtree(tmp_path / "records")
    assert (packed_record(tmp_path, monkeypatch, "--weights") / ARTIFACT).is_file()


def test_the_newest_run_is_packed_where_none_is_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert pack.main(["--records", "records", *claimed()]) == 2
    assert "runs: holds no run with an artifact" in capsys.readouterr().err
    run_of(tmp_path, 4)
    assert pack.main(["--records", "records", *claimed("--date", "2026-11-30")]) == 0
    assert (tmp_path / "records/track_10min_16mb/2026-11-30_Loops_gates").is_dir()


def test_a_record_without_name_author_or_track_is_refused(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    run_of(tmp_path, 1)
    assert pack.main(["--records", "records", "--name", "n"]) == 2
    assert "--author, --track: missing; make pack NAME=" in capsys.readouterr().err


def test_the_readme_has_what_reviewers_look_for(tmp_path, monkeypatch) -> None:
    text = (packed_record(tmp_path, monkeypatch) / "README.md").read_text()
    for heading in ("Files", "Train", "Score the artifact", "Compliance", "Credits"):
        assert f"\n## {heading}\n" in text
    assert "| 2 | 1.45231 | 3.02000 |" in text
    assert "SEED=1 DATA_DIR=DATA python train_gpt.py" in text
    assert "EVAL_ONLY_PATH=ARTIFACT python FOLDER/train_gpt.py" in text
    assert (
        "| 3. Score first. Nothing is learnt from a token before its score. | not shown |" in text
    )


def test_a_baseline_is_told_with_p_and_kept(tmp_path, monkeypatch) -> None:
    old = tmp_path / "old"
    for seed in (1, 2, 3):
        run_of(old, seed, 3.2 + seed / 100)
    logs = [old / "logs" / f"s{seed}.txt" for seed in (1, 2, 3)]
    folder = packed_record(tmp_path, monkeypatch, "--baseline", *logs)
    comparison = json.loads((folder / "submission.json").read_text())["comparison"]
    assert comparison["delta_bpb"] == pytest.approx(-0.2 * BPB_OF_A_NAT)
    assert 0 < comparison["p_value"] < 1e-4
    assert (
        "better by 0.09618 bpb (0.20000 nats per token), p " in (folder / "README.md").read_text()
    )
    assert len(list((folder / "baseline").iterdir())) == 3
    change(folder, delta_bpb=-0.3, key="comparison")
    assert problems(folder) == ["submission.json: comparison is not what logs and files say"]


def test_baselines_of_one_name_are_refused(tmp_path, monkeypatch, capsys) -> None:
    logs = []
    for number in (1, 2):
        run_of(tmp_path / str(number), number)
        logs.append(tmp_path / str(number) / "train.log")
        (tmp_path / str(number) / "logs" / f"s{number}.txt").rename(logs[-1])
    run = run_of(tmp_path, 3)
    assert pack.main([str(run), str(tmp_path / "out"), "--baseline", *map(str, logs)]) == 2
    assert "2/train.log: is not the only one called train.log" in capsys.readouterr().err


@pytest.mark.parametrize("track", ["10min_16mb", "track_10min_16mb"])
def test_the_folder_of_a_track_has_one_name(tmp_path, monkeypatch, track: str) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_of(tmp_path, 1)
    options = ["--records", "records", "--name", "n", "--author", "a", "--track", track]
    assert pack.main([str(run), *options, "--date", "2026-99-99"]) == 2
    assert pack.main([str(run), *options, "--date", "2026-11-30"]) == 0
    assert Path("records/track_10min_16mb/2026-11-30_n").is_dir()


def with_documents(root: Path) -> Path:
    """A run that commits to the scores of two documents."""
    documents = {
        "doc_nats": np.array([10.0, 20.0]),
        "doc_bytes": np.array([12, 18]),
        "doc_tokens": np.array([4, 6]),
    }
    run = run_of(root, 1, documents_sha256=commitment.root(documents), val_docs=2)
    np.savez(run / "documents.npz", **documents)
    return run


def test_documents_travel_and_must_be_those_that_the_log_commits_to(tmp_path) -> None:
    run = with_documents(tmp_path)
    folder = tmp_path / "out"
    files = make(run, folder)
    assert files["documents.npz"] == (run / "documents.npz").read_bytes()
    assert "`documents.npz` holds the score of every document" in files["README.md"].decode()
    in_log(folder, '"val_tokens": 10', '"val_tokens": 9', "train_seed1.log")
    assert "train_seed1.log: val_tokens is 9 in the final line, 10 by the documents" in problems(
        folder
    )
    in_log(folder, '"val_tokens": 9', '"val_tokens": 10', "train_seed1.log")
    arrays = dict(np.load(folder / "documents.npz"))
    np.savez(folder / "documents.npz", **arrays | {"doc_nats": np.array([10.0, 19.0])})
    line = "documents.npz: no log commits to these documents (documents_sha256)"
    assert problems(folder) == [line]
    np.savez(folder / "documents.npz", **arrays | {"doc_tokens": np.array([-1, 11])})
    assert problems(folder) == ["documents.npz holds doc_tokens that count nothing"]
    (folder / "documents.npz").write_bytes(b"PK")
    assert [line for line in problems(folder) if line.endswith(": cannot be read")]
    (folder / "documents.npz").unlink()
    line = "documents.npz: missing, so no score can be computed from its documents"
    assert problems(folder) == [line]


def test_a_packed_log_is_read_as_report_reads_it(tmp_path) -> None:
    run = run_of(tmp_path, 1)
    log = tmp_path / "logs" / "s1.txt"
    (tmp_path / "source.py").write_bytes(log.read_bytes().split(b"\nHyperparameters:")[0])
    log.write_bytes(gzip.compress(log.read_bytes()))
    make(run, tmp_path / "out", "--source", tmp_path / "source.py")


PLAIN = {"PATH": os.environ["PATH"]}


def make_pack(*variables: str) -> list[str]:
    """The arguments with which `make pack` of these variables calls Python."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "python")
        python.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
        python.chmod(0o755)
        command = ["make", "--no-print-directory", "-s", "-o", "install", f"BIN={folder}", "pack"]
        done = subprocess.run(
            [*command, *variables], cwd=ROOT, env=PLAIN, capture_output=True, text=True, check=True
        )
    return done.stdout.split("\0")[:-1]


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_pack_writes_a_record() -> None:
    name = """It's "a name" """
    arguments = make_pack(f"NAME={name}", "AUTHOR=A. Nother", "TRACK=track_x", "RUN=runs/x y")
    assert arguments[:4] == ["tools/pack.py", "runs/x y", "--records", "records"]
    given = dict(zip(arguments[4::2], arguments[5::2], strict=True))
    assert (given["--name"], given["--author"], given["--track"]) == (name, "A. Nother", "track_x")
    assert given["--github-id"] == given["--blurb"] == given["--date"] == ""
    folder_of_run = make_pack("RUN=runs/weird id")
    assert folder_of_run == ["tools/pack.py", "runs/weird id", "runs/weird id/submission"]


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_pack_of_nothing_says_what_to_name() -> None:
    command = ["make", "--no-print-directory", "-o", "install", "pack"]
    done = subprocess.run(command, cwd=ROOT, env=PLAIN, capture_output=True, text=True, check=False)
    said = "make pack: name a run, RUN=runs/ID, or the submission, NAME= AUTHOR= TRACK=\n"
    assert (done.returncode, done.stdout) == (2, said)


# === What passed and must not =====================================================================
def problems(folder: Path) -> list[str]:
    """The lines of --check, apart from those on sums."""
    files = pack.load(folder).files
    if "SHA256SUMS" in files:
        files["SHA256SUMS"] = pack.make_sums(files)
    return list(pack.check(files))


def change(folder: Path, key: str = "", **figures: Any) -> None:
    """Changes fields of the claim, or of the dict in its field `key`."""
    path = folder / "submission.json"
    claim = json.loads(path.read_text())
    (claim[key] if key else claim).update(figures)
    path.write_text(json.dumps(claim))


def in_log(folder: Path, old: str, new: str, name: str = "train_seed2.log") -> None:
    """Changes a log."""
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (
            lambda folder: in_log(folder, "num_layers: 4", "num_layers: 5"),
            "NUM_LAYERS: differs between the logs: 4, 5",
        ),
        (
            lambda folder: in_log(
                folder, "\nfinal {", "\nall of eval    700.1  of 600, OVER\nfinal {"
            ),
            "train_seed2.log: eval took 700.1 s of 600, OVER",
        ),
        (
            lambda folder: (folder / "audit.json").write_text(
                '{"artifact_sha256": "", "properties": {"causal": {"passed": false}}}'
            ),
            "audit.json: says that causal does not hold",
        ),
        (
            lambda folder: change(folder, val_bpb=math.nan, val_loss=1),
            "submission.json: val_bpb is not what logs and files say",
        ),
        (
            lambda folder: change(folder, val_loss=10**400),
            "submission.json: val_loss is not what logs and files say",
        ),
        (
            lambda folder: change(folder, val_loss=3, val_bpb=1),
            "submission.json: val_loss is not what logs and files say",
        ),
        (
            lambda folder: in_log(
                folder, "num_layers: 4", "val_doc_fraction: all (env)\n  num_layers: 4"
            ),
            "train_seed2.log: VAL_DOC_FRACTION=all: is no number",
        ),
        (
            lambda folder: (
                (folder / "baseline").mkdir()
                or (folder / "baseline" / "train.log").write_text("step:1\n")
            ),
            "baseline/train.log: holds no score",
        ),
        (lambda folder: change(folder, date="2026-99-99"), "submission.json: date '2026-99-99'"),
        (lambda folder: change(folder, name=" "), "submission.json: name is empty"),
        (lambda folder: change(folder, date="May"), "submission.json: date 'May' does not begin"),
        (
            lambda folder: change(folder, key="compliance", score_first_ttt=False),
            "submission.json: compliance says that score_first_ttt does not hold",
        ),
    ],
)
def test_what_passed_before_is_refused(tmp_path, monkeypatch, damage: Callable, line: str) -> None:
    folder = packed_record(tmp_path, monkeypatch)
    damage(folder)
    found = problems(folder)
    assert [text for text in found if text.startswith(line)], found


def test_free_fields_and_files_are_left_alone(tmp_path, monkeypatch) -> None:
    folder = packed_record(tmp_path, monkeypatch)
    change(folder, attribution={"loops": "PR #1"}, gpu_hours=3, author="B", val_bpb=1.4523)
    (folder / "tokenizers").mkdir()
    (folder / "tokenizers" / "mine.model").write_bytes(b"x")
    (folder / "loss.png").write_bytes(b"\x89PNG")
    (folder / "more").mkdir()
    shutil.copy(folder / "train_seed1.log", folder / "more" / "another.log")
    claim = json.loads((folder / "submission.json").read_text())
    del claim["seeds"]
    (folder / "submission.json").write_text(json.dumps(claim))
    assert pack.main(["--seal", str(folder)]) == 0


# === Folders in the form of accepted records ======================================================
def words_log(seed: int, loss: float, total: int, *more: str, seconds: float = 599.9) -> str:
    """A log of the early form: words, steps, a score with and without all its digits."""
    bpb = loss / math.log(2) * 62021632 / 151080363
    lines = [
        "train_loader:dataset:fineweb10B_sp1024 train_shards:80",
        "val_loader:shards pattern=/data/fineweb10B_sp1024/fineweb_val_*.bin tokens:62021632",
        "train_batch_tokens:524288 train_seq_len:1024 iterations:20000",
        f"seed:{seed}",
        f"step:9000/20000 val_loss:2.0 val_bpb:1.18 train_time:{seconds * 1000:.0f}ms",
        f"stopping_early: wallclock_cap train_time:{seconds * 1000:.0f}ms step:9000/20000",
        "Total submission size: 67272625 bytes",
        f"Total submission size int6+zstd: {total} bytes",
        f"final_int6_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:2000ms",
        f"final_int6_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}",
        *more,
    ]
    return "\n".join(lines) + "\n"


def block_log(seed: int, loss: float, total: int) -> str:
    """A log of the later form: a block of settings and an adapted score."""
    bpb = loss / math.log(2) * 40540160 / 151078222
    lines = [
        "Hyperparameters:",
        "  datasets_dir: ./data/datasets/fineweb10B_sp8192",
        f"  seed: {seed}",
        "val_tokens: 40540160",
        "4800/20000 train_loss: 2.6 train_time: 9.9m tok/s: 6500000",
        "stopping_early: wallclock_cap train_time: 599571ms step: 4850/20000",
        f"Total submission size quantized+brotli: {total} bytes",
        f"quantized_ttt_phased val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:412345ms",
    ]
    return "\n".join(lines) + "\n"


def bpb_of(log: str) -> float:
    """The last score in a log."""
    return float(log.rsplit("val_bpb:", 1)[1].split()[0])


def write(folder: Path, claim: dict[str, Any], files: dict[str, str]) -> Path:
    """A folder with a claim, files, a script and a page."""
    plain = {"train_gpt.py": "import torch\n", "README.md": "# A record\n"}
    for name, text in {**plain, "submission.json": json.dumps(claim), **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def one_log(folder: Path) -> Path:
    """A first entry: one log, a claim with bytes."""
    log = words_log(1337, 2.05, 15_800_001)
    claim = {"author": "Ann", "github_id": "ann", "name": "Wider", "blurb": "Wider MLP."}
    claim |= {"date": "2026-03-19T10:00:00Z", "val_loss": 2.05, "val_bpb": bpb_of(log)}
    return write(
        folder, claim | {"bytes_total": 15_800_001, "bytes_code": 50_000}, {"train.log": log}
    )


def three_seeds(folder: Path) -> Path:
    """Three seeds with rounded results, a picture and requirements."""
    logs = {seed: words_log(seed, 1.93 + seed / 1e6, 15_700_000 + seed) for seed in (7, 42, 1337)}
    scores = {seed: bpb_of(log) for seed, log in logs.items()}
    claim = {"author": "Ben", "github_id": "ben", "name": "SWA + Int6", "date": "2026-03-20"}
    claim |= {"track": "10min_16mb", "val_bpb": round(sum(scores.values()) / 3, 4)}
    claim |= {"seeds": list(logs), "hardware": "8xH100 80GB SXM", "pytorch_version": "2.9.1+cu128"}
    claim["seed_results"] = {
        str(seed): {"val_bpb": round(bpb, 5), "artifact_bytes": 15_700_000 + seed, "steps": 9000}
        for seed, bpb in scores.items()
    }
    files = {f"train_seed{seed}.log": log for seed, log in logs.items()}
    return write(folder, claim, files | {"requirements.txt": "torch\n", "curve.png": "png"})


def later_form(folder: Path) -> Path:
    """Logs in a folder of their own, compliance, attribution, a tokenizer, helper scripts."""
    logs = {seed: block_log(seed, 2.77 + seed / 1e5, 15_950_000 - seed) for seed in (0, 1, 2)}
    scores = [bpb_of(log) for log in logs.values()]
    claim = {"author": "Cy", "github_id": "cy", "name": "VarLen", "date": "2026-04-14"}
    claim |= {"val_bpb": sum(scores) / 3, "val_bpb_std": 0.0, "bytes_total": 15_950_000}
    claim |= {"compliance": {"eval_under_600s": True, "no_slot": True, "three_seeds": True}}
    claim |= {"attribution": {"base": "PR #1"}, "technique_summary": "VarLen + TTT"}
    claim["val_bpb_std"] = round((sum((x - claim["val_bpb"]) ** 2 for x in scores) / 2) ** 0.5, 6)
    files = {f"logs/train{seed}.txt": log for seed, log in logs.items()}
    files |= {"tokenizers/sp.model": "x", "tokenizers/sp.vocab": "y", "prepare_data.py": "1\n"}
    return write(folder, claim, files)


def reruns(folder: Path) -> Path:
    """Results in `seeds`, by seed; originals beside the reruns that are claimed."""
    files = {}
    seeds = {}
    for seed in (42, 314, 999):
        rerun = block_log(seed, 2.32 + seed / 1e6, 15_960_000)
        files[f"train_seed{seed}_original.log"] = block_log(seed, 2.33, 15_961_000)
        files[f"train_seed{seed}_rerun.log"] = rerun
        seeds[str(seed)] = {"val_bpb": bpb_of(rerun), "bytes_total": 15_960_000}
    mean = sum(result["val_bpb"] for result in seeds.values()) / 3
    claim = {"name": "Momentum 0.97", "author": "di", "github_id": "di", "date": "2026-04-29"}
    claim |= {"val_bpb": round(mean, 8), "seeds": seeds, "base_pr": 1, "bytes_total": 15_960_000}
    return write(folder, claim, files)


def unlimited(folder: Path) -> Path:
    """A non-record of four hours with versions of one seed; the best one is claimed."""
    versions = {
        f"train_v{i}.txt": words_log(1, 2.03 - i / 100, 15_900_000, seconds=14400) for i in range(3)
    }
    claim = {"author": "Eve", "github_id": "eve", "name": "4 hours", "date": "2026-03-18T11:53:00Z"}
    claim |= {"track": "non-record-unlimited-compute-16mb", "bytes_total": 15_900_000}
    claim["val_bpb"] = bpb_of(versions["train_v2.txt"])
    return write(folder, claim, versions)


FORMS = [one_log, three_seeds, later_form, reruns, unlimited]


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_in_the_form_of_an_accepted_record_is_accepted(tmp_path, capsys, form) -> None:
    assert pack.main(["--check", str(form(tmp_path))]) == 0
    assert "in the form of the accepted records" in capsys.readouterr().out


@pytest.mark.parametrize("form", FORMS)
def test_a_better_score_in_such_a_folder_is_found(tmp_path, form) -> None:
    folder = form(tmp_path)
    change(folder, val_bpb=1.0123)
    assert "submission.json: val_bpb is not what logs and files say" in problems(folder)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (
            lambda folder: in_log(
                folder, "train_seq_len:1024", "train_seq_len:2048", "train_seed42.log"
            ),
            "TRAIN_SEQ_LEN: differs between the logs: 1024, 2048",
        ),
        (
            lambda folder: in_log(folder, "599900ms", "617000ms", "train_seed42.log"),
            "train_seed42.log: train took 617.0 s of 600, OVER",
        ),
        (
            lambda folder: in_log(folder, "zstd: 1570", "zstd: 1670", "train_seed42.log"),
            "train_seed42.log: code and model take 16700042 bytes",
        ),
        (
            lambda folder: (folder / "train_seed7.log").unlink(),
            "submission.json: no log is of seed 7",
        ),
        (
            lambda folder: in_log(folder, "tokens:62021632", "tokens:9662464", "train_seed42.log"),
            "train_seed42.log: covers 9,662,464 validation tokens",
        ),
        (lambda folder: (folder / "README.md").unlink(), "README.md: missing"),
        (lambda folder: change(folder, name=""), "submission.json: name is empty"),
        (
            lambda folder: change(folder, seed_results={"7": {"val_bpb": 1.0}}),
            "submission.json: seed_results is not what logs and files say",
        ),
        (
            lambda folder: (
                (folder / "train_gpt.py").write_text("exec(open('x').read())\nimport x\n")
                and (folder / "x.py").write_text("1\n")
            ),
            "x.py: train_gpt.py imports it, but its 2 bytes are not counted",
        ),
    ],
)
def test_a_wrong_claim_in_such_a_folder_is_found(tmp_path, damage: Callable, line: str) -> None:
    folder = three_seeds(tmp_path)
    damage(folder)
    found = problems(folder)
    assert [text for text in found if text.startswith(line)], found
