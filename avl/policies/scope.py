"""SCOPE (Deng et al., 2025, arXiv 2510.24214)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.policies.before_decoder import BeforeDecoderPolicy, ImageTokens, cosines


@dataclass(frozen=True, kw_only=True)
class SCOPEPolicy(BeforeDecoderPolicy):
    """Image tokens that cover the others, weighted by the encoder's attention (SCOPE).

    Deng et al., 2025, arXiv 2510.24214.

    How well a set covers a token is the largest cosine between it and a member of the set. Again
    and again the token is selected whose gain is largest: what it adds to the cover of all tokens,
    times the attention it gets from the encoder's class token in the last layer but one, as in the
    released program.

    Deviations: cosines are those of features behind the projector (the released program takes the
    encoder's last layer but one); an encoder without class token gives the attention a token gets
    from all others, in the mean; all images of a prompt are pruned together (the program gives each
    equally many tokens); the program's exponent of the attention is its default, 1; tokens keep
    their positions.
    Encoders whose tokens do not become image tokens one by one are refused.
    """

    name: ClassVar[str] = "scope"
    label: ClassVar[str] = "SCOPE"
    color_slot: ClassVar[int] = 15
    reads_image_encoder: ClassVar[bool] = True

    def select(self, tokens: ImageTokens, count: int) -> Tensor:
        assert tokens.saliency is not None
        similar = cosines(tokens.features)
        cover = torch.zeros(len(similar))
        selected: list[int] = []
        for _ in range(count):
            # (candidates,): how much closer all tokens would be to the set, summed over tokens
            # (rows).
            added = (similar - cover[:, None]).clamp_min(0).sum(0)
            gain = added * tokens.saliency
            gain[selected] = -torch.inf
            selected.append(int(gain.argmax()))
            cover = torch.maximum(cover, similar[selected[-1]])
        return torch.tensor(selected)
