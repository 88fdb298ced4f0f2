"""What visitors do with their hands: choosing, going back, sending files, leaving and returning."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")

import numpy as np
from PIL import Image

import avl
from avl_analysis.evaluation.policy_files import save_policy
from avl_analysis.figures import Axis, Box, draw_html
from avl_analysis.figures.strip import Span, Strip
from avl_analysis.scenes.drawing import SIDE
from avl_app import examples, state
from avl_app.page import distinct, doing, plain, short_names, shown_token
from avl_app.settings import VARIABLE, Settings
from avl_app.sidebar import EXAMPLE, thumbnail
from avl_app.views.ask import patch_frames
from tests import tiny
from tests.app.pages import ONE_WORD, address, errors, page, texts


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


# -- labels ---------------------------------------------------------------------------------------


def test_every_token_of_an_answer_has_a_label_of_its_own() -> None:
    for view in ("ask", "heads"):
        labels = page(view=view, task="caption").pills(key="token").options
        bare = [label.replace("\u2060", "") for label in labels]
        assert len(set(bare)) < len(bare)  # the answer repeats words
        assert len(set(labels)) == len(labels)


def test_labels_stay_as_they_are_to_the_eye() -> None:
    labels = distinct(["a", "b", "a", "a"])
    assert len(set(labels)) == 4
    assert [label.strip("\u2060") for label in labels] == ["a", "b", "a", "a"]
    assert labels[1] == "b"


def test_models_of_one_folder_name_are_told_apart_and_both_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders = [tmp_path / run / "checkpoint-1000" for run in ("run1", "run2")]
    for folder in folders:
        model = tiny.llava(2)
        model.save_pretrained(folder)
        tiny.processor(model).save_pretrained(folder)
    names = tuple(map(str, folders))
    monkeypatch.setenv(VARIABLE, Settings((*names, "scenes")).as_json())
    asked = {"task": "own question", "prompt": "what is the colour?", "longest": "2"}
    test = page(**asked, model=names[0])
    assert list(test.selectbox(key="model").options)[:2] == [
        "run1/checkpoint-1000",
        "run2/checkpoint-1000",
    ]
    for name, label in zip(
        names[::-1], list(test.selectbox(key="model").options)[1::-1], strict=False
    ):
        test.selectbox(key="model").select(label).run()
        assert errors(test) == []
        assert test.session_state["model"] == name


def test_short_names_take_as_many_folders_as_are_needed() -> None:
    assert short_names(["scenes", "/a/x/m", "/b/x/m", "org/name"]) == [
        "scenes",
        "a/x/m",
        "b/x/m",
        "name",
    ]
    assert len(set(short_names(["m", "/m"]))) == 2


def test_names_of_icons_and_emojis_in_foreign_text_stay_text() -> None:
    for text in (":material/home:", ":smile:", ":streamlit:"):
        assert text not in plain(text).replace("\\", "")
        assert plain(text).replace("\\", "").replace("\u2060", "") == text


# -- the word strip -------------------------------------------------------------------------------


def test_the_chosen_token_is_framed_when_the_answer_stopped_at_the_longest_length() -> None:
    test = page(task="caption", longest="8")
    words = [label.strip("\u2060") for label in test.pills(key="token").options]
    assert len(words) == 8
    for token in (0, 2, 7):
        test = page(task="caption", longest="8", token=str(token))
        html = next(h.proto.body for h in test.get("html") if ">answer<" in h.proto.body)
        answer = html.partition(">answer</span>")[2]
        spans = [part for part in answer.split("<span ")[1:] if "title=" in part]
        shown = [part.partition(">")[2].partition("<")[0] for part in spans]
        framed = [n for n, part in enumerate(spans) if "outline:2px solid" in part]
        assert shown == words
        assert framed == [token]
        assert html.count("outline:2px solid") == 1


# -- pictures and questions -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4000, 10), (10, 4000), (1, 1), (640, 480)])
def test_a_picture_of_any_shape_is_shown(size: tuple[int, int]) -> None:
    test = page(source="upload", task="own question", longest="2")
    test.file_uploader(key="file").set_value(("flat.png", png(*size), "image/png")).run()
    assert errors(test) == []
    assert "of its attention to the picture" in texts(test)
    height, width = thumbnail(np.zeros((size[1], size[0], 3), np.uint8)).shape[:2]
    assert 1 <= width <= 210
    assert 1 <= height <= 220


def test_the_first_own_picture_is_asked_what_the_embedded_model_can_read() -> None:
    test = page(source="upload")
    test.file_uploader(key="file").set_value(("red.png", png(30, 20), "image/png")).run()
    assert test.text_area(key="prompt").value == EXAMPLE
    assert examples.unknown_words(EXAMPLE) == []
    captions = " ".join(caption.value for caption in test.caption)
    assert examples.about_model() in captions
    assert "never read" not in captions
    asked = list(test.selectbox(key="suggestion").options)
    assert len(asked) == len(examples.suggestions()) == 12
    assert all(examples.unknown_words(prompt) == [] for prompt in asked)
    test.selectbox(key="suggestion").select("What colour is the text?").run()
    assert test.text_area(key="prompt").value == "What colour is the text?"
    test.text_area(key="prompt").set_value("describe the image").run()
    assert "“image”" in " ".join(caption.value for caption in test.caption)


def test_a_question_that_is_too_long_is_refused_with_both_numbers() -> None:
    test = page(task="own question")
    test.text_area(key="prompt").set_value("a" * 30_000).run()
    assert "30000 characters; at most 20000" in errors(test)[0]


def test_a_text_that_no_link_carries_is_asked_and_stays_when_the_visitor_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, Settings((str(tiny.save_folder(tmp_path)),)).as_json())
    long = "what is the colour? " * 105
    assert len(long) > state.MOST_TEXT
    test = page(task="own question", longest="2")
    test.text_area(key="prompt").set_value(long).run()
    assert errors(test) == []
    assert "prompt" not in test.query_params
    assert any("stands in no link" in caption.value for caption in test.caption)
    strips = " ".join(re.sub(r"<[^>]*>", "", html.proto.body) for html in test.get("html"))
    assert strips.count("colour") >= 105  # the model has read all of it
    test.query_params["layer"] = "0"
    test.run()
    assert test.text_area(key="prompt").value == long
    test.query_params["prompt"] = "where is it?"
    test.run()
    assert test.text_area(key="prompt").value == "where is it?"


def test_a_model_that_cannot_be_used_leaves_the_whole_sidebar() -> None:
    test = page(**ONE_WORD, model="./no-such-folder")
    assert len(errors(test)) == 1
    assert test.number_input(key="scene").value == 0
    assert test.text_input(key="typed_model") is not None


def test_a_folder_that_only_a_link_names_is_loaded_after_a_click(tmp_path: Path) -> None:
    model = tiny.llava(2)
    model.save_pretrained(tmp_path)
    tiny.processor(model).save_pretrained(tmp_path)
    test = page(task="own question", prompt="what?", longest="2", model=str(tmp_path))
    assert not test.pills
    next(b for b in test.button if b.label == "Load this model").click().run()
    assert errors(test) == []
    assert len(test.pills(key="token").options) >= 1


def test_loading_is_said_only_of_a_model_that_is_not_in_memory() -> None:
    loaded = {"scenes": object()}
    for name, said in (("scenes", "Answering"), ("other", "Loading the model and answering")):
        bench = SimpleNamespace(loaded=loaded.get)
        context = SimpleNamespace(bench=bench, question=SimpleNamespace(model=name))
        assert doing(context) == said  # type: ignore[arg-type]


@pytest.mark.parametrize("token", ["", " ", "\n", "  \n", " red"])
def test_one_token_is_written_in_one_way_everywhere(token: str) -> None:
    pill = shown_token(token).replace("\\", "")
    strip = Strip((token,), np.array([0.5]), Axis("attention", "share"), (Span("answer", 0, 1),))
    assert pill
    assert f">{pill}<" in draw_html.draw(strip)


def test_the_frame_around_what_a_word_is_about_holds_every_patch_that_counts() -> None:
    """Patches are a 4 x 4 grid of the picture; the object covers one and touches others."""
    edges = np.array([(c / 4, r / 4, (c + 1) / 4, (r + 1) / 4) for r in range(4) for c in range(4)])
    box = Box(0.3 * SIDE, 0.2 * SIDE, 0.55 * SIDE, 0.4 * SIDE, "heart")
    touched = [
        place
        for place, (left, top, right, bottom) in enumerate(edges * SIDE)
        if left < box.right and right > box.left and top < box.bottom and bottom > box.top
    ]
    seen = SimpleNamespace(images=[SimpleNamespace(placed=True, boxes=edges)])
    region = SimpleNamespace(tokens=tuple(touched), boxes=(box,))
    (frame,) = patch_frames(seen, region)  # type: ignore[arg-type]
    assert (frame.left, frame.top) == (0.25 * SIDE, 0)
    assert (frame.right, frame.bottom) == (0.75 * SIDE, 0.5 * SIDE)
    assert frame.label == "heart"


# -- choices --------------------------------------------------------------------------------------


def test_back_returns_to_the_view_and_the_choices_of_the_address() -> None:
    test = page(**ONE_WORD, layer="1")
    test.segmented_control(key="view").set_value("heads").run()
    link = {name: address(test, name) for name in test.query_params}
    assert link["view"] == "heads"
    before = {name: value for name, value in link.items() if name != "view"}
    test.query_params.clear()
    for name, value in before.items():
        test.query_params[name] = value
    test.run()
    assert test.session_state["view"] == "ask"
    assert test.session_state["layer"] == "1"
    assert {name: address(test, name) for name in test.query_params} == before
    test.select_slider(key="layer").set_value("3").run()  # what is chosen next is written again
    assert address(test, "layer") == "3"


def test_a_choice_that_arrives_with_an_older_address_counts() -> None:
    test = page(**ONE_WORD, layer="1")
    link = {name: address(test, name) for name in test.query_params}
    test.select_slider(key="layer").set_value("2").run()
    test.query_params.clear()
    for name, value in link.items():
        test.query_params[name] = value
    test.select_slider(key="layer").set_value("3").run()
    assert test.session_state["layer"] == "3"
    assert address(test, "layer") == "3"


def test_a_run_writes_no_control_that_is_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that a run writes is sent to the browser, where it replaces a newer one."""
    test = page(view="live", **ONE_WORD)
    sent = {key: test.slider(key=key).proto.set_value for key in ("secondary", "core", "prefill")}
    test.toggle(key="use_text").set_value(False).run()
    test.slider(key="secondary").set_value(0.45).run()
    assert errors(test) == []
    assert sent  # what a first run sends is allowed
    for key in sent:
        assert not test.slider(key=key).proto.set_value, key
    assert test.session_state["preset"] == "custom"
    assert test.slider(key="secondary").value == 0.45


