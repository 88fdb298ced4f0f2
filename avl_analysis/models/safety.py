"""What is checked of a model folder before transformers reads it.

And the switch that keeps the network off.

A model folder may come from anywhere. Its config can ask for a billion layers, name a kernel of the
hub as its attention, or list weight files outside the folder or in formats that can hold code. None
of this is decided by transformers in a way that can be relied on, so it is refused here, from the
files alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from avl_analysis.errors import InputError, blamed_on_input

MOST_LAYERS = 10_000
"""Layers, blocks or experts a config may ask for; the largest published models have hundreds."""
MOST_SIZE = 2**24
"""Width of a layer or number of words a config may ask for."""
MOST_PLACES = 2**24
"""Places of a picture's grid that a config may ask for: the side of the picture / that of a
patch, squared.
"""
MOST_TOKENS = 2**18
"""Tokens a processor may make of a picture."""
MOST_SIDE = 2**16
"""Pixels of a picture's side after resizing."""
MOST_JSON = 64 * 2**20
"""Bytes of a JSON file that is read."""

# Names of fields that count layers, blocks or experts: num_hidden_layers, depths, n_experts.
_COUNTED = re.compile(r"(^|_)(n_?layers?|layers?|depth|depths|blocks?|experts)($|_)")
_TOKENS = re.compile(r"(tokens|seq_len|seq_length|patches|tiles|crops)")
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ".safetensors"


@contextmanager
def no_network() -> Iterator[None]:
    """Inside, huggingface_hub makes no request; afterwards its setting is what it was.

    `local_files_only` alone is not enough: huggingface_hub also asks for a list of known agents
    while it prepares a request that it then does not make.
    """
    from huggingface_hub import constants

    # Set on the module, because the environment variable of that name is read once, at import.
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def cached_folder(name: str) -> Path | None:
    """Where the local cache holds the hub repository `name`, or None; never asks the hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    # A file that is known not to exist is told by an object, one never asked for by None.
    return Path(config).parent if isinstance(config, str) else None


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file; `what` names it in messages.

    Raises:
        InputError: larger than `MOST_JSON`, not UTF-8, not JSON, nested too deeply, numbers of
            thousands of digits.
    """
    with blamed_on_input(f"cannot read {what}", ": repair the file, or copy it again"):
        # Asked of the file system, before any of it is read.
        if path.stat().st_size > MOST_JSON:
            raise InputError(f"{path} is larger than {MOST_JSON >> 20} MB: that is no config")
        return json.loads(path.read_text(encoding="utf-8-sig"))


def check_config(content: Any, name: str) -> None:
    """Refuse a config that is no object, or whose numbers would take all time or memory.

    Args:
        content: of config.json.
        name: the model's, for the message.

    Raises:
        InputError: see above.
    """
    if not isinstance(content, dict):
        raise InputError(
            f"the config.json of {name} holds {type(content).__name__}, not an object: pass a"
            " folder made by save_pretrained"
        )
    for place, part in _objects(content):
        for key, value in part.items():
            # Some fields have one number for each stage or layer.
            numbers = value if isinstance(value, list) else [value]
            if not numbers or not all(isinstance(n, (int, float)) for n in numbers):
                continue
            if _COUNTED.search(key) and max(numbers) > MOST_LAYERS:
                raise InputError(
                    f"the config.json of {name} asks for {place}{key} = {value}; at most"
                    f" {MOST_LAYERS} are built"
                )
            if key.endswith("_size") and max(numbers) > MOST_SIZE:
                raise InputError(
                    f"the config.json of {name} asks for {place}{key} = {value}; at most"
                    f" {MOST_SIZE} is built"
                )
        # Without a patch size every pixel counts as a place.
        side, patch = _largest(part.get("image_size")), _largest(part.get("patch_size")) or 1
        if side and (side / patch) ** 2 > MOST_PLACES:
            raise InputError(
                f"the config.json of {name} asks for {place}image_size = {part['image_size']} in"
                f" patches of {part.get('patch_size')}: more than {MOST_PLACES} places"
            )


