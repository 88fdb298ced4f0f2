"""From recorded attention to a policy.

A-VL's numbers, read from curves at the lower bounds of their intervals.

`calibrate` lets the model answer calibration questions with the full cache and asks, for a target q
(0.95: keep 95 % of the attention), what the smallest settings are that would have kept it:

    secondary   smallest share of image tokens, chosen by the last prompt row, that catches q of the
                image attention of all decode steps together
    core, refresh_every a core, chosen among the held tokens as the policy chooses it, catches less
                the longer ago it was chosen; of all pairs whose core still catches q of the whole
                image attention when it is oldest, the one that reads the fewest keys per step.
                Where what is held catches q only just, no smaller core does, and every step reads
                all that is held
    text        smallest share of text keys, 70 % by accumulated score and 30 % newest, that catches
                q of the text attention of all decode steps
    prefill     (on request) smallest share on which the ranking of layer `prefill_layer` agrees to
                q with that of every later layer; usually there is none, and the filter stays off

Every choice keeps its curve and says in words why it fell where it fell. Held-out questions then
show what the chosen numbers catch there, and `compare` what the policy really does to the answers;
calibration, verification and later comparisons must not share a question (drawn scenes have a
split for each, see `avl_analysis.scenes.samples.SPLITS`).
Where one number serves all layers, they are taken together, each with the weight of its attention
on the modality in question: a layer that hardly looks at the picture does not decide how much of it
is kept. With `per_layer`, `secondary` and `core` are read layer by layer instead. Samples whose
answer is a single token say nothing about decoding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

import numpy as np
import xarray as xr

from avl import AdaptivePolicy, FullPolicy
from avl.families import describe
from avl_analysis.calibration.read_curves import (
    MAX_REFRESH,
    SHARES,
    Choice,
    core_choice,
    cores_by_layer,
    prefill_choice,
    secondary_by_layer,
    smallest_choice,
    text_choice,
)
from avl_analysis.calibration.text_eviction import TextTrace, caught
from avl_analysis.capture.raw_slices import RawLimitError
from avl_analysis.corpus.batches import Failure, halved
from avl_analysis.corpus.questions import (
    Sample,
    describe_questions,
    question_digest,
    shared_questions,
)
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.errors import InputError
from avl_analysis.evaluation.compare import compare
from avl_analysis.evaluation.comparison import Comparison
from avl_analysis.intervals import LEAST_SAMPLES, mean_interval
from avl_analysis.models.loading import VLM
from avl_analysis.recordings.recording import Recording, merge
from avl_analysis.statistics.accumulated_score import AccumulatedScore
from avl_analysis.statistics.core_hits import HeldCoreMass
from avl_analysis.statistics.layer_agreement import LayerAgreement
from avl_analysis.statistics.modality_mass import ModalityMass
from avl_analysis.statistics.prefill_recall import PrefillMass

FEW = 16
"""Samples below which intervals hold less often than they say: the chosen `secondary` or `core`
then misses the target on new questions in up to 10 to 17 % of calibrations, not in 2.5 %.
"""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Evidence:
    """Why a policy is what it is, and how it did on questions it was not chosen by.

    Attributes:
        target: q, the share of the attention that is to be kept.
        model: name and revision.
        samples: ids of the questions that the settings were chosen by.
        held_out: ids of the questions that they were verified with.
        choices: one per setting.
        kept: on the held-out questions, with the full cache: share of attention the chosen numbers
            catch (mean, low, high, n), by setting.
        measured: the policy on the held-out questions: metric -> mean, low, high, n, difference to
            the full cache.
        questions: what the questions of both kinds are, in words, with the splits they are from.
        warnings: what makes the choice less certain than its intervals say.
        asked: digests of all these questions, by which `avl compare` notices that it is to
            judge the policy by questions it was chosen by.
    """

    target: float
    model: str
    samples: tuple[str, ...]
    held_out: tuple[str, ...]
    choices: tuple[Choice, ...]
    kept: Mapping[str, Mapping[str, float | int | None]] = field(default_factory=dict)
    measured: Mapping[str, Mapping[str, float | int | None]] = field(default_factory=dict)
    questions: str = ""
    warnings: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()

    @property
    def holds(self) -> bool | None:
        """Whether the held-out questions show that the target is kept.

        True if of every setting the whole interval of the share kept is at or above the target,
        False if of one setting it is below, None where intervals hold the target or are missing.
        """
        # Judged by bounds and never by means: with few questions the answer is often that nothing
        # is known.
        bounds = [(entry["low"], entry["high"]) for entry in self.kept.values()]
        if any(high is not None and high < self.target for _, high in bounds):
            return False
        kept = [low is not None and low >= self.target for low, _ in bounds]
        return True if kept and all(kept) else None

    def _repr_html_(self) -> str:
        """What was chosen, and what of the attention it keeps on held-out questions."""
        rows = "".join(
            f"<tr><td>{escape(name)}</td>"
            + "".join(f"<td>{_shown(entry.get(key))}</td>" for key in ("mean", "low", "high", "n"))
            + "</tr>"
            for name, entry in self.kept.items()
        )
        return (
            f"<p>Target {self.target:g} on {escape(self.model)}; chosen on {len(self.samples)}"
            f" questions, checked on {len(self.held_out)} others.</p><table><tr><th>setting</th>"
            f"<th>share kept</th><th>low</th><th>high</th><th>n</th></tr>{rows}</table>"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, numbers and texts, for JSON."""
        return {**asdict(self), "holds": self.holds}


