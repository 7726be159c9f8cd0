"""Evaluations with one defect each, planted in a copy of train_gpt.py, and which test of tools/audit.py catches which.

    python tests/cheats.py ARTIFACT            # the table, in Markdown; knobs of the run's log, and the environment's
    python tests/cheats.py ARTIFACT expected   # only the tests that must catch a cheat, and T4

A cheat is a function of the script's module; its text goes into the copy and runs when that is imported, so that a
fresh process has it too. The last column says whether the checks of every run stop it without the audit.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
CHEATS: dict[
    str, tuple[Callable, tuple[str, ...], dict[str, str]]
] = {}  # name -> function, tests, knobs
CHUNK = {"TTT_MODE": "chunk", "TTT_CHUNK_TOKENS": "128", "TTT_LR": "0.05"}


def caught_by(*tests: str, **knobs: str) -> Callable:
    def register(cheat: Callable) -> Callable:
        CHEATS[cheat.__name__] = cheat, tests, knobs
        return cheat

    return register


def learn_validation(tg, run):  # planted beside every cheat, for those that call it
    ids = torch.from_numpy(run.streams["val"].read(0, run.streams["val"].size))
    sgd = torch.optim.SGD(run.model.requires_grad_().parameters(), lr=0.05)
    for part in 5 * list(ids.unfold(0, 65, 64)):
        row = tg.Batch(part[:-1], part[1:], torch.tensor([0, 64], dtype=torch.int32), 64)
        run.model(row, run.plan).mean().backward()
        sgd.step(), sgd.zero_grad()


# === Looking ahead ====================================================================================================
@caught_by("T1", "T2")
def peek_in_attention(tg):
    """attention sees the value of the next token"""
    original = tg.attention

    def attention(q, k, v, *rest):
        return original(q, k, v + 0.3 * torch.roll(v, -1, 0), *rest)

    tg.attention = attention


@caught_by("T2", "T3", "T9")
def bias_from_target(tg):
    """the target's own logit is raised"""

    original = tg.head_loss

    def head_loss(x, w, extra, targets, *rest):
        bonus = torch.nn.functional.one_hot(targets.clamp_min(0), len(w)) * (targets >= 0)[:, None]
        return original(
            x, w, 0.1 * bonus.to(x.dtype) + (0 if extra is None else extra), targets, *rest
        )

    tg.head_loss = head_loss


@caught_by("T1")
def window_from_the_end(tg):
    """the last window of a document is moved to end with it"""
    original = tg.scoring_windows

    def windows(count, length, stride):
        *first, (start, score, end) = original(count, length, stride) or [(0, 0, 0)]
        return [*first, (max(0, end - length) if first else start, score, end)]

    tg.scoring_windows = windows


# === Not a distribution ===============================================================================================
@caught_by("T2", "T3")
def unnormalised_mixing(tg):
    """a second expert's mass is added without taking any away"""
    original = tg.GPT.forward

    def forward(self, batch, plan, lora=None, select=None, **options):
        nats = original(self, batch, plan, lora=lora, select=select, **options)
        real = (batch.targets if select is None else batch.targets[select]) >= 0
        return torch.where(real, -torch.log(torch.exp(-nats) + 1e-3), nats)

    tg.GPT.forward = forward


@caught_by("T2", "T3")
def better_of_two_passes(tg):
    """each token counts as the better of the adapted and the plain pass"""
    original = tg.Run.adapt

    def adapt(self, deadline, docs=None, ranks=None):
        ledger, plain = original(self, deadline, docs, ranks), self.evaluate(docs=docs, ranks=ranks)
        ledger.nats = torch.minimum(ledger.nats, plain.nats)
        return ledger

    tg.Run.adapt = adapt


# === Learning before scoring ==========================================================================================
@caught_by("T1", "T5")
def update_before_score(tg):
    """a chunk is learnt from, then scored"""

    def step(self, ledger, start, end):
        rows = slice(0, int((self.lengths > start).sum()))
        grads = self.score(ledger, start, end, rows)[2]
        if grads:
            self.learn(grads, rows, self.updates + 1)
        place, nats, _ = self.score(ledger, start, end, rows)
        ledger.record(place, nats)
        self.updates += 1

    tg.Adaptation.step = step


