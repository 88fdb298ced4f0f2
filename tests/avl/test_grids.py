"""Views, rows, columns and boxes of pictures, in numbers one can check by eye."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from avl import grids
from avl.families import describe
from avl.grids import UNKNOWN, VIDEO, describe_rows
from avl.places import Originals, map_pictures
from avl.tokens import token_layout
from avl.views import View, count, nowhere
from tests import tiny

IMAGE = 9


def config(**fields):
    vision = {
        name.removeprefix("vision_"): fields.pop(name)
        for name in list(fields)
        if name.startswith("vision_")
    }
    return SimpleNamespace(vision_config=SimpleNamespace(**vision), **fields)


def describe_one(name, config, ids, sizes=None, processor=None, **inputs):
    """Pictures of one row of ids, and the note."""
    runs = []
    for at, here in enumerate(ids):
        if here == IMAGE:
            start = runs.pop()[0] if runs and sum(runs[-1]) == at else at
            runs.append((start, at + 1 - start))
    originals = None if sizes is None else Originals((tuple(sizes),), processor)
    (row,), note = describe_rows(name, config, [ids], [runs], inputs, originals)
    return row, note


# -- views -----------------------------------------------------------------------------------------


def test_a_view_numbers_its_tokens_in_raster_order_with_breaks_between_rows():
    view = View(2, 3, before=1, breaks=1, after=2)
    assert view.count == 1 + 2 * 4 + 2
    none = (-1, -1)
    assert view.places() == [
        none,
        (0, 0),
        (0, 1),
        (0, 2),
        none,
        (1, 0),
        (1, 1),
        (1, 2),
        none,
        none,
        none,
    ]


def test_a_view_shares_its_box_out_among_its_cells():
    boxes = View(2, 2, (0.0, 0.5, 1.0, 1.0)).boxes()
    assert boxes == [
        (0.0, 0.5, 0.5, 0.75),
        (0.5, 0.5, 1.0, 0.75),
        (0.0, 0.75, 0.5, 1.0),
        (0.5, 0.75, 1.0, 1.0),
    ]


def test_boxes_come_in_pixels_end_at_the_border_and_are_nan_without_a_place():
    picture = (View(1, 2, (-0.5, 0.0, 1.0, 1.0), breaks=1),)
    layout = token_layout(
        torch.tensor([[1, IMAGE, IMAGE, IMAGE, 2]]), [IMAGE], pictures=[[picture]]
    )
    found = map_pictures(layout, [[picture]], [[(200, 100)]], "")
    assert found.boxes[0, 1].tolist() == [
        0.0,
        0.0,
        50.0,
        100.0,
    ]  # reaches 100 pixels over the left border
    assert found.boxes[0, 2].tolist() == [50.0, 0.0, 200.0, 100.0]
    assert found.boxes[0, [0, 3, 4]].isnan().all()
    assert found.tile[0].tolist() == [-1, 0, 0, 0, -1]


def test_other_pictures_than_the_prompt_shows_are_refused():
    layout = token_layout(torch.tensor([[IMAGE]]), [IMAGE])
    with pytest.raises(ValueError, match=r"shows 1 pictures, but 2 picture sizes"):
        map_pictures(layout, [[(View(1, 1),)]], [[(10, 10), (10, 10)]], "")


# -- families --------------------------------------------------------------------------------------


def test_llava_sees_the_centre_square_of_a_picture():
    cfg = config(vision_image_size=28, vision_patch_size=14)
    (picture,), note = describe_one("llava", cfg, [1, *[IMAGE] * 4, 2], sizes=[(400, 200)])
    assert note == ""
    assert picture == (View(2, 2, (0.25, 0.0, 0.75, 1.0)),)
    (unknown,), _ = describe_one("llava", cfg, [1, *[IMAGE] * 4, 2])
    assert unknown == (View(2, 2, None),)  # the grid is known without the size, the crop is not


def test_llava_with_a_processor_that_pads_sees_the_whole_picture_in_a_square():
    cfg = config(vision_image_size=28, vision_patch_size=14)
    (picture,), _ = describe_one(
        "llava", cfg, [IMAGE] * 4, [(100, 200)], SimpleNamespace(do_pad=True)
    )
    assert picture == (View(2, 2, (-0.5, 0.0, 1.5, 1.0)),)


def test_llava_next_lays_a_base_grid_and_unpadded_tiles_with_newlines():
    cfg = config(
        vision_image_size=28,
        vision_patch_size=14,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    # 80 x 40 pixels fit the canvas 28 x 56 exactly: two tiles side by side, nothing padded, nothing
    # cut
    tokens = 4 + 2 * (4 + 1)
    (picture,), _ = describe_one(
        "llava_next", cfg, [IMAGE] * tokens, image_sizes=torch.tensor([[40, 80]])
    )
    assert picture == (View(2, 2, origin=None), View(2, 4, (0.0, 0.0, 1.0, 1.0), tile=1, breaks=1))


def test_llava_next_cuts_padding_by_whole_rows():
    cfg = config(vision_image_size=56, vision_patch_size=14, image_grid_pinpoints=[[112, 112]])
    # 100 x 25 pixels become 112 x 28 in a canvas of 112 x 112, 42 rows of padding above: 3 of 8
    # rows of cells are cut
    tokens = 16 + 2 * (8 + 1)
    (picture,), _ = describe_one(
        "llava_next", cfg, [IMAGE] * tokens, image_sizes=torch.tensor([[25, 100]])
    )
    assert picture[1] == View(2, 8, (0.0, 0.0, 1.0, 1.0), tile=1, breaks=1)


def test_llava_onevision_gives_pictures_of_one_prompt_no_tiles():
    cfg = config(vision_image_size=28, vision_patch_size=14, image_grid_pinpoints=[[56, 56]])
    ids = [*[IMAGE] * 5, 1, *[IMAGE] * 5]
    sizes, together = torch.tensor([[30, 60], [20, 20]]), torch.tensor([2])
    pictures, _ = describe_one(
        "llava_onevision", cfg, ids, image_sizes=sizes, batch_num_images=together
    )
    assert pictures == [
        (View(2, 2, (0.0, -0.5, 1.0, 1.5), after=1),),
        (View(2, 2, (0.0, 0.0, 1.0, 1.0), after=1),),
    ]


def test_grids_are_taken_in_order_by_the_rows_of_a_batch():
    cfg = config(vision_spatial_merge_size=2)
    grids = torch.tensor([[1, 4, 6], [1, 2, 2], [1, 2, 8]])
    rows = [[*[IMAGE] * 6, 1, IMAGE], [*[IMAGE] * 4, 2, 2, 2, 2]]
    found, _ = describe_rows(
        "qwen2_vl", cfg, rows, [[(0, 6), (7, 1)], [(0, 4)]], {"image_grid_thw": grids}
    )
    assert found == [[(View(2, 3),), (View(1, 1),)], [(View(1, 4),)]]


VIDEO_ID = 8


VIDEO_CONFIG = config(vision_spatial_merge_size=1, image_token_id=IMAGE, video_token_id=VIDEO_ID)


def test_where_tokens_of_a_video_lie_is_not_known_in_a_family_that_nobody_described():
    found, note = describe_rows(
        "something_new",
        VIDEO_CONFIG,
        [[1, *[VIDEO_ID] * 16, 2]],
        [[(1, 16)]],
        {"video_grid_thw": torch.tensor([[4, 2, 2]])},
    )
    assert (found, note) == ([[nowhere(16)]], VIDEO)


def test_a_video_without_its_grid_has_no_places():
    rows = [[1, *[VIDEO_ID] * 16, 2]]
    found, note = describe_rows("qwen2_vl", VIDEO_CONFIG, rows, [[(1, 16)]], {})
    assert (found, note) == ([[nowhere(16)]], VIDEO)


def frames(count, rows, columns, **more):
    return tuple(View(rows, columns, frame=frame, **more) for frame in range(count))


@pytest.mark.parametrize("runs", [[(1, 16)], [(1, 4), (7, 4), (13, 4), (19, 4)]])
def test_qwen_lays_a_video_out_as_groups_of_frames_with_or_without_text_between(runs):
    ids = [1] * 24
    for start, length in runs:
        ids[start : start + length] = [VIDEO_ID] * length
    grids = {"video_grid_thw": torch.tensor([[4, 2, 2]])}
    for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        found, note = describe_rows(name, VIDEO_CONFIG, [ids], [runs], grids)
        assert (found, note) == ([[frames(4, 2, 2)]], "")


def test_pictures_and_videos_of_one_prompt_each_take_their_own_grids():
    rows = [[*[IMAGE] * 4, 1, *[VIDEO_ID] * 4, 2, *[IMAGE] * 3]]
    given = {
        "image_grid_thw": torch.tensor([[1, 1, 4], [1, 3, 1]]),
        "video_grid_thw": torch.tensor([[2, 1, 2]]),
    }
    runs = [[(0, 4), (5, 4), (10, 3)]]
    found, note = describe_rows("qwen2_vl", VIDEO_CONFIG, rows, runs, given)
    assert (found, note) == ([[(View(1, 4),), frames(2, 1, 2), (View(3, 1),)]], "")


def test_sizes_go_to_the_pictures_and_videos_they_are_of():
    """A wide picture between two high videos: only the crops of the right sizes fit."""
    cfg = config(
        vision_image_size=8,
        vision_patch_size=2,
        spatial_pool_stride=2,
        image_grid_pinpoints=[[8, 8]],
        image_token_id=IMAGE,
        video_token_id=VIDEO_ID,
    )
    rows = [[*[VIDEO_ID] * 8, *[IMAGE] * 28, *[VIDEO_ID] * 4]]
    given = {"pixel_values_videos": torch.zeros(1, 2, 3, 8, 8), "image_sizes": [[8, 16]]}
    originals = Originals((((10, 20), (16, 8), (20, 10)),), None, ((2, 0, 1),))
    runs = [[(0, 8), (8, 28), (36, 4)]]
    (row,), _ = describe_rows("llava_next_video", cfg, rows, runs, given, originals)
    assert row[0] == frames(2, 2, 2, box=(0.0, 0.25, 1.0, 0.75))
    assert row[2] == nowhere(4)  # the inputs hold one video only


def test_onevision_pools_frames_and_ends_a_video_with_a_newline_that_has_no_frame():
    cfg = config(
        vision_image_size=15, vision_patch_size=5, image_token_id=IMAGE, video_token_id=VIDEO_ID
    )
    rows, runs = [[*[VIDEO_ID] * 13, 2]], [[(0, 13)]]
    given = {"pixel_values_videos": torch.zeros(1, 3, 3, 15, 15)}
    ((video,),), note = describe_rows("llava_onevision", cfg, rows, runs, given)
    assert note == ""
    laid_out = token_layout(torch.tensor(rows), [VIDEO_ID], pictures=[[video]])
    assert laid_out.frame[0].tolist() == [*[0] * 4, *[1] * 4, *[2] * 4, -1, -1]
    assert laid_out.row[0].tolist() == [*[0, 0, 1, 1] * 3, -1, -1]


def test_pictures_that_are_the_frames_of_a_video_become_one_with_a_time_axis():
    cfg = config(vision_image_size=28, vision_patch_size=14)
    ids = [*[IMAGE] * 4, 1, *[IMAGE] * 4, 1, *[IMAGE] * 4]
    runs = [[(0, 4), (5, 4), (10, 4)]]
    originals = Originals((((400, 400), (200, 200)),), None, ((0, 2),))
    (row,), note = describe_rows("llava", cfg, [ids], runs, {}, originals)
    assert (row, note) == ([(View(2, 2),), frames(2, 2, 2)], "")


def test_frames_that_do_not_add_up_to_the_pictures_of_a_prompt_stay_pictures():
    cfg = config(vision_image_size=28, vision_patch_size=14)
    ids = [*[IMAGE] * 4, 1, *[IMAGE] * 4]
    originals = Originals((((400, 400),),), None, ((3,),))
    (row,), _ = describe_rows("llava", cfg, [ids], [[(0, 4), (5, 4)]], {}, originals)
    assert [view.frame for picture in row for view in picture] == [-1, -1]
    assert [view.box for picture in row for view in picture] == [None, None]


def test_sizes_of_other_pictures_than_a_row_shows_give_no_boxes():
    cfg = config(vision_image_size=28, vision_patch_size=14)
    pictures, _ = describe_one("llava", cfg, [*[IMAGE] * 4, 1, *[IMAGE] * 4], sizes=[(400, 200)])
    assert pictures == [(View(2, 2, None),)] * 2


def test_rows_of_pixtral_belong_to_one_picture_across_break_tokens():
    cfg = config(vision_patch_size=16, spatial_merge_size=2)
    ids = [*[IMAGE] * 3, 7, *[IMAGE] * 3, 8]
    (picture,), _ = describe_one("mistral3", cfg, ids, image_sizes=torch.tensor([[64, 96]]))
    assert picture == (View(2, 3),)


def test_internvl_tiles_follow_from_the_size_of_the_picture():
    cfg = config(vision_image_size=[56, 56], vision_patch_size=[14, 14], downsample_ratio=0.5)
    ids = [IMAGE] * (3 * 4)
    (picture,), _ = describe_one("internvl", cfg, ids, sizes=[(120, 60)])
    left, right, whole = picture
    assert (left.box, left.origin, left.tile) == ((0.0, 0.0, 0.5, 1.0), (0, 0), 1)
    assert (right.box, right.origin, right.tile) == ((0.5, 0.0, 1.0, 1.0), (0, 2), 2)
    assert (whole.box, whole.origin, whole.tile) == ((0.0, 0.0, 1.0, 1.0), None, 0)
    assert describe_one("internvl", cfg, ids)[0] == [
        nowhere(12)
    ]  # two tiles, but in which direction?


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (1, 4), (3, 1)])
def test_idefics3_tiles_are_found_by_the_tokens_between_them(rows, columns):
    cfg = config(vision_image_size=28, vision_patch_size=7, scale_factor=2)
    view, fake, newline, whole = [IMAGE] * 4, 20, 21, 22
    ids = []
    for row in range(rows):
        ids += [i for column in range(columns) for i in (fake, 30 + 6 * row + column, *view)] + [
            newline
        ]
    ids += [fake, whole, *view, fake, 5, 6, fake, whole, *view, fake]  # and a second, small picture
    (first, second), _ = describe_one("idefics3", cfg, ids)
    assert len(first) == rows * columns + 1
    assert [v.tile for v in first] == [*range(1, rows * columns + 1), 0]
    assert first[-2].origin == (2 * (rows - 1), 2 * (columns - 1))
    assert first[-2].box == pytest.approx(((columns - 1) / columns, (rows - 1) / rows, 1.0, 1.0))
    assert second == (View(2, 2),)


def squares(name, ids, pixels):
    return describe_one(name, config(), ids, pixel_values=torch.zeros(pixels, 3, 8, 8))


def test_a_family_nobody_knows_gets_no_places_even_if_its_tokens_make_a_square():
    pictures, note = squares("something_new", [1, *[IMAGE] * 9, 2, 2, 2, *[IMAGE] * 7], 2)
    assert (pictures, note) == ([nowhere(9), nowhere(7)], UNKNOWN)


def test_a_family_known_for_squares_gets_them_where_every_run_is_one_picture():
    ids = [1, *[IMAGE] * 9, 2, 2, 2, *[IMAGE] * 7]
    assert squares("aya_vision", ids, 2) == ([(View(3, 3),), nowhere(7)], "")
    assert squares("fast_vlm", ids, 2)[0][0] == (View(3, 3, None),)  # what is kept is not known
    close = [1, *[IMAGE] * 9, 2, *[IMAGE] * 9, 3]
    for ids, pixels in (([IMAGE] * 36, 4), (close, 2), ([IMAGE] * 9, 0)):
        assert squares("aya_vision", ids, pixels)[1] == UNKNOWN
    assert describe_one("aya_vision", config(), [IMAGE] * 9)[1] == UNKNOWN  # no pixels were seen


def test_the_example_of_adding_a_family_lays_out_a_picture(monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "adding-a-family.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    names = dict(vars(grids))
    exec(code, names)
    monkeypatch.setitem(grids.GRIDS, "my_family", names["my_family"])
    cfg = config(vision_image_size=28, vision_patch_size=14)
    (picture,), note = describe_one("my_family", cfg, [IMAGE] * (4 + 2 * 2 * 3))
    assert note == ""
    assert [view.count for view in picture] == [4, 6, 6]
    assert picture[2].places()[:3] == [(0, 2), (0, 3), (-1, -1)]


def test_query_tokens_have_no_place():
    (picture,), _ = describe_one("blip-2", config(), [IMAGE] * 64)
    assert picture == nowhere(64)


def test_inputs_that_do_not_add_up_leave_places_unknown():
    cfg = config(vision_spatial_merge_size=2)
    pictures, note = describe_one(
        "qwen2_vl", cfg, [IMAGE] * 5, image_grid_thw=torch.tensor([[1, 4, 4]])
    )
    assert (pictures, note) == ([nowhere(5)], UNKNOWN)


# -- through a model -------------------------------------------------------------------------------


def test_a_picture_map_of_a_padded_batch_puts_every_picture_where_its_tokens_are():
    model = tiny.llava(grid=2)
    inputs = tiny.inputs(model, batch=[4, 6], images=[2, 1], between=2)
    family = describe(model)
    layout = family.layout(inputs["input_ids"], inputs["attention_mask"], inputs)
    found = family.picture_map(layout, inputs, [[(10, 10), (40, 20)], [(8, 8)]])
    assert found.boxes[0, layout.image[0] == 1].tolist() == [
        [10.0, 0.0, 20.0, 10.0],
        [20.0, 0.0, 30.0, 10.0],
        [10.0, 10.0, 20.0, 20.0],
        [20.0, 10.0, 30.0, 20.0],
    ]
    assert found.boxes[1, layout.image[1] == 0].amax() == 8.0
    assert found.boxes[layout.image < 0].isnan().all()


def test_a_picture_map_needs_the_ids():
    model = tiny.llava(grid=2)
    inputs = tiny.inputs(model)
    family = describe(model)
    layout = family.layout(inputs["input_ids"], None, inputs)
    with pytest.raises(ValueError, match="must contain input_ids"):
        family.picture_map(layout, {}, [[(8, 8)]])


def test_places_of_a_layout_are_those_of_the_finest_grid():
    cfg = config(vision_image_size=28, vision_patch_size=14, image_grid_pinpoints=[[28, 56]])
    (picture,), _ = describe_one(
        "llava_next", cfg, [IMAGE] * 14, image_sizes=torch.tensor([[40, 80]])
    )
    places = [place for view in picture for place in view.places()]
    assert len(places) == count(picture) == 14
    assert places[:4] == [(-1, -1)] * 4
    assert places[4:9] == [(0, 0), (0, 1), (0, 2), (0, 3), (-1, -1)]
