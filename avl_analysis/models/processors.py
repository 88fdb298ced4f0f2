"""The processor of a checkpoint.

Tokenizer, image processor and chat template, and what to install where a part of it asks for a
package that is not there.

Images are always preprocessed by the PIL backend: the torchvision one resizes slightly differently,
so the same picture would give other numbers on machines with and without torchvision.

The processors of many families have a video part, which needs torchvision. For the families of
`video_frames.PARTS` a video part that works with Pillow takes its place, on every machine. Where
torchvision is missing, processors of other families are built without that part. Image part and
text part are always those of transformers.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from transformers import (
    AutoFeatureExtractor,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor

# Older versions put a stand-in that asks for torchvision at the top of the package, though the
# class itself works without.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.utils import is_torchvision_available

from avl_analysis.errors import InputError, one_line
from avl_analysis.models.checkpoint import Checkpoint
from avl_analysis.models.safety import check_processor, read_json
from avl_analysis.models.video_frames import PARTS, VideoSettings

EXTRA = "pip install 'avl-analysis[vlm]'"
"""Installs every package of `PACKAGES`."""

PACKAGES = ("torchvision", "num2words", "sentencepiece", "timm")
"""Packages that processors (and a few vision towers) of transformers ask for."""

_VIDEO = "video_processor"
_PARTS = {
    "image_processor": AutoImageProcessor,
    "tokenizer": AutoTokenizer,
    "feature_extractor": AutoFeatureExtractor,
}


def read_processor(
    checkpoint: Checkpoint, config: PreTrainedConfig | None = None
) -> ProcessorMixin:
    """The processor, with PIL images and padding on the left.

    Args:
        checkpoint: where it is read from.
        config: of the model; where given, a processor whose video part cannot be made here is
            built without that part.

    Raises:
        InputError: no processor, only a tokenizer, or one that needs a package that is not
            installed; then the message names the package and how to install it.
    """
    for file in ("processor_config.json", "preprocessor_config.json"):
        if (path := checkpoint.file(file)) is not None:
            check_processor(read_json(path, f"{file} of {checkpoint.name}"), checkpoint.name)
    with checkpoint.network():
        return _read_processor(checkpoint, config)


def _read_processor(checkpoint: Checkpoint, config: PreTrainedConfig | None) -> ProcessorMixin:
    name = checkpoint.name
    try:
        processor = _whole_or_without_video(checkpoint, config)
        if getattr(processor, "image_processor", None) is None:
            raise ValueError(f"found only a {type(processor).__name__}")
        if is_torchvision_available():
            # Only the image processor may hear of a backend: AutoProcessor would pass it on to the
            # tokenizer. Without torchvision the PIL backend is what it loads anyway.
            processor.image_processor = AutoImageProcessor.from_pretrained(
                checkpoint.path, backend="pil", **checkpoint.options
            )
        # Generated tokens follow the last position of a row, which must be its prompt's own last
        # token.
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
    except Exception as error:  # what transformers raises about these files is not documented
        if packages := missing_packages(error):
            raise InputError(needs(f"the processor of {name}", packages)) from error
        if isinstance(error, ImportError):
            raise InputError(
                f"the processor of {name} asks for a package that is not installed:"
                f" {one_line(error)}"
            ) from error
        raise InputError(
            f"{name} comes without a usable processor (tokenizer and image processor):"
            f" {one_line(error)}; save it beside the model with processor.save_pretrained"
        ) from error
    return processor


def missing_packages(error: BaseException) -> list[str]:
    """Packages of `PACKAGES` that an error of transformers names and that are not installed."""
    text = str(error).lower()
    return [p for p in PACKAGES if p in text and importlib.util.find_spec(p) is None]


def needs(what: str, packages: list[str]) -> str:
    """The sentence that says what is missing and how to get it."""
    verb = "is" if len(packages) == 1 else "are"
    return f"{what} needs {' and '.join(packages)}, which {verb} not installed: {EXTRA}"


def _whole_or_without_video(
    checkpoint: Checkpoint, config: PreTrainedConfig | None
) -> ProcessorMixin:
    usual = None if config is None else PROCESSOR_MAPPING.get(type(config), None)
    if config is not None and getattr(usual, "__name__", "") in PARTS:
        kind = _processor_class(checkpoint, config)
        if kind is not None and kind.__name__ in PARTS:
            return _with_own_video(kind, checkpoint)
    try:
        return AutoProcessor.from_pretrained(checkpoint.path, **checkpoint.options)
    except (ImportError, OSError, ValueError) as error:
        # The video part is what is missing where torchvision alone is not installed, or where a
        # folder holds the settings of an image processor only.
        video = missing_packages(error) == ["torchvision"] or "video processor" in str(error)
        kind = _processor_class(checkpoint, config) if video and config is not None else None
        if kind is None:
            raise
        return _with_own_video(kind, checkpoint)


def _processor_class(
    checkpoint: Checkpoint, config: PreTrainedConfig
) -> type[ProcessorMixin] | None:
    """The class the checkpoint names, else that of its model type.

    None if it cannot be imported here or has no video part.
    """
    options = checkpoint.options
    settings, _ = ProcessorMixin.get_processor_dict(checkpoint.path, **options)
    named = settings.get("processor_class")
    if named is None:  # older checkpoints name it beside the image processor's settings
        try:
            settings, _ = BaseImageProcessor.get_image_processor_dict(checkpoint.path, **options)
        except OSError:
            settings = {}
        named = settings.get("processor_class")
    if named is not None:
        kind = processor_class_from_name(named)
    else:
        kind = PROCESSOR_MAPPING.get(type(config), None)
    # Where a class itself needs a package, transformers puts a stand-in in its place that raises
    # whatever it is asked; only its private attributes can be read.
    if kind is None or getattr(kind, "_backends", None) or _VIDEO not in kind.get_attributes():
        return None
    return kind


class MissingVideo(VideoSettings):
    """Stands in a processor where its video part cannot be made."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        raise InputError(needs("the video part of this processor", ["torchvision"]))


def _with_own_video(kind: type[ProcessorMixin], checkpoint: Checkpoint) -> ProcessorMixin:
    """A processor of class `kind` with a video part of `video_frames`, or `MissingVideo`.

    It is a subclass that differs in one point: the constructor, which checks the classes of all
    parts, accepts that video part. Given images it does what `kind` does.
    """
    options = checkpoint.options
    settings, _ = kind.get_processor_dict(checkpoint.path, **options)
    video = PARTS.get(kind.__name__, MissingVideo)(_video_settings(checkpoint, settings))

    def check(self: Any, name: str, part: Any) -> Any:
        # The original returns the class that a part was checked against, and so does this.
        if isinstance(part, VideoSettings):
            return VideoSettings
        return kind.check_argument_for_proper_class(self, name, part)

    lenient: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
    parts = [
        video if part == _VIDEO else _PARTS[part].from_pretrained(checkpoint.path, **options)
        for part in kind.get_attributes()
    ]
    processor: ProcessorMixin = lenient.from_args_and_dict(parts, settings)
    return processor


def _video_settings(checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the video part, from where transformers looks for them, in its order."""
    if settings.get(_VIDEO) is not None:
        return dict(settings[_VIDEO])
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (path := checkpoint.file(name)) is not None:
            return read_json(path, f"{name} of {checkpoint.name}")
    return {}
