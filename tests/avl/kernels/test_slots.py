"""Dropping and exchanging keys of slots: the compiled version does what the plain one does."""

from __future__ import annotations

import pytest
import torch

from avl.kernels import backend, slots, tables

pytestmark = pytest.mark.skipif(not backend.compiled_available(), reason="numba is not installed")


def both(function, *arguments, patch):
    """What each version makes of copies of the arguments: results and changed arguments."""
    outcomes = []
    for version in ("numba", "torch"):
        patch.setattr(tables, "backend_for", lambda device, version=version: version)
        own = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        outcomes.append((function(*own), own))
    return outcomes


@pytest.mark.parametrize("newest", [0, 6, 100])
def test_the_worst_key_is_dropped(newest, monkeypatch):
    positions = torch.tensor([[[5, -1, 2, 9, 4, 7]], [[0, 1, 2, 3, 8, -1]]], dtype=torch.int32)
    scores = torch.tensor(
        [[[0.5, 0.0, torch.inf, 0.1, 0.5, 0.4]], [[torch.inf] * 6]], dtype=torch.float32
    )

    def drop(positions, scores):
        keys = torch.zeros(2, 1, 6, 4)
        table = tables.SlotTable(keys, keys, positions, scores)
        return slots.drop_worst(table, 0, 6, newest)

    (found, after), (expected, after_too) = both(drop, positions, scores, patch=monkeypatch)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(after[0], after_too[0])
    if newest == 6:  # 9 is safe, and of the equal ones the first goes
        assert found[1][0].item() == 5


def segments_of_two_rows(dtype, heads=3):
    """Keys, values and positions of 14 slots, each of which holds its own number."""
    number = torch.arange(14)
    keys, values = (
        number[None, None, :, None].expand(2, heads, -1, width).contiguous().to(dtype)
        for width in (4, 6)
    )
    positions = number[None, None].expand(2, -1, -1).to(torch.int32).contiguous()
    return keys, values, positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
def test_the_second_segment_gets_the_best_keys_of_both(dtype, seed, monkeypatch):
    torch.manual_seed(seed)
    # Slots 2 to 6 are the first segment, 9 to 11 the second.
    scores = torch.randperm(8).float() - 4.5

    def exchange(keys, values, positions, scores):
        table = tables.SlotTable(keys, values, positions)
        # Among other numbers, and those of the second segment in front.
        joined = torch.cat([torch.full((3,), 9.0), scores[5:], torch.full((2,), 9.0), scores[:5]])
        return slots.exchange_best(table, 1, joined, (8, 3), (2, 9), (5, 3), keep=True)

    tensors = segments_of_two_rows(dtype)
    (kept, found), (kept_too, expected) = both(exchange, *tensors, scores, patch=monkeypatch)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    places = [2, 3, 4, 5, 6, 9, 10, 11]
    score_of = dict(zip(places, scores.tolist(), strict=True))
    best = {slot for slot, score in score_of.items() if score >= 0.5}
    keys, values, positions, after = found
    assert set(positions[1, 0, 9:12].tolist()) == best
    for tensor in (keys, values):  # positions go with their keys, in every head
        assert bool((tensor[1] == positions[1, 0, :, None].to(dtype)).all())
    assert torch.equal(keys[0], tensors[0][0])  # the other row is left alone
    assert torch.equal(after, scores)
    # The scores that are returned are of the keys that are there now.
    assert kept.tolist() == kept_too.tolist()
    assert kept.tolist() == [score_of[slot] for slot in positions[1, 0, places].tolist()]


def test_of_equal_keys_those_in_the_second_segment_stay():
    tensors = segments_of_two_rows(torch.float32)
    before = tensors[2].clone()
    scores = torch.tensor([0.5, 0.0, 0.0, -0.0, 0.25, 0.5, 0.25, 0.25])
    table = tables.SlotTable(*tensors)
    assert slots.exchange_best(table, 0, scores, (0, 5), (2, 9), (5, 3), keep=False) is None
    # 0.5 enters, and one 0.25 leaves; the other one, equal to that in slot 6, stays.
    assert sorted(tensors[2][0, 0, 9:12].tolist()) == [2, 9, 10]
    assert torch.equal(tensors[2][0, 0, 3:9], before[0, 0, 3:9])


def test_a_score_that_is_no_number_counts_as_best():
    tensors = segments_of_two_rows(torch.float32)
    scores, table = torch.tensor([0.5, torch.nan, 0.1, torch.inf]), tables.SlotTable(*tensors)
    slots.exchange_best(table, 0, scores, (0, 3), (2, 9), (3, 1), keep=False)
    assert tensors[2][0, 0, 9].item() == 3
