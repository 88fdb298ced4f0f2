"""Ask, Heads and Patterns with the embedded model: what they show, what they say when something is
wrong, links.
"""

from __future__ import annotations

import importlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")

from PIL import Image

import avl
from avl_analysis import Sample, live, load_model, record
from avl_analysis.errors import InputError
from avl_analysis.figures import Patches
from avl_analysis.heads.taxonomy import KINDS
from avl_app.examples import questions
from avl_app.settings import VARIABLE, Settings
from avl_app.views import heads
from tests import tiny
from tests.app.pages import ONE_WORD, address, errors, page, sources, texts
from tests.avl_analysis.figures.test_patches import slow
from tests.avl_analysis.models import folders

# -- ask ------------------------------------------------------------------------------------------


def test_the_first_screen_shows_an_answered_example_and_one_sentence_about_it() -> None:
    test = page()
    assert errors(test) == []
    assert "of its attention to the picture" in texts(test)
    assert len(test.pills(key="token").options) > 10
    assert address(test, "token") == str(test.session_state["token"])
    assert [trace.proto for trace in test.get("plotly_chart")]
    assert any("answer" in html.proto.body for html in test.get("html"))


def test_the_view_of_a_whole_picture_is_shown_without_the_parts_that_cover_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(folders.save_folder(tmp_path / "tiles", "llava_next"))
    monkeypatch.setenv(VARIABLE, Settings((folder,)).as_json())
    file = io.BytesIO()
    Image.effect_noise((96, 54), 90).convert("RGB").save(file, "PNG")
    test = page(source="upload", longest="3", token="1", layer="1", prompt="what is it")
    test.file_uploader(key="file").set_value(("wide.png", file.getvalue(), "image/png")).run()
    assert errors(test) == []
    # By hand: attention of token 1 in layer 1, token by token of the picture.
    vlm = load_model(folder)
    sample = Sample("q", (np.asarray(Image.open(file)),), "what is it")
    seen = live.observe(vlm, sample, max_new_tokens=3)
    (tokens,) = seen.images
    values = seen.weights[1][1].astype(np.float64).mean(0)[tokens.position]
    for whole in (False, True):
        drawn = np.where((tokens.tile > 0) & whole, np.nan, values)
        pixels = slow(Patches(drawn, tokens.boxes, tokens.tile), 108, 192)
        shown = np.isin(np.arange(len(values)), pixels)
        assert 0 < shown.sum() < len(values)
        test.toggle(key="whole").set_value(whole).run()
        assert errors(test) == []
        (scale,) = (c.value for c in test.caption if c.value.startswith("Full colour"))
        assert f"Full colour: {values[shown].max():.1%} of" in scale
        assert f"{values[~shown].sum():.1%} is on image tokens that are not seen here" in scale
        assert any("whole=True" in block.value for block in test.code) == whole
    assert address(test, "whole") == "1"
    for method in ("value", "relative", "gradient", "chefer"):
        test.segmented_control(key="map").set_value(method).run()
        assert errors(test) == []


def test_question_and_picture_are_there_before_the_libraries_of_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imported = importlib.import_module

    def stops(name: str, package: str | None = None) -> object:
        if name == "avl_app.views.ask":
            raise InputError("the import has begun")
        return imported(name, package)

    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "avl_app.views.ask")
        patch.setattr(importlib, "import_module", stops)
        test = page(**ONE_WORD)
    assert errors(test) == ["the import has begun"]
    assert "Starting" in texts(test)
    assert f"### {questions(0)['colour'].prompt}".replace("?", "") in texts(test)
    assert [chart.key for chart in test.get("plotly_chart")] == ["first_picture"]
    test.run()
    assert errors(test) == []
    assert "Starting" not in texts(test)
    assert "first_picture" not in [chart.key for chart in test.get("plotly_chart")]


def test_choosing_another_token_layer_and_head_changes_the_sentence_and_the_address() -> None:
    test = page(**ONE_WORD, layer="1", head="2")
    assert "head 2 of layer 1" in texts(test)
    test.select_slider(key="head").set_value("all").run()
    assert "head 2" not in texts(test)
    assert "layer 1 gives" in texts(test)
    assert "head" not in test.query_params
    assert address(test, "layer") == "1"
    test.select_slider(key="layer").set_value("all").run()
    assert "the model gives" in texts(test)


