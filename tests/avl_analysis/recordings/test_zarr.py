"""A recording is saved as a zarr folder, whole or not at all, and read back as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

pytest.importorskip("zarr", reason="zarr folders need the extra [zarr]")

from avl_analysis.capture.recorder import record
from avl_analysis.cli.main import main
from avl_analysis.recordings.recording import Recording, load_recording
from avl_analysis.recordings.schema import RecordingError
from avl_analysis.recordings.zarr_folder import check_zarr
from tests import tiny
from tests.avl_analysis.recorded import model


@pytest.fixture(scope="module")
def recording() -> Recording:
    llava = model(kv_heads=2, attn="sdpa")
    batch = tiny.inputs(llava, [9, 4], images=[1, 2], seed=0)
    few = ["modality_mass", "coverage", "accumulated_score", "ppci_continuity"]
    with record(llava, keep="attention", statistics=few) as made:
        llava.generate(**batch, max_new_tokens=3, do_sample=False)
    made.annotate(0, prompt="what is red?", words=["a", "ß"], boxes=[[1, 2, 3, 4]])
    return made


@pytest.fixture(scope="module")
def original(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recording.save(tmp_path_factory.mktemp("saved") / "run.zarr")


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run.zarr"))


def test_a_recording_comes_back_from_a_zarr_folder_as_it_was(
    recording: Recording, saved: Path
) -> None:
    loaded = load_recording(saved)
    for group, dataset in recording.data.items():
        xr.testing.assert_identical(dataset, loaded.data[group])
    assert loaded.attrs == recording.attrs
    assert loaded.names == recording.names
    assert loaded.facts(0) == recording.facts(0)
    assert loaded.facts(1) == {}
    xr.testing.assert_identical(loaded.dataset, recording.dataset)


def test_xarray_reads_the_folder_by_itself(recording: Recording, saved: Path) -> None:
    with xr.open_datatree(str(saved), engine="zarr", consolidated=False) as tree:
        found = tree["statistics"]["modality_mass"]
        assert found.dims == recording["modality_mass"].dims
        np.testing.assert_array_equal(found.values, recording["modality_mass"].values)


def test_the_command_line_reads_a_zarr_folder(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["stats", str(saved), "modality_mass"])
    assert not done.value.code
    assert "attention mass" in capsys.readouterr().out


def test_a_new_recording_takes_the_place_of_an_old_one_and_of_nothing_else(
    recording: Recording, saved: Path, tmp_path: Path
) -> None:
    Recording(recording.data, {**recording.attrs, "model": "another"}).save(saved)
    assert load_recording(saved).attrs["model"] == "another"
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr" / "notes.txt").write_text("kept")
    (tmp_path / "file.zarr").write_text("kept")
    for name, kind in (("mine.zarr", "a folder of something else"), ("file.zarr", "a file")):
        with pytest.raises(RecordingError, match=f"is {kind}"):
            recording.save(tmp_path / name)
    assert (tmp_path / "mine.zarr" / "notes.txt").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "file.zarr",
        "mine.zarr",
        "run.zarr",
    ]


def test_a_save_that_fails_half_way_leaves_the_old_folder(
    recording: Recording, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = xr.Dataset.to_zarr

    def full(dataset: xr.Dataset, store: str, *, group: str | None, **options: object) -> object:
        if group == "maps":
            raise OSError(28, "No space left on device")
        return original(dataset, store, group=group, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(xr.Dataset, "to_zarr", full)
    with pytest.raises(RecordingError, match="free some space"):
        Recording(recording.data, {**recording.attrs, "model": "another"}).save(saved)
    assert load_recording(saved).attrs == recording.attrs
    assert [path.name for path in saved.parent.iterdir()] == ["run.zarr"]


def _change(saved: Path, inside: str, **values: object) -> None:
    file = saved / inside / "zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("inside", "values", "message"),
    [
        ("tokens/token_id", {"codecs": [{"name": "numcodecs.pickle"}]}, "names the codecs"),
        ("tokens/token_id", {"shape": [10**9, 10**9]}, "unpacks to"),
        ("tokens/token_id", {"data_type": "elephant"}, "damaged|not a readable|unpacks|codecs"),
        ("tokens", {"zarr_format": 2}, "not a folder of zarr format 3"),
        ("", {"attributes": {"format": "weather"}}, "is a zarr folder but not a recording"),
    ],
)
def test_a_folder_that_was_changed_is_refused(
    saved: Path, inside: str, values: dict[str, object], message: str
) -> None:
    _change(saved, inside, **values)
    with pytest.raises(RecordingError, match=message):
        load_recording(saved)


def test_links_and_missing_chunks_are_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    chunk = next(path for path in (saved / "tokens" / "token_id").rglob("*") if path.name != "c")
    (chunk.parent / "more").symlink_to(tmp_path / "secret")
    with pytest.raises(RecordingError, match="holds a link"):
        load_recording(saved)
    (chunk.parent / "more").unlink()
    check_zarr(saved, most_bytes=1 << 24)
    (saved / "sums" / "zarr.json").write_text("{")
    with pytest.raises(RecordingError, match=r"run\.zarr"):
        load_recording(saved)
