"""Do the patches of an object say its name?"""

from __future__ import annotations

from avl_analysis.figures import Caption, Figure
from avl_analysis.intervals import METHOD, mean_interval
from avl_analysis.map_plots import names_caption, names_panel
from avl_reports.run import Run, Section
from avl_reports.script import run_script

QUESTION = "Do the patches of an object say its name, and in which layer?"


def section(run: Run) -> Section:
    """Share of own patches that say the name, by layers passed, beside the background."""
    found = run.further("patches")
    count = found.sizes["picture"]
    caption = Caption(names_caption(found), count, run.model, METHOD, of="pictures")
    # Samples here are pictures, not questions, so the caption counts them as such.
    figure = Figure("patch_words", "What patches say", (names_panel(found),), caption)
    # Depth counts layers passed: 0 is the state that enters the first layer.
    kind, last = str(found["kind"].values[0]), int(found["depth"].values[-1])
    first, end = (
        mean_interval(found["own"].sel(kind=kind, depth=depth).values) for depth in (0, last)
    )
    text = (
        f"Of the patches of an object {first.words('%')} say its {kind} before the first layer and"
        f" {end.words('%')} after the last; a word among the top words says that the state lies in"
        " its direction, not that the answer uses it."
    )
    return Section(QUESTION, figure, (), text)


if __name__ == "__main__":
    run_script(section)
