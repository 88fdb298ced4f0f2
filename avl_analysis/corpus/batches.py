"""Which samples go through the model together, and what happens when a batch fails.

Used by everything that runs a model over many samples: recording, comparisons, the frontier and
the ablation of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from avl import UnsupportedModelError
from avl_analysis.corpus.questions import Sample
from avl_analysis.models.loading import VLM
from avl_analysis.models.prompts import Conversation, render

FAILURES = (RuntimeError, ValueError, OSError, MemoryError, ArithmeticError, LookupError)
"""Errors that concern the samples of one batch rather than the whole run."""
ANSWER_SLACK = 2
"""Tokens an answer may be longer than the longest right one: its end token, and one too many."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Failure:
    """Why a sample could not be measured."""

    reason: str


def halve_on_failure(
    run: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]
) -> list[R | Failure]:
    """`run(items)`, or the same on both halves where that fails, down to items that fail alone.

    Memory errors are dealt with the same way: what does not fit at once may fit in halves.

    Args:
        run: returns one result per item.
        items: samples, or anything that stands for them.

    Returns:
        One result or `Failure` per item, in order.

    Raises:
        UnsupportedModelError: the model, not a sample, is the reason.
    """
    results: list[R | Failure] = []
    # A part is one failed sample, or samples that went through together.
    for _, found in halved(run, items):
        results += [found] if isinstance(found, Failure) else list(found)
    return results


def halved(
    run: Callable[[Sequence[T]], R],
    items: Sequence[T],
    failures: tuple[type[Exception], ...] = FAILURES,
) -> list[tuple[Sequence[T], R | Failure]]:
    """The parts of `items` that `run` could do at once, each with its result.

    Args:
        run: returns one result for all items it is given.
        items: samples, or anything that stands for them.
        failures: errors that concern single items; any other is raised.

    Returns:
        (part, result) in order, the parts together are `items`; with a `Failure` the part is a
        single item.

    Raises:
        UnsupportedModelError: the model, not a sample, is the reason.
    """
    if not items:
        return []
    try:
        return [(items, run(items))]
    except UnsupportedModelError:
        raise
    except failures as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    # Outside the handler: its traceback would keep the tensors of the failed pass alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(items) == 1:
        return [(items, Failure(reason))]
    half = len(items) // 2
    return halved(run, items[:half], failures) + halved(run, items[half:], failures)


def prompt_lengths(vlm: VLM, samples: Sequence[Sample]) -> list[int]:
    """Tokens of each prompt as the model is given it, an image counted as one.

    Samples with equally many images and the same length need no padding together.

    Raises:
        InputError: prompts that the model's chat template cannot take.
    """
    texts = [
        render(vlm.processor, Conversation(sample.prompt, vlm.marks(sample.images)))
        for sample in samples
    ]
    return [len(row) for row in vlm.processor.tokenizer(texts)["input_ids"]]


def batches_by_length(vlm: VLM, samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    """Indices of samples whose prompts have the same length, so that nothing is padded."""
    # Tokens of the text alone: equally many image tokens are the caller's to know (one task of
    # drawn scenes has one picture of one size).
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(prompt_lengths(vlm, samples)):
        by_length.setdefault(length, []).append(index)
    return [
        indices[start : start + batch_size]
        for _, indices in sorted(by_length.items())
        for start in range(0, len(indices), batch_size)
    ]


def batches_of_similar_length(
    vlm: VLM, samples: Sequence[Sample], batch_size: int
) -> list[list[int]]:
    """Indices of samples in full batches, sorted by number of images and length of the prompt.

    Samples without an image never share a batch with samples that have one, because many
    processors refuse such a mixture.
    """
    lengths = prompt_lengths(vlm, samples)
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].images), lengths[i], i))
    batches: list[list[int]] = []
    for index in order:
        # Sorted by the number of images, so samples without one come first and this happens once.
        mixed = batches and bool(samples[batches[-1][0]].images) != bool(samples[index].images)
        if not batches or mixed or len(batches[-1]) == batch_size:
            batches.append([])
        batches[-1].append(index)
    return batches


def longest_right_answer(vlm: VLM, samples: Sequence[Sample]) -> int:
    """Tokens after which an answer to any of the samples can no longer be a right one."""
    # Of several right wordings the first stands for all; unknown answers count as empty.
    texts = [(sample.answers or ("",))[0] for sample in samples]
    ids = vlm.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return max(map(len, ids)) + ANSWER_SLACK


@contextmanager
def images_encoded_once(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Inside, a vision tower that is shown the same pixels as last time repeats its last output.

    Yields:
        A function that makes it forget the last output, for policies that watch the tower.
    """
    tower = getattr(getattr(model, "base_model", model), "vision_tower", None)
    if tower is None:
        yield lambda: None
        return
    forward = tower.forward
    # Pixels, arguments and output of the last call.
    last: dict[str, Any] = {}

    def remembered(pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Compared by content: samples of a group show other tensors with equal pixels.
        same = (
            bool(last)
            and last["arguments"] == (args, kwargs)
            and torch.equal(last["pixels"], pixel_values)
        )
        if not same:
            output = forward(pixel_values, *args, **kwargs)
            last.update(pixels=pixel_values, arguments=(args, kwargs), output=output)
        return last["output"]

    tower.forward = remembered
    try:
        yield last.clear
    finally:
        # The instance attribute goes, and the class's own method is what is left.
        del tower.forward
