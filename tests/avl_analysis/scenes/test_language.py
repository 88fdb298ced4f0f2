"""The embedded model's tokenizer, template and picture processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaProcessor

from avl_analysis import scenes
from avl_analysis.scenes import language, questions
from avl_analysis.scenes.drawing import CHARACTERS
from avl_analysis.scenes.training import batches


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return language.build_processor()


@pytest.mark.parametrize(
    "text",
    [
        "What colour is the circle?",
        "how many crosses are there",
        "a big red circle at top left, an orange text K7P at middle left",
        "Zebra-crossing, 99% (ok)! What's up? <3 ~",
    ],
)
def test_natural_text_survives_encoding_and_decoding(processor: LlavaProcessor, text: str) -> None:
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert processor.tokenizer.decode(ids) == text


def test_no_prompt_or_answer_holds_an_unknown_token(processor: LlavaProcessor) -> None:
    unknown = processor.tokenizer.unk_token_id
    for task in scenes.TASKS:
        for sample in scenes.samples(10, task, seed=31):
            ids = processor.tokenizer(
                f"{sample.prompt} {sample.answer}", add_special_tokens=False
            ).input_ids
            assert unknown not in ids


def test_every_word_of_the_questions_is_one_token_and_plurals_share_it(
    processor: LlavaProcessor,
) -> None:
    for word in questions.vocabulary():
        assert len(processor.tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    one, several = (
        processor.tokenizer(w, add_special_tokens=False).input_ids for w in ("circle", "circles")
    )
    assert several[:1] == one


def test_strings_in_pictures_become_single_characters(processor: LlavaProcessor) -> None:
    ids = processor.tokenizer(f"a {CHARACTERS}", add_special_tokens=False).input_ids
    assert processor.tokenizer.convert_ids_to_tokens(ids[2:]) == list(CHARACTERS)


def test_processor_pixels_equal_the_training_tensor(
    processor: LlavaProcessor, tmp_path: Path
) -> None:
    asked = scenes.samples(3, seed=32)
    prompts = [
        processor.apply_chat_template(language.conversation(s.prompt), add_generation_prompt=True)
        for s in asked
    ]
    images = [sample.picture for sample in asked]
    expected = language.pixel_values(np.stack([sample.image for sample in asked]))
    made = processor(text=prompts, images=images, padding=True, return_tensors="pt")
    assert torch.equal(made["pixel_values"], expected)
    processor.save_pretrained(tmp_path)
    again = language.load_processor(tmp_path)(
        text=prompts, images=images, padding=True, return_tensors="pt"
    )
    assert torch.equal(again["pixel_values"], expected)
    assert torch.equal(again["input_ids"], made["input_ids"])


def test_a_templated_conversation_is_prefix_and_branch_as_trained(
    processor: LlavaProcessor,
) -> None:
    rng = np.random.default_rng(3)
    scene = scenes.generate(33, 0, "ocr").scene
    first, second = questions.ask(rng, scene, "ocr"), questions.ask(rng, scene, "count")
    assert first is not None
    assert second is not None
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": first.prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": first.answer}]},
        {"role": "user", "content": [{"type": "text", "text": second.prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": second.answer}]},
    ]
    image = scenes.generate(33, 0, "ocr").picture
    ids = processor(text=processor.apply_chat_template(turns), images=image, return_tensors="pt")[
        "input_ids"
    ][0]
    assert ids.tolist() == [*batches.prefix_ids(), *batches.branch([first, second]).ids]


def test_a_system_message_replaces_the_usual_text_before_the_picture(
    processor: LlavaProcessor,
) -> None:
    turns = [{"role": "system", "content": "Read."}, *language.conversation("What is at top left?")]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == "<s>Read.<user><image>What is at top left?<assistant>"
