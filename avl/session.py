"""Switching a policy on and off on a loaded model.

`with adaptive(model, policy) as session:` attaches an intervention. When a prompt enters the
decoder with an empty cache, the cache's layers are exchanged for ours; `generate()` keeps its own
cache object and notices nothing. For every pass through the decoder the session makes one object
that acts on it, prefill_step.py or decode_step.py, and writes down what it cost.

Keys, values, mask and positions of a call always come from one layer's own slots, never from
transformers' mask, which is one for all layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from avl.accounting import Usage, UsageLog
from avl.arguments import cache_parameter, find_cache, named_arguments, uses_cache
from avl.attention import Attend, AttentionCall, Forward
from avl.cache import AdaptiveLayer, Conversation
from avl.decode_step import DecodeStep
from avl.families import UnsupportedModelError
from avl.hooks import AttentionHooks, HookError, Intervention, attach
from avl.image_encoder import EncoderAttention
from avl.module_hooks import ModuleHook, add_hook
from avl.policies.base import CoredPolicy, Policy
from avl.policies.before_decoder import BeforeDecoderPolicy
from avl.policies.prompt import Counts
from avl.prefill_filter import PrefillFilter
from avl.prefill_step import PrefillStep
from avl.selection import Selection, SelectionLog
from avl.tokens import Modality


class AdaptiveSession(Intervention):
    """A policy on a model.

    Use `adaptive`, or `attach` and `detach` where a `with` block does not fit.
    """

    @property
    def description(self) -> str:
        """The policy, as its `repr` states it."""
        return self._description

    def __init__(self, model: nn.Module, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be a policy such as avl.AdaptivePolicy(); got {policy!r}")
        self.model = model
        self.policy = policy
        self._description = repr(policy)  # asked for at every pass
        self._hooks: AttentionHooks | None = None
        self._filter: PrefillFilter | None = None
        self._encoder: EncoderAttention | None = None
        self._hook: ModuleHook | None = None
        # By cache, weakly: what belongs to a conversation goes when `generate` drops its cache.
        self._conversations: WeakKeyDictionary[Cache, Conversation] = WeakKeyDictionary()
        self._pass: PrefillStep | DecodeStep | None = None
        self._logs: WeakKeyDictionary[Conversation, tuple[UsageLog, SelectionLog]] = (
            WeakKeyDictionary()
        )
        # those of the conversation that ran last, kept after its cache is gone
        self._usage_log: UsageLog | None = None
        self._selection_log: SelectionLog | None = None

    # -- on and off --------------------------------------------------------------------------------

    def attach(self) -> AdaptiveSession:
        """Put the policy on the model.

        Raises:
            UnsupportedModelError: the model cannot be adapted; the message says why.
            HookError: another policy is on this model.
        """
        if self._hooks is not None:
            raise HookError(
                "this AdaptiveSession is on its model already; call its detach() first, or make"
                " another AdaptiveSession"
            )
        hooks = attach(self.model, self)
        try:
            decoder = hooks.family.decoder
            self._hook = add_hook(
                # In front of the hooks' own: these must already find the cache that is supplied
                # here.
                decoder,
                self._supply_cache,
                "before",
                with_kwargs=True,
                prepend=True,
            )
            if self.policy.filter_layer is not None:
                self._filter = PrefillFilter(hooks.family, self.policy.filter_layer)
                self._filter.connect()
            if isinstance(self.policy, BeforeDecoderPolicy) and self.policy.reads_image_encoder:
                self._encoder = EncoderAttention(self.model, hooks.family)
                self._encoder.connect()
        except BaseException:
            self._disconnect(hooks)
            raise
        self._hooks = hooks
        return self

    def detach(self) -> None:
        """Take the policy off again; the model is exactly what it was. Harmless if it is not on."""
        if self._hooks is not None:
            hooks, self._hooks = self._hooks, None
            self._disconnect(hooks)

    def _disconnect(self, hooks: AttentionHooks) -> None:
        hooks.detach(self)
        if self._hook is not None:
            self._hook.remove()
        if self._filter is not None:
            self._filter.disconnect()
        for conversation in self._conversations.values():
            conversation.forward = None
        if self._encoder is not None:
            self._encoder.disconnect()
        self._hook = self._filter = self._pass = self._encoder = None

    # -- what happened -----------------------------------------------------------------------------

    def usage(self) -> Usage:
        """Bytes and keys of the latest conversation, pass by pass.

        Raises:
            ValueError: nothing has run under the policy yet.
        """
        if self._usage_log is None or self._usage_log.empty:
            raise ValueError(
                "nothing has run under this policy yet; generate something inside the block first"
            )
        return self._usage_log.usage()

    @property
    def selection(self) -> Selection:
        """Which positions each layer held and attended in the latest conversation; see `Selection`.

        Raises:
            ValueError: nothing has run under the policy yet.
        """
        if self._selection_log is None:
            raise ValueError(
                "nothing has run under this policy yet; generate something inside the block first"
            )
        return self._selection_log

    # -- passes -----------------------------------------------------------------------------------

    def begin(self, forward: Forward) -> None:
        self._pass = None
        if forward.cache is None:
            raise HookError(
                "a policy acts on the KV cache, and use_cache=False leaves none; call with"
                " use_cache=True"
            )
        if forward.kind == "prefill":
            conversation = self._exchange(forward.cache)
        else:
            conversation = self._conversations[forward.cache]
            # Said here, as torch's own error comes from the middle of a layer and names no way out.
            if not torch.is_inference_mode_enabled() and conversation.is_inference():
                raise HookError(
                    "this KV cache was filled inside torch.inference_mode(), and torch lets nobody"
                    " write to it outside; continue it inside torch.inference_mode(), or run its"
                    " prompt and all its steps under torch.no_grad()"
                )
            # Rows of the cache were reordered or repeated since the last pass; the layout, which
            # was made of the prompt's rows, follows them.
            if conversation.rows is not None:
                forward.layout = forward.layout.select(conversation.rows)
        conversation.forward = forward
        conversation.saw_inference |= torch.is_inference_mode_enabled()
        conversation.arrival = self.policy.arrival(forward.start)
        self._count(conversation, forward)
        # Prompts and policies without a core read everything.
        conversation.is_refresh = True
        if forward.kind == "decode" and isinstance(self.policy, CoredPolicy):
            conversation.is_refresh = self.policy.is_refresh(forward.step)
        self._pass = step = self._step_for(conversation, forward)
        if self._filter is not None and isinstance(step, PrefillStep):
            if forward.kind == "prefill":
                self._filter.begin(forward, partial(step.choose_input, forward))
            else:
                self._filter.begin(None)

    def attend(self, call: AttentionCall, inner: Attend) -> Tensor:
        assert self._pass is not None
        return self._pass.attend(call, inner)

    def end(self, forward: Forward) -> None:
        assert self._pass is not None
        assert self._usage_log is not None
        self._pass.end()
        conversation, reads = self._pass.conversation, self._pass.reads
        layers = list(conversation.layers.values())
        self._usage_log.write(forward.step, layers, [reads[layer.index] for layer in layers])
        conversation.forward = None
        if self._filter is not None:
            self._filter.begin(None)
        self._pass = None

    # -- beginning ---------------------------------------------------------------------------------

    def _supply_cache(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The cache a decoder would make for itself.

        Made where its layers can still be exchanged.
        """
        given = named_arguments(module, args, kwargs)
        if not uses_cache(module, given) or find_cache(given) is not None:
            return None
        try:
            name = cache_parameter(module)
        except LookupError as error:
            raise UnsupportedModelError(str(error)) from error
        if len(args) > list(signature(module.forward).parameters).index(name):
            return None  # None was passed by position, so by somebody who wants no cache
        return args, {**kwargs, name: DynamicCache(config=module.config)}

    def _exchange(self, cache: Any) -> Conversation:
        """Put our layers in place of the cache's full-attention ones."""
        if not isinstance(cache, DynamicCache):
            raise HookError(
                f"a policy needs the default (dynamic) KV cache, not {type(cache).__name__}; call"
                " generate without cache_implementation and without past_key_values"
            )
        if cache.offloading:
            raise HookError(
                "a policy does not move keys between devices; call generate without an offloaded"
                " cache"
            )
        assert self._hooks is not None
        conversation = Conversation()
        if not cache.layers:
            cache.layers.extend(DynamicLayer() for _ in range(self._hooks.family.layers))
        if _shares_keys(self._hooks.family.decoder.config):
            raise UnsupportedModelError(
                f"layers of {self._hooks.family.name} share the KV cache of other layers; policies"
                " act on layers that own their keys"
            )
        for index, layer in enumerate(cache.layers):
            # Exactly DynamicLayer: its subclasses (sliding windows and others) drop or choose keys
            # by themselves. An `AdaptiveLayer` stands in a cache that was emptied and is used
            # again.
            if type(layer) is DynamicLayer or isinstance(layer, AdaptiveLayer):
                cache.layers[index] = AdaptiveLayer(conversation, index)
        # Under one mask for all layers, a layer that keeps other keys than ours would be masked
        # wrongly.
        own = {
            type(c).__name__
            for c in cache.layers
            if isinstance(c, DynamicLayer) and not c.is_sliding
        }
        if own and conversation.layers:
            raise UnsupportedModelError(
                f"{self._hooks.family.name} mixes full attention with layers that choose their keys"
                f" themselves ({', '.join(sorted(own))}) under one mask; policies act on full"
                " attention, sliding windows beside it"
            )
        if not conversation.layers:
            kinds = sorted({type(layer).__name__ for layer in cache.layers})
            raise UnsupportedModelError(
                f"{self._hooks.family.name} has no full-attention layer with a cache of its own"
                f" (found {', '.join(kinds)}); policies act on full attention only"
            )
        self._conversations[cache] = conversation
        return conversation

    def _count(self, conversation: Conversation, forward: Forward) -> None:
        """True tokens of each row, and no padding behind them."""
        if forward.kind == "decode":
            conversation.counts = [
                Counts(c.system, c.image, c.text + 1, c.tail + 1) for c in conversation.counts
            ]
            return
        modality = forward.layout.modality
        if bool((modality[:, -1] == Modality.PADDING).any()):
            raise HookError(
                "a prompt of the batch is padded on the right; policies need padding_side='left'"
            )
        text = (modality == Modality.TEXT).long()
        # Counted from the end: the product of the flags stays 1 as long as all tokens so far are
        # text.
        tail = text.flip(1).cumprod(1).sum(1, keepdim=True)
        rows = torch.cat([forward.layout.counts(), tail], 1).tolist()
        conversation.counts = [Counts(*row) for row in rows]

    def _step_for(self, conversation: Conversation, forward: Forward) -> PrefillStep | DecodeStep:
        """What acts on this pass, with the conversation's logs opened for it."""
        if forward.kind == "prefill":
            layers = tuple(conversation.layers)
            self._logs[conversation] = UsageLog(layers), SelectionLog(forward.layout, layers)
        self._usage_log, self._selection_log = self._logs[conversation]
        if conversation.moved is not None:
            for layer in self._selection_log.layers:
                self._selection_log.note(layer, "rows", conversation.moved)
            conversation.moved = None
        self._selection_log.begin(forward.step, forward.layout)
        if forward.kind == "decode":
            return DecodeStep(self.policy, conversation, forward, self._selection_log)
        return PrefillStep(
            self.policy,
            conversation,
            self._usage_log,
            self._selection_log,
            self._filter,
            self._encoder,
        )


@contextmanager
def adaptive(model: nn.Module, policy: Policy) -> Iterator[AdaptiveSession]:
    """Run a loaded model under a policy for the length of a `with` block.

    Args:
        model: a vision-language model of transformers, with SDPA or eager attention.
        policy: for example `AdaptivePolicy()`, or one of the baselines.

    Yields:
        The session, with `usage()` and `selection`; both stay readable after the block.

    Raises:
        UnsupportedModelError: the model cannot be adapted; the message says why.
        HookError: another policy is on this model, or (inside the block) the cache is used in a way
            that cannot be followed: filled before the block, static, quantised, offloaded, cropped.
    """
    session = AdaptiveSession(model, policy)
    session.attach()
    try:
        yield session
    finally:
        session.detach()


def _shares_keys(config: Any) -> bool:
    """Whether layers attend to the keys of other layers.

    Older versions of transformers only say how many.
    """
    modes = getattr(config, "kv_sharing_modes", None) or ()
    return "reuse" in modes or bool(getattr(config, "num_kv_shared_layers", 0))
