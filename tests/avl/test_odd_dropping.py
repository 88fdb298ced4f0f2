"""Dropping keys where attention is more than causal softmax: what a policy computes is what masking
would give.

The slow statement of A-VL keeps the stock cache and masks what is dropped, in the layers that
policies act on and only there. It knows nothing of windows, caps, sinks, rotary sections, linear
layers or experts: the model itself does those.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import avl
from avl.attention import Attend, AttentionCall
from avl.hooks import attached
from avl_analysis.conformance.build import Case, model_types, picture
from avl_analysis.conformance.inputs import pixels, prompt
from tests import tiny
from tests.avl.generating import difference, generate
from tests.avl.masked import MaskedAVL
from tests.avl.test_odd_attention import TEXTS, llava_over

RULES: dict[str, Any] = {"secondary": 0.5, "core": 0.2, "every": 3, "text": 0.3}
POLICY = avl.AdaptivePolicy(
    secondary=RULES["secondary"],
    core=RULES["core"],
    refresh_every=RULES["every"],
    text=RULES["text"],
)
STEPS = 14

LLAVA = {
    "soft-capping beside a window": "softcap",
    "sinks that are parameters beside a window": "sinks",
}
KINDS = {
    "three-part rotary positions": "qwen2_vl",
    "interleaved rotary positions": "qwen3_vl",
    "experts": "qwen3_vl_moe",
    "a prefix seen both ways": "paligemma",
    "pictures seen both ways, a window": "gemma3",
    "linear attention between": "qwen3_5",
    "short convolutions between": "lfm2_vl",
    "state spaces between": "nemotron_h_omni",
    "chunks between": "llama4",
    "a window between, positions in some layers only": "cohere_compass",
}
ACTS_ON_ALL = ("qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "paligemma")


class MaskedIn(MaskedAVL):
    """Masks in some layers and leaves the others alone."""

    def __init__(self, layers: tuple[int, ...], **rules: Any) -> None:
        super().__init__(**rules)
        self.layers = layers

    def attend(self, call: AttentionCall, inner: Attend) -> torch.Tensor:
        return super().attend(call, inner) if call.layer in self.layers else inner(call)


def _compare(model: Any, inputs: dict[str, Any]) -> tuple[int, ...]:
    """Run both, and without a policy; returns the layers the policy acted on."""
    with torch.no_grad(), avl.adaptive(model, POLICY) as session:
        dropped, dropped_logits = generate(model, inputs, STEPS)
    layers = session.usage().layers
    with torch.no_grad(), attached(model, MaskedIn(layers, **RULES)):
        tokens, logits = generate(model, inputs, STEPS)
    _, plain = generate(model, inputs, STEPS)
    scale = float(logits[torch.isfinite(logits)].abs().max())
    assert torch.equal(tokens, dropped)
    assert difference(logits, dropped_logits) < 1e-4 * max(1.0, scale)
    assert difference(plain, logits) > 1e-2  # what is dropped mattered
    return layers


@pytest.mark.parametrize("kind", LLAVA)
def test_dropping_equals_masking_with(kind):
    model = llava_over(TEXTS[LLAVA[kind]])
    assert _compare(model, tiny.inputs(model, batch=[40, 25])) == (1,)


@pytest.mark.parametrize(
    "kind", [k for k, model_type in KINDS.items() if model_type in model_types()]
)
def test_dropping_equals_masking_in_a_family_with(kind):
    case = Case(KINDS[kind])
    if case.defect:
        pytest.skip(case.defect)
    given = pixels(case.model_type, case.config, [picture()])
    inputs = prompt(case.model, given, before=6, after=(40, 27))
    layers = _compare(case.model, inputs)
    if case.model_type in ACTS_ON_ALL:
        assert layers == tuple(range(case.family.layers))
    else:
        assert len(layers) < case.family.layers
