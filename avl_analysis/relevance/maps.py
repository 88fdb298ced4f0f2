"""Relevance maps of one answer token over the image, beside the raw attention weights.

Five answers to "which image tokens mattered for this word", each by its own formula:

* raw: the softmax weights A of the row that produces the word.
* value: A |v|, v the value vector that the head reads at the token. A weight says how much of a
  token is taken, its product with the length of what is taken how much arrives (Kobayashi et al.,
  "Attention is not only a weight", 2004.10102). Their f(x) also goes through the head's part of the
  output projection, which is left out here as in the statistic `value_weighted_mass`.
* relative: A over the weights of the last row of a generic instruction about the same image, image
  token by image token, each averaged over heads before the division ("MLLMs Know Where to Look",
  2502.17422, relative attention). 1 means: no more than under any question.
* gradient: A x max(0, dA), dA the gradient of the word's log-probability with respect to A (the
  same paper, gradient-weighted attention).
* chefer: the row of R - I, where R <- R + (mean over heads of max(0, dA x A)) R from the first
  layer to the last and dA is the gradient of the word's logit (Chefer et al., 2103.15679, rules 5
  and 6; lvlm-interpret, 2404.03118, shows it for LLaVA). One map for all layers and heads.

The answer is fed to the model as a prompt, so a map is of the very sequence that was generated. For
a later word that differs from lvlm-interpret, which takes the rows of earlier words from their own
backward passes.

None of these says that the model would answer otherwise without a patch; only taking it away does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avl.tokens import Modality, TokenLayout
from avl_analysis.corpus.questions import Sample
from avl_analysis.errors import InputError
from avl_analysis.figures.patches import Patches
from avl_analysis.models.checkpoint import EMBEDDED
from avl_analysis.models.loading import VLM
from avl_analysis.recordings.image_tokens import ImageTokens, images_of_layout
from avl_analysis.relevance import METHODS
from avl_analysis.relevance.gradients import attention_gradients, last_row_weights

GENERIC = "Write a general description of the image."
"""The generic instruction of 2502.17422."""
GENERIC_SCENES = "Describe the picture."
"""The same for the embedded model, which knows few words."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Relevance:
    """The maps of one answer token.

    Attributes:
        model: name of the model.
        step: number of the answer token, from 0.
        word: its text.
        probability: what the model gave it, in [0, 1].
        instruction: the generic instruction that relative attention is relative to.
        layers: decoder layers with attention weights.
        raw: (layers, heads, positions) weights of the row that produces the token.
        value_norm: (layers, heads, positions) length of the value vector that a head reads there.
        weighted: the same times the positive part of their gradient.
        generic: (layers, heads, image tokens) weights of the last row of the generic prompt.
        propagated: (positions,) Chefer relevance.
        position: (image tokens,) positions of the image tokens, in order.
        images: the tokens of every image and the part of the image under each.
    """

    model: str
    step: int
    word: str
    probability: float
    instruction: str
    layers: tuple[int, ...]
    raw: NDArray[np.float32]
    value_norm: NDArray[np.float32]
    weighted: NDArray[np.float32]
    generic: NDArray[np.float32]
    propagated: NDArray[np.float32]
    position: NDArray[np.int64]
    images: tuple[ImageTokens, ...]

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return int(self.raw.shape[1])

    def of(self, method: str, layer: int | None = None, head: int | None = None) -> Floats:
        """(image tokens,) one map; NaN where it is not defined.

        Args:
            method: one of `METHODS`.
            layer: a decoder layer; None for the mean over layers. Not read for "chefer".
            head: a query head; None for the mean over heads. Not read for "chefer".

        Raises:
            InputError: a method, layer or head that is not there.
        """
        if method not in METHODS:
            raise InputError(f"unknown map {method!r}: choose one of {', '.join(METHODS)}")
        if method == "chefer":
            return self.propagated[self.position].astype(np.float64)
        # `raw`, `value_norm` and `weighted` have a column per position of the sequence, `generic`
        # one per image token.
        source = self.weighted if method == "gradient" else self.raw
        if method == "value":
            # Multiplied head by head: the mean over heads is of what each of them reads.
            source = self.raw * self.value_norm
        values = self._mean(source[..., self.position], layer, head)
        if method != "relative":
            return values
        # The means are divided, rather than the mean taken of quotients: a head with hardly any
        # weight on a token could otherwise dominate the map.
        usual = self._mean(self.generic, layer, head)
        return np.divide(values, usual, out=np.full(values.shape, np.nan), where=usual > 0)

    def patches(
        self, method: str, layer: int | None = None, head: int | None = None, image: int = 0
    ) -> Patches:
        """One map, to be laid over an image.

        Args:
            method: as in `of`.
            layer: as in `of`.
            head: as in `of`.
            image: which image of the prompt.

        Raises:
            InputError: as `of`; no such image, or it is not known where its tokens lie.
        """
        known = [number for number, tokens in enumerate(self.images) if tokens.placed]
        if image not in known:
            raise InputError(
                f"image {image} has no tokens with a known place, so there is nothing to draw over"
                f" it; images with known places: {', '.join(map(str, known)) or 'none'}"
            )
        tokens = self.images[image]
        return tokens.patches(self.of(method, layer, head)[tokens.token])

    def _mean(
        self, values: NDArray[np.float32], layer: int | None, head: int | None
    ) -> NDArray[np.float64]:
        """(image tokens,) mean over what is not chosen."""
        if layer is not None and layer not in self.layers:
            raise InputError(
                f"layer {layer} is not there: layers {self.layers[0]} to {self.layers[-1]} have"
                " attention weights"
            )
        if head is not None and not 0 <= head < self.heads:
            raise InputError(f"head {head} is not there: this model has 0 to {self.heads - 1}")
        # Lists as indices keep both axes, so that one mean serves all cases. `layers` holds numbers
        # of decoder layers, which need not be their places in the array.
        rows = values if layer is None else values[[self.layers.index(layer)]]
        rows = rows if head is None else rows[:, [head]]
        return rows.astype(np.float64).mean((0, 1))


