"""Evaluations with one defect each, planted in a copy of train_gpt.py, and the tests that catch
them.

    python tests/cheats.py ARTIFACT            # the table, in Markdown
    python tests/cheats.py ARTIFACT expected   # only the tests that must catch a cheat, and T4

Knobs are those of the run's log and of the environment.

A cheat is a function of the script's module. Its text goes into the copy and runs when that is
imported, so that a fresh process has it too. It changes names of the script with `replace`, which
fails if the script has no such name: a cheat that does nothing would otherwise look like an honest
evaluation. SCRIPT_NAMES lists these names. The last column of the table says whether the checks of
every run stop a cheat without the audit.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_gpt.py"
ENTRY = 'if __name__ == "__main__":'
CHUNK = {"TTT_MODE": "chunk", "TTT_CHUNK_TOKENS": "128", "TTT_LR": "0.05"}
TILT = {"TILT_ORDER": "4", "TTT_ENABLED": "0"}  # hints do not depend on adaptation
SAMPLE_DOCUMENTS = 6


class Cheat(NamedTuple):
    """A defect and the tests that must catch it."""

    plant: Callable[[Any], None]  # changes the script's module
    tests: tuple[str, ...]
    knobs: dict[str, str]  # with which it shows

    @property
    def summary(self) -> str:
        """What the defect does."""
        return " ".join(self.plant.__doc__.split())


CHEATS: dict[str, Cheat] = {}


def caught_by(*tests: str, **knobs: str) -> Callable:
    """Registers a function of the script's module as a cheat that these tests must catch."""

    def register(plant: Callable[[Any], None]) -> Callable[[Any], None]:
        CHEATS[plant.__name__] = Cheat(plant, tests, knobs)
        return plant

    return register


# === Planted beside every cheat, for those that call it ===========================================
def replace(owner: Any, name: str, value: Any) -> Any:
    """Gives a name of the script another value and returns the one before."""
    original = getattr(owner, name, None)
    assert original is not None, f"{owner} has no {name} that a cheat could replace"
    setattr(owner, name, value)
    return original


def learn_validation(tg: Any, run: Any) -> None:
    """Trains all weights on the validation shards."""
    ids = torch.from_numpy(run.streams["val"].read(0, run.streams["val"].size))
    optimiser = torch.optim.SGD(run.model.requires_grad_().parameters(), lr=0.05)
    for part in 5 * list(ids.unfold(0, 65, 64)):
        ends = torch.tensor([0, 64], dtype=torch.int32)
        run.model(tg.Batch(part[:-1], part[1:], ends, 64), run.plan).mean().backward()
        optimiser.step()
        optimiser.zero_grad()


def scratch_copy(ledger: Any) -> Any:
    """A ledger whose scores count for nothing."""
    scratch = copy.copy(ledger)
    for name, value in vars(ledger).items():
        if isinstance(value, torch.Tensor):
            setattr(scratch, name, value.clone())
    return scratch


def replace_embedding(tg: Any, embedding: Callable) -> Callable:
    """Gives the script another function in place of F.embedding; returns the one before."""
    original = tg.F.embedding
    tg.F = types.SimpleNamespace(**{**vars(tg.F), "embedding": embedding})
    return original


PLANTED_HELPERS = (replace, learn_validation, scratch_copy, replace_embedding)


# === Looking ahead ================================================================================
@caught_by("T1", "T2")
def peek_in_attention(tg: Any) -> None:
    """attention sees the value of the next token"""

    def attention(q, k, v, *rest):
        return original(q, k, v + 0.3 * torch.roll(v, -1, 0), *rest)

    original = replace(tg, "attention", attention)


