"""Is what is attended to also what is read?"""

from __future__ import annotations

from avl_analysis.figures import Axis, Figure, Line, Lines
from avl_analysis.intervals import estimate
from avl_reports.run import Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import LAYER, SLOTS, curve, modality_curves, share

QUESTION = "Is what is attended to also what is read?"


def section(run: Run) -> Section:
    """Attention mass with and without the length of the values.

    And how alike the keys are, by layer.
    """
    weighted, plain = run.decode("value_weighted_mass"), run.decode("modality_mass")
    both: list[Line] = []
    for name in ("image", "text"):
        one = estimate(plain.sel(key_modality=name), ("layer",))
        both.append(curve(f"{name}, attention", one, "layer", SLOTS[name]))
    # Colours other than those of the modalities, which the plain curves have.
    for slot, name in ((6, "image"), (5, "text")):
        one = estimate(weighted.sel(key_modality=name), ("layer",))
        both.append(curve(f"{name}, value-weighted", one, "layer", slot))
    alike = estimate(run["key_redundancy"], ("layer", "key_modality"))
    figure = Figure(
        "values",
        "Attention against value-weighted attention, and redundancy of keys",
        (
            Lines(LAYER, share("mass"), tuple(both), title="mass, decode steps"),
            Lines(
                LAYER,
                Axis("mean cosine between keys", "1 = all alike"),
                modality_curves(alike, "layer"),
                title="redundancy of the prompt's keys",
            ),
        ),
        run.caption(
            "Left: attention mass on image and text keys, plain and weighted with the length of"
            " each key's value vector. Right: mean cosine over all pairs of keys of one modality;"
            " merging pays where it is near 1."
        ),
    )
    return Section(
        QUESTION,
        figure,
        (),
        "A reminder that attention is not contribution; it judges none of A-VL's choices.",
    )


if __name__ == "__main__":
    run_script(section)
