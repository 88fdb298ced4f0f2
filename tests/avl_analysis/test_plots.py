"""Pictures from one line: what is drawn is what the recording's estimates say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from avl_analysis import plot, plot_heads
from avl_analysis.cli.main import main
from avl_analysis.errors import InputError
from avl_analysis.figures import Bars, Heat, Lines
from avl_analysis.figures.plot import SUFFIXES
from avl_analysis.recordings.recording import Recording
from avl_analysis.statistics import ALL, catalogue
from tests import tiny
from tests.avl_analysis.recorded import CASES, model, run


@pytest.fixture(scope="module")
def recording() -> Recording:
    one = model()
    recording, _ = run(one, tiny.inputs(one, **CASES["left-padded batch"]))
    return recording


def test_lines_are_the_means_over_decode_steps_with_their_intervals(recording: Recording) -> None:
    panel = plot(recording, "modality_mass").figure.panels[0]
    assert isinstance(panel, Lines)
    expected = recording.estimate("modality_mass", ("layer", "key_modality"), step=slice(1, None))
    assert [line.name for line in panel.lines] == ["system", "image", "text"]
    for line in panel.lines:
        part = expected.sel(key_modality=line.name)
        np.testing.assert_array_equal(line.y, part["mean"])
        np.testing.assert_array_equal(line.low, part["low"])


def test_two_dimensions_make_a_map_and_labels_select(recording: Recording) -> None:
    drawn = plot(recording, "modality_mass", by=("layer", "step"), key_modality="image")
    (panel,) = drawn.figure.panels
    assert isinstance(panel, Heat)
    expected = recording.estimate("modality_mass", ("layer", "step"), key_modality="image")
    np.testing.assert_array_equal(panel.values, expected["mean"])


def test_named_labels_become_bars(recording: Recording) -> None:
    panel = plot(recording, "modality_mass", by="key_modality", layer=0).figure.panels[0]
    assert isinstance(panel, Bars)
    assert panel.categories == ("system", "image", "text")


def test_heads_are_a_map_of_layers_and_heads(recording: Recording) -> None:
    panel = plot_heads(recording, "first_token_mass").figure.panels[0]
    assert isinstance(panel, Heat)
    array = recording["first_token_mass"].sel(step=slice(1, None)).mean(("sample", "step"))
    np.testing.assert_allclose(panel.values, array.transpose("layer", "head"), rtol=1e-6)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_plot_is_saved_in_every_form(recording: Recording, tmp_path: Path, suffix: str) -> None:
    drawn = plot(recording, "modality_mass")
    content = drawn.save(tmp_path / f"mass{suffix}").read_bytes()
    start = {
        ".png": b"\x89PNG",
        ".svg": b"<?xml",
        ".pdf": b"%PDF",
        ".html": b"<!doctype html>",
        ".csv": b"panel,",
    }
    assert content.startswith(start[suffix])
    if suffix == ".html":  # nothing is fetched: every script is inside the page
        assert b"<script src=" not in content
        assert b"cdn." not in content.split(b"</script>")[-1]


def test_a_notebook_shows_the_drawing_without_scripts(recording: Recording) -> None:
    shown = plot_heads(recording)._repr_html_()
    assert "data:image/svg+xml;base64," in shown
    assert "<script" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smell",), "holds no 'smell'; it holds"),
        (("modality_mass", "colour"), "by='colour': choose one or two of layer, head, step"),
        (("coverage",), "15 combinations of key_modality, tau; choose labels"),
    ],
)
def test_mistakes_are_explained(recording: Recording, arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plot(recording, *arguments)
    with pytest.raises(InputError, match="step has no label 99"):
        plot(recording, "modality_mass", step=99)
    with pytest.raises(InputError, match=r"use one of \.png"):
        plot(recording, "modality_mass").save("mass.docx")


def test_objects_say_what_they_hold_in_text_and_in_a_notebook(recording: Recording) -> None:
    assert repr(recording).startswith("<Recording of ")
    assert f"{len(recording)} sample(s), 3 layers" in repr(recording)
    shown = recording._repr_html_()
    assert "data:image/svg+xml" in shown
    assert "modality_mass" in shown
    assert "<script" not in shown


def test_every_statistic_says_what_it_is() -> None:
    entries = catalogue()
    assert {entry["name"] for entry in entries} == {statistic.name for statistic in ALL}
    assert all(entry["formula"] and entry["meaning"] and entry["source"] for entry in entries)


def test_the_command_lists_the_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["stats", "--list"])
    assert not done.value.code
    printed = capsys.readouterr().out
    assert all(statistic.name in printed for statistic in ALL)
