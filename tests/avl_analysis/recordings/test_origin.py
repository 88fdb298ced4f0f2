"""Measurements of different models are told apart, by revision where it is known, else by name."""

import pytest

from avl_analysis.errors import InputError
from avl_analysis.recordings.origin import Origin, check_same_model

FACTS = {"model_type": "llava", "layers": "4"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Origin("a", "x", "1"), Origin("b", "y", "1")),
        (Origin("a", "x"), Origin("b", "x", "1")),
        (Origin("a"), Origin("b", "x", "1")),
        (Origin("a", "x", "", FACTS), Origin("b", "x", "", {"layers": "4"})),
    ],
)
def test_equal_revisions_or_names_are_one_model_and_what_is_unknown_does_not_count(
    one: Origin, other: Origin
) -> None:
    check_same_model(one, other)
    check_same_model(other, one)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (Origin("a", "x", "1"), Origin("b", "x", "2"), "revision 1 and 2"),
        (Origin("a", "x"), Origin("b", "y"), "name x and y"),
        (Origin("a", "x", "", FACTS), Origin("b", "", "", {"layers": "5"}), "layers 4 and 5"),
    ],
)
def test_different_models_are_refused(one: Origin, other: Origin, message: str) -> None:
    with pytest.raises(InputError, match=f"a and b are of different models.*{message}"):
        check_same_model(one, other)


def test_one_folder_written_in_two_ways_is_one_model(tmp_path) -> None:
    (tmp_path / "m").mkdir()
    check_same_model(Origin("a", str(tmp_path / "m")), Origin("b", f"{tmp_path}/./m/"))


def test_a_model_that_was_only_built_has_no_name() -> None:
    attrs = {"model": "LlavaForConditionalGeneration"}
    attrs["model_class"] = attrs["model"]
    check_same_model(Origin.of_attrs("a", attrs), Origin("b", "x"))
