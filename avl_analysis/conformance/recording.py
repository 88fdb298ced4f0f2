"""Is what the attention hooks shows of a model what the model computes?

Three comparisons, each exact in its own way: logits with and without an observer bit for bit;
softmax weights of every attention call against those the family's own eager attention returns; the
image tokens found in the prompt against those put there. All for a single prompt, for a left-padded
batch of two, and for the prefill and decode steps of a short generation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from avl.attention import AttentionCall, Forward, attention_weights
from avl.hooks import Observer, attached
from avl.tokens import Modality
from avl_analysis.capture.recorder import record
from avl_analysis.conformance.build import Case

EXACT = 1e-5
"""Largest difference between recorded and returned weights of one and the same eager attention
call.
"""

DRIFT = 5e-5
"""The same between SDPA and eager, whose hidden states differ by rounding from the second layer on.
"""

STEPWISE = 1e-3
"""The same between a decode step and the last row of the whole sequence as one prompt."""

STEPS = 4


class Mismatch(AssertionError):
    """A comparison failed; the message says which and by how much."""


@dataclass
class Watch(Observer):
    """Collects the weights of all attention calls, pass by pass."""

    passes: list[Forward] = field(default_factory=list)
    weights: list[list[tuple[int, Tensor]]] = field(default_factory=list)
    last: dict[int, Tensor] = field(default_factory=dict)

    def begin(self, forward: Forward) -> None:
        """Begin a list of weights."""
        self.passes.append(forward)
        self.weights.append([])

    def observe(self, call: AttentionCall, output: Tensor) -> None:
        """Keep the weights of one call."""
        # (batch, query heads, rows, keys)
        weights = attention_weights(call)
        self.weights[-1].append((call.layer, weights))
        total = call.forward.start + call.forward.tokens
        at = torch.arange(weights.shape[3]) if call.key_positions is None else call.key_positions
        # The last row by sequence position, (batch, query heads, total): a layer with a sliding
        # window is handed fewer keys than there are positions; the others keep 0.
        self.last[call.layer] = torch.zeros(*weights.shape[:2], total)
        self.last[call.layer][..., at] = weights[:, :, -1]


@dataclass(frozen=True)
class Recorded:
    """What was found for one type.

    Attributes:
        image_tokens, length: of the single prompt.
        layers: decoder layers seen, of how many.
        difference: largest difference from eager's weights; None where the family returns none.
    """

    image_tokens: int
    length: int
    layers: int
    of: int
    difference: float | None


@torch.no_grad()
def check_recording(case: Case) -> Recorded:
    """Compare; raises `Mismatch`, or what the attention hooks raises for a refused family."""
    watch = Watch()
    plain = case.model(**case.inputs).logits
    with attached(case.model, watch) as hooks:
        recorded = case.model(**case.inputs).logits
        family = hooks.family
    _same(plain, recorded, "logits of a prompt")
    _image_tokens(case, watch, family.image_token_ids)
    difference = _eager_weights(case, case.inputs, watch)
    padded = Watch()
    plain = case.model(**case.batch).logits
    with attached(case.model, padded):
        _same(plain, case.model(**case.batch).logits, "logits of a padded batch")
    # Where padding decides which blocks of keys are read, SDPA and eager read different ones.
    batch_difference = _eager_weights(case, case.batch, padded if case.ignores_padding else None)
    _generation(case)
    layers = {layer for layer, _ in watch.weights[0]}
    found = [d for d in (difference, batch_difference) if d is not None]
    return Recorded(
        image_tokens=int(watch.passes[0].layout.mask(Modality.IMAGE).sum()),
        length=case.inputs["input_ids"].shape[1],
        layers=len(layers),
        of=family.layers,
        difference=max(found) if found else None,
    )


def _same(one: Tensor, other: Tensor, what: str) -> None:
    if not torch.equal(one, other):
        raise Mismatch(
            f"recording changed the {what} by up to {float((one - other).abs().max()):.1e}"
        )


def _image_tokens(case: Case, watch: Watch, ids: tuple[int, ...]) -> None:
    found = watch.passes[0].layout.mask(Modality.IMAGE)
    placed = torch.isin(case.inputs["input_ids"], torch.tensor(ids))
    if not bool(placed.any()) or not torch.equal(found, placed):
        raise Mismatch(
            f"the layout finds {int(found.sum())} image tokens where the prompt has"
            f" {int(placed.sum())}"
        )


def _attentions(output: Any) -> list[Tensor]:
    """Weights that a model returns, layers without attention left out."""
    inner = getattr(output, "language_model_outputs", None)
    given = getattr(output, "attentions", None) or getattr(inner, "attentions", None) or ()
    return [weights for weights in given if weights is not None]


def _eager_weights(case: Case, inputs: dict[str, Any], sdpa: Watch | None) -> float | None:
    """Largest difference between the weights the hooks see and those that eager returns.

    Those of SDPA are compared, too, if they are given.
    """
    watch = Watch()
    with attached(case.eager, watch):
        returned = _attentions(case.eager(**inputs, output_attentions=True))
    if not returned:
        return None
    if len(returned) != len(watch.weights[0]):
        raise Mismatch(
            f"eager attention returned weights of {len(returned)} layers, the attention hooks saw"
            f" {len(watch.weights[0])}"
        )
    # (batch, 1, rows, 1). Rows of padding tokens are left out: nothing reads their output.
    valid = inputs["attention_mask"].bool()[:, None, :, None]
    worst = 0.0
    # Without SDPA's weights those of eager stand in, and the second comparison repeats the first.
    fast = sdpa or watch
    # All (batch, query heads, rows, keys), layer by layer.
    for own, (_, eager), (_, other) in zip(
        returned, watch.weights[0], fast.weights[0], strict=True
    ):
        for seen, allowed in ((eager, EXACT), (other, DRIFT)):
            # a row that its mask hides from every key: nothing recorded, and rounding makes eager's
            # softmax uniform
            blind = valid & (seen.sum(-1, keepdim=True) == 0)
            uniform = (own - 1 / own.shape[-1]).abs() < EXACT
            difference = float(
                ((seen - own.float().masked_fill(blind & uniform, 0.0)) * valid).abs().max()
            )
            if difference > allowed:
                raise Mismatch(
                    f"recorded weights differ from eager attention's by {difference:.1e}"
                )
            worst = max(worst, difference)
    return worst


def _generation(case: Case) -> None:
    """Prefill and decode steps: same scores bit for bit, eager's weights, one pass per token."""
    options = {
        "max_new_tokens": STEPS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    plain = case.model.generate(**case.inputs, **options)
    watch = Watch()
    with attached(case.model, watch):
        recorded = case.model.generate(**case.inputs, **options)
    for one, other in zip(plain.scores, recorded.scores, strict=True):
        _same(one, other, "scores of a generation")
    kinds = [forward.kind for forward in watch.passes]
    if kinds != ["prefill"] + ["decode"] * (STEPS - 1):
        raise Mismatch(f"a generation of {STEPS} tokens was followed as {kinds}")
    _positions(case, watch, recorded.sequences)
    _recorder(case, watch, options)
    watch = Watch()
    with attached(case.eager, watch):
        output = case.eager.generate(**case.inputs, **options, output_attentions=True)
    # Empty for families that return no weights; that case passes.
    for returned, seen in zip(output.attentions or (), watch.weights, strict=False):
        own = [weights for weights in returned if weights is not None]
        for weights, (_, recorded_weights) in zip(own, seen, strict=True):
            difference = float((recorded_weights - weights.float()).abs().max())
            if difference > EXACT:
                raise Mismatch(
                    "recorded weights of a decode step differ from eager attention's by"
                    f" {difference:.1e}"
                )


def _recorder(case: Case, watch: Watch, options: dict[str, Any]) -> None:
    """The recorder's sums over modalities are those of the weights of the last decode step."""
    with record(case.model, statistics=["modality_mass"]) as recording:
        case.model.generate(**case.inputs, **options)
    mass = recording["modality_mass"].isel(sample=0, step=-1)
    modality = watch.passes[-1].layout.modality[0]
    for layer, weights in watch.last.items():
        sums = [float(weights[0, :, modality == code].sum()) for code in range(3)]
        found = mass.sel(layer=layer).sum("head").values
        difference = max(abs(one - other) for one, other in zip(sums, found, strict=True))
        # Negated, so that NaN is a mismatch too.
        if not difference < STEPWISE:
            raise Mismatch(
                f"the recorder's modality mass of layer {layer} is off by {difference:.1e}"
            )


def _positions(case: Case, stepwise: Watch, sequence: Tensor) -> None:
    """The last decode step attended to the positions it says.

    It is compared with the same row of the whole sequence as one prompt.
    """
    # The last token was chosen but never fed to the model, so no row belongs to it.
    fed, length = sequence[:, :-1], case.inputs["input_ids"].shape[1]
    inputs = {**case.inputs, "input_ids": fed}
    for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            # Generated tokens are attended to, and are text (type 0).
            filler = 1 if name == "attention_mask" else 0
            inputs[name] = torch.nn.functional.pad(
                inputs[name], (0, fed.shape[1] - length), value=filler
            )
    whole = Watch()
    with attached(case.model, whole):
        case.model(**inputs)
    layers = sorted(stepwise.last)
    # Where a prompt sees ahead, generated tokens change the earlier hidden states once they are
    # part of it. Queries and keys of the first layer do not depend on other tokens yet.
    for layer in layers[:1] if case.sees_ahead else layers:
        difference = float((stepwise.last[layer] - whole.last[layer]).abs().max())
        if difference > STEPWISE:
            raise Mismatch(
                f"layer {layer} of the last decode step attends to other positions than recorded:"
                f" {difference:.1e}"
            )
