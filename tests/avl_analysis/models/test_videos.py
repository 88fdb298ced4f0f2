"""Videos as input: where frames come from, what a processor is given, and what is refused."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil

from avl_analysis.errors import InputError
from avl_analysis.models import processors, videos
from avl_analysis.models.loading import load_model
from avl_analysis.models.video_frames import (
    NextVideoFrames,
    OneVisionFrames,
    Qwen3Frames,
    QwenFrames,
    SmolFrames,
)
from avl_analysis.models.videos import Video, chosen, is_video, open_source, open_video
from tests import tiny
from tests.avl_analysis.models import folders
from tests.avl_analysis.shared import vlm as tiny_vlm

SIZE = (44, 30)


def frames(count: int = 6, size: tuple[int, int] = SIZE) -> list[Image.Image]:
    return [tiny.picture(size, seed) for seed in range(count)]


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


# -- where frames come from ------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_the_numbers_in_its_names(tmp_path: Path) -> None:
    shown = frames(12)
    for index, frame in enumerate(shown):
        frame.save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    opened = open_source(tmp_path)
    assert isinstance(opened, videos.Frames)
    assert all(map(same, opened.images, shown))
    assert opened.indices == tuple(range(12))


def test_frames_are_taken_evenly_from_the_first_to_the_last() -> None:
    assert chosen(9, 3) == (0, 4, 8)
    assert chosen(4, 8) == (0, 1, 2, 3)
    assert chosen(5, 1) == (0,)
    opened = open_video(Video(frames(9), frames=3, fps=4))
    shown = zip(opened.images, (0, 4, 8), strict=True)
    assert all(same(image, frames(9)[index]) for image, index in shown)
    assert opened.seconds == (0.0, 1.0, 2.0)


def test_a_list_may_hold_anything_that_is_taken_for_a_picture(tmp_path: Path) -> None:
    first, second, third = frames(3)
    first.save(tmp_path / "first.png")
    opened = open_video(Video([tmp_path / "first.png", np.asarray(second), third]))
    assert all(map(same, opened.images, (first, second, third)))
    assert opened.fps == videos.FPS


def test_an_animated_picture_brings_its_frames_and_its_rate(tmp_path: Path) -> None:
    drawn = [Image.new("RGB", SIZE, colour) for colour in ("red", "lime", "blue")]
    drawn[0].save(tmp_path / "a.gif", save_all=True, append_images=drawn[1:], duration=250)
    opened = open_video(Video(tmp_path / "a.gif"))
    assert all(map(same, opened.images, drawn))
    assert opened.fps == 4.0
    assert not is_video(tmp_path / "a.gif")  # as a picture it is its first frame, as ever
    assert same(open_source(tmp_path / "a.gif"), drawn[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: Video([]), "no frames"),
        (lambda folder: Video(folder), "no frames"),
        (lambda folder: Video(folder / "gone"), "no such video"),
        (lambda folder: Video(frames(2), frames=0), "ask for 1 to"),
        (lambda folder: Video(frames(2), fps=0.0), "above 0"),
        (lambda folder: Video([tiny.picture((8, 8)), tiny.picture((9, 8))]), "differ in size"),
        (lambda folder: Video([tiny.picture((2, 2))] * 257), "say how many"),
        (lambda folder: Video([folder / "gone.png"]), "no such file"),
    ],
)
def test_what_is_no_video_is_refused_with_the_reason(make, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        open_video(make(tmp_path))


def test_a_video_file_without_a_decoder_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"\0" * 64)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n in videos.DECODERS else found(n)
    )
    with pytest.raises(InputError, match="pip install av"):
        open_source(tmp_path / "clip.mp4")


@pytest.mark.parametrize("name", videos.DECODERS)
def test_a_video_file_is_decoded_by_whatever_is_installed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    writer = pytest.importorskip("av")
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    with writer.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for colour in colours * 5:
            image = np.full((48, 64, 3), colour, np.uint8)
            for packet in stream.encode(writer.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    monkeypatch.setattr(videos, "DECODERS", (name,))
    opened = open_source(tmp_path / "clip.mp4")
    assert isinstance(opened, videos.Frames)
    assert (opened.total, opened.fps, opened.size) == (15, 5.0, (64, 48))
    assert opened.indices == (0, 2, 4, 6, 8, 10, 12, 14)
    for image, index in zip(opened.images, opened.indices, strict=True):
        assert np.abs(np.asarray(image).mean((0, 1)) - colours[index % 3]).max() < 25
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 50)
    with pytest.raises(InputError, match=r"cannot be decoded|no frame"):
        open_source(tmp_path / "broken.mp4")


# -- what a model is given -------------------------------------------------------------------------


def test_frames_are_made_as_the_image_processor_makes_pictures() -> None:
    video = np.stack([np.asarray(frame) for frame in frames(3)])
    for part, settings in (
        (OneVisionFrames({"size": {"height": 24, "width": 24}}), {"do_center_crop": False}),
        (
            NextVideoFrames(
                {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
            ),
            {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}},
        ),
    ):
        usual = CLIPImageProcessorPil(size=part.size, image_mean=part.image_mean, **settings)
        expected = usual(frames(3), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(part.make([video])["pixel_values_videos"][0], expected)


def test_a_still_video_has_the_patches_of_its_picture_in_every_group() -> None:
    settings = {"size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}, "patch_size": 4}
    picture = tiny.picture((50, 34))
    usual = Qwen2VLImageProcessorPil(**settings)(picture, return_tensors="pt")
    made = QwenFrames(settings).make([np.stack([np.asarray(picture)] * 4)])
    grid = usual["image_grid_thw"][0].tolist()
    assert made["video_grid_thw"].tolist() == [[2, *grid[1:]]]
    torch.testing.assert_close(
        made["pixel_values_videos"], torch.cat([usual["pixel_values"]] * 2), atol=1e-6, rtol=1e-5
    )


def test_patches_of_a_moving_video_equal_loops_over_groups_cells_and_pixels() -> None:
    """Slow: every number of every patch is looked up in the frame it comes from."""
    part = QwenFrames(
        {
            "size": {"shortest_edge": 1, "longest_edge": 10**6},
            "patch_size": 2,
            "do_rescale": False,
            "do_normalize": False,
        }
    )
    video = np.random.default_rng(0).integers(0, 255, (3, 8, 12, 3), dtype=np.uint8)
    made = part.make([video])
    assert made["video_grid_thw"].tolist() == [[2, 4, 6]]
    rows = []
    for group in ((0, 1), (2, 2)):  # the last frame fills up its group
        for merged_row in range(2):
            for merged_column in range(3):
                for row in (2 * merged_row, 2 * merged_row + 1):
                    for column in (2 * merged_column, 2 * merged_column + 1):
                        rows.append(
                            [
                                video[frame, 2 * row + y, 2 * column + x, channel]
                                for channel in range(3)
                                for frame in group
                                for y in range(2)
                                for x in range(2)
                            ]
                        )
    assert np.array_equal(made["pixel_values_videos"].numpy(), np.array(rows, np.float32))


def test_qwen3_bounds_the_pixels_of_all_frames_together() -> None:
    part = Qwen3Frames(
        {"size": {"shortest_edge": 4096, "longest_edge": 4 * 32 * 32}, "patch_size": 4}
    )
    few, many = part.resized(4, 64, 64), part.resized(16, 64, 64)
    assert few == (32, 32)
    assert many == (16, 16)
    assert part.resized(1, 32, 32)[0] % 8 == 0  # fewer frames than a group
    with pytest.raises(InputError, match="200 times"):
        QwenFrames({}).make([np.zeros((1, 1, 300, 3), np.uint8)])


def test_smolvlm_resizes_to_a_longest_edge_and_then_to_a_square() -> None:
    part = SmolFrames({"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}})
    shown = frames(2, (44, 29))
    made = part.make([np.stack([np.asarray(frame) for frame in shown])])
    assert made["pixel_values"].shape == (1, 2, 3, 24, 24)
    assert made["pixel_attention_mask"].shape == (1, 2, 24, 24)
    # 29 * 48 / 44 is 31.6, cut to 31, which becomes the even 32; resampling 1 is Lanczos
    twice = shown[0].resize((48, 32), 1).resize((24, 24), 1)
    own = made["pixel_values"][0, 0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(own, (np.asarray(twice) / 255 - 0.5) / 0.5, atol=1e-6)


def test_videos_of_different_lengths_in_one_batch_are_refused_where_a_family_cannot_take_them(
    tmp_path: Path,
) -> None:
    vlm = load_model(folders.save_folder(tmp_path, "llava_onevision"))
    with pytest.raises(InputError, match="3 and 2 frames in one batch"):
        vlm.prepare([Video(frames(3)), Video(frames(2))], ["what?", "where?"])


def test_smolvlm_refuses_a_picture_beside_a_video(tmp_path: Path) -> None:
    vlm = load_model(folders.save_folder(tmp_path, "smolvlm"))
    with pytest.raises(InputError, match="pictures or videos in one call"):
        vlm.prepare([tiny.picture(), Video(frames(2))], "what?")


def test_times_of_frames_reach_the_prompt(tmp_path: Path) -> None:
    vlm = load_model(folders.save_folder(tmp_path, "qwen3_vl"))
    inputs = vlm.prepare(Video(frames(8), frames=4, fps=2.0), "what?")
    text = vlm.processor.tokenizer.decode(inputs["input_ids"][0])
    # frames 0, 2, 5 and 7 at 0, 1, 2.5 and 3.5 seconds, in groups of two
    assert "0.5 seconds" in text.replace("▁", " ")
    assert "3.0 seconds" in text.replace("▁", " ")


@pytest.mark.parametrize(
    "model_type", ["qwen2_vl", "qwen3_vl", "internvl", "llava_next_video", "smolvlm"]
)
def test_a_batch_of_videos_padded_left_answers_as_one_by_one(
    model_type: str, tmp_path: Path
) -> None:
    vlm = load_model(folders.save_folder(tmp_path, model_type))
    shown = [Video(frames(4)), Video(frames(8, (36, 44))[4:])]
    questions = ["what is red?", "where?"]
    together = vlm.answer(shown, questions, max_new_tokens=4)
    alone = [
        vlm.answer(video, question, max_new_tokens=4)
        for video, question in zip(shown, questions, strict=True)
    ]
    assert together == alone


def test_placeholders_say_where_videos_and_pictures_belong(tmp_path: Path) -> None:
    vlm = load_model(folders.save_folder(tmp_path, "llava_onevision"))
    prompt = "<video> then <image> what changed?"
    inputs = vlm.prepare([Video(frames(2)), tiny.picture()], prompt)
    config = vlm.model.config
    ids = inputs["input_ids"][0].tolist()
    assert ids.index(config.video_token_id) < ids.index(config.image_token_id)
    with pytest.raises(InputError, match="names 2 place"):
        vlm.prepare([tiny.picture(), Video(frames(2))], prompt)


def test_a_model_without_a_video_part_is_shown_frames_as_pictures() -> None:
    vlm = tiny_vlm()
    shown = frames(3)
    as_video = vlm.prepare(Video(shown), "what is the colour?")
    as_pictures = vlm.prepare(shown, "what is the colour?")
    assert torch.equal(as_video["input_ids"], as_pictures["input_ids"])
    assert torch.equal(as_video["pixel_values"], as_pictures["pixel_values"])


def test_a_family_whose_video_part_cannot_be_made_names_the_extra() -> None:
    vlm = tiny_vlm()
    vlm.processor.video_processor = processors.MissingVideo({})
    vlm.processor.video_token = "<unk>"
    vlm.processor.apply_chat_template = types.MethodType(
        lambda self, messages, **_: "USER: <unk> what?", vlm.processor
    )

    def call(self, **given):
        return self.video_processor(given["videos"])

    processor = type("Deaf", (type(vlm.processor),), {"__call__": call})
    vlm.processor.__class__ = processor
    with pytest.raises(InputError, match=r"needs torchvision.*pip install 'avl-analysis\[vlm\]'"):
        vlm.prepare(Video(frames(2)), "what?")