@caught_by("T1", "T4", "T9")
def last_of_two_epochs(tg):
    """a document is gone through twice, the second time is reported"""

    def score_then_adapt(state, batch, ledger):
        grid = tg.chunk_grid(state.cfg, int(ledger.docs.counts[batch].max()))
        scratch = copy.copy(ledger)
        scratch.nats, scratch.times_scored, scratch.num_read_early = (
            x.clone() for x in (ledger.nats, ledger.times_scored, ledger.num_read_early)
        )
        state.begin(ledger.docs, batch)
        for start, end in grid:
            state.step(scratch, start, end)
        for start, end in grid:
            yield start
            state.step(ledger, start, end)

    tg.score_then_learn = score_then_adapt


@caught_by("T1", "T5", **CHUNK)
def chunk_before_its_score(tg):
    """a chunk of the stream is learnt from, then scored, and the read is not declared"""
    original = tg.score_chunks

    def score_chunks(scorer, deadline):
        size, places, scores = (
            scorer.cfg.ttt_chunk_tokens,
            scorer.ledger.docs.target_indices(),
            original(scorer, deadline),
        )
        scorer.ledger.require_scored = lambda *_: None
        for start in range(0, len(places), size):
            yield len(places) - start, [(places[start : start + size], start / len(places))]
            next(scores)

    tg.score_chunks = score_chunks


@caught_by("T6")
def state_moved_by_scoring(tg):
    """scoring leaves a trace in the weights"""
    original = tg.GPT.forward

    def forward(self, batch, *args, **options):
        nats = original(self, batch, *args, **options)
        if not torch.is_grad_enabled():
            self.q_gain.data += 1e-4 * nats.mean()
        return nats

    tg.GPT.forward = forward


@caught_by("T8")
def validation_learnt_before_the_evaluation(tg):
    """all weights learn from the validation shards, as they lie on disk, before the first score"""
    original = tg.Run.reload

    def reload(self, path):
        original(self, path)
        learn_validation(tg, self)

    tg.Run.reload = reload


@caught_by("T5", "T8")
def validation_learnt_at_its_start(tg):
    """the same at the start of an evaluation, undone at its end"""
    original = tg.Run.adapt

    def adapt(self, *args, **options):
        before = copy.deepcopy(self.model.state_dict())
        learn_validation(tg, self)
        ledger = original(self, *args, **options)
        self.model.load_state_dict(before)
        return ledger

    tg.Run.adapt = adapt


@caught_by("T8")
def bigrams_of_validation(tg):
    """logits get counts of the token pairs of the validation split, which are taken while the data is checked"""
    check, forward, loss, table, ids = tg.Run.check, tg.GPT.forward, tg.head_loss, [], []

    def count(self, origin):
        lines, tokens = check(self, origin), self.streams["val"].read(0, self.streams["val"].size)
        table[:] = [torch.zeros(self.cfg.vocab_size, self.cfg.vocab_size)]
        table[0].index_put_(
            (torch.from_numpy(tokens[:-1]), torch.from_numpy(tokens[1:])), torch.tensor(5.0), True
        )
        return lines

    def noted(self, batch, plan, lora=None, select=None, **options):
        ids[:] = [batch.inputs if select is None else batch.inputs[select]]
        return forward(self, batch, plan, lora=lora, select=select, **options)

    def head_loss(x, w, extra, *rest):
        return loss(
            x, w, table[0][ids[0]].log1p().to(x.dtype) + (0 if extra is None else extra), *rest
        )

    tg.Run.check, tg.GPT.forward, tg.head_loss = count, noted, head_loss


# === From one document to another =====================================================================================
@caught_by("T10", "T11")
def adapters_kept(tg):
    """adapters of one batch of documents are those that the next begins with"""
    original = tg.Adaptation.begin

    def begin(self, docs, batch):
        before = getattr(self, "master", None)
        original(self, docs, batch)
        if before is not None:
            n = min(len(before.up), len(self.master.up))
            with torch.no_grad():
                for mine, theirs, leaf in zip(
                    self.master.leaves, before.leaves, self.lora.leaves, strict=True
                ):
                    mine[:n] = theirs[:n]
                    leaf.copy_(mine)

    tg.Adaptation.begin = begin


