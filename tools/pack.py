"""Makes, checks and evaluates the folder of a submission.

    pack.py RUN_DIR OUT           write OUT from a finished run: packed code, readable source,
                                  artifact, its documents' scores, logs, audits, claim
    pack.py [RUN_DIR] --records records --name NAME --author AUTHOR --track TRACK
                                  the same as records/TRACK/<day of the run>_NAME, without the
                                  weights unless --weights; default: the newest run with an artifact
    pack.py --check FOLDER        verify a submission of ours or in the form of the accepted
                                  records: a line per problem and exit status 2, or one line and 0
    pack.py --evaluate FOLDER DATA_DIR=/path/to/data [NAME=value ..]
                                  score FOLDER's artifact with FOLDER's code, in a fresh process
                                  that knows nothing but the log's knobs and these variables, in an
                                  empty directory; compare with the log
    pack.py --code FILE           write only the packed train_gpt.py, to train from it: a run counts
                                  the bytes of the file that runs, so only a run from the packed
                                  file can use the whole limit
    pack.py --seal FOLDER         after you edited README.md: renew SHA256SUMS, then check

train_gpt.py and the artifact (*.ptz) count against the limit, as `wc -c` counts them; everything
else is for readers, and more files and more fields of submission.json may lie there. The packed
file is the readable source without what a program does not need, as tools/packed_code.py makes it.
--check proves that both are one program, and that code, logs, artifact and claim belong together.
`sha256sum -c SHA256SUMS` checks the files without our tools.

The log of RUN_DIR is looked for in logs/ beside runs/; that of a sweep's run is called
logs/NAME-0000.txt. --log names another, or those of further seeds of the same claim. --baseline
names logs to compare with, which the folder then holds.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import decimal
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(ROOT))
import claims  # noqa: E402
import commitment  # noqa: E402
import logtext  # noqa: E402
import runlog  # noqa: E402
import submission  # noqa: E402
import terminal  # noqa: E402
from digests import sha256  # noqa: E402
from packed_code import PACKED, READABLE, pack_code, packed_size, same_program, unpack_code  # noqa: E402
from run_documents import ARTIFACT, DOCUMENTS, arrays_of, newest_run  # noqa: E402
from runlog import LogError, Run  # noqa: E402
from submission import Claimant, Compliance, CountedFiles  # noqa: E402
from submission_page import make_readme  # noqa: E402

from train_gpt import (  # noqa: E402
    LIMIT_BYTES,
    MAX_ARTIFACT_BYTES,
    MAX_JSON_BYTES,
    MAX_LOG_BYTES,
    NUMBER,
    TEXT_LINE,
    UsageError,
    fault_in,
    read_regular,
    reason_of,
    write_atomic,
)

__all__ = ["packed_size"]  # for callers that only want to know the size

CLAIM = "submission.json"
SUMS = "SHA256SUMS"
README = "README.md"
REQUIREMENTS = "requirements.txt"
AUDIT = "audit.json"  # of the artifact's run; those of other seeds have the seed in their name
REQUIRED = (PACKED, READABLE, CLAIM, SUMS, README, REQUIREMENTS)
BASELINE = "baseline"  # folder of the logs that the claim is compared with
# What the final line of a log must hold; runlog reads no figure of a wrong type.
NEEDED = (
    *runlog.FACTS,
    "artifact_sha256",
    "seconds",
    "seed",
    "val_bpb",
    "val_loss",
    "val_tokens",
    "val_bytes",
    "model_bytes",
    "code_bytes",
)
# The most by which an evaluation may differ from the log, in bits per byte.
MAX_BPB_DIFFERENCE = 1e-9

Files = dict[str, bytes]  # name -> content of every file of a folder


# === Logs =========================================================================================
def read_log(name: str, log: bytes) -> Run:
    """A finished run. Raises LogError unless one final line holds every figure of a claim."""
    text = logtext.decode(log)
    final = runlog.read_final(text)
    missing = [key for key in NEEDED if key not in final]
    if missing:
        raise LogError(f"its final line lacks {', '.join(missing)}")
    return runlog.run_of_text(Path(name), text)


def runs_in(name: str, content: bytes) -> list[Run]:
    """The finished runs of a log of a folder. Raises LogError if it holds none."""
    return runlog.runs_of_text(Path(name), logtext.decode(content))


def log_name(run: Run) -> str:
    """The name of a run's log in the folder."""
    return f"train_seed{run.final['seed']}.log"


# === Claim, list of sums ==========================================================================
def make_claim(packed: bytes, runs: list[Run], claimant: Claimant, **more: Any) -> dict[str, Any]:
    """The content of submission.json, with figures from logs and counted files only.

    `more`: compliance and baseline, as `build_submission` takes them.
    """
    counted = CountedFiles([PACKED, ARTIFACT], len(packed))
    return submission.build_submission(runs, claimant, counted, **more)


def make_sums(files: Files) -> bytes:
    """The content of SHA256SUMS, in the format of sha256sum."""
    lines = [f"{sha256(files[name])}  {name}\n" for name in sorted(files) if name != SUMS]
    return "".join(lines).encode()


# === A folder from a finished run =================================================================
class ReadLog(NamedTuple):
    """A log and what it says."""

    path: Path
    content: bytes
    run: Run


