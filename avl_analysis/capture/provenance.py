"""Where a recording comes from, as flat attributes that fit into a file.

Model, libraries, date, settings.

This is the only place that names the model in a recording, a comparison or an ablation, so that
what was recorded of one model by different ways can be merged.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
import transformers
import xarray as xr
from torch import nn

from avl.families import Family
from avl.kernels import backend_for
from avl_analysis.models.loading import name_and_revision
from avl_analysis.statistics import Statistic


def provenance(model: nn.Module, family: Family, statistics: Sequence[Statistic]) -> dict[str, str]:
    """Attributes of a recording of `model` made now."""
    config: Any = getattr(model, "config", None)
    name, revision = name_and_revision(model)
    # Type and device of the first parameter stand for the model; layers may lie on several devices.
    parameters = next(model.parameters(), None)
    return {
        "model": name,
        "model_class": type(model).__name__,
        "model_type": str(getattr(config, "model_type", "")),
        "model_revision": revision,
        "attention_backend": str(
            getattr(config.get_text_config(decoder=True), "_attn_implementation", "")
        ).removeprefix("avl_"),
        "query_heads": str(family.query_heads),
        "kv_heads": str(family.kv_heads),
        "layers": str(family.layers),
        "dtype": str(parameters.dtype).removeprefix("torch.") if parameters is not None else "",
        "device": str(parameters.device) if parameters is not None else "",
        "kernels": backend_for(parameters.device) if parameters is not None else "",
        "statistics": " ".join(repr(statistic) for statistic in statistics),
        "seed": str(torch.initial_seed()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "libraries": " ".join(
            f"{name}={value}"
            for name, value in {
                "avl-analysis": _version("avl-analysis"),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "numpy": np.__version__,
                "xarray": xr.__version__,
            }.items()
        ),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
