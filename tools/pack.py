"""Makes, checks and evaluates the folder of a submission.

    pack.py RUN_DIR OUT           write OUT from a finished run: packed code, readable source, artifact, logs, claim
    pack.py --check FOLDER        verify any such folder: a line per problem and exit status 2, or one line and 0
    pack.py --evaluate FOLDER DATA_DIR=/path/to/data [NAME=value ..]
                                  score FOLDER's artifact with FOLDER's code, in a fresh process that knows nothing but
                                  the log's knobs and these variables, in an empty directory; compare with the log
    pack.py --code FILE           write only the packed train_gpt.py, to train from it: a run counts the bytes of the
                                  file that runs, so only a run from the packed file can use the whole limit
    pack.py --seal FOLDER         after you edited README.md: renew SHA256SUMS, then check

What counts are train_gpt.py and the artifact (*.ptz), as `wc -c` counts them; everything else is for readers. The
packed file is Python that unpacks itself with the standard library and holds the readable source without comments,
docstrings, annotations that nothing reads and definitions that nothing uses. --check proves that by comparing syntax
trees, and that code, logs, artifact and claim belong together. `sha256sum -c SHA256SUMS` needs no tool of ours.

The log of RUN_DIR (logs/NAME-0000.txt of a sweep's) is sought in logs/ beside runs/; --log names another, or those of
further seeds of the same claim."""

from __future__ import annotations

import argparse
import ast
import bz2
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import log_of_run  # noqa: E402

from train_gpt import LIMIT_BYTES, UsageError, write_atomic  # noqa: E402

PACKED, READABLE, CLAIM, SUMS = (
    "train_gpt.py",
    "train_gpt_readable.py",
    "submission.json",
    "SHA256SUMS",
)
REQUIRED = (PACKED, READABLE, CLAIM, SUMS, "README.md", "requirements.txt")
OPTIONAL = re.compile(
    r"[\w.-]+\.ptz|train_seed\d+\.log|audit\.json"
)  # artifact and logs: at least one of each
FACTS = (
    "code_sha256 dataset val_sha256 tokenizer_sha256 preset device torch world_size".split()
)  # equal over seeds
FIGURES = ["artifact_sha256", "seconds"]  # of each, like COUNTS, which are numbers
COUNTS = "seed val_bpb val_loss val_tokens val_bytes model_bytes code_bytes".split()
FREE = {
    "name": "",
    "author": "",
    "github_id": "",
    "blurb": "",
    "date": "",
}  # of the claim: what no log can tell
HYPERPARAMETERS = b"\nHyperparameters:\n"  # ends the source at the head of a log


# === The code: readable source <-> packed file ========================================================================
def names_in(
    *nodes: ast.AST,
) -> set[str]:  # every name, attribute and string that could refer to a definition
    found = (
        getattr(n, "id", None) or getattr(n, "attr", None) or getattr(n, "value", None)
        for node in nodes
        for n in ast.walk(node)
    )
    return {name for name in found if isinstance(name, str)}


