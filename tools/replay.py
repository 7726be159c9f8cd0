"""Scores documents of a claim again: blind, by the submitted code, and by code that is trusted.

    python tools/audit.py replay LOG ARTIFACT --documents 50

Documents are drawn with fresh entropy, which is printed; the longest is always among them. The
submitted code then gets a validation shard of as many documents as the run's, each in its place and
as long as there, in a process and folder of its own. Only the drawn ones have their text: the
others are decoys (texts of other documents, altered copies, copies cut at a random place), which
nothing marks. So number, lengths, places and batches are those of the claim, and a cheat that knows
when it is looked at, or how few documents there are, has nothing to go by.

Four evaluations must agree on every drawn document within the measured floor:

    claim      the scores that the log commits to (documents.npz, documents_sha256)
    submitted  the script of the log, on the blind shard
    reference  the reviewer's own train_gpt.py (--reference), on the same shard
    plain      tools/plain_evaluator.py: one document at a time, no cache, fp32
    fp32       the reference in fp32, where the run computes in less

The decoys have no claim, but the last three must agree on them, too. If one document in 67 were
false, 200 drawn ones would show it with 95 %: the bound is said with the result.

Where documents learn from earlier ones (phases, warm start, tilt, TTT_MODE=chunk) a decoy would
change the scores after it. Then no document is replaced, and the process sees the stream as it is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import canonical
import caseops
import claims
import code_changes
import commitment
import enclosure
import fresh_process
import numpy as np
import runlog
import torch
from digests import file_sha256, sha256
from fresh_process import MachineError
from held import HEADER_BYTES, SHARD_MAGIC, DataError, HeldData, tokenizer_by_hash
from plain_evaluator import Model
from run_documents import DOCUMENTS, load_arrays

from train_gpt import FIELDS, MAX_ARTIFACT_BYTES, UsageError, read_regular

EXACT_NATS = 1e-4  # nats a token between implementations in fp32
CONFIDENCE = 0.95
PLAIN_DECOYS = 4  # that the plain evaluator scores, too
FLOOR_DOCUMENTS = 3  # of which the plain evaluator measures the floor in fp64
CROSSING = ("ttt_warm_start_a", "phased_ttt_num_phases", "tilt_order")
# What must be in a log to score its claim again.
FIGURES = ("dataset", "tokenizer_sha256", "run_id", "val_bpb")
SCORING_PREFIXES = ("ttt_", "phased_ttt_", "eval_", "sliding_", "tilt_", "logit_temperature")
OTHER_SETTINGS = ("data_loader", "compute_dtype", "seed")
SCORING_SETTINGS = [name for name in FIELDS if name.startswith(SCORING_PREFIXES)]
SCORING_SETTINGS += OTHER_SETTINGS
DECOY_KINDS = ("another text", "an altered copy", "a copy cut at a random place")


# === The draw =====================================================================================
class Draw(NamedTuple):
    """The documents that are scored again, and what stands in place of the others."""

    entropy: int
    drawn: np.ndarray  # (n,) numbers of documents, rising
    longest: int  # is among them by rule, not by chance
    tokens: np.ndarray  # (N,) uint16, the blind shard
    decoys: dict[int, str]  # number of a document -> kind of what replaces it


def draw_documents(held: HeldData, count: int, entropy: int, may_replace: bool) -> Draw:
    """Draws `count` documents and makes the blind shard.

    may_replace: whether the other documents may be replaced.
    """
    rng = np.random.default_rng(entropy)
    total = len(held.counts)
    longest = int(held.counts.argmax())
    count = min(count, total)
    others = rng.permutation(np.delete(np.arange(total), longest))[: count - 1]
    drawn = np.sort(np.append(others, longest))
    tokens = held.tokens.copy()
    decoys = {}
    if may_replace:
        for number in np.setdiff1d(np.arange(total), drawn).tolist():
            kind = DECOY_KINDS[rng.integers(len(DECOY_KINDS))]
            decoys[number] = kind
            tokens[held.text_span(number)] = whole_characters(held, decoy(held, number, kind, rng))
    return Draw(entropy, drawn, longest, tokens, decoys)


def decoy(held: HeldData, number: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Ids that replace a document's, equally many and without a BOS."""
    own = held.tokens[held.text_span(number)]
    other = held.tokens[held.text_span(int(rng.integers(len(held.counts))))]
    other = np.resize(other, len(own)) if len(other) else own
    if kind == "another text":
        return other
    if kind == "an altered copy":
        is_altered = rng.random(len(own)) < 0.05
        return np.where(is_altered, rng.permutation(other), own)
    cut = int(rng.integers(len(own) + 1))
    return np.concatenate([own[:cut], other[cut:]])


