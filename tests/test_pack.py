"""The folder of a submission: its packed code is the readable program, counted as it runs; what
does not fit shows.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT, TINY

import train_gpt as tg

sys.path.insert(0, str(ROOT / "tools"))
import pack
import packed_code
import runlog
from shorten import differs

READABLE_SOURCE = (ROOT / "train_gpt.py").read_bytes()
SMALL_SOURCE = b'''"""What it is."""
from __future__ import annotations
LIMIT = 3  # a reason

def main(argv: list[str]) -> int:
    """Says so."""
    return print(f"{'a' if argv else LIMIT} {LIMIT:>4}", "#") or 0

def for_tools(x: int) -> int:
    return x
main([])
'''
BASE = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ARTIFACT = "final_model.int6.ptz"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_run(
    root: Path, seed: int = 1, source: bytes = SMALL_SOURCE, size: int = 900, **figures: object
) -> Path:
    """A run's folder and log as train_gpt.py leaves them, without the training; figures that are
    None are left out.
    """
    model = random.Random(seed).randbytes(size)
    final = {
        "code_sha256": sha256(source),
        "dataset": "tiny",
        "val_sha256": "v",
        "tokenizer_sha256": "t",
        "preset": "cpu",
        "device": "CPU",
        "torch": "2",
        "world_size": 1,
        "seed": seed,
        "val_bpb": 1.5 + seed / 7,
        "val_loss": 3.0,
        "val_tokens": 10,
        "val_bytes": 30,
        "artifact_sha256": sha256(model),
        "model_bytes": size,
        "steps": 5,
        "code_bytes": len(source),
        "quantized_bpb": 1.7,
        "seconds": {"train": 5.0},
    } | figures
    settings = ["run_id: s (env)", f"seed: {seed} (env)", "compile: False (env)"]
    settings += ["data_dir: /x y (env)", "num_layers: 4 (preset)", "preset: cpu (preset)"]
    settings += ["checkpoint_every: 60.0 (env)", "wandb_project: golf (env)"]
    lines = "\n".join([*(f"  {setting}" for setting in settings), "step:1"])
    final = json.dumps({key: value for key, value in final.items() if value is not None})
    folder = root / "runs" / f"s{seed}"
    log = root / "logs" / f"s{seed}.txt"
    folder.mkdir(parents=True)
    log.parent.mkdir(exist_ok=True)
    (folder / ARTIFACT).write_bytes(model)
    log.write_bytes(source + f"\nHyperparameters:\n{lines}\nfinal {final}\n".encode())
    return folder


def make(run: Path, out: Path, *options: object) -> dict[str, bytes]:
    assert pack.main([str(run), str(out), "--name", "a name", *map(str, options)]) == 0
    files, problems = pack.load(out)
    assert problems == []
    return files


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A folder that holds together."""
    root = tmp_path_factory.mktemp("small")
    return make(write_run(root), root / "out")


def test_a_folder_says_what_it_still_lacks(tmp_path, capsys):
    """No audit was there, and the deadline left documents without adaptation."""
    run = write_run(tmp_path, val_docs=100, documents_not_adapted=84)
    files = make(run, tmp_path / "out")
    assert "not audited: tools/audit.py on the artifact" in capsys.readouterr().out
    note = "Seed 1: 84 of 100 documents were scored without adaptation."
    assert note in files["README.md"].decode()


