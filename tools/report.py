"""From logs to a defended result: `report.py LOG...`, one row per run, then mean, deviation and what they allow to say.

    report.py logs/*_seed*.txt                                    # the table, on the terminal
    report.py new*.txt --baseline old*.txt                        # is the difference real? is it a record?
    report.py logs/*.txt --html out.html --png pictures           # curves, budgets, losses by length and position
    report.py logs/*.txt --markdown README.md --submission submission.json --name "what was run"
    report.py --compare logs/compare-*.txt                        # presets side by side, as `make compare` runs them

It reads the logs of train_gpt.py (the one `final {json}` line, the phase table, the config) and those of the public
records (Hyperparameters or key:value headers, `LABEL val_loss:X val_bpb:Y`, whatever the label).

Only runs of one code and one configuration are seeds of one claim. Others are refused with the knobs that differ;
--mixed takes them all the same and gives mean and deviation per configuration too. A log given twice is always refused.
--compare takes other presets and knobs, a row each over its seeds, but one code, one data set, one budget of training
and one machine. Logs of runs that did not finish are left out and named, but for --submission, which refuses them.

Bytes: val_loss, val_bpb and the number of tokens imply how many bytes were counted. Every score line is checked against
the run's own val_bytes and against the canonical validation sets; a denominator 0.01 % off is INVALID (exit status 1).

Difference (--baseline): Welch's test between the two sets of runs, one-sided, in nats and in bits per byte. Two bars:
better at all (p < 0.01; the public frontier has accepted 0.25), and the record bar, more than 0.005 nats per token
better at p < 0.01, which tests against the shifted hypothesis. `runs a side` is how many would show a true difference
of the size seen with 80 % power, if both spreads stay as they are. Scores of different validation texts are refused.

Pairs are sharper by far. Runs of one artifact (same hash: only the evaluation differs), else runs of one seed, are
compared pair by pair. Where the folders of two such runs (runs/<RUN_ID>, next to the logs' folder) hold losses per
document, a .npz with `doc_nats` and `doc_bytes`, they are compared document by document as well: that shows whether a
difference holds over texts, not over seeds. `doc_tokens`, and `pos_nats`, `pos_tokens` (sums per position bin) with
`pos_edges`, make the charts by length and by position.

Exit status: 0 done, 1 a score is INVALID, 2 wrong input (one line).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from common import PUBLISHED as CANONICAL  # noqa: E402

from train_gpt import LIMIT_BYTES, UsageError, write_atomic  # noqa: E402

LIMIT_SECONDS = 600.0  # of training and, apart from it, of evaluation
BAR_NATS, ALPHA, PRACTICE = (
    0.005,
    0.01,
    0.25,
)  # the record rule; the p that the public frontier has accepted
STAGES = {
    "before": "before quantisation",
    "after": "quantised",
    "sliding": "sliding window",
    "adapted": "adapted",
}
TOLERANCE = (
    1e-4  # of the bytes: dropped tails make 4e-5 at usual lengths, the smallest known fault 1e-2
)
WHOLE = 1e-3  # of the tokens: what may be missing, or more, where the validation set still counts as the canonical one
FACTS = "code_sha256 dataset val_sha256 tokenizer_sha256 preset device torch world_size".split()
# Settings that say where and which, not what: they may differ between the seeds of one claim.
VOLATILE = set(
    """seed run_id logfile artifact_dir model_path quantized_model_path ttt_output_dir tensorboard_dir
    checkpoint_every rank local_rank is_main_process eval_only_path data_dir""".split()
)


# === Reading logs =====================================================================================================
@dataclasses.dataclass
class Stage:  # one complete score
    label: str
    loss: float  # nats per token
    bpb: float
    seconds: float | None
    decimals: int  # of the printed figures

    @property
    def kind(self) -> str:
        rules = (
            ("ttt", "adapted"),
            ("sliding", "sliding"),
            ("pre-quant", "before"),
            ("post_ema", "before"),
        )
        return next((kind for word, kind in rules if word in self.label.lower()), "after")


@dataclasses.dataclass
class Run:
    path: Path
    seed: int | None
    config: dict[str, str]
    given: set[str]  # the settings that came from the environment
    facts: dict[str, Any]  # what makes two runs comparable: code, data, hardware
    steps: int | None
    train_seconds: float | None
    stages: list[Stage]
    phases: list[tuple[str, float, str]]  # name, seconds, budget: train, eval or none
    limits: dict[str, float]
    sizes: dict[
        str, int
    ]  # artifact_bytes, code_bytes, val_tokens, val_bytes, val_docs as far as known
    points: list[
        dict[str, float]
    ]  # step and what its lines say: train_loss, val_bpb, seconds, lr_scale
    final: dict[str, Any]
    group: str = ""  # the differing knobs, where configurations are mixed
    label: str = ""  # what tells it from the other runs of a report
    stale: str = ""  # why the losses per document in its folder were not taken

    @property
    def score(self) -> Stage:
        return self.stages[-1]

    @property
    def ms_per_step(self) -> float | None:
        return 1000 * self.train_seconds / self.steps if self.train_seconds and self.steps else None

    def stage(self, kind: str) -> Stage | None:
        return next((s for s in reversed(self.stages) if s.kind == kind), None)

    @property
    def gain(
        self,
    ) -> (
        float | None
    ):  # bits per byte won by adaptation over the best plain score of the same weights
        plain, adapted = self.stage("sliding") or self.stage("after"), self.stage("adapted")
        return plain.bpb - adapted.bpb if plain and adapted else None

    def spent(self, budget: str) -> float | None:
        seconds = [s for _, s, b in self.phases if b == budget]
        return sum(seconds) if seconds else None

    def over(self) -> list[str]:  # which limits the run broke
        broken = [
            f"{b} {self.spent(b):.1f} s of {limit:g}"
            for b, limit in self.limits.items()
            if 0 < limit < (self.spent(b) or 0)
        ]
        size = self.sizes.get("artifact_bytes", 0)
        return broken + [f"{size:,} bytes of {LIMIT_BYTES:,}"] * (size > LIMIT_BYTES)

    @cached_property
    def folder(self) -> Path | None:  # where the run left its files, if it is here
        names = [
            self.config.get("artifact_dir", ""),
            f"runs/{self.final.get('run_id') or self.path.stem}",
        ]
        roots = [Path(), self.path.parent, self.path.parent.parent]
        return next((r / n for n in names if n for r in roots if (r / n).is_dir()), None)

    @cached_property
    def documents(
        self,
    ) -> dict[str, np.ndarray]:  # doc_nats, doc_bytes and what lies beside them, of the run's score
        for path in sorted(self.folder.glob("*.npz")) if self.folder else []:
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    found = {name: arrays[name] for name in arrays.files}
            except (ValueError, zipfile.BadZipFile) as error:
                raise UsageError(f"{path}: cannot be read ({error})") from error
            if {"doc_nats", "doc_bytes"} <= set(found):
                bpb = (
                    float(found["doc_nats"].sum())
                    / math.log(2)
                    / max(float(found["doc_bytes"].sum()), 1.0)
                )
                if abs(bpb / self.score.bpb - 1) < TOLERANCE:
                    return found
                self.stale = f"{path} adds up to {bpb:.5f} bpb, another score: left out"
        return {}

    def lines(
        self,
    ) -> dict[str, Any]:  # training curves: name -> points along step, seconds and tokens
        seen = sorted((p for p in self.points if p["step"] > 0), key=lambda p: p["step"])
        batch = (
            self.final["train_tokens"] / self.steps
            if self.steps and "train_tokens" in self.final
            else float(self.config.get("train_batch_tokens") or 0)
        )
        timed = [p for p in seen if p.get("seconds")]
        speed = [
            {**b, "speed": batch * (b["step"] - a["step"]) / (b["seconds"] - a["seconds"])}
            for a, b in itertools.pairwise(timed)
            if batch and b["seconds"] > a["seconds"]
        ]
        curves = {}
        for key, points in dict(train_loss=seen, val_bpb=seen, lr_scale=seen, speed=speed).items():
            kept = [p for p in points if key in p]
            clock = fill([p["step"] for p in kept], [(p["step"], p["seconds"]) for p in timed])
            curves[key] = {
                "step": [p["step"] for p in kept],
                "seconds": clock,
                "y": [p[key] for p in kept],
                "tokens": [p["step"] * batch for p in kept],
            }
        return curves


def fill(
    steps: list[float], known: list[tuple[float, float]]
) -> list[float]:  # seconds at steps, between known ones
    xs, ys = zip(*known, strict=True) if known else ((0.0,), (0.0,))
    return [float(y) for y in np.interp(steps, (0.0, *xs), (0.0, *ys))]


NUMBER = r"(?:\d+\.?\d*(?:e[-+]?\d+)?)"
SCORE = re.compile(
    rf"^(\S.*?) val_loss:({NUMBER}) val_bpb:({NUMBER})(?:.*? eval_time:({NUMBER})ms)?"
)
STEP = re.compile(r"^(?:step:)?(\d+)/(\d+) (?=.*(?:train|val)_loss)")
PAIR = re.compile(rf"([\w/]+): ?({NUMBER})(ms|m|s)?(?= |$)")
SETTING = re.compile(r"^  (\w+): ?(.*?)(?: \([a-z]+\))?$")
HEADER = re.compile(r"^\w+:\S+(?: \w+:\S+)*$")
PHASE = re.compile(r"^(\S.*?) +([\d.]+)  (train|eval|none)$")
LIMIT = re.compile(r"^all of (train|eval) +[\d.]+  of (\d+)")
SIZES = {
    "artifact_bytes": re.compile(r"Total submission size.*?: (\d+) bytes"),
    "code_bytes": re.compile(r"Code size.*?: (\d+) bytes"),
    "val_tokens": re.compile(r"(?:val_tokens: ?|val_loader:.* tokens:)(\d+)"),
}


def read_settings(lines: list[str]) -> dict[str, str]:
    """The block under `Hyperparameters:`; without one, the key:value words before the first step."""
    if "Hyperparameters:" in lines:
        block = itertools.takewhile(
            SETTING.match, lines[len(lines) - lines[::-1].index("Hyperparameters:") :]
        )
        return {m[1]: m[2] for m in map(SETTING.match, block)}
    head = itertools.takewhile(lambda line: not re.match(r"(warmup_)?step:|\d+/\d+ ", line), lines)
    words = [word.split(":", 1) for line in head if HEADER.match(line) for word in line.split(" ")]
    found = dict(words)
    found.pop("model_params", None)
    if ":" in (loader := found.pop("train_loader", "")):
        found["dataset"] = loader.split(":")[1]
    return {name: value for name, value in found.items() if name not in ("val_bpb", "val_loader")}


def read_points(lines: list[str], batch: float) -> list[dict[str, float]]:
    """What the lines of a step say. Where a log gives minutes, its mean tokens per second tell the seconds. A run that
    was started anew counts its steps from further back: what was made of them before is gone, and so are its lines."""
    points: dict[int, dict[str, float]] = {}
    for line in lines:
        if not (m := STEP.match(line)):
            continue
        found = {key: (float(value), unit) for key, value, unit in PAIR.findall(line[m.end() :])}
        if (step := int(m[1])) < next(reversed(points), 0):
            points = {known: point for known, point in points.items() if known < step}
        point = points.setdefault(step, {"step": step})
        point |= {
            key: value
            for key, (value, _) in found.items()
            if key in ("train_loss", "val_bpb", "lr_scale")
        }
        time, unit = found.get("train_time", (0.0, ""))
        if unit == "m" and found.get("tok/s", (0,))[0]:
            point["seconds"] = step * batch / found["tok/s"][0]
        elif unit in ("ms", "s"):
            point["seconds"] = time / (1000 if unit == "ms" else 1)
    return list(points.values())


def read_stages(lines: list[str], final: dict[str, Any]) -> list[Stage]:
    """Complete scores in order. An `_exact` line replaces its rounded twin; the final line has all digits."""
    stages: dict[str, Stage] = {}
    for line in lines:
        if not (m := SCORE.match(line)) or STEP.match(line) or ":" in m[1]:
            continue
        label = m[1].removesuffix("_exact")
        seconds = float(m[4]) / 1000 if m[4] else stages[label].seconds if label in stages else None
        key = label.removeprefix("diagnostic ").split()[0].replace("-", "_")
        loss, bpb = final.get(f"{key}_loss", float(m[2])), final.get(f"{key}_bpb", float(m[3]))
        decimals = 15 if f"{key}_bpb" in final else len(m[3].split(".")[-1])
        stages.pop(label, None)
        stage = Stage(label, loss, bpb, seconds, decimals)
        if (stage.kind, loss, bpb) not in [
            ("after", s.loss, s.bpb) for s in stages.values() if s.kind == "sliding"
        ]:
            stages[label] = stage  # but for that echo of older logs, under the baseline's label
    if final and not stages:  # a log cut down to its last line
        kinds = [
            key.removesuffix("_bpb") for key in final if f"{key.removesuffix('_bpb')}_loss" in final
        ]
        ordered = sorted(
            {k for k in kinds if k != "val"}, key=lambda k: ("pre" not in k, "ttt" in k)
        )
        stages = {
            k: Stage(
                k.replace("pre_quant", "pre-quant"), final[f"{k}_loss"], final[f"{k}_bpb"], None, 15
            )
            for k in ordered or ["val"]
        }
    return list(stages.values())


def read_phases(
    lines: list[str], final: dict[str, Any], stages: list[Stage], train: float | None
) -> list[tuple]:
    """(name, seconds, budget). Published logs have no phase table: what they time is put against the same budgets."""
    if final:
        budgets = {m[1]: m[3] for m in map(PHASE.match, lines) if m}
        guess = {
            "score pre_quantization": "none",
            "train": "train",
            "calibrate": "train",
            "quantise": "train",
            "pack": "train",
        }
        spent, order = final.get("seconds", {}), list(budgets)
        names = sorted(
            spent, key=lambda n: order.index(n) if n in budgets else len(order)
        )  # JSON sorted them by name
        default = {n: guess.get(n, "eval" if n.startswith("score") else "none") for n in names}
        return [(n, spent[n], budgets.get(n, default[n])) for n in names]
    phases = [("train", train, "train")] if train else []
    for line in lines:
        if m := re.match(rf"GPTQ:collected \d+ Hessians in ({NUMBER})s", line):
            phases.append(("calibrate", float(m[1]), "train"))
        elif m := re.match(rf"ttt_lora:compile warmup done \(({NUMBER})s\)", line):
            phases.append(("adaptation warm-up", float(m[1]), "none"))
    timed = [s for s in stages if s.seconds is not None]
    return phases + [
        (f"score {STAGES[s.kind]}", s.seconds, "none" if s.kind == "before" else "eval")
        for s in timed
    ]


def read_sizes(lines: list[str], final: dict[str, Any]) -> dict[str, int]:  # what is known of SIZES
    found = {name: final[name] for name in (*SIZES, "val_bytes", "val_docs") if name in final}
    for line in lines:
        for name, pattern in SIZES.items():
            if name not in found and (m := pattern.match(line)):
                found[name] = int(m[1])
    return found


def read_run(path: Path) -> Run:
    """Raises UsageError where the file is not the log of one finished run."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [re.sub(r"^\d{10}\.\d+ ", "", line) for line in text.splitlines()]
    finals = [line.removeprefix("final ") for line in lines if line.startswith("final {")]
    ours = bool(finals) or any(line.startswith("code_sha256: ") for line in lines)
    if ours and len(finals) != 1:
        raise UsageError(
            f"{path}: has {len(finals)} final lines, the log of a finished run has one"
        )
    try:
        final = json.loads(finals[0]) if finals else {}
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: its final line is no JSON ({error})") from error
    config, stages = read_settings(lines), read_stages(lines, final)
    if not stages or not all(0 < s.bpb < math.inf and 0 < s.loss < math.inf for s in stages):
        raise UsageError(
            f"{path}: holds no score, or one that is not a positive number: no log of a finished run"
        )
    batch = float(config.get("train_batch_tokens") or 0)
    points = read_points(lines, batch)
    last = [
        m for m in (re.match(r"stopping.*?train_time: ?(\d+)ms.*", line) for line in lines) if m
    ]
    step = re.search(r"step: ?(\d+)", last[-1][0]) if last else None
    steps = final.get("steps") or (
        int(step[1]) if step else max((p["step"] for p in points), default=None)
    )
    train = (
        float(last[-1][1]) / 1000
        if last
        else max((p["seconds"] for p in points if "seconds" in p), default=None)
    )
    dataset = (
        final.get("dataset") or config.get("dataset") or Path(config.get("datasets_dir", "")).name
    )
    facts = {key: final[key] for key in FACTS if key in final} | (
        {"dataset": dataset} if dataset else {}
    )
    code = [m[1] for m in (re.match(r"Code size.*?: (\d+) bytes", line) for line in lines) if m]
    if not final and code:
        facts["code_size"] = "/".join(code)  # the only trace of the code in a published log
    named = re.search(r"seed[_-]?(\d+)", path.stem)
    seed = final.get("seed", config.get("seed", named and named[1]))
    limits = {m[1]: float(m[2]) for m in map(LIMIT.match, lines) if m}
    given = {m[1] for m in (re.match(r"  (\w+): .* \(env\)$", line) for line in lines) if m}
    return Run(
        path,
        None if seed is None else int(seed),
        config,
        given,
        facts,
        steps,
        train,
        stages,
        read_phases(lines, final, stages, train),
        {"train": LIMIT_SECONDS, "eval": LIMIT_SECONDS, **limits},
        read_sizes(lines, final),
        points,
        final,
    )


