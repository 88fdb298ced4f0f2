"""Paint a part of a picture: the image tokens that change are those the picture map puts there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from avl import grids
from avl.places import View
from avl_analysis.conformance.build import Case, model_types
from avl_analysis.conformance.entries import ENTRIES, entry
from avl_analysis.conformance.painting import check_places
from avl_analysis.conformance.shrink import SIDE

QUICK = ("llava", "llava_next", "qwen2_vl", "internvl", "idefics3", "mistral3", "gemma3")
SLOW = (
    "vipllava",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen3_vl",
    "smolvlm",
    "paligemma",
    "gemma4",
    "hunyuan_vl",
    "janus",
)


def _holds(model_type: str) -> None:
    try:
        found = check_places(Case(model_type))
    except LookupError as missing:
        pytest.skip(str(missing))
    assert found.wrong == 0
    assert found.assumption == ""
    assert found.inside >= 5
    assert found.outside >= 30


@pytest.mark.parametrize("model_type", QUICK)
def test_painted_tokens_are_those_of_the_map(model_type):
    _holds(model_type)


@pytest.mark.parametrize("model_type", [t for t in SLOW if t in model_types()])
def test_painted_tokens_are_those_of_the_map_in_further_families(model_type):
    _holds(model_type)


VARIANTS = {
    "LLaVA with pictures padded to a square": ("llava", {"options": {"do_pad": True}}),
    "LLaVA with pictures squeezed": (
        "llava", {"options": {"do_center_crop": False, "size": {"height": SIDE, "width": SIDE}}}
    ),
    "OneVision with more tiles than it keeps": (
        "llava_onevision",
        {"override": {"image_grid_pinpoints": [[4 * SIDE, 4 * SIDE]]}, "reach": 6.0},  # bilinear after resizing
    ),
    "PaliGemma with more tokens": ("paligemma", {"override": {"vision_config.image_size": 48}}),
}  # fmt: skip


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
                View(view.rows, 1, (c / view.columns, 0.0, (c + 1) / view.columns, 1.0)) for c in range(view.columns)
            )

    case = Case("paligemma")
    for wrong in (mirrored, transposed):
        monkeypatch.setitem(grids.GRIDS, "paligemma", wrong)
        assert check_places(case).wrong > 0