def test_every_map_of_a_token_is_drawn_on_its_own_scale() -> None:
    test = page(**ONE_WORD, layer="3")
    said = set()
    for method, words in (
        ("raw", "of all attention, on the patch"),
        ("value", "attention times the length of the value vector"),
        ("relative", "times its attention under “Describe the picture"),
        ("gradient", "adds to the log"),
        ("chefer", "layer and head above do not change this map"),
    ):
        test.segmented_control(key="map").set_value(method).run()
        assert errors(test) == []
        captions = "\n".join(element.value for element in test.caption)
        assert words in captions
        said.add(captions)
    assert len(said) == 5
    assert address(test, "map") == "chefer"


def test_another_question_starts_with_the_token_that_says_most() -> None:
    test = page(**ONE_WORD, token="0", layer="1", head="2")
    test.selectbox(key="task").set_value("ocr").run()
    assert errors(test) == []
    assert test.session_state["head"] == "all"
    assert "layer" in texts(test)
    assert len(test.pills(key="token").options) > 2


def test_an_address_nobody_could_mean_is_ignored() -> None:
    test = page(
        **ONE_WORD,
        token="999",
        layer="77",
        head="<script>",
        opacity="-3",
        scene="x",
        view="nowhere",
        rivals="a,b",
    )
    assert errors(test) == []
    assert test.session_state["view"] == "ask"
    assert test.session_state["scene"] == 0
    assert test.session_state["layer"] in {"0", "1", "2", "3", "4"}
    assert test.session_state["token"] < len(test.pills(key="token").options)


def test_own_questions_are_asked_and_empty_ones_explained() -> None:
    test = page(task="own question", prompt="Is there <b>a circle</b>? *really*", longest="3")
    assert errors(test) == []
    assert r"\<b\>a circle\<" in texts(test)
    test.text_area(key="prompt").set_value("   ").run()
    assert len(errors(test)) == 1
    assert "empty" in errors(test)[0]


def test_a_model_that_is_not_there_is_one_sentence_and_the_other_model_still_works() -> None:
    test = page(**ONE_WORD, model="./no-such-folder")
    assert len(errors(test)) == 1
    assert "there is no model folder" in errors(test)[0]
    assert "Traceback" not in errors(test)[0]
    test.selectbox(key="model").set_value("scenes").run()
    assert errors(test) == []
    assert "of its attention to the picture" in texts(test)


def test_a_server_that_allows_no_folders_ignores_those_in_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, Settings(folders=False).as_json())
    test = page(**ONE_WORD, model="/etc")
    assert errors(test) == []
    assert test.session_state["model"] == "scenes"


def test_a_hub_id_is_loaded_only_by_a_server_started_with_the_switch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, bool]] = []

    def load(name: str, *, allow_download: bool) -> Any:
        asked.append((name, allow_download))
        raise InputError("fetched in a test")

    monkeypatch.setattr("avl_analysis.load_model", load)
    test = page(**ONE_WORD, model="somebody/some-model")
    assert "avl app \\-\\-hub" in errors(test)[0]
    assert asked == []
    monkeypatch.setenv(VARIABLE, Settings(hub=True, folders=False).as_json())
    assert errors(page(**ONE_WORD, model="somebody/some-model")) == ["fetched in a test"]
    assert asked == [("somebody/some-model", True)]
    assert "only" in errors(page(**ONE_WORD, model="/etc"))[0]
    assert len(asked) == 1


def test_a_folder_that_is_named_is_loaded_and_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny.llava(2)
    model.save_pretrained(tmp_path)
    tiny.processor(model).save_pretrained(tmp_path)
    test = page(task="own question", prompt="what is the colour?", longest="3")
    test.text_input(key="typed_model").set_value(str(tmp_path)).run()
    assert errors(test) == []
    assert test.session_state["model"] == str(tmp_path)
    assert len(test.pills(key="token").options) in {1, 2, 3}


def test_the_webcam_is_offered_only_where_it_was_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources(page(**ONE_WORD, source="webcam")) == ["Example", "Video", "Upload"]
    monkeypatch.setenv(VARIABLE, Settings(webcam=True).as_json())
    assert sources(page(**ONE_WORD)) == ["Example", "Video", "Upload", "Webcam"]


