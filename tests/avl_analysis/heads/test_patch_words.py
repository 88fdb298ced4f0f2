"""The words of patches, against the hidden states that the model itself returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avl.families import UnsupportedModelError
from avl_analysis import load_model, scene_samples, scenes
from avl_analysis.corpus.questions import Sample
from avl_analysis.errors import InputError
from avl_analysis.heads.patch_words import name_tokens, patch_words, say_names
from avl_analysis.map_plots import plot_patch_names, plot_patch_words
from avl_analysis.models.loading import VLM
from tests import tiny
from tests.avl_analysis import shared
from tests.avl_analysis.models import folders

TWO = (tiny.picture(), tiny.picture(seed=1))


def slow_chances(vlm: VLM, sample: Sample) -> list[torch.Tensor]:
    """(image tokens, vocabulary) distribution at every depth, one token at a time."""
    inputs: Any = vlm.prepare(list(sample.images), sample.prompt)
    with torch.no_grad():
        output = vlm.model(**inputs, output_hidden_states=True)
        states = list(output.hidden_states)
        places = [
            place
            for place, token in enumerate(inputs["input_ids"][0].tolist())
            if token == vlm.model.config.image_token_id
        ]
        norm, head = vlm.model.get_decoder().norm, vlm.model.get_output_embeddings()
        found = []
        for depth, hidden in enumerate(states):
            rows = []
            for place in places:
                state = hidden[0, place]
                # transformers hands out the last state behind the norm
                state = state if depth == len(states) - 1 else norm(state)
                rows.append(torch.softmax(head(state), -1))
            found.append(torch.stack(rows))
    return found


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen2_5_vl"])
def test_words_are_those_of_norm_and_output_embedding(kind: str, tmp_path: Path) -> None:
    vlm = shared.vlm() if kind == "llava" else load_model(folders.save_folder(tmp_path, kind))
    sample = Sample("two", TWO, "what is red")
    found = patch_words(vlm, sample, 3)
    expected = slow_chances(vlm, sample)
    assert found.depths == len(expected)
    for depth, chances in enumerate(expected):
        best = chances.topk(3, -1)
        np.testing.assert_allclose(found.probability[depth], best.values, rtol=2e-3, atol=1e-6)
        own = chances.numpy()[np.arange(len(chances))[:, None], found.ids[depth]]
        np.testing.assert_allclose(own, best.values, rtol=2e-3, atol=1e-6)  # ties change places
        text = vlm.processor.tokenizer.decode([int(found.ids[depth, 5, 1])])
        assert found.words(depth, 1)[5] == text
    assert [len(image.token) for image in found.images] == [len(expected[0]) // 2] * 2


def test_other_families_agree_with_their_own_predictions(tmp_path: Path) -> None:
    for kind in ("qwen3_vl", "internvl", "llava_next"):
        vlm = load_model(folders.save_folder(tmp_path / kind, kind))
        assert patch_words(vlm, Sample("one", TWO[:1], "what")).depths > 2


def test_a_model_whose_prediction_is_not_that_of_its_norm_is_refused() -> None:
    vlm = shared.vlm()
    vlm.model.get_decoder().norm.register_forward_hook(lambda module, args, out: -out)
    handle = vlm.model.lm_head.register_forward_hook(
        lambda module, args, out: -out if out.dim() == 3 else out
    )
    with pytest.raises(UnsupportedModelError, match="give the distribution of"):
        patch_words(vlm, Sample("one", TWO[:1], "what"))
    handle.remove()


def test_shares_of_objects_are_counted_patch_by_patch() -> None:
    vlm = load_model("scenes")
    samples = scene_samples(1, ["caption", "ocr", "colour"], split="recording")
    result = say_names(vlm, samples)
    assert result["kind"].values.tolist() == ["shape", "colour", "character"]
    tokenizer = vlm.processor.tokenizer
    for place, sample in enumerate(samples):
        scene = scenes.generate(
            sample.scene["seed"], sample.scene["index"], sample.scene["task"]
        ).scene
        top = [chances.topk(5, -1).indices.tolist() for chances in slow_chances(vlm, sample)]
        covered = {patch for thing in scene.things for patch in thing.patches}
        covered |= {patch for one in scene.text.characters for patch in one.patches}
        for depth, words in enumerate(top):
            said = [{tokenizer.decode([token]).strip() for token in row} for row in words]
            own, rest = [], []
            for thing in scene.things:
                own.append(np.mean([thing.shape in said[patch] for patch in thing.patches]))
                background = [patch for patch in range(144) if patch not in covered]
                rest.append(np.mean([thing.shape in said[patch] for patch in background]))
            one = result.sel(kind="shape", depth=depth).isel(picture=place)
            assert float(one["own"]) == pytest.approx(np.mean(own))
            assert float(one["background"]) == pytest.approx(np.mean(rest))
    assert float(result["own"].sel(kind="shape", depth=0).mean()) > 0.9
    (panel,) = plot_patch_names(result).figure.panels
    np.testing.assert_allclose(panel.lines[1].y, result["own"].sel(kind="colour").mean("picture"))


def test_objects_named_with_a_question_are_counted_and_a_picture_counts_once() -> None:
    vlm = load_model("scenes")
    drawn = scenes.generate(700_100, 0, "caption")
    thing = drawn.scene.things[0]
    meta = {"objects": [[*map(int, thing.box), thing.shape]]}
    asked = [Sample("mine", (drawn.image,), "What?", meta=meta)]
    result = say_names(vlm, asked)
    assert result["kind"].values.tolist() == ["name"]
    assert result["own"].sel(depth=0).item() > 0.5
    twice = scene_samples(1, ["caption"]) * 2
    assert say_names(vlm, twice).sizes["picture"] == 1
    with pytest.raises(InputError, match="of none of the pictures"):
        say_names(vlm, [Sample("blank", (drawn.image,), "What?")])
    with pytest.raises(InputError, match="without an image"):
        patch_words(vlm, Sample("none", (), "What?"))


def test_a_name_no_token_stands_for_is_unknown_not_absent(tmp_path: Path) -> None:
    qwen = load_model(folders.save_folder(tmp_path, "qwen2_vl"))  # its tokens are letters
    assert name_tokens(qwen.processor.tokenizer, "circle") == ()
    result = say_names(qwen, scene_samples(1, ["caption"]))
    assert bool(result["own"].sel(kind="shape").isnull().all())
    known = load_model("scenes").processor.tokenizer
    ids = name_tokens(known, "circle")
    assert [known.decode([token]).strip() for token in ids] == ["circle"]
    assert [known.decode([token]).strip() for token in name_tokens(known, "J")] == ["J"]


def test_words_are_drawn_on_their_patches() -> None:
    vlm = load_model("scenes")
    (sample,) = scene_samples(1, ["caption"], split="recording")
    found = patch_words(vlm, sample)
    figure = plot_patch_words(found, np.asarray(sample.images[0]), 2).figure
    overlay = figure.panels[1]
    assert [word.strip("␣") for word in overlay.words] == [w.strip() for w in found.words(2)]
    np.testing.assert_allclose(overlay.patches.values, found.probability[2, :, 0])
    with pytest.raises(InputError, match="depths 0 to 5"):
        plot_patch_words(found, np.asarray(sample.images[0]), 6)
