"""What is kept of one sample while its model runs, and how that becomes arrays with names.

A `SampleAccumulator` is filled by the recorder with the numbers of every layer, pass after pass,
and knows nothing of models, masks or blocks. It holds sums and counts over prompt rows, the values
of token-producing rows, two numbers per key and layer and head, and one number per image token and
layer and step. `part()` may be asked at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from avl.tokens import Modality
from avl_analysis.capture.decode_sums import DecodeSums, LayerArrays, by_rank
from avl_analysis.capture.plan import CapturePlan, LayerResult
from avl_analysis.recordings.schema import EDGES, TOKEN_FIELDS, Field, Part
from avl_analysis.statistics.ages import AGE_STARTS
from avl_analysis.statistics.base import (
    Finished,
    KeyScores,
    RowTotals,
    SampleTotals,
    Statistic,
    Trajectory,
)
from avl_analysis.statistics.inputs import TOKEN_INFO, TokenInfo, as_slice

MAX_TRAJECTORY = 512
"""Steps whose image-token scores are held (the first ones); bounds memory at 512 x layers x image
tokens x 4 bytes, 189 MB for 32 layers and 2,880 image tokens.
"""

PHASES = ("prefill", "decode", "extend")


class TokenPlaces(NamedTuple):
    """Where in their pictures tokens lie: box (length, 4) and tile (length,), as `places` says."""

    box: Tensor
    tile: Tensor


@dataclass(eq=False)
class RawRows:
    """Raw weights of one pass.

    Rows (n,) positions; weights and visible (layers, kept heads, n, positions).
    """

    rows: np.ndarray
    weights: np.ndarray
    visible: np.ndarray


@dataclass(eq=False)
class SampleAccumulator:
    """One sample in the making.

    Attributes:
        name: its name, unique within a recording.
        layers: the decoder layers that are recorded; heads: number of query heads.
        statistics, plan: what is computed, and what of it concerns single passes.
        maps: which image-token scores of every step become part of the recording: "none", "mean"
            over heads, or "heads".
        finished: nothing more is to be added.
    """

    name: str
    layers: tuple[int, ...]
    heads: int
    statistics: Sequence[Statistic]
    plan: CapturePlan
    maps: str = "mean"
    finished: bool = False
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    phases: list[str] = field(default_factory=list)
    sums: np.ndarray | float = 0.0  # (layers, heads, 3, values)
    counts: np.ndarray | float = 0.0
    steps: LayerArrays = field(default_factory=LayerArrays)  # (layers, heads, values) each
    received: np.ndarray | None = None  # (layers, heads, 3, positions)
    queries: np.ndarray | None = None  # (layers, 1 or heads, 3, positions)
    ages: np.ndarray | None = None  # (layers, heads, 2, ages)
    pairs: np.ndarray | None = None
    scores: LayerArrays = field(default_factory=LayerArrays)  # (layers, image tokens) each
    # (layers, heads, image tokens) each: of the last prompt row, of every step
    last_scores: LayerArrays = field(default_factory=LayerArrays)
    head_scores: LayerArrays = field(default_factory=LayerArrays)
    decoded: dict[int, DecodeSums] = field(default_factory=dict)  # of decode steps, by layer
    cache: dict[str, list[Tensor | None]] = field(default_factory=dict)
    # Position of the row that produces a token, per step.
    produced: list[int] = field(default_factory=list)
    raw: list[RawRows] = field(default_factory=list)
    _image_places: dict[torch.device, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of tokens seen so far, padding left out."""
        return len(self.tokens.get("token_id", ()))

    @property
    def image_positions(self) -> np.ndarray:
        """Positions of the image tokens, in order."""
        return np.flatnonzero(self.tokens["modality"] == Modality.IMAGE)

    # -- filling -----

    def add_tokens(self, **arrays: np.ndarray) -> None:
        """Tokens behind the ones so far: the arrays of `token_arrays`, each (count,)."""
        for name, array in arrays.items():
            self.tokens[name] = (
                np.concatenate([self.tokens[name], array]) if name in self.tokens else array.copy()
            )

    def add_pass(self, kind: str, passes: Sequence[LayerResult | None]) -> None:
        """The numbers of one pass, one entry per recorded layer (None: the layer was not seen)."""
        self.phases.append(kind)
        self.produced.append(self.length - 1)
        # Values of all row statistics side by side.
        size = max((place.stop for place, _ in self.plan.places.values()), default=0)
        # Every pass produces a token with its last row, so every pass is a step; only decode steps
        # add nothing to the sums over prompt rows.
        self.steps.append([p and p.step for p in passes], (self.heads, size))
        if kind != "decode":
            shape = (self.heads, 3, size)
            self.sums = self.sums + _stack([p and p.sums for p in passes], shape, 0.0)
            self.counts = self.counts + _stack([p and p.counts for p in passes], shape, 0.0)
        if self.plan.received:
            self._add_received(kind, passes)
        if self.plan.ages:
            self._add_ages(kind, passes)
        # The first steps are kept, not the last: step 0 is what the others are compared with.
        if self.plan.scores and len(self.scores) < MAX_TRAJECTORY:
            self._add_scores(passes)
        if self.plan.raw is not None:
            self._add_raw(passes)
        for statistic in self.plan.cache if kind == "prefill" else ():
            self.cache[statistic.name] = [p and p.cache[statistic.name].cpu() for p in passes]

    def _add_received(self, kind: str, passes: Sequence[LayerResult | None]) -> None:
        for layer, one in enumerate(passes):
            if one is None or one.received is None or one.queries is None:
                continue
            # Added up where the layer runs; a decode step must not wait for a device
            # (`DecodeSums`).
            if kind == "decode":
                self._decoded(layer).add_received(one, self.length)
                continue
            # (heads, 2, positions): "prompt" and "prompt text", by the token's rank and not by the
            # slot in which a policy keeps its key.
            received = by_rank(one.received, one.keys, self.length, 0.0).cpu().numpy()
            queries = by_rank(one.queries, one.keys, self.length, 0.0).cpu().numpy()
            self._make_room(len(queries))
            assert self.received is not None
            assert self.queries is not None
            self.received[layer, :, :2, : self.length] += received
            self.queries[layer, :, :2, : self.length] += queries

    def _make_room(self, lead: int) -> None:
        """Room for all positions; `lead` is 1 if all heads see the same keys, else their number."""
        self.received = _room(self.received, (len(self.layers), self.heads, 3), self.length)
        self.queries = _room(self.queries, (len(self.layers), lead, 3), self.length)

    def _decoded(self, layer: int) -> DecodeSums:
        return self.decoded.setdefault(layer, DecodeSums())

    def _add_ages(self, kind: str, passes: Sequence[LayerResult | None]) -> None:
        if self.ages is None or self.pairs is None:
            self.ages, self.pairs = (
                np.zeros((len(self.layers), self.heads, 2, len(AGE_STARTS))) for _ in range(2)
            )
        for layer, one in enumerate(passes):
            if one is None or one.ages is None or one.pairs is None:
                continue
            if kind == "decode":
                self._decoded(layer).add_ages(one)
            else:
                self.ages[layer, :, 0] += one.ages.cpu().numpy()
                self.pairs[layer, :, 0] += one.pairs.cpu().numpy()

    def _take_decoded(self) -> None:
        """Bring what decode steps added up to from the layers' devices."""
        for layer, sums in self.decoded.items():
            if sums.received is not None and sums.queries is not None:
                self._make_room(len(sums.queries))
                assert self.received is not None
                assert self.queries is not None
                # Set, not added: `decoded` holds the sum over all decode steps, and may be read
                # more than once.
                self.received[layer, :, 2, : self.length] = _host(sums.received, self.length)
                self.queries[layer, :, 2, : self.length] = _host(sums.queries, self.length)
            if sums.ages is not None and sums.pairs is not None:
                assert self.ages is not None
                assert self.pairs is not None
                self.ages[layer, :, 1] = sums.ages.cpu().numpy()
                self.pairs[layer, :, 1] = sums.pairs.cpu().numpy()

    def _add_scores(self, passes: Sequence[LayerResult | None]) -> None:
        scores = [p and self._image_scores(p) for p in passes]
        count = len(self.image_positions)
        # (image tokens,) per layer
        means = [None if s is None else _mean_of_present(s) for s in scores]
        self.scores.append(means, (count,))
        if not len(self.last_scores):
            self.last_scores.append(scores, (self.heads, count))
        if self.maps == "heads":
            self.head_scores.append(scores, (self.heads, count))

    def _image_scores(self, result: LayerResult) -> Tensor:
        """(heads, image tokens) weights of a row, NaN where a token is not attended."""
        placed = by_rank(result.weights[:, None], result.keys, self.length, np.nan)[:, 0]
        at = as_slice(self.image_positions)  # of one image; much faster than a list of places
        if not isinstance(at, slice):
            if placed.device not in self._image_places:
                self._image_places[placed.device] = torch.from_numpy(at).to(placed.device)
            return placed[:, self._image_places[placed.device]]
        return placed[:, at].clone()  # not a view, which would keep all weights

    def _add_raw(self, passes: Sequence[LayerResult | None]) -> None:
        rows = next((p.raw_rows for p in passes if p is not None), None)
        if rows is None or not len(rows) or self.plan.raw is None:
            return
        weights = np.zeros(
            (len(self.layers), len(self.plan.raw.heads), len(rows), self.length), np.float32
        )
        visible = np.zeros(weights.shape, np.int8)
        for layer, one in enumerate(passes):
            if one is not None and one.raw is not None and one.raw_visible is not None:
                weights[layer] = by_rank(one.raw, one.keys, self.length, 0.0).cpu().numpy()
                seen = one.raw_visible.to(torch.int8).expand(one.raw.shape)
                visible[layer] = by_rank(seen, one.keys, self.length, 0).cpu().numpy()
        self.raw.append(RawRows(rows.cpu().numpy(), weights, visible))

    # -- as arrays -----

    def part(self) -> Part:
        """Everything of this sample, by group."""
        sums: dict[str, tuple[Field, np.ndarray]] = {}
        values: dict[str, tuple[Field, np.ndarray]] = {}
        totals = self._totals()
        for statistic in self.statistics:
            for name, finished in statistic.finish(totals).items():
                if finished.count is None:
                    values[name] = (finished.field, finished.values)
                else:
                    _put_sum(name, finished, finished.count, sums)
        return {
            "tokens": self._token_fields(),
            "sums": sums,
            "statistics": values,
            "maps": self._map_fields(),
            "attention": self._raw_fields(),
        }

    def _totals(self) -> SampleTotals:
        """What every statistic of the recording is finished from."""
        # (layers, heads, steps, values)
        steps = np.stack(self.steps.arrays(), 2) if self.plan.rows else np.empty(0)
        trajectory = self._trajectory()
        return SampleTotals(
            rows={s.name: self._row_totals(s.name, steps) for s in self.plan.rows},
            cache={s.name: self._cache_values(s.name) for s in self.plan.cache},
            keys=self._key_scores(),
            trajectory=trajectory or Trajectory.unknown(len(self.phases), self.layers, self.heads),
            has_image=trajectory is not None,
        )

    def _row_totals(self, name: str, steps: np.ndarray) -> RowTotals:
        # The values of all row statistics lie side by side on the last axis; each takes its own.
        place, shape = self.plan.places[name]

        def own(array: np.ndarray | float) -> np.ndarray | None:
            if not isinstance(array, np.ndarray):  # no prompt row was seen
                return None
            return array[..., place].reshape(*array.shape[:-1], *shape)

        of_steps = own(steps)
        assert of_steps is not None
        return RowTotals(of_steps, own(self.sums), own(self.counts))

    def _cache_values(self, name: str) -> np.ndarray:
        """(layers, key heads, ...) of the prompt; NaN for layers that were not seen."""
        held = self.cache[name]
        shape = next(tuple(array.shape) for array in held if array is not None)
        return _stack(held, shape, np.nan).astype(np.float32)

    def _token_fields(self) -> dict[str, tuple[Field, np.ndarray]]:
        modality, prompt = self.tokens["modality"], self.length - self.phases.count("decode")
        fields = {name: (TOKEN_FIELDS[name], array) for name, array in self.tokens.items()}
        phases = np.array([PHASES.index(phase) for phase in self.phases], np.int8)
        fields["phase"] = (Field(("step",), -1, attrs={"flag_meanings": " ".join(PHASES)}), phases)
        fields["step_position"] = (
            Field(("step",), -1, attrs={"long_name": "position of the row"}),
            np.array(self.produced),
        )
        fields["prompt_length"] = (Field((), -1), np.array(prompt))
        fields["modality_count"] = (
            Field(("key_modality",), 0, attrs={"long_name": "prompt tokens of each modality"}),
            np.bincount(modality[:prompt], minlength=3)[:3],
        )
        fields["token_position"] = (Field(("token",), -1), self.image_positions)
        return fields

    def _map_fields(self) -> dict[str, tuple[Field, np.ndarray]]:
        if self.maps == "none" or not len(self.last_scores):
            return {}
        mean = {"long_name": "attention weight of an image token, mean over heads"}
        last = {"long_name": "attention weight of an image token from the last prompt row"}
        maps = {
            "image_score": (
                Field(("step", "layer", "token"), attrs=mean),
                np.stack(self.scores.arrays()),
            ),
            "image_score_last": (
                Field(("layer", "head", "token"), attrs=last),
                self.last_scores.arrays()[0],
            ),
        }
        if len(self.head_scores):
            each = {"long_name": "attention weight of an image token"}
            dims = ("step", "layer", "head", "token")
            maps["image_score_heads"] = (
                Field(dims, attrs=each),
                np.stack(self.head_scores.arrays()),
            )
        return maps

    def _raw_fields(self) -> dict[str, tuple[Field, np.ndarray]]:
        if self.plan.raw is None or not self.raw:
            return {}
        heads, rows = {"head": self.plan.raw.heads}, np.concatenate([one.rows for one in self.raw])
        # As many positions as the sample has now; earlier passes had fewer keys and leave zeros
        # behind.
        weights = np.zeros(
            (len(self.layers), len(self.plan.raw.heads), len(rows), self.length), np.float32
        )
        visible, start = np.zeros(weights.shape, np.int8), 0
        for one in self.raw:
            at = np.s_[:, :, start : start + len(one.rows), : one.weights.shape[-1]]
            weights[at], visible[at] = one.weights, one.visible
            start += len(one.rows)
        dims = ("layer", "head", "query", "position")
        named = {"long_name": "attention weight; 0 where a key is not attended"}
        return {
            "attention": (Field(dims, np.nan, heads, named), weights),
            "visible": (
                Field(dims, 0, heads, {"long_name": "1 where the query may attend to the key"}),
                visible,
            ),
            "query_position": (
                Field(("query",), -1, attrs={"long_name": "position of the query"}),
                rows,
            ),
        }

    def _key_scores(self) -> KeyScores | None:
        self._take_decoded()
        if self.received is None or self.queries is None:
            return None
        received = self.received[..., : self.length]
        # One entry for all heads as long as all heads see the same keys.
        queries = np.broadcast_to(self.queries[..., : self.length], received.shape)
        # A later turn's tokens count as prompt: they were given, not generated.
        prompt = self.length - self.phases.count("decode")
        return KeyScores(received, queries, self.tokens["modality"], prompt, self.ages, self.pairs)

    def _trajectory(self) -> Trajectory | None:
        if not len(self.last_scores) or not len(self.image_positions):
            return None
        at = self.image_positions
        names = ("image", "row", "column", "frame")
        image, row, column, frame = (self.tokens[name][at] for name in names)
        return Trajectory(
            np.stack(self.scores.arrays()),
            self.last_scores.arrays()[0],
            image,
            row,
            column,
            frame,
            self.layers,
        )


