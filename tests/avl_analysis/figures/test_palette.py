"""The palette stays apart in grey print and for colour-blind readers, on white and on black."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from avl_analysis.figures import palette
from avl_analysis.figures.palette import DARK, LIGHT, STYLES, lightness, style

# Viénot, Brettel & Mollon (1999): linear RGB as seen without long- or middle-wave cones.
BLIND = {
    "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


def linear(colour: str) -> np.ndarray:
    value = np.array(palette.rgb(colour)) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ rgb
    )
    f = np.cbrt(np.clip(xyz / [0.9505, 1, 1.089], 1e-4, None))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_lightness_runs_from_black_to_white():
    assert lightness("#000000") == pytest.approx(0)
    assert lightness("#ffffff") == pytest.approx(100, abs=0.01)
    assert lightness("#777777") == pytest.approx(50, abs=0.5)


@pytest.mark.parametrize("dark", [False, True])
def test_modalities_differ_in_lightness(dark):
    values = sorted(lightness(s.colour(dark)) for s in STYLES[:3])
    assert min(b - a for a, b in pairwise(values)) >= (14 if not dark else 4)


def test_no_two_series_share_dash_and_marker():
    assert len({(s.dash, s.marker) for s in STYLES}) == len(STYLES)
    assert len({(s.plotly_dash, s.plotly_marker) for s in STYLES}) == len(STYLES)
    assert len({s.marker for s in STYLES}) == len(STYLES)


@pytest.mark.parametrize("matrix", BLIND.values(), ids=BLIND.keys())
@pytest.mark.parametrize("dark", [False, True])
def test_the_first_three_series_stay_apart_for_colour_blind_readers(matrix, dark):
    seen = [
        lab(np.clip(np.array(matrix) @ linear(style.colour(dark)), 0, 1)) for style in STYLES[:3]
    ]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 20


@pytest.mark.parametrize(("theme", "dark"), [(LIGHT, False), (DARK, True)])
def test_series_and_words_stand_out_from_the_paper(theme, dark):
    paper = lightness(theme.paper)
    for colour in [s.colour(dark) for s in STYLES] + [theme.ink, theme.muted]:
        assert abs(lightness(colour) - paper) > 25


def test_the_classes_on_a_picture_rise_in_lightness():
    values = [lightness(colour) for colour in palette.CLASS_COLOURS]
    assert values == sorted(values)
    assert values[2] - values[1] > 20


def test_exchanging_light_for_dark_is_unambiguous():
    light = [pair[0] for pair in palette.dark_pairs()]
    assert len(set(light)) == len(light)
    assert not {palette.BOX, palette.BOX_EDGE, palette.ATTENTION} & set(light)


def test_twenty_series_differ_in_dash_and_marker_and_ten_in_colour() -> None:
    styles = [style(slot) for slot in range(20)]
    assert len({(s.dash, s.marker) for s in styles}) == 20
    assert len({(s.plotly_dash, s.plotly_marker) for s in styles}) == 20
    assert [s.light for s in styles[10:]] == [s.light for s in styles[:10]]


@pytest.mark.parametrize("dark", [False, True])
def test_words_on_any_shade_of_any_colour_can_be_read(dark: bool) -> None:
    theme = palette.DARK if dark else palette.LIGHT
    for look in palette.STYLES:
        for opacity in (0.0, 0.2, 0.5, 0.75, 1.0):
            colour = look.colour(dark)
            ink = palette.ink_on(colour, opacity, theme.paper)
            assert palette.contrast(ink, palette.over(colour, opacity, theme.paper)) >= 4.5
    assert palette.contrast(theme.muted, theme.paper) >= 4.5
    assert palette.contrast(palette.ON_BUTTON, palette.BUTTON) >= 4.5


def test_contrast_is_that_of_the_standard() -> None:
    assert palette.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert palette.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    assert palette.over("#000000", 0.25, "#ffffff") == "#bfbfbf"
