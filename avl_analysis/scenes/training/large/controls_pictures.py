"""Controls that need pictures: losses on single patches, words in letters, steps of one phrase.

``python -m avl_analysis.scenes.training.large.controls_pictures labels --out FILE`` trains the
shipped model further, once with the losses that gave it its patch labels and once without, on the
same data from the same weights, and logs its attention. ``--only spelled`` trains it on the same
scenes with the words of answers cut into letters. ``... phrases [--model FOLDER]`` compares
the image tokens attended to by two steps that speak of one object with those of two that do not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from avl_analysis.intervals import mean_interval
from avl_analysis.scenes import MODEL_DIR, world
from avl_analysis.scenes.language import load_processor
from avl_analysis.scenes.training import launch
from avl_analysis.scenes.training.large import measure
from avl_analysis.scenes.training.train import Settings, Trainer

# Rates a quarter of those of training: the weights are trained already, and a step at the full rate
# would undo more than it teaches. A budget of 1e6 minutes, together with a clock that stays at 0,
# keeps what is scheduled by share of time at its beginning; warm-up counts steps, and
# `by_shape_latest` 0 leaves out the easy scenes.
FURTHER: dict[str, Any] = {
    "minutes": 1e6,
    "processes": 1,
    "muon_rate": 0.005,
    "adam_rate": 7.5e-4,
    "patches_only_minutes": 0.0,
    "by_shape_latest": 0.0,
}
LABELS: dict[str, dict[str, Any]] = {
    "with": {},
    "without": {"patch_weight": 0.0, "word_weight": 0.0},
    "spelled": {"spelled": 1},
}
"""With and without the losses on single patches; "spelled" has them, and answers in letters."""


def _eager(weights: dict[str, Tensor]) -> LlavaForConditionalGeneration:
    """The shipped model's shape with other weights, and attention that returns its weights."""
    model = LlavaForConditionalGeneration.from_pretrained(
        MODEL_DIR, dtype=torch.float32, attn_implementation="eager"
    )
    model.load_state_dict(weights)
    return model


def further(name: str, steps: int, every: int, log: Path, samples: int = 32) -> None:
    """Train the shipped model further and log its attention every ``every`` steps.

    Args:
        name: which of ``LABELS``.
        steps: how many to make.
        every: steps between two measurements; the first is before any step.
        log: file of one JSON object a line.
        samples: held-out pictures that attention is read from, and half of those answered.
    """
    processor = load_processor(MODEL_DIR)
    shipped = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Settings(**FURTHER | LABELS[name]), 0, Path(folder))
    trainer.model.load_state_dict(shipped.state_dict())
    launch.append(log, {"control": name, "settings": asdict(trainer.settings)})
    began = time.process_time()
    found: dict[str, float] = {}
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            # A copy with eager attention: the trainer's own kind does not return weights.
            attention = measure.image_attention(
                _eager(trainer.model.state_dict()),
                processor,
                samples,
                bool(trainer.settings.spelled),
            )
            line = {"control": name, "step": step, "losses": found} | attention
            line |= {"exact_match": trainer.watch(max(16, samples // 2))}
            seconds = round(time.process_time() - began, 1)
            launch.append(log, line | {"processor_seconds": seconds})
        if step < steps:
            found = {key: round(value, 4) for key, value in trainer.update(0.0).items()}


def phrase_numbers(tokens: list[str]) -> list[int]:
    """The number of the phrase that each token belongs to; a comma ends a phrase and is in it."""
    numbers, phrase = [], 0
    for token in tokens:
        numbers.append(phrase)
        phrase += "," in token
    return numbers


def phrase_overlap(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, scene: world.Scene
) -> dict[str, float]:
    """Overlap of the best 30 % of image tokens of two steps of one caption, by lag and phrase.

    Args:
        model: with attention that returns weights ("eager").
        processor: the model's.
        scene: what is captioned.

    Returns:
        "same LAG" and "other LAG" -> mean over layers and pairs of steps LAG apart that write
        tokens of one phrase or of two. A caption with no such pair lacks the key. Random sets
        overlap by 0.3.
    """
    weights, image, last = measure.caption_attention(model, processor, scene)
    # the row of a token is the step that writes the next one, so step i writes answer token i
    answer = measure.caption_tokens(processor, scene)
    phrases = torch.tensor(phrase_numbers(answer))
    head_mean = weights[:, :, last:, image.start : image.stop].mean(1)[:, : len(answer)]
    size = int(measure.BEST * len(image))
    # (layers, steps, image tokens): 1 for the most attended ones.
    best = torch.zeros_like(head_mean).scatter_(-1, head_mean.topk(size).indices, 1.0)
    found: dict[str, float] = {}
    for lag in (1, 2, 3):
        overlap = (best[:, :-lag] * best[:, lag:]).sum(-1).mean(0) / size  # (steps - lag,)
        same = phrases[:-lag] == phrases[lag:]
        for name, chosen in (("same", same), ("other", ~same)):
            if chosen.any():
                found[f"{name} {lag}"] = float(overlap[chosen].mean())
    return found


def compare_phrases(folder: Path, samples: int) -> dict[str, str]:
    """Mean overlap within and across phrases with 95 % intervals over pictures."""
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    processor = load_processor(folder)
    rng = np.random.default_rng([measure.WATCH_SEED, 5])
    each = [phrase_overlap(model, processor, world.draw(rng)) for _ in range(samples)]
    found = {}
    for key in sorted({key for one in each for key in one}):
        values = np.array([one[key] for one in each if key in one])
        found[key] = f"{mean_interval(values)} over {len(values)} pictures"
    return found


def main() -> None:
    """Run a control from the command line."""
    parser = argparse.ArgumentParser(description="Controls that need pictures.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    labels = kinds.add_parser("labels", help="train further with and without patch labels")
    labels.add_argument("--out", type=Path, required=True, help="file that lines are added to")
    labels.add_argument("--steps", type=int, default=600)
    labels.add_argument("--every", type=int, default=200)
    labels.add_argument("--only", nargs="+", choices=LABELS, default=list(LABELS))
    phrases = kinds.add_parser("phrases", help="overlap of steps within and across phrases")
    phrases.add_argument("--model", type=Path, default=MODEL_DIR, help="folder (default: shipped)")
    phrases.add_argument("--samples", type=int, default=64)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.kind == "labels":
        for name in chosen.only:
            further(name, chosen.steps, chosen.every, chosen.out)
    else:
        print(json.dumps(compare_phrases(chosen.model, chosen.samples), indent=1))


if __name__ == "__main__":
    main()
