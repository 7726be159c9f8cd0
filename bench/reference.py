"""A public training script beside ours, in one process: same weights, batch, dtype, threads and attention function.

Written for PR #1530 of openai/parameter-golf (samacqua; records/track_10min_16mb/2026-04-10_VarLenAttn/train_gpt.py)
and scripts of its family with the same names. The file stays where it is; nothing of it is kept here. It expects CUDA,
Triton and FlashAttention 3. What a machine lacks is put in its place from outside, and only that:

- `flash_attn_interface`: `train_gpt.attention` with the backend ours uses, unless that is FA3 itself;
- on a CPU, `triton`: inert; the function that launches the Triton kernel: PyTorch's operators, the same roundings;
- on a CPU, device calls: `torch.autocast("cuda", ..)` means the CPU, `torch.cuda`'s waits and clean-ups mean nothing;
- without COMPILE, `torch.compile` returns what it is given, as ours is then not compiled either.

Its hyperparameters come from our Config: the knobs have the same names. Packed scripts must be unpacked first."""

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

NEEDED = "Hyperparameters GPT Optimizers restore_fp32_params gptq_quantize_weight".split()
MAPPED = {"up_bank": "mlp_up_bank", "down_bank": "mlp_down_bank", "tok_emb": "tok_emb.weight"}
PER_LAYER = {"q_gain": "attn.q_gain"} | {
    name: name for name in ("attn_scale", "mlp_scale", "resid_mix")
}


def flash_attention(backend: str) -> types.ModuleType:
    """A stand-in for `flash_attn_interface` on top of `train_gpt.attention`."""

    def packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, **_
    ):  # q (T, H, D)
        assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        return tg.attention(q, k, v, cu_seqlens_q, max_seqlen_q, backend)

    def dense(q, k, v, causal):  # q (B, T, H, D): every row a document
        (B, T), cu_seqlens = (
            q.shape[:2],
            torch.arange(0, q[..., 0, 0].numel() + 1, q.size(1), dtype=torch.int32),
        )
        rows = (x.reshape(B * T, *x.shape[2:]) for x in (q, k, v))
        return packed(*rows, cu := cu_seqlens.to(q.device), cu, T, T, causal).view_as(q)

    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func, module.flash_attn_varlen_func = dense, packed
    return module


