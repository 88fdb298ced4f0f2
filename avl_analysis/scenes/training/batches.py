"""Training batches: one picture, many conversations about it, packed into rows.

A picture is encoded once; some twenty short conversations ("branches") and the caption follow it as
alternatives. They are laid into ``ROWS_PER_PICTURE`` rows of ``ROW`` tokens, several to a row. Each
branch sees the prefix (system text, picture) and its own past, nothing else, and counts its
positions from the end of the prefix, so each is exactly the sequence a user's prompt makes. About
one branch in six is a conversation of two to four turns.

Labels for the picture itself are made here too: for every image token the colour, the look (shape
and size, or text) and the character on it, from the scene's truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from avl_analysis.scenes import questions, world
from avl_analysis.scenes.drawing import CELL, CHARACTERS, COLOURS, GRID, PATCH, SHAPES
from avl_analysis.scenes.language import (
    ASSISTANT,
    BOS,
    EOS,
    IMAGE,
    IMAGE_TOKENS,
    SYSTEM,
    USER,
    build_tokenizer,
    pixel_values,
)
from avl_analysis.scenes.world import COLUMNS, ROWS, SIZES, Scene

ROW = 72
ROWS_PER_PICTURE = 5
SPELLED_ROW, SPELLED_ROWS_PER_PICTURE = 288, 2
"""The same where answers are spelled letter by letter; no caption is longer."""
MULTI_TURN = 0.17
CAPTION_WEIGHT = 0.5
LOOKS = tuple(f"{size} {shape}" for size in SIZES for shape in SHAPES)

FIRST_MIX = {
    "colour": 1.4,
    "shape": 1.4,
    "count": 1.0,
    "exist": 1.2,
    "where": 1.6,
    "what": 1.2,
    "relation": 0.9,
    "size": 0.9,
    "text_colour": 0.3,
    "character": 0.7,
    "ocr": 0.7,
}
"""How often each task is asked at first (the caption is always asked once)."""
LAST_MIX = FIRST_MIX | {
    "colour": 1.0,
    "shape": 1.0,
    "count": 2.0,
    "exist": 1.4,
    "relation": 1.8,
    "size": 0.7,
}
"""... and once objects are found reliably: relations and counts come last."""
FINAL_MIX = LAST_MIX | {"count": 6.0, "exist": 4.0, "character": 1.0, "ocr": 1.0}
"""... and at the very end, when little but counting and existence is still wrong."""
BY_SHAPE = ("colour", "colour", "where", "where", "size", "exist", "count")
"""Tasks of the questions that find an object by its shape."""

_TOKENIZER = build_tokenizer()
_USER, _ASSISTANT, _EOS = (
    _TOKENIZER.convert_tokens_to_ids(token) for token in (USER, ASSISTANT, EOS)
)


@lru_cache(maxsize=100_000)
def _word(word: str) -> tuple[int, ...]:
    return tuple(_TOKENIZER(word, add_special_tokens=False).input_ids)


def encode(text: str) -> list[int]:
    """Token ids of a text; word by word, which the tokenizer's splitting at spaces makes exact."""
    return [i for word in text.split() for i in _word(word)]


def spell(text: str) -> list[int]:
    """Token ids of a text in single letters, each word with the mark of its beginning in front."""
    letters = [letter for word in text.split() for letter in f"▁{word}"]
    return [int(i) for i in _TOKENIZER.convert_tokens_to_ids(letters)]


def prefix_ids() -> list[int]:
    """Ids of everything up to and including the picture, as the chat template makes them."""
    start, image = _TOKENIZER.convert_tokens_to_ids([BOS, IMAGE])
    return [start, *encode(SYSTEM), _USER, *[image] * IMAGE_TOKENS]


PREFIX = len(prefix_ids())

WORD_GROUPS: dict[str, tuple[int, ...]] = {
    "colour": tuple(_word(word)[0] for word in COLOURS),
    "shape": tuple(_word(word)[0] for word in SHAPES),
    "size": tuple(_word(word)[0] for word in SIZES),
    "row": tuple(_word(word)[0] for word in ROWS),
    "column": tuple(_word(word)[0] for word in COLUMNS),
    # The last piece: a single character may be split into the mark of a word's beginning and
    # itself.
    "character": tuple(_word(character)[-1] for character in CHARACTERS),
}
"""Ids of the words that can be true of an image token, by group."""


@dataclass(frozen=True)
class Branch:
    """One conversation about the picture.

    Ids, the positions whose next token is scored, the task of each turn.
    """

    ids: tuple[int, ...]
    scored: tuple[int, ...]
    turns: tuple[str, ...]


