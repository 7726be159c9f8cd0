"""The tests of the audit, T0 to T23, and the properties of an evaluation that they show.

A test is a function under `whole_run` or `each_evaluation`, which carry its number, its title and
the properties. The first paragraph of its docstring is what tools/audit.py prints about it. All
tests share a `Case`: the script, the artifact, a sample of validation documents, and whatever one
test has computed for another.

The conditions are those of issue #1017 of the challenge. Nothing is judged by reading code: every
test looks at scores, states or files while the script's own evaluations run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import canonical
import caseops
import claims
import commitment
import container as canonical_container
import numpy as np
import overlap
import runlog
import sidecar
import torch
from case import Case, NotRun
from digests import sha256
from fresh_process import MachineError
from held import DataError, read_shards
from probe import BlindWatch, CannotObserve, Watch, join_positions, largest_difference, worst_of

CLOSE_NATS = 1e-3  # other shapes in fp32, and adaptation that enlarges their rounding
BLIND_NATS = 1e-5  # the same forward in fp32, another sum over the vocabulary; on a CPU
MAX_LOG_E = math.log(1e6)  # honest scorers get there with probability 1e-6
MAX_SUBMISSION_BYTES = 16_000_000
MAX_BUDGET_SECONDS = 600
EVIDENCE_LENGTH = 300  # characters of an error
HINTED_PLACES = 8  # with a hint, that T2 and T21 look at
DEEP_PLACES = 4  # of every whole document that T2 looks at
MAX_TRAIN_TOKENS = 400_000_000  # more are a job for the doctor, on all cores

# The properties in the order in which they are reported.
PROPERTIES = (
    "repeatable",
    "causal",
    "normalised",
    "score_first",
    "single_pass",
    "document_independent",
    "lossless",
    "self_contained",
    "clean_data",
    "within_budget",
    "provenance",
)


# === Findings =====================================================================================
@dataclasses.dataclass(frozen=True)
class Finding:
    """What a test has found."""

    passed: bool | None  # None: not run, or not claimed
    evidence: str
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    by_machine: bool = False  # not run, because the machine has failed it


class Measured(NamedTuple):
    """What a test has measured of one evaluation; it passes if `value` is at most `allowed`."""

    value: float
    allowed: float
    evidence: str


class NotClaimed(Exception):
    """An evaluation does not claim a property; the message names the setting that says so."""


# === Registration =================================================================================
@dataclasses.dataclass(frozen=True)
class LegalityTest:
    """A test, as the command and its tables show it."""

    number: int
    title: str
    properties: tuple[str, ...]
    summary: str
    run: Callable[[Case], Finding]

    @property
    def name(self) -> str:
        """T and the number."""
        return f"T{self.number}"


TESTS: dict[str, LegalityTest] = {}


def register(
    number: int, title: str, properties: tuple[str, ...], run: Callable[[Case], Finding], doc: str
) -> None:
    """Enters a test; the first paragraph of `doc` is its summary."""
    unknown = set(properties) - set(PROPERTIES)
    assert not unknown, f"T{number}: no property is called {unknown}"
    summary = " ".join(doc.split("\n\n")[0].split())
    test = LegalityTest(number, title, properties, summary, run)
    assert test.name not in TESTS, f"{test.name} is registered twice"
    TESTS[test.name] = test


def whole_run(number: int, title: str, *properties: str) -> Callable:
    """Registers a function of a case that returns a Finding."""

    def decorate(function: Callable[[Case], Finding]) -> Callable[[Case], Finding]:
        register(number, title, properties, function, function.__doc__)
        return function

    return decorate


def each_evaluation(
    number: int, title: str, *properties: str, crossing_off: bool = False
) -> Callable:
    """Registers a function of a case and the name of an evaluation that returns what it Measured.

    `crossing_off`: the function switches off what documents use of earlier ones by declaration;
    the evidence says so.
    """

    def decorate(function: Callable[[Case, str], Measured]) -> Callable:
        def run(case: Case) -> Finding:
            finding = over_evaluations(case, function)
            text = ""
            if crossing_off and case.subject.learns_across_documents:
                text = "rates 0, because documents learn from earlier ones by declaration: "
            if crossing_off and case.subject.tilts:
                text += "no tilt, because hints come from earlier documents by declaration: "
            return dataclasses.replace(finding, evidence=text + finding.evidence)

        register(number, title, properties, run, function.__doc__)
        return function

    return decorate


def over_evaluations(case: Case, measure: Callable[[Case, str], Measured]) -> Finding:
    """Measures every evaluation of the run that claims the property."""
    measured: dict[str, Measured] = {}
    evidence = []
    not_claimed = []
    for name in case.subject.names:
        try:
            measured[name] = measure(case, name)
            evidence.append(f"{name} {measured[name].evidence}")
        except NotClaimed as setting:
            not_claimed.append(f"{name} not claimed: {setting}")
    passed = None
    if measured:
        passed = all(found.value <= found.allowed for found in measured.values())
    figures = {name: found.value for name, found in measured.items()}
    return Finding(passed, "; ".join(evidence + not_claimed), figures)


# === Running them =================================================================================
def run_tests(case: Case, names: list[str]) -> dict[str, Finding]:
    """The findings of these tests, in their order. Whatever an evaluation under test raises is a
    finding.
    """
    findings = {}
    for name in names:
        start = time.monotonic()
        try:
            finding = TESTS[name].run(case)
        except (NotRun, CannotObserve) as reason:
            finding = Finding(None, f"not run: {reason}")
        except DataError as error:
            finding = Finding(False, str(error))
        except MACHINE_ERRORS as error:
            finding = finding_of_machine(case, error)
        except Exception as error:
            finding = finding_of_error(case, error)
        passed = None if finding.passed is None else bool(finding.passed)
        figures = {**finding.figures, "seconds": round(time.monotonic() - start, 2)}
        findings[name] = dataclasses.replace(finding, passed=passed, figures=figures)
    return findings


# What says nothing about the script: no space, no memory, no time.
MACHINE_ERRORS = (
    OSError,
    MemoryError,
    MachineError,
    subprocess.TimeoutExpired,
    torch.OutOfMemoryError,
)
MACHINE_ERRNOS = (
    errno.ENOSPC,
    errno.ENOMEM,
    errno.EDQUOT,
    errno.EMFILE,
    errno.ENFILE,
    errno.EIO,
    errno.EROFS,
    errno.EAGAIN,
)


def finding_of_machine(case: Case, error: BaseException) -> Finding:
    """The finding where the machine has failed: not run. Another OSError is the script's own.

    A script that pretends gains nothing: the audit then ends as one that could not judge.
    """
    if isinstance(error, OSError) and error.errno not in MACHINE_ERRNOS:
        return finding_of_error(case, error)
    reason = " ".join(str(error).split())[:EVIDENCE_LENGTH]
    return Finding(None, f"not run: the machine: {type(error).__name__}: {reason}", by_machine=True)


def finding_of_error(case: Case, error: Exception) -> Finding:
    """The finding where an evaluation breaks off; the run's own refusals are noted."""
    kind = type(error).__name__
    text = f"{kind}: {error}"
    if kind in ("UsageError", "InvalidScore"):
        case.always_on.append(str(error))
        text = f"the run refuses: {error}"
    return Finding(False, " ".join(text.split())[:EVIDENCE_LENGTH])


