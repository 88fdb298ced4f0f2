"""What each training step is made of: a function of the stage, the settings and the step's number.

A run that was stopped therefore goes on with exactly the data it would have had, and the data of
later steps can be made by other processes ahead of time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from avl_analysis.scenes import world
from avl_analysis.scenes.language import pixel_values
from avl_analysis.scenes.samples import TRAINING_SEED
from avl_analysis.scenes.training.large import conversations, reader, texts
from avl_analysis.scenes.training.large.conversations import TuningBatch
from avl_analysis.scenes.training.large.language import IMAGE_TOKENS

STAGES = ("text", "vision", "tune")
HIDDEN_MOST = 0.6
"""Largest share of a picture's image tokens that tuning hides from answers."""


@dataclass(frozen=True)
class StageSettings:
    """What shapes a stage. Shares and weights are 0 to 1, rates are of AdamW unless named."""

    rate: float = 2e-3
    vision_rate: float = 1e-3
    muon_rate: float = 0.0
    """Above 0, the decoder's matrices are trained with Muon at this rate."""
    weight_decay: float = 0.1
    warm_up: int = 100
    anneal_from: int = 0
    """Step from which the rates fall linearly to zero at the last one; 0 keeps them constant."""
    text_rows: int = 16
    text_length: int = 224
    bare: float = 0.7
    """Share of the rows of text that begin with ``<s>`` alone, without the system text."""
    chain: float = 0.2
    repeat: float = 0.2
    """Shares of the kinds of text; the rest are described scenes."""
    chains_until: int = 0
    """Step up to which the text stage has chains only."""
    answers_only: int = 0
    """1: the loss of rows of text is on the tokens of answers only, of which only described scenes
    have any."""
    pictures: int = 16
    tune_text_rows: int = 3
    text_weight: float = 0.3
    reader_weight: float = 0.5
    hide: float = 0.0
    """Share of tuning's pictures of which a random part of the image tokens, up to `HIDDEN_MOST`,
    is hidden from the tokens that answer (the question still sees all), so that the model learns to
    do with a part. Attention itself is in no loss."""
    seed: int = 0
    processes: int = 1
    workers: int = 0
    """Processes that make data ahead; 0 makes it in the training process."""
    log_seconds: float = 20.0
    watch_seconds: float = 150.0
    save_seconds: float = 150.0

    def factor(self, step: int, last: int) -> float:
        """What the rates are multiplied with at a step of a stage that ends at step ``last``."""
        # The last step has a factor just above 0.
        falling = self.anneal_from and step > self.anneal_from
        left = (last - step) / (last - self.anneal_from) if falling else 1.0
        return min(1.0, (step + 1) / self.warm_up) * left


@dataclass
class Step:
    """The data of one step; what a stage does not use is None."""

    text: texts.Rows | None = None
    pixels: Tensor | None = None  # (B, 3, 96, 96) float32
    labels: dict[str, Tensor] | None = None  # the reader's truth
    batch: TuningBatch | None = None
    hidden: Tensor | None = None  # (B, I) bool, image tokens that answers do not see

    def to(self, device: torch.device) -> Step:
        """The same data on another device."""
        return Step(
            self.text and self.text.to(device),
            None if self.pixels is None else self.pixels.to(device),
            self.labels and {group: label.to(device) for group, label in self.labels.items()},
            self.batch and self.batch.to(device),
            None if self.hidden is None else self.hidden.to(device),
        )


class Steps(Dataset[Step]):
    """The data of every step of a stage, by number."""

    def __init__(self, stage: str, settings: StageSettings, rank: int) -> None:
        self.stage, self.settings, self.rank = stage, settings, rank

    def __getitem__(self, step: int) -> Step:
        s, found = self.settings, Step()
        # Stages, processes and steps each have their own scenes and texts.
        rng = np.random.default_rng(
            [TRAINING_SEED + 1000 * s.seed, STAGES.index(self.stage), self.rank, step]
        )
        rows = {"text": s.text_rows, "vision": 0, "tune": s.tune_text_rows}[self.stage]
        if rows:
            kinds = {"scene": 1 - s.chain - s.repeat, "chain": s.chain, "repeat": s.repeat}
            if self.stage == "text" and step < s.chains_until:
                kinds = {"chain": 1.0}
            found.text = texts.rows(rng, rows, s.text_length, s.bare, kinds)
            if s.answers_only:
                # Rows without an answer then have no weight; `mean_loss` gives 0 where no row has
                # any.
                found.text.weights *= texts.answering(found.text.ids)
        if self.stage != "text":
            scenes = [world.draw(rng) for _ in range(s.pictures)]
            found.pixels = pixel_values(np.stack([scene.image for scene in scenes]))
            found.labels = reader.labels(scenes)
            if self.stage == "tune":
                found.batch = conversations.make(rng, scenes)
                if s.hide:
                    # Drawn last, so that scenes and questions are the same with and without it.
                    share = rng.random(s.pictures) * HIDDEN_MOST * (rng.random(s.pictures) < s.hide)
                    places = rng.random((s.pictures, IMAGE_TOKENS)) < share[:, None]
                    found.hidden = torch.from_numpy(places)
        return found
