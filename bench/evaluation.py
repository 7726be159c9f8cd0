"""Speed of the evaluation with test-time training.

    python bench/evaluation.py                     # ours against the published way
    python bench/evaluation.py --reference FILE    # also a script of the family of PR #1530

The published way is ours with whole windows, all logits and fixed batches; the script is timed with
its own function (see bench/reference.py). Knobs are environment variables, as for train_gpt.py.
EVAL_ONLY_PATH names a checkpoint or artifact to measure with; without it the weights are random.

Documents are those of the data set if it is there, else random ones as long as FineWeb's. With
--docs so many are drawn at random and are a validation set of their own (the default on a CPU, 8).
With --batches, all documents are batched as in the published way, and so many batches are taken at
equal shares of its work (the default on CUDA, 4). Documents are cut at --longest targets (default:
4 windows on a CPU, 2 on CUDA).

Ways take turns (A B C C B A) in one process; a ratio is ours / the other. The largest difference of
a target's nats, between ours and the published way, is measured in fp32. Seconds for 50,000 FineWeb
documents come from measured steps on a GPU alone. The last line is `bench ` and a JSON object; null
is what was not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import heapq
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import numpy as np
import torch
from document_lengths import fineweb_lengths
from reference import Reference
from step import Stopwatch, device_name, paired_ratio, print_times, random_weights, take_turns
from torch import Tensor

import train_gpt as tg

NUM_FINEWEB = 50_000
# Time of this work relative to an H200, modelled from the bandwidths: 3.35 against 4.8 TB/s.
SLOWER = {"H200": 1.0, "H100": 1.19}


# --- Documents ------------------------------------------------------------------------------------
class Text(NamedTuple):
    """What is evaluated: whole documents end to end, and the bytes of every token."""

    docs: tg.Documents
    table: tg.ByteTable
    bos_id: int


def join_documents(pieces: list[np.ndarray], table: tg.ByteTable, bos_id: int) -> Text:
    """The text of documents whose tokens, which begin with BOS, are given."""
    counts = np.array([len(piece) for piece in pieces])
    # After the last document there is no BOS that its last token could predict.
    counts[-1] -= 1
    starts = np.cumsum(counts) - counts
    tokens = np.concatenate(pieces).astype(np.int64)
    return Text(tg.Documents(tokens, starts, counts), table, bos_id)


def cut(text: Text, counts: np.ndarray) -> Text:
    """The beginnings of its documents, with as many tokens as given for each."""
    pieces = []
    for start, count in zip(text.docs.starts, counts, strict=True):
        pieces.append(text.docs.tokens[start : start + count])
    return join_documents(pieces, text.table, text.bos_id)


def describe(text: Text) -> str:
    """The number of documents, and the range of their lengths."""
    counts = text.docs.counts
    return f"{len(counts)} documents of {counts.min()}..{counts.max()} targets"


def fixed_batches(
    docs: tg.Documents, chosen: np.ndarray, cfg: tg.Config, world_size: int = 1
) -> list[np.ndarray]:
    """tg.plan_batches in the published way: TTT_BATCH_SIZE documents each, longest first."""
    chosen = chosen[docs.counts[chosen] > 0]
    chosen = chosen[np.argsort(-docs.counts[chosen], kind="stable")]
    starts = range(0, len(chosen), cfg.ttt_batch_size)
    return [chosen[start : start + cfg.ttt_batch_size] for start in starts]


def documents_of_lengths(lengths: np.ndarray) -> tg.Documents:
    """Documents of which nothing but their lengths is known."""
    return tg.Documents(np.arange(0), np.arange(len(lengths)), lengths)


def num_positions(docs: tg.Documents, batch: np.ndarray, cfg: tg.Config) -> int:
    """Positions that the published way processes for a batch: whole windows of all documents."""
    grid = tg.chunk_grid(cfg, int(docs.counts[batch].max()))
    return len(batch) * sum(min(end, cfg.ttt_eval_seq_len) for _, end in grid)


def representative(lengths: np.ndarray, cfg: tg.Config, num_batches: int) -> np.ndarray:
    """Documents of the batches in the middle of equal shares of the published way's work.

    Work is counted in positions. There are as many shares as batches are wanted.
    """
    docs = documents_of_lengths(lengths)
    batches = fixed_batches(docs, np.arange(len(lengths)), cfg)
    work = np.cumsum([num_positions(docs, batch, cfg) for batch in batches])
    middles = (np.arange(num_batches) + 0.5) / num_batches * work[-1]
    numbers = sorted(set(np.searchsorted(work, middles)))
    return np.concatenate([batches[number] for number in numbers])


def short_documents(text: Text, cfg: tg.Config, count: int) -> Text:
    """Random beginnings of documents of `text`, from 2 tokens to one and a half windows long."""
    rng = np.random.default_rng(1)
    longest = cfg.ttt_eval_seq_len * 3 // 2
    chosen = np.sort(rng.integers(0, len(text.docs.counts), count))
    sizes = np.minimum(rng.integers(2, longest, count), text.docs.counts[chosen])
    docs = text.docs._replace(starts=text.docs.starts[chosen], counts=text.docs.counts[chosen])
    return cut(text._replace(docs=docs), sizes)


class RandomDocuments:
    """Random tokens in documents as long as FineWeb's."""

    name = "random tokens, as long as FineWeb's"

    def __init__(self, cfg: tg.Config):
        """Draws nothing yet."""
        self.vocab_size = cfg.vocab_size
        self.lengths = fineweb_lengths(NUM_FINEWEB)
        self.bos_id = 1
        one_byte = np.ones(cfg.vocab_size, np.int64)
        never = np.zeros(cfg.vocab_size, bool)
        self.table = tg.ByteTable(one_byte, never, never)
        self.rng = np.random.default_rng(0)

    def tokens(self, document: int, count: int) -> np.ndarray:
        """The first `count` tokens of a document; its first one stands where BOS belongs."""
        return self.rng.integers(self.bos_id + 1, self.vocab_size, count)


