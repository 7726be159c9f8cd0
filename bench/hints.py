"""Seconds and memory of the token tilt's hints, over streams of growing length.

    python bench/hints.py                        # four lengths up to FineWeb's validation set
    python bench/hints.py --targets 1e6 2e6      # others
    TILT_ORDER=8 python bench/hints.py           # other knobs, as for train_gpt.py

A stream is random tokens of 8,192 into which earlier pieces of 20 to 200 tokens are copied until
they are a tenth of it. Each length is measured in a process of its own, so that its peak of memory
is its own; tokens and libraries are part of it. The device is the GPU if there is one. The last
line is `bench ` and a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from step import device_name

import train_gpt as tg

FINEWEB_TARGETS = 47_853_344
VOCABULARY = 8192
COPIED_SHARE = 0.1


def planted_stream(length: int, seed: int = 0) -> np.ndarray:
    """Random tokens (length,) int32, a tenth of which repeats what stands before it."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, length, dtype=np.int32)
    copied = 0
    while copied < COPIED_SHARE * length:
        size = int(rng.integers(20, 200))
        begin = int(rng.integers(size, length - size))
        source = int(rng.integers(0, begin - size + 1))
        tokens[begin : begin + size] = tokens[source : source + size]
        copied += size
    return tokens


def measure(length: int) -> dict[str, float]:
    """Seconds and peak of memory in GB for a stream, and its share of hinted targets."""
    cfg, _ = tg.Config.from_env({"TILT_ORDER": "16", **os.environ}, torch.cuda.is_available())
    ranks = tg.Ranks({})
    tokens = torch.from_numpy(planted_stream(length)).to(ranks.device)
    start = ranks.now()
    sources = tg.hint_sources(tokens, cfg.tilt_order, cfg.tilt_threshold)
    seconds = ranks.now() - start
    hinted = float((sources >= 0).float().mean())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if ranks.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
    return {"targets": length, "seconds": seconds, "peak_gb": peak, "hinted": hinted}


def main() -> None:
    """Prints a row a length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [FINEWEB_TARGETS // 8, FINEWEB_TARGETS // 4, FINEWEB_TARGETS // 2, FINEWEB_TARGETS]
    parser.add_argument("--targets", type=float, nargs="+", default=sizes, metavar="N")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.targets) < 1000:
        parser.error("--targets: must be at least 1000")
    if args.one:
        try:
            print(json.dumps(measure(args.one)))
        except tg.UsageError as error:
            print(f"bench/hints.py: {error}", file=sys.stderr)
            sys.exit(2)
        return

    print(f"{'targets':>12}{'seconds':>10}{'ns each':>10}{'peak GB':>10}{'hinted':>9}")
    rows = []
    for length in map(int, args.targets):
        start = time.monotonic()
        command = [sys.executable, __file__, "--one", str(length)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        row = json.loads(done.stdout)
        row["process_seconds"] = round(time.monotonic() - start, 1)
        rows.append(row)
        each = 1e9 * row["seconds"] / length
        print(
            f"{length:>12,}{row['seconds']:>10.1f}{each:>10.0f}{row['peak_gb']:>10.2f}"
            f"{row['hinted']:>9.1%}",
            flush=True,
        )
    print("bench " + json.dumps({"host": device_name(tg.Ranks({}).device), "rows": rows}))


if __name__ == "__main__":
    main()
