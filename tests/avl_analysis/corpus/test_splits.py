"""Questions that something is chosen by are not those that it is judged by."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from avl_analysis.cli.options import read_or_draw
from avl_analysis.corpus.questions import (
    Sample,
    describe_questions,
    scene_samples,
    shared_questions,
)
from avl_analysis.errors import InputError
from avl_analysis.evaluation import search
from avl_analysis.evaluation.frontier import FrontierSettings
from avl_analysis.scenes import ALL_TASKS, TASKS, generate
from avl_analysis.scenes.samples import SPLIT_WIDTH, SPLITS, TRAINING_SEED, split_of
from tests import tiny

CHOOSING = ("tuning", "calibration", "verification", "heads", "watch", "watch-large")
"""Splits by which settings, presets, kinds of heads or the shipped weights were chosen."""
JUDGING = ("comparison", "ablation", "model", "recording")


def _contents(samples: list[Sample]) -> set[tuple[str, bytes]]:
    return {(sample.prompt, np.asarray(sample.images[0]).tobytes()) for sample in samples}


def test_every_split_either_chooses_or_judges() -> None:
    assert set(CHOOSING) | set(JUDGING) == set(SPLITS)
    assert not set(CHOOSING) & set(JUDGING)


def test_no_seed_belongs_to_two_splits_or_to_training_whatever_the_task() -> None:
    assert len(ALL_TASKS) <= SPLIT_WIDTH
    for one, other in combinations(SPLITS.values(), 2):
        assert abs(one - other) >= SPLIT_WIDTH
    assert max(SPLITS.values()) + SPLIT_WIDTH <= TRAINING_SEED
    for name in SPLITS:
        seeds = {sample.scene["seed"] for sample in scene_samples(1, ALL_TASKS, split=name)}
        assert len(seeds) == len(ALL_TASKS)
        assert {split_of(seed) for seed in seeds} == {name}
    assert split_of(TRAINING_SEED + 5) == "training"
    assert split_of(0) == split_of(SPLITS["model"] - 1) == ""


def test_a_scene_is_drawn_from_its_seed_and_index_and_nothing_else() -> None:
    """So questions of different seeds are independent draws, and equal ones a coincidence."""
    drawn = [generate(seed, index, "caption") for seed in (1, 2, 3) for index in range(20)]
    assert len({(one.prompt, one.image.tobytes()) for one in drawn}) == len(drawn)
    again = generate(2, 7, "caption")
    assert (again.prompt, again.image.tobytes()) in {(o.prompt, o.image.tobytes()) for o in drawn}


@pytest.mark.parametrize("split", CHOOSING)
def test_no_question_of_a_comparison_is_in_a_split_that_chooses_something(split) -> None:
    final = scene_samples(6, ALL_TASKS)
    chosen_by = scene_samples(6, ALL_TASKS, split=split)
    assert not shared_questions(final, chosen_by)
    assert not _contents(final) & _contents(chosen_by)


def test_comparisons_and_frontiers_ask_the_split_that_nothing_was_chosen_by() -> None:
    by_command = read_or_draw(None, 2, None, "comparison")
    assert [sample.id for sample in scene_samples(2)] == [sample.id for sample in by_command]
    assert split_of(FrontierSettings().seed) == "comparison"
    assert describe_questions(by_command) == f"{2 * len(TASKS)} questions (split comparison)"


def test_options_are_searched_on_the_tuning_split_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[FrontierSettings] = []

    def run(settings: FrontierSettings, *_: object, **__: object) -> list[dict[str, object]]:
        searched.append(settings)
        return [
            {
                "policy": p.name,
                "budget": p.budget,
                "task": "ocr",
                "accuracy": 1,
                "bytes": 1,
                "attended": 1,
            }
            for p in search.trial_points()
        ]

    monkeypatch.setattr(search, "run", run)
    search.main(["--out", str(tmp_path / "options.json"), "--scenes", "3"])
    (settings,) = searched
    assert split_of(settings.seed) == "tuning"
    tasks = list(settings.tasks)
    asked = scene_samples(settings.samples, tasks, seed=settings.seed)
    assert not shared_questions(asked, scene_samples(40, tasks))
    assert not _contents(asked) & _contents(scene_samples(40, tasks))


def test_shared_questions_are_known_by_id_and_by_content(tmp_path: Path) -> None:
    a, b = tiny.picture(seed=1), tiny.picture(seed=2)
    path = tmp_path / "a.png"
    a.save(path)
    one = [
        Sample("1", (a,), "what?"),
        Sample("2", (b,), "what?"),
        Sample("3", (path,), "where?"),
        Sample("4", (), "why?"),
    ]
    assert shared_questions(one, one) == ["1", "2", "3", "4"]
    assert shared_questions(one, [Sample("9", (a.copy(),), "what?")]) == ["1"]
    assert shared_questions(one, [Sample("2", (a,), "who?")]) == ["2"]
    assert shared_questions(one, [Sample("9", (str(path),), "where?")]) == ["3"]
    assert shared_questions(one, [Sample("9", (a,), "why?"), Sample("8", (b,), "who?")]) == []


def test_questions_are_described_with_their_splits() -> None:
    mixed = scene_samples(1, ["ocr"], split="tuning") + scene_samples(1, ["ocr"], split="heads")
    assert describe_questions(mixed) == "2 questions (splits heads, tuning)"
    assert describe_questions([Sample("1", (), "what?")]) == "1 question"
    assert describe_questions(scene_samples(1, ["ocr"], seed=3)) == "1 question"


def test_an_unknown_split_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match="unknown split 'test': choose from model, tuning"):
        scene_samples(1, split="test")
