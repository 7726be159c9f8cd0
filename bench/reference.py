"""A public training script beside ours, in one process.

Both have the same weights, batch, dtype, threads and attention function. This is written for PR
#1530 of openai/parameter-golf (samacqua; records/track_10min_16mb/2026-04-10_VarLenAttn/
train_gpt.py) and scripts of its family with the same names; bench/agreement.py also ran on those of
PR #1855, #2014 and #2135. The file stays where it is; nothing of it is kept here. It expects CUDA,
Triton and FlashAttention 3. What a machine lacks, and only that, is replaced from outside:

- `flash_attn_interface` becomes `train_gpt.attention` with our backend, unless that is FA3 itself.
- On a CPU `triton` does nothing, and the function that launches the script's Triton kernel of the
  MLP is written in PyTorch's operators, with the same roundings; a fused loss is turned off.
- On a CPU `torch.autocast("cuda", ..)` means the CPU, and the waits of `torch.cuda` do nothing.
- Without COMPILE, `torch.compile` returns its argument, as ours is then not compiled either.

The script's hyperparameters come from our Config: the knobs have the same names. A packed script
must be unpacked first.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt as tg

# Names that every script of the family has.
NEEDED = [
    "Hyperparameters",
    "GPT",
    "Optimizers",
    "restore_fp32_params",
    "gptq_quantize_weight",
]
# Our name of a parameter -> the script's, where they differ.
MAPPED = {
    "up_bank": "mlp_up_bank",
    "down_bank": "mlp_down_bank",
    "tok_emb": "tok_emb.weight",
    "smear_proj": "smear_gate.weight",
}
# Parameters that are a row a layer in ours, and belong to the script's blocks -> name in a block.
PER_LAYER = {
    "q_gain": "attn.q_gain",
    "attn_gate": "attn.attn_gate_w",
    "attn_scale": "attn_scale",
    "mlp_scale": "mlp_scale",
    "resid_mix": "resid_mix",
}
# Knobs of later scripts that this program does not have. PR #2135 reads the first in its forward.
SCRIPTS_OWN = {"SMEAR_GATE_BOS_FIX": "1", "ASYM_LOGIT_RESCALE": "0"}
TRITON_MODULES = [
    "triton",
    "triton.language",
    "triton.tools",
    "triton.tools.tensor_descriptor",
]


# --- What stands in for CUDA, Triton and FlashAttention 3 -----------------------------------------
def flash_attention(backend: str) -> types.ModuleType:
    """A stand-in for `flash_attn_interface` on top of `train_gpt.attention`."""

    def packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, **_
    ) -> Tensor:
        """Attention within segments of a row; q is (T, H, D)."""
        assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        return tg.attention(q, k, v, cu_seqlens_q, max_seqlen_q, backend)

    def dense(q, k, v, causal) -> Tensor:
        """Attention within rows; q is (B, T, H, D)."""
        B, T = q.shape[:2]
        cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32).to(q.device)
        rows = [x.reshape(B * T, *x.shape[2:]) for x in (q, k, v)]
        return packed(*rows, cu_seqlens, cu_seqlens, T, T, causal).view_as(q)

    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func = dense
    module.flash_attn_varlen_func = packed
    return module


def linear_leaky_relu_square(
    a: Tensor, b: Tensor, aux: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes by PyTorch what the script's Triton kernel does.

    Without `aux` the activation before and after the square of the leaky ReLU, (pre, post) of
    a @ b.T. With aux = pre the gradient of pre, where a @ b.T is that of post.
    """
    out = a @ b.T
    if aux is None:
        return out, F.leaky_relu(out, 0.5).square()
    return out.mul_(F.leaky_relu(aux, 0.25)).mul_(2)


def do_nothing() -> None:
    """Stands in for the waits and clean-ups of torch.cuda."""