def find_logs(run_dir: Path, given: list[Path]) -> list[ReadLog]:
    """The log of a run, unless it is among those given, then these. Raises UsageError for a bad
    one.
    """
    own = runlog.log_of_run(run_dir)
    paths = list(given)
    if own.is_file() and own.resolve() not in [path.resolve() for path in given]:
        paths.insert(0, own)
    if not paths and not run_dir.is_dir():
        raise UsageError(f"{run_dir}: there is no such folder of a run")
    if not paths:
        raise UsageError(f"{run_dir}: its log is not {own}; --log (LOGS= of make) must name it")
    logs = []
    for path in paths:
        content = read_regular(path, MAX_LOG_BYTES)
        try:
            logs.append(ReadLog(path, content, read_log(str(path), content)))
        except LogError as error:
            raise UsageError(f"{path}: {error}") from error
    seeds = [log.run.seed for log in logs]
    for seed in seeds:
        if seeds.count(seed) > 1:
            shown = ", ".join(map(str, paths))
            raise UsageError(f"--log: {shown} are more than once of seed {seed}")
    return logs


class Origin(NamedTuple):
    """The artifact of a folder and the log of the run that made it."""

    artifact: Path
    log: ReadLog


def find_artifact(run_dir: Path, logs: list[ReadLog]) -> Origin:
    """The artifact in a run's folder that a log names. Raises UsageError if there is none."""
    paths = sorted(run_dir.glob("*.ptz"))
    path_of_hash = {sha256(read_regular(path, MAX_ARTIFACT_BYTES)): path for path in paths}
    for log in logs:
        path = path_of_hash.get(log.run.final["artifact_sha256"])
        if path:
            return Origin(path, log)
    shown = ", ".join(str(log.path) for log in logs)
    if paths:
        raise UsageError(f"{paths[0]}: is not the artifact that {shown} speaks of")
    raise UsageError(f"{run_dir}: holds no artifact (*.ptz) that {shown} speaks of")


def find_source(given: Path | None, log: ReadLog) -> bytes:
    """The readable code of a run: the text at the head of its log, or a file. Raises UsageError."""
    path = given or ROOT / PACKED
    wanted = log.run.final["code_sha256"]
    source = submission.source_of(log.content, wanted, path)
    if source is not None:
        return source
    reason = f"is not the code of the run (code_sha256 {wanted[:12]}..)"
    raise UsageError(f"{path}: {reason}; --source must name that")


def build(args: argparse.Namespace) -> Files:
    """All files of the folder for a finished run.

    Raises UsageError if a part is missing or of another run.
    """
    logs = find_logs(args.run_dir, args.log)
    origin = find_artifact(args.run_dir, logs)
    source = find_source(args.source, origin.log)
    files = {
        PACKED: pack_code(source),
        READABLE: source,
        REQUIREMENTS: read_regular(args.requirements, MAX_JSON_BYTES),
    }
    if args.weights or not args.records:
        files[origin.artifact.name] = origin.artifact.read_bytes()
    for log in logs:
        files[log_name(log.run)] = log.content
    documents = origin.artifact.with_name(DOCUMENTS)
    if documents.is_file():
        files[DOCUMENTS] = read_regular(documents, MAX_LOG_BYTES)
    files |= audit_files(args.run_dir, logs, origin)
    files |= baseline_files(args.baseline)
    baseline = claims.read_finished(args.baseline).runs if args.baseline else []
    runs = sorted([log.run for log in logs], key=submission.seed_order)
    claim = make_claim(
        files[PACKED],
        runs,
        Claimant.of(args, runs),
        compliance=read_compliance(files, runs),
        baseline=baseline,
    )
    files[CLAIM] = submission.as_bytes(claim)
    files[README] = make_readme(
        claim,
        runs,
        origin.artifact.name if origin.artifact.name in files else None,
        {name: len(content) for name, content in files.items()},
        logtext.decode(origin.log.content),
    )
    return {**files, SUMS: make_sums(files)}


def audit_files(run_dir: Path, logs: list[ReadLog], origin: Origin) -> Files:
    """The audits in the folders of the runs; audit.json is that of the artifact."""
    files = {}
    for log in logs:
        is_of_artifact = log is origin.log
        path = run_dir / AUDIT if is_of_artifact else submission.audit_of_run(log.run)
        if path and path.is_file():
            name = AUDIT if is_of_artifact else f"audit_seed{log.run.final['seed']}.json"
            files[name] = read_regular(path, MAX_JSON_BYTES)
    return files


def baseline_files(paths: list[Path]) -> Files:
    """The logs to compare with. Raises UsageError where two would have one name in the folder."""
    files = {}
    for path in paths:
        name = f"{BASELINE}/{path.name}"
        if name in files:
            raise UsageError(f"--baseline {path}: is not the only one called {path.name}")
        files[name] = read_regular(path, MAX_LOG_BYTES)
    return files


def audits_of(files: Files) -> dict[str, submission.Audit]:
    """Name -> audit, of those in a folder that can be read."""
    audits = {}
    for name, content in files.items():
        if re.fullmatch(r"audit(_seed\d+)?\.json", name):
            with contextlib.suppress(LogError):
                audits[name] = submission.audit_of_text(content.decode(errors="replace"))
    return audits


