"""FlashAttention 2, 3 and 4 in every signature that was published: called rightly, or refused.

A stand-in has the parameters of `flash_attn_varlen_func` as of a date in the repository
Dao-AILab/flash-attention, and computes what sdpa_varlen does. It insists on the values of the
parameters that matter and on the defaults of all others.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import train_gpt as tg

OFFSETS = "cu_seqlens_q cu_seqlens_k"
LENGTHS = "max_seqlen_q max_seqlen_k"
FA2 = f"{OFFSETS} {LENGTHS} dropout_p softmax_scale causal"
FA3 = f"{OFFSETS} {LENGTHS} softmax_scale causal"
FA3_TAIL = "softcap num_splits pack_gqa deterministic sm_margin"
FA3_MIDDLE = "softmax_scale causal qv q_descale k_descale v_descale window_size"
FA4_TAIL = "window_size learnable_sink softcap num_splits pack_gqa deterministic"
FA4_LATE = f"qv {OFFSETS} {LENGTHS} min_seqlen_k seqused_q seqused_k gather_kv_indices page_table"
FA4_LATE += f" softmax_scale causal {FA4_TAIL} score_mod"


class Published(NamedTuple):
    """One signature of flash_attn_varlen_func."""

    backend: str  # of ATTENTION_BACKENDS
    since: str
    parameters: str  # after q, k and v
    required: int  # how many of them have no default
    returns_lse: bool = False


PUBLISHED = [
    Published("fa2", "2023-07", f"{FA2} return_attn_probs", 4),
    Published("fa2", "2023-09", f"{FA2} window_size return_attn_probs", 4),
    Published("fa2", "2023-12-19", f"{FA2} window_size alibi_slopes return_attn_probs", 4),
    Published(
        "fa2", "2023-12-23", f"{FA2} window_size alibi_slopes deterministic return_attn_probs", 4
    ),
    Published(
        "fa2",
        "2024-03",
        f"{FA2} window_size alibi_slopes deterministic return_attn_probs block_table",
        4,
    ),
    Published(
        "fa2",
        "2024-07",
        f"{FA2} window_size softcap alibi_slopes deterministic return_attn_probs block_table",
        4,
    ),
    Published("fa3", "2024-07", FA3, 4, True),
    Published("fa3", "2024-08", f"{FA3} deterministic", 4, True),
    Published("fa3", "2024-09", f"{FA3} window_size deterministic seqused_q seqused_k", 4, True),
    Published(
        "fa3",
        "2024-11",
        f"{FA3} window_size deterministic seqused_q seqused_k block_table",
        4,
        True,
    ),
    Published(
        "fa3",
        "2025-01",
        f"{OFFSETS} seqused_q seqused_k {LENGTHS} softmax_scale causal q_descale k_descale"
        f" v_descale window_size sink_token_length {FA3_TAIL}",
        6,
        True,
    ),
    Published(
        "fa3",
        "2025-02-07",
        f"{OFFSETS} seqused_q seqused_k {LENGTHS} {FA3_MIDDLE} sink_token_length {FA3_TAIL}",
        6,
        True,
    ),
    Published(
        "fa3",
        "2025-02-15",
        f"{OFFSETS} {LENGTHS} seqused_q seqused_k {FA3_MIDDLE} sink_token_length {FA3_TAIL}",
        4,
        True,
    ),
    Published(
        "fa3",
        "2025-03",
        f"{OFFSETS} {LENGTHS} seqused_q seqused_k {FA3_MIDDLE} {FA3_TAIL}",
        4,
        True,
    ),
    Published(
        "fa3",
        "2025-04",
        f"{OFFSETS} {LENGTHS} seqused_q seqused_k {FA3_MIDDLE} attention_chunk {FA3_TAIL}",
        4,
        True,
    ),
    Published(
        "fa3",
        "2025-08",
        f"{OFFSETS} {LENGTHS} seqused_q seqused_k {FA3_MIDDLE} attention_chunk {FA3_TAIL}"
        " return_attn_probs",
        4,
    ),
    Published(
        "fa4",
        "2025-06",
        f"{OFFSETS} seqused_q seqused_k max_seqlen_q softmax_scale causal softcap",
        0,
        True,
    ),
    Published(
        "fa4",
        "2025-07",
        f"{OFFSETS} seqused_q seqused_k softmax_scale causal window_size softcap",
        0,
        True,
    ),
    Published(
        "fa4",
        "2025-11",
        f"{OFFSETS} seqused_q seqused_k page_table softmax_scale causal {FA4_TAIL}",
        0,
        True,
    ),
    Published(
        "fa4",
        "2026-01-08",
        f"{OFFSETS} seqused_q seqused_k page_table softmax_scale causal {FA4_TAIL} score_mod"
        f" aux_tensors {LENGTHS}",
        0,
        True,
    ),
    Published(
        "fa4",
        "2026-01-09",
        f"{OFFSETS} {LENGTHS} seqused_q seqused_k page_table softmax_scale causal {FA4_TAIL}"
        " score_mod aux_tensors",
        0,
        True,
    ),
    Published("fa4", "2026-04", f"{FA4_LATE} aux_tensors return_lse", 0, True),
    Published(
        "fa4",
        "2026-08",
        f"{FA4_LATE} score_mod_bwd mask_mod block_sparse_tensors aux_tensors aux_scalars return_lse"
        " scheduler_metadata seqlen_k_per_split disable_scheduler_metadata",
        0,
        True,
    ),
]

# The longest segment of the row that is tried.
LONGEST = 7
UNSET = object()


def stand_in(published: Published) -> Callable:
    """A function with these parameters, which checks how it is called."""
    names = published.parameters.split()

    def attend(q: Tensor, k: Tensor, v: Tensor, given: dict) -> Tensor | tuple[Tensor, Tensor]:
        """sdpa_varlen with the offsets given; everything else must be as the run needs it."""
        cu_queries = given.pop("cu_seqlens_q")
        cu_keys = given.pop("cu_seqlens_k")
        assert given.pop("causal") is True
        for name in LENGTHS.split():
            assert given.pop(name, LONGEST) == LONGEST, name
        assert all(value is UNSET or value is None for value in given.values()), given
        y, lse = tg.sdpa_varlen(q, k, v, cu_queries, cu_keys, LONGEST)
        return (y, lse) if published.returns_lse else y

    required = names[: published.required]
    optional = [f"{name}=UNSET" for name in names[published.required :]]
    given = ", ".join(f"{name}={name}" for name in names)
    scope = {"UNSET": UNSET, "attend": attend}
    parameters = ", ".join(["q", "k", "v", *required, *optional])
    exec(f"def function({parameters}): return attend(q, k, v, dict({given}))", scope)
    return scope["function"]


@pytest.fixture
def install(monkeypatch) -> Callable[[Published], None]:
    """Makes a stand-in the package of its backend."""

    def replace(published: Published) -> None:
        name = tg.ATTENTION_BACKENDS[published.backend].module
        module = types.ModuleType(name)
        module.flash_attn_varlen_func = stand_in(published)
        monkeypatch.setitem(sys.modules, name, module)

    return replace


def results(function: Callable, cu_queries: list[int], tokens: list[int]) -> list[Tensor]:
    """y and the gradients of q, k and v, for the queries `tokens` of three documents."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(12, heads, 8, generator=generator) for heads in (4, 2, 2, 4))
    leaves = [x.requires_grad_() for x in (q[tokens], k, v)]
    cu = [torch.tensor(ends, dtype=torch.int32) for ends in (cu_queries, [0, 4, 5, 12, 12])]
    y = function(*leaves, *cu, LONGEST)
    y = y[0] if isinstance(y, tuple) else y
    return [y, *torch.autograd.grad(y, leaves, grad[tokens])]


