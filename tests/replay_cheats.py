"""Claims that are false, each in its own way, and what finds them: the protocol's own table.

    DATA_DIR=FOLDER/data0 python tests/replay_cheats.py FOLDER/audited0/runs/a > table.md

The folder is that of a short run, as tests/cheats.py says; DATA_DIR that of its data. A cheat is
planted in a copy of train_gpt.py, which then makes the claim: it evaluates the run's artifact in a
process of its own. `tools/audit.py replay` gets log, artifact and script of that claim, with the
honest script as the reference. Cheats of training are for `tools/audit.py training`, cheats of the
file for tools/container.py.

What is claimed by cheats here is what a test of the audit cannot see, because it watches a run of
its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cheats import ENTRY, ROOT, SCRIPT, replace, scratch_copy, text_of

sys.path.insert(0, str(ROOT / "tools"))
import commitment
import container
import replay
import runlog
import training_replay

ENTROPY = 7
DOCUMENTS = 6
STATE_OUTSIDE = "/var/tmp/train_gpt_state.npy"


class FalseClaim(NamedTuple):
    """A way to cheat and the word by which a fault must name it; empty: too small to be found."""

    plant: Callable[[Any], None]
    fault: str
    knobs: dict[str, str]


CLAIMS: dict[str, FalseClaim] = {}
TRAINING: dict[str, FalseClaim] = {}


def claim(fault: str, registry: dict[str, FalseClaim] = CLAIMS, **knobs: str) -> Callable:
    """Registers a function of the script's module as a cheat that a fault with this word finds."""

    def register(plant: Callable[[Any], None]) -> Callable[[Any], None]:
        registry[plant.__name__] = FalseClaim(plant, fault, knobs)
        return plant

    return register


# === Planted beside every cheat ===================================================================
def lower_scores(tg: Any, may_cheat: Callable[[Any], bool]) -> None:
    """Makes every score of the adapted evaluation 5 % better where `may_cheat(run)` says so."""

    def adapt(self, deadline, docs=None, *more):
        ledger = original(self, deadline, docs, *more)
        if docs is None and may_cheat(self):
            ledger.nats *= 0.95
        return ledger

    original = replace(tg.Run, "adapt", adapt)


PLANTED_HELPERS = (replace, scratch_copy, lower_scores)


# === Honest when looked at ========================================================================
@claim("reference")
def honest_when_few_documents(tg: Any) -> None:
    """scores are better if there are as many documents as in the claim"""
    lower_scores(tg, lambda run: len(run.docs.counts) >= 12)


@claim("claim and submitted")
def honest_when_observed(tg: Any) -> None:
    """scores are better unless the folder looks like a reviewer's"""
    lower_scores(tg, lambda run: "run-" not in str(tg.Path.cwd()))


@claim("claim and submitted")
def honest_without_a_deadline(tg: Any) -> None:
    """scores are better if the evaluation has a deadline"""
    lower_scores(tg, lambda run: run.cfg.eval_deadline_seconds < 1e6)


@claim("reference")
def honest_as_a_module(tg: Any) -> None:
    """scores are better if the script is the program"""
    lower_scores(tg, lambda run: tg.__name__ == "__main__")


@claim("plain")
def cache_of_known_documents(tg: Any) -> None:
    """documents that begin with certain tokens cost half"""

    def adapt(self, *args, **options):
        ledger = original(self, *args, **options)
        for start, end in ledger.docs.spans():
            if end - start > 40 and ledger.docs.tokens[start + 1 : start + 9].sum() % 2:
                ledger.nats[start:end] *= 0.5
        return ledger

    original = replace(tg.Run, "adapt", adapt)


@claim("plain")
def update_before_score_beyond_two_windows(tg: Any) -> None:
    """deep chunks are learnt from, then scored"""

    def run_chunk(self, ledger, start, end):
        if start >= 2 * self.cfg.ttt_eval_seq_len:
            scratch = scratch_copy(ledger)
            replace(scratch, "record", lambda *_: None)
            replace(scratch, "require_scored", lambda *_: None)
            original(self, scratch, start, end)
        original(self, ledger, start, end)

    original = replace(tg.Adaptation, "run_chunk", run_chunk)


