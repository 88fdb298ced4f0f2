"""Do the tokens of a video lie where and when a recording says? Paint one region of one frame.

As `painting` does with pictures: vision attention is silenced, the places and frames are those
recorded while `generate` runs, and what the decoder is given there shows which tokens changed. A
token of the painted frame (or of the group that holds it) whose box lies within the painted region
must change; a token of any other frame, or beyond the reach of resampling, must not.

Families whose videos are pictures to the model (InternVL, SmolVLM) are shown the frames one by one,
and the recording is told that they are frames, as `VLM.prepare` tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from avl.families import describe
from avl.grids import video_ids
from avl.places import remember_originals
from avl_analysis.capture.recorder import record
from avl_analysis.conformance.build import Case
from avl_analysis.conformance.inputs import video_prompt
from avl_analysis.conformance.painting import Painted, sides, silenced
from avl_analysis.conformance.recording import Mismatch
from avl_analysis.models.video_frames import PARTS, FrameProcessor
from avl_analysis.recordings.schema import EDGES

FRAMES = 5
"""Frames of the painted video; an odd number, so that the last of Qwen-VL's groups is filled up."""

SIZE = (44, 28)
"""Width and height of a frame."""

PAINTED = ((0, (0.0, 0.0, 0.5, 0.55)), (2, (0.4, 0.3, 1.0, 1.0)), (4, (0.0, 0.4, 1.0, 0.8)))
"""Painted frames, and the part of each as fractions."""

REACH = 4.0
"""Pixels of a frame over which resampling spreads a change."""

PROCESSORS: Mapping[str, str] = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_vl_moe": "Qwen3VLProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "llava_next_video": "LlavaNextVideoProcessor",
    "internvl": "InternVLProcessor",
    "smolvlm": "SmolVLMProcessor",
}
"""Model type -> the processor whose video part it has."""


@torch.no_grad()
def check_video(case: Case) -> Painted:
    """Paint parts of frames of a video, and compare.

    Raises:
        LookupError: the family has no video part that works here.
        Mismatch: the video was recorded as anything else than one with all its frames.
    """
    if case.model_type not in PROCESSORS:
        raise LookupError(f"{case.model_type!r} has no video part that works without torchvision")
    part = _part(case)
    model = silenced(case.model)

    def prepare(frames: np.ndarray) -> dict[str, Any]:
        given = part.make([frames])
        inputs = video_prompt(model, given, frames=len(frames))
        # frames: (frames, height, width, 3); sizes are width first.
        size = (frames.shape[2], frames.shape[1])
        remember_originals(inputs, [[size]], _WithVideo(part), [[len(frames)]])
        return inputs

    return paint_video(model, prepare, part.temporal_patch_size or 1)


class _WithVideo:
    """Stands for a processor of which only the video part counts."""

    image_processor = None

    def __init__(self, part: FrameProcessor) -> None:
        self.video_processor = part


def _part(case: Case) -> FrameProcessor:
    """The family's video part, sized for the tiny model."""
    vision = case.config.vision_config
    side = vision.image_size if hasattr(vision, "image_size") else 0
    side = side[0] if isinstance(side, list | tuple) else side
    square = {"height": side, "width": side}
    kind = PARTS[PROCESSORS[case.model_type]]
    settings: dict[str, Any] = {"size": square, "crop_size": square}
    if "patch_size" in kind.defaults:
        # Qwen3-VL bounds the pixels of all frames together, Qwen2-VL those of one frame.
        frames = FRAMES if kind.__name__ == "Qwen3Frames" else 1
        settings = {
            "size": {"shortest_edge": 48 * 48 * frames, "longest_edge": 72 * 72 * frames},
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        }
    elif "max_image_size" in kind.defaults:
        settings = {"size": {"longest_edge": 2 * side}, "max_image_size": {"longest_edge": side}}
    elif "shortest_edge" in kind.defaults["size"]:
        settings["size"] = {"shortest_edge": side}
    return kind(settings)


def paint_video(
    model: nn.Module, prepare: Callable[[np.ndarray], dict[str, Any]], group: int
) -> Painted:
    """Paint frames of a noisy video, and see which tokens change.

    Args:
        model: with silenced vision attention.
        prepare: inputs of a prompt that shows the video, (frames, height, width, 3) uint8, and
            nothing else.
        group: frames that become one in the model.

    Raises:
        Mismatch: the video was recorded as anything else than one with all its frames.
    """
    width, height = SIZE
    draw = np.random.default_rng(0)
    video = draw.integers(60, 190, (FRAMES, height, width, 3), dtype=np.uint8)
    boxes, frame = recorded_video(model, prepare(video), SIZE)
    # Groups are numbered from 0, the last one possibly not full, hence the rounding up.
    if sorted(set(frame.tolist()) - {-1}) != list(range(-(-FRAMES // group))):
        raise Mismatch(f"a video of {FRAMES} frames was recorded with frames {set(frame.tolist())}")
    # (image tokens, width)
    plain = embedded(model, prepare(video))
    inside = outside = wrong = 0
    for painted, (left, top, right, bottom) in PAINTED:
        area = (int(left * width), int(top * height), round(right * width), round(bottom * height))
        picture = Image.fromarray(video[painted])
        picture.paste((255, 0, 0), area)
        other = video.copy()
        other[painted] = np.asarray(picture)
        changed = (embedded(model, prepare(other)) - plain).abs().amax(-1) > 1e-6
        within, beyond = sides(boxes, area, REACH)
        now = frame == painted // group
        # Nothing in another group may change, wherever in the frame it lies.
        within, beyond = within & now, beyond | ~now
        inside, outside = inside + int(within.sum()), outside + int(beyond.sum())
        wrong += int((within & ~changed).sum()) + int((beyond & changed).sum())
    placed = int((~boxes[:, 0].isnan()).sum())
    return Painted(placed, len(boxes), inside, outside, wrong, "")


def recorded_video(
    model: Any, inputs: dict[str, Any], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """What is recorded of the image tokens while `generate` runs.

    Args:
        model: the model.
        inputs: of one prompt.
        size: width and height of a frame in pixels.

    Returns:
        (image tokens, 4) boxes in pixels, NaN where there is none, and (image tokens,) frames.
    """
    with record(model, statistics=[], maps="none") as recording:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    tokens = recording.tokens.isel(sample=0)
    of_image = tokens["image"].values >= 0
    edges = np.stack([tokens[edge].values for edge in EDGES], 1)[of_image]
    boxes = torch.from_numpy(edges) * torch.tensor([*size, *size])
    return boxes, torch.from_numpy(tokens["frame"].values[of_image])


def embedded(model: Any, inputs: dict[str, Any]) -> Tensor:
    """(image tokens, width): what the decoder is given in their place while `generate` runs."""
    family = describe(model)
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["inputs_embeds"].detach().clone())

    hook = family.decoder.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    finally:
        hook.remove()
    ids = torch.tensor([*family.image_token_ids, *video_ids(family.config)])
    # The first pass is the prompt's: (1, length, width).
    return seen[0][0, torch.isin(inputs["input_ids"][0], ids)]
