"""From logs to a defended result: a row per run, then mean, deviation and what they allow to say.

    report.py logs/*_seed*.txt                                    # the table, on the terminal
    report.py new*.txt --baseline old*.txt                        # is it better? is it a record?
    report.py logs/*.txt --html out.html --png pictures           # curves, budgets, profiles
    report.py logs/*.txt --markdown README.md --submission submission.json --name "what was run"
    report.py --compare logs/compare-*.txt                        # presets side by side
    report.py --history logs/*.txt --html out.html                # every run so far, newest first

It reads the logs of train_gpt.py (the one `final {json}` line, the phase table, the config) and
those of the public records (Hyperparameters or key:value headers, `LABEL val_loss:X val_bpb:Y`,
whatever the label).

Only runs of one code and one configuration are seeds of one claim. Others are refused with the
knobs that differ; --mixed takes them all the same and gives mean and deviation per configuration
too. A log given twice is always refused. --compare takes other presets and knobs, a row each over
its seeds, but one code, one data set, one budget of training and one machine. Logs of runs that did
not finish are left out and named; only --submission refuses them.

--history takes every run there is, whatever it ran, and makes no claim: newest first, a mean for
each configuration.

Bytes: val_loss, val_bpb and the number of tokens imply how many bytes were counted. Every score
line is checked against the run's own val_bytes and against the canonical validation sets; a
denominator that is 0.01 % off is INVALID (exit status 1).

Difference (--baseline): Welch's test between the two sets of runs, one-sided, in nats and in bits
per byte. There are two bars: better at all (p < 0.01; the public frontier has accepted 0.25), and
the record bar, more than 0.005 nats per token better at p < 0.01, which tests against the shifted
hypothesis. `runs a side` is how many would show a true difference of the size seen with 80 % power,
if both spreads stay as they are. Scores of different validation texts are refused.

Pairs are sharper by far. Runs of one artifact (same hash: only the evaluation differs), or else
runs of one seed, are compared pair by pair. Where the folders of two such runs (runs/<RUN_ID>, next
to the logs' folder) hold losses per document, a .npz with `doc_nats` and `doc_bytes`, they are
compared document by document as well: that shows whether a difference holds over texts, not over
seeds. `doc_tokens`, and `pos_nats`, `pos_tokens` (sums per position bin) with `pos_edges`, make the
charts by length and by position.

Exit status: 0 done, 1 a score is INVALID, 2 wrong input (one line).
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import charts  # noqa: E402
import submission  # noqa: E402
import systems  # noqa: E402
import terminal  # noqa: E402
from claims import (  # noqa: E402
    broken_limits,
    check_claim,
    check_texts,
    denominator,
    group_by_configuration,
    read_finished,
    score_problems,
    without_copies,
)
from comparison import (  # noqa: E402
    compare,
    count,
    mean_sentence,
    spread_text,
    summarise,
    verdict,
    visible_sentence,
)
from run_documents import read_documents, read_samples, worst_documents  # noqa: E402
from runlog import STAGES, STARTED, Run  # noqa: E402
from tables import DASH, MarksError, markdown_table, replace_block, show  # noqa: E402

from train_gpt import MAX_LOG_BYTES, UsageError, open_regular, write_atomic  # noqa: E402

# Runs of a history that the charts show at first; a click on its name shows another.
MOST_SHOWN = 6

BEGIN = "<!-- report:begin -->"
END = "<!-- report:end -->"


# === What is reported =============================================================================


class Report:
    """All that the outputs show of some runs and, where there is one, of their baseline."""

    def __init__(
        self,
        runs: list[Run],
        baseline: list[Run],
        mixed: dict[str, list[str]],
        left_out: list[str],
        history: list[list[Run]] | None = None,
    ):
        """Names the runs. `mixed`: the differences within `runs`; `left_out`: why logs are not.

        With a `history`, the runs of each configuration, newest first, the figures are of the first
        configuration alone.
        """
        self.history = history
        self.runs = runs
        self.baseline = baseline
        self.everything = runs + baseline
        self.mixed = mixed
        name_runs(self.everything)
        self.summary = summarise(history[0] if history else runs)
        self.base_summary = summarise(baseline) if baseline else None
        self.comparison = compare(runs, baseline) if baseline else None
        self.problems = [
            f"{run.label}: INVALID: {text}"
            for run in self.everything
            for text in score_problems(run)
        ]
        self.warnings = [f"left out: {text}" for text in left_out]
        self.warnings += run_warnings(self.everything)

    @property
    def changed(self) -> dict[str, list[str]]:
        """What differs between the first run and the first one of the baseline."""
        return self.comparison["changed"] if self.comparison else {}

    def groups(self) -> dict[str, dict[str, Any]]:
        """A summary per configuration, where several are mixed and one has several runs."""
        names = dict.fromkeys(run.group for run in self.runs)
        if not self.history and not 1 < len(names) < len(self.runs):
            return {}
        return {name: summarise([r for r in self.runs if r.group == name]) for name in names}

    def mean_of_all(self) -> str:
        """The mean of the runs, which is none where they are no seeds of one configuration.

        A comparison with a baseline is one of means, so there it stands all the same.
        """
        if not self.mixed:
            return mean_sentence("mean", self.summary)
        names = ", ".join(self.mixed)
        if self.comparison:
            return mean_sentence(f"mean of runs that differ in {names}", self.summary)
        return f"no mean of all runs: they differ in {names}"

    def statements(self) -> list[str]:
        """What the runs say, one sentence a line."""
        sentences = [] if self.history else [self.mean_of_all()]
        for name, summary in self.groups().items():
            sentences.append(mean_sentence(f"mean of {name}", summary))
        visible = visible_sentence(self.summary)
        if visible and (self.history or not self.mixed):
            sentences.append(visible)
        if self.comparison:
            sentences.append(mean_sentence("mean of the baseline", self.base_summary))
            sentences += verdict(self.comparison, len(self.runs), len(self.baseline))
        return sentences


def name_runs(runs: list[Run]) -> None:
    """Labels each run by its file's name, without its date and what all names begin with.

    Where two files then have one name, the date tells them apart or else the whole path. A file of
    several runs adds their number.
    """
    names = distinct_names(runs)
    common = os.path.commonprefix(names) if len(set(names)) > 1 else ""
    start = max(common.rfind(mark) for mark in "_-. /") + 1
    for run, name in zip(runs, names, strict=True):
        run.label = name[start:] + (f" ({run.part})" if run.part else "")


def distinct_names(runs: list[Run]) -> list[str]:
    """A name for each run, short and not that of another file."""
    short = [STARTED.sub("", run.path.stem).lstrip("_-") or run.path.stem for run in runs]
    dated = [f"{name} {run.started[5:]}" for name, run in zip(short, runs, strict=True)]
    paths = [run.path.with_suffix("").as_posix() for run in runs]
    files = len(set(paths))
    if len(set(short)) == files:
        return short
    if len(set(dated)) == files:
        counts = collections.Counter(short)
        return [d if counts[s] > 1 else s for s, d in zip(short, dated, strict=True)]
    return paths


def run_warnings(runs: list[Run]) -> list[str]:
    """Broken limits, losses of another score, and scores below the one that counts."""
    warnings = [
        f"{run.label}: {text}" for run in runs for text in run.left_by_deadline + run.warnings
    ]
    for run in runs:
        warnings += [f"{run.label}: over the limit: {text}" for text in broken_limits(run)]
    for run in runs:
        left_out = read_documents(run).left_out
        if left_out:
            warnings.append(f"{run.label}: {left_out}")
    for run in runs:
        best = min(run.scores, key=lambda score: score.bpb)
        if best.kind != "before" and best.bpb < run.score.bpb:
            warnings.append(
                f"{run.label}: {best.label} scored {best.bpb:.5f}, "
                "below the last score, which counts"
            )
    return warnings


# === Rows, shared by every output =================================================================


def kinds_of(runs: list[Run]) -> list[str]:
    """The kinds of scores that the runs have, in the order of a run."""
    return [kind for kind in STAGES if any(run.score_of(kind) for run in runs)]


def stages_beside_the_score(runs: list[Run]) -> list[str]:
    """The kinds of scores that have a column: a kind that is always the last one is `val_bpb`."""
    kinds = []
    for kind in kinds_of(runs):
        scores = [(run.score_of(kind), run.score) for run in runs if run.score_of(kind)]
        if any(score != last for score, last in scores):
            kinds.append(kind)
    return kinds


def run_columns(runs: list[Run]) -> dict[str, list[str]]:
    """The table of runs: the cells of each column, by its name."""
    columns = {
        "run": [run.label for run in runs],
        "val_bpb": [f"{run.score.bpb:.5f}" for run in runs],
        "seed": [show(run.seed, "d") for run in runs],
    }
    if any(run.started for run in runs):
        columns["date"] = [run.started or DASH for run in runs]
    if len({run.group for run in runs}) > 1:
        columns["config"] = [run.group for run in runs]
    columns["steps"] = [show(run.steps, "d") for run in runs]
    columns["ms/step"] = [show(run.step_avg_ms, ".2f") for run in runs]
    for kind in stages_beside_the_score(runs):
        scores = [run.score_of(kind) for run in runs]
        columns[STAGES[kind]] = [show(score.bpb if score else None, ".5f") for score in scores]
    return columns | {
        "gain": [show(run.gain, ".5f") for run in runs],
        "artifact + code": [show(run.sizes.get("artifact_bytes"), ",") for run in runs],
        "training": [budget_cell(run, "train") for run in runs],
        "evaluation": [budget_cell(run, "eval") for run in runs],
        "bytes check": [bytes_cell(run) for run in runs],
    }


def rows_of(columns: dict[str, list[str]]) -> list[list[str]]:
    """The rows of a table that is given by its columns."""
    return [list(cells) for cells in zip(*columns.values(), strict=True)]


def budget_cell(run: Run, budget: str) -> str:
    """Seconds of a budget and its limit."""
    return f"{show(run.budget_seconds(budget), '.1f')} / {run.limits[budget]:g} s"


def bytes_cell(run: Run) -> str:
    """How the bytes that the score implies compare with those it should."""
    if score_problems(run):
        return "INVALID"
    ratio = denominator(run, run.score).ratio
    return "unknown" if math.isnan(ratio) else f"x{ratio:.6f}"


def is_bad(run: Run) -> bool:
    """Whether a run's row is marked: an impossible score or a broken limit."""
    return bool(score_problems(run) or broken_limits(run))


