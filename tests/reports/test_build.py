"""A report of made-up numbers: what lies in the folder, what the page says, and that nothing from
outside becomes markup.
"""

import base64
import csv
import gzip
import json
import re
import runpy
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from avl_analysis.errors import InputError
from avl_analysis.evaluation.comparison import load_comparison
from avl_analysis.heads.ablation import load_ablation
from avl_analysis.recordings.recording import load_recording
from avl_reports import fig_localisation, fig_modality, fig_overlay
from avl_reports.build import FIGURES, build
from avl_reports.findings import Verdict
from avl_reports.frontiers import load_frontier
from avl_reports.run import NotMeasured, Run, example
from avl_reports.script import run_script
from tests.reports import made

COMMANDS = ["avl report --samples 6"]
MADE = {
    "fig_modality",
    "fig_overlay",
    "fig_localisation",
    "fig_sets",
    "fig_policies",
    "fig_ablation",
    "fig_frontier",
}
"""Figures that the made-up numbers answer."""


@pytest.fixture(scope="module")
def recording():
    return made.recording()


@pytest.fixture(scope="module")
def report(recording, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return build(
        recording,
        folder,
        comparison=made.comparison(),
        ablations=[made.ablation(), made.ablation(same_layers=True)],
        frontier=made.frontier(),
        commands=COMMANDS,
        formats=("svg",),
    )


@pytest.fixture(scope="module")
def page(report):
    return report.page.read_text("utf-8")


def test_every_figure_lies_in_the_folder_with_its_numbers_and_caption(report):
    for section in report.sections:
        for suffix in ("svg", "csv", "txt"):
            assert (
                report.folder / "figures" / f"{section.figure.name}.{suffix}"
            ).stat().st_size > 50


def test_the_animation_lies_beside_the_pictures(report):
    for suffix in ("gif", "webp"):
        with Image.open(report.folder / "figures" / f"sets.{suffix}") as image:
            assert image.n_frames > 2


def test_the_document_has_a_page_for_every_figure(report):
    pages = (report.folder / "report.pdf").read_bytes().count(b"/Type /Page ")
    assert pages >= len(report.sections) + 2


def test_every_caption_says_n_model_and_interval(report):
    for section in report.sections:
        caption = (report.folder / "figures" / f"{section.figure.name}.txt").read_text("utf-8")
        assert re.search(
            r"n = 1 sample; model: made-up\."
            r"|n = \d+ samples; model: made-up; 95 % BCa bootstrap intervals over samples\.",
            caption,
        )


def test_every_csv_ends_its_lines_alike(report):
    tables = sorted((report.folder / "figures").glob("*.csv"))
    assert any(path.name.endswith("_table.csv") for path in tables)
    assert [path.name for path in tables if b"\r" in path.read_bytes()] == []


def test_drawings_of_an_earlier_report_do_not_enter_the_page(recording, tmp_path):
    for formats, drawn in ((("svg",), True), ((), False)):
        page = build(
            recording, tmp_path, figures=[fig_modality], formats=formats, document=False
        ).page
        assert ("svg-modality" in page.read_text("utf-8")) is drawn


def test_the_csv_holds_the_numbers_of_the_figure(report, recording):
    with (report.folder / "figures" / "modality.csv").open() as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["panel"] == "by layer, decode steps" and row["series"] == "image"
        ]
    decode = recording["modality_mass"].sel(key_modality="image", step=slice(1, None))
    expected = decode.mean(["head", "step"]).mean("sample")
    assert np.allclose([float(row["value"]) for row in rows], expected)
    assert all(float(row["low"]) < float(row["value"]) < float(row["high"]) for row in rows)


def test_the_json_is_valid_and_names_every_verdict(report):
    numbers = json.loads((report.folder / "numbers.json").read_text("utf-8"))
    assert set(numbers) == MADE
    verdicts = [finding["verdict"] for entry in numbers.values() for finding in entry["findings"]]
    assert verdicts
    assert set(verdicts) <= {verdict.value for verdict in Verdict}


