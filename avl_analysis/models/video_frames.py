"""Frames of a video as model inputs, made with Pillow: the video parts of some processors.

transformers' own video processors need torchvision. What they do to a frame is what the image
processors beside them do to a picture, and those have a version that works with Pillow, so here
frames go through that one, with the settings of the checkpoint's video part. So a video gives the
same numbers on machines with and without torchvision, as pictures do; they differ slightly from
those of transformers' video processors, because torchvision resizes a little differently.

Known are the families of `PARTS`. Frames are shown as they are given: none is left out here
(`Video` says which are taken).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, CLIPImageProcessorPil
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.video_utils import make_batched_metadata

from avl_analysis.errors import InputError

# Pillow's numbers for resampling: 1 is Lanczos, 3 is bicubic.
_CLIP = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD, "resample": 3}
_STANDARD = {"image_mean": IMAGENET_STANDARD_MEAN, "image_std": IMAGENET_STANDARD_STD}
_STEPS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
"""Settings of a video part that an image processor takes too."""


class VideoSettings(dict[str, Any]):
    """The settings of a processor's video part, as a dictionary and as attributes.

    Some processors read settings of their video part (frames per second) even when they are given
    images only; they are None where the checkpoint says nothing. It is a dictionary, so that the
    processor can be printed and saved as any other.
    """

    model_input_names: Sequence[str] = ()
    _auto_class = None  # read when a processor is saved: no class of its own to save with it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for while an object is copied
            raise AttributeError(name)
        return self.get(name)


class FrameProcessor(VideoSettings):
    """A video part that works with Pillow. Called by the processor as its own would be.

    Attributes:
        defaults: settings where the checkpoint says nothing: those of the family's class in
            transformers.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = self.get(name)
        return self.defaults.get(name) if value is None else value

    def __call__(self, videos: Any, **options: Any) -> BatchFeature:
        """Model inputs of some videos.

        Args:
            videos: one (frames, height, width, 3) uint8 array each.
            options: `video_metadata`, when the frames are; others are ignored.
        """
        arrays = [np.asarray(video) for video in videos]
        data = self.make(arrays)
        metadata = make_batched_metadata(arrays, options.get("video_metadata"))
        return BatchFeature({**data, "video_metadata": metadata})

    def make(self, videos: Sequence[np.ndarray]) -> dict[str, Any]:
        """Tensors by name."""
        stacked = [self.frames(video) for video in videos]
        if len({video.shape for video in stacked}) > 1:
            raise InputError(
                "videos of"
                f" {' and '.join(str(len(video)) for video in stacked)} frames in one batch: this"
                " family takes videos with equally many frames together; set batch size 1, or take"
                " equally many frames of each"
            )
        # (videos, frames, 3, height, width)
        return {"pixel_values_videos": torch.stack(stacked)}

    def frames(self, video: np.ndarray) -> Tensor:
        """(frames, 3, height, width) of one video, every frame as the image processor makes it."""
        made = self._pictures()([Image.fromarray(frame) for frame in video])["pixel_values"]
        return torch.from_numpy(np.stack(made)).float()

    def _pictures(self, **settings: Any) -> Any:
        """The Pillow image processor with the settings of the video part."""
        given = {name: value for name in _STEPS if (value := getattr(self, name)) is not None}
        return CLIPImageProcessorPil(
            **{"do_center_crop": False, "rescale_factor": 1 / 255, **given, **settings}
        )


class OneVisionFrames(FrameProcessor):
    """LLaVA-OneVision: frames resized to a square."""

    defaults: ClassVar[Mapping[str, Any]] = {**_CLIP, "size": {"height": 384, "width": 384}}


class NextVideoFrames(FrameProcessor):
    """LLaVA-NeXT-Video: the centre square of frames."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **_CLIP,
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
    }


class InternFrames(FrameProcessor):
    """InternVL: frames resized to a square."""

    defaults: ClassVar[Mapping[str, Any]] = {**_CLIP, "size": {"height": 384, "width": 384}}


class SmolFrames(FrameProcessor):
    """SmolVLM: frames resized to a longest edge, then to a square."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **_STANDARD,
        "resample": 1,
        "size": {"longest_edge": 4 * 364},
        "max_image_size": {"longest_edge": 364},
    }

    def make(self, videos: Sequence[np.ndarray]) -> dict[str, Any]:
        pixels = super().make(videos)["pixel_values_videos"]
        # (videos, frames, height, width): all ones, because videos of one batch have the same shape
        # here and none is padded.
        mask = torch.ones(*pixels.shape[:2], *pixels.shape[3:], dtype=torch.int64)
        return {"pixel_values": pixels, "pixel_attention_mask": mask}

    def frames(self, video: np.ndarray) -> Tensor:
        high, wide = video.shape[1:3]
        longest = min(4096, self.size["longest_edge"])  # the most transformers' processor takes
        scale = longest / max(high, wide)
        # the shorter edge is rounded down, then up to an even number
        high, wide = (
            longest if edge == max(high, wide) else 2 * math.ceil(int(edge * scale) / 2) or 1
            for edge in (high, wide)
        )
        square = self.max_image_size["longest_edge"]
        # Resized twice, as in transformers' processor. The first result stays in 0-255, because the
        # second call rescales and normalises.
        once = self._pictures(
            size={"height": high, "width": wide}, do_rescale=False, do_normalize=False
        )
        resized = [
            # (3, height, width) back to (height, width, 3)
            np.asarray(frame).transpose(1, 2, 0)
            for frame in once([Image.fromarray(frame) for frame in video])["pixel_values"]
        ]
        again = self._pictures(size={"height": square, "width": square})
        made = again([Image.fromarray(frame.astype(np.uint8)) for frame in resized])
        return torch.from_numpy(np.stack(made["pixel_values"])).float()


