"""Are there sinks among image tokens, where are they born, and do answers need them?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from avl_analysis.figures import Axis, Bar, Bars, Caption, Figure, Line, Lines, Rule
from avl_analysis.heads.sinks import SIGNATURES, flags, mass_on_sinks
from avl_analysis.intervals import (
    METHOD,
    Estimate,
    mean_interval,
    mean_intervals,
    paired_difference,
)
from avl_reports.findings import Finding, judge
from avl_reports.run import NotMeasured, Run, Section
from avl_reports.script import run_script

QUESTION = "Are there sinks among image tokens, where are they born, and do answers need them?"
SPARED = 0.1
"""Nats per answer token that hiding sinks may cost where answers do not need them."""
SLOTS = {"concentration": 1, "value drain": 2, "massive activation": 3}
WITHOUT = {
    "concentration": "without concentrated ones",
    "value drain": "without drained ones",
    "massive activation": "without massive ones",
}
SHORT = {
    "as many others hidden": "as many others",
    "others with as much attention hidden": "as much attention",
    "only sinks shown": "all but sinks",
    "only as many others shown": "all but as many",
}
"""Names of conditions that fit beside bars."""


def section(run: Run) -> Section:
    """Attention on the picture with and without sinks, where they lie, birth, and hiding them."""
    study = run.further("sinks")
    if not bool(np.isfinite(study["image_mass"]).any()):
        raise NotMeasured("no question of the sinks file could be answered")
    layer = Axis("layer", "index")
    panels = (
        Lines(
            layer,
            Axis("attention on the picture", "share", (0.0, 1.0)),
            _mass(study),
            title="with sinks and without",
        ),
        Lines(
            layer,
            Axis("largest dimension", "times root mean square"),
            _massive(study),
            (Rule(float(study.attrs["massive"]), "massive", "y"),),
            title="massive activation",
        ),
        _birth(study),
        _effects(study),
    )
    signature = str(study.attrs["signature"])
    what = (
        f"A sink has at least {study.attrs['concentrated']:g} times the attention of the mean image"
        f" token (concentration), at most {study.attrs['drained']:g} of the median value norm"
        " (value drain), or at least"
        f" {study.attrs['massive']:.1f} times the root mean square in a dimension in which the"
        " model's first token is massive. Attention is that of text rows, mean over heads. Below:"
        f" sinks by {signature}. Left: before, and after their embeddings changed places with those"
        " of ordinary tokens, just before the decoder. Right: loss of the answer's log-probability"
        " with tokens hidden from the text where they are sinks, with as many others hidden, with"
        " others of together as much attention, and with all hidden but the sinks, or but as many"
        " others; the model is led along its own answer."
    )
    count = int(np.isfinite(study["image_mass"]).any("layer").sum())
    caption = Caption(what, max(count, 1), run.model, METHOD)
    figure = Figure("sink_tokens", "Sinks among image tokens", panels, caption)
    return Section(QUESTION, figure, findings(study), sentence(study))


def findings(study: xr.Dataset) -> tuple[Finding, ...]:
    """Whether answers do without sinks, and whether the vision tower makes them."""
    loss = _loss(study, "sinks hidden")
    followed = birth_difference(study)
    return (
        Finding(
            "Image tokens that are sinks can be left out",
            "Hiding the sinks from the text, in the layers where they are sinks, costs"
            f" {loss.words('nats per answer token')}.",
            f"at most {SPARED:g} nats per token",
            judge(loss, "at most", SPARED),
        ),
        Finding(
            "Sinks are made before the decoder",
            "Exchanged with ordinary tokens, sinks get"
            f" {followed.words('times the mean attention')} more where their embeddings went than"
            " where they had been.",
            "above 0",
            judge(followed, "at least", 0.0),
        ),
    )


def birth_difference(study: xr.Dataset) -> Estimate[float]:
    """Attention after the exchange where embeddings went, minus that in the old place."""
    return paired_difference(study["followed"].values, study["stayed"].values)


def _loss(study: xr.Dataset, condition: str) -> Estimate[float]:
    # The change is below 0 where the answer loses; a loss is above.
    return mean_interval(-study["log_prob_change"].sel(condition=condition).values)


def sentence(study: xr.Dataset) -> str:
    """What was found, in plain sentences by rule."""
    parts = []
    dimensions = str(study.attrs["dimensions"])
    if not dimensions:
        parts.append("The model's own first token is massive in no dimension, so no image token is")
        parts[-1] += " a sink by that signature."
    signature = str(study.attrs["signature"])
    # (samples, layers, image tokens)
    found = flags(study, signature)
    # A token that is a sink in any layer counts once.
    per_question = float(found.any("layer").sum("token").mean())
    # NaN where a token is no sink, or where it is not known what it shows.
    known = study["on_object"].where(found)
    parts.append(f"By {signature}, {per_question:.1f} image tokens of a question are sinks.")
    if bool(np.isfinite(known).any()):
        by_layer = known.mean(("sample", "token"))
        places = ", ".join(
            f"{int(layer)}: {100 * float(share):.0f} %"
            for layer, share in zip(by_layer["layer"].values, by_layer.values, strict=True)
            if np.isfinite(share)
        )
        chance = float(study["on_object"].mean())
        parts.append(
            f"Shares of them that lie on something drawn, by layer: {places}; of all image tokens"
            f" {100 * chance:.0f} % do. Where most do, attention is concentrated on content, and"
            " “sink” is the wrong word."
        )
    return " ".join(parts)


def _mass(study: xr.Dataset) -> tuple[Line, ...]:
    """Attention on the picture by layer, all of it and without sinks of each signature."""
    layers = study["layer"].values.astype(float)
    total = study["image_mass"].transpose("sample", "layer")
    arrays = {"all image tokens": (total, 0)}
    for signature in SIGNATURES:
        # Without such a sink the curve would repeat the one of all tokens.
        if bool(flags(study, signature).any()):
            on_sinks = mass_on_sinks(study, signature).transpose("sample", "layer")
            arrays[WITHOUT[signature]] = (total - on_sinks, SLOTS[signature])
    lines = []
    for name, (values, slot) in arrays.items():
        found = mean_intervals(values.values)
        lines.append(Line(name, layers, found.mean, found.low, found.high, slot=slot))
    return tuple(lines)


def _massive(study: xr.Dataset) -> tuple[Line, ...]:
    """Largest dimension of the first token and of any image token, by layer."""
    layers = study["layer"].values.astype(float)
    lines = []
    for name, variable, slot in (
        ("first token", "first_largest", 0),
        ("any image token", "image_largest", 1),
    ):
        found = mean_intervals(study[variable].transpose("sample", "layer").values)
        lines.append(Line(name, layers, found.mean, found.low, found.high, slot=slot))
    return tuple(lines)


def _birth(study: xr.Dataset) -> Bars:
    """Attention of the sinks before the exchange, and after it in both places."""
    names = {
        "before": "before",
        "followed": "new place",
        "stayed": "old place",
    }
    found = [mean_interval(study[name].values) for name in names]
    values, low, high = (
        np.array([getattr(one, end) for one in found]) for end in ("mean", "low", "high")
    )
    return Bars(
        Axis("place", "name"),
        Axis("attention", "times the mean"),
        tuple(names.values()),
        (Bar("attention", values, low, high, slot=1),),
        (Rule(1.0, "mean", "x"),),
        horizontal=True,
        title="born before the decoder?",
    )


def _effects(study: xr.Dataset) -> Bars:
    """What hiding sinks, and others, costs an answer."""
    conditions = [str(name) for name in study["condition"].values]
    found = [_loss(study, name) for name in conditions]
    values, low, high = (
        np.array([getattr(one, end) for one in found]) for end in ("mean", "low", "high")
    )
    return Bars(
        Axis("hidden", "tokens"),
        Axis("loss", "nats per token"),
        tuple(SHORT.get(name, name) for name in conditions),
        (Bar("loss", values, low, high, slot=2),),
        (Rule(0.0, "", "x"),),
        horizontal=True,
        title="loss with these hidden",
    )


if __name__ == "__main__":
    run_script(section)
