"""Two recordings side by side: the same figures, panel by panel, on the same scales.

For two models on the same questions, or one model with and without a policy. Every panel of the
first recording stands to the left of the second's; findings are listed for each. Nothing is tested
between the two: samples may differ, and a paired comparison of policies is what `avl compare` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import numpy as np

from avl_analysis.errors import InputError
from avl_analysis.figures import Axis, Bars, Caption, Figure, Heat, Lines, Panel, Scatter
from avl_reports.findings import Finding
from avl_reports.run import NotMeasured, Run, Section


def labels(runs: Sequence[Run], files: Sequence[str]) -> list[str]:
    """What tells two recordings apart: their models, else their policies, else their files."""
    policies = [str(run.recording.attrs.get("policy") or "full cache") for run in runs]
    # The first kind of name in which the two differ.
    for names in ([run.model for run in runs], policies, list(files)):
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{files[0]} is named twice: pass two different recordings")


def section(module: ModuleType, runs: Sequence[Run], names: Sequence[str]) -> Section:
    """A figure module's section of two runs, side by side.

    Args:
        module: has `section(run)`.
        runs: two of them.
        names: what each is called.

    Raises:
        NotMeasured: one of the recordings does not hold what is shown, or their figures have
            different panels.
    """
    both = []
    for run, name in zip(runs, names, strict=True):
        try:
            both.append(module.section(run))
        except NotMeasured as error:
            # NotAsked becomes NotMeasured here: a question that does not arise for one of the two
            # is listed with its reason and not left out without a word.
            raise NotMeasured(f"{name}: {error}") from error
    left, right = (one.figure.panels for one in both)
    if [type(panel) for panel in left] != [type(panel) for panel in right]:
        raise NotMeasured("the two recordings give figures with different panels")
    panels: list[Panel] = []
    for pair in zip(left, right, strict=True):
        # Left, right, left, right: with two columns each panel stands beside its counterpart.
        panels += [
            _named(panel, name) for panel, name in zip(_one_scale(*pair), names, strict=True)
        ]
    first = both[0].figure
    caption = Caption(
        f"Left: {names[0]} (n = {runs[0].n}); right: {names[1]} (n = {runs[1].n}).",
        runs[0].n + runs[1].n,
        " and ".join(dict.fromkeys(run.model for run in runs)),
        first.caption.interval,
        first.caption.what,
        of=first.caption.of,
    )
    figure = Figure(first.name, first.title, tuple(panels), caption, columns=2)
    findings = tuple(
        _of(finding, name)
        for one, name in zip(both, names, strict=True)
        for finding in one.findings
    )
    # Without tables and animations, which are of one recording.
    return Section(both[0].question, figure, findings, both[0].text)


def _named(panel: Panel, name: str) -> Panel:
    return replace(panel, title=f"{name}: {panel.title}" if panel.title else name)


def _of(finding: Finding, name: str) -> Finding:
    return replace(finding, choice=f"{name}: {finding.choice}")


def _one_scale(left: Panel, right: Panel) -> tuple[Panel, Panel]:
    """Both panels with the range of values of both, where the drawing would choose one for each."""
    if isinstance(left, Lines) and isinstance(right, Lines):
        y = _together(left.y, right.y, [line for p in (left, right) for line in p.lines])
        return replace(left, y=y), replace(right, y=y)
    if isinstance(left, Scatter) and isinstance(right, Scatter):
        y = _together(left.y, right.y, [points for p in (left, right) for points in p.points])
        return replace(left, y=y), replace(right, y=y)
    if isinstance(left, Heat) and isinstance(right, Heat):
        value = _limits(left.value, [left.values, right.values])
        return replace(left, value=value), replace(right, value=value)
    if isinstance(left, Bars) and isinstance(right, Bars):
        drawn = [bar.values for p in (left, right) for bar in p.bars]
        # Bars start at 0, so 0 belongs to the range.
        value = _limits(left.value, [*drawn, np.zeros(1)])
        return replace(left, value=value), replace(right, value=value)
    return left, right


def _together(left: Axis, right: Axis, series: Sequence[object]) -> Axis:
    # A margin below the smallest value could reach 0, which a logarithmic axis does not have. Only
    # limits that the panels bring are joined.
    if left.log or right.log:
        known = [axis.limits for axis in (left, right) if axis.limits is not None]
        low = [limits[0] for limits in known]
        high = [limits[1] for limits in known]
        return replace(left, limits=(min(low), max(high))) if known else left
    arrays = [
        getattr(one, key)
        for one in series
        for key in ("y", "low", "high")
        if getattr(one, key) is not None
    ]
    return _limits(left, arrays)


def _limits(axis: Axis, arrays: Sequence[np.ndarray]) -> Axis:
    """The axis with the range of the values, unless it has limits already."""
    known = np.concatenate([np.ravel(array)[np.isfinite(np.ravel(array))] for array in arrays])
    # The axis stays as it is where a panel brings limits, or where equal values give no range; in
    # the second case the drawing chooses.
    if axis.limits is not None or not known.size or known.min() == known.max():
        return axis
    margin = 0.05 * (known.max() - known.min())
    return replace(axis, limits=(float(known.min() - margin), float(known.max() + margin)))
