"""Attention over time, in the frames of a video.

Which frames a row looks at, whether heads look at the same place in one frame after the other, and
how far back in time the tokens of a frame look. Where a model makes one token of a patch in several
frames (Qwen-VL: two), a frame is that group. NaN for samples without a video.

Frames are those of all videos of a prompt, one after another; distances and overlaps are taken
within one video. What belongs to no frame (LLaVA-OneVision's newline token) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from avl_analysis.statistics.base import (
    Axes,
    Result,
    Trajectory,
    TrajectoryStatistic,
    WeightStatistic,
)
from avl_analysis.statistics.inputs import QueryRows
from avl_analysis.statistics.top_sets import overlap, top


def frames_of(trajectory: Trajectory) -> dict[tuple[int, int], np.ndarray]:
    """Indices of the image tokens of every frame: (video, frame) -> (n,), in the prompt's order."""
    found: dict[tuple[int, int], np.ndarray] = {}
    timed = trajectory.frame >= 0
    pairs = zip(trajectory.image[timed].tolist(), trajectory.frame[timed].tolist(), strict=True)
    for image, frame in sorted(set(pairs)):
        own = (trajectory.image == image) & (trajectory.frame == frame)
        found[image, frame] = np.flatnonzero(own)
    return found


@dataclass(frozen=True)
class FrameMass(TrajectoryStatistic):
    """`sum_{k in frame} a_k`: attention mass on each frame of a video, mean over heads.

    Of the token-producing rows, in [0, 1]. The masses of all frames add up to the row's image mass
    (but for pictures beside the video). A frame none of whose tokens is in the cache has mass 0;
    NaN for a layer without any image attention weights.
    """

    name = "frame_mass"
    title = "attention mass on a frame of the video"
    source = "sum of softmax weights by modality (FastV, ECCV 2024), taken by frame"
    justifies = "S"
    dims: ClassVar[tuple[str, ...]] = ("layer", "step", "frame")

    def value(self, trajectory: Trajectory) -> Result:
        scores = trajectory.scores.astype(np.float64)  # (steps, layers, image tokens)
        frames = frames_of(trajectory)
        mass = np.full((*scores.shape[:2], max(1, len(frames))), np.nan)
        for number, at in enumerate(frames.values()):
            mass[..., number] = np.nansum(scores[..., at], -1)
        mass[np.isnan(scores).all(-1)] = np.nan
        return mass.transpose(1, 0, 2), None


@dataclass(frozen=True)
class FrameCoreOverlap(TrajectoryStatistic):
    """`|core_f & core_{f + lag}| / |core_f|`: whether the core stays in place from frame to frame.

    The core of a frame is the best `core` of its own tokens, by the last prompt row, mean over
    heads; two tokens are the same if they are of one place. In [0, 1], random baseline C. Mean over
    the pairs of frames of one video that are `frame_lag` apart and have equally many tokens.
    """

    name = "frame_core_overlap"
    title = "overlap of the cores of two frames"
    source = "the core of Zhang et al., A-VL (AAAI 2025), chosen frame by frame"
    justifies = "S, C"
    dims: ClassVar[tuple[str, ...]] = ("layer", "frame_lag")
    axes: ClassVar[Axes] = {"frame_lag": "lags", "core": "fractions"}
    random_baseline: ClassVar[str] = "core"

    lags: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    fractions: tuple[float, ...] = (0.1, 0.3, 0.5)

    def value(self, trajectory: Trajectory) -> Result:
        first, frames = trajectory.scores[0], frames_of(trajectory)  # (layers, image tokens)
        shape = (len(first), len(self.lags), len(self.fractions))
        sums, counts = np.zeros(shape), np.zeros(shape)
        for f, fraction in enumerate(self.fractions):
            sets = {name: top(first[:, at], fraction) for name, at in frames.items()}
            for lag_at, lag in enumerate(self.lags):
                # Token i of one frame and token i of the other are of one place, as both have the
                # same grid.
                for (image, frame), core in sets.items():
                    later = sets.get((image, frame + lag))
                    if later is None or later.shape != core.shape:
                        continue
                    shared = overlap(core, later)
                    sums[:, lag_at, f] += np.nan_to_num(shared)
                    counts[:, lag_at, f] += ~np.isnan(shared)
        return sums, counts


@dataclass(frozen=True)
class TimeDistance(WeightStatistic):
    """`sum_k p_k |frame(q) - frame(k)|` over the tokens of the query's own video.

    p are their weights divided by their sum. The unit is one frame. Defined for tokens of a video;
    0 where a frame looks at itself only.
    """

    name = "time_distance"
    title = "mean distance in time of attended frames"
    unit = "frames"
    source = "mean attention distance (Dosovitskiy et al., ViT, ICLR 2021), in time"
    justifies = "S"

    def value(self, rows: QueryRows) -> Tensor:
        result = rows.sums.new_full(rows.sums.shape[:2], torch.nan)
        timed = (rows.queries.frame >= 0).nonzero().flatten()  # no row of a decode step is
        if len(timed):
            some = rows.take(timed, rows.weights[:, timed])
            query, key = some.queries, some.keys
            same = (query.image[:, None] == key.image[:, None]) & (key.frame[:, None] >= 0)
            away = (query.frame[:, None] - key.frame[:, None]).abs().float() * same
            mass = some.against(same.float())
            result[:, timed] = some.against(away) / torch.where(mass > 0, mass, torch.nan)
        return result
