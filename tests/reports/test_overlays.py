"""What is drawn over an image lies where the model sees it.

For every family an image is given to a model under `generate` while it is recorded; then a part of
the image is painted over and the model's own image features say which tokens stand for that part.
A map that is lit on exactly these tokens is put into the recording and drawn by the report's
figures, and the lit pixels of the drawing are compared with the painted part. No code that places
tokens is asked for the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from avl_analysis.capture.recorder import record
from avl_analysis.conformance.build import Case, quiet
from avl_analysis.conformance.inputs import image_features, parts, pixels
from avl_analysis.conformance.painting import silenced
from avl_analysis.figures import Overlay, draw_matplotlib, draw_plotly
from avl_analysis.figures.pictures import data_uri
from avl_analysis.recordings.recording import Recording
from avl_reports import fig_head_maps, fig_overlay, fig_sets
from avl_reports.run import Run
from tests.avl_analysis.figures import specs
from tests.avl_analysis.models.folders import skipped_without_processor

LARGE = {"image_size": 168, "patch_size": 14}
SMALL = {"image_size": 56, "patch_size": 7}
FAMILIES = {
    # type: size of the image, size of the vision tower, painted part (fractions)
    "llava": ((640, 427), LARGE, (0.0, 0.0, 0.5, 0.6)),
    "llava_next": ((640, 427), SMALL, (0.5, 0.25, 1.0, 1.0)),
    "internvl": ((640, 427), SMALL, (0.0, 0.5, 0.5, 1.0)),
    "smolvlm": ((640, 427), {}, (0.5, 0.0, 1.0, 0.5)),
    "qwen2_5_vl": ((896, 504), {}, (0.0, 0.0, 0.25, 1.0)),
}
SEEN = {"llava": ((640 - 427) / 2 / 640, 0.0, 1 - (640 - 427) / 2 / 640, 1.0)}
"""The part of the image that a model sees, where that is not all of it."""


def noise(size: tuple[int, int]) -> Image.Image:
    """Grey blocks of 4 pixels, so that resizing leaves something of them."""
    draw = np.random.default_rng(0).integers(60, 190, (size[1] // 4 + 1, size[0] // 4 + 1, 3))
    return Image.fromarray(draw.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


class Lit:
    """A recorded answer about an image, and the tokens that stand for a painted part of it."""

    def __init__(self, model_type: str) -> None:
        size, vision, part = FAMILIES[model_type]
        case = Case(model_type)
        for name, value in vision.items():
            old = getattr(case.config.vision_config, name)
            setattr(
                case.config.vision_config, name, [value] * 2 if isinstance(old, list) else value
            )
        if getattr(case.config, "image_grid_pinpoints", None):
            side = case.config.vision_config.image_size
            case.config.image_grid_pinpoints = [
                [side, 2 * side],
                [2 * side, side],
                [2 * side, 2 * side],
            ]
        self.case, self.part, self.image = case, part, noise(size)
        with record(case.model, statistics=["modality_mass"]) as recording:
            case.model.generate(**case.asking(self.image), max_new_tokens=4, do_sample=False)
        self.tokens = self._changed()
        self.recording = self._with_map(recording)

    def _changed(self) -> np.ndarray:
        """Image tokens whose features change when the part is painted."""
        width, height = self.image.size
        left, top, right, bottom = self.part
        painted = self.image.copy()
        box = tuple(round(v) for v in (left * width, top * height, right * width, bottom * height))
        painted.paste((255, 0, 0), box)
        model = silenced(self.case.model)
        plain, other = (self._features(model, image) for image in (self.image, painted))
        difference = (plain - other).abs().amax(-1)
        # Resampling spreads some of the paint to neighbours, which change less.
        return (difference > 0.3 * difference.max()).numpy()

    @torch.no_grad()
    def _features(self, model: Any, image: Image.Image) -> torch.Tensor:
        with quiet():
            given = pixels(self.case.model_type, self.case.config, [image])
        return torch.cat(list(parts(image_features(model, given))))

    def _with_map(self, recording: Recording) -> Recording:
        lit = self.tokens / self.tokens.sum()
        maps = recording.data["maps"]
        assert maps.sizes["token"] == lit.size
        for name in ("image_score", "image_score_last"):
            maps[name][:] = lit
        pixels = np.asarray(self.image)
        recording.annotate(
            words=["a", "b", "c", "d"],
            answer="a b c d",
            prompt="what?",
            picture=data_uri(pixels),
            picture_size=list(self.image.size),
        )
        return recording

    def expected(self, height: int, width: int, margin: float) -> tuple[np.ndarray, np.ndarray]:
        """Pixels that must be lit, and pixels that must not, of an image drawn at this size.

        Pixels nearer to the edge of the part than `margin`, a fraction, may be either.
        """
        x = (np.arange(width) + 0.5) / width
        y = ((np.arange(height) + 0.5) / height)[:, None]
        left, top, right, bottom = self.part
        seen = SEEN.get(self.case.model_type, (0.0, 0.0, 1.0, 1.0))

        def inside(grown: float) -> np.ndarray:
            across = (x > max(left - grown, seen[0])) & (x < min(right + grown, seen[2]))
            return across & (y > max(top - grown, seen[1])) & (y < min(bottom + grown, seen[3]))

        return inside(-margin), ~inside(margin)


@pytest.fixture(scope="module", params=list(FAMILIES))
def lit(request: pytest.FixtureRequest) -> Lit:
    with skipped_without_processor():
        return Lit(request.param)


def drawn_on_paper(panel: Overlay) -> np.ndarray:
    """(height, width): how yellow each pixel of the drawn image is; the image itself is grey."""
    dark = Overlay(np.zeros_like(panel.picture), panel.value, panel.patches, panel.classes)
    figure = specs.figure("one", dark, columns=1)
    canvas = draw_matplotlib.draw(figure)
    canvas.set_dpi(200)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    agg = FigureCanvasAgg(canvas)
    agg.draw()
    frame = canvas.axes[0].get_window_extent()
    everything = np.asarray(agg.buffer_rgba())[..., :3].astype(float)
    rows = everything.shape[0]
    cut = everything[
        round(rows - frame.y1) : round(rows - frame.y0), round(frame.x0) : round(frame.x1)
    ]
    return cut[..., 0] - cut[..., 2]


def drawn_on_screen(panel: Overlay) -> np.ndarray:
    """(height, width): the heat map's value at each pixel of the image, 0 where it has none."""
    height, width = panel.picture.shape[:2]
    heat = next(trace for trace in draw_plotly.draw(panel).data if trace.type == "heatmap")
    x, y, z = (np.asarray(values, float) for values in (heat.x, heat.y, heat.z))
    column = np.searchsorted(x, np.arange(width) + 0.5) - 1
    row = np.searchsorted(y, np.arange(height) + 0.5) - 1
    shown = np.zeros((height, width))
    for i, j in np.ndindex(z.shape):
        shown[np.ix_(row == i, column == j)] = z[i, j]
    return np.nan_to_num(shown)


