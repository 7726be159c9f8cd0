"""Parts of a run that the other benchmarks leave out, at full size with random weights.

    python bench/phases.py capture      # a row recorded as a CUDA graph, against the plain call
    python bench/phases.py compression  # seconds and memory of calibration, quantiser and packing

Without an argument both. Knobs are environment variables, as for train_gpt.py: PRESET=record by
default with CUDA, cpu without. A CPU has no CUDA graph. The last line is `bench ` and a JSON
object; null is what was not measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from step import device_name, full_row, random_weights
from torch import Tensor

import train_gpt as tg

REPEATS = 10


class Setting:
    """The network with random weights, its forward, and a row of training."""

    def __init__(self, cfg: tg.Config):
        """Raises UsageError if no attention works here."""
        self.cfg = cfg
        self.ranks = tg.Ranks({})
        tg.configure_torch(cfg)
        tg.use_tuner(tg.TileTuner())
        backend, _ = tg.choose_attention(cfg.attention_backend, self.ranks.device, cfg.dtype)
        self.model = tg.GPT(cfg, backend)
        self.model.load_state_dict(random_weights(cfg))
        self.model.to(self.ranks.device)
        self.forward: Callable = self.model
        if cfg.compile:
            self.forward = torch.compile(self.model, fullgraph=True, dynamic=False)
        self.row = full_row(cfg, cfg.row_shape, self.ranks.device)


# --- A captured row -------------------------------------------------------------------------------
def gradients_of(setting: Setting, once: Callable[[], Tensor]) -> list[Tensor]:
    """The loss and all gradients that a call leaves in tensors that stay in place."""
    setting.model.zero_grad(set_to_none=False)
    loss = once().clone()
    return [loss, *(p.grad.clone() for p in setting.model.parameters())]


def milliseconds(setting: Setting, once: Callable[[], Tensor]) -> float:
    """The mean of several calls."""
    start = setting.ranks.now()
    for _ in range(REPEATS):
        once()
    return 1000 * (setting.ranks.now() - start) / REPEATS


def capture(setting: Setting) -> dict[str, Any] | None:
    """Records a row of each plan and compares it with the plain call; None without CUDA."""
    if setting.ranks.device.type != "cuda":
        print("capture: nothing recorded: a CPU has no CUDA graph")
        return None
    for p in setting.model.parameters():
        p.grad = torch.zeros_like(p)
    count = torch.full((), float(len(setting.row.inputs)), device=setting.ranks.device)
    pool = torch.cuda.graph_pool_handle()
    figures = {}
    print(f"{'visits':>6}{'largest error':>16}{'plain ms':>10}{'captured ms':>13}")
    for plan in sorted(set(setting.cfg.plans), key=len):

        def plain(plan: tuple = plan) -> Tensor:
            return tg.backward_row(setting.forward, plan, setting.row, count)

        wanted = gradients_of(setting, plain)
        replay = tg.capture_row(setting.forward, plan, setting.row, pool)

        def captured(replay: Callable = replay) -> Tensor:
            return replay(setting.row, count)

        found = gradients_of(setting, captured)
        pairs = zip(found, wanted, strict=True)
        errors = [(a - b).norm() / b.norm().clamp_min(1e-12) for a, b in pairs]
        error = float(torch.stack(errors).max())  # NaN if one is
        times = [milliseconds(setting, call) for call in (plain, captured)]
        print(f"{len(plan):>6}{error:>16.1e}{times[0]:>10.2f}{times[1]:>13.2f}", flush=True)
        figures[str(len(plan))] = {"error": error, "plain_ms": times[0], "captured_ms": times[1]}
    return figures


# --- Compression ----------------------------------------------------------------------------------
class Timed:
    """Seconds and the most memory of each phase, printed as it ends."""

    def __init__(self, ranks: tg.Ranks):
        self.ranks = ranks
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times its body."""
        is_gpu = self.ranks.device.type == "cuda"
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = self.ranks.now()
        yield
        self.seconds[name] = self.ranks.now() - start
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if is_gpu else "-"
        print(f"{name:<24}{self.seconds[name]:>9.2f} s{peak:>10}", flush=True)


def compression(setting: Setting) -> dict[str, Any]:
    """Compresses random weights as a run does, then reads the artifact again."""
    cfg, model, ranks = setting.cfg, setting.model, setting.ranks
    plan = cfg.plans[-1]
    timed = Timed(ranks)
    hessians = None
    sensitivities = None
    # The first call compiles.
    for name in ("calibrate, first row", "calibrate, a row"):
        with timed.phase(name):
            if not cfg.no_hessians:
                hessians = tg.collect_hessians(model, plan, [setting.row], ranks)
            if cfg.quantizer == "allocated":
                sensitivities = tg.collect_sensitivities(
                    setting.forward, model, plan, [setting.row], hessians, ranks
                )
    with timed.phase("quantise"):
        quantizer = tg.Quantizer(model, hessians, sensitivities, ranks)
    with timed.phase("pack"):
        data = tg.fit_artifact(quantizer, model, {"looped": True}, print)
    with timed.phase("read"):
        _, arrays = tg.open_artifact(data, Path("the artifact"))
        tg.load_artifact(model, arrays)
    print(f"artifact: {len(data):,} bytes")
    return {"seconds": timed.seconds, "bytes": len(data)}


PARTS = {"capture": capture, "compression": compression}


# Relative, of a parameter's gradient; sums on a GPU may come in another order.
MAX_CAPTURE_ERROR = 1e-2


def main(argv: list[str]) -> int:
    """Runs the parts named, or all.

    Exit status 1 if a captured row has other gradients, 2 if a name or the environment cannot be
    used.
    """
    unknown = [name for name in argv if name not in PARTS]
    if unknown:
        print(f"bench/phases.py: {unknown[0]}: must be one of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    results: dict[str, Any] = dict.fromkeys(PARTS)
    try:
        cfg, _ = tg.Config.from_env(os.environ, torch.cuda.is_available())
        cfg, _ = tg.resolve_dtype(cfg, tg.Ranks({}).device)
        setting = Setting(cfg)
    except tg.UsageError as error:
        print(f"bench/phases.py: {error}", file=sys.stderr)
        return 2
    print(f"{device_name(setting.ranks.device)}, torch {torch.__version__}, PRESET={cfg.preset}")
    start = time.monotonic()
    for name in argv or PARTS:
        results[name] = PARTS[name](setting)
    print(f"all: {time.monotonic() - start:.1f} s")
    print("bench " + json.dumps(results))
    for visits, row in (results["capture"] or {}).items():
        if not row["error"] <= MAX_CAPTURE_ERROR:
            print(f"bench/phases.py: capture: error {row['error']:.1e} with {visits} visits")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
