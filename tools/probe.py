"""Runs the evaluations of a train_gpt.py under observation.

`Subject` is a script with an artifact, ready to score streams of our making. A `Watch` listens to
one evaluation: in which order targets are scored. `StateWatch` also looks at weights and adapters
around every forward, `BlindWatch` computes probabilities while target and future are withheld.
Nothing here reads code: all of it patches names of the script's module while an evaluation runs.
SCRIPT_NAMES lists those names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import caseops
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

# The names in train_gpt.py that the audit relies on.
SCRIPT_NAMES = (
    "ALIASES",
    "Adaptation.begin",
    "CANONICAL",
    "Config.from_env",
    "Documents.load",
    "Documents.target_indices",
    "Ledger.by_document",
    "Ledger.problems",
    "Ledger.record",
    "Ledger.require_scored",
    "Ledger.result",
    "LoRA.reset",
    "NETWORK_FIELDS",
    "Ranks",
    "Run.go",
    "Run.phase",
    "Run.report",
    "Run.run_evaluation",
    "Run.warm_up",
    "UsageError",
    "head_loss",
    "hint_sources",
    "open_artifact",
    "pack_row",
    "write_shard",
)
# The attributes of a Run, once it has gone through its phases, that run the model.
FORWARDS = ("forward", "scoring", "ttt_forward")
# The attributes of an Adaptation that hold what a batch of documents learns into: the adapters in
# fp32, those that the forward reads, and the optimiser's moments.
ADAPTER_STATE = ("documents.master", "documents.lora", "documents.moments")


# === Small things =================================================================================
@contextlib.contextmanager
def scratch_folder() -> Iterator[None]:
    """Moves to an empty folder and silences the output: a run writes its log where it is."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


INTEGERS_OF_SIZE = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def hash_tensors(tensors: Iterable[Tensor]) -> int:
    """A 64-bit hash of the bits of all elements and of their positions."""
    total = 0
    factor = 0x9E3779B97F4A7C15
    for tensor in tensors:
        integers = INTEGERS_OF_SIZE[tensor.element_size()]
        bits = tensor.detach().contiguous().flatten().view(integers).long()
        odd = torch.arange(1, 2 * len(bits), 2, device=bits.device)
        total = (total * factor + int((bits * odd).sum()) + int(bits.sum())) % 2**64
    return total


def random_state() -> int:
    """A hash of the states of all random number generators of this process."""
    states = (
        torch.get_rng_state().numpy().tobytes(),
        str(np.random.get_state()),
        random.getstate(),
    )
    return hash(states)


def float_tensors(value: Any) -> list[Tensor]:
    """All floating-point tensors that a value holds, in containers and in attributes, modules left
    out.
    """
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, torch.nn.Module):
        return []
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = list(vars(value).values())
    else:
        return []
    return [tensor for part in parts for tensor in float_tensors(part)]


def worst_of(*values: float) -> float:
    """The largest value; NaN if one of them is NaN, which `max` may pass over."""
    return float(np.max(values))


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest absolute difference; 0 for empty arrays, NaN if there is one in them."""
    return float(np.abs(a - b).max(initial=0.0))


def join_positions(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Positions (n,) int64 from arrays of them, which may be none."""
    return np.concatenate([np.arange(0), *parts]).astype(int)


def missing_names(module: ModuleType, names: Iterable[str]) -> list[str]:
    """Those dotted names that the module does not define."""
    missing = []
    for name in names:
        owner: Any = module
        for part in name.split("."):
            owner = getattr(owner, part, None)
        if owner is None:
            missing.append(name)
    return missing


