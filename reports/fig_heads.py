"""Which heads read the picture, and which of them look at the right place?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from avl_analysis.figures import Axis, Figure, Heat
from avl_analysis.headmaps import KINDS, LOCAL, SINK, TEXT, VISUAL, kinds
from reports.estimates import estimate
from reports.run import NotMeasured, Run, Section
from reports.script import run_script
from reports.shapes import HEAD, LAYER, layer_head_map, share

QUESTION = "Which heads read the picture, and which of them look at the right place?"


def section(run: Run) -> Section:
    """The kind of every head, its attention on the picture, how often it hits the region asked about, its spread."""
    for name in ("modality_mass", "first_token_mass", "recent_text_mass"):
        run.decode(name)
    found = kinds(run.recording)
    places = np.vectorize(KINDS.index)(found).astype(float)
    value = Axis(
        "kind of head", "class", (-0.5, len(KINDS) - 0.5), ticks=tuple((float(i), k) for i, k in enumerate(KINDS))
    )
    image = estimate(run.decode("modality_mass").sel(key_modality="image"), ("layer", "head"))
    panels = [
        Heat(HEAD, LAYER, value, places, title="kinds of heads"),
        layer_head_map(image, share("image mass"), "attention on the picture, decode steps"),
    ]
    hits = hit_rate(run)
    if hits is not None:
        panels.append(
            layer_head_map(estimate(hits, ("layer", "head")), share("samples"), "strongest patch is on the region")
        )
    entropy = estimate(run["spatial_entropy"], ("layer", "head"))
    if bool(np.isfinite(entropy.value).any()):
        top = float(np.nanmax(entropy.value.values))
        panels.append(
            layer_head_map(entropy, Axis("spatial entropy", "nats", (0.0, max(top, 0.1))), "spread over places")
        )
    figure = Figure(
        "heads",
        "Heads by what they do",
        tuple(panels),
        run.caption(
            f"Kinds by decode-time attention, the first that fits: visual: at least {VISUAL:g} on the picture; sink: "
            f"at least {SINK:g} on the first token; local: at least {TEXT:g} on text and {LOCAL:g} of that on its 16 "
            f"newest tokens; text: at least {TEXT:g} on text; else mixed. Strongest patch and spread (entropy over "
            "connected places, 0 = one place) are of the last prompt row."
        ),
    )
    counts = ", ".join(f"{int((found == kind).sum())} {kind}" for kind in KINDS if (found == kind).any())
    return Section(QUESTION, figure, (), f"Of {found.size} heads: {counts}.")


def hit_rate(run: Run) -> xr.DataArray | None:
    """1 where a head's strongest image token of the last prompt row lies in the region the first word is about.

    (sample, layer, head), NaN for samples whose region is unknown; None if it is unknown for all. The mean is the
    visual-head score of SparseMM (Wang et al., 2025).
    """
    last = run["image_score_last"]
    if "token" not in last.dims:
        raise NotMeasured("the recording keeps no scores of single image tokens")
    rows = np.full((last.sizes["sample"], last.sizes["layer"], last.sizes["head"]), np.nan)
    for index, example in enumerate(run.examples):
        region = next((r.tokens for r in example.regions[:1] if r.tokens), ())
        scores = last.isel(sample=index).transpose("layer", "head", "token").values
        if region and np.isfinite(scores).any():
            rows[index] = np.isin(np.nan_to_num(scores, nan=-1.0).argmax(-1), region)
    if not np.isfinite(rows).any():
        return None
    return xr.DataArray(rows, dims=("sample", "layer", "head"), coords={n: last[n] for n in ("layer", "head")})


if __name__ == "__main__":
    run_script(section)
