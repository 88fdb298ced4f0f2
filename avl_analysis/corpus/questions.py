"""Questions with pictures and, where known, right answers.

What comparisons, calibration and corpus runs work through.

A `Sample` comes from the drawn scenes or from a person's JSONL file, one object per line:

    {"image": "photos/cat.jpg", "prompt": "What is on the sofa?", "answer": "a cat"}

Pictures are named relative to the file. Everything that can be checked without opening a picture is
checked while the file is read, and every mistake names its line; a picture that turns out to be
damaged fails later, as one sample among many. Nothing here loads a model.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avl_analysis.errors import InputError, one_line
from avl_analysis.files import user_path
from avl_analysis.models.images import MAX_PIXELS
from avl_analysis.models.videos import Source, Video, parts_of
from avl_analysis.scenes import ALL_TASKS, TASKS, MovingScene, SceneSample
from avl_analysis.scenes import generate as draw_scene
from avl_analysis.scenes.samples import SPLITS, split_of

Box = tuple[int, int, int, int]
"""Half-open pixel box (left, top, right, bottom)."""

MOST_SCENES = 200_000
"""Scenes that are drawn at once; their pictures take 36 kB each."""

_KEYS = {
    "image": "path of a picture, or a list of paths",
    "images": "list of paths",
    "video": "path of a folder of frames or of a video file, or a list of paths of frames",
    "frames": "how many frames of the video are taken",
    "fps": "frames per second of the video's frames",
    "prompt": "the question",
    "answer": "the right answer, or a list of them",
    "answers": "list of right answers",
    "id": "name of the sample, unique in the file",
    "task": "kind of question, for results by task",
    "regions": (
        "list of [left, top, right, bottom] pixel boxes the question is about; of a video one for"
        " every frame"
    ),
    "meta": "anything else worth keeping",
}


@dataclass(frozen=True, eq=False)
class Sample:
    """One question.

    Attributes:
        id: unique name.
        images: pictures and videos in order; empty for a question without one.
        prompt: the question.
        answers: texts that count as right; None where the truth is not known.
        task: kind of question, "" if there is only one.
        regions: pixel boxes of what the question is about, () where unknown; of a video one for
            every frame.
        strict: whether an answer must agree word for word, capitals included (as the scenes are
            scored); otherwise case, punctuation and articles do not count.
        meta: whatever else the user wants to keep, anything JSON can hold.
        scene: of a drawn scene, what it is drawn from again (seed, index, task).
        system: system prompt of this question, where one answer at a time is given (`live`); runs
            over many samples take theirs as an option. None for the model's own.
        history: earlier (question, answer) pairs of the conversation that the prompt continues, the
            oldest first, where one answer at a time is given; the pictures belong to the first of
            these questions.
    """

    id: str
    images: tuple[Source, ...]
    prompt: str
    answers: tuple[str, ...] | None = None
    task: str = ""
    regions: tuple[Box, ...] = ()
    strict: bool = False
    meta: Mapping[str, Any] | None = None
    scene: Mapping[str, Any] | None = None
    system: str | None = None
    history: tuple[tuple[str, str], ...] = ()


def scene_sample(sample: SceneSample) -> Sample:
    """A drawn scene's question as a sample; its `scene` says how to draw it again."""
    return Sample(
        id=f"{sample.task}-{sample.seed}-{sample.index:05d}",
        images=(sample.image,),
        prompt=sample.prompt,
        answers=(sample.answer,),
        task=sample.task,
        regions=tuple(tuple(map(int, box)) for box in sample.boxes),  # type: ignore[misc]
        strict=True,
        scene={"seed": sample.seed, "index": sample.index, "task": sample.task},
    )


def moving_sample(scene: MovingScene) -> Sample:
    """A drawn video's question as a sample; one region for every frame, the moving shape's box."""
    return Sample(
        id=f"moving-{scene.seed}-{scene.index:05d}",
        images=(Video(scene.frames),),
        prompt=scene.prompt,
        answers=(scene.answer,),
        task="moving",
        regions=scene.boxes,
    )


def check_count(scenes: int) -> None:
    """Refuse more drawn scenes at once than memory holds.

    Raises:
        InputError: more than `MOST_SCENES`.
    """
    if scenes > MOST_SCENES:
        shown = f"{scenes}" if scenes < 10**12 else "far too many"
        raise InputError(f"{shown} drawn scenes: at most {MOST_SCENES} are drawn at once")