def test_the_report_keeps_the_recording_and_rebuilds_from_it(report, tmp_path):
    again = build(
        load_recording(report.folder / "run.nc"),
        tmp_path,
        comparison=load_comparison(report.folder / "compare.nc"),
        ablations=[
            load_ablation(report.folder / name) for name in ("ablation.json", "ablation-2.json")
        ],
        frontier=load_frontier(report.folder / "frontier.jsonl"),
        formats=(),
        document=False,
    )
    for section, other in zip(report.sections, again.sections, strict=True):
        assert section.findings == other.findings


def test_page_and_document_say_how_many_findings_were_tested(report):
    count = sum(len(section.findings) for section in report.sections)
    page = report.page.read_text("utf-8")
    assert count > 5
    assert f"{count} findings were tested, each by itself" in page
    assert "resample samples (questions), not heads, layers or steps" in page


def test_the_page_is_whole_and_loads_nothing(page):
    assert len(page) < 15_000_000
    outside = page.replace("http://www.w3.org", "")
    markup = re.sub(r"<script.*?</script>", "", outside, flags=re.S)
    assert "Content-Security-Policy" in page
    assert not re.search(r'(src|href)="(https?:)?//', markup)
    for section in ("What was found", "Provenance", "How to reproduce", "avl report --samples 6"):
        assert section in markup


def test_every_link_of_the_page_leads_into_the_page(page):
    tags = _Tags()
    tags.feed(page)
    assert tags.links
    assert [link for link in tags.links if not link.startswith(("#", "data:"))] == []


def test_figures_lie_in_the_page_as_they_lie_in_the_folder(report, page):
    names = [section.figure.name for section in report.sections]
    for name in names:
        packed = re.search(rf'<script type="text/plain" id="svg-{name}">(.*?)</script>', page)
        svg = gzip.decompress(base64.b64decode(packed[1]))
        assert svg == (report.folder / "figures" / f"{name}.svg").read_bytes()


