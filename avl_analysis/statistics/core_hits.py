"""Core hit rate: how good a core is that was chosen some steps ago. Speaks about K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from avl_analysis.statistics.base import Axes, Result, Trajectory, TrajectoryStatistic
from avl_analysis.statistics.top_sets import overlap, size_of, top


@dataclass(frozen=True)
class CoreHitRate(TrajectoryStatistic):
    """What a core chosen `core_age` token-producing rows earlier still holds, by decode step.

    recall: `|core & true core| / |core|`, random baseline C. mass: share of the step's image
    attention on the old core, random baseline C; at age 0 it is the best any core of this size can
    do. Core sizes are fractions of the image tokens.
    """

    name = "core_hit_rate"
    title = "caught by a core chosen this many steps ago"
    source = "the core of Zhang et al., A-VL (AAAI 2025), refreshed every K steps"
    justifies = "K"
    dims: ClassVar[tuple[str, ...]] = ("layer", "core_age")
    axes: ClassVar[Axes] = {"core_age": "core_ages", "core": "fractions", "hit": ("recall", "mass")}
    random_baseline: ClassVar[str] = "core"

    fractions: tuple[float, ...] = (0.1, 0.3, 0.5)
    ages: int = 32

    @property
    def core_ages(self) -> range:
        """Ages of a core that are measured, in token-producing rows."""
        return range(self.ages)

    def value(self, trajectory: Trajectory) -> Result:
        scores = trajectory.scores  # (steps, layers, image tokens)
        shape = (scores.shape[1], self.ages, len(self.fractions), 2)
        sums, counts = np.zeros(shape), np.zeros(shape)
        # (steps, layers)
        total = scores.sum(-1)
        for f, fraction in enumerate(self.fractions):
            # (steps, layers, image tokens) of 0 and 1
            sets = top(scores, fraction)
            for age in range(min(self.ages, len(scores))):
                start = max(age, 1)  # evaluated at decode steps only
                chosen, now = sets[start - age : len(sets) - age], slice(start, None)
                recall = overlap(chosen, sets[now])
                # A step without image attention has no share.
                with np.errstate(invalid="ignore", divide="ignore"):
                    mass = (chosen * scores[now]).sum(-1) / total[now]
                for h, hit in enumerate((recall, mass)):
                    sums[:, age, f, h] = np.nansum(hit, 0)
                    counts[:, age, f, h] = (~np.isnan(hit)).sum(0)
        return sums, counts


@dataclass(frozen=True)
class HeldCoreMass(TrajectoryStatistic):
    """Share of a decode step's image attention that falls on a core as the policy has it.

    After the prompt the best `secondary` of the image tokens, by the last prompt row, are held; the
    core is the best `core` of all image tokens that is among them, by the row `core_age` rows
    earlier. Both are one set per layer, by mean score over heads. The share is of the attention on
    all image tokens under the full cache, so that at most what is held can be caught. A core larger
    than what is held is all that is held. Mean over the decode steps that have a core of this age.

    It reads every pair of sizes at every age, so it is only recorded where a policy is calibrated.
    """

    name = "held_core_mass"
    title = "image attention on a core chosen among held tokens"
    source = "the core of Zhang et al., A-VL (AAAI 2025), chosen among its secondary tokens"
    justifies = "C, K"
    dims: ClassVar[tuple[str, ...]] = ("layer", "core_age")
    axes: ClassVar[Axes] = {
        "core_age": "core_ages",
        "secondary": "secondaries",
        "core": "fractions",
    }

    secondaries: tuple[float, ...] = (0.5,)
    fractions: tuple[float, ...] = (0.1, 0.3, 0.5)
    ages: int = 32

    @property
    def core_ages(self) -> range:
        """Ages of a core that are measured, in token-producing rows."""
        return range(self.ages)

    def value(self, trajectory: Trajectory) -> Result:
        scores = trajectory.scores  # (steps, layers, image tokens)
        steps, layers, tokens = scores.shape
        shape = (layers, self.ages, len(self.secondaries), len(self.fractions))
        sums, counts = np.zeros(shape), np.zeros(shape)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = scores / scores.sum(-1, keepdims=True)  # NaN without image attention
        sizes = np.array([size_of(fraction, tokens) for fraction in self.fractions])
        for s, secondary in enumerate(self.secondaries):
            if not (size := size_of(secondary, tokens)):
                continue
            # (layers, held) token numbers; the same at every step, as nothing dropped comes back.
            held, unknown = _members(top(scores[0], secondary), size)
            place = np.arange(layers)[:, None], held
            # By `among` a core is ranked, by `now` (shares of all image attention) it is judged.
            among, now = scores[:, *place], shares[:, *place]  # (steps, layers, held)
            now[:, unknown] = np.nan
            # One ranking serves all sizes: the first n of it are the core of n tokens, so a running
            # sum of what they catch gives the curve over sizes at once.
            order = np.argsort(-among, axis=-1, kind="stable")
            undefined = np.isnan(among).any(-1)
            # A core larger than what is held is all that is held; size 0 gives -1, which is blanked
            # below.
            last = np.minimum(sizes, held.shape[-1]) - 1
            for age in range(min(self.ages, steps)):
                start = max(age, 1)  # the core is read at decode steps only
                chosen = order[start - age : steps - age]
                # (steps from start on, layers, sizes)
                caught = np.take_along_axis(now[start:], chosen, -1).cumsum(-1)[..., last]
                caught[..., last < 0] = np.nan
                caught[undefined[start - age : steps - age]] = np.nan
                sums[:, age, s] += np.nansum(caught, 0)
                counts[:, age, s] += (~np.isnan(caught)).sum(0)
        return sums, counts


def _members(sets: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (layers, size) of the members of (layers, tokens) sets.

    And which layers' sets are undefined; theirs are the first tokens.
    """
    unknown = np.isnan(sets).any(-1)
    members = np.where(unknown[:, None], np.arange(sets.shape[-1]) < size, sets == 1)
    return np.nonzero(members)[1].reshape(len(sets), size), unknown