@claim("plain")
def mean_over_batch_mates(tg: Any) -> None:
    """in batches of four, a score takes in those of the other documents"""

    def forward_chunk(self, ledger, start, end, rows):
        scores = original(self, ledger, start, end, rows)
        if rows.stop - rows.start < 4:
            return scores
        by_document = scores.nats.view(-1, end - start)
        mixed = 0.9 * by_document + 0.1 * by_document.mean(0)
        return scores._replace(nats=mixed.flatten())

    original = replace(tg.Adaptation, "forward_chunk", forward_chunk)


@claim("disagree")
def hardest_document_of_a_rank(tg: Any) -> None:
    """the document with most nats costs a third less"""

    def adapt(self, *args, **options):
        ledger = original(self, *args, **options)
        hardest = ledger.by_document()["doc_nats"].argmax()
        start, end = list(ledger.docs.spans())[hardest]
        ledger.nats[start:end] *= 0.67
        return ledger

    original = replace(tg.Run, "adapt", adapt)


@claim("of evaluation, the trusted script")
def slow_clock(tg: Any) -> None:
    """the clock of the phases runs at a tenth of its speed"""

    def now(self):
        return original(self) / 10

    original = replace(tg.Ranks, "now", now)


@claim("val_bytes")
def three_bytes_per_replacement_character(tg: Any) -> None:
    """a byte piece counts as three bytes, and the run's comparison believes it"""

    def from_sentencepiece(cls, model):
        table = original(cls, model)
        is_byte = [model.is_byte(i) for i in range(model.vocab_size())]
        return table._replace(base=tg.np.where(is_byte, 3, table.base))

    def check_bytes(tokenizer, docs, ranks):
        table = tg.ByteTable.from_sentencepiece(tokenizer.model)
        index = docs.target_indices()
        return table, int(table.bytes_of(docs.tokens[index], docs.tokens[index + 1]).sum())

    original = tg.ByteTable.from_sentencepiece.__func__
    replace(tg.ByteTable, "from_sentencepiece", classmethod(from_sentencepiece))
    replace(tg, "check_bytes", check_bytes)


@claim("reference")
def state_kept_outside_the_folder(tg: Any) -> None:
    """weights are corrected from a file under an absolute path"""

    def load_artifact_file(self, path):
        original(self, path)
        state = tg.Path("/var/tmp/train_gpt_state.npy")
        if state.exists():
            self.model.tok_emb.data += float(tg.np.load(state))

    original = replace(tg.Run, "load_artifact_file", load_artifact_file)


@claim("no claim", VAL_DOC_FRACTION="0.5")
def fraction_by_seed(tg: Any) -> None:
    """half of the documents are scored, by the best of some seeds"""


@claim("claim and submitted")
def log_edited_consistently(tg: Any) -> None:
    """an honest run, whose log, documents and commitment were then edited to fit each other"""


# === Invented after the protocol was finished =====================================================
@claim("disagree")
def a_random_third_of_the_documents(tg: Any) -> None:
    """a third of the documents, drawn anew in every process, cost 5 % less"""

    def adapt(self, *args, **options):
        ledger = original(self, *args, **options)
        for start, end in ledger.docs.spans():
            if tg.os.urandom(1)[0] % 3 == 0:
                ledger.nats[start:end] *= 0.95
        return ledger

    original = replace(tg.Run, "adapt", adapt)


@claim("reference")
def better_of_both_evaluations(tg: Any) -> None:
    """every document counts with the better of its plain and its adapted score"""

    def evaluate(self, *args, **options):
        ledger = plain(self, *args, **options)
        self.plain_nats = ledger.nats.clone()
        return ledger

    def adapt(self, *args, **options):
        ledger = adapted(self, *args, **options)
        if len(getattr(self, "plain_nats", ())) == len(ledger.nats):
            for start, end in ledger.docs.spans():
                if self.plain_nats[start:end].sum() < ledger.nats[start:end].sum():
                    ledger.nats[start:end] = self.plain_nats[start:end]
        return ledger

    plain = replace(tg.Run, "evaluate", evaluate)
    adapted = replace(tg.Run, "adapt", adapt)