def test_pictures_are_taken_by_content_and_refused_in_one_sentence() -> None:
    test = page(source="upload", task="own question", longest="2")
    assert [element.value for element in test.info]
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(file, "PNG")
    test.file_uploader(key="file").set_value(("red.png", file.getvalue(), "image/png")).run()
    assert errors(test) == []
    assert len(test.pills(key="token").options) <= 2
    test.file_uploader(key="file").set_value(
        ("evil.png", b"<script>alert(1)</script>", "image/png")
    ).run()
    assert len(errors(test)) == 1
    assert "not an image" in errors(test)[0]
    assert "<script>" not in errors(test)[0]


def test_a_defect_is_one_sentence_and_goes_to_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(context: Any) -> None:
        raise RuntimeError("secret path /home/somebody")

    monkeypatch.setattr("avl_app.views.ask.show", broken)
    test = page(**ONE_WORD)
    assert len(errors(test)) == 1
    assert "could not be drawn" in errors(test)[0]
    assert "secret" not in errors(test)[0]
    assert "secret path" in caplog.text


def test_a_model_that_cannot_be_followed_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(context: Any) -> None:
        raise avl.UnsupportedModelError("keys of several layers are shared <b>")

    monkeypatch.setattr("avl_app.views.ask.show", refuse)
    assert errors(page(**ONE_WORD)) == [r"keys of several layers are shared \<b\>"]


# -- heads -----------------------------------------------------------------------------------------


def test_heads_are_mapped_ranked_filtered_and_compared() -> None:
    test = page(view="heads", **ONE_WORD, layer="2", head="1")
    assert errors(test) == []
    assert "Layer 2, head 1" in texts(test)
    assert any(c.value.startswith("Chosen: layer 2, head 1, 0") for c in test.caption)
    ranking = test.dataframe[0].value
    assert len(ranking) == 30
    assert list(ranking["value"]) == sorted(ranking["value"], reverse=True)
    kinds = test.pills(key="kinds")
    test.pills(key="kinds").set_value([ranking["kind"].iloc[0]]).run()
    assert 0 < len(test.dataframe[0].value) <= 30
    assert set(test.dataframe[0].value["kind"]) == {ranking["kind"].iloc[0]}
    assert kinds.options
    test.selectbox(key="other").set_value("0.3").run()
    assert "Layer 0, head 3" in texts(test)
    assert "Layer 2, head 1" in texts(test)
    assert address(test, "other") == "0.3"
    assert sum("of all attention, in both heads" in c.value for c in test.caption) == 2


def test_ask_heads_and_patterns_of_one_question_run_the_model_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[int] = []
    monkeypatch.setattr(live, "answer", counted(live.answer, answers))
    asked = {"task": "own question", "prompt": "What is the number of stars?"}
    for view in ("ask", "heads", "patterns"):
        assert errors(page(view=view, **asked)) == []
    assert len(answers) == 1


def counted(function: Any, calls: list[int]) -> Any:
    """The function, noting every call."""

    def call(*given: Any, **options: Any) -> Any:
        calls.append(1)
        return function(*given, **options)

    return call


def test_heads_are_of_the_kinds_the_report_names() -> None:
    assert set(heads.KIND_TEXTS) == set(KINDS)
    test = page(view="heads", task="caption")
    assert errors(test) == []
    shown = test.dataframe[0].value
    assert "scanning" in set(shown["kind"])
    report = page(view="patterns", task="caption", pattern="heads")
    counts = ", ".join(
        f"{int((shown['kind'] == kind).sum())} {kind}"
        for kind in KINDS
        if (shown["kind"] == kind).any()
    )
    assert f"Of 30 heads: {counts}" in texts(report).replace("\\", "")


def test_another_statistic_colours_the_map() -> None:
    test = page(view="heads", **ONE_WORD, measure="modality_mass/text")
    assert "attention mass" in texts(test)
    before = list(test.dataframe[0].value["value"])
    test.selectbox(key="measure").set_value("first_token_mass").run()
    assert errors(test) == []
    assert list(test.dataframe[0].value["value"]) != before


def test_attention_is_cut_when_asked_for_and_kept_for_the_question() -> None:
    test = page(view="heads", **ONE_WORD, cut="1")
    assert "Nothing is cut yet" in test.info[0].value
    next(b for b in test.button if b.label == "Cut").click().run()
    assert errors(test) == []
    assert "Most is lost when" in texts(test)
    assert "undecided" in texts(test)  # one answer has no interval
    test.selectbox(key="head_field").set_value(3).run()
    assert errors(test) == []
    assert "Most is lost when" in texts(test)
    test.segmented_control(key="cut_of").set_value("scenes").run()
    assert "Nothing is cut yet" in test.info[0].value