def read_finished(paths: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs, and what is wrong with the logs left out. Raises UsageError where that leaves none."""
    runs, left_out = [], []
    for path in paths:
        try:
            runs.append(read_run(path))
        except UsageError as error:
            left_out.append(str(error))
    if left_out and not runs:
        raise UsageError(left_out[0])
    return runs, left_out


# === Checks: one claim, one denominator ===============================================================================
def differences(runs: list[Run]) -> dict[str, list[str]]:
    """Name -> each run's value, of every fact and setting that is not the same in all; of paths the last part."""

    def value(run: Run, name: str) -> str:
        text = str(run.facts.get(name, run.config.get(name, "-")))
        if "sha256" in name:
            return text[:12]
        with contextlib.suppress(ValueError):
            return format(float(text), ".12g")
        return Path(text).name if "/" in text and name != "code_size" else text

    names = dict.fromkeys(
        name for run in runs for name in (*run.facts, *run.config) if name not in VOLATILE
    )
    table = {name: [value(run, name) for run in runs] for name in names}
    return {name: values for name, values in table.items() if len(set(values)) > 1}


def check_claim(runs: list[Run], mixed: bool) -> dict[str, list[str]]:
    """Refuses what is no set of seeds of one claim; with `mixed` sorts the runs into groups instead. Returns the
    differences. A log twice would count one run as two, whatever the user wants."""
    digests: dict[str, Path] = {}
    for run in runs:
        digest = hashlib.sha256(run.path.read_bytes()).hexdigest()
        if digest in digests:
            raise UsageError(f"{run.path}: is the same log as {digests[digest]}")
        digests[digest] = run.path
    found = differences(runs)
    shown = "; ".join(f"{n}: {', '.join(dict.fromkeys(v))}" for n, v in found.items())
    if found and not mixed:
        raise UsageError(
            f"not seeds of one claim, {runs[0].path} and others: {shown}; --mixed takes them all the same"
        )
    for i, run in enumerate(runs):
        run.group = " ".join(
            f"{n.upper() if n in run.config else n}={v[i]}" for n, v in found.items()
        )
    seeds = [(run.group, run.seed) for run in runs if run.seed is not None]
    if not mixed and (twice := [seed for _, seed in seeds if seeds.count(("", seed)) > 1]):
        paths = ", ".join(str(run.path) for run in runs if run.seed == twice[0])
        raise UsageError(
            f"seed {twice[0]}: is in more than one log ({paths}); --mixed takes them all the same"
        )
    return found


def implied_bytes(run: Run, stage: Stage) -> tuple[float, float, str]:
    """(bytes per token that loss and bpb imply, the right one or nan, whose). A canonical set counts by its own number
    of tokens or by the run's, whichever fits: some logs drop a tail, some tokenise a little differently."""
    implied, tokens = stage.loss / math.log(2) / stage.bpb, run.sizes.get("val_tokens")
    by_tokens = [c for c in CANONICAL if tokens and abs(tokens / c - 1) < WHOLE]
    by_name = [
        c for c, (name, _) in CANONICAL.items() if f"fineweb10B_{name}" == run.facts.get("dataset")
    ]
    for count in by_tokens[:1] or by_name:
        name, size = CANONICAL[count]
        rights = [size / count, *(size / tokens for _ in by_tokens)]
        return implied, min(rights, key=lambda right: abs(right - implied)), f"canonical {name}"
    if tokens and run.sizes.get("val_bytes"):
        return implied, run.sizes["val_bytes"] / tokens, "the run's own val_bytes"
    near = {
        abs(size / count / implied - 1): (size / count, name)
        for count, (name, size) in CANONICAL.items()
    }
    right, name = near[min(near)]
    return (
        (implied, right, f"canonical {name}")
        if min(near) < TOLERANCE
        else (implied, math.nan, "no known set")
    )


def check_scores(run: Run) -> list[str]:
    """What is wrong with the denominators of the run's scores; empty if nothing is."""
    wrong, tokens = [], run.sizes.get("val_tokens")
    for stage in run.stages:
        implied, right, whose = implied_bytes(run, stage)
        ulp = 0.5 * 10.0**-stage.decimals
        if abs(implied / right - 1) > TOLERANCE + ulp / stage.loss + ulp / stage.bpb:
            wrong.append(
                f"{stage.label}: implies {implied:.5f} bytes a token, x{implied / right:.4f} of {whose}, "
                f"{right:.5f}"
            )
    dataset = str(run.facts.get("dataset", ""))
    whole = next((t for t, (n, _) in CANONICAL.items() if dataset == f"fineweb10B_{n}"), None)
    if whole and tokens and tokens < whole * (1 - WHOLE):
        wrong.append(f"covers {tokens:,} validation tokens, {tokens / whole:.1%} of {dataset}")
    if "val_bpb" in run.final and run.final["val_bpb"] != run.score.bpb:
        wrong.append(
            f"final val_bpb {run.final['val_bpb']} is not that of the last score, {run.score.label}"
        )
    return wrong


def text_bytes(run: Run) -> float | None:  # of the validation text, as far as a log tells
    implied, right, whose = implied_bytes(run, run.score)
    if tokens := run.sizes.get("val_tokens"):
        return run.sizes.get("val_bytes") or tokens * (implied if math.isnan(right) else right)
    return {f"canonical {name}": float(size) for name, size in CANONICAL.values()}.get(whose)


def check_texts(new: list[Run], old: list[Run]) -> None:
    """Refuses scores of different texts, told apart by their bytes: tokenizers and dropped tails change tokens only."""
    for a, b in itertools.product(new, old):
        sizes = [text_bytes(run) for run in (a, b)]
        sets = [
            [str(run.facts.get(name, "?")) for name in ("val_sha256", "dataset")] for run in (a, b)
        ]
        near = abs(sizes[0] / sizes[1] - 1) <= WHOLE if all(sizes) else sets[0][1] == sets[1][1]
        if not near and (sets[0][0] != sets[1][0] or sets[0][0] == "?"):
            told = (
                f"{run.path} {name}" + (f" of {size:,.0f} bytes" if size else "")
                for run, (_, name), size in zip((a, b), sets, sizes, strict=True)
            )
            raise UsageError(
                f"not comparable, scores of different validation texts: {', '.join(told)}"
            )


# === Statistics =======================================================================================================
UNITS = {"nats": lambda run: run.score.loss, "bpb": lambda run: run.score.bpb}


def summarise(runs: list[Run]) -> dict[str, Any]:
    """Mean and sample deviation (n - 1) in both units, and the difference to as many such runs that shows."""
    from scipy import stats

    result: dict[str, Any] = {"runs": len(runs), "seeds": [run.seed for run in runs]}
    for unit, of in UNITS.items():
        values, n = [of(run) for run in runs], len(runs)
        sd = statistics.stdev(values) if n > 1 else None
        seen = stats.t.isf(ALPHA, 2 * n - 2) * sd * math.sqrt(2 / n) if sd is not None else None
        result[unit] = {
            "mean": statistics.fmean(values),
            "sd": sd,
            "resolves": seen and float(seen),
        }
    return result


def runs_needed(
    effect: float, sd_a: float, sd_b: float, alpha: float = ALPHA, power: float = 0.8
) -> int | None:
    """Runs a side with which a one-sided Welch test shows a true difference `effect`; None if more than 10,000."""
    from scipy import stats

    if effect <= 0 or sd_a + sd_b == 0:
        return None if effect <= 0 else 2
    n = np.arange(2, 10_001)
    df = (n - 1) * (sd_a**2 + sd_b**2) ** 2 / (sd_a**4 + sd_b**4)
    enough = (
        stats.nct.sf(stats.t.isf(alpha, df), df, effect / np.sqrt((sd_a**2 + sd_b**2) / n)) >= power
    )
    return int(n[enough.argmax()]) if enough.any() else None


def welch(new: list[float], old: list[float], bar: float) -> dict[str, Any] | None:
    """Both one-sided hypotheses on old - new: above 0, above `bar`. None without two runs a side and spread."""
    from scipy import stats

    if min(len(new), len(old)) < 2 or len({*new}) == len({*old}) == 1:
        return None
    sd = [statistics.stdev(side) for side in (new, old)]
    any_, record = (
        stats.ttest_ind(new, [v - shift for v in old], equal_var=False, alternative="less")
        for shift in (0.0, bar)
    )
    two = stats.ttest_ind(new, old, equal_var=False)
    gain = statistics.fmean(old) - statistics.fmean(new)
    low, high = (-x for x in two.confidence_interval(0.95)[::-1])
    return {
        "t": float(two.statistic),
        "df": float(two.df),
        "p_two_sided": float(two.pvalue),
        "ci95": [low, high],
        "p_better": float(any_.pvalue),
        "p_record": float(record.pvalue),
        "runs_for_better": runs_needed(gain, *sd),
        "runs_for_record": runs_needed(gain - bar, *sd),
    }


def paired(differences: np.ndarray) -> dict[str, Any]:  # of old - new, (n,)
    from scipy import stats

    n, spread = len(differences), differences.std(ddof=1) if len(differences) > 1 else 0.0
    result = {"pairs": n, "mean": float(differences.mean()), "sd": float(spread) if n > 1 else None}
    if n > 1 and spread > 0:
        test = stats.ttest_1samp(differences, 0.0, alternative="greater")
        result |= {
            "t": float(test.statistic),
            "df": n - 1,
            "p_better": float(test.pvalue),
            "p_two_sided": float(stats.ttest_1samp(differences, 0.0).pvalue),
        }
    return result


def pair_up(new: list[Run], old: list[Run]) -> tuple[str, list[tuple[Run, Run]]]:
    """(what they share, pairs): the artifact, else the seed; unique on both sides, or it makes no pair."""
    for name, key in (
        ("artifact", lambda r: r.final.get("artifact_sha256")),
        ("seed", lambda r: r.seed),
    ):
        sides = []
        for side in (new, old):
            keys = [key(run) for run in side]
            sides.append(
                {
                    k: run
                    for k, run in zip(keys, side, strict=True)
                    if k is not None and keys.count(k) == 1
                }
            )
        if common := [k for k in sides[0] if k in sides[1]]:
            return name, [(sides[0][k], sides[1][k]) for k in sorted(common)]
    return "", []


def compare_documents(pairs: list[tuple[Run, Run]]) -> dict[str, Any] | None:
    """Per-document differences, averaged over the pairs whose folders hold the same documents. None without any."""
    both = [(a.documents, b.documents) for a, b in pairs if a.documents and b.documents]
    sizes = both[0][0]["doc_bytes"].astype(np.float64) if both else None
    both = [(a, b) for a, b in both if all(np.array_equal(d["doc_bytes"], sizes) for d in (a, b))]
    if not both:
        return None
    gain = np.mean([b["doc_nats"].astype(np.float64) - a["doc_nats"] for a, b in both], axis=0)
    result = paired(gain)
    per_byte = 1 / math.log(2) / sizes.mean()  # nats a document -> bits per byte of the whole
    return {
        **result,
        "artifacts": len(both),
        "bpb": result["mean"] * per_byte,
        "better": float((gain > 0).mean()),
        "se_bpb": (result["sd"] or 0.0) / math.sqrt(len(gain)) * per_byte,
    }


def compare(new: list[Run], old: list[Run]) -> dict[str, Any]:
    """Everything about old - new (positive: the new runs are better), unit by unit, then by pairs and documents."""
    kind, pairs = pair_up(new, old)
    # The bar is in nats per token; what it makes in bits per byte depends on the tokenizer. Two: the stricter.
    ratios = [
        statistics.fmean(run.score.bpb / run.score.loss for run in side) for side in (new, old)
    ]
    result: dict[str, Any] = {"pair_by": kind, "documents": compare_documents(pairs), "nats": None}
    for unit, of in UNITS.items():
        if unit == "nats" and abs(ratios[0] / ratios[1] - 1) > WHOLE:
            continue  # a token of one tokenizer is not one of the other
        sides = [[of(run) for run in side] for side in (new, old)]
        bar = BAR_NATS * (max(ratios) if unit == "bpb" else 1)
        gain = np.array([of(b) - of(a) for a, b in pairs])
        result[unit] = {
            "difference": statistics.fmean(sides[1]) - statistics.fmean(sides[0]),
            "bar": bar,
            "welch": welch(*sides, bar),
            "paired": paired(gain) if len(gain) else None,
        }
    known = set(new[0].config) & set(old[0].config)
    changed = differences([new[0], old[0]])
    result["changed"] = {n: v for n, v in changed.items() if n in known or n in FACTS}
    return result


def count(n: int, word: str) -> str:
    return f"{n} {word}" + "s" * (n != 1)


def verdict(comparison: dict[str, Any], new: int, old: int) -> list[str]:
    """The comparison in words, one statement a line."""
    nats, bpb = comparison["nats"], comparison["bpb"]

    def both(form: str, of: Callable[[dict], float]) -> str:  # in both units, where both make sense
        return ", ".join(
            f"{of(x):{form}} {name}" for name, x in (("nats", nats), ("bpb", bpb)) if x
        )

    lines = [
        f"{'better' if bpb['difference'] > 0 else 'worse'} by {both('.5f', lambda x: abs(x['difference']))} "
        f"({count(new, 'run')} against {old})"
    ]
    if not nats:
        lines.append("another tokenizer: nats per token cannot be compared, bits per byte can")
    if not (w := bpb["welch"]):
        lines.append("Welch: needs two runs on each side, not all of one score")
    else:
        tests = (
            f"{name}: t {x['welch']['t']:.3f}, df {x['welch']['df']:.2f}, p {x['welch']['p_two_sided']:.3g}, 95 % "
            f"{x['welch']['ci95'][0]:+.5f} .. {x['welch']['ci95'][1]:+.5f}"
            for name, x in (("nats", nats), ("bpb", bpb))
            if x
        )
        lines.append(f"Welch, two-sided, {'; '.join(tests)}")
        record = f"record bar, {BAR_NATS} nats = {bpb['bar']:.5f} bpb"
        for title, p, need in (
            ("better at all", w["p_better"], w["runs_for_better"]),
            (record, w["p_record"], w["runs_for_record"]),
        ):
            state = (
                "passed"
                if p < ALPHA
                else f"not passed at {ALPHA}" + f" (passed at {PRACTICE})" * (p < PRACTICE)
            )
            more = need and max(need - new, 0)
            enough = (
                f"{need} runs a side would show it, {more} more"
                if need
                else "no number of runs would show it"
            )
            lines.append(f"{title}: p {p:.3g} one-sided, {state}" + f"; {enough}" * (p >= ALPHA))
    if p := bpb["paired"]:
        tested = (
            f" (sd {p['sd']:.6f} bpb), t {p['t']:.3f}, p {p['p_better']:.3g} one-sided"
            if "t" in p
            else ""
        )
        lines.append(
            f"{count(p['pairs'], 'pair')} of one {comparison['pair_by']}: better by "
            f"{both('+.6f', lambda x: x['paired']['mean'])}{tested}"
        )
    if d := comparison["documents"]:
        lines.append(
            f"{d['pairs']:,} documents of {count(d['artifacts'], 'pair')}: better by {d['bpb']:+.6f} bpb "
            f"(standard error {d['se_bpb']:.6f}), in {d['better']:.1%} of them"
            + (f", t {d['t']:.2f}, p {d['p_better']:.3g} one-sided" if "t" in d else "")
        )
    return lines


# === Rows, shared by every output =====================================================================================
def columns(runs: list[Run]) -> list[str]:
    kinds = [kind for kind in STAGES if any(run.stage(kind) for run in runs)]
    return [
        "run",
        "seed",
        "steps",
        "ms/step",
        *(STAGES[k] for k in kinds),
        "gain",
        "artifact + code",
        "training",
        "evaluation",
        "bytes check",
    ]


def row(run: Run, runs: list[Run]) -> list[str]:
    def show(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    def budget(name: str) -> str:
        return f"{show(run.spent(name), '.1f')} / {run.limits[name]:g} s"

    kinds = [kind for kind in STAGES if any(r.stage(kind) for r in runs)]
    scores = [show((s := run.stage(kind)) and s.bpb, ".5f") for kind in kinds]
    implied, right, _ = implied_bytes(run, run.score)
    check = (
        "INVALID"
        if check_scores(run)
        else "unknown"
        if math.isnan(right)
        else f"x{implied / right:.6f}"
    )
    size = show(run.sizes.get("artifact_bytes"), ",")
    return [
        run.label,
        show(run.seed, "d"),
        show(run.steps, "d"),
        show(run.ms_per_step, ".2f"),
        *scores,
        show(run.gain, ".5f"),
        size,
        budget("train"),
        budget("eval"),
        check,
    ]


def short_names(
    paths: list[Path],
) -> list[str]:  # file names without what they all begin with; paths if names repeat
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [path.with_suffix("").as_posix() for path in paths]
    start = os.path.commonprefix(names) if len(names) > 1 else ""
    return [name[max(start.rfind(mark) for mark in "_-. /") + 1 :] for name in names]


@dataclasses.dataclass
class Report:  # all that the outputs show
    runs: list[Run]
    baseline: list[Run]
    mixed: dict[str, list[str]]  # differences within `runs`
    left_out: Sequence[str] = ()  # why logs are not among them

    def __post_init__(self) -> None:
        self.everything = self.runs + self.baseline
        for run, label in zip(
            self.everything, short_names([r.path for r in self.everything]), strict=True
        ):
            run.label = label
        self.summary = summarise(self.runs)
        self.base_summary = summarise(self.baseline) if self.baseline else None
        self.comparison = compare(self.runs, self.baseline) if self.baseline else None
        self.problems = [
            f"{run.label}: INVALID: {text}" for run in self.everything for text in check_scores(run)
        ]
        self.warnings = [f"left out: {text}" for text in self.left_out]
        self.warnings += [
            f"{run.label}: over the limit: {text}" for run in self.everything for text in run.over()
        ]
        self.warnings += [
            f"{run.label}: {run.stale}"
            for run in self.everything
            if not run.documents and run.stale
        ]
        lowest = [(run, min(run.stages, key=lambda s: s.bpb)) for run in self.everything]
        self.warnings += [
            f"{run.label}: {best.label} scored {best.bpb:.5f}, below the last score, which counts"
            for run, best in lowest
            if best is not run.score and best.kind != "before" and best.bpb < run.score.bpb
        ]

    def groups(self) -> dict[str, dict[str, Any]]:  # per configuration, where several are mixed
        names = dict.fromkeys(run.group for run in self.runs)
        several = 1 < len(names) < len(self.runs)
        return (
            {n: summarise([r for r in self.runs if r.group == n]) for n in names} if several else {}
        )

    def statements(self) -> list[str]:
        found = [sentence("mean", self.summary)]
        found += [sentence(f"mean of {name}", summary) for name, summary in self.groups().items()]
        if self.comparison:
            found += [sentence("mean of the baseline", self.base_summary)]
            found += verdict(self.comparison, len(self.runs), len(self.baseline))
        return found


def sentence(what: str, summary: dict[str, Any]) -> str:
    bpb, nats = summary["bpb"], summary["nats"]
    if bpb["sd"] is None:
        return f"{what}: val_bpb {bpb['mean']:.5f}, {nats['mean']:.5f} nats (one run)"
    return (
        f"{what}: val_bpb {bpb['mean']:.5f} ± {bpb['sd']:.5f}, {nats['mean']:.5f} ± {nats['sd']:.5f} nats "
        f"(sd of {summary['runs']} runs; against as many, {bpb['resolves']:.5f} bpb would show at p < {ALPHA})"
    )


# === Outputs ==========================================================================================================
def print_table(report: Report) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=200)
    for title, runs in (("runs", report.runs), ("baseline", report.baseline)):
        if runs:
            table = Table(*columns(runs), title=title, title_justify="left")
            for column in table.columns[1:]:
                column.justify = "right"
            for run in runs:
                cells = [escape(cell) for cell in row(run, runs)]
                table.add_row(*cells, style="red" if check_scores(run) or run.over() else None)
            console.print(table)
    names = list(dict.fromkeys(name for run in report.everything for name, _, _ in run.phases))
    if names:
        budgets = {name: budget for run in report.everything for name, _, budget in run.phases}
        table = Table(
            "seconds",
            *(f"{n}\n{budgets[n]}" for n in names),
            title="phases and what they count against",
            title_justify="left",
        )
        for run in report.everything:
            spent = {name: seconds for name, seconds, _ in run.phases}
            table.add_row(
                escape(run.label), *(f"{spent[n]:.1f}" if n in spent else "–" for n in names)
            )
        console.print(table)
    for name, found in (
        ("mixed", report.mixed),
        ("changed", (report.comparison or {}).get("changed", {})),
    ):
        for knob, values in found.items():
            console.print(f"{name} {knob}: {' | '.join(values)}", markup=False, highlight=False)
    for line in report.statements() + report.warnings:
        console.print(line, markup=False, highlight=False)
    for line in report.problems:
        console.print(line, markup=False, highlight=False, style="red")


def as_json(report: Report) -> dict[str, Any]:
    runs = [
        {
            "run": run.label,
            "log": run.path.name,
            "seed": run.seed,
            "baseline": run in report.baseline,
            "steps": run.steps,
            "ms_per_step": run.ms_per_step,
            "val_bpb": run.score.bpb,
            "val_loss": run.score.loss,
            "gain": run.gain,
            "stages": [dataclasses.asdict(s) | {"kind": s.kind} for s in run.stages],
            **run.sizes,
            "phases": run.phases,
            "limits": run.limits,
            "implied_bytes_per_token": implied_bytes(run, run.score)[0],
            "problems": check_scores(run),
            "over": run.over(),
            "facts": run.facts,
        }
        for run in report.everything
    ]
    return {
        "runs": runs,
        "summary": report.summary,
        "groups": report.groups(),
        "mixed": report.mixed,
        "baseline": report.base_summary,
        "comparison": report.comparison,
        "statements": report.statements(),
        "problems": report.problems,
        "warnings": report.warnings,
    }


BEGIN, END = "<!-- report:begin -->", "<!-- report:end -->"


def as_markdown(report: Report) -> str:
    """The block between the markers: rows, mean, statements."""
    head = columns(report.runs)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(row(run, report.runs)) + " |" for run in report.runs]
    lines += [
        "",
        *(f"- {line}" for line in report.statements() + report.warnings + report.problems),
    ]
    return "\n".join([BEGIN, *lines, END])


