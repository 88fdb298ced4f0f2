"""The one palette: what a slot number looks like, on white and on black, in colour and in grey.

Colours are those of Okabe and Ito (2008, "Color Universal Design"), ordered so that the first
three, which stand for system, image and text wherever modalities are drawn, also differ in
lightness; each slot has a dash and a marker of its own, so a grey print or a photocopy still works.
The dark theme keeps the hues and lifts what would drown in black.

Continuous values use cividis-like maps that rise in lightness (matplotlib's "cividis", plotly's
"Cividis"), readable with any colour vision. Attention over a picture is drawn in one warm hue whose
opacity is the value, because a picture brings its own colours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Style:
    """How one series looks.

    Colours as "#rrggbb", plotly's and matplotlib's names of dash and marker.
    """

    light: str
    dark: str
    dash: str | tuple[int, tuple[float, ...]]
    marker: str
    plotly_dash: str
    plotly_marker: str

    def colour(self, dark: bool = False) -> str:
        return self.dark if dark else self.light


@dataclass(frozen=True)
class Theme:
    """Colours of everything that is not data."""

    paper: str
    ink: str
    muted: str
    grid: str


LIGHT = Theme(paper="#ffffff", ink="#1f2328", muted="#59636e", grid="#e1e4e8")
DARK = Theme(paper="#14171c", ink="#e6e8eb", muted="#a3abb5", grid="#343a42")

STYLES: tuple[Style, ...] = (
    Style("#3b4754", "#c3ccd6", (0, (1.2, 1.4)), "s", "dot", "square"),
    Style("#0072b2", "#4da8dc", "-", "o", "solid", "circle"),
    Style("#e69f00", "#f0b429", "--", "^", "dash", "triangle-up"),
    Style("#009e73", "#2cc295", "-.", "D", "dashdot", "diamond"),
    Style("#cc79a7", "#dc94bb", (0, (6, 1.5)), "v", "longdash", "triangle-down"),
    Style("#d55e00", "#f07f2e", (0, (6, 1.5, 1.2, 1.5, 1.2, 1.5)), "P", "longdashdot", "cross"),
    Style("#56b4e9", "#86ccf5", (0, (3, 1, 1, 1)), "X", "dashdot", "x"),
    Style("#8a6d00", "#d6c14a", (0, (2, 3)), "*", "dot", "star"),
    Style("#6f4aa8", "#b39ddb", (0, (4, 1, 1, 1, 1, 1)), "h", "6px,2px,2px,2px", "hexagon"),
    Style("#a5304c", "#e8788a", (0, (1, 0.8)), "p", "2px,2px", "pentagon"),
)
"""Slots 0, 1, 2 stand for system, image and text wherever modalities are drawn; slots beyond the
last repeat the colours with other dashes and markers.
"""

BUTTON, ON_BUTTON = "#eef2f6", "#16191d"
"""Buttons inside plots and the words on them, the same in both themes."""

SYSTEM, IMAGE, TEXT = 0, 1, 2
MODALITY_SLOTS = {"system": SYSTEM, "image": IMAGE, "text": TEXT}
"""Slots of the modalities."""

ATTENTION = "#ffb000"
"""The hue whose opacity is the attention on a patch."""
ATTENTION_OPACITY = 0.92
"""Opacity of a patch at the top of the scale; a little of the image shows through."""
BOX = "#fdfdfd"
BOX_EDGE = "#010101"
"""Outlines are white on black, visible on any picture."""

CLASS_COLOURS: tuple[str, ...] = ("#000000", "#0072b2", "#ffb000")
CLASS_OPACITY: tuple[float, ...] = (0.72, 0.45, 0.60)
"""Fill of class 0, 1, 2 over a picture: minor is darkened away, secondary is blue, core is amber
(lightness rises).
"""


def class_colours(count: int) -> list[str]:
    """Light colours for classes without an order, as fills under dark words.

    Beyond the palette they start again.
    """
    return [over(STYLES[slot % len(STYLES)].light, 0.5, "#ffffff") for slot in range(count)]


def style(slot: int) -> Style:
    """Style of a series.

    Beyond the palette colours start again, with the dash and the marker of other slots. The two are
    moved by different distances, so that no pair of them repeats in the first two rounds, and a
    grey print still tells all series apart.
    """
    again, index = divmod(slot, len(STYLES))
    if not again:
        return STYLES[index]
    dash = STYLES[(index + 3 * again) % len(STYLES)]
    marker = STYLES[(index + 7 * again) % len(STYLES)]
    return replace(
        STYLES[index],
        dash=dash.dash,
        plotly_dash=dash.plotly_dash,
        marker=marker.marker,
        plotly_marker=marker.plotly_marker,
    )


def rgb(colour: str) -> tuple[int, int, int]:
    """Red, green, blue in 0-255 of "#rrggbb"."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def translucent(colour: str, opacity: float) -> str:
    """CSS colour with an opacity in 0-1."""
    return "rgba({},{},{},{:g})".format(*rgb(colour), opacity)


def luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour, 0 (black) to 1 (white); IEC 61966-2-1."""
    # Light adds up linearly, the stored numbers of sRGB do not, so its transfer curve is undone.
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (v / 255 for v in rgb(colour))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.1); text needs 4.5."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def over(colour: str, opacity: float, paper: str) -> str:
    """The colour that is seen where `colour` with an opacity in 0-1 lies on `paper`."""
    mixed = (
        round(opacity * top + (1 - opacity) * below)
        for top, below in zip(rgb(colour), rgb(paper), strict=True)
    )
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def ink_on(colour: str, opacity: float, paper: str) -> str:
    """Black or white, whichever is read better on `colour` with an opacity on `paper`.

    One of the two always has a contrast of at least 4.58, the root of 21.
    """
    seen = over(colour, opacity, paper)
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, seen))


def lightness(colour: str) -> float:
    """CIE 1976 lightness L*, 0 (black) to 100 (white): what is left of a colour in a grey print."""
    y = luminance(colour)
    return 116 * y ** (1 / 3) - 16 if y > (6 / 29) ** 3 else y * (29 / 3) ** 3


def dark_pairs() -> list[tuple[str, str]]:
    """(light, dark) for every colour that a light figure is made of.

    A page needs them to change its theme.
    """
    pairs = [(s.light, s.dark) for s in STYLES]
    pairs += [
        (getattr(LIGHT, name), getattr(DARK, name)) for name in ("paper", "ink", "muted", "grid")
    ]
    return pairs
