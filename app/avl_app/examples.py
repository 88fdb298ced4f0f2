"""The example pictures: drawn scenes with the questions whose right answers are known.

One picture of the embedded generator carries several questions, so a visitor can stay with a
picture and ask about its colours, its text or all of it.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache

import numpy as np

from avl_analysis import scenes
from avl_analysis.scenes import MovingScene, SceneSample
from avl_analysis.scenes.questions import vocabulary
from avl_app.pictures import Picture, picture, video

EMBEDDED = "scenes"
"""Name of the model that ships with the package."""
SEED = 4_242
"""Held-out scenes of this seed are the examples."""
SCENES = 1000
"""How many of them can be reached."""
TASK_NAMES = {
    "caption": "describe everything",
    "ocr": "read the text",
    "colour": "colour of an object",
    "shape": "shape of an object",
    "count": "count objects",
    "exist": "is it there?",
    "where": "where is it?",
    "what": "what is at a place?",
    "relation": "what is next to it?",
    "size": "big or small?",
    "text_colour": "colour of the text",
    "character": "first or last character",
}
"""Kinds of question in words; tasks without an entry go by their own name."""


@lru_cache(maxsize=64)
def scene_picture(index: int) -> Picture:
    """Example picture `index`."""
    return picture(scenes.generate(SEED, index, "caption").image, f"scene {index}", (SEED, index))


@lru_cache(maxsize=16)
def moving_scene(index: int) -> MovingScene:
    """Example video `index` with the truth about it."""
    return scenes.moving(SEED, index)


@lru_cache(maxsize=16)
def moving_picture(index: int) -> Picture:
    """Example video `index`."""
    return video(moving_scene(index).frames, f"video {index}", (SEED, index))


@lru_cache(maxsize=64)
def questions(index: int) -> dict[str, SceneSample]:
    """The questions that go with example picture `index`, by task.

    Tasks that need another picture are left out.
    """
    # The generator may draw another scene for another task from the same numbers.
    shown = scene_picture(index).pixels
    asked = {task: scenes.generate(SEED, index, task) for task in ("caption", *scenes.TASKS)}
    return {task: sample for task, sample in asked.items() if np.array_equal(sample.image, shown)}


@lru_cache(maxsize=1)
def suggestions() -> dict[str, str]:
    """A question of each kind that the embedded model was trained on, by task."""
    return {
        task: scenes.generate(SEED, 0, task).prompt for task in ("caption", "ocr", *scenes.TASKS)
    }


@lru_cache(maxsize=1)
def about_model() -> str:
    """What the embedded model is, in one sentence, from its own configuration."""
    config = json.loads((scenes.MODEL_DIR / "config.json").read_text("utf-8"))
    layers = config["text_config"]["num_hidden_layers"]
    words = len({word.lower() for word in vocabulary()})
    return (
        f"A small model of {layers} layers, trained here on drawn scenes alone: it knows shapes,"
        f" colours, places and printed text, and {words} words."
    )


def unknown_words(prompt: str) -> list[str]:
    """The words of a question that the embedded model was never trained on, each once."""
    known = set(vocabulary())
    # runs of letters: no digits, no underscores
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", prompt))
    # plurals are spelt as the word and its ending
    return [w for w in words if not {w, w.removesuffix("s"), w.removesuffix("es")} & known]


def asked_scene(shown: Picture, prompt: str) -> SceneSample | None:
    """The question with its truth, if image and prompt are those of an example."""
    if shown.scene is None:
        return None
    return next(
        (sample for sample in questions(shown.scene[1]).values() if sample.prompt == prompt), None
    )
