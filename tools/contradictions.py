"""What the lines of our own log say against one another, found without scoring anything.

A run prints each figure twice: in a line for people, and with all digits in its final line. It
names the hash of the source that its log opens with. So an edit of one of them shows. The functions
return sentences that name both values. Logs of other programs have no final line, and nothing here
applies to them. Standard library only, so that runlog.py can import it at no cost.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

TABLE_HEAD = re.compile(r"^phase +seconds  counts against$")
DIGEST = re.compile(r"[0-9a-f]{64}$")

# Lines that print whole figures of the final line, and the names of those.
WHOLE_FIGURES = (
    (
        re.compile(
            r"^Code size \(uncompressed\): (\d+) bytes; model (\d+), its codes' entropy (\d+)$"
        ),
        ("code_bytes", "model_bytes", "codes_entropy_bytes"),
    ),
    (re.compile(r"^Total submission size quantized\+\w+: (\d+) bytes"), ("artifact_bytes",)),
    (re.compile(r"^size +([\d,]+) of [\d,]+ bytes \("), ("artifact_bytes",)),
    (re.compile(r"^stopping: step:(\d+)/\d+ "), ("steps",)),
)

# Facts that the header prints as `name: value`.
HEADER_FACTS = (
    "run_id",
    "preset",
    "seed",
    "dataset",
    "code_sha256",
    "file_sha256",
    "code_bytes",
    "val_docs",
    "tokenizer_sha256",
    "val_sha256",
    "sidecar_sha256",
)

SCORE_LINE = re.compile(r"^(?:diagnostic )?(\w[\w-]*)(?: post-ema)? val_loss:(\S+) val_bpb:(\S+)")
ENDING = re.compile(r"^score +(\d+\.\d+) bits per byte, lower is better")


def short(value: Any) -> str:
    """A value as a sentence names it: of a hash the first eight digits."""
    text = str(value)
    return text[:8] if DIGEST.match(text) else text


def differs(name: str, in_final: Any, printed: Any, line: str) -> str:
    """The sentence about one figure."""
    return f"{name} is {short(in_final)} in the final line, {short(printed)} in the line {line!r}"


def in_figures(lines: Sequence[str], final: Mapping[str, Any]) -> Iterator[str]:
    """Sizes, steps and facts that the final line tells otherwise than the lines above it.

    The last line of each kind counts: a resumed run may have printed one twice.
    """
    for pattern, names in WHOLE_FIGURES:
        match = last_match(pattern, lines)
        for number, name in enumerate(names if match else ()):
            printed = int(match[number + 1].replace(",", ""))
            if name in final and final[name] != printed:
                yield differs(name, final[name], printed, match[0])
    parts = ("code_bytes", "model_bytes", "artifact_bytes")
    if all(name in final for name in parts):
        code, model, total = (final[name] for name in parts)
        if code + model != total:
            added = code + model
            yield f"artifact_bytes is {total} in the final line, code and model add to {added}"

    for name in HEADER_FACTS:
        match = last_match(re.compile(rf"^{name}: (.*)$"), lines)
        if match and name in final and str(final[name]) != match[1]:
            yield differs(name, final[name], match[1], f"{name}: ..")


def last_match(pattern: re.Pattern, lines: Sequence[str]) -> re.Match | None:
    """The match of the last line that fits a pattern."""
    return next(filter(None, map(pattern.match, reversed(lines))), None)


def in_scores(lines: Sequence[str], final: Mapping[str, Any]) -> Iterator[str]:
    """Scores that the final line tells otherwise than the lines that print them."""
    printed = {}
    for match in filter(None, map(SCORE_LINE.match, lines)):
        printed[match[1].replace("-", "_")] = match
    for label, match in printed.items():
        for name, text in ((f"{label}_loss", match[2]), (f"{label}_bpb", match[3])):
            if is_other_number(final.get(name), text):
                yield differs(name, final[name], text, label)

    ending = last_match(ENDING, lines)
    if ending and is_other_number(final.get("val_bpb"), ending[1]):
        yield differs("val_bpb", final["val_bpb"], ending[1], "score ..")


def is_other_number(exact: Any, printed: str) -> bool:
    """Whether a printed number is no rounded form of an exact one; not where one is unknown."""
    try:
        value = float(printed)
    except ValueError:
        return False
    if exact is None:
        return False
    digits = len(printed.partition(".")[2])
    return abs(exact - value) > 0.51 * 10.0**-digits


def last_table(lines: Sequence[str]) -> Sequence[str]:
    """The lines from the last phase table on; a resumed run may have printed one twice."""
    heads = [number for number, line in enumerate(lines) if TABLE_HEAD.match(line)]
    return lines[heads[-1] :] if heads else lines


def in_seconds(
    rows: Sequence[Any], totals: Sequence[Any], final: Mapping[str, Any]
) -> Iterator[str]:
    """Seconds that the phase table, its sums and the final line tell differently.

    rows and totals: of runlog.read_phase_table and read_budget_totals. Every printed figure is
    rounded to a tenth, those of the final line to a thousandth.
    """
    seconds = final.get("seconds", {})
    if not rows or not seconds:
        return
    for name in dict.fromkeys([*seconds, *(row.name for row in rows)]):
        own = [row.seconds for row in rows if row.name == name]
        told = seconds.get(name)
        if told is None or not own:
            held = "final line" if told is not None else "phase table"
            yield f"the phase {name!r} is in the {held} alone"
        elif abs(sum(own) - told) > 0.051 * len(own) + 0.001:
            yield f"{name}: {told} s in the final line, {sum(own):.1f} s in the phase table"
    for total in totals:
        own = [row.seconds for row in rows if row.budget == total.budget]
        if abs(sum(own) - total.seconds) > 0.051 * (len(own) + 1):
            yield (
                f"all of {total.budget}: {total.seconds:.1f} s are printed, "
                f"the phases add up to {sum(own):.1f} s"
            )


def is_packed(final: Mapping[str, Any]) -> bool:
    """Whether the run's file was a packed one: its log then opens with what the file unpacked."""
    return final.get("file_sha256", final.get("code_sha256")) != final.get("code_sha256")


def in_source(source: bytes, final: Mapping[str, Any]) -> Iterator[str]:
    """That the source in the log is not the one whose hash the log states.

    That of a packed file is not the readable one, and has no hash in the log.
    """
    stated = str(final.get("code_sha256", ""))
    if is_packed(final) or not DIGEST.match(stated):
        return
    found = hashlib.sha256(source).hexdigest()
    if found != stated:
        yield (
            f"the source text in the log has the SHA-256 {short(found)}, "
            f"its code_sha256 is {short(stated)}"
        )
