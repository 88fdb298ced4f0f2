"""Answers worked out from a prompt's own words and a scene's list of objects, by brute force.

Knows nothing of how questions are made: it reads the English, keeps every object that fits each
word, and insists that exactly one is left.
"""

from __future__ import annotations

import re

from avl_analysis.scenes import Scene, Thing
from avl_analysis.scenes.drawing import COLOURS, SHAPES
from avl_analysis.scenes.world import PLACES, SIZES

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]
STEPS = {"left of": -1, "right of": 1, "above": -3, "below": 3}


def _words(text: str, choices: tuple[str, ...]) -> list[str]:
    return [c for c in choices if re.search(rf"\b{c}(s|es)?\b", text)]


def _fitting(scene: Scene, text: str) -> list[Thing]:
    """Objects that fit every colour, shape, size and place the text names."""
    left = list(scene.things)
    for attribute, choices in (
        ("colour", COLOURS),
        ("shape", SHAPES),
        ("size", SIZES),
        ("place", PLACES),
    ):
        for word in _words(text, choices):
            left = [thing for thing in left if getattr(thing, attribute) == word]
    return left


def _one(things: list[Thing]) -> Thing:
    assert len(things) == 1, f"{len(things)} objects fit where one should"
    return things[0]


def _name(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape}"


def _neighbour(scene: Scene, text: str) -> Thing:
    direction, reference = re.search(
        r"directly (left of|right of|above|below) the (.*)", text
    ).groups()
    cell = _one(_fitting(scene, reference)).cell
    target = cell + STEPS[direction]
    if direction in ("left of", "right of"):
        assert target // 3 == cell // 3, "a neighbour across the board's edge"
    return _one([thing for thing in scene.things if thing.cell == target])


def answer(scene: Scene, task: str, prompt: str) -> str:
    """The right answer to a prompt of the given task."""
    text = (
        prompt.lower()
        .replace("color", "colour")
        .replace("is the object big or small", "")
        .strip("?.")
    )
    if task in ("size",):
        text = text.replace("big or small", "").replace("how big", "")
    if task in ("colour", "shape", "size"):
        return getattr(_one(_fitting(scene, text)), task)
    if task == "where":
        return _one(_fitting(scene, text)).place
    if task == "count":
        return NUMBERS[len(_fitting(scene, text))]
    if task == "exist":
        return "yes" if _fitting(scene, text) else "no"
    if task == "relation":
        return _name(_neighbour(scene, text))
    if task == "what":
        found = _fitting(scene, text)
        return _name(_one(found)) if found else "nothing"
    if task == "caption":
        parts = {thing.cell: f"{_name(thing)} at {thing.place}" for thing in scene.things}
        if scene.text:
            article = "an" if scene.text.colour == "orange" else "a"
            parts[scene.text.cell] = (
                f"{article} {scene.text.colour} text {scene.text.string} at {scene.text.place}"
            )
        return ", ".join(parts[cell] for cell in sorted(parts))
    assert scene.text is not None
    if task == "character":
        return scene.text.string[0 if "first" in text else -1]
    return {"text_colour": scene.text.colour, "ocr": scene.text.string}[task]