class StoredDocuments:
    """The validation documents of the data set."""

    def __init__(self, cfg: tg.Config):
        """Reads and checks the data set. Raises UsageError."""
        tokenizer = tg.Tokenizer.load(cfg)
        stream = tg.TokenStream(cfg.dataset_dir, "val")
        tg.check_shards(cfg, tokenizer, tg.Ranks({}), {"val": stream})
        self.name = f"{cfg.dataset_dir.name}, validation"
        self.bos_id = tokenizer.bos_id
        self.docs = tg.Documents.load(stream, tokenizer.bos_id, cfg)
        self.lengths = self.docs.counts
        self.table = tg.ByteTable.from_sentencepiece(tokenizer.model)

    def tokens(self, document: int, count: int) -> np.ndarray:
        """The first `count` tokens of a document."""
        start = self.docs.starts[document]
        return self.docs.tokens[start : start + count]


def load_text(cfg: tg.Config, num_docs: int, num_batches: int, longest: int) -> tuple[Text, str]:
    """The documents to measure with, cut at `longest` targets, and the name of their source.

    `num_docs` of them are drawn at random, or with 0 those of `num_batches` batches are taken.
    """
    source = StoredDocuments(cfg) if cfg.dataset_dir.is_dir() else RandomDocuments(cfg)
    if num_docs:
        order = np.random.default_rng(cfg.seed).permutation(len(source.lengths))
        chosen = np.sort(order[:num_docs])
    else:
        chosen = representative(source.lengths, cfg, num_batches)
    pieces = []
    for document in chosen:
        ids = source.tokens(document, min(int(source.lengths[document]), longest))
        pieces.append(np.append(source.bos_id, ids[1:]))
    return join_documents(pieces, source.table, source.bos_id), source.name


# --- What is timed --------------------------------------------------------------------------------
@dataclasses.dataclass
class StepSize:
    """What a step of adaptation processed: one chunk of a batch of documents."""

    learns: bool  # whether any document goes on after it
    documents: int = 0
    positions: int = 0


class Steps(NamedTuple):
    """Sizes and times of steps, in their order."""

    documents: np.ndarray  # (n,) int
    positions: np.ndarray  # (n,) int
    learns: np.ndarray  # (n,) bool
    seconds: np.ndarray  # (n,) float

    @property
    def windows(self) -> np.ndarray:
        """Positions per document, (n,)."""
        return self.positions / self.documents


class Recording:
    """The steps of one evaluation, while they are made."""

    def __init__(self, device: torch.device):
        """Begins with no step."""
        self.sizes: list[StepSize] = []
        self.watch = Stopwatch(device)

    def steps(self) -> Steps:
        """The steps so far. Waits for the device."""
        return Steps(
            documents=np.array([size.documents for size in self.sizes]),
            positions=np.array([size.positions for size in self.sizes]),
            learns=np.array([size.learns for size in self.sizes]),
            # Marks are pairs, and every other interval lies between two steps.
            seconds=np.array(self.watch.read()[::2]),
        )


