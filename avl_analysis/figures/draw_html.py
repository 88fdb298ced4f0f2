"""Draws token strips as HTML: text that wraps, each token shaded by its value.

Every text is escaped; tags, attributes and colours are this module's own. The value stands in each
token's tooltip and, for screen readers, in its label. Shade is one hue whose opacity is the value,
so it reads in grey and on black alike; what is large is underlined too.
"""

from __future__ import annotations

from html import escape

import numpy as np

from avl_analysis.figures import palette
from avl_analysis.figures.strip import Span, Strip, visible

_BOX = "border-radius:4px;padding:1px 2px;margin:0 1px;white-space:pre-wrap;"
_STRONGEST = 0.75
"""Opacity of the shade of a token with the largest value."""
_NOTED = 5
"""Slot whose colour frames tokens with a note."""


def draw(strip: Strip, *, dark: bool = False) -> str:
    """The strip as one HTML block."""
    theme = palette.DARK if dark else palette.LIGHT
    parts = [_span(strip, span, dark) for span in strip.spans]
    style = f"font-size:0.95rem;line-height:1.9;color:{theme.ink};overflow-wrap:anywhere"
    return f'<div style="{style}">{"".join(parts)}</div>'


def _span(strip: Strip, span: Span, dark: bool) -> str:
    theme = palette.DARK if dark else palette.LIGHT
    name = (
        "<span"
        f' style="color:{theme.muted};font-size:0.8rem;margin-right:6px">{escape(span.name)}</span>'
    )
    words = "".join(_token(strip, at, dark) for at in range(span.first, span.last))
    return f'<div style="margin-bottom:2px">{name}{words}</div>'


def _token(strip: Strip, at: int, dark: bool) -> str:
    theme = palette.DARK if dark else palette.LIGHT
    value, text = float(strip.values[at]), strip.tokens[at]
    # Without limits the scale runs from 0 to the largest value, or to 1 where no value is above 0,
    # because the share below is divided by its length.
    low, high = strip.value.limits or (0.0, float(np.nanmax(strip.values, initial=0.0)) or 1.0)
    known = np.isfinite(value)
    # An unknown value has no shade, as 0 has; its muted colour and its tooltip tell them apart.
    share = float(np.clip((value - low) / (high - low), 0, 1)) if known else 0.0
    colour = palette.style(strip.slot).colour(dark)
    opacity = _STRONGEST * share
    style = _BOX + f"background:{palette.translucent(colour, opacity)};"
    # The ink is chosen for the colour that is seen, which the opacity of the shade decides.
    if share > 0:
        style += f"color:{palette.ink_on(colour, opacity, theme.paper)};"
    if share > 0.5:
        style += "text-decoration:underline;text-decoration-color:currentColor;"
    # A noted token and the marked one are both outlined. Of two outlines the later counts, so a
    # marked token with a note gets the dashed one.
    if at == strip.marked:
        style += f"outline:2px solid {theme.ink};"
    if at in strip.notes:
        style += f"outline:2px dashed {palette.style(_NOTED).colour(dark)};"
    if not known:
        style += f"color:{theme.muted};"
    said = f"{strip.value.label}: {value:.4f}" if known else "not read"
    shown = escape(visible(text))
    note = ""
    if at in strip.notes:
        note = (
            f'<span style="color:{theme.muted};font-size:0.8rem;margin-left:3px">'
            f"→{escape(strip.notes[at])}</span>"
        )
    # The blank behind the span lets a browser break the line between two tokens.
    return f'<span title="{escape(said, quote=True)}" style="{style}">{shown}</span>{note} '
