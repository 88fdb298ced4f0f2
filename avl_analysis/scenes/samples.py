"""Samples: a drawn scene, one question about it, and the truth, all from a seed.

``generate(seed, index)`` is the only source of pictures in this package: the same two numbers give
the same sample on every machine. Training draws from its own seeds (``TRAINING_SEED`` and up);
whatever is asked with the small seeds people type was therefore never trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from avl_analysis.scenes import questions, world
from avl_analysis.scenes.questions import TASKS, Question

TRAINING_SEED = 1_000_000
"""Seeds from here on belong to training; everything below is held out."""


@dataclass(frozen=True, eq=False)
class Sample:
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


def generate(seed: int, index: int = 0, task: str | None = None) -> Sample:
    """The sample with this seed and index; ``task`` (one of ``TASKS``) is drawn too when it is
    None.

    Raises ValueError for an unknown task or a negative number.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed={seed}, index={index}: both must be 0 or more")
    rng = np.random.default_rng([seed, index])
    chosen = task or TASKS[int(rng.integers(len(TASKS)))]
    while True:
        scene = world.draw(rng)
        for _ in range(4):
            question = questions.ask(rng, scene, chosen)
            if question is not None:
                return Sample(seed, index, scene, question)


def samples(n: int, task: str | None = None, seed: int = 0) -> list[Sample]:
    """``n`` samples with indices 0 to n-1 of one seed, all of one task or (None) of tasks drawn at
    random.
    """
    return [generate(seed, index, task) for index in range(n)]
