"""The charts of a report: one list of charts and of series, for the page and for the pictures.

`charts_of` says which charts there are, with titles and axes; `series_of` holds what they show of a
run, with its colour. report.html draws both with plotly, `write_pictures` with matplotlib: plotly
itself makes pictures only with a browser, which a machine for training may not have.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from run_documents import Profile, length_unit, loss_by_length, loss_by_position, read_documents
from runlog import STAGES, Phase, Run

# Colours on a light and on a dark ground; charts with more than eight runs vary the dashes.
PALETTE = {
    "light": (
        "#0b6bcb",
        "#c4501b",
        "#1a7f4e",
        "#8a3fb0",
        "#9a7408",
        "#c2255c",
        "#167f92",
        "#5c6470",
    ),
    "dark": (
        "#6cb2ff",
        "#ff9d66",
        "#5fd39a",
        "#cf97f2",
        "#e6c35c",
        "#ff85ad",
        "#5ccfe0",
        "#aab4c2",
    ),
}
DASHES = ("solid", "dash", "dashdot", "longdash")
BASELINE_DASH = "dot"

# The loss of a batch is noisy: its line is smoothed over this share of the points, at least two.
SMOOTH_SHARE = 0.02
NOISY = {"train_loss", "speed"}

# Training curves begin so high that the rest would look flat: their first 3 % decide no range.
SKIPPED_SHARE = 0.03
RANGE_MARGIN = 0.06  # of the range, above and below


# === Series: what the charts show of a run ========================================================


class Curve(NamedTuple):
    """A figure along training: equally long lists of its values and of three horizontal axes."""

    step: list[float]
    seconds: list[float]
    tokens: list[float]
    y: list[float]
    smooth: list[float]  # a smooth line through y, or [] of a figure without noise


class Series(NamedTuple):
    """All that the charts show of one run."""

    name: str
    baseline: bool
    colours: dict[str, str]  # by ground: light, dark
    dash: str
    curves: dict[str, Curve]  # by chart
    steps: int | None
    seconds: float | None  # of training
    stages: list[dict[str, Any]]  # kind and bpb of every complete score
    phases: list[Phase]
    limits: dict[str, float]  # seconds by budget
    profiles: dict[str, Profile]  # by chart
    length_unit: str

    def as_json(self) -> dict[str, Any]:
        """The series as the page reads it."""
        curves = {name: curve._asdict() for name, curve in self.curves.items()}
        profiles = {name: profile._asdict() for name, profile in self.profiles.items()}
        return self._asdict() | {"curves": curves, "profiles": profiles}


def series_of(runs: Sequence[Run], baseline: Sequence[Run]) -> list[Series]:
    """The series of the runs and of their baseline, in this order."""
    everything = [*runs, *baseline]
    return [one_series(run, i, run in baseline) for i, run in enumerate(everything)]


def one_series(run: Run, index: int, is_baseline: bool) -> Series:
    """The series of the run with a number, which decides its colour."""
    documents = read_documents(run).arrays
    profiles = {"length": loss_by_length(documents), "position": loss_by_position(documents)}
    row, column = divmod(index, len(PALETTE["light"]))
    dash = BASELINE_DASH if is_baseline else DASHES[row % len(DASHES)]
    return Series(
        name=run.label,
        baseline=is_baseline,
        colours={ground: colours[column] for ground, colours in PALETTE.items()},
        dash=dash,
        curves=training_curves(run),
        steps=run.steps,
        seconds=run.train_seconds,
        stages=[{"kind": STAGES[score.kind], "bpb": score.bpb} for score in run.scores],
        phases=run.phases,
        limits=run.limits,
        profiles={name: profile for name, profile in profiles.items() if profile},
        length_unit=length_unit(documents),
    )


def training_curves(run: Run) -> dict[str, Curve]:
    """Chart -> the curve that the lines of training make."""
    points = [point for point in run.points if point["step"] > 0]
    points.sort(key=lambda point: point["step"])
    timed = [point for point in points if point.get("seconds")]
    batch_tokens = float(run.config.get("train_batch_tokens") or 0)
    if run.steps and "train_tokens" in run.final:
        batch_tokens = run.final["train_tokens"] / run.steps

    curves = {}
    for name in ("train_loss", "val_bpb", "lr_scale"):
        with_figure = [point for point in points if math.isfinite(point.get(name, math.nan))]
        values = [point[name] for point in with_figure]
        curves[name] = curve_of(name, with_figure, values, timed, batch_tokens)

    ends = []
    speeds = []
    for before, after in itertools.pairwise(timed):
        seconds = after["seconds"] - before["seconds"]
        if batch_tokens and seconds > 0:
            ends.append(after)
            speeds.append(batch_tokens * (after["step"] - before["step"]) / seconds)
    curves["speed"] = curve_of("speed", ends, speeds, timed, batch_tokens)
    return curves


def curve_of(
    name: str,
    points: list[dict[str, float]],
    values: list[float],
    timed: list[dict[str, float]],
    batch_tokens: float,
) -> Curve:
    """The curve of a figure through points; seconds are interpolated between the known ones."""
    steps = [point["step"] for point in points]
    known_steps = [0.0, *(point["step"] for point in timed)]
    known_seconds = [0.0, *(point["seconds"] for point in timed)]
    seconds = np.interp(steps, known_steps, known_seconds)
    tokens = [step * batch_tokens for step in steps]
    smooth = smoothed(steps, values) if name in NOISY else []
    return Curve(steps, [float(second) for second in seconds], tokens, values, smooth)


def smoothed(steps: Sequence[float], values: Sequence[float]) -> list[float]:
    """A smooth line through noisy values: at each step a straight line fitted to those around it.

    Neighbours weigh less with their distance in points (Cleveland's local regression, with Gaussian
    weights). A straight line stays as it is, also at both ends. [] of fewer than five values.
    """
    number = len(values)
    if number < 5:
        return []
    width = max(2.0, SMOOTH_SHARE * number)
    places = np.arange(number)
    x = np.asarray(steps, np.float64)
    y = np.asarray(values, np.float64)
    line = []
    for i in range(number):
        weights = np.exp(-0.5 * ((places - i) / width) ** 2)
        distance = x - x[i]
        sums = [float((weights * distance**power).sum()) for power in (0, 1, 2)]
        determinant = sums[0] * sums[2] - sums[1] ** 2
        value = float((weights * y).sum())
        slope = float((weights * distance * y).sum())
        fit = (sums[2] * value - sums[1] * slope) / determinant if determinant > 0 else y[i]
        line.append(float(fit))
    return line


# === Charts =======================================================================================

# Horizontal axes of the curves -> (label, the page's button for it).
CURVE_AXES = {
    "step": ("step", "steps"),
    "seconds": ("training seconds", "time"),
    "tokens": ("training tokens", "tokens"),
}
PICTURE_AXES = ("step", "seconds")


class Chart(NamedTuple):
    """A chart of the page, and of the pictures."""

    id: str  # of its node; the name of its picture begins so
    kind: str  # curve, scores, budget or profile
    title: str
    x: str  # label of the horizontal axis; "" of a curve, whose axis the reader chooses
    y: str  # label of the vertical axis
    hover: str = ""  # format of a value under the pointer
    counted: str = ""  # what the number of a profile's point counts
    budget: str = ""  # what the phases of a budget's chart count against


CURVES = (
    Chart("train_loss", "curve", "Training loss", "", "nats per token", ".4f"),
    Chart("val_bpb", "curve", "Validation", "", "bits per byte", ".4f"),
    Chart("lr_scale", "curve", "Learning rate", "", "factor", ".4f"),
    Chart("speed", "curve", "Speed", "", "tokens per second", ",.0f"),
)
SCORES = Chart("scores", "scores", "Scores from phase to phase", "", "bits per byte", ".5f")
BUDGETS = {
    "train": "Training budget",
    "eval": "Evaluation budget",
    "none": "Outside both budgets",
}


def charts_of(series: list[Series]) -> list[Chart]:
    """The charts for which there is something to show, in the order of the page.

    The validation curve is always there: it also shows the complete scores after training.
    """
    charts = []
    for chart in CURVES:
        if chart.id == "val_bpb" or any(run.curves[chart.id].y for run in series):
            charts.append(chart)
    charts.append(SCORES)
    budgets = {phase.budget for run in series for phase in run.phases}
    for budget, title in BUDGETS.items():
        if budget in budgets:
            charts.append(
                Chart(f"budget_{budget}", "budget", title, "seconds", "", ".1f", budget=budget)
            )
    return charts + profile_charts(series)


def profile_charts(series: list[Series]) -> list[Chart]:
    """Loss by length and by position, where a run's folder has losses per document."""
    charts = []
    units = [run.length_unit for run in series if "length" in run.profiles]
    if units:
        charts.append(
            Chart(
                id="length",
                kind="profile",
                title="Loss by document length",
                x=f"document length, {units[0]}",
                y="bits per byte",
                hover=".4f",
                counted="documents",
            )
        )
    if any("position" in run.profiles for run in series):
        charts.append(
            Chart(
                id="position",
                kind="profile",
                title="Loss by position",
                x="position in the document, tokens",
                y="nats per token",
                hover=".4f",
                counted="tokens",
            )
        )
    return charts


