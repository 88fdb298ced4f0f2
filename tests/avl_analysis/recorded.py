"""Tiny models recorded next to what eager attention returns for the same run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from avl.places import remember_originals
from avl_analysis.capture.recorder import record
from avl_analysis.recordings.recording import Recording
from tests import tiny
from tests.reference import Seen

STEPS = 5


def run(
    model: LlavaForConditionalGeneration,
    batch: dict[str, torch.Tensor],
    steps: int = STEPS,
    **options: Any,
) -> tuple[Recording, list[Seen]]:
    """Record a greedy generation of an eager model; the recording, and every sample as the model
    itself returned it.
    """
    with record(model, **options) as recording:
        output = model.generate(
            **batch,
            max_new_tokens=steps + 1,
            do_sample=False,
            output_attentions=True,
            return_dict_in_generate=True,
        )
    return recording, [seen(recording, output, batch, b) for b in range(len(batch["input_ids"]))]


def seen(recording: Recording, output: Any, batch: dict[str, torch.Tensor], b: int) -> Seen:
    """One row of the batch without its padding (on the left)."""
    first = int((batch["attention_mask"][b] == 0).sum())
    prompt, *steps = [torch.stack(pass_)[:, b].double().numpy() for pass_ in output.attentions]
    cache = output.past_key_values.layers
    values = torch.stack([layer.values[b, :, first:] for layer in cache]).double()
    keys = torch.stack([layer.keys[b, :, first : prompt.shape[2]] for layer in cache]).double()
    tokens = recording.tokens.isel(sample=b)
    length = prompt.shape[2] - first + len(steps)
    names = ("modality", "image", "row", "column", "frame")
    facts = {name: tokens[name].values[:length] for name in names}
    norm = values.norm(dim=-1).repeat_interleave(prompt.shape[1] // values.shape[1], 1).numpy()
    return Seen(
        prompt[:, :, first:, first:],
        [step[:, :, 0, first:] for step in steps],
        value_norm=norm,
        keys=keys.numpy(),
        **facts,
    )


CASES: dict[str, dict[str, Any]] = {
    "one picture": {"batch": [9]},
    "left-padded batch": {"batch": [9, 4]},
    "several pictures": {"batch": [6, 3], "images": [2, 1], "between": 4},
    "no picture": {"batch": [7, 5], "images": 0},
    "pictures in some rows": {"batch": [5, 9], "images": [0, 1]},
    "one token": {"batch": [1], "images": 0, "system": 0},
    "picture first, no system tokens": {"batch": [5], "system": 0},
    "videos, a picture beside one": {"batch": [6, 3], "images": [4, 2], "between": 1},
}

FRAMES: dict[str, list[list[int]]] = {"videos, a picture beside one": [[3, 0], [2]]}
"""Of cases with videos: how many of a row's pictures are the frames of each, 0 for a picture."""


def case_inputs(model: LlavaForConditionalGeneration, name: str) -> dict[str, torch.Tensor]:
    """Inputs of one of `CASES`."""
    batch = tiny.inputs(model, **CASES[name])
    if name in FRAMES:
        remember_originals(
            batch, [[(30, 20)] * len(row) for row in FRAMES[name]], None, FRAMES[name]
        )
    return batch


def model(
    kv_heads: int = 4, grid: int = 4, attn: str = "eager", **options: Any
) -> LlavaForConditionalGeneration:
    return tiny.llava(kv_heads, layers=3, grid=grid, attn=attn, **options)


def close(one: Any, other: Any, tolerance: float = 2e-5) -> None:
    """Equal up to float32 rounding, and undefined in the same places."""
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=tolerance, atol=tolerance)