@dataclass(eq=False)
class LayerCurves:
    """The same, layer by layer."""

    secondary: xr.DataArray  # (sample, layer, secondary)
    core: xr.DataArray  # (sample, layer, core_age, secondary, core)
    weight: xr.DataArray  # (sample, layer): image attention of all decode steps


@dataclass(eq=False)
class Curves:
    """What was recorded of some samples, all layers taken together; dimensions as named."""

    secondary: xr.DataArray  # (sample, secondary)
    core: xr.DataArray  # (sample, core_age, secondary, core)
    text: xr.DataArray  # (sample, share)
    agreement: xr.DataArray | None  # (sample, layer, p)
    layers: LayerCurves | None = None


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
    per_layer: bool = False,
    progress: Progress | None = None,
) -> tuple[AdaptivePolicy, Evidence]:
    """Choose A-VL's settings for a model from its own attention.

    Args:
        vlm: a loaded model.
        samples: calibration questions, like the ones the policy is for. Answers of several tokens
            are needed.
        target: share of the attention that is to be kept, in (0, 1).
        held_out: questions for verification; None takes every third of `samples` away for it.
        max_new_tokens: longest answer, in tokens.
        batch_size: questions per pass.
        prefill: whether to look for a prefill filter too.
        prefill_layer: its layer.
        per_layer: whether every layer gets a `secondary` and a `core` of its own.
        progress: see `Progress`.

    Returns:
        The policy and its evidence.

    Raises:
        InputError: a target out of range, too few samples, questions that are in both lists, or no
            sample with a picture and an answer of two tokens.
    """
    if not 0 < target < 1:
        raise InputError(
            f"target {target}: choose a share of the attention between 0 and 1, for example 0.95"
        )
    if held_out is None:
        # Every third, not the last third: questions of a file may be sorted by task.
        samples, held_out = [s for i, s in enumerate(samples) if i % 3 != 2], samples[2::3]
    if len(samples) < LEAST_SAMPLES or not held_out:
        raise InputError(
            f"{len(samples)} samples to calibrate on and {len(held_out)} to verify with: an"
            f" interval needs {LEAST_SAMPLES}, and verification one; pass more samples"
        )
    if both := shared_questions(samples, held_out):
        raise InputError(
            f"{len(both)} question(s) are to be calibrated on and verified with, for example"
            f" {both[0]}; what settings are chosen by cannot show that they hold: pass held_out"
            " questions that are not among samples, or leave it out to have a third put aside"
        )
    layer = prefill_layer if prefill else None
    curves = measure(
        vlm, samples, max_new_tokens, batch_size, layer, _named(progress, "calibrating")
    )
    policy, choices = choose(curves, target, layer, per_layer=per_layer)
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
        questions=(
            f"chosen by {describe_questions(samples)}; verified with {describe_questions(held_out)}"
        ),
        warnings=_warnings(curves),
        asked=tuple(question_digest(sample) for sample in (*samples, *held_out)),
    )
    for message in evidence.warnings:
        warnings.warn(message, stacklevel=2)
    return policy, evidence