def whole_characters(held: HeldData, ids: np.ndarray) -> np.ndarray:
    """The ids with another piece in place of byte pieces that are no whole character together."""
    ids = ids.copy()
    values = held.byte_values[ids]
    is_byte = values >= 0
    plain = ids[~is_byte]
    filler = plain[0] if len(plain) else held.model.piece_to_id("\u2581")
    edges = np.flatnonzero(np.diff(is_byte, prepend=False, append=False))
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        try:
            bytes(values[first:end].tolist()).decode()
        except UnicodeDecodeError:
            ids[first:end] = filler
    return ids


def excluded_share(drawn: int, total: int, confidence: float = CONFIDENCE) -> float:
    """The share of false documents that `drawn` agreeing ones out of `total` exclude.

    With f false documents, all drawn ones agree with probability C(total - f, drawn) / C(total,
    drawn). The smallest f for which that is below 1 - confidence, as a share; 1 where none is.
    """
    log_all_agree = 0.0
    for false in range(1, total + 1):
        left = total - false + 1
        if left <= drawn:
            return false / total
        log_all_agree += math.log1p(-drawn / left)
        if log_all_agree < math.log(1 - confidence):
            return false / total
    return 1.0


# === Evaluations ==================================================================================
class Claim(NamedTuple):
    """What a log claims, and what is needed to score it again."""

    log: Path
    artifact: Path
    final: dict[str, Any]
    settings: dict[str, str]  # by field name
    variables: dict[str, str]  # the environment of the evaluation
    documents: dict[str, np.ndarray]
    held: HeldData

    @property
    def log_settings(self) -> dict[str, runlog.Setting]:
        """The settings as the log's reader has them."""
        return {name: runlog.Setting(value, "") for name, value in self.settings.items()}

    @property
    def is_partial(self) -> bool:
        """Whether the run has scored a part of the documents only, which is no claim."""
        return bool(commitment.no_claim(self.log_settings))

    @property
    def has_its_artifact(self) -> bool:
        """Whether the artifact is the one that the log names."""
        return file_sha256(self.artifact) == self.final.get("artifact_sha256")

    @property
    def has_its_documents(self) -> bool:
        """Whether the records are of the documents in the shards."""
        return np.array_equal(self.documents["doc_tokens"], self.held.counts)

    @property
    def adapts(self) -> bool:
        """Whether the evaluation learns from scored text."""
        return self.settings["ttt_enabled"] == "True"

    @property
    def adapts_by_chunks(self) -> bool:
        """Whether all weights learn, over the whole stream."""
        return self.adapts and self.settings["ttt_mode"] == "chunk"

    @property
    def crosses_documents(self) -> bool:
        """Whether a document's score depends on others, by declaration."""
        if self.adapts:
            crosses = any(self.settings[name] not in ("0", "False") for name in CROSSING)
            return crosses or self.adapts_by_chunks
        return self.reads_stream or self.settings["tilt_order"] != "0"

    @property
    def reads_stream(self) -> bool:
        """Whether windows without adaptation lie in the stream, wherever documents begin."""
        return self.settings["data_loader"] != "documents"

    @property
    def goes_along_stream(self) -> bool:
        """Whether all of the stream is scored at once, not document by document."""
        return self.adapts_by_chunks if self.adapts else self.reads_stream

    @property
    def stride(self) -> int:
        """Targets between windows without adaptation; 0: as many as a window has."""
        slides = self.settings["sliding_window_enabled"] not in ("0", "False")
        return int(self.settings["eval_stride"]) if slides else 0


