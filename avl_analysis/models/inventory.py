"""What a model is, before anything is recorded.

Size, layers, heads, image tokens, and whether it can be recorded.

Answers from the config and the processor alone. The model is built on torch's meta device, where
weights have shapes but no memory, and the attention hooks are attached to it for a
moment: exactly the checks that recording makes, at no cost even for models that would not fit here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from avl.families import UnsupportedModelError, describe
from avl.hooks import Observer, attached
from avl_analysis.errors import blamed_on_input
from avl_analysis.models.checkpoint import Checkpoint, locate, read_config
from avl_analysis.models.processors import read_processor
from avl_analysis.models.prompts import PICTURE, Conversation, render

SAMPLE_SIZE = (640, 480)
"""Width and height in pixels of the picture whose tokens are counted; families that keep the aspect
depend on it.
"""


@dataclass(frozen=True)
class ModelFacts:
    """One row of `avl models`.

    Attributes:
        name: as asked for.
        model_type: transformers' name of the family.
        parameters: number of weights, tied ones once.
        layers, query_heads, kv_heads: of the decoder; None where the model is refused.
        image_tokens: tokens of one picture of `SAMPLE_SIZE`; None where the model is refused.
        refusal: why it cannot be recorded; None if it can.
    """

    name: str
    model_type: str
    parameters: int
    layers: int | None
    query_heads: int | None
    kv_heads: int | None
    image_tokens: int | None
    refusal: str | None


def inspect_model(name: str, *, allow_download: bool = False) -> ModelFacts:
    """Facts about a model, without its weights.

    Raises:
        InputError: as `load_model` for unknown and text-only models and folders without a
            processor.
    """
    checkpoint = locate(name, allow_download=allow_download)
    config = read_config(checkpoint)
    built = blamed_on_input(f"transformers cannot build {name} from its config.json")
    with checkpoint.network(), built, torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    try:
        family = describe(model)
        # The observer does nothing; attaching it raises what recording would raise.
        with attached(model, Observer()):
            tokens = _image_tokens(checkpoint, config, family.image_token_ids)
    except UnsupportedModelError as error:
        return ModelFacts(name, config.model_type, parameters, None, None, None, None, str(error))
    return ModelFacts(
        name,
        config.model_type,
        parameters,
        family.layers,
        family.query_heads,
        family.kv_heads,
        tokens,
        None,
    )


def describe_model(model: PreTrainedModel) -> str:
    """One line for people: class, number of parameters, type, device."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{type(model).__name__}, {count_of(parameters)} parameters, {dtype} on {model.device}"


def count_of(parameters: int) -> str:
    """A number of parameters as people write it: 3.9 M, 7.1 B."""
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _image_tokens(checkpoint: Checkpoint, config: PreTrainedConfig, ids: tuple[int, ...]) -> int:
    processor = read_processor(checkpoint, config)
    text = render(processor, Conversation("what is this?", (PICTURE,)))
    with blamed_on_input(f"the processor of {checkpoint.name} cannot read a picture"):
        inputs = processor(
            images=[[Image.new("RGB", SAMPLE_SIZE)]], text=[text], return_tensors="pt"
        )
    return int(torch.isin(inputs["input_ids"], torch.tensor(ids)).sum())