def test_choices_of_every_view_come_back_from_the_address() -> None:
    test = page(view="benchmark", **ONE_WORD)
    test.multiselect(key="tasks").set_value(["ocr", "count"])
    test.multiselect(key="bench_policies").set_value(["stride"])
    test.slider(key="bench_budget").set_value(0.25).run()
    link = {name: address(test, name) for name in test.query_params}
    again = page(**link)
    assert again.multiselect(key="tasks").value == ["ocr", "count"]
    assert again.multiselect(key="bench_policies").value == ["stride"]
    assert again.slider(key="bench_budget").value == 0.25
    again.segmented_control(key="view").set_value("ask").run()
    again.segmented_control(key="view").set_value("benchmark").run()
    assert again.multiselect(key="tasks").value == ["ocr", "count"]


# -- patterns --------------------------------------------------------------------------------------


def test_patterns_show_the_reports_figures_with_what_they_say_about_a_vl() -> None:
    test = page(view="patterns")
    assert errors(test) == []
    assert len(test.pills(key="pattern").options) >= 2
    assert "How is attention divided" in texts(test)
    assert "badge" in texts(test)
    for name in test.pills(key="pattern").options:
        test.pills(key="pattern").set_value(name.replace(" ", "_")).run()
        assert errors(test) == [], name


def test_one_answer_has_numbers_without_intervals_and_many_scenes_have_both() -> None:
    test = page(view="patterns", **ONE_WORD)
    assert "no interval" in texts(test).replace("\\", "")
    assert "undecided" in texts(test)
    test.segmented_control(key="recording_of").set_value("scenes").run()
    assert "Nothing is recorded yet" in test.info[0].value
    test.slider(key="per_task").set_value(1)
    next(b for b in test.button if b.label == "Record").click().run()
    assert errors(test) == []
    assert "no interval" not in texts(test).replace("\\", "")
    assert any("scenes are recorded" in caption.value for caption in test.caption)


def test_a_file_of_further_measurements_is_shown_with_the_recording(tmp_path: Path) -> None:
    from avl_analysis import scene_samples
    from avl_analysis.heads.knockout import knockout, save_knockout

    vlm = load_model("scenes")
    cut = knockout(vlm, scene_samples(1, ["colour", "shape"]), [("image", "answer")])
    data = save_knockout(cut, tmp_path / "k.nc").read_bytes()
    test = page(view="patterns", **ONE_WORD, pattern="knockout")
    assert "Send the file that avl knockout wrote" in test.info[-1].value
    test.file_uploader(key="knockout_file").set_value(("k.nc", data, "application/x-netcdf")).run()
    assert errors(test) == []
    assert "Most is lost when answer tokens cannot read image tokens" in texts(test)
    bad = ("k.nc", b"nothing", "application/x-netcdf")
    test.file_uploader(key="knockout_file").set_value(bad).run()
    assert len(errors(test)) == 1


def test_a_recording_that_was_saved_is_read_back(tmp_path: Path) -> None:
    vlm = load_model("scenes")
    with record(vlm.model) as recording:
        vlm.answer(questions(5)["colour"].image, questions(5)["colour"].prompt, max_new_tokens=4)
    data = recording.save(tmp_path / "run.nc").read_bytes()
    test = page(view="patterns", **ONE_WORD, recording_of="file")
    test.file_uploader(key="recording_file").set_value(
        ("run.nc", data, "application/x-netcdf")
    ).run()
    assert errors(test) == []
    assert "How is attention divided" in texts(test)
    test.segmented_control(key="view").set_value("ask").run()  # and kept while one looks elsewhere
    test.segmented_control(key="view").set_value("patterns").run()
    assert "How is attention divided" in texts(test)
    assert not test.info


def test_a_file_that_is_no_recording_is_refused_in_one_sentence() -> None:
    test = page(view="patterns", **ONE_WORD)
    test.segmented_control(key="recording_of").set_value("a recording file").run()
    assert "Send a recording" in test.info[0].value
    test.file_uploader(key="recording_file").set_value(
        ("run.nc", b"nothing", "application/x-netcdf")
    ).run()
    assert len(errors(test)) == 1
    assert "not a readable netCDF file" in errors(test)[0].replace("\\", "")
