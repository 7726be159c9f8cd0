"""The network of train_gpt.py in plain PyTorch, without any of its code.

One window at a time, without caches, batches or kernels. T is the tokens of the window, C the
width, H the heads, D their width. Everything is in the default dtype.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from plain_artifact import Settings, read_artifact, skip_pairs, unrolled
from torch import Tensor

BOS = 1


class Visit(NamedTuple):
    """One step through the layers in the order in which they run."""

    slot: int
    layer: int
    stores: bool  # its output is kept for a later skip connection
    skip_rows: list[int]  # rows of skip_weights whose mean its skip uses; empty: none
    parallel: bool  # attention and MLP on two lanes


class Addition(Protocol):
    """What adds to the network's products: an adapter, or nothing."""

    def at(self, site: str, slot: int, x: Tensor) -> Tensor | float:
        """What is added to the product of x at a site of a visit."""

    def bias_of(self, slot: int) -> Tensor | float:
        """What is added to the stream after a visit."""


class NoAddition:
    """The network alone."""

    def at(self, site: str, slot: int, x: Tensor) -> float:
        """Nothing."""
        return 0.0

    def bias_of(self, slot: int) -> float:
        """Nothing."""
        return 0.0


def norm(x: Tensor) -> Tensor:
    """x over its root mean square along the last axis."""
    eps = torch.finfo(torch.float32).eps
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def previous_token(x: Tensor, ids: Tensor) -> Tensor:
    """For each row of x (T, C) the one before; zeros at a BOS and at the window's start."""
    shifted = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    return shifted.masked_fill((ids == BOS)[:, None], 0)


def visits(c: Settings) -> list[Visit]:
    """The visits of all layers; `looped` says whether the loop is on."""
    loops = c["num_loops"] if c["looped"] else 0
    order = unrolled(c, loops)
    middle = len(order) // 2
    pairs = skip_pairs(c, loops)
    pair_of_row = skip_pairs(c, c["num_loops"])
    first_parallel = c["parallel_start_layer"] or c["num_layers"]
    found = []
    for slot, layer in enumerate(order):
        rows = []
        receiver = slot - middle
        if 0 <= receiver < len(pairs):
            rows = [receiver]
            same_pair = [r for r, pair in enumerate(pair_of_row) if pair == pairs[receiver]]
            if same_pair and not c["looped"]:
                rows = same_pair
        found.append(Visit(slot, layer, slot < middle, rows, layer >= first_parallel))
    return found


