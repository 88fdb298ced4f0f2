"""Localisation heads: a few heads, chosen without any truth, whose attention points at the object.

Kang et al. (2503.06287) choose heads by two numbers, both of the last row of the prompt:

1. the attention sum, the share of the row on the image; heads below the elbow of the sorted mean
   sums are left out. The elbow is the point farthest from the chord between the ends of the curve.
2. the spatial entropy of the image map (`statistics.spatial_entropy`). In every sample the heads
   that passed are ranked by it, and those most often among the lowest are the localisation heads.

So heads are chosen by what they do in this model, never by indices from elsewhere. Their maps,
smoothed and added, are then held against a known box: does the strongest patch lie on the object
(pointing), and how well does a box around that patch and its strong neighbours agree with the known
one (intersection over union, IoU)? Choose on some pictures and score on others.

Pointing at an object does not mean that the answer uses what was read there; see `ablation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from scipy import ndimage

from avl_analysis.corpus.regions import only_image, question_region
from avl_analysis.errors import InputError
from avl_analysis.heads.ablation import Head
from avl_analysis.recordings.image_tokens import ImageTokens
from avl_analysis.recordings.recording import Recording
from avl_analysis.scenes.drawing import SIDE

HEADS = 3
"""Localisation heads; the paper finds three to be enough in every model it tries."""
LOWEST = 10
"""Heads of lowest entropy a sample votes for, as in the paper; never more than half of those that
passed.
"""
SIGMA = 1 / 24
"""Width of the smoothing as a share of the grid: one patch of the paper's 24 x 24."""
STRONG = 0.5
"""Share of the strongest value from which on a patch belongs to the box (ours)."""
_EIGHT = np.ones((3, 3), int)


@dataclass(frozen=True, eq=False)
class LocalisationHeads:
    """Heads chosen by attention sum and spatial entropy.

    Attributes:
        heads: (layer, head), the most voted first.
        sums: (layer, head) mean share of the last prompt row on the image.
        elbow: the least sum that passes.
        votes: (layer, head) share of samples in which the head was among the lowest entropies.
        samples: how many voted.
    """

    heads: tuple[Head, ...]
    sums: xr.DataArray
    elbow: float
    votes: xr.DataArray
    samples: int


def elbow(values: np.ndarray) -> float:
    """The value at the point of the sorted curve that is farthest from the chord of its ends.

    The distance at a right angle is in proportion to that along the value axis, so neither axis
    needs a scale.
    """
    ordered = np.sort(np.asarray(values, dtype=float).ravel())
    # A straight line has no elbow; every head passes.
    if ordered.size <= 2 or ordered[0] == ordered[-1]:
        return float(ordered[0])
    chord = np.linspace(ordered[0], ordered[-1], ordered.size)
    return float(ordered[int(np.abs(ordered - chord).argmax())])


