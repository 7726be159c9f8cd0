"""Stands in for a public script of the family of PR #1530 in the tests of bench/.

It has the names and the CUDA habits of such a script; the network is written anew.
"""

import os

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
from torch import Tensor, nn
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: F401, as such a script has it


@triton.jit
def kernel(a, b, BLOCK: tl.constexpr):
    """Never launched."""


def linear_leaky_relu_square(a, b, aux=None):
    """Would launch the kernel."""
    raise RuntimeError("needs CUDA")


class Hyperparameters:
    """The knobs that the network reads."""

    layers = int(os.environ["NUM_LAYERS"])
    width = int(os.environ["EMBEDDING_DIM"])
    vocab_size = int(os.environ["VOCAB_SIZE"])
    num_heads = int(os.environ["NUM_HEADS"])
    num_kv_heads = int(os.environ["NUM_KV_HEADS"])
    head_dim = width // num_heads
    hidden = int(float(os.environ["MLP_MULT"]) * width)
    rope_dims = int(os.environ["ROPE_DIMS"])
    parallel_start_layer = int(os.environ["PARALLEL_START_LAYER"])
    loop_start = int(os.environ["LOOP_START"])
    loop_stop = int(os.environ["LOOP_END"]) + 1
    num_loops = int(os.environ["NUM_LOOPS"])
    gates = bool(int(os.environ["SKIP_GATES_ENABLED"]))
    attn_gate = bool(int(os.environ["SPARSE_ATTN_GATE_ENABLED"]))
    attn_gate_scale = float(os.environ["SPARSE_ATTN_GATE_SCALE"])
    smear = bool(int(os.environ["SMEAR_GATE_ENABLED"]))
    gate_window = int(os.environ["GATE_WINDOW"])
    run_id = os.environ["RUN_ID"]
    rank = os.environ.get("RANK")
    lr = float(os.environ["MATRIX_LR"])


class MLP(torch.autograd.Function):
    """The MLP of a block, with the kernel's two products."""

    @staticmethod
    def forward(ctx, x, up, down):
        """x: (T, C)."""
        pre, post = linear_leaky_relu_square(x, up)
        ctx.save_for_backward(x, up, down, pre, post)
        return post @ down.T

    @staticmethod
    def backward(ctx, dy):
        """dy: (T, C)."""
        x, up, down, pre, post = ctx.saved_tensors
        dpre = linear_leaky_relu_square(dy, down.T.contiguous(), aux=pre)
        return dpre @ up, dpre.T @ x, dy.T @ post


def norm(x: Tensor) -> Tensor:
    """RMS norm of the last axis."""
    return F.rms_norm(x, (x.size(-1),), eps=torch.finfo(torch.float32).eps)


def rotate(x: Tensor, dims: int) -> Tensor:
    """RoPE of the first `dims` values of heads, (T, H, D), without regard to documents."""
    half = dims // 2
    position = torch.arange(len(x), device=x.device)[:, None, None]
    angle = position * 10000.0 ** (-torch.arange(half, device=x.device) / half)
    cos = angle.cos().to(x.dtype)
    sin = angle.sin().to(x.dtype)
    a, b, unchanged = x.split([half, half, x.size(-1) - dims], -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, unchanged], -1)


class Attention(nn.Module):
    """The parameters of a block's attention that are no matrices."""

    def __init__(self, h):
        super().__init__()
        self.q_gain = nn.Parameter(torch.ones(h.num_heads))
        if h.attn_gate:
            self.attn_gate_w = nn.Parameter(torch.zeros(h.num_heads, h.gate_window))


