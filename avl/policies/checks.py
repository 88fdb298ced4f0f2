"""Checks of policies' settings, made when a policy is made; every message says what is possible.

What can only be seen with a prompt at hand is a `PolicyWarning`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any


class PolicyWarning(UserWarning):
    """A policy's setting means something else than it says for the prompt at hand."""


def check_share(name: str, value: Any, *, optional: bool = False, zero: bool = False) -> None:
    """Refuse what is not a number in (0, 1], or [0, 1] with `zero`."""
    if value is None and optional:
        return
    span = "[0, 1]" if zero else "(0, 1]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name} must be a number in {span}{' or None' if optional else ''}; got {value!r}"
        )
    if not (0 < value <= 1 or (zero and value == 0)):
        hint = ", or None to switch its rule off" if optional else ""
        raise ValueError(
            f"{name} is the share that is kept, in {span}; got {value!r}. Pass e.g."
            f" {name}=0.5{hint}"
        )


def check_count(name: str, value: Any, least: int, why: str) -> None:
    """Refuse what is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number >= {least} ({why}); got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least} ({why}); got {value}")


def check_choice(name: str, value: Any, possible: Sequence[Any], why: str) -> None:
    """Refuse what is not one of some values."""
    if isinstance(value, bool) or value not in possible:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, possible))} ({why}); got {value!r}"
        )


def check_switch(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def warn_if_longer(name: str, window: int, tokens: Sequence[int], consequence: str) -> None:
    """Warn if a window of newest tokens is no shorter than some prompt.

    Args:
        name: of the setting.
        window: its value.
        tokens: true tokens of each row of the batch.
        consequence: what the policy does to such a prompt.
    """
    if window >= min(tokens):
        warnings.warn(
            f"{name}={window} is no less than the {min(tokens)} tokens of a prompt: {consequence}."
            f" Pass a smaller {name} for prompts as short as this",
            PolicyWarning,
            stacklevel=2,
        )
