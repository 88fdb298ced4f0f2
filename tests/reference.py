"""Every statistic once more, slow and obvious: float64 NumPy, one loop per sum of the definition,
one sample at a time.

Nothing here is shared with the code it checks. A sample is its weights as eager attention returns
them, unpadded:

    Seen.prompt      (layers, heads, n, n)       the prompt's map
    Seen.steps[t]    (layers, heads, n + t + 1)  the row of decode step t + 1
    Seen.modality, image, row, column, frame     of the n + T tokens; 0 system, 1 image, 2 text
    Seen.value_norm  (layers, heads, n + T)      length of every value vector, repeated to query
                                                 heads
    Seen.keys        (layers, key heads, n, d)   key vectors of the prompt

`of_rows(seen, f)` gives what the recording holds of a statistic per row: the mean over prompt rows
by query modality (layers, heads, 3, ...) and the values of the token-producing rows (layers, heads,
steps, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import ndimage

SYSTEM, IMAGE, TEXT = range(3)


@dataclass
class Seen:
    prompt: np.ndarray
    steps: list[np.ndarray]
    modality: np.ndarray
    image: np.ndarray
    row: np.ndarray
    column: np.ndarray
    frame: np.ndarray
    value_norm: np.ndarray
    keys: np.ndarray

    @property
    def n(self) -> int:
        return self.prompt.shape[2]

    @property
    def layers(self) -> int:
        return self.prompt.shape[0]

    @property
    def heads(self) -> int:
        return self.prompt.shape[1]

    def produced(self) -> list[np.ndarray]:
        """The rows that produce a token, each (layers, heads, keys so far)."""
        return [self.prompt[:, :, -1, :], *self.steps]

    def image_scores(self) -> np.ndarray:
        """(steps, layers, image tokens): mean over heads."""
        at = np.flatnonzero(self.modality == IMAGE)
        return np.array([row[:, :, at].mean(1) for row in self.produced()])


RowFormula = Callable[[Seen, int, int, int, np.ndarray], np.ndarray]
"""(seen, layer, head, q, a) -> value: a[k] is the weight of query q on key k = 0 ... q."""


def of_rows(
    seen: Seen, formula: RowFormula, sampled: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Means over prompt rows by query modality, and values of the token-producing rows."""
    cells = list(product(range(seen.layers), range(seen.heads)))
    prefill, produced = {}, {}
    for layer, head in cells:
        by_modality = []
        for modality in range(3):
            queries = [q for q in range(seen.n) if seen.modality[q] == modality]
            if sampled and len(queries) > 32:
                queries = [queries[int((i + 0.5) * len(queries) / 32)] for i in range(32)]
            values = [
                formula(seen, layer, head, q, seen.prompt[layer, head, q, : q + 1]) for q in queries
            ]
            by_modality.append(_mean(values, formula, seen))
        prefill[layer, head] = by_modality
        rows = seen.produced()
        produced[layer, head] = [
            formula(seen, layer, head, seen.n - 1 + t, row[layer, head])
            for t, row in enumerate(rows)
        ]
    shape = (seen.layers, seen.heads)
    return (
        np.array([prefill[cell] for cell in cells]).reshape(*shape, 3, *np.shape(prefill[0, 0][0])),
        np.array([produced[cell] for cell in cells]).reshape(
            *shape, len(rows), *np.shape(produced[0, 0][0])
        ),
    )


def _mean(values: list[np.ndarray], formula: RowFormula, seen: Seen) -> np.ndarray:
    """Mean of what is defined; NaN where nothing is."""
    if not values:
        return np.full(np.shape(formula(seen, 0, 0, 0, seen.prompt[0, 0, 0, :1])), np.nan)
    stacked = np.array(values, dtype=float)
    count = (~np.isnan(stacked)).sum(0)
    return np.where(count > 0, np.nansum(stacked, 0) / np.maximum(count, 1), np.nan)


# -- per row -----


def modality_mass(seen: Seen, layer: int, head: int, q: int, a: np.ndarray) -> np.ndarray:
    mass = np.zeros(3)
    for k in range(q + 1):
        mass[seen.modality[k]] += a[k]
    return mass


