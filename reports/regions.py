"""What part of the picture each word of an answer is about, where the truth is known.

For drawn scenes: the object whose part of a caption is being written, the character being read, or else what the
question asks about. Only a right answer has regions, because a wrong word is about nothing in particular.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from avl_analysis.figures import Box
from avl_analysis.scenes import Sample


@dataclass(frozen=True)
class Region:
    """A part of a picture: pixel boxes and the image tokens under them."""

    boxes: tuple[Box, ...] = ()
    tokens: tuple[int, ...] = ()


def word_regions(sample: Sample, words: Sequence[str]) -> list[Region]:
    """The region of each word of a right answer; `words` are the texts of the produced tokens."""
    text = sample.scene.text
    if sample.task == "caption":
        return _caption_regions(sample, words)
    spelled = [word.strip() for word in words if word.strip()]
    about = Region(boxes_of(sample.boxes), tuple(map(int, sample.patches)))
    if sample.task == "ocr" and text is not None and spelled == list(text.string):
        letters = iter(text.characters)
        return [_part(next(letters)) if word.strip() else about for word in words]
    return [about for _ in words]


def boxes_of(boxes: Any) -> tuple[Box, ...]:
    """Boxes from lists of left, top, right, bottom and perhaps a name."""
    edges = [([float(edge) for edge in box[:4]], str(box[4]) if len(box) > 4 else "") for box in boxes]
    return tuple(Box(left, top, right, bottom, label) for (left, top, right, bottom), label in edges)


def _caption_regions(sample: Sample, words: Sequence[str]) -> list[Region]:
    """A caption names what is in the scene in reading order, a comma after each part."""
    parts: list[Any] = [*sample.scene.things, *([sample.scene.text] if sample.scene.text else [])]
    parts.sort(key=lambda part: part.cell)
    regions, number = [], 0
    for word in words:
        regions.append(_part(parts[min(number, len(parts) - 1)]))
        number += "," in word
    return regions


def _part(part: Any) -> Region:
    return Region(boxes_of([part.box]), tuple(int(patch) for patch in part.patches))