@caught_by("T2", "T3", "T9")
def bias_from_target(tg: Any) -> None:
    """the target's own logit is raised"""

    def head_loss(x, w, extra, targets, *rest):
        is_target = torch.nn.functional.one_hot(targets.clamp_min(0), len(w))
        bonus = 0.1 * (is_target * (targets >= 0)[:, None]).to(x.dtype)
        return original(x, w, bonus if extra is None else bonus + extra, targets, *rest)

    original = replace(tg, "head_loss", head_loss)


@caught_by("T1")
def window_from_the_end(tg: Any) -> None:
    """the last window of a document is moved to end with it"""

    def windows(count, length, stride):
        *first, (start, score, end) = original(count, length, stride) or [(0, 0, 0)]
        if first:
            start = max(0, end - length)
        return [*first, (start, score, end)]

    original = replace(tg, "scoring_windows", windows)


# === Not a distribution ===========================================================================
@caught_by("T2", "T3")
def unnormalised_mixing(tg: Any) -> None:
    """a second expert's mass is added without taking any away"""

    def forward(self, batch, plan, lora=None, select=None, **options):
        nats = original(self, batch, plan, lora=lora, select=select, **options)
        targets = batch.targets if select is None else batch.targets[select]
        return torch.where(targets >= 0, -torch.log(torch.exp(-nats) + 1e-3), nats)

    original = replace(tg.GPT, "forward", forward)


@caught_by("T2", "T3")
def better_of_two_passes(tg: Any) -> None:
    """each token counts as the better of the adapted and the plain pass"""

    def adapt(self, deadline, docs=None, ranks=None):
        ledger = original(self, deadline, docs, ranks)
        plain = self.evaluate(docs=docs, ranks=ranks)
        ledger.nats = torch.minimum(ledger.nats, plain.nats)
        return ledger

    original = replace(tg.Run, "adapt", adapt)


# === The token tilt ===============================================================================
@caught_by("T2", "T21", **TILT)
def hint_from_the_target(tg: Any) -> None:
    """hints that would not be the target are left out"""

    def hint_sources(tokens, *rest):
        sources = original(tokens, *rest)
        return torch.where(tokens[sources] == tokens, sources, -1)

    original = replace(tg, "hint_sources", hint_sources)


@caught_by("T1", "T2", "T21", **TILT)
def hint_from_later_text(tg: Any) -> None:
    """hints come from a table that has counted the whole stream beforehand"""

    def hint_sources(tokens, *rest):
        sources = original(tokens.repeat(2), *rest)[len(tokens) :]
        return torch.where(sources < 0, -1, sources % len(tokens))

    original = replace(tg, "hint_sources", hint_sources)


@caught_by("T2", "T21", **TILT)
def counted_before_the_score(tg: Any) -> None:
    """the table counts a target before it gives its hint"""

    def hint_sources(tokens, order, threshold):
        sources = torch.full_like(tokens, -1)
        table = {}
        ids = tokens.tolist()
        for i in range(order - 1, len(ids)):
            counts = table.setdefault(tuple(ids[i - order + 1 : i]), {})
            counts[ids[i]] = (counts.get(ids[i], (0, i))[0] + 1, i)
            most, last = max(counts.values())
            if most / sum(count for count, _ in counts.values()) >= threshold:
                sources[i] = last
        return sources

    replace(tg, "hint_sources", hint_sources)


@caught_by("T2", "T3", **TILT)
def unnormalised_tilt(tg: Any) -> None:
    """the hint gains, and no other token loses"""

    def tilt_losses(hint_nats, is_hit, betas, gamma):
        return -torch.tensor(betas, dtype=torch.float64) * is_hit.unsqueeze(1)

    replace(tg, "tilt_losses", tilt_losses)


@caught_by("T2", **TILT)
def beta_by_the_result(tg: Any) -> None:
    """the tilt is tried with several betas, and the best one is reported"""

    def tilt_losses(hint_nats, is_hit, betas, gamma):
        losses = original(hint_nats, is_hit, (0.5, 1.0, 1.5, 4.0, 6.0), gamma)
        return losses[:, losses.sum(0).argmin()].unsqueeze(1)

    original = replace(tg, "tilt_losses", tilt_losses)


