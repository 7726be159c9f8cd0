"""How a train_gpt.py differs from the released file, by section, and what rests on each.

    python tools/code_changes.py SCRIPT    # a line per section that differs; status 0 if none does

The released file is this repository's. Of a changed one every section is compared, and the line
says which properties rest on it: where a reviewer reads. A packed file is read in the form from
which it was packed: the released file or the train_gpt_readable.py beside it, if that is the same
program. Without either its text has no sections, and everything differs.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import terminal  # noqa: E402
from digests import sha256  # noqa: E402
from packed_code import READABLE, same_program, unpack_code  # noqa: E402

from train_gpt import UsageError  # noqa: E402

RELEASED = ROOT / "train_gpt.py"
SECTION = re.compile(r"^# === (\d+)\. (.*?)(?: =+)?$")
# Number of a section -> properties of the audit that rest on it.
RESTS_ON = {
    0: "provenance",
    1: "provenance, within_budget",
    2: "within_budget",
    3: "clean_data, lossless",
    4: "causal, normalised",
    5: "causal, score_first",
    6: "clean_data",
    7: "clean_data, within_budget",
    8: "causal, normalised, single_pass, lossless",
    9: "self_contained, within_budget",
    10: "causal, score_first, single_pass, document_independent",
    11: "provenance, single_pass, self_contained, within_budget",
    12: "causal, normalised",
    13: "causal",
    14: "provenance",
    15: "self_contained",
}


class Change(NamedTuple):
    """A section that differs."""

    number: int
    title: str
    added: int  # lines
    removed: int


def source_of_packed(data: bytes, *candidates: Path) -> bytes | None:
    """The first of some readable files of which a packed file is the same program.

    None without one. The hash that a packed file names is its author's word, so the programs are
    compared. Raises UsageError if `data` is no packed file.
    """
    text = unpack_code(data).text
    for path in candidates:
        with contextlib.suppress(OSError, UsageError):
            source = path.read_bytes()
            if same_program(source, text):
                return source
    return None


def readable_code(script: Path, released: Path = RELEASED) -> bytes:
    """The code of a script as its author wrote it; the text of a packed file that nothing fits."""
    data = script.read_bytes()
    try:
        source = source_of_packed(data, released, script.with_name(READABLE))
    except UsageError:
        return data
    return unpack_code(data).text.encode() if source is None else source


def sections(text: str) -> dict[int, tuple[str, list[str]]]:
    """Number -> (title, lines) of every section; what stands before the first is number 0."""
    found: dict[int, tuple[str, list[str]]] = {0: ("Header", [])}
    number = 0
    for line in text.splitlines(keepends=True):
        match = SECTION.match(line)
        if match:
            number = int(match[1])
            found[number] = (match[2].rstrip(" ="), [])
        found[number][1].append(line)
    return found


def changes(script: Path, released: Path = RELEASED) -> list[Change]:
    """The sections in which a script differs from the released one."""
    ours = sections(released.read_bytes().decode())
    theirs = sections(readable_code(script, released).decode(errors="backslashreplace"))
    found = []
    for number in sorted({*ours, *theirs}):
        title, lines = ours.get(number, ("an unknown section", []))
        _, other = theirs.get(number, ("", []))
        if lines == other:
            continue
        diff = list(difflib.unified_diff(lines, other, n=0, lineterm=""))[2:]
        added = sum(line.startswith("+") for line in diff)
        removed = sum(line.startswith("-") for line in diff)
        found.append(Change(number, title, added, removed))
    return found


def describe(change: Change) -> str:
    """A line about a section."""
    rests = RESTS_ON.get(change.number, "every property")
    where = f"section {change.number} ({change.title}): +{change.added} -{change.removed} lines"
    return f"{where}; {rests} rest on it"


def sentence(script: Path, released: Path = RELEASED) -> str:
    """The code in one sentence."""
    data = script.read_bytes()
    form = sha256(data)[:16] + ("" if readable_code(script, released) == data else ", packed")
    found = changes(script, released)
    if not found:
        return f"{form}, the released file"
    numbers = ", ".join(str(change.number) for change in found)
    return f"{form}, differs from the released file in sections {numbers}"


def main(argv: list[str]) -> int:
    """Returns 0 for the released file, 1 for another, 2 for wrong usage."""
    if argv in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    if len(argv) != 1 or not Path(argv[0]).is_file():
        print("code_changes.py: takes one script; --help tells more", file=sys.stderr)
        return 2
    print(sentence(Path(argv[0])))
    found = changes(Path(argv[0]))
    for change in found:
        print(describe(change))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(terminal.run(main))
