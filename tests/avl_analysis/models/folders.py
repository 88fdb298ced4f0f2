"""Tiny folders of real families: configuration, weights, tokenizer and processor settings as
`save_pretrained` lays them out, with random weights.

The processors of these families cannot be made without torchvision, so their settings are written
by hand; image processors and tokenizers are saved by transformers itself.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from avl_analysis.conformance.build import Case, quiet
from avl_analysis.conformance.inputs import image_processor
from avl_analysis.conformance.shrink import VOCABULARY

_TEMPLATE = (
    "{{% for message in messages %}}{{{{ message['role'] }}}}:"
    "{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image}{{% elif part['type'] == 'video' %}}{video}"
    "{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{{% endfor %}}\n{{% endfor %}}{{% if add_generation_prompt %}}assistant:{{% endif %}}"
)


@dataclass(frozen=True)
class Kind:
    """How a family's folder differs from the others.

    Attributes:
        processor: class named in processor_config.json.
        image: what the chat template writes for a picture.
        tokens: special tokens by the configuration field that holds their id, or by the id itself.
        named: attributes of the tokenizer that hold special tokens.
        settings: arguments of the processor.
        options: arguments of the image processor.
        video: what the chat template writes for a video.
        frames: settings of the video part.
    """

    processor: str
    image: str
    tokens: Mapping[str | int, str]
    named: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    video: str = "<video>"
    frames: Mapping[str, Any] = field(default_factory=dict)


_SQUARE = {"size": {"height": 24, "width": 24}}
_QWEN = {
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
    "frames": {"size": {"shortest_edge": 48 * 48, "longest_edge": 72 * 72}, "patch_size": 4},
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "tokens": {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
}
KINDS = {
    "qwen2_vl": Kind("Qwen2VLProcessor", **_QWEN),
    "qwen2_5_vl": Kind("Qwen2_5_VLProcessor", **_QWEN),
    "qwen3_vl": Kind(
        "Qwen3VLProcessor",
        **_QWEN
        | {"frames": {"size": {"shortest_edge": 9216, "longest_edge": 20736}, "patch_size": 4}},
    ),
    "internvl": Kind(
        "InternVLProcessor",
        "<IMG_CONTEXT>",
        {"image_token_id": "<IMG_CONTEXT>", 30: "<img>", 31: "</img>", 32: "<video>"},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        {"image_seq_length": 9},
        {"min_patches": 1, "max_patches": 6, "crop_to_patches": True},
        frames=_SQUARE,
    ),
    "smolvlm": Kind(
        "SmolVLMProcessor",
        "<image>",
        {
            "image_token_id": "<image>",
            30: "<fake_token_around_image>",
            31: "<global-img>",
            32: "<end_of_utterance>",
            33: "<video>",
            **{34 + 6 * r + c: f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6)},
        },
        settings={"image_seq_len": 9},
        options={"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}},
        frames={"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}},
    ),
    "llava_next": Kind(
        "LlavaNextProcessor",
        "<image>",
        {"image_token_index": "<image>"},
        settings={
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "llava_next_video": Kind(
        "LlavaNextVideoProcessor",
        "<image>",
        {"image_token_index": "<image>", "video_token_index": "<video>"},
        settings={
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        frames={"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
    ),
    "llava_onevision": Kind(
        "LlavaOnevisionProcessor",
        "<image>",
        {"image_token_index": "<image>", "video_token_index": "<video>"},
        settings={"num_image_tokens": 36, "vision_feature_select_strategy": "full"},
        frames=_SQUARE,
    ),
    "mistral3": Kind("PixtralProcessor", "[IMG]", {"image_token_index": "[IMG]"}),
}


@contextmanager
def skipped_without_processor() -> Iterator[None]:
    """Skip the test where an older transformers cannot make an image processor without torchvision,
    which some of its Pillow processors ask for themselves.
    """
    try:
        yield
    except LookupError as missing:
        if Version(transformers.__version__) >= Version("5.23"):
            raise
        pytest.skip(str(missing))


def save_folder(path: Path, model_type: str, *, video: bool = True) -> Path:
    """Write a tiny model of a family with its processor's settings.

    Args:
        path: folder, made if it is not there.
        model_type: one of `KINDS`.
        video: whether the settings have a video part; families without one ignore it.
    """
    kind, case = KINDS[model_type], Case(model_type)
    with skipped_without_processor():
        made = image_processor(model_type, case.config, kind.options)
    with quiet():
        case.model.save_pretrained(path)
    tokens = {
        getattr(case.config, key) if isinstance(key, str) else key: token
        for key, token in kind.tokens.items()
    }
    tokenizer(tokens, kind.named).save_pretrained(path)
    image = {**made.to_dict(), "image_processor_type": type(made).__name__.removesuffix("Pil")}
    settings = {"processor_class": kind.processor, **kind.settings, "image_processor": image}
    if video:
        name = kind.processor.replace("2_5", "2").replace("Processor", "VideoProcessor")
        settings["video_processor"] = {"video_processor_type": name, **kind.frames}
    (path / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    template = _TEMPLATE.format(image=kind.image, video=kind.video)
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path


def tokenizer(tokens: Mapping[int, str], named: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """Characters as tokens, with special tokens at given ids."""
    known = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", **tokens}
    characters = iter(["▁", *string.ascii_letters, *string.digits, *":.,?!'\"-()<>[]\n"])
    pieces = [
        known.get(index) or next(characters, f"<unused{index}>") for index in range(VOCABULARY)
    ]
    core = Tokenizer(Unigram([(piece, -1.0) for piece in pieces], unk_id=3))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        additional_special_tokens=list(tokens.values()),
        extra_special_tokens=dict(named),
    )
