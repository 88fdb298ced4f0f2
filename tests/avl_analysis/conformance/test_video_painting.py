"""One region of one frame is painted: the tokens that change under `generate` are those recorded
there and then.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from avl import video_grids
from avl.views import View
from avl_analysis.conformance.build import Case
from avl_analysis.conformance.painting import silenced
from avl_analysis.conformance.recording import Mismatch
from avl_analysis.conformance.video_painting import PROCESSORS, check_video, paint_video
from avl_analysis.models.loading import load_model
from avl_analysis.models.videos import Video
from tests.avl_analysis.models import folders

FAMILIES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "llava_onevision",
    "llava_next_video",
    "internvl",
    "smolvlm",
)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_painting_a_region_of_a_frame_changes_the_tokens_recorded_there_and_then(
    model_type: str, tmp_path: Path
) -> None:
    """By the path of a user: a model folder, `prepare` with a video, `generate`."""
    vlm = load_model(folders.save_folder(tmp_path, model_type))
    model = silenced(vlm.model)
    vlm = replace(vlm, model=model)

    def prepare(frames: np.ndarray) -> dict:
        return dict(vlm.prepare(Video(list(frames)), "what is red?"))

    group = vlm.processor.video_processor.temporal_patch_size or 1
    found = paint_video(model, prepare, group)
    assert found.wrong == 0
    assert found.inside >= 3
    assert found.outside > 3 * found.inside


@pytest.mark.parametrize("model_type", ["llava_next", "llava_onevision"])
def test_frames_shown_as_pictures_to_a_processor_without_a_video_part_are_placed_too(
    model_type: str, tmp_path: Path
) -> None:
    vlm = load_model(folders.save_folder(tmp_path, model_type))
    vlm.processor.video_processor = None
    vlm = replace(vlm, model=silenced(vlm.model))
    found = paint_video(
        vlm.model, lambda frames: dict(vlm.prepare(Video(list(frames)), "what is red?")), 1
    )
    assert found.wrong == 0
    assert found.inside >= 3


@pytest.mark.parametrize("model_type", sorted(PROCESSORS))
def test_the_conformance_check_confirms_time_and_place_of_every_family_it_names(
    model_type: str,
) -> None:
    found = check_video(Case(model_type))
    assert found.wrong == 0
    assert found.inside >= 3


def test_frames_in_another_order_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(prompt):
        for views in video_grids.video_grid(prompt):
            yield tuple(replace(view, frame=len(views) - 1 - view.frame) for view in views)

    monkeypatch.setitem(video_grids.VIDEOS, "qwen2_vl", backwards)
    assert check_video(Case("qwen2_vl")).wrong > 0


def test_a_video_recorded_as_one_picture_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_picture(prompt):
        yield (View(1, prompt.tokens),)

    monkeypatch.setitem(video_grids.VIDEOS, "qwen2_vl", one_picture)
    with pytest.raises(Mismatch, match="was recorded with frames"):
        check_video(Case("qwen2_vl"))