def read_compliance(files: Files, runs: list[Run]) -> Compliance:
    """What the audits of a folder show of its runs."""
    return submission.compliance_of(runs, list(audits_of(files).values()))


def record_folder(args: argparse.Namespace) -> Path:
    """Where the records keep a submission: TRACK/<day>_<name>. Raises UsageError without them."""
    missing = [f"--{field}" for field in ("name", "author", "track") if not getattr(args, field)]
    if missing:
        raise UsageError(
            f"{', '.join(missing)}: missing; make pack NAME=.. AUTHOR=.. TRACK=track_10min_16mb"
        )
    first = min((log.run for log in find_logs(args.run_dir, args.log)), key=submission.seed_order)
    day = args.date or submission.day_of(first)
    name = re.sub(r"[^\w.+-]+", "_", args.name).strip("_.")
    return args.records / f"track_{args.track.removeprefix('track_')}" / f"{day}_{name}"


def write_folder(args: argparse.Namespace) -> Path:
    """Writes the folder of a run, once it has passed all checks; returns it."""
    if args.date and not submission.is_day(args.date):
        raise UsageError(f"--date {args.date}: must be a day, YYYY-MM-DD")
    args.run_dir = Path(args.run_dir) if args.run_dir else newest_run()
    out = record_folder(args) if args.records else Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not an empty folder; remove it or name another")
    files = build(args)
    problems = list(check(files))
    if problems:
        raise UsageError("\n".join(problems))
    for name, content in files.items():
        write_atomic(out / name, content)
    return out


# === Checks =======================================================================================
class Folder(NamedTuple):
    """A folder as it lies on disk."""

    files: Files  # the regular ones, by their path within it
    problems: list[str]  # one for each other entry


def load(folder: Path) -> Folder:
    """Reads all files of a folder and of the folders in it."""
    files = {}
    problems = []
    entries = sorted(folder.iterdir())
    while entries:
        path = entries.pop(0)
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            problems.append(f"{name}: is a link; only regular files and folders belong here")
        elif path.is_dir():
            entries += sorted(path.iterdir())
        elif path.is_file():
            files[name] = read_regular(path, MAX_LOG_BYTES)
        else:
            problems.append(f"{name}: is no regular file")
    return Folder(files, problems)


@dataclasses.dataclass
class Contents:
    """The files of a submission, and what its logs say."""

    files: Files

    @functools.cached_property
    def artifacts(self) -> list[str]:
        """The names of all artifacts."""
        return [name for name in self.files if name.endswith(".ptz") and "/" not in name]

    @property
    def is_ours(self) -> bool:
        """Whether our tools wrote the folder, so that all they write must be there."""
        return READABLE in self.files or SUMS in self.files or bool(self.runs)

    @functools.cached_property
    def logs(self) -> list[str]:
        """The names of all logs."""
        return [name for name in self.files if re.fullmatch(r"train_.*\.log", name)]

    @functools.cached_property
    def runs(self) -> dict[str, Run]:
        """Log -> run, of the logs that can be read."""
        runs = {}
        for name in self.logs:
            try:
                runs[name] = read_log(name, self.files[name])
            except LogError:
                continue
        return runs

    @functools.cached_property
    def baseline(self) -> list[Run]:
        """The runs that the claim is compared with, of the logs that can be read."""
        runs = []
        for name in self.baseline_logs:
            with contextlib.suppress(LogError):
                runs += runs_in(name, self.files[name])
        return runs

    @property
    def baseline_logs(self) -> list[str]:
        """The names of the logs that the claim is compared with."""
        return [name for name in self.files if name.startswith(f"{BASELINE}/")]

    @functools.cached_property
    def other_runs(self) -> dict[str, list[Run]]:
        """Log -> its finished runs, of all logs of other people's scripts."""
        runs = {}
        for name, content in self.files.items():
            if name.endswith((".log", ".txt")) and not name.startswith(f"{BASELINE}/"):
                with contextlib.suppress(LogError):
                    runs[name] = runs_in(name, content)
        return runs

    @functools.cached_property
    def claim(self) -> dict[str, Any] | None:
        """The content of submission.json, None where it is no JSON object."""
        try:
            claim = json.loads(self.files[CLAIM])
        except (KeyError, ValueError, RecursionError):
            return None
        return claim if isinstance(claim, dict) else None

    def has(self, *names: str) -> bool:
        """Whether all these files are there."""
        return all(name in self.files for name in names)


def check(files: Files) -> Iterator[str]:
    """Yields one line per problem; a missing file is reported once."""
    contents = Contents(files)
    for find_problems in CHECKS if contents.is_ours else OTHER_CHECKS:
        yield from find_problems(contents)


def check_names(contents: Contents) -> Iterator[str]:
    """Files that are missing, and code that counts but is not counted."""
    for name in REQUIRED:
        if name not in contents.files:
            yield f"{name}: missing"
    if len(contents.artifacts) > 1:
        yield f"*.ptz: one artifact belongs here, not {len(contents.artifacts)}"
    if not contents.logs:
        yield "train_seed*.log: missing"
    yield from check_imports(contents)


