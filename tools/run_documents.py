"""The losses per document that a run leaves in its folder, by length and by position.

documents.npz holds `doc_nats` and `doc_bytes`, one number per document, and may hold `doc_tokens`
and sums by position in the document: `pos_nats`, `pos_tokens` and the bins' starts `pos_edges`.
samples.json, beside it, holds what the artifact makes of some prompts.
"""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from canonical import BYTES_TOLERANCE
from runlog import Run

from train_gpt import Entry, UsageError, read_json, read_regular, reason_of

ARTIFACT = "final_model.int6.ptz"  # in the folder of a run
DOCUMENTS = "documents.npz"  # beside it
MAX_ARRAYS_BYTES = 2**30


def is_text(value: object) -> bool:
    """Whether a value read from JSON is a text."""
    return type(value) is str


TEXT = Entry("a text", is_text)


class DocumentLosses(NamedTuple):
    """The arrays of a run's score, by name; {} with a reason where a file is of another score."""

    arrays: dict[str, np.ndarray]
    left_out: str = ""


class Profile(NamedTuple):
    """A loss along an axis: position, loss and number of documents or tokens of each point."""

    x: list[float]
    y: list[float]
    n: list[float]


def run_folder(run: Run) -> Path | None:
    """The folder in which the run left its files, if it is here."""
    run_id = run.final.get("run_id") or run.path.stem
    names = [run.config.get("artifact_dir", ""), f"runs/{run_id}"]
    for name in filter(None, names):
        for root in (Path(), run.path.parent, run.path.parent.parent):
            if (root / name).is_dir():
                return root / name
    return None


def written_at(path: Path) -> float:
    """When a file was written last, in seconds."""
    return path.stat().st_mtime


def newest_run() -> Path:
    """The folder in runs/ whose artifact was written last. Raises UsageError if there is none."""
    runs = Path("runs")
    found = [*runs.glob(f"*/{ARTIFACT}"), *runs.glob(f"sweeps/*/*/{ARTIFACT}")]
    if not found:
        raise UsageError(f"{runs.absolute()}: holds no run with an artifact; make run makes one")
    return max(found, key=written_at).parent


def read_documents(run: Run) -> DocumentLosses:
    """The losses that add up to the run's score. Raises UsageError if a file cannot be read."""
    folder = run_folder(run)
    left_out = ""
    for path in sorted(folder.glob("*.npz")) if folder else []:
        arrays = losses_in(path)
        if not arrays:
            continue
        bits = float(arrays["doc_nats"].sum()) / math.log(2)
        bpb = bits / max(float(arrays["doc_bytes"].sum()), 1.0)
        if abs(bpb / run.score.bpb - 1) < BYTES_TOLERANCE:
            return DocumentLosses(arrays)
        left_out = f"{path} adds up to {bpb:.5f} bpb, another score: left out"
    return DocumentLosses({}, left_out)


def losses_in(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of losses per document, {} of another one. Raises UsageError."""
    arrays = load_arrays(path)
    return arrays if {"doc_nats", "doc_bytes"} <= set(arrays) else {}


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file. Raises UsageError if it cannot be read."""
    try:
        content = read_regular(path, MAX_ARRAYS_BYTES)
    except OSError as error:
        raise UsageError(f"{reason_of(error)}: cannot be read") from error
    return arrays_of(str(path), content)


def arrays_of(name: str, content: bytes) -> dict[str, np.ndarray]:
    """All arrays in an .npz file's bytes. Raises UsageError, which begins with `name`."""
    file = io.BytesIO(content)
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_ARRAYS_BYTES:
                raise ValueError("its arrays are too large")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            loaded = {key: arrays[key] for key in arrays.files}
        check_arrays(loaded)
        return loaded
    # A damaged archive may raise any error, each kind of compression its own.
    except Exception as error:
        raise UsageError(f"{name}: {error}: cannot be read") from error


def check_arrays(arrays: dict[str, np.ndarray]) -> None:
    """Raises ValueError unless all arrays are lists of finite numbers, and lengths agree."""
    lengths: dict[str, set[int]] = {}
    for name, array in arrays.items():
        is_list = array.ndim == 1 and array.dtype.kind in "iuf"
        if not is_list or not np.isfinite(array).all():
            raise ValueError(f"{name} is no list of finite numbers")
        lengths.setdefault(name.split("_")[0], set()).add(len(array))
    if len(lengths.get("doc", ())) > 1:
        raise ValueError("its lists of documents are not equally long")


SAMPLES = [{"prompt": TEXT, "greedy": TEXT, "sampled": TEXT, "document": TEXT}]


def read_samples(run: Run) -> list[dict[str, str]]:
    """The prompts that the run's artifact has continued, [] without samples.json.

    Keys: prompt, greedy, sampled, and document, how the text really goes on. Raises UsageError if
    the file cannot be read.
    """
    folder = run_folder(run)
    path = folder / "samples.json" if folder else None
    if not path or not path.is_file():
        return []
    return read_json(path, SAMPLES)


def length_unit(arrays: dict[str, np.ndarray]) -> str:
    """In what lengths of documents are given."""
    return "tokens" if "doc_tokens" in arrays else "bytes"


def loss_by_length(arrays: dict[str, np.ndarray]) -> Profile | None:
    """Bits per byte of the documents of each length; a bin spans a factor of 2."""
    if not arrays:
        return None
    lengths = arrays.get("doc_tokens", arrays["doc_bytes"]).astype(np.int64)
    bins = np.log2(np.maximum(lengths, 1)).astype(int)
    profile = Profile([], [], [])
    for number in np.unique(bins):
        members = bins == number
        bits = float(arrays["doc_nats"][members].sum()) / math.log(2)
        profile.x.append(float(lengths[members].mean()))
        profile.y.append(float(bits / max(arrays["doc_bytes"][members].sum(), 1)))
        profile.n.append(float(members.sum()))
    return profile


def loss_by_position(arrays: dict[str, np.ndarray]) -> Profile | None:
    """Nats per token by position in the document, where the file has the sums.

    Positions count from 1, as a logarithmic axis needs it; files may count them from 0.
    """
    if not {"pos_nats", "pos_tokens"} <= set(arrays):
        return None
    counts = arrays["pos_tokens"].astype(np.float64)
    starts = arrays.get("pos_edges", np.arange(len(counts)))[: len(counts)]
    if len(starts) and starts[0] == 0:
        starts = starts + 1
    used = counts > 0
    losses = arrays["pos_nats"][used] / counts[used]
    return Profile(
        x=starts[used].astype(float).tolist(),
        y=losses.tolist(),
        n=counts[used].astype(int).tolist(),
    )


class Document(NamedTuple):
    """A document and what it costs."""

    number: int  # in the order of the validation set, from 1
    bpb: float  # its own bits per byte
    num_bytes: int
    share: float  # of the bits of all documents


def worst_documents(arrays: dict[str, np.ndarray], most: int = 5) -> list[Document]:
    """The documents with most bits per byte; [] without losses per document."""
    if not arrays:
        return []
    bits = arrays["doc_nats"].astype(np.float64) / math.log(2)
    sizes = arrays["doc_bytes"].astype(np.int64)
    bpb = bits / np.maximum(sizes, 1)
    return [
        Document(int(i) + 1, float(bpb[i]), int(sizes[i]), float(bits[i] / bits.sum()))
        for i in np.argsort(-bpb, kind="stable")[:most]
    ]
