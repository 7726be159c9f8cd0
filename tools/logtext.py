"""From the bytes of a log to the plain lines of each run in it.

Logs come as their owners keep them: compressed, as UTF-16 from a Windows shell, with colours, with
the prefixes of launchers and schedulers before every line, and with several runs one after the
other. Nothing here knows what a line says, except for the few lines with which a run begins.
Any program can import it at no cost: standard library only, and zstandard for a log that needs it.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path

from regular import read_regular

# That of train_gpt.py. A run of 20,000 steps leaves about 3 MB.
MAX_LOG_BYTES = 1 << 30


class LogError(ValueError):
    """A log holds no finished run, or what it holds cannot be read. The message names no file."""


# === Bytes to text ================================================================================


def unpack_zstd(content: bytes) -> bytes:
    """Unpacks frames of zstd that follow one another.

    Raises EOFError or ValueError if they are damaged, LogError without the package.
    """
    try:
        import zstandard
    except ImportError as error:
        raise LogError("is compressed with zstd: unpack it with zstd -d") from error
    parts = []
    try:
        while content:
            frame = zstandard.ZstdDecompressor().decompressobj()
            parts.append(frame.decompress(content))
            if not frame.eof:
                raise EOFError("its last frame has no end")
            content = frame.unused_data
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    return b"".join(parts)


# First bytes of a compressed file -> how to unpack it.
UNPACKERS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\x00": lzma.decompress,
    b"\x28\xb5\x2f\xfd": unpack_zstd,
}

# The first entry of the ZIP archive that torch.save writes.
CHECKPOINT_ENTRY = b"/data.pkl"

# First bytes of what is not unpacked here -> its name.
OTHER_FORMATS = {
    b"PK\x03\x04": "a ZIP archive: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"%PDF": "a PDF file",
    b"\x89PNG": "a picture",
}

# First bytes of a text -> its encoding. UTF-32 begins as UTF-16 does, and therefore stands first.
BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}


def read_text(path: Path) -> str:
    """The text of a log file, whatever its encoding. Raises LogError if it is no text.

    Raises OSError, which names the file, for what is no file or is too large.
    """
    return decode(read_regular(path, MAX_LOG_BYTES))


def decode(content: bytes) -> str:
    """The text in the bytes of a log. Raises LogError if they are no text."""
    for start, unpack in UNPACKERS.items():
        if content.startswith(start):
            try:
                return decode(unpack(content))
            except LogError:
                raise
            except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
                raise LogError(f"is compressed and cut short or damaged ({error})") from error
    if content.startswith(b"PK") and CHECKPOINT_ENTRY in content[:256]:
        raise LogError("is a checkpoint, no log: give the log of its run, logs/<RUN_ID>.txt")
    for start, name in OTHER_FORMATS.items():
        if content.startswith(start):
            raise LogError(f"is {name}")
    for start, encoding in BYTE_ORDER_MARKS.items():
        if content.startswith(start):
            return content.decode(encoding, errors="replace")
    head = content[:4096]
    if b"\x00" in head:
        return decode_without_mark(content, head)
    return content.decode(errors="replace")


def decode_without_mark(content: bytes, head: bytes) -> str:
    """The text of UTF-16 without a byte order mark: every second byte of plain English is 0."""
    for encoding, zeros, letters in (
        ("utf-16-le", head[1::2], head[::2]),
        ("utf-16-be", head[::2], head[1::2]),
    ):
        if zeros.count(0) > 0.9 * len(zeros) and letters.count(0) < 0.1 * len(letters):
            return content.decode(encoding, errors="replace")
    raise LogError("is no text: it holds zero bytes")


# === Text to lines ================================================================================

COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

DATE = r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?"
LEVEL = r"(?:DEBUG|INFO|WARNING|ERROR)"

# What launchers, schedulers and loggers put before every line. One blank belongs to each where it
# is usual; more belong to the line, since settings are indented.
PREFIX = re.compile(
    "|".join(
        (
            r"\[default\d+\]:",  # torchrun --tee
            r"\[rank\d+\]: ?",
            r"\[\d+,\d+\]<std(?:out|err)>: ?",  # mpirun --tag-output
            r"\([\w.<>-]+ pid=\d+(?:, ip=[\d.]+)?\) ?",  # ray
            r"\[pod/\S+\] ",  # kubectl logs --prefix
            r"\d+: (?=\S|  \S)",  # srun --label
            r"\d{10}\.\d+ ",  # seconds since 1970
            rf"\[{DATE}\](?:\[\w+\])* ?(?:\[?{LEVEL}\]?:? )?",
            rf"{DATE} (?:(?:- )?(?:[\w.]+ - )?\[?{LEVEL}\]?(?: -|:)? )?",
            r"\[\d\d:\d\d:\d\d\] (?=\S|  \S)",
            rf"{LEVEL}:[\w.]+:",  # logging.basicConfig
        )
    )
)
MOST_PREFIXES = 3  # a launcher within a scheduler within a container


def plain_lines(text: str) -> list[str]:
    """The lines of a log, without colours and without what launchers and loggers put first."""
    return [plain_line(line) for line in text.splitlines()]


def plain_line(line: str) -> str:
    """A line as its program printed it."""
    if "\x1b" in line:
        line = COLOURS.sub("", line)
    for _ in range(MOST_PREFIXES):
        match = PREFIX.match(line)
        if not match:
            break
        line = line[match.end() :]
    return line.rstrip()


# === Lines to runs ================================================================================

# Lines of a header. The word `resumed` in one means that the run before it goes on.
HEADER = re.compile(
    r"(?:--- )?Hyperparameters:?(?: ---)?$|seed:\d+$|train_loader:dataset:|val_loader:\w"
    r"|val_bpb:enabled|model_params:\d"
)
RESUMED = re.compile(r"resumed: |resum(?:ed|ing) from ")

# Lines that only a running or a finished run prints.
RESULT = re.compile(r"(?:step:)?\d+/\d+ .*_loss:|final \{|\S.* val_loss: ?\S+ val_bpb: ?\d")


def split_runs(lines: list[str]) -> list[list[str]]:
    """The lines of each run in a log, in order: a header after results begins another run.

    A run that was resumed prints its settings again and stays one run.
    """
    starts = [0]
    has_results = False
    for number, line in enumerate(lines):
        if has_results and HEADER.match(line):
            starts.append(number)
            has_results = False
        elif RESULT.match(line):
            has_results = True
    ends = [*starts[1:], len(lines)]
    runs: list[list[str]] = []
    for start, end in zip(starts, ends, strict=True):
        part = lines[start:end]
        if runs and is_continuation(part):
            runs[-1] += part
        else:
            runs.append(part)
    return runs


def is_continuation(lines: list[str]) -> bool:
    """Whether the lines from a header on go on with the run before: they say so before results."""
    for line in lines:
        if RESUMED.match(line):
            return True
        if RESULT.match(line):
            return False
    return False
