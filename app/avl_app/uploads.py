"""What visitors send: pictures, recordings, comparisons, policies, lists of questions, within
limits.

Nothing sent is believed: content decides, never the name; sizes are checked before anything is
decoded or unpacked; files that point to other files are refused; paths inside a list of questions
count only by their last part.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from avl_analysis.corpus.questions import Sample, read_samples
from avl_analysis.errors import InputError
from avl_analysis.models.images import FORMATS, open_image
from avl_app.data import Picture, picture

Result = TypeVar("Result")
MOST_UNPACKED = 2**31
"""Bytes the arrays of a recording or comparison may have when unpacked."""
MOST_PICTURES = 8
"""Pixels of all pictures sent with a list of questions, in largest pictures."""
_NONSENSE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)
"""What reading raises where a file has the form it should have, but not the content."""


def uploaded(data: bytes, name: str, *, most_bytes: int, most_pixels: int) -> Picture:
    """A picture from the bytes of a file somebody sent.

    Judged by content, never by name; size in bytes and pixels are checked before any pixel is
    decoded.

    Raises:
        InputError: too large, too many pixels, not an image, damaged.
    """
    if len(data) > most_bytes:
        raise InputError(
            f"the file has {len(data) / 2**20:.1f} MB; at most {most_bytes / 2**20:.0f} MB are"
            " accepted: scale it down first"
        )
    width, height = _size(data)
    if width * height > most_pixels:
        raise InputError(
            f"the picture has {width} x {height} pixels; at most {most_pixels / 1e6:.0f} million"
            " are accepted: scale it down first"
        )
    return picture(np.asarray(open_image(data)), name)


def from_bytes(read: Callable[[Path], Result], data: bytes, name: str) -> Result:
    """What `read` makes of a file with this content; its messages name the file, not the folder it
    lay in for a moment.

    Raises:
        InputError: as `read` does, or a file with content that no version of this toolkit wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            if name.endswith(".nc"):
                check_hdf5(path)
            return read(path)
        except InputError as error:
            raise InputError(str(error).replace(str(path), f"the file sent ({name})")) from error
        except _NONSENSE as error:
            raise InputError(
                f"the file sent ({name}) is damaged or was changed: it has the right form, but not"
                " the right content"
            ) from error


def check_hdf5(path: Path, most_bytes: int = MOST_UNPACKED) -> None:
    """Refuse an HDF5 file whose arrays unpack to too much, or that points to other files. What is
    no HDF5 file passes.

    Raises:
        InputError: too large unpacked; external links, external storage, virtual datasets.
    """
    import h5py

    sizes: list[int] = []

    def elsewhere(name: str, link: object) -> str | None:
        return name if isinstance(link, h5py.ExternalLink) else None

    def weigh(name: str, item: object) -> str | None:
        if isinstance(item, h5py.Dataset):
            sizes.append((item.size or 0) * item.dtype.itemsize)
            return name if item.external or item.is_virtual else None
        return None

    try:
        with h5py.File(path, "r") as file:  # what is returned ends the walk
            outside = file.visititems_links(elsewhere) or file.visititems(weigh)
    except OSError:
        return  # the reader says it better
    if outside is not None:
        raise InputError(f"{path} takes {outside[:60]!r} from another file, which is not read")
    if sum(sizes) > most_bytes:
        raise InputError(
            f"{path} unpacks to more than {most_bytes >> 20} MB, which is more than is accepted:"
            " record fewer samples, or report on them with the command line"
        )


def _size(data: bytes) -> tuple[int, int]:
    """Width and height from the header; (0, 0) if there is none to read, which `open_image` then
    explains.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except (Image.DecompressionBombError, UnidentifiedImageError, OSError, SyntaxError):
        return 0, 0


def sent_samples(files: Mapping[str, bytes], *, most_bytes: int, most_pixels: int) -> list[Sample]:
    """Samples from one JSONL file and the pictures it names, all sent together.

    Only the last part of a picture's path counts, so nothing on this machine is opened but what was
    sent.

    Raises:
        InputError: not exactly one JSONL file, pictures missing, too large or damaged, lines that
            cannot be used.
    """
    lists = [name for name in files if name.lower().endswith(".jsonl")]
    if len(lists) != 1:
        raise InputError(
            f"{len(lists)} JSONL files were sent: send one, together with the pictures it names"
        )
    sizes = [_size(data) for name, data in files.items() if name not in lists]
    if (pixels := sum(width * height for width, height in sizes)) > MOST_PICTURES * most_pixels:
        raise InputError(
            f"the pictures have {pixels / 1e6:.0f} million pixels together; at most"
            f" {MOST_PICTURES * most_pixels / 1e6:.0f} million are accepted: send fewer or smaller"
            " ones"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "samples.jsonl").write_text(
            "\n".join(map(_local, _lines(files[lists[0]]))), encoding="utf-8"
        )
        pictures = {}
        for sent in set(files) - set(lists):
            path = folder / Path(sent).name
            pictures[path] = uploaded(
                files[sent], sent, most_bytes=most_bytes, most_pixels=most_pixels
            ).pixels
            path.touch()
        try:
            samples = read_samples(folder / "samples.jsonl")
        except InputError as error:
            raise InputError(str(error).replace(f"{folder}/", "")) from error
    return [
        replace(s, images=tuple(pictures[Path(str(image))] for image in s.images)) for s in samples
    ]


def _lines(data: bytes) -> list[str]:
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            f"the JSONL file is not UTF-8 text ({error.reason}): save it as UTF-8"
        ) from error


def _local(line: str) -> str:
    """A line of the list with its pictures' folders taken away; what is not JSON stays for the
    reader.
    """
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return line
    if isinstance(entry, dict):
        for key in entry.keys() & {"image", "images"}:
            named = entry[key]
            entry[key] = (
                [Path(str(n)).name for n in named]
                if isinstance(named, list)
                else Path(str(named)).name
            )
    return json.dumps(entry)
