"""A tiny version of any transformers configuration, made by the names of its fields.

A default configuration describes a model of several gigabytes. `shrink` keeps every choice that
decides *what* is computed (layer kinds, rotary sections, expert routing, bidirectional masks) and
replaces the numbers that decide *how much*: two or three layers of width 64 with four heads. It
knows field names only, and nothing about families; a family whose fields do not fit gets an
override in `entries.py`. Special token ids are moved into the small vocabulary, equal ids staying
equal across the nested configurations.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 192
WIDTH = 64
HEADS = 4
HEAD = WIDTH // HEADS
PATCH = 4
SIDE = 24
_FIRST_SPECIAL = 16  # ids below stay; ids from here on are numbered anew

# Field names as patterns and their small values; of several patterns that match a whole name the
# first counts.
_SIZES: tuple[tuple[str, Any], ...] = (
    (r"vocab_size.*|.*_vocab_size", VOCABULARY),
    (
        r"(.*_)?hidden_(size|dim)|d_model|n_embd|word_embed_proj_dim|projection_dim|output_dim",
        WIDTH,
    ),
    (r"embed_dim|image_token_embed_dim", WIDTH),
    (
        r".*(intermediate_size|ffn_dim|mlp_dim|ffn_hidden_size)(_mlp)?"
        r"|d_ff|share_expert_dim|.*intermediate_dim",
        WIDTH,
    ),
    (r".*(num_)?key_value_heads", HEADS // 2),
    (r".*num_attention_heads|.*num_heads|.*attention_heads|n_heads", HEADS),
    (r"(?!qk_head_dim)(.*_)?head_dim|d_kv|qk_(nope|rope)_head_dim", HEAD),
    (r"(q|kv)_lora_rank", HEAD),
    (r".*num_(hidden_)?layers|depth|encoder_layers|decoder_layers|resampler_depth|num_layers", 2),
    (r"max_position_embeddings", 1024),
    (r"(image_)?patch_size", PATCH),
    (r"image_size", SIDE),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_topk|top_k_experts|moe_k", 2),
    (r"n_group|topk_group|num_nextn_predict_layers", 1),
    (r"first_k_dense_replace", 1),
    # Windows and selections of 8 keys are shorter than the prompts, which have ten text tokens
    # beside the picture: layers with them do leave keys out.
    (r"index_topk", 8),
    (r"index_kpool", 4),
    (r"(window_size|sliding_window.*)", 8),
    (r"initializer_range|init_std", 0.2),
)


def shrink(config: PreTrainedConfig, override: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """A configuration of the same class, small enough to build in milliseconds.

    Args:
        config: the defaults.
        override: dotted field names with their values ("text_config.num_hidden_layers"), applied
            last; a value may be `DROP` to leave the field to the class's own default.
    """
    ids = _special_ids(config)
    fields = _shrink(config, ids, override or {}, "")
    for name, value in (override or {}).items():
        *path, last = name.split(".")
        at = fields
        for part in path:
            at = at.setdefault(part, {})
        if value is DROP:
            at.pop(last, None)
        else:
            at[last] = copy.deepcopy(value)
    return type(config)(**fields)


DROP = object()
"""Override value: leave the field out."""

_KEPT = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "is_encoder_decoder",
)
# What every configuration has (output flags, names of classes) is left to the class's defaults,
# except what changes the model.
_BASE_FIELDS = frozenset(PreTrainedConfig().to_dict()) - {*_KEPT, "decoder_start_token_id"}


def _shrink(
    config: PreTrainedConfig, ids: Mapping[int, int], override: Mapping[str, Any], path: str
) -> dict[str, Any]:
    # `vars` also holds attributes that a class derives from its fields, at the original size.
    known = set(type(config).__dataclass_fields__)
    fields: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_") or name in _BASE_FIELDS or name not in known:
            continue
        if isinstance(value, PreTrainedConfig):
            fields[name] = {
                **_shrink(value, ids, override, f"{path}{name}."),
                # The outer class chooses the class of the nested configuration by it.
                "model_type": value.model_type,
            }
        else:
            fields[name] = _small(name, value, ids)
    given = vars(config)
    # A family without grouped heads stays without.
    if "num_key_value_heads" in fields and given["num_key_value_heads"] == given.get(
        "num_attention_heads"
    ):
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    # An overridden number of layers counts already here, because lists with one entry per layer
    # must be as long.
    counts = [n for n in ("num_hidden_layers", "num_layers", "n_layers") if n in fields]
    layers = override.get(path + counts[0], fields[counts[0]]) if counts else None
    for name, value in list(fields.items()):
        if (
            isinstance(value, (list, tuple))
            and re.fullmatch(r".*(layer_types|_types|layers_block_type)", name)
            and layers
        ):
            fields[name] = _few(list(value), layers)
    return fields


def _few(kinds: list[Any], layers: int) -> list[Any]:
    """`layers` entries in the original order, with every kind that occurs if there is room."""
    distinct = list(dict.fromkeys(kinds))[:layers]
    return (distinct * layers)[:layers] if len(distinct) < layers else distinct


def _small(name: str, value: Any, ids: Mapping[int, int]) -> Any:
    if _is_id(name):
        return (
            [ids.get(v, v) for v in value]
            if isinstance(value, (list, tuple))
            else ids.get(value, value)
        )
    # Before the numbers: bool is an int to Python.
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, dict) and "rope" in name:
        return _rope(value)
    if isinstance(value, (list, tuple)) and re.fullmatch("patch_size|image_size", name):
        return [PATCH if name == "patch_size" else SIDE] * len(value)
    if isinstance(value, (int, float)):
        for pattern, size in _SIZES:
            if re.fullmatch(pattern, name):
                # Never larger than the original: a family with one key/value head keeps one.
                return size if isinstance(size, float) else min(size, value) or value
    return copy.deepcopy(value)


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Multi-dimensional rotary sections cut to half a small head.

    They are nested per layer type in some families.
    """
    result = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            value = _rope(value)
        elif name == "mrope_section":
            # 4 + 2 + 2 rotary pairs, as many as half a head has.
            value = [HEAD // 2 - 2 * (HEAD // 8), HEAD // 8, HEAD // 8]
        result[name] = value
    return result


def _is_id(name: str) -> bool:
    return bool(
        re.fullmatch(
            r".*(_token_id|_token_index|_token_ids|_start_id|_end_id|newline_id|image_patch_id)",
            name,
        )
    )


def _special_ids(config: PreTrainedConfig) -> dict[int, int]:
    """Small numbers for all special token ids of a configuration tree."""
    found: list[int] = []

    def collect(part: PreTrainedConfig) -> None:
        for name, value in vars(part).items():
            if isinstance(value, PreTrainedConfig):
                collect(value)
            elif _is_id(name):
                found.extend(
                    v
                    for v in (value if isinstance(value, (list, tuple)) else [value])
                    if isinstance(v, int)
                )

    collect(config)
    large = [i for i in dict.fromkeys(found) if i >= _FIRST_SPECIAL]
    # Sorted, so that a smaller id stays the smaller one.
    return {old: _FIRST_SPECIAL + new for new, old in enumerate(sorted(large))}
