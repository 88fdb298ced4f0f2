"""`record(model)`: watch a loaded model's attention and keep statistics of it.

The recorder is an observer on the seam (`avl.seam`). It computes softmax weights a second time, beside the model's own
kernel, for a block of query rows at a time, hands each block to the statistics and forgets it. Whatever was recorded of
a pass that raised is dropped with it.

It does not know how statistics are defined (`statistics/`), how recordings are stored (`recording.py`), or which policy
may be on the model: queries and keys are described by the pass and by the call, never counted off.

What surprised us: in a batch, `generate` keeps feeding rows that are finished, with padding or end-of-sequence tokens.
A row that is fed one of these in a decode step is finished, and nothing of it is counted from then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from avl.attention import AttentionCall, Forward
from avl.families import describe
from avl.seam import SeamError, Tap, attach
from avl_analysis.errors import InputError
from avl_analysis.passes import LayerPass, Plan, reduce_call
from avl_analysis.provenance import provenance
from avl_analysis.recording import Recording
from avl_analysis.rows import Tokens, all_tokens
from avl_analysis.sample import SampleLog
from avl_analysis.schema import Part
from avl_analysis.statistics import KeyStatistic, RowStatistic, Statistic, TrajectoryStatistic, select


class Recorder(Tap):
    """The tap behind `record`.

    Args:
        statistics: what to compute.
        layers: decoder layers to watch, in the order they will have in the recording.
        heads: query heads per layer.
        stop: token ids that mark a finished row when fed in a decode step.
        maps: whether to keep the image-token scores of every step.
        first: number of the first sample; names are numbers of six digits.
    """

    def __init__(
        self,
        statistics: Sequence[Statistic],
        layers: Sequence[int],
        heads: int,
        stop: frozenset[int] = frozenset(),
        maps: bool = True,
        first: int = 0,
    ) -> None:
        self.statistics = tuple(statistics)
        self.plan = Plan(
            rows=tuple(s for s in self.statistics if isinstance(s, RowStatistic)),
            keys=any(isinstance(s, KeyStatistic) for s in self.statistics),
            scores=maps or any(isinstance(s, TrajectoryStatistic) for s in self.statistics),
        )
        self.layers = {layer: index for index, layer in enumerate(layers)}
        self.heads, self.stop, self.maps, self.first = heads, stop, maps, first
        self.closed: list[tuple[str, Part]] = []
        self.open: list[SampleLog] = []
        self._passes: dict[int, LayerPass] = {}

    def parts(self) -> list[tuple[str, Part]]:
        """Name and arrays of every sample so far; those whose generation is still running as they stand now."""
        return self.closed + [(sample.name, sample.part()) for sample in self.open if sample.phases]

    def close(self) -> None:
        """No more passes will follow for the samples so far; their working memory is let go."""
        self.closed, self.open = self.parts(), []

    # -- passes ---------------------------------------------------------------------------------------------------------

    def begin(self, forward: Forward) -> None:
        self._passes = {}
        if forward.kind == "prefill":
            self.close()
            self._watch_reordering(forward.cache)
        if forward.kind == "extend" and bool((forward.layout.image[:, forward.start :] >= 0).any()):
            raise SeamError(
                "a later turn brought a new picture, so the image tokens of this sample changed; record such a "
                "conversation with its whole prompt in one prefill (pass all turns at once, with an empty cache)"
            )
        self.tokens = all_tokens(forward.layout)

    @torch.no_grad()
    def observe(self, call: AttentionCall, output: Tensor) -> None:
        if call.layer in self.layers:
            self._passes[call.layer] = reduce_call(call, self.tokens, self.plan)

    def end(self, forward: Forward) -> None:
        if forward.kind == "prefill":
            count = self.first + len(self.closed)
            self.open = [
                SampleLog(f"{count + b:06d}", len(self.layers), self.heads, self.statistics, self.maps)
                for b in range(forward.layout.batch)
            ]
        passes = [self._passes.get(layer) for layer in self.layers]
        for b, sample in enumerate(self.open):
            fed = forward.inputs.get("input_ids")
            sample.finished |= forward.kind == "decode" and fed is not None and int(fed[b, -1]) in self.stop
            if not sample.finished and any(p is not None for p in passes):
                self._log(forward, b, sample, passes)
        self._passes = {}

    def _watch_reordering(self, cache: Any) -> None:
        """Refuse caches whose rows are exchanged between steps: rows would silently change their sample."""
        if cache is None or "reorder_cache" in vars(cache):
            return

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise SeamError(
                "beam search exchanges the rows of the batch between steps, which a recording cannot follow; generate "
                "with num_beams=1 (greedy or sampling) while recording"
            )

        cache.reorder_cache = refuse

    # -- from passes to samples -----------------------------------------------------------------------------------------

    def _log(self, forward: Forward, b: int, sample: SampleLog, passes: Sequence[LayerPass | None]) -> None:
        """Move row b of a pass into its sample."""
        sample.add_tokens(**_new_tokens(forward, self.tokens, b))
        for statistic in self.plan.rows:
            shape = tuple(len(labels) for labels in statistic.extra().values())
            if forward.kind != "decode":
                sums = _stack(passes, "sums", statistic.name, b, 0.0)
                counts = _stack(passes, "counts", statistic.name, b, 0.0)
                sample.add_prompt(statistic.name, _unfold(sums, shape), _unfold(counts, shape))
            values = _stack(passes, "steps", statistic.name, b, np.nan)
            sample.add_step_values(statistic.name, _unfold(values, shape))
        sample.phases.append(forward.kind)


def _new_tokens(forward: Forward, tokens: Tokens, b: int) -> dict[str, np.ndarray]:
    """What the new tokens of row b are, padding left out."""
    new = slice(forward.start, forward.start + forward.tokens)
    valid = tokens.rank[b, new] >= 0
    ids = forward.inputs.get("input_ids")
    named = {name: getattr(tokens, name)[b, new] for name in ("modality", "image", "row", "column")}
    named["token_id"] = torch.full_like(tokens.rank[b, new], -1) if ids is None else ids[b, -forward.tokens :]
    return {name: values[valid].cpu().numpy() for name, values in named.items()}


def _stack(passes: Sequence[LayerPass | None], what: str, name: str, b: int, fill: float) -> np.ndarray:
    """(layers, heads, ...) of row b, `fill` where a layer was not seen."""
    held = [None if p is None else getattr(p, what)[name][b].cpu().numpy() for p in passes]
    one = next(array for array in held if array is not None)
    return np.stack([np.full_like(one, fill) if array is None else array for array in held])


def _unfold(array: np.ndarray, extra: tuple[int, ...]) -> np.ndarray:
    """Give the last dimension of (..., values) back its own shape."""
    return array.reshape(*array.shape[:-1], *extra)


def _check_layers(layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    chosen = list(dict.fromkeys(int(layer) for layer in layers))
    if not chosen or min(chosen) < 0 or max(chosen) >= count:
        raise InputError(f"layers {list(layers)} are out of range; this model has layers 0 to {count - 1}")
    return chosen


def stop_tokens(model: nn.Module) -> frozenset[int]:
    """Ids that `generate` feeds to rows that are finished: padding and end of sequence."""
    config: Any = getattr(model, "generation_config", None)
    values = [getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)]
    flat = [v for value in values for v in (value if isinstance(value, list | tuple) else [value])]
    return frozenset(int(v) for v in flat if v is not None)


@contextmanager
def record(
    model: nn.Module,
    *,
    statistics: Sequence[Statistic | str] | None = None,
    layers: Sequence[int] | None = None,
    maps: bool = True,
    stop: Sequence[int] | None = None,
    first_sample: int = 0,
) -> Iterator[Recording]:
    """Record the attention of `model` while the `with` block runs.

    Every prefill (a call with an empty cache) begins new samples, one per row of the batch; decode steps and later turns
    belong to the samples of their cache. Logits stay bit-identical to those without recording, and the model is restored
    on leaving the block, also by an exception. Works on an adapted model (inside `avl.adaptive`) as well.

    Args:
        model: a loaded vision-language model (see `avl.families`).
        statistics: names or instances; None means all (`avl_analysis.statistics.ALL`).
        layers: decoder layers to record; None means all.
        maps: keep the image-token scores of every step (mean over heads), from which overlays are drawn.
        stop: token ids that mark a row as finished when fed in a decode step; None takes padding and end-of-sequence
            from the model's generation config.
        first_sample: number of the first sample; give every recording its own range if they will be merged.

    Yields:
        The recording. It can be read inside the block; after the block it is complete.

    Raises:
        InputError: unknown statistic, layers out of range.
        ValueError: weights that are not numbers.
        avl.families.UnsupportedModelError: the model is not a vision-language decoder.
        avl.seam.SeamError: a recorder is on this model already, or its cache cannot be followed (beam search).
    """
    chosen = select(statistics)
    family = describe(model)
    numbers = _check_layers(layers, family.layers)
    stops = stop_tokens(model) if stop is None else frozenset(int(token) for token in stop)
    recorder = Recorder(chosen, numbers, family.query_heads, stops, maps, first_sample)
    labels = {"layer": numbers, "head": list(range(family.query_heads))}
    seam = attach(model, recorder, "observer")
    recording = Recording.live(recorder.parts, labels, provenance(model, chosen))
    try:
        yield recording
    finally:
        seam.detach(recorder)
        recorder.close()
