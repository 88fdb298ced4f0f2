"""Record a model while it answers a list of questions.

Between `record`, which knows nothing about prompts, and the command line, which knows nothing about models. Every
sample of the recording carries what it was: prompt, answer, and the truth where the question came with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from avl_analysis.models import VLM
from avl_analysis.recorder import record
from avl_analysis.recording import Recording
from avl_analysis.samples import Sample

OnToken = Callable[[int, int], None]
"""Called after every token with (number of the sample, new tokens so far), to show progress."""


def record_samples(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    system: str | None = None,
    max_new_tokens: int = 64,
    generate: Mapping[str, Any] | None = None,
    on_token: OnToken | None = None,
    **options: Any,
) -> Recording:
    """Record the model while it answers each question, one after the other.

    Args:
        vlm: a loaded model.
        samples: the questions; sample i of the recording is `samples[i]`, and its facts hold id, prompt, answer, and
            task, answers that count as right, regions and meta where known.
        system: system prompt of all of them.
        max_new_tokens: longest answer, in tokens.
        generate: further arguments of `model.generate`; greedy by default.
        on_token: see `OnToken`.
        options: passed on to `record`.

    Raises:
        InputError: pictures or prompts that cannot be used, layers or heads out of range.
    """
    arguments = {"do_sample": False, "max_new_tokens": max_new_tokens, **(generate or {})}
    with record(vlm.model, **options) as recording:
        for index, sample in enumerate(samples):
            inputs = vlm.prepare(list(sample.images), sample.prompt, system=system)
            length = inputs["input_ids"].shape[1]
            watch = [_Watch(index, length, on_token)] if on_token else []
            out = vlm.model.generate(**inputs, stopping_criteria=StoppingCriteriaList(watch), **arguments)
            answer = vlm.processor.batch_decode(out[:, length:], skip_special_tokens=True)[0].strip()
            recording.annotate(index, answer=answer, **facts_of(sample))
    recording.attrs |= {"model": vlm.name, "model_revision": vlm.revision or ""}
    return recording


def facts_of(sample: Sample) -> dict[str, Any]:
    """What is known of a sample, as `Recording.annotate` takes it; files by path, pictures in memory not at all."""
    facts: dict[str, Any] = {"id": sample.id, "prompt": sample.prompt}
    if files := [str(image) for image in sample.images if isinstance(image, (str, Path))]:
        facts["images"] = files
    if sample.answers is not None:
        facts["answers"] = list(sample.answers)
    if sample.task:
        facts["task"] = sample.task
    if sample.regions:
        facts["regions"] = [list(box) for box in sample.regions]
    if sample.meta:
        facts["meta"] = dict(sample.meta)
    return facts


class _Watch(StoppingCriteria):
    """Never stops anything; unlike a streamer, `generate` allows it for batches too."""

    def __init__(self, index: int, prompt: int, on_token: OnToken) -> None:
        self.index, self.prompt, self.on_token = index, prompt, on_token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.on_token(self.index, input_ids.shape[1] - self.prompt)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
