"""The reference report: whole, small, and made from what a report folder holds."""

import json
import re

import pytest

from avl_analysis.errors import InputError
from avl_analysis.heads.ablation import load_ablation
from avl_reports.build import build
from avl_reports.reference import FOLDER, condense
from tests.reports import made


def test_a_report_is_condensed_without_its_recording_and_drawn_figures(tmp_path):
    build(
        made.recording(),
        tmp_path / "report",
        comparison=made.comparison(),
        ablations=[made.ablation(), made.ablation(same_layers=True)],
        commands=["avl report --samples 6"],
        formats=("png",),
        document=False,
    )
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "policy.json").write_text("{}")
    condense(tmp_path / "report", tmp_path / "kept")
    names = {
        path.relative_to(tmp_path / "kept").as_posix() for path in (tmp_path / "kept").rglob("*")
    }
    assert {
        "index.html",
        "report.pdf",
        "ablation.json",
        "policy.json",
        "figures/modality.csv",
        "figures/sets.webp",
    } <= names
    assert not {name for name in names if name.endswith((".nc", ".png", ".svg"))}
    silenced = [
        load_ablation(tmp_path / "kept" / name).same_layers
        for name in ("ablation.json", "ablation-2.json")
    ]
    assert silenced == [False, True]
    about = json.loads((tmp_path / "kept" / "provenance.json").read_text("utf-8"))
    assert about["commands"] == ["avl report --samples 6"]
    assert about["recording"]["model"] == "made-up"
    with pytest.raises(InputError, match="no folder that avl report wrote"):
        condense(tmp_path / "kept" / "figures", tmp_path / "other")


def test_measurements_of_an_earlier_report_in_the_folder_are_left_out(tmp_path):
    options = {"formats": (), "document": False}
    build(
        made.recording(),
        tmp_path / "report",
        comparison=made.comparison(),
        ablations=[made.ablation(), made.ablation(same_layers=True)],
        **options,
    )
    build(made.recording(), tmp_path / "report", ablations=[made.ablation()], **options)
    assert (tmp_path / "report" / "compare.nc").exists()  # files of before stay
    condense(tmp_path / "report", tmp_path / "kept")
    assert (tmp_path / "kept" / "ablation.json").exists()
    assert not (tmp_path / "kept" / "ablation-2.json").exists()
    about = json.loads((tmp_path / "kept" / "provenance.json").read_text("utf-8"))
    assert about["measurements"] == ["run.nc", "ablation.json"]


def test_the_committed_reference_says_where_it_comes_from():
    about = json.loads((FOLDER / "provenance.json").read_text("utf-8"))
    assert about["commands"][0].startswith("avl report ")
    numbers = json.loads((FOLDER / "numbers.json").read_text("utf-8"))
    verdicts = [finding["verdict"] for figure in numbers.values() for finding in figure["findings"]]
    assert len(verdicts) > 15
    assert all("n = " in figure["caption"] for figure in numbers.values())
    assert (FOLDER / "index.html").stat().st_size < 6_000_000


def test_pages_on_attention_weights_give_the_ablation_of_the_reference_as_the_example():
    measured = json.loads((FOLDER / "numbers.json").read_text("utf-8"))["fig_ablation"]
    first = measured["findings"][0]["measured"]
    visual, others = re.findall(r"by -(\d+) %", first)[:2]
    docs = FOLDER.parents[1] / "docs"
    howto = ("dashboard", "errors", "grounding", "knockout", "relevance", "sinks", "video")
    names = [*(f"howto/{name}" for name in howto), "concepts/recordings"]
    for name in [*names, "concepts/attention-as-evidence"]:
        said = " ".join((docs / f"{name}.md").read_text("utf-8").split())
        costs = re.findall(r"costs? (\d+) %(?: \[[^]]*\])? of right answers", said)
        assert costs == [visual], name
        assert f"{others} %" in said, name
