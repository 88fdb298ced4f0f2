"""A recording as the figures see it.

Which model, how many samples, what was asked, what the picture looked like.

Everything a figure needs is in the one recording file; pictures either lie in it as thumbnails or,
for drawn scenes, are drawn again from their seed. `Section` is what a figure module hands back: the
question, the described figure, and what it finds. A figure that the recording cannot answer raises
`NotMeasured` with the reason, which the report prints in its place.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from avl_analysis import scenes
from avl_analysis.corpus.regions import Region, boxes_of, only_image, regions_of
from avl_analysis.errors import InputError
from avl_analysis.evaluation.comparison import Comparison, load_comparison
from avl_analysis.figures import Animation, Box, Caption, Figure, shown_model
from avl_analysis.heads.ablation import Ablation, load_ablation
from avl_analysis.intervals import METHOD
from avl_analysis.models.images import open_image
from avl_analysis.recordings.image_tokens import ImageTokens
from avl_analysis.recordings.origin import Origin, check_same_model
from avl_analysis.recordings.recording import Recording, load_recording
from avl_reports.findings import Finding
from avl_reports.frontiers import Frontier, load_frontier
from avl_reports.further import KINDS, read_further


class NotMeasured(InputError):
    """The recording does not hold what a figure shows; the message says what is missing."""


class NotAsked(NotMeasured):
    """The question does not arise: it is about videos, say, and no sample shows one.

    A report leaves such a figure out without a word.
    """


@dataclass(frozen=True)
class Section:
    """One question and its answer.

    Attributes:
        question: what the figure is asked.
        figure: the figure.
        findings: what it says about A-VL's choices.
        text: how to read it, one or two sentences.
        moving: an animation that goes with the figure, shown on the page and written to files of
            its own.
        table: rows of text below the figure, the first one the header.
    """

    question: str
    figure: Figure
    findings: tuple[Finding, ...] = ()
    text: str = ""
    moving: Animation | None = None
    table: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Example:
    """One recorded sample with what is known about it; empty where nothing is.

    Attributes:
        name: its name in the recording.
        prompt, answer, truth, task: question, the model's answer, the expected answer, the kind of
            question.
        words: text of the token each step produced.
        boxes: where in the picture the question is about, in pixels of `picture`.
        regions: what the word produced at each step is about; empty where unknown.
        picture: (height, width, 3) uint8, None where it is not kept.
        frames: of a video, the frames that were shown, as `picture`; `boxes` then hold one box for
            every frame.
    """

    name: str
    prompt: str = ""
    answer: str = ""
    truth: str = ""
    task: str = ""
    words: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    regions: tuple[Region, ...] = ()
    picture: NDArray[np.uint8] | None = None
    frames: tuple[NDArray[np.uint8], ...] = ()

    @property
    def correct(self) -> bool:
        """Whether the model gave the expected answer; False where none is known."""
        return bool(self.truth) and self.answer.strip() == self.truth.strip()


class Run:
    """A recording with its samples, and what else was measured of the model.

    Args:
        recording: of at least one sample.
        comparison: policies against the full cache; ablations: heads silenced; frontier: accuracy
            against bytes.
        further: other measurements by name, see `avl_reports.further`.

    Raises:
        NotMeasured: an empty recording.
        InputError: parts that were measured on another model.
    """

    def __init__(
        self,
        recording: Recording,
        comparison: Comparison | None = None,
        ablations: Sequence[Ablation] = (),
        frontier: Frontier | None = None,
        further: Mapping[str, xr.Dataset] | None = None,
    ) -> None:
        if not len(recording):
            raise NotMeasured("the recording holds no samples, so there is nothing to report")
        # Numbers of two models must not stand in one report. What a file does not say about its
        # model is not held against it (`check_same_model`).
        origin = Origin.of_attrs("the recording", recording.attrs)
        for part in (comparison, *ablations, frontier):
            if part is not None:
                check_same_model(origin, part.origin)
        for name, dataset in (further or {}).items():
            check_same_model(origin, Origin.of_attrs(f"the {name} file", dataset.attrs))
        self.recording, self._further = recording, dict(further or {})
        self._comparison, self._ablations, self._frontier = comparison, tuple(ablations), frontier

    @property
    def comparison(self) -> Comparison:
        """Raises NotMeasured if there is none."""
        if self._comparison is None:
            raise NotMeasured(
                "no policies were compared; pass a comparison as `avl compare --out compare.nc`"
                " writes it"
            )
        return self._comparison

    @property
    def ablations(self) -> tuple[Ablation, ...]:
        """Raises NotMeasured if there is none."""
        if not self._ablations:
            raise NotMeasured(
                "no heads were silenced; pass an ablation as `avl ablate --out ablation.json`"
                " writes it"
            )
        return self._ablations

    @property
    def frontier(self) -> Frontier:
        """Raises NotMeasured if there is none."""
        if self._frontier is None:
            raise NotMeasured(
                "accuracy against bytes was not measured; pass a file that `avl frontier` wrote"
            )
        return self._frontier

    def further(self, name: str) -> xr.Dataset:
        """A measurement of `avl_reports.further`. Raises NotMeasured if there is none."""
        if name not in self._further:
            # The message names the command that makes the file.
            raise NotMeasured(KINDS[name].missing)
        return self._further[name]

    def __getitem__(self, name: str) -> xr.DataArray:
        """A statistic per sample. Raises NotMeasured if the recording does not hold it."""
        try:
            return self.recording[name]
        except KeyError as error:
            raise NotMeasured(f"the recording holds no statistic {name!r}") from error

    @property
    def n(self) -> int:
        return len(self.recording)

    @property
    def model(self) -> str:
        """The model's name for readers; where it lay is among the recording's attributes."""
        return shown_model(str(self.recording.attrs.get("model") or "unknown model"))

    def decode(self, name: str) -> xr.DataArray:
        """A statistic at the decode steps alone (step 1 and later).

        Raises NotMeasured if nothing was decoded.
        """
        # Labels, not places: step 0 is the last prompt row. A recording that decoded nothing has
        # step 0 only, or NaN in all others.
        steps = self[name].sel(step=slice(1, None))
        if not steps.sizes["step"] or not bool(np.isfinite(steps).any()):
            raise NotMeasured(
                f"{name} was not measured at any decode step; generate at least two tokens while"
                " recording"
            )
        return steps

    def caption(self, what: str, n: int | None = None) -> Caption:
        return Caption(what, self.n if n is None else n, self.model, METHOD)

    @cached_property
    def examples(self) -> list[Example]:
        """All samples, in the recording's order."""
        return [
            example(name, self.recording.facts(name), only_image(self.recording, name))
            for name in self.recording.samples
        ]