@caught_by("T10", "T11")
def smear_over_bos(tg):
    """the embedding of a token takes in that of the token before, over the beginning of a document"""

    def embedding(ids, table):
        x = torch.nn.functional.embedding(ids, table)
        return x + 0.3 * torch.roll(x, 1, 0)

    tg.F = types.SimpleNamespace(**{**vars(tg.F), "embedding": embedding})


@caught_by("T10", "T11")
def memory_of_the_stream(tg):
    """hidden states take in those of the text before, beyond the window"""
    original = tg.Scorer.score_windows

    def score(self, spans, shared):
        embed, past = tg.F.embedding, [0.0]

        def embedding(ids, table):
            x = embed(ids, table)
            x, past[0] = x + 0.1 * past[0], 0.9 * past[0] + x.mean(0)
            return x

        tg.F = types.SimpleNamespace(**{**vars(tg.F), "embedding": embedding})
        original(self, spans, shared)
        tg.F = types.SimpleNamespace(**{**vars(tg.F), "embedding": embed})

    tg.Scorer.score_windows = score


# === Bytes and coverage ===============================================================================================
@caught_by("T4", "T12")
def three_bytes_per_fallback(tg):
    """a byte piece counts as the three bytes of U+FFFD; the run's own comparison is gone"""
    original = tg.ByteTable.from_sentencepiece.__func__

    def from_sentencepiece(cls, model):
        table = original(cls, model)
        return table._replace(
            base=np.where([model.is_byte(i) for i in range(model.vocab_size())], 3, table.base)
        )

    def check_bytes(tokenizer, docs, ranks):
        table, places = tg.ByteTable.from_sentencepiece(tokenizer.model), docs.target_indices()
        return table, int(table.bytes_of(docs.tokens[places], docs.tokens[places + 1]).sum())

    tg.ByteTable.from_sentencepiece, tg.check_bytes = classmethod(from_sentencepiece), check_bytes


@caught_by("T4", "T12")
def leading_space_twice(tg):
    """the space before a word counts with the piece and once more; the run's own comparison is gone"""
    original = tg.ByteTable.bytes_of

    def check_bytes(tokenizer, docs, ranks):
        table, places = tg.ByteTable.from_sentencepiece(tokenizer.model), docs.target_indices()
        return table, int(table.bytes_of(docs.tokens[places], docs.tokens[places + 1]).sum())

    tg.ByteTable.bytes_of = lambda self, before, targets: (
        original(self, before, targets) + self.space[targets]
    )
    tg.check_bytes = check_bytes


@caught_by("T14")
def tail_dropped(tg):
    """what does not fill a window at the end of the stream is not scored"""
    original = tg.Documents.load.__func__

    def load(cls, stream, bos_id, cfg):
        docs = original(cls, stream, bos_id, cfg)
        docs.counts[-1] -= min(docs.counts[-1] - 1, docs.counts.sum() % cfg.eval_seq_len or 1)
        return docs

    tg.Documents.load = classmethod(load)


@caught_by("T4")
def last_windows_dropped(tg):
    """a last window of a document that is not full is not scored"""
    original = tg.scoring_windows

    def windows(count, length, stride):
        spans = original(count, length, stride)
        return [
            (start, score, end)
            for start, score, end in spans
            if end - start == length or len(spans) == 1
        ]

    tg.scoring_windows = windows


