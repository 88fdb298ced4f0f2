"""Does a head look at what the current word is about?

Needs recordings with `maps="heads"` and regions from outside.

Three numbers per head, all from the image-token weights of rows that produce a token:

* lift: share of the row's image attention on the region, divided by the region's share of the
picture; 1 is chance.
* visual-head score: share of rows whose most attended image token lies in the region; chance is the
region's share.
* both are sums and counts over the rows whose region is known, like every statistic, so that they
can be pooled.

Regions are sets of image tokens (the i-th of the sample). `tokens_in_boxes` finds them for boxes on
a picture, given the part of the picture under every token as `avl.families.Family.picture_map`
tells it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from avl_analysis.errors import InputError
from avl_analysis.recordings.recording import Recording

Regions = Mapping[str, Mapping[int, Sequence[int]]]
"""Sample -> step (0: the row that produced the first token) -> image tokens the token is about."""


def localise(recording: Recording, regions: Regions) -> xr.Dataset:
    """Lift and visual-head score of every head.

    Sources: visual-head score after SparseMM; region share after Kang et al. (2503.06287).

    Returns:
        Variables lift and visual_head_score, means over the rows with a region, NaN where a sample
            has none (lift also where a head does not look at the picture in any of them); and rows,
            their number. Dimensions sample, layer, head; attribute random_baseline of each.

    Raises:
        InputError: the recording holds no maps per head, or a region names a sample, step or token
            that is not there.
    """
    maps = recording.data["maps"]
    if "image_score_heads" not in maps:
        raise InputError("localisation per head needs maps per head; record with maps='heads'")
    if unknown := sorted(set(regions) - set(recording.samples)):
        raise InputError(
            f"regions are given for samples that were not recorded: {', '.join(unknown[:5])}"
        )
    scores = maps["image_score_heads"]
    counts = recording.tokens["modality_count"].sel(key_modality="image")
    shape = (scores.sizes["layer"], scores.sizes["head"])
    lift, hits, rows = [], [], []
    for name in recording.samples:
        about = {
            step: list(tokens) for step, tokens in regions.get(name, {}).items() if len(tokens)
        }
        # A phase of -1 marks steps that a sample, shorter than others, does not have.
        tokens, steps = (
            int(counts.sel(sample=name)),
            int((recording.tokens["phase"].sel(sample=name) >= 0).sum()),
        )
        # Per row with a region: lift and hit of every head, (layers, heads) each.
        found = [_row(scores, name, step, tokens, steps, inside) for step, inside in about.items()]
        lift.append(_mean_of_known([one for one, _ in found], shape))
        hits.append(np.mean([hit for _, hit in found], 0) if found else np.full(shape, np.nan))
        rows.append(len(found))
    dims, coords = (
        ("sample", "layer", "head"),
        {dim: scores[dim] for dim in ("sample", "layer", "head")},
    )
    chance = {"random_baseline": "1"}, {"random_baseline": "the region's share of the picture"}
    return xr.Dataset(
        {
            "lift": (
                dims,
                np.array(lift),
                {"long_name": "attention on the region / chance", **chance[0]},
            ),
            "visual_head_score": (
                dims,
                np.array(hits),
                {"long_name": "share of words looked at", **chance[1]},
            ),
            "rows": ("sample", np.array(rows)),
        },
        coords=coords,
    )


def _mean_of_known(values: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Mean over rows of what is known; NaN where nothing is."""
    if not values:
        return np.full(shape, np.nan)
    stacked = np.stack(values)
    # `nanmean` would warn where a head has no known row.
    known = ~np.isnan(stacked)
    total = np.where(known, stacked, 0.0).sum(0)
    return np.divide(total, known.sum(0), out=np.full(shape, np.nan), where=known.any(0))


def first_word_hits(recording: Recording, regions: Regions) -> xr.DataArray | None:
    """1 where a head's most attended image token lies in the first word's region.

    At the last prompt row.

    Its mean over samples is the visual-head score of SparseMM (Wang et al., 2025) for first words;
    chance is the region's share of the picture. Needs no maps per head beyond what every recording
    keeps of the last prompt row.

    Returns: (sample, layer, head), NaN for samples whose region is unknown; None if it is unknown
        for all.

    Raises:
        InputError: the recording keeps no image scores of the last prompt row.
    """
    maps = recording.data["maps"]
    if "image_score_last" not in maps:
        raise InputError(
            "this recording keeps no image scores of the last prompt row; record with maps other"
            " than none"
        )
    scores = maps["image_score_last"].transpose("sample", "layer", "head", "token")
    counts = recording.tokens["modality_count"].sel(key_modality="image")
    hits = np.full(scores.shape[:3], np.nan)
    for index, name in enumerate(recording.samples):
        if inside := regions.get(name, {}).get(0):
            # Behind a sample's own image tokens the array is padded.
            weights = scores.values[index, :, :, : int(counts[index])]
            if np.isfinite(weights).any():
                hits[index] = in_region(weights, inside)
    if not np.isfinite(hits).any():
        return None
    return xr.DataArray(
        hits, dims=("sample", "layer", "head"), coords={n: scores[n] for n in ("layer", "head")}
    )


def _row(
    scores: xr.DataArray, sample: str, step: int, tokens: int, steps: int, inside: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Lift and whether the top token lies inside, each (layers, heads), of one row."""
    last = min(steps, scores.sizes["step"]) - 1
    # Negative indices would silently count from the end.
    if not 0 <= step <= last or min(inside) < 0 or max(inside) >= tokens:
        raise InputError(
            f"sample {sample} has steps 0 to {last} and image tokens 0 to {tokens - 1}, "
            f"got a region at step {step}, tokens {min(inside)} to {max(inside)}"
        )
    weights = (
        scores.sel(sample=sample, step=step)
        .isel(token=slice(0, tokens))
        .transpose("layer", "head", "token")
    )
    return region_lift(weights.values, inside), in_region(weights.values, inside)


LOOKS = 1e-3
"""Share of a row's attention on the picture from which on a head is said to look at it. Where it
looks with less than that, rounding and a single token decide.
"""


def region_lift(weights: np.ndarray, inside: Sequence[int]) -> np.ndarray:
    """Share of the weights on the tokens `inside`, over these tokens' share of all.

    Weights are (..., image tokens). NaN for a head that does not look at the picture (`LOOKS`).

    Args:
        weights: softmax weights on image tokens; one that is NaN was not attended.
        inside: the tokens of the region.
    """
    # In double precision, as many small weights are summed.
    known = np.nan_to_num(weights.astype(np.float64))
    total = known.sum(-1)
    share = np.divide(
        known[..., list(inside)].sum(-1),
        total,
        out=np.full(total.shape, np.nan),
        where=total >= LOOKS,
    )
    # Chance is the region's share of the tokens, len(inside) / N; the lift is the share over it.
    return share * weights.shape[-1] / len(inside)


def in_region(weights: np.ndarray, inside: Sequence[int]) -> np.ndarray:
    """1 where the most attended of the image tokens is one of `inside`, else 0.

    Weights are (..., image tokens).
    """
    # `argmax` would return the place of a NaN.
    top = np.where(np.isnan(weights), -np.inf, weights).argmax(-1)
    return np.isin(top, list(inside)).astype(np.float64)
