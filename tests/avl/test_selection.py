"""Index sets by score, with rows of different sizes."""

import torch

from avl.policies.vl_cache import proportional_shares
from avl.selection import best, between, members, newest_and_best

NOTHING = -1


def test_best_takes_the_largest_of_each_row_and_blanks_what_is_beyond_its_count() -> None:
    scores = torch.tensor([[[3.0, 1.0, 2.0, 5.0]], [[4.0, 9.0, -torch.inf, 1.0]]])
    assert best(scores, [3, 1]).tolist() == [[[3, 0, 2]], [[1, NOTHING, NOTHING]]]
    assert best(scores, [0, 0]).shape == (2, 1, 0)


def test_between_cuts_ranks_out_and_puts_empty_places_in_front() -> None:
    order = torch.tensor([[[3, 0, 2, 1]], [[1, 0, NOTHING, NOTHING]]])
    assert between(order, [1, 0], [4, 2]).tolist() == [[[1, 2, 0]], [[NOTHING, 0, 1]]]
    assert between(order, [2, 1], [2, 1]).shape == (2, 1, 0)


def test_members_lists_true_entries_in_order_behind_empty_places() -> None:
    mask = torch.tensor([[[True, False, True, True]], [[False, False, True, False]]])
    assert members(mask, 3).tolist() == [[[0, 2, 3]], [[NOTHING, NOTHING, 2]]]
    assert members(mask & False, 0).shape == (2, 1, 0)


def test_newest_and_best_keeps_the_newest_and_then_the_best_of_each_head() -> None:
    scores = torch.tensor([[[9.0, 1.0, 5.0, 0.0, 0.0], [1.0, 9.0, 5.0, -torch.inf, 0.0]]])
    positions = torch.tensor([[[10, 11, 12, 13, 14]]])
    chosen = newest_and_best(scores, positions, [3], [2]).sort(-1).values
    assert chosen.tolist() == [[[0, 3, 4], [1, 2, 4]]]


def test_newest_goes_by_position_and_not_by_place() -> None:
    scores = torch.zeros(1, 1, 4)
    positions = torch.tensor([[[14, 3, 20, 7]]])
    assert newest_and_best(scores, positions, [2], [2]).sort(-1).values.tolist() == [[[0, 2]]]


def test_shares_are_proportional_bounded_and_have_the_budget_as_mean() -> None:
    density = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0001, 0.0001, 0.9, 0.0999]]).T
    even = proportional_shares(density, 0.25)
    assert torch.allclose(even[:, 0], torch.tensor([0.1, 0.2, 0.3, 0.4]))
    for budget in (0.02, 0.3, 0.6, 0.95, 1.0):
        shares = proportional_shares(density, budget)
        assert torch.allclose(shares.mean(0), torch.tensor([budget, budget]), atol=1e-5)
        assert float(shares.min()) >= 0.01 - 1e-6
        assert float(shares.max()) <= 1.0
        assert (shares[3] >= shares[1] - 1e-6).all()
