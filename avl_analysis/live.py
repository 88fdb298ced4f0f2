"""One question answered while somebody watches: tokens as they come, where each looked, and what a
policy changed.

Three passes over the same prompt, each for its own purpose. `answer` runs free and is timed, so
nothing else is on the model than the policy. `observe` runs again and keeps, for every token
produced, the softmax weights of the row that produced it, for all layers and heads: a few hundred
kilobytes for the embedded model. `disagreement` feeds a policy the full cache's own answer and
compares the next-token distributions.

Everything returned is immutable and holds no tensor of the model, so that several people may look
at it at once. The functions attach to the model and detach again; whoever shares a model between
threads must let one run at a time.

What surprises: the weights of step t belong to the row that *produced* token t, which is the row of
the token before it (the last prompt row for the first token). Keys a policy did not read have NaN,
not zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

import avl
from avl.attention import AttentionCall, Forward, attention_weights
from avl.hooks import Observer, attached
from avl.tokens import Modality
from avl_analysis.capture.recorder import record
from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.record_samples import facts_of
from avl_analysis.errors import InputError
from avl_analysis.evaluation.compare import kl_divergence
from avl_analysis.evaluation.generation import generate
from avl_analysis.models.loading import VLM, end_tokens, greedy
from avl_analysis.recordings.recording import Recording

MAX_WEIGHTS = 1 << 29
"""Bytes of weights kept per observation; 64 tokens of a 32 x 32 model at 3,000 keys take 390 MB."""

Floats = NDArray[np.float64]
OnToken = Callable[[str, int], None]
"""Called with the answer so far and its number of tokens after every token."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What the model said, and what it cost.

    Attributes:
        ids: generated token ids, the end-of-sequence token included if it came.
        words: text of every token; the end-of-sequence token has none and is left out.
        seconds: seconds from the start of the call until each token was there, (tokens,).
        finished: whether the model ended the answer itself.
        usage: bytes and keys, None without a policy.
        states: (layers, steps, positions) int8 codes of `avl.State`, best treatment over heads;
            PADDING where a position did not exist yet; step 0 is after the prompt. None without a
            policy.
        layers: decoder layers of `states`.
    """

    ids: tuple[int, ...]
    words: tuple[str, ...]
    seconds: tuple[float, ...]
    finished: bool
    usage: avl.Usage | None = None
    states: NDArray[np.int8] | None = None
    layers: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        return "".join(self.words).strip()

    @property
    def ttft(self) -> float:
        """Time to first token in seconds: picture encoding, prefill and the first choice."""
        return self.seconds[0]

    @property
    def tpot(self) -> float:
        """Time per output token after the first in seconds; NaN for a single token."""
        return (
            (self.seconds[-1] - self.seconds[0]) / (len(self.seconds) - 1)
            if len(self.seconds) > 1
            else float("nan")
        )


END = "(end)"
"""What stands for the end-of-sequence token in `Disagreement.preferred`."""

FOCUS = 0.8
"""Share of the attention on the picture that `Focus.patches` holds."""


@dataclass(frozen=True)
class Focus:
    """One token's look at the picture, in numbers.

    Attributes:
        mass: attention on image tokens, share of the row.
        patches: fewest image tokens that hold `FOCUS` of it; `of` how many there are.
        region: share of the attention on the picture that falls on a region, NaN where no region is
            known.
        area: the region's share of the image tokens; region / area is the lift over chance.
    """

    mass: float
    patches: int
    of: int
    region: float = float("nan")
    area: float = float("nan")

    @property
    def lift(self) -> float:
        return self.region / self.area if self.area > 0 else float("nan")


@dataclass(frozen=True, eq=False)
class Observation:
    """Where the model looked while it produced each token of one answer.

    Attributes:
        answer: the answer (timed while watched, so slower than free).
        tokens: text of every position of prompt and answer; image positions hold "". The last token
            of an answer that did not end by itself was produced but never fed to the model, so the
            arrays below have one position less.
        prompt: positions of the prompt; token t of the answer stands at position `prompt` + t.
        modality, image, row, column: what every position is, (positions,); as in
            `avl.tokens.TokenLayout`.
        layers: decoder layers of `weights`.
        weights: (steps, layers, heads, positions) float16, softmax weights of the row that produced
            each token; NaN where a key was not read or did not exist yet. Fewer steps than tokens
            if `MAX_WEIGHTS` was reached.
    """

    answer: Answer
    tokens: tuple[str, ...]
    prompt: int
    modality: NDArray[np.int8]
    image: NDArray[np.int16]
    row: NDArray[np.int16]
    column: NDArray[np.int16]
    layers: tuple[int, ...]
    weights: NDArray[np.float16]

    @property
    def steps(self) -> int:
        """Tokens whose weights were kept."""
        return int(self.weights.shape[0])

    @property
    def heads(self) -> int:
        return int(self.weights.shape[2])

    @cached_property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of every picture's grid; (0, 0) where places are unknown."""
        pictures = range(int(self.image.max(initial=-1)) + 1)
        places = [(self.row[self.image == i], self.column[self.image == i]) for i in pictures]
        return tuple(
            (int(r.max()) + 1, int(c.max()) + 1) if r.min() >= 0 else (0, 0) for r, c in places
        )

    def look(self, step: int, layer: int | None = None, head: int | None = None) -> Floats:
        """(positions,) weights of one token, mean over what is not chosen; NaN where no chosen head
        read the key.

        Args:
            layer: index of a decoder layer, None for the mean over layers; head: likewise.

        Raises:
            InputError: a step, layer or head that is not there.
        """
        if not 0 <= step < self.steps:
            raise InputError(
                f"token {step} is not there: weights of tokens 0 to {self.steps - 1} were kept"
            )
        if layer is not None and layer not in self.layers:
            raise InputError(
                f"layer {layer} is not there: layers {self.layers[0]} to {self.layers[-1]} were"
                " watched"
            )
        if head is not None and not 0 <= head < self.heads:
            raise InputError(f"head {head} is not there: heads 0 to {self.heads - 1} were watched")
        rows = self.weights[step].astype(np.float64)
        rows = rows if layer is None else rows[[self.layers.index(layer)]]
        rows = rows if head is None else rows[:, [head]]
        rows = rows.reshape(-1, rows.shape[-1])
        read = ~np.isnan(rows).all(0)
        return np.where(read, np.nan_to_num(rows).mean(0), np.nan)

    def mass(
        self, step: int, layer: int | None = None, head: int | None = None
    ) -> dict[str, float]:
        """Attention on system, image and text tokens; the three add up to 1."""
        look = np.nan_to_num(self.look(step, layer, head))
        return {
            m.name.lower(): float(look[self.modality == m].sum())
            for m in Modality
            if m != Modality.PADDING
        }

    def focus(
        self,
        step: int,
        layer: int | None = None,
        head: int | None = None,
        region: Sequence[int] | None = None,
    ) -> Focus:
        """How much of a token's attention is on the picture and how concentrated; zeros without a
        picture.

        Args:
            region: image tokens, counted from 0 in the order of the prompt, that the token is
                about.
        """
        look = np.nan_to_num(self.look(step, layer, head))[self.modality == Modality.IMAGE]
        mass = float(look.sum())
        if mass <= 0:
            return Focus(0.0, 0, int(look.size))
        share = look / mass
        patches = int(np.searchsorted(np.cumsum(np.sort(share)[::-1]), FOCUS - 1e-6)) + 1
        if not region:
            return Focus(mass, min(patches, look.size), int(look.size))
        at = np.array(sorted(set(region)))
        return Focus(
            mass,
            min(patches, look.size),
            int(look.size),
            float(share[at].sum()),
            at.size / look.size,
        )

    def on_picture(self, look: Floats, picture: int = 0) -> Floats:
        """(rows, columns) of one picture's grid from (positions,) values; NaN where a patch has no
        token.

        Values of another answer to the same prompt may be given too: only prompt positions are
        read.

        Raises:
            InputError: no such picture, or its patches' places are unknown.
        """
        if not 0 <= picture < len(self.grids) or self.grids[picture] == (0, 0):
            raise InputError(
                f"picture {picture} has no known grid of patches, so there is nothing to draw"
                " over it"
            )
        grid = np.full(self.grids[picture], np.nan)
        at = np.flatnonzero(self.image == picture)
        grid[self.row[at], self.column[at]] = look[at]
        return grid

    @cached_property
    def most_telling(self) -> tuple[int, int]:
        """Token and layer whose attention says most about the picture: much of it there, and on few
        patches.

        The score is image mass x (1 - H / ln N), H the entropy of the mean over heads on the N
        image tokens of its row.
        """
        at = self.modality == Modality.IMAGE
        if not at.any():
            return 0, self.layers[0]
        rows = np.nan_to_num(self.weights[..., at].astype(np.float32)).mean(2)
        mass = rows.sum(-1)
        share = rows / np.maximum(mass[..., None], 1e-12)
        entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(-1)
        score = mass * (1 - entropy / np.log(max(2, int(at.sum()))))
        words = np.array(
            [bool(word.strip(" .,")) for word in self.answer.words[: self.steps]] or [True]
        )
        score[: len(words)][~words] = -1.0
        step, layer = np.unravel_index(int(score[: len(words)].argmax()), score[: len(words)].shape)
        return int(step), self.layers[int(layer)]


