"""Packed conversations about pictures.

As ``batches``, with the larger model's tokens and a loss on every token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from avl_analysis.scenes import questions
from avl_analysis.scenes.questions import Question
from avl_analysis.scenes.training.large.language import ASSISTANT_ID, EOS_ID, USER_ID, encode
from avl_analysis.scenes.world import Scene

ROW = 120
ROWS_PER_PICTURE = 4
MULTI_TURN = 0.17
QUESTION_WEIGHT = 0.1
"""Weight of a question's tokens in the loss; answers have 1. Most questions cannot be foretold."""
CAPTION_WEIGHT = 0.5
MIX = {
    "colour": 1.2,
    "shape": 1.2,
    "count": 1.4,
    "exist": 1.4,
    "where": 1.4,
    "what": 1.2,
    "relation": 1.2,
    "size": 0.8,
    "text_colour": 0.3,
    "character": 0.7,
    "ocr": 0.7,
}
"""How often each task is asked (the caption is always asked once)."""


@dataclass
class TuningBatch:
    """Packed conversations about B pictures; shapes in tokens."""

    ids: Tensor  # (B, R, L) int64
    offsets: Tensor  # (B, R, L) int64, position after the prefix
    branch: Tensor  # (B, R, L) int64, number of the branch within its row, -1 for padding
    weights: Tensor  # (B, R, L) float32, weight of the token that follows, 0 at the end of a branch
    answering: Tensor  # (B, R, L) bool, whether the token's successor belongs to an answer
    spans: list[
        tuple[str, int, int, int, int]
    ]  # task, picture, row, first and last answering position

    def to(self, device: torch.device) -> TuningBatch:
        """The same batch on another device."""
        return replace(
            self,
            ids=self.ids.to(device),
            offsets=self.offsets.to(device),
            branch=self.branch.to(device),
            weights=self.weights.to(device),
            answering=self.answering.to(device),
        )


def tokens(turns: list[Question]) -> tuple[list[int], list[bool]]:
    """Ids of a conversation after the image.

    And which of them are followed by a token of an answer.
    """
    ids: list[int] = []
    answering: list[bool] = []
    for number, question in enumerate(turns):
        ask = [*([USER_ID] if number else []), *encode(question.prompt), ASSISTANT_ID]
        answer = [*encode(question.answer), EOS_ID]
        ids += ask + answer
        # The last token of the question is followed by an answer's first, the end mark by no
        # answer.
        answering += [False] * (len(ask) - 1) + [True] * len(answer) + [False]
    return ids, answering


def _lay(
    rng: np.random.Generator, scene: Scene, mix: dict[str, float]
) -> list[list[list[Question]]]:
    """Rows of conversations about one scene: the caption, then questions as long as they fit."""
    tasks, odds = tuple(mix), np.array(list(mix.values()))
    rows: list[list[list[Question]]] = [[] for _ in range(ROWS_PER_PICTURE)]
    room = [ROW] * ROWS_PER_PICTURE
    caption = questions.ask(rng, scene, "caption")
    assert caption is not None
    waiting, misses = [caption], 0
    while misses < 3:
        turns = waiting
        if not turns:
            count = int(rng.integers(2, 4)) if rng.random() < MULTI_TURN else 1
            drawn = (
                questions.ask(rng, scene, tasks[i])
                for i in rng.choice(len(tasks), count, p=odds / odds.sum())
            )
            # By prompt, so that no conversation asks the same thing twice.
            turns = list({q.prompt: q for q in drawn if q}.values())
        size = len(tokens(turns)[0])
        fitting = [i for i in range(ROWS_PER_PICTURE) if size <= room[i]]
        waiting = []
        if not turns or not fitting:
            misses += 1
            continue
        # The fullest row that still has room.
        row = min(fitting, key=lambda i: room[i])
        rows[row].append(turns)
        room[row] -= size
    return rows


def make(
    rng: np.random.Generator, scenes: list[Scene], mix: dict[str, float] | None = None
) -> TuningBatch:
    """A batch of conversations about scenes.

    Args:
        rng: source of the questions.
        scenes: what is asked about.
        mix: task -> odds of being asked; None for ``MIX``.
    """
    shape = (len(scenes), ROWS_PER_PICTURE, ROW)
    ids, offsets, branch = (
        np.zeros(shape, np.int64),
        np.zeros(shape, np.int64),
        np.full(shape, -1, np.int64),
    )
    weights, answering = np.zeros(shape, np.float32), np.zeros(shape, bool)
    spans: list[tuple[str, int, int, int, int]] = []
    for b, scene in enumerate(scenes):
        for r, row in enumerate(_lay(rng, scene, mix or MIX)):
            at = 0
            for number, turns in enumerate(row):
                words, answers = tokens(turns)
                end = at + len(words)
                ids[b, r, at:end], offsets[b, r, at:end], branch[b, r, at:end] = (
                    words,
                    range(len(words)),
                    number,
                )
                answering[b, r, at:end] = answers
                full = CAPTION_WEIGHT if turns[0].task == "caption" else 1.0
                # The last token of a branch has no successor of its own: the next token begins
                # another branch.
                weights[b, r, at : end - 1] = np.where(answers[:-1], full, QUESTION_WEIGHT)
                # Exact match is counted by task, so conversations of several turns have no span.
                if len(turns) == 1:
                    places = np.flatnonzero(answers) + at
                    spans.append((turns[0].task, b, r, int(places[0]), int(places[-1])))
                at = end
    return TuningBatch(
        torch.from_numpy(ids),
        torch.from_numpy(offsets),
        torch.from_numpy(branch),
        torch.from_numpy(weights),
        torch.from_numpy(answering),
        spans,
    )