class Strip(ast.NodeVisitor):
    """Takes what does not travel out of a source's syntax tree, and notes in `cuts` the same of its text: docstrings,
    annotations that nothing reads, top-level functions and classes that nothing mentions (only tools use them). Fields
    of classes keep their annotations; so do functions under any decorator but PLAIN (Triton reads tl.constexpr) and
    functions handed around as values (torch.library.custom_op makes a schema of them)."""

    PLAIN = {
        "staticmethod",
        "classmethod",
        "property",
        "contextlib.contextmanager",
        "torch.no_grad()",
    }

    def __init__(self, source: bytes):
        try:
            self.source, self.tree, self.cuts = (
                source,
                ast.parse(source),
                [],
            )  # (start, end, replacement) in bytes
        except (SyntaxError, ValueError) as error:
            raise UsageError(f"{READABLE}: no Python ({error})") from error
        lines, nodes = source.splitlines(keepends=True), list(ast.walk(self.tree))
        self.starts = [0, *itertools.accumulate(map(len, lines))]
        called = {id(n.func) for n in nodes if isinstance(n, ast.Call)}
        self.values = {n.id for n in nodes if isinstance(n, ast.Name) and id(n) not in called}
        self.keep_docs, body = "__doc__" in names_in(self.tree), self.tree.body
        alive = [
            n
            for n in body
            if not isinstance(n, (ast.FunctionDef, ast.ClassDef)) or n.decorator_list
        ]
        found = names_in(*alive)
        while more := [n for n in body if n not in alive and n.name in found]:
            alive, found = alive + more, found | names_in(*more)
        for node in (n for n in body if n not in alive):
            self.cut(node, node)
        self.tree.body = [n for n in body if n in alive]
        self.visit(self.tree)

    def cut(self, first: ast.AST | int, last: ast.AST, replacement: bytes = b"") -> None:
        start = (
            first if isinstance(first, int) else self.starts[first.lineno - 1] + first.col_offset
        )
        self.cuts.append(
            (start, self.starts[last.end_lineno - 1] + last.end_col_offset, replacement)
        )

    def cut_annotation(self, mark: bytes, annotation: ast.expr) -> None:
        """Cuts an annotation, the mark before it, and the parentheses a formatter may have put around it."""
        before = self.starts[annotation.lineno - 1] + annotation.col_offset
        start = self.source.rindex(mark, 0, before)
        end = self.starts[annotation.end_lineno - 1] + annotation.end_col_offset
        for _ in range(self.source.count(b"(", start, before)):
            end = self.source.index(b")", end) + 1
        self.cuts.append((start, end, b""))

    def generic_visit(self, node: ast.AST) -> None:
        documented = (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and not self.keep_docs
        )
        if documented and ast.get_docstring(node, clean=False) is not None:
            self.cut(node.body[0], node.body[0], b"" if node.body[1:] else b"pass")
            node.body = node.body[1:] or [ast.Pass()]
        super().generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if (
            node.name not in self.values
            and {ast.unparse(d) for d in node.decorator_list} <= self.PLAIN
        ):
            if node.returns:
                self.cut_annotation(b"->", node.returns)
                node.returns = None
            for argument in (
                n for n in ast.walk(node.args) if isinstance(n, ast.arg) and n.annotation
            ):
                self.cut_annotation(b":", argument.annotation)
                argument.annotation = None
        self.generic_visit(node)

    def text(self) -> str:  # what is left of the source
        text = self.source
        for start, end, replacement in sorted(self.cuts, reverse=True):
            text = text[:start] + replacement + text[end:]
        return squeeze(text.decode())


def squeeze(text: str) -> str:
    """Python without comments, blank lines and spaces that nothing needs. Literals stay as they are written: the text
    is the same whatever Python makes it, and runs on as old a one as the source (f-strings changed in 3.12)."""
    starts, parts, depth, nested = (
        [0, *itertools.accumulate(map(len, io.StringIO(text)))],
        [],
        0,
        [],
    )
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind, word = tokenize.tok_name[token.type], token.string
        depth += (kind == "INDENT") - (kind == "DEDENT")
        if kind == "FSTRING_START":
            nested.append(starts[token.start[0] - 1] + token.start[1])
        elif kind == "FSTRING_END":
            word = text[nested.pop() : starts[token.end[0] - 1] + token.end[1]]
        if kind in ("INDENT", "DEDENT", "NL", "COMMENT", "ENDMARKER") or nested:
            continue
        last = parts[-1][-1] if parts else "\n"
        glue = " " * depth if last == "\n" else " " * (is_word(last) and is_word(word[:1]))
        parts.append("\n" if kind == "NEWLINE" else glue + word)
    return "".join(parts)


def is_word(character: str) -> bool:
    return character == "_" or character.isalnum()


# The text is Latin-1, the densest a Python file can hold: 2 % more than raw bytes, where base85 takes 25 %. linecache
# lets Triton and tracebacks find the source; train_gpt.py logs UNPACKED, and counts the bytes of this very file.
HEAD = """# coding: latin-1; train_gpt_readable.py without comments, by tools/pack.py, which also proves it
import linecache,{0}
UNPACKED={0}.decompress('''"""
TAIL = """'''.encode('latin-1')).decode(),'{}'
linecache.cache[__file__]=1,None,UNPACKED[0].splitlines(True),__file__
exec(compile(UNPACKED[0],__file__,'exec'))
"""
CODECS = {
    "bz2": (bz2.compress, bz2.BZ2Decompressor),
    "lzma": (
        lambda data: lzma.compress(data, lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME),
        lzma.LZMADecompressor,
    ),
}


