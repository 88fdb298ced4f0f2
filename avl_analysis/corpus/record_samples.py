"""Record a model while it answers a list of questions.

Between `record`, which knows nothing about prompts, and the command line, which knows nothing about
models. Every sample of the recording carries what a report wants to know about it (`facts_of`), so
that one file is enough to draw every figure again: the words of the answer, the truth where it is
known, and the picture, as the seed it is drawn from or as a thumbnail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from avl.families import describe
from avl_analysis.capture.recorder import record
from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.regions import tokens_in_boxes
from avl_analysis.errors import InputError
from avl_analysis.figures.pictures import data_uri
from avl_analysis.models.loading import VLM, end_tokens, greedy
from avl_analysis.models.videos import Frames, open_source
from avl_analysis.recordings.recording import Recording

FRAME_SIDE = 256
"""Longest side, in pixels, of the thumbnails of frames that a recording keeps."""

OnToken = Callable[[int, int], None]
"""Called after every token with (samples done before this batch, new tokens of this batch so far).
"""


def record_samples(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    system: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 1,
    generate: Mapping[str, Any] | None = None,
    on_token: OnToken | None = None,
    **options: Any,
) -> Recording:
    """Record the model while it answers each question.

    Args:
        vlm: a loaded model.
        samples: the questions; sample i of the recording is `samples[i]`, with the facts of
            `facts_of`.
        system: system prompt of all of them.
        max_new_tokens: longest answer, in tokens.
        batch_size: questions per pass.
        generate: further arguments of `model.generate`; greedy by default.
        on_token: see `OnToken`, for showing progress.
        options: passed on to `record`.

    Raises:
        InputError: pictures or prompts that cannot be used, layers or heads out of range, a batch
            size below 1, a question that continues a conversation.
    """
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size}: at least one question must go into a pass")
    for sample in samples:
        if sample.history:
            raise InputError(
                f"sample {sample.id!r} continues a conversation of {len(sample.history)} earlier"
                " question(s), which runs over many samples leave out: watch such a question with"
                " avl_analysis.live.observe"
            )
    arguments = {**greedy(vlm.model), "max_new_tokens": max_new_tokens, **(generate or {})}
    # Removed here and put in front of `_Surprise` below, so that it sees the scores after them.
    own_processors = arguments.pop("logits_processor", None) or []
    with record(vlm.model, **options) as recording:
        for start in range(0, len(samples), batch_size):
            chosen = samples[start : start + batch_size]
            for sample in chosen:
                _check_regions(sample)
            images = [list(sample.images) for sample in chosen]
            inputs = vlm.prepare(images, [sample.prompt for sample in chosen], system=system)
            length = inputs["input_ids"].shape[1]
            watch = StoppingCriteriaList(
                [_CountTokens(start, length, on_token)] if on_token else []
            )
            surprise = _Surprise()
            out = vlm.model.generate(
                **inputs,
                stopping_criteria=watch,
                logits_processor=LogitsProcessorList([*own_processors, surprise]),
                **arguments,
            )
            surprises = surprise.of_rows(out[:, length:], len(chosen))
            # Of the prompt as it was given to the model, so with the inputs of this batch.
            inside = tokens_asked_about(vlm, chosen, inputs)
            for row, sample in enumerate(chosen):
                facts = facts_of(vlm, sample, out[row, length:].tolist())
                if surprises:
                    # A row that ended early was padded; what stands behind its words is not its
                    # answer.
                    facts["surprise"] = surprises[row][: len(facts.get("words", ()))]
                about = {"region_tokens": inside[row]} if inside[row] else {}
                recording.annotate(start + row, **facts, **about)
    return recording


def facts_of(vlm: VLM, sample: Sample, tokens: Sequence[int]) -> dict[str, Any]:
    """What to remember about a sample and the answer it got, as `Recording.annotate` takes it.

    prompt, answer, words (text of each token of the answer); where known task, truth (all right
    answers in `answers`), truth_words (text of each token of truth), boxes (and, by
    `record_samples`, region_tokens: the image tokens under them, and surprise: `-ln p` of each of
    the words, in nats), meta (the user's own facts about the sample, which never take the place of
    these); and scene (seed, index, task of a drawn picture) or picture and picture_size (a
    thumbnail and the picture's own width and height, to which boxes refer; for samples with one
    picture), or frames (thumbnails of all that are shown), frame_seconds and picture_size for
    samples with one video.
    """
    tokenizer = vlm.processor.tokenizer
    ends = {*end_tokens(vlm.model), tokenizer.eos_token_id}
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    # A row that ended early is padded in the batch; the answer goes up to its first end token.
    answer = list(tokens[:end])
    facts: dict[str, Any] = {
        "id": sample.id,
        "task": sample.task,
        "prompt": sample.prompt,
        "answer": tokenizer.decode(answer, skip_special_tokens=True).strip(),
        "words": [tokenizer.decode([token]) for token in answer],
        "truth": sample.answers[0] if sample.answers else "",
        "truth_words": _words_of(tokenizer, sample.answers[0]) if sample.answers else [],
        "answers": list(sample.answers or ()),
        "boxes": [list(box) for box in sample.regions],
        "scene": sample.scene,
        "meta": dict(sample.meta or {}),
    }
    if sample.scene is None and len(sample.images) == 1:
        shown = open_source(sample.images[0])
        facts["picture_size"] = list(shown.size)
        if isinstance(shown, Frames):
            facts["frames"] = [data_uri(frame, FRAME_SIDE) for frame in shown.pixels]
            facts["frame_seconds"] = list(shown.seconds)
        else:
            facts["picture"] = data_uri(np.asarray(shown))
    return {
        name: value
        for name, value in facts.items()
        # An empty answer is a fact; other empty values say that nothing is known.
        if name == "answer" or value not in ("", [], {}, None)
    }


def _words_of(tokenizer: Any, text: str) -> list[str]:
    """Text of each token that a tokenizer makes of a text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.decode([token]) for token in ids]


