"""Every view with the embedded model: what it shows, what it says when something is wrong, what a link brings back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")

from PIL import Image
from streamlit.testing.v1 import AppTest

import avl_analysis.live  # noqa: F401  (imported before a clock runs)
from app.settings import VARIABLE, Settings

SCRIPT = str(Path(__file__).parents[2] / "app" / "main.py")
ONE_WORD = {"task": "colour"}
"""A question with a short answer, so that tests are quick."""


@pytest.fixture(autouse=True)
def _defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def page(**address: str) -> AppTest:
    """The page after opening a link."""
    test = AppTest.from_file(SCRIPT, default_timeout=600)
    for name, value in address.items():
        test.query_params[name] = value
    return test.run()


def address(test: AppTest, name: str) -> str:
    value = test.query_params[name]
    return value if isinstance(value, str) else value[0]


def texts(test: AppTest) -> str:
    return "\n".join(element.value for element in test.markdown)


def errors(test: AppTest) -> list[str]:
    assert not test.exception, test.exception
    return [element.value for element in test.error]


# -- ask ------------------------------------------------------------------------------------------


def test_the_first_screen_shows_an_answered_example_and_one_sentence_about_it() -> None:
    test = page()
    assert errors(test) == []
    assert "of its attention to the picture" in texts(test)
    assert len(test.pills(key="token").options) > 10
    assert address(test, "token") == str(test.session_state["token"])
    assert [trace.proto for trace in test.get("plotly_chart")]
    assert any("answer" in html.proto.body for html in test.get("html"))


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


def test_another_question_starts_with_the_token_that_says_most() -> None:
    test = page(**ONE_WORD, token="0", layer="1", head="2")
    test.selectbox(key="task").set_value("ocr").run()
    assert errors(test) == []
    assert test.session_state["head"] == "all"
    assert "layer" in texts(test)
    assert len(test.pills(key="token").options) > 2


def test_an_address_nobody_could_mean_is_ignored() -> None:
    test = page(
        **ONE_WORD, token="999", layer="77", head="<script>", opacity="-3", scene="x", view="nowhere", rivals="a,b"
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
    test.text_input(key="prompt").set_value("   ").run()
    assert len(errors(test)) == 1
    assert "empty" in errors(test)[0]


def test_a_model_that_is_not_there_is_one_sentence_and_the_other_model_still_works() -> None:
    test = page(**ONE_WORD, model="./no-such-folder")
    assert len(errors(test)) == 1
    assert "no" in errors(test)[0]
    assert "Traceback" not in errors(test)[0]
    test.selectbox(key="model").set_value("scenes").run()
    assert errors(test) == []
    assert "of its attention to the picture" in texts(test)


def test_a_server_that_allows_no_folders_ignores_those_in_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, Settings(folders=False).as_json())
    test = page(**ONE_WORD, model="/etc")
    assert errors(test) == []
    assert test.session_state["model"] == "scenes"


def test_pictures_are_taken_by_content_and_refused_in_one_sentence() -> None:
    test = page(source="upload", task="own question", longest="2")
    assert [element.value for element in test.info]
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(file, "PNG")
    test.file_uploader(key="file").set_value(("red.png", file.getvalue(), "image/png")).run()
    assert errors(test) == []
    assert len(test.pills(key="token").options) <= 2
    test.file_uploader(key="file").set_value(("evil.png", b"<script>alert(1)</script>", "image/png")).run()
    assert len(errors(test)) == 1
    assert "not an image" in errors(test)[0]
    assert "<script>" not in errors(test)[0]


def test_a_defect_is_one_sentence_and_goes_to_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(context: Any) -> None:
        raise RuntimeError("secret path /home/somebody")

    monkeypatch.setattr("app.views.ask.show", broken)
    test = page(**ONE_WORD)
    assert len(errors(test)) == 1
    assert "could not be drawn" in errors(test)[0]
    assert "secret" not in errors(test)[0]
    assert "secret path" in caplog.text


# -- heads ------------------------------------------------------------------------------------------


def test_heads_are_mapped_ranked_filtered_and_compared() -> None:
    test = page(view="heads", **ONE_WORD, layer="2", head="1")
    assert errors(test) == []
    assert "Layer 2, head 1" in texts(test)
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


def test_another_statistic_colours_the_map() -> None:
    test = page(view="heads", **ONE_WORD, measure="modality_mass/text")
    assert "attention mass" in texts(test)
    before = list(test.dataframe[0].value["value"])
    test.selectbox(key="measure").set_value("first_token_mass").run()
    assert errors(test) == []
    assert list(test.dataframe[0].value["value"]) != before


# -- patterns ------------------------------------------------------------------------------------------


def test_patterns_show_the_reports_figures_with_what_they_say_about_a_vl() -> None:
    test = page(view="patterns")
    assert errors(test) == []
    assert len(test.pills(key="pattern").options) >= 2
    assert "How is attention divided" in texts(test)
    assert "badge" in texts(test)
    for name in test.pills(key="pattern").options:
        test.pills(key="pattern").set_value(name.replace(" ", "_")).run()
        assert errors(test) == [], name


def test_a_file_that_is_no_recording_is_refused_in_one_sentence() -> None:
    test = page(view="patterns", **ONE_WORD)
    test.segmented_control(key="recording_of").set_value("a recording file").run()
    assert "Send a recording" in test.info[0].value
    test.file_uploader(key="recording_file").set_value(("run.nc", b"nothing", "application/x-netcdf")).run()
    assert len(errors(test)) == 1
    assert "not a readable netCDF file" in errors(test)[0].replace("\\", "")


# -- a-vl live ------------------------------------------------------------------------------------------


def test_a_vl_is_switched_on_and_off_beside_the_full_cache() -> None:
    test = page(view="live", task="ocr")
    assert errors(test) == []
    table = test.dataframe[0].value
    assert list(table["policy"]) == ["full cache", "A-VL"]
    assert table["of full cache"].iloc[1] < table["of full cache"].iloc[0] == 1.0
    assert table["keys read per step"].iloc[1] < table["keys read per step"].iloc[0]
    test.toggle(key="avl_on").set_value(False).run()
    assert list(test.dataframe[0].value["policy"]) == ["full cache"]
    test.pills(key="rivals").set_value(["random", "h2o"]).run()
    assert list(test.dataframe[0].value["policy"]) == ["full cache", "random", "H2O"]
    assert address(test, "rivals") == "random,h2o"


def test_keeping_everything_changes_nothing_and_presets_move_the_sliders() -> None:
    test = page(view="live", task="ocr")
    test.selectbox(key="preset").set_value("identity").run()
    assert test.slider(key="secondary").value == 1.0
    table = test.dataframe[0].value
    assert table["first difference at"].iloc[1] == "-"
    assert table["KL, nats"].iloc[1] < 1e-6
    test.slider(key="secondary").set_value(0.2).run()
    assert test.session_state["preset"] == "custom"
    assert "contradict" in errors(test)[0]


def test_patches_are_scrubbed_over_steps_and_layers() -> None:
    test = page(view="live", task="ocr", step="1", live_layer="2")
    assert "After decode step 1, layer 2" in texts(test)
    assert "43 of 144 patches are **core**" in texts(test)
    test.slider(key="step").set_value(0).run()
    assert "After the prompt, layer 2" in texts(test)
    test.select_slider(key="live_layer").set_value("0").run()
    assert "After the prompt, layer 0" in texts(test)
    test.toggle(key="playing").set_value(True).run()
    assert errors(test) == []


def test_policy_files_are_read_and_foreign_ones_refused() -> None:
    test = page(view="live", **ONE_WORD)
    test.selectbox(key="preset").set_value("file").run()
    good = {"format": "avl-policy", "version": 1, "policy": "AdaptivePolicy", "fields": {"core": 0.1}}
    test.file_uploader(key="policy").set_value(("p.json", json.dumps(good).encode(), "application/json")).run()
    assert errors(test) == []
    assert "core=0.1" in test.code[0].value
    evil = {**good, "policy": "os.system"}
    test.file_uploader(key="policy").set_value(("p.json", json.dumps(evil).encode(), "application/json")).run()
    assert len(errors(test)) == 1
    assert "os.system" in errors(test)[0].replace("\\", "")


# -- benchmark ------------------------------------------------------------------------------------------


def test_policies_are_compared_on_scenes_and_the_comparison_can_be_kept() -> None:
    test = page(view="benchmark", **ONE_WORD)
    assert "Nothing is compared yet" in test.info[0].value
    test.multiselect(key="tasks").set_value(["colour"])
    test.number_input(key="count").set_value(2)
    next(b for b in test.button if b.label == "Compare").click().run()
    assert errors(test) == []
    assert "4 policies on 2 questions" in texts(test)
    assert set(test.dataframe[0].value["policy"]) == {"full", "A-VL (paper)", "random 50%", "H2O 50%"}
    assert [button.label for button in test.download_button] == ["Numbers as CSV", "Comparison file"]


def test_without_tasks_there_is_nothing_to_press_and_foreign_files_are_refused() -> None:
    test = page(view="benchmark", **ONE_WORD)
    test.multiselect(key="tasks").set_value([]).run()
    assert next(b for b in test.button if b.label == "Compare").disabled
    test.segmented_control(key="bench_source").set_value("a comparison made before").run()
    test.file_uploader(key="comparison_file").set_value(("c.nc", b"nothing", "application/x-netcdf")).run()
    assert len(errors(test)) == 1
    test.segmented_control(key="bench_source").set_value("my own questions").run()
    test.file_uploader(key="samples").set_value(
        [("q.jsonl", b'{"image": "/etc/passwd", "prompt": "?"}', "text/plain")]
    ).run()
    assert "passwd" in errors(test)[0]
    assert "/etc" not in errors(test)[0]


# -- report ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_report_is_built_previewed_and_offered() -> None:
    test = page(view="report")
    test.text_input(key="title").set_value("<i>mine</i>")
    next(b for b in test.button if b.label == "Build the report").click().run()
    assert errors(test) == []
    labels = [button.label for button in test.download_button]
    assert labels[0].startswith("Page (HTML)")
    assert any(label.startswith("Everything (ZIP)") for label in labels)
    built = test.session_state["report"]
    assert b"&lt;i&gt;mine&lt;/i&gt;" in built.page
    assert b"<i>mine</i>" not in built.page
    assert built.archive[:2] == b"PK"
