"""Words of the larger model: content words in two or three pieces, and a system text of 33 tokens.

The tokenizer differs from that of the small model in one respect. Words that answers are made of
(colours, shapes, places, numbers) are cut into pieces, as a sub-word tokenizer of a large model
cuts rare words, so that an answer stays with one object for several tokens. Special tokens and the
chat template are the same.
"""

from __future__ import annotations

from functools import lru_cache

from transformers import LlavaProcessor, PreTrainedTokenizerFast

from avl_analysis.scenes import language
from avl_analysis.scenes.drawing import COLOURS, SHAPES, SIDE
from avl_analysis.scenes.language import ASSISTANT, BOS, EOS, IMAGE, USER
from avl_analysis.scenes.questions import NUMBERS, vocabulary
from avl_analysis.scenes.world import COLUMNS, ROWS, SIZES

PATCH = 6
"""Side of one image token's patch in pixels: 16x16 = 256 image tokens of the 96x96 pictures."""
IMAGE_TOKENS = (SIDE // PATCH) ** 2
SYSTEM = (
    "You are a careful assistant. Look at the picture, find the object or the text you are asked"
    " about, and answer with as few words as the question needs."
)
CONTENT = (*COLOURS, *SHAPES, *SIZES, *ROWS, *COLUMNS, *NUMBERS, "nothing")
"""The words that are cut into pieces."""


def pieces_of(word: str) -> tuple[str, ...]:
    """A content word cut into pieces of about three letters; short words stay whole."""
    count = 1 if len(word) <= 3 else 2 if len(word) <= 6 else 3
    step = -(-len(word) // count)
    return tuple(word[at : at + step] for at in range(0, len(word), step))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The larger model's tokenizer."""
    system = SYSTEM.translate(str.maketrans("", "", ".,")).split()
    whole = [f"▁{word}" for word in [*vocabulary(), *system] if word not in CONTENT]
    cut = [
        piece if number else f"▁{piece}"
        for word in CONTENT
        for number, piece in enumerate(pieces_of(word))
    ]
    return language.build_tokenizer([*whole, *cut])


def build_processor() -> LlavaProcessor:
    """The larger model's processor."""
    return language.build_processor(build_tokenizer(), PATCH, SYSTEM)


TOKENIZER = build_tokenizer()
BOS_ID, EOS_ID, USER_ID, ASSISTANT_ID, IMAGE_ID = (
    TOKENIZER.convert_tokens_to_ids(token) for token in (BOS, EOS, USER, ASSISTANT, IMAGE)
)


@lru_cache(maxsize=100_000)
def _word(word: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(word, add_special_tokens=False).input_ids)


def encode(text: str) -> list[int]:
    """Token ids of a text; word by word, which the tokenizer's splitting at spaces makes exact."""
    return [i for word in text.split() for i in _word(word)]


OPENING = (BOS_ID, *encode(SYSTEM), USER_ID)
"""What every conversation begins with, up to and including the mark of the user's turn."""
PREFIX = len(OPENING) + IMAGE_TOKENS
"""Tokens up to and including the picture."""
