"""Sums over rows: the compiled version and the plain one against loops in float64, on odd sizes and
every option.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from avl.kernels import backend, prompt_rows
from avl.kernels.prompt_rows import RowRequest, RowSums

BACKENDS = [
    pytest.param(
        "numba",
        marks=pytest.mark.skipif(not backend.compiled_available(), reason="numba is not installed"),
    ),
    "torch",
]


@pytest.fixture(params=BACKENDS)
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which version of the kernel runs."""
    monkeypatch.setattr(prompt_rows, "backend_for", lambda device: request.param)
    return str(request.param)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow(products: Tensor, scaling: float, sinks: Tensor | None = None) -> Tensor:
    """Softmax weights of (heads, rows, keys) products in float64; -inf is hidden."""
    weights = torch.zeros(products.shape, dtype=torch.float64)
    for head, row in [(h, r) for h in range(products.shape[0]) for r in range(products.shape[1])]:
        logits = [float(x) * scaling for x in products[head, row]]
        sink = [] if sinks is None else [float(sinks[head, min(row, sinks.shape[1] - 1)])]
        top = max([*logits, *sink])
        if max(logits) == -math.inf:
            continue
        total = sum(math.exp(x - top) for x in [*logits, *sink])
        weights[head, row] = torch.tensor(
            [math.exp(x - top) / total for x in logits], dtype=torch.float64
        )
    return weights


class Case:
    """A prompt of `rows` rows over `keys` keys, the last row seeing all of them, in blocks of
    unequal size.
    """

    def __init__(
        self,
        heads: int = 4,
        kv_heads: int = 2,
        rows: int = 37,
        keys: int = 53,
        sets: int = 1,
        blocks: tuple[int, ...] = (1, 20, 16),
        **changes: Any,
    ) -> None:
        assert sum(blocks) == rows
        self.heads, self.groups, self.blocks = heads, heads // kv_heads, blocks
        self.products = random(heads, rows, keys, seed=1) * 4
        self.ends = torch.arange(rows) + keys - rows + 1
        kinds = torch.randint(0, 3, (sets, keys), generator=torch.Generator().manual_seed(2))
        indicators = torch.stack([(kinds == kind).float() for kind in range(3)], 1)
        self.columns = torch.cat(
            [indicators, random(sets, 2, keys, seed=3), torch.zeros(sets, 1, keys)], 1
        )
        self.picked = torch.full((rows,), -1)
        self.picked[[0, 5, rows - 1]] = torch.arange(3)
        ranks = torch.where(kinds == 2, torch.arange(keys).expand(sets, -1), -1)
        options: dict[str, Any] = {
            "raw": torch.where(torch.arange(rows) % 2 == 0, torch.arange(rows) // 2, -1),
            "groups": torch.stack([torch.ones(rows), (torch.arange(rows) % 3 == 0).float()]),
            "query_ranks": torch.where(
                torch.arange(rows) % 4 == 1, torch.arange(rows) + keys - rows, -1
            ),
            "key_ranks": ranks,
        }
        self.request = RowRequest((0.01, 0.5), self.picked, **{**options, **changes})
        self.raw_heads = (3, 1)

    def room(self) -> RowSums:
        return RowSums(
            self.request, self.columns, self.heads, self.groups, raw_heads=self.raw_heads
        )

    def run(self, scaling: float = 0.7, sinks: Tensor | None = None) -> RowSums:
        """All blocks, two heads at a time."""
        result = self.room()
        for first in range(0, self.heads, 2):
            start = 0
            heads = slice(first, first + 2)
            for size in self.blocks:
                stop = start + size
                width = int(self.ends[start:stop].max())
                block = self.products[heads, start:stop, :width].clone()
                own = None if sinks is None else sinks[heads]
                result.add(block, heads, start, 0, self.ends[start:stop].clone(), scaling, own)
                start = stop
        return result

    def check(
        self,
        found: RowSums,
        scaling: float = 0.7,
        sinks: Tensor | None = None,
        tolerance: float = 1e-5,
    ) -> None:
        hidden = torch.arange(self.products.shape[2]) >= self.ends[:, None]
        weights = slow(self.products.masked_fill(hidden, -torch.inf), scaling, sinks)
        request = self.request
        for head in range(self.heads):
            own = 0 if len(self.columns) == 1 else head // self.groups
            mine = weights[head]
            close(found.sums[head], self.columns[own].double() @ mine.T, tolerance)
            for place, threshold in enumerate(request.thresholds):
                expected = ((mine >= threshold * mine.amax(-1, keepdim=True)) & (mine > 0)).sum(-1)
                assert torch.equal(found.above[place, head].long(), expected)
            for row, place in enumerate(request.picked_places):
                if place >= 0:
                    close(found.picked[head, place], mine[row], tolerance)
            if request.groups is not None:
                close(found.received[head], request.groups.double() @ mine, tolerance)
            if request.query_ranks is not None and request.key_ranks is not None:
                ages = torch.zeros(found.by_age.shape[1], dtype=torch.float64)
                for row, key in mine.nonzero().tolist():
                    ranks = request.key_ranks[min(own, len(request.key_ranks) - 1)]
                    query, rank = int(request.query_ranks[row]), int(ranks[key])
                    if query >= rank >= 0:
                        ages[query - rank] += mine[row, key]
                close(found.by_age[head], ages, tolerance)
        if request.raw is not None:
            for place, head in enumerate(self.raw_heads):
                for row, at in enumerate(request.raw_places):
                    if at >= 0:
                        close(found.raw[place, at], weights[head, row], tolerance)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert bool(
        (found.double() - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))
    )


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_sum_and_copy_equals_loops_over_the_weights(
    version: str, kv_heads: int, sets: int
) -> None:
    case = Case(kv_heads=kv_heads, sets=1 if sets == 1 else kv_heads)
    case.check(case.run())


