"""What the generic shrinker and the generic prompt cannot know about single model types.

One `Entry` per type that needs one: configuration fields that hold its tiny model together (rotary
sections that sum to half a head, expert counts, layer lists), and where the pixels come from when
transformers has no Pillow image processor of that type. A type without an entry is served by its
defaults; most are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from avl_analysis.conformance import random_pixels as px
from avl_analysis.conformance.shrink import DROP, HEAD, PATCH, SIDE, VOCABULARY, WIDTH
from avl_analysis.conformance.tower import toy_tower

# Below the ids that text is drawn from (128 and up), so that no text token is taken for a picture.
IMAGE_ID = 90
"""Image token id given to families whose default configuration names none."""


@dataclass(frozen=True)
class Entry:
    """Help for one model type.

    Attributes:
        override: dotted configuration fields and their values, applied after shrinking.
        processor: model type whose image processor serves this one; None means its own.
        options: arguments of the image processor beyond those read off the configuration.
        pixels: random pixel inputs instead of a processor's.
        tokens: number of image tokens, where the model cannot be asked for it.
        shown: the ids that stand for a picture, where other tokens come between image tokens.
        along: dimension along which the pixels of several prompts are laid one after another.
        prefix: whether the whole prompt is seen by all its tokens, which `token_type_ids` 0 then
            stands for (elsewhere they mark image tokens with 1).
        reach: pixels that resampling spreads a change of the picture over.
        ignores_padding: False where padding takes part in choosing blocks of keys, so that
            backends, which fill padding differently, choose differently (MiniMax M3; its modeling
            file says so).
    """

    override: Mapping[str, Any] = field(default_factory=dict)
    processor: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    pixels: px.Pixels | None = None
    tokens: Callable[[Any, Mapping[str, Any]], int] | None = None
    shown: Callable[[Any, Mapping[str, Any], int], list[int]] | None = None
    along: int = 0
    prefix: bool = False
    reach: float = 3.0
    ignores_padding: bool = True


def _thirds(text: str = "text_config", **more: Any) -> dict[str, Any]:
    """Rotary parameters whose three sections fit half of a small head."""
    return {
        f"{text}.rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            # Rotary pairs for time, height and width: 8 together, half of `HEAD`.
            "mrope_section": [2, 3, 3],
            **more,
        }
    }


# Replaces the nested configuration as a whole; "model_type" says which class is made of it.
_GEMMA4_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": HEAD,
    "pooling_kernel_size": 2,
    "patch_size": PATCH,
    "position_embedding_size": 64,
}
# A SAM encoder of two layers: the first attends within windows of 2 x 2 patches, the second
# globally. 64 pixels are 16 patches a side.
_SAM = {
    "output_channels": 16,
    "window_size": 2,
    "global_attn_indexes": [1],
    "mlp_dim": WIDTH,
    "image_size": 64,
}
_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
# The default inserts the vision merger behind layer 6, which a tower of two layers does not have.
_MINICPM = {
    "image_token_id": IMAGE_ID,
    "video_token_id": IMAGE_ID + 1,
    "insert_layer_id": 0,
    "vision_config.insert_layer_id": 0,
}


_CONVOLUTIONS = {
    "model_type": "convnext",
    "num_stages": 2,
    "hidden_sizes": [16, WIDTH],
    "depths": [1, 1],
    "patch_size": PATCH,
    "hidden_size": WIDTH,
}
# Pictures are cut into tiles of `SIDE` pixels, two along the longest edge. `px.marked_tiles` reads
# the rows and columns that the processor returns on request.
_SPLIT = {
    "size": {"longest_edge": 2 * SIDE},
    "max_image_size": {"longest_edge": SIDE},
    "return_row_col_info": True,
}
_SOFT = {"patch_size": PATCH, "pooling_kernel_size": 2, "max_soft_tokens": 70}
# Height and width a picture may be resized to before it is cut into tiles of `SIDE`: 1 x 2, 2 x 1
# and 2 x 2 tiles.
_PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
_VQ = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "latent_channels": 32,
    "embed_dim": 32,
}
_ROPES = {
    kind: {"rope_type": "default", "rope_theta": 1e4}
    for kind in ("full_attention", "sliding_attention")
}

ENTRIES: dict[str, Entry] = {
    "aria": Entry(
        # The 6 x 6 patches of a picture of `SIDE` pixels become 9 image tokens.
        {"projector_patch_to_query_dict": {36: 9}, "max_value_projector_patch_to_query_dict": 9},
        pixels=px.square,
    ),
    "blip-2": Entry({"image_token_index": IMAGE_ID, "num_query_tokens": 8}),
    "chameleon": Entry(
        {
            "vq_config.num_embeddings": 32,
            "vq_config.resolution": SIDE,
            **{f"vq_config.{k}": v for k, v in _VQ.items()},
            # A name for each of the 32 codes of the quantizer. transformers reads the letters
            # between IMGIMG and Z as decimal digits (A is 0), so names run from AA, AB, ... to CJ
            # (29) and DA, DB (30, 31).
            "vocabulary_map": {
                "<image>": IMAGE_ID,
                **{
                    f"IMGIMG{c}{d}Z": 91 + 10 * i + j
                    for i, c in enumerate("ABC")
                    for j, d in enumerate("ABCDEFGHIJ")
                },
                "IMGIMGDAZ": 121,
                "IMGIMGDBZ": 122,
            },
        },
    ),
    "cohere2_vision": Entry(pixels=px.square),
    "cohere_compass": Entry(
        {
            "text_config.layer_types": ["sliding_attention", "full_attention"],
            "text_config.rope_parameters": {
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [2, 3, 3],
                },
                "full_attention": None,
            },
            "vision_config.deepstack_visual_indexes": [],
        },
        processor="qwen2_vl",
    ),
    "deepseek_ocr2": Entry(
        {
            "text_config.mlp_layer_types": ["dense", "sparse"],
            "text_config.num_experts_per_tok": 2,
            **{f"vision_config.sam_config.{k}": v for k, v in _SAM.items()},
            "vision_config.sam_config.downsample_channels": [32, WIDTH],
        },
        pixels=px.large_square,
    ),
    "deepseek_vl_hybrid": Entry(
        {**{f"high_res_vision_config.{k}": v for k, v in _SAM.items()}},
        options={
            "high_res_size": {"height": 64, "width": 64},
            "size": {"height": SIDE, "width": SIDE},
            "min_size": 4,
        },
    ),
    "diffusion_gemma": Entry(
        {
            "vision_config": _GEMMA4_VISION,
            "text_config.num_experts": 4,
            "text_config.top_k_experts": 2,
            "text_config.moe_intermediate_size": WIDTH,
        }
    ),
    "dots3_note": Entry(
        {
            "text_config.num_key_value_heads": 4,
            "text_config.layer_types": ["indexed_attention", "sliding_attention"],
            **{f"text_config.swa_{k}": 2 for k in ("num_attention_heads", "num_key_value_heads")},
            **{
                f"text_config.swa_{k}": HEAD
                for k in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
            },
            "text_config.swa_head_dim": 24,
            "text_config.qk_rope_head_dim": 8,
            "text_config.head_dim": 24,
            "text_config.rope_parameters": DROP,
            "text_config.sliding_window": 8,
            "text_config.index_topk": 8,
            "vision_config.adapter_in_dim": WIDTH,
            "vision_config.adapter_out_dim": WIDTH,
            "audio_config.adapter_input_size": WIDTH,
            "audio_config.adapter_out_dim": WIDTH,
        },
        pixels=px.patches(frames=1),
    ),
    "ernie4_5_vl_moe": Entry(
        {**_thirds(mrope_section=[3, 3, 2]), "text_config.moe_intermediate_size": [32, 32]},
        pixels=px.patches(frames=1),
    ),
    "emu3": Entry(
        {
            "vq_config.codebook_size": 16,
            "vq_config.base_channels": WIDTH,
            "vq_config.num_res_blocks": 1,
            "vq_config.embed_dim": 4,
            "vq_config.channel_multiplier": [1, 1],
            "vq_config.attn_resolutions": [1],
            "image_token_id": IMAGE_ID,
            "vocabulary_map": {
                "<image>": IMAGE_ID,
                # The token at the end of a line; then one token for each of the 16 codes.
                "<|extra_200|>": 91,
                **{f"<|visual token {i:06d}|>": 92 + i for i in range(16)},
            },
        },
        pixels=px.emu,
    ),
    "fast_vlm": Entry({"vision_config": _CONVOLUTIONS}, processor="llava"),
    "fuyu": Entry({"text_config.num_attention_heads": 4}, pixels=px.fuyu),
    # 6 x 6 patches pooled to 3 x 3.
    "gemma3": Entry({"mm_tokens_per_image": 9}),
    "gemma3n": Entry(
        {
            "text_config.num_hidden_layers": 4,
            "text_config.layer_types": [
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
            # The last two layers read the keys of an earlier layer of their own kind, so both kinds
            # must stand among the first two.
            "text_config.num_kv_shared_layers": 2,
            "text_config.intermediate_size": WIDTH,
            "text_config.activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "text_config.laurel_rank": 8,
            "vision_config": toy_tower(),
            "audio_config.vocab_size": 8,
            # Ids of text, vision (16 of them, see `toy_tower`) and audio follow one another without
            # overlap.
            "audio_config.vocab_offset": VOCABULARY + 16,
            "vision_soft_tokens_per_image": (SIDE // PATCH) ** 2,
        },
        pixels=px.square,
    ),
    "gemma4": Entry({"vision_config": _GEMMA4_VISION}, options=_SOFT),
    "gemma4_unified": Entry(
        {
            "vision_config": {
                "model_type": "gemma4_unified_vision",
                "patch_size": PATCH,
                "pooling_kernel_size": 2,
                "mm_embed_dim": WIDTH,
                "mm_posemb_size": 64,
                "output_proj_dims": WIDTH,
            },
        },
        pixels=px.positions,
    ),
    "glm4v": Entry(_thirds()),
    "glm4v_moe": Entry(_thirds(partial_rotary_factor=1.0), processor="glm4v"),
    "glm46v": Entry(_thirds()),
    "glmga": Entry(_thirds()),
    "glm_ocr": Entry(_thirds(), processor="glm46v"),
    # 3 x 3 convolutions.
    "got_ocr2": Entry({f"vision_config.{k}": v for k, v in _SAM.items()}, reach=20.0),
    "pp_chart2table": Entry({f"vision_config.{k}": v for k, v in _SAM.items()}, reach=20.0),
    "granite4_vision": Entry(
        {
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-1, 0]],
            "spatial_target_layers": [0, 0, 1, 1],
            "image_grid_pinpoints": _PINPOINTS,
        }
    ),
    "hunyuan_vl": Entry({"text_config.head_dim": HEAD, **_thirds()}),
    "granite_docling": Entry({"vision_config.image_size": 32}),
    "idefics2": Entry(
        {"perceiver_config.num_key_value_heads": 2, "text_config.sliding_window": None}
    ),
    "idefics3": Entry(options=_SPLIT, shown=px.marked_tiles, reach=5.0),  # resized twice
    "smolvlm": Entry(options=_SPLIT, shown=px.marked_tiles, reach=5.0),
    "inkling_mm_model": Entry({"vision_config.num_hidden_layers": 3}, pixels=px.inkling),
    "inkling2": Entry({}, pixels=px.inkling2),
    "instructblip": Entry(
        {"image_token_index": IMAGE_ID, "num_query_tokens": 8}, pixels=px.qformer
    ),
    "instructblipvideo": Entry(
        {"video_token_index": IMAGE_ID, "num_query_tokens": 8},
        pixels=px.frames,
        # `px.frames` shows four frames.
        tokens=lambda c, _: 4 * c.num_query_tokens,
    ),
    "internvl": Entry(options={"crop_to_patches": True}),
    "qianfan_ocr": Entry(options={"crop_to_patches": True}),
    "janus": Entry({f"vq_config.{k}": v for k, v in _VQ.items()}),
    "kimi_k25": Entry(pixels=px.patch_images),
    "lfm2_vl": Entry(
        {"text_config.full_attn_idxs": DROP, "text_config.layer_types": ["conv", "full_attention"]},
        pixels=px.naflex,
    ),
    "llama4": Entry(
        {
            "text_config.moe_layers": DROP,
            "vision_config.projector_input_dim": WIDTH,
            "vision_config.projector_output_dim": WIDTH,
            "vision_config.vision_output_dim": WIDTH,
            "vision_config.intermediate_size": 4 * WIDTH,
            # Despite the name, 1 means with rotary embedding and 0 without.
            "text_config.no_rope_layers": [1, 0],
            "text_config.attention_chunk_size": 8,
        },
        pixels=px.square,
    ),
    "llava_next": Entry({"image_grid_pinpoints": _PINPOINTS}),
    "llava_next_video": Entry({"image_grid_pinpoints": _PINPOINTS}),
    "llava_onevision": Entry({"image_grid_pinpoints": _PINPOINTS}),
    "lighton_ocr": Entry({"vision_config.image_size": 48}, shown=px.broken_rows),
    "mistral3": Entry({"vision_config.image_size": 48}, shown=px.broken_rows),
    # Pixels are one strip of patches, (1, channels, patch, width): several pictures are joined
    # along its width, dimension 3.
    "minicpm_ocr": Entry(_MINICPM, pixels=px.minicpm, along=3),
    "minicpmv4_6": Entry(_MINICPM, pixels=px.minicpm, along=3),
    "minicpmv4_7": Entry(_MINICPM, pixels=px.minicpm, along=3),
    "minimax_m3_vl": Entry(
        {
            "text_config.layer_types": ["full_attention", "minimax_m3_sparse"],
            "text_config.index_block_size": 4,
            "text_config.index_topk_blocks": 2,
        },
        pixels=px.patches(),
        ignores_padding=False,
    ),
    "mistral_large4": Entry(
        {
            "text_config.num_hidden_layers": 3,
            # Index of the layer whose keys each layer reads: the second reads those of the first.
            "text_config.kv_source_layers": [0, 0, 2],
            "text_config.no_rope_layers": [1, 1, 0],
            "text_config.index_topk": 8,
            "vision_config.image_size": 48,
        },
        shown=px.broken_rows,
    ),
    "mllama": Entry({"text_config.cross_attention_layers": [1]}),
    "molmo2": Entry(
        {
            "adapter_config.vision_feature_layer": [-1, 0],
            "text_config.rope_scaling_layers": DROP,
            "adapter_config.text_hidden_size": WIDTH,
            "vision_config.num_position_embeddings": 36,
            "vision_config.image_size": [SIDE, SIDE],
        },
        pixels=px.molmo,
    ),
    "muse_glimmer": Entry(
        {"text_config.layer_rope_theta": [1e4, 0], "out_hidden_size": 4 * WIDTH},
        pixels=px.patches(),
    ),
    "muse_spark": Entry(
        {
            "text_config.layer_rope_theta": [1e4, 0],
            "out_hidden_size": 4 * WIDTH,
            "audio_config.num_hidden_layers": 2,
            "audio_config.patch_sizes": [4, 2],
            "audio_config.hidden_sizes": [16, 16],
            "audio_config.depths": [1, 1],
            "text_config.moe_hidden_size": WIDTH,
        },
        pixels=px.patches(),
    ),
    "nemotron_h_omni": Entry(
        {
            "image_token_id": IMAGE_ID,
            "video_token_id": IMAGE_ID + 1,
            "vision_config.max_img_size": 64,
            "text_config.mamba_num_heads": 4,
            "text_config.mamba_head_dim": HEAD,
            "text_config.n_groups": 2,
            "text_config.ssm_state_size": 16,
            "vision_config.patch_dim": DROP,
            "vision_config.video_patch_dim": DROP,
        },
        pixels=px.radio,
    ),
    "paddleocr_vl": Entry(_thirds()),
    "paligemma": Entry(prefix=True),
    "perception_lm": Entry(
        {
            "vision_config": {**_CLIP, "model_args": {"embed_dim": WIDTH}},
            "vision_use_cls_token": True,
        },
        pixels=px.tiles,
    ),
    "qwen2_vl": Entry(_thirds()),
    "qwen2_5_vl": Entry(_thirds()),
    "qwen2_5_omni_thinker": Entry(
        {**_thirds(), "vision_start_token_id": 60, "vision_end_token_id": 61},
        processor="qwen2_vl",
    ),
    "qwen3_omni_moe_thinker": Entry(
        {**_thirds(), "vision_start_token_id": 60, "vision_end_token_id": 61},
        processor="qwen2_vl",
    ),
    "qwen3_vl_moe": Entry(processor="qwen2_vl"),
    "qwen4_exp": Entry(
        {
            "text_config.indexer_n_heads": 2,
            "text_config.indexer_kv_heads": 1,
            "text_config.indexer_head_dim": HEAD,
            "text_config.indexer_budget": 8,
            "text_config.indexer_compress_ratio": 2,
            "text_config.hc_lowrank": 8,
            "text_config.ple_embed_dim": 32,
            "text_config.ngram_vocab_size_base": 64,
            "text_config.output_gate_type": "silu",
        },
    ),
    "shieldgemma2": Entry({"mm_tokens_per_image": 9}),
    "step3p7": Entry(
        {
            "text_config.layer_types": ["full_attention", "sliding_attention"],
            "text_config.sliding_window": 8,
            "text_config.rope_parameters": _ROPES,
            "text_config.num_sliding_attention_heads": 4,
        },
        pixels=px.square,
    ),
    "unlimited_ocr": Entry(
        {
            **{f"vision_config.sam_config.{k}": v for k, v in _SAM.items()},
            "vision_config.sam_config.downsample_channels": [32, WIDTH],
        },
        pixels=px.large_square,
    ),
    # The default names layers that a tower of two does not have.
    "vipllava": Entry({"vision_feature_layer": [-1, -2]}),
}


def entry(model_type: str) -> Entry:
    """The help for a model type; one without content where none is needed."""
    return ENTRIES.get(model_type, Entry())
