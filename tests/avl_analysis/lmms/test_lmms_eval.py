"""lmms-eval itself, with policies: the same scores and bytes as `compare`; `make test-eval`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import avl
from avl_analysis import compare, load_model, scene_samples
from avl_analysis.cli.main import main
from tests import tiny

pytest.importorskip("lmms_eval", reason="lmms-eval lives in an environment of its own")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TASKS = ["what", "relation"]


def _evaluate(out: Path, *arguments: str) -> pd.DataFrame:
    with pytest.raises(SystemExit) as done:
        main(["eval", *arguments, "--device", "cpu", "--out", str(out)])
    assert not done.value.code
    return pd.read_csv(out / "table.csv", index_col="policy")


def test_scores_and_bytes_equal_those_of_compare_on_the_same_questions(tmp_path: Path) -> None:
    table = _evaluate(
        tmp_path / "out",
        "scenes",
        "--wrapper",
        "llava_hf",
        "--scenes",
        "3",
        "--task",
        TASKS[0],
        "--task",
        TASKS[1],
        "--max-new-tokens",
        "12",
        "-p",
        "a-vl",
        "-p",
        "random:0.25",
    )
    policies = {"a-vl": avl.AdaptivePolicy(), "random:0.25": avl.RandomPolicy(budget=0.25)}
    measured = compare(
        load_model("scenes"),
        scene_samples(3, TASKS),
        policies,
        max_new_tokens=12,
        batch_size=1,
        metrics=["accuracy", "cost"],
    )
    for name in policies:
        row = measured.dataset.sel(policy=name)
        assert table.loc[name, "avl_scenes correct"] == pytest.approx(float(row["correct"].mean()))
        share = float(row["kv_filled"].sum() / row["kv_full"].sum())
        assert table.loc[name, "bytes / full cache"] == pytest.approx(share)


def test_a_policy_that_raises_ends_with_one_line_and_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save_folder(tmp_path / "model", tiny.llava())
    with pytest.raises(SystemExit) as done:
        main(
            [
                "eval",
                str(folder),
                "--wrapper",
                "llava_hf",
                "--scenes",
                "1",
                "--task",
                "what",
                "-p",
                "a-vl,prefill=0.5,prefill_layer=99",
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "out"),
            ]
        )
    assert done.value.code == 2
    assert "lmms-eval failed with policy" in " ".join(capsys.readouterr().err.split())