def escape(
    data: bytes,
) -> str:  # what stands between triple quotes for these bytes in a Latin-1 file
    text = data.decode("latin-1").replace("\\", "\\\\").replace("\r", "\\r")
    text = re.sub("\0(?=[0-7])", r"\\x00", text).replace(
        "\0", "\\0"
    )  # \0 and a digit would be an octal
    return re.sub(r"'(?=''|\Z)", r"\\'", text)


def pack_code(source: bytes) -> bytes:
    """The packed file of a readable source, by whichever codec makes it smaller. Raises UsageError if the text in it is
    not the same program."""
    rest, sha256, files = Strip(source), hashlib.sha256(source).hexdigest(), []
    if ast.dump(ast.parse(text := rest.text())) != ast.dump(rest.tree):
        raise UsageError(
            f"{READABLE}: is written in a way that tools/pack.py cannot shorten without changing it"
        )
    for codec, (compress, _) in CODECS.items():
        files.append(
            (HEAD.format(codec) + escape(compress(text.encode())) + TAIL.format(sha256)).encode(
                "latin-1"
            )
        )
    return min(files, key=len)


def packed_size(source: bytes) -> int:  # bytes that count for a readable source
    return len(pack_code(source))


def unpack_code(packed: bytes) -> tuple[str, str]:
    """Text and hash of the readable source in a packed file, which is not run. Raises UsageError if it is any other."""
    text, start = packed.decode("latin-1"), TAIL.index("{}") - len(TAIL) - 62
    tail = TAIL.format(sha256 := text[start : start + 64])
    codec = next(
        (c for c in CODECS if text.startswith(HEAD.format(c)) and text.endswith(tail)), None
    )
    try:
        decoder = CODECS[codec][1]()
        data = ast.literal_eval(text[len(HEAD.format(codec)) - 3 : 3 - len(tail)]).encode("latin-1")
        unpacked = decoder.decompress(data, 10_000_000).decode()
        ast.parse(unpacked)
        if not re.fullmatch("[0-9a-f]{64}", sha256) or not decoder.eof or decoder.unused_data:
            raise ValueError(sha256)
    except (
        KeyError,
        ValueError,
        SyntaxError,
        AttributeError,
        OSError,
        EOFError,
        lzma.LZMAError,
    ) as error:
        raise UsageError(
            f"{PACKED}: not a file that tools/pack.py wrote, or changed since"
        ) from error
    return unpacked, sha256


# === The folder, as a dict of name -> content =========================================================================
def read_final(log: bytes) -> dict[str, Any]:
    """The figures of a finished run's log. Raises UsageError unless one final line holds every figure a claim needs."""
    lines = [line for line in log.splitlines() if line.startswith(b"final {")]
    if len(lines) != 1:
        raise UsageError(f"has {len(lines)} final lines, a finished run has one")
    try:
        final = json.loads(lines[0].removeprefix(b"final "))
        missing = [key for key in (*FACTS, *FIGURES, *COUNTS) if final.get(key) is None]
    except (ValueError, AttributeError) as error:
        raise UsageError("its final line is no JSON object") from error
    if missing:
        raise UsageError(f"its final line lacks {', '.join(missing)}")
    if wrong := [key for key in COUNTS if type(final[key]) not in (int, float)]:
        raise UsageError(f"its final line has no number as {', '.join(wrong)}")
    return final


def read_knobs(log: bytes) -> dict[str, str]:
    """Variables that make an evaluation the run's: its preset and what its environment set, but no path or name."""
    found = re.findall(
        r"^  (\w+): (.*) \((default|preset|env)\)$", log.decode(errors="replace"), re.M
    )
    text = {"True": "1", "False": "0"}
    return {
        name.upper(): text.get(value, value)
        for name, value, origin in found
        if name == "preset" or (origin == "env" and not re.search("(^run_id|_dir|_path)$", name))
    }


