"""Relevance maps and words of patches in the report, from files that the commands write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from avl_analysis.cli.main import main
from avl_analysis.heads.patch_words import load_patch_names
from avl_analysis.relevance import METHODS
from avl_analysis.relevance.pointing import load_pointing
from avl_reports import fig_patch_words, fig_relevance
from avl_reports.further import read_further
from avl_reports.run import NotMeasured, Run
from tests.reports import made


def run_of(further: dict) -> Run:
    """A run whose recording is made up; files of another model would be refused."""
    further = {
        name: found.assign_attrs(model="made-up", model_revision="1")
        for name, found in further.items()
    }
    return Run(made.recording(), further=further)


def test_commands_write_files_and_figures_show_their_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pointing, patches = tmp_path / "pointing.nc", tmp_path / "patches.nc"
    asked = ["--scenes", "2", "--task", "colour"]
    for command, out in (("maps", pointing), ("patches", patches)):
        with pytest.raises(SystemExit) as done:
            main([command, *asked, "--out", str(out)])
        assert not done.value.code
    said = capsys.readouterr().out
    assert "relevance propagation" in said
    assert "share of an object's patches that say its name" in said
    found = read_further([f"pointing={pointing}", f"patches={patches}"])
    run = run_of(found)
    section = fig_relevance.section(run)
    *maps, lines = section.figure.panels
    assert len(maps) == len(METHODS) == 5
    held = load_pointing(pointing)
    expected = held["pointing"].mean("sample").sel(layered="raw")
    np.testing.assert_allclose(lines.lines[0].y, expected)
    assert len(section.findings) == 1
    (panel,) = fig_patch_words.section(run).figure.panels
    names = load_patch_names(patches)["own"].mean("picture").sel(kind="shape")
    np.testing.assert_allclose(panel.lines[0].y, names)


def test_what_was_not_measured_says_which_command_measures_it() -> None:
    for module, command in ((fig_relevance, "avl maps"), (fig_patch_words, "avl patches")):
        with pytest.raises(NotMeasured, match=command):
            module.section(Run(made.recording()))


def test_a_file_of_another_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("maps", "patches"):
        with pytest.raises(SystemExit) as done:
            main([command, "--out", str(tmp_path / "x.csv")])
        assert done.value.code == 2
        assert "must end in .nc" in capsys.readouterr().err
