"""SHA-256 of bytes and of files, as hexadecimal text."""

from __future__ import annotations

import hashlib
from pathlib import Path

from regular import check_regular, named_errors


def sha256(data: bytes) -> str:
    """The SHA-256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, read in blocks of 1 MiB because shards are large.

    Raises OSError for what is no file, as a FIFO, which would make the program wait. An OSError
    names the file.
    """
    check_regular(path)
    digest = hashlib.sha256()
    with named_errors(path), path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
