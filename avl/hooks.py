"""Hooks at transformers' attention interface: the one place where the project touches a model.

`attach(model, observer)` or `attach(model, intervention)` connects to a loaded model's decoder;
`AttentionHooks.detach`, or leaving `attached(...)`, disconnects and leaves the model exactly as it
was. An `Intervention` may compute attention itself and exchange the cache (a policy); an `Observer`
sees what was computed (a recorder). A model takes one of each at a time, in any order. The hooks do
not know what either does with what it sees.

How it works. transformers 5 looks up the attention function and the mask function of a decoder
under one name, the config's `_attn_implementation`. This module registers, once and under a name of
its own per backend ("avl_sdpa", ...), a function that asks which hooks own the calling module and
otherwise just delegates, together with the backend's own mask function: a name without a mask
function silently loses the padding mask. Attaching then means changing that name in the decoder's
config, plus a few module hooks which learn where in the sequence a pass stands. The delegated call
gets the very arguments the model passed, so with an observer alone the logits stay bit-identical.

Gotchas:
* Config objects may be shared by two models, so the name is counted and restored by the last one.
* Some modeling files branch on the name itself (`in ("eager", "sdpa")`), so ours compares equal to
  the backend's.
* Models that embed text and images themselves before calling the decoder (BLIP-2) show their token
  ids only to the embedding layer, so that layer is watched too.
* A sliding window's cache hands out its newest keys only, so key j is not position j.
* The only object that lives exactly as long as a conversation is its KV cache, so the position in
  the sequence is remembered there.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from inspect import signature
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from avl.attention import Attend, AttentionCall, Forward
from avl.families import Family, UnsupportedModelError, describe
from avl.tokens import TokenLayout

_PREFIX = "avl_"
_LOCK = threading.RLock()
_OWNERS: WeakKeyDictionary[nn.Module, AttentionHooks] = (
    WeakKeyDictionary()
)  # attention module -> its hooks
_RENAMED: dict[
    int, list[Any]
] = {}  # id(config) -> [config, original name, number of hooks using it]


class _Name(str):
    """The name of our function for a backend; it looks itself up under its own name and equals the
    backend's, too.

    DeepSeek-style sparse attention, Gemma 4 and others ask `config._attn_implementation == "sdpa"`
    to decide what they pass on; with a name of another make they would compute something else. The
    hash is that of the full text, so registries (dictionaries) find our function and never the
    backend's.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(other).removeprefix(_PREFIX) == self.removeprefix(
            _PREFIX
        )

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class HookError(RuntimeError):
    """The model was used in a way the hooks cannot follow; the message says what to do instead."""


class Observer:
    """Sees every attention call of a decoder after it was computed; override what is needed.

    All methods run on the thread that runs the model.
    """

    def begin(self, forward: Forward) -> None:
        """A pass through the decoder starts."""

    def observe(self, call: AttentionCall, output: Tensor) -> None:
        """One attention call, as an intervention left it, and its output.

        `output` has shape (batch, rows, query heads, head dim).
        """

    def end(self, forward: Forward) -> None:
        """The pass is over; not called when the pass raised."""


class Intervention:
    """Computes attention in the model's place; override what is needed.

    All methods run on the thread that runs the model.
    """

    def begin(self, forward: Forward) -> None:
        """A pass through the decoder starts; `forward.cache.layers` may be exchanged here."""

    def attend(self, call: AttentionCall, inner: Attend) -> Tensor:
        """The output of one call, (batch, rows, query heads, head dim).

        `inner` is the model's own attention; `call` may be changed before it is passed on.
        """
        return inner(call)

    def end(self, forward: Forward) -> None:
        """The pass is over; not called when the pass raised."""


@dataclass
class _Stream:
    """Where one conversation (one cache) stands."""

    layout: TokenLayout
    seen: int
    step: int


