"""The token layout on prompts whose answer one can read off."""

from __future__ import annotations

import pytest
import torch

from avl.places import token_boxes, token_tiles
from avl.tokens import MODALITIES, Modality, token_layout
from avl.views import View, nowhere

IMG = 5


def layout(rows, mask=None, **options):
    return token_layout(
        torch.tensor(rows),
        [IMG],
        attention_mask=None if mask is None else torch.tensor(mask),
        **options,
    )


def names(laid_out, row=0):
    return "".join({-1: "-", 0: "s", 1: "i", 2: "t"}[int(code)] for code in laid_out.modality[row])


def test_system_is_before_the_first_image_and_text_is_everything_else_after_it():
    assert names(layout([[7, 8, IMG, IMG, 9, IMG, 10, 11]])) == "ssiititt"
    assert MODALITIES == ("system", "image", "text")


def test_a_prompt_without_an_image_is_all_text():
    laid_out = layout([[7, 8, 9]])
    assert names(laid_out) == "ttt"
    assert laid_out.images() == [0]


def test_padding_belongs_to_no_modality_even_where_it_carries_the_image_id():
    laid_out = layout([[IMG, 0, 7, IMG, 8]], mask=[[0, 0, 1, 1, 1]])
    assert names(laid_out) == "--sit"
    assert laid_out.counts().tolist() == [[1, 1, 1]]
    assert laid_out.valid.tolist() == [[False, False, True, True, True]]


def test_rows_of_a_padded_batch_are_laid_out_as_if_alone():
    rows, mask = [[0, 0, 7, IMG, IMG, 8], [7, 7, 7, IMG, IMG, 8]], [[0, 0, 1, 1, 1, 1], [1] * 6]
    both = layout(rows, mask)
    alone = layout([rows[0][2:]])
    assert torch.equal(both.modality[0, 2:], alone.modality[0])
    assert torch.equal(both.image[0, 2:], alone.image[0])


def test_pictures_are_counted_by_runs_or_by_a_known_number_of_tokens():
    ids = [[7, IMG, IMG, IMG, IMG, 8, IMG, IMG]]
    assert layout(ids).image[0].tolist() == [-1, 0, 0, 0, 0, -1, 1, 1]
    pictures = [[nowhere(1), nowhere(3), nowhere(2)]]
    assert layout(ids, pictures=pictures).image[0].tolist() == [-1, 0, 1, 1, 1, -1, 2, 2]


def test_picture_lengths_that_do_not_add_up_are_refused():
    with pytest.raises(
        ValueError, match="row 0 has 3 image tokens, but its pictures were said to have"
    ):
        layout([[7, IMG, IMG, IMG]], pictures=[[nowhere(2), nowhere(2)]])


def test_ids_and_mask_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="attention_mask has shape"):
        layout([[7, IMG]], mask=[[1, 1, 1]])
    with pytest.raises(ValueError, match="input_ids must be"):
        token_layout(torch.tensor([1, 2]), [IMG])


def test_places_come_in_the_order_of_the_tokens_and_are_unknown_elsewhere():
    laid_out = layout(
        [[7, *[IMG] * 4, 8]],
        pictures=[[(View(2, 2),)]],
    )
    assert laid_out.row[0].tolist() == [-1, 0, 0, 1, 1, -1]
    assert laid_out.column[0].tolist() == [-1, 0, 1, 0, 1, -1]


def test_generated_tokens_are_text_and_have_no_place():
    laid_out = layout([[7, IMG, 8]]).extend_text(2)
    assert names(laid_out) == "sittt"
    assert laid_out.row[0, -2:].tolist() == [-1, -1]


def test_a_later_turn_numbers_its_pictures_on_and_has_no_system_part():
    first, second = layout([[7, IMG, 8]]), layout([[9, IMG, 10]])
    both = first.extend(second)
    assert names(both) == "sittit"
    assert both.image[0].tolist() == [-1, 0, -1, -1, 1, -1]


def test_a_picture_in_a_later_turn_makes_the_text_before_it_system_tokens():
    both = layout([[7, 8]]).extend(layout([[9, IMG, 10]]))
    assert names(both) == "sssit"
    whole = layout([[7, 8, 9, IMG, 10]])
    assert torch.equal(both.modality, whole.modality)


def test_modality_masks_partition_the_positions():
    laid_out = layout([[0, 7, IMG, 8]], mask=[[0, 1, 1, 1]])
    total = sum(laid_out.mask(modality).int() for modality in Modality)
    assert torch.equal(total, torch.ones_like(total))


def test_boxes_and_tiles_follow_the_tokens_through_later_turns_and_chosen_rows():
    half = (View(1, 2, (0.5, 0.0, 1.0, 1.0), tile=3, breaks=1),)
    first = layout([[7, IMG, IMG, IMG], [IMG, 7, 7, 7]], pictures=[[half], [[View(1, 1)]]])
    both = first.extend(layout([[IMG, 9], [8, IMG]], pictures=[[[View(1, 1)]]] * 2)).extend_text(1)
    chosen = both.select(torch.tensor([1, 0]))
    none, whole = [-1] * 4, [0.0, 0.0, 1.0, 1.0]
    assert token_boxes(chosen, 1).nan_to_num(-1).tolist() == [
        none,
        [0.5, 0.0, 0.75, 1.0],
        [0.75, 0.0, 1.0, 1.0],
        none,  # a token after the row
        whole,
        none,
        none,
    ]
    assert token_tiles(chosen, 1).tolist() == [-1, 3, 3, 3, 0, -1, -1]
    assert token_boxes(chosen, 0).nan_to_num(-1).tolist() == [whole, *[none] * 4, whole, none]


def test_frames_of_a_video_are_told_apart_and_carried_through_a_conversation():
    video = tuple(View(1, 2, frame=frame) for frame in range(2))
    first = layout([[7, IMG, IMG, IMG, IMG, 8]], pictures=[[video]])
    assert first.images() == [1]
    assert first.frame[0].tolist() == [-1, 0, 0, 1, 1, -1]
    both = first.extend(layout([[9, IMG]], pictures=[[(View(1, 1),)]])).extend_text(1)
    assert both.frame[0].tolist() == [-1, 0, 0, 1, 1, -1, -1, -1, -1]
    assert both.image[0].tolist() == [-1, 0, 0, 0, 0, -1, -1, 1, -1]
    assert torch.equal(both.select(torch.tensor([0, 0])).frame[1], both.frame[0])


def test_generated_tokens_are_the_same_whether_added_singly_or_at_once():
    ids = torch.tensor([[1, 2, 7, 7, 7, 7, 3], [0, 0, 1, 7, 7, 4, 5]])
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    prompt = token_layout(ids, [7], attention_mask=mask)
    single = prompt
    for count in range(1, 150):
        single = single.extend_text(1)
        assert single.length == 7 + count
    at_once = prompt.extend_text(149)
    later = at_once.select(torch.tensor([1, 0])).extend_text(1).to("cpu").extend_text(1)
    for name in ("modality", "image", "row", "column", "frame"):
        assert torch.equal(getattr(single, name), getattr(at_once, name))
        assert torch.equal(getattr(single, name)[:, :7], getattr(prompt, name))
        fill = int(Modality.TEXT) if name == "modality" else -1
        assert (getattr(single, name)[:, 7:] == fill).all()
        assert torch.equal(getattr(later, name)[:, :156], getattr(single, name)[[1, 0]])
        assert (getattr(later, name)[:, 156:] == fill).all()
    # What was handed out before stays as it was.
    assert prompt.length == 7