def tokens_asked_about(
    vlm: VLM, samples: Sequence[Sample], inputs: Mapping[str, Any]
) -> list[list[int]]:
    """The image tokens under the boxes given with each question.

    By their place among the sample's image tokens.

    Empty where no boxes were given or the model's tokens have no known place; also for drawn
    scenes, whose truth is known word by word, and for samples of several pictures, of which boxes
    do not say the one. Of a video every frame has its own box; where a model makes one token of
    several frames, the token is asked about if it lies under the box of any of them.

    Args:
        vlm: a loaded model.
        samples: the questions of a batch.
        inputs: what `VLM.prepare` returned for these samples.
    """
    asked = [bool(s.regions) and len(s.images) == 1 and s.scene is None for s in samples]
    if not any(asked):
        return [[] for _ in samples]
    family = describe(vlm.model)
    layout = family.layout(inputs["input_ids"], inputs.get("attention_mask"), inputs)
    sizes = [[open_source(image).size for image in sample.images] for sample in samples]
    boxes = family.picture_map(layout, inputs, sizes, vlm.processor).boxes
    found: list[list[int]] = []
    for row, sample in enumerate(samples):
        # Of (length, 4) and (length,) the image tokens of this row, in order: indices below are
        # places among them.
        of_image = layout.image[row].cpu() >= 0
        places, frame = boxes[row][of_image].numpy(), layout.frame[row].cpu()[of_image].numpy()
        found.append(_under_boxes(places, frame, sample.regions) if asked[row] else [])
    return found


def _under_boxes(
    places: np.ndarray, frame: np.ndarray, regions: Sequence[tuple[int, int, int, int]]
) -> list[int]:
    """The image tokens under boxes of one picture, or of the frames of one video.

    Args:
        places: (tokens, 4) boxes of the tokens in pixels.
        frame: (tokens,) frame or group of frames of each, -1 for a picture.
        regions: of a picture any number, of a video one for every frame.
    """
    groups = int(frame.max(initial=-1)) + 1
    if not groups:
        return list(tokens_in_boxes(places, regions))
    together = -(-len(regions) // groups)  # frames in one group
    inside: list[int] = []
    for group in range(groups):
        # Image tokens of the group; `tokens_in_boxes` answers with places among these.
        at = np.flatnonzero(frame == group)
        own = regions[group * together : (group + 1) * together]
        inside += at[tokens_in_boxes(places[at], own)].tolist()
    return sorted(inside)


def _check_regions(sample: Sample) -> None:
    """Refuse boxes of which no part lies in the picture."""
    if not sample.regions or len(sample.images) != 1 or sample.scene is not None:
        return
    shown = open_source(sample.images[0])
    if isinstance(shown, Frames) and len(shown.images) != len(sample.regions):
        raise InputError(
            f"sample {sample.id} has {len(sample.regions)} region(s) and a video of"
            f" {len(shown.images)} frames: give one box for every frame that is shown, in order"
        )
    width, height = shown.size
    for box in sample.regions:
        if box[0] >= width or box[1] >= height:
            raise InputError(
                f"region {list(box)} of sample {sample.id} lies outside its picture of {width} x"
                f" {height} pixels"
            )


class _CountTokens(StoppingCriteria):
    """Never stops anything; unlike a streamer, `generate` allows it for batches too."""

    def __init__(self, done: int, prompt: int, on_token: OnToken) -> None:
        self.done, self.prompt, self.on_token = done, prompt, on_token

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        self.on_token(self.done, input_ids.shape[1] - self.prompt)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _Surprise(LogitsProcessor):
    """Changes nothing; keeps `-ln p` of every token that was chosen, in nats.

    p is the model's probability under the scores that `generate` chooses by. A token is known to
    this class only when the next one is asked for, so that one distribution is held at a time.
    """

    def __init__(self) -> None:
        self._latest: torch.Tensor | None = None
        self._chosen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # The newest token was chosen from the distribution of the call before.
        self._settle(input_ids[:, -1])
        self._latest = torch.log_softmax(scores.float(), -1)
        return scores

    def _settle(self, tokens: torch.Tensor) -> None:
        if self._latest is not None:
            index = tokens.to(self._latest.device)[:, None]
            self._chosen.append(-self._latest.gather(1, index)[:, 0])

    def of_rows(self, tokens: torch.Tensor, rows: int) -> list[list[float]]:
        """Surprise of every token of each row, in nats.

        Empty where rows of the output are not the rows that were asked (several sequences a
        question), because it is then unknown whose they are.

        Args:
            tokens: (rows, new tokens) that `generate` returned.
            rows: how many questions were asked.
        """
        if self._latest is None or not len(tokens) == len(self._latest) == rows:
            return []
        # No call follows the last token, which is settled here.
        self._settle(tokens[:, -1])
        return [[round(float(v), 5) for v in row] for row in torch.stack(self._chosen, 1)]
