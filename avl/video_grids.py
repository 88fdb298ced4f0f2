"""How model families lay a video out as tokens, where these have an id of their own.

As in `grids`: a function per way, a line per family, numbers from the config and the inputs. Every
frame, or group of frames that a model makes one token of, is a view of the whole picture that knows
its place in time. Families that show a video to the model as pictures (InternVL, SmolVLM) need
nothing here: which pictures are its frames is told by `places.remember_originals`.
"""

from __future__ import annotations

import math

from avl.grid_prompt import Describe, GridPrompt, Pictures, kept_part
from avl.views import View


def video_grid(prompt: GridPrompt) -> Pictures:
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: `video_grid_thw`, merged `merge` x `merge` in space.

    The first number is the number of groups of `temporal_patch_size` frames (two). A short last
    group is filled up with its last frame. Qwen3-VL writes the time before every group, so its
    groups are runs of their own.
    """
    merge = prompt.vision("spatial_merge_size", 1)
    done = 0
    while done < prompt.tokens and (grid := prompt.take("video_grid_thw")) is not None:
        frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
        done += frames * rows * columns
        yield tuple(View(rows, columns, frame=frame) for frame in range(frames))


def pooled_with_newline(prompt: GridPrompt) -> Pictures:
    """LLaVA-OneVision: half as many tokens along each side, one newline token after all frames."""
    side = math.ceil(prompt.patches / 2)
    newline = View(0, 0, None, None, before=1)
    done = 0
    while done < prompt.tokens and (frames := prompt.take("video_frames")) is not None:
        done += frames[0] * side * side + 1
        yield (*(View(side, side, frame=frame) for frame in range(frames[0])), newline)


def pooled(prompt: GridPrompt) -> Pictures:
    """LLaVA-NeXT-Video: squares of `spatial_pool_stride` patches, over the frame's centre square.

    What is left over at the right and the lower border of the patches is in no token.
    """
    patches = prompt.patches
    side = patches // (stride := prompt.config.spatial_pool_stride)
    share = side * stride / patches
    done = index = 0
    while done < prompt.tokens and (frames := prompt.take("video_frames")) is not None:
        box = kept_part(prompt.size(index), prompt.video_processor)
        if box is not None:
            left, top, right, bottom = box
            box = (left, top, left + share * (right - left), top + share * (bottom - top))
        done, index = done + frames[0] * side * side, index + 1
        yield tuple(View(side, side, box, frame=frame) for frame in range(frames[0]))


VIDEOS: dict[str, Describe] = {
    "qwen2_vl": video_grid,
    "qwen2_5_vl": video_grid,
    "qwen3_vl": video_grid,
    "qwen3_vl_moe": video_grid,
    "llava_onevision": pooled_with_newline,
    "llava_next_video": pooled,
}
"""Family -> its way of laying out videos; where the tokens of others lie is not known."""
