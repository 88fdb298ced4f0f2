"""The embedded model's words: its tokenizer, chat template and picture processor.

About two hundred pieces: every word of the questions and answers as a whole, every printable ASCII
character on its own as the fallback, so that any typed text survives encoding and decoding and
random strings in pictures become single characters. Plurals are spelled (``circle`` + ``s``), which
lets singular and plural share a vector.

The processor is transformers' own ``LlavaProcessor`` around the PIL image processor, forced so that
results do not depend on whether torchvision is installed; its pixel values are exactly the training
tensors.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from avl_analysis.scenes.drawing import GRID, PATCH, SIDE
from avl_analysis.scenes.questions import vocabulary

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>")
PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = SPECIAL
SYSTEM = "Answer from the picture."
"""The text before every picture, unless a conversation brings its own system message."""
IMAGE_TOKENS = GRID * GRID

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system, turns ="
    " messages[0]['content'], messages[1:] %}{% else %}{% set system, turns = '"
    + SYSTEM
    + "', messages %}{% endif %}{% if system is string %}{{ system }}{% else %}{% for part in"
    " system %}{{ part['text'] }}{% endfor %}{% endif %}{% for message in turns %}{{ '"
    + USER
    + "' if message['role'] == 'user' else '"
    + ASSISTANT
    + "' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '"
    + IMAGE
    + "' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def build_tokenizer(words: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer, made from a vocabulary alone (nothing is fitted to data).

    Args:
        words: pieces beside the special tokens and single characters, in the order of their ids;
            "▁" marks the beginning of a word. None for the small model's whole words.
    """
    if words is None:
        words = (f"▁{word}" for word in [*vocabulary(), "Answer", "answer", "from"])
    characters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    # The likelier split wins: one word at -1 beats its characters at -10 each, so characters are
    # used only where no longer piece fits.
    scores = dict.fromkeys(SPECIAL, 0.0) | dict.fromkeys(words, -1.0)
    pieces = list((scores | dict.fromkeys(characters, -10.0)).items())
    backend = Tokenizer(models.Unigram(pieces, unk_id=SPECIAL.index(UNK), byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        extra_special_tokens={
            "image_token": IMAGE,
            "user_token": USER,
            "assistant_token": ASSISTANT,
        },
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_processor(
    tokenizer: PreTrainedTokenizerFast | None = None, patch: int = PATCH, system: str = SYSTEM
) -> LlavaProcessor:
    """Tokenizer, picture processor and chat template as one ``LlavaProcessor``.

    Args:
        tokenizer: None for the small model's.
        patch: side of one image token's patch in pixels, a divisor of the picture's side.
        system: the text before every picture, unless a conversation brings its own.
    """
    pictures = CLIPImageProcessorPil(
        do_resize=True,
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        do_rescale=True,
        do_normalize=True,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer or build_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE.replace(SYSTEM, system),
    )


def load_processor(folder: Path | str) -> LlavaProcessor:
    """The processor saved in ``folder``, with the PIL image processor.

    Whatever else is installed.
    """
    return LlavaProcessor.from_pretrained(folder, backend="pil")


def pixel_values(images: NDArray[np.uint8]) -> torch.Tensor:
    """Training tensors of uint8 pictures (n, 96, 96, 3): float32 (n, 3, 96, 96) in [-1, 1]."""
    scaled = (images.transpose(0, 3, 1, 2) * (1 / 255)).astype(
        np.float32
    )  # in double first, as the processor does
    return torch.from_numpy((scaled - np.float32(0.5)) / np.float32(0.5))


def conversation(prompt: str, image: bool = True) -> list[dict[str, object]]:
    """One user turn in the form chat templates take, the picture first."""
    content = [{"type": "text", "text": prompt}]
    return [{"role": "user", "content": [{"type": "image"}, *content] if image else content}]
