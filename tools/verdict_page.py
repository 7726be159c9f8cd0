"""A replay as one page for a reviewer: Markdown and HTML with the same sentences.

What a page says: artifact, code, date, machine, sample; the four conditions of the challenge's
issue #1017 and what this repository adds, a plain sentence each, figures folded away; what was not
tested; what would have to be true for a cheat to pass. A property that only `tools/audit.py` looks
at is taken from the audit.json beside the artifact, where there is one.
"""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Any, NamedTuple

import code_changes
import replay
import submission
from digests import file_sha256

from train_gpt import UsageError, write_atomic

# What this repository adds to the four conditions.
MORE_CONDITIONS = [
    submission.Condition(name, asks, (shown_by,))
    for name, asks, shown_by in (
        ("Whole and lossless", "All validation text is scored, by its own bytes.", "lossless"),
        ("Clean data", "No validation text is in training or warm-up.", "clean_data"),
        ("Within budget", "Time and size stay within the limits.", "within_budget"),
        ("Provenance", "Log, code, artifact and scores belong together.", "provenance"),
    )
]
NO_AUDIT = "no audit.json of this artifact"
NOT_TESTED = (
    "Memorised documents that cost only a little less than others: weights may know them.",
    "Training: replay scores the artifact and does not make it again.",
    "Libraries, drivers and hardware: they are trusted.",
)
PLAIN = "the plain evaluator, which shares no code with it,"
REFERENCE = "the reviewer's own train_gpt.py"
TO_PASS = (
    "A cheat must leave every drawn document's score as {judge} computes it from the artifact "
    "alone.",
    "Or it must touch fewer documents than the bound excludes, none of them drawn, although the "
    "draw was made after the scores were committed to.",
    "Or it must lie in the weights themselves.",
)


class Row(NamedTuple):
    """One condition."""

    name: str
    mark: str  # "yes", "no" or "not shown"
    sentence: str
    figures: str  # folded away


def audited_properties(artifact: Path) -> dict[str, Any]:
    """The properties of the audit beside the artifact, if it is one of this artifact; else {}."""
    try:
        audited, properties = submission.read_audit(artifact.with_name("audit.json"))
    except UsageError:
        return {}
    return properties if audited == file_sha256(artifact) else {}


def condition_rows(
    verdict: replay.Verdict, properties: dict[str, Any], artifact: Path
) -> list[Row]:
    """A row per condition, the replay itself first. properties: those of the artifact's audit."""
    figures = replay.as_text(verdict)
    sentence = replay.bound_in_words(verdict.facts)
    if verdict.faults:
        sentence = "; ".join(verdict.faults)
    marks = {True: "yes", False: "no", None: "not shown"}
    sentence = sentence[0].upper() + sentence[1:] + "."
    rows = [Row("The claim, scored again", marks[verdict.passed], sentence, figures)]
    for name, asks, shown_by in (*submission.CONDITIONS, *MORE_CONDITIONS):
        held = [properties.get(key, {}) for key in shown_by]
        passed = [one.get("passed") for one in held]
        verdict_of_all = False if False in passed else (None if None in passed else True)
        # Two properties may have one reason.
        evidence = dict.fromkeys(str(one.get("evidence", NO_AUDIT)) for one in held)
        if verdict_of_all is None:
            asks = f"{asks} To test it: python tools/audit.py {os.path.relpath(artifact)}"
        rows.append(Row(name, marks[verdict_of_all], asks, "; ".join(evidence)))
    return rows


def headline(verdict: replay.Verdict, rows: list[Row]) -> str:
    """The title, which says how much was tested. rows: those of `condition_rows`."""
    if not verdict.passed:
        return "The claim is false"
    broken = [row.name for row in rows if row.mark == "no"]
    if broken:
        return f"The replayed score agrees, but the audit speaks against: {', '.join(broken)}"
    untested = sum(row.mark == "not shown" for row in rows)
    if untested:
        return f"The replayed score agrees; {untested} of {len(rows)} conditions were not tested"
    return "Nothing speaks against the claim: all conditions were tested"


