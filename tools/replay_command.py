"""The command `tools/audit.py replay`: what tools/replay.py does, for a log and its artifact.

Exit status: 0 nothing speaks against the claim, 1 something does, 2 wrong usage, 3 the machine has
failed. The verdict is printed, kept as replay.json beside the artifact or where --json says, and
with --page written as a page for a reviewer.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import replay
import runlog
import terminal
import verdict_page
from fresh_process import MachineError
from held import DataError

from train_gpt import reason_of, write_atomic

SCRIPT = Path(__file__).resolve().parents[1] / "train_gpt.py"


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, checked."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = terminal.Parser(
        prog="audit.py replay", description=replay.__doc__, formatter_class=formatter
    )
    add = parser.add_argument
    add("log", type=Path, help="log of the run")
    add("artifact", type=Path, help="its final_model.int6.ptz; documents.npz lies beside it")
    add("--documents", type=int, default=50, help="documents to score again (default 50)")
    add("--script", type=Path, default=SCRIPT, help="the submitted script")
    add("--reference", type=Path, default=SCRIPT, help="a train_gpt.py that you trust")
    add("--beside", type=Path, help="documents.npz of an independent model on the same data")
    add("--entropy", help="32 hexadecimal digits, to repeat a draw (default: fresh ones)")
    add("--json", type=Path, metavar="OUT", help="default: replay.json beside the artifact")
    add("--page", type=Path, metavar="OUT", help="write OUT.md and OUT.html for a reviewer")
    args = parser.parse_args(argv)
    documents = args.artifact.with_name("documents.npz")
    files = [args.log, args.artifact, args.script, args.reference, documents]
    for path in [*files, args.beside] if args.beside else files:
        if not path.is_file():
            parser.error(f"{path}: no such file")
    if args.documents < 2:
        parser.error(f"--documents {args.documents}: must be at least 2")
    try:
        args.entropy = int(args.entropy, 16) if args.entropy else replay.fresh_entropy()
    except ValueError:
        parser.error(f"--entropy {args.entropy}: must be hexadecimal digits")
    args.json = args.json or args.artifact.with_name("replay.json")
    for path in filter(None, (args.json, args.page)):
        if not os.access(path.absolute().parent, os.W_OK):
            parser.error(f"{path.absolute().parent}: cannot be written")
    return args


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    args = parse(argv)
    try:
        claim = replay.read_claim(args.log, args.artifact, os.environ)
    except OSError as error:
        print(f"audit.py replay: {reason_of(error)}", file=sys.stderr)
        return 2
    except (runlog.LogError, ValueError) as error:
        print(f"audit.py replay: {args.log}: {error}", file=sys.stderr)
        return 2
    try:
        verdict = replay.replay(
            claim, args.script, args.reference, args.documents, args.entropy, args.beside
        )
    except DataError as error:
        print(f"audit.py replay: --beside: {error}", file=sys.stderr)
        return 2
    except (MachineError, MemoryError) as error:
        print(f"audit.py replay: the machine has failed: {error}", file=sys.stderr)
        return 3
    write_atomic(args.json, replay.as_bytes(verdict))
    if args.page:
        verdict_page.write(args.page, verdict, args.artifact, args.script)
    print(replay.as_text(verdict))
    return int(not verdict.passed)
