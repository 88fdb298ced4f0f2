"""What the generic shrinker and the generic prompt cannot know about single model types.

One `Entry` per type that needs one: configuration fields that hold its tiny model together (rotary sections that sum to
half a head, expert counts, layer lists), and where the pixels come from when transformers has no Pillow image processor
of that type. A type without an entry is served by its defaults; most are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from avl_analysis.conformance.tower import toy_tower

from avl_analysis.conformance.shrink import DROP, HEAD, PATCH, SIDE, VOCABULARY, WIDTH

Pixels = Callable[[Any], dict[str, Any]]
"""Random pixel inputs for a tiny configuration."""

IMAGE_ID = 90
"""Image token id given to families whose default configuration names none."""
BREAK, END, NEWLINE = 100, 101, 102
"""Ids of text tokens between image tokens: row break or view marker, end of a picture or view, line break."""


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
        prefix: whether the whole prompt is seen by all its tokens, which `token_type_ids` 0 then stands for (elsewhere they
            mark image tokens with 1).
        reach: pixels that resampling spreads a change of the picture over.
        ignores_padding: False where padding takes part in choosing blocks of keys, so that backends, which fill padding
            differently, choose differently (MiniMax M3; its modeling file says so).
    """

    override: Mapping[str, Any] = field(default_factory=dict)
    processor: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    pixels: Pixels | None = None
    tokens: Callable[[Any, Mapping[str, Any]], int] | None = None
    shown: Callable[[Any, Mapping[str, Any], int], list[int]] | None = None
    along: int = 0
    prefix: bool = False
    reach: float = 3.0
    ignores_padding: bool = True


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def square(config: Any) -> dict[str, Any]:
    """One square picture."""
    return {"pixel_values": _noise(1, 3, SIDE, SIDE)}


def patches(channels_last: int | None = None, rows: int = 4, columns: int = 6, frames: int = 2) -> Pixels:
    """Flattened patches of one picture and its grid, as the Qwen family takes them."""

    def make(config: Any) -> dict[str, Any]:
        width = channels_last or 3 * frames * PATCH * PATCH
        return {"pixel_values": _noise(rows * columns, width), "image_grid_thw": torch.tensor([[1, rows, columns]])}

    return make


def _patch_images(config: Any) -> dict[str, Any]:
    """Patches as small pictures (Kimi)."""
    return {"pixel_values": _noise(24, 3, PATCH, PATCH), "image_grid_thw": torch.tensor([[1, 4, 6]])}


def _naflex(config: Any) -> dict[str, Any]:
    """SigLIP 2 patches with their grid (LFM2-VL)."""
    return {
        "pixel_values": _noise(1, 24, 3 * PATCH * PATCH),
        "spatial_shapes": torch.tensor([[4, 6]]),
        "pixel_attention_mask": torch.ones(1, 24, dtype=torch.long),
    }


def _thirds(text: str = "text_config", **more: Any) -> dict[str, Any]:
    """Rotary parameters whose three sections fit half of a small head."""
    return {
        f"{text}.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], **more}
    }