def _mean_of_present(scores: Tensor) -> Tensor:
    """(heads, tokens): mean over the heads that hold a token's key, NaN where none does."""
    present = ~scores.isnan()
    return scores.where(present, 0.0).sum(0) / present.sum(0)  # 0 / 0 is NaN


def _host(sums: Tensor, length: int) -> np.ndarray:
    """(heads, length) of sums that may have room for more positions, or hold fewer."""
    values = sums[:, :length].cpu().numpy()
    return np.pad(values, ((0, 0), (0, length - values.shape[1])))


def token_arrays(
    tokens: TokenInfo, ids: Tensor | None, new: slice, places: TokenPlaces | None
) -> dict[str, np.ndarray]:
    """What the new tokens of a sample are, padding left out.

    Args:
        tokens: all tokens of the sample so far, (length,).
        ids: (new tokens,), None if they are not known.
        new: which of the tokens are new.
        places: of all tokens; None for generated tokens, which have none.
    """
    named = {name: getattr(tokens, name)[new] for name in TOKEN_INFO}
    named["token_id"] = torch.full_like(named["rank"], -1) if ids is None else ids
    count = len(named["rank"])
    if places is None:
        places = TokenPlaces(
            torch.full((count, 4), torch.nan, dtype=torch.float32), torch.full((count,), -1).short()
        )
        new = slice(0, count)
    named["tile"] = places.tile[new]
    named |= dict(zip(EDGES, places.box[new].unbind(-1), strict=True))
    arrays = {name: values.cpu().numpy() for name, values in named.items()}
    valid = arrays.pop("rank") >= 0
    return {name: values[valid] for name, values in arrays.items()}


