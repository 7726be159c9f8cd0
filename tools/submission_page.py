"""README.md of a submission folder: what reviewers of the challenge look for."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from packed_code import PACKED, READABLE
from run_documents import DOCUMENTS
from runlog import STAGES, Run, evaluation_variables, variables_of
from submission import CONDITIONS, seed_order
from tables import DASH, markdown_table, show


def make_readme(
    claim: dict[str, Any], runs: list[Run], artifact: str | None, sizes: dict[str, int], log: str
) -> bytes:
    """The page. `artifact` is the name of the weights' file where the folder holds it, `sizes` are
    the bytes of the folder's files, and `log` is that of the run that made the artifact.
    """
    parts = [
        f"# {claim['name'] or 'Submission'}",
        claim["blurb"],
        headline(claim),
        results(runs, claim),
        *difference(claim["comparison"]),
        "## Files",
        files_section(claim, artifact, sizes),
        "## Train",
        train_section(runs[0]),
        "## Score the artifact",
        score_section(artifact, log),
        "## Quantisation and adaptation",
        methods_section(runs[0]),
        "## Compliance",
        compliance_section(claim),
        "## Credits",
        credits_section(runs[0]),
    ]
    return ("\n\n".join(filter(None, parts)) + "\n").encode()


def headline(claim: dict[str, Any]) -> str:
    """The score with its deviation, data and hardware."""
    deviation = ""
    if claim["val_bpb_std"] is not None:
        number = len(claim["seeds"])
        deviation = f" (mean of {number} seeds, standard deviation {claim['val_bpb_std']:.5f})"
    track = f" Track {claim['track']}." if claim["track"] else ""
    return (
        f"**val_bpb {claim['val_bpb']:.5f}**{deviation} on {claim.get('dataset', 'unknown data')}, "
        f"{claim['hardware']}.{track}"
    )


def results(runs: list[Run], claim: dict[str, Any]) -> str:
    """A row per seed."""
    rows = []
    for run in sorted(runs, key=seed_order):
        result = claim["seed_results"][str(run.seed)]
        stages = [run.score_of(kind) for kind in ("before", "after")]
        rows.append(
            [
                str(run.seed),
                f"{run.score.bpb:.5f}",
                f"{run.score.loss:.5f}",
                *(show(score.bpb if score else None, ".5f") for score in stages),
                show(run.steps, "d"),
                show(run.step_avg_ms, ".1f"),
                show(result.get("artifact_bytes"), ","),
                show(result.get("train_time_s"), ".1f"),
                show(result.get("eval_time_s"), ".1f"),
            ]
        )
    head = ["seed", "val_bpb", "val_loss", STAGES["before"], STAGES["after"], "steps", "ms/step"]
    table = markdown_table([*head, "code + model bytes", "training s", "evaluation s"], rows)
    left = [f"Seed {run.seed}: {note}." for run in runs for note in run.left_by_deadline]
    return "\n\n".join([table, *left])


def difference(comparison: dict[str, Any] | None) -> list[str]:
    """Where there is a baseline, the difference to it and how sure it is."""
    if not comparison:
        return []
    word = "better" if comparison["delta_bpb"] < 0 else "worse"
    p = comparison["p_value"]
    nats = comparison["delta_nats"]
    text = f"{abs(comparison['delta_bpb']):.5f} bpb"
    text += f" ({abs(nats):.5f} nats per token)" if nats is not None else ""
    test = "one run a side shows no p" if p is None else f"p {p:.3g}, one-sided Welch test"
    return [
        f"Against the baseline in `baseline/`, val_bpb {comparison['baseline_val_bpb']:.5f} of "
        f"{len(comparison['baseline_seeds'])} runs: {word} by {text}, {test}."
    ]


def files_section(claim: dict[str, Any], artifact: str | None, sizes: dict[str, int]) -> str:
    """What counts against the limit and what does not."""
    weights = (
        f"and `{artifact}` ({sizes[artifact]:,} bytes)"
        if artifact
        else f"and the artifact of a run (at most {claim['bytes_model_max']:,} bytes), not included"
    )
    documents = (
        f"`{DOCUMENTS}` holds the score of every document; its hash is in the log of that run.\n"
        if DOCUMENTS in sizes
        else ""
    )
    return (
        f"Counted: `{PACKED}` ({sizes[PACKED]:,} bytes, packed) {weights}: "
        f"{claim['bytes_total']:,} of {claim['bytes_limit']:,} bytes.\n"
        f"`{READABLE}` is the same program for readers; `tools/pack.py --check` of its repository "
        f"proves it.\n{documents}Tokenizer: the SentencePiece model with SHA-256 "
        f"`{claim.get('tokenizer_sha256', '?')}`."
    )


def train_section(run: Run) -> str:
    """The command that trains this system again."""
    knobs = variables_of(run.settings)
    knobs.pop("SEED", None)
    return (
        "Once per seed; DATA holds `datasets/` and `tokenizers/`:\n\n```\n"
        f"{in_shell(knobs)} SEED={run.seed} DATA_DIR=DATA {launcher(run)} {PACKED}\n```"
    )


def launcher(run: Run) -> str:
    """How the run was started."""
    ranks = run.facts.get("world_size", 1)
    return "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"


def in_shell(variables: dict[str, str]) -> str:
    """Variables as a shell takes them before a command."""
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())


def score_section(artifact: str | None, log: str) -> str:
    """The command that scores the artifact alone."""
    knobs = in_shell(evaluation_variables(log))
    weights = f"FOLDER/{artifact}" if artifact else "ARTIFACT"
    which = "" if artifact else ", ARTIFACT what training leaves in runs/"
    return (
        f"In an empty directory; FOLDER is this folder{which}, DATA holds `datasets/` and "
        "`tokenizers/`:\n\n```\n"
        f'env -i PATH="$PATH" {knobs} DATA_DIR=DATA EVAL_ONLY_PATH={weights} '
        f"python FOLDER/{PACKED}\n```"
    )


def methods_section(run: Run) -> str:
    """The knobs of quantisation and of adaptation, as the log states them."""
    lines = []
    for title, words in (("quantisation", QUANTISATION), ("adaptation", ADAPTATION)):
        known = [f"{name.upper()}={run.config[name]}" for name in words if name in run.config]
        lines.append(f"- {title}: {', '.join(f'`{knob}`' for knob in known) or DASH}")
    if run.gain is not None:
        lines.append(f"- adaptation won {run.gain:.5f} bpb over the best plain score")
    return "\n".join(lines)


QUANTISATION = ("matrix_bits", "embed_bits", "matrix_clip_sigmas", "gptq_calibration_batches")
ADAPTATION = ("ttt_enabled", "ttt_mode", "ttt_chunk_size", "ttt_lora_rank", "ttt_lora_lr", "ttt_lr")


def compliance_section(claim: dict[str, Any]) -> str:
    """The limits by the logs, and the four conditions by the audit."""
    flags = claim["compliance"]
    limits = ("train_under_600s", "eval_under_600s", "artifact_under_16mb")
    rows = [[name.replace("_", " "), verdict(flags, (name,)), "logs"] for name in limits]
    for name, asks, properties in CONDITIONS:
        shown_by = f"audit: {', '.join(properties)}"
        rows.append([f"{name}. {asks}", verdict(flags, properties), shown_by])
    return markdown_table(["condition", "holds", "shown by"], rows)


def verdict(flags: dict[str, bool], names: tuple[str, ...]) -> str:
    """Whether all flags hold; "not shown" where one was not looked at."""
    if any(flags.get(name) is False for name in names):
        return "**no**"
    return "yes" if all(name in flags for name in names) else "not shown"


def credits_section(run: Run) -> str:
    """Whose work the run builds on."""
    return "\n".join(credit_lines(run))


def credit_lines(run: Run) -> Iterator[str]:
    """A line on the preset, and one on the challenge."""
    preset = str(run.facts.get("preset", ""))
    if preset.startswith("pr"):
        yield f"- the system of PR #{preset.removeprefix('pr')} of openai/parameter-golf, rebuilt"
    elif preset == "record":
        yield "- the system of PR #2135 of openai/parameter-golf, rebuilt"
    yield f"- each part of `{READABLE}` names the pull request or the paper that it comes from"
