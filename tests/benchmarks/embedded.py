"""What a token of the embedded model takes under a policy, as a multiple of one under none.

    python tests/benchmarks/embedded.py                       # about a minute
    python tests/benchmarks/embedded.py --processor-time --threads 1   # on a busy machine

The model is so small that Python's work decides. Captions of one drawn picture are generated with
`generate()`, two lengths each, so that the prompt drops out: the time of a token is the difference
of the two, divided by that of their lengths. The policies take turns, and the median of the ratios
within a turn counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import avl
from avl_analysis import load_model
from avl_analysis.scenes.samples import samples
from tests.benchmarks.machine import PROCESSOR_TIME, environment

POLICIES = {
    "none": None,
    "full": avl.FullPolicy(),
    "paper": avl.AdaptivePolicy(),
    "preset": avl.AdaptivePolicy.with_cold_tier(),
}


def seconds(
    vlm: Any, inputs: Any, policy: avl.Policy | None, tokens: int, clock: Callable[[], float]
) -> float:
    """What an answer of so many tokens takes."""
    with nullcontext() if policy is None else avl.adaptive(vlm.model, policy):
        begin = clock()
        vlm.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return clock() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of all policies (default 9)")
    parser.add_argument("--tokens", type=int, default=64, help="of the long answer (default 64)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--processor-time", action="store_true", help=PROCESSOR_TIME)
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = {**environment(), "times": "of the processor" if options.processor_time else "elapsed"}
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    vlm, sample, short = load_model("scenes"), samples(1, "caption")[0], 4
    inputs = vlm.prepare(sample.image, sample.prompt)
    for policy in POLICIES.values():
        seconds(vlm, inputs, policy, short, clock)  # compiles and warms up
    times: dict[str, list[float]] = {name: [] for name in POLICIES}
    for _ in range(options.rounds):
        for name, policy in POLICIES.items():
            long = seconds(vlm, inputs, policy, options.tokens, clock)
            rest = seconds(vlm, inputs, policy, short, clock)
            times[name].append((long - rest) / (options.tokens - short))
    for name, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(found, times["none"], strict=True))
        print(f"{name:7} {1e3 * statistics.median(found):.3f} ms a token, x none {ratio:.2f}")


if __name__ == "__main__":
    main()
