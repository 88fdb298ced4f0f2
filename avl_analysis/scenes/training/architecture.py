"""The embedded model's shape: a LLaVA of about 4 million parameters, built from configs.

A CLIP vision tower, a two-layer projector and a Llama decoder with grouped queries, all 192 wide.
Small, but each part is the stock transformers class, so whatever works on it works on its
seven-billion-parameter relatives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from avl_analysis.scenes.drawing import PATCH, SIDE
from avl_analysis.scenes.language import (
    BOS,
    EOS,
    IMAGE,
    PAD,
    build_processor,
    build_tokenizer,
)


def config(
    width: int = 192,
    vision_layers: int = 4,
    text_layers: int = 5,
    *,
    vision_width: int | None = None,
    patch: int = PATCH,
    theta: float = 1000.0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> LlavaConfig:
    """The model's configuration.

    Heads are 32 wide, two of them hold keys and values in the decoder.

    Args:
        width: of the decoder, a multiple of 32.
        vision_layers: layers of the vision tower.
        text_layers: layers of the decoder.
        vision_width: width of the vision tower, a multiple of 32; None for the decoder's.
        patch: side of one image token's patch in pixels, a divisor of the picture's side.
        theta: base of the rotary angles.
        tokenizer: whose ids and vocabulary size the decoder has; None for the small model's.
    """
    tokenizer = tokenizer or build_tokenizer()
    seen = vision_width or width
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (PAD, BOS, EOS, IMAGE)}
    vision = CLIPVisionConfig(
        hidden_size=seen,
        intermediate_size=4 * seen,
        num_hidden_layers=vision_layers,
        # Heads 32 wide, as in the decoder; `packed.HEAD` counts on it.
        num_attention_heads=seen // 32,
        image_size=SIDE,
        patch_size=patch,
        hidden_act="gelu",
        projection_dim=seen,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=text_layers,
        num_attention_heads=width // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=True,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids[IMAGE],
        image_seq_length=(SIDE // patch) ** 2,
        projector_hidden_act="gelu",
        # The output of the last layer without its class token ("default"), as `packed.vision`
        # computes it.
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def build_model(seed: int = 0, **settings: Any) -> LlavaForConditionalGeneration:
    """An untrained model, float32, its weights drawn from ``seed``.

    ``settings`` as of ``config``.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config(**settings))
    model.config._attn_implementation = "sdpa"
    return model


def export(
    model: LlavaForConditionalGeneration,
    folder: Path | str,
    processor: LlavaProcessor | None = None,
) -> None:
    """Write weights (float16), tokenizer and processor to ``folder``.

    In the layout of any hub model.

    Args:
        model: what to write; its weights stay as they are.
        folder: made if it does not exist.
        processor: None for the small model's.
    """
    # A second model, since `to` would turn the weights that are being trained into float16.
    half = LlavaForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    half = half.to(torch.float16)
    end, pad = model.config.text_config.eos_token_id, model.config.text_config.pad_token_id
    half.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=pad, max_new_tokens=96, do_sample=False
    )
    half.save_pretrained(folder)
    (processor or build_processor()).save_pretrained(folder)
