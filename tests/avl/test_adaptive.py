"""A-VL's rules against a slow, masked statement of them, and its validation."""

from typing import Any

import pytest
import torch

import avl
from tests import tiny
from tests.avl.generating import check_rows_alone, difference, generate, rows_alone
from tests.avl.masked import masked_avl

MODELS: dict[str, dict[str, Any]] = {
    "MHA": {"grid": 5},
    "GQA": {"grid": 5, "kv_heads": 2},
    "GQA, eager, 3 layers": {"grid": 5, "kv_heads": 2, "attn": "eager", "layers": 3},
}
MIXED = "one, no, two and three images, text between"
BATCHES: dict[str, dict[str, Any]] = {
    "one row": {"batch": [35]},
    "unequal prompts": {"batch": [30, 60, 9]},
    MIXED: {"batch": [25, 50, 40, 8], "images": [1, 0, 2, 3], "between": 11},
}
RULES: dict[str, dict[str, Any]] = {
    "paper": {"secondary": 0.5, "core": 0.3, "every": 3, "text": 0.7},
    "small": {"secondary": 0.4, "core": 0.1, "every": 2, "text": 0.3},
    "no core": {"secondary": 0.5, "core": 0.5, "every": 0, "text": 0.5},
}


@pytest.mark.parametrize(
    ("model", "batch", "rules"),
    [
        ("MHA", "one row", "paper"),
        ("MHA", "unequal prompts", "small"),
        ("GQA", "unequal prompts", "no core"),
        ("GQA", MIXED, "paper"),
        ("GQA", MIXED, "small"),
        ("GQA, eager, 3 layers", "unequal prompts", "small"),
    ],
)
def test_dropping_keys_gives_what_masking_them_gives(model: str, batch: str, rules: str) -> None:
    vlm, inputs, rule = tiny.llava(**MODELS[model]), BATCHES[batch], RULES[rules]
    inputs = tiny.inputs(vlm, **inputs)
    with masked_avl(vlm, **rule):
        tokens, logits = generate(vlm, inputs, 16)
    policy = avl.AdaptivePolicy(
        secondary=rule["secondary"],
        core=rule["core"],
        refresh_every=rule["every"],
        text=rule["text"],
    )
    with avl.adaptive(vlm, policy):
        dropped, dropped_logits = generate(vlm, inputs, 16)
    assert torch.equal(tokens, dropped)
    assert difference(logits, dropped_logits) < 1e-4


@pytest.mark.parametrize(
    "policy",
    [
        avl.AdaptivePolicy(),
        avl.AdaptivePolicy(text=0.4, refresh_every=2),
        avl.AdaptivePolicy(text=0.5, prefill=0.6, prefill_layer=1),
        avl.AdaptivePolicy.for_budget(0.4),
    ],
    ids=["paper", "small text", "prefill filter", "budget"],
)
@pytest.mark.parametrize(
    ("model", "batch"),
    [("MHA", MIXED), ("GQA", "unequal prompts"), ("GQA, eager, 3 layers", MIXED)],
)
def test_every_row_of_a_padded_batch_equals_that_row_alone(
    model: str, batch: str, policy: avl.Policy
) -> None:
    vlm = tiny.llava(**MODELS[model])
    check_rows_alone(vlm, *rows_alone(vlm, **BATCHES[batch]), policy, steps=30, tolerance=1e-4)


def test_the_smallest_policy_still_works() -> None:
    vlm = tiny.llava()
    inputs = tiny.inputs(vlm, [30, 5])
    with avl.adaptive(
        vlm, avl.AdaptivePolicy(secondary=0.05, core=0.01, refresh_every=1, text=0.01)
    ) as session:
        generate(vlm, inputs, 5)
    assert session.usage().steps[-1].held[0] == (3 + 0 + 20, 3 + 0 + 5 + 4)


@pytest.mark.parametrize("budget", [0.75, 0.5, 0.35])
def test_for_budget_holds_at_most_the_budget_at_every_step(budget: float) -> None:
    vlm = tiny.llava(grid=10)
    with avl.adaptive(vlm, avl.AdaptivePolicy.for_budget(budget)) as session:
        generate(vlm, tiny.inputs(vlm, [9]), 90)
    steps = session.usage().steps
    assert steps[0].held[0][0] == int(budget * steps[0].seen)
    assert all(step.held[0][0] <= budget * step.seen + 1 for step in steps)
    assert steps[-1].held[0][0] > 0.8 * budget * steps[-1].seen


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"secondary": 0.0}, "share that is kept"),
        ({"secondary": 1.5}, "got 1.5"),
        ({"text": -0.1}, "None to switch its rule off"),
        ({"core": 0.6}, "chosen among the secondary ones"),
        ({"secondary": 0.5, "core": 0.3, "prefill": 0.4}, "prefill filter removed"),
        ({"refresh_every": -1}, "0 switches the core off"),
        ({"prefill_layer": 0}, "at least one layer"),
        ({"budget": 2}, "got 2"),
    ],
)
def test_values_out_of_range_are_refused_with_a_message_that_teaches(
    wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        avl.AdaptivePolicy(**wrong)


@pytest.mark.parametrize("wrong", [{"secondary": "0.5"}, {"refresh_every": 2.5}, {"text": True}])
def test_values_of_the_wrong_type_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be a"):
        avl.AdaptivePolicy(**wrong)
