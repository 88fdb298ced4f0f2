"""Hooks at transformers' attention interface: the one place where the project touches a model.

`attach(model, observer)` or `attach(model, intervention)` connects to a loaded model's decoder;
`AttentionHooks.detach`, or leaving `attached(...)`, disconnects and leaves the model exactly as it
was. An `Intervention` may compute attention itself and exchange the cache (a policy); an `Observer`
sees what was computed (a recorder). A model takes one of each at a time, in any order. The hooks do
not know what either does with what it sees.

How it works. `backends` puts a function of ours between a decoder and its attention backend. Module
hooks learn where in the sequence a pass stands. `watched_methods` tells what `generate` and the
methods that encode images and videos are called with. All of that is done to the one
model, when something is attached to it, and undone when the last is detached. The delegated call
gets the very arguments the model passed, so with an observer alone the logits stay bit-identical.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from avl import backends
from avl.arguments import find_cache, named_arguments, uses_cache
from avl.attention import Attend, AttentionCall, Forward
from avl.families import Family, UnsupportedModelError, describe
from avl.module_hooks import ModuleHook, Moment, add_hook
from avl.tokens import TokenLayout
from avl.watched_methods import unwatch, watch

_LOCK = threading.RLock()


class HookError(RuntimeError):
    """The model was used in a way the hooks cannot follow; the message says what to do instead."""


@dataclass(frozen=True)
class Generation:
    """One call of `generate`.

    Attributes:
        model: the module whose `generate` was called.
        arguments: what it was called with, by name.
    """

    model: Any
    arguments: dict[str, Any] = field(repr=False)

    def setting(self, name: str) -> Any:
        """A setting as `generate` will see it; None where it is not said.

        That is the argument, or that of the generation config given, or of the model's own.
        """
        own = getattr(self.model, "generation_config", None)
        given = (self.arguments.get("generation_config"), own)
        # In the order in which `generate` itself looks.
        values = [self.arguments.get(name), *(getattr(config, name, None) for config in given)]
        return next((value for value in values if value is not None), None)


class Hook:
    """What `Observer` and `Intervention` have in common; override what is needed.

    All methods run on the thread that runs the model.
    """

    def begin_generation(self, generation: Generation) -> None:
        """`generate` was called; passes follow. What cannot be followed may be refused here."""

    def end_generation(self, failed: bool) -> None:
        """`generate` is over; `failed` if it raised, which a refusal does, too."""

    def begin(self, forward: Forward) -> None:
        """A pass through the decoder starts."""

    def end(self, forward: Forward) -> None:
        """The pass is over; not called when the pass raised."""


class Observer(Hook):
    """Sees every attention call of a decoder after it was computed."""

    def observe(self, call: AttentionCall, output: Tensor) -> None:
        """One attention call, as an intervention left it, and its output.

        `output` has shape (batch, rows, query heads, head dim).
        """


class Intervention(Hook):
    """Computes attention in the model's place; may exchange `forward.cache.layers` in `begin`."""

    @property
    def description(self) -> str:
        """What it does to the model, as a recording made meanwhile says it."""
        return type(self).__name__

    def attend(self, call: AttentionCall, inner: Attend) -> Tensor:
        """The output of one call, (batch, rows, query heads, head dim).

        `inner` is the model's own attention; `call` may be changed before it is passed on.
        """
        return inner(call)


@dataclass
class _Stream:
    """Where one conversation (one cache) stands."""

    layout: TokenLayout
    seen: int
    step: int


@dataclass
class _Embedded:
    """What the embedding layer was last asked for outside of a pass."""

    ids: Tensor
    output: Tensor


class _Pending(threading.local):
    """What one thread said on the way to the next pass through the decoder.

    Attributes:
        inputs: arguments of the outer model's call.
        shown: arguments of the latest encoding of images and of videos.
        shown_first: whether that was before the outer model was called.
        embedded: what the embedding layer was last asked for.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget it."""
        self.inputs: dict[str, Any] = {}
        self.shown: dict[str, Any] = {}
        self.shown_first = False
        self.embedded: _Embedded | None = None


