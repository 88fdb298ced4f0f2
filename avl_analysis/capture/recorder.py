"""`record(model)`: watch a loaded model's attention and keep statistics of it.

The recorder is an `avl.hooks.Observer`. It computes softmax weights a second time, beside the
model's own kernel, for a block of query rows at a time, hands each block to the statistics and
forgets it. Whatever was recorded of a pass that raised is dropped with it, and so are the samples
of a `generate` that raised.

It does not know how statistics are defined (`statistics/`), how recordings are stored
(`recording.py`), or which policy may be on the model: queries and keys are described by the pass
and by the call, never counted off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from avl.attention import AttentionCall, Forward
from avl.families import describe
from avl.hooks import Generation, HookError, Observer, attach
from avl.places import token_boxes, token_tiles
from avl_analysis.capture.accumulator import SampleAccumulator, TokenPlaces, token_arrays
from avl_analysis.capture.conversations import Conversations, FollowedConversation, one_per_row
from avl_analysis.capture.plan import CapturePlan, LayerResult
from avl_analysis.capture.provenance import provenance
from avl_analysis.capture.raw_slices import Raw, is_listing, raw
from avl_analysis.capture.reduce_prompt import reduce_prompt
from avl_analysis.capture.reduce_step import StepRow, reduce_step
from avl_analysis.capture.sample_call import SampleCall, SampleSlice, view
from avl_analysis.capture.softmax import row_weights
from avl_analysis.errors import InputError
from avl_analysis.recordings import schema
from avl_analysis.recordings.recording import FULL_CACHE, Recording
from avl_analysis.statistics import Statistic, select
from avl_analysis.statistics.inputs import TokenInfo, sample_tokens

MAPS = ("none", "mean", "heads")
"""Which image-token scores of every step a recording keeps; any but "none" brings the last prompt
row per head, too.
"""


class Recorder(Observer):
    """The observer behind `record`.

    Args:
        statistics: what to compute.
        layers: decoder layers to watch, in the order they will have in the recording.
        heads: query heads per layer.
        stop: token ids that mark a finished row of a batch when fed in a decode step.
        maps: which image-token scores to keep of every step, one of `MAPS`.
        first: number of the first sample; names are numbers of six digits.
        kept: which raw weights to keep.
        require_image: refuse prompts without a picture instead of leaving the image statistics
            undefined.
    """

    def __init__(
        self,
        statistics: Sequence[Statistic],
        layers: Sequence[int],
        heads: int,
        stop: frozenset[int] = frozenset(),
        maps: str = "mean",
        first: int = 0,
        kept: Raw | None = None,
        require_image: bool = False,
    ) -> None:
        """Record nothing yet; see the class."""
        self.statistics, self.plan = tuple(statistics), CapturePlan.of(statistics, maps, kept)
        self.require_image, self._raw_bytes = require_image, 0
        self.layers = {layer: index for index, layer in enumerate(layers)}
        self.heads, self.stop, self.maps, self.first = heads, stop, maps, first
        self.running = True
        self._conversations = Conversations(first, self._new_sample)
        self._current: FollowedConversation | None = None
        self._last_prompt: Tensor | None = None
        self.policies: dict[str, None] = {}  # of the samples' prompts, in order
        self._begin_pass([])

    def _new_sample(self, name: str) -> SampleAccumulator:
        return SampleAccumulator(
            name, tuple(self.layers), self.heads, self.statistics, self.plan, self.maps
        )

    def names(self) -> list[str]:
        """Names of the samples so far."""
        return self._conversations.names()

    def parts(self) -> list[schema.Part]:
        """Their arrays; those of samples whose generation is still running as they stand now."""
        return self._conversations.parts()

    def close(self) -> None:
        """No more passes will follow; working memory is let go."""
        self._conversations.close(every=True)
        self._current = None

    # -- generations -----

    def begin_generation(self, generation: Generation) -> None:
        """Refuse what cannot be followed before anything of it is recorded."""
        self._conversations.mark()
        if (beams := generation.setting("num_beams") or 1) > 1:
            raise HookError(
                f"beam search (num_beams={beams}) exchanges the rows of the batch between steps,"
                " which a recording cannot follow; generate with num_beams=1 (greedy or sampling)"
                " while recording"
            )
        if generation.setting("use_cache") is False:
            raise HookError(_WITHOUT_CACHE)
        if (chunk := generation.setting("prefill_chunk_size")) is not None:
            raise HookError(
                f"prefill_chunk_size={chunk} feeds a prompt in several parts, which cannot be told"
                " from a prompt and later turns; generate without it while recording"
            )

    def end_generation(self, failed: bool) -> None:
        """An answer that broke off is no sample."""
        self._last_prompt = None
        self._conversations.end_marked(drop=failed)
        self._current = None

    # -- passes -----

    def begin(self, forward: Forward) -> None:
        """Find the samples of a pass; those of a prefill are made when it is over."""
        if forward.kind == "prefill":
            # A new prompt begins: samples whose cache is gone can get no further pass, and their
            # working memory (norms of values, scores) is let go now rather than at the end of the
            # recording.
            self._conversations.close(every=False)
            self._check_prompt(forward)
            self._check_repeated(forward)
            self.policies[forward.changed_by or FULL_CACHE] = None
            self._current = None
        else:
            self._current = self._conversations.of(forward.cache)
            samples = one_per_row(self._current, range(forward.layout.batch))
            if forward.kind == "extend":
                _check_turn(forward, samples)
        self._count_raw(forward)
        # Whatever a pass that raised left behind is dropped with this.
        self._begin_pass([sample_tokens(forward.layout, b) for b in range(forward.layout.batch)])

    def _check_repeated(self, forward: Forward) -> None:
        """Refuse loops that feed the whole sequence anew for every token."""
        ids, last = forward.inputs.get("input_ids"), self._last_prompt
        if forward.cache is not None or forward.inputs.get("use_cache") is not False:
            self._last_prompt = None
            return
        self._last_prompt = ids
        if ids is None or last is None or ids.shape != (last.shape[0], last.shape[1] + 1):
            return
        # The same ids and one more, without a cache: a loop that feeds the whole sequence for every
        # token. As prompts these would be recorded as so many samples.
        if torch.equal(ids[:, :-1], last):
            raise HookError(_WITHOUT_CACHE)

    def _check_prompt(self, forward: Forward) -> None:
        without = [b for b, count in enumerate(forward.layout.images()) if count == 0]
        if self.require_image and without:
            raise InputError(
                f"row {without[0]} of the batch has no image tokens; put the image placeholder into"
                " the prompt (the chat template does), or record with require_image=False"
            )

    def _count_raw(self, forward: Forward) -> None:
        """Refuse raw slices that do not fit, before they are made."""
        if self.plan.raw is None:
            return
        layers, length = len(self.layers), forward.start + forward.tokens
        # Counted before the pass, so that memory that is not there is never asked for.
        one = self.plan.raw.step_bytes if forward.kind == "decode" else self.plan.raw.bytes
        self._raw_bytes += one(layers, length) * forward.layout.batch
        self.plan.raw.check(self._raw_bytes, layers)

    def _begin_pass(self, tokens: list[TokenInfo]) -> None:
        self._tokens = tokens
        self._tokens_on: dict[tuple[int, torch.device], TokenInfo] = {}
        self._parts: dict[torch.device, dict[tuple[int, ...], SampleSlice | None]] = {}
        self._lengths: dict[int, int] = {}
        self._passes: dict[tuple[int, int], LayerResult] = {}  # (sample, layer)
        self._steps: dict[tuple[int, int], StepRow] = {}
        self._norms = {} if self._current is None else self._current.norms

    def _tokens_for(self, sample: int, tokens: TokenInfo, device: torch.device) -> TokenInfo:
        """The tokens of a sample on the device of a layer."""
        if (sample, device) not in self._tokens_on:
            self._tokens_on[sample, device] = tokens.map(lambda tensor: tensor.to(device))
        return self._tokens_on[sample, device]

    def _is_finished(self, sample: int) -> bool:
        return self._current is not None and self._current.samples[sample].finished

    @torch.inference_mode()
    def observe(self, call: AttentionCall, output: Tensor) -> None:
        """Reduce the weights of one call, or keep those of a decode step until the pass is over."""
        if call.layer not in self.layers:
            return
        for b, tokens in enumerate(self._tokens):
            if call.forward.kind == "decode" and self._is_finished(b):
                continue
            device = call.query.device  # layers may lie on several
            own = self._tokens_for(b, tokens, device)
            seen = view(call, own, b, self._parts.setdefault(device, {}))
            if seen is None:
                continue
            norm = self._value_norm(seen, call.layer, b) if self.plan.reads_values else None
            if call.forward.kind == "decode":
                # Reduced in `end`, all layers together.
                self._steps[b, call.layer] = StepRow(call.layer, seen, row_weights(seen), norm)
                continue
            try:
                self._passes[b, call.layer] = reduce_prompt(seen, self.plan, norm)
            except FloatingPointError as error:
                raise _not_numbers(f"{error} in layer {call.layer}", call.forward) from error

    def _value_norm(self, seen: SampleCall, layer: int, b: int) -> Tensor:
        """Norms of the value vectors, (key heads, keys).

        Those of keys met before are remembered, by rank.
        """
        rank, heads = seen.keys.rank, seen.value.shape[0]
        known, count = self._norms.get((b, layer)) or (
            seen.value.new_empty((heads, 0), dtype=torch.float32),
            0,
        )
        if b not in self._lengths:  # a number that every layer of a pass agrees on
            self._lengths[b] = int(seen.queries.rank[-1]) + 1
        length = self._lengths[b]
        # Room for many more tokens at once: growing by one per step would copy everything every
        # time.
        if length > known.shape[1]:
            known = torch.cat(
                [known, known.new_full((heads, length + 256 - known.shape[1]), torch.nan)], 1
            )
        # Key j is token j: only the new tokens' norms are missing, all others are known.
        if seen.keys.in_order:
            _norms(seen.value[:, count:length], known[:, count:length])
            self._norms[b, layer] = known, length
            return known[:, :length]
        at = rank.clamp_min(0).expand(heads, -1)
        # Under a policy keys lie in any order and may be gone later: each norm is taken when its
        # key is first met and looked up by rank from then on.
        head, key = (known.gather(1, at).isnan() & (rank >= 0)).nonzero(as_tuple=True)
        known[head, at[head, key]] = seen.value[head, key].float().norm(dim=-1)
        self._norms[b, layer] = known, count
        return known.gather(1, at).masked_fill(rank < 0, 0.0)

    @torch.inference_mode()
    def end(self, forward: Forward) -> None:
        """Add what was reduced to the samples of the pass."""
        if forward.kind == "prefill":
            self._current = self._conversations.begin(forward.layout.batch, forward.cache)
            self._current.norms = self._norms
        assert self._current is not None
        ids = forward.inputs.get("input_ids")
        new = slice(forward.start, forward.start + forward.tokens)
        for b, (sample, tokens) in enumerate(zip(self._current.samples, self._tokens, strict=True)):
            sample.finished |= self._was_finished(forward, b, ids)
            self._reduce_steps(b, forward)
            passes = [self._passes.get((b, layer)) for layer in self.layers]
            if not sample.finished and any(one is not None for one in passes):
                new_ids = None if ids is None else ids[b, -forward.tokens :]
                places = None if forward.kind == "decode" else _places(forward, b)
                sample.add_tokens(**token_arrays(tokens, new_ids, new, places))
                sample.add_pass(forward.kind, passes)
        self._current = None
        self._begin_pass([])

    def _was_finished(self, forward: Forward, sample: int, ids: Tensor | None) -> bool:
        """Whether a row of a batch was over before this step.

        `generate` then feeds it such a token while other rows go on. It feeds no row that stands
        alone, so there the token is one that the caller wants to be read.
        """
        alone = forward.layout.batch == 1
        if forward.kind != "decode" or alone or ids is None:
            return False
        return int(ids[sample, -1]) in self.stop

    def _reduce_steps(self, b: int, forward: Forward) -> None:
        """Reduce the decode rows of one sample.

        Layers of one device with equally many keys are reduced together.
        """
        together: dict[tuple[Any, ...], list[int]] = {}
        for layer in self.layers:
            if (row := self._steps.get((b, layer))) is not None:
                # Layers of one device with equally many keys and key sets; under a policy these
                # differ.
                like = (row.weights.device, *row.weights.shape, len(row.view.keys.rank))
                together.setdefault(like, []).append(layer)
        for layers in together.values():
            try:
                reduced = reduce_step([self._steps[b, layer] for layer in layers], self.plan)
            except FloatingPointError as error:
                raise _not_numbers(str(error), forward) from error
            self._passes.update(
                {(b, layer): one for layer, one in zip(layers, reduced, strict=True)}
            )


def _places(forward: Forward, sample: int) -> TokenPlaces:
    """Where in their pictures the tokens of one row of the batch lie."""
    return TokenPlaces(token_boxes(forward.layout, sample), token_tiles(forward.layout, sample))


def _not_numbers(what: str, forward: Forward) -> InputError:
    return InputError(
        f"{what}, {forward.kind} step {forward.step}: the model's queries or keys are NaN or"
        " infinite there (float16 overflows easily; load it in bfloat16 or float32)"
    )


_WITHOUT_CACHE = (
    "without a KV cache (use_cache=False) the model is called with the whole sequence for every"
    " token, which a recording would take for new prompts; generate with use_cache=True while"
    " recording"
)


def _check_turn(forward: Forward, samples: Sequence[SampleAccumulator]) -> None:
    """Refuse later turns whose sample would not be whole."""
    if bool((forward.layout.image[:, forward.start :] >= 0).any()):
        raise HookError(
            "a later part of a prompt brought an image, so the image tokens of this sample changed;"
            " record with the whole prompt, all turns and images, in one prefill of an empty cache"
        )
    finished = [row for row, sample in enumerate(samples) if sample.finished]
    if finished:
        raise HookError(
            f"row {finished[0]} of the batch had ended before the others, so what was fed to it"
            " since is not recorded and a later turn cannot follow; record turns of rows that end"
            " apart one by one, or with the whole conversation in one prefill"
        )


def _check_layers(layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    if not is_listing(layers, int):
        raise InputError(f"layers must be a list of layer numbers, such as [0, 2]; got {layers!r}")
    chosen = sorted({int(layer) for layer in layers})
    if not chosen or min(chosen) < 0 or max(chosen) >= count:
        raise InputError(
            f"layers {list(layers)} are out of range; this model has layers 0 to {count - 1}"
        )
    return chosen


def _norms(vectors: Tensor, out: Tensor) -> None:
    """Lengths of vectors, (key heads, keys, dim), in float32.

    Many are taken head by head, as they may be converted.
    """
    together = len(vectors) if vectors.shape[1] == 1 else 1
    for first in range(0, len(vectors), together):
        some = slice(first, first + together)
        torch.linalg.vector_norm(vectors[some], dim=-1, dtype=torch.float32, out=out[some])


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
    keep: str | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    queries: str | Sequence[int] | None = None,
    limit: int | None = None,
    maps: str | bool = "mean",
    require_image: bool = False,
    stop: Sequence[int] | None = None,
    first_sample: int = 0,
) -> Iterator[Recording]:
    """Record the attention of `model` while the `with` block runs.

    Every prefill (a call with an empty cache) begins new samples, one per row of the batch; decode
    steps and later turns belong to the samples of their cache, so conversations may alternate. A
    `generate` that raised leaves no sample. Logits stay bit-identical to those without recording,
    and the model is restored on leaving the block, also by an exception. Works on an adapted model
    (inside `avl.adaptive`) as well, and on a compiled one.

    Where an image token lies in its image is recorded with it (`recording.tokens`). For families
    that crop or tile by the original image's size, the size must be known: `VLM.prepare` remembers
    it, and `avl.places.remember_originals` does for inputs prepared otherwise.

    Args:
        model: a loaded vision-language model (see `avl.families`).
        statistics: names or instances; None means all (`avl_analysis.statistics.ALL`).
        keep: "attention" keeps raw weights as well, `recording["attention"]`; None keeps none.
        layers: decoder layers to record; None means all.
        heads: query heads whose raw weights are kept; None means all. Statistics always see all
            heads.
        queries: rows whose raw weights are kept: "all" (default), "prompt", "last", "decode",
            "steps" (the last of the prompt and decode steps), or positions in the prompt counted
            without padding.
        limit: bytes that raw weights may take together, default 4 GiB; more is refused before it is
            computed.
        maps: image-token scores to keep of every step (the first 512), from which overlays are
            drawn: "mean" over heads, "heads" (every head as well: layers x heads x image
            tokens x 4 bytes a step), or "none"; True and False mean the first and the last.
        require_image: refuse prompts without a picture instead of leaving the image statistics
            undefined.
        stop: token ids that mark a row as finished when fed in a decode step; None takes padding
            and end-of-sequence from the model's generation config.
        first_sample: number of the first sample; give every recording its own range if they will be
            merged.

    Yields:
        The recording. It can be read inside the block; after the block it is complete.

    Raises:
        InputError: unknown statistic, layers or heads out of range, raw weights beyond the limit,
            no picture where one is required.
        ValueError: weights that are not numbers.
        avl.families.UnsupportedModelError: the model is not a vision-language decoder.
        avl.hooks.HookError: a recorder is on this model already; or, inside the block, the model is
            used in a way that cannot be followed: from a second thread, without a KV cache, with
            beam search, a prompt in chunks, a cache filled elsewhere, other attention than before.
    """
    chosen = select(statistics)
    family = describe(model)
    numbers = _check_layers(layers, family.layers)
    stops = stop_tokens(model) if stop is None else frozenset(int(token) for token in stop)
    if keep not in (None, "attention"):
        raise InputError(
            f"keep={keep!r} is not possible; keep='attention' keeps raw weights, None only"
            " statistics"
        )
    if keep is None and (heads is not None or queries is not None):
        raise InputError(
            "heads and queries choose raw weights, which are kept with keep='attention' only"
        )
    maps = {True: "mean", False: "none"}.get(maps, maps) if isinstance(maps, bool) else maps
    if maps not in MAPS:
        raise InputError(f"maps={maps!r} is not one of {', '.join(MAPS)}")
    kept = raw(heads, queries, family.query_heads, limit) if keep else None
    recorder = Recorder(
        chosen, numbers, family.query_heads, stops, maps, first_sample, kept, require_image
    )
    labels = schema.layer_labels(numbers, family.query_heads, family.kv_heads)
    hooks = attach(model, recorder)
    recording = Recording.live(recorder, labels, provenance(model, family, chosen))
    try:
        yield recording
    finally:
        hooks.detach(recorder)
        recorder.close()
        recording.attrs["policy"] = " | ".join(recorder.policies) or FULL_CACHE
        recorder.running = False
