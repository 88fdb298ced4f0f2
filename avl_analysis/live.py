"""One question answered while somebody watches.

Tokens as they come, where each looked, and what a policy changed.

Three passes over the same prompt, each for its own purpose. `answer` runs free and is timed, so
nothing else is on the model than the policy. `observe` runs again under `record`, which keeps all
statistics and, for every token produced, the softmax weights of the row that produced it, for all
layers and heads: a few hundred kilobytes for the embedded model. `disagreement` feeds a policy the
full cache's own answer and compares the next-token distributions.

The weights of step t belong to the row that *produced* token t, which is the row of the token
before it (the last prompt row for the first token). Keys a policy did not read have NaN, not zero.

Everything returned is immutable and holds no tensor of the model, so that several people may look
at it at once. The functions attach to the model and detach again; where threads share a model, let
one run at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import avl
from avl.tokens import Modality
from avl_analysis.capture.recorder import record
from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.record_samples import facts_of
from avl_analysis.errors import InputError
from avl_analysis.evaluation.compare import kl_divergence
from avl_analysis.evaluation.generation import generate
from avl_analysis.evaluation.next_tokens import NextToken, NextTokens, sampling
from avl_analysis.figures.patches import Patches
from avl_analysis.models.loading import VLM, end_tokens
from avl_analysis.recordings.image_tokens import ImageTokens, images_of
from avl_analysis.recordings.recording import Recording

MAX_WEIGHTS = 2 << 30
"""Bytes that the weights of one observation may take while it runs; 64 tokens of a model of 32 x 32
heads at 3,000 keys take 980 MB then, and 390 MB afterwards.
"""

Floats = NDArray[np.float64]
OnToken = Callable[[str, int], None]
"""Called with the answer so far and its number of tokens after every token."""


@dataclass(frozen=True)
class TokenChoice:
    """The distribution that one token was chosen from, in words.

    Attributes:
        words: text of the likeliest tokens, the likeliest first; `END` for the end of the answer.
        probabilities: theirs, before anything is drawn, after penalties of the model's generation
            settings; at the temperature of the answer, at 1 for a greedy one.
        probability: that of the token that was written.
        rank: number of tokens that were likelier than it.
        entropy: of the whole distribution, in nats.
    """

    words: tuple[str, ...]
    probabilities: tuple[float, ...]
    probability: float
    rank: int
    entropy: float


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
        choices: what else each token could have been, the end-of-sequence token included; empty
            unless asked for.
    """

    ids: tuple[int, ...]
    words: tuple[str, ...]
    seconds: tuple[float, ...]
    finished: bool
    usage: avl.Usage | None = None
    states: NDArray[np.int8] | None = None
    layers: tuple[int, ...] = ()
    choices: tuple[TokenChoice, ...] = ()

    @property
    def text(self) -> str:
        """The words as one text."""
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
"""What stands for the end-of-sequence token in `Disagreement.preferred` and `TokenChoice.words`."""

CHOICES = 8
"""Likeliest tokens that `observe` keeps of every distribution."""

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
        """How many times chance the region's share is."""
        return self.region / self.area if self.area > 0 else float("nan")


