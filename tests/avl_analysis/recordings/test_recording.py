"""Recordings are saved, loaded, merged and estimated without losing or changing a number."""

from __future__ import annotations

import io
import zipfile

import h5netcdf
import numpy as np
import pytest
import xarray as xr

from avl.kernels import backend_for
from avl_analysis.capture.recorder import record
from avl_analysis.errors import InputError
from avl_analysis.intervals import estimate
from avl_analysis.recordings import zarr_folder
from avl_analysis.recordings.recording import Recording, load_recording, merge
from avl_analysis.recordings.schema import RecordingError
from avl_analysis.recordings.tables import layer_tables
from tests import tiny
from tests.avl_analysis.recorded import close, model

FEW = [
    "modality_mass",
    "coverage",
    "entropy",
    "threshold_sparsity",
    "accumulated_score",
    "ppci_continuity",
]
"""One of every kind; files with many variables take their time."""

PROMPTS = [([9, 4], [1, 2]), ([6], [0]), ([3], [1])]


@pytest.fixture(scope="module")
def llava():
    return model(kv_heads=2, attn="sdpa")


def recorded(llava, number: int, first: int, **options) -> Recording:
    lengths, images = PROMPTS[number]
    batch = tiny.inputs(llava, lengths, images=images, seed=number)
    options = {"statistics": FEW, **options}
    with record(llava, first_sample=first, **options) as recording:
        llava.generate(**batch, max_new_tokens=number + 3, do_sample=False)
    return recording


@pytest.fixture(scope="module")
def parts(llava) -> list[Recording]:
    """Three recordings of two, one and one samples, of different lengths, steps and pictures."""
    return [recorded(llava, number, first) for number, first in enumerate((0, 2, 3))]


@pytest.fixture(scope="module")
def parts_with_everything(llava) -> list[Recording]:
    return [
        recorded(llava, number, first, statistics=None) for number, first in enumerate((0, 2, 3))
    ]


def same(one: Recording, other: Recording) -> None:
    assert one.samples == other.samples
    for group in one.data:
        xr.testing.assert_identical(one.data[group], other.data[group])


def test_a_recording_comes_back_from_a_file_as_it_was(llava, tmp_path):
    recording = recorded(llava, 0, 0, keep="attention", statistics=None)
    recording.annotate(0, prompt="what is red?", boxes=[[1, 2, 3, 4]], words=["a", "ß"])
    path = recording.save(tmp_path / "run.nc")
    loaded = load_recording(path)
    same(recording, loaded)
    assert loaded.facts(0) == {
        "prompt": "what is red?",
        "boxes": [[1, 2, 3, 4]],
        "words": ["a", "ß"],
    }
    assert loaded.facts(1) == {}
    assert loaded.attrs == recording.attrs
    assert loaded.names == recording.names
    xr.testing.assert_identical(loaded.dataset, recording.dataset)


