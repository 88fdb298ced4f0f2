"""Which heads read the picture, and which of them look at the right place?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from avl_analysis.corpus.regions import recorded_regions
from avl_analysis.figures import Axis, Figure, Heat
from avl_analysis.heads.localisation import first_word_hits
from avl_analysis.heads.taxonomy import HIT, KINDS, LOCAL, SINK, TEXT, VISUAL, kinds
from avl_analysis.intervals import estimate
from avl_reports.run import NotMeasured, Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import HEAD, LAYER, layer_head_map, share

QUESTION = "Which heads read the picture, and which of them look at the right place?"


def section(run: Run) -> Section:
    """The kind of every head, its image attention, how often it hits the region, its spread."""
    # Asked for the error alone: `decode` says what is missing where the kinds cannot be told.
    for name in ("modality_mass", "first_token_mass", "recent_text_mass"):
        run.decode(name)
    hits = hit_rate(run)
    found = kinds(run.recording, None if hits is None else hits.mean("sample").values)
    # (layers, heads) number of each head's kind in `KINDS`
    places = np.vectorize(KINDS.index)(found).astype(float)
    value = Axis(
        "kind of head",
        "class",
        # Half a class on either side, so that every whole number lies in the middle of its colour.
        (-0.5, len(KINDS) - 0.5),
        ticks=tuple((float(i), k) for i, k in enumerate(KINDS)),
    )
    image = estimate(run.decode("modality_mass").sel(key_modality="image"), ("layer", "head"))
    panels = [
        Heat(HEAD, LAYER, value, places, annotate=found.shape[1] <= 12, title="kinds of heads"),
        layer_head_map(image, share("image mass"), "attention on the picture, decode steps"),
    ]
    if hits is not None:
        panels.append(
            layer_head_map(
                estimate(hits, ("layer", "head")),
                share("samples"),
                "strongest patch is on the region",
            )
        )
    entropy = estimate(run["spatial_entropy"], ("layer", "head"))
    if bool(np.isfinite(entropy.mean).any()):
        # At least a tenth of a nat, so that heads with one place each do not get a scale without
        # width.
        top = float(np.nanmax(entropy.mean.values))
        panels.append(
            layer_head_map(
                entropy, Axis("spatial entropy", "nats", (0.0, max(top, 0.1))), "spread over places"
            )
        )
    figure = Figure(
        "heads",
        "Heads by what they do",
        tuple(panels),
        run.caption(
            f"Kinds by decode-time attention, the first that fits: visual: at least {VISUAL:g} on"
            " the picture and, where regions are known, the strongest patch on the region in at"
            f" least {HIT:g} of the samples; scanning: at least {VISUAL:g} on the picture; sink: at"
            f" least {SINK:g} on the first token; local: at least {TEXT:g} on text and {LOCAL:g} of"
            f" that on its 16 newest tokens; text: at least {TEXT:g} on text; else mixed. Strongest"
            " patch (on what the first word is about) and spread (entropy over connected places, 0"
            " = one place) are of the last prompt row."
        ),
    )
    counts = ", ".join(
        f"{int((found == kind).sum())} {kind}" for kind in KINDS if (found == kind).any()
    )
    return Section(QUESTION, figure, (), f"Of {found.size} heads: {counts}.")


def hit_rate(run: Run) -> xr.DataArray | None:
    """`first_word_hits` of the recording; None where no region is known."""
    if "token" not in run["image_score_last"].dims:
        raise NotMeasured("the recording keeps no scores of single image tokens")
    return first_word_hits(run.recording, recorded_regions(run.recording))


if __name__ == "__main__":
    run_script(section)
