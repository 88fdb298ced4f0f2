"""Observe attention: load a model, record what its heads look at, and reduce that to labelled numbers.

Everything here looks on from outside; whatever changes a model's computation lives in `avl`. The public names are
imported when first used, so that `avl --help`, the statistics and the figures start without loading transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avl_analysis.calibration import Evidence as Evidence
    from avl_analysis.calibration import calibrate as calibrate
    from avl_analysis.comparing import compare as compare
    from avl_analysis.comparison import Comparison as Comparison
    from avl_analysis.comparison import load_comparison as load_comparison
    from avl_analysis.errors import InputError as InputError
    from avl_analysis.models import VLM as VLM
    from avl_analysis.models import load_model as load_model
    from avl_analysis.policy_files import load_policy as load_policy
    from avl_analysis.policy_files import save_policy as save_policy
    from avl_analysis.recorder import record as record
    from avl_analysis.recording import Recording as Recording
    from avl_analysis.recording import load_recording as load_recording
    from avl_analysis.recording import merge as merge
    from avl_analysis.samples import Sample as Sample
    from avl_analysis.samples import read_samples as read_samples
    from avl_analysis.samples import scene_samples as scene_samples

_HOME = {  # public name -> module it lives in; no module may have the name of something public
    "Comparison": "comparison",
    "Evidence": "calibration",
    "InputError": "errors",
    "Recording": "recording",
    "Sample": "samples",
    "VLM": "models",
    "calibrate": "calibration",
    "compare": "comparing",
    "load_comparison": "comparison",
    "load_model": "models",
    "load_policy": "policy_files",
    "load_recording": "recording",
    "merge": "recording",
    "read_samples": "samples",
    "record": "recorder",
    "save_policy": "policy_files",
    "scene_samples": "samples",
}

__all__ = [
    "VLM",
    "Comparison",
    "Evidence",
    "InputError",
    "Recording",
    "Sample",
    "calibrate",
    "compare",
    "load_comparison",
    "load_model",
    "load_policy",
    "load_recording",
    "merge",
    "read_samples",
    "record",
    "save_policy",
    "scene_samples",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public are {', '.join(sorted(_HOME))}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
