"""Makes the kept evidence anew: runs, logs, and every figure that the documents take from them.

    evidence.py                 make or complete it; after a kill the same command goes on
    evidence.py --corpus DIR --tokenizer FILE
                                run the nine systems on English documents, with this tokenizer
    evidence.py --tables        rewrite the documents from the kept logs, run nothing

There are two groups of runs, one run at a time, on whatever device there is:

- three seeds of what `make run` does: the miniature on docstrings;
- the nine systems side by side, small: on the corpus if there is one, else on the docstrings.

A run is not repeated if its log has its result under the hash of today's train_gpt.py. When all
runs are done their logs replace those in logs/. The artifact of every seed is audited, and its
claim replayed on drawn documents: logs/verdicts/ holds the audits and a page each for a reviewer.
README.md, EXPERIMENTS.md and submission.json then get their figures, each between marks of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import runlog  # noqa: E402
import tables  # noqa: E402
from digests import file_sha256  # noqa: E402
from packed_code import packed_size  # noqa: E402
from systems import SYSTEMS  # noqa: E402

from train_gpt import CODE_SHA256, Config, UsageError, reason_of, write_atomic  # noqa: E402

SEEDS = (0, 42, 1337)
SYSTEM_SECONDS = 90
REPLAYED_DOCUMENTS = 20
CLAIM = "PRESET=cpu (miniature) on pydocs, {hardware}; not FineWeb, not 8xH100"


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of train_gpt.py and the place its log gets in logs/."""

    name: str
    knobs: dict[str, str]
    kept: str  # path of the kept log below logs/, with {date} for the day of the run

    def run_id(self, code_sha256: str) -> str:
        """The RUN_ID, which holds the source's hash: other code is another run."""
        return f"evidence-{code_sha256[:8]}-{self.name}"


def seed_runs() -> list[PlannedRun]:
    """Three seeds of the settings of `make run`."""
    runs = []
    for seed in SEEDS:
        knobs = {"PRESET": "cpu", "DATASET": "pydocs_sp1024_caseops", "SEED": str(seed)}
        runs.append(PlannedRun(f"seed{seed}", knobs, f"{{date}}_cpu-pydocs_seed{seed}.txt"))
    return runs


def system_runs(has_corpus: bool) -> list[PlannedRun]:
    """The nine systems with equal budgets on one data set."""
    data = {"DATASET": "pydocs_sp1024_caseops", "VOCAB_SIZE": "1024", "VAL_DOC_FRACTION": "0.1"}
    if has_corpus:
        data = {"DATASET": "corpus_sp8192", "VOCAB_SIZE": "8192", "VAL_DOC_FRACTION": "0.02"}
    budget = {"SHRINK": "1", "MAX_WALLCLOCK_SECONDS": str(SYSTEM_SECONDS)}
    text = "corpus" if has_corpus else "pydocs"
    return [
        PlannedRun(
            f"{text}-{preset}",
            {"PRESET": preset, **budget, **data},
            f"compare/{{date}}_{text}_{preset}.txt",
        )
        for preset in SYSTEMS
    ]


def result_of(log: Path) -> dict[str, Any] | None:
    """The figures of a log's `final` line, or None if the run did not finish."""
    if not log.is_file():
        return None
    try:
        return runlog.read_final(log.read_text(encoding="utf-8"))
    except runlog.LogError:
        return None


def is_finished(log: Path, code_sha256: str) -> bool:
    """Whether `log` holds the result of a run of this source."""
    result = result_of(log)
    return result is not None and result["code_sha256"] == code_sha256


def run_training(script: Path, environ: dict[str, str], folder: Path) -> int:
    """Runs the script in `folder` with its output on this terminal; returns its exit status."""
    return subprocess.run([sys.executable, str(script)], cwd=folder, env=environ).returncode


def complete(runs: list[PlannedRun], script: Path, folder: Path, code_sha256: str) -> list[Path]:
    """Runs what has no result yet and returns all logs. Raises UsageError if a run fails."""
    logs = []
    for number, run in enumerate(runs, 1):
        run_id = run.run_id(code_sha256)
        log = folder / "logs" / f"{run_id}.txt"
        if is_finished(log, code_sha256):
            print(f"evidence: {number}/{len(runs)} {run_id} has its result", flush=True)
        else:
            knobs = " ".join(f"{name}={value}" for name, value in run.knobs.items())
            print(f"evidence: {number}/{len(runs)} {run_id}: {knobs}", flush=True)
            status = run_training(script, {**os.environ, **run.knobs, "RUN_ID": run_id}, folder)
            if not is_finished(log, code_sha256):
                raise UsageError(f"{run_id}: ended with status {status} and without a result")
        logs.append(log)
    return logs


def day_of(log: Path) -> str:
    """The day on which a run ended, YYYY-MM-DD."""
    return datetime.date.fromtimestamp(log.stat().st_mtime).isoformat()


