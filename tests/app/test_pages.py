"""Every view with the embedded model: what it shows, what it says when something is wrong, what a link brings back."""

from __future__ import annotations

import io
import json
import re
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")

from PIL import Image
from streamlit.testing.v1 import AppTest

import avl
from app import adaptive, policies
from app.examples import questions
from app.settings import VARIABLE, Settings
from app.views import heads, live
from avl.policies import scores
from avl_analysis import load_model, policy_files, record
from avl_analysis.errors import InputError
from avl_analysis.headmaps import KINDS
from tests import tiny

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


def sources(test: AppTest) -> list[str]:
    return list(test.segmented_control(key="source").options)


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


def test_a_hub_id_is_loaded_only_by_a_server_started_with_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_folder_that_is_named_is_loaded_and_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny.llava(2)
    model.save_pretrained(tmp_path)
    tiny.processor(model).save_pretrained(tmp_path)
    test = page(task="own question", prompt="what is the colour?", longest="3")
    test.text_input(key="typed_model").set_value(str(tmp_path)).run()
    assert errors(test) == []
    assert test.session_state["model"] == str(tmp_path)
    assert len(test.pills(key="token").options) in {1, 2, 3}


def test_the_webcam_is_offered_only_where_it_was_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources(page(**ONE_WORD, source="webcam")) == ["Example", "Upload"]
    monkeypatch.setenv(VARIABLE, Settings(webcam=True).as_json())
    assert sources(page(**ONE_WORD)) == ["Example", "Upload", "Webcam"]


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


def test_a_model_that_cannot_be_followed_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(context: Any) -> None:
        raise avl.UnsupportedModelError("keys of several layers are shared <b>")

    monkeypatch.setattr("app.views.ask.show", refuse)
    assert errors(page(**ONE_WORD)) == [r"keys of several layers are shared \<b\>"]


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


def test_heads_are_of_the_kinds_the_report_names() -> None:
    assert set(heads.KIND_TEXTS) == set(KINDS)
    test = page(view="heads", task="caption")
    assert errors(test) == []
    shown = test.dataframe[0].value
    assert "scanning" in set(shown["kind"])
    report = page(view="patterns", task="caption", pattern="heads")
    counts = ", ".join(
        f"{int((shown['kind'] == kind).sum())} {kind}" for kind in KINDS if (shown["kind"] == kind).any()
    )
    assert f"Of 30 heads: {counts}" in texts(report).replace("\\", "")


def test_another_statistic_colours_the_map() -> None:
    test = page(view="heads", **ONE_WORD, measure="modality_mass/text")
    assert "attention mass" in texts(test)
    before = list(test.dataframe[0].value["value"])
    test.selectbox(key="measure").set_value("first_token_mass").run()
    assert errors(test) == []
    assert list(test.dataframe[0].value["value"]) != before


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


def test_a_recording_that_was_saved_is_read_back(tmp_path: Path) -> None:
    vlm = load_model("scenes")
    with record(vlm.model) as recording:
        vlm.answer(questions(5)["colour"].image, questions(5)["colour"].prompt, max_new_tokens=4)
    data = recording.save(tmp_path / "run.nc").read_bytes()
    test = page(view="patterns", **ONE_WORD, recording_of="file")
    test.file_uploader(key="recording_file").set_value(("run.nc", data, "application/x-netcdf")).run()
    assert errors(test) == []
    assert "How is attention divided" in texts(test)


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


def test_per_token_fidelity_says_what_a_policy_would_write_instead() -> None:
    test = page(view="live", task="caption", secondary="0.2", core="0.05", preset="custom")
    assert errors(test) == []
    strips = [html.proto.body for html in test.get("html") if "KL(full || policy)" in html.proto.body]
    assert len(strips) == 1
    table = test.dataframe[0].value
    differing = round((1 - table["same prediction"].iloc[1]) * (table["tokens"].iloc[0] + 1))
    assert differing > 0
    assert differing - strips[0].count("→") in {0, 1}  # the end of the answer is no word of it
    assert "orange-background" in texts(test)


def test_differing_words_are_set_off_together() -> None:
    marked = live.marked(("a", " red", " big", " ball"), ("a", " ball"))
    assert marked == "a :orange-background[**red big**] ball"
    assert live.marked((), ("a",)) == "*nothing*"
    assert live.marked((" [x](y)",), ()) == ":orange-background[**\\[x\\]\\(y\\)**]"


def test_every_policy_and_preset_of_the_command_line_is_offered() -> None:
    test = page(view="live", **ONE_WORD)
    offered = set(policies.rivals(ours=True)) | {"full"}
    assert offered == {*policy_files.POLICIES, *policy_files.PRESETS}
    assert len(test.pills(key="rivals").options) == len(offered) - 2
    for name in policies.rivals():
        assert policies.at_budget(name, 0.5) != avl.FullPolicy()
    assert set(policy_files.PRESETS) <= set(adaptive.presets())


