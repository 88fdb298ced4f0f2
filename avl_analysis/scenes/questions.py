"""Kinds of question about a drawn scene, each with one right answer.

Twelve tasks are what the embedded model was trained and evaluated on (`TASKS`). A thirteenth,
`story`, is made of them for measuring cache policies (`LONG_TASKS`): its answers are as long as the
model can give.

Every maker takes a random generator and a scene and returns a ``Question`` or None where the scene
does not allow one (no string to read, nothing next to anything). A question names an object only by
words that fit that object alone, so its answer is unique by construction. Wording varies: several
phrasings each, with and without capital or full stop.

Note: "object" means a shape, never the string. "Directly left of" means the neighbouring
cell of the 3x3 board. Asked what is at a place where nothing is, the right answer is "nothing";
cells a string touches are never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from avl_analysis.scenes.drawing import COLOURS, SHAPES
from avl_analysis.scenes.world import PLACES, SIZES, Box, Scene, Text, Thing

T = TypeVar("T")

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

PHRASINGS: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is the {0}?",
        "Which colour does the {0} have?",
        "Tell me the colour of the {0}.",
        "What is the colour of the {0}?",
    ),
    "shape": (
        "What shape is the {0}?",
        "Which shape does the {0} have?",
        "Tell me the shape of the {0}.",
        "What is the shape of the {0}?",
    ),
    "count": (
        "How many {0} are there?",
        "Count the {0}.",
        "How many {0} do you see?",
        "What is the number of {0}?",
        "How many {0} are in the picture?",
    ),
    "exist": (
        "Is there {0}?",
        "Do you see {0}?",
        "Can you see {0}?",
        "Is there {0} in the picture?",
    ),
    "where": (
        "Where is the {0}?",
        "Where do you see the {0}?",
        "Find the {0}.",
        "At which place is the {0}?",
    ),
    "what": (
        "What is at {0}?",
        "What do you see at {0}?",
        "Which object is at {0}?",
        "Name the object at {0}.",
    ),
    "relation": (
        "What is directly {0} the {1}?",
        "Which object is directly {0} the {1}?",
        "What do you see directly {0} the {1}?",
        "Name the object directly {0} the {1}.",
    ),
    "size": (
        "What size is the {0}?",
        "How big is the {0}?",
        "Is the {0} big or small?",
        "Tell me the size of the {0}.",
    ),
    "text_colour": (
        "What colour is the text?",
        "Which colour does the text have?",
        "Tell me the colour of the text.",
        "What is the colour of the text?",
    ),
    "character": (
        "What is the {0} character of the text?",
        "Which character comes {0} in the text?",
        "Tell me the {0} character of the text.",
        "Read the {0} character.",
    ),
    "ocr": (
        "What does the text say?",
        "Read the text.",
        "What is written in the picture?",
        "Tell me the text.",
    ),
    "caption": (
        "Describe the picture.",
        "What do you see in the picture?",
        "Name all you see.",
        "Caption the picture.",
    ),
}
TASKS = tuple(PHRASINGS)
LONG_TASKS = ("story",)
"""Tasks beyond `TASKS` that only comparisons of policies ask.

`story`: describe a picture of six objects and a string of at least four characters, one object
after the other. Its answers have 60 or 61 tokens with the end mark, the longest that the embedded
model was trained to give; what is drawn and asked otherwise is as for `caption`.
"""
ALL_TASKS = (*TASKS, *LONG_TASKS)
STORY_OBJECTS, STORY_CHARACTERS = 6, 4
"""What a picture of the task `story` must show at least."""


@dataclass(frozen=True)
class Question:
    """One question and its answer.

    ``kind`` splits a task where the answer's prior differs (which things are counted, say).
    ``boxes`` and ``patches`` are what one has to look at: pixel boxes, and the image tokens (0-143)
    under them, in reading order.
    """

    task: str
    kind: str
    prompt: str
    answer: str
    boxes: tuple[Box, ...]
    patches: tuple[int, ...]


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """The plural of a noun of the scenes."""
    return noun + ("es" if noun.endswith("s") else "s")


def name(thing: Thing) -> str:
    """An object's full name, as answers and captions give it: "a big red circle"."""
    return a(f"{thing.size} {thing.colour} {thing.shape}")


