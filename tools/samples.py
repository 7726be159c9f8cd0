"""What a run's artifact writes: beginnings of validation documents, continued by the model.

    samples.py [RUN_DIR] [--tokens 48]      the newest folder in runs/ that holds an artifact

Three prompts, each continued greedily and by sampling with SEED, on the terminal and in RUN_DIR as
samples.json, which report.py shows. It takes the knobs of the run's log; the environment overrides
them. This is no part of the run: it changes no score and counts against no budget.

Exit status: 0 done, 2 there is no artifact, or its data are missing; told in one line.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import caseops  # noqa: E402
import runlog  # noqa: E402
import terminal  # noqa: E402
from run_documents import ARTIFACT, newest_run  # noqa: E402

import train_gpt as tg  # noqa: E402

NUM_PROMPTS = 3
PROMPT_TOKENS = 24
TEMPERATURE = 0.8


class Writer(NamedTuple):
    """An artifact that is ready to write, and the text of which it knows the beginnings."""

    model: tg.GPT
    plan: tuple[tg.Visit, ...]
    tokenizer: tg.Tokenizer
    docs: tg.Documents
    device: torch.device

    @classmethod
    def load(cls, artifact: Path, environ: dict[str, str]) -> Writer:
        """Loads an artifact with the data that `environ` names. Raises UsageError."""
        environ = {**environ, "EVAL_ONLY_PATH": str(artifact)}
        cfg, origin = tg.Config.from_env(environ, torch.cuda.is_available())
        cfg, saved = tg.load_model_file(cfg, origin)
        tokenizer = tg.Tokenizer.load(cfg)
        docs = tg.Documents.load(tg.TokenStream(cfg.dataset_dir, "val"), tokenizer.bos_id, cfg)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        backend, _ = tg.choose_attention(cfg.attention_backend, device, cfg.dtype)
        model = tg.GPT(cfg, backend).to(device).requires_grad_(False)
        tg.load_artifact(model, saved["arrays"])
        return cls(model, cfg.plans[saved["looped"]], tokenizer, docs, device)


def choose_prompts(docs: tg.Documents) -> np.ndarray:
    """Documents (n,) for the prompts, evenly spaced among those that go on after their prompt."""
    long_enough = np.flatnonzero(docs.counts > PROMPT_TOKENS)
    places = np.arange(NUM_PROMPTS) * len(long_enough) // NUM_PROMPTS
    return long_enough[np.unique(places)] if len(long_enough) else long_enough


@torch.no_grad()
def continue_prompts(
    model: tg.GPT,
    plan: tuple[tg.Visit, ...],
    prompts: np.ndarray,
    num_tokens: int,
    device: torch.device,
) -> np.ndarray:
    """Continues each prompt, ids (n, P), greedily and by sampling: ids (2, n, num_tokens).

    The texts are the segments of one row. Its shape never changes, because no position of a causal
    model depends on what stands behind it. A sample depends on SEED alone.
    """
    cfg = model.cfg
    num_prompts, prompt_tokens = prompts.shape
    length = prompt_tokens + num_tokens
    ids = torch.zeros(2 * num_prompts, length, dtype=torch.long)
    ids[:, :prompt_tokens] = torch.from_numpy(np.concatenate([prompts, prompts]))
    starts = np.arange(0, ids.numel(), length)
    shape = tg.RowShape(ids.numel(), len(ids), length)
    no_targets = np.full(ids.numel(), -1)
    generator = torch.Generator().manual_seed(cfg.seed)
    head_inputs: list[Tensor] = []

    def tap(site: str, layer: int, x: Tensor) -> None:
        if site == "head_in":
            head_inputs.append(x)

    # The forward is needed up to the head's inputs, so one target is enough.
    select = torch.zeros(1, dtype=torch.long, device=device)
    for end in range(prompt_tokens, length):
        batch = tg.pack_row(ids.flatten().numpy(), no_targets, starts, shape, device)
        model(batch, plan, tap=tap, select=select)
        x = head_inputs.pop()[starts + end - 1].float()
        logits = cfg.logit_softcap * torch.tanh(x @ model.tok_emb.float().T / cfg.logit_softcap)
        probabilities = (logits / TEMPERATURE).softmax(-1).cpu()
        ids[:num_prompts, end] = probabilities[:num_prompts].argmax(-1)
        drawn = torch.multinomial(probabilities[num_prompts:], 1, generator=generator)
        ids[num_prompts:, end] = drawn[:, 0]
    return ids[:, prompt_tokens:].view(2, num_prompts, num_tokens).numpy()


def readable_text(tokenizer: tg.Tokenizer, ids: np.ndarray) -> str:
    """The text of tokens (n,) up to a BOS.

    A model may write operators of CaseOps where no transform puts them: those that apply to nothing
    are left out. BEFORE_SPACE reads what PUBLISHED has written, too.
    """
    until_bos = takewhile(lambda token: token != tokenizer.bos_id, ids.tolist())
    text = tokenizer.model.decode(list(until_bos))
    return re.sub(caseops.OPERATOR, "", caseops.BEFORE_SPACE.apply(text))


def write_samples(writer: Writer, num_tokens: int) -> list[dict[str, int | str]]:
    """For each prompt: its document's number, itself, two continuations, and the document's own."""
    docs = writer.docs
    chosen = choose_prompts(docs)
    if not len(chosen):
        return []
    prompts = docs.tokens[docs.starts[chosen, None] + np.arange(PROMPT_TOKENS)]
    written = continue_prompts(writer.model, writer.plan, prompts, num_tokens, writer.device)
    samples = []
    for i, document in enumerate(chosen):
        after = docs.starts[document] + PROMPT_TOKENS
        end = min(after + num_tokens, docs.starts[document] + docs.counts[document])
        # A prompt begins with BOS.
        ids = {
            "prompt": prompts[i, 1:],
            "greedy": written[0, i],
            "sampled": written[1, i],
            "document": docs.tokens[after:end],
        }
        texts = {name: readable_text(writer.tokenizer, part) for name, part in ids.items()}
        samples.append({"number": int(document), **texts})
    return samples


def sample_run(run_dir: Path, num_tokens: int) -> None:
    """Prints and keeps what the artifact of a run writes. Raises UsageError or OSError."""
    environ = {**runlog.knobs_of_run(run_dir), **os.environ, **runlog.KEEPS_NOTHING}
    writer = Writer.load(run_dir / ARTIFACT, environ)
    samples = write_samples(writer, num_tokens)
    print(f"what the artifact writes; sampled at temperature {TEMPERATURE}:")
    for sample in samples:
        for name in ("prompt", "greedy", "sampled"):
            print(f"  {name:<8} {json.dumps(sample[name], ensure_ascii=False)}")
    text = json.dumps(samples, indent=1, ensure_ascii=False)
    tg.write_atomic(run_dir / "samples.json", text.encode())
    print(f"samples   {run_dir / 'samples.json'}")


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", nargs="?", type=Path, help="default: the newest in runs/")
    parser.add_argument("--tokens", type=int, default=48, help="of each text (default 48)")
    args = parser.parse_args(argv)
    tg.prepare_output()
    try:
        run_dir = args.run_dir or newest_run()
        sample_run(run_dir, max(args.tokens, 1))
    except tg.UsageError as error:
        print(f"samples.py: {error}", file=sys.stderr)
        return 2
    except runlog.LogError as error:
        print(f"samples.py: {runlog.log_of_run(run_dir)}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"samples.py: {tg.reason_of(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(terminal.run(main))