def check_imports(contents: Contents) -> Iterator[str]:
    """Modules of the folder that train_gpt.py imports: they would count against the limit."""
    if PACKED not in contents.files:
        return
    text = contents.files[PACKED].decode(errors="replace")
    with contextlib.suppress(UsageError):
        text = unpack_code(contents.files[PACKED]).text
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported.add(node.module.split(".")[0])
    for name in contents.files:
        stem = name.split("/")[0].removesuffix(".py")
        if name.endswith(".py") and stem in imported:
            size = len(contents.files[name])
            yield f"{name}: {PACKED} imports it, but its {size} bytes are not counted"


def check_sums(contents: Contents) -> Iterator[str]:
    """Files that changed since their sums were taken."""
    if not contents.has(SUMS):
        return
    listed = sums_by_name(contents.files[SUMS])
    changed = False
    for name, digest in sums_by_name(make_sums(contents.files)).items():
        if listed.get(name, digest) != digest:
            changed = True
            yield f"{name}: changed since {SUMS} was written"
    if not changed and contents.files[SUMS] != make_sums(contents.files):
        yield f"{SUMS}: is not the list of exactly these files"


def sums_by_name(sums: bytes) -> dict[str, str]:
    """Name -> all that stands before it in a line of sha256sum."""
    lines = sums.decode(errors="replace").splitlines()
    return {line[66:]: line[:66] for line in lines}


def check_code(contents: Contents) -> Iterator[str]:
    """Whether the packed and the readable code are one program."""
    if not contents.has(PACKED, READABLE):
        return
    readable = contents.files[READABLE]
    try:
        unpacked = unpack_code(contents.files[PACKED])
        if not same_program(readable, unpacked.text):
            yield f"{READABLE}: is another program than {PACKED} unpacks to"
        elif unpacked.sha256 != sha256(readable):
            yield f"{READABLE}: is not the text that {PACKED} was made of"
    except UsageError as error:
        yield str(error)


def check_log_names(contents: Contents) -> Iterator[str]:
    """Logs that cannot be read or that have another seed's name."""
    for name in contents.logs:
        try:
            run = read_log(name, contents.files[name])
        except LogError as error:
            yield f"{name}: {error}"
            continue
        if name != log_name(run):
            yield f"{name}: is of seed {run.final['seed']}"


def check_logs(contents: Contents) -> Iterator[str]:
    """Logs of other code, or of sizes that cannot be."""
    for name, run in contents.runs.items():
        yield from check_log_code(contents, name, run.final)
        if contents.has(PACKED):
            total = run.final["model_bytes"] + len(contents.files[PACKED])
            if total > LIMIT_BYTES:
                yield f"{name}: code and model take {total} bytes, {over_limit(total)}"


def check_log_code(contents: Contents, name: str, final: dict[str, Any]) -> Iterator[str]:
    """Whether a log is of this code: the file that ran was the readable or the packed one."""
    files = contents.files
    if not contents.has(READABLE):
        return
    if final["code_sha256"] != sha256(files[READABLE]):
        shown = f"{final['code_sha256'][:12]}.."
        yield f"{name}: is a log of other code than {READABLE} (code_sha256 {shown})"
        return
    forms = [form for form in (READABLE, PACKED) if form in files]
    same_size = [form for form in forms if len(files[form]) == final["code_bytes"]]
    if not same_size:
        if contents.has(PACKED):
            counts = f"counts {final['code_bytes']} bytes of code"
            yield f"{name}: {counts}, neither {READABLE} nor {PACKED} has as many"
        return
    ran = final.get("file_sha256")
    if ran is not None and ran not in [sha256(files[form]) for form in same_size]:
        yield f"{name}: the file that ran (file_sha256 {ran[:12]}..) is not here"


def check_budgets(contents: Contents) -> Iterator[str]:
    """Logs that say that a budget of time was overrun."""
    for name, run in contents.runs.items():
        text = logtext.decode(contents.files[name])
        for total in runlog.read_budget_totals(text):
            if total.is_over or 0 < total.limit < total.seconds:
                yield f"{name}: {total.budget} took {total.seconds:.1f} s of {total.limit:g}, OVER"
        if run.final.get("over"):
            yield f"{name}: its final line says over: {run.final['over']}"


def over_limit(total: int) -> str:
    """By how much a size is over the limit, in words."""
    return f"{total - LIMIT_BYTES} over the limit of {LIMIT_BYTES}"


def check_facts(contents: Contents) -> Iterator[str]:
    """Facts that must be equal over all seeds and are not."""
    for key in runlog.FACTS:
        values = {str(run.final[key]) for run in contents.runs.values()}
        if len(values) > 1:
            yield f"{key}: differs between the logs: {', '.join(sorted(values))}"
    for knob, values in claims.differences(list(contents.runs.values())).items():
        if knob not in runlog.FACTS:
            shown = ", ".join(dict.fromkeys(values))
            yield f"{knob.upper()}: differs between the logs: {shown}"


def check_audit(contents: Contents) -> Iterator[str]:
    """What the audit, or the claim itself, says does not hold."""
    for audit, (_, properties) in audits_of(contents.files).items():
        for name, held in properties.items():
            if held.get("passed") is False:
                yield f"{audit}: says that {name} does not hold"
    flags = (contents.claim or {}).get("compliance")
    # Of our runs the limits are judged by the logs, whose budgets may be others.
    judged = {"train_under_600s", "eval_under_600s", "artifact_under_16mb"}
    for name, holds in flags.items() if isinstance(flags, dict) else ():
        if holds is False and not (contents.is_ours and name in judged):
            yield f"{CLAIM}: compliance says that {name} does not hold"


