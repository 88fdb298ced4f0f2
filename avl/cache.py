"""One layer of a KV cache whose keys come and go, as `transformers` sees it.

The keys themselves lie in a buffer of our own (buffer.py); here it speaks the language of a
`transformers` cache layer. Whatever would need keys that are gone is refused with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from avl.attention import Forward
from avl.buffer import KeyBuffer
from avl.hooks import HookError
from avl.policies.prompt import Counts


@dataclass(eq=False)
class Conversation:
    """What the layers of one cache have in common.

    Attributes:
        forward: the pass that is running; None outside passes and once the policy has left the
            model.
        is_refresh: whether a decode step reads everything held.
        counts: true tokens of each row of the batch, the running pass included.
        arrival: score with which a new key starts.
        rows: which original row each row of the batch continues, where rows have been rearranged.
        moved: the same since the last pass, or None.
        saw_inference: whether a pass ran inside torch.inference_mode().
        layers: layers of the cache that are ours, by index.
    """

    forward: Forward | None = None
    is_refresh: bool = True
    counts: list[Counts] = field(default_factory=list)
    arrival: float = 0.0
    rows: Tensor | None = None
    moved: Tensor | None = None
    saw_inference: bool = False
    layers: dict[int, AdaptiveLayer] = field(default_factory=dict)

    def is_inference(self) -> bool:
        """Whether a layer holds tensors that only torch.inference_mode() can change."""
        if not self.saw_inference:  # tensors are not asked one by one at every step
            return False
        buffers = [layer.buffer for layer in self.layers.values() if layer.buffer is not None]
        return any(tensor.is_inference() for buffer in buffers for tensor in buffer.tensors())

    def take_rows(self, rows: Tensor) -> None:
        """Row i of the batch now continues what was row rows[i]."""
        self.rows = rows if self.rows is None else self.rows[rows]
        # Rows may move several times between two passes; row i is what was row rows[i] after the
        # move before.
        self.moved = rows if self.moved is None else self.moved[rows]
        # Equal rows need no reordering, and reading the indices would wait for the device.
        if len(set(self.counts)) > 1 or len(rows) != len(self.counts):
            self.counts = [self.counts[i] for i in rows.tolist()]


class AdaptiveLayer(CacheLayerMixin):
    """A layer's keys and values in a cache of transformers.

    Attributes:
        conversation: what this layer shares with the others.
        index: its number among all layers.
        buffer: what it holds; None until the prompt has passed and the policy has chosen.
        widths: heads, key width and value width of what the model caches.
        seen: tokens that passed this layer, padding included.
        hands_over: whether a decode step's new key and value are written by the attention call, in
            one with attention itself, and not by `update`. Only where the model attends to the very
            tensors that its cache returns, as its prompt showed.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, conversation: Conversation, index: int) -> None:
        # Not the base class's: it assigns `keys` and `values`, which are the buffer's here.
        self.is_initialized = False
        self.conversation = conversation
        self.index = index
        conversation.layers[index] = self
        self.buffer: KeyBuffer | None = None
        self.widths = (0, 0, 0)
        self.seen = 0
        self.hands_over = False
        # What `update` last returned as it came. Held, so that nothing else gets its memory.
        self._returned: tuple[Tensor, Tensor] | None = None

    @property
    def filled_buffer(self) -> KeyBuffer:
        """The buffer of a layer that a prompt has passed."""
        assert self.buffer is not None, "a prompt has to pass first"
        return self.buffer

    @property
    def keys(self) -> Tensor | None:
        """The buffer's keys, empty slots included."""
        return None if self.buffer is None else self.buffer.keys

    @property
    def values(self) -> Tensor | None:
        """The buffer's values, empty slots included."""
        return None if self.buffer is None else self.buffer.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in new keys and values; returns what this pass attends to, held keys first.

        Keys in few bits are left out of a decode step's, which attends to them as they are stored;
        where the layer `hands_over`, all but the new ones are.

        Args:
            key_states: (batch, key/value heads, new tokens, head dim).
            value_states: (batch, key/value heads, new tokens, head dim).
            args: of other kinds of cache; not read.
            kwargs: likewise.

        Raises:
            HookError: no policy is on the model any more.
        """
        forward = self.conversation.forward
        if forward is None:
            raise HookError(
                "this KV cache was filled under a policy that is no longer on the model; continue"
                " it inside the same `with avl.adaptive(...)` block, or start with an empty cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # What is cached, to be compared with what is attended to: models with compressed keys
        # differ.
        self.widths = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        self.seen = forward.start + forward.tokens
        # A prompt attends to all of itself; the policy chooses afterwards (`PrefillStep`).
        decoding = forward.kind == "decode"
        if self.buffer is None or (decoding and self.hands_over):
            self._returned = key_states, value_states
            return key_states, value_states
        if decoding:
            arrival = self.conversation.arrival
            self.buffer.append(key_states.detach(), value_states.detach(), forward.start, arrival)
            # The new key was appended first: a row always attends to its own token.
            return self.buffer.attended(refresh=self.conversation.is_refresh)
        keys, values = self.buffer.everything()
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)

    def returned(self, key: Tensor, value: Tensor) -> bool:
        """Whether these are, in memory, what `update` was given and returned as it was."""
        if self._returned is None:
            return False
        own_key, own_value = self._returned
        return key.data_ptr() == own_key.data_ptr() and value.data_ptr() == own_value.data_ptr()

    def learn(self, key: Tensor, value: Tensor) -> None:
        """See in a prompt's attention call whether the model attends to what `update` returns."""
        self.hands_over = self.returned(key, value)
        self._returned = None  # a prompt's keys are not kept

    def get_seq_length(self) -> int:
        """Tokens seen, from which positions are computed; the number held is `buffer.held()`."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks of transformers cover the new tokens only.

        What is held is masked by us, layer by layer.
        """
        return query_length, self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.__init__(self.conversation, self.index)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise HookError(
                "a cache that drops keys cannot be cropped: what was dropped for a token cannot be"
                " brought back. Assisted and speculative decoding need the full cache: generate"
                " without assistant or without policy"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.buffer is not None:
            rows = torch.arange(self.buffer.positions.shape[0], device=self.device)
            self._take_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.buffer is not None:
            rows = torch.arange(self.buffer.positions.shape[0], device=self.device)
            self._take_rows(rows[indices.to(self.device)])

    def _take_rows(self, rows: Tensor) -> None:
        if self.buffer is None:
            return
        rows = rows.to(self.device)
        # The cache moves every layer; the conversation moves once, with the first of them.
        if self.index == min(self.conversation.layers):
            self.conversation.take_rows(rows)
        self.buffer.select(rows)
