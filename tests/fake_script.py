"""Stands in for train_gpt.py in the tests of a sweep: a few knobs, its lines, no torch.

FAKE says what befalls which seed, as JSON. ran.txt notes who starts and who ends: a word, the seed,
the rate and the process. ids.txt notes the names of the runs.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
import types

LIMIT_BYTES = 16_000_000


def no_gpus() -> int:
    """The number of GPUs."""
    return 0


torch = types.SimpleNamespace(cuda=types.SimpleNamespace(device_count=no_gpus))


class UsageError(ValueError):
    """Never raised here."""


def knob(default: object) -> object:
    """A field as the script declares it."""
    return dataclasses.field(default=default, metadata={"choices": ()})


@dataclasses.dataclass
class Config:
    """The knobs there are."""

    seed: int = knob(0)
    matrix_lr: float = knob(0.02)
    min_lr: float = knob(0.1)
    num_heads: int = knob(3)
    val_loss_every: int = knob(0)
    eval_only_path: str = knob("")
    checkpoint_every: float = knob(0.0)
    max_wallclock_seconds: float = knob(0.0)

    @classmethod
    def from_env(cls, env: dict, has_cuda: bool) -> tuple:
        """The configuration, and nothing about where it came from."""
        values = {}
        for field in dataclasses.fields(cls):
            if field.name.upper() in env:
                values[field.name] = type(field.default)(env[field.name.upper()])
        return cls(**values), {}


def fail_early(fate: str) -> None:
    """What befalls a run before its first step."""
    if fate == "crash":
        raise RuntimeError("out of memory")
    if fate == "killed":
        os.kill(os.getpid(), 9)
    if fate == "refused":
        print("train_gpt.py: NUM_HEADS=3: must be even", file=sys.stderr)
        sys.exit(2)
    if fate == "diverged":
        print("train_gpt.py: loss nan in step 3", file=sys.stderr)
        sys.exit(1)


def fail_late(fate: str) -> None:
    """What befalls a run after its last step."""
    if fate == "hang":
        time.sleep(30)
    while fate == "wait" and not os.path.exists("go"):
        time.sleep(0.05)
    if fate == "invalid":
        print("score INVALID: 3 targets scored twice")
    if fate == "silent":
        sys.exit(0)


def main() -> None:
    """A run whose score depends on its rate and a little on its seed."""
    env = os.environ
    rate = float(env.get("MATRIX_LR", 0.02))
    seed = env.get("SEED", "0")
    fate = json.loads(env.get("FAKE", "{}")).get(seed, "")
    bpb = 1 + 10 * abs(rate - 0.02) + 0.001 * int(seed)

    def note(word: str) -> None:
        with open(env.get("RAN", "ran.txt"), "a") as file:
            file.write(f"{word} {seed} {rate:g} {os.getpid()}\n")

    note("start")
    with open("ids.txt", "a") as file:
        file.write(f"{env['RUN_ID']} {env['ARTIFACT_DIR']}\n")
    if env.get("GRANDCHILD"):
        sleeper = subprocess.Popen(["sleep", "30"], start_new_session=True)
        with open("sleepers.txt", "a") as file:
            file.write(f"{sleeper.pid}\n")
    fail_early(fate)
    for step in range(1, 6):
        time.sleep(float(env.get("FAKE_SECONDS", "0")) / 5)
        print(f"{step * 10}/50 val_loss: {bpb:.4f} val_bpb: {bpb + 1 / step:.4f}", flush=True)
    fail_late(fate)
    figures = {
        "val_bpb": float("nan") if fate == "nan" else bpb,
        "artifact_bytes": LIMIT_BYTES + 1 if fate == "big" else 1000,
        "steps": 50,
        "seconds": {"train": 1.5},
        "eval_only": env.get("EVAL_ONLY_PATH", ""),
    }
    print("final " + json.dumps(figures))
    note("end")


if __name__ == "__main__":
    main()
