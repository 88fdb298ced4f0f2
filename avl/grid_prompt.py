"""What is known of one row of a batch when its pictures are laid out.

`grids` and `video_grids` read it. The part of a picture that a processor keeps is here too, because
pictures and videos are cropped alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from avl.views import WHOLE, Box, Picture

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class GridPrompt:
    """One row of a batch of prompts.

    Attributes:
        config: the model's config.
        inputs: keyword arguments of the model call, of the whole batch.
        ids: token ids of the row, padding included.
        runs: (start, length) of every unbroken run of image tokens in the row.
        batch_runs: number of runs in the whole batch.
        supply: what is left of inputs that hold one row per picture of the whole batch (grids,
            sizes), in order.
        sizes: sizes of this row's original pictures, if known.
        processor: the image processor, if known.
        video_processor: the video processor, if known.
    """

    config: Any
    inputs: Mapping[str, Any]
    ids: Sequence[int]
    runs: Sequence[tuple[int, int]]
    batch_runs: int
    supply: Mapping[str, deque[list[int]]]
    sizes: Sequence[Size] | None = None
    processor: Any = None
    video_processor: Any = None

    @property
    def tokens(self) -> int:
        """Number of image tokens in the row."""
        return sum(length for _, length in self.runs)

    def position(self, index: int) -> int:
        """Sequence index of the row's image token number `index`."""
        for start, length in self.runs:
            if index < length:
                return start + index
            index -= length
        raise IndexError(f"the row has {self.tokens} image tokens")

    def size(self, index: int) -> Size | None:
        """Width and height of the row's picture number `index`."""
        return self.sizes[index] if self.sizes is not None and index < len(self.sizes) else None

    def take(self, name: str) -> list[int] | None:
        """The next picture's row of a (pictures, ...) integer input; None if there is none."""
        queue = self.supply.get(name)
        return queue.popleft() if queue else None

    def vision(self, name: str, default: Any = None) -> Any:
        """A number of the vision config, the first of it where it is a pair."""
        value = getattr(getattr(self.config, "vision_config", None), name, default)
        return value[0] if isinstance(value, list | tuple) else value

    @property
    def patches(self) -> int:
        """Patches along one side of the vision tower's square input."""
        return self.vision("image_size") // self.vision("patch_size")


Pictures = Iterator[Picture]
Describe = Callable[[GridPrompt], Pictures]


def kept_part(size: Size | None, processor: Any) -> Box | None:
    """What a processor keeps of a picture.

    Without a processor, what CLIP's keeps: the shortest side is resized, the centre cropped.
    """
    if size is None:
        return None
    if getattr(processor, "do_pad", False):
        return squared(*size)
    if processor is not None and not getattr(processor, "do_center_crop", False):
        return WHOLE
    width, height = size
    short = number_of(processor, "size", "shortest_edge") or min(width, height)
    wide, high = (
        (short, int(short * height / width))
        if width <= height
        else (int(short * width / height), short)
    )
    cropped = number_of(processor, "crop_size", "height") or short
    left, top = (wide - cropped) // 2, (high - cropped) // 2
    return (left / wide, top / high, (left + cropped) / wide, (top + cropped) / high)


def number_of(processor: Any, setting: str, name: str) -> int | None:
    """One number of a processor's size settings, which are dictionaries or objects."""
    value = getattr(processor, setting, None)
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def squared(width: int, height: int) -> Box:
    """A picture padded to a square, as a box around it."""
    longest = max(width, height)
    x, y = (longest - width) // 2, (longest - height) // 2
    return (-x / width, -y / height, (longest - x) / width, (longest - y) / height)
