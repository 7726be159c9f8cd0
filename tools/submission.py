"""submission.json: its one writer, for report.py (from logs) and pack.py (from logs and files).

Both give one file. Every figure comes from the logs and from the packed form of the code that they
ran; only the fields of `Claimant` are given by hand. The names are those of accepted records, ours
stand beside them, and whoever reads one may find more fields than he asked for.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from comparison import compare
from digests import sha256
from packed_code import PACKED, packed_size
from run_documents import ARTIFACT, run_folder
from run_statistics import mean_and_sd
from runlog import BOOKKEEPING, LIMIT_SECONDS, LogError, Run, source_at_head

from train_gpt import (
    LIMIT_BYTES,
    MAX_LOG_BYTES,
    NUMBER,
    TEXT_LINE,
    Entry,
    UsageError,
    fault_in,
    read_json,
    read_regular,
    reason_of,
)

ROOT = Path(__file__).resolve().parents[1]

# Kind of a score -> its name in submission.json.
SCORE_NAMES = {
    "before": "pre_quantization",
    "after": "quantized",
    "sliding": "sliding",
    "adapted": "adapted",
}

# A name that the field uses for compliance -> the property of an audit that shows it.
SHOWN_BY_AUDIT = {
    "score_first_ttt": "score_first",
    "no_slot": "causal",
    "no_ngram_cache": "normalised",
}


class Condition(NamedTuple):
    """What a claim must hold to."""

    name: str
    asks: str  # in a sentence
    shown_by: tuple[str, ...]  # properties of an audit


# The conditions of issue #1017 of the challenge.
CONDITIONS = (
    Condition(
        "1. Causal",
        "A score depends on the artifact and the text before it.",
        ("causal", "self_contained"),
    ),
    Condition(
        "2. A distribution",
        "The probabilities of all next tokens sum to 1.",
        ("normalised",),
    ),
    Condition(
        "3. Score first",
        "Nothing is learnt from a token before its score.",
        ("score_first",),
    ),
    Condition(
        "4. One pass",
        "Every token is scored once, and the first score counts.",
        ("single_pass",),
    ),
)


class Claimant(NamedTuple):
    """What no log can tell about a claim."""

    author: str = ""
    github_id: str = ""
    name: str = ""  # what was run, on which data and hardware
    blurb: str = ""
    date: str = ""  # day of the runs, YYYY-MM-DD
    track: str = ""

    @classmethod
    def of(cls, args: argparse.Namespace, runs: list[Run]) -> Claimant:
        """What a command line claims. Day and name are those of the first run, unless given."""
        given = {field: getattr(args, field) for field in cls._fields}
        given["date"] = given["date"] or day_of(runs[0])
        given["name"] = given["name"] or str(runs[0].final.get("run_id") or runs[0].path.stem)
        given["track"] = given["track"].removeprefix("track_")
        return cls(**given)


# (hash of the artifact, properties) of an audit.
Audit = tuple[str | None, dict[str, dict[str, Any]]]


class CountedFiles(NamedTuple):
    """The files of a folder that count against the limit."""

    names: list[str]  # code and artifact
    code_bytes: int  # of the packed code, in place of the code that the runs counted


class Compliance(NamedTuple):
    """What audits of every run's very artifact have shown."""

    flags: dict[str, bool]  # property -> whether all runs have it
    evidence: dict[str, dict[str, Any]]  # property -> seed -> evidence


# === The claim ====================================================================================


def build_submission(
    runs: list[Run],
    claimant: Claimant,
    counted: CountedFiles | None = None,
    compliance: Compliance | None = None,
    baseline: list[Run] | None = None,
) -> dict[str, Any]:
    """The content of submission.json for the seeds of one claim.

    Without `counted` the code is what the runs themselves counted. Bytes are those of the largest
    seed, and null where a log does not tell them.
    """
    runs = sorted(runs, key=seed_order)
    loss = mean_and_sd([run.score.loss for run in runs])
    bpb = mean_and_sd([run.score.bpb for run in runs])
    sizes = [counted_sizes(run, counted) for run in runs]
    facts = dict(runs[0].facts)
    hardware = f"{facts.pop('world_size', '?')} x {facts.pop('device', '?')}"
    pytorch_version = facts.pop("torch", None)
    compliance = compliance or Compliance({}, {})
    return {
        **claimant._asdict(),
        "val_loss": loss.mean,
        "val_bpb": bpb.mean,
        "val_loss_std": loss.sd,
        "val_bpb_std": bpb.sd,
        "seeds": [run.seed for run in runs],
        "seed_results": {
            str(run.seed): seed_result(run, size) for run, size in zip(runs, sizes, strict=True)
        },
        "bytes_total": largest(sizes, "artifact_bytes"),
        "bytes_code": sizes[0].get("code_bytes"),
        "bytes_model_max": largest(sizes, "model_bytes"),
        "bytes_limit": LIMIT_BYTES,
        "counted_files": counted.names if counted else None,
        "hardware": hardware,
        "pytorch_version": pytorch_version,
        "technique_summary": technique(runs[0]),
        **facts,
        "compliance": proved_by_logs(runs, sizes) | proved_by_audits(runs, compliance),
        "compliance_evidence": compliance.evidence,
        "comparison": comparison_with(runs, baseline) if baseline else None,
    }


