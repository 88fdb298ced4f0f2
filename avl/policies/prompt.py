"""One layer's attention over a prompt, as shown to a policy.

Nothing is computed before it is asked for: softmax weights of the rows a policy wants are made
beside the model's own attention, in float32 and block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avl.attention import AttentionCall, attention_weights
from avl.tokens import Modality

_BLOCK = 64  # query rows whose weights are in memory at once


@dataclass(frozen=True)
class Counts:
    """True tokens of one row of the batch, padding excluded, generated tokens (text) included.

    Attributes:
        system: tokens in front of the first image token.
        image: image tokens.
        text: all other tokens.
        tail: length of the run of text tokens at the end.
    """

    system: int
    image: int
    text: int
    tail: int

    @property
    def tokens(self) -> int:
        return self.system + self.image + self.text


class Prompt:
    """One layer's attention over a prompt (or a later turn), as shown to a policy.

    Attributes:
        layer: index of the decoder layer.
        layers: number of layers the policy acts on.
        positions: (batch, heads, keys) sequence index of each key, -1 where there is none; heads is
            1 while all key/value heads hold the same keys.
        modality: same shape, int8 codes of `Modality`.
        places: same shape, number of each key among its row's true tokens, from 0; 0 where there is
            none.
        rows: (batch, rows) sequence index of each query row, -1 where it is no token.
        row_modality: (batch, rows) of the query rows.
        counts: true tokens of each row of the batch.
        earlier_scores: (batch, key/value heads, keys) scores so far of keys held from earlier
            turns, 0 for new ones; or None.
        filter_ranks: (batch, 1, keys) order in which a policy chose image tokens before the
            decoder, higher = earlier, 0 for other keys; or None.
    """

    def __init__(
        self,
        call: AttentionCall,
        layers: int,
        *,
        positions: Tensor,
        modality: Tensor,
        places: Tensor,
        rows: Tensor,
        row_modality: Tensor,
        counts: Sequence[Counts],
        earlier_scores: Tensor | None,
        filter_ranks: Tensor | None = None,
    ) -> None:
        self._call = call
        self.layer = call.layer
        self.layers = layers
        self.positions = positions
        self.modality = modality
        self.places = places
        self.rows = rows
        self.row_modality = row_modality
        self.counts = counts
        self.earlier_scores = earlier_scores
        self.filter_ranks = filter_ranks

    @property
    def keys(self) -> Tensor:
        """(batch, key/value heads, keys, width)."""
        return self._call.key

    @property
    def values(self) -> Tensor:
        """(batch, key/value heads, keys, width)."""
        return self._call.value

    @property
    def widths(self) -> tuple[int, int, int]:
        """Key width, value width, and bytes of a number."""
        return self._call.key.shape[3], self._call.value.shape[3], self._call.key.element_size()

    def last_row(self) -> Tensor:
        """Softmax weights of the last query row, (batch, query heads, keys) float32."""
        rows = self._call.query.shape[2]
        return attention_weights(self._call, slice(rows - 1, rows))[:, :, 0]

    def weights(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Softmax weights of the blocks of query rows that contain any of the rows wanted.

        Args:
            rows: (batch, rows) bool, the rows wanted.

        Yields:
            The block and its weights, (batch, query heads, block, keys) float32. Under a purely
            causal mask, keys behind the block are left out.
        """
        call, wanted = self._call, rows.any(0).tolist()
        for start in range(0, len(wanted), _BLOCK):
            stop = min(start + _BLOCK, len(wanted))
            if any(wanted[start:stop]):
                visible = stop if call.causal else call.key.shape[2]
                yield slice(start, stop), attention_weights(call, slice(start, stop), visible)

    def row_sums(self, rows: Tensor) -> Tensor:
        """Softmax weights summed over query rows and over the query heads of a group.

        A group is the query heads that share a key/value head.

        Args:
            rows: (batch, rows) bool, which query rows to sum.

        Returns:
            (batch, key/value heads, keys) float32.
        """
        batch, heads, keys, _ = self._call.key.shape
        total = torch.zeros(batch, heads, keys, device=self._call.key.device)
        for block, weights in self.weights(rows):
            # Rows of the block that are not wanted count zero; (batch, query heads, keys seen by
            # the block).
            summed = weights.mul_(rows[:, None, block, None]).sum(2)
            by_group = summed.view(batch, heads, self._call.groups, -1)
            total[..., : weights.shape[3]] += by_group.sum(2)
        return total

    def newest(self, count: int) -> Tensor:
        """(batch, rows) bool: the last `count` query rows that are tokens."""
        token = self.row_modality != Modality.PADDING
        # Counted from the right among true tokens, so that fillers and padding do not use up the
        # count.
        return token & (token.flip(1).cumsum(1).flip(1) <= count)

    def text_rows(self) -> Tensor:
        """(batch, rows) bool: query rows of text, or the last row where a prompt has no text."""
        text = self.row_modality == Modality.TEXT
        return torch.where(text.any(1, keepdim=True), text, self.newest(1))
