"""One line per registered model type: recorded, adapted, picture map, or the reason why not.

`check` finds out by running a tiny model; `markdown` and `parse` write and read the table that is
committed as docs/families.md and compared by the tests, so that a change of transformers or of this
project shows as a changed line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import transformers

from avl.families import UnsupportedModelError
from avl.grids import NO_PLACE
from avl_analysis.conformance.adapting import check_adapting
from avl_analysis.conformance.build import Case
from avl_analysis.conformance.painting import check_places
from avl_analysis.conformance.recording import Mismatch, check_recording
from avl_analysis.conformance.video_painting import PROCESSORS, check_video

YES = "exact"
NOT_CHECKED = "not checked"


@dataclass(frozen=True)
class Row:
    """What is true of one model type.

    Attributes:
        model_type: its name in transformers.
        recorded: "exact", or why it cannot be recorded.
        adapted: "n of m layers" that a policy acts on, or why none.
        picture_map: what is recorded of places in the picture, and how that was checked.
        pixels: what the tiny model was shown: "processor" (its own image processor) or "random".
        video: what is recorded of frames and places in a video, "-" where that was not checked.
    """

    model_type: str
    recorded: str
    adapted: str
    picture_map: str
    pixels: str
    video: str = "-"

    @property
    def is_recorded(self) -> bool:
        """Whether recording is exact."""
        return self.recorded == YES

    @property
    def is_adapted(self) -> bool:
        """Whether a policy acts on any layer."""
        return re.fullmatch(r"\d+ of \d+ layers?", self.adapted) is not None


def check(model_type: str) -> Row:
    """Build a tiny model of a type and find out.

    Raises:
        Mismatch: something that should hold does not.
    """
    case = Case(model_type)
    try:
        family = case.family
    except UnsupportedModelError as refusal:
        return Row(model_type, _reason(refusal), "-", "-", "-")
    # The model's class asks for a package that is not installed; the first line of the message
    # names it.
    except ImportError as missing:
        return Row(
            model_type, f"{NOT_CHECKED}: {str(missing).strip().splitlines()[0]}", "-", "-", "-"
        )
    if not family.image_token_ids:
        raise Mismatch(f"{model_type} is neither described nor refused")
    try:
        if case.defect:
            return Row(model_type, f"{NOT_CHECKED}: {case.defect}", "-", "-", "-")
        check_recording(case)
    # From `image_processor`, where there are no pixels to show the model.
    except LookupError as missing:
        return Row(model_type, f"{NOT_CHECKED}: {missing}", "-", "-", "-")
    return Row(model_type, YES, _adapted(case), _places(case), case.pixels_from, _video(case))


def _adapted(case: Case) -> str:
    try:
        found = check_adapting(case)
    except UnsupportedModelError as refusal:
        return _reason(refusal)
    return f"{found.layers} of {found.of} layer{'s' if found.of > 1 else ''}"


def _places(case: Case) -> str:
    """What is recorded of places in the picture, and whether painting confirmed it."""
    if case.pixels_from != "processor":
        return "not checked (no Pillow image processor)"
    found = check_places(case)
    if not found.placed:
        return "none" if NO_PLACE in found.assumption else "unknown"
    if found.wrong:
        raise Mismatch(
            f"{found.wrong} image tokens of {case.model_type} do not lie where the recording says"
        )
    # No token lay clearly inside or none clearly outside a painted part: that none is wrong says
    # nothing then.
    if not (found.inside and found.outside):
        return "grid, not confirmed"
    return "grid, confirmed by painting"


def _video(case: Case) -> str:
    """What is recorded of time and place in a video, and whether painting confirmed it."""
    if case.model_type not in PROCESSORS:
        return "-"
    found = check_video(case)
    if found.wrong:
        raise Mismatch(
            f"{found.wrong} tokens of a video of {case.model_type} do not lie where and when the"
            " recording says"
        )
    if not (found.inside and found.outside):
        return "frames, not confirmed"
    return "frames, confirmed by painting"


def _reason(refusal: UnsupportedModelError) -> str:
    """The reason inside a refusal, without the advice around it."""
    text = str(refusal)
    if "is not supported: " in text:
        text = text.split("is not supported: ")[1].split(". ")[0]
    return text.split("; policies act")[0]


# -- the table as text -----------------------------------------------------------------------------

_HEAD = ("type", "recorded", "adapted", "picture map", "pixels", "video")


def counts(rows: Sequence[Row]) -> str:
    """One sentence that sums a table up."""
    recorded, adapted = sum(row.is_recorded for row in rows), sum(row.is_adapted for row in rows)
    return (
        f"{len(rows)} types: {recorded} recorded exactly, {adapted} adapted, {len(rows) - recorded}"
        " refused."
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table as committed: what was checked, the counts, one line per type."""
    lines = [
        "| " + " | ".join(_HEAD) + " |",
        "|" + "---|" * len(_HEAD),
        *(
            "| " + " | ".join(astuple(row)) + " |"
            for row in sorted(rows, key=lambda row: row.model_type)
        ),
    ]
    return f"transformers {transformers.__version__}. {counts(rows)}\n\n" + "\n".join(lines) + "\n"


def parse(text: str) -> list[Row]:
    """The rows of a committed table; a page may hold other tables above its `MARK`."""
    # Rows begin with "| "; the line under the head begins with "|-", and the head itself is cut
    # off.
    lines = [line for line in text.split(MARK)[-1].splitlines() if line.startswith("| ")][1:]
    rows = [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines]
    if any(len(fields(Row)) != len(astuple(row)) for row in rows):
        raise ValueError("the table has lines with other columns than " + ", ".join(_HEAD))
    return rows


MARK = "<!-- table -->"
"""Line of the committed file behind which the table stands."""
