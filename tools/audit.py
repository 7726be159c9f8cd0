"""Is a score legal? Runs the evaluation of train_gpt.py on an artifact and on streams made to expose what is not:

    python tools/audit.py runs/<RUN_ID>/final_model.int6.ptz          # with the knobs of its log
    python tools/audit.py ARTIFACT --tests T1,T3 --docs 4 --markdown  # some tests, fewer documents, README's table
    python tools/audit.py --log train_seed42.log ...                  # T13 alone, on logs of whoever

Nothing is judged by reading code: every test looks at scores, states or files while the script's own evaluations run,
all that a run makes of an artifact. The tests (the conditions are those of issue #1017 of the challenge):

    T0  control        the same stream twice gives the same scores
    T1  future         other tokens after a place, or an earlier end of the document, leave the scores up to it alone
    T2  target         p(.) with the target and all after it withheld, computed outside the scorer, gives the same nats
    T3  normalisation  every token of the vocabulary in turn as the target: the probabilities sum to 1
    T4  ledger         every target is scored exactly once, and the score is their sum over the decoded bytes
    T5  reads          weights or adapters change only after a read of scored targets was declared, from those targets
    T6  state          scoring changes no parameter, buffer, adapter or moment
    T7  phase lock     a fresh process opens artifact, code, tokenizer and validation shards; no socket, no subprocess
    T8  artifact only  in an empty folder, with an empty home and other text for what it does not score, that process
                       gives the same score
    T9  e-value        a stream drawn from the frozen model: no legal scorer beats its maker (Ville's inequality);
                       besides, no legal scorer is better than ln V on random tokens (T9u)
    T10 permutation    documents in another order, or fewer of them, keep their scores
    T11 isolation      other tokens in one document leave the next one's scores alone
    T12 bytes          the bytes counted are those of the decoded text, document by document
    T13 implied bytes  loss, tokens and bits per byte of a log imply the bytes of the known validation sets
    T14 coverage       what is scored is what the shards hold, to the last token
    T15 overlap        no validation document is in the training shards
    T16 budget         phases of the log within their limits
    T17 warm-up        leaves weights and random state alone and sees no validation token
    T18 final          one final line, which holds the last evaluation's own result
    T19 provenance     code, artifact, configuration and data of the log are those audited
    T20 canary         a random document scores the same when it comes again

What a system says it has not is `not claimed`, no violation: with DATA_LOADER other than documents a window runs over
documents (T10; T11 then asks that nothing reaches beyond a window, T20 not for equal scores), and where documents learn
from earlier ones T10 and T11 look at rates 0. All else must hold for every system.

T7 sees files that Python opens, not those that C libraries open by themselves: of these T8 misses what lay beside the
artifact, the script or in the home folder, and no test knows of a file that has an absolute path. --docs documents are
sampled, cut to little more than a window; a chunk of TTT_MODE=chunk or of a phase is cut so that the sample has four,
rows of scoring so that it fills them. The fresh process scores a few whole documents, of rows the first of the stream;
it has random tokens for the others, or no others. Knobs that the environment lacks are taken from the run's log.
Writes audit.json beside the artifact, of some tests only what --json names. Exit status: 0 no violation, 1 violations,
2 wrong usage: what is given cannot be judged, and nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import PUBLISHED, load_script, log_of_run  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[1] / "train_gpt.py"
EXACT = 1e-6  # nats, or the floor that T0 finds: same shapes on both sides
CLOSE = 1e-3  # nats in fp32: other shapes, and adaptation that enlarges the rounding
THRESHOLD = math.log(1e6)  # of the e-value: honest scorers get there with probability 1e-6
CANONICAL = {**PUBLISHED, 40_540_802: ("sp8192, all", 151_080_891)}
BYTES_TOLERANCE = 1e-4
# property -> its tests
PROPERTIES = {
    "repeatable": ("T0",),
    "causal": ("T1", "T2", "T9"),
    "normalised": ("T2", "T3", "T9"),
    "score_first": ("T5", "T6"),
    "single_pass": ("T4", "T18"),
    "document_independent": ("T10", "T11", "T20"),
    "lossless": ("T12", "T13", "T14"),
    "self_contained": ("T7", "T8"),
    "clean_data": ("T15", "T17"),
    "within_budget": ("T16",),
    "provenance": ("T19",),
}


class Finding(NamedTuple):
    passed: bool | None  # None: not run, or not claimed
    evidence: str
    figures: dict[str, Any] = {}


class NotRun(Exception):
    """Why a test does not apply."""


class NotClaimed(Exception):
    """Which setting says that an evaluation has not the property."""


# === The evaluation under test ========================================================================================
@contextlib.contextmanager
def elsewhere() -> Iterator[
    None
]:  # in an empty folder, without output: runs write logs where they are
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def fold(tensors: list[Tensor]) -> int:  # 64-bit hash of values and places
    total, factor = 0, 0x9E3779B97F4A7C15
    for t in tensors:
        kind = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[t.element_size()]
        bits = t.detach().contiguous().flatten().view(kind).long()
        odd = torch.arange(1, 2 * len(bits), 2, device=bits.device)
        total = (total * factor + int((bits * odd).sum()) + int(bits.sum())) % 2**64
    return total


def random_state() -> int:
    return hash(
        (torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()), random.getstate())
    )


def shingles(tokens: np.ndarray, width: int = 12) -> set[bytes]:
    data = np.ascontiguousarray(tokens, dtype="<u2")
    return {data[i : i + width].tobytes() for i in range(len(data) - width + 1)}


def probe_of(tg: ModuleType) -> type:
    """The script's Run, which goes through all phases but keeps the evaluations for later in place of scoring."""

    class Probe(tg.Run):
        def warm_up(self, last: tuple) -> float:
            self.warm_inputs, forwards = [], (self.forward, self.scoring, self.ttt_forward)

            def spied(forward: Callable) -> Callable:
                def spy(batch: Any, *args: Any, **options: Any) -> Tensor:
                    self.warm_inputs.append(batch.inputs.cpu().numpy())
                    return forward(batch, *args, **options)

                return spy

            before = fold(list(self.model.state_dict().values())), random_state()
            self.forward, self.scoring, self.ttt_forward = map(spied, forwards)
            seconds = super().warm_up(last)
            self.forward, self.scoring, self.ttt_forward = forwards
            after = fold(list(self.model.state_dict().values())), random_state()
            self.warm_up_kept = [a == b for a, b in zip(before, after, strict=True)]
            return seconds

        def score(self, label: str, budget: str, evaluation: Callable) -> None:
            with self.phase(label, budget):
                self.evaluations = {
                    **getattr(self, "evaluations", {}),
                    label.removeprefix("diagnostic "): evaluation,
                }

        def report(self) -> dict[str, Any]:
            return {}

    return Probe