# --- The code -------------------------------------------------------------------------------------
def test_packed_code_is_smaller_than_the_text_and_the_same_program():
    packed = packed_code.pack_code(READABLE_SOURCE)
    text, digest = packed_code.unpack_code(packed)
    assert digest == sha256(READABLE_SOURCE)
    assert len(packed) == pack.packed_size(READABLE_SOURCE) < 0.14 * len(READABLE_SOURCE)
    assert ast.get_docstring(ast.parse(text)) is None
    trees = ast.parse(text), ast.parse(READABLE_SOURCE)
    kept, written = ({getattr(n, "name", "") for n in tree.body} for tree in trees)
    assert not [name for name in written - kept if re.search(rf"\b{name}\b", text)]

    def idle(node: ast.stmt) -> bool:
        return isinstance(node, ast.Pass) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        )

    def bare(tree: ast.Module) -> str:
        """Less than the tool leaves: no annotation, no statement that does nothing."""
        tree.body = [n for n in tree.body if getattr(n, "name", "") in kept]
        for node in ast.walk(tree):
            for name in {"annotation", "returns"} & node.__dict__.keys():
                # A field of a class without an annotation would be no statement.
                setattr(node, name, ast.Constant(0) if isinstance(node, ast.AnnAssign) else None)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in (
                "ABSENT",
                "WARNED",
            ):
                node.value = ast.Dict([], [])
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "knob":
                node.args[1] = ast.Constant("")
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                node.body = [n for n in node.body if not idle(n)] or [ast.Pass()]
        return ast.unparse(tree)

    assert differs(bare(trees[1]), bare(trees[0])) == ""
    literals = re.findall(r'"[^"\n]*"', text)
    assert len(literals) > 300
    assert all(
        literal.encode() in READABLE_SOURCE for literal in literals
    )  # f-strings too: Python 3.10 reads them


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""d"""\nx = 1  # c\n\n\ny = "# d" + \'e\'', "x=1\ny=\"# d\"+'e'\n"),
        (
            "def f(a: int, *b: str, c: float = 1) -> int:\n    '''d'''\n\n    return a\nf(1)",
            "def f(a,*b,c=1):\n return a\nf(1)\n",
        ),
        (
            "class A(B):\n    '''d'''\n    x: int = 1\n    def f(self) -> int: '''d'''\nA()",
            "class A(B):\n x:int=1\n def f(self):pass\nA()\n",
        ),
        (
            "def f(x: int) -> int: return x\nlib.custom_op(f)",
            "def f(x:int)->int:return x\nlib.custom_op(f)\n",
        ),  # a schema is made of it
        ("def f(x: int) -> int: return x\nop(f)", "def f(x):return x\nop(f)\n"),
        ('x = knob(1, "a text", 0)', 'x=knob(1,"",0)\n'),
        (
            "def f(n):\n    total = sum(n)\n    return total\nf(1)",
            "def f(n):\n a=sum(n)\n return a\nf(1)\n",
        ),
        (
            "@jit\ndef f(x: tl.constexpr):\n    y: tl.constexpr = x",
            "@jit\ndef f(x:tl.constexpr):\n a:tl.constexpr=x\n",
        ),
        ("@property\ndef f(x: int) -> int: return x", "@property\ndef f(x):return x\n"),
        ("def a(): b()\ndef b(): pass\nclass C: pass\nx = 1", "x=1\n"),  # nothing runs them
        ("def a(): b()\ndef b(): pass\nif x: a()", "def a():b()\ndef b():pass\nif x:a()\n"),
        ("def a(): pass\nglobals()['a']()", "def a():pass\nglobals()['a']()\n"),
        ("x = not (1 if y else 2)\nassert(x), 'm'", "x=not(1 if y else 2)\nassert(x),'m'\n"),
        (
            'x = f"{y!r:>{n}} { {1: 2}[1] }  #" f"{z = }"\n',
            'x=f"{y!r:>{n}} { {1: 2}[1] }  #"f"{z = }"\n',
        ),
        ('x = """a\n    b  # c\n"""\n', 'x="""a\n    b  # c\n"""\n'),
        ('"""d"""\nprint(__doc__)', '"""d"""\nprint(__doc__)\n'),
        (
            's = "\u2581\u00e9"  # \u00fc\ndef f(a: "\u00e9"): return a\nf(1)',
            's="\u2581\u00e9"\ndef f(a):return a\nf(1)\n',
        ),
    ],
)
def test_what_travels_is_what_the_program_needs(source, expected):
    assert packed_code.unpack_code(packed_code.pack_code(source.encode()))[0] == expected


