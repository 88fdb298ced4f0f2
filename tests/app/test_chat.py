"""A second question after an answer, as a visitor asks it, beside the model asked by hand."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")

from avl_analysis import live, load_model, scene_samples
from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.errors import InputError
from avl_analysis.evaluation.generation import generate
from avl_app import code, state
from avl_app.data import Question
from avl_app.examples import questions, scene_picture
from tests.app.pages import ONE_WORD, address, errors, page, texts

SECOND = "What shapes do you see?"


def test_a_further_question_continues_from_the_answer_and_comes_again_from_its_link() -> None:
    test = page(**ONE_WORD)
    first = questions(0)["colour"].prompt
    test.chat_input(key="further").set_value(SECOND).run()
    assert errors(test) == []
    assert f"### {SECOND}" in texts(test)
    # By hand: the first answer, and the second question with both before it.
    vlm, image = load_model("scenes"), scene_picture(0).pixels
    said = str(vlm.answer(image, first))
    inputs = vlm.prepare(image, SECOND, history=[(first, said)])
    written = vlm.model.generate(**inputs, max_new_tokens=64, do_sample=False)
    ids = written[0, inputs["input_ids"].shape[1] :]
    expected = vlm.processor.decode(ids, skip_special_tokens=True)
    pills = "".join(test.pills(key="token").options)
    assert letters(pills) == letters(expected)
    assert said in texts(test)
    # The model has read the first question too: it stands among the words that were looked at.
    strips = [re.sub(r"<[^>]*>", "", html.proto.body) for html in test.get("html")]
    assert any(letters(first) in letters(strip) for strip in strips)
    # The link holds the questions, and gives the same conversation to somebody else.
    link = {name: address(test, name) for name in ("task", "prompt", "earlier")}
    assert json.loads(link["earlier"]) == [first]
    other = page(**link)
    assert errors(other) == []
    assert list(other.pills(key="token").options) == list(test.pills(key="token").options)
    # Alone it is another question.
    next(b for b in other.button if b.label == "Ask this alone").click().run()
    assert errors(other) == []
    assert "earlier" not in other.query_params
    assert said not in texts(other)


def test_a_conversation_ends_with_its_picture_and_comes_back_from_the_list() -> None:
    test = page(**ONE_WORD)
    test.chat_input(key="further").set_value(SECOND).run()
    asked = address(test, "earlier")
    test.number_input(key="scene").set_value(3).run()
    assert errors(test) == []
    assert "earlier" not in test.query_params
    before = next(b for b in test.button if b.label.startswith("scene 0: What shapes"))
    before.click().run()
    assert errors(test) == []
    assert address(test, "earlier") == asked


@pytest.mark.parametrize(
    "text", ["", "no list", "[1]", '["a", " "]', "[" * 9000, json.dumps(["a" * 5000]), '{"a": 1}']
)
def test_what_is_no_conversation_is_ignored(text: str) -> None:
    assert state.conversation(text) is None


def test_a_conversation_as_long_as_a_link_carries_takes_no_further_question() -> None:
    long = json.dumps(["Describe the picture. " * 45] * 4)[: state.MOST_EARLIER]
    assert state.conversation(long) == long
    test = page(**ONE_WORD, longest="1", earlier=long)
    assert errors(test) == []
    assert any("as long as a link can carry" in caption.value for caption in test.caption)
    assert len(test.chat_input) == 0


def test_the_code_of_a_conversation_gives_its_answer() -> None:
    first = questions(0)["colour"].prompt
    asked = Question("scenes", scene_picture(0), SECOND, 64, history=((first, "red"),))
    names: dict[str, object] = {}
    exec(code.observed(asked), names)  # what a visitor pastes
    vlm = load_model("scenes")
    expected = live.observe(vlm, asked.sample)
    assert names["seen"].answer.ids == expected.answer.ids  # type: ignore[attr-defined]
    assert names["seen"].prompt == expected.prompt  # type: ignore[attr-defined]
    alone = live.observe(vlm, Sample("q", asked.sample.images, SECOND))
    assert alone.prompt < expected.prompt


def test_runs_over_many_samples_refuse_conversations() -> None:
    vlm, (sample,) = load_model("scenes"), scene_samples(1, ["colour"])
    talk = Sample("talk", sample.images, sample.prompt, history=(("What is it?", "a circle"),))
    with pytest.raises(InputError, match="'talk' continues a conversation of 1 earlier"):
        record_samples(vlm, [talk])
    with pytest.raises(InputError, match="ask these one at a time"):
        generate(vlm, [sample, talk], None, max_new_tokens=2)
    alone = generate(vlm, [talk], None, max_new_tokens=2)
    assert alone.prompt_tokens == [live.observe(vlm, talk, max_new_tokens=2).prompt]
    assert alone.prompt_tokens > generate(vlm, [sample], None, max_new_tokens=2).prompt_tokens


def letters(text: str) -> str:
    """A text without spaces and signs for them."""
    return "".join(text.replace("␣", "").replace("\u2060", "").split())
