"""Baselines at equal bytes: real bytes, rows alone, and what each formula keeps."""

from typing import Any

import pytest
import torch

import avl
from avl.policies import registry
from avl.policies.checks import PolicyWarning
from tests import tiny
from tests.avl.generating import check_rows_alone, difference, generate, rows_alone

BASELINES = [
    avl.RandomPolicy,
    avl.StridePolicy,
    avl.StreamingPolicy,
    avl.H2OPolicy,
    avl.SnapKVPolicy,
    avl.FastVPolicy,
    avl.VLCachePolicy,
    avl.PrefixKVPolicy,
    avl.MixKVPolicy,
    avl.AdaSnapKVPolicy,
    avl.SCOPEPolicy,
    avl.DivPrunePolicy,
]


def held_positions(session: avl.AdaptiveSession, layer: int, row: int = 0) -> list[set[int]]:
    """Positions each key/value head holds at the end."""
    state = session.selection.state(layer)[row]
    return [set((head > avl.State.MINOR).nonzero()[:, 0].tolist()) for head in state]


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("budget", [0.5, 0.1])
def test_bytes_held_are_the_budget_after_the_prompt_and_after_every_step(
    baseline: Any, budget: float
) -> None:
    model = tiny.llava(kv_heads=2, layers=4, grid=8)
    with avl.adaptive(model, baseline(budget=budget)) as session:
        generate(model, tiny.inputs(model, [13]), 20)
    key = (
        4 * 2 * 16 * 2 * 4
    )  # bytes of one position in all layers: layers, heads, head dim, keys and values, float32
    for step in session.usage().steps:
        assert abs(step.filled - budget * step.full) <= key
        assert step.full == step.seen * key


@pytest.mark.parametrize("baseline", [*BASELINES, avl.DownsamplePolicy])
@pytest.mark.parametrize("budget", [0.5, 0.1])
def test_every_row_of_a_padded_batch_equals_that_row_alone(baseline: Any, budget: float) -> None:
    model = tiny.llava(kv_heads=2, layers=3, grid=5)
    rows = rows_alone(model, [25, 50, 8], [1, 0, 2], between=11)
    check_rows_alone(model, *rows, baseline(budget=budget), steps=16, tolerance=1e-4)


@pytest.mark.parametrize("baseline", [*BASELINES, avl.DownsamplePolicy])
def test_the_whole_budget_changes_nothing(baseline: Any) -> None:
    model = tiny.llava(kv_heads=2, layers=3, grid=5)
    inputs = tiny.inputs(model, [25, 8], images=[1, 2], between=3)
    tokens, logits = generate(model, inputs)
    with avl.adaptive(model, baseline(budget=1)):
        same_tokens, same_logits = generate(model, inputs)
    assert torch.equal(tokens, same_tokens)
    assert difference(logits, same_logits) < 1e-4


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_budget_in_image_tokens_holds_as_many_keys_as_text_and_these(baseline: Any) -> None:
    model = tiny.llava(kv_heads=2, layers=4, grid=8)
    with avl.adaptive(model, baseline(budget_tokens=20)) as session:
        generate(model, tiny.inputs(model, [13]), 12)
    for step in session.usage().steps:
        held = [layer[0] for layer in step.held]
        allowed = 4 * (3 + 20 + 13 + step.step)
        # A layer with more than its part of the text cannot gain more than one key per step.
        assert allowed - 4 - step.step <= sum(held) <= allowed


@pytest.mark.parametrize("policy", [avl.SnapKVPolicy(window=40), avl.MixKVPolicy(window=28)])
def test_a_window_as_long_as_the_prompt_is_said(policy: avl.Policy) -> None:
    model = tiny.llava()
    with (
        avl.adaptive(model, policy),
        pytest.warns(PolicyWarning, match="is no less than the 28 tokens of a prompt"),
    ):
        generate(model, tiny.inputs(model, [9]), 1)


def run(policy: avl.Policy, question: int = 6, steps: int = 2, **model: Any) -> avl.AdaptiveSession:
    """One picture of 16 tokens at positions 3 .. 18, then a question; `steps` - 1 decode steps."""
    vlm = tiny.llava(**model)
    with avl.adaptive(vlm, policy) as session:
        generate(vlm, tiny.inputs(vlm, [question]), steps)
    return session