def check_samples(contents: Contents) -> Iterator[str]:
    """Logs of a sample of the validation documents, which claim nothing."""
    for name, run in contents.runs.items():
        if reason := commitment.no_claim(run.settings):
            yield f"{name}: {reason}"


def check_documents(contents: Contents) -> Iterator[str]:
    """Whether a log commits to the documents, and its score is what they add up to."""
    runs = contents.runs
    committed = {name: run for name, run in runs.items() if "documents_sha256" in run.final}
    if not committed:
        return
    if not contents.has(DOCUMENTS):
        yield f"{DOCUMENTS}: missing, so no score can be computed from its documents"
        return
    try:
        documents = arrays_of(DOCUMENTS, contents.files[DOCUMENTS])
    except UsageError as error:
        yield str(error)
        return
    if reason := commitment.unfit(documents):
        yield reason
        return
    root = commitment.root(documents)
    owners = [name for name, run in committed.items() if run.final["documents_sha256"] == root]
    if not owners:
        yield f"{DOCUMENTS}: no log commits to these documents (documents_sha256)"
    for name in owners:
        # Whether it is a sample has been looked at, so the settings need not be.
        for problem in commitment.problems(runs[name].final, {}, documents):
            yield f"{name}: {problem}"


def check_baseline(contents: Contents) -> Iterator[str]:
    """Logs to compare with that cannot be read."""
    for name in contents.baseline_logs:
        try:
            runs_in(name, contents.files[name])
        except LogError as error:
            yield f"{name}: {error}"


def check_artifact(contents: Contents) -> Iterator[str]:
    """Whether the artifact is that of a log, the audit is of it, and its size is right."""
    if len(contents.artifacts) != 1 or not contents.runs or not contents.has(PACKED):
        return
    name = contents.artifacts[0]
    digest = sha256(contents.files[name])
    size = len(contents.files[name])
    finals = [run.final for run in contents.runs.values()]
    own = [final for final in finals if final["artifact_sha256"] == digest]
    if not own:
        seeds = " or ".join(str(final["seed"]) for final in finals)
        yield f"{name}: is not the artifact of seed {seeds}"
    elif own[0]["model_bytes"] != size:
        yield f"{name}: has {size} bytes, the log counts {own[0]['model_bytes']}"
    if contents.has(AUDIT) and digest.encode() not in contents.files[AUDIT]:
        yield f"{AUDIT}: does not name this artifact"
    total = size + len(contents.files[PACKED])
    if total > LIMIT_BYTES:
        yield f"{name}: with {PACKED} {total} bytes, {over_limit(total)}"


def check_claim(contents: Contents) -> Iterator[str]:
    """Whether submission.json says what logs and files imply; fields of its own are free."""
    if not contents.runs or not contents.has(PACKED, CLAIM):
        return
    if contents.claim is None:
        yield f"{CLAIM}: is no JSON object"
        return
    yield from check_claimant(contents.claim)
    runs = list(contents.runs.values())
    real = make_claim(
        contents.files[PACKED],
        runs,
        Claimant(),
        compliance=read_compliance(contents.files, runs),
        baseline=contents.baseline,
    )
    yield from compare_claims(contents.claim, real, free=set(Claimant._fields))


def check_claimant(claim: dict[str, Any]) -> Iterator[str]:
    """What every claim must say of itself."""
    given = {name: claim[name] for name in Claimant._fields if claim.get(name) is not None}
    if fault := fault_in(given, dict.fromkeys(given, TEXT_LINE)):
        yield f"{CLAIM}: {fault}"
    if not str(claim.get("name") or claim.get("run_name") or "").strip():
        yield f"{CLAIM}: name is empty"
    day = str(claim.get("date", ""))
    if day and not submission.is_day(day[:10]):
        yield f"{CLAIM}: date {day!r} does not begin with YYYY-MM-DD"


# By how many units of its last digit a figure may be off: half of one, or one where a mean was
# taken of rounded figures.
ROUNDED = 0.51
ROUNDED_TWICE = 1.01
# A score is claimed with at least so many digits behind the point: 2 is no way to say 2.4.
SCORE_DIGITS = 3


def compare_claims(
    claim: dict[str, Any], real: dict[str, Any], free: set[str], units: float = ROUNDED
) -> Iterator[str]:
    """Yields a line for each field that logs and files contradict."""
    for key in sorted(real.keys() - free):
        if key in claim and not agrees({key: claim[key]}, {key: real[key]}, units):
            yield f"{CLAIM}: {key} is not what logs and files say"
    if "val_bpb" not in claim:
        yield f"{CLAIM}: val_bpb is missing"


def agrees(claimed: Any, real: Any, units: float = ROUNDED, least_digits: int = 0) -> bool:
    """Whether a claimed value is the real one, as far as it goes: the digits and fields it has.

    least_digits: behind the point, that a number is held to even where it has fewer.
    """
    if isinstance(real, dict):
        return isinstance(claimed, dict) and all(
            agrees(value, real[key], units, digits_of(key))
            for key, value in claimed.items()
            if key in real
        )
    if isinstance(real, float) and NUMBER.fits(claimed):
        digits = max(least_digits, -decimal.Decimal(repr(claimed)).as_tuple().exponent)
        return abs(claimed - real) <= units * 10.0**-digits
    return claimed == real