def identity(published: Published) -> str:
    """The name of a case."""
    return f"{published.backend}-{published.since}"


@pytest.mark.parametrize("published", PUBLISHED, ids=identity)
def test_every_published_signature_is_called_rightly_forward_and_backward(published, install):
    install(published)
    function = tg.load_attention(published.backend)
    for cu_queries, tokens in (
        ([0, 4, 5, 12, 12], list(range(12))),
        # The last two tokens of the first document, none of the second, one of the third.
        ([0, 2, 2, 3, 3], [2, 3, 11]),
    ):
        found = results(function, cu_queries, tokens)
        wanted = results(tg.sdpa_varlen, cu_queries, tokens)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("published", "reason"),
    [
        (Published("fa3", "never", f"{OFFSETS} {LENGTHS} scheduler causal", 5), "'scheduler'"),
        (Published("fa2", "never", f"cu_seq_q cu_seq_k {LENGTHS} causal", 4), "'cu_seq_q'"),
        (Published("fa4", "never", f"{OFFSETS} {LENGTHS} is_causal", 0), "'causal'"),
    ],
    ids=["demands more", "other names of offsets", "other name of causal"],
)
def test_an_unknown_signature_is_refused_with_the_reason(published, reason, install, monkeypatch):
    monkeypatch.setattr(tg, "ATTENTION", {"sdpa": tg.sdpa_varlen})
    install(published)
    refused = tg.check_attention(published.backend, torch.device("cpu"), torch.float32)
    assert reason in refused
    assert "\n" not in refused


def test_a_call_without_what_matters_is_caught(install, monkeypatch):
    install(PUBLISHED[5])
    function = sys.modules["flash_attn"].flash_attn_varlen_func

    def careless(q, k, v, cu_queries, cu_keys, longest):
        """Leaves `causal` at its default."""
        return function(q, k, v, cu_queries, cu_keys, longest, longest)

    with pytest.raises(AssertionError):
        results(careless, [0, 4, 5, 12, 12], list(range(12)))
