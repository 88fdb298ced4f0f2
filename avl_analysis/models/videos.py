"""Videos as frames: from a folder of frames, a list of them, an animated picture, or a video file.

A `Video` stands wherever a picture may: in `VLM.prepare`, in a `Sample`, on the command line. It
only says where the frames are; `open_video` reads them. Frames are pictures like any other
(`open_image`); video files are decoded by the first of PyAV, OpenCV and decord that is installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageSequence

from avl_analysis.errors import InputError, blamed_on_input
from avl_analysis.files import user_path
from avl_analysis.models.images import FORMATS, ImageSource, open_image

FILES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv")
"""Endings of the names of files that are taken for videos without being asked."""

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""Endings of the names of files in a folder that are taken for its frames."""

FROM_FILE = 8
"""Frames that are taken of a video file unless a number is given."""

MOST_FRAMES = 256
"""Frames of one video at most; each becomes tens to hundreds of tokens."""

FPS = 2.0
"""Frames per second of frames whose rate nobody gave: the rate at which Qwen3-VL's processor
samples a video (`fps = 2` of transformers' Qwen3VLVideoProcessor). Models that are told times
(Qwen2.5-VL, Qwen3-VL, SmolVLM) are told those that follow from it.
"""

DECODERS = ("av", "cv2", "decord")
"""Modules that decode video files, in the order in which they are tried."""

_INSTALL = "pip install av"


@dataclass(frozen=True, eq=False)
class Video:
    """Frames that belong together, in order.

    Attributes:
        source: a list of frames (anything that is taken for a picture), a folder of frames (in the
            order of their names, numbers in them counting as numbers), an animated picture, or a
            video file.
        frames: how many frames are taken, evenly spread from the first to the last; None takes all,
            of a video file `FROM_FILE`.
        fps: frames per second of the source, before any are left out; None asks the file, and takes
            `FPS` where there is none to ask.
    """

    source: Sequence[ImageSource] | str | os.PathLike[str]
    frames: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.frames is not None and not 1 <= self.frames <= MOST_FRAMES:
            raise InputError(f"{self.frames} frames of a video: ask for 1 to {MOST_FRAMES}")
        if self.fps is not None and not 0 < self.fps < 10_000:
            raise InputError(f"{self.fps} frames per second: give a number above 0")


Source: TypeAlias = "ImageSource | Video"
"""A picture or a video."""


@dataclass(frozen=True, eq=False)
class Frames:
    """A video that was read.

    Attributes:
        images: the frames that are shown, RGB, all of one size.
        indices: which frames of the source these are.
        total: frames of the source.
        fps: frames per second of the source.
    """

    images: tuple[Image.Image, ...]
    indices: tuple[int, ...]
    total: int
    fps: float

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a frame in pixels."""
        return self.images[0].size

    @property
    def seconds(self) -> tuple[float, ...]:
        """When each frame is shown, counted from the first of the source."""
        return tuple(index / self.fps for index in self.indices)

    @property
    def pixels(self) -> np.ndarray:
        """(frames, height, width, 3) uint8."""
        return np.stack([np.asarray(image) for image in self.images])


def is_video(source: Source) -> bool:
    """Whether a source is a video: a `Video`, a folder, or a file named like one."""
    if isinstance(source, str | os.PathLike):
        path = user_path(source)
        return path.suffix.lower() in FILES or path.is_dir()
    return isinstance(source, Video)


def open_source(source: Source) -> Image.Image | Frames:
    """A picture as `open_image` gives it, a video as `open_video` does."""
    if isinstance(source, Video):
        return open_video(source)
    if isinstance(source, str | os.PathLike) and is_video(source):
        return open_video(Video(source))
    return open_image(source)


def open_video(video: Video) -> Frames:
    """The frames of a video.

    Raises:
        InputError: nothing there, no frames, frames of different sizes, more than `MOST_FRAMES`
            frames, a video file without an installed decoder or that cannot be decoded.
    """
    if not isinstance(video.source, str | os.PathLike):
        return _of_list(list(video.source), video, "the list of frames")
    path = user_path(video.source)
    if path.is_dir():
        return _of_list(frame_files(path), video, str(path))
    if not path.is_file():
        raise InputError(
            f"no such video: {path} (looked from {Path.cwd()}); pass a folder of frames or a file"
        )
    if (animated := _animation(path)) is not None:
        images, fps = animated
        return _of_list(images, video, str(path), fps)
    return _of_file(path, video)


def parts_of(source: Source) -> list[ImageSource]:
    """What a picture or video consists of, unopened: a picture, a file, or the frames."""
    if isinstance(source, Video):
        if not isinstance(source.source, str | os.PathLike):
            return list(source.source)
        source = source.source
    elif not is_video(source):
        return [source]
    path = user_path(str(source))
    return list(frame_files(path)) if path.is_dir() else [path]


def frame_files(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of their names; frame 2 comes before frame 10."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES]
    # Hidden files are no frames, also where their names end like one.
    files = [path for path in files if path.is_file() and not path.name.startswith(".")]
    return sorted(files, key=lambda path: _natural(path.name))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names as numbers."""
    parts = re.split(r"(\d+)", name.lower())
    # With the group in the pattern digits stand at odd places. Pairs, so that no number is compared
    # with a text.
    return [(int(part), "") if place % 2 else (0, part) for place, part in enumerate(parts)]