# === A run that keeps its evaluations =============================================================
def probe_class(tg: ModuleType) -> type:
    """A subclass of the script's Run that goes through all phases but keeps the evaluations instead
    of scoring.
    """

    class Probe(tg.Run):
        """Holds `evaluations` by name, `warm_inputs` and `warm_up_kept`."""

        def warm_up(self, *args: Any) -> Any:
            """Warms up, notes the inputs of every forward, and whether weights and random state
            stay.
            """
            self.warm_inputs: list[np.ndarray] = []
            originals = {name: getattr(self, name) for name in FORWARDS}

            def noting(forward: Callable) -> Callable:
                def note_and_run(batch: Any, *args: Any, **options: Any) -> Tensor:
                    self.warm_inputs.append(batch.inputs.cpu().numpy())
                    return forward(batch, *args, **options)

                return note_and_run

            weights = hash_tensors(self.model.state_dict().values())
            generators = random_state()
            for name, forward in originals.items():
                setattr(self, name, noting(forward))
            reserve = super().warm_up(*args)
            for name, forward in originals.items():
                setattr(self, name, forward)
            self.warm_up_kept = {
                "weights": weights == hash_tensors(self.model.state_dict().values()),
                "random state": generators == random_state(),
            }
            return reserve

        def run_evaluation(self, key: str, evaluation: Callable, budget: str = "eval") -> None:
            """Keeps an evaluation under its key."""
            with self.phase(key, budget):
                if not hasattr(self, "evaluations"):
                    self.evaluations: dict[str, Callable] = {}
                self.evaluations[key] = evaluation

        def report(self) -> dict[str, Any]:
            """Reports nothing."""
            return {}

    return Probe


# === Listening to one evaluation ==================================================================
class Forward(NamedTuple):
    """The arguments of a forward that scores or learns."""

    batch: Any
    plan: tuple
    lora: Any
    select: Tensor | None


class Watch:
    """Listens to one evaluation and records in which order its targets are scored.

    Subclasses override the methods that are called for events.
    """

    def __init__(self, subject: Subject):
        """Listens to an evaluation of this subject; each watch serves once."""
        self.subject = subject
        self.order: list[np.ndarray] = []  # targets by stream index, as they were scored

    def began(self) -> None:
        """The evaluation is about to begin."""

    def before_forward(self) -> None:
        """A forward is about to run."""

    def after_forward(self, forward: Forward) -> None:
        """A forward has run."""

    def scored(self, targets: Tensor, ledger: Any) -> None:
        """These targets (n,) get their final scores; padding is among them."""
        self.order.append(real_targets(targets, ledger))

    def read(self, targets: Tensor, ledger: Any) -> None:
        """An update declares that it reads these targets (n,); padding is among them."""

    def before_adapters(self) -> None:
        """New adapters are about to be made for a batch of documents."""

    def after_adapters(self, adaptation: Any) -> None:
        """New adapters were made for a batch of documents."""

    def optimiser_stepped(self, optimiser: torch.optim.Optimizer) -> None:
        """An optimiser of torch has taken a step."""

    def listened(self, forward: Callable) -> Callable:
        """The same forward, reporting to this watch."""

        def run(batch: Any, plan: tuple, *args: Any, **options: Any) -> Tensor:
            self.before_forward()
            nats = forward(batch, plan, *args, **options)
            call = Forward(batch, plan, options.get("lora"), options.get("select"))
            self.after_forward(call)
            return nats

        return run

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Makes ledger, adaptation and forwards of the script report to this watch."""
        tg = self.subject.tg
        run = self.subject.run
        originals = {name: getattr(run, name) for name in ("scoring", "ttt_forward")}
        ledger_class = tg.Ledger
        adaptation_class = tg.Adaptation
        hook = register_optimizer_step_post_hook(self._optimiser_hook)
        tg.Ledger = listening_ledger(ledger_class, self)
        tg.Adaptation = listening_adaptation(adaptation_class, self)
        for name, forward in originals.items():
            setattr(run, name, self.listened(forward))
        try:
            self.began()
            yield
        finally:
            tg.Ledger = ledger_class
            tg.Adaptation = adaptation_class
            for name, forward in originals.items():
                setattr(run, name, forward)
            hook.remove()

    def _optimiser_hook(self, optimiser: torch.optim.Optimizer, *_: Any) -> None:
        self.optimiser_stepped(optimiser)


def real_targets(targets: Tensor, ledger: Any) -> np.ndarray:
    """The targets (n,) by stream index, without padding."""
    return targets[targets != ledger.padding_index].cpu().numpy()


def listening_ledger(ledger_class: type, watch: Watch) -> type:
    """A subclass of the script's ledger that tells a watch about scores and reads."""

    class Ledger(ledger_class):
        """Reports each call, then does what the script does."""

        def record(self, targets: Tensor, nats: Tensor) -> None:
            """Reports scores."""
            watch.scored(targets, self)
            super().record(targets, nats)

        def require_scored(self, targets: Tensor, *args: Any) -> None:
            """Reports the reads of an update."""
            watch.read(targets, self)
            super().require_scored(targets, *args)

    return Ledger


