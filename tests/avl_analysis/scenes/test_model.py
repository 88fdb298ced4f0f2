"""The shipped model: loads like any other, answers, and needs its eyes to do so."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from avl_analysis import scenes
from avl_analysis.intervals import wilson
from avl_analysis.scenes import evaluate
from avl_analysis.scenes.language import load_processor

HELD_OUT = 810_000
FILED = Path(scenes.__file__).parent / "evaluation.json"


@pytest.fixture(scope="module")
def shipped() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    model = LlavaForConditionalGeneration.from_pretrained(
        scenes.MODEL_DIR, dtype=torch.float32
    ).eval()
    return model, load_processor(scenes.MODEL_DIR)


def test_the_folder_is_small_and_loads_through_the_auto_classes() -> None:
    assert sum(file.stat().st_size for file in scenes.MODEL_DIR.iterdir()) < 20e6
    assert isinstance(
        AutoProcessor.from_pretrained(scenes.MODEL_DIR, backend="pil"), LlavaProcessor
    )
    assert (scenes.MODEL_DIR / "model.safetensors").exists()


@pytest.mark.parametrize("task", ["what", "shape", "text_colour", "ocr"])
def test_the_shipped_model_answers_held_out_questions(shipped, task: str) -> None:
    asked = scenes.samples(20, task, HELD_OUT)
    given = evaluate.answers(*shipped, asked, batch=20)
    assert (
        sum(evaluate.exact_match(text, s.answer) for text, s in zip(given, asked, strict=True))
        >= 17
    )


def test_with_another_samples_picture_it_cannot_read(shipped) -> None:
    asked = scenes.samples(8, "ocr", HELD_OUT)
    given = evaluate.answers(*shipped, asked, asked[1:] + asked[:1])
    assert not any(
        evaluate.exact_match(text, s.answer) for text, s in zip(given, asked, strict=True)
    )


def test_it_holds_a_conversation_of_several_turns(shipped) -> None:  # type: ignore[no-untyped-def]
    model, processor = shipped
    right = 0
    for index in range(6):
        sample = scenes.generate(HELD_OUT + 1, index, "text_colour")
        turns = [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": sample.prompt}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]},
            {"role": "user", "content": [{"type": "text", "text": "Read the text."}]},
        ]
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = processor(text=text, images=sample.picture, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=10, do_sample=False)
        said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += evaluate.exact_match(said, sample.scene.text.string)
    assert right >= 4


def test_exact_match_forgives_spaces_and_a_full_stop_and_nothing_else() -> None:
    assert evaluate.exact_match(" a big  red circle.", "a big red circle")
    assert not evaluate.exact_match("a big red", "a big red circle")
    assert not evaluate.exact_match("k7P", "K7P")
    assert not evaluate.exact_match("", "red")


def test_chance_is_the_commonest_answer_of_each_kind_of_question() -> None:
    asked = scenes.samples(60, "count", 3)
    right = 0
    for kind in {s.question.kind for s in asked}:
        answers = [s.answer for s in asked if s.question.kind == kind]
        right += max(Counter(answers).values())
    assert evaluate.chance(asked) == pytest.approx(right / 60)


def test_evaluation_refuses_too_few_samples_and_unequal_pictures(shipped) -> None:
    with pytest.raises(ValueError, match="n=1"):
        evaluate.evaluate_task(*shipped, "ocr", n=1)
    with pytest.raises(ValueError, match="2 prompts and 1 pictures"):
        evaluate.answers(*shipped, scenes.samples(2, "ocr"), scenes.samples(1, "ocr"))


def test_the_filed_evaluation_covers_every_task_with_at_least_500_samples() -> None:
    filed = json.loads(FILED.read_text())["tasks"]
    assert set(filed) == set(scenes.TASKS)
    for task, line in filed.items():
        assert line["samples"] >= 500, task
        low, high = wilson(line["right"], line["samples"])
        assert line["interval95"] == [pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4)]
        assert low <= line["exact_match"] <= high