def maps_of(figure: Any) -> list[Overlay]:
    return [panel for panel in figure.panels if panel.patches is not None]


@pytest.mark.parametrize("section", [fig_overlay.section, fig_head_maps.section])
@pytest.mark.parametrize("draw", [drawn_on_paper, drawn_on_screen])
def test_a_map_lit_on_the_tokens_of_a_part_of_the_image_lights_that_part_of_the_drawing(
    lit: Lit, section: Callable[[Run], Any], draw: Callable[[Overlay], np.ndarray]
) -> None:
    panel = maps_of(section(Run(lit.recording)).figure)[0]
    shown = draw(panel)
    on, off = lit.expected(*shown.shape, margin=0.09)
    bright = shown > 0.5 * shown.max()
    assert on.mean() > 0.03
    assert bright[on].mean() > 0.99
    assert bright[off].mean() < 0.01


def test_sets_of_tokens_are_drawn_where_the_tokens_lie(lit: Lit) -> None:
    """The lit tokens are fewer than are held, so all of them are held: blue or amber."""
    section = fig_sets.section(Run(lit.recording))
    patches = maps_of(section.figure)[0].patches
    assert patches is not None
    held = patches.values[lit.tokens] > 0
    if lit.tokens.mean() < fig_sets.SECONDARY:
        assert held.all()
    height, width = 400, 600
    seen = patches.raster.pixels(height, width)
    on, off = lit.expected(height, width, margin=0.09)
    chosen = np.append(lit.tokens, False)[seen]
    assert chosen[on].mean() > 0.99
    assert chosen[off].mean() < 0.01
