"""Makes, checks and evaluates the folder of a submission.

    pack.py RUN_DIR OUT           write OUT from a finished run: packed code, readable source,
                                  artifact, logs, claim
    pack.py --check FOLDER        verify any such folder: a line per problem and exit status 2, or
                                  one line and 0
    pack.py --evaluate FOLDER DATA_DIR=/path/to/data [NAME=value ..]
                                  score FOLDER's artifact with FOLDER's code, in a fresh process
                                  that knows nothing but the log's knobs and these variables, in an
                                  empty directory; compare with the log
    pack.py --code FILE           write only the packed train_gpt.py, to train from it: a run counts
                                  the bytes of the file that runs, so only a run from the packed
                                  file can use the whole limit
    pack.py --seal FOLDER         after you edited README.md: renew SHA256SUMS, then check

train_gpt.py and the artifact (*.ptz) count against the limit, as `wc -c` counts them; everything
else is for readers. The packed file is the readable source without what a program does not need, as
tools/packed_code.py makes it. --check proves that both are one program, and that code, logs,
artifact and claim belong together. `sha256sum -c SHA256SUMS` checks the files without our tools.

The log of RUN_DIR is looked for in logs/ beside runs/; that of a sweep's run is called
logs/NAME-0000.txt. --log names another, or those of further seeds of the same claim.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(ROOT))
import commitment  # noqa: E402
import runlog  # noqa: E402
import submission  # noqa: E402
from digests import sha256  # noqa: E402
from packed_code import PACKED, READABLE, pack_code, packed_size, same_program, unpack_code  # noqa: E402
from runlog import LogError, Run  # noqa: E402
from submission import Claimant, CountedFiles  # noqa: E402
from tables import markdown_table  # noqa: E402

from train_gpt import LIMIT_BYTES, UsageError, write_atomic  # noqa: E402

__all__ = ["packed_size"]  # for callers that only want to know the size

CLAIM = "submission.json"
SUMS = "SHA256SUMS"
README = "README.md"
REQUIREMENTS = "requirements.txt"
AUDIT = "audit.json"
REQUIRED = (PACKED, READABLE, CLAIM, SUMS, README, REQUIREMENTS)
# Artifact and logs: at least one of each.
OPTIONAL = re.compile(r"[\w.-]+\.ptz|train_seed\d+\.log|audit\.json")
# What the final line of a log must hold beside the facts, and which of that must be numbers.
NUMBERS = (
    "seed",
    "val_bpb",
    "val_loss",
    "val_tokens",
    "val_bytes",
    "model_bytes",
    "code_bytes",
)
NEEDED = (*runlog.FACTS, "artifact_sha256", "seconds", *NUMBERS)
# The most by which an evaluation may differ from the log, in bits per byte.
MAX_BPB_DIFFERENCE = 1e-9

Files = dict[str, bytes]  # name -> content of every file of a folder


# === Logs =========================================================================================
def read_log(name: str, log: bytes) -> Run:
    """A finished run. Raises LogError unless one final line holds every figure of a claim."""
    text = log.decode(errors="replace")
    final = runlog.read_final(text)
    missing = [key for key in NEEDED if final.get(key) is None]
    if missing:
        raise LogError(f"its final line lacks {', '.join(missing)}")
    wrong = [key for key in NUMBERS if type(final[key]) not in (int, float)]
    if wrong:
        raise LogError(f"its final line has no number as {', '.join(wrong)}")
    return runlog.run_of_text(Path(name), text)


def log_name(run: Run) -> str:
    """The name of a run's log in the folder."""
    return f"train_seed{run.final['seed']}.log"


# === Claim, list of sums, README ==================================================================
def make_claim(packed: bytes, artifact: str, runs: list[Run], claimant: Claimant) -> dict[str, Any]:
    """The content of submission.json, with figures from logs and counted files only."""
    counted = CountedFiles([PACKED, artifact], len(packed))
    return submission.build_submission(runs, claimant, counted)


def make_sums(files: Files) -> bytes:
    """The content of SHA256SUMS, in the format of sha256sum."""
    lines = [f"{sha256(files[name])}  {name}\n" for name in sorted(files) if name != SUMS]
    return "".join(lines).encode()


