"""A running text with a value per token: which words the model looked at.

The counterpart of `Overlay` for text. It is not a panel of the `Figure` kind, because it is set
like a paragraph rather than drawn on axes; draw_html.py turns it into markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from avl_analysis.figures.spec import Array, Axis, _series

_SIGNS = {"\n": "↵", "\t": "⇥", " ": "␣", "": "∅"}
"""What stands for a token that would not be seen."""


def visible(token: str) -> str:
    """A token's text as every page and figure shows it.

    Without blanks around it, and never empty.
    """
    if token in _SIGNS:
        return _SIGNS[token]
    # A token of several blanks strips to nothing, which would not be seen on the page.
    return token.strip().replace("\n", "↵") or "␣"


@dataclass(frozen=True)
class Span:
    """A stretch of tokens that is set apart, e.g. "question" or "answer".

    `last` is not included.
    """

    name: str
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Strip:
    """Tokens in reading order with their values.

    Attributes:
        tokens: text of each token, as it is; nothing in it is markup.
        values: (tokens,) value of each, NaN where there is none.
        value: what the values are, with unit; its limits fix the shade (from none to full).
        spans: stretches with names, not overlapping, in order; tokens outside are not shown.
        marked: token that is set in a frame (the one being produced), None for none.
        slot: series of the palette that gives the shade its colour.
        notes: what stands instead of some tokens, by place; such tokens are framed and the note
            follows them.
    """

    tokens: tuple[str, ...]
    values: Array
    value: Axis
    spans: tuple[Span, ...]
    marked: int | None = None
    slot: int = 1
    notes: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _series(self, "token strip", self.value.label, ("values",), ())
        if self.values.shape != (len(self.tokens),):
            raise ValueError(
                f"a token strip has {self.values.size} values for {len(self.tokens)} tokens"
            )
        end = 0
        for span in self.spans:
            if not end <= span.first <= span.last <= len(self.tokens):
                raise ValueError(
                    f"span {span.name!r} ({span.first} to {span.last}) is out of order or out of"
                    " range"
                )
            end = span.last
