"""What visitors send.

Pictures, recordings, comparisons, policies, lists of questions, within limits.

Nothing sent is believed: content decides, never the name; sizes are checked before anything is
decoded or unpacked; files that point to other files are refused; paths inside a list of questions
count only by their last part.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from avl_analysis.corpus.questions import Sample, read_samples
from avl_analysis.errors import InputError
from avl_analysis.models.images import FORMATS, open_image
from avl_analysis.recordings.netcdf import check_hdf5
from avl_app.pictures import Picture, picture

Result = TypeVar("Result")
MOST_UNPACKED = 2**31
"""Bytes the arrays of a recording or comparison may have when unpacked."""
MOST_PICTURES = 8
"""Pixels of all pictures sent with a list of questions, in largest pictures."""
_HDF5_DETAIL = re.compile(
    r": (unable to|can't|can not|truncated file).*", re.IGNORECASE | re.DOTALL
)
"""What the HDF5 library says about its own structures, which tells a visitor nothing."""
_NONSENSE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
    RuntimeError,  # RecursionError among them
)
"""What reading raises where a file has the form it should have, but not the content."""


def uploaded(data: bytes, name: str, *, most_bytes: int, most_pixels: int) -> Picture:
    """A picture from the bytes of a file somebody sent.

    Judged by content, never by name; size in bytes and pixels are checked before any pixel is
    decoded.

    Raises:
        InputError: too large, too many pixels, not an image, damaged.
    """
    # First the bytes, then the header, then the pixels: no check decodes what a cheaper one would
    # have refused.
    if len(data) > most_bytes:
        raise InputError(
            f"the file has {len(data) / 2**20:.1f} MB; at most {most_bytes / 2**20:.0f} MB are"
            " accepted: scale it down first"
        )
    width, height = _size(data)
    if width * height > most_pixels:
        # infinite where Pillow refuses to name a size
        counted = f"{width} x {height}" if math.isfinite(width) else "too many"
        raise InputError(
            f"the picture has {counted} pixels; at most {most_pixels / 1e6:.0f} million"
            " are accepted: scale it down first"
        )
    try:
        return picture(np.asarray(open_image(data)), name)
    except InputError as error:
        # `open_image` knows no name for what it is given as bytes.
        said = str(error).replace(f"the {len(data)} bytes given", f"the file sent ({name})")
        raise InputError(said) from error
    except ValueError as error:  # Pillow: a text chunk that unpacks to more than it accepts
        raise InputError(f"the file sent ({name}) is not a usable image: {error}") from error


def from_bytes(read: Callable[[Path], Result], data: bytes, name: str) -> Result:
    """What `read` makes of a file with this content.

    Its messages name the file, not the folder it lay in for a moment.

    Args:
        read: reads a file of the toolkit from a path.
        data: content of the file.
        name: what its sender calls it; only its ending, such as ".nc", says how it is read.

    Raises:
        InputError: as `read` does, or a file with content that no version of this toolkit wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The ending is believed only so far as to say which format is expected; the reader then
        # judges the content.
        netcdf = name.lower().endswith(".nc")
        suffix = Path(name).suffix.lower()
        # Nothing the sender wrote becomes part of the path, except one of these known endings.
        path = Path(folder) / f"sent{suffix if suffix in ('.nc', '.jsonl') else '.json'}"
        path.write_bytes(data)
        try:
            # Before `read`: a small file can unpack to more memory than there is, or link to other
            # files.
            if netcdf:
                with suppress(OSError):  # no HDF5 file, which the reader says better
                    check_hdf5(path, MOST_UNPACKED)
            return read(path)
        except InputError as error:
            said = str(error).replace(str(path), f"the file sent ({name})")
            raise InputError(_HDF5_DETAIL.sub("", said)) from error
        except _NONSENSE as error:
            raise InputError(
                f"the file sent ({name}) is damaged or was changed: it has the right form, but not"
                " the right content"
            ) from error