def head_lines(verdict: replay.Verdict, script: Path) -> list[tuple[str, str]]:
    """Artifact, code, date, machine and sample, as pairs."""
    facts = verdict.facts
    return [
        ("Run", f"{facts['run_id']}, val_bpb {facts['val_bpb']:.6f}"),
        ("Artifact", facts["artifact_sha256"][:16]),
        ("Code", code_changes.sentence(script)),
        ("Date", facts["date"]),
        ("Machine", facts["device"]),
        ("Sample", f"{facts['drawn']} of {facts['documents']} documents, {facts['decoys']} decoys"),
        ("Entropy", facts["entropy"]),
    ]


def sentences_of_limits(verdict: replay.Verdict) -> dict[str, list[str]]:
    """The closing lists by title: what was not tested, and what would let a cheat pass."""
    judge = PLAIN if "plain" in verdict.facts["seconds"] else REFERENCE
    return {
        "Not tested": [*NOT_TESTED, *verdict.notes],
        "For a cheat to pass": [sentence.format(judge=judge) for sentence in TO_PASS],
    }


class Page(NamedTuple):
    """What both forms of the page say."""

    title: str
    head: list[tuple[str, str]]
    rows: list[Row]
    limits: dict[str, list[str]]

    @classmethod
    def of(cls, verdict: replay.Verdict, artifact: Path, script: Path) -> Page:
        """The page of a verdict."""
        rows = condition_rows(verdict, audited_properties(artifact), artifact)
        title = headline(verdict, rows)
        return cls(title, head_lines(verdict, script), rows, sentences_of_limits(verdict))


def as_markdown(page: Page) -> str:
    """The page in Markdown."""
    lines = [f"# {page.title}", ""]
    lines += [f"* {name}: {text}" for name, text in page.head]
    lines.append("")
    for row in page.rows:
        lines += [f"**{row.name}: {row.mark}.** {row.sentence}", ""]
        lines += ["<details><summary>figures</summary>", "", "```", row.figures, "```", ""]
        lines += ["</details>", ""]
    for title, sentences in page.limits.items():
        lines += [f"## {title}", "", *[f"* {sentence}" for sentence in sentences], ""]
    return "\n".join(lines)


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:42rem;margin:0 auto;padding:1rem}
h1{font-size:1.4rem}dt{font-weight:600}dd{margin:0 0 .4rem;overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.8rem}.no{color:#b00}.yes{color:#070}"""


def as_html(page: Page) -> str:
    """The page in HTML, one column wide, without scripts."""
    escape = html.escape
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width,initial-scale=1">',
        f"<title>{page.title}</title><style>{STYLE}</style><h1>{page.title}</h1><dl>",
    ]
    for name, text in page.head:
        parts.append(f"<dt>{escape(name)}<dd>{escape(text)}")
    parts.append("</dl>")
    for row in page.rows:
        mark = row.mark.replace(" ", "-")
        parts.append(
            f"<p><b>{escape(row.name)}: <span class={mark}>{row.mark}</span>.</b> "
            f"{escape(row.sentence)}<details><summary>figures</summary>"
            f"<pre>{escape(row.figures)}</pre></details>"
        )
    for title, sentences in page.limits.items():
        items = "".join(f"<li>{escape(sentence)}" for sentence in sentences)
        parts.append(f"<h2>{title}</h2><ul>{items}</ul>")
    return "\n".join(parts) + "\n"


def write(path: Path, verdict: replay.Verdict, artifact: Path, script: Path) -> None:
    """Writes path.md and path.html."""
    page = Page.of(verdict, artifact, script)
    write_atomic(path.with_suffix(".md"), as_markdown(page).encode())
    write_atomic(path.with_suffix(".html"), as_html(page).encode())