def as_json(series: list[Series]) -> dict[str, Any]:
    """The part of the page's data that is about charts."""
    return {
        "runs": [run.as_json() for run in series],
        "charts": [chart._asdict() for chart in charts_of(series)],
        "axes": CURVE_AXES,
        "stages": list(STAGES.values()),
        "palette": PALETTE,
        "skipped_share": SKIPPED_SHARE,
        "range_margin": RANGE_MARGIN,
    }


# === Pictures =====================================================================================

LINE_STYLES = {
    "solid": "-",
    "dash": "--",
    "dashdot": "-.",
    "longdash": (0, (9, 3)),
    "dot": ":",
}


def write_pictures(series: list[Series], folder: Path) -> None:
    """Draws the charts as PNG files in `folder`; a chart without data makes none.

    A curve makes two, by step and by training seconds.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts_of(series):
        if chart.kind == "curve":
            for axis in PICTURE_AXES:
                write_curve(chart, axis, series, folder)
            continue
        with picture(folder / f"{chart.id}.png", chart.title, chart.x, chart.y) as axes:
            if chart.kind == "scores":
                draw_scores(axes, series)
            elif chart.kind == "budget":
                draw_bars(axes, chart.budget, series)
            else:
                draw_profile(axes, chart.id, series)


@contextlib.contextmanager
def picture(path: Path, title: str, x: str, y: str) -> Iterator[Any]:
    """Axes to draw on, which are saved at the end."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    yield axes
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write_curve(chart: Chart, axis: str, series: list[Series], folder: Path) -> None:
    """Draws a curve of every run along one of the axes."""
    curves = [run.curves[chart.id] for run in series]
    if not any(curve.y for curve in curves):
        return
    label, _ = CURVE_AXES[axis]
    with picture(folder / f"{chart.id}_by_{axis}.png", chart.title, label, chart.y) as axes:
        for run, curve in zip(series, curves, strict=True):
            draw_curve(axes, run, curve, axis)
        values = [y for curve in curves for y in values_for_range(getattr(curve, axis), curve.y)]
        margin = RANGE_MARGIN * (max(values) - min(values))
        if margin:
            axes.set_ylim(min(values) - margin, max(values) + margin)


