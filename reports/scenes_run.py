"""Record the embedded model on drawn scenes, with everything a report wants to know about each sample.

Tasks take turns, so that any number of samples covers all of them evenly. Pictures are not stored: the recording keeps
the scene's seed, from which picture, truth and what every word is about (`regions`) can be had again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from avl_analysis import scenes
from avl_analysis.models import VLM
from avl_analysis.recorder import record
from avl_analysis.recording import Recording
from avl_analysis.scenes import Sample

SEED = 7
"""Held-out scenes of this seed make the default report."""
_MAX_NEW_TOKENS = 96


def draw_samples(count: int, seed: int = SEED) -> list[Sample]:
    """`count` held-out scenes, tasks in turn."""
    return [scenes.generate(seed, index, scenes.TASKS[index % len(scenes.TASKS)]) for index in range(count)]


def record_scenes(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    batch: int = 4,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Recording:
    """Record the model answering each sample's question.

    Args:
        batch: samples per pass; samples with the same task go together, because they decode about equally long.
        progress: called with the number of samples done after each pass.
        options: go to `record`.
    """
    order = sorted(range(len(samples)), key=lambda index: (samples[index].task, index))
    done = 0
    with record(vlm.model, **options) as recording:
        for start in range(0, len(order), batch):
            chosen = [samples[index] for index in order[start : start + batch]]
            inputs = vlm.prepare([sample.picture for sample in chosen], [sample.prompt for sample in chosen])
            out = vlm.model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            for row, sample in enumerate(chosen):
                recording.annotate(row - len(chosen), **facts(vlm, sample, new[row].tolist()))
            done += len(chosen)
            if progress is not None:
                progress(done)
    recording.attrs |= {"model_name": vlm.name, "data": f"scenes, seed {samples[0].seed}, {len(samples)} samples"}
    if vlm.revision:
        recording.attrs["model_revision"] = vlm.revision
    return recording


def facts(vlm: VLM, sample: Sample, tokens: list[int]) -> dict[str, Any]:
    """What to remember about a sample: question, answer as text and word by word, truth, and how to draw it again."""
    tokenizer = vlm.processor.tokenizer
    end = tokenizer.eos_token_id
    tokens = tokens[: tokens.index(end)] if end in tokens else tokens
    return {
        "task": sample.task,
        "prompt": sample.prompt,
        "answer": tokenizer.decode(tokens).strip(),
        "truth": sample.answer,
        "words": [tokenizer.decode([token]) for token in tokens],
        "boxes": [list(map(int, box)) for box in sample.boxes],
        "patches": list(map(int, sample.patches)),
        "scene": {"seed": sample.seed, "index": sample.index, "task": sample.task},
    }