def test_looking_at_heads_changes_nothing_in_ask() -> None:
    test = page(**ONE_WORD)
    before = texts(test)
    test.segmented_control(key="view").set_value("heads").run()
    test.segmented_control(key="view").set_value("ask").run()
    assert test.session_state["head"] == state.ALL
    assert texts(test) == before


def test_the_ranking_is_ticked_at_the_head_that_is_shown() -> None:
    test = page(view="heads", task="caption", layer="2", head="2")

    def ticked() -> tuple[int, int]:
        table = test.dataframe[0]
        key = table.proto.id.partition("ranking_")[2]
        rows = test.session_state[f"ranking_{key}"]["selection"]["rows"]
        assert len(rows) == 1
        row = table.value.iloc[rows[0]]
        return int(row["layer"]), int(row["head"])

    assert ticked() == (2, 2)
    test.toggle(key="single_token").set_value(True).run()
    assert "Layer 2, head 2" in texts(test)
    assert ticked() == (2, 2)


def test_a_head_is_chosen_without_a_pointer() -> None:
    test = page(view="heads", **ONE_WORD, layer="2", head="2")
    test.selectbox(key="head_field").select(4).run()
    assert "Layer 2, head 4" in texts(test)
    test.selectbox(key="layer_field").select(0).run()
    assert "Layer 0, head 4" in texts(test)
    assert address(test, "head") == "4"