def listening_adaptation(adaptation_class: type, watch: Watch) -> type:
    """A subclass of the script's adaptation that tells a watch when adapters begin."""

    class Adaptation(adaptation_class):
        """Reports each call, then does what the script does."""

        def begin(self, *args: Any) -> Any:
            """Reports a new batch of documents."""
            watch.before_adapters()
            result = super().begin(*args)
            watch.after_adapters(self)
            return result

    return Adaptation


class StateHash(NamedTuple):
    """Hashes of all that an evaluation may learn into."""

    weights: int  # and buffers and optimiser moments of the model
    adapters: int  # and their moments


class TokenPair(NamedTuple):
    """A target and the token before it."""

    before: int
    target: int


class StateWatch(Watch):
    """Looks whether weights or adapters change without a licence.

    A licence is the declared read of scored targets; the next scores end it.
    """

    def __init__(self, subject: Subject):
        """Listens to an evaluation of this subject; each watch serves once."""
        super().__init__(subject)
        self.num_read = 0  # targets that updates declared to read
        self.num_read_early = 0  # those of them that had no score
        self.num_blocks = 0  # of scores
        self.update_faults: list[str] = []
        self.scoring_faults: list[str] = []
        self._optimisers: list[torch.optim.Optimizer] = []
        self._adaptation: Any = None  # the newest
        self._has_licence = False
        self._known: StateHash | None = None
        self._around_forward: set[StateHash] = set()  # before and after the newest forward
        self._before_forward: StateHash | None = None
        self._learnt_from: list[Any] = []  # batches with gradients since the last change
        self._scored_pairs: set[TokenPair] = set()

    def began(self) -> None:
        """Whatever changes before the first forward needs a licence, too."""
        self._known = self.state()

    def state(self) -> StateHash:
        """The state now."""
        model = self.subject.run.model
        moments = []
        for optimiser in self._optimisers:
            for of_parameter in optimiser.state.values():
                moments += [value for value in of_parameter.values() if isinstance(value, Tensor)]
        adapters = []
        if self._adaptation is not None:
            for name in ADAPTER_STATE:
                adapters += float_tensors(attrgetter(name)(self._adaptation))
        weights = hash_tensors([*model.parameters(), *model.buffers(), *moments])
        return StateHash(weights, hash_tensors(adapters))

    def note_state(self) -> StateHash:
        """The state now, after looking whether it was allowed to change.

        A change needs a licence, and what it was learnt from must be scored.
        """
        now = self.state()
        if self._known is not None and now != self._known:
            if not self._has_licence:
                text = "a state changed without a declared read of scored targets"
                self.update_faults.append(text)
            num_unscored = 0
            for batch in self._learnt_from:
                num_unscored += sum(pair not in self._scored_pairs for pair in pairs_of(batch))
            if num_unscored:
                text = f"learnt from {num_unscored} targets that had no score yet"
                self.update_faults.append(text)
            self._learnt_from = []
        self._known = now
        return now

    def before_forward(self) -> None:
        """Looks at the state."""
        self._before_forward = self.note_state()

    def after_forward(self, forward: Forward) -> None:
        """Notes what may be learnt from, and the state."""
        if torch.is_grad_enabled():
            self._learnt_from.append(forward.batch)
        self._known = self.state()
        self._around_forward = {self._before_forward, self._known}

    def scored(self, targets: Tensor, ledger: Any) -> None:
        """Looks whether forward and score left the state alone; ends the licence."""
        real = real_targets(targets, ledger)
        if self._around_forward:
            self.num_blocks += 1
            if len({*self._around_forward, self.state()}) > 1:
                text = f"state changed while {len(real)} targets were scored"
                self.scoring_faults.append(text)
            tokens = ledger.docs.tokens
            pairs = zip(tokens[real].tolist(), tokens[real + 1].tolist(), strict=True)
            self._scored_pairs |= {TokenPair(*pair) for pair in pairs}
        super().scored(targets, ledger)
        self._has_licence = False

    def read(self, targets: Tensor, ledger: Any) -> None:
        """Counts reads and gives a licence."""
        self.note_state()
        real = real_targets(targets, ledger)
        self.num_read += len(real)
        self.num_read_early += len(np.setdiff1d(real, join_positions(self.order)))
        self._has_licence = True

    def before_adapters(self) -> None:
        """Looks at the state before it is replaced."""
        self.note_state()

    def after_adapters(self, adaptation: Any) -> None:
        """Takes new adapters for a state that nothing was learnt into."""
        self._adaptation = adaptation
        self._known = self.state()
        self._learnt_from = []

    def optimiser_stepped(self, optimiser: torch.optim.Optimizer) -> None:
        """Watches the moments of an optimiser from its first step on."""
        if all(optimiser is not known for known in self._optimisers):
            self._optimisers.append(optimiser)


