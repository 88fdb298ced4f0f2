"""Find a checkpoint and read its parts, refusing at the door what would otherwise fail late or
silently.

Config, processor and weights of the embedded model, of a local folder or of a hub id, all through
the same `from_pretrained` calls. Weights are read from safetensors only; no code from a repository
is ever run; the network is used only on request. What transformers merely warns about and then
fills with random numbers (a checkpoint that lacks weights) is an error here.

What surprises: images are always preprocessed by the PIL backend, because the torchvision one
resizes slightly differently, and the same picture would give other numbers on other machines.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import is_torchvision_available

from avl_analysis.errors import InputError
from avl_analysis.scenes import MODEL_DIR

EMBEDDED = "scenes"
"""Name of the model that comes with the package."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HASHED_BYTES = (
    256 * 2**20
)  # larger folders get no content hash: reading them twice would take too long


@dataclass(frozen=True)
class Checkpoint:
    """Where a model is read from.

    Attributes:
        name: what it was asked for by.
        path: folder or hub id, as `from_pretrained` takes it.
        local: whether only files on this machine may be read.
    """

    name: str
    path: str
    local: bool

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of every `from_pretrained` call."""
        return {"trust_remote_code": False, "local_files_only": self.local}

    def revision(self, model: PreTrainedModel) -> str | None:
        """Hub commit of a loaded model, or a hash of a local folder's weights; None for large local
        folders.
        """
        commit: str | None = getattr(model.config, "_commit_hash", None)
        files = sorted(Path(self.path).glob("*.safetensors"))
        if commit or not files or sum(file.stat().st_size for file in files) > _HASHED_BYTES:
            return commit
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
        return f"sha256:{digest.hexdigest()[:16]}"


def locate(name: str, *, allow_download: bool = False) -> Checkpoint:
    """The checkpoint called `name`: "scenes", a folder, or a hub id.

    Raises:
        InputError: no such folder, a folder without config.json, a name that can be none of the
            three.
    """
    if name == EMBEDDED:
        if not (MODEL_DIR / "config.json").is_file():
            raise InputError(
                f"the embedded model is missing from {MODEL_DIR}: install the package again"
            )
        return Checkpoint(name, str(MODEL_DIR), True)
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"{path} holds no config.json, so it is not a model folder: pass one made by"
                " save_pretrained"
            )
        return Checkpoint(name, str(path), True)
    if path.is_file():
        raise InputError(
            f"{path} is a file: pass the folder that holds config.json and the weights"
        )
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise InputError(
            f"no such model folder: {path}; pass {EMBEDDED!r}, a folder made by save_pretrained, or"
            " a hub id"
        )
    if "/" not in name:
        near = difflib.get_close_matches(name, [EMBEDDED])
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"possible: {EMBEDDED!r}, a model folder, or a hub id 'org/name'"
        )
        raise InputError(f"unknown model {name!r}: {hint}")
    return Checkpoint(name, name, not allow_download)


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The config, if it is that of a vision-language model.

    Raises:
        InputError: not found, unreadable, of a type unknown to transformers, text-only.
    """
    name = checkpoint.name
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, **checkpoint.options)
    except OSError as error:
        if Path(checkpoint.path).is_dir():
            raise InputError(f"cannot read the config of {name}: {first_line(error)}") from error
        if not checkpoint.local:
            raise InputError(f"cannot fetch {name}: {first_line(error)}") from error
        raise InputError(
            f"{name} is neither a folder here nor in the local cache: check the name, or allow"
            " fetching it from the hub with --download (allow_download=True in Python)"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{name} is of a type this transformers does not know, or needs code from its"
            f" repository, which is never run: {first_line(error)}"
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise InputError(
            f"{name} is a text-only model or not a language model (type {config.model_type!r});"
            f" pass a vision-language model such as {EMBEDDED!r}, LLaVA, Qwen-VL, InternVL or"
            " Gemma 3"
        )
    return config


def read_processor(checkpoint: Checkpoint) -> ProcessorMixin:
    """The processor, with PIL images and padding on the left.

    Raises:
        InputError: no processor, or only a tokenizer.
    """
    try:
        processor = AutoProcessor.from_pretrained(checkpoint.path, **checkpoint.options)
        if getattr(processor, "image_processor", None) is None:
            raise ValueError(f"found only a {type(processor).__name__}")
        if is_torchvision_available():
            # Only the image processor may hear of a backend: AutoProcessor would pass it on to the
            # tokenizer. Without torchvision the PIL backend is what it loads anyway.
            processor.image_processor = AutoImageProcessor.from_pretrained(
                checkpoint.path, backend="pil", **checkpoint.options
            )
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise InputError(
            f"{checkpoint.name} comes without a usable processor (tokenizer and image processor):"
            f" {first_line(error)}; save it beside the model with processor.save_pretrained"
        ) from error
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def read_weights(
    checkpoint: Checkpoint, *, dtype: str | torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """The model with its weights, on the CPU.

    Raises:
        InputError: weights that are damaged, incomplete, of other shapes, or not safetensors; an
            attention backend that is unknown, not installed or not offered by the model.
    """
    name = checkpoint.name
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **checkpoint.options,
        )
    except SafetensorError as error:
        raise InputError(
            f"the weights of {name} are damaged ({error}): copy or download them again"
        ) from error
    except RuntimeError as error:
        raise InputError(
            f"the weights of {name} do not fit its config.json: {first_line(error)}"
        ) from error
    except OSError as error:
        raise InputError(
            f"no usable safetensors weights for {name} ({first_line(error)}); other weight formats"
            " are not read: convert them with save_pretrained"
        ) from error
    except (ValueError, ImportError) as error:
        raise InputError(
            f"cannot load {name} with attention {attn_implementation!r}: {first_line(error)}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"the checkpoint of {name} lacks {len(missing)} of the model's weights, {missing[0]}"
            " first; they would be random: save the model again, whole"
        )
    return model


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
