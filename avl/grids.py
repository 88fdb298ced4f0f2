"""How model families lay a picture out as tokens: a function per way, a line per family.

A function gets a `GridPrompt` (one row of a batch, and what the model was called with) and yields
the pictures of that row, each as its `View`s. Numbers come from the model's config and inputs
wherever they say them (grids, image sizes). Two things only the original picture's size tells, the
centre crop of LLaVA-1.5 and the tile grid of InternVL; then `GridPrompt.size` may be known, and if
it is not, neither are the places.

To add a family, write what its processor and its `get_image_features` do to a picture as views, and
name it in `GRIDS`; the conformance suite then paints pictures and sees whether the tokens that
change are those the views say. Tokens of videos have a table of their own, in `video_grids`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import groupby, pairwise
from typing import Any

from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from avl.grid_prompt import Describe, GridPrompt, Pictures, Size, kept_part, squared
from avl.places import Originals, Shown
from avl.video_grids import VIDEOS
from avl.views import Picture, View, as_video, count, nowhere

UNKNOWN = "the inputs do not tell where image tokens lie"
VIDEO = "where the tokens of a video lie is not known"
NO_PLACE = "image tokens of this family stand for the whole picture, none of them for a part of it"


def square(prompt: GridPrompt) -> Pictures:
    """Every run of image tokens is a picture, its tokens a square grid over all of it.

    For families that are known to lay out pictures so: Aya Vision, Ovis 2. Not where a run may be
    something else than one picture; nothing says then how the tokens lie. That is so where other
    things than one square array of pixels per run went into the model (or none were seen), and
    where next to nothing stands between two runs, which may be tiles of one picture.
    """
    pixels = prompt.inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.dim() < 4 or pixels.shape[-1] != pixels.shape[-2]:
        return
    if math.prod(pixels.shape[:-3]) != prompt.batch_runs:
        return
    gaps = [after[0] - sum(before) for before, after in pairwise(prompt.runs)]
    if any(gap < LEAST_BETWEEN for gap in gaps):
        return
    for _, length in prompt.runs:
        # A run that is no square number of tokens is something else than was thought.
        side = math.isqrt(length)
        yield (View(side, side),) if side * side == length else nowhere(length)


LEAST_BETWEEN = 3
"""Tokens between two pictures in a prompt: an end, a beginning and a line break. Tiles of one
picture have one or two between them, which name the tile.
"""


def kept_square(prompt: GridPrompt) -> Pictures:
    """As `square`, over the part of the picture that the processor keeps (FastVLM)."""
    for index, (view,) in enumerate(square(prompt)):
        size, processor = prompt.size(index), prompt.processor
        yield (replace(view, box=None if processor is None else kept_part(size, processor)),)


def unknown(prompt: GridPrompt) -> Pictures:
    """Families of which nothing is known: no picture is described, so no token gets a place."""
    return iter(())


def latent(prompt: GridPrompt) -> Pictures:
    """Learned queries that look at the whole picture (Q-Former, perceiver); none has a place."""
    for _, length in prompt.runs:
        yield nowhere(length)


def _whole(prompt: GridPrompt, length: int) -> range:
    """Numbers of the row's pictures, each of `length` tokens.

    None if the runs do not hold whole pictures.
    """
    if any(run % length for _, run in prompt.runs):
        return range(0)
    return range(prompt.tokens // length)


# -- one grid --------------------------------------------------------------------------------------


def fixed(prompt: GridPrompt) -> Pictures:
    """A square grid of known size over the whole picture (PaliGemma, Gemma 3)."""
    pooled = getattr(prompt.config, "mm_tokens_per_image", None)
    side = math.isqrt(pooled) if pooled else prompt.patches
    for _ in _whole(prompt, side * side):
        yield (View(side, side),)


def clip(prompt: GridPrompt) -> Pictures:
    """LLaVA-1.5, ViP-LLaVA: patches of a CLIP tower over the picture's centre square.

    A class token may come before them.
    """
    if prompt.vision("model_type") == "pixtral":
        yield from pixtral(prompt)
        return
    if prompt.vision("image_size") is None:
        yield from kept_square(prompt)
        return
    side = prompt.patches
    extra = (
        1 if getattr(prompt.config, "vision_feature_select_strategy", "default") == "full" else 0
    )
    for index in _whole(prompt, side * side + extra):
        yield (View(side, side, kept_part(prompt.size(index), prompt.processor), before=extra),)


def padded(prompt: GridPrompt) -> Pictures:
    """DeepSeek-VL, Janus: a square grid over the picture resized to fit a square and padded."""
    side, edge = prompt.patches, prompt.vision("image_size")
    for index in _whole(prompt, side * side):
        if (size := prompt.size(index)) is None:
            yield (View(side, side, None),)
            continue
        # Size of the picture after resizing; it lies in the middle of a square of `edge` pixels, so
        # the square's edges are outside of it, at fractions below 0 and above 1.
        wide, high = (max(1, int(length * edge / max(size))) for length in size)
        x, y = (edge - wide) // 2, (edge - high) // 2
        yield (View(side, side, (-x / wide, -y / high, (edge - x) / wide, (edge - y) / high)),)


def grid_thw(prompt: GridPrompt) -> Pictures:
    """Qwen-VL and kin: `image_grid_thw` patches, merged `merge` x `merge`.

    An image of several frames has a view for each.
    """
    names = ("spatial_merge_size", "merge_size", "merge_kernel_size")
    default = next((merge for name in names if (merge := prompt.vision(name))), 1)
    done = 0
    while done < prompt.tokens:
        grid, own = prompt.take("image_grid_thw"), prompt.take("image_merge_sizes")
        if grid is None:
            return
        merge = own[0] if own else default
        frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
        done += frames * rows * columns
        views = [View(rows, columns)] * frames
        yield tuple(views) if frames == 1 else as_video([(view,) for view in views])


def newlines(prompt: GridPrompt) -> Pictures:
    """HunYuan-VL: merged patches with a newline token after each row.

    A token before and one behind the picture count as image tokens, too.
    """
    merge = prompt.vision("spatial_merge_size")
    done = 0
    while done < prompt.tokens and (grid := prompt.take("image_grid_thw")) is not None:
        view = View(grid[1] // merge, grid[2] // merge, before=1, breaks=1, after=1)
        done += view.count
        yield (view,)


def pixtral(prompt: GridPrompt) -> Pictures:
    """Pixtral, Mistral 3: rows of merged patches with a text token between rows.

    `image_sizes` are those after resizing.
    """
    cell = prompt.vision("patch_size") * (getattr(prompt.config, "spatial_merge_size", None) or 1)
    done = 0
    while done < prompt.tokens and (size := prompt.take("image_sizes")) is not None:
        rows, columns = size[0] // cell, size[1] // cell
        done += rows * columns
        yield (View(rows, columns),)


def positions(prompt: GridPrompt) -> Pictures:
    """Gemma 4: `image_position_ids` give column and row of every patch, -1 in padding.

    Patches are pooled after that.
    """
    pooled = (
        prompt.vision("pooling_kernel_size") if prompt.vision("model_patch_size") is None else 1
    )
    done = 0
    while done < prompt.tokens and (at := prompt.take("image_position_ids")) is not None:
        view = View((max(at[1::2]) + 1) // pooled, (max(at[::2]) + 1) // pooled)
        done += view.count
        yield (view,)


# -- a view of the whole picture and tiles ---------------------------------------------------------


def anyres(prompt: GridPrompt) -> Pictures:
    """LLaVA-NeXT, LLaVA-OneVision: a base grid, then unpadded tiles in one grid with newlines.

    Granite 4 Vision makes fewer tokens of the patches, `downsample_rate` ("1/2") of them along each
    side.
    """
    base = int(prompt.patches * Fraction(getattr(prompt.config, "downsample_rate", 1)))
    done = 0
    while done < prompt.tokens and (size := prompt.take("image_sizes")) is not None:
        height, width = size
        together = prompt.take("batch_num_images")
        # OneVision gives pictures of one prompt no tiles.
        if together is not None and together[0] != 1:
            picture: Picture = (View(base, base, squared(width, height), after=1),)
        else:
            picture = (View(base, base, origin=None), _tiles(prompt, base, width, height))
        done += count(picture)
        yield picture


def _tiles(prompt: GridPrompt, base: int, width: int, height: int) -> View:
    """The grid of an anyres picture's tiles.

    The picture is resized into the best canvas, padded, and cut back by whole cells.
    """
    # The arithmetic below is that of transformers' image processor and of `unpad_image`, step by
    # step, roundings included: one cell too many or too few moves all tokens behind it.
    canvas_high, canvas_wide = select_best_resolution(
        (height, width), prompt.config.image_grid_pinpoints
    )
    side = prompt.vision("image_size")
    rows, columns = canvas_high // side * base, canvas_wide // side * base
    # The picture is scaled to the canvas along one side and padded along the other, half on each.
    if canvas_wide / width < canvas_high / height:
        wide, high = canvas_wide, min(math.ceil(height * canvas_wide / width), canvas_high)
    else:
        wide, high = min(math.ceil(width * canvas_high / height), canvas_wide), canvas_high
    x, y = (canvas_wide - wide) // 2, (canvas_high - high) // 2
    cut_rows = cut_columns = 0
    # Whole rows or columns of cells that lie in the padding are cut away again, equally many on
    # both sides.
    if width / height > columns / rows:
        cut_rows = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        cut_columns = (columns - int(round(width * (rows / height), 7))) // 2
    cell_high, cell_wide = canvas_high / rows, canvas_wide / columns
    # Edges of the remaining cells in pixels of the canvas, less the padding, as fractions of the
    # resized picture; parts of a cell may still lie over padding, outside of 0 to 1.
    box = (
        (cut_columns * cell_wide - x) / wide,
        (cut_rows * cell_high - y) / high,
        ((columns - cut_columns) * cell_wide - x) / wide,
        ((rows - cut_rows) * cell_high - y) / high,
    )
    rows, columns = rows - 2 * cut_rows, columns - 2 * cut_columns
    most = getattr(prompt.config, "vision_aspect_ratio", None)
    # OneVision shrinks grids that are larger than this.
    if isinstance(most, str) and most.startswith("anyres_max_"):
        ratio = math.sqrt(rows * columns / (int(most.removeprefix("anyres_max_")) * base**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
    return View(rows, columns, box, tile=1, breaks=1)


def _tile_grid(side: int, rows: int, columns: int) -> Picture:
    """Tiles of side x side tokens in raster order, then a view of the whole picture."""
    tiles = [
        View(
            side,
            side,
            (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows),
            origin=(r * side, c * side),
            tile=r * columns + c + 1,
        )
        for r in range(rows)
        for c in range(columns)
    ]
    return (*tiles, View(side, side, origin=None))


def internvl(prompt: GridPrompt) -> Pictures:
    """InternVL: tiles in raster order, then the whole picture.

    The grid of the tiles follows from the picture's size.
    """
    side = int(prompt.patches * prompt.config.downsample_ratio)
    for index, (_, run) in enumerate(prompt.runs):
        views, rest = divmod(run, side * side)
        if rest:
            return
        if views == 1:
            yield (View(side, side),)
            continue
        shape = _canvas(
            prompt.size(index), views - 1, prompt.vision("image_size"), prompt.processor
        )
        yield _tile_grid(side, *shape) if shape else nowhere(run)


def _canvas(size: Size | None, tiles: int, pixels: int, processor: Any) -> tuple[int, int] | None:
    """Rows and columns of the tile grid that InternVL's processor chose.

    None if the picture's size is not known, or the grid has another number of tiles.
    """
    if size is None:
        return None
    width, height = size
    low, high = (
        getattr(processor, "min_patches", None) or 1,
        getattr(processor, "max_patches", None) or 12,
    )
    shapes = [
        (c, r) for c in range(1, high + 1) for r in range(1, high + 1) if low <= c * r <= high
    ]
    best, least = (1, 1), math.inf
    # InternVL's `find_closest_aspect_ratio`: the nearest proportions, of equally near ones the
    # larger grid if the picture has more than half as many pixels.
    for columns, rows in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        difference = abs(width / height - columns / rows)
        if difference < least or (
            difference == least and width * height > 0.5 * pixels**2 * columns * rows
        ):
            best, least = (columns, rows), difference
    return (best[1], best[0]) if best[0] * best[1] == tiles else None


def idefics3(prompt: GridPrompt) -> Pictures:
    """Idefics3, SmolVLM: tiles marked by text tokens in between, the whole picture last.

    Every view is a run of its own, and the token before it names it: the one before a whole picture
    is the same every time. Between two tiles of a row stand two tokens, and more at the end of a
    row.
    """
    side = prompt.patches // prompt.config.scale_factor
    if any(length != side * side for _, length in prompt.runs):
        return
    # The last run of a row is always a whole picture, so its marker is the name of whole pictures.
    marker = [prompt.ids[start - 1] if start else -1 for start, _ in prompt.runs]
    begin = 0
    for at, name in enumerate(marker):
        if name != marker[-1]:
            continue
        tiles, begin = prompt.runs[begin:at], at + 1
        if not tiles:
            yield (View(side, side),)
            continue
        # Where a row of tiles ends, counted in tokens between two runs.
        ends = [after[0] - sum(before) > 2 for before, after in pairwise(tiles)]
        columns = ends.index(True) + 1 if True in ends else len(tiles)
        yield _tile_grid(side, len(tiles) // columns, columns)


GRIDS: dict[str, Describe] = {
    "llava": clip,
    "vipllava": clip,
    "video_llava": clip,
    "llava_next": anyres,
    "llava_next_video": anyres,
    "llava_onevision": anyres,
    "granite4_vision": anyres,
    "paligemma": fixed,
    "gemma3": fixed,
    "shieldgemma2": fixed,
    "gemma4": positions,
    "gemma4_unified": positions,
    "mistral3": pixtral,
    "mistral_large4": pixtral,
    "lighton_ocr": pixtral,
    "internvl": internvl,
    "qianfan_ocr": internvl,
    "idefics3": idefics3,
    "smolvlm": idefics3,
    "hunyuan_vl": newlines,
    "aya_vision": square,
    "ovis2": square,
    "fast_vlm": kept_square,
    "deepseek_vl": padded,
    "janus": padded,
    **dict.fromkeys(
        ("blip-2", "instructblip", "instructblipvideo", "idefics2", "aria", "deepseek_ocr2"), latent
    ),
}
"""Family -> its way of laying out pictures; families with an `image_grid_thw` input need no entry.
"""


def describe_rows(
    name: str,
    config: Any,
    rows: Sequence[Sequence[int]],
    runs: Sequence[Sequence[tuple[int, int]]],
    inputs: Mapping[str, Any],
    originals: Originals | None = None,
) -> tuple[list[list[Picture]], str]:
    """The pictures and videos of every row of a batch, and what was assumed about them.

    Where the views do not add up to the image tokens found (inputs not given, features made
    elsewhere), each run of image tokens counts as a picture without places.

    Args:
        name: transformers' `model_type`.
        config: the model's config.
        rows: token ids of every row.
        runs: (start, length) of the unbroken runs of image tokens of every row.
        inputs: the other arguments of the model call, of the whole batch.
        originals: what the pictures and videos were, and the processors; None if unknown.
    """
    # One supply for the batch: the inputs list pictures row after row, and each row takes its own
    # off the front.
    supply, batch_runs = _supply(inputs), sum(map(len, runs))
    found: list[list[Picture]] = []
    notes: list[str] = []
    for b, (ids, spans) in enumerate(zip(rows, runs, strict=True)):
        prompt = GridPrompt(config, inputs, ids, (), batch_runs, supply)
        shown = None
        if originals is not None:
            shown = originals.shown(b)
            prompt = replace(
                prompt,
                processor=originals.processor,
                video_processor=originals.video_processor,
            )
        pictures, said = _describe_row(name, prompt, spans, shown)
        if shown is not None and len(shown) != len(pictures):
            # sizes of other pictures than the row shows say nothing about these
            pictures = [tuple(replace(view, box=None) for view in one) for one in pictures]
        found.append(pictures)
        notes += said
    return found, "; ".join(dict.fromkeys(notes))


def _describe_row(
    name: str,
    prompt: GridPrompt,
    runs: Sequence[tuple[int, int]],
    shown: Sequence[Shown] | None,
) -> tuple[list[Picture], list[str]]:
    """The pictures and videos of one row, and what was assumed.

    Args:
        name: the model type.
        prompt: of the row, without runs and sizes.
        runs: of image tokens.
        shown: what the row's pictures and videos were, None if that is unknown.
    """
    as_frames = not any(_is_video(prompt, run) for run in runs)  # videos shown as pictures
    left: dict[bool, list[Size] | None] = {False: None, True: None}
    if shown is not None:
        left[True] = [one.size for one in shown if one.frames]
        left[False] = [
            one.size
            for one in shown
            if as_frames or not one.frames
            for _ in range(max(1, one.frames))
        ]
    pictures: list[Picture] = []
    notes: list[str] = []
    for is_video, group in groupby(runs, key=lambda run: _is_video(prompt, run)):
        spans, sizes = tuple(group), left[is_video]
        part = replace(prompt, runs=spans, sizes=sizes)
        describe = VIDEOS.get(name, unknown) if is_video else _describing(name, prompt)
        here = list(describe(part))
        # What the inputs describe must explain every image token found; anything else is not
        # believed.
        if sum(map(count, here)) != part.tokens:
            here = [nowhere(length) for _, length in spans]
            notes.append(VIDEO if is_video else UNKNOWN)
        elif describe is latent:
            notes.append(NO_PLACE)
        pictures += here
        # Sizes of pictures and of videos are used up separately, in the order of the prompt.
        left[is_video] = None if sizes is None else sizes[len(here) :]
    return (_together(pictures, shown) if as_frames and shown else pictures), notes


def _together(pictures: list[Picture], shown: Sequence[Shown]) -> list[Picture]:
    """The frames of every video of a row as one, where the model was shown them as pictures.

    Untouched if there are other pictures than these.
    """
    counts = [max(1, one.frames) for one in shown]
    if sum(counts) != len(pictures):
        return pictures
    rest = iter(pictures)
    return [
        as_video([next(rest) for _ in range(one.frames)]) if one.frames else next(rest)
        for one in shown
    ]


def _describing(name: str, prompt: GridPrompt) -> Describe:
    """How this family lays out its pictures."""
    if name in GRIDS:
        return GRIDS[name]
    return grid_thw if prompt.inputs.get("image_grid_thw") is not None else unknown


def _is_video(prompt: GridPrompt, run: tuple[int, int]) -> bool:
    """Whether a run of image tokens has the id that stands for a video."""
    return prompt.ids[run[0]] in video_ids(prompt.config)


def video_ids(config: Any) -> set[int]:
    """Token ids that stand for videos and for nothing else."""
    ids = {getattr(config, name, None) for name in ("video_token_id", "video_token_index")}
    ids -= {getattr(config, name, None) for name in ("image_token_id", "image_token_index")}
    return {value for value in ids if isinstance(value, int)}


def _supply(inputs: Mapping[str, Any]) -> dict[str, deque[list[int]]]:
    """One queue for every input that describes pictures one by one."""
    supply: dict[str, deque[list[int]]] = {}
    for name in (
        "image_grid_thw",
        "image_sizes",
        "image_merge_sizes",
        "video_grid_thw",
    ):
        if (value := inputs.get(name)) is not None:
            rows = value.tolist() if isinstance(value, Tensor) else list(value)
            supply[name] = deque(
                [int(v) for v in row] if isinstance(row, list | tuple) else [int(row)]
                for row in rows
            )
    if (value := inputs.get("image_position_ids")) is not None:
        supply["image_position_ids"] = deque(row.flatten().tolist() for row in value)
    if (value := inputs.get("batch_num_images")) is not None:
        supply["batch_num_images"] = deque([int(n)] for n in value for _ in range(int(n)))
    if isinstance(pixels := inputs.get("pixel_values_videos"), Tensor) and pixels.dim() == 5:
        supply["video_frames"] = deque([pixels.shape[1]] for _ in pixels)
    return supply