def scene_samples(
    count: int,
    tasks: Sequence[str] | None = None,
    *,
    split: str = "comparison",
    seed: int | None = None,
    first: int = 0,
) -> list[Sample]:
    """`count` held-out scenes of each task (None: the twelve of `TASKS`), grouped by task.

    Every task draws from a seed of its own, that of the split plus the task's place in `ALL_TASKS`,
    indices `first` and up: different splits, and ranges of indices that do not overlap, share no
    picture.

    Args:
        count: scenes per task, at least 1.
        tasks: names of tasks.
        split: what the scenes are for, one of `scenes.samples.SPLITS`. Scenes that something is
            chosen by must not be those that it is judged by.
        seed: draw from this seed in place of a split's.
        first: index of the first scene.

    Raises:
        InputError: an unknown task or split, or fewer than one sample.
    """
    chosen = list(TASKS) if tasks is None else list(dict.fromkeys(tasks))
    for task in chosen:
        if task not in ALL_TASKS:
            raise InputError(f"unknown task {task!r}: choose from {', '.join(ALL_TASKS)}")
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    if count < 1 or not chosen:
        raise InputError(f"{count} samples of {len(chosen)} tasks: ask for at least one of each")
    check_count(count * len(chosen))
    # Tasks take consecutive seeds from here on, which stay inside the split's range.
    base = SPLITS[split] if seed is None else seed
    return [
        scene_sample(draw_scene(base + ALL_TASKS.index(task), index, task))
        for task in chosen
        for index in range(first, first + count)
    ]


def describe_questions(samples: Sequence[Sample]) -> str:
    """How many questions there are and, of drawn scenes, of which splits.

    "36 questions (split calibration)".
    """
    seeds = [(sample.scene or {}).get("seed") for sample in samples]
    splits = {split_of(int(seed)) for seed in seeds if seed is not None} - {""}
    count = f"{len(samples)} question{'' if len(samples) == 1 else 's'}"
    if not splits:
        return count
    return f"{count} (split{'' if len(splits) == 1 else 's'} {', '.join(sorted(splits))})"


def shared_questions(one: Sequence[Sample], other: Sequence[Sample]) -> list[str]:
    """Ids, in `one`, of the questions that both lists hold.

    The same id, or the same prompt about the same pictures.
    """
    ids = {sample.id for sample in other}
    contents = {question_digest(sample) for sample in other}
    return [sample.id for sample in one if sample.id in ids or question_digest(sample) in contents]


def question_digest(sample: Sample) -> str:
    """16 hexadecimal digits that two questions share if they ask the same about the same pictures.

    Pictures in files are told apart by the files' bytes, others by their pixels.
    """
    # Lone surrogates may stand in a prompt from a JSON file and must not stop the digest.
    content = hashlib.sha256(sample.prompt.encode("utf-8", "surrogatepass"))
    # Nothing is added for questions without a video, so their digests are those of prompt and
    # pictures alone.
    content.update(repr(shown_videos(sample)).encode() if any(shown_videos(sample)) else b"")
    for image in [part for source in sample.images for part in parts_of(source)]:
        if isinstance(image, (str, os.PathLike)):
            file = Path(image).expanduser()
            content.update(file.read_bytes() if file.is_file() else os.fsencode(file))
        elif isinstance(image, bytes):
            content.update(image)
        else:
            pixels = np.asarray(image)
            # The shape, because pictures of other proportions may have the same bytes.
            content.update(str(pixels.shape).encode() + pixels.tobytes())
    return content.hexdigest()[:16]


def shown_videos(sample: Sample) -> list[tuple[int | None, float | None] | None]:
    """Of every video how many frames are taken and their rate, None for pictures."""
    return [
        (source.frames, source.fps) if isinstance(source, Video) else None
        for source in sample.images
    ]


def read_samples(path: str | Path) -> list[Sample]:
    """Read a JSONL file of samples.

    Empty lines are skipped, an id that is missing is the line's number.

    Raises:
        InputError: no such file, no samples in it, or a line that cannot be used; says file, line,
            reason and remedy.
    """
    file = user_path(path)
    if file.is_dir():
        raise InputError(f"{file} is a folder: name the JSONL file in it, one sample per line")
    if not file.is_file():
        raise InputError(
            f"no such file: {file} (looked from {Path.cwd()}); check the path of the samples"
        )
    try:
        # Not splitlines: JSON strings may hold U+2028 and other line ends of Unicode.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"cannot read {file} as UTF-8 text: {error}") from error
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            # Without an id the line's number is one; empty lines count, so that an editor finds the
            # line.
            sample = _sample(line, f"{number:06d}", file.parent)
            if sample.id in seen:
                raise InputError(
                    f"id {sample.id!r} was used in line {seen[sample.id]} already; ids must differ"
                )
        except InputError as error:
            raise InputError(f"{file}, line {number}: {error}") from error
        seen[sample.id] = number
        samples.append(sample)
    if not samples:
        raise InputError(
            f"{file} holds no samples: write one JSON object per line with at least 'image' and"
            " 'prompt'"
        )
    return samples


