"""An independent evaluation of an artifact in plain PyTorch: the reference for train_gpt.py.

It shares no code with train_gpt.py. It scores one document at a time in fp32, without caches,
batches or kernels; tools/plain_artifact.py reads the file.
    model = Model(Path("final_model.int6.ptz").read_bytes(), settings)
    model.plain(ids)           # nats of the targets ids[1:]: a document and the next BOS
    model.adapted(ids, start)  # the same with TTT_MODE=document; start: its place in the stream
    model.chunks(stream)       # TTT_MODE=chunk, over the whole stream
`settings` has the knobs by field name, as the Hyperparameters of a log. What this file does not
know raises NotImplementedError: phases, warm start, tilt, value embeddings, other optimisers.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from plain_artifact import number, pairs, read_artifact, visits, windows
from torch import Tensor

UNKNOWN = ("ttt_warm_start_a", "ttt_freeze_blocks", "phased_ttt_num_phases", "tilt_order")


def norm(x: Tensor) -> Tensor:
    """x over its root mean square along the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps)


class Adapter:
    """The adapter of one document: y += scale * (x A^T) B^T at every site of every visit."""

    def __init__(self, c: dict, s: dict, slots: int, start: int):
        """A is uniform, by the seed and the document's place in the stream; B and bias are 0."""
        C, kv = c["model_dim"], c["num_kv_heads"] * (c["model_dim"] // c["num_heads"])
        widths = {"q": C, "k": kv, "v": kv, "o": C, "mlp": C, "head": c["vocab_size"]}
        on = [name for name in widths if name != "head" and s[f"ttt_{name}_lora"]]
        sites = [(name, slot) for slot in range(slots) for name in on] + [("head", 0)]
        ranks = dict.fromkeys(widths, s["ttt_lora_rank"])
        ranks["head"] = s["ttt_lm_rank"] or s["ttt_lora_rank"]
        generator = torch.Generator().manual_seed(s["seed"] * 1_000_000_007 + start)
        drawn = torch.empty(len(sites), max(ranks[n] for n, _ in sites), C, dtype=torch.float32)
        drawn.uniform_(-(C**-0.5), C**-0.5, generator=generator)
        drawn = drawn.to(torch.get_default_dtype())
        self.a = {site: a[: ranks[site[0]]].clone() for site, a in zip(sites, drawn, strict=True)}
        self.b = {site: torch.zeros(widths[site[0]], ranks[site[0]]) for site in sites}
        self.scale = s["ttt_lora_alpha"] / s["ttt_lora_rank"] if s["ttt_lora_alpha"] else 1.0
        factors = dict(pairs(s["ttt_lr_factors"]))
        self.s, self.updates, self.bias = s, 0, torch.zeros(slots, C)
        # (tensor, factor of the rate, first moment, second moment)
        self.leaves = []
        for tensors in (self.a, self.b):
            for (name, _), leaf in tensors.items():
                self.leaves.append((leaf, factors.get(name, 1.0), leaf * 0, leaf * 0))
        if s["ttt_bias_tune"]:
            self.leaves.append((self.bias, factors.get("bias", 1.0), self.bias * 0, self.bias * 0))
        for leaf, *_ in self.leaves:
            leaf.requires_grad_()

    def __call__(self, site: str, slot: int, x: Tensor) -> Tensor | float:
        """What is added at a site."""
        if (site, slot) not in self.a:
            return 0.0
        return self.scale * (x @ self.a[site, slot].T) @ self.b[site, slot].T

    def learn(self, loss: Tensor) -> None:
        """One step of AdamW."""
        s, grads = self.s, torch.autograd.grad(loss, [leaf for leaf, *_ in self.leaves])
        share = min(self.updates // s["ttt_grad_steps"] / (s["ttt_cosine_chunks"] or math.inf), 1)
        self.updates += 1
        rate = s["ttt_lora_lr"] * max(0.1, 0.5 + 0.5 * math.cos(math.pi * share))
        beta1, beta2, t = s["ttt_beta1"], s["ttt_beta2"], self.updates
        with torch.no_grad():
            for (leaf, factor, first, second), grad in zip(self.leaves, grads, strict=True):
                first.mul_(beta1).add_((1 - beta1) * grad)
                second.mul_(beta2).add_((1 - beta2) * grad * grad)
                root = (second / (1 - beta2**t)).sqrt() + 1e-10
                leaf.mul_(1 - factor * rate * s["ttt_weight_decay"])
                leaf.sub_(factor * rate * first / (1 - beta1**t) / root)


class Model:
    """An artifact's network, and its evaluations with the settings of a run."""

    def __init__(self, artifact: bytes, settings: dict):
        """Reads the artifact and the settings (text or values, by field name)."""
        self.c, self.w = read_artifact(artifact)
        self.s = {name: number(value) for name, value in settings.items()}
        unknown = [name for name in UNKNOWN if self.s[name]]
        optimisers = (self.s["ttt_optimizer"], self.s["ttt_chunk_optimizer"])
        if unknown or self.c["ve_enabled"] or optimisers != ("adam", "sgd"):
            raise NotImplementedError(f"not known here: {unknown or 've_enabled, optimisers'}")
        self.plan, self.dim = visits(self.c), self.c["model_dim"] // self.c["num_heads"]
        self.depth = torch.ones(self.c["num_layers"])
        if self.c["branch_scale"]:
            self.depth = torch.arange(1, self.c["num_layers"] + 1).rsqrt()

    def embed(self, ids: Tensor) -> Tensor:
        """x0 (T, C) of one window."""
        c, w = self.c, self.w
        x = w["tok_emb"][ids]
        before = torch.cat([x[:1] * 0, x[:-1]])
        goes_on = ((torch.arange(len(ids)) > 0) & (ids != 1))[:, None]
        if c["smear_gate_enabled"]:
            gate = (x[:, : c["gate_window"]] @ w["smear_proj"].T).sigmoid() * w["smear_lambda"]
            x = x + gate * goes_on * before
        if c["bigram_vocab_size"]:
            last = c["bigram_vocab_size"] - 1
            pair = (36313 * ids ^ 27191 * ids.roll(1)) % last
            pair[0] = last
            x = x + w["bigram_emb"][pair] @ (w["bigram_scale"] * w["bigram_proj"]).T
        x = norm(x)
        if c["smear_enabled"]:
            gate = w["smear_gate"].sigmoid()
            x = (1 - gate) * x + gate * goes_on * torch.cat([x[:1] * 0, x[:-1]])
        return x

    def attend(self, n: Tensor, layer: int, longest: int, add: object) -> Tensor:
        """Attention of normalised n (T, C); `add` is what the adapter adds at a site."""
        c, w, L = self.c, self.w, self.c["num_layers"]
        rows = {"q": w["qo_bank"][layer], "k": w["kv_bank"][layer], "v": w["kv_bank"][L + layer]}
        heads = [(n @ rows[name].T + add(name, n)).unflatten(1, (-1, self.dim)) for name in rows]
        q, k, v = [head.transpose(0, 1) for head in heads]  # (H, T, D)
        q = self.rotate(norm(q), longest) * w["q_gain"][layer][:, None, None]
        k = self.rotate(norm(k), longest)
        share = len(q) // len(k)
        k, value = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
        y = F.scaled_dot_product_attention(q, k, value, is_causal=True)  # (H, T, D)
        if layer >= L - c["xsa_last_n"]:
            unit = F.normalize(value, dim=-1)
            y = y - (y * unit).sum(-1, keepdim=True) * unit
        if c["sparse_attn_gate_enabled"]:
            logits = n[:, : c["gate_window"]] @ w["attn_gate"][layer].T
            y = y * (c["sparse_attn_gate_scale"] * logits).sigmoid().T[..., None]
        out = y.transpose(0, 1).flatten(1) @ w["qo_bank"][L + layer].T + add("o", n)
        return w["attn_scale"][layer] * self.depth[layer] * out

    def rotate(self, x: Tensor, longest: int) -> Tensor:
        """Rotary embedding of (H, T, D)."""
        dims = self.c["rope_dims"] or self.dim
        base = self.c["rope_base"]
        if self.c["rope_train_seq_len"]:
            stretch = max(longest / self.c["rope_train_seq_len"], 1)
            base *= stretch ** (dims / (dims - 2))
        pair = torch.arange(dims // 2, dtype=torch.float64)
        angle = torch.arange(x.size(1))[:, None] * base ** (-pair / (dims // 2))
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b, rest = x[..., : dims // 2], x[..., dims // 2 : dims], x[..., dims:]
        return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], -1)

    def nats(self, ids, longest: int, scored: int, adapter: Adapter | None = None) -> Tensor:
        """Nats of the last `scored` targets of one window, ids (T + 1,)."""
        c, w, lanes = self.c, self.w, None
        x0 = x = self.embed(ids[:-1])
        stored = []
        for slot, (layer, rows) in enumerate(self.plan):

            def add(site: str, y: Tensor, slot: int = slot) -> Tensor | float:
                return adapter(site, slot, y) if adapter else 0.0

            scale = (layer + 1) ** -0.5 if c["ln_scale"] else 1.0
            start = c["parallel_start_layer"]
            if start and layer >= start and lanes is None:
                lanes = x
            if rows:
                skip = w["skip_weights"][rows].mean(0) * stored.pop()
                gate = w["skip_gates"][rows].mean(0).sigmoid() if c["skip_gates_enabled"] else None
                x = x + skip if gate is None else skip + gate * (x - skip)
            mixed = w["resid_mix"][layer][0] * x + w["resid_mix"][layer][1] * x0
            attn = self.attend(norm(mixed) * scale, layer, longest, add)
            n = norm(mixed + attn if lanes is None else lanes) * scale
            up = F.leaky_relu(n @ w["up_bank"][layer].T, c["leaky_slope"]).square()
            mlp = up @ w["down_bank"][layer].T + add("mlp", n)
            mlp = w["mlp_scale"][layer] * self.depth[layer] * mlp
            if lanes is None:
                x = mixed + attn + mlp
            else:
                keep, post = w["resid_lambdas"][layer - start], w["post_lambdas"][layer - start]
                x = keep[0] * x + post[0, 0] * attn + post[1, 0] * mlp
                lanes = keep[1] * lanes + post[0, 1] * attn + post[1, 1] * mlp
            x = x + adapter.bias[slot] if adapter else x
            if slot < len(self.plan) // 2:
                stored.append(x)
        if lanes is not None:
            x = {"mean": (x + lanes) / 2, "mlp": lanes, "attn": x}[c["parallel_final_lane"]]
        x = norm(x)[-scored:]
        logits = x @ w["tok_emb"].T + (adapter("head", 0, x) if adapter else 0.0)
        logits = c["logit_softcap"] * torch.tanh(logits / c["logit_softcap"])
        logits = logits / self.s["logit_temperature"]
        return F.cross_entropy(logits, ids[-scored:], reduction="none")

    # --- Evaluations ------------------------------------------------------------------------------
    @torch.no_grad()
    def plain(self, ids: np.ndarray, stride: int = 0) -> np.ndarray:
        """Nats of the targets ids[1:], in windows of EVAL_SEQ_LEN that begin at multiples."""
        ids, length = torch.as_tensor(ids).long(), self.s["eval_seq_len"]
        found = []
        for start, scored, end in windows(len(ids) - 1, length, stride or length):
            found.append(self.nats(ids[start : end + 1], length, end - scored))
        return torch.cat(found).numpy()

    def adapted(self, ids: np.ndarray, start: int) -> np.ndarray:
        """Nats of a document's targets; its adapter learns from a chunk after the score."""
        s, ids, found, done = self.s, torch.as_tensor(ids).long(), [], 0
        adapter = Adapter(self.c, s, len(self.plan), start)
        limits = sorted((int(limit), int(size)) for limit, size in pairs(s["ttt_short_chunks"]))
        while done < len(ids) - 1:
            size = next((size for limit, size in limits if done < limit), s["ttt_chunk_size"])
            end = done + size
            window = ids[max(0, end - s["ttt_eval_seq_len"]) : end + 1]
            count = min(end, len(ids) - 1) - done
            learns = s["ttt_min_doc_len"] <= end <= (s["ttt_max_doc_len"] or math.inf)
            nats = self.nats(window, s["ttt_eval_seq_len"], count, adapter)
            found.append(nats.detach())
            for step in range(s["ttt_grad_steps"] if learns and end < len(ids) - 1 else 0):
                if step:
                    nats = self.nats(window, s["ttt_eval_seq_len"], count, adapter)
                adapter.learn(nats.mean())
            done = end
        return torch.cat(found).numpy()

    def chunks(self, stream: np.ndarray, world_size: int = 1) -> np.ndarray:
        """Nats of all targets of a stream; all weights learn from a chunk after its score."""
        s, ids, length, found = self.s, torch.as_tensor(stream).long(), self.s["eval_seq_len"], []
        size, total = s["ttt_chunk_tokens"], len(stream) - 1
        stride = s["eval_stride"] if s["sliding_window_enabled"] else length
        saved = {name: w.clone() for name, w in self.w.items()}
        weights = [w.requires_grad_() for w in self.w.values()]
        optimizer = torch.optim.SGD(weights, momentum=s["ttt_momentum"])
        last = (total - 1) // size
        for k in range(last + 1):
            end_of_chunk = min((k + 1) * size, total)
            for start, first, end in windows(total, length, stride):
                first, end = max(first, k * size), min(end, end_of_chunk)
                if first < end:
                    with torch.no_grad():
                        found.append(self.nats(ids[start : end + 1], length, end - first))
            begins = range(k * size, end_of_chunk - length + 1, length)
            per_step = s["ttt_batch_seqs"] * world_size
            steps = [begins[i : i + per_step] for i in range(0, len(begins), per_step)]
            share = k / max(last, 1)
            optimizer.param_groups[0]["lr"] = 0.5 * s["ttt_lr"] * (1 + math.cos(math.pi * share))
            for step in steps * s["ttt_epochs"] if k < last else []:
                optimizer.zero_grad()
                for begin in step:
                    nats = self.nats(ids[begin : begin + length + 1], length, length)
                    (nats.sum() / (len(step) * length)).backward()
                torch.nn.utils.clip_grad_norm_(weights, s["ttt_grad_clip"] or math.inf)
                optimizer.step()
        self.w = saved
        return torch.cat(found).numpy()
