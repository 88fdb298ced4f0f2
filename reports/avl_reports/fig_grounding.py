"""Do a few heads, chosen without knowing the truth, point at what the question is about?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avl_analysis.errors import InputError
from avl_analysis.figures import Axis, Box, Figure, Overlay
from avl_analysis.heads.ablation import Head
from avl_analysis.heads.grounding import (
    LocalisationHeads,
    choose_heads,
    found_box,
    ground,
    picture_of,
)
from avl_analysis.intervals import mean_interval, paired_difference
from avl_analysis.map_plots import grounding
from avl_analysis.recordings.recording import Recording
from avl_reports.fig_overlay import drawable, short
from avl_reports.findings import Finding, judge
from avl_reports.run import NotMeasured, Run, Section
from avl_reports.script import run_script

QUESTION = "Do a few heads, chosen without the truth, point at what is asked about?"
EXAMPLES = 3


def section(run: Run) -> Section:
    """Heads chosen on every second picture, scored on the others: pointing and IoU."""
    # Heads that were chosen and scored on the same pictures would partly be those that fit by
    # chance.
    choosing, scoring = halves(run.recording)
    try:
        chosen = choose_heads(run.recording, samples=choosing)
        found = grounding(run.recording, chosen, scoring)
    except InputError as error:
        raise NotMeasured(str(error)) from error
    panels = (*found.panels, *_examples(run, found.examples, chosen.heads))
    names = ", ".join(f"{layer}.{head}" for layer, head in chosen.heads)
    figure = Figure(
        "grounding",
        "Localisation heads",
        panels,
        run.caption(
            f"Heads {names} (layer.head) were chosen on {len(choosing)} samples by attention sum"
            f" (at least the elbow, {chosen.elbow:.2f}) and spatial entropy, and scored on other"
            " pictures with one known box, whatever was answered. Dotted line: pointing at random."
            " Below: the first pictures scored, with the known box and the one found.",
            len(found.pointing),
        ),
        columns=3,
    )
    # `pointing` is (pictures, sets of heads): column 0 the chosen heads, column 1 the mean over all
    # heads.
    gain = paired_difference(found.pointing[:, 0], found.pointing[:, 1])
    pointing = mean_interval(found.pointing[:, 0])
    finding = Finding(
        "Image tokens are ranked by the mean over heads",
        f"{len(chosen.heads)} heads chosen without the truth point at the object in"
        f" {pointing.words('%')} of pictures (at random: {100 * found.area:.0f} %); minus the"
        f" mean over all heads: {gain.words('%')}.",
        "the chosen heads gain nothing",
        # The finding is about A-VL's ranking, so a gain of the chosen heads speaks against it.
        judge(gain, "at most", 0.0),
    )
    text = (
        "Low entropy alone does not tell a head that finds the object from one that looks at the"
        " same place of every picture; the table shows how often each chosen head points at the"
        " object by itself."
    )
    return Section(QUESTION, figure, (finding,), text, None, _table(run, chosen, scoring))


def halves(recording: Recording) -> tuple[list[str], list[str]]:
    """Names of the samples of every second picture, and of those of the others.

    Pictures alternate within each task, so that both halves ask the same kinds of questions.

    Raises:
        NotMeasured: all samples are about one picture.
    """
    half: dict[str, int] = {}
    count: dict[str, int] = {}
    parts: tuple[list[str], list[str]] = ([], [])
    for name in recording.samples:
        facts = recording.facts(name)
        # Samples whose picture is not known count as pictures of their own.
        picture, task = picture_of(facts) or name, str(facts.get("task", ""))
        # Decided by the first question about a picture: further ones join it, so that no picture is
        # on both sides.
        if picture not in half:
            half[picture] = count.get(task, 0) % 2
            count[task] = count.get(task, 0) + 1
        parts[half[picture]].append(name)
    if not parts[1]:
        raise NotMeasured("heads are chosen on some pictures and scored on others; there is one")
    return parts


def _examples(run: Run, names: Sequence[str], heads: Sequence[Head]) -> tuple[Overlay, ...]:
    """The first pictures that were scored, with the combined map and both boxes."""
    places = drawable(run)
    shown = [
        e for e in run.examples if e.name in names and e.name in places and e.picture is not None
    ]
    panels = []
    for example in shown[:EXAMPLES]:
        assert example.picture is not None
        values, edges = found_box(run.recording, example.name, heads)
        height, width = example.picture.shape[:2]
        # Fractions of the picture to pixels of the thumbnail or drawing shown.
        left, top, right, bottom = edges * [width, height, width, height]
        boxes = (*example.boxes, Box(left, top, right, bottom, "found"))
        # (image tokens,) as shares of the combined map; a map without any attention stays as it is.
        total = np.nansum(values)
        patches = places[example.name].patches(values / total if total > 0 else values)
        axis = Axis(
            "attention of the chosen heads", "share", (0.0, float(np.nanmax(patches.values)))
        )
        panels.append(
            Overlay(example.picture, axis, patches, boxes=boxes, title=short(example.prompt, 44))
        )
    return tuple(panels)


def _table(
    run: Run, chosen: LocalisationHeads, scoring: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Every chosen head by itself."""
    sets = {f"{layer}.{head}": [(layer, head)] for layer, head in chosen.heads}
    # Scored on the pictures that the heads were not chosen by, like the heads together.
    alone = ground(run.recording, sets, scoring)
    rows = [("layer.head", "samples that voted for it", "points at the object, alone")]
    for layer, head in chosen.heads:
        votes = float(chosen.votes.sel(layer=layer).isel(head=head))
        pointing = mean_interval(alone["pointing"].sel(set=f"{layer}.{head}").values)
        rows.append((f"{layer}.{head}", f"{100 * votes:.0f} %", pointing.words("%")))
    return tuple(rows)


if __name__ == "__main__":
    run_script(section)