def make_readme(claim: dict[str, Any], files: Files, artifact: str, log: bytes) -> bytes:
    """A page for readers: the scores, the files that count, and the command that scores the
    artifact.
    """
    rows = []
    for seed, result in claim["seed_results"].items():
        bpb = f"{result['val_bpb']:.5f}"
        loss = f"{result['val_loss']:.5f}"
        rows.append([seed, bpb, loss, f"{result['artifact_bytes']:,}"])
    table = markdown_table(["seed", "val_bpb", "val_loss", "code + model bytes"], rows)
    deviation = ""
    if claim["val_bpb_std"] is not None:
        deviation = f" (standard deviation {claim['val_bpb_std']:.5f})"
    knobs = runlog.evaluation_variables(log.decode(errors="replace"))
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in knobs.items())
    page = f"""# {claim["name"] or "Submission"}

val_bpb {claim["val_bpb"]:.5f}{deviation} on {claim["dataset"]}, {claim["hardware"]}.

{table}

Counted: `{PACKED}` ({len(files[PACKED]):,} bytes, packed) and `{artifact}` \
({len(files[artifact]):,} bytes).
`{READABLE}` is the same program for readers; `tools/pack.py --check` of its repository proves it.
Tokenizer: the SentencePiece model with SHA-256 `{claim["tokenizer_sha256"]}`.

To score the artifact, in an empty directory; FOLDER is this folder, DATA holds `datasets/` and \
`tokenizers/`:

```
env -i PATH="$PATH" {variables} DATA_DIR=DATA EVAL_ONLY_PATH=FOLDER/{artifact} \
python FOLDER/{PACKED}
```
"""
    return page.encode()


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
    if not paths:
        raise UsageError(f"{run_dir}: its log is not {own}; --log must name it")
    logs = []
    for path in paths:
        content = path.read_bytes()
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
    path_of_hash = {sha256(path.read_bytes()): path for path in sorted(run_dir.glob("*.ptz"))}
    for log in logs:
        path = path_of_hash.get(log.run.final["artifact_sha256"])
        if path:
            return Origin(path, log)
    shown = ", ".join(str(log.path) for log in logs)
    raise UsageError(f"{run_dir}: holds no artifact (*.ptz) that {shown} speaks of")


def find_source(given: Path | None, log: ReadLog) -> bytes:
    """The readable code of a run: the text at the head of its log, or a file. Raises UsageError."""
    path = given or ROOT / PACKED
    wanted = log.run.final["code_sha256"]
    for source in (runlog.source_at_head(log.content), path.read_bytes()):
        if source is not None and sha256(source) == wanted:
            return source
    reason = f"is not the code of the run (code_sha256 {wanted[:12]}..)"
    raise UsageError(f"{path}: {reason}; --source must name that")


def build(args: argparse.Namespace) -> Files:
    """All files of the folder for a finished run.

    Raises UsageError if a part is missing or of another run.
    """
    logs = find_logs(args.run_dir, args.log)
    origin = find_artifact(args.run_dir, logs)
    artifact = origin.artifact.name
    source = find_source(args.source, origin.log)
    files = {
        PACKED: pack_code(source),
        READABLE: source,
        artifact: origin.artifact.read_bytes(),
        REQUIREMENTS: args.requirements.read_bytes(),
    }
    for log in logs:
        files[log_name(log.run)] = log.content
    audit = args.run_dir / AUDIT
    if audit.is_file():
        files[AUDIT] = audit.read_bytes()
    claimant = Claimant(**{field: getattr(args, field) for field in Claimant._fields})
    claim = make_claim(files[PACKED], artifact, [log.run for log in logs], claimant)
    files[CLAIM] = submission.as_bytes(claim)
    files[README] = make_readme(claim, files, artifact, origin.log.content)
    return {**files, SUMS: make_sums(files)}


