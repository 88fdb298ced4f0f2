"""The figure of sinks among image tokens: what it draws and what its verdicts follow from."""

from __future__ import annotations

import numpy as np
import pytest

from avl_analysis.heads.sinks import mass_on_sinks
from avl_reports import fig_sink_tokens
from avl_reports.findings import Verdict
from avl_reports.run import Run
from tests.reports import made


def test_lines_are_means_over_questions_with_and_without_sinks() -> None:
    study = made.sinks()
    figure = fig_sink_tokens.section(Run(made.recording(), further={"sinks": study})).figure
    lines = {line.name: line for line in figure.panels[0].lines}  # type: ignore[union-attr]
    total = study["image_mass"].mean("sample")
    np.testing.assert_allclose(lines["all image tokens"].y, total)
    left = total - mass_on_sinks(study, "concentration").mean("sample")
    np.testing.assert_allclose(lines["without concentrated ones"].y, left)
    assert "without drained ones" not in lines  # there are none
    assert lines["without concentrated ones"].y[1] == pytest.approx(0.8 - 0.8 * 0.5)


def test_verdicts_follow_from_what_hiding_costs_and_from_where_sinks_went() -> None:
    spared, born = fig_sink_tokens.findings(made.sinks())
    assert (spared.verdict, born.verdict) == (Verdict.SUPPORTED, Verdict.SUPPORTED)
    other = made.sinks()
    other["log_prob_change"].loc[{"condition": "sinks hidden"}] -= 1.0
    other["followed"], other["stayed"] = other["stayed"], other["followed"]
    spared, born = fig_sink_tokens.findings(other)
    assert (spared.verdict, born.verdict) == (Verdict.NOT_SUPPORTED, Verdict.NOT_SUPPORTED)
    few = fig_sink_tokens.findings(made.sinks().isel(sample=[0, 1]))
    assert [finding.verdict for finding in few] == [Verdict.UNDECIDED] * 2


def test_the_sentence_says_where_sinks_lie() -> None:
    said = fig_sink_tokens.sentence(made.sinks())
    assert "massive in no dimension" in said
    assert "1.0 image tokens of a question are sinks" in said
    assert "by layer: 1: 0 %" in said
    assert "of all image tokens 50 % do" in said
