"""Paint a part of a picture: the image tokens that change are those the recording puts there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers
from packaging.version import Version

from avl import grids, watched_methods
from avl.views import View
from avl_analysis.conformance.build import Case, model_types
from avl_analysis.conformance.entries import ENTRIES, entry
from avl_analysis.conformance.painting import SIZES, check_places
from avl_analysis.conformance.random_pixels import broken_rows
from avl_analysis.conformance.recording import Mismatch
from avl_analysis.conformance.shrink import PATCH, SIDE, WIDTH

NAMED = (
    "llava",
    "vipllava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "smolvlm",
    "paligemma",
    "gemma3",
    "mistral3",
)
FURTHER = ("gemma4", "hunyuan_vl", "janus")
HAS_ALL_PROCESSORS = Version(transformers.__version__) >= Version("5.23")
"""Some Pillow image processors of older versions ask for torchvision, which is not installed."""


def _holds(model_type: str) -> None:
    try:
        found = check_places(Case(model_type))
    except LookupError as missing:
        if HAS_ALL_PROCESSORS:
            raise
        pytest.skip(str(missing))
    assert found.wrong == 0
    assert found.assumption == ""
    assert found.inside >= 5
    assert found.outside >= 30


def test_pictures_painted_are_wide_high_and_square_and_one_is_several_tiles_large():
    assert {(width > height) - (width < height) for width, height in SIZES} == {1, -1, 0}
    assert max(max(size) for size in SIZES) > 4 * SIDE


@pytest.mark.skipif(not HAS_ALL_PROCESSORS, reason="older versions encode images in the model call")
def test_places_that_get_lost_under_generate_are_found_out(monkeypatch):
    monkeypatch.delitem(watched_methods.WATCHED, "get_image_features")
    with pytest.raises(Mismatch, match="places recorded under generate differ"):
        check_places(Case("qwen2_vl"))


@pytest.mark.parametrize("model_type", NAMED)
def test_painted_tokens_are_those_of_the_map(model_type):
    _holds(model_type)


@pytest.mark.parametrize("model_type", [t for t in FURTHER if t in model_types()])
def test_painted_tokens_are_those_of_the_map_in_further_families(model_type):
    _holds(model_type)


PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": PATCH,
}
VARIANTS = {
    "LLaVA with pictures padded to a square": ("llava", {"options": {"do_pad": True}}),
    "LLaVA with pictures squeezed": (
        "llava",
        {"options": {"do_center_crop": False, "size": {"height": SIDE, "width": SIDE}}},
    ),
    "OneVision with more tiles than it keeps": (
        "llava_onevision",
        {
            "override": {"image_grid_pinpoints": [[4 * SIDE, 4 * SIDE]]},
            "reach": 6.0,
        },  # bilinear after resizing
    ),
    "Pixtral inside LLaVA": (
        "llava",
        {
            "override": {"vision_config": PIXTRAL, "vision_feature_select_strategy": "full"},
            "processor": "pixtral",
            "shown": broken_rows,
        },
    ),
    "PaliGemma with more tokens": ("paligemma", {"override": {"vision_config.image_size": 48}}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_painted_tokens_are_those_of_the_map_with_other_settings(variant, monkeypatch):
    model_type, changes = VARIANTS[variant]
    monkeypatch.setitem(ENTRIES, model_type, replace(entry(model_type), **changes))
    _holds(model_type)


def test_a_map_that_is_wrong_is_found_out(monkeypatch):
    def mirrored(prompt):
        for (view,) in grids.fixed(prompt):
            yield (replace(view, box=(1.0, 0.0, 0.0, 1.0)),)

    def transposed(prompt):
        for (view,) in grids.fixed(prompt):
            yield tuple(
                View(view.rows, 1, (c / view.columns, 0.0, (c + 1) / view.columns, 1.0))
                for c in range(view.columns)
            )

    case = Case("paligemma")
    for wrong in (mirrored, transposed):
        monkeypatch.setitem(grids.GRIDS, "paligemma", wrong)
        assert check_places(case).wrong > 0
