"""Is an artifact spelt as this program spells it? Nothing can hide in a file that is.

    python tools/container.py ARTIFACT                  # one line
    python tools/container.py ARTIFACT --mutants 10000  # forged copies: none may hide anything

train_gpt.py refuses a file with other keys, streams that do not end where they should, bytes behind
them, or tables that nothing uses. A codec may still spell one stream in several ways, and a choice
among them can carry a message. `difference` packs the contents again and compares all bytes. The
libraries must be those that packed the file: another version may spell a stream differently, so
the line names them.

Exit status: 0 spelt so and no forged copy hides anything, within time and memory; 1 spelt otherwise
or a forged copy does; 2 wrong usage; 3 not shown, because the file differs only where another
version of zstd or brotli may spell its codes otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import random
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import terminal  # noqa: E402

import train_gpt as tg  # noqa: E402

MAX_SECONDS = 1.0  # for one forged file
MAX_MEMORY_MIB = 200  # above the baseline


# === The one spelling =============================================================================
def repacked(data: bytes) -> bytes:
    """The file that holds what this one holds. Raises UsageError if it cannot be read."""
    header, arrays = tg.open_artifact(data, Path("artifact"))
    cfg = tg.config_of_header(header)
    cfg = dataclasses.replace(cfg, compressor=header["compressor"])
    meta = {name: header[name] for name in ("looped", "tokenizer") if name in header}
    return tg.pack_arrays(cfg, arrays, meta)


def difference(data: bytes) -> str:
    """How a file differs from the one that holds the same; "" if it does not.

    A file that cannot be read differs by the reason.
    """
    try:
        again = repacked(data)
    except tg.UsageError as error:
        return str(error)
    if again == data:
        return ""
    first = next(
        (i for i, (a, b) in enumerate(zip(data, again, strict=False)) if a != b),
        min(len(data), len(again)),
    )
    return (
        f"differs from byte {first} on and is {len(data) - len(again):+d} bytes longer than "
        f"{libraries()} make it"
    )


def is_of_another_library(data: bytes) -> bool:
    """Whether a file differs only in how zstd or brotli has spelt the codes.

    Another version of the library may do that, and so may someone with a message. The other streams
    are LZMA, whose encoder has not changed its output for years.
    """
    try:
        again = Parts.of(repacked(data))
    except tg.UsageError:
        return False
    own = Parts.of(data)
    is_general = own.header["compressor"] in ("zstd", "brotli")
    return is_general and own.streams[1:] == again.streams[1:]


def libraries() -> str:
    """The versions of the codecs here."""
    parts = [f"zlib {zlib.ZLIB_RUNTIME_VERSION}"]
    for name in ("zstandard", "brotli"):
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(parts)


# === Forged files =================================================================================
class Parts(NamedTuple):
    """A file taken apart; `joined` gives it right lengths and checksums again."""

    header: dict[str, Any]
    streams: list[bytes]
    behind: bytes = b""  # the last stream
    head_behind: bytes = b""  # the compressed header

    @classmethod
    def of(cls, data: bytes) -> Parts:
        """Takes a file apart."""
        header, start = tg.read_header(data)
        streams = []
        for _, length, _ in header["streams"]:
            streams.append(data[start : start + length])
            start += length
        return cls(header, streams)

    def joined(self, text: bytes | None = None) -> bytes:
        """The file. text: another spelling of the header."""
        header = json.loads(json.dumps(self.header))
        for i, stream in enumerate(self.streams[: len(header["streams"])]):
            header["streams"][i][1:] = [len(stream), zlib.crc32(stream)]
        head = zlib.compress(text or tg.header_text(header), 9) + self.head_behind
        numbers = len(head).to_bytes(4, "little") + zlib.crc32(head).to_bytes(4, "little")
        start = tg.ARTIFACT_MAGIC + bytes([tg.ARTIFACT_VERSION]) + numbers
        return start + head + b"".join(self.streams) + self.behind


MUTATIONS: list[Callable[[Parts, random.Random], bytes]] = []


def mutation(function: Callable[[Parts, random.Random], bytes]) -> Callable:
    """Registers a way to forge a file."""
    MUTATIONS.append(function)
    return function


@mutation
def byte_of_stream(parts: Parts, rng: random.Random) -> bytes:
    """Another byte in a stream, with the right checksum."""
    number = rng.randrange(len(parts.streams))
    stream = bytearray(parts.streams[number])
    for _ in range(rng.choice([1, 1, 2, 8])):
        stream[rng.randrange(len(stream))] = rng.randrange(256)
    return with_stream(parts, number, bytes(stream))


@mutation
def longer_stream(parts: Parts, rng: random.Random) -> bytes:
    """Bytes behind a stream, skippable frames and whole streams among them."""
    number = rng.randrange(len(parts.streams))
    stream = parts.streams[number]
    frame = bytes([0x50, 0x2A, 0x4D, 0x18]) + (8).to_bytes(4, "little") + rng.randbytes(8)
    added = rng.choice([b"\0", rng.randbytes(rng.randint(1, 40_000)), frame, stream])
    stream = added + stream if rng.random() < 0.3 else stream + added
    return with_stream(parts, number, stream)


@mutation
def shorter_stream(parts: Parts, rng: random.Random) -> bytes:
    """A stream without its end."""
    number = rng.randrange(len(parts.streams))
    stream = parts.streams[number]
    return with_stream(parts, number, stream[: rng.randrange(len(stream))])


@mutation
def other_spelling(parts: Parts, rng: random.Random) -> bytes:
    """The same content of a small stream, compressed otherwise."""
    number = rng.randrange(1, len(parts.streams))
    size = parts.header["streams"][number][0]
    raw = tg.decompress("lzma", parts.streams[number], size)
    filters = [{**tg.LZMA_FILTERS[0], "nice_len": rng.randint(5, 60), "mode": tg.lzma.MODE_FAST}]
    stream = tg.lzma.compress(raw, tg.lzma.FORMAT_RAW, filters=filters)
    return with_stream(parts, number, stream)


@mutation
def value_of_stream(parts: Parts, rng: random.Random) -> bytes:
    """Other levels or columns, compressed as a run does it."""
    number = rng.choice([1, 3])
    size = parts.header["streams"][number][0]
    raw = bytearray(tg.decompress("lzma", parts.streams[number], size))
    raw[rng.randrange(size)] ^= 1 << rng.randrange(8)
    return with_stream(parts, number, tg.compress("lzma", bytes(raw)))


@mutation
def field_of_config(parts: Parts, rng: random.Random) -> bytes:
    """Another value of a field of the network, sizes of streams fitted where that is possible."""
    header = json.loads(json.dumps(parts.header))
    name = rng.choice(sorted(header["config"]))
    values = [0, 1, -1, 2, 64, 255, 256, 65536, 2**31, 2**62, 0.5, 1e308, True, None, "", [], {}]
    header["config"][name] = rng.choice(values)
    if rng.random() < 0.3:
        header["config"] |= {"num_layers": 256, "num_loops": 64}
    fit_sizes(header)
    return parts._replace(header=header).joined()


@mutation
def key_of_header(parts: Parts, rng: random.Random) -> bytes:
    """A key more, a key less, or an optional field spelt out."""
    header = json.loads(json.dumps(parts.header))
    where = rng.choice([header, header["config"]])
    kind = rng.randrange(3)
    if kind == 0:
        where[rng.choice(["note", "seed", "ttt_lora_lr", "Config"])] = rng.random()
    elif kind == 1:
        del where[rng.choice(sorted(where))]
    else:
        defaults = {name: tg.FIELDS[name].default for name in tg.OPTIONAL_NETWORK_FIELDS}
        missing = sorted(set(defaults) - set(header["config"]))
        name = rng.choice(missing)
        header["config"][name] = defaults[name]
    try:
        return parts._replace(header=header).joined()
    except KeyError:
        return parts._replace(streams=[]).joined()


@mutation
def spelling_of_header(parts: Parts, rng: random.Random) -> bytes:
    """Spaces, another order of keys, or a value that means the same."""
    data = parts.joined()
    header, _ = tg.read_header(data)
    texts = [
        json.dumps(header, sort_keys=True, indent=rng.randint(0, 3)).encode(),
        json.dumps(dict(reversed(header.items()))).encode(),
        tg.header_text(header).replace(b"true", b"1"),
        tg.header_text(header) + b" " * rng.randint(1, 99),
        tg.header_text(header)[:-1] + b', "streams": []}',
    ]
    return parts.joined(rng.choice(texts))


@mutation
def bytes_behind(parts: Parts, rng: random.Random) -> bytes:
    """Something behind the last stream or behind the header."""
    text = rng.randbytes(rng.randint(1, 5000))
    if rng.random() < 0.5:
        return parts._replace(behind=text).joined()
    return parts._replace(head_behind=text).joined()


@mutation
def header_of_file(parts: Parts, rng: random.Random) -> bytes:
    """Another byte in the first 64, or sizes that are not true."""
    if rng.random() < 0.5:
        data = bytearray(parts.joined())
        data[rng.randrange(64)] ^= 1 << rng.randrange(8)
        return bytes(data)
    header = json.loads(json.dumps(parts.header))
    header["streams"][rng.randrange(5)][0] = rng.choice([0, 1, 2**20, 2**33, -5])
    return parts._replace(header=header).joined()


def with_stream(parts: Parts, number: int, stream: bytes) -> bytes:
    """The file with another stream in that place."""
    streams = [*parts.streams]
    streams[number] = stream
    return parts._replace(streams=streams).joined()


def fit_sizes(header: dict[str, Any]) -> None:
    """Gives a header the sizes that its network needs, if it is one."""
    try:
        fields = {**{n: tg.FIELDS[n].default for n in tg.OPTIONAL_NETWORK_FIELDS}}
        fields |= header["config"]
        if fields["num_layers"] * (1 + fields["num_loops"]) > tg.MAX_VISITS:
            return
        cfg = dataclasses.replace(tg.Config(artifact_limit_bytes=0), **fields)
        for entry, size in zip(header["streams"], tg.stream_sizes(cfg), strict=True):
            entry[0] = size
    except (TypeError, ValueError, KeyError, OverflowError, ArithmeticError, AttributeError):
        return


class Fuzzed(NamedTuple):
    """What came of one forged file.

    A forged file may be the honest file of another network: then it says something else, and hides
    nothing. It is a hole if it says the same as the original with other bytes, and is not refused.
    """

    kind: str
    is_refused: bool  # by `difference`
    is_loaded: bool  # by train_gpt.py, which leaves the spelling of streams to the codecs
    is_hole: bool
    seconds: float


def contents(data: bytes) -> tuple[str, bytes] | None:
    """What a file says: its header without sizes, and all arrays; None if it cannot be read."""
    try:
        header, arrays = tg.open_artifact(data, Path("artifact"))
    except tg.UsageError:
        return None
    said = {name: value for name, value in header.items() if name != "streams"}
    bodies = [array.tobytes() for part in arrays for array in part.values()]
    return json.dumps(said, sort_keys=True), b"".join(bodies)


def forge(data: bytes, count: int, seed: int) -> Iterator[Fuzzed]:
    """Reads `count` forged copies of an artifact. A change that makes it again is drawn anew."""
    rng = random.Random(seed)
    parts = Parts.of(data)
    original = contents(data)
    left = count
    while left:
        change = rng.choice(MUTATIONS)
        forged = change(parts, rng)
        if forged == data:
            continue
        left -= 1
        start = time.perf_counter()
        found = contents(forged)
        seconds = time.perf_counter() - start
        is_refused = found is None or bool(difference(forged))
        is_hole = not is_refused and found == original
        yield Fuzzed(change.__name__, is_refused, found is not None, is_hole, seconds)


# === Command ======================================================================================
def main(argv: list[str]) -> int:
    """Returns the exit status."""
    parser = terminal.Parser(
        prog="container.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--mutants", type=int, default=0, help="forged copies to read")
    parser.add_argument("--seed", type=int, default=0, help="of the forgery")
    args = parser.parse_args(argv)
    if not args.artifact.is_file():
        parser.error(f"{args.artifact}: no such file")
    if args.mutants < 0:
        parser.error(f"--mutants {args.mutants}: must be at least 0")
    try:
        data = tg.read_regular(args.artifact, tg.MAX_ARTIFACT_BYTES)
    except OSError as error:
        parser.error(tg.reason_of(error))
    reason = difference(data)
    print(f"{args.artifact}: {len(data)} bytes, {reason or 'the same when packed again'}")
    if reason and is_of_another_library(data):
        print("not shown: another version of its codec, or a message in the codes")
        return 3
    if reason or not args.mutants:
        return int(bool(reason))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = list(forge(data, args.mutants, args.seed))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    holes = sorted({one.kind for one in found if one.is_hole})
    slowest = max(found, key=lambda one: one.seconds)
    print(
        f"{len(found)} forged files: {sum(one.is_refused for one in found)} refused, "
        f"{sum(not one.is_loaded for one in found)} of them by train_gpt.py itself; "
        f"holes: {', '.join(holes) or 'none'}; slowest {slowest.seconds:.2f} s "
        f"({slowest.kind}); {grown} MiB above the baseline"
    )
    is_good = not holes and slowest.seconds <= MAX_SECONDS and grown <= MAX_MEMORY_MIB
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(terminal.run(main))