def choose_heads(
    recording: Recording, count: int = HEADS, samples: Sequence[str] | None = None
) -> LocalisationHeads:
    """The localisation heads of a recording.

    Args:
        recording: holds `spatial_entropy`, and image scores of the last prompt row.
        count: how many heads to choose.
        samples: names of the samples to choose by; None takes all.

    Raises:
        InputError: statistics or scores are missing, or fewer heads than `count` pass.
    """
    names = list(recording.samples if samples is None else samples)
    # Samples without an image are NaN and left out of the mean.
    sums = _last_row(recording).sum("token").where(_seen(recording)).sel(sample=names)
    if "spatial_entropy" not in recording.names:
        raise InputError(
            "the recording holds no spatial_entropy; record with statistics=None, or name it"
        )
    entropy = recording["spatial_entropy"].sel(sample=names).transpose("sample", "layer", "head")
    mean = sums.mean("sample")
    least = elbow(mean.values)
    # From here on layers and heads are one axis: head h of layer row l is at l * heads + h.
    passed = (mean >= least).values.ravel()
    ranked = entropy.values.reshape(len(entropy), -1)
    # Heads that did not pass or have no entropy come last in every ranking and get no vote.
    ranked = np.where(passed & np.isfinite(ranked), ranked, np.inf)
    known = np.isfinite(ranked).any(1)
    # If as many heads were voted for as passed, each would get a vote from every sample and the
    # entropy would decide nothing.
    lowest = max(1, min(LOWEST, int(passed.sum()) // 2))
    votes = np.zeros(ranked.shape[1])
    for row in ranked[known]:
        first = np.argsort(row, kind="stable")[:lowest]
        votes[first[np.isfinite(row[first])]] += 1
    chosen = np.flatnonzero(votes > 0)
    if len(chosen) < count:
        raise InputError(
            f"only {len(chosen)} heads look at one place of the image often enough to be chosen,"
            f" fewer than {count}: record more samples, or choose fewer heads"
        )
    usual = np.where(np.isfinite(ranked), ranked, np.nan)[known]
    # Between heads with equally many votes the lower mean entropy decides. `lexsort` sorts by its
    # last key first, so votes come before ties.
    tie = np.array([np.nanmean(usual[:, head]) for head in chosen])
    order = chosen[np.lexsort((tie, -votes[chosen]))][:count]
    layers = mean["layer"].values
    heads = tuple(
        (int(layers[h // mean.sizes["head"]]), int(h % mean.sizes["head"])) for h in order
    )
    share = mean.copy(data=(votes / max(1, known.sum())).reshape(mean.shape))
    return LocalisationHeads(heads, mean, least, share, int(known.sum()))


def ground(
    recording: Recording,
    sets: Mapping[str, Sequence[Head]],
    samples: Sequence[str] | None = None,
) -> xr.Dataset:
    """How well the maps of sets of heads find what questions are about.

    Of every sample with one image and one known box the maps of a set are smoothed, added and held
    against the box.

    Args:
        recording: holds image scores of the last prompt row.
        sets: name -> (layer, head) of its heads.
        samples: names of the samples to score on; None takes all.

    Returns:
        Dimensions set, picture (questions about the same picture are averaged; pictures are what
        another run would draw anew). Variables `pointing` (share of questions whose strongest patch
        lies on the object), `iou` with the known box; without `set` `area`, the share of patches
        on the object, which is what pointing at random reaches; and `example`, a sample of each
        picture.

    Raises:
        InputError: no sample has one image and one known box; unknown heads.
    """
    scores = _last_row(recording)
    # Grouped by picture: questions about one picture are not independent of each other.
    found: dict[str, list[tuple[Any, ...]]] = {}  # name, area, hits, overlaps
    for name in recording.samples if samples is None else samples:
        image = only_image(recording, name)
        facts = recording.facts(name)
        region = question_region(facts, image)
        if image is None or len(region.boxes) != 1 or not region.tokens:
            continue
        grid = _Grid.of(recording, name, image)
        box = region.boxes[0]
        width, height = facts.get("picture_size") or (SIDE, SIDE)
        # The known box in fractions of the picture, as the boxes under the tokens are.
        edges = np.array(
            [box.left / width, box.top / height, box.right / width, box.bottom / height]
        )
        own = scores.sel(sample=name)
        hits, ious = [], []
        for heads in sets.values():
            combined = grid.combined(
                [own.sel(layer=layer, head=head).values for layer, head in heads]
            )
            hits.append(float(grid.strongest(combined) in set(region.tokens)))
            ious.append(iou(grid.box(combined), edges))
        key = picture_of(facts) or name
        area = len(region.tokens) / len(image.token)
        found.setdefault(key, []).append((name, area, np.array(hits), np.array(ious)))
    if not found:
        raise InputError("no sample has one image and one known box that its question is about")
    groups = list(found.values())

    def by_picture(place: int) -> np.ndarray:
        return np.array([np.mean([row[place] for row in rows], 0) for rows in groups])

    return xr.Dataset(
        {
            "pointing": (("picture", "set"), by_picture(2)),
            "iou": (("picture", "set"), by_picture(3)),
            "area": ("picture", by_picture(1)),
            "example": ("picture", [rows[0][0] for rows in groups]),
        },
        {"set": list(sets)},
    ).transpose("set", "picture")


def picture_of(facts: Mapping[str, Any]) -> str:
    """What tells the picture of a recorded sample from others; "" where nothing is known of it.

    Drawn scenes of one seed and index show the same picture, whatever is asked.
    """
    if scene := facts.get("scene"):
        return f"scene {scene['seed']} {scene['index']}"
    return str(facts.get("picture", ""))


def found_box(
    recording: Recording, sample: str, heads: Sequence[Head]
) -> tuple[np.ndarray, np.ndarray]:
    """The combined map of a sample and the box it gives.

    Args:
        recording: holds image scores of the last prompt row.
        sample: name of a sample with one image.
        heads: (layer, head) of the heads.

    Returns:
        (image tokens,) the map, NaN for tokens outside the grid; and left, top, right, bottom as
        fractions of the image.

    Raises:
        InputError: several images, or it is not known where the tokens lie.
    """
    image = only_image(recording, sample)
    if image is None:
        raise InputError(f"sample {sample} has no image, or several; grounding is of one image")
    grid = _Grid.of(recording, sample, image)
    own = _last_row(recording).sel(sample=sample)
    combined = grid.combined([own.sel(layer=layer, head=head).values for layer, head in heads])
    values = np.full(len(image.token), np.nan)
    values[grid.token] = combined[grid.row, grid.column]
    return values, grid.box(combined)


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two boxes: left, top, right, bottom."""
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    common = float(np.prod(np.clip(high - low, 0, None)))
    both = float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2])) - common
    return common / both if both > 0 else 0.0


@dataclass(frozen=True, eq=False)
class _Grid:
    """The tokens of one image in its finest grid.

    Attributes:
        token: (n,) those of the image's tokens that lie in the grid.
        row, column: (n,) where.
        boxes: (n, 4) the part of the image under each, as fractions.
    """

    token: np.ndarray
    row: np.ndarray
    column: np.ndarray
    boxes: np.ndarray

    @classmethod
    def of(cls, recording: Recording, sample: str, image: ImageTokens) -> _Grid:
        tokens = recording.tokens.sel(sample=sample)
        # Row and column are -1 for tokens outside the finest grid.
        row, column = (tokens[name].values[image.position] for name in ("row", "column"))
        token = np.flatnonzero((row >= 0) & np.isfinite(image.boxes).all(1))
        if not token.size:
            raise InputError(f"where the image tokens of sample {sample} lie is not known")
        return cls(token, row[token], column[token], image.boxes[token])

    def combined(self, maps: Sequence[np.ndarray]) -> np.ndarray:
        """(rows, columns) sum of smoothed maps, each (image tokens,)."""
        total = np.zeros((int(self.row.max()) + 1, int(self.column.max()) + 1))
        for values in maps:
            grid = np.zeros_like(total)
            # NaN means that the key was not attended, which is no weight.
            grid[self.row, self.column] = np.nan_to_num(values[self.token])
            # "nearest" continues the border outwards; zeros outside would pull patches at the
            # border down and with them the objects that stand there.
            total += ndimage.gaussian_filter(grid, SIGMA * np.array(total.shape), mode="nearest")
        return total

    def strongest(self, combined: np.ndarray) -> int:
        """The image token of the largest value."""
        # Looked for among places that hold a token: smoothing spreads values to places that hold
        # none.
        return int(self.token[int(combined[self.row, self.column].argmax())])

    def box(self, combined: np.ndarray) -> np.ndarray:
        """The box around the strongest patch and all patches that hang together with it.

        These have `STRONG` of its value or more; patches have 8 neighbours.
        """
        labels, _ = ndimage.label(combined >= STRONG * combined.max(), structure=_EIGHT)
        # Looked for among places that hold a token, as in `strongest`.
        top = int(combined[self.row, self.column].argmax())
        inside = labels[self.row, self.column] == labels[self.row[top], self.column[top]]
        boxes = self.boxes[inside]
        return np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])


def _last_row(recording: Recording) -> xr.DataArray:
    """(sample, layer, head, token) weights of the last prompt row on image tokens."""
    maps = recording.data["maps"]
    if "image_score_last" not in maps:
        raise InputError(
            "this recording keeps no image scores of the last prompt row; record with maps other"
            " than none"
        )
    return maps["image_score_last"].transpose("sample", "layer", "head", "token")


def _seen(recording: Recording) -> xr.DataArray:
    """(sample,) whether a sample has an image; without one its sum would count as 0."""
    counts = recording.tokens["modality_count"].sel(key_modality="image", drop=True)
    return counts > 0
