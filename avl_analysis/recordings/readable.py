"""What can be read of a recording, for code that draws or describes one and is used by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import xarray as xr


class Readable(Protocol):
    """The part of `Recording` that drawing and describing need."""

    attrs: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """Names of its statistics."""

    @property
    def tokens(self) -> xr.Dataset:
        """What the tokens of its samples are."""

    def __len__(self) -> int: ...

    def __getitem__(self, name: str) -> xr.DataArray: ...

    def estimate(
        self, name: str, keep: Iterable[str] = (), *, median: bool = False, **labels: Any
    ) -> xr.Dataset:
        """Mean over samples with its interval."""
