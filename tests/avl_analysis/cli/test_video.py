"""The commands take videos: a folder of frames, a list, lines of a JSONL file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from avl_analysis.cli.main import app
from avl_analysis.corpus.questions import question_digest, read_samples
from avl_analysis.corpus.record_corpus import fingerprint
from avl_analysis.errors import InputError
from avl_analysis.models.videos import Video
from avl_analysis.recordings.recording import load_recording
from tests import tiny
from tests.avl_analysis.models import folders

SIZE = (44, 30)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return folders.save_folder(tmp_path_factory.mktemp("qwen"), "qwen2_5_vl")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    for index in range(6):
        tiny.picture(SIZE, index).save(folder / f"{index}.png")
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, InputError)  # `main` makes one line and exit 2 of it
    return str(result.exception)


def test_a_folder_of_frames_is_recorded_with_time_and_thumbnails(model, clip, tmp_path) -> None:
    out = tmp_path / "run.nc"
    options = ["--model", model, "--max-new-tokens", 3, "--out", out]
    run("record", clip, "what is red?", *options, "--frames", 4, "--fps", 8)
    recording = load_recording(out)
    tokens = recording.tokens.isel(sample=0)
    assert sorted(set(tokens["frame"].values.tolist())) == [-1, 0, 1]
    assert set(tokens["image"].values[tokens["frame"].values >= 0]) == {0}
    facts = recording.facts(0)
    assert len(facts["frames"]) == 4
    assert facts["frame_seconds"] == [0.0, 0.25, 0.375, 0.625]
    assert facts["picture_size"] == list(SIZE)
    assert "picture" not in facts


def test_pictures_become_a_video_where_they_are_said_to_be_one(model, clip, tmp_path) -> None:
    out = tmp_path / "run.nc"
    files = [clip / f"{index}.png" for index in range(3)]
    options = ["--model", model, "--max-new-tokens", 2, "--out", out, "--force"]
    run("record", *files, "what is red?", *options)
    apart = load_recording(out).tokens
    run("record", *files, "what is red?", *options, "--video")
    together = load_recording(out).tokens
    assert (int(apart["image"].max()), int(apart["frame"].max())) == (2, -1)
    assert (int(together["image"].max()), int(together["frame"].max())) == (0, 1)


def test_frames_without_a_video_and_files_that_are_none_are_refused(model, clip, tmp_path) -> None:
    options = ["--model", model, "--out", tmp_path / "run.nc"]
    said = refused("record", clip / "0.png", "what?", *options, "--frames", 2)
    assert "add --video" in said
    assert "without a question" in refused("record", clip, *options)
    (tmp_path / "empty").mkdir()
    assert "no frames" in refused("record", tmp_path / "empty", "what?", *options)


def test_lines_of_a_file_may_name_videos_for_every_command(model, clip, tmp_path) -> None:
    lines = [
        {"video": str(clip), "prompt": "what is red?", "answer": "x", "frames": 2},
        {"video": [str(clip / "0.png"), str(clip / "5.png")], "prompt": "where?", "answer": "y"},
        {"image": str(clip / "0.png"), "video": str(clip), "prompt": "what changed?", "fps": 4},
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines))
    out = tmp_path / "run.nc"
    run("record", "--data", data, "--model", model, "--max-new-tokens", 2, "--out", out)
    tokens = load_recording(out).tokens
    assert [int(tokens["frame"].isel(sample=i).max()) for i in range(3)] == [0, 0, 2]
    assert [int(tokens["image"].isel(sample=i).max()) for i in range(3)] == [0, 0, 1]
    options = ["--model", model, "--max-new-tokens", 2]
    said = run("compare", data, *options, "-p", "a-vl", "-p", "random:0.5")
    assert "a-vl" in said.lower()
    said = run("knockout", data, "--model", model, "--out", tmp_path / "k.nc", "--window", 1)
    assert (tmp_path / "k.nc").exists()


def test_digests_of_questions_read_what_videos_consist_of(clip, tmp_path) -> None:
    def line(**given: object) -> str:
        return json.dumps({"video": str(clip), "prompt": "what?", "id": "q", **given}) + "\n"

    def digests(text: str) -> tuple[str, str]:
        (tmp_path / "q.jsonl").write_text(text)
        samples = read_samples(tmp_path / "q.jsonl")
        assert isinstance(samples[0].images[0], Video)
        return question_digest(samples[0]), fingerprint(samples)

    plain, same, fewer = digests(line()), digests(line()), digests(line(frames=3))
    assert plain == same
    assert plain[0] != fewer[0]
    assert plain[1] != fewer[1]
    frames = Path(clip) / "0.png"
    kept = frames.read_bytes()
    tiny.picture(SIZE, 99).save(frames)
    assert digests(line())[0] != plain[0]
    assert digests(line())[1] != plain[1]
    frames.write_bytes(kept)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"video": "gone"}, "no such video"),
        ({"video": 3}, "must be path"),
        ({"video": []}, "must be path"),
        ({"image": "a.png", "frames": 3}, "beside a 'video'"),
        ({"video": ".", "frames": 2.5}, "'frames' must be a number"),
        ({"video": ".", "frames": 0}, "ask for 1 to"),
        ({"video": ".", "fps": -1}, "above 0"),
    ],
)
def test_a_line_with_a_wrong_video_says_so_with_its_number(entry, message, tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    data = tmp_path / "q.jsonl"
    data.write_text(json.dumps({"prompt": "what?", **entry}))
    with pytest.raises(InputError, match=f"line 1: .*{message}"):
        read_samples(data)


def test_the_embedded_model_is_shown_a_video_frame_by_frame(tmp_path) -> None:
    for index in range(2):
        pixels = np.full((96, 96, 3), 40 + 100 * index, np.uint8)
        from PIL import Image

        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    out = tmp_path / "run.nc"
    run("record", tmp_path, "Describe the picture.", "--max-new-tokens", 2, "--out", out)
    tokens = load_recording(out).tokens
    assert (int(tokens["image"].max()), int(tokens["frame"].max())) == (0, 1)
