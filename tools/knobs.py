"""Writes docs/knobs.md, the reference of every knob, from train_gpt.py."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

HEAD = """# Knobs

Written by `python tools/knobs.py` from train_gpt.py; edit the meaning of a knob there. Every knob is an environment
variable. `PRESET` chooses a column, single variables override it; booleans are 0 or 1. A value out of range, a
combination that cannot work or a misspelt name ends the run at once with a line that says so.
"""


def value(x: object) -> str:
    if isinstance(x, (bool, int, float)):
        return f"{x:g}"
    return str(x) or "-"


def reference() -> str:
    """One table for each group of the fields of Config, named by the comment above it."""
    import train_gpt as tg

    lines, fields = [HEAD], {f.name: f for f in dataclasses.fields(tg.Config)}
    body = tg.TEXT.split("class Config:", 1)[1].split("    dtype = property", 1)[0]
    for group, name in re.findall(r"^    # (.+)$|^    (\w+): \w+ = knob\(", body, re.MULTILINE):
        if group:
            lines += [
                f"## {group}\n",
                f"| variable | {' | '.join(tg.PRESETS)} | values | meaning |",
                "|---" * (len(tg.PRESETS) + 3) + "|",
            ]
            continue
        f = fields.pop(name)
        lo, hi, choices = (f.metadata[key] for key in ("lo", "hi", "choices"))
        number = f"{lo:g}..{hi:.10g}" if hi < 1e18 else f"from {lo:g}"
        named = ", ".join(tg.PRESETS if f.name == "preset" else choices)
        values = named or {bool: "0, 1", str: "text"}.get(type(f.default), number)
        cells = [
            value(name if f.name == "preset" else tg.PRESETS[name].get(f.name, f.default))
            for name in tg.PRESETS
        ]
        meaning = f.metadata["doc"].replace("|", "/").replace("<", "&lt;")
        lines.append(f"| `{f.name.upper()}` | {' | '.join(cells)} | {values} | {meaning} |")
    assert not fields, f"knobs that the text does not show: {sorted(fields)}"
    return re.sub(r"\n(## )", r"\n\n\1", "\n".join(lines)).replace("\n\n\n", "\n\n") + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="exit status 1 if docs/knobs.md is not current"
    )
    path, text = ROOT / "docs" / "knobs.md", reference()
    if parser.parse_args().check:
        current = path.is_file() and path.read_text(encoding="utf-8") == text
        print("docs/knobs.md is " + ("current" if current else "old: run python tools/knobs.py"))
        return 0 if current else 1
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
