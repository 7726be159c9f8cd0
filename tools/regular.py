"""Reading files of others: what is no file never makes a program wait, and every error has a name.

Standard library only, for the readers that must not import train_gpt.py. That has the same.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """An OSError that names no file gets the name of this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def check_regular(path: Path, max_bytes: int | None = None) -> None:
    """Raises OSError for a folder, a FIFO or a device, and for a file that is larger."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is not a file", str(path))
    if max_bytes is not None and status.st_size > max_bytes:
        reason = f"holds {status.st_size} bytes, at most {max_bytes} are read"
        raise OSError(errno.EFBIG, reason, str(path))


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a file of at most `max_bytes`. Raises OSError as check_regular does."""
    check_regular(path, max_bytes)
    with named_errors(path), path.open("rb") as file:
        # A file may grow while it is read, and those of /proc have no size.
        return file.read(max_bytes)
