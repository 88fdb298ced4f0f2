"""The frontier of accuracy and bytes: each point is what `compare` would measure, and an
interrupted run goes on.
"""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch

import avl
from avl.policies.registry import PRESETS, policies
from avl_analysis.cli.main import main
from avl_analysis.corpus.batches import batches_by_length, images_encoded_once, longest_right_answer
from avl_analysis.corpus.questions import scene_samples
from avl_analysis.corpus.sharded_run import in_this_process
from avl_analysis.errors import InputError
from avl_analysis.evaluation import frontier
from avl_analysis.evaluation.compare import compare
from avl_analysis.models.loading import VLM
from tests import tiny
from tests.avl_analysis import shared

POINTS = [
    frontier.FrontierPoint("full", None, avl.FullPolicy()),
    frontier.FrontierPoint("random", 0.5, avl.RandomPolicy(budget=0.5)),
    frontier.FrontierPoint("A-VL", 0.5, avl.AdaptivePolicy.for_budget(0.5)),
]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return shared.vlm()


def test_every_policy_stands_at_every_budget_beside_the_full_cache_and_the_paper() -> None:
    points = frontier.entries((0.5, 0.1))
    assert points[0].policy == avl.FullPolicy()
    assert points[1].policy == avl.AdaptivePolicy()
    others = len(policies()) - 1
    expected = 2 + others * 2 + 3 * len(PRESETS)
    assert len({(point.name, point.budget) for point in points}) == len(points) == expected


def test_a_budget_above_one_is_image_tokens_beside_all_text(vlm: VLM) -> None:
    prompts = frontier._prompts(frontier.FrontierSettings(tasks=("relation",)), vlm)
    images = prompts.image_tokens
    half = images // 2
    points = [p for p in frontier.entries((0.5, half), None, prompts) if p.budget == half]
    assert len(points) == len(policies()) - 1 + len(PRESETS)
    samples = scene_samples(2, ["relation"])
    inputs = vlm.prepare([list(s.images) for s in samples], [s.prompt for s in samples])
    text = inputs["attention_mask"].sum(1).numpy() - images
    longest = longest_right_answer(vlm, samples) - 1
    for line in frontier.run_unit(vlm, samples, (0, 1), points):
        answered = text[line["sample"]] + longest  # the last token is not in the cache
        most = (answered + half) / (answered + images)
        if line["policy"] == "fastv":  # whose filter stands behind the last layer of this model
            assert "2 layers" in line["failed"]
        elif line["policy"] not in ("quest", "kivi"):  # reads by it; has bits for it
            assert line["bytes"] <= most + 0.01, line["policy"]
    policies_at = {point.name: point.policy for point in points}
    assert policies_at["quest"] == avl.QuestPolicy(budget_tokens=half)
    assert policies_at["kivi"] == avl.KIVIPolicy.for_budget(0.5)


def test_options_are_given_to_a_policy_at_every_budget_and_not_to_the_paper_or_presets() -> None:
    options = {"snapkv": {"window": 8}, "a-vl": {"refresh_every": 1}, "a-vl-cold": {"text": 0.7}}
    points = {(p.name, p.budget): p.policy for p in frontier.entries((0.5, 64), options)}
    assert points["snapkv", 0.5] == avl.SnapKVPolicy(budget=0.5, window=8)
    assert points["snapkv", 64] == avl.SnapKVPolicy(budget_tokens=64, window=8)
    assert points["A-VL", 0.5] == avl.AdaptivePolicy.for_budget(0.5, refresh_every=1)
    assert points["A-VL (paper)", None] == avl.AdaptivePolicy()
    assert points["A-VL cold", None] == avl.AdaptivePolicy.with_cold_tier()
    assert points["A-VL cold", 64] == avl.AdaptivePolicy.with_cold_tier(cold=8, text=0.7)
    assert points["A-VL cold", 0.5] == avl.AdaptivePolicy.with_cold_tier(0.5, text=0.7)


def test_samples_are_grouped_by_length_of_the_prompt_and_none_is_lost(vlm: VLM) -> None:
    samples = scene_samples(20, ["colour"])
    groups = batches_by_length(vlm, samples, 3)
    assert sorted(index for group in groups for index in group) == list(range(20))
    for group in groups:
        assert len(group) <= 3
        inputs = vlm.prepare(
            [list(samples[i].images) for i in group], [samples[i].prompt for i in group]
        )
        assert bool(inputs["attention_mask"].all())


