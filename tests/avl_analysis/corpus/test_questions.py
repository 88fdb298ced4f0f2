"""Samples: what a file may say, that every mistake names its line, and that scenes are drawn
reproducibly.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from avl_analysis.corpus.questions import read_samples, scene_samples
from avl_analysis.errors import InputError
from avl_analysis.scenes import TASKS
from tests import tiny

GOOD = {"image": "a.png", "prompt": "what is it?"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    tiny.picture().save(tmp_path / "a.png")
    tiny.picture().save(tmp_path / "deep" / "b.png")
    return tmp_path


def _write(folder: Path, *lines: object) -> Path:
    path = folder / "samples.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


def test_pictures_are_named_relative_to_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    path = _write(
        folder,
        {"image": ["a.png", "deep/b.png"], "prompt": "same?"},
        "",
        {**GOOD, "images": [], "image": None},
    )
    with pytest.raises(InputError, match="both 'image' and 'images'"):
        read_samples(path)
    path = _write(
        folder,
        {"image": ["a.png", "deep/b.png"], "prompt": "same?"},
        "",
        {"images": [], "prompt": "hello?"},
    )
    one, two = read_samples(path)
    assert one.images == (folder / "a.png", folder / "deep/b.png")
    assert two.images == ()
    assert (one.id, two.id) == ("000001", "000003")


def test_everything_a_line_may_say_is_read(folder: Path) -> None:
    path = _write(
        folder,
        {
            **GOOD,
            "answer": ["red", "a red one"],
            "id": 7,
            "task": "colour",
            "regions": [[0, 0, 4, 5]],
            "meta": {"x": 1},
        },
        {**GOOD, "answers": "red"},
        GOOD,
    )
    one, two, three = read_samples(path)
    assert (one.answers, one.id, one.task, one.regions) == (
        ("red", "a red one"),
        "7",
        "colour",
        ((0, 0, 4, 5),),
    )
    assert one.meta == {"x": 1}
    assert two.answers == ("red",)
    assert three.answers is None
    assert not three.strict


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ([1], "a JSON object is needed"),
        ({"image": "a.png"}, "'prompt' must be a question"),
        ({**GOOD, "prompt": " "}, "'prompt' must be a question"),
        ({"prompt": "what?"}, "no 'image'"),
        ({**GOOD, "image": "gone.png"}, "no such picture"),
        ({**GOOD, "image": 3}, "'image' must be path of a picture"),
        ({**GOOD, "promt": "x"}, "unknown key 'promt': did you mean 'prompt'?"),
        ({**GOOD, "wibble": 1}, "unknown key 'wibble': known are image"),
        ({**GOOD, "answer": []}, "'answer' must be"),
        ({**GOOD, "answer": 4}, "'answer' must be"),
        ({**GOOD, "regions": [[4, 0, 2, 5]]}, "not empty; got"),
        ({**GOOD, "regions": "all"}, "'regions' must be"),
        ({**GOOD, "id": {}}, "'id' must be"),
    ],
)
def test_a_malformed_line_is_named_with_its_reason(
    folder: Path, line: object, message: str
) -> None:
    with pytest.raises(InputError, match=r"samples\.jsonl, line 2: ") as caught:
        read_samples(_write(folder, GOOD, line))
    assert message in str(caught.value)


def test_ids_must_differ(folder: Path) -> None:
    with pytest.raises(InputError, match="line 2: id 'x' was used in line 1"):
        read_samples(_write(folder, {**GOOD, "id": "x"}, {**GOOD, "id": "x"}))


def test_a_file_that_is_none_or_empty_is_refused(folder: Path) -> None:
    for path, message in (
        (folder, "is a folder"),
        (folder / "gone", "no such file"),
        (folder / "a.png", "UTF-8"),
    ):
        with pytest.raises(InputError, match=message):
            read_samples(path)
    with pytest.raises(InputError, match="holds no samples"):
        read_samples(_write(folder, ""))


def test_scenes_are_grouped_by_task_and_the_same_every_time() -> None:
    one, two = scene_samples(2), scene_samples(2)
    assert [sample.task for sample in one] == [task for task in TASKS for _ in range(2)]
    assert len({sample.id for sample in one}) == len(one)
    for a, b in zip(one, two, strict=True):
        assert (a.id, a.prompt, a.answers) == (b.id, b.prompt, b.answers)
        np.testing.assert_array_equal(np.asarray(a.images[0]), np.asarray(b.images[0]))
    assert all(
        sample.strict and sample.regions for sample in scene_samples(2, ["colour", "caption"])
    )


def test_ranges_of_scenes_that_do_not_overlap_share_no_picture() -> None:
    first, second = scene_samples(2, ["ocr"]), scene_samples(2, ["ocr"], first=2)
    assert not {sample.id for sample in first} & {sample.id for sample in second}


def test_unknown_tasks_and_no_samples_are_refused() -> None:
    with pytest.raises(InputError, match="unknown task 'colours': choose from colour"):
        scene_samples(1, ["colours"])
    with pytest.raises(InputError, match="at least one"):
        scene_samples(0)
