"""Words of the larger model: content words in two or three pieces, and a system text of about 32 tokens.

The tokenizer differs from that of the small model in one respect. Words that answers are made of (colours, shapes,
places, numbers) are cut into pieces, as a sub-word tokenizer of a large model cuts rare words, so that an answer stays
with one object for several tokens. Questions, special tokens and the chat template are the same.
"""

from __future__ import annotations

import string
from functools import lru_cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from avl_analysis.scenes import language as small
from avl_analysis.scenes.drawing import COLOURS, SHAPES, SIDE
from avl_analysis.scenes.language import ASSISTANT, BOS, EOS, IMAGE, PAD, SPECIAL, UNK, USER
from avl_analysis.scenes.questions import NUMBERS, vocabulary
from avl_analysis.scenes.world import COLUMNS, ROWS, SIZES

PATCH = 6
"""Side of one image token's patch in pixels: 16x16 = 256 image tokens of the 96x96 pictures."""
GRID = SIDE // PATCH
IMAGE_TOKENS = GRID * GRID
SYSTEM = (
    "You are a careful assistant. Look at the picture, find the object or the text you are asked about, "
    "and answer with as few words as the question needs."
)
CONTENT = (*COLOURS, *SHAPES, *SIZES, *ROWS, *COLUMNS, *NUMBERS, "nothing")


def pieces_of(word: str) -> tuple[str, ...]:
    """A content word cut into pieces of about three letters; short words stay whole."""
    count = 1 if len(word) <= 3 else 2 if len(word) <= 6 else 3
    step = -(-len(word) // count)
    return tuple(word[at : at + step] for at in range(0, len(word), step))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, made from the vocabulary alone (nothing is fitted to data)."""
    system = SYSTEM.translate(str.maketrans("", "", ".,")).split()
    whole = dict.fromkeys(word for word in [*vocabulary(), *system] if word not in CONTENT)
    cut = dict.fromkeys(
        f"▁{piece}" if n == 0 else piece
        for word in CONTENT
        for n, piece in enumerate(pieces_of(word))
    )
    characters = string.ascii_letters + string.digits + string.punctuation
    pieces = dict.fromkeys(SPECIAL, 0.0)
    pieces |= {f"▁{word}": -1.0 for word in whole} | dict.fromkeys(cut, -1.0)
    pieces |= {"▁": -10.0} | dict.fromkeys(characters, -10.0)
    backend = Tokenizer(
        models.Unigram(list(pieces.items()), unk_id=SPECIAL.index(UNK), byte_fallback=False)
    )
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


def build_processor() -> LlavaProcessor:
    """Tokenizer, picture processor and chat template as one ``LlavaProcessor``."""
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
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=small.CHAT_TEMPLATE.replace(small.SYSTEM, SYSTEM),
    )


TOKENIZER = build_tokenizer()
BOS_ID, EOS_ID, USER_ID, ASSISTANT_ID, IMAGE_ID, PAD_ID = (
    TOKENIZER.convert_tokens_to_ids(token) for token in (BOS, EOS, USER, ASSISTANT, IMAGE, PAD)
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