@caught_by("T14")
def hard_documents_left_out(tg):
    """one document in a hundred is not scored"""
    original = tg.Documents.load.__func__

    def load(cls, stream, bos_id, cfg):
        docs = original(cls, stream, bos_id, cfg)
        keep = np.arange(len(docs.counts)) >= -(-len(docs.counts) // 100)
        return docs._replace(starts=docs.starts[keep], counts=docs.counts[keep])

    tg.Documents.load = classmethod(load)


@caught_by("T14")
def text_in_lower_case(tg):
    """the validation text is normalised before it is scored"""
    original = tg.Documents.load.__func__

    def load(cls, stream, bos_id, cfg):
        docs = original(cls, stream, bos_id, cfg)
        docs.tokens[docs.tokens == docs.tokens[-2]] = docs.tokens[-3]
        return docs

    tg.Documents.load = classmethod(load)


# === Outside the artifact =============================================================================================
@caught_by("T7")
def training_shard_read(tg):
    """adaptation looks into a training shard"""
    original = tg.Run.adapt

    def adapt(self, *args, **options):
        tg.TokenStream(self.cfg.dataset_dir, "train").read(0, 64)
        return original(self, *args, **options)

    tg.Run.adapt = adapt


@caught_by("T7")
def training_shard_read_by_a_fork(tg):
    """the same in a forked process, which sends what it read through a pipe"""
    original = tg.Run.adapt

    def adapt(self, *args, **options):
        out, into = os.pipe()
        if not (child := os.fork()):
            os.write(into, tg.TokenStream(self.cfg.dataset_dir, "train").read(0, 64).tobytes())
            os._exit(0)
        assert len(os.read(out, 512)) == 512 and os.waitpid(child, 0)
        return original(self, *args, **options)

    tg.Run.adapt = adapt


@caught_by("T8")
def state_beside_the_artifact(tg):
    """weights are corrected from a file that nobody counts"""
    original = tg.Run.reload

    def reload(self, path):
        original(self, path)
        if (beside := path.with_name("beside.npy")).exists():
            self.model.tok_emb.data += torch.from_numpy(np.load(beside))

    tg.Run.reload = reload


@caught_by("T17")
def warm_up_on_validation(tg):
    """graphs are warmed up with validation documents"""
    original = tg.Run.warm_up

    def warm_up(self, last):
        seconds = original(self, last)
        self.evaluate(plan=last)
        return seconds

    tg.Run.warm_up = warm_up


@caught_by("T18")
def line_of_choice(tg):
    """the better of two evaluations is called final"""
    original = tg.Run.report

    def report(self):
        best = min(v for k, v in self.final.items() if k.endswith("_bpb"))
        self.final["val_bpb"] = best - 0.01
        return original(self)

    tg.Run.report = report


def plant(name: str, folder: Path) -> Path:
    """A copy of the script with that cheat in it."""
    text, mark = (ROOT / "train_gpt.py").read_text(encoding="utf-8"), 'if __name__ == "__main__":'
    body = inspect.getsource(CHEATS[name][0]).split("\n", 1)[1]  # without the decorator
    planted = f"import types\n\n{inspect.getsource(learn_validation)}\n{body}\n{name}(sys.modules[__name__])\n\n{mark}"
    assert text.count(mark) == 1
    path = folder / f"{name}.py"
    path.write_text(text.replace(mark, planted), encoding="utf-8")
    return path


def main(argv: list[str]) -> int:
    sys.path.insert(0, str(ROOT / "tools"))
    import audit

    if not argv or not (artifact := Path(argv[0])).is_file():
        print(f"cheats.py: {argv[0] if argv else 'ARTIFACT'}: no such file", file=sys.stderr)
        return 2
    log = audit.log_of_run(artifact.resolve().parent)
    given = {**os.environ, **(audit.of_log(log, dict(os.environ)) if log.is_file() else {})}
    if why := audit.refused(ROOT / "train_gpt.py", artifact, given):
        print(f"cheats.py: {why}", file=sys.stderr)
        return 2
    beside = artifact.with_name("beside.npy")
    print(
        "| cheat | what it does | caught by | stopped by the run itself |\n|---|---|---|---|",
        flush=True,
    )
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, (cheat, expected, knobs) in CHEATS.items():
            script, environ = plant(name, Path(folder)), {**given, **knobs}
            if name == "state_beside_the_artifact":
                np.save(beside, np.float32(0.01))
            tests = [*expected, "T4"] if argv[1:] == ["expected"] else argv[1:] or audit.TESTS
            result = audit.audit(script, artifact, environ, list(dict.fromkeys(tests)), 6)
            beside.unlink(missing_ok=True)
            tests = [
                test for test in audit.TESTS if result["tests"].get(test, {}).get("passed") is False
            ]
            missed += not set(expected) & set(tests)
            mark = "" if set(expected) <= set(tests) else f" (expected {', '.join(expected)})"
            own = "yes" if result["always_on"] else "no"
            print(f"| {name} | {cheat.__doc__} | {', '.join(tests)}{mark} | {own} |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