@dataclass(frozen=True, eq=False)
class Disagreement:
    """How a policy's next-token distributions differ from the full cache's, both fed the full
    cache's answer.

    Attributes:
        kl: (tokens,) KL(full || policy) in nats.
        agree: (tokens,) whether both prefer the same token.
        preferred: text of the token the policy prefers at each step; `END` for the end of the
            answer.
    """

    kl: Floats
    agree: NDArray[np.bool_]
    preferred: tuple[str, ...]


def answer(
    vlm: VLM,
    sample: Sample,
    policy: avl.Policy | None = None,
    *,
    max_new_tokens: int = 64,
    on_token: OnToken | None = None,
) -> Answer:
    """Greedy answer to one question, timed.

    Args:
        policy: what to switch on; None leaves the stock cache.
        on_token: shows progress; its time is not counted.

    Raises:
        InputError: a picture or prompt that cannot be used.
        avl.UnsupportedModelError, avl.HookError: the policy cannot be put on this model.
    """
    inputs = vlm.prepare(list(sample.images), sample.prompt)
    length = inputs["input_ids"].shape[1]
    on: AbstractContextManager[Any] = (
        nullcontext() if policy is None else avl.adaptive(vlm.model, policy)
    )
    with on as session:
        watch = _Watch(vlm, length, on_token)
        out = vlm.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            **greedy(vlm.model),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        usage = None if session is None else session.usage()
        states, layers = (None, ()) if session is None else _states(session.selection)
    ids = tuple(out[0, length:].tolist())
    ends = end_tokens(vlm.model)
    return Answer(
        ids, tuple(_words(vlm, ids, ends)), watch.seconds, ids[-1] in ends, usage, states, layers
    )


