"""Procedural text for the decoder: described scenes with questions, chains with copies, repeats.

Every row begins with ``<s>``, some with the system text and the user's mark after it, and is filled
to its length; the loss is on all of its tokens. The three kinds:

* scenes: the objects of a drawn scene as text in random order, then questions about it with their
  answers. The decoder learns to look up, count and compare before it sees a picture;
* chains: tokens of a fixed random Markov chain in which some tokens demand a copy of the token
  before them (the bigram-backcopy task of Guo et al., "Active-dormant attention heads", 2024). A
  head that copies has something to do at few tokens and nothing at most;
* repeats: a random passage and the same passage again, once to three times.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avl_analysis.scenes import questions, world
from avl_analysis.scenes.questions import TASKS, a, name
from avl_analysis.scenes.training.large.language import (
    ASSISTANT_ID,
    EOS_ID,
    IMAGE_TOKENS,
    OPENING,
    TOKENIZER,
    USER_ID,
    encode,
)
from avl_analysis.scenes.world import Scene

KINDS = {"scene": 0.6, "chain": 0.2, "repeat": 0.2}
FIRST_WORD = 7  # after the special tokens
_CHAIN_SEED = 77
_FOLLOWERS = 4
_TRIGGERS = 8


def _chain() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Followers of each token (vocabulary, 4), and the tokens that demand a copy."""
    # A seed of its own: the chain must be the same in every row, process and run to be learnable.
    rng = np.random.default_rng(_CHAIN_SEED)
    words = np.arange(FIRST_WORD, len(TOKENIZER))
    return rng.choice(words, (len(TOKENIZER), _FOLLOWERS)), rng.choice(
        words, _TRIGGERS, replace=False
    )


FOLLOWERS_OF, _TRIGGER = _chain()
IS_TRIGGER = np.isin(np.arange(len(TOKENIZER)), _TRIGGER)


def chain(rng: np.random.Generator, length: int) -> list[int]:
    """``length`` tokens of the Markov chain; after a trigger the token before it is repeated."""
    ids = [int(rng.integers(FIRST_WORD, len(TOKENIZER)))]
    picks, triggers = rng.integers(_FOLLOWERS, size=length), rng.random(length)
    while len(ids) < length:
        if len(ids) > 1 and IS_TRIGGER[ids[-1]] and not IS_TRIGGER[ids[-2]]:
            ids.append(ids[-2])
        # One draw in ten gives a trigger. Below 0.1 the same number times 10 is uniform in [0, 1)
        # again and chooses which.
        elif triggers[len(ids)] < 0.1:
            ids.append(int(_TRIGGER[int(triggers[len(ids)] * 10 * _TRIGGERS)]))
        else:
            ids.append(int(FOLLOWERS_OF[ids[-1], picks[len(ids)]]))
    return ids


def repeat(rng: np.random.Generator, length: int) -> list[int]:
    """Random passages of 8 to 40 tokens, each followed by itself one to three times."""
    ids: list[int] = []
    while len(ids) < length:
        passage = rng.integers(FIRST_WORD, len(TOKENIZER), rng.integers(8, 41)).tolist()
        ids += passage * int(rng.integers(2, 5))
    return ids[:length]


def describe(rng: np.random.Generator, scene: Scene) -> str:
    """The scene in words, its objects in random order."""
    parts = [f"{name(thing)} at {thing.place}" for thing in scene.things]
    if scene.text:
        parts.append(f"{a(scene.text.colour)} text {scene.text.string} at {scene.text.place}")
    return ", ".join(parts[i] for i in rng.permutation(len(parts)))


def conversation(rng: np.random.Generator, length: int) -> list[int]:
    """A described scene with questions and answers, at least ``length`` tokens, cut there."""
    scene = world.draw(rng)
    ids = [*encode(describe(rng, scene) + ".")]
    first = True
    while len(ids) < length:
        question = questions.ask(rng, scene, TASKS[int(rng.integers(len(TASKS)))])
        # Captions repeat the description that stands in front of them; most are left out.
        if question is None or (question.task == "caption" and rng.random() < 0.7):
            continue
        ids += [
            *([] if first else [USER_ID]),
            *encode(question.prompt),
            ASSISTANT_ID,
            *encode(question.answer),
            EOS_ID,
        ]
        first = False
    return ids[:length]


@dataclass
class Rows:
    """Rows of text, each (rows, length)."""

    ids: Tensor  # int64
    positions: Tensor  # int64
    weights: Tensor  # float32, weight of the token that follows in the loss

    def to(self, device: torch.device) -> Rows:
        """The same rows on another device."""
        return Rows(self.ids.to(device), self.positions.to(device), self.weights.to(device))


def rows(
    rng: np.random.Generator,
    count: int,
    length: int,
    bare: float = 0.0,
    kinds: dict[str, float] | None = None,
) -> Rows:
    """Rows of text; the loss is on every token.

    In half of the rows with the system text the positions after it jump ahead by up to the length
    of a picture, so that the distances met in conversations about pictures are not new.

    Args:
        rng: source of everything drawn.
        count: number of rows.
        length: tokens per row.
        bare: share of rows that begin with ``<s>`` alone, 0 to 1. Where the system text is in every
            row, its tokens are as constant as ``<s>`` and can share what it would receive.
        kinds: odds of "scene", "chain" and "repeat"; None for ``KINDS``.
    """
    makers = {"scene": conversation, "chain": chain, "repeat": repeat}
    odds = np.array(list((kinds or KINDS).values()))
    drawn = rng.choice(list(kinds or KINDS), size=count, p=odds / odds.sum())
    openings = [OPENING[: 1 if alone else None] for alone in rng.random(count) < bare]
    ids = [
        [*opening, *makers[str(kind)](rng, length - len(opening))]
        for kind, opening in zip(drawn, openings, strict=True)
    ]
    begin = np.array([len(opening) for opening in openings])[:, None]
    # (rows, 1): one jump per row, 0 in half of them. Rows that begin with <s> alone never jump.
    jump = rng.integers(0, IMAGE_TOKENS + 1, (count, 1)) * (rng.random((count, 1)) < 0.5)
    positions = np.arange(length)[None] + jump * (begin > 1) * (np.arange(length) >= begin)
    weights = torch.ones(count, length)
    # The last token has no successor in its row.
    weights[:, -1] = 0.0
    return Rows(torch.tensor(ids), torch.from_numpy(positions), weights)


def answering(ids: Tensor) -> Tensor:
    """Whether the token that follows belongs to an answer, its end mark included (rows, length)."""
    # The running sum is 1 from the answer's mark up to the token before the end mark, each of which
    # is followed by a token of the answer or the end mark.
    marks = torch.where(ids == ASSISTANT_ID, 1, torch.where(ids == EOS_ID, -1, 0))
    return marks.cumsum(-1) > 0
