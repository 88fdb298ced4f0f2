"""Whether a file that has the form of a recording has its content, too.

A recording may come from anywhere. Figures and tables read its labels, dimensions and facts without
asking; what they rely on is checked once, when the file is read, so that a changed or damaged file
is refused with the part that is wrong and no wrong number is shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from avl_analysis.recordings.schema import FIXED, RecordingError
from avl_analysis.scenes import ALL_TASKS

_TOKENS: Mapping[str, tuple[str, ...]] = {
    "token_id": ("sample", "position"),
    "modality": ("sample", "position"),
    "phase": ("sample", "step"),
    "step_position": ("sample", "step"),
    "prompt_length": ("sample",),
}
"""Variables of the group "tokens", with their dimensions."""
_NEEDED = ("phase", "prompt_length")
"""Those that every recording has, however it was made."""
_NUMBERS = ("query_heads", "kv_heads", "layers")
"""Attributes that are read as numbers."""


def check_data(data: Mapping[str, xr.Dataset], attrs: Mapping[str, Any]) -> None:
    """Refuse groups without the variables, labels and dimensions that every recording has.

    Raises:
        RecordingError: says what is wrong.
    """
    tokens = data["tokens"]
    # What is not needed may be missing, but what is there must have the right form.
    for name, dims in _TOKENS.items():
        if name not in tokens.data_vars and name not in _NEEDED:
            continue
        if name not in tokens.data_vars or tokens[name].dims != dims:
            raise RecordingError(f"{name} of the tokens is missing, or has other dimensions")
        if tokens[name].dtype.kind not in "iu":
            raise RecordingError(f"{name} of the tokens holds other things than whole numbers")
    samples = tokens.coords.get("sample")
    if samples is None or len(set(map(str, samples.values))) != samples.size:
        raise RecordingError("the samples have no names, or two of them have the same")
    for name in _NUMBERS:
        if name in attrs and not str(attrs[name]).isdecimal():
            raise RecordingError(f"attribute {name} is {attrs[name]!r}, not a number")
    # The first group with a dimension decides its labels, and later groups must agree. Raw
    # attention, which may be of some heads only, is the last group.
    labels: dict[str, np.ndarray] = {"sample": samples.values}
    for group, dataset in data.items():
        for name, variable in dataset.data_vars.items():
            if "sample" not in variable.dims:
                raise RecordingError(f"{name} in {group} is not told by sample")
            # Floats, whole numbers and truth values. The facts, the only texts, have been taken out
            # before.
            if variable.dtype.kind not in "fiub":
                raise RecordingError(f"{name} in {group} holds other things than numbers")
        for name, label in dataset.coords.items():
            dim, values = str(name), label.values
            fixed = FIXED.get(dim)
            if fixed is not None and list(values) != list(fixed):
                raise RecordingError(f"{dim} in {group} has other labels than {', '.join(fixed)}")
            if dim in ("sample", "layer", "head") and not _agree(
                labels.setdefault(dim, values), values, group
            ):
                raise RecordingError(f"{dim} is labelled differently in {group}")
    for name, total in data["sums"].data_vars.items():
        count = data["sums"].get(f"{name}_count")
        if count is not None and count.dims != total.dims:
            raise RecordingError(f"{name} and its count differ in their dimensions")


def _agree(known: np.ndarray, labels: np.ndarray, group: str) -> bool:
    """Whether a group labels a dimension as the others do; raw attention may be of some heads."""
    if group == "attention":
        return bool(np.isin(labels, known).all())
    return np.array_equal(known, labels)


def facts_of_text(text: str, sample: str) -> dict[str, Any]:
    """The facts about a sample from the JSON they are stored as.

    Raises:
        RecordingError: not JSON, no object, or a fact of another kind than its name says.
    """
    try:
        facts = json.loads(text)
    # Brackets nested many thousand deep are valid JSON that the parser cannot follow.
    except (ValueError, RecursionError) as error:
        raise RecordingError(f"the facts about sample {sample} are no JSON") from error
    if not isinstance(facts, dict):
        raise RecordingError(f"the facts about sample {sample} are no object")
    for name, holds in _FACTS.items():
        if name in facts and not holds(facts[name]):
            raise RecordingError(f"{name!r} among the facts about sample {sample} is damaged")
    return facts


def digest(texts: Iterable[str]) -> str:
    """A digest of the facts of all samples, in order; it is stored with them."""
    total = hashlib.sha256()
    for text in texts:
        # JSON on one line holds no line break, so the break keeps the texts apart. A changed file
        # may hold lone surrogates, which plain UTF-8 refuses.
        total.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return total.hexdigest()


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    # isinstance would take True and False for numbers.
    return type(value) in (int, float)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _list_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _box(value: Any) -> bool:
    if not isinstance(value, list) or len(value) < 4:
        return False
    # More than the four edges may follow. The limit also refuses NaN and infinity, which Python's
    # JSON can hold.
    edges = value[:4]
    return all(type(edge) in (int, float) and abs(edge) < 2**31 for edge in edges)


def _scene(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("task") not in ALL_TASKS:
        return False
    return _whole(value.get("seed")) and _whole(value.get("index"))


def _seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 2**31


def _size(value: Any) -> bool:
    return _list_of(_whole)(value) and len(value) == 2 and min(value) > 0


_FACTS: Mapping[str, Callable[[Any], bool]] = {
    "id": _text,
    "task": _text,
    "prompt": _text,
    "answer": _text,
    "truth": _text,
    "picture": _text,
    "frames": _list_of(_text),
    "frame_seconds": _list_of(_seconds),
    "words": _list_of(_text),
    "answers": _list_of(_text),
    "truth_words": _list_of(_text),
    "surprise": _list_of(_number),
    "boxes": _list_of(_box),
    "region_tokens": _list_of(_whole),
    "picture_size": _size,
    "scene": _scene,
}
"""What the facts that figures and reports read must be."""