def _size(data: bytes) -> tuple[float, float]:
    """Width and height from the header.

    (0, 0) if there is none to read, which `open_image` then explains, infinite where Pillow will
    not even say how large it is.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except Image.DecompressionBombError:
        return math.inf, math.inf
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
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
    # By now there is exactly one list, whatever else was sent with it.
    lines = _lines(files[lists[0]])
    _check_names(lines, files)
    # From the headers alone, before any picture is decoded: all of them are held at once later, and
    # each by itself may be within its limit.
    sizes = [_size(data) for name, data in files.items() if name not in lists]
    if (pixels := sum(width * height for width, height in sizes)) > MOST_PICTURES * most_pixels:
        raise InputError(
            f"the pictures have {pixels / 1e6:.0f} million pixels together; at most"
            f" {MOST_PICTURES * most_pixels / 1e6:.0f} million are accepted: send fewer or smaller"
            " ones"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The reader looks for pictures beside the list, so their paths are cut down to file names.
        (folder / "samples.jsonl").write_text(
            "\n".join(map(_local, lines, itertools.count(1))), encoding="utf-8"
        )
        pictures = {}
        for sent in set(files) - set(lists):
            # A name with folders in it would lead out of the temporary folder.
            path = folder / Path(sent).name
            pictures[path] = uploaded(
                files[sent], sent, most_bytes=most_bytes, most_pixels=most_pixels
            ).pixels
            # An empty file satisfies the reader, which only checks that there is one; its path is
            # exchanged for the decoded pixels at the end.
            path.touch()
        try:
            samples = read_samples(folder / "samples.jsonl")
        except InputError as error:
            said = str(error).replace(f"{folder}/samples.jsonl", lists[0])
            # The temporary folder means nothing to the visitor.
            raise InputError(said.replace(f"{folder}/", "")) from error
    return [
        replace(s, images=tuple(pictures[Path(str(image))] for image in s.images)) for s in samples
    ]


def _lines(data: bytes) -> list[str]:
    try:
        # only line feeds end a line: other separators may stand inside JSON strings
        return data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the JSONL file is not UTF-8 text ({error.reason}): save it as UTF-8"
        ) from error


def _check_names(lines: Sequence[str], files: Mapping[str, bytes]) -> None:
    """Every picture of the list came with it, and no two of them have one name.

    Raises:
        InputError: a picture that was not sent; two paths that end in one file name, of which a
            browser sends the name alone.
    """
    named: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        for path in _pictures_of(_parsed(line, number)):
            name = Path(path).name
            # `setdefault` returns the path that the name was first met with.
            if named.setdefault(name, path) != path:
                raise InputError(
                    f"the list names {named[name]} and {path}, but pictures are sent without their"
                    " folders: give the files different names"
                )
            if name not in files:
                raise InputError(
                    f"line {number}: no such picture: {name}; send it together with the list"
                )


def _parsed(line: str, number: int) -> Any:
    """A line as JSON; None where it is none, which the reader of samples explains.

    Raises:
        InputError: JSON that Python cannot hold.
    """
    try:
        return json.loads(line)
    # It is a ValueError as well, so it must be caught before the other ones.
    except json.JSONDecodeError:
        return None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"line {number} is nested too deeply or holds a number of thousands of digits; write"
            ' {"image": "cat.jpg", "prompt": "what is it?"}'
        ) from error


def _pictures_of(entry: Any) -> list[str]:
    """Paths of the pictures that a line of the list names."""
    if not isinstance(entry, dict):
        return []
    named = [entry[key] for key in ("image", "images") if key in entry]
    return [
        str(path) for paths in named for path in (paths if isinstance(paths, list) else [paths])
    ]


def _local(line: str, number: int) -> str:
    """A line of the list with its pictures' folders taken away.

    What is not JSON stays for the reader.
    """
    entry = _parsed(line, number)
    if not isinstance(entry, dict):
        return line
    if "video" in entry:  # a path on this machine, of which only what was sent may be opened
        raise InputError(
            f'line {number}: videos are not taken here: send the frames as "images", or record'
            " the list with avl record --data"
        )
    for key in entry.keys() & {"image", "images"}:
        named = entry[key]
        entry[key] = (
            [Path(str(n)).name for n in named] if isinstance(named, list) else Path(str(named)).name
        )
    return json.dumps(entry)