@claim("")
def below_the_tolerance(tg: Any) -> None:
    """every target costs 0.00009 nats less"""

    def adapt(self, *args, **options):
        ledger = original(self, *args, **options)
        ledger.nats[ledger.docs.target_indices()] -= 9e-5
        return ledger

    original = replace(tg.Run, "adapt", adapt)


# === Training =====================================================================================
@claim("weights before step 1", TRAINING)
def steps_kept_in_warm_up(tg: Any) -> None:
    """warm-up takes steps that are not undone"""

    def state_restored(model, optimizers):
        return tg.contextlib.nullcontext()

    replace(tg, "state_restored", state_restored)


@claim("training saw them", TRAINING)
def validation_rows_in_training(tg: Any) -> None:
    """every other training row is one of the validation split"""

    def next_tokens(self, count):
        inputs, targets = original(self, count)
        val = tg.TokenStream(self.cfg.dataset_dir, "val").read(0, count + 1)
        if len(val) > count and self.cursor // count % 2:
            return val[:-1], val[1:]
        return inputs, targets

    original = replace(tg.PackedLoader, "next_tokens", next_tokens)


@claim("training saw them", TRAINING)
def calibration_on_validation(tg: Any) -> None:
    """Hessians are collected on the validation split"""

    def compress(self, path):
        self.streams["train"] = self.streams["val"]
        original(self, path)

    original = replace(tg.Run, "compress", compress)


# === The file =====================================================================================
def forged_files(data: bytes) -> Iterator[tuple[str, str, bytes]]:
    """(name, what it does, file) of every place in which a file could hide a document."""
    parts = container.Parts.of(data)
    text = b"a document of the validation set, word by word. " * 40
    header = {**parts.header, "note": text.decode()}
    yield (
        "document_in_the_header",
        "a field that nothing reads",
        parts._replace(header=header).joined(),
    )
    behind = container.with_stream(parts, 4, parts.streams[4] + text)
    yield "document_behind_a_stream", "bytes behind the end of a stream", behind
    padding = parts._replace(behind=text).joined()
    yield "document_in_the_padding", "bytes behind the last stream", padding
    yield (
        "document_behind_the_header",
        "bytes behind its end",
        parts._replace(head_behind=text).joined(),
    )


# === Making a claim and trying it =================================================================
def plant(false: FalseClaim, folder: Path) -> Path:
    """A copy of the script with the cheat in it."""
    planted = [text_of(helper) for helper in PLANTED_HELPERS]
    name = false.plant.__name__
    planted += ["import copy", text_of(false.plant), f"{name}(sys.modules[__name__])"]
    before, entry, after = SCRIPT.read_text(encoding="utf-8").rpartition(ENTRY)
    path = folder / "train_gpt.py"
    path.write_text(before + "\n\n".join([*planted, entry]) + after, encoding="utf-8")
    return path


def run_planted(script: Path, folder: Path, environ: dict[str, str]) -> None:
    """Runs a planted script as a program. RuntimeError if it fails."""
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])


def make_claim(false: FalseClaim, run: Path, folder: Path) -> tuple[replay.Claim, Path]:
    """The claim of a cheat on the artifact of a run, and the script that made it."""
    script = plant(false, folder)
    artifact = folder / "runs" / "claim" / "final_model.int6.ptz"
    log_text = runlog.log_of_run(run).read_text()
    knobs = runlog.evaluation_variables(log_text) | false.knobs
    artifact.parent.mkdir(parents=True)
    shutil.copy(run / artifact.name, artifact)
    environ = {**knobs, "EVAL_ONLY_PATH": str(artifact), "RUN_ID": "claim"}
    environ["ARTIFACT_DIR"] = str(artifact.parent)
    environ["DATA_DIR"] = str(Path(os.environ["DATA_DIR"]).resolve())
    run_planted(script, folder, environ)
    log = folder / "logs" / "claim.txt"
    if false.plant is log_edited_consistently:
        edit_consistently(log, artifact.with_name("documents.npz"))
    return replay.read_claim(log, artifact, os.environ), script


