"""What other distributions add: policies, statistics, model families and commands.

A distribution declares entry points of a group; they are loaded when somebody first asks for that
group, not when this package is imported. One that cannot be loaded is one warning that names it,
and all others stay available.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

POLICIES, STATISTICS, FAMILIES = "avl.policies", "avl.statistics", "avl.families"
"""Groups of entry points; "avl.commands" is a fourth, for the command line."""


class PluginWarning(UserWarning):
    """An entry point that could not be used."""


@lru_cache
def plugins(group: str) -> dict[str, Any]:
    """What the entry points of a group name, by the entry points' names, in order of these.

    Loaded once per process; what cannot be loaded is left out, with a `PluginWarning`.
    """
    found: dict[str, Any] = {}
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        load_plugin(entry, found.__setitem__)
    return found


def load_plugin(entry: EntryPoint, use: Callable[[str, Any], Any]) -> None:
    """Load an entry point and hand it on; whatever goes wrong in either is one warning.

    Args:
        entry: what a distribution declared.
        use: called with its name and what it names.
    """
    try:
        use(entry.name, entry.load())
    except Exception as error:  # noqa: BLE001 - any code may run here, and any error come from it
        source = "" if entry.dist is None else f" of {entry.dist.name}"
        warnings.warn(
            f"entry point {entry.name!r}{source} in group {entry.group!r} cannot be used and is"
            f" left out: {type(error).__name__}: {error}",
            PluginWarning,
            stacklevel=2,
        )