# === Learning before scoring ======================================================================
@caught_by("T1", "T5")
def update_before_score(tg: Any) -> None:
    """a chunk is learnt from, then scored"""

    def run_chunk(self, ledger, *chunk):
        scratch = scratch_copy(ledger)
        replace(scratch, "record", lambda *_: None)
        replace(scratch, "require_scored", lambda *_: None)
        original(self, scratch, *chunk)
        original(self, ledger, *chunk)

    original = replace(tg.Adaptation, "run_chunk", run_chunk)


@caught_by("T1", "T4", "T9")
def last_of_two_epochs(tg: Any) -> None:
    """a document is gone through twice, the second time is reported"""

    def score_twice(state, batch, ledger):
        for _ in original(state, batch, scratch_copy(ledger)):
            pass
        replace(state, "begin", lambda *_: None)  # the adapters stay
        yield from original(state, batch, ledger)
        del state.begin

    original = replace(tg, "score_then_learn", score_twice)


@caught_by("T1", "T5", **CHUNK)
def chunk_before_its_score(tg: Any) -> None:
    """a chunk of the stream is learnt from, then scored, and the read is not declared"""

    def score_chunks(scorer, deadline):
        score_windows = replace(tg.Scorer, "score_windows", lambda *_, **__: None)
        lessons = list(original(scorer, deadline))  # nothing is scored
        tg.Scorer.score_windows = score_windows
        replace(scorer.ledger, "require_scored", lambda *_: None)
        scores = original(scorer, deadline)
        for lesson in lessons:
            yield lesson
            next(scores)

    original = replace(tg, "score_chunks", score_chunks)


@caught_by("T6")
def state_moved_by_scoring(tg: Any) -> None:
    """scoring leaves a trace in the weights"""

    def forward(self, batch, *args, **options):
        nats = original(self, batch, *args, **options)
        if not torch.is_grad_enabled():
            self.q_gain.data += 1e-4 * nats.mean()
        return nats

    original = replace(tg.GPT, "forward", forward)


@caught_by("T8")
def validation_learnt_before_the_evaluation(tg: Any) -> None:
    """all weights learn from the validation shards, as they lie on disk, before the first score"""

    def load_artifact_file(self, *args):
        original(self, *args)
        learn_validation(tg, self)

    original = replace(tg.Run, "load_artifact_file", load_artifact_file)


@caught_by("T5", "T8")
def validation_learnt_at_its_start(tg: Any) -> None:
    """the same at the start of an evaluation, undone at its end"""

    def adapt(self, *args, **options):
        before = copy.deepcopy(self.model.state_dict())
        learn_validation(tg, self)
        ledger = original(self, *args, **options)
        self.model.load_state_dict(before)
        return ledger

    original = replace(tg.Run, "adapt", adapt)


@caught_by("T8")
def bigrams_of_validation(tg: Any) -> None:
    """logits get counts of the token pairs of the validation split, which are taken while the data
    is checked
    """
    noted = types.SimpleNamespace(counts=None, inputs=None)

    def check(self, *args):
        result = original_check(self, *args)
        tokens = torch.from_numpy(self.streams["val"].read(0, self.streams["val"].size))
        noted.counts = torch.zeros(self.cfg.vocab_size, self.cfg.vocab_size)
        noted.counts.index_put_((tokens[:-1], tokens[1:]), torch.tensor(5.0), True)
        return result

    def forward(self, batch, plan, lora=None, select=None, **options):
        noted.inputs = batch.inputs if select is None else batch.inputs[select]
        return original_forward(self, batch, plan, lora=lora, select=select, **options)

    def head_loss(x, w, extra, *rest):
        bonus = noted.counts[noted.inputs].log1p().to(x.dtype)
        return original_loss(x, w, bonus if extra is None else bonus + extra, *rest)

    original_check = replace(tg.Run, "check", check)
    original_forward = replace(tg.GPT, "forward", forward)
    original_loss = replace(tg, "head_loss", head_loss)