def pairs_of(batch: Any) -> list[TokenPair]:
    """All targets of a batch with the tokens before them."""
    has_target = batch.targets >= 0
    inputs = batch.inputs[has_target].tolist()
    targets = batch.targets[has_target].tolist()
    return [TokenPair(*pair) for pair in zip(inputs, targets, strict=True)]


class BlindWatch(Watch):
    """Computes log p(.) at some targets from the same state, while target and future are withheld.

    The script's forward gets random tokens from the target on, and no targets.
    """

    def __init__(self, subject: Subject, wanted: set[int]):
        """Looks at the targets `wanted`, given by stream index."""
        super().__init__(subject)
        self.wanted = wanted
        self.log_p: dict[int, Tensor] = {}  # stream index -> (V,) fp32
        self.hints: dict[int, int] = {}  # stream index -> token, -1 for none, with the token tilt
        self._newest: Forward | None = None

    def after_forward(self, forward: Forward) -> None:
        """Keeps the forward whose scores come next."""
        self._newest = forward

    def scored(self, targets: Tensor, ledger: Any) -> None:
        """Repeats the newest forward blindly for each wanted target."""
        # Logits with an adapter can be compared only where the script selects them.
        is_comparable = (self._newest.lora is None) == (self._newest.select is None)
        for row, target in enumerate(targets.tolist()):
            if is_comparable and target in self.wanted and target not in self.log_p:
                self.log_p[target] = self._blind_log_p(row, target)
                if self.subject.tilts:
                    self.hints[target] = self._blind_hint(ledger.docs, target)
        super().scored(targets, ledger)

    def _blind_log_p(self, row: int, target: int) -> Tensor:
        """log p(.) (V,) for the score in this row of the newest forward."""
        batch, plan, lora, select = self._newest
        position = row if select is None else int(select[row])
        inputs = batch.inputs.clone()
        noise = np.random.default_rng(target)
        tokens = noise.choice(self.subject.words, len(inputs) - position - 1)
        inputs[position + 1 :] = torch.from_numpy(tokens).to(inputs.device)
        no_targets = torch.full_like(batch.targets, -1)
        blind = batch._replace(inputs=inputs, targets=no_targets)
        log_p = self.subject.distribution(blind, plan, lora, select)
        return log_p[position if select is None else row].cpu()

    def _blind_hint(self, docs: Any, target: int) -> int:
        """The hint of this target on a stream that is random from the target on."""
        noise = np.random.default_rng(target)
        tokens = docs.tokens.copy()
        tokens[target + 1 :] = noise.choice(self.subject.words, len(tokens) - target - 1)
        return int(self.subject.hints(docs._replace(tokens=tokens))[target])


# === Script and artifact ==========================================================================
class CannotObserve(Exception):
    """The script gives no hold for an observation that a test needs."""


class NotFinite(Exception):
    """An evaluation has scores that are no numbers, so no test of it can pass."""


