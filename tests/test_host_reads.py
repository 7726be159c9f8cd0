"""Where the host waits for the device: every such place in training and evaluation has a reason.

On a GPU a number that the host reads, as by item(), bool() or tolist(), drains the queue of
kernels, and so does a copy from memory that is not pinned. Here training, scoring and adaptation
run on fake tensors, which have no numbers. So every read shows, with the function of train_gpt.py
that made it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import TINY
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as tg

# Function -> why it may read a number, or copy from memory that is not pinned.
TRAINING = {
    "PendingRead.wait": "reads a step late, while the device has the next step's work",
    "to_device": "pinned and non-blocking on a GPU",
}
# Once for an evaluation, before or after its steps. What follows on the score is not looked at.
ONCE_AN_EVALUATION = {
    "Ledger.__init__": "copies the stream and its bytes",
    "Ledger.result": "the score, and a progress line every 8 s",
    "ByteTable.to": "copies the bytes of every piece",
}
SCORING = {"to_device": TRAINING["to_device"], **ONCE_AN_EVALUATION}
ALLOWED = {"training": TRAINING, "scoring": SCORING, "adaptation": SCORING, "chunks": SCORING}


def reading_function() -> str:
    """The innermost function of train_gpt.py that is running, with its class."""
    frame = sys._getframe()
    while frame.f_code.co_filename != tg.__file__:
        frame = frame.f_back
    return frame.f_code.co_qualname.split(".<locals>")[0]


class HostReads(TorchDispatchMode):
    """Notes who reads a number. The answer is True for a bool, else 0."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator unless it is a read."""
        if func is not torch.ops.aten._local_scalar_dense.default:
            return func(*args, **(kwargs or {}))
        self.functions.append(reading_function())
        return args[0].dtype == torch.bool

    def note_copy(self, function: Callable) -> Callable:
        """The function, which makes a tensor of host memory, with a note of who called it."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.functions.append(reading_function())
            return function(*args, **kwargs)

        return noted


def train(run: tg.Run) -> None:
    """Two steps."""
    tg.train(run, 0.0)


def score(run: tg.Run) -> None:
    """Every target once, then its result."""
    run.evaluate().result()


def adapt(run: tg.Run) -> None:
    """Every document with an adapter."""
    run.adapt(tg.Deadline(math.inf)).result()


PHASES = {"training": train, "scoring": score, "adaptation": adapt, "chunks": adapt}
# In the last, all weights learn instead of adapters.
CHUNKS = {"TTT_MODE": "chunk", "TTT_CHUNK_TOKENS": "64", "TTT_LR": "0.05"}


@pytest.fixture(scope="module")
def runs(tiny_data, tmp_path_factory) -> Iterator[dict[str, tg.Run]]:
    """By phase, a run whose data are there and whose model is not yet made."""
    env = {**TINY, "DATA_DIR": str(tiny_data), "ITERATIONS": "2", "VAL_DOC_FRACTION": "0.1"}
    # Two chunks of the one document.
    env |= {"TTT_CHUNK_SIZE": "64", "NUM_LOOPS": "0"}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("reads"))
        adapting = tg.Run(*tg.Config.from_env(env, has_cuda=False), tg.Ranks({}))
        learning = tg.Run(*tg.Config.from_env({**env, **CHUNKS}, has_cuda=False), tg.Ranks({}))
        # Writes a file, after training.
        patched.setattr(adapting, "save_weights", lambda *args: None)
        patched.setattr(tg, "handle_signals", lambda handler: None)
        # The fake model is made where it shall be.
        patched.setattr(tg.GPT, "to", lambda self, device: self)
        yield {**dict.fromkeys(PHASES, adapting), "chunks": learning}


def reads(run: tg.Run, phase: str) -> set[str]:
    """The functions in which the host waits for the device during a phase."""
    with FakeTensorMode(allow_non_fake_inputs=True), HostReads() as found:
        run.build_model()
        with pytest.MonkeyPatch.context() as patched:
            for name in ("from_numpy", "tensor", "as_tensor"):
                patched.setattr(torch, name, found.note_copy(getattr(torch, name)))
            PHASES[phase](run)
    return set(found.functions)


@pytest.fixture(scope="module")
def found(runs) -> dict[str, set[str]]:
    """By phase."""
    return {phase: reads(runs[phase], phase) for phase in PHASES}


@pytest.mark.parametrize("phase", PHASES)
def test_the_host_waits_only_where_there_is_a_reason(phase, found):
    assert found[phase] - ALLOWED[phase].keys() == set()


def test_every_reason_is_needed(found):
    allowed = set().union(*ALLOWED.values())
    assert allowed - set().union(*found.values()) == set()


def item_in_step(self: tg.Optimizers, *args: Any) -> torch.Tensor:
    """An optimiser that looks at the norm of the gradient."""
    norm = STEP(self, *args)
    assert norm.item() >= 0
    return norm


def bool_in_record(self: tg.Ledger, index: torch.Tensor, nats: torch.Tensor) -> None:
    """A ledger that looks at every score."""
    if not nats.isfinite().all():
        return
    RECORD(self, index, nats)


def list_in_update(self: tg.Adaptation, grads: tuple, rows: slice, number: int) -> None:
    """An adaptation that takes its rates from a list."""
    torch.tensor([1.0] * number)
    APPLY(self, grads, rows, number)


def item_in_sum(model: tg.GPT, ranks: tg.Ranks) -> None:
    """A sum of gradients that looks at one of them."""
    SUM(model, ranks)
    assert model.tok_emb.grad.sum().item() == 0


SUM = tg.sum_gradients
STEP = tg.Optimizers.step
RECORD = tg.Ledger.record
APPLY = tg.Adaptation.apply_gradients
FAULTS = [
    ("training", tg.Optimizers, "step", item_in_step, "train"),
    ("scoring", tg.Ledger, "record", bool_in_record, "Scorer.score_row"),
    ("adaptation", tg.Adaptation, "apply_gradients", list_in_update, "Adaptation.learn_chunk"),
    ("chunks", tg, "sum_gradients", item_in_sum, "learn_weights"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[3].__name__)
def test_a_hidden_wait_is_caught(fault, runs, monkeypatch):
    phase, owner, name, planted, caller = fault
    monkeypatch.setattr(owner, name, planted)
    assert reads(runs[phase], phase) - ALLOWED[phase].keys() == {caller}
