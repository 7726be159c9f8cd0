"""Speed of the evaluation with test-time training: ours, the published way of ours, and a public script's own function.

    python bench/evaluation.py                     # ours against the published way: whole windows, all logits
    python bench/evaluation.py --reference FILE    # also a script of the family of PR #1530 (see bench/reference.py)

Knobs are environment variables, as for train_gpt.py; EVAL_ONLY_PATH names a checkpoint or artifact to measure with,
without it the weights are random. Documents are the data set's if it is there, else random ones as long as FineWeb's.
Either --docs of them, drawn at random, are a validation set of their own (the default on a CPU, 8); or --batches of the
batches that the published way makes of them all are, at equal shares of its work (the default on CUDA, 4). Documents
are cut at --longest targets (default: 4 windows on a CPU, 2 on CUDA). Ways take turns (A B C C B A) in one process; a
ratio is ours / the other. The largest difference of a target's nats, ours and the published way, is measured in fp32.
Seconds for 50,000 FineWeb documents come from measured steps on a GPU alone. The last line is `bench ` and a JSON
object; null is what was not measured."""

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

import numpy as np
import torch
from reference import Reference
from step import Stopwatch, device_name, paired_ratio, print_times, random_weights, take_turns
from torch import Tensor

import train_gpt as tg

# Targets of a document of the FineWeb validation set by quantile, read off 277 batch ranges in the logs of PR #1530;
# interpolated in logarithms. Published work on them, chunk 32: 1,124 M positions in 21,130 steps.
FINEWEB = [
    (0, 44),
    (0.01, 86),
    (0.05, 118),
    (0.1, 148),
    (0.2, 209),
    (0.3, 278),
    (0.4, 364),
    (0.5, 474),
    (0.6, 618),
    (0.7, 807),
    (0.8, 1084),
    (0.9, 1595),
    (0.92, 1811),
    (0.9362, 2050),
    (0.955, 2490),
    (0.97, 3172),
    (0.978, 3720),
    (0.984, 4436),
    (0.988, 5150),
    (0.9921, 6354),
    (0.9946, 7960),
    (0.9958, 8996),
    (0.9984, 14509),
    (0.9996, 25987),
    (1, 30000),
]
SLOWER = {
    "H200": 1.0,
    "H100": 1.19,
}  # time of this work against an H200 (modelled: bandwidth 3.35 against 4.8 TB/s)


class Text(
    NamedTuple
):  # what is evaluated: whole documents end to end, and the bytes of every token
    docs: tg.Documents
    table: tg.ByteTable
    bos_id: int


# --- Documents ---
def fineweb_lengths(count: int) -> np.ndarray:  # targets of `count` documents, rising
    quantiles, lengths = np.array(FINEWEB).T
    return (
        np.exp(np.interp((np.arange(count) + 0.5) / count, quantiles, np.log(lengths)))
        .round()
        .astype(np.int64)
    )


def joined(
    pieces: list[np.ndarray], table: tg.ByteTable, bos_id: int
) -> Text:  # a document's tokens begin with BOS
    counts = np.array([len(piece) for piece in pieces])
    counts[-1] -= 1  # the last has no next one whose BOS it could predict
    starts = np.cumsum(counts) - counts
    return Text(
        tg.Documents(np.concatenate(pieces).astype(np.int64), starts, counts), table, bos_id
    )


def cut(
    text: Text, counts: np.ndarray
) -> Text:  # the first tokens of its documents, as many as given
    spans = zip(text.docs.starts, counts, strict=True)
    return joined(
        [text.docs.tokens[start : start + n] for start, n in spans], text.table, text.bos_id
    )


def describe(text: Text) -> str:
    return f"{len(text.docs.counts)} documents of {text.docs.counts.min()}..{text.docs.counts.max()} targets"


