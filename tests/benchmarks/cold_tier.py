"""How long it takes to store image keys in a cold tier and to read them back, and how many bytes
they take.

    python -m tests.benchmarks.cold_tier

One layer of a 7B model (32 heads of 128) with 2,880 image tokens; beside it, one decode step's
attention over the same keys in full. Processor time of one thread, the least of five.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from avl.kernels.codes import BITS
from avl.quantized_tier import QuantizedTier

HEADS, TOKENS, WIDTH = 32, 2880, 128


def least(run: Callable[[], object]) -> float:
    """Milliseconds of processor time."""
    times = []
    for _ in range(5):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def main() -> None:
    torch.set_num_threads(1)
    index = torch.arange(TOKENS).view(1, 1, -1)
    print(
        "| dtype | bits | bytes / full | store (ms) | read (ms) | attention over full keys (ms) |"
    )
    print("|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        keys, values = torch.randn(2, 1, HEADS, TOKENS, WIDTH).to(dtype)
        query = torch.randn(1, HEADS, 1, WIDTH).to(dtype)

        def attend(
            q: torch.Tensor = query, k: torch.Tensor = keys, v: torch.Tensor = values
        ) -> torch.Tensor:
            return torch.matmul((q @ k.transpose(-1, -2)).float().softmax(-1).to(v.dtype), v)

        plain = least(attend)
        for bits in BITS:

            def store(
                bits: int = bits, k: torch.Tensor = keys, v: torch.Tensor = values
            ) -> QuantizedTier:
                return QuantizedTier.hold(bits, k, v, index, index, [])

            tier = store()
            share = tier.nbytes(host=False) / (keys.nbytes + values.nbytes)
            name = str(dtype).removeprefix("torch.")
            print(
                f"| {name} | {bits} | {share:.3f} | {least(store):.0f} | {least(tier.read):.0f} |"
                f" {plain:.1f} |"
            )


if __name__ == "__main__":
    main()
