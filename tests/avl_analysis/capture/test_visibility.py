"""What rows may see, asked block by block, equals what the whole matrix says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from avl_analysis.capture import visibility
from avl_analysis.capture.visibility import VisibleKeys, VisibleRows
from avl_analysis.statistics.inputs import for_heads

ROWS, KEYS = 23, 30


def window(width: int) -> Tensor:
    place = torch.arange(KEYS) - torch.arange(ROWS)[:, None] - (KEYS - ROWS)
    return ((place <= 0) & (place > -width))[None]


def matrix(name: str) -> Tensor:
    """(1 or heads, rows, keys) of one kind of mask."""
    triangle = window(KEYS + 1)
    if name == "causal":
        return triangle
    if name == "window":
        return window(5)
    if name == "picture seen whole":
        triangle[:, 3:9, 10:16] = True
        return triangle
    if name == "a blind row and a hole":
        triangle[:, 7] = False
        triangle[:, :, 4] = False
        return triangle
    assert name == "per head"
    return torch.cat([triangle, window(4)])


NAMES = ["causal", "window", "picture seen whole", "a blind row and a hole", "per head"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [1, 4, 256])
def test_every_answer_is_that_of_the_whole_matrix(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visibility, "BLOCK_ROWS", block)
    visible = matrix(name)
    keys = VisibleKeys.of_matrix(visible)
    assert keys.causal == (name == "causal")
    kinds = (torch.arange(KEYS) % 3 == torch.arange(3)[:, None]).float()[None]
    assert torch.equal(
        keys.keys_per_row(kinds), visible.float() @ for_heads(kinds, len(visible)).transpose(1, 2)
    )
    groups = torch.stack([torch.ones(ROWS), (torch.arange(ROWS) % 4 == 1).float()])
    assert torch.equal(keys.rows_per_key(groups), groups @ visible.float())
    rows = torch.tensor([0, 6, 7, ROWS - 1])
    assert torch.equal(keys.of_rows(rows), visible[:, rows])
    assert torch.equal(keys.last_row, visible[:, -1:])
    marked, text = torch.arange(ROWS) % 5 < 2, (torch.arange(KEYS) % 2 == 0)[None]
    found = torch.zeros_like(visible)
    for at, pairs in keys.pairs(marked, text):
        found[:, at] = pairs
    assert torch.equal(found, visible & marked[:, None] & text[:, None])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [slice(0, 5), slice(6, 8), slice(20, 23), slice(22, 23)])
def test_hidden_keys_are_those_behind_the_ends_or_minus_infinity(name: str, rows: slice) -> None:
    visible = matrix(name)
    keys = VisibleKeys.of_matrix(visible)
    span, heads = keys.span(rows), slice(0, len(visible))
    logits = torch.zeros(len(visible), rows.stop - rows.start, span.stop - span.start)
    if not keys.causal:
        keys.hide(logits, heads, rows, span)
    seen = (torch.arange(logits.shape[2]) < keys.ends(rows)[:, None]) & (logits == 0)
    assert torch.equal(seen, visible[:, rows, span])
    outside = visible[:, rows].clone()
    outside[..., span] = False
    assert not bool(outside.any())
    logits.zero_()
    keys.hide(logits, heads, rows, span)
    assert torch.equal(logits == 0, visible[:, rows, span])


def test_a_bias_is_added_where_a_key_is_visible() -> None:
    visible, bias = matrix("causal"), torch.randn(1, ROWS, KEYS)
    keys = VisibleKeys(
        ROWS,
        KEYS,
        bias.device,
        lambda rows: VisibleRows(visible[:, rows], bias[:, rows].masked_fill(~visible[:, rows], 0)),
    )
    assert not keys.causal
    logits, rows = torch.zeros(2, 4, KEYS), slice(3, 7)
    keys.hide(logits, slice(0, 2), rows, slice(0, KEYS))
    expected = bias[:, rows].masked_fill(~visible[:, rows], -torch.inf)
    assert torch.equal(logits, expected.expand(2, -1, -1))


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that comes into being."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_a_triangle_is_a_number_and_no_matrix() -> None:
    count = 2000
    groups = torch.ones(2, count)
    with Largest() as largest:
        keys = VisibleKeys(count, count, torch.device("cpu"))
        keys.keys_per_row(torch.ones(1, 3, count))
        keys.rows_per_key(groups)
        keys.ends(slice(0, count))
    assert 0 < largest.bytes <= 8 * 3 * count
