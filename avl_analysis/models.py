"""Load a vision-language model and put pictures and words into the form it was trained on.

`load_model` reads the embedded model, a local folder or a hub id through the same `from_pretrained` calls, checks at
the door what would otherwise fail late or silently (text-only models, folders without a processor, checkpoints that do
not cover the model), and returns a `VLM`: model, processor, where they come from, and `prepare`, which turns pictures
and prompts into model inputs. Weights are read from safetensors only and no code from a repository is ever run.

It knows nothing about attention or policies: `vlm.model` is a stock transformers model, and everything else in the
project takes such a model wherever it was loaded.

What surprises: images are always preprocessed by the PIL backend, because the torchvision one resizes slightly
differently and the same picture would give other numbers on other machines; on a CPU the default type is float32
whatever the checkpoint holds, because half precision is slower there and rounds attention visibly.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
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
    BatchFeature,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from avl_analysis.errors import InputError
from avl_analysis.images import ImageSource, open_image
from avl_analysis.prompts import Conversation, picture_rows, render

EMBEDDED = "scenes"
"""Name of the model that comes with the package."""

DTYPES = ("float32", "bfloat16", "float16")
"""Floating types a model can be loaded in by name."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HASHED_BYTES = 256 * 2**20  # folders up to this size get a content hash as revision


@dataclass(frozen=True)
class VLM:
    """A loaded vision-language model with what is needed to ask it something.

    Attributes:
        name: what it was asked for by: "scenes", a folder, a hub id.
        model: the transformers model, in eval mode.
        processor: its processor; the tokenizer pads on the left.
        path: folder or hub id it was read from.
        revision: hub commit, or "sha256:..." of a local folder's weights; None where neither is known.
        description: one line for people: class, parameters, type, device.
    """

    name: str
    model: PreTrainedModel
    processor: ProcessorMixin
    path: str
    revision: str | None
    description: str

    def prepare(
        self,
        images: ImageSource | Sequence[Any] | None,
        prompt: str | Sequence[str],
        *,
        system: str | None = None,
        history: Sequence[tuple[str, str]] | None = None,
    ) -> BatchFeature:
        """Model inputs for one prompt, or for a batch of prompts padded on the left.

        The chat template is applied where the processor has one; otherwise the plain form `<image>\\nprompt` is used.
        Pictures come first in the conversation, unless the prompts themselves say where each belongs by containing the
        processor's image placeholder (`<image>` for LLaVA) exactly as often as there are pictures.

        Args:
            images: for one prompt a picture or a list of pictures; for a list of prompts a list of the same length,
                each entry a picture or a list of pictures. An empty list asks without a picture, on purpose.
            prompt: the question, or a list of questions.
            system: system prompt, the same for every row.
            history: earlier (question, answer) pairs; single prompts only. Pictures belong to the first question.

        Returns:
            `input_ids` and `attention_mask` (rows, length), the picture tensors of the family, on the model's device
            and in its floating type: pass it on as `model(**inputs)` or `model.generate(**inputs)`.

        Raises:
            InputError: no picture, unreadable pictures, empty prompts, lists of different length, placeholders that do
                not match the pictures, a template that drops what it was given, prompts longer than the model can take.
        """
        rows = [[open_image(source) for source in row] for row in picture_rows(images, prompt)]
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if history and not isinstance(prompt, str):
            raise InputError("a history goes with one prompt; prepare conversations one at a time")
        texts = [
            render(self.processor, Conversation(text, len(row), system, tuple(history or ())))
            for text, row in zip(prompts, rows, strict=True)
        ]
        # Most processors accept one list per row; a row without pictures is only understood in the flat form.
        nested: Any = rows if all(rows) else [image for row in rows for image in row] or None
        try:
            inputs = self.processor(images=nested, text=texts, padding=True, return_tensors="pt")
        except (ValueError, IndexError) as error:  # raised when text and pictures do not fit together
            raise InputError(
                f"the {type(self.processor).__name__} refused {sum(map(len, rows))} picture(s) with this text: {error}"
            ) from error
        self._check_length(inputs["input_ids"].shape[1])
        return inputs.to(device=self.model.device, dtype=self.model.dtype)

    def answer(
        self,
        images: ImageSource | Sequence[Any] | None,
        prompt: str | Sequence[str],
        *,
        system: str | None = None,
        history: Sequence[tuple[str, str]] | None = None,
        max_new_tokens: int = 64,
        **generate: Any,
    ) -> str | list[str]:
        """The model's answer as text, greedy unless `generate` says otherwise; a list for a list of prompts.

        Arguments as in `prepare`; `generate` goes to `model.generate`.
        """
        inputs = self.prepare(images, prompt, system=system, history=history)
        out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **{"do_sample": False, **generate})
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        return texts[0] if isinstance(prompt, str) else texts

    def _check_length(self, length: int) -> None:
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit and length > limit:
            raise InputError(
                f"the prompt has {length} tokens, pictures included; {self.name} takes at most {limit}: "
                "shorten it or pass fewer pictures"
            )


