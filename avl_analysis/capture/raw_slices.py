"""Raw attention slices: which rows and heads to keep as they are, and how much memory that takes.

Raw weights are what streaming statistics avoid: they grow with the square of the prompt. They are
kept only when asked for, for chosen layers, heads and queries, and refused with the numbers spelled
out where they would not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avl_analysis.errors import InputError

QUERIES = ("all", "prompt", "last", "decode", "steps")
"""Which query rows: every one; those of the prompt; the last of the prompt; decode steps; the last
of the prompt and decode steps, that is, the rows that produce a token.
"""

LIMIT = 4 << 30
"""Bytes of raw slices above which a recording is refused, unless the caller says otherwise."""

BYTES = 5
"""Per weight: float32, and one byte to say whether the query may attend to the key at all."""


class RawLimitError(InputError):
    """Raw slices would take more memory than they may."""


@dataclass(frozen=True)
class Raw:
    """What to keep.

    Attributes:
        heads: query heads; queries: one of `QUERIES`, or positions in the prompt, counted without
            padding.
        limit: bytes that all slices of a recording together may take.
    """

    heads: tuple[int, ...]
    queries: str | tuple[int, ...] = "all"
    limit: int = LIMIT

    def prompt_rows(self, rank: Tensor, produces: bool) -> Tensor:
        """Indices of the prompt rows to keep.

        Args:
            rank: (rows,) positions of the rows.
            produces: whether the last of them produces a token.
        """
        rows = torch.arange(len(rank), device=rank.device)
        if isinstance(self.queries, str):
            if self.queries in ("all", "prompt"):
                return rows
            # Queries "decode" keep no prompt row.
            return rows[-1:] if produces and self.queries in ("last", "steps") else rows[:0]
        return rows[torch.isin(rank, torch.tensor(self.queries, device=rank.device))]

    @property
    def decode_rows(self) -> bool:
        """Whether decode steps are kept."""
        return self.queries in ("all", "decode", "steps")

    def bytes(self, layers: int, prompt: int) -> int:
        """Size of the slices of one sample with a prompt of this length, before any decode step."""
        rows = (
            prompt
            if self.queries in ("all", "prompt")
            else len(self.queries)
            if self._listed
            else 1
        )
        return layers * len(self.heads) * rows * prompt * BYTES

    def step_bytes(self, layers: int, length: int) -> int:
        """Size of the slice of one decode step with this many keys."""
        return layers * len(self.heads) * length * BYTES if self.decode_rows else 0

    @property
    def _listed(self) -> bool:
        return not isinstance(self.queries, str)

    def check(self, total: int, layers: int) -> None:
        """Raises RawLimitError if `total` bytes are above the limit."""
        if total > self.limit:
            raise RawLimitError(
                f"raw attention of {layers} layers and {len(self.heads)} heads would take"
                f" {total / 2**30:.1f} GiB, more than the limit of {self.limit / 2**30:.1f} GiB;"
                " choose fewer with layers=, heads= or queries='last', or raise limit="
            )


def is_listing(values: Any, kind: type) -> bool:
    """Whether `values` can be gone through and holds nothing but values of one kind."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        return False
    return all(isinstance(value, (kind, np.generic)) for value in values)


def raw(
    heads: Sequence[int] | None,
    queries: str | Sequence[int] | None,
    available: int,
    limit: int | None = None,
) -> Raw:
    """Check what the caller asked for.

    Raises:
        InputError: heads out of range, or unknown queries.
    """
    if heads is not None and not is_listing(heads, int):
        raise InputError(f"heads must be a list of head numbers, such as [0, 3]; got {heads!r}")
    chosen = (
        tuple(range(available)) if heads is None else tuple(sorted({int(head) for head in heads}))
    )
    if not chosen or min(chosen) < 0 or max(chosen) >= available:
        raise InputError(
            f"heads {list(heads or [])} are out of range; this model has heads 0 to {available - 1}"
        )
    if queries is None:
        queries = "all"
    elif is_listing(queries, int):
        queries = tuple(int(position) for position in queries)
        if not queries or min(queries) < 0:
            raise InputError(
                f"queries {list(queries)}: name at least one position of the prompt, counted from 0"
            )
    elif not isinstance(queries, str) or queries not in QUERIES:
        raise InputError(
            f"queries {queries!r} is not one of {', '.join(QUERIES)}, nor a list of prompt"
            " positions"
        )
    return Raw(chosen, queries, LIMIT if limit is None else limit)
