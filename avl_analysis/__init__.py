"""Observe attention: load a model, record its heads, reduce that to labelled numbers.

Nothing here changes what a model computes; what changes a model's computation lives in `avl`. The
public names are imported when first used, so that `avl --help`, the statistics and the figures
start without loading transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avl_analysis.calibration.calibrate import Evidence as Evidence
    from avl_analysis.calibration.calibrate import calibrate as calibrate
    from avl_analysis.capture.recorder import record as record
    from avl_analysis.corpus.questions import Sample as Sample
    from avl_analysis.corpus.questions import read_samples as read_samples
    from avl_analysis.corpus.questions import scene_samples as scene_samples
    from avl_analysis.errors import InputError as InputError
    from avl_analysis.evaluation.compare import compare as compare
    from avl_analysis.evaluation.comparison import Comparison as Comparison
    from avl_analysis.evaluation.comparison import load_comparison as load_comparison
    from avl_analysis.evaluation.policy_files import load_policy as load_policy
    from avl_analysis.evaluation.policy_files import save_policy as save_policy
    from avl_analysis.map_plots import plot_grounding as plot_grounding
    from avl_analysis.map_plots import plot_patch_names as plot_patch_names
    from avl_analysis.map_plots import plot_patch_words as plot_patch_words
    from avl_analysis.map_plots import plot_pointing as plot_pointing
    from avl_analysis.map_plots import plot_relevance as plot_relevance
    from avl_analysis.models.loading import VLM as VLM
    from avl_analysis.models.loading import load_model as load_model
    from avl_analysis.models.videos import Video as Video
    from avl_analysis.plots import plot as plot
    from avl_analysis.plots import plot_frontier as plot_frontier
    from avl_analysis.plots import plot_heads as plot_heads
    from avl_analysis.plots import plot_knockout as plot_knockout
    from avl_analysis.plots import plot_overlay as plot_overlay
    from avl_analysis.plots import plot_patches as plot_patches
    from avl_analysis.recordings.recording import Recording as Recording
    from avl_analysis.recordings.recording import load_recording as load_recording
    from avl_analysis.recordings.recording import merge as merge

_HOME = {  # public name -> module it lives in; no module may have the name of something public
    "Comparison": "evaluation.comparison",
    "Evidence": "calibration.calibrate",
    "InputError": "errors",
    "Recording": "recordings.recording",
    "Sample": "corpus.questions",
    "VLM": "models.loading",
    "Video": "models.videos",
    "calibrate": "calibration.calibrate",
    "compare": "evaluation.compare",
    "load_comparison": "evaluation.comparison",
    "load_model": "models.loading",
    "load_policy": "evaluation.policy_files",
    "load_recording": "recordings.recording",
    "merge": "recordings.recording",
    "plot": "plots",
    "plot_overlay": "plots",
    "plot_patches": "plots",
    "plot_frontier": "plots",
    "plot_heads": "plots",
    "plot_grounding": "map_plots",
    "plot_knockout": "plots",
    "plot_patch_names": "map_plots",
    "plot_patch_words": "map_plots",
    "plot_pointing": "map_plots",
    "plot_relevance": "map_plots",
    "read_samples": "corpus.questions",
    "record": "capture.recorder",
    "save_policy": "evaluation.policy_files",
    "scene_samples": "corpus.questions",
}

__all__ = [
    "VLM",
    "Comparison",
    "Evidence",
    "InputError",
    "Recording",
    "Sample",
    "Video",
    "calibrate",
    "compare",
    "load_comparison",
    "load_model",
    "load_policy",
    "load_recording",
    "merge",
    "plot",
    "plot_overlay",
    "plot_patches",
    "plot_frontier",
    "plot_heads",
    "plot_grounding",
    "plot_knockout",
    "plot_patch_names",
    "plot_patch_words",
    "plot_pointing",
    "plot_relevance",
    "read_samples",
    "record",
    "save_policy",
    "scene_samples",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; public are {', '.join(sorted(_HOME))}"
        )
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