# === Terminal =====================================================================================


def print_report(report: Report) -> None:
    """Prints tables of runs and phases, differences, statements and problems."""
    console = terminal.console()
    for title, runs in (("runs", report.runs), ("baseline", report.baseline)):
        if runs:
            print_runs(console, title, runs)
    if any(run.phases for run in report.everything):
        print_phases(console, report.everything)
    for word, differing in (("mixed", report.mixed), ("changed", report.changed)):
        for name, values in differing.items():
            console.print(f"{word} {name}: {' | '.join(values)}", markup=False, highlight=False)
    for line in report.statements() + report.warnings:
        console.print(line, markup=False, highlight=False)
    for line in report.problems:
        console.print(line, markup=False, highlight=False, style="red")


def print_runs(console: Any, title: str, runs: list[Run]) -> None:
    """Prints a row per run; those with an impossible score or a broken limit are red."""
    from rich.markup import escape
    from rich.table import Table

    columns = run_columns(runs)
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for run, cells in zip(runs, rows_of(columns), strict=True):
        table.add_row(*map(escape, cells), style="red" if is_bad(run) else None)
    console.print(table)


def print_phases(console: Any, runs: list[Run]) -> None:
    """Prints the seconds of every phase, a column each, and what they count against."""
    from rich.markup import escape
    from rich.table import Table

    budgets = {phase.name: phase.budget for run in runs for phase in run.phases}
    table = Table(
        "seconds",
        *(f"{name}\n{budget}" for name, budget in budgets.items()),
        title="phases and what they count against",
        title_justify="left",
    )
    for run in runs:
        seconds = {phase.name: phase.seconds for phase in run.phases}
        cells = [f"{seconds[name]:.1f}" if name in seconds else DASH for name in budgets]
        table.add_row(escape(run.label), *cells)
    console.print(table)