def representative(lengths: np.ndarray, cfg: tg.Config, batches: int) -> np.ndarray:
    """Documents of the batches in the middle of `batches` equal shares of the positions the published way processes."""
    docs = tg.Documents(np.arange(0), np.arange(len(lengths)), lengths)
    found = fixed_batches(docs, np.arange(len(lengths)), cfg)
    work = np.cumsum([positions(docs, batch, cfg) for batch in found])
    middle = (np.arange(batches) + 0.5) / batches * work[-1]
    return np.concatenate([found[i] for i in sorted(set(np.searchsorted(work, middle)))])


def positions(
    docs: tg.Documents, batch: np.ndarray, cfg: tg.Config
) -> int:  # of a batch, whole windows, all rows
    grid = tg.chunk_grid(cfg, int(docs.counts[batch].max()))
    return len(batch) * sum(min(end, cfg.ttt_eval_seq_len) for _, end in grid)


def short_documents(
    text: Text, cfg: tg.Config, count: int
) -> Text:  # beginnings, of 2 tokens to 1.5 windows
    rng, longest = np.random.default_rng(1), cfg.ttt_eval_seq_len * 3 // 2
    chosen = np.sort(rng.integers(0, len(text.docs.counts), count))
    sizes = np.minimum(rng.integers(2, longest, count), text.docs.counts[chosen])
    docs = text.docs._replace(starts=text.docs.starts[chosen], counts=text.docs.counts[chosen])
    return cut(text._replace(docs=docs), sizes)


def load_text(cfg: tg.Config, count: int, batches: int, longest: int) -> tuple[Text, str]:
    """The documents to measure with (`count` drawn, or of `batches`), and where they are from."""
    rng, random = np.random.default_rng(0), not cfg.dataset_dir.is_dir()
    if random:
        lengths, bos_id, source = fineweb_lengths(50_000), 1, "random tokens, as long as FineWeb's"
        table = tg.ByteTable(
            np.ones(cfg.vocab_size, np.int64), *np.zeros((2, cfg.vocab_size), bool)
        )
    else:
        tokenizer = tg.Tokenizer.load(cfg)
        stream = tg.TokenStream(cfg.dataset_dir, "val")
        tg.check_shards(cfg, tokenizer, tg.Ranks({}), {"val": stream})
        all_docs = tg.Documents.load(stream, tokenizer.bos_id, cfg)
        lengths, bos_id, source = (
            all_docs.counts,
            tokenizer.bos_id,
            f"{cfg.dataset_dir.name}, validation",
        )
        table = tg.ByteTable.from_sentencepiece(tokenizer.model)
    drawn = np.sort(np.random.default_rng(cfg.seed).permutation(len(lengths))[:count])
    pieces = []
    for d in drawn if count else representative(lengths, cfg, batches):
        count, start = min(int(lengths[d]), longest), 0 if random else all_docs.starts[d]
        ids = (
            rng.integers(bos_id + 1, cfg.vocab_size, count)
            if random
            else all_docs.tokens[start : start + count]
        )
        pieces.append(np.append(bos_id, ids[1:]))
    return joined(pieces, table, bos_id), source


# --- What is timed ---
def fixed_batches(
    docs: tg.Documents, chosen: np.ndarray, cfg: tg.Config, world_size: int = 1
) -> list[np.ndarray]:
    """As tg.plan_batches in the published way: TTT_BATCH_SIZE documents each, longest first."""
    chosen = chosen[docs.counts[chosen] > 0]
    chosen = chosen[np.argsort(-docs.counts[chosen], kind="stable")]
    starts = range(0, len(chosen), cfg.ttt_batch_size)
    return [chosen[start : start + cfg.ttt_batch_size] for start in starts]


class Timed(tg.Adaptation):
    """Marks the clock around every step and keeps what the step processed, as long as `watch` is set."""

    def __init__(self, model: tg.GPT, forward: Callable, plan: tuple, device: torch.device):
        super().__init__(model, self.noting, plan, device)
        self.inner, self.watch, self.steps = forward, None, []

    def noting(self, batch: tg.Batch, plan: tuple, lora: tg.LoRA, select: Tensor | None) -> Tensor:
        self.steps[-1] += [len(lora.down), batch.inputs.numel(), 0]
        return self.inner(batch, plan, lora=lora, select=select)

    def run_chunk(self, ledger: tg.Ledger, start: int, end: int) -> None:
        self.steps.append(np.array([0, 0, (self.documents.lengths > end).any()]))
        self.watch.mark()
        super().run_chunk(ledger, start, end)
        self.watch.mark()


