"""What each option of A-VL beyond the paper is worth on the embedded model: accuracy, bytes, keys
read.

    python -m tests.benchmarks.options --out options.jsonl --samples 200
    python -m tests.benchmarks.options --show options.jsonl

Caption, ocr and count are the tasks with answers of many, some and few tokens. Every option answers
the same held-out questions; intervals are Wilson's of the accuracy, and bootstrapped ones of the
paired difference to the full cache. The file has the form of avl_analysis.evaluation.frontier's.
`--dtype bfloat16` runs model and cache in 16 bits, `--only cold` the full cache and options with
that word in their names.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import avl
from avl import AdaptivePolicy
from avl_analysis.corpus.batches import batches_by_length
from avl_analysis.corpus.questions import scene_samples
from avl_analysis.evaluation.frontier import FrontierPoint, read, run_unit, summarise, write
from avl_analysis.models.loading import load_model
from avl_analysis.scenes import TASKS


def options() -> dict[str, avl.Policy]:
    """Policies by name. Text is never dropped but in the first two, so that each option is seen
    alone.
    """
    vision = AdaptivePolicy(text=None)
    cold = AdaptivePolicy.with_cold_tier
    found: dict[str, avl.Policy] = {
        "full": avl.FullPolicy(),
        "paper": AdaptivePolicy(),
        "paper without text rule": vision,
        "refresh every step": AdaptivePolicy(text=None, refresh_every=1),
        "everything secondary": AdaptivePolicy(secondary=1.0, core=0.3, refresh_every=3, text=None),
    }
    for threshold in (0.5, 0.7, 0.9):
        found[f"drift {threshold:g}"] = AdaptivePolicy(text=None, drift=threshold)
    found["drift 0.9, everything secondary"] = AdaptivePolicy(
        secondary=1.0, core=0.3, text=None, drift=0.9
    )
    rising = (0.3, 0.4, 0.5, 0.6, 0.7)
    found["more in later layers"] = AdaptivePolicy(secondary=rising, core=0.3, text=None)
    found["more in earlier layers"] = AdaptivePolicy(secondary=rising[::-1], core=0.3, text=None)
    for bits in (16, 8, 4, 2):
        found[f"cold {bits}, core 0.3, K 3"] = AdaptivePolicy(
            secondary=0.3, core=0.3, refresh_every=3, text=None, cold=bits
        )
    found |= {
        "cold 4, core 0.3, K 2": AdaptivePolicy(
            secondary=0.3, core=0.3, refresh_every=2, text=None, cold=4
        ),
        "cold 4, core 0.3, drift 0.9": AdaptivePolicy(
            secondary=0.3, core=0.3, text=None, cold=4, drift=0.9
        ),
        "cold 4, always read, 0.1 in full": cold(secondary=0.1),
        "cold 8, always read": cold(cold=8),
        "cold 4, always read (preset)": cold(),
        "cold 2, always read": cold(cold=2),
    }
    for share in (0.1, 0.05, 0.02):
        found[f"cold 4, best {share:g} of each step"] = cold(
            core=share, refresh_every=1, sparse_refresh=True
        )
    found["cold 4, text rule 0.7"] = cold(text=0.7)
    return found


def measure(
    tasks: Sequence[str], samples: int, batch: int, dtype: str, only: str
) -> list[dict[str, Any]]:
    """The summary of the full cache, and of every option whose name contains `only`,
    on every task."""
    vlm = load_model("scenes", dtype=dtype)
    points = [
        FrontierPoint(name, None, policy)
        for name, policy in options().items()
        if name == "full" or only in name
    ]
    lines = []
    for task in tasks:
        questions = scene_samples(samples, [task], split="tuning")
        for group in batches_by_length(vlm, questions, batch):
            lines += [{"task": task, **line} for line in run_unit(vlm, questions, group, points)]
            print(
                f"{task}: {len(lines) // len(points)} answers by {len(points)} policies",
                file=sys.stderr,
            )
    return summarise(lines, points, samples)


def show(lines: Sequence[dict[str, Any]]) -> None:
    """A table in Markdown: accuracy with interval, share of bytes, and share of keys
    read, by task."""
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    by_cell = {(line["policy"], line["task"]): line for line in lines}
    print("| option | " + " | ".join(f"{task}: accuracy | bytes | read" for task in tasks) + " |")
    print("|---|" + "---|---|---|" * len(tasks))
    for policy in dict.fromkeys(line["policy"] for line in lines):
        cells = []
        for task in tasks:
            line = by_cell[policy, task]
            cells.append(f"{line['accuracy']:.3f} [{line['low']:.3f}, {line['high']:.3f}]")
            cells.append(f"{100 * line['bytes']:.0f} % | {100 * line['attended']:.0f} %")
        print(f"| {policy} | " + " | ".join(cells) + " |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.options", description=__doc__)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="JSON-lines file to write")
    target.add_argument("--show", type=Path, help="file to print as a table")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["caption", "ocr", "count"])
    parser.add_argument("--samples", type=int, default=200, help="samples per task")
    parser.add_argument("--batch", type=int, default=100, help="most samples per pass")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default="", help="a word in the names of the options wanted")
    chosen = parser.parse_args(arguments)
    if chosen.show is not None:
        show(read(chosen.show)[1])
        return
    torch.set_num_threads(1)
    lines = measure(chosen.tasks, chosen.samples, chosen.batch, chosen.dtype, chosen.only)
    command = (
        f"python -m tests.benchmarks.options --out {chosen.out.name} --samples {chosen.samples}"
        f" --dtype {chosen.dtype} --tasks"
        f" {' '.join(chosen.tasks)}{f' --only {chosen.only!r}' if chosen.only else ''}"
    )
    write(chosen.out, lines, {"command": command, "torch": torch.__version__})
    show(lines)


if __name__ == "__main__":
    main()
