"""Find a checkpoint and read its config and weights, refusing at the door what would otherwise fail
late or silently.

The embedded model, a local folder and a hub id go through the same `from_pretrained` calls. Weights
are read from safetensors only; no code from a repository is ever run; the network is used only on
request. What transformers merely warns about is an error here: weights that are missing (it fills
them with random numbers), weights of more layers than the config has, a quantization method it does
not know, and generation settings it cannot read.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from avl_analysis.errors import InputError
from avl_analysis.scenes import MODEL_DIR

EMBEDDED = "scenes"
"""Name of the model that comes with the package."""

_NUMBER = re.compile(r"\.\d+\.")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Larger folders get no content hash, because reading them twice would take too long.
_HASHED_BYTES = 256 * 2**20


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
            if (path / "adapter_config.json").is_file():
                raise InputError(_adapter(path))
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


def _adapter(path: Path) -> str:
    """What to do with a folder that holds a PEFT adapter instead of a model."""
    try:
        settings = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        base = str(settings["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        base = "the base model"
    return (
        f"{path} holds a PEFT adapter, not a model: load the base model and add the adapter:"
        f" vlm = load_model({base!r}); vlm.model.load_adapter({str(path)!r}) (needs peft)"
    )


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
            raise InputError(f"cannot read the config of {name}: {one_line(error)}") from error
        if not checkpoint.local:
            raise InputError(f"cannot fetch {name}: {one_line(error)}") from error
        raise InputError(
            f"{name} is neither a folder here nor in the local cache: check the name, or allow"
            " fetching it from the hub with --download (allow_download=True in Python)"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{name} is of a type this transformers does not know, or needs code from its"
            f" repository, which is never run: {one_line(error)}"
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise InputError(
            f"{name} is a text-only model or not a language model (type {config.model_type!r});"
            f" pass a vision-language model such as {EMBEDDED!r}, LLaVA, Qwen-VL, InternVL or"
            " Gemma 3"
        )
    return config


def read_weights(
    checkpoint: Checkpoint, *, dtype: str | torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """The model with its weights, on the CPU.

    Raises:
        InputError: weights that are damaged, incomplete, of other shapes, or not safetensors; an
            attention backend that is unknown, not installed or not offered by the model.
    """
    name = checkpoint.name
    _check_generation_config(checkpoint)
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
            f"the weights of {name} do not fit its config.json: {one_line(error)}"
        ) from error
    except OSError as error:
        raise InputError(
            f"no usable safetensors weights for {name} ({one_line(error)}); other weight formats"
            " are not read: convert them with save_pretrained"
        ) from error
    except (ValueError, ImportError) as error:
        raise InputError(
            f"cannot load {name} with attention {attn_implementation!r}: {one_line(error)}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"the checkpoint of {name} lacks {len(missing)} of the model's weights, {missing[0]}"
            " first; they would be random: save the model again, whole"
        )
    if extra := _weights_of_more_layers(model, info["unexpected_keys"]):
        raise InputError(
            f"the checkpoint of {name} holds weights of more layers than its config.json has"
            f" ({extra} first), which would be left out: correct the number of layers there"
        )
    method = getattr(model.config, "quantization_config", None)
    if method is not None and getattr(model, "hf_quantizer", None) is None:
        raise InputError(
            f"the config of {name} asks for a quantization that this transformers does not know"
            f" ({_quantization(method)}) and would load without it: remove quantization_config"
            " if the weights are not quantized, else use the transformers version that wrote them"
        )
    return model


def _check_generation_config(checkpoint: Checkpoint) -> None:
    """Refuse generation settings that cannot be read; transformers would use its own instead.

    Raises:
        InputError: there is a generation_config.json that is not JSON or holds impossible values.
    """
    there = cached_file(
        checkpoint.path,
        GENERATION_CONFIG_NAME,
        local_files_only=checkpoint.local,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if there is None:
        return
    try:
        GenerationConfig.from_pretrained(checkpoint.path, local_files_only=checkpoint.local)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"cannot read {GENERATION_CONFIG_NAME} of {checkpoint.name} ({one_line(error)}): repair"
            " it, or remove it to generate with the defaults"
        ) from error


def _weights_of_more_layers(model: PreTrainedModel, unexpected: Iterable[str]) -> str | None:
    """The first unexpected weight that is a weight of the model but for its layer's number.

    Layers that only predict tokens further ahead (`num_nextn_predict_layers`) are left out on
    purpose; a model that declares them may have such weights.
    """
    if getattr(model.config.get_text_config(), "num_nextn_predict_layers", 0):
        return None
    known = {_NUMBER.sub(".0.", name) for name in model.state_dict()}
    return next((key for key in sorted(unexpected) if _NUMBER.sub(".0.", key) in known), None)


def _quantization(settings: Any) -> str:
    """The method a quantization_config names."""
    if isinstance(settings, dict):
        return f"quant_method {settings.get('quant_method')!r}"
    return f"quant_method {getattr(settings, 'quant_method', None)!r}"


def one_line(error: BaseException, limit: int = 320) -> str:
    """An error's message on one line, or the error's type where it has none.

    Libraries break their messages into lines in the middle of sentences, so all lines are taken. A
    message longer than `limit` characters ends after its last whole sentence within the limit, or,
    where its first sentence is longer, after the last whole word, with an ellipsis.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= limit:
        return text.rstrip(".")
    start = text[: limit + 1]
    sentence = max(start.rfind(end) for end in (". ", "! ", "? "))
    if sentence > 0:
        return start[:sentence]
    return start[: start.rfind(" ")] + " ..."
