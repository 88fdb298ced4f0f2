"""Figures of policies: quality against bytes over many questions, and divergence along one answer.

    plot_comparison(compare(vlm, samples, policies)).save("compare.svg")

The dashboard draws the same figures, so what it shows can be drawn again from Python.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from avl.policies.registry import color_slots, label_of
from avl_analysis.errors import InputError
from avl_analysis.evaluation.comparison import Comparison
from avl_analysis.figures import Caption, Figure, looks
from avl_analysis.figures.plot import Plot
from avl_analysis.figures.spec import Axis
from avl_analysis.figures.tradeoff import Place, tradeoff
from avl_analysis.live import Disagreement

QUALITIES: Mapping[str, tuple[str, Axis]] = {
    "correct": (
        "answers that are right",
        Axis("right answers", "share of samples", (0.0, 1.05)),
    ),
    "kl": ("divergence from the full cache", Axis("KL(full || policy)", "nats")),
    "agreement": (
        "same next token as the full cache",
        Axis("agreement", "share of tokens", (0.0, 1.05)),
    ),
    "rouge_l": (
        "ROUGE-L against the full cache's answer",
        Axis("ROUGE-L", "share", (0.0, 1.05)),
    ),
}
"""Metric of a comparison -> title and axis of its panel."""


def color_slot(name: str) -> int:
    """The palette's number of a policy's style, by what it is called on a page or command line.

    The label or name, with a budget or settings behind it; 0 for an unknown one.
    """
    slots = color_slots()
    known = [label for label in slots if name == label or name.startswith(f"{label} ")]
    if known:
        # A label may begin with another label; the longer one is the more exact.
        return slots[max(known, key=len)]
    # What stands before a budget or settings is the name used on a command line.
    command = re.split(r"[:,(\s]", name, maxsplit=1)[0]
    return slots.get(label_of(command), 0)


def plot_comparison(comparison: Comparison) -> Plot:
    """Quality of every policy against the bytes it holds, one panel per measure.

    Args:
        comparison: what `compare` or `load_comparison` gave.

    Raises:
        InputError: a comparison with none of the measures of quality.
    """
    panels = []
    for metric in (name for name in QUALITIES if name in comparison.metrics):
        title, axis = QUALITIES[metric]
        places = []
        for name in comparison.policies:
            share, value = comparison.mean("kv_filled_share", name), comparison.mean(metric, name)
            interval = (value.mean, value.low, value.high)
            places.append(Place(name, share.mean, *interval, color_slot(name)))
        panels.append(tradeoff(places, axis, title))
    if not panels:
        raise InputError(
            f"this comparison holds {', '.join(comparison.metrics)}; to be drawn against bytes it"
            f" needs one of {', '.join(QUALITIES)}"
        )
    caption = Caption(
        "Quality against bytes of keys and values in use at the end of each answer.",
        comparison.dataset.sizes["sample"],
        str(comparison.dataset.attrs.get("model", "unknown")),
        "bars: 95 % intervals over samples",
    )
    title = "Policies: quality against bytes"
    return Plot(Figure("comparison", title, tuple(panels), caption, columns=2))


def plot_divergence(off: Mapping[str, Disagreement], model: str = "the one shown") -> Plot:
    """Divergence of every policy from the full cache, token by token of its answer.

    Args:
        off: name of a policy -> what `live.disagreement` gave.
        model: what the caption calls the model.
    """
    axis = Axis("KL(full || policy)", "nats")
    lines = looks.evolution("divergence", {name: d.kl for name, d in off.items()}, axis)
    # `evolution` numbers the slots in turn; here every policy gets the one it has everywhere.
    coloured = tuple(replace(line, slot=color_slot(line.name)) for line in lines.lines)
    caption = Caption(
        "KL(full || policy) at every token of the full cache's answer.",
        1,
        model,
        "one answer has no interval",
    )
    title = "Divergence from the full cache, token by token"
    panel = replace(lines, lines=coloured)
    return Plot(Figure("divergence", title, (panel,), caption, columns=1))
