"""Verdicts follow from intervals and stated thresholds alone."""

import math

import pytest

from avl_analysis.intervals import Estimate
from avl_reports.findings import Finding, Verdict, judge, judge_all, judge_within

NAN = math.nan


@pytest.mark.parametrize(
    ("low", "high", "side", "verdict"),
    [
        (0.6, 0.8, "at least", Verdict.SUPPORTED),
        (0.5, 0.8, "at least", Verdict.SUPPORTED),
        (0.4, 0.8, "at least", Verdict.UNDECIDED),
        (0.2, 0.4, "at least", Verdict.NOT_SUPPORTED),
        (0.2, 0.5, "at least", Verdict.UNDECIDED),
        (0.2, 0.4, "at most", Verdict.SUPPORTED),
        (0.2, 0.5, "at most", Verdict.SUPPORTED),
        (0.2, 0.6, "at most", Verdict.UNDECIDED),
        (0.6, 0.8, "at most", Verdict.NOT_SUPPORTED),
        (NAN, NAN, "at least", Verdict.UNDECIDED),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(low, high, side, verdict):
    assert judge(Estimate((low + high) / 2, low, high, 9), side, 0.5) is verdict


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("side", ["at least", "at most"])
def test_an_interval_without_width_decides_nothing(value, side):
    assert judge(Estimate(value, value, value, 6), side, 0.0) is Verdict.UNDECIDED
    assert judge(Estimate(value, value, value, 6), side, 0.5) is Verdict.UNDECIDED


def test_a_number_within_bounds_needs_the_whole_interval_there():
    assert judge_within(Estimate(0.0, -0.5, 0.5, 9), 1.0) is Verdict.SUPPORTED
    assert judge_within(Estimate(0.0, -1.5, 0.5, 9), 1.0) is Verdict.UNDECIDED
    assert judge_within(Estimate(-2.0, -2.5, -1.5, 9), 1.0) is Verdict.NOT_SUPPORTED


def test_several_statements_hold_together_if_each_does():
    yes, no, open_ = Verdict.SUPPORTED, Verdict.NOT_SUPPORTED, Verdict.UNDECIDED
    assert judge_all([yes, yes]) is yes
    assert judge_all([yes, open_]) is open_
    assert judge_all([yes, open_, no]) is no
    assert judge_all([]) is open_


def test_a_finding_says_number_rule_and_verdict():
    text = Finding("Choice", "Measured 3.", "at least 2", Verdict.SUPPORTED).text
    assert text == "Measured 3. Choice: supported (at least 2)."
