"""A-VL against traces of its authors' program: tokens, logits and cache lengths of a small LLaVA,
policy by policy.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

import avl
from avl import segments
from avl.buffer import KeyBuffer
from avl.cache import AdaptiveLayer
from avl.policies import adaptive as rules

FOLDER = Path(__file__).parents[1] / "data" / "avl_reference"
TRACE = json.loads((FOLDER / "trace.json").read_text())
CASES = list(TRACE["cases"])


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(
        FOLDER / "model", dtype=torch.float32
    ).eval()


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
    ids = (
        TRACE["system_ids"]
        + [TRACE["image_token_id"]] * TRACE["n_image_tokens"]
        + TRACE["question_ids"]
    )
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
def test_tokens_logits_and_cache_lengths_equal_the_authors_program(
    model: Any, tensors: Any, case: str
) -> None:
    expected = TRACE["cases"][case]
    tokens, logits, lengths = run(model, tensors, policy_of(case), len(expected["tokens"]))
    assert tokens == expected["tokens"]
    assert (logits - tensors[f"logits/{case}"]).abs().max() < 1e-3
    assert lengths == expected["cache_lengths"]


def _whole_one_step_late(self: avl.AdaptivePolicy, step: int) -> bool:
    return (step - 1) % self.refresh_every == 0


def _best_head(self: avl.AdaptivePolicy, weights: torch.Tensor) -> torch.Tensor:
    return weights.amax(1)


def _first_head(self: avl.AdaptivePolicy, weights: torch.Tensor) -> torch.Tensor:
    return weights[:, 0]


def _no_accumulation(self: avl.AdaptivePolicy) -> bool:
    return False


def _held_length(self: AdaptiveLayer) -> int:
    return self.filled_buffer.filled if self.buffer else 0


def _worst_core(buffer: KeyBuffer, scores: torch.Tensor, rows: Any = None) -> None:
    _refresh_core(buffer, -scores, rows)


_refresh_core = segments.refresh_core

MUTATIONS: dict[str, tuple[str, Any, str, Any]] = {
    "heavy share 0.5 instead of 0.7": ("text", rules, "HEAVY_SHARE", 0.5),
    "no floor under the text budget": ("vision_text", rules, "TEXT_FLOOR", 1),
    "refresh one step late": ("vision", avl.AdaptivePolicy, "is_refresh", _whole_one_step_late),
    "largest head instead of the mean": (
        "vision_no_refresh",
        avl.AdaptivePolicy,
        "rank",
        _best_head,
    ),
    "the first head alone ranks the prefill filter": (
        "prefill",
        avl.AdaptivePolicy,
        "rank",
        _first_head,
    ),
    "decode steps do not add to text scores": (
        "text",
        avl.AdaptivePolicy,
        "accumulates",
        property(_no_accumulation),
    ),
    "a refresh keeps the worst": ("prefill_vision", segments, "refresh_core", _worst_core),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_rule_does_not_reproduce_the_trace(
    model: Any, tensors: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case, place, attribute, wrong = MUTATIONS[name]
    monkeypatch.setattr(place, attribute, wrong)
    assert not agrees(model, tensors, case, policy_of(case))


def test_positions_counted_from_the_keys_held_are_noticed(
    model: Any, tensors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdaptiveLayer, "get_seq_length", _held_length)
    with pytest.raises(avl.HookError, match="holds 74 tokens, of which 106"):
        agrees(model, tensors, "vision", policy_of("vision"))


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("vision", {"refresh_every": 2}),
        ("vision", {"core": 0.29}),
        ("vision_no_refresh", {"secondary": 0.52}),
        ("prefill", {"prefill_layer": 1}),
        ("vision_text", {"text": 0.65}),
    ],
)
def test_another_policy_does_not_reproduce_the_trace(
    model: Any, tensors: Any, case: str, change: dict[str, Any]
) -> None:
    assert not agrees(model, tensors, case, replace(policy_of(case), **change))