def write_markdown(
    block: str, path: str
) -> None:  # in place of what its first and last line enclose; `-`: terminal
    if path == "-":
        return print(block)
    text, (begin, *_, end) = Path(path).read_text(encoding="utf-8"), block.splitlines()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UsageError(
            f"{path}: needs one line {begin} and after it one {end} around what is to be replaced"
        )
    before, rest = text.split(begin)
    return write_atomic(Path(path), (before + block + rest.split(end)[1]).encode())


# === Systems side by side: presets over their seeds ===================================================================
SYSTEMS = {  # preset -> (system, what it has, published score)
    "pr1530": (
        "#1530",
        "attention within documents, layers 3–5 looped, two lanes from 8, XSA, leaky², GPTQ; "
        "adapts a LoRA per document",
        "1.07336",
    ),
    "pr1560": ("#1560", "the same, warm-down over 0.75, chunks of 48", "1.07406"),
    "pr1413": (
        "#1413",
        "shuffled rows, layers 4–5 looped, no lanes, XSA, leaky², GPTQ; sliding window; adapts by SGD, "
        "chunk by chunk",
        "1.08279",
    ),
    "pr473": (
        "#473",
        "rows, no loops, bigram hash, SmearGate, value embedding, XSA in 4 layers, relu², GPTQ-lite; "
        "sliding window; adapts by SGD, chunk by chunk",
        "1.12139",
    ),
    "pr605": (
        "#605",
        "rows, no loops, no XSA, whole RoPE, scaled branches, relu², SWA, pruning, int6; adapts a LoRA "
        "and biases per document, one pass",
        "about 1.15, legal form",
    ),
}
PUBLISHED_WITH = (
    "published: FineWeb, 8 x H100, 600 s of training, mean of three seeds, vocabulary 1024 for #473 and "
    "#605, else 8192; #605 printed 0.7227 with a second pass, which was ruled out"
)


