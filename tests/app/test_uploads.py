"""What visitors send: judged by content, refused in a sentence, never able to reach other files."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from avl_analysis.errors import InputError
from avl_analysis.evaluation.comparison import load_comparison
from avl_analysis.evaluation.policy_files import load_policy
from avl_analysis.recordings.netcdf import check_hdf5
from avl_analysis.recordings.recording import load_recording
from avl_app.uploads import from_bytes, sent_samples, uploaded
from tests import tiny

LIMITS = {"most_bytes": 1 << 20, "most_pixels": 10_000}


def png(width: int = 20, height: int = 10) -> bytes:
    file = io.BytesIO()
    tiny.picture((width, height)).save(file, "PNG")
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A valid PNG header that announces side x side pixels, and next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def test_a_picture_is_judged_by_its_content() -> None:
    assert uploaded(png(), "name.txt", **LIMITS).pixels.shape == (10, 20, 3)
    with pytest.raises(InputError, match="not an image"):
        uploaded(b"<svg onload='alert(1)'/>", "innocent.png", **LIMITS)


@pytest.mark.parametrize("side", [101, 20_000, 65_000])
def test_too_many_pixels_are_refused_before_they_are_decoded(side: int) -> None:
    with pytest.raises(InputError, match="pixels; at most 0 million"):
        uploaded(bomb(side), "bomb.png", **LIMITS)


def test_too_many_bytes_and_truncated_files_are_refused() -> None:
    with pytest.raises(InputError, match="at most 1 MB"):
        uploaded(b"\0" * (1 << 21), "large.png", **LIMITS)
    with pytest.raises(InputError, match="damaged"):
        uploaded(png()[:60], "cut.png", **LIMITS)


def test_a_list_of_questions_may_name_only_pictures_that_came_with_it(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    line = b'{"image": "cat.png", "prompt": "what is it?", "answer": "a cat"}\n'
    samples = sent_samples({"q.jsonl": line, "cat.png": png()}, **LIMITS)
    assert samples[0].answers == ("a cat",)
    assert np.asarray(samples[0].images[0]).shape == (10, 20, 3)
    stolen = f'{{"image": "{secret}", "prompt": "what is it?"}}\n'.encode()
    with pytest.raises(InputError, match=r"line 1: no such picture: secret\.png"):
        sent_samples({"q.jsonl": stolen, "cat.png": png()}, **LIMITS)
    with pytest.raises(InputError, match="0 JSONL files"):
        sent_samples({"cat.png": png()}, **LIMITS)


def test_two_pictures_of_one_file_name_are_never_taken_for_each_other() -> None:
    lines = b"".join(
        b'{"image": "%s/p0.png", "prompt": "what is it?"}\n' % folder for folder in (b"x", b"y")
    )
    with pytest.raises(InputError, match=r"x/p0\.png and y/p0\.png"):
        sent_samples({"q.jsonl": lines, "p0.png": png()}, **LIMITS)
    same = b'{"image": "x/p0.png", "prompt": "what is it?"}\n' * 2
    assert len(sent_samples({"q.jsonl": same, "p0.png": png()}, **LIMITS)) == 2


def test_line_separators_inside_a_question_do_not_end_its_line() -> None:
    line = '{"image": "p0.png", "prompt": "one\u2028two\x85three"}\n'.encode()
    samples = sent_samples({"q.jsonl": line, "p0.png": png()}, **LIMITS)
    assert samples[0].prompt == "one\u2028two\x85three"


@pytest.mark.parametrize("line", ["[" * 100_000, '{"image": ' + "1" * 5000 + "}", "null", "5"])
def test_lines_that_are_no_questions_are_one_sentence(line: str) -> None:
    with pytest.raises(InputError):
        sent_samples({"q.jsonl": line.encode(), "p0.png": png()}, **LIMITS)


def test_a_file_of_groups_that_hold_each_other_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "loop.nc", "w") as file:
        group = file.create_group("a")
        group["again"] = group
    with pytest.raises(InputError, match="without end"):
        from_bytes(load_recording, (tmp_path / "loop.nc").read_bytes(), "loop.nc")


def test_messages_name_the_file_as_its_sender_does(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"weather\.nc") as caught:
        from_bytes(load_recording, b"not a recording", "weather.nc")
    assert "sent.nc" not in str(caught.value)
    with pytest.raises(InputError, match=r"the file sent \(empty\.png\) is not an image"):
        uploaded(b"", "empty.png", **LIMITS)
    half = hdf5(tmp_path / "run.nc", numbers=np.arange(1000.0))[:-200]
    with pytest.raises(InputError) as caught:
        from_bytes(load_recording, half, "half.nc")
    assert "eof" not in str(caught.value)
    assert "half.nc" in str(caught.value)


def test_a_file_that_is_no_recording_is_refused_without_naming_the_servers_folders() -> None:
    with pytest.raises(InputError, match=r"the file sent \(recording.nc\)") as caught:
        from_bytes(load_recording, b"not a recording", "recording.nc")
    assert "/tmp" not in str(caught.value)


def test_pictures_that_are_too_large_together_are_refused_before_any_is_decoded() -> None:
    line = b'{"image": "p0.png", "prompt": "what is it?"}\n'
    pictures = {
        f"p{i}.png": bomb(99) for i in range(9)
    }  # each within the limit, and damaged: decoding would say so
    with pytest.raises(InputError, match="million pixels together"):
        sent_samples({"q.jsonl": line, **pictures}, **LIMITS)


# -- recordings, comparisons, policies -------------------------------------------------------------


def hdf5(path: Path, **arrays: np.ndarray) -> bytes:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip", chunks=True)
    return path.read_bytes()


def test_a_small_file_that_unpacks_to_much_is_refused_unread(tmp_path: Path) -> None:
    data = hdf5(tmp_path / "bomb.nc", zeros=np.zeros(1 << 22, np.uint8))
    assert len(data) < 1 << 17
    check_hdf5(tmp_path / "bomb.nc", most_bytes=1 << 22)
    with pytest.raises(InputError, match="unpacks to 4 MB; at most 3 MB"):
        check_hdf5(tmp_path / "bomb.nc", most_bytes=3 << 20)


def test_a_file_cannot_take_its_numbers_from_another_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret words")
    hdf5(tmp_path / "other.nc", inside=np.zeros(3))
    with h5py.File(tmp_path / "link.nc", "w") as file:
        file["group/a"] = h5py.ExternalLink(str(tmp_path / "other.nc"), "/inside")
    with h5py.File(tmp_path / "raw.nc", "w") as file:
        file.create_dataset("a", (12,), "u1", external=[(str(secret), 0, 12)])
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.nc"), "inside", (3,))
    with h5py.File(tmp_path / "virtual.nc", "w") as file:
        file.create_virtual_dataset("a", layout)
    for name in ("link", "raw", "virtual"):
        with pytest.raises(InputError, match="another file") as caught:
            from_bytes(load_recording, (tmp_path / f"{name}.nc").read_bytes(), "recording.nc")
        assert "secret" not in str(caught.value)


def test_files_with_the_right_form_and_the_wrong_content_are_one_sentence(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "run.nc", "w") as file:
        file.attrs["format"], file.attrs["version"] = "avl-comparison", "many"
    with pytest.raises(InputError, match=r"the file sent \(compare.nc\)"):
        from_bytes(load_comparison, (tmp_path / "run.nc").read_bytes(), "compare.nc")
    with pytest.raises(InputError, match="not a JSON file"):
        from_bytes(load_policy, b"\x80\x04K\x01.", "policy.json")  # a pickle


def test_a_list_may_not_name_videos_of_the_server(tmp_path) -> None:
    line = json.dumps({"video": str(tmp_path), "prompt": "what?"})
    with pytest.raises(InputError, match="line 1: videos are not taken here"):
        sent_samples({"q.jsonl": line.encode()}, most_bytes=10**6, most_pixels=10**6)
