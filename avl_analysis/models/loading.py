"""Load a vision-language model and put images and words into the form it was trained on.

`load_model` reads the embedded model, a local folder or a hub id, and returns a `VLM`: model,
processor, where they come from, `prepare`, which turns images and prompts into model inputs, and
`answer`, which generates from them. `vlm.model` is a stock transformers model, and everything else
in the project takes such a model wherever it was loaded.

On a CPU the default type is float32 whatever the checkpoint holds, because half precision is slower
there and rounds attention visibly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import nn
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin
from transformers.video_utils import VideoMetadata

import avl
from avl.families import UnsupportedModelError, describe
from avl.places import remember_originals
from avl_analysis.errors import InputError, blamed_on_input
from avl_analysis.models.checkpoint import (
    EMBEDDED,
    locate,
    read_config,
    read_weights,
)
from avl_analysis.models.inventory import describe_model
from avl_analysis.models.processors import read_processor
from avl_analysis.models.prompts import (
    PICTURE,
    Conversation,
    Mark,
    Marks,
    picture_rows,
    render,
    takes_videos,
)
from avl_analysis.models.video_frames import SmolFrames
from avl_analysis.models.videos import Frames, Source, is_video, open_source

DTYPES = ("float32", "bfloat16", "float16")
"""Floating types a model can be loaded in by name."""


# Weak, so that a name does not keep a model in memory.
_LOADED: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()


def name_and_revision(model: nn.Module) -> tuple[str, str]:
    """What a model is called wherever it is named, and its revision ("" if unknown).

    A model of a `VLM` has that name in every recording; any other is called what transformers read
    it from, or else by its class.
    """
    if model in _LOADED:
        return _LOADED[model]
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    return name, str(getattr(getattr(model, "config", None), "_commit_hash", None) or "")


@dataclass(frozen=True)
class VLM:
    """A loaded vision-language model with what is needed to ask it something.

    Attributes:
        name: what it was asked for by: "scenes", a folder, a hub id.
        model: the transformers model, in eval mode.
        processor: its processor; the tokenizer pads on the left.
        path: folder or hub id it was read from.
        revision: hub commit, or "sha256:..." of a local folder's weights; None where neither is
            known.
        description: one line for people: class, parameters, type, device.
    """

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin
    path: str
    revision: str | None
    description: str

    def __post_init__(self) -> None:
        _LOADED[self.model] = (self.name, self.revision or "")

    def prepare(
        self,
        images: Source | Sequence[Any] | None,
        prompt: str | Sequence[str],
        *,
        system: str | None = None,
        history: Sequence[tuple[str, str]] | None = None,
    ) -> BatchFeature:
        r"""Model inputs for one prompt, or for a batch of prompts padded on the left.

        The chat template is applied where the processor has one; otherwise the plain form
        `<image>\nprompt` is used. Pictures come first in the conversation, unless the prompts
        themselves say where each belongs by containing the processor's image placeholder (`<image>`
        for LLaVA) exactly as often as there are pictures. To a processor without a video part a
        video is shown as so many pictures, which a recording knows to be its frames.

        Args:
            images: for one prompt a picture or a list of pictures; for a list of prompts a list of
                the same length, each entry a picture or a list of pictures. A video may stand
                wherever a picture may: a `Video`, a folder of frames, a video file. An empty list
                asks without a picture, on purpose.
            prompt: the question, or a list of questions.
            system: system prompt, the same for every row.
            history: earlier (question, answer) pairs; single prompts only. Pictures belong to the
                first question.

        Returns:
            `input_ids` and `attention_mask` (rows, length), the picture and video tensors of the
                family, on the model's device and in its floating type: pass it on as
                `model(**inputs)` or `model.generate(**inputs)`.

        Raises:
            InputError: no picture, unreadable pictures, empty prompts, lists of different length,
                placeholders that do not match the pictures, a template that drops what it was
                given, prompts longer than the model can take.
        """
        rows = [[open_source(source) for source in row] for row in picture_rows(images, prompt)]
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if history and not isinstance(prompt, str):
            raise InputError("a history goes with one prompt; prepare conversations one at a time")
        texts = [
            render(
                self.processor, Conversation(text, self.marks(row), system, tuple(history or ()))
            )
            for text, row in zip(prompts, rows, strict=True)
        ]
        given = _given(rows, takes_videos(self.processor))
        doing = (
            f"the {type(self.processor).__name__} refused {sum(map(len, rows))} picture(s) with"
            " this text"
        )
        video_part = getattr(self.processor, "video_processor", None)
        if given["images"] and "videos" in given and isinstance(video_part, SmolFrames):
            raise InputError(
                "this family's processor takes pictures or videos in one call, not both: ask about"
                " them one after another"
            )
        with blamed_on_input(doing):
            inputs = self.processor(**given, text=texts, padding=True, return_tensors="pt")
        self._check_length(inputs["input_ids"].shape[1])
        self._check_pictures(inputs["input_ids"], [len(row) for row in rows])
        # Only floating tensors take the type; ids and masks stay integers.
        inputs = inputs.to(device=self.model.device, dtype=self.model.dtype)
        sizes = [[one.size for one in row] for row in rows]
        frames = [
            [len(one.images) if isinstance(one, Frames) else 0 for one in row] for row in rows
        ]
        # After `to`, because sizes are remembered by the identity of the tensors that go to the
        # model.
        remember_originals(inputs, sizes, self.processor, frames)
        return inputs

    def marks(self, shown: Sequence[Source | Frames]) -> tuple[Marks, ...]:
        """What stands for pictures and videos in this model's prompts.

        A video has one placeholder where the processor has a video part, and one for each frame
        elsewhere (one in all where the frames were not read yet).
        """
        if takes_videos(self.processor):
            return tuple(
                (Mark.VIDEO,) if isinstance(one, Frames) or is_video(one) else PICTURE
                for one in shown
            )
        return tuple(
            PICTURE * len(one.images) if isinstance(one, Frames) else PICTURE for one in shown
        )

    def answer(
        self,
        images: Source | Sequence[Any] | None,
        prompt: str | Sequence[str],
        policy: avl.Policy | None = None,
        *,
        system: str | None = None,
        history: Sequence[tuple[str, str]] | None = None,
        max_new_tokens: int = 64,
        **generate: Any,
    ) -> str | list[str]:
        """The model's answer as text; a list of answers for a list of prompts.

        Args:
            images: as in `prepare`.
            prompt: as in `prepare`.
            policy: what the cache keeps and the model attends to while it answers; None leaves
                the stock cache. For the bytes and tokens a policy kept, use `avl.adaptive` around
                `model.generate`, which gives a session to ask.
            system: as in `prepare`.
            history: as in `prepare`.
            max_new_tokens: longest answer, in tokens.
            generate: further arguments of `model.generate`; without any the answer is greedy.

        Raises:
            InputError: as `prepare`.
            avl.UnsupportedModelError, avl.HookError: the policy cannot be put on this model.
        """
        inputs = self.prepare(images, prompt, system=system, history=history)
        options = {**greedy(self.model), "max_new_tokens": max_new_tokens, **generate}
        with nullcontext() if policy is None else avl.adaptive(self.model, policy):
            out = self.model.generate(**inputs, **options)
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = [
            text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)
        ]
        return texts[0] if isinstance(prompt, str) else texts

    def _check_length(self, length: int) -> None:
        limit = getattr(
            self.model.config.get_text_config(decoder=True), "max_position_embeddings", None
        )
        if limit and length > limit:
            raise InputError(
                f"the prompt has {length} tokens, pictures included; {self.name} takes at most"
                f" {limit}: shorten it or pass fewer pictures"
            )

    def _check_pictures(self, ids: torch.Tensor, pictures: list[int]) -> None:
        """Not every processor notices that a chat template left a picture out."""
        # Whether a row holds image tokens at all, not how many: their number is the processor's to
        # know.
        wanted = torch.tensor(_image_ids(self.model), dtype=ids.dtype)
        found = torch.isin(ids, wanted).any(1).tolist()
        for row, count in enumerate(pictures):
            if len(wanted) and found[row] != (count > 0):
                raise InputError(
                    f"row {row} has {count} picture(s) but {'some' if found[row] else 'no'} image"
                    f" tokens: the chat template of {self.name} puts them elsewhere; repair it, or"
                    " write the placeholder into the prompt"
                )


def _given(rows: Sequence[Sequence[Image.Image | Frames]], as_videos: bool) -> dict[str, Any]:
    """Pictures and videos as a processor takes them.

    Args:
        rows: what each prompt shows.
        as_videos: whether the processor has a video part; to others frames are pictures.
    """
    pictures: list[list[Image.Image]] = []
    videos: list[Frames] = []
    for row in rows:
        pictures.append([])
        for one in row:
            if not isinstance(one, Frames):
                pictures[-1].append(one)
            elif as_videos:
                videos.append(one)
            else:
                pictures[-1] += one.images
    # Most processors accept one list per row; a row without pictures is only understood in the
    # flat form.
    nested: Any = pictures if all(pictures) else [image for row in pictures for image in row]
    given: dict[str, Any] = {"images": nested or None}
    if videos:
        given["videos"] = [one.pixels for one in videos]
        given["video_metadata"] = [
            VideoMetadata(
                total_num_frames=one.total,
                fps=one.fps,
                width=one.size[0],
                height=one.size[1],
                duration=one.total / one.fps,
                frames_indices=list(one.indices),
            )
            for one in videos
        ]
    return {name: value for name, value in given.items() if name == "images" or value}


def _image_ids(model: PreTrainedModel) -> list[int]:
    try:
        return list(describe(model).image_token_ids)
    # It still loads and answers; recording it will say why it cannot be recorded.
    except UnsupportedModelError:
        return []


def load_model(
    name_or_path: str | Path = EMBEDDED,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    allow_download: bool = False,
) -> VLM:
    """Load a vision-language model for inference.

    Args:
        name_or_path: "scenes" (the embedded model), a folder written by `save_pretrained`, or a hub
            id.
        dtype: "float32", "bfloat16", "float16", "auto" (the checkpoint's own) or a torch type; None
            means float32 on a CPU and "auto" elsewhere.
        device: torch device; None takes CUDA where there is one, else the CPU.
        attn_implementation: transformers' attention backend: "sdpa", "eager", "flash_attention_2",
            ...
        allow_download: whether a hub id may be fetched; otherwise it must be in the local cache
            already.

    Raises:
        InputError: unknown model, text-only model, folder without processor, weights that are
            damaged, incomplete or not safetensors, models that need code from their repository,
            backends that are not available.
    """
    checkpoint = locate(str(name_or_path), allow_download=allow_download)
    device = _device(device)
    chosen = _dtype(dtype, device)
    # Cheap checks first: the weights are read only if config and processor can be used.
    config = read_config(checkpoint)
    processor = read_processor(checkpoint, config)
    model = read_weights(checkpoint, config, dtype=chosen, attn_implementation=attn_implementation)
    model = model.to(device).eval()
    return VLM(
        checkpoint.name,
        model,
        processor,
        checkpoint.path,
        checkpoint.revision(model),
        describe_model(model),
    )


def _device(device: str | torch.device | None) -> torch.device:
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with blamed_on_input(f"no device {str(name)!r} here", ": use 'cpu' or leave it out"):
        # A device that is named but cannot be used raises here, not in the middle of moving
        # weights.
        found = torch.ones(1, device=name).device
        if found.type == "meta":
            raise ValueError("it holds no numbers")
        return found


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> str | torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: possible are {', '.join(DTYPES)} and auto")
    return getattr(torch, dtype)


_GREEDY: Mapping[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "prompt_lookup_num_tokens": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "use_cache": True,
    "return_dict_in_generate": False,
}


def greedy(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `model.generate` for greedy answers, one row a question, with a cache.

    They hold whatever the model's generation_config.json says (beams, samples, no cache).

    Penalties, token limits and suppressed tokens of that file stay: they belong to the model.
    """
    # Settings that this version of transformers no longer has would be refused by `generate`.
    return {
        name: value for name, value in _GREEDY.items() if hasattr(model.generation_config, name)
    }


def end_tokens(model: nn.Module) -> tuple[int, ...]:
    """Ids that end an answer; none if the model never stops by itself."""
    value = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)