def test_plots_of_the_page_are_valid_json(page):
    plots = re.findall(
        r'<script type="application/json" id="plot-([\w-]+)">(.*?)</script>', page, flags=re.S
    )
    assert len(plots) >= 8
    for _, text in plots:
        assert json.loads(text)["data"] is not None


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.scripts, self.handlers, self.links = 0, [], []

    def handle_starttag(self, tag, attrs):
        # figures as SVG travel in scripts of their own, where they were drawn
        self.scripts += tag == "script" and not str(dict(attrs).get("id")).startswith("svg-")
        self.links = [*self.links, *(value for name, value in attrs if name == "href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def test_text_from_models_and_prompts_cannot_become_markup(page, tmp_path):
    clean, hostile = _Tags(), _Tags()
    clean.feed(page)
    evil = made.recording(hostile=True)
    silenced = [made.ablation(hostile=True), made.ablation(same_layers=True)]
    measured = {
        "comparison": made.comparison(),
        "ablations": silenced,
        "frontier": made.frontier(hostile=True),
    }
    built = build(evil, tmp_path, **measured, formats=(), document=False)
    text = built.page.read_text("utf-8")
    hostile.feed(text)
    assert hostile.scripts == clean.scripts
    assert hostile.handlers == []
    assert "&lt;script&gt;alert(1)" in text
    assert "<img src=x" not in text


def test_figures_the_recording_cannot_answer_are_named_with_the_reason(tmp_path):
    recording = made.recording()
    recording.data["maps"] = recording.data["maps"].drop_vars("image_score")
    report = build(recording, tmp_path, formats=(), document=False)
    assert {"fig_overlay", "fig_localisation", "fig_sets"} <= set(report.missing)
    assert "holds no statistic" in report.page.read_text("utf-8")


def test_a_recording_that_answers_nothing_is_refused(tmp_path):
    recording = made.recording()
    recording.data["statistics"] = recording.data["statistics"].drop_vars(
        ["modality_mass", "efficiency"]
    )
    with pytest.raises(NotMeasured, match="answers no figure"):
        build(recording, tmp_path, figures=[fig_modality])


def test_the_modality_findings_follow_from_the_numbers(recording):
    treated, stays = fig_modality.section(Run(recording)).findings
    assert treated.verdict is Verdict.SUPPORTED  # 0.3 / 8 tokens against 0.6 / 144 tokens: 9 times
    assert "9.0" in treated.measured
    assert stays.verdict is Verdict.SUPPORTED
    assert "60 %" in stays.measured


def test_steps_few_samples_reach_are_not_drawn(recording):
    figure = fig_modality.section(Run(recording)).figure
    assert np.isfinite(figure.panels[1].lines[0].y).all()
    assert (
        figure.panels[1].lines[0].x[-1] == 8
    )  # two of six samples make eight steps, one makes nine


def test_lift_is_one_where_attention_is_uniform_and_exact_where_it_is_not(recording):
    lift = fig_localisation.lifts(Run(recording))
    assert np.allclose(lift.sel(layer=[0, 2]), 1)
    run = Run(recording)
    colour = next(e for e in run.examples if e.task == "colour")
    share = len(colour.regions[0].tokens) / made.IMAGE
    assert float(lift.sel(sample=colour.name, layer=1)) == pytest.approx(
        (0.9 + 0.1 * share) / share
    )


def test_overlays_show_the_layer_with_the_largest_lift_and_outline_the_truth(recording):
    figure = fig_overlay.section(Run(recording)).figure
    maps = [panel for panel in figure.panels if panel.patches is not None]
    assert all("layer 1" in panel.title for panel in maps[:3])
    assert all(panel.boxes for panel in maps)
    assert all(np.nansum(panel.patches.values) == pytest.approx(1) for panel in maps)


def without_layer(layers):
    """A recording whose maps of these layers are unknown."""
    unknown = made.recording()
    unknown.data["maps"]["image_score"].loc[{"layer": layers}] = np.nan
    return unknown


def test_layers_that_were_not_measured_are_passed_over_for_the_one_shown():
    run = Run(without_layer([0]))
    maps = [panel for panel in fig_overlay.section(run).figure.panels if panel.patches is not None]
    assert all("layer 1" in panel.title for panel in maps[:3])
    _, by_task = fig_localisation.section(run).figure.panels
    assert by_task.title == "by task, layer 1"
    assert np.isfinite(by_task.bars[0].values).all()


def test_without_any_measured_layer_the_figures_say_what_is_missing():
    run = Run(without_layer([0, 1, 2]))
    with pytest.raises(NotMeasured, match="does not say what part of the picture"):
        fig_localisation.section(run)
    nothing = xr.DataArray([np.nan, np.nan], coords={"layer": [0, 1]}, name="lift")
    with pytest.raises(NotMeasured, match="no layer has a value of lift"):
        fig_localisation.largest_layer(nothing)


def test_a_figure_is_a_script_of_its_own(report, tmp_path, capsys):
    run_script(fig_localisation.section, [str(report.folder / "run.nc"), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert str(tmp_path / "localisation.svg") in printed
    assert (tmp_path / "localisation.csv").is_file()
    assert "supported: " in printed


@pytest.mark.parametrize("module", FIGURES, ids=lambda module: module.__name__)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_every_figure_module_runs_as_a_script(module, tmp_path, monkeypatch, capsys):
    """`python -m avl_reports.fig_...` reads its arguments and refuses a recording that is not
    there, which an import alone does not do.
    """
    monkeypatch.setattr(sys, "argv", [module.__name__, str(tmp_path / "none.nc")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module.__name__, run_name="__main__")
    assert stopped.value.code == 2
    assert "there is no recording file" in capsys.readouterr().err
    assert module.QUESTION.endswith("?")


def test_a_figure_script_without_a_recording_says_so_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script(fig_modality.section, [str(tmp_path / "none.nc")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_parts_that_were_measured_on_another_model_are_refused():
    recording, comparison = made.recording(), made.comparison()
    Run(recording, comparison, [made.ablation()], made.frontier())
    other = made.comparison()
    other.dataset.attrs["model_revision"] = "2"
    frontier = made.frontier()
    for parts in (
        {"comparison": other},
        {"ablations": [made.ablation(), replace(made.ablation(), model="made-up 2")]},
        {"frontier": replace(frontier, about={**frontier.about, "model_revision": "2"})},
    ):
        with pytest.raises(InputError, match=r"are of different models \(revision 1 and 2\)"):
            Run(recording, **parts)


def test_a_thumbnail_of_a_strangers_recording_is_decoded_by_the_few_safe_formats_only():
    eps = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()
    facts = {"picture": f"data:image/eps;base64,{eps}", "words": ["a"]}
    with pytest.raises(InputError, match="is not an image this program reads"):
        example("000000", facts)