class Published(Timed):
    """The published way: whole windows, all logits, and fixed batches that no document leaves before the longest."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.buckets, self.separates_learners = [], False

    def begin(self, docs: tg.Documents, batch: np.ndarray) -> None:
        super().begin(docs, batch)
        rows = len(self.documents.lengths)
        self.documents.num_longer = lambda index: rows

    def noting(self, batch: tg.Batch, plan: tuple, lora: tg.LoRA, select: Tensor) -> Tensor:
        return super().noting(batch, plan, lora, None)[select]


class Ours:  # the evaluation as train_gpt.Run.adapt calls it
    def __init__(
        self,
        cfg: tg.Config,
        weights: Mapping[str, Tensor],
        looped: bool,
        backend: str,
        device: torch.device,
        way: type[Timed] = Timed,
    ):
        self.cfg, self.device, self.plan = cfg, device, cfg.plans[looped]
        self.model = tg.GPT(cfg, backend).to(device)
        self.model.load_state_dict(weights)
        self.run = tg.compile_any_size(self.model) if cfg.compile else self.model
        self.state, self.measured = way(self.model, self.run, self.plan, device), []

    def evaluate(self, text: Text) -> tg.Ledger:
        ranks, log = tg.Ranks({}), tg.Log(Path(os.devnull), False)
        scorer = tg.Scorer(
            self.run, self.plan, tg.Ledger(text.docs, text.table, self.device), self.cfg, ranks, log
        )
        self.state.watch, self.state.steps = Stopwatch(self.device), []
        plan = fixed_batches if isinstance(self.state, Published) else tg.plan_batches
        with mock.patch.object(tg, "plan_batches", plan):
            ledger = tg.evaluate_ttt(
                scorer, self.state, self.model, self.run, tg.Deadline(math.inf)
            )
        self.measured.append((np.array(self.state.steps), self.state.watch))
        return ledger

    def steps(self, runs: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the last `runs` evaluations: (n, 3) documents, positions and whether any learnt; seconds (n,)."""
        sizes, watches = zip(*self.measured[-runs:], strict=True)
        return np.concatenate(sizes), np.concatenate([watch.read()[::2] for watch in watches])


class Theirs:  # the script's own function, whole
    def __init__(self, reference: Reference, weights: Mapping[str, Tensor], looped: bool):
        self.reference, self.model = reference, reference.build(weights, looped)

    def evaluate(self, text: Text) -> tuple[float, float]:  # its val_loss and val_bpb
        return self.reference.evaluate_ttt(self.model, text.docs.tokens, text.table, text.bos_id)


# --- Same maths ---
def largest_differences(
    text: Text, cfg: tg.Config, found: Tensor, wanted: Tensor
) -> tuple[float, float]:
    """Of nats by place: in the first chunk of each document, and after an update."""
    differences, place = (found - wanted).abs()[:-1], text.docs.target_indices()
    offset = place - np.repeat(text.docs.starts, text.docs.counts)
    first = offset < tg.chunk_grid(cfg, 1)[0][1]
    return tuple(
        float(differences[torch.from_numpy(place[part]).to(differences.device)].max())
        if part.any()
        else 0.0
        for part in (first, ~first)
    )