class OnCPU(types.ModuleType):
    """`torch` as the script sees it on a CPU.

    It answers the few names that would ask for CUDA, and passes all others on.
    """

    def __init__(self, dtype: torch.dtype, compiled: bool):
        """dtype: the compute dtype; with bf16 autocast is on. compiled: as COMPILE."""
        super().__init__("torch")
        self.compute_dtype = dtype
        self.cuda = types.SimpleNamespace(synchronize=do_nothing, empty_cache=do_nothing)
        self.compile = torch.compile if compiled else uncompiled

    def autocast(
        self, device_type: str, dtype: torch.dtype, enabled: bool = True
    ) -> torch.autocast:
        """Autocast on the CPU, whatever device the script names."""
        enabled = enabled and self.compute_dtype == torch.bfloat16
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)

    def __getattr__(self, name: str) -> Any:
        """Any other name of torch."""
        return getattr(torch, name)


def unchanged(function: Callable) -> Callable:
    """Its argument."""
    return function


def uncompiled(function: Callable | None = None, **_: Any) -> Callable:
    """Stands in for torch.compile, called with a function or used as a decorator with options."""
    return unchanged if function is None else function


@contextlib.contextmanager
def modules(replaced: Mapping[str, Any]) -> Iterator[None]:
    """Puts modules into sys.modules for a while. Other modules that are imported then stay."""
    before = {name: sys.modules[name] for name in replaced if name in sys.modules}
    sys.modules.update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del sys.modules[name]
        sys.modules.update(before)


