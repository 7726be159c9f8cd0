"""The decoders of an artifact's streams, without any code of train_gpt.py.

The format of the entropy coder is that of ans_encode there: rANS with 14-bit frequencies and
32-bit states. One symbol is decoded for every column of a group of matrices at a time, in a context
of what the decoder knows already: the level of the row, and the codes of the rows above in the same
column.
"""

import lzma
import math

import numpy as np

UNIT = 2**16  # fixed-point one of sizes and scales
MAX_BAND = 63
NUM_SYMBOLS = 2048
ZERO_SYMBOL = 1024  # of code 0


def fixed_point(octaves: np.ndarray) -> np.ndarray:
    """Powers of two in units of 2^-16."""
    return np.rint(UNIT * 2.0**octaves).astype(np.int64)


# The size that a code of 1 stands for in a row of a level; level 0 is a row of zeros.
SIZE_OF_LEVEL = fixed_point((65 - np.arange(256)) / 8)
SIZE_OF_LEVEL[0] = 0
# Column exponents k stand for 2^(-k/4); expected sizes are compared with eighths of an octave.
SCALE_OF_EXPONENT = fixed_point(-np.arange(256) / 4)
SIZE_EDGES = fixed_point((np.arange(-36, 24) + 0.5) / 8)
# Percentages at which the sign of a column counts as more and more one-sided.
BIAS_EDGES = (7, 19, 39)


def unpack(codec: str, data: bytes, size: int) -> bytes:
    """A stream of a general codec."""
    if codec == "brotli":
        import brotli

        return brotli.decompress(data)
    if codec == "zstd":
        import zstandard

        return zstandard.ZstdDecompressor().decompress(data, size)
    filters = [dict(id=lzma.FILTER_LZMA2, preset=6, lc=0, lp=1, pb=1)]
    return lzma.decompress(data, lzma.FORMAT_RAW, filters=filters)


class AnsStream:
    """The states, the words still unread, and the frequencies of the symbols by context."""

    def __init__(self, data: bytes, shapes: list[tuple[int, ...]]):
        """The data are: length of the tables, the tables, the first states, the words."""
        start = 4 + int.from_bytes(data[:4], "little")
        tables = np.frombuffer(unpack("lzma", data[4:start], 0), "<u2")
        self.frequencies = tables.astype(np.int64).reshape(-1, NUM_SYMBOLS)
        # The symbol that every slot of a context names: (contexts, 2^14).
        symbols = np.arange(NUM_SYMBOLS)
        self.symbols = np.stack([np.repeat(symbols, row) for row in self.frequencies])
        self.starts = self.frequencies.cumsum(1) - self.frequencies
        widest = max(columns for _, _, columns in shapes)
        num_codes = sum(math.prod(shape) for shape in shapes)
        num_states = max(widest, num_codes >> 13)
        states = np.frombuffer(data, "<u4", num_states, start)
        words = np.frombuffer(data, "<u2", offset=start + states.nbytes)
        self.states = states.astype(np.int64)
        self.words = words.astype(np.int64)

    def next_symbols(self, contexts: np.ndarray) -> np.ndarray:
        """One symbol from each of the first states, in the given contexts (n,)."""
        x = self.states[: len(contexts)]  # a view: the states move on in place
        slot = x % 2**14
        symbols = self.symbols[contexts, slot]
        within = slot - self.starts[contexts, symbols]
        x[:] = self.frequencies[contexts, symbols] * (x >> 14) + within
        low = np.flatnonzero(x < 2**16)
        x[low] = x[low] * 2**16 + self.words[: len(low)]
        self.words = self.words[len(low) :]
        return symbols


class ColumnHistory:
    """What the rows above tell about every column of a group: (matrices, columns), fixed point."""

    def __init__(self, exponents: np.ndarray):
        """exponents: the column exponents (matrices, columns)."""
        k = exponents.astype(np.int64)
        prior = SCALE_OF_EXPONENT[k - k.min(1, keepdims=True)]
        mean = prior.sum(1, keepdims=True) // k.shape[1] + 1
        # 64 rows' worth of the size that the exponents promise.
        self.size_sum = np.maximum(64 * UNIT * prior // mean, 1)
        self.signed_sum = np.zeros_like(self.size_sum)

    def refresh(self, row: int) -> None:
        """Takes note of the sums, as the encoder does before every eighth row."""
        self.band_offset = np.searchsorted(SIZE_EDGES, self.size_sum // (row + 64))
        percent = 100 * abs(self.signed_sum) // self.size_sum
        self.bias = np.searchsorted(BIAS_EDGES, percent, side="right")
        self.sign = np.where(self.signed_sum < 0, -1, 1)

    def contexts(self, level: np.ndarray) -> np.ndarray:
        """The context of every code in a row of the levels (matrices, 1), flat."""
        band = np.minimum((level + self.band_offset) // 3, MAX_BAND)
        band[np.broadcast_to(level == 0, band.shape)] = 0
        return (4 * band + self.bias).ravel()

    def add(self, codes: np.ndarray, level: np.ndarray) -> None:
        """Adds a decoded row (matrices, columns)."""
        value = codes.astype(np.int64) * SIZE_OF_LEVEL[level]
        self.size_sum += np.where(level > 0, abs(value), UNIT)
        self.signed_sum += value


def decode_ans(
    data: bytes,
    shapes: list[tuple[int, ...]],
    levels: list[np.ndarray],
    columns: list[np.ndarray],
) -> list[np.ndarray]:
    """The codes of all banks, each (matrices, rows, columns) int16.

    levels: per bank (matrices, rows). columns: per bank the column exponents (matrices, columns).
    """
    stream = AnsStream(data, shapes)
    banks = []
    for shape, level, exponents in zip(shapes, levels, columns, strict=True):
        codes = np.zeros(shape, np.int16)
        at_once = len(stream.states) // shape[2]
        for first in range(0, len(codes), at_once):
            group = slice(first, first + at_once)
            decode_group(stream, codes[group], level[group], exponents[group])
        banks.append(codes)
    return banks


def decode_group(
    stream: AnsStream, codes: np.ndarray, levels: np.ndarray, exponents: np.ndarray
) -> None:
    """Fills in the codes (matrices, rows, columns) of matrices that are decoded together."""
    history = ColumnHistory(exponents)
    for row in range(codes.shape[1]):
        if row % 8 == 0:
            history.refresh(row)
        level = levels[:, row, None].astype(np.int64)
        symbols = stream.next_symbols(history.contexts(level))
        along_signs = symbols.reshape(history.sign.shape) - ZERO_SYMBOL
        codes[:, row] = along_signs * history.sign
        history.add(codes[:, row], level)
