"""What a figure shows, as plain values: the only thing that passes between numbers and drawing.

A `Figure` is a titled row of panels with a caption; a panel is one of six kinds (`Lines`, `Heat`,
`Bars`, `Scatter`, `Overlay`, `Animation`). Everything is checked here, at the door: lengths must
agree, intervals must contain their value, and every axis must name its unit, because a figure
without units is not a measurement. Colours are not chosen here: a series carries a `slot`, and
palette.py turns the slot into colour, dash and marker together, so that a figure printed in grey
still tells its series apart.

NaN means "not measured" and is drawn as a gap; infinities are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from avl_analysis.figures.patches import Patches

Array = NDArray[np.float64]
Row = dict[str, str | float | None]

MEASURED, FIT, BASELINE = "measured", "fit", "baseline"
Role = Literal["measured", "fit", "baseline"]


@dataclass(frozen=True)
class Axis:
    """One axis: what it shows, in which unit, and over which range.

    Attributes:
        label: quantity in words, e.g. "decode step".
        unit: unit in words, never empty; "share" for a number between 0 and 1, "index" for a
            counted thing.
        limits: (low, high) in data units; None lets the drawing choose.
        log: logarithmic scale (values must be positive).
        ticks: (position, text) pairs for axes of named things; None for ordinary numbers.
    """

    label: str
    unit: str
    limits: tuple[float, float] | None = None
    log: bool = False
    ticks: tuple[tuple[float, str], ...] | None = None

    def __post_init__(self) -> None:
        if not self.label or not self.unit:
            raise ValueError(
                f"an axis needs a label and a unit; got label {self.label!r}, unit {self.unit!r}"
            )
        if self.limits is not None and not self.limits[0] < self.limits[1]:
            raise ValueError(
                f"axis {self.label!r} has limits {self.limits}; the first must be below the second"
            )

    @property
    def text(self) -> str:
        """Label and unit as written on the axis."""
        return f"{self.label} ({self.unit})"

    @property
    def counted(self) -> bool:
        """Whether the axis counts things, so that only whole numbers make sense as ticks."""
        return (
            self.unit in ("index", "tokens", "decode steps", "frames", "patches") and not self.log
        )


@dataclass(frozen=True, eq=False)
class Line:
    """One curve: `y` at `x`, both (points,), with an optional interval of the same shape.

    `low <= y <= high`.
    """

    name: str
    x: Array
    y: Array
    low: Array | None = None
    high: Array | None = None
    slot: int = 0
    role: Role = "measured"

    def __post_init__(self) -> None:
        _series(self, "line", self.name, ("x", "y"), ("low", "high"))


@dataclass(frozen=True)
class Rule:
    """A straight reference line across a panel.

    `at` is in units of the axis it stands on (`axis`, "x" or "y").
    """

    at: float
    label: str
    axis: Literal["x", "y"] = "x"


@dataclass(frozen=True)
class Lines:
    """Curves with bands over common axes."""

    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    rules: tuple[Rule, ...] = ()
    title: str = ""

    def __post_init__(self) -> None:
        if not self.lines:
            raise ValueError(f"panel {self.title!r} of {self.y.label!r} has no lines to draw")


@dataclass(frozen=True, eq=False)
class Heat:
    """A matrix of values, (rows, columns), row 0 at the top unless `upward`.

    `value` is the colour bar's axis.

    `low` and `high` (same shape) are shown on hover and exported; `annotate` writes each value into
    its cell.
    """

    x: Axis
    y: Axis
    value: Axis
    values: Array
    low: Array | None = None
    high: Array | None = None
    annotate: bool = False
    upward: bool = False
    title: str = ""

    def __post_init__(self) -> None:
        _series(self, "heat map", self.title or self.value.label, ("values",), ("low", "high"))
        if self.values.ndim != 2 or self.values.size == 0:
            raise ValueError(
                f"heat map {self.title!r} needs a non-empty matrix; got shape {self.values.shape}"
            )

    @property
    def texts(self) -> list[list[str]]:
        """What is written into each cell: a class's name, or the value.

        Values have two decimals. One that is not zero but would read like it is written as an
        upper bound of its size; zero is "0", and a cell without a value is empty.
        """
        if self.value.ticks is not None:
            names = dict(self.value.ticks)
            return [[names.get(float(value), "") for value in row] for row in self.values]
        return [[_two_decimals(float(value)) for value in row] for row in self.values]


def _two_decimals(value: float) -> str:
    if not np.isfinite(value):
        return ""
    if value == 0:
        return "0"
    if abs(value) < 0.005:
        return "<0.01" if value > 0 else ">-0.01"
    return f"{value:.2f}"


@dataclass(frozen=True, eq=False)
class Bar:
    """One series of bars: `values` (categories,) with an optional interval of the same shape."""

    name: str
    values: Array
    low: Array | None = None
    high: Array | None = None
    slot: int = 0

    def __post_init__(self) -> None:
        _series(self, "bars", self.name, ("values",), ("low", "high"))


@dataclass(frozen=True)
class Bars:
    """Bars side by side for each of `categories`.

    Lying down when `horizontal` (long category names).
    """

    category: Axis
    value: Axis
    categories: tuple[str, ...]
    bars: tuple[Bar, ...]
    rules: tuple[Rule, ...] = ()
    horizontal: bool = False
    title: str = ""

    def __post_init__(self) -> None:
        for bar in self.bars:
            if bar.values.shape != (len(self.categories),):
                raise ValueError(
                    f"bars {bar.name!r} have {bar.values.size} values for {len(self.categories)}"
                    " categories"
                )


@dataclass(frozen=True, eq=False)
class Points:
    """Points of one series.

    `x`, `y` (points,), optional intervals in y and labels; `joined` draws a frontier.
    """

    name: str
    x: Array
    y: Array
    low: Array | None = None
    high: Array | None = None
    labels: tuple[str, ...] = ()
    slot: int = 0
    joined: bool = False

    def __post_init__(self) -> None:
        _series(self, "points", self.name, ("x", "y"), ("low", "high"))
        if self.labels and len(self.labels) != self.x.size:
            raise ValueError(
                f"points {self.name!r} have {len(self.labels)} labels for {self.x.size} points"
            )


@dataclass(frozen=True)
class Scatter:
    """Point clouds or frontiers over common axes."""

    x: Axis
    y: Axis
    points: tuple[Points, ...]
    rules: tuple[Rule, ...] = ()
    title: str = ""


@dataclass(frozen=True)
class Box:
    """A named rectangle in pixels, from the left/top edge to the right/bottom edge."""

    left: float
    top: float
    right: float
    bottom: float
    label: str = ""

    def __post_init__(self) -> None:
        if not (self.left < self.right and self.top < self.bottom):
            raise ValueError(
                f"box {self.label!r} is empty: {(self.left, self.top, self.right, self.bottom)}"
            )


@dataclass(frozen=True, eq=False)
class Overlay:
    """A picture with a value or a class per patch over it.

    Attributes:
        picture: (height, width, 3) uint8.
        value: what the patch values are, with unit; its limits fix the colour scale.
        patches: value of each image token, with the part of the picture under it; None shows the
            picture alone.
        classes: names of classes if `patches` holds class numbers 0, 1, ... instead of quantities.
        boxes: outlines, e.g. where the object asked for really is.
        words: a text per image token, written on its patch where there is room; none by default.
    """

    picture: NDArray[np.uint8]
    value: Axis
    patches: Patches | None = None
    classes: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    title: str = ""
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        picture = np.asarray(self.picture)
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(
                f"overlay {self.title!r} needs a (height, width, 3) uint8 picture; got"
                f" {picture.shape} {picture.dtype}"
            )
        held = 0 if self.patches is None else len(self.patches.values)
        if self.words and len(self.words) != held:
            raise ValueError(
                f"overlay {self.title!r} has {len(self.words)} words for {held} image tokens"
            )
        if self.patches is not None and self.classes:
            largest = np.nanmax(self.patches.values, initial=0)
            if largest >= len(self.classes):
                raise ValueError(
                    f"overlay {self.title!r} has a class beyond its {len(self.classes)} names"
                )

    @property
    def scale(self) -> tuple[float, float]:
        """Values drawn with none and with full strength."""
        assert self.patches is not None
        if self.value.limits is not None:
            return self.value.limits
        # A scale without length would divide by zero where every value is 0.
        return 0.0, max(float(np.nanmax(self.patches.values, initial=0.0)), 1e-12)


@dataclass(frozen=True)
class Animation:
    """The same picture over time.

    One overlay per decode step, `steps` their numbers, `seconds` each is shown.
    """

    frames: tuple[Overlay, ...]
    steps: tuple[int, ...]
    seconds: float = 0.35
    title: str = ""

    def __post_init__(self) -> None:
        if not self.frames or len(self.frames) != len(self.steps):
            raise ValueError(
                f"animation {self.title!r} has {len(self.frames)} frames for {len(self.steps)}"
                " steps"
            )


Panel = Lines | Heat | Bars | Scatter | Overlay | Animation


@dataclass(frozen=True)
class Caption:
    """The words below a figure.

    `n` counts `of` (samples unless said otherwise); `interval` says what bands are.
    """

    what: str
    n: int
    model: str
    interval: str
    finding: str = ""
    of: str = "samples"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(
                f"a caption must say how many {self.of} were measured; got n = {self.n}"
            )

    @property
    def text(self) -> str:
        """The whole caption; every figure says what, n, model and interval."""
        of = self.of.removesuffix("s") if self.n == 1 else self.of
        # one of anything has no interval
        interval = f"; {self.interval}" if self.n > 1 else ""
        parts = [
            self.what,
            self.finding,
            f"n = {self.n} {of}; model: {shown_model(self.model)}{interval}.",
        ]
        return " ".join(part for part in parts if part)


def shown_model(name: str) -> str:
    """A model's name for readers: of a folder its last part, since they have another machine."""
    is_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    return name.rstrip("/").rpartition("/")[2] if is_path else name


