"""The MLP kernel after every pass of Triton's compiler: `make simulate` runs it under ttsem.

ttsem executes the code that each pass receives and compares the results, so it names the first pass
that changes a value. FLATTEN=1 flattens the loops; 3 programs share 3 x 3 tiles, some of them cut.
"""

from __future__ import annotations

import os

import torch
import triton
from simulated_kernels import mlp_of_pointers

T, K, F = 70, 64, 80
FLATTEN = os.environ.get("FLATTEN") == "1"


def main() -> None:
    """Launches the forward and the backward once, on tensors of the CPU."""
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    # Memory of its own for each tensor, and nothing of one launch in the other: ttsem takes a view
    # for the whole tensor, and each launch by itself.
    pre, post, dpre = (torch.zeros(T, F).half() for _ in range(3))
    options = dict(BM=32, BN=32, BK=32, FLATTEN=FLATTEN, num_warps=8)
    backward = (draw(T, K), draw(K, F), draw(T, F), dpre)
    mlp_of_pointers[(3,)](*backward, T, K, F, BACKWARD=True, **options)
    mlp_of_pointers[(3,)](draw(T, K), draw(F, K), pre, post, T, K, F, BACKWARD=False, **options)


if __name__ == "__main__":
    main()
