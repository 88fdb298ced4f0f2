"""Sinks among image tokens: found by three signatures, traced to where they are born, and hidden.

`study_sinks` answers each question once while `sink_signatures` watches, and then three times more:

* With the embeddings of the sinks exchanged for those of as many ordinary image tokens before the
  decoder. A sink that moves with its embedding was made by the vision tower or the projector; one
  that stays in its place is made by the decoder.
* Led along its answer with the sinks hidden from the text, in the layers where they are sinks;
  beside it with as many other image tokens hidden, and with others that together get as much
  attention (all others, where sinks get more than half of a layer's).
* Led with nothing of the picture but the sinks shown, and with nothing but as many others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from avl.families import describe
from avl.hooks import attached
from avl_analysis.capture.provenance import provenance
from avl_analysis.corpus.batches import (
    Failure,
    batches_by_length,
    halve_on_failure,
    images_encoded_once,
)
from avl_analysis.corpus.questions import Sample
from avl_analysis.errors import InputError
from avl_analysis.evaluation.generation import generate
from avl_analysis.heads.hidden_tokens import exchanged_embeddings, hidden_tokens
from avl_analysis.heads.led_answers import lead
from avl_analysis.heads.object_tokens import object_tokens
from avl_analysis.heads.sink_signatures import HiddenStates, SinkObserver, layer_inputs
from avl_analysis.heads.sinks import CONDITIONS, VARIABLES, Thresholds, check_signature
from avl_analysis.models.loading import VLM

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class _StudyPlan:
    """What is done with every question."""

    signature: str
    thresholds: Thresholds
    dimensions: tuple[int, ...]
    draws: int
    max_new_tokens: int


def study_sinks(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    signature: str = "concentration",
    draws: int = 3,
    seed: int = 0,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Signatures of every image token, where sinks are born, and what hiding them does.

    Args:
        vlm: a loaded model without a policy.
        samples: questions with an image.
        signature: by which sinks are chosen for what is done to them, one of `SIGNATURES`.
        draws: random sets of other tokens; results are means over them.
        seed: of these draws.
        max_new_tokens: longest answer, in tokens.
        batch_size: questions per pass.
        progress: called with (questions done, questions in all).

    Returns:
        By sample, layer and token (NaN behind a sample's last): `attention` (times the mean image
        token), `value_norm` (times the median), `massive` (times the root mean square, in the
        model's own sink dimensions; NaN if it has none). By sample and token: `input_norm` (times
        the median, before the first layer), `on_object` (1, 0, NaN if unknown). By sample and
        layer: `image_mass` (share of a text row's attention), `image_largest` (largest dimension of
        any image token over its root mean square), `first_mass`, `first_value_norm`,
        `first_largest` of the first token. By sample: `followed`, `stayed`, `before`: attention
        (times the mean image token) of the sinks after the exchange where their embeddings went,
        where they had been, and before it. By sample and condition: `log_prob_change` (nats per
        answer token), `same_answer`, `hidden_attention` (share of the attention on the picture).
        Attribute `dimensions` lists the model's sink dimensions.

    Raises:
        InputError: no samples, no image, an unknown signature, or every sample failed.
        avl.families.UnsupportedModelError: the model cannot be followed.
    """
    family = describe(vlm.model)
    check_signature(signature)
    if not samples or draws < 1:
        raise InputError(
            f"{len(samples)} questions and {draws} draws: at least one of each is needed"
        )
    if imageless := [sample.id for sample in samples if not sample.images]:
        raise InputError(f"{imageless[0]} has no image, so no image token can be a sink")
    dimensions, width = find_dimensions(vlm, samples[:batch_size])
    plan = _StudyPlan(
        signature, Thresholds.of_width(width), tuple(dimensions), draws, max_new_tokens
    )
    rows: list[dict[str, Any] | None] = [None] * len(samples)
    reasons: list[str] = []
    done = 0
    for indices in batches_by_length(vlm, samples, batch_size):

        def study(part: Sequence[int]) -> list[dict[str, Any]]:
            # Seeded by the first question, so that what is drawn does not depend on the batches
            # before.
            rng = np.random.default_rng([seed, part[0]])
            chosen = [samples[index] for index in part]
            with images_encoded_once(vlm.model):
                return _study_batch(vlm, chosen, plan, rng)

        for index, found in zip(indices, halve_on_failure(study, indices), strict=True):
            if isinstance(found, Failure):
                reasons.append(found.reason)
            else:
                rows[index] = found
        done += len(indices)
        if progress is not None:
            progress(done, len(samples))
    if len(reasons) == len(samples):
        raise InputError(f"none of the {len(samples)} questions could be answered: {reasons[0]}")
    attrs = {
        **provenance(vlm.model, family, ()),
        "signature": signature,
        "dimensions": " ".join(map(str, dimensions)),
        **asdict(plan.thresholds),
        "draws": draws,
        "max_new_tokens": max_new_tokens,
    }
    return _dataset([sample.id for sample in samples], rows, family.layers).assign_attrs(attrs)


