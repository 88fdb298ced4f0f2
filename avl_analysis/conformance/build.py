"""A tiny random model of a registered type with a prompt that shows it a picture: one `Case`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from avl.families import Family, describe
from avl.places import remember_originals
from avl_analysis.conformance.entries import entry
from avl_analysis.conformance.inputs import has_processor, image_processor, pixels, prompt
from avl_analysis.conformance.shrink import shrink


def model_types() -> tuple[str, ...]:
    """Model types the installed transformers registers for image-text-to-text, in its own order."""
    return tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def picture(width: int = 40, height: int = 30) -> Image.Image:
    """A picture with a few shapes in it."""
    image = Image.new("RGB", (width, height), (40, 90, 160))
    draw = ImageDraw.Draw(image)
    draw.rectangle((width // 5, height // 4, width // 2, height // 2), fill=(220, 180, 30))
    draw.ellipse((width // 2, height // 2, width - 3, height - 2), fill=(200, 30, 60))
    return image


@dataclass(eq=False)
class Case:
    """A tiny model of one type and what to feed it. Nothing is built before it is asked for.

    Attributes:
        model_type: key of the image-text-to-text registry.
    """

    model_type: str

    @property
    def pixels_from(self) -> str:
        """Where the pixel inputs come from: "processor" or "random"."""
        return "processor" if has_processor(self.model_type) else "random"

    @property
    def sees_ahead(self) -> bool:
        """Whether prompt tokens attend to later ones.

        A prompt is then more than its tokens one by one.
        """
        return entry(self.model_type).prefix

    @property
    def ignores_padding(self) -> bool:
        """Whether what a model computes does not depend on what stands in its padding."""
        return entry(self.model_type).ignores_padding

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The tiny configuration."""
        return shrink(CONFIG_MAPPING[self.model_type](), entry(self.model_type).override)

    @property
    def model_class(self) -> Any:
        """The class that is registered for the type."""
        # The registry names one class, or several, of which the first is taken.
        name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[self.model_type]
        return getattr(transformers, name if isinstance(name, str) else name[0])

    def _make(self, attention: str) -> nn.Module:
        # The backend is written into the configuration, which the SDPA and the eager model must not
        # share.
        config = copy.deepcopy(self.config)
        config._attn_implementation = attention
        # The same weights for every build of a type, and the caller's random numbers stay as they
        # were.
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            model = self.model_class(config).eval()
        _fill_zeros(model)
        if (settings := getattr(model, "generation_config", None)) is not None:
            # Random weights might choose an end token; without one every generation has the length
            # asked for.
            settings.eos_token_id, settings.pad_token_id = None, 0
        return model

    @cached_property
    def model(self) -> nn.Module:
        """The model as it loads by default: SDPA where the family offers it."""
        with quiet():
            try:
                return self._make("sdpa")
            # transformers raises ValueError for a class that does not offer SDPA.
            except ValueError:
                return self._make("eager")

    @property
    def family(self) -> Family:
        """Facts about the model; raises UnsupportedModelError for types that are refused."""
        return describe(self.model)

    @cached_property
    def eager(self) -> nn.Module:
        """The same weights with eager attention."""
        model = self._make("eager")
        model.load_state_dict(self.model.state_dict())
        return model

    @cached_property
    def processor(self) -> Any:
        """The type's image processor, sized for the tiny model; LookupError without one."""
        help = entry(self.model_type)
        with quiet():
            return image_processor(help.processor or self.model_type, self.config, help.options)

    def asking(self, image: Image.Image) -> dict[str, Any]:
        """One prompt that shows this image, whose size is remembered with the inputs."""
        with quiet():
            inputs = prompt(self.model, pixels(self.model_type, self.config, [image]))
        # One row that shows one picture.
        remember_originals(inputs, [[image.size]], self.processor)
        return inputs

    @cached_property
    def picture_inputs(self) -> dict[str, Any]:
        """Pixel inputs of one picture."""
        with quiet():
            return pixels(self.model_type, self.config, [picture()])

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """One prompt with one picture."""
        return prompt(self.model, self.picture_inputs)

    @cached_property
    def defect(self) -> str:
        """Why the installed transformers cannot run the model with nothing attached, or nothing.

        Version 5.24.0 cannot run Llama 4.
        """
        try:
            with torch.no_grad():
                self.model(**self.inputs)
        # Only the error of the known defect; anything else is raised as a failure of the check.
        except AttributeError as error:
            return f"transformers {transformers.__version__} cannot run it: {error}"
        return ""

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        """Two prompts with the same picture, the second shorter and padded on the left."""
        return prompt(self.model, self.picture_inputs, after=(6, 2))


def _fill_zeros(model: nn.Module) -> None:
    """Put random numbers in place of matrices that start as zeros (gates, projectors).

    They would hide what they multiply.
    """
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        # Vectors are left alone: a bias of zeros adds nothing and hides nothing.
        if parameter.dim() > 1 and not bool(parameter.any()):
            parameter.data = (
                # The square root of the input width as divisor keeps the size of what passes
                # through.
                torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Mute transformers' advice while tiny models are built (missing torchvision, odd configs)."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
