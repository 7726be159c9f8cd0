"""Is a score legal? Runs the evaluation of train_gpt.py on an artifact and on made streams.

    python tools/audit.py runs/<RUN_ID>/final_model.int6.ptz          # with the knobs of its log
    python tools/audit.py ARTIFACT --tests T1,T3 --docs 4 --markdown  # some tests, README's table
    python tools/audit.py --log train_seed42.log ...                  # T13 alone, on any logs
    python tools/audit.py replay LOG ARTIFACT --documents 50          # the claim itself, blind
    python tools/audit.py training LOG --steps 4                      # the first steps of training

Nothing is judged by reading code. Every test looks at scores, states or files while the script's
own evaluations run, and all evaluations that a run makes of an artifact are tested. The conditions
are those of issue #1017 of the challenge. The tests:

{tests}

A property that a system does not claim counts as not claimed, not as a violation. With DATA_LOADER
other than `documents` a window may cross documents: T10 is then not claimed, T11 asks only that
nothing reaches beyond a window, and T20 does not ask for equal scores. Where documents learn from
earlier ones, T10 and T11 run with learning rates of 0. With TILT_ORDER hints come from earlier
documents: independence is not claimed, T10 and T11 run without the tilt, T20 does not ask for equal
scores, and the sample holds every second document again, with tokens left out, so that there are
hints. Everything else must hold for every system.

T7 sees the files that Python opens, but not those that C libraries open by themselves. T8 finds the
use of such a file if it lay beside the artifact, beside the script or in the home folder. No test
finds a file with an absolute path.

The sample holds --docs documents, cut to little more than a window. Chunks of TTT_MODE=chunk and of
phases are cut so that the sample has four, rows of scoring so that the sample fills them. The fresh
process scores a few complete documents, with rows the first ones of the stream. It has random
tokens in place of the others, or no others.

Knobs that the environment does not set are taken from the run's log. If all tests run, audit.json
is written beside the artifact; otherwise only --json writes it. Exit status: 0 no violation, 1
violations, 2 wrong usage: what is given cannot be judged, and nothing is written; 3 no violation,
but the machine has failed a test, which then says so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(ROOT))
import replay_command  # noqa: E402
import runlog  # noqa: E402
import terminal  # noqa: E402
import training_replay  # noqa: E402
from digests import file_sha256  # noqa: E402
from legality import (  # noqa: E402
    TESTS,
    Case,
    Finding,
    Property,
    implied_bytes,
    judge_properties,
    run_tests,
    with_declarations,
)
from scripts import load_script  # noqa: E402

from train_gpt import reason_of, write_atomic  # noqa: E402

SCRIPT = ROOT / "train_gpt.py"
MIN_DOCUMENTS = 2
VERDICTS = {True: "ok", False: "VIOLATION", None: "-"}
PATH_KNOBS = ("DATA_DIR", "EVAL_ONLY_PATH", "TOKENIZER_PATH")  # they stay out of the record


# === One audit ====================================================================================
def audit(
    script: Path,
    artifact: Path,
    environ: dict[str, str],
    tests: list[str],
    docs: int,
    log: Path | None = None,
) -> dict[str, Any]:
    """Runs the tests and returns the content of audit.json.

    T0 is among them in any case, because it finds by how much equal evaluations differ.
    """
    start = time.monotonic()
    case = Case(script, artifact, environ, docs, log)
    if "T0" not in tests:
        tests = ["T0", *tests]
    findings = run_tests(case, tests)
    properties = with_declarations(case, judge_properties(findings))
    return {
        "artifact_sha256": file_sha256(artifact),
        "code_sha256": file_sha256(script),
        "knobs": {name: value for name, value in case.asked.items() if name not in PATH_KNOBS},
        "documents": len(case.texts) if case.is_prepared else 0,
        "seconds": round(time.monotonic() - start, 1),
        "properties": {name: held._asdict() for name, held in properties.items()},
        "always_on": sorted(set(case.always_on)),
        "tests": {name: finding_as_json(finding) for name, finding in findings.items()},
    }


def finding_as_json(finding: Finding) -> dict[str, Any]:
    """A finding as it stands in audit.json."""
    figures = dict(finding.figures)
    if finding.by_machine:
        figures["by_machine"] = True
    return {"passed": finding.passed, "evidence": finding.evidence, **figures}


def refusal(script: Path, artifact: Path, environ: dict[str, str]) -> str | None:
    """Why there is nothing to judge, or None.

    Where this repository's script can begin, a refusal is the judged script's own and therefore a
    finding.
    """
    try:
        case = Case(script, artifact, environ, MIN_DOCUMENTS, None)
    except Exception as error:
        reason = " ".join(str(error).split())
        return f"{script}: no train_gpt.py ({type(error).__name__}: {reason})"
    reason = Case(SCRIPT, artifact, environ, MIN_DOCUMENTS, None).refusal()
    return reason if reason and case.refusal() else None


def knobs_of_log(log: Path, environ: dict[str, str]) -> dict[str, str]:
    """The knobs of a run, without those that the environment sets under any of their names."""
    aliases = load_script(SCRIPT).ALIASES
    given = {aliases.get(name, name) for name in environ}
    knobs = runlog.evaluation_variables(runlog.read_text(log))
    return {name: value for name, value in knobs.items() if name not in given}


# === Output =======================================================================================
def describe_tests() -> str:
    """The table of tests in the help text: number, title and summary."""
    lines = []
    for test in TESTS.values():
        lines += textwrap.wrap(
            test.summary,
            width=100,
            initial_indent=f"    {test.name:<4}{test.title:<15}",
            subsequent_indent=" " * 23,
        )
    return "\n".join(lines)


MARKS = {True: "yes", False: "**no**", None: "not shown"}


def as_markdown(properties: dict[str, Property]) -> str:
    """A table of properties for a README."""
    lines = ["| property | holds | tests | evidence |", "|---|---|---|---|"]
    for name, held in properties.items():
        evidence = held.evidence.replace(" | ", "<br>").replace("|", "\\|")
        cells = [name.replace("_", " "), MARKS[held.passed], ", ".join(held.tests), evidence]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def print_findings(tests: dict[str, dict[str, Any]]) -> None:
    """Prints a line per test."""
    for name, test in tests.items():
        verdict = VERDICTS[test["passed"]]
        print(f"{name:<5}{verdict:<10}{test['seconds']:>6.1f} s  {test['evidence']}")


# === Command line =================================================================================
def build_parser() -> terminal.Parser:
    """The command line."""
    description = __doc__.replace("{tests}", describe_tests())
    parser = terminal.Parser(
        prog="audit.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("artifact", nargs="?", type=Path, help="final_model.int6.ptz of a run")
    add("--docs", type=int, default=8, help="documents of the sample (default 8)")
    add("--tests", default=",".join(TESTS), help="T0,T3,... (default: all)")
    add("--script", type=Path, default=SCRIPT, help="the script that scores")
    log_help = "log of the run; default: its own in logs/, beside runs/"
    add("--run-log", type=Path, help=log_help)
    json_help = "default, if all tests run: audit.json beside the artifact"
    add("--json", type=Path, metavar="OUT", help=json_help)
    add("--markdown", action="store_true", help="print a table for a README")
    add("--log", nargs="+", type=Path, metavar="FILE", help="T13 on these logs, nothing else")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, checked. Ends the program with exit status 2 where they are wrong."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.tests = [test.strip().upper() for test in args.tests.split(",")]
    unknown = sorted(set(args.tests) - set(TESTS))
    if unknown:
        parser.error(f"--tests: {', '.join(unknown)}: must be among {', '.join(TESTS)}")
    if (args.artifact is None) == (args.log is None):
        parser.error("needs an artifact, or --log and files")
    if args.docs < MIN_DOCUMENTS:
        parser.error(f"--docs {args.docs}: must be at least {MIN_DOCUMENTS}")
    files = args.log or [args.artifact, args.script]
    if args.artifact and args.run_log:
        files.append(args.run_log)
    for path in files:
        if not path.is_file():
            parser.error(f"{path}: no such file")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: no such folder")
    out = args.json or (args.artifact if set(args.tests) == set(TESTS) else None)
    if out and not os.access(out.absolute().parent, os.W_OK):
        parser.error(f"{out.absolute().parent}: cannot be written; --json OUT chooses another file")
    return args


def judge_logs(paths: list[Path]) -> int:
    """Prints T13 on logs alone; returns the exit status."""
    findings = {path: implied_bytes(path) for path in paths}
    if all(finding.passed is None for finding in findings.values()):
        names = ", ".join(map(str, paths))
        print(f"audit.py: {names}: {findings[paths[0]].evidence}", file=sys.stderr)
        return 2
    for path, finding in findings.items():
        word = VERDICTS[finding.passed]
        if finding.passed and not finding.figures["known_text"]:
            word = "no proof"
        print(f"{word:<10}{path}: {finding.evidence}")
    return int(any(finding.passed is False for finding in findings.values()))


def judge_artifact(args: argparse.Namespace, environ: dict[str, str]) -> int:
    """Audits an artifact, prints and writes what was found; returns the exit status."""
    folder = args.artifact.resolve().parent
    log = args.run_log or runlog.log_of_run(folder)
    knobs = {}
    if log.is_file():
        try:
            knobs = knobs_of_log(log, environ)
        except OSError as error:
            print(f"audit.py: {reason_of(error)}", file=sys.stderr)
            return 2
        except runlog.LogError as error:
            print(f"audit.py: {log}: {error}", file=sys.stderr)
            return 2
        environ = {**environ, **knobs}
    else:
        log = None
    reason = refusal(args.script, args.artifact, environ)
    if reason:
        print(f"audit.py: {reason}", file=sys.stderr)
        return 2
    if log:
        taken = " ".join(f"{name}={value}" for name, value in knobs.items())
        print(f"audited as {log} says, {taken or 'no knob'}, and as the environment does")
    result = audit(args.script, args.artifact, environ, args.tests, args.docs, log)
    out = args.json
    if not out and set(args.tests) == set(TESTS):
        out = folder / "audit.json"
    if out:
        content = json.dumps(result, indent=1, default=float) + "\n"
        write_atomic(out, content.encode())
    print_findings(result["tests"])
    if args.markdown:
        properties = {name: Property(**held) for name, held in result["properties"].items()}
        print("\n" + as_markdown(properties))
    wrong = [name for name, test in result["tests"].items() if test["passed"] is False]
    told = f"{result['documents']} documents, {result['seconds']:.0f} s: "
    told += f"{', '.join(wrong) or 'no'} violation; "
    told += str(out) if out else "not all tests: nothing written without --json"
    print(told)
    failed = [name for name, test in result["tests"].items() if test.get("by_machine")]
    if failed and not wrong:
        print(f"audit.py: the machine has failed {', '.join(failed)}", file=sys.stderr)
        return 3
    return int(bool(wrong))


def main(argv: list[str]) -> int:
    """Returns the exit status: 0 no violation, 1 violations, 2 wrong usage, 3 machine failed."""
    if argv[:1] == ["replay"]:
        return replay_command.main(argv[1:])
    if argv[:1] == ["training"]:
        return training_replay.main(argv[1:])
    args = parse(argv)
    if args.log:
        try:
            return judge_logs(args.log)
        except OSError as error:
            print(f"audit.py: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
    try:
        return judge_artifact(args, dict(os.environ))
    except OSError as error:
        reason = f"{error.filename or args.artifact}: {error.strerror}"
        print(f"audit.py: the machine has failed: {reason}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(terminal.run(main))
