"""Prompts with a picture for a tiny model: what its processor would hand it, without a tokenizer.

Pixels come from the family's own image processor (the Pillow one, which needs no download) wherever
transformers has it, else from random numbers in the shapes the entry states. The number of image
tokens is then asked from the model itself (`get_image_features`), so that no second copy of every
family's token arithmetic is kept here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from avl_analysis.conformance.entries import entry
from avl_analysis.conformance.shrink import PATCH, SIDE, VOCABULARY

_PLAIN = 128  # text ids are drawn from here up; special ids lie below
_PAD = 0
_BETWEEN = 101  # a text id that stands before every frame


def has_processor(model_type: str) -> bool:
    """Whether real pixel inputs can be made for this type without downloads."""
    help = entry(model_type)
    return help.pixels is None and _processor_name(help.processor or model_type) is not None


def _processor_name(model_type: str) -> str | None:
    return (IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}).get("pil")


def image_processor(model_type: str, config: PreTrainedConfig, options: Mapping[str, Any]) -> Any:
    """The Pillow image processor of `model_type`, sized for a tiny configuration.

    Raises:
        LookupError: transformers has none.
    """
    name = _processor_name(model_type)
    if name is None:
        raise LookupError(
            f"{model_type!r} has no Pillow image processor and its entry names no pixels"
        )
    kind = getattr(transformers, name)
    try:
        # Made once with its defaults, which say by what names it takes sizes.
        default, vision = kind(), getattr(config, "vision_config", None) or config
    except (
        ImportError
    ) as missing:  # in older versions some Pillow processors ask for torchvision all the same
        raise LookupError(
            f"{name} cannot be made here: {str(missing).strip().splitlines()[0]}"
        ) from missing
    side = _first(getattr(vision, "image_size", None)) or SIDE
    patch = _first(getattr(vision, "patch_size", None)) or PATCH
    size = {k for k, v in dict(getattr(default, "size", None) or {}).items() if v is not None}
    wanted: dict[str, Any] = {}
    if "height" in size:
        wanted["size"] = {"height": side, "width": side}
    elif getattr(default, "merge_size", None) is not None:
        # In processors that merge patches these names bound the number of pixels, not a length.
        # With merged patches of 8 pixels that is 36 to 81 image tokens.
        wanted["size"] = {"shortest_edge": 48 * 48, "longest_edge": 72 * 72}
    elif size:
        wanted["size"] = dict.fromkeys(size, side)
    if getattr(default, "crop_size", None) is not None:
        wanted["crop_size"] = {"height": side, "width": side}
    if getattr(default, "patch_size", None) is not None:
        wanted["patch_size"] = (
            {"height": patch, "width": patch} if isinstance(default.patch_size, dict) else patch
        )
    for ours, theirs in (
        ("merge_size", "spatial_merge_size"),
        ("temporal_patch_size", "temporal_patch_size"),
    ):
        if getattr(default, ours, None) is not None and getattr(vision, theirs, None) is not None:
            wanted[ours] = getattr(vision, theirs)
    if getattr(config, "image_grid_pinpoints", None):
        wanted["image_grid_pinpoints"] = config.image_grid_pinpoints
    # The entry's options last, because they are the more specific ones.
    return kind(**{**wanted, **options})


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) else value


def pixels(
    model_type: str, config: PreTrainedConfig, pictures: Sequence[Image.Image]
) -> dict[str, Any]:
    """Pixel inputs of some pictures.

    They come from the family's image processor or are random, as its entry says.
    """
    help = entry(model_type)
    if help.pixels is not None:
        return help.pixels(config)
    processor = image_processor(help.processor or model_type, config, help.options)
    return dict(processor(list(pictures), return_tensors="pt"))


def image_features(
    model: nn.Module, given: Mapping[str, Any], method: str = "get_image_features"
) -> Any:
    """What the model makes of pixels, by its own method (`get_video_features` for videos)."""
    owners: list[Any] = [m for m in (model, getattr(model, "model", None)) if hasattr(m, method)]
    # Parameters of both methods count: an outer one that only hands `**kwargs` on names none
    # itself.
    takes = {name for owner in owners for name in signature(getattr(owner, method)).parameters}
    if "pixel_values_videos" in given and "pixel_values_videos" not in takes:
        # before transformers 5.23 some families called it so in this method, too
        given = {**given, "pixel_values": given["pixel_values_videos"]}
    fields = ("vision_feature_layer", "vision_feature_select_strategy")
    places = (model.config, getattr(model.config, "vision_config", None))
    # What `forward` takes from the configuration and the method, called directly, would lack.
    # Reversed, so that the model's own value overwrites that of its vision tower.
    defaults = {
        n: getattr(place, n) for n in fields for place in reversed(places) if hasattr(place, n)
    }
    arguments = {k: v for k, v in {**defaults, **given}.items() if k in takes}
    return getattr(owners[0], method)(**arguments)


def parts(output: Any) -> Iterator[Tensor]:
    """The image features that `get_image_features` returned, (tokens, width) each.

    Families wrap them differently.
    """
    if hasattr(output, "last_hidden_state"):
        found = (
            getattr(output, n, None)
            for n in ("pooler_output", "last_hidden_state", "deepstack_features")
        )
        # Where a family has several, the features projected to the decoder's width are the pooler
        # output.
        output = next(part for part in found if part is not None)
        # Granite 4 Vision: what it adds to every decoder layer, of equal length.
        if isinstance(output[0], tuple):
            output = output[0][1]
    if isinstance(output, Tensor):
        yield output.reshape(-1, output.shape[-1])
        return
    for part in output:
        yield from parts(part)


@torch.no_grad()
def prompt(
    model: Any,
    given: dict[str, Any],
    *,
    before: int = 4,
    after: Sequence[int] = (6,),
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of a model call: prompts that show the picture of `given`.

    Args:
        model: the tiny model.
        given: pixels and their descriptions, of one picture.
        before: text tokens before the picture.
        after: text tokens after the picture, one number per prompt; shorter prompts are padded on
            the left.
        seed: of the text.
    """
    config = model.config
    help = entry(config.model_type)
    count = (
        help.tokens(config, given)
        if help.tokens
        else sum(map(len, parts(image_features(model, given))))
    )
    image = _id(
        config, "image_token_id", "image_token_index", "video_token_id", "video_token_index"
    )
    start = _id(config, "vision_start_token_id", "image_start_token_id")
    end = _id(config, "vision_end_token_id", "image_end_token_id")
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for length in after:
        text = torch.randint(_PLAIN, VOCABULARY, (before + length,), generator=draw).tolist()
        # `image` is a list of one id: repeated, not multiplied.
        shown = image * count if help.shown is None else help.shown(config, given, image[0])
        rows.append([*text[:before], *start, *shown, *end, *text[before:]])
    longest = max(map(len, rows))
    # (prompts, longest)
    ids = torch.tensor([[_PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    kinds = (ids == image[0]).long()
    result = {**_repeat(given, len(rows), help.along), "input_ids": ids, "attention_mask": mask}
    result |= {"mm_token_type_ids": kinds, "token_type_ids": 0 * kinds if help.prefix else kinds}
    # A model refuses arguments that its `forward` does not name.
    return {
        name: value for name, value in result.items() if name in signature(model.forward).parameters
    }


def video_prompt(model: Any, given: Mapping[str, Any], *, frames: int) -> dict[str, Any]:
    """Arguments of a model call: one prompt that shows a video.

    Its tokens stand in one run where the family has an id for them (Qwen3-VL: in one for every
    group of frames); else every frame is shown as a picture, with text between frames.

    Args:
        model: the tiny model.
        given: what the family's video part made of one video.
        frames: of the video.
    """
    config = model.config
    given = dict(given)
    video = _id(config, "video_token_id", "video_token_index")
    image = _id(config, "image_token_id", "image_token_index")
    start = _id(config, "vision_start_token_id", "image_start_token_id")
    end = _id(config, "vision_end_token_id", "image_end_token_id")
    # Frames go as pictures where the video part names them so (SmolVLM) or where the family has no
    # id for videos.
    by_frame = "pixel_values" in given or not video
    if by_frame and "pixel_values_videos" in given:  # InternVL: frames are pictures
        # (videos, frames, 3, height, width) to (pictures, 3, height, width)
        given["pixel_values"] = given.pop("pixel_values_videos").flatten(0, 1)
    method = "get_image_features" if by_frame else "get_video_features"
    count = sum(map(len, parts(image_features(model, given, method))))
    if config.model_type == "llava_onevision" and count % frames == 0:
        # before transformers 5.23 the newline joins the features outside of the method
        count += 1
    groups = frames if by_frame else 1
    if config.model_type.startswith("qwen3_vl"):  # groups of frames apart, times between them
        groups = int(given["video_grid_thw"][0, 0])
    own = image if by_frame else video
    shown = [_BETWEEN, *start, *own * (count // groups), *end] * groups
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(_PLAIN, VOCABULARY, (10,), generator=draw).tolist()
    ids = torch.tensor([[*text[:4], *shown, *text[4:]]])
    # `mm_token_type_ids` has 1 for tokens of pictures and 2 for those of videos.
    kinds = torch.isin(ids, torch.tensor(own)).long() * (1 if by_frame else 2)
    result = {**given, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    result |= {"mm_token_type_ids": kinds, "token_type_ids": 0 * kinds}
    return {
        name: value for name, value in result.items() if name in signature(model.forward).parameters
    }


def _id(config: Any, *names: str) -> list[int]:
    """The first special id a configuration names among `names`, in a list; empty without one."""
    return [i for i in (getattr(config, name, None) for name in names) if isinstance(i, int)][:1]


def _repeat(given: Mapping[str, Any], times: int, along: int) -> dict[str, Any]:
    """The same picture for several prompts, laid one after another as processors do.

    `along` is the dimension for the pixels.
    """

    def repeat(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.cat([value] * times, along if name == "pixel_values" else 0)
        return list(value) * times

    return {name: repeat(name, value) for name, value in given.items()}
