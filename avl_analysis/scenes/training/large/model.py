"""The larger model's configuration."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from avl_analysis.scenes.drawing import SIDE
from avl_analysis.scenes.training.large.language import (
    BOS_ID,
    EOS_ID,
    IMAGE_ID,
    IMAGE_TOKENS,
    PAD_ID,
    PATCH,
    TOKENIZER,
)


def config(
    width: int = 192, layers: int = 6, vision_width: int = 160, vision_layers: int = 4
) -> LlavaConfig:
    """The model's configuration; heads are 32 wide, two of them hold keys and values in the decoder."""
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_width // 32,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=vision_width,
    )
    text = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        image_seq_length=IMAGE_TOKENS,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def build_model(seed: int = 0, **sizes: int) -> LlavaForConditionalGeneration:
    """An untrained model, float32, its weights drawn from ``seed``."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config(**sizes))
    model.config._attn_implementation = "sdpa"
    return model