def seed_order(run: Run) -> tuple[bool, int]:
    """Sorts runs by seed, those without one last."""
    return run.seed is None, run.seed or 0


def counted_sizes(run: Run, counted: CountedFiles | None) -> dict[str, int]:
    """Bytes and tokens of a run. The limit is for `artifact_bytes`, the sum of code and model."""
    sizes = dict(run.sizes)
    if "model_bytes" in run.final:
        sizes["model_bytes"] = run.final["model_bytes"]
    if counted and "model_bytes" in sizes:
        sizes["code_bytes"] = counted.code_bytes
        sizes["artifact_bytes"] = counted.code_bytes + sizes["model_bytes"]
    return sizes


def largest(sizes: list[dict[str, int]], name: str) -> int | None:
    """The largest size of that name, None where one is not known."""
    if all(name in size for size in sizes):
        return max(size[name] for size in sizes)
    return None


def seed_result(run: Run, sizes: dict[str, int]) -> dict[str, Any]:
    """The figures of one seed."""
    result: dict[str, Any] = {"val_bpb": run.score.bpb, "val_loss": run.score.loss}
    for kind, name in SCORE_NAMES.items():
        score = run.score_of(kind)
        if score:
            result[f"{name}_bpb"] = score.bpb
    if run.gain is not None:
        result["pre_ttt_val_bpb"] = run.score.bpb + run.gain
        result["ttt_gain_bpb"] = -run.gain
    result["steps"] = run.steps
    result |= sizes
    result["step_avg_ms"] = run.step_avg_ms
    for budget in ("train", "eval"):
        seconds = run.budget_seconds(budget)
        if seconds is not None:
            result[f"{budget}_time_s"] = round(seconds, 3)
    result["seconds"] = {phase.name: round(phase.seconds, 3) for phase in run.phases}
    result["artifact_sha256"] = run.final.get("artifact_sha256")
    if run.left_by_deadline:
        result["left_by_deadline"] = run.left_by_deadline
    return result


def technique(run: Run) -> str | None:
    """Preset and settings of a run in one line, None of a log that tells no preset."""
    preset = run.facts.get("preset")
    if not preset:
        return None
    told_elsewhere = BOOKKEEPING | {"tokenizer_path", "seed", "preset", "dataset"}
    knobs = [f"{name.upper()}={run.config[name]}" for name in sorted(run.given - told_elsewhere)]
    return " ".join([f"PRESET={preset}", *knobs])


def comparison_with(runs: list[Run], baseline: list[Run]) -> dict[str, Any]:
    """Difference to a baseline, negative where the claim is better, and Welch's test of it."""
    figures = compare(runs, baseline)
    test = figures["bpb"]["welch"] or {}
    nats = figures["nats"]
    old = mean_and_sd([run.score.bpb for run in baseline])
    return {
        "baseline_val_bpb": old.mean,
        "baseline_val_bpb_std": old.sd,
        "baseline_seeds": [run.seed for run in baseline],
        "delta_bpb": -figures["bpb"]["difference"],
        "delta_nats": -nats["difference"] if nats else None,
        "t_statistic": test.get("t"),
        "p_value": test.get("p_better"),
    }


def as_bytes(submission: dict[str, Any]) -> bytes:
    """The content as it stands in the file."""
    return (json.dumps(submission, indent=2) + "\n").encode()


def is_day(text: str) -> bool:
    """Whether a text is a day as YYYY-MM-DD."""
    try:
        return time.strftime("%Y-%m-%d", time.strptime(text, "%Y-%m-%d")) == text
    except ValueError:
        return False


def day_of(run: Run) -> str:
    """The day of a run: by its name, else that on which its log was last written."""
    if run.started:
        return run.started[:10]
    return time.strftime("%Y-%m-%d", time.localtime(run.path.stat().st_mtime))


# === The code of a run ============================================================================