def budget_of(run: Run) -> str:
    seconds = float(run.config.get("max_wallclock_seconds", 0))
    steps = f"{run.config.get('iterations')} steps of {run.config.get('train_batch_tokens')} tokens"
    return f"{seconds:g} s of training" if seconds else steps


def preset_of(run: Run) -> str:
    return str(run.facts.get("preset")).removesuffix(" shrunk")


def systems_of(runs: list[Run]) -> dict[str, list[Run]]:
    """Preset and what was set for it alone -> its runs, in the order of SYSTEMS. Raises UsageError unless all else is
    the same: code, data, machine and budget."""
    same = {
        "budget": budget_of,
        "shrink": lambda run: run.config.get("shrink"),
        "val_doc_fraction": lambda run: run.config.get("val_doc_fraction"),
    }
    same |= {name: lambda run, name=name: run.facts.get(name) for name in FACTS if name != "preset"}
    found = {
        name: dict.fromkeys(str(of(run))[: 12 if "sha256" in name else 99] for run in runs)
        for name, of in same.items()
    }
    if wrong := [
        f"{name}: {', '.join(values)}" for name, values in found.items() if len(values) > 1
    ]:
        raise UsageError(f"cannot stand in one table, {'; '.join(wrong)}")
    names = set().union(*(run.given for run in runs)) - VOLATILE - {"preset"}
    own = sorted(
        n for n in names if len({run.config.get(n) if n in run.given else None for run in runs}) > 1
    )
    groups: dict[str, list[Run]] = {}
    order = [*SYSTEMS, *sorted({preset_of(run) for run in runs} - {*SYSTEMS})]
    for run in sorted(runs, key=lambda run: order.index(preset_of(run))):
        knobs = (f"{name.upper()}={run.config[name]}" for name in own if name in run.given)
        groups.setdefault(" ".join([preset_of(run), *knobs]), []).append(run)
    for group in groups.values():
        check_claim(group, mixed=False)
    return groups