class Subject:
    """A script and an artifact, ready to score streams of our making."""

    def __init__(self, tg: ModuleType, environ: dict[str, str], **changes: Any):
        """Starts the run and keeps its evaluations; then changes its configuration."""
        self.tg = tg
        with scratch_folder():
            config_and_origin = tg.Config.from_env(environ, torch.cuda.is_available())
            self.run = probe_class(tg)(*config_and_origin, tg.Ranks({}))
            self.run.go()
        self.cfg = self.run.cfg
        self.bos = self.run.tokenizer.bos_id
        self.words = self._find_words()
        self.change_config(**changes)

    def _find_words(self) -> np.ndarray:
        """The ids (n,) that may stand inside a text."""
        model = self.run.tokenizer.model
        special = []
        for token in range(model.vocab_size()):
            if model.is_control(token) or model.is_unknown(token):
                special.append(token)
        return np.setdiff1d(np.arange(self.cfg.vocab_size), special)

    @functools.cached_property
    def pieces(self) -> caseops.PieceTable | None:
        """Counts the bytes of our streams, where a side-car counts those of the data."""
        if self.run.docs.bytes is None:
            return None
        return caseops.PieceTable.from_sentencepiece(self.run.tokenizer.model)

    @property
    def names(self) -> list[str]:
        """The names of the run's evaluations, in its order."""
        return list(self.run.evaluations)

    @property
    def learns_across_documents(self) -> bool:
        """Whether documents learn from earlier ones, by declaration."""
        cfg = self.cfg
        adapts = any("ttt" in name for name in self.names)
        in_chunks = cfg.ttt_mode == "chunk"
        return adapts and (in_chunks or cfg.phased_ttt_num_phases > 0 or cfg.ttt_warm_start_a)

    @property
    def tilts(self) -> bool:
        """Whether hints from all earlier documents tilt the scores, by declaration."""
        return getattr(self.run.cfg, "tilt_order", 0) > 0

    def reads_across_documents(self, name: str) -> bool:
        """Whether the windows of an evaluation lie on the stream as on one document, by
        declaration.
        """
        has_own_adapters = "ttt" in name and self.cfg.ttt_mode == "document"
        return self.cfg.data_loader != "documents" and not has_own_adapters

    # --- Settings ---------------------------------------------------------------------------------
    def change_config(self, **changes: Any) -> None:
        """Changes fields of the configuration that the evaluations go by."""
        changed = dataclasses.replace(self.run.cfg, **changes)
        self.run.cfg = changed
        self.run.model.cfg = changed

    @contextlib.contextmanager
    def config_changed(self, **changes: Any) -> Iterator[None]:
        """Changes fields of the configuration for a while."""
        before = self.run.cfg
        self.change_config(**changes)
        try:
            yield
        finally:
            self.run.cfg = before
            self.run.model.cfg = before

    def without_crossing(self) -> contextlib.AbstractContextManager:
        """Rates of 0, and no token tilt, where documents use earlier ones by declaration."""
        changes: dict[str, float] = {}
        if self.learns_across_documents:
            changes = {"ttt_lr": 0.0, "ttt_lora_lr": 0.0, "ttt_weight_decay": 0.0}
        if self.tilts:
            changes["tilt_order"] = 0
        return self.config_changed(**changes)

    @contextlib.contextmanager
    def hints_forced(self, targets: np.ndarray) -> Iterator[None]:
        """Gives all these targets (n,) of a made stream one hint, its second target, and no other
        target any.
        """
        original = self.tg.hint_sources

        def forced(tokens: Tensor, *_: Any) -> Tensor:
            sources = torch.full_like(tokens, -1)
            sources[torch.from_numpy(targets).to(tokens.device)] = 1
            return sources

        self.tg.hint_sources = forced
        try:
            yield
        finally:
            self.tg.hint_sources = original

    @contextlib.contextmanager
    def equal_adapters(self) -> Iterator[None]:
        """Every document begins with the same adapter, as it would at the same place of a stream.

        Otherwise its place in the stream is the key of its random numbers.
        """
        lora = self.tg.LoRA
        original = lora.reset

        def reset(adapter: Any, seed: int, keys: Iterable[int]) -> Any:
            return original(adapter, seed, [0] * len(list(keys)))

        lora.reset = reset
        try:
            yield
        finally:
            lora.reset = original

    # --- Scores -----------------------------------------------------------------------------------
    def evaluate(self, name: str, docs: Any, watch: Watch | None = None) -> Any:
        """The ledger of an evaluation of these documents; nothing is printed.

        Raises NotFinite for NaN and infinite scores: no comparison would find them.
        """
        torch.manual_seed(self.cfg.seed)
        listening = watch.listening() if watch else contextlib.nullcontext()
        with listening, scratch_folder():
            ledger = self.run.evaluations[name](docs=docs)
        wrong = int((~torch.isfinite(ledger.nats[:-1])).sum())
        if wrong:
            raise NotFinite(f"{name}: {wrong} scores are not finite")
        return ledger

    def nats(self, name: str, docs: Any, watch: Watch | None = None) -> np.ndarray:
        """The scores (N - 1,) fp64 of these documents, by stream index."""
        ledger = self.evaluate(name, docs, watch)
        return ledger.nats[:-1].cpu().double().numpy()

    def hints(self, docs: Any) -> np.ndarray:
        """The hint of every target (N,) by stream index, -1 for none, as the script finds it."""
        tilt = self.run.scorer(self.run.plan, docs, None).ledger.tilt
        return tilt.hints.cpu().numpy()

    def distribution(
        self, batch: Any, plan: tuple, lora: Any = None, select: Tensor | None = None
    ) -> Tensor:
        """log p(.) (n, V) fp32, made here of what the script's forward hands to its loss.

        No target takes part. Raises CannotObserve unless the forward calls head_loss once.
        """
        caught = []
        original = self.tg.head_loss

        def catch(
            x: Tensor, w: Tensor, extra: Tensor | None, targets: Tensor, cap: float, *rest: Any
        ) -> Tensor:
            logits = F.linear(x, w)
            if extra is not None:
                logits = logits + extra
            capped = cap * torch.tanh(logits.detach().float() / cap)
            caught.append(capped.log_softmax(-1))
            return original(x, w, extra, targets, cap, *rest)

        temperature = self.run.cfg.logit_temperature
        self.tg.head_loss = catch
        try:
            with torch.no_grad():
                self.run.model(batch, plan, lora=lora, select=select, temperature=temperature)
        finally:
            self.tg.head_loss = original
        if len(caught) != 1:
            raise CannotObserve(f"the forward calls head_loss {len(caught)} times")
        return caught[0]

    # --- Streams ----------------------------------------------------------------------------------
    def stream(self, texts: list[np.ndarray]) -> Any:
        """Documents of ids without BOS, end to end and closed by a BOS."""
        parts = []
        for text in texts:
            parts += [[self.bos], text]
        tokens = np.concatenate([*parts, [self.bos]]).astype(np.int64)
        counts = np.array([len(text) + 1 for text in texts])
        docs = self.tg.Documents(tokens, np.cumsum(counts) - counts, counts)
        return docs._replace(bytes=self.pieces.counts(tokens)) if self.pieces else docs

    def sample(self, count: int, window: int) -> list[np.ndarray]:
        """Texts from all over the validation set, longest first, cut to half a window and up to 2.2
        windows.
        """
        rng = random.Random(self.cfg.seed)
        everything = dataclasses.replace(self.cfg, val_doc_fraction=1.0)
        docs = self.tg.Documents.load(self.run.streams["val"], self.bos, everything)
        chosen = rng.sample(range(len(docs.starts)), min(count, len(docs.starts)))
        texts = []
        for number in sorted(chosen):
            start = docs.starts[number]
            texts.append(docs.tokens[start + 1 : start + docs.counts[number]])
        texts.sort(key=lambda text: -len(text))
        cut_texts = []
        for number, text in enumerate(texts):
            windows = 2.2 if number % 8 == 0 else rng.uniform(0.5, 1.3)
            cut_texts.append(self._end_at_character(text[: int(window * windows)]))
        return [text for text in cut_texts if len(text)]

    def _end_at_character(self, text: np.ndarray) -> np.ndarray:
        """The text without byte pieces at its end: a cut may fall inside a character spelt in
        bytes.
        """
        model = self.run.tokenizer.model
        end = len(text)
        while end and model.is_byte(int(text[end - 1])):
            end -= 1
        return text[:end]
