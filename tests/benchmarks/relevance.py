"""Peak memory of relevance maps, against eager attention that keeps all weights and gradients.

    python -m tests.benchmarks.relevance [--layers 8] [--heads 32] [--grid 32] [--text 176]

Each way runs in a process of its own on a random LLaVA in float32; what is printed is the most
memory that process held, less what it held once model and inputs were there.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

WAYS = ("forward", "relevance", "eager")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--grid", type=int, default=32)
    parser.add_argument("--text", type=int, default=176)
    parser.add_argument("--way", choices=WAYS, help="measure this one in this process")
    given = parser.parse_args()
    if given.way is not None:
        print(measure(given))
        return
    for way in WAYS:
        command = [sys.executable, "-m", "tests.benchmarks.relevance", *sys.argv[1:], "--way", way]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def measure(given: argparse.Namespace) -> str:
    """One line: peak memory beyond model and inputs, and seconds, of one way."""
    import torch

    from avl_analysis.relevance.gradients import attention_gradients
    from tests import tiny
    from tests.avl_analysis.relevance.slow_maps import slow_gradients

    model = tiny.llava(
        given.kv_heads,
        heads=given.heads,
        layers=given.layers,
        hidden=given.hidden,
        grid=given.grid,
        attn="eager" if given.way == "eager" else "sdpa",
    )
    model.config.text_config.max_position_embeddings = 8192
    inputs = tiny.inputs(model, [given.text])
    small = tiny.inputs(model, [3], images=0)
    target = torch.tensor([70])
    ways = {
        "forward": lambda given: model(**given, use_cache=False),
        "relevance": lambda given: attention_gradients(model, given, target),
        "eager": lambda given: slow_gradients(model, given, target),
    }
    with torch.set_grad_enabled(given.way != "forward"):
        for parameter in model.parameters():
            parameter.requires_grad_(given.way == "eager")
        ways[given.way](small)  # loads what is loaded once
        before, started = peak(), time.perf_counter()
        ways[given.way](inputs)
    seconds = time.perf_counter() - started
    length = inputs["input_ids"].shape[1]
    return (
        f"{given.way:10s} {given.layers} layers x {given.heads} heads, {length} tokens:"
        f" {peak() - before:7.0f} MB, {seconds:.1f} s"
    )


def peak() -> float:
    """The most memory this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
