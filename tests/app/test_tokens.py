"""What Ask and Heads say beyond attention over a picture: probabilities, readers, rollout."""

from __future__ import annotations

import io

import numpy as np
import pytest

pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")

from PIL import Image
from streamlit.testing.v1 import AppTest

from avl_analysis import load_model
from avl_analysis.heads.ablation import silenced
from avl_app import page as parts
from avl_app import state
from avl_app.data import ModelServer
from avl_app.examples import questions
from avl_app.pictures import picture
from tests.app.pages import ONE_WORD, SCRIPT, address, errors, page, texts


def test_the_chosen_token_comes_with_its_probability_and_the_likeliest_others() -> None:
    test = page(**ONE_WORD, token="0")
    assert errors(test) == []
    told = next(m.value for m in test.markdown if "was written with probability" in m.value)
    sample = questions(0)["colour"]
    vlm = load_model("scenes")
    inputs = vlm.prepare(sample.image, sample.prompt)
    logits = vlm.model(**inputs).logits[0, -1].detach().float().softmax(-1)
    assert f"{float(logits.max()):.1%}" in told
    assert any(e.label == "Next-token probabilities" for e in test.expander)


def test_answers_are_drawn_at_a_temperature_and_come_again_from_the_address() -> None:
    # a question that the model never read, about whose answer it is not sure
    asked = {"task": "own question", "prompt": "why?", "longest": "8", "temperature": "2"}
    test = page(**asked, seed="1")
    first = list(test.pills(key="token").options)
    assert errors(test) == []
    seen = {tuple(first)}
    for seed in (2, 3, 4):
        test.number_input(key="seed").set_value(seed).run()
        seen.add(tuple(test.pills(key="token").options))
    assert len(seen) > 1
    assert address(test, "seed") == "4"
    again = page(**asked, seed="1")
    assert list(again.pills(key="token").options) == first


def test_a_system_prompt_reaches_the_model() -> None:
    for system in ("", "yellow"):  # a word that neither the question nor the answer holds
        test = page(**ONE_WORD, system=system)
        assert errors(test) == []
        strips = [html.proto.body for html in test.get("html")]
        assert any("yellow" in body for body in strips) == bool(system)


def test_patches_chosen_by_number_show_which_tokens_looked_at_them() -> None:
    test = page(**ONE_WORD, readers="1", layer="3", head="all")
    assert errors(test) == []
    assert any("No patch is chosen" in info.value for info in test.info)
    test.multiselect(key="patches").set_value(["5", "6"]).run()
    assert errors(test) == []
    assert any(caption.value.startswith("2 of 144 patches") for caption in test.caption)
    assert address(test, "patches") == "5,6"
    test.selectbox(key="task").set_value("shape").run()
    assert test.multiselect(key="patches").value == []


def test_rollout_and_words_are_shown_when_asked_for() -> None:
    test = page(**ONE_WORD, rollout="1", words="1", layer="2")
    assert errors(test) == []
    assert "Rollout through layers 0 to 2" in texts(test)
    assert any("comes from the picture" in caption.value for caption in test.caption)


def test_an_answer_without_a_head_is_what_silencing_it_gives() -> None:
    test = page(view="heads", **ONE_WORD, layer="2", head="1", without_head="1")
    assert errors(test) == []
    vlm, sample = load_model("scenes"), questions(0)["colour"]
    with silenced(vlm.model, [(2, 1)]):
        wanted = vlm.answer(sample.image, sample.prompt)
    shown = next(m.value for m in test.markdown if m.value.startswith("**Without it**"))
    bare = shown.replace("**Without it**", "").replace("~~", "").strip()
    assert str(wanted) in bare
    assert any("has probability" in c.value or "Instead of" in c.value for c in test.caption)


def test_a_cancelled_answer_is_not_begun_again_until_it_is_asked_for() -> None:
    test = AppTest.from_file(SCRIPT, default_timeout=600)
    test.query_params["task"], test.query_params["longest"] = "colour", "61"  # asked by no other
    test.session_state[state.CANCELLED] = True
    test.run()
    assert any("was cancelled" in info.value for info in test.info)
    assert not any(m.value.startswith("#### To write") for m in test.markdown)
    test.button(key="uncancel").click().run()
    assert errors(test) == []
    assert any(m.value.startswith("#### To write") for m in test.markdown)
    test.session_state[state.CANCELLED] = True
    test.selectbox(key="task").set_value("shape").run()  # another question was not cancelled
    assert any(m.value.startswith("#### To write") for m in test.markdown)


def test_a_bar_says_how_much_is_left_and_who_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 100.0, 150.0])
    monkeypatch.setattr(parts.time, "monotonic", lambda: next(clock))
    said: list[str] = []

    class Bar:
        def progress(self, share: float, text: str) -> None:
            said.append(f"{share:.2f} {text}")

        def empty(self) -> None:
            said.append("gone")

    monkeypatch.setattr(parts.st, "progress", lambda share, text: Bar())
    with parts.Progress("Starting", "answers") as bar:
        bar.done(1, 4)
        bar.waiting(2)
        bar.done(1, 4)
        monkeypatch.setattr(parts.time, "monotonic", lambda: 0.0)
        bar.done(4, 4)
    assert said == [
        "0.25 1 of 4 answers · about 30 s left",
        "0.00 :material/group: Another session is using this model; 2 answers come before yours …",
        "0.25 1 of 4 answers · about 2 min left",
        "1.00 4 of 4 answers",
        "gone",
    ]


def test_the_scale_and_the_colours_of_maps_are_chosen_for_all_tokens() -> None:
    test = page(**ONE_WORD, token="0", scale="row", colours="viridis", smooth="1")
    assert errors(test) == []
    assert any("Full colour: 100.0%" in caption.value for caption in test.caption)
    test.selectbox(key="scale").set_value("answer").run()
    assert errors(test) == []


def test_scenes_are_chosen_from_pictures() -> None:
    test = page(**ONE_WORD, gallery="1", scene="11")
    numbers = [b.label for b in test.button if str(b.key).startswith("gallery_1")]
    assert numbers == [str(number) for number in range(10, 18)]
    next(b for b in test.button if b.key == "gallery_14").click().run()
    assert errors(test) == []
    assert address(test, "scene") == "14"


def test_a_link_to_a_picture_that_was_sent_shows_it_to_another_visitor() -> None:
    file = io.BytesIO()
    Image.new("RGB", (50, 40), "teal").save(file, "PNG")
    test = page(source="upload", task="own question", longest="2")
    test.file_uploader(key="file").set_value(("teal.png", file.getvalue(), "image/png")).run()
    link = {name: address(test, name) for name in ("source", "task", "longest", "picture")}
    other = page(**link)
    assert errors(other) == []
    assert any("comes from the link" in caption.value for caption in other.caption)
    assert len(other.pills(key="token").options) >= 1
    unknown = page(**{**link, "picture": "0" * 24})
    assert any("no longer has" in caption.value for caption in unknown.caption)


def test_pictures_are_kept_by_what_they_show() -> None:
    bench = ModelServer(results=1)
    red = picture(np.zeros((4, 4, 3), np.uint8), "red")
    bench.remember(red)
    assert bench.picture(red.digest) is red
    bench.remember(picture(np.ones((4, 4, 3), np.uint8), "other"))
    assert bench.picture(red.digest) is None
    assert bench.picture("") is None