class Scores(NamedTuple):
    """What an evaluation made of the stream."""

    nats: np.ndarray  # (docs,) per token; NaN where a document was not scored
    seconds: float  # of the whole process, measured outside
    timed: float = 0.0  # of the evaluations, by the process's own clock


def score_alone(claim: Claim, script: Path, tokens: np.ndarray, **changes: str) -> Scores:
    """Runs a script by itself, in a folder that holds only what an evaluation needs.

    Raises ReplayError if it gives no scores, MachineError if the machine has failed it.
    """
    with tempfile.TemporaryDirectory(prefix="run-") as name:
        folder = Path(name).resolve()
        # Another name, because decoys have not the bytes that the challenge's names stand for.
        dataset = f"text_{claim.held.folder.name}"
        data = fresh_process.lay_out(folder, script, claim.held.tokenizer, dataset)
        shutil.copy(claim.artifact, folder / "model.ptz")
        write_shards(claim.held, tokens, data)
        environ = fresh_process.environment(folder, dataset, claim.variables) | {
            "EVAL_ONLY_PATH": "model.ptz",
            "RUN_ID": claim.final["run_id"],
            "EVAL_DEADLINE_SECONDS": "1e9",
            **changes,
        }
        command = ["train_gpt.py"]
        ranks = int(claim.final.get("world_size", 1))
        if ranks > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            command = [*launcher, *command]
        start = time.monotonic()
        done = enclosure.run(command, folder, environ, has_network=ranks > 1)
        seconds = time.monotonic() - start
        scores = folder / "runs" / environ["RUN_ID"] / "documents.npz"
        check_outcome(done, scores)
        try:
            made = read_records(scores)
        except DataError as error:
            raise ReplayError(str(error).replace(f"{folder}/", "")) from error
        nats, targets = made["doc_nats"], made["doc_tokens"]
        if not np.array_equal(targets, claim.held.counts):
            raise ReplayError("it has scored other documents than the shard holds")
        log = folder / "logs" / f"{environ['RUN_ID']}.txt"
        finals = runlog.final_lines(log.read_text(encoding="utf-8", errors="replace"))
        return Scores(nats / targets, seconds, evaluation_seconds(finals[-1] if finals else {}))


class ReplayError(Exception):
    """An evaluation has given no scores to compare."""


def check_outcome(done: subprocess.CompletedProcess[str], needed: Path) -> None:
    """Raises MachineError if the machine failed a process, ReplayError if it left no such file."""
    said = fresh_process.last_line(done.stderr)
    if reason := fresh_process.failure_of_machine(done.returncode, said):
        raise MachineError(reason)
    if done.returncode or not needed.is_file():
        raise ReplayError(f"exit status {done.returncode}: {said}")


def write_shards(held: HeldData, tokens: np.ndarray, folder: Path) -> None:
    """The blind shard and, where the data has one, its side-car."""
    parts = {"val": tokens}
    if held.token_bytes is not None:
        pieces = caseops.PieceTable.from_sentencepiece(held.model)
        is_replaced = tokens != held.tokens
        parts["val_bytes"] = np.where(is_replaced, pieces.counts(tokens), held.token_bytes)
    prefix = held.folder.name.partition("_")[0]
    for split, values in parts.items():
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = SHARD_MAGIC, 1, len(values)
        path = folder / f"{prefix}_{split}_000000.bin"
        path.write_bytes(header.tobytes() + values.astype("<u2").tobytes())


def score_plainly(claim: Claim, tokens: np.ndarray, numbers: np.ndarray) -> Scores:
    """Scores some documents with the plain evaluator. NotImplementedError for what it lacks."""
    start_time = time.monotonic()
    model = Model(claim.artifact.read_bytes(), claim.settings)
    nats = np.full(len(claim.held.counts), np.nan)
    if claim.goes_along_stream:
        if claim.adapts:
            token_nats = model.chunks(tokens, int(claim.final.get("world_size", 1)))
        else:
            token_nats = model.plain(tokens.astype(np.int64), claim.stride)
        ends = np.append(0, token_nats.astype(np.float64).cumsum())
        sums = ends[claim.held.starts + claim.held.counts] - ends[claim.held.starts]
        return Scores(sums / claim.held.counts, time.monotonic() - start_time)
    for number in numbers.tolist():
        start, count = claim.held.starts[number], claim.held.counts[number]
        ids = tokens[start : start + count + 1].astype(np.int64)
        if claim.adapts:
            found = model.adapted(ids, int(start))
        else:
            found = model.plain(ids, claim.stride)
        nats[number] = found.astype(np.float64).mean()
    return Scores(nats, time.monotonic() - start_time)