class AttentionHooks:
    """What is attached to one model. Made by `attach`; one per model."""

    def __init__(self, model: nn.Module) -> None:
        """Look at the model; nothing is connected yet."""
        self.model = model
        self.family: Family = describe(model)
        self.intervention: Intervention | None = None
        self.observer: Observer | None = None
        self.forward: Forward | None = None
        # The only object that lives exactly as long as a conversation is its KV cache, so the
        # position in the sequence is remembered there.
        self._streams: WeakKeyDictionary[Any, _Stream] = WeakKeyDictionary()
        self._stream: _Stream | None = None  # of the pass that is running
        self._pending = _Pending()
        self._calls = 0
        self._thread: threading.Thread | None = None
        self._generating = False
        self._copies = 1
        self._module_hooks: list[ModuleHook] = []
        self._watched: list[tuple[nn.Module, str]] = []
        # Attention modules are those that know the number of their layer; each finds its hooks by
        # itself in `backends.OWNERS`, as the backend is called with the module and nothing else of
        # ours.
        self._modules = [
            m
            for m in self.family.decoder.modules()
            if isinstance(getattr(m, "layer_idx", None), int)
        ]
        configs = [m.config for m in self._modules if hasattr(m, "config")] + [
            self.family.decoder.config
        ]
        # Modules usually share one config; each distinct one carries the name of the attention
        # backend.
        self._configs = list({id(c): c for c in configs}.values())
        outer = [model, getattr(model, "base_model", None)]
        self._outer = [
            m for m in outer if isinstance(m, nn.Module) and m is not self.family.decoder
        ]

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
                backends.rename(config)
            for module in self._modules:
                backends.OWNERS[module] = self
            self._watched = watch(self.model, self)
            for module in {id(m): m for m in self._outer}.values():
                self._add_hook(module, self._remember_inputs, "before")
            # Models that embed text and images themselves before calling the decoder (BLIP-2) show
            # their token ids only to the embedding layer.
            self._add_hook(self.model.get_input_embeddings(), self._remember_ids, "after")
            self._add_hook(self.family.decoder, self._begin, "before")
            # Called after an exception, too, with no output, so that a pass that broke off is
            # forgotten.
            self._add_hook(self.family.decoder, self._end, "after", always_call=True)
        # Also for KeyboardInterrupt: half a connection would leave the model changed for good.
        except BaseException:
            self._disconnect()
            raise

    def _add_hook(self, module: nn.Module, function: Any, moment: Moment, **options: bool) -> None:
        self._module_hooks.append(add_hook(module, function, moment, with_kwargs=True, **options))

    def _disconnect(self) -> None:
        for hook in self._module_hooks:
            hook.remove()
        self._module_hooks.clear()
        unwatch(self._watched)
        self._watched = []
        for module in self._modules:
            backends.OWNERS.pop(module, None)
        for config in self._configs:
            backends.restore(config)
        self.forward = None

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

    def _attached(self) -> list[Hook]:
        return [hook for hook in (self.intervention, self.observer) if hook is not None]

    # -- following `generate` ----------------------------------------------------------------------

    @contextmanager
    def generation(self, model: nn.Module, arguments: dict[str, Any]) -> Iterator[None]:
        """`generate` of a module of the model runs while the block does."""
        if self._generating and self._thread is threading.current_thread():
            yield  # some families call the `generate` of their language model in their own
            return
        self._claim()
        # Failed until the block has ended without an exception.
        self._generating, failed = True, True
        generation, hooks = Generation(model, arguments), self._attached()
        try:
            self._copies = max(
                generation.setting(name) or 1 for name in ("num_beams", "num_return_sequences")
            )
            for hook in hooks:
                hook.begin_generation(generation)
            yield
            failed = False
        finally:
            self._generating, self._copies = False, 1
            self._release()
            self._pending.clear()
            for hook in hooks:
                hook.end_generation(failed)

    def _claim(self) -> None:
        """Take the model for this thread.

        Where a pass stands is known for one pass at a time, so two threads would be mixed up.
        """
        me = threading.current_thread()
        with _LOCK:
            # A thread that ended in the middle of a pass can release nothing; it no longer holds
            # the model.
            if self._thread not in (None, me) and self._thread.is_alive():
                raise HookError(
                    f"this {type(self.model).__name__} is running in another thread"
                    f" ({self._thread.name}) while it is recorded or adapted; run one after the"
                    " other, or load a second model"
                )
            self._thread = me

    def _release(self) -> None:
        if not self._generating:
            self._thread = None

    # -- following the sequence --------------------------------------------------------------------

    def remember_shown(self, arguments: dict[str, Any]) -> None:
        """Remember what images or videos are encoded from.

        `generate` encodes them first and calls the model with the features alone, so grids and
        sizes pass only here.
        """
        # The same pixels under two names would describe each frame twice, as a video and as a
        # picture.
        videos = self._pending.shown.get("pixel_values_videos")
        if videos is not None and arguments.get("pixel_values") is videos:
            return  # Qwen3-VL encodes a video through its method for images
        self._pending.shown |= {name: v for name, v in arguments.items() if v is not None}

    def _remember_inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = named_arguments(module, args, kwargs)
        # An inner model that is handed embeddings only must not overwrite what the outer one was
        # given.
        if given.get("input_ids") is not None or module is self.model:
            self._pending.inputs = given
            self._pending.shown_first = bool(self._pending.shown)

    def _remember_ids(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self.forward is not None:
            return
        ids = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if ids is not None and ids.dim() == 2 and not ids.is_floating_point():
            self._pending.embedded = _Embedded(ids, output)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._claim()
        self._check_backend()
        given = named_arguments(module, args, kwargs)
        pending = self._pending
        inputs, shown, embedded = pending.inputs, pending.shown, pending.embedded
        # `generate` encodes images once per prompt and repeats the rows afterwards; a model that
        # encodes them in its own forward gets rows that are repeated already.
        copies = self._copies if pending.shown_first else 1
        pending.clear()
        new = given.get("input_ids")
        new = given.get("inputs_embeds") if new is None else new
        if new is None:
            raise HookError("the decoder was called without input_ids and inputs_embeds")
        cache = find_cache(given)
        # Without the cache every decode step would look like a prompt of one token.
        if cache is None and self._generating and uses_cache(module, given):
            raise HookError(
                f"generate with use_cache=True called {type(module).__name__} without a KV cache"
                f" that could be found among its arguments ({', '.join(given)}), so decode steps"
                " cannot be told from new prompts; is this version of transformers supported?"
            )
        ids = inputs.get("input_ids")
        ids = given.get("input_ids") if ids is None else ids
        if ids is None:
            ids = self._ids_behind(new, embedded)
        said = {name: value for name, value in (inputs or given).items() if value is not None}
        self._calls = 0
        # What the outer call said goes before what was seen on the way: it is of this very pass.
        self.forward = self._place(cache, int(new.shape[1]), ids, {**shown, **said}, copies)
        if self.intervention is not None:
            self.forward.changed_by = self.intervention.description
        for hook in self._attached():
            hook.begin(self.forward)

    def _ids_behind(self, embeds: Tensor, embedded: _Embedded | None) -> Tensor | None:
        """The ids that inputs_embeds were made from: those embedded last, if they explain them.

        Only image features may have been put in the place of some, and only where the ids say so.
        Callers that embed other ids, their image placeholders replaced by a harmless id, are not
        believed.
        """
        if embedded is None or embedded.output.shape != embeds.shape:
            return None
        image = torch.tensor(self.family.image_token_ids, device=embedded.ids.device)
        # (batch, tokens): unchanged since it was embedded, or an image placeholder, whose embedding
        # the model replaces by image features.
        explained = (embedded.output == embeds).all(-1) | torch.isin(embedded.ids, image)
        return embedded.ids if bool(explained.all()) else None

    def _check_backend(self) -> None:
        changed = [config for config in self._configs if not backends.is_ours(config)]
        if changed:
            raise HookError(
                "the attention implementation was changed to"
                f" {changed[0]._attn_implementation_internal!r} while the model is recorded or"
                " adapted; call set_attn_implementation before"
            )

    def _place(
        self, cache: Any, tokens: int, ids: Tensor | None, inputs: dict[str, Any], copies: int
    ) -> Forward:
        """Where this pass stands in its sequence; `copies` as in `_layout`."""
        held = int(cache.get_seq_length()) if cache is not None else 0
        stream = self._streams.get(cache) if cache is not None else None
        if held == 0:
            layout = self._layout(ids, inputs, tokens, copies=copies)
            stream = _Stream(layout, tokens, 0)
            forward = Forward("prefill", 0, 0, tokens, layout, cache, inputs=inputs)
        else:
            # The cache must hold exactly what passed here: one that was cropped, or filled without
            # the hooks, has keys of which the layout says nothing.
            if stream is None or stream.seen != held:
                raise HookError(
                    f"the KV cache holds {held} tokens, of which {stream.seen if stream else 0}"
                    " passed here; start with an empty cache after attaching (one cropped or"
                    " filled elsewhere cannot be followed)"
                )
            # A later turn of a single token looks like a decode step and is one: its token is text.
            decoding = tokens == 1
            if decoding:
                layout = stream.layout.extend_text(1)
            else:
                layout = stream.layout.extend(self._layout(ids, inputs, tokens, held))
            # A new object: the old one stays the stream of the cache until the pass has ended well.
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
        self._stream = stream
        return forward

    def _layout(
        self,
        ids: Tensor | None,
        inputs: dict[str, Any],
        tokens: int,
        held: int = 0,
        copies: int = 1,
    ) -> TokenLayout:
        """Layout of the new tokens of a pass.

        Args:
            ids: (batch, tokens or more), the last of which are new.
            inputs: arguments of the outer call, and what images were encoded from.
            tokens: number of new tokens.
            held: tokens that the cache held before.
            copies: how often `generate` repeated every row after the images were encoded, so that
                grids and sizes in `inputs` are those of every so many rows.

        Raises:
            HookError: the ids are not known.
        """
        if ids is None:
            raise HookError(
                "cannot tell image from text tokens without input_ids; call the model with"
                " input_ids (inputs_embeds alone are understood only where they were made by the"
                " model's own embedding layer from ids that hold the image placeholders)"
            )
        # `generate` may pass the whole sequence of ids while the decoder gets the new ones alone.
        ids = ids[:, -tokens:]
        mask = inputs.get("attention_mask")
        # Any other mask is of another kind (4-dimensional, or cut already) and says nothing of
        # padding.
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == held + tokens:
            mask = mask[:, -tokens:]
        else:
            mask = None
        # Row i of what was encoded stands for rows i * copies ... i * copies + copies - 1 of the
        # pass.
        once = ids[::copies]
        if copies == 1 or not torch.equal(once.repeat_interleave(copies, 0), ids):
            return self.family.layout(ids, mask, inputs)
        layout = self.family.layout(once, None if mask is None else mask[::copies], inputs)
        return layout.select(torch.arange(len(ids)) // copies)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forward, self.forward = self.forward, None
        stream, self._stream = self._stream, None
        self._release()
        if forward is None or output is None:  # no output: the pass raised
            return
        # A decoder that never calls the interface would be recorded as if it had attended to
        # nothing.
        if self._calls == 0:
            raise UnsupportedModelError(
                f"no attention layer of {type(self.model).__name__} went through transformers'"
                " attention interface, so nothing can be seen of it (model type"
                f" {self.family.name!r}); see `avl models` for supported families"
            )
        # Only now: a pass that was refused has not happened, and one that broke off left a cache
        # whose layers differ, which the next pass finds to be longer than what passed.
        if forward.cache is not None and stream is not None:
            self._streams[forward.cache] = stream
        for hook in self._attached():
            hook.end(forward)

    # -- attention ---------------------------------------------------------------------------------

    def call(self, inner: Attend, call: AttentionCall) -> Tensor:
        """The output of one attention call, after intervention and observer."""
        self._calls += 1
        output = inner(call) if self.intervention is None else self.intervention.attend(call, inner)
        if self.observer is not None:
            # The observer sees all keys, those that the intervention read elsewhere included.
            call.complete()
            self.observer.observe(call, output)
        return output


_HOOKS: WeakKeyDictionary[nn.Module, AttentionHooks] = WeakKeyDictionary()


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
