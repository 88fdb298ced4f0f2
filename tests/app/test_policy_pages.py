"""A-VL live, Benchmark and Report with the embedded model, and two sessions at once."""

from __future__ import annotations

import io
import json
import threading
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")

from PIL import Image

import avl
from avl.policies.registry import PRESETS
from avl.policies.registry import policies as all_policies
from avl_analysis import load_model
from avl_analysis.evaluation import policy_files
from avl_app import adaptive, policies
from avl_app.examples import questions
from avl_app.views import live
from tests.app.pages import ONE_WORD, address, errors, letters, page, texts

# -- a-vl live -------------------------------------------------------------------------------------


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
    assert any("is one draw of patches for one question" in c.value for c in test.caption)
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
    strips = [
        html.proto.body for html in test.get("html") if "KL(full || policy)" in html.proto.body
    ]
    assert len(strips) == 1
    table = test.dataframe[0].value
    differing = round((1 - table["same prediction"].iloc[1]) * (table["tokens"].iloc[0] + 1))
    assert differing > 0
    assert differing - strips[0].count("→") in {0, 1}  # the end of the answer is no word of it
    assert "orange-background" in texts(test)


def test_differing_words_are_set_off_together() -> None:
    marked = live.marked(("a", " red", " big", " ball"), ("a", " ball"))
    assert marked == "a :orange-background[**red big**] ball"
    assert live.marked((), ("a",)) == "*nothing* ~~a~~"
    assert live.marked((" [x](y)",), ()) == ":orange-background[**\\[x\\]\\(y\\)**]"


def test_words_at_the_same_places_are_the_same_and_those_left_out_are_struck_through() -> None:
    full = (
        "big",
        " red",
        " heart",
        " at",
        " top",
        " left",
        ",",
        " a",
        " blue",
        " square",
        " at",
        " top",
    )
    less = ("big", " red", " heart", " at", " top", " right", ",", " a", " blue", " square")
    assert live.marked(less, full) == (
        "big red heart at top ~~left,~~ :orange-background[**right,**] a blue square ~~at top~~"
    )
    assert live.marked(("ZOO",), ("ZOO", "0", "F")) == "~~ZOO0F~~ :orange-background[**ZOO**]"
    assert live.marked(("Z", "D", "H"), ("Z", "D")) == "~~ZD~~ :orange-background[**ZDH**]"
    assert live.marked(("赤い", "円"), ("青い", "円")) == "~~青~~ :orange-background[**赤**] い円"


def test_every_policy_and_preset_of_the_command_line_is_offered() -> None:
    test = page(view="live", **ONE_WORD)
    offered = set(policies.rivals(ours=True)) | {"full"}
    assert offered == {*all_policies(), *PRESETS}
    assert len(test.pills(key="rivals").options) == len(offered) - 2
    for name in policies.rivals():
        assert policies.at_budget(name, 0.5) != avl.FullPolicy()
    assert set(PRESETS) <= set(adaptive.presets())


def test_a_preset_is_what_it_says_and_its_controls_show_it() -> None:
    test = page(view="live", task="ocr", preset="a-vl-cold")
    assert errors(test) == []
    assert test.slider(key="secondary").value == 0.0
    assert test.selectbox(key="cold").value == "4"
    assert not test.toggle(key="use_text").value
    shown = [c.value for c in test.code if c.value.startswith("AdaptivePolicy")]
    assert shown == [repr(policy_files.named_policy("a-vl-cold"))]
    test.selectbox(key="cold").set_value("2").run()
    assert test.session_state["preset"] == "custom"
    shown = [c.value for c in test.code if c.value.startswith("AdaptivePolicy")]
    assert shown == [
        repr(avl.AdaptivePolicy(secondary=0.0, core=None, refresh_every=0, text=None, cold=2))
    ]