@dataclass(frozen=True, eq=False)
class Observation:
    """Where the model looked while it produced each token of one answer.

    Attributes:
        answer: the answer (timed while watched, so slower than free).
        tokens: text of every position of prompt and answer; image positions hold "". The last token
            of an answer that did not end by itself was produced but never fed to the model, so
            `weights`, `modality` and `image` have one position less.
        prompt: positions of the prompt; token t of the answer stands at position `prompt` + t.
        recording: all statistics of the answer, as `record` makes them, with the facts that
            `facts_of` gives; treat it as read-only.
        weights: (steps, layers, heads, positions) float16, softmax weights of the row that produced
            each token; NaN where a key was not read or did not exist yet.
    """

    answer: Answer
    tokens: tuple[str, ...]
    prompt: int
    recording: Recording
    weights: NDArray[np.float16]

    @property
    def steps(self) -> int:
        """Tokens whose weights were kept."""
        return int(self.weights.shape[0])

    @property
    def heads(self) -> int:
        """Query heads of a layer."""
        return int(self.weights.shape[2])

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers of `weights`."""
        return tuple(int(layer) for layer in self.recording["modality_mass"]["layer"].values)

    @cached_property
    def modality(self) -> NDArray[np.int8]:
        """(positions,) codes of `avl.tokens.Modality`."""
        return _frozen(self.recording.tokens["modality"].values[0])

    @cached_property
    def image(self) -> NDArray[np.int16]:
        """(positions,) index of the image, -1 where there is none."""
        return _frozen(self.recording.tokens["image"].values[0])

    @cached_property
    def images(self) -> tuple[ImageTokens, ...]:
        """The tokens of every image and the part of the image under each."""
        return tuple(images_of(self.recording.tokens.isel(sample=0)))

    @property
    def drawable(self) -> tuple[int, ...]:
        """Images of whose tokens it is known where they lie."""
        return tuple(number for number, image in enumerate(self.images) if image.placed)

    def look(self, step: int, layer: int | None = None, head: int | None = None) -> Floats:
        """(positions,) weights of one token, mean over what is not chosen.

        NaN where no chosen head read the key.

        Args:
            step: number of the token, from 0.
            layer: index of a decoder layer, None for the mean over layers.
            head: query head, None for the mean over heads.

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
        # (layers, heads, positions); a list with one index keeps the dimension it selects from.
        rows = self.weights[step].astype(np.float64)
        rows = rows if layer is None else rows[[self.layers.index(layer)]]
        rows = rows if head is None else rows[:, [head]]
        rows = rows.reshape(-1, rows.shape[-1])
        # A key is unknown only if no chosen head read it; a head that did not read it counts as 0.
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
        """How much of a token's attention is on the picture and how concentrated.

        Zeros without a picture.

        Args:
            step: number of the token, from 0.
            layer: as in `look`.
            head: as in `look`.
            region: image tokens, counted from 0 in the order of the prompt, that the token is
                about.
        """
        look = np.nan_to_num(self.look(step, layer, head))[self.modality == Modality.IMAGE]
        mass = float(look.sum())
        if mass <= 0:
            return Focus(0.0, 0, int(look.size))
        share = look / mass
        # Running sum from the largest share on; the first place that reaches `FOCUS`, counted from
        # 1.
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

    def on_image(self, values: Floats, image: int = 0) -> Patches:
        """Values of one image's tokens, to be laid over the image.

        Args:
            values: (positions,); those of another answer to the same prompt may be given too,
                because only positions of the prompt are read.
            image: which image of the prompt.

        Raises:
            InputError: no such image, or it is not known where its tokens lie.
        """
        if image not in self.drawable:
            raise InputError(
                f"image {image} has no tokens with a known place, so there is nothing to draw over"
                f" it; images with known places: {', '.join(map(str, self.drawable)) or 'none'}"
            )
        tokens = self.images[image]
        return tokens.patches(values[tokens.position])

    @cached_property
    def most_telling(self) -> tuple[int, int]:
        """Token and layer whose attention says most about the picture.

        Much of it there, and on few patches.

        The score is image mass x (1 - H / ln N), H the entropy of the mean over heads on the N
        image tokens of its row.
        """
        at = self.modality == Modality.IMAGE
        if not at.any():
            return 0, self.layers[0]
        # (steps, layers, image tokens), mean over heads
        rows = np.nan_to_num(self.weights[..., at].astype(np.float32)).mean(2)
        mass = rows.sum(-1)
        share = rows / np.maximum(mass[..., None], 1e-12)
        entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(-1)
        score = mass * (1 - entropy / np.log(max(2, int(at.sum()))))
        # Tokens that are only spaces and stops look at nothing in particular; they are not
        # proposed.
        words = np.array(
            [bool(word.strip(" .,")) for word in self.answer.words[: self.steps]] or [True]
        )
        score[: len(words)][~words] = -1.0
        step, layer = np.unravel_index(int(score[: len(words)].argmax()), score[: len(words)].shape)
        return int(step), self.layers[int(layer)]