def linear_leaky_relu_square(
    a: Tensor, b: Tensor, aux: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """What the script's Triton kernel computes, by PyTorch: (pre, post) of a @ b.T; with `aux` = pre, its gradient."""
    out = a @ b.T
    return (
        (out, F.leaky_relu(out, 0.5).square())
        if aux is None
        else out.mul_(F.leaky_relu(aux, 0.25)).mul_(2)
    )


class OnCPU(types.ModuleType):
    """`torch` as the script sees it on a CPU: the few names that would ask for CUDA answered, all others passed on."""

    def __init__(self, dtype: torch.dtype, compiled: bool):
        super().__init__("torch")
        self.dtype_, self.cuda = (
            dtype,
            types.SimpleNamespace(synchronize=lambda: None, empty_cache=lambda: None),
        )
        self.compile = torch.compile if compiled else uncompiled

    def autocast(
        self, device_type: str, dtype: torch.dtype, enabled: bool = True
    ) -> torch.autocast:
        return torch.autocast(
            "cpu", dtype=torch.bfloat16, enabled=enabled and self.dtype_ == torch.bfloat16
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def uncompiled(
    function: Callable | None = None, **_: Any
) -> Callable:  # torch.compile, called or as a decorator
    return function if function is not None else lambda f: f


@contextlib.contextmanager
def modules(
    replaced: Mapping[str, Any],
) -> Iterator[None]:  # in sys.modules, for a while; what is imported then stays
    before = {name: sys.modules[name] for name in replaced if name in sys.modules}
    sys.modules.update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del sys.modules[name]
        sys.modules.update(before)


class Reference:
    """The script at `path`, with the hyperparameters of `cfg`, for `device` and our attention `backend`.

    `module` is the script, `h` its Hyperparameters, `build` gives its model with our weights, `loss`, `step`, `average`
    and `evaluate_ttt` call its functions as its own main loop does. UsageError if the file is no such script."""

    def __init__(self, path: Path, cfg: tg.Config, device: torch.device, backend: str):
        self.path, self.cfg, self.device, on_cpu = path, cfg, device, device.type == "cpu"
        inert = mock.MagicMock()
        replaced = {} if backend == "fa3" else {"flash_attn_interface": flash_attention(backend)}
        if on_cpu or tg.triton is None:
            names = "triton", "triton.language", "triton.tools", "triton.tools.tensor_descriptor"
            replaced |= dict.fromkeys(names, inert)
        self.module = types.ModuleType("reference_script")
        self.module.__file__ = str(path)
        compiler = (
            contextlib.nullcontext()
            if cfg.compile
            else mock.patch.object(torch, "compile", uncompiled)
        )
        try:
            code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
            with (
                modules(replaced),
                mock.patch.dict(os.environ, self.environment(), clear=True),
                compiler,
            ):
                exec(code, self.module.__dict__)
        except (OSError, SyntaxError, ImportError) as error:
            raise tg.UsageError(f"{path}: cannot be loaded ({error})") from error
        if missing := [name for name in NEEDED if not hasattr(self.module, name)]:
            raise tg.UsageError(
                f"{path}: not a script of the family of PR #1530, it has no {', '.join(missing)}"
            )
        if on_cpu:
            self.module.torch = OnCPU(cfg.dtype, cfg.compile)
            self.module.linear_leaky_relu_square = linear_leaky_relu_square
        self.h = self.module.Hyperparameters()

    def environment(
        self,
    ) -> dict[str, str]:  # our knobs as the script reads them; a run_id of its own names its files
        text = {
            f.upper(): str(int(v) if isinstance(v, bool) else v) for f, v in vars(self.cfg).items()
        }
        return text | {"EMBEDDING_DIM": text["MODEL_DIM"], "RUN_ID": f"bench-{uuid.uuid4()}"}

    def autocast(self) -> torch.autocast:
        bf16 = self.cfg.dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16)

    def build(self, weights: Mapping[str, Tensor], looped: bool) -> nn.Module:
        """Its model, in its own mixture of dtypes, with our weights (name -> tensor as in `parameter_table`)."""
        model = self.module.GPT(self.h).to(self.device)
        if self.cfg.dtype == torch.bfloat16:
            self.module.restore_fp32_params(model.bfloat16())
        model.load_state_dict(self.names(weights), strict=False)
        unknown = set(self.names(weights)) - set(model.state_dict())
        assert not unknown, f"the script's model has no {sorted(unknown)}"
        model.looping_active = looped
        for block in model.blocks:
            if hasattr(block.attn, "rotary"):  # filled before anything is compiled, as it does
                block.attn.rotary(self.cfg.micro_batch_tokens, self.device, self.cfg.dtype)
        return model.train()

    def names(
        self, ours: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:  # by our names -> by the script's
        theirs = {}
        for name, value in ours.items():
            if name in PER_LAYER:
                theirs |= {f"blocks.{i}.{PER_LAYER[name]}": row for i, row in enumerate(value)}
            else:
                theirs[MAPPED.get(name, name)] = value
        return theirs

    def stacked(
        self, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The inverse of `names`: the script's tensors under our names and in the shapes of `ours`."""
        found = {}
        for name, like in ours.items():
            keys = self.names({name: like})
            found[name] = (
                torch.stack([theirs[k] for k in keys])
                if name in PER_LAYER
                else theirs[next(iter(keys))]
            )
        return found

    def batch(self, row: tg.Batch) -> dict[str, Any]:
        """The arguments of its forward for a whole row of ours; as in its loader cu_seqlens has 64, 128, .. entries."""
        assert (row.targets >= 0).all(), "the script's loss knows no padding"
        used = int((row.cu_seqlens < len(row.inputs)).sum()) + 1
        cu_seqlens = row.cu_seqlens.new_full((-(-used // 64) * 64,), len(row.inputs))
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
        log: Callable[[str], None] = lambda line: None,
    ) -> tuple[float, float]:
        """val_loss and val_bpb of its test-time training over `tokens` (n,), documents that start with `bos_id`.

        `model` comes from `build`; TTT_* and VAL_DOC_FRACTION are the config's. Its weights are frozen meanwhile."""
        script, device = self.module, self.device
        for name in ("eval_val_ttt_lora", "BatchedTTTLoRA"):
            if not hasattr(script, name):
                raise tg.UsageError(f"{self.path}: has no {name}")
        script.BOS_ID, script.log = bos_id, log
        space, boundary = (torch.tensor(x, device=device) for x in (table.space, table.boundary))
        data = types.SimpleNamespace(
            val_tokens=torch.from_numpy(tokens.astype(np.int32)),
            has_leading_space_lut=space,
            base_bytes_lut=torch.tensor(table.base, dtype=torch.int16, device=device),
            is_boundary_token_lut=boundary,
        )
        forward = (
            torch.compile(model.forward_ttt, dynamic=True)
            if self.cfg.compile
            else model.forward_ttt
        )
        try:
            return script.eval_val_ttt_lora(self.h, model, device, data, forward_ttt_train=forward)
        finally:
            Path(f"/tmp/ttt_counter_{self.h.run_id}").unlink(missing_ok=True)