def test_each_line_is_what_compare_measures(vlm: VLM) -> None:
    samples = scene_samples(6, ["colour"])
    for group in batches_by_length(vlm, samples, 2):
        lines = frontier.run_unit(vlm, samples, group, POINTS)
        chosen = [samples[index] for index in group]
        longest = max(
            len(vlm.processor.tokenizer(s.answers[0], add_special_tokens=False).input_ids)
            for s in chosen
        )
        policies = {point.name: point.policy for point in POINTS}
        measured = compare(
            vlm, chosen, policies, max_new_tokens=longest + 2, metrics=["accuracy", "cost"]
        )
        for line in lines:
            row = measured.dataset.sel(policy=line["policy"], sample=samples[line["sample"]].id)
            assert line["right"] == float(row["correct"])
            np.testing.assert_allclose(line["held"], row["keys_held_share"])
            np.testing.assert_allclose(line["bytes"], line["held"])
            read = np.array(row["keys_attended_by_step"])
            read = read[np.isfinite(read)]
            seen = float(row["prompt_tokens"]) + np.arange(1, len(read) + 1)
            np.testing.assert_allclose(line["attended"], np.mean(read / seen) if len(read) else 1.0)
            np.testing.assert_allclose(line["filled"], row["kv_filled_share"])
            np.testing.assert_allclose(line["allocated"], row["kv_allocated_share"])


def test_the_vision_tower_runs_once_per_group_and_is_left_as_it_was(vlm: VLM) -> None:
    tower = vlm.model.model.vision_tower
    calls: list[int] = []
    handle = (
        tower.vision_model.register_forward_hook(lambda *_: calls.append(1))
        if hasattr(tower, "vision_model")
        else tower.embeddings.register_forward_hook(lambda *_: calls.append(1))
    )
    samples = scene_samples(2, ["colour"])
    group = batches_by_length(vlm, samples, 2)[0]
    frontier.run_unit(vlm, samples, group, POINTS)
    handle.remove()
    assert len(calls) == 1
    assert "forward" not in vars(tower)


def test_other_pixels_are_not_answered_from_memory(vlm: VLM) -> None:
    tower = vlm.model.model.vision_tower
    one, other = torch.randn(1, 3, 24, 24), torch.randn(1, 3, 24, 24)
    plain = [tower(pixels).last_hidden_state for pixels in (one, other)]
    with images_encoded_once(vlm.model):
        for pixels, expected in (
            (one, plain[0]),
            (other, plain[1]),
            (other, plain[1]),
            (one, plain[0]),
        ):
            assert torch.equal(tower(pixels).last_hidden_state, expected)


def test_a_summary_counts_right_answers_with_intervals_and_differences() -> None:
    cells = {"full": [1, 1, 1, 0], "random": [1, 0, 0, 0], "A-VL": [1, 1, None, 0]}
    budgets = {"full": None, "random": 0.5, "A-VL": 0.5}
    lines = [
        {"task": "colour", "policy": name, "budget": budgets[name], "sample": index}
        | {"answer_tokens": 1 + index}
        | (
            {"failed": "no memory"}
            if right is None
            else {"right": right, "held": 0.5, "filled": 0.5}
        )
        for name, cell in cells.items()
        for index, right in enumerate(cell)
    ]
    full, random, adaptive = frontier.summarise(lines, POINTS, 4)
    assert full["answer_tokens"] == 4  # the longest of the task
    assert (full["accuracy"], random["accuracy"], adaptive["accuracy"]) == (0.75, 0.25, 0.6667)
    assert random["low"] < 0.25 < random["high"]
    assert random["difference"] == -0.5
    assert (adaptive["samples"], adaptive["failed"], adaptive["right"]) == (3, 1, "11-0")
    assert adaptive["difference"] == 0
    assert random["held"] == 0.5
    assert random["allocated"] is None


