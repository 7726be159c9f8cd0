"""One picture of a run: its loss along training, and its bits per byte after each stage.

    picture.py [LOG]    writes runs/<RUN_ID>/run.png or, without that folder, beside the log

LOG is by default the newest in logs/.

Exit status: 0 done, or matplotlib is missing, which is said; 2 there is no log of a finished run,
or the picture cannot be written.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import terminal  # noqa: E402
from run_documents import run_folder, written_at  # noqa: E402
from runlog import STAGES, LogError, Run, read_run  # noqa: E402

from train_gpt import UsageError, reason_of, write_atomic  # noqa: E402

BLUE = "#0b6bcb"
ORANGE = "#c4501b"


def newest_log(folder: Path) -> Path:
    """The log in a folder that was written last. Raises UsageError if there is none."""
    logs = sorted(folder.glob("*.txt"), key=written_at)
    if not logs:
        raise UsageError(f"{folder}: holds no log; make run writes one")
    return logs[-1]


def draw_loss(axes: Any, run: Run) -> None:
    """Draws the loss of training over its seconds. The first values would flatten the rest."""
    points = [point for point in run.points if "train_loss" in point and "seconds" in point]
    seconds = [point["seconds"] for point in points]
    losses = [point["train_loss"] for point in points]
    axes.plot(seconds, losses, marker="o", markersize=3, color=BLUE)
    if len(losses) > 6:
        shown = losses[3:]
        margin = 0.06 * (max(shown) - min(shown))
        if margin:
            axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set(title="Loss in training", xlabel="seconds", ylabel="nats per token")
    axes.grid(alpha=0.3)


def draw_scores(axes: Any, run: Run) -> None:
    """Draws a bar for each stage's bits per byte, and a line for gzip."""
    names = [STAGES[score.kind] for score in run.scores]
    values = [score.bpb for score in run.scores]
    bars = axes.barh(names, values, color=BLUE, height=0.55)
    labels = [f"{value:.4f}" for value in values]
    axes.bar_label(bars, labels, label_type="center", color="white")
    if "gzip_bpb" in run.final:
        gzip = run.final["gzip_bpb"]
        axes.axvline(gzip, color=ORANGE, linestyle="--", label=f"gzip -9: {gzip:.4f}")
        axes.legend(loc="lower right", fontsize=8)
        values = [*values, gzip]
    axes.set_xlim(0, 1.1 * max(values))
    axes.invert_yaxis()
    axes.set(title="Bits per byte, lower is better", xlabel="bits per byte")


def draw(run: Run, path: Path) -> None:
    """Writes the picture of a run. Raises OSError if it cannot; then an old one stays."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw_loss(left, run)
    draw_scores(right, run)
    figure.suptitle(f"{run.path.stem}: val_bpb {run.score.bpb:.4f}")
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    pyplot.close(figure)
    write_atomic(path, content.getvalue())


def main(argv: list[str]) -> int:
    """Draws the picture and says where it is. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", nargs="?", type=Path, help="default: the newest in logs/")
    args = parser.parse_args(argv)
    try:
        log = args.log or newest_log(Path("logs"))
        run = read_run(log)
    except LogError as error:
        print(f"picture.py: {log}: {error}", file=sys.stderr)
        return 2
    except UsageError as error:
        print(f"picture.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"picture.py: {reason_of(error)}", file=sys.stderr)
        return 2
    folder = run_folder(run)
    path = folder / "run.png" if folder else run.path.with_suffix(".png")
    try:
        draw(run, path)
    except ImportError:
        print("no picture: matplotlib is missing; make install brings it")
        return 0
    except OSError as error:
        print(f"picture.py: {reason_of(error)}", file=sys.stderr)
        return 2
    print(f"picture   {path}")
    return 0


if __name__ == "__main__":
    sys.exit(terminal.run(main))
