"""Image tokens that leave the prompt before the decoder: what such policies have in common.

The decoder never sees the tokens that are left out, so its prefill is shorter in every layer and
its cache holds none of their keys. The others keep their positions.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.policies.budget import BudgetPolicy, tiered
from avl.policies.prompt import Counts, Prompt


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The image tokens of one row of a batch as they enter the decoder, in order.

    Attributes:
        features: (n, width) float32.
        image: (n,) index of the image, or frame of a video, each belongs to.
        row: (n,) row in its image's grid, -1 where it is unknown.
        column: (n,) column in its image's grid, -1 where it is unknown.
        saliency: (n,) attention that each gets in the image encoder, for policies that ask for it.
    """

    features: Tensor
    image: Tensor
    row: Tensor
    column: Tensor
    saliency: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class BeforeDecoderPolicy(BudgetPolicy):
    """Base of policies that choose image tokens by their features, before the decoder.

    As many image tokens go on as the budget leaves beside all system and text tokens. Later, when
    the answer grows, those that were chosen last are dropped first. A later turn's images pass in
    full, and their keys are dropped in order.
    """

    reads_image_encoder: ClassVar[bool] = False
    """Whether `select` needs `ImageTokens.saliency`."""

    @property
    def filter_layer(self) -> int:
        return 0

    def filter_count(self, counts: Counts) -> int:
        return self.images_beside_text(counts)

    def importance(self, prompt: Prompt) -> Tensor:
        ranks = prompt.filter_ranks
        ranks = torch.zeros(prompt.positions.shape) if ranks is None else ranks
        return tiered(ranks.to(prompt.positions.device), prompt)

    @abstractmethod
    def select(self, tokens: ImageTokens, count: int) -> Tensor:
        """Numbers of the tokens that go on, the most important first.

        Args:
            tokens: of one row.
            count: how many may go on, 1 to n.
        """

    def replaced(self, tokens: ImageTokens, index: Tensor, count: int) -> Tensor:
        """Features, (selected, width), with which the selected tokens go on.

        Args:
            tokens: of one row.
            index: what `select` returned.
            count: how many might go on.
        """
        return tokens.features[index]


def cosines(features: Tensor) -> Tensor:
    """(n, n) cosines between the rows of (n, width) features."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    return unit @ unit.T