@pytest.fixture
def small(tmp_path: Path, vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> frontier.FrontierSettings:
    """A run in this process with few points, so that tests need not start others."""
    monkeypatch.setattr(frontier, "load_model", lambda name: vlm)
    monkeypatch.setattr(frontier, "entries", lambda *_: POINTS)
    frontier._samples.cache_clear()

    monkeypatch.setattr(frontier, "in_processes", lambda workers: in_this_process(vlm))
    return frontier.FrontierSettings(tasks=("colour", "size"), samples=4, batch=2)


def test_an_interrupted_run_goes_on_and_ends_the_same(
    small: frontier.FrontierSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = frontier.run(small, tmp_path / "whole")
    done: list[str] = []
    work = frontier.FrontierJob.do

    def dying(job: frontier.FrontierJob, vlm: VLM, unit: frontier.Unit) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        work(job, vlm, unit)
        done.append(unit.target.name)

    monkeypatch.setattr(frontier.FrontierJob, "do", dying)
    with pytest.raises(KeyboardInterrupt):
        frontier.run(small, tmp_path / "part")
    monkeypatch.setattr(
        frontier.FrontierJob,
        "do",
        lambda *given: done.append(given[-1].target.name) or work(*given),
    )
    assert frontier.run(small, tmp_path / "part") == [
        {**line, "attention_seconds": ANY, "attention_time": ANY} for line in whole
    ]
    assert len(done) == len(set(done))


def test_a_folder_of_another_run_is_refused(
    small: frontier.FrontierSettings, tmp_path: Path
) -> None:
    frontier.run(small, tmp_path / "work")
    with pytest.raises(InputError, match="other settings"):
        frontier.run(replace(small, batch=4), tmp_path / "work")


def test_more_questions_and_tasks_are_added_to_what_is_done(
    small: frontier.FrontierSettings, tmp_path: Path
) -> None:
    first = frontier.run(small, tmp_path / "work")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.jsonl")}
    frontier._samples.cache_clear()
    grown = replace(small, samples=6, tasks=("colour", "size", "ocr"))
    more = frontier.run(grown, tmp_path / "work")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert [line["samples"] for line in more] == [6] * len(POINTS) * 3
    for line, longer in zip(first, more, strict=False):
        assert (line["task"], line["policy"]) == (longer["task"], longer["policy"])
        assert longer["right"].startswith(line["right"])
    frontier._samples.cache_clear()
    assert frontier.run(grown, tmp_path / "fresh") == [
        {**line, "attention_seconds": ANY, "attention_time": ANY} for line in more
    ]


def test_attention_is_timed_relative_to_the_full_cache(
    small: frontier.FrontierSettings, tmp_path: Path
) -> None:
    lines = frontier.run(replace(small, tasks=("what",)), tmp_path / "work")
    assert [line["policy"] for line in lines] == ["full", "random", "A-VL"]
    assert lines[0]["attention_time"] == 1.0
    for line in lines:
        ratio = line["attention_seconds"] / lines[0]["attention_seconds"]
        assert line["attention_time"] == pytest.approx(ratio, rel=1e-3)


def test_what_was_written_is_read_and_anything_else_refused(tmp_path: Path) -> None:
    lines = [{"task": "colour", "accuracy": 1.0}]
    frontier.write(tmp_path / "f.jsonl", lines, {"command": "c"})
    assert frontier.read(tmp_path / "f.jsonl") == ({"command": "c"}, lines)
    (tmp_path / "g.jsonl").write_text(json.dumps(lines[0]))
    for name, message in (("g.jsonl", "is not a frontier"), ("h.jsonl", "there is no frontier")):
        with pytest.raises(InputError, match=message):
            frontier.read(tmp_path / name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_worker_processes_find_what_one_process_finds(tmp_path: Path) -> None:
    folder = tiny.save_folder(tmp_path / "model", tiny.llava(kv_heads=2))
    settings = frontier.FrontierSettings(
        str(folder), ("colour", "size"), samples=4, budgets=(0.5,), batch=2
    )
    whole = frontier.run(settings, tmp_path / "two", workers=2)
    vlm = frontier.load_model(str(folder))
    points = frontier.entries((0.5,))
    lines = [
        {"task": task, **line}
        for task in settings.tasks
        for samples in [scene_samples(4, [task], seed=settings.seed)]
        for group in ((0, 1), (2, 3))
        for line in frontier.run_unit(vlm, samples, group, points)
    ]
    assert frontier.summarise(lines, points, 4) == [
        {**line, "attention_seconds": ANY, "attention_time": ANY} for line in whole
    ]


def test_the_command_writes_a_frontier_that_it_can_show(
    vlm: VLM, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontier, "entries", lambda *_: POINTS)

    monkeypatch.setattr(frontier, "in_processes", lambda workers: in_this_process(vlm))
    frontier._samples.cache_clear()
    out = tmp_path / "f.jsonl"
    arguments = ["--out", str(out), "--scenes", "2", "--task", "size", "--budgets", "0.5"]
    with pytest.raises(SystemExit) as done:
        main(["frontier", *arguments])
    assert not done.value.code
    about, lines = frontier.read(out)
    assert [(line["policy"], line["budget"]) for line in lines] == [
        (point.name, point.budget) for point in POINTS
    ]
    assert about["command"].startswith(
        "avl frontier --out f.jsonl --batch-size 16 --model scenes --scenes 2"
    )
    assert (about["split"], about["scenes"]) == ("comparison", 2)
    for mistake, message in (
        (["--out", str(out)], "exists already"),
        ([], "pass either --out FILE"),
        (["--out", str(tmp_path / "g.jsonl"), "--task", "smell"], "unknown task 'smell'"),
        (["--out", str(tmp_path / "g.jsonl"), "--budgets", "1.5"], "is not a share"),
        (["--out", str(tmp_path / "g.jsonl"), "--budgets", "half"], "is not a list of numbers"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main(["frontier", *mistake])
        assert done.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
