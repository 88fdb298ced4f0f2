"""Observe attention: load a model, record what its heads look at, and reduce that to labelled numbers.

Everything here looks on from outside; whatever changes a model's computation lives in `avl`. The public names are
imported when first used, so that `avl --help`, the statistics and the figures start without loading transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avl_analysis.errors import InputError as InputError
    from avl_analysis.models import VLM as VLM
    from avl_analysis.models import load_model as load_model

_HOME = {"InputError": "errors", "VLM": "models", "load_model": "models"}  # public name -> module it lives in

__all__ = ["VLM", "InputError", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public are {', '.join(sorted(_HOME))}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
