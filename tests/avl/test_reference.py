"""A-VL against traces of its authors' program: tokens, logits and cache lengths of a small LLaVA, policy by policy."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

import avl

FOLDER = Path(__file__).parents[1] / "data" / "avl_reference"
TRACE = json.loads((FOLDER / "trace.json").read_text())
CASES = list(TRACE["cases"])


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(FOLDER / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "trace.safetensors")


def policy_of(case: str) -> avl.AdaptivePolicy:
    given = TRACE["cases"][case]["policy"]
    return avl.AdaptivePolicy(
        secondary=given.get("S"),
        core=given.get("C"),
        refresh_every=given.get("K", 0),
        text=given.get("T"),
        prefill=given.get("P"),
        prefill_layer=given.get("prefill_layer", 2),
    )


def run(
    model: Any, tensors: dict[str, torch.Tensor], policy: avl.Policy, steps: int
) -> tuple[list[int], torch.Tensor, Any]:
    """Greedy tokens, logits (steps, vocabulary) and cache lengths of every pass."""
    ids = TRACE["system_ids"] + [TRACE["image_token_id"]] * TRACE["n_image_tokens"] + TRACE["question_ids"]
    with avl.adaptive(model, policy) as session:
        out = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            pixel_values=tensors["pixel_values"],
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    lengths = [[held[0] for held in step.held] for step in session.usage().steps]
    return out.sequences[0, len(ids) :].tolist(), torch.stack(out.logits)[:, 0], lengths


def agrees(model: Any, tensors: dict[str, torch.Tensor], case: str, policy: avl.Policy) -> bool:
    expected = TRACE["cases"][case]
    tokens, logits, lengths = run(model, tensors, policy, len(expected["tokens"]))
    return (
        tokens == expected["tokens"]
        and bool((logits - tensors[f"logits/{case}"]).abs().max() < 1e-3)
        and lengths == expected["cache_lengths"]
    )


@pytest.mark.parametrize("case", CASES)
def test_tokens_logits_and_cache_lengths_equal_the_authors_program(model: Any, tensors: Any, case: str) -> None:
    expected = TRACE["cases"][case]
    tokens, logits, lengths = run(model, tensors, policy_of(case), len(expected["tokens"]))
    assert tokens == expected["tokens"]
    assert (logits - tensors[f"logits/{case}"]).abs().max() < 1e-3
    assert lengths == expected["cache_lengths"]