def digits_of(name: str) -> int:
    """The least digits of a field."""
    return SCORE_DIGITS if name.endswith(("val_bpb", "val_loss")) else 0


def agrees_with_score(claimed: Any, bpb: float) -> bool:
    """Whether a claimed val_bpb is a score."""
    return agrees(claimed, bpb, least_digits=SCORE_DIGITS)


CHECKS = (
    check_names,
    check_sums,
    check_code,
    check_log_names,
    check_logs,
    check_budgets,
    check_facts,
    check_samples,
    check_documents,
    check_baseline,
    check_audit,
    check_artifact,
    check_claim,
)


# === Submissions of other people ==================================================================
# A clock that is looked at after each step runs over by a step.
STEP_SECONDS = 1.0
# What a log proves of a seed, whoever wrote it.
SEED_FIGURES = ("val_bpb", "val_loss", "artifact_bytes", "steps")


def check_other_names(contents: Contents) -> Iterator[str]:
    """Files that every accepted record has."""
    for name in (PACKED, CLAIM, README):
        if name not in contents.files:
            yield f"{name}: missing"
    if not contents.other_runs:
        yield "*.log: none is the log of a finished run"
    for name in contents.logs:
        if name not in contents.other_runs:
            yield f"{name}: {why_no_run(name, contents.files[name])}"
    yield from check_imports(contents)


def why_no_run(name: str, content: bytes) -> str:
    """Why a log holds no finished run."""
    try:
        runs_in(name, content)
    except LogError as error:
        return str(error)
    return "is no log of a finished run"


def check_other_runs(contents: Contents) -> Iterator[str]:
    """Seeds of other configurations, wrong bytes, and broken limits, in the logs of the claim."""
    claim = contents.claim or {}
    chosen = claimed_runs(contents)
    track = str(claim.get("track", ""))
    is_timed = "non" not in track
    for run in chosen:
        for problem in claims.score_problems(run):
            yield f"{run.path}: {problem}"
        spent = {"train": run.train_seconds or 0, "eval": run.budget_seconds("eval") or 0}
        for budget, seconds in spent.items() if is_timed else ():
            limit = run.limits[budget]
            if not limit:
                if track:
                    yield f"{run.path}: had no budget of {budget}, and the track {track} has one"
            elif seconds > limit + STEP_SECONDS:
                yield f"{run.path}: {budget} took {seconds:.1f} s of {limit:g}, OVER"
        total = run.sizes.get("artifact_bytes", 0)
        if total > LIMIT_BYTES:
            yield f"{run.path}: code and model take {total} bytes, {over_limit(total)}"
    if len(chosen) > 1:
        for knob, values in claims.differences(chosen).items():
            # A knob that one log does not tell may have had any value there.
            if knob != "code_size" and "-" not in values:
                shown = ", ".join(dict.fromkeys(values))
                yield f"{knob.upper()}: differs between the logs: {shown}"


def claimed_runs(contents: Contents) -> list[Run]:
    """The runs of the seeds that a claim names, else all; of several of a seed the claimed one."""
    runs = [run for runs in contents.other_runs.values() for run in runs]
    claim = contents.claim or {}
    results = results_by_seed(claim)
    if not results:
        runs = claims.without_copies(runs)
        claimed = claim.get("val_bpb")
        if not runs or agrees_with_score(claimed, statistics.fmean(run.score.bpb for run in runs)):
            return runs
        # Else the claim may be of one run, which the others support.
        return [run for run in runs if is_score_of(claimed, run)] or runs
    chosen = []
    for seed, result in results.items():
        of_seed = [run for run in runs if str(run.seed) == seed]
        agreeing = [
            run for run in of_seed if agrees_with_score(result.get("val_bpb"), run.score.bpb)
        ]
        chosen += (agreeing or of_seed)[:1]
    return chosen


def is_score_of(claimed: Any, run: Run) -> bool:
    """Whether a run's last score is claimed, or a complete one that is not better."""
    return any(
        score.kind != "before"
        and score.bpb >= run.score.bpb
        and agrees_with_score(claimed, score.bpb)
        for score in run.scores
    )


