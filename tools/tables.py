"""Markdown tables, and blocks of a page that are rewritten between two marks."""

from __future__ import annotations

from collections.abc import Sequence

DASH = "–"  # stands for a value that is not known


class MarksError(ValueError):
    """A page does not hold the two marks, once each and in order. The message names no file."""


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, without a line break at its end."""
    lines = [markdown_row(head), "|---" * len(head) + "|"]
    lines += [markdown_row(row) for row in rows]
    return "\n".join(lines)


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table. A `|` in a cell is the caller's to escape."""
    return f"| {' | '.join(cells)} |"


def show(value: float | None, form: str) -> str:
    """A number in a format, or a dash where there is none."""
    return DASH if value is None else format(value, form)


def replace_block(page: str, block: str) -> str:
    """`page` with `block` in place of what the block's first and last line enclose in it.

    Raises MarksError unless each of the two lines is in the page once, in this order.
    """
    lines = block.splitlines()
    begin = lines[0]
    end = lines[-1]
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise MarksError(
            f"needs one line {begin} and after it one {end} around what is to be replaced"
        )
    before = page[: page.index(begin)]
    after = page[page.index(end) + len(end) :]
    return before + block + after