@dataclass
class Batch:
    """Packed training data for ``pictures`` pictures; shapes in tokens."""

    pixels: torch.Tensor  # (B, 3, 96, 96) float32
    ids: torch.Tensor  # (B, R, L) int64
    offsets: torch.Tensor  # (B, R, L) int64, position after the prefix
    branch: torch.Tensor  # (B, R, L) int64, number of the branch within its row, -1 for padding
    scored: torch.Tensor  # (N,) int64, flat positions in B*R*L whose next token is scored
    targets: torch.Tensor  # (N,) int64
    weights: torch.Tensor  # (N,) float32
    owner: torch.Tensor  # (N,) int64, index into `tasks`
    tasks: tuple[str, ...]  # the task of each branch; "" where it has several turns
    patches: dict[
        str, torch.Tensor
    ]  # word group -> (B, 144) int64, index within the group, -1 where nothing is


def branch(turns: list[questions.Question], spelled: bool = False) -> Branch:
    """The tokens of a conversation after the picture; answers and their end marks are scored.

    ``spelled`` cuts the words of answers into letters.
    """
    ids: list[int] = []
    scored: list[int] = []
    for number, question in enumerate(turns):
        # The prefix ends with the user's mark and the picture, so the first turn brings none of its
        # own.
        ids += [*([_USER] if number else []), *encode(question.prompt), _ASSISTANT]
        answer = [*(spell if spelled else encode)(question.answer), _EOS]
        # Each position is scored on the token after it: the mark before the answer on its first
        # token, and the last token of the answer on the end mark.
        scored += range(len(ids) - 1, len(ids) - 1 + len(answer))
        ids += answer
    return Branch(tuple(ids), tuple(scored), tuple(question.task for question in turns))


def _by_shape(rng: np.random.Generator, scene: Scene, spelled: bool) -> Branch | None:
    """A question that finds its object by shape and never by colour or place.

    None after a few tries.
    """
    for _ in range(8):
        question = questions.ask(rng, scene, BY_SHAPE[int(rng.integers(len(BY_SHAPE)))])
        # Compared below by how a word begins, so that plurals count as shapes too.
        words = question.prompt.strip("?.").split() if question else []
        if question and not set(words) & set(COLOURS) and any(w.startswith(SHAPES) for w in words):
            return branch([question], spelled)
    return None


def _turns(
    rng: np.random.Generator,
    scene: Scene,
    tasks: tuple[str, ...],
    odds: NDArray[np.float64],
    spelled: bool,
) -> Branch | None:
    count = int(rng.integers(2, 5)) if rng.random() < MULTI_TURN else 1
    asked: dict[str, questions.Question] = {}
    for task in rng.choice(len(tasks), size=count, p=odds):
        question = questions.ask(rng, scene, tasks[task])
        if question:
            # By prompt, so that a conversation does not ask the same thing twice.
            asked[question.prompt] = question
    return branch(list(asked.values()), spelled) if asked else None


def lay(
    rng: np.random.Generator,
    scene: Scene,
    mix: dict[str, float],
    by_shape: float = 0.0,
    spelled: bool = False,
) -> list[list[Branch]]:
    """Rows of branches for one scene: the caption first, then questions for as long as they fit.

    Args:
        rng: source of the questions.
        scene: what is asked about.
        mix: task -> odds of being asked.
        by_shape: share of questions that must find their object by its shape alone.
        spelled: whether the words of answers are cut into letters.
    """
    count, length = _rows(spelled)
    tasks, odds = tuple(mix), np.array(list(mix.values()))
    odds = odds / odds.sum()
    rows: list[list[Branch]] = [[] for _ in range(count)]
    room = [length] * count
    caption = questions.ask(rng, scene, "caption")
    extra = questions.ask(rng, scene, tasks[int(rng.integers(len(tasks)))])
    assert caption is not None
    first = branch([caption], spelled)
    if extra and rng.random() < 0.3:
        both = branch([caption, extra] if rng.random() < 0.5 else [extra, caption], spelled)
        # A branch cannot be split over rows.
        first = both if len(both.ids) <= length else first
    rows[0].append(first)
    room[0] -= len(first.ids)
    misses = 0
    while misses < 3:
        one = _by_shape(rng, scene, spelled) if rng.random() < by_shape else None
        one = one or _turns(rng, scene, tasks, odds, spelled)
        fitting = [i for i in range(count) if one and len(one.ids) <= room[i]]
        if one is None or not fitting:
            misses += 1
            continue
        # The fullest row that still has room, which keeps the others free for longer conversations.
        best = min(fitting, key=lambda i: room[i])
        rows[best].append(one)
        room[best] -= len(one.ids)
    return rows