def make_claim(
    packed: bytes, artifact: str, finals: list[dict], free: dict[str, str]
) -> dict[str, Any]:
    """submission.json's content: every figure but those in `free` from the logs' final lines and the counted files."""
    runs = sorted(finals, key=lambda run: run["seed"])
    scores, most = [run["val_bpb"] for run in runs], max(run["model_bytes"] for run in runs)

    def result(run: dict) -> dict[str, Any]:
        scored = {key: run[key] for key in sorted(run) if key.endswith("_bpb")}
        kept = {
            key: run.get(key)
            for key in ("val_loss", "steps", "model_bytes", "artifact_sha256", "seconds")
        }
        return {**scored, **kept, "artifact_bytes": run["model_bytes"] + len(packed)}

    return {
        **free,
        **{key: runs[0][key] for key in FACTS},
        "val_bpb": statistics.mean(scores),
        "val_bpb_sd": statistics.stdev(scores) if len(scores) > 1 else None,
        "val_loss": statistics.mean(run["val_loss"] for run in runs),
        "seeds": [run["seed"] for run in runs],
        "counted_files": [PACKED, artifact],
        "bytes_code": len(packed),
        "bytes_model_max": most,
        "bytes_total": len(packed) + most,
        "bytes_limit": LIMIT_BYTES,
        "seed_results": {str(run["seed"]): result(run) for run in runs},
    }


def as_json(claim: dict[str, Any]) -> bytes:
    return (json.dumps(claim, indent=2) + "\n").encode()


def make_sums(files: dict[str, bytes]) -> bytes:  # in the format of sha256sum
    lines = (
        f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n"
        for name in sorted(files)
        if name != SUMS
    )
    return "".join(lines).encode()


def make_readme(
    claim: dict[str, Any], knobs: dict[str, str], files: dict[str, bytes], artifact: str
) -> bytes:
    rows = [
        f"| {seed} | {run['val_bpb']:.5f} | {run['val_loss']:.5f} | {run['artifact_bytes']:,} |"
        for seed, run in claim["seed_results"].items()
    ]
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in knobs.items())
    deviation = f" (standard deviation {claim['val_bpb_sd']:.5f})" if len(rows) > 1 else ""
    return f"""# {claim["name"] or "Submission"}

val_bpb {claim["val_bpb"]:.5f}{deviation} on {claim["dataset"]}, {claim["world_size"]} x {claim["device"]}.

| seed | val_bpb | val_loss | code + model bytes |
|---|---|---|---|
{chr(10).join(rows)}

Counted: `{PACKED}` ({len(files[PACKED]):,} bytes, packed) and `{artifact}` ({len(files[artifact]):,} bytes).
`{READABLE}` is the same program for readers; `tools/pack.py --check` of its repository proves it.
Tokenizer: the SentencePiece model with SHA-256 `{claim["tokenizer_sha256"]}`.

To score the artifact, in an empty directory; FOLDER is this folder, DATA holds `datasets/` and `tokenizers/`:

```
env -i PATH="$PATH" {variables} DATA_DIR=DATA EVAL_ONLY_PATH=FOLDER/{artifact} python FOLDER/{PACKED}
```
""".encode()


def find_source(
    given: Path | None, log: bytes, sha256: str
) -> bytes:  # of the readable code with that hash
    head, path = log.split(HYPERPARAMETERS)[0], given or ROOT / PACKED
    for source in (head, path.read_bytes()):
        if hashlib.sha256(source).hexdigest() == sha256:
            return source
    raise UsageError(
        f"{path}: is not the code of the run (code_sha256 {sha256[:12]}..); --source must name that"
    )


