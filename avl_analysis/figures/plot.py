"""A described figure that draws itself: in a notebook, in a browser, or into a file.

Wraps a `spec.Figure` and knows the two drawing packages; imports them when something is drawn.
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
import webbrowser
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avl_analysis.errors import InputError
from avl_analysis.figures.spec import Figure, rows
from avl_analysis.files import atomic_write, write_text

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".png", ".svg", ".pdf", ".html", ".csv")
"""What `Plot.save` can write."""


class Plot:
    """A figure and the ways to see it. The last expression of a notebook cell shows it.

    Attributes:
        figure: the description: panels with their values, axes with units, caption.
    """

    def __init__(self, figure: Figure) -> None:
        self.figure = figure

    def __repr__(self) -> str:
        return f"<Plot {self.figure.title!r}: {len(self.figure.panels)} panel(s)>"

    @property
    def caption(self) -> str:
        """What is shown, from how many samples, of which model, with which intervals."""
        return self.figure.caption.text

    @property
    def data(self) -> pd.DataFrame:
        """Every number drawn, a row each: panel, series, x, y, value, low, high, label."""
        import pandas as pd

        return pd.DataFrame(rows(self.figure))

    def matplotlib(self) -> Any:
        """The figure as a `matplotlib.figure.Figure`, to be changed or saved in other ways."""
        from avl_analysis.figures import draw_matplotlib

        return draw_matplotlib.draw(self.figure)

    def plotly(self, *, dark: bool = False) -> list[Any]:
        """One interactive `plotly.graph_objects.Figure` per panel."""
        from avl_analysis.figures import draw_plotly

        return [draw_plotly.draw(panel, dark=dark) for panel in self.figure.panels]

    def save(self, path: str | PathLike[str], *, dpi: int = 200) -> Path:
        """Write the figure; the suffix of `path` says how.

        Args:
            path: .png, .svg or .pdf for paper, .html for an interactive page that needs no network,
                .csv for the numbers.
            dpi: dots per inch of a PNG.

        Raises:
            InputError: another suffix, or a file that cannot be written.
        """
        target = Path(path)
        if target.suffix not in SUFFIXES:
            raise InputError(
                f"cannot save a figure as {target.name!r}: use one of {', '.join(SUFFIXES)}"
            )
        if target.suffix == ".csv":
            return write_text(target, self.data.to_csv(index=False))
        if target.suffix == ".html":
            return write_text(target, self.html())
        with atomic_write(target) as unfinished:
            unfinished.write_bytes(self._image(target.suffix[1:], dpi))
        return target

    def html(self, *, dark: bool = False) -> str:
        """An interactive page of its own, with plotly inside and nothing to fetch."""
        from avl_analysis.figures import draw_plotly

        plots = [
            # The source of plotly.js is put into the page once, not once per panel.
            plot.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})
            for plot in self.plotly(dark=dark)
        ]
        title, caption = escape(self.figure.title), escape(self.caption)
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            "<style>body{font-family:system-ui,sans-serif;max-width:70rem;margin:2rem auto}"
            "figcaption{color:#59636e;font-size:.9rem}</style>"
            f"<script>{draw_plotly.library()}</script><h1>{title}</h1><figure>{''.join(plots)}"
            f"<figcaption>{caption}</figcaption></figure></html>"
        )

    def show(self) -> None:
        """Show the figure here in a notebook, or as an interactive page in the browser."""
        # Inside a notebook IPython is loaded already; elsewhere it need not be installed.
        notebook = sys.modules.get("IPython")
        if notebook is not None and notebook.get_ipython() is not None:
            from IPython.display import display

            display(self)
            return
        # The browser reads the page after this function has returned, so the file is not deleted.
        with tempfile.NamedTemporaryFile(
            "w", suffix=f"-{self.figure.name}.html", delete=False, encoding="utf-8"
        ) as page:
            page.write(self.html())
        webbrowser.open(Path(page.name).as_uri())

    def _image(self, suffix: str, dpi: int = 200) -> bytes:
        from avl_analysis.figures import draw_matplotlib

        buffer = io.BytesIO()
        draw_matplotlib.write(self.figure, buffer, suffix, dpi=dpi)
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self._image("png", dpi=110)

    def _repr_html_(self) -> str:
        """The drawing as an inline image, so that a saved notebook shows it without running."""
        source = base64.b64encode(self._image("svg")).decode("ascii")
        return (
            f'<figure style="margin:0;max-width:64rem"><img alt="{escape(self.figure.title)}"'
            f' style="max-width:100%" src="data:image/svg+xml;base64,{source}">'
            f'<figcaption style="opacity:.75;font-size:.85em">{escape(self.caption)}</figcaption>'
            "</figure>"
        )
