"""How well one text agrees with another.

Right or wrong against the truth, alike or not against the full cache's text.

All scores are of one sample, in [0, 1] or in tokens, higher = better, and know neither models nor
policies.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from avl_analysis.corpus.questions import Sample

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def correct(text: str, sample: Sample) -> float:
    """1.0 if the text is one of the sample's answers, 0.0 if not.

    NaN where the answer is not known.

    Strict samples must agree word for word (spaces and a final full stop aside); otherwise both
    sides are normalised.
    """
    if sample.answers is None:
        return float("nan")
    plain = _words if sample.strict else normalised
    return float(plain(text) in [plain(answer) for answer in sample.answers])


def normalised(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles.

    The usual rule of question answering (SQuAD; Rajpurkar et al., 2016), with punctuation read as a
    space.
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _words(text: str) -> list[str]:
    return text.strip().removesuffix(".").split()


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L F-measure (Lin, 2004) on words, without stemming.

    Equal texts score 1, empty ones included.

    The package keeps only the letters a-z and digits of a text. A pair of which nothing is left
    (other scripts) is scored on characters in their place, by the same formula.
    """
    if text == reference:
        return 1.0
    score = _scorer().score(reference, text)["rougeL"].fmeasure
    if score == 0.0 and not re.search(r"[a-z0-9]", (text + reference).lower()):
        score = _scorer(characters=True).score(reference, text)["rougeL"].fmeasure
    return float(score)


def common_prefix(tokens: Sequence[int], reference: Sequence[int]) -> int:
    """Number of tokens before the first difference."""
    for index, (one, other) in enumerate(zip(tokens, reference, strict=False)):
        if one != other:
            return index
    return min(len(tokens), len(reference))


class _Characters:
    """A tokenizer in the form rouge_score takes one."""

    def tokenize(self, text: str) -> list[str]:
        return [character for character in text if not character.isspace()]


@lru_cache(maxsize=2)
def _scorer(characters: bool = False) -> RougeScorer:
    # It imports nltk with all its parts, which only those who score texts should wait for.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Characters() if characters else None)