def relevance(
    vlm: VLM,
    sample: Sample,
    answer: Sequence[int],
    step: int = 0,
    *,
    instruction: str | None = None,
) -> Relevance:
    """The maps of one token of an answer: two forward and two backward passes over the prompt.

    Args:
        vlm: a loaded model without a policy.
        sample: the question, with at least one image.
        answer: token ids of the answer, at least `step` + 1.
        step: number of the answer token, from 0.
        instruction: the generic instruction; None takes `GENERIC`, for the embedded model
            `GENERIC_SCENES`.

    Raises:
        InputError: no image, a token the answer does not have, images or prompts that cannot be
            used.
        avl.families.UnsupportedModelError: the model cannot be followed, or not differentiated.
        avl.hooks.HookError: a policy is on the model.
    """
    if not sample.images:
        raise InputError("a question without an image has no image tokens to be relevant")
    if not 0 <= step < len(answer):
        raise InputError(f"token {step} is not there: the answer has tokens 0 to {len(answer) - 1}")
    instruction = instruction or generic_instruction(vlm)
    images = list(sample.images)
    # The last row of prompt and answer[:step] is the one that predicts answer[step].
    inputs = with_answer(
        vlm.prepare(images, sample.prompt, system=sample.system, history=sample.history),
        list(answer[:step]),
    )
    found = attention_gradients(vlm.model, inputs, torch.tensor([int(answer[step])]))
    layers, generic, other = last_row_weights(
        vlm.model, vlm.prepare(images, instruction, system=sample.system)
    )
    position, usual = _image_positions(found.layout), _image_positions(other)
    # Image tokens are matched by their order: their positions differ between two prompts. A
    # processor that cuts the image differently for another prompt would leave nothing to match.
    if len(position) != len(usual):
        raise InputError(
            f"the image has {len(position)} tokens under the question and {len(usual)} under the"
            f" instruction {instruction!r}, so their attention cannot be compared"
        )
    assert layers == found.layers
    return Relevance(
        vlm.name,
        step,
        vlm.processor.tokenizer.decode([int(answer[step])]),
        float(found.log_prob[0].exp()),
        instruction,
        layers,
        found.raw[0].numpy(),
        found.value_norm[0].numpy(),
        found.weighted[0].numpy(),
        generic[0][..., torch.from_numpy(usual)].numpy(),
        found.propagated[0].numpy(),
        position,
        images_of_layout(found.layout, 0),
    )


def generic_instruction(vlm: VLM) -> str:
    """The generic instruction for a model, in words it knows."""
    return GENERIC_SCENES if vlm.name == EMBEDDED else GENERIC


def with_answer(inputs: Mapping[str, Any], answer: Sequence[int]) -> dict[str, Any]:
    """Prepared inputs of one prompt with the first tokens of an answer behind it.

    Args:
        inputs: what `VLM.prepare` returned for one prompt.
        answer: token ids; none leaves the inputs as they are.
    """
    ids = inputs["input_ids"]
    if not answer:
        return dict(inputs)
    new = torch.tensor([list(answer)], dtype=ids.dtype, device=ids.device)
    longer: dict[str, Any] = {}
    for name, value in inputs.items():
        # Masks and token types have one number per token; of what an answer's tokens are, text,
        # processors write 0.
        if isinstance(value, Tensor) and value.shape == ids.shape:
            # An answer's tokens are seen like all others, hence 1 in the mask.
            fill = {"input_ids": new, "attention_mask": torch.ones_like(new)}.get(
                name, torch.zeros_like(new)
            )
            value = torch.cat([value, fill.to(value.dtype)], 1)
        longer[name] = value
    return longer


def _image_positions(layout: TokenLayout) -> NDArray[np.int64]:
    """(image tokens,) positions of the image tokens of the only row."""
    return (layout.modality[0] == Modality.IMAGE).nonzero().flatten().numpy()