def build(args: argparse.Namespace) -> dict[str, bytes]:
    """All files of the folder for a finished run. Raises UsageError if a part is missing or of another run."""
    run, own = args.run_dir, log_of_run(args.run_dir)
    paths = [own] * (
        own.is_file() and own.resolve() not in [p.resolve() for p in args.log]
    ) + args.log
    if not paths:
        raise UsageError(f"{run}: its log is not {own}; --log must name it")
    logs, finals = [path.read_bytes() for path in paths], []
    for path, log in zip(paths, logs, strict=True):
        try:
            finals.append(read_final(log))
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
    if twice := {
        final["seed"] for final in finals if [f["seed"] for f in finals].count(final["seed"]) > 1
    }:
        raise UsageError(
            f"--log: {', '.join(map(str, paths))} are more than once of seed {twice.pop()}"
        )
    hashes = {
        hashlib.sha256(path.read_bytes()).hexdigest(): path for path in sorted(run.glob("*.ptz"))
    }
    mine = next((i for i, final in enumerate(finals) if final["artifact_sha256"] in hashes), None)
    if mine is None:
        raise UsageError(
            f"{run}: holds no artifact (*.ptz) that {', '.join(map(str, paths))} speaks of"
        )
    artifact = hashes[finals[mine]["artifact_sha256"]]
    source = find_source(args.source, logs[mine], finals[mine]["code_sha256"])
    files = {
        PACKED: pack_code(source),
        READABLE: source,
        artifact.name: artifact.read_bytes(),
        "requirements.txt": args.requirements.read_bytes(),
    }
    files |= {
        f"train_seed{final['seed']}.log": log for final, log in zip(finals, logs, strict=True)
    }
    if (audit := run / "audit.json").is_file():
        files[audit.name] = audit.read_bytes()
    free = {key: getattr(args, key) for key in FREE}
    claim = make_claim(files[PACKED], artifact.name, finals, free)
    files[CLAIM] = as_json(claim)
    files["README.md"] = make_readme(claim, read_knobs(logs[mine]), files, artifact.name)
    return {**files, SUMS: make_sums(files)}


def load(
    folder: Path,
) -> tuple[dict[str, bytes], list[str]]:  # its regular files, and a problem per other entry
    files, problems = {}, []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            problems.append(f"{path.name}: only regular files belong here, no folder and no link")
        else:
            files[path.name] = path.read_bytes()
    return files, problems


def check(
    files: dict[str, bytes],
) -> Iterator[str]:  # one line per problem; a missing file is reported once
    artifacts, logs = (
        [name for name in files if re.fullmatch(p, name)] for p in (r".*\.ptz", r"train_.*\.log")
    )
    yield from (f"{name}: missing" for name in REQUIRED if name not in files)
    yield from (
        f"{name}: not part of a submission"
        for name in files
        if not (name in REQUIRED or OPTIONAL.fullmatch(name))
    )
    if len(artifacts) != 1:
        yield f"*.ptz: one artifact belongs here, not {len(artifacts)}"
    if not logs:
        yield "train_seed*.log: missing"
    if SUMS in files:
        yield from check_sums(files)
    if PACKED in files and READABLE in files:
        yield from check_code(files)
    finals = {}
    for name in logs:
        try:
            finals[name] = read_final(files[name])
            if name != f"train_seed{finals[name]['seed']}.log":
                yield f"{name}: is of seed {finals[name]['seed']}"
        except UsageError as error:
            yield f"{name}: {error}"
    for name, final in finals.items():
        yield from check_log(name, final, files)
    yield from (
        f"{key}: differs between the logs: {', '.join(sorted(values))}"
        for key in FACTS
        if len(values := {str(final[key]) for final in finals.values()}) > 1
    )
    if len(artifacts) == 1 and finals and PACKED in files:
        yield from check_claim(files, artifacts[0], list(finals.values()))


def check_sums(files: dict[str, bytes]) -> Iterator[str]:
    listed = {line[66:]: line for line in files[SUMS].decode(errors="replace").splitlines()}
    real = {line[66:]: line for line in make_sums(files).decode().splitlines()}
    changed = [name for name, line in real.items() if listed.get(name, line) != line]
    yield from (f"{name}: changed since {SUMS} was written" for name in changed)
    if not changed and files[SUMS] != make_sums(files):
        yield f"{SUMS}: is not the list of exactly these files"


def check_code(files: dict[str, bytes]) -> Iterator[str]:
    try:
        text, sha256 = unpack_code(files[PACKED])
        if ast.dump(Strip(files[READABLE]).tree) != ast.dump(ast.parse(text)):
            yield f"{READABLE}: is another program than {PACKED} unpacks to"
        elif sha256 != hashlib.sha256(files[READABLE]).hexdigest():
            yield f"{READABLE}: is not the text that {PACKED} was made of"
    except UsageError as error:
        yield str(error)