def keep_logs(runs: list[PlannedRun], logs: list[Path], folder: Path) -> list[Path]:
    """Copies the logs to their places below logs/, in place of those of earlier evidence."""
    kept = []
    for run, log in zip(runs, logs, strict=True):
        target = folder / "logs" / run.kept.format(date=day_of(log))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, log.read_bytes())
        kept.append(target)
    for folder_of_kept in {path.parent for path in kept}:
        for path in folder_of_kept.glob("????-??-??_*.txt"):
            if path not in kept:
                path.unlink()
    return kept


def run_tool(environ: dict[str, str], *words: object) -> int:
    """Runs a program of tools/ with its output on this terminal; returns its exit status."""
    program, *arguments = map(str, words)
    command = [sys.executable, str(ROOT / "tools" / program), *arguments]
    return subprocess.run(command, env=environ).returncode


def judge(run: PlannedRun, log: Path, folder: Path) -> None:
    """Audits the artifact of a finished run and replays its claim, unless that is done.

    Leaves logs/verdicts/NAME.json, the audit, and the reviewer's page as NAME.md and NAME.html,
    NAME being that of the kept log. Raises UsageError if either has something against the run.
    """
    run_id = log.stem
    artifact = folder / "runs" / run_id / "final_model.int6.ptz"
    place = folder / "logs" / "verdicts"
    place.mkdir(parents=True, exist_ok=True)
    name = run.kept.format(date=day_of(log)).removesuffix(".txt")
    audit, page = place / f"{name}.json", place / name
    try:
        digest = file_sha256(artifact)
        done = json.loads(audit.read_text()).get("artifact_sha256") if audit.is_file() else ""
    except OSError as error:
        raise UsageError(f"{reason_of(error)}; remove {log}, and the run is made again") from error
    except ValueError:
        done = ""
    if done == digest and page.with_suffix(".html").is_file():
        print(f"evidence: {run_id} has its verdict", flush=True)
        return
    page.with_suffix(".html").unlink(missing_ok=True)
    # The audit finds the run's log beside runs/.
    environ = {**os.environ, **run.knobs}
    # The page takes what the audit has shown from the file beside the artifact.
    beside = artifact.with_name("audit.json")
    if status := run_tool(environ, "audit.py", artifact, "--json", beside):
        raise UsageError(f"{run_id}: its audit ended with status {status}")
    shutil.copyfile(beside, audit)
    words = ("replay", log, artifact, "--documents", REPLAYED_DOCUMENTS, "--page", page)
    if status := run_tool(environ, "audit.py", *words):
        raise UsageError(f"{run_id}: its replay ended with status {status}")


def forget_other_verdicts(kept: list[Path], folder: Path) -> None:
    """Removes the verdicts of logs that are no longer kept."""
    for path in (folder / "logs" / "verdicts").glob("*"):
        if path.stem not in {log.stem for log in kept}:
            path.unlink()


def kept_logs(folder: Path) -> tuple[list[Path], list[Path]]:
    """The kept logs: of the seeds, of the systems."""
    seeds = sorted((folder / "logs").glob("????-??-??_*_seed*.txt"))
    systems = sorted((folder / "logs" / "compare").glob("????-??-??_*.txt"))
    if not seeds or not systems:
        raise UsageError(f"{folder / 'logs'}: holds no kept logs; run evidence.py without --tables")
    return seeds, systems


def rewrite_block(path: Path, name: str, lines: list[str]) -> None:
    """Replaces what stands between `<!-- name:begin -->` and `<!-- name:end -->` in a document."""
    block = "\n".join([f"<!-- {name}:begin -->", *lines, f"<!-- {name}:end -->"])
    try:
        page = tables.replace_block(path.read_text(encoding="utf-8"), block)
    except tables.MarksError as error:
        raise UsageError(f"{path}: {error}") from error
    write_atomic(path, page.encode())


def sizes_block(script: Path, results: list[dict[str, Any]]) -> list[str]:
    """Bytes of the script as it is and packed, and the scale that gzip gives."""
    source = script.read_bytes()
    packed = packed_size(source)
    lines = [
        f"`train_gpt.py` of source {CODE_SHA256[:8]} has {len(source):,} bytes as it stands, which"
        f" the table counts, and {packed:,} packed, which submission.json counts."
    ]
    if "gzip_bpb" in results[0]:
        gzip = f"{results[0]['gzip_bpb']:.4f} bits per byte"
        lines.append(f"For scale, gzip -9 of each validation document takes {gzip}.")
    return lines


def ending_block(log: Path) -> list[str]:
    """The last lines of a run, as the first screen of README.md shows them."""
    figures = ("artifact_bytes", "seed", "steps", "val_bpb")
    result = result_of(log)
    final = json.dumps({name: result[name] for name in figures}).replace("}", ", ...}")
    text = log.read_text(encoding="utf-8")
    scores = re.findall(r"^(?:diagnostic|quantized_ttt_lora) .*val_bpb:.*$", text, re.MULTILINE)
    table = re.search(r"^phase  .*\n(?:.*\n)*?all of eval.*$", text, re.MULTILINE)
    closing = re.findall(r"^(?:score|size|log|artifact|next) {3,}\S.*$", text, re.MULTILINE)
    return ["```", *scores, table[0], *closing, f"final {final}", "```"]