class Watch:
    """Listens to one evaluation: forwards, scores, declared reads and, with `hashes`, states."""

    def __init__(self, subject: Subject, hashes: bool = False, wanted: set[int] | None = None):
        self.subject, self.hashes, self.wanted = subject, hashes, wanted or set()
        self.order: list[np.ndarray] = []  # places as they were scored
        self.reads, self.early, self.problems, self.scoring = 0, 0, {"T5": [], "T6": []}, 0
        self.outside: dict[
            int, Tensor
        ] = {}  # place -> log p(.) computed outside, target and future withheld
        self.states, self.optimisers, self.last = [], [], None
        self.licence, self.hash, self.pending, self.pairs, self.forwarded = (
            False,
            None,
            [],
            set(),
            None,
        )

    def state(self) -> tuple[int, int]:  # of the weights, of all adapters and moments
        if not self.hashes:
            return (0, 0)
        model, adapters = self.subject.run.model, []
        for state in self.states[-1:]:
            adapters += [
                *state.master.leaves,
                *state.lora.leaves,
                *(m for ms in state.moments for m in ms),
            ]
        momenta = [
            v
            for o in self.optimisers
            for s in o.state.values()
            for v in s.values()
            if isinstance(v, Tensor)
        ]
        return fold([*model.parameters(), *model.buffers(), *momenta]), fold(adapters)

    def note(self) -> tuple[int, int]:
        """The state now; a change since the last time needs a licence, and what it was learnt from must be scored."""
        now = self.state()
        if self.hash is not None and now != self.hash:
            if not self.licence:
                self.problems["T5"].append(
                    "a state changed without a declared read of scored targets"
                )
            unread = sum(
                pair not in self.pairs for batch in self.pending for pair in pairs_of(batch)
            )
            if unread:
                self.problems["T5"].append(f"learnt from {unread} targets that had no score yet")
            self.pending = []
        self.hash = now
        return now

    def forward(self, original: Callable) -> Callable:
        def spy(batch: Any, plan: tuple, *args: Any, **options: Any) -> Tensor:
            before = self.note()
            nats = original(batch, plan, *args, **options)
            if self.hashes and torch.is_grad_enabled():
                self.pending.append(batch)
            self.hash = after = self.state()
            self.forwarded = before, after
            self.last = batch, plan, options.get("lora"), options.get("select")
            return nats

        return spy

    def add(self, place: Tensor, ledger: Any) -> None:
        real = place[place != ledger.padding_index].cpu().numpy()
        if self.hashes and self.forwarded:
            self.scoring += 1
            if len({*self.forwarded, self.state()}) > 1:
                self.problems["T6"].append(f"state changed while {len(real)} targets were scored")
            tokens = ledger.docs.tokens
            self.pairs |= set(zip(tokens[real].tolist(), tokens[real + 1].tolist(), strict=True))
        if self.wanted:
            self.withhold(place.tolist())
        self.order.append(real)
        self.licence = False

    def require(self, place: Tensor, ledger: Any) -> None:
        self.note()
        real = place[place != ledger.padding_index].cpu().numpy()
        unread = len(np.setdiff1d(real, np.concatenate([np.arange(0), *self.order])))
        self.reads, self.early, self.licence = self.reads + len(real), self.early + unread, True

    def withhold(self, places: list[int]) -> None:
        """log p(.) of wanted places from the script's forward on the same state, all from the target on replaced."""
        batch, plan, lora, select = self.last
        for row, place in enumerate(places):
            if (
                place in self.wanted
                and place not in self.outside
                and (lora is None) == (select is None)
            ):
                at = int(select[row]) if select is not None else row
                inputs, noise = batch.inputs.clone(), np.random.default_rng(place)
                ids = torch.from_numpy(noise.choice(self.subject.words, len(inputs) - at - 1)).to(
                    inputs.device
                )
                inputs[at + 1 :] = ids
                blind = batch._replace(inputs=inputs, targets=torch.full_like(batch.targets, -1))
                log_p = self.subject.distribution(blind, plan, lora, select)
                self.outside[place] = log_p[row if select is not None else at].cpu()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Watch]:
        tg, run, watch = self.subject.tg, self.subject.run, self

        class Ledger(tg.Ledger):
            def record(self, place: Tensor, nats: Tensor) -> None:
                watch.add(place, self)
                super().record(place, nats)

            def require_scored(self, place: Tensor, *args: Any) -> None:
                watch.require(place, self)
                super().require_scored(place, *args)

        class Adaptation(tg.Adaptation):
            def begin(self, *args: Any) -> None:
                watch.note()
                super().begin(*args)
                watch.states.append(self)
                watch.hash, watch.pending = watch.state(), []

        def stepped(optimiser: Any, *_: Any) -> None:
            if all(optimiser is not known for known in watch.optimisers):
                watch.optimisers.append(optimiser)

        kept = tg.Ledger, tg.Adaptation, run.scoring, run.ttt_forward
        hook = register_optimizer_step_post_hook(stepped)
        tg.Ledger, tg.Adaptation = Ledger, Adaptation
        run.scoring, run.ttt_forward = self.forward(run.scoring), self.forward(run.ttt_forward)
        self.hash = self.state()  # what changes before the first forward needs a licence, too
        try:
            yield self
        finally:
            tg.Ledger, tg.Adaptation, run.scoring, run.ttt_forward = kept
            hook.remove()


def pairs_of(batch: Any) -> list[tuple[int, int]]:
    keep = batch.targets >= 0
    return list(zip(batch.inputs[keep].tolist(), batch.targets[keep].tolist(), strict=True))


class Subject:
    """A script and an artifact, ready to score streams of our making."""

    def __init__(self, tg: ModuleType, environ: dict[str, str], **changes: Any):
        self.tg = tg
        with elsewhere():
            self.run = probe_of(tg)(
                *tg.Config.from_env(environ, torch.cuda.is_available()), tg.Ranks({})
            )
            self.run.go()
        run = self.run
        self.bos, self.cfg = run.tokenizer.bos_id, run.cfg
        model = run.tokenizer.model
        special = [
            i for i in range(model.vocab_size()) if model.is_control(i) or model.is_unknown(i)
        ]
        self.words = np.setdiff1d(np.arange(self.cfg.vocab_size), special)
        self.adapts = any("ttt" in name for name in run.evaluations)
        cfg = self.cfg
        self.crosses = self.adapts and (
            cfg.ttt_mode == "chunk" or cfg.phased_ttt_num_phases > 0 or cfg.ttt_warm_start_a
        )
        self.set(**changes)

    def set(self, **changes: Any) -> None:
        self.run.cfg = self.run.model.cfg = dataclasses.replace(self.run.cfg, **changes)

    @contextlib.contextmanager
    def settings(self, **changes: Any) -> Iterator[None]:
        kept = self.run.cfg
        self.set(**changes)
        try:
            yield
        finally:
            self.run.cfg = self.run.model.cfg = kept

    @property
    def names(self) -> list[str]:
        return list(self.run.evaluations)

    def by_rows(
        self, name: str
    ) -> bool:  # its windows lie on the stream as on one document, by declaration
        alone = "ttt" in name and self.cfg.ttt_mode == "document"
        return self.cfg.data_loader != "documents" and not alone

    def evaluate(
        self, name: str, docs: Any, watch: Watch | None = None
    ) -> Any:  # the ledger; nothing is printed
        torch.manual_seed(self.cfg.seed)
        with (
            (watch or contextlib.nullcontext)() if watch else contextlib.nullcontext(),
            elsewhere(),
        ):
            return self.run.evaluations[name](docs=docs)

    def nats(
        self, name: str, docs: Any, watch: Watch | None = None
    ) -> np.ndarray:  # (N - 1,) by place
        return self.evaluate(name, docs, watch).nats[:-1].cpu().double().numpy()

    def distribution(
        self, batch: Any, plan: tuple, lora: Any = None, select: Tensor | None = None
    ) -> Tensor:
        """log p(.) (n, V) fp32, made here of what the script's forward hands to its loss; no target takes part."""
        caught, original = [], self.tg.head_loss

        def catch(
            x: Tensor, w: Tensor, extra: Tensor | None, targets: Tensor, cap: float, *rest: Any
        ) -> Tensor:
            z = F.linear(x, w) if extra is None else F.linear(x, w) + extra
            caught.append((cap * torch.tanh(z.detach().float() / cap)).log_softmax(-1))
            return original(x, w, extra, targets, cap, *rest)

        self.tg.head_loss = catch
        try:
            with torch.no_grad():
                self.run.model(
                    batch,
                    plan,
                    lora=lora,
                    select=select,
                    temperature=self.run.cfg.logit_temperature,
                )
        finally:
            self.tg.head_loss = original
        if len(caught) != 1:
            raise NotRun(f"the forward calls head_loss {len(caught)} times")
        return caught[0]

    def stream(
        self, texts: list[np.ndarray]
    ) -> Any:  # ids of documents without BOS -> Documents, closed by a BOS
        tokens = np.concatenate(
            [part for text in texts for part in ([self.bos], text)] + [[self.bos]]
        ).astype(np.int64)
        counts = np.array([len(text) + 1 for text in texts])
        return self.tg.Documents(tokens, np.cumsum(counts) - counts, counts)

    def sample(self, count: int, window: int) -> list[np.ndarray]:
        """Texts from all over the validation set, longest first, cut to half a window and up to 2.2 windows."""
        every, rng = (
            dataclasses.replace(self.cfg, val_doc_fraction=1.0),
            random.Random(self.cfg.seed),
        )
        docs = self.tg.Documents.load(self.run.streams["val"], self.bos, every)
        chosen = sorted(rng.sample(range(len(docs.starts)), min(count, len(docs.starts))))
        texts = [docs.tokens[docs.starts[d] + 1 : docs.starts[d] + docs.counts[d]] for d in chosen]
        texts.sort(key=lambda text: -len(text))
        texts = [
            text[: int(window * (2.2 if i % 8 == 0 else rng.uniform(0.5, 1.3)))]
            for i, text in enumerate(texts)
        ]
        for i, text in enumerate(texts):  # no cut inside a character that is spelt in bytes
            ends = [
                n
                for n in range(len(text), 0, -1)
                if not self.run.tokenizer.model.is_byte(int(text[n - 1]))
            ]
            texts[i] = text[: ends[0] if ends else 0]
        return [text for text in texts if len(text)]

    @contextlib.contextmanager
    def equal_adapters(self) -> Iterator[None]:
        """Every document begins with the same adapter, as at the same place of a stream; else the place is the key."""
        lora = self.tg.LoRA
        original = lora.reset
        lora.reset = lambda adapter, seed, keys: original(adapter, seed, [0] * len(list(keys)))
        try:
            yield
        finally:
            lora.reset = original

    def without_crossing(self) -> contextlib.AbstractContextManager:
        """Rates of 0 where documents learn from each other by declaration: nothing else may cross."""
        rates = dict(ttt_lr=0.0, ttt_lora_lr=0.0, ttt_weight_decay=0.0) if self.crosses else {}
        return self.settings(**rates)


