"""Which relevance map points at what a word is about, over many questions.

For one word of every rightly answered question, of which it is known what part of the picture it
is about (`corpus.regions`): does the strongest image token of each map lie there? Raw, relative and
gradient-weighted attention are asked layer by layer (mean over heads) and as the mean over layers,
relevance propagation once. Pointing at random reaches the region's share of the tokens.

A map that points better at the object describes better where the word came from in the picture,
or is sharper; it is still no evidence of what the answer needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import xarray as xr

from avl.families import describe
from avl_analysis.capture.provenance import provenance
from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.record_samples import facts_of, tokens_asked_about
from avl_analysis.corpus.regions import Region, regions_of
from avl_analysis.errors import InputError
from avl_analysis.evaluation.generation import generate
from avl_analysis.models.loading import VLM
from avl_analysis.recordings.netcdf import read_labelled, write_labelled
from avl_analysis.relevance import METHODS
from avl_analysis.relevance.maps import Relevance, relevance

LAYERED = tuple(method for method in METHODS if method != "chefer")
"""Maps that there is one of per layer."""
_LETTERS = 3


def point(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Whether the strongest image token of every map lies on what a word is about.

    The word is the first of at least three letters whose region is known, or else the first whose
    region is known.

    Args:
        vlm: a loaded model.
        samples: questions with one picture each.
        max_new_tokens: longest answer, in tokens.
        progress: called with (questions done, questions in all).

    Returns:
        Dimensions sample, map, layer. Variables `pointing` (sample, layered, layer),
        `pointing_all` (sample, map) of the means over layers and of relevance propagation,
        `area` (sample) the region's share of the tokens; `maps` (sample, map, token) the means
        over layers, NaN beyond a sample's tokens, `position` (sample, token, edge) the part of the
        picture under each; and `about`, JSON of each sample's facts with its word and boxes.

    Raises:
        InputError: no question was answered rightly about a known region.
        avl.families.UnsupportedModelError: as `relevance`.
    """
    found: list[tuple[Sample, Relevance, Region, str]] = []
    for done, sample in enumerate(samples):
        if (one := _of_sample(vlm, sample, max_new_tokens)) is not None:
            found.append(one)
        if progress is not None:
            progress(done + 1, len(samples))
    if not found:
        raise InputError(
            f"of none of the {len(samples)} questions it is known what a word of a right answer is"
            " about: use drawn scenes, or questions with regions and answers that the model gets"
            " right"
        )
    layers = found[0][1].layers
    longest = max(len(maps.images[0].token) for _, maps, _, _ in found)
    # (samples, layered maps, layers), and (samples, maps) below: 1 where the strongest token lies
    # on the region, 0 where not, NaN without values.
    pointing = np.array(
        [
            [[_hit(maps.of(method, layer), region) for layer in layers] for method in LAYERED]
            for _, maps, region, _ in found
        ]
    )
    together = np.array(
        [[_hit(maps.of(method), region) for method in METHODS] for _, maps, region, _ in found]
    )
    # Samples have different numbers of image tokens; shorter rows stay NaN behind their last.
    drawn = np.full((len(found), len(METHODS), longest), np.nan, np.float32)
    places = np.full((len(found), longest, 4), np.nan, np.float32)
    for row, (_, maps, _, _) in enumerate(found):
        count = len(maps.images[0].token)
        drawn[row, :, :count] = [maps.of(method) for method in METHODS]
        places[row, :count] = maps.images[0].boxes
    # What pointing at random would reach in each sample.
    area = [len(region.tokens) / len(maps.images[0].token) for _, maps, region, _ in found]
    return xr.Dataset(
        {
            "pointing": (("sample", "layered", "layer"), pointing),
            "pointing_all": (("sample", "map"), together),
            "area": ("sample", area, {"units": "1"}),
            "maps": (("sample", "map", "token"), drawn),
            "position": (("sample", "token", "edge"), places),
            "about": ("sample", [about for _, _, _, about in found]),
        },
        {
            "sample": [sample.id for sample, _, _, _ in found],
            "layered": list(LAYERED),
            "map": list(METHODS),
            "layer": list(layers),
        },
        {
            **provenance(vlm.model, describe(vlm.model), ()),
            "instruction": found[0][1].instruction,
            "asked": len(samples),
        },
    )


def _of_sample(
    vlm: VLM, sample: Sample, max_new_tokens: int
) -> tuple[Sample, Relevance, Region, str] | None:
    """Maps and region of one word, and facts; None where no region is known."""
    # The boxes of a region are of one picture.
    if len(sample.images) != 1:
        return None
    (tokens,) = generate(vlm, [sample], None, max_new_tokens=max_new_tokens).tokens
    facts = facts_of(vlm, sample, tokens)
    inputs = vlm.prepare([list(sample.images)], [sample.prompt])
    (inside,) = tokens_asked_about(vlm, [sample], inputs)
    facts |= {"region_tokens": inside} if inside else {}
    words = [str(word) for word in facts.get("words", ())]
    # Boxes are enough to choose the word. Which tokens they cover needs the place of every image
    # token, and those are found below with the maps, which cost two backward passes.
    known = [step for step, region in enumerate(regions_of(facts)) if region.boxes]
    if not known:
        return None
    # Words of fewer letters serve only where no longer one has a known region.
    long = [step for step in known if len(words[step].strip()) >= _LETTERS]
    step = (long or known)[0]
    maps = relevance(vlm, sample, tokens, step)
    region = regions_of(facts, maps.images[0])[step]
    # Also None where no token of the image has a known place, or where no token lies in the boxes.
    if not region.tokens:
        return None
    boxes = [[b.left, b.top, b.right, b.bottom] for b in region.boxes]
    about = {**facts, "word": words[step], "step": step, "boxes": boxes}
    return sample, maps, region, json.dumps(about)


def _hit(values: np.ndarray, region: Region) -> float:
    """1 if the largest of the values is of a token of the region, else 0; NaN without values."""
    if not np.isfinite(values).any():
        return float("nan")
    return float(int(np.nanargmax(values)) in set(region.tokens))


FORMAT, VERSION = "avl-pointing", 1
_NEEDED: dict[str, tuple[str, ...]] = {
    "pointing": ("sample", "layered", "layer"),
    "pointing_all": ("sample", "map"),
    "area": ("sample",),
    "maps": ("sample", "map", "token"),
    "position": ("sample", "token", "edge"),
    "about": ("sample",),
}


def save_pointing(result: xr.Dataset, path: str | PathLike[str]) -> Path:
    """Write what `point` gave as one netCDF file.

    Raises:
        InputError: the file cannot be written.
    """
    return write_labelled(result, path, FORMAT, VERSION)


def load_pointing(path: str | PathLike[str]) -> xr.Dataset:
    """Read what `save_pointing` wrote.

    Raises:
        InputError: no such file, or not one of these.
    """
    return read_labelled(path, FORMAT, VERSION, "avl maps", _NEEDED)
