"""Statistics once more, from raw weights that a recording kept.

The same code on stored instead of fresh weights.

Useful for a statistic, or settings of one, that was not asked for while the model ran. What needs
keys or values (key redundancy, value-weighted mass) cannot be replayed, since those are not kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from avl_analysis.capture.accumulator import PHASES, SampleAccumulator
from avl_analysis.capture.plan import CapturePlan
from avl_analysis.capture.reduce_prompt import reduce_prompt
from avl_analysis.capture.reduce_step import StepRow, reduce_step
from avl_analysis.capture.sample_call import SampleCall
from avl_analysis.capture.visibility import VisibleKeys
from avl_analysis.errors import InputError
from avl_analysis.recordings import schema
from avl_analysis.recordings.recording import Recording
from avl_analysis.statistics import Statistic, select
from avl_analysis.statistics.inputs import TOKEN_INFO, TokenInfo


def replay(recording: Recording, statistics: Sequence[Statistic | str] | None = None) -> Recording:
    """Statistics of the raw weights of a recording.

    Args:
        recording: made with `keep="attention"`, all heads and all queries.
        statistics: names or instances; None means all that can be replayed.

    Raises:
        InputError: rows or heads are missing in the recording, or a statistic needs keys or values.
    """
    attention = recording.data["attention"]
    heads = int(recording.attrs["query_heads"])
    if "attention" not in attention or list(attention["head"].values) != list(range(heads)):
        raise InputError(
            "replaying needs raw weights of all heads; record with keep='attention' and without"
            " heads="
        )
    chosen = [s for s in select(statistics) if statistics is not None or not s.reads_values]
    if unable := [s.name for s in chosen if s.reads_values]:
        raise InputError(
            f"{', '.join(unable)} cannot be replayed: keys and values are not in a recording"
        )
    layers = tuple(int(layer) for layer in attention["layer"].values)
    what = CapturePlan.of(chosen, maps="mean")
    parts = []
    for name in recording.samples:
        log = SampleAccumulator(name, layers, heads, chosen, what)
        _replay_sample(log, recording.tokens.sel(sample=name), attention.sel(sample=name), what)
        parts.append((name, log.part()))
    labels = schema.layer_labels(layers, heads, int(recording.attrs["kv_heads"]))
    attrs = {**recording.attrs, "statistics": " ".join(repr(s) for s in chosen)}
    return Recording(
        schema.stack([part for _, part in parts], [name for name, _ in parts], labels), attrs
    )


@torch.no_grad()
def _replay_sample(
    log: SampleAccumulator, tokens: xr.Dataset, attention: xr.Dataset, what: CapturePlan
) -> None:
    at = {
        int(position): row
        for row, position in enumerate(attention["query_position"].values)
        if position >= 0
    }
    start = 0
    for step, phase in enumerate(tokens["phase"].values):
        if phase < 0:
            break
        stop = int(tokens["step_position"].values[step]) + 1
        if not all(position in at for position in range(start, stop)):
            raise InputError(
                "replaying needs raw weights of all queries; record with keep='attention',"
                " queries='all'"
            )
        rows = [at[position] for position in range(start, stop)]
        new = slice(start, stop)
        log.add_tokens(**{name: tokens[name].values[new] for name in schema.TOKEN_FIELDS})
        weights = torch.from_numpy(
            attention["attention"].values[:, :, rows, :stop].astype(np.float32)
        )
        visible = torch.from_numpy(attention["visible"].values[:, :, rows, :stop] > 0)
        known = TokenInfo(
            torch.arange(stop),
            *(torch.from_numpy(log.tokens[name]) for name in TOKEN_INFO if name != "rank"),
        )
        # One view per layer, as if each had just computed these weights: from here on a replay runs
        # the code of a live recording.
        views = [_view(one, seen, known, new) for one, seen in zip(weights, visible, strict=True)]
        if PHASES[phase] == "decode":
            passes = reduce_step(
                [StepRow(i, view, view.weights, None) for i, view in enumerate(views)], what
            )
        else:
            passes = [reduce_prompt(view, what) for view in views]
        log.add_pass(PHASES[phase], passes)
        start = stop


def _view(weights: Tensor, visible: Tensor, tokens: TokenInfo, new: slice) -> SampleCall:
    """One layer's rows, (heads, rows, keys), as if they had just been computed."""
    heads, rows, keys = weights.shape
    # One matrix for all heads where they agree; sums over rows that see a key then have one entry.
    seen = visible[:1] if bool((visible == visible[:1]).all()) else visible
    # Width 0: only the numbers of heads, rows and keys are read of them.
    query, key = weights.new_empty(heads, rows, 0), weights.new_empty(heads, keys, 0)
    part = tokens.map(lambda t: t[new])
    return SampleCall(
        query,
        key,
        key,
        1.0,
        part,
        tokens.map(lambda t: t[None]),
        VisibleKeys.of_matrix(seen),
        weights=weights,
    )