# === From one document to another =================================================================
@caught_by("T10", "T11")
def adapters_kept(tg: Any) -> None:
    """adapters of one batch of documents are those that the next begins with"""

    def begin(self, *args):
        before = getattr(self, "documents", None)
        result = original(self, *args)
        if before is None:
            return result
        master, lora = self.documents.master, self.documents.lora
        with torch.no_grad():
            leaves = zip(master.leaves, before.master.leaves, lora.leaves, strict=True)
            for new, old, leaf in leaves:
                count = min(len(new), len(old))
                new[:count] = old[:count]
                leaf.copy_(new)
        return result

    original = replace(tg.Adaptation, "begin", begin)


@caught_by("T10", "T11")
def smear_over_bos(tg: Any) -> None:
    """the embedding of a token takes in that of the token before, over the beginning of a
    document
    """

    def embedding(ids, table):
        x = torch.nn.functional.embedding(ids, table)
        return x + 0.3 * torch.roll(x, 1, 0)

    replace_embedding(tg, embedding)


@caught_by("T10", "T11")
def memory_of_the_stream(tg: Any) -> None:
    """hidden states take in those of the text before, beyond the window"""

    def score_windows(self, *args, **options):
        past = 0.0

        def remembering_embedding(ids, table):
            nonlocal past
            x = embedding(ids, table)
            remembered = x + 0.1 * past
            past = 0.9 * past + remembered.mean(0)
            return remembered

        embedding = replace_embedding(tg, remembering_embedding)
        original(self, *args, **options)
        replace_embedding(tg, embedding)

    original = replace(tg.Scorer, "score_windows", score_windows)


# === Bytes and coverage ===========================================================================
def trusting_check_bytes(tg: Any) -> Callable:
    """A check of bytes that believes the table; planted beside every cheat."""

    def check_bytes(tokenizer, docs, ranks):
        table = tg.ByteTable.from_sentencepiece(tokenizer.model)
        targets = docs.target_indices()
        counted = table.bytes_of(docs.tokens[targets], docs.tokens[targets + 1])
        return table, int(counted.sum())

    return check_bytes


PLANTED_HELPERS += (trusting_check_bytes,)


@caught_by("T4", "T12")
def three_bytes_per_fallback(tg: Any) -> None:
    """a byte piece counts as the three bytes of U+FFFD; the run's own comparison is gone"""

    def from_sentencepiece(cls, model):
        table = original(cls, model)
        is_byte = [model.is_byte(i) for i in range(model.vocab_size())]
        return table._replace(base=np.where(is_byte, 3, table.base))

    original = tg.ByteTable.from_sentencepiece.__func__
    replace(tg.ByteTable, "from_sentencepiece", classmethod(from_sentencepiece))
    replace(tg, "check_bytes", trusting_check_bytes(tg))


@caught_by("T4", "T12")
def leading_space_twice(tg: Any) -> None:
    """the space before a word counts with the piece and once more; the run's own comparison is
    gone
    """

    def bytes_of(self, before, targets):
        return original(self, before, targets) + self.space[targets]

    original = replace(tg.ByteTable, "bytes_of", bytes_of)
    replace(tg, "check_bytes", trusting_check_bytes(tg))


@caught_by("T14")
def tail_dropped(tg: Any) -> None:
    """what does not fill a window at the end of the stream is not scored"""

    def load(cls, stream, bos_id, cfg):
        docs = original(cls, stream, bos_id, cfg)
        tail = docs.counts.sum() % cfg.eval_seq_len or 1
        docs.counts[-1] -= min(docs.counts[-1] - 1, tail)
        return docs

    original = tg.Documents.load.__func__
    replace(tg.Documents, "load", classmethod(load))