class QwenFrames(FrameProcessor):
    """Qwen2-VL and Qwen2.5-VL: patches of groups of frames, resized to a number of pixels."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **_CLIP,
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }

    def make(self, videos: Sequence[np.ndarray]) -> dict[str, Any]:
        patches, grids = zip(*(self.patches(video) for video in videos), strict=True)
        return {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}

    def patches(self, video: np.ndarray) -> tuple[Tensor, list[int]]:
        """Flattened patches of a video in the order of its tokens, and its grid.

        Returns:
            (groups * rows * columns, 3 * group * patch * patch), and [groups, rows, columns].
        """
        high, wide = self.resized(len(video), *video.shape[1:3])
        frames = self._pictures(size={"height": high, "width": wide})(
            [Image.fromarray(frame) for frame in video]
        )["pixel_values"]
        pixels = torch.from_numpy(np.stack(frames)).float()
        patch, merge, group = self.patch_size, self.merge_size, self.temporal_patch_size
        if missing := -len(pixels) % group:  # the last frame is repeated
            pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
        groups, rows, columns = len(pixels) // group, high // patch, wide // patch
        # group, frame, channel, then rows and columns of merged patches, patches in them, pixels
        cut = pixels.reshape(
            groups, group, 3, rows // merge, merge, patch, columns // merge, merge, patch
        )
        # To (groups, merged rows, merged columns, merge, merge, 3, group, patch, patch): patches
        # that the model merges into one token follow each other.
        flat = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(groups * rows * columns, -1)
        return flat, [groups, rows, columns]

    def resized(self, frames: int, high: int, wide: int) -> tuple[int, int]:
        """Height and width after resizing: whole merged patches, a number of pixels in bounds.

        The bounds are of one frame in Qwen2-VL (`smart_resize` beside transformers'
        Qwen2VLVideoProcessor).
        """
        return _within(high, wide, self.patch_size * self.merge_size, *self._bounds(), 1, 1)

    def _bounds(self) -> tuple[int, int]:
        size, usual = self.size, self.defaults["size"]
        # min_pixels and max_pixels are older names of the same bounds; a checkpoint that has them
        # means them.
        least = self.min_pixels or size.get("shortest_edge") or usual["shortest_edge"]
        most = self.max_pixels or size.get("longest_edge") or usual["longest_edge"]
        return int(least), int(most)


class Qwen3Frames(QwenFrames):
    """Qwen3-VL: as Qwen2-VL, with bounds for the pixels of all frames together."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **_STANDARD,
        "resample": 3,
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }

    def resized(self, frames: int, high: int, wide: int) -> tuple[int, int]:
        factor, group = self.patch_size * self.merge_size, self.temporal_patch_size
        # As `smart_resize` beside transformers' Qwen3VLVideoProcessor does before it rounds.
        if min(high, wide) < factor:
            scale = factor / min(high, wide)
            high, wide = int(high * scale), int(wide * scale)
        # transformers refuses fewer frames than a group has; here the last is repeated instead
        frames = max(frames, group)
        whole = round(frames / group) * group
        return _within(high, wide, factor, *self._bounds(), frames, whole)


def _within(
    high: int, wide: int, factor: int, least: int, most: int, frames: int, whole: int
) -> tuple[int, int]:
    """Height and width as multiples of `factor`, with a number of pixels within bounds.

    Args:
        high: height of a frame in pixels.
        wide: width of a frame in pixels.
        factor: side of a merged patch.
        least: fewest pixels.
        most: most pixels.
        frames: frames that the pixels are counted over.
        whole: the same, rounded to whole groups, for the comparison with the bounds.
    """
    if max(high, wide) / min(high, wide) > 200:
        raise InputError(
            f"frames of {wide} x {high} pixels: one side is more than 200 times the other, which"
            " this family does not take; crop them"
        )
    new_high, new_wide = (round(edge / factor) * factor for edge in (high, wide))
    # Rounding comes before the comparison; if a bound is broken, sizes are computed anew from the
    # unrounded ones.
    if whole * new_high * new_wide > most:
        ratio = math.sqrt(frames * high * wide / most)
        new_high, new_wide = (
            max(factor, math.floor(edge / ratio / factor) * factor) for edge in (high, wide)
        )
    elif whole * new_high * new_wide < least:
        ratio = math.sqrt(least / (frames * high * wide))
        new_high, new_wide = (math.ceil(edge * ratio / factor) * factor for edge in (high, wide))
    return new_high, new_wide


PARTS: Mapping[str, type[FrameProcessor]] = {
    "LlavaOnevisionProcessor": OneVisionFrames,
    "LlavaNextVideoProcessor": NextVideoFrames,
    "InternVLProcessor": InternFrames,
    "SmolVLMProcessor": SmolFrames,
    "Qwen2VLProcessor": QwenFrames,
    "Qwen2_5_VLProcessor": QwenFrames,
    "Qwen3VLProcessor": Qwen3Frames,
}
"""Class of a processor -> its video part that works with Pillow."""
