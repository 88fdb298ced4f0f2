"""Recording a list of questions: each sample is what it would be alone, and carries what a report
needs.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.record_samples import facts_of, record_samples
from avl_analysis.corpus.regions import recorded_regions, regions_of
from avl_analysis.errors import InputError
from avl_analysis.heads.localisation import first_word_hits
from avl_analysis.models.loading import VLM, load_model
from tests import tiny

SAMPLES = [
    Sample(
        "a", (tiny.picture(seed=0),), "what is this?", answers=("red", "a red one"), task="colour"
    ),
    Sample(
        "b",
        (tiny.picture(seed=1), tiny.picture(seed=2)),
        "which is the red one?",
        regions=((1, 2, 3, 4),),
    ),
    Sample("c", (tiny.picture(seed=3),), "describe the image", meta={"source": "drawn"}),
]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return load_model(tiny.save_folder(tmp_path_factory.mktemp("model"), tiny.llava(kv_heads=2)))


def test_samples_recorded_in_a_padded_batch_equal_samples_recorded_alone(vlm: VLM) -> None:
    alone = record_samples(vlm, SAMPLES, max_new_tokens=3)
    batch = record_samples(vlm, SAMPLES, max_new_tokens=3, batch_size=2)
    facts, own = ([dict(made.facts(i)) for i in range(3)] for made in (batch, alone))
    surprises = [[one.pop("surprise") for one in some] for some in (facts, own)]
    np.testing.assert_allclose(*surprises, atol=1e-4)
    assert facts == own
    np.testing.assert_allclose(
        batch["modality_mass"].values, alone["modality_mass"].values, atol=1e-5
    )


def test_every_sample_carries_its_question_its_answer_and_what_is_known_of_it(vlm: VLM) -> None:
    facts = [record_samples(vlm, SAMPLES, max_new_tokens=3).facts(i) for i in range(3)]
    assert [known["prompt"] for known in facts] == [sample.prompt for sample in SAMPLES]
    assert all(len(known["words"]) == 3 for known in facts)
    assert (facts[0]["truth"], facts[0]["answers"], facts[0]["task"]) == (
        "red",
        ["red", "a red one"],
        "colour",
    )
    assert facts[1]["boxes"] == [[1, 2, 3, 4]]
    assert facts[2]["meta"] == {"source": "drawn"}
    assert "picture" in facts[0]
    assert "picture" not in facts[1]


def test_surprise_is_the_negative_log_probability_of_every_word(vlm: VLM) -> None:
    """Against one pass over prompt and answer, without `generate`."""
    facts = record_samples(vlm, SAMPLES[:1], max_new_tokens=3).facts(0)
    inputs = vlm.prepare(list(SAMPLES[0].images), SAMPLES[0].prompt)
    length = inputs["input_ids"].shape[1]
    answer = vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, length:]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = vlm.model(**inputs).logits[0]
    logits[:, vlm.model.generation_config.suppress_tokens] = -torch.inf
    expected = [
        -float(torch.log_softmax(logits[length - 1 + step], -1)[token])
        for step, token in enumerate(answer[0].tolist())
    ]
    np.testing.assert_allclose(facts["surprise"], expected[: len(facts["words"])], atol=1e-4)


def test_no_surprise_is_kept_where_rows_are_not_the_questions(vlm: VLM) -> None:
    twice = {"num_return_sequences": 2, "do_sample": True}
    facts = record_samples(vlm, SAMPLES[:1], max_new_tokens=2, generate=twice).facts(0)
    assert "surprise" not in facts
    assert facts["words"]


def test_boxes_given_with_a_question_become_the_image_tokens_under_them(vlm: VLM) -> None:
    shown = tiny.picture(size=(40, 40))  # 4 x 4 tokens, so that a token is 10 pixels wide
    asked = [
        Sample("right half", (shown,), "what is this?", regions=((20, 0, 40, 40),)),
        Sample("corner", (shown,), "where is the blue one?", regions=((0, 0, 10, 10),)),
        Sample("several", (shown, shown), "which?", regions=((0, 0, 10, 10),)),
        SAMPLES[2],
    ]
    recording = record_samples(vlm, asked, max_new_tokens=2, batch_size=2)
    inside = [recording.facts(i).get("region_tokens") for i in range(4)]
    assert inside == [[4 * row + column for row in range(4) for column in (2, 3)], [0], None, None]
    regions = recorded_regions(recording)
    assert regions == {
        "000000": dict.fromkeys(range(2), tuple(inside[0])),
        "000001": dict.fromkeys(range(2), (0,)),
    }
    hits = first_word_hits(recording, regions)
    scores = recording["image_score_last"]
    for sample, tokens in ((0, inside[0]), (1, [0])):
        for layer, head in np.ndindex(hits.shape[1:]):
            best = int(np.nanargmax(scores[sample].sel(layer=layer, head=head).values))
            assert hits.values[sample, layer, head] == (best in tokens)
    assert np.isnan(hits.values[2:]).all()


def test_a_wrong_answer_is_about_no_region_and_an_unknown_truth_about_the_boxes() -> None:
    facts = {
        "words": ["a", "b"],
        "answer": "A red one.",
        "region_tokens": [3],
        "boxes": [[0, 0, 1, 1]],
    }
    assert [region.tokens for region in regions_of(facts)] == [(3,), (3,)]
    assert len(regions_of({**facts, "answers": ["blue", "red one"]})) == 2
    assert regions_of({**facts, "answers": ["blue"]}) == []


def test_the_answer_ends_before_the_token_that_ends_it(vlm: VLM) -> None:
    word = vlm.processor.tokenizer.convert_tokens_to_ids("▁red")
    facts = facts_of(vlm, SAMPLES[0], [word, word, tiny.EOS, tiny.PAD, word])
    assert len(facts["words"]) == 2
    assert facts["answer"] == "red red"


def test_progress_is_told_after_every_token(vlm: VLM) -> None:
    told: list[tuple[int, int]] = []
    record_samples(
        vlm, SAMPLES[:2], max_new_tokens=2, on_token=lambda done, token: told.append((done, token))
    )
    assert told == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_a_missing_picture_and_an_empty_batch_are_refused(vlm: VLM) -> None:
    with pytest.raises(InputError, match="no such file"):
        record_samples(vlm, [Sample("x", (Path("nothing.png"),), "what?")])
    with pytest.raises(InputError, match="batch_size 0"):
        record_samples(vlm, SAMPLES, batch_size=0)


def test_facts_of_the_user_never_take_the_place_of_what_was_recorded(vlm: VLM) -> None:
    meta = {"answer": "GOLD", "prompt": "other", "scene": "kitchen", "picture": 3, "id": "x"}
    sample = Sample("a", (tiny.picture(),), "what is this?", ("red",), meta=meta)
    facts = record_samples(vlm, [sample], max_new_tokens=2).facts(0)
    plain = record_samples(vlm, [replace(sample, meta=None)], max_new_tokens=2).facts(0)
    assert facts.pop("meta") == meta
    assert facts == plain


def test_an_empty_answer_is_an_answer(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model ends at once."""
    end = 2
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", end)
    every_other = [token for token in range(tiny.VOCABULARY) if token != end]
    monkeypatch.setattr(vlm.model.generation_config, "suppress_tokens", every_other)
    facts = record_samples(vlm, [Sample("a", (tiny.picture(),), "what?")]).facts(0)
    assert facts["answer"] == ""
    assert "words" not in facts


@pytest.mark.parametrize("box", [(40, 0, 50, 9), (0, 30, 9, 40), (100, 100, 200, 200)])
def test_a_region_outside_the_picture_is_refused(vlm: VLM, box: tuple[int, ...]) -> None:
    sample = Sample("a", (tiny.picture((40, 30)),), "what?", regions=(box,))
    with pytest.raises(InputError, match="outside its picture of 40 x 30"):
        record_samples(vlm, [sample], max_new_tokens=2)


@pytest.mark.parametrize(
    "values", [{"num_beams": 3}, {"use_cache": False}, {"return_dict_in_generate": True}]
)
def test_one_question_is_one_sample_whatever_the_model_says_about_generation(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch, values: dict
) -> None:
    plain = record_samples(vlm, SAMPLES[:1], max_new_tokens=3)
    for name, value in values.items():
        monkeypatch.setattr(vlm.model.generation_config, name, value)
    recording = record_samples(vlm, SAMPLES[:1], max_new_tokens=3)
    assert len(recording) == 1
    assert recording.facts(0) == plain.facts(0)
