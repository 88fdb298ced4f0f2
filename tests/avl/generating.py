"""Greedy runs of tiny models with and without a policy, and a batch's rows one by one."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

import avl
from tests import tiny

Inputs = dict[str, torch.Tensor]


def generate(
    model: Any, inputs: Inputs, steps: int = 12, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens (rows, steps) and logits (steps, rows, vocabulary); sampling starts from a fixed
    seed.
    """
    torch.manual_seed(0)
    options = {"do_sample": False, **options}
    out = model.generate(
        **inputs, max_new_tokens=steps, return_dict_in_generate=True, output_logits=True, **options
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits)


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest absolute difference of two sets of logits where they are finite; infinite if shapes
    differ, or what is not finite in one is anything else in the other. NaN differs from everything.
    """
    finite = torch.isfinite(first)
    if first.shape != second.shape or not torch.equal(first[~finite], second[~finite]):
        return float("inf")
    return float((first - second)[finite].abs().max().nan_to_num(float("inf")))


def rows_alone(
    model: LlavaForConditionalGeneration,
    batch: list[int],
    images: int | list[int] = 1,
    between: int = 0,
) -> tuple[Inputs, list[Inputs]]:
    """A left-padded batch, and each of its rows as a batch of its own without padding."""
    together = tiny.inputs(model, batch, images, between=between)
    counts = [images] * len(batch) if isinstance(images, int) else images
    alone, first = [], 0
    for row, count in enumerate(counts):
        kept = together["attention_mask"][row].bool()
        one = {
            name: together[name][row : row + 1, kept] for name in ("input_ids", "attention_mask")
        }
        if count:
            one["pixel_values"] = together["pixel_values"][first : first + count]
        first += count
        alone.append(one)
    return together, alone


def check_rows_alone(
    model: Any,
    together: Inputs,
    alone: Sequence[Inputs],
    policy: avl.Policy,
    steps: int,
    tolerance: float,
) -> None:
    """Under a policy every row of a batch gives the tokens, logits and usage that
    it gives alone."""
    with avl.adaptive(model, policy) as session:
        tokens, logits = generate(model, together, steps)
        usage = session.usage()
        for row, one in enumerate(alone):
            its_tokens, its_logits = generate(model, one, steps)
            assert torch.equal(its_tokens[0], tokens[row])
            assert difference(its_logits[:, 0], logits[:, row]) < tolerance
            for its_step, step in zip(session.usage().steps, usage.steps, strict=True):
                assert [held[0] for held in its_step.held] == [held[row] for held in step.held]
                assert [keys[0] for keys in its_step.attended] == [
                    keys[row] for keys in step.attended
                ]
