"""What do answers lose when attention between two groups of tokens is cut?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from avl_analysis.figures import Axis, Caption, Figure, Line, Lines, Rule
from avl_analysis.intervals import METHOD, Estimate, mean_interval, mean_intervals
from avl_reports.findings import Finding, judge
from avl_reports.run import Run, Section
from avl_reports.script import run_script

QUESTION = "What do answers lose when attention between two groups of tokens is cut?"
LOSS = 0.1
"""Nats per answer token from which on a path counts as used: an answer token then keeps at most
nine tenths of its probability.
"""
NEEDED = "image -> answer"
ROWS = {
    "question": "question tokens",
    "last": "the last prompt position",
    "answer": "answer tokens",
    "all": "all later tokens",
    "image": "image tokens",
    "system": "system tokens",
}
"""What a group of rows is called in a sentence."""


def section(run: Run) -> Section:
    """Change of the answer's log-probability, and answers that stay, by layer and flow."""
    cut = run.further("knockout")
    flows = [str(flow) for flow in cut["flow"].values]
    picture = [flow for flow in flows if flow.startswith("image")]
    # A file may hold flows of one group only; the other then gets no panels.
    parts = [(title, chosen) for title, chosen in _split(flows, picture) if chosen]
    window = int(cut.attrs.get("window", 1))
    layer = Axis("layer" if window == 1 else f"first of {window} layers", "index")
    loss = Axis("change of log-probability", "nats per token")
    stay = Axis("answers that stay the same", "share", (0.0, 1.05))
    # Rows: what is lost, what stays. Columns: the groups of flows, hence `len(parts)` columns
    # below.
    panels = [
        Lines(layer, axis, _lines(cut, variable, chosen, flows), rules, title=f"{title}: {kept}")
        for variable, axis, rules, kept in (
            ("log_prob_change", loss, (Rule(0.0, "", "y"),), "what is lost"),
            ("same_answer", stay, (), "what stays"),
        )
        for title, chosen in parts
    ]
    # Samples that failed have NaN.
    count = int(np.isfinite(cut["plain_probability"]).sum())
    what = (
        "Above: change of the answer's log-probability, per token, when rows of the second group"
        " may not attend to keys of the first in"
        f" {'one layer' if window == 1 else f'{window} consecutive layers'}; the model is led along"
        " its own answer. Below: share of answers that greedy decoding would still give, token by"
        " token. Last is the position that produces the first answer token."
    )
    caption = Caption(what, max(count, 1), run.model, METHOD)
    figure = Figure("knockout", "Attention knock-out", tuple(panels), caption, len(parts))
    findings = (finding(cut),) if NEEDED in flows else ()
    return Section(QUESTION, figure, findings, sentence(cut))


def finding(cut: xr.Dataset) -> Finding:
    """Whether answer tokens need to read the picture themselves."""
    # the mean over layers, because the layer with the largest loss would be chosen by its noise
    change = cut["log_prob_change"].sel(flow=NEEDED).mean("layer")
    loss: Estimate[float] = mean_interval(-change.values)
    return Finding(
        "Image tokens are kept while the answer is written",
        "Cutting answer tokens off the picture in one window of layers costs"
        f" {loss.words('nats per answer token')} on average over the windows.",
        f"at least {LOSS:g} nats per token",
        judge(loss, "at least", LOSS),
    )


def sentence(cut: xr.Dataset) -> str:
    """The flow and layer whose cut costs most, in one plain sentence, and what it does not say."""
    mean = cut["log_prob_change"].mean("sample")
    if not bool(np.isfinite(mean).any()):
        return "No answer could be measured."
    # The most negative change is the largest loss; (flow, layer) where nothing was measured is left
    # out.
    place = mean.argmin(("flow", "layer"))
    flow, layer = (str(mean[name][int(place[name])].item()) for name in ("flow", "layer"))
    source, _, target = flow.partition(" -> ")
    rows = ROWS.get(target, target)
    # Picked because it is the largest, so noise makes it larger still; it is told, and no verdict
    # is drawn from it.
    worst = mean_interval(cut["log_prob_change"].sel(flow=flow, layer=int(layer)).values)
    return (
        f"Most is lost when {rows} cannot read {source} tokens in layer {layer}:"
        f" {worst.words('nats per answer token')}. A path that can be cut without loss may still"
        " have carried what another layer carries, too."
    )


def _split(flows: list[str], picture: list[str]) -> list[tuple[str, list[str]]]:
    """Flows that start at the picture, and the others; titles of their panels."""
    others = [flow for flow in flows if flow not in picture]
    return [("cut off the picture", picture), ("cut off other tokens", others)]


def _lines(cut: xr.Dataset, variable: str, chosen: list[str], flows: list[str]) -> tuple[Line, ...]:
    """One curve per flow, with the colour of its place among all flows."""
    layers = cut["layer"].values.astype(float)
    lines = []
    for flow in chosen:
        found = mean_intervals(cut[variable].sel(flow=flow).transpose("sample", "layer").values)
        slot = flows.index(flow) + 1
        lines.append(Line(flow, layers, found.mean, found.low, found.high, slot=slot))
    return tuple(lines)


if __name__ == "__main__":
    run_script(section)
