"""How long the documents of FineWeb's validation set are, for predictions without the data."""

from __future__ import annotations

import numpy as np

# (quantile, targets) of the documents of FineWeb's validation set, read off 277 ranges of batches
# in the logs of PR #1530; between them lengths are interpolated in logarithms. The published way
# with chunks of 32 processes 1,124 M positions on them in 21,130 steps.
FINEWEB = [
    (0, 44),
    (0.01, 86),
    (0.05, 118),
    (0.1, 148),
    (0.2, 209),
    (0.3, 278),
    (0.4, 364),
    (0.5, 474),
    (0.6, 618),
    (0.7, 807),
    (0.8, 1084),
    (0.9, 1595),
    (0.92, 1811),
    (0.9362, 2050),
    (0.955, 2490),
    (0.97, 3172),
    (0.978, 3720),
    (0.984, 4436),
    (0.988, 5150),
    (0.9921, 6354),
    (0.9946, 7960),
    (0.9958, 8996),
    (0.9984, 14509),
    (0.9996, 25987),
    (1, 30000),
]


def fineweb_lengths(count: int) -> np.ndarray:
    """Targets of `count` documents, rising, distributed as in FineWeb's validation set."""
    quantiles, lengths = np.array(FINEWEB).T
    wanted = (np.arange(count) + 0.5) / count
    return np.exp(np.interp(wanted, quantiles, np.log(lengths))).round().astype(np.int64)