@pytest.mark.parametrize(
    ("rows", "keys", "blocks"),
    [(1, 1, (1,)), (1, 9, (1,)), (130, 130, (128, 2)), (40, 1000, (40,))],
)
def test_any_number_of_rows_and_keys_gives_these_sums(
    version: str, rows: int, keys: int, blocks: tuple[int, ...]
) -> None:
    case = Case(rows=rows, keys=keys, blocks=blocks, groups=None) if rows > 5 else small(rows, keys)
    case.check(case.run())


def small(rows: int, keys: int) -> Case:
    case = Case(rows=6, keys=max(keys, 6), blocks=(6,))
    case.products, case.ends, case.blocks = (
        case.products[:, -rows:, :keys].contiguous(),
        torch.tensor([keys]),
        (rows,),
    )
    case.columns = case.columns[..., :keys].contiguous()
    case.request = RowRequest(
        (0.5,), torch.zeros(rows, dtype=torch.int64), groups=torch.ones(1, rows)
    )
    return case


@pytest.mark.parametrize(
    "changes", [{"raw": None}, {"groups": None}, {"query_ranks": None, "key_ranks": None}]
)
def test_what_is_not_asked_for_is_left_out(version: str, changes: dict[str, Any]) -> None:
    case = Case(**changes)
    case.check(case.run())


@pytest.mark.parametrize("by_row", [False, True])
def test_sinks_take_their_share_of_every_row(version: str, by_row: bool) -> None:
    case = Case()
    sinks = random(4, 37 if by_row else 1, seed=4) * 3
    case.check(case.run(1.0, sinks), 1.0, sinks)


def test_hidden_keys_have_no_weight_and_blind_rows_have_none_at_all(version: str) -> None:
    case = Case()
    case.products[
        torch.rand(case.products.shape, generator=torch.Generator().manual_seed(5)) < 0.4
    ] = -torch.inf
    case.products[:, [3, 20]] = -torch.inf
    found = case.run()
    case.check(found)
    assert bool((found.sums[..., [3, 20]] == 0).all())


