"""Which words of an answer are right, which are wrong, and what each should have been about.

A word here is what one generated token says. The answer's words are aligned with those of the
right answer by the fewest insertions, deletions and substitutions (Levenshtein 1966). An aligned
pair of equal words is right; a word that stands in the place of another is wrong, and its region is
that of the word it replaces; a word that was inserted is neither, because nothing says what should
have stood there. Two things must be known of a recorded sample: the words of its answer and those
of the right one (`words` and `truth_words`, which `record_samples` notes for samples with known
answers).

Words after the first wrong one are judged like all others, though the model wrote them on a wrong
beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from avl_analysis import scenes
from avl_analysis.corpus.regions import Region, boxes_of, on_tokens, word_regions
from avl_analysis.recordings.image_tokens import ImageTokens
from avl_analysis.scenes.drawing import CHARACTERS, COLOURS, SHAPES
from avl_analysis.scenes.questions import NUMBERS
from avl_analysis.scenes.world import COLUMNS, ROWS, SIZES

FILLER = "filler"
"""Kind of the words of a drawn scene's answers that stand in every answer of their form."""
OTHER = "word"
"""Kind of all words of answers whose words are not known."""
_KINDS: Mapping[str, str] = {
    **dict.fromkeys(COLOURS, "colour"),
    **dict.fromkeys(SHAPES, "shape"),
    **dict.fromkeys(SIZES, "size"),
    **dict.fromkeys((*ROWS, *COLUMNS), "place"),
    **dict.fromkeys(NUMBERS, "number"),
    **dict.fromkeys(CHARACTERS, "character"),
    **dict.fromkeys(("yes", "no", "nothing"), "yes or no"),
}


@dataclass(frozen=True)
class JudgedWord:
    """One word of an answer.

    Attributes:
        step: number of the token that says it, 0 for the first.
        word: what it says.
        right: whether it is what the right answer says there; None where that is not known.
        truth: the word of the right answer in its place, "" where there is none.
        kind: of the word that belongs there: for drawn scenes "colour", "shape", "size", "place",
            "number", "character", "yes or no" or `FILLER`; else `OTHER`.
        region: image tokens that the word that belongs there is about, () where unknown.
    """

    step: int
    word: str
    right: bool | None
    truth: str = ""
    kind: str = OTHER
    region: tuple[int, ...] = ()


def judge_words(facts: Mapping[str, Any], image: ImageTokens | None = None) -> list[JudgedWord]:
    """Every word of a recorded sample's answer that says something.

    Empty where the words of the right answer are not known.

    Args:
        facts: what was annotated on the sample.
        image: the tokens of its one image; without them no word has a region.
    """
    words = [str(word).strip() for word in facts.get("words", ())]
    truth = [str(word).strip() for word in facts.get("truth_words", ())]
    if not words or not truth:
        return []
    regions = _regions(facts, truth, image)
    drawn = facts.get("scene") is not None
    judged = []
    # place: index into the words of the right answer.
    for step, place in enumerate(align(words, truth)):
        word = words[step]
        if not word:
            continue
        if place is None:
            judged.append(JudgedWord(step, word, None))
            continue
        kind = _KINDS.get(truth[place], FILLER) if drawn else OTHER
        region = regions[place].tokens if regions else ()
        judged.append(
            JudgedWord(step, word, word == truth[place], truth[place], kind, tuple(region))
        )
    return judged


def align(words: Sequence[str], truth: Sequence[str]) -> list[int | None]:
    """For each word the place of the word of `truth` that it stands for, None where inserted.

    Among alignments of equal cost, the one that pairs words latest in both texts is taken.
    """
    rows, columns = len(words) + 1, len(truth) + 1
    # cost[i, j]: fewest edits that turn the first i words into the first j words of the truth.
    cost = np.zeros((rows, columns), int)
    cost[:, 0], cost[0] = np.arange(rows), np.arange(columns)
    for i in range(1, rows):
        for j in range(1, columns):
            unequal = words[i - 1] != truth[j - 1]
            cost[i, j] = min(cost[i - 1, j - 1] + unequal, cost[i - 1, j] + 1, cost[i, j - 1] + 1)
    places: list[int | None] = [None] * len(words)
    i, j = len(words), len(truth)
    # Back from the end; a pair is preferred to a gap of equal cost, which pairs words as late as
    # possible. Words left over at the beginning are insertions.
    while i and j:
        if cost[i, j] == cost[i - 1, j - 1] + (words[i - 1] != truth[j - 1]):
            i, j = i - 1, j - 1
            places[i] = j
        elif cost[i, j] == cost[i - 1, j] + 1:
            i -= 1
        else:
            j -= 1
    return places


def _regions(
    facts: Mapping[str, Any], truth: Sequence[str], image: ImageTokens | None
) -> list[Region]:
    """What each word of the right answer is about; empty where nothing is known."""
    if scene := facts.get("scene"):
        drawn = scenes.generate(int(scene["seed"]), int(scene["index"]), scene["task"])
        return [on_tokens(region, image) for region in word_regions(drawn, truth)]
    tokens = tuple(int(token) for token in facts.get("region_tokens", ()))
    return [Region(boxes_of(facts.get("boxes", ())), tokens) for _ in truth] if tokens else []