# -- files ----------------------------------------------------------------------------------------


def test_a_policy_file_is_kept_until_it_is_taken_away(tmp_path: Path) -> None:
    policy = avl.AdaptivePolicy(secondary=0.25, core=0.2)
    data = save_policy(policy, tmp_path / "mine.json").read_bytes()
    test = page(view="live", **ONE_WORD, preset="file")
    test.file_uploader(key="policy").set_value(("mine.json", data, "application/json")).run()
    assert list(test.dataframe[0].value["policy"]) == ["full cache", "A-VL"]
    test.segmented_control(key="view").set_value("ask").run()
    test.segmented_control(key="view").set_value("live").run()
    assert errors(test) == []
    assert list(test.dataframe[0].value["policy"]) == ["full cache", "A-VL"]
    assert any("mine" in caption.value for caption in test.caption)
    next(b for b in test.button if b.label == "Remove").click().run()
    assert list(test.dataframe[0].value["policy"]) == ["full cache"]


def test_an_own_picture_is_kept_while_an_example_is_looked_at() -> None:
    test = page(source="upload", task="own question", longest="2")
    test.file_uploader(key="file").set_value(("red.png", png(30, 20), "image/png")).run()
    test.segmented_control(key="source").set_value("example").run()
    test.segmented_control(key="source").set_value("upload").run()
    assert errors(test) == []
    assert len(test.pills(key="token").options) <= 2
    assert any("red" in caption.value for caption in test.caption)