_GEMMA4_VISION = {
    "model_type": "gemma4_vision", "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": HEAD, "pooling_kernel_size": 2, "patch_size": PATCH,
    "position_embedding_size": 64,
}  # fmt: skip
_SAM = {"output_channels": 16, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": WIDTH, "image_size": 64}
_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
_MINICPM = {
    "image_token_id": IMAGE_ID,
    "video_token_id": IMAGE_ID + 1,
    "insert_layer_id": 0,
    "vision_config.insert_layer_id": 0,
}


def _positions(config: Any) -> dict[str, Any]:
    """Merged patches of one picture with their coordinates (Gemma 4), unpadded."""
    vision = config.vision_config
    side = getattr(vision, "model_patch_size", vision.patch_size)
    where = torch.tensor([[x, y] for y in range(4) for x in range(6)])
    return {"pixel_values": _noise(1, 24, 3 * side * side).sigmoid(), "image_position_ids": where[None]}


def _minicpm(config: Any) -> dict[str, Any]:
    """A strip of patches of one picture, four rows of eight (MiniCPM-V)."""
    return {"pixel_values": _noise(1, 3, PATCH, 32 * PATCH), "target_sizes": torch.tensor([[4, 8]])}


def _molmo(config: Any) -> dict[str, Any]:
    """One low-resolution crop whose 6 x 6 patches are pooled two by two (Molmo 2)."""
    index = torch.arange(36).view(3, 2, 3, 2).permute(0, 2, 1, 3).reshape(9, 4)
    return {
        "pixel_values": _noise(1, 36, 3 * PATCH * PATCH),
        "image_token_pooling": index,
        "image_grids": torch.tensor([[3, 3, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    }


def _inkling(config: Any) -> dict[str, Any]:
    vision = config.vision_config
    return {"pixel_values": _noise(12, vision.temporal_patch_size, vision.patch_size, vision.patch_size, 3)}


def _inkling2(config: Any) -> dict[str, Any]:
    side = 2 * config.vision_config.patch_size
    return {"pixel_values": _noise(12, side, side, 3), "image_grid_thw": torch.tensor([[1, 3, 4]])}


def _radio(config: Any) -> dict[str, Any]:
    return {"pixel_values": _noise(24, 3 * PATCH * PATCH), "image_grid_hw": torch.tensor([[4, 6]])}


def _large_square(config: Any) -> dict[str, Any]:
    return {"pixel_values": _noise(1, 3, 64, 64)}


def _frames(config: Any) -> dict[str, Any]:
    ids = torch.tensor([[5, 6, 7]])
    return {
        "pixel_values": _noise(1, 4, 3, SIDE, SIDE),
        "qformer_input_ids": ids,
        "qformer_attention_mask": torch.ones_like(ids),
    }


def _qformer(config: Any) -> dict[str, Any]:
    ids = torch.tensor([[5, 6, 7]])
    return {**square(config), "qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def _fuyu(config: Any) -> dict[str, Any]:
    return {"pixel_values": _noise(1, 12, 3 * config.patch_size**2)}


def _emu(config: Any) -> dict[str, Any]:
    return {**square(config), "image_sizes": torch.tensor([[SIDE, SIDE]])}


def _tiles(config: Any) -> dict[str, Any]:
    """Two tiles of one picture."""
    return {"pixel_values": _noise(1, 2, 3, SIDE, SIDE)}


_CONVOLUTIONS = {
    "model_type": "convnext", "num_stages": 2, "hidden_sizes": [16, WIDTH], "depths": [1, 1], "patch_size": PATCH,
    "hidden_size": WIDTH,
}  # fmt: skip
def _broken_rows(config: Any, given: Mapping[str, Any], image: int) -> list[int]:
    """A break token after each row of merged patches, an end token after the last (Pixtral)."""
    cell = config.vision_config.patch_size * config.spatial_merge_size
    rows, columns = (int(n) // cell for n in given["image_sizes"][0])
    return ([*[image] * columns, BREAK] * rows)[:-1] + [END]


def _marked_tiles(config: Any, given: Mapping[str, Any], image: int) -> list[int]:
    """Every tile behind the token of its row and column, a line break after each row, the whole picture last (Idefics3)."""
    vision = config.vision_config
    view = [image] * (vision.image_size // vision.patch_size // config.scale_factor) ** 2
    rows, columns = int(given["rows"][0][0]), int(given["cols"][0][0])
    ids: list[int] = []
    for row in range(rows):
        ids += [i for column in range(columns) for i in (END, BREAK + 10 + 6 * row + column, *view)] + [NEWLINE]
    return [*ids, END, BREAK, *view, END]


_SPLIT = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}, "return_row_col_info": True}
_SOFT = {"patch_size": PATCH, "pooling_kernel_size": 2, "max_soft_tokens": 70}
_PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
_VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32, "embed_dim": 32}
_ROPES = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}

ENTRIES: dict[str, Entry] = {
    "aria": Entry({"projector_patch_to_query_dict": {36: 9}, "max_value_projector_patch_to_query_dict": 9}, pixels=square),
    "blip-2": Entry({"image_token_index": IMAGE_ID, "num_query_tokens": 8}),
    "chameleon": Entry(
        {
            "vq_config.num_embeddings": 32, "vq_config.resolution": SIDE, **{f"vq_config.{k}": v for k, v in _VQ.items()},
            "vocabulary_map": {"<image>": IMAGE_ID, **{f"IMGIMG{c}{d}Z": 91 + 10 * i + j
               for i, c in enumerate("ABC") for j, d in enumerate("ABCDEFGHIJ")}, "IMGIMGDAZ": 121, "IMGIMGDBZ": 122},
        },
    ),
    "cohere2_vision": Entry(pixels=square),
    "cohere_compass": Entry(
        {
            "text_config.layer_types": ["sliding_attention", "full_attention"],
            "text_config.rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
                "full_attention": None,
            },
            "vision_config.deepstack_visual_indexes": [],
        },
        processor="qwen2_vl",
    ),
    "deepseek_ocr2": Entry(
        {
            "text_config.mlp_layer_types": ["dense", "sparse"], "text_config.num_experts_per_tok": 2,
            **{f"vision_config.sam_config.{k}": v for k, v in _SAM.items()},
            "vision_config.sam_config.downsample_channels": [32, WIDTH],
        },
        pixels=_large_square,
    ),
    "deepseek_vl_hybrid": Entry(
        {**{f"high_res_vision_config.{k}": v for k, v in _SAM.items()}},
        options={"high_res_size": {"height": 64, "width": 64}, "size": {"height": SIDE, "width": SIDE}, "min_size": 4},
    ),
    "dots3_note": Entry(
        {
            "text_config.num_key_value_heads": 4, "text_config.layer_types": ["indexed_attention", "sliding_attention"],
            **{f"text_config.swa_{k}": 4 for k in ("num_attention_heads", "num_key_value_heads")},
            **{f"text_config.swa_{k}": HEAD for k in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")},
            "text_config.swa_head_dim": 24, "text_config.qk_rope_head_dim": 8, "text_config.head_dim": 24,
            "text_config.rope_parameters": DROP, "text_config.sliding_window": 8, "text_config.index_topk": 8,
            "vision_config.adapter_in_dim": WIDTH, "vision_config.adapter_out_dim": WIDTH,
            "audio_config.adapter_input_size": WIDTH, "audio_config.adapter_out_dim": WIDTH,
        },
        pixels=patches(frames=1),
    ),
    "ernie4_5_vl_moe": Entry(
        {**_thirds(mrope_section=[3, 3, 2]), "text_config.moe_intermediate_size": [32, 32]}, pixels=patches(frames=1)
    ),
    "emu3": Entry(
        {
            "vq_config.codebook_size": 16, "vq_config.base_channels": WIDTH, "vq_config.num_res_blocks": 1, "vq_config.embed_dim": 4,
            "vq_config.channel_multiplier": [1, 1], "vq_config.attn_resolutions": [1], "image_token_id": IMAGE_ID,
            "vocabulary_map": {"<image>": IMAGE_ID, "<|extra_200|>": 91,
                               **{f"<|visual token {i:06d}|>": 92 + i for i in range(16)}},
        },
        pixels=_emu,
    ),
    "fast_vlm": Entry({"vision_config": _CONVOLUTIONS}, processor="llava"),
    "fuyu": Entry({"text_config.num_attention_heads": 4}, pixels=_fuyu),
    "gemma3": Entry({"mm_tokens_per_image": 9}),
    "gemma3n": Entry(
        {
            "text_config.num_hidden_layers": 4,
            "text_config.layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "text_config.num_kv_shared_layers": 2, "text_config.intermediate_size": WIDTH,
            "text_config.activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "text_config.laurel_rank": 8,
            "vision_config": toy_tower(), "audio_config.vocab_size": 8, "audio_config.vocab_offset": VOCABULARY + 16,
            "vision_soft_tokens_per_image": (SIDE // PATCH) ** 2,
        },
        pixels=square,
    ),
    "gemma4": Entry({"vision_config": _GEMMA4_VISION}, options=_SOFT),
    "gemma4_unified": Entry(
        {
            "vision_config": {
                "model_type": "gemma4_unified_vision", "patch_size": PATCH, "pooling_kernel_size": 2, "mm_embed_dim": WIDTH,
                "mm_posemb_size": 64, "output_proj_dims": WIDTH,
            },
        },
        pixels=_positions,
    ),
    "glm4v": Entry(_thirds()),
    "glm4v_moe": Entry(_thirds(partial_rotary_factor=1.0), processor="glm4v"),
    "glm46v": Entry(_thirds()),
    "glmga": Entry(_thirds()),
    "glm_ocr": Entry(_thirds(), processor="glm46v"),
    "got_ocr2": Entry({f"vision_config.{k}": v for k, v in _SAM.items()}, reach=20.0),  # 3 x 3 convolutions
    "pp_chart2table": Entry({f"vision_config.{k}": v for k, v in _SAM.items()}, reach=20.0),
    "granite4_vision": Entry(
        {
            "downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [0, 0, 1, 1],
            "image_grid_pinpoints": _PINPOINTS,
        }
    ),
    "hunyuan_vl": Entry({"text_config.head_dim": HEAD, **_thirds()}),
    "granite_docling": Entry({"vision_config.image_size": 32}),
    "idefics2": Entry({"perceiver_config.num_key_value_heads": 2, "text_config.sliding_window": None}),
    "idefics3": Entry(options=_SPLIT, shown=_marked_tiles, reach=5.0),  # resized twice
    "smolvlm": Entry(options=_SPLIT, shown=_marked_tiles, reach=5.0),
    "inkling_mm_model": Entry({"vision_config.num_hidden_layers": 3}, pixels=_inkling),
    "inkling2": Entry({}, pixels=_inkling2),
    "instructblip": Entry({"image_token_index": IMAGE_ID, "num_query_tokens": 8}, pixels=_qformer),
    "instructblipvideo": Entry({"video_token_index": IMAGE_ID, "num_query_tokens": 8}, pixels=_frames, tokens=lambda c, _: 4 * c.num_query_tokens),
    "internvl": Entry(options={"crop_to_patches": True}),
    "qianfan_ocr": Entry(options={"crop_to_patches": True}),
    "janus": Entry({f"vq_config.{k}": v for k, v in _VQ.items()}),
    "kimi_k25": Entry(pixels=_patch_images),
    "lfm2_vl": Entry({"text_config.full_attn_idxs": DROP, "text_config.layer_types": ["conv", "full_attention"]}, pixels=_naflex),
    "llama4": Entry(
        {
            "text_config.moe_layers": DROP,
            "vision_config.projector_input_dim": WIDTH, "vision_config.projector_output_dim": WIDTH,
            "vision_config.vision_output_dim": WIDTH, "vision_config.intermediate_size": 4 * WIDTH,
            "text_config.no_rope_layers": [1, 0], "text_config.attention_chunk_size": 8,
        },
        pixels=square,
    ),
    "llava_next": Entry({"image_grid_pinpoints": _PINPOINTS}),
    "llava_next_video": Entry({"image_grid_pinpoints": _PINPOINTS}),
    "llava_onevision": Entry({"image_grid_pinpoints": _PINPOINTS}),
    "lighton_ocr": Entry({"vision_config.image_size": 48}, shown=_broken_rows),
    "mistral3": Entry({"vision_config.image_size": 48}, shown=_broken_rows),
    "minicpm_ocr": Entry(_MINICPM, pixels=_minicpm, along=3),
    "minicpmv4_6": Entry(_MINICPM, pixels=_minicpm, along=3),
    "minicpmv4_7": Entry(_MINICPM, pixels=_minicpm, along=3),
    "minimax_m3_vl": Entry(
        {
            "text_config.layer_types": ["full_attention", "minimax_m3_sparse"], "text_config.index_block_size": 4,
            "text_config.index_topk_blocks": 2,
        },
        pixels=patches(),
        ignores_padding=False,
    ),
    "mistral_large4": Entry(
        {
            "text_config.num_hidden_layers": 3, "text_config.kv_source_layers": [0, 0, 2], "text_config.no_rope_layers": [1, 1, 0],
            "text_config.index_topk": 8,
            "vision_config.image_size": 48,
        },
        shown=_broken_rows,
    ),
    "molmo2": Entry(
        {
            "adapter_config.vision_feature_layer": [-1, 0], "text_config.rope_scaling_layers": DROP,
            "adapter_config.text_hidden_size": WIDTH, "vision_config.num_position_embeddings": 36,
            "vision_config.image_size": [SIDE, SIDE],
        },
        pixels=_molmo,
    ),
    "muse_glimmer": Entry({"text_config.layer_rope_theta": [1e4, 0], "out_hidden_size": 4 * WIDTH}, pixels=patches()),
    "muse_spark": Entry(
        {
            "text_config.layer_rope_theta": [1e4, 0], "out_hidden_size": 4 * WIDTH,
            "audio_config.num_hidden_layers": 2, "audio_config.patch_sizes": [4, 2], "audio_config.hidden_sizes": [16, 16],
            "audio_config.depths": [1, 1], "text_config.moe_hidden_size": WIDTH,
        },
        pixels=patches(),
    ),
    "nemotron_h_omni": Entry(
        {
            "image_token_id": IMAGE_ID, "video_token_id": IMAGE_ID + 1, "vision_config.max_img_size": 64,
            "text_config.mamba_num_heads": 4, "text_config.mamba_head_dim": HEAD, "text_config.n_groups": 2,
            "text_config.ssm_state_size": 16, "vision_config.patch_dim": DROP, "vision_config.video_patch_dim": DROP,
        },
        pixels=_radio,
    ),
    "paddleocr_vl": Entry(_thirds()),
    "paligemma": Entry(prefix=True),
    "perception_lm": Entry({"vision_config": {**_CLIP, "model_args": {"embed_dim": WIDTH}}, "vision_use_cls_token": True}, pixels=_tiles),
    "qwen2_vl": Entry(_thirds()),
    "qwen2_5_vl": Entry(_thirds()),
    "qwen2_5_omni_thinker": Entry({**_thirds(), "vision_start_token_id": 60, "vision_end_token_id": 61}, processor="qwen2_vl"),
    "qwen3_omni_moe_thinker": Entry({**_thirds(), "vision_start_token_id": 60, "vision_end_token_id": 61}, processor="qwen2_vl"),
    "qwen3_vl_moe": Entry(processor="qwen2_vl"),
    "qwen4_exp": Entry(
        {
            "text_config.indexer_n_heads": 2, "text_config.indexer_kv_heads": 1, "text_config.indexer_head_dim": HEAD,
            "text_config.indexer_budget": 8, "text_config.indexer_compress_ratio": 2, "text_config.hc_lowrank": 8,
            "text_config.ple_embed_dim": 32, "text_config.ngram_vocab_size_base": 64, "text_config.output_gate_type": "silu",
        },
    ),
    "shieldgemma2": Entry({"mm_tokens_per_image": 9}),
    "step3p7": Entry(
        {
            "text_config.layer_types": ["full_attention", "sliding_attention"], "text_config.sliding_window": 8,
            "text_config.rope_parameters": _ROPES, "text_config.num_sliding_attention_heads": 4,
        },
        pixels=square,
    ),
    "unlimited_ocr": Entry(
        {
            **{f"vision_config.sam_config.{k}": v for k, v in _SAM.items()},
            "vision_config.sam_config.downsample_channels": [32, WIDTH],
        },
        pixels=_large_square,
    ),
    "vipllava": Entry({"vision_feature_layer": [-1, -2]}),
}  # fmt: skip


def entry(model_type: str) -> Entry:
    return ENTRIES.get(model_type, Entry())