def measure_floor(claim: Claim, draw: Draw, single: np.ndarray) -> float:
    """Nats a token by which rounding alone may move a document's score.

    The plain evaluator scores a few documents of middling length in fp64, too. single: its scores
    (docs,) in fp32.
    """
    if claim.goes_along_stream:
        return EXACT_NATS
    by_length = draw.drawn[np.argsort(claim.held.counts[draw.drawn], kind="stable")]
    first = max(0, (len(by_length) - FLOOR_DOCUMENTS) // 2)
    numbers = by_length[first : first + FLOOR_DOCUMENTS]
    torch.set_default_dtype(torch.float64)
    try:
        double = score_plainly(claim, draw.tokens, numbers).nats
    finally:
        torch.set_default_dtype(torch.float32)
    return max(EXACT_NATS, 3 * float(np.max(abs(single[numbers] - double[numbers]))))


# === The verdict ==================================================================================
class Allowed(NamedTuple):
    """By how many nats a token two evaluations may differ."""

    document: float  # on any one
    mean: float  # in the mean of the drawn documents, where rounding errors cancel


class Comparison(NamedTuple):
    """Two evaluations of the same documents."""

    first: str
    second: str
    documents: int
    decoys: int
    allowed: float  # nats a token
    worst: float  # nats a token
    worst_document: int
    disagreeing: list[int]  # numbers of documents
    mean: float  # nats a token, of the drawn documents: first minus second
    allowed_mean: float

    @property
    def agrees(self) -> bool:
        """Whether every document agrees, and their mean."""
        return not self.disagreeing and self.mean_agrees

    @property
    def mean_agrees(self) -> bool:
        """Whether the means of the drawn documents agree; NaN is told document by document."""
        return bool(self.disagreeing) or abs(self.mean) <= self.allowed_mean


def compare(
    names: tuple[str, str],
    scores: tuple[np.ndarray, np.ndarray],
    draw: Draw,
    allowed: Allowed,
    with_decoys: bool,
) -> Comparison:
    """Compares two evaluations on the drawn documents and, if both have scored any, on decoys.

    NaN in one of two that have scored a document is a disagreement; `scores` have NaN where nothing
    was scored, so a document that only one has scored is left out.
    """
    first, second = scores
    is_drawn = np.zeros(len(first), bool)
    is_drawn[draw.drawn] = True
    used = is_drawn.copy()
    if with_decoys:
        used |= ~is_drawn & ~np.isnan(first) & ~np.isnan(second)
    apart = np.where(used, abs(first - second), 0.0)
    wrong = np.flatnonzero(~(apart <= allowed.document))
    worst = int(np.argmax(np.nan_to_num(apart, nan=np.inf)))
    return Comparison(
        *names,
        documents=int(is_drawn.sum()),
        decoys=int((used & ~is_drawn).sum()),
        allowed=allowed.document,
        worst=float(apart[worst]),
        worst_document=worst,
        disagreeing=wrong.tolist(),
        mean=float(np.mean(first[is_drawn] - second[is_drawn])),
        allowed_mean=allowed.mean,
    )


@dataclasses.dataclass
class Verdict:
    """What a replay has shown."""

    facts: dict[str, Any]
    comparisons: list[Comparison]
    faults: list[str]  # sentences
    notes: list[str]  # what was not done, and why

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the claim."""
        return not self.faults

    def as_json(self) -> dict[str, Any]:
        """The verdict as it is kept."""
        comparisons = [{**one._asdict(), "agrees": one.agrees} for one in self.comparisons]
        return {
            "passed": self.passed,
            "faults": self.faults,
            "notes": self.notes,
            "facts": self.facts,
            "comparisons": comparisons,
        }


def read_claim(log: Path, artifact: Path, environ: Mapping[str, str]) -> Claim:
    """The claim of a log. Raises LogError, OSError or DataError for what cannot be read.

    documents.npz lies beside the artifact.
    """
    text = runlog.read_text(log)
    read_regular(artifact, MAX_ARTIFACT_BYTES)
    final = runlog.read_final(text)
    settings = {name: setting.value for name, setting in runlog.read_settings(text).items()}
    if missing := sorted({*FIGURES} - set(final)):
        raise DataError(f"its final line lacks {', '.join(missing)}")
    if missing := sorted({*SCORING_SETTINGS} - set(settings)):
        raise DataError(f"it lacks the settings {', '.join(missing)}")
    documents = read_records(artifact.with_name(DOCUMENTS))
    data_dir = Path(environ.get("DATA_DIR") or "data").resolve()
    folder = data_dir / "datasets" / final["dataset"]
    given = environ.get("TOKENIZER_PATH")
    tokenizer = Path(given) if given else tokenizer_by_hash(data_dir, final["tokenizer_sha256"])
    variables = runlog.evaluation_variables(text)
    variables.pop("DATASET", None)
    for name in ("MAX_WALLCLOCK_SECONDS", "CHECKPOINT_EVERY", "WARMUP_STEPS"):
        variables[name] = "0"
    held = HeldData.load(folder, tokenizer)
    return Claim(log, artifact, final, settings, variables, documents, held)


def read_records(path: Path) -> dict[str, np.ndarray]:
    """The records of all documents in a run's documents.npz. Raises DataError without them."""
    try:
        records = load_arrays(path)
    except UsageError as error:
        raise DataError(str(error)) from error
    if reason := commitment.unfit(records):
        raise DataError(f"{path.parent}: {reason}")
    return records


@dataclasses.dataclass
class Evaluations:
    """The scores of a draw by everything that can score it."""

    nats: dict[str, np.ndarray]  # name -> (docs,) a token
    # Of each process, measured outside, and of its evaluations by its own clock.
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    timed: dict[str, float] = dataclasses.field(default_factory=dict)
    trusted: str = "reference"  # the name of the script that the reviewer trusts
    floor: float = EXACT_NATS  # in fp32
    # By which the run's precision differs from fp32, in trusted hands; None: it is fp32.
    rounding: Allowed | None = None
    faults: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def allowed(self, first: str, second: str) -> Allowed:
        """Nats a token by which two of them may differ."""
        if self.rounding and not {first, second} <= {"plain", "fp32"}:
            return Allowed(*(max(self.floor, allowed) for allowed in self.rounding))
        return Allowed(self.floor, self.floor)


def allowed_rounding(differences: np.ndarray, drawn: int) -> Allowed:
    """What rounding may change, from what it changed in trusted hands: (docs,) nats a token.

    Twice the largest difference on one document. In the mean of `drawn` documents twice the mean
    difference, and six standard errors.
    """
    mean = abs(float(np.mean(differences)))
    error = float(np.std(differences)) / math.sqrt(drawn)
    return Allowed(2 * float(np.max(abs(differences))), 2 * mean + 6 * error)


def tell(part: int, parts: int, what: str, claim: Claim) -> None:
    """Says on stderr what is being done. A part takes about as long as the run's evaluation, in
    fp32 up to twice as long.
    """
    said = f"the run's evaluation took {evaluation_seconds(claim.final):.0f} s"
    print(f"replay: part {part} of {parts}: {what}; {said}", file=sys.stderr, flush=True)


def evaluate(claim: Claim, script: Path, reference: Path, draw: Draw) -> Evaluations:
    """Scores the draw by the submitted and the trusted script and by the plain evaluator.

    Where the run computes in less than fp32, the trusted script also does it in fp32: what that
    changes is how far the claim may be from the plain evaluator.
    """
    claimed = claim.documents["doc_nats"] / claim.documents["doc_tokens"]
    found = Evaluations({"claim": claimed})
    scripts = {"submitted": (script, {}), "reference": (reference, {})}
    if file_sha256(script) == file_sha256(reference):
        found.trusted = "submitted"
        del scripts["reference"]
        found.notes.append("the submitted code is the reference, so it ran once")
    if claim.settings["compute_dtype"] != "fp32":
        scripts["fp32"] = (reference, {"COMPUTE_DTYPE": "fp32"})
    parts = len(scripts) + 1
    for part, (name, (path, changes)) in enumerate(scripts.items(), 1):
        tell(part, parts, f"{name} scores {len(claim.held.counts)} documents", claim)
        try:
            made = score_alone(claim, path, draw.tokens, **changes)
        except ReplayError as error:
            found.faults.append(f"{name}: no scores: {error}")
            continue
        found.nats[name] = made.nats
        found.seconds[name] = made.seconds
        found.timed[name] = made.timed
    if {found.trusted, "fp32"} <= set(found.nats):
        difference = found.nats[found.trusted] - found.nats["fp32"]
        found.rounding = allowed_rounding(difference, len(draw.drawn))
    try:
        what = f"the plain evaluator scores {len(draw.drawn)} documents, one by one"
        tell(parts, parts, what, claim)
        decoys = np.array(sorted(draw.decoys), dtype=np.int64)[:PLAIN_DECOYS]
        plain = score_plainly(claim, draw.tokens, np.append(draw.drawn, decoys))
        found.nats["plain"], found.seconds["plain"] = plain.nats, plain.seconds
        found.floor = measure_floor(claim, draw, plain.nats)
    except NotImplementedError as error:
        found.notes.append(f"the plain evaluator was not run: {error}")
    return found


def replay(
    claim: Claim,
    script: Path,
    reference: Path,
    count: int,
    entropy: int,
    beside: Path | None = None,
) -> Verdict:
    """Scores drawn documents again and compares. beside and errors: as in known_too_well.

    Nothing is scored where something speaks against the claim already.
    """
    faults = faults_without_scoring(claim, script)
    memorised = known_too_well(claim, beside)
    draw = draw_documents(claim.held, count, entropy, not claim.crosses_documents)
    if faults:
        facts = facts_of(claim, script, draw, Evaluations({}))
        reason = "there is no such claim" if claim.is_partial else "this is seen without it"
        return Verdict(facts, [], faults, [f"nothing was scored: {reason}"])
    found = evaluate(claim, script, reference, draw)
    faults += found.faults
    comparisons = []
    for pair in pairs_of(list(found.nats)):
        allowed = found.allowed(*pair)
        scores = (found.nats[pair[0]], found.nats[pair[1]])
        one = compare(pair, scores, draw, allowed, with_decoys=pair[0] != "claim")
        comparisons.append(one)
        if one.disagreeing:
            listed = ", ".join(map(str, one.disagreeing[:5]))
            faults.append(
                f"{one.first} and {one.second} disagree on {len(one.disagreeing)} documents "
                f"({listed}), by up to {one.worst:.2e} nats a token "
                f"(allowed {allowed.document:.1e})"
            )
        elif not one.mean_agrees:
            faults.append(
                f"{one.first} and {one.second} differ by {one.mean:+.2e} nats a token in the mean "
                f"of {one.documents} documents (allowed {allowed.mean:.1e})"
            )
    faults += faults_of_clock(claim, found)
    notes = [*found.notes, *memorised]
    if claim.crosses_documents:
        notes.append("documents use earlier ones by declaration, so none was replaced by a decoy")
    if reason := enclosure.reason_not_to():
        notes.append(f"files outside the folder could be reached: {reason}")
    return Verdict(facts_of(claim, script, draw, found), comparisons, faults, notes)


def pairs_of(names: list[str]) -> list[tuple[str, str]]:
    """The comparisons: the claim with each evaluation, and the evaluations with one another."""
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]


