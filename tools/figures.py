"""The figures of a final line: which types they must have, so that no reader has to ask again.

Standard library only, so that any program can import it at no cost.
"""

from __future__ import annotations

import json
from typing import Any

# Counts. They fit 64 bits.
WHOLES = {
    "seed",
    "steps",
    "world_size",
    "resumed",
    "recompilations",
    "train_tokens",
    "val_tokens",
    "val_bytes",
    "val_docs",
    "code_bytes",
    "model_bytes",
    "artifact_bytes",
    "codes_bytes",
    "codes_entropy_bytes",
}
TEXTS = {
    "run_id",
    "preset",
    "device",
    "torch",
    "python",
    "dataset",
    "attention",
    "code_sha256",
    "file_sha256",
    "val_sha256",
    "tokenizer_sha256",
    "sidecar_sha256",
    "artifact_sha256",
}


def is_number(value: Any) -> bool:
    """Whether a value is a finite number of a size that statistics can square."""
    return type(value) in (int, float) and abs(value) < 1e100


def fault_of(name: str, value: Any) -> str:
    """What is wrong with a figure; empty if nothing is. Figures of other names are free."""
    if name in WHOLES and not (type(value) is int and 0 <= value < 2**63):
        return "a whole number"
    if name in ("val_tokens", "val_bytes") and value == 0:
        return "above 0"
    if name in TEXTS and not (type(value) is str and value.isprintable()):
        return "a text of one line"
    if name.endswith(("_bpb", "_loss")) and not is_number(value):
        return "a number"
    if name == "seconds":
        is_table = isinstance(value, dict)
        if not is_table or not all(is_number(s) and s >= 0 for s in value.values()):
            return "an object of numbers"
    return ""


def read_figures(line: str) -> dict[str, Any]:
    """The figures of a line `final {json}`. Raises ValueError if one has another type."""
    try:
        figures = json.loads(line.removeprefix("final "))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(figures, dict):
        raise ValueError("no object")
    # A figure that is not known may stand as null.
    figures = {name: value for name, value in figures.items() if value is not None}
    for name, value in figures.items():
        if wanted := fault_of(name, value):
            raise ValueError(f"{name} must be {wanted}")
    return figures