def observe(
    vlm: VLM,
    sample: Sample,
    policy: avl.Policy | None = None,
    *,
    max_new_tokens: int = 64,
    on_token: OnToken | None = None,
) -> Observation:
    """As `answer`, keeping where every token looked."""
    tap = _Rows()
    with attached(vlm.model, tap):
        said = answer(vlm, sample, policy, max_new_tokens=max_new_tokens, on_token=on_token)
    assert tap.layout is not None
    layout = tap.layout
    modality, image, row, column = (
        _frozen(getattr(layout, name)[0].cpu().numpy())
        for name in ("modality", "image", "row", "column")
    )
    prompt = [
        "" if m == Modality.IMAGE else p
        for m, p in zip(modality, _pieces(vlm, tap.prompt), strict=False)
    ]
    return Observation(
        said,
        (*prompt, *said.words),
        len(prompt),
        modality,
        image,
        row,
        column,
        tuple(tap.layers),
        _frozen(tap.stack()),
    )


def disagreement(
    vlm: VLM, sample: Sample, policy: avl.Policy | None, reference: Sequence[int]
) -> Disagreement:
    """Feed a policy and the full cache the same tokens and compare their predictions.

    Args:
        reference: token ids of the full cache's own answer.
    """
    full, other = (_predictions(vlm, sample, which, reference) for which in (None, policy))
    preferred = other.argmax(-1)
    agree = full.argmax(-1) == preferred
    ends = end_tokens(vlm.model)
    pieces = zip(preferred.tolist(), _pieces(vlm, preferred.tolist()), strict=True)
    words = tuple(END if token in ends else piece for token, piece in pieces)
    return Disagreement(_frozen(kl_divergence(full, other).numpy()), _frozen(agree.numpy()), words)


def recorded(
    vlm: VLM,
    sample: Sample,
    policy: avl.Policy | None = None,
    *,
    max_new_tokens: int = 64,
    on_token: OnToken | None = None,
) -> Recording:
    """As `answer`, with every statistic recorded; the sample is annotated as `facts_of` says."""
    with record(vlm.model) as recording:
        said = answer(vlm, sample, policy, max_new_tokens=max_new_tokens, on_token=on_token)
    recording.annotate(**facts_of(vlm, sample, said.ids))
    recording.attrs |= {
        "model_name": vlm.name,
        "policy": "full cache" if policy is None else repr(policy),
    }
    if vlm.revision:
        recording.attrs["model_revision"] = vlm.revision
    return recording


# -- running the model -----------------------------------------------------------------------------


class _Watch(StoppingCriteria):
    """Never stops anything: notes the time of every token and tells whoever looks on."""

    def __init__(self, vlm: VLM, prompt: int, on_token: OnToken | None) -> None:
        self.vlm, self.prompt, self.on_token = vlm, prompt, on_token
        self.start, self.paused = time.perf_counter(), 0.0
        self.seconds: tuple[float, ...] = ()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        now = time.perf_counter()
        self.seconds = (*self.seconds, now - self.start - self.paused)
        if self.on_token is not None:
            new = input_ids[0, self.prompt :]
            self.on_token(
                self.vlm.processor.decode(new, skip_special_tokens=True).strip(), len(new)
            )
            self.paused += time.perf_counter() - now
        return torch.zeros(1, dtype=torch.bool, device=input_ids.device)


