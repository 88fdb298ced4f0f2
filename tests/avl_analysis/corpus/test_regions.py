"""What each word is about, on scenes whose truth is known."""

import numpy as np

from avl_analysis import scenes
from avl_analysis.corpus.regions import on_tokens, word_regions
from avl_analysis.figures import Patches
from avl_analysis.recordings.image_tokens import ImageTokens


def test_each_character_read_is_about_that_character():
    sample = scenes.generate(1, 0, "ocr")
    regions = word_regions(sample, list(sample.answer))
    assert [region.tokens for region in regions] == [
        c.patches for c in sample.scene.text.characters
    ]


def test_caption_words_are_about_the_object_whose_part_is_written():
    sample = scenes.generate(1, 5, "caption")
    words = sample.answer.replace(",", " ,").split(" ")
    regions = word_regions(sample, words)
    parts = sample.answer.split(", ")
    described = sorted(
        [*sample.scene.things, *([sample.scene.text] if sample.scene.text else [])],
        key=lambda p: p.cell,
    )
    assert len(parts) == len(described)
    assert regions[0].tokens == described[0].patches
    assert regions[-1].tokens == described[-1].patches
    after_comma = words.index(",") + 1
    assert regions[after_comma - 1].tokens == described[0].patches
    assert regions[after_comma].tokens == described[1].patches


def test_other_answers_are_about_what_the_question_asks_for():
    sample = scenes.generate(1, 0, "colour")
    (region,) = word_regions(sample, [sample.answer])
    assert region.tokens == tuple(sample.patches)
    assert (region.boxes[0].left, region.boxes[0].bottom) == (
        sample.boxes[0][0],
        sample.boxes[0][3],
    )


def tokens(side: int, box=(0.0, 0.0, 1.0, 1.0)) -> ImageTokens:
    """One view of side x side tokens."""
    number = np.arange(side * side)
    boxes = Patches.grid(np.zeros((side, side)), box).boxes
    return ImageTokens(number, number + 5, boxes, np.zeros(side * side, int))


def test_the_patches_of_a_scene_are_tokens_of_the_embedded_model_only():
    sample = scenes.generate(1, 0, "colour")
    (region,) = word_regions(sample, [sample.answer])
    assert on_tokens(region, tokens(12)).tokens == region.tokens
    assert on_tokens(region, None).tokens == ()
    unknown = ImageTokens(np.arange(4), np.arange(4), np.full((4, 4), np.nan), np.zeros(4, int))
    assert on_tokens(region, unknown).tokens == ()


def test_on_the_grid_of_another_model_a_region_holds_the_tokens_under_its_box():
    sample = scenes.generate(1, 0, "colour")
    (region,) = word_regions(sample, [sample.answer])
    box, side = region.boxes[0], sample.image.shape[0]
    chosen = on_tokens(region, tokens(24)).tokens
    for token in range(24 * 24):
        x, y = ((token % 24 + 0.5) / 24 * side, (token // 24 + 0.5) / 24 * side)
        inside = min(x - box.left, box.right - x, y - box.top, box.bottom - y)
        if abs(inside) > side / 48:  # tokens on the edge may be either
            assert (token in chosen) == (inside > 0)
    assert on_tokens(region, tokens(1, (0.0, 0.0, 0.01, 0.01))).tokens == ()
