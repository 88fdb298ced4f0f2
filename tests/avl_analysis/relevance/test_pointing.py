"""Which map points at what a word is about, question by question."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from avl_analysis import Sample, live, load_model, scene_samples, scenes
from avl_analysis.errors import InputError
from avl_analysis.map_plots import plot_pointing
from avl_analysis.relevance import METHODS
from avl_analysis.relevance.maps import relevance
from avl_analysis.relevance.pointing import LAYERED, point
from tests import tiny
from tests.avl_analysis import shared
from tests.avl_analysis.models import folders


def test_hits_are_those_of_the_maps_of_one_word_of_each_right_answer() -> None:
    vlm = load_model("scenes")
    samples = scene_samples(2, ["colour", "ocr"], split="recording")
    result = point(vlm, samples)
    row = 0
    for sample in samples:
        answer = live.answer(vlm, sample, max_new_tokens=32)
        drawn = scenes.generate(sample.scene["seed"], sample.scene["index"], sample.scene["task"])
        if answer.text != drawn.answer:
            continue
        about = json.loads(str(result["about"].values[row]))
        patches = set(drawn.patches)
        if sample.task == "ocr" and about["word"].strip():  # a letter is about its own patches
            patches = set(drawn.scene.text.characters[0].patches)
        maps = relevance(vlm, sample, answer.ids, about["step"])
        for layer in maps.layers:
            for method in LAYERED:
                hit = int(maps.of(method, layer).argmax()) in patches
                found = result["pointing"].isel(sample=row).sel(layered=method, layer=layer)
                assert bool(found) == hit
        chefer = result["pointing_all"].isel(sample=row).sel(map="chefer")
        assert bool(chefer) == (int(maps.of("chefer").argmax()) in patches)
        assert float(result["area"][row]) == pytest.approx(len(patches) / 144)
        np.testing.assert_allclose(
            result["maps"].isel(sample=row).sel(map="raw"), maps.of("raw"), rtol=1e-5
        )
        row += 1
    assert row == result.sizes["sample"] >= 3
    (panel,) = plot_pointing(result).figure.panels
    lines = {line.name: line.y for line in panel.lines}
    assert list(lines) == list(METHODS.values())
    means = result["pointing"].mean("sample")
    for method in LAYERED:
        np.testing.assert_allclose(lines[METHODS[method]], means.sel(layered=method))
    chefer = float(result["pointing_all"].mean("sample").sel(map="chefer"))
    assert set(lines[METHODS["chefer"]]) == {chefer}


def test_own_questions_with_regions_are_asked_on_other_families(tmp_path: Path) -> None:
    qwen = load_model(folders.save_folder(tmp_path, "qwen2_vl"))
    box = (0, 0, 20, 15)
    samples = [Sample(f"q{i}", (tiny.picture(seed=i),), "what", regions=(box,)) for i in range(2)]
    result = point(qwen, samples, max_new_tokens=3)
    assert result.sizes["sample"] == 2
    assert 0 < float(result["area"].mean()) < 0.5
    assert bool(np.isfinite(result["pointing"]).all())


def test_questions_of_which_nothing_is_known_are_refused() -> None:
    with pytest.raises(InputError, match="of none of the 2 questions"):
        point(shared.vlm(), shared.questions(2), max_new_tokens=2)