def _predictions(
    vlm: VLM, sample: Sample, policy: avl.Policy | None, tokens: Sequence[int]
) -> Tensor:
    """(tokens, vocabulary) logits of the model's own predictions along given tokens, float32 on the
    CPU.
    """
    steps: list[Tensor] = []
    generate(
        vlm,
        [sample],
        policy,
        max_new_tokens=len(tokens),
        forced=[tokens],
        on_logits=lambda step, logits: steps.append(logits[0].float().cpu()),
    )
    return torch.stack(steps[: len(tokens)])


class _Rows(Observer):
    """Keeps the weights of the row that produces each token, ordered by position."""

    def __init__(self) -> None:
        self.layout: Any = None
        self.prompt: list[int] = []
        self.layers: list[int] = []
        self._now: dict[int, Tensor] = {}
        self._steps: list[NDArray[np.float16]] = []
        self._bytes = 0

    def begin(self, forward: Forward) -> None:
        self._now = {}
        if forward.kind == "prefill":
            ids = forward.inputs.get("input_ids")
            self.prompt = [] if ids is None else ids[0].tolist()

    @torch.no_grad()
    def observe(self, call: AttentionCall, output: Tensor) -> None:
        last = call.query.shape[2] - 1
        weights = attention_weights(call, slice(last, last + 1))[0, :, 0]
        self._now[call.layer] = _by_position(weights, call)

    def end(self, forward: Forward) -> None:
        self.layout, self.layers = forward.layout, sorted(self._now)
        if self._bytes < MAX_WEIGHTS:
            rows = torch.stack([self._now[layer] for layer in self.layers]).half().cpu().numpy()
            self._steps.append(rows)
            self._bytes += rows.nbytes

    def stack(self) -> NDArray[np.float16]:
        """(steps, layers, heads, positions), NaN for positions that did not exist yet."""
        longest = self.layout.length
        room = ((0, 0), (0, 0), (0, 0))
        grown = [
            np.pad(s, (*room[:2], (0, longest - s.shape[-1])), constant_values=np.nan)
            for s in self._steps
        ]
        return np.stack(grown)


def _by_position(weights: Tensor, call: AttentionCall) -> Tensor:
    """(heads, keys) to (heads, positions), NaN where no key of that position was read."""
    length = call.forward.start + call.forward.tokens
    positions = call.key_positions
    if positions is None:
        positions = torch.arange(weights.shape[1], device=weights.device)
    positions = positions if positions.dim() == 1 else positions[0]
    if positions.dim() == 2 and positions.shape[0] > 1:
        positions = positions.repeat_interleave(call.groups, 0)
    at = positions.expand(weights.shape).long()
    out = torch.full((weights.shape[0], length + 1), torch.nan, device=weights.device)
    out.scatter_(1, torch.where((at < 0) | (at >= length), length, at), weights)
    return out[:, :length]


# -- small parts -----------------------------------------------------------------------------------


def _states(selection: avl.Selection) -> tuple[NDArray[np.int8], tuple[int, ...]]:
    """(layers, steps, positions): the diary replayed."""
    steps, length = selection.steps + 1, selection.layout.length
    states = np.full((len(selection.layers), steps, length), int(avl.State.PADDING), np.int8)
    for index, layer in enumerate(selection.layers):
        for step in range(steps):
            state = selection.state(layer, step)[0].amax(0).cpu().numpy()
            states[index, step, : state.size] = state
    return _frozen(states), tuple(selection.layers)


def _words(vlm: VLM, ids: Sequence[int], ends: Sequence[int]) -> list[str]:
    """Text of each token such that together they are the answer; a token that completes a character
    carries it.
    """
    decode = vlm.processor.tokenizer.decode
    words, before = [], ""
    for count, token in enumerate(ids, start=1):
        if token in ends:
            break
        text = decode(list(ids[:count]), skip_special_tokens=True)
        text = text.rstrip("\ufffd")
        words.append(
            text[len(before) :]
            if text.startswith(before)
            else decode([token], skip_special_tokens=True)
        )
        before = text
    return words


def _pieces(vlm: VLM, ids: Sequence[int]) -> list[str]:
    """Text of each prompt token by itself, special ones by name."""
    names = vlm.processor.tokenizer.convert_ids_to_tokens(list(ids))
    return [
        str(name).replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n").replace("<0x0A>", "\n")
        for name in names
    ]


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array = np.ascontiguousarray(array)
    array.setflags(write=False)
    return array