# === The tests ====================================================================================
@whole_run(0, "control", "repeatable")
def control(case: Case) -> Finding:
    """The same stream twice gives the same scores."""
    subject = case.subject
    for name in subject.names:
        again = subject.nats(name, case.docs)
        case.floor[name] = largest_difference(case.base(name), again)
    worst = worst_of(*case.floor.values())
    counts = case.docs.counts
    text = f"{len(counts)} documents, {counts.sum()} targets twice: max {worst:.1e} nats apart"
    return Finding(worst <= CLOSE_NATS, text, dict(case.floor))


# --- The future -----------------------------------------------------------------------------------
@each_evaluation(1, "future", "causal")
def future(case: Case, name: str) -> Measured:
    """Changing the tokens after a position, or ending the document earlier, does not change the
    scores before it.

    The comparison is made in the order of the stream. Where only scores made later in time differ,
    the evidence says that the evaluation is causal in the order of scoring only.
    """
    cuts = middle_targets(case.docs)
    changed = [change_after(case, name, cut, seed) for seed, cut in enumerate(cuts)]
    worst = worst_of(*(change.before_in_stream for change in changed))
    worst_in_time = worst_of(*(change.scored_before for change in changed))
    worst_end = earlier_end(case, name, cuts[len(cuts) // 2])
    allowed = case.allowed(name)
    text = f"{worst:.1e} nats over {sum(cuts)} scores before changed tokens "
    text += f"(scoring order {worst_in_time:.1e}), "
    text += f"{worst_end:.1e} before an earlier end of the document"
    if worst_in_time <= allowed < worst:
        text += " (causal in the order of scoring only)"
    return Measured(worst_of(worst / allowed, worst_end / CLOSE_NATS), 1.0, text)


def middle_targets(docs: Any) -> list[int]:
    """Stream indices inside an early, a middle and a late document. Raises NotRun without any."""
    long = [number for number in range(len(docs.counts)) if docs.counts[number] > 8]
    if not long:
        raise NotRun("no document of the sample has more than 8 targets")
    # Share of the documents before it -> share of its targets before the cut.
    cuts: dict[int, int] = {}
    for share_of_documents, share_of_targets in ((0.1, 0.55), (0.5, 0.3), (0.9, 0.8)):
        number = long[int(share_of_documents * (len(long) - 1))]
        cuts[number] = int(docs.starts[number] + docs.counts[number] * share_of_targets)
    return list(cuts.values())


class Change(NamedTuple):
    """By how many nats scores differ after later tokens were changed."""

    before_in_stream: float  # scores of targets before the change
    scored_before: float  # scores made before any target after the change was scored


def change_after(case: Case, name: str, cut: int, seed: int) -> Change:
    """Changes all tokens after a stream index, except the beginnings of documents."""
    subject = case.subject
    base = case.base(name)
    tokens = case.docs.tokens.copy()
    is_later = (np.arange(len(tokens)) > cut) & (tokens != subject.bos)
    rng = np.random.default_rng([1, seed])
    tokens[is_later] = rng.choice(subject.words, int(is_later.sum()))
    watch = Watch(subject)
    nats = subject.nats(name, case.docs._replace(tokens=tokens), watch)
    scored_before = []
    for targets in watch.order:
        if (targets >= cut).any():
            break
        scored_before.append(targets)
    early = join_positions(scored_before)
    return Change(
        before_in_stream=largest_difference(nats[:cut], base[:cut]),
        scored_before=largest_difference(nats[early], base[early]),
    )


def earlier_end(case: Case, name: str, middle: int) -> float:
    """Nats by which earlier scores differ if a document ends at `middle`, or the longest one in its
    last window.
    """
    exact = case.fp32_subject
    docs = case.docs
    base = case.base(name) if exact is case.subject else exact.nats(name, docs)
    longest = int(docs.counts.argmax())
    window = exact.cfg.eval_seq_len
    last_window = docs.counts[longest] % window or window
    cut_off = max(2, last_window // 2)
    worst = 0.0
    for cut in (middle, int(docs.starts[longest] + docs.counts[longest] - cut_off)):
        tokens = docs.tokens.copy()
        tokens[cut] = exact.bos
        number = int(np.searchsorted(docs.starts, cut, side="right"))
        starts = np.insert(docs.starts, number, cut)
        counts = np.diff(starts, append=len(tokens) - 1)
        shorter = docs._replace(tokens=tokens, starts=starts, counts=counts)
        nats = exact.nats(name, shorter)
        worst = worst_of(worst, largest_difference(nats[: cut - 1], base[: cut - 1]))
    return worst


@each_evaluation(2, "target", "causal", "normalised")
def target(case: Case, name: str) -> Measured:
    """p(.) with the target and all after it withheld, computed outside the scorer, gives the same
    nats, in the sample and deep in whole documents. With the token tilt, hints are withheld
    targets', too, and p(.) is tilted here.
    """
    exact = case.fp32_subject
    docs = case.docs
    rng = np.random.default_rng(2)
    wanted = places_of(docs, 2, rng)
    if exact.tilts:
        hinted = np.flatnonzero(exact.hints(docs) >= 0)
        wanted |= set(rng.permutation(hinted)[:HINTED_PLACES].tolist())
    sample = blind_difference(case, name, docs, wanted)
    whole = case.whole_docs
    deep = blind_difference(case, name, whole, places_of(whole, DEEP_PLACES, rng))
    worst = worst_of(sample.worst, deep.worst)
    places = f"{sample.places} places whose target and future were withheld"
    if exact.tilts:
        places += f", {sample.hinted} of them with a hint"
    text = f"{sample.worst:.1e} nats at {places}; {deep.worst:.1e} at {deep.places} places of "
    text += f"{len(whole.counts)} whole documents, the longest of {whole.counts.max()} targets"
    allowed = BLIND_NATS if exact.run.ranks.device.type == "cpu" else CLOSE_NATS
    return Measured(worst, allowed, text)


def places_of(docs: Any, number: int, rng: np.random.Generator) -> set[int]:
    """Some targets of every document, by stream index, without its last one."""
    wanted = set()
    for start, count in zip(docs.starts, docs.counts, strict=True):
        if count > 1:
            wanted |= {int(start + offset) for offset in rng.integers(count - 1, size=number)}
    return wanted


class Blind(NamedTuple):
    """By how many nats scores differ from a distribution that did not know their targets."""

    worst: float
    places: int
    hinted: int  # of them with a hint


def blind_difference(case: Case, name: str, docs: Any, wanted: set[int]) -> Blind:
    """Scores documents, and computes p(.) at the wanted targets with them and the rest withheld."""
    exact = case.fp32_subject
    watch = BlindWatch(exact, wanted)
    ledger = exact.evaluate(name, docs, watch)
    if not watch.log_p:
        raise NotRun("no selected logit was seen")
    worst = 0.0
    for index, log_p in watch.log_p.items():
        if watch.hints.get(index, -1) >= 0:
            weights = weights_of_betas(exact.run.cfg, ledger, index)
            log_p = tilted(log_p, watch.hints[index], exact.run.cfg, weights)
        outside = -float(log_p[docs.tokens[index + 1]])
        worst = worst_of(worst, abs(float(ledger.nats[index]) - outside))
    return Blind(worst, len(watch.log_p), sum(hint >= 0 for hint in watch.hints.values()))


def tilted(log_p: torch.Tensor, hint: int, cfg: Any, weights: torch.Tensor) -> torch.Tensor:
    """log p(.) (V,) fp64, tilted towards a hint: the mixture over the values of beta.

    weights: those of the betas (betas,). Every part is normalised over the whole vocabulary.
    """
    log_p = log_p.double()
    mixture = torch.zeros_like(log_p)
    for beta, weight in zip(cfg.tilt_betas, weights, strict=True):
        logits = log_p.clone()
        logits[hint] += beta * (1 - log_p[hint].exp()) ** cfg.tilt_gamma
        mixture += weight * logits.softmax(0)
    return mixture.log()


def weights_of_betas(cfg: Any, ledger: Any, index: int) -> torch.Tensor:
    """What Bayes' rule makes of equal weights of the betas by the hinted targets before `index`."""
    tilt = ledger.tilt
    earlier = tilt.index[tilt.index < index]
    q = (-tilt.nats[earlier].double()).exp()[:, None]
    beta = torch.tensor(cfg.tilt_betas, dtype=torch.float64) * (1 - q) ** cfg.tilt_gamma
    is_hit = tilt.hints[earlier] == ledger.tokens[earlier + 1]
    likelihood = beta * is_hit[:, None] - (1 - q + q * beta.exp()).log()
    return likelihood.sum(0).softmax(0)


# --- The distribution -----------------------------------------------------------------------------
@each_evaluation(3, "normalisation", "normalised")
def normalisation(case: Case, name: str) -> Measured:
    """With every token of the vocabulary in turn as the target, the probabilities sum to 1.

    With the token tilt all of them get one hint, and TILT_BETA alone: with TILT_HEDGE the weights
    would change from one to the next.
    """
    subject = case.fp32_subject
    on_stream = subject.reads_across_documents(name)
    adapts = "ttt" in name
    length = 20 if adapts else 9
    if on_stream:
        length = min(9, subject.cfg.eval_stride - 2)
    if length < 1:
        raise NotRun(f"EVAL_STRIDE={subject.cfg.eval_stride}: no room between windows")
    texts = [text for text in case.texts if len(text) > 20]
    sums = []
    for text in texts[: 1 if on_stream or adapts else 3]:
        copies = every_target(case, name, text[:length])
        with contextlib.ExitStack() as conditions:
            conditions.enter_context(subject.config_changed(**copies.changes))
            conditions.enter_context(subject.equal_adapters())
            if subject.tilts:
                conditions.enter_context(subject.hints_forced(copies.targets))
            nats = subject.nats(name, copies.docs)
        sums.append(float(np.exp(-nats[copies.targets]).sum()))
    worst = worst_of(*(abs(total - 1) for total in sums))
    shown = ", ".join(f"{total:.6f}" for total in sums)
    return Measured(worst, CLOSE_NATS, f"{shown} over {subject.cfg.vocab_size} targets")


class Copies(NamedTuple):
    """A stream that holds a text once with every token of the vocabulary after it."""

    docs: Any
    changes: dict[str, Any]  # settings under which no copy is learnt from before all are scored
    targets: np.ndarray  # (V,) stream indices of the different targets


def every_target(case: Case, name: str, prefix: np.ndarray) -> Copies:
    """A document for every token of the vocabulary after `prefix`; for BOS the document ends there.

    No copy is learnt from before all are scored, though other text was. Windows are short, so that
    copies fill rows; where windows lie on the stream, the copies do as well, all with the same text
    before them.
    """
    subject = case.fp32_subject
    cfg = subject.run.cfg
    need = len(prefix) + 2
    stride = cfg.eval_stride if need <= cfg.eval_stride < 2 * need else need
    changes: dict[str, Any] = {"eval_seq_len": 2 * stride, "eval_stride": stride}
    if subject.reads_across_documents(name):
        fill = np.resize(prefix, 2 * stride - need)
        # The first of them is there to stand before the second.
        block = [np.concatenate([prefix, [v], fill]) for v in (0, *range(cfg.vocab_size))]
    else:
        block = [np.append(prefix, v) for v in range(cfg.vocab_size)]
        block[subject.bos] = prefix
    if subject.tilts:
        changes["tilt_hedge"] = ""
    warm_up: list[np.ndarray] = []  # texts that are learnt from
    if "ttt" in name and cfg.ttt_mode == "chunk":
        size = sum(len(text) + 1 for text in block)
        warm_up = [np.resize(np.concatenate(case.texts), size - 1)]
        # As many tokens as in the rows of the run.
        changes["ttt_batch_seqs"] = cfg.ttt_batch_seqs * cfg.eval_seq_len // (2 * stride)
        changes |= {"ttt_chunk_tokens": size, "ttt_epochs": 1}
    elif "ttt" in name:
        changes |= {
            "ttt_short_chunks": f"{len(prefix)}:8",
            "ttt_warm_start_a": False,
            "ttt_batch_size": 256,
            "ttt_min_doc_len": 0,  # so that short documents learn, too
        }
        if cfg.phased_ttt_num_phases:
            warm_up = case.texts[: max(1, len(case.texts) // 2)]
            changes |= {"phased_ttt_num_phases": 1, "phased_ttt_prefix_docs": len(warm_up)}
            changes["phased_ttt_prefix_tokens"] = 0
    docs = subject.stream([*warm_up, *block])
    return Copies(docs, changes, docs.starts[-cfg.vocab_size :] + len(prefix))


# --- The ledger and the order of scoring and learning ---------------------------------------------
@each_evaluation(4, "ledger", "single_pass")
def ledger_counts(case: Case, name: str) -> Measured:
    """Every target is scored exactly once, and the score is their sum over the decoded bytes."""
    docs = case.docs
    watched = case.watched(name)
    ledger = watched.ledger
    wanted = np.bincount(docs.target_indices(), minlength=len(docs.tokens) - 1)
    times = np.bincount(join_positions(watched.watch.order), minlength=len(wanted))
    times_in_ledger = ledger.times_scored[:-1].cpu().numpy()
    wrong = int((times != wanted).sum()) + int((times_in_ledger != wanted).sum())

    decoded = sum(case.decoded_bytes(docs))
    nats = float(ledger.nats[:-1].double().sum())
    off = abs(ledger.result()["val_bpb"] * decoded * math.log(2) / nats - 1)
    case.always_on += ledger.problems(decoded)
    text = f"{int(times.sum())} scores of {int(wanted.sum())} targets, {wrong} not exactly once, "
    text += f"bits per byte off by {off:.1e} from nats over {decoded} decoded bytes"
    return Measured(wrong + (off > 1e-6), 0, text)


@each_evaluation(5, "reads", "score_first")
def reads(case: Case, name: str) -> Measured:
    """Weights or adapters change only after a read of scored targets was declared, from those
    targets.
    """
    watch = case.watched(name).watch
    faults = list(watch.update_faults)
    if watch.num_read_early:
        faults.append(f"{watch.num_read_early} targets read before their score")
    text = f"{watch.num_read} targets read by updates, {len(faults)} faults"
    if faults:
        text += f": {faults[0]}"
    return Measured(len(faults), 0, text)


@each_evaluation(6, "state", "score_first")
def state(case: Case, name: str) -> Measured:
    """Scoring changes no parameter, buffer, adapter or moment."""
    watch = case.watched(name).watch
    wrong = len(watch.scoring_faults)
    text = f"{watch.num_blocks} blocks of scores, {wrong} with another state after than before"
    return Measured(wrong, 0, text)


# --- The fresh process ----------------------------------------------------------------------------
@whole_run(7, "phase lock", "self_contained")
def phase_lock(case: Case) -> Finding:
    """A fresh process opens artifact, code, tokenizer and validation shards; no socket, no
    subprocess.
    """
    judgement = case.fresh.judgement
    violations = judgement.violations
    text = f"{len(judgement.opened)} files opened, {len(violations)} not allowed"
    if violations:
        text += f": {violations[0]}"
    return Finding(not violations, text, {"opened": judgement.opened[:50]})


@whole_run(8, "artifact only", "self_contained")
def artifact_only(case: Case) -> Finding:
    """In an empty folder, with an empty home and other text in place of what it does not score,
    that process gives the same score.
    """
    fresh = case.fresh
    last = case.subject.names[-1]
    if fresh.returncode:
        text = f"exit status {fresh.returncode} in an empty folder: {fresh.error}"
        return Finding(False, text)
    docs = case.few_docs
    if fresh.doc_nats is None or len(fresh.doc_nats) != len(docs.counts):
        return Finding(False, "in an empty folder it left no scores of its documents")
    here = case.subject.evaluate(last, docs).by_document()["doc_nats"]
    worst = largest_difference(fresh.doc_nats / docs.counts, here / docs.counts)
    allowed = case.allowed(last)
    if worst > allowed:
        allowed = max(allowed, 2 * case.thread_floor)
    size = case.script.stat().st_size + case.artifact.stat().st_size
    text = f"{len(docs.counts)} documents in an empty folder: "
    text += f"{worst:.1e} nats per token apart (allowed {allowed:.1e}); {size:,} bytes"
    passed = worst <= allowed and size <= MAX_SUBMISSION_BYTES
    return Finding(passed, text, {"bytes": size, "worst": worst})


# --- The model as its own judge -------------------------------------------------------------------
@each_evaluation(9, "e-value", "causal", "normalised")
def e_value(case: Case, name: str) -> Measured:
    """On a stream drawn from the frozen model, no legal scorer beats its maker (Ville's
    inequality); and no legal scorer is better than ln V on random tokens.
    """
    subject = case.subject
    docs = case.drawn.docs
    inner = np.setdiff1d(docs.target_indices(), docs.starts + docs.counts - 1)
    batch_size = subject.cfg.ttt_batch_size
    log_e = []
    for rates in learning_rates(name):
        with subject.config_changed(**rates, ttt_batch_size=batch_size):
            nats = subject.nats(name, docs)[inner]
        log_e.append(float((-case.drawn.log_p - nats).sum()))

    noise = np.random.default_rng(9)
    length = int(docs.counts[0]) - 1
    uniform = noise.choice(subject.words, (len(docs.counts), length))
    with subject.config_changed(ttt_batch_size=batch_size):
        nats = subject.nats(name, subject.stream(list(uniform)))[inner]
    log_v = math.log(len(subject.words))
    standard_error = nats.std() / math.sqrt(len(nats))
    beats_chance = nats.mean() < log_v - 4 * standard_error

    shown = " and, rates 0, ".join(f"{value:.2f}" for value in log_e)
    text = f"ln E = {shown} over {len(inner)} targets (limit {MAX_LOG_E:.1f}); "
    text += f"random tokens {nats.mean():.2f} nats, ln V = {log_v:.2f}"
    worst = worst_of(*log_e)
    if beats_chance:
        worst = worst_of(worst, MAX_LOG_E + 1)
    return Measured(worst, MAX_LOG_E, text)


def learning_rates(name: str) -> list[dict[str, float]]:
    """The rates under which an evaluation is tried: those of the run, and none where it learns."""
    rates: list[dict[str, float]] = [{}]
    if "ttt" in name:
        rates.append({"ttt_lr": 0.0, "ttt_lora_lr": 0.0})
    return rates


# --- From one document to another -----------------------------------------------------------------
@each_evaluation(10, "permutation", "document_independent", crossing_off=True)
def permutation(case: Case, name: str) -> Measured:
    """Documents in another order, or fewer of them, keep their scores."""
    subject = case.fp32_subject
    if subject.reads_across_documents(name):
        raise NotClaimed(f"DATA_LOADER={subject.cfg.data_loader}")
    order = np.random.default_rng(10).permutation(len(case.texts))
    moved = subject.stream([case.texts[i] for i in order])
    fewer = subject.stream(case.texts[::2])
    with subject.without_crossing(), subject.equal_adapters():
        base = split_by_document(subject.nats(name, case.docs), case.docs)
        nats_moved = split_by_document(subject.nats(name, moved), moved)
        nats_fewer = split_by_document(subject.nats(name, fewer), fewer)
    permuted = [largest_difference(nats_moved[i], base[d]) for i, d in enumerate(order)]
    permuted = worst_of(*permuted)
    pairs = zip(nats_fewer, base[::2], strict=True)
    halved = worst_of(*(largest_difference(a, b) for a, b in pairs))
    text = f"{permuted:.1e} nats in another order, {halved:.1e} without every second document"
    return Measured(worst_of(permuted, halved), CLOSE_NATS, text)


def split_by_document(nats: np.ndarray, docs: Any) -> list[np.ndarray]:
    """The scores of each document without its last target, the BOS of the next one."""
    parts = []
    for start, count in zip(docs.starts, docs.counts, strict=True):
        parts.append(nats[start : start + count - 1])
    return parts


class Isolation(NamedTuple):
    """Tokens to change, and targets that must keep their scores."""

    is_changed: np.ndarray  # (N,) bool
    must_stay: np.ndarray  # (N - 1,) bool
    evidence: str


@each_evaluation(11, "isolation", "document_independent", crossing_off=True)
def isolation(case: Case, name: str) -> Measured:
    """Changing the tokens of one document does not change the scores of the next.

    Where windows lie on the stream, no change may reach farther than one of them.
    """
    subject = case.subject
    docs = case.docs
    if subject.reads_across_documents(name):
        plan = isolate_window(case)
    else:
        plan = isolate_documents(docs)
    is_changed = plan.is_changed & (docs.tokens != subject.bos)
    tokens = docs.tokens.copy()
    rng = np.random.default_rng(11)
    tokens[is_changed] = rng.choice(subject.words, int(is_changed.sum()))
    tilts = subject.tilts
    with subject.without_crossing():
        before = case.base(name)
        if subject.learns_across_documents or tilts:
            before = subject.nats(name, docs)
        after = subject.nats(name, docs._replace(tokens=tokens))
    worst = largest_difference(before[plan.must_stay], after[plan.must_stay])
    return Measured(worst, case.allowed(name), f"{worst:.1e} nats {plan.evidence}")


def isolate_documents(docs: Any) -> Isolation:
    """Changes the last 64 tokens of every second document; the documents after them must stay."""
    position = np.arange(len(docs.tokens))
    document = np.searchsorted(docs.starts, position, side="right") - 1
    tokens_left = (docs.starts + docs.counts)[document] - position  # this one included
    is_changed = (document % 2 == 0) & (tokens_left <= 64)
    must_stay = (document % 2 == 1) & (tokens_left > 1)
    evidence = f"at {must_stay.sum()} places of documents after changed ones"
    return Isolation(is_changed, must_stay[:-1], evidence)


def isolate_window(case: Case) -> Isolation:
    """Changes the first half of the stream; what lies more than a window beyond it must stay."""
    cfg = case.subject.cfg
    position = np.arange(len(case.docs.tokens))
    half = len(position) // 2
    must_stay = position[:-1] >= half + cfg.eval_seq_len
    evidence = f"at {must_stay.sum()} places beyond a window; "
    evidence += f"nearer not claimed: DATA_LOADER={cfg.data_loader}"
    return Isolation(position < half, must_stay, evidence)


# --- Bytes and coverage ---------------------------------------------------------------------------
@whole_run(12, "bytes", "lossless")
def byte_counts(case: Case) -> Finding:
    """The bytes counted are those of the decoded text, document by document; with a side-car, those
    of the original.
    """
    run = case.subject.run
    if run.docs.bytes is not None:
        return original_byte_counts(case)
    number = np.arange(0, len(run.docs.counts), max(1, len(run.docs.counts) // 2000))
    docs = run.docs._replace(starts=run.docs.starts[number], counts=run.docs.counts[number])
    decoded = np.array(case.decoded_bytes(docs))
    ledger = case.tg.Ledger(docs, run.table, torch.device("cpu"))
    counted = ledger.by_document()["doc_bytes"]
    wrong = int((counted != decoded).sum())
    num_encoded = min(200, len(decoded))
    text = f"{len(decoded)} documents: {int(counted.sum())} bytes counted, "
    text += f"{int(decoded.sum())} decoded, {wrong} documents differ; "
    text += f"{count_altered(case, docs, num_encoded)} of {num_encoded} change their ids "
    text += "when encoded again"
    if wrong:
        text += f" (factor {counted.sum() / decoded.sum():.4f})"
    figures = {"counted": int(counted.sum()), "decoded": int(decoded.sum())}
    return Finding(wrong == 0, text, figures)


def original_byte_counts(case: Case) -> Finding:
    """T12 on data with a side-car.

    A lossless tokenizer gives the original back when the transform is inverted, and the manifest
    may have its hash. Of a tokenizer that folds, the side-car is recomputed from the decoded text.
    """
    run = case.subject.run
    ledger = case.tg.Ledger(run.docs, run.table, torch.device("cpu"))
    counted = ledger.by_document()["doc_bytes"].astype(np.int64)
    model = run.tokenizer.model
    transform = caseops.transform_of(model, run.tokenizer.manifest)
    if transform and caseops.is_lossless(model):
        return inverted_byte_counts(case, transform, counted)

    tokens = run.docs.tokens
    comparison = sidecar.compare(
        tokens, run.docs.bytes, case.subject.bos, case.subject.pieces, transform
    )
    own = int(comparison.own_bytes)
    num_differing = len(comparison.differing)
    passed = not len(comparison.with_bytes)
    passed = passed and num_differing <= sidecar.allowed_differing(len(tokens), False)
    allowed = sidecar.allowed_misplaced(int(comparison.operators), False)
    passed = passed and len(comparison.misplaced) <= allowed
    is_much = len(counted) >= sidecar.LEAST_FOLDED_DOCUMENTS
    passed = passed and bool(num_differing or not is_much)
    text = f"side-car: {int(run.docs.bytes[1:].sum())} bytes, the decoded text has {own}; "
    text += f"{num_differing} of {len(tokens)} tokens differ, as folding makes them; "
    text += f"{len(comparison.with_bytes)} BOS or operators with bytes, "
    text += f"{len(comparison.misplaced)} of {comparison.operators} operators misplaced"
    return Finding(passed, text, {"counted": int(counted.sum()), "decoded": own})


def inverted_byte_counts(case: Case, transform: Any, counted: np.ndarray) -> Finding:
    """Compares the bytes counted of each document (D,) with its original, and all originals with
    the manifest's hash.
    """
    run = case.subject.run
    ids = [text.tolist() for text in case.document_ids(run.docs)]
    texts = sidecar.originals(run.tokenizer.model, transform, ids)
    sizes = sidecar.sizes_of(texts)
    wrong = int((sizes != counted).sum())
    passed = wrong == 0
    text = f"{len(texts)} documents inverted: {int(counted.sum())} bytes counted, "
    text += f"{int(sizes.sum())} in the originals, {wrong} documents differ"
    promised = run.tokenizer.manifest.get("splits", {}).get("val", {}).get("text_sha256")
    if promised and passed and case.subject.cfg.val_doc_fraction == 1:
        passed = caseops.split_digest(map(caseops.text_digest, texts)) == promised
        verdict = "agrees" if passed else "is another"
        text += f"; the manifest's hash of the original text {verdict}"
    return Finding(passed, text, {"counted": int(counted.sum()), "decoded": int(sizes.sum())})


def count_altered(case: Case, docs: Any, number: int) -> int:
    """How many of the first documents change their ids when decoded and encoded again."""
    model = case.subject.run.tokenizer.model
    altered = 0
    for start, count in zip(docs.starts[:number], docs.counts[:number], strict=True):
        ids = docs.tokens[start + 1 : start + count + 1]
        ids = ids[ids != case.subject.bos].tolist()
        altered += model.encode(model.decode(ids)) != ids
    return altered


@whole_run(13, "implied bytes", "lossless")
def implied_bytes_of_run(case: Case) -> Finding:
    """Loss, tokens and bits per byte of a log imply the bytes of the known validation sets."""
    text = case.log_text()
    finding = implied_bytes(case.log_path)
    manifest = case.subject.run.tokenizer.manifest.get("splits", {}).get("val", {})
    finals = runlog.final_lines(text)
    if not finding.passed or not manifest or not finals:
        return finding
    final = finals[-1]
    if final.get("val_tokens") != manifest["tokens"] - 1:
        return finding
    is_same = final.get("val_bytes") == manifest["bytes"]
    evidence = f"{finding.evidence}; the manifest says {manifest['bytes']:,}"
    return Finding(is_same, evidence, finding.figures)


def implied_bytes(path: Path) -> Finding:
    """T13 on a log of this script or of a public record, by the rule of report.py: val_loss / ln 2
    * tokens / val_bpb of the last score. Of several runs in one file the last one that fails, or
    else the last one, is told.
    """
    try:
        runs = runlog.read_runs(path)
    except runlog.LogError as error:
        return Finding(None, f"not run: {error}")
    verdicts = [claims.judge_bytes(run) for run in runs]
    failed = [number for number, verdict in enumerate(verdicts) if verdict.passed is False]
    number = failed[-1] if failed else -1
    run, verdict = runs[number], verdicts[number]
    passed = verdict.passed
    evidence = f"run {run.part}: {verdict.evidence}" if run.part else verdict.evidence
    if passed and not verdict.is_known_text:
        evidence += "; the log fits itself, and the text is no known set: audit.py replay tests it"
    for note in run.left_by_deadline:
        evidence += f"; {note}"
    if passed and run.sizes.get("val_tokens") == canonical.WITHDRAWN_TARGETS:
        passed = False
        evidence += "; that split was withdrawn"
    figures = {
        "implied_bytes": verdict.implied,
        "ratio": verdict.ratio,
        "known_text": verdict.is_known_text,
    }
    return Finding(passed, evidence, figures)


@whole_run(14, "coverage", "lossless")
def coverage(case: Case) -> Finding:
    """What is scored is what the shards hold, to the last token."""
    docs = case.subject.run.docs
    share = case.subject.cfg.val_doc_fraction
    held = held_documents(case)
    tokens = held.tokens
    wanted = max(1, round(share * held.num_documents))
    is_same = np.array_equal(tokens, docs.tokens)
    ends = np.append(held.starts[1:], len(tokens) - 1)
    number = np.searchsorted(held.starts, docs.starts).clip(max=len(held.starts) - 1)
    has_all_targets = bool((docs.starts + docs.counts == ends[number]).all())
    begins_right = bool(np.isin(docs.starts, held.starts).all())
    is_whole = has_all_targets and begins_right
    passed = is_same and is_whole and len(docs.starts) == wanted
    text = f"{len(docs.starts)} of {wanted} documents, {int(docs.counts.sum())} targets "
    text += f"of a shard stream of {len(tokens)} tokens"
    if not is_same:
        text += "; other tokens than the shards hold"
    if not is_whole:
        text += "; documents are not scored to their ends"
    if case.subject.run.docs.bytes is not None and share == 1:
        held_bytes = int(case.held.token_bytes[1:].sum(dtype=np.int64))
        counted = int(case.subject.run.docs.bytes[1:].sum())
        passed = passed and counted == held_bytes
        text += f"; {counted} bytes of the original, the side-car holds {held_bytes}"
    known = getattr(case.tg, "CANONICAL", {}).get(case.subject.run.cfg.dataset_dir.name)
    if known and share == 1:
        passed = passed and is_near(len(held.starts), known.documents)
        passed = passed and is_near(len(tokens), known.tokens)
        text += f"; the field's set has {known.documents} documents, {known.tokens or '?'} tokens"
    if share != 1:
        text += f"; no claim: VAL_DOC_FRACTION={share:g} leaves documents out"
        if passed:
            passed = None
    return Finding(passed, text, {"val_sha256": sha256(tokens.tobytes())})


class HeldDocuments(NamedTuple):
    """What the validation shards hold of the documents that should be scored."""

    tokens: np.ndarray  # (N,) uint16
    starts: np.ndarray  # (D,)
    num_documents: int  # of all shards


def held_documents(case: Case) -> HeldDocuments:
    """The validation stream by reading the shards; of rows the sample alone, its documents end to
    end.
    """
    cfg = case.subject.cfg
    bos = case.held.bos
    tokens = case.held.tokens
    starts = case.held.starts
    num_documents = len(starts)
    if cfg.val_doc_fraction < 1 and cfg.data_loader != "documents":
        wanted = max(1, round(cfg.val_doc_fraction * num_documents))
        chosen = sorted(random.Random(cfg.seed).sample(range(num_documents), wanted))
        ends = np.append(starts[1:], len(tokens) - 1)
        parts = [tokens[starts[i] : ends[i]] for i in chosen]
        parts.append(tokens[ends[chosen[-1]] :][:1])
        tokens = np.concatenate(parts)
        starts = np.flatnonzero(tokens[:-1] == bos)
    return HeldDocuments(tokens, starts, num_documents)


def is_near(number: int, known: int) -> bool:
    """Whether a total is the known one; 0 is not known."""
    return not known or abs(number - known) <= canonical.BYTES_TOLERANCE * known


# --- Data, budgets, log ---------------------------------------------------------------------------
@whole_run(15, "overlap", "clean_data")
def train_overlap(case: Case) -> Finding:
    """No validation document is in the training shards."""
    paths = case.shards("train")
    if not paths:
        raise NotRun("no training shards here")
    size = sum(path.stat().st_size for path in paths) // 2
    if size > MAX_TRAIN_TOKENS:
        text = f"{size:,} training tokens: run tools/doctor.py, which does it on all cores"
        raise NotRun(text)
    bos = case.subject.bos
    val = case.subject.run.docs.tokens
    train = read_shards(paths)
    first_document = int(np.argmax(train == bos))
    found = overlap.overlap([train[first_document:]], val.astype(np.uint16), bos)
    whole = sum(one.whole for one in found)
    part = len(found) - whole
    text = f"{whole} whole and {part} parts of {int((val == bos).sum())} validation documents "
    text += f"in {len(train):,} training tokens"
    return Finding(whole == 0, text, {"whole": whole, "part": part})


@whole_run(16, "budget", "within_budget")
def budget(case: Case) -> Finding:
    """Phases of the log stay within their limits, and code and model within theirs."""
    case.final()
    text = case.log_text()
    totals = runlog.read_budget_totals(text)
    phases = [phase for phase in runlog.read_phase_table(text) if phase.budget != "none"]
    told = []
    over = []
    for total in totals:
        spent = sum(phase.seconds for phase in phases if phase.budget == total.budget)
        limit = min(total.limit, MAX_BUDGET_SECONDS) if total.limit else math.inf
        if max(spent, total.seconds) > limit + 0.05:
            over.append(total.budget)
        # Each printed figure may be off by half a tenth of a second.
        if abs(spent - total.seconds) > 0.1 * (len(phases) + 1):
            over.append(f"{total.budget} does not add up")
        shown = "any" if limit == math.inf else f"{limit:.0f}"
        told.append(f"{total.budget} {total.seconds:.1f} s of {shown}")
    size = runlog.submission_sizes(text)[-1]
    told.append(f"{size:,} bytes of {MAX_SUBMISSION_BYTES:,}")
    if size > MAX_SUBMISSION_BYTES:
        over.append("bytes")
    evidence = ", ".join(told) + "".join(f"; {name} OVER" for name in over)
    return Finding(bool(totals) and not over, evidence)


@whole_run(17, "warm-up", "clean_data")
def warm_up(case: Case) -> Finding:
    """Warm-up changes neither weights nor random state and sees no validation token."""
    run = case.subject.run
    seen = set()
    for inputs in run.warm_inputs:
        seen |= passages(inputs)
    num_common = len(seen & passages(run.docs.tokens[:2_000_000]))
    changed = [name for name, is_kept in run.warm_up_kept.items() if not is_kept]
    num_tokens = sum(map(len, run.warm_inputs))
    text = f"{len(run.warm_inputs)} forwards on {num_tokens} tokens, "
    text += f"{num_common} passages of {PASSAGE_TOKENS} tokens from validation; "
    text += f"changed afterwards: {', '.join(changed) or 'nothing'}"
    return Finding(not num_common and not changed, text)


PASSAGE_TOKENS = 12


def passages(tokens: np.ndarray) -> set[bytes]:
    """Every PASSAGE_TOKENS tokens in a row."""
    data = np.ascontiguousarray(tokens, dtype="<u2")
    last = len(data) - PASSAGE_TOKENS
    return {data[i : i + PASSAGE_TOKENS].tobytes() for i in range(last + 1)}


@whole_run(18, "final", "single_pass")
def final_line(case: Case) -> Finding:
    """There is one final line, which holds the last evaluation's own result.

    Looks at the fresh process and, where there is one, at the log.
    """
    outputs = {"fresh process": case.fresh.output}
    if case.log_path:
        outputs["log"] = case.log_text()
    told = []
    passed = case.fresh.returncode == 0
    for name, output in outputs.items():
        finals = runlog.final_lines(output)
        scores = runlog.evaluation_scores(output)
        last = scores[-1] if scores else math.nan
        off = [abs(final["val_bpb"] - last) for final in finals]
        is_one_result = len(finals) == 1 and off[0] < 1e-7
        passed = passed and is_one_result and not runlog.has_invalid_score(output)
        worst = max(off, default=math.nan)
        away = f"{worst:.1e} from the last of {len(scores)} scores"
        told.append(f"{name}: {len(finals)} final line, {away}")
    finals = runlog.final_lines(case.fresh.output)
    if case.fresh.doc_nats is not None and finals:
        decoded = sum(case.decoded_bytes(case.few_docs))
        recomputed = case.fresh.doc_nats.sum() / math.log(2) / decoded
        passed = passed and abs(recomputed / finals[0]["val_bpb"] - 1) < 1e-6
        told.append(f"recomputed from its documents {recomputed:.6f}")
    return Finding(passed, "; ".join(told))


# Fields that decide a score, by the beginning of their names; those of the audit itself are left
# out.
SCORING_FIELDS = (
    "ttt",
    "eval",
    "phased_ttt",
    "sliding",
    "logit_temperature",
    "compute_dtype",
    "seed",
    "tilt",
)
AUDIT_FIELDS = ("eval_only_path", "eval_deadline_seconds")


@whole_run(19, "provenance", "provenance")
def provenance(case: Case) -> Finding:
    """Code, artifact, configuration and data of the log are those audited."""
    final = case.final()
    log = case.log_path.read_bytes()
    hashes = {
        "code_sha256": sha256(case.script.read_bytes()),
        "artifact_sha256": sha256(case.artifact.read_bytes()),
    }
    for key in ("tokenizer_sha256", "val_sha256"):
        hashes[key] = case.subject.run.facts[key]
    different = [key for key, value in hashes.items() if final.get(key) != value]
    source = runlog.source_at_head(log)
    if source is not None and sha256(source) != hashes["code_sha256"]:
        different.append("source text in the log")
    settings = runlog.read_settings(case.log_text())
    audited = audited_fields(case)
    for field, value in audited.items():
        if field not in settings or settings[field].value != str(value):
            different.append(field)
    text = f"{len(hashes)} hashes and {len(audited)} knobs of the log compared; "
    text += f"different: {', '.join(different) or 'none'}"
    return Finding(not different, text)


def audited_fields(case: Case) -> dict[str, Any]:
    """The fields that decide a score: those of scoring as asked for, those of the network as the
    artifact has them.
    """
    subject = case.subject
    fields = {}
    for name, value in case.wanted_config.items():
        if name.startswith(SCORING_FIELDS) and name not in AUDIT_FIELDS:
            fields[name] = value
    for name in case.tg.NETWORK_FIELDS:
        fields[name] = getattr(subject.cfg, name)
    return fields


@each_evaluation(20, "canary", "document_independent")
def canary(case: Case, name: str) -> Measured:
    """A random document scores the same when it comes again."""
    subject = case.fp32_subject
    rng = np.random.default_rng(20)
    random_text = rng.choice(subject.words, min(256, int(1.3 * subject.cfg.eval_seq_len)))
    half = len(case.texts) // 2
    texts = [*case.texts[:half], random_text, *case.texts[half:], random_text]
    docs = subject.stream(texts)
    with subject.equal_adapters():
        parts = split_by_document(subject.nats(name, docs), docs)
    first = parts[half][:-1]
    second = parts[-1][:-1]
    log_v = math.log(len(subject.words))
    standard_error = first.std() / math.sqrt(len(first))
    is_known = first.mean() < log_v - 4 * standard_error
    learnt = float(first.mean() - second.mean())
    text = f"{first.mean():.3f} nats at first (ln V {log_v:.2f}), {learnt:+.1e} less later"
    learns = subject.learns_across_documents and "ttt" in name
    difference = 0.0
    if not learns and not subject.tilts and not subject.reads_across_documents(name):
        difference = largest_difference(first, second) / CLOSE_NATS
    return Measured(worst_of(float(is_known), difference), 1.0, text)


@whole_run(21, "hints", "causal")
def hints(case: Case) -> Finding:
    """Hints of the token tilt stay the same when the stream ends after their target, and when the
    target and all after it change.
    """
    subject = case.subject
    if not subject.tilts:
        raise NotRun("no token tilt (TILT_ORDER=0)")
    docs = case.docs
    base = subject.hints(docs)
    hinted = np.flatnonzero(base >= 0)
    if not len(hinted):
        raise NotRun(f"TILT_ORDER={subject.cfg.tilt_order}: no hint in the sample")
    rng = np.random.default_rng(21)
    cuts = rng.permutation(hinted)[:HINTED_PLACES].tolist()
    wrong = 0
    for cut in cuts:
        tokens = docs.tokens.copy()
        tokens[cut + 1 :] = rng.choice(subject.words, len(tokens) - cut - 1)
        changed = subject.hints(docs._replace(tokens=tokens))
        number = int(np.searchsorted(docs.starts, cut, side="right"))
        counts = docs.counts[:number].copy()
        counts[-1] = cut + 1 - docs.starts[number - 1]
        shorter = docs._replace(
            tokens=docs.tokens[: cut + 2],
            starts=docs.starts[:number],
            counts=counts,
            bytes=None if docs.bytes is None else docs.bytes[: cut + 2],
        )
        for other in (changed, subject.hints(shorter)):
            wrong += int((other[: cut + 1] != base[: cut + 1]).sum())
    text = f"{len(hinted)} hints; {wrong} others where the stream ends after one of {len(cuts)} "
    return Finding(wrong == 0, text + "hinted targets, or changes from it on", {"wrong": wrong})


@whole_run(22, "commitment", "provenance", "lossless")
def committed_documents(case: Case) -> Finding:
    """The log commits to a score of every document that the shards hold, and its score is their
    sum.

    Documents, targets and bytes are counted by the audit's own code.
    """
    final = case.final()
    if "documents_sha256" not in final:
        raise NotRun("the log commits to no documents (documents_sha256)")
    documents = case.documents_of_run()
    settings = runlog.read_settings(case.log_text())
    faults = list(commitment.problems(final, settings, documents))
    held = case.held
    if documents is None or commitment.no_claim(settings):
        return Finding(None, f"no claim: {'; '.join(faults)}")
    if reason := commitment.unfit(documents):
        return Finding(False, reason)
    if not np.array_equal(documents["doc_tokens"], held.counts):
        faults.append("documents or their targets are not those of the shards")
    else:
        held_bytes = [held.bytes_of(number) for number in range(len(held.counts))]
        different = int((documents["doc_bytes"] != held_bytes).sum())
        if different:
            faults.append(f"{different} documents have other bytes than their text")
    found = commitment.totals(documents)
    text = f"{found.documents} documents of {len(held.counts)}, {found.tokens} targets, "
    text += f"{found.bytes} bytes add up to {found.bpb:.8f} bits per byte"
    return Finding(not faults, "; ".join([text, *faults]), {"bpb": found.bpb})


@whole_run(23, "container", "self_contained")
def container(case: Case) -> Finding:
    """Packing what the artifact holds gives the artifact again, byte for byte: nothing hides in
    it.
    """
    data = case.artifact.read_bytes()
    reason = canonical_container.difference(data)
    text = f"{len(data):,} bytes, " + (reason or "the same when packed again")
    if reason and canonical_container.is_of_another_library(data):
        return Finding(None, f"{text}; another version of its codec, or a message in the codes")
    return Finding(not reason, text)


# === Properties ===================================================================================
class Property(NamedTuple):
    """What the tests that ran say about a property of the evaluation."""

    passed: bool | None  # None: no test of it ran, or it is not claimed
    tests: list[str]  # those that ran
    evidence: str


def judge_properties(findings: dict[str, Finding]) -> dict[str, Property]:
    """Every property holds if all tests of it that ran have passed."""
    return {name: judge_property(name, findings) for name in PROPERTIES}


def judge_property(name: str, findings: dict[str, Finding]) -> Property:
    """One property, by the findings of its tests."""
    evidence = []
    reasons = []
    ran = []
    for test in tests_of(name):
        finding = findings.get(test.name)
        if finding is None:
            continue
        if finding.passed is None:
            reasons.append(finding.evidence)
        else:
            ran.append(test.name)
            evidence.append(f"{test.name}: {finding.evidence}")
    passed = all(findings[test].passed for test in ran) if ran else None
    text = " | ".join(evidence) or "; ".join(reasons) or "not run"
    return Property(passed, ran, text)


def tests_of(property_name: str) -> Iterator[LegalityTest]:
    """Yields the tests of a property in their order."""
    for test in TESTS.values():
        if property_name in test.properties:
            yield test


def with_declarations(case: Case, properties: dict[str, Property]) -> dict[str, Property]:
    """The same, without documents' independence where the system itself says that they are not
    independent.
    """
    held = properties["document_independent"]
    if not case.is_prepared or not held.passed:
        return properties
    subject = case.subject
    declared = []
    if subject.learns_across_documents:
        declared.append("documents learn from earlier ones")
    if any(subject.reads_across_documents(name) for name in subject.names):
        declared.append("windows run over documents (DATA_LOADER)")
    if subject.tilts:
        declared.append("hints come from earlier documents (TILT_ORDER)")
    if not declared:
        return properties
    text = f"{', '.join(declared)}, as declared; nothing else: {held.evidence}"
    changed = held._replace(passed=None, evidence=text)
    return {**properties, "document_independent": changed}
