"""The figure of attention knock-out: what it draws, what it says, and where its file lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from avl_analysis.errors import InputError
from avl_analysis.heads.knockout import load_knockout, save_knockout
from avl_analysis.recordings.recording import load_recording
from avl_reports import fig_knockout
from avl_reports.build import build
from avl_reports.findings import Verdict
from avl_reports.further import found_in, read_further
from avl_reports.run import Run
from avl_reports.script import run_script
from tests.reports import made


def test_curves_are_the_means_over_answers_with_their_intervals() -> None:
    cut = made.knockout()
    figure = fig_knockout.section(Run(made.recording(), further={"knockout": cut})).figure
    drawn = {
        (panel.y.label, line.name): line
        for panel in figure.panels
        for line in panel.lines  # type: ignore[union-attr]
    }
    assert len(figure.panels) == 4
    for flow in cut["flow"].values:
        for label, name in (
            ("change of log-probability", "log_prob_change"),
            ("answers that stay the same", "same_answer"),
        ):
            line = drawn[label, flow]
            np.testing.assert_allclose(line.y, cut[name].sel(flow=flow).mean("sample"))
            assert line.low is not None
    assert len({line.slot for line in drawn.values()}) == 3


def test_the_finding_follows_from_the_answers_own_reading_of_the_picture() -> None:
    cut = made.knockout()
    assert fig_knockout.finding(cut).verdict is Verdict.NOT_SUPPORTED
    cut["log_prob_change"].loc[{"flow": "image -> answer"}] -= 1.0
    assert fig_knockout.finding(cut).verdict is Verdict.SUPPORTED
    assert "1.00" in fig_knockout.finding(cut).measured
    assert fig_knockout.finding(cut.isel(sample=[0, 1])).verdict is Verdict.UNDECIDED


def test_the_sentence_names_the_path_whose_cut_costs_most() -> None:
    said = fig_knockout.sentence(made.knockout())
    assert "when question tokens cannot read image tokens in layer 1: -2.0" in said


def test_a_report_keeps_the_file_and_is_drawn_again_from_it(tmp_path: Path) -> None:
    cut = made.knockout()
    build(
        made.recording(),
        tmp_path / "out",
        further={"knockout": cut},
        figures=[fig_knockout],
        formats=(),
        document=False,
    )
    again = found_in((tmp_path / "out").iterdir())["knockout"]
    np.testing.assert_array_equal(again["log_prob_change"], cut["log_prob_change"])
    recording = load_recording(tmp_path / "out" / "run.nc")
    section = fig_knockout.section(Run(recording, further={"knockout": again}))
    assert section.findings == (fig_knockout.finding(cut),)


def test_the_script_draws_it_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.recording().save(tmp_path / "run.nc")
    file = save_knockout(made.knockout(), tmp_path / "k.nc")
    run_script(
        fig_knockout.section,
        [
            str(tmp_path / "run.nc"),
            "--further",
            f"knockout={file}",
            "--out",
            str(tmp_path / "figures"),
        ],
    )
    assert "knockout.svg" in capsys.readouterr().out


def test_a_file_that_lost_a_part_is_refused(tmp_path: Path) -> None:
    for name, broken in (
        ("log_prob_change", made.knockout().drop_vars("log_prob_change")),
        ("same_answer", made.knockout().rename({"flow": "way"})),
    ):
        file = save_knockout(broken, tmp_path / f"{name}.nc")
        with pytest.raises(InputError, match="is damaged: "):
            load_knockout(file)


def test_other_names_and_other_models_are_refused(tmp_path: Path) -> None:
    file = save_knockout(made.knockout(), tmp_path / "k.nc")
    for text in (str(file), f"knock={file}"):
        with pytest.raises(InputError, match="write NAME=FILE"):
            read_further([text])
    other = load_knockout(file).assign_attrs(model_revision="2")
    with pytest.raises(InputError, match="different models"):
        Run(made.recording(), further={"knockout": other})