@dataclass(frozen=True, eq=False)
class Disagreement:
    """How a policy's next-token distributions differ from the full cache's.

    Both are fed the full cache's answer.

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
    temperature: float = 0.0,
    seed: int = 0,
    choices: int = 0,
    on_token: OnToken | None = None,
) -> Answer:
    """Answer to one question, timed; greedy unless a temperature is given.

    Args:
        vlm: model and processor.
        sample: the question.
        max_new_tokens: longest answer, in tokens.
        policy: what to switch on; None leaves the stock cache.
        temperature: 0 takes the likeliest token every time; above, tokens are drawn.
        seed: of the draws.
        choices: how many of the likeliest tokens are kept at every token, which is not counted.
        on_token: shows progress; its time is not counted.

    Raises:
        InputError: a picture or prompt that cannot be used, a temperature or seed out of range.
        avl.UnsupportedModelError, avl.HookError: the policy cannot be put on this model.
    """
    inputs = vlm.prepare(
        list(sample.images), sample.prompt, system=sample.system, history=sample.history
    )
    length = inputs["input_ids"].shape[1]
    on: AbstractContextManager[Any] = (
        nullcontext() if policy is None else avl.adaptive(vlm.model, policy)
    )
    next_tokens = NextTokens(choices, temperature) if choices else None
    with sampling(vlm.model, temperature, seed) as options, on as session:
        watch = _FollowTokens(vlm, length, on_token, next_tokens)
        if next_tokens is not None:
            options["logits_processor"] = LogitsProcessorList([next_tokens])
        out = vlm.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            **options,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        usage = None if session is None else session.usage()
        states, layers = (None, ()) if session is None else _states(session.selection)
    ids = tuple(out[0, length:].tolist())
    ends = end_tokens(vlm.model)
    return Answer(
        ids,
        tuple(_words(vlm, ids, ends)),
        watch.seconds,
        ids[-1] in ends,
        usage,
        states,
        layers,
        () if next_tokens is None else tuple(_choices(vlm, next_tokens.tokens)),
    )


def observe(
    vlm: VLM,
    sample: Sample,
    policy: avl.Policy | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    on_token: OnToken | None = None,
) -> Observation:
    """As `answer`, keeping all statistics, where every token looked, and what else it could be.

    Args:
        vlm: model and processor.
        sample: the question.
        policy: what to switch on; None leaves the stock cache.
        max_new_tokens: longest answer, in tokens.
        temperature: as in `answer`.
        seed: as in `answer`.
        on_token: shows progress; its time is not counted.

    Raises:
        InputError: as `answer`; weights that would take more than `MAX_WEIGHTS`.
    """
    # One row that is never padded: nothing that is fed to it marks it as finished.
    with record(
        vlm.model, keep="attention", queries="steps", limit=MAX_WEIGHTS, stop=()
    ) as recording:
        said = answer(
            vlm,
            sample,
            policy,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            choices=CHOICES,
            on_token=on_token,
        )
    recording.annotate(**facts_of(vlm, sample, said.ids))
    raw = recording.drop_attention().isel(sample=0).transpose("query", "layer", "head", "position")
    # 0 says that a key was seen and hardly attended to; NaN that it was not there to be seen.
    weights = np.where(raw["visible"].values > 0, raw["attention"].values, np.nan)
    tokens = recording.tokens.isel(sample=0)
    prompt = int(tokens["prompt_length"])
    pieces = _pieces(vlm, tokens["token_id"].values[:prompt].tolist())
    is_image = tokens["image"].values[:prompt] >= 0
    texts = ["" if image else piece for image, piece in zip(is_image, pieces, strict=True)]
    return Observation(
        said,
        (*texts, *said.words),
        prompt,
        recording,
        _frozen(weights.astype(np.float16)),
    )


def disagreement(
    vlm: VLM, sample: Sample, policy: avl.Policy | None, reference: Sequence[int]
) -> Disagreement:
    """Feed a policy and the full cache the same tokens and compare their predictions.

    Args:
        vlm: a loaded model.
        sample: the question.
        policy: what is compared with the full cache.
        reference: token ids of the full cache's own answer.
    """
    full, other = (_predictions(vlm, sample, which, reference) for which in (None, policy))
    preferred = other.argmax(-1)
    agree = full.argmax(-1) == preferred
    words = token_texts(vlm, preferred.tolist())
    return Disagreement(_frozen(kl_divergence(full, other).numpy()), _frozen(agree.numpy()), words)


def token_texts(vlm: VLM, ids: Sequence[int]) -> tuple[str, ...]:
    """Text of each token by itself; `END` for those that end an answer."""
    ends = end_tokens(vlm.model)
    pieces = zip(ids, _pieces(vlm, ids), strict=True)
    return tuple(END if token in ends else piece for token, piece in pieces)


# -- running the model -----------------------------------------------------------------------------


class _FollowTokens(StoppingCriteria):
    """Never stops anything: notes the time of every token and passes it on."""

    def __init__(
        self,
        vlm: VLM,
        prompt: int,
        on_token: OnToken | None,
        next_tokens: NextTokens | None = None,
    ) -> None:
        self.vlm, self.prompt, self.on_token = vlm, prompt, on_token
        self.next_tokens = next_tokens
        self.start, self.paused = time.perf_counter(), 0.0
        self.seconds: tuple[float, ...] = ()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        # Taken first: what follows is not the model's time and is added to `paused`.
        now = time.perf_counter()
        self.seconds = (*self.seconds, now - self.start - self.paused)
        if self.next_tokens is not None:
            self.next_tokens.note(int(input_ids[0, -1]))
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
    """(tokens, vocabulary) logits of the model's own predictions along given tokens.

    float32 on the CPU.
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