def test_packed_file_of_any_bytes_runs_as_its_source(tmp_path):
    """Random text compresses to every byte there is, quotes, zeros before digits and line ends
    among them.
    """
    seen = set()
    for seed in range(8):
        text = random.Random(seed).randbytes(seed * 250).hex()
        packed = packed_code.pack_code(f"x = '{text}'\nname = __name__\n".encode())
        path = tmp_path / "p.py"
        path.write_bytes(packed)
        space = {"__file__": str(path), "__name__": "p"}
        exec(compile(path.read_bytes(), str(path), "exec"), space)
        assert (space["x"], space["name"]) == (text, "p")
        assert packed_code.unpack_code(packed)[0] == f"x='{text}'\nname=__name__\n"
        seen |= set(packed)
    assert seen >= set(range(256)) - set(b"\0\r")


QUOTES = [b"'", b"a''", b"'''a", b"'" * 7, b"\\'", b"\0007\0", b"\r\n\r", b"'\n", bytes(range(256))]


@pytest.mark.parametrize("data", QUOTES)
def test_every_byte_survives_in_a_latin1_file(data):
    space = {}
    exec(
        compile(
            b"# coding: latin-1\nx='''" + packed_code.escape(data).encode("latin-1") + b"'''",
            "p",
            "exec",
        ),
        space,
    )
    assert space["x"].encode("latin-1") == data


@pytest.mark.parametrize("more", [b"", b"hidden"])
def test_packed_file_holds_nothing_beside_its_text(more):
    """Not even bytes that no one would read."""
    payload = packed_code.escape(packed_code.CODECS["bz2"].compress(b"x=1\n") + more)
    packed = (packed_code.HEAD.format("bz2") + payload + packed_code.TAIL.format("0" * 64)).encode(
        "latin-1"
    )
    if not more:
        assert packed_code.unpack_code(packed) == ("x=1\n", "0" * 64)
        return
    with pytest.raises(tg.UsageError, match="not a file"):
        packed_code.unpack_code(packed)


