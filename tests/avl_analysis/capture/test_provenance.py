"""One model has one name, however it was recorded."""

from __future__ import annotations

import avl
from avl_analysis import live
from avl_analysis.capture.recorder import record
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.evaluation.compare import compare
from avl_analysis.models.loading import name_and_revision
from avl_analysis.recordings.recording import load_recording, merge
from tests import tiny
from tests.avl_analysis import shared

STATISTICS = ["modality_mass", "first_token_mass"]


def test_recordings_of_one_model_merge_whatever_made_them(tmp_path):
    vlm = shared.vlm()
    samples = shared.questions(2)
    corpus = record_samples(vlm, samples, max_new_tokens=2, statistics=STATISTICS)
    inputs = vlm.prepare(list(samples[1].images), samples[1].prompt)
    with record(vlm.model, statistics=STATISTICS, first_sample=2) as by_hand:
        vlm.model.generate(**inputs, max_new_tokens=2)
    by_hand.save(tmp_path / "run.nc")
    merged = merge([corpus, load_recording(tmp_path / "run.nc")])
    assert len(merged) == 3
    assert merged.attrs["model"] == "tiny"


def test_every_way_of_measuring_names_the_model_alike():
    vlm = shared.vlm()
    sample = shared.questions(2)[1]
    names = {
        live.observe(vlm, sample, max_new_tokens=2).recording.attrs["model"],
        record_samples(vlm, [sample], max_new_tokens=2, statistics=STATISTICS).attrs["model"],
        compare(
            vlm, [sample], {"full": avl.FullPolicy()}, max_new_tokens=2, metrics=["accuracy"]
        ).dataset.attrs["model"],
    }
    assert names == {"tiny"}


def test_a_model_nobody_named_is_called_what_it_was_read_from_or_by_its_class():
    model = tiny.llava()
    assert name_and_revision(model) == ("LlavaForConditionalGeneration", "")
    model.name_or_path = "org/model"
    assert name_and_revision(model) == ("org/model", "")
