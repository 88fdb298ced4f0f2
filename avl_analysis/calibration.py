"""From recorded attention to a policy: A-VL's numbers, read from curves at the lower bounds of their intervals.

`calibrate` lets the model answer calibration questions with the full cache and asks, for a target q (0.95: keep 95 % of
the attention), what the smallest settings are that would have kept it:

    secondary   smallest share of image tokens, chosen by the last prompt row, that catches q of the image attention of
                all decode steps together
    core, refresh_every
                a core of some size catches less the longer ago it was chosen; of all pairs whose core still catches q
                when it is oldest, the one that reads the fewest keys per step
    text        smallest share of text keys, 70 % by accumulated score and 30 % newest, that catches q of the text
                attention of all decode steps
    prefill     (on request) smallest share on which the ranking of layer `prefill_layer` agrees to q with that of
                every later layer; usually there is none, and the filter stays off

Every choice keeps its curve and says in words why it fell where it fell. Held-out questions then show what the chosen
numbers catch there, and `compare` what the policy really does to the answers. One number serves all layers, so layers
are taken together, each with the weight of its attention on the modality in question: a layer that hardly looks at the
picture does not decide how much of it is kept. Samples whose answer is a single token say nothing about decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from avl import AdaptivePolicy, FullPolicy
from avl.families import describe
from avl.seam import attached
from avl_analysis.comparing import compare
from avl_analysis.comparison import Comparison
from avl_analysis.corpus import record_samples
from avl_analysis.errors import InputError
from avl_analysis.generation import generate
from avl_analysis.intervals import mean_intervals
from avl_analysis.models import VLM
from avl_analysis.recording import Recording
from avl_analysis.samples import Sample
from avl_analysis.statistics.core_hits import CoreHitRate
from avl_analysis.statistics.layer_agreement import LayerAgreement
from avl_analysis.statistics.modality_mass import ModalityMass
from avl_analysis.statistics.prefill_recall import PrefillMass
from avl_analysis.text_rule import TextTrace, caught

SHARES = tuple(round(0.05 * i, 2) for i in range(1, 21))
"""Shares that can be chosen: 5 % to 100 %."""
MAX_REFRESH = 32
"""Longest refresh interval that is considered, in decode steps."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Curve:
    """A measured curve with the 95 % interval of its mean over samples.

    Attributes:
        x: what was varied; name says what it is and in which unit.
        mean, low, high: (points,), None where nothing could be measured; n samples behind each point.
    """

    name: str
    x: tuple[float, ...]
    mean: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    n: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """One number of the policy: its value, the curve it was read from, and why, in words."""

    setting: str
    value: float | int | None
    reason: str
    curve: Curve | None = None


