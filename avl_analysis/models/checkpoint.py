"""Find a checkpoint and read its config and weights.

Refuses first what would otherwise fail late or silently.

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
from contextlib import AbstractContextManager, nullcontext
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

from avl_analysis.errors import InputError, blamed_on_input, one_line
from avl_analysis.files import user_path
from avl_analysis.models.safety import (
    cached_folder,
    check_attention,
    check_config,
    check_weight_files,
    no_network,
    read_json,
    without_attention,
)
from avl_analysis.scenes import MODEL_DIR

EMBEDDED = "scenes"
"""Name of the model that comes with the package."""

# A layer's number inside the name of a weight, as in `layers.12.mlp`.
_NUMBER = re.compile(r"\.\d+\.")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Larger folders get no content hash, because reading them twice would take too long.
_HASHED_BYTES = 256 * 2**20
_BLOCKS, _BLOCK = 64, 2**20


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

    def network(self) -> AbstractContextManager[None]:
        """To be open while anything is read: keeps the network off unless fetching is allowed."""
        return no_network() if self.local else nullcontext()

    def file(self, name: str) -> Path | None:
        """Where the file `name` is on this machine, fetched first where that is allowed.

        None if there is none.
        """
        with self.network():
            path = cached_file(
                self.path,
                name,
                local_files_only=self.local,
                # A missing file is None here; whoever needs it says so, with the model's name.
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
        return None if path is None else Path(path)

    def revision(self, model: PreTrainedModel) -> str | None:
        """Hub commit of a loaded model, or a hash of a local folder's weights.

        None for large local folders.
        """
        commit: str | None = getattr(model.config, "_commit_hash", None)
        if Path(self.path).parent.name == "snapshots":  # the hub's cache names folders by commit
            commit = Path(self.path).name
        files = sorted(Path(self.path).glob("*.safetensors"))
        if commit or not files or sum(file.stat().st_size for file in files) > _HASHED_BYTES:
            return commit
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
        return f"sha256:{digest.hexdigest()[:16]}"


def fingerprint(folder: str | Path) -> str:
    """A digest of everything in a model folder that can change an answer.

    Config, processor, tokenizer, chat template, generation settings, weights.

    Small files count in full, weight files by their size, their beginning and `_BLOCKS` blocks
    spread over them: another training changes every block. Of a hub id that is no folder here the
    digest is that of its name; its commit is told elsewhere.
    """
    digest = hashlib.sha256()
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    if not files:
        return hashlib.sha256(str(folder).encode()).hexdigest()
    for path in sorted(files):
        size = path.stat().st_size
        # Name and size before the content: bytes that move from one file to another change the
        # digest.
        digest.update(f"{path.relative_to(folder)} {size}\n".encode("utf-8", "surrogateescape"))
        with open(path, "rb") as file:
            if size <= _HASHED_BYTES:
                digest.update(file.read())
                continue
            for block in range(_BLOCKS):
                # Evenly spread from the first byte to the last: the first block holds the header of
                # a safetensors file, so a change of shapes or names is seen, too.
                file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def locate(name: str, *, allow_download: bool = False) -> Checkpoint:
    """The checkpoint called `name`: "scenes", a folder, or a hub id.

    Raises:
        InputError: no such folder, a folder without config.json, a name that can be none of the
            three.
    """
    # First of all, so that a folder of that name in the working directory is not taken for it.
    if name == EMBEDDED:
        if not (MODEL_DIR / "config.json").is_file():
            raise InputError(
                f"the embedded model is missing from {MODEL_DIR}: install the package again"
            )
        return Checkpoint(name, str(MODEL_DIR), True)
    path = user_path(name)
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise InputError(_adapter(path))
            raise InputError(
                f"{path} holds no config.json, so it is not a model folder: pass one made by"
                " save_pretrained"
            )
        if (path / "adapter_config.json").is_file():
            # With peft installed, transformers would load the adapter's base model from wherever
            # the adapter names it, and the adapter's weights in formats other than safetensors.
            raise InputError(_adapter(path))
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
        # A word without "/" is no hub id of somebody's: most likely a misspelled "scenes".
        near = difflib.get_close_matches(name, [EMBEDDED])
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"possible: {EMBEDDED!r}, a model folder, or a hub id 'org/name'"
        )
        raise InputError(f"unknown model {name!r}: {hint}")
    if allow_download:
        return Checkpoint(name, name, False)
    folder = cached_folder(name)
    if folder is None:
        raise InputError(
            f"{name} is neither a folder here nor in the local cache: check the name, or allow"
            " fetching it from the hub with --download (allow_download=True in Python)"
        )
    return Checkpoint(name, str(folder), True)


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
    with blamed_on_input(f"cannot read the config of {name}"):
        file = checkpoint.file("config.json")
    if file is not None:
        # Before transformers reads it: some classes make lists as long as the numbers in it say.
        check_config(read_json(file, f"the config of {name}"), name)
    try:
        with checkpoint.network(), blamed_on_input(f"cannot read the config of {name}"):
            config = AutoConfig.from_pretrained(checkpoint.path, **checkpoint.options)
    except InputError as error:
        if isinstance(error.__cause__, OSError) and not checkpoint.local:
            raise InputError(f"cannot fetch {name}: {one_line(error.__cause__)}") from error
        if isinstance(error.__cause__, ValueError):
            raise InputError(
                f"{name} is of a type this transformers does not know, or needs code from its"
                f" repository, which is never run: {one_line(error.__cause__)}"
            ) from error
        raise
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise InputError(
            f"{name} is a text-only model or not a language model (type {config.model_type!r});"
            f" pass a vision-language model such as {EMBEDDED!r}, LLaVA, Qwen-VL, InternVL or"
            " Gemma 3"
        )
    return without_attention(config)


def read_weights(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    *,
    dtype: str | torch.dtype,
    attn_implementation: str,
) -> PreTrainedModel:
    """The model with its weights, on the CPU.

    Args:
        checkpoint: where the weights are.
        config: as `read_config` returned it.
        dtype: floating type of the weights, or "auto" for the checkpoint's own.
        attn_implementation: attention backend of transformers.

    Raises:
        InputError: weights that are damaged, incomplete, of other shapes, or not safetensors; an
            attention backend that is unknown, not installed or not offered by the model.
    """
    name = checkpoint.name
    check_attention(attn_implementation)
    _check_generation_config(checkpoint)
    if (index := checkpoint.file("model.safetensors.index.json")) is not None:
        # Files that the index lists may be fetched later where downloads are allowed.
        check_weight_files(index.parent, name, fetched=checkpoint.local)
    try:
        with checkpoint.network(), blamed_on_input(f"cannot load the weights of {name}"):
            model, info = AutoModelForImageTextToText.from_pretrained(
                checkpoint.path,
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                output_loading_info=True,
                **checkpoint.options,
            )
    except InputError as error:
        # The library's own exception as the cause; the InputError in between adds nothing.
        raise _about_weights(name, attn_implementation, error) from error.__cause__
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
    # What was asked for, not where it lies on this machine: recordings say it.
    model.name_or_path = model.config.name_or_path = name
    return model


def _check_generation_config(checkpoint: Checkpoint) -> None:
    """Refuse generation settings that cannot be read; transformers would use its own instead.

    Raises:
        InputError: there is a generation_config.json that is not JSON or holds impossible values.
    """
    if checkpoint.file(GENERATION_CONFIG_NAME) is None:
        return
    try:
        with checkpoint.network(), blamed_on_input("cannot read it"):
            settings = GenerationConfig.from_pretrained(
                checkpoint.path, local_files_only=checkpoint.local
            )
    except InputError as error:
        raise InputError(
            f"cannot read {GENERATION_CONFIG_NAME} of {checkpoint.name}"
            f" ({one_line(error.__cause__ or error)}): repair it, or remove it to generate with"
            " the defaults"
        ) from error
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(settings, key, None)
        ids = value if isinstance(value, (list, tuple)) else [value]
        # `type`, because True and False are ints to `isinstance`.
        if value is not None and not all(type(one) is int for one in ids):
            raise InputError(
                f"{GENERATION_CONFIG_NAME} of {checkpoint.name} has {key} = {value!r}: it must be"
                " the number of a token, or a list of numbers"
            )


def _about_weights(name: str, attention: str, error: InputError) -> InputError:
    """What an error of transformers says about the weights of a model."""
    cause = error.__cause__
    if cause is None:
        return error
    if isinstance(cause, SafetensorError):
        return InputError(
            f"the weights of {name} are damaged ({cause}): copy or download them again"
        )
    if isinstance(cause, RuntimeError):
        return InputError(f"the weights of {name} do not fit its config.json: {one_line(cause)}")
    if isinstance(cause, OSError):
        return InputError(
            f"no usable safetensors weights for {name} ({one_line(cause)}); other weight formats"
            " are not read: convert them with save_pretrained"
        )
    if isinstance(cause, (ValueError, ImportError)):
        return InputError(f"cannot load {name} with attention {attention!r}: {one_line(cause)}")
    return error


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
