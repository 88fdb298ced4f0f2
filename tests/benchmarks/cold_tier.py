"""How long it takes to store image keys in a cold tier, to attend to them as they are stored, and
to read them back, and how many bytes they take.

    python -m tests.benchmarks.cold_tier

One layer of a 7B model (32 heads of 128) with 2,880 image tokens; beside it, one decode step's
attention over the same keys in full, and what the stock cache does before it, copying them.
Processor time of one thread, the least of five, and "attend / full" and "attend / stock" as ratios
of these.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from avl.kernels.codes import BITS
from avl.quantized_tier import QuantizedTier
from tests.benchmarks.machine import environment

HEADS, TOKENS, WIDTH = 32, 2880, 128


def least(run: Callable[[], object]) -> float:
    """Milliseconds of processor time."""
    run()  # compiles kernels, and touches memory
    times = []
    for _ in range(5):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def attend_in_full(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    weights = (query @ keys.transpose(-1, -2)).float().softmax(-1)
    return weights.to(values.dtype) @ values


def attend_to_codes(query: torch.Tensor, tier: QuantizedTier) -> torch.Tensor:
    return tier.weighted_values(tier.products(query[:, :, 0]).softmax(-1))


def main() -> None:
    torch.set_num_threads(1)
    print("\n".join(f"{name}: {value}" for name, value in environment().items()))
    index = torch.arange(TOKENS).view(1, 1, -1)
    print(
        "| dtype | bits | bytes / full | store (ms) | attend (ms) | attend / full | attend / stock"
        " | read (ms) |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        # As projections leave them: the heads of a token beside one another.
        keys, values = torch.randn(2, 1, TOKENS, HEADS, WIDTH).transpose(2, 3).to(dtype)
        query = torch.randn(1, HEADS, 1, WIDTH).to(dtype)
        packed = keys.contiguous(), values.contiguous()
        full = least(lambda q=query, kv=packed: attend_in_full(q, *kv))
        new = torch.randn(1, HEADS, 1, WIDTH).to(dtype)
        copy = least(lambda n=new, kv=packed: [torch.cat([part, n], 2) for part in kv])
        for bits in BITS:
            arguments = bits, keys, values, index, index, []
            tier = QuantizedTier.hold(*arguments)
            share = tier.nbytes(host=False) / (keys.nbytes + values.nbytes)
            store = least(lambda given=arguments: QuantizedTier.hold(*given))
            attend = least(lambda q=query, t=tier: attend_to_codes(q, t))
            name = str(dtype).removeprefix("torch.")
            print(
                f"| {name} | {bits} | {share:.3f} | {store:.0f} | {attend:.1f} |"
                f" {attend / full:.2f} | {attend / (full + copy):.2f} | {least(tier.read):.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