def caption(scene: Scene) -> str:
    """Everything in the scene in reading order, by cell."""
    parts = [(thing.cell, f"{name(thing)} at {thing.place}") for thing in scene.things]
    if scene.text:
        parts.append(
            (
                scene.text.cell,
                f"{a(scene.text.colour)} text {scene.text.string} at {scene.text.place}",
            )
        )
    return ", ".join(part for _, part in sorted(parts))


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _say(rng: np.random.Generator, task: str, *fillers: str) -> str:
    """A phrasing of the task.

    Now and then without its capital or final mark, or in American spelling.
    """
    text: str = _pick(rng, PHRASINGS[task]).format(*fillers)
    capital, mark, spelling = rng.random(3)
    text = text[0].lower() + text[1:] if capital < 0.3 else text
    text = text[:-1] if mark < 0.15 else text
    return text.replace("colour", "color") if spelling < 0.15 else text


def _about(task: str, kind: str, prompt: str, answer: str, *parts: Thing | Text) -> Question:
    patches = sorted({patch for part in parts for patch in part.patches})
    return Question(task, kind, prompt, answer, tuple(part.box for part in parts), tuple(patches))


def _refer(
    rng: np.random.Generator, scene: Scene, thing: Thing, hide: str, places: bool = True
) -> str | None:
    """Words that fit this object alone and do not give away its ``hide`` attribute.

    None where there are none.
    """
    fitting = []
    for known in (
        ("shape",),
        ("colour",),
        ("colour", "shape"),
        ("size", "shape"),
        ("size", "colour"),
    ):
        # Objects that these attributes fit; the words are used only if they fit one.
        same = [
            other
            for other in scene.things
            if all(getattr(other, k) == getattr(thing, k) for k in known)
        ]
        if hide not in known and len(same) == 1:
            words = [getattr(thing, k) for k in ("size", "colour") if k in known]
            fitting.append(" ".join([*words, thing.shape if "shape" in known else "object"]))
    if places and (not fitting or rng.random() < 0.15):
        return f"object at {thing.place}"
    return _pick(rng, fitting) if fitting else None


def _attribute(task: str) -> Callable[[np.random.Generator, Scene], Question | None]:
    def make(rng: np.random.Generator, scene: Scene) -> Question | None:
        thing = _pick(rng, scene.things)
        reference = _refer(rng, scene, thing, task)
        if reference is None:
            return None
        return _about(task, task, _say(rng, task, reference), getattr(thing, task), thing)

    return make


def _where(rng: np.random.Generator, scene: Scene) -> Question | None:
    thing = _pick(rng, scene.things)
    reference = _refer(rng, scene, thing, "place", places=False)
    return (
        _about("where", "where", _say(rng, "where", reference), thing.place, thing)
        if reference
        else None
    )


def _count(rng: np.random.Generator, scene: Scene) -> Question:
    kind, present = _pick(rng, ("all", "colour", "colour", "shape", "shape")), rng.random() < 0.8
    noun, counted = "object", list(scene.things)
    if kind != "all":
        values = (
            [getattr(thing, kind) for thing in scene.things]
            if present
            else (COLOURS if kind == "colour" else SHAPES)
        )
        value = _pick(rng, values)
        noun = f"{value} object" if kind == "colour" else value
        counted = [thing for thing in scene.things if getattr(thing, kind) == value]
    return _about(
        "count", f"count {kind}", _say(rng, "count", plural(noun)), NUMBERS[len(counted)], *counted
    )


