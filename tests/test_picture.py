"""The picture of a run."""

from __future__ import annotations

import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import picture


@pytest.fixture
def log(tmp_path, monkeypatch) -> Path:
    """A kept log in the folder logs/ of an empty working folder."""
    monkeypatch.chdir(tmp_path)
    kept = min((ROOT / "logs").glob("*_seed*.txt"))
    (tmp_path / "logs").mkdir()
    return Path(shutil.copy(kept, tmp_path / "logs" / "kept.txt"))


def test_newest_log_becomes_a_picture_with_loss_and_scores(log, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = {}
    for name in ("draw_loss", "draw_scores"):
        function = getattr(picture, name)

        def keep(axes, run, name=name, function=function):
            function(axes, run)
            drawn[name] = axes

        monkeypatch.setattr(picture, name, keep)
    assert picture.main([]) == 0
    assert capsys.readouterr().out == "picture   logs/kept.png\n"
    data = log.with_suffix(".png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000
    losses = drawn["draw_loss"].lines[0].get_ydata()
    run = picture.read_run(log)
    assert list(losses) == [point["train_loss"] for point in run.points if "train_loss" in point]
    bars = [bar.get_width() for bar in drawn["draw_scores"].patches]
    assert bars == [score.bpb for score in run.scores]


def test_without_matplotlib_a_line_says_so_and_nothing_fails(log, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert picture.main([str(log)]) == 0
    assert capsys.readouterr().out.startswith("no picture: matplotlib is missing")


def test_a_full_disk_is_one_line_and_the_old_picture_stays(log, capsys):
    pytest.importorskip("matplotlib")
    old = log.with_suffix(".png")
    old.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        assert picture.main([]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert capsys.readouterr().err == "picture.py: logs/kept.png: File too large\n"
    assert old.read_bytes() == b"old" and not list(log.parent.glob("*.part"))


def test_without_a_finished_run_there_is_one_line_and_status_2(log, capsys, tmp_path):
    log.write_text("step:1/2 train_loss:3.0\n")
    assert picture.main([]) == 2
    log.unlink()
    assert picture.main([]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("picture.py: logs/kept.txt: ")
    assert second == "picture.py: logs: holds no log; make run writes one"


def test_make_run_ends_with_samples_and_picture():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.split("\nrun: install\n")[1].split("\n\n")[0]
    last = [f"\t$(BIN)/python tools/{name}.py" for name in ("samples", "picture")]
    assert recipe.splitlines()[-2:] == last
    needed = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert "\nmatplotlib\n" in needed


def test_budgets_of_make_run_fit_a_demonstration_of_about_five_minutes():
    import train_gpt as tg

    cfg, _ = tg.Config.from_env({"PRESET": "cpu"}, has_cuda=False)
    assert cfg.max_wallclock_seconds + cfg.eval_deadline_seconds <= 5.5 * 60