@pytest.mark.skipif(tg.triton is None, reason="no Triton")
def test_kernels_and_operators_of_the_packed_file_work(tmp_path):
    """Triton reads a kernel's source and torch an operator's annotations; both must be found."""
    (tmp_path / "train_gpt.py").write_bytes(packed_code.pack_code(READABLE_SOURCE))
    script = """if True:
        import inspect, torch, train_gpt as tg
        kernel = inspect.getsource(tg.mlp_kernel.fn).splitlines()[1]
        assert kernel.strip().startswith("def mlp_kernel(a,w,")
        schema = "golf::mlp_up(Tensor x, Tensor w_up, float slope=0.5) -> (Tensor, Tensor)"
        assert str(tg.mlp_up._opoverload._schema) == schema
        torch.manual_seed(0)
        x, w = torch.randn(40, 32), torch.randn(64, 32)
        pre, out = torch.empty(40, 64), torch.empty(40, 64)
        tg.launch_mlp(x, w, pre, out, 2, False, (32, 32, 32))
        for found, wanted in zip((pre, out), tg.mlp_up_reference(x, w)):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
        print(tg.CODE_SHA256)"""
    env = {**BASE, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == sha256(READABLE_SOURCE)


# --- A run from the packed file, its folder, an evaluation from that alone ------------------------
@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a run of the packed file; `out` in it is its submission."""
    cwd = tmp_path_factory.mktemp("trained")
    assert pack.main(["--code", str(cwd / "code" / "train_gpt.py")]) == 0
    env = {
        **BASE,
        **TINY,
        "DATA_DIR": str(tiny_data),
        "RUN_ID": "mine",
        "SEED": "5",
        "TTT_LORA_LR": "0.01",
    }
    command = [sys.executable, "code/train_gpt.py"]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    make(cwd / "runs" / "mine", cwd / "out")
    return cwd


def test_run_of_the_packed_file_counts_it_and_names_both_codes(trained):
    log = (trained / "logs" / "mine.txt").read_bytes()
    final = runlog.read_final(log.decode())
    packed = (trained / "code" / "train_gpt.py").read_bytes()
    assert final["code_sha256"] == sha256(READABLE_SOURCE)
    assert final["file_sha256"] == sha256(packed)
    assert final["code_bytes"] == len(packed)
    assert (
        final["artifact_bytes"]
        == len(packed) + (trained / "runs" / "mine" / ARTIFACT).stat().st_size
    )
    assert log.decode().startswith(packed_code.unpack_code(packed)[0] + "\nHyperparameters:\n")


def test_folder_holds_the_files_that_ran_and_counts_them(trained):
    out = trained / "out"
    expected = {
        "README.md",
        "SHA256SUMS",
        ARTIFACT,
        "documents.npz",
        "requirements.txt",
        "submission.json",
        "train_gpt.py",
    }
    assert {p.name for p in out.iterdir()} == expected | {
        "train_gpt_readable.py",
        "train_seed5.log",
    }
    for name, origin in {
        "train_gpt.py": trained / "code" / "train_gpt.py",
        "train_gpt_readable.py": tg.__file__,
        ARTIFACT: trained / "runs/mine" / ARTIFACT,
        "requirements.txt": ROOT / "requirements.txt",
        "train_seed5.log": trained / "logs/mine.txt",
    }.items():
        assert (out / name).read_bytes() == Path(origin).read_bytes(), name
    claim = json.loads((out / "submission.json").read_text())
    counted = {name: (out / name).stat().st_size for name in claim["counted_files"]}
    assert counted.keys() == {"train_gpt.py", ARTIFACT}
    assert (
        claim["bytes_total"]
        == sum(counted.values())
        == claim["seed_results"]["5"]["artifact_bytes"]
    )
    assert claim["bytes_code"] == counted["train_gpt.py"]
    if tool := shutil.which("sha256sum"):
        subprocess.run([tool, "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, check=True)


class Evaluated(NamedTuple):
    folder: Path  # a copy of the submission, far from the run
    status: int  # of pack.py --evaluate
    around: list[Path]  # what lay in the working directory before
    options: dict  # env and cwd of the process
    done: subprocess.CompletedProcess


@pytest.fixture(scope="module")
def evaluated(
    trained: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Evaluated:
    folder = shutil.copytree(trained / "out", tmp_path_factory.mktemp("far") / "away")
    seen = []
    run = subprocess.run

    def spy(command: list[str], **options: Any) -> subprocess.CompletedProcess:
        around = list(Path(options["cwd"]).iterdir())
        seen.extend((around, options, run(command, **options)))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", spy)
        status = pack.main(
            ["--evaluate", str(folder), f"DATA_DIR={tiny_data}", "OMP_NUM_THREADS=1"]
        )
    return Evaluated(folder, status, *seen)


def test_folder_alone_gives_the_runs_score(trained, evaluated):
    """In a fresh process, an empty directory and an environment without anything but knobs."""
    assert (evaluated.status, evaluated.around) == (0, [])
    ran = runlog.read_final((trained / "logs" / "mine.txt").read_text())
    again = runlog.read_final(evaluated.done.stdout.decode())
    for key in ("val_bpb", "quantized_bpb"):
        assert again[key] == pytest.approx(ran[key], abs=1e-9)
    assert again["code_bytes"] == (evaluated.folder / "train_gpt.py").stat().st_size
    env = evaluated.options["env"]
    assert env.keys() <= {
        "PATH",
        "OMP_NUM_THREADS",
        "DATA_DIR",
        "EVAL_ONLY_PATH",
        "SEED",
        "TTT_LORA_LR",
        *TINY,
    }
    assert env["TTT_LORA_LR"] == "0.01"


def test_readme_gives_the_command_of_that_evaluation(evaluated, tiny_data):
    command = re.search("^env -i .*$", (evaluated.folder / "README.md").read_text(), re.M)[0]
    command = command.replace("FOLDER", str(evaluated.folder)).replace(
        "=DATA ", f"={tiny_data} OMP_NUM_THREADS=1 "
    )
    *variables, program, script = shlex.split(command.replace("$PATH", os.environ["PATH"]))[2:]
    assert dict(word.split("=", 1) for word in variables) == evaluated.options["env"]
    assert [program, script] == ["python", evaluated.done.args[1]]


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("val_bpb", lambda bpb: bpb + 2e-9),
        ("val_sha256", lambda _: "0" * 64),
        ("val_tokens", lambda n: n - 1),
    ],
)
def test_evaluation_that_is_not_the_logs_is_refused(evaluated, monkeypatch, key, change):
    """2e-9 bpb are enough."""
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: evaluated.done)
    files, _ = pack.load(evaluated.folder)
    assert pack.evaluate(evaluated.folder, files, {}, 1)
    log = files["train_seed5.log"]
    final = runlog.read_final(log.decode())
    final[key] = change(final[key])
    files["train_seed5.log"] = (
        log[: log.rindex(b"final {")] + b"final " + json.dumps(final).encode() + b"\n"
    )
    with pytest.raises(tg.UsageError, match=key):
        pack.evaluate(evaluated.folder, files, {}, 1)


def test_evaluation_that_fails_says_why(evaluated, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 2, b"", b"train_gpt.py: no data here\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    assert pack.main(["--evaluate", str(evaluated.folder), "DATA_DIR=."]) == 2
    assert "ended with status 2: train_gpt.py: no data here" in capsys.readouterr().err


# --- Several seeds --------------------------------------------------------------------------------
def test_claim_is_of_all_seeds_and_its_size_of_the_largest(tmp_path):
    runs = [write_run(tmp_path, seed, size=size) for seed, size in ((1, 900), (2, 950), (3, 800))]
    logs = [tmp_path / "logs" / f"s{seed}.txt" for seed in (2, 3)]
    files = make(runs[0], tmp_path / "out", "--log", *logs)
    claim = json.loads(files["submission.json"])
    scores = [1.5 + seed / 7 for seed in (1, 2, 3)]
    assert claim["seeds"] == [1, 2, 3]
    assert claim["val_bpb"] == pytest.approx(statistics.mean(scores))
    assert claim["val_bpb_std"] == pytest.approx(statistics.stdev(scores))
    assert claim["bytes_total"] == len(files["train_gpt.py"]) + 950
    assert claim["name"] == "a name"
    assert {"train_seed1.log", "train_seed2.log", "train_seed3.log"} < files.keys()
    assert len(files[ARTIFACT]) == 900


def test_log_of_a_sweeps_run_is_found(tmp_path):
    run = write_run(tmp_path)
    swept = tmp_path / "runs/sweeps/rec3/0000"
    swept.parent.mkdir(parents=True)
    run.rename(swept)
    (tmp_path / "logs/s1.txt").rename(tmp_path / "logs/rec3-0000.txt")
    assert "train_seed1.log" in make(swept, tmp_path / "out")


def test_knobs_of_the_evaluation_are_the_runs_but_for_paths_and_bookkeeping(small):
    readme = small["README.md"].decode()
    assert "CHECKPOINT_EVERY" not in readme  # which an evaluation refuses
    assert "WANDB_PROJECT" not in readme  # which a reader need not have
    assert " COMPILE=0 PRESET=cpu DATA_DIR=DATA " in readme.replace(" SEED=1", "")
    assert "NUM_LAYERS" not in readme
    assert "/x y" not in readme


# --- What --check finds ---------------------------------------------------------------------------
def resealed(files: dict[str, bytes]) -> dict[str, bytes]:
    return {**files, "SHA256SUMS": pack.make_sums(files)}


def edited(name: str, change: Callable[[bytes], bytes]) -> Callable[[dict], dict]:
    return lambda files: {**files, name: change(files[name])}


def without(name: str) -> Callable[[dict], dict]:
    return lambda files: {other: data for other, data in files.items() if other != name}


def other_program(files: dict[str, bytes]) -> dict[str, bytes]:
    """Readable and packed code changed together, so that only the log knows better."""
    source = SMALL_SOURCE.replace(b"LIMIT = 3", b"LIMIT = 4")
    return {**files, "train_gpt_readable.py": source, "train_gpt.py": packed_code.pack_code(source)}


def sub(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new)

    return change


def flip(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


LOG = "train_seed1.log"
FORGED = {  # (change, after which SHA256SUMS is renewed; what the problems must name)
    "source that differs": (
        edited("train_gpt_readable.py", sub(b"LIMIT = 3", b"LIMIT = 4")),
        ["train_gpt_readable.py: is another program", f"{LOG}: is a log of other code"],
    ),
    "comment that differs": (
        edited("train_gpt_readable.py", sub(b"a reason", b"a rumour")),
        ["train_gpt_readable.py: is not the text", f"{LOG}: is a log of other code"],
    ),
    "source that is no Python": (
        edited("train_gpt_readable.py", sub(b"def ", b"fed ")),
        ["train_gpt_readable.py: no Python", f"{LOG}: is a log of other code"],
    ),
    "stale log": (other_program, [f"{LOG}: is a log of other code"]),
    "byte of packed code": (
        edited("train_gpt.py", flip(400)),
        ["train_gpt.py: not a file that tools/pack.py wrote"],
    ),
    "more packed code": (
        edited("train_gpt.py", lambda data: data + b"import os\n"),
        ["train_gpt.py: not a file", *["submission.json: "] * 3],
    ),
    "readable code as packed": (
        edited("train_gpt.py", lambda _: SMALL_SOURCE),
        ["train_gpt.py: not a file", *["submission.json: "] * 3],
    ),
    "another seed's artifact": (
        edited(ARTIFACT, lambda _: random.Random(2).randbytes(900)),
        [f"{ARTIFACT}: is not the artifact of seed 1"],
    ),
    "byte of the artifact": (
        edited(ARTIFACT, flip(450)),
        [f"{ARTIFACT}: is not the artifact of seed 1"],
    ),
    "better score in the claim": (
        edited("submission.json", sub(b'"val_bpb": 1.6', b'"val_bpb": 1.5')),
        ["submission.json: seed_results", "submission.json: val_bpb"],
    ),
    "better score in the log": (
        edited(LOG, sub(b'"val_bpb": 1.6', b'"val_bpb": 1.5')),
        ["submission.json: seed_results", "submission.json: val_bpb"],
    ),
    "claim that is none": (
        edited("submission.json", lambda _: b"[1]"),
        ["submission.json: is no JSON object"],
    ),
    "fewer bytes in the log": (
        edited(LOG, sub(b'"model_bytes": 900', b'"model_bytes": 90')),
        [f"{ARTIFACT}: has 900 bytes, the log counts 90", *["submission.json: "] * 3],
    ),
    "other code bytes in the log": (
        edited(LOG, sub(b'"code_bytes": ', b'"code_bytes": 1')),
        [f"{LOG}: counts "],
    ),
    "other file ran": (
        edited(LOG, sub(b'"seed": 1', b'"seed": 1, "file_sha256": "f"')),
        [f"{LOG}: the file that ran"],
    ),
    "log of another seed": (
        lambda files: {**without(LOG)(files), "train_seed2.log": files[LOG]},
        ["train_seed2.log: is of seed 1"],
    ),
    "log without a figure": (
        edited(LOG, sub(b'"val_loss": 3.0, ', b"")),
        [f"{LOG}: its final line lacks val_loss"],
    ),
    "figure that is none": (
        edited(LOG, sub(b'"val_loss": 3.0', b'"val_loss": "3"')),
        [f"{LOG}: its final line is no JSON object of a run (val_loss must be a number)"],
    ),
    "unfinished log": (edited(LOG, sub(b"final {", b"{")), [f"{LOG}: has 0 final lines"]),
    "log of two runs": (edited(LOG, lambda data: data + data), [f"{LOG}: has 2 final lines"]),
    "log of other data": (
        lambda files: {
            **files,
            "train_seed2.log": sub(b'"seed": 1', b'"seed": 2')(
                sub(b'"val_sha256": "v"', b'"val_sha256": "w"')(files[LOG])
            ),
        },
        ["val_sha256: differs between the logs: v, w", *["submission.json: "] * 3],
    ),
    "two artifacts": (
        lambda files: {**files, "b.ptz": b""},
        ["*.ptz: one artifact belongs here, not 2"],
    ),
    "code that is not counted": (
        lambda files: {**files, "annotations.py": b"", "__future__.py": b"1"},
        ["__future__.py: train_gpt.py imports it, but its 1 bytes are not counted"],
    ),
    "files and folders of its own": (
        lambda files: {**files, "loss.png": b"", "tokenizers/a.model": b"", "more/train.log": b""},
        [],
    ),
    "audit of another": (
        lambda files: {**files, "audit.json": b'{"artifact_sha256": "0"}'},
        ["audit.json: does not name this artifact"],
    ),
    **{
        f"no {name}": (without(name), [f"{name}: missing"])
        for name in (
            "train_gpt.py",
            "train_gpt_readable.py",
            "submission.json",
            "requirements.txt",
            "README.md",
        )
    },
    "no log": (without(LOG), ["train_seed*.log: missing"]),
    "no artifact": (without(ARTIFACT), []),
}


@pytest.mark.parametrize("name", FORGED)
def test_every_problem_of_a_resealed_folder_has_its_line(small, name):
    change, expected = FORGED[name]
    found = list(pack.check(resealed(change(small))))
    assert len(found) == len(expected), found
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start), found
        assert "\n" not in line


def test_changed_byte_anywhere_is_found(small):
    rng = random.Random(0)
    assert list(pack.check(small)) == []
    for name, data in small.items():
        for place in {0, len(data) - 1, *rng.choices(range(len(data)), k=30)}:
            found = list(pack.check({**small, name: flip(place)(data)}))
            assert any(
                line.startswith(("SHA256SUMS: ", f"{name}: ")) or name == "SHA256SUMS"
                for line in found
            ), name


def test_missing_or_incomplete_list_of_sums_is_found(small):
    assert list(pack.check(without("SHA256SUMS")(small))) == ["SHA256SUMS: missing"]
    cut = edited("SHA256SUMS", lambda data: data[data.index(b"\n") + 1 :])(small)
    assert list(pack.check(cut)) == ["SHA256SUMS: is not the list of exactly these files"]


def test_links_are_refused(small, tmp_path, capsys):
    for name, data in small.items():
        (tmp_path / name).write_bytes(data)
    assert pack.main(["--check", str(tmp_path)]) == 0
    (tmp_path / "real").write_bytes(small["README.md"])
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").symlink_to(tmp_path / "real")
    (tmp_path / "pictures").mkdir()
    capsys.readouterr()
    assert pack.main(["--check", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"pack.py: {tmp_path}/") for line in lines)
    assert [line.split("/")[-1].split(":")[0] for line in lines] == [
        "README.md",
        "README.md",
        "SHA256SUMS",
    ]


def test_folder_that_is_none_is_named(tmp_path, capsys):
    assert pack.main(["--check", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"pack.py: {tmp_path}/none: No such file or directory\n"


def test_audit_of_the_artifact_travels(tmp_path):
    run = write_run(tmp_path)
    audit = json.dumps({"artifact_sha256": sha256((run / ARTIFACT).read_bytes())})
    (run / "audit.json").write_text(audit)
    assert make(run, tmp_path / "out")["audit.json"].decode() == audit


def test_edited_readme_needs_a_new_seal(small, tmp_path, capsys):
    for name, data in small.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "README.md").write_text("my own words\n")
    assert pack.main(["--check", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == f"pack.py: {tmp_path}/README.md: changed since SHA256SUMS was written\n"
    )
    assert pack.main(["--seal", str(tmp_path)]) == 0
    assert pack.main(["--check", str(tmp_path)]) == 0


# --- What cannot be packed ------------------------------------------------------------------------
def test_size_counts_the_packed_code_to_the_byte(tmp_path, capsys):
    room = tg.LIMIT_BYTES - pack.packed_size(SMALL_SOURCE)
    files = make(write_run(tmp_path, 1, size=room), tmp_path / "full")
    assert sum(len(files[name]) for name in ("train_gpt.py", ARTIFACT)) == tg.LIMIT_BYTES
    assert "0 under the limit" in capsys.readouterr().out
    arguments = [str(write_run(tmp_path, 2, size=room + 1)), str(tmp_path / "out"), "--name", "n"]
    assert pack.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("16000001 bytes, 1 over the limit" in line for line in lines)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda root: (root / "logs/s1.txt").unlink(), "of make) must name it"),
        (lambda root: (root / "logs/s1.txt").write_text("step:1\n"), "s1.txt: has 0 final lines"),
        (lambda root: (root / "runs/s1" / ARTIFACT).unlink(), "holds no artifact"),
        (
            lambda root: (root / "runs/s1" / ARTIFACT).write_bytes(b"another's"),
            "is not the artifact",
        ),
        (
            lambda root: (root / "logs/s1.txt").write_bytes(
                (root / "logs/s1.txt").read_bytes()[3:]
            ),
            "train_gpt.py: is not the code of the run",
        ),
        (lambda root: (root / "out").write_text(""), "out: exists and is not an empty folder"),
        (
            lambda root: (root / "out/x").mkdir(parents=True),
            "out: exists and is not an empty folder",
        ),
        (lambda root: shutil.rmtree(root / "runs"), "holds no artifact"),
    ],
)
def test_incomplete_run_ends_in_one_line_and_writes_nothing(tmp_path, capsys, damage, expected):
    run = write_run(tmp_path)
    damage(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert pack.main([str(run), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_seeds_of_another_claim_or_twice_are_refused(tmp_path, capsys):
    run = write_run(tmp_path, 1)
    _ = write_run(tmp_path, 2, preset="pr1530")
    assert pack.main([str(run), str(tmp_path / "out"), "--log", str(tmp_path / "logs/s2.txt")]) == 2
    assert "preset: differs between the logs: cpu, pr1530" in capsys.readouterr().err
    again = shutil.copy(tmp_path / "logs/s1.txt", tmp_path / "again.txt")
    assert pack.main([str(run), str(tmp_path / "out"), "--log", str(again)]) == 2
    assert "more than once of seed 1" in capsys.readouterr().err


def test_program_that_shortening_would_change_is_refused(monkeypatch):
    monkeypatch.setattr(packed_code, "squeeze", lambda text: text.replace("3", "4"))
    with pytest.raises(tg.UsageError, match="cannot shorten"):
        packed_code.pack_code(SMALL_SOURCE + b"x = 3\n")  # a text that was not packed before


@pytest.mark.parametrize(
    "argv", [[], ["run"], ["run", "out", "more"], ["--check", "a", "b"], ["--evaluate", "a", "b"]]
)
def test_wrong_arguments_end_with_status_2_and_help_explains(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        pack.main(argv)
    assert ended.value.code == 2
    with pytest.raises(SystemExit):
        pack.main(["--help"])
    told = capsys.readouterr().out
    for way in (
        "RUN_DIR OUT ",
        "--check FOLDER",
        "--evaluate FOLDER",
        "--code FILE",
        "--seal FOLDER",
    ):
        assert f"pack.py {way}" in told
