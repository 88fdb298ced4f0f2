"""What is kept of one sample while its model runs, and how that becomes arrays with names.

A `SampleLog` is filled by the recorder with finished per-layer numbers, pass after pass, and knows nothing of models,
weights or blocks. It holds sums, counts and the values of token-producing rows: a few hundred numbers per layer and head
and step, plus one or two numbers per key and per image token. `part()` may be asked at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from avl.tokens import Modality
from avl_analysis.schema import Field, Part
from avl_analysis.statistics.base import (
    KeyScores,
    KeyStatistic,
    RowStatistic,
    Statistic,
    Trajectory,
    TrajectoryStatistic,
)

MAX_TRAJECTORY = 512
"""Steps whose image-token scores are held for trajectory statistics (the first ones); bounds memory at
512 x layers x image tokens x 4 bytes, 189 MB for 32 layers and 2,880 image tokens."""

PHASES = ("prefill", "decode", "extend")


@dataclass(eq=False)
class SampleLog:
    """One sample in the making.

    Attributes:
        name: its name, unique within a recording.
        layers, heads: how many of each are recorded.
        statistics: what is computed.
        keep_maps: whether image-token scores per step become part of the recording.
    """

    name: str
    layers: int
    heads: int
    statistics: Sequence[Statistic]
    keep_maps: bool = True
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    phases: list[str] = field(default_factory=list)
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, np.ndarray] = field(default_factory=dict)
    steps: dict[str, list[np.ndarray]] = field(default_factory=dict)
    received: np.ndarray | None = None
    queries: np.ndarray | None = None
    scores: list[np.ndarray] = field(default_factory=list)
    last: np.ndarray | None = None
    finished: bool = False

    @property
    def length(self) -> int:
        """Number of tokens seen so far, padding left out."""
        return len(self.tokens["token_id"])

    @property
    def image_positions(self) -> np.ndarray:
        """Positions of the image tokens, in order."""
        return np.flatnonzero(self.tokens["modality"] == Modality.IMAGE)

    def add_tokens(self, **arrays: np.ndarray) -> None:
        """Tokens behind the ones so far: token_id, modality, image, row, column, each (count,)."""
        for name, array in arrays.items():
            held = self.tokens.get(name)
            self.tokens[name] = array.copy() if held is None else np.concatenate([held, array])

    def add_prompt(self, name: str, sums: np.ndarray, counts: np.ndarray) -> None:
        """Sums and counts over prompt rows, (layers, heads, 3, *extra)."""
        if name in self.sums:
            self.sums[name] = self.sums[name] + sums
            self.counts[name] = self.counts[name] + counts
        else:
            self.sums[name], self.counts[name] = sums.astype(np.float64), counts.astype(np.int64)

    def add_step_values(self, name: str, values: np.ndarray) -> None:
        """The values of one token-producing row, (layers, heads, *extra)."""
        self.steps.setdefault(name, []).append(values.astype(np.float32))

    def add_received(self, rows: slice, received: np.ndarray, queries: np.ndarray) -> None:
        """Attention received per key, (layers, heads, rows, positions), from which of `schema.ROWS` it came."""
        positions = received.shape[-1]
        self.received = _room(self.received, (self.layers, self.heads, 3), positions)
        self.queries = _room(self.queries, (self.layers, queries.shape[1], 3), positions)
        self.received[:, :, rows, :positions] += received
        self.queries[:, :, rows, :positions] += queries

    def add_scores(self, scores: np.ndarray) -> None:
        """Image-token scores of one token-producing row, (layers, heads, image tokens); NaN = not attended."""
        if len(self.scores) < MAX_TRAJECTORY:
            seen = ~np.isnan(scores).all(1)
            mean = np.where(np.isnan(scores), 0.0, scores).mean(1)
            self.scores.append(np.where(seen, mean, np.nan).astype(np.float32))
        if self.last is None:
            self.last = scores.astype(np.float32)

    # -- as arrays ----------------------------------------------------------------------------------------------------

    def part(self) -> Part:
        """Everything of this sample, by group."""
        sums: dict[str, tuple[Field, np.ndarray]] = {}
        values: dict[str, tuple[Field, np.ndarray]] = {}
        scores, trajectory = self._key_scores(), self._trajectory()
        for statistic in self.statistics:
            if isinstance(statistic, RowStatistic):
                self._row_fields(statistic, sums, values)
                continue
            if isinstance(statistic, KeyStatistic):
                result, count = statistic.value(scores) if scores is not None else (None, None)
            elif isinstance(statistic, TrajectoryStatistic):
                result, count = statistic.value(trajectory) if trajectory is not None else (None, None)
            if result is None:
                continue
            described = statistic.field(*statistic.dims)
            if count is None:
                values[statistic.name] = (described, result)
            else:
                sums[statistic.name] = (described, result)
                sums[f"{statistic.name}_count"] = (Field(described.dims, 0, described.coords), count)
        return {"tokens": self._token_fields(), "sums": sums, "statistics": values, "maps": self._map_fields()}

    def _row_fields(
        self,
        statistic: RowStatistic,
        sums: dict[str, tuple[Field, np.ndarray]],
        values: dict[str, tuple[Field, np.ndarray]],
    ) -> None:
        name = statistic.name
        rows = "every prompt row" if statistic.every_row else "evenly spaced prompt rows"
        if name in self.sums:
            prompt = statistic.field("layer", "head", "query_modality", prompt_rows=rows)
            sums[f"{name}_prefill"] = (prompt, self.sums[name])
            sums[f"{name}_prefill_count"] = (Field(prompt.dims, 0, prompt.coords), self.counts[name])
        if name in self.steps:
            values[name] = (statistic.field("layer", "head", "step"), np.stack(self.steps[name], 2))

    def _token_fields(self) -> dict[str, tuple[Field, np.ndarray]]:
        modality = self.tokens["modality"]
        fields = {name: (Field(("position",), -1), array) for name, array in self.tokens.items()}
        prompt = self.length - self.phases.count("decode")
        phases = np.array([PHASES.index(phase) for phase in self.phases], np.int8)
        fields["phase"] = (Field(("step",), -1, attrs={"flag_meanings": " ".join(PHASES)}), phases)
        fields["prompt_length"] = (Field((), -1), np.array(prompt))
        fields["modality_count"] = (
            Field(("key_modality",), 0, attrs={"long_name": "prompt tokens of each modality"}),
            np.bincount(modality[:prompt], minlength=3)[:3],
        )
        fields["token_position"] = (Field(("token",), -1), self.image_positions)
        return fields

    def _map_fields(self) -> dict[str, tuple[Field, np.ndarray]]:
        if not self.keep_maps or self.last is None or not self.last.shape[-1]:
            return {}
        mean = {"long_name": "attention weight of an image token, mean over heads"}
        last = {"long_name": "attention weight of an image token from the last prompt row"}
        return {
            "image_score": (Field(("step", "layer", "token"), attrs=mean), np.stack(self.scores)),
            "image_score_last": (Field(("layer", "head", "token"), attrs=last), self.last),
        }

    def _key_scores(self) -> KeyScores | None:
        if self.received is None or self.queries is None:
            return None
        used = slice(0, self.length)
        received = self.received[..., used]
        return KeyScores(received, np.broadcast_to(self.queries[..., used], received.shape), self.tokens["modality"])

    def _trajectory(self) -> Trajectory | None:
        if self.last is None or not self.last.shape[-1]:
            return None
        at = self.image_positions
        places = (self.tokens[name][at] for name in ("image", "row", "column"))
        return Trajectory(np.stack(self.scores), self.last, *places)


def _room(held: np.ndarray | None, lead: tuple[int, ...], positions: int) -> np.ndarray:
    """`held` with room for `positions` keys; grows in chunks, and from one shared head to all heads if need be."""
    if held is None:
        return np.zeros((*lead, positions), np.float32)
    if held.shape[1] < lead[1]:
        held = np.repeat(held, lead[1], axis=1)
    if held.shape[-1] < positions:
        grown = np.zeros((*held.shape[:-1], max(positions, held.shape[-1] + 256)), np.float32)
        grown[..., : held.shape[-1]] = held
        held = grown
    return held
