"""Which token is seen where over an image, next to a slow version that asks every pixel."""

from __future__ import annotations

import numpy as np
import pytest

from avl_analysis.figures import Patches


def slow(patches: Patches, height: int, width: int) -> np.ndarray:
    """(height, width): the token seen at each pixel's centre, by looking through all of them."""
    seen = np.full((height, width), -1)
    for i in range(height):
        for j in range(width):
            x, y = (j + 0.5) / width, (i + 0.5) / height
            best = None
            for token, (left, top, right, bottom) in enumerate(patches.boxes):
                if np.isnan(patches.values[token]) or not (left < x < right and top < y < bottom):
                    continue
                rank = (patches.tile[token] > 0, -(right - left) * (bottom - top))
                if best is None or rank >= best:
                    best, seen[i, j] = rank, token
    return seen


def together(*parts: tuple[Patches, int]) -> Patches:
    """Several views of one image: patches and the number of their tile."""
    return Patches(
        np.concatenate([patches.values for patches, _ in parts]),
        np.concatenate([patches.boxes for patches, _ in parts]),
        np.concatenate([np.full(len(patches.values), tile) for patches, tile in parts]),
    )


def random(rows: int, columns: int, box: tuple[float, float, float, float]) -> Patches:
    values = np.random.default_rng(rows).random((rows, columns))
    values[values < 0.2] = np.nan
    return Patches.grid(values.astype(np.float32), box)


WHOLE = (0.0, 0.0, 1.0, 1.0)
CASES = {
    "one grid": random(5, 7, WHOLE),
    "centre crop": random(6, 6, (1 / 6, 0.0, 5 / 6, 1.0)),
    "whole image, then a finer grid over part of it": together(
        (random(4, 4, WHOLE), 0), (random(6, 9, (0.0, 0.1, 1.0, 0.9)), 1)
    ),
    "tiles, then the whole image": together(
        (random(3, 3, (0.0, 0.0, 0.5, 1.0)), 1),
        (random(3, 4, (0.5, 0.0, 1.0, 1.0)), 2),
        (random(2, 3, WHOLE), 0),
    ),
    "a token without a place and one over padding": Patches(
        np.array([1.0, 2.0, 3.0]),
        np.array([[np.nan] * 4, [0.0, 0.0, 0.0, 1.0], [0.25, 0.0, 1.0, 0.5]]),
    ),
}


@pytest.mark.parametrize("patches", CASES.values(), ids=CASES)
def test_every_pixel_shows_the_token_that_a_search_through_all_tokens_finds(
    patches: Patches,
) -> None:
    assert np.array_equal(patches.raster.pixels(80, 128), slow(patches, 80, 128))


@pytest.mark.parametrize("patches", CASES.values(), ids=CASES)
def test_the_scale_is_that_of_what_is_seen_with_and_without_the_parts(patches: Patches) -> None:
    for shown, kept in ((patches, patches.tile >= 0), (patches.of_whole(), patches.tile == 0)):
        values = np.where(kept, patches.values, np.nan)
        pixels = slow(Patches(values, patches.boxes, patches.tile), 160, 256)
        visible = set(pixels[pixels >= 0].tolist())
        assert set(np.flatnonzero(shown.seen)) == visible
        assert shown.largest == max((values[token] for token in visible), default=0.0)
    views = {int(patches.tile[token] > 0) for token in np.flatnonzero(patches.placed)}
    assert patches.in_parts == (len(views) == 2)


def test_a_finer_view_covers_a_coarser_one_where_it_has_a_value_and_only_there() -> None:
    fine = Patches.grid([[0.5, np.nan]], (0.0, 0.0, 1.0, 0.5))
    views = together((fine, 1), (Patches.grid([[0.9]]), 0))
    assert views.raster.take(views.values).tolist() == [[0.5, 0.9], [0.9, 0.9]]


def test_edges_that_differ_by_rounding_are_one_line() -> None:
    cells = Patches.grid(np.ones((24, 24)))
    rounded = Patches(cells.values, cells.boxes.astype(np.float32))
    assert rounded.raster.token.shape == (24, 24)
    assert sorted(rounded.raster.token.ravel()) == list(range(576))


def test_nothing_is_seen_where_no_token_has_a_place() -> None:
    nowhere = Patches(np.ones(3), np.full((3, 4), np.nan))
    assert (nowhere.raster.pixels(4, 6) == -1).all()
    assert nowhere.raster.take(nowhere.values).size == 0


@pytest.mark.parametrize(
    ("values", "boxes", "message"),
    [
        (np.ones((2, 2)), np.ones((4, 4)), r"values \(tokens,\)"),
        (np.ones(3), np.ones((2, 4)), r"got \(3,\), \(2, 4\)"),
        (np.array([np.inf]), np.ones((1, 4)), "infinite"),
    ],
)
def test_patches_of_the_wrong_shape_are_refused(
    values: np.ndarray, boxes: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Patches(values, boxes)