def check_log(name: str, final: dict, files: dict[str, bytes]) -> Iterator[str]:
    """Whether a log is of this code and of sizes that can be: the file that ran was the readable or the packed one."""
    ran = [
        form
        for form in (READABLE, PACKED)
        if form in files and len(files[form]) == final["code_bytes"]
    ]
    if READABLE in files and final["code_sha256"] != hashlib.sha256(files[READABLE]).hexdigest():
        yield f"{name}: is a log of other code than {READABLE} (code_sha256 {final['code_sha256'][:12]}..)"
    elif READABLE in files and PACKED in files and not ran:
        yield f"{name}: counts {final['code_bytes']} bytes of code, neither {READABLE} nor {PACKED} has as many"
    elif ran and final.get("file_sha256") not in (
        None,
        *(hashlib.sha256(files[form]).hexdigest() for form in ran),
    ):
        yield f"{name}: the file that ran (file_sha256 {final['file_sha256'][:12]}..) is not here"
    if PACKED in files and (total := final["model_bytes"] + len(files[PACKED])) > LIMIT_BYTES:
        yield f"{name}: code and model take {total} bytes, {total - LIMIT_BYTES} over the limit of {LIMIT_BYTES}"


def check_claim(files: dict[str, bytes], artifact: str, finals: list[dict]) -> Iterator[str]:
    """Whether the artifact is that of a log, its size is right and submission.json says what all that implies."""
    sha256, size = hashlib.sha256(files[artifact]).hexdigest(), len(files[artifact])
    mine = [final for final in finals if final["artifact_sha256"] == sha256]
    if not mine:
        yield f"{artifact}: is not the artifact of seed {' or '.join(str(final['seed']) for final in finals)}"
    elif mine[0]["model_bytes"] != size:
        yield f"{artifact}: has {size} bytes, the log counts {mine[0]['model_bytes']}"
    if audits := [
        name for name in files if name == "audit.json" and sha256.encode() not in files[name]
    ]:
        yield f"{audits[0]}: does not name this artifact"
    if (total := size + len(files[PACKED])) > LIMIT_BYTES:
        yield f"{artifact}: with {PACKED} {total} bytes, {total - LIMIT_BYTES} over the limit of {LIMIT_BYTES}"
    try:
        claim = json.loads(files.get(CLAIM, b"{}"))
        real = make_claim(files[PACKED], artifact, finals, {key: claim.get(key) for key in FREE})
        wrong = [
            key for key in sorted(real.keys() | claim.keys()) if claim.get(key) != real.get(key)
        ]
    except (ValueError, AttributeError):
        yield f"{CLAIM}: is no JSON object"
        return
    if CLAIM in files:
        yield from (f"{CLAIM}: {key} is not what logs and files say" for key in wrong)


# === Evaluation from the folder alone =================================================================================
def evaluate(folder: Path, files: dict[str, bytes], given: dict[str, str], ranks: int) -> str:
    """Runs the packed code on the artifact with the log's knobs and `given` as its whole environment, in an empty
    directory. Returns a line on the score. Raises UsageError if it is not the log's to 1e-9 bpb."""
    artifact = next(name for name in files if name.endswith(".ptz"))
    sha256 = hashlib.sha256(files[artifact]).hexdigest()
    logs = [content for name, content in files.items() if name.endswith(".log")]
    log = next(log for log in logs if read_final(log)["artifact_sha256"] == sha256)
    wanted, code = read_final(log), [str((folder / PACKED).resolve())]
    env = {
        "PATH": os.environ.get("PATH", os.defpath),
        **read_knobs(log),
        **given,
    }  # PATH: compilers, no state
    env |= {
        key: str(Path(value).resolve())
        for key, value in given.items()
        if key.endswith(("_DIR", "_PATH"))
    }
    env["EVAL_ONLY_PATH"] = str((folder / artifact).resolve())
    if ranks > 1:
        code[:0] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, *code], cwd=empty, env=env, capture_output=True, check=False
        )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise UsageError(
            f"{folder}: the evaluation ended with status {done.returncode}: {''.join(last)}"
        )
    found = read_final(done.stdout)
    for key in ("artifact_sha256", "code_sha256", "val_sha256", "val_tokens", "val_bytes"):
        if found[key] != wanted[key]:
            raise UsageError(
                f"{folder}: evaluated with {key} {found[key]}, the log has {wanted[key]}"
            )
    if found["code_bytes"] != len(files[PACKED]):
        raise UsageError(
            f"{folder}: counted {found['code_bytes']} bytes of code, {PACKED} has {len(files[PACKED])}"
        )
    if abs(found["val_bpb"] - wanted["val_bpb"]) > 1e-9:
        raise UsageError(
            f"{folder}: evaluates to val_bpb {found['val_bpb']!r}, the log has {wanted['val_bpb']!r}"
        )
    return f"evaluated: val_bpb {found['val_bpb']!r}, the log {wanted['val_bpb']!r}"