# -- questions of a visit -------------------------------------------------------------------------


def test_questions_are_listed_asked_again_and_set_beside_each_other() -> None:
    test = page(**ONE_WORD)
    test.selectbox(key="task").set_value("ocr").run()
    assert any("Asked before" in e.label for e in test.expander)
    test.selectbox(key="beside").select_index(1).run()
    assert errors(test) == []
    assert any(c.value.endswith("in both.") for c in test.caption)
    test.selectbox(key="beside").select_index(0).run()
    next(b for b in test.button if b.key == "history_0").click().run()
    assert errors(test) == []
    assert test.session_state["task"] == "colour"
    assert address(test, "task") == "colour"


def test_a_question_about_a_video_is_asked_again_about_the_same_video() -> None:
    test = page(source="video", clip="1", longest="2")
    test.number_input(key="clip").set_value(2).run()
    next(b for b in test.button if b.key == "history_0").click().run()
    assert errors(test) == []
    assert test.session_state["clip"] == 1


def test_the_model_says_what_it_is() -> None:
    test = page(**ONE_WORD)
    test.run()
    card = next(m.value for m in test.markdown if "decoder layers" in m.value)
    assert "query heads: **6**" in card
    assert "image tokens here: **144**" in card


# -- messages -------------------------------------------------------------------------------------


def test_settings_that_contradict_each_other_are_named_as_their_controls() -> None:
    test = page(view="live", **ONE_WORD, preset="custom", secondary="0.2", core="0.5")
    assert "(C = 0.5)" in errors(test)[0].replace("\\", "")
    assert "core=None" not in errors(test)[0]


def test_the_box_for_policies_does_not_ask_for_files() -> None:
    test = page(view="live", **ONE_WORD, more="nonsense")
    assert len(errors(test)) == 1
    assert "json" not in errors(test)[0]


def test_figures_that_need_more_say_what_to_do_here() -> None:
    for name, words in (
        ("policies", "Benchmark"),
        ("ablation", "avl ablate"),
        ("frontier", "Send"),
    ):
        test = page(view="patterns", **ONE_WORD, pattern=name)
        assert errors(test) == []
        assert any(words in info.value for info in test.info), name
        assert not any("`" in info.value.replace("\\`", "") for info in test.info)
    assert page(view="patterns", **ONE_WORD, pattern="ablation").file_uploader


def test_one_answer_is_not_said_to_have_intervals() -> None:
    test = page(view="patterns", **ONE_WORD, pattern="modality")
    caption = next(c.value for c in test.caption if "n \\=" in c.value or "n =" in c.value)
    assert "interval" not in caption
