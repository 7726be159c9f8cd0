"""Where the token tilt of a finished run helps: by kind of document, and by place in it.

    DATA_DIR=./data python tools/tilt.py runs/<RUN_ID>

Reads the run's documents.npz, which holds the last evaluation, and the run's log for its knobs; the
environment comes first. The text comes from the validation shards. A kind is a guess by signs and
line beginnings (`kind_of`). Gains are in bits per byte of the documents or places of a line, so
lines do not add up; the last column is a line's part of the whole gain. Exit status 2 for wrong
usage.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(ROOT))
import runlog  # noqa: E402
from run_documents import load_arrays  # noqa: E402
from tables import markdown_table  # noqa: E402

import train_gpt as tg  # noqa: E402

CODE_SHARE = 0.05  # of signs among the characters of a text that counts as code
LIST_SHARE = 0.3  # of items among its lines
SIGNS = re.compile(r"[{}()\[\]=;<>_\\|]")
ITEM = re.compile(r"\s*([-*+•|#]|\d+[.)]|\S+:\s)")
POSITIONS = (0, 64, 256, 1024, 4096)  # where bins of targets begin


class Group(NamedTuple):
    """Targets of one line of a table."""

    name: str
    targets: int
    bytes: float
    gains: np.ndarray  # (hints,) nats that each hint has saved


class Scored(NamedTuple):
    """What an evaluation with the tilt has left, and the text."""

    docs: tg.Documents
    bytes: np.ndarray  # (targets,) of the original text, in stream order
    texts: list[str]
    index: np.ndarray  # (hints,) stream indices of the hinted targets, rising
    gains: np.ndarray  # (hints,) nats saved


def kind_of(text: str) -> str:
    """`code` by its share of signs, else `lists` by the beginnings of its lines, else `prose`."""
    if len(SIGNS.findall(text)) > CODE_SHARE * max(len(text), 1):
        return "code"
    lines = [line for line in text.splitlines() if line.strip()]
    items = sum(ITEM.match(line) is not None for line in lines)
    return "lists" if items > LIST_SHARE * len(lines) else "prose"


def load(folder: Path) -> Scored:
    """The hints of a run and its documents. Raises UsageError if they are not there."""
    path = folder / "documents.npz"
    arrays = load_arrays(path) if path.is_file() else {}
    if "tilt_index" not in arrays:
        raise tg.UsageError(f"{path}: has no hints; run with TILT_ORDER")
    environ = {**runlog.knobs_of_run(folder.resolve()), **os.environ}
    cfg, _ = tg.Config.from_env(environ, has_cuda=False)
    tokenizer = tg.Tokenizer.load(cfg)
    docs = tg.Documents.load(tg.TokenStream(cfg.dataset_dir, "val"), tokenizer.bos_id, cfg)
    if not np.array_equal(docs.counts, arrays["doc_tokens"]):
        raise tg.UsageError(f"{path}: is not of the documents in {cfg.dataset_dir}")
    texts = []
    for start, end in docs.spans():
        texts.append(tokenizer.model.decode(docs.tokens[start + 1 : end].tolist()))
    index = docs.target_indices()
    if docs.bytes is None:
        table = tg.ByteTable.from_sentencepiece(tokenizer.model)
        sizes = table.bytes_of(docs.tokens[index], docs.tokens[index + 1])
    else:
        sizes = docs.bytes[index + 1]
    return Scored(docs, sizes, texts, arrays["tilt_index"], arrays["tilt_gains"])


def group_targets(scored: Scored, group_of_target: np.ndarray, names: list[str]) -> Iterator[Group]:
    """One group for each name; group_of_target: (targets,) in stream order."""
    group_of_hint = group_of_target[np.searchsorted(scored.docs.target_indices(), scored.index)]
    for number, name in enumerate(names):
        members = group_of_target == number
        gains = scored.gains[group_of_hint == number]
        yield Group(name, int(members.sum()), float(scored.bytes[members].sum()), gains)


def by_kind(scored: Scored) -> list[Group]:
    """A group for each kind of document."""
    names = ["code", "lists", "prose"]
    kinds = np.array([names.index(kind_of(text)) for text in scored.texts])
    groups = group_targets(scored, kinds.repeat(scored.docs.counts), names)
    documents = np.bincount(kinds, minlength=len(names))
    counted = zip(groups, documents, strict=True)
    return [group._replace(name=f"{group.name} ({count})") for group, count in counted]


def by_position(scored: Scored) -> list[Group]:
    """A group for each bin of places in the document."""
    places = np.concatenate([np.arange(count) for count in scored.docs.counts])
    bins = np.searchsorted(POSITIONS, places, side="right") - 1
    return list(group_targets(scored, bins, [f"from {start}" for start in POSITIONS]))


def as_table(head: str, groups: list[Group]) -> str:
    """The groups in Markdown, and all of them together."""
    together = np.concatenate([group.gains for group in groups])
    targets = sum(group.targets for group in groups)
    every = Group("all", targets, sum(group.bytes for group in groups), together)
    total = float(together.sum()) or math.nan
    rows = []
    for group in [*groups, every]:
        gains = group.gains
        hits = f"{float((gains > 0).mean()):.1%}" if len(gains) else "-"
        bpb = float(gains.sum()) / math.log(2) / max(group.bytes, 1)
        cells = [f"{group.targets:,}", f"{len(gains) / max(group.targets, 1):.2%}", hits]
        rows.append([group.name, *cells, f"{bpb:.5f}", f"{float(gains.sum()) / total:.1%}"])
    return markdown_table([head, "targets", "hinted", "hits", "gain, bpb", "part of it"], rows)


def main(argv: list[str]) -> int:
    """Prints both tables; returns the exit status."""
    if len(argv) != 1:
        print("tilt.py: needs the folder of a run", file=sys.stderr)
        return 2
    folder = Path(argv[0])
    try:
        scored = load(folder)
    except tg.UsageError as error:
        print(f"tilt.py: {error}", file=sys.stderr)
        return 2
    except runlog.LogError as error:
        print(f"tilt.py: {runlog.log_of_run(folder.resolve())}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"tilt.py: {tg.reason_of(error)}", file=sys.stderr)
        return 2
    print(as_table("kind (documents)", by_kind(scored)))
    print()
    print(as_table("place in the document", by_position(scored)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