def load_model(
    name_or_path: str | Path = EMBEDDED,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    allow_download: bool = False,
) -> VLM:
    """Load a vision-language model for inference.

    Args:
        name_or_path: "scenes" (the embedded model), a folder written by `save_pretrained`, or a hub id.
        dtype: "float32", "bfloat16", "float16", "auto" (the checkpoint's own) or a torch type; None means float32 on
            a CPU and "auto" elsewhere.
        device: torch device; None takes CUDA where there is one, else the CPU.
        attn_implementation: transformers' attention backend: "sdpa", "eager", "flash_attention_2", ...
        allow_download: whether a hub id may be fetched; otherwise it must be in the local cache already.

    Raises:
        InputError: unknown model, text-only model, folder without processor, weights that are damaged, incomplete or
            not safetensors, models that need code from their repository, backends that are not available.
    """
    name = str(name_or_path)
    path, local = _locate(name, allow_download)
    common: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    device = _device(device)
    _check_config(name, path, common, allow_download)
    processor = _load_processor(name, path, common)
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=_dtype(dtype, device),
            attn_implementation=attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **common,
        )
    except SafetensorError as error:
        raise InputError(f"the weights of {name} are damaged ({error}): copy or download them again") from error
    except RuntimeError as error:
        raise InputError(f"the weights of {name} do not fit its config.json: {_first_line(error)}") from error
    except OSError as error:
        raise InputError(
            f"no usable safetensors weights for {name} ({_first_line(error)}); other weight formats are not read: "
            "convert them with save_pretrained"
        ) from error
    except (ValueError, ImportError) as error:
        raise InputError(f"cannot load {name} with attention {attn_implementation!r}: {_first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"the checkpoint of {name} lacks {len(missing)} of the model's weights, {missing[0]} first; they would be "
            "random: save the model again, whole"
        )
    model = model.to(device).eval()
    revision = getattr(model.config, "_commit_hash", None) or _content_hash(Path(path))
    return VLM(name, model, processor, path, revision, _describe(model))


def _device(device: str | torch.device | None) -> torch.device:
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"no device {name!r} here ({_first_line(error)}): use 'cpu' or leave it out") from error


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> str | torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: possible are {', '.join(DTYPES)} and auto")
    return getattr(torch, dtype)


def _locate(name: str, allow_download: bool) -> tuple[str, bool]:
    """(what from_pretrained gets, whether only local files may be read)."""
    if name == EMBEDDED:
        from avl_analysis.scenes import MODEL_DIR

        return str(MODEL_DIR), True
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"{path} holds no config.json, so it is not a model folder: pass one made by save_pretrained"
            )
        return str(path), True
    if path.is_file():
        raise InputError(f"{path} is a file: pass the folder that holds config.json and the weights")
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise InputError(
            f"no such model folder: {path}; pass {EMBEDDED!r}, a folder made by save_pretrained, or a hub id"
        )
    if "/" not in name:
        near = difflib.get_close_matches(name, [EMBEDDED])
        hint = (
            f"did you mean {near[0]!r}?" if near else f"possible: {EMBEDDED!r}, a model folder, or a hub id 'org/name'"
        )
        raise InputError(f"unknown model {name!r}: {hint}")
    return name, not allow_download


def _check_config(name: str, path: str, common: dict[str, Any], allow_download: bool) -> None:
    try:
        config = AutoConfig.from_pretrained(path, **common)
    except OSError as error:
        if Path(path).is_dir():
            raise InputError(f"cannot read the config of {name}: {_first_line(error)}") from error
        if allow_download:
            raise InputError(f"cannot fetch {name}: {_first_line(error)}") from error
        raise InputError(
            f"{name} is neither a folder here nor in the local cache: check the name, or allow fetching it from the "
            "hub with --download (allow_download=True in Python)"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{name} is of a type this transformers does not know, or needs code from its repository, which is never "
            f"run: {_first_line(error)}"
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise InputError(
            f"{name} is a text-only model or not a language model (type {config.model_type!r}); pass a vision-language "
            f"model such as {EMBEDDED!r}, LLaVA, Qwen-VL, InternVL or Gemma 3"
        )


def _load_processor(name: str, path: str, common: dict[str, Any]) -> ProcessorMixin:
    try:
        processor = AutoProcessor.from_pretrained(path, **common)
        if getattr(processor, "image_processor", None) is None:
            raise ValueError(f"found only a {type(processor).__name__}")
        # Only the image processor may hear of a backend: passed to AutoProcessor it would end up in the tokenizer too.
        processor.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", **common)
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise InputError(
            f"{name} comes without a usable processor (tokenizer and image processor): {_first_line(error)}; "
            "save it beside the model with processor.save_pretrained"
        ) from error
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def _describe(model: PreTrainedModel) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    size = f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{type(model).__name__}, {size} parameters, {dtype} on {model.device}"


def _content_hash(folder: Path) -> str | None:
    """Short hash of a folder's weights, None for hub ids and for folders too large to read twice."""
    files = sorted(folder.glob("*.safetensors"))
    if not files or sum(file.stat().st_size for file in files) > _HASHED_BYTES:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