class Timed(tg.Adaptation):
    """Adaptation that records the size and the time of every step."""

    # How documents are put into batches: a function as tg.plan_batches.
    batches = staticmethod(tg.plan_batches)

    def __init__(self, model: tg.GPT, forward: Callable, plan: tuple, device: torch.device):
        """As tg.Adaptation."""
        super().__init__(model, self.recorded_forward, plan, device)
        self.inner_forward = forward
        self.recording = Recording(device)

    def recorded_forward(
        self, batch: tg.Batch, plan: tuple, lora: tg.LoRA, select: Tensor
    ) -> Tensor:
        """The forward, whose size is added to the current step's."""
        size = self.recording.sizes[-1]
        size.documents += len(lora.down)
        size.positions += batch.inputs.numel()
        return self.forward_selected(batch, plan, lora, select)

    def forward_selected(
        self, batch: tg.Batch, plan: tuple, lora: tg.LoRA, select: Tensor
    ) -> Tensor:
        """Nats of the selected positions."""
        return self.inner_forward(batch, plan, lora=lora, select=select)

    def run_chunk(self, ledger: tg.Ledger, start: int, end: int) -> None:
        """Runs a step between two marks."""
        learns = bool((self.documents.lengths > end).any())
        self.recording.sizes.append(StepSize(learns=learns))
        self.recording.watch.mark()
        super().run_chunk(ledger, start, end)
        self.recording.watch.mark()

    def num_live_at(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """How many documents of these lengths are run for the chunks at these starts, (n,)."""
        return len(lengths) - np.searchsorted(np.sort(lengths), starts, side="right")


class Published(Timed):
    """The published way: whole windows, all logits, and fixed batches.

    No document leaves its batch before the longest one does.
    """

    batches = staticmethod(fixed_batches)

    def __init__(self, model: tg.GPT, forward: Callable, plan: tuple, device: torch.device):
        """As tg.Adaptation."""
        super().__init__(model, forward, plan, device)
        self.buckets = []
        self.separates_learners = False

    def begin(self, docs: tg.Documents, batch: np.ndarray) -> None:
        """Starts a batch, all of whose documents stay to its end."""
        super().begin(docs, batch)
        rows = len(self.documents.lengths)
        self.documents.num_longer = lambda index: rows

    def num_live_at(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """All documents for every chunk."""
        return np.full(len(starts), len(lengths))

    def forward_selected(
        self, batch: tg.Batch, plan: tuple, lora: tg.LoRA, select: Tensor
    ) -> Tensor:
        """Nats of the selected positions, after those of all positions were computed."""
        return self.inner_forward(batch, plan, lora=lora, select=None)[select]


class Network(NamedTuple):
    """A network to evaluate."""

    cfg: tg.Config
    weights: Mapping[str, Tensor]
    looped: bool


class Score(NamedTuple):
    """The outcome of an evaluation."""

    val_loss: float  # nats per token
    val_bpb: float  # bits per byte


class Ours:
    """The evaluation as train_gpt.Run.adapt calls it, in our way or the published one."""

    def __init__(
        self,
        network: Network,
        backend: str,
        device: torch.device,
        way: type[Timed] = Timed,
    ):
        """Builds the model. backend: of attention."""
        self.cfg = network.cfg
        self.device = device
        self.plan = self.cfg.plans[network.looped]
        self.model = tg.GPT(self.cfg, backend).to(device)
        self.model.load_state_dict(network.weights)
        self.run = tg.compile_any_size(self.model) if self.cfg.compile else self.model
        self.adaptation = way(self.model, self.run, self.plan, device)
        self.recordings: list[Recording] = []

    def evaluate(self, text: Text) -> tg.Ledger:
        """Scores the text while learning, and records the steps."""
        self.adaptation.recording = Recording(self.device)
        self.recordings.append(self.adaptation.recording)
        ledger = tg.Ledger(text.docs, text.table, self.device)
        log = tg.Log(Path(os.devnull), False)
        scorer = tg.Scorer(self.run, self.plan, ledger, self.cfg, tg.Ranks({}), log)
        with mock.patch.object(tg, "plan_batches", self.adaptation.batches):
            return tg.evaluate_ttt(
                scorer, self.adaptation, self.model, self.run, tg.Deadline(math.inf)
            )

    def score(self, text: Text) -> Score:
        """The score of an evaluation."""
        result = self.evaluate(text).result()
        return Score(result["val_loss"], result["val_bpb"])

    def steps(self, runs: int) -> Steps:
        """The steps of the last `runs` evaluations."""
        parts = [recording.steps() for recording in self.recordings[-runs:]]
        return Steps(*map(np.concatenate, zip(*parts, strict=True)))


class Theirs:
    """The script's own function for an evaluation."""

    def __init__(self, reference: Reference, network: Network):
        """Builds the script's model with our weights."""
        self.reference = reference
        self.model = reference.build(network.weights, network.looped)

    def score(self, text: Text) -> Score:
        """The score of an evaluation."""
        tokens = text.docs.tokens
        return Score(*self.reference.evaluate_ttt(self.model, tokens, text.table, text.bos_id))


# --- Same maths -----------------------------------------------------------------------------------
class Differences(NamedTuple):
    """Largest differences of nats."""

    before_update: float  # in the first chunk of each document
    after_update: float


def largest_differences(text: Text, cfg: tg.Config, a: Tensor, b: Tensor) -> Differences:
    """The differences of two evaluations, whose nats by stream index are given."""
    differences = (a - b).abs()[:-1]
    index = text.docs.target_indices()
    offset = index - np.repeat(text.docs.starts, text.docs.counts)
    is_first = offset < tg.chunk_grid(cfg, 1)[0][1]

    def largest(part: np.ndarray) -> float:
        if not part.any():
            return 0.0
        return float(differences[torch.from_numpy(index[part]).to(differences.device)].max())

    return Differences(largest(is_first), largest(~is_first))


def equal_down(shape: Iterable[int]) -> Tensor:
    """The same values of A (.., rank, width) whenever it is asked for."""
    *_, rank, width = shape
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(rank, width, generator=generator) * 2 - 1) * width**-0.5


@contextlib.contextmanager
def equal_starts(reference: Reference) -> Iterator[None]:
    """Starts every adapter of both systems from the same A, for a while.

    Otherwise both draw A at random, each in an order of its own.
    """
    theirs = reference.module.BatchedLinearLoRA

    class Equal(theirs):
        def __init__(self, *args: int):
            super().__init__(*args)
            self.A.data.copy_(equal_down(self.A.shape))

        @torch.no_grad()
        def reset(self) -> None:
            self.A.copy_(equal_down(self.A.shape))
            self.B.zero_()

    @torch.no_grad()
    def reset(lora: tg.LoRA, seed: int, keys: Iterable[int]) -> None:
        lora.down.copy_(equal_down(lora.down.shape))
        lora.up.zero_()

    with (
        mock.patch.object(reference.module, "BatchedLinearLoRA", Equal),
        mock.patch.object(tg.LoRA, "reset", reset),
    ):
        yield


def compare_with_published(ours: Ours, published: Ours, text: Text) -> float:
    """The largest difference in nats of the two ways. Raises AssertionError if it is too large."""
    a = ours.evaluate(text)
    b = published.evaluate(text)
    before, after = largest_differences(text, ours.cfg, a.nats, b.nats)
    bpb = abs(a.result()["val_bpb"] - b.result()["val_bpb"])
    print(
        f"fp32, {describe(text)}, ours against the published way: "
        f"{before:.1e} nats before an update, {after:.1e} after, bpb {bpb:.1e}"
    )
    agree = before < 1e-4 and after < 1e-3 and bpb < 1e-5
    assert agree, "the two ways do not compute the same"
    return max(before, after)


def compare_with_script(ours: Ours, theirs: Theirs, text: Text) -> None:
    """Raises AssertionError if the losses differ when all adapters start from the same values.

    Documents are cut at one window, as the script cuts the last window elsewhere.
    """
    short = cut(text, np.minimum(text.docs.counts, ours.cfg.ttt_eval_seq_len))
    with equal_starts(theirs.reference):
        their_loss = theirs.score(short).val_loss
        our_loss = ours.score(short).val_loss
    print(
        f"fp32, {describe(short)}, equal adapters: loss {our_loss:.7f}, "
        f"the public script's {their_loss:.7f}"
    )
    agree = abs(our_loss - their_loss) < 1e-5
    assert agree, "ours and the public script do not compute the same"


def check_maths(network: Network, device: torch.device, text: Text, path: Path | None) -> float:
    """The largest difference in nats, in fp32, of ours and the published way.

    path: the public script, if it is to be compared too. Raises AssertionError if the ways do not
    compute the same.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    # In fp32 there is no attention but that of sdpa, which is not compiled.
    cfg = dataclasses.replace(network.cfg, compute_dtype="fp32", compile=False)
    exact = network._replace(cfg=cfg)
    ours = Ours(exact, "sdpa", device)
    difference = compare_with_published(ours, Ours(exact, "sdpa", device, Published), text)
    if path:
        reference = Reference(path, cfg, device, "sdpa")
        compare_with_script(ours, Theirs(reference, exact), text)
    torch.set_float32_matmul_precision(precision)
    return difference


# --- From steps to 50,000 documents ---------------------------------------------------------------
def features(documents: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """What the time of a step depends on, (n, 4).

    The columns count launches, adapters, positions, and pairs of positions in attention.
    """
    documents = documents.astype(float)
    windows = windows.astype(float)
    positions = documents * windows
    return np.stack([np.ones_like(documents), documents, positions, positions * windows], 1)


def fit(steps: Steps) -> np.ndarray:
    """Costs (4,) of the `features`, in seconds, from the steps that learn.

    They are not negative and have the least relative error: as long as one is negative, the most
    negative one is left out.
    """
    learns = steps.learns
    seconds = steps.seconds[learns, None]
    x = features(steps.documents[learns], steps.windows[learns]) / seconds
    used = [0, 1, 2, 3]
    while True:
        costs = np.zeros(4)
        costs[used] = np.linalg.lstsq(x[:, used], np.ones(len(x)), rcond=None)[0]
        if (costs >= 0).all():
            return costs
        used.remove(int(costs.argmin()))


def predicted_batches(
    adaptation: Timed, costs: np.ndarray, lengths: np.ndarray, world_size: int
) -> np.ndarray:
    """Predicted seconds of each batch of an evaluation on so many ranks, in order.

    lengths: the targets of the documents.
    """
    cfg = adaptation.cfg
    docs = documents_of_lengths(lengths)
    buckets = np.array(sorted(adaptation.buckets))
    seconds = []
    for batch in adaptation.batches(docs, np.arange(len(lengths)), cfg, world_size):
        starts, ends = np.array(tg.chunk_grid(cfg, int(lengths[batch].max()))).T
        live = adaptation.num_live_at(starts, lengths[batch])
        windows = np.minimum(ends, cfg.ttt_eval_seq_len)
        if len(buckets):
            windows = buckets[np.searchsorted(buckets, windows)]
        rows = np.array([adaptation.whole_granules(count) for count in live])
        of_steps = features(rows, windows) @ costs
        seconds.append(float(of_steps.sum()))
    return np.array(seconds)


def makespan(seconds: Iterable[float], world_size: int) -> float:
    """When the last batch is done, if each goes to the rank that is free first."""
    free_at = [0.0] * world_size
    for of_batch in seconds:
        heapq.heappush(free_at, heapq.heappop(free_at) + of_batch)
    return max(free_at)


class Prediction(NamedTuple):
    """Seconds for 50,000 FineWeb documents; None where no GPU was measured."""

    on_8_h100: float | None
    on_1_h200: float | None


def predict(adaptation: Timed, steps: Steps, device: torch.device) -> Prediction:
    """Predicts the time of a full evaluation from measured steps, and prints the model."""
    costs = fit(steps)
    modelled = features(steps.documents, steps.windows) @ costs
    errors = np.abs(modelled / steps.seconds - 1)
    lengths = fineweb_lengths(NUM_FINEWEB)
    on_one = predicted_batches(adaptation, costs, lengths, 1)
    on_eight = predicted_batches(adaptation, costs, lengths, 8)
    factors = [factor for gpu, factor in SLOWER.items() if gpu in device_name(device)]

    launch_s, document_s, position_s, pair_s = costs
    print(
        f"a step: {1e3 * launch_s:.2f} ms + {1e3 * document_s:.3f} per document + "
        f"{1e6 * position_s:.3f} us per position + {1e9 * pair_s:.3f} ns per pair; "
        f"median error {100 * np.median(errors[steps.learns]):.1f} %"
    )
    missing = "" if factors else "; H100 and H200: not measured"
    print(
        f"50,000 FineWeb documents with these windows at this rate: {on_one.sum():.0f} s "
        f"on one such device, on eight {makespan(on_eight, 8):.0f} s{missing}"
    )
    if not factors:
        return Prediction(None, None)
    here = factors[0]
    h100_seconds = on_eight * SLOWER["H100"] / here
    return Prediction(makespan(h100_seconds, 8), on_one.sum() / here)


# --- The run --------------------------------------------------------------------------------------
def print_steps(name: str, steps: Steps, text: Text, runs: int) -> None:
    """Prints a table of the steps of `runs` evaluations, by length of the window."""
    total_s = steps.seconds.sum()
    scored = int(text.docs.counts.sum())
    processed = int(steps.positions.sum()) // runs
    print(
        f"\n{name}: {processed} positions processed, "
        f"{scored} targets scored ({processed / scored:.1f} each), "
        f"{scored * runs / total_s:.0f} targets/s, {processed * runs / total_s:.0f} positions/s"
    )
    print(
        f"{'window':>8}{'steps':>8}{'documents':>11}{'ms/step':>10}{'us/position':>13}"
        f"{'% of time':>11}"
    )
    windows = np.round(steps.windows).astype(int)
    for length in np.unique(windows):
        chosen = windows == length
        seconds = steps.seconds[chosen]
        us_per_position = 1e6 * seconds.sum() / steps.positions[chosen].sum()
        percent = 100 * seconds.sum() / total_s
        print(
            f"{length:>8}{chosen.sum() // runs:>8}{steps.documents[chosen].mean():>11.1f}"
            f"{1e3 * np.median(seconds):>10.1f}{us_per_position:>13.2f}{percent:>11.1f}"
        )


def num_compiled_graphs() -> int:
    """Graphs that the compiler has made so far in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def load_network(cfg: tg.Config, origin: dict[str, str]) -> Network:
    """The network of EVAL_ONLY_PATH or, without it, one of random weights. Raises UsageError."""
    if not cfg.eval_only_path:
        return Network(cfg, random_weights(cfg), cfg.num_loops > 0)
    cfg, saved = tg.load_model_file(cfg, origin)
    if "weights" in saved:
        return Network(cfg, saved["weights"], saved["looped"])
    model = tg.GPT(cfg)
    tg.load_artifact(model, saved["arrays"])
    return Network(cfg, model.state_dict(), saved["looped"])


def warm_up_text(cfg: tg.Config, text: Text) -> Text:
    """Random documents for a first evaluation, which is not timed.

    To compile, they are as in Run.warm_up_evaluation, and at least as many as the rows for which
    tiles are chosen. Otherwise one short document is enough.
    """
    length = cfg.ttt_chunk_size + 1
    count = 1
    if cfg.compile:
        length = cfg.ttt_eval_seq_len + cfg.ttt_chunk_size
        num_tokens = max(2 * cfg.ttt_chunk_tokens, cfg.val_row_shape.tokens)
        count = max(math.ceil(num_tokens / length), cfg.ttt_batch_size)
    ids = np.random.default_rng(0).integers(text.bos_id + 1, cfg.vocab_size, (count, length))
    ids[:, 0] = text.bos_id
    return join_documents(list(ids), text.table, text.bos_id)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, help="the public script")
    parser.add_argument("--docs", type=int, help="documents drawn at random; default 8 on a CPU")
    parser.add_argument(
        "--batches", type=int, default=4, help="of the published way, without --docs; default 4"
    )
    parser.add_argument(
        "--longest", type=int, help="targets of a document; default 2 windows on CUDA, 4 on a CPU"
    )
    parser.add_argument(
        "--check", type=int, default=16, help="documents compared in fp32; default 16"
    )
    parser.add_argument("--rounds", type=int, default=1, help="each runs every way twice")
    return parser.parse_args(argv)