def faults_of_commitment(claim: Claim, script: Path) -> list[str]:
    """What the log, the files and the commitment have against the claim."""
    faults = list(commitment.problems(claim.final, claim.log_settings, claim.documents))
    if claim.is_partial:
        # It says so already, and the shards hold the other documents, too.
        return faults
    if not claim.has_its_artifact:
        faults.append("the artifact is not that of the log (artifact_sha256)")
    ran = {claim.final.get("code_sha256"), claim.final.get("file_sha256")}
    if ran.isdisjoint({file_sha256(script), sha256(code_changes.readable_code(script))}):
        faults.append("the script is not that of the log (code_sha256)")
    if not claim.has_its_documents:
        faults.append("the documents are not those of the shards")
    elif claim.final.get("val_bytes") != sum(
        map(claim.held.bytes_of, range(len(claim.held.counts)))
    ):
        faults.append("val_bytes is not the number of bytes in the shards' text")
    return faults


def faults_of_log(claim: Claim) -> list[str]:
    """What `audit.py --log` has against the log: contradictions in it, and a wrong denominator."""
    faults = []
    for run in runlog.read_runs(claim.log):
        faults += claims.score_problems(run)
    if claim.final.get("val_tokens") == canonical.WITHDRAWN_TARGETS:
        faults.append("that validation split was withdrawn")
    return faults