def first_token_mass(seen: Seen, layer: int, head: int, q: int, a: np.ndarray) -> np.ndarray:
    return np.array(a[0])


def efficiency(seen: Seen, layer: int, head: int, q: int, a: np.ndarray) -> np.ndarray:
    result = np.full(3, np.nan)
    for m in range(3):
        keys = [k for k in range(q + 1) if seen.modality[k] == m]
        if keys:
            result[m] = sum(a[k] for k in keys) / len(keys)
    return result


def value_weighted_mass(seen: Seen, layer: int, head: int, q: int, a: np.ndarray) -> np.ndarray:
    mass = np.zeros(3)
    for k in range(q + 1):
        mass[seen.modality[k]] += a[k] * seen.value_norm[layer, head, k]
    return mass / mass.sum()


def threshold_sparsity(seen: Seen, layer: int, head: int, q: int, a: np.ndarray) -> np.ndarray:
    return np.array(sum(1 for k in range(q + 1) if a[k] < 0.01 * max(a)) / (q + 1))


def text_distance(seen: Seen, layer: int, head: int, q: int, a: np.ndarray) -> np.ndarray:
    text = [k for k in range(q + 1) if seen.modality[k] == TEXT]
    mass = sum(a[k] for k in text)
    return np.array(sum(a[k] * (q - k) for k in text) / mass if mass > 0 else np.nan)


def patch_distance(seen: Seen, layer: int, head: int, q: int, a: np.ndarray) -> np.ndarray:
    if seen.row[q] < 0:
        return np.array(np.nan)
    keys = [
        k
        for k in range(q + 1)
        if seen.image[k] == seen.image[q] and seen.frame[k] == seen.frame[q] and seen.row[k] >= 0
    ]
    far = [
        np.sqrt((seen.row[k] - seen.row[q]) ** 2.0 + (seen.column[k] - seen.column[q]) ** 2.0)
        for k in keys
    ]
    mass = sum(a[k] for k in keys)
    return np.array(
        sum(a[k] * d for k, d in zip(keys, far, strict=True)) / mass if mass > 0 else np.nan
    )


def recent_text_mass(seen: Seen, layer: int, head: int, q: int, a: np.ndarray) -> np.ndarray:
    text = [k for k in range(q + 1) if seen.modality[k] == TEXT]
    mass = sum(a[k] for k in text)
    if mass == 0:
        return np.full(4, np.nan)
    return np.array([sum(a[k] for k in text if q - k < w) / mass for w in (8, 16, 32, 64)])


def _shares(seen: Seen, m: int, q: int, a: np.ndarray) -> np.ndarray | None:
    """Weights on the keys of a modality divided by their sum, in descending order; None if there is
    no mass.
    """
    weights = np.array([a[k] for k in range(q + 1) if seen.modality[k] == m], dtype=float)
    return np.sort(weights)[::-1] / weights.sum() if weights.sum() > 0 else None


def coverage(
    seen: Seen, layer: int, head: int, q: int, a: np.ndarray, slack: float = 1e-6
) -> np.ndarray:
    result = np.full((3, 5), np.nan)
    for m in range(3):
        p = _shares(seen, m, q, a)
        for i, tau in enumerate((0.5, 0.8, 0.9, 0.95, 0.99)):
            if p is not None:
                needed = 1
                while p[:needed].sum() < tau - slack:
                    needed += 1
                result[m, i] = needed / len(p)
    return result


def gini(seen: Seen, layer: int, head: int, q: int, a: np.ndarray) -> np.ndarray:
    result = np.full(3, np.nan)
    for m in range(3):
        if (p := _shares(seen, m, q, a)) is not None:
            n, ascending = len(p), np.sort(p)
            result[m] = (
                1 + 1 / n - 2 / n * sum((n + 1 - i) * ascending[i - 1] for i in range(1, n + 1))
            )
    return result


def entropy(seen: Seen, layer: int, head: int, q: int, a: np.ndarray) -> np.ndarray:
    result = np.full(3, np.nan)
    for m in range(3):
        if (p := _shares(seen, m, q, a)) is not None:
            result[m] = -sum(x * np.log(x) for x in p if x > 0)
    return result