@dataclass(frozen=True)
class Evidence:
    """Why a policy is what it is, and how it did on questions it was not chosen by.

    Attributes:
        target: q; model: name and revision; samples, held_out: ids of the questions.
        choices: one per setting.
        kept: on the held-out questions, with the full cache: share of attention the chosen numbers catch (mean, low,
            high, n), by setting.
        measured: the policy on the held-out questions: metric -> mean, low, high, n, difference to the full cache.
    """

    target: float
    model: str
    samples: tuple[str, ...]
    held_out: tuple[str, ...]
    choices: tuple[Choice, ...]
    kept: Mapping[str, Mapping[str, float | int | None]] = field(default_factory=dict)
    measured: Mapping[str, Mapping[str, float | int | None]] = field(default_factory=dict)

    @property
    def holds(self) -> bool | None:
        """Whether every share kept on the held-out questions is at least the target; None if none could be measured."""
        means = [entry["mean"] for entry in self.kept.values() if entry["mean"] is not None]
        return all(mean >= self.target for mean in means) if means else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, numbers and texts, for JSON."""
        return {**asdict(self), "holds": self.holds}


@dataclass(eq=False)
class Curves:
    """What was recorded of some samples, all layers taken together; dimensions as named."""

    secondary: xr.DataArray  # (sample, secondary)
    core: xr.DataArray  # (sample, core_age, core)
    text: xr.DataArray  # (sample, share)
    agreement: xr.DataArray | None  # (sample, layer, p)


def calibrate(
    vlm: VLM,
    samples: Sequence[Sample],
    target: float = 0.95,
    *,
    held_out: Sequence[Sample] | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    prefill: bool = False,
    prefill_layer: int = 2,
    progress: Progress | None = None,
) -> tuple[AdaptivePolicy, Evidence]:
    """Choose A-VL's settings for a model from its own attention.

    Args:
        vlm: a loaded model.
        samples: calibration questions, like the ones the policy is for. Answers of several tokens are needed.
        target: share of the attention that is to be kept, in (0, 1).
        held_out: questions for verification; None takes every third of `samples` away for it.
        max_new_tokens: longest answer, in tokens.
        batch_size: questions per pass.
        prefill: whether to look for a prefill filter too.
        prefill_layer: its layer.
        progress: see `Progress`.

    Returns:
        The policy and its evidence.

    Raises:
        InputError: a target out of range, too few samples, or no sample with a picture and an answer of two tokens.
    """
    if not 0 < target < 1:
        raise InputError(f"target {target}: choose a share of the attention between 0 and 1, for example 0.95")
    if held_out is None:
        samples, held_out = [s for i, s in enumerate(samples) if i % 3 != 2], samples[2::3]
    if len(samples) < 2 or not held_out:
        raise InputError(
            f"{len(samples)} samples to calibrate on and {len(held_out)} to verify with: an interval needs two, and "
            "verification one; pass more samples"
        )
    layer = prefill_layer if prefill else None
    curves = measure(vlm, samples, max_new_tokens, batch_size, layer, _named(progress, "calibrating"))
    policy, choices = choose(curves, target, layer)
    fresh = measure(vlm, held_out, max_new_tokens, batch_size, layer, _named(progress, "verifying"))
    comparison = compare(
        vlm,
        held_out,
        {"full": FullPolicy(), "calibrated": policy},
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=_named(progress, "comparing"),
    )
    evidence = Evidence(
        target=target,
        model=f"{vlm.name} {vlm.revision or ''}".strip(),
        samples=tuple(sample.id for sample in samples),
        held_out=tuple(sample.id for sample in held_out),
        choices=tuple(choices),
        kept=kept(fresh, policy),
        measured=_measured(comparison),
    )
    return policy, evidence


# -- measuring ---------------------------------------------------------------------------------------------------


def measure(
    vlm: VLM,
    samples: Sequence[Sample],
    max_new_tokens: int,
    batch_size: int = 8,
    prefill_layer: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Curves:
    """Let the model answer with the full cache and record what the settings are read from.

    Raises:
        InputError: pictures or prompts that cannot be used; no answer of two tokens about a picture.
    """
    statistics: list[Any] = [
        ModalityMass(), PrefillMass(secondaries=SHARES), CoreHitRate(fractions=SHARES, ages=MAX_REFRESH)
    ]  # fmt: skip
    if prefill_layer is not None:
        layers = describe(vlm.model).layers
        if not 1 <= prefill_layer < layers:
            raise InputError(f"prefill_layer {prefill_layer}: this model has {layers} layers; choose 1 to {layers - 1}")
        statistics.append(LayerAgreement(prefill_layer=prefill_layer, ps=SHARES))
    total = 2 * len(samples)
    recording = record_samples(
        vlm,
        samples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        statistics=statistics,
        maps=False,
        on_token=None if progress is None else lambda done, _: progress(done, total),
    )
    text = []
    for number, sample in enumerate(samples):
        trace = TextTrace()
        with attached(vlm.model, trace, "observer"):
            generate(vlm, [sample], None, max_new_tokens=max_new_tokens)
        text.append(caught(trace, SHARES))
        if progress is not None:
            progress(len(samples) + number + 1, total)
    return from_recording(recording, np.array(text))


def from_recording(recording: Recording, text: np.ndarray) -> Curves:
    """Curves of a recording with the statistics of `measure`, and of `text_rule.caught`, (samples, shares).

    Raises:
        InputError: a recording without these statistics.
    """
    try:
        shares, hits = recording["prefill_mass"], recording["core_hit_rate"].sel(hit="mass", drop=True)
        mass = recording["modality_mass"].sel(key_modality="image", drop=True).isel(step=slice(1, None))
    except KeyError as error:
        raise InputError(f"this recording cannot be calibrated from: {error}") from error
    weight = mass.sum("step").sum("head")
    labels = {"sample": shares["sample"], "share": list(SHARES)}
    agreement = recording["layer_agreement"] if "layer_agreement" in recording.names else None
    return Curves(
        _together(shares, weight),
        _together(hits, weight),
        xr.DataArray(text, dims=("sample", "share"), coords=labels),
        agreement,
    )


def _together(values: xr.DataArray, weight: xr.DataArray) -> xr.DataArray:
    """Mean over layers, weighted; NaN where no layer has a value."""
    known = weight.where(values.notnull())
    total = known.sum("layer")
    return (values * known).sum("layer") / total.where(total > 0)


# -- choosing ----------------------------------------------------------------------------------------------------


def choose(curves: Curves, target: float, prefill_layer: int | None = None) -> tuple[AdaptivePolicy, list[Choice]]:
    """The policy whose settings are the smallest that keep `target`, and the reason for each.

    Raises:
        InputError: fewer than two samples with a decode step after a picture.
    """
    if (usable := int(curves.secondary.notnull().any("secondary").sum())) < 2:
        raise InputError(
            f"{usable} of the samples have a picture and an answer of at least two tokens; only decode steps can be "
            "calibrated, and an interval needs two samples: ask questions with longer answers, such as descriptions"
        )
    secondary = _smallest(curves.secondary, "secondary", target, "image attention of the decode steps")
    assert secondary.value is not None
    core, refresh = _core(curves.core, float(secondary.value), target)
    text = _text(curves.text, target)
    chosen = {c.setting: c.value for c in (secondary, core, refresh, text)}
    choices = [secondary, core, refresh, text]
    if prefill_layer is not None and curves.agreement is not None:
        filter_ = _prefill(curves.agreement, target, prefill_layer, float(secondary.value))
        chosen |= {"prefill": filter_.value, "prefill_layer": prefill_layer}
        choices.append(filter_)
    return AdaptivePolicy(**chosen), choices  # type: ignore[arg-type]


def _smallest(values: xr.DataArray, setting: str, target: float, what: str) -> Choice:
    """The smallest share whose lower bound reaches the target."""
    dim = str(values.dims[-1])
    curve = curve_of(values, dim, f"share of the {what} that is caught, by {setting}")
    everything = len(curve.x) - 1  # catches all of it, whatever the rounding
    index = next((i for i, low in enumerate(curve.low) if low is not None and low >= target), everything)
    return Choice(setting, curve.x[index], _because(curve, index, setting, target, what), curve)


def _because(curve: Curve, index: int, setting: str, target: float, what: str) -> str:
    words = (
        f"{setting} = {curve.x[index]:g} is the smallest share that keeps {target:.0%} of the {what}: "
        f"{_words(curve, index)}"
    )
    return words + (f"; at {curve.x[index - 1]:g} it is {_words(curve, index - 1)}" if index else "")


def _words(curve: Curve, index: int) -> str:
    mean, low, high = curve.mean[index], curve.low[index], curve.high[index]
    if mean is None or low is None or high is None:
        return "not measured"
    return f"{mean:.3f} [{low:.3f}, {high:.3f}], {curve.n[index]} samples"


def _core(values: xr.DataArray, secondary: float, target: float) -> tuple[Choice, Choice]:
    """Core and refresh interval that read fewest keys per step.

    With an interval of K a core is used 1 to K - 1 steps after it was chosen; every K-th step reads all that is held.
    """
    values = values.transpose("sample", "core_age", "core")
    mean, low, high, n = mean_intervals(values.values)
    shares = [float(share) for share in values["core"].values]
    ages = [float(age) for age in values["core_age"].values]
    best: tuple[float, int, int] | None = None
    for c, share in enumerate(shares):
        if share > secondary + 1e-9:
            break
        for interval in range(2, len(values["core_age"]) + 1):
            if not low[interval - 1, c] >= target:
                break
            read = (secondary + (interval - 1) * share) / interval
            if best is None or read < best[0] - 1e-9 or (abs(read - best[0]) <= 1e-9 and interval > best[1]):
                best = (read, interval, c)
    if best is None or best[0] >= secondary - 1e-9:
        reason = (
            f"no core among the {secondary:g} held catches {target:.0%} of the image attention one step after it was "
            "chosen, or none reads fewer keys: every step attends to all that is held"
        )
        return Choice("core", None, reason), Choice("refresh_every", 0, reason)
    read, interval, c = best
    by_age = f"share of the image attention on a core of {shares[c]:g}, by steps since it was chosen"
    aged = _curve(by_age, ages, mean[:, c], low[:, c], high[:, c], n[:, c])
    by_size = f"share of the image attention on a core chosen {interval - 1} steps ago, by its size"
    sized = _curve(by_size, shares, *(part[interval - 1] for part in (mean, low, high, n)))
    caught_last = f"catches {_words(sized, c)} of the image attention when it is oldest, {interval - 1} steps"
    why = f"reads {read:.2f} of the image tokens per step on average, fewest of all pairs that keep {target:.0%}"
    return (
        Choice(
            "core", shares[c], f"core = {shares[c]:g} with refresh_every = {interval} {why}; it {caught_last}", sized
        ),
        Choice("refresh_every", interval, f"refresh_every = {interval} with core = {shares[c]:g} {why}", aged),
    )


def _text(values: xr.DataArray, target: float) -> Choice:
    what = "text attention of the decode steps"
    curve = curve_of(values, "share", f"share of the {what} that is caught, by text")
    acting = [i for i, count in enumerate(curve.n) if count > 1]
    if not acting:
        reason = "the rule stays off: texts were too short for it to drop a key (20 are always held), or too few"
        return Choice("text", None, reason, curve)
    for index in acting:
        low = curve.low[index]
        if low is not None and low >= target:
            return Choice("text", curve.x[index], _because(curve, index, "text", target, what), curve)
    last = acting[-1]
    reason = f"the rule stays off: at {curve.x[last]:g} it catches {_words(curve, last)}, less than {target:.0%}"
    return Choice("text", None, reason, curve)


def _prefill(agreement: xr.DataArray, target: float, layer: int, secondary: float) -> Choice:
    worst = agreement.min("layer")
    curve = curve_of(worst, "p", f"overlap of layer {layer}'s best image tokens with the least agreeing later layer's")
    for index, share in enumerate(curve.x):
        low = curve.low[index]
        if low is not None and low >= target and secondary - 1e-9 <= share < 1:
            return Choice("prefill", share, _because(curve, index, "prefill", target, "ranking of later layers"), curve)
    index = max((i for i, share in enumerate(curve.x) if share < 1), key=lambda i: curve.mean[i] or 0.0)
    reason = (
        f"the filter stays off: the best image tokens of layer {layer} are not those of every later layer; they "
        f"overlap by {_words(curve, index)} at {curve.x[index]:g} (chance: {curve.x[index]:g}), less than {target:.0%}"
    )
    return Choice("prefill", None, reason, curve)


def curve_of(values: xr.DataArray, dim: str, name: str) -> Curve:
    """Mean over samples along `dim`, with intervals."""
    x = [float(label) for label in values[dim].values]
    return _curve(name, x, *mean_intervals(values.transpose("sample", dim).values))


def _curve(name: str, x: Sequence[float], mean: np.ndarray, low: np.ndarray, high: np.ndarray, n: np.ndarray) -> Curve:
    return Curve(name, tuple(x), _tuple(mean), _tuple(low), _tuple(high), tuple(int(count) for count in n))


def _tuple(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(round(float(value), 6) if np.isfinite(value) else None for value in values)


# -- verifying ---------------------------------------------------------------------------------------------------


def kept(curves: Curves, policy: AdaptivePolicy) -> dict[str, dict[str, float | int | None]]:
    """What a policy's numbers catch of the attention of these samples under the full cache, by setting."""
    found: dict[str, xr.DataArray] = {}
    if policy.secondary is not None:
        found["secondary"] = curves.secondary.sel(secondary=policy.secondary)
    if policy.core is not None and policy.refresh_every > 1:
        found["core"] = curves.core.sel(core=policy.core, core_age=policy.refresh_every - 1)
    if policy.text is not None:
        found["text"] = curves.text.sel(share=policy.text)
    estimates: dict[str, dict[str, float | int | None]] = {}
    for setting, values in found.items():
        mean, low, high, n = mean_intervals(values.values)
        estimates[setting] = {"mean": _plain(mean), "low": _plain(low), "high": _plain(high), "n": int(n)}
    return estimates


def _measured(comparison: Comparison) -> dict[str, dict[str, float | int | None]]:
    table = comparison.table()
    rows = table[table.policy == "calibrated"]
    columns = ("mean", "low", "high", "difference", "difference_low", "difference_high")
    return {
        str(row["metric"]): {**{name: _plain(row[name]) for name in columns}, "n": int(row["n"])}
        for _, row in rows.iterrows()
    }


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
