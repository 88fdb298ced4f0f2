"""Samples: a drawn scene, one question about it, and the truth, all from a seed.

``generate(seed, index)`` is the only source of pictures in this package: the same two numbers give
the same sample on every machine. Training draws from its own seeds (``TRAINING_SEED`` and up);
whatever is asked with the small seeds people type was therefore never trained on.

What is measured must not be asked about the questions something was chosen by. Every use of drawn
scenes therefore has a split of its own (``SPLITS``), a range of seeds that no other use draws from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from avl_analysis.scenes import questions, world
from avl_analysis.scenes.questions import ALL_TASKS, TASKS, Question

TRAINING_SEED = 1_000_000
"""Seeds from here on belong to training; everything below is held out."""
SPLIT_WIDTH = 10_000
"""Seeds in a split; every task draws from one of them, the split's first plus the task's place."""
SPLITS: Mapping[str, int] = MappingProxyType(
    {
        "model": 700_000,  # how well the shipped model answers (`scenes.evaluate`)
        "tuning": 800_000,  # presets and options of policies were chosen by these
        "calibration": 820_000,  # `avl calibrate` chooses settings by these
        "verification": 830_000,  # ... and checks them with these
        "comparison": 840_000,  # `avl compare`, `avl frontier`: nothing is chosen by these
        "heads": 850_000,  # `avl ablate` tells kinds of heads apart by these
        "ablation": 860_000,  # ... and silences them on these
        "recording": 870_000,  # the dashboard's recordings of many scenes
        "watch": 900_000,  # progress of training the shipped model
        "watch-large": 910_000,  # ... and of the larger one
    }
)
"""Split -> its first seed. A split is named after what its questions decide or show."""


def split_of(seed: int) -> str:
    """The name of the split a seed belongs to.

    "training" from `TRAINING_SEED` on, "" for seeds that belong to none.
    """
    if seed >= TRAINING_SEED:
        return "training"
    names = [name for name, first in SPLITS.items() if first <= seed < first + SPLIT_WIDTH]
    return names[0] if names else ""


@dataclass(frozen=True, eq=False)
class SceneSample:
    """A scene with one question about it."""

    seed: int
    index: int
    scene: world.Scene
    question: Question

    @property
    def image(self) -> NDArray[np.uint8]:
        """The picture: uint8 (96, 96, 3)."""
        return self.scene.image

    @property
    def picture(self) -> Image.Image:
        """The picture as a PIL image, RGB, 96x96."""
        return Image.fromarray(self.scene.image)

    @property
    def task(self) -> str:
        return self.question.task

    @property
    def prompt(self) -> str:
        return self.question.prompt

    @property
    def answer(self) -> str:
        return self.question.answer

    @property
    def boxes(self) -> tuple[world.Box, ...]:
        """Pixel boxes (left, top, right, bottom; half-open) of what the question is about."""
        return self.question.boxes

    @property
    def patches(self) -> tuple[int, ...]:
        """Image tokens (0-143, reading order) of what the question is about."""
        return self.question.patches


def generate(seed: int, index: int = 0, task: str | None = None) -> SceneSample:
    """The sample with this seed and index.

    ``task`` (one of ``ALL_TASKS``) is drawn too, from ``TASKS``, when it is None.

    Raises ValueError for an unknown task or a negative number.
    """
    if task is not None and task not in ALL_TASKS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(ALL_TASKS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed={seed}, index={index}: both must be 0 or more")
    rng = np.random.default_rng([seed, index])
    chosen = task or TASKS[int(rng.integers(len(TASKS)))]
    # Some scenes do not allow some questions. After four tries a new scene is drawn, from the same
    # generator, so that a seed and index still give the same sample everywhere.
    while True:
        scene = world.draw(rng)
        for _ in range(4):
            question = questions.ask(rng, scene, chosen)
            if question is not None:
                return SceneSample(seed, index, scene, question)


def samples(n: int, task: str | None = None, seed: int = 0) -> list[SceneSample]:
    """``n`` samples with indices 0 to n-1 of one seed.

    All of one task, or (None) of tasks drawn at random.
    """
    return [generate(seed, index, task) for index in range(n)]