def test_every_setting_of_a_vl_has_a_control() -> None:
    settings = {field.name for field in fields(avl.AdaptivePolicy)}
    assert settings == {*adaptive.PLAIN.values(), *adaptive.SWITCHED.values(), "prefill", "cold"}
    test = page(view="live", **ONE_WORD)
    known = {
        widget.key
        for kind in (test.slider, test.toggle, test.selectbox, test.number_input)
        for widget in kind
    }
    assert {
        *adaptive.PLAIN,
        *adaptive.SWITCHED,
        *(f"use_{key}" for key in adaptive.SWITCHED),
        "prefill",
    } <= known


def test_more_policies_are_written_as_on_the_command_line() -> None:
    test = page(view="live", **ONE_WORD, more="h2o:0.4; snapkv:0.5,window=8")
    assert errors(test) == []
    assert list(test.dataframe[0].value["policy"]) == [
        "full cache",
        "A-VL",
        "h2o:0.4",
        "snapkv:0.5,window=8",
    ]
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
    good = {
        "format": "avl-policy",
        "version": 1,
        "policy": "AdaptivePolicy",
        "fields": {"core": 0.1},
    }
    test.file_uploader(key="policy").set_value(
        ("p.json", json.dumps(good).encode(), "application/json")
    ).run()
    assert errors(test) == []
    assert "core=0.1" in test.code[0].value
    assert not test.json
    known = {**good, "evidence": {"target": 0.95}}
    test.file_uploader(key="policy").set_value(
        ("p.json", json.dumps(known).encode(), "application/json")
    ).run()
    assert json.loads(test.json[0].value) == {"target": 0.95}
    evil = {**good, "policy": "os.system"}
    test.file_uploader(key="policy").set_value(
        ("p.json", json.dumps(evil).encode(), "application/json")
    ).run()
    assert len(errors(test)) == 1
    assert "os.system" in errors(test)[0].replace("\\", "")


# -- benchmark -------------------------------------------------------------------------------------


def test_policies_are_compared_on_scenes_and_the_comparison_can_be_kept() -> None:
    test = page(view="benchmark", **ONE_WORD)
    assert "Nothing is compared yet" in test.info[0].value
    test.multiselect(key="tasks").set_value(["colour"])
    test.number_input(key="count").set_value(2)
    next(b for b in test.button if b.label == "Compare").click().run()
    assert errors(test) == []
    assert "4 policies on 2 questions" in texts(test)
    assert set(test.dataframe[0].value["policy"]) == {
        "full",
        "A-VL (paper)",
        "random 50%",
        "H2O 50%",
    }
    assert [button.label for button in test.download_button][4:] == [
        "Numbers as CSV",
        "Comparison file",
    ]


def test_without_tasks_there_is_nothing_to_press_and_foreign_files_are_refused() -> None:
    test = page(view="benchmark", **ONE_WORD)
    test.multiselect(key="tasks").set_value([]).run()
    assert next(b for b in test.button if b.label == "Compare").disabled
    test.segmented_control(key="bench_source").set_value("a comparison made before").run()
    test.file_uploader(key="comparison_file").set_value(
        ("c.nc", b"nothing", "application/x-netcdf")
    ).run()
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
    line = json.dumps(
        {"image": "far/away/mine.png", "prompt": asked.prompt, "answer": asked.answer}
    ).encode()
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
    test.file_uploader(key="comparison_file").set_value(
        ("compare.nc", data, "application/x-netcdf")
    ).run()
    assert errors(test) == []
    assert "2 policies on 1 questions" in texts(test)


# -- two at once -----------------------------------------------------------------------------------


def test_two_sessions_one_with_a_vl_get_what_they_get_alone() -> None:
    """Two scripts in two threads, on the one model they share, three times over with other
    questions.
    """
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
                start.wait()
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
    threads = [
        threading.Thread(target=visit, args=visited)
        for visited in (("ask", {}), ("live", settings))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shown["ask"] == plain_answers
    assert shown["live"] == list(zip(plain_answers, adapted_answers, strict=True))


# -- report ----------------------------------------------------------------------------------------


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