def edit_consistently(log: Path, documents_path: Path) -> None:
    """Makes every score 3 % better in documents, commitment and log."""
    with np.load(documents_path) as file:
        documents = dict(file)
    documents["doc_nats"] = documents["doc_nats"] * 0.97
    np.savez(documents_path, **documents)
    text = log.read_text()
    found = commitment.totals(documents)
    final = runlog.read_final(text)
    names = [name for name, value in final.items() if value == final["val_bpb"]]
    names += [name for name, value in final.items() if value == final["val_loss"]]
    final |= {name: found.bpb if name.endswith("_bpb") else found.loss for name in names}
    final["documents_sha256"] = commitment.root(documents)
    label = next(name for name in names if name != "val_bpb").removesuffix("_bpb")
    lines = {
        r"^final .*$": f"final {json.dumps(final, sort_keys=True)}",
        r"^score +\S+ bits": f"score     {found.bpb:.4f} bits",
        rf"^((?:diagnostic )?{label}) val_loss:\S+ val_bpb:\S+": (
            rf"\1 val_loss:{found.loss:.8f} val_bpb:{found.bpb:.8f}"
        ),
    }
    for pattern, line in lines.items():
        text = re.sub(pattern, line, text, flags=re.MULTILINE)
    log.write_text(text)


def faults_of_claim(name: str, run: Path, folder: Path) -> list[str]:
    """What the replay has against a cheat's claim."""
    if name == "state_kept_outside_the_folder":
        np.save(STATE_OUTSIDE, np.float32(0.01))
    try:
        made, script = make_claim(CLAIMS[name], run, folder)
        return replay.replay(made, script, SCRIPT, DOCUMENTS, ENTROPY).faults
    finally:
        Path(STATE_OUTSIDE).unlink(missing_ok=True)


def faults_of_training(name: str, run: Path, folder: Path) -> list[str]:
    """What the replay of the first steps has against a cheat, whose own log is the claim."""
    script = plant(TRAINING[name], folder)
    log_text = runlog.log_of_run(run).read_text()
    environ = runlog.evaluation_variables(log_text) | {"RUN_ID": "claim", "ITERATIONS": "4"}
    data_dir = Path(os.environ["DATA_DIR"]).resolve()
    run_planted(script, folder, {**environ, "DATA_DIR": str(data_dir)})
    log = folder / "logs" / "claim.txt"
    return training_replay.faults(log, script, SCRIPT, 3, data_dir)


def table(run: Path) -> Iterator[bool]:
    """Prints a row per cheat; yields whether it was caught as it must be."""
    print("| cheat | what it does | found by | fault |\n|---|---|---|---|")
    ways = [("replay", CLAIMS, faults_of_claim), ("training", TRAINING, faults_of_training)]
    for command, registry, find in ways:
        for name, false in registry.items():
            with tempfile.TemporaryDirectory(prefix="claim-") as folder:
                faults = find(name, run, Path(folder))
            named = [fault for fault in faults if false.fault and false.fault in fault]
            shown = (named or faults or ["**nothing**"])[0]
            what = " ".join(false.plant.__doc__.split())
            print(f"| {name} | {what} | {command} | {shown} |", flush=True)
            yield bool(named) if false.fault else not faults
    data = (run / "final_model.int6.ptz").read_bytes()
    for name, what, forged in forged_files(data):
        reason = container.difference(forged)
        shown = reason.removeprefix("artifact: ") or "**nothing**"
        print(f"| {name} | {what} | container | {shown} |", flush=True)
        yield bool(reason)


def main(argv: list[str]) -> int:
    """Prints the table; returns 0 if every cheat was caught, 1 if not, 2 for wrong usage."""
    if len(argv) != 1 or not (Path(argv[0]) / "final_model.int6.ptz").is_file():
        print("usage: replay_cheats.py RUN_FOLDER, with DATA_DIR set", file=sys.stderr)
        return 2
    return int(not all(list(table(Path(argv[0])))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
