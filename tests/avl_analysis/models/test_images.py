"""open_image: every way in gives the same RGB picture, and nothing unreadable gets through."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avl_analysis.errors import InputError
from avl_analysis.models.images import MAX_PIXELS, open_image
from tests import tiny


def _png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size its data do not have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def test_path_string_bytes_array_and_pil_give_the_same_pixels(tmp_path: Path) -> None:
    picture = tiny.picture()
    path = tmp_path / "no-extension"
    picture.save(path, format="PNG")
    for source in (path, str(path), path.read_bytes(), np.asarray(picture), picture):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(picture))


def test_greyscale_palette_and_sixteen_bit_pictures_become_rgb_without_clipping() -> None:
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(open_image(deep))[..., 0], grey)
    assert np.array_equal(np.asarray(open_image(grey))[..., 1], grey)
    assert open_image(tiny.picture().convert("P")).mode == "RGB"


def test_transparent_areas_become_white_and_opaque_ones_keep_their_colour() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    image = np.asarray(open_image(pixels))
    assert image[0, 0].tolist() == [10, 20, 30]
    assert image[1, 1].tolist() == [255, 255, 255]


def test_a_picture_lying_on_its_side_is_turned_upright_by_its_exif_tag(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate a quarter turn clockwise to view
    tiny.picture((40, 30)).save(tmp_path / "phone.jpg", exif=exif)
    assert open_image(tmp_path / "phone.jpg").size == (30, 40)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such.png", "no such file: no/such.png"),
        (".", "is a folder"),
        ("https://example.org/cat.png", "download the picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image this program reads; possible: PNG"),
        (b"", "not an image"),
        (_png(0, 5), "damaged|no pixels|not an image"),
        (_png(9000, 9000), "9000 x 9000 = pixels; at most 64 million"),
        (_png(30000, 30000), "more than 178 million pixels"),
        (_png(100, 100), "damaged or truncated"),
        (np.zeros((4, 4, 3)), r"shape \(4, 4, 3\) and type float64: pass uint8"),
        (np.zeros((3, 4, 5), np.uint8), r"shape \(3, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (Image.new("F", (2, 2)), "32-bit pixels"),
        (Image.new("RGB", (0, 4)), r"no pixels \(0 x 4\)"),
        (7, "cannot read a picture from int"),
    ],
)
def test_what_is_not_a_usable_picture_is_refused_with_its_reason(
    source: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_image(source)  # type: ignore[arg-type]


def test_a_truncated_photograph_is_refused_and_not_filled_with_grey() -> None:
    buffer = io.BytesIO()
    tiny.picture((200, 200)).save(buffer, format="JPEG")
    with pytest.raises(InputError, match="truncated"):
        open_image(buffer.getvalue()[: buffer.tell() // 2])


def test_a_picture_too_large_is_refused_before_its_pixels_are_decoded() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(InputError, match="scale it down"):
        open_image(_png(side, side))