# === JSON and Markdown ============================================================================


def as_json(report: Report) -> dict[str, Any]:
    """All figures, for --json."""
    return {
        "runs": [run_as_json(run, run in report.baseline) for run in report.everything],
        "summary": report.summary,
        "groups": report.groups(),
        "mixed": report.mixed,
        "baseline": report.base_summary,
        "comparison": report.comparison,
        "statements": report.statements(),
        "problems": report.problems,
        "warnings": report.warnings,
    }


def run_as_json(run: Run, is_baseline: bool) -> dict[str, Any]:
    """The figures of a run."""
    return {
        "run": run.label,
        "log": run.path.name,
        "seed": run.seed,
        "baseline": is_baseline,
        "steps": run.steps,
        "ms_per_step": run.step_avg_ms,
        "val_bpb": run.score.bpb,
        "val_loss": run.score.loss,
        "gain": run.gain,
        "stages": [score._asdict() | {"kind": score.kind} for score in run.scores],
        **run.sizes,
        "phases": run.phases,
        "limits": run.limits,
        "implied_bytes_per_token": denominator(run, run.score).implied,
        "problems": score_problems(run),
        "over": broken_limits(run),
        "facts": run.facts,
    }


def as_markdown(report: Report) -> str:
    """The block between the marks: rows, then statements, warnings and problems."""
    columns = run_columns(report.runs)
    table = markdown_table(list(columns), rows_of(columns))
    notes = report.statements() + report.warnings + report.problems
    return "\n".join([BEGIN, table, "", *(f"- {note}" for note in notes), END])


