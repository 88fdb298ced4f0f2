"""Costs are counted per answer; a failed or missing answer is an error, never an empty score."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import avl
from avl_analysis import compare, scene_samples
from avl_analysis.cli.main import main
from avl_analysis.corpus.questions import Sample
from avl_analysis.errors import InputError
from avl_analysis.lmms import results
from avl_analysis.lmms.local_task import score, write_task
from avl_analysis.lmms.tally import Tally, TallyError
from avl_analysis.models.loading import VLM
from tests.avl_analysis import shared


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return shared.vlm()


def _ask(vlm: VLM, sample: Sample, steps: int = 4) -> Any:
    inputs = vlm.prepare([list(sample.images)], [sample.prompt])
    return vlm.model.generate(**inputs, max_new_tokens=steps, do_sample=False)


def test_bytes_are_those_that_compare_measures(vlm: VLM) -> None:
    samples = scene_samples(3, ["colour"])
    policy = avl.AdaptivePolicy()
    with Tally(vlm.model, policy) as tally:
        lengths = [len(_ask(vlm, sample)[0]) for sample in samples]
    assert min(lengths) > 0
    tally.check(3)
    measured = compare(
        vlm, samples, {"A-VL": policy}, max_new_tokens=4, batch_size=1, metrics=["cost"]
    )
    filled = measured["kv_filled"].sel(policy="A-VL").values
    assert [answer.filled for answer in tally.answers] == filled.astype(int).tolist()
    assert tally.summary()["avl_kv_bytes"] == filled.sum()
    assert tally.summary()["avl_questions"] == 3


def test_without_a_policy_tokens_are_the_models_own_and_generate_is_left_as_it_was(
    vlm: VLM,
) -> None:
    sample = scene_samples(1, ["colour"])[0]
    plain = _ask(vlm, sample)
    with Tally(vlm.model, None) as tally:
        counted = _ask(vlm, sample)
    assert torch.equal(plain, counted)
    assert "generate" not in vars(vlm.model)
    assert tally.summary()["avl_keys_read_share"] == 1.0


def test_a_swallowed_failure_is_an_error_in_the_end(vlm: VLM) -> None:
    sample = scene_samples(1, ["colour"])[0]
    inputs = vlm.prepare([list(sample.images)], [sample.prompt])
    with Tally(vlm.model, avl.AdaptivePolicy()) as tally:
        with contextlib.suppress(Exception):  # as wrappers do that score an empty answer
            vlm.model.generate(**inputs, max_new_tokens=2, use_cache=False)
        _ask(vlm, sample)
    with pytest.raises(TallyError, match="1 of 2 questions failed under AdaptivePolicy"):
        tally.check(2)


def test_questions_that_never_reached_the_model_are_an_error(vlm: VLM) -> None:
    with Tally(vlm.model, None) as tally:
        _ask(vlm, scene_samples(1, ["colour"])[0])
    with pytest.raises(TallyError, match="1 of 5 questions were put to the model"):
        tally.check(5)


def test_a_task_folder_holds_questions_pictures_and_our_own_scoring(tmp_path: Path) -> None:
    samples = scene_samples(2, ["what"])
    task = write_task(tmp_path, "mine", samples, max_new_tokens=7)
    lines = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [sample.id for sample in samples]
    assert all((tmp_path / name).is_file() for line in lines for name in line["images"])
    assert "max_new_tokens: 7" in task.read_text()
    assert score(samples[0].answers[0], lines[0]) == 1.0
    assert score("something else", lines[0]) == 0.0
    with pytest.raises(InputError, match="no known answer"):
        write_task(tmp_path, "mine", [Sample("q", (), "why?")])


def test_result_files_become_one_table_and_others_are_refused(tmp_path: Path) -> None:
    def write(name: str, value: float, questions: float = 4.0) -> Path:
        costs = {"avg_avl_questions": questions, "avg_avl_kv_bytes_share": value / 2}
        scores = {"mme": {"correct,none": value, "correct_stderr,none": 0.1, "alias": "mme"}}
        path = tmp_path / f"{name}_results.json"
        path.write_text(json.dumps({"results": scores, "throughput": costs}))
        return path

    files = {"none": write("a", 1.0), "a-vl": write("b", 0.5)}
    frame = results.table(files, reference="none")
    assert frame.loc["a-vl", "mme correct"] == 0.5
    assert frame.loc["a-vl", "mme correct kept"] == 0.5
    assert frame.loc["a-vl", "bytes / full cache"] == 0.25
    with pytest.raises(InputError, match="numbers of questions"):
        results.table({**files, "other": write("c", 1.0, questions=5.0)})
    (tmp_path / "plain.json").write_text('{"results": {}}')
    with pytest.raises(InputError, match="bytes and keys were not counted"):
        results.read_result(tmp_path / "plain.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scenes", "--wrapper", "gpt"], "unknown wrapper 'gpt'"),
        (["scenes", "--wrapper", "llava_hf"], "lmms-eval is not installed"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["eval", *arguments])
    assert done.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
