"""Scores of texts, against answers one can check by eye."""

import math

import pytest

from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.scoring import common_prefix, correct, normalised, rouge_l
from avl_analysis.scenes import evaluate


def _sample(*answers: str, strict: bool = False) -> Sample:
    return Sample("s", (), "?", answers or None, strict=strict)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("A cat.", 1), ("the  CAT", 1), ("cat!", 1), ("two cats", 0), ("", 0), ("catalogue", 0)],
)
def test_a_lenient_answer_ignores_case_punctuation_and_articles(text: str, expected: int) -> None:
    assert correct(text, _sample("dog", "cat")) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("top left", 1), ("top  left.", 1), ("Top left", 0), ("the top left", 0)]
)
def test_a_strict_answer_is_scored_as_the_model_is_evaluated(text: str, expected: int) -> None:
    assert correct(text, _sample("top left", strict=True)) == expected
    assert evaluate.exact_match(text, "top left") == bool(expected)


def test_an_unknown_answer_gives_no_score() -> None:
    assert math.isnan(correct("anything", _sample()))


def test_normalising_keeps_words_apart() -> None:
    assert normalised("It's a well-known Theory, the one.") == [
        "it",
        "s",
        "well",
        "known",
        "theory",
        "one",
    ]


def test_rouge_l_of_worked_pairs() -> None:
    assert rouge_l("", "") == rouge_l("a b", "a b") == 1
    assert rouge_l("", "a b") == 0
    assert rouge_l("the cat sat", "the dog sat") == pytest.approx(
        2 / 3
    )  # "the ... sat", precision = recall = 2/3
    assert rouge_l("sat cat the", "the cat sat") == pytest.approx(1 / 3)
    assert rouge_l("a b c d", "a b") == pytest.approx(2 * (2 / 4) * 1 / (2 / 4 + 1))


def test_rouge_l_does_not_call_other_scripts_unlike() -> None:
    assert rouge_l("红色的圆", "红色的方") == pytest.approx(3 / 4)


def test_common_prefix_counts_tokens_before_the_first_difference() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0
