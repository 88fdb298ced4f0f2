"""What Streamlit's own theme cannot say: room under the header, contrast, long answers, telephones.

Contrast is at least 4.5 to 1 for every text (WCAG 2.1, criterion 1.4.3); a browser test measures it
in both themes.
"""

from __future__ import annotations

from avl_analysis.figures import palette

_ALWAYS = """
.stMainBlockContainer { padding-top: 4.2rem; padding-bottom: 3rem; max-width: 1680px; }
[data-testid="stSidebarHeader"] { height: 2rem; }
/* A long answer scrolls instead of pushing the picture off the screen. */
.st-key-token [role="radiogroup"] { max-height: 8.6rem; overflow-y: auto; padding: 2px; }
/* Tables: without a pointer that hovers, their tool bar would cover the page for good. */
@media (hover: none) { [data-testid="stElementToolbar"], .modebar-container { display: none; } }
@media (max-width: 640px) {
  .stMainBlockContainer { padding-top: 4.6rem; }
  .st-key-token [role="radiogroup"] { max-height: 5.6rem; }
  /* The picture comes before the controls that change it. */
  .st-key-ask > *:has(> .st-key-ask_pictures) { order: -1; }
}
"""
_COLOURS = """
[data-testid="stCaptionContainer"], [data-testid="stCaptionContainer"] p,
[data-testid="stMarkdownContainer"] small { color: MUTED; opacity: 1; }
[data-testid="stMarkdownContainer"] code { color: INK; font-size: 0.8125rem; }
"""
_CHOSEN = """
/* The primary colour carries white words on buttons; words in it are too dark on black, and too
   pale on the tint of a chosen button. */
button[data-selected="true"] p, button[data-selected="true"] span,
[data-testid="stSliderThumbValue"] p { color: CHOSEN; }
"""


def sheet(*, dark: bool) -> str:
    """The page's own style sheet, in a theme's colours."""
    theme = palette.DARK if dark else palette.LIGHT
    rules = _ALWAYS + _COLOURS + _CHOSEN
    chosen = "#86ccf5" if dark else "#00568a"
    # MUTED, INK and CHOSEN in the rules stand for colours of the theme.
    for name, colour in (("MUTED", theme.muted), ("INK", theme.ink), ("CHOSEN", chosen)):
        rules = rules.replace(name, colour)
    return f"<style>{rules}</style>"
