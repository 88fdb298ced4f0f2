"""The embedded model.

A small LLaVA trained from scratch on drawn scenes, and the scenes themselves.

A trained vision-language model that ships with the package, so that attention can be looked at
without a download, and pictures whose truth is known to the pixel, so that what attention looks at
can be checked. ``generate`` and ``samples`` give pictures with question, answer, boxes and covered
image tokens, ``moving`` short videos of a moving shape; ``MODEL_DIR`` is a folder like any
downloaded model's, loaded by plain ``from_pretrained``. ``python -m
avl_analysis.scenes.training.train`` makes the weights, ``python -m avl_analysis.scenes.evaluate``
measures them; README.md beside this file says how they were made and what they reach.
``exact_match`` and ``evaluate`` live in ``avl_analysis.scenes.evaluate``.

Importing this package loads neither torch nor transformers.
"""

from pathlib import Path

from avl_analysis.scenes.moving import MovingScene, moving
from avl_analysis.scenes.questions import ALL_TASKS, LONG_TASKS, TASKS, Question
from avl_analysis.scenes.samples import SceneSample, generate, samples
from avl_analysis.scenes.world import PLACES, Character, Scene, Text, Thing

MODEL_DIR = Path(__file__).parent / "model"
"""Folder with the shipped weights, tokenizer and processor."""

__all__ = [
    "ALL_TASKS",
    "LONG_TASKS",
    "MODEL_DIR",
    "PLACES",
    "TASKS",
    "Character",
    "MovingScene",
    "Question",
    "SceneSample",
    "Scene",
    "Text",
    "Thing",
    "generate",
    "moving",
    "samples",
]
