"""What differs between model families: the decoder, ids of image tokens, what cannot be followed.

One `Family` describes a loaded model. The generic description (config field names, `get_decoder`)
serves most of transformers; how a family's tokens lie in a picture is one entry in `avl.grids`, and
a family that cannot be recorded is one entry in `REFUSED`, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from avl.grids import describe_rows, video_ids
from avl.places import Originals, PictureMap, map_pictures, originals_of
from avl.plugins import FAMILIES, plugins
from avl.tokens import TokenLayout, token_layout
from avl.views import Picture

_IMAGE_ID_FIELDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


_CROSS = (
    "its decoder reaches the picture through cross-attention, so there are no image tokens in its"
    " sequence"
)

REFUSED: dict[str, str] = {
    "blip": _CROSS,
    "idefics": _CROSS,
    "mllama": _CROSS,
    "evolla": (
        "it answers questions about proteins, which its decoder reaches through cross-attention"
    ),
    "git": (
        "it puts image features ahead of the text inside its decoder, so positions there are not"
        " those of input_ids"
    ),
    "kosmos-2": (
        "it marks image positions by a mask (image_embeds_position_mask), not by a token id"
    ),
    "kosmos-2.5": (
        "it marks image positions by a mask (image_embeds_position_mask), not by a token id"
    ),
    "mistral4": "under this type is the language model alone, without a vision tower",
    "pi0": "it predicts the actions of a robot by denoising and generates no text",
    "diffusion_gemma": "it writes blocks of text by denoising, not token after token",
}
"""Model types that can be neither recorded nor adapted, and why."""


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
        query_heads: attention heads per layer; kv_heads: key/value heads, the most of any layer.
        config: the model's config.
    """

    name: str
    decoder: nn.Module
    image_token_ids: tuple[int, ...]
    layers: int
    query_heads: int
    kv_heads: int
    config: Any

    def layout(
        self, input_ids: Tensor, attention_mask: Tensor | None, inputs: Mapping[str, Any]
    ) -> TokenLayout:
        """Token layout of a prompt.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, length), zero at padding; None means no padding.
            inputs: the other arguments of the model call (grids, image sizes). What
                `places.remember_originals` was told about one of its tensors is used as well.
        """
        originals = originals_of(inputs)
        if originals is not None and len(originals.sizes) != len(input_ids):
            # Remembered for another batch (rows were dropped or repeated since): nothing is known
            # then.
            originals = None
        pictures, _ = self._pictures(input_ids, attention_mask, inputs, originals)
        return token_layout(
            input_ids, self.image_token_ids, attention_mask=attention_mask, pictures=pictures
        )

    def picture_map(
        self,
        layout: TokenLayout,
        inputs: Mapping[str, Any],
        picture_sizes: Sequence[Sequence[tuple[int, int]]],
        processor: Any = None,
    ) -> PictureMap:
        """Which part of its picture every image token of a prompt stands for.

        Args:
            layout: of the prompt.
            inputs: what the processor returned, `input_ids` included.
            picture_sizes: (width, height) in pixels of every original picture or video, for every
                row of the batch. How many frames a video has is known where
                `places.remember_originals` was told of it.
            processor: the model's processor or image processor; where the family's processors
                differ in how they crop, it says what was done. None assumes the processor of the
                family's released models.

        Raises:
            ValueError: no `input_ids` in `inputs`, or other pictures than the prompt shows.
        """
        ids = inputs.get("input_ids")
        if ids is None:
            raise ValueError(
                "inputs must contain input_ids; pass everything the processor returned"
            )
        known = originals_of(inputs) or Originals(())
        same = [len(row) for row in known.frames] == [len(row) for row in picture_sizes]
        originals = Originals(
            tuple(map(tuple, picture_sizes)),
            getattr(processor, "image_processor", processor),
            known.frames if same else (),
            getattr(processor, "video_processor", None),
        )
        pictures, note = self._pictures(ids, inputs.get("attention_mask"), inputs, originals)
        return map_pictures(layout, pictures, picture_sizes, note)

    def _pictures(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        inputs: Mapping[str, Any],
        originals: Originals | None,
    ) -> tuple[list[list[Picture]], str]:
        """The pictures and videos of every row, as views, and what was assumed."""
        image = torch.isin(input_ids, torch.tensor(self.image_token_ids, device=input_ids.device))
        if attention_mask is not None and attention_mask.shape == image.shape:
            image &= attention_mask.bool()
        videos = torch.tensor(sorted(video_ids(self.config)), device=input_ids.device)
        # 0 for text, 1 for pictures, 2 for videos: a run ends where one kind of token follows
        # another.
        kinds = image.int() + (image & torch.isin(input_ids, videos))
        runs = [_runs(row) for row in kinds.tolist()]
        return describe_rows(self.name, self.config, input_ids.tolist(), runs, inputs, originals)