class _Slowly(io.RawIOBase):
    """A file object that takes and gives bytes in parts and cannot seek, like a pipe."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = content

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        part = bytes(data[:1000])
        self.content += part
        return len(part)


def test_a_recording_goes_through_file_objects_as_it_was(llava, tmp_path):
    recording = recorded(llava, 0, 0)
    recording.annotate(0, prompt="what is red?")
    pipe, memory = _Slowly(), io.BytesIO()
    memory.write(b"before")
    recording.save(pipe)
    assert recording.save(memory) is None
    with zipfile.ZipFile(tmp_path / "run.zip", "w") as archive, archive.open("run.nc", "w") as file:
        recording.save(file)
    assert not memory.closed
    memory.seek(len("before"))
    with zipfile.ZipFile(tmp_path / "run.zip") as archive, archive.open("run.nc") as zipped:
        for source in (io.BytesIO(pipe.content), memory, zipped):
            loaded = load_recording(source)
            same(recording, loaded)
            assert loaded.facts(0) == recording.facts(0)
    (tmp_path / "run.nc").write_bytes(pipe.content)
    same(recording, load_recording(tmp_path / "run.nc"))


def test_file_objects_that_hold_or_take_no_recording_are_refused(parts, tmp_path):
    with (
        open(tmp_path / "run.txt", "w") as file,
        pytest.raises(RecordingError, match="open the file in binary mode"),
    ):
        parts[0].save(file)
    with pytest.raises(RecordingError, match="cannot write to int"):
        parts[0].save(3)
    with pytest.raises(RecordingError, match="the file object given does not hold a readable"):
        load_recording(io.BytesIO(b"no netCDF"))


def test_a_zarr_folder_without_zarr_names_the_extra(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(zarr_folder, "find_spec", lambda name: None)
    with pytest.raises(RecordingError, match=r"avl-analysis\[zarr\]"):
        parts[0].save(tmp_path / "run.zarr")
    (tmp_path / "run.zarr").mkdir()
    (tmp_path / "run.zarr" / "zarr.json").write_text("{}")
    with pytest.raises(RecordingError, match=r"avl-analysis\[zarr\]"):
        load_recording(tmp_path / "run.zarr")


def test_the_file_is_plain_netcdf_with_the_estimates_in_it(parts, tmp_path):
    path = parts[0].save(tmp_path / "run.nc")
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        assert set(tree.children) == {"tokens", "sums", "statistics", "maps", "attention"}
        found = tree["statistics"]["modality_mass_prefill"]
        assert found.dims == ("sample", "layer", "head", "query_modality", "key_modality")
        close(found, parts[0]["modality_mass_prefill"])
        assert found.attrs["long_name"] == "attention mass"
        assert tree.attrs["model_type"] == "llava"


def test_one_head_of_a_large_array_can_be_read_alone(llava, tmp_path):
    recording = recorded(llava, 0, 0, keep="attention", statistics=[])
    kept = recording.data["attention"]
    big = kept.isel(query=np.zeros(300, int)).assign_coords(query=np.arange(300))
    path = Recording({**recording.data, "attention": big}, recording.attrs).save(
        tmp_path / "run.nc"
    )
    with h5netcdf.File(path, "r") as file:
        chunks = file["attention/attention"].chunks
    assert chunks[1:3] == (3, 1) or chunks[1:3] == (1, 1)


def test_merging_gives_every_sample_its_own_numbers(parts_with_everything):
    together = merge(parts_with_everything)
    assert together.samples == ["000000", "000001", "000002", "000003"]
    for recording in parts_with_everything:
        for name in recording.names:
            for sample in recording.samples:
                one, other = (
                    recording[name].sel(sample=sample).values,
                    together[name].sel(sample=sample).values,
                )
                inner = tuple(slice(size) for size in one.shape)
                assert np.array_equal(other[inner], one, equal_nan=True), name


def test_merging_in_any_order_and_any_split_gives_the_same_recording(parts, tmp_path):
    a, b, c = parts
    together = merge([a, b, c])
    for other in (
        merge([c, a, b]),
        merge([merge([c, b]), a]),
        merge([a, merge([b, c])]),
        merge([together]),
    ):
        same(together, other)
        assert other.attrs == together.attrs
    saved = [load_recording(r.save(tmp_path / f"{i}.nc")) for i, r in enumerate(parts)]
    same(together, merge(saved))


def test_an_empty_recording_changes_nothing_in_a_merge(llava, parts):
    with record(llava) as empty:
        pass
    assert len(empty) == 0
    same(merge(parts), merge([*parts, empty]))
    with pytest.raises(RecordingError, match="nothing to merge"):
        merge([empty])


def test_facts_travel_with_their_sample_through_a_merge(parts, llava):
    one, other = recorded(llava, 0, 0), recorded(llava, 1, 2)
    one.annotate("000001", answer="red")
    other.annotate(answer="blue")
    together = merge([other, one])
    assert [together.facts(i).get("answer") for i in range(3)] == [None, "red", "blue"]


def test_recordings_that_do_not_belong_together_are_not_merged(llava, parts):
    with pytest.raises(
        RecordingError, match=r"samples 000000, 000001 are in more than one.*first_sample"
    ):
        merge([parts[0], recorded(llava, 0, 0)])
    with pytest.raises(RecordingError, match="differ in statistics"):
        merge([parts[0], recorded(llava, 1, 5, statistics=["entropy"])])
    with pytest.raises(RecordingError, match="differ in layer"):
        merge([parts[0], recorded(llava, 1, 5, layers=[0, 1])])
    with pytest.raises(RecordingError, match="in some of the recordings only"):
        merge([parts[0], recorded(llava, 1, 5, keep="attention")])


def test_padding_between_samples_of_different_length_is_marked_not_zero(parts):
    together = merge(parts)
    steps = (together.tokens["phase"] >= 0).sum("step").values.tolist()
    assert steps == [3, 3, 4, 5]
    for sample, count in enumerate(steps):
        values = together["modality_mass"][sample].values
        assert not np.isnan(values[:, :, :count]).any()
        assert np.isnan(values[:, :, count:]).all()
    assert (
        together.tokens["token_id"][2, int(together.tokens["prompt_length"][2]) + 3 :] == -1
    ).all()


def test_the_quotient_of_a_sum_and_its_count_is_the_mean(parts):
    recording = parts[0]
    total, count = (
        recording.total("modality_mass_prefill"),
        recording.data["sums"]["modality_mass_prefill_count"],
    )
    close(recording["modality_mass_prefill"] * count, total)
    with pytest.raises(KeyError, match="not kept as a sum"):
        recording.total("modality_mass")


def test_an_estimate_is_a_mean_over_samples_with_a_bootstrap_interval(parts):
    together = merge(parts)
    found = together.estimate("modality_mass", keep=("layer", "key_modality"), step=slice(1, None))
    assert found["mean"].dims == ("layer", "key_modality")
    per_sample = together["modality_mass"].sel(step=slice(1, None)).mean(["head", "step"])
    close(found["mean"], per_sample.mean("sample"))
    assert (found["n"] == 4).all()
    assert np.isnan(found["low"]).all()  # four samples have no interval
    one = parts[1].estimate("entropy")
    assert int(one["n"]) == 1
    assert np.isnan(one["low"])


def test_stats_and_reports_print_the_same_interval_for_the_same_number():
    rng = np.random.default_rng(0)
    values = rng.beta(2, 5, (9, 2, 3, 6)).astype(np.float32)
    values[0, 0, :, 3:] = np.nan
    names = np.array([f"{i:06d}" for i in range(9)], dtype=object)
    mass = xr.DataArray(values, dims=("sample", "layer", "head", "step"), coords={"sample": names})
    mass = mass.assign_coords(layer=[0, 1], step=np.arange(6))
    data = {group: xr.Dataset() for group in ("tokens", "sums", "maps", "attention")}
    recording = Recording({**data, "statistics": mass.to_dataset(name="first_token_mass")}, {})
    (table,) = layer_tables(recording, ["first_token_mass"])
    decode = slice(1, None)
    theirs = recording.estimate("first_token_mass", ("layer",), step=decode)
    drawn = estimate(mass.sel(step=decode), ("layer",))
    for layer in range(2):
        mean, low, high = (float(theirs[part][layer]) for part in ("mean", "low", "high"))
        assert table.cells[layer] == (f"{mean:.3g} [{low:.3g}, {high:.3g}]",)
        assert low < mean < high
        assert (low, high) == (float(drawn.low[layer]), float(drawn.high[layer]))


def test_half_lives_that_are_infinite_are_counted_and_not_dropped():
    """Four of nine samples do not decay; of the others one has an absurdly long half-life."""
    lives = np.array([20.0, np.inf, 30.0, np.inf, 1e76, np.inf, 25.0, np.inf, 22.0])
    rates = np.array([0.2, -0.3, 0.1, -0.4, 0.001, -0.3, 0.2, -0.2, 0.2])
    values = np.stack([lives, rates], -1)[:, None]
    fit = xr.DataArray(values, dims=("sample", "layer", "decay_parameter"))
    fit = fit.assign_coords(
        sample=np.array([str(i) for i in range(9)], dtype=object),
        layer=[0],
        decay_parameter=["half_life", "rate"],
    )
    data = {group: xr.Dataset() for group in ("tokens", "sums", "maps", "attention")}
    recording = Recording({**data, "statistics": fit.to_dataset(name="text_age_fit")}, {})
    ((life, rate),) = layer_tables(recording, ["text_age_fit"])[0].cells
    assert life == "1e+76 [22, inf] (median, 4 of 9 infinite)"
    assert rate.startswith("-0.0554 [")
    mean = recording.estimate("text_age_fit", decay_parameter="half_life")
    assert float(mean["mean"]) == np.inf
    assert int(mean["n"]) == 9
    middle = recording.estimate("text_age_fit", decay_parameter="half_life", median=True)
    assert [float(middle[part]) for part in ("mean", "low", "high")] == [1e76, 22.0, np.inf]


def test_an_estimate_leaves_out_samples_that_have_no_such_number(parts):
    found = merge(parts).estimate("coverage", keep=("key_modality",))
    assert found["n"].sel(key_modality=["image", "text"]).values.tolist() == [3, 4]
    with pytest.raises(RecordingError, match=r"coverage has no token; it has sample, layer"):
        merge(parts).estimate("coverage", keep=("token",))


def test_an_unknown_name_is_answered_with_the_known_ones(parts):
    with pytest.raises(KeyError, match=r"holds no 'mass'; it holds accumulated_score"):
        parts[0]["mass"]
    with pytest.raises(
        RecordingError, match=r"no sample 7; this recording holds 2 samples \(000000 to 000001\)"
    ):
        parts[0].annotate(7, answer="red")
    with pytest.raises(RecordingError, match="plain numbers"):
        parts[0].annotate(0, picture=object())


def test_files_that_are_no_recordings_are_refused_with_the_reason(parts, tmp_path):
    with pytest.raises(InputError, match="there is no recording file"):
        load_recording(tmp_path / "missing.nc")
    text = tmp_path / "text.nc"
    text.write_text("not a netCDF file")
    with pytest.raises(InputError, match="not a readable netCDF file"):
        load_recording(text)
    foreign = tmp_path / "foreign.nc"
    xr.Dataset({"temperature": ("day", [1.0, 2.0])}).to_netcdf(foreign, engine="h5netcdf")
    with pytest.raises(InputError, match="not a recording of this toolkit"):
        load_recording(foreign)
    path = parts[1].save(tmp_path / "cut.nc")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="not a readable netCDF file"):
        load_recording(path)
    with pytest.raises(InputError, match="there is no recording file"):
        load_recording(tmp_path)


def test_a_file_of_another_version_is_refused(parts, tmp_path):
    path = parts[1].save(tmp_path / "old.nc")
    with h5netcdf.File(path, "a") as file:
        file.attrs["version"] = 99
    with pytest.raises(InputError, match="recording format 99, this program reads 2"):
        load_recording(path)


def test_nothing_recorded_is_nothing_to_save(llava, tmp_path):
    with record(llava) as empty:
        pass
    with pytest.raises(RecordingError, match="nothing was recorded"):
        empty.save(tmp_path / "empty.nc")
    with pytest.raises(RecordingError, match="cannot write"):
        recorded(llava, 1, 0).save(tmp_path / "no such folder" / "run.nc")


def test_a_recording_says_where_it_comes_from(parts):
    attrs = parts[0].attrs
    assert attrs["model_type"] == "llava"
    assert attrs["attention_backend"] == "sdpa"
    assert attrs["dtype"] == "float32"
    assert attrs["kernels"] == backend_for("cpu")
    assert "torch=" in attrs["libraries"]
    assert "ThresholdSparsity(threshold=0.01)" in attrs["statistics"]
    assert attrs["date"].startswith("20")
    tokens = parts[0].tokens
    assert tokens["modality_count"].values.tolist() == [[3, 16, 9], [3, 32, 4]]
    assert set(tokens["row"].values[0, 3:19].tolist()) == {0, 1, 2, 3}