class Network:
    """The network of an artifact: `settings` and `weights` by name."""

    def __init__(self, artifact: bytes):
        """Reads the artifact. NotImplementedError where it has what is not known here."""
        self.settings, self.weights = read_artifact(artifact)
        c = self.settings
        if c["ve_enabled"]:
            raise NotImplementedError("not known here: ve_enabled")
        self.visits = visits(c)
        self.head_dim = c["model_dim"] // c["num_heads"]
        # Factor of both branches of every layer.
        self.depth_scale = torch.ones(c["num_layers"])
        if c["branch_scale"]:
            self.depth_scale = torch.arange(1, c["num_layers"] + 1).rsqrt()

    def embed(self, ids: Tensor) -> Tensor:
        """The embeddings (T, C) of a window, normalised."""
        c = self.settings
        w = self.weights
        x = w["tok_emb"][ids]
        if c["smear_gate_enabled"]:
            logits = x[:, : c["gate_window"]] @ w["smear_proj"].T
            x = x + w["smear_lambda"] * logits.sigmoid() * previous_token(x, ids)
        if c["bigram_vocab_size"]:
            last_row = c["bigram_vocab_size"] - 1
            pair = (36313 * ids ^ 27191 * ids.roll(1)) % last_row
            pair[0] = last_row
            projection = w["bigram_scale"] * w["bigram_proj"]
            x = x + w["bigram_emb"][pair] @ projection.T
        x = norm(x)
        if c["smear_enabled"]:
            gate = w["smear_gate"].sigmoid()
            x = (1 - gate) * x + gate * previous_token(x, ids)
        return x

    def rotate(self, x: Tensor, longest: int) -> Tensor:
        """Rotary embedding of heads (H, T, D); `longest` is the window that the run scores with."""
        c = self.settings
        dims = c["rope_dims"] or self.head_dim
        half = dims // 2
        base = c["rope_base"]
        if c["rope_train_seq_len"]:
            stretch = max(longest / c["rope_train_seq_len"], 1)
            base *= stretch ** (dims / (dims - 2))
        frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(x.size(1))[:, None] * frequency  # (T, half)
        cos = angle.cos().float()
        sin = angle.sin().float()
        first, second, rest = x.split([half, half, x.size(-1) - dims], -1)
        turned_first = first * cos + second * sin
        turned_second = second * cos - first * sin
        return torch.cat([turned_first, turned_second, rest], -1)

    def attend(self, n: Tensor, layer: int, longest: int, add: Callable) -> Tensor:
        """Causal attention of normalised n (T, C). add(site, x): the addition at a site."""
        c = self.settings
        w = self.weights
        L = c["num_layers"]

        def heads(site: str, matrix: Tensor) -> Tensor:
            rows = n @ matrix.T + add(site, n)
            return rows.unflatten(1, (-1, self.head_dim)).transpose(0, 1)  # (heads, T, D)

        q = heads("q", w["qo_bank"][layer])
        k = heads("k", w["kv_bank"][layer])
        v = heads("v", w["kv_bank"][L + layer])
        gain = w["q_gain"][layer][:, None, None]
        q = gain * self.rotate(norm(q), longest)
        k = self.rotate(norm(k), longest)
        queries_per_key = len(q) // len(k)
        k = k.repeat_interleave(queries_per_key, 0)
        v = v.repeat_interleave(queries_per_key, 0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)

        if layer >= L - c["xsa_last_n"]:
            own_value = F.normalize(v, dim=-1)
            y = y - (y * own_value).sum(-1, keepdim=True) * own_value
        if c["sparse_attn_gate_enabled"]:
            logits = n[:, : c["gate_window"]] @ w["attn_gate"][layer].T  # (T, H)
            gate = (c["sparse_attn_gate_scale"] * logits).sigmoid()
            y = y * gate.T[:, :, None]
        y = y.transpose(0, 1).flatten(1)  # (T, C)
        out = y @ w["qo_bank"][L + layer].T + add("o", n)
        return w["attn_scale"][layer] * self.depth_scale[layer] * out

    def feed(self, n: Tensor, layer: int, add: Callable) -> Tensor:
        """The MLP on normalised n (T, C)."""
        w = self.weights
        pre = n @ w["up_bank"][layer].T
        post = F.leaky_relu(pre, self.settings["leaky_slope"]).square()
        out = post @ w["down_bank"][layer].T + add("mlp", n)
        return w["mlp_scale"][layer] * self.depth_scale[layer] * out

    def merge_skip(self, x: Tensor, stored: Tensor, rows: list[int]) -> Tensor:
        """The stream x (T, C) with an earlier visit's output added, or blended in by a gate."""
        w = self.weights
        skip = w["skip_weights"][rows].mean(0) * stored
        if not self.settings["skip_gates_enabled"]:
            return x + skip
        gate = w["skip_gates"][rows].mean(0).sigmoid()
        return skip + gate * (x - skip)

    def hidden(self, ids: Tensor, longest: int, addition: Addition) -> Tensor:
        """The normalised hidden states (T, C) of a window's inputs ids (T,)."""
        c = self.settings
        w = self.weights
        x0 = self.embed(ids)
        x = x0  # the stream; of two lanes that of the attention
        mlp_lane = None
        stored = []
        for visit in self.visits:
            layer = visit.layer

            def add(site: str, y: Tensor, slot: int = visit.slot) -> Tensor | float:
                return addition.at(site, slot, y)

            norm_scale = (layer + 1) ** -0.5 if c["ln_scale"] else 1.0
            if visit.parallel and mlp_lane is None:
                mlp_lane = x
            if visit.skip_rows:
                x = self.merge_skip(x, stored.pop(), visit.skip_rows)
            from_stream, from_embedding = w["resid_mix"][layer]
            mixed = from_stream * x + from_embedding * x0
            attn_out = self.attend(norm(mixed) * norm_scale, layer, longest, add)
            if mlp_lane is None:
                middle = mixed + attn_out
                x = middle + self.feed(norm(middle) * norm_scale, layer, add)
            else:
                mlp_out = self.feed(norm(mlp_lane) * norm_scale, layer, add)
                row = layer - c["parallel_start_layer"]
                keep = w["resid_lambdas"][row]
                attn_share, mlp_share = w["post_lambdas"][row]
                x = keep[0] * x + attn_share[0] * attn_out + mlp_share[0] * mlp_out
                mlp_lane = keep[1] * mlp_lane + attn_share[1] * attn_out + mlp_share[1] * mlp_out
            x = x + addition.bias_of(visit.slot)
            if visit.stores:
                stored.append(x)
        if mlp_lane is not None:
            final = {"mean": (x + mlp_lane) / 2, "mlp": mlp_lane, "attn": x}
            x = final[c["parallel_final_lane"]]
        return norm(x)

    def logits(self, hidden: Tensor, addition: Addition) -> Tensor:
        """The softcapped logits (n, V) of hidden states (n, C)."""
        cap = self.settings["logit_softcap"]
        raw = hidden @ self.weights["tok_emb"].T + addition.at("head", 0, hidden)
        return cap * torch.tanh(raw / cap)