# -- small parts -----------------------------------------------------------------------------------


def _states(selection: avl.Selection) -> tuple[NDArray[np.int8], tuple[int, ...]]:
    """(layers, steps, positions): the selection log replayed."""
    steps, length = selection.steps + 1, selection.layout.length
    # Positions that did not exist yet stay PADDING.
    states = np.full((len(selection.layers), steps, length), int(avl.State.PADDING), np.int8)
    for index, layer in enumerate(selection.layers):
        for step in range(steps):
            state = selection.state(layer, step)[0].amax(0).cpu().numpy()
            states[index, step, : state.size] = state
    return _frozen(states), tuple(selection.layers)


def _choices(vlm: VLM, kept: Sequence[NextToken]) -> Iterator[TokenChoice]:
    """What `NextTokens` kept, in words."""
    for one in kept:
        yield TokenChoice(
            token_texts(vlm, one.ids), one.probabilities, one.probability, one.rank, one.entropy
        )


def _words(vlm: VLM, ids: Sequence[int], ends: Sequence[int]) -> list[str]:
    """Text of each token such that together they are the answer.

    A token that completes a character carries it.
    """
    decode = vlm.processor.tokenizer.decode
    words, before = [], ""
    for count, token in enumerate(ids, start=1):
        if token in ends:
            break
        text = decode(list(ids[:count]), skip_special_tokens=True)
        # The replacement character stands for the bytes of a character that is not complete yet.
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
    # Tokenizers mark a blank in front of a word with "▁" or "Ġ", and a line break with "Ċ".
    names = vlm.processor.tokenizer.convert_ids_to_tokens(list(ids))
    return [
        str(name).replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n").replace("<0x0A>", "\n")
        for name in names
    ]


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array = np.ascontiguousarray(array)
    array.setflags(write=False)
    return array