def find_dimensions(vlm: VLM, samples: Sequence[Sample]) -> tuple[list[int], int]:
    """Dimensions in which the model's first token is massive in some layer, and its width.

    Largest first; empty if there is none. Means over the samples, one at a time.
    """
    firsts: list[np.ndarray] = []
    for sample in samples:
        watch = SinkObserver(describe(vlm.model).layers)
        _, states, found = _watched(vlm, [sample], watch, (), max_new_tokens=1)
        if not found:
            return [], 1
        # (layers, width) of the only row of the batch.
        firsts.append(np.stack([first[0] for first in states.first]))
    # (width,): mean over samples, then the largest layer, as the first token is massive in some
    # only.
    mean = np.mean(firsts, 0).max(0)
    order = np.argsort(-mean)
    least = Thresholds.of_width(mean.size).massive
    chosen = [int(d) for d in order if mean[d] >= least]
    return chosen, int(mean.size)


# -- one batch -------------------------------------------------------------------------------------


def _watched(
    vlm: VLM,
    samples: Sequence[Sample],
    watch: SinkObserver,
    dimensions: Sequence[int],
    *,
    max_new_tokens: int,
    forced: Sequence[Sequence[int]] | None = None,
) -> tuple[list[list[int]], HiddenStates, bool]:
    """Answer a batch under observation: token ids, hidden states, whether layers were found."""
    layers = describe(vlm.model).layers
    held: list[HiddenStates] = []

    def keep(layer: int, hidden: Any) -> None:
        # Made late: the places of first tokens are known only once `watch` has seen the pass begin.
        if not held:
            held.append(HiddenStates(layers, watch.first_places, dimensions))
        held[0].keep(layer, hidden)

    with attached(vlm.model, watch), layer_inputs(vlm.model, keep) as found:
        run = generate(vlm, samples, None, max_new_tokens=max_new_tokens, forced=forced)
    if not held:
        return run.tokens, HiddenStates(layers, watch.first_places), False
    return run.tokens, held[0], found