def faults_without_scoring(claim: Claim, script: Path) -> list[str]:
    """All that speaks against the claim before any document is scored again."""
    faults = faults_of_commitment(claim, script)
    if claim.is_partial:
        return faults
    # The log's own check of the documents says the same, and where the file lies.
    told = tuple(faults)
    return faults + [fault for fault in faults_of_log(claim) if not fault.startswith(told)]


CLOCK_FACTOR = 3.0  # by which the same work may differ between equal machines
OWN_CLOCK_FACTOR = 1.5  # by which a process's clock may differ from one outside
CLOCK_SECONDS = 1.0  # less is not looked at


def faults_of_clock(claim: Claim, found: Evaluations) -> list[str]:
    """What the seconds of the evaluations have against the log, and against the script's clock.

    The log's evaluation must not have taken much less than the trusted script takes for the same
    work; that is looked at where both ran on the same kind of machine. And while the submitted
    script is replayed its clock must go as fast as the reviewer's. A process also starts, checks
    and warms up; what that takes is what the trusted script took beside its evaluations.
    """
    faults = []
    said = evaluation_seconds(claim.final)
    trusted_s = found.timed.get(found.trusted, 0.0)
    is_same_machine = claim.final.get("device") == device_name()
    if is_same_machine and trusted_s > max(CLOCK_SECONDS, CLOCK_FACTOR * said):
        faults.append(
            f"the log says {said:.1f} s of evaluation, the trusted script takes "
            f"{trusted_s:.1f} s for the same"
        )
    if {"submitted", "reference"} <= set(found.timed):
        beside_s = found.seconds["reference"] - found.timed["reference"]
        outside_s = found.seconds["submitted"] - beside_s
        own_s = found.timed["submitted"]
        slack_s = max(CLOCK_SECONDS, beside_s / 2)
        if outside_s > OWN_CLOCK_FACTOR * own_s + slack_s:
            faults.append(
                f"the submitted script's clock says {own_s:.1f} s of evaluation, "
                f"{outside_s:.1f} s passed outside"
            )
    return faults


