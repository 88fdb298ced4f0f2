"""What a token of the embedded model takes under a policy, as a multiple of one under none.

    python tests/benchmarks/embedded.py                       # about two minutes
    python tests/benchmarks/embedded.py --processor-time --threads 1   # on a busy machine

The model is so small that Python's work decides. Captions of one drawn picture are generated with
`generate()`, the policies in turn, and a clock is read after every token. Of each token of the
answer the least time of all rounds counts, which is what the work takes where nothing else disturbs
it: on a busy machine means differ from run to run by more than the policies do. The first tokens,
and with them the prompt, are left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import avl
from avl_analysis import load_model
from avl_analysis.scenes.samples import samples
from tests.benchmarks.machine import PROCESSOR_TIME, environment

LEFT_OUT = 2
"""Tokens at the beginning of an answer whose times are not read."""
POLICIES = {
    "none": None,
    "full": avl.FullPolicy(),
    "paper": avl.AdaptivePolicy(),
    "preset": avl.AdaptivePolicy.with_cold_tier(),
}


class _Watch(LogitsProcessor):
    """Reads a clock after every token."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.read = clock, list[float]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.read.append(self.clock())
        return scores


def seconds(
    vlm: Any, inputs: Any, policy: avl.Policy | None, tokens: int, clock: Callable[[], float]
) -> list[float]:
    """What each token of an answer of so many tokens takes, the first few left out."""
    watch = _Watch(clock)
    with nullcontext() if policy is None else avl.adaptive(vlm.model, policy):
        vlm.model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([watch]),
        )
    return [after - before for before, after in pairwise(watch.read)][LEFT_OUT:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="turns of all policies (default 40)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default 64)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--processor-time", action="store_true", help=PROCESSOR_TIME)
    options = parser.parse_args()
    clock = time.thread_time if options.processor_time else time.perf_counter
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = {**environment(), "times": "of the thread" if options.processor_time else "elapsed"}
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    vlm, sample = load_model("scenes"), samples(1, "caption")[0]
    inputs = vlm.prepare(sample.image, sample.prompt)
    for policy in POLICIES.values():
        seconds(vlm, inputs, policy, options.tokens, clock)  # compiles and warms up
    times: dict[str, list[list[float]]] = {name: [] for name in POLICIES}
    for _ in range(options.rounds):
        for name, policy in POLICIES.items():
            times[name].append(seconds(vlm, inputs, policy, options.tokens, clock))
    least = {
        name: statistics.mean(min(rounds) for rounds in zip(*found, strict=True))
        for name, found in times.items()
    }
    for name, took in least.items():
        print(f"{name:7} {1e3 * took:.3f} ms a token, x none {took / least['none']:.2f}")


if __name__ == "__main__":
    main()
