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
    from avl_analysis.recorder import record as record
    from avl_analysis.recording import Recording as Recording
    from avl_analysis.recording import load_recording as load_recording
    from avl_analysis.recording import merge as merge

_HOME = {  # public name -> module it lives in
    "InputError": "errors",
    "Recording": "recording",
    "VLM": "models",
    "load_model": "models",
    "load_recording": "recording",
    "merge": "recording",
    "record": "recorder",
}

__all__ = ["VLM", "InputError", "Recording", "load_model", "load_recording", "merge", "record"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public are {', '.join(sorted(_HOME))}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