def load_run(
    path: str | PathLike[str],
    comparison: str | PathLike[str] | None = None,
    ablations: Sequence[str | PathLike[str]] = (),
    frontier: str | PathLike[str] | None = None,
    further: Sequence[str] = (),
) -> Run:
    """Read a recording file, and files of what else was measured, for reporting.

    Args:
        path: of the recording.
        comparison: of `avl compare`.
        ablations: of `avl ablate`.
        frontier: of `avl frontier`.
        further: "NAME=FILE" texts, see `avl_reports.further`.

    Raises:
        RecordingError, InputError: unreadable or foreign files.
        NotMeasured: an empty recording.
    """
    return Run(
        load_recording(path),
        None if comparison is None else load_comparison(comparison),
        [load_ablation(one) for one in ablations],
        None if frontier is None else load_frontier(frontier),
        read_further(further),
    )


def example(name: str, facts: Mapping[str, Any], image: ImageTokens | None = None) -> Example:
    """A sample from the facts annotated on it; unknown facts are ignored, missing ones stay empty.

    Args:
        name: of the sample.
        facts: annotated on it.
        image: the tokens of its one image, None where there is none or several.
    """
    words = tuple(str(word) for word in facts.get("words", ()))
    prompt, answer, truth, task = (
        str(facts.get(key) or "") for key in ("prompt", "answer", "truth", "task")
    )
    # One region for each word; none where the answer is known to be wrong or no part is known.
    regions = tuple(regions_of(facts, image))
    found = Example(
        name, prompt, answer, truth, task, words, boxes_of(facts.get("boxes", ())), regions
    )
    # Pictures of one's own lie in the recording as thumbnails, while boxes are given in pixels of
    # the picture that was asked about; `_reduced` brings the two together.
    if not (scene := facts.get("scene")):
        frames = [_thumbnail(address) for address in facts.get("frames", ())]
        found = replace(
            found,
            picture=_thumbnail(facts.get("picture")),
            # A frame that is not kept as a thumbnail drops out, and those behind it move forward.
            frames=tuple(frame for frame in frames if frame is not None),
        )
        return _reduced(found, facts.get("picture_size"))
    # Drawn again in full size from seed and index, so boxes fit without a change.
    drawn = scenes.generate(int(scene["seed"]), int(scene["index"]), scene["task"])
    return replace(found, picture=drawn.image)


def _reduced(found: Example, size: Any) -> Example:
    """The example with its boxes where they are on the thumbnail.

    `size` is that of the picture they were given for.
    """
    # The first frame stands for all frames of a video.
    shown = found.picture if found.picture is not None else next(iter(found.frames), None)
    if shown is None or not size:
        return found
    # Thumbnail pixels per pixel of the picture; `size` is (width, height), a shape (height, width,
    # 3).
    wide, high = shown.shape[1] / size[0], shown.shape[0] / size[1]

    def on_thumbnail(boxes: tuple[Box, ...]) -> tuple[Box, ...]:
        return tuple(
            Box(b.left * wide, b.top * high, b.right * wide, b.bottom * high, b.label)
            for b in boxes
        )

    regions = tuple(replace(region, boxes=on_thumbnail(region.boxes)) for region in found.regions)
    return replace(found, boxes=on_thumbnail(found.boxes), regions=regions)


def _thumbnail(address: object) -> NDArray[np.uint8] | None:
    """A picture kept as a "data:" address."""
    # Paths and web addresses are not followed: a report shows nothing from outside the recording.
    if not isinstance(address, str) or not address.startswith("data:image/"):
        return None
    return np.asarray(open_image(base64.b64decode(address.partition(",")[2])))
