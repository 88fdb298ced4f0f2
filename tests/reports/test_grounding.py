"""The figure of localisation heads: chosen on some pictures, scored on others."""

from __future__ import annotations

import numpy as np
import pytest

from avl_analysis import load_model, scene_samples
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.heads.grounding import choose_heads, ground
from avl_reports import fig_grounding
from avl_reports.run import NotMeasured, Run
from tests.reports import made


@pytest.fixture(scope="module")
def run() -> Run:
    samples = scene_samples(6, ["colour", "where"], split="recording")
    return Run(record_samples(load_model("scenes"), samples, max_new_tokens=2, batch_size=6))


def test_heads_are_chosen_and_scored_on_different_pictures(run: Run) -> None:
    choosing, scoring = fig_grounding.halves(run.recording)
    assert not set(choosing) & set(scoring)
    assert len(choosing) == len(scoring) == 6
    section = fig_grounding.section(run)
    heads = choose_heads(run.recording, samples=choosing).heads
    expected = ground(run.recording, {"chosen": heads}, scoring)
    pointing, box = section.figure.panels[1:3]
    assert pointing.bars[0].values[0] == pytest.approx(float(expected["pointing"].mean()))
    assert box.bars[0].values[0] == pytest.approx(float(expected["iou"].mean()))
    assert pointing.rules[0].at == pytest.approx(float(expected["area"].mean()))
    assert [row[0] for row in section.table[1:]] == [f"{layer}.{head}" for layer, head in heads]
    for panel in section.figure.panels[3:]:
        assert panel.boxes[-1].label == "found"
        assert np.nansum(panel.patches.values) == pytest.approx(1.0)


def test_one_picture_or_no_scores_are_not_measured(run: Run) -> None:
    one = record_samples(
        load_model("scenes"), scene_samples(1, ["colour"], split="recording"), max_new_tokens=1
    )
    with pytest.raises(NotMeasured, match="chosen on some pictures"):
        fig_grounding.section(Run(one))
    with pytest.raises(NotMeasured, match="no image scores of the last prompt row"):
        fig_grounding.section(Run(made.recording()))
