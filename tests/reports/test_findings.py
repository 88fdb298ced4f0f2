"""Verdicts follow from intervals and stated thresholds alone."""

import math

import pytest

from avl_reports.findings import Finding, Interval, Verdict, judge

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
    assert judge(Interval((low + high) / 2, low, high), side, 0.5) is verdict


def test_an_interval_in_words_carries_its_ends_and_unit():
    assert Interval(0.614, 0.58, 0.64).words() == "0.61 [0.58, 0.64]"
    assert Interval(0.614, 0.58, 0.64).words("%") == "61 % [58, 64]"
    assert Interval(3.0, 2.5, 3.5).words("times", 1) == "3.0 times [2.5, 3.5]"
    assert Interval(3.0, NAN, NAN).words("times") == "3.00 times (no interval)"
    assert Interval(NAN, NAN, NAN).words() == "(not measured)"


def test_a_finding_says_number_rule_and_verdict():
    text = Finding("Choice", "Measured 3.", "at least 2", Verdict.SUPPORTED).text
    assert text == "Measured 3. Choice: supported (at least 2)."
