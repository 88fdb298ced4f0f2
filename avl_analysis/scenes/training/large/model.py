"""The larger model's shape: deeper and with finer image tokens than the small one."""

from __future__ import annotations

from typing import Any

from transformers import LlavaForConditionalGeneration

from avl_analysis.scenes.training import architecture
from avl_analysis.scenes.training.large.language import PATCH, TOKENIZER

SIZES: dict[str, Any] = {
    "width": 192,
    "text_layers": 8,
    "vision_width": 160,
    "vision_layers": 4,
    "patch": PATCH,
    "theta": 10_000.0,
    "tokenizer": TOKENIZER,
}


def build_model(seed: int = 0, **sizes: int) -> LlavaForConditionalGeneration:
    """An untrained model, float32, its weights drawn from ``seed``; ``sizes`` replace ``SIZES``.

    Its attention is of the kind that returns weights, which the measures read.
    """
    model = architecture.build_model(seed, **SIZES | sizes)
    model.set_attn_implementation("eager")
    return model
