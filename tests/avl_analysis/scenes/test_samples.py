"""Drawn scenes: reproducible, never overlapping, and true to the pixel."""

from __future__ import annotations

import numpy as np
import pytest

from avl_analysis import scenes
from avl_analysis.scenes import drawing, language, world
from avl_analysis.scenes.drawing import CELL, GRID, PALETTE, PATCH, SHAPES, SIDE
from tests.avl_analysis.scenes.slow_answers import answer


@pytest.fixture(scope="module")
def many() -> list[scenes.Scene]:
    rng = np.random.default_rng(11)
    return [world.draw(rng) for _ in range(150)]


def test_the_same_seed_and_index_give_the_same_sample() -> None:
    one, two = scenes.generate(5, 3), scenes.generate(5, 3)
    assert np.array_equal(one.image, two.image)
    assert one.question == two.question
    assert one.scene.things == two.scene.things


def test_another_index_gives_another_picture() -> None:
    assert not np.array_equal(scenes.generate(5, 3).image, scenes.generate(5, 4).image)


def test_samples_are_numbered_from_zero() -> None:
    assert [s.index for s in scenes.samples(3, "where", seed=2)] == [0, 1, 2]
    assert scenes.samples(3, "where", seed=2)[2].prompt == scenes.generate(2, 2, "where").prompt


def test_unknown_tasks_and_negative_seeds_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'colours'.*colour"):
        scenes.generate(0, 0, "colours")
    with pytest.raises(ValueError, match="seed=-1"):
        scenes.generate(-1)
    with pytest.raises(ValueError, match="most=7"):
        world.draw(np.random.default_rng(0), 7)


def test_objects_stand_in_distinct_cells_and_no_two_look_alike(many: list[scenes.Scene]) -> None:
    for scene in many:
        cells = [thing.cell for thing in scene.things]
        looks = [(thing.colour, thing.shape) for thing in scene.things]
        assert cells == sorted(set(cells))
        assert len(set(looks)) == len(looks)
        assert 2 <= len(looks) <= 6


def test_nothing_overlaps_and_nothing_leaves_its_cell(many: list[scenes.Scene]) -> None:
    for scene in many:
        taken = np.zeros((SIDE, SIDE), dtype=int)
        for box in [thing.box for thing in scene.things] + ([scene.text.box] if scene.text else []):
            left, top, right, bottom = box
            assert 0 <= left < right <= SIDE
            assert 0 <= top < bottom <= SIDE
            taken[top:bottom, left:right] += 1
        assert taken.max() == 1
        for thing in scene.things:
            assert thing.box[0] // CELL == (thing.box[2] - 1) // CELL == thing.cell % 3
            assert thing.box[1] // CELL == (thing.box[3] - 1) // CELL == thing.cell // 3


def test_a_third_of_the_image_tokens_is_always_background(many: list[scenes.Scene]) -> None:
    assert min(len(scene.background) for scene in many) >= GRID * GRID / 3


def test_boxes_hold_exactly_the_pixels_that_were_painted(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = np.full((SIDE, SIDE, 3), 0.4, dtype=np.float32)
    monkeypatch.setattr(drawing, "background", lambda rng: flat.copy())
    for seed in range(40):
        scene = world.draw(np.random.default_rng(seed))
        painted = (scene.image != int(0.4 * 255 + 0.5)).any(-1)
        inside = np.zeros_like(painted)
        for thing in scene.things:
            left, top, right, bottom = thing.box
            inside[top:bottom, left:right] = True
            patches = {
                (y // PATCH) * GRID + x // PATCH
                for y, x in np.argwhere(painted)
                if top <= y < bottom and left <= x < right
            }
            assert patches <= set(thing.patches)
            assert (
                len(set(thing.patches) - patches) <= 2
            )  # a patch touched too faintly to change a byte
        if scene.text:
            for character in scene.text.characters:
                left, top, right, bottom = character.box
                inside[top:bottom, left:right] = True
                assert np.array_equal(
                    painted[top:bottom, left:right], drawing.GLYPHS[character.character]
                )
                assert set(character.patches) <= set(scene.text.patches)
        assert not (painted & ~inside).any()


def test_an_object_shows_its_colour(many: list[scenes.Scene]) -> None:
    for scene in many[:40]:
        for thing in scene.things:
            left, top, right, bottom = thing.box
            window = scene.image[top:bottom, left:right].reshape(-1, 3) / 255
            nearest = np.abs(window[:, None] - np.array(list(PALETTE.values()))).max(-1)
            close = (nearest < 0.06).sum(0)  # pixels within the colour's variation, by colour
            assert close.argmax() == list(PALETTE).index(thing.colour)
            assert close.max() >= 8


def test_every_character_of_the_font_differs_from_every_other_in_several_pixels() -> None:
    glyphs = [glyph[::2, ::2] for glyph in drawing.GLYPHS.values()]
    assert len(glyphs) == 33
    assert min((a != b).sum() for i, a in enumerate(glyphs) for b in glyphs[:i]) >= 2


def test_every_shape_differs_from_every_other_at_the_small_size() -> None:
    masks = [drawing.coverage(shape, 16, 16, 6.0) for shape in SHAPES]
    assert min(np.abs(a - b).sum() for i, a in enumerate(masks) for b in masks[:i]) >= 12


def test_a_story_is_a_caption_of_the_longest_kind_the_model_was_trained_on() -> None:
    tokenizer = language.build_tokenizer()
    told = scenes.samples(12, "story", seed=20)
    for sample in told:
        assert len(sample.scene.things) == 6
        assert sample.answer == answer(sample.scene, "caption", sample.prompt)
        assert len(tokenizer(sample.answer, add_special_tokens=False).input_ids) in (59, 60)
    longest = [len(s.answer.split()) for s in scenes.samples(200, "caption", seed=20)]
    assert {len(sample.answer.split()) for sample in told} == {max(longest)}
    assert {s.task for s in scenes.samples(60, seed=20)} <= set(scenes.TASKS)


@pytest.mark.parametrize("task", scenes.TASKS)
def test_every_answer_is_the_one_a_slow_reader_of_the_scene_gives(task: str) -> None:
    for sample in scenes.samples(80, task, seed=21):
        assert sample.answer == answer(sample.scene, task, sample.prompt), sample.prompt


@pytest.mark.parametrize(
    "task", ["colour", "shape", "size", "where", "text_colour", "character", "ocr", "caption"]
)
def test_what_a_question_is_about_is_where_its_answer_stands(task: str) -> None:
    for sample in scenes.samples(30, task, seed=22):
        assert sample.boxes
        inside = {patch for box in sample.boxes for patch in world.patches_of(box)}
        assert set(sample.patches) <= inside
        assert not set(sample.patches) & set(sample.scene.background)


def test_yes_and_no_are_about_equally_common_and_no_is_usually_hard() -> None:
    asked = scenes.samples(400, "exist", seed=23)
    assert 0.4 < sum(s.answer == "yes" for s in asked) / 400 < 0.6
    pairs = [s for s in asked if s.answer == "no" and s.question.kind == "exist pair"]
    hard = 0
    for sample in pairs:
        words = set(sample.prompt.lower().strip("?.").split())
        colours, shapes = (
            {t.colour for t in sample.scene.things},
            {t.shape for t in sample.scene.things},
        )
        hard += bool(words & colours) and bool(words & shapes)
    assert hard / len(pairs) > 0.6