def values_for_range(xs: list[float], ys: list[float]) -> list[float]:
    """The values that decide the vertical range: all but those of the first steps."""
    start = SKIPPED_SHARE * max(xs, default=0)
    return [y for x, y in zip(xs, ys, strict=True) if x >= start]


def draw_curve(axes: Any, run: Series, curve: Curve, axis: str) -> None:
    """Draws a curve: noisy values as pale points below their smooth line."""
    xs = getattr(curve, axis)
    if not curve.smooth:
        draw_line(axes, run, xs, curve.y)
        return
    axes.plot(xs, curve.y, ".", markersize=3, alpha=0.3, color=run.colours["light"])
    draw_line(axes, run, xs, curve.smooth)


def draw_line(axes: Any, run: Series, xs: Sequence[Any], ys: Sequence[float]) -> None:
    """Draws a line of a run in its colour."""
    axes.plot(
        xs,
        ys,
        marker="o",
        markersize=2.5,
        linewidth=1.3,
        label=run.name,
        color=run.colours["light"],
        linestyle=LINE_STYLES[run.dash],
    )


def draw_scores(axes: Any, series: list[Series]) -> None:
    """Draws every run's scores, in the order of the stages."""
    kinds = {stage["kind"] for run in series for stage in run.stages}
    axes.xaxis.update_units([kind for kind in STAGES.values() if kind in kinds])
    for run in series:
        names = [stage["kind"] for stage in run.stages]
        draw_line(axes, run, names, [stage["bpb"] for stage in run.stages])


def draw_profile(axes: Any, name: str, series: list[Series]) -> None:
    """Draws the loss by length or by position of every run that has it."""
    for run in series:
        profile = run.profiles.get(name)
        if profile:
            draw_line(axes, run, profile.x, profile.y)
    axes.set_xscale("symlog")


def draw_bars(axes: Any, budget: str, series: list[Series]) -> None:
    """Draws the phases of a budget as one stacked bar a run, the first on top, and its limits."""
    names = [run.name for run in series]
    left = [0.0 for _ in series]
    for k, phase in enumerate(phases_of(budget, series)):
        widths = [seconds_of(phase, budget, run) for run in series]
        colour = PALETTE["light"][k % len(PALETTE["light"])]
        axes.barh(names, widths, left=left, label=phase, color=colour, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    limits = {run.limits.get(budget, 0) for run in series}
    for limit in limits - {0}:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    axes.invert_yaxis()


def phases_of(budget: str, series: list[Series]) -> Iterable[str]:
    """The names of the phases that count against a budget, each once."""
    phases = [phase for run in series for phase in run.phases]
    return dict.fromkeys(phase.name for phase in phases if phase.budget == budget)


def seconds_of(phase: str, budget: str, run: Series) -> float:
    """Seconds that a run spent in a phase of a budget."""
    return sum(p.seconds for p in run.phases if p.name == phase and p.budget == budget)
