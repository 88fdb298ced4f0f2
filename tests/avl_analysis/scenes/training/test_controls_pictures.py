"""Controls that train the shipped model further, and that compare steps by phrase."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from avl_analysis.scenes import MODEL_DIR, world
from avl_analysis.scenes.language import load_processor
from avl_analysis.scenes.training.large import controls_pictures, measure


def test_a_comma_ends_a_phrase_and_belongs_to_it() -> None:
    tokens = ["▁a", "▁red", "▁circle", ",", "▁a", "▁star", ",", "▁text"]
    assert controls_pictures.phrase_numbers(tokens) == [0, 0, 0, 0, 1, 1, 1, 2]


def test_overlap_of_steps_is_averaged_over_pairs_of_one_phrase_and_of_two() -> None:
    model = LlavaForConditionalGeneration.from_pretrained(
        MODEL_DIR, dtype=torch.float32, attn_implementation="eager"
    )
    processor = load_processor(MODEL_DIR)
    scene = world.draw(np.random.default_rng(3))
    assert len(scene.things) > 1
    found = controls_pictures.phrase_overlap(model, processor, scene)

    weights, image, last = measure.caption_attention(model, processor, scene)
    tokens = measure.caption_tokens(processor, scene)
    best = int(0.3 * len(image))
    expected: dict[str, list[float]] = {}
    for layer in range(weights.shape[0]):
        # step i reads row last + i and writes answer token i
        sets = [
            set(weights[layer, :, last + i, list(image)].mean(0).topk(best).indices.tolist())
            for i in range(len(tokens))
        ]
        for lag in (1, 2, 3):
            for i in range(len(tokens) - lag):
                between = "," in "".join(tokens[i : i + lag])
                key = f"{'other' if between else 'same'} {lag}"
                expected.setdefault(key, []).append(len(sets[i] & sets[i + lag]) / best)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(np.mean(values), abs=1e-6), key


@pytest.mark.slow
def test_training_further_without_patch_labels_leaves_their_losses_out(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for name in controls_pictures.LABELS:
        controls_pictures.further(name, steps=2, every=2, log=log, samples=2)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    with_labels, without, spelled = lines[:3], lines[3:6], lines[6:]
    assert with_labels[0]["settings"]["patch_weight"] == 1.0
    assert without[0]["settings"]["patch_weight"] == without[0]["settings"]["word_weight"] == 0.0
    # before the first step both are the shipped model; after two they differ
    assert with_labels[1]["keys95"] == without[1]["keys95"]
    assert with_labels[2]["losses"] != without[2]["losses"]
    assert {"overlap3", "sink_rate", "exact_match"} <= with_labels[2].keys()
    # Answers in letters have the losses of the first, and steps between other tokens.
    assert spelled[0]["settings"] == with_labels[0]["settings"] | {"spelled": 1}
    assert spelled[1]["overlap1"] != with_labels[1]["overlap1"]