def experiment_block(seeds: list[Path], systems: list[Path]) -> list[str]:
    """The entry of EXPERIMENTS.md that says what was run, on what, with which figures."""
    first = result_of(seeds[0])
    dates = sorted({path.name[:10] for path in seeds + systems})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return [
        f"## {dates[-1]} Evidence of source {first['code_sha256'][:8]}",
        "",
        "Idea: the figures of README.md and submission.json, made by one command, `make evidence`.",
        f"Run on {days}: {first['device']}, torch {first['torch']}, Python {first['python']}.",
        "",
        *figures_of("Three seeds of `make run`", seeds, "seed"),
        "",
        *figures_of(f"Systems side by side, SHRINK=1, {SYSTEM_SECONDS} s each", systems, "preset"),
        "",
        "Verdict: every phase of every system works on this source. Training is stopped by the",
        "clock, so steps, and with them scores, follow the speed of the machine at the hour.",
    ]


def figures_of(title: str, logs: list[Path], key: str) -> list[str]:
    """A table with a row a run: steps, milliseconds a step, and the three scores."""
    head = [key, "steps", "ms/step", "before quantisation", "quantised", "adapted"]
    rows = []
    for log in logs:
        result = result_of(log)
        step_ms = 1000 * result["seconds"]["train"] / result["steps"]
        cells = [str(result[key]), str(result["steps"]), f"{step_ms:.0f}"]
        for score in ("pre_quantization_bpb", "quantized_bpb", "val_bpb"):
            cells.append(f"{result[score]:.4f}")
        rows.append(cells)
    return [f"{title}:", "", tables.markdown_table(head, rows)]


def write_documents(folder: Path, script: Path) -> None:
    """Rewrites README.md, EXPERIMENTS.md and submission.json from the kept logs."""
    seeds, systems = kept_logs(folder)
    results = [result_of(log) for log in seeds]
    hashes = {result_of(log)["code_sha256"] for log in seeds + systems}
    if len(hashes) > 1:
        raise UsageError(f"{folder / 'logs'}: the kept logs are of {len(hashes)} different sources")
    readme = folder / "README.md"
    report = [sys.executable, str(ROOT / "tools" / "report.py")]
    claim = ["--name", CLAIM.format(hardware=results[0]["device"]), "--date", seeds[-1].name[:10]]
    submission = ["--submission", str(folder / "submission.json"), *claim]
    audits = [folder / "logs" / "verdicts" / f"{log.stem}.json" for log in seeds]
    if all(audit.is_file() for audit in audits):
        submission += ["--audit", *map(str, audits)]
    commands = [
        [*report, *map(str, seeds), "--markdown", str(readme), *submission],
        [*report, "--compare", *map(str, systems), "--markdown", str(readme), *claim[2:]],
    ]
    for command in commands:
        if subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL).returncode:
            raise UsageError(f"report.py refused the kept logs: {' '.join(command[2:])}")
    # The log of what a user sees who changes no setting.
    default = next((log for log in seeds if log.stem.endswith(f"seed{Config.seed}")), seeds[0])
    rewrite_block(readme, "ending", ending_block(default))
    rewrite_block(readme, "sizes", sizes_block(script, results))
    rewrite_block(folder / "EXPERIMENTS.md", "evidence", experiment_block(seeds, systems))


def prepare_data(corpus: Path | None, tokenizer: Path | None) -> None:
    """Makes the data sets of all runs under ./data. A corpus that is there is not made anew."""
    program = [sys.executable, str(ROOT / "tools" / "prepare_data.py")]
    commands = [[*program, "pydocs"]]
    if corpus:
        train, val = corpus / "train.jsonl.zst", corpus / "val.jsonl.zst"
        text = ["text", str(train), "--val", str(val), "--tokenizer", str(tokenizer)]
        if not Path("data/datasets/corpus_sp8192/manifest.json").is_file():
            commands.append([*program, *text, "--name", "corpus"])
    for command in commands:
        if subprocess.run(command).returncode:
            raise UsageError(f"the data could not be made: {' '.join(command[1:])}")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, help="folder with train.jsonl.zst and val.jsonl.zst of documents"
    )
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model of 8,192 pieces")
    parser.add_argument("--tables", action="store_true", help="only rewrite the documents")
    args = parser.parse_args(argv)
    if (args.corpus is None) != (args.tokenizer is None):
        parser.error("--corpus and --tokenizer go together")
    return args


def main(argv: list[str]) -> int:
    """Exit status: 0 when the evidence is complete, 2, with one line, when it cannot be made."""
    args = parse_arguments(argv)
    script = ROOT / "train_gpt.py"
    try:
        if not args.tables:
            prepare_data(args.corpus, args.tokenizer)
            runs = [*seed_runs(), *system_runs(args.corpus is not None)]
            logs = complete(runs, script, ROOT, CODE_SHA256)
            for run, log in list(zip(runs, logs, strict=True))[: len(SEEDS)]:
                judge(run, log, ROOT)
            forget_other_verdicts(keep_logs(runs, logs, ROOT)[: len(SEEDS)], ROOT)
        write_documents(ROOT, script)
    except UsageError as error:
        print(f"evidence.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
