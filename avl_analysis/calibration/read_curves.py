"""Reading settings off curves.

Which share, core or interval is the smallest that keeps a target, and why.

A curve is a mean over samples with its two-sided 95 % interval; a number is good enough where the
lower bound reaches the target, which a number that misses it does in 2.5 % of calibrations. Every
choice keeps the curve it was read from and says in words why it fell where it fell. Knows arrays,
not models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import xarray as xr

from avl_analysis.intervals import LEAST_SAMPLES, Estimate, mean_intervals

SHARES = tuple(round(0.05 * i, 2) for i in range(1, 21))
"""Shares that can be chosen: 5 % to 100 %."""
MAX_REFRESH = 32
"""Longest refresh interval that is considered, in decode steps."""


@dataclass(frozen=True)
class Curve:
    """A measured curve with the 95 % interval of its mean over samples.

    Attributes:
        x: what was varied; name says what it is and in which unit.
        mean, low, high: (points,), None where nothing could be measured; n samples behind each
            point.
    """

    name: str
    x: tuple[float, ...]
    mean: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    n: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """One number of the policy: its value, the curve it was read from, and why, in words.

    `place` says where it holds if not everywhere.
    """

    setting: str
    value: float | int | None
    reason: str
    curve: Curve | None = None
    place: str = ""


def smallest_choice(
    values: xr.DataArray, setting: str, target: float, what: str, place: str = ""
) -> Choice:
    """The smallest share whose lower bound reaches the target."""
    dim = str(values.dims[-1])
    curve = curve_of(values, dim, f"share of the {what} that is caught, by {setting}")
    everything = len(curve.x) - 1  # catches all of it, whatever the rounding
    index = next(
        (i for i, low in enumerate(curve.low) if low is not None and low >= target), everything
    )
    return Choice(
        setting, curve.x[index], _because(curve, index, setting, target, what), curve, place
    )


def _because(curve: Curve, index: int, setting: str, target: float, what: str) -> str:
    words = (
        f"{setting} = {curve.x[index]:g} is the smallest share that keeps {target:.0%} of the"
        f" {what}: {_words(curve, index)}"
    )
    return words + (
        f"; at {curve.x[index - 1]:g} it is {_words(curve, index - 1)}" if index else ""
    )


def _words(curve: Curve, index: int) -> str:
    mean, low, high = curve.mean[index], curve.low[index], curve.high[index]
    if mean is None or low is None or high is None:
        return "not measured"
    return f"{mean:.3f} [{low:.3f}, {high:.3f}], {curve.n[index]} samples"


def core_choice(values: xr.DataArray, secondary: float, target: float) -> tuple[Choice, Choice]:
    """Core and refresh interval that read fewest keys per step.

    With an interval of K a core is used 1 to K - 1 steps after it was chosen; every K-th step reads
    all that is held. The core is chosen among the held tokens and must catch the target of the
    attention on all image tokens when it is oldest.

    Args:
        values: share of the image attention on a core chosen among held tokens,
            (sample, core_age, core).
        secondary: share of image tokens that is held.
        target: share of the image attention that is to be kept.
    """
    values = values.transpose("sample", "core_age", "core")
    # Mean and bounds are (core_age, core).
    found = mean_intervals(values.values)
    shares = [float(share) for share in values["core"].values]
    ages = [float(age) for age in values["core_age"].values]
    best = _fewest_keys(found.low, shares, secondary, target)
    if best is None or best[0] >= secondary - 1e-9:
        largest = max(i for i, share in enumerate(shares) if share <= secondary + 1e-9)
        name = "share of the image attention on a core chosen 1 step ago, by its size"
        young = _curve(name, shares, found.map(lambda part: part[1]))
        reason = (
            f"no core that reads fewer keys than the {secondary:g} held catches {target:.0%} of the"
            f" image attention one step after it was chosen (one of {shares[largest]:g}:"
            f" {_words(young, largest)}): every step attends to all that is held"
        )
        return Choice("core", None, reason, young), Choice("refresh_every", 0, reason, young)
    read, interval, c = best
    by_age = (
        f"share of the image attention on a core of {shares[c]:g}, by steps since it was chosen"
    )
    aged = _curve(by_age, ages, found.map(lambda part: part[:, c]))
    by_size = f"share of the image attention on a core chosen {interval - 1} steps ago, by its size"
    sized = _curve(by_size, shares, found.map(lambda part: part[interval - 1]))
    caught_last = (
        f"catches {_words(sized, c)} of the image attention when it is oldest, {interval - 1} steps"
    )
    why = (
        f"reads {read:.2f} of the image tokens per step on average, fewest of all pairs that keep"
        f" {target:.0%}"
    )
    return (
        Choice(
            "core",
            shares[c],
            f"core = {shares[c]:g} with refresh_every = {interval} {why}; it {caught_last}",
            sized,
        ),
        Choice(
            "refresh_every",
            interval,
            f"refresh_every = {interval} with core = {shares[c]:g} {why}",
            aged,
        ),
    )


def _fewest_keys(
    low: np.ndarray, shares: Sequence[float], secondary: float, target: float
) -> tuple[float, int, int] | None:
    """Keys read per step, interval and index of the core, of the pair that reads fewest keys.

    Of equal pairs the one with the longest interval; None where no core is good for one step.

    Args:
        low: (core_age, core) lower bounds of the share caught.
        shares: sizes of the cores, ascending.
        secondary: share of image tokens that is held.
        target: share that must be caught.
    """
    best: tuple[float, int, int] | None = None
    for c, share in enumerate(shares):
        # Cores larger than what is held are the same as all that is held.
        if share > secondary + 1e-9:
            break
        for interval in range(2, len(low) + 1):
            # The core is oldest at the last step before a refresh, interval - 1 steps after it was
            # chosen; also False for NaN.
            if not low[interval - 1, c] >= target:
                break
            # Mean share of the image tokens read per step: one refresh in `interval` steps reads
            # all held.
            read = (secondary + (interval - 1) * share) / interval
            fewer = best is None or read < best[0] - 1e-9
            longer = best is not None and abs(read - best[0]) <= 1e-9 and interval > best[1]
            if fewer or longer:
                best = (read, interval, c)
    return best


def text_choice(values: xr.DataArray, target: float) -> Choice:
    """The smallest share of text keys that reaches the target.

    None where texts were too short to tell.

    At least 20 text keys are always held, so on short texts several shares are one and the same
    policy. Of shares that no sample tells apart the largest is taken: a longer text shows what the
    smaller ones lose.

    Args:
        values: share of the text attention that is caught, (sample, share).
        target: share of it that is to be kept.
    """
    what = "text attention of the decode steps"
    curve = curve_of(values, "share", f"share of the {what} that is caught, by text")
    # Shares at which the rule dropped a key in enough samples to give an interval.
    acting = [i for i, low in enumerate(curve.low) if low is not None]
    if not acting:
        reason = (
            "the rule stays off: texts were too short for it to drop a key (20 are always held), or"
            f" fewer than {LEAST_SAMPLES} were long enough"
        )
        return Choice("text", None, reason, curve)
    for index in acting:
        low = curve.low[index]
        if low is not None and low >= target:
            largest = _largest_equal(values.transpose("sample", "share").values, index)
            reason = _because(curve, index, "text", target, what)
            if largest > index:
                reason = (
                    f"text = {curve.x[largest]:g} is the largest share that keeps as much as"
                    f" {curve.x[index]:g} in every sample; these texts are too short to tell them"
                    f" apart. {reason[:1].upper()}{reason[1:]}"
                )
            return Choice("text", curve.x[largest], reason, curve)
    last = acting[-1]
    reason = (
        f"the rule stays off: at {curve.x[last]:g} it catches {_words(curve, last)}, less than"
        f" {target:.0%}"
    )
    return Choice("text", None, reason, curve)


def _largest_equal(values: np.ndarray, index: int) -> int:
    """The last of the columns from `index` on that are equal to it in every row."""
    while index + 1 < values.shape[1] and np.allclose(
        values[:, index], values[:, index + 1], rtol=0, atol=1e-12, equal_nan=True
    ):
        index += 1
    return index


def prefill_choice(agreement: xr.DataArray, target: float, layer: int, secondary: float) -> Choice:
    """The smallest share on which all later layers agree with `layer`; None where there is none."""
    # One later layer that disagrees loses its tokens for good, so the least agreeing one decides.
    worst = agreement.min("layer")
    curve = curve_of(
        worst,
        "p",
        f"overlap of layer {layer}'s best image tokens with the least agreeing later layer's",
    )
    for index, share in enumerate(curve.x):
        low = curve.low[index]
        if low is not None and low >= target and secondary - 1e-9 <= share < 1:
            return Choice(
                "prefill",
                share,
                _because(curve, index, "prefill", target, "ranking of later layers"),
                curve,
            )
    index = max(
        (i for i, share in enumerate(curve.x) if share < 1), key=lambda i: curve.mean[i] or 0.0
    )
    reason = (
        f"the filter stays off: the best image tokens of layer {layer} are not those of every later"
        f" layer; they overlap by {_words(curve, index)} at {curve.x[index]:g} (chance:"
        f" {curve.x[index]:g}), less than {target:.0%}"
    )
    return Choice("prefill", None, reason, curve)


def curve_of(values: xr.DataArray, dim: str, name: str) -> Curve:
    """Mean over samples along `dim`, with intervals."""
    x = [float(label) for label in values[dim].values]
    return _curve(name, x, mean_intervals(values.transpose("sample", dim).values))


def _curve(name: str, x: Sequence[float], found: Estimate[np.ndarray]) -> Curve:
    counts = tuple(int(count) for count in found.n)
    return Curve(name, tuple(x), _tuple(found.mean), _tuple(found.low), _tuple(found.high), counts)


def _tuple(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(round(float(value), 6) if np.isfinite(value) else None for value in values)


# -- layer by layer --------------------------------------------------------------------------------


def secondary_by_layer(values: xr.DataArray, target: float) -> list[Choice]:
    """For each layer the smallest share that catches the target.

    From values (sample, layer, secondary).
    """
    return [
        smallest_choice(
            values.sel(layer=layer, drop=True),
            "secondary",
            target,
            f"image attention of layer {layer} at the decode steps",
            place=f"layer {layer}",
        )
        for layer in values["layer"].values.tolist()
    ]


def cores_by_layer(
    values: xr.DataArray, secondary: Sequence[float], target: float
) -> tuple[list[Choice], Choice]:
    """For each layer a core, and one refresh interval for all, that read the fewest keys per step.

    A layer whose cores age too fast for an interval attends to all it holds.

    Args:
        values: share of a layer's image attention on a core chosen among what it holds,
            (sample, layer, core_age, core).
        secondary: share of image tokens that each layer holds.
        target: share of the image attention that is to be kept in every layer.
    """
    values = values.transpose("sample", "layer", "core_age", "core")
    estimates = mean_intervals(values.values)
    low = estimates.low
    shares = [float(share) for share in values["core"].values]
    layers = values["layer"].values.tolist()
    held = float(np.mean(secondary))

    def cores(interval: int) -> list[int | None]:
        """Per layer the smallest core that is still good when it is oldest.

        None: all that is held.
        """
        # (core,) per layer: good at every age from 1 to interval - 1.
        good = [low[i, 1:interval].min(0) >= target for i in range(len(layers))]
        smallest: list[int | None] = []
        for i in range(len(layers)):
            fitting = [c for c, share in enumerate(shares) if share <= secondary[i] + 1e-9]
            smallest.append(next((c for c in fitting if good[i][c]), None))
        return smallest

    def read(interval: int) -> float:
        chosen = cores(interval)
        least = [
            secondary[i] if c is None else min(shares[c], secondary[i])
            for i, c in enumerate(chosen)
        ]
        return (held + (interval - 1) * float(np.mean(least))) / interval

    # Of intervals that read equally much the longest, which refreshes least often.
    interval = min(range(2, values.sizes["core_age"] + 1), key=lambda k: (round(read(k), 9), -k))
    if read(interval) >= held - 1e-9:
        reason = (
            f"no layer has a core that catches {target:.0%} one step after it was chosen: every"
            " step attends to all"
        )
        return [Choice("core", None, reason, None, f"layer {layer}") for layer in layers], Choice(
            "refresh_every", 0, reason
        )
    found = []
    for i, c in enumerate(cores(interval)):
        name = (
            f"share of layer {layers[i]}'s image attention on a core chosen {interval - 1} steps"
            " ago, by its size"
        )
        curve = _curve(name, shares, estimates.map(itemgetter((i, interval - 1))))
        where = f"layer {layers[i]}"
        if c is None:
            reason = (
                f"{where} attends to all it holds: no smaller core catches {target:.0%} after"
                f" {interval - 1} steps"
            )
            found.append(Choice("core", secondary[i], reason, curve, where))
        else:
            reason = f"core = {shares[c]:g} in {where} catches {_words(curve, c)} when it is oldest"
            found.append(Choice("core", shares[c], reason, curve, where))
    why = (
        f"refresh_every = {interval} reads {read(interval):.2f} of the image tokens per step on"
        f" average over layers, fewest of all intervals; {held:.2f} are held"
    )
    return found, Choice("refresh_every", interval, why)
