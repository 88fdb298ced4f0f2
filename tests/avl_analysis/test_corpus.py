"""Recording a list of questions: each sample is what it would be alone, and carries what a report needs."""

from pathlib import Path

import numpy as np
import pytest

from avl_analysis.corpus import facts_of, record_samples
from avl_analysis.errors import InputError
from avl_analysis.models import VLM, load_model
from avl_analysis.samples import Sample
from tests import tiny

SAMPLES = [
    Sample("a", (tiny.picture(seed=0),), "what is this?", answers=("red", "a red one"), task="colour"),
    Sample("b", (tiny.picture(seed=1), tiny.picture(seed=2)), "which is the red one?", regions=((1, 2, 3, 4),)),
    Sample("c", (tiny.picture(seed=3),), "describe the image", meta={"source": "drawn"}),
]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return load_model(tiny.save_folder(tmp_path_factory.mktemp("model"), tiny.llava(kv_heads=2)))


def test_samples_recorded_in_a_padded_batch_equal_samples_recorded_alone(vlm: VLM) -> None:
    alone = record_samples(vlm, SAMPLES, max_new_tokens=3)
    batch = record_samples(vlm, SAMPLES, max_new_tokens=3, batch_size=2)
    assert [batch.facts(i) for i in range(3)] == [alone.facts(i) for i in range(3)]
    np.testing.assert_allclose(batch["modality_mass"].values, alone["modality_mass"].values, atol=1e-5)


def test_every_sample_carries_its_question_its_answer_and_what_is_known_of_it(vlm: VLM) -> None:
    facts = [record_samples(vlm, SAMPLES, max_new_tokens=3).facts(i) for i in range(3)]
    assert [known["prompt"] for known in facts] == [sample.prompt for sample in SAMPLES]
    assert all(len(known["words"]) == 3 for known in facts)
    assert (facts[0]["truth"], facts[0]["answers"], facts[0]["task"]) == ("red", ["red", "a red one"], "colour")
    assert facts[1]["boxes"] == [[1, 2, 3, 4]]
    assert facts[2]["source"] == "drawn"
    assert "picture" in facts[0]
    assert "picture" not in facts[1]


def test_the_answer_ends_before_the_token_that_ends_it(vlm: VLM) -> None:
    word = vlm.processor.tokenizer.convert_tokens_to_ids("▁red")
    facts = facts_of(vlm, SAMPLES[0], [word, word, tiny.EOS, tiny.PAD, word])
    assert len(facts["words"]) == 2
    assert facts["answer"] == "red red"


def test_progress_is_told_after_every_token(vlm: VLM) -> None:
    told: list[tuple[int, int]] = []
    record_samples(vlm, SAMPLES[:2], max_new_tokens=2, on_token=lambda done, token: told.append((done, token)))
    assert told == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_a_missing_picture_and_an_empty_batch_are_refused(vlm: VLM) -> None:
    with pytest.raises(InputError, match="no such file"):
        record_samples(vlm, [Sample("x", (Path("nothing.png"),), "what?")])
    with pytest.raises(InputError, match="batch_size 0"):
        record_samples(vlm, SAMPLES, batch_size=0)
