"""What a recording holds, in a few lines of text or HTML: its `repr`, and what a notebook shows."""

from __future__ import annotations

from html import escape

from avl_analysis.figures.plot import Plot
from avl_analysis.recordings.readable import Readable
from avl_analysis.recordings.statistic_plot import plot


def describe(recording: Readable) -> list[tuple[str, str]]:
    """Label and value of everything a reader wants to know first."""
    count = len(recording)
    facts = [
        ("model", str(recording.attrs.get("model", "unknown"))),
        ("policy", str(recording.attrs.get("policy", "") or "full cache")),
        ("samples", str(count)),
    ]
    if not count:
        return [*facts, ("statistics", "none yet: call the model inside the with block")]
    tokens = recording.tokens
    if "modality" in tokens:
        modality = tokens["modality"].values
        # (samples, positions); padding is -1 and counts as none of them.
        by_kind = [
            f"{(modality == code).sum(-1).mean():.0f} {name}"
            for code, name in enumerate(("system", "image", "text"))
        ]
        facts.append(("tokens per sample", f"{', '.join(by_kind)} (answers count as text)"))
    sizes = {
        dim: recording[name].sizes[dim]
        for name in recording.names
        for dim in ("layer", "head", "step")
        if dim in recording[name].dims
    }
    facts += [(f"{dim}s", str(size)) for dim, size in sizes.items()]
    return [*facts, ("statistics", ", ".join(recording.names))]


def as_text(recording: Readable) -> str:
    """One line for the interpreter."""
    facts = dict(describe(recording))
    return (
        f"<Recording of {facts['model']}: {facts['samples']} sample(s),"
        f" {facts.get('layers', 0)} layers, {len(recording.names) if len(recording) else 0}"
        " statistics; see .names, .dataset, .show()>"
    )


def as_html(recording: Readable) -> str:
    """A table of facts, and how attention is divided by layer."""
    body = "".join(
        f'<tr><th style="text-align:left;vertical-align:top">{escape(label)}</th>'
        f'<td style="text-align:left">{escape(value)}</td></tr>'
        for label, value in describe(recording)
    )
    drawing = mass_by_layer(recording)
    picture = "" if drawing is None else drawing._repr_html_()
    return f"<div><strong>Recording</strong><table>{body}</table>{picture}</div>"


def mass_by_layer(recording: Readable) -> Plot | None:
    """Attention mass on system, image and text tokens by layer; None where it was not recorded."""
    if not len(recording) or "modality_mass" not in recording.names:
        return None
    return plot(recording, "modality_mass", by="layer")
