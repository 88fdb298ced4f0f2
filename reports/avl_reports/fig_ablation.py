"""Do right answers need the visual heads more than as many other heads?"""

from __future__ import annotations

import numpy as np

from avl_analysis.figures import Axis, Bar, Bars, Figure, Rule
from avl_analysis.heads.ablation import Ablation, Silenced
from avl_reports.findings import Finding, judge
from avl_reports.run import Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import share

QUESTION = "Do right answers need the visual heads more than as many other heads?"


def section(run: Run) -> Section:
    """Accuracy with nothing, the kind's heads, and each random set silenced; the loss by task."""
    # A row of the figure for every ablation: accuracy on the left, loss by task on the right.
    panels = [panel for done in run.ablations for panel in (_overall(done), _by_task(done))]
    first = run.ablations[0]
    figure = Figure(
        "ablation",
        f"Silencing {first.kind} heads, and as many others",
        tuple(panels),
        run.caption(
            "Right answers while the attention outputs of some heads are zero. "
            + " ".join(_row(done, number) for number, done in enumerate(run.ablations))
            + f" Kinds were read from {first.found_on}. Left: Wilson intervals. Right: loss paired"
            " by question; for random sets the mean over draws, questions and draws resampled.",
            len(first.samples),
        ),
    )
    text = (
        f"A silenced head reads as before but passes nothing on. {first.found} of {first.heads}"
        f" heads are {first.kind}."
    )
    return Section(
        QUESTION, figure, tuple(map(finding, run.ablations)), text, None, table(run.ablations)
    )


def finding(done: Ablation) -> Finding:
    """Whether silencing the kind costs more right answers than silencing as many others."""
    # `contrast` is above 0 where the kind's heads cost more. Its interval resamples what another
    # run would draw anew: questions, and random sets where there are several.
    contrast, count = done.contrast, len(done.of_kind.heads)
    loss, other = done.loss, done.random_loss
    return Finding(
        f"Heads found to be {done.kind} matter more than {done.others}",
        f"Silencing {count} {done.kind} heads changes accuracy by {loss.words('%')}, silencing"
        f" {done.others} by {other.words('%')}; the latter minus the former: {contrast.words('%')}"
        f" (paired by question; {_resampled(done)}).",
        "above 0",
        judge(contrast, "at least", 0.0),
    )


def _resampled(done: Ablation) -> str:
    """What another run would draw anew, and what it would not."""
    if len(done.random) > 1:
        return "questions and random sets resampled"
    return "questions resampled, the one random set held fixed"


def table(ablations: tuple[Ablation, ...]) -> tuple[tuple[str, ...], ...]:
    """Which heads each set holds, and its accuracy."""
    rows = [("silenced", "heads (layer.head)", "right answers")]
    for done in ablations:
        for group in done.groups:
            rows.append((_name(done, group), _heads(group) or "none", group.accuracy.words("%")))
    return tuple(rows)


def _row(done: Ablation, number: int) -> str:
    """What a row of panels shows, in words."""
    count, draws = len(done.of_kind.heads), len(done.random)
    rest = "heads of the same layers" if done.same_layers else "heads drawn from all others"
    sets = f"{draws} sets" if draws > 1 else "one set"
    return (
        f"{'Below' if number else 'Above'}: {count} {done.kind} heads, or {count} {rest} ({sets})."
    )


def _overall(done: Ablation) -> Bars:
    found = [group.accuracy for group in done.groups]
    values, low, high = (
        np.array([getattr(one, end) for one in found]) for end in ("mean", "low", "high")
    )
    names = tuple(_name(done, group) for group in done.groups)
    bar = Bar("right answers", values, low, high, slot=1)
    return Bars(
        Axis("silenced", "heads"),
        share("right answers"),
        names,
        (bar,),
        horizontal=True,
        title=_title(done),
    )


def _by_task(done: Ablation) -> Bars:
    tasks = tuple(sorted(set(done.tasks)))
    parts = [done.select_task(task) for task in tasks]
    bars = []
    for name, slot, losses in (
        (f"{done.kind} heads", 1, [part.loss for part in parts]),
        (done.others, 2, [part.random_loss for part in parts]),
    ):
        # A loss is kept as the change of accuracy, below 0 where answers are lost; the bars show
        # what is lost. With the sign the bounds change places, hence "high" before "low".
        values, low, high = (
            -np.array([getattr(one, end) for one in losses]) for end in ("mean", "high", "low")
        )
        bars.append(Bar(name, values, low, high, slot=slot))
    axis = Axis("right answers lost", "share of questions")
    return Bars(
        Axis("task", "name"),
        axis,
        tuple(task or "all" for task in tasks),
        tuple(bars),
        (Rule(0.0, "", "x"),),
        horizontal=True,
        title="loss by task",
    )


def _title(done: Ablation) -> str:
    return f"accuracy, {len(done.of_kind.heads)} heads silenced"


def _name(done: Ablation, group: Silenced) -> str:
    if group is done.of_kind:
        return f"{done.kind} heads"
    return f"{group.name}, same layers" if done.same_layers and group in done.random else group.name


def _heads(group: Silenced) -> str:
    return ", ".join(f"{layer}.{head}" for layer, head in group.heads)


if __name__ == "__main__":
    run_script(section)
