"""Several ranks as threads of one process, whose collectives must be the same at the same time.

A collective here computes what a real one does. But before, it compares operation, shape and dtype
on all ranks. Where they differ, gloo may fail and NCCL waits without end; here every rank raises
Diverged. A rank that ends while others wait for it gives them the error that gloo has for it.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import train_gpt as tg

TIMEOUT_S = 240


class Collective(NamedTuple):
    """A collective as NCCL sees it; what is pickled may differ in size between ranks."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


END = Collective("the end of the job")
GONE = Collective("an error")


class Diverged(AssertionError):
    """Ranks have called different collectives at the same time."""


class LostPeer(RuntimeError):
    """Another rank has gone, as gloo says it."""


class Outcome(NamedTuple):
    """What became of one rank."""

    result: Any  # what the job returned
    error: BaseException | None
    collectives: list[Collective]


class World:
    """The ranks' meeting place."""

    def __init__(self, size: int):
        self.size = size
        self.store = dist.HashStore()
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self.called = [END] * size
        self.values: list[Any] = [None] * size
        self.histories: list[list[Collective]] = [[] for _ in range(size)]
        self.thread = threading.local()

    def meet(self, collective: Collective, value: Any) -> list[Any]:
        """Waits for all ranks; returns the values of all, in the order of the ranks.

        Raises LostPeer if one has gone, and Diverged if they are not at the same collective.
        """
        rank = self.thread.rank
        self.histories[rank].append(collective)
        self.called[rank] = collective
        self.values[rank] = value
        self.barrier.wait()
        called = list(self.called)
        values = list(self.values)
        self.barrier.wait()
        if GONE in called:
            raise LostPeer("Connection closed by peer")
        if len(set(called)) > 1:
            number = len(self.histories[rank])
            raise Diverged(f"collective {number}: {dict(enumerate(called))}")
        return values

    # --- In place of the functions of torch.distributed ---
    def all_reduce(self, t: Tensor) -> None:
        """Sums t over the ranks, in place."""
        values = self.meet(Collective("all_reduce", t.shape, t.dtype), t.detach().clone())
        t.copy_(torch.stack(values).sum(0).to(t.dtype))

    def all_gather_object(self, values: list[Any], value: Any) -> None:
        """Fills `values` with every rank's value."""
        found = self.meet(Collective("all_gather_object"), pickle.dumps(value))
        values[:] = map(pickle.loads, found)

    def reduce_scatter_tensor(self, out: Tensor, message: Tensor) -> None:
        """Each rank gets its part of the sum."""
        collective = Collective("reduce_scatter_tensor", message.shape, message.dtype)
        values = self.meet(collective, message.detach().clone())
        total = torch.stack(values).sum(0)
        out.copy_(total.view(self.size, -1)[self.thread.rank])

    def all_gather_into_tensor(self, out: Tensor, part: Tensor) -> None:
        """Every rank gets the parts of all, end to end."""
        collective = Collective("all_gather_into_tensor", part.shape, part.dtype)
        out.copy_(torch.cat(self.meet(collective, part.detach().clone())))


def install(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this world the process group, and signals the business of the main thread alone."""
    for name in (
        "all_reduce",
        "all_gather_object",
        "reduce_scatter_tensor",
        "all_gather_into_tensor",
    ):
        monkeypatch.setattr(dist, name, getattr(world, name))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: world.store)
    monkeypatch.setattr(tg, "handle_signals", lambda handler: None)


def on_simulated_ranks(
    size: int, job: Callable[[tg.Ranks], Any], monkeypatch: pytest.MonkeyPatch
) -> list[Outcome]:
    """Runs job(ranks) on every rank, and returns what became of each."""
    world = World(size)
    install(world, monkeypatch)
    outcomes: list[Outcome | None] = [None] * size

    def run(rank: int) -> None:
        world.thread.rank = rank
        ranks = tg.Ranks({})
        ranks.distributed = size > 1
        ranks.rank = rank
        ranks.world_size = size
        ranks.is_main = rank == 0
        result = error = None
        try:
            result = job(ranks)
            world.meet(END, None)
        except (LostPeer, Diverged) as caught:
            # All ranks have met for the last time.
            error = caught
        except BaseException as caught:  # noqa: BLE001 the test looks at it
            error = caught
            # Others wait for this rank, now or later, or have an error as well.
            with contextlib.suppress(LostPeer, threading.BrokenBarrierError):
                world.meet(GONE, None)
        outcomes[rank] = Outcome(result, error, world.histories[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
