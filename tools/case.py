"""What the tests of the audit share: an evaluation on trial.

A `Case` holds script, artifact, settings and a sample of validation documents. It starts the script
once, and computes at most once what several tests need: scores of the sample, an evaluation under
a StateWatch, documents drawn from the model, the outcome of a fresh process.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import caseops
import fresh_process
import numpy as np
import runlog
import torch
from held import HeldData, tokenizer_by_name
from probe import StateWatch, Subject, largest_difference, scratch_folder
from run_documents import DOCUMENTS, load_arrays
from scripts import load_script

from train_gpt import UsageError, shard_paths

EXACT_NATS = 1e-6  # same shapes on both sides; or twice the difference that T0 finds


class NotRun(Exception):
    """A test does not apply; the message says why."""


class Prepared(NamedTuple):
    """A subject and a sample of validation documents that it scores."""

    subject: Subject
    texts: list[np.ndarray]  # ids without BOS
    docs: Any  # the stream of the texts
    changes: dict[str, int]  # settings that fit it


class Drawn(NamedTuple):
    """Documents drawn from a model."""

    docs: Any
    log_p: np.ndarray  # (n,) fp64, ln p of every token, in order


class Watched(NamedTuple):
    """An evaluation under a StateWatch."""

    watch: StateWatch
    ledger: Any


# Nothing trains here: no time for it is measured, and none can lack.
FIXED_KNOBS = {
    "EVAL_DEADLINE_SECONDS": "1e9",
    "MAX_WALLCLOCK_SECONDS": "0",
    **runlog.KEEPS_NOTHING,
}


class Case:
    """A script, an artifact and settings on trial, and all that the tests share."""

    def __init__(
        self,
        script: Path,
        artifact: Path,
        environ: dict[str, str],
        num_documents: int,
        log_path: Path | None,
    ):
        """Loads the script. `environ` holds its knobs; the sample has `num_documents`."""
        self.script = script
        self.artifact = artifact
        self.log_path = log_path
        self.num_documents = num_documents
        self.tg = load_script(script)
        knobs = {field.name.upper() for field in dataclasses.fields(self.tg.Config)}
        aliases = getattr(self.tg, "ALIASES", {})
        environ = {aliases.get(name, name): value for name, value in environ.items()}
        self.asked = {name: value for name, value in environ.items() if name in knobs}
        self.environ = self._run_environment(environ)
        self.always_on: list[str] = []  # what the run's own ledger said
        self.floor: dict[str, float] = {}  # evaluation -> nats between two runs of the same
        self._failure: Exception | None = None
        self._base: dict[str, np.ndarray] = {}
        self._watched: dict[str, Watched] = {}

    def _run_environment(self, environ: dict[str, str]) -> dict[str, str]:
        """The environment of the run, with absolute paths: it runs elsewhere."""
        changed = {
            **environ,
            **FIXED_KNOBS,
            "EVAL_ONLY_PATH": str(self.artifact.absolute()),
            "RUN_ID": "audit",
            "ARTIFACT_DIR": "",
            "DATA_DIR": str(Path(environ.get("DATA_DIR") or "data").resolve()),
        }
        if environ.get("TOKENIZER_PATH"):
            changed["TOKENIZER_PATH"] = str(Path(environ["TOKENIZER_PATH"]).resolve())
        return changed

    def configuration(self) -> tuple[Any, Any]:
        """The script's configuration and where each field of it came from."""
        return self.tg.Config.from_env(self.environ, torch.cuda.is_available())

    def refusal(self) -> str | None:
        """Why there is nothing to judge, as the script says it: its configuration, the data or the
        artifact.
        """
        try:
            with scratch_folder():
                self.tg.Run(*self.configuration(), self.tg.Ranks({}))
        except self.tg.UsageError as error:
            return "; ".join(str(error).splitlines())
        try:
            self.tg.open_artifact(self.artifact.read_bytes(), self.artifact)
        except self.tg.UsageError:
            return f"{self.artifact}: a checkpoint, not an artifact"
        return None

    # --- Preparation ------------------------------------------------------------------------------
    @property
    def is_prepared(self) -> bool:
        """Whether a test has needed the subject, and got it."""
        return "prepared" in vars(self)

    @functools.cached_property
    def prepared(self) -> Prepared:
        """Subject and sample. A subject that cannot start is tried once, for all tests."""
        if self._failure:
            raise self._failure
        try:
            return self._prepare()
        except Exception as error:
            self._failure = error
            raise

    def _prepare(self) -> Prepared:
        asked, _ = self.configuration()
        # What the run shall be, before it is cut to fit the sample.
        self.wanted_config = dataclasses.asdict(asked)
        window = max(asked.eval_seq_len, asked.ttt_eval_seq_len)
        # The sample fills no larger rows, and warm-up need not be longer than a chunk of the
        # sample.
        val_batch_tokens = min(asked.val_batch_tokens, 32 * asked.eval_seq_len)
        longest_chunk = max(asked.eval_seq_len, self.num_documents * window // 3)
        self.environ["VAL_BATCH_TOKENS"] = str(val_batch_tokens)
        self.environ["TTT_CHUNK_TOKENS"] = str(min(asked.ttt_chunk_tokens, longest_chunk))
        subject = Subject(self.tg, self.environ)
        texts = subject.sample(self.num_documents, window)
        if subject.tilts:
            texts += rewritten(subject, texts)

        cfg = subject.cfg
        quarter = sum(map(len, texts)) // 4
        changes = {
            "val_batch_tokens": val_batch_tokens,
            "ttt_chunk_tokens": max(cfg.eval_seq_len, min(cfg.ttt_chunk_tokens, quarter)),
            "ttt_batch_size": min(cfg.ttt_batch_size, max(2, len(texts) // 8)),
            "phased_ttt_prefix_docs": min(cfg.phased_ttt_prefix_docs, max(1, 3 * len(texts) // 4)),
            "phased_ttt_prefix_tokens": min(cfg.phased_ttt_prefix_tokens, 3 * quarter),
        }
        subject.change_config(**changes)
        return Prepared(subject, texts, subject.stream(texts), changes)

    @property
    def subject(self) -> Subject:
        """The subject, with the settings of the run."""
        return self.prepared.subject

    @functools.cached_property
    def whole_docs(self) -> Any:
        """The longest validation document and two others, whole, as a stream."""
        held = self.held
        rng = np.random.default_rng(self.subject.cfg.seed)
        others = rng.permutation(np.delete(np.arange(len(held.counts)), held.counts.argmax()))
        numbers = [int(held.counts.argmax()), *others[:2].tolist()]
        return self.subject.stream([held.tokens[held.text_span(n)].astype(int) for n in numbers])

    @property
    def texts(self) -> list[np.ndarray]:
        """The sample: ids of documents without BOS."""
        return self.prepared.texts

    @property
    def docs(self) -> Any:
        """The sample as a stream."""
        return self.prepared.docs

    @functools.cached_property
    def fp32_subject(self) -> Subject:
        """The subject in fp32, where other shapes leave scores as they are."""
        if self.subject.cfg.compute_dtype == "fp32":
            return self.subject
        environ = {**self.environ, "COMPUTE_DTYPE": "fp32", "WARMUP_STEPS": "0"}
        return Subject(self.tg, environ, **self.prepared.changes)

    # --- What tests share -------------------------------------------------------------------------
    def base(self, name: str) -> np.ndarray:
        """Nats of the sample by an evaluation with the settings of the run."""
        if name not in self._base:
            self._base[name] = self.subject.nats(name, self.docs)
        return self._base[name]

    def watched(self, name: str) -> Watched:
        """An evaluation of the sample under a StateWatch."""
        if name not in self._watched:
            watch = StateWatch(self.subject)
            ledger = self.subject.evaluate(name, self.docs, watch)
            self._watched[name] = Watched(watch, ledger)
        return self._watched[name]

    @functools.cached_property
    def drawn(self) -> Drawn:
        """Documents drawn from the frozen model."""
        cfg = self.subject.cfg
        length = min(96, cfg.eval_seq_len, cfg.ttt_eval_seq_len)
        return draw_documents(self.subject, 2 * self.num_documents, length)

    def allowed(self, name: str) -> float:
        """Nats by which two evaluations with the same shapes may differ."""
        return max(EXACT_NATS, 2 * self.floor.get(name, 0.0))

    @functools.cached_property
    def thread_floor(self) -> float:
        """Nats a token by which `few_docs` differ here with another number of threads.

        The least that two processes may differ, at this precision and in these shapes.
        """
        subject = self.subject
        last = subject.names[-1]
        threads = torch.get_num_threads()
        docs = self.few_docs
        scores = []
        try:
            for number in (threads, 1 if threads > 1 else 2):
                torch.set_num_threads(number)
                scores.append(subject.evaluate(last, docs).by_document()["doc_nats"] / docs.counts)
        finally:
            torch.set_num_threads(threads)
        return largest_difference(*scores)

    def document_ids(self, docs: Any) -> list[np.ndarray]:
        """The ids of each document without BOS."""
        texts = []
        for start, count in zip(docs.starts.tolist(), docs.counts.tolist(), strict=True):
            ids = docs.tokens[start + 1 : start + count + 1]
            texts.append(ids[ids != self.subject.bos])
        return texts

    def decoded_bytes(self, docs: Any) -> list[int]:
        """UTF-8 bytes of the text of each document, by decoding it.

        Case operators have none. What a tokenizer has folded is told by the side-car alone.
        """
        model = self.held.model
        if docs.bytes is None:
            return [len(model.decode(ids.tolist()).encode()) for ids in self.document_ids(docs)]
        if caseops.is_lossless(model):
            texts = self.document_ids(docs)
            return [int(self.subject.pieces.counts(ids).sum()) for ids in texts]
        ends = docs.starts + docs.counts
        spans = zip(docs.starts.tolist(), ends.tolist(), strict=True)
        return [int(docs.bytes[start + 1 : end + 1].sum()) for start, end in spans]

    @functools.cached_property
    def few_docs(self) -> Any:
        """The documents that the fresh process scores: a sample, or the first ones of a stream of
        rows.
        """
        run = self.subject.run
        cfg = self.subject.cfg
        stream = run.streams["val"]
        starts = np.flatnonzero(run.docs.tokens == self.subject.bos)
        share = min(1.0, max(2, self.num_documents // 6) / len(starts))
        if cfg.data_loader != "documents":  # rows cannot be sampled
            least = 2 * max(self.prepared.changes["ttt_chunk_tokens"], 2 * cfg.eval_seq_len)
            ends = [int(start) for start in starts[1:] if start >= least]
            size = ends[0] if ends else stream.size
            stream = SimpleNamespace(size=size, read=stream.read, sidecar=stream.sidecar)
            share = 1.0
        few = dataclasses.replace(cfg, val_doc_fraction=share)
        return self.tg.Documents.load(stream, self.subject.bos, few)

    @functools.cached_property
    def fresh(self) -> fresh_process.Outcome:
        """The evaluation of `few_docs` in a fresh process and an empty folder."""
        subject = self.subject
        docs = self.few_docs
        share = 1.0
        if subject.cfg.data_loader == "documents":
            share = len(docs.starts) / int((docs.tokens == subject.bos).sum())
        variables = {**self.asked, **FIXED_KNOBS, "VAL_DOC_FRACTION": repr(share)}
        for name, value in self.prepared.changes.items():
            variables[name.upper()] = str(value)
        # The data set's name says nothing about what it must hold.
        dataset = dataclasses.replace(subject.cfg, dataset="alone").dataset_dir.name
        luggage = fresh_process.Luggage(
            script=self.script,
            artifact=self.artifact,
            tokenizer=subject.run.tokenizer.path,
            shard_name=subject.run.streams["val"].paths[0].name,
            dataset=dataset,
            variables=variables,
            compiles=subject.cfg.compile,
        )
        # Whatever this process could learn from documents that are not scored here must be of no
        # use, so the fresh one finds random tokens in their place.
        tokens = docs.tokens.copy()
        is_unscored = tokens != subject.bos
        is_unscored[docs.target_indices() + 1] = False
        noise = np.random.default_rng(8)
        tokens[is_unscored] = noise.choice(subject.words, int(is_unscored.sum()))
        counts = None
        if docs.bytes is not None:
            counts = np.where(is_unscored, subject.pieces.counts(tokens), docs.bytes)
        outcome = fresh_process.run_alone(luggage, self.tg.write_shard, tokens, counts)
        self.always_on += outcome.invalid
        return outcome

    @functools.cached_property
    def held(self) -> HeldData:
        """The validation data, read without the script."""
        name = self.subject.run.cfg.dataset_dir.name
        folder = Path(self.environ["DATA_DIR"]) / "datasets" / name
        given = self.environ.get("TOKENIZER_PATH")
        vocab_size = self.subject.cfg.vocab_size
        tokenizer = Path(given) if given else tokenizer_by_name(folder, vocab_size)
        return HeldData.load(folder, tokenizer)

    def documents_of_run(self) -> dict[str, np.ndarray] | None:
        """The scores of the run's documents, from documents.npz beside the artifact; or None.

        Raises NotRun if the file cannot be read.
        """
        path = self.artifact.resolve().with_name(DOCUMENTS)
        if not path.is_file():
            return None
        try:
            return load_arrays(path)
        except UsageError as error:
            raise NotRun(str(error)) from error

    def shards(self, split: str) -> list[Path]:
        """The shards of a split, in order. The side-car of `val` is the split `val_bytes`."""
        return shard_paths(self.held.folder, split)

    def log_text(self) -> str:
        """The run's log. Raises NotRun if there is none."""
        if not self.log_path:
            raise NotRun("no log")
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def final(self) -> dict[str, Any]:
        """The figures of the log. Raises NotRun unless it has one final line."""
        finals = runlog.final_lines(self.log_text())
        if len(finals) != 1:
            raise NotRun(f"the log has {len(finals)} final lines")
        return finals[0]


def rewritten(subject: Subject, texts: list[np.ndarray]) -> list[np.ndarray]:
    """Every second text again, without one token in twenty: there hints are right and wrong.

    Pieces of one byte stay, because a character may need all of its bytes.
    """
    model = subject.run.tokenizer.model
    rng = np.random.default_rng(6)
    copies = []
    for text in texts[::2]:
        is_byte = np.array([model.is_byte(int(token)) for token in text])
        copies.append(text[is_byte | (rng.random(len(text)) > 0.05)])
    return copies


# === Documents drawn from the model ===============================================================
def draw_documents(subject: Subject, count: int, length: int) -> Drawn:
    """Draws documents of `length` tokens from the frozen model, without a BOS inside."""
    generator = torch.Generator().manual_seed(9)
    per_row = max(1, subject.run.cfg.val_row_shape[0] // length)
    texts: list[list[int]] = []
    log_p = []
    for first in range(0, count, per_row):
        group = [[subject.bos] for _ in range(min(per_row, count - first))]
        of_group = []
        for _ in range(length):
            drawn = draw_next(subject, group, length, generator)
            of_group.append(drawn.log_p)
            group = [
                [*text, token] for text, token in zip(group, drawn.tokens.tolist(), strict=True)
            ]
        texts += group
        log_p.append(np.stack(of_group, 1).ravel())
    docs = subject.stream([np.array(text[1:]) for text in texts])
    return Drawn(docs, np.concatenate(log_p))


class NextTokens(NamedTuple):
    """One token drawn for each of some texts."""

    tokens: np.ndarray  # (n,)
    log_p: np.ndarray  # (n,) fp64


def draw_next(
    subject: Subject, texts: list[list[int]], length: int, generator: torch.Generator
) -> NextTokens:
    """Draws a token after each of some texts that are equally long."""
    run = subject.run
    size = len(texts[0])
    ids = np.concatenate(texts)
    starts = np.arange(0, len(ids), size)
    shape = (len(ids), len(texts), length)
    # The ids stand in for targets, which play no part.
    batch = subject.tg.pack_row(ids, ids, starts, shape, run.ranks.device)
    last = torch.from_numpy(starts + size - 1).to(run.ranks.device)
    log_p = subject.distribution(batch, run.plan, None, last).cpu().double()
    log_p[:, subject.bos] = -math.inf
    log_p = log_p.log_softmax(-1)
    drawn = torch.multinomial(log_p.exp(), 1, generator=generator)
    return NextTokens(drawn[:, 0].numpy(), log_p.gather(1, drawn)[:, 0].numpy())