class Setting(NamedTuple):
    """What a run measures with."""

    network: Network
    text: Text
    device: torch.device
    backend: str  # of attention
    reference: Reference | None


def prepare(args: argparse.Namespace) -> Setting:
    """Loads and checks everything, and prints what figures depend on. Raises UsageError."""
    has_cuda = torch.cuda.is_available()
    cfg, origin = tg.Config.from_env(os.environ, has_cuda)
    device = tg.Ranks({}).device
    cfg, _ = tg.resolve_dtype(cfg, device)
    network = load_network(cfg, origin)
    cfg = network.cfg
    num_docs = args.docs
    if num_docs is None:
        num_docs = 0 if has_cuda else 8
    longest = args.longest or cfg.ttt_eval_seq_len * (2 if has_cuda else 4)
    text, source = load_text(cfg, num_docs, args.batches, longest)
    backend, lines = tg.choose_attention(cfg.attention_backend, device, cfg.dtype)
    reference = None
    if args.reference:
        reference = Reference(args.reference, cfg, device, backend)
    tg.configure_torch(cfg)
    print(
        f"device:{device_name(device)} torch:{torch.__version__} "
        f"dtype:{cfg.compute_dtype} compile:{cfg.compile}"
    )
    print(*lines, sep="\n")
    print(
        f"preset:{cfg.preset} chunk:{cfg.ttt_chunk_size} window:{cfg.ttt_eval_seq_len} "
        f"batch:{cfg.ttt_batch_size} rank:{cfg.ttt_lora_rank} "
        f"weights:{cfg.eval_only_path or 'random'}"
    )
    print(f"{describe(text)} ({source})")
    return Setting(network, text, device, backend, reference)