def _absent(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """A (colour, shape) pair that is not in the scene.

    Three times of four both colour and shape are, apart.
    """
    there = {(thing.colour, thing.shape) for thing in scene.things}
    apart = [
        (c, s) for c in {c for c, _ in there} for s in {s for _, s in there} if (c, s) not in there
    ]
    if apart and rng.random() < 0.75:
        # Sorted, since the order of a set of strings differs between runs of Python.
        return _pick(rng, sorted(apart))
    while True:
        pair = (_pick(rng, COLOURS), _pick(rng, SHAPES))
        if pair not in there:
            return pair


def _exist(rng: np.random.Generator, scene: Scene) -> Question | None:
    kind, yes = _pick(rng, ("pair", "pair", "pair", "pair", "colour", "shape")), rng.random() < 0.5
    if kind == "pair":
        thing = _pick(rng, scene.things)
        colour, shape = (thing.colour, thing.shape) if yes else _absent(rng, scene)
        found, noun = (
            [t for t in scene.things if (t.colour, t.shape) == (colour, shape)],
            f"{colour} {shape}",
        )
    else:
        there = sorted({getattr(thing, kind) for thing in scene.things})
        value = _pick(
            rng,
            there
            if yes
            else [v for v in (COLOURS if kind == "colour" else SHAPES) if v not in there],
        )
        found = [thing for thing in scene.things if getattr(thing, kind) == value]
        noun = f"{value} object" if kind == "colour" else value
    return _about(
        "exist", f"exist {kind}", _say(rng, "exist", a(noun)), "yes" if yes else "no", *found
    )


def _what(rng: np.random.Generator, scene: Scene) -> Question | None:
    empty = scene.empty_cells()
    if rng.random() < 0.2 and empty:
        return _about("what", "what", _say(rng, "what", PLACES[_pick(rng, empty)]), "nothing")
    thing = _pick(rng, scene.things)
    return _about("what", "what", _say(rng, "what", thing.place), name(thing), thing)


def _relation(rng: np.random.Generator, scene: Scene) -> Question | None:
    at = {thing.cell: thing for thing in scene.things}
    pairs = []
    for thing in scene.things:
        for word, (down, right) in DIRECTIONS.items():
            row, column = thing.cell // 3 + down, thing.cell % 3 + right
            # Row and column are checked apart, or a step to the right of the last column would lead
            # into the next row.
            if 0 <= row < 3 and 0 <= column < 3 and row * 3 + column in at:
                pairs.append((thing, word, at[row * 3 + column]))
    if not pairs:
        return None
    thing, word, neighbour = _pick(rng, pairs)
    reference = _refer(rng, scene, thing, "place", places=False)
    if reference is None:
        return None
    return _about(
        "relation",
        "relation",
        _say(rng, "relation", word, reference),
        name(neighbour),
        neighbour,
        thing,
    )


def _text_colour(rng: np.random.Generator, scene: Scene) -> Question | None:
    text = scene.text
    return (
        _about("text_colour", "text_colour", _say(rng, "text_colour"), text.colour, text)
        if text
        else None
    )


def _character(rng: np.random.Generator, scene: Scene) -> Question | None:
    if scene.text is None:
        return None
    word, index = _pick(rng, (("first", 0), ("last", -1)))
    one = scene.text.characters[index]
    return Question(
        "character", word, _say(rng, "character", word), one.character, (one.box,), one.patches
    )


def _ocr(rng: np.random.Generator, scene: Scene) -> Question | None:
    return (
        _about("ocr", "ocr", _say(rng, "ocr"), scene.text.string, scene.text)
        if scene.text
        else None
    )


def _caption(rng: np.random.Generator, scene: Scene) -> Question:
    parts: list[Thing | Text] = [*scene.things, *([scene.text] if scene.text else [])]
    return _about(
        "caption",
        "caption",
        _say(rng, "caption"),
        caption(scene),
        *sorted(parts, key=lambda p: p.cell),
    )


def _story(rng: np.random.Generator, scene: Scene) -> Question | None:
    long = scene.text is not None and len(scene.text.string) >= STORY_CHARACTERS
    if not long or len(scene.things) < STORY_OBJECTS:
        return None
    return replace(_caption(rng, scene), task="story", kind="story")


_MAKERS: dict[str, Callable[[np.random.Generator, Scene], Question | None]] = {
    "colour": _attribute("colour"),
    "shape": _attribute("shape"),
    "count": _count,
    "exist": _exist,
    "where": _where,
    "what": _what,
    "relation": _relation,
    "size": _attribute("size"),
    "text_colour": _text_colour,
    "character": _character,
    "ocr": _ocr,
    "caption": _caption,
    "story": _story,
}


def ask(rng: np.random.Generator, scene: Scene, task: str) -> Question | None:
    """A question of the given task about the scene.

    None where the draw or the scene allows none.
    """
    return _MAKERS[task](rng, scene)


def vocabulary() -> tuple[str, ...]:
    """Every word that questions and answers are made of, plurals aside, in a fixed order."""
    answers = [
        *COLOURS,
        *SHAPES,
        *SIZES,
        *" ".join(PLACES).split(),
        *NUMBERS,
        *["yes", "no", "nothing", "a", "an", "text", "at", "first", "last"],
    ]
    words = dict.fromkeys([*answers, "object", "color", *" ".join(DIRECTIONS).split()])
    for phrasing in (p for phrasings in PHRASINGS.values() for p in phrasings):
        for word in (
            phrasing.replace("{0}", "")
            .replace("{1}", "")
            .translate(str.maketrans("?.", "  "))
            .split()
        ):
            words[word] = words[word[0].lower() + word[1:]] = None
    return tuple(words)