class Block(nn.Module):
    """A block, whose matrices are slices of the model's banks."""

    def __init__(self, h, layer):
        super().__init__()
        self.h = h
        self.layer = layer
        self.attn = Attention(h)
        ones = torch.ones(h.width)
        self.attn_scale = nn.Parameter(ones.clone())
        self.mlp_scale = nn.Parameter(ones.clone())
        self.resid_mix = nn.Parameter(torch.stack([ones, torch.zeros(h.width)]))

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        """Heads (T, H, D) of x (T, C)."""
        return (x @ weight.to(x.dtype).T).unflatten(-1, (-1, self.h.head_dim))

    def attend(self, x, model, cu_seqlens, max_seqlen):
        """Attention without the part of its output along the token's own value (XSA)."""
        h = self.h
        q = self.project(x, model.qo_bank[self.layer])
        k = self.project(x, model.kv_bank[self.layer])
        v = self.project(x, model.kv_bank[h.layers + self.layer])
        q = rotate(norm(q), h.rope_dims) * self.attn.q_gain.to(x.dtype)[:, None]
        k = rotate(norm(k), h.rope_dims)
        y = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            causal=True,
            window_size=(-1, -1),
        )
        unit_value = F.normalize(v, dim=-1).repeat_interleave(h.num_heads // h.num_kv_heads, 1)
        y = y - (y * unit_value).sum(-1, keepdim=True) * unit_value
        if h.attn_gate:
            gate = x[:, : h.gate_window] @ self.attn.attn_gate_w.to(x.dtype).T
            y = y * (h.attn_gate_scale * gate).sigmoid()[:, :, None]
        w_out = model.qo_bank[h.layers + self.layer].to(x.dtype)
        return self.attn_scale.to(x.dtype) * (y.flatten(1) @ w_out.T)

    def feed(self, x, model):
        """The MLP."""
        up = model.mlp_up_bank[self.layer].to(x.dtype)
        down = model.mlp_down_bank[self.layer].to(x.dtype)
        return self.mlp_scale.to(x.dtype) * MLP.apply(x, up, down)


class GPT(nn.Module):
    """The network of PR #1530, with attention and MLP side by side in the last layers."""

    def __init__(self, h):
        super().__init__()
        self.h = h
        self.looping_active = False
        # Half of the visits when the loop is on.
        num_skips = (h.layers + h.num_loops * (h.loop_stop - h.loop_start)) // 2
        shapes = {
            "qo_bank": (2 * h.layers, h.width, h.width),
            "kv_bank": (2 * h.layers, h.head_dim * h.num_kv_heads, h.width),
            "mlp_up_bank": (h.layers, h.hidden, h.width),
            "mlp_down_bank": (h.layers, h.width, h.hidden),
            "skip_weights": (num_skips, h.width),
            "skip_gates": (num_skips, h.width),
            "parallel_post_lambdas": (h.layers, 2, 2),
            "parallel_resid_lambdas": (h.layers, 2),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))
        self.tok_emb = nn.Embedding(h.vocab_size, h.width)
        if h.smear:
            self.smear_gate = nn.Linear(h.gate_window, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.blocks = nn.ModuleList(Block(h, layer) for layer in range(h.layers))

    def order(self) -> list[int]:
        """The layers in the order of their visits."""
        h = self.h
        if not self.looping_active:
            return list(range(h.layers))
        loop = [*range(h.loop_start, h.loop_stop)]
        return [*range(h.loop_stop), *loop * h.num_loops, *range(h.loop_stop, h.layers)]

    def embed(self, ids: Tensor) -> Tensor:
        """The normed embedding, with a gated share of the token before unless it is a BOS."""
        x = self.tok_emb(ids)
        if self.h.smear:
            gate = self.smear_lambda * self.smear_gate(x[1:, : self.h.gate_window]).sigmoid()
            smeared = x[1:] + gate * x[:-1] * (ids[1:] != BOS_ID)[:, None]
            x = torch.cat([x[:1], smeared])
        return norm(x)

    def merge_lanes(self, layer, lanes, attn, mlp):
        """Writes the outputs of attention and MLP to both lanes."""
        dtype = attn.dtype
        resid = self.parallel_resid_lambdas[layer].to(dtype)
        post = self.parallel_post_lambdas[layer].to(dtype)
        x, lane = lanes
        new_x = resid[0] * x + post[0, 0] * attn + post[1, 0] * mlp
        new_lane = resid[1] * lane + post[0, 1] * attn + post[1, 1] * mlp
        return new_x, new_lane

    def forward(self, input_ids, target_ids, cu_seqlens=None, max_seqlen=0):
        """The mean loss of a row."""
        order = self.order()
        half = len(order) // 2
        x = x0 = self.embed(input_ids[0])
        lane = None
        skips = []
        for number, layer in enumerate(order):
            block = self.blocks[layer]
            scale = (layer + 1) ** -0.5
            if layer >= self.h.parallel_start_layer and lane is None:
                lane = x
            if number >= half and skips:
                gate = self.skip_gates[number - half].to(x.dtype).sigmoid()
                skip = self.skip_weights[number - half].to(x.dtype) * skips.pop()
                x = torch.lerp(skip, x, gate)
            mix = block.resid_mix.to(x.dtype)
            mixed = mix[0] * x + mix[1] * x0
            attn = block.attend(norm(mixed) * scale, self, cu_seqlens, max_seqlen)
            if lane is None:
                x = mixed + attn
                x = x + block.feed(norm(x) * scale, self)
            else:
                mlp = block.feed(norm(lane) * scale, self)
                x, lane = self.merge_lanes(layer, (x, lane), attn, mlp)
            if number < half:
                skips.append(x)
        logits = norm((x + lane) / 2) @ self.tok_emb.weight.T
        return F.cross_entropy(30.0 * torch.tanh(logits.float() / 30.0), target_ids[0])

    def forward_ttt(self, input_ids, target_ids, lora):
        """The nats of each target; here the same for all, with a call of dense attention."""
        q = torch.zeros(*input_ids.shape, 2, 8)
        k = q[:, :, :1]
        assert flash_attn_func(q, k, k, causal=True).shape == q.shape
        return lora * torch.ones(input_ids.shape)


def restore_fp32_params(model):
    """Turns all parameters but the embedding back to fp32."""
    for name, parameter in model.named_parameters():
        if not name.startswith("tok_emb"):
            parameter.data = parameter.data.float()


class Optimizers:
    """Plain SGD."""

    def __init__(self, h, model):
        group = {"params": list(model.parameters()), "lr": h.lr, "base_lr": h.lr}
        self.sgd = torch.optim.SGD([group])

    def __iter__(self):
        return iter([self.sgd])

    def step(self, distributed):
        """Updates the weights and clears the gradients."""
        self.sgd.step()
        self.sgd.zero_grad()


def gptq_quantize_weight(w, H, clip_sigmas, clip_range):
    """Rounds to nearest."""
    scale = (clip_sigmas * w.std(1) / clip_range).half()
    q = (w / scale.float()[:, None]).round().clamp(-clip_range, clip_range)
    return q.to(torch.int8), scale


@torch.compile
def compiled(x):
    """Its argument."""
    return x


BatchedTTTLoRA = None
BOS_ID = None


def eval_val_ttt_lora(h, model, device, data, forward_ttt_train):
    """A loss, and the bytes of the targets, in place of val_loss and val_bpb."""
    torch.cuda.synchronize()
    log(f"ttt {BOS_ID}")  # noqa: F821, set from outside
    tokens = data.val_tokens.long()
    with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
        loss = forward_ttt_train(tokens[None, :-1], tokens[None, 1:], lora=torch.tensor(2.0))
    assert data.val_tokens.dtype == torch.int32 and (tokens == BOS_ID).sum() == 1
    space = data.has_leading_space_lut[tokens[1:]] & ~data.is_boundary_token_lut[tokens[:-1]]
    return loss.mean().item(), int(data.base_bytes_lut[tokens[1:]].sum() + space.sum())
