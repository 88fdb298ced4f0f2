"""What each word is about, on scenes whose truth is known."""

from avl_analysis import scenes
from avl_analysis.corpus.regions import word_regions


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
