"""What differs between model families: where the decoder is, which ids are image tokens, how a picture's tokens lie.

One `Family` describes a loaded model. The generic description (config field names, `get_decoder`, a square grid where
the number of tokens is a square) serves most of transformers; a family that needs more adds one entry to `_GRIDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from avl.tokens import Place, TokenLayout, token_layout

_IMAGE_ID_FIELDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


class UnsupportedModelError(ValueError):
    """The model cannot be recorded or adapted; the message says why and what is supported."""


@dataclass(frozen=True)
class Family:
    """Facts about one loaded model.

    Attributes:
        name: transformers' `model_type`.
        decoder: the module that runs the sequence of text and image tokens.
        image_token_ids: ids whose positions carry image features.
        layers: number of decoder layers.
        query_heads, key_heads: attention heads per layer.
        config: the model's config.
    """

    name: str
    decoder: nn.Module
    image_token_ids: tuple[int, ...]
    layers: int
    query_heads: int
    key_heads: int
    config: Any

    def layout(self, input_ids: Tensor, attention_mask: Tensor | None, inputs: Mapping[str, Any]) -> TokenLayout:
        """Token layout of a prompt. `inputs` are the other arguments of the model call (grids, image sizes)."""
        describe = _GRIDS.get(self.name, _square)
        tokens_per_image, places = describe(self.config, inputs)
        return token_layout(
            input_ids,
            self.image_token_ids,
            attention_mask=attention_mask,
            tokens_per_image=tokens_per_image,
            places=places,
        )


Places = Callable[[int, int, int], list[Place]]


def _square_places(_batch_row: int, _image: int, count: int) -> list[Place]:
    """Raster order over a square, the fallback assumption; unknown where `count` is not a square."""
    side = math.isqrt(count)
    return [(i // side, i % side) if side * side == count else (-1, -1) for i in range(count)]


def _square(_config: Any, _inputs: Mapping[str, Any]) -> tuple[int | None, Places]:
    return None, _square_places


def _llava(config: Any, _inputs: Mapping[str, Any]) -> tuple[int | None, Places]:
    """LLaVA-1.5 and ViP-LLaVA: (image_size / patch_size)^2 tokens per picture, plus CLS where the strategy is "full"."""
    vision = config.vision_config
    if getattr(vision, "image_size", None) is None or getattr(vision, "model_type", "") == "pixtral":
        return None, _square_places
    side = vision.image_size // vision.patch_size
    extra = 1 if getattr(config, "vision_feature_select_strategy", "default") == "full" else 0

    def places(_batch_row: int, _image: int, count: int) -> list[Place]:
        if count != side * side + extra:
            return _square_places(0, 0, count)
        return [(-1, -1)] * extra + [(i // side, i % side) for i in range(side * side)]

    return side * side + extra, places


_GRIDS: dict[str, Callable[[Any, Mapping[str, Any]], tuple[Any, Places]]] = {"llava": _llava, "vipllava": _llava}


def describe(model: nn.Module) -> Family:
    """Facts about a loaded model.

    Raises:
        UnsupportedModelError: text-only models (no image token id in the config) and models without a decoder.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(config, "model_type", None)
    if config is None or name is None or not hasattr(model, "get_decoder"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model with a decoder; load one with "
            "AutoModelForImageTextToText.from_pretrained(...)"
        )
    ids = tuple(
        dict.fromkeys(
            int(value) for field in _IMAGE_ID_FIELDS if isinstance(value := getattr(config, field, None), int) and value >= 0
        )
    )
    if not ids:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {name!r}) names no image token in its config (looked for "
            f"{', '.join(_IMAGE_ID_FIELDS)}); it seems to be a text-only model, or one whose images do not enter the "
            "token sequence. Vision-language decoders such as LLaVA, Qwen-VL or InternVL are supported"
        )
    decoder = model.get_decoder()
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    heads = int(text.num_attention_heads)
    return Family(
        name=name,
        decoder=decoder,
        image_token_ids=ids,
        layers=int(text.num_hidden_layers),
        query_heads=heads,
        key_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        config=config,
    )