def results_by_seed(claim: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Seed -> what is claimed of it; accepted records put that into `seed_results` or `seeds`."""
    for key in ("seed_results", "seeds"):
        results = claim.get(key)
        if isinstance(results, dict):
            return {str(seed): dict(r) for seed, r in results.items() if isinstance(r, dict)}
        if isinstance(results, list) and all(type(seed) is int for seed in results) and results:
            return {str(seed): {} for seed in results}
    return {}


def check_other_claim(contents: Contents) -> Iterator[str]:
    """Whether the figures of submission.json are those of the logs."""
    claim = contents.claim
    if not contents.has(CLAIM):
        return
    if claim is None:
        yield f"{CLAIM}: is no JSON object"
        return
    yield from check_claimant(claim)
    chosen = claimed_runs(contents)
    if not chosen:
        return
    real = submission.build_submission(chosen, Claimant())
    results = results_by_seed(claim)
    for seed in sorted(results.keys() - {str(run.seed) for run in chosen}):
        yield f"{CLAIM}: no log is of seed {seed}"
    figures: dict[str, Any] = {}
    if not any(is_score_of(claim.get("val_bpb"), run) for run in chosen):
        figures |= {"val_bpb": real["val_bpb"], "val_loss": real["val_loss"]}
    for name, unit in (("val_bpb_std", "bpb"), ("val_loss_std", "loss")):
        values = [getattr(run.score, unit) for run in chosen]
        # Both deviations are in use, by n - 1 and by n.
        if len(chosen) > 1 and not agrees(
            claim.get(name), statistics.pstdev(values), ROUNDED_TWICE
        ):
            figures[name] = real[name]
    # Whoever timed or compared otherwise than we do may claim so.
    figures["seed_results"] = {
        seed: {name: result[name] for name in SEED_FIGURES if name in result}
        for seed, result in real["seed_results"].items()
    }
    sizes = [run.sizes["artifact_bytes"] for run in chosen if "artifact_bytes" in run.sizes]
    total = claim.get("bytes_total")
    # Of several seeds the largest, the mean or the best one is given.
    if sizes and type(total) is int and not min(sizes) <= total <= max(sizes):
        yield f"{CLAIM}: bytes_total is not that of the logs: {', '.join(map(str, sizes))}"
    stated = {name: value for name, value in claim.items() if value is not None}
    yield from compare_claims(stated, figures, set(), ROUNDED_TWICE)


OTHER_CHECKS = (check_other_names, check_other_runs, check_audit, check_other_claim)


# === Evaluation from the folder alone =============================================================
def log_of_artifact(contents: Contents) -> str:
    """The name of the log whose run made the artifact."""
    digest = sha256(contents.files[contents.artifacts[0]])
    for name, run in contents.runs.items():
        if run.final["artifact_sha256"] == digest:
            return name
    raise UsageError(f"{contents.artifacts[0]}: no log is of its run")


def evaluation_environment(
    folder: Path, artifact: str, log: bytes, given: dict[str, str]
) -> dict[str, str]:
    """The whole environment of an evaluation: the log's knobs and `given`, with absolute paths."""
    variables = {
        "PATH": os.environ.get("PATH", os.defpath),  # for compilers; it holds no state
        **runlog.evaluation_variables(logtext.decode(log)),
        **given,
    }
    for name, value in given.items():
        if name.endswith(("_DIR", "_PATH")):
            variables[name] = str(Path(value).resolve())
    variables["EVAL_ONLY_PATH"] = str((folder / artifact).resolve())
    return variables


def evaluate(folder: Path, files: Files, given: dict[str, str], ranks: int) -> str:
    """Runs the packed code on the artifact in an empty directory; returns a line on the score.

    The log's knobs and `given` are its whole environment. Raises UsageError if the score is not the
    log's.
    """
    contents = Contents(files)
    if not contents.is_ours or not contents.artifacts:
        raise UsageError(f"{folder}: holds no artifact of ours to score")
    log = log_of_artifact(contents)
    command = [sys.executable, str((folder / PACKED).resolve())]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command[1:1] = launcher
    env = evaluation_environment(folder, contents.artifacts[0], files[log], given)
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(command, cwd=empty, env=env, capture_output=True, check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        status = f"the evaluation ended with status {done.returncode}"
        raise UsageError(f"{folder}: {status}: {''.join(last)}")
    try:
        found = read_log("stdout", done.stdout).final
    except LogError as error:
        raise UsageError(f"{folder}: the evaluation's output {error}") from error
    wanted = contents.runs[log].final
    compare_evaluation(folder, found, wanted, len(files[PACKED]))
    return f"evaluated: val_bpb {found['val_bpb']!r}, the log {wanted['val_bpb']!r}"


def compare_evaluation(
    folder: Path, found: dict[str, Any], wanted: dict[str, Any], code_bytes: int
) -> None:
    """Raises UsageError if an evaluation is of other things than the log, or scores otherwise."""
    for key in ("artifact_sha256", "code_sha256", "val_sha256", "val_tokens", "val_bytes"):
        if found[key] != wanted[key]:
            text = f"evaluated with {key} {found[key]}, the log has {wanted[key]}"
            raise UsageError(f"{folder}: {text}")
    if found["code_bytes"] != code_bytes:
        text = f"counted {found['code_bytes']} bytes of code, {PACKED} has {code_bytes}"
        raise UsageError(f"{folder}: {text}")
    if abs(found["val_bpb"] - wanted["val_bpb"]) > MAX_BPB_DIFFERENCE:
        text = f"evaluates to val_bpb {found['val_bpb']!r}, the log has {wanted['val_bpb']!r}"
        raise UsageError(f"{folder}: {text}")


# === Command line =================================================================================
def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "pack.py",
        usage="%(prog)s RUN_DIR OUT [--log FILE ..] | --check FOLDER | ..",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run_dir", nargs="?", metavar="RUN_DIR", help="folder of a finished run, with its artifact")
    add("out", nargs="?", metavar="OUT", help="folder to write; must not exist or be empty")
    variables_help = "environment of --evaluate besides the log's knobs"
    add("variables", nargs="*", metavar="NAME=value", help=variables_help)
    actions = parser.add_mutually_exclusive_group()
    for name, about in (
        ("check", "verify it"),
        ("evaluate", "verify it, then score its artifact"),
        ("seal", "renew its SHA256SUMS, then verify it"),
    ):
        actions.add_argument(f"--{name}", type=Path, metavar="FOLDER", help=about)
    code_help = "write only the packed code of --source"
    actions.add_argument("--code", type=Path, metavar="FILE", help=code_help)
    add("--ranks", type=int, default=1, metavar="N", help="processes of --evaluate, one per GPU")
    log_help = "logs of this run or of further seeds"
    add("--log", type=Path, nargs="+", default=[], metavar="FILE", help=log_help)
    source_help = "readable code; default: what the log opens with, or this one's"
    add("--source", type=Path, metavar="FILE", help=source_help)
    requirements = ROOT / REQUIREMENTS
    requirements_help = "default: this one's"
    add("--requirements", type=Path, default=requirements, metavar="FILE", help=requirements_help)
    add("--records", type=Path, metavar="FOLDER", help="write FOLDER/TRACK/<day>_<name>")
    add("--weights", action="store_true", help="with --records: the artifact too")
    baseline_help = "logs to compare with, kept in the folder"
    add("--baseline", type=Path, nargs="+", default=[], metavar="FILE", help=baseline_help)
    for name in Claimant._fields:
        about = f"of {CLAIM}" + ("; default: the day of the run" if name == "date" else "")
        add(f"--{name.replace('_', '-')}", default="", metavar="TEXT", help=about)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, checked. Ends the program with exit status 2 where they are wrong."""
    parser = build_parser()
    args = parser.parse_args(argv)
    words = [word for word in (args.run_dir, args.out, *args.variables) if word]
    if args.evaluate:
        args.variables = words
        for word in words:
            if "=" not in word:
                parser.error(f"{word}: must be NAME=value")
        return args
    if args.records and len(words) < 2:
        return args
    needed_words = 0 if args.check or args.seal or args.code else 2
    if len(words) != needed_words:
        ways = "RUN_DIR OUT, or one of --check, --evaluate, --seal, --code"
        parser.error(f"takes {ways}; --help explains")
    return args


def write_code(source: Path, out: Path) -> None:
    """Writes the packed code of a readable source."""
    readable = read_regular(source, MAX_LOG_BYTES)
    if out.exists() and out.samefile(source):
        raise UsageError(f"{out}: is the readable source; name another file: --code packed.py")
    packed = pack_code(readable)
    write_atomic(out, packed)
    print(f"{out}: {len(packed):,} bytes, from {len(readable):,} readable ones")


def seal(folder: Path) -> None:
    """Renews the list of sums of a folder."""
    write_atomic(folder / SUMS, make_sums(load(folder).files))


def verify(folder: Path) -> Files:
    """Checks a folder and prints a line about it. Raises UsageError with a line per problem."""
    loaded = load(folder)
    problems = loaded.problems + list(check(loaded.files))
    if problems:
        raise UsageError("\n".join(f"{folder}/{problem}" for problem in problems))
    contents = Contents(loaded.files)
    print(f"{folder}: {summary_of(contents)}")
    if contents.is_ours and not contents.claim.get("compliance_evidence"):
        print(
            "not audited: tools/audit.py on the artifact, then pack again, shows that it is legal"
        )
    return loaded.files


def summary_of(contents: Contents) -> str:
    """A line on a folder that holds together."""
    claim = contents.claim
    code_bytes = len(contents.files[PACKED])
    if not contents.is_ours:
        return (
            f"holds together, in the form of the accepted records; val_bpb {claim['val_bpb']} "
            f"of {', '.join(str(run.path) for run in claimed_runs(contents))}"
        )
    seeds = sorted(run.final["seed"] for run in contents.runs.values())
    score = f"val_bpb {claim['val_bpb']:.5f} of {seeds}"
    if not contents.artifacts:
        return f"holds together, without weights; {PACKED} {code_bytes:,} bytes; {score}"
    model = contents.artifacts[0]
    model_bytes = len(contents.files[model])
    total = code_bytes + model_bytes
    return (
        f"holds together; {PACKED} {code_bytes:,} + {model} {model_bytes:,} = "
        f"{total:,} bytes, {LIMIT_BYTES - total:,} under the limit; {score}"
    )


def run(args: argparse.Namespace) -> None:
    """Does what the arguments ask for. Raises UsageError or OSError where that cannot be done."""
    if args.code:
        write_code(args.source or ROOT / PACKED, args.code)
        return
    if args.seal:
        seal(args.seal)
    folder = args.check or args.evaluate or args.seal or write_folder(args)
    files = verify(folder)
    if args.evaluate:
        given = dict(word.split("=", 1) for word in args.variables)
        print(evaluate(folder, files, given, args.ranks))


def main(argv: list[str]) -> int:
    """Returns the exit status: 0 done, 2 a line per problem on stderr."""
    args = parse(argv)
    try:
        run(args)
    except UsageError as error:
        return report_problems(str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        return report_problems(reason_of(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        reason = "is not installed; make dev brings it into .venv"
        return report_problems(f"{package}: {reason}")
    return 0


def report_problems(text: str) -> int:
    """Prints a line per problem; returns exit status 2."""
    for line in text.splitlines():
        print(f"pack.py: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(terminal.run(main))
