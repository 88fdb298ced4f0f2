"""Every statistic, one small file each; `ALL` is what a recording computes unless told otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from avl_analysis.errors import InputError
from avl_analysis.statistics.base import KeyStatistic, RowStatistic, Statistic, TrajectoryStatistic
from avl_analysis.statistics.modality_mass import Efficiency, FirstTokenMass, ModalityMass

ALL: tuple[Statistic, ...] = (ModalityMass(), FirstTokenMass(), Efficiency())


def select(statistics: Sequence[Statistic | str] | None) -> tuple[Statistic, ...]:
    """The statistics meant by names or instances; None means all.

    Raises:
        InputError: for a name that does not exist, with the names that do.
    """
    known = {statistic.name: statistic for statistic in ALL}
    chosen: dict[str, Statistic] = {}
    for entry in ALL if statistics is None else statistics:
        if isinstance(entry, str):
            if entry not in known:
                raise InputError(f"there is no statistic {entry!r}; choose from {', '.join(known)}")
            entry = known[entry]
        chosen[entry.name] = entry
    return tuple(chosen.values())


__all__ = ["ALL", "KeyStatistic", "RowStatistic", "Statistic", "TrajectoryStatistic", "select"]