@dataclass(frozen=True)
class Figure:
    """A titled figure of one or more panels, laid out row by row in `columns` columns.

    `name` is the file stem (lower case, digits, underscore).
    """

    name: str
    title: str
    panels: tuple[Panel, ...]
    caption: Caption
    columns: int = 2

    def __post_init__(self) -> None:
        if (
            # isalnum also accepts letters beyond ASCII, which the check of isascii refuses.
            not self.name.replace("_", "").isalnum()
            or self.name != self.name.lower()
            or not self.name.isascii()
        ):
            raise ValueError(f"figure name {self.name!r} must be a plain lower-case file stem")
        if not self.panels:
            raise ValueError(f"figure {self.name!r} has no panels")
        if self.columns < 1:
            raise ValueError(f"figure {self.name!r} needs at least one column; got {self.columns}")


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis.

    Powers of ten, with their doubles and halves where there is room for them.
    """
    # One decade more than needed on either side; ticks outside of the limits are left out below.
    decades = range(int(np.floor(np.log10(low))) - 1, int(np.ceil(np.log10(high))) + 1)
    # 300 is about two and a half decades; beyond that the doubles and halves would crowd.
    steps = (1, 2, 5) if high < 300 * low else (1,)
    # Parsed from text, because 5 * 10.0**-6 is not the number that is written 5e-06.
    return [
        tick for d in decades for step in steps if low <= (tick := float(f"{step}e{d}")) <= high
    ]


def repeated(panel: Lines, line: Line) -> bool:
    """Whether a baseline of the same name stands before this one.

    Then the legend needs no second entry.
    """
    # Lines compare by identity, so this finds the very line, not one of equal values.
    before = panel.lines[: panel.lines.index(line)]
    return line.role == "baseline" and any(
        other.role == "baseline" and other.name == line.name for other in before
    )


def rows(figure: Figure) -> list[Row]:
    """Every number of a figure in long form.

    One row per value with panel, series, place and interval.

    Keys: panel, series, x, y, value, low, high, label. What a kind does not have is None; NaN stays
    NaN.
    """
    table = []
    for number, panel in enumerate(figure.panels, 1):
        title = panel.title or f"panel {number}"
        # Every row has the same keys in the same order, whatever kind of panel it comes from.
        empty: Row = dict.fromkeys(("x", "y", "value", "low", "high", "label"))
        table += [{"panel": title, **empty, **row} for row in _panel_rows(panel)]
    return table


def _panel_rows(panel: Panel) -> Iterator[dict[str, Any]]:
    if isinstance(panel, Lines):
        for line in panel.lines:
            yield from _points(line.name, line.x, line.y, line.low, line.high)
    elif isinstance(panel, Scatter):
        for points in panel.points:
            yield from _points(
                points.name, points.x, points.y, points.low, points.high, points.labels
            )
    elif isinstance(panel, Bars):
        for bar in panel.bars:
            yield from _points(bar.name, None, bar.values, bar.low, bar.high, panel.categories)
    elif isinstance(panel, Heat):
        yield from _matrix(panel.value.label, panel.values, panel.low, panel.high)
    elif isinstance(panel, Overlay):
        if panel.patches is not None:
            yield from _patches(panel.value.label, panel.patches, panel.words)
    else:
        for step, frame in zip(panel.steps, panel.frames, strict=True):
            if frame.patches is not None:
                yield from _patches(f"step {step}", frame.patches)


def _points(
    name: str,
    x: Array | None,
    y: Array,
    low: Array | None,
    high: Array | None,
    labels: tuple[str, ...] = (),
) -> Iterator[dict[str, Any]]:
    for i in range(y.size):
        yield {
            "series": name,
            "x": None if x is None else float(x[i]),
            "value": float(y[i]),
            "low": None if low is None else float(low[i]),
            "high": None if high is None else float(high[i]),
            "label": labels[i] if labels else None,
        }


def _matrix(
    name: str, values: Array, low: Array | None, high: Array | None
) -> Iterator[dict[str, Any]]:
    for (row, column), value in np.ndenumerate(values):
        yield {
            "series": name,
            "x": float(column),
            "y": float(row),
            "value": float(value),
            "low": None if low is None else float(low[row, column]),
            "high": None if high is None else float(high[row, column]),
        }


def _patches(name: str, patches: Patches, words: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """One row per image token, at the centre of its box in fractions of the picture."""
    # A token without a place has NaN for its place here, and still its value.
    left, top, right, bottom = patches.boxes.T
    for index, value in enumerate(patches.values):
        yield {
            "series": name,
            "x": float(left[index] + right[index]) / 2,
            "y": float(top[index] + bottom[index]) / 2,
            "value": float(value),
            "label": f"image token {index}" + (f": {words[index]}" if words else ""),
        }


def _series(
    spec: Any, kind: str, name: str, required: tuple[str, ...], optional: tuple[str, ...]
) -> None:
    """Turn the array fields of `spec` into read-only float64 of one shape.

    The interval must lie around the value.
    """
    arrays = {key: _floats(getattr(spec, key)) for key in required}
    arrays |= {
        key: _floats(getattr(spec, key)) for key in optional if getattr(spec, key) is not None
    }
    # The last of the required arrays is the value that an interval belongs to.
    value = arrays[required[-1]]
    for key, array in arrays.items():
        if array.shape != value.shape:
            raise ValueError(
                f"{kind} {name!r}: {key} has shape {array.shape}, {required[-1]} has {value.shape}"
            )
        if np.isinf(array).any():
            raise ValueError(
                f"{kind} {name!r}: {key} is infinite somewhere; use NaN for what was not measured"
            )
        # The specs are frozen dataclasses, whose own assignment refuses.
        object.__setattr__(spec, key, array)
    if ("low" in arrays) != ("high" in arrays):
        raise ValueError(
            f"{kind} {name!r} has one end of its interval only; give both low and high"
        )
    # Rounding may put a bound a little beyond its value. NaN compares as False, so points that were
    # not measured pass.
    slack = 1e-6 * (1 + np.abs(value))
    if (
        "low" in arrays
        and ((arrays["low"] > value + slack) | (arrays["high"] < value - slack)).any()
    ):
        raise ValueError(f"{kind} {name!r}: somewhere the interval does not contain the value")


def _floats(values: ArrayLike) -> Array:
    array = np.array(values, dtype=np.float64)
    array.setflags(write=False)
    return array
