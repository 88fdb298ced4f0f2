"""Files that have the form of a recording but not its content are refused, with what is wrong."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr

from avl_analysis.capture.recorder import record
from avl_analysis.recordings.recording import load_recording
from avl_analysis.recordings.schema import FACTS_DIGEST, RecordingError
from tests import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.llava(kv_heads=2)
    with record(model, statistics=["modality_mass", "entropy"]) as recording:
        model.generate(**tiny.inputs(model, [5, 4], [1, 1]), max_new_tokens=3, do_sample=False)
    recording.annotate(0, prompt="what?", answer="red", words=["red"], boxes=[[1, 2, 3, 4]])
    return recording.save(tmp_path_factory.mktemp("saved") / "run.nc")


@pytest.fixture
def file(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(saved, tmp_path / "run.nc"))


def _facts(**facts: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file["tokens/facts"][0] = json.dumps(facts)
        del file.attrs[FACTS_DIGEST]

    return change


def _text(text: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file["tokens/facts"][0] = text
        del file.attrs[FACTS_DIGEST]

    return change


def _drop(name: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]

    return change


def _set(name: str, index: object, value: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[name][index] = value

    return change


def _attr(name: str, value: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file.attrs[name] = value

    return change


def _huge(file: h5py.File) -> None:
    file.create_dataset("statistics/x", shape=(10**12,), dtype="f8", chunks=(10**6,))


def _loop(file: h5py.File) -> None:
    file["statistics"]["again"] = file["/"]


def _outside(file: h5py.File) -> None:
    file["statistics"]["x"] = h5py.ExternalLink("/etc/passwd", "/x")


@pytest.mark.parametrize(
    "change",
    [
        _drop("tokens"),
        _drop("tokens/phase"),
        _drop("tokens/sample"),
        _drop("tokens/prompt_length"),
        _set("tokens/sample", 1, "000000"),
        _set("statistics/sample", 1, "000009"),
        _set("statistics/layer", 0, 7),
        _set("statistics/key_modality", 0, "smell"),
        _attr("version", "two"),
        _attr("version", 99),
        _attr("format", "something else"),
        _attr("query_heads", "many"),
        _text("{"),
        _text("[]"),
        _text("[" * 5000),
        _text('{"id": ' + "9" * 5000 + "}"),
        _facts(words=5),
        _facts(words=["a", 3]),
        _facts(answer=["red"]),
        _facts(boxes=[[1, 2]]),
        _facts(boxes=[["a", "b", "c", "d"]]),
        _facts(scene="kitchen"),
        _facts(scene={"seed": -1, "index": 0, "task": "colour"}),
        _facts(scene={"seed": 1, "index": 0, "task": "smell"}),
        _facts(picture_size=[0, 5]),
        _facts(picture=5),
        _facts(region_tokens=["a"]),
        _huge,
        _loop,
        _outside,
    ],
)
def test_a_changed_recording_is_refused_in_a_sentence(
    file: Path, change: Callable[[h5py.File], None]
) -> None:
    with h5py.File(file, "r+") as opened:
        change(opened)
    with pytest.raises(RecordingError) as error:
        load_recording(file)
    assert str(file) in str(error.value)


def test_a_changed_letter_among_the_facts_is_noticed(file: Path) -> None:
    content = file.read_bytes()
    assert content.count(b'"answer": "red"') == 1
    file.write_bytes(content.replace(b'"answer": "red"', b'"answer": "rad"'))
    with pytest.raises(RecordingError, match="not those that were written"):
        load_recording(file)


def test_a_file_of_an_earlier_program_without_the_digest_is_read(file: Path) -> None:
    with h5py.File(file, "r+") as opened:
        del opened.attrs[FACTS_DIGEST]
    assert load_recording(file).facts(0)["answer"] == "red"


def test_texts_in_place_of_numbers_are_refused(saved: Path, tmp_path: Path) -> None:
    with xr.open_dataset(saved, group="statistics", engine="h5netcdf") as opened:
        changed = opened.load()
    words = np.full(changed["modality_mass"].shape, "x", dtype=object)
    changed["modality_mass"] = (changed["modality_mass"].dims, words)
    path = Path(shutil.copy(saved, tmp_path / "words.nc"))
    with h5py.File(path, "r+") as file:
        del file["statistics"]
    changed.to_netcdf(path, group="statistics", mode="a", engine="h5netcdf")
    with pytest.raises(RecordingError, match="holds other things than numbers"):
        load_recording(path)


@pytest.mark.parametrize("seed", range(40))
def test_a_file_with_changed_bytes_is_read_or_refused_but_never_anything_else(
    file: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    content = bytearray(file.read_bytes())
    for place in rng.integers(0, len(content), 1 + seed % 5):
        content[place] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)
    with suppress(RecordingError):
        load_recording(file)