def write_folder(args: argparse.Namespace) -> Path:
    """Writes the folder of a run, once it has passed all checks; returns it."""
    out = Path(args.out)
    args.run_dir = Path(args.run_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not an empty folder")
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

    files: Files  # the regular ones
    problems: list[str]  # one for each other entry


def load(folder: Path) -> Folder:
    """Reads all files of a folder."""
    files = {}
    problems = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            problems.append(f"{path.name}: only regular files belong here, no folder and no link")
        else:
            files[path.name] = path.read_bytes()
    return Folder(files, problems)


@dataclasses.dataclass
class Contents:
    """The files of a submission, and what its logs say."""

    files: Files

    @functools.cached_property
    def artifacts(self) -> list[str]:
        """The names of all artifacts."""
        return [name for name in self.files if name.endswith(".ptz")]

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

    def has(self, *names: str) -> bool:
        """Whether all these files are there."""
        return all(name in self.files for name in names)


def check(files: Files) -> Iterator[str]:
    """Yields one line per problem; a missing file is reported once."""
    contents = Contents(files)
    for find_problems in CHECKS:
        yield from find_problems(contents)


def check_names(contents: Contents) -> Iterator[str]:
    """Files that are missing, and files that do not belong here."""
    for name in REQUIRED:
        if name not in contents.files:
            yield f"{name}: missing"
    for name in contents.files:
        if name not in REQUIRED and not OPTIONAL.fullmatch(name):
            yield f"{name}: not part of a submission"
    if len(contents.artifacts) != 1:
        yield f"*.ptz: one artifact belongs here, not {len(contents.artifacts)}"
    if not contents.logs:
        yield "train_seed*.log: missing"


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


def over_limit(total: int) -> str:
    """By how much a size is over the limit, in words."""
    return f"{total - LIMIT_BYTES} over the limit of {LIMIT_BYTES}"


def check_facts(contents: Contents) -> Iterator[str]:
    """Facts that must be equal over all seeds and are not."""
    for key in runlog.FACTS:
        values = {str(run.final[key]) for run in contents.runs.values()}
        if len(values) > 1:
            yield f"{key}: differs between the logs: {', '.join(sorted(values))}"


def check_samples(contents: Contents) -> Iterator[str]:
    """Logs of a sample of the validation documents, which claim nothing."""
    for name, run in contents.runs.items():
        if reason := commitment.no_claim(run.settings):
            yield f"{name}: {reason}"


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
    """Whether submission.json says what logs and files imply."""
    if len(contents.artifacts) != 1 or not contents.runs or not contents.has(PACKED, CLAIM):
        return
    try:
        claim = json.loads(contents.files[CLAIM])
        claimant = Claimant(**{field: claim.get(field, "") for field in Claimant._fields})
    except (ValueError, AttributeError):
        yield f"{CLAIM}: is no JSON object"
        return
    runs = list(contents.runs.values())
    real = make_claim(contents.files[PACKED], contents.artifacts[0], runs, claimant)
    for key in sorted(real.keys() | claim.keys()):
        if claim.get(key) != real.get(key):
            yield f"{CLAIM}: {key} is not what logs and files say"


CHECKS = (
    check_names,
    check_sums,
    check_code,
    check_log_names,
    check_logs,
    check_facts,
    check_samples,
    check_artifact,
    check_claim,
)


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
        **runlog.evaluation_variables(log.decode(errors="replace")),
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
    defaults = Claimant(date=time.strftime("%Y-%m-%d"))
    for name, default in defaults._asdict().items():
        about = f"of {CLAIM}; default {default!r}"
        add(f"--{name.replace('_', '-')}", default=default, metavar="TEXT", help=about)
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
    needed_words = 0 if args.check or args.seal or args.code else 2
    if len(words) != needed_words:
        ways = "RUN_DIR OUT, or one of --check, --evaluate, --seal, --code"
        parser.error(f"takes {ways}; --help explains")
    return args


def write_code(source: Path, out: Path) -> None:
    """Writes the packed code of a readable source."""
    readable = source.read_bytes()
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
    claim = json.loads(loaded.files[CLAIM])
    model = Contents(loaded.files).artifacts[0]
    code_bytes = len(loaded.files[PACKED])
    model_bytes = len(loaded.files[model])
    total = code_bytes + model_bytes
    print(
        f"{folder}: holds together; {PACKED} {code_bytes:,} + {model} {model_bytes:,} = "
        f"{total:,} bytes, {LIMIT_BYTES - total:,} under the limit; "
        f"val_bpb {claim['val_bpb']:.5f} of {claim['seeds']}"
    )
    return loaded.files


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
    except OSError as error:
        return report_problems(f"{error.filename}: {error.strerror}")
    return 0


def report_problems(text: str) -> int:
    """Prints a line per problem; returns exit status 2."""
    for line in text.splitlines():
        print(f"pack.py: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
