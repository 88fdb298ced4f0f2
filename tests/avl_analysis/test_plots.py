"""Pictures from one line: what is drawn is what the recording's estimates say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import avl
from avl_analysis import (
    load_model,
    plot,
    plot_frontier,
    plot_heads,
    plot_overlay,
    plot_patches,
    record,
    scene_samples,
)
from avl_analysis.cli.main import main
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.errors import InputError
from avl_analysis.evaluation import frontier
from avl_analysis.figures import Bars, Heat, Lines, Overlay, Scatter
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


def test_an_overlay_is_the_recorded_score_on_the_boxes_of_the_image_tokens() -> None:
    vlm = load_model("scenes")
    many = record_samples(vlm, scene_samples(2, ["colour"]), max_new_tokens=3)
    drawn = plot_overlay(many, sample=1, step=0, layer=2)
    (panel,) = drawn.figure.panels
    assert isinstance(panel, Overlay)
    assert panel.patches is not None
    expected = many["image_score"].isel(sample=1).sel(step=0, layer=2)
    np.testing.assert_allclose(panel.patches.values, expected[: panel.patches.values.size])
    edges = many.tokens.isel(sample=1)["left"].values
    np.testing.assert_allclose(panel.patches.boxes[:, 0], edges[np.isfinite(edges)], atol=1e-6)
    assert drawn._repr_html_().startswith("<figure")
    with pytest.raises(InputError, match="layer has no label 99"):
        plot_overlay(many, layer=99)
    with pytest.raises(InputError, match="holds no 'image_score_heads'"):
        plot_overlay(many, head=1)


def test_a_wide_image_is_drawn_with_the_boxes_of_its_own_shape(tmp_path: Path) -> None:
    vlm = load_model("scenes")
    wide = Image.fromarray(np.zeros((60, 120, 3), np.uint8))
    inputs = vlm.prepare(wide, "what is it?")
    with record(vlm.model) as one:
        vlm.model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(InputError, match="keeps no image; pass the image"):
        plot_overlay(one)
    panel = plot_overlay(one, wide).figure.panels[0]
    assert panel.picture.shape == (60, 120, 3)
    assert plot_overlay(one, wide).save(tmp_path / "o.png").stat().st_size > 1000


def test_patches_show_what_the_policy_did_with_each_image_token() -> None:
    vlm = load_model("scenes")
    sample = scene_samples(1, ["colour"])[0]
    inputs = vlm.prepare([list(sample.images)], [sample.prompt])
    with avl.adaptive(vlm.model, avl.AdaptivePolicy()) as session:
        vlm.model.generate(**inputs, max_new_tokens=3)
    panel = plot_patches(session, sample.images[0], layer=1, step=1).figure.panels[0]
    counts = [int((panel.patches.values == code).sum()) for code in range(3)]
    for state in avl.State:
        if state >= 0:
            held = session.selection.images(state, 1, 1)[0]
            assert counts[int(state)] == len(held)
    with pytest.raises(InputError, match="no policy acted on layer 77"):
        plot_patches(session, sample.images[0], layer=77)


def test_a_frontier_is_drawn_from_its_file() -> None:
    filed = Path(__file__).parents[2] / "reports" / "reference" / "frontier.jsonl"
    (panel,) = plot_frontier(filed, ["ocr"]).figure.panels
    assert isinstance(panel, Scatter)
    _, lines = frontier.read(filed)
    by_name = {points.name: points for points in panel.points}
    (full,) = [x for x in lines if (x["task"], x["policy"]) == ("ocr", "full")]
    assert by_name["full"].y.tolist() == [pytest.approx(full["accuracy"], abs=1e-3)]
    assert by_name["h2o"].x.size == len({x["budget"] for x in lines if x["policy"] == "h2o"})
    with pytest.raises(InputError, match="no task 'smell'"):
        plot_frontier(filed, ["smell"])