# === Command line =====================================================================================================
def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "pack.py",
        usage="%(prog)s RUN_DIR OUT [--log FILE ..] | --check FOLDER | ..",
        description=__doc__,
    )
    parser.formatter_class, add = argparse.RawDescriptionHelpFormatter, parser.add_argument
    add("run_dir", nargs="?", metavar="RUN_DIR", help="folder of a finished run, with its artifact")
    add("out", nargs="?", metavar="OUT", help="folder to write; must not exist or be empty")
    add(
        "variables",
        nargs="*",
        metavar="NAME=value",
        help="environment of --evaluate besides the log's knobs",
    )
    action = parser.add_mutually_exclusive_group()
    for name, help_text in (
        ("check", "verify it"),
        ("evaluate", "verify it, then score its artifact"),
        ("seal", "renew its SHA256SUMS, then verify it"),
    ):
        action.add_argument(f"--{name}", type=Path, metavar="FOLDER", help=help_text)
    action.add_argument(
        "--code", type=Path, metavar="FILE", help="write only the packed code of --source"
    )
    add("--ranks", type=int, default=1, metavar="N", help="processes of --evaluate, one per GPU")
    add(
        "--log",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="logs of this run or of further seeds",
    )
    add(
        "--source",
        type=Path,
        metavar="FILE",
        help="readable code; default: what the log opens with, or this one's",
    )
    add(
        "--requirements",
        type=Path,
        default=ROOT / "requirements.txt",
        metavar="FILE",
        help="default: this one's",
    )
    for name, default in {**FREE, "date": time.strftime("%Y-%m-%d")}.items():
        add(
            f"--{name.replace('_', '-')}",
            default=default,
            metavar="TEXT",
            help=f"of {CLAIM}; default {default!r}",
        )
    args = parser.parse_args(argv)
    words = [word for word in (args.run_dir, args.out, *args.variables) if word]
    if args.evaluate:
        args.variables = words
        if wrong := [word for word in words if "=" not in word]:
            parser.error(f"{wrong[0]}: must be NAME=value")
    elif len(words) != 2 * (not (args.check or args.seal or args.code)):
        parser.error(
            "takes RUN_DIR OUT, or one of --check, --evaluate, --seal, --code; --help explains"
        )
    return args


def write_folder(args: argparse.Namespace) -> Path:
    args.run_dir, out = Path(args.run_dir), Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not an empty folder")
    files = build(args)
    if problems := list(check(files)):
        raise UsageError("\n".join(problems))
    for name, content in files.items():
        write_atomic(out / name, content)
    return out


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        if args.code:
            source = (args.source or ROOT / PACKED).read_bytes()
            packed = pack_code(source)
            write_atomic(args.code, packed)
            print(f"{args.code}: {len(packed):,} bytes, from {len(source):,} readable ones")
            return 0
        folder = args.check or args.evaluate or args.seal or write_folder(args)
        files, problems = load(folder)
        if args.seal:
            files[SUMS] = make_sums(files)
            write_atomic(folder / SUMS, files[SUMS])
        if problems := problems + list(check(files)):
            raise UsageError("\n".join(f"{folder}/{problem}" for problem in problems))
        claim, model = (
            json.loads(files[CLAIM]),
            next(name for name in files if name.endswith(".ptz")),
        )
        code, weights = len(files[PACKED]), len(files[model])
        print(
            f"{folder}: holds together; {PACKED} {code:,} + {model} {weights:,} = {code + weights:,} bytes, "
            f"{LIMIT_BYTES - code - weights:,} under the limit; val_bpb {claim['val_bpb']:.5f} of {claim['seeds']}"
        )
        if args.evaluate:
            print(
                evaluate(
                    folder, files, dict(word.split("=", 1) for word in args.variables), args.ranks
                )
            )
    except (UsageError, OSError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        for line in reason.splitlines():
            print(f"pack.py: {line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
