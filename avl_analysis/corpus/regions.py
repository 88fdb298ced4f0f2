"""What part of the picture each word of an answer is about, where that is known.

For drawn scenes: the object whose part of a caption is being written, the character being read, or
else what the question asks about. For a person's own pictures: the boxes given with the question,
for every word. Only a right answer has regions, because a wrong word is about nothing in
particular; where the right answer is not known, the boxes count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from avl_analysis import scenes
from avl_analysis.corpus.scoring import normalised
from avl_analysis.figures import Box, Patches
from avl_analysis.recordings.image_tokens import ImageTokens, images_of
from avl_analysis.recordings.recording import Recording
from avl_analysis.scenes.drawing import GRID, SIDE


@dataclass(frozen=True)
class Region:
    """A part of a picture: pixel boxes and the image tokens under them."""

    boxes: tuple[Box, ...] = ()
    tokens: tuple[int, ...] = ()


def regions_of(facts: Mapping[str, Any], image: ImageTokens | None = None) -> list[Region]:
    """The region of each word of a recorded sample; empty where nothing is known.

    Args:
        facts: what was annotated on the sample.
        image: the tokens of its one image. Regions of drawn scenes are known in pixels; without
            the places of the model's tokens they name no tokens.
    """
    words, answer = [str(word) for word in facts.get("words", ())], str(facts.get("answer", ""))
    answers = [str(text) for text in facts.get("answers") or [facts.get("truth") or ""] if text]
    if scene := facts.get("scene"):
        # Only a right answer names what it looks at; of a wrong one no word has a known region.
        if answer.strip() not in [text.strip() for text in answers]:
            return []
        drawn = scenes.generate(int(scene["seed"]), int(scene["index"]), scene["task"])
        return [on_tokens(region, image) for region in word_regions(drawn, words)]
    tokens = tuple(int(token) for token in facts.get("region_tokens", ()))
    if not tokens or (answers and normalised(answer) not in [normalised(text) for text in answers]):
        return []
    return [Region(boxes_of(facts.get("boxes", ())), tokens) for _ in words]


def question_region(facts: Mapping[str, Any], image: ImageTokens | None = None) -> Region:
    """What a recorded sample's question is about, whatever was answered; empty where unknown.

    Args:
        facts: what was annotated on the sample.
        image: the tokens of its one image, as in `regions_of`.
    """
    if scene := facts.get("scene"):
        drawn = scenes.generate(int(scene["seed"]), int(scene["index"]), scene["task"])
        return on_tokens(Region(boxes_of(drawn.boxes), tuple(map(int, drawn.patches))), image)
    tokens = tuple(int(token) for token in facts.get("region_tokens", ()))
    return Region(boxes_of(facts.get("boxes", ())), tokens)


def recorded_regions(recording: Recording) -> dict[str, dict[int, tuple[int, ...]]]:
    """`localisation.Regions` of all samples of a recording: sample -> step -> image tokens."""
    found: dict[str, dict[int, tuple[int, ...]]] = {}
    for name in recording.samples:
        regions = regions_of(recording.facts(name), only_image(recording, name))
        if known := {step: region.tokens for step, region in enumerate(regions) if region.tokens}:
            found[name] = known
    return found


def only_image(recording: Recording, sample: str) -> ImageTokens | None:
    """The tokens of a sample's image; None where it has none or several."""
    images = images_of(recording.tokens.sel(sample=sample))
    return images[0] if len(images) == 1 else None


def on_tokens(region: Region, image: ImageTokens | None) -> Region:
    """A region of a drawn scene with the image tokens that lie on it.

    Scenes know which patches of the embedded model's grid an object touches. Where a model's tokens
    are that grid, these are the tokens; for other models they are the tokens under the region's
    boxes.

    Args:
        region: as `word_regions` gives it.
        image: the tokens of the image that shows the scene; None where nothing is known of them.
    """
    if image is None or not image.placed:
        return replace(region, tokens=())
    grid = Patches.grid(np.zeros((GRID, GRID))).boxes
    # The embedded model's own tokens: the patches known from drawing are exact, boxes are not
    # needed.
    if image.boxes.shape == grid.shape and np.allclose(image.boxes, grid, atol=1e-4):
        return region
    edges = [(b.left, b.top, b.right, b.bottom) for b in region.boxes]
    # Boxes of tokens are fractions of the picture, those of drawn objects pixels.
    return replace(region, tokens=tuple(tokens_in_boxes(image.boxes * SIDE, edges)))


def word_regions(sample: scenes.SceneSample, words: Sequence[str]) -> list[Region]:
    """The region of each word of a right answer, with the patches of the embedded model's grid.

    Args:
        sample: the drawn scene and its question.
        words: texts of the produced tokens.
    """
    text = sample.scene.text
    if sample.task == "caption":
        return _caption_regions(sample, words)
    spelled = [word.strip() for word in words if word.strip()]
    about = Region(boxes_of(sample.boxes), tuple(map(int, sample.patches)))
    if sample.task == "ocr" and text is not None and spelled == list(text.string):
        # One word for each character: compared above with the string's characters.
        letters = iter(text.characters)
        return [_part(next(letters)) if word.strip() else about for word in words]
    return [about for _ in words]


def boxes_of(boxes: Any) -> tuple[Box, ...]:
    """Boxes from lists of left, top, right, bottom and perhaps a name."""
    edges = [
        ([float(edge) for edge in box[:4]], str(box[4]) if len(box) > 4 else "") for box in boxes
    ]
    return tuple(
        Box(left, top, right, bottom, label) for (left, top, right, bottom), label in edges
    )


def _caption_regions(sample: scenes.SceneSample, words: Sequence[str]) -> list[Region]:
    """A caption names what is in the scene in reading order, a comma after each part."""
    parts: list[Any] = [*sample.scene.things, *([sample.scene.text] if sample.scene.text else [])]
    parts.sort(key=lambda part: part.cell)
    regions, number = [], 0
    for word in words:
        # A comma belongs to the part before it. Words behind the last part stay with it.
        regions.append(_part(parts[min(number, len(parts) - 1)]))
        number += "," in word
    return regions


def _part(part: Any) -> Region:
    return Region(boxes_of([part.box]), tuple(int(patch) for patch in part.patches))


def tokens_in_boxes(
    places: np.ndarray, boxes: Sequence[Sequence[float]], least: float = 0.5
) -> list[int]:
    """Image tokens of which at least the share `least` lies under one of the boxes.

    The share is of the token's own area.

    Args:
        boxes: left, top, right, bottom of each, in the unit of the places.
        least: share of a token that must lie under a box, in (0, 1].
        places: (image tokens, 4) left, top, right, bottom of the part of the picture under every
            token, NaN where there is none.
    """
    chosen = np.zeros(len(places), bool)
    area = (places[:, 2] - places[:, 0]) * (places[:, 3] - places[:, 1])
    for left, top, right, bottom in (box[:4] for box in boxes):
        # Width and height of the overlap; negative where they do not meet. NaN compares as False
        # below.
        wide = np.minimum(places[:, 2], right) - np.maximum(places[:, 0], left)
        high = np.minimum(places[:, 3], bottom) - np.maximum(places[:, 1], top)
        chosen |= (area > 0) & (wide > 0) & (high > 0) & (wide * high >= least * area)
    return np.flatnonzero(chosen).tolist()
