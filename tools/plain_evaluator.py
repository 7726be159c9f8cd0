"""An independent evaluation of an artifact in plain PyTorch: the reference for train_gpt.py.

It shares no code with train_gpt.py. Beside it, plain_artifact.py and plain_codes.py read the file,
plain_network.py is the network, and plain_adapter.py is what learns from a document. One document
at a time, in fp32.

    model = Model(Path("final_model.int6.ptz").read_bytes(), settings)
    model.plain(ids)           # nats of the targets ids[1:]: a document and the next BOS
    model.adapted(ids, start)  # the same with TTT_MODE=document; start: its place in the stream
    model.chunks(stream)       # TTT_MODE=chunk, over the whole stream

`settings` has the knobs by field name, as the Hyperparameters of a log. What this file does not
know raises NotImplementedError: phases, warm start, tilt, value embeddings, other optimisers.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from plain_adapter import Adapter, pairs
from plain_network import Addition, Network, NoAddition
from torch import Tensor

UNKNOWN = ("ttt_warm_start_a", "ttt_freeze_blocks", "phased_ttt_num_phases", "tilt_order")


class Window(NamedTuple):
    """Tokens that are read together, from `start` to `end`; targets from `first` on are scored."""

    start: int
    first: int
    end: int


def windows(count: int, length: int, stride: int) -> list[Window]:
    """Windows that score `count` targets once, `stride` new ones in each but the first."""
    found = []
    for start in range(0, max(count - length, 0) + stride, stride):
        first = start + length - stride if start else 0
        found.append(Window(start, first, min(start + length, count)))
    return found


class Model:
    """An artifact's network, and its evaluations with the settings of a run."""

    def __init__(self, artifact: bytes, settings: dict[str, Any]):
        """Reads the artifact and the settings (text or values, by field name)."""
        self.network = Network(artifact)
        self.s = {name: number(value) for name, value in settings.items()}
        unknown = [name for name in UNKNOWN if self.s[name]]
        for name, known in (("ttt_optimizer", "adam"), ("ttt_chunk_optimizer", "sgd")):
            if self.s[name] != known:
                unknown.append(name)
        if unknown:
            raise NotImplementedError(f"not known here: {', '.join(unknown)}")

    def nats(self, ids: Tensor, longest: int, scored: int, addition: Addition) -> Tensor:
        """Nats (scored,) of the last targets of one window, ids (T + 1,)."""
        hidden = self.network.hidden(ids[:-1], longest, addition)
        logits = self.network.logits(hidden[-scored:], addition)
        logits = logits / self.s["logit_temperature"]
        return F.cross_entropy(logits, ids[-scored:], reduction="none")

    @torch.no_grad()
    def plain(self, ids: np.ndarray, stride: int = 0) -> np.ndarray:
        """Nats of the targets ids[1:], in windows of EVAL_SEQ_LEN that begin at multiples."""
        ids = torch.as_tensor(ids).long()
        length = self.s["eval_seq_len"]
        found = []
        for start, first, end in windows(len(ids) - 1, length, stride or length):
            found.append(self.nats(ids[start : end + 1], length, end - first, NoAddition()))
        return torch.cat(found).numpy()

    def adapted(self, ids: np.ndarray, start: int) -> np.ndarray:
        """Nats of a document's targets; its adapter learns from a chunk after the score."""
        s = self.s
        ids = torch.as_tensor(ids).long()
        total = len(ids) - 1
        length = s["ttt_eval_seq_len"]
        adapter = Adapter(self.network.settings, s, len(self.network.visits), start)
        found = []
        done = 0
        while done < total:
            end = done + self.chunk_size(done)
            window = ids[max(0, end - length) : end + 1]
            count = min(end, total) - done
            nats = self.nats(window, length, count, adapter)
            found.append(nats.detach())
            if end < total and self.may_learn(end):
                adapter.learn(nats.mean())
                for _ in range(s["ttt_grad_steps"] - 1):
                    adapter.learn(self.nats(window, length, count, adapter).mean())
            done = end
        return torch.cat(found).numpy()

    def chunk_size(self, done: int) -> int:
        """Targets of the chunk that begins after `done` targets."""
        stages = [(int(limit), int(size)) for limit, size in pairs(self.s["ttt_short_chunks"])]
        for limit, size in sorted(stages):
            if done < limit:
                return size
        return self.s["ttt_chunk_size"]

    def may_learn(self, end: int) -> bool:
        """Whether a document's adapter learns from a chunk that ends after `end` targets."""
        longest = self.s["ttt_max_doc_len"] or math.inf
        return self.s["ttt_min_doc_len"] <= end <= longest

    def chunks(self, stream: np.ndarray, world_size: int = 1) -> np.ndarray:
        """Nats of all targets of a stream; all weights learn from a chunk after its score."""
        s = self.s
        ids = torch.as_tensor(stream).long()
        total = len(ids) - 1
        weights = self.network.weights
        saved = {name: w.clone() for name, w in weights.items()}
        for w in weights.values():
            w.requires_grad_()
        optimizer = torch.optim.SGD(weights.values(), momentum=s["ttt_momentum"])
        last = (total - 1) // s["ttt_chunk_tokens"]
        found = []
        for chunk in range(last + 1):
            begin = chunk * s["ttt_chunk_tokens"]
            end = min(begin + s["ttt_chunk_tokens"], total)
            found.append(self.score_chunk(ids, begin, end))
            if chunk < last:
                cosine = math.cos(math.pi * chunk / last)
                optimizer.param_groups[0]["lr"] = 0.5 * s["ttt_lr"] * (1 + cosine)
                self.learn_chunk(ids, begin, end, optimizer, world_size)
        self.network.weights = saved
        return torch.cat(found).numpy()

    @torch.no_grad()
    def score_chunk(self, ids: Tensor, begin: int, end: int) -> Tensor:
        """Nats of the stream's targets from `begin` to `end`."""
        length = self.s["eval_seq_len"]
        stride = self.s["eval_stride"] if self.s["sliding_window_enabled"] else length
        found = []
        for start, window_first, window_end in windows(len(ids) - 1, length, stride):
            first = max(window_first, begin)
            last = min(window_end, end)
            if first < last:
                window = ids[start : last + 1]
                found.append(self.nats(window, length, last - first, NoAddition()))
        return torch.cat(found)

    def learn_chunk(
        self,
        ids: Tensor,
        begin: int,
        end: int,
        optimizer: torch.optim.Optimizer,
        world_size: int,
    ) -> None:
        """TTT_EPOCHS over the whole windows of a chunk, some windows a step."""
        s = self.s
        length = s["eval_seq_len"]
        per_step = s["ttt_batch_seqs"] * world_size
        starts = range(begin, end - length + 1, length)
        steps = [starts[i : i + per_step] for i in range(0, len(starts), per_step)]
        for step in steps * s["ttt_epochs"]:
            optimizer.zero_grad()
            for start in step:
                window = ids[start : start + length + 1]
                nats = self.nats(window, length, length, NoAddition())
                (nats.sum() / (len(step) * length)).backward()
            weights = optimizer.param_groups[0]["params"]
            torch.nn.utils.clip_grad_norm_(weights, s["ttt_grad_clip"] or math.inf)
            optimizer.step()


def number(value: Any) -> Any:
    """A setting as a log prints it, as a number or a truth value where it is one."""
    if isinstance(value, bool):
        return value
    if value in ("True", "False"):
        return value == "True"
    for kind in (int, float):
        try:
            return kind(str(value))
        except ValueError:
            continue
    return value