def write_markdown(block: str, path: str) -> None:
    """Puts a block where its first and last line stand in a page; `-` is the terminal."""
    if path == "-":
        print(block)
        return
    try:
        page = replace_block(Path(path).read_text(encoding="utf-8"), block)
    except MarksError as error:
        raise UsageError(f"{path}: {error}") from error
    write_atomic(Path(path), page.encode())


# === The page =====================================================================================


def write_html(report: Report, path: Path) -> None:
    """Writes report.html with plotly.js and the data as one file, which needs no network."""
    from plotly.offline import get_plotlyjs

    page = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    # A name in a log cannot end the script element.
    data = json.dumps(page_data(report, path)).replace("<", "\\u003c")
    page = page.replace("/*DATA*/", data, 1)
    page = page.replace("/*PLOTLY*/", get_plotlyjs(), 1)
    write_atomic(path, page.encode())


def page_data(report: Report, path: Path) -> dict[str, Any]:
    """What the page at `path` shows."""
    tables = [
        run_table(title, runs, path)
        for title, runs in (("Runs", report.runs), ("Baseline", report.baseline))
        if runs
    ]
    for of_run in (worst_table, samples_table):
        table = of_run(report.runs[0])
        if table:
            tables.append(table)

    differences = []
    labels = [run.label for run in report.runs]
    if report.mixed:
        differences.append(difference_table("Mixed runs", labels, report.mixed))
    if report.changed:
        title = "Changed against the baseline"
        differences.append(difference_table(title, ["runs", "baseline"], report.changed))
    number = report.summary["runs"]
    return {
        "title": f"{spread_text(report.summary['bpb'])} bpb, {count(number, 'run')}",
        "about": what_ran(report.runs[0]),
        "score": score_card(report),
        "tables": tables,
        "differences": differences,
        "comparison": report.comparison,
        "statements": report.statements(),
        "warnings": report.warnings,
        "problems": report.problems,
        "shown": max(number, MOST_SHOWN) if report.history else len(report.everything),
        **charts.as_json(charts.series_of(report.runs, report.baseline)),
    }


def score_card(report: Report) -> dict[str, str]:
    """The score of the page in large letters, and what stands below it."""
    summary = report.summary
    runs = "one run" if summary["runs"] == 1 else f"mean of {summary['runs']} runs"
    if report.mixed:
        runs += f" that differ in {', '.join(report.mixed)}"
    words = [f"val_bpb, {runs}, lower is better"]
    if summary["nats"]:
        words.append(f"{spread_text(summary['nats'])} nats per token")
    gzip = report.runs[0].final.get("gzip_bpb")
    if gzip:
        words.append(f"gzip -9 of each document: {gzip:.2f}")
    return {"value": spread_text(summary["bpb"]), "words": " · ".join(words)}


