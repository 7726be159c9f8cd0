"""Replays the first steps of a training: does it see the validation split, does warm-up teach?

    python tools/audit.py training LOG --steps 4

The script of the log trains a few steps three times, each time in a folder of its own: on the real
shards, with validation shards of random tokens, and, if it is another file, by the reviewer's own
train_gpt.py. Then

    noise      weights and artifact are equal to the byte, whatever the validation text is
    warm-up    the weights before step 1 are those that the seed makes, by the trusted script
    losses     the first losses are those of the log

A script that behaves in short runs is not caught here, but its first weights and losses are those
of the long run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import fresh_process
import numpy as np
import runlog
import terminal
from digests import file_sha256
from fresh_process import MachineError
from held import DataError, HeldData, split_paths, tokenizer_by_hash
from replay import ReplayError, check_outcome, write_shards

from train_gpt import reason_of

SCRIPT = Path(__file__).resolve().parents[1] / "train_gpt.py"
LOSS_NATS = 2e-3  # four printed digits, and another machine's rounding in bf16
FIRST_STEPS = 2  # that no schedule has changed yet


class Training(NamedTuple):
    """What a short training has left."""

    artifact_sha256: str
    final: dict[str, Any]
    losses: dict[int, float]  # by step


def first_losses(text: str) -> dict[int, float]:
    """Step -> training loss of the first steps of a log."""
    losses = {}
    for line in text.splitlines():
        match = runlog.STEP.match(line)
        if match and int(match[1]) <= FIRST_STEPS:
            figures = {name: value for name, value, _ in runlog.STEP_FIGURE.findall(line)}
            if "train_loss" in figures:
                losses[int(match[1])] = float(figures["train_loss"])
    return losses


def train_alone(
    script: Path, held: HeldData, variables: dict[str, str], tokens: np.ndarray, steps: int
) -> Training:
    """A training of a few steps in a folder of its own, with this validation text.

    Raises ReplayError if it fails, MachineError if the machine has failed it.
    """
    with tempfile.TemporaryDirectory(prefix="run-") as name:
        folder = Path(name).resolve()
        data = fresh_process.lay_out(folder, script, held.tokenizer, held.folder.name)
        for path in split_paths(held.folder, "train"):
            (data / path.name).symlink_to(path.resolve())
        write_shards(held, tokens, data)
        environ = fresh_process.environment(folder, held.folder.name, variables) | {
            "ITERATIONS": str(steps),
            "MAX_WALLCLOCK_SECONDS": "0",
            "TTT_ENABLED": "0",
            "SLIDING_WINDOW_ENABLED": "0",
            "VAL_DOC_FRACTION": "1e-9",
            "TRAIN_LOG_EVERY": "1",
            "RUN_ID": "first_steps",
        }
        del environ["EVAL_ONLY_PATH"]
        done = subprocess.run(
            [sys.executable, "train_gpt.py"],
            cwd=folder,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        artifact = folder / "runs" / "first_steps" / "final_model.int6.ptz"
        check_outcome(done, artifact)
        log = (folder / "logs" / "first_steps.txt").read_text(encoding="utf-8")
        return Training(file_sha256(artifact), runlog.read_final(log), first_losses(log))


def noise_of(held: HeldData, seed: int) -> np.ndarray:
    """The validation stream with other words in place of all but the BOS."""
    rng = np.random.default_rng(seed)
    words = [i for i in range(held.model.vocab_size()) if is_word(held.model, i)]
    tokens = rng.choice(np.array(words, np.uint16), len(held.tokens))
    return np.where(held.tokens == held.bos, held.tokens, tokens)


def is_word(model: Any, token: int) -> bool:
    """Whether a piece is text by itself: no control piece, no byte, no operator."""
    is_special = model.is_control(token) or model.is_unknown(token) or model.is_byte(token)
    return not is_special and not any("\ue000" <= c <= "\uf8ff" for c in model.id_to_piece(token))


def faults(log: Path, script: Path, reference: Path, steps: int, data_dir: Path) -> list[str]:
    """What the first steps have against the log: a sentence for each fault."""
    text = runlog.read_text(log)
    final = runlog.read_final(text)
    tokenizer = tokenizer_by_hash(data_dir, final["tokenizer_sha256"])
    held = HeldData.load(data_dir / "datasets" / final["dataset"], tokenizer)
    variables = runlog.evaluation_variables(text)
    variables.pop("DATASET", None)
    variables["CHECKPOINT_EVERY"] = "0"
    honest = train_alone(script, held, variables, held.tokens, steps)
    noisy = train_alone(script, held, variables, noise_of(held, steps), steps)
    trusted = honest
    if file_sha256(script) != file_sha256(reference):
        trusted = train_alone(reference, held, variables, held.tokens, steps)
    found = []
    if honest.artifact_sha256 != noisy.artifact_sha256:
        found.append("with validation shards of noise the artifact is another: training saw them")
    wanted = trusted.final["first_weights_sha256"]
    for name, figures in (("the log", final), ("the script", honest.final)):
        if figures.get("first_weights_sha256") != wanted:
            found.append(f"weights before step 1 are not those of the seed, by {name}")
    for step, loss in first_losses(text).items():
        again = trusted.losses.get(step)
        if again is not None and not abs(again - loss) <= LOSS_NATS:
            found.append(f"the loss of step {step} is {loss} in the log, {again} by replay")
    return found


def main(argv: list[str]) -> int:
    """Returns 0 if nothing speaks against the log, 1 if something does, 2 and 3 as audit.py."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = terminal.Parser(
        prog="audit.py training", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("log", type=Path)
    parser.add_argument("--script", type=Path, default=SCRIPT, help="the submitted script")
    parser.add_argument("--reference", type=Path, default=SCRIPT, help="one that you trust")
    parser.add_argument("--steps", type=int, default=4, help="steps to train (default 4)")
    args = parser.parse_args(argv)
    for path in (args.log, args.script, args.reference):
        if not path.is_file():
            parser.error(f"{path}: no such file")
    if args.steps < FIRST_STEPS:
        parser.error(f"--steps {args.steps}: must be at least {FIRST_STEPS}")
    data_dir = Path(os.environ.get("DATA_DIR") or "data").resolve()
    try:
        found = faults(args.log, args.script, args.reference, args.steps, data_dir)
    except OSError as error:
        print(f"audit.py training: {reason_of(error)}", file=sys.stderr)
        return 2
    except (runlog.LogError, DataError, KeyError) as error:
        print(f"audit.py training: {args.log}: {error}", file=sys.stderr)
        return 2
    except ReplayError as error:
        found = [f"the training failed: {error}"]
    except MachineError as error:
        print(f"audit.py training: the machine has failed: {error}", file=sys.stderr)
        return 3
    for fault in found:
        print(f"VIOLATION: {fault}")
    if not found:
        print(f"ok: {args.steps} steps, first weights and losses as in the log, blind to noise")
    return int(bool(found))