def source_of(log: bytes, code_sha256: str | None, *paths: Path) -> bytes | None:
    """The readable code with a hash: the text at the head of a log, or a file; None without it."""
    at_head = source_at_head(log)
    if at_head is not None and sha256(at_head) == code_sha256:
        return at_head
    for path in paths or (ROOT / PACKED,):
        source = read_regular(path, MAX_LOG_BYTES)
        if sha256(source) == code_sha256:
            return source
    return None


def counted_by_logs(runs: list[Run]) -> CountedFiles | None:
    """What the folder of these runs will count; None where no source of theirs is known."""
    source = source_of(runs[0].path.read_bytes(), runs[0].facts.get("code_sha256"))
    if source is None or "model_bytes" not in runs[0].final:
        return None
    return CountedFiles([PACKED, ARTIFACT], packed_size(source))


# === Compliance ===================================================================================


def proved_by_logs(runs: list[Run], sizes: list[dict[str, int]]) -> dict[str, bool]:
    """What the logs of all runs prove, in the field's names; what they do not tell is left out."""
    flags = {}
    for name, budget in (("train_under_600s", "train"), ("eval_under_600s", "eval")):
        seconds = [run.budget_seconds(budget) for run in runs]
        if None not in seconds:
            flags[name] = max(seconds) <= LIMIT_SECONDS
    total = largest(sizes, "artifact_bytes")
    if total is not None:
        flags["artifact_under_16mb"] = total <= LIMIT_BYTES
    if len({run.seed for run in runs}) >= 3:
        flags["three_seeds"] = True
    return flags


def proved_by_audits(runs: list[Run], compliance: Compliance) -> dict[str, bool]:
    """The audited properties, under the field's names too where these apply to the runs."""
    does_not_apply = set()
    if not any(run.score_of("adapted") for run in runs):
        does_not_apply.add("score_first_ttt")
    if any(run.config.get("tilt_order", "0") != "0" for run in runs):
        does_not_apply.add("no_ngram_cache")
    flags = {}
    for name, shown_by in SHOWN_BY_AUDIT.items():
        if shown_by in compliance.flags and name not in does_not_apply:
            flags[name] = compliance.flags[shown_by]
    return flags | compliance.flags


VERDICT = Entry("true, false or null", lambda v: v is None or type(v) is bool)
EVIDENCE = Entry("a text or a number", lambda v: TEXT_LINE.fits(v) or NUMBER.fits(v))
AUDIT = {
    "artifact_sha256?": TEXT_LINE,
    "properties": {"*": {"passed?": VERDICT, "evidence?": EVIDENCE}},
}


def read_compliance(runs: list[Run], audits: list[Path]) -> Compliance:
    """Flags of the properties that an audit of every run's artifact has looked at, and no others.

    `audits`: files audit.json; without any, those in the runs' folders count. Raises UsageError
    where one of them cannot be read.
    """
    paths = audits or [path for path in map(audit_of_run, runs) if path]
    return compliance_of(runs, [read_audit(path) for path in paths])


def compliance_of(runs: list[Run], audits: list[Audit]) -> Compliance:
    """The flags by audits that were read."""
    properties_of = dict(audits)
    of_runs = [properties_of.get(run.final.get("artifact_sha256") or "none", {}) for run in runs]
    flags = {}
    evidence = {}
    for name in of_runs[0]:
        if not all(name in properties for properties in of_runs):
            continue
        passed = [properties[name].get("passed") for properties in of_runs]
        # None means that nobody has looked; a failure counts even so.
        if None in passed and False not in passed:
            continue
        flags[name] = all(verdict is True for verdict in passed)
        evidence[name] = {
            str(run.seed): properties[name].get("evidence")
            for run, properties in zip(runs, of_runs, strict=True)
        }
    return Compliance(flags, evidence)


def audit_of_run(run: Run) -> Path | None:
    """The audit.json in the run's folder, if there is one."""
    folder = run_folder(run)
    path = folder / "audit.json" if folder else None
    return path if path and path.is_file() else None


def read_audit(path: Path) -> Audit:
    """The audit in a file. Raises UsageError if it cannot be read."""
    try:
        audit = read_json(path, AUDIT)
    except OSError as error:
        raise UsageError(reason_of(error)) from error
    except UsageError as error:
        raise UsageError(f"{error}: is no audit with `properties`") from error
    return audit.get("artifact_sha256"), audit["properties"]


def audit_of_text(text: str) -> Audit:
    """The audit in a text. Raises LogError if it is none."""
    try:
        audit = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LogError(f"is no JSON ({error})") from error
    if fault := fault_in(audit, AUDIT):
        raise LogError(f"is no audit with `properties`: {fault}")
    return audit.get("artifact_sha256"), audit["properties"]
