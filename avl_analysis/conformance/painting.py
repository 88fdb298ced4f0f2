"""Do image tokens lie where a recording says? Paint parts of pictures, see which tokens change.

The places are those that are recorded while `generate` runs, as for a user. Attention in the vision
tower is silenced first (its output projections set to zero), so that a token's features depend on
its own patch only. A token whose box lies within the painted part must change; one whose box lies
beyond the reach of the resampling filter must not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from avl.families import describe
from avl.places import remember_originals
from avl_analysis.capture.recorder import record
from avl_analysis.conformance.build import Case, quiet
from avl_analysis.conformance.entries import entry
from avl_analysis.conformance.inputs import image_features, parts, pixels, prompt
from avl_analysis.conformance.recording import Mismatch
from avl_analysis.conformance.shrink import SIDE
from avl_analysis.recordings.schema import EDGES

SIZES = ((40, 28), (24, 44), (32, 32), (100, 44))
"""Width and height of the pictures painted: wide, high, square, and one that is large enough for
several tiles where a family makes tiles; none a multiple of a patch.
"""

PAINTED = (
    (0.0, 0.0, 0.4, 0.45),
    (0.3, 0.35, 0.75, 0.8),
    (0.62, 0.55, 1.0, 1.0),
    (0.0, 0.45, 1.0, 0.6),
    (0.4, 0.0, 0.6, 1.0),
)
"""Painted parts as fractions: two corners, the middle, a row, a column."""

# Names that families give to the output projection of vision attention.
_OUTPUTS = ("out_proj", "o_proj", "proj", "projection_layer", "wo", "dense")


@dataclass(frozen=True)
class Painted:
    """What a picture map was held against.

    Attributes:
        placed: image tokens with a box; `of` all image tokens of the pictures painted.
        inside, outside: tokens found within, and beyond, painted parts.
        wrong: those of them that behaved otherwise.
        assumption: what the map took for granted.
    """

    placed: int
    of: int
    inside: int
    outside: int
    wrong: int
    assumption: str


@torch.no_grad()
def check_places(case: Case) -> Painted:
    """Paint pictures of several shapes and compare.

    Raises:
        LookupError: no image processor.
        Mismatch: other places are recorded than the same inputs give.
    """
    model, family = silenced(case.model), describe(case.model)
    placed = of = inside = outside = wrong = 0
    assumption = ""
    for size in SIZES:
        picture = _noise(size)
        given = _pixels(case, picture)
        inputs = prompt(model, given)
        remember_originals(inputs, [[size]], case.processor)
        boxes = _recorded(model, inputs, size)
        layout = family.layout(inputs["input_ids"], inputs["attention_mask"], inputs)
        mapped = family.picture_map(layout, {**given, **inputs}, [[size]], case.processor)
        # From (length, 4) boxes of the whole prompt to (image tokens, 4).
        _agree(boxes, mapped.boxes[0][layout.image[0] >= 0], case)
        assumption = assumption or mapped.assumption
        # (image tokens, width)
        plain = torch.cat(list(parts(image_features(model, given))))
        placed, of = placed + int((~boxes[:, 0].isnan()).sum()), of + len(boxes)
        for part, painted in _paint(picture):
            features = torch.cat(list(parts(image_features(model, _pixels(case, painted)))))
            # Tokens that do not depend on the painted part compute the same numbers again; the
            # margin is for rounding.
            changed = (features - plain).abs().amax(-1) > 1e-6
            within, beyond = sides(boxes, part, _reach(case, size))
            inside, outside = inside + int(within.sum()), outside + int(beyond.sum())
            wrong += int((within & ~changed).sum()) + int((beyond & changed).sum())
    return Painted(placed, of, inside, outside, wrong, assumption)


def _reach(case: Case, size: tuple[int, int]) -> float:
    """Pixels of the original over which resampling spreads a change.

    The smaller the processor makes the picture, the more.
    """
    return entry(case.model_type).reach * max(1.0, max(size) / (2 * SIDE))


def _recorded(model: nn.Module, inputs: dict[str, Any], size: tuple[int, int]) -> Tensor:
    """(image tokens, 4): boxes in pixels as recorded under `generate`, NaN where there is none."""
    with record(model, statistics=[], maps="none") as recording:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    if len(recording) != 1:
        raise Mismatch(f"one answer was recorded as {len(recording)} samples")
    tokens = recording.tokens.isel(sample=0)
    edges = np.stack([tokens[edge].values for edge in EDGES], 1)[tokens["image"].values >= 0]
    width, height = size
    return torch.from_numpy(edges) * torch.tensor([width, height, width, height])


def _agree(recorded: Tensor, mapped: Tensor, case: Case) -> None:
    """Boxes recorded are those of the picture map of the same inputs."""
    if not torch.allclose(recorded, mapped, atol=1e-3, equal_nan=True):
        raise Mismatch(
            f"{case.model_type}: places recorded under generate differ from those of the same"
            " inputs"
        )


def _pixels(case: Case, picture: Image.Image) -> dict[str, Any]:
    with quiet():
        return pixels(case.model_type, case.config, [picture])


def silenced(model: nn.Module) -> Any:
    """A copy of the model with vision attention that adds nothing."""
    model = copy.deepcopy(model)
    # The decoder keeps its attention: `generate` runs through it, and features are compared before
    # it.
    own = {id(module) for module in model.get_decoder().modules()}
    for module in model.modules():
        if id(module) in own or not any(
            part in type(module).__name__ for part in ("Attention", "ShortConv")
        ):
            continue
        for name in _OUTPUTS:
            layer = getattr(module, name, None)
            # Some families wrap the projection in a module that holds it as `linear`.
            if isinstance(layer := getattr(layer, "linear", layer), nn.Linear):
                nn.init.zeros_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return model


def _noise(size: tuple[int, int]) -> Image.Image:
    draw = torch.Generator().manual_seed(0)
    return Image.fromarray(
        # (height, width, 3). Values stay away from 0 and 255, so that pure red changes every pixel.
        torch.randint(60, 190, (size[1], size[0], 3), generator=draw, dtype=torch.uint8).numpy()
    )


def _paint(picture: Image.Image) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
    width, height = picture.size
    for left, top, right, bottom in PAINTED:
        part = (int(left * width), int(top * height), round(right * width), round(bottom * height))
        painted = picture.copy()
        painted.paste((255, 0, 0), part)
        yield part, painted


def sides(boxes: Tensor, part: tuple[int, int, int, int], reach: float) -> tuple[Tensor, Tensor]:
    """Which tokens lie within a part, and which beyond it.

    Tokens without a place (newlines) beside tokens with one count as beyond.
    """
    left, top, right, bottom = boxes.unbind(-1)
    wide, high = right - left, bottom - top
    close = 1e-3
    within = (left >= part[0] - close) & (top >= part[1] - close)
    within &= (right <= part[2] + close) & (bottom <= part[3] + close)
    # A sliver of the picture beside padding may leave no trace.
    within &= (wide > 0.5) & (high > 0.5)
    beyond = (left >= part[2] + reach) | (top >= part[3] + reach)
    beyond |= (right <= part[0] - reach) | (bottom <= part[1] - reach)
    # Comparisons with NaN are False, so tokens without a place are on neither side up to here. If
    # no token has a place, none is put on a side.
    known = ~left.isnan()
    return within, (beyond | ~known) & known.any()
