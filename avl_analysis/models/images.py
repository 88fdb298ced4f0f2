"""Images from anywhere (path, bytes, array, PIL) as RGB images.

Or an error that says what is wrong with them.

Files are judged by their content, not their name, and decoded by a short list of raster formats
only, so that a picture from a stranger can neither start an interpreter (as EPS does) nor fill the
memory: the size in the header is checked before any pixel is decoded. Note: phone
photographs are turned upright by their EXIF tag, transparent areas become white (dropping the alpha
channel would leave whatever colour lies beneath), and 16-bit greyscale is scaled, where Pillow's
own conversion would clip it to white.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from avl_analysis.errors import InputError, one_line
from avl_analysis.files import user_path

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are decoded, by content. Of animated files the first frame is taken."""

MAX_PIXELS = 64_000_000
"""Largest picture accepted, in pixels: 192 MB once decoded to RGB, well beyond any model's input.
"""

ImageSource: TypeAlias = "Image.Image | str | os.PathLike[str] | bytes | np.ndarray"


def open_image(source: ImageSource) -> Image.Image:
    """`source` as an RGB image.

    Args:
        source: a PIL image, a path, the bytes of an image file, or a uint8 array of shape (height,
            width), (height, width, 3) or (height, width, 4).

    Raises:
        InputError: missing file, folder, not an image, truncated, no pixels, more than
            `MAX_PIXELS`, other arrays.
    """
    if isinstance(source, Image.Image):
        return _rgb(source, "the image")
    if isinstance(source, np.ndarray):
        return _rgb(_from_array(source), "the array")
    if isinstance(source, (bytes, bytearray)):
        return _decode(io.BytesIO(source), f"the {len(source)} bytes given")
    if isinstance(source, (str, os.PathLike)):
        path = user_path(source)
        if str(source).startswith(("http://", "https://")):
            raise InputError(
                f"{source} is an address, not a file: download the picture and pass its path"
            )
        if path.is_dir():
            raise InputError(
                f"{path} is a folder, not an image: pass the path of one picture in it"
            )
        if not path.is_file():
            raise InputError(
                f"no such file: {path} (looked from {Path.cwd()}); check the path of the picture"
            )
        return _decode(path, str(path))
    raise InputError(
        f"cannot read a picture from {type(source).__name__}: pass a PIL image, a path, bytes or a"
        " uint8 array"
    )


def _decode(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(file, formats=FORMATS) as image:
            return _rgb(image, name)
    except Image.DecompressionBombError as error:
        # Pillow's own limit, twice its MAX_IMAGE_PIXELS, is raised by `open`, before the size is
        # known here.
        raise InputError(_too_large(name, "more than 178 million")) from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} is not an image this program reads; possible: {', '.join(FORMATS)}"
        ) from error
    # From `_rgb`; the handler below would call the picture damaged.
    except InputError:
        raise
    except Exception as error:  # decoders raise SyntaxError, struct.error and others
        raise InputError(
            f"{name} is a damaged or truncated image ({one_line(error)}): export or download it"
            " again"
        ) from error


def _rgb(image: Image.Image, name: str) -> Image.Image:
    # Of a file this is its header's; pixels are decoded further down, after these checks.
    width, height = image.size
    if not width or not height:
        raise InputError(
            f"{name} has no pixels ({width} x {height}): pass a picture with at least one"
        )
    if width * height > MAX_PIXELS:
        raise InputError(_too_large(name, f"{width} x {height} ="))
    if image.mode in ("I;16", "I;16B", "I;16L"):
        # 65535 becomes 255.
        image = Image.fromarray((np.asarray(image).astype(np.uint16) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise InputError(
            f"{name} has 32-bit pixels of unknown range (mode {image.mode}): convert it to 8 bits"
            " first"
        )
    image = ImageOps.exif_transpose(image)
    # True also for palettes and single colours that are transparent, not for alpha channels only.
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _too_large(name: str, size: str) -> str:
    return (
        f"{name} has {size} pixels; at most {MAX_PIXELS // 1_000_000} million are accepted: scale"
        " it down first"
    )


def _from_array(array: np.ndarray) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shaped:
        raise InputError(
            f"cannot read a picture from an array of shape {array.shape} and type {array.dtype}: "
            "pass uint8 values 0-255 of shape (height, width, 3)"
        )
    if not array.size:
        raise InputError(
            f"an array of shape {array.shape} has no pixels: pass a picture with at least one"
        )
    return Image.fromarray(array)
