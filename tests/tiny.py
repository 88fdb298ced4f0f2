"""Tiny random vision-language models, their processors and their inputs, built in code: no file, no
network.

The weights are random but *sharp* (initializer range 0.25 at the default width): with the usual
0.02 every softmax row is nearly uniform, and a wrong mask, a lost padding position or a swapped
head changes nothing a test can see.

    model = llava(kv_heads=4, heads=4, layers=2, hidden=64, grid=4, seed=0, attn="sdpa") A
        LlavaForConditionalGeneration in eval mode, fp32. kv_heads < heads gives grouped-query
        attention; `grid` x `grid` image tokens to a picture; `attn` is the attention implementation
        ("sdpa", "eager"). generate() never stops early and never emits a special token.
    batch = inputs(model, batch=[9, 5], images=1, system=3, between=0, seed=0) A dict for
        model(**batch) and generate(**batch). Row i = `system` tokens, then images[i] pictures with
        `between` text tokens between two of them, then batch[i] question tokens; shorter rows are
        padded on the left. `images` is one number for all rows or one per row; 0 means no picture
        (and no `pixel_values` when no row has one).
    processor(model, chat_template=True)
        A LlavaProcessor over a small Unigram tokenizer, with the same placeholders as `model`.
    save_folder(path, model=None, chat_template=True) -> path
        What from_pretrained reads: weights, config, tokenizer, processor.
    save_text_only(path) -> path
        A tiny Llama with its tokenizer: loads, but has no eyes.
    picture(size=(40, 30), seed=0)
        A PIL image with some structure in it.

Constants: PAD, BOS, EOS, UNK = 0, 1, 2, 3; IMAGE = 5; text ids are 6 ... VOCABULARY - 1.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS, UNK, IMAGE, VOCABULARY = 0, 1, 2, 3, 5, 128
PATCH = 6
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _text_config(*, heads: int, kv_heads: int, layers: int, hidden: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        initializer_range=2.0 / hidden**0.5,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def llava(
    kv_heads: int = 4,
    *,
    heads: int = 4,
    layers: int = 2,
    hidden: int = 64,
    grid: int = 4,
    seed: int = 0,
    attn: str = "sdpa",
) -> LlavaForConditionalGeneration:
    """A random LLaVA in float32; equal arguments give equal weights, and the caller's random state
    is left alone.
    """
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        image_size=grid * PATCH,
        patch_size=PATCH,
        projection_dim=32,
        initializer_range=0.3,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_text_config(heads=heads, kv_heads=kv_heads, layers=layers, hidden=hidden),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=grid * grid,
    )
    config._attn_implementation = attn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = list(range(IMAGE + 1))
    return model


def inputs(
    model: LlavaForConditionalGeneration,
    batch: Sequence[int] = (9,),
    images: int | Sequence[int] = 1,
    *,
    system: int = 3,
    between: int = 0,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of shape (rows, longest), left-padded, and `pixel_values`
    (pictures, 3, s, s).

    Random text never contains a special token; pictures follow one another in row order, as the
    model expects them.
    """
    counts = [images] * len(batch) if isinstance(images, int) else list(images)
    if len(counts) != len(batch):
        raise ValueError(f"{len(batch)} rows but {len(counts)} image counts")
    generator = torch.Generator().manual_seed(seed)
    placeholders = [IMAGE] * model.config.image_seq_length

    def text(length: int) -> list[int]:
        return torch.randint(IMAGE + 1, VOCABULARY, (length,), generator=generator).tolist()

    rows = []
    for question, count in zip(batch, counts, strict=True):
        row = [BOS, *text(system - 1)] if system else []
        for index in range(count):
            row += (text(between) if index else []) + placeholders
        rows.append(row + text(question))
    longest = max(map(len, rows))
    result = {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        ),
    }
    if sum(counts):
        size = model.config.vision_config.image_size
        result["pixel_values"] = torch.randn(sum(counts), 3, size, size, generator=generator)
    return result


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words where the list below has them, single characters otherwise; any printable ASCII
    text round-trips.
    """
    special = ["<pad>", "<s>", "</s>", "<unk>", "<sep>", "<image>"]
    words = [
        "what",
        "is",
        "the",
        "colour",
        "where",
        "describe",
        "image",
        "red",
        "blue",
        "picture",
        "USER",
        "ASSISTANT",
    ]
    pieces = [
        "▁",
        *(f"▁{word}" for word in words),
        *string.ascii_letters,
        *string.digits,
        *":.,?!'\"-()\n",
    ]
    pieces += [f"<unused{i}>" for i in range(VOCABULARY - len(special) - len(pieces))]
    vocabulary = [(piece, 0.0) for piece in special]
    vocabulary += [(piece, -1.0 if len(piece) > 2 else -4.0) for piece in pieces]
    core = Tokenizer(Unigram(vocabulary, unk_id=UNK))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def processor(
    model: LlavaForConditionalGeneration | None = None, *, chat_template: bool = True
) -> LlavaProcessor:
    """The processor whose placeholders match `model` (default: the default `llava()`)."""
    size = model.config.vision_config.image_size if model is not None else 4 * PATCH
    images = CLIPImageProcessorPil(
        size={"height": size, "width": size},
        crop_size={"height": size, "width": size},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        images,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE if chat_template else None,
    )


def save_folder(
    path: Path, model: LlavaForConditionalGeneration | None = None, *, chat_template: bool = True
) -> Path:
    """Write `model` (default: `llava()`) and its processor as `save_pretrained` does."""
    model = llava() if model is None else model
    model.save_pretrained(path)
    processor(model, chat_template=chat_template).save_pretrained(path)
    return path


def save_text_only(path: Path) -> Path:
    """Write a tiny Llama with its tokenizer: a valid model folder without any image part."""
    LlamaForCausalLM(_text_config(heads=4, kv_heads=4, layers=2, hidden=32)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def picture(size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    """An RGB image of `size` (width, height): a random gradient with one bright rectangle."""
    width, height = size
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, width)[None, :, None] + np.linspace(0, 1, height)[:, None, None]
    pixels = 100 * ramp * random.uniform(0.2, 1.0, 3)
    pixels[height // 4 : height // 2, width // 3 : 2 * width // 3] = random.uniform(100, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
