"""The time of video tokens in recordings: live, from files, merged, joined, of older files."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from PIL import Image

from avl.places import remember_originals
from avl_analysis.capture.recorder import record
from avl_analysis.recordings.image_tokens import images_of
from avl_analysis.recordings.join_files import join
from avl_analysis.recordings.recording import load_recording, merge
from tests import tiny

GRID = 2
SIZE = (60, 40)


def video(counts: list[list[int]], text: list[int], name: str = "") -> object:
    """A recording of rows that show pictures (0) and videos of so many frames, padded left."""
    model = tiny.llava(grid=GRID)
    shown = [sum(max(1, one) for one in row) for row in counts]
    batch = tiny.inputs(model, text, images=shown, between=1)
    remember_originals(batch, [[SIZE] * len(row) for row in counts], None, counts)
    with record(model, statistics=["modality_mass"], first_sample=len(name)) as recording:
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    return recording


def test_every_token_of_a_video_has_its_frame_beside_row_and_column_in_a_padded_batch():
    recording = video([[3], [0, 2]], [9, 4])
    for sample, expected in (
        (0, [(0, frame) for frame in range(3)]),
        (1, [(0, -1), (1, 0), (1, 1)]),
    ):
        tokens = recording.tokens.isel(sample=sample)
        at = np.flatnonzero(tokens["image"].values >= 0)
        pairs = list(zip(tokens["image"].values[at], tokens["frame"].values[at], strict=True))
        assert pairs == [pair for pair in expected for _ in range(GRID * GRID)]
        for frame in range(0, len(at), GRID * GRID):
            assert tokens["row"].values[at][frame : frame + 4].tolist() == [0, 0, 1, 1]
            assert tokens["column"].values[at][frame : frame + 4].tolist() == [0, 1, 0, 1]
        assert set(tokens["frame"].values[tokens["image"].values < 0]) == {-1}
        found = images_of(tokens)
        assert [(one.image, one.frame) for one in found] == expected
        assert [one.token.tolist() for one in found] == np.arange(12).reshape(3, 4).tolist()


def test_frames_survive_saving_loading_merging_and_joining(tmp_path):
    first, second = video([[2]], [5]), video([[0, 3]], [4], "x")
    files = [part.save(tmp_path / f"{i}.nc") for i, part in enumerate((first, second))]
    join(files, tmp_path / "joined.nc", {})
    both = merge([load_recording(file) for file in files])
    for recording in (both, load_recording(tmp_path / "joined.nc")):
        for part in (first, second):
            (sample,) = part.samples
            frames = recording.tokens["frame"].sel(sample=sample).values
            own = part.tokens["frame"].values[0]
            assert frames[: own.size].tolist() == own.tolist()
            assert set(frames[own.size :]) <= {-1}


def test_a_file_from_before_videos_is_read_with_unknown_time(tmp_path):
    recording = video([[0, 0]], [5])
    file = recording.save(tmp_path / "old.nc")
    with h5py.File(file, "r+") as stored:
        del stored["tokens/frame"]
        stored.attrs["version"] = 2
    old = load_recording(file)
    assert old.tokens["frame"].dims == old.tokens["image"].dims
    assert set(np.unique(old.tokens["frame"])) == {-1}
    assert len(images_of(old.tokens.isel(sample=0))) == 2
    merged = merge([old, load_recording(video([[2]], [5], "x").save(tmp_path / "new.nc"))])
    assert merged.tokens["frame"].values.max() == 1


@pytest.mark.parametrize("frames", [(), ((0,),)])
def test_a_picture_has_no_time(frames):
    model = tiny.llava(grid=GRID)
    batch = tiny.inputs(model, [5])
    remember_originals(batch, [[Image.new("RGB", SIZE).size]], None, frames)
    with record(model, statistics=[]) as recording:
        model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert set(recording.tokens["frame"].values[0]) == {-1}