@contextlib.contextmanager
def equal_starts(reference: Reference) -> Iterator[None]:
    """Both systems draw A at random, each in its own order; meanwhile every adapter of both starts from the same A."""
    theirs = reference.module.BatchedLinearLoRA

    def pattern(shape: Iterable[int]) -> Tensor:
        *_, rank, width = shape
        return (
            torch.rand(rank, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
        ) * width**-0.5

    class Equal(theirs):
        def __init__(self, *args: int):
            super().__init__(*args)
            self.A.data.copy_(pattern(self.A.shape))

        @torch.no_grad()
        def reset(self) -> None:
            self.A.copy_(pattern(self.A.shape))
            self.B.zero_()

    @torch.no_grad()
    def reset(lora: tg.LoRA, seed: int, keys: Iterable[int]) -> None:
        lora.down.copy_(pattern(lora.down.shape))
        lora.up.zero_()

    patch = mock.patch.object
    with patch(reference.module, "BatchedLinearLoRA", Equal), patch(tg.LoRA, "reset", reset):
        yield


def check_maths(
    cfg: tg.Config,
    weights: Mapping[str, Tensor],
    looped: bool,
    device: torch.device,
    text: Text,
    path: Path | None,
) -> float:
    """Largest difference in nats, fp32, of ours and the published way; AssertionError if that, the bpb, or the public
    script's loss from equal adapters (documents of one window: the script cuts the last window elsewhere) is off."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    exact = dataclasses.replace(
        cfg, compute_dtype="fp32", compile=False
    )  # which only SDPA's attention takes
    ways = {way: Ours(exact, weights, looped, "sdpa", device, way) for way in (Timed, Published)}
    found, wanted = (ways[way].evaluate(text) for way in (Timed, Published))
    before, after = largest_differences(text, cfg, found.nats, wanted.nats)
    bpb = abs(found.result()["val_bpb"] - wanted.result()["val_bpb"])
    print(
        f"fp32, {describe(text)}, ours against the published way: {before:.1e} nats before an update, "
        f"{after:.1e} after, bpb {bpb:.1e}"
    )
    assert before < 1e-4 and after < 1e-3 and bpb < 1e-5, "the two ways do not compute the same"
    if path:
        reference = Reference(path, exact, device, "sdpa")
        few = cut(text, np.minimum(text.docs.counts, cfg.ttt_eval_seq_len))
        with equal_starts(reference):
            loss, _ = Theirs(reference, weights, looped).evaluate(few)
            mine = ways[Timed].evaluate(few).result()["val_loss"]
        print(
            f"fp32, {describe(few)}, equal adapters: loss {mine:.7f}, the public script's {loss:.7f}"
        )
        assert abs(mine - loss) < 1e-5, "ours and the public script do not compute the same"
    torch.set_float32_matmul_precision(precision)
    return max(before, after)


# --- From steps to 50,000 documents ---
def features(
    rows: np.ndarray, window: np.ndarray
) -> np.ndarray:  # launches; adapters; products; attention
    rows, window = rows.astype(float), window.astype(float)
    return np.stack([np.ones_like(rows), rows, rows * window, rows * window**2], 1)


def fit(sizes: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Non-negative costs of `features` with the least relative error over the steps that learnt."""
    learnt = sizes[:, 2] > 0
    rows, used = sizes[learnt, 0], [0, 1, 2, 3]
    x = features(rows, sizes[learnt, 1] / rows) / seconds[learnt, None]
    while True:
        cost = np.zeros(4)
        cost[used] = np.linalg.lstsq(x[:, used], np.ones(len(x)), rcond=None)[0]
        if (cost >= 0).all():
            return cost
        used.remove(int(cost.argmin()))


def predicted_batches(
    cfg: tg.Config, state: tg.Adaptation, cost: np.ndarray, lengths: np.ndarray, ranks: int
) -> np.ndarray:
    """Seconds of each batch that the evaluation of documents with these lengths makes on so many ranks, in order."""
    docs, seconds = tg.Documents(np.arange(0), np.arange(len(lengths)), lengths), []
    published = isinstance(state, Published)
    plan = fixed_batches if published else tg.plan_batches
    for batch in plan(docs, np.arange(len(lengths)), cfg, ranks):
        starts, ends = np.array(tg.chunk_grid(cfg, int(lengths[batch].max()))).T
        live = len(batch) - np.searchsorted(np.sort(lengths[batch]), starts, side="right")
        if published:
            live = np.full_like(live, len(batch))
        rows = -(-live // state.granule) * state.granule
        windows, buckets = np.minimum(ends, cfg.ttt_eval_seq_len), np.array(sorted(state.buckets))
        if len(buckets):
            windows = buckets[np.searchsorted(buckets, windows)]
        seconds.append(float((features(rows, windows) @ cost).sum()))
    return np.array(seconds)


def makespan(
    seconds: Iterable[float], ranks: int
) -> float:  # each batch goes to the rank that is free first
    free = [0.0] * ranks
    for s in seconds:
        heapq.heappush(free, heapq.heappop(free) + s)
    return max(free)


def predict(
    cfg: tg.Config,
    state: tg.Adaptation,
    sizes: np.ndarray,
    seconds: np.ndarray,
    device: torch.device,
) -> tuple[float | None, float | None]:
    """Seconds for 50,000 FineWeb documents on 8 H100 and 1 H200; None where no GPU has been measured."""
    cost = fit(sizes, seconds)
    modelled = features(sizes[:, 0], sizes[:, 1] / sizes[:, 0]) @ cost
    error = np.median(np.abs(modelled / seconds - 1)[sizes[:, 2] > 0])
    batches = {n: predicted_batches(cfg, state, cost, fineweb_lengths(50_000), n) for n in (1, 8)}
    here = next((factor for gpu, factor in SLOWER.items() if gpu in device_name(device)), None)
    print(
        f"a step: {1e3 * cost[0]:.2f} ms + {1e3 * cost[1]:.3f} per document + {1e6 * cost[2]:.3f} us per position + "
        f"{1e9 * cost[3]:.3f} ns per pair; median error {100 * error:.1f} %"
    )
    print(
        f"50,000 FineWeb documents with these windows at this rate: {batches[1].sum():.0f} s on one such device, on "
        f"eight {makespan(batches[8], 8):.0f} s" + ("" if here else "; H100 and H200: not measured")
    )
    if not here:
        return None, None
    return makespan(batches[8] * SLOWER["H100"] / here, 8), batches[1].sum() / here


# --- The run ---
def print_steps(
    name: str, sizes: np.ndarray, seconds: np.ndarray, text: Text, runs: int
) -> None:  # by window length
    window, total = np.round(sizes[:, 1] / sizes[:, 0]).astype(int), seconds.sum()
    scored, processed = int(text.docs.counts.sum()), int(sizes[:, 1].sum()) // runs
    print(
        f"\n{name}: {processed} positions processed, {scored} targets scored ({processed / scored:.1f} each), "
        f"{scored * runs / total:.0f} targets/s, {processed * runs / total:.0f} positions/s"
    )
    print(
        f"{'window':>8}{'steps':>8}{'documents':>11}{'ms/step':>10}{'us/position':>13}{'% of time':>11}"
    )
    for length in np.unique(window):
        of = window == length
        each, spent = 1e6 * seconds[of].sum() / sizes[of, 1].sum(), 100 * seconds[of].sum() / total
        print(
            f"{length:>8}{of.sum() // runs:>8}{sizes[of, 0].mean():>11.1f}{1e3 * np.median(seconds[of]):>10.1f}"
            f"{each:>13.2f}{spent:>11.1f}"
        )


def graphs() -> int:  # that the compiler has made so far in this process
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def load_weights(
    cfg: tg.Config, origin: dict[str, str]
) -> tuple[tg.Config, dict[str, Tensor], bool]:
    """The config, weights and whether loops run, of EVAL_ONLY_PATH or, without it, of random weights."""
    if not cfg.eval_only_path:
        return cfg, random_weights(cfg), cfg.num_loops > 0
    cfg, saved = tg.load_model_file(cfg, origin)
    if "weights" in saved:
        return cfg, saved["weights"], saved["looped"]
    model = tg.GPT(cfg)
    tg.load_artifact(model, saved["arrays"])
    return cfg, model.state_dict(), saved["looped"]


def warm_up_text(
    cfg: tg.Config, text: Text, compiled: bool
) -> Text:  # as Run.warm_up, to compile; else little
    length = cfg.ttt_eval_seq_len + cfg.ttt_chunk_size if compiled else cfg.ttt_chunk_size + 1
    count = -(-max(2 * cfg.ttt_chunk_tokens, cfg.val_row_shape[0]) // length) if compiled else 1
    count = max(count, cfg.ttt_batch_size * compiled)  # as many rows as tiles are chosen for
    ids = np.random.default_rng(0).integers(text.bos_id + 1, cfg.vocab_size, (count, length))
    ids[:, 0] = text.bos_id
    return joined(list(ids), text.table, text.bos_id)


def main(argv: list[str]) -> int:
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
    parser.add_argument("--check", type=int, help="documents compared in fp32; default 16")
    parser.add_argument("--rounds", type=int, default=1, help="each runs every way twice")
    args = parser.parse_args(argv)
    try:
        cfg, origin = tg.Config.from_env(os.environ, torch.cuda.is_available())
        cfg, weights, looped = load_weights(cfg, origin)
        device, cuda = tg.Ranks({}).device, torch.cuda.is_available()
        longest = args.longest or cfg.ttt_eval_seq_len * (2 if cuda else 4)
        text, source = load_text(
            cfg, (0 if cuda else 8) if args.docs is None else args.docs, args.batches, longest
        )
        backend, lines = tg.choose_attention(cfg.attention_backend, device, cfg.dtype)
        reference = Reference(args.reference, cfg, device, backend) if args.reference else None
    except tg.UsageError as error:
        print(f"bench/evaluation.py: {error}", file=sys.stderr)
        return 2
    tg.configure_torch(cfg)
    print(
        f"device:{device_name(device)} torch:{torch.__version__} dtype:{cfg.compute_dtype} compile:{cfg.compile}",
        *lines,
        sep="\n",
    )
    print(
        f"preset:{cfg.preset} chunk:{cfg.ttt_chunk_size} window:{cfg.ttt_eval_seq_len} batch:{cfg.ttt_batch_size} "
        f"rank:{cfg.ttt_lora_rank} weights:{cfg.eval_only_path or 'random'}\n{describe(text)} "
        f"({source})"
    )
    short = short_documents(text, cfg, args.check or 16)
    worst = check_maths(cfg, weights, looped, device, short, args.reference)
    ways: dict[str, Ours | Theirs] = {
        "ours": Ours(cfg, weights, looped, backend, device),
        "published way": Ours(cfg, weights, looped, backend, device, Published),
    }
    if reference:
        ways["reference"] = Theirs(reference, weights, looped)
    warm, results = warm_up_text(cfg, text, cfg.compile), {}
    for name, way in ways.items():
        way.evaluate(warm)
        if name == "ours":
            compiled, recompilations = graphs(), 0

    def job(name: str) -> Iterable[None]:
        nonlocal recompilations
        before = graphs()
        result = ways[name].evaluate(text)
        recompilations += (graphs() - before) * (name == "ours")
        results[name] = result if isinstance(result, tuple) else tuple(result.result().values())[:2]
        yield

    seconds = take_turns({name: partial(job, name) for name in ways}, args.rounds, 0, device)
    runs = 2 * args.rounds
    for name, way in ways.items():
        if isinstance(way, Ours):
            print_steps(name, *way.steps(runs), text, runs)
    print_times("evaluation", seconds, [""])
    print(
        "val_loss and val_bpb: "
        + ", ".join(f"{n} {r[0]:.6f} {r[1]:.6f}" for n, r in results.items())
    )
    print(f"graphs compiled in warm-up: {compiled}, in our evaluations after it: {recompilations}")
    predicted = predict(cfg, ways["ours"].state, *ways["ours"].steps(runs), device)
    ratios = [
        paired_ratio(seconds["ours"], seconds[n]) if n in ways else None for n in list(ways)[1:]
    ] + [None]
    found = {
        "device": device_name(device),
        "ratio_published_way": ratios[0],
        "ratio_reference": ratios[1],
        "max_nats_diff": worst,
        "recompilations": recompilations,
        "seconds_8xh100": predicted[0],
        "seconds_1xh200": predicted[1],
    }
    print(
        "bench "
        + json.dumps(
            {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