def effective_count(seen: Seen, layer: int, head: int, q: int, a: np.ndarray) -> np.ndarray:
    return np.exp(entropy(seen, layer, head, q, a))


EVERY_ROW: dict[str, RowFormula] = {
    f.__name__: f
    for f in (
        modality_mass,
        first_token_mass,
        efficiency,
        value_weighted_mass,
        threshold_sparsity,
        text_distance,
    )
}


def time_distance(seen: Seen, layer: int, head: int, q: int, a: np.ndarray) -> np.ndarray:
    if seen.frame[q] < 0:
        return np.array(np.nan)
    keys = [k for k in range(q + 1) if seen.image[k] == seen.image[q] and seen.frame[k] >= 0]
    mass = sum(a[k] for k in keys)
    far = sum(a[k] * abs(int(seen.frame[q]) - int(seen.frame[k])) for k in keys)
    return np.array(far / mass if mass > 0 else np.nan)


SAMPLED_ROWS: dict[str, RowFormula] = {
    f.__name__: f
    for f in (patch_distance, time_distance, recent_text_mass, gini, entropy, effective_count)
}


# -- per key -----


def accumulated_score(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """Raw sums and number of queries, (layers, heads, 3, tokens): from prompt rows, prompt text
    rows, decode rows.
    """
    tokens = len(seen.modality)
    raw = np.zeros((seen.layers, seen.heads, 3, tokens))
    count = np.zeros_like(raw)
    for layer, head in product(range(seen.layers), range(seen.heads)):
        for q in range(seen.n):
            for k in range(q + 1):
                for rows in (0, 1) if seen.modality[q] == TEXT else (0,):
                    raw[layer, head, rows, k] += seen.prompt[layer, head, q, k]
                    count[layer, head, rows, k] += 1
        for t, row in enumerate(seen.steps):
            for k in range(seen.n + t + 1):
                raw[layer, head, 2, k] += row[layer, head, k]
                count[layer, head, 2, k] += 1
    return raw, count


def text_age_profile(seen: Seen, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums and numbers of weights, (layers, heads, 2, ages): text queries of the prompt, and decode
    steps.
    """
    total = np.zeros((seen.layers, seen.heads, 2, len(starts)))
    pairs = np.zeros_like(total)
    for layer, head in product(range(seen.layers), range(seen.heads)):
        rows = [
            (0, q, seen.prompt[layer, head, q]) for q in range(seen.n) if seen.modality[q] == TEXT
        ]
        rows += [(1, seen.n + t, row[layer, head]) for t, row in enumerate(seen.steps)]
        for phase, q, a in rows:
            for k in range(q + 1):
                if seen.modality[k] == TEXT:
                    age = max(i for i in range(len(starts)) if starts[i] <= q - k)
                    total[layer, head, phase, age] += a[k]
                    pairs[layer, head, phase, age] += 1
    return total, pairs


def text_age_fit(seen: Seen, starts: np.ndarray) -> np.ndarray:
    """(layers, 2 phases, exponential and power, half-life and rate and R^2), through `np.polyfit`
    with weights.
    """
    total, pairs = (array.sum(1) for array in text_age_profile(seen, starts))
    result = np.full((seen.layers, 2, 2, 3), np.nan)
    for layer, phase in product(range(seen.layers), range(2)):
        ages = [
            i
            for i in range(1, len(starts))
            if pairs[layer, phase, i] > 0 and total[layer, phase, i] > 0
        ]
        if len(ages) < 4:
            continue
        y = np.log([total[layer, phase, i] / pairs[layer, phase, i] for i in ages])
        w = np.array([pairs[layer, phase, i] for i in ages])
        for law, x in enumerate((starts[ages].astype(float), np.log(1.0 + starts[ages]))):
            slope, offset = np.polyfit(x, y, 1, w=np.sqrt(w))
            mean = (w * y).sum() / w.sum()
            r2 = 1 - (w * (y - slope * x - offset) ** 2).sum() / (w * (y - mean) ** 2).sum()
            rate = -slope
            with np.errstate(over="ignore"):
                half = (np.log(2) / rate, 2.0 ** (1 / rate) - 1)[law] if rate > 0 else np.inf
            result[layer, phase, law] = half, rate, r2
    return result


def sink_rate(seen: Seen) -> np.ndarray:
    """(layers, heads, first and image): 1 for a sink."""
    result = np.full((seen.layers, seen.heads, 2), np.nan)
    images = [k for k in range(seen.n) if seen.modality[k] == IMAGE]
    for layer, head in product(range(seen.layers), range(seen.heads)):
        received = [seen.prompt[layer, head, k:, k].sum() / (seen.n - k) for k in range(seen.n)]
        result[layer, head, 0] = received[0] > 0.3
        if images:
            result[layer, head, 1] = any(received[k] > 0.3 for k in images)
    return result


def position_bias(seen: Seen) -> np.ndarray:
    """(layers, mu and sigma and R^2) of the mean weight from text rows, mean over heads."""
    images = [k for k in range(seen.n) if seen.modality[k] == IMAGE]
    result = np.full((seen.layers, 3), np.nan)
    for layer in range(seen.layers):
        mean = []
        for k in images:
            rows = [q for q in range(k, seen.n) if seen.modality[q] == TEXT]
            mean.append(
                np.mean(
                    [seen.prompt[layer, h, q, k] for h in range(seen.heads) for q in rows] or [0.0]
                )
            )
        if sum(m > 0 for m in mean) < 3:
            continue
        x = np.array([i / len(images) for i, m in enumerate(mean) if m > 0])
        y = np.log([m for m in mean if m > 0])
        slope, offset = np.polyfit(x, y, 1)
        rest, spread = ((y - offset - slope * x) ** 2).sum(), ((y - y.mean()) ** 2).sum()
        result[layer] = np.exp(offset), slope, 1 - rest / spread
    return result


def key_redundancy(seen: Seen) -> np.ndarray:
    """(layers, key heads, 3): mean cosine over all pairs of two different keys of a modality."""
    layers, heads, _, _ = seen.keys.shape
    result = np.full((layers, heads, 3), np.nan)
    for layer, head, m in product(range(layers), range(heads), range(3)):
        unit = [
            v / np.linalg.norm(v)
            for k, v in enumerate(seen.keys[layer, head])
            if seen.modality[k] == m
        ]
        pairs = [a @ b for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j]
        if pairs:
            result[layer, head, m] = np.mean(pairs)
    return result


# -- over steps -----


def _top(scores: np.ndarray, fraction: float) -> set[int]:
    size = int(round(fraction * len(scores), 9))
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:size])


def _ppci(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one) if one else np.nan


def _average(values: list[float]) -> float:
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else np.nan


def ppci_continuity(scores: np.ndarray) -> np.ndarray:
    """(layers, 32 lags, 3 p) from (steps, layers, image tokens)."""
    steps, layers, _ = scores.shape
    result = np.full((layers, 32, 3), np.nan)
    for layer, lag, (i, p) in product(range(layers), range(1, 33), enumerate((0.1, 0.3, 0.5))):
        pairs = [
            _ppci(_top(scores[t, layer], p), _top(scores[t + lag, layer], p))
            for t in range(1, steps)
            if t + lag < steps
        ]
        result[layer, lag - 1, i] = _average(pairs)
    return result


def ppci_heterogeneity(scores: np.ndarray) -> np.ndarray:
    steps, layers, _ = scores.shape
    result = np.full((layers, layers, 3), np.nan)
    for one, other, (i, p) in product(range(layers), range(layers), enumerate((0.1, 0.3, 0.5))):
        result[one, other, i] = _average(
            [_ppci(_top(scores[t, one], p), _top(scores[t, other], p)) for t in range(steps)]
        )
    return result


def ppci_prefill(scores: np.ndarray) -> np.ndarray:
    steps, layers, _ = scores.shape
    result = np.full((layers, steps, 3), np.nan)
    for layer, t, (i, p) in product(range(layers), range(1, steps), enumerate((0.1, 0.3, 0.5))):
        result[layer, t, i] = _ppci(_top(scores[0, layer], p), _top(scores[t, layer], p))
    return result


def consecutive_cosine(scores: np.ndarray) -> np.ndarray:
    steps, layers, _ = scores.shape
    result = np.full((layers, steps), np.nan)
    for layer, t in product(range(layers), range(1, steps)):
        a, b = scores[t - 1, layer], scores[t, layer]
        result[layer, t] = a @ b / np.sqrt((a @ a) * (b @ b))
    return result


def image_persistence(scores: np.ndarray) -> np.ndarray:
    _, layers, tokens = scores.shape
    result = np.full((layers, 3), np.nan)
    for layer in range(layers):
        mass = scores[1:, layer].sum(1)
        if len(mass) >= 3:
            slope = np.polyfit(np.arange(len(mass)), mass, 1)[0]
            result[layer] = slope, slope / tokens, slope / mass.mean()
    return result


def core_hit_rate(scores: np.ndarray) -> np.ndarray:
    steps, layers, _ = scores.shape
    result = np.full((layers, 32, 3, 2), np.nan)
    for layer, age, (i, c) in product(range(layers), range(32), enumerate((0.1, 0.3, 0.5))):
        recall, mass = [], []
        for t in range(1, steps):
            if t - age >= 0:
                core, true = _top(scores[t - age, layer], c), _top(scores[t, layer], c)
                recall.append(_ppci(core, true))
                mass.append(
                    sum(scores[t, layer, k] for k in core) / scores[t, layer].sum()
                    if core
                    else np.nan
                )
        result[layer, age, i] = _average(recall), _average(mass)
    return result


def prefill_recall(scores: np.ndarray) -> np.ndarray:
    steps, layers, _ = scores.shape
    result = np.full((layers, 20, 2), np.nan)
    for layer, s, (i, c) in product(range(layers), range(20), enumerate((0.1, 0.3))):
        kept = _top(scores[0, layer], round(0.05 * (s + 1), 2))
        if kept:
            result[layer, s, i] = _average(
                [_ppci(_top(scores[t, layer], c), kept) for t in range(1, steps)]
            )
    return result


def prefill_mass(scores: np.ndarray) -> np.ndarray:
    steps, layers, _ = scores.shape
    result = np.full((layers, 20), np.nan)
    for layer, s in product(range(layers), range(20)):
        kept = _top(scores[0, layer], round(0.05 * (s + 1), 2))
        if kept and steps > 1:
            caught = sum(scores[t, layer, k] for t in range(1, steps) for k in kept)
            result[layer, s] = caught / scores[1:, layer].sum()
    return result


def shared_coverage(scores: np.ndarray) -> np.ndarray:
    steps, layers, tokens = scores.shape
    result = np.full((layers, steps, 5), np.nan)
    for layer, t, (i, tau) in product(
        range(layers), range(steps), enumerate((0.5, 0.8, 0.9, 0.95, 0.99))
    ):
        left, k = scores[t, layer].sum() * (tau - 1e-6), 0
        for weight in sorted(scores[t, layer], reverse=True):
            if left > 0:
                left, k = left - weight, k + 1
        result[layer, t, i] = k / tokens
    return result


def shared_sparsity(scores: np.ndarray) -> np.ndarray:
    steps, layers, tokens = scores.shape
    result = np.full(layers, np.nan)
    for layer in range(layers):
        needed = {
            k
            for t in range(1, steps)
            for k in range(tokens)
            if scores[t, layer, k] >= 0.01 * max(scores[t, layer])
        }
        if steps > 1:
            result[layer] = (tokens - len(needed)) / tokens
    return result


def held_core_mass(
    scores: np.ndarray, secondaries: Sequence[float], fractions: Sequence[float], ages: int
) -> np.ndarray:
    """(layers, ages, secondaries, fractions): the policy's core, chosen among what it holds."""
    steps, layers, tokens = scores.shape
    result = np.full((layers, ages, len(secondaries), len(fractions)), np.nan)
    for layer, age, (s, secondary), (c, fraction) in product(
        range(layers), range(ages), enumerate(secondaries), enumerate(fractions)
    ):
        held = _top(scores[0, layer], secondary)
        size = int(round(fraction * tokens, 9))
        values = []
        for t in range(1, steps):
            if t - age >= 0 and held and size:
                then = scores[t - age, layer]
                core = sorted(held, key=lambda k, then=then: (-then[k], k))[:size]
                values.append(sum(scores[t, layer, k] for k in core) / scores[t, layer].sum())
        result[layer, age, s, c] = _average(values)
    return result


def layer_agreement(scores: np.ndarray) -> np.ndarray:
    _, layers, _ = scores.shape
    result = np.full((layers, 3), np.nan)
    for layer, (i, p) in product(range(2, layers), enumerate((0.1, 0.3, 0.5))):
        result[layer, i] = _ppci(_top(scores[0, 1], p), _top(scores[0, layer], p))
    return result


def _frames(seen: Seen) -> list[list[int]]:
    """Image tokens of every frame of every video, by their number among all image tokens."""
    at = [k for k in range(seen.n) if seen.modality[k] == IMAGE]
    pairs = [(seen.image[k], seen.frame[k]) for k in at]
    names = sorted({pair for pair in pairs if pair[1] >= 0})
    return [[i for i, pair in enumerate(pairs) if pair == name] for name in names]


def frame_mass(seen: Seen) -> np.ndarray:
    """(layers, steps, frames)."""
    scores, frames = seen.image_scores(), _frames(seen)
    steps, layers, _ = scores.shape
    result = np.full((layers, steps, max(1, len(frames))), np.nan)
    for layer, t, (f, tokens) in product(range(layers), range(steps), enumerate(frames)):
        result[layer, t, f] = sum(scores[t, layer, i] for i in tokens)
    return result


def frame_core_overlap(seen: Seen) -> np.ndarray:
    """(layers, lags, cores): cores of the last prompt row, frames of one video only."""
    scores, frames = seen.image_scores(), _frames(seen)
    at = [k for k in range(seen.n) if seen.modality[k] == IMAGE]
    result = np.full((seen.layers, 8, 3), np.nan)
    for layer, lag, (c, core) in product(
        range(seen.layers), range(1, 9), enumerate((0.1, 0.3, 0.5))
    ):
        values = []
        for one, other in product(frames, frames):
            first, second = at[one[0]], at[other[0]]
            if seen.image[first] != seen.image[second]:
                continue
            if seen.frame[second] - seen.frame[first] != lag:
                continue
            chosen = _top(scores[0, layer, one], core), _top(scores[0, layer, other], core)
            if all(chosen):
                values.append(len(set(chosen[0]) & set(chosen[1])) / len(chosen[0]))
        result[layer, lag - 1, c] = _average(values)
    return result


OVER_STEPS = {
    f.__name__: f
    for f in (
        ppci_continuity,
        ppci_heterogeneity,
        ppci_prefill,
        consecutive_cosine,
        image_persistence,
        core_hit_rate,
        prefill_recall,
        prefill_mass,
        shared_coverage,
        shared_sparsity,
        layer_agreement,
    )
}


def spatial_entropy(seen: Seen) -> np.ndarray:
    """(layers, heads): mean over pictures and frames of videos of the entropy of connected attended
    places, last prompt row.
    """
    pictures = {(seen.image[k], seen.frame[k]) for k in range(seen.n) if seen.row[k] >= 0}
    result = np.full((seen.layers, seen.heads), np.nan)
    for layer, head in product(range(seen.layers), range(seen.heads)):
        values = []
        for picture in pictures:
            tokens = [
                k
                for k in range(seen.n)
                if (seen.image[k], seen.frame[k]) == picture and seen.row[k] >= 0
            ]
            grid = np.zeros((seen.row[tokens].max() + 1, seen.column[tokens].max() + 1))
            for k in tokens:
                grid[seen.row[k], seen.column[k]] = seen.prompt[layer, head, -1, k]
            above = np.where(grid > grid.mean(), grid - grid.mean(), 0.0)
            labels, count = ndimage.label(above > 0, structure=np.ones((3, 3)))
            p = np.array([above[labels == i].sum() for i in range(1, count + 1)]) / above.sum()
            values.append(-(p * np.log(p)).sum())
        if values:
            result[layer, head] = np.mean(values)
    return result
