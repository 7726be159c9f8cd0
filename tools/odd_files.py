"""Odd things in the place of a file, for `make faults`: no file at all, or one of other bytes."""

from __future__ import annotations

import gzip
import os
import random
import socket
from pathlib import Path


def bind_socket(path: Path) -> None:
    """Leaves a socket that nobody listens to; its own folder keeps the name short enough."""
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)
        os.close(here)


def link_to_fifo(path: Path) -> None:
    """Makes a FIFO, and a link to it."""
    os.mkfifo(path.with_name("fifo"))
    path.symlink_to("fifo")


def make_huge(path: Path) -> None:
    """Makes a file of a terabyte that takes no space."""
    path.touch()
    os.truncate(path, 2**40)


# What could not be the file: each makes it at a path.
NO_FILES = {
    "huge": make_huge,
    "folder": Path.mkdir,
    "FIFO": os.mkfifo,
    "socket": bind_socket,
    "link to a FIFO": link_to_fifo,
}
# The same: where a link in its place leads.
LINKS = {
    "link to nothing": "nowhere",
    "link to a folder": ".",
    "device of zeros": "/dev/zero",
    "device of nothing": "/dev/null",
    "device that is full": "/dev/full",
    "device of noise": "/dev/urandom",
    "terminal": "/dev/ptmx",
    "memory of the process": "/proc/self/mem",
}
LINK_TO_ITSELF = "link to itself"
# Files of another content, whatever stood there before.
CONTENTS = {
    "empty": b"",
    "one byte": b"x",
    "line end": b"\n",
    "zeros": bytes(5000),
    "ones": b"\xff" * 5000,
    "noise": random.Random(0).randbytes(5000),
    "control characters": bytes(range(32)) * 20,
    "words": b"not what was asked for\n" * 200,
    "page of an error": b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>\n",
    "pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "gzip": gzip.compress(bytes(5000)),
    "zip": b"PK\x05\x06" + bytes(18),
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(500),
    "UTF-16": "{}".encode("utf-16"),
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "null": b"null",
    "true": b"true",
    "number": b"7",
    "NaN": b"NaN",
    "huge number": b"9" * 5000,
    "string": b'"text"',
    "list": b"[]",
    "object": b"{}",
    "pickle of a call": b"cos\nsystem\n(S'exit 7'\ntR.",
}


def changed(good: bytes) -> dict[str, bytes]:
    """What may become of the bytes of the good file."""
    return {
        "first half": good[: len(good) // 2],
        "all but three bytes": good[:-3],
        "backwards": good[::-1],
        "behind a character": b"x" + good,
        "as hexadecimal": good.hex().encode(),
    }


ODD_FILES = (*NO_FILES, LINK_TO_ITSELF, *LINKS, *CONTENTS, *changed(b""))


def make_odd(kind: str, path: Path, good: bytes) -> None:
    """Makes something odd, one of ODD_FILES, where the bytes of a good file should be."""
    if kind in NO_FILES:
        NO_FILES[kind](path)
    elif kind == LINK_TO_ITSELF:
        path.symlink_to(path.name)
    elif kind in LINKS:
        path.symlink_to(LINKS[kind])
    elif kind in CONTENTS:
        path.write_bytes(CONTENTS[kind])
    else:
        path.write_bytes(changed(good)[kind])
