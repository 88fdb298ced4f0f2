"""Every model type transformers registers for pictures and text is recorded exactly, adapted, or
refused in truth.
"""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import pytest
import torch
import transformers

from avl.families import REFUSED, UnsupportedModelError, describe
from avl_analysis.conformance.build import Case, model_types
from avl_analysis.conformance.table import NOT_CHECKED, check, counts, markdown, parse

TABLE = Path(__file__).parents[3] / "docs" / "families.md"

# One of each kind of attention: plain, anyres tiles, three-part rotary positions, sliding windows,
# prefix attention, linear layers, short convolutions, chunks, compressed keys, chosen keys, shared
# keys, relative bias, embedded early.
REPRESENTATIVE = (
    "llava",
    "llava_next",
    "qwen2_vl",
    "gemma3",
    "paligemma",
    "qwen3_5",
    "lfm2_vl",
    "llama4",
    "kimi_k25",
    "dots3_note",
    "gemma3n",
    "inkling_mm_model",
    "blip-2",
    "florence2",
)


def _committed():
    return {row.model_type: row for row in parse(TABLE.read_text(encoding="utf-8"))}


def _same_version() -> bool:
    return f"transformers {transformers.__version__}." in TABLE.read_text(encoding="utf-8")


BROKEN_DEFAULTS = {"granite4_vision", "vision-encoder-decoder"}
"""Types whose default configuration makes no model in versions older than the table's."""


def _skip_if_broken(model_type: str) -> None:
    if model_type in BROKEN_DEFAULTS and not _same_version():
        pytest.skip("the default configuration of this version makes no model")


def _verify(model_type: str) -> None:
    _skip_if_broken(model_type)
    row, expected = check(model_type), _committed().get(model_type)
    if row.recorded.startswith(NOT_CHECKED) and not _same_version():
        pytest.skip(row.recorded)
    if _same_version():
        assert row == expected
    elif expected is not None:
        assert (row.is_recorded, row.is_adapted) == (expected.is_recorded, expected.is_adapted)


@pytest.mark.parametrize("model_type", [t for t in REPRESENTATIVE if t in model_types()])
def test_a_representative_type_is_what_the_table_says(model_type):
    _verify(model_type)


@pytest.mark.parametrize("model_type", [t for t in model_types() if t not in REPRESENTATIVE])
def test_every_other_type_is_what_the_table_says(model_type):
    _verify(model_type)


@pytest.mark.skipif(
    not _same_version(), reason="the committed table is for another version of transformers"
)
def test_the_table_names_every_registered_type_once():
    rows = parse(TABLE.read_text(encoding="utf-8"))
    assert sorted(row.model_type for row in rows) == sorted(model_types())
    assert counts(rows) in TABLE.read_text(encoding="utf-8")


def test_a_table_survives_being_written_and_read():
    rows = parse(TABLE.read_text(encoding="utf-8"))
    assert parse(markdown(rows)) == rows


def test_at_least_65_types_are_recorded_and_55_adapted():
    rows = parse(TABLE.read_text(encoding="utf-8"))
    assert sum(row.is_recorded for row in rows) >= 65
    assert sum(row.is_adapted for row in rows) >= 55


def test_types_that_are_not_recorded_are_those_refused_by_name_and_the_encoder_decoders():
    for row in parse(TABLE.read_text(encoding="utf-8")):
        if not row.is_recorded:
            reason = row.recorded
            assert (
                reason == REFUSED.get(row.model_type)
                or "encoder-decoder" in reason
                or "numbers of query" in reason
            )


REACHES_ENCODER = (
    "CrossAttention",
    "crossattention",
    "encoder_attn",
    "EncDecAttention",
    "MergedAttention",
)
"""How modules are called that attend to an encoder's output, in transformers; merged: beside the
decoder's own keys.
"""


@pytest.mark.parametrize(
    "row",
    [r for r in _committed().values() if "encoder-decoder" in r.recorded],
    ids=lambda r: r.model_type,
)
def test_a_type_refused_as_encoder_decoder_is_one(row):
    if row.model_type not in model_types():
        pytest.skip("not registered in this version")
    _skip_if_broken(row.model_type)
    model = Case(row.model_type).model
    assert model.get_encoder() is not model.get_decoder()
    names = [
        f"{name} {type(module).__name__}" for name, module in model.get_decoder().named_modules()
    ]
    assert any(part in name for name in names for part in REACHES_ENCODER)
    with pytest.raises(
        UnsupportedModelError, match="it is an encoder-decoder; its decoder reaches the picture"
    ):
        describe(model)


FACTS = {
    "blip": lambda model: any("crossattention" in name for name, _ in model.named_modules()),
    "idefics": lambda model: len(model.model.gated_cross_attn_layers) > 0,
    "mllama": lambda model: any(
        "CrossAttention" in type(module).__name__ for module in model.model.modules()
    ),
    "evolla": lambda model: "protein_input_ids" in signature(model.forward).parameters,
    "kosmos-2": lambda model: "image_embeds_position_mask" in signature(model.forward).parameters,
    "kosmos-2.5": lambda model: "image_embeds_position_mask" in signature(model.forward).parameters,
    "mistral4": lambda model: "pixel_values" not in signature(model.forward).parameters,
    "pi0": lambda model: (
        "actions" in signature(model.forward).parameters and not hasattr(model, "generation_config")
    ),
    "diffusion_gemma": lambda model: (
        "self_conditioning_logits" in signature(model.forward).parameters
    ),
    "git": lambda model: _adds_positions(model),
}


def _adds_positions(model):
    """Whether the decoder runs over more positions than `input_ids` has, when it is shown a
    picture.
    """
    side = model.config.vision_config.image_size
    return (
        model(
            input_ids=torch.tensor([[5, 6, 7]]), pixel_values=torch.rand(1, 3, side, side)
        ).logits.shape[1]
        > 3
    )


def test_every_refusal_by_name_has_its_fact_checked():
    assert FACTS.keys() == REFUSED.keys()


@pytest.mark.parametrize("model_type", [t for t in REFUSED if t in model_types()])
def test_a_type_is_refused_for_a_reason_that_is_true(model_type):
    model = Case(model_type).model
    assert FACTS[model_type](model)
    with pytest.raises(UnsupportedModelError, match="is not supported: "):
        describe(model)