def _rows(spelled: bool) -> tuple[int, int]:
    """Rows per picture, and their tokens."""
    return (SPELLED_ROWS_PER_PICTURE, SPELLED_ROW) if spelled else (ROWS_PER_PICTURE, ROW)


def patch_labels(scene: Scene) -> dict[str, NDArray[np.int64]]:
    """What is on each image token, by word group: index within the group, -1 where nothing is.

    A token that two things touch (two characters, mostly) gets the one that covers more of it;
    objects never meet.
    """
    labels = {
        group: np.full(GRID * GRID, -1, dtype=np.int64)
        for group in ("colour", "shape", "size", "character")
    }
    for thing in scene.things:
        at = list(thing.patches)
        labels["colour"][at] = COLOURS.index(thing.colour)
        labels["shape"][at] = SHAPES.index(thing.shape)
        labels["size"][at] = SIZES.index(thing.size)
    if scene.text:
        labels["colour"][list(scene.text.patches)] = COLOURS.index(scene.text.colour)
        most = np.zeros(GRID * GRID)
        for character in scene.text.characters:
            for patch in character.patches:
                left = PATCH * (patch % GRID)
                # All characters stand on one line, so the width they share with a token decides.
                shared = min(character.box[2], left + PATCH) - max(character.box[0], left)
                if shared > most[patch]:
                    most[patch] = shared
                    labels["character"][patch] = CHARACTERS.index(character.character)
    every = np.arange(GRID * GRID)
    # Token -> its row or column in the grid -> pixel -> row or column of the 3x3 board.
    labels["row"], labels["column"] = every // GRID * PATCH // CELL, every % GRID * PATCH // CELL
    return labels


def pack(scenes: list[Scene], laid: list[list[list[Branch]]], spelled: bool = False) -> Batch:
    """Arrays for scenes and their rows of branches; ``spelled`` as they were laid."""
    count, length = _rows(spelled)
    shape = (len(scenes), count, length)
    # Each (pictures, rows, tokens). Padding has the branch number -1, so no branch sees it, and
    # none of its positions is scored.
    ids, offsets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    number = np.full(shape, -1, dtype=np.int64)
    scored: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    owner: list[int] = []
    tasks: list[str] = []
    for b, rows in enumerate(laid):
        for r, row in enumerate(rows):
            at = 0
            for n, one in enumerate(row):
                end = at + len(one.ids)
                ids[b, r, at:end], offsets[b, r, at:end], number[b, r, at:end] = (
                    one.ids,
                    range(len(one.ids)),
                    n,
                )
                # Where the branch begins when (pictures, rows, tokens) is one axis.
                flat = (b * count + r) * length + at
                scored += [flat + position for position in one.scored]
                targets += [one.ids[position + 1] for position in one.scored]
                weights += [CAPTION_WEIGHT if "caption" in one.turns else 1.0] * len(one.scored)
                owner += [len(tasks)] * len(one.scored)
                # Exact match is counted by task, which a conversation about several tasks has none
                # of.
                tasks.append(one.turns[0] if len(one.turns) == 1 else "")
                at = end
    labels = [patch_labels(scene) for scene in scenes]
    return Batch(
        pixel_values(np.stack([scene.image for scene in scenes])),
        torch.from_numpy(ids),
        torch.from_numpy(offsets),
        torch.from_numpy(number),
        torch.tensor(scored),
        torch.tensor(targets),
        torch.tensor(weights),
        torch.tensor(owner),
        tuple(tasks),
        {
            group: torch.from_numpy(np.stack([label[group] for label in labels]))
            for group in WORD_GROUPS
        },
    )


def make(
    rng: np.random.Generator,
    pictures: int,
    mix: dict[str, float],
    most: int = 6,
    by_shape: float = 0.0,
    spelled: bool = False,
) -> Batch:
    """A batch of fresh scenes.

    Args:
        rng: source of scenes and questions.
        pictures: how many scenes.
        mix: task -> odds of being asked.
        most: objects of a scene at most.
        by_shape: share of questions that must find their object by its shape alone.
        spelled: whether the words of answers are cut into letters.
    """
    scenes = [world.draw(rng, most) for _ in range(pictures)]
    laid = [lay(rng, scene, mix, by_shape, spelled) for scene in scenes]
    return pack(scenes, laid, spelled)