# --- The script -----------------------------------------------------------------------------------
class Reference:
    """The script at `path`, with the hyperparameters of `cfg`, for a device and our attention.

    `module` is the script and `h` its Hyperparameters. `build` makes its model with our weights;
    `batch` and `evaluate_ttt` prepare its calls as its own main loop does.
    """

    def __init__(self, path: Path, cfg: tg.Config, device: torch.device, backend: str):
        """Runs the script's definitions. Raises UsageError if the file is no such script."""
        self.path = path
        self.cfg = cfg
        self.device = device
        on_cpu = device.type == "cpu"
        replaced: dict[str, Any] = {}
        if backend != "fa3":
            replaced["flash_attn_interface"] = flash_attention(backend)
        if on_cpu or tg.triton is None:
            replaced |= dict.fromkeys(TRITON_MODULES, mock.MagicMock())
        self.module = types.ModuleType("reference_script")
        self.module.__file__ = str(path)
        self.execute(replaced)

        missing = [name for name in NEEDED if not hasattr(self.module, name)]
        if missing:
            raise tg.UsageError(
                f"{path}: not a script of the family of PR #1530, it has no {', '.join(missing)}"
            )
        if on_cpu:
            self.module.torch = OnCPU(cfg.dtype, cfg.compile)
            self.module.linear_leaky_relu_square = linear_leaky_relu_square
        # The mask of SmearGate compares with it; the script's loader would set it.
        self.module.BOS_ID = tg.BOS_ID
        self.h = self.module.Hyperparameters()

    def execute(self, replaced: Mapping[str, Any]) -> None:
        """Executes the file with our knobs as its environment and these modules replaced."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(modules(replaced))
            stack.enter_context(mock.patch.dict(os.environ, self.environment(), clear=True))
            if not self.cfg.compile:
                stack.enter_context(mock.patch.object(torch, "compile", uncompiled))
            try:
                code = compile(self.path.read_text(encoding="utf-8"), str(self.path), "exec")
                exec(code, self.module.__dict__)
            except (OSError, SyntaxError, ImportError) as error:
                raise tg.UsageError(f"{self.path}: cannot be loaded ({error})") from error

    def environment(self) -> dict[str, str]:
        """Our knobs as the script reads them, with a run id of its own, which names its files."""
        text = {}
        for field, value in vars(self.cfg).items():
            text[field.upper()] = str(int(value) if isinstance(value, bool) else value)
        text |= {"EMBEDDING_DIM": text["MODEL_DIM"], "RUN_ID": f"bench-{uuid.uuid4()}"}
        # Names and forms that only the scripts have.
        text |= {"FUSED_CE_ENABLED": str(int(self.device.type == "cuda" and self.cfg.fused_ce))}
        return text | SCRIPTS_OWN

    def autocast(self) -> torch.autocast:
        """Autocast to bf16 on the device, if that is the compute dtype."""
        bf16 = self.cfg.dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16)

    def prepare_rotary(self, model: nn.Module, num_tokens: int) -> None:
        """Fills the model's tables of rotations, as the script does before it compiles."""
        for block in model.blocks:
            if hasattr(block.attn, "rotary"):
                block.attn.rotary(num_tokens, self.device, self.cfg.dtype)

    def build(self, weights: Mapping[str, Tensor], looped: bool) -> nn.Module:
        """The script's model, in its own mixture of dtypes, with our weights.

        weights: by name, as in `parameter_table`. Raises AssertionError if the model lacks one.
        """
        model = self.module.GPT(self.h).to(self.device)
        if self.cfg.dtype == torch.bfloat16:
            self.module.restore_fp32_params(model.bfloat16())
        theirs = self.names(weights)
        model.load_state_dict(theirs, strict=False)
        unknown = set(theirs) - set(model.state_dict())
        assert not unknown, f"the script's model has no {sorted(unknown)}"
        model.looping_active = looped
        self.prepare_rotary(model, self.cfg.micro_batch_tokens)
        return model.train()

    def names(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under the script's names."""
        theirs = {}
        for name, value in ours.items():
            if name in PER_LAYER:
                for layer, row in enumerate(value):
                    theirs[f"blocks.{layer}.{PER_LAYER[name]}"] = row
            else:
                theirs[MAPPED.get(name, name)] = value
        return theirs

    def stacked(
        self, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The inverse of `names`: the script's tensors under our names, in the shapes of `ours`."""
        renamed = {}
        for name, like in ours.items():
            tensors = [theirs[key] for key in self.names({name: like})]
            renamed[name] = torch.stack(tensors) if name in PER_LAYER else tensors[0]
        return renamed

    def batch(self, row: tg.Batch) -> dict[str, Any]:
        """The arguments of the script's forward for a row of ours without padding.

        As in its loader, cu_seqlens has a multiple of 64 entries.
        """
        assert (row.targets >= 0).all(), "the script's loss knows no padding"
        num_tokens = len(row.inputs)
        used = int((row.cu_seqlens < num_tokens).sum()) + 1
        size = -(-used // 64) * 64
        cu_seqlens = row.cu_seqlens.new_full((size,), num_tokens)
        cu_seqlens[:used] = row.cu_seqlens[:used]
        return {
            "input_ids": row.inputs[None],
            "target_ids": row.targets[None],
            "cu_seqlens": cu_seqlens,
            "max_seqlen": row.max_seqlen,
        }

    def evaluate_ttt(
        self,
        model: nn.Module,
        tokens: np.ndarray,
        table: tg.ByteTable,
        bos_id: int,
        log: Callable[[str], None] | None = None,
    ) -> tuple[float, float]:
        """val_loss and val_bpb of the script's test-time training.

        model: from `build`; its weights are frozen meanwhile. tokens: (n,) ids of documents that
        begin with `bos_id`. log receives the script's lines. TTT_* and VAL_DOC_FRACTION are the
        config's. Raises UsageError if the script has no test-time training.
        """
        script = self.module
        for name in ("eval_val_ttt_lora", "BatchedTTTLoRA"):
            if not hasattr(script, name):
                raise tg.UsageError(f"{self.path}: has no {name}")
        script.BOS_ID = bos_id
        script.log = log or discard
        on_device = table.to(self.device)
        data = types.SimpleNamespace(
            val_tokens=torch.from_numpy(tokens.astype(np.int32)),
            has_leading_space_lut=on_device.space,
            base_bytes_lut=on_device.base.to(torch.int16),
            is_boundary_token_lut=on_device.boundary,
        )
        forward = model.forward_ttt
        if self.cfg.compile:
            forward = torch.compile(forward, dynamic=True)
        try:
            return script.eval_val_ttt_lora(
                self.h, model, self.device, data, forward_ttt_train=forward
            )
        finally:
            Path(f"/tmp/ttt_counter_{self.h.run_id}").unlink(missing_ok=True)


def discard(line: str) -> None:
    """A log that keeps nothing."""
