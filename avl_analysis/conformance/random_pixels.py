"""Random pixel inputs where the image processor needs torchvision; ids between image tokens.

Shapes are those the types' `forward` methods document; the numbers mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from avl_analysis.conformance.shrink import PATCH, SIDE

Pixels = Callable[[Any], dict[str, Any]]
"""Pixel inputs for a tiny configuration, of one picture."""

BREAK, END, NEWLINE = 100, 101, 102
"""Ids of text tokens between image tokens: row break or view marker, end of a picture or view, line
break.
"""


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def square(config: Any) -> dict[str, Any]:
    """One square picture."""
    return {"pixel_values": _noise(1, 3, SIDE, SIDE)}


def patches(
    channels_last: int | None = None, rows: int = 4, columns: int = 6, frames: int = 2
) -> Pixels:
    """Flattened patches of one picture and its grid, as the Qwen family takes them."""

    def make(config: Any) -> dict[str, Any]:
        width = channels_last or 3 * frames * PATCH * PATCH
        return {
            "pixel_values": _noise(rows * columns, width),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }

    return make


def patch_images(config: Any) -> dict[str, Any]:
    """Patches as small pictures (Kimi)."""
    return {
        "pixel_values": _noise(24, 3, PATCH, PATCH),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }


def naflex(config: Any) -> dict[str, Any]:
    """SigLIP 2 patches with their grid (LFM2-VL)."""
    return {
        "pixel_values": _noise(1, 24, 3 * PATCH * PATCH),
        "spatial_shapes": torch.tensor([[4, 6]]),
        "pixel_attention_mask": torch.ones(1, 24, dtype=torch.long),
    }


def positions(config: Any) -> dict[str, Any]:
    """Merged patches of one picture with their coordinates (Gemma 4), unpadded."""
    vision = config.vision_config
    side = getattr(vision, "model_patch_size", vision.patch_size)
    # (24, 2), x first and running fastest.
    where = torch.tensor([[x, y] for y in range(4) for x in range(6)])
    return {
        "pixel_values": _noise(1, 24, 3 * side * side).sigmoid(),
        "image_position_ids": where[None],
    }


def minicpm(config: Any) -> dict[str, Any]:
    """A strip of patches of one picture, four rows of eight (MiniCPM-V)."""
    return {"pixel_values": _noise(1, 3, PATCH, 32 * PATCH), "target_sizes": torch.tensor([[4, 8]])}


def molmo(config: Any) -> dict[str, Any]:
    """One low-resolution crop whose 6 x 6 patches are pooled two by two (Molmo 2)."""
    # Rows and columns of the patches split into (block row, row, block column, column); then blocks
    # in front: (9, 4), the four patches of each token.
    index = torch.arange(36).view(3, 2, 3, 2).permute(0, 2, 1, 3).reshape(9, 4)
    return {
        "pixel_values": _noise(1, 36, 3 * PATCH * PATCH),
        "image_token_pooling": index,
        "image_grids": torch.tensor([[3, 3, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    }


def inkling(config: Any) -> dict[str, Any]:
    """Twelve patches of several frames (Inkling)."""
    vision = config.vision_config
    return {
        "pixel_values": _noise(
            12, vision.temporal_patch_size, vision.patch_size, vision.patch_size, 3
        )
    }


def inkling2(config: Any) -> dict[str, Any]:
    """Merged patches as small pictures and their grid (Inkling 2)."""
    side = 2 * config.vision_config.patch_size
    return {"pixel_values": _noise(12, side, side, 3), "image_grid_thw": torch.tensor([[1, 3, 4]])}


def radio(config: Any) -> dict[str, Any]:
    """Flattened patches and their grid (Nemotron-H Omni)."""
    return {"pixel_values": _noise(24, 3 * PATCH * PATCH), "image_grid_hw": torch.tensor([[4, 6]])}


def large_square(config: Any) -> dict[str, Any]:
    """One square picture of 64 pixels (DeepSeek-OCR 2)."""
    return {"pixel_values": _noise(1, 3, 64, 64)}


def frames(config: Any) -> dict[str, Any]:
    """Four frames and the text for the Q-Former (InstructBLIP for video)."""
    ids = torch.tensor([[5, 6, 7]])
    return {
        "pixel_values": _noise(1, 4, 3, SIDE, SIDE),
        "qformer_input_ids": ids,
        "qformer_attention_mask": torch.ones_like(ids),
    }


def qformer(config: Any) -> dict[str, Any]:
    """One square picture and the text for the Q-Former (InstructBLIP)."""
    ids = torch.tensor([[5, 6, 7]])
    return {
        **square(config),
        "qformer_input_ids": ids,
        "qformer_attention_mask": torch.ones_like(ids),
    }


def fuyu(config: Any) -> dict[str, Any]:
    """Twelve flattened patches (Fuyu)."""
    return {"pixel_values": _noise(1, 12, 3 * config.patch_size**2)}


def emu(config: Any) -> dict[str, Any]:
    """One square picture and its size (Emu 3)."""
    return {**square(config), "image_sizes": torch.tensor([[SIDE, SIDE]])}


def tiles(config: Any) -> dict[str, Any]:
    """Two tiles of one picture."""
    return {"pixel_values": _noise(1, 2, 3, SIDE, SIDE)}


def broken_rows(config: Any, given: Mapping[str, Any], image: int) -> list[int]:
    """A break token after each row of merged patches, an end token after the last (Pixtral)."""
    # Side of a merged patch in pixels.
    cell = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    rows, columns = (int(n) // cell for n in given["image_sizes"][0])
    # The break after the last row is replaced by the end token.
    return [*([*[image] * columns, BREAK] * rows)[:-1], END]


def marked_tiles(config: Any, given: Mapping[str, Any], image: int) -> list[int]:
    """Tiles behind a token for row and column, line breaks, the whole picture last (Idefics3)."""
    vision = config.vision_config
    view = [image] * (vision.image_size // vision.patch_size // config.scale_factor) ** 2
    rows, columns = int(given["rows"][0][0]), int(given["cols"][0][0])
    ids: list[int] = []
    for row in range(rows):
        # An id for every row and column: from 110 on, clear of the other markers, and below the ids
        # of text (128) for three rows of up to six columns.
        ids += [
            i for column in range(columns) for i in (END, BREAK + 10 + 6 * row + column, *view)
        ] + [NEWLINE]
    return [*ids, END, BREAK, *view, END]
