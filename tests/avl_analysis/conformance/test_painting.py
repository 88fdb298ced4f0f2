"""Paint a part of a picture: the image tokens that change are those the picture map puts there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from avl import grids
from avl.places import View
from avl_analysis.conformance.build import Case, model_types
from avl_analysis.conformance.painting import check_places

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
    found = check_places(Case(model_type))
    assert found.wrong == 0
    assert found.assumption == ""
    assert found.inside >= 5
    assert found.outside >= 30


@pytest.mark.parametrize("model_type", QUICK)
def test_painted_tokens_are_those_of_the_map(model_type):
    _holds(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in SLOW if t in model_types()])
def test_painted_tokens_are_those_of_the_map_in_further_families(model_type):
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
