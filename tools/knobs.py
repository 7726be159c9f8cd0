"""Write docs/knobs.md, the reference of every knob, from train_gpt.py."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_gpt as tg  # noqa: E402

HEAD = """# Knobs

Written by `python tools/knobs.py` from train_gpt.py; edit the meaning of a knob there. Every knob
is an environment variable. `PRESET` chooses a column, single variables override it; booleans are 0
or 1. A value out of range, a combination that cannot work or a misspelt name ends the run at once
with a line that says so. `python train_gpt.py --knobs TTT` prints those with a word in name or
meaning.
"""


# Those that people change, in the order in which they need them.
FIFTEEN = (
    "preset",
    "seed",
    "run_id",
    "dataset",
    "data_dir",
    "max_wallclock_seconds",
    "iterations",
    "train_batch_tokens",
    "micro_batch_tokens",
    "num_layers",
    "model_dim",
    "matrix_lr",
    "ttt_enabled",
    "val_doc_fraction",
    "eval_only_path",
)


def reference() -> str:
    """The text of docs/knobs.md: the fifteen that matter, then a table for each group of knobs."""
    groups = [line for group in tg.GROUPS for line in table(group)]
    return "\n".join([HEAD, *short_table(), *groups])


def short_table() -> Iterator[str]:
    """The lines of the table of FIFTEEN."""
    yield "## The fifteen that matter\n"
    yield "| variable | record | cpu | meaning |"
    yield "|---|---|---|---|"
    for name in FIFTEEN:
        field = tg.FIELDS[name]
        cells = " | ".join(default_cell(preset, field) for preset in ("record", "cpu"))
        yield f"| `{name.upper()}` | {cells} | {meaning_cell(field)} |"
    yield ""


def table(group: type) -> Iterator[str]:
    """The lines of one group's section, under the first line of its docstring."""
    title = inspect.getdoc(group).splitlines()[0].rstrip(".")
    presets = " | ".join(tg.PRESETS)
    yield f"## {title}\n"
    yield f"| variable | {presets} | values | meaning |"
    yield "|---" * (len(tg.PRESETS) + 3) + "|"
    for field in dataclasses.fields(group):
        cells = " | ".join(default_cell(preset, field) for preset in tg.PRESETS)
        values = allowed_values(field)
        yield f"| `{field.name.upper()}` | {cells} | {values} | {meaning_cell(field)} |"
    yield ""


def meaning_cell(field: dataclasses.Field) -> str:
    """The meaning of a field, as it stands in a table."""
    return field.metadata["doc"].replace("|", "/").replace("<", "&lt;")


def default_cell(preset: str, field: dataclasses.Field) -> str:
    """The default of a field under a preset, as it stands in a table."""
    value = tg.preset_values(preset, shrink=False).get(field.name, field.default)
    if isinstance(value, (bool, int, float)):
        return f"{value:g}"
    return value or "-"


def allowed_values(field: dataclasses.Field) -> str:
    """The values that a field may have, as they stand in a table."""
    lo = field.metadata["lo"]
    hi = field.metadata["hi"]
    choices = tuple(tg.PRESETS) if field.name == "preset" else field.metadata["choices"]
    if choices:
        return ", ".join(choices)
    if isinstance(field.default, bool):
        return "0, 1"
    if isinstance(field.default, str):
        return "text"
    if hi < tg.NO_LIMIT:
        return f"{lo:g}..{hi:.10g}"
    return f"from {lo:g}"


def main() -> int:
    """Write the reference or, with --check, say whether it is current. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="exit status 1 if docs/knobs.md is not current"
    )
    path = ROOT / "docs" / "knobs.md"
    text = reference()
    if parser.parse_args().check:
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            print("docs/knobs.md is current")
            return 0
        print("docs/knobs.md is old: run python tools/knobs.py")
        return 1
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
