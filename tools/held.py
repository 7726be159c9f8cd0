"""The validation data as the audit reads it: by its own code, not through the judged script.

`HeldData` holds tokens, documents and tokenizer of a data set's folder. Bytes of a document come
from the side-car where there is one, else from its decoded text.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from digests import file_sha256

SHARD_MAGIC = 20240520
HEADER_BYTES = 1024


class DataError(ValueError):
    """The data set cannot be read; the message names the file."""


def read_shard(path: Path) -> np.ndarray:
    """The ids (n,) uint16 of a shard. Raises DataError if its header says something else."""
    header = np.fromfile(path, "<i4", 3)
    ids = np.fromfile(path, "<u2", offset=HEADER_BYTES)
    if len(header) < 3 or header[0] != SHARD_MAGIC or header[2] != len(ids):
        raise DataError(f"{path}: no shard of {len(ids)} tokens")
    return ids


def read_shards(paths: list[Path]) -> np.ndarray:
    """The ids (n,) uint16 of shards end to end."""
    return np.concatenate([read_shard(path) for path in paths])


def split_paths(folder: Path, split: str) -> list[Path]:
    """The shards of a split, in order; the side-car of `val` is the split `val_bytes`."""
    paths = sorted(folder.glob(f"*_{split}_[0-9]*.bin"))
    if not paths:
        raise DataError(f"{folder}: no shards *_{split}_*.bin")
    return paths


@dataclasses.dataclass(frozen=True, eq=False)
class HeldData:
    """The validation split of a folder. A document's targets are those of the script's docstring:
    its tokens but the BOS, and the BOS of the next document.
    """

    folder: Path
    tokenizer: Path
    model: Any  # SentencePieceProcessor
    tokens: np.ndarray  # (N,) uint16
    starts: np.ndarray  # (docs,) index of each BOS
    counts: np.ndarray  # (docs,) targets
    token_bytes: np.ndarray | None  # (N,) uint16, by the side-car

    @classmethod
    def load(cls, folder: Path, tokenizer: Path) -> HeldData:
        """Reads shards, side-car and tokenizer."""
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.read_bytes())
        tokens = read_shards(split_paths(folder, "val"))
        starts = np.flatnonzero(tokens == model.bos_id())
        counts = np.diff(starts, append=len(tokens) - 1)
        token_bytes = None
        if list(folder.glob("*_val_bytes_[0-9]*.bin")):
            token_bytes = read_shards(split_paths(folder, "val_bytes"))
        return cls(folder, tokenizer, model, tokens, starts, counts, token_bytes)

    @property
    def bos(self) -> int:
        """The id that begins a document."""
        return self.model.bos_id()

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """Where each document's text ends in the stream, (docs,)."""
        return np.append(self.starts[1:], len(self.tokens))

    @functools.cached_property
    def byte_values(self) -> np.ndarray:
        """The value of every byte piece, -1 for another piece, (V,)."""
        values = np.full(self.model.vocab_size(), -1)
        for token in range(len(values)):
            if self.model.is_byte(token):
                values[token] = int(self.model.id_to_piece(token)[1:-1], 16)
        return values

    def text_span(self, document: int) -> slice:
        """Where a document's text lies in the stream, its BOS left out."""
        return slice(int(self.starts[document]) + 1, int(self.ends[document]))

    def bytes_of(self, document: int) -> int:
        """Bytes of a document's text."""
        span = self.text_span(document)
        if self.token_bytes is not None:
            return int(self.token_bytes[span].sum(dtype=np.int64))
        return len(self.model.decode(self.tokens[span].tolist()).encode())

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the tokens, as a final line has it where all documents are scored."""
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()


def tokenizer_by_hash(data_dir: Path, sha256: str) -> Path:
    """The tokenizer of that hash. Raises DataError if the folder has none."""
    for path in sorted((data_dir / "tokenizers").glob("*.model")):
        if file_sha256(path) == sha256:
            return path
    raise DataError(f"its tokenizer ({sha256[:12]}..) is not in {data_dir}/tokenizers")


def tokenizer_by_name(folder: Path, vocab_size: int) -> Path:
    """The tokenizer that a data set's manifest names, or the challenge's."""
    manifest = folder / "manifest.json"
    name = f"fineweb_{vocab_size}_bpe{folder.name.partition(f'_sp{vocab_size}')[2]}.model"
    if manifest.is_file():
        name = json.loads(manifest.read_text())["tokenizer"]["file"]
    return folder.parents[1] / "tokenizers" / name
