"""Every statistic, one small file each.

`ALL` is what a recording computes unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

from avl.plugins import STATISTICS, left_out, plugins
from avl_analysis.errors import InputError
from avl_analysis.statistics.accumulated_score import AccumulatedScore
from avl_analysis.statistics.base import (
    CacheStatistic,
    KeyStatistic,
    RowStatistic,
    Statistic,
    SumStatistic,
    TrajectoryStatistic,
    WeightStatistic,
)
from avl_analysis.statistics.concentration import EffectiveCount, Entropy, Gini
from avl_analysis.statistics.core_hits import CoreHitRate
from avl_analysis.statistics.cosine import ConsecutiveCosine
from avl_analysis.statistics.coverage import Coverage
from avl_analysis.statistics.distance import PatchDistance, TextDistance
from avl_analysis.statistics.frames import FrameCoreOverlap, FrameMass, TimeDistance
from avl_analysis.statistics.layer_agreement import LayerAgreement
from avl_analysis.statistics.modality_mass import Efficiency, FirstTokenMass, ModalityMass
from avl_analysis.statistics.persistence import ImagePersistence
from avl_analysis.statistics.position_bias import PositionBias
from avl_analysis.statistics.ppci import PPCIContinuity, PPCIHeterogeneity, PPCIPrefill
from avl_analysis.statistics.prefill_recall import PrefillMass, PrefillRecall
from avl_analysis.statistics.recent_text import RecentTextMass
from avl_analysis.statistics.redundancy import KeyRedundancy
from avl_analysis.statistics.shared_keys import SharedCoverage, SharedSparsity
from avl_analysis.statistics.sinks import SinkRate
from avl_analysis.statistics.sparsity import ThresholdSparsity
from avl_analysis.statistics.spatial_entropy import SpatialEntropy
from avl_analysis.statistics.text_age import TextAgeFit, TextAgeProfile
from avl_analysis.statistics.value_mass import ValueWeightedMass

ALL: tuple[Statistic, ...] = (
    ModalityMass(),
    FirstTokenMass(),
    Efficiency(),
    ValueWeightedMass(),
    ThresholdSparsity(),
    TextDistance(),
    Coverage(),
    Gini(),
    Entropy(),
    EffectiveCount(),
    PatchDistance(),
    RecentTextMass(),
    TextAgeProfile(),
    TextAgeFit(),
    AccumulatedScore(),
    SinkRate(),
    PositionBias(),
    PPCIContinuity(),
    PPCIHeterogeneity(),
    PPCIPrefill(),
    ConsecutiveCosine(),
    ImagePersistence(),
    CoreHitRate(),
    PrefillRecall(),
    PrefillMass(),
    SharedCoverage(),
    SharedSparsity(),
    LayerAgreement(),
    SpatialEntropy(),
    KeyRedundancy(),
    FrameMass(),
    FrameCoreOverlap(),
    TimeDistance(),
)


def select(statistics: Sequence[Statistic | str] | None) -> tuple[Statistic, ...]:
    """The statistics meant by names or instances; None means all.

    Raises:
        InputError: for a name that does not exist, with the names that do, and for anything that is
            neither a name nor a statistic.
    """
    by_name = {statistic.name: statistic for statistic in available()}
    selected: dict[str, Statistic] = {}
    if isinstance(statistics, str):
        raise InputError(
            f"statistics must be a list of names or statistics, such as [{statistics!r}]; got a"
            " single text"
        )
    for entry in by_name.values() if statistics is None else statistics:
        if isinstance(entry, str):
            if entry not in by_name:
                raise InputError(
                    f"there is no statistic {entry!r}; choose from {', '.join(by_name)}"
                )
            entry = by_name[entry]
        if not isinstance(entry, Statistic):
            raise InputError(
                f"{entry!r} is neither the name of a statistic nor a statistic; names are"
                f" {', '.join(by_name)}"
            )
        selected[entry.name] = entry
    return tuple(selected.values())


def available() -> tuple[Statistic, ...]:
    """`ALL`, and the statistics of other distributions (entry points "avl.statistics").

    An entry point that names no statistic, or one whose name is taken, is left out with a
    `PluginWarning`.
    """
    by_name = {statistic.name: statistic for statistic in ALL}
    for entry, statistic in plugins(STATISTICS).items():
        if not isinstance(statistic, Statistic):
            left_out(STATISTICS, entry, f"it names {statistic!r}, which is no Statistic")
        elif statistic.name in by_name:
            left_out(STATISTICS, entry, f"a statistic is called {statistic.name!r} already")
        else:
            by_name[statistic.name] = statistic
    return tuple(by_name.values())


def catalogue(statistics: Sequence[Statistic] | None = None) -> list[dict[str, str]]:
    """What every statistic is, as text: name, meaning, unit, labels, source, justifies.

    `formula` is the docstring of its class, which states the definition.
    """
    return [
        {
            "name": statistic.name,
            "meaning": statistic.title,
            "unit": statistic.unit or "dimensionless",
            "labels": "; ".join(
                f"{dim}: {', '.join(map(str, labels))}"
                for dim, labels in {**statistic.labels(), **statistic.extra()}.items()
                if len(labels) <= 8
            ),
            "formula": " ".join((type(statistic).__doc__ or "").split()),
            "source": statistic.source,
            "justifies": statistic.justifies,
        }
        for statistic in (available() if statistics is None else statistics)
    ]


__all__ = [
    "ALL",
    "CacheStatistic",
    "KeyStatistic",
    "RowStatistic",
    "Statistic",
    "SumStatistic",
    "TrajectoryStatistic",
    "WeightStatistic",
    "available",
    "catalogue",
    "select",
]