class Contest:
    """All ways to evaluate the same text, their scores, and how often ours compiled."""

    def __init__(self, setting: Setting):
        """Builds the ways, and warms them up."""
        network, self.text, device, backend, reference = setting
        self.ours = Ours(network, backend, device)
        self.published = Ours(network, backend, device, Published)
        self.ways: dict[str, Ours | Theirs] = {
            "ours": self.ours,
            "published way": self.published,
        }
        if reference:
            self.ways["reference"] = Theirs(reference, network)
        warm = warm_up_text(network.cfg, self.text)
        self.ours.score(warm)
        self.num_compiled = num_compiled_graphs()
        for name, way in self.ways.items():
            if name != "ours":
                way.score(warm)
        self.num_recompiled = 0
        self.scores: dict[str, Score] = {}

    def evaluate(self, name: str) -> Iterator[None]:
        """Evaluates in one way, and yields after it."""
        before = num_compiled_graphs()
        self.scores[name] = self.ways[name].score(self.text)
        if name == "ours":
            self.num_recompiled += num_compiled_graphs() - before
        yield

    def print_results(self, seconds: dict[str, np.ndarray], runs: int) -> None:
        """Prints steps, times and scores of `runs` evaluations in each way."""
        print_steps("ours", self.ours.steps(runs), self.text, runs)
        print_steps("published way", self.published.steps(runs), self.text, runs)
        print_times("evaluation", seconds)
        scores = [f"{name} {s.val_loss:.6f} {s.val_bpb:.6f}" for name, s in self.scores.items()]
        print(f"val_loss and val_bpb: {', '.join(scores)}")
        print(
            f"graphs compiled in warm-up: {self.num_compiled}, "
            f"in our evaluations after it: {self.num_recompiled}"
        )