def _study_batch(
    vlm: VLM, samples: Sequence[Sample], plan: _StudyPlan, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """All numbers of the questions of one batch."""
    layers, longest = describe(vlm.model).layers, plan.max_new_tokens
    watch = SinkObserver(layers)
    tokens, states, found = _watched(vlm, samples, watch, plan.dimensions, max_new_tokens=longest)
    seen = [_seen(watch, states if found else None, row) for row in range(len(samples))]
    numbers = [[one[name] for name in ("attention", "value_norm", "massive")] for one in seen]
    sinks = [plan.thresholds.holds(plan.signature, *some) for some in numbers]
    objects = object_tokens(vlm, samples)
    pairs = [_partners(one, rng) for one in sinks]
    moved = SinkObserver(layers)
    # Led along the first answer, so that both runs have the same text rows to sum over.
    with exchanged_embeddings(vlm.model, pairs):
        _watched(vlm, samples, moved, (), max_new_tokens=longest, forced=tokens)
    effects = _effects(vlm, samples, tokens, [some[0] for some in numbers], sinks, plan.draws, rng)
    return [
        {
            **one,
            "on_object": objects[row],
            **_birth(one["attention"], _relative_attention(moved, row), sinks[row], pairs[row]),
            **effects[row],
        }
        for row, one in enumerate(seen)
    ]


def _relative_attention(watch: SinkObserver, row: int) -> np.ndarray:
    """(layers, image tokens): attention of text rows over that of the mean image token."""
    received = watch.received[row]
    mean = received.mean(1, keepdims=True) if received.shape[1] else received.sum(1, keepdims=True)
    return np.divide(received, mean, out=np.full(received.shape, np.nan), where=mean > 0)


def _seen(watch: SinkObserver, states: HiddenStates | None, row: int) -> dict[str, np.ndarray]:
    """What was seen of one row of a batch; what the model does not show is NaN."""
    places = watch.places[row].numpy()
    values = watch.value_norm[row]
    layers, count = values.shape
    if not count:
        raise InputError("this question has no image token")
    massive, norm = np.full((layers, count), np.nan), np.full(count, np.nan)
    largest, first_largest = np.full(layers, np.nan), np.full(layers, np.nan)
    if states is not None:
        massive = np.stack([one[row][places] for one in states.chosen])
        largest = np.stack([one[row][places].max() for one in states.largest])
        first_largest = np.stack([one[row].max() for one in states.first])
        norm = states.norm[0][row][places]
    # (layers,). The median, as a few drained or very long values would move a mean.
    middle = np.median(values, 1)
    return {
        "attention": _relative_attention(watch, row),
        "value_norm": values / middle[:, None],
        "massive": massive,
        "input_norm": norm / np.median(norm),
        "image_mass": watch.received[row].sum(1) / watch.rows[row],
        "image_largest": largest,
        "first_mass": watch.first[:, row] / watch.rows[row],
        "first_value_norm": watch.first_value_norm[:, row] / middle,
        "first_largest": first_largest,
    }


def _partners(sinks: Flags, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Every token that is a sink in some layer with an ordinary one of its own, at random.

    Sinks beyond the number of ordinary tokens are left out.
    """
    # The exchange is before the decoder, so one pair holds for all layers.
    is_sink = sinks.any(0)
    ordinary = rng.permutation(np.flatnonzero(~is_sink))
    return [
        (int(sink), int(other))
        for sink, other in zip(np.flatnonzero(is_sink), ordinary, strict=False)
    ]


def _birth(
    before: np.ndarray, after: np.ndarray, sinks: Flags, pairs: Sequence[tuple[int, int]]
) -> dict[str, float]:
    """Mean attention of the sinks, in the layers where they are sinks, before and after.

    Args:
        before: (layers, image tokens) times the mean image token.
        after: the same after the exchange.
        sinks: (layers, image tokens).
        pairs: (sink, ordinary token) that were exchanged.
    """
    found: dict[str, list[float]] = {"before": [], "stayed": [], "followed": []}
    for sink, other in pairs:
        for layer in np.flatnonzero(sinks[:, sink]):
            found["before"].append(before[layer, sink])
            found["stayed"].append(after[layer, sink])
            found["followed"].append(after[layer, other])
    return {name: float(np.mean(values)) if values else np.nan for name, values in found.items()}


def _effects(
    vlm: VLM,
    samples: Sequence[Sample],
    tokens: Sequence[Sequence[int]],
    attention: Sequence[np.ndarray],
    sinks: Sequence[Flags],
    draws: int,
    rng: np.random.Generator,
) -> list[dict[str, np.ndarray]]:
    """What becomes of each answer under each of `CONDITIONS`; NaN where nothing is a sink."""
    plain = lead(vlm, samples, tokens)
    shape = (len(samples), len(CONDITIONS))
    change, same, hidden_share = (np.full(shape, np.nan) for _ in range(3))
    for place, condition in enumerate(CONDITIONS):
        # Conditions that draw nothing give the same every time.
        repeated = 1 if condition in ("sinks hidden", "only sinks shown") else draws
        runs = []
        for _ in range(repeated):
            hidden = [
                _hidden(condition, one, scores, rng)
                for one, scores in zip(sinks, attention, strict=True)
            ]
            led = lead(vlm, samples, tokens, hidden_tokens(vlm.model, hidden))
            runs.append((hidden, led))
        for row, one in enumerate(sinks):
            if one.any():
                change[row, place] = np.mean([led[row].change(plain[row]) for _, led in runs])
                same[row, place] = np.mean([led[row].same for _, led in runs])
                shares = [_share(attention[row], hidden[row]) for hidden, _ in runs]
                hidden_share[row, place] = np.mean(shares)
    names = ("log_prob_change", "same_answer", "hidden_attention")
    return [
        dict(zip(names, (change[row], same[row], hidden_share[row]), strict=True))
        for row in range(len(samples))
    ]


def _share(attention: np.ndarray, hidden: Flags) -> float:
    """Share of the attention on the picture that is hidden, mean over layers."""
    known = np.nan_to_num(attention)
    total = known.sum(1)
    held = np.where(hidden, known, 0.0).sum(1)
    return float(np.divide(held, total, out=np.zeros(total.shape), where=total > 0).mean())


def _hidden(condition: str, sinks: Flags, attention: np.ndarray, rng: np.random.Generator) -> Flags:
    """(layers, image tokens) that a condition hides.

    "only ... shown" hides all tokens but those, in every layer; a layer without a sink then shows
    nothing of the picture.

    Args:
        condition: one of `CONDITIONS`.
        sinks: (layers, image tokens).
        attention: (layers, image tokens).
        rng: draws the others.
    """
    if condition == "sinks hidden":
        return sinks
    if condition == "only sinks shown":
        return ~sinks
    chosen = np.zeros_like(sinks)
    for layer, own in enumerate(sinks):
        # Drawn anew in every layer, as sinks differ by layer, too.
        others = rng.permutation(np.flatnonzero(~own))
        count = int(own.sum())
        if condition == "others with as much attention hidden":
            wanted = np.nan_to_num(attention[layer][own]).sum()
            held = np.cumsum(np.nan_to_num(attention[layer][others]))
            # The fewest of the others, in random order, that hold at least as much. If all together
            # hold less, `count` is beyond their number and the slice takes all of them.
            count = int(np.searchsorted(held, wanted)) + 1 if count else 0
        chosen[layer, others[:count]] = True
    return ~chosen if condition == "only as many others shown" else chosen


def _dataset(
    names: Sequence[str], rows: Sequence[dict[str, Any] | None], layers: int
) -> xr.Dataset:
    """The rows of all samples as labelled arrays, NaN where there is nothing."""
    most = max(row["on_object"].size for row in rows if row is not None)
    sizes = {"layer": layers, "token": most, "condition": len(CONDITIONS)}
    variables = {}
    for name, dims in VARIABLES.items():
        array = np.full((len(rows), *(sizes[dim] for dim in dims[1:])), np.nan)
        for index, row in enumerate(rows):
            if row is not None:
                value = np.asarray(row[name])
                # The front of each axis; a sample with fewer image tokens stays NaN behind its
                # last.
                place: tuple[Any, ...] = tuple(slice(size) for size in value.shape)
                array[(index, *place)] = value
        variables[name] = (dims, array)
    coords = {"sample": list(names), "layer": range(layers), "condition": list(CONDITIONS)}
    return xr.Dataset(variables, coords)
