"""A stand-in for vision towers that live in timm, which needs torchvision.

What happens to a picture before its features enter the token sequence is of no consequence to
attention in the decoder; a family whose only obstacle is a missing tower is therefore checked with
one convolution in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nVisionConfig

from avl_analysis.conformance.shrink import PATCH, VOCABULARY, WIDTH


class ToyTowerConfig(Gemma3nVisionConfig):
    """Configuration of the stand-in."""

    model_type = "avl_toy_tower"


class ToyTower(PreTrainedModel):
    """One convolution: (pictures, 3, h, w) to (pictures, width, h / patch, w / patch)."""

    config_class = ToyTowerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ToyTowerConfig) -> None:
        """Random weights."""
        super().__init__(config)
        self.convolution = nn.Conv2d(3, config.hidden_size, PATCH, PATCH)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """The feature map."""
        return BaseModelOutputWithPooling(
            last_hidden_state=torch.tanh(self.convolution(pixel_values))
        )


# Gemma 3n makes its tower by `AutoModel.from_config`, which now finds the stand-in.
AutoModel.register(ToyTowerConfig, ToyTower, exist_ok=True)


def toy_tower() -> ToyTowerConfig:
    """Configuration of a tiny stand-in."""
    return ToyTowerConfig(hidden_size=WIDTH, vocab_size=16, vocab_offset=VOCABULARY)
