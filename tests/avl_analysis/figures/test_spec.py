"""A spec refuses what must not be drawn and can tell every number it holds."""

import numpy as np
import pytest

from avl_analysis.figures import (
    Axis,
    Bar,
    Bars,
    Box,
    Caption,
    Figure,
    Heat,
    Line,
    Lines,
    Overlay,
    Patches,
    Points,
)
from avl_analysis.figures.spec import rows, shown_model
from tests.avl_analysis.figures import specs


@pytest.mark.parametrize(("label", "unit"), [("", "share"), ("layer", "")])
def test_an_axis_without_label_or_unit_is_refused(label, unit):
    with pytest.raises(ValueError, match="needs a label and a unit"):
        Axis(label, unit)


def test_an_axis_writes_its_unit():
    assert Axis("KV cache", "MB").text == "KV cache (MB)"


def test_reversed_limits_are_refused():
    with pytest.raises(ValueError, match="first must be below"):
        Axis("layer", "index", (3, 1))


def test_an_interval_that_misses_its_value_is_refused():
    x = np.arange(3.0)
    with pytest.raises(ValueError, match="does not contain"):
        Line("a", x, x, x + 0.1, x + 0.2)


def test_half_an_interval_is_refused():
    with pytest.raises(ValueError, match="one end"):
        Bar("a", np.ones(2), low=np.zeros(2))


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="shape"):
        Line("a", np.arange(3.0), np.arange(4.0))
    with pytest.raises(ValueError, match="2 values for 3 categories"):
        Bars(specs.STEP, specs.SHARE, ("a", "b", "c"), (Bar("x", np.ones(2)),))
    with pytest.raises(ValueError, match="1 labels for 2 points"):
        Points("a", np.ones(2), np.ones(2), labels=("one",))


def test_infinity_is_refused_and_nan_is_not():
    x = np.arange(2.0)
    with pytest.raises(ValueError, match="infinite"):
        Line("a", x, np.array([0, np.inf]))
    assert np.isnan(Line("a", x, np.array([0, np.nan])).y[1])


def test_arrays_of_a_spec_cannot_be_changed_and_are_copies():
    x = np.arange(3.0)
    line = Line("a", x, x)
    x[0] = 9
    assert line.x[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        line.y[0] = 1


def test_a_picture_must_be_colour_bytes():
    with pytest.raises(ValueError, match="uint8"):
        Overlay(np.zeros((4, 4, 3)), specs.SHARE)


def test_a_class_without_a_name_is_refused():
    with pytest.raises(ValueError, match="beyond its 2 names"):
        Overlay(
            specs.picture(),
            specs.SHARE,
            Patches.grid(np.full((2, 2), 2.0)),
            classes=("minor", "core"),
        )


def test_an_empty_box_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Box(4, 4, 4, 8)


def test_an_empty_matrix_is_refused():
    with pytest.raises(ValueError, match="non-empty"):
        Heat(specs.STEP, specs.LAYER, specs.SHARE, np.zeros((0, 3)))


def test_a_caption_says_n_model_and_interval():
    text = Caption("What.", 2, "scenes", "95 % intervals", "It holds.").text
    assert text == "What. It holds. n = 2 samples; model: scenes; 95 % intervals."
    one = Caption("What.", 1, "/home/me/my-llava", "95 % intervals").text
    assert one == "What. n = 1 sample; model: my-llava."
    for path in ("/a/my-llava/", "./my-llava", "~/x/my-llava", "models/llava/my-llava"):
        assert shown_model(path) == "my-llava"
    assert "model: org/name;" in Caption("What.", 2, "org/name", "95 % intervals").text
    with pytest.raises(ValueError, match="n = 0"):
        Caption("What.", 0, "scenes", "95 % intervals")


@pytest.mark.parametrize("name", ["a/b", "A", "../x", "", "a b", "ä"])
def test_a_figure_name_is_a_plain_file_stem(name):
    with pytest.raises(ValueError, match="file stem"):
        Figure(name, "t", (specs.heat(),), specs.CAPTION)


def test_every_number_of_a_figure_is_exported_with_its_interval():
    table = rows(specs.figure("f", specs.lines(), specs.heat(2, 3), specs.bars(), specs.scatter()))
    image = [row for row in table if row["series"] == "image"]
    line = next(entry for entry in specs.lines().lines if entry.name == "image")
    assert [row["value"] for row in image] == line.y.tolist()
    assert [row["low"] for row in image] == line.low.tolist()
    assert sum(row["panel"] == "Heads" for row in table) == 6
    assert {row["label"] for row in table if row["panel"] == "Accuracy by task"} == {
        "colour",
        "count",
        "<ocr> & $x$",
    }


def test_an_animation_exports_every_frame():
    table = rows(specs.figure("f", specs.animation()))
    assert {row["series"] for row in table} == {"step 0", "step 3", "step 6"}
    assert len(table) == 3 * 48


def test_panels_without_lines_are_refused():
    with pytest.raises(ValueError, match="no lines"):
        Lines(specs.STEP, specs.SHARE, ())
