"""The figure of videos: what it draws is what was recorded, and it is silent without a video."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from avl_analysis.corpus.questions import moving_sample
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.errors import InputError
from avl_analysis.figures import Heat, Lines, Overlay
from avl_analysis.models.loading import load_model
from avl_analysis.recordings.recording import load_recording
from avl_analysis.scenes import moving
from avl_reports import fig_modality, fig_overlay, fig_video
from avl_reports.build import build
from avl_reports.run import NotAsked, NotMeasured, Run, load_run
from tests.avl_analysis.models import folders
from tests.avl_analysis.shared import questions, vlm
from tests.reports import made

FRAMES = 4


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Videos shown as pictures, through a file."""
    samples = [moving_sample(moving(3, index, FRAMES)) for index in range(2)]
    recorded = record_samples(vlm(layers=3, grid=12), samples, max_new_tokens=4)
    return load_recording(recorded.save(tmp_path_factory.mktemp("run") / "run.nc"))


def test_every_frame_is_drawn_with_its_own_attention_and_its_own_box(recording):
    figure = fig_video.section(Run(recording)).figure
    overlays = [panel for panel in figure.panels if isinstance(panel, Overlay)]
    scene = moving(3, 0, FRAMES)
    assert len(overlays) == FRAMES
    mass = recording["frame_mass"].sum("frame").mean(("sample", "step"))
    layer = int(mass["layer"][int(np.argmax(mass.values))])
    scores = recording["image_score"].isel(sample=0, step=0).sel(layer=layer).values
    per_frame = scores.reshape(FRAMES, -1)
    for number, panel in enumerate(overlays):
        np.testing.assert_allclose(
            panel.patches.values, per_frame[number] / scores.sum(), rtol=1e-5
        )
        assert np.array_equal(panel.picture, scene.frames[number])
        (box,) = panel.boxes
        assert (box.left, box.top, box.right, box.bottom) == scene.boxes[number]
    assert len({panel.value.limits for panel in overlays}) == 1


def test_the_strip_over_time_is_the_mass_of_each_frame_by_word(recording):
    figure = fig_video.section(Run(recording)).figure
    (strip,) = [panel for panel in figure.panels if isinstance(panel, Heat)]
    mass = recording["frame_mass"].isel(sample=0)
    rows = [mass.isel(layer=layer).transpose("step", "frame").values for layer in range(3)]
    assert any(np.allclose(strip.values, row[: len(strip.values)]) for row in rows)
    by_layer, cores = (panel for panel in figure.panels if isinstance(panel, Lines))
    shown = recording["frame_mass"].mean(("sample", "step"))
    for line, layer in zip(by_layer.lines, (0, 1, 2), strict=True):
        np.testing.assert_allclose(line.y, shown.sel(layer=layer).values)
    assert [line.x.tolist() for line in cores.lines] == [[1.0, 2.0, 3.0]] * 4


def test_tokens_under_the_moving_shape_are_those_of_each_frames_own_box(recording):
    scene, tokens = moving(3, 0, FRAMES), recording.tokens.isel(sample=0)
    of_image = np.flatnonzero(tokens["image"].values >= 0)
    expected = []
    for number, position in enumerate(of_image):
        left, top, right, bottom = scene.boxes[int(tokens["frame"].values[position])]
        names = ("left", "top", "right", "bottom")
        edges = [round(96 * float(tokens[name].values[position])) for name in names]
        wide = min(edges[2], right) - max(edges[0], left)
        high = min(edges[3], bottom) - max(edges[1], top)
        if wide > 0 and high > 0 and wide * high >= 8 * 8 / 2:  # at least half of the token
            expected.append(number)
    assert recording.facts(0)["region_tokens"] == expected
    assert expected


def test_groups_of_frames_show_their_first_frame(tmp_path):
    model = load_model(folders.save_folder(tmp_path, "qwen2_vl"))
    recorded = record_samples(model, [moving_sample(moving(3, 1, 5))], max_new_tokens=2)
    section = fig_video.section(Run(recorded))
    overlays = [panel for panel in section.figure.panels if isinstance(panel, Overlay)]
    scene = moving(3, 1, 5)
    assert [
        next(i for i in range(5) if np.array_equal(panel.picture, scene.frames[i]))
        for panel in overlays
    ] == [0, 2, 4]
    assert "one token of a patch in 2 frames" in section.figure.caption.text


def test_a_report_without_a_video_leaves_the_figure_out_without_a_word(tmp_path):
    plain = record_samples(vlm(), questions(2), max_new_tokens=3)
    with pytest.raises(NotAsked):
        fig_video.section(Run(plain))
    with pytest.raises(NotAsked):
        fig_video.section(Run(made.recording()))
    built = build(
        plain, tmp_path, figures=(fig_modality, fig_video), formats=("svg",), document=False
    )
    assert (len(built.sections), built.missing) == (1, {})


def test_a_report_of_videos_is_built_from_its_file(recording, tmp_path: Path):
    built = build(
        recording,
        tmp_path / "report",
        figures=(fig_video, fig_overlay),
        formats=("svg",),
        document=False,
    )
    assert (tmp_path / "report/figures/video.svg").is_file()
    page = built.page.read_text()
    assert "Where and when does the model look" in page
    # frames stand in a grid of pictures, the strip and the curves in one of charts
    assert re.findall('class="panels (pictures|charts)"', page) == ["pictures", "charts"]
    assert "samples show videos" in built.missing["fig_overlay"]
    assert len(load_run(built.folder / "run.nc").examples[0].frames) == FRAMES


def test_videos_without_measured_attention_say_so(recording):
    mass = recording["frame_mass"]
    known = mass.where(mass["layer"] != 0)
    assert fig_video._layer({"frame_mass": known}) in (1, 2)
    with pytest.raises(NotMeasured, match="no layer has a value of frame_mass"):
        fig_video._layer({"frame_mass": mass * np.nan})


def test_boxes_that_are_not_one_for_every_frame_are_refused():
    from dataclasses import replace

    sample = moving_sample(moving(3, 0, FRAMES))
    wrong = replace(sample, regions=sample.regions[:2])
    with pytest.raises(InputError, match="one box for every frame"):
        record_samples(vlm(), [wrong], max_new_tokens=2)