def run_table(title: str, runs: list[Run], path: Path) -> dict[str, Any]:
    """The table of runs, whose names lead to their logs."""
    columns = run_columns(runs)
    table = page_table(title, list(columns), rows_of(columns), list(map(is_bad, runs)))
    folder = path.absolute().parent
    table["links"] = [Path(os.path.relpath(run.path.absolute(), folder)).as_posix() for run in runs]
    return table


def worst_table(run: Run) -> dict[str, Any] | None:
    """The documents with most bits per byte, None where the run's folder does not tell them."""
    documents = worst_documents(read_documents(run).arrays)
    if not documents:
        return None
    rows = [
        [f"{doc.number:,}", f"{doc.bpb:.4f}", f"{doc.num_bytes:,}", f"{doc.share:.2%}"]
        for doc in documents
    ]
    head = ["document", "bits per byte", "bytes", "of all bits"]
    return page_table(f"Worst documents of {run.label}", head, rows, [False] * len(rows))


def samples_table(run: Run) -> dict[str, Any] | None:
    """What the artifact makes of some prompts, None where the run's folder does not hold it."""
    samples = read_samples(run)
    if not samples:
        return None
    keys = ("prompt", "greedy", "sampled", "document")
    rows = [[sample[key] for key in keys] for sample in samples]
    head = ["prompt", "most likely", "sampled", "how it really goes on"]
    table = page_table(f"What {run.label} writes", head, rows, [False] * len(rows))
    return table | {"is_text": True}


def page_table(
    title: str, head: list[str], rows: list[list[str]], bad: list[bool]
) -> dict[str, Any]:
    """A table of the page; `bad` rows are red."""
    return {"title": title, "head": head, "rows": rows, "bad": bad}


def difference_table(
    title: str, head: list[str], differing: dict[str, list[str]]
) -> dict[str, Any]:
    """A table of the knobs and facts that are not the same everywhere."""
    rows = [[name, *values] for name, values in differing.items()]
    return page_table(title, ["knob or fact", *head], rows, [False] * len(rows))


def what_ran(run: Run) -> str:
    """Data, preset, device and code of a run in one line."""
    facts = run.facts
    words = [facts.get("dataset")]
    if facts.get("preset"):
        words.append(f"PRESET={facts['preset']}")
    words.append(facts.get("device"))
    if "code_sha256" in facts:
        words.append(f"code {facts['code_sha256'][:12]}")
    return " · ".join(str(word) for word in words if word)


# === submission.json ==============================================================================


def make_submission(report: Report, args: argparse.Namespace) -> dict[str, Any]:
    """The content of submission.json. Raises UsageError where the runs make no claim."""
    seeds = [run.seed for run in report.runs]
    if report.mixed or None in seeds or len(set(seeds)) < len(seeds):
        raise UsageError(
            "--submission: needs runs of one code and configuration, each with its own seed"
        )
    runs = sorted(report.runs, key=submission.seed_order)
    for run in runs:
        for problem in score_problems(run):
            raise UsageError(f"--submission: {problem}")
    claimant = submission.Claimant.of(args, runs)
    compliance = submission.read_compliance(runs, args.audit)
    counted = submission.counted_by_logs(runs)
    return submission.build_submission(runs, claimant, counted, compliance, report.baseline)


# === Command line =================================================================================


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line; ends the program where options do not go together."""
    parser = argparse.ArgumentParser(
        "report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="logs of finished runs")
    add_options(parser)
    add_submission_options(parser)
    args = parser.parse_args(argv)
    if args.submission and not args.name:
        parser.error("--submission needs --name")
    others = [
        args.baseline,
        args.mixed,
        args.json,
        args.html,
        args.png,
        args.submission,
        args.audit,
    ]
    if args.compare and any(others):
        parser.error("--compare goes with --markdown and --date alone")
    if args.history and (args.compare or args.baseline or args.mixed or args.submission):
        parser.error("--history goes with --json, --markdown, --html and --png alone")
    return args


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options for what is compared and which outputs are written."""
    parser.add_argument(
        "--baseline", nargs="+", type=Path, default=[], metavar="LOG", help="logs to compare with"
    )
    parser.add_argument(
        "--mixed",
        action="store_true",
        help="take different codes, configurations and repeated seeds all the same",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="presets side by side; with --markdown between marks of its own",
    )
    parser.add_argument(
        "--history",
        action="store_true",
        help="every run, newest first, by configuration; no claim is made of them",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="all figures; - is the terminal, in place of the table"
    )
    parser.add_argument(
        "--markdown",
        metavar="FILE",
        help=f"rewrite what stands between {BEGIN} and {END}; - is the terminal",
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="one self-contained page with interactive charts"
    )
    parser.add_argument("--png", type=Path, metavar="DIR", help="the same charts as pictures")


