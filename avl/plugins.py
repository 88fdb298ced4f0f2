"""What other distributions add: policies, statistics, model families and commands.

A distribution declares entry points of a group; they are loaded when somebody first asks for that
group (or for one name of it), not when this package is imported. One that cannot be loaded is one
warning that names it, and all others stay available.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

POLICIES = "avl.policies"
"""Group of entry points that each name a subclass of `avl.Policy`."""
STATISTICS = "avl.statistics"
"""Group of entry points that each name an instance of `avl_analysis.statistics.Statistic`."""
FAMILIES = "avl.families"
"""Group of entry points whose name is a model type of transformers; each names a function that is
given a loaded model of that type and returns its `avl.families.Family`.
"""
COMMANDS = "avl.commands"
"""Group of entry points whose name is a command of `avl`; each names a typer command function."""


class PluginWarning(UserWarning):
    """An entry point that could not be used."""


@lru_cache
def plugins(group: str, name: str | None = None) -> dict[str, Any]:
    """What the entry points of a group name, by the entry points' names and in their order.

    Loaded once per process; what cannot be loaded is left out, with a `PluginWarning`.

    Args:
        group: of entry points, one of the constants above.
        name: of the one to load; None loads all.
    """
    entries = entry_points(group=group) if name is None else entry_points(group=group, name=name)
    loaded: dict[str, Any] = {}
    for entry in sorted(entries, key=lambda entry: entry.name):
        try:
            loaded[entry.name] = entry.load()
        except Exception as error:  # noqa: BLE001 - any code may run here and fail in any way
            left_out(group, entry.name, f"{type(error).__name__}: {error}", _source(entry))
    return loaded


def left_out(group: str, name: str, reason: str, source: str = "") -> None:
    """Warn that an entry point is not used.

    Args:
        group: of the entry point.
        name: of the entry point.
        reason: why not.
        source: the distribution that declared it.
    """
    origin = f" of {source}" if source else ""
    warnings.warn(
        f"entry point {name!r}{origin} in group {group!r} is left out: {reason}",
        PluginWarning,
        stacklevel=3,
    )


def _source(entry: EntryPoint) -> str:
    return "" if entry.dist is None else entry.dist.name