def system_row(name: str, runs: list[Run], kinds: list[str]) -> list[str]:
    def mean(
        of: Callable[[Run], float | None], form: str
    ) -> str:  # with the deviation, where there is one
        values = [value for run in runs if (value := of(run)) is not None]
        if not values:
            return "–"
        spread = (
            f" ± {statistics.stdev(values):{form}}" if len(values) > 1 and form == ".5f" else ""
        )
        return f"{statistics.fmean(values):{form}}{spread}"

    preset, *knobs = name.split(" ")
    system, has, published = SYSTEMS.get(preset, (f"`{preset}`", "", "–"))
    if knobs:
        has, published = f"{has}; here `{' '.join(knobs)}`", "–"
    scores = [
        mean(lambda run, kind=kind: (s := run.stage(kind)) and s.bpb, ".5f") for kind in kinds
    ]
    return [
        system,
        has,
        published,
        str(len(runs)),
        *scores,
        mean(lambda run: run.sizes.get("artifact_bytes"), ",.0f"),
        mean(lambda run: run.spent("train"), ".1f"),
        mean(lambda run: run.spent("eval"), ".1f"),
        mean(lambda run: run.steps, ".0f"),
        mean(lambda run: run.ms_per_step, ".1f"),
    ]


def as_comparison(runs: list[Run], left_out: list[str], date: str | None = None) -> str:
    """The block between its markers: one row per system, what the figures were made with, what is wrong with them."""
    groups, facts, run = systems_of(runs), runs[0].facts, runs[0]
    kinds = [kind for kind in STAGES if any(r.stage(kind) for r in runs)]
    head = [
        "system",
        "what it has",
        "published",
        "runs",
        *(STAGES[k] for k in kinds),
        "artifact + code",
        "training s",
        "evaluation s",
        "steps",
        "ms/step",
    ]
    rows = [system_row(name, group, kinds) for name, group in groups.items()]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    when = (
        f"; {date}" if date else ""
    )  # the logs of a sweep do not name their day, their files have the clone's
    where = f"{facts.get('world_size', '?')} x {facts.get('device', '?')}, torch {facts.get('torch', '?')}"
    what = f"{facts.get('dataset')}, {run.sizes.get('val_tokens', 0):,} validation targets"
    small = ", SHRINK=1: small widths, short windows" * (run.config.get("shrink") == "True")
    code = str(facts.get("code_sha256", "?"))[:12]
    lines += [
        "",
        f"- measured: {what}; {budget_of(run)} each{small}; {where}{when}; code {code}",
        f"- {PUBLISHED_WITH}",
        *(f"- left out: {text}" for text in left_out),
    ]
    lines += [f"- {r.label}: over the limit: {text}" for r in runs for text in r.over()]
    lines += [f"- {r.label}: INVALID: {text}" for r in runs for text in check_scores(r)]
    return "\n".join(["<!-- compare:begin -->", *lines, "<!-- compare:end -->"])