def add_submission_options(parser: argparse.ArgumentParser) -> None:
    """The options for submission.json."""
    group = parser.add_argument_group(
        "submission.json", "every figure from the logs, compliance only from audits"
    )
    group.add_argument("--submission", type=Path, metavar="FILE", help="write it")
    group.add_argument("--name", help="what was run, on which data and hardware")
    group.add_argument("--author", default="", help="who claims it")
    group.add_argument("--github-id", default="", help="the author's account")
    group.add_argument("--blurb", default="", help="one sentence about it")
    group.add_argument("--track", default="", help="track_10min_16mb, track_non_record_16mb, ..")
    group.add_argument("--date", help="day of the runs, YYYY-MM-DD; default: the logs'")
    group.add_argument(
        "--audit",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="audit.json of each artifact; default: those in the run folders",
    )


def read_report(args: argparse.Namespace) -> Report:
    """Reads and checks the runs. Raises UsageError if they are no claim, or cannot be compared."""
    runs, left_out = read_finished(args.logs)
    if args.history:
        history = group_by_configuration(without_copies(runs))
        newest_first = [run for group in history for run in group]
        return Report(newest_first, [], {}, left_out, history)
    baseline, baseline_left_out = read_finished(args.baseline)
    if args.submission and left_out:
        # Whether a claim does without that log is not for this program to say.
        raise UsageError(f"--submission: {left_out[0]}")
    mixed = check_claim(runs, args.mixed)
    if baseline:
        check_claim(baseline, args.mixed)
        check_texts(runs, baseline)
    return Report(runs, baseline, mixed, left_out + baseline_left_out)


def write_outputs(report: Report, args: argparse.Namespace) -> None:
    """Writes what the command line asks for; the terminal shows the table or one other output."""
    if args.submission:
        content = submission.as_bytes(make_submission(report, args))
        write_atomic(args.submission, content)
    if args.json:
        text = json.dumps(as_json(report), indent=1)
        if args.json == "-":
            print(text)
        else:
            write_atomic(Path(args.json), f"{text}\n".encode())
    if args.html:
        write_html(report, args.html)
        print(f"{args.html}: open it in a browser")
    if args.png:
        charts.write_pictures(charts.series_of(report.runs, report.baseline), args.png)
    if args.markdown:
        write_markdown(as_markdown(report), args.markdown)
    if "-" not in (args.json, args.markdown):
        print_report(report)


def report_runs(args: argparse.Namespace) -> int:
    """The report of runs and their baseline. Returns the exit status."""
    report = read_report(args)
    write_outputs(report, args)
    return 1 if report.problems else 0


def compare_systems(args: argparse.Namespace) -> int:
    """The table of systems side by side. Returns the exit status."""
    runs, left_out = read_finished(args.logs)
    name_runs(runs)
    write_markdown(systems.comparison_block(runs, left_out, args.date), args.markdown or "-")
    return 1 if any(score_problems(run) for run in runs) else 0


def require_log(path: Path) -> None:
    """Raises UsageError or OSError unless there is a file that can be a log."""
    try:
        open_regular(path, MAX_LOG_BYTES).close()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise
        raise UsageError(f"{path}: does not exist; a run's log is logs/<RUN_ID>.txt") from error


def main(argv: list[str]) -> int:
    """Runs the command line and returns its exit status."""
    args = parse(argv)
    try:
        for path in (*args.logs, *args.baseline):
            # What is no file, or an endless one, is named before it is read.
            require_log(path)
        if args.date is not None and not submission.is_day(args.date):
            raise UsageError(f"--date {args.date}: must be a day, YYYY-MM-DD")
        return compare_systems(args) if args.compare else report_runs(args)
    except BrokenPipeError:
        raise
    except (UsageError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        print(
            f"report.py: {package}: is not installed; make dev brings it into .venv",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(terminal.run(main))