def test_keys_in_another_order_are_summed_by_their_own_age(version: str) -> None:
    order = torch.randperm(53, generator=torch.Generator().manual_seed(6))
    case = Case(key_ranks=torch.where(order % 3 > 0, order, -1)[None])
    case.check(case.run())


def test_columns_of_their_own_and_ages_shared_by_all_heads_go_together(version: str) -> None:
    shared = torch.where(torch.arange(53) % 5 > 0, torch.arange(53), -1)[None]
    case = Case(kv_heads=2, sets=2, key_ranks=shared)
    case.check(case.run())


def test_a_part_of_the_heads_takes_the_ages_of_its_own_key_sets(version: str) -> None:
    case = Case(kv_heads=2, sets=2)
    own = RowSums(case.request, case.columns[1:], 2, 2, first_set=1)
    own.add(case.products[2:].clone(), slice(0, 2), 0, 0, case.ends, 0.7)
    whole = case.run()
    close(own.by_age, whole.by_age[2:], 1e-6)
    close(own.sums, whole.sums[2:].double(), 1e-6)


def test_weights_that_are_known_already_are_summed_as_they_are(version: str) -> None:
    case = Case(blocks=(37,))
    hidden = torch.arange(53) >= case.ends[:, None]
    weights = slow(case.products.masked_fill(hidden, -torch.inf), 0.7).float()
    weights[:, 4] = 0
    case.products[:, 4] = -torch.inf
    found = case.room()
    found.add(weights.clone(), slice(0, 4), 0, 0, case.ends, weights=True)
    case.check(found)


def test_a_block_that_begins_at_a_later_key_is_the_same_as_one_with_hidden_keys_in_front(
    version: str,
) -> None:
    case = Case(blocks=(37,))
    case.products[..., :9] = -torch.inf
    found = case.room()
    found.add(
        case.products[..., 9:].contiguous(), slice(0, 4), 0, 9, (case.ends - 9).clamp_min(0), 0.7
    )
    case.check(found)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_products_that_are_no_numbers_reach_the_sums(version: str, broken: float) -> None:
    case = Case()
    case.products[2, 30, 11] = broken
    found = case.run()
    assert bool(found.sums[2, :, 30].isnan().all())
    assert not bool(found.sums[[0, 1, 3]].isnan().any())
    assert not bool(found.sums[2, :, :30].isnan().any())


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_flat_and_steep_rows_keep_their_precision(version: str, scale: float) -> None:
    case = Case(rows=64, keys=3000, blocks=(64,), raw=None, query_ranks=None, key_ranks=None)
    case.products = random(4, 64, 3000, seed=7) * scale
    case.check(case.run(1.0), 1.0)


def test_weights_received_from_thousands_of_rows_keep_their_precision(version: str) -> None:
    rows = 4000
    request = RowRequest(
        (),
        torch.where(torch.arange(rows) == rows - 1, 0, -1),
        groups=torch.ones(1, rows),
    )
    found = RowSums(request, torch.ones(1, 1, 2), 1, 1)
    products = random(1, rows, 2, seed=8)
    for start in range(0, rows, 128):
        block = products[:, start : start + 128].clone()
        found.add(block, slice(0, 1), start, 0, torch.full((block.shape[1],), 2))
    close(found.received[0, 0], slow(products, 1.0)[0].sum(0), 1e-6)


@pytest.mark.skipif(not backend.compiled_available(), reason="numba is not installed")
def test_the_compiled_version_refuses_what_it_cannot_read() -> None:
    case = Case()
    found = case.room()
    with pytest.raises(ValueError, match="contiguous float32"):
        found.add(case.products[:2, :1].double(), slice(0, 2), 0, 0, case.ends[:1].clone())