def far(a: np.ndarray, b: np.ndarray) -> float:  # largest difference, 0 for nothing
    return float(np.abs(a - b).max(initial=0.0))


# === The tests ========================================================================================================
class Audit:
    def __init__(
        self, script: Path, artifact: Path, environ: dict[str, str], docs: int, log: Path | None
    ):
        self.script, self.artifact, self.log_path, self.count = script, artifact, log, docs
        self.tg = tg = load_script(script)
        knobs = {f.name.upper() for f in dataclasses.fields(tg.Config)}
        environ = {
            getattr(tg, "ALIASES", {}).get(name, name): value for name, value in environ.items()
        }
        self.asked = {k: v for k, v in environ.items() if k in knobs}
        # nothing trains here: no time for it is measured, none can lack, and there is nothing to go on from
        self.fixed = {
            "EVAL_DEADLINE_SECONDS": "1e9",
            "MAX_WALLCLOCK_SECONDS": "0",
            "CHECKPOINT_EVERY": "0",
        }
        self.environ = {
            **environ,
            **self.fixed,
            "EVAL_ONLY_PATH": str(artifact.resolve()),
            "RUN_ID": "audit",
        }
        self.environ |= {
            "ARTIFACT_DIR": "",
            "DATA_DIR": str(Path(environ.get("DATA_DIR") or "data").resolve()),
        }
        if environ.get("TOKENIZER_PATH"):
            self.environ["TOKENIZER_PATH"] = str(Path(environ["TOKENIZER_PATH"]).resolve())
        self.findings: dict[str, Finding] = {}
        self.broken: Exception | None = None
        self.always_on: list[str] = []  # what the run's own ledger said
        self.watches: dict[str, tuple[Watch, Any]] = {}
        self.bases: dict[str, np.ndarray] = {}
        self.floor: dict[str, float] = {}

    def refused(self) -> str | None:
        """Why there is nothing to judge, as the script says it: its configuration, the data or the artifact."""
        try:
            with elsewhere():
                run = self.tg.Run(
                    *self.tg.Config.from_env(self.environ, torch.cuda.is_available()),
                    self.tg.Ranks({}),
                )
        except self.tg.UsageError as error:
            return "; ".join(str(error).splitlines())
        return None if "streams" in run.saved else f"{self.artifact}: a checkpoint, not an artifact"

    subject = property(lambda self: self.ready[0])
    texts = property(lambda self: self.ready[1])
    docs = property(lambda self: self.ready[2])  # the stream of the texts
    changes = property(lambda self: self.ready[3])  # settings that fit it

    @functools.cached_property
    def ready(self) -> tuple[Subject, list[np.ndarray], Any, dict[str, int]]:
        if self.broken:  # once is enough, for all tests
            raise self.broken
        try:
            return self.prepared()
        except Exception as error:
            self.broken = error
            raise

    def prepared(self) -> tuple[Subject, list[np.ndarray], Any, dict[str, int]]:
        asked = self.tg.Config.from_env(self.environ, torch.cuda.is_available())[0]
        self.wanted = dataclasses.asdict(
            asked
        )  # what the run shall be, before it is cut to fit the sample
        window = max(asked.eval_seq_len, asked.ttt_eval_seq_len)
        rows = dict(
            val_batch_tokens=min(asked.val_batch_tokens, 32 * asked.eval_seq_len)
        )  # the sample fills no larger
        self.environ["VAL_BATCH_TOKENS"] = str(rows["val_batch_tokens"])
        most = max(
            asked.eval_seq_len, self.count * window // 3
        )  # of a chunk, as below: nor need warm-up be longer
        self.environ["TTT_CHUNK_TOKENS"] = str(min(asked.ttt_chunk_tokens, most))
        subject = Subject(self.tg, self.environ)
        cfg, texts = subject.cfg, subject.sample(self.count, window)
        changes = rows | dict(
            ttt_chunk_tokens=max(
                cfg.eval_seq_len, min(cfg.ttt_chunk_tokens, sum(map(len, texts)) // 4)
            ),
            ttt_batch_size=min(cfg.ttt_batch_size, max(2, len(texts) // 8)),
            phased_ttt_prefix_docs=min(cfg.phased_ttt_prefix_docs, max(1, 3 * len(texts) // 4)),
        )
        subject.set(**changes)
        return subject, texts, subject.stream(texts), changes

    @functools.cached_property
    def exact(self) -> Subject:  # the same in fp32, where other shapes leave scores as they are
        subject = self.subject
        if subject.cfg.compute_dtype == "fp32":
            return subject
        return Subject(
            self.tg, {**self.environ, "COMPUTE_DTYPE": "fp32", "WARMUP_STEPS": "0"}, **self.changes
        )

    def run(self, tests: list[str]) -> dict[str, Finding]:
        for name in tests:
            start = time.monotonic()
            try:
                finding = getattr(self, name)()
            except NotRun as reason:
                finding = Finding(None, f"not run: {reason}")
            except Exception as error:  # whatever an evaluation under test raises is a finding
                kind = type(error).__name__
                said = (
                    f"the run refuses: {error}"
                    if kind in ("UsageError", "InvalidScore")
                    else f"{kind}: {error}"
                )
                if kind in ("UsageError", "InvalidScore"):
                    self.always_on.append(str(error))
                finding = Finding(False, " ".join(said.split())[:300])
            figures = {**finding.figures, "seconds": round(time.monotonic() - start, 2)}
            passed = None if finding.passed is None else bool(finding.passed)
            self.findings[name] = finding._replace(passed=passed, figures=figures)
        return self.findings

    def over_evaluations(self, test: Callable[[str], tuple[float, float, str]]) -> Finding:
        """(largest difference, what is allowed, detail) of each evaluation of the run that claims the property."""
        found, without = {}, []
        for name in self.subject.names:
            try:
                found[name] = test(name)
            except NotClaimed as setting:
                without.append(f"{name} not claimed: {setting}")
        passed = all(value <= allowed for value, allowed, _ in found.values()) if found else None
        evidence = "; ".join(
            [*(f"{name} {detail}" for name, (_, _, detail) in found.items()), *without]
        )
        return Finding(passed, evidence, {name: value for name, (value, _, _) in found.items()})

    def base(
        self, name: str
    ) -> np.ndarray:  # nats of the sample by this evaluation, with the settings of the run
        if name not in self.bases:
            self.bases[name] = self.subject.nats(name, self.docs)
        return self.bases[name]

    def T0(self) -> Finding:
        subject = self.subject
        for name in subject.names:
            self.floor[name] = far(self.base(name), subject.nats(name, self.docs))
        worst = max(self.floor.values())
        text = f"{len(self.docs.counts)} documents, {self.docs.counts.sum()} targets twice: max {worst:.1e} nats apart"
        return Finding(worst <= CLOSE, text, self.floor)

    def allowed(self, name: str) -> float:
        return max(EXACT, 2 * self.floor.get(name, 0.0))

    def cuts(self) -> list[int]:  # places in the middle of an early, a middle and a late document
        docs = self.docs
        order = [d for d in range(len(docs.counts)) if docs.counts[d] > 8]
        if not order:
            raise NotRun("no document of the sample has more than 8 targets")
        chosen = {
            order[int(f * (len(order) - 1))]: g for f, g in ((0.1, 0.55), (0.5, 0.3), (0.9, 0.8))
        }
        return [int(docs.starts[d] + docs.counts[d] * share) for d, share in chosen.items()]

    def T1(self) -> Finding:
        subject, rng, cuts = self.subject, np.random.default_rng(1), self.cuts()
        docs = self.docs

        def test(name: str) -> tuple[float, float, str]:
            base, worst, scored, compared = self.base(name), 0.0, 0.0, 0
            for cut in cuts:
                tokens = docs.tokens.copy()
                later = np.flatnonzero((np.arange(len(tokens)) > cut) & (tokens != subject.bos))
                tokens[later] = rng.choice(subject.words, len(later))
                watch = Watch(subject)
                nats = subject.nats(name, docs._replace(tokens=tokens), watch)
                before = watch.order[
                    : next(i for i, places in enumerate(watch.order) if (places >= cut).any())
                ]
                before = np.concatenate([np.arange(0), *before]).astype(int)
                worst, compared = max(worst, far(nats[:cut], base[:cut])), compared + cut
                scored = max(scored, far(nats[before], base[before]))
            ends, exact = 0.0, self.exact
            base = base if exact is subject else exact.nats(name, docs)
            window, longest = exact.cfg.eval_seq_len, int(docs.counts.argmax())
            rest = max(
                2, (docs.counts[longest] % window or window) // 2
            )  # the cut leaves a part of its last window
            for cut in (
                cuts[len(cuts) // 2],
                int(docs.starts[longest] + docs.counts[longest] - rest),
            ):
                tokens = docs.tokens.copy()
                tokens[cut] = subject.bos
                owner = int(np.searchsorted(docs.starts, cut, side="right"))
                starts = np.insert(docs.starts, owner, cut)
                shorter = self.tg.Documents(tokens, starts, np.diff(starts, append=len(tokens) - 1))
                ends = max(ends, far(exact.nats(name, shorter)[: cut - 1], base[: cut - 1]))
            detail = f"{worst:.1e} nats over {compared} scores before changed tokens (scoring order {scored:.1e}), "
            detail += f"{ends:.1e} before an earlier end of the document"
            if max(worst, scored) > self.allowed(name) >= scored:
                detail += " (causal in the order of scoring only)"
            return max(worst / self.allowed(name), ends / CLOSE), 1.0, detail

        return self.over_evaluations(test)

    def T2(self) -> Finding:
        exact, docs, rng = self.exact, self.docs, np.random.default_rng(2)
        pairs = zip(docs.starts, docs.counts, strict=True)
        wanted = {
            int(start + place)
            for start, count in pairs
            for place in rng.integers(count - 1, size=2)
        }

        def test(name: str) -> tuple[float, float, str]:
            watch = Watch(exact, wanted=wanted)
            nats = exact.nats(name, docs, watch)
            if not watch.outside:
                raise NotRun("no place of a selected logit (TTT_FAST=0)")
            outside = {p: -float(row[docs.tokens[p + 1]]) for p, row in watch.outside.items()}
            worst = max(abs(nats[p] - value) for p, value in outside.items())
            return (
                worst,
                CLOSE,
                f"{worst:.1e} nats at {len(outside)} places whose target and future were withheld",
            )

        return self.over_evaluations(test)

    def copies(self, name: str, prefix: np.ndarray) -> tuple[Any, dict[str, Any], np.ndarray]:
        """A stream with a document for every token of the vocabulary after `prefix` (BOS: the document ends there), the
        settings under which none is learnt from before all are scored, though other text was, and these places. Windows
        are short, for copies to fill rows; where they lie on the stream, the copies do as well, all with one past."""
        subject, cfg, warm, need = self.exact, self.exact.run.cfg, [], len(prefix) + 2
        stride = cfg.eval_stride if need <= cfg.eval_stride < 2 * need else need
        changes: dict[str, Any] = dict(eval_seq_len=2 * stride, eval_stride=stride)
        block = [
            prefix if v == subject.bos else np.append(prefix, v) for v in range(cfg.vocab_size)
        ]
        if subject.by_rows(name):
            fill = np.resize(prefix, 2 * stride - need)
            block = [
                np.concatenate([prefix, [v], fill]) for v in (0, *range(cfg.vocab_size))
            ]  # 0: a past of the first
        if "ttt" in name and cfg.ttt_mode == "chunk":
            size = sum(len(text) + 1 for text in block)
            warm = [np.resize(np.concatenate(self.texts), size - 1)]
            as_many = (
                cfg.ttt_batch_seqs * cfg.eval_seq_len // (2 * stride)
            )  # tokens as in rows of the run
            changes |= dict(ttt_chunk_tokens=size, ttt_batch_seqs=as_many, ttt_epochs=1)
        elif "ttt" in name:
            changes |= dict(
                ttt_short_chunks=f"{len(prefix)}:8", ttt_warm_start_a=False, ttt_batch_size=256
            )
            changes["ttt_min_doc_len"] = 0  # so short ones learn, too
            if cfg.phased_ttt_num_phases:
                warm = self.texts[: max(1, len(self.texts) // 2)]
                changes |= dict(phased_ttt_num_phases=1, phased_ttt_prefix_docs=len(warm))
        docs = subject.stream([*warm, *block])
        return docs, changes, docs.starts[-cfg.vocab_size :] + len(prefix)

    def T3(self) -> Finding:
        subject = self.exact
        texts = [text for text in self.texts if len(text) > 20]

        def test(name: str) -> tuple[float, float, str]:
            sums, rows = [], subject.by_rows(name)
            length = min(9, subject.cfg.eval_stride - 2) if rows else 20 if "ttt" in name else 9
            if length < 1:
                raise NotRun(f"EVAL_STRIDE={subject.cfg.eval_stride}: no room between windows")
            for text in texts[: 1 if rows or "ttt" in name else 3]:
                docs, changes, places = self.copies(name, text[:length])
                with subject.settings(**changes), subject.equal_adapters():
                    sums.append(float(np.exp(-subject.nats(name, docs)[places]).sum()))
            worst = max(abs(total - 1) for total in sums)
            shown = ", ".join(f"{total:.6f}" for total in sums)
            return worst, CLOSE, f"{shown} over {subject.cfg.vocab_size} targets"

        return self.over_evaluations(test)

    def T4(self) -> Finding:
        docs = self.docs
        wanted = np.bincount(docs.target_indices(), minlength=len(docs.tokens) - 1)
        total = sum(self.decoded(docs))

        def test(name: str) -> tuple[float, float, str]:
            watch, ledger = self.watched(name)
            times = np.bincount(np.concatenate([np.arange(0), *watch.order]), minlength=len(wanted))
            kept, wrong = ledger.times_scored[:-1].cpu().numpy(), int((times != wanted).sum())
            wrong += int((kept != wanted).sum())
            result, nats = ledger.result(), float(ledger.nats[:-1].double().sum())
            off = abs(result["val_bpb"] * total * math.log(2) / nats - 1)
            self.always_on += ledger.problems(total)
            detail = f"{int(times.sum())} scores of {int(wanted.sum())} targets, {wrong} not exactly once, "
            detail += f"bits per byte off by {off:.1e} from nats over {total} decoded bytes"
            return wrong + (off > 1e-6), 0, detail

        return self.over_evaluations(test)

    def watched(
        self, name: str
    ) -> tuple[Watch, Any]:  # one evaluation with states hashed, and its ledger
        if name not in self.watches:
            watch = Watch(self.subject, hashes=True)
            self.watches[name] = watch, self.subject.evaluate(name, self.docs, watch)
        return self.watches[name]

    def T5(self) -> Finding:
        def test(name: str) -> tuple[float, float, str]:
            watch, _ = self.watched(name)
            wrong = watch.problems["T5"] + [f"{watch.early} targets read before their score"] * (
                watch.early > 0
            )
            said = f": {wrong[0]}" if wrong else ""
            return (
                len(wrong),
                0,
                f"{watch.reads} targets read by updates, {len(wrong)} faults{said}",
            )

        return self.over_evaluations(test)

    def T6(self) -> Finding:
        def test(name: str) -> tuple[float, float, str]:
            watch, _ = self.watched(name)
            wrong = watch.problems["T6"]
            return (
                len(wrong),
                0,
                f"{watch.scoring} blocks of scores, {len(wrong)} with another state after than before",
            )

        return self.over_evaluations(test)

    def T7(self) -> Finding:
        child = self.child
        opened = f"{len(child['opened'])} files opened, {len(child['violations'])} not allowed"
        said = f": {child['violations'][0]}" if child["violations"] else ""
        return Finding(not child["violations"], opened + said, {"opened": child["opened"][:50]})

    def T8(self) -> Finding:
        child, subject, last = self.child, self.subject, self.subject.names[-1]
        if child["rc"]:
            return Finding(False, f"exit status {child['rc']} in an empty folder: {child['error']}")
        docs = self.few
        here = subject.evaluate(last, docs).by_document()["doc_nats"]
        worst = far(child["doc_nats"] / docs.counts, here / docs.counts)
        size = self.script.stat().st_size + self.artifact.stat().st_size
        text = f"{len(docs.counts)} documents in an empty folder: {worst:.1e} nats per token apart; {size:,} bytes"
        return Finding(
            worst <= self.allowed(last) and size <= 16_000_000,
            text,
            {"bytes": size, "worst": worst},
        )

    @functools.cached_property
    def few(
        self,
    ) -> (
        Any
    ):  # documents that the fresh process scores: a sample, or the first ones of a stream of rows
        run, cfg, bos = self.subject.run, self.subject.cfg, self.subject.bos
        stream, starts = run.streams["val"], np.flatnonzero(run.docs.tokens == bos)
        share = min(1.0, max(2, self.count // 6) / len(starts))
        if cfg.data_loader != "documents":  # these cannot be sampled
            least = 2 * max(self.changes["ttt_chunk_tokens"], 2 * cfg.eval_seq_len)
            size = next((int(start) for start in starts[1:] if start >= least), stream.size)
            stream, share = SimpleNamespace(size=size, read=stream.read), 1.0
        return self.tg.Documents.load(stream, bos, dataclasses.replace(cfg, val_doc_fraction=share))

    @functools.cached_property
    def child(self) -> dict[str, Any]:
        """What the script, run by itself in an empty folder under an audit hook, opened and scored."""
        subject, run, few = self.subject, self.subject.run, self.few
        rows = subject.cfg.data_loader != "documents"
        cfg = dataclasses.replace(
            subject.cfg, dataset="alone"
        )  # whose name says nothing about what it must hold
        share = 1.0 if rows else len(few.starts) / int((few.tokens == subject.bos).sum())
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name).resolve()
            data = folder / "data" / "datasets" / cfg.dataset_dir.name
            data.mkdir(parents=True)
            (folder / "home").mkdir()
            (folder / "tmp").mkdir()
            shutil.copy(self.script, folder / "train_gpt.py")
            shutil.copy(self.artifact, folder / "artifact")
            shutil.copy(run.tokenizer.path, folder / "tokenizer.model")
            held, shard = few.tokens.copy(), data / run.streams["val"].paths[0].name
            other = (
                held != subject.bos
            )  # what this process could learn from documents that are not scored here must
            other[few.target_indices() + 1] = (
                False  # be of no use, so the fresh one finds random tokens there
            )
            held[other] = np.random.default_rng(8).choice(subject.words, int(other.sum()))
            self.tg.write_shard(shard, held)
            (data / shard.name.replace("_val_", "_train_")).symlink_to(
                shard
            )  # whoever opens it wants training data
            env = {
                k: os.environ[k]
                for k in ("PATH", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CC")
                if k in os.environ
            }
            env |= {
                "HOME": str(folder / "home"),
                "TMPDIR": str(folder / "tmp"),
                "OMP_NUM_THREADS": "1",
            }
            env |= self.asked | self.fixed
            env |= {
                "EVAL_ONLY_PATH": "artifact",
                "DATA_DIR": "data",
                "TOKENIZER_PATH": "tokenizer.model",
            }
            env |= {"RUN_ID": "alone", "VAL_DOC_FRACTION": repr(share), "DATASET": data.name}
            env |= {name.upper(): str(value) for name, value in self.changes.items()}
            env.pop("ARTIFACT_DIR", None)
            command = [
                sys.executable,
                str(Path(__file__).resolve()),
                "--locked",
                str(folder / "train_gpt.py"),
            ]
            piped = dict(capture_output=True, text=True, timeout=3600, check=False)
            done = subprocess.run(command, cwd=folder, env=env, **piped)
            events = (
                json.loads((folder / "opened.json").read_text())
                if (folder / "opened.json").is_file()
                else []
            )
            scores = folder / "runs" / "alone" / "documents.npz"
            doc_nats = np.load(scores)["doc_nats"] if scores.is_file() else None
            self.always_on += [line for line in done.stderr.splitlines() if "INVALID" in line]
            error = (done.stderr.strip().splitlines() or ["no output"])[-1].replace(
                str(folder), "."
            )
            found = judge(events, folder, cfg)
        return {
            "rc": done.returncode,
            "error": error,
            "output": done.stdout,
            "doc_nats": doc_nats,
            **found,
        }

    def T9(self) -> Finding:
        subject, cfg = self.subject, self.subject.cfg
        length = min(96, cfg.eval_seq_len, cfg.ttt_eval_seq_len)
        docs, log_p = self.drawn(2 * self.count, length)
        uniform = np.random.default_rng(9).choice(subject.words, (len(docs.counts), length))
        rest = subject.stream(list(uniform))
        inner = np.setdiff1d(docs.target_indices(), docs.starts + docs.counts - 1)

        def test(name: str) -> tuple[float, float, str]:
            worst, found = -math.inf, []
            rates = [{}, dict(ttt_lr=0.0, ttt_lora_lr=0.0)] if "ttt" in name else [{}]
            for changes in rates:
                with subject.settings(**changes, ttt_batch_size=cfg.ttt_batch_size):
                    log_e = float((-log_p - subject.nats(name, docs)[inner]).sum())
                worst = max(worst, log_e)
                found.append(f"{log_e:.2f}")
            with subject.settings(ttt_batch_size=cfg.ttt_batch_size):
                nats = subject.nats(name, rest)[inner]
            slack = nats.mean() - (
                math.log(len(subject.words)) - 4 * nats.std() / math.sqrt(len(nats))
            )
            detail = f"ln E = {' and, rates 0, '.join(found)} over {len(inner)} targets (limit {THRESHOLD:.1f}); "
            detail += (
                f"random tokens {nats.mean():.2f} nats, ln V = {math.log(len(subject.words)):.2f}"
            )
            return max(worst, THRESHOLD + 1 if slack < 0 else worst), THRESHOLD, detail

        return self.over_evaluations(test)

    def drawn(self, count: int, length: int) -> tuple[Any, np.ndarray]:
        """Documents drawn from the frozen model without a BOS inside, and ln p of every token, in order."""
        subject, run = self.subject, self.subject.run
        rng, device, rows = (
            torch.Generator().manual_seed(9),
            run.ranks.device,
            [[subject.bos] for _ in range(count)],
        )
        total, per_row = [], max(1, run.cfg.val_row_shape[0] // length)
        for first in range(0, count, per_row):
            part, found = rows[first : first + per_row], []
            for at in range(1, length + 1):
                ids, starts = np.concatenate(part), np.arange(0, len(part) * at, at)
                batch = self.tg.pack_row(ids, ids, starts, (len(ids), len(part), length), device)
                last = torch.from_numpy(starts + at - 1).to(device)
                log_p = subject.distribution(batch, run.plan, None, last).cpu().double()
                log_p[:, subject.bos] = -math.inf
                log_p = log_p.log_softmax(-1)
                drawn = torch.multinomial(log_p.exp(), 1, generator=rng)
                found.append(log_p.gather(1, drawn)[:, 0].numpy())
                part = [[*row, int(token)] for row, token in zip(part, drawn[:, 0], strict=True)]
            rows[first : first + per_row] = part
            total.append(np.stack(found, 1).ravel())
        return subject.stream([np.array(row[1:]) for row in rows]), np.concatenate(total)

    def T10(self) -> Finding:
        subject, texts = self.exact, self.texts
        order = np.random.default_rng(10).permutation(len(texts))
        fewer, moved = subject.stream(texts[::2]), subject.stream([texts[i] for i in order])

        def test(name: str) -> tuple[float, float, str]:
            if subject.by_rows(name):
                raise NotClaimed(f"DATA_LOADER={subject.cfg.data_loader}")
            with subject.without_crossing(), subject.equal_adapters():
                base = by_document(subject.nats(name, self.docs), self.docs)
                other = by_document(subject.nats(name, moved), moved)
                part = by_document(subject.nats(name, fewer), fewer)
            permuted = max(far(other[i], base[d]) for i, d in enumerate(order))
            halved = max(far(a, b) for a, b in zip(part, base[::2], strict=True))
            detail = (
                f"{permuted:.1e} nats in another order, {halved:.1e} without every second document"
            )
            return max(permuted, halved), CLOSE, detail

        return self.declared(self.over_evaluations(test))

    def declared(self, finding: Finding) -> Finding:
        if not self.subject.crosses:
            return finding
        text = "rates 0, because documents learn from earlier ones by declaration: "
        return finding._replace(evidence=text + finding.evidence)

    def T11(self) -> Finding:
        """Where windows lie on the stream: that no change reaches farther than one of them."""
        subject, docs, rng = self.subject, self.docs, np.random.default_rng(11)
        place, half = np.arange(len(docs.tokens)), len(docs.tokens) // 2
        owner = np.searchsorted(docs.starts, place, side="right") - 1
        left = (docs.starts + docs.counts)[owner] - place  # of the document, this token included
        kept = (owner % 2 == 1) & (left > 1)
        alone = (
            (owner % 2 == 0) & (left <= 64),
            kept[:-1],
            f"at {kept.sum()} places of documents after changed ones",
        )
        far_off = place[:-1] >= half + subject.cfg.eval_seq_len
        where = f"at {far_off.sum()} places beyond a window; nearer not claimed: DATA_LOADER={subject.cfg.data_loader}"

        def test(name: str) -> tuple[float, float, str]:
            changed, kept, about = (
                (place < half, far_off, where) if subject.by_rows(name) else alone
            )
            tokens, changed = docs.tokens.copy(), changed & (docs.tokens != subject.bos)
            tokens[changed] = rng.choice(subject.words, int(changed.sum()))
            with subject.without_crossing():
                before = subject.nats(name, docs) if subject.crosses else self.base(name)
                after = subject.nats(name, docs._replace(tokens=tokens))
            worst = far(before[kept], after[kept])
            return worst, self.allowed(name), f"{worst:.1e} nats {about}"

        return self.declared(self.over_evaluations(test))

    def decoded(
        self, docs: Any
    ) -> list[int]:  # UTF-8 bytes of the text of each document, by decoding it
        model, total = self.subject.run.tokenizer.model, []
        for start, count in zip(docs.starts.tolist(), docs.counts.tolist(), strict=True):
            ids = docs.tokens[start + 1 : start + count + 1]
            total.append(len(model.decode(ids[ids != self.subject.bos].tolist()).encode()))
        return total

    def T12(self) -> Finding:
        subject, run = self.subject, self.subject.run
        whole = [np.arange(0, len(run.docs.counts), max(1, len(run.docs.counts) // 2000))][0]
        docs = run.docs._replace(starts=run.docs.starts[whole], counts=run.docs.counts[whole])
        real = np.array(self.decoded(docs))
        ledger = self.tg.Ledger(docs, run.table, torch.device("cpu"))
        counted, model = ledger.by_document()["doc_bytes"], run.tokenizer.model
        wrong, changed = int((counted != real).sum()), 0
        for start, count in list(zip(docs.starts, docs.counts, strict=True))[:200]:
            ids = [int(i) for i in docs.tokens[start + 1 : start + count + 1] if i != subject.bos]
            changed += model.encode(model.decode(ids)) != ids
        text = f"{len(real)} documents: {int(counted.sum())} bytes counted, {int(real.sum())} decoded, "
        text += f"{wrong} documents differ; {changed} of {min(200, len(real))} change their ids when encoded again"
        if wrong:
            text += f" (factor {counted.sum() / real.sum():.4f})"
        return Finding(
            wrong == 0, text, {"counted": int(counted.sum()), "decoded": int(real.sum())}
        )

    def T13(self) -> Finding:
        if not self.log_path:
            raise NotRun("no log")
        finding = implied_bytes(self.log_path)
        manifest = self.subject.run.tokenizer.manifest.get("splits", {}).get("val", {})
        final = final_lines(self.log_path.read_text(encoding="utf-8", errors="replace"))
        if (
            finding.passed
            and manifest
            and final
            and final[-1].get("val_tokens") == manifest["tokens"] - 1
        ):
            same = final[-1].get("val_bytes") == manifest["bytes"]
            finding = Finding(
                same,
                f"{finding.evidence}; the manifest says {manifest['bytes']:,}",
                finding.figures,
            )
        return finding

    def T14(self) -> Finding:
        run, bos, share = self.subject.run, self.subject.bos, self.subject.cfg.val_doc_fraction
        parts = [np.fromfile(path, dtype="<u2", offset=1024) for path in sorted(self.shards("val"))]
        held = np.concatenate(parts)
        starts, docs = np.flatnonzero(held == bos), run.docs
        wanted = max(1, round(share * len(starts)))
        if (
            share < 1 and self.subject.cfg.data_loader != "documents"
        ):  # rows hold the sample alone, end to end
            chosen = sorted(random.Random(self.subject.cfg.seed).sample(range(len(starts)), wanted))
            ends = np.append(starts[1:], len(held) - 1)
            held = np.concatenate(
                [*(held[starts[i] : ends[i]] for i in chosen), held[ends[chosen[-1]] :][:1]]
            )
            starts = np.flatnonzero(held[:-1] == bos)
        same = np.array_equal(held, docs.tokens)
        ends = np.append(starts[1:], len(held) - 1)[
            np.searchsorted(starts, docs.starts).clip(max=len(starts) - 1)
        ]
        whole = bool((docs.starts + docs.counts == ends).all()) and bool(
            np.isin(docs.starts, starts).all()
        )
        targets, ok = int(docs.counts.sum()), same and whole and len(docs.starts) == wanted
        text = f"{len(docs.starts)} of {wanted} documents, {targets} targets of a shard stream of {len(held)} tokens"
        text += "" if same else "; other tokens than the shards hold"
        text += "" if whole else "; documents are not scored to their ends"
        known = getattr(self.tg, "CANONICAL", {}).get(run.cfg.dataset_dir.name)
        if known and share == 1:
            pairs = zip((len(starts), len(held)), known, strict=False)
            ok = ok and all(abs(a - b) <= BYTES_TOLERANCE * b for a, b in pairs if b)
            text += (
                f"; the field's set has {known.documents} documents, {known.tokens or '?'} tokens"
            )
        digest = hashlib.sha256(held.tobytes()).hexdigest()
        return Finding(ok, text, {"val_sha256": digest})

    def shards(self, split: str) -> list[Path]:
        return sorted(self.subject.run.cfg.dataset_dir.glob(f"*_{split}_*.bin"))

    def T15(self) -> Finding:
        if not self.shards("train"):
            raise NotRun("no training shards here")
        sys.path.insert(0, str(Path(__file__).parent))
        try:
            import doctor
        except ImportError:
            raise NotRun("tools/doctor.py is not there") from None
        run, bos = self.subject.run, self.subject.bos
        size = sum(path.stat().st_size for path in self.shards("train")) // 2
        if size > 400_000_000:
            raise NotRun(
                f"{size:,} training tokens: run tools/doctor.py, which does it on all cores"
            )
        train = np.concatenate(
            [np.fromfile(path, dtype="<u2", offset=1024) for path in self.shards("train")]
        )
        found = doctor.overlap(
            [train[int(np.argmax(train == bos)) :]], run.docs.tokens.astype(np.uint16), bos
        )
        whole = sum(one.whole for one in found)
        number = int((run.docs.tokens == bos).sum())
        text = f"{whole} whole and {len(found) - whole} parts of {number} validation documents in {len(train):,} "
        return Finding(
            whole == 0, text + "training tokens", {"whole": whole, "part": len(found) - whole}
        )

    def final(self) -> tuple[str, dict[str, Any]]:  # text and figures of the log
        if not self.log_path:
            raise NotRun("no log")
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        final = final_lines(text)
        if len(final) != 1:
            raise NotRun(f"the log has {len(final)} final lines")
        return text, final[0]

    def T16(self) -> Finding:
        text, _ = self.final()
        found = re.findall(r"^all of (train|eval) +([\d.]+)  of (\d+)(, OVER)?$", text, re.M)
        rows = re.findall(r"^(\S.*?) +([\d.]+)  (train|eval)$", text, re.M)
        over, said = [], []
        for budget, spent, limit, _ in found:
            total = sum(float(seconds) for _, seconds, b in rows if b == budget)
            limit = min(float(limit), 600) if float(limit) else math.inf
            over += [budget] * (max(total, float(spent)) > limit + 0.05)
            over += [f"{budget} does not add up"] * (
                abs(total - float(spent)) > 0.1 * (len(rows) + 1)
            )
            said.append(
                f"{budget} {float(spent):.1f} s of {'any' if limit == math.inf else f'{limit:.0f}'}"
            )
        size = int(re.findall(r"^Total submission size [^:]*: (\d+) bytes", text, re.M)[-1])
        said.append(f"{size:,} bytes of 16,000,000")
        over += ["bytes"] * (size > 16_000_000)
        return Finding(
            bool(found) and not over, ", ".join(said) + "".join(f"; {x} OVER" for x in over)
        )

    def T17(self) -> Finding:
        run = self.subject.run
        seen = (
            set().union(*(shingles(inputs) for inputs in run.warm_inputs))
            if run.warm_inputs
            else set()
        )
        known = shingles(run.docs.tokens[:2_000_000])
        common = len(seen & known)
        names = [
            name
            for name, kept in zip(("weights", "random state"), run.warm_up_kept, strict=True)
            if not kept
        ]
        text = f"{len(run.warm_inputs)} forwards on {sum(map(len, run.warm_inputs))} tokens, {common} passages of 12 "
        text += f"tokens from validation; changed afterwards: {', '.join(names) or 'nothing'}"
        return Finding(not common and not names, text)

    def T18(self) -> Finding:
        """On the fresh process and, where there is one, on the log."""
        outputs, said, ok = {"fresh process": self.child["output"]}, [], self.child["rc"] == 0
        if self.log_path:
            outputs["log"] = self.log_path.read_text(encoding="utf-8", errors="replace")
        for name, text in outputs.items():
            final, scores = (
                final_lines(text),
                re.findall(r"^\S.*? val_loss:\S+ val_bpb:(\S+) eval_time", text, re.M),
            )
            last = float(scores[-1]) if scores else math.nan
            off = [abs(one["val_bpb"] - last) for one in final]
            ok = (
                ok
                and len(final) == 1
                and off[0] < 1e-7
                and not re.search(r"^\S.* INVALID: ", text, re.M)
            )
            away = f"{max(off, default=math.nan):.1e} from the last of {len(scores)} scores"
            said.append(f"{name}: {len(final)} final line, {away}")
        nats, final = self.child["doc_nats"], final_lines(self.child["output"])
        if nats is not None and final:
            docs = self.few
            own = nats.sum() / math.log(2) / sum(self.decoded(docs))
            ok = ok and abs(own / final[0]["val_bpb"] - 1) < 1e-6
            said.append(f"recomputed from its documents {own:.6f}")
        return Finding(ok, "; ".join(said))

    def T19(self) -> Finding:
        text, final = self.final()
        wanted = {
            "code_sha256": hashlib.sha256(self.script.read_bytes()).hexdigest(),
            "artifact_sha256": hashlib.sha256(self.artifact.read_bytes()).hexdigest(),
            **{key: self.subject.run.facts[key] for key in ("tokenizer_sha256", "val_sha256")},
        }
        wrong = [key for key, value in wanted.items() if final.get(key) != value]
        source, mark, _ = text.rpartition("\nHyperparameters:\n")
        logged = hashlib.sha256(source.encode()).hexdigest() if mark else None
        wrong += ["source text in the log"] * (logged not in (wanted["code_sha256"], None))
        knobs = dict(re.findall(r"^  (\w+): (.*) \((?:default|preset|env)\)$", text, re.M))
        own = ("eval_only_path", "eval_deadline_seconds")  # those of the audit
        scoring = (
            "ttt",
            "eval",
            "phased_ttt",
            "sliding",
            "logit_temperature",
            "compute_dtype",
            "seed",
        )
        now = {k: v for k, v in self.wanted.items() if k.startswith(scoring) and k not in own}
        now |= {k: getattr(self.subject.cfg, k) for k in self.tg.NETWORK_FIELDS}  # the artifact's
        other = [k for k, v in now.items() if str(v) != knobs.get(k)]
        text = f"{len(wanted)} hashes and {len(now)} knobs of the log compared; "
        text += f"different: {', '.join([*wrong, *other]) or 'none'}"
        return Finding(not wrong and not other, text)

    def T20(self) -> Finding:
        subject = self.exact
        canary = np.random.default_rng(20).choice(
            subject.words, min(256, int(1.3 * subject.cfg.eval_seq_len))
        )
        half = len(self.texts) // 2
        docs = subject.stream([*self.texts[:half], canary, *self.texts[half:], canary])

        def test(name: str) -> tuple[float, float, str]:
            with subject.equal_adapters():
                parts = by_document(subject.nats(name, docs), docs)
            first, second = parts[half][:-1], parts[-1][:-1]
            floor = math.log(len(subject.words)) - 4 * first.std() / math.sqrt(len(first))
            known, learnt = first.mean() < floor, float(first.mean() - second.mean())
            free = subject.by_rows(name) or subject.crosses and "ttt" in name
            detail = f"{first.mean():.3f} nats at first (ln V {math.log(len(subject.words)):.2f}), "
            detail += f"{learnt:+.1e} less later"
            return max(float(known), 0.0 if free else far(first, second) / CLOSE), 1.0, detail

        return self.over_evaluations(test)


TESTS = [f"T{i}" for i in range(21)]


def by_document(
    nats: np.ndarray, docs: Any
) -> list[np.ndarray]:  # without the last target, the BOS of the next
    return [
        nats[start : start + count - 1]
        for start, count in zip(docs.starts, docs.counts, strict=True)
    ]


# === Logs =============================================================================================================
def final_lines(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        if line.startswith("final {"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line[6:]))
    return found


def implied_bytes(path: Path) -> Finding:
    """T13 on a log of this script or a public record: val_loss / ln 2 * tokens / val_bpb of every score line."""
    text = path.read_text(encoding="utf-8", errors="replace")
    final = final_lines(text)
    tokens = [int(one["val_tokens"]) for one in final if "val_tokens" in one]
    tokens += [int(n) for n in re.findall(r"(?:val_tokens: ?|fineweb_val_\S* tokens:)(\d+)", text)]
    pattern = r"val_loss[:=] ?(\d+\.(\d+))\s+val_bpb[:=] ?(\d+\.(\d+))"
    scores = re.findall(pattern, text)
    scores = [score for score in scores if float(score[0]) and float(score[2])]
    if not any(tokens[:1]) or not scores:
        return Finding(
            None, "not run: no line with val_loss and val_bpb, or no number of validation tokens"
        )
    digits = max(min(len(a), len(b)) for _, a, _, b in scores)
    fine = [(float(x), float(y)) for x, a, y, b in scores if min(len(a), len(b)) == digits]
    loss, bpb = fine[-1]
    implied = loss / math.log(2) * tokens[0] / bpb
    slack = (
        0.5 * 10.0**-digits * (1 / loss + 1 / bpb)
    )  # what rounding of the printed figures leaves open
    near = min(CANONICAL, key=lambda n: abs(n - tokens[0]))
    if abs(near / tokens[0] - 1) < 1e-3:
        name, wanted = CANONICAL[near]
        wanted = wanted * tokens[0] / near
    elif final and "val_bytes" in final[-1]:
        name, wanted = "its own val_bytes", final[-1]["val_bytes"]
    else:
        return Finding(
            False,
            f"{tokens[0]:,} validation tokens: none of the known sets; {implied:,.0f} bytes implied",
        )
    ratio = implied / wanted
    passed = abs(ratio - 1) <= BYTES_TOLERANCE + slack
    text = f"val_bpb {bpb} implies {implied:,.0f} bytes, {wanted:,.0f} by {name}: factor {ratio:.6f} (+- {slack:.0e})"
    if passed and tokens[0] == 63_779_840:
        passed, text = False, f"{text}; that split was withdrawn"
    return Finding(passed, text, {"implied_bytes": implied, "ratio": ratio})


# === The fresh process ================================================================================================
WATCHED = (
    "open",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "socket.sendto",
    "urllib.Request",
)


def locked(script: str) -> None:
    """Runs the script as a program and writes what it opened to opened.json. Imports of torch come before the hook."""
    import runpy

    events, out = [], Path("opened.json").resolve()

    def hook(event: str, args: tuple) -> None:
        if event in WATCHED:
            target = str(args[0]) if args else ""  # a fork has none
            mode = str(args[1]) if event == "open" and len(args) > 1 else ""
            flags = args[2] if event == "open" and len(args) > 2 and isinstance(args[2], int) else 0
            writes = any(c in mode for c in "wax+") or bool(flags & (os.O_WRONLY | os.O_RDWR))
            if event in ("subprocess.Popen", "os.posix_spawn"):
                target = str(args[0]) if args[0] else str(args[1])
            events.append(
                (event, os.path.realpath(target) if event == "open" else target, writes, target)
            )

    sys.argv, sys.path[0] = [script], str(Path(script).parent)
    sys.addaudithook(hook)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        out.write_text(json.dumps(events))


def judge(events: list[tuple[str, str, bool, str]], folder: Path, cfg: Any) -> dict[str, Any]:
    """Splits what the process did into what an evaluation needs and violations."""
    system = {
        Path(p).resolve()
        for p in (sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev", "/etc", "/usr", "/lib")
    }
    system |= {Path(p).resolve() for p in sys.path if "site-packages" in p}
    data = folder / "data" / "datasets" / cfg.dataset_dir.name
    mine = {
        str(folder / name)
        for name in ("train_gpt.py", "artifact", "tokenizer.model", "opened.json")
    }
    mine |= {str(path) for path in data.glob("*_val_*.bin")}
    mine |= {
        str(data / "doctor.json"),
        os.devnull,
    }  # the first is looked for and not there; compilers write to null
    opened, violations = set(), []
    for event, path, writes, name in events:
        given = os.path.normpath(
            os.path.join(folder, name)
        )  # before links are followed: the bait is one
        own = given.startswith(
            (f"{folder}/runs/", f"{folder}/logs/", f"{folder}/tmp/", f"{folder}/home/.triton")
        )
        if event != "open":
            if not (cfg.compile and event == "subprocess.Popen"):  # a compiler at work
                violations.append(f"{event} {name}".strip())
        elif name.isdigit() or own or given in mine:
            opened.add(given.replace(f"{folder}/", "") if not name.isdigit() else "descriptor")
        elif writes or not any(Path(path).is_relative_to(place) for place in system):
            violations.append(
                f"{'write' if writes else 'read'} of {given.replace(f'{folder}/', '')}"
            )
    return {"opened": sorted(opened), "violations": sorted(set(violations))}


# === Report ===========================================================================================================
def properties(findings: dict[str, Finding]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, tests in PROPERTIES.items():
        ran = {
            test: findings[test]
            for test in tests
            if test in findings and findings[test].passed is not None
        }
        missing = [
            findings[test].evidence
            for test in tests
            if test in findings and findings[test].passed is None
        ]
        evidence = " | ".join(f"{test}: {finding.evidence}" for test, finding in ran.items())
        passed = all(finding.passed for finding in ran.values()) if ran else None
        found[name] = {
            "passed": passed,
            "tests": list(ran),
            "evidence": evidence or "; ".join(missing) or "not run",
        }
    return found


def as_markdown(result: dict[str, Any]) -> str:
    mark = {True: "yes", False: "**no**", None: "not shown"}
    lines = ["| property | holds | tests | evidence |", "|---|---|---|---|"]
    for name, row in result["properties"].items():
        evidence = row["evidence"].replace(" | ", "<br>").replace("|", "\\|")
        lines.append(
            f"| {name.replace('_', ' ')} | {mark[row['passed']]} | {', '.join(row['tests'])} | {evidence} |"
        )
    return "\n".join(lines)


def audit(
    script: Path,
    artifact: Path,
    environ: dict[str, str],
    tests: list[str],
    docs: int,
    log: Path | None = None,
) -> dict[str, Any]:
    """What audit.json holds."""
    start, visit = time.monotonic(), Audit(script, artifact, environ, docs, log)
    if "T0" not in tests:
        tests = ["T0", *tests]  # the floor of the others
    findings = visit.run(tests)
    held = properties(findings)
    if "ready" in visit.__dict__ and held["document_independent"]["passed"]:
        subject, row = visit.subject, held["document_independent"]
        said = ["documents learn from earlier ones"] * subject.crosses
        said += ["windows run over documents (DATA_LOADER)"] * any(
            map(subject.by_rows, subject.names)
        )
        if said:
            row |= {
                "passed": None,
                "evidence": f"{', '.join(said)}, as declared; nothing else: {row['evidence']}",
            }
    return {
        "artifact_sha256": hashlib.sha256(artifact.read_bytes()).hexdigest(),
        "code_sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
        "knobs": {
            k: v
            for k, v in visit.asked.items()
            if k not in ("DATA_DIR", "EVAL_ONLY_PATH", "TOKENIZER_PATH")
        },
        "documents": len(visit.texts) if "ready" in visit.__dict__ else 0,
        "seconds": round(time.monotonic() - start, 1),
        "properties": held,
        "always_on": sorted(set(visit.always_on)),
        "tests": {
            name: {"passed": f.passed, "evidence": f.evidence, **f.figures}
            for name, f in findings.items()
        },
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"audit.py: {message}\n")  # one line
    parser.add_argument("artifact", nargs="?", type=Path, help="final_model.int6.ptz of a run")
    parser.add_argument("--docs", type=int, default=8, help="documents of the sample (default 8)")
    parser.add_argument("--tests", default=",".join(TESTS), help="T0,T3,... (default: all)")
    parser.add_argument("--script", type=Path, default=SCRIPT, help="the script that scores")
    parser.add_argument(
        "--run-log", type=Path, help="log of the run; default: its own in logs/, beside runs/"
    )
    about = "default, if all tests run: audit.json beside the artifact"
    parser.add_argument("--json", type=Path, metavar="OUT", help=about)
    parser.add_argument("--markdown", action="store_true", help="print a table for a README")
    parser.add_argument(
        "--log", nargs="+", type=Path, metavar="FILE", help="T13 on these logs, nothing else"
    )
    args = parser.parse_args(argv)
    args.tests = [test.strip().upper() for test in args.tests.split(",")]
    if unknown := set(args.tests) - set(TESTS):
        parser.error(f"--tests: {', '.join(sorted(unknown))}: must be among {', '.join(TESTS)}")
    if (args.artifact is None) == (args.log is None):
        parser.error("needs an artifact, or --log and files")
    if args.docs < 4:
        parser.error(f"--docs {args.docs}: must be at least 4")
    for path in (
        [args.artifact, args.script, *filter(None, [args.run_log])] if args.artifact else args.log
    ):
        if not path.is_file():
            parser.error(f"{path}: no such file")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: no such folder")
    return args


def refused(script: Path, artifact: Path, environ: dict[str, str]) -> str | None:
    """Why there is nothing to judge. If this repository's script can begin, a refusal is the judged one's own."""
    try:
        visit = Audit(script, artifact, environ, 4, None)
    except Exception as error:
        return f"{script}: no train_gpt.py ({type(error).__name__}: {' '.join(str(error).split())})"
    why = Audit(SCRIPT, artifact, environ, 4, None).refused()
    return why if why and visit.refused() else None


def of_log(
    log: Path, environ: dict[str, str]
) -> dict[str, str]:  # the run's knobs that the environment lacks
    from pack import read_knobs  # here: it brings this repository's script with it

    aliases = load_script(SCRIPT).ALIASES
    have = {aliases.get(name, name) for name in environ}
    return {name: value for name, value in read_knobs(log.read_bytes()).items() if name not in have}


def main(argv: list[str]) -> int:
    if argv[:1] == ["--locked"]:
        locked(argv[1])
        return 0
    args, environ = parse(argv), dict(os.environ)
    if args.log:
        findings = {path: implied_bytes(path) for path in args.log}
        if all(finding.passed is None for finding in findings.values()):
            print(
                f"audit.py: {', '.join(map(str, findings))}: {findings[args.log[0]].evidence}",
                file=sys.stderr,
            )
            return 2
        for path, finding in findings.items():
            print(
                f"{ {True: 'ok', False: 'VIOLATION', None: '-'}[finding.passed]:<10}{path}: {finding.evidence}"
            )
        return int(any(finding.passed is False for finding in findings.values()))
    folder = args.artifact.resolve().parent
    log = args.run_log or log_of_run(folder)
    if log := log if log.is_file() else None:
        environ |= (taken := of_log(log, environ))
    if why := refused(args.script, args.artifact, environ):
        print(f"audit.py: {why}", file=sys.stderr)
        return 2
    if log:
        taken = " ".join(f"{name}={value}" for name, value in taken.items())
        print(f"audited as {log} says, {taken or 'no knob'}, and as the environment does")
    result = audit(args.script, args.artifact, environ, args.tests, args.docs, log)
    out = args.json or (folder / "audit.json" if set(args.tests) == set(TESTS) else None)
    if out:
        out.write_text(json.dumps(result, indent=1, default=float) + "\n")
    for name, test in result["tests"].items():
        verdict = {True: "ok", False: "VIOLATION", None: "-"}[test["passed"]]
        print(f"{name:<5}{verdict:<10}{test['seconds']:>6.1f} s  {test['evidence']}")
    if args.markdown:
        print("\n" + as_markdown(result))
    wrong = [name for name, test in result["tests"].items() if test["passed"] is False]
    said = out or "not all tests: nothing written without --json"
    print(
        f"{result['documents']} documents, {result['seconds']:.0f} s: {', '.join(wrong) or 'no'} violation; {said}"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