def compare_systems(paths: list[Path], date: str | None, out: str) -> int:  # exit status
    runs, left_out = read_finished(paths)
    for run, label in zip(runs, short_names([run.path for run in runs]), strict=True):
        run.label = label
    write_markdown(as_comparison(runs, left_out, date), out)
    return int(any(check_scores(run) for run in runs))


def compliance(
    runs: list[Run], audits: list[Path]
) -> tuple[dict[str, bool], dict[str, dict[str, Any]]]:
    """(flags, evidence by seed) of the properties that an audit of every run's very artifact checked; none else."""
    found = {}
    for path in audits or [run.folder / "audit.json" for run in runs if run.folder]:
        if audits or path.is_file():
            try:
                audit = json.loads(path.read_text(encoding="utf-8"))
                properties = {name: dict(value) for name, value in audit["properties"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(f"{path}: is no audit with `properties` ({error})") from error
            found[audit.get("artifact_sha256")] = properties
    of_runs = [found.get(run.final.get("artifact_sha256") or "none", {}) for run in runs]
    passed = {
        name: [audit[name].get("passed") for audit in of_runs]
        for name in of_runs[0]
        if all(name in audit for audit in of_runs)
    }
    names = [
        name for name, found in passed.items() if None not in found or False in found
    ]  # None: not looked at
    flags = {name: all(found is True for found in passed[name]) for name in names}
    shown = {
        name: {
            str(run.seed): audit[name].get("evidence")
            for run, audit in zip(runs, of_runs, strict=True)
        }
        for name in names
    }
    return flags, shown


def submission(report: Report, args: argparse.Namespace) -> dict[str, Any]:
    """submission.json in the schema of the public records. Raises UsageError where the runs make no claim."""
    runs = sorted(report.runs, key=lambda run: (run.seed is None, run.seed))
    if (
        report.mixed
        or any(run.seed is None for run in runs)
        or len({run.seed for run in runs}) < len(runs)
    ):
        raise UsageError(
            "--submission: needs runs of one code and configuration, each with its own seed"
        )
    if wrong := [text for run in runs for text in check_scores(run)]:
        raise UsageError(f"--submission: {wrong[0]}")
    stamp = re.match(r"(\d{4})(\d\d)(\d\d)-", str(runs[0].final.get("run_id", "")))
    if not (date := args.date or (stamp and "-".join(stamp.groups()))):
        raise UsageError("--date: the logs do not name the day, so this must (YYYY-MM-DD)")
    flags, evidence = compliance(runs, args.audit)

    def result(run: Run) -> dict[str, Any]:
        scores = {
            f"{key}_bpb": s.bpb
            for kind, key in (
                ("before", "pre_quantization"),
                ("after", "quantized"),
                ("sliding", "sliding"),
                ("adapted", "adapted"),
            )
            if (s := run.stage(kind))
        }
        spent = {
            f"{b}_seconds": round(run.spent(b), 3)
            for b in ("train", "eval")
            if run.spent(b) is not None
        }
        seconds = {name: round(s, 3) for name, s, _ in run.phases}
        return {
            "val_bpb": run.score.bpb,
            "val_loss": run.score.loss,
            **scores,
            "steps": run.steps,
            **run.sizes,
            "step_avg_ms": run.ms_per_step,
            **spent,
            "seconds": seconds,
            "artifact_sha256": run.final.get("artifact_sha256"),
        }

    bpb, nats, facts = report.summary["bpb"], report.summary["nats"], dict(runs[0].facts)
    hardware = f"{facts.pop('world_size', '?')} x {facts.pop('device', '?')}"
    sizes = [run.sizes.get("artifact_bytes") for run in runs]
    return {
        "author": args.author,
        "github_id": args.github_id,
        "name": args.name,
        "blurb": args.blurb,
        "date": date,
        "track": args.track,
        "val_loss": nats["mean"],
        "val_bpb": bpb["mean"],
        "val_loss_std": nats["sd"],
        "val_bpb_std": bpb["sd"],
        "bytes_total": None if None in sizes else max(sizes),
        "bytes_limit": LIMIT_BYTES,
        "bytes_code": runs[0].sizes.get("code_bytes"),
        "hardware": hardware,
        "pytorch_version": facts.pop("torch", None),
        **facts,
        "seeds": [run.seed for run in runs],
        "seed_results": {str(run.seed): result(run) for run in runs},
        "compliance": flags,
        "compliance_evidence": evidence,
    }


# === Charts: one list of panels for the page and the pictures =========================================================
CURVES = {
    "train_loss": ("Training loss", "nats per token"),
    "val_bpb": ("Validation", "bits per byte"),
    "lr_scale": ("Learning rate", "factor"),
    "speed": ("Speed", "tokens per second"),
}


def by_length(run: Run) -> dict[str, list[float]]:
    """Bits per byte of the documents of each length (factor 2 a bin), tokens if known, else bytes."""
    docs = run.documents
    if not docs:
        return {}
    sizes = docs.get("doc_tokens", docs["doc_bytes"]).astype(np.int64)
    bins = np.log2(np.maximum(sizes, 1)).astype(int)
    points: dict[str, list[float]] = {"x": [], "y": [], "n": []}
    for b in np.unique(bins):
        of = bins == b
        bits = float(docs["doc_nats"][of].sum()) / math.log(2)
        for key, value in (
            ("x", sizes[of].mean()),
            ("y", bits / max(docs["doc_bytes"][of].sum(), 1)),
            ("n", of.sum()),
        ):
            points[key].append(float(value))
    return points


def by_position(run: Run) -> dict[str, list[float]]:
    """Nats per token by position in the document, from `pos_nats` and `pos_tokens` (sums per bin) and `pos_edges`."""
    docs = run.documents
    if not {"pos_nats", "pos_tokens"} <= set(docs):
        return {}
    counts = docs["pos_tokens"].astype(np.float64)
    starts = docs.get("pos_edges", np.arange(len(counts)))[: len(counts)]
    keep = counts > 0
    return {
        "x": starts[keep].astype(float).tolist(),
        "y": (docs["pos_nats"][keep] / counts[keep]).tolist(),
        "n": counts[keep].astype(int).tolist(),
    }


def chart_data(
    report: Report,
) -> list[dict[str, Any]]:  # per run, plain lists: what the page and the pictures draw
    return [
        {
            "name": run.label,
            "baseline": run in report.baseline,
            "curves": run.lines(),
            "steps": run.steps,
            "seconds": run.train_seconds,
            "phases": run.phases,
            "limits": run.limits,
            "stages": [{"kind": STAGES[s.kind], "bpb": s.bpb} for s in run.stages],
            "length": by_length(run),
            "position": by_position(run),
            "length_unit": "tokens" if "doc_tokens" in run.documents else "bytes",
        }
        for run in report.everything
    ]


def about(report: Report) -> str:  # what ran, from the first run's facts
    facts = report.runs[0].facts
    words = [
        facts.get("dataset"),
        facts.get("preset") and f"PRESET={facts['preset']}",
        facts.get("device"),
        f"code {facts['code_sha256'][:12]}" if "code_sha256" in facts else "",
    ]
    return " · ".join(str(word) for word in words if word)


def write_html(report: Report, path: Path) -> None:
    """One file with everything in it: the page in report.html, plotly.js and the data. Opens without a network."""
    from plotly.offline import get_plotlyjs

    def table(
        title: str, head: list[str], rows: list[list[str]], bad: list[bool] | None = None
    ) -> dict[str, Any]:
        return {"title": title, "head": head, "rows": rows, "bad": bad or [False] * len(rows)}

    tables = [
        table(
            title,
            columns(runs),
            [row(run, runs) for run in runs],
            [bool(check_scores(run) or run.over()) for run in runs],
        )
        for title, runs in (("Runs", report.runs), ("Baseline", report.baseline))
        if runs
    ]
    changed = (report.comparison or {}).get("changed", {})
    found = [
        ("Mixed runs", report.mixed, [run.label for run in report.runs]),
        ("Changed against the baseline", changed, ["runs", "baseline"]),
    ]
    found = [
        table(title, ["knob or fact", *head], [[n, *values] for n, values in of.items()])
        for title, of, head in found
        if of
    ]
    title = f"{report.summary['bpb']['mean']:.5f} bpb, {count(len(report.runs), 'run')}"
    data = {
        "title": title,
        "about": about(report),
        "runs": chart_data(report),
        "tables": tables,
        "differences": found,
        "summary": report.summary,
        "comparison": report.comparison,
        "statements": report.statements(),
        "warnings": report.warnings,
        "problems": report.problems,
        "curves": CURVES,
        "stages": list(STAGES.values()),
    }
    page = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    text = json.dumps(data).replace("<", "\\u003c")  # no name in a log can end the script element
    page = page.replace("/*DATA*/", text, 1).replace("/*PLOTLY*/", get_plotlyjs(), 1)
    write_atomic(path, page.encode())


def draw_lines(axes: Any, runs: list[dict[str, Any]], points: list[dict[str, Any]], x: str) -> None:
    for run, p in zip(runs, points, strict=True):
        axes.plot(
            p.get(x, []),
            p.get("y", []),
            marker="o",
            markersize=2.5,
            linewidth=1.3,
            label=run["name"],
            linestyle=":" if run["baseline"] else "-",
        )


def draw_budget(axes: Any, runs: list[dict[str, Any]], budget: str) -> None:
    for k, name in enumerate(
        dict.fromkeys(n for run in runs for n, _, b in run["phases"] if b == budget)
    ):
        left = [
            sum(s for n, s, b in run["phases"] if b == budget and n in axes.drawn) for run in runs
        ]
        width = [sum(s for n, s, b in run["phases"] if b == budget and n == name) for run in runs]
        axes.barh(
            [run["name"] for run in runs], width, left=left, label=name, color=f"C{k}", height=0.6
        )
        axes.drawn.append(name)
    for limit in {run["limits"][budget] for run in runs} - {0}:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    axes.invert_yaxis()


def write_pictures(report: Report, folder: Path) -> None:
    """The page's charts as PNG files in `folder`; a chart without data makes none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs, charts = chart_data(report), []
    for key, (title, unit) in CURVES.items():
        for x, words in (("step", "step"), ("seconds", "training seconds")):
            charts.append(
                (f"{key}_by_{x}", title, words, unit, [run["curves"][key] for run in runs], x)
            )
    stages = [
        {"x": [s["kind"] for s in run["stages"]], "y": [s["bpb"] for s in run["stages"]]}
        for run in runs
    ]
    charts.append(("scores", "Scores from phase to phase", "", "bits per byte", stages, "x"))
    for key, title, x, y in (
        ("length", "Loss by document length", runs[0]["length_unit"], "bits per byte"),
        ("position", "Loss by position", "position", "nats per token"),
    ):
        charts.append((key, title, x, y, [run[key] for run in runs], "x"))
    folder.mkdir(parents=True, exist_ok=True)

    def save(name: str, title: str, x: str, y: str, draw: Callable[[Any], None]) -> None:
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        axes.drawn = []
        draw(axes)
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(folder / f"{name}.png", dpi=150)
        pyplot.close(figure)

    for name, title, x, y, points, along in charts:
        if any(p.get("y") for p in points):

            def draw(
                axes: Any, points: list = points, along: str = along, name: str = name
            ) -> None:
                if name == "scores":
                    axes.xaxis.update_units(
                        [s for s in STAGES.values() if any(s in p["x"] for p in points)]
                    )  # order
                draw_lines(axes, runs, points, along)
                late = [
                    v
                    for p in points
                    for at, v in zip(p.get(along, []), p.get("y", []), strict=True)
                    if along in ("step", "seconds") and at >= 0.03 * max(p[along])
                ]
                if late and (
                    room := 0.06 * (max(late) - min(late))
                ):  # the first losses would press the rest flat
                    axes.set_ylim(min(late) - room, max(late) + room)
                if name in ("length", "position"):
                    axes.set_xscale("symlog")

            save(name, title, x, y, draw)
    for budget, title in (("train", "Training budget"), ("eval", "Evaluation budget")):
        if any(b == budget for run in runs for _, _, b in run["phases"]):
            save(
                f"budget_{budget}",
                title,
                "seconds",
                "",
                partial(draw_budget, runs=runs, budget=budget),
            )


# === Command line =====================================================================================================
def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("logs", nargs="+", type=Path, metavar="LOG", help="logs of finished runs")
    add("--baseline", nargs="+", type=Path, default=[], metavar="LOG", help="logs to compare with")
    add(
        "--mixed",
        action="store_true",
        help="take different codes, configurations and repeated seeds all the same",
    )
    add(
        "--compare",
        action="store_true",
        help="presets side by side; with --markdown between marks of its own",
    )
    add("--json", metavar="FILE", help="all figures; - is the terminal, in place of the table")
    add(
        "--markdown",
        metavar="FILE",
        help=f"rewrite what stands between {BEGIN} and {END}; - is the terminal",
    )
    add("--html", type=Path, metavar="FILE", help="one self-contained page with interactive charts")
    add("--png", type=Path, metavar="DIR", help="the same charts as pictures")
    group = parser.add_argument_group(
        "submission.json", "every figure from the logs, compliance only from audits"
    )
    group.add_argument("--submission", type=Path, metavar="FILE", help="write it")
    group.add_argument("--name", help="what was run, on which data and hardware")
    group.add_argument("--author", default="", help="who claims it")
    group.add_argument("--github-id", default="", help="the author's account")
    group.add_argument("--blurb", default="", help="one sentence about it")
    group.add_argument("--track", default="", help="10min_16mb, non_record_16mb, ..")
    group.add_argument("--date", help="day of the runs, YYYY-MM-DD; default: the logs'")
    group.add_argument(
        "--audit",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="audit.json of each artifact; default: those in the run folders",
    )
    args = parser.parse_args(argv)
    if args.submission and not args.name:
        parser.error("--submission needs --name")
    others = args.baseline, args.mixed, args.json, args.html, args.png, args.submission, args.audit
    if args.compare and any(others):
        parser.error("--compare goes with --markdown and --date alone")
    return args


def is_day(text: str) -> bool:
    try:
        return time.strftime("%Y-%m-%d", time.strptime(text, "%Y-%m-%d")) == text
    except ValueError:
        return False


def write_outputs(report: Report, args: argparse.Namespace) -> None:
    if args.submission:
        write_atomic(
            args.submission, (json.dumps(submission(report, args), indent=2) + "\n").encode()
        )
    if args.json == "-":
        print(json.dumps(as_json(report), indent=1))
    elif args.json:
        write_atomic(Path(args.json), (json.dumps(as_json(report), indent=1) + "\n").encode())
    if args.html:
        write_html(report, args.html)
    if args.png:
        write_pictures(report, args.png)
    if args.markdown:
        write_markdown(as_markdown(report), args.markdown)
    if "-" not in (args.json, args.markdown):
        print_table(report)


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        if args.date is not None and not is_day(args.date):
            raise UsageError(f"--date {args.date}: must be a day, YYYY-MM-DD")
        if args.compare:
            return compare_systems(args.logs, args.date, args.markdown or "-")
        (runs, left_out), (baseline, more) = map(read_finished, (args.logs, args.baseline))
        if args.submission and left_out:
            raise UsageError(
                f"--submission: {left_out[0]}"
            )  # whether a claim does without it is not ours to say
        mixed = check_claim(runs, args.mixed)
        if baseline:
            check_claim(baseline, args.mixed)
            check_texts(runs, baseline)
        report = Report(runs, baseline, mixed, left_out + more)
        write_outputs(report, args)
    except (UsageError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        print(
            f"report.py: {package}: is not installed; pip install -r requirements-tools.txt",
            file=sys.stderr,
        )
        return 2
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