def evaluation_seconds(final: Mapping[str, Any]) -> float:
    """Seconds of all evaluations of the artifact, by a final line."""
    timed = final.get("seconds", {})
    return sum(value for name, value in timed.items() if name.startswith("score quantized"))


def device_name() -> str:
    """This machine as a final line has it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores"


LOW_SIGMAS = 6.0


def known_too_well(claim: Claim, beside: Path | None) -> list[str]:
    """A note on documents that the claim knows far better than an independent model of its size.

    beside: documents.npz of another run on the same data, such as one of another seed. The spread
    of ln(nats of the claim / nats of the other) is that of all documents, by quartiles, which a few
    memorised ones do not move. At 6 sigmas an honest normal scatter gives one alarm in 10^9
    documents; heavier tails give more, so this is a place to look and no violation. Raises
    DataError if `beside` cannot be read.
    """
    if beside is None:
        return ["memorised documents were not looked for: no --beside with an independent model"]
    records = read_records(beside)
    other = np.maximum(records["doc_nats"], 1e-9)
    if not np.array_equal(records["doc_tokens"], claim.documents["doc_tokens"]):
        return [f"memorised documents were not looked for: {beside} is of other documents"]
    ratio = np.log(np.maximum(claim.documents["doc_nats"], 1e-9) / other)
    low, middle, high = np.percentile(ratio, [25, 50, 75])
    sigma = max((high - low) / 1.349, 1e-3)
    strange = np.flatnonzero(ratio < middle - LOW_SIGMAS * sigma)
    if not len(strange):
        return [f"no document is {LOW_SIGMAS:.0f} sigmas better known than by another model"]
    listed = ", ".join(f"{number} ({math.exp(ratio[number]):.2f})" for number in strange[:8])
    return [
        f"LOOK: {len(strange)} documents cost far less than by another model, as memorised ones "
        f"do: number (ratio of nats) {listed}; the middle ratio is {math.exp(middle):.2f}"
    ]


def facts_of(claim: Claim, script: Path, draw: Draw, found: Evaluations) -> dict[str, Any]:
    """What was looked at."""
    by_chance = len(draw.drawn) - 1
    total = len(claim.held.counts)
    return {
        "log": claim.log.name,
        "run_id": claim.final["run_id"],
        "val_bpb": claim.final["val_bpb"],
        "artifact_sha256": file_sha256(claim.artifact),
        "code_sha256": file_sha256(script),
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(),
        "entropy": f"{draw.entropy:032x}",
        "documents": total,
        "drawn": len(draw.drawn),
        "decoys": len(draw.decoys),
        "targets": int(claim.held.counts[draw.drawn].sum()),
        "floor_nats": found.floor,
        "rounding_nats": found.rounding,
        "excluded_share": excluded_share(by_chance, total - 1) if total > 1 else 0.0,
        "seconds": {name: round(value, 1) for name, value in found.seconds.items()},
    }


def bound_in_words(facts: dict[str, Any]) -> str:
    """What the agreeing documents prove about the others."""
    share = 100 * facts["excluded_share"]
    if facts["drawn"] == facts["documents"]:
        return f"all {facts['documents']} documents were scored again"
    return (
        f"with {facts['drawn']} of {facts['documents']} documents, a cheat on {share:.1f} % or "
        f"more of them is excluded at {CONFIDENCE:.0%}"
    )


def as_text(verdict: Verdict) -> str:
    """The verdict in lines."""
    facts = verdict.facts
    lines = [
        f"replay of {facts['run_id']}: val_bpb {facts['val_bpb']:.8f}; entropy {facts['entropy']}",
        f"{facts['drawn']} documents with {facts['targets']} targets, {facts['decoys']} decoys",
    ]
    for one in verdict.comparisons:
        decoys = f" and {one.decoys} decoys" if one.decoys else ""
        lines.append(
            f"{one.first:<10}{one.second:<10}{'agree' if one.agrees else 'DISAGREE':<9}"
            f"{one.documents} documents{decoys}, at most {one.worst:.1e} nats a token apart "
            f"(allowed {one.allowed:.1e}), {one.mean:+.1e} in the mean "
            f"(allowed {one.allowed_mean:.1e})"
        )
    if facts["seconds"]:
        times = ", ".join(f"{name} {value:.0f} s" for name, value in facts["seconds"].items())
        lines.append(f"timed from outside: {times}")
    lines += [f"note: {note}" for note in verdict.notes]
    for fault in verdict.faults:
        word = "NO CLAIM" if fault.startswith("VAL_DOC_FRACTION=") else "VIOLATION"
        lines.append(f"{word}: {fault}")
    if verdict.passed:
        lines.append(f"ok: {bound_in_words(facts)}")
    return "\n".join(lines)


def fresh_entropy() -> int:
    """128 bits that nobody could know before."""
    return secrets.randbits(128)


def as_bytes(verdict: Verdict) -> bytes:
    """The verdict as replay.json holds it."""
    return (json.dumps(verdict.as_json(), indent=1) + "\n").encode()
