"""Does keeping everything change nothing, and does the default policy keep what it says?

Two identities (the full policy, and A-VL with every share at one) against plain generation, for one
prompt and for a left-padded batch. Then twenty steps of the default policy, whose record of bytes
and keys is compared with what an observer on the same model sees handed to attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import avl
from avl.attention import AttentionCall, Forward
from avl.hooks import Observer, attached
from avl.tokens import Modality
from avl_analysis.conformance.build import Case
from avl_analysis.conformance.recording import Mismatch

# Shares of 1.0 leave A-VL's rules on (None would switch them off), so its own code ranks and
# chooses and must still drop nothing.
KEEP_ALL = (avl.FullPolicy(), avl.AdaptivePolicy(secondary=1.0, core=1.0, text=1.0))
IDENTITY_STEPS = 6
DEFAULT_STEPS = 20

ROUNDING = 1e-3
"""Largest difference of scores between plain attention and a policy that keeps everything."""


@dataclass
class _Sizes(Observer):
    """Keys that attention got in every pass and layer, and the bytes of one of them."""

    keys: list[dict[int, int]] = field(default_factory=list)
    slot: dict[int, int] = field(default_factory=dict)

    def begin(self, forward: Forward) -> None:
        self.keys.append({})

    def observe(self, call: AttentionCall, output: Tensor) -> None:
        # key: (batch, key/value heads, keys, head dim), as attention got it.
        self.keys[-1][call.layer] = call.key.shape[2]
        # Bytes of one position: a key and a value of every row and every key/value head.
        self.slot[call.layer] = sum(
            t[:, :, 0].numel() * t.element_size() for t in (call.key, call.value)
        )


@dataclass(frozen=True)
class Adapted:
    """What was found for one type.

    Attributes:
        layers: decoder layers the policy acts on.
        of: attention layers of the model.
        filled_share: bytes in use / bytes of the stock cache, at the end of the default policy's
            run.
    """

    layers: int
    of: int
    filled_share: float


@torch.no_grad()
def check_adapting(case: Case) -> Adapted:
    """Compare; raises `Mismatch`, or what the policy's machinery raises for a family it refuses."""
    for inputs in (case.inputs, case.batch):
        plain = _generate(case, inputs, IDENTITY_STEPS)
        for policy in KEEP_ALL:
            with avl.adaptive(case.model, policy):
                kept = _generate(case, inputs, IDENTITY_STEPS)
            _identical(plain, kept, policy)
    # Only the single prompt from here on: the counts expected below are those of one row.
    sizes = _Sizes()
    with (
        avl.adaptive(case.model, avl.AdaptivePolicy()) as session,
        attached(case.model, sizes),
    ):
        # The first token comes from the prompt's own pass, so one token more than decode steps.
        _generate(case, case.inputs, DEFAULT_STEPS + 1)
    usage = session.usage()
    _adds_up(case, usage, sizes)
    return Adapted(len(usage.layers), len(sizes.slot), usage.filled_share)


def _generate(case: Case, inputs: dict[str, Any], tokens: int) -> Any:
    return case.model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )


def _identical(plain: Any, kept: Any, policy: avl.Policy) -> None:
    for step, (one, other) in enumerate(zip(plain.scores, kept.scores, strict=True)):
        difference = float((one - other).abs().max())
        # Relative to the largest score, absolute where all scores are below 1.
        if difference > ROUNDING * max(1.0, float(one.abs().max())):
            raise Mismatch(
                f"{policy!r} keeps everything, yet scores of token {step} differ by"
                f" {difference:.1e}"
            )
    if not torch.equal(plain.sequences, kept.sequences):
        raise Mismatch(f"{policy!r} keeps everything, yet other tokens are generated")


def _adds_up(case: Case, usage: avl.Usage, sizes: _Sizes) -> None:
    """Bytes are keys times the bytes of a key; keys are what the default policy's shares leave."""
    # A pass without the policy, to learn how many tokens of each modality the prompt has.
    with attached(case.model, watch := _Layout()):
        case.model(**case.inputs)
    # Codes 0, 1 and 2; padding has -1, and a single prompt has none.
    system, image, text = (int(watch.layout.mask(Modality(code)).sum()) for code in range(3))
    if len(usage.steps) != DEFAULT_STEPS + 1:
        raise Mismatch(f"{DEFAULT_STEPS} decode steps were written down as {len(usage.steps) - 1}")
    for index, step in enumerate(usage.steps):
        # held: (layers, rows); the prompt is the only row.
        held = {layer: step.held[i][0] for i, layer in enumerate(usage.layers)}
        # Pass 0 sees the prompt, every further pass one generated token more.
        seen = case.inputs["input_ids"].shape[1] + index
        bytes_held = sum(held[layer] * sizes.slot[layer] for layer in usage.layers)
        # An evicted key's slot waits for the next key.
        freed = sum(sizes.slot[layer] for layer in usage.layers)
        if not bytes_held <= step.filled <= bytes_held + freed:
            raise Mismatch(
                f"step {index} of the default policy: {step.filled} bytes filled hold {bytes_held}"
                " bytes"
            )
        _equal(
            "bytes of the stock cache",
            step.full,
            sum(seen * sizes.slot[layer] for layer in usage.layers),
            index,
        )
        # Text keys held after this pass and after the one before: 0.7 of the text so far, but at
        # least 20 (`text` of the default policy and its floor), and never more than there are.
        texts, before = (min(n, max(round(0.7 * n), 20)) for n in (text + index, text + index - 1))
        # Image keys attended: all in the prompt's pass, all that are held (0.5) at every third
        # step, where the core is chosen anew, else the core (0.3). Numbers of image keys are
        # truncated, those of text rounded, as the policy does.
        core = image if index == 0 else int((0.5 if index % 3 == 0 else 0.3) * image)
        for i, layer in enumerate(usage.layers):
            _equal("keys held", held[layer], system + int(0.5 * image) + texts, index)
            _equal("keys handed to attention", sizes.keys[index][layer], step.attended[i][0], index)
            _equal(
                "keys attended",
                # Text keys are evicted after attention, so a decode step still reads those held
                # before it and its own new key.
                step.attended[i][0],
                system + core + (before + 1 if index else text),
                index,
            )
        if step.allocated < step.filled:
            raise Mismatch(
                f"step {index}: {step.allocated} bytes allocated hold {step.filled} bytes"
            )


class _Layout(Observer):
    def begin(self, forward: Forward) -> None:
        self.layout = forward.layout


def _equal(what: str, found: int, expected: int, step: int) -> None:
    if found != expected:
        raise Mismatch(f"step {step} of the default policy: {what} {found}, expected {expected}")
