"""The adapter of one document, and its optimiser, in plain PyTorch without code of train_gpt.py."""

import math
from typing import Any, NamedTuple

import torch
from plain_artifact import Settings
from torch import Tensor


class AdaptedTensor(NamedTuple):
    """A tensor that adaptation learns, with its state of AdamW."""

    value: Tensor
    rate_factor: float
    first_moment: Tensor
    second_moment: Tensor


class Adapter:
    """The adapter of one document: y += scale * (x A^T) B^T at every site of every visit."""

    def __init__(self, c: Settings, s: Settings, num_slots: int, start: int):
        """A is uniform, by the seed and the document's place in the stream; B and bias are 0.

        c: the network's settings. s: the run's.
        """
        self.s = s
        self.num_updates = 0
        self.scale = 1.0
        if s["ttt_lora_alpha"]:
            self.scale = s["ttt_lora_alpha"] / s["ttt_lora_rank"]
        C = c["model_dim"]
        kv = c["num_kv_heads"] * (C // c["num_heads"])
        widths = {"q": C, "k": kv, "v": kv, "o": C, "mlp": C, "head": c["vocab_size"]}
        ranks = dict.fromkeys(widths, s["ttt_lora_rank"])
        ranks["head"] = s["ttt_lm_rank"] or s["ttt_lora_rank"]
        sites = []
        for slot in range(num_slots):
            for name in ("q", "k", "v", "o", "mlp"):
                if s[f"ttt_{name}_lora"]:
                    sites.append((name, slot))
        sites.append(("head", 0))

        # All are drawn at the largest rank, in fp32, so they do not depend on the precision here.
        largest_rank = max(ranks[name] for name, _ in sites)
        bound = C**-0.5
        generator = torch.Generator().manual_seed(s["seed"] * 1_000_000_007 + start)
        drawn = torch.empty(len(sites), largest_rank, C, dtype=torch.float32)
        drawn.uniform_(-bound, bound, generator=generator)
        self.a = {}
        self.b = {}
        for (name, slot), values in zip(sites, drawn, strict=True):
            matrix = values[: ranks[name]].to(torch.get_default_dtype(), copy=True)
            self.a[name, slot] = matrix
            self.b[name, slot] = torch.zeros(widths[name], ranks[name])
        self.bias = torch.zeros(num_slots, C)
        self.adapted = self.all_tensors()

    def all_tensors(self) -> list[AdaptedTensor]:
        """Everything that learns."""
        factors = dict(pairs(self.s["ttt_lr_factors"]))
        values = []
        for matrices in (self.a, self.b):
            for (name, _), matrix in matrices.items():
                values.append((name, matrix))
        if self.s["ttt_bias_tune"]:
            values.append(("bias", self.bias))
        adapted = []
        for name, value in values:
            moments = [torch.zeros_like(value) for _ in range(2)]
            value.requires_grad_()
            adapted.append(AdaptedTensor(value, factors.get(name, 1.0), *moments))
        return adapted

    def at(self, site: str, slot: int, x: Tensor) -> Tensor | float:
        """What is added at a site of a visit; x is the site's input."""
        if (site, slot) not in self.a:
            return 0.0
        return self.scale * (x @ self.a[site, slot].T) @ self.b[site, slot].T

    def bias_of(self, slot: int) -> Tensor:
        """What is added to the stream after a visit, (C,)."""
        return self.bias[slot]

    def rate(self) -> float:
        """The learning rate of the next update: a cosine over chunks, at least a tenth."""
        s = self.s
        share = 0.0
        if s["ttt_cosine_chunks"]:
            chunk = self.num_updates // s["ttt_grad_steps"]
            share = min(chunk / s["ttt_cosine_chunks"], 1)
        return s["ttt_lora_lr"] * max(0.1, 0.5 + 0.5 * math.cos(math.pi * share))

    def learn(self, loss: Tensor) -> None:
        """One step of AdamW."""
        s = self.s
        rate = self.rate()
        beta1 = s["ttt_beta1"]
        beta2 = s["ttt_beta2"]
        gradients = torch.autograd.grad(loss, [tensor.value for tensor in self.adapted])
        self.num_updates += 1
        with torch.no_grad():
            for tensor, gradient in zip(self.adapted, gradients, strict=True):
                tensor.first_moment.lerp_(gradient, 1 - beta1)
                tensor.second_moment.lerp_(gradient.square(), 1 - beta2)
                mean = tensor.first_moment / (1 - beta1**self.num_updates)
                root = (tensor.second_moment / (1 - beta2**self.num_updates)).sqrt() + 1e-10
                own_rate = tensor.rate_factor * rate
                tensor.value.mul_(1 - own_rate * s["ttt_weight_decay"])
                tensor.value.sub_(own_rate * mean / root)


def pairs(text: Any) -> list[tuple[str, float]]:
    """The pairs of a setting as q:0.5,v:1.5."""
    found = []
    for pair in str(text).split(","):
        if pair:
            name, value = pair.split(":")
            found.append((name, float(value)))
    return found
