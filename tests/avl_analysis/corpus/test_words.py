"""Which words of an answer are right: worked answers, and alignment against trying everything."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from avl_analysis import scenes
from avl_analysis.corpus.words import FILLER, OTHER, align, judge_words
from avl_analysis.figures import Patches
from avl_analysis.recordings.image_tokens import ImageTokens
from avl_analysis.scenes.drawing import COLOURS

GRID = ImageTokens(
    np.arange(144), np.arange(144), Patches.grid(np.zeros((12, 12))).boxes, np.zeros(144, int)
)


def pieces(text: str) -> list[str]:
    return text.replace(",", " ,").split()


def facts(sample: scenes.SceneSample, words: list[str], truth: list[str]) -> dict[str, object]:
    return {
        "words": words,
        "truth_words": truth,
        "answer": " ".join(words),
        "scene": {"seed": sample.seed, "index": sample.index, "task": sample.task},
    }


def least_cost(words: str, truth: str) -> int:
    """Fewest changes, by trying all."""

    @cache
    def cost(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(
            cost(i - 1, j - 1) + (words[i - 1] != truth[j - 1]),
            cost(i - 1, j) + 1,
            cost(i, j - 1) + 1,
        )

    return cost(len(words), len(truth))


def test_an_alignment_keeps_order_and_costs_the_least_there_is() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        words, truth = ("".join(rng.choice(list("abc"), rng.integers(0, 7))) for _ in range(2))
        places = align(list(words), list(truth))
        paired = [(word, place) for word, place in enumerate(places) if place is not None]
        assert [place for _, place in paired] == sorted({place for _, place in paired})
        changed = sum(words[word] != truth[place] for word, place in paired)
        cost = changed + (len(words) - len(paired)) + (len(truth) - len(paired))
        assert cost == least_cost(words, truth)


@pytest.mark.parametrize(
    ("words", "truth", "places"),
    [
        ("a small red ring", "a big red ring", [0, 1, 2, 3]),
        ("a ring", "a big red ring", [0, 3]),
        ("a very big red ring", "a big red ring", [0, None, 1, 2, 3]),
        ("ring", "", [None]),
    ],
)
def test_words_stand_for_those_in_their_place(
    words: str, truth: str, places: list[int | None]
) -> None:
    assert align(words.split(), truth.split()) == places


def test_a_wrong_word_of_a_caption_is_about_the_object_it_misnames() -> None:
    sample = scenes.generate(1, 5, "caption")
    truth = pieces(sample.answer)
    second = truth.index(",") + 1
    words = list(truth)
    at = next(place for place in range(second, len(truth)) if truth[place] in COLOURS)
    words[at] = "white" if truth[at] != "white" else "black"
    judged = judge_words(facts(sample, words, truth), GRID)
    assert [word.right for word in judged] == [place != at for place in range(len(truth))]
    described = sorted(
        [*sample.scene.things, *([sample.scene.text] if sample.scene.text else [])],
        key=lambda part: part.cell,
    )
    assert judged[at].region == described[1].patches
    assert (judged[at].kind, judged[at].truth, judged[0].kind) == ("colour", truth[at], FILLER)


def test_an_inserted_word_is_neither_right_nor_wrong_and_empty_pieces_say_nothing() -> None:
    sample = scenes.generate(1, 0, "ocr")
    truth = ["", *sample.answer]
    words = ["", *sample.answer, "Q"]
    judged = judge_words(facts(sample, words, truth), GRID)
    assert [word.right for word in judged] == [True] * len(sample.answer) + [None]
    assert [word.step for word in judged] == list(range(1, len(words)))
    characters = sample.scene.text.characters  # type: ignore[union-attr]
    assert [word.region for word in judged[:-1]] == [one.patches for one in characters]


def test_without_the_words_of_the_truth_nothing_is_judged() -> None:
    assert judge_words({"words": ["red"], "truth": "red"}) == []
    (word,) = judge_words({"words": ["red"], "truth_words": ["red"], "region_tokens": [3, 4]})
    assert (word.right, word.kind, word.region) == (True, OTHER, (3, 4))