def test_stride_keeps_every_second_image_token_at_half_of_the_image() -> None:
    # 25 tokens, of which 9 are no image; 17/25 leaves room for 8 of the 16
    session = run(avl.StridePolicy(budget=17 / 25 + 1e-6), steps=1)
    assert held_positions(session, 0) == [{0, 1, 2, *range(3, 19, 2), *range(19, 25)}]


def test_streaming_keeps_the_first_four_and_the_newest() -> None:
    session = run(avl.StreamingPolicy(budget=0.5), steps=6)
    assert held_positions(session, 1) == [{0, 1, 2, 3, *range(19, 30)}]


def test_random_draws_differ_between_layers_and_follow_the_seed() -> None:
    first, again, other = (run(avl.RandomPolicy(budget=0.6, seed=s), steps=1) for s in (1, 1, 2))
    assert held_positions(first, 0) == held_positions(again, 0)
    assert held_positions(first, 0) != held_positions(other, 0)
    assert held_positions(first, 0) != held_positions(first, 1)


def test_snapkv_keeps_the_observation_window_and_differs_between_heads() -> None:
    session = run(avl.SnapKVPolicy(budget=0.5, window=4), steps=1, kv_heads=2)
    first, second = held_positions(session, 0)
    assert {21, 22, 23, 24} <= first & second
    assert first != second


def test_h2o_keeps_the_newest_half() -> None:
    session = run(avl.H2OPolicy(budget=0.5), steps=5)
    for held in held_positions(session, 0):
        assert len(held) == 14
        assert set(range(29 - 7, 29)) <= held


def test_fastv_lets_all_layers_hold_the_same_image_tokens() -> None:
    session = run(avl.FastVPolicy(budget=0.6, prefill_layer=2), steps=1, layers=4)
    assert len({frozenset(held_positions(session, layer)[0]) for layer in range(4)}) == 1
    attended = session.usage().steps[0].attended
    assert [layer[0] for layer in attended] == [25, 25, 15, 15]


def test_vl_cache_gives_layers_different_shares_with_the_budget_as_their_mean() -> None:
    session = run(avl.VLCachePolicy(budget=0.5, threshold=0.1), steps=1, layers=4)
    held = [layer[0] for layer in session.usage().steps[0].held]
    assert len(set(held)) > 1
    assert 0.5 * 25 * 4 - 4 <= sum(held) <= 0.5 * 25 * 4


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: avl.RandomPolicy(budget=0), "share that is kept"),
        (lambda: avl.StreamingPolicy(sinks=-1), "sinks must be >= 0"),
        (lambda: avl.SnapKVPolicy(kernel=4), "must be odd"),
        (lambda: avl.FastVPolicy(prefill_layer=0), "at least one layer"),
        (lambda: avl.VLCachePolicy(threshold=2), "got 2"),
        (lambda: avl.H2OPolicy(budget_tokens=-1), "budget_tokens must be >= 0"),
        (lambda: avl.H2OPolicy(recent_share=1), "nothing would be left to choose"),
    ],
)
def test_values_out_of_range_are_refused(wrong: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wrong()


def test_a_filter_behind_the_last_layer_is_refused_when_switched_on() -> None:
    model = tiny.llava(layers=2)
    with (
        pytest.raises(ValueError, match="has 2 layers; pass 1 to 1"),
        avl.adaptive(model, avl.FastVPolicy()),
    ):
        pass


def test_every_policy_has_a_name_a_label_and_a_style_of_its_own() -> None:
    kinds = list(registry.policies().values())
    assert [kind.name for kind in kinds] == list(registry.policies())
    labels = [kind.label for kind in kinds] + [p.label for p in registry.PRESETS.values()]
    assert all(labels)
    assert len(set(labels)) == len(labels)
    slots = registry.color_slots()
    drawn = [slot for label, slot in slots.items() if label != avl.FullPolicy.label]
    assert len(set(drawn)) == len(drawn)  # the full cache is a line across
    assert max(drawn) < 20  # as many as can be told apart
    for kind in kinds:
        assert getattr(avl, kind.__name__) is kind