def _stack(layers: Sequence[Tensor | None], shape: tuple[int, ...], fill: float) -> np.ndarray:
    stacked = np.full((len(layers), *shape), fill)
    for index, array in enumerate(layers):
        if array is not None:
            stacked[index] = array.cpu().numpy()
    return stacked


def _put_sum(
    name: str,
    finished: Finished,
    count: np.ndarray,
    sums: dict[str, tuple[Field, np.ndarray]],
) -> None:
    """A sum, and beside it how many numbers it adds up, under `<name>_count`."""
    sums[name] = (finished.field, finished.values)
    sums[f"{name}_count"] = (
        Field(finished.field.dims, 0, finished.field.coords),
        np.round(count).astype(np.int64),
    )


def _room(held: np.ndarray | None, lead: tuple[int, ...], positions: int) -> np.ndarray:
    """`held` with room for `positions` keys.

    Grows in chunks, and from one entry for all heads to one per head.
    """
    if held is None:
        return np.zeros((*lead, positions), np.float32)
    if held.shape[1] < lead[1]:
        held = np.repeat(held, lead[1], axis=1)
    if held.shape[-1] < positions:
        grown = np.zeros((*held.shape[:-1], positions + 256), np.float32)
        grown[..., : held.shape[-1]] = held
        held = grown
    return held