@caught_by("T4")
def last_windows_dropped(tg: Any) -> None:
    """a last window of a document that is not full is not scored"""

    def windows(count, length, stride):
        spans = original(count, length, stride)
        if len(spans) == 1:
            return spans
        return [span for span in spans if span[-1] - span[0] == length]

    original = replace(tg, "scoring_windows", windows)


@caught_by("T14")
def hard_documents_left_out(tg: Any) -> None:
    """one document in a hundred is not scored"""

    def load(cls, stream, bos_id, cfg):
        docs = original(cls, stream, bos_id, cfg)
        left_out = -(-len(docs.counts) // 100)
        return docs._replace(starts=docs.starts[left_out:], counts=docs.counts[left_out:])

    original = tg.Documents.load.__func__
    replace(tg.Documents, "load", classmethod(load))


@caught_by("T14")
def text_in_lower_case(tg: Any) -> None:
    """the validation text is normalised before it is scored"""

    def load(cls, stream, bos_id, cfg):
        docs = original(cls, stream, bos_id, cfg)
        docs.tokens[docs.tokens == docs.tokens[-2]] = docs.tokens[-3]
        return docs

    original = tg.Documents.load.__func__
    replace(tg.Documents, "load", classmethod(load))


# === Outside the artifact =========================================================================
@caught_by("T7")
def training_shard_read(tg: Any) -> None:
    """adaptation looks into a training shard"""

    def adapt(self, *args, **options):
        tg.TokenStream(self.cfg.dataset_dir, "train").read(0, 64)
        return original(self, *args, **options)

    original = replace(tg.Run, "adapt", adapt)


@caught_by("T7")
def training_shard_read_by_a_fork(tg: Any) -> None:
    """the same in a forked process, which sends what it read through a pipe"""

    def adapt(self, *args, **options):
        receiver, sender = os.pipe()
        child = os.fork()
        if not child:
            os.write(sender, tg.TokenStream(self.cfg.dataset_dir, "train").read(0, 64).tobytes())
            os._exit(0)
        assert len(os.read(receiver, 512)) == 512
        os.waitpid(child, 0)
        return original(self, *args, **options)

    original = replace(tg.Run, "adapt", adapt)


@caught_by("T8")
def state_beside_the_artifact(tg: Any) -> None:
    """weights are corrected from a file that nobody counts"""

    def load_artifact_file(self, path, *args):
        original(self, path, *args)
        beside = path.with_name("beside.npy")
        if beside.exists():
            self.model.tok_emb.data += torch.from_numpy(np.load(beside))

    original = replace(tg.Run, "load_artifact_file", load_artifact_file)


@caught_by("T17")
def warm_up_on_validation(tg: Any) -> None:
    """graphs are warmed up with validation documents"""

    def warm_up(self, last_plan):
        seconds = original(self, last_plan)
        self.evaluate(plan=last_plan)
        return seconds

    original = replace(tg.Run, "warm_up", warm_up)


@caught_by("T18")
def line_of_choice(tg: Any) -> None:
    """the better of two evaluations is called final"""

    def report(self):
        scores = [value for name, value in self.final.items() if name.endswith("_bpb")]
        self.final["val_bpb"] = min(scores) - 0.01
        return original(self)

    original = replace(tg.Run, "report", report)


# === Planting =====================================================================================
# The names of train_gpt.py that the cheats rely on, beside those of tools/probe.py.
SCRIPT_NAMES = (
    "Adaptation.begin",
    "Adaptation.run_chunk",
    "Batch",
    "ByteTable.bytes_of",
    "ByteTable.from_sentencepiece",
    "Documents.load",
    "Documents.target_indices",
    "F.embedding",
    "GPT.forward",
    "Ledger.record",
    "Ledger.require_scored",
    "Run.adapt",
    "Run.check",
    "Run.evaluate",
    "Run.load_artifact_file",
    "Run.report",
    "Run.warm_up",
    "Scorer.score_windows",
    "TokenStream.read",
    "attention",
    "check_bytes",
    "head_loss",
    "hint_sources",
    "score_chunks",
    "score_then_learn",
    "scoring_windows",
    "tilt_losses",
)


def text_of(function: Callable) -> str:
    """The source of a function without its decorators."""
    text = inspect.getsource(function)
    return text[re.search(r"^def ", text, re.MULTILINE).start() :]


def plant_text(text: str, name: str) -> Path:
    """The text of a script with that cheat in it, which runs before the script does."""
    planted = ["import copy", "import types"]
    planted += [text_of(helper) for helper in PLANTED_HELPERS]
    planted += [text_of(CHEATS[name].plant), f"{name}(sys.modules[__name__])"]
    # The last such line is the end of the script; a line before it may guard imports.
    before, entry, after = text.rpartition(ENTRY)
    assert entry, f"the script has no line {ENTRY}"
    return before + "\n\n".join([*planted, entry]) + after


def plant(name: str, folder: Path) -> Path:
    """A copy of the script with that cheat in it."""
    path = folder / f"{name}.py"
    path.write_text(plant_text(SCRIPT.read_text(encoding="utf-8"), name), encoding="utf-8")
    return path


# === The table ====================================================================================
def catching_tests(
    name: str, artifact: Path, environ: dict[str, str], tests: list[str], folder: Path
) -> dict[str, Any]:
    """The audit of a planted cheat, as audit.json holds it."""
    import audit

    beside = artifact.with_name("beside.npy")
    if name == "state_beside_the_artifact":
        np.save(beside, np.float32(0.01))
    try:
        script = plant(name, folder)
        knobs = {**environ, **CHEATS[name].knobs}
        return audit.audit(script, artifact, knobs, tests, SAMPLE_DOCUMENTS)
    finally:
        beside.unlink(missing_ok=True)


def table_rows(artifact: Path, environ: dict[str, str], asked: list[str]) -> Iterator[bool]:
    """Prints a row per cheat; yields whether one of the expected tests caught it."""
    from legality import TESTS

    with tempfile.TemporaryDirectory() as folder:
        for name, cheat in CHEATS.items():
            tests = list(TESTS)
            if asked == ["expected"]:
                tests = list(dict.fromkeys([*cheat.tests, "T4"]))
            elif asked:
                tests = asked
            result = catching_tests(name, artifact, environ, tests, Path(folder))
            caught = []
            for test in TESTS:
                if result["tests"].get(test, {}).get("passed") is False:
                    caught.append(test)
            shown = ", ".join(caught)
            if not set(cheat.tests) <= set(caught):
                shown += f" (expected {', '.join(cheat.tests)})"
            stopped = "yes" if result["always_on"] else "no"
            print(f"| {name} | {cheat.summary} | {shown} | {stopped} |", flush=True)
            yield not set(cheat.tests).isdisjoint(caught)


def main(argv: list[str]) -> int:
    """Prints the table; returns 0 if every cheat was caught, 1 if not, 2 for wrong usage."""
    sys.path.insert(0, str(ROOT / "tools"))
    import audit
    from runlog import log_of_run

    artifact = Path(argv[0]) if argv else Path("ARTIFACT")
    if not artifact.is_file():
        print(f"cheats.py: {artifact}: no such file", file=sys.stderr)
        return 2
    environ = dict(os.environ)
    log = log_of_run(artifact.resolve().parent)
    if log.is_file():
        environ |= audit.knobs_of_log(log, environ)
    if reason := audit.refusal(SCRIPT, artifact, environ):
        print(f"cheats.py: {reason}", file=sys.stderr)
        return 2
    print("| cheat | what it does | caught by | stopped by the run itself |\n|---|---|---|---|")
    caught = list(table_rows(artifact, environ, argv[1:]))
    return int(not all(caught))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