def _warnings(curves: Curves) -> tuple[str, ...]:
    """What makes the choice less certain than its intervals say."""
    usable = _usable(curves)
    if usable >= FEW:
        return ()
    return (
        f"only {usable} samples tell about decoding: with fewer than {FEW} the settings miss the"
        " target on new questions more often than the intervals say; calibrate on more",
    )


def _usable(curves: Curves) -> int:
    """Samples with a picture and a decode step."""
    return int(curves.secondary.notnull().any("secondary").sum())


# -- measuring -------------------------------------------------------------------------------------


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
        InputError: pictures or prompts that cannot be used; no answer of two tokens about a
            picture.
    """
    statistics: list[Any] = [
        ModalityMass(),
        PrefillMass(secondaries=SHARES),
        HeldCoreMass(secondaries=SHARES, fractions=SHARES, ages=MAX_REFRESH),
    ]
    if prefill_layer is not None:
        layers = describe(vlm.model).layers
        if not 1 <= prefill_layer < layers:
            raise InputError(
                f"prefill_layer {prefill_layer}: this model has {layers} layers; choose 1 to"
                f" {layers - 1}"
            )
        statistics.append(LayerAgreement(prefill_layer=prefill_layer, ps=SHARES))
    recordings: list[Recording] = []
    text: list[np.ndarray] = []

    def answer(places: Sequence[int]) -> None:
        recording = record_samples(
            vlm,
            [samples[place] for place in places],
            max_new_tokens=max_new_tokens,
            batch_size=len(places),
            statistics=[*statistics, AccumulatedScore()],
            keep="attention",
            queries="steps",
            maps=False,
            first_sample=places[0],
            on_token=None if progress is None else lambda *_: progress(places[0], len(samples)),
        )
        # The raw weights of one batch are in memory at a time: of all they would be gigabytes.
        attention = recording.drop_attention()
        for name in recording.samples:
            text.append(caught(TextTrace.of(recording, name, attention), SHARES))
        recordings.append(recording)
        if progress is not None:
            progress(places[-1] + 1, len(samples))

    size = batch_size
    while len(text) < len(samples):
        batch = range(len(text), min(len(text) + size, len(samples)))
        for places, failure in halved(answer, batch, failures=(RawLimitError,)):
            if isinstance(failure, Failure):
                raise InputError(
                    f"sample {samples[places[0]].id} cannot be calibrated on ({failure.reason});"
                    " choose a smaller max_new_tokens"
                )
            size = min(size, len(places))  # what did not fit once will not fit the next time
    return from_recording(merge(recordings), np.array(text))


def from_recording(recording: Recording, text: np.ndarray) -> Curves:
    """Curves of a recording with the statistics of `measure`, and of text eviction.

    The latter is (samples, shares).

    Raises:
        InputError: a recording without these statistics.
    """
    try:
        shares, hits = recording["prefill_mass"], recording["held_core_mass"]
        mass = (
            recording["modality_mass"]
            .sel(key_modality="image", drop=True)
            .isel(step=slice(1, None))
        )
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
        LayerCurves(shares, hits, weight),
    )


def _together(values: xr.DataArray, weight: xr.DataArray) -> xr.DataArray:
    """Mean over layers, weighted; NaN where no layer has a value."""
    known = weight.where(values.notnull())
    # Layers that are undefined (no picture, no attention on it) have no weight.
    total = known.sum("layer")
    return (values * known).sum("layer") / total.where(total > 0)


# -- choosing --------------------------------------------------------------------------------------


def choose(
    curves: Curves, target: float, prefill_layer: int | None = None, *, per_layer: bool = False
) -> tuple[AdaptivePolicy, list[Choice]]:
    """The policy whose settings are the smallest that keep `target`, and the reason for each.

    Raises:
        InputError: fewer than five samples with a decode step after a picture.
    """
    if (usable := _usable(curves)) < LEAST_SAMPLES:
        raise InputError(
            f"{usable} of the samples have a picture and an answer of at least two tokens; only"
            f" decode steps can be calibrated, and an interval needs {LEAST_SAMPLES} samples: ask"
            " questions with longer answers, such as descriptions"
        )
    text = text_choice(curves.text, target)
    if per_layer:
        chosen, choices = _choose_by_layer(curves, target)
    else:
        secondary = smallest_choice(
            curves.secondary, "secondary", target, "image attention of the decode steps"
        )
        assert secondary.value is not None
        # Cores as they are when this many tokens are held: the policy chooses its core among them.
        among_held = curves.core.sel(secondary=secondary.value, drop=True)
        core, refresh = core_choice(among_held, float(secondary.value), target)
        choices = [secondary, core, refresh]
        chosen = {choice.setting: choice.value for choice in choices}
    chosen["text"] = text.value
    choices.append(text)
    if prefill_layer is not None and curves.agreement is not None:
        held = chosen["secondary"]
        # No layer may hold tokens that the filter has taken away.
        least = max(held) if isinstance(held, tuple) else float(held)
        filter_ = prefill_choice(curves.agreement, target, prefill_layer, least)
        chosen |= {"prefill": filter_.value, "prefill_layer": prefill_layer}
        choices.append(filter_)
    return AdaptivePolicy(**chosen), choices


def _choose_by_layer(curves: Curves, target: float) -> tuple[dict[str, Any], list[Choice]]:
    """`secondary`, `core` and `refresh_every`, the first two as one number per layer."""
    if curves.layers is None:
        raise InputError(
            "these curves are of all layers together; measure them by layer to choose by layer"
        )
    secondary = secondary_by_layer(curves.layers.secondary, target)
    held = tuple(float(choice.value or 0) for choice in secondary)
    among_held = curves.layers.core.sel(secondary=_per_layer(held, curves.layers))
    cores, refresh = cores_by_layer(among_held.drop_vars("secondary"), held, target)
    sizes = None if refresh.value == 0 else tuple(float(choice.value or 0) for choice in cores)
    chosen = {"secondary": held, "core": sizes, "refresh_every": refresh.value}
    return chosen, [*secondary, *cores, refresh]


# -- verifying -------------------------------------------------------------------------------------


def kept(curves: Curves, policy: AdaptivePolicy) -> dict[str, dict[str, float | int | None]]:
    """What a policy's numbers keep of these samples' attention, by setting.

    Attention is that under the full cache.
    """
    found: dict[str, xr.DataArray] = {}
    if policy.secondary is not None:
        found["secondary"] = _at(curves, "secondary", secondary=policy.secondary)
    if policy.core is not None and policy.refresh_every > 1:
        held = 1.0 if policy.secondary is None else policy.secondary
        # By the age of the core; `refresh_every` - 1 steps is the oldest that is used.
        aged = _at(curves, "core", secondary=held, core=policy.core)
        found["core"] = aged.sel(core_age=policy.refresh_every - 1)
    if policy.text is not None:
        found["text"] = curves.text.sel(share=policy.text)
    estimates: dict[str, dict[str, float | int | None]] = {}
    for setting, values in found.items():
        one = mean_interval(values.values)
        estimates[setting] = {
            "mean": _plain(one.mean),
            "low": _plain(one.low),
            "high": _plain(one.high),
            "n": one.n,
        }
    return estimates


def _at(curves: Curves, name: str, **settings: float | tuple[float, ...]) -> xr.DataArray:
    """A curve at some settings, one share each or one per layer, all layers taken together.

    Args:
        curves: what was recorded.
        name: "secondary" or "core".
        settings: dimension of the curve -> its share, or shares of all layers.
    """
    if not any(isinstance(value, tuple) for value in settings.values()):
        return getattr(curves, name).sel(settings)
    layers = curves.layers
    assert layers is not None
    own = {
        dim: _per_layer(value, layers) if isinstance(value, tuple) else value
        for dim, value in settings.items()
    }
    return _together(getattr(layers, name).sel(own), layers.weight)


def _per_layer(values: Sequence[float], layers: LayerCurves) -> xr.DataArray:
    """One number per layer, to select with."""
    return xr.DataArray(list(values), dims="layer", coords={"layer": layers.weight["layer"]})


def _measured(comparison: Comparison) -> dict[str, dict[str, float | int | None]]:
    table = comparison.table()
    rows = table[table.policy == "calibrated"]
    columns = ("mean", "low", "high", "difference", "difference_low", "difference_high")
    return {
        str(row["metric"]): {**{name: _plain(row[name]) for name in columns}, "n": int(row["n"])}
        for _, row in rows.iterrows()
    }


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