def chosen(total: int, wanted: int | None) -> tuple[int, ...]:
    """Which frames of `total` are taken: `wanted` of them from first to last, evenly spread."""
    count = total if wanted is None else min(wanted, total)
    return tuple(np.linspace(0, total - 1, count).round().astype(int).tolist())


def _of_list(
    sources: Sequence[ImageSource], video: Video, name: str, fps: float | None = None
) -> Frames:
    """The frames of a list of pictures.

    Args:
        sources: all frames.
        video: what was asked for.
        name: of the video in messages.
        fps: what the file says of its rate.
    """
    if not sources:
        raise InputError(
            f"{name} has no frames: pass at least one picture ({', '.join(PICTURES)} in a folder)"
        )
    indices = chosen(len(sources), video.frames)
    if len(indices) > MOST_FRAMES:
        raise InputError(
            f"{name} has {len(indices)} frames, at most {MOST_FRAMES} are shown: say how many are"
            " taken with --frames, or Video(..., frames=8)"
        )
    images = tuple(open_image(sources[index]) for index in indices)
    if len(sizes := sorted({image.size for image in images})) > 1:
        raise InputError(
            f"the frames of {name} differ in size ({sizes[0]} and {sizes[1]} pixels wide and high):"
            " make them equal, or pass them as pictures"
        )
    return Frames(images, indices, len(sources), video.fps or fps or FPS)


def _animation(path: Path) -> tuple[list[Image.Image], float | None] | None:
    """The frames of an animated picture and their rate; None for anything Pillow does not read."""
    try:
        # Reads the header only; a video file is none of these formats and goes to a decoder.
        picture = Image.open(path, formats=FORMATS)
    except (OSError, Image.DecompressionBombError):
        return None
    with blamed_on_input(f"{path} is a damaged picture"), closing(picture):
        frames = []
        for frame in ImageSequence.Iterator(picture):
            # The iterator gives the same object every time, moved on to the next frame.
            frames.append(frame.copy())
            # All frames are decoded before some are chosen, so their number is bounded.
            if len(frames) > 100 * MOST_FRAMES:
                raise InputError(f"{path} has more than {100 * MOST_FRAMES} frames: shorten it")
        duration = picture.info.get("duration")
        # Duration is in milliseconds per frame.
        return frames, 1000 / duration if duration else None


# -- video files -----------------------------------------------------------------------------------


def _of_file(path: Path, video: Video) -> Frames:
    name = next((name for name in DECODERS if importlib.util.find_spec(name) is not None), None)
    if name is None:
        raise InputError(
            f"{path} is a video file, and nothing that decodes one is installed: {_INSTALL} (or"
            " opencv-python-headless, or decord), or pass a folder of its frames"
        )
    with blamed_on_input(f"{path} cannot be decoded by {name}", ": convert it, or pass its frames"):
        frames = _DECODE[name](path, FROM_FILE if video.frames is None else video.frames)
    if not frames.images:
        raise InputError(f"{path} holds no frame that {name} can decode: convert it")
    return Frames(frames.images, frames.indices, frames.total, video.fps or frames.fps)


def _picked(count: int, arrays: Iterator[np.ndarray], wanted: int) -> tuple[Any, tuple[int, ...]]:
    """The wanted ones of `count` frames that come one after another, and which they are."""
    indices = chosen(count, wanted) if count else ()
    # Arrays come one at a time, and only the wanted ones are kept.
    images = {
        place: Image.fromarray(array) for place, array in enumerate(arrays) if place in indices
    }
    return tuple(images[place] for place in indices), indices


def _with_av(path: Path, wanted: int) -> Frames:
    import av

    def decoded() -> Iterator[Any]:
        with av.open(str(path)) as container:
            yield from container.decode(video=0)

    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
    count = sum(1 for _ in decoded())  # what the header says is often missing or wrong
    arrays = (frame.to_ndarray(format="rgb24") for frame in decoded())
    return Frames(*_picked(count, arrays, wanted), count, float(rate or FPS))


def _with_cv2(path: Path, wanted: int) -> Frames:
    import cv2

    def decoded() -> Iterator[np.ndarray]:
        capture = cv2.VideoCapture(str(path))
        try:
            while True:
                there, frame = capture.read()
                if not there:
                    return
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        finally:
            capture.release()

    capture = cv2.VideoCapture(str(path))
    rate = capture.get(cv2.CAP_PROP_FPS)
    capture.release()
    # Decoded twice, as with PyAV: once to count, once to keep the chosen frames.
    count = sum(1 for _ in decoded())
    return Frames(*_picked(count, decoded(), wanted), count, float(rate or FPS))


def _with_decord(path: Path, wanted: int) -> Frames:
    import decord

    reader = decord.VideoReader(str(path))
    indices = chosen(len(reader), wanted)
    arrays = reader.get_batch(list(indices)).asnumpy()
    images = tuple(Image.fromarray(array) for array in arrays)
    return Frames(images, indices, len(reader), float(reader.get_avg_fps() or FPS))


_DECODE: dict[str, Callable[[Path, int], Frames]] = {
    "av": _with_av,
    "cv2": _with_cv2,
    "decord": _with_decord,
}
