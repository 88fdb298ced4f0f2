"""Reports and their figures for the pages: made by `reports`, handed over as files in memory.

The report's modules are imported when first needed: a page that shows none does not wait for them.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from avl_analysis.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

    from avl_analysis.evaluation.comparison import Comparison
    from avl_analysis.heads.ablation import Ablation
    from avl_analysis.recordings.recording import Recording
    from avl_reports.frontiers import Frontier
    from avl_reports.run import Run, Section


def figures() -> dict[str, str]:
    """The figures of a report by name, with the question each answers."""
    from avl_reports.build import FIGURES

    # avl_reports.fig_NAME -> NAME
    return {module.__name__.rpartition(".fig_")[2]: str(module.QUESTION) for module in FIGURES}


@dataclass(frozen=True, eq=False)
class Measured:
    """What else was measured of the model, beside a recording.

    Attributes:
        comparison: policies compared on many questions.
        ablations: what switching heads off changed.
        frontier: quality against bytes over many budgets.
        further: other measurements by name, see `avl_reports.further`.
    """

    comparison: Comparison | None = None
    ablations: tuple[Ablation, ...] = ()
    frontier: Frontier | None = None
    further: Mapping[str, xr.Dataset] = field(default_factory=dict)

    def run(self, recording: Recording) -> Run:
        """The recording with all of it, as the report's figures take it.

        Raises:
            InputError: some of it is of another model.
        """
        from avl_reports.run import Run

        return Run(recording, self.comparison, self.ablations, self.frontier, self.further)


def fitting(recording: Recording, measured: Measured) -> tuple[Measured, str]:
    """What can stand beside a recording, and why the rest cannot: it is of another model."""
    try:
        # Making the run is what checks the models; the run itself is not needed.
        measured.run(recording)
    except InputError as error:
        # All is left out, also parts that would fit: the error names only the first that does not.
        return Measured(), str(error)
    return measured, ""


def section(recording: Recording, name: str, measured: Measured | None = None) -> Section:
    """One figure of the report of a recording.

    Args:
        recording: what the figure is drawn from.
        name: one of `figures`.
        measured: what else was measured of the same model.

    Raises:
        NotMeasured: the recording cannot answer it; the message says what is missing.
    """
    from importlib import import_module

    run = (measured or Measured()).run(recording)
    made: Section = import_module(f"avl_reports.fig_{name}").section(run)
    return made


@dataclass(frozen=True)
class Built:
    """A report as files in memory.

    Attributes:
        page: the self-contained HTML page.
        archive: ZIP of everything: page, figures, numbers, recording.
        pdf: the report as one PDF, None if the builder makes none.
        missing: figures that could not be drawn, and why.
        about: model and samples it was built from, in words.
    """

    page: bytes
    archive: bytes
    pdf: bytes | None
    missing: dict[str, str]
    about: str


def build_report(
    recording: Recording,
    title: str,
    progress: Callable[[int, int, str], None],
    measured: Measured | None = None,
) -> Built:
    """The report of a recording, with what else was measured of the same model.

    Args:
        recording: what the report is about.
        title: heading; by default it names the model.
        progress: called with (parts done, parts in all, name of the next part).
        measured: comparison, ablations, frontier and others.

    Raises:
        InputError: the recording answers none of the report's questions.
    """
    from avl_reports.build import build

    more = measured or Measured()
    with tempfile.TemporaryDirectory() as folder:
        made = build(
            recording,
            Path(folder) / "report",
            comparison=more.comparison,
            ablations=more.ablations,
            frontier=more.frontier,
            further=more.further,
            title=title,
            progress=progress,
        )
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            # sorted: a folder lists its files in an order that differs between file systems
            for path in sorted(made.folder.rglob("*")):
                if path.is_file():
                    file.write(path, Path("report") / path.relative_to(made.folder))
        pdf = next((path.read_bytes() for path in sorted(made.folder.glob("*.pdf"))), None)
        model = recording.attrs.get("model") or "unknown"
        about = f"Report on model {model}, {len(recording)} sample{'s' * (len(recording) != 1)}"
        # Read into memory within the block, at whose end the folder is deleted.
        return Built(made.page.read_bytes(), archive.getvalue(), pdf, dict(made.missing), about)
