"""Two recordings side by side: each panel twice, on one scale, and named."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from avl_analysis.cli.main import main
from avl_analysis.errors import InputError
from avl_analysis.figures import Heat, Lines
from avl_reports import fig_modality, fig_policies, pair
from avl_reports.build import build
from avl_reports.page import GLANCED
from avl_reports.run import NotMeasured, Run
from tests.reports import made


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    second = made.recording(seed=1)
    second.attrs["policy"] = "A-VL"
    return [Run(made.recording(samples=5)), Run(second)]


def test_recordings_are_named_by_what_differs(runs: list[Run]) -> None:
    assert pair.labels(runs, ["a.nc", "b.nc"]) == ["full cache", "A-VL"]
    same = [runs[0], runs[0]]
    assert pair.labels(same, ["a.nc", "b.nc"]) == ["a.nc", "b.nc"]
    with pytest.raises(InputError, match=r"a\.nc is named twice"):
        pair.labels(same, ["a.nc", "a.nc"])


def test_every_panel_stands_twice_on_one_scale_with_its_own_values(runs: list[Run]) -> None:
    both = pair.section(fig_modality, runs, ["full", "A-VL"])
    alone = [fig_modality.section(run).figure.panels for run in runs]
    panels = both.figure.panels
    assert len(panels) == 2 * len(alone[0])
    assert both.figure.columns == 2
    for place, panel in enumerate(panels):
        source = alone[place % 2][place // 2]
        assert panel.title.startswith(("full", "A-VL")[place % 2])
        if isinstance(panel, Lines):
            assert isinstance(source, Lines)
            for line, original in zip(panel.lines, source.lines, strict=True):
                np.testing.assert_array_equal(line.y, original.y)
        if isinstance(panel, Heat):
            assert isinstance(source, Heat)
            np.testing.assert_array_equal(panel.values, source.values)
    for left, right in zip(panels[::2], panels[1::2], strict=True):
        if isinstance(left, Lines):
            assert isinstance(right, Lines)
            assert left.y.limits == right.y.limits
        if isinstance(left, Heat):
            assert isinstance(right, Heat)
            assert left.value.limits == right.value.limits
    assert f"full (n = {runs[0].n})" in both.figure.caption.text
    assert {finding.choice.partition(":")[0] for finding in both.findings} == {"full", "A-VL"}


def test_what_one_of_them_lacks_is_not_shown(runs: list[Run]) -> None:
    with pytest.raises(NotMeasured, match="full: no policies were compared"):
        pair.section(fig_policies, runs, ["full", "A-VL"])


def test_the_page_starts_with_the_figures_that_matter_most(runs: list[Run], tmp_path: Path) -> None:
    report = build(
        runs[0].recording, tmp_path / "one", figures=(fig_modality,), formats=(), document=False
    )
    page = report.page.read_text(encoding="utf-8")
    assert page.index('id="glance"') < page.index('id="findings"')
    assert 1 <= len(re.findall(r'data-plot="plot-glance-', page)) <= GLANCED
    for plot in re.findall(r'data-plot="(plot-glance-[^"]+)"', page):
        assert f'<script type="application/json" id="{plot}">' in page


def test_the_command_takes_two_recordings(
    runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [runs[i].recording.save(tmp_path / name) for i, name in enumerate(("a.nc", "b.nc"))]
    with pytest.raises(SystemExit) as done:
        main(["report", *map(str, files), "--out", str(tmp_path / "both")])
    assert not done.value.code
    page = (tmp_path / "both" / "index.html").read_text(encoding="utf-8")
    assert "full cache and A-VL" in page
    assert (tmp_path / "both" / "beside.nc").is_file()
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(["report", *map(str, files), str(files[0]), "--out", str(tmp_path / "three")])
    assert done.value.code == 2
    assert "pass one, or two" in capsys.readouterr().err