def main(argv: list[str]) -> int:
    """Prints the tables. Exit status 2 if environment, model file or script cannot be used."""
    args = parse_arguments(argv)
    try:
        setting = prepare(args)
    except tg.UsageError as error:
        print(f"bench/evaluation.py: {error}", file=sys.stderr)
        return 2
    network, text, device = setting.network, setting.text, setting.device
    short = short_documents(text, network.cfg, args.check)
    difference = check_maths(network, device, short, args.reference)

    contest = Contest(setting)
    jobs = {name: partial(contest.evaluate, name) for name in contest.ways}
    seconds = take_turns(jobs, args.rounds, 0, device)
    runs = 2 * args.rounds
    contest.print_results(seconds, runs)
    prediction = predict(contest.ours.adaptation, contest.ours.steps(runs), device)

    reference_ratio = None
    if setting.reference:
        reference_ratio = paired_ratio(seconds["ours"], seconds["reference"])
    figures: dict[str, Any] = {
        "device": device_name(device),
        "ratio_published_way": paired_ratio(seconds["ours"], seconds["published way"]),
        "ratio_reference": reference_ratio,
        "max_nats_diff": difference,
        "recompilations": contest.num_recompiled,
        "seconds_8xh100": prediction.on_8_h100,
        "seconds_1xh200": prediction.on_1_h200,
    }
    for name, value in figures.items():
        if isinstance(value, float):
            figures[name] = float(f"{value:.4g}")
    print("bench " + json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