def test_a_preset_is_what_it_says_and_its_controls_show_it() -> None:
    test = page(view="live", task="ocr", preset="a-vl-cold")
    assert errors(test) == []
    assert test.slider(key="secondary").value == 0.0
    assert test.selectbox(key="cold").value == "4"
    assert not test.toggle(key="use_text").value
    shown = [c.value.replace("\\", "") for c in test.caption if "AdaptivePolicy" in c.value]
    assert shown == [repr(policy_files.named_policy("a-vl-cold"))]
    test.selectbox(key="cold").set_value("2").run()
    assert test.session_state["preset"] == "custom"
    shown = [c.value.replace("\\", "") for c in test.caption if "AdaptivePolicy" in c.value]
    assert shown == [repr(avl.AdaptivePolicy(secondary=0.0, core=None, refresh_every=0, text=None, cold=2))]


def test_every_setting_of_a_vl_has_a_control() -> None:
    settings = {field.name for field in fields(avl.AdaptivePolicy)}
    assert settings == {*adaptive.PLAIN.values(), *adaptive.SWITCHED.values(), "prefill", "cold"}
    assert set(adaptive.SCORES) == set(scores.KINDS)
    test = page(view="live", **ONE_WORD)
    known = {widget.key for kind in (test.slider, test.toggle, test.selectbox, test.number_input) for widget in kind}
    assert {*adaptive.PLAIN, *adaptive.SWITCHED, *(f"use_{key}" for key in adaptive.SWITCHED), "prefill"} <= known


def test_more_policies_are_written_as_on_the_command_line() -> None:
    test = page(view="live", **ONE_WORD, more="h2o:0.4; snapkv:0.5,window=8")
    assert errors(test) == []
    assert list(test.dataframe[0].value["policy"]) == ["full cache", "A-VL", "h2o:0.4", "snapkv:0.5,window=8"]
    test.text_input(key="more").set_value("h3o").run()
    assert "unknown policy" in errors(test)[0]
    test.text_input(key="more").set_value("/etc/secret.json").run()
    assert "send it" in errors(test)[0]
    test.text_input(key="more").set_value("h2o:0.1;h2o:0.2;h2o:0.3;h2o:0.4").run()
    assert "the first 3 are shown" in errors(test)[0]
    assert len(test.dataframe[0].value) == 5


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
    assert not test.json
    known = {**good, "evidence": {"target": 0.95}}
    test.file_uploader(key="policy").set_value(("p.json", json.dumps(known).encode(), "application/json")).run()
    assert json.loads(test.json[0].value) == {"target": 0.95}
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


def test_own_questions_and_a_saved_comparison_are_shown(tmp_path: Path) -> None:
    asked = questions(7)["colour"]
    picture = io.BytesIO()
    Image.fromarray(asked.image).save(picture, "PNG")
    line = json.dumps({"image": "far/away/mine.png", "prompt": asked.prompt, "answer": asked.answer}).encode()
    test = page(view="benchmark", **ONE_WORD, bench_source="jsonl", bench_policies="random")
    test.file_uploader(key="samples").set_value(
        [("q.jsonl", line, "text/plain"), ("mine.png", picture.getvalue(), "image/png")]
    ).run()
    next(b for b in test.button if b.label == "Compare").click().run()
    assert errors(test) == []
    assert "2 policies on 1 questions" in texts(test)
    made = test.session_state["comparison"]
    data = made.save(tmp_path / "compare.nc").read_bytes()
    test = page(view="benchmark", **ONE_WORD, bench_source="saved")
    test.file_uploader(key="comparison_file").set_value(("compare.nc", data, "application/x-netcdf")).run()
    assert errors(test) == []
    assert "2 policies on 1 questions" in texts(test)


# -- two at once --------------------------------------------------------------------------------------


def test_two_sessions_one_with_a_vl_get_what_they_get_alone() -> None:
    """Two scripts in two threads, on the one model they share, three times over with other questions."""
    vlm = load_model("scenes")
    harsh = avl.AdaptivePolicy(secondary=0.3, core=0.2)
    plain_answers, adapted_answers = [], []
    for scene in (11, 12, 13):
        sample = questions(scene)["caption"]
        plain_answers.append(letters(str(vlm.answer(sample.image, sample.prompt))))
        with avl.adaptive(vlm.model, harsh):
            adapted_answers.append(letters(str(vlm.answer(sample.image, sample.prompt))))
    assert adapted_answers != plain_answers
    start, shown = threading.Barrier(2), {"ask": [], "live": []}

    def visit(view: str, more: dict[str, str]) -> None:
        try:
            for scene in (11, 12, 13):
                start.wait(120)
                test = page(view=view, scene=str(scene), task="caption", **more)
                assert errors(test) == []
                said = [letters(element.value) for element in test.markdown]
                at = said.index(letters(f"**{policies.ADAPTIVE}**")) if view == "live" else 0
                pills = letters("".join(test.pills(key="token").options)) if view == "ask" else ""
                shown[view].append(pills or (said[at - 1], said[at + 1]))
        except BaseException:
            start.abort()  # the other one need not wait
            raise

    settings = {"secondary": "0.3", "core": "0.2", "preset": "custom"}
    threads = [threading.Thread(target=visit, args=visited) for visited in (("ask", {}), ("live", settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert shown["ask"] == plain_answers
    assert shown["live"] == list(zip(plain_answers, adapted_answers, strict=True))


def letters(text: str) -> str:
    """A text without spaces, signs for them, escapes, and what sets words off."""
    bare = re.sub(r":orange-background\[\*\*(.*?)\*\*\]", r"\1", text)
    return "".join(bare.replace("␣", "").replace("\\", "").split())


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
