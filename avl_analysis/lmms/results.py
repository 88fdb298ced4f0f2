"""Result files of lmms-eval as one table: a row per policy, scores beside bytes, keys and times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from avl_analysis.errors import InputError

COSTS = {
    "avg_avl_kv_bytes_share": "bytes / full cache",
    "avg_avl_keys_read_share": "keys read per step",
    "avg_avl_ttft_seconds": "TTFT (s)",
    "avg_avl_tpot_seconds": "TPOT (s)",
}
"""Entry of `throughput`, where lmms-eval puts "avg_" in front -> column of the table."""


def read_result(path: Path) -> dict[str, Any]:
    """One result file, with what the policy cost.

    Raises:
        InputError: no such file, not a result of lmms-eval, or made without a counted policy.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a result file of lmms-eval: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise InputError(f"{path} is not a result file of lmms-eval: it has no 'results'")
    if "avg_avl_questions" not in content.get("throughput", {}):
        raise InputError(
            f"{path} was not made by one of this project's models (--model avl_...), so bytes and"
            " keys were not counted"
        )
    return content


def newest_result(folder: Path) -> Path | None:
    """The result file that lmms-eval wrote last below a folder; None if there is none."""
    files = sorted(folder.rglob("*_results.json"), key=lambda path: path.stat().st_mtime)
    return files[-1] if files else None


def table(results: Mapping[str, Path], reference: str | None = None) -> pd.DataFrame:
    """Scores and costs of several policies on the same tasks.

    Args:
        results: policy -> its result file.
        reference: policy whose scores the others are divided by, in columns named "... kept"; None
            for no such columns.

    Returns:
        A row per policy; a column per task and metric, then the costs.

    Raises:
        InputError: a file that is none, or files of different tasks or numbers of questions.
    """
    rows = {}
    for policy, path in results.items():
        content = read_result(path)
        costs = content["throughput"]
        measured = {name: costs[key] for key, name in COSTS.items() if key in costs}
        rows[policy] = _scores(content) | {
            "questions": int(costs["avg_avl_questions"]),
            **measured,
        }
    frame = pd.DataFrame.from_dict(rows, orient="index")
    scores = [column for column in frame.columns if column not in ("questions", *COSTS.values())]
    # A score that one file lacks is NaN in its row: the files are of different tasks.
    if frame[[*scores, "questions"]].isna().any(axis=None) or frame["questions"].nunique() > 1:
        raise InputError("the result files are of different tasks or numbers of questions")
    for column in scores if reference is not None else []:
        frame[f"{column} kept"] = frame[column] / frame.loc[reference, column]
    return frame


def _scores(content: Mapping[str, Any]) -> dict[str, float]:
    """Score by "task metric", leaving out standard errors and what is not a number."""
    return {
        # lmms-eval names a metric with its filter behind a comma.
        f"{task} {metric.split(',')[0]}": float(value)
        for task, metrics in content["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, (int, float))
        # True and False are integers to isinstance.
        and not isinstance(value, bool)
        and "stderr" not in metric
        and metric not in ("alias", "samples")
    }
