"""Tiny loaded models and samples for tests that need a processor and prompts, not just tensors."""

from __future__ import annotations

from avl_analysis.corpus.questions import Sample
from avl_analysis.models.loading import VLM
from tests import tiny


def vlm(kv_heads: int = 2, *, stops: bool = False, **sizes: int) -> VLM:
    """A random LLaVA with its processor; with `stops`, some answers end early by themselves."""
    model = tiny.llava(kv_heads, **sizes)
    if stops:
        model.generation_config.eos_token_id = list(range(60, 90))
    return VLM("tiny", model, tiny.processor(model), "tests", None, "tiny random LLaVA")


def questions(count: int = 4) -> list[Sample]:
    """Prompts of different lengths about different pictures, every second one with a (wrong)
    answer.
    """
    words = [
        "what is the colour",
        "where is the red picture",
        "describe the image",
        "what is blue and where is it?",
    ]
    return [
        Sample(
            id=f"q{i}",
            images=(tiny.picture(seed=i),),
            prompt=words[i % len(words)],
            answers=("red",) if i % 2 else None,
            task="even" if i % 2 == 0 else "odd",
        )
        for i in range(count)
    ]
