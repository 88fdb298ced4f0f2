"""Where in its image every token lies, as it is recorded while `generate` runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

from avl.places import remember_originals
from avl_analysis.capture.recorder import record
from avl_analysis.capture.replay import replay
from avl_analysis.conformance.build import Case, picture
from avl_analysis.conformance.inputs import prompt
from avl_analysis.models.loading import VLM, load_model
from avl_analysis.recordings.join_files import join
from avl_analysis.recordings.recording import load_recording, merge
from avl_analysis.recordings.schema import EDGES
from tests import tiny
from tests.avl_analysis.models.folders import KINDS, save_folder

HAS_ALL_PROCESSORS = Version(transformers.__version__) >= Version("5.23")


def generated(case, size):
    """Token variables of the image tokens of one recorded answer about an image of this size."""
    try:
        case.processor  # noqa: B018
    except LookupError as missing:  # some processors of older versions ask for torchvision
        if HAS_ALL_PROCESSORS:
            raise
        pytest.skip(str(missing))
    with record(case.model, statistics=["modality_mass"]) as recording:
        case.model.generate(**case.asking(picture(*size)), max_new_tokens=2, do_sample=False)
    tokens = recording.tokens.isel(sample=0)
    return tokens.isel(position=tokens["image"].values >= 0)


def loaded(model):
    return VLM("tiny", model, tiny.processor(model), "", None, "")


def boxes(tokens):
    return np.stack([tokens[edge].values for edge in EDGES], 1)


def cells(rows, columns, left=0.0, top=0.0, right=1.0, bottom=1.0):
    """Boxes of a grid over a part of an image, in raster order."""
    wide, high = (right - left) / columns, (bottom - top) / rows
    return [
        (left + c * wide, top + r * high, left + (c + 1) * wide, top + (r + 1) * high)
        for r in range(rows)
        for c in range(columns)
    ]


def test_the_tokens_of_llava_lie_in_the_centre_square_of_a_wide_image():
    model = tiny.llava(grid=4)
    vlm = loaded(model)
    crops = vlm.processor.image_processor
    crops.do_center_crop, crops.size = True, {"shortest_edge": crops.size["height"]}
    inputs = vlm.prepare(picture(80, 40), "what is red")
    with record(model, statistics=["modality_mass"]) as recording:
        model.generate(**inputs, max_new_tokens=3)
    tokens = recording.tokens.isel(sample=0)
    image = tokens["image"].values >= 0
    assert np.allclose(boxes(tokens)[image], cells(4, 4, 0.25, 0.0, 0.75, 1.0), atol=1e-6)
    assert np.isnan(boxes(tokens)[~image]).all()
    assert set(tokens["tile"].values[image]) == {0}
    assert set(tokens["tile"].values[~image]) == {-1}


def test_boxes_of_llava_are_unknown_where_nobody_tells_the_size_of_the_image():
    model = tiny.llava(grid=4)
    with record(model, statistics=["modality_mass"]) as recording:
        model.generate(**tiny.inputs(model), max_new_tokens=2)
    assert np.isnan(boxes(recording.tokens.isel(sample=0))).all()
    assert int(recording.tokens["row"].max()) == 3


def test_tokens_of_qwen_lie_in_a_grid_of_the_shape_of_the_image():
    tokens = generated(Case("qwen2_5_vl"), (96, 24))
    rows, columns = int(tokens["row"].max()) + 1, int(tokens["column"].max()) + 1
    assert columns > rows
    assert rows * columns == tokens.sizes["position"]
    assert np.allclose(boxes(tokens), cells(rows, columns), atol=1e-6)


def test_a_square_number_of_qwen_tokens_is_not_taken_for_a_square_grid():
    case = Case("qwen2_vl")
    shown = {"pixel_values": torch.randn(64, 3 * 2 * 4 * 4), "image_grid_thw": [[1, 4, 16]]}
    shown["image_grid_thw"] = torch.tensor(shown["image_grid_thw"])
    with record(case.model, statistics=["spatial_entropy"]) as recording:
        case.model.generate(**prompt(case.model, shown), max_new_tokens=2, do_sample=False)
    assert (int(recording.tokens["row"].max()), int(recording.tokens["column"].max())) == (1, 7)


def test_llava_next_has_a_view_of_the_whole_image_then_tiles_with_newlines_without_a_place():
    tokens = generated(Case("llava_next"), (96, 48))
    tile, has_box = tokens["tile"].values, ~np.isnan(tokens["left"].values)
    base = tile == 0
    assert base.argmin() == base.sum()  # the whole image first
    side = int(base.sum() ** 0.5)
    assert np.allclose(boxes(tokens)[base], cells(side, side), atol=1e-6)
    rows = int(tokens["row"].max()) + 1
    newlines = (tile == 1) & ~has_box
    assert newlines.sum() == rows
    assert np.allclose(boxes(tokens)[(tile == 1) & has_box][-1, 2:], (1.0, 1.0), atol=0.05)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava", "llava_next"])
def test_every_one_of_several_sampled_answers_has_the_places_of_its_image(model_type):
    case = Case(model_type)
    first, second = (case.asking(picture(*size)) for size in ((96, 24), (96, 24)))
    inputs = {name: torch.cat([first[name], second[name]]) for name in first}
    remember_originals(inputs, [[(96, 24)]] * 2, case.processor)
    with record(case.model, statistics=["modality_mass"]) as recording:
        case.model.generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=3)
    expected = generated(case, (96, 24))
    assert len(recording) == 6
    for sample in range(6):
        tokens = recording.tokens.isel(sample=sample)
        found = tokens.isel(position=tokens["image"].values >= 0)
        for name in ("row", "column", "tile"):
            assert np.array_equal(found[name], expected[name])
        if HAS_ALL_PROCESSORS:  # older versions copy the pixels, whose size is then not known
            assert np.array_equal(boxes(found), boxes(expected), equal_nan=True)


def test_a_class_token_has_no_place():
    case = Case("llava")
    case.config.vision_feature_select_strategy = "full"
    tokens = generated(case, (40, 40))
    assert np.isnan(boxes(tokens)[0]).all()
    side = int((tokens.sizes["position"] - 1) ** 0.5)
    assert np.allclose(boxes(tokens)[1:], cells(side, side), atol=1e-6)


@pytest.mark.parametrize("model_type", ["internvl", "smolvlm"])
def test_tiles_cover_the_image_once_and_the_view_of_the_whole_image_covers_it_again(model_type):
    tokens = generated(Case(model_type), (96, 48))
    box, tile = boxes(tokens), tokens["tile"].values
    assert tile.max() >= 2
    assert tile[-1] == 0
    for chosen in (tile == 0, tile > 0):
        left, top, right, bottom = box[chosen].T
        assert ((right - left) * (bottom - top)).sum() == pytest.approx(1.0, abs=1e-4)
    first = box[tile == 1]
    assert tuple(first[0, :2]) == (0.0, 0.0)
    assert first[:, 2].max() < 1.0


def test_break_tokens_of_pixtral_are_text_and_its_rows_fill_the_image():
    tokens = generated(Case("mistral3"), (48, 24))
    rows, columns = int(tokens["row"].max()) + 1, int(tokens["column"].max()) + 1
    assert np.allclose(boxes(tokens), cells(rows, columns), atol=1e-6)


@pytest.mark.skipif(not HAS_ALL_PROCESSORS, reason="older versions need torchvision for these")
@pytest.mark.parametrize("model_type", [kind for kind in KINDS if kind != "mistral3"])
def test_images_of_a_batch_have_places_in_every_family_loaded_from_a_folder(model_type, tmp_path):
    vlm = load_model(save_folder(tmp_path, model_type))
    sizes = [(96, 48), (40, 80)]
    inputs = vlm.prepare([picture(*size) for size in sizes], ["what is red"] * 2)
    with record(vlm.model, statistics=["modality_mass"]) as recording:
        vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=None)
    for sample in range(2):
        tokens = recording.tokens.isel(sample=sample)
        box, tile = boxes(tokens), tokens["tile"].values
        left, top, right, bottom = box[tile > 0 if tile.max() > 0 else tile == 0].T
        assert np.nanmin(left) == pytest.approx(0.0, abs=0.1)
        assert np.nanmax(right) == pytest.approx(1.0, abs=0.1)
        assert np.nanmax(bottom) == pytest.approx(1.0, abs=0.1)
        assert np.nansum((right - left) * (bottom - top)) == pytest.approx(1.0, abs=0.15)


@pytest.fixture
def two_recordings():
    model = tiny.llava(grid=3)
    vlm = loaded(model)
    recordings = []
    for first, sizes in enumerate([[(60, 30)], [(30, 60), (40, 40)]]):
        with record(model, statistics=["modality_mass"], first_sample=first) as recording:
            inputs = vlm.prepare([picture(*size) for size in sizes], "what is red")
            model.generate(**inputs, max_new_tokens=2)
        recordings.append(recording)
    return recordings


def test_boxes_survive_saving_loading_merging_and_joining(two_recordings, tmp_path):
    files = [
        recording.save(tmp_path / f"{index}.nc") for index, recording in enumerate(two_recordings)
    ]
    join(files, tmp_path / "joined.nc", {})
    for together in (
        merge([load_recording(file) for file in files]),
        load_recording(tmp_path / "joined.nc"),
    ):
        for index, alone in enumerate(two_recordings):
            for name in ("tile", *EDGES):
                expected = alone.tokens[name].isel(sample=0).values
                found = together.tokens[name].isel(sample=index).values
                assert np.array_equal(found[: len(expected)], expected, equal_nan=True)
                filler = found[len(expected) :]
                assert (np.isnan(filler) if name != "tile" else filler == -1).all()


def test_replayed_recordings_have_the_same_boxes():
    model = tiny.llava(grid=3)
    vlm = loaded(model)
    with record(model, keep="attention") as live:
        model.generate(**vlm.prepare(picture(60, 30), "what is red"), max_new_tokens=3)
    again = replay(live)
    for name in ("tile", *EDGES):
        assert np.array_equal(again.tokens[name], live.tokens[name], equal_nan=True)
