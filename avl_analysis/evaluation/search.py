"""Options of every policy beside its budget, searched with equal effort on the tuning split.

    python -m avl_analysis.evaluation.search --out options.json --scenes 16 --workers 2

A rival that runs with settings made for other models is beaten too easily. Every policy that has
options gets equally many trials (`TRIALS`, its defaults first), each trial answers the same
questions at the same budgets, and the trial with most right answers, mean over tasks and budgets,
is chosen; of equal ones the first. Where another trial is right as often, to two points, with fewer
bytes (by two points of the full cache's), that one is taken: KIVI's newest tokens cost bytes, not
answers. The questions are of the split `tuning`, which no comparison asks. All trials are written
beside what was chosen. `avl frontier --options FILE` uses the file.

Policies without options (random, stride, SCOPE, DivPrune, downsampling) have nothing to search.
This does not search the budget, nor combinations beyond those listed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import avl
from avl_analysis.evaluation.frontier import (
    FrontierPoint,
    FrontierSettings,
    Line,
    policy_at,
    run,
)
from avl_analysis.files import write_text
from avl_analysis.scenes.samples import SPLITS

TASKS = ("caption", "ocr", "relation", "what")
"""Tasks with answers of several tokens; those of one token cannot tell trials apart."""
# Shares of the full cache's bytes.
BUDGETS = (0.5, 0.25)
SLACK = 0.02
"""Difference of right answers, and of bytes, up to which two trials count as equal."""

TRIALS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "a-vl": ({}, {"refresh_every": 1}, {"refresh_every": 2}, {"refresh_every": 0}),
    "a-vl-cold": (
        {},
        {"core": 0.1, "refresh_every": 1, "sparse_refresh": True},
        {"core": 0.05, "refresh_every": 1, "sparse_refresh": True},
        {"text": 0.7},
    ),
    "streaming": ({}, {"sinks": 0}, {"sinks": 1}, {"sinks": 16}),
    "h2o": ({}, {"recent_share": 0.1}, {"recent_share": 0.25}, {"recent_share": 0.75}),
    "snapkv": ({}, {"window": 16}, {"window": 8}, {"window": 8, "kernel": 1}),
    "fastv": ({}, {"prefill_layer": 1}, {"prefill_layer": 3}, {"prefill_layer": 4}),
    "vl-cache": ({}, {"threshold": 0.001}, {"threshold": 0.03}, {"threshold": 0.1}),
    "ada-snapkv": (
        {},
        {"window": 8},
        {"window": 8, "kernel": 1},
        {"window": 8, "kernel": 1, "guaranteed": 0.5},
    ),
    "prefixkv": ({}, {"sinks": 0}, {"sinks": 1}, {"sinks": 16}),
    "mixkv": ({}, {"window": 16}, {"window": 8}, {"window": 8, "kernel": 1}),
    "kivi": ({}, {"newest": 64}, {"newest": 32}, {"newest": 16}),
    "quest": ({}, {"page_size": 8}, {"dense_layers": 0}, {"page_size": 8, "dense_layers": 0}),
}
"""Name on the command line -> fields that each trial changes; the first changes none."""


def trial_points(
    trials: Mapping[str, Sequence[Mapping[str, Any]]] = TRIALS, budgets: Sequence[float] = BUDGETS
) -> list[FrontierPoint]:
    """The full cache, and every trial at every budget; `trial_name` tells them apart."""
    return [
        FrontierPoint("full", None, avl.FullPolicy()),
        *(
            FrontierPoint(trial_name(name, fields), budget, policy_at(name, budget, fields))
            for name, listed in trials.items()
            for fields in listed
            for budget in budgets
        ),
    ]


def trial_name(policy: str, fields: Mapping[str, Any]) -> str:
    """A trial as the command line writes it: `snapkv,window=8`."""
    return ",".join([policy, *(f"{key}={value}" for key, value in fields.items())])


def choose(
    lines: Sequence[Line],
    trials: Mapping[str, Sequence[Mapping[str, Any]]] = TRIALS,
) -> dict[str, Any]:
    """What each policy's trials reached, and the fields that were chosen.

    Args:
        lines: of `frontier.run` over `trial_points`.
        trials: what was tried.

    Returns:
        `chosen`: name -> fields; `trials`: one entry per trial with its share of right answers,
        mean over tasks and budgets, its bytes and the keys it read.
    """
    chosen, listed = {}, []
    for name, tried in trials.items():
        scores, sizes = [], []
        for fields in tried:
            # One line for each task and budget, all of equal weight in the means.
            cell = [line for line in lines if line["policy"] == trial_name(name, fields)]
            scores.append(float(np.mean([line["accuracy"] for line in cell])))
            sizes.append(float(np.mean([line["bytes"] for line in cell])))
            listed.append(
                {
                    "policy": name,
                    "fields": dict(fields),
                    "accuracy": round(scores[-1], 4),
                    "bytes": round(sizes[-1], 4),
                    "attended": round(float(np.mean([line["attended"] for line in cell])), 4),
                    "by_task": {
                        f"{line['task']} at {line['budget']:g}": line["accuracy"] for line in cell
                    },
                }
            )
        chosen[name] = dict(tried[_best(scores, sizes)])
    return {"chosen": chosen, "trials": listed}


def _best(scores: Sequence[float], sizes: Sequence[float]) -> int:
    """Which trial is chosen by the rule of this module.

    Args:
        scores: share of right answers of each trial.
        sizes: share of the full cache's bytes of each.
    """
    # The first of equal ones, so defaults win a tie.
    best = int(np.argmax(scores))
    cheaper = [
        place
        for place, (score, size) in enumerate(zip(scores, sizes, strict=True))
        # Both against the best trial, not against each other.
        if score >= scores[best] - SLACK and size <= sizes[best] - SLACK
    ]
    return min(cheaper, key=lambda place: sizes[place], default=best)


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, and write what was tried and chosen."""
    parser = argparse.ArgumentParser(
        prog="python -m avl_analysis.evaluation.search",
        description="Search every policy's options with equal effort on the tuning split.",
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--scenes", type=int, default=16, help="drawn scenes of each task")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--work", type=Path, help="folder of the parts done so far")
    given = parser.parse_args(arguments)
    settings = FrontierSettings(
        model=given.model,
        tasks=TASKS,
        samples=given.scenes,
        batch=given.scenes,
        budgets=BUDGETS,
        seed=SPLITS["tuning"],
    )
    folder = given.work or given.out.with_name(given.out.name + ".work")
    try:
        lines = run(settings, folder, given.workers, points=trial_points())
    # InputError is a ValueError: a message for the user and no traceback.
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    about = {
        "command": f"python -m avl_analysis.evaluation.search --out {given.out.name}"
        f" --model {given.model} --scenes {given.scenes}",
        "split": "tuning",
        "scenes": given.scenes,
        "tasks": list(TASKS),
        "budgets": list(BUDGETS),
        "rule": "most right answers, mean over tasks and budgets; fewer bytes where as many are"
        " right, to two points; of equal trials the first",
        "questions": "every question has a picture of its own",
    }
    write_text(given.out, json.dumps({"about": about, **choose(lines)}, indent=1) + "\n")
    print(f"{given.out}: {sum(map(len, TRIALS.values()))} trials of {len(TRIALS)} policies")


if __name__ == "__main__":
    main()
