"""submission.json: its one schema, for report.py (from logs) and pack.py (from logs and files).

Every figure comes from the logs and, where there is a folder to submit, from the files that count.
Only the fields of `Claimant` are given by hand. The names are those of the public records.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from run_documents import run_folder
from run_statistics import mean_and_sd
from runlog import Run

from train_gpt import LIMIT_BYTES, NUMBER, TEXT_LINE, Entry, UsageError, read_json, reason_of

# Kind of a score -> its name in submission.json.
SCORE_NAMES = {
    "before": "pre_quantization",
    "after": "quantized",
    "sliding": "sliding",
    "adapted": "adapted",
}


class Claimant(NamedTuple):
    """What no log can tell about a claim."""

    author: str = ""
    github_id: str = ""
    name: str = ""  # what was run, on which data and hardware
    blurb: str = ""
    date: str = ""  # day of the runs, YYYY-MM-DD
    track: str = ""


class CountedFiles(NamedTuple):
    """The files of a folder that count against the limit."""

    names: list[str]  # code and artifact
    code_bytes: int  # of the packed code, in place of the code that the runs counted


class Compliance(NamedTuple):
    """What audits of every run's very artifact have shown."""

    flags: dict[str, bool]  # property -> whether all runs have it
    evidence: dict[str, dict[str, Any]]  # property -> seed -> evidence


def build_submission(
    runs: list[Run],
    claimant: Claimant,
    counted: CountedFiles | None = None,
    compliance: Compliance | None = None,
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
    return {
        **claimant._asdict(),
        "val_loss": loss.mean,
        "val_bpb": bpb.mean,
        "val_loss_std": loss.sd,
        "val_bpb_std": bpb.sd,
        "counted_files": counted.names if counted else None,
        "bytes_total": largest(sizes, "artifact_bytes"),
        "bytes_limit": LIMIT_BYTES,
        "bytes_code": sizes[0].get("code_bytes"),
        "bytes_model_max": largest(sizes, "model_bytes"),
        "hardware": hardware,
        "pytorch_version": pytorch_version,
        **facts,
        "seeds": [run.seed for run in runs],
        "seed_results": {
            str(run.seed): seed_result(run, size) for run, size in zip(runs, sizes, strict=True)
        },
        "compliance": compliance.flags if compliance else {},
        "compliance_evidence": compliance.evidence if compliance else {},
    }


def seed_order(run: Run) -> tuple[bool, int]:
    """Sorts runs by seed, those without one last."""
    return run.seed is None, run.seed or 0


def counted_sizes(run: Run, counted: CountedFiles | None) -> dict[str, int]:
    """Bytes and tokens of a run. The limit is for `artifact_bytes`, the sum of code and model."""
    sizes = dict(run.sizes)
    if "model_bytes" in run.final:
        sizes["model_bytes"] = run.final["model_bytes"]
    if counted:
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
    result["steps"] = run.steps
    result |= sizes
    result["step_avg_ms"] = run.step_avg_ms
    for budget in ("train", "eval"):
        seconds = run.budget_seconds(budget)
        if seconds is not None:
            result[f"{budget}_seconds"] = round(seconds, 3)
    result["seconds"] = {phase.name: round(phase.seconds, 3) for phase in run.phases}
    result["artifact_sha256"] = run.final.get("artifact_sha256")
    return result


def as_bytes(submission: dict[str, Any]) -> bytes:
    """The content as it stands in the file."""
    return (json.dumps(submission, indent=2) + "\n").encode()


# === Compliance: what audits have shown ===========================================================


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
    properties_of = dict(map(read_audit, paths))
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


def read_audit(path: Path) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """(hash of the artifact, properties) of an audit. Raises UsageError if it cannot be read."""
    try:
        audit = read_json(path, AUDIT)
    except OSError as error:
        raise UsageError(reason_of(error)) from error
    except UsageError as error:
        raise UsageError(f"{error}: is no audit with `properties`") from error
    return audit.get("artifact_sha256"), audit["properties"]