def check_processor(content: Any, name: str) -> None:
    """Refuse settings of a processor that would make a prompt or a picture of any size.

    Args:
        content: of processor_config.json or preprocessor_config.json.
        name: the model's, for the message.

    Raises:
        InputError: more than `MOST_TOKENS` tokens for a picture, or sides of more than `MOST_SIDE`
            pixels.
    """
    for place, part in _objects(content if isinstance(content, dict) else {}):
        for key, value in part.items():
            tokens = _TOKENS.search(key) is not None and _largest(value) > MOST_TOKENS
            side = key in ("height", "width", "patch_size") and _largest(value) > MOST_SIDE
            if tokens or side:
                raise InputError(
                    f"the processor of {name} has {place}{key} = {str(value)[:40]}; at most"
                    f" {MOST_TOKENS if tokens else MOST_SIDE} is possible"
                )


def check_weight_files(folder: Path, name: str, *, fetched: bool = True) -> None:
    """Refuse an index of weight files that leads out of the folder or to another format.

    In the hub's cache the files of a folder are links to files beside it, in the same repository's
    folder; these count as inside.

    Args:
        folder: that holds the index.
        name: the model's, for the message.
        fetched: whether the files it lists must be there already.

    Raises:
        InputError: see above.
    """
    if not (folder / _INDEX).is_file():
        return
    content = read_json(folder / _INDEX, f"{_INDEX} of {name}")
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise InputError(f"{folder / _INDEX} lists no weights (no weight_map): copy it again")
    inside = folder.resolve()
    # The cache has <repository>/snapshots/<commit>, with links to <repository>/blobs.
    if inside.parent.name == "snapshots":
        inside = inside.parents[1]
    for file in sorted({str(file) for file in files.values()}):
        path = folder / file
        if Path(file).suffix != _WEIGHTS:
            raise InputError(
                f"the weights of {name} are in {file!r}, which is not a safetensors file; other"
                " formats are not read: convert them with save_pretrained"
            )
        # `resolve` follows links, so a link that leads out of the folder is refused as well.
        if Path(file).is_absolute() or not path.resolve().is_relative_to(inside):
            raise InputError(
                f"the weights of {name} are in {file!r}, outside its folder, which is not read:"
                " copy the file into the folder"
            )
        if fetched and not path.is_file():
            raise InputError(f"the weights of {name} lack the file {file!r}: copy the model again")


def without_attention(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config without the attention backend it names for itself or its parts.

    A name like org/kernel would be fetched and run.
    """
    config._attn_implementation = None
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            without_attention(part)
    return config


def check_attention(name: str) -> None:
    """Refuse the name of a kernel of the hub, and flash attention where its package is missing.

    Transformers would look for a kernel of the hub in its place.

    Raises:
        InputError: see above.
    """
    from transformers import utils

    # Names of kernels have a slash (org/kernel), which no identifier has.
    if not name.isidentifier():
        raise InputError(
            f"unknown attention {name!r}: possible are sdpa, eager and flash_attention_2; kernels"
            " of the hub are never run"
        )
    # transformers has a function for every version, such as is_flash_attn_2_available; a version
    # without one is taken as missing.
    available = getattr(utils, f"is_flash_attn_{name.rpartition('_')[2]}_available", None)
    if name.startswith("flash_attention_") and not (available is not None and available()):
        raise InputError(
            f"attention {name!r} needs the package flash-attn, which is not installed here: use"
            " sdpa or eager"
        )


def _objects(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The object and all objects in it, with where they are ("text_config.")."""
    # A list and not recursion, because the depth comes from the file.
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        place, part = waiting.pop()
        yield place, part
        for key, value in part.items():
            if isinstance(value, dict):
                waiting.append((f"{place}{key}.", value))


def _largest(value: Any) -> float:
    """A side length given as a number, a pair or named numbers; 0 where there is none."""
    if isinstance(value, dict):
        value = list(value.values())
    numbers = value if isinstance(value, list) else [value]
    # NaN is not equal to itself and is left out.
    known = [float(n) for n in numbers if isinstance(n, (int, float)) and n == n]
    return max(known, default=0.0)