def _runs(kinds: Sequence[int]) -> list[tuple[int, int]]:
    """Start and length of every unbroken run of one number other than 0."""
    runs, start = [], 0
    for kind, group in groupby(kinds):
        length = len(list(group))
        if kind:
            runs.append((start, length))
        start += length
    return runs


def _refusal(name: str, config: Any) -> str | None:
    """Why models of this type and config are not supported; None if nothing speaks against them."""
    if name in REFUSED:
        return REFUSED[name]
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        return f"it is an encoder-decoder; {_CROSS}"
    return None


def _described_by(describe_plugin: Any, model: nn.Module, name: str) -> Family:
    """The family that another distribution's function describes.

    Args:
        describe_plugin: what the entry point names.
        model: the loaded model.
        name: its model type.
    """
    family = describe_plugin(model)
    if not isinstance(family, Family):
        raise UnsupportedModelError(
            f"the entry point {name!r} in group {FAMILIES!r} returned {family!r} for"
            f" {type(model).__name__}; it must return an avl.families.Family"
        )
    return family


def describe(model: nn.Module) -> Family:
    """Facts about a loaded model.

    An entry point of the group "avl.families" whose name is the model type is asked first; see
    plugins.py.

    Raises:
        UnsupportedModelError: text-only models (no image token id in the config), models without a
            decoder, and families that cannot be followed (`REFUSED`, encoder-decoders).
    """
    config: Any = getattr(model, "config", None)
    name = getattr(config, "model_type", None)
    if config is None or name is None or not hasattr(model, "get_decoder"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model with a decoder; load one with "
            "AutoModelForImageTextToText.from_pretrained(...)"
        )
    if describe_plugin := plugins(FAMILIES, name).get(name):
        return _described_by(describe_plugin, model, name)
    if reason := _refusal(name, config):
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {name!r}) is not supported: {reason}. Decoders"
            " whose sequence holds image tokens are supported, such as LLaVA, Qwen-VL or InternVL;"
            " docs/families.md lists all types"
        )
    # Each id once, in the order of the fields: some configs say the same id under two names.
    named = [getattr(config, field, None) for field in _IMAGE_ID_FIELDS]
    ids = tuple(dict.fromkeys(i for i in named if isinstance(i, int) and i >= 0))
    if not ids:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {name!r}) names no image token in its config"
            f" (looked for {', '.join(_IMAGE_ID_FIELDS)}); it seems to be a text-only model, or one"
            " whose images do not enter the token sequence. Vision-language decoders such as"
            " LLaVA, Qwen-VL or InternVL are supported"
        )
    decoder = model.get_decoder()
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    per_layer = getattr(text, "per_layer_config", None) or [text]
    # Most configs describe all layers at once; some describe each by itself.
    heads, *more = sorted({int(layer.num_attention_heads) for layer in per_layer})
    if more:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {name!r}) is not supported: its layers have"
            f" different numbers of query heads ({', '.join(map(str, (heads, *more)))}), and"
            " recordings have one for all. Decoders with equal layers are supported;"
            " docs/families.md lists all types"
        )
    return Family(
        name=name,
        decoder=decoder,
        image_token_ids=ids,
        layers=int(text.num_hidden_layers),
        query_heads=heads,
        kv_heads=max(
            int(getattr(layer, "num_key_value_heads", None) or heads) for layer in per_layer
        ),
        config=config,
    )