class AttentionHooks:
    """What is attached to one model. Made by `attach`; one per model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.family: Family = describe(model)
        self.intervention: Intervention | None = None
        self.observer: Observer | None = None
        self.forward: Forward | None = None
        self._streams: WeakKeyDictionary[Any, _Stream] = WeakKeyDictionary()
        self._inputs: dict[str, Any] = {}
        self._shown: dict[str, Any] = {}
        self._watched: list[tuple[nn.Module, str]] = []
        self._embedded: Tensor | None = None
        self._calls = 0
        self._hooks: list[Any] = []
        self._modules = [
            m
            for m in self.family.decoder.modules()
            if isinstance(getattr(m, "layer_idx", None), int)
        ]
        configs = [m.config for m in self._modules if hasattr(m, "config")] + [
            self.family.decoder.config
        ]
        self._configs = list({id(c): c for c in configs}.values())

    # -- connecting --------------------------------------------------------------------------------

    def _connect(self) -> None:
        if not self._modules:
            raise UnsupportedModelError(
                f"the decoder of {type(self.model).__name__} has no attention modules with a layer"
                " index; recording and adapting need a decoder that uses transformers' attention"
                " interface"
            )
        try:
            for config in self._configs:
                _rename(config)
            for module in self._modules:
                _OWNERS[module] = self
            outer = [
                m
                for m in (self.model, getattr(self.model, "base_model", None))
                if isinstance(m, nn.Module)
            ]
            for module in {id(m): m for m in outer if m is not self.family.decoder}.values():
                self._hooks.append(
                    module.register_forward_pre_hook(self._remember_inputs, with_kwargs=True)
                )
            embedding = self.model.get_input_embeddings()
            self._hooks.append(
                embedding.register_forward_pre_hook(self._remember_ids, with_kwargs=True)
            )
            self._watch_encoders()
            decoder = self.family.decoder
            self._hooks.append(decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._hooks.append(decoder.register_forward_hook(self._end, with_kwargs=True))
        except BaseException:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for module, name in self._watched:
            vars(module).pop(name, None)
            _ENCODERS.pop(module, None)
        self._watched.clear()
        for module in self._modules:
            _OWNERS.pop(module, None)
        for config in self._configs:
            _restore(config)
        self.forward = None

    def _watch_encoders(self) -> None:
        """See what images are encoded from.

        `generate` encodes them first and calls the model with the features alone, so grids and
        sizes pass only here.
        """
        for module in self.model.modules():
            for name in _ENCODING:
                function = getattr(type(module), name, None)
                if callable(function) and name not in vars(module):
                    setattr(module, name, MethodType(_watched(function), module))
                    self._watched.append((module, name))
                    _ENCODERS[module] = self

    def detach(self, hook: Observer | Intervention) -> None:
        """Disconnect `hook`; the last one restores the model. Harmless if it is not connected."""
        with _LOCK:
            if self.intervention is not hook and self.observer is not hook:
                return
            self.intervention = None if self.intervention is hook else self.intervention
            self.observer = None if self.observer is hook else self.observer
            if self.intervention is None and self.observer is None:
                self._disconnect()
                _HOOKS.pop(self.model, None)

    # -- following the sequence --------------------------------------------------------------------

    def _remember_inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = _named(module, args, kwargs)
        if given.get("input_ids") is not None or module is self.model:
            self._inputs = given

    def _remember_shown(self, arguments: dict[str, Any]) -> None:
        self._shown |= {name: value for name, value in arguments.items() if value is not None}

    def _remember_ids(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        ids = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if (
            self.forward is None
            and ids is not None
            and ids.dim() == 2
            and not ids.is_floating_point()
        ):
            self._embedded = ids

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _named(module, args, kwargs)
        inputs, self._inputs = self._inputs, {}
        shown, self._shown = self._shown, {}
        new = (
            given.get("input_ids")
            if given.get("input_ids") is not None
            else given.get("inputs_embeds")
        )
        if new is None:
            raise HookError("the decoder was called without input_ids and inputs_embeds")
        cache, tokens = given.get("past_key_values"), int(new.shape[1])
        ids = (
            inputs.get("input_ids")
            if inputs.get("input_ids") is not None
            else given.get("input_ids")
        )
        if ids is None and self._embedded is not None and self._embedded.shape == new.shape[:2]:
            ids = self._embedded
        self._embedded = None
        inputs = {
            **shown,
            **{name: value for name, value in (inputs or given).items() if value is not None},
        }
        self.forward = self._place(cache, tokens, ids, inputs)
        self._calls = 0
        for hook in (self.intervention, self.observer):
            if hook is not None:
                hook.begin(self.forward)

    def _place(
        self, cache: Any, tokens: int, ids: Tensor | None, inputs: dict[str, Any]
    ) -> Forward:
        """Where this pass stands in its sequence."""
        held = int(cache.get_seq_length()) if cache is not None else 0
        stream = self._streams.get(cache) if cache is not None else None
        if held == 0:
            layout = self._layout(ids, inputs, tokens)
            stream = _Stream(layout, tokens, 0)
            forward = Forward("prefill", 0, 0, tokens, layout, cache, inputs=inputs)
        else:
            if stream is None or stream.seen != held:
                raise HookError(
                    f"the KV cache holds {held} tokens, of which {stream.seen if stream else 0}"
                    " passed here; start with an empty cache after attaching (one cropped or"
                    " filled elsewhere cannot be followed)"
                )
            decoding = tokens == 1
            if decoding:
                layout = stream.layout.extend_text(1)
            else:
                layout = stream.layout.extend(self._layout(ids, inputs, tokens, held))
            stream = replace(stream, layout=layout, seen=held + tokens, step=stream.step + decoding)
            forward = Forward(
                "decode" if decoding else "extend",
                stream.step,
                held,
                tokens,
                layout,
                cache,
                inputs=inputs,
            )
        if cache is not None:
            self._streams[cache] = stream
        return forward

    def _layout(
        self, ids: Tensor | None, inputs: dict[str, Any], tokens: int, held: int = 0
    ) -> TokenLayout:
        if ids is None:
            raise HookError(
                "cannot tell image from text tokens without input_ids; call the model with"
                " input_ids"
            )
        ids = ids[:, -tokens:]
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == held + tokens:
            mask = mask[:, -tokens:]
        else:
            mask = None
        return self.family.layout(ids, mask, inputs)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forward, self.forward = self.forward, None
        if forward is None:
            return
        if self._calls == 0:
            raise UnsupportedModelError(
                f"no attention layer of {type(self.model).__name__} went through transformers'"
                " attention interface, so nothing can be seen of it (model type"
                f" {self.family.name!r}); see `avl models` for supported families"
            )
        for hook in (self.intervention, self.observer):
            if hook is not None:
                hook.end(forward)

    # -- attention ---------------------------------------------------------------------------------

    def call(self, inner: Attend, call: AttentionCall) -> Tensor:
        self._calls += 1
        call.key_positions = _newest(call)
        output = inner(call) if self.intervention is None else self.intervention.attend(call, inner)
        if self.observer is not None:
            self.observer.observe(call, output)
        return output


_HOOKS: WeakKeyDictionary[nn.Module, AttentionHooks] = WeakKeyDictionary()
_ENCODERS: WeakKeyDictionary[nn.Module, AttentionHooks] = (
    WeakKeyDictionary()
)  # module whose encoding of images is watched -> its hooks
_ENCODING = ("get_image_features", "get_video_features")


def _watched(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method that tells the hooks of its module what it was called with.

    It finds its module when called and never keeps it, so that a copy of the model encodes with its
    own weights.
    """

    @wraps(function)  # transformers reads the signature
    def encode(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hooks = _ENCODERS.get(module)
        if hooks is not None:
            names = list(signature(function).parameters)[1:]
            hooks._remember_shown({**dict(zip(names, args, strict=False)), **kwargs})
        return function(module, *args, **kwargs)

    return encode


def attach(model: nn.Module, hook: Observer | Intervention) -> AttentionHooks:
    """Connect an observer or an intervention to a loaded model.

    Raises:
        UnsupportedModelError: no image token, no decoder, or a decoder beyond the attention
            interface.
        HookError: one of this kind is connected already (nested or concurrent use of one model).
        TypeError: `hook` is neither an `Observer` nor an `Intervention`.
    """
    if isinstance(hook, Intervention):
        kind, what = "intervention", "a policy (avl.adaptive)"
    elif isinstance(hook, Observer):
        kind, what = "observer", "a recorder (avl_analysis.record)"
    else:
        raise TypeError(f"hook must be an Observer or an Intervention; got {type(hook).__name__}")
    with _LOCK:
        hooks = _HOOKS.get(model)
        if hooks is not None and getattr(hooks, kind) is not None:
            raise HookError(
                f"{what} is already on this {type(model).__name__}; leave it before another starts"
            )
        if hooks is None:
            hooks = AttentionHooks(model)
            hooks._connect()
            _HOOKS[model] = hooks
        setattr(hooks, kind, hook)
        return hooks


@contextmanager
def attached(model: nn.Module, hook: Observer | Intervention) -> Iterator[AttentionHooks]:
    """`attach` for the length of a `with` block; disconnects also after an exception."""
    hooks = attach(model, hook)
    try:
        yield hooks
    finally:
        hooks.detach(hook)


# -- the registered functions ----------------------------------------------------------------------


def _newest(call: AttentionCall) -> Tensor | None:
    """Positions of keys that are not simply 0, 1, ...: a sliding window's cache hands out the
    newest keys only.
    """
    forward, count = call.forward, call.key.shape[2]
    if forward.rows is not None and forward.rows.shape[1] == count:
        return forward.rows
    total = forward.start + forward.tokens
    return torch.arange(total - count, total, device=call.key.device) if count < total else None


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward call by name."""
    return (
        {**dict(zip(signature(module.forward).parameters, args, strict=False)), **kwargs}
        if args
        else dict(kwargs)
    )


def _backend_of(name: str | None) -> str:
    return (name or "eager").removeprefix(_PREFIX)


def _rename(config: Any) -> None:
    """Point a config at our function for its backend, counting users of shared configs."""
    entry = _RENAMED.get(id(config))
    if entry is not None:
        entry[2] += 1
        return
    original = config._attn_implementation_internal
    backend = _backend_of(original)
    if backend not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise UnsupportedModelError(
            f"attention backend {backend!r} has no mask function in transformers; load the model"
            " with attn_implementation='sdpa' or 'eager'"
        )
    _register(backend)
    _RENAMED[id(config)] = [config, original, 1]
    config._attn_implementation_internal = _Name(_PREFIX + backend)


def _restore(config: Any) -> None:
    entry = _RENAMED.get(id(config))
    if entry is None:
        return
    entry[2] -= 1
    if entry[2] == 0:
        config._attn_implementation_internal = entry[1]
        del _RENAMED[id(config)]


def _register(backend: str) -> None:
    """Register attention and mask function under one name; inert until a config names them."""
    name = _PREFIX + backend
    if name in ALL_ATTENTION_FUNCTIONS:
        return

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        function = _function(backend, module)
        hooks = _OWNERS.get(module)
        if hooks is None or hooks.forward is None:
            return function(module, query, key, value, attention_mask, **options)
        weights: list[Tensor | None] = [None]

        def inner(call: AttentionCall) -> Tensor:
            output, weights[0] = function(
                call.module, call.query, call.key, call.value, call.mask, **call.options
            )
            return output

        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        call = AttentionCall(
            hooks.forward,
            int(module.layer_idx),
            module,
            query,
            key,
            value,
            attention_mask,
            scaling,
            options,
        )
        return hooks.call(inner, call), weights[0]

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[backend])


def _function(backend: str, module: nn.Module) -> Any:
    """The backend's attention function; eager is each modeling file's own."""
    if backend == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[backend]