def _sample(line: str, number: str, folder: Path) -> Sample:
    """The sample of one line."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"not valid JSON ({error.msg} at character {error.colno})") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise InputError(f"JSON that cannot be read ({one_line(error)})") from error
    if not isinstance(entry, dict):
        raise InputError(
            f'a JSON object is needed, such as {{"image": ..., "prompt": ...}}; got {_shown(entry)}'
        )
    for key in entry:
        if key not in _KEYS:
            # Refused and not ignored: a misspelled "answer" would silently leave the sample without
            # a truth.
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"known are {', '.join(_KEYS)}; put anything else under 'meta'"
            )
            raise InputError(f"unknown key {key!r}: {hint}")
    prompt = entry.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(
            f"'prompt' must be a question, a text that is not empty; got {_shown(prompt)}"
        )
    paths, video = _texts(entry, "image", "images"), _video(entry, folder)
    if paths is None and video is None:
        raise InputError(
            "no 'image': name a picture or a 'video', or write \"images\": [] to ask without one on"
            " purpose"
        )
    for name in ("id", "task"):
        if name in entry and (
            not isinstance(entry[name], (str, int)) or isinstance(entry[name], bool)
        ):
            raise InputError(f"{name!r} must be {_KEYS[name]}; got {_shown(entry[name])}")
    if not isinstance(entry.get("meta", {}), dict):
        raise InputError(f"'meta' must be an object; got {_shown(entry['meta'])}")
    return Sample(
        id=str(entry.get("id", number)),
        images=(*(_picture(folder, path) for path in paths or ()), *([video] if video else ())),
        prompt=prompt,
        answers=_texts(entry, "answer", "answers"),
        task=str(entry.get("task", "")),
        regions=_boxes(entry.get("regions", [])),
        meta=entry.get("meta"),
    )


def _texts(entry: Mapping[str, Any], one: str, several: str) -> tuple[str, ...] | None:
    """The texts under either of two keys; None where neither is there."""
    if one in entry and several in entry:
        raise InputError(f"both {one!r} and {several!r}: write one of them")
    key = several if several in entry else one
    value = entry.get(key)
    if value is None:
        return None
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and text for text in listed) or (
        not listed and one == "answer"
    ):
        raise InputError(f"{key!r} must be {_KEYS[one]}; got {_shown(value)}")
    return tuple(listed)


def _video(entry: Mapping[str, Any], folder: Path) -> Video | None:
    """The video of a line, None where it names none."""
    value, frames, fps = (entry.get(key) for key in ("video", "frames", "fps"))
    for key, given, kinds in (("frames", frames, (int,)), ("fps", fps, (int, float))):
        # `type`, because True is an int to `isinstance`.
        if given is not None and (type(given) not in kinds or value is None):
            raise InputError(
                f"{key!r} must be a number beside a 'video': {_KEYS[key]}; got {_shown(given)}"
            )
    if value is None:
        return None
    if isinstance(value, list) and value and all(isinstance(path, str) for path in value):
        return Video([_picture(folder, path) for path in value], frames, fps)
    if not isinstance(value, str) or not value:
        raise InputError(f"'video' must be {_KEYS['video']}; got {_shown(value)}")
    path = user_path(folder / user_path(value))
    if not path.exists():
        raise InputError(
            f"no such video: {path}; paths are relative to the folder of the JSONL file"
        )
    return Video(path, frames, fps)


def _picture(folder: Path, path: str) -> Path:
    file = user_path(folder / user_path(path))
    if not file.is_file():
        raise InputError(
            f"no such picture: {file}; paths are relative to the folder of the JSONL file"
        )
    return file


def _boxes(value: Any) -> tuple[Box, ...]:
    if not isinstance(value, list):
        raise InputError(f"'regions' must be a {_KEYS['regions']}; got {_shown(value)}")
    boxes = []
    for box in value:
        numbers = (
            isinstance(box, list) and len(box) == 4 and all(type(n) in (int, float) for n in box)
        )
        # JSON as Python reads it may hold NaN and Infinity, which compare as False here.
        finite = numbers and all(abs(n) < MAX_PIXELS for n in box)
        if not finite or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
            raise InputError(
                "a region must be [left, top, right, bottom] in pixels, not empty; got"
                f" {_shown(box)}"
            )
        boxes.append((int(box[0]), int(box[1]), int(box[2]), int(box[3])))
    return tuple(boxes)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
