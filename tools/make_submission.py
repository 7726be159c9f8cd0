"""Writes submission.json from kept logs: `make_submission.py logs/*_seed*.txt`.

Every figure comes from the one `final {json}` line of each log. Logs of different code, data, preset or hardware are
not seeds of one claim and are refused (exit status 2, one line). Prints the rows of README's result table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from train_gpt import LIMIT_BYTES, UsageError, write_atomic  # noqa: E402

SAME = ("code_sha256", "dataset", "val_sha256", "tokenizer_sha256", "preset", "device", "torch", "world_size")
STAGES = ("pre_quantization_bpb", "quantized_bpb", "quantized_ttt_lora_bpb")


def read_final(path: Path) -> dict:
    """The figures of a finished run's log. Raises UsageError unless there is exactly one final line."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("final {")]
    if len(lines) != 1:
        raise UsageError(f"{path}: has {len(lines)} final lines, a finished run has one")
    return json.loads(lines[0].removeprefix("final "))


def summarise(paths: list[Path], name: str, author: str, date: str) -> dict:
    """submission.json's content. Raises UsageError where the logs are not seeds of one claim."""
    runs = sorted((read_final(path) for path in paths), key=lambda run: run["seed"])
    for key in SAME:
        if len({run[key] for run in runs}) > 1:
            raise UsageError(f"{key}: differs between the logs: {', '.join(sorted({str(run[key]) for run in runs}))}")
    seeds = [run["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"seed: {seeds} names one twice")
    scores = [run["val_bpb"] for run in runs]
    return {
        "name": name, "author": author, "date": date, **{key: runs[0][key] for key in SAME},
        "val_bpb": statistics.mean(scores), "val_bpb_sd": statistics.stdev(scores) if len(scores) > 1 else None,
        "val_loss": statistics.mean(run["val_loss"] for run in runs), "seeds": seeds,
        "bytes_total": max(run["artifact_bytes"] for run in runs), "bytes_limit": LIMIT_BYTES,
        "seed_results": {
            str(run["seed"]): {key: run[key] for key in (*STAGES, "val_loss", "steps", "artifact_bytes", "seconds")}
            for run in runs
        },
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path, help="kept logs, one per seed")
    parser.add_argument("--name", required=True, help="what was run, on which data and hardware")
    parser.add_argument("--author", default="", help="who claims it")
    parser.add_argument("--date", required=True, help="day of the runs, YYYY-MM-DD")
    parser.add_argument("--out", type=Path, default=ROOT / "submission.json")
    args = parser.parse_args()
    try:
        summary = summarise(args.logs, args.name, args.author, args.date)
    except (UsageError, OSError) as error:
        print(f"make_submission.py: {error}", file=sys.stderr)
        return 2
    write_atomic(args.out, (json.dumps(summary, indent=2) + "\n").encode())
    for seed, run in summary["seed_results"].items():
        total = sum(run["seconds"].values())
        print(f"| {seed} | {run['steps']} | " + " | ".join(f"{run[key]:.4f}" for key in STAGES)
              + f" | {run['artifact_bytes']:,} | {total:.0f} s |")  # fmt: skip
    print(f"mean val_bpb {summary['val_bpb']:.5f} (sd {summary['val_bpb_sd'] or 0:.5f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
